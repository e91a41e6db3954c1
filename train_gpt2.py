"""
Train GPT-2 from scratch. Everything that happens is in this file, in the order in which it happens.

    python train_gpt2.py config/demo_cpu.py                                    # a laptop: minutes
    torchrun --standalone --nproc_per_node=8 train_gpt2.py                     # 124M on 10B tokens: 8 GPUs
    python train_gpt2.py config/rtx4050_15m.py --batch_size=16 --log_dir=log_b # files and flags, later wins
    python train_gpt2.py config/demo_cpu.py --resume                           # continue after any stop
    python train_gpt2.py config/gpu_8gb.py --dry_run                           # does it fit, how long
    python train_gpt2.py config/finetune_gpt2.py --init_from=gpt2              # from OpenAI's weights
    python train_gpt2.py --eval_only --log_dir=log_demo                        # val loss of a checkpoint

Reads token shards from data_dir. Writes log_dir: log.txt, one `step stream value` per line; runs.jsonl, the
settings and versions of every start; and ckpt_*.pt. SIGTERM, Ctrl-C and --max_hours finish the step, save,
and exit with 0; a worker that torchrun restarts continues by itself. The defaults are GPT-2 small on
FineWeb-Edu: 19,073 steps of 524,288 tokens, 10.0B tokens.

The tokens of a step depend only on (seed, data, batch_tokens, block_size, step), and dropout on (seed, step,
micro-batch). So a resumed run continues as if never stopped, and with the same batch_size any number of
processes gives the same run up to rounding.
"""

import contextlib
import math
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import hellaswag
from analyze_compute import count_memory
from bpe import load_tokenizer
from configurator import Between, OneOf, PathName, UserError, configure, report_failure
from convert_hf import load_any
from decoding import sample_texts
from device import check_first_loss, resolve_device, self_test, watch_memory
from kernels import plain_attention
from model import GPT, GPTConfig
from ranks import Ranks, StopRequests
from runlog import RunLog, Screen, format_duration, provenance, source_hashes
from shards import TokenStream, WindowLoader, unigram_loss, verify_in_background

# ---- data and output
data_dir: PathName = ""  # folder of token shards; empty = edu_fineweb10B, or with eval_only the run's own
prepare = "make prepare"  # the command that builds data_dir, shown if it is missing
tokenizer: PathName = ""  # gpt2 or a rank file; empty = the rank file in data_dir, or gpt2 without one
verify_data = False  # compare the sha256 of all shards with the manifest before step 0, not beside the run
log_dir: PathName = "log"  # log.txt, runs.jsonl and checkpoints go here
resume = False  # continue the run in log_dir from its newest valid checkpoint
init_from: PathName = ""  # weights to start from, with their shape: a checkpoint, gpt2, a Hugging Face folder
eval_only = False  # val loss and HellaSwag of init_from, or log_dir's newest checkpoint; writes nothing
dry_run = False  # two steps: memory, speed, time for the whole run; writes nothing
tensorboard = False  # log to log_dir/tensorboard as well
wandb = False  # log to Weights & Biases as well; a resumed run continues there
# ---- model: GPT-2 small, 124M
n_layer: Between(1, 1024) = 12  # blocks
n_head: Between(1, 10_000) = 12  # attention heads per block
n_embd: Between(1, 2**24) = 768  # C, width of the residual stream
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
adamw_lr_scale: Between(0, 10**6) = 1.0  # muon: AdamW's learning rate as a multiple of max_lr, min_lr
weight_decay: Between(0, 100) = 0.1  # on matrices and embeddings only; GPT-3 appendix B
beta1: Between(0, 1 - 1e-9) = 0.9  # GPT-3 appendix B
beta2: Between(0, 1 - 1e-9) = 0.95  # GPT-3 appendix B
grad_clip: Between(0, 10**6) = 1.0  # global L2 norm; 0 = no clipping
max_z_score: Between(0, 10**6) = 0.0  # skip steps whose loss or norm is this many deviations high; 0 = off
max_bad_steps: Between(1, 10**9) = 10  # abort after this many consecutive skipped steps
# ---- evaluating and saving
val_interval: Between(0, 10**9) = 250  # steps between validations; 0 = only at the end
val_tokens: Between(1, 10**12) = 10_485_760  # the first N tokens of the val split; fewer if it is shorter
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
attention: OneOf("auto", "cudnn", "flash", "efficient", "math", "plain") = "auto"  # plain: written out
loss_chunk: Between(0, 2**31) = 0  # rows of logits in memory at once; 0 = the fastest, on a GPU all
compile = True  # torch.compile the training step; turned off, with a message, where it does not work
peak_tflops: Between(0, 10**6) = 0.0  # dense peak of one device, for the MFU; 0 = device.py's table, or n/a
deterministic = False  # the same log on every run on one machine: slower kernels on CUDA, no times in the log
first_loss_check = True  # stop if the first loss is not that of a new GPT-2; off for other initialisations
seed: Between(0, 2**63 - 1) = 1337  # of initial weights, data order, dropout and samples
config = configure(globals())
if max_lr < min_lr:
    raise UserError(f"max_lr={max_lr} is below min_lr={min_lr}; type --min_lr=VALUE too")
