"""
Checkpoints: written atomically while training goes on, loaded without running code, and enough on their own
to generate, or to resume with any number of processes.

    writer = CheckpointWriter("log", keep=2, master=rank == 0)  # on every process
    writer.save(step, {"step": step, ..., **training_state(model, optimizers)}, best_step)
    values = load_into("log", model, optimizers, check)         # resume
    state = load_checkpoint("log")                              # a file, a folder's newest, or log:best
    model = build_model(load_checkpoint("log:best"), "log")      # of the run in log, the lowest val loss

A checkpoint is one file of torch.save, LOG_DIR/ckpt_{step:07d}.pt. It is a dict of tensors and plain values:
    model                      state dict with the keys of the bare GPT: no trace of compile, DDP or fsdp
    optimizers                 of each: {"state": {parameter's name: {...}}, "param_groups": [... names ...]}
    scaler                     state dict
    step                       optimizer steps done
    train_loss, val_loss       nats per token: of the last step's batch; after it, on the validation tokens,
                               None where the run was stopped and had no time to evaluate
    best                       {"step", "val_loss"} of the best checkpoint so far
    guard                      steps skipped, in all and in a row; losses and norms of the last good ones
    config, model_config       the script's settings as resolved; the fields of GPTConfig
    tokenizer                  {"name", "sha256", "rank_file"}; rank_file is None for GPT-2's own
    data, val_data             fingerprint of the training tokens; of the validation tokens, and its windows
    provenance                 git revision, torch, device, number of processes
There is no RNG state: data order and dropout masks are functions of the seed and the step.
"""

import dataclasses
import errno
import math
import pickle
import re
import sys
import threading
import types
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from bpe import GPT2_SHA256, Tokenizer, load_tokenizer, tokenizer_from_ranks
from configurator import Between, OneOf, UserError
from files import check, replacing
from model import GPT, GPTConfig

FORMAT = "gpt2-checkpoint-2"

COUNT, NUMBER = Between(0, 2**53), Between(0.0, sys.float_info.max)  # the latter: finite
PLAIN = (bool, int, float, str, None)
SIZE = Between(1, 2**24)
CONFIG = {str: PLAIN, "data_dir": str, "seed": Between(0, 2**63 - 1), "block_size": SIZE,
          "batch_tokens": Between(1, 2**53), "val_tokens": Between(1, 2**53), "init_from?": str}
SCALER = {"scale": NUMBER, "growth_factor": NUMBER, "backoff_factor": NUMBER, "growth_interval": COUNT,
          "_growth_tracker": COUNT}
BEST = (None, {"step": COUNT, "val_loss": NUMBER})
USABLE = {  # checked whenever a checkpoint is loaded; bounds that no real model comes near
    "step": COUNT, "model": {str: torch.Tensor},
    "model_config": {"block_size": SIZE, "vocab_size": SIZE, "n_vocab": SIZE, "n_layer": Between(1, 1024),
                     "n_head": SIZE, "n_embd": SIZE, "dropout": Between(0.0, 1.0), "norm_position": str,
                     "heads?": (None, [COUNT])},
    "tokenizer": {"name": str, "sha256": re.compile("[0-9a-f]{64}"), "rank_file": (None, torch.Tensor)},
    "best?": BEST, "config?": CONFIG, "data?": str, "provenance?": {str: PLAIN}}
RESUMABLE = {  # and when it is resumed
    "train_loss": float, "val_loss": (None, NUMBER), "best": BEST,
    "guard": {"skipped": COUNT, "in_row": COUNT, "recent": [[NUMBER, NUMBER]]},
    "scaler": (OneOf({}), SCALER), "config": {**CONFIG, "optimizer": str},
    "data": str, "val_data": [str, COUNT],
    "optimizers": [{"state": {str: {str: (torch.Tensor, *PLAIN)}}, "param_groups": [{"params": [str]}]}]}
FIXED = ("data", "tokenizer", "seed", "batch_tokens", "optimizer", "init_from")  # or it is another run
EDITED = "corrupt or edited, use another one; in it"
MOMENTS = {"AdamW": {"step", "exp_avg", "exp_avg_sq"}, "Muon": {"momentum_buffer"}}


class ForeignCheckpoint(UserError):
    """Not a checkpoint of this repository: another project's, or more than tensors and plain values."""


