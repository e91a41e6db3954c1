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


@pytest.mark.parametrize("device", ["cpu", ON_CUDA])
def test_it_leaves_no_trace(device):
    dev = resolve_device(device)
    model = make_model(dev.device)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = [torch.get_rng_state(), np.random.get_state()[1], random.getstate()]
    states += [torch.cuda.get_rng_state()] if dev.type == "cuda" else []
    for training in (True, False):
        model.train(training)
        self_test(model, dev)
        assert {module.training for module in model.modules()} == {training}
    after = [torch.get_rng_state(), np.random.get_state()[1], random.getstate()]
    after += [torch.cuda.get_rng_state()] if dev.type == "cuda" else []
    assert all(a == b if isinstance(a, tuple) else np.array_equal(a, b) for a, b in zip(states, after))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.is_grad_enabled()


def masked(q, k, v, sees):
    """Attention with which query t sees key s where sees(t, s)."""
    t = torch.arange(q.size(2), device=q.device)
    return SDPA(q, k, v, attn_mask=sees(t[:, None], t[None, :]))


def no_mask(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
    return SDPA(q, k, v)


def no_mask_in_16_bit(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
    return SDPA(q, k, v, is_causal=q.dtype == torch.float32)  # pytorch #195910


def no_mask_without_autograd(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
    return SDPA(q, k, v, is_causal=torch.is_grad_enabled())


def no_mask_with_autograd(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
    return SDPA(q, k, v, is_causal=not torch.is_grad_enabled())


def next_token(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
    return masked(q, k, v, lambda t, s: s <= t + 1)


def next_token_early(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
    return masked(q, k, v, lambda t, s: (s <= t) | ((s == t + 1) & (t == 15)))


def next_token_late(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
    return masked(q, k, v, lambda t, s: (s <= t) | ((s == t + 1) & (t == 30)))


def last_token(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
    return masked(q, k, v, lambda t, s: (s <= t) | (s == q.size(2) - 1))


def last_token_late(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
    return masked(q, k, v, lambda t, s: (s <= t) | ((s == q.size(2) - 1) & (t >= 16)))


def a_tile_of_the_diagonal(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
    return masked(q, k, v, lambda t, s: s < t // 16 * 16 + 16)


def one_head(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
    y = SDPA(q, k, v, is_causal=True)
    return torch.cat((y[:, :-1], SDPA(q, k, v)[:, -1:]), dim=1)


def not_a_number(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
    y = SDPA(q, k, v, is_causal=True).clone()
    y[0, 0, 0, 0] = math.nan
    return y


def as_if_contiguous(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
    q, k, v = (x.as_strided(x.shape, x.contiguous().stride()) for x in (q, k, v))  # pytorch #181133
    return SDPA(q, k, v, is_causal=True)


def wrong_scale(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
    return SDPA(q, k, v, is_causal=True, scale=1 / q.size(3))


def scale_of_a_padded_head(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
    return SDPA(q, k, v, is_causal=True, scale=(q.size(3) + 8) ** -0.5)


def zeros(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
    return SDPA(q, k, v, is_causal=True) * 0


class HalfGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient / 2


def wrong_only_with_autograd(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
    y = SDPA(q, k, v, is_causal=True)
    return y + y.detach() if torch.is_grad_enabled() else y  # with the right gradients


def wrong_gradient(part):
    def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
        q, k, v = (HalfGradient.apply(x) if name == part else x for name, x in zip("qkv", (q, k, v)))
        return SDPA(q, k, v, is_causal=True)

    return attention


LEAKS = [no_mask, no_mask_without_autograd, no_mask_with_autograd, next_token, next_token_early,
         next_token_late, last_token, last_token_late, a_tile_of_the_diagonal, one_head, not_a_number]
FAULTS = [*LEAKS, as_if_contiguous, wrong_scale, scale_of_a_padded_head, zeros, wrong_only_with_autograd,
          wrong_gradient("q"), wrong_gradient("k"), wrong_gradient("v")]


@pytest.mark.parametrize("device", ["cpu", ON_CUDA])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("attention", FAULTS)
def test_wrong_attention_is_caught(device, dtype, attention):
    dev = resolve_device(device, dtype)
    failures = self_test(make_model(dev.device, n_layer=1), dev, attention)  # the model is healthy
    assert failures and all("attention differs" in failure for failure in failures)


@pytest.mark.parametrize("device", ["cpu", ON_CUDA])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("attention", LEAKS)
def test_a_model_that_sees_the_future_is_caught(monkeypatch, device, dtype, attention):
    dev = resolve_device(device, dtype)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    failures = self_test(make_model(dev.device), dev, SDPA)  # what is tried by itself is healthy
    assert failures and all("change the logits before them" in failure for failure in failures)
    ways = {failure.split(",")[0] for failure in failures}
    assert ways == {no_mask_without_autograd: {"without autograd"}, no_mask_with_autograd: {"with autograd"}
                    }.get(attention, {"with autograd", "without autograd"})


@pytest.mark.parametrize(("dtype", "healthy"), [("float32", True), ("bfloat16", False), ("float16", False)])
def test_a_leak_in_16_bit_only(monkeypatch, dtype, healthy):
    dev = resolve_device("cpu", dtype)
    monkeypatch.setattr(F, "scaled_dot_product_attention", no_mask_in_16_bit)
    failures = self_test(make_model(), dev, no_mask_in_16_bit)
    assert any("logits before" in failure for failure in failures) != healthy
    assert any("attention differs" in failure for failure in failures) != healthy


def test_falling_back_to_plain_attention_heals(monkeypatch):
    dev = resolve_device("cpu", "bfloat16")
    model = make_model()
    monkeypatch.setattr(F, "scaled_dot_product_attention", no_mask)
    assert self_test(model, dev, no_mask)
    monkeypatch.setattr(F, "scaled_dot_product_attention", plain_attention)
    assert self_test(model, dev, plain_attention) == []


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
        assert check_first_loss(model(idx[:, :-1], idx[:, 1:]).item(), 500, 256) == []
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=1.0)
        (sentence,) = check_first_loss(model(idx[:, :-1], idx[:, 1:]).item(), 500, 256)
    assert "wanted about 6.27, ln(500) and a little" in sentence


def test_first_losses_that_others_published():
    assert check_first_loss(10.972, 50257, 768) == []  # run B
    assert check_first_loss(13.0, 50304, 256)  # run A
    assert all(check_first_loss(loss, 50257, 768) for loss in (math.nan, 0.0, 9.0))
    assert check_first_loss(10.8 + 1.7, 50257, 8192) == []  # a wide model is that far from guessing evenly
