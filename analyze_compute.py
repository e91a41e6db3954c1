"""
What a config costs: parameters, FLOPs, memory, and the time of the run on named GPUs. Nothing is trained.

    python analyze_compute.py                                          # GPT-2 small, train_gpt2.py's defaults
    python analyze_compute.py config/rtx4050_15m.py --out_dir=compute  # run A, and its author's figures
    python analyze_compute.py config/gpu_6gb.py --gpu_memory_gb=6      # what fits a card
    python analyze_compute.py --mfu=0.5 --gpus="NVIDIA H200" --dollars_per_hour=2

Takes the settings of train_gpt2.py (its --help explains them), in config files and flags, and its own below.
Prints tables. With --out_dir it writes them there as compute.txt, and a figure over sequence length and model
size as compute.png. Takes seconds, on any machine.

Everything here is computed, nothing is measured. FLOPs are those of matrix products; `convention` adds 6 for
each bias and norm parameter, which makes the sum the 6 N + 12 L d T of the MFU. Attention is counted over the
whole square of T x T, as the MFU does, and beside it with credit for the half that causality leaves out.

Memory is that of one process in eager mode on CUDA, with autocast to 16 bit (dtype auto, bfloat16, float16)
or in float32, counted tensor by tensor. The worst phase of a step counts. Gradients are there all the time,
as they are in every micro-step but a step's first. torch.compile fuses, and so should keep less. Not counted:
what DDP adds, another copy of the gradients, and what FSDP saves.
"""

import dataclasses
import io
import itertools
import math
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch

from configurator import Between, OneOf, PathName, UserError, annotations_of, configure
from device import PEAK_TFLOPS
from device import peak_tflops as known_peak  # peak_tflops is a setting
from files import read_text, write_atomically
from model import GPT, GPTConfig

gpus = ("NVIDIA GeForce RTX 4050 Laptop GPU,NVIDIA GeForce RTX 3060,NVIDIA GeForce RTX 4090,"
        "NVIDIA A100-SXM4-80GB,NVIDIA H100 80GB HBM3,NVIDIA H200,NVIDIA B200")  # names as in device.py
mfu: Between(0.001, 1) = 0.4  # assumed share of the peak that the run reaches
dollars_per_hour: Between(0, 10**6) = 0.0  # price of one GPU; 0 = costs are not shown
gpu_memory_gb: Between(0, 10**6) = 0.0  # size of the card to fit, in GiB; 0 = a table of common ones
out_dir: PathName = ""  # where the tables and the figure go; empty = only print them

NAMES = ("compute.txt", "compute.png")
GIB, MIB = 2**30, 2**20
IN_BLOCKS = ("attention, qkv", "attention, projection", "MLP, up", "MLP, down", "norms of the blocks")
LOSS_CHUNK = 1024  # rows, where the config has all at once
CARDS = (4, 6, 8, 12, 16, 24, 40, 80)  # GiB
CUDA_CONTEXT = 600_000_000  # bytes that the driver, cuBLAS and the kernels take before any tensor is there
FRAGMENTATION = 0.1  # of the peak: what the allocator holds and cannot use
SIZES = {  # layers, heads, width: run A's model, and the four of GPT-2 (Radford et al. 2019, table 2)
    "A": (4, 4, 256), "124M": (12, 12, 768), "350M": (24, 16, 1024), "774M": (36, 20, 1280),
    "1558M": (48, 25, 1600),
}
DTYPES = {"auto": torch.bfloat16, "bfloat16": torch.bfloat16, "float16": torch.float16,
          "float32": torch.float32}

RUN_A = GPTConfig(block_size=256, vocab_size=50304, n_layer=4, n_head=4, n_embd=256, dropout=0.7)
RUN_A_PARAMS, RUN_A_TOK_S, RUN_A_TFLOPS = 15_103_616, 10_369, 70  # as its author states them
RUN_A_GPU = "NVIDIA GeForce RTX 4050 Laptop GPU"


