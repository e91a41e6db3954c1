"""
Train GPT-2 from scratch. Everything that happens is in this file, in the order in which it happens.

    python train_gpt2.py config/demo_cpu.py                                    # a laptop: minutes
    torchrun --standalone --nproc_per_node=8 train_gpt2.py                     # 124M on 10B tokens: 8 GPUs
    python train_gpt2.py config/rtx4050_15m.py --batch_size=16 --log_dir=log_b # files and flags, later wins
    python train_gpt2.py config/demo_cpu.py --resume                           # continue after any stop

Reads token shards from data_dir (make prepare, make demo, or fineweb.py). Writes into log_dir: log.txt, one
`step stream value` per line; runs.jsonl, the resolved settings and versions of every start; ckpt_*.pt.
The defaults are GPT-2 small on FineWeb-Edu: 19,073 steps of 524,288 tokens = 10.0B tokens.

The tokens of step s depend on (seed, data, batch_tokens, T, s) alone, and dropout on (seed, s, micro-batch),
so the run is the same for any number of processes, and a resumed run is the run that was never stopped.
"""

import json
import math
import os
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import checkpoint
from bpe import load_tokenizer
from configurator import UserError, configure
from device import resolve_device
from model import GPT, GPTConfig
from shards import TokenStream, WindowLoader, write_atomically

# ---- data and output
data_dir = "edu_fineweb10B"  # folder of token shards, *_train_*.npy|bin and *_val_*.npy|bin
tokenizer = "gpt2"  # gpt2 or a rank file: the one the shards were made with
log_dir = "log"  # log.txt, runs.jsonl and checkpoints go here
resume = False  # continue the run in log_dir from its newest whole checkpoint
# ---- model: GPT-2 small, 124M
n_layer = 12  # blocks
n_head = 12  # attention heads per block
n_embd = 768  # C, width of the residual stream
block_size = 1024  # T, tokens per sequence
vocab_size = 0  # rows of wte; 0 = the tokenizer's ids rounded up to a multiple of 128, 50304 for gpt2
dropout = 0.0  # 0 is right for one epoch of web text
norm_position = "pre"  # pre (GPT-2) or post (the original transformer)
# ---- batch
batch_size = 32  # sequences per process per micro-step; halve it when memory runs out: same tokens per step
batch_tokens = 524_288  # tokens per optimizer step over all processes, 2**19; accumulation is derived
# ---- schedule
max_steps = 19_073  # optimizer steps; 10B tokens / batch_tokens
num_epochs = 0.0  # passes over the training tokens; above 0 it replaces max_steps
target_loss = 0.0  # stop when a step's train loss is this low; 0 = never
schedule = "cosine"  # cosine, or wsd: warm-up, stable, decay
warmup_steps = 715  # linear warm-up; 375M tokens, GPT-3 appendix B
decay_fraction = 0.2  # wsd: the last share of max_steps, in which the rate falls on a line
max_lr = 6e-4  # GPT-3 table 2.1, 125M row
min_lr = 6e-5  # where the schedule ends; GPT-3 decays to 10%
# ---- optimizer
optimizer = "adamw"  # adamw, or muon: Muon on the matrices of the blocks, AdamW on the rest
weight_decay = 0.1  # on matrices and embeddings only; GPT-3 appendix B
beta1 = 0.9  # GPT-3 appendix B
beta2 = 0.95  # GPT-3 appendix B
grad_clip = 1.0  # global L2 norm; 0 = no clipping
# ---- judging and saving
val_interval = 250  # steps between validations; 0 = only at the end
val_tokens = 10_485_760  # the first so many tokens of the val split; less where it is shorter
checkpoint_interval = 1000  # steps between checkpoints; 0 = only at the end
keep_checkpoints = 2  # the newest so many, and the best by val loss
sample_interval = 1000  # steps between printed samples; 0 = never
prompt = "Hello, I'm a language model,"  # what samples begin with
num_samples = 2  # samples printed each time
max_new_tokens = 48  # tokens per sample
# ---- machine
device = "auto"  # auto|cpu|cuda|cuda:1|mps
dtype = "auto"  # auto|float32|bfloat16|float16, of matrix products; weights stay float32
compile = True  # torch.compile the training step; off by itself, with a line, where it does not work
peak_tflops = 0.0  # dense peak of one device for the MFU; 0 = from the table in device.py, or n/a
seed = 1337  # of initial weights, data order, dropout and samples
config = configure(globals())
LEGAL = {  # lowest and highest value of the settings that nothing else checks
    (1, math.inf): "batch_size block_size max_steps keep_checkpoints val_tokens num_samples max_new_tokens",
    (0, math.inf): "vocab_size num_epochs target_loss warmup_steps min_lr weight_decay grad_clip peak_tflops "
                   "val_interval checkpoint_interval sample_interval",
    (min_lr, math.inf): "max_lr",
    (0, 1 - 1e-9): "beta1 beta2",
    (0, 1): "decay_fraction",
    (0, 2**63 - 1): "seed",
}
for (low, high), keys in LEGAL.items():
    for key in keys.split():
        if not low <= config[key] <= high:
            raise UserError(f"{key}={config[key]}: wanted {low} to {high}; type --{key}=VALUE")


