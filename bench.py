"""
Measure every speed in section "Speed" of RESULTS.md beside its baseline, in one run on one machine.

    python bench.py                                          # all of them
    python bench.py --only=encode --input=FILE.parquet       # the tokenizer on your own text
    python bench.py --only=shards,bpe_train --input=FILE.parquet --max_bytes=68e6 --build_bytes=3e9
    python bench.py --only=train --n_layer=12 --n_head=12 --n_embd=768 --block_size=1024 --batch_size=64

Ours and its baselines take turns (A B A B ...), so that a machine whose speed drifts is fair to both. The
first turn warms up; it also checks that the sides compute the same, except in shards and scale and against
gigatoken. Prints a line per baseline: median speed of ours and of the baseline, then median, lowest and
highest of the ratio in each turn. Leaves no files behind.

encode     bpe.py on one core, against tiktoken.encode_ordinary on one thread; and against gigatoken, where
           it is installed, on unseen text with a warm cache
shards     fineweb.py from parquet to shards, its start included, against a pool of workers that call
           tiktoken for each document
bpe_train  train_bpe.py, all cores, against the BpeTrainer of tokenizers
loader     one process that reads shuffled windows, and the growth of its resident memory; no baseline
train      an optimizer step of config A (16M parameters), compiled, in the auto dtype, against stock torch:
           eager float32 (what nanoGPT does on a CPU), and autocast to our dtype with torch.compile
scale      train_gpt2.py on the CPU: two processes with half the cores each, against one with all
generate   new tokens with the KV cache, greedy, against a full forward pass per token, and against
           generate of transformers on the same weights; then eight texts at a time
hellaswag  hellaswag.py in the auto dtype against one example per forward pass in eager float32, as in
           build-nanogpt
matmul     peak of matrix products: 8192^3 on a GPU, 4096^3 on a CPU; also part of train
"""

import contextlib
import functools
import importlib.util
import itertools
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tiktoken
import torch
import torch.nn.functional as F

import hellaswag
from bpe import byte_order, load_tokenizer
from configurator import Between, OneOf, PathName, UserError, configure
from decoding import generate
from device import resolve_device
from documents import Chunk, Documents, available_cores, input_source, python_source
from model import GPT, GPTConfig
from ranks import Ranks
from shards import TokenStream, WindowLoader, write_shard
from train_bpe import count_chunks, train_ranks

only = "encode,shards,bpe_train,loader,train,scale,generate,hellaswag"  # which to run; also: matmul
turns: Between(1, 10_000) = 3  # timed turns after the warm-up
input: PathName = ""  # encode, shards, bpe_train: text, as for fineweb.py; empty = Python's own source
max_bytes: Between(1, 10**12) = 8_000_000  # of input: the first N bytes
build_bytes: Between(1, 10**12) = 600_000_000  # shards: bytes to build from, made by perturbing the text
vocab_size: Between(257, 65_536) = 32_768  # bpe_train: ids
n_layer: Between(1, 10_000) = 4  # the model: config A's
n_head: Between(1, 10_000) = 4  # heads
n_embd: Between(1, 10**8) = 256  # width
block_size: Between(1, 2**20) = 256  # T
batch_size: Between(1, 65_536) = 16  # train, scale: sequences per step
max_new_tokens: Between(1, 10**6) = 512  # generate: tokens per text
hellaswag_data: PathName = ""  # hellaswag: a file like the public one; empty = the public one
hellaswag_examples: Between(1, 10**6) = 100  # hellaswag: examples scored, evenly spaced
device = "auto"  # auto|cpu|cuda|cuda:1|mps
dtype: OneOf("auto", "float32", "bfloat16", "float16") = "auto"  # train, hellaswag: of ours


# ---- turns and processes -------------------------------------------------------


class Seconds(float):
    """What a side returns if only a part of its time counts."""


def measure(name: str, unit: str, amount: float, sides: dict, agree=None) -> float:
    """Run `sides` {label: function}, of which the first is ours, in turns, and print a line per baseline.

    A turn of a side does `amount` units. `agree` takes what the sides returned in the first turn, and says
    whether they computed the same. Returns our median speed in units per second.
    """
    seconds = []
    for turn in range(1 + turns):
        results, times = [], []
        for side in sides.values():
            t0 = time.perf_counter()
            results.append(side())
            elapsed = time.perf_counter() - t0
            times.append(results[-1] if isinstance(results[-1], Seconds) else elapsed)
        if turn == 0 and agree and not agree(results):
            raise RuntimeError(f"{name}: {' and '.join(sides)} do not compute the same")
        seconds.append(times)
    seconds = np.array(seconds[1:])  # (turns, sides); the first turn compiled and filled caches
    speeds = amount / np.median(seconds, axis=0)  # (sides,)
    texts = [f"{speed:,.{1 if speed >= 10 else 3}f} {unit}" for speed in speeds]
    for i, label in list(enumerate(sides))[1:]:
        ratios = seconds[:, i] / seconds[:, 0]
        print(f"{name:9s} | {texts[0]:>20} | {texts[i]:>20} with {label} | {np.median(ratios):.2f}x "
              f"({ratios.min():.2f} to {ratios.max():.2f}, n={len(ratios)})", flush=True)
    if len(sides) == 1:
        print(f"{name:9s} | {texts[0]:>20} | {', '.join(sides)}, n={len(seconds)}", flush=True)
    return float(speeds[0])


