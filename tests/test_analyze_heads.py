"""analyze_heads.py against slow twins: surgery by hand, statistics of whole tensors, finite differences."""

import copy
import csv
import io
import itertools
import math
import random
import weakref
from contextlib import contextmanager, redirect_stdout
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st
from training import attempt, losses, snapshot, train

import analyze_heads as study
import decoding
import generate
import hellaswag
from analyze_heads import (
    MEASURES,
    MERGES,
    Running,
    Windows,
    all_heads,
    all_pairs,
    cache_bytes,
    drop_order,
    fold,
    masked,
    prune,
    watch,
)
from bpe import load_tokenizer
from checkpoint import describe_model, describe_tokenizer, load_model, save_checkpoint
from configurator import UserError, annotations_of
from convert_hf import export_hf, load_any
from device import Device
from model import GPT, GPTConfig
from shards import TokenStream, WindowLoader, write_manifest, write_shard

V = 61
DEV = Device(torch.device("cpu"), torch.float32, False, "CPU")
BFLOAT16 = Device(torch.device("cpu"), torch.bfloat16, False, "CPU")
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


def make_windows(n=7, T=16, dev=DEV, seed=2):
    """n windows of random ids."""
    tokens = random_ids(n, T + 1, seed=seed).numpy()
    loader = SimpleNamespace(read_windows=lambda ids: (tokens[ids, :-1], tokens[ids, 1:]))
    return Windows(loader, np.arange(n), dev)


def both(windows):
    """All x and y, (n, T)."""
    return map(torch.from_numpy, windows.loader.read_windows(windows.ids))


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


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(study, "batch_size", 3)


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
        less = prune(model, heads)
        with masked(model, heads):
            wanted, wanted_loss = model(idx), model(idx, targets)
            tokens = [token for token, _ in decoding.generate(model, idx[:, :5], 14, temperature=0.0)]
    close = 1e-5 * wanted.abs().max().item()  # of logits of this size, float32 keeps seven digits
    torch.testing.assert_close(less(idx), wanted, atol=close, rtol=0)
    torch.testing.assert_close(less(idx).double(), by_hand(idx), atol=close, rtol=0)
    torch.testing.assert_close(less(idx, targets), wanted_loss, atol=1e-5, rtol=1e-5)
    for use_cache in (True, False):  # past the context's end, where the cache is filled anew
        found = decoding.generate(less, idx[:, :5], 14, temperature=0.0, use_cache=use_cache)
        assert torch.equal(torch.cat([token for token, _ in found]), torch.cat(tokens))
    assert not less.training and less.loss_chunk == model.loss_chunk

    left = [n - sum(1 for other, _ in heads if other == layer) for layer, n in enumerate(counts)]
    assert less.config.heads == tuple(left) and less.config.n_head == 4
    C, hs, n = 24, 6, len(heads)
    assert model.num_params() - less.num_params() == n * (3 * hs * C + 3 * hs + C * hs)
    assert less.num_params() == sum(tensor.numel() for tensor in less.state_dict().values()) - 64 * C  # tied
    N = less.num_params() - 16 * C
    assert less.flops_per_token(16) == 6 * N + 12 * 16 * sum(left) * hs
    assert cache_bytes(less, torch.float32) == sum(left) * 2 * hs * 4
    assert cache_bytes(less, torch.bfloat16) == sum(left) * 2 * hs * 2

    rest = [head for head in known if head not in heads]
    others = [head for i, head in enumerate(rest) if more_bits >> i & 1]
    twice, at_once = prune(less, renumbered(others, heads)), prune(model, heads + others)
    assert twice.config == at_once.config
    for name, tensor in at_once.state_dict().items():
        assert torch.equal(twice.state_dict()[name], tensor), name


def test_a_pruned_model_keeps_its_mode_and_learns():
    model = make_model()
    model.loss_chunk = 8
    less = prune(model.train(), [(0, 1), (1, 0), (1, 1), (1, 2), (1, 3)])
    assert less.training and less.loss_chunk == 8
    less(random_ids(2, 16), random_ids(2, 16, seed=3)).backward()
    gradients = {name: parameter.grad for name, parameter in less.named_parameters()}
    idle = ("transformer.h.1.attn.c_attn", "transformer.h.1.attn.c_proj.weight", "transformer.h.1.ln_1")
    assert all(gradient.isfinite().all() for name, gradient in gradients.items() if not name.startswith(idle))
    assert gradients["transformer.h.1.attn.c_proj.bias"].abs().max() > 0


@pytest.mark.parametrize(("heads", "words"), [
    ([(0, 4)], r"prune: there is no head 0:4; wanted LAYER:HEAD, counted from 0.*0: 4, 1: 4, 2: 4"),
    ([(3, 0)], "there is no head 3:0"), ([(0, -1)], "there is no head 0:-1"),
    ([(0, 1), (1, 1), (0, 1)], "a head twice, wanted different ones"),
    ([(0, 0)] * 13, "got 13 heads, and there are no more than 12")])
def test_heads_that_cannot_be_removed(heads, words):
    model = make_model()
    with untouched(model), pytest.raises(UserError, match=words):
        prune(model, heads)


def test_hooks_go_when_the_body_raises():
    model = make_model()
    with untouched(model), pytest.raises(ZeroDivisionError), masked(model, [(0, 0)]):
        model(random_ids(1, 16))
        raise ZeroDivisionError
    with untouched(model), pytest.raises(RuntimeError, match="of the one who looks"):
        with study.watching(model, lambda *_: exec("raise RuntimeError('of the one who looks')")):
            model(random_ids(1, 16))


@torch.no_grad()
def test_gates_are_those_of_each_sequence():
    model, idx = make_model(RAGGED), random_ids(2, 16)
    gates = torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0], [0.5, 1.0, 1.0, -1.0, 1.0]])
    with study.gated(model, gates):
        found = model(idx)
    first = scaled_by_hand(model, [(0, 1), (2, 2)], 0.0)(idx[:1])
    second = scaled_by_hand(scaled_by_hand(model, [(0, 0)], 0.5), [(2, 1)], -1.0)(idx[1:])
    torch.testing.assert_close(found.double(), torch.cat((first, second)), atol=1e-5, rtol=1e-5)


