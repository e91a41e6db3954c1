"""
Xavier's initialisation, which the theory of Pre-LN and Post-LN is about: writes weights to train from, and
checks what the theory says about gradients.

    python experiments/xavier.py --out=post_s1.pt --norm_position=post --seed=1   # for --init_from=post_s1.pt
    python experiments/xavier.py                              # prints the table of gradients; a few seconds

Xiong et al. 2020, "On Layer Normalization in the Transformer Architecture", theorem 1: at initialisation the
gradient of the last MLP's second matrix (c_proj) does not depend on the depth L with Post-LN, and falls as
1/sqrt(L) with Pre-LN. The theorem takes Xavier's initialisation, with variance 1/C for the output matrix.
GPT-2 draws all matrices with std 0.02, and divides those that add to the residual stream by sqrt(2 L).

--out writes a checkpoint of config/norm_cpu.py's shape. Here as there the output matrix is also wte.
"""

import math
import runpy
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn.init import normal_, xavier_normal_

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from checkpoint import describe_model, describe_tokenizer, write_checkpoint
from configurator import Between, OneOf, PathName, configure
from figures import table
from model import GPT, GPTConfig
from shards import TokenStream

out: PathName = ""  # the checkpoint to write; empty = print the table
norm_position: OneOf("pre", "post") = "post"
seed: Between(0, 2**63 - 1) = 1
data_dir: PathName = "python4k"  # whose tokenizer the checkpoint has

DEPTHS, SEEDS = (2, 4, 8, 16, 32), (1, 2, 3)
B, T, C, V = 8, 32, 64, 512  # of the models in the table


def draw_xavier(model):
    """Draw the matrices again: those of the blocks by Xavier (Q, K and V separately), wte and wpe with
    std C**-0.5."""
    for name, parameter in model.named_parameters():
        if name.startswith(("transformer.wte", "transformer.wpe")):
            normal_(parameter, std=parameter.shape[1] ** -0.5)
        elif parameter.dim() == 2:
            for matrix in parameter.chunk(3 if "c_attn" in name else 1):
                xavier_normal_(matrix)


def last_gradient(norm_position, n_layer, seed, initialise):
    """L2 norm of the gradient of the last block's mlp.c_proj; initialise(model) changes the weights first."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size=T, vocab_size=V, n_vocab=V, n_layer=n_layer, n_head=2, n_embd=C,
                          norm_position=norm_position))
    initialise(model)
    idx, targets = torch.randint(0, V, (2, B, T))
    model(idx, targets).backward()
    return model.transformer.h[-1].mlp.c_proj.weight.grad.norm().item()


def gradient_table():
    """Lines: the gradient by depth, and the power of L that fits it best (least squares in logarithms)."""
    rows = []
    for initialise, name in ((draw_xavier, "Xavier"), (GPT.train, "GPT-2")):
        for norm in ("pre", "post"):
            norms = [np.mean([last_gradient(norm, depth, seed, initialise) for seed in SEEDS])
                     for depth in DEPTHS]
            power = np.polyfit(np.log(DEPTHS), np.log(norms), 1)[0]
            rows.append([f"{norm.capitalize()}-LN, {name}", *(f"{value:.4f}" for value in norms),
                         f"{power:.2f}"])
    return ["L2 norm of the gradient of the last mlp.c_proj at initialisation, mean of three seeds", "",
            *table(["", *(f"L={depth}" for depth in DEPTHS), "power of L"], rows)]


def write_weights(path):
    """A checkpoint of step 0, without optimizers, as --init_from takes it."""
    settings = runpy.run_path(str(Path(__file__).parents[1] / "config" / "norm_cpu.py"))
    tokenizer = TokenStream(data_dir, "train").tokenizer()
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size=math.ceil(tokenizer.n_vocab / 128) * 128, n_vocab=tokenizer.n_vocab,
                          norm_position=norm_position,
                          **{key: settings[key] for key in ("block_size", "n_layer", "n_head", "n_embd")}))
    draw_xavier(model)
    write_checkpoint(Path(path), {"step": 0, "model": model.state_dict(),
                                  "model_config": describe_model(model),
                                  "tokenizer": describe_tokenizer(tokenizer)})


if __name__ == "__main__":
    configure(globals())
    if out:
        write_weights(out)
    else:
        print("\n".join(gradient_table()))
