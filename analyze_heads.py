"""
Attention heads: what they attend to, how redundant they are, and what a GPT-2 loses without some of them.

    python analyze_heads.py --checkpoint=log                          # -> heads/
    python analyze_heads.py --checkpoint=log --prune_fractions=       # measure only
    python analyze_heads.py --checkpoint=log --sentence="The cell divides, and the cell grows."

Works on any checkpoint, also an imported or an already pruned one. Heads are measured and chosen on the train
split, pruned models evaluated on the val split, both on windows spread over all of it. out_dir, a new folder,
receives the report pruning.txt, three tables (heads, pairs, pruning), three figures (attention, similarity,
pruning) and pruned models (pruned_0.15.pt, ...), which other scripts take as checkpoints.

Losses are in nats per token. "+-", and `_95` in a table, is half the 95% interval over 20 stretches of the
split. `_null` is the same measure of a model with random weights: only the difference was learned.

Pairs of heads: cosines of attention patterns, averaged over queries (except the first), then over windows.
    pattern        raw. Published work calls heads above 0.85 redundant, but random weights give 0.99, as all
                   of their heads attend nearly uniformly
    centred        minus uniform attention, 1/(t+1); undefined for a uniform head
    centred_layer  minus the mean over the layer's heads; n unrelated heads come to -1/(n-1)
In pairs above similarity_threshold, either head attends with the other's pattern and keeps its own values
(head_as_other, other_as_head). Where this costs about 0, its queries and keys are redundant; where it costs
less than `uniform`, the other's pattern is of use to it. Neither shows that the head can go.

Heads:
    importance     mean |dL/dg| of a gate g = 1 on the output (Michel et al. 2019, "Are Sixteen Heads Really
                   Better than One?", 4.1)
    ablation, mean_ablation, uniform    rise of the loss with the output replaced by zero, by its mean over
                   the data, by that of uniform attention
    r2             share of the output's variance that the layer's other heads predict: least squares, fitted
                   on half of the windows, tested on the rest. Random weights give 0.87 to 0.98, as 7 heads
                   of 32 span 224 of 256 dimensions
    previous, first    attention paid to the previous and to the first token
    duplicate, induction    on random tokens repeated once: attention paid to the earlier copy, and to the
                   token after it (Olsson et al. 2022, "In-context Learning and Induction Heads")
    entropy in nats, distance in tokens

Pruning: a criterion removes heads one by one, at most layer_cap of a layer while others can lose some. They
are left out ("none"), or replaced: by their mean output, or by a least-squares fit from one partner or from
all heads left in the layer. Fits use activations of the unpruned model. The result to report is the cell of
`criterion` and `merge`, chosen before the run: the best of all cells is also the luckiest.

Cost, in forwards over 65,536 tokens (12 s on one core for 7M parameters and 48 heads; 25 s on a busy one):
9 for patterns and importance, 36 for ablation and uniform attention, 0.5 for each pair swapped, 1.25 for each
head removed (by greedy ablation), 44 for the pruned models of each share. GPT-2 small needs a GPU.

Shapes: B sequences, T tokens, nh heads of a layer, hs head size, C n_embd, N windows, H heads in all layers,
P pairs.
"""

import contextlib
import copy
import functools
import itertools
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import describe_model, find_data_dir, write_checkpoint
from configurator import Between, OneOf, PathName, UserError, configure
from convert_hf import open_model
from device import TOLERANCE, Device, resolve_device
from figures import csv_bytes, pyplot, save_figure, table
from files import write_atomically
from model import GPT
from shards import WindowLoader, open_stream

checkpoint: PathName = ""  # a file, FOLDER (its newest), FOLDER:best, gpt2, ...; empty = newest of log*/
data_dir: PathName = ""  # token shards of the checkpoint's tokenizer; empty = those it was trained on
out_dir: PathName = "heads"  # a new folder for tables, figures and pruned models
sentence = "When the cat saw the dog, the cat ran up the tree, and the dog sat under the tree."  # to draw
# tokens are rounded to windows, 20 or more of each where the split has them
calibration_tokens: Between(1, 10**12) = 65_536  # of the train split: heads are measured on these
ablation_tokens: Between(1, 10**12) = 16_384  # the same for ablation and swaps, a forward for each head
val_tokens: Between(1, 10**12) = 65_536  # of the val split: pruned models are evaluated on these
similarity_threshold: Between(-1, 1) = 0.85  # of pattern cosines, as published
prune_fractions = "0.05,0.15,0.3"  # shares of the heads to remove; empty = none
layer_cap: Between(0, 1) = 0.5  # at most this share of a layer's heads, while other layers can lose some
# the headline, and which of the pruned models are saved: heads removed by this criterion, replaced by this
criterion: OneOf("ablation", "mean_ablation", "greedy", "importance", "r2", "similarity",
                 "random") = "ablation"
merge: OneOf("none", "mean", "partner", "layer") = "layer"
random_seeds: Between(1, 10_000) = 5  # random prunings of each size, with seed, seed + 1, ...
batch_size: Between(1, 65_536) = 8  # sequences at a time
device = "auto"  # auto|cpu|cuda|cuda:1|mps
seed: Between(0, 2**63 - 1) = 1337  # of the null, of repeated tokens and of random pruning

PAIR_MEASURES = {"pattern": "raw", "centred": "minus uniform attention",
                 "centred_layer": "minus the layer's mean pattern"}
