"""Processes that do not find each other, that differ, that fail alone, that lose their launcher."""

import os
import re
import shutil
import subprocess
import sys
import time

import pytest
from training import (
    ENVIRONMENT,
    PYTHON,
    ROOT,
    attempt,
    command,
    fault,
    finish,
    free_port,
    kill_torchrun,
    losses,
    on_forward,
    run_by_hand,
    start_rank,
    train,
    with_fault,
)

from checkpoint import list_checkpoints, load_checkpoint
from configurator import UserError
from files import locked
from ranks import Ranks, by_value, name_ranks

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")


# ---- the environment -------------------------------------------------------------


@pytest.mark.parametrize(("environment", "words"), [
    ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE=2 but MASTER_ADDR is not set: start with torchrun"),
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 but RANK is not set"),
    ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost"}, "MASTER_PORT is not set"),
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' in the environment is not a whole number"),
    ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "-1"}, "LOCAL_RANK='-1'"),
    ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "x", "MASTER_PORT": "29500"}, "RANK=2, WORLD_SIZE=2"),
    ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "99999"}, "MASTER_PORT=99999"),
    ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "ssh"}, "MASTER_PORT='ssh'"),
    ({"RANK": "3", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "RANK=3, WORLD_SIZE=1"),
])
def test_an_environment_that_makes_no_sense(monkeypatch, environment, words):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert not Ranks().many
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as error:
        Ranks()
    assert words in str(error.value)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_peer_that_does_not_come(flags, tmp_path, rank):
    """A closed port for rank 1, a missing process for rank 0: a line names the missing one, then it exits."""
    script = with_fault(tmp_path, "import ranks\nranks.NOTE_SECONDS, ranks.LIMIT_SECONDS = 0.2, 3")
    port = free_port()
    process = start_rank(command(flags, 1, script, log_dir=tmp_path / "log"), rank, 2, port)
    (returncode, _, err), = finish([process])
    assert returncode == 2 and "Traceback" not in err, err
    peer = f"for rank {1 - rank} at 127.0.0.1:{port}"
    assert re.search(rf"rank {rank} on \S+ is waiting {peer}\n", err), err
    assert re.search(rf"error: rank {rank} on \S+ waited \d+ s {peer}; start all 2 processes", err), err


def test_a_signal_while_waiting_for_the_others(flags, tmp_path):
    script = with_fault(tmp_path, "import ranks\nranks.NOTE_SECONDS = 0.2")
    process = start_rank(command(flags, 1, script, log_dir=tmp_path / "log"), 0, 2, free_port())
    assert any("is waiting for" in line for line in process.stderr)
    process.terminate()
    (returncode, _, err), = finish([process])
    assert returncode == 0 and "stopped by SIGTERM before the first step" in err


def test_names_of_ranks():
    assert [name_ranks(ranks) for ranks in ([3], [0, 1], [0, 1, 2, 5, 8, 9])] == [
        "rank 3", "ranks 0-1", "ranks 0-2, 5, 8-9"]
    assert by_value(["a", 1, "a"]) == "a on ranks 0, 2, but 1 on rank 1"


# ---- processes that differ -------------------------------------------------------


def test_settings_and_code_must_be_the_same(flags, tmp_path):
    """Rank 1 has another max_lr and another model.py: both are named, and neither trains."""
    repository = tmp_path / "other"
    repository.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, repository)
    with open(repository / "model.py", "a", encoding="utf-8") as file:
        file.write("# changed\n")
    flags |= {"log_dir": tmp_path / "log"}
    script = repository / "train_gpt2.py"
    ends = run_by_hand([command(flags), command(flags, 1, script, max_lr=2e-2)])
    for returncode, _, stderr in ends:
        assert returncode == 2, stderr
        assert "max_lr is 0.01 on rank 0, but 0.02 on rank 1; model.py is" in stderr, stderr
        assert "checkpoint.py" not in stderr
    assert not (tmp_path / "log").exists()


