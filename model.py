"""
GPT-2: its configuration, the model and its loss, optimizer groups, and counts of parameters and FLOPs.

    model = GPT(GPTConfig(n_layer=12, n_head=12, n_embd=768))     # 124M
    loss = model(idx, targets)                                    # mean cross-entropy, nats per token
    logits = model(idx)                                           # (B, T, n_vocab)

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3. Layers are named as
in OpenAI's release, so that its weights load by name (its matrices are stored transposed).

To change the model, edit this file; docs/change_the_model.md has examples. Training, checkpoints and
generation use the names transformer.wte, transformer.h, attn.attention and lm_head, fsdp also ln_1 and ln_2.

Shapes: B batch, T tokens, C n_embd, nh n_head, hs head size C/nh, S tokens attended to (cached + T), V
vocab_size.
"""

import math
import warnings
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from configurator import UserError
from kernels import Linear, Muon, attention, gelu, linear_cross_entropy


@dataclass(kw_only=True)
class GPTConfig:
    """All that determines the model's shape. Raises UserError where the numbers do not fit together."""

    block_size: int = 1024  # T, the longest context: rows of wpe
    vocab_size: int = 50304  # rows of wte: n_vocab rounded up to a multiple of 128, which tensor cores like
    n_vocab: int = 50257  # ids in use; rows beyond are padding and are never predicted
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
        """hs, the same in all layers: pruning removes entire heads."""
        return self.n_embd // self.n_head

    def heads_of(self, layer: int) -> int:
        """nh of a layer."""
        return self.n_head if self.heads is None else self.heads[layer]


class CausalSelfAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.dropout = layer, config.dropout
        self.n_head, self.head_size = config.heads_of(layer), config.head_size
        self.attention = attention
        width = self.n_head * self.head_size  # C, unless heads are pruned
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # all heads pruned
            self.c_attn = Linear(config.n_embd, 3 * width)  # rows QQQ KKK VVV, heads in order in each
            self.c_proj = Linear(width, config.n_embd)

    def forward(self, x, cache=None, mask=None):
        B, T, _ = x.shape
        y = self.c_attn(x)  # (B, T, 3 * nh * hs)
        if self.n_head > 0:  # else y is empty, and c_proj adds its bias
            q, k, v = y.chunk(3, dim=2)  # (B, T, nh * hs) each
            q = q.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, nh, T, hs)
            k = k.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, nh, T, hs)
            v = v.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, nh, T, hs)
            if cache is not None:
                k, v = cache.append(self.layer, k, v)  # (B, nh, S, hs)
            y = self.attention(q, k, v, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0,
                               is_causal=mask is None and T == k.size(2))  # (B, nh, T, hs)
            y = y.transpose(1, 2).reshape(B, T, -1)  # (B, T, nh * hs)
        return F.dropout(self.c_proj(y), self.dropout, self.training)  # (B, T, C)


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
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, mask=None):
        if self.pre_norm:
            x = x + self.attn(self.ln_1(x), cache, mask)
            return x + self.mlp(self.ln_2(x))
        x = self.ln_1(x + self.attn(x, cache, mask))
        return self.ln_2(x + self.mlp(x))


