"""
Text in, shards out: FineWeb-Edu from the Hugging Face hub, your own files, or the source of Python itself.

    python fineweb.py                                                # FineWeb-Edu: 10B tokens, 20 GB
    python fineweb.py --max_tokens=25e6 --data_dir=edu_fineweb25M    # only the part of it that is needed
    python fineweb.py --input=books/,more.jsonl.gz --data_dir=data1  # parquet, jsonl[.gz|.zst], txt
    python fineweb.py --dataset=python --data_dir=python_corpus      # no download; 100M tokens in 10 s
    python fineweb.py --dataset=kjj0/fineweb10B-gpt2 --data_dir=fw   # ready-made .bin shards of the hub
    python fineweb.py --verify --data_dir=data1                      # read all of it again and check
    torchrun --nnodes=4 ... fineweb.py                               # machines share data_dir and the work

Writes data_dir/NAME_{train,val}_000000.npy, ... and, last, manifest.json (shards.py has the formats). The
output is the same, byte for byte, for any number of workers, and whether or not the build was killed on the
way: run again, it goes on after its last shard. A finished build is left as it is, but for shards that are
missing, which are made again. A folder that holds something else is refused.

A document is a row of a parquet file, a line of a jsonl file or a whole txt file. It becomes <|endoftext|>
and the tokens of its text, in which <|endoftext|> is ordinary text. Empty ones are skipped and counted; what
is null, not UTF-8, not JSON or damaged ends the build, unless --skip_bad allows for so many. A hash of the
text decides its side, so that equal documents never end up on both. If that leaves a side empty (a single txt
file, say), the corpus is cut at the line boundary nearest to its last val_fraction instead, and its end
becomes validation.
"""
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import multiprocessing
import re
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numba import njit

from bpe import available_cores, load_tokenizer
from configurator import Between, OneOf, PathName, UserError, configure, env_number
from documents import (
    Borrowed,
    Chunk,
    Documents,
    Source,
    fingerprint,
    hash_documents,
    hash_finish,
    hub_source,
    input_files,
    input_source,
    pack,
    python_source,
)
from files import check, locked, read_json
from shards import (
    COUNT,
    MANIFEST,
    PLAIN,
    SHARD_NAME,
    UNFINISHED,
    ShardWriter,
    list_shards,
    read_header,
    read_manifest,
    read_shard,
    write_atomically,
    write_manifest,
    write_shard,
)

# ---- settings: override with a config file and/or --key=value -----------------
dataset = "fineweb-edu"  # fineweb-edu or fineweb from the hub; python; OWNER/NAME of ready-made shards
subset = "sample-10BT"  # of the hub's: sample-10BT, sample-100BT, sample-350BT, default, or CC-MAIN-...
revision = "main"  # branch, tag or commit on the hub
input: PathName = ""  # your own files instead: PATH[,PATH...], each a file, a glob or a folder
text_column = "text"  # the parquet column or jsonl field that holds the text
data_dir: PathName = "edu_fineweb10B"  # where the shards go
tokenizer: PathName = "gpt2"  # gpt2, or a rank file in tiktoken's format
shard_tokens: Between(1, 2**31 - 1) = 100_000_000  # tokens per shard: 200 MB; llm.c's header ends at 2**31
val_fraction: Between(0, 1 - 1e-9) = 0.01  # share of documents for validation; 0 = none
max_tokens: Between(0, 10**15) = 0  # stop after the document that reaches this many; 0 = all
num_workers: Between(0, 1024) = 0  # processes; 0 = one per core
shard_format: OneOf("npy", "bin") = "npy"  # bin: with llm.c's header
skip_bad: Between(0, 10**9) = 0  # leave out up to N bad documents or files (each machine), and list them
keep_downloads = False  # keep parquet files in the hub's cache when their shards are done
verify = False  # build nothing: read data_dir's shards and check them against its manifest
seed: Between(0, 2**63 - 1) = 1337  # order of the documents of --dataset=python

HUB_NAMES = {"fineweb-edu": "edufineweb", "fineweb": "fineweb"}  # of HuggingFaceFW: name of its shards
RANK_SHARDS = 10_000        # of several machines, rank r numbers its shards from r * 10,000
WAIT_SECONDS = 600          # that a machine waits for the first one to make the folder
SPLITS = ("train", "val")


class Plan(NamedTuple):
    """What to build, checked: settings, and what follows from them."""
    folder: Path
    name: str        # of the shards
    settings: dict   # all that the bytes of the shards depend on
    command: str     # that builds them, to be shown
    tokenizer: str
    val_fraction: float
    shard_tokens: int
    shard_format: str
    max_tokens: int
    skip_bad: int
    keep_downloads: bool
    num_workers: int
    rank: int        # of ranks machines
    ranks: int


@dataclasses.dataclass
class Progress:
    """How far a build is: with the ids that fill no shard yet, all that a later run needs to go on."""
    unit: int = 0     # the next chunk to take, and the number of chunks
    index: int = 0
    chunks: int = 0
    text_bytes: int = 0  # taken; before the next chunk, that is
    revision: str = ""   # the commit, of a hub's dataset
    identity: str = ""   # of the source
    totals: dict = dataclasses.field(default_factory=lambda: {split: [0, 0, 0] for split in SPLITS})
    empty: int = 0
    bad: list = dataclasses.field(default_factory=list)
    sizes: list = dataclasses.field(default_factory=list)  # bytes of each chunk, while a side is empty
    cut_at: int | None = None  # byte of the text at which to cut, in the second pass over `sizes`
    files: dict = dataclasses.field(default_factory=lambda: {split: [] for split in SPLITS})
    finished: bool = False


# ---- tokenizing, in a pool of processes ----------------------------------------

tokenizer_of = functools.cache(load_tokenizer)  # once per process