# ---- the state of model and optimizers
def training_state(model: GPT, optimizers: list[torch.optim.Optimizer]) -> dict:
    """{"model", "optimizers"} of a checkpoint: the live tensors of the bare GPT, DTensors if it is sharded.

    Optimizer state goes by the parameters' names, as their numbers depend on how the groups are cut.
    """
    weights = model.state_dict()  # first: under fully_shard this puts the sharded parameters back in place
    names = {parameter: name for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        weights[name] = weights[names[parameter]]  # tied weights are one object, copied and stored once
    states = []
    for optimizer in optimizers:
        groups = [{**group, "params": [names[p] for p in group["params"]]}
                  for group in optimizer.param_groups]
        states.append({"state": {names[p]: dict(entries) for p, entries in optimizer.state.items()},
                       "param_groups": groups})
    return {"model": weights, "optimizers": states}


def restore(model: GPT, optimizers: list[torch.optim.Optimizer], state: dict) -> None:
    """Copy a checkpoint's tensors into model and optimizers; each process of a sharded model takes its part.

    The optimizers keep their settings (learning rate, weight decay). Raises UserError where names or shapes
    do not fit.
    """
    weights = model.state_dict()  # first, as above
    names = {parameter: name for name, parameter in model.named_parameters()}
    owned = [[p for group in optimizer.param_groups for p in group["params"]] for optimizer in optimizers]
    wanted = [sorted(names[p] for p in parameters) for parameters in owned]
    saved = [sorted(name for group in one["param_groups"] for name in group["params"])
             for one in state["optimizers"]]
    if wanted != saved:
        raise UserError(f"the checkpoint's optimizers hold {[*map(len, saved)]} parameters, wanted "
                        f"{[*map(len, wanted)]}, the same ones in each; resume with the --optimizer it was "
                        f"made with")
    wanted, saved = ({(name, tensor.shape) for name, tensor in tensors.items()}
                     for tensors in (weights, state["model"]))
    if wanted != saved:
        differing = sorted({name for name, _ in wanted ^ saved})
        raise UserError(f"the checkpoint's weights do not fit this model: {', '.join(differing[:5])}; "
                        f"use the settings it was made with")

    for name, tensor in weights.items():
        tensor.copy_(_part_of(state["model"][name], tensor))
    stepped = any(one["state"] for one in state["optimizers"])  # then every parameter has state
    for optimizer, parameters, one in zip(optimizers, owned, state["optimizers"]):
        numbered, moments = {}, MOMENTS.get(type(optimizer).__name__)
        for number, parameter in enumerate(parameters if stepped else []):  # as load_state_dict counts them
            entries = one["state"].get(names[parameter], {})
            if moments and (entries.keys() != moments or any(
                    not isinstance(entry, torch.Tensor) or not entry.is_floating_point()
                    or entry.shape != (() if key == "step" else parameter.shape)
                    for key, entry in entries.items())):
                raise UserError(f"the checkpoint's optimizer state of {names[parameter]}: wanted "
                                f"{', '.join(sorted(moments))} of its shape; use an earlier checkpoint")
            numbered[number] = {key: _part_of(entry, parameter) for key, entry in entries.items()}
        groups = optimizer.state_dict()["param_groups"]  # today's settings
        optimizer.load_state_dict({"state": numbered, "param_groups": groups})


def _part_of(value, parameter):
    """What this process holds of a full tensor: its part, and always a copy, as the file is mapped."""
    if not isinstance(value, torch.Tensor):
        return value
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        device = parameter.device if value.dim() else value.device  # AdamW's step, a scalar, stays
        return value.to(device, copy=True)
    # None: nothing is sent, as every process has the full tensor; clone, to let go of the rest
    part = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return part.clone()


# ---- writing
class CheckpointWriter:
    """Writes checkpoints in a thread, one at a time, while the training goes on. One on every process."""

    def __init__(self, log_dir: str | Path, keep: int, master: bool = True, spare: int | None = None):
        """Keep the newest `keep` >= 1 checkpoints in log_dir, the best one and that of step `spare`. Only the
        master writes."""
        self.log_dir, self.keep, self.master, self.spare = Path(log_dir), keep, master, spare
        self._buffers = {}  # {place in the state: tensor in host memory}, reused by every save
        self._thread = self._error = None

    def save(self, step: int, state: dict, best_step: int | None) -> None:
        """Copy `state`, with a `training_state` in it, to host memory; a thread writes it and prunes.

        Call it on every process, after `wait` on all: DTensors are gathered in turn, and a process that
        raised in between would leave the others waiting.
        """
        if self._thread is not None:
            self._thread.join()
        copies = {}  # {id of a tensor: its copy}: tied weights are copied once

        def to_host(value, place=()):
            if isinstance(value, dict):
                return {key: to_host(item, (*place, key)) for key, item in value.items()}
            if isinstance(value, (list, tuple)):
                return type(value)(to_host(item, (*place, i)) for i, item in enumerate(value))
            if not isinstance(value, torch.Tensor):
                return value
            if id(value) in copies:
                return copies[id(value)]
            full = (value.full_tensor() if isinstance(value, DTensor) else value).detach()
            buffer = self._buffers.get(place)
            if self.master and (buffer is None or (buffer.shape, buffer.dtype) != (full.shape, full.dtype)):
                # pageable memory: what torch pins is rounded up to powers of 2, which can be twice the state
                buffer = self._buffers[place] = torch.empty_like(full, device="cpu")
            copies[id(value)] = buffer.copy_(full) if self.master else None
            return copies[id(value)]

        state = to_host(state)
        if self.master:
            self._thread = threading.Thread(target=self._write, args=(step, state, best_step))
            self._thread.start()

    def wait(self) -> None:
        """Return when the last write is done; raise its error, a UserError if it was the disk."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def failed(self) -> bool:
        """Whether the write in the background has failed; does not wait."""
        return self._error is not None

    def _write(self, step, state, best_step):
        try:
            for path in self.log_dir.glob("ckpt_[0-9]*.pt.[0-9]*.tmp"):  # of killed writes: log_dir is locked
                path.unlink()
            save_checkpoint(self.log_dir, step, state)
            for path in list_checkpoints(self.log_dir)[:-self.keep]:
                if step_of(path) not in (best_step, self.spare):
                    path.unlink(missing_ok=True)
        except (UserError, OSError) as error:
            self._error = UserError(f"{error}; then continue with --resume: earlier checkpoints are complete")
            self._error.__cause__ = error.__cause__ or error  # an error of the disk may be gone at a restart
        except BaseException as error:
            self._error = error


def save_checkpoint(log_dir: str | Path, step: int, state: dict) -> Path:
    """Write `state` to LOG_DIR/ckpt_{step:07d}.pt; see `write_checkpoint`."""
    path = Path(log_dir) / f"ckpt_{step:07d}.pt"
    write_checkpoint(path, state)
    return path


def write_checkpoint(path: Path, state: dict) -> None:
    """Write `state` to `path` atomically; UserError where the disk is full or the folder not writable."""
    failed = []

    def write(data):
        try:
            return file.write(data)
        except OSError as error:
            failed.append(error)
            raise

    with replacing(path) as file:
        try:
            torch.save({"format": FORMAT, **state}, types.SimpleNamespace(write=write, flush=file.flush))
        except RuntimeError as error:  # torch's zip writer turns a full disk into one
            raise (failed or [error])[0] from None


# ---- finding
def list_checkpoints(log_dir: str | Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    found = (path for path in Path(log_dir).glob("ckpt_*.pt") if re.fullmatch(r"ckpt_\d+\.pt", path.name))
    return sorted(filter(Path.is_file, found), key=step_of)


def _candidates(path):
    return [path] if path.is_file() else list_checkpoints(path)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.stem.removeprefix("ckpt_"))


def newest_checkpoint() -> Path:
    """The folder under log*/ in which a checkpoint was written last: what a script takes if none is named."""
    found = [path for folder in Path().glob("log*/") for path in list_checkpoints(folder)[-1:]]
    if not found:
        raise UserError("no checkpoint under log*/; name one with --checkpoint=FILE_OR_FOLDER, "
                        "or train one with make demo")
    return max(found, key=lambda path: path.stat().st_mtime).parent


def holds_checkpoint(path: str | Path) -> bool:
    """Whether `load_checkpoint` would find a checkpoint at this path, valid or corrupt."""
    return bool(_candidates(split_best(path)[0]))


def split_best(path: str | Path) -> tuple[Path, bool]:
    """FOLDER:best -> (FOLDER, True), any other path -> (path, False); a path that exists is what it says."""
    path = Path(path)
    if path.name.endswith(":best") and not path.exists():
        return Path(str(path).removesuffix(":best")), True
    return path, False


# ---- loading
def _load(name):
    """(path, state) of a file, of a folder's newest valid checkpoint, or of FOLDER:best."""
    path, wants_best = split_best(name)
    if not path.exists() or (wants_best and not path.is_dir()):
        raise UserError(f"checkpoint {name}: not there; give a .pt file, a log_dir or LOG_DIR:best, "
                        f"or train one with make demo")
    errors = []
    for found in reversed(_candidates(path)):
        try:
            state = _load_file(found)
            break
        except UserError as error:
            if found == path:
                raise
            errors.append(error)
            print(f"warning: {error}; trying the previous one", file=sys.stderr, flush=True)
    else:
        what = f"{len(errors)} that cannot be used; of the newest, {errors[0]}" if errors else "none"
        raise UserError(f"checkpoint {name}: wanted a folder with a valid ckpt_*.pt, got {what}; "
                        f"name another, or train one with make demo")
    if not wants_best:
        return found, state

    if not state.get("best"):
        raise UserError(f"checkpoint {name}: {found} records no best one; take the newest, {path}")
    best = path / f"ckpt_{state['best']['step']:07d}.pt"
    if not best.exists():
        raise UserError(f"checkpoint {name}: {best} is gone, the best one by {found}; take the newest, "
                        f"{path}")
    return best, state if best == found else _load_file(best)


def _load_file(path):
    """The state in a file, checked. Corruption is a UserError, and none of the file's code is run."""
    try:
        with zipfile.ZipFile(path) as archive:
            if corrupt := archive.testzip():  # torch skips the CRCs and would load flipped bits
                raise ValueError(f"the checksum of {corrupt} is wrong")
            if any(member.compress_type for member in archive.infolist()):
                raise ValueError("compressed, and torch would map it as it is")
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ForeignCheckpoint(f"checkpoint {path}: refused, it holds more than tensors and plain values, "
                                f"and loading that could run code; name one that train_gpt2.py wrote"
                                ) from error
    except Exception as error:  # zipfile and torch raise a dozen types on corrupt bytes
        if isinstance(error, OSError) and error.errno in (errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM):
            raise OSError(error.errno, error.strerror, str(path)) from error  # the file may be in order
        raise UserError(f"checkpoint {path}: corrupt, or not a checkpoint "
                        f"({type(error).__name__}: {str(error).partition(chr(10))[0]})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ForeignCheckpoint(f"checkpoint {path}: not written by train_gpt2.py; name another")
    check(state, USABLE, f"checkpoint {path}: {EDITED}")
    _check_shapes(state, path)
    tokenizer = state["tokenizer"]
    if tokenizer["rank_file"] is not None:  # kept longer than the weights, it would keep the file mapped
        tokenizer["rank_file"] = tokenizer["rank_file"].clone()
    return state


def load_into(path: str | Path, model: GPT, optimizers: list[torch.optim.Optimizer],
              accept: Callable[[dict], None]) -> dict:
    """Fill model and optimizers from the checkpoint at `path`; return the rest of it.

    `accept` is called with that rest before anything is changed, and may raise. Each process does all this by
    itself. Raises UserError where there is no valid checkpoint, or where it does not fit.
    """
    found, state = _load(path)
    if "optimizers" not in state:
        raise UserError(f"checkpoint {found}: no run to resume, it is a model that was imported or pruned; "
                        f"train it further with --init_from={path} --log_dir=ANOTHER")
    check(state, RESUMABLE, f"checkpoint {found}: {EDITED}")
    values = {key: value for key, value in state.items() if key not in ("model", "optimizers")}
    accept(values)
    restore(model, optimizers, state)
    return values


def require_same_run(now: dict, saved: dict) -> None:
    """UserError where a resume would make another run of `saved`, the values of a checkpoint.

    `now` has the settings of this start, with "data" (fingerprint) and "tokenizer" (sha256) among them.
    """
    was = _settings_of(saved)
    differing = [f"{key}: {'nothing' if was[key] == '' else was[key]} in the checkpoint, {now[key]} now"
                 for key in (*saved["model_config"], *FIXED) if was.get(key, now[key]) != now[key]]
    if differing:
        raise UserError(f"cannot --resume: {'; '.join(differing)}; use the checkpoint's values, or another "
                        f"--log_dir")
    if saved["step"] > now["max_steps"]:
        raise UserError(f"cannot --resume: the newest checkpoint is of step {saved['step']}, past "
                        f"max_steps={now['max_steps']}; type --max_steps={saved['step']} or more, or more "
                        f"--num_epochs where they are given")


def changed_settings(saved: dict, now: dict) -> list[str]:
    """The other settings that a resume changes, a sentence each."""
    was = _settings_of(saved)
    return [f"{key} was {was[key]}, is now {now[key]}" for key in now
            if key in was and key != "resume" and was[key] != now[key]]


def _settings_of(state):
    return {**state["config"], **state["model_config"], "data": state["data"],
            "tokenizer": state["tokenizer"]["sha256"]}


def load_checkpoint(path: str | Path) -> dict:
    """The checkpoint at `path`, on the CPU; its tensors stay in the file, mapped, until they are used.

    A corrupt one is a UserError; in a folder it is reported on stderr and the previous one is used.
    """
    return _load(path)[1]


def build_model(state: dict, name: str) -> GPT:
    """The model of a state, in eval mode, on the CPU; errors speak of `name`."""
    _check_shapes(state, name)
    model = GPT(GPTConfig(**state["model_config"]))
    model.load_state_dict(state["model"], strict=True)
    check_finite(model.named_parameters(), f"checkpoint {name}")
    return model.eval()


def check_finite(weights: Iterable[tuple[str, torch.Tensor]], name: str) -> None:
    """Raises UserError, which speaks of `name`, where a tensor of the (name, tensor) pairs is not finite."""
    wrong = [(key, tensor) for key, tensor in weights  # aminmax: ten times as fast as isfinite, and keeps nan
             if tensor.numel() and not all(map(math.isfinite, torch.aminmax(tensor.detach())))]
    if wrong:
        key, tensor = wrong[0]
        raise UserError(f"{name}: nan or infinity in {len(wrong)} tensors, first in {key} "
                        f"({(~tensor.isfinite()).sum():,} of {tensor.numel():,} numbers); "
                        f"take an earlier checkpoint, or another copy of the file")


def _check_shapes(state, name):
    """UserError unless the tensors are those of the model_config; takes no memory, whatever that says."""
    weights = dict(state["model"])  # a copy: `assign` would stay in the metadata of the original
    try:
        with torch.device("meta"):
            model = GPT(GPTConfig(**state["model_config"]))
            tied = model.lm_head.weight is model.transformer.wte.weight
            model.load_state_dict(weights, strict=True, assign=True)
        head, wte = weights["lm_head.weight"], weights["transformer.wte.weight"]
        if tied and not (head.is_set_to(wte) or torch.equal(head, wte)):
            raise UserError("lm_head.weight is not transformer.wte.weight, and in model.py they are one")
    except (RuntimeError, TypeError, UserError) as error:
        raise UserError(f"checkpoint {name}: its tensors do not fit its own model_config; if model.py has "
                        f"changed, use the model.py that it was trained with: {error}") from error


# ---- what a checkpoint keeps of a model and a tokenizer
def describe_model(model: GPT) -> dict:
    """The fields of the model's GPTConfig, as plain values."""
    return dataclasses.asdict(model.config)


def describe_tokenizer(tokenizer: Tokenizer) -> dict:
    """What a checkpoint keeps of a tokenizer; the inverse of `checkpoint_tokenizer`."""
    own = tokenizer.sha256 != GPT2_SHA256
    rank_file = torch.frombuffer(bytearray(tokenizer.rank_file), dtype=torch.uint8) if own else None
    return {"name": tokenizer.name, "sha256": tokenizer.sha256, "rank_file": rank_file}


def checkpoint_tokenizer(state: dict) -> Tokenizer:
    """The tokenizer a checkpoint was trained with: its own rank file, or GPT-2's."""
    saved, ranks = state["tokenizer"], state["tokenizer"]["rank_file"]
    tokenizer = load_tokenizer("gpt2") if ranks is None else tokenizer_from_ranks(
        ranks.to(torch.uint8).numpy().tobytes(), saved["name"])
    if tokenizer.sha256 != saved["sha256"]:
        raise UserError(f"the checkpoint's tokenizer {saved['name']}: its rank file has sha256 "
                        f"{tokenizer.sha256}, wanted {saved['sha256']}; use another checkpoint")
    return tokenizer


def find_data_dir(state: dict, source: str | Path, data_dir: str) -> str:
    """`data_dir`, or if it is empty the shards that the checkpoint was trained on. Raises UserError, which
    names `source`, if those are not there."""
    trained_on = state.get("config", {}).get("data_dir", "")
    if not data_dir and not (trained_on and Path(trained_on).is_dir()):
        known = (f"was trained on data_dir={trained_on}, which does not exist" if trained_on
                 else "names no data")
        raise UserError(f"{source} {known}; give --data_dir=FOLDER of its shards, or of others")
    return data_dir or trained_on