HEAD_MEASURES = {"importance": "importance, nats per token", "ablation": "loss rise, head zeroed",
                 "mean_ablation": "loss rise, head replaced by its mean",
                 "uniform": "loss rise, uniform attention", "r2": "R2 from the layer's other heads",
                 "previous": "attention to the previous token", "first": "attention to the first token",
                 "duplicate": "attention to an earlier copy",
                 "induction": "attention to the token after it",
                 "entropy": "entropy, nats", "distance": "distance, tokens"}
CRITERIA = {"ablation": "ablation, one-shot", "mean_ablation": "mean ablation, one-shot",
            "greedy": "ablation, greedy", "importance": "gradient importance", "r2": "R2 from other heads",
            "similarity": "similarity, centred", "random": "at random"}
MERGES = {"none": "left out", "mean": "mean output", "partner": "fit from one head",
          "layer": "fit from the layer"}
GREEDY_CANDIDATES = 5  # heads remeasured at each step of greedy ablation: those that last cost least
SWAPS = ("head_as_other", "other_as_head")  # which attends as which
BLOCKS, T_QUANTILE = 20, 2.093  # stretches of a split; Student's t, 97.5%, 19 degrees of freedom
EXPLAINED = f"""\
Change of perplexity +- half its 95% interval over {BLOCKS} stretches of val; at random: mean of the draws.
Below 5%? yes: the whole interval is below 5%; no: the whole interval is above; ?: it contains 5%.
3/5: better than 3 of 5 draws replaced alike, by the 95% interval of the paired difference."""
Head = tuple[int, int]  # layer, head
Batches = list[tuple[torch.Tensor, torch.Tensor]]  # x and y, (B, T) each, on the device
Moments = dict[int, list[np.ndarray]]  # layer: of its even and of its odd windows, see `watch`


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
    latest = {}
    with contextlib.ExitStack() as hooks:
        for layer, block in enumerate(model.transformer.h):
            def keep(module, args, qkv, layer=layer):
                latest[layer] = qkv

            def show(module, args, layer=layer, attn=block.attn):
                return see(layer, attn, latest.pop(layer), args[0])

            if block.attn.n_head:
                hooks.enter_context(block.attn.c_attn.register_forward_hook(keep))
                hooks.enter_context(block.attn.c_proj.register_forward_pre_hook(show))
        yield


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
    """Within it, `heads` output zeros, or their `means`: the slow twin of `prune`, or of folding by mean."""
    device, gone = model.lm_head.weight.device, set(heads)
    return gated(model, torch.tensor([float(head not in gone) for head in all_heads(model)], device=device),
                 means)


@contextlib.contextmanager
def attending(model: GPT, layer: int, target: int, source: int | None = None) -> Iterator[None]:
    """Within it, head `target` of a layer attends with the pattern of head `source`, or uniformly, and keeps
    its values."""
    attn = model.transformer.h[layer].attn

    def swap(module, args, qkv):
        parts = qkv.clone().unflatten(2, (3, attn.n_head, attn.head_size))  # (B, T, 3, nh, hs)
        parts[:, :, :2, target] = 0.0 if source is None else parts[:, :, :2, source]  # queries and keys
        return parts.flatten(2)

    with attn.c_attn.register_forward_hook(swap):
        yield


def prune(model: GPT, heads: list[Head]) -> GPT:
    """A new model without `heads`: their rows of c_attn (in Q, in K and in V) and columns of c_proj are gone,
    and its logits are those of `masked`. A layer may lose all. Raises ValueError for heads that do not exist.
    """
    if unknown := {*heads} - {*all_heads(model)}:
        raise ValueError(f"no such heads, as (layer, head): {unknown}")
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
    """Attention weights (B, nh, T, T) of a layer, recomputed from the output qkv of c_attn.

    Raises UserError unless these weights times V are y (B, T, nh hs), what the layer itself computed.
    """
    B, T, _ = qkv.shape
    q, k, v = (part.view(B, T, attn.n_head, attn.head_size).transpose(1, 2)
               for part in qkv.chunk(3, dim=2))  # (B, nh, T, hs)
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    patterns = (q @ k.mT * attn.head_size**-0.5).masked_fill(future, -math.inf).softmax(dim=-1)
    recomputed = (patterns @ v).transpose(1, 2).reshape(B, T, -1)
    distance, size = (recomputed - y).abs().max().item(), y.abs().max().item()
    if not distance <= TOLERANCE[torch.float32] * size:
        raise UserError(f"recomputed attention differs from the layer's own by {distance:.2e} of {size:.2e}; "
                        f"try --device=cpu; if model.py attends in another way (RoPE, QK-norm), change "
                        f"attention_patterns too")
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
def each_pattern(model: GPT, x: torch.Tensor, use: Callable) -> None:
    """Run a forward that calls use(layer, patterns (B, nh, T, T), y (B, T, nh hs)) in each layer."""
    with watching(model, lambda layer, attn, qkv, y: use(layer, attention_patterns(attn, qkv, y), y)):
        model(x, only_last=True)