class Encoded(NamedTuple):
    """What a worker returns for a chunk with D documents that are not empty."""
    ids: np.ndarray     # of all of them, uint16, in order
    is_val: np.ndarray  # bool (D,)
    tokens: np.ndarray  # of each document, int64 (D,)
    sizes: np.ndarray   # bytes of text of each, int64 (D,)
    empty: int          # documents skipped
    bad: list[tuple[str, str]]  # (place, reason)
    continues: bool     # the first document is the next piece of the last one of the chunk before


def cut_point(text: bytes, near: int, span: int) -> int:
    """Where to cut a document in two: after the newline nearest to byte `near`, if less than `span` away.

    Otherwise at the first character that starts at `near` or later.
    Example: cut_point(b"one\\ntwo\\nthree", near=9, span=5) == 8.
    """
    before, after = text.rfind(b"\n", 0, near) + 1, text.find(b"\n", near) + 1
    points = [point for point in (before, after) if 0 < point < len(text) and abs(point - near) < span]
    if points:
        return min(points, key=lambda point: abs(point - near))
    while near < len(text) and text[near] & 0xC0 == 0x80:  # a continuation byte of UTF-8
        near += 1
    return near


def cut_documents(text: np.ndarray, offsets: np.ndarray, near: int,
                  span: int) -> tuple[np.ndarray, np.ndarray]:
    """(offsets, is_val) with the document around byte `near` of the text cut in two; is_val from there on."""
    d = int(np.searchsorted(offsets, near, side="right")) - 1
    if 0 <= d < len(offsets) - 1 and offsets[d] < near:
        start, stop = offsets[d], offsets[d + 1]
        near = start + cut_point(text[start:stop].tobytes(), int(near - start), span)
        offsets = np.unique(np.append(offsets, near))
    return offsets, offsets[:-1] >= near


def without_invalid(documents: Documents) -> Documents:
    """The documents that are UTF-8; the others join `bad`."""
    texts, numbers, bad = [], [], list(documents.bad)
    for d, number in enumerate(documents.numbers):
        text = documents.text[documents.offsets[d]:documents.offsets[d + 1]].tobytes()
        try:
            text.decode("utf-8")
        except UnicodeDecodeError as error:
            bad.append((f"{documents.label}{number}", f"not UTF-8: {error.reason} at byte {error.start:,}"))
        else:
            texts.append(text)
            numbers.append(number)
    text, offsets = pack(texts)
    return documents._replace(text=text, offsets=offsets, numbers=numbers, bad=bad)


def encode_documents(documents: Documents, tokenizer: str, val_fraction: float,
                     cut: tuple[int, int, int] | None) -> tuple[np.ndarray, ...]:
    """(ids, is_val, tokens, sizes) as in Encoded; UnicodeDecodeError if one is not UTF-8."""
    text, offsets = documents.text, np.unique(documents.offsets)  # an empty one ends where the last one did
    if cut is not None:
        near, span, take = cut
        offsets, is_val = cut_documents(text, offsets[offsets <= max(0, take)], near, span)
    elif documents.hash is not None:
        is_val = np.full(len(offsets) - 1, documents.hash < int(val_fraction * 2.0**64))
    else:
        is_val = hash_documents(text, offsets) < np.uint64(val_fraction * 2.0**64)
    ids, id_offsets = tokenizer_of(tokenizer).encode_documents(text[:offsets[-1]], offsets, errors="strict")
    return ids, is_val, np.diff(id_offsets), np.diff(offsets)


def encode_chunk(chunk: Chunk, tokenizer: str, val_fraction: float,
                 cut: tuple[int, int, int] | None = None) -> Encoded:
    """Tokenize a chunk, in a worker, and decide the sides of its documents.

    cut: not by hash, but by place: (byte of the chunk's text at which to cut, bytes of the validation part,
    bytes of the chunk to take).
    """
    continues = chunk.continues and not (cut and cut[0] == 0)  # the other side starts a document of its own
    parts, empty, bad = [], 0, []
    for documents in chunk.read(*chunk.args):
        try:
            part = encode_documents(documents, tokenizer, val_fraction, cut)
        except UnicodeDecodeError:
            documents = without_invalid(documents)
            part = encode_documents(documents, tokenizer, val_fraction, cut)
        parts.append(part)
        empty += int((np.diff(documents.offsets) == 0).sum())
        bad += documents.bad
        if cut:
            cut = cut[0] - len(documents.text), cut[1], cut[2] - len(documents.text)
    none = np.zeros(0, dtype=np.int64)
    parts = parts or [(none.astype(np.uint16), none.astype(bool), none, none)]
    ids, is_val, tokens, sizes = parts[0] if len(parts) == 1 else map(np.concatenate, zip(*parts))
    if continues and len(tokens):
        ids, tokens[0] = ids[1:], tokens[0] - 1
    return Encoded(ids, is_val, tokens, sizes, empty, bad, continues)


