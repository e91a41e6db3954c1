"""
What makes a step fast: attention, GELU, Linear layers and Muon for CPUs, and a cross-entropy that never holds
all logits; and attention written out, for devices on which torch's is wrong. Each computes what its torch
counterpart computes, up to rounding.

Shapes: B batch, T queries, S keys, nh heads, hs head size, N rows (tokens), C width, V rows of wte.
"""

import contextlib
import functools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

# ---- attention -----------------------------------------------------------------


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
    """F.scaled_dot_product_attention, or attention_on_cpu where that is faster."""
    T, device = q.size(2), q.device.type
    if is_causal and device == "cpu" and T <= 512 and torch.compiler.is_compiling():
        return attention_on_cpu(q, k, v, dropout_p)  # (B, nh, T, hs)
    if device == "mps":  # SDPA is wrong there for strided inputs (pytorch #181133)
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p,
                                          is_causal=is_causal)  # (B, nh, T, hs)


def attention_on_cpu(q, k, v, dropout_p):
    """Causal attention that materialises the scores, 128 queries at a time: compiled, it takes a third of the
    time of torch's flash attention for CPUs, whose small matrix products make poor use of vector units."""
    T, scale = q.size(2), q.size(3) ** -0.5
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)  # (T, T)
    parts = []
    for i in range(0, T, 128):
        S = min(i + 128, T)  # these queries see no later key
        scores = (q[:, :, i:S] @ k[:, :, :S].mT).float() * scale  # (B, nh, S - i, S)
        scores = scores.masked_fill(future[i:S, :S], -math.inf)
        weights = F.dropout(scores.softmax(dim=-1).to(v.dtype), dropout_p)
        parts.append(weights @ v[:, :, :S])  # (B, nh, S - i, hs)
    return torch.cat(parts, dim=2)  # (B, nh, T, hs)


def plain_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
    """F.scaled_dot_product_attention written out in float32, for devices on which torch's is wrong.

    q (B, nh, T, hs), k and v (B, nh, S, hs), attn_mask (T, S) or (B, 1, T, S) bool, True where a query sees a
    key. Slower, and it materialises the scores (B, nh, T, S).
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


# ---- GELU and Linear -----------------------------------------------------------


def gelu(x):
    """x/2 (1 + tanh u), u = sqrt(2/pi) (x + 0.044715 x^3): the form that OpenAI trained with."""
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    x32 = x.float()  # 1 + tanh(u) = 2 sigmoid(2u), and tanh takes three times as long on a CPU
    u = math.sqrt(2 / math.pi) * (x32 + 0.044715 * x32 * x32 * x32)
    return (x32 * torch.sigmoid(2 * u)).to(x.dtype)


class Linear(nn.Linear):
    """nn.Linear that computes weight @ x.T for the few rows of a decoding step in float32 on a CPU.

    MKL uses one thread for x @ weight.T with up to about 16 rows. With the operands swapped, or for a single
    row with the weight split into two halves, it uses all threads and reads the weights up to four times as
    fast (docs/log.md).
    """

    def forward(self, x):
        C, N = x.size(-1), math.prod(x.shape[:-1])
        if (N > 16 or x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_grad_enabled()
                or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()):
            return super().forward(x)

        V, columns = len(self.weight), x.reshape(N, C).T  # (C, N)
        if N == 1:
            half = (V + 1) // 2  # the halves share the middle row where V is odd
            halves = self.weight.as_strided((2, half, C), ((V - half) * C, C, 1))
            upper, lower = torch.bmm(halves, columns.expand(2, C, 1))  # (half, 1) each
            y = torch.cat((upper, lower[2 * half - V:]))  # (V, 1)
        else:
            y = self.weight @ columns  # (V, N)
        y = y.T.contiguous().view(*x.shape[:-1], V)
        return y if self.bias is None else y + self.bias


# ---- Muon ----------------------------------------------------------------------


def cpu_has_bfloat16() -> bool:
    """Whether this x86 processor multiplies bfloat16 matrices; others emulate it, far slower than float32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class KeepFloat32(TorchFunctionMode):
    """Within it, tensor.bfloat16() is a copy in the tensor's own dtype."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return args[0].clone() if func is torch.Tensor.bfloat16 else func(*args, **(kwargs or {}))


class Muon(torch.optim.Muon):
    """torch's Muon, which multiplies in bfloat16; on a processor without it, in float32."""

    @torch.no_grad()
    def step(self, closure=None):
        slow = self.param_groups[0]["params"][0].device.type == "cpu" and not cpu_has_bfloat16()
        with KeepFloat32() if slow else contextlib.nullcontext():
            return super().step(closure)


