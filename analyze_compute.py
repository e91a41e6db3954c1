"""
What a config costs: parameters, FLOPs, memory and time on named GPUs; and what a measured speed amounts to.

    python analyze_compute.py                                         # GPT-2 small, train_gpt2.py's defaults
    python analyze_compute.py config/gpu_6gb.py                       # one of the configs
    python analyze_compute.py --log_dir=log                           # a run: its settings and its MFU
    python analyze_compute.py config/rtx4050_15m.py --tok_s=10369 --peak_tflops=70 \\
        --gpus="NVIDIA GeForce RTX 4050 Laptop GPU" --out_dir=run_a   # run A, at the speed its author states

Takes train_gpt2.py's settings (its --help explains them), in config files and flags, and its own below. With
--log_dir the settings are those of the run's last start. The vocabulary is --tokenizer's, that of data_dir's
shards, or GPT-2's where neither is there. --init_from is not read: give its shape. Prints tables; with
--out_dir it also writes them to compute.txt, and a figure over sequence length and model size to compute.png.
Takes seconds, on any machine.

All but the speed is computed. FLOPs are those of matrix products; `convention` adds 6 for each bias and norm
parameter, so that the sum is the 6 N + 12 L d T of the MFU. Like the MFU, attention is counted over all
T x T pairs; the column `both, causal` counts only those that the mask leaves.

Memory is that of one process in eager mode on CUDA, in float32 or with 16-bit autocast (dtype auto, bfloat16,
float16), counted tensor by tensor; the peak is the worst phase of a step. Gradients exist throughout, as in
every micro-step after a step's first. torch.compile fuses kernels and should keep less. Not counted: the
second copy of the gradients under DDP, and what FSDP saves.
"""

import dataclasses
import math
import re
import sys
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from configurator import Between, OneOf, PathName, UserError, annotations_of, configure
from device import PEAK_TFLOPS
from device import peak_tflops as known_peak  # peak_tflops is a setting
from figures import log_ticks, pyplot, save_figure, short_number, table
from files import read_jsonl, read_text, write_atomically
from model import GPT, GPTConfig
from shards import RANK_FILE, list_shards, read_header

gpus = ("NVIDIA GeForce RTX 4050 Laptop GPU,NVIDIA GeForce RTX 3060,NVIDIA GeForce RTX 4090,"
        "NVIDIA A100-SXM4-80GB,NVIDIA H100 80GB HBM3,NVIDIA H200,NVIDIA B200")  # names as in device.py
mfu: Between(0.001, 1) = 0.4  # assumed fraction of the peak, for the table of times
tok_s: Between(0, 10**9) = 0.0  # measured tokens per second, of one GPU; 0 = the run's in --log_dir
out_dir: PathName = ""  # folder for the tables and the figure; empty = print the tables only

NAMES = ("compute.txt", "compute.png")
DATA_DIR = "edu_fineweb10B"  # train_gpt2.py's, where none is given
GIB, MIB = 2**30, 2**20
ATTENTION = "attention, q k^T and p v"
LOSS_CHUNK = 1024  # rows, where the config computes all logits at once
CARDS = (4, 6, 8, 12, 16, 24, 40, 80)  # GiB
CUDA_CONTEXT = 600_000_000  # bytes of the driver, cuBLAS and the kernels, before the first tensor
FRAGMENTATION = 0.1  # of the peak: reserved by the allocator but unusable
SIZES = {  # layers, heads, width: run A's model, and the four of GPT-2 (Radford et al. 2019, table 2)
    "A": (4, 4, 256), "124M": (12, 12, 768), "350M": (24, 16, 1024), "774M": (36, 20, 1280),
    "1558M": (48, 25, 1600)}
