"""
Checkpoints: written whole or not at all, while training goes on; loaded without running code; enough on their
own to generate.

    state = {"step": step, ..., **training_state(model, optimizers)}
    writer = CheckpointWriter(log_dir, keep=2)           # sharded=True: on every process of a sharded model
    writer.save(step, state, best_step)                  # LOG_DIR/ckpt_0000100.pt or LOG_DIR/ckpt_0000100/
    values = load_into("log", model, optimizers, check)  # resume: either kind into either kind of model
    state = load_checkpoint("log")                       # a checkpoint, or a folder's newest whole one
    model, state = load_model("log", device)

A checkpoint is a dict of tensors and plain containers:
    model                      state dict with the keys of the bare GPT, compiled or not, DDP, sharded or not
    optimizers                 of each: {"state": {parameter's name: {...}}, "param_groups": [... names ...]}
    scaler                     state dict
    step                       optimizer steps done
    train_loss, val_loss       nats per token: of the last step's batch; after it, on the validation tokens,
                               None where the run was told to stop and had no time to judge
    best                       {"step", "val_loss"} of the best checkpoint so far
    guard                      steps skipped, in all and in a row; losses and norms of the last good ones
    config, model_config       the script's settings as resolved; the fields of GPTConfig
    tokenizer                  {"name", "sha256", "rank_file"}; rank_file is None for GPT-2's own
    data, val_data             fingerprint of the training tokens; of the validation tokens, and its windows
    provenance                 git revision, torch, device, number of processes
No RNG state is in it, because no RNG state outlives a step: data order and dropout masks are functions of the
seed and the step, so that a resume is exact by construction and at another number of processes too.

On disk it is one file, or with sharded models one folder:
    __0_0.distcp, __1_0.distcp, ...   the tensors, each process's part in its own file, and
    .metadata                         which part is where: as torch.distributed.checkpoint writes them
    values.pt                         the rest; under model and optimizers the names the tensors have there
    checksums.json                    {"format", "files": {name: {"bytes", "crc32"}}}
"""

import dataclasses
import json
import math
import os
import pickle
import re
import shutil
import sys
import threading
import types
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor, distribute_tensor

from bpe import GPT2_SHA256, Tokenizer, load_tokenizer, tokenizer_from_ranks
from configurator import Between, OneOf, UserError
from files import check, replacing, sync_folder, write_atomically
from model import GPT, GPTConfig

FORMAT = "gpt2-checkpoint-2"
OLD_FORMAT = "gpt2-checkpoint-1"  # one optimizer, its state by number: enough to generate, not to resume
CHECKSUMS, VALUES = "checksums.json", "values.pt"
METADATA_CLASSES = (  # beside dtypes; without BytesStorageMetadata, an entry that torch would unpickle freely
    "torch.Size", "torch.serialization._get_layout", "torch.distributed.checkpoint.filesystem._StorageInfo",
    *(f"torch.distributed.checkpoint.metadata.{name}" for name in (
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
        "_MEM_FORMAT_ENCODING")))

COUNT, NUMBER = Between(0, 2**53), Between(0.0, sys.float_info.max)  # the latter: finite
PLAIN = (bool, int, float, str, None)
SIZE = Between(1, 2**24)
CONFIG = {str: PLAIN, "data_dir": str, "seed": COUNT, "block_size": SIZE, "batch_tokens": Between(1, 2**53),
          "val_tokens": Between(1, 2**53), "init_from?": str}
SCALER = {"scale": NUMBER, "growth_factor": NUMBER, "backoff_factor": NUMBER, "growth_interval": COUNT,
          "_growth_tracker": COUNT}
