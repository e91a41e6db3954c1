"""
HellaSwag (Zellers et al. 2019): which of four endings continues a text? Score any checkpoint.

    python hellaswag.py                                    # the newest checkpoint under log*/, both protocols
    python hellaswag.py --checkpoint=log --protocol=harness --dtype=float32
    torchrun --nproc_per_node=8 hellaswag.py               # the same numbers, from eight processes

Reads one checkpoint and the 10,042 public validation examples, kept as hellaswag/hellaswag_val.jsonl under
the working directory and downloaded when they are not there, or another file in their format (--data=FILE).
Prints a line per protocol: acc and acc_norm, each with its standard error sqrt(p (1 - p) / (n - 1)). acc
takes the ending with the highest sum of log-likelihoods, acc_norm that with the highest sum per unit.

completion  as build-nanogpt and llm.c: ctx as it is, " " + ending, the two tokenised apart; the unit is a
            token of the ending
harness     as lm-evaluation-harness: "activity_label: ctx_a Ctx_b" and the ending, both without WikiHow's
            bracket tags, tokenised together; the unit is a character of the ending

OpenAI's GPT-2 124M: completion 0.2859 and acc_norm 0.2955 (build-nanogpt's figures), harness 0.2892 and
0.3114 (lm-evaluation-harness's); guessing: 0.25. Neither protocol begins with <|endoftext|>.

Where a context and an ending do not fit the block size, the context is cut from the left: the model reads
the last block_size of their tokens, not counting the final one, which is only predicted (the harness's
rule). Of an ending longer than a block the last block_size tokens are scored, and they alone count in
completion's acc_norm.

In float32 a score is that of the example alone, whatever the batches, the processes and the order, up to the
rounding of matrix products; fewer bits are several times faster and tip some near ties. Of endings that are
equally good the first is taken; those with equal tokens are scored once.

In a batch, a row is an example: the four endings follow one another after a context that is computed once,
their positions continue the context's, and a mask hides them from each other.

Shapes: B rows, T columns, n examples.
"""

import hashlib
import http.client
import json
import math
import re
import sys
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from bpe import GPT2_SHA256, Tokenizer
from checkpoint import build_model, checkpoint_tokenizer, newest_checkpoint
from configurator import Between, OneOf, PathName, UserError, configure
from convert_hf import load_any
from device import Device, resolve_device
from files import check, write_atomically
from model import GPT
from ranks import Ranks

checkpoint: PathName = ""  # a file, FOLDER (its newest), FOLDER:best, gpt2, ...; empty = newest of log*/
data: PathName = ""  # a .jsonl file in the format of the public one; empty = the public one
protocol: OneOf("completion", "harness", "both") = "both"  # how the questions are put
device = "auto"  # auto|cpu|cuda|cuda:1|mps
dtype: OneOf("auto", "float32", "bfloat16", "float16") = "auto"  # of the matrix products
batch_tokens: Between(1, 2**31) = 16_384  # tokens per forward pass and process, padding included
limit: Between(0, 2**31) = 0  # only the first N examples; 0 = all

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
PUBLIC_FILE = Path("hellaswag", "hellaswag_val.jsonl")
ATTEMPTS = 3  # to download
PROTOCOLS = ("completion", "harness")
N_ENDINGS = 4
RECORD = {"activity_label": str, "ctx": str, "ctx_a?": str, "ctx_b?": str, "endings": [str],
          "label": Between(0, N_ENDINGS - 1)}


# ---- the data ------------------------------------------------------------------


def find_data(data: str = "", setting: str = "data") -> Path:
    """The file to score: `data`, or where that is empty the public one, downloaded if need be and checked.

    Where torch.distributed is initialised, all processes must call this; rank 0 goes first. Raises UserError,
    in all of them at once, where the file cannot be had or is not the public one; it speaks of --`setting`.
    """
    if not dist.is_initialized():
        failure = _failure_to_find(data, setting)
        if failure is not None:
            raise UserError(failure)
        return Path(data) if data else PUBLIC_FILE
    failure, failures = [None], [None] * dist.get_world_size()
    if dist.get_rank() == 0:
        failure = [_failure_to_find(data, setting)]
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is None:  # other nodes may have other disks
        dist.all_gather_object(failures, _failure_to_find(data, setting))
    failure = next((text for text in failure + failures if text is not None), None)
    if failure is not None:
        raise UserError(failure)
    return Path(data) if data else PUBLIC_FILE