def train_settings() -> dict:
    """The settings of train_gpt2.py, and the `__annotations__` of those and of the ones above."""
    source = read_text(Path(__file__).with_name("train_gpt2.py"))
    scope = {"Between": Between, "OneOf": OneOf, "PathName": PathName}
    exec(source[source.index("\n# ----"):source.index("config = configure(globals())")], scope)
    settings = {key: value for key, value in scope.items() if key.islower() and not key.startswith("_")}
    return settings | {"__annotations__": annotations_of(globals()) | annotations_of(scope)}


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
    """FLOPs per token of the forward pass at T = block_size, by component; the backward pass has twice that.

    A product with a matrix takes 2 per weight. A query meets T keys, or with `causal` those that do not come
    after it, (T + 1) / 2 on average. The last entry is what the convention of the MFU adds.
    """
    L, C, T = config.n_layer, config.n_embd, config.block_size
    matrices = L * 12 * C * C + config.vocab_size * C
    parameters = count_parameters(config)
    others = sum(parameters.values()) - parameters["position embedding"] - matrices
    return {
        "attention, qkv": L * 6 * C * C,
        "attention, q k^T and p v": L * 4 * C * ((T + 1) / 2 if causal else T),
        "attention, projection": L * 2 * C * C,
        "MLP, up": L * 8 * C * C,
        "MLP, down": L * 8 * C * C,
        "output layer": 2 * config.vocab_size * C,
        "biases, norms (convention)": 2 * others,
    }


def crossovers(config: GPTConfig) -> dict[str, float]:
    """Lengths n at which attention's products cost as much as those that grow with d^2."""
    L, C, V = config.n_layer, config.n_embd, config.vocab_size
    return {
        "4 n^2 d = 24 n d^2": 6 * C,  # the blocks
        "with causal credit, 2 n (n + 1) d = 24 n d^2": 12 * C - 1,
        "with the output layer, L 4 n^2 d = L 24 n d^2 + 2 n d V": 6 * C + V / (2 * L),
    }


# ---- memory --------------------------------------------------------------------


class Memory(NamedTuple):
    """Bytes on the device."""
    parts: dict[str, int]  # what lies there during the forward and backward pass
    phases: dict[str, int]  # everything, in the phases of a step that may be the worst

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    @property
    def card(self) -> float:
        """What a card must have for it: the peak, what is lost to fragmentation, and CUDA's context."""
        return self.peak * (1 + FRAGMENTATION) + CUDA_CONTEXT


def block_activations(config: GPTConfig, width: int) -> int:
    """Bytes per token that one block keeps for its backward pass, with matrix products of `width` bytes.

    In float32 what the two norms are given, with mean and deviation, and the log-sum-exp of attention; in
    `width` bytes what the four matrices are given (C, C, C, 4C), q, k and v (3C) and what gelu is given (4C);
    two masks of dropout. That is 36 C in 16 bit; with a 16-bit residual stream and masks it would be the 34 C
    of Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", section 4.1.
    """
    C = config.n_embd
    masks = 2 * C if config.dropout > 0 else 0
    return 2 * (4 * C + 8) + 14 * width * C + 4 * config.n_head + masks


