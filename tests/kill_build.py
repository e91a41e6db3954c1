"""
Kill data builds with -9 at random moments, run them again, and compare with one that ran undisturbed.

    python tests/kill_build.py                   # 60 kills, some minutes
    python tests/kill_build.py --hub --kills=30  # of builds that download from a hub on this machine

The builds read parquet files made of this Python's standard library, with 1 to 3 workers, chosen anew for
every run. The victim is the parent or one of its workers. Prints where the kills struck; a build that differs
by a byte, or a killed one that training would read, is an error. Works in a temporary folder.
"""
import collections
import contextlib
import math
import os
import random
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hub_server import HubServer  # noqa: E402 (after the path is set)
from test_fineweb import contents  # noqa: E402

from configurator import UserError, configure  # noqa: E402
from shards import TokenStream  # noqa: E402

kills = 60             # processes to kill
seed = 0               # of the moments, victims and numbers of workers
shard_tokens = 10_000  # small: much of the time is spent in writing and renaming
hub = False            # read the files from a hub, slowly, so that downloads are killed too


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


def phase(folder: Path) -> str:
    """How far an interrupted build had come, by what it left in its folder."""
    names = files_of(folder)
    parts = {"after the manifest": "manifest.json" in names,
             "in the middle of a write": any(name.endswith(".tmp") for name in names),
             "in the middle of a download": any(name.endswith(".incomplete") for name in names)}
    between = "between shards" if any(name.endswith(".npy") for name in names) else "before the first shard"
    return ", ".join(part for part in parts if parts[part]) or between


def run(command: list[str], folder: Path, rng: random.Random, target: float,
        env: dict | None = None) -> str | None:
    """Run a build, and kill it at once, or up to two seconds, after the folder has `target` files.

    Returns victim and phase, or None if it had finished before.
    """
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env)
    while process.poll() is None and len(files_of(folder)) < target:
        time.sleep(0.002)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(2 * rng.random() ** 4)
    where = None
    if process.poll() is None:
        victim, name, workers = process.pid, "parent", children(process.pid)
        if workers and rng.random() < 0.5:
            victim, name = rng.choice(workers), "worker"
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
        where = f"{name} {phase(folder)}"
    _, stderr = process.communicate(timeout=60)  # a parent whose worker died says so and ends
    if process.returncode and not where:
        raise RuntimeError(stderr)
    return where if process.returncode else None


def rounds(command: list[str], work: Path, kills: int, rng: random.Random,
           env: dict | None = None) -> collections.Counter:
    """Kill builds until `kills` have been; command: without data_dir and num_workers."""
    subprocess.run([*command, f"--data_dir={work / 'undisturbed'}", "--num_workers=2"], check=True, env=env,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    expected, struck, number = contents(work / "undisturbed"), collections.Counter(), 0
    while struck.total() < kills:
        folder, number = work / f"killed_{number}", number + 1
        while True:
            present, target = len(files_of(folder)), math.inf
            if struck.total() < kills and present < len(expected):
                target = rng.randint(present, len(expected))  # the last before the manifest, as .lock counts
            flags = [f"--data_dir={folder}", f"--num_workers={rng.randint(1, 3)}"]
            where = run([*command, *flags], folder, rng, target, env)
            if where is None:
                break
            struck[where] += 1
            if folder.exists() and not (folder / "manifest.json").exists():
                with contextlib.suppress(UserError):
                    TokenStream(folder, "train")
                    raise AssertionError(f"{folder} was killed, and training would read it")
        if (got := contents(folder)) != expected:
            names = [name for name in got | expected if got.get(name) != expected.get(name)]
            raise AssertionError(f"{folder} differs from {work / 'undisturbed'}: {names}")
    return struck


def main() -> None:
    command = [sys.executable, str(ROOT / "fineweb.py"), f"--shard_tokens={shard_tokens}"]
    began, rng = time.monotonic(), random.Random(seed)
    with tempfile.TemporaryDirectory() as work:
        corpus = make_corpus(Path(work, "corpus"), 25)
        files = {f"sample/10BT/{path.name}": path.read_bytes() for path in corpus.iterdir()}
        with HubServer(files) as server:
            server.pause = 0.02
            env = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": f"{work}/hf", "NO_PROXY": "*"}
            flags = [] if hub else [f"--input={corpus}"]
            struck = rounds([*command, *flags], Path(work), kills, rng, env)
    for where, count in sorted(struck.items()):
        print(f"{count:4d} x {where}")
    print(f"{struck.total()} kills, every build came out as the undisturbed one; "
          f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    configure(globals())
    main()
