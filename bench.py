"""
Measure every speed this repository claims, each beside its baseline, in one run on one machine.

    python bench.py                                          # all of them, minutes on a CPU
    python bench.py --only=encode --input=FILE.parquet       # the tokenizer on a text of your own
    python bench.py --only=shards,bpe_train --input=FILE.parquet --max_bytes=68e6 --build_bytes=3e9 --turns=3
    python bench.py --only=train --n_layer=12 --n_head=12 --n_embd=768 --block_size=1024 --batch_size=64

Ours and the baseline take turns (A B A B ...), so that a machine whose speed drifts is unfair to neither; the
table has the median of each and the median, lowest and highest of the ratios turn by turn. Writes nothing.

encode     bpe.py, one core, against tiktoken.encode_ordinary, one thread; the ids are compared first. If
           gigatoken is installed, against it too: with an empty cache, on unseen text, on the same text again
shards     fineweb.py from parquet to shards, all cores and its start included, against a pool of workers that
           call tiktoken document by document; memory, and what sample-10BT would take
loader     tokens per second of one process reading shuffled windows; no baseline
open       seconds to open 10,000 shards of 100M tokens, memory, and a batch at a random step; no baseline
bpe_train  train_bpe.py, all cores, against tokenizers' BpeTrainer; and how well both compress
matmul     the device's matmul peak, measured: 8192^3 on a GPU, 4096^3 on a CPU; no baseline
loss       output layer and cross-entropy, forward and backward, against torch's F.linear_cross_entropy (2.13)
train      an optimizer step of config A (16M parameters), compiled, in auto dtype, against torch as it comes,
           in processes of their own: eager float32 (what nanoGPT does on a CPU), and ours' dtype and compile
           with torch's attention and loss; and what share of the measured matmul peak that is
scale      tok_s of train_gpt2.py with two processes and half the cores each, against one with all; on the CPU
startup    seconds from the start of train_gpt2.py to the end of its first step, not compiled; on the CPU
generate   new tokens with the KV cache, greedy, against a full forward pass per token, and, of 1 and 8 texts
           at a time, against transformers' generate with its cache on the same weights
hellaswag  hellaswag.py's evaluate, in float32 and in auto dtype, against a loop of one example per forward
           pass in eager float32, as build-nanogpt has it; the scores are compared first
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import tracemalloc
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from bpe import byte_order, load_tokenizer, rank_file, tokenizer_from_ranks
from configurator import Between, OneOf, PathName, UserError, configure
from documents import Chunk, Documents, available_cores
from shards import TokenStream, WindowLoader, read_manifest, write_shard
from train_bpe import count_chunks, train_ranks

only = "encode,shards,bpe_train,loader,open,train,scale,startup,generate,hellaswag"  # which to run
turns: Between(1, 10_000) = 5  # times each side is measured, after one warm-up turn
input: PathName = ""  # encode, shards, bpe_train: .txt or .parquet (column text); empty = Python's own source
max_bytes: Between(1, 10**12) = 8_000_000  # of input: the first N bytes
build_bytes: Between(1, 10**12) = 600_000_000  # shards: bytes to build from, made by perturbing the text
vocab_size: Between(257, 65_536) = 32_768  # bpe_train: ids
n_layer: Between(1, 10_000) = 4  # train, scale, startup, generate and hellaswag: the model of config A
n_head: Between(1, 10_000) = 4  # heads
n_embd: Between(1, 10**8) = 256  # width
block_size: Between(1, 2**20) = 256  # T
batch_size: Between(1, 65_536) = 16  # train, scale and startup: sequences per step
max_new_tokens: Between(1, 10**6) = 512  # generate: tokens drawn
hellaswag_data: PathName = ""  # hellaswag: a file like the public one; empty = the public one
hellaswag_examples: Between(1, 10**6) = 100  # hellaswag: examples scored, evenly spaced
device = "auto"  # auto|cpu|cuda|cuda:1|mps
dtype: OneOf("auto", "float32", "bfloat16", "float16") = "auto"  # train, hellaswag: of ours


def time_turns(runs: list, n: int) -> list[list[float]]:
    """Seconds of each of `runs`, n turns of all of them."""
    seconds = [[] for _ in runs]
    for _ in range(n + 1):
        for run, of_run in zip(runs, seconds):
            t0 = time.perf_counter()
            run()
            of_run.append(time.perf_counter() - t0)
    return [of_run[1:] for of_run in seconds]  # the first turn compiled and filled caches


def compare(ours: list[float], baseline: list[float]) -> tuple[float, float, list[float]]:
    """(median seconds of ours, of the baseline, their ratios turn by turn)."""
    return statistics.median(ours), statistics.median(baseline), [b / a for a, b in zip(ours, baseline)]


def take_turns(ours, baseline, n: int) -> tuple[float, float, list[float]]:
    return compare(*time_turns([ours, baseline], n))


def report(name: str, unit: str, amount: float, ours: float, baseline: float, ratios: list[float],
           against: str) -> None:
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}, n={len(ratios)}"
    print(f"{name:9s} | {amount / ours:12,.1f} {unit} | {amount / baseline:12,.1f} {unit} with {against} | "
          f"{statistics.median(ratios):.2f}x ({spread})", flush=True)


def read_documents() -> list[bytes]:
    """The documents to encode or train on, UTF-8, at most max_bytes of them."""
    if not input:
        paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    elif input.endswith(".parquet"):
        import pyarrow.parquet
        texts = pyarrow.parquet.read_table(input, columns=["text"])["text"].drop_null().to_pylist()
    else:
        texts = [Path(input).read_text(encoding="utf-8", errors="replace")]
    documents, left = [], max_bytes
    for document in (text.encode() for text in texts):
        documents.append(document[:left].decode(errors="ignore").encode())
        left -= len(document)
        if left <= 0:
            break
    return documents


def bench_encode() -> None:
    tok, documents = load_tokenizer(), read_documents()
    encoding, text = tok.to_tiktoken(), b"".join(documents).decode()
    if not np.array_equal(tok.encode(text), encoding.encode_ordinary(text)):
        raise RuntimeError("the ids differ from tiktoken's: a bug in bpe.py")
    buffer = np.frombuffer(text.encode(), dtype=np.uint8)
    offsets = np.array([0, len(buffer)])

    def ours():
        tok.encode_documents(buffer, offsets)

    def tiktoken():
        encoding.encode_ordinary(text)

    report("encode", "MB/s", len(buffer) / 1e6, *take_turns(ours, tiktoken, turns), "tiktoken")
    if importlib.util.find_spec("gigatoken"):
        bench_gigatoken(documents)


def hard_text(n: int, seed: int) -> list[bytes]:
    """n bytes each of long runs and of random bytes, which no cache of pieces helps with."""
    rng = np.random.default_rng(seed)
    runs = [bytes([byte]) * (n // 5 + seed) for byte in b"a -\n_"]
    noise = [rng.integers(0, 128, n // 2, np.uint8).tobytes(), rng.bytes(n // 4).decode("latin-1").encode()]
    letters = rng.integers(ord("a"), ord("z") + 1, n // 2, np.uint8).tobytes()
    return [*runs, letters, *noise]


def bench_gigatoken(documents: list[bytes]) -> None:
    """Against gigatoken, one thread each: with an empty cache, with one warmed by other text, and again."""
    import gigatoken
    half = sum(map(len, documents)) // 2
    split = next(i for i, size in enumerate(itertools.accumulate(map(len, documents)), 1) if size >= half)
    texts = {"text": (documents[:split], documents[split:]),
             "hard": (hard_text(10**6, 1), hard_text(10**6, 2))}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "r50k_base.tiktoken")  # gigatoken goes by the name
        path.write_bytes(load_tokenizer().rank_file)

        def ours():
            tok = load_tokenizer()
            tok.encode("")  # so that the tables are there
            return lambda packed, some: tok.encode_documents(*packed)

        def theirs():
            rival = gigatoken.Tokenizer.from_tiktoken(path)
            return lambda packed, some: rival.encode_batch(some, parallel=False)

        for name, (first, second) in texts.items():
            parts = [((np.frombuffer(b"".join(some), np.uint8), np.cumsum([0, *map(len, some)])), some)
                     for some in (first, second, second)]
            seconds = []  # per turn: ours and theirs, three each
            for _ in range(turns + 1):
                encoders = ours(), theirs()
                seconds.append([[time_once(encode, part) for part in parts] for encode in encoders])
            for i, state in enumerate(("empty", "unseen", "again")):
                timed = compare(*([turn[side][i] for turn in seconds[1:]] for side in (0, 1)))
                report(f"{name} {state}", "MB/s", len(parts[i][0][0]) / 1e6, *timed,
                       f"gigatoken {importlib.metadata.version('gigatoken')}")


def time_once(run, arguments: tuple) -> float:
    t0 = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - t0


def perturbed(document: bytes, rng: np.random.Generator) -> bytes:
    """A document with one in 500 of its small letters replaced by another, which makes new rare words."""
    text = np.frombuffer(document, np.uint8).copy()
    letters = np.flatnonzero((text >= ord("a")) & (text <= ord("z")))
    chosen = rng.choice(letters, len(letters) // 500) if len(letters) else letters
    text[chosen] = rng.integers(ord("a"), ord("z") + 1, len(chosen))
    return text.tobytes()


def write_parquet(path: Path, documents: list[bytes], size: int) -> int:
    """`size` bytes of text, row groups of 5 MB as FineWeb's: the documents again and again, perturbed."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    rng, total = np.random.default_rng(0), 0
    with pq.ParquetWriter(path, pa.schema([("text", pa.string())]), compression="zstd") as writer:
        while total < size:
            rows, rows_size = [], 0
            while rows_size < 5_000_000:
                rows.append(perturbed(documents[rng.integers(len(documents))], rng).decode())
                rows_size += len(rows[-1].encode())
            writer.write_table(pa.table({"text": rows}))
            total += rows_size
    return total


