"""
HellaSwag (Zellers et al. 2019): which of four endings continues a text? Scores any checkpoint.

    python hellaswag.py                                    # the newest checkpoint under log*/, both protocols
    python hellaswag.py --checkpoint=log --protocol=harness --dtype=float32
    torchrun --nproc_per_node=8 hellaswag.py               # the same numbers, from eight processes

Reads the 10,042 public validation examples, downloaded once into hellaswag/hellaswag_val.jsonl, or a file in
the same format (--data=FILE). Prints one line per protocol: acc picks the ending with the highest sum of
log-likelihoods, acc_norm the highest sum per unit; the standard error of each is sqrt(p (1 - p) / (n - 1)).

completion  as in build-nanogpt and llm.c: ctx, then " " + ending, tokenized separately; the unit is a token
harness     as in lm-evaluation-harness: "activity_label: ctx_a Ctx_b" and the ending, both without WikiHow's
            bracket tags, tokenized together; the unit is a character

OpenAI's GPT-2 124M: completion acc 0.2859, acc_norm 0.2955 (reported by build-nanogpt); harness 0.2892 and
0.3114 (reported by lm-evaluation-harness). Guessing gives 0.25. No prompt starts with <|endoftext|>.

Texts longer than the block lose tokens at the start: the model reads the last block_size tokens before the
final one, which is only predicted (the harness's rule). Only tokens it predicts are scored and counted.

In float32 the score of an example does not depend on batch size, number of processes or order, up to the
rounding of matrix products. Lower precision is several times faster, and near-ties may flip. Between equal
scores the first ending wins; identical endings are scored once, so that they tie exactly.

Each example is one row: its context, computed once, then the four endings, each at the positions right after
the context and hidden from the others by a mask.

Shapes: B rows, T columns, n examples.
"""

import hashlib
import json
import math
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from bpe import GPT2_SHA256, Tokenizer
from configurator import Between, OneOf, PathName, UserError, configure
from convert_hf import open_model
from device import Device, resolve_device
from files import check, write_atomically
from model import GPT
from ranks import Ranks

checkpoint: PathName = ""  # a file, FOLDER (its newest), FOLDER:best, gpt2, ...; empty = newest of log*/
data: PathName = ""  # a .jsonl file in the format of the public one; empty = the public one
protocol: OneOf("completion", "harness", "both") = "both"  # how the questions are asked
device = "auto"  # auto|cpu|cuda|cuda:1|mps
dtype: OneOf("auto", "float32", "bfloat16", "float16") = "auto"  # of the matrix products
forward_tokens: Between(1, 2**31) = 16_384  # per process and forward pass, padding included
limit: Between(0, 2**31) = 0  # only the first N examples; 0 = all

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
PUBLIC_FILE = Path("hellaswag", "hellaswag_val.jsonl")
PROTOCOLS = ("completion", "harness")
N_ENDINGS = 4
RECORD = {"activity_label": str, "ctx": str, "ctx_a?": str, "ctx_b?": str, "endings": [str] * N_ENDINGS,
          "label": Between(0, N_ENDINGS - 1)}


# ---- the data ------------------------------------------------------------------


def find_data(data: str, ranks: Ranks, setting: str = "data") -> Path:
    """The file to score: `data` or, if that is empty, the public one, which is downloaded and verified.

    All processes must call this. Raises UserError on all of them if any cannot read the file; the message
    names --`setting`.
    """
    path = Path(data or PUBLIC_FILE)
    for my_turn in (ranks.master, not ranks.master):  # rank 0 first, as it may download
        problems = ranks.gather(_problem_with(path, public=not data) if my_turn else "")
        if any(problems):
            raise UserError(f"{next(filter(None, problems))}; give --{setting}=FILE, or put the public file "
                            f"at {PUBLIC_FILE}")
    return path


def _problem_with(path, public):
    """Why this process cannot read the file, or ""."""
    try:
        download = public and not path.is_file()
        content = _download() if download else path.read_bytes()
        if public and (digest := hashlib.sha256(content).hexdigest()) != SHA256:
            return f"{URL if download else path} has sha256 {digest}, not {SHA256}"
        if download:
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, content)
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return ""