# ---- statistics ----------------------------------------------------------------


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
    """{measure: (windows, P or H)} and {layer: moments}, from whole tensors: `seen_by_hand` or as seen."""
    found, moments = {name: [] for name in (*MEASURES, "diagonal", "first")}, {}
    for layer, qkv, y in seen:
        attn = model.transformer.h[layer].attn
        weight, y = attn.c_proj.weight.double().numpy(), y.double().numpy()
        patterns, (B, T, _) = patterns_by_definition(attn, qkv), y.shape
        for head in range(attn.n_head):
            found["diagonal"].append([np.mean([p[head, t, t] for t in range(1, T)]) for p in patterns])
            found["first"].append([np.mean([p[head, t, 0] for t in range(1, T)]) for p in patterns])
        for a, b in itertools.combinations(range(attn.n_head), 2):
            # the first query has one key, the second no other than the two trivial ones, the third one more
            found["pattern"].append([np.mean([cosine(p[a, t], p[b, t]) for t in range(1, T)])
                                     for p in patterns])
            found["rest"].append([np.mean([cosine(p[a, t, 1:t], p[b, t, 1:t]) for t in range(3, T)])
                                  for p in patterns])
            outputs = [(y[:, :, columns_of(model, layer, head)] @ weight[:, columns_of(model, layer, head)].T)
                       for head in (a, b)]
            found["output"].append([np.mean([cosine(outputs[0][i, t], outputs[1][i, t]) for t in range(T)])
                                    for i in range(B)])
        rows = np.concatenate((y.reshape(B * T, -1), np.ones((B * T, 1))), axis=1)
        moments[layer] = sum(np.outer(row, row) for row in rows)
    return {name: np.array(values).T for name, values in found.items()}, moments


@given(st.lists(st.lists(st.tuples(*[st.floats(-100, 100)] * 3), min_size=0, max_size=5), min_size=1,
                max_size=5).filter(lambda batches: any(batches)))
@settings(max_examples=60, deadline=None)
def test_running_sums_are_mean_and_error_whatever_the_batches(batches):
    running, halves = Running(), (Running(), Running())
    for i, batch in enumerate(batches):
        values = torch.tensor(batch, dtype=torch.float64).reshape(-1, 3)
        running.add(values)
        halves[i % 2].add(values)
    all_values = np.array([row for batch in batches for row in batch])
    for found in (running, halves[0] + halves[1]):
        assert found.n == len(all_values)
        np.testing.assert_allclose(found.mean, all_values.mean(axis=0), atol=1e-9)
        if len(all_values) > 1:
            error = all_values.std(axis=0, ddof=1) / math.sqrt(len(all_values))
            np.testing.assert_allclose(found.error, error, atol=1e-5)
        else:
            assert np.isnan(found.error).all()


@pytest.mark.parametrize(("counts", "norm_position"), [(ALL, "pre"), (RAGGED, "pre"), (ALL, "post")])
def test_patterns_equal_their_definition_and_the_layers_output(counts, norm_position):
    model, x = make_model(counts, norm_position=norm_position), random_ids(2, 16)
    seen = []

    def see(layer, attn, qkv, y):
        np.testing.assert_allclose(study.attention_patterns(attn, qkv, y).numpy(),
                                   patterns_by_definition(attn, qkv), atol=1e-5)
        for tampered in (y * 1.02, y + 0.02 * y.abs().max(), y.roll(1, dims=1), torch.full_like(y, math.nan)):
            words = r"differs from the layer's own.*--dtype=float32.*change attention_patterns"
            with pytest.raises(UserError, match=words):
                study.attention_patterns(attn, qkv, tampered)
        seen.append((layer, qkv, y))

    with torch.no_grad(), study.watching(model, see):
        model(x)
    with torch.no_grad():
        wanted = seen_by_hand(model, x)
    assert [layer for layer, *_ in seen] == [layer for layer, n in enumerate(counts) if n]
    for got, want in zip(seen, wanted, strict=True):
        torch.testing.assert_close(got[1], want[1], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(got[2], want[2], atol=1e-4, rtol=1e-4)


def test_cosines_of_pairs():
    vectors = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    vectors[0, 1, 2] = 0.0
    found = study.pair_cosines(vectors).numpy()
    assert found.shape == (2, 6)
    pairs = enumerate(itertools.combinations(range(4), 2))
    for b, (i, (first, second)) in itertools.product(range(2), pairs):
        rows = [cosine(vectors[b, first, r].numpy(), vectors[b, second, r].numpy()) for r in range(3)]
        assert found[b, i] == pytest.approx(np.mean(rows), abs=1e-6)
    assert study.pair_cosines(vectors[:, :1]).shape == (2, 0)


@pytest.mark.parametrize(("counts", "norm_position"), [(ALL, "pre"), (RAGGED, "post"), ((1, 2, 0), "pre")])
def test_what_is_watched_equals_whole_tensors_whatever_the_batches(counts, norm_position, monkeypatch):
    model, windows = make_model(counts, norm_position=norm_position), make_windows(4)
    x, _ = both(windows)
    with torch.no_grad():
        wanted, wanted_moments = watch_by_hand(model, seen_by_hand(model, x))
    for size in (1, 3, 8):
        monkeypatch.setattr(study, "batch_size", size)
        with untouched(model):
            whole = watch(model, windows)
            parts = [watch(model, part) for part in windows.halves()]
        halves = ({name: parts[0][0][name] + parts[1][0][name] for name in whole[0]},
                  {layer: parts[0][1][layer] + parts[1][1][layer] for layer in parts[0][1]})
        for found, moments in (whole, halves):
            assert list(found) == list(wanted) and list(moments) == list(wanted_moments)
            for name, values in wanted.items():
                assert found[name].n == 4 and found[name].mean.shape == values.shape[1:]
                np.testing.assert_allclose(found[name].mean, values.mean(axis=0), atol=2e-5)
                np.testing.assert_allclose(found[name].error, values.std(axis=0, ddof=1) / 2, atol=2e-5)
            for layer, square in wanted_moments.items():
                assert moments[layer].dtype == torch.float64
                np.testing.assert_allclose(moments[layer].numpy(), square, rtol=1e-4, atol=1e-3)
        for part, ids in zip(windows.halves(), ([0, 2], [1, 3])):
            assert part.ids.tolist() == ids
            assert len(part) == len(list(part)) == math.ceil(2 / size)


@torch.no_grad()
def test_of_products_in_16_bits_statistics_are_in_32(monkeypatch):
    monkeypatch.setattr(study, "batch_size", 4)
    model, windows, seen = make_model(), make_windows(4, dev=BFLOAT16), []
    x, _ = both(windows)

    def see(layer, attn, qkv, y):
        assert qkv.dtype == y.dtype == torch.bfloat16
        seen.append((layer, qkv.float(), y.float()))

    with study.watching(model, see), BFLOAT16.autocast():
        model(x)
    (found, moments), (wanted, wanted_moments) = watch(model, windows), watch_by_hand(model, seen)
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name].mean, values.mean(axis=0), atol=1e-5)
    for layer, square in wanted_moments.items():
        np.testing.assert_allclose(moments[layer].numpy(), square, rtol=1e-6, atol=1e-6)