def test_a_weight_that_changes_on_one_rank_ends_the_run(flags, tmp_path):
    """As a memory error on one card would: found at the next validation, before anything is saved."""
    script = fault(tmp_path, 2 * 6 + 1, "self.transformer.h[1].mlp.c_fc.weight.data[3, 5] += 1e-6", rank=1)
    ends = run_by_hand([command(flags, 1, script, log_dir=tmp_path / "log")] * 2)
    newest = tmp_path / "log" / "ckpt_0000004.pt"
    for returncode, _, stderr in ends:
        assert returncode == 1 and "at step 8 the weights of rank 1 of 2 differ" in stderr, stderr
        assert f"Last good checkpoint: {newest}" in stderr
    assert list_checkpoints(tmp_path / "log") == [newest]


# ---- a process that fails alone --------------------------------------------------

NOT_FINITE = """
import decoding
if os.environ["RANK"] == "0":
    def sampled(logits, *arguments):
        raise decoding.UserError("the model's logits are not finite")
    decoding.sample_token = sampled
"""
NO_DATA = """
import shards
read, reads = shards.TokenStream.read, 0
def failing(self, start, count, out=None):
    global reads
    reads += count == 65 and os.environ["RANK"] == "1" and "train" in self.paths[0].name
    if reads > 2 * 2 * 2 + 1:  # windows of two steps of two micro-steps, and one of the next
        raise OSError(5, "Input/output error", "shard")
    return read(self, start, count, out)
shards.TokenStream.read = failing
"""
NO_LOG = """
import builtins
def opened(path, mode="r", *rest, **more):
    file = original(path, mode, *rest, **more)
    if mode == "a" and str(path).endswith("log.txt"):
        class Full:
            lines = 0
            def write(self, text):
                self.lines += " train " in text
                if self.lines > 2:
                    raise OSError(28, "No space left on device", str(path))
                return file.write(text)
        return Full()
    return file
original, builtins.open = open, opened
"""


@pytest.mark.parametrize(("breaks", "words"), [
    (NOT_FINITE, "logits are not finite"), (NO_DATA, "Input/output error"), (NO_LOG, "No space left")])
def test_what_fails_on_one_process_ends_all(flags, tmp_path, breaks, words):
    script = with_fault(tmp_path, breaks)
    flags |= {"log_dir": tmp_path / "log", "sample_interval": 3, "max_new_tokens": 4, "max_steps": 40,
              "checkpoint_interval": 0, "val_interval": 0}
    ends = run_by_hand([command(flags, 1, script)] * 2)
    assert [returncode for returncode, _, _ in ends] == [2, 2], ends
    assert all(words in stderr for _, _, stderr in ends), ends
    assert all("Traceback" not in stderr for _, _, stderr in ends), ends


# ---- which process reports it, under torchrun ----------------------------------------------------

SCRIPT = """
import os, signal, sys, time, torch
sys.path.insert(0, {root!r})
from configurator import UserError, configure
from ranks import Ranks, by_value, name_ranks
def fail():
    raise UserError("no such model")
def fail_on_rank_1():
    if ranks.rank == 1:
        open("/nowhere/shard")
case = ""
configure(globals())
ranks = Ranks()
if case == "before they meet":
    fail()
if case == "on rank 1 before they meet" and ranks.rank == 1:
    fail()
ranks.connect(torch.device("cpu"))
signal.signal(signal.SIGTERM, lambda *ignored: None)  # as in the loop of train_gpt2.py
try:
    ranks.on_all({{"on all": fail, "on all, one late": fail, "on rank 1": fail_on_rank_1}}[case])
except UserError:
    if "late" in case and ranks.rank == 1:
        time.sleep(1.5)  # torchrun's SIGTERM comes, and is ignored
    raise
"""


