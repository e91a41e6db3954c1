"""
Train GPT-2 from scratch. Everything that happens is in this file, in the order in which it happens.

    python train_gpt2.py config/demo_cpu.py                                    # a laptop: minutes
    torchrun --standalone --nproc_per_node=8 train_gpt2.py                     # 124M on 10B tokens: 8 GPUs
    python train_gpt2.py config/rtx4050_15m.py --batch_size=16 --log_dir=log_b # files and flags, later wins
    python train_gpt2.py config/demo_cpu.py --resume                           # continue after any stop
    python train_gpt2.py config/gpu_8gb.py --dry_run                           # does it fit, how long
    python train_gpt2.py config/finetune_gpt2.py --init_from=gpt2              # from OpenAI's weights
    python train_gpt2.py --eval_only --log_dir=log --data_dir=other_shards     # judge a checkpoint, no more

Reads token shards from data_dir (make prepare, make demo, or fineweb.py). Writes into log_dir: log.txt, one
`step stream value` per line; runs.jsonl, the resolved settings and versions of every start; ckpt_*; and
skipped.jsonl, the steps that were left out. SIGTERM, Ctrl-C and --max_hours finish the step, save, and exit
with 0; a worker that torchrun starts again goes on from the newest whole checkpoint by itself.
The defaults are GPT-2 small on FineWeb-Edu: 19,073 steps of 524,288 tokens = 10.0B tokens.

The tokens of step s depend on (seed, data, batch_tokens, T, s) alone, and dropout on (seed, s, micro-batch),
so the run is the same for any number of processes, and a resumed run is the run that was never stopped.
"""

import atexit
import contextlib
import hashlib
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint
import hellaswag
from bpe import load_tokenizer, tokenizer_from_ranks
from configurator import Between, OneOf, PathName, UserError, configure, report_failure
from convert_hf import load_any
from device import check_first_loss, is_out_of_memory, resolve_device, self_test
from files import locked, read_jsonl, read_text, write_atomically
from model import GPT, GPTConfig, plain_attention
from ranks import Ranks
from shards import RANK_FILE, TokenStream, WindowLoader

# ---- data and output
data_dir: PathName = "edu_fineweb10B"  # folder of token shards, *_train_*.npy|bin and *_val_*.npy|bin
tokenizer: PathName = ""  # gpt2 or a rank file; empty = the rank file in data_dir, or gpt2 without one
verify_data = False  # compare the sha256 of all shards with the manifest before the start, not beside it
log_dir: PathName = "log"  # log.txt, runs.jsonl and checkpoints go here
resume = False  # continue the run in log_dir from its newest valid checkpoint
init_from: PathName = ""  # weights to start from, with their shape: a checkpoint, gpt2, a Hugging Face folder
eval_only = False  # evaluate init_from, or log_dir's newest, on data_dir and HellaSwag; writes nothing
dry_run = False  # two steps: memory, speed, time for the whole run; writes nothing
tensorboard = False  # log to log_dir/tensorboard as well
wandb = False  # log to Weights & Biases as well; a resumed run continues there
# ---- model: GPT-2 small, 124M
n_layer: Between(1, 10_000) = 12  # blocks
n_head: Between(1, 10_000) = 12  # attention heads per block
n_embd: Between(1, 10**8) = 768  # C, width of the residual stream
block_size: Between(1, 2**20) = 1024  # T, tokens per sequence
vocab_size: Between(0, 10**6) = 0  # rows of wte; 0 = the tokenizer's ids, padded to a multiple of 128
dropout: Between(0, 1 - 1e-9) = 0.0  # 0 is right for one epoch of web text
norm_position: OneOf("pre", "post") = "pre"  # pre: GPT-2; post: the original transformer
# ---- batch
batch_size: Between(1, 65_536) = 32  # sequences per process per micro-step; halve it if memory runs out
batch_tokens: Between(1, 2**32) = 524_288  # tokens per optimizer step over all processes, 2**19
# ---- schedule
max_steps: Between(1, 10**9) = 19_073  # optimizer steps; 10B tokens / batch_tokens
num_epochs: Between(0, 10**6) = 0.0  # passes over the training tokens; above 0 it replaces max_steps
target_loss: Between(0, 100) = 0.0  # stop when the train loss of a step is this low; 0 = never
max_hours: Between(0, 10**5) = 0.0  # wall-clock limit in hours; saves and exits 0; 0 = none
schedule: OneOf("cosine", "wsd") = "cosine"  # wsd: warm-up, stable, decay
warmup_steps: Between(0, 10**9) = 715  # linear warm-up; 375M tokens, GPT-3 appendix B
decay_fraction: Between(0, 1) = 0.2  # wsd: the last share of max_steps, in which the rate decays linearly
max_lr: Between(0, 1e30) = 6e-4  # GPT-3 table 2.1, 125M row
min_lr: Between(0, 1e30) = 6e-5  # where the schedule ends; GPT-3 decays to 10%
# ---- optimizer
optimizer: OneOf("adamw", "muon") = "adamw"  # muon: Muon on the matrices of the blocks, AdamW on the rest
weight_decay: Between(0, 100) = 0.1  # on matrices and embeddings only; GPT-3 appendix B
beta1: Between(0, 1 - 1e-9) = 0.9  # GPT-3 appendix B
beta2: Between(0, 1 - 1e-9) = 0.95  # GPT-3 appendix B
grad_clip: Between(0, 10**6) = 1.0  # global L2 norm; 0 = no clipping
max_z_score: Between(0, 10**6) = 0.0  # skip steps whose loss or norm is this many deviations high; 0 = off
max_bad_steps: Between(1, 10**9) = 10  # abort after this many consecutive skipped steps
# ---- evaluating and saving
val_interval: Between(0, 10**9) = 250  # steps between validations; 0 = only at the end
val_tokens: Between(1, 10**12) = 10_485_760  # the first N tokens of the val split; less where it is shorter
hellaswag_interval: Between(0, 10**9) = 250  # steps between HellaSwag scores, and at the end; 0 = never
hellaswag_data: PathName = ""  # its validation set (.jsonl); empty = download the public file once
checkpoint_interval: Between(0, 10**9) = 1000  # steps between checkpoints; 0 = only at the end
keep_checkpoints: Between(1, 10**6) = 2  # keep the newest N, and the best by val loss
sample_interval: Between(0, 10**9) = 1000  # steps between printed samples; 0 = never
prompt = "Hello, I'm a language model,"  # what samples begin with
num_samples: Between(1, 10_000) = 2  # samples printed each time
max_new_tokens: Between(1, 10**6) = 48  # tokens per sample
grad_norm_interval: Between(0, 10**9) = 0  # steps between logs of each layer's gradient norm; 0 = never
# ---- machine
device = "auto"  # auto|cpu|cuda|cuda:1|mps
dtype: OneOf("auto", "float32", "bfloat16", "float16") = "auto"  # of matrix products; weights stay float32
parallel: OneOf("ddp", "fsdp") = "ddp"  # fsdp: weights, gradients and moments are split over the processes
activation_checkpointing = False  # compute each block twice instead of keeping its activations
attention: OneOf("auto", "cudnn", "flash", "efficient", "math") = "auto"  # CUDA; auto: cudnn on Hopper
loss_chunk: Between(0, 2**31) = 0  # rows of logits held at once; 0 = the fastest on the device, on a GPU all
compile = True  # torch.compile the training step; off by itself, with a line, where it does not work
peak_tflops: Between(0, 10**6) = 0.0  # dense peak of one device, for the MFU; 0 = device.py's table, or n/a
deterministic = False  # the same log on every run on one machine: slower kernels on CUDA, no times in the log
seed: Between(0, 2**63 - 1) = 1337  # of initial weights, data order, dropout and samples
config = configure(globals())
if max_lr < min_lr:
    raise UserError(f"max_lr={max_lr}: wanted {min_lr} or more, which is min_lr; type --min_lr=VALUE too")