# ---- processes and device: the only block that reads RANK and friends
world_size = int(os.environ.get("WORLD_SIZE", 1))
rank = int(os.environ.get("RANK", 0))
ddp = world_size > 1
master_process = rank == 0
if not resume and (Path(log_dir, "log.txt").exists() or checkpoint.list_checkpoints(log_dir)):
    raise UserError(f"log_dir={log_dir} already holds a run; continue it with --resume, "
                    f"or choose --log_dir=ANOTHER")
if ddp and ":" in device:
    raise UserError(f"device={device} is one device for {world_size} processes; give --device=cuda")
dev = resolve_device(device, dtype, compile, int(os.environ.get("LOCAL_RANK", 0)))
if ddp:
    dist.init_process_group("nccl" if dev.type == "cuda" else "gloo")
    dist.barrier()  # nobody writes into log_dir before everybody has looked at it


def say(text=""):
    if master_process:
        print(text, flush=True)


def leave_together():
    """Take the process group down when every process is done with it: gloo aborts one whose peers are not."""
    if ddp:
        dist.barrier()
        dist.destroy_process_group()


def sum_over_ranks(*values):
    """Python numbers -> their sums over all processes."""
    if not ddp:
        return values
    sums = torch.tensor(values, dtype=torch.float64, device=dev.device if dev.type == "cuda" else "cpu")
    dist.all_reduce(sums)
    return sums.tolist()


# ---- data
B, T = batch_size, block_size
train_stream, val_stream = TokenStream(data_dir, "train"), TokenStream(data_dir, "val")
tok = load_tokenizer(tokenizer)
if train_stream.manifest and train_stream.manifest["tokenizer"]["sha256"] != tok.sha256:
    built_with = train_stream.manifest["tokenizer"]["name"]
    raise UserError(f"data_dir={data_dir} was tokenized with {built_with!r}, got --tokenizer={tokenizer}, "
                    f"which is another vocabulary; give --tokenizer=FILE of {built_with!r}, "
                    f"or rebuild the data with fineweb.py")