SHAPE = ("block_size", "n_layer", "n_head", "n_embd", "dropout", "norm_position")
DTYPES = {"auto": torch.float16,  # or bfloat16, where a card has it: the same size and speed
          "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def train_settings() -> dict:
    """The settings of train_gpt2.py, and the `__annotations__` of those and of the ones above."""
    source = read_text(Path(__file__).with_name("train_gpt2.py"))
    scope = {"Between": Between, "OneOf": OneOf, "PathName": PathName}
    exec(source[source.index("\n# ----"):source.index("config = configure(globals())")], scope)
    settings = {key: value for key, value in scope.items() if key.islower() and not key.startswith("_")}
    return settings | {"__annotations__": annotations_of(globals()) | annotations_of(scope)}


def find_run(log_dir: str) -> dict:
    """The last start of the run in a folder, as in its runs.jsonl, and tok_s, its median speed.

    Settings that train_gpt2.py no longer has are left out. Raises UserError without a start or a speed.
    """
    folder, settings = Path(log_dir), train_settings()
    types = {f"{key}?": type(value) for key, value in settings.items() if key != "__annotations__"}
    starts = read_jsonl(folder / "runs.jsonl", {"config": types, "device": str, "world_size": int})
    log = read_text(folder / "log.txt") if starts else ""
    speeds = [float(value) for value in re.findall(r"^\d+ tok_s ([\d.e+]+)$", log, re.M)]
    if not speeds:
        raise UserError(f"--log_dir={log_dir} has no run with speeds (runs.jsonl, tok_s in log.txt); name "
                        f"another folder, or leave out --log_dir and type --tok_s=VALUE")
    config = {key: value for key, value in starts[-1]["config"].items()
              if key in settings and key != "num_epochs"}  # max_steps has it
    return {**starts[-1], "config": config, "tok_s": median(speeds[1:] or speeds)}  # the first step compiles


# ---- parameters and FLOPs ------------------------------------------------------


def count_parameters(config: GPTConfig) -> dict[str, int]:
    """Parameters by component, all blocks together; the sum is GPT.num_params()."""
    L, C = config.n_layer, config.n_embd
    return {
        "token embedding": config.vocab_size * C,
        "position embedding": config.block_size * C,
        "attention, qkv": L * (3 * C * C + 3 * C),
        "attention, projection": L * (C * C + C),
        "MLP, up": L * (4 * C * C + 4 * C),
        "MLP, down": L * (4 * C * C + C),
        "norms of the blocks": L * 4 * C,
        "final norm": 2 * C if config.norm_position == "pre" else 0,
        "output layer (tied)": 0,
    }


def count_flops(config: GPTConfig, causal: bool = False) -> dict[str, float]:
    """FLOPs per token of a forward pass at T = block_size, by component; a backward pass takes twice that.

    A product with a matrix takes 2 per weight. A query attends to T keys, or with `causal` to (T + 1) / 2 on
    average. The last entry is what the MFU's convention adds (Chowdhery et al. 2022, "PaLM", appendix B).
    """
    L, C, T = config.n_layer, config.n_embd, config.block_size
    final_norm = 2 * C if config.norm_position == "pre" else 0
    return {
        "attention, qkv": L * 6 * C * C,
        ATTENTION: L * 4 * C * ((T + 1) / 2 if causal else T),
        "attention, projection": L * 2 * C * C,
        "MLP, up": L * 8 * C * C,
        "MLP, down": L * 8 * C * C,
        "output layer": 2 * config.vocab_size * C,
        "biases, norms (convention)": 2 * (13 * L * C + final_norm),
    }


# ---- memory --------------------------------------------------------------------


class Memory(NamedTuple):
    """Bytes on the device."""
    parts: dict[str, int]  # what is kept throughout the forward and backward pass
    phases: dict[str, int]  # the total in those phases of a step that may be the peak

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    @property
    def card(self) -> float:
        """Memory a card needs: the peak, what fragmentation loses, and the CUDA context."""
        return self.peak * (1 + FRAGMENTATION) + CUDA_CONTEXT


def block_activations(config: GPTConfig, width: int) -> int:
    """Bytes per token that a block saves for its backward pass, with matrix products of `width` bytes.

    In float32 the inputs of the two norms, with mean and deviation, and the log-sum-exp of attention; in
    `width` bytes the inputs of the four matrices (C, C, C, 4C), q, k and v (3C), and the input of GELU (4C);
    two dropout masks. That is 36 C in 16 bit; with a 16-bit residual stream and masks it would be the 34 C
    of Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", section 4.1.
    """
    C = config.n_embd
    masks = 2 * C if config.dropout > 0 else 0
    return 2 * (4 * C + 8) + 14 * width * C + 4 * config.n_head + masks


def count_memory(config: GPTConfig, batch_size: int, width: int = 2, loss_chunk: int = 0,
                 activation_checkpointing: bool = False, optimizer: str = "adamw") -> Memory:
    """Memory of a training step with micro-batches of `batch_size` x block_size tokens.

    `width` is the bytes of a number in matrix products, 2 or 4. `loss_chunk` rows of logits exist at a time,
    0 = all. With activation checkpointing each block keeps only its input, and its activations are recomputed
    one block at a time. AdamW keeps two moments; Muon, used for the matrices of the blocks, one.
    """
    C, V, T = config.n_embd, config.vocab_size, config.block_size
    N, rows = sum(count_parameters(config).values()), batch_size * config.block_size
    in_blocks = config.n_layer * 12 * C * C
    matrices = in_blocks + V * C
    block = rows * block_activations(config, width)
    kept = rows * 4 * C if activation_checkpointing else block
    ends = rows * (16 + width * C + (4 * C + 8 if config.norm_position == "pre" else 0)
                   + (C if config.dropout > 0 else 0)) + 8 * T  # ids, final norm, the output layer's input
    static = {
        "weights, float32": 4 * N,
        "gradients, float32": 4 * N,
        "moments, float32": 8 * N - (4 * in_blocks if optimizer == "muon" else 0),
    }
    parts = {**static, "16-bit copies of matrices": width * matrices if width < 4 else 0,
             "activations": config.n_layer * kept + ends}
    throughout = sum(parts.values())
    chunk = min(loss_chunk, rows) if loss_chunk else rows
    fresh = 4 + (width if width < 4 else 0)  # bytes of a new weight gradient: made in 16 bit, kept in float32
    # float32 log-probabilities, the loss's gradients with respect to them and to the logits; or the last of
    # these in `width` bytes, and the output layer's weight gradient
    loss = max(12 * V * chunk, width * V * chunk + fresh * V * C)
    if chunk < rows:  # and the sum of that gradient over chunks, the hidden states and their gradient
        loss += 4 * V * C + 8 * C * rows
    # gradients of the residual stream and of one matrix with its input and output; the output layer's weight
    # gradient is kept until the embedding's, which belongs to the same matrix, is added
    in_block = rows * 12 * C + fresh * 4 * C * C + 4 * V * C + (block if activation_checkpointing else 0)
    return Memory(parts, {
        "logits and loss": throughout + loss,
        "backward pass of a block": throughout + in_block,
        # two gradients of the tied matrix and their sum; all activations are freed by then
        "gradient of the embedding": sum(static.values()) + 12 * V * C,
    })


def largest_batch_size(config: GPTConfig, sequences: int, card_gb: float, **options) -> int:
    """The largest batch_size that divides a step's sequences and fits a card of `card_gb` GiB, or 0.
    `options`: the arguments of count_memory after batch_size."""
    divisors = [n for n in range(1, sequences + 1) if sequences % n == 0]
    return max((n for n in divisors if count_memory(config, n, **options).card <= card_gb * GIB), default=0)


# ---- tables and figure ---------------------------------------------------------


def cost_lines(config: GPTConfig) -> list[str]:
    """Parameters and FLOPs by component, and where the two terms of the blocks are equal."""
    L, C, T, V = config.n_layer, config.n_embd, config.block_size, config.vocab_size
    counts = count_parameters(config)
    n_params = sum(counts.values())
    forward, causal = count_flops(config), count_flops(config, causal=True)
    total, convention = sum(forward.values()), forward["biases, norms (convention)"]
    rows = [[name, f"{n:,.0f}", f"{2 * n:,.0f}", f"{n / total:.1%}", f"{3 * causal[name]:,.0f}"]
            for name, n in forward.items()]
    rows.append(["total", f"{total:,.0f}", f"{2 * total:,.0f}", "", f"{3 * sum(causal.values()):,.0f}"])
    recomputed = total - forward["output layer"] - convention
    shares = [[name, f"{n:,}", f"{n / n_params:.1%}"] for name, n in counts.items()]
    return [
        *table(["parameters (computed)", "", "share"], [*shares, ["total", f"{n_params:,}", ""]]), "",
        *table(["FLOPs per token (computed)", "forward", "backward", "share", "both, causal"], rows),
        (f"both: {3 * total:,.0f} = 6 N + 12 L d T, the MFU's; matrix products alone: "
         f"{3 * (total - convention):,.0f}"),
        f"activation checkpointing adds {recomputed:,.0f} ({recomputed / total / 3:.1%}), not in the MFU", "",
        f"a forward pass through the blocks, L (4 n^2 d + 24 n d^2), L = {L}, n = {T}, d = {C} (computed):",
        f"  {4 * T * T * C * L:,} + {24 * T * C * C * L:,} FLOPs, equal at n = 6 d = {6 * C:,}",
        f"  with the output layer's 2 n d V, at n = 6 d + V / 2 L = {6 * C + V / (2 * L):,.0f}",
    ]


def ways_to_save(options: dict) -> list[dict]:
    """`options` without and with what saves memory: nothing, loss_chunk, activation checkpointing, both."""
    return [{**options, "loss_chunk": rows, "activation_checkpointing": recompute}
            for recompute in (False, True) for rows in (0, options["loss_chunk"] or LOSS_CHUNK)]


def memory_lines(config: GPTConfig, batch_size: int, sequences: int, options: dict) -> list[str]:
    """Memory of a step, and the largest batch_size for common cards, with and without what saves it."""
    memory, ways = count_memory(config, batch_size, **options), ways_to_save(options)
    sizes = {**memory.parts, **{f"in all, {name}": n for name, n in memory.phases.items()},
             "peak": memory.peak,
             f"card: the peak + {FRAGMENTATION:.0%} + {CUDA_CONTEXT / 1e9:.1f} GB for CUDA": memory.card}
    fits = [[f"{card:g} GiB", *(str(largest_batch_size(config, sequences, card, **way)) for way in ways)]
            for card in CARDS]
    return [
        f"batch_size={batch_size}, loss_chunk={options['loss_chunk']}, {options['optimizer']}"
        + (", activation_checkpointing" if options["activation_checkpointing"] else ""),
        *table(["memory (computed)", "MiB"], [[name, f"{n / MIB:,.0f}"] for name, n in sizes.items()]), "",
        *table([f"largest batch_size of a step's {sequences} (computed)", "plain",
                f"loss_chunk={ways[1]['loss_chunk']}", "checkpointing", "both"], fits),
    ]


def peaks_of(names: list[str], settings: dict) -> dict[str, float | None]:
    """{card: dense peak in TFLOP/s, None if unknown}, and --peak_tflops if it is set."""
    own = {"--peak_tflops": settings["peak_tflops"]} if settings["peak_tflops"] else {}
    return {name: known_peak(name, DTYPES[settings["dtype"]]) for name in names} | own


def time_lines(config: GPTConfig, peaks: dict, settings: dict) -> list[str]:
    """Time of the run on one GPU of each of `peaks`, at the assumed MFU."""
    flops, rows = 3 * sum(count_flops(config).values()), []
    tokens = settings["max_steps"] * settings["batch_tokens"]
    for name, peak in peaks.items():
        speed = settings["mfu"] * (peak or math.nan) * 1e12 / flops
        cells = [f"{peak:,.1f}", f"{speed:,.0f}", f"{tokens / speed / 3600:,.3f}"] if peak else ["n/a"] * 3
        rows.append([name, *cells])
    steps = f"max_steps={settings['max_steps']}{', not num_epochs' if settings['num_epochs'] else ''}"
    title = f"{steps}: {tokens / 1e9:,.3f}B tokens, MFU {settings['mfu']:.0%} (computed)"
    return table([title, "peak TFLOP/s", "tok/s", "GPU hours"], rows)


def speed_lines(config: GPTConfig, speed: float, world_size: int, peaks: dict, settings: dict) -> list[str]:
    """A measured speed, tokens per second of `world_size` devices together, in all its units."""
    batch_tokens, tflops = settings["batch_tokens"], 3 * sum(count_flops(config).values()) * speed / 1e12
    rows = [["tokens/s", f"{speed:,.0f}"], ["sequences/s", f"{speed / config.block_size:,.1f}"],
            ["seconds per step", f"{batch_tokens / speed:,.2f}"], ["TFLOP/s", f"{tflops:,.2f}"]]
    for name, peak in peaks.items():
        rows.append([f"MFU: of {peak:,.1f} TFLOP/s, {name}", f"{tflops / peak / world_size:.2%}"] if peak else
                    [f"MFU: no peak known for {name}; give --peak_tflops", "n/a"])
    epoch = sum(read_header(path)[0] for path in list_shards(settings["data_dir"] or DATA_DIR, "train"))
    for name, tokens in {"an epoch": epoch, "the run": settings["max_steps"] * batch_tokens}.items():
        if tokens:
            rows += [[f"{name}: steps", f"{tokens / batch_tokens:,.0f}"], [f"{name}: tokens", f"{tokens:,}"],
                     [f"{name}: minutes", f"{tokens / speed / 60:,.1f}"]]
    return table([f"speed (measured, {world_size} device(s))", ""], rows)


def draw(config: GPTConfig, batch_size: int, options: dict, path: Path) -> None:
    """The figure: FLOPs and memory over sequence length for this config, and over the sizes of model."""
    figure, axes = pyplot().subplots(2, 2, figsize=(10, 7.6), layout="constrained")
    T, d, shape = config.block_size, config.n_embd, f"{config.n_layer} layers, {config.n_embd} wide"
    longer = {short_number(2**k): dataclasses.replace(config, block_size=2**k) for k in range(6, 16)}
    sizes = {name: dataclasses.replace(config, n_layer=n_layer, n_head=n_head, n_embd=n_embd)
             for name, (n_layer, n_head, n_embd) in SIZES.items()}

    def stack(axis, models, parts):
        bottom = [0.0] * len(models)
        for label, heights in parts.items():
            axis.bar([*models], heights, bottom=bottom, label=label, alpha=0.8)
            bottom = [b + h for b, h in zip(bottom, heights)]

    for axis, models in zip(axes[:, 0], (longer, sizes)):
        flops = [count_flops(model) for model in models.values()]
        attention, output = ([3e-9 * n[key] for n in flops] for key in (ATTENTION, "output layer"))
        rest = [3e-9 * sum(n.values()) - a - o for n, a, o in zip(flops, attention, output)]
        stack(axis, models, {"matrices of the blocks": rest, "output layer": output, "attention": attention})
        axis.set_ylabel("GFLOPs per token")
    axes[0, 0].set_title(f"Training FLOPs: {shape};\nattention = matrices of the blocks at T = {6 * d:,}")
    axes[1, 0].set_title(f"Training FLOPs at T = {T:,}")

    labels = ("all logits at once", "loss in chunks", "activation checkpointing", "both")
    for label, way in zip(labels, ways_to_save(options)):
        peaks = [count_memory(model, batch_size, **way).peak / GIB for model in longer.values()]
        axes[0, 1].plot([*longer], peaks, marker="o", markersize=4, linewidth=1.4, label=label)
    log_ticks(axes[0, 1].yaxis, (1, 3))
    axes[0, 1].set(title=f"Peak memory: {shape},\n{batch_size} sequences at a time", ylabel="GiB")
    memories = [count_memory(size, 1, **options) for size in sizes.values()]
    parts = {name: [memory.parts[name] / GIB for memory in memories] for name in memories[0].parts}
    in_flight = [(memory.peak - sum(memory.parts.values())) / GIB for memory in memories]
    stack(axes[1, 1], sizes, {**parts, "logits, gradients in flight": in_flight})
    axes[1, 1].set(title=f"Peak memory at T = {T:,}, one sequence", ylabel="GiB")
    for axis in axes.flat:
        axis.set_xlabel("sequence length T" if axis in axes[0] else "run A's model, and the four of GPT-2")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=9, loc="upper left")
    figure.suptitle("computed, not measured", fontsize=10)
    save_figure(figure, path)


