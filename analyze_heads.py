"""
Attention heads: how alike they are, how much each matters, and what a GPT-2 without some of them is worth.

    python analyze_heads.py --checkpoint=log                          # measure, prune, compare -> heads/
    python analyze_heads.py --checkpoint=log --merge=mean,partner     # and fold dropped heads into others
    python analyze_heads.py --checkpoint=log --prune_fractions=       # measure only
    python analyze_heads.py --checkpoint=log --prune_heads=0:3,2:1 --out_dir=two_less  # remove these

Any checkpoint, also an imported or an already pruned one: all is relative to the heads it has. Heads are
chosen on calibration_tokens of the train split and judged on val_tokens of the val split. Into out_dir, which
must be new, go

    pairs.csv, similar_pairs.txt     cosines of all pairs of heads of a layer; those above the threshold
    similarity.txt                   how alike heads are, beside the null; how much halves of the data agree
    heads.csv                        importance, ablation, and trivial attention of every head
    similarity_*.png, heads.png      the same as heatmaps
    pruning.csv, .txt, .png          perplexity, size and speed against the share of heads removed
    pruned_0.15.pt, ...              models without heads: for train_gpt2.py --init_from, generate.py,
                                     hellaswag.py, convert_hf.py

Similarity of two heads of a layer, averaged over positions, then over sequences (the unit of errors):
    pattern      cosine of their attention weights, a row of T for each query; the first query is left out
    rest         the same without the diagonal and the first token, from the fourth query on: weight that all
                 put there can make heads look alike; how much that is, is in heads.csv
    output       cosine of what they add to the residual stream, (C,) at each position
Each stands beside its null: the same of one model of this shape with random weights. A pattern's null is near
1, as random heads look at all tokens alike. Importance is the mean over sequences of |dL/dg| for a gate g = 1
on the head's output (Michel et al. 2019, "Are Sixteen Heads Really Better than One?", section 4.1). Ablation
is the loss without the head minus the loss with it, nats per token. The interval of a change of perplexity
takes 20 stretches of val as the unit, as windows of one document are alike.

Most of the time goes into one forward over calibration_tokens per head, and one over val_tokens per pruned
model: half an hour on one CPU core for 7M parameters and 48 heads, hours for GPT-2 small, which wants a GPU.

Shapes: B sequences, T tokens, nh heads of a layer, hs head size, C n_embd, H heads in all layers, P pairs.
"""

import contextlib
import copy
import io
import itertools
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from analyze_tokenizer import to_csv
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
from decoding import KVCache, generate
from device import TOLERANCE, Device, resolve_device
from files import write_atomically
from model import GPT
from shards import WindowLoader, open_stream

checkpoint: PathName = ""  # a file, FOLDER (its newest), FOLDER:best, gpt2, ...; empty = newest of log*/
data_dir: PathName = ""  # token shards of the checkpoint's tokenizer; empty = those it was trained on
out_dir: PathName = "heads"  # tables, figures and pruned models go here
calibration_tokens: Between(1, 10**12) = 65_536  # spread over the train split: heads are chosen on these
val_tokens: Between(1, 10**12) = 65_536  # the first of the val split: pruned models are evaluated on these
similarity_threshold: Between(-1, 1) = 0.85  # pairs above it are listed
prune_fractions = "0,0.05,0.1,0.15,0.2,0.3,0.5"  # shares of the heads to remove; empty = none
prune_heads = ""  # remove these instead: LAYER:HEAD,... counted from 0
criterion: OneOf("ablation", "importance", "redundancy_pattern", "redundancy_rest", "redundancy_output",
                 "random") = "ablation"  # whose pruned models are saved, timed and merged
merge = ""  # fold dropped heads into those that are left: any of mean,partner,layer
random_seeds: Between(1, 10_000) = 5  # random prunings of each size, seed, seed + 1, ...
batch_size: Between(1, 65_536) = 8  # sequences at a time
device = "auto"  # auto|cpu|cuda|cuda:1|mps
dtype: OneOf("auto", "float32", "bfloat16", "float16") = "float32"  # of matrix products
seed: Between(0, 2**63 - 1) = 1337  # of the null and of random pruning

MEASURES = {"pattern": "attention patterns", "rest": "patterns without diagonal and first token",
            "output": "head outputs"}
HEAD_MEASURES = {"importance": "importance, |dL/dg|, nats per token", "ablation": "ablation, nats per token",
                 "diagonal": "attention to the own token", "first": "attention to the first token"}
CRITERIA = {
    "ablation": "the smallest loss increase first",
    "importance": "the smallest gradient importance first, over its layer's norm",
    "redundancy_pattern": "of the most similar patterns the less important",
    "redundancy_rest": "of the most similar patterns, without diagonal and first token, the less important",
    "redundancy_output": "of the most similar outputs the less important",
    "random": "any",
}
MERGES = {"mean": "its mean output, into the bias",
          "partner": "what the head most similar, or most opposite, can tell of it",
          "layer": "what all heads left in the layer can tell of it"}
SPEED_ROUNDS, DECODE_TOKENS = 5, 64
BLOCKS, T_QUANTILE = 20, 2.093  # of val, for the error of a change; Student's t, 97.5%, 19 degrees of freedom
Head = tuple[int, int]  # layer, head
Halves = list[dict[str, "Running"]]  # all that is measured, on each half of the calibration windows


