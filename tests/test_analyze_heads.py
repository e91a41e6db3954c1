"""analyze_heads.py against slow twins: surgery by hand, hand-made heads, finite differences."""

import copy
import csv
import io
import itertools
import math
import random
from contextlib import contextmanager, nullcontext, redirect_stdout

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from training import load_model, losses, snapshot, train

import analyze_heads as study
import decoding
import generate
import hellaswag
from analyze_heads import (
    HEAD_MEASURES,
    MERGES,
    PAIR_MEASURES,
    all_heads,
    all_pairs,
    average,
    fold,
    masked,
    prune,
    r2,
    watch,
)
from bpe import load_tokenizer
from checkpoint import checkpoint_tokenizer, describe_model, describe_tokenizer, save_checkpoint
from configurator import UserError, annotations_of
from convert_hf import export_hf, load_any
from device import Device
from model import GPT, GPTConfig
from shards import write_manifest, write_shard

V = 61
DEV = Device(torch.device("cpu"), torch.float32, False, "CPU")
ALL = (4, 4, 4)
RAGGED = (2, 0, 3)


def make_model(heads=None, seed=0, std=0.4, **overrides):
    """3 layers of 4 heads, 24 wide, 16 tokens; weights so large that every head, bias and norm matters."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{"block_size": 16, "vocab_size": 64, "n_vocab": V, "n_layer": 3, "n_head": 4,
                             "n_embd": 24, "heads": heads, **overrides})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = ".ln_" in name and name.endswith("weight")
            parameter.normal_(mean=1.0 if is_norm else 0.0, std=std)
    return model


def random_ids(*shape, seed=1, n_vocab=V):
    return torch.randint(0, n_vocab, shape, generator=torch.Generator().manual_seed(seed))


def make_batches(n=7, T=16, size=3, seed=2):
    """n windows of random ids, `size` at a time."""
    tokens = random_ids(n, T + 1, seed=seed)
    return [(rows[:, :-1], rows[:, 1:]) for rows in tokens.split(size)]


def cache_bytes(model, dtype):
    """Bytes of the KV cache for one token."""
    cache = decoding.KVCache(model.config, 1, torch.device("cpu"), dtype)
    return sum(tensor.nbytes for tensor in (*cache.k, *cache.v)) // model.config.block_size


def joined(batches):
    """All x and y, (n, T)."""
    return (torch.cat(parts) for parts in zip(*batches))


def columns_of(model, layer, head):
    hs = model.config.head_size
    return slice(head * hs, (head + 1) * hs)


def scaled_by_hand(model, heads, factor):
    """A copy in float64 whose columns of c_proj are multiplied by `factor` at `heads`."""
    copied = copy.deepcopy(model).double()
    with torch.no_grad():
        for layer, head in heads:
            copied.transformer.h[layer].attn.c_proj.weight[:, columns_of(model, layer, head)] *= factor
    return copied


def renumbered(heads, removed):
    """Where `heads` are once `removed` are gone."""
    return [(layer, head - sum(1 for other, gone in removed if other == layer and gone < head))
            for layer, head in heads]


@contextmanager
def untouched(model):
    """Asserts that the weights are the same bits and that no hook is left."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    yield
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert all(parameter.grad is None for parameter in model.parameters())


# ---- surgery -------------------------------------------------------------------


@given(st.sampled_from([ALL, RAGGED, (1, 4, 4), (0, 0, 1)]), st.sampled_from(["pre", "post"]),
       st.integers(0, 2**12 - 1), st.integers(0, 2**12 - 1))
@settings(max_examples=15, deadline=None)
@example(ALL, "pre", 0, 0)
@example(ALL, "pre", 2**12 - 1, 0)
@example(ALL, "post", 2**12 - 1, 5)
@example(ALL, "post", 0b1111_0000, 1)
@example(RAGGED, "pre", 0b11100, 1)
@example(RAGGED, "post", 0b00101, 0b10)
@torch.no_grad()
def test_pruned_is_masked_for_any_set_of_heads(counts, norm_position, bits, more_bits):
    """Guarantee 15."""
    model = make_model(counts, norm_position=norm_position)
    known = all_heads(model)
    assert known == [(layer, head) for layer, n in enumerate(counts) for head in range(n)]
    heads = [head for i, head in enumerate(known) if bits >> i & 1]
    idx, targets = random_ids(2, 16), random_ids(2, 16, seed=3)
    by_hand = scaled_by_hand(model, heads, 0.0)
    with untouched(model):
        pruned = prune(model, heads)
        with masked(model, heads):
            wanted, wanted_loss = model(idx), model(idx, targets)
            tokens = [token for token, _ in decoding.generate(model, idx[:, :5], 14, temperature=0.0)]
    close = 1e-5 * wanted.abs().max().item()  # of logits of this size, float32 keeps seven digits
    torch.testing.assert_close(pruned(idx), wanted, atol=close, rtol=0)
    torch.testing.assert_close(pruned(idx).double(), by_hand(idx), atol=close, rtol=0)
    torch.testing.assert_close(pruned(idx, targets), wanted_loss, atol=1e-5, rtol=1e-5)
    for use_cache in (True, False):  # past the context's end, where the cache is filled anew
        found = decoding.generate(pruned, idx[:, :5], 14, temperature=0.0, use_cache=use_cache)
        assert torch.equal(torch.cat([token for token, _ in found]), torch.cat(tokens))
    assert not pruned.training and pruned.loss_chunk == model.loss_chunk

    left = [n - sum(1 for other, _ in heads if other == layer) for layer, n in enumerate(counts)]
    assert pruned.config.heads == tuple(left) and pruned.config.n_head == 4
    C, hs, n = 24, 6, len(heads)
    assert model.num_params() - pruned.num_params() == n * (3 * hs * C + 3 * hs + C * hs)
    n_stored = sum(tensor.numel() for tensor in pruned.state_dict().values())
    assert pruned.num_params() == n_stored - 64 * C  # tied
    N = pruned.num_params() - 16 * C
    assert pruned.flops_per_token(16) == 6 * N + 12 * 16 * sum(left) * hs
    assert cache_bytes(pruned, torch.float32) == sum(left) * 2 * hs * 4
    assert cache_bytes(pruned, torch.bfloat16) == sum(left) * 2 * hs * 2

    rest = [head for head in known if head not in heads]
    others = [head for i, head in enumerate(rest) if more_bits >> i & 1]
    twice, at_once = prune(pruned, renumbered(others, heads)), prune(model, heads + others)
    assert twice.config == at_once.config
    for name, tensor in at_once.state_dict().items():
        assert torch.equal(twice.state_dict()[name], tensor), name