USABLE = {  # what is checked of any checkpoint when it is loaded; bounds that no real model comes near
    "step": COUNT, "model": {str: torch.Tensor},
    "model_config": {"block_size": SIZE, "vocab_size": SIZE, "n_vocab": SIZE, "n_layer": Between(1, 1024),
                     "n_head": SIZE, "n_embd": SIZE, "dropout": Between(0.0, 1.0), "norm_position": str,
                     "heads?": (None, [COUNT])},
    "tokenizer": {"name": str, "sha256": re.compile("[0-9a-f]{64}"), "rank_file": (None, torch.Tensor)},
    "config?": CONFIG, "data?": str, "provenance?": {str: PLAIN}}
RESUMABLE = {  # and of one to resume from
    "train_loss": float, "val_loss": (None, NUMBER), "best": (None, {"step": COUNT, "val_loss": NUMBER}),
    "guard": {"skipped": COUNT, "in_row": COUNT, "recent": [[NUMBER, NUMBER]]},
    "scaler": (OneOf({}), SCALER), "config": {**CONFIG, "optimizer": str},
    "data": str, "val_data": [str, COUNT],
    "optimizers": [{"state": {str: {str: (torch.Tensor, *PLAIN)}}, "param_groups": [{"params": [str]}]}]}
MOMENTS = {torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}, torch.optim.Muon: {"momentum_buffer"}}


class ForeignCheckpoint(UserError):
    """A file that is no checkpoint of ours: of another project, or more than tensors and plain values."""


# ---- the state of model and optimizers
def training_state(model: GPT, optimizers: list[torch.optim.Optimizer]) -> dict:
    """{"model", "optimizers"} of a checkpoint: the live tensors, DTensors where `fully_shard` made them.

    `model` is the bare GPT. No collective: each process of a sharded model gets its own part. Optimizer state
    goes by the parameters' names, because numbers mean another parameter once the groups are cut differently.
    (torch's get_optimizer_state_dict does that too, but where there is no state yet, it makes one by a step.)
    """
    weights = model.state_dict()  # first: under fully_shard this puts the sharded parameters back in place
    names = {parameter: name for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        weights[name] = weights[names[parameter]]  # tied weights are one object, to be copied and stored once
    states = []
    for optimizer in optimizers:
        groups = [{**group, "params": [names[p] for p in group["params"]]}
                  for group in optimizer.param_groups]
        states.append({"state": {names[p]: dict(entries) for p, entries in optimizer.state.items()},
                       "param_groups": groups})
    return {"model": weights, "optimizers": states}


def restore(model: GPT, optimizers: list[torch.optim.Optimizer], state: dict) -> None:
    """Put a `training_state` into model and optimizers; full tensors are sharded where the model is.

    The optimizers' settings (learning rate, weight decay) stay as they are. They may keep tensors of `state`.
    Raises UserError where names or shapes do not fit.
    """
    _check_optimizers(model, optimizers, state["optimizers"])
    weights = model.state_dict()
    try:
        model.load_state_dict({name: _sharded_like(tensor, weights.get(name))
                               for name, tensor in state["model"].items()}, strict=True)
    except RuntimeError as error:
        raise UserError(f"the checkpoint's weights do not fit this model: {error}") from error
    _restore_optimizers(model, optimizers, state["optimizers"])


def _check_optimizers(model, optimizers, states):
    names = {parameter: name for name, parameter in model.named_parameters()}
    wanted = [sorted(names[p] for group in optimizer.param_groups for p in group["params"])
              for optimizer in optimizers]
    saved = [sorted(name for group in state["param_groups"] for name in group["params"]) for state in states]
    if wanted != saved:
        raise UserError(f"the checkpoint's optimizers hold {[len(some) for some in saved]} parameters, "
                        f"wanted {[len(some) for some in wanted]}, the same ones in each; "
                        f"resume with the --optimizer it was made with")


def _restore_optimizers(model, optimizers, states):
    names = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer, state in zip(optimizers, states):
        numbered, moments = {}, MOMENTS.get(type(optimizer))
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        for number, parameter in enumerate(parameters):  # load_state_dict counts them in this order
            if not any(one["state"] for one in states):  # of no step yet; otherwise every parameter has some
                break
            name = names[parameter]
            entries = state["state"].get(name, {})
            if moments and (entries.keys() != moments or any(
                    not isinstance(entry, torch.Tensor) or not entry.is_floating_point()
                    or entry.shape != (() if key == "step" else parameter.shape)
                    for key, entry in entries.items())):
                raise UserError(f"the checkpoint's optimizer state of {name}: wanted "
                                f"{', '.join(sorted(moments))} of its shape; use an earlier checkpoint")
            numbered[number] = {key: _sharded_like(entry, parameter) for key, entry in entries.items()}
        groups = optimizer.state_dict()["param_groups"]  # today's settings
        optimizer.load_state_dict({"state": numbered, "param_groups": groups})


def _sharded_like(tensor, parameter):
    """This process's part of a full tensor, if `parameter` is sharded and of its shape; else `tensor`."""
    if not isinstance(parameter, DTensor) or isinstance(tensor, DTensor) \
            or not isinstance(tensor, torch.Tensor) or tensor.shape != parameter.shape:
        return tensor
    # every process has the whole tensor, so there is nothing to send (None); clone, to let go of the rest
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None).clone()