@contextlib.contextmanager
def in_a_process(make, *args):
    """A function that calls, in a process of its own, the function that make(*args) returned there."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), start_side, (make, *args)) as pool:
        yield lambda: pool.submit(run_side).result()


SIDE = []  # the function of this process


def start_side(make, *args):
    SIDE.append(make(*args))


def run_side():
    return SIDE[0]()


def run_python(*command, **environment: str) -> None:
    """Run a script of this folder and discard its output, unless it fails."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=Path(__file__).parent, text=True,
                          capture_output=True, env={**os.environ, **environment}, encoding="utf-8")
    if done.returncode:
        raise RuntimeError(f"{command} failed:\n{done.stderr[-4000:]}")


# ---- text and tokens -----------------------------------------------------------


def read_documents() -> list[bytes]:
    """The documents to encode or train on, UTF-8, at most max_bytes of them."""
    source, documents, left = input_source(input, "text", 0) if input else python_source(0), [], max_bytes
    for _, chunk in source.chunks():
        text, offsets, *_ = chunk.read(*chunk.args)
        for start, end in itertools.pairwise(offsets.tolist()):
            documents.append(text[start:min(end, start + left)].tobytes().decode(errors="ignore").encode())
            left -= end - start
            if left <= 0:
                return documents
    return documents


