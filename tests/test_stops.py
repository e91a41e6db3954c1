"""Stops and restarts: whatever ends a run, the next start goes on as if nothing had been."""

import contextlib
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from training import (
    ENVIRONMENT,
    ROOT,
    STREAMS,
    arguments,
    assert_same_run,
    attempt,
    command,
    fault,
    free_port,
    kill_once_there_is,
    kill_torchrun,
    losses,
    on_forward,
    read_log,
    run_by_hand,
    signal_self,
    snapshot,
    train,
    with_fault,
)

from checkpoint import list_checkpoints, load_checkpoint
from shards import write_shard


@pytest.mark.parametrize(("name", "times"), [("SIGTERM", 2), ("SIGINT", 1)])
def test_a_signal_finishes_the_step_and_saves(flags, tmp_path, shared_run, name, times):
    """In the middle of step 5, where a second SIGTERM changes nothing; and once in the step before one at
    which the run validates and saves anyway."""
    flags |= {"log_dir": tmp_path / "log", "max_steps": 20}
    done = attempt(flags, 1, fault(tmp_path, 5 * 4 + 2, "; ".join([signal_self(name)] * times)))
    assert f"\n{name}: finishing step 5, then saving\n" in done.stderr and done.returncode == 0
    assert f"stopped by {name}: step 6," in done.stdout and "continue with --resume" in done.stdout
    assert list_checkpoints(tmp_path / "log")[-1].name == "ckpt_0000006.pt"
    out = train(flags, 1, fault(tmp_path, 4 + 2, signal_self(name)), resume="true")
    assert f"resume: {tmp_path}/log/ckpt_0000006.pt" in out
    state = load_checkpoint(tmp_path / "log")
    assert state["step"] == 8 and state["val_loss"] is None
    train(flags, resume="true")
    assert read_log(tmp_path / "log", *STREAMS) == read_log(shared_run(max_steps=20), *STREAMS)
    one, two = load_checkpoint(shared_run(max_steps=20)), load_checkpoint(tmp_path / "log")
    assert one["best"] == two["best"] and one["guard"] == two["guard"]


def test_ctrl_c_that_ends_the_reader_too_saves_all_the_same(flags, tmp_path):
    """As with `2>&1 | tee out.txt`: the pipe is closed when the signal comes."""
    flags |= {"log_dir": tmp_path / "log", "max_steps": 100_000}
    slow = on_forward(tmp_path, "time.sleep(0.02)")
    process = subprocess.Popen(command(flags, 1, slow, python=sys.executable), stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT)
    for line in process.stdout:
        if line.startswith("step 5 | loss"):
            break
    process.send_signal(signal.SIGSTOP)  # so that it prints nothing in between
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    assert process.wait(240) == 0
    assert 5 < load_checkpoint(tmp_path / "log")["step"] < 100_000


def test_sigterm_before_the_first_step(flags, tmp_path, shared_run):
    """While a resumed run makes its model: it says so and exits with 0, and nothing has changed."""
    log_dir = shared_run(max_steps=4)
    before = snapshot(log_dir)
    early = f"""
        import signal, model
        init = model.GPT.__init__
        def signalled(self, config):
            {signal_self("SIGTERM")}
            init(self, config)
        model.GPT.__init__ = signalled
    """
    done = attempt(flags, 1, with_fault(tmp_path, early), log_dir=log_dir, resume="true")
    assert done.returncode == 0 and "stopped by SIGTERM before the first step" in done.stderr
    assert "step 4" not in done.stdout
    assert snapshot(log_dir) == before


def test_a_second_interrupt_ends_at_once(flags, tmp_path):
    script = fault(tmp_path, 22, f"{signal_self('SIGINT')}; {signal_self('SIGINT')}")
    done = attempt(flags, 1, script, log_dir=tmp_path / "log")
    assert done.returncode == 130 and "interrupted" in done.stderr
    assert list_checkpoints(tmp_path / "log")[-1].name == "ckpt_0000004.pt"


def test_max_hours(flags, tmp_path, shared_run):
    flags |= {"log_dir": tmp_path / "log", "max_steps": 20}
    assert "stopped by --max_hours: step 1," in train(flags, max_hours=1e-6)
    assert "stopped by --max_hours: step 2," in train(flags, max_hours=1e-6, resume="true")
    train(flags, max_hours=100, resume="true")
    assert read_log(tmp_path / "log", *STREAMS) == read_log(shared_run(max_steps=20), *STREAMS)


def test_one_signalled_process_stops_all(flags, tmp_path):
    """Rank 1 gets it; both finish the same step and exit with 0."""
    script = fault(tmp_path, 2 * 5 + 1, signal_self("SIGTERM"), rank=1)
    ends = run_by_hand([command(flags, 1, script, log_dir=tmp_path / "log")] * 2)
    assert [returncode for returncode, _, _ in ends] == [0, 0], ends
    assert "stopped by a signal to another process: step 6," in ends[0][1]
    assert list_checkpoints(tmp_path / "log")[-1].name == "ckpt_0000006.pt"