@functools.cache
def tiktoken_of_worker():
    return load_tokenizer().to_tiktoken()


def encode_row_group(path: str, group: int) -> list[np.ndarray]:
    """What build-nanogpt's workers do: tiktoken document by document, each to a uint16 array."""
    import pyarrow.parquet as pq
    encoding, out = tiktoken_of_worker(), []
    for text in pq.ParquetFile(path).read_row_group(group, columns=["text"])["text"].to_pylist():
        tokens = [encoding.eot_token]
        tokens.extend(encoding.encode_ordinary(text))
        out.append(np.array(tokens, dtype=np.uint16))
    return out


SAMPLE_10BT = 10e9  # tokens
# fineweb.py in a process of its own, which tells its and its workers' CPU seconds and peak memory. On Linux
# ru_maxrss includes the process that it was started from, VmHWM does not.
BUILD = """
import json, resource, sys
import fineweb
from configurator import configure
fineweb.build(**configure(vars(fineweb), sys.argv[1:]))
usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
unit = 1 if sys.platform == "darwin" else 1024
usage = [[u.ru_utime + u.ru_stime, u.ru_maxrss * unit] for u in usage]
if sys.platform == "linux":
    usage[0][1] = int(open("/proc/self/status", encoding="ascii").read().split("VmHWM:")[1].split()[0]) * 1024
print(json.dumps(usage))
"""


