"""
Everything this repository measures on a CUDA GPU, in steps, for a GPU that is available for minutes only.

    make gpu-data SHARED=FOLDER             # once, anywhere: the inputs, 57 MiB
    make gpu MINUTES=6 GPU_DATA=gpu_data    # offline, installs nothing; again = the missing steps
    python gpu.py --device=cpu              # rehearsal: every step with tiny shapes

machine            40 s   versions, bf16 matmul peak at 8192^3
speed_*       90 s each   auto, flash: 60 steps of 124M: tok/s, MFU, peak memory, share of the matmul peak
shakespeare       150 s   run B, until its target loss
openstax4m         60 s   run A, all 2,848 steps
tests             150 s   the tests marked gpu
inference          90 s   generate.py; hellaswag.py on all examples
gpu_NNgb     20 s each   config/gpu_*gb.py in eager mode: peak memory, measured and computed
openstax      the rest    124M on textbooks: stopped, resumed, plotted

The times are estimates; a step starts only if half its limit is left. The next call repeats what failed or
timed out. Writes out_dir/summary.jsonl, a line per step, beside logs, figures and outputs: a few MB.
"""
import importlib.util
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from configurator import Between, OneOf, PathName, configure
from files import locked, read_jsonl, write_atomically
from plot_log import parse_log

device: OneOf("cuda", "cpu") = "cuda"  # cpu = rehearsal
minutes: Between(0, 600) = 6.0  # limit of this call
data: PathName = "gpu_data"  # the inputs
out_dir: PathName = "gpu_results"  # of all calls; carry it to the next machine; a rehearsal adds _cpu to it
log_dir: PathName = "log_gpu"  # logs and checkpoints of the training runs; the same

ROOT = Path(__file__).resolve().parent
PYTHON = os.environ.get("PYTHON_EXEC", sys.executable)  # torchrun's variable
TINY = ("--n_layer=1 --n_head=1 --n_embd=32 --block_size=32 --batch_size=2 --batch_tokens=64 --max_steps=4 "
        "--warmup_steps=1 --val_tokens=64 --compile=false --dtype=float32").split()
FIGURES = {  # name: pattern in a step's output; several matches become a list
    "torch": r"torch ([\d.]+)", "matmul_tflops": r"^matmul +\| +([\d.,]+)",
    "sample_tok_s": r"([\d.,]+) tok/s per text", "first_step": r"steps, starting at (\d+)",
    "flops_per_token": r"([\d,]+) FLOPs per token",
    "peak_memory_gb": r"peak memory ([\d.]+) GB", "dry_run_gb": r"training needs ([\d.]+) GB",
    "computed_peak_mib": r"^peak +([\d,]+)$", "hellaswag_seconds": r"acc_norm.*\| ([\d.]+) s$",
    **{word: rf"^(?:\d.*, )?(\d+) {word}.* in [\d.]+s" for word in ("passed", "failed", "skipped", "error")},
}


def train(name, *flags):
    return [PYTHON, "train_gpt2.py", *flags, f"--log_dir={log_dir}/{name}", "--resume", "--sample_interval=0",
            f"--device={device}", *(TINY if device == "cpu" else [])]


def programme(left):
    """Yield (name, limit in seconds, commands) of each step; left() is read when the step is reached."""
    cuda = device == "cuda"
    yield "machine", 80, [[PYTHON, "bench.py", "--only=matmul", f"--device={device}"]]
    short = [f"--data_dir={data}/openstax", "--warmup_steps=10", "--val_interval=0", "--val_tokens=65536",
             "--hellaswag_interval=0", "--batch_tokens=65536"]  # a GPU's part of llm.c's 524,288 on 8
    for attention in ("auto", "flash"):  # auto: cuDNN's on Hopper
        yield (name := f"speed_{attention}"), 160, [train(
            name, *short, f"--attention={attention}", "--batch_size=64", "--max_steps=60")]
    for name, config, limit in (("shakespeare", "shakespeare_124m", 300), ("openstax4m", "rtx4050_15m", 120)):
        yield name, limit, [train(name, f"config/{config}.py", f"--data_dir={data}/{name}",
                                  "--attention=flash")]  # cuDNN's may round the dropout of 0.7 to sixteenths
    tests = [str(path) for path in sorted(ROOT.glob("tests/test_*.py")) if b"mark.gpu" in path.read_bytes()]
    tests = ["-n", "4", *tests] if cuda and importlib.util.find_spec("xdist") else tests[:None if cuda else 1]
    yield "tests", 240, [[PYTHON, "-m", "pytest", "-m", "gpu", "-q", *tests]]
    sample = [PYTHON, "generate.py", f"--checkpoint={log_dir}/inference", "--prompt=Once", "--temperature=0",
              "--num_samples=1", f"--max_new_tokens={512 if cuda else 32}", f"--device={device}"]
    yield "inference", 180, [
        train("inference", *short, "--batch_size=8", "--max_steps=20", "--compile=false"), sample,
        [PYTHON, "hellaswag.py", f"--checkpoint={log_dir}/inference", f"--data={data}/hellaswag_val.jsonl",
         f"--device={device}"]]
    for path in sorted(ROOT.glob("config/gpu_*gb.py"))[:None if cuda else 1]:
        yield path.stem, 60, [[PYTHON, "analyze_compute.py", str(path)],
                              train(path.stem, str(path), *short, "--compile=false", "--dry_run")]
    openstax = train("openstax", *short, "--batch_size=64", "--max_steps=4000", "--val_tokens=262144",
                  "--val_interval=400", "--hellaswag_interval=400",
                  f"--hellaswag_data={data}/hellaswag_val.jsonl")
    hours = (0.3 * left() / 3600, 0.35 * left() / 3600) if cuda else (1e-6, 1)
    yield "openstax", max(480, left()), [
        *([*openstax, f"--max_hours={limit:.6f}"] for limit in hours),
        [PYTHON, "plot_log.py", f"--log_dir={log_dir}/openstax", f"--out={out_dir}/openstax.png"]]


