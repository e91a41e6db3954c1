"""How the tests run the training script: as its users do, in processes of its own, at times with a fault.

Most are started with PYTHON (warm_python.py). Those that are killed from outside are not, since a fork may
outlive the process in front of it for a moment. One run of each kind uses a real interpreter.
"""

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import textwrap
from pathlib import Path

import pytest
import torch
from warm_python import warm_python

from checkpoint import build_model, load_checkpoint

ROOT = Path(__file__).resolve().parent.parent
PYTHON = warm_python()
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON_EXEC": PYTHON}  # torchrun starts workers with it
STREAMS = ("train", "val", "val_bpb", "lr", "norm")
LAYERS = ("norm_wte", "norm_wpe", "norm_h0", "norm_h1", "norm_ln_f")
SHAPE = {"block_size": 64, "vocab_size": 384, "n_vocab": 257, "n_layer": 2, "n_head": 2, "n_embd": 32}

# after `python -c`: go on as `python SCRIPT [ARGUMENT ...]`
RUN_THE_REST = ("import os, runpy, sys; sys.argv = sys.argv[1:]; sys.path[0] = os.path.dirname(sys.argv[0]); "
                "runpy.run_path(sys.argv[0], run_name='__main__')")


def load_model(path):
    """(model, state) of a checkpoint."""
    state = load_checkpoint(path)
    return build_model(state, str(path)), state


def arguments(flags, **overrides):
    return [f"--{key}={value}" for key, value in {**flags, **overrides}.items()]


def command(flags, processes=1, script=ROOT / "train_gpt2.py", launcher=(), python=PYTHON, **overrides):
    """The command line of a run; several processes are torchrun's, with `launcher` as its flags."""
    if processes > 1 or launcher:
        alone = [] if any("rdzv" in flag for flag in launcher) else ["--standalone"]
        launcher = ["-m", "torch.distributed.run", *alone, f"--nproc_per_node={processes}", *launcher]
    return [python, *launcher, str(script), *arguments(flags, **overrides)]


def attempt(flags, *where, python=PYTHON, **overrides):
    """A run that need not succeed: the caller looks at its exit code and at what it said."""
    return subprocess.run(command(flags, *where, python=python, **overrides), capture_output=True, text=True,
                          timeout=600, env={**ENVIRONMENT, "PYTHON_EXEC": python})


def train(flags, *where, **overrides):
    done = attempt(flags, *where, **overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def with_fault(folder, fault):
    """A script that runs train_gpt2.py after the Python source `fault`, which breaks something."""
    path = Path(folder, "faulty.py")
    path.write_text(f"import os, runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\n{textwrap.dedent(fault)}\n"
                    f"runpy.run_path({str(ROOT / 'train_gpt2.py')!r}, run_name='__main__')\n",
                    encoding="utf-8")
    return path


FORWARD = """
{before}
import signal, time, torch, model
forward, calls = model.GPT.forward, 0
def faulty(self, *args, **kwargs):
    global calls
    calls += self.training
{code}
    return forward(self, *args, **kwargs)
model.GPT.forward = faulty
"""


def on_forward(folder, code, before=""):
    """A script in which `code` comes before each forward pass; `calls` counts those in training, from 1."""
    code = textwrap.indent(textwrap.dedent(code), "    ")
    return with_fault(folder, FORWARD.format(before=textwrap.dedent(before), code=code))


def fault(folder, call, action, rank=0, before=""):
    """A script in which `action` comes before micro-batch `call`, counted from 1, in the first start."""
    return on_forward(folder, f"""
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if first and os.environ.get("RANK", "0") == "{rank}" and self.training and calls == {call}:
            {action}""", before)


def signal_self(name):
    return f"os.kill(os.getpid(), signal.{name})"


def kill_once_there_is(path):
    """An action for fault(): kill -9, but not before the file is on disk, where a thread writes it."""
    return (f"any(time.sleep(0.01) for _ in iter(lambda: os.path.exists({str(path)!r}), True)); "
            f"{signal_self('SIGKILL')}")


# a thousand ports for each pytest worker, below those that the system hands out; two sessions begin apart
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 12
PORTS = itertools.count(20_000 + 1_000 * WORKER + os.getpid() % 800)


def free_port():
    for port in PORTS:
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


def kill_torchrun(agent):
    """Its workers too, which it starts in sessions of their own. If it has ended, so will they."""
    if agent.poll() is not None:
        return
    ps = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True)
    pairs = (map(int, line.split()) for line in ps.stdout.splitlines())
    for pid in [agent.pid, *(pid for pid, parent in pairs if parent == agent.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    agent.wait()


def start_rank(line, rank, world_size, port, folder=None):
    """One process of a group, without a launcher that would restart or kill it."""
    return subprocess.Popen(line, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**ENVIRONMENT, "RANK": str(rank), "WORLD_SIZE": str(world_size),
                                 "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})


def start_by_hand(commands, folders=None, world_size=None):
    """[Popen] of one group, by rank; with a larger `world_size`, the last ones are missing."""
    port = free_port()
    return [start_rank(line, rank, world_size or len(commands), port, folders and folders[rank])
            for rank, line in enumerate(commands)]


def finish(processes):
    """[(exit code, stdout, stderr)] of processes of one group, none of which may hang."""
    try:
        texts = [process.communicate(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(processes, texts)]


def run_by_hand(*group, **options):
    return finish(start_by_hand(*group, **options))


def read_log(log_dir, *streams):
    """{stream: {step: value as text}}: as text, because equal must mean equal to the last digit."""
    found = {stream: {} for stream in streams}
    for line in (Path(log_dir) / "log.txt").read_text(encoding="utf-8").splitlines():
        step, stream, value = line.split()
        if stream in found:
            assert int(step) not in found[stream], f"step {step} {stream} is in the log twice"
            found[stream][int(step)] = value
    return found


def values(log_dir, stream):
    return [float(value) for value in read_log(log_dir, stream)[stream].values()]


def losses(log_dir):
    return values(log_dir, "train")


def assert_same_run(one, other, streams=STREAMS, rel=1e-5):
    """Up to rounding."""
    for stream in streams:
        assert values(one, stream), stream
        assert values(one, stream) == pytest.approx(values(other, stream), rel=rel), stream


def tensors_of(value, place=()):
    """{place: tensor} of all tensors in nested containers."""
    if isinstance(value, torch.Tensor):
        return {place: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {there: tensor for key, item in items for there, tensor in tensors_of(item, (*place, key)).items()}


def assert_same_tensors(one, other):
    """Bit for bit, in whatever containers."""
    one, other = tensors_of(one), tensors_of(other)
    assert one.keys() == other.keys() and one
    assert [place for place in one if not torch.equal(one[place], other[place])] == []


def snapshot(folder):
    """{name: (time of the last write, size)}"""
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.iterdir()}
