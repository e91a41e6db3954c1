"""Each kernel against its counterpart in torch."""

import json

import pytest
import torch
import torch.nn.functional as F

from kernels import Linear, attention_on_cpu, gelu, linear_cross_entropy, plain_attention
from model import GPT, GPTConfig

N, C, V = 100, 24, 331


def make_inputs(seed=0, scale=0.5):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, C, generator=generator)
    weight = torch.randn(V, C, generator=generator) * scale
    return x, weight, torch.randint(0, V, (N,), generator=generator)


def loss_and_grads(function, x, weight, targets, reduction="mean", dtype=None, factor=3.0):
    """(loss, dx, dweight) of factor * loss in float32; of a loss per row, of its sum with other weights."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        loss = function(x, weight, targets, reduction)
    total = loss if reduction != "none" else (loss * torch.linspace(0, 1, len(targets))).sum()
    (total * factor).backward()
    return loss.detach(), x.grad, weight.grad


def plain(x, weight, targets, reduction):
    return F.cross_entropy(F.linear(x, weight), targets, reduction=reduction)


def chunked(chunk):
    return lambda x, weight, targets, reduction: linear_cross_entropy(x, weight, targets, chunk, reduction)


def error(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunk", [0, 1, 7, 50, 100, 1000])
@pytest.mark.parametrize("ignored", [[], [0, 5, 6, 99]])  # rows without a target
def test_float32_loss_and_gradients_equal_torch(ignored, chunk, reduction):
    inputs = make_inputs()
    inputs[2][ignored] = -100
    expected = loss_and_grads(plain, *inputs, reduction)
    for ours, theirs in zip(loss_and_grads(chunked(chunk), *inputs, reduction), expected):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=2e-5)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(*inputs, chunk, reduction), expected[0])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_gradients_are_as_exact_as_torchs(dtype, reduction):
    """Against float32: at most twice the error of the plain head under the same autocast. Dividing by the
    softmax's sums after the product rounds a second time, which is sqrt(2) where nothing else is rounded."""
    inputs = make_inputs()
    exact = loss_and_grads(plain, *inputs, reduction)
    theirs = loss_and_grads(plain, *inputs, reduction, dtype)
    for chunk in (7, 100):
        ours = loss_and_grads(chunked(chunk), *inputs, reduction, dtype)
        assert ours[2].dtype == torch.float32
        for a, b, c in zip(ours, theirs, exact):
            assert error(a, c) <= 2 * error(b, c) + 1e-5


def test_a_confident_row_keeps_its_small_gradient():
    """softmax - 1 is computed before it is rounded to bfloat16, which has no number between 0.996 and 1."""
    x, weight = torch.ones(9, 1), torch.tensor([[0.0], [-7.5], [-7.5]])
    targets = torch.zeros(9, dtype=torch.int64)  # of probability 0.9989
    exact = loss_and_grads(plain, x, weight, targets)
    ours = loss_and_grads(chunked(4), x, weight, targets, dtype=torch.bfloat16)
    for a, c in zip(ours, exact):
        torch.testing.assert_close(a, c, atol=0, rtol=0.02)


def test_logits_far_from_zero():
    x, weight, targets = make_inputs()
    x = torch.cat((x, torch.full((N, 1), 50.0)), dim=1)
    weight = torch.cat((weight, torch.full((V, 1), 3.0)), dim=1)  # 150 is added to every logit
    expected = loss_and_grads(plain, x, weight, targets)
    for ours, theirs in zip(loss_and_grads(chunked(7), x, weight, targets), expected):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def test_the_weight_gradient_is_summed_in_float32():
    """400 chunks of one row that pull at the same ids: a sum in bfloat16 would stop growing."""
    x, weight, targets = make_inputs()
    x, targets = x[:1].repeat(400, 1), targets[:1].repeat(400)
    exact = loss_and_grads(plain, x, weight, targets, "sum")
    ours = loss_and_grads(chunked(1), x, weight, targets, "sum", torch.bfloat16)
    assert error(ours[2], exact[2]) < 0.01


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_float16_gradients_need_the_loss_scale(reduction):
    """They are smaller than any float16 number: the factor must be applied before they are rounded."""
    x, weight, targets = make_inputs()
    x *= 1e-5
    exact = loss_and_grads(plain, x, weight, targets, reduction, factor=2.0**14)
    ours = loss_and_grads(chunked(7), x, weight, targets, reduction, torch.float16, factor=2.0**14)
    for a, c in zip(ours, exact):
        assert error(a, c) < 0.02


def make_model(chunk=0, seed=0, **overrides):
    torch.manual_seed(seed)
    settings = {"block_size": 16, "vocab_size": 384, "n_vocab": 331, "n_layer": 2, "n_head": 2, "n_embd": 32}
    model = GPT(GPTConfig(**{**settings, **overrides}))
    model.loss_chunk = chunk
    return model


def make_batch(B, T, n_vocab=331):
    idx = torch.randint(0, n_vocab, (B, T + 1), generator=torch.Generator().manual_seed(1))
    return idx[:, :-1], idx[:, 1:]


