"""
Text in, shards out: a dataset of the Hugging Face hub, your own files, or the source of Python itself.

    python fineweb.py                                                # FineWeb-Edu: 10B tokens, 20 GB
    python fineweb.py --max_tokens=25e6 --data_dir=edu_fineweb25M    # only the part of it that is needed
    python fineweb.py --input=books/,more.jsonl.gz --data_dir=data1  # parquet, JSON lines, txt
    python fineweb.py --dataset=python --data_dir=python_corpus      # the standard library; no download
    python fineweb.py --dataset=roneneldan/TinyStories --data_dir=stories    # any parquet dataset of the hub
    python fineweb.py --verify --data_dir=data1                      # read all of it again and check
    torchrun --nnodes=4 ... fineweb.py                               # machines share data_dir and the work

Data flows one way:

    source -> chunks, in a fixed order -> worker: ids and side of each document -> pairs of shards -> manifest

Writes data_dir/NAME_train_000000.npy and NAME_val_000000.npy, ..., build.json after each pair, and at the end
manifest.json (shards.py has the formats). A pair holds whole chunks of the source: it ends with the one that
brings train to shard_tokens. The output is the same, byte for byte, for any number of workers, and whether or
not the build was killed: run it again, and it builds the pairs that are missing.

Each document becomes <|endoftext|> and the tokens of its text; documents.py says what a document is, and on
which side. Empty ones are skipped and counted. What is null, not UTF-8 or not JSON ends the build; with
--skip_bad it is left out, counted and listed on stderr.
"""
import collections
import contextlib
import functools
import hashlib
import json
import math
import multiprocessing
import queue
import re
import shlex
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from bpe import EOT_TEXT, encode_kernel, load_tokenizer, say_compiling
from configurator import Between, OneOf, PathName, UserError, configure, env_number
from documents import Chunk, Place, Source, available_cores, hub_source, input_source, python_source
from files import locked, read_json, write_atomically
from shards import (
    BUILD_NAME,
    COUNT,
    MANIFEST_NAME,
    PLAIN,
    RANK_FILE,
    SHA256,
    SHARD_NAME,
    SPLITS,
    list_shards,
    manifest_name,
    read_header,
    read_manifest,
    read_shard,
    write_manifest,
    write_shard,
)

# ---- settings: override with a config file and/or --key=value -----------------
dataset = "fineweb-edu"  # of the hub: fineweb-edu, fineweb or OWNER/NAME; or python, its standard library
subset = ""  # of fineweb(-edu): sample-10BT (the default), sample-100BT, default, CC-MAIN-...; else a folder
revision = "main"  # branch, tag or commit on the hub
input: PathName = ""  # your own files instead: PATH[,PATH...], each a file, a glob or a folder
text_column = "text"  # the parquet column or JSON field that holds the text
data_dir: PathName = "edu_fineweb10B"  # where the shards go
tokenizer: PathName = "gpt2"  # gpt2, or a rank file in tiktoken's format
shard_tokens: Between(1, 2**31 - 2**27) = 100_000_000  # per train shard, and at most a chunk more
val_fraction: Between(0, 1 - 1e-9) = 0.01  # share of documents for validation; 0 = none
max_tokens: Between(0, 10**15) = 0  # stop after the document that reaches this many; 0 = all
num_workers: Between(0, 1024) = 0  # processes; 0 = one per core, at most 16
shard_format: OneOf("npy", "bin") = "npy"  # bin: with llm.c's header
skip_bad = False  # leave out documents that cannot be read, and list them on stderr
verify = False  # build nothing: read data_dir's shards and check them against its manifest

PAIR = {"files": [{"file": SHARD_NAME, "tokens": COUNT, "sha256": SHA256}], "empty": COUNT, "bad": COUNT,
        "counts": {split: [COUNT, COUNT, COUNT] for split in SPLITS}, "next": [COUNT, COUNT, COUNT]}
STATE = {  # build.json
    "settings": {str: PLAIN}, "command": str, "identity": str, "source": {str: PLAIN}, "pairs": [PAIR]}
NAMES = {"fineweb-edu": "edufineweb", "fineweb": "fineweb", "python": "python"}  # of the shards of a dataset
FOLDERS = "--data_dir={data_dir} --log_dir={log_dir}"
OWN_TEXT = f"config/own_text.py {FOLDERS}"
LONG = "--num_epochs=4 --warmup_steps=100 --hellaswag_interval=0"
LARGE = ("--n_layer=8 --n_head=8 --n_embd=512 --block_size=512 --batch_tokens=32768 --num_epochs=3 "
         "--compile=true")