def _failure_to_find(data, setting):
    """Why this process has not the file, or None."""
    try:
        if data:
            with open(data, "rb"):
                return None
        if not PUBLIC_FILE.is_file():
            _download(setting)
        got = hashlib.sha256(PUBLIC_FILE.read_bytes()).hexdigest()
    except UserError as error:
        return str(error)
    except OSError as error:
        return (f"{data or PUBLIC_FILE}: {error.strerror}; give --{setting}=FILE of a readable file in the "
                f"format of {URL}")
    if got != SHA256:
        return (f"{PUBLIC_FILE}: got sha256 {got}, wanted {SHA256}; remove it, and it is downloaded again, "
                f"or score it as a file of your own with --{setting}={PUBLIC_FILE}")
    return None


def _download(setting):
    from hub import retry  # and with it huggingface_hub, which nothing else here needs

    def attempt() -> bytes:
        try:
            with urllib.request.urlopen(URL, timeout=30) as response:
                return response.read()
        except http.client.HTTPException as error:  # no OSError: the answer was cut short
            raise ConnectionError(f"{type(error).__name__}: {error}") from error

    remedy = f"put it at {PUBLIC_FILE}, or name a copy with --{setting}=FILE"
    try:
        content = retry(f"HellaSwag from {URL}", attempt, attempts=ATTEMPTS)
    except UserError as error:
        raise UserError(f"HellaSwag is not at {PUBLIC_FILE} and could not be downloaded from {URL} "
                        f"({error.__cause__}); {remedy}") from error
    got = hashlib.sha256(content).hexdigest()
    if got != SHA256:
        raise UserError(f"{URL}: got {len(content):,} bytes of sha256 {got}, wanted {SHA256}; {remedy}")
    PUBLIC_FILE.parent.mkdir(exist_ok=True)
    write_atomically(PUBLIC_FILE, content)


def examples_for_training(data: str, tokenizer: Tokenizer, ranks: Ranks) -> "Examples | None":
    """The examples of `data` or of the public file, by completion; None, after a warning, if the latter
    cannot be downloaded: that must not end a run of days."""
    try:
        path = find_data(data, "hellaswag_data")
    except UserError as error:  # on all processes alike
        if data:
            ranks.fail(error)
        if ranks.master:
            print(f"warning: this run has no HellaSwag scores: {error}; or type --hellaswag_interval=0",
                  flush=True)
        return None
    return ranks.on_all(read_examples, path, tokenizer, "completion")


class Example(NamedTuple):
    """One question in tokens (int64)."""
    context: np.ndarray  # (at least 1,)
    endings: list[np.ndarray]  # four of (at least 1,)
    characters: list[int]  # of each ending, without the space in front
    label: int  # index of the right ending


class Examples(NamedTuple):
    """What `read_examples` made of a file."""
    protocol: str
    items: list[Example]
    notes: list[str]  # why the numbers are not to be compared with those that others publish


