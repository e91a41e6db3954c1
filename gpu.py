"""
Everything this repository measures on a CUDA GPU, in steps, for a GPU that is available for minutes only.

    make gpu MINUTES=6 GPU_DATA=gpu_data    # offline, installs nothing; again = the missing steps
    python gpu.py --device=cpu              # rehearsal: every step with tiny shapes

machine            30 s   versions, bf16 matmul peak, the loss against F.linear_cross_entropy (torch >= 2.13)
speed_BATCH_SDPA   45 s   60 steps of 124M: median tok/s, MFU, peak memory, share of the matmul peak
shakespeare       150 s   run B, until its target loss
openstax4m         60 s   run A, all 2,848 steps
tests              90 s   the tests marked gpu
inference          80 s   generate.py with and without --compile; hellaswag.py on all examples
presets           100 s   config/gpu_*gb.py in eager mode: peak memory, measured and computed
mixed         the rest    124M on textbooks and Python code: stopped, resumed, plotted

The times are estimates. A step starts only if half its limit is left, so a short one may run before a long
one. The next call repeats what failed or timed out; runs A and B resume if log_dir is still there. Writes a
line per finished step into out_dir/summary.jsonl, beside each step's log, figure and last output: a few MB.
Exits 1 if a step failed. Reads `data`, 57 MiB, made on any machine by

    python fineweb.py --input=input.txt --data_dir=gpu_data/shakespeare
    python fineweb.py --input=text.parquet --data_dir=gpu_data/openstax4m --max_tokens=43e5 --val_fraction=.07
    python fineweb.py --input=text.parquet --data_dir=openstax
    python fineweb.py --dataset=python --max_tokens=5e6 --data_dir=python5m
    mkdir gpu_data/mixed gpu_data/tokenizer; cp openstax/*.npy python5m/*.npy gpu_data/mixed  # no manifest
    cp hellaswag_val.jsonl gpu_data
    cp gpt2.tiktoken gpu_data/tokenizer/0ea1e91bbb3a60f729a8dc8f777fd2fc07cd8df4
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

from configurator import Between, OneOf, PathName, configure, read_text
from files import locked, write_atomically

device: OneOf("cuda", "cpu") = "cuda"  # cpu = rehearsal
minutes: Between(0, 600) = 6.0  # limit of this call
data: PathName = "gpu_data"  # inputs
out_dir: PathName = "gpu_results"  # of all calls; carry it to the next machine; a rehearsal adds _cpu to it
log_dir: PathName = "log_gpu"  # logs and checkpoints of the training runs; the same
commit = ""  # of the code, where .git is missing; empty = ask git
task: OneOf("", "machine", "sample") = ""  # internal: what a step runs
compile = False  # internal: of task=sample

ROOT = Path(__file__).resolve().parent
PYTHON = os.environ.get("PYTHON_EXEC", sys.executable)  # torchrun's variable
TINY = ("--n_layer=1 --n_head=1 --n_embd=32 --block_size=32 --batch_size=2 --batch_tokens=64 --max_steps=4 "
        "--warmup_steps=1 --val_tokens=64 --compile=false --dtype=float32 --device=cpu").split()
WITH_PEAK = ("import runpy, sys, torch; sys.argv = sys.argv[1:]; "
             "runpy.run_path(sys.argv[0], run_name='__main__'); "
             "print('peak memory:', torch.cuda.max_memory_reserved())")
FIGURES = {  # name: pattern in a step's output; several matches become a list
    "first_step": r"steps, starting at (\d+)", "flops_per_token": r"([\d,]+) FLOPs per token",
    "peak_memory": r"^peak memory: (\d+)", "computed_peak_mib": r"^peak +([\d,]+)$",
    "dry_run_gb": r"training needs ([\d.]+) GB", "hellaswag_seconds": r"acc_norm.*\| ([\d.]+) s$",
    **{word: rf"^(?:\d.*, )?(\d+) {word}.* in [\d.]+s" for word in ("passed", "failed", "skipped", "error")},
}


def train(name, *flags):
    return [PYTHON, "-c", WITH_PEAK, "train_gpt2.py", *flags, f"--log_dir={log_dir}/{name}", "--resume",
            "--sample_interval=0", *(TINY if device == "cpu" else ["--device=cuda"])]


def programme(left, found):
    """(name, limit in seconds, commands) of each step, made when it is reached.

    left() says how many seconds remain; `found` holds {step: its line of the summary} of those done.
    """
    cuda, own = device == "cuda", [PYTHON, "gpu.py", f"--device={device}", f"--log_dir={log_dir}"]
    some = None if cuda else 1
    yield "machine", 60, [[*own, "--task=machine"]]
    short = [f"--data_dir={data}/mixed", "--warmup_steps=10", "--val_interval=0", "--val_tokens=65536",
             "--hellaswag_interval=0", "--batch_tokens=65536"]  # a GPU's part of llm.c's 524,288 on 8
    for size, attention in ((64, "cudnn"), (64, "flash"), (32, "cudnn"), (32, "flash")):
        name = f"speed_{size}_{attention}"
        yield name, 120, [["env", f"GPT2_SDPA={attention}",
                           *train(name, *short, f"--batch_size={size}", "--max_steps=60")]]
    for name, config, limit in (("shakespeare", "shakespeare_124m", 300), ("openstax4m", "rtx4050_15m", 120)):
        yield name, limit, [train(name, f"config/{config}.py", f"--data_dir={data}/{name}")]
    tests = [str(path) for path in sorted(ROOT.glob("tests/test_*.py")) if "mark.gpu" in read_text(path)]
    workers = ["-n", "4"] if cuda and importlib.util.find_spec("xdist") else []
    yield "tests", 180, [[PYTHON, "-m", "pytest", "-m", "gpu", "-q", *workers, *tests[:some]]]
    yield "inference", 150, [
        train("inference", *short, "--batch_size=8", "--max_steps=20", "--compile=false"),
        [*own, "--task=sample"], [*own, "--task=sample", f"--compile={cuda}"],
        [PYTHON, "hellaswag.py", f"--checkpoint={log_dir}/inference", f"--data={data}/hellaswag_val.jsonl",
         f"--device={device}"]]
    yield "presets", 160, [command for path in sorted(ROOT.glob("config/gpu_*gb.py"))[:some] for command in (
        [PYTHON, "analyze_compute.py", str(path)],
        train("presets", str(path), *short, "--compile=false", "--dry_run"))]
    if "mixed" not in found:  # begin again: the number of steps depends on the time left
        shutil.rmtree(Path(log_dir, "mixed"), ignore_errors=True)
    rate = found.get("speed_64_cudnn", {}).get("tok_s", 400_000)
    steps = max(100, int(0.8 * (left() - 100) * rate / 65_536))  # 100 s for starts and evaluations
    run = train("mixed", *short, "--batch_size=64", f"--max_steps={steps}", "--warmup_steps=100",
                "--val_tokens=262144", f"--val_interval={steps // 10}", f"--hellaswag_interval={steps // 2}",
                f"--hellaswag_data={data}/hellaswag_val.jsonl")
    hours = 0.4 * left() / 3600 if cuda else 1e-6
    yield "mixed", max(240, left()), [
        [*run, f"--max_hours={hours:.9f}"], run,
        [PYTHON, "plot_log.py", f"--log_dir={log_dir}/mixed", f"--out={out_dir}/mixed.png"]]


def run(name, seconds, commands):
    """(exit code, 124 for a timeout; figures from the output and the training log) of a step."""
    end, returncode, output = time.monotonic() + seconds, 0, Path(out_dir, f"{name}.out")
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "TIKTOKEN_CACHE_DIR": f"{data}/tokenizer"}
    with open(output, "wb") as file:
        for command in commands:  # also after one that fails
            try:
                returncode = subprocess.run(command, stdout=file, stderr=file, cwd=ROOT, env=env,
                                            timeout=max(0, end - time.monotonic())).returncode or returncode
            except subprocess.TimeoutExpired:
                returncode = 124
    text, figures = output.read_text(encoding="utf-8", errors="replace"), {}
    output.write_text(text[-100_000:], encoding="utf-8")
    for figure, pattern in FIGURES.items():
        if numbers := [float(number.replace(",", "")) for number in re.findall(pattern, text, re.M)]:
            figures[figure] = numbers if len(numbers) > 1 else numbers[0]
    if failing := re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.M):
        figures["failing"] = failing
    for line in re.findall("^figures (.*)", text, re.M):  # of a task
        figures |= json.loads(line)
    log, streams = Path(log_dir, name, "log.txt"), {}
    if log.exists():
        shutil.copyfile(log, Path(out_dir, f"{name}.log.txt"))
        for line in read_text(log).splitlines():
            step, stream, value = line.split()
            streams.setdefault(stream, []).append(float(value))
        figures["last_step"] = int(step)
        for stream, values in streams.items():  # the median leaves out the steps that compile
            fast = stream in ("tok_s", "mfu")
            figures[stream] = statistics.median(values[10:] or values) if fast else values[-1]
    return returncode, figures


def machine():
    """Print versions, the bf16 matmul peak, and of each loss its value and time with the backward pass."""
    import torch
    import torch.nn.functional as F

    from model import linear_cross_entropy

    def timed(work):
        seconds = []
        for _ in range(13):
            start = time.perf_counter()
            value = work().item()  # waits for the device
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds[3:]), value

    def backward():
        value = loss(x, weight, targets)
        value.backward()
        return value

    n, N, C, V = (8192, 32 * 1024, 768, 50304) if device == "cuda" else (32, 64, 32, 512)
    a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16)
    x = torch.randn(N, C, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.empty(V, C, device=device, dtype=torch.bfloat16).normal_(std=0.02).requires_grad_()
    targets = torch.randint(V, (N,), device=device)
    figures = {"torch": str(torch.__version__), "cuda": torch.version.cuda, "cpus": os.cpu_count(),
               "cudnn": torch.backends.cudnn.version(),
               "matmul_tflops": 20 * n**3 / timed(lambda: [a @ b for _ in range(10)][-1][0, 0])[0] / 1e12}
    losses = {"ours": lambda *args: linear_cross_entropy(*args, chunk=0)}
    losses["compiled"] = torch.compile(losses["ours"], disable=device == "cpu")
    losses["torchs"] = getattr(F, "linear_cross_entropy", None)
    for name, loss in losses.items():
        figures[f"loss_{name}"] = timed(backward) if loss else f"not in torch {torch.__version__}"
    print("figures", json.dumps(figures))


def sample():
    """Print tok/s of generate.py over the second half of its tokens, when everything is compiled."""
    import generate
    times = []

    def timed_print(*args, **kwargs):  # generate.py prints a token as soon as it is drawn
        times.append(time.perf_counter())
        print(*args, **kwargs)

    generate.print = timed_print
    generate.checkpoint, generate.device, generate.compile = f"{log_dir}/inference", device, compile
    generate.prompt, generate.num_samples, generate.temperature = "Once upon a time", 1, 0.0
    generate.max_new_tokens = 512 if device == "cuda" else 32
    generate.main()
    half = len(times) // 2
    print("figures", json.dumps({
        f"sample_tok_s{'_compiled' * compile}": (len(times) - 1 - half) / (times[-1] - times[half])}))


def main():
    end = time.monotonic() + 60 * minutes
    summary = Path(out_dir, "summary.jsonl")
    records = [json.loads(line) for line in read_text(summary).splitlines()] if summary.exists() else []
    found = {record["step"]: record for record in records if record["returncode"] == 0}
    query = "nvidia-smi --query-gpu=name,driver_version --format=csv,noheader"
    about = {"device": device if device == "cpu" else subprocess.getoutput(query),
             "commit": commit or subprocess.getoutput(f"git -C '{ROOT}' describe --always --dirty")}
    failed = []
    for name, limit, commands in programme(lambda: end - time.monotonic(), found):
        start = time.monotonic()
        if name in found:
            continue
        if end - start < limit / 2:
            print(f"{name}: not started with {end - start:.0f} s left; run this again", flush=True)
            continue
        returncode, figures = run(name, min(limit, end - start), commands)
        if name.startswith("speed") and "machine" in found and "tok_s" in figures:
            figures["share_of_matmul_peak"] = (figures["tok_s"] * figures["flops_per_token"] / 1e12
                                               / found["machine"]["matmul_tflops"])
        records.append({"step": name, "seconds": round(time.monotonic() - start, 1), "returncode": returncode,
                        **about, **figures})
        print(json.dumps(records[-1]), flush=True)
        write_atomically(summary, "".join(f"{json.dumps(record)}\n" for record in records).encode())
        if returncode:
            failed.append(name)
        else:
            found[name] = records[-1]
    if failed:
        sys.exit(f"failed or timed out: {', '.join(failed)}; see their .out in {out_dir}; run this again")


if __name__ == "__main__":
    configure(globals())
    if task:
        globals()[task]()
    else:
        suffix = "_cpu" if device == "cpu" else ""
        data, out_dir, log_dir = map(os.path.abspath, (data, out_dir + suffix, log_dir + suffix))
        os.makedirs(out_dir, exist_ok=True)
        with locked(out_dir, "run of gpu.py"):
            main()