def _download():
    from huggingface_hub import get_session  # here, because only this needs it

    from hub import retry
    try:
        return retry(URL, lambda: get_session().get(URL, timeout=30).raise_for_status().content, attempts=3)
    except UserError as error:  # its advice is for the hub
        raise UserError(f"HellaSwag could not be downloaded from {URL} ({error.__cause__})") from error


class Example(NamedTuple):
    """A question in tokens (int64)."""
    context: np.ndarray  # (at least 1,)
    endings: list[np.ndarray]  # four of (at least 1,)
    characters: list[int]  # of each ending, without the space before it
    label: int  # index of the right ending


class Examples(NamedTuple):
    """The questions of a file."""
    protocol: str
    items: list[Example]
    notes: list[str]  # why the scores cannot be compared with published ones


def examples_for_training(data: str, tokenizer: Tokenizer, ranks: Ranks) -> Examples | None:
    """The examples of `data` or of the public file, protocol completion. If the public file cannot be
    downloaded, warns and returns None, because that must not end a run of days."""
    try:
        path = find_data(data, ranks, "hellaswag_data")
    except UserError as error:  # on all processes
        if data:
            ranks.fail(error)
        if ranks.master:
            print(f"warning: this run has no HellaSwag scores: {error}; or type --hellaswag_interval=0",
                  flush=True)
        return None
    return ranks.on_all(read_examples, path, tokenizer, "completion")


def read_examples(path: str | Path, tokenizer: Tokenizer, protocol: str, limit: int = 0) -> Examples:
    """The examples of a .jsonl file, or its first `limit`, tokenized for `protocol` (completion|harness).

    Raises UserError with file, line and reason for a line that is not an example.
    """
    content = Path(path).read_bytes()
    lines = [(number, line) for number, line in enumerate(content.split(b"\n"), start=1) if line.strip()]
    kept, items, harness = lines[:limit or None], [], protocol == "harness"
    if not kept:
        raise UserError(f"{path}: no examples found; name another file")
    for number, line in kept:
        try:
            context, endings, label = _read_line(line, f"{path}, line {number}", protocol)
        except UserError as error:
            raise UserError(f"{error}; fix or remove this line") from error
        ids = _tokenize(context, endings, tokenizer, together=harness)
        items.append(Example(*ids, [len(ending) for ending in endings], label))
    notes = {
        f"{path} is not the public file": hashlib.sha256(content).hexdigest() != SHA256,
        f"only the first {len(kept):,} of {len(lines):,} examples": len(kept) < len(lines),
        f"the tokenizer {tokenizer.name} is not GPT-2's": tokenizer.sha256 != GPT2_SHA256,
        "without ctx_a and ctx_b in the file, ctx is used":
            harness and any(b'"ctx_a"' not in line for _, line in kept),
    }
    return Examples(protocol, items, [f"{reason}: not comparable with published numbers"
                                      for reason, applies in notes.items() if applies])


def _read_line(line, place, protocol):
    """(context, endings, label) of a line, in text. Raises UserError, which starts with `place`."""
    try:
        record = json.loads(line)
        json.dumps(record, ensure_ascii=False).encode()  # a text may hold half a surrogate pair
    except (ValueError, RecursionError) as error:  # JSON and Unicode errors are ValueErrors
        raise UserError(f"{place}: not valid JSON ({error})") from error
    if isinstance(record, dict) and record.get("label") in tuple("0123"):  # as in the hub's copy of the data
        record["label"] = int(record["label"])
    check(record, RECORD, place)
    if ("ctx_a" in record) != ("ctx_b" in record):
        raise UserError(f"{place}: only one of ctx_a and ctx_b is there")
    context, endings = record["ctx"], record["endings"]
    if protocol == "harness":
        if "ctx_a" in record:
            context = f"{record['ctx_a']} {record['ctx_b'].capitalize()}"
        context = clean_wikihow(f"{record['activity_label']}: {context}")
        endings = [clean_wikihow(ending) for ending in endings]
    if not all(text.strip() for text in (context, *endings)):
        raise UserError(f"{place}: the context or an ending has no text for the protocol {protocol}")
    return context, endings, record["label"]


