"""
GPT-2: the model, its loss, its KV cache, its optimizer groups, and counts of its parameters and FLOPs.

    model = GPT(GPTConfig(n_layer=12, n_head=12, n_embd=768))     # 124M
    loss = model(idx, targets)                                    # mean cross-entropy, nats per token
    logits = model(idx)                                           # (B, T, n_vocab)
    for token, logits in model.generate(idx, max_new_tokens=100): ...  # (B,) at a time, with the KV cache

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3; layers and names as
in OpenAI's release, so that its weights load by name (its matrices are stored transposed). Prints nothing,
knows no ranks.

Shapes: B batch, T tokens, C n_embd, nh n_head, hs head size C/nh, S tokens attended to (cached + T), V
vocab_size.
"""

import functools
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from configurator import UserError


@dataclass
class GPTConfig:
    """Everything that fixes the model's shape. Raises UserError where the numbers do not fit together."""

    block_size: int = 1024  # T, the longest context: rows of wpe
    vocab_size: int = 50304  # rows of wte: n_vocab rounded up to a multiple of 128, which tensor cores like
    n_vocab: int = 50257  # ids that mean something; rows beyond are padding and are never predicted
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    norm_position: str = "pre"  # pre: x + f(norm(x)), GPT-2; post: norm(x + f(x)), Vaswani et al. 2017
    heads: tuple[int, ...] | None = None  # heads of each layer, where some are pruned; None = n_head in all

    def __post_init__(self):
        for key in ("block_size", "vocab_size", "n_vocab", "n_layer", "n_head", "n_embd"):
            if getattr(self, key) < 1:
                raise UserError(f"{key}={getattr(self, key)}: wanted at least 1")
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}; "
                            f"try --n_embd={math.ceil(self.n_embd / self.n_head) * self.n_head}")
        if self.vocab_size < self.n_vocab:
            raise UserError(f"vocab_size={self.vocab_size} is less than the tokenizer's {self.n_vocab} ids; "
                            f"try --vocab_size={math.ceil(self.n_vocab / 128) * 128}")
        if self.norm_position not in ("pre", "post"):
            raise UserError(f"norm_position={self.norm_position!r}: wanted pre or post")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"dropout={self.dropout}: wanted 0 <= dropout < 1")
        if self.heads is not None:
            self.heads = tuple(self.heads)
            if len(self.heads) != self.n_layer or not all(0 <= n <= self.n_head for n in self.heads):
                raise UserError(f"heads={self.heads}: wanted {self.n_layer} numbers of 0 to {self.n_head}, "
                                f"one for each layer")

    @property
    def head_size(self) -> int:
        """hs, the same in all layers: pruning removes whole heads."""
        return self.n_embd // self.n_head

    def heads_of(self, layer: int) -> int:
        """nh of a layer."""
        return self.n_head if self.heads is None else self.heads[layer]


class KVCache:
    """Keys and values of the tokens a model has already seen, so that each new token costs one token of
    compute. Room for `capacity` tokens, by default block_size."""

    def __init__(self, config: GPTConfig, batch_size: int, device, dtype, capacity: int = 0):
        shapes = [(batch_size, config.heads_of(layer), capacity or config.block_size, config.head_size)
                  for layer in range(config.n_layer)]
        self.k = [torch.empty(shape, device=device, dtype=dtype) for shape in shapes]
        self.v = [torch.empty(shape, device=device, dtype=dtype) for shape in shapes]
        self.length = 0  # tokens held; GPT.forward advances it once all layers have appended

    def append(self, layer, k, v):
        """Store k, v (B, nh, T, hs) of the new tokens; return those of all tokens so far, (B, nh, S, hs)."""
        S = self.length + k.size(2)
        self.k[layer][:, :, self.length : S] = k
        self.v[layer][:, :, self.length : S] = v
        return self.k[layer][:, :, :S], self.v[layer][:, :, :S]

    def advance(self, T):
        self.length += T

    def clear(self):
        self.length = 0