def read_examples(path: str | Path, tokenizer: Tokenizer, protocol: str, limit: int = 0) -> Examples:
    """The examples of a .jsonl file, or its first `limit`, in the tokens of `protocol` (completion|harness).

    Raises UserError with the file, the line and the reason where one is not an example.
    """
    content = Path(path).read_bytes()
    lines = [(number, line) for number, line in enumerate(content.split(b"\n"), start=1) if line.strip()]
    kept = lines[:limit] if limit else lines
    if not kept:
        raise UserError(f"{path}: no examples in it; name another file")
    notes = []
    if hashlib.sha256(content).hexdigest() != SHA256:
        notes.append(f"{path} is not the public file: not comparable with published numbers")
    if len(kept) < len(lines):
        notes.append(f"the first {len(kept):,} of {len(lines):,} examples: not comparable with published "
                     f"numbers")
    if tokenizer.sha256 != GPT2_SHA256:
        notes.append(f"the tokenizer {tokenizer.name} is not GPT-2's: not comparable with published "
                     f"numbers")
    items, whole = [], False
    for number, line in kept:
        place = f"{path}, line {number}"
        record = _parse(line, place)
        if protocol == "harness":
            context, endings = _harness_texts(record)
            whole |= "ctx_a" not in record
        else:
            context, endings = record["ctx"], record["endings"]
        names = ["the context", *(f"ending {i}" for i in range(N_ENDINGS))]
        for name, text in zip(names, (context, *endings)):
            if not text.strip():
                raise UserError(f"{place}: {name} is empty in the protocol {protocol}; wanted text; "
                                f"fix the line or remove it")
        items.append((context, endings, record["label"]))
    if whole:
        notes.append("no ctx_a and ctx_b in the file, ctx stands for them: not comparable with "
                     "lm-evaluation-harness's numbers")
    tokens = _tokenise(items, tokenizer, together=protocol == "harness")
    return Examples(protocol, [Example(*ids, [len(text) for text in endings], label)
                               for ids, (_, endings, label) in zip(tokens, items)], notes)


def _parse(line, place):
    """The record in a line of the file, checked; errors speak of `place`."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise UserError(f"{place}: not JSON ({error}); wanted an object on each line") from error
    if isinstance(record, dict) and record.get("label") in tuple("0123"):  # as in the hub's copy of the data
        record["label"] = int(record["label"])
    try:
        check(record, RECORD, place)
        if ("ctx_a" in record) != ("ctx_b" in record):
            raise UserError(f"{place}: one of ctx_a and ctx_b without the other, wanted both or none")
        if len(record["endings"]) != N_ENDINGS:
            raise UserError(f"{place}: {len(record['endings'])} endings, wanted {N_ENDINGS}")
        texts = [record.get(key, "") for key in ("activity_label", "ctx", "ctx_a", "ctx_b")]
        if re.search("[\ud800-\udfff]", "".join(texts + record["endings"])):
            raise UserError(f"{place}: half a surrogate pair in a text, wanted complete characters")
    except UserError as error:
        raise UserError(f"{error}; fix the line or remove it") from error
    return record


def _harness_texts(record):
    """(context, endings) as lm-evaluation-harness gives them to a model, the space between them left out."""
    context = f"{record['ctx_a']} {record['ctx_b'].capitalize()}" if "ctx_a" in record else record["ctx"]
    context = clean_wikihow(f"{record['activity_label']}: {context}")
    return context, [clean_wikihow(ending) for ending in record["endings"]]


def clean_wikihow(text: str) -> str:
    """The text without the bracket tags of WikiHow's part of the data, step by step as the harness does it:
    the spaces that removed tags leave at the edges stay."""
    without_tags = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return without_tags.replace("  ", " ")


def _tokenise(items, tokenizer, together):
    """[(context, endings) in ids (int64)] of [(context, endings, label) in text], all in one call.

    `together` encodes a context and its ending as one text, white space at the end of the context going to
    the ending, and takes for the ending what follows as many tokens as the context has alone.
    """
    texts = []
    for context, endings, _ in items:
        stripped = context.rstrip() if together else context
        front = context[len(stripped):] + " "
        texts += [stripped, *((stripped if together else "") + front + ending for ending in endings)]
    encoded = [text.encode() for text in texts]
    offsets = np.cumsum([0, *map(len, encoded)])
    ids, edges = tokenizer.encode_documents(np.frombuffer(b"".join(encoded), np.uint8), offsets)
    ids = np.split(ids.astype(np.int64), edges[1:-1])
    tokens = []
    for i in range(0, len(ids), 1 + N_ENDINGS):
        context, *endings = (document[1:] for document in ids[i : i + 1 + N_ENDINGS])  # without EOT
        tokens.append((context, [ending[len(context):] if together else ending for ending in endings]))
    return tokens


# ---- the score -----------------------------------------------------------------


class Result(NamedTuple):
    """The score of a model. Accuracies are shares of n, errors their standard errors."""
    acc: float
    acc_norm: float
    acc_stderr: float
    acc_norm_stderr: float
    n: int
    log_likelihoods: np.ndarray  # (n, 4) float64, nats: the sum over each ending's tokens


class Row(NamedTuple):
    """Endings that share a context. Each begins with the context's last token, which predicts its first."""
    context: np.ndarray  # ids of the context but its last
    endings: list[np.ndarray]  # ids, the context's last in front
    slots: list[int]  # 4 * example + ending of each

    @property
    def length(self) -> int:
        """Columns of it in a batch."""
        return len(self.context) + sum(len(ending) - 1 for ending in self.endings)