def test_a_pruned_model_keeps_its_mode_and_learns():
    model = make_model()
    model.loss_chunk = 8
    pruned = prune(model.train(), [(0, 1), (1, 0), (1, 1), (1, 2), (1, 3)])
    assert pruned.training and pruned.loss_chunk == 8
    pruned(random_ids(2, 16), random_ids(2, 16, seed=3)).backward()
    gradients = {name: parameter.grad for name, parameter in pruned.named_parameters()}
    idle = ("transformer.h.1.attn.c_attn", "transformer.h.1.attn.c_proj.weight", "transformer.h.1.ln_1")
    assert all(gradient.isfinite().all() for name, gradient in gradients.items() if not name.startswith(idle))
    assert gradients["transformer.h.1.attn.c_proj.bias"].abs().max() > 0


def test_heads_that_cannot_be_removed():
    model = make_model()
    for head in ((0, 4), (3, 0), (0, -1)):
        with untouched(model), pytest.raises(ValueError, match="no such heads"):
            prune(model, [head])


# ---- what heads do -------------------------------------------------------------


def patterns_by_definition(attn, qkv):
    """softmax(q k^T / sqrt(hs)) over the past, (B, nh, T, T) in float64, a query at a time."""
    B, T, _ = qkv.shape
    nh, hs = attn.n_head, attn.head_size
    found = np.zeros((B, nh, T, T))
    qkv = qkv.double().numpy()
    for b, head, t in itertools.product(range(B), range(nh), range(T)):
        q = qkv[b, t, head * hs:(head + 1) * hs]
        e = [math.exp(q @ qkv[b, s, (nh + head) * hs:(nh + head + 1) * hs] / math.sqrt(hs))
             for s in range(t + 1)]
        found[b, head, t, :t + 1] = np.array(e) / sum(e)
    return found


def seen_by_hand(model, idx):
    """[(layer, qkv, y)] of all layers with heads: the forward pass written out."""
    found, pre = [], model.config.norm_position == "pre"
    x = model.transformer.wte(idx) + model.transformer.wpe(torch.arange(idx.size(1)))
    for layer, block in enumerate(model.transformer.h):
        attn, inside = block.attn, block.ln_1(x) if pre else x
        added = attn.c_proj.bias
        if attn.n_head:
            qkv = inside @ attn.c_attn.weight.T + attn.c_attn.bias
            v = qkv.chunk(3, dim=2)[2].unflatten(2, (attn.n_head, -1)).double()  # (B, T, nh, hs)
            patterns = torch.from_numpy(patterns_by_definition(attn, qkv))
            y = torch.einsum("bhts,bshd->bthd", patterns, v).flatten(2).float()
            found.append((layer, qkv, y))
            added = y @ attn.c_proj.weight.T + attn.c_proj.bias
        x = x + added if pre else block.ln_1(x + added)
        x = x + block.mlp(block.ln_2(x)) if pre else block.ln_2(x + block.mlp(x))
    return found


def cosine(a, b):
    return a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) if a.any() and b.any() else 0.0


@torch.no_grad()
def watch_by_hand(model, seen):
    """{measure: (windows, P or H)} and {layer: rows (windows, T, nh hs + 1)}, a query at a time."""
    found, rows = {name: [] for name in (*PAIR_MEASURES, "previous", "first", "entropy", "distance")}, {}
    for layer, qkv, y in seen:
        attn = model.transformer.h[layer].attn
        patterns, (B, T, _) = patterns_by_definition(attn, qkv), y.shape
        mean, queries = patterns.mean(axis=1), range(1, T)  # the first query has one key
        uniform = np.broadcast_to(1 / np.arange(1, T + 1)[:, None], (B, T, T))
        for head in range(attn.n_head):
            of = patterns[:, head]
            found["previous"].append([np.mean([p[t, t - 1] for t in queries]) for p in of])
            found["first"].append([np.mean([p[t, 0] for t in queries]) for p in of])
            found["entropy"].append([np.mean([-sum(w * math.log(w) for w in p[t, :t + 1]) for t in queries])
                                     for p in of])
            found["distance"].append([np.mean([sum(p[t, s] * (t - s) for s in range(t)) for t in queries])
                                      for p in of])
        for a, b in itertools.combinations(range(attn.n_head), 2):
            for name, shift in (("pattern", 0 * uniform), ("centred", uniform), ("centred_layer", mean)):
                found[name].append([np.mean([
                    cosine(*(patterns[i, head, t, :t + 1] - shift[i, t, :t + 1] for head in (a, b)))
                    for t in queries]) for i in range(B)])
        rows[layer] = np.concatenate((y.double().numpy(), np.ones((B, T, 1))), axis=2)
    return {name: np.array(values).T for name, values in found.items()}, rows


@pytest.mark.parametrize(("counts", "norm_position"), [(ALL, "pre"), (RAGGED, "post"), ((1, 2, 0), "pre")])
def test_what_is_watched_equals_its_definition_whatever_the_batches(counts, norm_position):
    model = make_model(counts, norm_position=norm_position)
    x, _ = joined(make_batches(4))
    with torch.no_grad():
        expected, rows = watch_by_hand(model, seen_by_hand(model, x))
    for size in (1, 3, 8):
        with untouched(model):
            values, moments = watch(model, make_batches(4, size=size))
        assert {*values} == {*expected, "by_distance"}
        for name, value in expected.items():
            np.testing.assert_allclose(values[name], value, atol=5e-5, err_msg=name)
        for layer, of in rows.items():
            for parity in (0, 1):
                flat = of[parity::2].reshape(-1, of.shape[-1])
                np.testing.assert_allclose(moments[layer][parity], flat.T @ flat, rtol=1e-4, atol=1e-3)
        assert values["by_distance"].shape == (4, len(all_heads(model)), 16)
        np.testing.assert_allclose(values["by_distance"][..., 1], values["previous"], atol=1e-6)


@pytest.mark.parametrize(("counts", "norm_position"), [(ALL, "pre"), (RAGGED, "post")])
def test_patterns_equal_their_definition_and_the_layers_output(counts, norm_position):
    model, seen = make_model(counts, norm_position=norm_position), []

    def see(layer, attn, qkv, y):
        np.testing.assert_allclose(study.attention_patterns(attn, qkv, y).numpy(),
                                   patterns_by_definition(attn, qkv), atol=1e-5)
        for tampered in (y * 1.02, y + 0.02 * y.abs().max(), y.roll(1, dims=1), torch.full_like(y, math.nan)):
            with pytest.raises(UserError, match=r"differs from the layer's own.*change attention_patterns"):
                study.attention_patterns(attn, qkv, tampered)
        seen.append(layer)

    with torch.no_grad(), study.watching(model, see):
        model(random_ids(2, 16))
    assert seen == [layer for layer, n in enumerate(counts) if n]