class StaticKVCache(KVCache):
    """A KVCache whose shapes never change, for a compiled step: it hands out all of its S = block_size slots.

    The caller gives `GPT.forward` the positions, and a mask that hides the slots that are not filled.
    """

    def __init__(self, config: GPTConfig, batch_size: int, device, dtype):
        super().__init__(config, batch_size, device, dtype)
        # tokens held, where the graph can see it, in place of `length`
        self.end = torch.zeros(1, dtype=torch.long, device=device)
        for tensor in (*self.k, *self.v, self.end):
            tensor.zero_()  # what is masked is multiplied by 0, which does not make a number of nan
            torch._dynamo.mark_static_address(tensor)  # or CUDA graphs would copy the cache at every step

    def append(self, layer, k, v):
        slots = self.end + torch.arange(k.size(2), device=k.device)  # (T,)
        self.k[layer].index_copy_(2, slots, k)
        self.v[layer].index_copy_(2, slots, v)
        return self.k[layer], self.v[layer]

    def advance(self, T):
        self.end += T

    def clear(self):
        self.end.zero_()


class Linear(nn.Linear):
    """nn.Linear, but the few rows of a decoding step, in float32 on a CPU, as weight @ x.T.

    MKL multiplies up to about 16 rows by a large matrix with one thread; the other way round, and one row
    by two halves of the matrix, it uses all, and reads the weights up to four times as fast (RESULTS.md).
    """

    def forward(self, x):
        C, N = x.size(-1), x.numel() // max(1, x.size(-1))
        if (N > 16 or x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_grad_enabled()
                or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()):
            return super().forward(x)
        V, columns = len(self.weight), x.reshape(N, C).T  # (C, N)
        if N == 1:
            half = (V + 1) // 2  # where V is odd, both have the row in the middle
            halves = self.weight.as_strided((2, half, C), ((V - half) * C, C, 1))
            upper, lower = torch.bmm(halves, columns.expand(2, C, 1))  # (half, 1) each
            y = torch.cat((upper, lower[2 * half - V:]))  # (V, 1)
        else:
            y = self.weight @ columns  # (V, N)
        y = y.T.contiguous().view(*x.shape[:-1], V)
        return y if self.bias is None else y + self.bias


def plain_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
    """F.scaled_dot_product_attention written out in float32, for devices on which that one is wrong.

    q (B, nh, T, hs), k and v (B, nh, S, hs), attn_mask (T, S) or (B, 1, T, S) bool, True where a query sees a
    key. Slower, and it holds the scores (B, nh, T, S), which SDPA never does.
    """
    T, S = q.size(2), k.size(2)
    with torch.autocast(q.device.type, enabled=False):  # which would multiply in 16 bits again
        scores = q.float() @ k.float().mT * q.size(3) ** -0.5  # (B, nh, T, S)
        if is_causal:
            attn_mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril()
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        weights = F.dropout(F.softmax(scores, dim=-1), dropout_p)
        return (weights @ v.float()).to(q.dtype)  # (B, nh, T, hs)


class CausalSelfAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.dropout = layer, config.dropout
        self.n_head, self.head_size = config.heads_of(layer), config.head_size
        self.attention = F.scaled_dot_product_attention  # or plain_attention
        width = self.n_head * self.head_size  # C, unless heads are pruned
        with warnings.catch_warnings():  # of a layer whose heads are all pruned
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")
            self.c_attn = Linear(config.n_embd, 3 * width)  # rows QQQ KKK VVV, heads in order in each
            self.c_proj = Linear(width, config.n_embd)

    def forward(self, x, cache=None, mask=None):
        B, T, _ = x.shape
        if self.n_head == 0:  # all pruned; what is left is a bias, and DDP waits for the gradients of all
            nothing = F.linear(x, self.c_attn.weight, self.c_attn.bias)  # (B, T, 0)
            y = F.linear(nothing, self.c_proj.weight, self.c_proj.bias)  # (B, T, C)
            return F.dropout(y, self.dropout, self.training)
        q, k, v = self.c_attn(x).chunk(3, dim=2)  # (B, T, nh * hs) each
        q = q.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, nh, T, hs)
        v = v.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, nh, T, hs)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, nh, S, hs)
        if x.device.type == "mps":  # which gets strided inputs wrong (pytorch #181133)
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        S = k.size(2)
        causal = mask is None and T == S
        dropout = self.dropout if self.training else 0.0
        compiled_on_cpu = x.device.type == "cpu" and torch.compiler.is_compiling()
        if compiled_on_cpu and causal and T <= 512 and self.attention is not plain_attention:
            y = attention_on_cpu(q, k, v, dropout)  # (B, nh, T, hs); T x T is not much
        else:
            y = self.attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, -1)
        return F.dropout(self.c_proj(y), self.dropout, self.training)


