"""
One process of a run under fully_shard on the CPU, for test_checkpoint.py: RANK and friends are set.

    python tests/checkpoint_ranks.py resume two - then resume copy two then fail folder

Runs the functions named, with their arguments; process 0 prints a line of JSON for what each returns.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import checkpoint
from checkpoint import CheckpointWriter, load_into, training_state
from configurator import UserError
from model import GPT, GPTConfig


def build(sharded=False, seed=0, muon=True, n_layer=2, block_size=16):
    """(model, optimizers): Muon on the hidden matrices and AdamW on the rest, or AdamW alone."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size=block_size, vocab_size=384, n_vocab=257, n_layer=n_layer, n_head=2,
                          n_embd=34))  # a width that 4 processes do not divide
    if sharded:
        for block in model.transformer.h:
            fully_shard(block)
        fully_shard(model)
    hidden = [p for name, p in model.named_parameters() if muon and ".h." in name and p.dim() == 2]
    rest = [p for p in model.parameters() if all(p is not other for other in hidden)]
    adamw = torch.optim.AdamW(rest, lr=1e-2, weight_decay=0.1, fused=True)
    return model, [torch.optim.Muon(hidden, lr=1e-2), adamw] if muon else [adamw]


def train(model, optimizers, first, last):
    """Losses of steps first..last-1: 12 sequences a step, shared among the processes."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    losses = []
    for step in range(first, last):
        tokens = torch.randint(257, (12, 17), generator=torch.Generator().manual_seed(step))[rank::world_size]
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        loss = loss.detach()
        if world_size > 1:
            dist.all_reduce(loss)
        losses.append(loss.item() / world_size)
    return losses


def state_of(step, model, optimizers, **changed):
    """As train_gpt2.py writes it, without a rank file."""
    return {"step": step, "train_loss": 1.5, "val_loss": None, "best": {"step": step, "val_loss": 2.5},
            **training_state(model, optimizers), "scaler": {},
            "guard": {"skipped": 0, "in_row": 0, "recent": [[1.5, float(step)]]},
            "config": {"data_dir": "data", "seed": 1, "block_size": 16, "batch_tokens": 192,
                       "val_tokens": 96, "optimizer": "adamw"},
            "model_config": checkpoint.describe_model(model), "data": "0123456789abcdef",
            "tokenizer": {"name": "bytes", "sha256": 64 * "0", "rank_file": None},
            "val_data": ["0123456789abcdef", 6], "provenance": {"world_size": 1}, **changed}


def accept(values):
    """The check of a caller that accepts any checkpoint."""


def in_turn(action, *arguments):
    """What action(*arguments) returns or raises, on one process at a time: a collective would hang."""
    for turn in range(dist.get_world_size()):
        if turn == dist.get_rank():
            try:
                result = action(*arguments)
            except UserError as error:
                result = str(error)
        dist.barrier()
    return result


def resume(folder, source):
    """Train 3 steps, or load them from `source`; save; the losses of 3 more steps."""
    model, optimizers = build(sharded=True, seed=0 if source == "-" else 1)
    if source == "-":
        train(model, optimizers, 0, 3)
    else:
        assert in_turn(load_into, source, model, optimizers, accept)["step"] == 3
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.long))  # an evaluation leaves some parameters gathered
    writer = CheckpointWriter(folder, 2, master=dist.get_rank() == 0)
    writer.save(3, state_of(3, model, optimizers), None)
    kept = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)  # must not be in the file
        writer.wait()
        for parameter, value in zip(model.parameters(), kept):
            parameter.copy_(value)
    assert bool(writer._buffers) == writer.master  # only one process has the state in host memory
    return train(model, optimizers, 3, 6)


def fail(folder):
    """Saves that succeed, find the disk full, succeed: the errors of all processes, the names on disk."""
    import resource  # Windows has none

    model, optimizers = build(sharded=True)
    writer, seen = CheckpointWriter(folder, 2, master=dist.get_rank() == 0), []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step, limit in ((1, limits[0]), (2, 100_000), (3, limits[0])):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        writer.save(step, state_of(step, model, optimizers), None)
        if step == 2:
            writer.save(step, state_of(step, model, optimizers), None)  # raises nothing
        seen.append(in_turn(writer.wait))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, seen)
    return [everyone, sorted(path.name for path in Path(folder).iterdir())]


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for words in " ".join(sys.argv[1:]).split(" then "):
        name, *arguments = words.split(" ")
        outcome = {"resume": resume, "fail": fail}[name](*arguments)
        if dist.get_rank() == 0:
            print(json.dumps(outcome), flush=True)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads outlive their group, and sometimes abort a process that exits normally