def test_killed_while_a_checkpoint_is_being_written(flags, tmp_path, shared_run):
    """Steps continue while a slow disk has half of the checkpoint of step 8. Killed with -9 in step 11, the
    run resumes from step 4."""
    slow = """
        import threading, time, checkpoint
        save, saves, half_written = checkpoint.torch.save, [], threading.Event()
        def crawl(state, file):
            saves.append(state)
            if len(saves) == 2:
                file.write(bytes(100_000))
                file.flush()
                half_written.set()
                time.sleep(600)
            return save(state, file)
        checkpoint.torch.save = crawl
    """
    script = fault(tmp_path, 11 * 4 + 2, f"half_written.wait(); {signal_self('SIGKILL')}", before=slow)
    flags |= {"log_dir": tmp_path / "log", "max_steps": 20}
    assert attempt(flags, 1, script).returncode == -signal.SIGKILL
    assert len(losses(tmp_path / "log")) == 11
    written = {re.sub(r"\.pt\.\d+", "", name): size for name, (_, size) in snapshot(tmp_path / "log").items()}
    assert written["ckpt_0000008.tmp"] == 100_000
    assert [path.name for path in list_checkpoints(tmp_path / "log")] == ["ckpt_0000004.pt"]
    assert "starting at 4" in train(flags, resume="true")
    assert read_log(tmp_path / "log", *STREAMS) == read_log(shared_run(max_steps=20), *STREAMS)
    leftovers = [path.name for path in (tmp_path / "log").iterdir() if "tmp" in path.name]
    assert not leftovers, "the partial file of the killed run must be removed"


def test_sigterm_to_torchrun(flags, tmp_path):
    """It reaches the workers, and torchrun gives them the time to save."""
    flags |= {"log_dir": tmp_path, "max_steps": 100_000, "val_interval": 0, "checkpoint_interval": 0}
    process = subprocess.Popen(
        command(flags, 2, python=sys.executable), stdout=subprocess.PIPE, text=True,
        env={**ENVIRONMENT, "PYTHON_EXEC": sys.executable, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "240"})
    try:
        for line in process.stdout:
            if line.startswith("step 5 |"):
                process.terminate()
                break
        out = process.communicate(timeout=240)[0]
    finally:
        kill_torchrun(process)
    step = int(re.search(r"stopped by SIGTERM: step (\d+),", out)[1])
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"ckpt_{step:07d}.pt"]


def test_torchrun_restarts_a_killed_worker(flags, tmp_path, shared_run):
    """No --resume in the command: the restarted processes find out by themselves."""
    script = fault(tmp_path, 2 * 10 + 1, signal_self("SIGKILL"), rank=1)
    out = train(flags, 2, script, ["--max-restarts=1"], python=sys.executable, log_dir=tmp_path / "log",
                max_steps=20)
    starts = re.findall(r"starting at (\d+)", out)
    assert starts == ["0", "8"], out
    assert_same_run(tmp_path / "log", shared_run(max_steps=20), ["train"])


def test_a_restart_does_not_touch_the_run_of_another_command(flags, shared_run):
    """--log_dir forgotten, --max-restarts given: refused, and not tried again."""
    log_dir = shared_run(max_steps=4)
    before = snapshot(log_dir)
    done = attempt(flags, 1, launcher=["--max-restarts=1"], python=sys.executable, log_dir=log_dir,
                   max_steps=8, max_lr=2e-2)
    assert done.returncode != 0 and done.stderr.count("already holds a run") == 1, done.stderr
    assert snapshot(log_dir) == before


def test_the_same_command_typed_again_is_not_a_restart(flags, tmp_path):
    """Also where both have one --rdzv_id."""
    launcher = ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", "--rdzv_id=mine", "--max-restarts=2"]
    for words in ("starting at 0", "already holds a run"):
        done = attempt(flags, 1, launcher=launcher, python=sys.executable, log_dir=tmp_path / "log",
                       max_steps=4)
        assert (done.stdout + done.stderr).count(words) == 1, done.stderr
    assert len(losses(tmp_path / "log")) == 4


def test_what_may_be_gone_next_time_is_tried_again(flags, tmp_path):
    """An error of the disk in the first start; and no parent but torchrun is ever ended."""
    eio = """
        import shards
        def failing(self, *arguments):
            raise OSError(5, "Input/output error", "shard")
        if os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
            shards.TokenStream.read = failing
    """
    done = attempt(flags, 1, with_fault(tmp_path, eio), ["--max-restarts=1"], python=sys.executable,
                   log_dir=tmp_path / "log", max_steps=4)
    assert done.returncode == 0 and "Input/output error" in done.stderr and "done: step 4" in done.stdout
    environment = {**ENVIRONMENT, "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_MAX_RESTARTS": "1",
                   "TORCHELASTIC_RESTART_COUNT": "0"}
    line = f": pytorch; {sys.executable} {ROOT}/plot_log.py --nope=1; echo $?"
    wrapped = subprocess.run(["sh", "-c", line], capture_output=True, text=True, env=environment)
    assert wrapped.stdout == "2\n" and wrapped.returncode == 0, wrapped