# ---- heads of a model: watching, gating, removing ------------------------------


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
    that has heads; y goes into c_proj, or what `see` returns in its place. Weights stay untouched."""
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


def gated(model: GPT, gates: torch.Tensor):
    """Within it, head outputs are multiplied by `gates` (H,), or (B, H) with a row for each sequence."""
    sizes = [block.attn.n_head for block in model.transformer.h]
    of_layer = torch.atleast_2d(gates).split(sizes, dim=1)  # (1 or B, nh) each

    def see(layer, attn, qkv, y):
        return y * of_layer[layer].repeat_interleave(attn.head_size, dim=-1)[:, None]  # (B, T, nh hs)

    return watching(model, see)


def masked(model: GPT, heads: list[Head]):
    """Within it, the model computes as if `heads` put out zeros: the slow twin of `prune`."""
    device = model.lm_head.weight.device
    return gated(model, torch.tensor([float(head not in set(heads)) for head in all_heads(model)],
                                     device=device))


def check_heads(model: GPT, heads: list[Head], what: str) -> None:
    """Raises UserError, which speaks of `what`, unless these are different heads of the model."""
    known = all_heads(model)
    left = ", ".join(f"{layer}: {block.attn.n_head}" for layer, block in enumerate(model.transformer.h))
    if len(heads) > len(known):
        raise UserError(f"{what}: got {len(heads)} heads, and there are no more than {len(known)} (by layer "
                        f"{left})")
    for layer, head in heads:
        if (layer, head) not in known:
            raise UserError(f"{what}: there is no head {layer}:{head}; wanted LAYER:HEAD, counted from 0; "
                            f"this model has, by layer, so many: {left}")
    if len(set(heads)) < len(heads):
        raise UserError(f"{what}: got a head twice, wanted different ones")


def prune(model: GPT, heads: list[Head]) -> GPT:
    """A new model without `heads`: their rows of c_attn (in Q, in K and in V) and columns of c_proj are gone,
    and its logits are those of `masked`. A layer may lose all. Raises UserError for heads that are not there.
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
    smaller = GPT(replace(model.config, heads=tuple(counts))).to(model.lm_head.weight.device)
    smaller.load_state_dict(weights)
    smaller.loss_chunk = model.loss_chunk
    return smaller.train(model.training)


# ---- streaming statistics ------------------------------------------------------


class Running:
    """Mean and standard error of vectors that come in batches (B, N); keeps no more than two sums."""

    def __init__(self):
        self.n, self.sum, self.squares = 0, 0.0, 0.0

    def add(self, values: torch.Tensor) -> None:
        values = values.cpu().double().numpy()  # MPS has no float64
        self.n += len(values)
        self.sum = self.sum + values.sum(axis=0)
        self.squares = self.squares + (values**2).sum(axis=0)

    def __add__(self, other: "Running") -> "Running":
        both = Running()
        both.n, both.sum = self.n + other.n, self.sum + other.sum
        both.squares = self.squares + other.squares
        return both

    @property
    def mean(self) -> np.ndarray:
        return self.sum / self.n

    @property
    def error(self) -> np.ndarray:
        """Standard error of the mean over the vectors that came, nan for fewer than two."""
        if self.n < 2:
            return np.full_like(self.mean, np.nan)
        variance = np.maximum(0.0, self.squares / self.n - self.mean**2) * self.n / (self.n - 1)
        return np.sqrt(variance / self.n)