def test_nothing_grows_with_the_windows(monkeypatch):
    model, alive, counts = make_model(), [], []
    patterns = study.attention_patterns

    def counted(*args):
        found = patterns(*args)
        alive.append(weakref.ref(found))
        counts[-1] = max(counts[-1], sum(ref() is not None for ref in alive))
        return found

    monkeypatch.setattr(study, "attention_patterns", counted)
    for n in (3, 30):
        counts.append(0)
        running, moments = watch(model, make_windows(n))
        for name, values in running.items():
            size = len(all_pairs(model)) if name in MEASURES else len(all_heads(model))
            assert {key: np.shape(value) for key, value in vars(values).items()} == {
                "n": (), "sum": (size,), "squares": (size,)}
        assert {layer: tuple(square.shape) for layer, square in moments.items()} == dict.fromkeys(
            range(3), (25, 25))
    assert counts[0] == counts[1] and len(alive) == 33


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
def test_twins_and_opposites():
    model = make_model()
    copy_head(model, 0, 1, 3)
    copy_head(model, 2, 0, 1)
    for tensor in (model.transformer.h[2].attn.c_attn.weight, model.transformer.h[2].attn.c_attn.bias):
        tensor[head_rows(model, 2, 1, 2)] *= -1.0
    found, _ = watch(model, make_windows())
    twins, opposites = all_pairs(model).index((0, 1, 3)), all_pairs(model).index((2, 0, 1))
    for name in MEASURES:
        others = np.delete(found[name].mean, [twins, opposites])
        assert found[name].mean[twins] == pytest.approx(1.0, abs=1e-6) and np.abs(others).max() < 0.99
    assert found["pattern"].mean[opposites] == pytest.approx(1.0, abs=1e-6)
    assert found["output"].mean[opposites] == pytest.approx(-1.0, abs=1e-6)


@torch.no_grad()
def test_heads_without_queries_attend_to_all_alike():
    model = make_model()
    attn = model.transformer.h[1].attn
    for head in (0, 2):
        for tensor in (attn.c_attn.weight, attn.c_attn.bias):
            tensor[head_rows(model, 1, head, 0)] = 0.0
    found, _ = watch(model, make_windows())
    share = np.mean([1 / (t + 1) for t in range(1, 16)])  # of the own token, and of the first
    for head in (0, 2):
        i = all_heads(model).index((1, head))
        assert found["diagonal"].mean[i] == pytest.approx(share) and found["diagonal"].error[i] < 1e-6
        assert found["first"].mean[i] == pytest.approx(share)
    pair = all_pairs(model).index((1, 0, 2))
    assert found["pattern"].mean[pair] == pytest.approx(1) and found["rest"].mean[pair] == pytest.approx(1)


@pytest.mark.parametrize(("counts", "norm_position"), [(ALL, "pre"), (RAGGED, "post")])
def test_importance_and_ablation_are_differences_of_the_loss(counts, norm_position):
    model, windows = make_model(counts, norm_position=norm_position), make_windows(4)
    with torch.no_grad():
        model.transformer.h[2].attn.c_proj.weight[:, columns_of(model, 2, 1)] = 0.0
    with untouched(model):
        found, ablated = study.importance(model, windows), study.ablation(model, windows)
    x, y = both(windows)

    @torch.no_grad()
    def loss(heads, factor):
        return scaled_by_hand(model, heads, factor)(x, y, reduction="none").mean(dim=1).double().numpy()

    eps, heads = 1e-3, all_heads(model)
    slopes = np.array([(loss([head], 1 + eps) - loss([head], 1 - eps)) / (2 * eps) for head in heads]).T
    rises = np.array([loss([head], 0.0) - loss([], 1.0) for head in heads]).T
    for got, wanted, close in ((found, np.abs(slopes), 1e-3), (ablated, rises, 1e-5)):
        np.testing.assert_allclose(got.mean, wanted.mean(axis=0), rtol=1e-3, atol=close)
        np.testing.assert_allclose(got.error, wanted.std(axis=0, ddof=1) / 2, rtol=1e-3, atol=close)
    silent = heads.index((2, 1))
    assert found.mean[silent] == 0 and ablated.mean[silent] == 0
    assert np.delete(found.mean, silent).min() > 0.01 and np.abs(ablated.mean).max() > 0.01


# ---- which heads to drop, what takes their place -------------------------------


def test_drop_order_of_made_up_values():
    model = make_model((3, 2, 0))  # pairs 0:01 0:02 0:12 1:01
    values = {"importance": np.array([5.0, 1.0, 4.0, 2.0, 3.0]), "ablation": np.array([3., -1., 2., 5., 0.]),
              "output": np.array([0.9, 0.8, 0.7, 0.95]), "pattern": np.array([0.1, 0.2, 0.9, 0.05]),
              "rest": np.array([-0.1, -0.2, -0.3, -0.05])}
    a, b, c, d, e = all_heads(model)
    wanted = {
        "ablation": [b, e, c, a, d],
        "importance": [b, d, c, a, e],  # over the norms sqrt(42) and sqrt(13)
        "redundancy_output": [d, b, c, a, e],  # of 1:01 d, of 0:01 b, of 0:02 c; 0:12 has none left
        "redundancy_pattern": [b, c, d, a, e],  # of 0:12 b, of 0:02 c, 0:01 has lost b, of 1:01 d
        "redundancy_rest": [d, b, c, a, e]}
    assert list(wanted) == ["ablation", "importance", "redundancy_output", "redundancy_pattern",
                            "redundancy_rest"]
    for name, order in wanted.items():
        assert drop_order(name, model, values) == order, name


@given(st.integers(0, 10**6), st.sampled_from([ALL, (3, 0, 2), (1, 1, 4)]))
@settings(max_examples=40, deadline=None)
def test_drop_order_is_the_rule_written_out(seed, counts):
    model, draw = make_model(counts), np.random.default_rng(seed)
    heads, pairs = all_heads(model), all_pairs(model)
    values = {"importance": draw.random(len(heads)) * draw.choice([0.1, 10], len(heads)),
              "ablation": draw.normal(size=len(heads)), **{name: draw.normal(size=len(pairs))
                                                           for name in MEASURES}}
    of = dict(zip(heads, values["importance"]))

    def relative(head):
        return of[head] / math.sqrt(sum(of[other]**2 for other in heads if other[0] == head[0]))

    by_importance = sorted(heads, key=relative)
    assert drop_order("importance", model, values) == by_importance
    assert drop_order("ablation", model, values) == [
        head for _, head in sorted(zip(values["ablation"], heads))]
    for name in MEASURES:
        whole, order = {*heads}, []
        for _, layer, a, b in sorted(((value, *pair) for value, pair in zip(values[name], pairs)),
                                     reverse=True):
            if (layer, a) in whole and (layer, b) in whole:
                order.append((layer, a) if of[layer, a] < of[layer, b] else (layer, b))
                whole.remove(order[-1])
        assert len(order) == sum(n - 1 for n in counts if n)
        order += [head for head in by_importance if head not in order]
        assert drop_order(f"redundancy_{name}", model, values) == order and sorted(order) == heads