def head_rows(model, layer, head, part):
    """Rows of a head in c_attn: `part` 0 is Q, 1 is K, 2 is V; QQQ KKK VVV."""
    hs = model.config.head_size
    width = model.transformer.h[layer].attn.n_head * hs
    return slice(part * width + head * hs, part * width + (head + 1) * hs)


@torch.no_grad()
def copy_head(model, layer, source, target, parts=(0, 1, 2)):
    attn = model.transformer.h[layer].attn
    for part in parts:
        for tensor in (attn.c_attn.weight, attn.c_attn.bias):
            tensor[head_rows(model, layer, target, part)] = tensor[head_rows(model, layer, source, part)]
    attn.c_proj.weight[:, columns_of(model, layer, target)] = \
        attn.c_proj.weight[:, columns_of(model, layer, source)]


@torch.no_grad()
def test_twins_opposites_and_uniform_heads():
    model = make_model()
    copy_head(model, 0, 1, 3)
    copy_head(model, 2, 0, 1)
    for tensor in (model.transformer.h[2].attn.c_attn.weight, model.transformer.h[2].attn.c_attn.bias):
        tensor[head_rows(model, 2, 1, 2)] *= -1.0
    for tensor in (model.transformer.h[1].attn.c_attn.weight, model.transformer.h[1].attn.c_attn.bias):
        for head in (0, 2):
            tensor[head_rows(model, 1, head, 0)] = 0.0  # no query: uniform attention
    values, moments = watch(model, make_batches(8))
    means = {name: dict(zip(all_pairs(model), values[name].mean(axis=0))) for name in PAIR_MEASURES}
    for name in ("pattern", "centred", "centred_layer"):
        assert means[name][0, 1, 3] == pytest.approx(1.0, abs=1e-5)
        assert means[name][2, 0, 1] == pytest.approx(1.0, abs=1e-5)
        assert max(means[name][pair] for pair in [(0, 0, 1), (2, 0, 2), (2, 2, 3)]) < 0.99
    assert means["pattern"][1, 0, 2] == pytest.approx(1.0, abs=1e-5)
    assert math.isnan(means["centred"][1, 0, 2]) and math.isnan(means["centred"][1, 0, 1])
    assert not math.isnan(means["centred"][1, 1, 3])
    at = all_heads(model).index((1, 0))
    for name, expected in {"previous": np.mean([1 / (t + 1) for t in range(1, 16)]),
                           "entropy": np.mean([math.log(t + 1) for t in range(1, 16)]),
                           "distance": np.mean([t / 2 for t in range(1, 16)])}.items():
        assert values[name][:, at] == pytest.approx(np.full(8, expected), abs=1e-5)
    for layer, head, other in ((0, 1, 3), (2, 0, 1)):  # a twin and an opposite predict all
        assert r2(model, moments, layer, head, [other]) == pytest.approx(np.ones(2), abs=1e-6)
    assert (r2(model, moments, 0, 0, [1]) < 0.9).all()


@pytest.mark.parametrize("n_ids", [50, 3])
def test_scores_of_hand_made_heads(monkeypatch, n_ids):
    """Patterns are made from the tokens, so that every score is known: each head attends to one key alone.
    50 ids fill the context of 15 tokens, 3 do not."""
    model, seen, n, eot = make_model(), [], 32, V - 1
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda x, **options: seen.append(x) or forward(x, **options))

    def patterns(attn, qkv, y):
        B, T, _ = qkv.shape
        found = torch.zeros(B, 4, T, T)
        for b, t in itertools.product(range(B), range(T)):
            earlier = next((s for s in reversed(range(t)) if seen[-1][b, s] == seen[-1][b, t]), None)
            keys = (max(t - 1, 0), *((t, t) if earlier is None else (earlier, earlier + 1)), 0)
            found[b, range(4), t, keys] = 1.0
        return found

    monkeypatch.setattr(study, "attention_patterns", patterns)
    ids = np.random.default_rng(0).permutation(V - 1)[:n_ids]
    scores = study.repeated_scores(model, np.repeat([*ids, eot], 4), eot, n)
    x, length = torch.cat(seen), min(7, n_ids)
    assert x.shape == (n, 1 + 2 * length) and (x[:, 0] == eot).all()
    assert torch.equal(x[:, 1:1 + length], x[:, 1 + length:]) and {*x[:, 1:].flatten().tolist()} == {*ids}
    assert all(len({*row}) == length for row in x[:, 1:].tolist())  # or a token would have two earlier copies
    for name, expected in {"duplicate": [0, 1, 0, 0], "induction": [0, 0, 1, 0]}.items():
        assert scores[name].shape == (n, 12)
        np.testing.assert_allclose(scores[name][:, :4], np.tile(expected, (n, 1)), atol=1e-6, err_msg=name)
    values, _ = watch(model, make_batches(3))
    assert values["previous"][0, 0] == pytest.approx(1) and values["first"][0, 3] == pytest.approx(1)
    assert values["previous"][0, 3] == values["first"][0, 0] == pytest.approx(1 / 15)
    assert values["entropy"][0, :4] == pytest.approx(0, abs=1e-6)
    assert values["distance"][0, [0, 3]] == pytest.approx([1, 8])


@torch.no_grad()
def test_a_swapped_head_attends_as_the_other_and_keeps_its_values():
    model, batches = make_model(RAGGED), make_batches(4)
    x, _ = joined(batches)
    qkv = next(qkv for layer, qkv, _ in seen_by_hand(model, x) if layer == 2)
    attn = model.transformer.h[2].attn
    patterns = patterns_by_definition(attn, qkv)
    v = qkv[:, :, head_rows(model, 2, 1, 2)].double().numpy()  # (B, T, hs)
    seen = []
    watching = study.watching(model, lambda *of: seen.append(of))
    with untouched(model), study.attending(model, 2, 1, 0), watching:
        model(x)
    found = next(y for at, _, _, y in seen if at == 2)[..., columns_of(model, 2, 1)]
    np.testing.assert_allclose(found.numpy(), patterns[:, 0] @ v, atol=1e-4)
    seen.clear()
    with study.attending(model, 2, 1), study.watching(model, lambda *of: seen.append(of)):
        model(x)
    uniform = np.tri(16) / np.arange(1, 17)[:, None]
    found = next(y for at, _, _, y in seen if at == 2)[..., columns_of(model, 2, 1)]
    np.testing.assert_allclose(found.numpy(), uniform @ v, atol=1e-4)
    changes = [study.attending(model, 2, 1, 0)]
    assert np.abs(study.loss_rises(model, batches, "", changes)).max() > 0.01
    copy_head(model, 2, 0, 1, parts=(0, 1))  # equal patterns: nothing changes
    changes = [study.attending(model, 2, a, b) for a, b in ((0, 1), (1, 0))]
    assert study.loss_rises(model, batches, "", changes) == pytest.approx(np.zeros((4, 2)), abs=1e-6)