# ---- writing
class CheckpointWriter:
    """Writes checkpoints in a thread, while the training goes on. One write at a time.

    The thread's collectives run in a gloo group of their own, so that they never meet those of the training.
    """

    def __init__(self, log_dir: str | Path, keep: int, sharded: bool = False):
        """Keep the newest `keep` >= 1 checkpoints in log_dir and the best one.

        sharded: for a model under `fully_shard`; every process makes a writer, at the same point of the
        program. Otherwise one process makes it and saves.
        """
        self.log_dir, self.keep = Path(log_dir), keep
        # a slow disk is no dead process, and a dead one breaks its connection, which shows at once
        self._group = dist.new_group(backend="gloo", timeout=timedelta(hours=2)) if sharded else None
        self._buffers = {}  # {place in the state: tensor in host memory}, filled again by every save
        self._thread = self._error = None

    def save(self, step: int, state: dict, best_step: int | None) -> None:
        """Copy `state` to host memory and return; a thread writes it, then removes what need not be kept.

        state: plain values and a `training_state`. Waits for the write before, and raises its UserError.
        """
        self.wait()
        copied = {}  # {id of a tensor: its copy}, so that tied weights are copied once

        def to_host(path, leaf):
            if not isinstance(leaf, torch.Tensor):
                return leaf
            if id(leaf) not in copied:
                copied[id(leaf)] = self._copy(path, leaf)
            return copied[id(leaf)]

        host_state = _map_leaves(state, to_host)
        self._thread = threading.Thread(target=self._write, args=(step, host_state, best_step))
        self._thread.start()

    def wait(self) -> None:
        """Return when the last write is done; raise what went wrong in it: a UserError if it was the disk."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def failed(self) -> bool:
        """Whether the write in the background has failed; does not wait.

        Processes that write together may learn of it a step apart: share the answer before acting on it.
        """
        return self._error is not None

    @torch.no_grad()
    def _copy(self, path, tensor):
        # pageable memory: what torch pins is rounded up to powers of 2, which can be twice the state
        tensor, buffer = tensor.detach(), self._buffers.get(path)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = self._buffers[path] = torch.empty_like(tensor, device="cpu")
        if isinstance(tensor, DTensor):
            buffer.to_local().copy_(tensor.to_local())
        else:
            buffer.copy_(tensor)
        return buffer

    def _write(self, step, state, best_step):
        try:
            if self._group is None:
                _remove_temporaries(self.log_dir)
                save_checkpoint(self.log_dir, step, state)
                prune_checkpoints(self.log_dir, self.keep, best_step)
            else:
                self._write_folder(step, state, best_step)
        except (UserError, OSError) as error:
            self._error = UserError(f"{error}; then continue with --resume: the earlier ones are complete")
            self._error.__cause__ = error.__cause__ or error  # an error of the disk may be gone at a restart
        except BaseException as error:
            self._error = error

    def _write_folder(self, step, state, best_step):
        folder = self.log_dir / f"ckpt_{step:07d}"
        temporary = folder.with_suffix(".tmp")
        rank = dist.get_rank(self._group)
        tensors = {}  # {name: tensor}: the first name, where a tensor has two
        names = {}  # {id of a tensor: name}

        def name_tensor(path, leaf):
            if not isinstance(leaf, torch.Tensor):
                return leaf
            name = names.setdefault(id(leaf), ".".join(map(str, path)))
            tensors[name] = leaf
            return name

        named = _map_leaves({key: state[key] for key in ("model", "optimizers")}, name_tensor)

        def begin():
            if rank == 0:
                _remove_temporaries(self.log_dir)
                temporary.mkdir()

        def write_part():
            dcp.save(tensors, storage_writer=_FolderWriter(temporary), process_group=self._group)

        def sum_part():  # from the page cache: the file was written a moment ago
            return {path.name: _checksum(path) for path in temporary.glob(f"__{rank}_*")}

        def finish():
            if rank == 0:
                write_checkpoint(temporary / VALUES, {**state, **named})
                sums = {path.name: _checksum(path) for path in (temporary / VALUES, temporary / ".metadata")}
                for part in parts:
                    sums.update(part)
                record = {"format": FORMAT, "files": sums}
                write_atomically(temporary / CHECKSUMS, json.dumps(record, indent=1).encode())
                sync_folder(temporary)
                if folder.exists():  # a folder cannot be renamed over another
                    _remove(folder)
                os.replace(temporary, folder)
                sync_folder(self.log_dir)
                prune_checkpoints(self.log_dir, self.keep, best_step)

        try:
            _together(self._group, begin)
            _together(self._group, write_part)
            parts = [None] * dist.get_world_size(self._group)
            dist.all_gather_object(parts, _together(self._group, sum_part), self._group)
            _together(self._group, finish)
        except UserError as error:
            if rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise UserError(f"checkpoint {folder} could not be written ({error})") from error


def save_checkpoint(log_dir: str | Path, step: int, state: dict) -> Path:
    """Write `state` to LOG_DIR/ckpt_{step:07d}.pt; see `write_checkpoint`."""
    path = Path(log_dir) / f"ckpt_{step:07d}.pt"
    write_checkpoint(path, state)
    return path


def write_checkpoint(path: Path, state: dict) -> None:
    """Write `state` to the file `path` by way of a temporary name; a crash leaves the old files.

    Raises UserError when the disk is full or the folder cannot be written.
    """
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
        except RuntimeError as error:  # into which torch's zip writer turns a full disk
            if failed:
                raise failed[0] from error
            raise


def prune_checkpoints(log_dir: str | Path, keep: int, best_step: int | None) -> None:
    """Remove all but the newest `keep` >= 1 checkpoints and the one at `best_step`."""
    for path in list_checkpoints(log_dir)[:-keep]:
        if step_of(path) != best_step:
            _remove(path)


def list_checkpoints(log_dir: str | Path) -> list[Path]:
    """The checkpoints in a folder, oldest first: ckpt_*.pt files, and ckpt_*/ folders of sharded ones."""
    found = [path for path in Path(log_dir).glob("ckpt_*") if re.fullmatch(r"ckpt_\d+(\.pt)?", path.name)]
    return sorted((path for path in found if path.is_dir() == (path.suffix == "")), key=step_of)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.stem.removeprefix("ckpt_"))


def _map_leaves(value, function, path=()):
    """`value` with function(path, leaf) in place of every leaf of its dicts, lists and tuples."""
    if isinstance(value, dict):
        return {key: _map_leaves(item, function, (*path, key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_map_leaves(item, function, (*path, i)) for i, item in enumerate(value))
    return function(path, value)


class _FolderWriter(dcp.FileSystemWriter):
    def storage_meta(self):
        """Nothing: torch would put the temporary folder's name here, as an object of this system's Path."""
        return None


def _remove(path):
    """Remove a checkpoint; stopped half-way, it is none any more."""
    if path.is_file():
        path.unlink(missing_ok=True)
        return
    leaving = path.with_suffix(".removed.tmp")
    shutil.rmtree(leaving, ignore_errors=True)
    os.replace(path, leaving)
    shutil.rmtree(leaving)


def is_temporary(name: str) -> bool:
    """Whether a file's or folder's name is that of a write, or of a removal, that was killed."""
    return bool(re.fullmatch(r"ckpt_\d+(\.pt\.\d+|\.removed)?\.tmp", name))


def _remove_temporaries(log_dir):
    """Nobody else writes there: the caller has locked the folder."""
    for path in log_dir.glob("ckpt_*.tmp"):
        if not is_temporary(path.name):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _checksum(path):
    """{"bytes", "crc32"} of a file."""
    crc = size = 0
    with open(path, "rb") as file:
        while piece := file.read(2**24):
            crc, size = zlib.crc32(piece, crc), size + len(piece)
    return {"bytes": size, "crc32": crc}


def _is_of_the_disk(error):
    if isinstance(error, RuntimeError):  # into which torch's zip writer turns a full disk
        return "inline_container" in str(error)
    return isinstance(error, OSError)


def _together(group, action, *args):
    """action(*args) on every process of `group` (None: on this one). If it fails on one, it fails on all.

    A UserError or an error of the disk becomes a UserError on all. Any other is a bug: where it is, it stays.
    """
    if group is None:
        return action(*args)
    result = error = text = None
    try:
        result = action(*args)
    except (Exception, dcp.CheckpointException) as caught:  # the latter is a BaseException
        error = caught
        if isinstance(caught, dcp.CheckpointException):  # torch has gathered the errors of all processes
            error = next(iter(caught.failures.values()))[0]
        text = str(error) if isinstance(error, UserError) or _is_of_the_disk(error) else repr(error)
    texts = [None] * dist.get_world_size(group)
    dist.all_gather_object(texts, text, group)
    if error is not None and not isinstance(error, UserError) and not _is_of_the_disk(error):
        raise error
    for text in texts:
        if text is not None:
            raise UserError(text) from error
    return result


# ---- reading
def load_into(path: str | Path, model: GPT, optimizers: list[torch.optim.Optimizer],
              check: Callable[[dict], None]) -> dict:
    """Fill model and optimizers from a checkpoint, or from the newest whole one of a folder; return the rest.

    `check` is called with that rest (all but model and optimizers) before anything is changed; what it raises
    is raised here. Either kind of checkpoint fits either kind of model, and any number of processes. If the
    model is sharded, all processes call this together and agree on the checkpoint; of a sharded one each then
    reads its own part. Checksums cover the whole checkpoint: the processes share the files among them.

    Raises UserError where there is no whole checkpoint, or where it does not fit.
    """
    sharded = any(isinstance(tensor, DTensor) for tensor in model.state_dict().values())
    # gloo: file names and verdicts travel, which need no GPU
    group = dist.new_group(backend="gloo") if sharded else None
    try:
        candidate, state, metadata = _newest_whole(Path(path), group)
        if state["format"] != FORMAT:
            raise UserError(f"checkpoint {candidate}: wanted format {FORMAT!r}, got {state['format']!r}, an "
                            f"older one; it can generate but not be resumed; "
                            f"begin a new run with --log_dir=ANOTHER")
        if "optimizers" not in state:
            raise UserError(f"checkpoint {candidate}: no run to resume, it is a model that was imported or "
                            f"pruned; train it further with --init_from={path} --log_dir=ANOTHER")
        _check(state, RESUMABLE, candidate)
        values = {key: value for key, value in state.items() if key not in ("model", "optimizers")}
        _together(group, check, values)
        if metadata is None:
            restore(model, optimizers, state)
        else:
            _together(group, _read_parts, candidate, metadata, state, model, optimizers, group)
    finally:
        if group is not None:
            dist.destroy_process_group(group)
    return values


def load_checkpoint(path: str | Path) -> dict:
    """A checkpoint, or the newest whole one in a folder: full tensors, on the CPU, on this process alone.

    A damaged one is a UserError; in a folder it is reported on stderr and the one before it is used.
    """
    _, state, _ = _newest_whole(Path(path), None)
    return state


def newest_checkpoint() -> Path:
    """The folder under log*/ in which a checkpoint was written last: what a script takes if none is named."""
    found = [path for folder in Path().glob("log*/") for path in list_checkpoints(folder)[-1:]]
    if not found:
        raise UserError("no checkpoint under log*/; name one with --checkpoint=FILE_OR_FOLDER, "
                        "or train one with make demo")
    return max(found, key=lambda path: path.stat().st_mtime).parent


def load_model(path: str | Path, device: str | torch.device = "cpu") -> tuple[GPT, dict]:
    """The model of a checkpoint, in eval mode on `device`, and the checkpoint itself (on the CPU)."""
    state = load_checkpoint(path)
    return build_model(state, str(path)).to(device), state


def build_model(state: dict, name: str) -> GPT:
    """The model of a checkpoint's "model_config" and "model", in eval mode, on the CPU; errors speak of
    `name`."""
    _check_shapes(state, name)
    model = GPT(GPTConfig(**state["model_config"]))
    model.load_state_dict(state["model"], strict=True)
    check_finite(model.named_parameters(), f"checkpoint {name}")
    return model.eval()


def _check_shapes(state, name):
    """UserError unless the tensors are those of the model_config; takes no memory, whatever that says."""
    weights = dict(state["model"])  # a copy: `assign` would stay in the metadata of the original
    try:
        with torch.device("meta"):
            GPT(GPTConfig(**state["model_config"])).load_state_dict(weights, strict=True, assign=True)
    except (RuntimeError, TypeError, UserError) as error:
        raise UserError(f"checkpoint {name}: its tensors do not fit its own model_config: {error}") from error


def check_finite(weights: Iterable[tuple[str, torch.Tensor]], name: str) -> None:
    """Raises UserError, which speaks of `name`, where one of the (name, tensor) pairs has nan or infinity."""
    wrong = [(key, tensor) for key, tensor in weights  # aminmax: ten times as fast as isfinite, and keeps nan
             if tensor.numel() and not all(map(math.isfinite, torch.aminmax(tensor.detach())))]
    if wrong:
        key, tensor = wrong[0]
        raise UserError(f"{name}: nan or infinity in {len(wrong)} tensors, first in {key} "
                        f"({(~tensor.isfinite()).sum():,} of {tensor.numel():,} numbers); "
                        f"take an earlier checkpoint, or another copy of the file")


def checkpoint_tokenizer(state: dict) -> Tokenizer:
    """The tokenizer a checkpoint was trained with: its own rank file, or GPT-2's."""
    saved, ranks = state["tokenizer"], state["tokenizer"]["rank_file"]
    if ranks is None:
        tokenizer = load_tokenizer("gpt2")
    else:
        tokenizer = tokenizer_from_ranks(ranks.to(torch.uint8).numpy().tobytes(), saved["name"])
    if tokenizer.sha256 != saved["sha256"]:
        raise UserError(f"the checkpoint's tokenizer {saved['name']}: its rank file has sha256 "
                        f"{tokenizer.sha256}, wanted {saved['sha256']}; use another checkpoint")
    return tokenizer