class Windows:
    """Some windows (x, y) of a split, in batches on the device."""

    def __init__(self, loader: WindowLoader, ids: np.ndarray, dev: Device):
        self.loader, self.ids, self.dev = loader, ids, dev

    def __len__(self) -> int:
        """Batches."""
        return math.ceil(len(self.ids) / batch_size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for first in range(0, len(self.ids), batch_size):
            x, y = self.loader.read_windows(self.ids[first:first + batch_size])
            yield self.dev.to_device(x), self.dev.to_device(y)

    def halves(self) -> tuple["Windows", "Windows"]:
        return tuple(Windows(self.loader, self.ids[i::2], self.dev) for i in (0, 1))


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
        raise UserError(f"attention computed again for the analysis differs from the layer's own by "
                        f"{distance:.2e}, of {size:.2e}; try --dtype=float32 or --device=cpu, or, if "
                        f"model.py attends in another way (RoPE, QK-norm), change attention_patterns too")
    return patterns


def pair_cosines(vectors: torch.Tensor) -> torch.Tensor:
    """Cosines of the heads of a layer: vectors (B, nh, R, N) -> (B, pairs), the mean over the R rows."""
    rows = F.normalize(vectors, dim=-1).flatten(2)  # (B, nh, R * N)
    cosines = rows @ rows.mT / vectors.size(2)  # (B, nh, nh)
    first, second = torch.triu_indices(vectors.size(1), vectors.size(1), 1, device=vectors.device)
    return cosines[:, first, second]


@torch.no_grad()
def watch(model: GPT, windows: Windows) -> tuple[dict[str, Running], dict[int, torch.Tensor]]:
    """What the heads do on the windows, and the second moments of what they put out, for `fold`.

    The first: each of MEASURES (P,); diagonal and first (H,), the attention that queries behind the first
    pay to their own token and to the first one. The second: {layer: sum over tokens of (y, 1) (y, 1)^T},
    float64 (nh hs + 1, nh hs + 1). Raises UserError where attention cannot be reproduced.
    """
    running, moments = {name: Running() for name in (*MEASURES, "diagonal", "first")}, {}

    def see(layer, attn, qkv, y):
        with torch.autocast(y.device.type, enabled=False):  # or the statistics would be in 16 bits
            add(layer, attn, qkv.float(), y)

    def add(layer, attn, qkv, y):
        patterns = attention_patterns(attn, qkv, y)  # (B, nh, T, T)
        found["pattern"].append(pair_cosines(patterns[:, :, 1:]))
        found["diagonal"].append(patterns.diagonal(dim1=2, dim2=3)[..., 1:].mean(dim=-1))
        found["first"].append(patterns[:, :, 1:, 0].mean(dim=-1))
        trivial = torch.eye(y.size(1), dtype=torch.bool, device=y.device)
        trivial[:, 0] = True
        # of the first two queries nothing is left, of the third one key, whose cosine is 1
        found["rest"].append(pair_cosines(patterns.masked_fill_(trivial, 0.0)[:, :, 3:]))
        y = y.float()
        heads = y.unflatten(2, (attn.n_head, -1)).transpose(1, 2)  # (B, nh, T, hs)
        columns = attn.c_proj.weight.float().unflatten(1, (attn.n_head, -1)).permute(1, 2, 0)  # (nh, hs, C)
        found["output"].append(pair_cosines(heads @ columns))
        rows = F.pad(y.flatten(0, 1), (0, 1), value=1.0)  # (B * T, nh hs + 1)
        rows = (rows.cpu() if y.device.type == "mps" else rows).double()  # squares need twice the digits
        moments[layer] = moments.get(layer, 0.0) + (rows.T @ rows).cpu()

    with watching(model, see):
        for x, _ in windows:
            found = {name: [] for name in running}
            with windows.dev.autocast():
                model(x, only_last=True)
            for name, parts in found.items():
                running[name].add(torch.cat(parts, dim=1))
    return running, moments


def importance(model: GPT, windows: Windows) -> Running:
    """|dL/dg| for the gates g (H,): L the loss of a sequence, nats per token (Michel et al. 2019, 4.1)."""
    result = Running()
    for x, y in windows:
        gates = torch.ones(len(x), len(all_heads(model)), device=x.device, requires_grad=True)
        with gated(model, gates), windows.dev.autocast():
            loss = model(x, y, reduction="sum") / y.size(1)
        result.add(torch.autograd.grad(loss, gates)[0].abs())
    return result


def ablation(model: GPT, windows: Windows) -> Running:
    """Loss without a head minus loss with it (H,), of each sequence, in nats per token."""
    result, heads = Running(), all_heads(model)
    for x, y in tqdm(windows, "ablation", leave=False, unit=" batches", disable=None):
        with_all, rises = losses(model, x, y, windows.dev), []
        for head in heads:
            with masked(model, [head]):
                rises.append(losses(model, x, y, windows.dev) - with_all)
        result.add(torch.stack(rises, dim=1))
    return result


@torch.no_grad()
def losses(model: GPT, x: torch.Tensor, y: torch.Tensor, dev: Device) -> torch.Tensor:
    """Mean loss of each sequence (B,), nats per token."""
    with dev.autocast():
        return model(x, y, reduction="none").float().mean(dim=1)


def window_losses(model: GPT, windows: Windows) -> np.ndarray:
    """Mean loss of each window, float64 (N,)."""
    return torch.cat([losses(model, x, y, windows.dev) for x, y in windows]).cpu().double().numpy()


# ---- which heads to drop, and what takes their place ---------------------------


def drop_order(name: str, model: GPT, values: dict[str, np.ndarray]) -> list[Head]:
    """All heads in the order in which criterion `name` drops them.

    values: importance and ablation (H,), MEASURES (P,). Redundancy goes through the pairs from the most
    similar on, and drops the less important head of a pair that is still whole; heads that no pair decides
    about (the last of each layer) follow by importance.
    """
    heads, important = all_heads(model), values["importance"]
    if name == "ablation":
        return [heads[i] for i in np.argsort(values["ablation"], kind="stable")]
    layers = np.array([layer for layer, _ in heads])
    norms = np.sqrt(np.bincount(layers, important**2))[layers]  # (H,), L2 over the layer, as in the paper
    relative = important / np.where(norms > 0, norms, 1.0)  # 0 in a layer that does nothing
    by_importance = [heads[i] for i in np.argsort(relative, kind="stable")]
    if name == "importance":
        return by_importance
    importance_of, dropped, pairs = dict(zip(heads, important)), [], all_pairs(model)
    for i in np.argsort(-values[name.removeprefix("redundancy_")], kind="stable"):
        layer, *pair = pairs[i]
        if not any((layer, head) in dropped for head in pair):
            dropped.append(min(((layer, head) for head in pair), key=importance_of.get))
    return dropped + [head for head in by_importance if head not in dropped]


def fold(model: GPT, heads: list[Head], how: str, moments: dict[int, torch.Tensor],
         similarity: np.ndarray) -> GPT:
    """`model` without `heads`, whose outputs are told from what is left, by least squares and no training.

    `how` is one of MERGES. The output of a dropped head, y_d (hs,), is fitted as an affine map of others in
    its layer, over the calibration tokens (`moments`, from `watch`); that map, times the head's columns of
    c_proj, is added to the others' columns and to the bias. similarity (P,) chooses partners.
    """
    folded, layers = copy.deepcopy(model), sorted({layer for layer, _ in heads})
    similar = {frozenset(((layer, a), (layer, b))): value
               for (layer, a, b), value in zip(all_pairs(model), similarity)}
    for layer in layers:
        attn, sums = folded.transformer.h[layer].attn, moments[layer].numpy()
        weight = model.transformer.h[layer].attn.c_proj.weight.detach().cpu().double().numpy()
        columns = np.arange(weight.shape[1]).reshape(attn.n_head, attn.head_size)
        left = [head for head in range(attn.n_head) if (layer, head) not in heads]
        more = np.zeros((len(weight), weight.shape[1] + 1))  # to be added to (weight, bias)
        for _, head in (pair for pair in heads if pair[0] == layer):
            others = {"mean": [], "layer": left, "partner": sorted(
                left, key=lambda other: abs(similar[frozenset(((layer, head), (layer, other)))]))[-1:]}[how]
            known = np.append(columns[others].ravel(), weight.shape[1]).astype(int)  # and the constant 1
            # what varies 1e-5 as much as the largest is rounding; fitted to, it would get huge weights
            told = np.linalg.lstsq(sums[np.ix_(known, known)], sums[np.ix_(known, columns[head])], 1e-10)[0]
            more[:, known] += weight[:, columns[head]] @ told.T
        more = torch.from_numpy(more).float().to(attn.c_proj.weight.device)
        with torch.no_grad():
            attn.c_proj.weight += more[:, :-1]
            attn.c_proj.bias += more[:, -1]
    return prune(folded, heads)


# ---- what a smaller model is worth ---------------------------------------------


def cache_bytes(model: GPT, dtype: torch.dtype) -> int:
    """Bytes of the KV cache for one token, counted on a real one."""
    cache = KVCache(model.config, 1, model.lm_head.weight.device, dtype)
    return sum(tensor.nbytes for tensor in (*cache.k, *cache.v)) // model.config.block_size


@torch.no_grad()
def measure_speed(models: list[GPT], dev: Device) -> list[tuple[float, float]]:
    """(prefill, decode) tokens per second of each, one sequence: the fastest of SPEED_ROUNDS, in turns.

    prefill: block_size tokens at once; decode: one token at a time, behind half a context.
    """
    best = [[math.inf, math.inf] for _ in models]
    T = models[0].config.block_size
    n = min(DECODE_TOKENS, T - T // 2)  # behind which the cache would be filled anew
    idx = torch.zeros(1, T, dtype=torch.long, device=dev.device)
    for model, times in list(zip(models, best)) * (1 + SPEED_ROUNDS):
        with dev.autocast():
            dev.synchronize()
            t0 = time.perf_counter()
            model(idx, cache=KVCache(model.config, 1, dev.device, dev.dtype), only_last=True)
            dev.synchronize()
            t1 = time.perf_counter()
            steps = generate(model, idx[:, :max(1, T // 2)], 1 + n, temperature=0.0)
            next(steps)  # fills the cache
            dev.synchronize()
            t2 = time.perf_counter()
            for _ in steps:
                pass
            dev.synchronize()
            times[:] = min(times[0], t1 - t0), min(times[1], time.perf_counter() - t2)
    return [(T / prefill, n / decode) for prefill, decode in best]


def judge(model: GPT, windows: Windows, dense: np.ndarray) -> dict:
    """Perplexity, and its change against `dense` (N,), the windows' losses with all heads, with the 95%
    interval that BLOCKS stretches of val give it; nan where there are fewer windows."""
    found = window_losses(model, windows)
    rise, half = found - dense, math.nan
    if len(rise) >= BLOCKS:  # windows of one document are alike, so neighbours count as one draw
        blocks = np.array([part.mean() for part in np.array_split(rise, BLOCKS)])
        half = T_QUANTILE * blocks.std(ddof=1) / math.sqrt(BLOCKS)
    return {"perplexity": math.exp(found.mean()), "change": math.expm1(rise.mean()),
            "low": math.expm1(rise.mean() - half), "high": math.expm1(rise.mean() + half)}


def describe_size(model: GPT, dev: Device) -> dict:
    """Parameters, FLOPs of a forward and bytes of KV cache, both per token."""
    return {"heads": len(all_heads(model)), "params": model.num_params(),
            "flops_per_token": model.flops_per_token(model.config.block_size) // 3,
            "cache_bytes": cache_bytes(model, dev.dtype)}


def sweep(model: GPT, orders: dict[tuple[str, int], list[Head]], shares: list[float], main: str,
          merges: list[str], moments: dict[int, torch.Tensor], similarity: np.ndarray, windows: Windows,
          keep: Callable) -> list[dict]:
    """A row for every (criterion, seed, merge) and share.

    orders {(criterion, seed or ""): heads in the order in which they go}. Of criterion `main` the models are
    timed, merged and given to keep(share, merge, model, heads removed) (of `random`, the first seed's).
    """
    n_heads, dense = len(all_heads(model)), window_losses(model, windows)
    main_order = next(key for key in orders if key[0] == main)
    rows, judged = [], {}
    jobs = [(share, key, how) for share in shares for key in orders
            for how in ("", *(merges if key == main_order else ()))]
    for share, key, how in tqdm(jobs, "pruning", leave=False, unit=" models", disable=None):
        heads = orders[key][:count_heads(share, n_heads)]
        less = fold(model, heads, how, moments, similarity) if how else prune(model, heads)
        same = frozenset(heads), how if heads else ""  # with nothing to drop, all criteria are one
        if same not in judged:
            judged[same] = judge(less, windows, dense)
            if not how:
                check_pruned(model, less, heads, windows)
        if key == main_order:
            keep(share, how, less, heads)
        rows.append({"share": share, "criterion": key[0], "seed": key[1], "merge": how,
                     **judged[same], **describe_size(less, windows.dev),
                     "prefill_tok_s": "", "decode_tok_s": "",
                     "removed": " ".join(f"{layer}:{head}" for layer, head in sorted(heads))})
    timed = [prune(model, orders[main_order][:count_heads(share, n_heads)]) for share in shares]
    speeds = dict(zip(shares, measure_speed(timed, windows.dev)))
    for row in rows:
        if (row["criterion"], row["seed"], row["merge"]) == (*main_order, ""):
            row["prefill_tok_s"], row["decode_tok_s"] = speeds[row["share"]]
    return rows


def count_heads(share: float, n_heads: int) -> int:
    """Heads that a share of them is, to the nearest."""
    return math.floor(share * n_heads + 0.5)


@torch.no_grad()
def check_pruned(model: GPT, less: GPT, heads: list[Head], windows: Windows) -> None:
    """Raises UserError unless the pruned model's logits are those of the model with these heads masked."""
    x, _ = next(iter(windows))
    with windows.dev.autocast(), masked(model, heads):
        wanted = model(x[:1]).float()
    with windows.dev.autocast():
        distance, size = (less(x[:1]).float() - wanted).abs().max().item(), wanted.abs().max().item()
    if not distance <= TOLERANCE[windows.dev.dtype] * size:
        raise UserError(f"without {len(heads)} heads the logits differ by {distance:.2e} of {size:.2e} from "
                        f"those with the same heads masked; try --dtype=float32 or --device=cpu")


# ---- what is shown -------------------------------------------------------------


def correlation(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """(Pearson, Spearman) of two vectors; nan where one of them is constant, or empty."""
    def pearson(a, b):
        if len(a) == 0 or np.ptp(a) == 0 or np.ptp(b) == 0:
            return math.nan
        a, b = a - a.mean(), b - b.mean()
        return (a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum())

    def ranks(values):  # of equal values the mean of theirs
        _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (counts.cumsum() - (counts - 1) / 2)[place]

    return pearson(a, b), pearson(ranks(a), ranks(b))


def shown(number: float, form: str = ".4f") -> str:
    """The number, or a dash where there is none."""
    return format(number, form) if number == number else "-"


def similarity_lines(model: GPT, halves: Halves, null: dict[str, Running]) -> tuple[list[str], list[str]]:
    """Mean similarity by measure beside its null, and its stability; then the pairs above the threshold."""
    heading = (f"{'similarity of pairs':>48} {'mean':>6} {'null':>6} {'highest':>8} {'above':>6} {'null':>6} "
               f"{'both halves':>12} {'Pearson':>8} {'Spearman':>8}")
    lines, listed, pairs = [heading], [], all_pairs(model)
    if not pairs:
        return ["no layer has two heads: there are no pairs to compare"], ["no layer has two heads"]
    for name, title in MEASURES.items():
        a, b = (half[name] for half in halves)
        mean, error, nulls = (a + b).mean, (a + b).error, null[name].mean
        above, above_null, above_a, above_b = (values > similarity_threshold
                                               for values in (mean, nulls, a.mean, b.mean))
        pearson, spearman = correlation(a.mean, b.mean)
        stable = f"{(above_a & above_b).sum()} of {(above_a | above_b).sum()}"
        lines.append(f"{name + ': ' + title:>48} {mean.mean():6.3f} {nulls.mean():6.3f} {mean.max():8.3f} "
                     f"{above.sum():6} {above_null.sum():6} {stable:>12} {shown(pearson):>8} "
                     f"{shown(spearman):>8}")
        for i in sorted(np.flatnonzero(above), key=lambda i: -mean[i]):
            layer, first, second = pairs[i]
            listed.append(f"{name:8} layer {layer:2} heads {first:2} {second:2}  "
                          f"{mean[i]:.4f} +- {error[i]:.4f}, random weights {nulls[i]:.4f}")
    lines.append(f"{len(pairs)} pairs; above: more than {similarity_threshold}; both halves: of the pairs "
                 f"above it on either half of the data, those above it on both; then the halves' correlation")
    return lines, listed or [f"no pair is above {similarity_threshold}"]


def importance_lines(halves: Halves) -> list[str]:
    """Each measure by head: how large, how stable over the halves; whether the two of importance agree."""
    lines = [f"{'by head':>48} {'mean':>9} {'lowest':>9} {'highest':>9} {'Pearson':>8} {'Spearman':>8}"]
    names = [name for name in HEAD_MEASURES if name in halves[0]]
    for name in names:
        a, b = (half[name] for half in halves)
        mean, (pearson, spearman) = (a + b).mean, correlation(a.mean, b.mean)
        lines.append(f"{HEAD_MEASURES[name]:>48} {mean.mean():9.5f} {mean.min():9.5f} {mean.max():9.5f} "
                     f"{shown(pearson):>8} {shown(spearman):>8}")
    if "ablation" in names:
        pearson, spearman = correlation(*(sum_of(halves)[name].mean for name in ("importance", "ablation")))
        lines.append(f"{'importance against ablation':>48} {'':>29} {shown(pearson):>8} {shown(spearman):>8}")
    return lines


def sum_of(halves: Halves) -> dict[str, Running]:
    return {name: halves[0][name] + halves[1][name] for name in halves[0]}


def table_rows(places: list[dict], names: Iterable[str], halves: Halves,
               null: dict[str, Running]) -> list[dict]:
    """The rows `places`, and of each measure its mean, its standard error over sequences, the mean of each
    half of the data, and the null where there is one."""
    rows = [dict(place) for place in places]
    for name in names:
        a, b = (half[name] for half in halves)
        columns = {name: (a + b).mean, f"{name}_se": (a + b).error, f"{name}_half_a": a.mean,
                   f"{name}_half_b": b.mean, **({f"{name}_null": null[name].mean} if name in null else {})}
        for key, values in columns.items():
            for row, value in zip(rows, values):
                row[key] = value
    return rows


def grouped(rows: list[dict]) -> dict[tuple, dict[float, tuple[float, float, float]]]:
    """{(criterion, merge): {share: (change, low, high)}}: the interval of `judge`, or for `random` the mean
    over its seeds and one standard deviation to either side; nan where a single one gives no interval."""
    groups = {}
    for row in rows:
        groups.setdefault((row["criterion"], row["merge"]), {}).setdefault(row["share"], []).append(row)
    found = {}
    for key, by_share in groups.items():
        for share, same in by_share.items():
            change = np.array([row["change"] for row in same])
            spread = change.std(ddof=1) if len(same) > 1 else math.nan
            interval = ((change.mean(), change.mean() - spread, change.mean() + spread)
                        if key == ("random", "")
                        else (same[0]["change"], same[0]["low"], same[0]["high"]))
            found.setdefault(key, {})[share] = interval
    return found


def pruning_lines(rows: list[dict]) -> list[str]:
    """Tables of size and speed, and of perplexity by criterion; then what they say."""
    timed, groups = [row for row in rows if row["prefill_tok_s"] != ""], grouped(rows)
    shares = [row["share"] for row in timed]
    columns = {"share": (6, ".0%", "share"), "heads": (6, "", "heads"), "params": (12, ",", "parameters"),
               "flops_per_token": (12, ",", "FLOPs/token"), "cache_bytes": (14, ",", "cache B/token"),
               "prefill_tok_s": (14, ",.0f", "prefill tok/s"), "decode_tok_s": (14, ",.0f", "decode tok/s")}
    lines = [" ".join(f"{title:>{width}}" for width, _, title in columns.values())]
    lines += [" ".join(f"{row[key]:>{width}{form}}" for key, (width, form, _) in columns.items())
              for row in timed]
    dense = timed[0]["perplexity"] / (1 + timed[0]["change"])
    names = {key: " + ".join(filter(None, key)) for key in groups}
    width = max(map(len, names.values()))
    lines += ["", (f"change of the perplexity {dense:.3f}, without healing; +- half the 95% interval over "
                   f"{BLOCKS} parts of val, or the standard deviation of {random_seeds} random prunings"),
              f"{'':>{width}} " + " ".join(f"{share:>16.0%}" for share in shares)]
    for key, by_share in groups.items():
        cells = (f"{change:+.2%} +-{shown((high - low) / 2, '.2%')}"
                 for change, low, high in (by_share[share] for share in shares))
        lines.append(f"{names[key]:>{width}} " + " ".join(f"{cell:>16}" for cell in cells))
    lines.append("")
    main = timed[0]["criterion"]
    for share in filter(None, shares):
        change, low, high = groups[main, ""][share]
        mean, least, most = groups["random", ""][share]
        below = (high if high == high else change) < 0.05
        verdict = "better than" if high < least else "worse than" if low > most else "not to be told from"
        if main != "random":
            lines.append(f"{share:.0%} of the heads by {main}: {change:+.2%}, {verdict} random, {mean:+.2%}, "
                         f"by these errors; {'' if below else 'not '}below 5%")
    return lines


def stability_lines(model: GPT, of_halves: list[dict[str, np.ndarray]], shares: list[float]) -> list[str]:
    """How many of the heads that a criterion drops it drops on either half of the data alone."""
    lines = ["", "heads that are dropped on both halves of the data, of those dropped on one"]
    for name in CRITERIA:
        if name != "random":
            a, b = (drop_order(name, model, values) for values in of_halves)
            counts = [count_heads(share, len(a)) for share in shares]
            cells = (f"{len({*a[:n]} & {*b[:n]})} of {n}" for n in counts)
            lines.append(f"{name:>20} " + " ".join(f"{cell:>9}" for cell in cells))
    return lines


def save_figure(name: str, figure) -> None:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=90)
    write_atomically(Path(out_dir, name), file.getvalue())


def draw_similarity(plt, model: GPT, name: str, found: np.ndarray, null: np.ndarray) -> None:
    """A heatmap of head against head for each layer: found (P,) below the diagonal, null (P,) above it.
    There must be a pair in some layer."""
    counts = [block.attn.n_head for block in model.transformer.h]
    columns = math.ceil(math.sqrt(len(counts)))
    rows = math.ceil(len(counts) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(max(5.2, 2.7 * columns + 0.8), 2.75 * rows + 0.6),
                                squeeze=False, layout="constrained")
    pairs = np.array(all_pairs(model)).reshape(-1, 3)
    low = -1.0 if name == "output" else 0.0
    for axis in axes.flat[len(counts):]:
        axis.set_axis_off()
    for layer, (axis, nh) in enumerate(zip(axes.flat, counts)):
        square, here = np.full((nh, nh), np.nan), pairs[:, 0] == layer
        square[pairs[here, 2], pairs[here, 1]] = found[here]
        square[pairs[here, 1], pairs[here, 2]] = null[here]
        if not here.any():
            axis.set_title(f"layer {layer}: no pairs", fontsize=9)
            axis.set_axis_off()
            continue
        image = axis.imshow(square, vmin=low, vmax=1, cmap="RdBu_r" if low else "viridis")
        step = math.ceil(nh / 8)
        axis.set(xticks=range(0, nh, step), yticks=range(0, nh, step), xlabel="head", ylabel="head")
        means = f"mean {found[here].mean():.2f}, null {null[here].mean():.2f}"
        axis.set_title(f"layer {layer}: {means}", fontsize=9)
    figure.colorbar(image, ax=axes, label="mean cosine", shrink=0.8)
    figure.suptitle(f"Similarity of {MEASURES[name]}\nbelow the diagonal: this model; above: random weights")
    save_figure(f"similarity_{name}.png", figure)
    plt.close(figure)


def draw_heads(plt, model: GPT, both: dict[str, Running]) -> None:
    """A map of layer against head for each measure."""
    names = [name for name in HEAD_MEASURES if name in both]
    figure, axes = plt.subplots(1, len(names), figsize=(4.3 * len(names), 4.2), layout="constrained",
                                squeeze=False)
    layers, heads = np.array(all_heads(model)).T
    for axis, name in zip(axes[0], names):
        square = np.full((model.config.n_layer, heads.max() + 1), np.nan)
        square[layers, heads] = both[name].mean
        image = axis.imshow(square, cmap="viridis", aspect="auto")
        steps = [max(1, math.ceil(size / 12)) for size in square.shape]
        axis.set(xticks=range(0, square.shape[1], steps[1]), yticks=range(0, square.shape[0], steps[0]),
                 xlabel="head", ylabel="layer")
        axis.set_title(HEAD_MEASURES[name], fontsize=10)
        figure.colorbar(image, ax=axis)
    save_figure("heads.png", figure)
    plt.close(figure)


def draw_pruning(plt, rows: list[dict]) -> None:
    """Change of perplexity by criterion, by merging, and size and speed, against the share of heads."""
    groups, merged = grouped(rows), [row["criterion"] for row in rows if row["merge"]][:1]
    n = 2 + len(merged)
    figure, axes = plt.subplots(1, n, figsize=(6.2 * n, 5), layout="constrained")
    panels = {axes[0]: [key for key in groups if not key[1]]}
    if merged:
        panels[axes[1]] = [key for key in groups if key[0] in merged]
    for axis, keys in panels.items():
        for i, key in enumerate(keys):
            shares, values = zip(*groups[key].items())
            change, low, high = 100 * np.array(values).T
            errors = np.nan_to_num([change - low, high - change])
            label, style = " + ".join(filter(None, key)), {"color": f"C{i}"}
            if label == "random":
                label, style = f"random, mean and sd of {random_seeds}", {"color": "gray", "linestyle": "--"}
            beside = 0.3 * (i - len(keys) / 2)  # or bars would lie on bars
            axis.errorbar(100 * np.array(shares) + beside, change, errors, marker="o", markersize=4,
                          capsize=3, label=label, **style)
        axis.axhline(5, color="black", linestyle=":", linewidth=1, label="5%")
        axis.set_yscale("symlog", linthresh=1)
        lows = [low for key in keys for _, low, _ in groups[key].values() if low == low]
        axis.set_ylim(bottom=min([-0.5, *(120 * low for low in lows)]))
        axis.yaxis.set_major_formatter(lambda value, position: f"{value:g}")
        axis.set(xlabel="heads removed (%)", ylabel="change of perplexity (%, linear below 1, log above)",
                 title=("Without healing" if axis is axes[0] else f"{merged[0]}, dropped heads folded")
                 + f"; bars: 95% over {BLOCKS} parts of val")
    timed = [row for row in rows if row["prefill_tok_s"] != ""]
    for key, label in (("params", "parameters"), ("flops_per_token", "FLOPs per token"),
                       ("cache_bytes", "KV cache"), ("prefill_tok_s", "prefill, tok/s (measured)"),
                       ("decode_tok_s", "decode, tok/s (measured)")):
        axes[-1].plot([100 * row["share"] for row in timed], [row[key] / timed[0][key] for row in timed],
                      marker="o", markersize=4, linestyle="--" if "tok_s" in key else "-", label=label)
    axes[-1].set(xlabel="heads removed (%)", ylabel=f"relative to {timed[0]['share']:.0%} removed",
                 title="Size and speed")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    save_figure("pruning.png", figure)
    plt.close(figure)


# ---- the script ----------------------------------------------------------------


def check_settings() -> tuple[list[float], list[Head], list[str]]:
    """(shares, given heads, merges) of the settings. Raises UserError for what does not fit."""
    try:
        shares = {float(part) for part in prune_fractions.split(",") if part.strip()}
    except ValueError:
        shares = {math.nan}
    if not all(0 <= share < 1 for share in shares):
        raise UserError(f"prune_fractions={prune_fractions}: wanted numbers from 0 on, below 1, with commas "
                        f"between them, such as 0,0.15,0.3")
    given = []
    for part in prune_heads.split(",") if prune_heads else []:
        layer, colon, head = part.strip().partition(":")
        if not (colon and layer.isdecimal() and head.isdecimal()):
            raise UserError(f"prune_heads={prune_heads}: got {part!r}, wanted LAYER:HEAD, counted from 0, "
                            f"with commas between them, such as 0:3,2:1")
        given.append((int(layer), int(head)))
    merges = list(dict.fromkeys(part for part in merge.split(",") if part))
    if merges and not (shares or given):
        raise UserError(f"merge={merge}: got no heads to fold; give --prune_fractions or --prune_heads too")
    for how in merges:
        if how not in MERGES:
            raise UserError(f"merge={how}: wanted {', '.join(MERGES)}")
    folder = Path(out_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"out_dir={out_dir} is there already and not empty; give the name of a new folder "
                        f"with --out_dir=ANOTHER, or remove this one")
    return sorted({0.0, *shares}) if shares else [], given, merges  # 0: what the others are compared with


def open_windows(state: dict, source: str, model: GPT, dev: Device) -> list[Windows]:
    """Calibration windows, spread over the train split, and the first windows of the val split."""
    folder = find_data_dir(state, source, data_dir)
    tok, T, found = checkpoint_tokenizer(state), model.config.block_size, []
    for split, n_tokens in (("train", calibration_tokens), ("val", val_tokens)):
        stream = open_stream(folder, split, tok, T)
        loader = WindowLoader(stream, T, T, seed, tok.n_vocab, shuffle=False)
        n = min(loader.n_windows, max(4, n_tokens // T))  # 4: two for each half
        ids = np.linspace(0, loader.n_windows - 1, n).astype(np.int64) if split == "train" else np.arange(n)
        found.append(Windows(loader, ids, dev))
    if T < 4:
        raise UserError(f"{source} has a context of {T} tokens, in which there is nothing to compare; wanted "
                        f"4 or more: name another --checkpoint")
    if len(found[0].ids) < 4:
        raise UserError(f"got {len(found[0].ids)} windows of {T} tokens to calibrate on, wanted at least 4; "
                        f"build more data with fineweb.py")
    return found


def save_pruned(state: dict, source: str, less: GPT, removed: list[Head], name: str) -> None:
    """Write a model without `removed` heads as a checkpoint that is no run: it has no optimizers."""
    kept = {key: state[key] for key in ("step", "config", "tokenizer", "data", "provenance") if key in state}
    write_checkpoint(Path(out_dir, name), {
        **kept, "model": less.state_dict(), "model_config": describe_model(less),
        "pruned": {"from": str(source), "removed": [list(head) for head in sorted(removed)]}})


def analyze(model: GPT, calibration: Windows, with_ablation: bool) -> tuple[Halves, dict]:
    """Measure all heads on both halves of the windows; write the tables and figures, print what they say.

    Returns what was measured, and the moments for `fold`.
    """
    torch.manual_seed(seed)
    null, _ = watch(GPT(model.config).to(calibration.dev.device).eval(), calibration)
    halves, moments = [], {}
    for part in calibration.halves():
        half, of_half = watch(model, part)
        half["importance"] = importance(model, part)
        if with_ablation:
            half["ablation"] = ablation(model, part)
        halves.append(half)
        moments = {layer: moments.get(layer, 0.0) + of_half[layer] for layer in of_half}
    lines, listed = similarity_lines(model, halves, null)
    lines += ["", *importance_lines(halves)]
    print("\n".join(lines), flush=True)
    pairs = [dict(zip(("layer", "head", "other"), pair)) for pair in all_pairs(model)]
    heads = [dict(zip(("layer", "head"), head)) for head in all_heads(model)]
    write("pairs.csv", to_csv(table_rows(pairs, MEASURES, halves, null)) if pairs else b"layer,head,other\n")
    write("heads.csv", to_csv(table_rows(heads, [name for name in HEAD_MEASURES if name in halves[0]], halves,
                                         null)))
    write("similarity.txt", "\n".join([*lines, ""]).encode())
    write("similar_pairs.txt", "\n".join([*listed, ""]).encode())
    plt = pyplot()
    for name in MEASURES if pairs else ():
        draw_similarity(plt, model, name, sum_of(halves)[name].mean, null[name].mean)
    draw_heads(plt, model, sum_of(halves))
    return halves, moments


def pyplot():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def write(name: str, content: bytes) -> None:
    write_atomically(Path(out_dir, name), content)


def main() -> None:
    shares, given, merges = check_settings()
    dev = resolve_device(device, dtype)
    source = checkpoint or newest_checkpoint()
    state = load_any(source)
    model = build_model(state, str(source)).to(dev.device).requires_grad_(False)
    for key in ("model", "optimizers"):  # more than the model itself takes
        state.pop(key, None)
    model.loss_chunk = dev.loss_chunk
    heads = all_heads(model)
    if not heads:
        raise UserError(f"checkpoint {source}: it has no heads left to analyze or to remove")
    check_heads(model, given, f"prune_heads={prune_heads}")
    calibration, val = open_windows(state, source, model, dev)
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    T = model.config.block_size
    print(f"{source}, step {state['step']}: {len(heads)} heads in {model.config.n_layer} layers; measured on "
          f"{len(calibration.ids) * T:,} train tokens, judged on {len(val.ids) * T:,} val tokens\n",
          flush=True)
    halves, moments = analyze(model, calibration, with_ablation=not given)
    if given:
        shares, orders = [0.0, len(given) / len(heads)], {("given", ""): given}
    elif shares:
        counts = {count_heads(share, len(heads)): share for share in reversed(shares)}  # the lowest of each
        for share in sorted({*shares} - {*counts.values()}):
            print(f"note: {share:.1%} of {len(heads)} heads, {count_heads(share, len(heads))}, is as many as "
                  f"of another share, and left out")
        shares = sorted(counts.values())
        *of_halves, values = ({name: running.mean for name, running in measured.items()}
                              for measured in (*halves, sum_of(halves)))
        orders = {(name, ""): drop_order(name, model, values) for name in CRITERIA if name != "random"}
    else:
        print(f"written to {out_dir}")
        return
    for number in range(seed, seed + random_seeds):
        orders["random", number] = random.Random(number).sample(heads, len(heads))
    main_criterion = "given" if given else criterion
    similarity = sum_of(halves)["output"].mean
    names = []

    def keep(share, how, less, removed):
        if removed:
            names.append("_".join(filter(None, ("pruned", "" if given else f"{share}", how))) + ".pt")
            save_pruned(state, source, less, removed, names[-1])

    rows = sweep(model, orders, shares, main_criterion, merges, moments, similarity, val, keep)
    lines = pruning_lines(rows)
    if not given:
        lines += stability_lines(model, of_halves, shares)
    print("\n" + "\n".join(lines), flush=True)
    write("pruning.csv", to_csv(rows))
    write("pruning.txt", "\n".join([*lines, ""]).encode())
    draw_pruning(pyplot(), rows)
    if names:
        print(f"\nnext: python generate.py --checkpoint={Path(out_dir, names[0])}\n"
              f"      python train_gpt2.py config/finetune_gpt2.py --init_from={Path(out_dir, names[0])} "
              f"--data_dir={val.loader.stream.paths[0].parent}")


if __name__ == "__main__":
    configure(globals())
    main()