def serve(connection: Connection) -> None:
    """A worker: encode_chunk(*job) of each job that comes, until the other end of the connection is closed.

    That is also how it learns that its parent was killed. Ids go without pickle, which would copy them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    with contextlib.suppress(EOFError, OSError):
        while True:
            job = connection.recv()
            try:
                done = encode_chunk(*job)
            except UserError as error:
                connection.send(error)
            except Exception:
                connection.send(RuntimeError(f"in a worker: {traceback.format_exc()}"))
            else:
                connection.send(done._replace(ids=len(done.ids)))
                connection.send_bytes(done.ids.data)


def ask(connection: Connection, job: tuple) -> Encoded | Exception:
    """What a worker makes of a job. Raises EOFError or OSError if it has died."""
    connection.send(job)
    done = connection.recv()
    if isinstance(done, Encoded):
        ids = np.empty(done.ids, dtype=np.uint16)
        connection.recv_bytes_into(ids.data.cast("B"))
        done = done._replace(ids=ids)
    return done


def encode_in_order(jobs: Iterator[tuple[tuple, tuple]],
                    num_workers: int) -> Iterator[tuple[tuple, Encoded]]:
    """(place, encode_chunk(*job)) of each (place, job), in order; at most 2 * num_workers + 1 in memory.

    Each worker process has a thread here, which takes the next job when the last one is done. (A pool of the
    standard library waits for ever when a worker dies while another starts.)
    """
    if num_workers == 1:
        yield from ((place, encode_chunk(*job)) for place, job in jobs)
        return
    results, changed = {}, threading.Condition()  # by number of the job
    numbers, turn, closed = itertools.count(), threading.Lock(), False
    room = threading.Semaphore(2 * num_workers + 1)

    def put(number: int, result: tuple | Exception | None) -> None:
        with changed:
            results[number] = result
            changed.notify()

    def drive(connection: Connection) -> None:
        while room.acquire():
            with turn:
                if closed:
                    return
                number = next(numbers)
                try:
                    place, job = next(jobs, (None, None))
                except Exception as error:
                    return put(number, error)
            if place is None:
                return put(number, None)
            try:
                done = ask(connection, job)
            except (EOFError, OSError):
                done = UserError(f"one of {num_workers} worker processes died, most often because memory ran "
                                 f"out; choose a smaller --num_workers=... if it was that")
            except Exception as error:
                done = error
            if isinstance(done, Exception):
                return put(number, done)
            put(number, (place, done))

    # spawn on every platform: a fork copies the locks of whatever threads numba, Arrow and the hub started
    context, workers = multiprocessing.get_context("spawn"), []
    try:
        for _ in range(num_workers):
            ours, theirs = context.Pipe()
            workers.append(context.Process(target=serve, args=(theirs,), daemon=True))
            workers[-1].start()
            theirs.close()  # or its end would go unnoticed
            threading.Thread(target=drive, args=(ours,), daemon=True).start()
        for number in itertools.count():
            with changed:
                while number not in results:
                    changed.wait(1)  # without a limit, Ctrl-C would not get through on Windows
                result = results.pop(number)
            if result is None:
                return
            if isinstance(result, Exception):
                raise result
            yield result
            room.release()
    finally:
        closed = True
        room.release(num_workers)  # for threads that wait for it to end
        for worker in workers:
            worker.terminate()
            worker.join()


# ---- ready-made shards ---------------------------------------------------------


def take_ready_made(plan: Plan) -> dict:
    """Fetch the token shards of a dataset on the hub, check them, and write the manifest; returns it."""
    import hub
    repo, tok = plan.settings["dataset"], tokenizer_of(plan.tokenizer)
    manifest = read_manifest(plan.folder)
    revision = manifest["source"]["revision"] if manifest else plan.settings["revision"]
    commit, files = hub.list_files(repo, revision)
    found = {split: [file for file in files if (match := SHARD_NAME.fullmatch(Path(file.path).name))
                     and match["split"] == split] for split in SPLITS}
    if not found["train"]:
        raise UserError(f"got --dataset={repo}, which has no *_train_*.bin or .npy at revision {revision}; "
                        f"wanted ready-made shards, {' or '.join(HUB_NAMES)}")
    names = [Path(file.path).name for split in SPLITS for file in found[split]]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"got --dataset={repo}, which has several files {twice}, wanted each name once; "
                        f"fetch the folder that you want by other means, and use it as --data_dir")
    if plan.max_tokens:
        ends = np.cumsum([(file.size - 1024) // 2 for file in found["train"]])  # less llm.c's header
        found["train"] = found["train"][:1 + int(np.searchsorted(ends, plan.max_tokens))]
    chosen = found["train"] + found["val"]
    missing = [file for file in chosen if not (plan.folder / Path(file.path).name).exists()]
    hub.need_space([(plan.folder, sum(file.size for file in missing), "shards"),
                    (hub.repo_folder(repo), max((file.size for file in missing), default=0), "a download")])
    cache = Borrowed(repo, commit, plan.folder / "downloads_00000.json", plan.keep_downloads)
    records, splits, token_bytes = [], {split: [0, 0, 0] for split in SPLITS}, tok.token_bytes()
    for number, file in enumerate(chosen):
        path = plan.folder / Path(file.path).name
        if file in missing:
            print(f"file {number + 1} of {len(chosen)}: {file.path}", file=sys.stderr)
            write_atomically(path, cache.fetch(file).read_bytes())
        cache.give_back(file)
        with open(path, "rb") as shard:
            sha256 = hashlib.file_digest(shard, "sha256").hexdigest()
        record = {"file": path.name, "tokens": read_header(path)[0], "sha256": sha256}
        ids = check_shard(path, record, tok.n_vocab)
        if file.sha256 not in (None, sha256):
            raise UserError(f"{path}: got sha256 {sha256}, wanted {file.sha256} as the hub says; delete it, "
                            f"and run this again")
        counts = np.bincount(ids, minlength=tok.n_vocab)
        split = "train" if file in found["train"] else "val"
        added = int(counts[tok.eot]), len(ids), int(counts @ token_bytes)
        splits[split] = [a + b for a, b in zip(splits[split], added)]
        records.append(record)
    facts = {"repo": repo, "revision": commit, "files": len(chosen)}
    return save_manifest(plan, facts, splits, records, sides="as they came")


# ---- from chunks to shards -----------------------------------------------------


def progress_path(plan: Plan) -> Path:
    return plan.folder / f"progress_{plan.rank:05d}.part"


def save_progress(plan: Plan, state: dict, left: dict[str, tuple[np.ndarray, list]]) -> None:
    """Write a Progress, as a dict, and {split: (ids that fill no shard yet, their origin)}."""
    head = {"settings": plan.settings, "progress": state,
            "left": {split: [len(ids), origin] for split, (ids, origin) in left.items()}}
    parts = (ids.data for ids, _ in left.values())
    write_atomically(progress_path(plan), f"{json.dumps(head)}\n".encode(), *parts)


def is_finished(path: Path) -> bool:
    """Whether a progress file is that of a finished machine."""
    if not path.exists():
        return False
    with open(path, "rb") as file:
        return json.loads(file.readline())["progress"]["finished"]


def load_progress(plan: Plan) -> tuple[Progress, dict[str, tuple[np.ndarray, list]]]:
    """What save_progress wrote; a fresh start where there is nothing, or a shard it counts is not whole."""
    try:
        head, ids = progress_path(plan).read_bytes().split(b"\n", 1)
        head, ids = json.loads(head), np.frombuffer(ids, dtype="<u2")
        if head["settings"] != plan.settings:
            raise UserError(f"{progress_path(plan).name} is of a build by other settings")
        progress = Progress(**head["progress"])
        for record in progress.files["train"] + progress.files["val"]:
            if read_header(plan.folder / record["file"])[0] != record["tokens"]:
                raise UserError(f"{record['file']} has another number of tokens than noted")
    except FileNotFoundError:
        return Progress(), {}
    except (ValueError, KeyError, TypeError) as error:  # UserError is a ValueError
        print(f"starting over: {error}", file=sys.stderr)
        return Progress(), {}
    left = {}
    for split, (count, origin) in head["left"].items():
        left[split], ids = (ids[:count], origin), ids[count:]
    return progress, left


def jobs_of(source: Source, progress: Progress, plan: Plan) -> Iterator[tuple[tuple, tuple]]:
    """((unit, index), arguments of encode_chunk) of each chunk from the progress on."""
    chunks = source.chunks(progress.unit, progress.index)
    settings = plan.tokenizer, plan.val_fraction
    if progress.cut_at is None:
        yield from (((unit, index), (chunk, *settings)) for unit, index, chunk in chunks)
        return
    sizes, start = progress.sizes, progress.text_bytes
    for size, (unit, index, chunk) in zip(sizes[progress.chunks:], chunks):
        cut = progress.cut_at - start, sum(sizes) - progress.cut_at, sum(sizes) - start
        yield (unit, index), (chunk, *settings, cut)
        start += size


class Output:
    """The shards of both sides and the progress, kept in step; a thread writes while the build goes on."""

    def __init__(self, plan: Plan, source: Source, progress: Progress, left: dict):
        self.plan, self.source, self.progress = plan, source, progress
        self.max_tokens = plan.max_tokens if progress.cut_at is None else 0
        self.writers = {}
        for split in SPLITS:
            writer = ShardWriter(plan.folder, plan.name, split, plan.shard_tokens, plan.shard_format,
                                 plan.rank * RANK_SHARDS + len(progress.files[split]))
            writer.records += progress.files[split]
            if split in left:
                writer.add(*left[split])
            self.writers[split] = writer
        self.released = progress.unit
        self.thread, self.job = ThreadPoolExecutor(1), None

    def tokens(self) -> int:
        return sum(tokens for _, tokens, _ in self.progress.totals.values())

    def is_complete(self, done: Encoded) -> bool:
        """Whether max_tokens were reached, and `done` does not go on with the document that did."""
        return 0 < self.max_tokens <= self.tokens() and not done.continues

    def add(self, place: tuple[int, int], done: Encoded) -> None:
        """Take a chunk's documents, up to the one that reaches max_tokens."""
        progress, ends, count = self.progress, np.cumsum(done.tokens), len(done.tokens)
        if self.max_tokens:
            count = min(count, 1 + int(np.searchsorted(ends, self.max_tokens - self.tokens())))
        runs = np.flatnonzero(np.diff(done.is_val[:count].view(np.int8), prepend=-1, append=-1))
        for first, last in zip(runs[:-1].tolist(), runs[1:].tolist()):  # of documents on one side
            split = SPLITS[int(done.is_val[first])]
            start, stop = int(ends[first] - done.tokens[first]), int(ends[last - 1])
            self.writers[split].add(done.ids[start:stop], (*place, progress.text_bytes, start))
            documents = last - first - (first == 0 and done.continues)
            added = documents, stop - start, int(done.sizes[first:last].sum())
            progress.totals[split] = [a + b for a, b in zip(progress.totals[split], added)]
        size = int(done.sizes[:count].sum())
        if progress.cut_at is None and self.plan.val_fraction:
            progress.sizes.append(size)
            if all(tokens for _, tokens, _ in progress.totals.values()):
                progress.sizes = []  # there will be no second pass
        progress.unit, progress.index = place[0], place[1] + 1
        progress.chunks += 1
        progress.text_bytes += size
        progress.empty += done.empty
        progress.bad += done.bad
        if any(writer.full for writer in self.writers.values()):
            self.save()

    def enter(self, unit: int) -> None:
        """Before the first chunk of another unit: all that came before can be made safe, and released."""
        self.progress.unit, self.progress.index = unit, 0
        if self.source.release:
            self.save()

    def save(self) -> None:
        """Have the full shards and then the progress written; raises what went wrong the last time."""
        full, left = {}, {}
        for split, writer in self.writers.items():
            full[split], writer.full = writer.full, []
            left[split] = writer.buffer[:writer.used], writer.origin  # later ids go behind these
        self.wait()
        self.job = self.thread.submit(self._write, full, dataclasses.asdict(self.progress), left)

    def _write(self, full: dict, state: dict, left: dict) -> None:
        for split, shards in full.items():
            self.writers[split].write(shards)
            if self.plan.ranks > 1 and len(self.writers[split].records) >= RANK_SHARDS:
                raise UserError(f"got {RANK_SHARDS:,} {split} shards on machine {self.plan.rank}, wanted "
                                f"fewer; delete {self.plan.folder}, and choose a larger --shard_tokens")
            state["files"][split] = list(self.writers[split].records)
        save_progress(self.plan, state, left)
        for unit in range(self.released, state["unit"]) if self.source.release else ():
            self.source.release(unit)
        self.released = state["unit"]

    def wait(self) -> None:
        if self.job is not None:
            self.job.result()

    def close(self) -> None:
        """Write what is left, as the last shards of each side."""
        self.wait()
        for split, writer in self.writers.items():
            self.progress.files[split] = writer.close()