def clean_wikihow(text: str) -> str:
    """The text without the bracket tags of WikiHow's examples, by the harness's steps: spaces that removed
    tags leave at the ends stay."""
    without_tags = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return without_tags.replace("  ", " ")


def _tokenize(context, endings, tokenizer, together):
    """(context, endings) in ids (int64).

    `together` encodes each ending after its context, whose trailing white space goes to the ending, and
    takes as the ending's tokens whatever follows as many tokens as the context has alone.
    """
    start = tokenizer.encode(context.rstrip() if together else context).astype(np.int64)
    prefix, n = (context, len(start)) if together else ("", 0)
    return start, [tokenizer.encode(f"{prefix} {ending}")[n:].astype(np.int64) for ending in endings]


# ---- the score -----------------------------------------------------------------


class Result(NamedTuple):
    """Accuracies over n examples, with their standard errors."""
    acc: float
    acc_norm: float
    acc_stderr: float
    acc_norm_stderr: float
    n: int
    log_likelihoods: np.ndarray  # (n, 4) float64, nats: the sum over each ending's tokens


class Row(NamedTuple):
    """Endings that share a context, each starting with the context's last token, which predicts its first."""
    context: np.ndarray  # ids, without the last
    endings: list[np.ndarray]  # ids
    slots: list[int]  # 4 * example + index of each ending

    @property
    def length(self) -> int:
        """Columns it needs in a batch."""
        return len(self.context) + sum(len(ending) - 1 for ending in self.endings)


def make_rows(items: list[Example], block_size: int) -> tuple[list[Row], np.ndarray]:
    """(rows, slots): what the model has to read, and for each of the 4n endings the slot that holds its
    score: equal endings share one. An example is one row, unless its longer endings shorten the context."""
    rows, slots = [], np.arange(N_ENDINGS * len(items))
    for i, example in enumerate(items):
        by_context, seen = {}, {}
        for slot, ending in enumerate(example.endings, start=N_ENDINGS * i):
            text = np.concatenate((example.context, ending))[-(block_size + 1):]
            start = len(text) - min(len(ending), block_size) - 1  # the token before the ending
            slots[slot] = seen.setdefault((start, text.tobytes()), slot)
            if slots[slot] == slot:
                row = by_context.setdefault(text[:start].tobytes(), Row(text[:start], [], []))
                row.endings.append(text[start:])
                row.slots.append(slot)
        rows += by_context.values()
    return rows, slots


def make_batches(rows: list[Row], forward_tokens: int) -> list[list[Row]]:
    """Batches of one row or more, padded to at most forward_tokens; the longest first, so that running out of
    memory happens at once or never."""
    batches = []
    for row in sorted(rows, key=lambda row: -row.length):
        if not batches or (len(batches[-1]) + 1) * batches[-1][0].length > forward_tokens:
            batches.append([])
        batches[-1].append(row)
    return batches


