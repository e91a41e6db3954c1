"""
Text in, shards out: FineWeb-Edu from the Hugging Face hub, your own files, or the source of Python itself.

    python fineweb.py                                                # FineWeb-Edu: 10B tokens, 20 GB
    python fineweb.py --input=books/,more.jsonl.gz --data_dir=books  # parquet, jsonl[.gz|.zst], txt
    python fineweb.py --dataset=python --data_dir=python_corpus      # no download; 100M tokens in 10 s

Writes data_dir/NAME_{train,val}_000000.npy, ... and, last, manifest.json (shards.py has the formats). The
output is the same, byte for byte, for any number of workers. A folder that holds something else is refused; a
build that was killed starts over when it is run again, and one that is finished is left as it is.

A document is a row of a parquet file, a line of a jsonl file or a whole txt file; nulls and empty ones are
skipped and counted. It becomes <|endoftext|> and the tokens of its text, in which <|endoftext|> is ordinary
text and bytes that are not UTF-8 count as U+FFFD. A hash of the text decides its side, so that equal
documents never end up on both. If that leaves a side empty (a single txt file, say), the corpus is cut at the
line boundary nearest to its last val_fraction instead, and its end becomes validation.
"""
import contextlib
import functools
import hashlib
import itertools
import json
import multiprocessing
import operator
import os
import re
import shlex
import signal
import string
import sys
import sysconfig
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numba import njit

from bpe import load_tokenizer
from configurator import UserError, configure
from shards import (
    UNFINISHED,
    ShardWriter,
    TokenStream,
    list_shards,
    read_manifest,
    write_atomically,
    write_manifest,
)

# ---- settings: override with a config file and/or --key=value -----------------
dataset = "fineweb-edu"     # fineweb-edu or fineweb from the hub, or python: this installation's source
subset = "sample-10BT"      # of the hub's: sample-10BT, sample-100BT, sample-350BT, default, or CC-MAIN-...
input = ""                  # your own files instead: PATH[,PATH...], each a file, a glob or a folder
text_column = "text"        # the parquet column or jsonl field that holds the text
data_dir = "edu_fineweb10B"  # where the shards go
tokenizer = "gpt2"          # gpt2, or a rank file in tiktoken's format
shard_tokens = 100_000_000  # tokens per shard: 200 MB
val_fraction = 0.01         # share of documents for validation; 0 = none
max_tokens = 0              # stop after the document that reaches this many; 0 = all
num_workers = 0             # processes; 0 = one per core
shard_format = "npy"        # npy, or bin with llm.c's header
seed = 1337                 # order of the documents of --dataset=python

HUB_NAMES = {"fineweb-edu": "edufineweb", "fineweb": "fineweb"}  # of HuggingFaceFW: name of its shards
HUB_TIMEOUT = 10            # seconds to wait for the hub's answer
SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt")
CHUNK_BYTES = 1 << 23       # text that a worker tokenizes at a time; enough to hide the pool's overhead
BIG_ROW_GROUP = 8 * CHUNK_BYTES  # row groups above this are read by the parent, piece by piece

# ---- D documents: `text` uint8 (n,), end to end, and `offsets` int64 (D+1,), from 0 to n ----


class Chunk(NamedTuple):
    """Some megabytes of documents, cheap to send to a worker: where to find them, or the bytes themselves."""
    read: Callable[..., Iterable]  # read(*args) yields (text, offsets), in order
    args: tuple
    cut: tuple[int, int, int] | None = None  # sides by hash; or by place, as cut_chunks says


class Encoded(NamedTuple):
    """What a worker returns for a chunk with D documents that are not empty."""
    train: np.ndarray   # ids of the documents on each side, uint16, in order
    val: np.ndarray
    is_val: np.ndarray  # bool (D,)
    tokens: np.ndarray  # of each document, int64 (D,)
    sizes: np.ndarray   # bytes of text of each, int64 (D,)
    empty: int          # documents skipped