def watch(model: GPT, batches: Batches) -> tuple[dict[str, np.ndarray], Moments]:
    """What heads do in each window: PAIR_MEASURES (N, P); previous, first, entropy and distance (N, H);
    by_distance (N, H, T), the mean weight of keys that many tokens back. Then the second moments of outputs.

    Moments are {layer: sums over tokens of (y, 1) (y, 1)^T}, float64 (nh hs + 1, nh hs + 1), of the even and
    of the odd windows. Raises UserError where attention cannot be recomputed.
    """
    values, moments, n = defaultdict(list), defaultdict(lambda: [0.0, 0.0]), 0

    def measure(layer, patterns, y):
        t = torch.arange(y.size(1), device=y.device)
        back = (t[:, None] - t).clamp(min=0)  # [t, d] -> t - d, the key d tokens back
        by_distance = patterns.gather(3, back.expand_as(patterns)).tril()  # (B, nh, T, T), of query and d
        rows = patterns[:, :, 1:]  # the first query has one key
        uniform = (torch.ones_like(patterns[0, 0]) / (t + 1)[:, None]).tril()[1:]
        for name, found in {
                "pattern": pair_cosines(rows), "centred": pair_cosines(rows - uniform),
                "centred_layer": pair_cosines(rows - rows.mean(dim=1, keepdim=True)),
                "previous": rows.diagonal(dim1=2, dim2=3).mean(dim=-1), "first": rows[..., 0].mean(dim=-1),
                "entropy": torch.special.entr(rows).sum(dim=-1).mean(dim=-1),
                "distance": (by_distance[:, :, 1:] @ t.float()).mean(dim=-1),
                "by_distance": by_distance.sum(dim=2) / (len(t) - t)}.items():
            seen[name].append(found)
        rows = torch.nn.functional.pad(y, (0, 1), value=1.0).cpu().double()  # (B, T, nh hs + 1)
        for half in (0, 1):
            tokens = rows[(n + half) % 2::2].flatten(0, 1)
            moments[layer][half] += (tokens.T @ tokens).numpy()

    for x, _ in batches:
        seen = defaultdict(list)
        each_pattern(model, x, measure)
        n += len(x)
        for name, parts in seen.items():
            values[name].append(torch.cat(parts, dim=1).cpu().double().numpy())
    return {name: np.concatenate(parts) for name, parts in values.items()}, moments