def make_rows(items: list[Example], block_size: int) -> tuple[list[Row], np.ndarray, np.ndarray]:
    """(rows, slots, lengths): what the model must read to score the endings, and how it becomes scores.

    slots (4n,) is where among 4n scores that of each ending is found: equal ones share a slot. lengths (4n,)
    is how many of its tokens are scored. An example is one row, unless longer endings have its context cut
    where shorter ones do not.
    """
    rows, slots, lengths = [], np.arange(N_ENDINGS * len(items)), np.empty(N_ENDINGS * len(items), np.int64)
    for i, example in enumerate(items):
        by_context, seen = {}, {}
        for slot, ending in enumerate(example.endings, start=N_ENDINGS * i):
            text = np.concatenate((example.context, ending))[-(block_size + 1):]
            lengths[slot] = min(len(ending), block_size)
            start = len(text) - lengths[slot] - 1  # of the ending and the token in front of it
            slots[slot] = seen.setdefault((start, text.tobytes()), slot)
            if slots[slot] == slot:
                row = by_context.setdefault(text[:start].tobytes(), Row(text[:start], [], []))
                row.endings.append(text[start:])
                row.slots.append(slot)
        rows += by_context.values()
    return rows, slots, lengths


def make_batches(rows: list[Row], batch_tokens: int) -> list[list[Row]]:
    """The rows, longest first, so that memory runs out at once if at all, in batches of at most batch_tokens
    columns with the padding (or one row)."""
    batches = []
    for row in sorted(rows, key=lambda row: -row.length):
        if not batches or (len(batches[-1]) + 1) * batches[-1][0].length > batch_tokens:
            batches.append([])
        batches[-1].append(row)
    return batches


