"""doctor.py under torchrun: healthy machines pass, and every fault that is put in is found and named."""

import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from training import ENVIRONMENT, PYTHON

import doctor
from doctor import compare_ranks, name_ranks
from shards import write_shard

ROOT = Path(__file__).resolve().parent.parent

FAULTS = {  # what rank 1 does before it runs doctor.py
    "one share is left out": """
real = dist.all_reduce
def all_reduce(tensor, *args, **kwargs):
    tensor[len(tensor) // 2] = 0
    return real(tensor, *args, **kwargs)
dist.all_reduce = all_reduce
""",
    "a rank's result is another": """
real = dist.all_reduce
def all_reduce(tensor, *args, **kwargs):
    real(tensor, *args, **kwargs)
    tensor[-1] += 1
dist.all_reduce = all_reduce
""",
    "clock": """
real = time.time
time.time = lambda: real() - 7200
""",
    "hang": """
import threading
real = threading.Timer
threading.Timer = lambda seconds, call: real(seconds - 2, call)  # gives up before rank 0 does
dist.all_reduce = lambda tensor: time.sleep(60)
""",
    "exception": """
def all_reduce(tensor):
    raise RuntimeError("NCCL error: unhandled system error")
dist.all_reduce = all_reduce
""",
    "version": """
torch.__version__ = "1.0.0"
""",
    "device": """
def broken():
    raise RuntimeError("the driver is another than the library's")
torch.get_num_threads = broken
""",
    "none": "",
}
FAULTS["version and hang"] = FAULTS["version"] + FAULTS["hang"]
SLOW_TO_SPEAK = """
import builtins
real_print = builtins.print
def print(*words, **kwargs):
    if "WRONG" in str(words):
        time.sleep(2)
    real_print(*words, **kwargs)
builtins.print = print
"""


def flags(folder, **settings):
    settings = {"device": "cpu", "log_dir": folder / "log", "data_dir": folder / "data", **settings}
    return [f"--{key}={value}" for key, value in settings.items()]