# ---- cross-entropy in chunks ---------------------------------------------------


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of a matrix product with x, under autocast or not."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def linear_cross_entropy(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int,
                         reduction: str = "mean", n_vocab: int | None = None) -> torch.Tensor:
    """F.cross_entropy(F.linear(x, weight), targets), with at most `chunk` rows of logits in memory at a time.

    x (N, C), weight (V, C), targets (N,); chunk 0 is all rows at once. `reduction` is mean or sum (a scalar)
    or none (N,), in nats; with none, gradients need all logits. Rows whose target is -100 count nothing. Only
    the first n_vocab logits take part: the product is of all V rows, because tensor cores want a multiple of
    128. Can be differentiated once.
    """
    if reduction == "none":  # evaluation: skip the rows without a target
        kept = (targets != -100).nonzero()[:, 0]
        weight = weight.to(product_dtype(weight))  # once; autocast would cast it again for every chunk
        rows = chunk or 2048  # never all logits at once, however large the batch
        parts = zip(x[kept].split(rows), targets[kept].split(rows))
        losses = torch.zeros(len(targets), dtype=torch.float32, device=x.device)
        losses[kept] = torch.cat([row_losses(x_c, weight, targets_c, n_vocab).float()
                                  for x_c, targets_c in parts])
        return losses

    if chunk == 0:
        return F.cross_entropy(F.linear(x, weight)[:, :n_vocab], targets, reduction=reduction)

    dtype = product_dtype(x)
    if torch.is_grad_enabled() and dtype != torch.float16 and n_vocab is None:
        total = ChunkedCrossEntropy.apply(x.to(dtype), weight, targets, chunk, torch.compiler.is_compiling())
    else:
        of_rows = row_losses
        if torch.is_grad_enabled():  # only the backward knows float16's loss scale: it repeats the logits
            of_rows = functools.partial(checkpoint, row_losses, use_reentrant=False, preserve_rng_state=False)
        total = torch.cat([of_rows(x_c, weight, targets_c, n_vocab)
                           for x_c, targets_c in zip(x.split(chunk), targets.split(chunk))]).sum()
    return total / (targets != -100).sum() if reduction == "mean" else total


def row_losses(x, weight, targets, n_vocab):
    return F.cross_entropy(F.linear(x, weight)[:, :n_vocab], targets, reduction="none")


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropy over rows, in float32. The forward computes the gradient too, up to a factor,
    so that no logits are kept and none are computed twice."""

    @staticmethod
    def forward(ctx, x, weight, targets, chunk, fused):
        loss, dx, dweight = cross_entropy_and_gradients(x, weight, targets, chunk, fused)
        ctx.save_for_backward(dx, dweight)
        return loss

    @staticmethod
    def backward(ctx, grad):
        dx, dweight = ctx.saved_tensors
        return dx * grad, dweight * grad, None, None, None


# opaque to torch.compile, which would unroll the loop and decide for itself what to keep
@torch.library.custom_op("gpt2::cross_entropy_and_gradients", mutates_args=())
def cross_entropy_and_gradients(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int,
                                fused: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sum of the losses, its gradient for x, its gradient for weight), with products in the dtype of x.

    The n x V exponentials go into the products unnormalised; the division by their sums is applied to the
    narrow matrices, x and dx. `fused` compiles the passes over the logits.
    """
    exp_rows, add = compiled_passes() if fused else (exponentials, add_in_place)
    w = weight.to(x.dtype)  # (V, C)
    w_columns = w.T.contiguous()  # (C, V); oneDNN multiplies by its transpose 10% faster than by w
    loss = torch.zeros((), dtype=torch.float32, device=x.device)
    dx, dweight = torch.empty_like(x), torch.zeros_like(weight)

    # without this guard autograd's state differs in the first call, and the passes are compiled twice
    with torch._C._AutoDispatchBelowADInplaceOrView():
        for x_c, targets_c, dx_c in zip(x.split(chunk), targets.split(chunk), dx.split(chunk)):
            kept = (targets_c != -100)[:, None]  # (n, 1)
            at_target = torch.arange(len(x_c), device=x.device), targets_c.clamp_min(0)
            logits = x_c @ w.T  # (n, V)
            target_logit = logits[at_target].float()[:, None]  # (n, 1)
            e, total, top = exp_rows(logits)  # (n, V), (n, 1), (n, 1)
            loss += ((total.log() + top - target_logit) * kept).sum()

            # (softmax - 1) * total at the target, subtracted in float32, as the softmax may be close to 1
            e[at_target] = ((target_logit - top).exp() - total)[:, 0].to(e.dtype)
            scale = kept / total  # (n, 1)
            dx_c.copy_((e @ w_columns.T) * scale)
            add(dweight, e.T @ (x_c * scale).to(x.dtype))  # (V, C)
            del logits, e  # before the next chunk's are allocated
    return loss, dx, dweight


@cross_entropy_and_gradients.register_fake
def _(x, weight, targets, chunk, fused):
    return x.new_empty((), dtype=torch.float32), torch.empty_like(x), torch.empty_like(weight)


def exponentials(logits):
    """exp(logits - top) (n, V), and in float32 the sum and `top`, the highest logit, of each row (n, 1)."""
    top = logits.amax(dim=1, keepdim=True).float()
    e = ((logits.float() - top) * math.log2(math.e)).exp2()  # exp takes 1.5 times as long in inductor's C++
    return e.to(logits.dtype), e.sum(dim=1, keepdim=True), top


def add_in_place(total, part):
    total += part.float()


@functools.cache
def compiled_passes():
    return torch.compile(exponentials, dynamic=False), torch.compile(add_in_place, dynamic=False)