if eval_only and dry_run:
    raise UserError("--eval_only makes no step and --dry_run makes two; leave one of them out")

# ---- processes and device
ranks = Ranks()
rank, world_size, distributed = ranks.rank, ranks.world_size, ranks.many
fsdp = distributed and parallel == "fsdp"
ddp = distributed and not fsdp
if distributed and ":" in device:
    raise UserError(f"device={device} is one device for {world_size} processes; type --device=cuda")
dev = resolve_device(device, dtype, compile and not eval_only, ranks.local_rank, deterministic, attention)
if fsdp and (optimizer == "muon" or dev.dtype == torch.float16):
    raise UserError("parallel=fsdp splits the matrices that Muon needs whole, and has no loss scaling for "
                    "float16; type --parallel=ddp, or --optimizer=adamw and --dtype=bfloat16")
stop = StopRequests(ranks, max_hours)  # and SIGTERM, Ctrl-C
screen = Screen(ranks.master)
ranks.connect(dev.device)
ranks.require_equal("settings or code", {**config, **source_hashes()})

# ---- log_dir: its run is continued by --resume or by a restart of torchrun, and never overwritten
writes = not (dry_run or eval_only)
record = ranks.on_all(RunLog, log_dir, ranks.launcher, writes and ranks.master, tensorboard, wandb)
restarted, exists = ranks.any(record.restarted), ranks.any(record.exists)  # before any of them writes
record.restarted = restarted
if writes and exists and not (resume or restarted):
    ranks.fail(record.occupied)
if resume and not exists:
    screen.say(f"resume: there is no run in {log_dir} yet, starting at step 0")
resume = (resume or restarted) and exists and writes
if resume and not init_from:
    init_from = config["init_from"] = record.init_from

# ---- initial weights, if any are given: they determine the shape and the tokenizer
initial = initial_crc = heads = None
if init_from or eval_only:
    # a resumed run takes shape and tokenizer from its own checkpoint: init_from may be gone by now
    source = log_dir if not init_from or (resume and checkpoint.list_checkpoints(log_dir)) else init_from
    initial = ranks.on_all(load_any, source)
    ranks.on_all(checkpoint.check_finite, initial["model"].items(), source)
    model_config = initial["model_config"]
    heads = model_config.get("heads")
    shape = {key: model_config[key] for key in config if key in model_config and key != "dropout"}
    shape["block_size"] = min(block_size, shape["block_size"])  # positions can be left out, not invented
    screen.say("init: " + ", ".join(f"{key}={value}" for key, value in shape.items())
               + f" as in {source}, step {initial['step']}")
    config.update(shape)
    globals().update(shape)  # n_layer, n_head, n_embd, block_size, vocab_size, norm_position
    if eval_only and not data_dir:
        saved = initial.get("config", {})
        data_dir, prepare = saved.get("data_dir", ""), saved.get("prepare", prepare)
data_dir = config["data_dir"] = data_dir or "edu_fineweb10B"
B, T = batch_size, block_size

# ---- data, tokenizer, accumulation
val_stream = ranks.on_all(TokenStream, data_dir, "val", prepare)
train_stream = val_stream if eval_only else ranks.on_all(TokenStream, data_dir, "train", prepare)
tok = ranks.on_all(load_tokenizer, tokenizer) if tokenizer else None
if initial:
    named, tok = tok, ranks.on_all(checkpoint.checkpoint_tokenizer, initial)
    if named and named.sha256 != tok.sha256:
        raise UserError(f"tokenizer={tokenizer} is not {tok.name!r}, which comes with the initial weights; "
                        f"leave out --tokenizer")