def count_memory(config: GPTConfig, batch_size: int, width: int = 2, loss_chunk: int = 0,
                 activation_checkpointing: bool = False, optimizer: str = "adamw") -> Memory:
    """Memory of a training step with micro-batches of `batch_size` x block_size tokens.

    `width` is the bytes of a number in matrix products, 2 or 4. `loss_chunk` rows of logits exist at a time,
    0 = all. With activation checkpointing a block keeps its input only, and one at a time is made again.
    AdamW has two moments; Muon, which takes over the matrices of the blocks, one.
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
    parts = {
        **static,
        "16-bit copies of matrices": width * matrices if width < 4 else 0,
        "activations": config.n_layer * kept + ends,
    }
    here = sum(parts.values())
    chunk = min(loss_chunk, rows) if loss_chunk else rows
    fresh = 4 + (width if width < 4 else 0)  # bytes of a new weight gradient: made in 16 bit, kept in float32
    # float32 log-probabilities, the loss's gradient by them and by the logits; or, with the last of these in
    # `width` bytes, the output layer's weight gradient
    loss = max(12 * V * chunk, width * V * chunk + fresh * V * C)
    if chunk < rows:  # beside these: the chunks' sum of that, and the hidden states with their gradient
        loss += 4 * V * C + 8 * C * rows
    # gradients of the residual stream and of one matrix with both its sides; the output layer's weight
    # gradient is kept until the embedding's, that of the same matrix, is there
    in_block = rows * 12 * C + fresh * 4 * C * C + 4 * V * C + (block if activation_checkpointing else 0)
    return Memory(parts, {
        "logits and loss": here + loss,
        "backward pass of a block": here + in_block,
        # two gradients of the tied matrix, and their sum; all but the embedding's is done
        "gradient of the embedding": sum(static.values()) + 12 * V * C,
    })


def largest_batch_size(config: GPTConfig, sequences: int, card_gb: float, **how) -> int:
    """The largest batch_size that divides the sequences of a step and fits a card of so many GiB, 0 if none
    does. `how` is what count_memory takes after batch_size."""
    fitting = [n for n in range(1, sequences + 1)
               if sequences % n == 0 and count_memory(config, n, **how).card <= card_gb * GIB]
    return max(fitting, default=0)


# ---- run A ---------------------------------------------------------------------


def countings_of_run_a() -> Counter:
    """How many plausible countings of run A's width give which total: {parameters: countings}."""
    d, totals = RUN_A.n_embd, Counter()
    for V, positions, layers, hidden in itertools.product(
            (50257, 50304), (0, 128, 256, 512, 1024), (3, 4, 5), (d, 2 * d, 3 * d, 4 * d)):
        for qkv, projection, mlp, norms, final, tables, bias in itertools.product(
                (0, 3 * d), (0, d), (0, d + hidden), (0, 2 * d, 4 * d), (0, d, 2 * d), (1, 2), (0, V)):
            block = 4 * d * d + 2 * d * hidden + qkv + projection + mlp + norms
            totals[tables * V * d + positions * d + layers * block + final + bias] += 1
    return totals


def run_a_lines() -> list[str]:
    """What its author states of run A, beside what follows from its own table; lines of text."""
    counts, totals = count_parameters(RUN_A), countings_of_run_a()
    N, d, L = sum(counts.values()), RUN_A.n_embd, RUN_A.n_layer
    others = {
        "without the position embedding": N - counts["position embedding"],
        "without biases": N - 9 * L * d,
        "without biases and norms": N - 13 * L * d - 2 * d,
        "a vocabulary of 50,257": N - 47 * d,
        "an MLP of 3 d": N - L * (2 * d * d + d),
        "three layers": N - sum(n for name, n in counts.items() if name in IN_BLOCKS) // L,
        "an output layer of its own": N + counts["token embedding"],
    }
    flops = 3 * sum(count_flops(RUN_A).values())
    reached, peak = flops * RUN_A_TOK_S / 1e12, known_peak(RUN_A_GPU, torch.bfloat16)
    tripled = 3 * 6 * RUN_A_PARAMS * RUN_A_TOK_S / 1e12
    rows = [[what, f"{n:,}", f"{n - RUN_A_PARAMS:+,}"]
            for what, n in {"its config table, tied, with biases": N, **others}.items()]
    return [
        *table("parameters of run A (computed)", ["all", f"to the {RUN_A_PARAMS:,} stated"], rows),
        (f"{totals[RUN_A_PARAMS]} of {totals.total():,} combinations of these, of fewer norms and of other "
         f"position tables give what is stated"), "",
        (f"MFU of run A (computed): {flops:,.0f} FLOPs per token x {RUN_A_TOK_S:,} tok/s = "
         f"{reached:.2f} TFLOP/s"),
        (f"  {reached / RUN_A_TFLOPS:.2%} of the {RUN_A_TFLOPS} that its author claims for the card, "
         f"{reached / peak:.2%} of its dense 16-bit peak of {peak:.1f}"),
        (f"  the 4.03% stated is 3 x 6 N, N = {RUN_A_PARAMS:,}: {tripled:.2f} TFLOP/s, "
         f"{tripled / RUN_A_TFLOPS:.2%} of {RUN_A_TFLOPS}; 6 N has the backward pass already"),
    ]


# ---- what is shown -------------------------------------------------------------


