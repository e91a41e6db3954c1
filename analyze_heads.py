"""
Attention heads: what they attend to, how redundant they are, and what a GPT-2 is worth without some of them.

    python analyze_heads.py --checkpoint=log                          # -> heads/
    python analyze_heads.py --checkpoint=log --prune_fractions=       # measure only
    python analyze_heads.py --checkpoint=log --prune_heads=0:3,2:1 --out_dir=two_removed  # remove these
    python analyze_heads.py --checkpoint=log --sentence="The cell divides, and the cell grows."

Works on any checkpoint, also an imported or an already pruned one. Heads are chosen on the train split and
pruned models evaluated on the val split. out_dir, which must not exist yet, receives

    pruning.txt                      the report: perplexity, similarity, swapped patterns, roles
    heads.csv, pairs.csv             every measure of every head, and of every pair of heads of a layer
    pruning.csv                      perplexity and size of every pruned model
    attention.png                    attention maps of a sentence; mean weight by distance
    similarity.png, pruning.png      cosines by layer; perplexity against the share of heads removed
    pruned_0.15.pt, ...              pruned models, which the other scripts take like any checkpoint

Pairs. Cosines are averaged over queries (but the first), then over windows:
    pattern        attention weights. Published work calls heads above 0.85 redundant, but random weights
                   give 0.99: all of their heads attend nearly uniformly
    centred        the same minus uniform attention, 1/(t+1); undefined for a uniform head
    centred_layer  the same minus the mean over the layer's heads; n unrelated heads come to -1/(n-1)
    output         what the heads add to the residual stream
In the most similar pairs above similarity_threshold, each head attends with the other's pattern and keeps its
own values. If the loss holds, its queries and keys are redundant; the head need not be.

Heads. importance: mean |dL/dg| of a gate g = 1 on the output (Michel et al. 2019, "Are Sixteen Heads Really
Better than One?", section 4.1). ablation, mean_ablation: rise of the loss with the output replaced by zero,
and by its mean over the data. r2: share of the output's variance that the layer's other heads predict, by
least squares fitted on half of the windows and tested on the other half. previous, first: attention paid to
the token before and to the first. duplicate, induction: on random tokens repeated once, attention paid to the
earlier copy and to the token behind it (Olsson et al. 2022, "In-context Learning and Induction Heads").
entropy in nats, distance in tokens. Losses are in nats per token, standard errors over windows. "null" is the
same measure of one model with random weights.

Pruning. A criterion removes heads one by one, at most layer_cap of any layer: cosines are highest in the
first layer, and without a limit a similarity criterion removes nearly all of it. Removed heads are left out
("none"), or replaced: by their mean output, or by a least-squares fit from one partner or from all heads left
in the layer.

Cost, in forwards over 65,536 tokens (12 s on one core for 7M parameters and 48 heads): 6 for patterns, 3 for
importance, 24 for ablation (on ablation_tokens), up to 10 for swaps, 17 for greedy ablation (1.25 for each
head removed), and 40 for the pruned models of each share: 180 in all, or 36 minutes. GPT-2 small needs a GPU.

Shapes: B sequences, T tokens, nh heads of a layer, hs head size, C n_embd, N windows, H heads in all layers,
P pairs.
"""

import contextlib
import copy
import functools
import itertools
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import (
    build_model,
    checkpoint_tokenizer,
    describe_model,
    find_data_dir,
    newest_checkpoint,
    write_checkpoint,
)
from configurator import Between, OneOf, PathName, UserError, configure
from convert_hf import load_any
from decoding import KVCache
from device import TOLERANCE, Device, resolve_device
from figures import csv_bytes, pyplot, save_figure, table
from files import write_atomically
from model import GPT
from shards import WindowLoader, open_stream

checkpoint: PathName = ""  # a file, FOLDER (its newest), FOLDER:best, gpt2, ...; empty = newest of log*/
data_dir: PathName = ""  # token shards of the checkpoint's tokenizer; empty = those it was trained on
out_dir: PathName = "heads"  # a new folder for tables, figures and pruned models
sentence = "When the cat saw the dog, the cat ran up the tree, and the dog sat under the tree."  # to draw
calibration_tokens: Between(1, 10**12) = 65_536  # spread over the train split: heads are measured on these
ablation_tokens: Between(1, 10**12) = 16_384  # the same for ablation and swaps, a forward for each head
val_tokens: Between(1, 10**12) = 65_536  # the first of the val split: pruned models are evaluated on these
similarity_threshold: Between(-1, 1) = 0.85  # of pattern cosines, as published
prune_fractions = "0.05,0.15,0.3"  # shares of the heads to remove; empty = none
prune_heads = ""  # remove these instead: LAYER:HEAD,... counted from 0
layer_cap: Between(0, 1) = 0.5  # at most this share of a layer's heads, while other layers can lose some
# which of the pruned models are saved: those of this criterion, with removed heads replaced by this
criterion: OneOf("ablation", "greedy", "importance", "r2", "similarity", "random") = "ablation"
merge: OneOf("none", "mean", "partner", "layer") = "layer"
random_seeds: Between(1, 10_000) = 5  # random prunings of each size, with seed, seed + 1, ...
batch_size: Between(1, 65_536) = 8  # sequences at a time
device = "auto"  # auto|cpu|cuda|cuda:1|mps
dtype: OneOf("auto", "float32", "bfloat16", "float16") = "float32"  # of matrix products
seed: Between(0, 2**63 - 1) = 1337  # of the null, of repeated tokens and of random pruning

PAIR_MEASURES = {"pattern": "attention patterns", "centred": "minus uniform attention",
                 "centred_layer": "minus the layer's mean pattern", "output": "head outputs"}
HEAD_MEASURES = {"importance": "importance, nats per token", "ablation": "loss rise, head zeroed",
                 "mean_ablation": "loss rise, head replaced by its mean",
                 "r2": "R2 from the layer's other heads",
                 "previous": "attention to the previous token", "first": "attention to the first token",
                 "duplicate": "attention to an earlier copy",
                 "induction": "attention behind an earlier copy",
                 "entropy": "entropy, nats", "distance": "distance, tokens"}
CRITERIA = {"ablation": "ablation, one-shot", "greedy": "ablation, greedy",
            "importance": "gradient importance", "r2": "R2 from other heads",
            "similarity": "similarity, centred", "random": "at random", "chosen": "as chosen"}
MERGES = {"none": "left out", "mean": "mean output", "partner": "fit from one head",
          "layer": "fit from the layer"}