class GPT(nn.Module):
    """GPT-2. Its initial weights come from torch's global generator: seed it first.

    activation_checkpointing = True keeps only each block's input for the backward, which computes the block
    again: up to a third more compute for a fraction of the memory (Chen et al. 2016, "Training Deep Nets with
    Sublinear Memory Cost").
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.loss_chunk = 0  # rows of logits (B*T of them) that the loss holds at a time; 0 = all
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "wpe": nn.Embedding(config.block_size, config.n_embd),
            "h": nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
            # a post-LN block ends with a norm
            "ln_f": nn.LayerNorm(config.n_embd) if config.norm_position == "pre" else nn.Identity(),
        })
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # Press & Wolf 2017, "Using the Output Embedding"
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # 2 n_layer projections add to the residual stream; the scale keeps its variance (section 2.3)
                scale = (2 * config.n_layer) ** -0.5 if name.endswith("c_proj.weight") else 1.0
                nn.init.normal_(parameter, std=0.02 * scale)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, idx, targets=None, cache=None, reduction="mean", position=None, mask=None,
                only_last=False):
        """Logits (B, T, n_vocab) of ids `idx` (B, T), or with `targets` (B, T) the cross-entropy in nats.

        `reduction` is mean (a scalar), sum (a scalar) or none (B, T); targets of -100 count nothing. With a
        KVCache, idx continues the tokens in it. `position` (B, T) are rows of wpe, by default the columns;
        `mask` (B, 1, T, S) bool is True where a query sees a key, by default where the key is not later.
        `only_last` gives the logits of the last column, (B, 1, n_vocab).
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
                x = checkpoint(block, x, cache, mask, use_reentrant=False)  # with the same dropout masks
            else:
                x = block(x, cache, mask)
        x = self.transformer.ln_f(x)
        if cache is not None:
            cache.length += T

        if targets is None:
            x = x[:, -1:] if only_last else x
            return self.lm_head(x)[..., : self.config.n_vocab]  # padding ids are never sampled
        n_vocab = None if self.training else self.config.n_vocab  # evaluated without padding, as if exported
        loss = linear_cross_entropy(x.view(B * T, -1), self.lm_head.weight, targets.reshape(-1),
                                    self.loss_chunk, reduction, n_vocab)
        return loss.view(B, T) if reduction == "none" else loss

    def use_attention(self, attention) -> None:
        """Attend with a function that has the signature of F.scaled_dot_product_attention."""
        for block in self.transformer.h:
            block.attn.attention = attention

    def shard(self, mesh: DeviceMesh, dtype: torch.dtype, compile: bool) -> None:
        """Keep on each process of `mesh` a part of every tensor; a block is gathered when it is needed.

        Matrices are gathered in `dtype`, as autocast would round them; norms, the residual stream and the
        sums of gradients stay float32. `compile` compiles each block.
        """
        precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32,
                                         cast_forward_inputs=False)
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")  # not written to
        for block in self.transformer.h:
            if compile:
                block.compile(dynamic=False)
            fully_shard([block.ln_1, block.ln_2], mesh=mesh)
            fully_shard(block, mesh=mesh, mp_policy=precision)
        fully_shard(self, mesh=mesh)

    def configure_optimizers(self, optimizer: str, weight_decay: float, lr: float, betas: tuple[float, float],
                             fused: bool = True) -> list[torch.optim.Optimizer]:
        """[AdamW], or for muon [AdamW, Muon], where Muon has the matrices of the blocks.

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
            optimizers.append(Muon(hidden, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
        return optimizers

    def grad_norms(self) -> dict[str, float]:
        """{"norm_h0": L2 norm, ...} of the gradients of each block and of each module outside the blocks.

        Their squares add up to that of all. If the model is sharded, all processes call this together.
        """
        grads = {}
        for name, parameter in self.named_parameters():
            if parameter.grad is not None:
                layer = name.removeprefix("transformer.").replace("h.", "h", 1).partition(".")[0]
                grads.setdefault(f"norm_{layer}", []).append(parameter.grad)
        norms = {layer: torch.nn.utils.get_total_norm(some) for layer, some in grads.items()}
        return {layer: (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
                for layer, norm in norms.items()}

    def weight_bits(self) -> int:
        """Sum of the bits of all weights: one flipped bit changes it."""
        return sum(p.detach().view(torch.int32).sum(dtype=torch.int64) for p in self.parameters()).item()

    def num_params(self) -> int:
        """Parameters, the tied matrix counted once: 124,439,808 for GPT-2 small at vocab_size 50,257."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T: int) -> int:
        """FLOPs of forward and backward per token at context T: 6 N + 12 n_layer n_embd T (less if pruned).

        N counts every parameter but the tables that are looked up, never multiplied: wpe, and wte where
        lm_head is a matrix of its own. The attention term takes no credit for causal masking (Chowdhery et
        al. 2022, "PaLM", appendix B).
        """
        tables = [module.weight for module in self.modules() if isinstance(module, nn.Embedding)]
        N = self.num_params() - sum(table.numel() for table in tables if table is not self.lm_head.weight)
        heads = sum(self.config.heads_of(layer) for layer in range(self.config.n_layer))
        return 6 * N + 12 * heads * self.config.head_size * T