def table(title: str, heading: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right, as wide as their contents."""
    cells = [[title, *heading], *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return ["  ".join(cell.rjust(width) if i else cell.ljust(width)
                      for i, (cell, width) in enumerate(zip(row, widths))).rstrip() for row in cells]


def parameter_lines(config: GPTConfig) -> list[str]:
    """Parameters by component."""
    counts = count_parameters(config)
    total = sum(counts.values())
    rows = [[name, f"{n // config.n_layer:,}" if name in IN_BLOCKS else "", f"{n:,}", f"{n / total:.1%}"]
            for name, n in counts.items()]
    return table("parameters (computed)", ["per block", "all", "share"],
                 [*rows, ["total", "", f"{total:,}", ""]])


def flops_lines(config: GPTConfig) -> list[str]:
    """FLOPs per token by component, and the two terms of the blocks with the lengths that make them equal."""
    L, C, T = config.n_layer, config.n_embd, config.block_size
    forward, causal = count_flops(config), count_flops(config, causal=True)
    total, convention = sum(forward.values()), forward["biases, norms (convention)"]
    rows = [[name, f"{n:,.0f}", f"{2 * n:,.0f}", f"{n / total:.1%}", f"{3 * causal[name]:,.0f}"]
            for name, n in forward.items()]
    rows.append(["total", f"{total:,.0f}", f"{2 * total:,.0f}", "", f"{3 * sum(causal.values()):,.0f}"])
    again = total - forward["output layer"] - convention
    return [
        *table("FLOPs per token (computed)", ["forward", "backward", "share", "both, causal"], rows),
        (f"both: {3 * total:,.0f} = 6 N + 12 L d T, the MFU's; matrix products alone: "
         f"{3 * (total - convention):,.0f}"),
        f"activation checkpointing adds {again:,.0f} ({again / total / 3:.1%}), which no MFU counts", "",
        f"a forward pass through the blocks, L (4 n^2 d + 24 n d^2), L = {L}, n = {T}, d = {C} (computed):",
        f"  {4 * T * T * C * L:,} + {24 * T * C * C * L:,} FLOPs",
        *(f"  equal at n = {n:,.0f}: {what}" for what, n in crossovers(config).items()),
    ]


def memory_lines(config: GPTConfig, batch_size: int, how: dict) -> list[str]:
    """Memory of a step as it is set; `how` is what count_memory takes after batch_size."""
    memory = count_memory(config, batch_size, **how)
    rows = [[name, f"{n / MIB:,.0f}"] for name, n in memory.parts.items()]
    rows += [[f"in all, {name}", f"{n / MIB:,.0f}"] for name, n in memory.phases.items()]
    rows += [["peak", f"{memory.peak / MIB:,.0f}"],
             [f"card: the peak + {FRAGMENTATION:.0%} + {CUDA_CONTEXT / 1e9:.1f} GB for CUDA",
              f"{memory.card / MIB:,.0f}"]]
    lines = table("memory (computed)", ["MiB"], rows)
    again = str(how["activation_checkpointing"]).lower()
    return [f"batch_size={batch_size}, loss_chunk={how['loss_chunk']}, activation_checkpointing={again}, "
            + how["optimizer"], *lines]


def fit_lines(config: GPTConfig, sequences: int, how: dict, cards: list[float]) -> list[str]:
    """The largest batch_size for each card, without and with what saves memory."""
    chunk = how["loss_chunk"] or LOSS_CHUNK
    ways = [{**how, "loss_chunk": rows, "activation_checkpointing": again}
            for again in (False, True) for rows in (0, chunk)]
    rows = []
    for card in cards:
        fitting = [largest_batch_size(config, sequences, card, **way) for way in ways]
        rows.append([f"{card:g} GiB", *(str(n or "-") for n in fitting)])
    return table(f"largest batch_size of a step's {sequences} (computed)",
                 ["plain", f"loss_chunk={chunk}", "checkpointing", "both"], rows)


def time_lines(config: GPTConfig, dtype: torch.dtype, names: list[str], settings: dict) -> list[str]:
    """What the run takes on one GPU of each name."""
    flops = 3 * sum(count_flops(config).values())
    tokens = settings["max_steps"] * settings["batch_tokens"]
    share, price = settings["mfu"], settings["dollars_per_hour"]
    peaks = {name: known_peak(name, dtype) for name in names}
    if settings["peak_tflops"] > 0:
        peaks["--peak_tflops"] = settings["peak_tflops"]
    rows = []
    for name, peak in peaks.items():
        cells = ["n/a"] * 4
        if peak is not None:
            tok_s = share * peak * 1e12 / flops
            hours = tokens / tok_s / 3600
            digits = 0 if hours >= 100 else 1 if hours >= 1 else 3
            cells = [f"{peak:,.1f}", f"{tok_s:,.0f}", f"{hours:,.{digits}f}", f"{hours * price:,.2f}"]
        rows.append([name, *cells[:4 if price else 3]])
    heading = ["peak TFLOP/s", "tok/s", "GPU hours", "dollars"][:4 if price else 3]
    kind = str(dtype).removeprefix("torch.")
    lines = table(f"{tokens / 1e9:,.3f}B tokens, {kind}, MFU {share:.0%} (computed)", heading, rows)
    if settings["num_epochs"] > 0:
        lines.append(f"for num_epochs={settings['num_epochs']:g} the data decide how many steps there are; "
                     f"these are max_steps={settings['max_steps']:,}")
    return lines


def draw(config: GPTConfig, batch_size: int, how: dict) -> bytes:
    """The figure, PNG: FLOPs and memory over sequence length for this config, and over the sizes of model."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter

    figure, axes = plt.subplots(2, 2, figsize=(12, 8.5), layout="constrained")
    shape = f"{config.n_layer} layers, {config.n_embd} wide"

    def resized(T, size=None):
        n_layer, n_head, n_embd = size or (config.n_layer, config.n_head, config.n_embd)
        return dataclasses.replace(config, block_size=T, n_layer=n_layer, n_head=n_head, n_embd=n_embd)

    def split(config):
        flops = count_flops(config)
        attention, output = flops["attention, q k^T and p v"], flops["output layer"]
        return [3 * n / 1e9 for n in (sum(flops.values()) - attention - output, output, attention)]

    names, colors = ("matrices of the blocks", "output layer", "attention, n^2 d"), ("C0", "C1", "C3")
    lengths = [2**k for k in range(6, 16)]
    parts = list(zip(*(split(resized(T)) for T in lengths)))
    axes[0, 0].stackplot(lengths, parts, labels=names, colors=colors, alpha=0.8)
    crossover = crossovers(config)["4 n^2 d = 24 n d^2"]
    axes[0, 0].axvline(crossover, color="black", linestyle=":", label=f"4 n^2 d = 24 n d^2: {crossover:,}")
    axes[0, 0].set(title=f"Training FLOPs: {shape}", ylabel="GFLOPs per token")

    chunk = how["loss_chunk"] or LOSS_CHUNK
    for label, rows, again in (("plain", 0, False), (f"loss_chunk={chunk}", chunk, False),
                               ("activation checkpointing", 0, True), ("both", chunk, True)):
        way = {**how, "loss_chunk": rows, "activation_checkpointing": again}
        peaks = [count_memory(resized(T), batch_size, **way).peak / GIB for T in lengths]
        axes[0, 1].plot(lengths, peaks, marker="o", markersize=4, linewidth=1.4, label=label)
    axes[0, 1].set(title=f"Peak memory: {shape}, batch_size = {batch_size}", ylabel="GiB")
    axes[0, 1].set_yscale("log", base=2)
    for axis in axes[0]:
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths)
        axis.minorticks_off()
        axis.xaxis.set_major_formatter(FuncFormatter(format_power))
        axis.set_xlabel("sequence length T")
        axis.axvline(config.block_size, color="grey", linewidth=0.8, label="this config's T")
    axes[0, 1].yaxis.set_major_formatter(FuncFormatter(format_power))

    sizes = {name: resized(config.block_size, size) for name, size in SIZES.items()}
    bottom = [0.0] * len(sizes)
    for label, color, heights in zip(names, colors, zip(*(split(size) for size in sizes.values()))):
        axes[1, 0].bar(list(sizes), heights, bottom=bottom, label=label, color=color, alpha=0.8)
        bottom = [b + h for b, h in zip(bottom, heights)]
    axes[1, 0].set(title=f"Training FLOPs, T = {config.block_size}", ylabel="GFLOPs per token")

    bottom = [0.0] * len(sizes)
    memories = [count_memory(size, 1, **how) for size in sizes.values()]
    stack = [[*memory.parts.values(), memory.peak - sum(memory.parts.values())] for memory in memories]
    for i, label in enumerate((*memories[0].parts, "logits, gradients in flight")):
        heights = [parts[i] / GIB for parts in stack]
        axes[1, 1].bar(list(sizes), heights, bottom=bottom, label=label, color=f"C{i}", alpha=0.8)
        bottom = [b + h for b, h in zip(bottom, heights)]
    axes[1, 1].set(title=f"Peak memory, T = {config.block_size}, batch_size = 1", ylabel="GiB")
    for axis in axes[1]:
        axis.set_xlabel("model (A, and the four sizes of GPT-2)")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="upper left")
    figure.suptitle("computed, not measured", fontsize=9)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=75)
    plt.close(figure)
    return file.getvalue()