def describe_tokenizer(tokenizer: Tokenizer) -> dict:
    """What a checkpoint keeps of a tokenizer; the inverse of `checkpoint_tokenizer`."""
    own = tokenizer.sha256 != GPT2_SHA256
    rank_file = torch.frombuffer(bytearray(tokenizer.rank_file), dtype=torch.uint8) if own else None
    return {"name": tokenizer.name, "sha256": tokenizer.sha256, "rank_file": rank_file}


def describe_model(model: GPT) -> dict:
    """The fields of the model's GPTConfig, as plain values."""
    return dataclasses.asdict(model.config)


def _newest_whole(path, group):
    """(its path, and what `_open` makes of it) of the checkpoint `path`, or of the newest whole one in it."""
    # rank 0's list, and a checkpoint that any process finds damaged is so for all
    found = [_together(group, _candidates, path)]
    if group is not None:
        dist.broadcast_object_list(found, 0, group)
    candidates, = found
    if candidates is None:
        raise UserError(f"checkpoint {path}: not there; give a .pt file or a log_dir, "
                        f"or train one with make demo")
    errors = []
    for candidate in reversed(candidates):
        try:
            return candidate, *_together(group, _open, candidate, group)
        except UserError as error:
            if candidate == path:
                raise
            errors.append(error)
            if group is None or dist.get_rank(group) == 0:
                print(f"warning: {error}; trying the one before", file=sys.stderr, flush=True)
    found = f"{len(errors)} that cannot be used; of the newest, {errors[0]}" if errors else "none"
    raise UserError(f"checkpoint {path}: wanted a folder with a complete ckpt_*.pt or ckpt_*/, got {found}; "
                    f"name another, or train one with make demo")


