"""
Text from a model: a KV cache, prompts of different lengths in one batch, and sampling.

    for ids, logits in generate(model, prompts, max_new_tokens=100): ...  # (B,) and (B, n_vocab) per token

Shapes: B prompts, T columns (tokens) that are new to the model, S columns it attends to, nh heads, hs head
size.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

from bpe import Tokenizer
from configurator import UserError
from device import Device
from kernels import product_dtype
from model import GPT, GPTConfig


class KVCache:
    """Keys and values of the tokens that a model has seen, so that a new token costs one token of compute.
    Room for `capacity` tokens, by default block_size."""

    def __init__(self, config: GPTConfig, batch_size: int, device, dtype, capacity: int = 0):
        shapes = [(batch_size, config.heads_of(layer), capacity or config.block_size, config.head_size)
                  for layer in range(config.n_layer)]
        self.k = [torch.empty(shape, device=device, dtype=dtype) for shape in shapes]
        self.v = [torch.empty(shape, device=device, dtype=dtype) for shape in shapes]
        self.length = 0  # tokens held; GPT.forward advances it after the last layer

    def append(self, layer, k, v):
        """Store k, v (B, nh, T, hs) of the new tokens; return those of all tokens so far, (B, nh, S, hs)."""
        S = self.length + k.size(2)
        self.k[layer][:, :, self.length : S] = k
        self.v[layer][:, :, self.length : S] = v
        return self.k[layer][:, :, :S], self.v[layer][:, :, :S]


@torch.no_grad()
def generate(model: GPT, prompts: torch.Tensor | list[torch.Tensor], max_new_tokens: int,
             temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
             generator: torch.Generator | None = None,
             use_cache: bool = True) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield `max_new_tokens` times the next ids (B,), and the logits (B, n_vocab) they were drawn from.

    `prompts` is (B, T), or a list of B prompts (T_b,) of any lengths from 1 on; each is continued as it would
    be alone. temperature 0 is greedy; top_k 0 and top_p 1 keep every id. Learned positions cannot slide: once
    n tokens exceed the context, the model sees those from `context_start(n)` on, and the cache is refilled
    every half context. use_cache=False gives the same ids up to rounding, at a full forward pass per token.
    Raises UserError for an empty prompt, settings out of range, and logits that are not finite.
    """
    if not (temperature >= 0 and top_k >= 0 and 0 < top_p <= 1):  # nan fails too
        raise UserError(f"temperature={temperature}, top_k={top_k}, top_p={top_p}: wanted temperature >= 0, "
                        f"top_k >= 0 and 0 < top_p <= 1")
    prompts = list(prompts)
    if not prompts or min(map(len, prompts)) == 0:
        raise UserError(f"prompts of {[len(prompt) for prompt in prompts]} tokens: each needs at least 1 "
                        f"token, such as end-of-text, with which documents begin")
    B, T, device = len(prompts), max(map(len, prompts)), prompts[0].device
    pad = [T - len(prompt) for prompt in prompts]  # columns on the left that a row never sees
    idx = torch.stack([F.pad(prompt, (n, 0)) for prompt, n in zip(prompts, pad)])  # (B, T)
    block_size = model.config.block_size
    cache = None
    if use_cache:
        capacity = min(block_size, T + max_new_tokens)
        cache = KVCache(model.config, B, device, product_dtype(model.lm_head.weight), capacity)

    was_training, starts = model.training, None
    model.eval()
    try:
        for n in range(T, T + max_new_tokens):
            previous = starts
            starts = [p + context_start(n - p, block_size) for p in pad]  # the first column each row sees
            begin = min(starts)
            if cache is not None and starts != previous:
                cache.length = 0
            held = cache.length if cache is not None else 0

            rows = {}
            if max(starts) > begin:  # rows begin at different columns
                first = torch.tensor(starts, device=device) - begin  # (B,)
                query = torch.arange(held, n - begin, device=device)  # (T,)
                rows = {"position": (query - first[:, None]).clamp(min=0),
                        "mask": row_mask(first, query, n - begin)}
            logits = model(idx[:, begin + held:], cache=cache, only_last=True, **rows)  # (B, 1, n_vocab)
            logits = logits[:, -1].float()
            if not logits.isfinite().all():
                raise UserError("the model's logits are not finite; try --dtype=float32, or a checkpoint of "
                                "an earlier step")
            ids = sample_token(logits, temperature, top_k, top_p, generator)  # (B,)
            idx = torch.cat((idx, ids[:, None]), dim=1)  # (B, n + 1)
            yield ids, logits
    finally:
        model.train(was_training)