# ---- the script ----------------------------------------------------------------


def check_settings(settings: dict) -> tuple[GPTConfig, int, list[str]]:
    """(model, sequences per step, names of GPUs) of the settings. Raises UserError for mistakes in them."""
    names = [name.strip() for name in settings["gpus"].split(",") if name.strip()]
    for name in names:
        if name not in PEAK_TFLOPS:
            known = ", ".join(full for full in PEAK_TFLOPS if name.lower() in full.lower())
            raise UserError(f"--gpus: {name!r} is not in device.py; try {known or '--peak_tflops=VALUE'}")
    for path in (Path(settings["out_dir"], name) for name in NAMES):
        if settings["out_dir"] and path.exists():
            raise UserError(f"{path} exists: delete it if you no longer need it, or type another --out_dir")
    own = Path(settings["data_dir"] or DATA_DIR, RANK_FILE)
    tokenizer = settings["tokenizer"] or (str(own) if own.exists() else "gpt2")
    if tokenizer == "gpt2":
        n_vocab = GPTConfig.n_vocab
    elif settings["vocab_size"] and not Path(tokenizer).is_file():  # the size is all that is needed
        n_vocab = settings["vocab_size"]
    else:
        from bpe import load_tokenizer
        n_vocab = load_tokenizer(tokenizer).n_vocab
    vocab_size = settings["vocab_size"] or math.ceil(n_vocab / 128) * 128
    config = GPTConfig(vocab_size=vocab_size, n_vocab=n_vocab, **{key: settings[key] for key in SHAPE})
    B, T, batch_tokens = settings["batch_size"], config.block_size, settings["batch_tokens"]
    if batch_tokens % (B * T):
        above = math.ceil(batch_tokens / (B * T)) * B * T
        raise UserError(f"batch_tokens={batch_tokens} is not a multiple of batch_size * block_size "
                        f"= {B} * {T} = {B * T}; try --batch_tokens={above}")
    return config, batch_tokens // T, names