def holds_checkpoint(path: str | Path) -> bool:
    """Whether a path is a file or a folder that `load_checkpoint` would look into, whole or damaged."""
    return bool(_candidates(Path(path)))


def _candidates(path):
    if not path.exists():
        return None
    if path.is_file() or (path / CHECKSUMS).exists() or re.fullmatch(r"ckpt_\d+", path.name):
        return [path]
    return list_checkpoints(path)


def _open(path, group):
    """(state, None) of a whole checkpoint. With a group, a folder is checked but not read: (state, metadata).

    That state has the tensors' names in their places, and is for `_read_parts`. Damage is a UserError.
    """
    if path.is_file():
        state = _load_file(path)
    elif group is not None:
        return _open_folder(path, slice(dist.get_rank(group), None, dist.get_world_size(group)))
    else:
        state, metadata = _open_folder(path, slice(None))
        tensors = {name: torch.empty(saved.size, dtype=saved.properties.dtype)
                   for name, saved in metadata.state_dict_metadata.items()}
        _fill(tensors, path, metadata, None)
        state = _put_tensors(state, tensors)
    _check(state, USABLE, path)
    _check_shapes(state, path)
    return state, None


def _check(state, schema, path):
    try:
        check(state, schema, f"checkpoint {path}")
    except ValueError as error:  # UserError is one
        raise UserError(f"{error}; the file is corrupt or was edited: use another checkpoint") from error