def format_power(value, position):
    return f"{value / 1024:,.0f}k" if value >= 1024 else f"{value:g}"


def check_settings(settings: dict) -> tuple[GPTConfig, int, list[str]]:
    """(model, sequences of a step, names of GPUs) of the settings. Raises UserError for what cannot be."""
    names = [name.strip() for name in settings["gpus"].split(",") if name.strip()]
    for name in names:
        if name not in PEAK_TFLOPS:
            known = [full for full in PEAK_TFLOPS if name.lower() in full.lower()]
            raise UserError(f"gpus: {name!r} is not in device.py's table; "
                            f"try {', '.join(known) or '--peak_tflops=VALUE'}")
    for path in (Path(settings["out_dir"], name) for name in NAMES):
        if settings["out_dir"] and path.exists():
            raise UserError(f"{path} is there already; delete it yourself if you no longer need it, or give "
                            f"another --out_dir=...")
    if settings["tokenizer"] in ("", "gpt2"):
        n_vocab = GPTConfig.n_vocab
    elif settings["vocab_size"]:  # only the padded size counts: the file need not be there
        n_vocab = settings["vocab_size"]
    else:
        from bpe import load_tokenizer
        n_vocab = load_tokenizer(settings["tokenizer"]).n_vocab
    vocab_size = settings["vocab_size"] or math.ceil(n_vocab / 128) * 128
    shape = ("block_size", "n_layer", "n_head", "n_embd", "dropout", "norm_position")
    config = GPTConfig(vocab_size=vocab_size, n_vocab=n_vocab, **{key: settings[key] for key in shape})
    B, T, batch_tokens = settings["batch_size"], config.block_size, settings["batch_tokens"]
    if batch_tokens % (B * T):
        above = math.ceil(batch_tokens / (B * T)) * B * T
        raise UserError(f"batch_tokens={batch_tokens} is not a multiple of batch_size * block_size "
                        f"= {B} * {T} = {B * T}; try --batch_tokens={above}")
    return config, batch_tokens // T, names