def check_bad(bad: list, skip_bad: int) -> None:
    """Raise UserError if more is bad than was allowed."""
    if len(bad) > skip_bad:
        place, reason = bad[skip_bad]
        after = f", after {skip_bad} left out (--skip_bad={skip_bad})" if skip_bad else ""
        raise UserError(f"{place}: {reason}{after}; mend or remove it, or leave out what is bad, up to N of "
                        f"such, with --skip_bad=N")


def write_splits(source: Source, plan: Plan, progress: Progress, left: dict) -> None:
    """Tokenize the chunks from `progress` on into shards, and bring `progress` to its end."""
    from tqdm import tqdm
    output, jobs = Output(plan, source, progress, left), jobs_of(source, progress, plan)
    began, tokens_before = time.perf_counter(), output.tokens()
    every = 0.5 if sys.stderr.isatty() else 60  # seconds; in a log, a line per minute is enough
    with (output.thread,  # its job is waited for
          tqdm(unit="B", unit_scale=True, mininterval=every, initial=progress.text_bytes) as bar,
          contextlib.closing(encode_in_order(jobs, plan.num_workers)) as results):
        for place, done in results:
            if output.is_complete(done):
                break
            if place[0] > progress.unit:
                output.enter(place[0])
            check_bad([*progress.bad, *done.bad], plan.skip_bad)  # before any of it may be saved
            output.add(place, done)
            rate = (output.tokens() - tokens_before) / (time.perf_counter() - began)
            bar.set_postfix_str(f"{output.tokens():,} tokens, {rate:,.0f} tok/s", refresh=False)
            bar.update(progress.text_bytes - bar.n)
    output.close()