@njit(cache=True)
def hash_kernel(text, offsets, out):
    """out[d], uint64 (D,), becomes a 64-bit hash of the bytes of document d.

    h starts from the length, takes eight bytes at a time (little-endian, the last word padded with zeros) by
    h = (h ^ word) * odd; h ^= h >> 32, which loses nothing of h, and ends with MurmurHash3's finaliser.
    """
    for d in range(len(out)):
        start, stop = offsets[d], offsets[d + 1]
        h = np.uint64(stop - start) * np.uint64(0x9E3779B97F4A7C15)
        for i in range(start, stop, 8):
            word = np.uint64(0)
            for k in range(min(8, stop - i)):
                word |= np.uint64(text[i + k]) << np.uint64(8 * k)
            h = (h ^ word) * np.uint64(0xD6E8FEB86659FD93)
            h ^= h >> np.uint64(32)
        h = (h ^ (h >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
        h = (h ^ (h >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
        out[d] = h ^ (h >> np.uint64(33))


def hash_documents(text: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """64-bit hashes of the documents, uint64 (D,)."""
    text = text.view()
    text.flags.writeable = False  # one compiled kernel for arrays of both kinds
    out = np.empty(len(offsets) - 1, dtype=np.uint64)
    hash_kernel(text, offsets, out)
    return out


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


def pack(documents: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """(text, offsets) of a list of documents."""
    offsets = np.zeros(len(documents) + 1, dtype=np.int64)
    np.cumsum([len(document) for document in documents], out=offsets[1:])
    return np.frombuffer(b"".join(documents), dtype=np.uint8), offsets


@contextlib.contextmanager
def reading(path: Path):
    """Turn what goes wrong while a user's file is read into a UserError that names it."""
    try:
        yield
    except UserError:
        raise
    except (OSError, EOFError, ValueError, zlib.error) as error:  # Arrow's errors are OSError and ValueError
        raise UserError(f"{path}: cannot be read ({error}); it is damaged or not what its name says: replace "
                        f"it, or leave it out of --input") from error


# ---- readers of each kind of file ----------------------------------------------


def parquet_chunks(path: Path, column: str) -> Iterator[Chunk]:
    """One chunk per row group, to be read by a worker; several of a row group too large for one."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    with reading(path):
        with pq.ParquetFile(path) as file:
            names, metadata = file.schema_arrow.names, file.metadata
            kind = file.schema_arrow.field(column).type if column in names else None
        if kind is not None and pa.types.is_dictionary(kind):
            kind = kind.value_type
        if kind not in (pa.string(), pa.large_string()):
            got = f"type {kind} in column {column!r}" if kind else f"columns {', '.join(names)}"
            raise UserError(f"{path}: got {got}, wanted a column of text; name it with --text_column=...")
        for group in range(metadata.num_row_groups):
            columns = [metadata.row_group(group).column(i) for i in range(metadata.num_columns)]
            size = sum(c.total_uncompressed_size for c in columns if c.path_in_schema == column)
            rows = max(1, metadata.row_group(group).num_rows * CHUNK_BYTES // max(1, size))
            if size <= BIG_ROW_GROUP:
                yield Chunk(read_parquet, (path, group, column, rows))
            else:  # cannot be entered in the middle, and would fill the memory if every worker took one
                for documents in read_parquet(path, group, column, rows):
                    yield Chunk(iter, ([documents],))


def read_parquet(path: Path, group: int, column: str, rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(text, offsets) of a row group, `rows` documents at a time, from Arrow's own buffers."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    with reading(path), pq.ParquetFile(path, buffer_size=1 << 20) as file:
        for batch in file.iter_batches(rows, row_groups=[group], columns=[column], use_threads=False):
            array = batch.column(0)
            if pa.types.is_dictionary(array.type):
                array = array.dictionary_decode()
            yield arrow_documents(array)


def arrow_documents(array) -> tuple[np.ndarray, np.ndarray]:
    """(text, offsets) of an Arrow array of (large_)string, without a copy of the text; a null is empty."""
    if array.null_count:
        array = array.fill_null("")  # a null may have bytes under it
    width = np.int64 if str(array.type) == "large_string" else np.int32
    _, offsets, text = array.buffers()
    if not len(array) or text is None:  # no bytes at all
        return np.zeros(0, dtype=np.uint8), np.zeros(len(array) + 1, dtype=np.int64)
    offsets = np.frombuffer(offsets, dtype=width)[array.offset:array.offset + len(array) + 1].astype(np.int64)
    return np.frombuffer(text, dtype=np.uint8)[offsets[0]:offsets[-1]], offsets - offsets[0]


def jsonl_chunks(path: Path, column: str) -> Iterator[Chunk]:
    """Whole lines: decompressed here, as a file cannot be entered in the middle; parsed by the workers."""
    import pyarrow as pa
    line, rest = 1, b""
    compression = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    with reading(path), pa.input_stream(str(path), compression=compression) as file:
        while block := file.read(CHUNK_BYTES):
            head, newline, tail = block.rpartition(b"\n")
            if newline:
                block = rest + head + newline
                yield Chunk(read_jsonl, (path, line, block, column))
                line, rest = line + block.count(b"\n"), tail
            else:
                rest += block
        if rest:
            yield Chunk(read_jsonl, (path, line, rest, column))


def read_jsonl(path: Path, first_line: int, block: bytes,
               column: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(text, offsets) of a block of lines; UserError with the file, the line and the reason for a bad one."""
    documents = []
    for number, line in enumerate(block.split(b"\n"), first_line):
        if not line.strip():
            continue
        try:
            text = (row := json.loads(line))[column]
            documents.append(b"" if text is None else text.encode("utf-8", "surrogatepass"))
        except (ValueError, RecursionError) as error:
            reason = f"not JSON: {error}"
        except KeyError:
            reason = f"got fields {', '.join(row)}; name the one with the text with --text_column=..."
        except (TypeError, AttributeError):
            reason = f"wanted an object with a string in field {column!r} (--text_column)"
        else:
            continue
        raise UserError(f"{path}, line {number}: {reason}; mend or delete the line, then run this again")
    yield pack(documents)


def document_chunks(documents: Iterable[tuple[Path | bytes, int]]) -> Iterator[Chunk]:
    """Chunks of documents that are each a whole file, or bytes; `documents` yields (path or bytes, size)."""
    some, total = [], 0
    for document, size in documents:
        if some and total + size > CHUNK_BYTES:
            yield Chunk(read_documents, (some,))
            some, total = [], 0
        some.append(document)
        total += size
    if some:
        yield Chunk(read_documents, (some,))


def read_documents(documents: list[Path | bytes]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(text, offsets) of documents that are each a whole file, or bytes."""
    texts = []
    for document in documents:
        with reading(document):
            texts.append(document if isinstance(document, bytes) else document.read_bytes())
    yield pack(texts)


# ---- sources: facts for the manifest, and a function that yields the chunks in order ----


def input_source(input: str, column: str) -> tuple[dict, Callable[[], Iterator[Chunk]]]:
    """The files named by --input, in the order given; those of a folder or a glob sorted by name."""
    files: dict[Path, None] = {}
    for name in filter(None, input.split(",")):
        path = Path(name).expanduser()
        if path.is_dir():  # may hold other files too; what is named itself must be of a known kind
            found = [file for file in sorted(path.rglob("*")) if file.name.endswith(SUFFIXES)]
        else:
            top = Path(path.anchor)
            found = [path] if path.exists() else sorted(top.glob(str(path.relative_to(top))))
        wrong = [file.name for file in found if not file.name.endswith(SUFFIXES)]
        if wrong or not found:
            raise UserError(f"--input={name}: got {wrong[0] if wrong else 'no such files'}, wanted a file, a "
                            f"glob or a folder of {', '.join(SUFFIXES)}")
        files.update(dict.fromkeys(found))

    def chunks() -> Iterator[Chunk]:
        for suffix, group in itertools.groupby(files, key=operator.attrgetter("suffix")):
            if suffix == ".txt":
                yield from document_chunks((file, file.stat().st_size) for file in group)
            else:
                for file in group:
                    yield from (parquet_chunks if suffix == ".parquet" else jsonl_chunks)(file, column)

    return {"files": len(files), "file_bytes": sum(file.stat().st_size for file in files)}, chunks


def hub_source(dataset: str, subset: str, column: str) -> tuple[dict, Callable[[], Iterator[Chunk]]]:
    """The parquet files of a subset on the hub, one at a time, kept in the hub's own cache (HF_HOME)."""
    import huggingface_hub
    repo = f"HuggingFaceFW/{dataset}"
    folder = f"sample/{subset[7:]}" if subset.startswith("sample-") else f"data/{subset}"
    folder = "data" if subset == "default" else folder

    def hub(call: Callable, **arguments):
        try:
            return call(repo_id=repo, repo_type="dataset", **arguments)
        except Exception as error:  # the hub's client raises its own classes, its HTTP library's and OSError
            raise UserError(
                f"cannot get {repo} ({subset}) from the Hugging Face hub ({type(error).__name__}: {error}).\n"
                f"Other ways: a mirror, with HF_ENDPOINT=https://...; the files of its folder {folder}/ "
                f"(000_00000.parquet, ...) fetched elsewhere, with --input=FOLDER; ready-made uint16 shards "
                f"(*_train_*.npy or .bin, *_val_*) put into data_dir; or --dataset=python or `make demo`, "
                f"which need no download") from error

    info = hub(huggingface_hub.HfApi().repo_info, timeout=HUB_TIMEOUT)
    files = sorted(file.rfilename for file in info.siblings
                   if file.rfilename.startswith(f"{folder}/") and file.rfilename.endswith(".parquet"))
    if not files:
        raise UserError(f"got subset={subset!r}, but {repo} has no parquet files in {folder}/; wanted one of "
                        f"its subsets, such as --subset=sample-10BT")

    def chunks() -> Iterator[Chunk]:
        for i, file in enumerate(files):
            print(f"file {i + 1} of {len(files)}: {file}", file=sys.stderr)
            path = hub(huggingface_hub.hf_hub_download, filename=file, revision=info.sha,
                       etag_timeout=HUB_TIMEOUT)
            yield from parquet_chunks(Path(path), column)

    return {"repo": repo, "revision": info.sha, "files": len(files)}, chunks


def python_source(seed: int) -> tuple[dict, Callable[[], Iterator[Chunk]]]:
    """The embedded corpus: source of the standard library and the installed packages, and the texts beside.

    Read: .py, .rst, .md and .txt files, and the topics of pydoc's help. Left out, and counted: files that
    worth_learning refuses, and those that cannot be read. Equal ones count once. The order is that of a keyed
    hash of the contents: the same whatever order the file system lists them in.
    """
    from pydoc_data.topics import topics
    found: dict[bytes, tuple[Path | bytes, int]] = {}  # hash: (document, bytes)
    left_out = 0

    def add(text: bytes, document: Path | bytes) -> None:
        found.setdefault(hashlib.blake2b(text, key=str(seed).encode()).digest(), (document, len(text)))

    for topic in topics.values():
        add(topic.encode(), topic.encode())
    roots = [Path(sysconfig.get_path(key)).resolve() for key in ("stdlib", "purelib", "platlib")]
    for root in dict.fromkeys(roots):
        # the standard library's folder may hold the packages of another environment, and no others are wanted
        hidden = {"__pycache__", *(("site-packages", "dist-packages") if root == roots[0] else ())}
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = [name for name in subfolders if name not in hidden and not name.startswith(".")]
            for name in names:
                path = Path(folder, name)
                if path.suffix not in (".py", ".rst", ".md", ".txt"):
                    continue
                try:
                    text = path.read_bytes()
                except OSError:
                    text = b""
                if worth_learning(text):
                    add(text, path)
                else:
                    left_out += 1
    documents = [found[key] for key in sorted(found)]
    return {"documents": len(documents), "files_left_out": left_out}, lambda: document_chunks(documents)


def worth_learning(text: bytes) -> bool:
    """Whether a file looks like something to learn to write from, rather than a table or generated code.

    That is: 200 bytes to 500 kB of UTF-8, no line over 1,000 bytes, 40 or more ASCII letters in 100 bytes.
    """
    if not 200 <= len(text) <= 500_000 or max(map(len, text.split(b"\n"))) > 1000:
        return False
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    letters = len(text) - len(text.translate(None, string.ascii_letters.encode()))
    return letters >= 0.4 * len(text)


# ---- tokenizing, in a pool of processes ----------------------------------------

tokenizer_of = functools.cache(load_tokenizer)  # once per process


def cut_chunks(chunks: Iterable[Chunk], sizes: list[int], cut_at: int) -> Iterator[Chunk]:
    """The chunks again, of which an earlier pass took `sizes` bytes each, now with a cut at byte `cut_at`.

    Each gets cut=(cut_at counted from its own start, bytes of the validation part, bytes of it to take).
    """
    start = 0
    for chunk, size in zip(chunks, sizes):
        yield chunk._replace(cut=(cut_at - start, sum(sizes) - cut_at, size))
        start += size


def cut_documents(text: np.ndarray, offsets: np.ndarray, near: int,
                  span: int) -> tuple[np.ndarray, np.ndarray]:
    """(offsets, is_val) with the document around byte `near` of the text cut in two; is_val from there on."""
    d = int(np.searchsorted(offsets, near, side="right")) - 1
    if 0 <= d < len(offsets) - 1 and offsets[d] < near:
        start, stop = offsets[d], offsets[d + 1]
        near = start + cut_point(text[start:stop].tobytes(), int(near - start), span)
        offsets = np.unique(np.append(offsets, near))
    return offsets, offsets[:-1] >= near


def encode_chunk(chunk: Chunk, tokenizer: str, val_fraction: float) -> Encoded:
    """Tokenize a chunk, in a worker, and deal its documents to the two sides."""
    tok = tokenizer_of(tokenizer)
    none = np.zeros(0, dtype=np.int64)
    parts, empty, before = [(none, none, none.astype(bool), none, none)], 0, 0
    for text, offsets in chunk.read(*chunk.args):
        empty += int((np.diff(offsets) == 0).sum())
        offsets = np.unique(offsets)  # an empty document's end is the one before it
        if chunk.cut is None:
            is_val = hash_documents(text, offsets) < np.uint64(val_fraction * 2.0**64)
        else:
            near, span, take = chunk.cut
            offsets = offsets[offsets <= max(0, take - before)]
            offsets, is_val = cut_documents(text, offsets, near - before, span)
            before += len(text)
        ids, id_offsets = tok.encode_documents(text[:offsets[-1]], offsets)
        tokens = np.diff(id_offsets)
        in_val = np.repeat(is_val, tokens)
        parts.append((ids[~in_val], ids[in_val], is_val, tokens, np.diff(offsets)))
    return Encoded(*(np.concatenate(arrays) for arrays in zip(*parts)), empty)


def start_worker() -> None:
    """Leave Ctrl-C to the parent, and die with it: one that waits would outlive a parent that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def submit(pool: ProcessPoolExecutor, job: tuple) -> Future:
    """encode_chunk(*job) in the pool; BrokenProcessPool if a worker died, also while another is started."""
    try:
        return pool.submit(encode_chunk, *job)
    except (OSError, ValueError) as error:  # starting a worker, the pool found its pipes closed
        raise BrokenProcessPool(str(error)) from error


def encode_in_order(jobs: Iterable[tuple], num_workers: int) -> Iterator[Encoded]:
    """encode_chunk(*job) of each job, in order; at most 2 * num_workers + 1 of them are in memory at once."""
    if num_workers == 1:
        yield from (encode_chunk(*job) for job in jobs)
        return
    # spawn on every platform: a fork copies the locks of whatever threads numba, Arrow and the hub started
    pool = ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), initializer=start_worker)
    pending = deque()
    try:
        for job in jobs:
            pending.append(submit(pool, job))
            if len(pending) > 2 * num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        # the pool ends the workers that it knew of when one died, and waits for ever for one it started since
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise UserError(f"one of {num_workers} worker processes died, most often because memory ran out; run "
                        f"this again, with a smaller --num_workers=... if it was that") from error
    finally:
        pool.shutdown(cancel_futures=True)


def write_splits(chunks: Iterable[Chunk], writers: dict[str, ShardWriter], job: tuple, num_workers: int,
                 max_tokens: int) -> tuple[dict[str, np.ndarray], int, list[int]]:
    """Tokenize chunks into the two writers, up to the document that reaches max_tokens (0 = all).

    job: the other arguments of encode_chunk. Returns ({split: documents, tokens and bytes of text}, empty
    documents, bytes of text taken from each chunk).
    """
    from tqdm import tqdm
    totals = {split: np.zeros(3, dtype=np.int64) for split in writers}
    tokens, empty, taken, began = 0, 0, [], time.perf_counter()
    quiet = not sys.stderr.isatty()  # then a line per minute is enough
    with tqdm(unit="B", unit_scale=True, mininterval=60 if quiet else 0.5) as bar, contextlib.closing(
            encode_in_order(((chunk, *job) for chunk in chunks), num_workers)) as results:
        for done in results:
            count = len(done.tokens)
            if max_tokens:
                count = min(count, 1 + int(np.searchsorted(np.cumsum(done.tokens), max_tokens - tokens)))
            for split, ids, side in (("train", done.train, ~done.is_val), ("val", done.val, done.is_val)):
                chosen = np.flatnonzero(side[:count])
                added = np.array([len(chosen), done.tokens[chosen].sum(), done.sizes[chosen].sum()])
                writers[split].append(ids[:added[1]])
                totals[split] += added
                tokens += int(added[1])
            empty += done.empty
            taken.append(int(done.sizes[:count].sum()))
            rate = tokens / (time.perf_counter() - began)
            bar.set_postfix_str(f"{tokens:,} tokens, {rate:,.0f} tok/s", refresh=False)
            bar.update(taken[-1])
            if max_tokens and tokens >= max_tokens:
                break
    return totals, empty, taken


# ---- the folder ----------------------------------------------------------------


def claim_folder(folder: Path, name: str, settings: dict, command: str) -> bool:
    """Make the folder ready for a build by these settings; False if it holds that very build, finished.

    Raises UserError if it holds anything else that a build would mix with or overwrite.
    """
    ways = "delete it yourself if you no longer need it, or give another --data_dir=..."
    manifest = read_manifest(folder)
    if manifest is not None:
        have = manifest.get("settings", {})
        different = [f"{key}={have.get(key)}, wanted {settings[key]}" for key in settings
                     if have.get(key) != settings[key]]
        if different:
            raise UserError(f"{folder} holds a finished build by other settings: got {'; '.join(different)}; "
                            f"{ways}")
        TokenStream(folder, "train")  # raises if a shard has gone missing
        (folder / UNFINISHED).unlink(missing_ok=True)
        return False
    if (folder / UNFINISHED).exists():
        try:
            left = json.loads((folder / UNFINISHED).read_text(encoding="utf-8"))
        except ValueError:
            left = {}
        if left.get("settings") != settings:
            raise UserError(f"{folder} holds an unfinished build by other settings, {left.get('command')}; "
                            f"{ways}")
        remove_shards(folder, name)
    elif found := list_shards(folder, "train") + list_shards(folder, "val"):
        raise UserError(f"{folder} holds shards already ({found[0].name}, ...); {ways}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder} ({error.strerror}); {ways}") from error
    left = json.dumps({"settings": settings, "command": command}, indent=1)
    write_atomically(folder / UNFINISHED, left.encode())
    return True


def remove_shards(folder: Path, name: str) -> None:
    """Remove what an unfinished build of this name can have left, and nothing else."""
    ours = re.compile(rf"{re.escape(name)}_(train|val)_\d{{6}}\.(npy|bin)(\.\d+\.tmp)?"
                      r"|(manifest|build)\.json\.\d+\.tmp")
    for path in folder.iterdir():
        if ours.fullmatch(path.name):
            path.unlink()


def build(dataset: str, subset: str, input: str, text_column: str, data_dir: str, tokenizer: str,
          shard_tokens: int, val_fraction: float, max_tokens: int, num_workers: int, shard_format: str,
          seed: int) -> None:
    """Build data_dir; the arguments are the settings at the top of this file. Raises UserError."""
    if dataset not in (*HUB_NAMES, "python"):
        raise UserError(f"got dataset={dataset!r}, wanted {', '.join(HUB_NAMES)} or python; "
                        f"your own files go into --input=PATH[,PATH...]")
    if not 0 <= val_fraction < 1 or shard_tokens < 1 or max_tokens < 0 or num_workers < 0:
        raise UserError(f"got --val_fraction={val_fraction} --shard_tokens={shard_tokens} "
                        f"--max_tokens={max_tokens} --num_workers={num_workers}, wanted a val_fraction from "
                        f"0 to below 1, shard_tokens of 1 or more, the others 0 or more")
    if shard_format not in ("npy", "bin"):
        raise UserError(f"got shard_format={shard_format!r}, wanted --shard_format=npy or bin")
    if input:
        name, origin = "text", {"input": input, "text_column": text_column}
    elif dataset == "python":
        name, origin = "python", {"dataset": dataset, "seed": seed}
    else:
        name, origin = HUB_NAMES[dataset], {"dataset": dataset, "subset": subset, "text_column": text_column}
    tok = tokenizer_of(tokenizer)
    if tok.n_vocab > 1 << 16:
        raise UserError(f"tokenizer {tok.name} has {tok.n_vocab:,} tokens, wanted at most 65,536, as ids are "
                        f"uint16; choose another --tokenizer=...")
    flags = {**origin, "tokenizer": tokenizer, "shard_tokens": shard_tokens, "val_fraction": val_fraction,
             "max_tokens": max_tokens, "shard_format": shard_format}
    settings = {**flags, "tokenizer_sha256": tok.sha256}  # all that the bytes of the shards depend on
    command = shlex.join(["python", "fineweb.py", f"--data_dir={data_dir}",
                          *(f"--{key}={value}" for key, value in flags.items())])
    folder, began = Path(data_dir), time.perf_counter()
    hint = f"next: python train_gpt2.py --data_dir={shlex.quote(data_dir)}"
    if not claim_folder(folder, name, settings, command):
        print(f"{folder} is already built by these settings. {hint}")
        return

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    job, workers, cut_at = (tokenizer, val_fraction), num_workers or cores, None

    def new_writers() -> dict[str, ShardWriter]:
        return {split: ShardWriter(folder, name, split, shard_tokens, shard_format)
                for split in ("train", "val")}

    try:
        if input:
            facts, chunks = input_source(input, text_column)
        elif dataset == "python":
            facts, chunks = python_source(seed)
        else:
            facts, chunks = hub_source(dataset, subset, text_column)
        writers = new_writers()
        totals, empty, sizes = write_splits(chunks(), writers, job, workers, max_tokens)
        if not sum(sizes):
            raise UserError(f"got a corpus without text ({empty} empty documents), wanted some; check "
                            f"--input and --text_column")
        if val_fraction and not all(total.any() for total in totals.values()):
            # too few documents, or too many equal ones, for a hash to deal out: once more, with a cut
            cut_at = min(max(1, int(sum(sizes) * (1 - val_fraction))), sum(sizes) - 1)
            remove_shards(folder, name)
            writers = new_writers()
            totals, empty, _ = write_splits(cut_chunks(chunks(), sizes, cut_at), writers, job, workers, 0)
            if not all(total.any() for total in totals.values()):
                raise UserError(f"got {sum(sizes)} bytes of text, too few to cut in two; wanted more, or "
                                f"--val_fraction=0")
        files = writers["train"].close() + writers["val"].close()
    except UserError:  # nothing is worth keeping; what a killed build leaves is cleared by its next run
        remove_shards(folder, name)
        (folder / UNFINISHED).unlink(missing_ok=True)
        raise
    splits = {split: dict(zip(("documents", "tokens", "text_bytes"), total.tolist()))
              for split, total in totals.items()}
    documents, tokens, text_bytes = (totals["train"] + totals["val"]).tolist()
    write_manifest(folder, {
        "tokenizer": {"name": tok.name, "sha256": tok.sha256, "n_vocab": tok.n_vocab}, "eot": tok.eot,
        "settings": settings, "source": facts, "cut_at_byte": cut_at, "documents": documents,
        "empty_documents": empty, "tokens": tokens, "text_bytes": text_bytes, "splits": splits,
        "files": files})
    (folder / UNFINISHED).unlink()
    print(f"{documents:,} documents ({empty:,} empty ones skipped), {tokens:,} tokens, "
          f"{text_bytes / tokens:.3f} bytes per token, {time.perf_counter() - began:.1f} s; in {folder}: "
          f"{len(writers['train'].records)} train and {len(writers['val'].records)} val shards (the last of "
          f"each is short: it holds what is left). {hint}")


if __name__ == "__main__":
    build(**configure(globals()))