def attention_on_cpu(q, k, v, dropout):
    """Causal attention (B, nh, T, hs) with the scores in memory, 128 queries at a time: compiled, a third of
    the time of torch's flash attention for CPUs, whose many small products use their vectors poorly."""
    T, scale = q.size(2), q.size(3) ** -0.5
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)  # (T, T)
    parts = []
    for i in range(0, T, 128):
        S = min(i + 128, T)  # no query of this part sees more
        scores = (q[:, :, i:S] @ k[:, :, :S].mT).float() * scale  # (B, nh, S - i, S)
        scores = scores.masked_fill(future[i:S, :S], -math.inf)
        weights = F.dropout(scores.softmax(dim=-1).to(v.dtype), dropout)
        parts.append(weights @ v[:, :, :S])  # (B, nh, S - i, hs)
    return torch.cat(parts, dim=2)


def gelu(x):
    """x/2 (1 + tanh u), u = sqrt(2/pi) (x + 0.044715 x^3): the form that OpenAI trained with."""
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    x32 = x.float()  # 1 + tanh(u) = 2 sigmoid(2u), and a CPU's tanh takes three times as long
    u = math.sqrt(2 / math.pi) * (x32 + 0.044715 * x32 * x32 * x32)
    return (x32 * torch.sigmoid(2 * u)).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm whose weights may have fewer bits than its input: fsdp gathers a block in one dtype."""

    def forward(self, x):
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        x = gelu(self.c_fc(x))  # (B, T, 4C)
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.pre_norm = config.norm_position == "pre"
        self.ln_1 = LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, mask=None):
        if self.pre_norm:
            x = x + self.attn(self.ln_1(x), cache, mask)
            return x + self.mlp(self.ln_2(x))
        x = self.ln_1(x + self.attn(x, cache, mask))
        return self.ln_2(x + self.mlp(x))


class GPT(nn.Module):
    """GPT-2. Weights are drawn from torch's global generator: seed it first.

    activation_checkpointing = True keeps only each block's input for the backward, which computes the block
    again: a third more work, a fraction of the memory (Chen et al. 2016, "Training Deep Nets with Sublinear
    Memory Cost").
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.loss_chunk = 0  # rows of logits (B*T of them) that the loss holds at a time; 0 = all
        self._step = None
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "wpe": nn.Embedding(config.block_size, config.n_embd),
            "h": nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
            # Post-LN normalises after every addition, so a final norm would be a second one
            "ln_f": nn.LayerNorm(config.n_embd) if config.norm_position == "pre" else nn.Identity(),
        })
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        # tied: Press & Wolf 2017, "Using the Output Embedding"
        self.lm_head.weight = self.transformer.wte.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # each block adds twice to the residual stream; 1/sqrt(2 n_layer) keeps its variance (GPT-2,
                # section 2.3)
                scale = (2 * config.n_layer) ** -0.5 if name.endswith("c_proj.weight") else 1.0
                nn.init.normal_(parameter, std=0.02 * scale)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, idx, targets=None, cache=None, reduction="mean", position=None, mask=None,
                only_last=False):
        """Logits (B, T, n_vocab) of ids `idx` (B, T), or with `targets` (B, T) the cross-entropy in nats.

        `reduction` is mean (a scalar), sum (a scalar) or none (B, T); targets of -100 count nothing. With a
        KVCache, idx continues the tokens in it. Rows need not be plain sequences: `position` (B, T) are their
        rows of wpe, by default the columns, and `mask` (B, 1, T, S) bool is True where a query sees a key, by
        default where the key is not later. `only_last` gives the logits of the last column, (B, 1, n_vocab).
        """
        B, T = idx.shape
        start = cache.length if cache is not None else 0
        if mask is None and start > 0 and T > 1:  # query t sees what is cached and the first t + 1 of idx
            mask = torch.ones(T, start + T, dtype=torch.bool, device=idx.device).tril(start)
        if position is None:
            position = torch.arange(start, start + T, device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(position)  # (B, T, C)
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.transformer.h:
            if self.activation_checkpointing and self.training and torch.is_grad_enabled():
                # it restores the generator: same dropout masks
                x = checkpoint(block, x, cache, mask, use_reentrant=False)
            else:
                x = block(x, cache, mask)
        x = self.transformer.ln_f(x)
        if cache is not None:
            cache.advance(T)
        if targets is None:
            x = x[:, -1:] if only_last else x
            # padding ids do not exist for who samples
            return self.lm_head(x)[..., : self.config.n_vocab]
        # an evaluated model is what it is after an export: without padding ids
        n_vocab = None if self.training else self.config.n_vocab
        loss = linear_cross_entropy(x.view(B * T, -1), self.lm_head.weight, targets.reshape(-1),
                                    self.loss_chunk, reduction, n_vocab)
        return loss.view(B, T) if reduction == "none" else loss

    @torch.no_grad()
    def generate(self, idx: torch.Tensor | list[torch.Tensor], max_new_tokens: int, temperature: float = 1.0,
                 top_k: int = 0, top_p: float = 1.0, generator: torch.Generator | None = None,
                 use_cache: bool = True,
                 compile: bool = False) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield `max_new_tokens` times the next ids (B,) after `idx`, and the logits (B, n_vocab) they were
        drawn from.

        `idx` is (B, T), or a list of B prompts (T_b,) of any lengths from 1 on, each continued as it would be
        alone. temperature 0 is greedy; top_k 0 and top_p 1 keep every id. Learned positions cannot slide, so
        once n tokens do not fit the context, the model sees the last of them from `context_start(n)` on, and
        the cache is filled anew half a context at a time. With and without the cache the ids are the same, up
        to the rounding of matrix products, which in 16 bits is coarse. `compile` compiles the step of one
        token, over a cache of block_size tokens from the start. Raises UserError for an empty prompt,
        settings out of range (`check_sampling`), and logits that are not finite.
        """
        check_sampling(temperature, top_k, top_p)
        prompts = list(idx)
        if not prompts or min(map(len, prompts)) == 0:
            raise UserError(f"prompts of {[len(prompt) for prompt in prompts]} tokens: wanted one or more of "
                            f"at least 1 token, such as end-of-text, with which documents begin")
        B, T, device = len(prompts), max(map(len, prompts)), prompts[0].device
        pad = [T - len(prompt) for prompt in prompts]  # columns on the left, which are never seen
        idx = torch.stack([F.pad(prompt, (n, 0)) for prompt, n in zip(prompts, pad)])  # (B, T)
        block_size, dtype = self.config.block_size, self.lm_head.weight.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        cache = None
        if compile:
            cache, step = StaticKVCache(self.config, B, device, dtype), self._compiled_step(device.type)
        elif use_cache:
            cache = KVCache(self.config, B, device, dtype, min(block_size, T + max_new_tokens))
        was_training, starts, token = self.training, None, None
        self.eval()
        try:
            for n in range(T, T + max_new_tokens):
                wanted = [p + context_start(n - p, block_size) for p in pad]
                if wanted != starts or cache is None:  # columns from which on the rows are seen
                    starts, begin, held = wanted, min(wanted), 0
                    first = torch.tensor(starts, device=device) - begin  # (B,)
                    if cache is not None:
                        cache.clear()
                new = token[:, None] if held else idx[:, begin:]  # the columns that are not in the cache
                rows = {}
                if compile or max(starts) > begin:
                    query = torch.arange(held, n - begin, device=device)  # (T,)
                    S = block_size if compile else n - begin
                    rows = {"position": (query - first[:, None]).clamp(min=0),
                            "mask": row_mask(first, query, S)}
                forward = step if compile and held else self
                logits = forward(new, cache=cache, only_last=True, **rows)[:, -1].float()  # (B, n_vocab)
                if not logits.isfinite().all():
                    raise UserError("the model's logits are not finite; try --dtype=float32, or a checkpoint "
                                    "of an earlier step")
                token = sample_token(logits, temperature, top_k, top_p, generator)  # (B,)
                held = n - begin if cache is not None else 0
                idx = torch.cat((idx, token[:, None]), dim=1)  # (B, n + 1)
                yield token, logits.clone() if compile else logits  # the next step would write over it
        finally:
            self.train(was_training)

    def _compiled_step(self, device_type):
        """`forward`, compiled for one token at a time; on CUDA as a graph that is launched at once."""
        if self._step is None:
            mode = "reduce-overhead" if device_type == "cuda" else None
            self._step = torch.compile(self.forward, dynamic=False, mode=mode)
        return self._step

    def use_attention(self, attention) -> None:
        """Attend with F.scaled_dot_product_attention (the default) or with plain_attention."""
        for block in self.transformer.h:
            block.attn.attention = attention

    def configure_optimizers(self, optimizer: str, weight_decay: float, lr: float, betas: tuple[float, float],
                             fused: bool) -> list[torch.optim.Optimizer]:
        """The optimizers of a run: [AdamW], or [AdamW, Muon] where Muon has the matrices of the blocks.

        Matrices and embeddings decay, biases and norms do not (GPT-3, appendix B). Muon: Jordan et al. 2024,
        "Muon: An optimizer for hidden layers in neural networks"; its updates are scaled to the size of
        AdamW's (Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2), so one lr serves both.
        """
        if optimizer not in ("adamw", "muon"):
            raise UserError(f"optimizer={optimizer!r}: wanted adamw or muon")
        hidden = [p for p in self.transformer.h.parameters() if p.dim() == 2] if optimizer == "muon" else []
        in_hidden = {id(p) for p in hidden}
        rest = [p for p in self.parameters() if id(p) not in in_hidden]  # the tied matrix once
        groups = [
            {"params": [p for p in rest if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
        ]
        optimizers = [torch.optim.AdamW(groups, lr=lr, betas=betas, eps=1e-8, fused=fused)]
        if hidden:
            optimizers.append(torch.optim.Muon(hidden, lr=lr, weight_decay=weight_decay,
                                               adjust_lr_fn="match_rms_adamw"))
        return optimizers

    def num_params(self) -> int:
        """Parameters, the tied matrix counted once: 124,439,808 for GPT-2 small at vocab_size 50,257."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T: int) -> int:
        """FLOPs of forward and backward per token at context T: 6 N + 12 n_layer n_embd T (less if pruned).

        N counts every parameter but the position table, which is looked up, never multiplied. The attention
        term takes no credit for causal masking (Chowdhery et al. 2022, "PaLM", appendix B).
        """
        N = self.num_params() - self.transformer.wpe.weight.numel()
        heads = sum(self.config.heads_of(layer) for layer in range(self.config.n_layer))
        return 6 * N + 12 * heads * self.config.head_size * T


def linear_cross_entropy(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int,
                         reduction: str = "mean", n_vocab: int | None = None) -> torch.Tensor:
    """F.cross_entropy(F.linear(x, weight), targets), with at most `chunk` rows of logits alive at a time.

    x (N, C), weight (V, C), targets (N,); chunk 0 is all rows at once. `reduction` is mean or sum (a scalar)
    or none (N,), in nats; rows whose target is -100 count nothing. Of the logits the first n_vocab count: the
    product itself is of all V, whose multiple of 128 tensor cores need. Can be differentiated once.
    """
    if reduction == "none" and not torch.is_grad_enabled():  # to judge: there, such rows cost nothing either
        kept = (targets != -100).nonzero()[:, 0]
        if torch.is_autocast_enabled(x.device.type):  # once, as autocast itself remembers no part of a matrix
            weight = weight.to(torch.get_autocast_dtype(x.device.type))
        # never all logits at once, however large the batch
        parts = zip(x[kept].split(chunk or 2048), targets[kept].split(chunk or 2048))
        losses = torch.zeros(len(targets), dtype=torch.float32, device=x.device)
        losses[kept] = torch.cat([row_losses(x_c, weight, targets_c, n_vocab).float()
                                  for x_c, targets_c in parts])
        return losses
    if chunk == 0:
        return F.cross_entropy(F.linear(x, weight)[:, :n_vocab], targets, reduction=reduction)
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    if torch.is_grad_enabled() and reduction != "none" and dtype != torch.float16 and n_vocab is None:
        total = ChunkedCrossEntropy.apply(x.to(dtype), weight, targets, chunk, torch.compiler.is_compiling())
    else:
        # nothing to differentiate; or a factor for each row, or one that keeps float16 from underflowing,
        # known in the backward pass only: the logits are computed there again
        losses = torch.cat([checkpoint(row_losses, x_c, weight, targets_c, n_vocab, use_reentrant=False,
                                       preserve_rng_state=False)
                            for x_c, targets_c in zip(x.split(chunk), targets.split(chunk))])  # (N,)
        if reduction == "none":
            return losses
        total = losses.sum()
    return total / (targets != -100).sum() if reduction == "mean" else total


def row_losses(x, weight, targets, n_vocab):
    return F.cross_entropy(F.linear(x, weight)[:, :n_vocab], targets, reduction="none")


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropy over rows, in float32. The gradient is known, up to a factor, as soon as the
    logits are: it is made beside the loss, so that no logits are kept and none are computed twice."""

    @staticmethod
    def forward(ctx, x, weight, targets, chunk, fused):
        loss, dx, dweight = cross_entropy_and_gradients(x, weight, targets, chunk, fused)
        ctx.save_for_backward(dx, dweight)
        return loss

    @staticmethod
    def backward(ctx, grad):
        dx, dweight = ctx.saved_tensors
        return dx * grad, dweight * grad, None, None, None


# one opaque operation to torch.compile, which would unroll the loop and choose for itself what to keep
@torch.library.custom_op("gpt2::cross_entropy_and_gradients", mutates_args=())
def cross_entropy_and_gradients(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int,
                                fused: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sum of the losses, its gradient for x, its gradient for weight), of x in the dtype of the products.

    The softmax is never divided by its sums: the n x V exponentials go into the products as they are, and
    1 / sum multiplies the narrow sides, x and dx. `fused` compiles the pass over the logits.
    """
    exp_rows, add = compiled_passes() if fused else (exponentials, add_in_place)
    w = weight.to(x.dtype)  # (V, C)
    w_columns = w.T.contiguous()  # (C, V), whose transpose oneDNN multiplies from the left 10% faster than w
    loss = torch.zeros((), dtype=torch.float32, device=x.device)
    dx, dweight = torch.empty_like(x), torch.zeros_like(weight)
    # else the passes are compiled twice: autograd's state, which they depend on, differs in the first call
    with torch._C._AutoDispatchBelowADInplaceOrView():
        for x_c, targets_c, dx_c in zip(x.split(chunk), targets.split(chunk), dx.split(chunk)):
            kept = (targets_c != -100)[:, None]  # (n, 1)
            at_target = torch.arange(len(x_c), device=x.device), targets_c.clamp_min(0)
            logits = x_c @ w.T  # (n, V)
            target_logit = logits[at_target].float()[:, None]  # (n, 1)
            e, total, top = exp_rows(logits)  # (n, V), (n, 1), (n, 1)
            loss += ((total.log() + top - target_logit) * kept).sum()
            # softmax - 1 at the target, times the sum, and before rounding: it may be close to 0
            e[at_target] = ((target_logit - top).exp() - total)[:, 0].to(e.dtype)
            scale = kept / total  # (n, 1)
            dx_c.copy_((e @ w_columns.T) * scale)
            add(dweight, e.T @ (x_c * scale).to(x.dtype))  # (V, C)
            del logits, e  # before the next are made
    return loss, dx, dweight


@cross_entropy_and_gradients.register_fake
def _(x, weight, targets, chunk, fused):
    return x.new_empty((), dtype=torch.float32), torch.empty_like(x), torch.empty_like(weight)


def exponentials(logits):
    """exp(logits - top) (n, V), and in float32 its sum and top, the highest logit, of each row (n, 1)."""
    top = logits.amax(dim=1, keepdim=True).float()
    e = ((logits.float() - top) * math.log2(math.e)).exp2()  # inductor's C++ for exp takes 1.5 times as long
    return e.to(logits.dtype), e.sum(dim=1, keepdim=True), top


def add_in_place(total, part):
    total += part.float()


@functools.cache
def compiled_passes():
    return torch.compile(exponentials, dynamic=False), torch.compile(add_in_place, dynamic=False)


def context_start(n: int, block_size: int) -> int:
    """Where the context of token n begins: 0 while n tokens fit, then in strides of half a block (at least
    1)."""
    stride = max(1, block_size // 2)
    return max(0, math.ceil((n - block_size) / stride)) * stride


def row_mask(first: torch.Tensor, query: torch.Tensor, S: int) -> torch.Tensor:
    """Mask (B, 1, T, S) for rows that begin at columns `first` (B,), of the columns `query` (T,) over S.

    A query sees the keys from its row's first to its own; one before the first sees itself: a row of the mask
    with nothing in it would give nan.
    """
    key = torch.arange(S, device=query.device)
    own = key == query[:, None]  # (T, S)
    seen = (key <= query[:, None]) & (key >= first[:, None, None])  # (B, T, S)
    return (seen | own)[:, None]


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    """Raises UserError where one of the three is out of its range."""
    for name, value, right, wanted in (
            ("temperature", temperature, temperature >= 0, "0 (greedy) or more"),
            ("top_k", top_k, top_k >= 0, "0 (all) or more"),
            ("top_p", top_p, 0 < top_p <= 1, "more than 0, and 1 (all) at most")):
        if not right:
            raise UserError(f"{name}={value}: wanted {wanted}")


def sample_token(logits: torch.Tensor, temperature: float, top_k: int, top_p: float,
                 generator: torch.Generator | None) -> torch.Tensor:
    """Draw ids (B,) from logits (B, V): of the top_k likeliest (0: of all), those that together reach top_p
    (Holtzman et al. 2019, "The Curious Case of Neural Text Degeneration"); temperature 0: the likeliest."""
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    ids = None
    if 0 < top_k < logits.size(-1) or top_p < 1.0:
        logits, ids = logits.topk(min(top_k or logits.size(-1), logits.size(-1)), dim=-1)  # (B, k), falling
    logits = logits - logits.amax(dim=-1, keepdim=True)  # at most 0: no overflow
    precise = torch.float32 if logits.device.type == "mps" else torch.float64  # which MPS has not
    # below 1e-6 the likeliest id is the only one, and smaller numbers may round to 0
    probs = F.softmax(logits / max(temperature, 1e-6), dim=-1, dtype=precise)  # (B, k)
    if top_p < 1.0:  # drop an id when the likelier ones before it already reach top_p
        probs = probs.masked_fill(cumulative_sum(probs) - probs >= top_p, 0.0)
    if ids is not None:  # by id: in the order of probability, the last digit of a logit would swap neighbours
        ids, order = ids.sort(dim=-1)
        probs = probs.gather(1, order)
    # by the inverse of the cumulative distribution: one number per row; torch.multinomial draws one per id
    cumulative = cumulative_sum(probs)
    u = torch.rand(len(probs), 1, dtype=precise, device=probs.device, generator=generator)  # below 1
    choice = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)  # (B, 1)
    choice = choice.clamp(max=probs.size(-1) - 1)  # the product may round up to the sum
    return (choice if ids is None else ids.gather(1, choice))[:, 0]


def cumulative_sum(probs):
    """probs.cumsum(dim=-1); on the CPU where a deterministic kernel is wanted, as CUDA has none."""
    if probs.device.type == "cuda" and torch.are_deterministic_algorithms_enabled():
        return probs.cpu().cumsum(dim=-1).to(probs.device)
    return probs.cumsum(dim=-1)