MOST_SWAPS = 20  # pairs
GREEDY_CANDIDATES = 5  # heads measured again at each step of greedy ablation: those that last cost least
SWAPS = ("head_as_other", "other_as_head")  # who attends as whom
BLOCKS, T_QUANTILE = 20, 2.093  # stretches of val; Student's t, 97.5%, 19 degrees of freedom
EXPLAINED = f"""\
Change of perplexity, +- half the 95% interval over {BLOCKS} stretches of val; at random: mean of the draws
(lowest to highest). Is all of it below 5%? yes, no (all of it above), ? (neither). 3/5: better than 3 of 5
draws treated alike, by the 95% interval of the difference over the same stretches."""
Head = tuple[int, int]  # layer, head
Batches = list[tuple[torch.Tensor, torch.Tensor]]  # x and y, (B, T) each, on the device
Moments = tuple[dict[int, np.ndarray], dict[int, np.ndarray]]  # of even and of odd windows, see `watch`


# ---- heads of a model: watching, changing, removing ----------------------------


def all_heads(model: GPT) -> list[Head]:
    """The H heads, layer by layer: the order of every vector over heads here."""
    return [(layer, head) for layer, block in enumerate(model.transformer.h)
            for head in range(block.attn.n_head)]


def all_pairs(model: GPT) -> list[tuple[int, int, int]]:
    """The P pairs (layer, head, later head): the order of every vector over pairs here."""
    return [(layer, *pair) for layer, block in enumerate(model.transformer.h)
            for pair in itertools.combinations(range(block.attn.n_head), 2)]