def pack(documents: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Documents as Tokenizer.encode_documents takes them: (text, offsets)."""
    return np.frombuffer(b"".join(documents), np.uint8), np.cumsum([0, *map(len, documents)])


def bench_encode() -> None:
    tok, documents = load_tokenizer(), read_documents()
    encoding, text = tiktoken.get_encoding("r50k_base"), b"".join(documents).decode()
    measure("encode", "MB/s", sum(map(len, documents)) / 1e6,
            {"ours": lambda: tok.encode(text), "tiktoken": lambda: encoding.encode_ordinary(text)},
            agree=lambda ids: np.array_equal(*ids))
    if not importlib.util.find_spec("gigatoken"):
        return
    import gigatoken
    middle = len(documents) // 2
    first, second = documents[:middle], documents[middle:]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "r50k_base.tiktoken")  # gigatoken recognizes the name
        path.write_bytes(tok.rank_file)

        def ours():
            tok = load_tokenizer()
            tok.encode_documents(*pack(first))
            return seconds_of(tok.encode_documents, *pack(second))

        def theirs():
            rival = gigatoken.Tokenizer.from_tiktoken(path)
            rival.encode_batch(first, parallel=False)
            return seconds_of(rival.encode_batch, second, parallel=False)

        measure("unseen", "MB/s", sum(map(len, second)) / 1e6, {"ours": ours, "gigatoken": theirs})


def seconds_of(function, *args, **kwargs) -> Seconds:
    t0 = time.perf_counter()
    function(*args, **kwargs)
    return Seconds(time.perf_counter() - t0)


def write_parquet(path: Path, documents: list[bytes], size: int) -> int:
    """Copies of the documents, in row groups of about 5 MB like FineWeb's, until they have `size` bytes; each
    copy replaces one in 500 letters, which makes new rare words. Returns the bytes written."""
    rng, (text, offsets) = np.random.default_rng(0), pack(documents)
    letters = np.flatnonzero((text >= ord("a")) & (text <= ord("z")))
    n_copies, group = -(-size // len(text)), max(1, len(documents) * 5_000_000 // len(text))
    with pq.ParquetWriter(path, pa.schema([("text", pa.string())]), compression="zstd") as writer:
        for _ in range(n_copies):
            copy, chosen = text.copy(), rng.choice(letters, len(letters) // 500)
            copy[chosen] = rng.integers(ord("a"), ord("z") + 1, len(chosen))
            rows = [copy[a:b].tobytes().decode() for a, b in itertools.pairwise(offsets)]
            writer.write_table(pa.table({"text": rows}), row_group_size=group)
    return n_copies * len(text)


def encode_row_group(path: str, group: int) -> list[np.ndarray]:
    """What build-nanogpt's workers do: tiktoken for each document, then a uint16 array."""
    encoding, arrays = tiktoken.get_encoding("r50k_base"), []  # which tiktoken keeps
    for text in pq.ParquetFile(path).read_row_group(group, columns=["text"])["text"].to_pylist():
        tokens = [encoding.eot_token]
        tokens.extend(encoding.encode_ordinary(text))
        arrays.append(np.array(tokens, dtype=np.uint16))
    return arrays


def bench_shards() -> None:
    cores = available_cores()
    with (tempfile.TemporaryDirectory() as work,
          ProcessPoolExecutor(cores, multiprocessing.get_context("spawn")) as pool):
        path, shard = Path(work, "corpus.parquet"), Path(work, "baseline_train_000000.npy")
        size = write_parquet(path, read_documents(), build_bytes)
        groups = range(pq.ParquetFile(path).metadata.num_row_groups)

        def ours():
            run_python("fineweb.py", f"--input={path}", f"--data_dir={work}/shards", "--val_fraction=0")
            shutil.rmtree(f"{work}/shards")

        def baseline():
            encoded = pool.map(encode_row_group, [str(path)] * len(groups), groups)
            write_shard(shard, *map(np.concatenate, encoded))
            shard.unlink()

        measure("shards", "MB/s", size / 1e6, {"ours": ours, f"{cores} workers of tiktoken": baseline})


def bench_bpe_train() -> None:
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers
    documents = read_documents()
    texts = [document.decode() for document in documents]
    step = -(-len(documents) // 16)  # 16 chunks, shared by the cores
    parts = [documents[i:i + step] for i in range(0, len(documents), step)]
    chunks = [Chunk(Documents, (*pack(part), np.zeros(len(part), bool), 0, [])) for part in parts]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    char_of = dict(zip(byte_order(), sorted(byte_level.alphabet())))  # tokenizers writes bytes as characters

    def theirs():
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = byte_level
        tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
            vocab_size=vocab_size - 1, initial_alphabet=byte_level.alphabet(), show_progress=False))
        return tokenizer.get_vocab()

    def same_merges(results):
        ranks, ids = results
        return all(ids["".join(map(char_of.get, token))] == rank for rank, token in enumerate(ranks))

    measure("bpe_train", "MB/s", sum(map(len, documents)) / 1e6,
            {"ours": lambda: train_ranks(count_chunks(chunks), vocab_size),
             f"tokenizers {tokenizers.__version__}": theirs}, agree=same_merges)


def write_random_shard(folder: str, name: str, n_tokens: int) -> None:
    ids = np.random.default_rng(0).integers(0, 50_257, n_tokens).astype(np.uint16)
    write_shard(Path(folder, f"{name}.npy"), ids)


def bench_loader() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for i in range(5):
            write_random_shard(folder, f"bench_train_{i:06d}", 10_000_000)
        loader, n_steps, memory = WindowLoader(TokenStream(folder, "train"), 1024, 2**19, 1337, 50_257), 5, []

        def read():
            for step in range(n_steps):
                for first in range(0, loader.windows_per_step, 64):
                    loader.batch(step, first, 64)
            with contextlib.suppress(FileNotFoundError):  # Linux only
                memory.append(int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]))

        measure("loader", "Mtok/s", n_steps * 2**19 / 1e6, {"batches of 64 x 1024": read})
    if memory:
        growth = (memory[-1] - memory[0]) * os.sysconf("SC_PAGE_SIZE") / 2**20
        print(f"          | resident memory grew by {growth:.1f} MiB after the warm-up", flush=True)


# ---- models --------------------------------------------------------------------


def random_model(config, device):
    """The same model for all sides, in eval mode, with embeddings so large that its predictions differ."""
    torch.manual_seed(0)
    model = GPT(config).eval()
    torch.nn.init.normal_(model.transformer.wte.weight, std=0.1)
    return model.to(device)


def bench_matmul() -> float:
    """Returns TFLOP/s."""
    dev = resolve_device(device, dtype)
    n = 4096 if dev.type == "cpu" else 8192
    a, b = torch.randn(2, n, n, device=dev.device, dtype=dev.dtype)
    product = torch.empty_like(a)
    repeats = 1 if dev.type == "cpu" else 100  # a GPU's clock changes with its load

    def multiply():
        for _ in range(repeats):
            torch.mm(a, b, out=product)
        dev.synchronize()

    return measure("matmul", "TFLOP/s", repeats * 2 * n**3 / 1e12, {f"{dev.dtype}": multiply})