if eval_only and dry_run:
    raise UserError("eval_only and dry_run: the one makes no step, the other two; leave one of them out")
for package in ("tensorboard", "wandb"):
    if config[package] and importlib.util.find_spec(package) is None:
        raise UserError(f"--{package} needs a package that is not installed: pip install {package}")


# a line of runs.jsonl, and one of skipped.jsonl: what is read of them
START = {"config": {"init_from?": str}, "launchers?": [str], "arguments": [str]}
SKIPPED = {"step": Between(0, 2**63)}

# ---- processes and device
start_time = time.monotonic()
ranks = Ranks()
rank, world_size, master_process = ranks.rank, ranks.world_size, ranks.master
ddp = ranks.many
fsdp = ddp and parallel == "fsdp"
if ddp and ":" in device:
    raise UserError(f"device={device} is one device for {world_size} processes; give --device=cuda")
dev = resolve_device(device, dtype, compile and not eval_only, ranks.local_rank, deterministic, attention)
if fsdp and (optimizer == "muon" or dev.dtype == torch.float16):
    raise UserError(f"parallel=fsdp splits the matrices that muon needs whole, and has no loss scaling for "
                    f"float16; got {optimizer} and {dev.dtype}: type --parallel=ddp, or "
                    f"--optimizer=adamw and --dtype=bfloat16")
progress = None  # tqdm's bar, while the loop runs in a terminal
signals, in_loop = [], False  # SIGTERM and SIGINT that have come; whether the loop runs, which saves


def say(text=""):
    if master_process:
        print(text, flush=True) if progress is None else progress.write(text)


def clock(seconds):
    return f"{round(seconds) // 3600}:{round(seconds) // 60 % 60:02d}:{round(seconds) % 60:02d}"


def note_signal(number, frame):
    """Have the loop save and stop. Before it there is nothing to save; a second Ctrl-C means now."""
    name = signal.Signals(number).name
    if name == "SIGINT" and (not in_loop or ("SIGINT" in signals and not ddp)):  # torchrun itself sends two
        signal.default_int_handler(number, frame)
    if not in_loop:
        say(f"stopped by {name} before the first step: there is nothing to save")
        sys.stdout.flush()
        os._exit(0)
    signals.append(name)


for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, note_signal)

ranks.connect(dev.device)
code = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for path in sorted(Path(__file__).parent.glob("*.py"))}
ranks.require_equal("settings or code", {**config, **code})


# what torchrun restarts goes on by itself; a new run that would land on an existing one is refused
log_path, runs_path, skipped_path = (
    Path(log_dir, name) for name in ("log.txt", "runs.jsonl", "skipped.jsonl"))
starts = ranks.on_all(read_jsonl, runs_path, START)
last_start = starts[-1] if starts else {}
# a restart comes from the same torchrun; the same command typed again does not
restarted = ranks.launcher in last_start.get("launchers", []) and last_start["arguments"] == sys.argv[1:]
# a start that failed before its first step is no run
exists = bool(checkpoint.list_checkpoints(log_dir)) or (
    log_path.is_file() and b" train " in log_path.read_bytes())
# one answer for all processes, and all have looked before one writes
restarted, exists = ranks.sum(restarted, exists)
writes = not (dry_run or eval_only)
occupied = f"log_dir={log_dir} already holds a run; continue it with --resume, or choose --log_dir=ANOTHER"
if exists and writes and not (resume or restarted):
    ranks.shutdown()
    raise UserError(occupied)
if resume and not exists:
    say(f"resume: there is no run in {log_dir} yet, starting at step 0")
resume = bool(resume or restarted) and writes
if resume and not init_from:  # a run that began with weights goes on as one
    init_from = config["init_from"] = last_start.get("config", {}).get("init_from", "")