def repeated_scores(model: GPT, tokens: np.ndarray, eot: int, n: int = 32) -> dict:
    """duplicate and induction (n, H) on n sequences: eot, then different ids out of `tokens`, twice."""
    ids, generator = np.setdiff1d(tokens, eot), np.random.default_rng(seed)
    length = min((model.config.block_size - 1) // 2, len(ids))
    x = torch.tensor([[eot, *np.tile(generator.permutation(ids)[:length], 2)] for _ in range(n)],
                     device=model.lm_head.weight.device)
    scores = []

    def measure(layer, patterns, y):
        seen.append(torch.stack([patterns.diagonal(-back, dim1=2, dim2=3)[..., -length:].mean(dim=-1)
                                 for back in (length, length - 1)]))  # (2, B, nh)

    for rows in x.split(batch_size):
        seen = []
        each_pattern(model, rows, measure)
        scores.append(torch.cat(seen, dim=2).cpu().double().numpy())
    return dict(zip(("duplicate", "induction"), np.concatenate(scores, axis=1)))


def importance(model: GPT, batches: Batches) -> np.ndarray:
    """|dL/dg| for the gates g (N, H): L the loss of a window, nats per token (Michel et al. 2019, 4.1)."""
    found = []
    for x, y in batches:
        gates = torch.ones(len(x), len(all_heads(model)), device=x.device, requires_grad=True)
        with gated(model, gates):
            loss = model(x, y, reduction="sum") / y.size(1)
        found.append(torch.autograd.grad(loss, gates)[0].abs().cpu().double().numpy())
    return np.concatenate(found)


@torch.no_grad()
def window_losses(model: GPT, batches: Batches) -> np.ndarray:
    """Mean loss of each window, nats per token, float64 (N,)."""
    return np.concatenate([model(x, y, reduction="none").mean(dim=1).cpu().double().numpy()
                           for x, y in batches])


def loss_rises(model: GPT, batches: Batches, label: str, changes: list) -> np.ndarray:
    """Loss of each window within each of the contexts `changes`, minus its loss without: (N, changes)."""
    unchanged, rises = window_losses(model, batches), []
    for change in tqdm(changes, label, leave=False, disable=None):
        with change:
            rises.append(window_losses(model, batches) - unchanged)
    return np.array(rises).reshape(len(rises), len(unchanged)).T


def swap_rises(model: GPT, batches: Batches, cosines: np.ndarray) -> dict[str, np.ndarray]:
    """head_as_other, other_as_head (N, P): the rise of the loss when one head of a pair attends as the other.
    nan for pairs whose cosines (P,) are not above the threshold."""
    pairs, above, found = all_pairs(model), np.flatnonzero(cosines > similarity_threshold), {}
    rises = loss_rises(model, batches, "swapped patterns", [
        attending(model, layer, *order) for layer, a, b in (pairs[i] for i in above)
        for order in ((a, b), (b, a))])  # (N, 2 above)
    for k, name in enumerate(SWAPS):
        found[name] = np.full((len(rises), len(pairs)), np.nan)
        found[name][:, above] = rises[:, k::2]
    return found


# ---- predicting one head from others -------------------------------------------


def columns_of(model: GPT, layer: int, heads: Iterable[int]) -> list[int]:
    """Columns of y that these heads of a layer fill."""
    hs = model.config.head_size
    return [column for head in heads for column in range(head * hs, (head + 1) * hs)]


def fit(sums: np.ndarray, known: list[int], target: list[int]) -> np.ndarray:
    """Least squares from second moments: the map (known, target) of columns `known` to columns `target`."""
    # directions below 1e-5 of the largest amplitude are rounding noise; fitting them gives huge weights
    return np.linalg.lstsq(sums[np.ix_(known, known)], sums[np.ix_(known, target)], 1e-10)[0]


def projection(model: GPT, layer: int) -> np.ndarray:
    """The weight of c_proj in a layer, float64 (C, nh hs)."""
    return model.transformer.h[layer].attn.c_proj.weight.detach().cpu().double().numpy()


def r2(model: GPT, moments: Moments, layer: int, head: int, others: Iterable[int]) -> np.ndarray:
    """R2 of what a head adds to the residual stream, from the outputs of `others` and a constant: (2,),
    fitted on either half of the windows and tested on the other. 1 for a head whose output is constant."""
    target, constant = columns_of(model, layer, [head]), [len(moments[layer][0]) - 1]
    weight, found = projection(model, layer)[:, target], []

    def residual_error(fit_on, test_on, known):  # squared, summed over tokens
        columns, coef = [*target, *known], np.concatenate((np.eye(len(target)), -fit(fit_on, known, target)))
        return np.trace(weight @ coef.T @ test_on[np.ix_(columns, columns)] @ coef @ weight.T)

    for halves in (moments[layer], moments[layer][::-1]):
        error, variance = (residual_error(*halves, known) for known in (
            columns_of(model, layer, others) + constant, constant))
        size = np.trace(weight @ halves[1][np.ix_(target, target)] @ weight.T)
        found.append(1.0 - error / variance if variance > 1e-9 * size else 1.0)  # below, it is rounding
    return np.array(found)


def all_r2(model: GPT, moments: Moments) -> np.ndarray:
    """`r2` of each head from all others of its layer, (2, H)."""
    heads = all_heads(model)
    return np.stack([r2(model, moments, layer, head, [
        other for at, other in heads if at == layer and other != head]) for layer, head in heads], axis=1)


def mean_outputs(model: GPT, moments: Moments) -> dict[int, torch.Tensor]:
    """{layer: mean of y over tokens (nh hs,)}, on the model's device."""
    sums = {layer: even + odd for layer, (even, odd) in moments.items()}
    return {layer: torch.from_numpy(square[:-1, -1] / square[-1, -1]).float().to(model.lm_head.weight.device)
            for layer, square in sums.items()}


def fold(model: GPT, heads: list[Head], how: str, moments: Moments) -> GPT:
    """`model` without `heads`; `how` is one of MERGES. No training.

    The output of a removed head, y_d (hs,), is fitted as an affine map of other heads in its layer, over the
    calibration tokens; that map, times the head's columns of c_proj, is added to the others' columns and to
    the bias. The partner is the head left with the highest R2.
    """
    folded = copy.deepcopy(model)
    for layer in {layer for layer, _ in heads} if how != "none" else ():
        attn, sums, weight = folded.transformer.h[layer].attn, sum(moments[layer]), projection(model, layer)
        gone = [head for at, head in heads if at == layer]
        left = [head for head in range(attn.n_head) if head not in gone]
        change = np.zeros((len(weight), len(sums)))  # of the weight and the bias
        for head in gone:
            others = [] if how == "mean" else left
            if how == "partner":
                others = sorted(left, key=lambda other: r2(model, moments, layer, head, [other]).mean())[-1:]
            known, target = (columns_of(model, layer, some) for some in (others, [head]))
            known.append(len(sums) - 1)  # the constant 1
            change[:, known] += weight[:, target] @ fit(sums, known, target).T
        change = torch.from_numpy(change).to(attn.c_proj.weight)  # its dtype and device
        attn.c_proj.weight.data += change[:, :-1]
        attn.c_proj.bias.data += change[:, -1]
    return prune(folded, heads)


# ---- which heads to remove -----------------------------------------------------


def select(model: GPT, n: int, score: Callable, rises: dict[Head, float] | None = None) -> list[Head]:
    """`n` heads, each the one with the lowest score(head, removed), from layers that have lost less than
    layer_cap of their heads, or from any if there are none. With `rises` {head: number}, only the
    GREEDY_CANDIDATES lowest in it are scored."""
    removed, caps = [], [max(1, int(layer_cap * block.attn.n_head)) for block in model.transformer.h]
    while len(removed) < n:
        left = [head for head in all_heads(model) if head not in removed]
        lost = Counter(layer for layer, _ in removed)
        allowed = [head for head in left if lost[head[0]] < caps[head[0]]] or left
        if rises:
            allowed = sorted(allowed, key=rises.get)[:GREEDY_CANDIDATES]
        removed.append(min(allowed, key=lambda head: score(head, removed)))
    return removed


def removal_orders(model: GPT, n: int, means: dict[str, np.ndarray], moments: Moments, batches: Batches
                   ) -> dict[str, list[Head]]:
    """The first `n` heads that each criterion but `random` removes; `means` (H,) or (P,) of the measures."""
    heads, layers = all_heads(model), [layer for layer, _ in all_heads(model)]
    norms = np.sqrt(np.bincount(layers, means["importance"]**2))[layers]  # L2 over the layer, as in the paper
    relative = dict(zip(heads, means["importance"] / np.maximum(norms, 1e-30)))
    ablated, averaged = (dict(zip(heads, means[name])) for name in ("ablation", "mean_ablation"))
    defined = np.isfinite(means["centred"])
    cosines = dict(zip(all_pairs(model), np.where(defined, means["centred"], means["pattern"])))

    def rest(head, removed):  # the layer's other heads that are left
        return tuple(other for layer, other in heads
                     if layer == head[0] and (layer, other) not in (head, *removed))

    def similarity(head, removed):  # of the most similar pair the less important head
        of = [cosines[head[0], *sorted((head[1], other))] for other in rest(head, removed)]
        return -max(of, default=-1.0), relative[head]

    @functools.cache
    def predicted(head, others):
        return r2(model, moments, *head, others).mean()

    @functools.cache
    def loss(removed):
        with masked(model, removed):
            return window_losses(model, batches).mean()

    def greedy(head, removed):
        rises[head] = loss((*removed, head)) - loss((*removed,))
        return rises[head]

    rises = dict(ablated)  # of each head, as last measured
    scores = {"ablation": lambda head, _: ablated[head], "mean_ablation": lambda head, _: averaged[head],
              "greedy": greedy, "importance": lambda head, _: relative[head],
              "r2": lambda head, removed: -predicted(head, rest(head, removed)), "similarity": similarity}
    return {name: select(model, n, score, rises if name == "greedy" else None)
            for name, score in tqdm(scores.items(), "choosing heads", leave=False, disable=None)}


def count_heads(share: float, n_heads: int) -> int:
    """Heads that a share of them is, to the nearest."""
    return math.floor(share * n_heads + 0.5)


# ---- what a pruned model loses -------------------------------------------------


def average(values: np.ndarray) -> np.ndarray:
    """Mean over windows (N, ...), without those where a measure is undefined; nan where it is in all."""
    return np.ma.filled(np.ma.masked_invalid(values).mean(axis=0), np.nan)


def half_width(values: np.ndarray) -> np.ndarray:
    """Half the 95% interval of the mean over windows (N, ...), from the means of BLOCKS stretches, as windows
    of one document are alike; nan where there are fewer windows."""
    if len(values) < BLOCKS:
        return np.full(values.shape[1:], np.nan)
    blocks = np.array([average(part) for part in np.array_split(values, BLOCKS)])
    return T_QUANTILE * blocks.std(axis=0, ddof=1) / math.sqrt(BLOCKS)


def interval(rises: np.ndarray) -> tuple[float, float, float]:
    """(change, low, high) of perplexity, from the rise of each window's loss (N,)."""
    half = half_width(rises)
    return tuple(math.expm1(rises.mean() + step) for step in (0.0, -half, half))


def sweep(model: GPT, orders: dict[tuple[str, int], list[Head]], shares: list[float], moments: Moments,
          batches: Batches) -> Iterator[tuple[dict, GPT, list[Head]]]:
    """For every share, (criterion, seed or "") and merge: a row with `rises` of each window's loss (N,), the
    pruned model, and the heads removed."""
    n_heads, unpruned = len(all_heads(model)), window_losses(model, batches)
    jobs = [*itertools.product(shares, orders, MERGES)]
    for share, (name, number), how in tqdm(jobs, "pruning", leave=False, disable=None):
        heads = orders[name, number][:count_heads(share, n_heads)]
        pruned = fold(model, heads, how, moments)
        rises = window_losses(pruned, batches) - unpruned
        change, low, high = interval(rises)
        yield {"share": share, "criterion": name, "seed": number, "merge": how,
               "perplexity": math.exp((unpruned + rises).mean()), "change": change, "low": low, "high": high,
               "heads": n_heads - len(heads), "params": pruned.num_params(), "rises": rises,
               "removed": " ".join(f"{layer}:{head}" for layer, head in sorted(heads))}, pruned, heads


# ---- the report ----------------------------------------------------------------


def shown(number: float, form: str = ".3f") -> str:
    """The number, or a dash where there is none."""
    return format(number, form) if number == number else "-"


def below(limit: float, low: float, high: float) -> str:
    """Whether an interval is below the limit: yes, no (all of it is above), or ?."""
    return "yes" if high < limit else "no" if low > limit else "?"


def measure_lines(heading: str, means: dict[str, np.ndarray], null: dict[str, np.ndarray],
                  titles: dict[str, str], places: list[tuple]) -> list[str]:
    """A table of measures: mean, the same with random weights, extremes and where the highest is."""
    rows = []
    for name, mean in ((name, means[name]) for name in titles if name in means):
        if np.isfinite(mean).any():
            layer, *at = places[int(np.nanargmax(mean))]
            numbers = (average(mean), average(null[name]) if name in null else math.nan, np.nanmin(mean),
                       np.nanmax(mean))
            rows.append([titles[name], *(shown(float(number), ".4f") for number in numbers),
                         f"{layer}:{','.join(map(str, at))}"])
    return table([heading, "mean", "random weights", "lowest", "highest", "at"], rows)


def pruning_lines(rows: list[dict], share: float) -> list[str]:
    """Change of perplexity by criterion and merge with `share` of the heads removed, see EXPLAINED."""
    rows, groups = [row for row in rows if row["share"] == share], defaultdict(list)
    for row in rows:  # a group has one row, or one of each seed
        groups[row["criterion"], row["merge"]].append(row["rises"])
    removed, unpruned = len(rows[0]["removed"].split()), rows[0]["perplexity"] / (1 + rows[0]["change"])

    def cell(name, how):
        change, low, high = interval(np.mean(groups[name, how], axis=0))
        text = f"{change:+.1%} +-{shown((high - low) / 2, '.1%')} {below(0.05, low, high)}"
        draws = [] if name == "random" else groups["random", how]
        better = sum(interval(draw - groups[name, how][0])[1] > 0 for draw in draws)
        return text + (f" {better}/{len(draws)}" if draws else "")

    return [f"{removed} of {removed + rows[0]['heads']} heads removed; perplexity of all: {unpruned:.3f}",
            *table([f"{share:.0%} of the heads", *MERGES.values()],
                   [[CRITERIA[name], *(cell(name, how) for how in MERGES)]
                    for name in dict.fromkeys(name for name, _ in groups)])]


def swap_lines(values: dict[str, np.ndarray], heads: list[Head], pairs: list[tuple]) -> list[str]:
    """The table of swapped patterns: rises of the loss, beside those of uniform attention and of ablation."""
    rows = []
    for i, (layer, a, b) in enumerate(pairs):
        for name, head, other in zip(SWAPS, (a, b), (b, a)):
            swap, at = values[name][:, i], heads.index((layer, head))
            if np.isnan(swap[0]):
                continue
            rises = [swap, values["uniform"][:, at], values["ablation"][:, at]]
            gain, half = (swap - rises[1]).mean(), half_width(swap - rises[1])
            rows.append([f"{layer}:{head} as {layer}:{other}",
                         *(shown(float(average(values[name][:, i]))) for name in PAIR_MEASURES),
                         *(f"{rise.mean():+.4f} +-{shown(half_width(rise), '.4f')}" for rise in rises),
                         below(0.0, gain - half, gain + half)])
    if not rows:
        return [f"no pair's patterns have a cosine above {similarity_threshold}"]
    count = sum(row[-1] == "yes" for row in rows)
    heading = ["rise of the loss", *PAIR_MEASURES.values(), "swapped", "uniform", "zeroed", "below uniform"]
    return [*table(heading, rows),
            f"{count} of {len(rows)} swaps cost less than uniform attention (all of the 95% interval)"]


def table_rows(keys: tuple[str, ...], places: list[tuple], values: dict[str, np.ndarray],
               null: dict[str, np.ndarray], names: Iterable[str]) -> list[dict]:
    """A row for each place: of each measure its mean, half its 95% interval, and its null (H,) or (P,)."""
    columns = {}
    for name in (name for name in names if name in values):
        columns[name] = average(values[name])
        if name != "r2":  # which has two values, not one of each window
            columns[f"{name}_95"] = half_width(values[name])
        if name in null:
            columns[f"{name}_null"] = null[name]
    return [dict(zip(keys, place)) | {key: column[i] for key, column in columns.items()}
            for i, place in enumerate(places)]


# ---- figures -------------------------------------------------------------------


def draw_attention(model: GPT, tok, by_distance: np.ndarray) -> None:
    """Attention maps of `sentence`, a row of heads for each layer, and mean weight by distance (H, T)."""
    ids, maps = sentence_ids(tok, model.config.block_size), {}

    def keep(layer, patterns, y):
        future = torch.ones_like(patterns[0], dtype=torch.bool).triu(1)
        maps[layer] = patterns[0].masked_fill(future, math.nan).cpu().numpy()

    each_pattern(model, torch.from_numpy(ids)[None].to(model.lm_head.weight.device), keep)
    labels = [tok.decode([int(i)]).replace("\n", "\\n").replace("$", r"\$") for i in ids]
    counts, T = [block.attn.n_head for block in model.transformer.h], by_distance.shape[1]
    plt, columns, curves = pyplot(), max(counts), dict(zip(all_heads(model), by_distance))
    colors = plt.cm.tab10.colors if columns <= 10 else plt.cm.turbo(np.linspace(0, 1, columns))
    side = 8.5 / (columns + 1.6)  # inches
    figure, axes = plt.subplots(len(counts), columns + 1, squeeze=False, layout="constrained", figsize=(
        10, side * len(counts) + 1.5), width_ratios=[1] * columns + [1.6])
    for layer, row in enumerate(axes):
        last = layer == len(counts) - 1
        for head, axis in enumerate(row[:-1]):
            axis.set(xticks=[], yticks=[], frame_on=head < counts[layer])
            if layer == 0:
                axis.set_title(f"head {head}" if columns < 9 else head, fontsize=9, color=colors[head], pad=3)
            if head >= counts[layer]:
                continue
            axis.imshow(maps[layer][head], vmin=0, vmax=1, cmap="magma_r", aspect="auto")
            row[-1].plot(range(1, 1 + T), curves[layer, head], linewidth=1, color=colors[head])
        row[0].set_ylabel(f"layer {layer}", fontsize=9)
        row[-1].set(xscale="log", yscale="log", ylim=(1e-4, 1.2), xlim=(1, T))
        row[-1].tick_params(labelsize=7, labelbottom=last, labelleft=False, labelright=True)
        row[-1].grid(alpha=0.3)
    axes[0, -1].set_title("mean weight", fontsize=9, pad=3)
    axes[-1, -1].set_xlabel("1 + tokens back", fontsize=8)
    text = "|".join(labels)
    figure.suptitle("Attention: queries from top to bottom, keys from left to right, dark is 1\n"
                    + (text if len(text) < 120 else text[:119] + "..."), fontsize=10)
    save_figure(figure, Path(out_dir, "attention.png"))


def draw_similarity(model: GPT, means: dict[str, np.ndarray], null: dict[str, np.ndarray]) -> None:
    """Pattern cosines of each layer's heads, raw below the diagonal and centred above it; last, the pairs
    above the threshold by layer. `means` and `null` (P,)."""
    counts, pairs = [block.attn.n_head for block in model.transformer.h], np.array(all_pairs(model))
    plt, columns = pyplot(), min(4, len(counts) + 1)
    rows = math.ceil((len(counts) + 1) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(10, 2.4 * rows + 0.7), squeeze=False,
                                layout="constrained")
    for axis in axes.flat[len(counts) + 1:]:
        axis.set_axis_off()
    for layer, (axis, nh) in enumerate(zip(axes.flat, counts)):
        here = pairs[:, 0] == layer
        square, (_, a, b) = np.full((max(nh, 1),) * 2, np.nan), pairs[here].T
        square[b, a], square[a, b] = means["pattern"][here], means["centred"][here]
        image = axis.imshow(square, vmin=-1, vmax=1, cmap="RdBu_r")
        ticks = range(0, nh, math.ceil(nh / 8) or 1)
        axis.set(xticks=ticks, yticks=ticks, xlabel="head", ylabel="head")
        axis.set_title(f"layer {layer}", fontsize=9)
    figure.colorbar(image, ax=axes, label="mean cosine", shrink=0.8)
    axis = axes.flat[len(counts)]
    bars = {"raw": means["pattern"], "centred": means["centred"], "raw, random weights": null["pattern"]}
    for i, (label, cosines) in enumerate(bars.items()):
        above = np.bincount(pairs[cosines > similarity_threshold, 0], minlength=len(counts))
        axis.bar(np.arange(len(counts)) + 0.27 * (i - 1), above, 0.27, label=label)
    axis.set_title(f"pairs above {similarity_threshold:g}", fontsize=9)
    axis.set(xticks=range(len(counts)), xlabel="layer", ylim=(0, 1.6 * np.bincount(pairs[:, 0]).max()))
    axis.legend(fontsize=7)
    figure.suptitle("Cosine of attention patterns: raw below the diagonal, minus uniform attention above it")
    save_figure(figure, Path(out_dir, "similarity.png"))


def draw_pruning(rows: list[dict]) -> None:
    """Change of perplexity against the share of heads removed, a panel for each way of replacing them."""
    plt, groups = pyplot(), defaultdict(lambda: defaultdict(list))  # (merge, criterion), share -> rises
    for row in rows:
        groups[row["merge"], row["criterion"]][row["share"]].append(row["rises"])
    figure, axes = plt.subplots(2, 2, figsize=(10, 8), sharex=True, sharey=True, layout="constrained")
    names = [*dict.fromkeys(name for _, name in groups)]
    for (how, name), by_share in groups.items():
        axis, i = axes.flat[[*MERGES].index(how)], names.index(name)
        ends = [interval(np.mean(draws, axis=0)) for draws in by_share.values()]
        change, low, high = 100 * np.array(ends).T
        x = 100 * np.array([*by_share]) + 0.2 * (i - 3)  # or bars would cover each other
        axis.errorbar(x, change, np.nan_to_num([change - low, high - change]), capsize=3, marker="o",
                      markersize=4, label=CRITERIA[name], color="gray" if name == "random" else f"C{i}")
    for axis, title in zip(axes.flat, MERGES.values()):
        axis.axhline(5, color="black", linestyle=":", linewidth=1)
        axis.set_yscale("symlog", linthresh=1)
        axis.set_yticks([0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000])
        axis.set_yticks([], minor=True)
        axis.yaxis.set_major_formatter(lambda value, position: f"{value:g}%")
        axis.set_xticks([100 * share for share in by_share], [f"{share:.0%}" for share in by_share])
        axis.set_title(title)
        axis.grid(alpha=0.3)
    changes = [100 * row["change"] for row in rows]
    axes[0, 0].set_ylim(min(-0.1, 1.2 * min(changes)), 1.3 * max(changes) + 1)
    axes[0, 0].legend(fontsize=8)
    figure.supxlabel("heads removed")
    figure.supylabel("change of perplexity")
    figure.suptitle("Perplexity without some heads, by what takes their place. Dotted: 5%\n"
                    f"Bars: 95% over {BLOCKS} stretches of val; at random: mean of the draws")
    save_figure(figure, Path(out_dir, "pruning.png"))


# ---- the script ----------------------------------------------------------------


def parse_fractions() -> list[float]:
    """The shares in prune_fractions, in order. Raises UserError for what is no share."""
    try:
        shares = {float(part) for part in prune_fractions.split(",") if part.strip()}
    except ValueError:
        shares = {math.nan}
    if not all(0 < share < 1 for share in shares):
        raise UserError(f"prune_fractions={prune_fractions}: give numbers above 0 and below 1 with commas "
                        f"between them, such as 0.15,0.3")
    return sorted(shares)


def sentence_ids(tok, T: int) -> np.ndarray:
    """The first T ids of `sentence`. Raises UserError for fewer than two."""
    ids = tok.encode(sentence)[:T].astype(np.int64)
    if len(ids) < 2:
        raise UserError(f"sentence={sentence!r} has fewer than two tokens; give a longer --sentence")
    return ids


def open_batches(state: dict, source: str, tok, T: int, dev: Device) -> tuple[Batches, Batches, Batches]:
    """Windows for calibration and for ablation, of train, and for evaluation, of val; each spread over all of
    the split, in order, so that stretches of them are parts of it."""
    folder, found = find_data_dir(state, source, data_dir), []
    for split, n_tokens in (("train", calibration_tokens), ("train", ablation_tokens), ("val", val_tokens)):
        loader = WindowLoader(open_stream(folder, split, tok), T, T, seed, tok.n_vocab, shuffle=False)
        n = min(loader.n_windows, max(BLOCKS, n_tokens // T))
        if split == "train" and n < 4:  # two for each half
            raise UserError(f"data_dir={folder} has {n} train windows of {T} tokens, 4 are needed to measure "
                            f"heads on; build more data with fineweb.py")
        ids = np.linspace(0, loader.n_windows - 1, n).astype(np.int64)
        found.append([tuple(map(dev.to_device, loader.read_windows(ids[first:first + batch_size])))
                      for first in range(0, n, batch_size)])
    return tuple(found)


def main() -> None:
    shares = parse_fractions()
    dev = resolve_device(device, "float32")
    source, state, model, tok = open_model(checkpoint, dev.device)
    model.requires_grad_(False)
    for key in ("model", "optimizers"):  # free them: they are larger than the model
        state.pop(key, None)
    model.loss_chunk = dev.loss_chunk
    heads, pairs, T = all_heads(model), all_pairs(model), model.config.block_size
    if not heads:
        raise UserError(f"checkpoint {source}: it has no heads left to analyze or to remove")
    sentence_ids(tok, T)
    calibration, ablation_batches, val = open_batches(state, source, tok, T, dev)
    try:
        Path(out_dir).mkdir(parents=True)  # a second run into the same folder fails here
    except FileExistsError as error:
        raise UserError(f"out_dir={out_dir} exists already; name a new folder with --out_dir=ANOTHER, or, if "
                        f"it is of a run that stopped, remove it: rm -r {out_dir}") from error
    measured_on, ablated_on, evaluated_on = (
        T * sum(len(x) for x, _ in batches) for batches in (calibration, ablation_batches, val))
    title = (f"{source}, step {state['step']}: {len(heads)} heads in {model.config.n_layer} layers; measured "
             f"on {measured_on:,} train tokens (ablation and swaps: {ablated_on:,}), evaluated on "
             f"{evaluated_on:,} val tokens")
    print(title, flush=True)

    # ---- measure
    def measure(model):
        values, moments = watch(model, calibration)
        tokens = torch.cat([x.flatten() for x, _ in calibration]).cpu().numpy()
        values |= repeated_scores(model, tokens, tok.eot) | {"r2": all_r2(model, moments)}
        return values, moments

    torch.manual_seed(seed)
    random_model = GPT(model.config).to(dev.device).eval().requires_grad_(False)
    null = {name: average(value) for name, value in measure(random_model)[0].items()}
    values, moments = measure(model)
    values["importance"], outputs = importance(model, calibration), mean_outputs(model, moments)
    for name, changes in {"ablation": [masked(model, [head]) for head in heads],
                          "mean_ablation": [masked(model, [head], outputs) for head in heads],
                          "uniform": [attending(model, *head) for head in heads]}.items():
        values[name] = loss_rises(model, ablation_batches, name, changes)
    means = {name: average(value) for name, value in values.items()}
    lines = ["", *measure_lines("heads", means, null, HEAD_MEASURES, heads)]
    if pairs:
        values |= swap_rises(model, ablation_batches, means["pattern"])
        lines += ["", *measure_lines("cosine of patterns", means, null, PAIR_MEASURES, pairs),
                  "", *swap_lines(values, heads, pairs)]
        draw_similarity(model, means, null)
    pair_rows = table_rows(("layer", "head", "other"), pairs, values, null, (*PAIR_MEASURES, *SWAPS))
    write("heads.csv", csv_bytes(table_rows(("layer", "head"), heads, values, null, HEAD_MEASURES)))
    write("pairs.csv", csv_bytes(pair_rows) if pairs else b"layer,head,other\n")
    draw_attention(model, tok, means["by_distance"])

    # ---- prune
    shares = [share for share in shares if count_heads(share, len(heads))]
    if shares:
        n, rows = count_heads(shares[-1], len(heads)), []
        found = removal_orders(model, n, means, moments, ablation_batches)
        orders = {(name, ""): order for name, order in found.items()}
        for number in range(seed, seed + random_seeds):
            rank = random.Random(number).sample(heads, len(heads)).index
            orders["random", number] = select(model, n, lambda head, _, rank=rank: rank(head))
        saved = *next(key for key in orders if key[0] == criterion), merge
        kept = {key: state[key] for key in ("step", "config", "tokenizer", "data", "provenance")
                if key in state}
        for row, pruned, removed in sweep(model, orders, shares, moments, val):
            if (row["criterion"], row["seed"], row["merge"]) == saved:
                origin = {"from": str(source), "removed": sorted(map(list, removed)), "merge": merge}
                write_checkpoint(Path(out_dir, f"pruned_{row['share']}.pt"), kept | {
                    "model": pruned.state_dict(), "model_config": describe_model(pruned), "pruned": origin})
            rows.append(row)
        write("pruning.csv", csv_bytes([{key: row[key] for key in row if key != "rises"} for row in rows]))
        draw_pruning(rows)
        tables = (line for share in shares for line in ("", *pruning_lines(rows, share)))
        lines = ["", EXPLAINED, *tables, *lines]
    print("\n".join(lines), flush=True)
    write("pruning.txt", "\n".join([title, *lines, ""]).encode())


def write(name: str, content: bytes) -> None:
    write_atomically(Path(out_dir, name), content)


if __name__ == "__main__":
    configure(globals())
    main()