def score_batch(model: GPT, batch: list[Row], dev: Device) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    """Of a batch: whether a token is scored, for which slot, and its loss in nats, (B, T) each. The losses
    stay on the device: a GPU that is asked for its results stands still."""
    B, T = len(batch), batch[0].length
    idx, position, target, slot, segment = np.zeros((5, B, T), np.int64)
    target.fill(-100)
    segment.fill(-1)  # padding: sees contexts and padding, for a query must see something; no ending sees it
    for b, row in enumerate(batch):
        column = len(row.context)
        idx[b, :column], position[b, :column], segment[b, :column] = row.context, np.arange(column), 0
        for i, ending in enumerate(row.endings):
            part = slice(column, column + len(ending) - 1)
            idx[b, part], target[b, part] = ending[:-1], ending[1:]
            position[b, part] = np.arange(len(row.context), len(row.context) + len(ending) - 1)
            slot[b, part], segment[b, part] = row.slots[i], i + 1
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
def evaluate(model: GPT, examples: Examples, dev: Device, batch_tokens: int = 16_384) -> Result:
    """The score of a model, in eval mode meanwhile, in the dtype of `dev`.

    Where torch.distributed is initialised, all processes must call this with the same examples: each scores a
    part of the batches, and all return the same. `model` is not a compiled one, whose shapes are fixed.
    Raises UserError where a score is not finite.
    """
    together = dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    rows, slots, lengths = make_rows(examples.items, model.config.block_size)
    batches = make_batches(rows, batch_tokens)
    scored = []
    was_training = model.training
    model.eval()
    try:
        # around all batches: autocast keeps the weights it has converted
        with dev.changing_shapes(), dev.autocast():
            # not one forward less on any process: where parameters are sharded, all gather them together
            for i in tqdm(range(rank, math.ceil(len(batches) / world_size) * world_size, world_size),
                          desc=examples.protocol, unit="batch", leave=False,
                          disable=rank != 0 or not sys.stderr.isatty()):
                batch = score_batch(model, batches[min(i, len(batches) - 1)], dev)
                scored += [batch] if i < len(batches) else []
    finally:
        model.train(was_training)
    scores = np.zeros(len(slots))  # (4n,)
    for is_scored, slot, losses in scored:
        np.subtract.at(scores, slot[is_scored], losses.cpu().numpy()[is_scored].astype(np.float64))
    if together:
        on_device = torch.from_numpy(scores).to(dev.device if dev.type == "cuda" else "cpu")
        dist.all_reduce(on_device)
        scores = on_device.cpu().numpy()
    sums = scores[slots].reshape(-1, N_ENDINGS)  # (n, 4)
    if not np.isfinite(sums).all():
        raise UserError(f"{np.sum(~np.isfinite(sums))} of {sums.size} log-likelihoods are not finite; try "
                        f"--dtype=float32, or a checkpoint of an earlier step")
    if examples.protocol == "harness":
        units = np.array([example.characters for example in examples.items])  # (n, 4)
    else:
        units = lengths.reshape(-1, N_ENDINGS)
    labels = np.array([example.label for example in examples.items])
    n = len(labels)
    acc = float((sums.argmax(axis=1) == labels).mean())  # the first of equals
    acc_norm = float(((sums / units).argmax(axis=1) == labels).mean())
    return Result(acc, acc_norm, _stderr(acc, n), _stderr(acc_norm, n), n, sums)


def _stderr(p, n):
    """Standard error of a share p of n, from the sample's variance, as lm-evaluation-harness has it."""
    return math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else math.nan


def format_result(protocol: str, result: Result) -> str:
    """A line for people."""
    return (f"{protocol:10s} | acc {result.acc:.4f} +- {result.acc_stderr:.4f} | "
            f"acc_norm {result.acc_norm:.4f} +- {result.acc_norm_stderr:.4f} | n {result.n:,}")


def main() -> None:
    ranks = Ranks()
    rank, world_size = ranks.rank, ranks.world_size
    if world_size > 1 and ":" in device:
        raise UserError(f"device={device} is one device for {world_size} processes; give --device=cuda")
    dev = resolve_device(device, dtype, local_rank=ranks.local_rank)
    ranks.connect(dev.device)
    path = find_data(data)
    source = checkpoint or newest_checkpoint()
    state = load_any(source)
    model = build_model(state, str(source)).to(dev.device)
    tok = checkpoint_tokenizer(state)
    names = PROTOCOLS if protocol == "both" else (protocol,)
    sets = [read_examples(path, tok, name, limit) for name in names]  # all errors before the first score
    if rank == 0:
        print(f"step {state['step']}, {model.num_params():,} parameters | {dev.name} ({dev.device}), "
              f"{str(dev.dtype).removeprefix('torch.')}, processes: {world_size}", flush=True)
    for examples in sets:
        t0 = time.perf_counter()
        line = format_result(examples.protocol, evaluate(model, examples, dev, batch_tokens))
        if rank == 0:
            print(f"{line} | {time.perf_counter() - t0:.1f} s", flush=True)
    if rank == 0:
        for note in dict.fromkeys(note for examples in sets for note in examples.notes):
            print(f"note: {note}")
    ranks.shutdown()
    ranks.exit()


if __name__ == "__main__":
    configure(globals())
    main()