def measure_memory(run, path) -> tuple[int, int]:
    """(largest allocation, peak of what was allocated on the way), bytes, by torch's profiler."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        run()
    profiler.export_chrome_trace(str(path))
    events = [e["args"] for e in json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
              if e.get("name") == "[memory]"]
    live, peak = 0, 0
    for event in events:
        live += event["Bytes"]
        peak = max(peak, live)
    return max(event["Bytes"] for event in events), peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_never_exist_all_at_once(tmp_path, dtype):
    """256 rows, 16 at a time; V is large and the rest small, so that logits take most of the memory."""
    model = make_model(vocab_size=8192, n_vocab=8192, n_embd=8)
    x, y = make_batch(16, 16, 8192)
    measured = {}
    for chunk in (0, 16):
        model.loss_chunk = chunk

        def loss(reduction):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                return model(x, y, reduction=reduction)

        def train():
            loss("mean").backward()
            model.zero_grad(set_to_none=False)

        @torch.no_grad()
        def evaluate():
            loss("sum")

        train()  # allocates the gradients
        measured[chunk] = [measure_memory(run, tmp_path / "trace.json") for run in (train, evaluate)]
    all_logits = 256 * 8192 * 4  # bytes in float32
    assert all(largest >= all_logits // 2 for largest, _ in measured[0])  # else nothing is measured here
    (largest, train_peak), (largest_of_eval, eval_peak) = measured[16]
    page = 4096  # oneDNN's scratch, on some processors
    assert max(largest, largest_of_eval) <= all_logits // 16 + page
    assert train_peak < all_logits // 2 < measured[0][0][1]
    assert eval_peak <= train_peak


@pytest.mark.parametrize("T", [1, 7, 128, 130, 300])
def test_attention_with_scores_in_memory_equals_torch(T):
    generator = torch.Generator().manual_seed(0)
    q, k, v, upstream = torch.randn(4, 2, 3, T, 16, generator=generator)
    results = []
    for attend in (lambda q, k, v: attention_on_cpu(q, k, v, 0.0),
                   lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)):
        leaves = [part.clone().requires_grad_() for part in (q, k, v)]
        y = attend(*leaves)
        y.backward(upstream)
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_attention_with_scores_in_memory_drops_weights():
    """Values of 1: a row's output is the sum of its weights, a quarter of which are dropped."""
    torch.manual_seed(0)
    q, k, v = torch.randn(8, 4, 200, 4), torch.randn(8, 4, 200, 4), torch.ones(8, 4, 200, 4)
    y = attention_on_cpu(q, k, v, 0.25)
    assert abs(y.mean().item() - 1.0) < 0.02 and y[:, :, 0].unique().numel() == 2


@pytest.mark.parametrize(("T", "S", "is_causal"), [(8, 8, True), (8, 8, False), (1, 8, False), (3, 8, False)])
def test_plain_attention_is_sdpa(T, S, is_causal):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 16, generator=generator).requires_grad_() for n in (T, S, S))
    mask = torch.ones(T, S, dtype=torch.bool).tril(S - T) if 1 < T < S else None
    ours, theirs = (attention(q, k, v, attn_mask=mask, is_causal=is_causal)
                    for attention in (plain_attention, F.scaled_dot_product_attention))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    upstream = torch.randn(2, 3, T, 16, generator=generator)
    for a, b in zip(*(torch.autograd.grad(y, (q, k, v), upstream) for y in (ours, theirs))):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        half = plain_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask, is_causal=is_causal)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), ours, atol=3e-2, rtol=3e-2)


def test_plain_attention_drops_weights():
    q = k = torch.zeros(1, 1, 64, 4)
    torch.manual_seed(0)
    y = plain_attention(q, k, torch.ones(1, 1, 64, 4), dropout_p=0.25)  # 64 equal weights
    kept = y[..., 0] * 64 * 0.75  # how many of the 64 weights of a row are left
    torch.testing.assert_close(kept, kept.round(), atol=1e-3, rtol=0)
    assert 0.72 < kept.mean() / 64 < 0.78


def test_gelu_is_the_tanh_form(monkeypatch):
    x = torch.linspace(-12, 12, 1001)
    expected = F.gelu(x, approximate="tanh")
    assert torch.equal(gelu(x), expected)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(gelu(x), expected, atol=1e-6, rtol=1e-6)
    assert gelu(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("rows", [(1,), (1, 1), (2, 1), (3, 5), (4, 4), (17,)])
@pytest.mark.parametrize(("C", "V"), [(24, 1), (24, 2), (24, 60), (24, 61), (24, 0), (0, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_torchs_whatever_the_number_of_rows(rows, C, V, bias):
    torch.manual_seed(0)
    layer, x = Linear(C, V, bias=bias), torch.randn(*rows, C)
    with torch.no_grad():
        y = layer(x)
        torch.testing.assert_close(y, F.linear(x, layer.weight, layer.bias), atol=1e-5, rtol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
    assert y.is_contiguous() and layer(x).requires_grad


def train_ten_steps(forward, model, dtype):
    optimizer, = model.configure_optimizers("adamw", 0.1, 3e-3, (0.9, 0.95), fused=False)
    x, y = make_batch(4, 16)
    losses = []
    for _ in range(10):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = forward(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses)


def test_ten_compiled_steps_equal_ten_plain_steps():
    """Compiled, with a chunk that leaves a shorter last one, without a graph break or a second compilation;
    against the plain head and torch's attention, eager. float32 tightly, bfloat16 within its noise."""
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 1e-2)):
        plain_model, model = make_model(n_layer=1), make_model(chunk=24, n_layer=1)
        expected = train_ten_steps(plain_model, plain_model, dtype)
        compiled = torch.compile(model, dynamic=False, fullgraph=True)
        first = train_ten_steps(compiled, model, dtype)
        model.load_state_dict(make_model(n_layer=1).state_dict())
        with torch._dynamo.config.patch(error_on_recompile=True):
            again = train_ten_steps(compiled, model, dtype)
        assert expected[-1] < expected[0] - 1
        assert torch.equal(first, again)
        torch.testing.assert_close(first, expected, atol=tolerance, rtol=0)