def bench_shards() -> None:
    import pyarrow.parquet as pq
    cores = available_cores()
    with tempfile.TemporaryDirectory() as work:
        path = Path(work, "corpus.parquet")
        size, built, numbers = write_parquet(path, read_documents(), build_bytes), [], itertools.count()
        groups = range(pq.ParquetFile(path).metadata.num_row_groups)

        def ours():
            command = [sys.executable, "-c", BUILD, f"--input={path}", f"--data_dir={work}/{next(numbers)}"]
            done = subprocess.run(command, cwd=Path(__file__).parent, check=True, stdout=subprocess.PIPE,
                                  stderr=subprocess.DEVNULL, text=True, encoding="utf-8")
            folder = Path(command[-1].partition("=")[2])
            built.append((json.loads(done.stdout.splitlines()[-1]), read_manifest(folder)["tokens"]))
            shutil.rmtree(folder)

        with ProcessPoolExecutor(cores, multiprocessing.get_context("spawn")) as pool:
            few = list(groups)[:4 * cores]  # so that its start is not timed
            list(pool.map(encode_row_group, [str(path)] * len(few), few))

            def baseline():
                encoded = pool.map(encode_row_group, [str(path)] * len(groups), groups)
                shard = Path(work, "baseline_train_000000.npy")
                write_shard(shard, *map(np.concatenate, encoded))
                shard.unlink()

            timed = take_turns(ours, baseline, turns)
    report("shards", "MB/s", size / 1e6, *timed, f"{cores} workers of tiktoken")
    tokens = int(statistics.median(count for _, count in built))
    parent, workers = (statistics.median(usage[k][0] for usage, _ in built) / tokens for k in (0, 1))
    rss = [max(usage[k][1] for usage, _ in built) / 1e6 for k in (0, 1)]
    print(f"          | {tokens / timed[0] / 1e6:.1f}M tok/s; a token takes {parent * 1e9:.1f} ns of the "
          f"parent, {workers * 1e9:.1f} of workers; peak {rss[0]:.0f} MB, {rss[1]:.0f} MB for each worker")
    for n in (8, 64):  # the parent is one process: what it does is not shared
        seconds = SAMPLE_10BT * max(parent, (workers + parent) / n)
        print(f"          | sample-10BT on {n} such cores, computed: {seconds:,.0f} s, while 28 GB come in "
              f"{28e9 / 125e6:,.0f} s at 1 Gbit/s", flush=True)