def test_a_layer_that_does_nothing_goes_first():
    model = make_model((2, 2, 1))
    values = {"importance": np.array([1.0, 2.0, 0.0, 0.0, 1.0])}
    assert drop_order("importance", model, values) == [(1, 0), (1, 1), (0, 0), (0, 1), (2, 0)]


def test_shares_are_rounded_to_whole_heads():
    assert [study.count_heads(share, 48) for share in (0, 0.01, 0.05, 0.15, 0.5, 0.99)] == [
        0, 0, 2, 7, 24, 48]
    assert study.count_heads(0.5, 5) == 3  # a half goes up, also where round() would go to the even one
    assert all(study.count_heads(n / total, total) == n for total in range(1, 200) for n in range(total))


def similarity_of(model, windows):
    running, moments = watch(model, windows)
    return moments, running["output"].mean


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
    model, windows = make_model(norm_position=norm_position), make_windows(8)
    make_affine(model, 1, 2, 0)
    moments, similarity = similarity_of(model, windows)
    pairs = all_pairs(model)
    similarity[pairs.index((1, 0, 2))] = 1.0  # an affine map says nothing of the cosine
    idx = random_ids(4, 16, seed=9)
    wanted = model(idx)
    with untouched(model):
        folded = {how: fold(model, [(1, 0)], how, moments, similarity) for how in MERGES}
    for how in ("partner", "layer"):
        assert folded[how].config.heads == (4, 3, 4)
        torch.testing.assert_close(folded[how](idx), wanted, atol=2e-4, rtol=1e-4)
    assert (folded["mean"](idx) - wanted).abs().max() > 0.05
    similarity[pairs.index((1, 0, 2))] = -1.0  # an opposite tells as much as a twin
    torch.testing.assert_close(fold(model, [(1, 0)], "partner", moments, similarity)(idx), wanted, atol=2e-4,
                               rtol=1e-4)
    # two heads at once, in two layers, each told from its own partner
    make_affine(model, 2, 1, 3)
    moments, similarity = similarity_of(model, windows)
    similarity[[pairs.index((1, 0, 2)), pairs.index((2, 1, 3))]] = 1.0
    both_folded = fold(model, [(2, 3), (1, 0)], "partner", moments, similarity)
    torch.testing.assert_close(both_folded(idx), model(idx), atol=2e-4, rtol=1e-4)
    # from another partner it cannot be told
    similarity[pairs.index((1, 0, 2))], similarity[pairs.index((1, 0, 1))] = 0.0, 1.0
    wrong = fold(model, [(1, 0)], "partner", moments, similarity)
    assert (wrong(idx) - model(idx)).abs().max() > 0.05


@torch.no_grad()
def test_a_constant_head_is_its_mean():
    model, windows = make_model(), make_windows()
    attn = model.transformer.h[0].attn
    attn.c_attn.weight[head_rows(model, 0, 3, 2)] = 0.0
    moments, similarity = similarity_of(model, windows)
    idx = random_ids(4, 16, seed=9)
    for how in MERGES:
        torch.testing.assert_close(fold(model, [(0, 3)], how, moments, similarity)(idx), model(idx),
                                   atol=1e-4, rtol=1e-4)
    assert (prune(model, [(0, 3)])(idx) - model(idx)).abs().max() > 0.05


@torch.no_grad()
def test_heads_that_are_left_may_be_twins():
    """Their outputs leave the fit open; it must not choose weights so large that rounding shows."""
    model, windows = make_model(), make_windows(8)
    copy_head(model, 1, 1, 2)
    make_affine(model, 1, 2, 0)
    moments, similarity = similarity_of(model, windows)
    less, idx = fold(model, [(1, 0)], "layer", moments, similarity), random_ids(4, 16, seed=9)
    torch.testing.assert_close(less(idx), model(idx), atol=2e-4, rtol=1e-4)
    assert less.transformer.h[1].attn.c_proj.weight.abs().max() < 100
    model = make_model()  # twins to five digits, and a head that is not told from them without error
    copy_head(model, 1, 1, 2)
    noise = torch.randn(6, 24, generator=torch.Generator().manual_seed(1))
    model.transformer.h[1].attn.c_attn.weight[head_rows(model, 1, 2, 2)] *= 1 + 2e-6 * noise
    less = fold(model, [(1, 0)], "layer", *similarity_of(model, windows))
    assert less.transformer.h[1].attn.c_proj.weight.abs().max() < 100


@pytest.mark.parametrize("heads", [[(0, 2)], [(2, 1)], [(1, 0), (1, 3)], [(0, 1), (0, 2), (0, 3)]])
@torch.no_grad()
def test_the_more_is_known_the_less_is_left_of_the_error(heads):
    """Squares of the error of a layer's attention over the calibration windows: least squares order them."""
    model, windows = make_model(), make_windows(12)
    moments, similarity = similarity_of(model, windows)
    layer, inputs = heads[0][0], []
    attn = model.transformer.h[layer].attn
    handle = attn.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    for x, _ in windows:
        model(x)
    handle.remove()
    x = torch.cat(inputs).double()

    def output(model):
        return copy.deepcopy(model.transformer.h[layer].attn).double()(x)

    error = {how: (output(fold(model, heads, how, moments, similarity) if how else prune(model, heads))
                   - output(model)).square().sum().item() for how in ("layer", "partner", "mean", "")}
    assert error["layer"] < 0.999 * error["mean"] and error["layer"] <= error["partner"] * (1 + 1e-6)
    if len(heads) == 1:
        assert error["partner"] < 0.999 * error["mean"] < 0.999 * error[""]
    # what is left of a fit is orthogonal to what it knew: no other constant would do better
    rest = (output(fold(model, heads, "mean", moments, similarity)) - output(model)).mean(dim=(0, 1))
    assert rest.abs().max() < 1e-5