def tokenize(source: Source, plan: Plan, progress: Progress, left: dict) -> Progress:
    """All shards of this machine, from where a killed build left off; returns the finished progress."""
    if progress.finished:
        return progress
    if progress.chunks and progress.identity != source.identity:
        raise UserError(f"the documents are not those that the build in {plan.folder} began with; bring them "
                        f"back, or delete its shards and build.json, or give another --data_dir=...")
    check_bad(progress.bad, plan.skip_bad)
    remove_shards(plan, keep={record["file"] for records in progress.files.values() for record in records})
    progress.revision, progress.identity = source.facts.get("revision", ""), source.identity
    write_splits(source, plan, progress, left)
    if not progress.text_bytes and plan.ranks == 1:
        progress_path(plan).unlink(missing_ok=True)
        raise UserError(f"got a corpus without text ({progress.empty} empty documents), wanted some; check "
                        f"--input and --text_column")
    one_sided = plan.val_fraction and not all(total[1] for total in progress.totals.values())
    if one_sided and progress.cut_at is None and plan.ranks == 1:
        # too few documents, or too many equal ones, for a hash to deal out: once more, with a cut
        size = sum(progress.sizes)
        progress = Progress(revision=progress.revision, identity=progress.identity, sizes=progress.sizes,
                            cut_at=min(max(1, int(size * (1 - plan.val_fraction))), size - 1))
        save_progress(plan, dataclasses.asdict(progress), {})
        return tokenize(source, plan, progress, {})
    if one_sided and plan.ranks == 1:
        progress_path(plan).unlink()
        raise UserError(f"got {sum(progress.sizes)} bytes of text, too few to cut in two; wanted more, or "
                        f"--val_fraction=0")
    progress.finished = True
    return progress


# ---- the folder ----------------------------------------------------------------


def claim_folder(plan: Plan) -> bool:
    """Make the folder ready for this build; False if it holds the very build, finished.

    Raises UserError if it holds anything else that a build would mix with or overwrite.
    """
    folder, settings = plan.folder, plan.settings
    ways = ("delete its shards, manifest.json and build.json yourself if you no longer need them, or give "
            "another --data_dir=...")

    def check_same(have: dict, what: str) -> None:
        spelled = ("input", "tokenizer")  # these may be spelled in many ways; what is in them is compared
        different = [f"{key}={have.get(key)}, wanted {settings.get(key)}" for key in settings | have
                     if have.get(key) != settings.get(key) and key not in spelled]
        if different:
            raise UserError(f"{folder} holds {what} by other settings: got {'; '.join(different)}; {ways}")

    manifest = read_manifest(folder, built=True)
    if manifest is not None:
        have = manifest["settings"]
        by_whom = {"machines": settings.get("machines")}  # it does not matter; offline, nor does that
        if not have.get("offline"):
            by_whom["offline"] = settings.get("offline")
        check_same(have | by_whom, "a finished build")
        return False
    deadline = time.monotonic() + WAIT_SECONDS
    while plan.rank > 0 and not (folder / UNFINISHED).exists():  # the first machine makes it
        if time.monotonic() > deadline:
            raise UserError(f"machine {plan.rank} of {plan.ranks} sees no {folder / UNFINISHED} after "
                            f"{WAIT_SECONDS} s; wanted a --data_dir on storage that all machines share")
        time.sleep(0.2)
    if (folder / UNFINISHED).exists():
        try:
            have = read_json(folder / UNFINISHED, {"settings": {str: PLAIN}})["settings"]
        except UserError as error:
            raise UserError(f"{error}; {ways}") from error
        check_same(have, "an unfinished build")
        return True
    if found := list_shards(folder, "train") + list_shards(folder, "val"):
        raise UserError(f"{folder} holds shards already ({found[0].name}, ...); {ways}")
    left = json.dumps({"settings": settings, "command": plan.command}, indent=1)
    write_atomically(folder / UNFINISHED, left.encode())
    return True