def visit(folder, fault="none", rank_0="", python=PYTHON, **settings):
    """The doctor under torchrun with two processes, the second of which has the fault; rank_0: what the
    first one runs before."""
    script = folder / "patient.py"
    script.write_text("import os, runpy, sys, time, torch\nimport torch.distributed as dist\n"
                      f"sys.path.insert(0, {str(ROOT)!r})\n"
                      f"exec({FAULTS[fault]!r} if os.environ['RANK'] == '1' else {rank_0!r}, globals())\n"
                      f"runpy.run_path({str(ROOT / 'doctor.py')!r}, run_name='__main__')\n", encoding="utf-8")
    torchrun = [python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run([*torchrun, str(script), *flags(folder, **settings)], cwd=folder,
                          capture_output=True, text=True, timeout=120,
                          env={**ENVIRONMENT, "PYTHON_EXEC": python})


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return str(sock.getsockname()[1])


def start(cwd, rank, port, size=2, **settings):
    """One rank, started by hand as on a node of its own."""
    env = {**ENVIRONMENT, "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": "0",
           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    cwd.mkdir(exist_ok=True)
    command = [PYTHON, str(ROOT / "doctor.py"), "--device=cpu",
               *(f"--{key}={value}" for key, value in settings.items())]
    return subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True)


def finish(*processes):
    return [(process.communicate(timeout=120)[0], process.returncode) for process in processes]


def make_data(folder, tokens=1000):
    folder.mkdir(parents=True)
    for split in ("train", "val"):
        write_shard(folder / f"x_{split}_000000.npy", np.arange(tokens, dtype=np.uint16))


def test_healthy_machines_pass(tmp_path):
    make_data(tmp_path / "data")
    done = visit(tmp_path, python=sys.executable)
    assert done.returncode == 0, done.stdout + done.stderr
    out = done.stdout
    assert len(out.splitlines()) <= 15 and max(map(len, out.splitlines())) <= 200
    for pattern in (r"rank +host +device +memory +torch +CUDA +NCCL\n0-1 ", r"2 on 1 host\(s\), gloo",
                    r"all-reduce +sums of integers are exact", r"bandwidth +[\d.]+ GB/s \(1 MB\)",
                    r"clocks +at most 0\.\d+ s", r"is one folder for every rank",
                    r"data: train 1,000 tokens, fingerprint \w{16}, val 1,000 tokens", r"\nall well\n$"):
        assert re.search(pattern, out), (pattern, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "patient.py"]  # nothing stays


def test_one_process_needs_no_launcher(tmp_path):
    done = subprocess.run([PYTHON, str(ROOT / "doctor.py"), *flags(tmp_path)], env=ENVIRONMENT, timeout=60,
                          capture_output=True, text=True)
    assert done.returncode == 0 and "1 on 1 host(s)" in done.stdout and "all well" in done.stdout, done
    assert "is not there, not checked" in done.stdout and "all-reduce" not in done.stdout


@pytest.mark.parametrize("fault, settings, words", [
    ("one share is left out", {}, ["on rank 0", "on rank 1", "sums are wrong", "GLOO_SOCKET_IFNAME"]),
    ("a rank's result is another", {}, ["all-reduce of 1 x float32 on rank 1", "got 2, wanted 1"]),
    ("clock", {}, [r"the clock of rank 1 on \S+ is 7200\.\d\d s behind rank 0's; start chrony"]),
    ("version and hang", {"timeout": 9}, [
        "torch differs", "all-reduce check hangs: after 9 s ranks 0-1 began it and did not come out"]),
    ("exception", {"timeout": 30}, ["the all-reduce check failed on rank 1, .*NCCL error: unhandled"]),
    ("device", {"timeout": 30}, [r"rank 1 on \S+: the driver is another than the library's"]),
    ("version", {"rank_0": SLOW_TO_SPEAK},
     ["torch differs: .* on rank 0; 1.0.0 on rank 1; install one requirements.txt"]),
])
def test_a_fault_on_rank_1_is_named(tmp_path, fault, settings, words):
    done = visit(tmp_path, fault, **settings)
    assert done.returncode == 1 and "all well" not in done.stdout, done.stdout + done.stderr
    for word in words:
        assert re.search(f"WRONG: .*{word}", done.stdout), (word, done.stdout)
    assert done.stdout.count("WRONG: the all-reduce check hangs") == ("hang" in fault)  # by one rank alone
    if "timeout" not in settings:
        last = done.stdout.splitlines()[-1]
        assert last == f"{done.stdout.count('WRONG: ')} thing(s) wrong" and done.stdout.count("WRONG") <= 2


def test_folders_that_are_not_shared(tmp_path):
    """Two ranks with a working directory each, as on nodes that share no file system."""
    for node, tokens in (("a", 1000), ("b", 999)):
        make_data(tmp_path / node / "data", tokens)
    port = free_port()
    (out, code), (out_1, code_1) = finish(*(start(tmp_path / node, rank, port, log_dir="log", data_dir="data")
                                            for rank, node in enumerate("ab")))
    assert (code, code_1) == (1, 1) and out_1 == "", out + out_1
    files = rf"rank 1 on \S+ does not see in {tmp_path}/b what rank 0 wrote in {tmp_path}/a;"
    data = r"data_dir=data is not the same for all ranks: rank 0: train 1,000 .* in .*/a/data; rank 1: train"
    for pattern in (files, data):
        assert re.search(f"WRONG: {pattern}", out), (pattern, out)
    assert out.endswith("2 thing(s) wrong\n")


def test_data_that_only_one_rank_has_or_that_is_damaged(tmp_path):
    make_data(tmp_path / "a" / "data")
    port = free_port()
    done = finish(*(start(tmp_path / node, rank, port, log_dir=tmp_path / "log", data_dir="data")
                    for rank, node in enumerate("ab")))
    assert done[0][1] == 1 and "rank 1: nothing in" in done[0][0] and "1 thing(s) wrong" in done[0][0], done
    (tmp_path / "a" / "data" / "build.json").write_text('{"command": "x"}', encoding="utf-8")
    (out, code), = finish(start(tmp_path / "a", 0, port, size=1))
    assert code == 0 and "not checked" in out
    (out, code), = finish(start(tmp_path / "a", 0, port, size=1, data_dir="data"))
    assert code == 1 and "WRONG: " in out and "unfinished build" in out


def test_a_log_dir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    (out, code), = finish(start(tmp_path, 0, free_port(), size=1, log_dir=tmp_path / "file" / "log"))
    assert code == 1 and "--log_dir" in out and "1 thing(s) wrong" in out


def test_a_rank_that_never_comes(tmp_path):
    port = free_port()
    ranks = [start(tmp_path, rank, port, size=4, timeout=10) for rank in (2, 0)]  # rank 2 waits for rank 0
    (out_2, code_2), (out, code) = finish(*ranks)
    assert (code, code_2) == (1, 1) and out_2 == "", out_2
    assert "WRONG: ranks 1, 3 of 4 did not come to `start` within 10 s" in out and "1 thing(s) wrong" in out


def test_rank_0_that_never_comes(tmp_path):
    (out, code), = finish(start(tmp_path, 1, free_port(), timeout=2))
    assert code == 1 and re.search(r"^WRONG: rank 1 on \S+ did not reach rank 0 at 127\.0\.0\.1:", out, re.M)


def rank_facts(**changes):
    facts = {"host": "node1", "device": "cuda:0", "name": "NVIDIA H200", "memory": 140 * 2**30,
             "free_memory": 139 * 2**30, "torch": "2.13.0", "cuda": "13.0", "nccl": "2.28.3",
             "python": "3.11.7", "threads": 1, "cores": 64, "open_files": 65_536, "shm": 2**34}
    return {**facts, **changes}


@pytest.mark.parametrize("change, kind, words", [
    ({}, "", ""),
    ({"torch": "2.12.0"}, "wrong", "torch differs: 2.13.0 on ranks 0, 2-3; 2.12.0 on rank 1"),
    ({"cuda": "12.9"}, "wrong", "cuda differs"),
    ({"nccl": "2.27.1"}, "wrong", "nccl differs"),
    ({"python": "3.12.1"}, "wrong", "python differs"),
    ({"device": "cuda:0"}, "wrong", "node1: ranks 0-1 share a GPU (cuda:0, cuda:0)"),
    ({"name": "NVIDIA A100"}, "note", "devices differ: NVIDIA H200 on ranks 0, 2-3; NVIDIA A100 on rank 1"),
    ({"free_memory": 100 * 2**30}, "note", "node1: 40.0 GiB of cuda:1 are in use"),
    ({"threads": 64}, "note", "node1: 65 threads on 64 cores; set OMP_NUM_THREADS=32"),
])
def test_ranks_are_compared(change, kind, words):
    facts = [rank_facts(host=f"node{1 + rank // 2}", device=f"cuda:{rank % 2}") for rank in range(4)]
    facts[1] |= change
    found = dict(zip(("wrong", "note"), compare_ranks(facts)))
    assert [finding for findings in found.values() for finding in findings] == found.get(kind, [])
    assert len(found.get(kind, [])) == bool(kind) and all(words in finding for finding in found.get(kind, []))


@pytest.mark.parametrize("limits, words", [
    ({"open_files": 256}, "ulimit -n is 256"),
    ({"shm": 64 * 2**20}, "/dev/shm has 64 MiB"),
    ({"device": "cpu", "cores": 8}, "4 threads on 8 cores, and torchrun sets OMP_NUM_THREADS=1"),
    ({"open_files": -1}, None),  # unlimited
])
def test_limits_of_a_host(limits, words):
    facts = [rank_facts(**{"device": f"cuda:{rank}", **limits}) for rank in range(4)]
    wrong, notes = compare_ranks(facts)
    assert not wrong and len(notes) == (words is not None) and all(words in note for note in notes)


def test_64_ranks_are_a_table_of_8_lines(capsys):
    doctor.print_table([rank_facts(host=f"node{rank // 8}", device=f"cuda:{rank % 8}") for rank in range(64)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9 and lines[8].startswith("56-63  node7  NVIDIA H200 (cuda:0-7)  140 GiB")


def test_names_of_ranks():
    assert [name_ranks(ranks) for ranks in ([3], [0, 1], [5, 0, 1, 2, 8])] == [
        "rank 3", "ranks 0-1", "ranks 0-2, 5, 8"]


def test_mistakes_exit_2():
    for flag in ("--timeout=0", "--device=tpu"):
        done = subprocess.run([PYTHON, str(ROOT / "doctor.py"), flag], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith("error: "), (flag, done)