def optimizer_step(model, forward, batch_size: int, fused: bool, autocast):
    """A function that makes one step, always on the same batch, and returns its loss, forward(x, y)."""
    optimizer, = model.train().configure_optimizers("adamw", 0.1, 1e-4, (0.9, 0.95), fused)
    x, y = torch.randint(model.config.n_vocab, (2, batch_size, model.config.block_size),
                         generator=torch.Generator().manual_seed(1)).to(model.lm_head.weight.device)

    def step():
        with autocast():
            loss = forward(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()  # waits for the device
    return step


def our_step(config, batch_size: int, device: str, dtype: str):
    dev = resolve_device(device, dtype, compile=True)
    model = random_model(config, dev.device)
    model.loss_chunk = dev.loss_chunk
    forward = torch.compile(model, dynamic=False) if dev.compile else model
    return optimizer_step(model, forward, batch_size, True, dev.autocast)


def stock_loss(model, idx, targets):
    """What GPT.forward computes, with torch's own attention and loss, as in nanoGPT."""
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


def stock_step(config, batch_size: int, device: str, dtype: torch.dtype, compile: bool):
    """Without device.py, which also tunes the allocator."""
    model = random_model(config, device)
    loss = torch.compile(stock_loss, dynamic=False) if compile else stock_loss
    autocast = functools.partial(torch.autocast, torch.device(device).type, dtype=dtype,
                                 enabled=dtype != torch.float32)
    return optimizer_step(model, functools.partial(loss, model), batch_size, compile, autocast)


def bench_train() -> None:
    dev = resolve_device(device, dtype)
    config = GPTConfig(block_size=block_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    settings = config, batch_size, str(dev.device)
    with (in_a_process(our_step, *settings, dtype) as ours,
          in_a_process(stock_step, *settings, torch.float32, False) as eager,
          in_a_process(stock_step, *settings, dev.dtype, True) as compiled):
        tok_s = measure("train", "tok/s", batch_size * block_size,
                        {"ours": ours, "eager float32": eager, f"compiled {dev.dtype}": compiled},
                        agree=lambda losses: max(losses) - min(losses) < 0.02)
    tflops, matmul_tflops = GPT(config).flops_per_token(block_size) * tok_s / 1e12, bench_matmul()
    peak = dev.peak_tflops()
    print(f"          | {tflops:.3f} TFLOP/s are {tflops / matmul_tflops:.1%} of the measured matmul peak, "
          f"mfu {f'{tflops / peak:.1%}' if peak else 'n/a'}", flush=True)


def bench_scale() -> None:
    cores, n_steps, tokens = available_cores(), 20, batch_size * block_size
    if batch_size % 2 or cores < 2:
        raise UserError(f"scale needs two cores and an even batch_size; here are {cores} and {batch_size}; "
                        f"leave it out with --only=...")
    with tempfile.TemporaryDirectory() as folder:
        for split in ("train", "val"):
            write_random_shard(folder, f"bench_{split}_000000", 2 * n_steps * tokens)

        def train(processes):
            flags = {"data_dir": folder, "log_dir": Path(tempfile.mkdtemp(dir=folder), "log"),
                     "device": "cpu", "n_layer": n_layer, "n_head": n_head, "n_embd": n_embd,
                     "block_size": block_size, "batch_size": batch_size // processes, "batch_tokens": tokens,
                     "max_steps": n_steps, "warmup_steps": 0, "val_interval": 0, "val_tokens": block_size,
                     "checkpoint_interval": 0, "sample_interval": 0, "hellaswag_interval": 0}
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
            run_python(*launcher, "train_gpt2.py", *(f"--{key}={value}" for key, value in flags.items()),
                       OMP_NUM_THREADS=str(cores // processes))
            lines = (flags["log_dir"] / "log.txt").read_text(encoding="utf-8").splitlines()
            tok_s = [float(line.split()[2]) for line in lines if line.split()[1] == "tok_s"]
            return Seconds(tokens / statistics.median(tok_s[5:]))  # the first steps compile

        measure("scale", "tok/s", tokens, {"ours": lambda: train(2), "one process": lambda: train(1)})


def in_transformers(model):
    """The same model in transformers, which never ends a text."""
    import transformers
    transformers.utils.logging.set_verbosity_error()
    config = model.config
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=config.vocab_size, n_positions=config.block_size, n_embd=config.n_embd,
        n_layer=config.n_layer, n_head=config.n_head, eos_token_id=None, bos_token_id=None))
    products = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # transposed there
    theirs.load_state_dict({name: tensor.t() if name.endswith(products) else tensor
                            for name, tensor in model.state_dict().items()})
    return theirs.to(model.lm_head.weight.device).eval()


def bench_generate() -> None:
    dev = resolve_device(device, "float32")
    model = random_model(GPTConfig(block_size=max_new_tokens + 1, n_vocab=50_304, n_layer=n_layer,
                                   n_head=n_head, n_embd=n_embd), dev.device)
    theirs = in_transformers(model)
    texts = torch.arange(8, device=dev.device)[:, None]  # (8, 1)

    def ours(B):
        tokens = torch.stack([ids for ids, _ in generate(model, texts[:B], max_new_tokens, temperature=0.0)],
                             dim=1)
        dev.synchronize()
        return tokens  # (B, max_new_tokens)

    def transformers(B):
        idx = theirs.generate(texts[:B], max_new_tokens=max_new_tokens, do_sample=False,
                              attention_mask=torch.ones_like(texts[:B]))
        dev.synchronize()
        return idx[:, 1:]

    @torch.no_grad()
    def full():  # logits of all columns, of which the last is used, as build-nanogpt samples
        idx = texts[:1]
        for _ in range(max_new_tokens):
            idx = torch.cat((idx, model(idx)[:, -1].argmax(dim=-1, keepdim=True)), dim=1)
        dev.synchronize()
        return idx[:, 1:]

    def agree(tokens):  # at their start: near-ties may flip
        return all(torch.equal(tokens[0][:, :32], other[:, :32]) for other in tokens)

    for B, baselines in ((1, {"a full forward per token": full}), (8, {})):
        measure("generate", "tok/s", B * max_new_tokens,
                {"ours": functools.partial(ours, B), **baselines,
                 f"transformers, batch {B}": functools.partial(transformers, B)}, agree)


def our_scores(config, examples, device: str, dtype: str):
    dev, model = resolve_device(device, dtype), random_model(config, device)
    # about eight batches, so that a few examples need no more padding than all of them
    forward_tokens = min(16_384, 20 * len(examples.items))
    return lambda: hellaswag.evaluate(model, examples, dev, forward_tokens).log_likelihoods


def one_by_one(config, examples, device: str):
    """The four endings of an example as four padded rows, and the logits of all their tokens."""
    model = random_model(config, device)

    @torch.no_grad()
    def score():
        sums = []
        for example in examples.items:
            rows = [torch.from_numpy(np.concatenate((example.context, ending))) for ending in example.endings]
            tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)  # (4, T)
            logits = model(tokens)[:, :-1]  # (4, T - 1, V)
            losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
            losses = losses.view(len(rows), -1)  # (4, T - 1)
            sums.append(torch.stack([losses[i, len(example.context) - 1:len(row) - 1].sum()
                                     for i, row in enumerate(rows)]).tolist())
        return -np.array(sums)
    return score


def bench_hellaswag() -> None:
    dev, path = resolve_device(device, dtype), hellaswag.find_data(hellaswag_data, Ranks(), "hellaswag_data")
    examples = hellaswag.read_examples(path, load_tokenizer(), "completion")
    step = max(1, len(examples.items) // hellaswag_examples)
    examples = examples._replace(items=examples.items[::step][:hellaswag_examples])
    settings = GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd), examples, str(dev.device)
    rtol = 1e-4 if dev.dtype == torch.float32 else 1e-2
    with (in_a_process(our_scores, *settings, dtype) as ours,
          in_a_process(one_by_one, *settings) as baseline):
        measure("hellaswag", "examples/s", len(examples.items),
                {f"ours in {dev.dtype}": ours, "one example per forward": baseline},
                agree=lambda scores: np.allclose(*scores, rtol=rtol))


BENCHES = {
    "encode": bench_encode, "shards": bench_shards, "bpe_train": bench_bpe_train, "loader": bench_loader,
    "matmul": bench_matmul, "train": bench_train, "scale": bench_scale, "generate": bench_generate,
    "hellaswag": bench_hellaswag,
}


def main() -> None:
    names = only.split(",")
    unknown = [name for name in names if name not in BENCHES]
    if unknown:
        raise UserError(f"only={only}: there is no {', '.join(unknown)}; choose from {', '.join(BENCHES)}")
    dev = resolve_device(device)
    print(f"{dev.name} ({dev.device}), {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"Python {platform.python_version()}")
    for name in names:
        try:
            BENCHES[name]()
        except ImportError as error:
            raise UserError(f"{name} needs the package {error.name}: pip install .[dev], or "
                            f"leave it out with --only=...") from error


if __name__ == "__main__":
    configure(globals())
    main()