def test_a_divergence_is_not_repeated_by_torchrun(flags, tmp_path):
    nan = on_forward(tmp_path, "if self.training: return forward(self, *args, **kwargs) * torch.nan")
    done = attempt(flags, 1, nan, ["--max-restarts=3"], python=sys.executable, log_dir=tmp_path / "log",
                   max_bad_steps=2)
    assert done.returncode != 0 and done.stderr.count("2 steps in a row were skipped") == 1, done.stderr
    assert done.stdout.count("starting at") == 1


def test_a_stop_with_fewer_val_windows_than_processes(flags, tmp_path, tiny_data):
    (tmp_path / "data").mkdir()
    for path in tiny_data.glob("*_train_*"):
        (tmp_path / "data" / path.name).write_bytes(path.read_bytes())
    write_shard(tmp_path / "data" / "tiny_val_000000.npy", np.arange(80, dtype=np.uint16))
    flags |= {"data_dir": tmp_path / "data", "log_dir": tmp_path / "log"}
    train(flags, 2, max_hours=1e-9)
    assert load_checkpoint(tmp_path / "log")["step"] == 1


def test_what_was_skipped_after_the_checkpoint_is_forgotten(flags, tmp_path):
    """Steps 2 and 6 are skipped, the run is killed and resumes from step 4: the log keeps the first alone."""
    script = on_forward(tmp_path, f"""
        if self.training and calls in (9, 25):
            return forward(self, *args, **kwargs) * torch.nan
        if self.training and calls == 30:
            {kill_once_there_is(tmp_path / "log" / "ckpt_0000004.pt")}""")
    flags |= {"log_dir": tmp_path / "log"}
    assert attempt(flags, 1, script).returncode == -signal.SIGKILL
    assert list(read_log(tmp_path / "log", "skipped")["skipped"]) == [2, 6]
    train(flags, resume="true")
    assert read_log(tmp_path / "log", "skipped")["skipped"] == {2: "1"}
    assert list(read_log(tmp_path / "log", "skipped_window")["skipped_window"]) == [2]


def start_node(flags, port, script, address, nnodes="2"):
    """One machine's torchrun, with one process. The lowest address has rank 0.

    Without the variable, torch 2.13's agents share one store, whose address a new agent never learns: it and
    the survivors wait for each other in vain.
    """
    conf = "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=8,join_timeout=120"
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nnodes}", "--nproc_per_node=1",
         "--max-restarts=3", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=test",
         f"--rdzv_conf={conf}", f"--local_addr={address}", str(script), *arguments(flags)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**ENVIRONMENT, "PYTHON_EXEC": sys.executable, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})


def wait_for_port(port):
    for _ in range(1200):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.05)
    raise AssertionError(f"nothing listens at port {port}")


@pytest.mark.parametrize("replaced", [True, False])
def test_a_node_dies(flags, tmp_path, replaced):
    """Two machines' agents; the second and its worker are killed. A new one takes its place, or the first
    continues alone: either way the run equals that of a single process."""
    flags |= {"max_steps": 40, "checkpoint_interval": 4, "keep_checkpoints": 3}
    train(flags, log_dir=tmp_path / "one")
    dead = tmp_path / "dead"  # a replacement has the same rank and restart count
    script = on_forward(tmp_path, f"""
        first = not os.path.exists({str(dead)!r})
        if first and os.environ["WORLD_SIZE"] == "1":  # no step before the second machine has come
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(600)
        if first and os.environ["RANK"] == "1" and self.training and calls == 2 * 10 + 1:
            os.mkdir({str(dead)!r})
            os.kill(os.getppid(), signal.SIGKILL)
            {signal_self("SIGKILL")}""")
    flags |= {"log_dir": tmp_path / "two"}
    port, nnodes = free_port(), "2" if replaced else "1:2"
    first = start_node(flags, port, script, "127.0.0.1", nnodes)
    nodes = [first]
    try:
        wait_for_port(port)  # so that it is the host of the rendezvous
        nodes.append(start_node(flags, port, script, "127.0.0.2", nnodes))
        assert nodes[1].wait(timeout=240) == -signal.SIGKILL
        if replaced:  # by a machine that comes when the dead one counts as lost: 8 missed calls
            time.sleep(12)
            nodes.append(start_node(flags, port, script, "127.0.0.3", nnodes))
        out = first.communicate(timeout=240)[0]
    finally:
        for node in nodes:
            kill_torchrun(node)
    starts = re.findall(r"starting at (\d+)", out)  # the first node may begin before the second has come
    assert first.returncode == 0 and starts[-1] == "8" and set(starts[:-1]) == {"0"}, out
    assert f"on {2 if replaced else 1} process(es)" in out.rpartition(" steps, starting at 8")[0], out
    assert_same_run(tmp_path / "two", tmp_path / "one", ["train"])
