"""doctor.py: healthy machines pass, and every injected fault is found and named."""

import re
import subprocess
import sys

import numpy as np
import pytest
from training import ENVIRONMENT, PYTHON, ROOT, attempt, command, finish, start_by_hand

import doctor
from doctor import compare_ranks
from shards import write_shard

ALL_REDUCE = """
def all_reduce(tensor, real=dist.all_reduce, **options):
    {before}
    work = real(tensor, **options)
    {after}
    return work
dist.all_reduce = all_reduce
"""
FAULTS = {  # what rank 1 does before it runs doctor.py
    "one share is left out": ALL_REDUCE.format(before="tensor[len(tensor) // 2] = 0", after=""),
    "another result": ALL_REDUCE.format(before="", after="tensor[-1] += 1"),
    "hang": ALL_REDUCE.format(before="time.sleep(60)", after=""),
    "exception": ALL_REDUCE.format(before="raise RuntimeError('NCCL error: unhandled error')", after=""),
    "version": "torch.__version__ = '1.0.0'",
    "device": "torch.get_num_threads = lambda: open('/nowhere/driver')",
}


def patient(folder, fault=""):
    """doctor.py, after a fault on rank 1."""
    script = folder / "patient.py"
    script.write_text("import os, runpy, sys, time, torch\nimport torch.distributed as dist\n"
                      f"sys.path.insert(0, {str(ROOT)!r})\n"
                      f"if os.environ.get('RANK') == '1':\n    exec({fault!r}, globals())\n"
                      f"runpy.run_path({str(ROOT / 'doctor.py')!r}, run_name='__main__')\n", encoding="utf-8")
    return script


def examine(folder, fault="", folders=None, absent=None, **settings):
    """[(exit code, stdout, stderr)] of two ranks that are started by hand in `folders`."""
    settings = {"device": "cpu", "log_dir": folder / "log", "data_dir": folder / "data", **settings}
    line = command(settings, 1, patient(folder, FAULTS.get(fault, "")))
    processes = start_by_hand([line] * 2, folders)
    if absent is not None:
        processes.pop(absent).kill()
    if fault == "hang":
        processes[0].wait(timeout=100)
        processes.pop(1).kill()
    return finish(processes)


def alone(*flags):
    return subprocess.run([PYTHON, str(ROOT / "doctor.py"), *flags], env=ENVIRONMENT, timeout=60,
                          capture_output=True, text=True)


def make_data(folder, tokens=1000):
    folder.mkdir(parents=True)
    for split in ("train", "val"):
        write_shard(folder / f"x_{split}_000000.npy", np.arange(tokens, dtype=np.uint16))


def test_healthy_machines_pass(tmp_path):
    """Under torchrun."""
    make_data(tmp_path / "data")
    flags = {"device": "cpu", "log_dir": tmp_path / "log", "data_dir": tmp_path / "data"}
    done = attempt(flags, 2, ROOT / "doctor.py", python=sys.executable)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) <= 12 and max(map(len, done.stdout.splitlines())) <= 200
    for pattern in (r"rank +host +name +memory +torch +cuda +nccl\n0-1 ", r"2 on 1 host\(s\)",
                    r"all-reduce +sums of integers are exact", r"bandwidth +[\d.]+ GB/s: the gradients",
                    r"is one folder for every rank", r"data: train 1,000 tokens, fingerprint \w{16}, val ",
                    r"\nall well\n$"):
        assert re.search(pattern, done.stdout), (pattern, done.stdout)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]  # nothing is left behind


@pytest.mark.parametrize(("fault", "words"), [
    ("one share is left out", r"all-reduce .* rank 0, .*the first 0 instead of 1; .*\nWRONG: .* on rank 1, "),
    ("another result", r"all-reduce of 1 x float32 on rank 1, .* the first 2 instead of 1; check"),
    ("hang", r"the all-reduce hangs: rank 1 did not come back from it; check the firewall"),
    ("exception", r"the all-reduce failed on rank 1, \S+: NCCL error: unhandled error; check"),
    ("version", r"torch differs: \S+ on rank 0, but 1\.0\.0 on rank 1; install the same"),
    ("device", r"reading the device failed on rank 1, .* No such file .*'/nowhere/driver'; check its"),
])
def test_a_fault_on_rank_1_is_named(tmp_path, fault, words):
    waits = fault in ("hang", "exception")  # to the end of the timeout
    for code, out, error in examine(tmp_path, fault, timeout=8 if waits else 30):
        assert code == 1 and "all well" not in out, out + error
        assert re.search(f"^WRONG: {words}", error, re.M) and "Traceback" not in error, error


