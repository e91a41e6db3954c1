"""
Kill data builds with -9 at random moments, run them again, and compare with one that ran undisturbed.

The victim is the parent or one of up to 3 workers. A build that differs by a byte, or a killed one that
training would read, is an error. Used by test_build.py and test_hub_build.py.
"""
import contextlib
import math
import os
import random
import signal
import subprocess
import sysconfig
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from test_fineweb import contents

from configurator import UserError
from shards import TokenStream

ROOT = Path(__file__).resolve().parent.parent


def make_corpus(folder: Path, megabytes: int) -> Path:
    """Parquet files of 5 MB of text, with row groups of 50 documents."""
    folder.mkdir()
    texts, size = [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        texts.append(path.read_text(encoding="utf-8", errors="ignore"))
        size += len(texts[-1])
        if size > 5_000_000:
            pq.write_table(pa.table({"text": texts}), folder / f"{megabytes:03d}.parquet", row_group_size=50)
            texts, size, megabytes = [], 0, megabytes - 5
        if megabytes <= 0:
            break
    return folder


def children(pid: int) -> list[int]:
    """The workers of a build, by /proc."""
    found = []
    for task in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError):
            state, parent = task.read_text(encoding="utf-8").rpartition(")")[2].split()[:2]
            command = (task.parent / "cmdline").read_bytes()
            if int(parent) == pid and state != "Z" and b"spawn_main" in command:
                found.append(int(task.parent.name))
    return found


def files_of(folder: Path) -> list[str]:
    return [name for _, _, names in os.walk(folder) for name in names]


def run(command: list[str], folder: Path, rng: random.Random, target: float,
        env: dict | None = None) -> bool:
    """Run a build, and kill it at once, or up to two seconds, after the folder has `target` files; whether it
    was killed before it had finished."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env)
    while process.poll() is None and len(files_of(folder)) < target:
        time.sleep(0.002)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(2 * rng.random() ** 4)
    killed = process.poll() is None
    if killed:
        workers = children(process.pid)
        victim = rng.choice(workers) if workers and rng.random() < 0.5 else process.pid
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
    _, stderr = process.communicate(timeout=240)  # a parent whose worker died says so and ends
    if process.returncode and not killed:
        raise RuntimeError(stderr)
    return process.returncode != 0


def rounds(command: list[str], work: Path, kills: int, rng: random.Random,
           env: dict | None = None) -> None:
    """Kill builds until `kills` have been; command: without data_dir and num_workers."""
    subprocess.run([*command, f"--data_dir={work / 'undisturbed'}", "--num_workers=2"], check=True, env=env,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    expected, struck, number = contents(work / "undisturbed"), 0, 0
    while struck < kills:
        folder, number = work / f"killed_{number}", number + 1
        while True:
            present, target = len(files_of(folder)), math.inf
            if struck < kills and present < len(expected):
                target = rng.randint(present, len(expected))  # the last before the manifest, as .lock counts
            flags = [f"--data_dir={folder}", f"--num_workers={rng.randint(1, 3)}"]
            if not run([*command, *flags], folder, rng, target, env):
                break
            struck += 1
            if folder.exists() and not (folder / "manifest.json").exists():
                with contextlib.suppress(UserError):
                    TokenStream(folder, "train")
                    raise AssertionError(f"{folder} was killed, and training would read it")
        if (got := contents(folder)) != expected:
            names = [name for name in got | expected if got.get(name) != expected.get(name)]
            raise AssertionError(f"{folder} differs from {work / 'undisturbed'}: {names}")