@contextlib.contextmanager
def advice_when_memory_runs_out(advice):
    """Answer running out of memory with advice(), what to type."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory on {dev.name}; type {advice()}; analyze_compute.py computes what a "
                        f"setting needs, --dry_run measures it") from error


def smaller_model():
    return (f"a smaller --n_embd than {n_embd}, --n_layer than {n_layer}, --vocab_size than {vocab_size} or "
            f"--block_size than {block_size}")


def smaller_batch():
    smaller = [b for b in range(B // 2, 0, -1) if grad_accum_steps * B % b == 0]
    chunk = min(1024, max(1, B * T // 8))
    flags = [f"--batch_size={smaller[0]} (as many tokens per step)"] if smaller else []
    flags += [f"--loss_chunk={chunk}"] if chunk < (raw_model.loss_chunk or math.inf) else []
    flags += [] if activation_checkpointing else ["--activation_checkpointing"]
    return (", or ".join(flags) or f"--block_size={T // 2}") + f" (it was batch_size={B}, block_size={T})"


# ---- data, and the weights to begin with, if not random ones: shape and tokenizer are theirs
val_stream = ranks.on_all(TokenStream, data_dir, "val")
train_stream = val_stream if eval_only else ranks.on_all(TokenStream, data_dir, "train")
start = heads = start_crc = None
if init_from or eval_only:
    # a run that goes on has them in its own checkpoints, though its source may be gone
    source = log_dir if not init_from or (resume and checkpoint.list_checkpoints(log_dir)) else init_from
    start = ranks.on_all(load_any, source)
    start.pop("optimizers", None)  # twice the weights
    theirs = {**start["model_config"]}
    heads = theirs.pop("heads", None)
    theirs["block_size"] = min(block_size, theirs["block_size"])  # positions may be left out, not made up
    shape = {key: theirs[key] for key in config if key in theirs and key != "dropout"}
    say("init: " + ", ".join(f"{key}={value}" for key, value in shape.items())
        + f" as in {source}, step {start['step']}")
    config.update(shape)  # for the record, and as the settings that they are
    globals().update(shape)
B, T = batch_size, block_size
built_with = val_stream.manifest["tokenizer"] if val_stream.manifest else None


def find_tokenizer():
    """The tokenizer of the weights to begin with, of --tokenizer, or of data_dir; without any GPT-2's."""
    if start:
        return checkpoint.checkpoint_tokenizer(start)
    own = Path(data_dir, RANK_FILE)
    if tokenizer or not (built_with and own.exists()):
        return load_tokenizer(tokenizer or "gpt2")
    rank_file = own.read_bytes()
    if hashlib.sha256(rank_file).hexdigest() != built_with["sha256"]:
        raise UserError(f"{own} is not the vocabulary {built_with['name']!r} that the manifest names; run "
                        f"fineweb.py again, or name the file with --tokenizer=FILE")
    return tokenizer_from_ranks(rank_file, built_with["name"])


tok = ranks.on_all(find_tokenizer)
if start and tokenizer and load_tokenizer(tokenizer).sha256 != tok.sha256:
    raise UserError(f"tokenizer={tokenizer}: the weights to begin with know {tok.name!r}, which is another "
                    f"vocabulary, and comes with them; leave --tokenizer out")
config["tokenizer"] = tok.name if start or not tokenizer else tokenizer
if built_with and built_with["sha256"] != tok.sha256:
    cure = ("rebuild the data with that of the weights" if start else
            f"give --tokenizer=FILE of {built_with['name']!r}, or rebuild the data with fineweb.py")
    raise UserError(f"data_dir={data_dir} was tokenized with {built_with['name']!r}, got {tok.name!r}, which "
                    f"is another vocabulary; {cure}")
micro_tokens = B * T * world_size
if eval_only:  # a run that has its steps behind it
    batch_tokens, max_steps, num_epochs, warmup_steps = micro_tokens, start["step"], 0.0, 0
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
if not eval_only and (not 0 <= warmup_steps <= max_steps or max_steps < 1):
    raise UserError(f"warmup_steps={warmup_steps}, max_steps={max_steps}: "
                    f"wanted 0 <= warmup_steps <= max_steps, and 1 step or more; "
                    f"an epoch of this data is {train_loader.steps_per_epoch:.2f} steps")


def fetch_batch(step, micro_step):
    """This process's inputs and targets (B, T) of one micro-step, on their way to the device."""
    x, y = train_loader.batch(step, (micro_step * world_size + rank) * B, B)
    return dev.to_device(x), dev.to_device(y)