def run(name, seconds, commands):
    """(exit code, 124 for a timeout; figures from the output and the training log) of a step."""
    end, returncode, output = time.monotonic() + seconds, 0, Path(out_dir, f"{name}.out")
    env = {**os.environ, "TIKTOKEN_CACHE_DIR": f"{data}/tokenizer"}
    with open(output, "wb") as file:
        for command in commands:  # also after one that fails; at SIGTERM a training run saves
            limit = f"{max(1, end - time.monotonic()):.0f}"
            done = subprocess.run(["timeout", "--kill-after=60", limit, *command], stdout=file, stderr=file,
                                  cwd=ROOT, env=env)
            returncode = returncode or done.returncode
    text, figures = output.read_text(encoding="utf-8", errors="replace"), {}
    output.write_text(text[-100_000:], encoding="utf-8")
    for figure, pattern in FIGURES.items():
        if matches := re.findall(pattern, text, re.M):
            numbers = [match if figure == "torch" else float(match.replace(",", "")) for match in matches]
            figures[figure] = numbers if len(numbers) > 1 else numbers[0]
    if (log := Path(log_dir, name, "log.txt")).exists():
        shutil.copyfile(log, Path(out_dir, f"{name}.log.txt"))
        for stream, values in parse_log(log).items():
            numbers, steady = list(values.values()), stream in ("tok_s", "mfu")  # steady: after compiling
            figures |= {"last_step": max(figures.get("last_step", 0), *values),
                        stream: statistics.median(numbers[10:] or numbers) if steady else numbers[-1]}
    return returncode, figures


def main():
    end, summary = time.monotonic() + 60 * minutes, Path(out_dir, "summary.jsonl")
    records = read_jsonl(summary, {"step": str, "returncode": int})
    found = {record["step"]: record for record in records if record["returncode"] == 0}
    query = "nvidia-smi --query-gpu=name,driver_version --format=csv,noheader"
    about = {"device": device, "gpu": subprocess.getoutput(query),  # COMMIT=... where .git is missing
             "commit": os.environ.get("COMMIT") or subprocess.getoutput(f"git -C '{ROOT}' describe --always")}
    missing = []
    for name, limit, commands in programme(lambda: end - time.monotonic()):
        start = time.monotonic()
        if name not in found and end - start >= limit / 2:
            returncode, figures = run(name, min(limit, end - start), commands)
            peaks = [record["matmul_tflops"] for record in records if "matmul_tflops" in record]
            if peaks and name.startswith("speed") and "tok_s" in figures:
                figures["matmul_share"] = figures["tok_s"] * figures["flops_per_token"] / 1e12 / peaks[-1]
            records.append({"step": name, "seconds": round(time.monotonic() - start, 1),
                            "returncode": returncode, **about, **figures})
            print(json.dumps(records[-1]), flush=True)
            write_atomically(summary, "".join(f"{json.dumps(record)}\n" for record in records).encode())
            if returncode == 0:
                found[name] = records[-1]
        missing += [name] if name not in found else []
    if missing:
        sys.exit(f"failed or not started: {', '.join(missing)}; see {out_dir}/*.out, and run this again")


if __name__ == "__main__":
    configure(globals())
    suffix = "_cpu" * (device == "cpu")
    data, out_dir, log_dir = map(os.path.abspath, (data, out_dir + suffix, log_dir + suffix))
    os.makedirs(out_dir, exist_ok=True)
    with locked(out_dir, "run of gpu.py"):
        main()