@pytest.mark.parametrize(("case", "restarts", "message"), [
    ("before they meet", 0, "no such model"),
    ("on rank 1 before they meet", 0, "no such model"),
    ("on all", 2, "no such model"),
    ("on all, one late", 2, "no such model"),
    ("on rank 1", 0, "rank 1: /nowhere/shard: No such file or directory; name another path, or fix this one"),
])
def test_one_process_reports_a_mistake_and_torchrun_repeats_it(tmp_path, case, restarts, message):
    """In the last lines; a mistake is not tried again."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT)), encoding="utf-8")
    done = attempt({"case": case}, 2, script, [f"--max-restarts={restarts}"],
                   python=sys.executable if restarts else PYTHON)
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and lines.count(f"error: {message}") == 1, done.stderr
    assert "Traceback" not in done.stderr.partition(f"error: {message}")[0], done.stderr
    if restarts == 0:
        assert lines[-2] == f"  traceback : error: {message}", done.stderr


# ---- two runs in one folder ------------------------------------------------------

SLOW = "time.sleep(0.05)"


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def has_steps(log_dir, count):
    path = log_dir / "log.txt"
    return path.exists() and path.read_text(encoding="utf-8").count(" train ") >= count


def test_locked(tmp_path, capfd, monkeypatch):
    """For other processes, while the block runs; released with its process, kill -9 included."""
    hold = (f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); from files import locked\n"
            f"with locked({str(tmp_path)!r}, 'run'):\n    print('held', flush=True); time.sleep(600)")
    holder = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf"a run is at work in {tmp_path}: process {holder.pid} on .*, since "
                                        r"20\d\d-.*; wait until it ends"), locked(tmp_path, "run"):
        pass
    holder.kill()
    holder.wait()
    with locked(tmp_path, "run"), pytest.raises(UserError, match=f"process {os.getpid()} on"), \
            locked(tmp_path, "run"):
        pass
    assert not list(tmp_path.iterdir())
    import fcntl

    def no_locks(*arguments):
        raise OSError(95, "Operation not supported")
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with locked(tmp_path, "run"), locked(tmp_path, "run"):
        assert capfd.readouterr().err.count("cannot be locked (Operation not supported)") == 2


def test_a_second_run_in_a_folder_is_refused_while_the_first_lives(flags, tmp_path):
    flags |= {"log_dir": tmp_path / "log", "max_steps": 100_000}
    script = on_forward(tmp_path, SLOW)
    first = subprocess.Popen(command(flags, 1, script, python=sys.executable), stdout=subprocess.DEVNULL,
                             env=ENVIRONMENT)
    try:
        wait_for(lambda: list_checkpoints(tmp_path / "log"))
        done = attempt(flags, resume="true")
        assert done.returncode == 2, done.stdout
        assert f"a run is at work in {tmp_path / 'log'}: process {first.pid} on" in done.stderr, done.stderr
    finally:
        first.kill()
        first.wait()
    steps = len(losses(tmp_path / "log"))  # which fails if a step is there twice
    train(flags, resume="true", max_steps=steps + 8)
    assert len(losses(tmp_path / "log")) == steps + 8


def test_workers_of_a_killed_torchrun_end_by_themselves(flags, tmp_path):
    """They save, as on SIGTERM, and a new start continues from there."""
    flags |= {"log_dir": tmp_path / "log", "max_steps": 100_000, "checkpoint_interval": 0, "val_interval": 0}
    out = tmp_path / "out.txt"
    with open(out, "w", encoding="utf-8") as file:
        torchrun = subprocess.Popen(
            command(flags, 2, on_forward(tmp_path, SLOW), python=sys.executable), stdout=file, stderr=file,
            env={**ENVIRONMENT, "PYTHON_EXEC": sys.executable})
        try:
            wait_for(lambda: has_steps(tmp_path / "log", 3))
        except BaseException:
            kill_torchrun(torchrun)
            raise
        torchrun.kill()
        torchrun.wait()
    wait_for(lambda: "stopped by the end of torchrun" in out.read_text(encoding="utf-8")
             and not (tmp_path / "log" / ".lock").exists())
    step = load_checkpoint(tmp_path / "log")["step"]
    assert len(losses(tmp_path / "log")) == step
    train(flags, resume="true", max_steps=step + 2)
    assert len(losses(tmp_path / "log")) == step + 2
