"""
The gradient of the last block at initialisation, by depth: where theory speaks, and as GPT-2 starts.

    python results/norm_study/theory.py                            # a few seconds; theory.txt is what it said

Xiong et al. 2020, "On Layer Normalization in the Transformer Architecture", theorem 1, is about the second
matrix of the last MLP (c_proj): with Post-LN its gradient does not shrink with the depth L, with Pre-LN it
falls as 1/sqrt(L). It takes Xavier's initialisation, inputs of variance 1, and an output matrix that is not
tied; GPT-2 draws its matrices with std 0.02, which makes inputs of std 0.03, and divides those that add to
the residual stream by sqrt(2 L). Prints a table: one batch of random ids per model.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from model import GPT, GPTConfig

DEPTHS, SEEDS = (2, 4, 8, 16, 32), (1, 2, 3)
B, T, C, V = 8, 32, 64, 512  # C is n_embd


def as_in_the_theorem(model):
    """Draw the weights anew: matrices by Xavier, embeddings with variance 1 in sum, lm_head on its own."""
    for name, parameter in model.transformer.named_parameters():
        if name.startswith(("wte", "wpe")):
            torch.nn.init.normal_(parameter, std=0.5 ** 0.5)
        elif parameter.dim() == 2:
            torch.nn.init.xavier_normal_(parameter)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(V, C) * C ** -0.5)


def last_norm(norm_position, n_layer, seed, start):
    """L2 norm of the gradient of the last block's mlp.c_proj; start(model) changes the weights before."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size=T, vocab_size=V, n_vocab=V, n_layer=n_layer, n_head=2, n_embd=C,
                          norm_position=norm_position))
    start(model)
    idx, targets = torch.randint(0, V, (2, B, T))
    model(idx, targets).backward()
    return model.transformer.h[-1].mlp.c_proj.weight.grad.norm().item()


def power(norms):
    """The exponent p of norm ~ L^p over DEPTHS, by least squares in logarithms."""
    return np.polyfit(np.log(DEPTHS), np.log(norms), 1)[0]


def main():
    lines = ["L2 norm of the gradient of the last mlp.c_proj, mean of three seeds",
             " " * 28 + "".join(f"{f'L={depth}':>9s}" for depth in DEPTHS) + f"{'power of L':>12s}"]
    for start, what in ((as_in_the_theorem, "as in the theorem"), (GPT.train, "as GPT-2")):
        for norm in ("pre", "post"):
            norms = [np.mean([last_norm(norm, depth, seed, start) for seed in SEEDS]) for depth in DEPTHS]
            cells = "".join(f"{value:9.4f}" for value in norms)
            lines.append(f"{f'{norm.capitalize()}-LN, {what}':28s}{cells}{power(norms):12.2f}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