@contextlib.contextmanager
def watching(model: GPT, see: Callable) -> Iterator[None]:
    """Within it, every forward calls see(layer, attn, qkv (B, T, 3 nh hs), y (B, T, nh hs)) in each layer
    that has heads; c_proj takes y, or what `see` returns instead. Weights stay untouched."""
    latest, handles = {}, []
    for layer, block in enumerate(model.transformer.h):
        def keep(module, args, qkv, layer=layer):
            latest[layer] = qkv

        def show(module, args, layer=layer, attn=block.attn):
            return see(layer, attn, latest.pop(layer), args[0])

        if block.attn.n_head:
            handles += [block.attn.c_attn.register_forward_hook(keep),
                        block.attn.c_proj.register_forward_pre_hook(show)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def gated(model: GPT, gates: torch.Tensor, means: dict[int, torch.Tensor] | None = None):
    """Within it, head outputs are multiplied by `gates` (H,), or (B, H) with a row for each sequence.

    With `means` {layer: (nh hs,)}, a gate g gives g y + (1 - g) mean.
    """
    sizes = [block.attn.n_head for block in model.transformer.h]
    of_layer = torch.atleast_2d(gates).split(sizes, dim=1)  # (1 or B, nh) each

    def see(layer, attn, qkv, y):
        gate = of_layer[layer].repeat_interleave(attn.head_size, dim=-1)[:, None]  # (1 or B, 1, nh hs)
        return y * gate if means is None else (y * gate + means[layer] * (1 - gate)).to(y.dtype)

    return watching(model, see)


def masked(model: GPT, heads: Iterable[Head], means: dict[int, torch.Tensor] | None = None):
    """Within it, `heads` put out zeros, or their `means`: the slow twin of `prune`, or of folding by mean."""
    device, gone = model.lm_head.weight.device, set(heads)
    return gated(model, torch.tensor([float(head not in gone) for head in all_heads(model)], device=device),
                 means)


@contextlib.contextmanager
def swapped(model: GPT, layer: int, source: int, target: int) -> Iterator[None]:
    """Within it, head `target` of a layer attends with the pattern of head `source` and keeps its values."""
    attn = model.transformer.h[layer].attn

    def swap(module, args, qkv):
        parts = qkv.clone().unflatten(2, (3, attn.n_head, attn.head_size))  # (B, T, 3, nh, hs)
        parts[:, :, :2, target] = parts[:, :, :2, source]  # queries and keys
        return parts.flatten(2)

    handle = attn.c_attn.register_forward_hook(swap)
    try:
        yield
    finally:
        handle.remove()


def check_heads(model: GPT, heads: list[Head], what: str) -> None:
    """Raises UserError, naming the setting `what`, unless these are different heads of the model."""
    known = all_heads(model)
    for layer, head in heads:
        if (layer, head) not in known:
            left = ", ".join(f"{i}: {block.attn.n_head}" for i, block in enumerate(model.transformer.h))
            raise UserError(f"{what}: there is no head {layer}:{head}; give LAYER:HEAD, counted from 0; "
                            f"heads by layer: {left}")
    if len(set(heads)) < len(heads):
        raise UserError(f"{what}: a head is named twice; name each once")


def prune(model: GPT, heads: list[Head]) -> GPT:
    """A new model without `heads`: their rows of c_attn (in Q, in K and in V) and columns of c_proj are gone,
    and its logits are those of `masked`. A layer may lose all. Raises UserError for heads that do not exist.
    """
    check_heads(model, heads, "prune")
    weights = model.state_dict()
    counts = []
    for layer, block in enumerate(model.transformer.h):
        nh, hs, name = block.attn.n_head, block.attn.head_size, f"transformer.h.{layer}.attn."
        kept = [head for head in range(nh) if (layer, head) not in set(heads)]
        rows = torch.arange(nh * hs, device=model.lm_head.weight.device).view(nh, hs)[kept].flatten()
        for part in ("weight", "bias"):
            qkv = weights[f"{name}c_attn.{part}"]
            # QQQ KKK VVV: a head has its rows in each third
            weights[f"{name}c_attn.{part}"] = qkv.view(3, nh * hs, *qkv.shape[1:])[:, rows].flatten(0, 1)
        weights[f"{name}c_proj.weight"] = weights[f"{name}c_proj.weight"][:, rows]
        counts.append(len(kept))
    pruned = GPT(replace(model.config, heads=tuple(counts))).to(model.lm_head.weight.device)
    pruned.load_state_dict(weights)
    pruned.loss_chunk = model.loss_chunk
    return pruned.train(model.training)


# ---- what heads do -------------------------------------------------------------


def attention_patterns(attn, qkv: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Attention weights (B, nh, T, T) of a layer, computed again from what c_attn put out, qkv (float32).

    Raises UserError unless these weights times V are y (B, T, nh hs), what the layer itself computed.
    """
    B, T, _ = qkv.shape
    q, k, v = (part.view(B, T, attn.n_head, attn.head_size).transpose(1, 2)
               for part in qkv.chunk(3, dim=2))  # (B, nh, T, hs)
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    patterns = (q @ k.mT * attn.head_size**-0.5).masked_fill(future, -math.inf).softmax(dim=-1)
    again = (patterns @ v).transpose(1, 2).reshape(B, T, -1)
    distance, size = (again - y.float()).abs().max().item(), y.float().abs().max().item()
    if not distance <= TOLERANCE[y.dtype] * size:
        raise UserError(f"recomputed attention differs from the layer's own by {distance:.2e} of {size:.2e}; "
                        f"try --dtype=float32 or --device=cpu; if model.py attends in another way (RoPE, "
                        f"QK-norm), change attention_patterns too")
    return patterns


def pair_cosines(vectors: torch.Tensor) -> torch.Tensor:
    """Cosines of the heads of a layer: vectors (B, nh, R, N) -> (B, pairs), the mean over the R rows.

    Rows where either vector is zero do not count; nan where none does.
    """
    norms = vectors.norm(dim=-1, keepdim=True)
    defined = norms > 1e-6  # a uniform pattern minus 1/(t+1) is rounding
    rows = torch.where(defined, vectors / norms, 0.0).flatten(2)  # (B, nh, R * N)
    counts = defined.flatten(2).float()  # (B, nh, R)
    cosines = (rows @ rows.mT) / (counts @ counts.mT)  # (B, nh, nh)
    first, second = torch.triu_indices(vectors.size(1), vectors.size(1), 1, device=vectors.device)
    return cosines[:, first, second]


@torch.no_grad()
def each_pattern(model: GPT, x: torch.Tensor, dev: Device, use: Callable) -> None:
    """Run a forward that calls use(layer, attn, patterns (B, nh, T, T), y (B, T, nh hs)), in float32."""
    def see(layer, attn, qkv, y):
        with torch.autocast(y.device.type, enabled=False):  # or the statistics would be in 16 bits
            use(layer, attn, attention_patterns(attn, qkv.float(), y), y.float())

    with watching(model, see), dev.autocast():
        model(x, only_last=True)


def watch(model: GPT, batches: Batches, dev: Device) -> tuple[dict[str, np.ndarray], Moments]:
    """What heads do in each window: PAIR_MEASURES (N, P); previous, first, entropy and distance (N, H);
    by_distance (N, H, T), the mean weight of keys that many tokens back. Then the second moments of outputs.

    Moments are {layer: sum over tokens of (y, 1) (y, 1)^T}, float64 (nh hs + 1, nh hs + 1), of the even and
    of the odd windows. Raises UserError where attention cannot be recomputed.
    """
    values, moments, n = defaultdict(list), ({}, {}), 0

    def measure(layer, attn, patterns, y):
        t = torch.arange(y.size(1), device=y.device)
        back = (t[:, None] - t).clamp(min=0)  # [t, d] -> t - d, the key d tokens back
        by_distance = patterns.gather(3, back.expand_as(patterns)).tril()  # (B, nh, T, T), of query and d
        rows = patterns[:, :, 1:]  # the first query has one key
        uniform = (torch.ones_like(patterns[0, 0]) / (t + 1)[:, None]).tril()[1:]
        heads = y.unflatten(2, (attn.n_head, -1)).transpose(1, 2)  # (B, nh, T, hs)
        columns = attn.c_proj.weight.float().unflatten(1, (attn.n_head, -1)).permute(1, 2, 0)  # (nh, hs, C)
        for name, found in {
                "pattern": pair_cosines(rows), "centred": pair_cosines(rows - uniform),
                "centred_layer": pair_cosines(rows - rows.mean(dim=1, keepdim=True)),
                "output": pair_cosines(heads @ columns),
                "previous": rows.diagonal(dim1=2, dim2=3).mean(dim=-1), "first": rows[..., 0].mean(dim=-1),
                "entropy": torch.special.entr(rows).sum(dim=-1).mean(dim=-1),
                "distance": (by_distance[:, :, 1:] @ t.float()).mean(dim=-1),
                "by_distance": by_distance.sum(dim=2) / (len(t) - t)}.items():
            seen[name].append(found)
        for parity, of_half in enumerate(moments):
            rows = y[(n + parity) % 2::2].flatten(0, 1)  # (tokens, nh hs)
            rows = torch.nn.functional.pad(rows, (0, 1), value=1.0).cpu().double()
            of_half[layer] = of_half.get(layer, 0.0) + (rows.T @ rows).numpy()

    for x, _ in batches:
        seen = defaultdict(list)
        each_pattern(model, x, dev, measure)
        n += len(x)
        for name, parts in seen.items():
            values[name].append(torch.cat(parts, dim=1).cpu().double().numpy())
    return {name: np.concatenate(parts) for name, parts in values.items()}, moments


def repeated_scores(model: GPT, dev: Device, n: int = 32) -> dict[str, np.ndarray]:
    """duplicate and induction (n, H) on n sequences of random tokens, each repeated once."""
    length = model.config.block_size // 2
    half = np.random.default_rng(seed).integers(max(1, model.config.n_vocab - 1), size=(n, length))
    scores = []

    def measure(layer, attn, patterns, y):
        seen.append(torch.stack([patterns.diagonal(-back, dim1=2, dim2=3)[..., -length:].mean(dim=-1)
                                 for back in (length, length - 1)]))  # (2, B, nh)

    for first in range(0, n, batch_size):
        seen = []
        each_pattern(model, dev.to_device(np.tile(half[first:first + batch_size], 2)), dev, measure)
        scores.append(torch.cat(seen, dim=2).cpu().double().numpy())
    return dict(zip(("duplicate", "induction"), np.concatenate(scores, axis=1)))


def importance(model: GPT, batches: Batches, dev: Device) -> np.ndarray:
    """|dL/dg| for the gates g (N, H): L the loss of a window, nats per token (Michel et al. 2019, 4.1)."""
    found = []
    for x, y in batches:
        gates = torch.ones(len(x), len(all_heads(model)), device=x.device, requires_grad=True)
        with gated(model, gates), dev.autocast():
            loss = model(x, y, reduction="sum") / y.size(1)
        found.append(torch.autograd.grad(loss, gates)[0].abs().cpu().double().numpy())
    return np.concatenate(found)


@torch.no_grad()
def window_losses(model: GPT, batches: Batches, dev: Device) -> np.ndarray:
    """Mean loss of each window, nats per token, float64 (N,)."""
    found = []
    for x, y in batches:
        with dev.autocast():
            found.append(model(x, y, reduction="none").float().mean(dim=1).cpu().double().numpy())
    return np.concatenate(found)


def loss_rises(model: GPT, batches: Batches, dev: Device, label: str, changes: list) -> np.ndarray:
    """Loss of each window within each of the contexts `changes`, minus its loss without: (N, changes)."""
    unchanged, rises = window_losses(model, batches, dev), []
    for change in tqdm(changes, label, leave=False, disable=None):
        with change:
            rises.append(window_losses(model, batches, dev) - unchanged)
    return np.array(rises).reshape(len(rises), len(unchanged)).T


def swap_rises(model: GPT, batches: Batches, dev: Device, cosines: np.ndarray) -> dict[str, np.ndarray]:
    """head_as_other, other_as_head (N, P): the rise of the loss when one head of a pair attends as the other.
    nan for all but the pairs with the highest cosines (P,)."""
    pairs, found = all_pairs(model), {}
    alike = [i for i in np.argsort(-cosines) if cosines[i] > similarity_threshold][:MOST_SWAPS]
    rises = loss_rises(model, batches, dev, "swapped patterns", [
        swapped(model, layer, *order) for layer, a, b in (pairs[i] for i in alike)
        for order in ((b, a), (a, b))])  # (N, 2 alike)
    for k, name in enumerate(SWAPS):
        found[name] = np.full((len(rises), len(pairs)), np.nan)
        found[name][:, alike] = rises[:, k::2]
    return found


# ---- predicting one head from others -------------------------------------------


def columns_of(model: GPT, layer: int, heads: Iterable[int]) -> list[int]:
    """Columns of y that these heads of a layer fill."""
    hs = model.config.head_size
    return [column for head in heads for column in range(head * hs, (head + 1) * hs)]


def fit(sums: np.ndarray, known: list[int], target: list[int]) -> np.ndarray:
    """Least squares from second moments: the map (known, target) of columns `known` to columns `target`."""
    # directions with 1e-5 of the largest amplitude are rounding; fitted to, they would get huge weights
    return np.linalg.lstsq(sums[np.ix_(known, known)], sums[np.ix_(known, target)], 1e-10)[0]


def left_over(fit_on: np.ndarray, test_on: np.ndarray, known: list[int], target: list[int],
              weight: np.ndarray) -> float:
    """Squared error of what columns `known` predict of weight (C, target) @ y[target], summed over tokens:
    fitted on one set of second moments, tested on another."""
    columns, coef = [*target, *known], np.concatenate((np.eye(len(target)), -fit(fit_on, known, target)))
    return np.trace(weight @ coef.T @ test_on[np.ix_(columns, columns)] @ coef @ weight.T)


def r2(model: GPT, moments: Moments, layer: int, head: int, others: Iterable[int]) -> np.ndarray:
    """R2 of what a head adds to the residual stream, from the outputs of `others` and a constant: (2,),
    fitted on either half of the windows and tested on the other. 1 for a head whose output is constant."""
    weight = model.transformer.h[layer].attn.c_proj.weight.detach().cpu().double().numpy()  # (C, nh hs)
    target, constant, found = columns_of(model, layer, [head]), [weight.shape[1]], []
    known, weight = columns_of(model, layer, others) + constant, weight[:, target]
    for one, other in ((0, 1), (1, 0)):
        of = (moments[one][layer], moments[other][layer])
        size = np.trace(weight @ of[1][np.ix_(target, target)] @ weight.T)
        error, variance = (left_over(*of, columns, target, weight) for columns in (known, constant))
        found.append(1.0 - error / variance if variance > 1e-9 * size else 1.0)  # below, it is rounding
    return np.array(found)


def mean_outputs(model: GPT, moments: Moments) -> dict[int, torch.Tensor]:
    """{layer: mean of y over tokens (nh hs,)}, on the model's device."""
    sums = {layer: moments[0][layer] + moments[1][layer] for layer in moments[0]}
    return {layer: torch.from_numpy(square[:-1, -1] / square[-1, -1]).float().to(model.lm_head.weight.device)
            for layer, square in sums.items()}


def fold(model: GPT, heads: list[Head], how: str, moments: Moments) -> GPT:
    """`model` without `heads`; `how` is one of MERGES. No training.

    The output of a removed head, y_d (hs,), is fitted as an affine map of other heads in its layer, over the
    calibration tokens; that map, times the head's columns of c_proj, is added to the others' columns and to
    the bias. The partner is the head left with the highest R2.
    """
    if how == "none":
        return prune(model, heads)
    folded = copy.deepcopy(model)
    for layer in sorted({layer for layer, _ in heads}):
        attn, sums = folded.transformer.h[layer].attn, moments[0][layer] + moments[1][layer]
        weight = model.transformer.h[layer].attn.c_proj.weight.detach().cpu().double().numpy()
        left = [head for head in range(attn.n_head) if (layer, head) not in heads]
        change = np.zeros((len(weight), weight.shape[1] + 1))  # of the weight and the bias
        for head in (head for other, head in heads if other == layer):
            if how == "partner" and left:
                others = [max(left, key=lambda other: r2(model, moments, layer, head, [other]).mean())]
            else:
                others = left if how == "layer" else []
            known, target = (columns_of(model, layer, some) for some in (others, [head]))
            known.append(weight.shape[1])  # the constant 1
            change[:, known] += weight[:, target] @ fit(sums, known, target).T
        change = torch.from_numpy(change).float().to(attn.c_proj.weight.device)
        with torch.no_grad():
            attn.c_proj.weight += change[:, :-1]
            attn.c_proj.bias += change[:, -1]
    return prune(folded, heads)


# ---- which heads to remove -----------------------------------------------------


def select(model: GPT, n: int, choose: Callable) -> list[Head]:
    """`n` heads, each choose(allowed, removed): from layers that have not lost layer_cap of their heads, or
    from any once no layer can."""
    heads, removed = all_heads(model), []
    caps = [max(1, int(layer_cap * block.attn.n_head)) for block in model.transformer.h]
    while len(removed) < n:
        left = [head for head in heads if head not in removed]
        allowed = [head for head in left if sum(head[0] == layer for layer, _ in removed) < caps[head[0]]]
        removed.append(choose(allowed or left, removed))
    return removed


def smallest(score: Callable) -> Callable:
    """For `select`: the head with the smallest score(head, removed)."""
    return lambda allowed, removed: min(allowed, key=lambda head: score(head, removed))


def greedy(loss: Callable, rises: dict[Head, float]) -> Callable:
    """For `select`: the head whose removal raises loss(heads removed) least.

    Of the heads left, only the GREEDY_CANDIDATES whose rise was smallest when last measured are measured
    again. `rises` is what was measured with all heads in place.
    """
    rises, losses = dict(rises), {(): loss([])}

    def choose(allowed, removed):
        candidates = sorted(allowed, key=rises.get)[:GREEDY_CANDIDATES]
        for head in candidates:
            losses[*removed, head] = loss([*removed, head])
            rises[head] = losses[*removed, head] - losses[*removed,]
        return min(candidates, key=rises.get)

    return choose


def removal_orders(model: GPT, n: int, means: dict[str, np.ndarray], moments: Moments, batches: Batches,
                   dev: Device) -> dict[str, list[Head]]:
    """The first `n` heads that each criterion but `random` removes; `means` (H,) or (P,) of the measures."""
    heads, layers = all_heads(model), np.array([layer for layer, _ in all_heads(model)])
    norms = np.sqrt(np.bincount(layers, means["importance"]**2))[layers]  # L2 over the layer, as in the paper
    relative = dict(zip(heads, means["importance"] / np.where(norms > 0, norms, 1.0)))
    ablation = dict(zip(heads, means["ablation"]))
    cosines = {frozenset(((layer, a), (layer, b))): value if value == value else -1.0
               for (layer, a, b), value in zip(all_pairs(model), means["centred"])}

    def similarity(head, removed):  # of the most similar pair the less important head
        others = [cosines[frozenset((head, other))] for other in heads
                  if other[0] == head[0] and other != head and other not in removed]
        return -max(others, default=-1.0), relative[head]

    @functools.cache
    def unpredicted(head, others):
        return -r2(model, moments, *head, others).mean()

    def loss(removed):
        with masked(model, removed):
            return window_losses(model, batches, dev).mean()

    choices = {
        "ablation": smallest(lambda head, removed: ablation[head]), "greedy": greedy(loss, ablation),
        "importance": smallest(lambda head, removed: relative[head]), "similarity": smallest(similarity),
        "r2": smallest(lambda head, removed: unpredicted(head, tuple(
            other for layer, other in heads if layer == head[0] and (layer, other) not in [head, *removed])))}
    return {name: select(model, n, choices[name])
            for name in tqdm(choices, "choosing heads", leave=False, disable=None)}


def count_heads(share: float, n_heads: int) -> int:
    """Heads that a share of them is, to the nearest."""
    return math.floor(share * n_heads + 0.5)


# ---- what a pruned model is worth ----------------------------------------------


def cache_bytes(model: GPT, dtype: torch.dtype) -> int:
    """Bytes of the KV cache for one token, counted on a real one."""
    cache = KVCache(model.config, 1, model.lm_head.weight.device, dtype)
    return sum(tensor.nbytes for tensor in (*cache.k, *cache.v)) // model.config.block_size


def interval(rises: np.ndarray) -> tuple[float, float, float]:
    """(change, low, high) of perplexity from the rise of each window's loss (N,): a 95% interval over BLOCKS
    stretches of val, as windows of one document are alike; nan where there are fewer windows."""
    half = math.nan
    if len(rises) >= BLOCKS:
        blocks = np.array([part.mean() for part in np.array_split(rises, BLOCKS)])
        half = T_QUANTILE * blocks.std(ddof=1) / math.sqrt(BLOCKS)
    return tuple(math.expm1(rises.mean() + step) for step in (0.0, -half, half))


@torch.no_grad()
def check_pruned(model: GPT, pruned: GPT, heads: list[Head], batches: Batches, dev: Device) -> None:
    """Raises UserError unless the pruned model's logits are those of the model with these heads masked."""
    x = batches[0][0][:1]
    with dev.autocast(), masked(model, heads):
        expected = model(x).float()
    with dev.autocast():
        distance, size = (pruned(x).float() - expected).abs().max().item(), expected.abs().max().item()
    if not distance <= TOLERANCE[dev.dtype] * size:
        raise UserError(f"without {len(heads)} heads the logits differ by {distance:.2e} of {size:.2e} from "
                        f"those with the same heads masked; try --dtype=float32 or --device=cpu")


def sweep(model: GPT, orders: dict[tuple[str, int], list[Head]], shares: list[float], moments: Moments,
          batches: Batches, dev: Device, keep: Callable) -> list[dict]:
    """A row for every (criterion, seed), share and merge; `rises` in it are those of each window's loss (N,).

    orders {(criterion, seed or ""): heads in the order of their removal}. Each model goes to keep(row, model,
    heads removed).
    """
    n_heads, unpruned = len(all_heads(model)), window_losses(model, batches, dev)
    rows, rises = [], {}
    jobs = [*itertools.product(shares, orders, MERGES)]
    for share, (name, number), how in tqdm(jobs, "pruning", leave=False, disable=None):
        heads = orders[name, number][:count_heads(share, n_heads)]
        pruned = fold(model, heads, how, moments)
        same = frozenset(heads), how  # criteria may agree
        if same not in rises:
            if how == "none":
                check_pruned(model, pruned, heads, batches, dev)
            rises[same] = window_losses(pruned, batches, dev) - unpruned
        change, low, high = interval(rises[same])
        rows.append({"share": share, "criterion": name, "seed": number, "merge": how,
                     "perplexity": math.exp((unpruned + rises[same]).mean()), "change": change, "low": low,
                     "high": high, "heads": n_heads - len(heads), "params": pruned.num_params(),
                     "flops_per_token": pruned.flops_per_token(model.config.block_size) // 3,  # of a forward
                     "cache_bytes": cache_bytes(pruned, dev.dtype), "rises": rises[same],
                     "removed": " ".join(f"{layer}:{head}" for layer, head in sorted(heads))})
        keep(rows[-1], pruned, heads)
    return rows


# ---- the report ----------------------------------------------------------------


def shown(number: float, form: str = ".3f") -> str:
    """The number, or a dash where there is none."""
    return format(number, form) if number == number else "-"


def agreement(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation of two vectors without their nan; nan where one is constant or too short."""
    both = np.isfinite(a) & np.isfinite(b)
    a, b = a[both], b[both]
    return float(np.corrcoef(a, b)[0, 1]) if len(a) > 1 and np.ptp(a) > 0 < np.ptp(b) else math.nan


def measure_lines(heading: str, values: dict[str, np.ndarray], null: dict[str, np.ndarray],
                  titles: dict[str, str], places: list[tuple]) -> list[str]:
    """A table of measures: mean, extremes and where the highest is, beside random weights; and how well the
    two halves of the data agree."""
    rows = []
    for name in (name for name in titles if name in values):
        mean = values[name].mean(axis=0)
        at_random = np.nanmean(null[name].mean(axis=0)) if name in null else math.nan
        if not np.isfinite(mean).any():
            continue
        layer, *at = places[int(np.nanargmax(mean))]
        halves = agreement(values[name][::2].mean(axis=0), values[name][1::2].mean(axis=0))
        rows.append([titles[name], shown(np.nanmean(mean), ".4f"), shown(at_random, ".4f"),
                     shown(np.nanmin(mean), ".4f"), shown(np.nanmax(mean), ".4f"),
                     f"{layer}:{','.join(map(str, at))}", shown(halves)])
    return table([heading, "mean", "random weights", "lowest", "highest", "at", "halves agree"], rows)


def pruning_lines(rows: list[dict], share: float) -> list[str]:
    """Change of perplexity by criterion and merge with `share` of the heads removed, see EXPLAINED."""
    groups = defaultdict(lambda: defaultdict(list))  # criterion, merge -> its rows, one for each seed
    for row in rows:
        if row["share"] == share:
            groups[row["criterion"]][row["merge"]].append(row)

    def cell(name, how):
        same = groups[name][how]
        if name == "random":
            changes = [row["change"] for row in same]
            low, high = min(changes), max(changes)
            text = f"{np.mean(changes):+.1%} ({low:.1%} to {high:.1%})"
        else:
            change, low, high = (same[0][key] for key in ("change", "low", "high"))
            text = f"{change:+.1%} +-{shown((high - low) / 2, '.1%')}"
        text += " yes" if high < 0.05 else " no" if low > 0.05 else " ?"
        better = [interval(row["rises"] - same[0]["rises"])[1] > 0 for row in groups["random"][how]]
        return text + (f" {sum(better)}/{len(better)}" if better and name != "random" else "")

    return table([f"{share:.0%} of the heads removed", *MERGES.values()],
                 [[CRITERIA[name], *(cell(name, how) for how in MERGES)] for name in [*groups]])


def swap_lines(pairs: list[dict], ablation: dict[Head, float]) -> list[str]:
    """The table of swapped patterns, and its medians beside those of ablation."""
    rows, swaps, zeroed = [], [], []
    for pair in pairs:
        layer, head, other = (pair[key] for key in ("layer", "head", "other"))
        changes = [*(pair[name] for name in SWAPS), ablation[layer, head], ablation[layer, other]]
        if changes[0] == changes[0]:
            swaps, zeroed = swaps + changes[:2], zeroed + changes[2:]
            rows.append([f"{layer}:{head},{other}", *(shown(pair[name]) for name in PAIR_MEASURES),
                         *(f"{change:+.4f}" for change in changes)])
    if not rows:
        return [f"no pair's patterns have a cosine above {similarity_threshold}"]
    return [*table(["heads a,b", "pattern", "centred", "by layer", "output", "a attends as b", "b as a",
                    "a zeroed", "b zeroed"], rows),
            (f"median rise of the loss: {np.median(swaps):.4f} with the other's pattern, "
             f"{np.median(zeroed):.4f} with the head zeroed")]


def table_rows(keys: tuple[str, ...], places: list[tuple], values: dict[str, np.ndarray],
               null: dict[str, np.ndarray], names: Iterable[str]) -> list[dict]:
    """A row for each place: of each measure its mean, the standard error over windows, and its null."""
    columns = {}
    for name in (name for name in names if name in values):
        columns[name] = values[name].mean(axis=0)
        if name != "r2":  # which has two values, not one of each window
            columns[f"{name}_se"] = values[name].std(axis=0, ddof=1) / math.sqrt(len(values[name]))
        if name in null:
            columns[f"{name}_null"] = null[name].mean(axis=0)
    return [dict(zip(keys, place)) | {key: column[i] for key, column in columns.items()}
            for i, place in enumerate(places)]


# ---- figures -------------------------------------------------------------------


def draw_attention(model: GPT, tok, dev: Device, by_distance: np.ndarray) -> None:
    """Attention maps of `sentence`, a row of heads for each layer, and mean weight by distance (H, T)."""
    ids, maps = sentence_ids(tok, model.config.block_size), {}

    def keep(layer, attn, patterns, y):
        future = torch.ones_like(patterns[0], dtype=torch.bool).triu(1)
        maps[layer] = patterns[0].masked_fill(future, math.nan).cpu().numpy()

    each_pattern(model, dev.to_device(ids[None]), dev, keep)
    labels = [tok.decode([int(i)]).replace("\n", "\\n").replace("$", r"\$") for i in ids]
    counts = [block.attn.n_head for block in model.transformer.h]
    plt, columns = pyplot(), max(counts)
    side = max(1.1, 5 / columns)  # inches
    figure, axes = plt.subplots(len(counts), columns + 1, squeeze=False, layout="constrained", figsize=(
        side * (columns + 2.4), side * len(counts) + 1.2), width_ratios=[1] * columns + [2])
    readable = side * 72 / len(ids) > 6  # points for each token
    curves = dict(zip(all_heads(model), by_distance))
    for layer, row in enumerate(axes):
        for head, axis in enumerate(row[:-1]):
            axis.set(xticks=[], yticks=[])
            if head >= counts[layer]:
                axis.set_axis_off()
                continue
            axis.imshow(maps[layer][head], vmin=0, vmax=1, cmap="magma_r", aspect="auto")
            axis.set_title(f"head {head}", fontsize=8, color=plt.cm.tab10(head % 10), pad=2)
            row[-1].plot(range(1, 1 + by_distance.shape[1]), curves[layer, head], linewidth=1,
                         color=plt.cm.tab10(head % 10))
            if readable and head == 0:
                axis.set_yticks(range(len(ids)), labels, fontsize=6)
            if readable and layer == len(counts) - 1:
                axis.set_xticks(range(len(ids)), labels, fontsize=6, rotation=90)
        row[0].set_ylabel(f"layer {layer}", fontsize=9)
        row[-1].set(xscale="log", yscale="log", ylim=(1e-4, 1.2), xlim=(1, by_distance.shape[1]))
        row[-1].tick_params(labelsize=7)
        row[-1].grid(alpha=0.3)
    axes[0, -1].set_title("mean weight by distance", fontsize=8)
    axes[-1, -1].set_xlabel("1 + tokens back", fontsize=8)
    text = "|".join(labels)
    figure.suptitle("Attention: queries from top to bottom, keys from left to right, dark is 1\n"
                    + (text if len(text) < 120 else text[:119] + "..."), fontsize=10)
    save_figure(figure, Path(out_dir, "attention.png"))


def draw_similarity(model: GPT, means: dict[str, np.ndarray], null: dict[str, np.ndarray]) -> None:
    """Head against head for each layer, pattern cosines below the diagonal and centred ones above; last, the
    pairs above the threshold by layer. `means` and `null` (P,)."""
    counts, pairs = [block.attn.n_head for block in model.transformer.h], np.array(all_pairs(model))
    columns = min(4, len(counts) + 1)
    rows = math.ceil((len(counts) + 1) / columns)
    plt = pyplot()
    figure, axes = plt.subplots(rows, columns, figsize=(2.5 * columns + 1, 2.6 * rows + 0.7), squeeze=False,
                                layout="constrained")
    for axis in axes.flat[len(counts) + 1:]:
        axis.set_axis_off()
    for layer, (axis, nh) in enumerate(zip(axes.flat, counts)):
        square, here = np.full((nh, nh), np.nan), pairs[:, 0] == layer
        square[pairs[here, 2], pairs[here, 1]] = means["pattern"][here]
        square[pairs[here, 1], pairs[here, 2]] = means["centred"][here]
        axis.set_title(f"layer {layer}" if here.any() else f"layer {layer}: no pairs", fontsize=9)
        if not here.any():
            axis.set_axis_off()
            continue
        image = axis.imshow(square, vmin=-1, vmax=1, cmap="RdBu_r")
        ticks = range(0, nh, math.ceil(nh / 8))
        axis.set(xticks=ticks, yticks=ticks, xlabel="head", ylabel="head")
    figure.colorbar(image, ax=axes, label="mean cosine", shrink=0.8)
    axis = axes.flat[len(counts)]
    for i, (label, cosines) in enumerate({"this model": means["pattern"], "centred": means["centred"],
                                          "random weights": null["pattern"]}.items()):
        above = np.bincount(pairs[cosines > similarity_threshold, 0], minlength=len(counts))
        axis.bar(np.arange(len(counts)) + 0.27 * (i - 1), above, 0.27, label=label, color=f"C{i}")
    axis.set_title(f"pairs above {similarity_threshold:g}", fontsize=9)
    axis.set(xticks=range(len(counts)), xlabel="layer", ylim=(0, 1.6 * np.bincount(pairs[:, 0]).max()))
    axis.legend(fontsize=7)
    figure.suptitle("Similarity of attention patterns\nbelow the diagonal: cosine; above: after subtracting "
                    "uniform attention")
    save_figure(figure, Path(out_dir, "similarity.png"))


def draw_pruning(rows: list[dict]) -> None:
    """Change of perplexity against the share of heads removed, a panel for each way of replacing them."""
    plt, shares = pyplot(), sorted({row["share"] for row in rows})
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), sharex=True, sharey=True, layout="constrained")
    for axis, (how, title) in zip(axes.flat, MERGES.items()):
        for i, name in enumerate(dict.fromkeys(row["criterion"] for row in rows)):
            same = [[[100 * row[key] for key in ("change", "low", "high")] for row in rows
                     if (row["criterion"], row["merge"], row["share"]) == (name, how, share)]
                    for share in shares]
            if not all(same):
                continue
            change, low, high = np.array([np.mean(at, axis=0) for at in same]).T
            style = {"color": f"C{i}", "marker": "o"}
            if name == "random":
                low, high = np.array([[min(at)[0], max(at)[0]] for at in same]).T
                style = {"color": "gray", "linestyle": "--"}
            x = 100 * np.array(shares) + 0.25 * (i - 2)  # or bars would cover each other
            axis.errorbar(x, change, np.nan_to_num([change - low, high - change]), markersize=4, capsize=3,
                          label=CRITERIA[name], **style)
        axis.axhline(5, color="black", linestyle=":", linewidth=1)
        axis.set_yscale("symlog", linthresh=1)
        axis.set_yticks([0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000])
        axis.set_yticks([], minor=True)
        axis.yaxis.set_major_formatter(lambda value, position: f"{value:g}%")
        axis.set_xticks([100 * share for share in shares], [f"{share:.0%}" for share in shares])
        axis.set_title(title)
        axis.grid(alpha=0.3)
    changes = [100 * row["change"] for row in rows]
    axes[0, 0].set_ylim(min(-0.1, 1.2 * min(changes)), 1.3 * max(changes) + 1)
    axes[0, 0].legend(fontsize=8)
    figure.supxlabel("heads removed")
    figure.supylabel("change of perplexity")
    figure.suptitle("Perplexity without some heads, by what takes their place. Dotted: 5%\nBars: 95% over "
                    f"{BLOCKS} stretches of val; at random: lowest to highest draw")
    save_figure(figure, Path(out_dir, "pruning.png"))


# ---- the script ----------------------------------------------------------------


def check_settings() -> tuple[list[float], list[Head]]:
    """(shares, chosen heads) of the settings. Raises UserError for what does not fit."""
    try:
        shares = {float(part) for part in prune_fractions.split(",") if part.strip()}
    except ValueError:
        shares = {math.nan}
    if not all(0 < share < 1 for share in shares):
        raise UserError(f"prune_fractions={prune_fractions}: give numbers above 0 and below 1 with commas "
                        f"between them, such as 0.15,0.3")
    chosen = []
    for part in prune_heads.split(",") if prune_heads else []:
        layer, colon, head = part.strip().partition(":")
        if not (colon and layer.isdecimal() and head.isdecimal()):
            raise UserError(f"prune_heads={prune_heads}: {part!r} is no head; give LAYER:HEAD, counted from "
                            f"0, with commas between them, such as 0:3,2:1")
        chosen.append((int(layer), int(head)))
    return sorted(shares), chosen


def sentence_ids(tok, T: int) -> np.ndarray:
    """The first T ids of `sentence`. Raises UserError for fewer than two."""
    ids = tok.encode(sentence)[:T].astype(np.int64)
    if len(ids) < 2:
        raise UserError(f"sentence={sentence!r} has fewer than two tokens; give a longer --sentence")
    return ids


def open_batches(state: dict, source: str, tok, T: int, dev: Device) -> tuple[Batches, Batches, Batches]:
    """Windows for calibration and for ablation, spread over the train split, and the first of val."""
    folder, found = find_data_dir(state, source, data_dir), []
    if T < 4:
        raise UserError(f"{source} has a context of {T} tokens, too short to compare heads; name another "
                        f"--checkpoint, with 4 or more")
    for split, n_tokens in (("train", calibration_tokens), ("train", ablation_tokens), ("val", val_tokens)):
        loader = WindowLoader(open_stream(folder, split, tok, T), T, T, seed, tok.n_vocab, shuffle=False)
        n = min(loader.n_windows, max(4, n_tokens // T))  # 4: two for each half
        if split == "train" and n < 4:
            raise UserError(f"data_dir={folder} has {n} train windows of {T} tokens, 4 are needed to measure "
                            f"heads on; build more data with fineweb.py")
        ids = np.linspace(0, loader.n_windows - 1, n).astype(np.int64) if split == "train" else np.arange(n)
        found.append([tuple(map(dev.to_device, loader.read_windows(ids[first:first + batch_size])))
                      for first in range(0, n, batch_size)])
    return tuple(found)


def main() -> None:
    shares, chosen = check_settings()
    dev = resolve_device(device, dtype)
    source = checkpoint or newest_checkpoint()
    state = load_any(source)
    tok = checkpoint_tokenizer(state)
    model = build_model(state, str(source)).to(dev.device).requires_grad_(False)
    for key in ("model", "optimizers"):  # more than the model itself takes
        state.pop(key, None)
    model.loss_chunk = dev.loss_chunk
    heads, pairs, T = all_heads(model), all_pairs(model), model.config.block_size
    if not heads:
        raise UserError(f"checkpoint {source}: it has no heads left to analyze or to remove")
    check_heads(model, chosen, f"prune_heads={prune_heads}")
    sentence_ids(tok, T)
    calibration, few, val = open_batches(state, source, tok, T, dev)
    try:
        Path(out_dir).mkdir(parents=True)  # a second run into the same folder fails here
    except FileExistsError as error:
        raise UserError(f"out_dir={out_dir} exists already; name a new folder with --out_dir=ANOTHER, or "
                        f"remove this one") from error
    measured_on, evaluated_on = (T * sum(len(x) for x, _ in batches) for batches in (calibration, val))
    title = (f"{source}, step {state['step']}: {len(heads)} heads in {model.config.n_layer} layers; measured "
             f"on {measured_on:,} train tokens, evaluated on {evaluated_on:,} val tokens")
    print(title, flush=True)

    # ---- measure
    torch.manual_seed(seed)
    random_model = GPT(model.config).to(dev.device).eval().requires_grad_(False)
    null = watch(random_model, calibration, dev)[0] | repeated_scores(random_model, dev)
    values, moments = watch(model, calibration, dev)
    values |= repeated_scores(model, dev) | {"importance": importance(model, calibration, dev)}
    values["r2"] = np.stack([r2(model, moments, layer, head, [other for at, other in heads if (
        at == layer and other != head)]) for layer, head in heads], axis=1)
    if not chosen:
        for name, outputs in (("ablation", None), ("mean_ablation", mean_outputs(model, moments))):
            masks = [masked(model, [head], outputs) for head in heads]
            values[name] = loss_rises(model, few, dev, name, masks)
    means = {name: value.mean(axis=0) for name, value in values.items()}
    if pairs and not chosen:
        values |= swap_rises(model, few, dev, means["pattern"])
    lines = ["", *measure_lines("heads", values, null, HEAD_MEASURES, heads), ""]
    pair_rows = table_rows(("layer", "head", "other"), pairs, values, null, (*PAIR_MEASURES, *SWAPS))
    if pairs:
        lines += measure_lines("cosines of pairs", values, null, PAIR_MEASURES, pairs)
        if not chosen:
            lines += ["", *swap_lines(pair_rows, dict(zip(heads, means["ablation"])))]
        draw_similarity(model, means, {name: value.mean(axis=0) for name, value in null.items()})
    write("heads.csv", csv_bytes(table_rows(("layer", "head"), heads, values, null, HEAD_MEASURES)))
    write("pairs.csv", csv_bytes(pair_rows) if pairs else b"layer,head,other\n")
    draw_attention(model, tok, dev, means["by_distance"])

    # ---- prune
    counts = {count_heads(share, len(heads)): share for share in reversed(shares)}  # the lowest of each
    shares = [len(chosen) / len(heads)] if chosen else sorted(counts[n] for n in counts if n)
    if shares:
        n = count_heads(shares[-1], len(heads))
        orders = {("chosen", ""): chosen} if chosen else {
            (name, ""): order
            for name, order in removal_orders(model, n, means, moments, few, dev).items()}
        for number in range(seed, seed + random_seeds):
            rank = random.Random(number).sample(heads, len(heads)).index
            orders["random", number] = select(model, n, smallest(lambda head, removed, rank=rank: rank(head)))
        saved = next(key for key in orders if key[0] == ("chosen" if chosen else criterion)), merge

        def keep(row, pruned, removed):
            if ((row["criterion"], row["seed"]), row["merge"]) == saved:
                name = Path(out_dir, "pruned.pt" if chosen else f"pruned_{row['share']}.pt")
                save_pruned(state, source, pruned, removed, name)

        rows = sweep(model, orders, shares, moments, val, dev, keep)
        write("pruning.csv", csv_bytes([{key: row[key] for key in row if key != "rises"} for row in rows]))
        draw_pruning(rows)
        shares.sort(key=lambda share: abs(share - 0.15))  # the published one first
        tables = (line for share in shares for line in ("", *pruning_lines(rows, share)))
        lines = ["", EXPLAINED, *tables, *lines]
    print("\n".join(lines), flush=True)
    write("pruning.txt", "\n".join([title, *lines, ""]).encode())


def save_pruned(state: dict, source: str, pruned: GPT, removed: list[Head], path: Path) -> None:
    """Write a model without `removed` heads as a checkpoint that is no run: it has no optimizers."""
    kept = {key: state[key] for key in ("step", "config", "tokenizer", "data", "provenance") if key in state}
    write_checkpoint(path, {
        **kept, "model": pruned.state_dict(), "model_config": describe_model(pruned),
        "pruned": {"from": str(source), "removed": [list(head) for head in sorted(removed)], "merge": merge}})


def write(name: str, content: bytes) -> None:
    write_atomically(Path(out_dir, name), content)


if __name__ == "__main__":
    configure(globals())
    main()
