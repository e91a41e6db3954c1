"""How the tests run the training script: as its users do, in processes of its own, at times with a fault.

Most are started with PYTHON (warm_python.py). Not those that are killed from outside: when the process in
front of a fork is dead, the fork may live for a moment. And one of each kind runs in a real interpreter.
"""

import os
import socket
import subprocess
import textwrap
from pathlib import Path

from warm_python import warm_python

ROOT = Path(__file__).resolve().parent.parent
PYTHON = warm_python()
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON_EXEC": PYTHON}  # torchrun starts workers with it


# after `python -c`: go on as `python SCRIPT [ARGUMENT ...]`
RUN_THE_REST = ("import os, runpy, sys; sys.argv = sys.argv[1:]; sys.path[0] = os.path.dirname(sys.argv[0]); "
                "runpy.run_path(sys.argv[0], run_name='__main__')")


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
                          timeout=240, env={**ENVIRONMENT, "PYTHON_EXEC": python})


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


FAULT = """
import signal, time
import model
forward, calls = model.GPT.forward, 0
def faulty(self, *args, **kwargs):
    global calls
    calls += self.training
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if first and os.environ.get("RANK", "0") == "{rank}" and self.training and calls == {call}:
        {action}
    return forward(self, *args, **kwargs)
model.GPT.forward = faulty
"""


def fault(folder, call, action, rank=0, before=""):
    """A script in which `action` comes before micro-batch `call`, counted from 1, in the first start."""
    return with_fault(folder, before + FAULT.format(rank=rank, call=call, action=action))


def signal_self(name):
    return f"os.kill(os.getpid(), signal.{name})"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_by_hand(commands, folders=None):
    """Processes of one group without a launcher that would restart or kill them: [Popen] by rank."""
    port = str(free_port())
    return [
        subprocess.Popen(line, cwd=folders and folders[rank], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                         text=True, env={**ENVIRONMENT, "RANK": str(rank), "LOCAL_RANK": "0",
                                         "WORLD_SIZE": str(len(commands)), "MASTER_ADDR": "127.0.0.1",
                                         "MASTER_PORT": port})
        for rank, line in enumerate(commands)]


def read_log(log_dir, *streams):
    """{stream: {step: value as text}}: as text, because equal must mean equal to the last digit."""
    found = {stream: {} for stream in streams}
    for line in (Path(log_dir) / "log.txt").read_text(encoding="utf-8").splitlines():
        step, stream, value = line.split()
        if stream in found:
            assert int(step) not in found[stream], f"step {step} {stream} is in the log twice"
            found[stream][int(step)] = value
    return found


def losses(log_dir):
    return [float(value) for value in read_log(log_dir, "train")["train"].values()]


def snapshot(folder):
    """{name: (time of the last write, size)}"""
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.iterdir()}
