"""
Everything this repository measures on a CUDA GPU, in steps, for a GPU that is available for minutes only.

    make gpu-data SHARED=FOLDER             # once, anywhere: the inputs, 57 MiB
    make gpu MINUTES=6 GPU_DATA=gpu_data    # offline, installs nothing; again = the missing steps
    python gpu.py --device=cpu              # rehearsal: every step with tiny shapes

machine            40 s   versions, bf16 matmul peak at 8192^3, the loss against F.linear_cross_entropy
speed_BATCH_SDPA   45 s   60 steps of 124M: median tok/s, MFU, peak memory, share of the matmul peak
shakespeare       150 s   run B, until its target loss
openstax4m         60 s   run A, all 2,848 steps
tests              90 s   the tests marked gpu
inference          80 s   generate.py with and without --compile; hellaswag.py on all examples
presets           100 s   config/gpu_*gb.py in eager mode: peak memory, measured and computed
mixed         the rest    124M on textbooks and Python code: stopped, resumed, plotted

The times are estimates. A step starts only if half its limit is left. The next call repeats what failed or
timed out; runs A and B resume if log_dir is still there. Writes a line per step into out_dir/summary.jsonl,
beside its log, figure and last output: a few MB. Exits 1 unless all steps are done.
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
commit = ""  # of the code, where .git is missing; empty = ask git

ROOT = Path(__file__).resolve().parent
PYTHON = os.environ.get("PYTHON_EXEC", sys.executable)  # torchrun's variable
TINY = ("--n_layer=1 --n_head=1 --n_embd=32 --block_size=32 --batch_size=2 --batch_tokens=64 --max_steps=4 "
        "--warmup_steps=1 --val_tokens=64 --compile=false --dtype=float32").split()
FIGURES = {  # name: pattern in a step's output; several matches become a list
    "torch": r"torch ([\d.]+)", "matmul_tflops": r"^matmul +\| +([\d.]+)",
    "loss_ratio": r"^loss .*\| ([\d.]+)x", "sample_tok_s": r"([\d.,]+) tok/s per text",
    "first_step": r"steps, starting at (\d+)", "flops_per_token": r"([\d,]+) FLOPs per token",
    "peak_memory_gb": r"peak memory ([\d.]+) GB", "computed_peak_mib": r"^peak +([\d,]+)$",
    "dry_run_gb": r"training needs ([\d.]+) GB", "hellaswag_seconds": r"acc_norm.*\| ([\d.]+) s$",
    **{word: rf"^(?:\d.*, )?(\d+) {word}.* in [\d.]+s" for word in ("passed", "failed", "skipped", "error")},
}


def train(name, *flags):
    return [PYTHON, "train_gpt2.py", *flags, f"--log_dir={log_dir}/{name}", "--resume", "--sample_interval=0",
            f"--device={device}", *(TINY if device == "cpu" else [])]


def programme(left, found):
    """(name, limit in seconds, commands) of each step; left() seconds remain, `found` are those done."""
    cuda = device == "cuda"
    shape = "--batch_size=32 --block_size=1024 --n_embd=768" if cuda else "--batch_size=1 --turns=1"
    yield "machine", 80, [[PYTHON, "bench.py", "--only=matmul,loss", f"--device={device}", *shape.split()]]
    short = [f"--data_dir={data}/mixed", "--warmup_steps=10", "--val_interval=0", "--val_tokens=65536",
             "--hellaswag_interval=0", "--batch_tokens=65536"]  # a GPU's part of llm.c's 524,288 on 8
    for size, attention in ((64, "cudnn"), (64, "flash"), (32, "cudnn"), (32, "flash")):
        name = f"speed_{size}_{attention}"
        yield name, 120, [train(name, *short, f"--attention={attention}", f"--batch_size={size}",
                                "--max_steps=60")]
    for name, config, limit in (("shakespeare", "shakespeare_124m", 300), ("openstax4m", "rtx4050_15m", 120)):
        yield name, limit, [train(name, f"config/{config}.py", f"--data_dir={data}/{name}")]
    tests = [str(path) for path in sorted(ROOT.glob("tests/test_*.py")) if b"mark.gpu" in path.read_bytes()]
    tests = ["-n", "4", *tests] if cuda and importlib.util.find_spec("xdist") else tests[:None if cuda else 1]
    yield "tests", 180, [[PYTHON, "-m", "pytest", "-m", "gpu", "-q", *tests]]
    sample = [PYTHON, "generate.py", f"--checkpoint={log_dir}/inference", "--prompt=Once", "--temperature=0",
              "--num_samples=1", f"--max_new_tokens={512 if cuda else 32}", f"--device={device}"]
    yield "inference", 150, [
        train("inference", *short, "--batch_size=8", "--max_steps=20", "--compile=false"),
        sample, [*sample, f"--compile={cuda}"],
        [PYTHON, "hellaswag.py", f"--checkpoint={log_dir}/inference", f"--data={data}/hellaswag_val.jsonl",
         f"--device={device}"]]
    yield "presets", 160, [command for path in sorted(ROOT.glob("config/gpu_*gb.py"))[:None if cuda else 1]
                           for command in ([PYTHON, "analyze_compute.py", str(path)], train(
                               "presets", str(path), *short, "--compile=false", "--dry_run"))]
    if "mixed" not in found:  # begin again: the number of steps depends on the time left
        shutil.rmtree(Path(log_dir, "mixed"), ignore_errors=True)
    steps = max(100, int(5 * (left() - 100)))  # 400,000 tok/s, and 100 s for starts and evaluations
    run = train("mixed", *short, "--batch_size=64", f"--max_steps={steps}", "--warmup_steps=100",
                "--val_tokens=262144", f"--val_interval={steps // 10}", f"--hellaswag_interval={steps // 2}",
                f"--hellaswag_data={data}/hellaswag_val.jsonl")
    stopped = [*run, f"--max_hours={0.4 * left() / 3600 if cuda else 1e-6:.9f}"]
    plot = [PYTHON, "plot_log.py", f"--log_dir={log_dir}/mixed", f"--out={out_dir}/mixed.png"]
    yield "mixed", max(240, left()), [stopped, run, plot]


def run(name, seconds, commands):
    """(exit code, 124 for a timeout; figures from the output and the training log) of a step."""
    end, returncode, output = time.monotonic() + seconds, 0, Path(out_dir, f"{name}.out")
    env = {**os.environ, "TIKTOKEN_CACHE_DIR": f"{data}/tokenizer"}
    with open(output, "wb") as file:
        for command in commands:  # also after one that fails; SIGTERM has a training run save
            limited = ["timeout", "--kill-after=15", f"{max(1, end - time.monotonic()):.0f}", *command]
            returncode = subprocess.run(limited, stdout=file, stderr=file, cwd=ROOT, env=env
                                        ).returncode or returncode
    text, figures = output.read_text(encoding="utf-8", errors="replace"), {}
    output.write_text(text[-100_000:], encoding="utf-8")
    for figure, pattern in FIGURES.items():
        if matches := re.findall(pattern, text, re.M):
            matches = [match if figure == "torch" else float(match.replace(",", "")) for match in matches]
            figures[figure] = matches if len(matches) > 1 else matches[0]
    figures["failing"] = re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.M)
    if (log := Path(log_dir, name, "log.txt")).exists():
        shutil.copyfile(log, Path(out_dir, f"{name}.log.txt"))
        for stream, values in parse_log(log).items():
            figures["last_step"], figures[stream] = list(values.items())[-1]
            if stream in ("tok_s", "mfu"):  # without the steps that compile
                figures[stream] = statistics.median(list(values.values())[10:] or values.values())
    return returncode, figures


def main():
    end, summary = time.monotonic() + 60 * minutes, Path(out_dir, "summary.jsonl")
    records = read_jsonl(summary, {"step": str, "returncode": int})
    found = {record["step"]: record for record in records if record["returncode"] == 0}
    gpu = subprocess.getoutput("nvidia-smi --query-gpu=name,driver_version --format=csv,noheader")
    about = {"device": device if device == "cpu" else gpu,
             "commit": commit or subprocess.getoutput(f"git -C '{ROOT}' describe --always --dirty")}
    missing = []
    for name, limit, commands in programme(lambda: end - time.monotonic(), found):
        start = time.monotonic()
        if name not in found and end - start >= limit / 2:
            returncode, figures = run(name, min(limit, end - start), commands)
            if "machine" in found and "tok_s" in figures:
                tflops = figures["tok_s"] * figures["flops_per_token"] / 1e12
                figures["share_of_matmul_peak"] = tflops / found["machine"]["matmul_tflops"]
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