def _open_folder(folder, share):
    """(state with the tensors' names in their places, torch's metadata); checks the files in `share`."""
    try:
        record = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise UserError(f"checkpoint {folder}: wanted format {FORMAT!r}, got {record['format']!r}")
        files = record["files"]
        for name in sorted(files)[share]:
            if Path(name).name != name or _checksum(folder / name) != files[name]:
                raise UserError(f"checkpoint {folder}: damaged, checksum of {name} is wrong")
        with open(folder / ".metadata", "rb") as file:
            metadata = _MetadataUnpickler(file).load()
        inside = {info.relative_path for info in metadata.storage_data.values()}
        if not inside <= set(files):  # torch would follow any path
            raise pickle.UnpicklingError("it names other files than its own")
    except pickle.UnpicklingError as error:
        raise _refused(folder, error) from error
    except UserError:
        raise
    except Exception as error:  # the parsers raise a dozen types on damaged bytes
        raise _damaged(folder, error) from error
    return _load_file(folder / VALUES), metadata


class _MetadataUnpickler(pickle.Unpickler):
    """Reads torch.distributed.checkpoint's .metadata, which is a pickle, and could otherwise run any code."""

    def find_class(self, module, name):
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or f"{module}.{name}" in METADATA_CLASSES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} in .metadata")