def remove_shards(plan: Plan, keep: Iterable[str] = ()) -> None:
    """Remove the shards and torn files that a build on this machine can have left, but for `keep`."""
    ours = re.compile(rf"{re.escape(plan.name)}_(train|val)_(?P<index>\d{{6,}})\.(npy|bin)(\.\d+\.tmp)?"
                      rf"|{re.escape(progress_path(plan).name)}\.\d+\.tmp")
    for path in plan.folder.iterdir():
        match = ours.fullmatch(path.name)
        if match and path.name not in keep:
            if match["index"] is None or plan.ranks == 1 or int(match["index"]) // RANK_SHARDS == plan.rank:
                path.unlink()


def remove_unfinished(folder: Path) -> None:
    """Remove the notes of a build that has come to its end."""
    ours = re.compile(r"(progress_\d{5}\.part|downloads_\d{5}\.json|manifest\.json|build\.json)\.\d+\.tmp"
                      r"|progress_\d{5}\.part|downloads_\d{5}\.json|build\.json")
    for path in folder.iterdir():
        if ours.fullmatch(path.name):
            path.unlink(missing_ok=True)


def finish(plan: Plan, source: Source) -> dict:
    """Wait for the progress of all machines, and write the manifest."""
    parts, told = [], 0.0
    for rank in range(plan.ranks):
        theirs = plan._replace(rank=rank)
        while not is_finished(progress_path(theirs)):
            if (manifest := read_manifest(plan.folder)) is not None:  # another run of this machine was faster
                return manifest
            if time.monotonic() - told > 60:
                print(f"waiting for machine {rank} of {plan.ranks}", file=sys.stderr)
                told = time.monotonic()
            time.sleep(0.5)
        parts.append(load_progress(theirs)[0])
    if len({part.revision for part in parts}) > 1:
        raise UserError(f"the machines read revisions {', '.join(part.revision for part in parts)} of the "
                        f"dataset, wanted one; delete {plan.folder}, and run this with --revision=COMMIT")
    splits = {split: list(map(sum, zip(*(part.totals[split] for part in parts)))) for split in SPLITS}
    if plan.val_fraction and not all(tokens for _, tokens, _ in splits.values()):
        raise UserError(f"no document fell on one of the sides in {plan.folder}; delete it, and build on one "
                        f"machine")
    cut_at = parts[0].cut_at
    records = [record for split in SPLITS for part in parts for record in part.files[split]]
    return save_manifest(
        plan, source.facts, splits, records,
        sides="by hash" if cut_at is None else "by place", empty_documents=sum(part.empty for part in parts),
        bad=[bad for part in parts for bad in part.bad],
        cut=None if cut_at is None else {"at_byte": cut_at, "of_bytes": sum(parts[0].sizes)})


def save_manifest(plan: Plan, facts: dict, splits: dict[str, list[int]], records: list[dict], **more) -> dict:
    """Write the manifest, which makes the folder a finished one. splits: documents, tokens, bytes of text."""
    tok, names = tokenizer_of(plan.tokenizer), ("documents", "tokens", "text_bytes")
    manifest = {
        "tokenizer": {"name": tok.name, "sha256": tok.sha256, "n_vocab": tok.n_vocab}, "eot": tok.eot,
        "settings": plan.settings, "source": facts, "empty_documents": 0, "bad": [], "cut": None, **more,
        **dict(zip(names, map(sum, zip(*splits.values())))),
        "splits": {split: dict(zip(names, counts)) for split, counts in splits.items()}, "files": records}
    write_manifest(plan.folder, manifest)
    remove_unfinished(plan.folder)
    return manifest


def make_again(plan: Plan, manifest: dict, record: dict) -> None:
    """Write a shard of a finished build anew; UserError if it does not come out as it was."""
    check(record, {"origin": [COUNT] * 4}, f"{plan.folder / MANIFEST}, {record['file']}")
    unit, index, start, skip = record["origin"]
    ranks = manifest["settings"].get("machines", 1)
    rank = int(SHARD_NAME.fullmatch(record["file"])["index"]) // RANK_SHARDS if ranks > 1 else 0
    theirs, revision = plan._replace(rank=rank, ranks=ranks), manifest["source"].get("revision", "")
    source = open_source(theirs, revision, ahead=False)
    cut_at, cut_bytes = (manifest["cut"] or {"at_byte": None, "of_bytes": None}).values()
    writer = ShardWriter(plan.folder, plan.name, "train", record["tokens"])
    for at, _, chunk in source.chunks(unit, index):
        cut = None if cut_at is None else (cut_at - start, cut_bytes - cut_at, cut_bytes - start)
        done = encode_chunk(chunk, plan.tokenizer, plan.val_fraction, cut)
        mine = np.repeat(done.is_val == ("_val_" in record["file"]), done.tokens)
        mine[:skip] = False
        writer.add(done.ids[mine])
        if source.release and at > unit:
            source.release(unit)
            unit = at
        if writer.full:
            break
        start, skip = start + int(done.sizes.sum()), 0
    if source.release:
        source.release(unit)
    path = plan.folder / record["file"]
    ids = writer.full[0][1] if writer.full else writer.buffer[:writer.used]
    if (made := write_shard(path, ids)["sha256"]) != record["sha256"]:
        path.unlink()
        raise UserError(f"{path} came out with sha256 {made}, wanted {record['sha256']}: the text or the "
                        f"programs have changed since it was made; build all of it into another --data_dir")


# ---- checking what is there ----------------------------------------------------