tok = tok or ranks.on_all(val_stream.tokenizer)
ranks.on_all(val_stream.require_tokenizer, tok, "" if initial else "type --tokenizer=FILE of that one, or ")
config["tokenizer"] = tok.name if initial or not tokenizer else tokenizer
vocab_size = config["vocab_size"] = vocab_size or math.ceil(tok.n_vocab / 128) * 128

micro_tokens = B * T * world_size
batch_tokens = micro_tokens if eval_only else batch_tokens
grad_accum_steps, remainder = divmod(batch_tokens, micro_tokens)
if grad_accum_steps == 0 or remainder:
    below = max(1, grad_accum_steps) * micro_tokens
    raise UserError(f"batch_tokens={batch_tokens} is not a multiple of batch_size * block_size * processes "
                    f"= {B} * {T} * {world_size} = {micro_tokens}; "
                    f"try --batch_tokens={below} or {below + micro_tokens}, or another --batch_size")
train_loader = WindowLoader(train_stream, T, batch_tokens, seed, tok.n_vocab)
val_loader = WindowLoader(val_stream, T, B * T, seed, tok.n_vocab, shuffle=False)
n_val_windows = min(val_loader.n_windows, max(1, val_tokens // T))
if num_epochs > 0:
    max_steps = config["max_steps"] = math.floor(num_epochs * train_loader.steps_per_epoch)
if not eval_only and (max_steps < 1 or warmup_steps > max_steps):
    raise UserError(f"warmup_steps={warmup_steps}, max_steps={max_steps}: wanted 0 <= warmup_steps <= "
                    f"max_steps, and 1 step or more; an epoch is {train_loader.steps_per_epoch:.2f} steps")

# ---- model, optimizers
torch.manual_seed(seed)  # the same initial weights on every process and device
half = f"--batch_size={B // 2} (same tokens per step; now {B}), " if B > 1 else ""
gpt_config = GPTConfig(block_size=T, vocab_size=vocab_size, n_vocab=tok.n_vocab, n_layer=n_layer,
                       n_head=n_head, n_embd=n_embd, dropout=dropout, norm_position=norm_position,
                       heads=heads)
# fsdp computes the loss eagerly, where all logits at once would take more memory than the model
loss_rows = loss_chunk or dev.loss_chunk or (4096 if fsdp else 0)
memory = count_memory(gpt_config, B, dev.dtype.itemsize, loss_rows, activation_checkpointing, optimizer)
watch_memory(dev, 0 if eval_only or fsdp else memory.peak * world_size // ranks.nodes,
             f"{half}--loss_chunk={min(1024, max(1, B * T // 8))} or less, --activation_checkpointing, or a "
             f"smaller --block_size than {T}, --n_embd than {n_embd} or --n_layer than {n_layer}")
raw_model = GPT(gpt_config)
raw_model.activation_checkpointing = activation_checkpointing
raw_model.loss_chunk = loss_rows
if fsdp:
    raw_model.shard(init_device_mesh(dev.type, (world_size,)), dev.dtype, dev.compile)
else:
    raw_model.to(dev.device)

if attention == "plain":
    raw_model.use_attention(plain_attention)

# attention that leaks future tokens gives a deceptively low loss, so the device is tested first
failed_here = self_test(raw_model, dev, raw_model.transformer.h[0].attn.attention)
if problems := dict.fromkeys(problem for failed in ranks.gather(failed_here) for problem in failed):
    ranks.fail(f"self-test on {dev.name}: {'; '.join(problems)}; this device computes wrong numbers: type "
               f"--attention=plain, or try --dtype=float32, another torch, or --device=cpu")
if fsdp:  # a forward without a backward leaves the embeddings gathered
    raw_model.reshard()
if initial:
    weights = {**initial["model"]}
    if "transformer.wpe.weight" in weights:  # a changed model.py may have none
        weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][:T]
    initial_crc = zlib.crc32(weights["transformer.wte.weight"].numpy().tobytes())
    checkpoint.restore(raw_model, [], {"model": weights, "optimizers": []})
    initial = {"step": initial["step"]}  # let go of the weights and of their file
    del weights

# three callables of the same weights: the training step, evaluation, and raw_model to sample and save
model = raw_model
if ddp:
    model = ddp_model = DistributedDataParallel(raw_model, gradient_as_bucket_view=True,
                                                device_ids=[dev.device.index] if dev.type == "cuda" else None)
if dev.compile and not fsdp:  # around DDP, so that it cuts the graph where gradients can be sent early
    model = torch.compile(model, dynamic=False)
eval_compiled = dev.compile and dev.type == "cuda"  # on a CPU compiling takes longer than it saves
eval_model = torch.compile(raw_model, dynamic=False) if eval_compiled and not fsdp else raw_model
optimizers = raw_model.configure_optimizers(optimizer, weight_decay, max_lr, (beta1, beta2))
scaler = dev.grad_scaler()

failures = []  # errors of this process's threads; the others learn of them at the end of the step
SPIKE_WINDOW = 128  # good steps that a spike is compared with


# ---- functions: the schedule, a batch, the val loss, what is wrong with a step
def get_lr(step, schedule, warmup_steps, max_steps, max_lr, min_lr, decay_fraction):
    """Learning rate of a step: linear warm-up to max_lr at step `warmup_steps`, then down to min_lr.

    cosine: half a cosine until the last step. wsd: max_lr until the last `decay_fraction` of max_steps, then
    linear (Hu et al. 2024, "MiniCPM", section 4).
    """
    if step < warmup_steps:
        return max_lr * (step + 1) / (warmup_steps + 1)
    last = max_steps - 1
    start = warmup_steps if schedule == "cosine" else max(warmup_steps, last - decay_fraction * max_steps)
    progress = min(1.0, max(0.0, (step - start) / max(1, last - start)))
    coeff = 0.5 * (1.0 + math.cos(math.pi * progress)) if schedule == "cosine" else 1.0 - progress
    return min_lr + coeff * (max_lr - min_lr)


def due(step, interval):
    """Whether something that happens every `interval` steps, 0 = never, happens before this one."""
    return interval > 0 and step % interval == 0


def fetch_batch(step, micro_step):
    """This process's inputs and targets (B, T) of one micro-step, on their way to the device."""
    try:
        x, y = train_loader.batch(step, (micro_step * world_size + rank) * B, B)
    except (UserError, OSError) as error:
        failures.append(error)
        x = y = np.zeros((B, T), np.int64)  # for a step that will not count
    return dev.to_device(x), dev.to_device(y)


def raise_failure():
    """Raise the first error of this process's threads or of its log, if there is one."""
    for error in (*failures, record.error):
        if error:
            raise error


@torch.no_grad()
def evaluate_loss(n_windows):
    """(nats per token, bits per byte) over the first windows of val; each process evaluates its part."""
    token_bytes = tok.token_bytes()
    losses, n_tokens, n_bytes = [], 0, 0
    # training computes all logits at once in a compiled step, which takes less memory than eager code
    rows = B if raw_model.loss_chunk or eval_compiled else max(1, B // 4)
    raw_model.eval()
    for first in range(0, n_windows, world_size * rows):
        ids = np.arange(first + rank * rows, min(first + (rank + 1) * rows, n_windows))
        # a compiled model needs one shape, and fsdp every process in every forward: the padding is ignored
        width = rows if eval_compiled else max(1, len(ids))
        try:
            x, y = val_loader.read_windows(np.pad(ids, (0, width - len(ids))))
        except (UserError, OSError) as error:
            failures.append(error)
            x, y = np.zeros((2, width, T), np.int64)  # for a loss that will not count
        n_tokens, n_bytes = n_tokens + y[:len(ids)].size, n_bytes + int(token_bytes[y[:len(ids)]].sum())
        y[len(ids):] = -100  # ignored
        with dev.autocast(), torch.compiler.set_stance("default" if eval_compiled else "force_eager"):
            losses.append(eval_model(dev.to_device(x), dev.to_device(y), reduction="sum"))
    raw_model.train()
    ranks.on_all(raise_failure)
    loss_sum, n_tokens, n_bytes = ranks.sum(sum(torch.stack(losses).tolist()), n_tokens, n_bytes)
    return loss_sum / n_tokens, loss_sum / math.log(2) / n_bytes


def fault_of(loss, norm, recent, max_z_score):
    """Why a step must not change the weights, or "": its loss or gradient norm is not finite, or a spike.

    recent: [loss, norm] of good steps; a spike is more than max_z_score deviations above their mean.
    """
    if not math.isfinite(loss) or not math.isfinite(norm):
        return f"loss {loss:.4f}, gradient norm {norm:.4f}"
    if max_z_score > 0 and len(recent) == SPIKE_WINDOW:
        for name, value, past in zip(("loss", "gradient norm"), (loss, norm), zip(*recent)):
            z = (value - np.mean(past)) / max(np.std(past), 1e-12)
            if z > max_z_score:
                return f"{name} {value:.4f}, {z:.1f} deviations above {np.mean(past):.4f}"
    return ""


def give_up(reason):
    """End the run on all processes with exit code 1, naming the checkpoint to go on from."""
    with contextlib.suppress(UserError):  # a checkpoint that could not be written: `reason` is worse
        writer.wait()
    newest = checkpoint.list_checkpoints(log_dir)[-1:]
    ranks.shutdown()
    report_failure(f"{reason}. " + (f"Last good checkpoint: {newest[0]}; continue from it with --resume, a "
                                    f"lower --max_lr or --dtype=float32" if newest else
                                    "There is no checkpoint yet; try a lower --max_lr, or --dtype=float32"))
    sys.exit(1)


# ---- what every run evaluates and prints; --eval_only ends here
examples = None
if hellaswag_interval > 0 and not dry_run:
    examples = hellaswag.examples_for_training(hellaswag_data, tok, ranks)
screen.say(f"device: {dev.name} ({dev.device}), {str(dev.dtype).removeprefix('torch.')}, "
           f"compile {'on' if dev.compile else 'off'}, {world_size} process(es)")
screen.say(f"model: {n_layer} layers, {n_head} heads, {n_embd} wide: {raw_model.num_params():,} parameters, "
           f"{raw_model.flops_per_token(T):,} FLOPs per token")
for note in examples.notes if examples else ():
    screen.say(f"HellaSwag: {note}")
if eval_only:
    if verify_data:
        ranks.on_all(val_stream.verify, rank, world_size)
    val_loss, val_bpb = evaluate_loss(n_val_windows)
    screen.say(f"step {initial['step']} | val loss: {val_loss:.4f} | bits per byte: {val_bpb:.4f} | "
               f"on {n_val_windows * T:,} tokens of {data_dir}")
    if not math.isfinite(val_loss):
        ranks.fail(f"the val loss of {source} is not finite; try --dtype=float32, or an earlier checkpoint")
    if examples:
        score = hellaswag.evaluate(raw_model, examples, dev, B * T)
        screen.say(f"step {initial['step']} | {hellaswag.format_result(examples.protocol, score)}")
    ranks.shutdown()
    ranks.exit()
    sys.exit()


# ---- resume
# skipped steps, in all and in a row; [loss, gradient norm] of the last SPIKE_WINDOW good ones
guard = {"skipped": 0, "in_row": 0, "recent": []}
start_step, best, old_best, target_reached = 0, None, None, False
if resume:
    newest = [path.name for path in checkpoint.list_checkpoints(log_dir)[-1:]]
    ranks.require_equal(f"what they see in log_dir={log_dir}", {"the newest checkpoint": newest})
    ranks.on_all(record.claim)
    if newest:
        current = {**config, **checkpoint.describe_model(raw_model), "data": train_stream.fingerprint,
                   "tokenizer": tok.sha256}
        saved = ranks.on_all(checkpoint.load_into, log_dir, raw_model, optimizers,
                             lambda saved: checkpoint.require_same_run(current, saved))
        start_step, best, guard = saved["step"], saved["best"], saved["guard"]
        for line in (f"{log_dir}/ckpt_{start_step:07d}.pt", *checkpoint.changed_settings(saved, current)):
            screen.say(f"resume: {line}")
        if saved["scaler"] and scaler.is_enabled():  # empty unless the run that saved it was in float16
            scaler.load_state_dict(saved["scaler"])
        if not restarted:  # by a person, who has changed something about it
            guard["in_row"] = 0
        if saved["val_data"] != [val_stream.fingerprint, n_val_windows]:
            screen.say("resume: the validation tokens have changed; the best val loss starts anew"
                       + (f", and step {best['step']} is kept until the next start" if best else ""))
            best, old_best = None, best
        target_reached = target_loss > 0 and saved["train_loss"] <= target_loss
ranks.require_equal("what they train on", {
    "the step to start at": start_step, f"the train tokens in data_dir={data_dir}": train_stream.fingerprint,
    f"the val tokens in data_dir={data_dir}": val_stream.fingerprint,
    f"the weights in init_from={init_from}": initial_crc})


# ---- the last checks, then the first writes
loading = ThreadPoolExecutor(1, initializer=dev.use)  # reads one batch ahead
next_batch = loading.submit(fetch_batch, start_step, 0)
next_batch.result()
if verify_data or (val_stream.manifest and not dry_run):  # this process's share of the shards
    verifying = verify_in_background((val_stream, train_stream), rank, world_size, failures)
    if verify_data:
        verifying.join()
ranks.on_all(raise_failure)
unigram = ranks.on_all(unigram_loss, train_loader, val_loader, n_val_windows)
versions = provenance(dev.name, world_size)
launchers = sorted(set(filter(None, ranks.gather(ranks.launcher))))
ranks.on_all(record.open, start_step, config,
             {"data": train_stream.fingerprint, **versions, "launchers": launchers})
writer = checkpoint.CheckpointWriter(log_dir, keep_checkpoints, ranks.master, old_best and old_best["step"])

screen.say(f"data: {data_dir}: {len(train_stream):,} train tokens, an epoch is "
           f"{train_loader.steps_per_epoch:,.1f} steps; "
           f"val loss on the first {n_val_windows * T:,} of {len(val_stream):,} val tokens")
screen.say(f"step: {batch_tokens:,} tokens = {grad_accum_steps} micro-steps of {B} x {T} "
           f"on {world_size} process(es); {max_steps:,} steps, starting at {start_step}")
screen.say(f"to beat: {math.log(tok.n_vocab):.4f} for guessing, {unigram:.4f} for a unigram model on the "
           f"same val tokens")
if start_step == 0:
    record.log(0, unigram=unigram)
if dev.compile:
    screen.say("the first step compiles, once: about a minute")
if dry_run:  # two real steps, and one batch of validation
    n_val_windows = min(n_val_windows, world_size * B)
    val_interval = checkpoint_interval = sample_interval = 0
end_step = min(2, max_steps) if dry_run else max_steps

# ---- the loop
screen.open_bar(start_step, end_step)
raw_model.train()
flops_per_token, peak = raw_model.flops_per_token(T), peak_tflops or dev.peak_tflops()
step_times, loss, stopping = [], math.inf, False
for step in range(start_step, end_step + 1):  # one extra turn, to evaluate and save the final weights
    last_step = step == end_step or target_reached
    stopping = stopping and not last_step  # then it is finished, not stopped
    stop.step = step  # for its message

    # ---- evaluate: every process, fixed tokens, off the clock; whatever is saved is evaluated first
    checkpoint_due = last_step or (step > 0 and due(step, checkpoint_interval))
    evaluated = (checkpoint_due or due(step, val_interval)) and not stopping
    if evaluated:
        if different := ranks.differing(None if fsdp else raw_model.weight_bits()):
            give_up(f"at step {step} the weights of {different} of {world_size} differ from the others': "
                    f"other hardware, or a device whose memory fails")
        val_loss, val_bpb = evaluate_loss(n_val_windows)
        record.log(step, val=val_loss, val_bpb=val_bpb)
        screen.say(f"step {step} | val loss: {val_loss:.4f} | bits per byte: {val_bpb:.4f}")
        if not math.isfinite(val_loss):
            give_up(f"val loss is {val_loss} at step {step}")
        stopping = not last_step and ranks.any(stop.reason(first=step == start_step))
    if examples and not stopping and (last_step or (step > 0 and due(step, hellaswag_interval))):
        try:
            score = hellaswag.evaluate(raw_model, examples, dev, B * T)
        except UserError as error:  # on all processes alike
            give_up(error)
        record.log(step, hella=score.acc_norm, hella_acc=score.acc)
        screen.say(f"step {step} | {hellaswag.format_result(examples.protocol, score)}")
        stopping = not last_step and ranks.any(stop.reason(first=step == start_step))
    if stopping and not evaluated:  # no time for more, but weights that are not finite are never saved
        if not math.isfinite(evaluate_loss(min(world_size, n_val_windows))[0]):
            give_up(f"val loss is not finite at step {step}")
    if step > 0 and due(step, sample_interval) and not (last_step or stopping):
        for text in ranks.on_all(sample_texts, raw_model, tok, dev, prompt, num_samples, max_new_tokens,
                                 seed + step):
            screen.say(f"> {text}")

    # ---- checkpoint: at step s, s updates have been made
    if evaluated and step > 0 and (checkpoint_due or stopping) and (not best or val_loss < best["val_loss"]):
        best = {"step": step, "val_loss": val_loss}
    if writes and (checkpoint_due or stopping) and step > start_step:
        ranks.on_all(writer.wait)  # for the previous one
        writer.save(step, {
            "step": step, "train_loss": loss, "val_loss": val_loss if evaluated else None, "best": best,
            **checkpoint.training_state(raw_model, optimizers), "guard": guard,
            "scaler": scaler.state_dict(), "config": config,
            "model_config": checkpoint.describe_model(raw_model),
            "tokenizer": checkpoint.describe_tokenizer(tok), "data": train_stream.fingerprint,
            "val_data": [val_stream.fingerprint, n_val_windows], "provenance": versions,
        }, best and best["step"])
    if last_step or stopping:
        break

    # ---- train: the only part on the clock
    graphs_before = counters["stats"]["unique_graphs"]
    dev.synchronize()
    t0 = time.perf_counter()
    lr = get_lr(step, schedule, warmup_steps, max_steps, max_lr, min_lr, decay_fraction)
    micro_losses = []
    for micro_step in range(grad_accum_steps):
        x, y = next_batch.result()
        last_micro_step = micro_step == grad_accum_steps - 1
        next_index = (step + 1, 0) if last_micro_step else (step, micro_step + 1)
        next_batch = loading.submit(fetch_batch, *next_index)
        if ddp:  # read in the forward: average gradients over the processes after the last micro-step only
            ddp_model.require_backward_grad_sync = last_micro_step
        # a micro-batch has the same dropout masks whichever process computes it, and after a resume
        torch.manual_seed(zlib.crc32(f"dropout {seed} {step} {micro_step * world_size + rank}".encode()))
        with dev.autocast():
            micro_loss = model(x, y)
        scaler.scale(micro_loss / grad_accum_steps).backward()
        micro_losses.append(micro_loss.detach())
    for opt in optimizers:
        scaler.unscale_(opt)
    norms = raw_model.grad_norms() if due(step, grad_norm_interval) else {}  # before the clipping
    norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip or math.inf)
    norm = norm.full_tensor() if fsdp else norm
    micro_losses = torch.stack(micro_losses).tolist()
    # one all-reduce, so that all processes take the same decision; a nan on one is a nan on all
    loss_sum, norm_sum, n_stops, n_failed = ranks.sum(
        sum(micro_losses) / grad_accum_steps, norm.item(), bool(stop.reason()),
        len(failures) + bool(record.error) + writer.failed())
    if n_failed:  # on a process that could not read its data, or could not write
        break
    loss, norm, stopping = loss_sum / world_size, norm_sum / world_size, n_stops > 0

    # ---- is the step good? before the log has a step, a corrected model can still start in this log_dir
    if first_loss_check and step == 0 and not initial and norm_position == "pre" and math.isfinite(loss):
        if problem := check_first_loss(loss, vocab_size, n_embd):
            ranks.fail(f"{problem}: the model does not start as GPT-2 does; look at what was changed in "
                       f"model.py, try --dtype=float32, or if it is on purpose, --first_loss_check=false")
    # float16: gradients that overflow mean that the loss scale is too large; the scaler lowers it
    scale = scaler.get_scale()
    overflow = scaler.is_enabled() and math.isfinite(loss) and not math.isfinite(norm) and scale > 1
    fault = "" if overflow else fault_of(loss, norm, guard["recent"], max_z_score)
    for opt in optimizers:
        scaled = optimizer == "muon" and opt is optimizers[0]  # its AdamW
        for group in opt.param_groups:
            group["lr"] = lr * adamw_lr_scale if scaled else lr
        if not fault and not overflow:
            scaler.step(opt)
        opt.zero_grad(set_to_none=True)
    scaler.update()
    dev.synchronize()
    dt = time.perf_counter() - t0  # seconds

    # ---- log
    step_times.append(dt)
    train_memory = dev.peak_memory()
    tok_s = batch_tokens / dt
    mfu = flops_per_token * tok_s / (peak * 1e12 * world_size) if peak else None
    speed = {"tok_s": tok_s} | ({"mfu": mfu} if mfu else {})
    record.log(step, train=loss, lr=lr, norm=norm, **norms, **({} if deterministic else speed))
    median = float(np.median(step_times[1:][-100:] or step_times))  # the first step compiles
    screen.show_step(step, loss, lr, norm, dt, tok_s, mfu, (max_steps - 1 - step) * median)
    if overflow:
        screen.say(f"step {step} | loss scale {scale:g} is too large, the weights stay; now "
                   f"{scaler.get_scale():g}")
    elif fault:
        guard.update(skipped=guard["skipped"] + 1, in_row=guard["in_row"] + 1)
        # the micro-batch with the highest loss, or nan, and where it came from
        losses = np.nan_to_num(ranks.gather(micro_losses), nan=math.inf)  # (world_size, grad_accum_steps)
        its_rank, its_step = np.unravel_index(losses.argmax(), losses.shape)
        window = int(train_loader.window_ids(step)[(its_step * world_size + its_rank) * B])
        path, token = train_stream.locate(window * T)
        screen.say(f"step {step} | skipped: {fault}; {guard['in_row']} in a row, {guard['skipped']} in all; "
                   f"highest loss: rank {its_rank}, micro-step {its_step}, {path.name}:{token} ...")
        record.log(step, skipped=guard["skipped"], skipped_window=window)
        if guard["in_row"] >= max_bad_steps:
            give_up(f"{guard['in_row']} steps in a row were skipped, the last, {step}, for its {fault}")
    else:
        guard.update(in_row=0, recent=[*guard["recent"], [loss, norm]][-SPIKE_WINDOW:])
        target_reached = target_loss > 0 and loss <= target_loss
    graphs = counters["stats"]["unique_graphs"]
    if step > start_step and graphs > graphs_before:
        screen.say(f"step {step} | recompiled: {graphs} graphs, {graphs_before} before")

# ---- summary
screen.close_bar()
ranks.on_all(writer.wait)
ranks.on_all(raise_failure)
if dry_run:
    needs, with_val, total = ("n/a" if size is None else f"{size / 1e9:.2f} GB" for size in (
        train_memory, dev.peak_memory(), dev.total_memory()))
    screen.say(f"\ndry run: training needs {needs} of the {total} of {dev.name}, with validation {with_val}; "
               f"nothing was written")
    screen.say(f"{tok_s:,.0f} tok/s: {max_steps:,} steps of {batch_tokens:,} tokens take "
               f"{format_duration(max_steps * dt)} on {world_size} process(es), without validation")
else:
    why = stop.reason() or "a signal to another process"
    screen.say(f"\n{f'stopped by {why}' if stopping else 'done'}: step {step}, {step * batch_tokens:,} tokens"
               + (f", {batch_tokens / np.median(step_times):,.0f} tok/s (median step)" if step_times else "")
               + (f", peak memory {train_memory / 1e9:.2f} GB" if step_times and train_memory else "")
               + (f", skipped: {guard['skipped']}" if guard["skipped"] else ""))
    if not stopping:
        screen.say(f"val loss {val_loss:.4f} nats per token, {val_bpb:.4f} bits per byte, on "
                   f"{n_val_windows * T:,} tokens of {data_dir}; a unigram model has {unigram:.4f}, "
                   f"{unigram * val_bpb / val_loss:.4f}")
    for path in checkpoint.list_checkpoints(log_dir)[-1:]:
        screen.say(f"checkpoint: {path}" + ("; continue with --resume" if stopping else ""))
    if best:
        screen.say(f"best: step {best['step']}, val loss {best['val_loss']:.4f}: --checkpoint={log_dir}:best")
record.close()
ranks.shutdown()
ranks.exit()