def score_batch(model: GPT, batch: list[Row], dev: Device) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    """For each token of a batch: is it scored, for which slot, and its loss in nats, each (B, T). The losses
    stay on the device, so that a GPU need not wait for the next batch."""
    B, T = len(batch), batch[0].length
    idx, position, target, slot, segment = np.zeros((5, B, T), np.int64)
    target.fill(-100)
    segment.fill(-1)  # padding attends to contexts and padding, as a query needs a key; endings ignore it
    for b, row in enumerate(batch):
        column = len(row.context)
        idx[b, :column], position[b, :column], segment[b, :column] = row.context, np.arange(column), 0
        for i, ending in enumerate(row.endings, start=1):
            part = slice(column, column + len(ending) - 1)
            idx[b, part], target[b, part] = ending[:-1], ending[1:]
            position[b, part] = np.arange(len(row.context), len(row.context) + len(ending) - 1)
            slot[b, part], segment[b, part] = row.slots[i - 1], i
            column = part.stop
    query = dev.to_device(segment)[:, :, None]  # (B, T, 1)
    key = query.mT  # (B, 1, T)
    column = torch.arange(T, device=dev.device)
    mask = ((key == query) | (key == 0)) & (column <= column[:, None])  # (B, T, T)
    losses = model(dev.to_device(idx), dev.to_device(target), reduction="none",
                   position=dev.to_device(position), mask=mask[:, None])  # (B, T)
    return target != -100, slot, losses


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def evaluate(model: GPT, examples: Examples, dev: Device, forward_tokens: int = 16_384) -> Result:
    """The score of an uncompiled model (compiled ones have fixed shapes), in eval mode and `dev`'s dtype.

    If torch.distributed is initialized, all processes must call this with the same examples; they share the
    batches, and all return the same result. Raises UserError if a score is not finite.
    """
    distributed, was_training = dist.is_initialized(), model.training
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    rows, slots = make_rows(examples.items, model.config.block_size)
    batches, scored = make_batches(rows, forward_tokens), []
    # the same number of forward passes on every process: all of them gather sharded parameters
    turns = range(rank, math.ceil(len(batches) / world_size) * world_size, world_size)
    model.eval()
    try:
        with dev.changing_shapes(), dev.autocast():  # around all batches: autocast caches converted weights
            for i in tqdm(turns, desc=examples.protocol, unit="batch", leave=False,
                          disable=rank != 0 or not sys.stderr.isatty()):
                batch = score_batch(model, batches[min(i, len(batches) - 1)], dev)
                scored += [batch] if i < len(batches) else []
    finally:
        model.train(was_training)
    scores = np.zeros(len(slots))  # (4n,)
    for is_scored, slot, losses in scored:
        np.subtract.at(scores, slot[is_scored], losses.cpu().numpy()[is_scored].astype(np.float64))
    if distributed:
        on_device = torch.from_numpy(scores).to(dev.device if dev.type == "cuda" else "cpu")
        dist.all_reduce(on_device)
        scores = on_device.cpu().numpy()
    sums = scores[slots].reshape(-1, N_ENDINGS)  # (n, 4)
    if not np.isfinite(sums).all():
        raise UserError(f"{np.sum(~np.isfinite(sums))} of {sums.size} log-likelihoods are not finite; try "
                        f"--dtype=float32, or an earlier checkpoint")
    T, harness = model.config.block_size, examples.protocol == "harness"
    units = [example.characters if harness else [min(len(ending), T) for ending in example.endings]
             for example in examples.items]
    labels, n = [example.label for example in examples.items], len(sums)
    shares = [float((score.argmax(axis=1) == labels).mean()) for score in (sums, sums / units)]
    # standard error from the variance of the sample, as in lm-evaluation-harness
    errors = [math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else math.nan for p in shares]
    return Result(*shares, *errors, n, sums)


def format_result(protocol: str, result: Result) -> str:
    """One line for people."""
    return (f"{protocol:10s} | acc {result.acc:.4f} +- {result.acc_stderr:.4f} | "
            f"acc_norm {result.acc_norm:.4f} +- {result.acc_norm_stderr:.4f} | n {result.n:,}")


def main() -> None:
    ranks = Ranks()
    if ranks.many and ":" in device:
        raise UserError(f"device={device} is one device for {ranks.world_size} processes; use --device=cuda")
    dev = resolve_device(device, dtype, local_rank=ranks.local_rank)
    ranks.connect(dev.device)
    path = find_data(data, ranks)
    _, state, model, tok = open_model(checkpoint, dev.device)
    names = PROTOCOLS if protocol == "both" else (protocol,)
    sets = [read_examples(path, tok, name, limit) for name in names]  # all errors before the first score
    if ranks.master:
        print(f"step {state['step']}, {model.num_params():,} parameters | {dev.name} ({dev.device}), "
              f"{str(dev.dtype).removeprefix('torch.')}, processes: {ranks.world_size}", flush=True)
    for examples in sets:
        t0 = time.perf_counter()
        line = format_result(examples.protocol, evaluate(model, examples, dev, forward_tokens))
        if ranks.master:
            print(f"{line} | {time.perf_counter() - t0:.1f} s", flush=True)
    if ranks.master:
        for note in dict.fromkeys(note for examples in sets for note in examples.notes):
            print(f"note: {note}")
    ranks.shutdown()
    ranks.exit()


if __name__ == "__main__":
    configure(globals())
    main()