@njit(cache=True, error_model="numpy")
def hash_tokens(ids, eot, state, out):
    """64-bit hashes of the documents that end in ids -> their number. state (2,): the hash of the last one so
    far, and the documents begun, carried from shard to shard."""
    n = 0
    for i in range(len(ids)):
        if ids[i] == eot:
            if state[1] > 0:
                out[n] = hash_finish(state[0])
                n += 1
            state[0], state[1] = np.uint64(0), state[1] + np.uint64(1)
        else:
            state[0] = (state[0] ^ np.uint64(ids[i]) + np.uint64(1)) * np.uint64(0xD6E8FEB86659FD93)
            state[0] ^= state[0] >> np.uint64(32)
    return n


def check_shard(path: Path, record: dict, n_vocab: int) -> np.ndarray:
    """The ids of a shard that is as its record says; UserError if it is not."""
    if not path.exists():
        raise UserError(f"{path} is missing")
    ids = read_shard(path)
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if len(ids) != record["tokens"] or sha256 != record["sha256"]:
        raise UserError(f"{path}: got {len(ids):,} tokens with sha256 {sha256[:16]}..., wanted "
                        f"{record['tokens']:,} with {record['sha256'][:16]}...")
    if len(ids) and ids.max() >= n_vocab:
        raise UserError(f"{path}: got id {ids.max()}, wanted ids below {n_vocab}")
    return ids


def verify_folder(folder: Path) -> None:
    """Read every shard and compare with the manifest; raises UserError for the first thing that is wrong."""
    from tqdm import tqdm
    manifest = read_manifest(folder, built=True)
    if manifest is None:
        raise UserError(f"{folder} has no manifest.json to check against: it holds no build, or one that is "
                        f"unfinished")
    began, command = time.perf_counter(), command_of(manifest, folder)
    known = {record["file"] for record in manifest["files"]}
    for path in list_shards(folder, "train") + list_shards(folder, "val"):
        if path.name not in known:
            raise UserError(f"{path} is not in manifest.json: it comes from elsewhere; move it away")
    disjoint, val_hashes = manifest.get("sides") == "by hash", np.zeros(0, dtype=np.uint64)
    with tqdm(total=2 * manifest["tokens"], unit="B", unit_scale=True) as bar:
        for split in ("val", "train"):
            state, hashes = np.zeros(2, dtype=np.uint64), []
            for record in manifest["files"]:
                path = folder / record["file"]
                if f"_{split}_" not in path.name:
                    continue
                try:
                    ids = check_shard(path, record, manifest["tokenizer"]["n_vocab"])
                except UserError as error:
                    raise UserError(f"{error}; to make this file again, and only it: "
                                    f"rm -f {shlex.quote(str(path))} && {command}") from error
                found = np.empty(np.count_nonzero(ids == manifest["eot"]), dtype=np.uint64)
                hashes.append(found[:hash_tokens(ids, manifest["eot"], state, found)])
                bar.update(2 * len(ids))
            documents = int(state[1])
            if documents != manifest["splits"][split]["documents"]:
                raise UserError(f"{folder}: got {documents:,} {split} documents (<|endoftext|>), wanted "
                                f"{manifest['splits'][split]['documents']:,} as the manifest says; delete "
                                f"the folder, and build it again: {command}")
            hashes = np.append(np.concatenate([val_hashes[:0], *hashes]), hash_finish(state[0]))[:documents]
            if split == "val":
                val_hashes = hashes
            elif disjoint and (both := np.flatnonzero(np.isin(hashes, val_hashes))).size:
                raise UserError(f"{folder}: got {both.size:,} train documents, the first of them number "
                                f"{both[0]:,} (from 0), that are in validation too, wanted none; delete the "
                                f"folder, and build it again: {command}")
    sides = manifest.get("sides", "in an unknown way")
    also = f"train and val {'share no document' if disjoint else f'are split {sides}'}"
    print(f"{folder} is whole: {len(manifest['files'])} shards, {manifest['tokens']:,} tokens, "
          f"{manifest['documents']:,} documents: sha256, counts and ids are as the manifest says; {also}; "
          f"{time.perf_counter() - began:.1f} s")


# ---- all of it -----------------------------------------------------------------


def command_of(described: dict, folder: Path) -> str:
    """The command that builds a folder, from its manifest or any dict that holds its settings."""
    settings = described.get("settings", {})
    flags = [f"--{key}={value}" for key, value in settings.items() if key in globals()]
    start = ["torchrun", f"--nnodes={settings['machines']}"] if "machines" in settings else ["python"]
    return shlex.join([*start, "fineweb.py", f"--data_dir={folder}", *flags])


def open_source(plan: Plan, revision: str, ahead: bool = True) -> Source:
    """Where the documents come from; revision: the commit that an earlier run began with, or empty."""
    settings = plan.settings
    if "input" in settings:
        return input_source(settings["input"], settings["text_column"], plan.rank, plan.ranks)
    if settings["dataset"] == "python":
        return python_source(settings["seed"])
    there = sum(path.stat().st_size for split in SPLITS for path in list_shards(plan.folder, split))
    return hub_source(settings["dataset"], settings["subset"], revision or settings["revision"],
                      settings["text_column"], plan.folder, there, plan.max_tokens, plan.keep_downloads,
                      plan.rank, plan.ranks, ahead)