MEDIUM = "--n_layer=6 --n_head=4 --n_embd=256 --block_size=256 --batch_tokens=8192 --num_epochs=4"
COMMANDS = [  # (least train tokens, arguments of train_gpt2.py): the table in README.md
    (5_000_000_000, "--data_dir={data_dir}"), (150_000_000, f"config/gpu_24gb.py {FOLDERS} {LONG}"),
    (15_000_000, f"{OWN_TEXT} {LARGE}"), (1_500_000, f"{OWN_TEXT} {MEDIUM}"), (150_000, OWN_TEXT),
    (0, f"{OWN_TEXT} --dropout=0.2 --num_epochs=20")]
REMEDY = "delete the folder if you no longer need it, or give another --data_dir=..."

# ---- tokenizing, in a pool of processes ----------------------------------------

tokenizer_of = functools.cache(load_tokenizer)  # once per process


class Encoded(NamedTuple):
    """The D documents of a chunk."""
    ids: dict[str, np.ndarray]  # of each split: uint16, all of its documents in order
    tokens: np.ndarray          # of each document, int64 (D,)
    sizes: np.ndarray           # bytes of text of each, int64 (D,)
    is_val: np.ndarray          # bool (D,)
    empty: int                  # documents skipped
    bad: list[str]              # what could not be read, and why


def encode_chunk(chunk: Chunk, tokenizer: str) -> Encoded:
    documents = chunk.read(*chunk.args)
    ids, id_offsets = tokenizer_of(tokenizer).encode_documents(documents.text, documents.offsets)
    tokens = np.diff(id_offsets)
    of_val = np.repeat(documents.is_val, tokens)
    return Encoded({"train": ids[~of_val], "val": ids[of_val]}, tokens, np.diff(documents.offsets),
                   documents.is_val, documents.empty, documents.bad)


def work(pipe: Connection, tokenizer: str) -> None:
    """In a worker process: encode the chunks that come through the pipe, until the parent has gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as start_worker has it, but not on Windows
    with contextlib.suppress(EOFError, OSError):
        while True:
            chunk = pipe.recv()
            try:
                result = encode_chunk(chunk, tokenizer)
            except Exception as error:
                error.add_note(traceback.format_exc())
                result = error
            pipe.send(result)


def start_worker(tokenizer: str):
    """(process, our end of its pipe)."""
    # spawn everywhere: a fork copies the locks of whatever threads numba, Arrow and the hub have started
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, tokenizer), daemon=True)
    # the worker inherits this: Ctrl-C is the parent's alone, also while a worker imports
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, handler)
    theirs.close()  # the worker has the only copy: if it dies, recv on ours raises EOFError
    return process, ours


def encode_in_order(chunks: Iterator[tuple[Place, Chunk]], tokenizer: str,
                    num_workers: int) -> Iterator[tuple[Place, Encoded]]:
    """(place, encode_chunk(chunk)) of each chunk, in order; at most 2 * num_workers + 1 in memory.

    Each worker process has a pipe of its own, so that one killed while it sends cannot block the others.
    """
    if num_workers == 1:
        yield from ((place, encode_chunk(chunk, tokenizer)) for place, chunk in chunks)
        return
    processes, idle = [], queue.SimpleQueue()

    def encode(chunk: Chunk) -> Encoded:
        pipe = idle.get()
        try:
            pipe.send(chunk)
            result = pipe.recv()
        except (EOFError, OSError):  # as the cause, an OSError would pass for a fault of the disk
            raise UserError(f"one of {num_workers} worker processes died, most often because memory ran out; "
                            f"in that case choose a smaller --num_workers=...") from None
        finally:
            idle.put(pipe)
        if isinstance(result, Exception):
            raise result
        return result

    threads, waiting = ThreadPoolExecutor(num_workers), collections.deque()  # a thread waits for a worker
    try:
        for place, chunk in chunks:
            if len(processes) < num_workers:
                process, pipe = start_worker(tokenizer)
                processes.append(process)
                idle.put(pipe)
            waiting.append((place, threads.submit(encode, chunk)))
            while waiting and (len(waiting) > 2 * num_workers or waiting[0][1].done()):
                place, future = waiting.popleft()
                yield place, future.result()
        yield from ((place, future.result()) for place, future in waiting)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()  # Windows does not remove files that a process still has open
        threads.shutdown(cancel_futures=True)


# ---- from chunks to pairs of shards --------------------------------------------


class Pair:
    """A train and a val shard while they fill; unit: where in the source they begin."""

    def __init__(self, unit: int):
        self.unit = unit
        self.ids = {split: [] for split in SPLITS}
        self.counts = {split: [0, 0, 0] for split in SPLITS}  # documents, tokens, bytes of text
        self.empty = self.bad = 0

    def add(self, encoded: Encoded, room: float) -> None:
        """Take a chunk's documents, up to the one that brings `room` tokens."""
        n = 1 + int(np.searchsorted(np.cumsum(encoded.tokens), room))
        tokens, sizes, is_val = encoded.tokens[:n], encoded.sizes[:n], encoded.is_val[:n]
        for split, chosen in zip(SPLITS, (~is_val, is_val)):
            added = int(chosen.sum()), int(tokens[chosen].sum()), int(sizes[chosen].sum())
            self.ids[split].append(encoded.ids[split][:added[1]])
            self.counts[split] = [a + b for a, b in zip(self.counts[split], added)]
        self.empty += encoded.empty
        self.bad += len(encoded.bad)

    def tokens(self) -> int:
        return sum(tokens for _, tokens, _ in self.counts.values())