def bench_bpe_train() -> None:
    try:
        import tokenizers
        from tokenizers import models, pre_tokenizers, trainers
    except ImportError as error:
        raise UserError("bpe_train compares with the package tokenizers, which is not installed: pip install "
                        "tokenizers, or name the others with --only=...") from error
    documents = read_documents()
    texts, size = [document.decode() for document in documents], sum(map(len, documents))
    step = -(-len(documents) // 16)  # chunks of the text, to be dealt to the cores
    chunks = []
    for i in range(0, len(documents), step):
        some = documents[i:i + step]
        packed = np.frombuffer(b"".join(some), np.uint8), np.cumsum([0, *map(len, some)])
        chunks.append(Chunk(Documents, (*packed, *[()] * (len(Documents._fields) - 2))))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    made = {}

    def ours():
        made["ours"] = train_ranks(count_chunks(chunks), vocab_size)

    def theirs():
        made["tokenizers"] = tokenizers.Tokenizer(models.BPE())
        made["tokenizers"].pre_tokenizer = byte_level
        trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=byte_level.alphabet(),
                                      show_progress=False)
        made["tokenizers"].train_from_iterator(texts, trainer)

    timed = take_turns(ours, theirs, turns)
    report("bpe_train", "MB/s", size / 1e6, *timed, f"tokenizers {tokenizers.__version__}")
    tok = tokenizer_from_ranks(rank_file(made["ours"]), "ours")
    n_ours = sum(len(tok.encode_documents(*chunk.args[:2])[0]) for chunk in chunks) - len(documents)  # no EOT
    n_theirs = sum(len(encoded.ids) for encoded in made["tokenizers"].encode_batch_fast(texts))
    ids = made["tokenizers"].get_vocab()
    char_of = dict(zip(byte_order(), sorted(byte_level.alphabet())))  # tokenizers writes bytes as characters
    same = sum(ids.get(token) == rank for rank, token in enumerate(
        "".join(char_of[byte] for byte in token) for token in made["ours"]))
    print(f"          | {size / n_ours:.4f} and {size / n_theirs:.4f} bytes per token of {size:,} bytes; "
          f"{same - 256:,} of {vocab_size - 257:,} merges are the same", flush=True)


def bench_loader() -> None:
    tok = load_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        ids = np.random.default_rng(0).integers(0, tok.n_vocab, 10_000_000).astype(np.uint16)
        for i in range(5):
            write_shard(Path(folder, f"bench_train_{i:06d}.npy"), ids)
        loader = WindowLoader(TokenStream(folder, "train"), 1024, 524_288, 1337, tok.n_vocab)
        loader.batch(0, 0, 64)
        n_steps = 5
        t0 = time.perf_counter()
        for step in range(n_steps):
            for first in range(0, loader.windows_per_step, 64):
                loader.batch(step, first, 64)
        seconds = time.perf_counter() - t0
    print(f"loader    | {n_steps * 524_288 / seconds / 1e6:12,.1f} Mtok/s | "
          f"batches of 64 x 1024 from 5 shards of 10M tokens", flush=True)


def bench_open() -> None:
    """A trillion tokens, in files that are holes."""
    n_shards, shard_tokens, B, T = 10_000, 100_000_000, 64, 1024
    header = {"descr": "<u2", "fortran_order": False, "shape": (shard_tokens,)}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(n_shards):
            with open(Path(folder, f"bench_train_{i:06d}.npy"), "wb") as file:
                np.lib.format.write_array_header_1_0(file, header)
                file.truncate(file.tell() + 2 * shard_tokens)
        seconds = []
        for _ in range(turns):
            t0 = time.perf_counter()
            WindowLoader(TokenStream(folder, "train"), T, 524_288, 1337, 50_257)
            seconds.append(time.perf_counter() - t0)
        tracemalloc.start()
        loader = WindowLoader(TokenStream(folder, "train"), T, 524_288, 1337, 50_257)
        steps, memory = np.random.default_rng(0).integers(0, 10**9, 100).tolist(), []
        for step in steps:
            loader.batch(step, 0, B)
            memory.append(tracemalloc.get_traced_memory()[1] / 2**20)
        tracemalloc.stop()
        t0 = time.perf_counter()
        for step in steps:
            loader.batch(step, 0, B)
        batch = (time.perf_counter() - t0) / len(steps)
    print(f"open      | {statistics.median(seconds):12,.2f} s for {n_shards:,} shards of {shard_tokens:,} "
          f"tokens; {memory[-1]:,.1f} MiB at most in 100 batches ({memory[9]:,.1f} in 10); "
          f"{batch * 1e6:,.0f} microseconds for a batch of {B} x {T} at a random step", flush=True)