def main(settings: dict) -> None:
    config, sequences, names = check_settings(settings)
    with torch.device("meta"):  # shapes without memory
        model = GPT(config)
    counted = sum(count_parameters(config).values()), 3 * sum(count_flops(config).values())
    own = model.num_params(), model.flops_per_token(config.block_size)
    if counted != own:
        raise UserError(f"model.py is not GPT-2: it has {own[0]:,} parameters and {own[1]:,} FLOPs per "
                        f"token, not {counted[0]:,} and {counted[1]:,}; measure the memory and speed of a "
                        f"changed model with python train_gpt2.py --dry_run")
    dtype = DTYPES[settings["dtype"]]
    how = {"width": dtype.itemsize} | {key: settings[key] for key in (
        "loss_chunk", "activation_checkpointing", "optimizer")}
    cards = [settings["gpu_memory_gb"]] if settings["gpu_memory_gb"] else list(CARDS)
    report = [
        (f"{config.n_layer} layers, {config.n_head} heads, {config.n_embd} wide, T = {config.block_size}, "
         f"{config.vocab_size:,} ids, {config.norm_position}-norm; {sequences} sequences a step"), "",
        *parameter_lines(config), "", *flops_lines(config), "",
        *memory_lines(config, settings["batch_size"], how), "",
        *fit_lines(config, sequences, how, cards), "",
        *time_lines(config, dtype, names, settings),
        *(["", *run_a_lines()] if config == RUN_A else []),
    ]
    print("\n".join(report))
    if settings["out_dir"]:
        folder = Path(settings["out_dir"])
        folder.mkdir(parents=True, exist_ok=True)
        figure = draw(config, settings["batch_size"], how)
        for name, content in zip(NAMES, ("\n".join([*report, ""]).encode(), figure)):
            write_atomically(folder / name, content)
        print(f"written to {folder}: {', '.join(NAMES)}")


if __name__ == "__main__":
    main(configure({**globals(), **train_settings()}))
