"""
Checkpoints: written whole or not at all, loaded without running code, enough on their own to generate.

    path = save_checkpoint(log_dir, step, state)        # LOG_DIR/ckpt_0000100.pt
    state = load_checkpoint("log")                      # a file, or a folder whose newest whole one is meant
    model, state = load_model("log", device)

A checkpoint is a dict of tensors and plain containers:
    model, optimizer, scaler   state dicts; model has the keys of the bare GPT, compiled or not, DDP or not
    step                       optimizer steps done
    train_loss, val_loss       nats per token: of the last step's batch; after it, on the validation tokens
    best                       {"step", "val_loss"} of the best checkpoint so far
    config, model_config       the script's settings as resolved; the fields of GPTConfig
    tokenizer                  {"name", "sha256", "rank_file"}; rank_file is None for GPT-2's own
    data                       fingerprint of the training tokens
    provenance                 git revision, torch, device, number of processes
No RNG state is in it, because no RNG state outlives a step: data order and dropout masks are functions of the
seed and the step, so that a resume is exact by construction and at another number of processes too.
"""

import dataclasses
import os
import pickle
import re
import sys
import zipfile
from pathlib import Path

import torch

from bpe import GPT2_SHA256, Tokenizer, load_tokenizer, tokenizer_from_ranks
from configurator import UserError
from model import GPT, GPTConfig

FORMAT = "gpt2-checkpoint-1"


def save_checkpoint(log_dir: str | Path, step: int, state: dict) -> Path:
    """Write `state` to LOG_DIR/ckpt_{step:07d}.pt by way of a temporary name; a crash leaves the old files.

    Raises UserError when the disk is full or the folder cannot be written.
    """
    path = Path(log_dir) / f"ckpt_{step:07d}.pt"
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError) and "inline_container" not in str(error):
            raise  # of the device, say; torch's zip writer turns a full disk into a RuntimeError too
        raise UserError(f"checkpoint {path} could not be written ({error}); free disk space, then continue "
                        f"with --resume; the checkpoints already in {log_dir} are whole") from error
    return path


def prune_checkpoints(log_dir: str | Path, keep: int, best_step: int | None) -> None:
    """Remove all but the newest `keep` >= 1 checkpoints and the one at `best_step`."""
    for path in list_checkpoints(log_dir)[:-keep]:
        if step_of(path) != best_step:
            path.unlink()


def list_checkpoints(log_dir: str | Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    found = (path for path in Path(log_dir).glob("ckpt_*.pt") if re.fullmatch(r"ckpt_\d+\.pt", path.name))
    return sorted(found, key=step_of)


def load_checkpoint(path: str | Path) -> dict:
    """The checkpoint in a file, or the newest whole one in a folder, on the CPU.

    A damaged file is a UserError; in a folder it is reported on stderr and the one before it is used.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"checkpoint {path}: not there; give a .pt file or a log_dir, "
                        f"or train one with make demo")
    if path.is_file():
        return _load_file(path)
    candidates = list_checkpoints(path)
    for candidate in reversed(candidates):
        try:
            return _load_file(candidate)
        except UserError as error:
            print(f"warning: {error}; trying the one before", file=sys.stderr, flush=True)
    found = f"{len(candidates)} damaged ones" if candidates else "none"
    raise UserError(f"checkpoint {path}: wanted a folder with a whole ckpt_*.pt, got {found}; "
                    f"name another, or train one with make demo")


def load_model(path: str | Path, device: str | torch.device = "cpu") -> tuple[GPT, dict]:
    """The model of a checkpoint, in eval mode on `device`, and the checkpoint itself (on the CPU)."""
    state = load_checkpoint(path)
    try:
        model = GPT(GPTConfig(**state["model_config"]))
        model.load_state_dict(state["model"], strict=True)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"checkpoint {path}: its tensors do not fit its own model_config: {error}") from error
    return model.to(device).eval(), state


def checkpoint_tokenizer(state: dict) -> Tokenizer:
    """The tokenizer a checkpoint was trained with: its own rank file, or GPT-2's."""
    saved = state["tokenizer"]
    if saved["rank_file"] is None:
        return load_tokenizer("gpt2")
    return tokenizer_from_ranks(saved["rank_file"].numpy().tobytes(), saved["name"])


def describe_tokenizer(tokenizer: Tokenizer) -> dict:
    """What a checkpoint keeps of a tokenizer; the inverse of `checkpoint_tokenizer`."""
    own = tokenizer.sha256 != GPT2_SHA256
    rank_file = torch.frombuffer(bytearray(tokenizer.rank_file), dtype=torch.uint8) if own else None
    return {"name": tokenizer.name, "sha256": tokenizer.sha256, "rank_file": rank_file}


def describe_model(model: GPT) -> dict:
    """The fields of the model's GPTConfig, as plain values."""
    return dataclasses.asdict(model.config)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.stem.removeprefix("ckpt_"))


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
        raise UserError(f"checkpoint {path}: refused, it holds more than tensors and plain values, "
                        f"and loading that could run code; "
                        f"wanted a checkpoint written by train_gpt2.py") from error
    except Exception as error:  # zipfile and torch raise a dozen types on damaged bytes
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"checkpoint {path}: damaged or not one of ours "
                        f"({type(error).__name__}: {reason})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"checkpoint {path}: wanted format {FORMAT!r}; "
                        f"this file was not written by train_gpt2.py")
    return state
