"""The start-up self-test: silent about healthy devices, and each fault that a device has had is caught."""

import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from device import check_first_loss, resolve_device, self_test
from kernels import plain_attention
from model import GPT, GPTConfig

SDPA = F.scaled_dot_product_attention
DTYPES = ["float32", "bfloat16", "float16"]
ON_CUDA = pytest.param("cuda", marks=[
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")])


def make_model(device="cpu", **overrides):
    torch.manual_seed(0)
    config = {"block_size": 64, "vocab_size": 512, "n_vocab": 500, "n_layer": 2, "n_head": 4, "n_embd": 256,
              "dropout": 0.2}
    return GPT(GPTConfig(**{**config, **overrides})).to(device)


@pytest.mark.parametrize("device", ["cpu", ON_CUDA])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [
    {}, {"norm_position": "post"}, {"n_head": 3, "n_embd": 24}, {"n_head": 1, "n_embd": 8},
    {"block_size": 1}, {"block_size": 2}, {"block_size": 1024, "n_head": 12, "n_embd": 768, "n_layer": 1}])
@pytest.mark.parametrize("attention", [SDPA, plain_attention])
def test_a_healthy_device_passes(monkeypatch, device, dtype, shape, attention):
    dev = resolve_device(device, dtype)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    assert self_test(make_model(dev.device, **shape), dev, attention) == []


def generators(dev):
    """The states of the global random generators."""
    return [torch.get_rng_state(), np.random.get_state()[1], random.getstate(),
            *([torch.cuda.get_rng_state()] if dev.type == "cuda" else [])]


@pytest.mark.parametrize("device", ["cpu", ON_CUDA])
def test_it_leaves_no_trace(device):
    dev = resolve_device(device)
    model = make_model(dev.device)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = generators(dev)
    for training in (True, False):
        model.train(training)
        self_test(model, dev)
        assert {module.training for module in model.modules()} == {training}
    assert all(a == b if isinstance(a, tuple) else np.array_equal(a, b)
               for a, b in zip(states, generators(dev)))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.is_grad_enabled()


def attention(fault):
    """`fault(q, k, v)` with the signature of SDPA."""
    def call(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
        return fault(q, k, v)
    return call


def sees(rule):
    """Attention in which query t of T sees key s where rule(t, s, T)."""
    def masked(q, k, v):
        t = torch.arange(q.size(2), device=q.device)
        return SDPA(q, k, v, attn_mask=rule(t[:, None], t[None, :], q.size(2)))
    return masked


def one_head(q, k, v):
    return torch.cat((SDPA(q, k, v, is_causal=True)[:, :-1], SDPA(q, k, v)[:, -1:]), dim=1)


def not_a_number(q, k, v):
    y = SDPA(q, k, v, is_causal=True).clone()
    y[0, 0, 0, 0] = math.nan
    return y


def as_if_contiguous(q, k, v):
    q, k, v = (x.as_strided(x.shape, x.contiguous().stride()) for x in (q, k, v))  # pytorch #181133
    return SDPA(q, k, v, is_causal=True)


def wrong_only_with_autograd(q, k, v):
    y = SDPA(q, k, v, is_causal=True)
    return y + y.detach() if torch.is_grad_enabled() else y  # with the right gradients


class HalfGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient / 2


no_mask = attention(SDPA)
no_mask_in_16_bit = attention(lambda q, k, v: SDPA(q, k, v, is_causal=q.dtype == torch.float32))  # #195910
LEAKS = {
    "no mask": SDPA,
    "no mask without autograd": lambda q, k, v: SDPA(q, k, v, is_causal=torch.is_grad_enabled()),
    "no mask with autograd": lambda q, k, v: SDPA(q, k, v, is_causal=not torch.is_grad_enabled()),
    "next token": sees(lambda t, s, T: s <= t + 1),
    "next token, early": sees(lambda t, s, T: (s <= t) | ((s == t + 1) & (t == 15))),
    "next token, late": sees(lambda t, s, T: (s <= t) | ((s == t + 1) & (t == 30))),
    "last token": sees(lambda t, s, T: (s <= t) | (s == T - 1)),
    "last token, late": sees(lambda t, s, T: (s <= t) | ((s == T - 1) & (t >= 16))),
    "a tile of the diagonal": sees(lambda t, s, T: s < t // 16 * 16 + 16),
    "one head": one_head,
    "not a number": not_a_number,
}
FAULTS = LEAKS | {
    "as if contiguous": as_if_contiguous,
    "wrong scale": lambda q, k, v: SDPA(q, k, v, is_causal=True, scale=1 / q.size(3)),
    "scale of a padded head": lambda q, k, v: SDPA(q, k, v, is_causal=True, scale=(q.size(3) + 8) ** -0.5),
    "zeros": lambda q, k, v: SDPA(q, k, v, is_causal=True) * 0,
    "wrong only with autograd": wrong_only_with_autograd,
    "half the gradient of q": lambda q, k, v: SDPA(HalfGradient.apply(q), k, v, is_causal=True),
    "half the gradient of k": lambda q, k, v: SDPA(q, HalfGradient.apply(k), v, is_causal=True),
    "half the gradient of v": lambda q, k, v: SDPA(q, k, HalfGradient.apply(v), is_causal=True),
}


@pytest.mark.parametrize("device", ["cpu", ON_CUDA])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_attention_is_caught(device, dtype, fault):
    dev = resolve_device(device, dtype)
    failures = self_test(make_model(dev.device, n_layer=1), dev, attention(FAULTS[fault]))  # a healthy model
    assert failures and all("attention differs" in failure for failure in failures)


@pytest.mark.parametrize("device", ["cpu", ON_CUDA])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("leak", LEAKS)
def test_a_model_that_sees_the_future_is_caught(monkeypatch, device, dtype, leak):
    dev = resolve_device(device, dtype)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention(LEAKS[leak]))
    failures = self_test(make_model(dev.device), dev, SDPA)  # what is tried by itself is healthy
    assert failures and all("change the logits before them" in failure for failure in failures)
    ways = {failure.split(",")[0] for failure in failures}
    only = leak.removeprefix("no mask ")
    assert ways == ({only} if only in ("with autograd", "without autograd")
                    else {"with autograd", "without autograd"})


@pytest.mark.parametrize(("dtype", "healthy"), [("float32", True), ("bfloat16", False), ("float16", False)])
def test_a_leak_in_16_bit_only(monkeypatch, dtype, healthy):
    dev = resolve_device("cpu", dtype)
    monkeypatch.setattr(F, "scaled_dot_product_attention", no_mask_in_16_bit)
    failures = self_test(make_model(), dev, no_mask_in_16_bit)
    assert any("logits before" in failure for failure in failures) != healthy
    assert any("attention differs" in failure for failure in failures) != healthy


def test_a_test_that_raises_leaves_the_model_in_training():
    model = make_model()
    model.transformer.h[1].mlp = None
    with pytest.raises(TypeError):
        self_test(model, resolve_device("cpu", "float32"))
    assert model.training and torch.is_grad_enabled()


@pytest.mark.parametrize("norm_position", ["pre", "post"])
@pytest.mark.parametrize("n_layer", [1, 6])
def test_first_loss(norm_position, n_layer):
    model = make_model(norm_position=norm_position, n_layer=n_layer)
    idx = torch.randint(500, (4, 65), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert check_first_loss(model(idx[:, :-1], idx[:, 1:]).item(), 500, 256) == ""
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=1.0)
        sentence = check_first_loss(model(idx[:, :-1], idx[:, 1:]).item(), 500, 256)
    assert "wanted about 6.27, ln(500) and a little" in sentence


def test_first_losses_that_others_published():
    assert check_first_loss(10.972, 50257, 768) == ""  # run B
    assert check_first_loss(13.0, 50304, 256)  # run A
    assert all(check_first_loss(loss, 50257, 768) for loss in (math.nan, 0.0, 9.0))
    assert check_first_loss(10.8 + 1.7, 50257, 8192) == ""  # a wide model is that far from guessing evenly