def unigram_loss():
    """Val loss of a model that knows frequencies only: add-one counts of the first 2**24 train tokens."""
    if eval_only or not master_process:
        return None
    counts = 1 + train_loader.count_targets(min(train_loader.n_windows, 2**24 // T + 1))
    val_counts = val_loader.count_targets(n_val_windows)
    return math.log(counts.sum()) - (val_counts * np.log(counts)).sum() / val_counts.sum()


# ---- model and optimizer
if vocab_size == 0:
    vocab_size = config["vocab_size"] = math.ceil(tok.n_vocab / 128) * 128
torch.manual_seed(seed)  # the same initial weights on every process and device
with advice_when_memory_runs_out(smaller_model):
    raw_model = GPT(GPTConfig(block_size, vocab_size, tok.n_vocab, n_layer, n_head, n_embd, dropout,
                              norm_position, heads))
    raw_model.activation_checkpointing = activation_checkpointing
    raw_model.loss_chunk = loss_chunk or dev.loss_chunk
    if fsdp:  # each process keeps its part of every matrix and gathers a block when it needs it
        # its loss is not compiled: all logits at once would take more memory than the model
        raw_model.loss_chunk = raw_model.loss_chunk or 4096
        # the logits are a view, which nobody changes in place
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        mesh = init_device_mesh(dev.type, (world_size,))
        # autocast would round the gathered weights all the same; the residual stream stays float32
        precision = MixedPrecisionPolicy(param_dtype=dev.dtype, reduce_dtype=torch.float32,
                                         cast_forward_inputs=False)
        for block in raw_model.transformer.h:
            if dev.compile:
                block.compile(dynamic=False)
            fully_shard(block, mesh=mesh, mp_policy=precision)
        fully_shard(raw_model, mesh=mesh)
    else:
        raw_model.to(dev.device)
# a device that leaks future tokens trains to a wonderful loss, so it is asked before anything is trained
wrong = self_test(raw_model, dev)
if ranks.sum(len(wrong))[0]:
    say(f"self-test: {'; '.join(wrong) or 'failed elsewhere'}; attention is written out instead")
    raw_model.use_attention(plain_attention)
    wrong = self_test(raw_model, dev, plain_attention)
    if ranks.sum(len(wrong))[0]:
        ranks.shutdown()
        raise UserError(f"self-test on {dev.name}: {'; '.join(wrong) or 'failed elsewhere'}; this device "
                        f"computes wrong numbers: try --dtype=float32, another torch, or --device=cpu")
if fsdp:  # a forward without a backward leaves the embeddings gathered
    raw_model.reshard()
if start:
    weights = {**start["model"]}
    weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][:T]
    start_crc = zlib.crc32(weights["transformer.wte.weight"].numpy().tobytes())
    checkpoint.restore(raw_model, [], {"model": weights, "optimizers": []})
    del weights, start["model"]  # which would stay in memory beside the model
optimizers = raw_model.configure_optimizers(optimizer, weight_decay, max_lr, (beta1, beta2), dev.fused)
scaler = dev.grad_scaler()
# steps left out, so far and in a row; [loss, gradient norm] of the last SPIKE_WINDOW good ones
SPIKE_WINDOW = 128
guard = {"skipped": 0, "in_row": 0, "recent": []}


# ---- resume
def check_saved(saved):
    """Refuse a checkpoint of another run, by its plain values; say which settings are others than before."""
    was = {**saved["config"], **saved["model_config"], "data": saved["data"],
           "tokenizer": saved["tokenizer"]["sha256"]}
    now = {**config, **checkpoint.describe_model(raw_model), "data": train_stream.fingerprint,
           "tokenizer": tok.sha256}
    # with another value of these it would be another run
    fixed = [*saved["model_config"], "data", "tokenizer", "seed", "batch_tokens", "optimizer"]
    differing = [f"{key}: {was[key]} in the checkpoint, {now[key]} now"
                 for key in fixed if was[key] != now[key]]
    if differing:
        raise UserError(f"cannot --resume {log_dir}: {'; '.join(differing)}; "
                        f"use the checkpoint's values, or another --log_dir")
    if saved["step"] > max_steps:
        raise UserError(f"cannot --resume {log_dir}: its newest checkpoint is of step {saved['step']}, "
                        f"got max_steps={max_steps}; give --max_steps={saved['step']} or more")
    for key in config:  # the rest may change on purpose, but not in silence
        if key in was and key not in fixed and key != "resume" and was[key] != config[key]:
            say(f"resume: {key} was {was[key]}, is now {config[key]}")


def claim_log_dir():
    """Lock log_dir for as long as this process lives, and see that no run has appeared there meanwhile."""
    if master_process and writes:
        Path(log_dir).mkdir(parents=True, exist_ok=True)
        # a file server keeps the lock of a machine that died for a while
        lock.enter_context(locked(log_dir, "run", patience=120 if restarted else 0))
        if not exists and checkpoint.list_checkpoints(log_dir):
            raise UserError(occupied)


lock = contextlib.ExitStack()
atexit.register(lock.close)
if resume:  # a new run makes its folder later, when nothing but the first step can go wrong
    newest = [path.name for path in checkpoint.list_checkpoints(log_dir)[-1:]]
    ranks.require_equal(f"what they see in log_dir={log_dir}", {"the newest checkpoint": newest})
    ranks.on_all(claim_log_dir)
start_step, best, reached = max_steps if eval_only else 0, None, False
if resume and checkpoint.list_checkpoints(log_dir):
    saved = ranks.on_all(checkpoint.load_into, log_dir, raw_model, optimizers, check_saved)
    if saved["scaler"] and scaler.is_enabled():  # empty unless the run that saved it was in float16
        scaler.load_state_dict(saved["scaler"])
    start_step, best, guard = saved["step"], saved["best"], saved["guard"]
    if not restarted:  # by a person, who has changed something about it
        guard["in_row"] = 0
    if saved["val_data"] != [val_stream.fingerprint, n_val_windows]:
        say("resume: the validation tokens have changed; the best val loss starts anew")
        best = None
    reached = 0 < saved["train_loss"] <= target_loss
ranks.require_equal("what they train on", {
    "the step to start at": start_step, f"the train tokens in data_dir={data_dir}": train_stream.fingerprint,
    f"the val tokens in data_dir={data_dir}": val_stream.fingerprint,
    f"the weights in init_from={init_from}": start_crc})

# evaluation, sampling and saving use raw_model, in eager mode; only the training step is compiled
model = raw_model
if ddp and not fsdp:  # from here on every process has the weights of rank 0
    model = DistributedDataParallel(model, device_ids=[dev.device.index] if dev.type == "cuda" else None,
                                    gradient_as_bucket_view=True)
replica = model  # the one that averages gradients over the processes
if dev.compile and not fsdp:  # around DDP, so that it cuts the graph where gradients can be sent early
    model = torch.compile(model, dynamic=False)
loading = ThreadPoolExecutor(1, initializer=dev.use)  # reads one batch ahead
next_batch = loading.submit(fetch_batch, start_step, 0)
ranks.on_all(next_batch.result)
failures = []  # of this process; the others learn of them at the end of the step


def verify_shards():
    """Compare this process's share of the shards with the manifest's sha256."""
    for stream in {val_stream, train_stream}:
        stream.verify(rank, world_size)


def verify_in_background():
    try:
        verify_shards()
    except (UserError, OSError) as error:  # ends the run with the step it is in
        failures.append(error)


if verify_data and not built_with:
    raise UserError(f"verify_data: {data_dir} has no manifest.json to compare with; leave --verify_data out")
if verify_data:
    ranks.on_all(verify_shards)
    say(f"data: the shards in {data_dir} are those of its manifest")
elif built_with and not dry_run:
    threading.Thread(target=verify_in_background, daemon=True).start()
unigram = ranks.on_all(unigram_loss)


def read_hellaswag():
    """The examples, or None where there are none to be had: a run of days does not depend on a download."""
    if hellaswag_interval == 0 or dry_run:
        return None
    try:
        path = hellaswag.find_data(hellaswag_data, "hellaswag_data")
    except UserError as error:  # of all processes alike
        if hellaswag_data:
            ranks.shutdown()
            raise
        say(f"warning: this run has no HellaSwag scores: {error}; or type --hellaswag_interval=0")
        return None
    return ranks.on_all(hellaswag.read_examples, path, tok, "completion")


examples = read_hellaswag()


# ---- the record of the run
def git_revision():
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def open_board():
    """TensorBoard's writer; what an earlier run wrote after start_step, and is about to happen again, is
    hidden."""
    from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter(Path(log_dir, "tensorboard"), purge_step=start_step)


def open_wandb():
    """The run at Weights & Biases: a new one, or the one whose id an earlier start left in log_dir."""
    import wandb as package
    id_path = Path(log_dir, "wandb_id.txt")
    if not id_path.exists():
        write_atomically(id_path, f"{Path(log_dir).name}-{time.time_ns():x}".encode())
    try:
        run = package.init(project="gpt2", dir=log_dir, id=id_path.read_text(encoding="utf-8"),
                           resume="allow", config={**config, **provenance})
    except Exception as error:  # of the network, of the account, of the package
        raise UserError(f"wandb: {error}; type `wandb login`, set WANDB_MODE=offline, or leave --wandb out"
                        ) from error
    run.define_metric("*", step_metric="step")  # not its own counter, which never goes back
    return run


provenance = {"git": git_revision(), "torch": str(torch.__version__), "device": dev.name,
              "world_size": world_size}


def open_record():
    """(log.txt, TensorBoard, Weights & Biases) to write into, without what came after the checkpoint."""
    if not (master_process and writes):
        return None, None, None
    if not resume:
        claim_log_dir()
    for path in checkpoint.list_checkpoints(log_dir):
        if checkpoint.step_of(path) > start_step:  # newer than the newest valid one: corrupt
            path.rename(path.with_suffix(f".damaged_{time.time_ns()}"))
    lines = read_text(log_path).splitlines(keepends=True) if log_path.exists() else []
    if lines and start_step == 0:
        lines, old_log = [], Path(log_dir, f"log_before_{time.time_ns()}.txt")
        say(f"no checkpoint in {log_dir}, starting at step 0; its log is now {old_log}")
        log_path.rename(old_log)
    # what came after the checkpoint is about to happen again; half a line is left by a kill
    kept = [line for line in lines if line.endswith("\n")
            and not (line.split(" ")[0].isdigit() and int(line.split(" ")[0]) >= start_step)]
    write_atomically(log_path, "".join(kept).encode())
    if skipped_path.exists():
        kept = [record for record in read_jsonl(skipped_path, SKIPPED) if record["step"] < start_step]
        write_atomically(skipped_path, "".join(json.dumps(record) + "\n" for record in kept).encode())
    with open(runs_path, "a", encoding="utf-8") as file:
        record = {"start_step": start_step, "config": config, "data": train_stream.fingerprint, **provenance,
                  "launchers": launchers, "arguments": sys.argv[1:]}
        file.write(json.dumps(record) + "\n")
    log_file = open(log_path, "a", buffering=1, encoding="utf-8")  # a line is one write
    return log_file, open_board() if tensorboard else None, open_wandb() if wandb else None


launchers = sorted(set(filter(None, ranks.gather(ranks.launcher))))
log_file, board, wandb_run = ranks.on_all(open_record)
writer = None
if (master_process or fsdp) and writes:
    writer = checkpoint.CheckpointWriter(log_dir, keep_checkpoints, sharded=fsdp)


def log(step, **streams):
    if not log_file:
        return
    try:
        log_file.write("".join(f"{step} {stream} {value:.8g}\n" for stream, value in streams.items()))
    except OSError as error:
        failures.append(error)
    for stream, value in streams.items() if board else ():
        board.add_scalar(stream, value, step)
    if wandb_run:
        wandb_run.log({"step": step, **streams})


say(f"device: {dev.name} ({dev.device}), {str(dev.dtype).removeprefix('torch.')}, "
    f"compile {'on' if dev.compile else 'off'}, {world_size} process(es)")
say(f"model: {n_layer} layers, {n_head} heads, {n_embd} wide: {raw_model.num_params():,} parameters, "
    f"{raw_model.flops_per_token(T):,} FLOPs per token")
if not eval_only:
    say(f"data: {data_dir}: {len(train_stream):,} train tokens, "
        f"an epoch is {train_loader.steps_per_epoch:,.1f} steps; "
        f"val loss on the first {n_val_windows * T:,} of {len(val_stream):,} val tokens")
    say(f"step: {batch_tokens:,} tokens = {grad_accum_steps} micro-steps of {B} x {T} "
        f"on {world_size} process(es); {max_steps:,} steps, starting at {start_step}")
    if start_step == 0 and master_process:
        log(0, unigram=unigram)
    say(f"to beat: {math.log(tok.n_vocab):.4f} for guessing"
        + (f", {unigram:.4f} for a unigram model on the same val tokens" if master_process else ""))
for note in examples.notes if examples else ():
    say(f"HellaSwag: {note}")


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
    fallen = min(1.0, max(0.0, (step - start) / max(1, last - start)))
    height = 0.5 * (1.0 + math.cos(math.pi * fallen)) if schedule == "cosine" else 1.0 - fallen
    return min_lr + height * (max_lr - min_lr)


def too_old():
    return 0 < max_hours * 3600 <= time.monotonic() - start_time


def stop_requested():
    """Whether this process is to stop: a signal, max_hours, or a launcher that died."""
    return len(signals) + (too_old() and step > start_step) + ranks.orphaned()


def weight_bits():
    """Sum of the bits of all weights: one flipped bit changes it."""
    return sum(p.detach().view(torch.int32).sum(dtype=torch.int64) for p in raw_model.parameters()).item()


def check_weights():
    """Under ddp all processes have the same weights, to the last bit; a bad card's would part from them."""
    everyone = ranks.gather(None if fsdp else weight_bits())
    usual = Counter(everyone).most_common(1)[0][0]
    parted = [rank for rank, bits in enumerate(everyone) if bits != usual]
    if parted:
        give_up(f"at step {step} the weights of rank {', '.join(map(str, parted))} of {world_size} differ "
                f"from the others': other hardware, or a device whose memory fails")


# on a CPU compiling takes longer than it saves
eval_compiled = dev.compile and dev.type == "cuda"
eval_model = torch.compile(raw_model, dynamic=False) if eval_compiled and not fsdp else raw_model


@torch.no_grad()
def loss_of_part(n_windows):
    """[nats, tokens, bytes] of this process's part of the first windows of val."""
    token_bytes = tok.token_bytes()
    losses, n_tokens, n_bytes = [], 0, 0
    rows = B if raw_model.loss_chunk or eval_compiled else max(1, B // 4)  # eager logits take more memory
    for first in range(0, n_windows, world_size * rows):
        ids = np.arange(first + rank * rows, min(first + (rank + 1) * rows, n_windows))
        # compiled shapes are fixed; and fsdp gathers weights in every forward, so all processes take part
        width = rows if eval_compiled else max(1, len(ids))
        x, y = val_loader.read_windows(np.pad(ids, (0, width - len(ids))))
        n_tokens, n_bytes = n_tokens + y[:len(ids)].size, n_bytes + int(token_bytes[y[:len(ids)]].sum())
        y[len(ids):] = -100
        with dev.autocast(), advice_when_memory_runs_out(smaller_batch):
            losses.append(eval_model(dev.to_device(x), dev.to_device(y), reduction="sum"))
    return sum(torch.stack(losses).tolist()), n_tokens, n_bytes


def evaluate_loss(n_windows):
    """(nats per token, bits per byte) over the first windows of val, every token weighing the same."""
    raw_model.eval()
    with torch.compiler.set_stance("default" if eval_compiled else "force_eager"):
        # under fsdp the forward itself waits for all processes
        part = loss_of_part(n_windows) if fsdp else ranks.on_all(loss_of_part, n_windows)
        loss_sum, n_tokens, n_bytes = ranks.sum(*part)
    raw_model.train()
    return loss_sum / n_tokens, loss_sum / math.log(2) / n_bytes


@torch.compiler.set_stance("force_eager")
def score_hellaswag():
    """The score on all examples, the same for every batch size and number of processes."""
    with advice_when_memory_runs_out(smaller_batch):
        try:
            return hellaswag.evaluate(raw_model, examples, dev, B * T)
        except UserError as error:
            give_up(error)


def save(step, best_step, state):
    if writer:
        writer.save(step, state, best_step)


def give_up(reason):
    """Stop all processes: called by all of them, for a reason that all of them see."""
    with contextlib.suppress(UserError):  # a checkpoint that could not be written: `reason` is worse
        if writer:
            writer.wait()
    newest = checkpoint.list_checkpoints(log_dir)[-1:]
    ranks.shutdown()
    if start and step == start_step:
        report_failure(f"{reason}, before the first step: the weights of {source} are damaged; name others "
                       f"with --init_from, or try --dtype=float32")
    else:
        report_failure(f"{reason}; stopped. " + (
            f"Last good checkpoint: {newest[0]}. Continue from it with --resume and a lower --max_lr, or try "
            f"--dtype=float32" if newest else "There is no checkpoint yet; try a lower --max_lr, or float32"))
    sys.exit(1)


def layer_norms():
    """{stream: L2 norm of the gradient} of each block, and of what stands outside the blocks: the squares add
    up to that of all. Called by all processes, as fsdp's parts are summed over them."""
    trunk = raw_model.transformer
    parts = {"wte": trunk.wte, "wpe": trunk.wpe, **{f"h{i}": block for i, block in enumerate(trunk.h)},
             "ln_f": trunk.ln_f}
    grads = {name: [p.grad for p in part.parameters() if p.grad is not None] for name, part in parts.items()}
    norms = {name: torch.nn.utils.get_total_norm(some) for name, some in grads.items() if some}
    return {f"norm_{name}": (norm.full_tensor() if fsdp else norm).item() for name, norm in norms.items()}


def judge_step(loss, norm):
    """Why a step must not change the weights, or None. From numbers that all processes share."""
    if not math.isfinite(loss) or not math.isfinite(norm):
        return f"loss {loss:.4f}, gradient norm {norm:.4f}"
    if max_z_score > 0 and len(guard["recent"]) == SPIKE_WINDOW:
        for name, value, past in zip(("loss", "gradient norm"), (loss, norm), zip(*guard["recent"])):
            z = (value - np.mean(past)) / max(np.std(past), 1e-12)
            if z > max_z_score:
                return f"{name} {value:.4f}, {z:.1f} deviations above {np.mean(past):.4f}"
    return None


def data_positions(step, losses):
    """Where the worst micro-batch of each process came from: files, and the tokens at which its windows
    begin."""
    worst = int(np.argmax([math.inf if not math.isfinite(loss) else loss for loss in losses]))
    first = (worst * world_size + rank) * B
    ids = train_loader.window_ids(step)[first:first + B]
    places = [train_stream.locate(int(window) * T) for window in ids]
    return ranks.gather({"rank": rank, "micro_step": worst, "loss": str(losses[worst]),  # JSON knows no nan
                         "windows": [f"{path.name}:{token}" for path, token in places]})


@torch.compiler.set_stance("force_eager")
def print_samples(step):
    if not (master_process or fsdp):
        return
    generator = torch.Generator(dev.device).manual_seed(seed + step)
    idx = dev.to_device(np.concatenate(([tok.eot], tok.encode(prompt))).astype(np.int64))  # (T,)
    with dev.changing_shapes(), dev.autocast(), advice_when_memory_runs_out(smaller_batch):
        steps = raw_model.generate(idx.repeat(num_samples, 1), max_new_tokens, 0.9, 50, generator=generator)
        rows = torch.stack([token for token, _ in steps], dim=1).tolist()  # (num_samples, max_new_tokens)
    for row in rows:
        row = row[: row.index(tok.eot)] if tok.eot in row else row
        say(f"> {prompt}{tok.decode(row)}")


# ---- the loop
if master_process and sys.stdout.isatty() and not dry_run:
    progress = tqdm(total=max_steps, initial=start_step, unit="step", file=sys.stdout, dynamic_ncols=True)
raw_model.train()
in_loop = True
step_times, loss, stopping = [], math.inf, False
for step in range(start_step, max_steps + 1):  # one extra turn, to judge and save the final weights
    last_step = step == max_steps or reached
    stopping = stopping and not last_step
    if dry_run and step == min(2, max_steps):
        break

    # ---- evaluate: every process, fixed tokens, off the clock; whatever is saved is evaluated first
    checkpoint_due = last_step or (checkpoint_interval > 0 and step > 0 and step % checkpoint_interval == 0)
    val_due = checkpoint_due or (val_interval > 0 and step % val_interval == 0)
    evaluated = val_due and not (stopping or dry_run)
    if evaluated:
        check_weights()
        val_loss, val_bpb = evaluate_loss(n_val_windows)
        log(step, val=val_loss, val_bpb=val_bpb)
        say(f"step {step} | val loss: {val_loss:.4f} | bits per byte: {val_bpb:.4f}")
        if not math.isfinite(val_loss):
            give_up(f"val loss is {val_loss} at step {step}")
        if checkpoint_due and (best is None or val_loss < best["val_loss"]):
            best = {"step": step, "val_loss": val_loss}
    hella_due = last_step or (step > 0 and step % max(1, hellaswag_interval) == 0)
    stopping = stopping or (evaluated and ranks.sum(stop_requested())[0] > 0)
    hella_due = bool(examples) and hella_due and not stopping
    if hella_due:
        hella = score_hellaswag()
        log(step, hella=hella.acc_norm, hella_acc=hella.acc)
        say(f"step {step} | {hellaswag.format_result(examples.protocol, hella)}")
        stopping = ranks.sum(stop_requested())[0] > 0
    # no time for more, but nothing is saved that is not finite
    if stopping and not evaluated and not math.isfinite(evaluate_loss(min(world_size, n_val_windows))[0]):
        give_up(f"val loss is not finite at step {step}")
    sample_due = sample_interval > 0 and step > 0 and step % sample_interval == 0
    if sample_due and not (last_step or stopping or dry_run):
        print_samples(step) if fsdp else ranks.on_all(print_samples, step)

    # ---- checkpoint: at step s, s updates have been made
    if (checkpoint_due or stopping) and step > start_step:
        ranks.on_all(save, step, best and best["step"], {
            "step": step, "train_loss": loss, "val_loss": val_loss if evaluated else None, "best": best,
            **checkpoint.training_state(raw_model, optimizers),
            "guard": {**guard}, "scaler": scaler.state_dict(),
            "config": config, "model_config": checkpoint.describe_model(raw_model),
            "tokenizer": checkpoint.describe_tokenizer(tok), "data": train_stream.fingerprint,
            "val_data": [val_stream.fingerprint, n_val_windows], "provenance": provenance,
        })
    if last_step or stopping:
        break

    # ---- train: the only part on the clock
    graphs_before = counters["stats"]["unique_graphs"]
    dev.synchronize()
    t0 = time.perf_counter()
    lr = get_lr(step, schedule, warmup_steps, max_steps, max_lr, min_lr, decay_fraction)
    losses = []  # of this process's micro-steps
    with advice_when_memory_runs_out(smaller_batch):
        for micro_step in range(grad_accum_steps):
            last_micro_step = micro_step == grad_accum_steps - 1
            try:
                x, y = next_batch.result()
            except (UserError, OSError) as error:  # a step on the batch before, which is not counted
                failures.append(error)
            if not last_micro_step or step + 1 < max_steps:
                following = (step + 1, 0) if last_micro_step else (step, micro_step + 1)
                next_batch = loading.submit(fetch_batch, *following)
            if ddp and not fsdp:  # before the forward: there it is decided whether the backward averages
                replica.require_backward_grad_sync = last_micro_step
            # a micro-batch has the same dropout masks whichever process computes it, and after a resume
            torch.manual_seed(zlib.crc32(f"dropout {seed} {step} {micro_step * world_size + rank}".encode()))
            with dev.autocast():
                loss = model(x, y)
            scaler.scale(loss / grad_accum_steps).backward()
            losses.append(loss.detach())
        for opt in optimizers:
            scaler.unscale_(opt)
        norms_due = grad_norm_interval > 0 and step % grad_norm_interval == 0
        norms = layer_norms() if norms_due else {}  # before the clipping
        norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip or math.inf)
        norm = norm.full_tensor() if fsdp else norm
        losses = torch.stack(losses).tolist()
        # one exchange, so that all processes go on, skip or stop together; a nan of one is a nan for all
        loss, norm, n_stops, n_failed = ranks.sum(
            sum(losses) / grad_accum_steps, norm.item(), len(signals) + too_old() + ranks.orphaned(),
            len(failures) + (writer is not None and writer.failed()))
        if n_failed:  # on a process that could not read its data, or not write
            break
        loss, norm, stopping = loss / world_size, norm / world_size, n_stops > 0
        # float16 finds its loss scale by trying: a scale that was too large is no fault of the step
        scale = scaler.get_scale()
        overflow = scaler.is_enabled() and math.isfinite(loss) and not math.isfinite(norm) and scale > 1
        bad = None if overflow else judge_step(loss, norm)
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = lr
            if not bad:  # after an overflow it does nothing
                scaler.step(opt)
            opt.zero_grad(set_to_none=True)
        scaler.update()
    dev.synchronize()
    dt = time.perf_counter() - t0  # seconds

    # before the log has a step, so that the fixed model may start in this log_dir
    first = step == 0 and not start  # of a model that knows nothing yet
    if first and not bad and norm_position == "pre" and check_first_loss(loss, vocab_size, n_embd):
        ranks.shutdown()
        raise UserError(f"{check_first_loss(loss, vocab_size, n_embd)[0]}: the model does not start as GPT-2 "
                        f"does; undo what was changed in model.py, or see whether --dtype=float32 is better")

    # ---- log: reads values, changes nothing but the decisions to skip and to stop
    tok_s = batch_tokens / dt
    step_times.append(dt)
    peak = peak_tflops or dev.peak_tflops()
    mfu = raw_model.flops_per_token(T) * tok_s / (peak * 1e12 * world_size) if peak else None
    timed = {} if deterministic else {"tok_s": tok_s} if mfu is None else {"tok_s": tok_s, "mfu": mfu}
    log(step, train=loss, lr=lr, norm=norm, **norms, **timed)
    if progress is None:
        say(f"step {step} | loss: {loss:.6f} | lr: {lr:.2e} | norm: {norm:.4f} | dt: {1000 * dt:.2f}ms | "
            f"tok/sec: {tok_s:.2f} | mfu: {'n/a' if mfu is None else f'{mfu:.1%}'} | "
            f"eta: {clock((max_steps - 1 - step) * float(np.median(step_times[1:][-100:] or step_times)))}")
    else:
        progress.set_postfix_str(f"loss {loss:.4f}, lr {lr:.2e}, norm {norm:.2f}, {tok_s:,.0f} tok/s",
                                 refresh=False)
        progress.update()
    if bad:
        guard.update(skipped=guard["skipped"] + 1, in_row=guard["in_row"] + 1)
        where = data_positions(step, losses)
        worst = max(where, key=lambda place: (not math.isfinite(float(place["loss"])), float(place["loss"])))
        say(f"step {step} | skipped: {bad}; {guard['in_row']} in a row, {guard['skipped']} in all; "
            f"data: rank {worst['rank']}, micro-step {worst['micro_step']}, {worst['windows'][0]} ...")
        log(step, skipped=guard["skipped"])
        record = {"step": step, "why": bad, "lr": lr, "scale": scale, "data": where}
        try:
            with open(skipped_path if log_file else os.devnull, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            failures.append(error)
        if guard["in_row"] >= max_bad_steps:
            give_up(f"{guard['in_row']} steps in a row were skipped, the last, {step}, for its {bad}")
    elif overflow:
        say(f"step {step} | loss scale {scale:g} is too large, the weights stay; now {scaler.get_scale():g}")
    else:
        guard.update(in_row=0, recent=[*guard["recent"][1 - SPIKE_WINDOW:], [loss, norm]])
        reached = target_loss > 0 and loss <= target_loss
    graphs = counters["stats"]["unique_graphs"]
    if step > start_step and graphs > graphs_before:
        say(f"step {step} | recompiled: {graphs} graphs, {graphs_before} before")

# ---- what came of it
if progress is not None:
    progress.close()
    progress = None


def finish_writing():
    if writer:
        writer.wait()
    if failures:
        raise failures[0]


ranks.on_all(finish_writing)
if dry_run:
    peaks = [dev.peak_memory()]
    evaluate_loss(min(n_val_windows, world_size * B))
    peaks += [dev.peak_memory(), dev.total_memory()]
    needs, with_val, total = ("n/a" if size is None else f"{size / 1e9:.2f} GB" for size in peaks)
    say(f"\ndry run: training needs {needs} of the {total} of {dev.name}, with validation {with_val}; "
        f"nothing was written")
    say(f"{batch_tokens / step_times[-1]:,.0f} tok/s: {max_steps:,} steps of {batch_tokens:,} tokens take "
        f"{clock(max_steps * step_times[-1])} on {world_size} process(es), without validation")
else:
    why = (signals[0] if signals else "--max_hours" if too_old() else
           "the end of torchrun" if ranks.orphaned() else "a signal to another process")
    say(f"\n{f'stopped by {why}' if stopping else 'done'}: step {step}, "
        + ("evaluated, not trained" if eval_only else f"{step * batch_tokens:,} tokens")
        + (f", {batch_tokens / np.median(step_times):,.0f} tok/s (median step)" if step_times else "")
        + (f", peak memory {dev.peak_memory() / 1e9:.2f} GB" if step_times and dev.peak_memory() else "")
        + (f", skipped: {guard['skipped']}" if guard["skipped"] else ""))
    if not stopping:
        say(f"val loss {val_loss:.4f} nats per token ({val_bpb:.4f} bits per byte) "
            f"on {n_val_windows * T:,} tokens of {data_dir}"
            + (f"; a unigram model has {unigram:.4f}" if unigram else ""))
    newest = checkpoint.list_checkpoints(log_dir)[-1:]
    if newest and not eval_only:
        say(f"checkpoint: {newest[0]}" + ("; continue with --resume" if stopping else ""))
lock.close()
if board:
    board.close()
if wandb_run:
    wandb_run.finish()
ranks.shutdown()
ranks.exit()