class Build:
    """A data_dir that is being built; build.json says which pairs of shards are finished.

    name: of the shards; settings: all that their bytes depend on, besides the source. Of several machines
    (ranks), each has its own build.json and manifest.json, and every ranks-th number.
    """

    def __init__(self, folder: Path, name: str, settings: dict, command: str, tokenizer: str, rank: int,
                 ranks: int):
        self.folder, self.name, self.settings, self.rank, self.ranks = folder, name, settings, rank, ranks
        self.tokenizer, self.tok = tokenizer, tokenizer_of(tokenizer)
        self.path = folder / manifest_name(rank, ranks, "build")
        self.manifest = folder / manifest_name(rank, ranks)
        self.state = {"settings": settings, "command": command, "identity": "", "source": {}, "pairs": []}
        if self.path.exists():
            self.state = self.read_state()
        elif others := [path.name for path in folder.iterdir() if self.is_taken(path.name)]:
            raise UserError(f"{folder} already holds {min(others)}, which is not of this build; {REMEDY}")
        self.pairs = self.state["pairs"]
        notes = {self.path.name, self.manifest.name} | ({RANK_FILE} if ranks == 1 else set())  # not of others
        for path in folder.glob("*.*.tmp"):  # of a process that was killed while it wrote
            file = path.name.rsplit(".", 2)[0]
            if file in notes or (file.startswith(f"{name}_") and self.is_taken(file)):
                path.unlink()

    def read_state(self) -> dict:
        """build.json, if it is of a build by these settings."""
        try:
            state = read_json(self.path, STATE)
        except UserError as error:
            raise UserError(f"{error}; {REMEDY}") from error
        old, new = state["settings"], self.settings
        differing = "; ".join(f"{key}={old.get(key)}, not {new.get(key)}" for key in new | old
                              if old.get(key) != new.get(key))
        if differing:
            raise UserError(f"{self.folder} holds a build by other settings: {differing}; {REMEDY}")
        return state

    def is_taken(self, file: str) -> bool:
        """Whether this is the name of a shard or a note that this build would write, or that excludes it."""
        if match := SHARD_NAME.fullmatch(file):
            return int(match["number"] or 0) % self.ranks == self.rank
        match = MANIFEST_NAME.fullmatch(file) or BUILD_NAME.fullmatch(file)
        return match is not None and (self.ranks == 1 or match["ranks"] != str(self.ranks))

    def is_complete(self, k: int) -> bool:
        """Whether the shards of pair k exist and have the recorded length."""
        with contextlib.suppress(UserError, OSError):
            return all(read_header(self.folder / record["file"])[0] == record["tokens"]
                       for record in self.pairs[k]["files"])
        return False

    def missing(self) -> int | None:
        """The first pair that is to be built, or None."""
        k = next((k for k in range(len(self.pairs)) if not self.is_complete(k)), len(self.pairs))
        return k if k < len(self.pairs) or not self.manifest.exists() else None

    def counts(self, pairs: list[dict]) -> dict[str, list[int]]:
        """Documents, tokens and bytes of text of each split."""
        return {split: [sum(column) for column in zip([0, 0, 0], *(pair["counts"][split] for pair in pairs))]
                for split in SPLITS}

    def run(self, source: Source, skip_bad: bool, num_workers: int) -> None:
        """Build the pairs that are missing, and the manifest."""
        if self.state["identity"] not in ("", source.identity):
            raise UserError(f"the build in {self.folder} began with other files: names, sizes or times "
                            f"differ; bring them back, or {REMEDY}")
        self.state |= {"identity": source.identity, "source": source.facts}
        every = 0.5 if sys.stderr.isatty() else 60  # seconds; in a log, a line per minute is enough
        bar = tqdm(unit="B", unit_scale=True, mininterval=every, delay=1)
        with ThreadPoolExecutor(1) as writer, bar:
            while (k := self.missing()) is not None:
                if k < len(self.pairs):
                    names = ", ".join(record["file"] for record in self.pairs[k]["files"])
                    print(f"making {names} again: missing or incomplete", file=sys.stderr)
                chunks = source.chunks(tuple(self.pairs[k - 1]["next"]) if k else (0, 0, 0))
                with contextlib.closing(encode_in_order(chunks, self.tokenizer, num_workers)) as results:
                    self.run_from(k, results, source, skip_bad, writer, bar)

    def run_from(self, k: int, results: Iterator[tuple[Place, Encoded]], source: Source, skip_bad: bool,
                 writer: ThreadPoolExecutor, bar) -> None:
        """Build pair k and those after it, until one is there already or the text ends.

        writer: a thread that writes a pair while the next one fills.
        """
        end = tuple(self.pairs[k - 1]["next"]) if k else (0, 0, 0)
        max_tokens = self.settings["max_tokens"] or math.inf
        tokens = sum(tokens for _, tokens, _ in self.counts(self.pairs[:k]).values())
        pair, writing = Pair(end[0]), None
        for (unit, group, piece), encoded in results if tokens < max_tokens else ():
            for reason in encoded.bad:
                if not skip_bad:
                    raise UserError(f"{reason}; fix or remove it, or leave out what is bad with --skip_bad")
                bar.write(f"left out: {reason}", file=sys.stderr)
            pair.add(encoded, max_tokens - tokens - pair.tokens())
            end = unit, group, piece + 1
            bar.set_postfix_str(f"{tokens + pair.tokens():,} tokens", refresh=False)
            bar.update(int(encoded.sizes.sum()))
            if pair.counts["train"][1] >= self.settings["shard_tokens"]:
                if writing:
                    writing.result()
                writing = writer.submit(self.write, k, pair, end, source.release)
                tokens, pair, k = tokens + pair.tokens(), Pair(unit), k + 1
                if k < len(self.pairs) and self.is_complete(k):
                    return writing.result()
            if tokens + pair.tokens() >= max_tokens:
                break
        if writing:
            writing.result()
        self.check_sides(k, pair)
        if pair.tokens():
            self.write(k, pair, end, source.release)
        self.finish()

    def check_sides(self, k: int, last: Pair) -> None:
        """UserError, before the last pair is written, where there is no text, or none on one of the sides."""
        counts = self.counts([*self.pairs[:k], {"counts": last.counts}])
        (documents, train, _), (val_documents, val, _) = counts.values()
        if not train + val and self.ranks == 1:
            empty = sum(pair["empty"] for pair in self.pairs[:k]) + last.empty
            raise UserError(f"no text found: {empty:,} documents are empty, and there are no others; check "
                            f"--input and --text_column")
        if not (train and val) and self.settings["val_fraction"] and self.ranks == 1:
            raise UserError(f"all documents ({documents + val_documents:,}) are for "
                            f"{'training' if train else 'validation'}; give another --val_fraction=...")

    def write(self, k: int, pair: Pair, end: Place, release) -> None:
        """Write the shards of pair k, note them in build.json, and release the units that are done."""
        if not self.path.exists():
            write_atomically(self.folder / RANK_FILE, self.tok.rank_file)
            self.save()  # first, so that shards never stand alone
        files = []
        for split in SPLITS:
            if pair.counts[split][1]:
                number = k * self.ranks + self.rank
                path = self.folder / f"{self.name}_{split}_{number:06d}.{self.settings['shard_format']}"
                files.append(write_shard(path, *pair.ids[split]))
        if k < len(self.pairs) and self.pairs[k]["files"] != files:
            for record in files:
                (self.folder / record["file"]).unlink()
            raise UserError(f"{files[0]['file']} comes out different from what build.json says: the text or "
                            f"the programs have changed; build into another --data_dir")
        self.pairs[k:k + 1] = [{"files": files, "counts": pair.counts, "empty": pair.empty, "bad": pair.bad,
                                "next": end}]
        self.save()
        for unit in range(pair.unit, end[0]):
            release(unit)

    def save(self) -> None:
        write_atomically(self.path, f"{json.dumps(self.state, indent=1, sort_keys=True)}\n".encode())

    def finish(self) -> None:
        """Write the manifest, which makes the folder a finished one."""
        names, counts = ("documents", "tokens", "text_bytes"), self.counts(self.pairs)
        splits = {split: dict(zip(names, counts[split])) for split in SPLITS}
        write_manifest(self.folder, {
            "tokenizer": {"name": self.tok.name, "sha256": self.tok.sha256, "n_vocab": self.tok.n_vocab},
            "eot": self.tok.eot, "settings": self.settings, "source": self.state["source"],
            **{name: splits["train"][name] + splits["val"][name] for name in names}, "splits": splits,
            "empty_documents": sum(pair["empty"] for pair in self.pairs),
            "bad_documents": sum(pair["bad"] for pair in self.pairs),
            "files": [record for pair in self.pairs for record in pair["files"]]}, self.rank, self.ranks)