def make_plan(dataset: str, subset: str, revision: str, input: str, text_column: str, data_dir: str,
              tokenizer: str, shard_tokens: int, val_fraction: float, max_tokens: int, num_workers: int,
              shard_format: str, skip_bad: int, keep_downloads: bool, seed: int, verify: bool) -> Plan:
    """The settings at the top of this file, checked. Raises UserError."""
    if dataset not in (*HUB_NAMES, "python") and "/" not in dataset:
        raise UserError(f"got dataset={dataset!r}, wanted {', '.join(HUB_NAMES)}, python, or the OWNER/NAME "
                        f"of ready-made shards; your own files go into --input=PATH[,PATH...]")
    if input and dataset == "python":
        raise UserError(f"got --input={input} and --dataset=python, wanted one of them")
    ranks = env_number("WORLD_SIZE", 1)  # as torchrun sets them
    rank = env_number("RANK", 0) if ranks > 1 else 0
    if ranks > 1 and (max_tokens or (not input and dataset not in HUB_NAMES)):
        raise UserError(f"got --max_tokens={max_tokens} --dataset={dataset} on {ranks} machines, wanted "
                        f"files to share out, and all of their tokens; run it on one")
    if input:
        name, origin = "text", {"input": input, "text_column": text_column}
    elif dataset == "python":
        name, origin = "python", {"dataset": dataset, "seed": seed}
    elif dataset in HUB_NAMES:
        name = HUB_NAMES[dataset]
        origin = {"dataset": dataset, "subset": subset, "revision": revision, "text_column": text_column}
    else:
        name, origin = "", {"dataset": dataset, "revision": revision}
    tok = tokenizer_of(tokenizer)
    if tok.n_vocab > 1 << 16:
        raise UserError(f"tokenizer {tok.name} has {tok.n_vocab:,} tokens, wanted at most 65,536, as ids are "
                        f"uint16; choose another --tokenizer=...")
    folder = Path(data_dir)
    settings = {**origin, "tokenizer": tokenizer, "tokenizer_sha256": tok.sha256, "max_tokens": max_tokens}
    if name:  # shards that we make
        settings |= {"shard_tokens": shard_tokens, "val_fraction": val_fraction, "shard_format": shard_format}
    if input:
        files = input_files(input)
        settings["input_contents"] = fingerprint(files)
        if folder.resolve() in {file.resolve().parent for file in files}:
            raise UserError(f"got --data_dir={data_dir}, where the text is, wanted a folder of its own for "
                            f"the shards; give another --data_dir=...")
    elif dataset != "python":
        import hub
        if hub.constants.HF_HUB_OFFLINE:
            settings["offline"] = True  # what a cache holds need not be all there is
    if ranks > 1:
        settings["machines"] = ranks
    more = {"skip_bad": skip_bad} if skip_bad else {}
    more |= {"keep_downloads": True} if keep_downloads else {}
    command = command_of({"settings": settings | more}, folder)
    here = env_number("LOCAL_WORLD_SIZE", 1)  # processes of torchrun that share this machine
    num_workers = num_workers or max(1, available_cores() // here)
    if max_tokens and name in HUB_NAMES.values():
        num_workers = min(num_workers, 4)  # more would only have more fetched than is needed
    return Plan(folder, name, settings, command, tokenizer, val_fraction, shard_tokens, shard_format,
                max_tokens, skip_bad, keep_downloads, num_workers, rank, ranks)


def build_shards(plan: Plan) -> dict | None:
    """Tokenize this machine's part; the first machine writes the manifest and returns it."""
    progress, left = load_progress(plan)
    source = open_source(plan, progress.revision)
    progress = tokenize(source, plan, progress, left)
    save_progress(plan, dataclasses.asdict(progress), {})
    for unit in range(progress.unit + 1) if source.release else ():
        source.release(unit)
    return finish(plan, source) if plan.rank == 0 else None


def build_locked(plan: Plan) -> dict | None:
    """Build what is missing; returns the manifest of a build that was finished now by this process."""
    if not claim_folder(plan):
        manifest = read_manifest(plan.folder)
        missing = [record for record in manifest["files"] if not (plan.folder / record["file"]).exists()]
        if plan.rank == 0:
            for record in missing:
                print(f"making {record['file']} again")
                if plan.name:
                    make_again(plan, manifest, record)
            if missing and not plan.name:
                take_ready_made(plan)
            remove_unfinished(plan.folder)
        print(f"{plan.folder} is already built by these settings")
        return None
    try:
        return build_shards(plan) if plan.name else take_ready_made(plan)
    except UserError as error:
        ready_made = not plan.name and list_shards(plan.folder, "train")  # each appears when it is whole
        if progress_path(plan).exists() or ready_made:
            raise UserError(f"{error}. What is done is kept: run the same command again, and it goes on"
                            ) from error
        if plan.ranks == 1:  # nothing is worth keeping
            remove_shards(plan)
            (plan.folder / UNFINISHED).unlink()
        raise


def build(**settings) -> None:
    """Build or verify data_dir; the arguments are the settings at the top of this file. Raises UserError."""
    began = time.perf_counter()
    if settings["verify"]:
        return verify_folder(Path(settings["data_dir"]))
    plan = make_plan(**settings)
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {plan.folder} ({error.strerror}); give another "
                        f"--data_dir=...") from error
    with locked(plan.folder, "build") if plan.ranks == 1 else contextlib.nullcontext():
        manifest = build_locked(plan)
    hint = f"next: python train_gpt2.py --data_dir={shlex.quote(str(plan.folder))}"
    if manifest is None:
        print(hint)
        return
    skipped = f"{manifest['empty_documents']:,} empty ones skipped"
    if manifest["bad"]:
        skipped += f", {len(manifest['bad']):,} bad ones left out, listed in manifest.json"
    counts = [sum(f"_{split}_" in record["file"] for record in manifest["files"]) for split in SPLITS]
    print(f"{manifest['documents']:,} documents ({skipped}), {manifest['tokens']:,} tokens, "
          f"{manifest['text_bytes'] / manifest['tokens']:.3f} bytes per token, "
          f"{time.perf_counter() - began:.1f} s; in {plan.folder}: {counts[0]} train and {counts[1]} val "
          f"shards (the last of each is short: it holds what is left). {hint}")


if __name__ == "__main__":
    build(**configure(globals()))