@torch.no_grad()
def test_a_whole_layer_becomes_its_mean():
    model, windows = make_model(RAGGED), make_windows(8)
    moments, similarity = similarity_of(model, windows)
    idx, heads = random_ids(2, 16), [(2, 0), (2, 2), (2, 1), (0, 1)]
    folded = [fold(model, heads, how, moments, similarity) for how in ("mean", "partner", "layer")]
    mean, told = folded[0], folded[1]
    assert all(less.config.heads == (1, 0, 0) for less in folded)
    torch.testing.assert_close(told(idx), folded[2](idx))  # the partner is all that is left
    outputs = torch.cat([y.flatten(0, 1) for layer, _, y in seen_by_hand(model, next(both(windows)))
                         if layer == 2])
    attn = model.transformer.h[2].attn
    for less in folded:
        torch.testing.assert_close(less.transformer.h[2].attn.c_proj.bias,
                                   attn.c_proj.bias + attn.c_proj.weight @ outputs.mean(dim=0),
                                   atol=1e-4, rtol=1e-4)
    assert not torch.allclose(mean(idx), told(idx), atol=1e-3)


# ---- what is shown -------------------------------------------------------------


def test_correlations():
    a = np.array([3.0, 1.0, 2.0, 2.0, 9.0])
    pearson, spearman = study.correlation(a, -2 * a + 1)
    assert pearson == pytest.approx(-1) and spearman == pytest.approx(-1)
    b = np.array([1.0, 8.0, 2.0, 4.0, 4.0])
    ranks = [4, 1, 2.5, 2.5, 5], [1, 5, 2, 3.5, 3.5]  # equal values share their ranks
    assert study.correlation(a, b) == pytest.approx((np.corrcoef(a, b)[0, 1], np.corrcoef(*ranks)[0, 1]))
    assert study.correlation(a, a**3)[1] == pytest.approx(1) and study.correlation(a, a**3)[0] < 0.99
    for constant, other in ((np.ones(5), a), (a, np.ones(5)), (np.full(3, 0.1), np.full(3, 0.1)),
                            (np.array([]), np.array([])), (np.ones(1), np.ones(1))):
        assert all(map(math.isnan, study.correlation(constant, other)))


def row(share, name, seed="", merge="", change=0.0, half=0.01, timed=False):
    return {"share": share, "criterion": name, "seed": seed, "merge": merge, "heads": 4, "params": 100,
            "flops_per_token": 10, "cache_bytes": 8, "perplexity": 20 * (1 + change), "change": change,
            "low": change - half, "high": change + half, "prefill_tok_s": 5.0 if timed else "",
            "decode_tok_s": 1.0 if timed else ""}


def test_the_verdict(monkeypatch):
    """Random prunings: 0.3, 0.4, 0.5, so 0.4 with a standard deviation of 0.1."""
    monkeypatch.setattr(study, "random_seeds", 3)

    def verdict(change, half, merged=0.9):
        rows = [row(0.0, "ablation", timed=True), row(0.0, "ablation", merge="layer"),
                *(row(0.0, "random", seed) for seed in range(3)),
                row(0.5, "ablation", change=change, half=half, timed=True),
                row(0.5, "ablation", merge="layer", change=merged),
                *(row(0.5, "random", seed, change=0.3 + 0.1 * seed) for seed in range(3))]
        lines = study.pruning_lines(rows)
        assert any("20.000, without healing" in line and "of 3 random" in line for line in lines)
        return lines[-1]

    assert verdict(0.29, 0.009) == ("50% of the heads by ablation: +29.00%, better than random, +40.00%, by "
                                    "these errors; not below 5%")
    assert "not to be told from random" in verdict(0.29, 0.011)
    assert "worse than random" in verdict(0.52, 0.015)
    assert "not to be told from random" in verdict(0.52, 0.025)
    assert verdict(0.03, 0.019).endswith("; below 5%") and verdict(0.03, 0.021).endswith("; not below 5%")
    assert verdict(0.29, 0.009, merged=0.1) == verdict(0.29, 0.009)  # random ones were not folded
    alone = verdict(0.03, math.nan)
    assert "not to be told from random" in alone and alone.endswith("; below 5%") and "nan" not in alone


def test_intervals(monkeypatch):
    """Student's t over the means of 20 stretches of windows."""
    model, windows = make_model(), make_windows(45)
    x, y = both(windows)
    less = prune(model, [(0, 1)])
    t = np.linspace(-2.093, 2.093, 10_001)
    density = math.gamma(10) / math.sqrt(19 * math.pi) / math.gamma(9.5) * (1 + t**2 / 19) ** -10
    assert np.trapezoid(density, t) == pytest.approx(0.95, abs=1e-4)
    with torch.no_grad():
        dense, found = (m(x, y, reduction="none").double().mean(dim=1).numpy() for m in (model, less))
    got = study.judge(less, windows, study.window_losses(model, windows))
    rise, ends = (found - dense).mean(), np.cumsum([0] + 5 * [3] + 15 * [2])
    blocks = [(found - dense)[start:end].mean() for start, end in itertools.pairwise(ends)]
    half = 2.093 * np.std(blocks, ddof=1) / math.sqrt(20)
    assert got == pytest.approx({"perplexity": math.exp(found.mean()), "change": math.exp(rise) - 1,
                                 "low": math.exp(rise - half) - 1, "high": math.exp(rise + half) - 1},
                                rel=1e-4)
    alone = study.judge(less, make_windows(19), study.window_losses(model, make_windows(19)))
    assert math.isnan(alone["low"]) and math.isnan(alone["high"]) and math.isfinite(alone["change"])
    rows = [row(0.5, "random", seed, change=change) for seed, change in enumerate((0.1, 0.2, 0.6))]
    rows += [row(0.5, "random", 0, "mean", change=0.05), row(0.5, "ablation", change=0.02)]
    assert study.grouped(rows) == {
        ("random", ""): {0.5: pytest.approx((0.3, 0.3 - 0.07**0.5, 0.3 + 0.07**0.5))},
        ("random", "mean"): {0.5: pytest.approx((0.05, 0.04, 0.06))},
        ("ablation", ""): {0.5: pytest.approx((0.02, 0.01, 0.03))}}


@torch.no_grad()
def test_a_pruned_model_that_computes_something_else_is_not_judged(monkeypatch):
    model, windows = make_model(), make_windows(2)
    study.check_pruned(model, prune(model, [(0, 1)]), [(0, 1)], windows)
    with pytest.raises(UserError, match=r"without 1 heads the logits differ by .* the same heads masked"):
        study.check_pruned(model, prune(model, [(0, 2)]), [(0, 1)], windows)
    monkeypatch.setattr(study, "prune", lambda model, heads: prune(model, heads[1:]))
    with pytest.raises(UserError, match="logits differ"):
        study.sweep(model, {("given", ""): [(0, 1)]}, [0.1], "given", [], {}, np.zeros(18), windows, None)