class _FolderReader(dcp.FileSystemReader):
    def __init__(self, folder, metadata):
        super().__init__(folder)
        self.metadata = metadata

    def read_metadata(self, *args, **kwargs):
        """What _MetadataUnpickler made of it; torch's own method runs whatever is in the file."""
        return self.metadata


def _fill(tensors, folder, metadata, group):
    """Read {name: tensor} in place: full tensors on one process, or DTensors on all of `group`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as we asked for
        try:
            dcp.load(tensors, storage_reader=_FolderReader(folder, metadata), process_group=group,
                     no_dist=group is None)
        except dcp.CheckpointException as error:
            raise _damaged(folder, next(iter(error.failures.values()))[0]) from error


def _put_tensors(state, tensors):
    """`state` with the tensors in the places of their names."""
    named = _map_leaves({key: state[key] for key in ("model", "optimizers")},
                        lambda _, leaf: tensors.get(leaf, leaf) if isinstance(leaf, str) else leaf)
    return {**state, **named}


def _read_parts(folder, metadata, state, model, optimizers, group):
    """Read this process's part of a sharded checkpoint into a sharded model and its optimizers."""
    weights = model.state_dict()
    parameters = dict(model.named_parameters())
    saved = metadata.state_dict_metadata
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    saved_shapes = {name: tuple(saved[key].size) for name, key in state["model"].items()}
    if shapes != saved_shapes:
        names = sorted({name for name, _ in shapes.items() ^ saved_shapes.items()})
        raise UserError(f"the checkpoint's weights do not fit this model: {', '.join(names[:5])}")
    _check_optimizers(model, optimizers, state["optimizers"])
    tensors = {key: weights[name] for name, key in state["model"].items()}

    def make_room(path, key):
        if key in saved and key not in tensors:
            parameter = parameters.get(path[2]) if path[1] == "state" else None
            if parameter is not None and parameter.shape == saved[key].size:
                tensors[key] = torch.zeros_like(parameter, dtype=saved[key].properties.dtype)
            else:
                tensors[key] = torch.empty(saved[key].size, dtype=saved[key].properties.dtype)
        return key

    _map_leaves(state["optimizers"], make_room)
    _fill(tensors, folder, metadata, group)
    _restore_optimizers(model, optimizers, _put_tensors(state, tensors)["optimizers"])


def _load_file(path):
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch itself skips the CRCs and would load flipped bits
        if damaged is not None:
            raise UserError(f"checkpoint {path}: damaged, checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise _refused(path, error) from error
    except Exception as error:  # zipfile and torch raise a dozen types on damaged bytes
        raise _damaged(path, error) from error
    if not isinstance(state, dict) or state.get("format") not in (FORMAT, OLD_FORMAT):
        raise ForeignCheckpoint(f"checkpoint {path}: wanted format {FORMAT!r}; this file was not written by "
                                f"train_gpt2.py; name another")
    return state


def _refused(path, error):
    return ForeignCheckpoint(f"checkpoint {path}: refused, it holds more than tensors and plain values "
                             f"({_first_line(error)}), and loading that could run code; "
                             f"wanted a checkpoint written by train_gpt2.py")


def _damaged(path, error):
    return UserError(f"checkpoint {path}: damaged or not one of ours "
                     f"({type(error).__name__}: {_first_line(error)})")


def _first_line(error):
    return (str(error).strip().splitlines() or [""])[0]