micro_tokens = B * T * world_size
if batch_tokens < micro_tokens or batch_tokens % micro_tokens:
    below = max(micro_tokens, batch_tokens // micro_tokens * micro_tokens)
    raise UserError(f"batch_tokens={batch_tokens} is not a multiple of batch_size * block_size * processes "
                    f"= {B} * {T} * {world_size} = {micro_tokens}; "
                    f"try --batch_tokens={below} or {below + micro_tokens}, or another --batch_size")
grad_accum_steps = batch_tokens // micro_tokens
train_loader = WindowLoader(train_stream, T, batch_tokens, seed, tok.n_vocab)
val_loader = WindowLoader(val_stream, T, B * T, seed, tok.n_vocab, shuffle=False)
n_val_windows = min(val_loader.n_windows, max(1, val_tokens // T))
if num_epochs > 0:
    max_steps = config["max_steps"] = math.floor(num_epochs * train_loader.steps_per_epoch)
if schedule not in ("cosine", "wsd"):
    raise UserError(f"schedule={schedule!r}: wanted cosine or wsd")
if not 0 <= warmup_steps <= max_steps or max_steps < 1:
    raise UserError(f"warmup_steps={warmup_steps}, max_steps={max_steps}: "
                    f"wanted 0 <= warmup_steps <= max_steps, and 1 step or more; "
                    f"an epoch of this data is {train_loader.steps_per_epoch:.2f} steps")


def fetch_batch(step, micro_step):
    """This process's inputs and targets (B, T) of one micro-step, on their way to the device."""
    x, y = train_loader.batch(step, (micro_step * world_size + rank) * B, B)
    return dev.to_device(x), dev.to_device(y)


def count_targets(loader, n_windows):
    """How often each id is a target in the first windows of a stream, int64 (n_vocab,)."""
    counts = np.zeros(tok.n_vocab, dtype=np.int64)
    for first in range(0, n_windows, 1024):
        _, y = loader.read_windows(np.arange(first, min(first + 1024, n_windows)))
        counts += np.bincount(y.ravel(), minlength=tok.n_vocab)
    return counts


def unigram_loss():
    """Val loss of a model that knows frequencies only: add-one counts of the first 2**24 train tokens."""
    counts = 1 + count_targets(train_loader, min(train_loader.n_windows, 2**24 // T + 1))
    val_counts = count_targets(val_loader, n_val_windows)
    return math.log(counts.sum()) - (val_counts * np.log(counts)).sum() / val_counts.sum()


# ---- model and optimizer
if vocab_size == 0:
    vocab_size = config["vocab_size"] = math.ceil(tok.n_vocab / 128) * 128
torch.manual_seed(seed)  # the same initial weights on every process and device
raw_model = GPT(GPTConfig(block_size, vocab_size, tok.n_vocab, n_layer, n_head, n_embd, dropout,
                          norm_position))
raw_model.to(dev.device)
optimizers = raw_model.configure_optimizers(optimizer, weight_decay, max_lr, (beta1, beta2), dev.fused)
scaler = dev.grad_scaler()


# ---- resume
start_step, best, reached = 0, None, False
if resume and checkpoint.list_checkpoints(log_dir):
    state = checkpoint.load_checkpoint(log_dir)
    saved = {**state["config"], **state["model_config"],
             "data": state["data"], "tokenizer": state["tokenizer"]["sha256"]}
    wanted = {**config, **checkpoint.describe_model(raw_model),
              "data": train_stream.fingerprint, "tokenizer": tok.sha256}
    # with another value of these it would be another run
    fixed = [*state["model_config"], "data", "tokenizer", "seed", "batch_tokens", "optimizer"]
    differing = [f"{key}: {saved[key]} in the checkpoint, {wanted[key]} now"
                 for key in fixed if saved[key] != wanted[key]]
    if differing:
        raise UserError(f"cannot --resume {log_dir}: {'; '.join(differing)}; "
                        f"use the checkpoint's values, or another --log_dir")
    for key in config:  # the rest may change on purpose, but not in silence
        if key in saved and key not in fixed and key != "resume" and saved[key] != config[key]:
            say(f"resume: {key} was {saved[key]}, is now {config[key]}")
    raw_model.load_state_dict(state["model"])
    for opt, saved_opt in zip(optimizers, state["optimizers"], strict=True):
        groups = [{**group} for group in opt.param_groups]
        opt.load_state_dict(saved_opt)  # moments, and settings, of which today's count
        for group, today in zip(opt.param_groups, groups):
            group.update({key: value for key, value in today.items() if key != "params"})
    if state["scaler"] and scaler.is_enabled():  # empty unless the run that saved it was in float16
        scaler.load_state_dict(state["scaler"])
    start_step, best = state["step"], state["best"]
    reached = 0 < state["train_loss"] <= target_loss
    del state
if start_step > max_steps:
    raise UserError(f"cannot --resume {log_dir}: its newest checkpoint is of step {start_step}, "
                    f"got max_steps={max_steps}; give --max_steps={start_step} or more")
if ddp:
    places = [None] * world_size
    dist.all_gather_object(places, (start_step, train_stream.fingerprint, val_stream.fingerprint))
    if len(set(places)) > 1:
        leave_together()
        raise UserError(f"processes disagree on (start step, train data, val data): {sorted(set(places))}; "
                        f"log_dir={log_dir} and data_dir={data_dir} must be the same folders on every node")

# evaluation, sampling and saving use raw_model; only the training step is compiled and synchronised
model = torch.compile(raw_model, dynamic=False) if dev.compile else raw_model
if ddp:  # from here on every process has the weights of rank 0
    model = DistributedDataParallel(model, device_ids=[dev.device.index] if dev.type == "cuda" else None)
x, y = fetch_batch(start_step, 0)
unigram = unigram_loss() if master_process else None


# ---- the record of the run
def git_revision():
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


provenance = {"git": git_revision(), "torch": str(torch.__version__), "device": dev.name,
              "world_size": world_size}
log_path = Path(log_dir, "log.txt")
if master_process:
    Path(log_dir).mkdir(parents=True, exist_ok=True)
    for path in checkpoint.list_checkpoints(log_dir):
        if checkpoint.step_of(path) > start_step:  # newer than the newest whole one: damaged
            path.rename(path.with_suffix(".damaged"))
    lines = log_path.read_text(encoding="utf-8").splitlines(keepends=True) if log_path.exists() else []
    if lines and start_step == 0:
        lines, old_log = [], Path(log_dir, f"log_before_{time.time_ns()}.txt")
        say(f"resume: no checkpoint in {log_dir}, starting at step 0; its log is now {old_log}")
        log_path.rename(old_log)
    # without what came after the checkpoint, which is about to happen again, and without half a line
    kept = [line for line in lines if line.endswith("\n")
            and not (line.split(" ")[0].isdigit() and int(line.split(" ")[0]) >= start_step)]
    write_atomically(log_path, "".join(kept).encode())
    with open(Path(log_dir, "runs.jsonl"), "a", encoding="utf-8") as file:
        record = {"start_step": start_step, "config": config, "data": train_stream.fingerprint, **provenance}
        file.write(json.dumps(record) + "\n")


def log(step, **streams):
    if master_process:
        with open(log_path, "a", encoding="utf-8") as file:
            file.write("".join(f"{step} {stream} {value:.8g}\n" for stream, value in streams.items()))


say(f"device: {dev.name} ({dev.device}), {str(dev.dtype).removeprefix('torch.')}, "
    f"compile {'on' if dev.compile else 'off'}, {world_size} process(es)")
say(f"model: {n_layer} layers, {n_head} heads, {n_embd} wide: {raw_model.num_params():,} parameters, "
    f"{raw_model.flops_per_token(T):,} FLOPs per token")
say(f"data: {data_dir}: {len(train_stream):,} train tokens, "
    f"an epoch is {train_loader.steps_per_epoch:,.1f} steps; "
    f"val loss on the first {n_val_windows * T:,} of {len(val_stream):,} val tokens")
say(f"step: {batch_tokens:,} tokens = {grad_accum_steps} micro-steps of {B} x {T} "
    f"on {world_size} process(es); {max_steps:,} steps, starting at {start_step}")
if master_process:
    if start_step == 0:
        log(0, unigram=unigram)
    say(f"to beat: {math.log(tok.n_vocab):.4f} for guessing, "
        f"{unigram:.4f} for a unigram model on the same val tokens")


# ---- schedule and judges
def get_lr(step, schedule, warmup_steps, max_steps, max_lr, min_lr, decay_fraction):
    """Learning rate of a step, a pure function.

    A line up to max_lr at step `warmup_steps`; then a cosine down to min_lr at the last step, or (wsd, Hu et
    al. 2024, "MiniCPM", section 4) max_lr until the last `decay_fraction` of max_steps, and a line down to
    min_lr.
    """
    if step < warmup_steps:
        return max_lr * (step + 1) / (warmup_steps + 1)
    last = max_steps - 1
    start = warmup_steps if schedule == "cosine" else max(warmup_steps, last - decay_fraction * max_steps)
    progress = min(1.0, max(0.0, (step - start) / max(1, last - start)))
    height = 0.5 * (1.0 + math.cos(math.pi * progress)) if schedule == "cosine" else 1.0 - progress
    return min_lr + height * (max_lr - min_lr)


@torch.no_grad()
def evaluate_loss():
    """(nats per token, bits per byte) over the first n_val_windows of val; every token weighs the same."""
    raw_model.eval()
    token_bytes = tok.token_bytes()
    loss_sum, n_tokens, n_bytes = 0.0, 0, 0
    rows = max(1, B // 4)  # a sequence takes more memory here than in the compiled step, which fuses the loss
    for first in range(rank * rows, n_val_windows, world_size * rows):
        x, y = val_loader.read_windows(np.arange(first, min(first + rows, n_val_windows)))
        with dev.autocast():
            loss_sum += raw_model(dev.to_device(x), dev.to_device(y), reduction="sum").item()
        n_tokens += y.size
        n_bytes += int(token_bytes[y].sum())
    raw_model.train()
    loss_sum, n_tokens, n_bytes = sum_over_ranks(loss_sum, n_tokens, n_bytes)
    return loss_sum / n_tokens, loss_sum / math.log(2) / n_bytes


def stop_unless_finite(what, value, step):
    if not math.isfinite(value):  # the same value on every process, so all of them stop
        newest = (checkpoint.list_checkpoints(log_dir) or ["none"])[-1]
        leave_together()
        sys.exit(f"error: {what} is {value} at step {step}; stopped. Last good checkpoint: {newest}. "
                 f"Continue from it with --resume and a lower --max_lr, or try --dtype=float32")


def print_samples(step):
    generator = torch.Generator(dev.device).manual_seed(seed + step)
    idx = dev.to_device(np.concatenate(([tok.eot], tok.encode(prompt))).astype(np.int64))  # (T,)
    with dev.autocast():
        tokens = raw_model.generate(idx.repeat(num_samples, 1), max_new_tokens, 0.9, 50, generator=generator)
        rows = torch.stack(list(tokens), dim=1).tolist()  # (num_samples, max_new_tokens)
    for row in rows:
        row = row[: row.index(tok.eot)] if tok.eot in row else row
        say(f"> {prompt}{tok.decode(row)}")


# ---- the loop
raw_model.train()
step_times, loss = [], math.inf
for step in range(start_step, max_steps + 1):  # one extra turn, to judge and save the final weights
    last_step = step == max_steps or reached

    # ---- evaluate: every process, fixed tokens, off the clock; whatever is saved is judged first
    checkpoint_due = last_step or (checkpoint_interval > 0 and step > 0 and step % checkpoint_interval == 0)
    if checkpoint_due or (val_interval > 0 and step % val_interval == 0):
        val_loss, val_bpb = evaluate_loss()
        log(step, val=val_loss, val_bpb=val_bpb)
        say(f"step {step} | val loss: {val_loss:.4f} | bits per byte: {val_bpb:.4f}")
        stop_unless_finite("val loss", val_loss, step)
    if master_process and sample_interval > 0 and step > 0 and step % sample_interval == 0 and not last_step:
        print_samples(step)

    # ---- checkpoint: at step s, s updates have been made
    if checkpoint_due and step > start_step:
        if best is None or val_loss < best["val_loss"]:
            best = {"step": step, "val_loss": val_loss}
        if master_process:
            checkpoint.save_checkpoint(log_dir, step, {
                "step": step, "train_loss": loss, "val_loss": val_loss, "best": best,
                "model": raw_model.state_dict(), "optimizers": [opt.state_dict() for opt in optimizers],
                "scaler": scaler.state_dict(),
                "config": config, "model_config": checkpoint.describe_model(raw_model),
                "tokenizer": checkpoint.describe_tokenizer(tok), "data": train_stream.fingerprint,
                "provenance": provenance,
            })
            checkpoint.prune_checkpoints(log_dir, keep_checkpoints, best["step"])
    if last_step:
        break

    # ---- train: the only part on the clock
    dev.synchronize()
    t0 = time.perf_counter()
    lr = get_lr(step, schedule, warmup_steps, max_steps, max_lr, min_lr, decay_fraction)
    for opt in optimizers:
        for group in opt.param_groups:
            group["lr"] = lr
    loss_sum = torch.zeros((), device=dev.device)
    for micro_step in range(grad_accum_steps):
        last_micro_step = micro_step == grad_accum_steps - 1
        if ddp:  # set before the forward: DDP decides there whether this backward averages the gradients
            model.require_backward_grad_sync = last_micro_step
        # a micro-batch has the same dropout masks whichever process computes it, and after a resume
        torch.manual_seed(zlib.crc32(f"dropout {seed} {step} {micro_step * world_size + rank}".encode()))
        with dev.autocast():
            loss = model(x, y)
        if not (last_micro_step and step + 1 == max_steps):  # the next batch loads while the GPU is busy
            x, y = fetch_batch(step + 1, 0) if last_micro_step else fetch_batch(step, micro_step + 1)
        scaler.scale(loss / grad_accum_steps).backward()
        loss_sum += loss.detach()
    for opt in optimizers:
        scaler.unscale_(opt)
    norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip or math.inf)
    for opt in optimizers:
        scaler.step(opt)
        opt.zero_grad(set_to_none=True)
    scaler.update()
    # mean over micro-steps and processes
    loss = sum_over_ranks(loss_sum.item())[0] / (grad_accum_steps * world_size)
    norm = norm.item()
    dev.synchronize()
    dt = time.perf_counter() - t0  # seconds

    # ---- log: reads values, changes nothing but the decision to stop
    tok_s = batch_tokens / dt
    step_times.append(dt)
    peak = peak_tflops or dev.peak_tflops()
    mfu = raw_model.flops_per_token(T) * tok_s / (peak * 1e12 * world_size) if peak else None
    log(step, train=loss, lr=lr, norm=norm, tok_s=tok_s, **({} if mfu is None else {"mfu": mfu}))
    minutes, seconds = divmod(round((max_steps - 1 - step) * float(np.median(step_times[-100:]))), 60)
    eta = f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
    say(f"step {step} | loss: {loss:.6f} | lr: {lr:.2e} | norm: {norm:.4f} | dt: {1000 * dt:.2f}ms | "
        f"tok/sec: {tok_s:.2f} | mfu: {'n/a' if mfu is None else f'{mfu:.1%}'} | eta: {eta}")
    stop_unless_finite("loss", loss, step)
    if not scaler.is_enabled():  # with a scaler, a step of infinite gradients was left out and is no harm
        stop_unless_finite("gradient norm", norm, step)
    reached = target_loss > 0 and loss <= target_loss

# ---- what came of it
say(f"\ndone: step {step}, {step * batch_tokens:,} tokens"
    + (f", {batch_tokens / np.median(step_times):,.0f} tok/s (median step)" if step_times else ""))
if master_process:
    say(f"val loss {val_loss:.4f} nats per token ({val_bpb:.4f} bits per byte) "
        f"on {n_val_windows * T:,} tokens of {data_dir}; a unigram model has {unigram:.4f}")
    say(f"checkpoint: {checkpoint.list_checkpoints(log_dir)[-1]}")
leave_together()
if ddp:  # gloo's threads outlive their group, and now and then abort a process that ends the long way
    sys.stdout.flush()
    os._exit(0)