def test_folders_that_are_not_shared(tmp_path):
    """Two working directories, as on nodes without a shared file system."""
    for node, tokens in (("a", 1000), ("b", 999)):
        make_data(tmp_path / node / "data", tokens)
    (code, out, error), (code_1, _, _) = examine(tmp_path, folders=[tmp_path / "a", tmp_path / "b"],
                                                 log_dir="log", data_dir="data")
    assert (code, code_1) == (1, 1) and "error: 2 problem(s)\n" in error, out + error
    assert re.search(rf"rank 1 on \S+ does not see in {tmp_path}/b what rank 0 wrote to {tmp_path}/a;", error)
    assert re.search(r"data_dir=data differs: train 1,000 .* on rank 0, but train 999 .* on rank 1;", error)


def test_data_that_only_one_rank_has(tmp_path):
    make_data(tmp_path / "a" / "data")
    (tmp_path / "b").mkdir()
    (code, _, error), _ = examine(tmp_path, folders=[tmp_path / "a", tmp_path / "b"], data_dir="data")
    assert code == 1 and "error: 1 problem(s)\n" in error and "but nothing on rank 1" in error, error


@pytest.mark.parametrize("absent", [0, 1])
def test_a_rank_that_never_starts_is_named(tmp_path, absent):
    (code, _, error), = examine(tmp_path, absent=absent, timeout=2)
    assert code == 1
    assert re.search(rf"^WRONG: rank {1 - absent} on \S+ waited \d+ s for rank {absent} at", error, re.M)


def test_one_process_alone(tmp_path):
    done = alone("--device=cpu", f"--log_dir={tmp_path / 'log'}", f"--data_dir={tmp_path / 'data'}")
    assert done.returncode == 0 and "1 on 1 host(s)" in done.stdout and "all well" in done.stdout, done
    assert "data: nothing" in done.stdout and "all-reduce" not in done.stdout

    make_data(tmp_path / "data")
    (tmp_path / "data" / "build.json").write_text('{"command": "x"}', encoding="utf-8")
    done = alone("--device=cpu", f"--log_dir={tmp_path / 'log'}", f"--data_dir={tmp_path / 'data'}")
    assert done.returncode == 1 and re.search("^WRONG: .*unfinished build", done.stderr, re.M), done
    done = alone("--device=cpu", f"--log_dir={tmp_path / 'data' / 'build.json' / 'log'}")
    assert done.returncode == 1
    assert re.search("^WRONG: writing beside log_dir failed.*writable", done.stderr, re.M), done
    assert alone("--device=tpu").returncode == 2


def rank_facts(**changes):
    return {"host": "node1", "device": "cuda:0", "name": "NVIDIA H200", "memory": "140 GiB",
            "torch": "2.13.0", "cuda": "13.0", "nccl": "2.28.3", "python": "3.11.7", "threads": 1,
            "cores": 64, "open_files": 65_536, "shm": 2**34, **changes}


@pytest.mark.parametrize(("change", "kind", "words"), [
    ({}, "", ""),
    ({"torch": "2.12.0"}, "wrong", "torch differs: 2.13.0 on ranks 0, 2-3, but 2.12.0 on rank 1"),
    ({"cuda": "12.9"}, "wrong", "cuda differs"),
    ({"nccl": "2.27.1"}, "wrong", "nccl differs"),
    ({"python": "3.12.1"}, "wrong", "python differs"),
    ({"device": "cuda:0"}, "wrong", "node1: ranks 0-1 share a GPU (cuda:0, cuda:0)"),
    ({"name": "NVIDIA A100"}, "note", "name differs: NVIDIA H200 on ranks 0, 2-3, but NVIDIA A100 on rank 1"),
    ({"threads": 64}, "note", "node1: 65 threads on 64 cores; set OMP_NUM_THREADS=32"),
])
def test_ranks_are_compared(change, kind, words):
    facts = [rank_facts(host=f"node{1 + rank // 2}", device=f"cuda:{rank % 2}") for rank in range(4)]
    facts[1] |= change
    found = dict(zip(("wrong", "note"), compare_ranks(facts)))
    assert [len(found["wrong"]), len(found["note"])] == [kind == "wrong", kind == "note"]
    assert not kind or words in found[kind][0]


@pytest.mark.parametrize(("limits", "words"), [
    ({"open_files": 256}, "ulimit -n is 256"),
    ({"shm": 64 * 2**20}, "/dev/shm has 64 MiB"),
    ({"device": "cpu", "cores": 8}, "4 threads on 8 cores; set OMP_NUM_THREADS=2"),
    ({"open_files": -1}, None),  # unlimited
])
def test_limits_of_a_host(limits, words):
    wrong, notes = compare_ranks([rank_facts(**{"device": f"cuda:{rank}", **limits}) for rank in range(4)])
    assert not wrong and len(notes) == (words is not None) and all(words in note for note in notes)


def test_64_ranks_are_a_table_of_8_lines():
    lines = doctor.host_table([rank_facts(host=f"node{rank // 8}") for rank in range(64)]).splitlines()
    assert len(lines) == 9 and lines[8].startswith("56-63  node7  NVIDIA H200  140 GiB")