def main(settings: dict, run: dict) -> None:
    """Print and write everything; `run`: as find_run returns it."""
    config, sequences, names = check_settings(settings)
    with torch.device("meta"):  # shapes without memory
        model = GPT(config)
    counted = sum(count_parameters(config).values()), 3 * sum(count_flops(config).values())
    if counted != (own := (model.num_params(), model.flops_per_token(config.block_size))):
        raise UserError("model.py is not GPT-2: it has {:,} parameters and {:,} FLOPs per token, not {:,} "
                        "and {:,}; measure it: python train_gpt2.py --dry_run".format(*own, *counted))
    for key in (*SHAPE, "vocab_size", "batch_tokens"):
        if settings[key] != (value := run.get("config", settings).get(key, settings[key])):
            raise UserError(f"the run in --log_dir has {key}={value}: leave out --{key}")
    options = {key: settings[key] for key in ("loss_chunk", "activation_checkpointing", "optimizer")}
    options["width"] = DTYPES[settings["dtype"]].itemsize
    head = (f"{config.n_layer} layers, {config.n_head} heads, {config.n_embd} wide, T = {config.block_size}, "
            f"{config.vocab_size:,} ids, {config.norm_position}-norm; {sequences} sequences per step")
    report = [head, "", *cost_lines(config), "",
              *memory_lines(config, settings["batch_size"], sequences, options), "",
              *time_lines(config, peaks_of(names, settings), settings)]
    if speed := settings["tok_s"] or run.get("tok_s"):
        peaks = peaks_of([run["device"]] if run else names, settings)
        gpus = 1 if settings["tok_s"] else run["world_size"]
        report += ["", *speed_lines(config, speed, gpus, peaks, settings)]
    print("\n".join(report))
    if settings["out_dir"]:
        folder = Path(settings["out_dir"])
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / NAMES[0], "\n".join([*report, ""]).encode())
        draw(config, settings["batch_size"], options, folder / NAMES[1])
        print(f"written to {folder}: {', '.join(NAMES)}")


if __name__ == "__main__":
    settings, last_start = {**globals(), **train_settings()}, {}
    log_dir = configure(dict(settings))["log_dir"]
    if any(re.match("--log[-_]dir=", arg) for arg in sys.argv):  # and not only in a config file
        last_start = find_run(log_dir)
    main(configure(settings | last_start.get("config", {})), last_start)
