"""
Rehearse runs C, D and E on a CPU, in minutes: everything the real runs do, with a tiny model.

    make rehearse    # replaces rehearsal/

A hub on this machine serves parquet files with FineWeb-Edu's columns. fineweb.py builds shards from it, and
is killed once. Then torchrun trains with two processes, by the configs of the three runs, with a thousandth
of the steps of C and D and a hundredth of E's, each of 8,192 tokens instead of 524,288:

    C    HellaSwag in training; the curve beside llm.c's
    D    five reshuffled epochs; a worker is killed with -9, and torchrun restarts it
    E    loss and HellaSwag in one figure, with OpenAI's results

Any failure ends it. The losses mean nothing. At the end it prints the computed time and memory of the real
runs.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from hub_server import HubServer

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "rehearsal"  # of data, logs and figures
TINY = ("--n_layer=2 --n_head=2 --n_embd=32 --block_size=128 --batch_size=8 --batch_tokens=8192 "
        "--max_lr=1e-3 --warmup_steps=3 --val_interval=10 --val_tokens=16384 --hellaswag_interval=10 "
        "--checkpoint_interval=10 --sample_interval=0 --device=cpu --dtype=float32 --compile=false").split()
GPUS = ("NVIDIA A100-SXM4-80GB,NVIDIA H100 80GB HBM3,NVIDIA GeForce RTX 4090,"
        "NVIDIA GeForce RTX 4050 Laptop GPU")


def corpus(n_files: int = 4, n_bytes: int = 85_000) -> dict[str, bytes]:
    """Parquet files of Python source with the columns of FineWeb-Edu, {path in the dataset: bytes}. In all
    about 160,000 of GPT-2's tokens, so that five epochs are about 95 steps of 8,192."""
    sources = (path.read_text(encoding="utf-8", errors="ignore")
               for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))
    texts = (text[start:start + 2000] for text in sources for start in range(0, len(text), 2000))
    files = {}
    for number in range(n_files):
        rows, size = [], 0
        while size < n_bytes:
            text = next(texts)
            size += len(text)
            rows.append({"text": text, "id": f"{number}-{len(rows)}", "dump": "CC-MAIN-2024-10",
                         "url": "https://example.org/", "file_path": "s3://example/", "language": "en",
                         "language_score": 0.97, "token_count": len(text) // 4, "score": 3.1,
                         "int_score": 3})
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=5)
        files[f"sample/10BT/{number:03d}_00000.parquet"] = sink.getvalue().to_pybytes()
    return files


def questions(path: Path) -> None:
    """Twenty questions in HellaSwag's format."""
    lines = [{"ind": i, "activity_label": "Counting", "ctx": f"The list has {i} numbers. It", "label": i % 4,
              "split_type": "indomain", "source_id": f"rehearsal~{i}",
              "endings": [f"is {word} long." for word in ("very", "not", f"{i}", "rather")]}
             for i in range(20)]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")


def call(title: str, *command: str, env: dict | None = None) -> None:
    """Run a command of this repository; this script ends if it fails."""
    print(f"\n== {title}\n$ {' '.join(command)}", flush=True)
    subprocess.run([sys.executable, *command], cwd=FOLDER, env=env, check=True)


def build_and_kill(command: list[str], data_dir: Path, env: dict) -> None:
    """Start a build, and kill it with -9 when its first shard is there."""
    print(f"\n== killed after its first shard\n$ {' '.join(command)}", flush=True)
    build = subprocess.Popen([sys.executable, *command], cwd=FOLDER, env=env)
    while not list(data_dir.glob("*_train_*.npy")):
        assert build.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    build.kill()
    build.wait()
    assert not (data_dir / "manifest.json").exists(), "it was finished before it could be killed"


def kill_a_worker(log: Path, at_step: int) -> None:
    """Kill rank 1 with -9 when the log has a step."""
    while not log.exists() or f"\n{at_step} train" not in log.read_text(encoding="utf-8"):
        time.sleep(0.05)
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"RANK=1" in variables and f"LOG={log}".encode() in variables:
            os.kill(int(path.parent.name), signal.SIGKILL)


def train(config: str, log_dir: str, *flags: str, launcher=(), env: dict | None = None) -> None:
    """A run of a config with two processes; `launcher`: flags of torchrun."""
    call(f"{config}, two processes", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         *launcher, str(ROOT / "train_gpt2.py"), str(ROOT / f"config/{config}.py"), *TINY,
         "--hellaswag_data=questions.jsonl", f"--log_dir={log_dir}", *flags, env=env)


def main() -> None:
    began, here = time.monotonic(), FOLDER
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir(parents=True)
    script = {name: str(ROOT / f"{name}.py") for name in ("fineweb", "plot_log", "analyze_compute")}
    questions(here / "questions.jsonl")
    files = corpus()
    for repo, data_dir in (("fineweb", "fineweb10B"), ("fineweb-edu", "edu_fineweb10B")):
        with HubServer(files, f"HuggingFaceFW/{repo}") as hub:
            hub.pause = 0.5  # a slow network: there is time to kill
            env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(here / "hf"), "NO_PROXY": "*"}
            command = [script["fineweb"], f"--dataset={repo}", f"--data_dir={data_dir}",
                       "--val_fraction=0.03", "--shard_tokens=10000"]
            if repo == "fineweb":
                build_and_kill(command, here / data_dir, env)
            call("built, or the rest of it", *command, env=env)
        call("read again", script["fineweb"], f"--data_dir={data_dir}", "--verify")

    train("a100x8_10b", "log_c", "--data_dir=fineweb10B", "--max_steps=19")
    log = here / "log_d" / "log.txt"
    threading.Thread(target=kill_a_worker, args=(log, 45), daemon=True).start()
    train("fineweb_edu_5_epochs", "log_d", "--data_dir=edu_fineweb10B", launcher=["--max-restarts=1"],
          env={**os.environ, "LOG": str(log)})
    train("fineweb_edu_800m", "log_e", "--data_dir=edu_fineweb10B", "--max_steps=15")

    runs = (here / "log_d" / "runs.jsonl").read_text(encoding="utf-8").splitlines()
    start, max_steps = json.loads(runs[-1])["start_step"], json.loads(runs[-1])["config"]["max_steps"]
    lines = log.read_text(encoding="utf-8").splitlines()
    steps = [int(line.split()[0]) for line in lines if " train " in line]
    assert len(runs) == 2 and start > 0 and steps == [*range(max_steps)], "run D lost or repeated steps"
    print(f"\nrun D was killed and went on from step {start}; its log has each of {len(steps)} steps once")

    reference = json.loads((ROOT / "reference/gpt2_124m_fineweb.json").read_text(encoding="utf-8"))
    reference["settings"] = {}  # the real ones differ
    (here / "reference.json").write_text(json.dumps(reference), encoding="utf-8")
    call("run C beside llm.c's, at step 0", script["plot_log"], "--log_dir=log_c", "--ref=reference.json")
    call("the figure of run E", script["plot_log"], "--log=log_e/log.txt", "--model_size=124M",
         "--out=plots/log_plot.png")
    for config, *flags in (["a100x8_10b"], ["fineweb_edu_5_epochs", "--max_steps=95365"],
                           ["fineweb_edu_800m"]):
        call(f"the real {config}", script["analyze_compute"], str(ROOT / f"config/{config}.py"), *flags,
             f"--gpus={GPUS}", f"--out_dir=compute_{config}")
    print(f"\nrehearsed in {time.monotonic() - began:.0f} s; everything is in {here}")


if __name__ == "__main__":
    main()
