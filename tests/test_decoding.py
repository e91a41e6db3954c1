"""Generation: the cache, prompts of different lengths and sampling, against full forward passes."""

import math

import pytest
import torch
from test_model import make_model, random_ids

from bpe import load_tokenizer
from configurator import UserError
from decoding import KVCache, context_start, generate, sample_token
from kernels import attention, plain_attention


def drawn(steps):
    """The ids (B, n) of a generation."""
    return torch.stack([token for token, _ in steps], dim=1)


@pytest.mark.parametrize("chunks", [[16], [1] * 16, [5, 1, 1, 9], [9, 3, 4], [15, 1]])
def test_cached_logits_equal_the_full_forward(chunks):
    model, idx = make_model(), random_ids(3, 16)
    cache = KVCache(model.config, 3, "cpu", torch.float32)
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in idx.split(chunks, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(idx), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prompt_length", [1, 7, 15, 16, 17, 40])
@pytest.mark.parametrize("block_size", [1, 7, 16])
def test_generation_with_and_without_the_cache(prompt_length, block_size):
    """Also past the context, where the cache is refilled."""
    model, idx = make_model(block_size=block_size), random_ids(2, prompt_length)
    one, other = (drawn(generate(model, idx, 30, 1.0, 50, 0.95, torch.Generator().manual_seed(3), use_cache))
                  for use_cache in (True, False))
    assert one.shape == (2, 30) and torch.equal(one, other)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("norm_position", ["pre", "post"])
@pytest.mark.parametrize("attention", [attention, plain_attention])
def test_prompts_of_different_lengths_are_continued_as_alone(use_cache, norm_position, attention):
    """Also where some rows, and not others, go beyond the context; logits too, of every step."""
    model = make_model(norm_position=norm_position)
    model.use_attention(attention)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    prompts = [random_ids(1, n, seed=n)[0] for n in (3, 1, 9, 16, 30)]
    together = list(generate(model, prompts, 30, temperature=0.0, use_cache=use_cache))
    for i, prompt in enumerate(prompts):
        for (tokens, logits), (token, alone) in zip(
                together, generate(model, prompt[None], 30, temperature=0.0, use_cache=False), strict=True):
            assert tokens[i] == token[0]
            torch.testing.assert_close(logits[i], alone[0], atol=2e-5, rtol=1e-5)


def test_rounding_hardly_ever_changes_what_top_p_draws():
    """Among ids of nearly equal probability: were they sorted, a rounding error would swap neighbours."""
    generator = torch.Generator().manual_seed(0)
    logits = 0.3 * torch.randn(1000, 5000, generator=generator)
    rounded = logits + 1e-5 * torch.randn(1000, 5000, generator=generator)
    one, other = (sample_token(some, 1.0, 0, 0.95, torch.Generator().manual_seed(1))
                  for some in (logits, rounded))
    assert (one != other).float().mean() < 0.02  # sorted by probability: 0.05


def test_logits_that_are_not_finite_are_an_error():
    model = make_model()
    model.transformer.ln_f.bias.data[0] = math.nan
    with pytest.raises(UserError, match="logits are not finite"):
        next(generate(model, random_ids(1, 3), 5))


@pytest.mark.parametrize(("settings", "words"), [
    ((-0.1, 0, 1.0), "temperature=-0.1"), ((math.nan, 0, 1.0), "temperature=nan"),
    ((1.0, -1, 1.0), "top_k=-1"), ((1.0, 0, 0.0), "top_p=0.0"), ((1.0, 0, 1.1), "top_p=1.1")])
def test_sampling_settings_out_of_range(settings, words):
    with pytest.raises(UserError, match=words):
        next(generate(make_model(), random_ids(1, 3), 5, *settings))


def test_the_logits_that_come_with_a_token_are_those_it_was_drawn_from():
    model, idx = make_model(), random_ids(2, 5)
    for token, logits in generate(model, idx, 8, temperature=0.0):
        with torch.no_grad():
            torch.testing.assert_close(logits, model(idx)[:, -1], atol=1e-5, rtol=1e-5)
        assert torch.equal(token, logits.argmax(-1))
        idx = torch.cat((idx, token[:, None]), dim=1)


def test_ten_thousand_tokens_of_a_random_model_decode(encoding):
    """GPT-2's vocabulary, 47 rows of padding, and a random model to which all ids are likely."""
    tok = load_tokenizer()
    model = make_model(vocab_size=50304, n_vocab=tok.n_vocab, n_layer=1, n_embd=8)
    tokens = drawn(generate(model, torch.full((100, 1), tok.eot), 100, temperature=3.0, top_k=0))
    assert tokens.shape == (100, 100) and 0 <= tokens.min() and tokens.max() < tok.n_vocab
    assert len(tokens.unique()) > 5000
    for row in tokens:
        assert tok.decode(row) == encoding.decode(row.tolist())


@pytest.mark.parametrize("prompts", [[], [torch.tensor([], dtype=torch.long)],
                                     [torch.tensor([1]), torch.tensor([], dtype=torch.long)]])
def test_generation_needs_a_first_token(prompts):
    with pytest.raises(UserError, match="at least 1 token, such as end-of-text"):
        next(generate(make_model(), prompts, 5))


def test_context_start_is_a_window_that_always_fits():
    for block_size in (1, 2, 7, 16):
        for n in range(1, 100):
            start = context_start(n, block_size)
            assert 0 <= start < n and n - start <= block_size
            assert n - start >= min(n, block_size - max(1, block_size // 2) + 1)
            assert start <= context_start(n + 1, block_size)


def test_padding_ids_are_never_sampled():
    model = make_model(vocab_size=128, n_vocab=61)
    with torch.no_grad():
        # padding rows that would dominate the softmax
        model.transformer.wte.weight[61:] = 10.0 * model.transformer.wte.weight[:1]
        assert model(random_ids(1, 4)).shape == (1, 4, 61)
    tokens = torch.cat([token for token, _ in generate(model, random_ids(16, 2), 100, temperature=5.0)])
    assert tokens.numel() == 1600 and tokens.max() < 61


def test_generate_restores_the_training_mode():
    model = make_model(dropout=0.2).train()
    next(iter(generate(model, random_ids(1, 3), 5)))  # abandoned half-way
    assert model.training


def test_sample_token():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(20_000, 1)
    probs = torch.softmax(logits[0], dim=0)
    generator = torch.Generator().manual_seed(0)

    def frequencies(*args):
        return torch.bincount(sample_token(logits, *args, generator), minlength=4) / 20_000

    assert frequencies(0.0, 0, 1.0)[0] == 1.0
    torch.testing.assert_close(frequencies(1.0, 0, 1.0), probs, atol=0.02, rtol=0)
    torch.testing.assert_close(frequencies(2.0, 0, 1.0), torch.softmax(logits[0] / 2, 0), atol=0.02, rtol=0)
    torch.testing.assert_close(frequencies(1.0, 2, 1.0), torch.tensor([*(probs[:2] / probs[:2].sum()), 0, 0]),
                               atol=0.02, rtol=0)
    assert frequencies(1.0, 0, 0.5)[0] == 1.0  # the likeliest alone has 0.64
    assert frequencies(1.0, 0, 0.7)[2:].sum() == 0.0 and frequencies(1.0, 0, 0.7)[1] > 0.2
    assert frequencies(1.0, 99, 1e-9)[0] == 1.0
    for temperature in (1e-10, 1e-40, 1e-46, 1e-300):  # no overflow, and no 0 / 0, on the way to greedy
        assert frequencies(temperature, 0, 1.0)[0] == 1.0