def optimizer_step(forward, model, optimizer, autocast):
    """A function that makes one step and returns its loss."""
    import torch

    def step():
        with autocast():
            loss = forward()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()  # waits for the device
    return step


def model_and_batch(config, batch_size: int, device):
    """The same model and batch for all sides."""
    import torch

    from model import GPT
    torch.manual_seed(0)
    model = GPT(config).to(device)
    x, y = torch.randint(0, config.n_vocab, (2, batch_size, config.block_size)).to(device)
    return model, x, y


def our_step(config, batch_size: int, device: str, dtype: str):
    import torch

    from device import resolve_device
    dev = resolve_device(device, dtype, compile=True)
    model, x, y = model_and_batch(config, batch_size, dev.device)
    model.loss_chunk = dev.loss_chunk
    optimizer, = model.configure_optimizers("adamw", 0.1, 1e-4, (0.9, 0.95), dev.fused)
    compiled = torch.compile(model, dynamic=False) if dev.compile else model
    return optimizer_step(lambda: compiled(x, y), model, optimizer, dev.autocast)


def plain_loss(model, idx, targets):
    """What GPT.forward computes without dropout, with torch's own attention and loss, as in nanoGPT."""
    import torch
    import torch.nn.functional as F
    (B, T), C, nh = idx.shape, model.config.n_embd, model.config.n_head
    x = model.transformer.wte(idx) + model.transformer.wpe(torch.arange(T, device=idx.device))  # (B, T, C)
    for block in model.transformer.h:
        q, k, v = block.attn.c_attn(block.ln_1(x)).split(C, dim=2)  # (B, T, C) each
        q, k, v = (part.view(B, T, nh, C // nh).transpose(1, 2) for part in (q, k, v))  # (B, nh, T, hs)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, nh, T, hs)
        x = x + block.attn.c_proj(y.transpose(1, 2).reshape(B, T, C))
        x = x + block.mlp.c_proj(F.gelu(block.mlp.c_fc(block.ln_2(x)), approximate="tanh"))
    logits = F.linear(model.transformer.ln_f(x), model.transformer.wte.weight)  # (B, T, V)
    return F.cross_entropy(logits.view(B * T, -1), targets.view(-1))


def plain_step(config, batch_size: int, device: str, dtype: str, compiled: bool):
    """torch as it comes: nothing of device.py, which also tunes the allocator."""
    import torch
    model, x, y = model_and_batch(config, batch_size, device)
    optimizer, = model.configure_optimizers("adamw", 0.1, 1e-4, (0.9, 0.95), compiled)
    loss = torch.compile(plain_loss, dynamic=False) if compiled else plain_loss
    dtype = getattr(torch, dtype)
    autocast = functools.partial(torch.autocast, x.device.type, dtype=dtype, enabled=dtype != torch.float32)
    return optimizer_step(lambda: loss(model, x, y), model, optimizer, autocast)


def serve(pipe, make, args) -> None:
    run = make(*args)
    with contextlib.suppress(EOFError):  # the other end was closed
        while pipe.recv():
            pipe.send(run())


@contextlib.contextmanager
def in_a_process(make, *args):
    """A function that calls, in a process of its own, the function that make(*args) returned there."""
    context = multiprocessing.get_context("spawn")
    pipe, end = context.Pipe()
    process = context.Process(target=serve, args=(end, make, args))
    process.start()
    end.close()

    def run():
        pipe.send(True)
        return pipe.recv()

    try:
        yield run
    finally:
        pipe.close()
        process.join()


def matmul(dev) -> tuple[int, object]:
    """(FLOPs, a function that makes them): a product of matrices large enough to reach the device's peak."""
    import torch
    n = 4096 if dev.type == "cpu" else 8192
    a, b = torch.randn(2, n, n, device=dev.device, dtype=dev.dtype)
    product = torch.empty_like(a)

    def run():
        torch.mm(a, b, out=product)
        dev.synchronize()
    return 2 * n**3, run


def bench_matmul() -> None:
    from device import resolve_device
    dev = resolve_device(device, dtype)
    flops, run = matmul(dev)
    seconds, = time_turns([run], turns)
    print(f"matmul    | {flops / statistics.median(seconds) / 1e12:12.3f} TFLOP/s in {dev.dtype}", flush=True)


def bench_loss() -> None:
    import torch
    import torch.nn.functional as F

    from device import resolve_device
    from kernels import linear_cross_entropy
    if not hasattr(F, "linear_cross_entropy"):
        print(f"loss      | torch {torch.__version__} has no F.linear_cross_entropy; 2.13 has it", flush=True)
        return
    dev = resolve_device(device, dtype)
    N, C, V = batch_size * block_size, n_embd, 50_304
    x = torch.randn(N, C, device=dev.device, dtype=dev.dtype, requires_grad=True)
    weight = torch.empty(V, C, device=dev.device, dtype=dev.dtype).normal_(std=0.02).requires_grad_()
    targets = torch.randint(V, (N,), device=dev.device)
    ours = torch.compile(linear_cross_entropy) if dev.type == "cuda" else linear_cross_entropy

    def backward(loss):
        loss.backward()
        return loss.item()  # waits for the device

    sides = [lambda: backward(ours(x, weight, targets, dev.loss_chunk)),
             lambda: backward(F.linear_cross_entropy(x, weight, targets))]
    losses = [run() for run in sides]
    report("loss", "tok/s", N, *compare(*time_turns(sides, turns)), "F.linear_cross_entropy")
    print(f"          | losses {losses[0]:.4f} and {losses[1]:.4f}", flush=True)


def bench_train() -> None:
    from device import resolve_device
    from model import GPT, GPTConfig
    dev = resolve_device(device, dtype)
    dtype_name = str(dev.dtype).removeprefix("torch.")
    config = GPTConfig(block_size=block_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    product_flops, product = matmul(dev)
    settings = config, batch_size, str(dev.device)
    with (in_a_process(our_step, *settings, dtype_name) as ours,
          in_a_process(plain_step, *settings, "float32", False) as eager,
          in_a_process(plain_step, *settings, dtype_name, True) as compiled):
        losses = [run() for run in (ours, eager, compiled)]
        if max(losses) - min(losses) > 0.01:
            raise RuntimeError(f"the three sides have losses {losses} at step 0: a bug in model.py")
        seconds = time_turns([ours, eager, compiled, product], turns)
    tokens = batch_size * block_size
    report("train", "tok/s", tokens, *compare(seconds[0], seconds[1]), "eager float32")
    report("train", "tok/s", tokens, *compare(seconds[0], seconds[2]), f"plain {dtype_name}, compiled")
    flops = GPT(config).flops_per_token(block_size) * tokens / statistics.median(seconds[0])
    matmul_flops = product_flops / statistics.median(seconds[3])
    peak = dev.peak_tflops()
    mfu = f"{flops / (peak * 1e12):.1%}" if peak else "n/a"
    print(f"          | {flops / 1e12:.3f} TFLOP/s, {flops / matmul_flops:.1%} of the measured {dtype_name} "
          f"matmul peak, {matmul_flops / 1e12:.3f}; mfu {mfu}", flush=True)


def write_random_shards(folder: str, n_tokens: int) -> None:
    tok = load_tokenizer()
    for split in ("train", "val"):
        ids = np.random.default_rng(0).integers(0, tok.n_vocab, n_tokens).astype(np.uint16)
        write_shard(Path(folder, f"bench_{split}_000000.npy"), ids)


def train_command(folder: str, log_dir: Path, processes: int, max_steps: int, compile: bool) -> list[str]:
    """train_gpt2.py on the CPU with nothing but its steps, and at the end the shortest evaluation."""
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    flags = {"data_dir": folder, "log_dir": log_dir, "device": "cpu", "compile": compile, "n_layer": n_layer,
             "n_head": n_head, "n_embd": n_embd, "block_size": block_size, "max_steps": max_steps,
             "batch_size": batch_size // processes, "batch_tokens": batch_size * block_size,
             "warmup_steps": 0, "val_interval": 0, "val_tokens": block_size, "checkpoint_interval": 0,
             "sample_interval": 0, "hellaswag_interval": 0}
    script = Path(__file__).with_name("train_gpt2.py")
    return [*launch, str(script), *(f"--{key}={value}" for key, value in flags.items())]


def bench_scale() -> None:
    cores, n_steps = available_cores(), 20
    if batch_size % 2 or cores < 2:
        print(f"scale     | left out: two processes share batch_size={batch_size} and {cores} core(s)")
        return
    numbers, seconds = itertools.count(), {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        write_random_shards(folder, 2 * n_steps * batch_size * block_size)
        for _ in range(max(1, turns // 2)):  # a turn compiles twice
            for processes in seconds:
                log_dir = Path(folder, f"log{next(numbers)}")
                subprocess.run(train_command(folder, log_dir, processes, n_steps, True), check=True,
                               stdout=subprocess.DEVNULL,
                               env={**os.environ, "OMP_NUM_THREADS": str(cores // processes)})
                lines = (log_dir / "log.txt").read_text(encoding="utf-8").splitlines()
                tok_s = [float(line.split()[2]) for line in lines if line.split()[1] == "tok_s"]
                # the first steps compiled
                seconds[processes].append(batch_size * block_size / statistics.median(tok_s[5:]))
    report("scale", "tok/s", batch_size * block_size, *compare(seconds[2], seconds[1]), "one process")


def bench_startup() -> None:
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        write_random_shards(folder, 4 * batch_size * block_size)
        for turn in range(turns + 1):
            t0, first_step = time.perf_counter(), math.nan
            with subprocess.Popen(train_command(folder, Path(folder, f"log{turn}"), 1, 1, False), text=True,
                                  stdout=subprocess.PIPE, encoding="utf-8") as process:
                for line in process.stdout:
                    if line.startswith("step 0 | loss"):
                        first_step = time.perf_counter() - t0
            if process.returncode:
                raise RuntimeError(f"train_gpt2.py ended with exit code {process.returncode}")
            seconds.append(first_step)
    seconds = seconds[1:]  # the first read the files from the disk
    print(f"startup   | {statistics.median(seconds):12,.2f} s to the end of the first step "
          f"({min(seconds):.2f} to {max(seconds):.2f}, n={len(seconds)})", flush=True)


def in_transformers(model, tok):
    """The same model in transformers, which never ends a text; None where that is not installed."""
    try:
        import transformers
    except ImportError:
        print("generate  | no comparison with transformers: pip install -r requirements-dev.txt")
        return None
    from checkpoint import describe_model, describe_tokenizer
    from convert_hf import export_hf
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        export_hf({"model": model.state_dict(), "model_config": describe_model(model),
                   "tokenizer": describe_tokenizer(tok)}, Path(folder, "hf"))
        theirs = transformers.GPT2LMHeadModel.from_pretrained(Path(folder, "hf"))
    theirs.generation_config.eos_token_id = None
    return theirs.to(model.lm_head.weight.device).eval()


def bench_generate() -> None:
    import torch

    from decoding import generate
    from device import resolve_device
    from model import GPT, GPTConfig
    dev = resolve_device(device, "float32")
    tok = load_tokenizer()
    config = GPTConfig(block_size=max_new_tokens + 1, n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    torch.manual_seed(0)
    model = GPT(config).to(dev.device).eval()
    theirs = in_transformers(model, tok)
    texts = torch.full((8, 1), tok.eot, dtype=torch.long, device=dev.device)

    def ours(B):
        steps = generate(model, texts[:B], max_new_tokens, temperature=0.0)
        tokens = torch.stack([token for token, _ in steps], dim=1)
        dev.synchronize()
        return tokens  # (B, max_new_tokens)

    def transformer(B):
        idx = theirs.generate(texts[:B], max_new_tokens=max_new_tokens, do_sample=False,
                              attention_mask=torch.ones_like(texts[:B]))
        dev.synchronize()
        return idx[:, 1:]

    @torch.no_grad()
    def full():  # logits of all columns, of which the last is used: how build-nanogpt samples
        idx = texts[:1]
        for _ in range(max_new_tokens):
            idx = torch.cat((idx, model(idx)[:, -1].argmax(dim=-1, keepdim=True)), dim=1)
        dev.synchronize()
        return idx[:, 1:]

    first = [run[:, :32] for run in (ours(1), ours(8)[:1], full(), *([transformer(1)] if theirs else []))]
    if not all(torch.equal(first[0], other) for other in first):
        raise RuntimeError("the sides continue a text differently: a bug in model.py")
    n = max(1, turns // 2)  # the full forward takes a minute or more per turn
    timed = take_turns(lambda: ours(1), full, n)
    report("generate", "tok/s", max_new_tokens, *timed, "a full forward per token")
    for B in (1, 8) if theirs else ():
        timed = take_turns(lambda B=B: ours(B), lambda B=B: transformer(B), n)
        report("generate", "tok/s", B * max_new_tokens, *timed, f"transformers, batch {B}")


def sampled_examples(path: str, n: int):
    """n examples of the file, evenly spaced, in the protocol completion."""
    from hellaswag import read_examples
    examples = read_examples(path, load_tokenizer(), "completion")
    count = len(examples.items)
    return examples._replace(items=[examples.items[i * count // n] for i in range(min(n, count))])


def model_of_sharp_opinions(config, device):
    """The same random model for all sides, its embeddings large enough for scores to differ."""
    import torch

    from model import GPT
    torch.manual_seed(0)
    model = GPT(config).eval()
    torch.nn.init.normal_(model.transformer.wte.weight, std=0.1)
    return model.to(device)


def our_hellaswag(config, path: str, n: int, device: str, dtype: str):
    from device import resolve_device
    from hellaswag import evaluate
    dev, examples = resolve_device(device, dtype), sampled_examples(path, n)
    model = model_of_sharp_opinions(config, dev.device)

    def run():
        # some eight batches at least: all 10,042 sorted by length are hardly padded, and so is a sample then
        return evaluate(model, examples, dev, min(16_384, 20 * n)).log_likelihoods
    return run


def one_by_one(config, path: str, n: int, device: str):
    """The four endings of an example as four rows padded to the longest, all logits, and then the mask."""
    import torch
    import torch.nn.functional as F
    items, model = sampled_examples(path, n).items, model_of_sharp_opinions(config, device)

    @torch.no_grad()
    def run():
        sums = []
        for example in items:
            rows = [np.concatenate((example.context, ending)) for ending in example.endings]
            tokens = np.zeros((2, len(rows), max(map(len, rows))), np.int64)
            for row, row_tokens, row_mask in zip(rows, *tokens):
                row_tokens[:len(row)], row_mask[len(example.context):len(row)] = row, 1
            tokens, mask = torch.from_numpy(tokens).to(device)
            logits = model(tokens)[:, :-1].contiguous()  # (4, T - 1, V)
            losses = F.cross_entropy(logits.view(-1, logits.size(-1)), tokens[:, 1:].reshape(-1),
                                     reduction="none").view(len(rows), -1)  # (4, T - 1)
            sums.append((losses * mask[:, 1:]).sum(dim=1).tolist())
        return -np.array(sums)
    return run


def bench_hellaswag() -> None:
    from device import resolve_device
    from hellaswag import find_data
    from model import GPTConfig
    try:
        path = str(find_data(hellaswag_data))
    except UserError as error:
        print(f"hellaswag | left out: {error}")
        return
    dev = resolve_device(device, dtype)
    dtype_name = str(dev.dtype).removeprefix("torch.")
    config = GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    settings = config, path, hellaswag_examples, str(dev.device)
    with (in_a_process(our_hellaswag, *settings, "float32") as ours,
          in_a_process(our_hellaswag, *settings, dtype_name) as in_dtype,
          in_a_process(one_by_one, *settings) as baseline):
        exact, coarse, wanted = (run() for run in (ours, in_dtype, baseline))
        if not np.allclose(exact, wanted, rtol=1e-4) or not np.allclose(coarse, wanted, rtol=1e-2):
            raise RuntimeError("the scores differ from those of one example at a time: a bug in hellaswag.py")
        seconds = time_turns([ours, in_dtype, baseline], turns)
    for of_ours, ours_dtype in ((seconds[0], "float32"), (seconds[1], dtype_name)):
        report("hellaswag", "examples/s", len(wanted), *compare(of_ours, seconds[2]),
               f"one per forward, ours in {ours_dtype}")


BENCHES = {
    "encode": bench_encode, "shards": bench_shards, "bpe_train": bench_bpe_train, "loader": bench_loader,
    "open": bench_open, "matmul": bench_matmul, "loss": bench_loss, "train": bench_train,
    "scale": bench_scale, "startup": bench_startup,
    "generate": bench_generate, "hellaswag": bench_hellaswag,
}


def main() -> None:
    names = only.split(",")
    unknown = [name for name in names if name not in BENCHES]
    if unknown:
        raise UserError(f"only={only}: unknown {', '.join(unknown)}; wanted some of {', '.join(BENCHES)}")
    import torch  # not above: the workers of `shards` import this file

    from device import resolve_device
    dev = resolve_device(device)
    print(f"{dev.name} ({dev.device}), {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"Python {platform.python_version()}")
    for name in names:
        BENCHES[name]()


if __name__ == "__main__":
    configure(globals())
    main()