@torch.compiler.set_stance("force_eager")
def sample_texts(model: GPT, tok: Tokenizer, dev: Device, prompt: str, num_samples: int, max_new_tokens: int,
                 seed: int) -> list[str]:
    """`num_samples` continuations of a prompt, each until its end-of-text: what a training run prints."""
    idx = dev.to_device(np.concatenate(([tok.eot], tok.encode(prompt))).astype(np.int64))  # (T,)
    with dev.changing_shapes(), dev.autocast():
        steps = generate(model, idx.repeat(num_samples, 1), max_new_tokens, temperature=0.9, top_k=50,
                         generator=torch.Generator(dev.device).manual_seed(seed))
        rows = torch.stack([ids for ids, _ in steps], dim=1).tolist()  # (num_samples, max_new_tokens)
    return [prompt + tok.decode(row[:row.index(tok.eot)] if tok.eot in row else row) for row in rows]


def context_start(n: int, block_size: int) -> int:
    """Where the context of token n begins: at 0 while n tokens fit, then in strides of half a block."""
    stride = max(1, block_size // 2)
    return max(0, math.ceil((n - block_size) / stride)) * stride


def row_mask(first: torch.Tensor, query: torch.Tensor, S: int) -> torch.Tensor:
    """Mask (B, 1, T, S) for rows that begin at columns `first` (B,), of the columns `query` (T,) over S.

    A query sees the keys from its row's first to its own. One to the left of the first sees itself: a softmax
    over nothing would be nan.
    """
    key = torch.arange(S, device=query.device)
    own = key == query[:, None]  # (T, S)
    seen = (key <= query[:, None]) & (key >= first[:, None, None])  # (B, T, S)
    return (seen | own)[:, None]


# ---- sampling ------------------------------------------------------------------


def sample_token(logits: torch.Tensor, temperature: float, top_k: int, top_p: float,
                 generator: torch.Generator | None) -> torch.Tensor:
    """Draw ids (B,) from logits (B, V), among the top_k most likely (0 = all) and the smallest set that
    reaches the probability top_p (Holtzman et al. 2019, "The Curious Case of Neural Text Degeneration");
    temperature 0 takes the most likely."""
    if temperature == 0.0:
        return logits.argmax(dim=-1)

    ids = None
    if 0 < top_k < logits.size(-1) or top_p < 1.0:
        logits, ids = logits.topk(min(top_k or logits.size(-1), logits.size(-1)), dim=-1)  # (B, k), sorted
    logits = logits - logits.amax(dim=-1, keepdim=True)  # at most 0: no overflow
    precise = torch.float32 if logits.device.type == "mps" else torch.float64  # MPS has no float64
    # below a temperature of 1e-6 only the most likely id is left, and smaller divisors may round to 0
    probs = F.softmax(logits / max(temperature, 1e-6), dim=-1, dtype=precise)  # (B, k)
    if top_p < 1.0:  # drop an id if the more likely ones already reach top_p
        probs = probs.masked_fill(cumulative_sum(probs) - probs >= top_p, 0.0)
    if ids is not None:  # order by id: ordered by probability, a rounding error would swap near-ties
        ids, order = ids.sort(dim=-1)
        probs = probs.gather(1, order)

    # invert the cumulative distribution: one random number per row, where torch.multinomial draws one per id
    cumulative = cumulative_sum(probs)
    u = torch.rand(len(probs), 1, dtype=precise, device=probs.device, generator=generator)  # below 1
    choice = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)  # (B, 1)
    choice = choice.clamp(max=probs.size(-1) - 1)  # the product may round up to the sum
    return (choice if ids is None else ids.gather(1, choice))[:, 0]


def cumulative_sum(probs):
    """probs.cumsum(dim=-1), on the CPU where CUDA would need a deterministic kernel, which it lacks."""
    if probs.device.type == "cuda" and torch.are_deterministic_algorithms_enabled():
        return probs.cpu().cumsum(dim=-1).to(probs.device)
    return probs.cumsum(dim=-1)