# ---- the script ----------------------------------------------------------------


SHAPE = {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 264, "n_vocab": 257, "std": 0.15}
FLAGS = {"device": "cpu", "calibration_tokens": 256, "val_tokens": 256, "batch_size": 5, "random_seeds": 2}


def save(folder, tokenizer, data_dir, **shape):
    """A random model's checkpoint, as of step 7 of a run on data_dir."""
    tok, model = load_tokenizer(str(tokenizer)), make_model(**{**SHAPE, **shape})
    folder.mkdir()
    return save_checkpoint(folder, 7, {
        "step": 7, "model": model.state_dict(), "model_config": describe_model(model), "optimizers": [],
        "tokenizer": describe_tokenizer(tok), "config": {
            "data_dir": str(data_dir), "seed": 1, "block_size": 16, "batch_tokens": 64, "val_tokens": 64}})


def write_data(folder, tokenizer, sha256="", **counts):
    """Shards of so many random ids for each split."""
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
    """In `folder`, the script's settings; speed is measured briefly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(study, "SPEED_ROUNDS", 1)
        patch.setattr(study, "DECODE_TOKENS", 4)
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
            "out_dir": "new/heads", "prune_fractions": "0.5,0.25", "merge": "mean,partner,layer",
            "criterion": "redundancy_output"}):
        study.main()
    return source, base / "new" / "heads", printed.getvalue()


@pytest.fixture
def run(tmp_path):
    """Calls main() with settings, in a folder of its own."""
    def run(**settings):
        with with_settings(tmp_path, settings):
            study.main()

    return run


def windows_of(model, data_dir, split, ids):
    loader = WindowLoader(TokenStream(data_dir, split), 16, 16, 0, 257, shuffle=False)
    n = loader.n_windows
    return Windows(loader, np.array([round(i) for i in ids(n)]), DEV)


def test_the_files(analyzed):
    _, folder, printed = analyzed
    assert sorted(path.name for path in folder.iterdir()) == sorted([
        "pairs.csv", "similar_pairs.txt", "similarity.txt", "heads.csv", "heads.png",
        *(f"similarity_{name}.png" for name in MEASURES), "pruning.csv", "pruning.txt", "pruning.png",
        *(f"pruned_{share}{how}.pt" for share in (0.25, 0.5) for how in ("", "_mean", "_partner", "_layer"))])
    for path in folder.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    for path in folder.glob("*.txt"):
        text = path.read_text(encoding="utf-8")
        assert "nan" not in text and text.endswith("\n")
        assert text in printed or path.name == "similar_pairs.txt"
    assert "8 heads in 2 layers; measured on 256 train tokens, judged on 256 val tokens" in printed
    assert "--init_from=new/heads/pruned_0.25.pt" in printed


def test_the_tables_of_heads_and_pairs(analyzed, tiny_data, monkeypatch):
    source, folder, _ = analyzed
    model, state = load_model(source)
    for key in ("calibration_tokens", "val_tokens"):
        monkeypatch.setattr(study, key, 256)
    calibration, val = study.open_windows(state, "", model, DEV)
    n = calibration.loader.n_windows
    assert len(calibration.ids) == len({*calibration.ids}) == 16
    assert calibration.ids[0] == 0 and calibration.ids[-1] == n - 1  # spread evenly
    assert set(np.diff(calibration.ids)) <= {(n - 1) // 15, (n - 1) // 15 + 1}
    assert val.ids.tolist() == list(range(16))
    assert "val" in val.loader.stream.paths[0].name and "train" in calibration.loader.stream.paths[0].name
    measured, _ = watch(model, calibration)
    measured |= {"importance": study.importance(model, calibration),
                 "ablation": study.ablation(model, calibration)}
    pairs, heads = read_csv(folder / "pairs.csv"), read_csv(folder / "heads.csv")
    assert [(int(r["layer"]), int(r["head"]), int(r["other"])) for r in pairs] == all_pairs(model)
    assert [(int(r["layer"]), int(r["head"])) for r in heads] == all_heads(model)
    for rows, names in ((pairs, MEASURES), (heads, study.HEAD_MEASURES)):
        for name in names:
            column = {key: np.array([float(r[key]) for r in rows]) for key in rows[0]
                      if key.startswith(name)}
            assert [key.removeprefix(name) for key in column] == (
                ["", "_se", "_half_a", "_half_b", *["_null"] * (name not in ("importance", "ablation"))])
            np.testing.assert_allclose(column[name], measured[name].mean, atol=1e-5)
            np.testing.assert_allclose(column[f"{name}_se"], measured[name].error, atol=1e-5)
            a, b = column[f"{name}_half_a"], column[f"{name}_half_b"]
            np.testing.assert_allclose(column[name], (a + b) / 2)
            assert not np.allclose(a, b, atol=1e-4)
    # the null knows nothing: its attention is uniform
    uniform = np.mean([1 / (t + 1) for t in range(1, 16)])
    assert all(float(r["first_null"]) == pytest.approx(uniform, rel=0.05) for r in heads)
    assert all(float(r["pattern_null"]) > 0.99 for r in pairs)
    listed = (folder / "similar_pairs.txt").read_text(encoding="utf-8").splitlines()
    above = [(name, *(r[key] for key in ("layer", "head", "other"))) for name in MEASURES
             for r in sorted(pairs, key=lambda r: -float(r[name])) if float(r[name]) > 0.85]
    found = [line.split() for line in listed]
    assert [(line[0], line[2], line[4], line[5]) for line in found] == above and above


def test_the_table_of_pruned_models(analyzed, tiny_data):
    source, folder, printed = analyzed
    model, _ = load_model(source)
    x, y = both(windows_of(model, tiny_data, "val", lambda n: range(16)))

    @torch.no_grad()
    def perplexity(model):
        return math.exp(model(x, y, reduction="none").double().mean().item())

    rows = read_csv(folder / "pruning.csv")
    jobs = [*((name, seed, "") for name in study.CRITERIA
              for seed in (("1337", "1338") if name == "random" else ("",))),
            *(("redundancy_output", "", how) for how in MERGES)]
    found = {(r["criterion"], r["seed"], r["merge"], r["share"]): r for r in rows}
    assert len(found) == len(rows) and {*found} == {(*job, share) for job in jobs
                                                    for share in ("0.0", "0.25", "0.5")}
    removed_by = {}
    for (name, seed, how, share), r in found.items():
        heads = [tuple(map(int, head.split(":"))) for head in r["removed"].split()]
        assert len(heads) == len({*heads}) == 8 * float(share) and int(r["heads"]) == 8 - len(heads)
        removed_by.setdefault((name, seed), {}).setdefault(share, heads)
        assert removed_by[name, seed][share] == heads  # merged or not
        less = prune(model, heads)
        assert int(r["params"]) == less.num_params()
        assert int(r["cache_bytes"]) == 2 * 8 * 4 * int(r["heads"])
        assert 3 * int(r["flops_per_token"]) == less.flops_per_token(16)
        change = float(r["change"])
        assert r["low"] == r["high"] == ""  # of 16 windows there is no interval
        assert float(r["perplexity"]) / (1 + change) == pytest.approx(perplexity(model))
        if how:
            less, _ = load_model(folder / f"pruned_{share}_{how}.pt") if heads else (less, None)
        assert float(r["perplexity"]) == pytest.approx(perplexity(less), rel=1e-5)
        if not heads:
            assert change == 0.0
        timed = (name, how) == ("redundancy_output", "")
        assert all((r[key] != "" and float(r[key]) > 0) == timed for key in ("prefill_tok_s", "decode_tok_s"))
    for shares in removed_by.values():
        assert {*shares["0.25"]} < {*shares["0.5"]}
    for seed in (1337, 1338):
        drawn = random.Random(seed).sample(all_heads(model), 8)
        assert sorted(drawn[:4]) == removed_by["random", str(seed)]["0.5"]
    heads = read_csv(folder / "heads.csv")
    by_ablation = sorted(all_heads(model), key=lambda h: float(heads[all_heads(model).index(h)]["ablation"]))
    assert sorted(by_ablation[:2]) == removed_by["ablation", ""]["0.25"]
    change = float(found["redundancy_output", "", "", "0.5"]["change"])
    assert f"50% of the heads by redundancy_output: {change:+.2%}" in printed


def test_pruned_checkpoints_are_what_they_say(analyzed):
    source, folder, _ = analyzed
    model, whole = load_model(source)
    idx = random_ids(2, 16, n_vocab=257)
    for path in folder.glob("*.pt"):
        less, state = load_model(path)
        removed = [tuple(head) for head in state["pruned"]["removed"]]
        assert state["pruned"]["from"] == source.parent.name and removed == sorted(removed)
        assert sum(less.config.heads) == 8 - len(removed)
        assert len(removed) == (2 if "0.25" in path.name else 4)
        assert state["step"] == 7 and state["config"] == whole["config"] and "optimizers" not in state
        with torch.no_grad(), masked(model, removed):
            close = torch.allclose(less(idx), model(idx), atol=1e-5)
        assert close == (path.stem in ("pruned_0.25", "pruned_0.5"))


def test_pruned_checkpoints_heal_and_are_resumed(analyzed, flags, tmp_path):
    source = analyzed[1] / "pruned_0.5.pt"
    less, _ = load_model(source)
    flags |= {"log_dir": tmp_path / "log", "max_steps": 3, "warmup_steps": 1, "max_lr": 1e-3, "min_lr": 1e-4,
              "val_interval": 3, "val_tokens": 256, "checkpoint_interval": 2, "init_from": source,
              "dropout": 0.0}
    del flags["tokenizer"]
    train(flags)
    first = losses(flags["log_dir"])
    assert len(first) == 3 and all(map(math.isfinite, first))
    healed, state = load_model(flags["log_dir"])
    assert state["step"] == 3 and healed.config.heads == less.config.heads and healed.config.n_head == 4
    assert not any(torch.equal(a, b) for a, b in zip(healed.parameters(), less.parameters()) if a.numel())
    train(flags, max_steps=4, resume="true")
    assert losses(flags["log_dir"])[:3] == first and len(losses(flags["log_dir"])) == 4


def test_pruned_checkpoints_generate_answer_and_are_exported(analyzed, questions, tmp_path, monkeypatch,
                                                             capsys):
    """As the same model with heads of zeros in their place."""
    source = analyzed[1] / "pruned_0.5_layer.pt"
    note, = export_hf(load_any(source), tmp_path / "out")
    assert "4 of 8 heads are pruned" in note
    said = []
    for place in (source, tmp_path / "out"):
        for module, chosen in ((generate, {"prompt": "import", "temperature": 0.0, "num_samples": 1,
                                           "max_new_tokens": 12, "device": "cpu"}),
                               (hellaswag, {"data": str(questions), "device": "cpu", "dtype": "float32"})):
            for key, value in {**chosen, "checkpoint": str(place)}.items():
                monkeypatch.setattr(module, key, value)
            module.main()
        out = capsys.readouterr().out
        said.append([line.rpartition(" | ")[0] or line for line in out.splitlines()
                     if "step " not in line and not line.startswith("note")])
    assert said[0] == said[1]
    text = "\n".join(said[0])
    assert "acc_norm" in text and "import" in text


def test_a_pruned_model_is_analyzed_again(analyzed, byte_tokenizer, run, tmp_path, capsys):
    """Relative to what is left: by hand, in bfloat16, all in one batch, with a single window to judge on."""
    source = analyzed[1] / "pruned_0.5.pt"
    data_dir = write_data(tmp_path / "data", byte_tokenizer, train=7 * 16 + 1, val=17)
    less, _ = load_model(source)
    gone = [(layer, 0) for layer, n in enumerate(less.config.heads) if n]
    run(checkpoint=str(source), data_dir=str(data_dir), out_dir="again", dtype="bfloat16", batch_size=100,
        prune_heads=", ".join(f"{layer}:{head}" for layer, head in gone), random_seeds=1, merge="mean")
    printed = capsys.readouterr().out
    assert "4 heads in 2 layers; measured on 112 train tokens, judged on 16 val tokens" in printed
    assert "nan" not in printed and "not to be told from random" in printed
    rows = read_csv(tmp_path / "again" / "pruning.csv")
    assert [(r["criterion"], r["merge"], r["low"]) for r in rows[:2]] == [("given", how, "")
                                                                          for how in ("", "mean")]
    assert {r["share"] for r in rows} == {"0.0", str(len(gone) / 4)}
    assert {r["removed"] for r in rows if r["criterion"] == "given"} == {
        "", " ".join(f"{layer}:{head}" for layer, head in gone)}
    again, state = load_model(tmp_path / "again" / "pruned.pt")
    assert again.config.heads == tuple(n - 1 if n else 0 for n in less.config.heads)
    assert state["pruned"] == {"from": str(source), "removed": [list(head) for head in gone]}
    names = {path.name for path in (tmp_path / "again").glob("*.pt")}
    assert names == {"pruned.pt", "pruned_mean.pt"}
    assert "ablation" not in read_csv(tmp_path / "again" / "heads.csv")[0]


def test_layers_of_one_head_and_models_without_any(byte_tokenizer, run, tmp_path, capsys):
    data_dir = write_data(tmp_path / "data", byte_tokenizer, train=65, val=200)
    save(tmp_path / "log", byte_tokenizer, data_dir, heads=(0, 1))
    run(out_dir="heads", prune_fractions="0.9", criterion="random", merge="mean", random_seeds=1)
    printed = capsys.readouterr().out
    assert "nan" not in printed and "no layer has two heads" in printed
    rows = read_csv(tmp_path / "heads" / "pruning.csv")
    assert {(r["share"], r["heads"], r["cache_bytes"]) for r in rows} == {
        ("0.0", "1", "64"), ("0.9", "0", "0")}
    assert (tmp_path / "heads" / "pairs.csv").read_text(encoding="utf-8") == "layer,head,other\n"
    assert (tmp_path / "heads" / "heads.png").exists() and not list(tmp_path.glob("heads/similarity_*"))
    less, _ = load_model(tmp_path / "heads" / "pruned_0.9.pt")
    assert less.config.heads == (0, 0)
    with pytest.raises(UserError, match=r"pruned_0.9.pt: it has no heads left"):
        run(checkpoint="heads/pruned_0.9.pt", out_dir="none")
    assert not (tmp_path / "none").exists()


def test_measuring_only(analyzed, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "draw_similarity", lambda *_: None)
    run(checkpoint=str(analyzed[0]), out_dir="heads", prune_fractions="", similarity_threshold=1.0)
    assert sorted(path.name for path in (tmp_path / "heads").iterdir()) == [
        "heads.csv", "heads.png", "pairs.csv", "similar_pairs.txt", "similarity.txt"]
    assert "written to heads" in capsys.readouterr().out
    assert (tmp_path / "heads" / "similar_pairs.txt").read_text(encoding="utf-8") == "no pair is above 1.0\n"
    for name in ("heads.csv", "pairs.csv"):  # the same numbers from another run
        assert read_csv(tmp_path / "heads" / name) == read_csv(analyzed[1] / name)


@pytest.mark.parametrize(("settings", "words"), [
    ({"prune_heads": "2:0"}, r"prune_heads=2:0: there is no head 2:0; wanted LAYER:HEAD.*0: 4, 1: 4"),
    ({"prune_heads": "0:4"}, "there is no head 0:4"), ({"prune_heads": "0:1,1:1,0:1"}, "got a head twice"),
    ({"prune_heads": ",".join(["0:0"] * 9)}, "got 9 heads, and there are no more than 8"),
    *(({"prune_heads": text}, "wanted LAYER:HEAD, counted from 0, with commas between them, such as 0:3,2:1")
      for text in ("0", "0:a", "0:1;1:2", "-1:0", "0:1,", ",", "1:", ":1", "0:1.5", "0:1:2")),
    *(({"prune_fractions": text}, "prune_fractions=.*from 0 on, below 1, with commas between them, such as 0")
      for text in ("1", "-0.1", "nan", "half", "0,0.5,1.5", "0.1;0.2", "inf")),
    ({"merge": "mean,sum"}, "merge=sum: wanted mean, partner, layer"),
    ({"data_dir": "nowhere"}, "data_dir=nowhere is not there; build it: make prepare"),
    ({"checkpoint": "nowhere"}, "nowhere: not there"), ({"device": "abacus"}, "wanted auto, cpu"),
    ({"data_dir": "others"}, "data_dir=others was tokenized with .*another vocabulary; give --data_dir"),
    ({"data_dir": "little"}, "got 3 windows of 16 tokens to calibrate on, wanted at least 4"),
    ({"data_dir": "no_val"}, "got 16 val tokens, wanted 17 or more, one window of"),
    ({"out_dir": "file"}, "out_dir=file is there already"),
    ({"out_dir": "full"}, "out_dir=full is there already and not empty; give .* new folder with --out_dir"),
])
def test_bad_input_is_refused_before_anything_is_measured(analyzed, byte_tokenizer, run, tmp_path,
                                                          monkeypatch, settings, words):
    others = {"others": {"sha256": "0" * 64, "train": 200, "val": 200}, "little": {"train": 64, "val": 200},
              "no_val": {"train": 200, "val": 16}}
    if settings.get("data_dir") in others:
        write_data(tmp_path / settings["data_dir"], byte_tokenizer, **others[settings["data_dir"]])
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine", encoding="utf-8")
    monkeypatch.setattr(study, "watch", None)  # nothing is measured
    before = [snapshot(folder) for folder in (tmp_path, tmp_path / "full")]
    with pytest.raises(UserError, match=words):
        run(**{"checkpoint": str(analyzed[0]), "out_dir": "new", **settings})
    assert [snapshot(folder) for folder in (tmp_path, tmp_path / "full")] == before


def test_data_and_heads_that_are_missing(byte_tokenizer, tiny_data, run, tmp_path):
    path = save(tmp_path / "log", byte_tokenizer, tiny_data, block_size=2)
    with pytest.raises(UserError, match=r"has a context of 2 tokens, .* wanted 4 or more"):
        run(checkpoint=str(path))
    state = load_any(path)
    del state["config"]  # as an imported model
    save_checkpoint(tmp_path, 1, state)
    with pytest.raises(UserError, match="names no data; give --data_dir=FOLDER"):
        run(checkpoint=str(tmp_path / "ckpt_0000001.pt"))
    assert not (tmp_path / "heads").exists()


def test_the_script_refuses_in_words(analyzed):
    source, folder, _ = analyzed
    before = snapshot(folder)
    done = attempt(FLAGS, 1, ROOT / "analyze_heads.py", checkpoint=source, out_dir=folder)
    assert done.returncode == 2 and "error: out_dir=" in done.stderr and "Traceback" not in done.stderr
    assert snapshot(folder) == before


def test_shares_of_as_many_heads_are_one(analyzed, run, tmp_path, capsys):
    run(checkpoint=str(analyzed[0]), prune_fractions="0,0.05,0.25,0.26")  # 0, 0, 2 and 2 of 8
    assert {row["share"] for row in read_csv(tmp_path / "heads" / "pruning.csv")} == {"0.0", "0.25"}
    said = capsys.readouterr().out
    assert "note: 5.0% of 8 heads, 0, is as many as of another share" in said and "note: 26.0% of 8" in said


def test_the_words_of_criterion_are_those_of_the_table():
    assert annotations_of(vars(study))["criterion"] == (*study.CRITERIA,)
