"""
One process of a sharded run, for test_checkpoint.py: trains a tiny GPT under fully_shard on the CPU.

    torchrun --standalone --nproc_per_node=2 tests/checkpoint_ranks.py run FOLDER load=DIR then rotate DIR

Scenarios are the functions below, any number of them with "then" between. Of each, what it returns is printed
as a line of JSON, for the tests to judge.
"""

import errno
import json
import os
import resource
import signal
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import checkpoint
from checkpoint import CheckpointWriter, load_into, training_state
from configurator import UserError
from model import GPT, GPTConfig

# width 34 does not divide by 3 processes
CONFIG = GPTConfig(block_size=16, vocab_size=384, n_vocab=257, n_layer=2, n_head=2, n_embd=34)


def build(sharded=True, seed=0, muon=True, n_layer=2):
    """(model, optimizers): Muon on the hidden matrices and AdamW on the rest, or AdamW alone."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**vars(CONFIG), "n_layer": n_layer}))
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


def guard_of(step):
    return {"skipped": 0, "in_row": 0, "recent": [[1.5, float(step)]]}


def state_of(step, model, optimizers):
    """All that train_gpt2.py writes; the tokenizer is only named."""
    return {"step": step, "train_loss": 1.5, "val_loss": None, "best": {"step": step, "val_loss": 2.5},
            **training_state(model, optimizers), "guard": guard_of(step), "scaler": {},
            "config": {"data_dir": "data", "seed": 1, "block_size": 16, "batch_tokens": 192,
                       "val_tokens": 96, "optimizer": "adamw"},
            "model_config": checkpoint.describe_model(model), "data": "0123456789abcdef",
            "tokenizer": {"name": "bytes", "sha256": 64 * "0", "rank_file": None},
            "val_data": ["0123456789abcdef", 6], "provenance": {"world_size": 1}}


def accept(values):
    """The `check` of a caller that has nothing against it."""


def run(folder, load=None, steps=3):
    """Train `steps` from `load` or from scratch, save, alter the weights at once; then three steps more."""
    model, optimizers = build(seed=0 if load is None else 1)
    start = 0
    if load is not None:
        for optimizer in optimizers:
            optimizer.param_groups[0]["weight_decay"] = 0.25  # today's setting, which must stay
        values = load_into(load, model, optimizers, accept)
        start = values["step"]
        assert values["guard"] == guard_of(start) and not {"model", "optimizers"} & set(values)
        for optimizer in optimizers:
            assert optimizer.param_groups[0]["weight_decay"] == 0.25
            optimizer.param_groups[0]["weight_decay"] = 0.1
    train(model, optimizers, start, start + steps)
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.long))  # an evaluation leaves some parameters unsharded
    writer = CheckpointWriter(folder, keep=2, sharded=True)
    writer.save(start + steps, state_of(start + steps, model, optimizers), None)
    kept = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)  # must not be in the file
    writer.wait()
    writer.save(start + steps, state_of(start + steps, model, optimizers), None)  # these are to be replaced,
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), kept):
            parameter.copy_(value)
    writer.save(start + steps, state_of(start + steps, model, optimizers), None)  # by these
    writer.wait()
    losses = train(model, optimizers, start + steps, start + steps + 3)
    return {"start": start, "losses": losses}


def rotate(folder):
    """Six saves, the one at 2 the best, 2 kept: the names in the folder after each."""
    model, optimizers = build()
    writer = CheckpointWriter(folder, keep=2, sharded=True)
    seen = []
    for step in range(1, 7):
        writer.save(step, state_of(step, model, optimizers), min(step, 2))
        writer.wait()
        seen.append(sorted(path.name for path in Path(folder).iterdir()))
        dist.barrier()
    return seen


def fail(folder, where, rank):
    """A good save, one that fails on one process, a good one: the errors and the names in the folder."""
    model, optimizers = build()
    writer = CheckpointWriter(folder, keep=2, sharded=True)
    writer.save(1, state_of(1, model, optimizers), None)
    writer.wait()

    def fail_for_space(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == rank and where == "write":  # a real fault, the others are not
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # bytes: half of what it has to write
    elif dist.get_rank() == rank:
        place = {"begin": (Path, "mkdir"), "sum": (checkpoint, "_checksum"),
                 "finish": (checkpoint, "write_atomically")}[where]
        mock.patch.object(*place, fail_for_space).start()
    writer.save(2, state_of(2, model, optimizers), None)
    try:
        writer.wait()
        message = None
    except UserError as error:
        message = str(error)
    mock.patch.stopall()
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    messages = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    left = sorted(path.name for path in Path(folder).iterdir())
    writer.save(3, state_of(3, model, optimizers), None)
    writer.wait()
    return [messages, left, [path.name for path in checkpoint.list_checkpoints(folder)]]


def misfit(folder):
    """Another depth, another set of optimizers, a caller that refuses: (error, weights unchanged) of each
    process."""
    def refuse(values):
        raise UserError(f"step {values['step']} is not wanted")

    outcomes = []
    for kwargs, check in [({"n_layer": 3}, accept), ({"muon": False}, accept), ({}, refuse)]:
        model, optimizers = build(seed=1, **kwargs)
        before = {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}
        try:
            load_into(folder, model, optimizers, check)
            message = None
        except UserError as error:
            message = str(error)
        same = all(torch.equal(before[name], t.full_tensor()) for name, t in model.state_dict().items())
        outcomes.append([None] * dist.get_world_size())
        dist.all_gather_object(outcomes[-1], (message, same))
    return outcomes


def die(folder):
    """A save at 1, then one at 2, in which process 0 is killed with all tensors written and no name given."""
    model, optimizers = build()
    writer = CheckpointWriter(folder, keep=2, sharded=True)
    train(model, optimizers, 0, 1)
    writer.save(1, state_of(1, model, optimizers), None)
    writer.wait()
    if dist.get_rank() == 0:
        checkpoint.write_atomically = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
    writer.save(2, state_of(2, model, optimizers), None)
    writer.wait()


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for scenario in " ".join(sys.argv[1:]).split(" then "):
        name, folder, *rest = scenario.split(" ")
        options = {key: int(text) if text.isdigit() else text for key, text in (s.split("=") for s in rest)}
        scenarios = {"run": run, "rotate": rotate, "fail": fail, "misfit": misfit, "die": die}
        outcome = scenarios[name](folder, **options)
        if dist.get_rank() == 0:
            print(json.dumps(outcome), flush=True)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads outlive their group, and now and then abort a process that ends the long way