@torch.no_grad()
def test_the_mean_of_a_head_is_what_folding_puts_in_its_place():
    model, batches = make_model(RAGGED), make_batches(8)
    _, moments = watch(model, batches)
    means, heads, (x, _) = study.mean_outputs(model, moments), [(0, 1), (2, 0), (2, 2)], joined(batches)
    for layer, _, y in seen_by_hand(model, x):
        torch.testing.assert_close(means[layer], y.mean(dim=(0, 1)), atol=1e-4, rtol=1e-4)
    with untouched(model), masked(model, heads, means):
        expected = model(x)
    torch.testing.assert_close(fold(model, heads, "mean", moments)(x), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(prune(model, heads)(x), expected, atol=0.01)


@pytest.mark.parametrize(("counts", "norm_position"), [(ALL, "pre"), (RAGGED, "post")])
def test_importance_and_ablation_are_differences_of_the_loss(counts, norm_position):
    model, batches = make_model(counts, norm_position=norm_position), make_batches(4)
    with torch.no_grad():
        model.transformer.h[2].attn.c_proj.weight[:, columns_of(model, 2, 1)] = 0.0
    heads, (x, y) = all_heads(model), joined(batches)
    with untouched(model):
        found = study.importance(model, batches)
        ablated = study.loss_rises(model, batches, "", [masked(model, [head]) for head in heads])

    @torch.no_grad()
    def loss(heads, factor):
        return scaled_by_hand(model, heads, factor)(x, y, reduction="none").mean(dim=1).double().numpy()

    eps = 1e-3
    slopes = np.array([(loss([head], 1 + eps) - loss([head], 1 - eps)) / (2 * eps) for head in heads]).T
    rises = np.array([loss([head], 0.0) - loss([], 1.0) for head in heads]).T
    np.testing.assert_allclose(found, np.abs(slopes), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(ablated, rises, rtol=1e-3, atol=1e-5)
    silent = heads.index((2, 1))
    assert found[:, silent].max() == 0 == np.abs(ablated[:, silent]).max()
    assert np.delete(found, silent, axis=1).mean(axis=0).min() > 0.01 and np.abs(ablated).max() > 0.01


# ---- which heads to remove, what takes their place -----------------------------


@torch.no_grad()
def test_r2_is_that_of_least_squares_on_the_other_half():
    model, batches = make_model(), make_batches(8)
    _, moments = watch(model, batches)
    y = next(y for layer, _, y in seen_by_hand(model, next(joined(batches))) if layer == 1).double().numpy()
    weight = model.transformer.h[1].attn.c_proj.weight.double().numpy()[:, columns_of(model, 1, 2)]
    halves, found = [y[0::2].reshape(-1, 24), y[1::2].reshape(-1, 24)], r2(model, moments, 1, 2, [0, 3])
    for i, (fit_on, test_on) in enumerate((halves, halves[::-1])):
        known, target = [np.r_[0:6, 18:24]], columns_of(model, 1, 2)
        coef = np.linalg.lstsq(np.c_[fit_on[:, known[0]], np.ones(len(fit_on))], fit_on[:, target])[0]
        error = test_on[:, target] - np.c_[test_on[:, known[0]], np.ones(len(test_on))] @ coef
        spread = test_on[:, target] - fit_on[:, target].mean(axis=0)
        expected = 1 - ((error @ weight.T)**2).sum() / ((spread @ weight.T)**2).sum()
        assert found[i] == pytest.approx(expected, abs=1e-4)
    attn = model.transformer.h[0].attn
    attn.c_attn.weight[head_rows(model, 0, 3, 2)] = 0.0  # a constant output
    assert r2(model, watch(model, batches)[1], 0, 3, [0]).tolist() == [1.0, 1.0]


def test_the_cap_of_a_layer(monkeypatch):
    model = make_model((4, 1, 3))
    order = all_heads(model)

    def chosen(cap, n):
        monkeypatch.setattr(study, "layer_cap", cap)
        return study.select(model, n, lambda head, removed: order.index(head))

    assert chosen(1.0, 8) == order
    assert chosen(0.5, 4) == [(0, 0), (0, 1), (1, 0), (2, 0)]  # of 1 head one, of 3 one
    assert chosen(0.5, 6) == [(0, 0), (0, 1), (1, 0), (2, 0), (0, 2), (0, 3)]  # more than all caps allow
    assert chosen(0.0, 3) == [(0, 0), (1, 0), (2, 0)]


def test_greedy_notices_what_one_shot_does_not(monkeypatch):
    """Two heads that stand in for each other: removing either is free, removing both is not."""
    model, calls = make_model(), []
    heads = all_heads(model)
    rises = np.array([0.01, 0.02, *(0.1 * (1 + i) for i in range(2, 12))])
    single = dict(zip(heads, rises))

    def window_losses(*_):
        both = {(0, 0), (0, 1)} <= {*calls[-1]}
        return np.array([3.0 + sum(single[head] for head in calls[-1]) + 5.0 * both])

    monkeypatch.setattr(study, "masked", lambda model, removed: nullcontext(calls.append(removed)))
    monkeypatch.setattr(study, "window_losses", window_losses)
    means = {"importance": rises, "ablation": rises, "mean_ablation": -rises, "centred": np.zeros(18),
             "pattern": np.zeros(18)}
    _, moments = watch(model, make_batches(4))
    orders = study.removal_orders(model, 3, means, moments, [])
    assert orders["ablation"][:2] == [(0, 0), (0, 1)] and orders["greedy"] == [(0, 0), (0, 2), (1, 0)]
    assert orders["mean_ablation"] == [(2, 3), (2, 2), (1, 3)]
    # the rise of a head that was too high is remeasured only while it is among the cheapest
    calls.clear()
    study.removal_orders(model, 2, means, moments, [])
    assert len(calls) == len({*calls}) == 1 + 2 * study.GREEDY_CANDIDATES


@torch.no_grad()
def test_orders_of_made_up_values(monkeypatch):
    """Pairs 0:01 0:02 0:12 1:01."""
    model, batches = make_model((3, 2, 0)), make_batches(4)
    copy_head(model, 0, 0, 2)
    copy_head(model, 1, 0, 1)
    monkeypatch.setattr(study, "layer_cap", 1.0)
    _, moments = watch(model, batches)
    means = {"importance": np.array([5.0, 1.0, 4.0, 2.0, 3.0]), "ablation": np.array([3., -1., 2., 5., 0.]),
             "mean_ablation": np.array([1.0, 2.0, 5.0, 4.0, 3.0]),
             "centred": np.array([0.8, 0.9, np.nan, 0.7]), "pattern": np.array([0.0, 0.0, 0.85, 0.99])}
    a, b, c, d, e = all_heads(model)
    orders = study.removal_orders(model, 5, means, moments, batches)
    assert {*orders} == {*study.CRITERIA} - {"random"}
    assert orders["ablation"] == [b, e, c, a, d]
    assert orders["mean_ablation"] == [a, b, e, d, c]
    assert orders["importance"] == [b, d, c, a, e]  # over the norms sqrt(42) and sqrt(13)
    # of 0:02 c, the less important; of 0:01 b: 0:12, which has only a raw cosine, was gone by then
    assert orders["similarity"] == [c, b, d, a, e]
    means["centred"][:2] = 0.1  # below 1:01
    assert study.removal_orders(model, 2, means, moments, batches)["similarity"] == [b, d]  # 0:12, raw
    assert len({a, c} & {*orders["r2"][:2]}) == 1  # twins; once one is gone, it predicts the other no more
    for i, head in enumerate(orders["r2"][:4]):
        left = [head for head in (a, b, c, d, e) if head not in orders["r2"][:i]]
        assert head == max(left, key=lambda head, left=left: r2(model, moments, *head, [
            other for layer, other in left if layer == head[0] and other != head[1]]).mean())
    assert sorted(orders["greedy"]) == [a, b, c, d, e]


def test_shares_are_rounded_to_whole_heads():
    assert [study.count_heads(share, 48) for share in (0, 0.01, 0.05, 0.15, 0.5, 0.99)] == [
        0, 0, 2, 7, 24, 48]
    assert study.count_heads(0.5, 5) == 3  # a half goes up, also where round() would go to the even one
    assert all(study.count_heads(n / total, total) == n for total in range(1, 200) for n in range(total))


@torch.no_grad()
def make_affine(model, layer, source, target):
    """The target's output becomes an affine map of the source's: its V rows are, and attention sums to 1."""
    copy_head(model, layer, source, target, parts=(0, 1))
    attn, hs = model.transformer.h[layer].attn, model.config.head_size
    generator = torch.Generator().manual_seed(5)
    matrix, shift = (torch.randn(*shape, generator=generator) for shape in ((hs, hs), (hs,)))
    old, new = head_rows(model, layer, source, 2), head_rows(model, layer, target, 2)
    attn.c_attn.weight[new] = matrix @ attn.c_attn.weight[old]
    attn.c_attn.bias[new] = matrix @ attn.c_attn.bias[old] + shift


@pytest.mark.parametrize("norm_position", ["pre", "post"])
@torch.no_grad()
def test_what_is_affine_in_what_is_left_is_folded_without_loss(norm_position):
    model, batches = make_model(norm_position=norm_position), make_batches(8)
    make_affine(model, 1, 2, 0)
    make_affine(model, 2, 1, 3)
    _, moments = watch(model, batches)
    idx, heads = random_ids(4, 16, seed=9), [(2, 3), (1, 0)]  # in two layers, each from its own partner
    assert r2(model, moments, 1, 0, [2]) == pytest.approx(np.ones(2), abs=1e-6)
    with untouched(model):
        folded = {how: fold(model, heads, how, moments) for how in MERGES}
    for how in ("partner", "layer"):
        assert folded[how].config.heads == (4, 3, 3)
        torch.testing.assert_close(folded[how](idx), model(idx), atol=3e-4, rtol=1e-4)
    for how in ("none", "mean"):
        assert (folded[how](idx) - model(idx)).abs().max() > 0.05
    wrong = fold(model, [(1, 0), (1, 2)], "partner", moments)  # what predicted it is gone, too
    assert (wrong(idx) - model(idx)).abs().max() > 0.05


@torch.no_grad()
def test_heads_that_are_left_may_be_twins():
    """Their outputs leave the fit open; it must not choose weights so large that rounding shows."""
    model, batches = make_model(), make_batches(8)
    copy_head(model, 1, 1, 2)
    make_affine(model, 1, 2, 0)
    idx = random_ids(4, 16, seed=9)
    pruned = fold(model, [(1, 0)], "layer", watch(model, batches)[1])
    torch.testing.assert_close(pruned(idx), model(idx), atol=2e-4, rtol=1e-4)
    assert pruned.transformer.h[1].attn.c_proj.weight.abs().max() < 100
    model = make_model()  # twins to five digits, and a head that is not predicted by them without error
    copy_head(model, 1, 1, 2)
    noise = torch.randn(6, 24, generator=torch.Generator().manual_seed(1))
    model.transformer.h[1].attn.c_attn.weight[head_rows(model, 1, 2, 2)] *= 1 + 2e-6 * noise
    pruned = fold(model, [(1, 0)], "layer", watch(model, batches)[1])
    assert pruned.transformer.h[1].attn.c_proj.weight.abs().max() < 100


@torch.no_grad()
def test_a_layer_without_heads_becomes_its_mean():
    model, batches = make_model(RAGGED), make_batches(8)
    _, moments = watch(model, batches)
    heads = [(2, 0), (2, 2), (2, 1), (0, 1)]
    folded = {how: fold(model, heads, how, moments) for how in ("mean", "partner", "layer")}
    outputs, attn = study.mean_outputs(model, moments)[2], model.transformer.h[2].attn
    for pruned in folded.values():
        assert pruned.config.heads == (1, 0, 0)
        torch.testing.assert_close(pruned.transformer.h[2].attn.c_proj.bias,
                                   attn.c_proj.bias + attn.c_proj.weight @ outputs, atol=1e-4, rtol=1e-4)
    idx = random_ids(2, 16)
    torch.testing.assert_close(folded["partner"](idx), folded["layer"](idx))  # one is all that is left
    assert not torch.allclose(folded["mean"](idx), folded["layer"](idx), atol=1e-3)


# ---- the report ----------------------------------------------------------------


def test_intervals():
    """Student's t over the means of 20 stretches of windows."""
    t = np.linspace(-2.093, 2.093, 10_001)
    density = math.gamma(10) / math.sqrt(19 * math.pi) / math.gamma(9.5) * (1 + t**2 / 19) ** -10
    assert np.trapezoid(density, t) == pytest.approx(0.95, abs=1e-4)
    rises = np.random.default_rng(0).normal(0.05, 0.1, 45)
    ends = np.cumsum([0] + 5 * [3] + 15 * [2])
    blocks = [rises[start:end].mean() for start, end in itertools.pairwise(ends)]
    half = 2.093 * np.std(blocks, ddof=1) / math.sqrt(20)
    assert study.interval(rises) == pytest.approx([math.exp(rises.mean() + step) - 1
                                                   for step in (0, -half, half)])
    undefined = np.r_[rises, np.nan, np.nan]  # as centred cosines may be
    assert average(undefined) == pytest.approx(rises.mean()) and math.isnan(average(undefined[45:]))
    change, low, high = study.interval(rises[:19])
    assert change == pytest.approx(math.exp(rises[:19].mean()) - 1) and math.isnan(low) and math.isnan(high)


def test_the_table_of_perplexity():
    noise = np.tile([0.001, -0.001], 40)  # 80 windows, 20 stretches of 4
    noise[:4] += 0.001  # or the stretches would be equal

    def row(name, rise, seed="", how="none"):
        change, low, high = study.interval(rise + noise)
        return {"share": 0.15, "criterion": name, "seed": seed, "merge": how, "change": change, "low": low,
                "high": high, "rises": rise + noise, "perplexity": 20.0 * (1 + change), "heads": 41,
                "removed": "0:1 0:2 1:1 2:1 2:2 3:3 4:4"}

    rows = [row(name, rise, seed, how) for how, factor in zip(MERGES, (1.0, 0.9, 0.8, 0.1))
            for name, seed, rise in (("ablation", "", 0.07 * factor), ("greedy", "", math.log(1.05) - 6e-5),
                                     *(("random", i, factor * x) for i, x in enumerate((0.06, 0.09, 0.2))))]
    rows.append({**rows[0], "share": 0.3})
    counts, heading, *lines = study.pruning_lines(rows, 0.15)
    assert counts == "7 of 48 heads removed; perplexity of all: 20.000"
    heading, ablation, greedy, drawn = ([cell.strip() for cell in line.split("  ") if cell.strip()]
                                        for line in (heading, *lines))
    assert heading == ["15% of the heads", *MERGES.values()]
    assert ablation[0] == "ablation, one-shot" and ablation[1] == "+7.3% +-0.0% no 2/3"
    assert ablation[4] == "+0.7% +-0.0% yes 2/3" and greedy[1] == "+5.0% +-0.0% ? 3/3"
    assert greedy[4] == "+5.0% +-0.0% ? 0/3"
    assert drawn[:2] == ["at random", "+12.4% +-0.0% no"] and drawn[4] == "+1.2% +-0.0% yes"  # mean rise


def test_a_swap_counts_only_where_it_costs_less_than_uniform_attention():
    heads, pairs, noise = [(0, 0), (0, 1), (0, 2)], [(0, 0, 1), (0, 0, 2), (0, 1, 2)], np.zeros((40, 1))
    noise[::2] = 0.01
    values = {name: np.full((40, 3), 0.9) for name in PAIR_MEASURES} | {
        name: noise + np.array(rises) for name, rises in {
            "uniform": [0.3, 0.1, 0.2], "ablation": [0.4, 0.5, 0.6], "head_as_other": [0.1, np.nan, 0.1],
            "other_as_head": [0.2, np.nan, 0.2]}.items()}
    values["other_as_head"][:20, 2] += 0.1
    values["other_as_head"][20:, 2] -= 0.1
    _, *rows, last = study.swap_lines(values, heads, pairs)
    assert [row.split()[:3] + row.split()[-1:] for row in rows] == [
        ["0:0", "as", "0:1", "yes"], ["0:1", "as", "0:0", "no"], ["0:1", "as", "0:2", "?"],
        ["0:2", "as", "0:1", "?"]]
    assert "+0.1050 +-0.0000  +0.3050 +-0.0000  +0.4050 +-0.0000" in rows[0]
    assert last.startswith("1 of 4 swaps cost less than uniform attention")


# ---- the script ----------------------------------------------------------------


SHAPE = {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 264, "n_vocab": 257, "std": 0.15}
FLAGS = {"device": "cpu", "calibration_tokens": 256, "ablation_tokens": 128, "val_tokens": 256,
         "batch_size": 5, "random_seeds": 2}


def save(folder, tokenizer, data_dir, **shape):
    """A random model's checkpoint, as of step 7 of a run on data_dir."""
    tok, model = load_tokenizer(str(tokenizer)), make_model(**{**SHAPE, **shape})
    folder.mkdir()
    return save_checkpoint(folder, 7, {
        "step": 7, "model": model.state_dict(), "model_config": describe_model(model), "optimizers": [],
        "tokenizer": describe_tokenizer(tok), "config": {
            "data_dir": str(data_dir), "seed": 1, "block_size": 16, "batch_tokens": 64, "val_tokens": 64}})


def write_data(folder, tokenizer, sha256="", **counts):
    """Shards of random ids, `counts` of each split."""
    tok, files = load_tokenizer(str(tokenizer)), []
    folder.mkdir()
    for split, n in counts.items():
        ids = random_ids(n, n_vocab=256).numpy().astype(np.uint16)
        files.append(write_shard(folder / f"random_{split}_000000.npy", ids))
    write_manifest(folder, {"tokenizer": {"name": tok.name, "sha256": sha256 or tok.sha256}, "files": files})
    return folder


def read_csv(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@contextmanager
def with_settings(folder, settings):
    """In `folder`, with the script's settings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for key, value in {**FLAGS, **settings}.items():
            assert type(value) is type(getattr(study, key)), key
            patch.setattr(study, key, value)
        yield


@pytest.fixture(scope="module")
def analyzed(tmp_path_factory, byte_tokenizer, tiny_data):
    """(checkpoint, folder, what was printed) of a run with everything in it."""
    base, printed = tmp_path_factory.mktemp("analyzed"), io.StringIO()
    source = save(base / "log", byte_tokenizer, tiny_data)
    with redirect_stdout(printed), with_settings(base, {
            "out_dir": "new/heads", "prune_fractions": "0.5,0.25", "merge": "none", "criterion": "r2"}):
        study.main()
    return source, base / "new" / "heads", printed.getvalue()


@pytest.fixture
def run(tmp_path):
    """Calls main() with settings, in a folder of its own."""
    def run(**settings):
        with with_settings(tmp_path, settings):
            study.main()

    return run


def test_the_files(analyzed):
    _, folder, printed = analyzed
    assert sorted(path.name for path in folder.iterdir()) == sorted([
        "pairs.csv", "heads.csv", "pruning.csv", "pruning.txt", "attention.png", "similarity.png",
        "pruning.png", "pruned_0.25.pt", "pruned_0.5.pt"])
    for path in folder.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    text = (folder / "pruning.txt").read_text(encoding="utf-8")
    assert "nan" not in text and text == printed
    assert ("8 heads in 2 layers; measured on 320 train tokens (ablation and swaps: 320), evaluated on "
            "320 val tokens") in text
    assert text.index("2 of 8 heads removed") < text.index("4 of 8 heads removed")


def test_the_tables_of_heads_and_pairs(analyzed, monkeypatch):
    source, folder, _ = analyzed
    model, state = load_model(source)
    for key, value in FLAGS.items():
        monkeypatch.setattr(study, key, value)
    tok = checkpoint_tokenizer(state)
    calibration, ablation_batches, val = study.open_batches(state, "", tok, 16, DEV)
    values, moments = watch(model, calibration)
    assert all([len(x) for x, _ in some] == [5] * 4 for some in (calibration, ablation_batches, val))
    stream = study.open_stream(state["config"]["data_dir"], "val", tok)
    loader = study.WindowLoader(stream, 16, 16, 0, tok.n_vocab, shuffle=False)
    first, last = loader.read_windows(np.array([0, loader.n_windows - 1]))[0]
    assert loader.n_windows > 40 and (val[0][0][0] == first).all() and (val[-1][0][-1] == last).all()
    heads, pairs = read_csv(folder / "heads.csv"), read_csv(folder / "pairs.csv")
    assert [(int(r["layer"]), int(r["head"]), int(r["other"])) for r in pairs] == all_pairs(model)
    assert [(int(r["layer"]), int(r["head"])) for r in heads] == all_heads(model)
    values["ablation"] = study.loss_rises(model, ablation_batches, "", [
        masked(model, [head]) for head in all_heads(model)])
    values["uniform"] = study.loss_rises(model, ablation_batches, "", [
        study.attending(model, *head) for head in all_heads(model)])
    assert {*HEAD_MEASURES} < {*heads[0]} and {*PAIR_MEASURES} < {*pairs[0]} and "r2_95" not in heads[0]
    for rows in (heads, pairs):
        for name in values.keys() & rows[0].keys():
            for key, expected in ((name, values[name].mean(axis=0)),
                                  (f"{name}_95", 2.093 * values[name].std(axis=0, ddof=1) / 20**0.5)):
                np.testing.assert_allclose([float(r[key]) for r in rows], expected, atol=1e-5, err_msg=key)
    torch.manual_seed(study.seed)
    null = GPT(model.config).eval()
    for key, of, sums in (("r2", model, moments), ("r2_null", null, watch(null, calibration)[1])):
        expected = study.all_r2(of, sums).mean(axis=0)
        np.testing.assert_allclose([float(r[key]) for r in heads], expected, atol=1e-5)
    # the null knows nothing: its attention is uniform
    uniform = np.mean([1 / (t + 1) for t in range(1, 16)])
    assert all(float(r["first_null"]) == pytest.approx(uniform, rel=0.05) for r in heads)
    assert all(float(r["pattern_null"]) > 0.99 for r in pairs)
    above = [float(r["pattern"]) > 0.85 for r in pairs]
    assert [r["head_as_other"] != "" for r in pairs] == above and any(above)
    for r in pairs:  # the swaps stand in the columns that name them
        if r["head_as_other"]:
            layer, head, other = (int(r[key]) for key in ("layer", "head", "other"))
            rise = study.loss_rises(model, ablation_batches, "", [
                study.attending(model, layer, head, other), study.attending(model, layer, other, head)])
            assert [float(r[key]) for key in ("head_as_other", "other_as_head")] == pytest.approx(
                rise.mean(axis=0), abs=1e-6)


def test_the_table_of_pruned_models(analyzed, monkeypatch):
    source, folder, _ = analyzed
    model, state = load_model(source)
    for key, value in FLAGS.items():
        monkeypatch.setattr(study, key, value)
    _, _, val = study.open_batches(state, "", checkpoint_tokenizer(state), 16, DEV)
    rows = read_csv(folder / "pruning.csv")
    jobs = {(name, seed, how) for name in study.CRITERIA for how in MERGES
            for seed in (("1337", "1338") if name == "random" else ("",))}
    found = {(r["criterion"], r["seed"], r["merge"], r["share"]): r for r in rows}
    assert len(found) == len(rows)
    assert {*found} == {(*job, share) for job in jobs for share in ("0.25", "0.5")}
    removed_by, unpruned = {}, study.window_losses(model, val).mean()
    for (name, seed, how, share), r in found.items():
        heads = [tuple(map(int, head.split(":"))) for head in r["removed"].split()]
        assert len(heads) == len({*heads}) == 8 * float(share) and int(r["heads"]) == 8 - len(heads)
        assert max(sum(layer == of for of, _ in heads) for layer in (0, 1)) <= 2  # layer_cap
        removed_by.setdefault((name, seed), {}).setdefault(share, heads)
        assert removed_by[name, seed][share] == heads  # replaced or not
        pruned = prune(model, heads)
        assert int(r["params"]) == pruned.num_params()
        assert float(r["low"]) < float(r["change"]) < float(r["high"])
        assert math.log(float(r["perplexity"]) / (1 + float(r["change"]))) == pytest.approx(unpruned)
        if how == "none":
            loss = study.window_losses(pruned, val).mean()
            assert float(r["perplexity"]) == pytest.approx(math.exp(loss), rel=1e-5)
    for shares in removed_by.values():
        assert {*shares["0.25"]} < {*shares["0.5"]}
    for seed in (1337, 1338):
        rank = random.Random(seed).sample(all_heads(model), 8).index
        expected = study.select(model, 4, lambda head, removed, rank=rank: rank(head))
        assert sorted(expected) == removed_by["random", str(seed)]["0.5"]


def test_pruned_checkpoints_are_what_they_say(analyzed):
    source, folder, _ = analyzed
    model, unpruned = load_model(source)
    idx = random_ids(2, 16, n_vocab=257)
    for path in folder.glob("*.pt"):
        pruned, state = load_model(path)
        removed = [tuple(head) for head in state["pruned"]["removed"]]
        assert state["pruned"]["from"] == source.parent.name and removed == sorted(removed)
        assert sum(pruned.config.heads) == 8 - len(removed)
        assert len(removed) == (2 if "0.25" in path.name else 4)
        assert state["step"] == 7 and state["config"] == unpruned["config"] and "optimizers" not in state
        with torch.no_grad(), masked(model, removed):
            torch.testing.assert_close(pruned(idx), model(idx), atol=1e-5, rtol=1e-5)


def test_pruned_checkpoints_heal_and_are_resumed(analyzed, flags, tmp_path):
    source = analyzed[1] / "pruned_0.5.pt"
    pruned, _ = load_model(source)
    flags |= {"log_dir": tmp_path / "log", "max_steps": 3, "warmup_steps": 1, "max_lr": 1e-3, "min_lr": 1e-4,
              "val_interval": 3, "val_tokens": 256, "checkpoint_interval": 2, "init_from": source,
              "dropout": 0.0}
    del flags["tokenizer"]
    train(flags)
    first = losses(flags["log_dir"])
    assert len(first) == 3 and all(map(math.isfinite, first))
    healed, state = load_model(flags["log_dir"])
    assert state["step"] == 3 and healed.config.heads == pruned.config.heads and healed.config.n_head == 4
    assert not any(torch.equal(a, b) for a, b in zip(healed.parameters(), pruned.parameters()) if a.numel())
    train(flags, max_steps=4, resume="true")
    assert losses(flags["log_dir"])[:3] == first and len(losses(flags["log_dir"])) == 4


def test_pruned_checkpoints_generate_answer_and_are_exported(analyzed, questions, tmp_path, monkeypatch,
                                                             capsys):
    """As its export, which has heads of zeros in their place."""
    source = analyzed[1] / "pruned_0.5.pt"
    export_hf(load_any(source), tmp_path / "out")
    assert "4 of 8 heads are pruned" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    printed = []
    for place in (source, tmp_path / "out"):
        for module, chosen in ((generate, {"prompt": "import", "temperature": 0.0, "num_samples": 1,
                                           "max_new_tokens": 12, "device": "cpu"}),
                               (hellaswag, {"data": str(questions), "device": "cpu", "dtype": "float32"})):
            for key, value in {**chosen, "checkpoint": str(place)}.items():
                monkeypatch.setattr(module, key, value)
            module.main()
        out = capsys.readouterr().out
        printed.append([line.rpartition(" | ")[0] or line for line in out.splitlines()
                     if "step " not in line and not line.startswith("note")])
    assert printed[0] == printed[1]
    text = "\n".join(printed[0])
    assert "acc_norm" in text and "import" in text


def test_a_pruned_model_is_analyzed_again(analyzed, byte_tokenizer, run, tmp_path, capsys):
    """Relative to what is left, all in one batch, with a single val window."""
    source = analyzed[1] / "pruned_0.5.pt"
    data_dir = write_data(tmp_path / "data", byte_tokenizer, train=7 * 16 + 1, val=17)
    run(checkpoint=str(source), data_dir=str(data_dir), out_dir="again", batch_size=100,
        prune_fractions="0.5", criterion="random", random_seeds=1, merge="mean")
    printed = capsys.readouterr().out
    assert ("4 heads in 2 layers; measured on 112 train tokens (ablation and swaps: 112), evaluated on "
            "16 val tokens") in printed
    assert "nan" not in printed and "2 of 4 heads removed" in printed
    again, state = load_model(tmp_path / "again" / "pruned_0.5.pt")
    assert sum(again.config.heads) == 2 and state["pruned"]["from"] == str(source)
    assert state["pruned"]["merge"] == "mean" and len(state["pruned"]["removed"]) == 2


def test_layers_of_one_head_and_models_without_any(byte_tokenizer, run, tmp_path, capsys):
    data_dir = write_data(tmp_path / "data", byte_tokenizer, train=65, val=200)
    save(tmp_path / "log", byte_tokenizer, data_dir, heads=(0, 1))
    run(out_dir="heads", prune_fractions="0.9", criterion="random", merge="mean", random_seeds=1)
    assert "nan" not in capsys.readouterr().out
    rows = read_csv(tmp_path / "heads" / "pruning.csv")
    assert {(r["share"], r["heads"], r["low"]) for r in rows} == {("0.9", "0", "")}  # 12 windows
    assert (tmp_path / "heads" / "pairs.csv").read_text(encoding="utf-8") == "layer,head,other\n"
    assert not (tmp_path / "heads" / "similarity.png").exists()
    pruned, _ = load_model(tmp_path / "heads" / "pruned_0.9.pt")
    assert pruned.config.heads == (0, 0)
    with pytest.raises(UserError, match=r"pruned_0.9.pt: it has no heads left"):
        run(checkpoint="heads/pruned_0.9.pt", out_dir="none")
    assert not (tmp_path / "none").exists()


def test_measuring_only(analyzed, run, tmp_path, capsys):
    run(checkpoint=str(analyzed[0]), prune_fractions="0.01", similarity_threshold=1.0)  # 0 of 8 heads
    assert sorted(path.name for path in (tmp_path / "heads").iterdir()) == [
        "attention.png", "heads.csv", "pairs.csv", "pruning.txt", "similarity.png"]
    assert "no pair's patterns have a cosine above 1.0" in capsys.readouterr().out
    assert read_csv(tmp_path / "heads" / "heads.csv") == read_csv(analyzed[1] / "heads.csv")


@pytest.mark.parametrize(("settings", "words"), [
    *(({"prune_fractions": text}, "prune_fractions=.*above 0 and below 1 with commas between them, such as 0")
      for text in ("1", "nan", "0.1;0.2")),
    ({"data_dir": "nowhere"}, "data_dir=nowhere does not exist; build it: make prepare"),
    ({"checkpoint": "nowhere"}, "nowhere: not there"), ({"device": "abacus"}, "wanted auto, cpu"),
    ({"sentence": "a"}, "sentence='a' has fewer than two tokens; give a longer --sentence"),
    ({"data_dir": "others"}, "others was tokenized with .*; give --data_dir"),
    ({"data_dir": "little"}, "data_dir=little has 3 train windows of 16 tokens, 4 are needed"),
    ({"data_dir": "no_val"}, "have 16 tokens, too few for one window of block_size=16"),
])
def test_bad_input_is_refused_before_anything_is_measured(analyzed, byte_tokenizer, run, tmp_path,
                                                          monkeypatch, settings, words):
    others = {"others": {"sha256": "0" * 64, "train": 200, "val": 200}, "little": {"train": 64, "val": 200},
              "no_val": {"train": 200, "val": 16}}
    if settings.get("data_dir") in others:
        write_data(tmp_path / settings["data_dir"], byte_tokenizer, **others[settings["data_dir"]])
    monkeypatch.setattr(study, "watch", None)  # nothing is measured
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=words):
        run(**{"checkpoint": str(analyzed[0]), "out_dir": "new", **settings})
    assert snapshot(tmp_path) == before


def test_two_runs_into_one_folder(analyzed, run, monkeypatch):
    """Guarantee 17: the first is still measuring when the second begins."""
    def second_run(*_):
        with pytest.raises(UserError, match=r"out_dir=heads exists already; name a new.*: rm -r heads"):
            study.main()
        raise ZeroDivisionError

    monkeypatch.setattr(study, "watch", second_run)
    with pytest.raises(ZeroDivisionError):
        run(checkpoint=str(analyzed[0]))


def test_the_words_of_the_settings_are_those_of_the_tables():
    choices = annotations_of(vars(study))
    assert choices["criterion"] == (*study.CRITERIA,) and choices["merge"] == (*MERGES,)
