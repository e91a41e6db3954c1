"""
The whole of GPT-2 training in one short file: read this first. It imports nothing from this repository.

    make python4k
    python tests/plain_gpt2.py python4k

One process, float32, no dropout. It prints the loss, learning rate and gradient norm of every step, and saves
nothing. `python train_gpt2.py config/demo_cpu.py --optimizer=adamw --max_lr=4e-3` trains the same model on
the same tokens, with everything around it that a long run needs; tests/test_plain.py checks that their losses
and weights agree.

Shapes: B windows (sequences) per step, T tokens in each, C n_embd, nh n_head, hs = C/nh, V vocab_size.
"""

import hashlib
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

n_layer, n_head, n_embd = 2, 3, 192
T = 128  # tokens in a window
B = 32  # windows per step
vocab_size = 4096
max_steps, warmup_steps = 320, 20
max_lr, min_lr = 4e-3, 1e-4
beta1, beta2 = 0.9, 0.95
weight_decay = 0.1
grad_clip = 1.0  # largest L2 norm of the gradient
seed = 1337  # of the initial weights and of the order of the windows


# ---- the data: one long row of token ids, cut into windows, which are shuffled anew in every epoch


def read_tokens(folder):
    """The ids of all train shards, end to end, uint16."""
    return np.concatenate([np.load(path) for path in sorted(Path(folder).glob("*_train_*.npy"))])


def scramble(x):
    """A 64-bit hash (MurmurHash3's finalizer): each bit of the result depends on every bit of x."""
    x = (x ^ (x >> 33)) * 0xFF51AFD7ED558CCD % 2**64
    x = (x ^ (x >> 33)) * 0xC4CEB9FE1A85EC53 % 2**64
    return x ^ (x >> 33)


def permute(i, n, epoch):
    """The i-th window of an epoch: a random permutation of range(n) that needs no memory (a Feistel network).

    i is written as two digits. Eight times, one digit is shifted by a hash of the other: each round can be
    undone, so no two numbers collide. Two digits reach a little beyond n; a result of n or more goes through
    again.
    """
    side = math.isqrt(n - 1) + 1  # the base: side * side >= n
    digest = hashlib.sha512(f"{seed} {epoch}".encode()).digest()
    keys = [int.from_bytes(digest[k : k + 8], "little") for k in range(0, 64, 8)]
    while True:
        left, right = divmod(i, side)
        for key in keys:
            left, right = right, (left + scramble(right ^ key)) % side
        i = left * side + right
        if i < n:
            return i


def read_batch(tokens, step):
    """Inputs x and targets y, (B, T) each. The target of a token is the token after it."""
    n_windows = (len(tokens) - 1) // T
    rows = []
    for sample in range(step * B, (step + 1) * B):  # counted from the start of training
        epoch, i = divmod(sample, n_windows)
        start = permute(i, n_windows, epoch) * T
        rows.append(tokens[start : start + T + 1].astype(np.int64))
    rows = torch.from_numpy(np.stack(rows))  # (B, T + 1)
    return rows[:, :-1], rows[:, 1:]


# ---- the model


class CausalSelfAttention(nn.Module):
    """Each token looks at itself and at the tokens before it, and takes a weighted mean of their values."""

    def __init__(self):
        super().__init__()
        self.c_attn = nn.Linear(n_embd, 3 * n_embd)
        self.c_proj = nn.Linear(n_embd, n_embd)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (part.view(B, T, n_head, C // n_head).transpose(1, 2)  # (B, nh, T, hs) each
                   for part in self.c_attn(x).chunk(3, dim=2))

        scores = q @ k.mT / math.sqrt(C // n_head)  # (B, nh, T, T)
        future = torch.ones(T, T, dtype=torch.bool).triu(1)  # True above the diagonal
        weights = scores.masked_fill(future, -math.inf).softmax(dim=-1)

        y = (weights @ v).transpose(1, 2).reshape(B, T, C)
        return self.c_proj(y)


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_fc = nn.Linear(n_embd, 4 * n_embd)
        self.c_proj = nn.Linear(4 * n_embd, n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1 = nn.LayerNorm(n_embd)
        self.attn = CausalSelfAttention()
        self.ln_2 = nn.LayerNorm(n_embd)
        self.mlp = MLP()

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(vocab_size, n_embd),
            "wpe": nn.Embedding(T, n_embd),
            "h": nn.ModuleList(Block() for _ in range(n_layer)),
            "ln_f": nn.LayerNorm(n_embd),
        })
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # one matrix reads tokens and predicts them

        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):  # 2 n_layer of these add to x: keep its variance
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * n_layer))
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, idx):
        x = self.transformer.wte(idx) + self.transformer.wpe(torch.arange(idx.size(1)))  # (B, T, C)
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x))  # logits (B, T, V)


# ---- the training


def get_lr(step):
    """Linear warmup to max_lr, then half a cosine down to min_lr at the last step."""
    if step < warmup_steps:
        return max_lr * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / (max_steps - 1 - warmup_steps)
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (max_lr - min_lr)


def train(folder):
    """Returns the trained model and the (loss, gradient norm) of every step."""
    tokens = read_tokens(folder)
    torch.manual_seed(seed)
    model = GPT()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() == 1]  # biases and norms, which do not decay
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": weight_decay},
                                   {"params": others, "weight_decay": 0.0}], betas=(beta1, beta2))

    history = []
    for step in range(max_steps):
        x, y = read_batch(tokens, step)
        logits = model(x)
        loss = F.cross_entropy(logits.view(-1, vocab_size), y.reshape(-1))

        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
        lr = get_lr(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()

        print(f"step {step} | loss {loss.item():.6f} | lr {lr:.2e} | norm {norm.item():.4f}", flush=True)
        history.append((loss.item(), norm.item()))
    return model, history


if __name__ == "__main__":
    train(sys.argv[1])