# ---- checking what is there ----------------------------------------------------


def verify_folder(folder: Path) -> None:
    """Read every shard and compare with the manifest; raises UserError for the first thing that is wrong."""
    manifest, builds = read_manifest(folder, built=True), sorted(folder.glob("build*.json"))
    if manifest is None:
        raise UserError(f"{folder} has no manifest.json to check against: it holds no finished build")
    command = read_json(builds[0], {"command": str})["command"] if builds else "build again"
    known = {record["file"] for record in manifest["files"]}
    for path in (path for split in SPLITS for path in list_shards(folder, split)):
        if path.name not in known:
            raise UserError(f"{path} is not in the manifest: it belongs to another build; move it elsewhere")
    began, n_vocab = time.perf_counter(), manifest["tokenizer"]["n_vocab"]
    documents = dict.fromkeys(SPLITS, 0)
    for record in tqdm(manifest["files"], unit=" shards"):
        path = folder / record["file"]
        try:
            ids = read_shard(path)
            with open(path, "rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            if sha256 != record["sha256"]:
                raise UserError(f"{path} has the sha256 {sha256}, not {record['sha256']}")
            if ids.max() >= n_vocab:
                raise UserError(f"{path} has the id {ids.max()}, but the vocabulary {n_vocab:,}")
        except (UserError, OSError) as error:
            raise UserError(f"{error}; to make it again: rm -f {shlex.quote(str(path))} && {command}"
                            ) from error
        documents[SHARD_NAME.fullmatch(path.name)["split"]] += int(np.count_nonzero(ids == manifest["eot"]))
    for split in SPLITS:
        if documents[split] != manifest["splits"][split]["documents"]:
            raise UserError(f"{folder} has {documents[split]:,} {split} documents ({EOT_TEXT}), not the "
                            f"{manifest['splits'][split]['documents']:,} of its manifest; {REMEDY}")
    print(f"{folder} is complete: {len(manifest['files'])} shards, {manifest['tokens']:,} tokens, "
          f"{manifest['documents']:,} documents; sha256, counts and ids are as the manifest says; "
          f"{time.perf_counter() - began:.1f} s")


# ---- all of it -----------------------------------------------------------------


def describe(manifest: dict, folder: Path, seconds: float) -> str:
    """The closing lines of a build."""
    left_out = f"{manifest['empty_documents']:,} empty skipped"
    if manifest["bad_documents"]:
        left_out += f", {manifest['bad_documents']:,} bad left out"
    val = manifest["splits"]["val"]
    windows = " and ".join(f"{(val['tokens'] - 1) // T:,} of {T:,}" for T in (128, 1024))
    val_line = f"validation: {val['documents']:,} documents, {val['tokens']:,} tokens; windows: {windows}"
    if not val["tokens"]:
        val_line = "no validation, which training needs: build again with --val_fraction=0.01, for example"
    rate = manifest["text_bytes"] / max(1, manifest["tokens"])
    return (f"{manifest['documents']:,} documents ({left_out}), {manifest['tokens']:,} tokens, {rate:.3f} "
            f"bytes per token, {seconds:.1f} s\n{val_line}\n{len(manifest['files'])} shards in {folder}")


def training_command(folder: Path, tokens: int) -> str:
    """The command that trains a model of a size that suits this many train tokens."""
    arguments = next(text for least, text in COMMANDS if tokens >= least)
    log_dir = f"log_{folder.resolve().name.removesuffix('_data')}"
    return "python train_gpt2.py " + arguments.format(data_dir=shlex.quote(str(folder)),
                                                      log_dir=shlex.quote(log_dir))


def open_source(settings: dict, downloads: Path, revision: str, rank: int, ranks: int) -> Source:
    """Where the documents come from; downloads: the folder for what the hub sends."""
    column, val_fraction = settings["text_column"], settings["val_fraction"]
    if settings["input"]:
        return input_source(settings["input"], column, val_fraction, rank, ranks)
    if settings["dataset"] == "python":
        return python_source(val_fraction)
    return hub_source(settings["dataset"], settings["subset"], revision, column, val_fraction,
                      settings["max_tokens"], downloads, rank, ranks)


def build(**settings) -> None:
    """Build or verify data_dir; the arguments are the settings at the top of this file. Raises UserError."""
    began, folder, name = time.perf_counter(), Path(settings["data_dir"]), settings["dataset"]
    if settings["verify"]:
        return verify_folder(folder)
    ranks = env_number("WORLD_SIZE", 1)  # as torchrun sets them
    rank = env_number("RANK", 0) if ranks > 1 else 0
    local = bool(settings["input"]) or name == "python"
    if not local and name not in NAMES and "/" not in name:
        raise UserError(f"--dataset={name} is none of {', '.join(NAMES)}, nor OWNER/NAME of the hub; for "
                        f"files of your own: --input=PATH[,PATH...]")
    if ranks > 1 and (settings["max_tokens"] or (name == "python" and not settings["input"])):
        raise UserError("several machines share files, and all of their tokens: leave out --max_tokens and "
                        "--dataset=python, or run this on one machine")
    say_compiling(encode_kernel)
    unused = ("dataset", "subset", "revision") if settings["input"] else ("input",)
    flags = {key: value for key, value in settings.items() if key not in (*unused, "verify")}
    launcher = ["torchrun", f"--nnodes={ranks}"] if ranks > 1 else ["python"]
    command = shlex.join([*launcher, "fineweb.py", *(f"--{key}={value}" for key, value in flags.items())])
    decisive = {key: value for key, value in flags.items()
                if key not in ("input", "data_dir", "tokenizer", "num_workers", "skip_bad")}
    decisive |= {"tokenizer_sha256": tokenizer_of(settings["tokenizer"]).sha256, "machines": ranks}
    shards = "text" if settings["input"] else NAMES.get(name) or re.sub(r"\W+", "_", name.rpartition("/")[2])
    part = manifest_name(rank, ranks, "").removesuffix(".json")  # of this machine
    downloads = folder / f"fineweb_downloads{part}"  # removed at the end, so no name that a user may have
    cores = available_cores() // env_number("LOCAL_WORLD_SIZE", 1)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder} ({error.strerror}); give another --data_dir"
                        ) from error
    with locked(folder, "build", name=f".lock{part}"):
        job = Build(folder, shards, decisive, command, settings["tokenizer"], rank, ranks)
        revision = job.state["source"].get("revision", settings["revision"])  # the commit it began with
        built = job.missing() is None
        try:
            if not built or local:  # what came from the hub needs no network once it is built
                job.run(open_source(settings, downloads, revision, rank, ranks), settings["skip_bad"],
                        settings["num_workers"] or min(16, max(1, cores)))
        except UserError as error:
            kept = ". What is done is kept: run the same command again, and it goes on"
            raise UserError(f"{error}{kept if job.pairs else ''}") from error.__cause__
        manifest = read_json(job.manifest, {})
        print(f"{folder} is already built by these settings" if built else
              describe(manifest, folder, time.perf_counter() - began))
        shutil.rmtree(downloads, ignore_errors=True)
    splits = manifest["splits"]
    if splits["val"]["tokens"]:
        tokens = ranks * splits["train"]["tokens"]  # about, on several machines
        print(f"next: {training_command(folder, tokens)}")


if __name__ == "__main__":
    build(**configure(globals()))
