"""
Documents of text, read in chunks that many processes can work on: parquet, jsonl, txt, the embedded corpus.

    source = input_source("books/,more.jsonl.gz", column="text")
    for unit, index, chunk in source.chunks():      # cheap: says where to read, or holds the bytes
        for documents in chunk.read(*chunk.args):   # in any process: Documents, in order
            ...

A document is a row of a parquet file, a line of a jsonl file, or a whole txt file. D documents are `text`,
uint8 (n,), their bytes end to end, and `offsets`, int64 (D+1,), from 0 to n: Arrow's own buffers, without a
Python object per document. The cut into chunks depends on the files alone, so that what is made of them is
the same for any number of processes, and (unit, index) names a place from which a later run can go on.

Imported by fineweb.py, bpe.py and analyze_tokenizer.py; nothing to run. Holds a chunk or two at a time,
however large a file is.
"""
import codecs
import contextlib
import functools
import hashlib
import itertools
import json
import os
import string
import sys
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numba import njit

from bpe import U, load_word
from configurator import UserError
from files import write_atomically

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt")
CHUNK_BYTES = 1 << 23  # text that a process works on at a time; enough to hide the pool's overhead
SHARDS_PER_PARQUET = 0.75  # bytes of shards per byte of FineWeb's parquet files, at most
BIG = 8 * CHUNK_BYTES  # row groups and txt files above this are handed out piece by piece


class Documents(NamedTuple):
    """D documents, and what was left out between them."""
    text: np.ndarray         # uint8 (n,)
    offsets: np.ndarray      # int64 (D+1,)
    label: str               # document d is at f"{label}{numbers[d]}", for messages
    numbers: Sequence
    bad: Sequence[tuple[str, str]] = ()  # (place, reason) of what cannot be read
    hash: int | None = None  # of the whole document, where this is a piece of one


class Chunk(NamedTuple):
    """Some megabytes of documents, cheap to send to a process: where they are, or the bytes themselves."""
    read: Callable[..., Iterable[Documents]]  # read(*args) yields them in order
    args: tuple
    continues: bool = False  # its first document is the next piece of the last one of the chunk before


class Source(NamedTuple):
    """Units (files, or groups of small ones) of chunks."""
    facts: dict              # what the manifest should know of it
    identity: str            # of the documents and their order, where a build's settings do not say them
    chunks: Callable[..., Iterator[tuple[int, int, Chunk]]]  # chunks(unit=0, index=0): from that place on
    release: Callable[[int], None] | None = None  # to be called when all of a unit is safe in shards


def source_of(facts: dict, identity: str, units: list[Callable[[], Iterator[Chunk]]]) -> Source:
    """The Source whose unit u has the chunks that units[u]() yields."""
    def chunks(unit: int = 0, index: int = 0) -> Iterator[tuple[int, int, Chunk]]:
        for u in range(unit, len(units)):
            for i, chunk in enumerate(units[u]()):
                if (u, i) >= (unit, index):
                    yield u, i, chunk

    return Source(facts, identity, chunks)


# ---- identity: a 64-bit hash of the bytes ---------------------------------------


@njit(cache=True, error_model="numpy")
def hash_words(h, text, start, stop):
    """h after text[start:stop], eight bytes at a time (little-endian, the last word padded with zeros).

    h = (h ^ word) * odd; h ^= h >> 32, which loses nothing of h.
    """
    i = start
    while i + 8 <= stop:
        h = (h ^ load_word(text, i)) * U(0xD6E8FEB86659FD93)
        h ^= h >> U(32)
        i += 8
    if i < stop:
        word = U(0)
        for k in range(stop - i):
            word |= U(text[i + k]) << U(8 * k)
        h = (h ^ word) * U(0xD6E8FEB86659FD93)
        h ^= h >> U(32)
    return h


@njit(cache=True, error_model="numpy")
def hash_finish(h):
    """MurmurHash3's finaliser: every bit of h reaches every other."""
    h = (h ^ (h >> U(33))) * U(0xFF51AFD7ED558CCD)
    h = (h ^ (h >> U(33))) * U(0xC4CEB9FE1A85EC53)
    return h ^ (h >> U(33))


@njit(cache=True, error_model="numpy")
def hash_kernel(text, offsets, out):
    """out[d], uint64 (D,), becomes the hash of the bytes of document d; it starts from their number."""
    for d in range(len(out)):
        h = U(offsets[d + 1] - offsets[d]) * U(0x9E3779B97F4A7C15)
        out[d] = hash_finish(hash_words(h, text, offsets[d], offsets[d + 1]))


def hash_documents(text: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """64-bit hashes of the documents, uint64 (D,)."""
    text = text.view()
    text.flags.writeable = False  # one compiled kernel for arrays of both kinds
    out = np.empty(len(offsets) - 1, dtype=np.uint64)
    hash_kernel(text, offsets, out)
    return out


def fingerprint(files: Iterable[Path]) -> str:
    """16 hex digits of names, sizes and contents; of a file above 64 MB, of 64 MB spread over it."""
    digest = hashlib.sha256()
    for path in files:
        with reading(path), open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"{path.name}\0{size}\0".encode())
            n_blocks = 64 if size > 64 << 20 else -(-size >> 20)
            for k in range(n_blocks):
                file.seek((size - (1 << 20)) * k // 63 if n_blocks == 64 else k << 20)
                digest.update(file.read(1 << 20))
    return digest.hexdigest()[:16]


# ---- readers of each kind of file ----------------------------------------------


class Damaged(Exception):
    """The contents of a file make no sense."""


@contextlib.contextmanager
def reading(path: Path):
    """Tell apart what goes wrong: Damaged for the contents, UserError for what the system does not give."""
    try:
        yield
    except UserError:
        raise
    except (OSError, EOFError, ValueError, zlib.error) as error:  # Arrow's errors are OSError and ValueError
        if getattr(error, "errno", None) is None:
            raise Damaged(error) from error
        raise UserError(f"{path}: cannot be read ({error.strerror}); mend that, or leave the file out of "
                        f"--input") from error


def pack(documents: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """(text, offsets) of a list of documents."""
    offsets = np.zeros(len(documents) + 1, dtype=np.int64)
    np.cumsum([len(document) for document in documents], out=offsets[1:])
    return np.frombuffer(b"".join(documents), dtype=np.uint8), offsets


def nothing_but(place: str, reason: str) -> Documents:
    """No documents, and the place where some should have been."""
    return Documents(*pack([]), "", (), [(place, " ".join(str(reason).split()))])


def bad_chunk(place: str, reason: str) -> Chunk:
    return Chunk(iter, ([nothing_but(place, reason)],))


def parquet_chunks(path: Path, column: str) -> Iterator[Chunk]:
    """One chunk per row group, to be read by a worker; several of a row group too large for one."""
    import pyarrow.parquet as pq
    try:
        with reading(path), pq.ParquetFile(path) as file:
            names, metadata = file.schema_arrow.names, file.metadata
            kind = file.schema_arrow.field(column).type if column in names else None
    except Damaged as error:
        yield bad_chunk(str(path), f"no parquet file ({error})")
        return
    if reason := wrong_column(names, kind, column):
        yield bad_chunk(str(path), reason)
        return
    first = 0
    for group in range(metadata.num_row_groups):
        rows, size = metadata.row_group(group).num_rows, text_bytes(metadata, group, column)
        at_once = max(1, rows * CHUNK_BYTES // max(1, size))
        if size <= BIG:
            yield Chunk(read_row_group, (path, group, column, first, rows, at_once))
        else:  # cannot be entered in the middle, and would fill the memory if every worker took one
            for documents in read_row_group(path, group, column, first, rows, at_once):
                yield Chunk(iter, ([documents],))
        first += rows


def wrong_column(names: list[str], kind, column: str) -> str | None:
    """What is wrong with a column of the Arrow type `kind` (None = there is none), or None."""
    import pyarrow as pa
    if kind is not None and pa.types.is_dictionary(kind):
        kind = kind.value_type
    if kind in (pa.string(), pa.large_string()):
        return None
    got = f"type {kind} in column {column!r}" if kind else f"columns {', '.join(names)}"
    return f"got {got}, wanted a column of text; name it with --text_column=..."


def text_bytes(metadata, group: int, column: str) -> int:
    """Bytes of a column in a row group before compression."""
    row_group = metadata.row_group(group)
    columns = [row_group.column(i) for i in range(metadata.num_columns)]
    return sum(c.total_uncompressed_size for c in columns if c.path_in_schema == column)


def read_row_group(path: Path, group: int, column: str, first: int, rows: int,
                   at_once: int) -> Iterator[Documents]:
    """A row group, `at_once` documents at a time, from Arrow's own buffers; first: its first row's number."""
    import pyarrow.parquet as pq
    done = 0
    try:
        with reading(path), pq.ParquetFile(path, buffer_size=1 << 20) as file:
            for batch in file.iter_batches(at_once, row_groups=[group], columns=[column], use_threads=False):
                yield arrow_documents(batch.column(0), f"{path}, row ", first + done)
                done += len(batch)
    except Damaged as error:
        place = f"{path}, row group {group}, rows {first + done} to {first + rows - 1}"
        yield nothing_but(place, f"damaged ({error})")


def arrow_documents(array, label: str, first: int) -> Documents:
    """An Arrow array of (large_)string, plain or dictionary, without a copy; first: its first row's number.
    """
    import pyarrow as pa
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    numbers, bad = range(first, first + len(array)), []
    if array.null_count:
        null = array.is_null().to_numpy(zero_copy_only=False)
        bad = [(f"{label}{first + int(row)}", "null, wanted text") for row in np.flatnonzero(null)]
        numbers, array = (first + np.flatnonzero(~null)).tolist(), array.drop_null()
    width = np.int64 if str(array.type) == "large_string" else np.int32
    _, offsets, text = array.buffers()
    if not len(array) or text is None:  # no bytes at all
        return Documents(*pack([b""] * len(array)), label, numbers, bad)
    offsets = np.frombuffer(offsets, dtype=width)[array.offset:array.offset + len(array) + 1].astype(np.int64)
    text = np.frombuffer(text, dtype=np.uint8)[offsets[0]:offsets[-1]]
    return Documents(text, offsets - offsets[0], label, numbers, bad)


def jsonl_chunks(path: Path, column: str) -> Iterator[Chunk]:
    """Whole lines: decompressed here, as a file cannot be entered in the middle; parsed by the workers."""
    import pyarrow as pa
    line, rest = 1, b""
    compression = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    try:
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
    except Damaged as error:
        yield bad_chunk(f"{path}, from line {line} on", f"damaged ({error})")


def read_jsonl(path: Path, first_line: int, block: bytes, column: str) -> Iterator[Documents]:
    """The documents of a block of lines."""
    documents, numbers, bad = [], [], []
    for number, line in enumerate(block.split(b"\n"), first_line):
        if not line.strip():
            continue
        try:
            text = (row := json.loads(line))[column]
            documents.append(text.encode())
            numbers.append(number)
            continue
        except UnicodeEncodeError:
            reason = "half of a surrogate pair, wanted text that UTF-8 can hold"
        except (ValueError, RecursionError) as error:
            reason = f"not JSON: {error}"
        except KeyError:
            reason = f"got fields {', '.join(row)}; name the one with the text with --text_column=..."
        except (TypeError, AttributeError):
            reason = f"wanted an object with a string in field {column!r} (--text_column)"
        bad.append((f"{path}, line {number}", reason))
    yield Documents(*pack(documents), f"{path}, line ", numbers, bad)


def text_chunks(paths: list[Path]) -> Iterator[Chunk]:
    """Chunks of txt files, each a document."""
    return document_chunks((path, path.stat().st_size) for path in paths)


def document_chunks(documents: Iterable[tuple[Path | bytes, int]]) -> Iterator[Chunk]:
    """Chunks of documents that are each a whole file, or bytes; `documents` yields (path or bytes, size)."""
    some, total = [], 0
    for document, size in documents:
        if some and total + size > CHUNK_BYTES:
            yield Chunk(read_documents, (some,))
            some, total = [], 0
        if size > BIG:
            yield from text_pieces(document)
            continue
        some.append(document)
        total += size
    if some:
        yield Chunk(read_documents, (some,))


def read_documents(documents: list[Path | bytes]) -> Iterator[Documents]:
    """Documents that are each a whole file, or bytes."""
    texts = []
    for document in documents:
        with reading(document):
            texts.append(document if isinstance(document, bytes) else document.read_bytes())
    yield Documents(*pack(texts), "", [d if isinstance(d, Path) else "(text)" for d in documents])


def text_pieces(path: Path) -> Iterator[Chunk]:
    """Chunks of one large document, cut where GPT-2's pattern would cut it whatever comes after.

    That is before a blank or newline whose character before is no space. The file is read once beforehand,
    to see that it is UTF-8 and for the hash that decides its side.
    """
    cuts, decoder, size = [0], codecs.getincrementaldecoder("utf-8")(), path.stat().st_size
    h = U(size * 0x9E3779B97F4A7C15 & (1 << 64) - 1)
    with reading(path), open(path, "rb") as file:
        for start in range(0, size, CHUNK_BYTES):  # a multiple of eight, so that words do not straddle
            block = file.read(CHUNK_BYTES)
            try:
                decoder.decode(block, final=start + CHUNK_BYTES >= size)
            except UnicodeDecodeError as error:
                where = f"bytes {start:,} to {start + len(block):,}"
                yield bad_chunk(str(path), f"not UTF-8 in {where} ({error.reason})")
                return
            block = np.frombuffer(block, dtype=np.uint8)
            h = U(hash_words(h, block, 0, len(block)))
            if start and (cut := last_cut(block)):
                cuts.append(start + cut)
    for start, stop in itertools.pairwise([*cuts, size]):
        yield Chunk(read_piece, (path, start, stop, int(hash_finish(h))), continues=start > 0)


def last_cut(block: np.ndarray) -> int:
    """The last place in a block before which text_pieces may cut, 0 if there is none."""
    for i in np.flatnonzero((block == ord(" ")) | (block == ord("\n")))[::-1].tolist():
        # str.isspace knows more spaces than the pattern does, never fewer
        before = bytes(block[max(0, i - 4):i]).decode("utf-8", "ignore")[-1:]
        if before and not before.isspace():
            return i
    return 0


def read_piece(path: Path, start: int, stop: int, hash: int) -> Iterator[Documents]:
    with reading(path), open(path, "rb") as file:
        file.seek(start)
        text = np.frombuffer(file.read(stop - start), dtype=np.uint8)
    yield Documents(text, np.array([0, len(text)]), "", [path], hash=hash)


# ---- sources -------------------------------------------------------------------


def input_files(input: str) -> list[Path]:
    """The files named by --input, in the order given, each once; those of a folder or glob sorted by name."""
    files: dict[Path, Path] = {}  # by where they really are
    for name in filter(None, input.split(",")):
        path = Path(name)
        if path.is_dir():  # may hold other files too; what is named itself must be of a known kind
            found = [file for file in walk(path, set()) if file.name.endswith(SUFFIXES)]
        else:
            top = Path(path.anchor)
            found = [path] if path.exists() else sorted(top.glob(str(path.relative_to(top))))
        wrong = [file.name for file in found if not file.name.endswith(SUFFIXES) or not file.is_file()]
        if wrong or not found:
            raise UserError(f"--input={name}: got {wrong[0] if wrong else 'no such files'}, wanted a file, a "
                            f"glob or a folder of {', '.join(SUFFIXES)}; a comma separates names")
        for file in found:
            files.setdefault(file.resolve(), file)
    return list(files.values())


def walk(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """The files below a folder, sorted by path, through links to folders too, but into none twice."""
    if folder.resolve() in seen:
        return
    seen.add(folder.resolve())
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from walk(path, seen)
        elif path.is_file():
            yield path


def input_source(input: str, column: str, rank: int = 0, ranks: int = 1) -> Source:
    """The files named by --input; of several machines (ranks), each takes its share of them."""
    files = input_files(input)
    units, chunks_of = [], (jsonl_chunks, parquet_chunks)
    for is_txt, group in itertools.groupby(files[rank::ranks], key=lambda file: file.suffix == ".txt"):
        if is_txt:  # one unit
            units.append(functools.partial(text_chunks, list(group)))
        else:
            units += [functools.partial(chunks_of[file.suffix == ".parquet"], file, column) for file in group]
    facts = {"files": len(files), "file_bytes": sum(file.stat().st_size for file in files)}
    return source_of(facts, "", units)  # fineweb.py's settings hold the fingerprint of the files


def hub_source(dataset: str, subset: str, revision: str, column: str, data_dir: Path, there: int,
               max_tokens: int, keep_downloads: bool, rank: int, ranks: int, ahead: bool) -> Source:
    """The parquet files of a subset of FineWeb or FineWeb-Edu: whole, or with max_tokens the parts needed.

    data_dir, there: where the shards go, and the bytes of them that are there, for the need of space. ahead:
    fetch a file while the one before is read.
    """
    import hub
    repo = f"HuggingFaceFW/{dataset}"
    folder = f"sample/{subset[7:]}" if subset.startswith("sample-") else f"data/{subset}"
    folder = "data" if subset == "default" else folder
    commit, files = hub.list_files(repo, revision)
    files = [file for file in files if file.path.startswith(f"{folder}/") and file.path.endswith(".parquet")]
    if not files:
        raise UserError(f"got subset={subset!r}, but {repo} has no parquet files in {folder}/; wanted one of "
                        f"its subsets, such as --subset=sample-10BT")
    facts = {"repo": repo, "revision": commit, "files": len(files)}
    identity = hashlib.sha256(json.dumps([file[:2] for file in files]).encode()).hexdigest()[:16]
    files = files[rank::ranks]
    if max_tokens:
        hub.need_space([(data_dir, max(0, 2 * max_tokens - there), "shards")])
        return Source(facts, identity, functools.partial(row_groups, repo, commit, files, column))
    total = sum(file.size for file in files)
    missing = sorted(file.size for file in files if not hub.in_cache(repo, commit, file))
    hub.need_space([(data_dir, max(0, int(SHARDS_PER_PARQUET * total) - there), "shards"),
                    (hub.repo_folder(repo), sum(missing if keep_downloads else missing[-2:]), "downloads")])
    cache = Borrowed(repo, commit, data_dir / f"downloads_{rank:05d}.json", keep_downloads)
    return Source(facts, identity, *whole_files(cache, files, column, ahead))


class Borrowed:
    """Files of the hub's cache, where those that were not there before do not stay; `note` remembers them."""

    def __init__(self, repo: str, commit: str, note: Path, keep: bool):
        self.repo, self.commit, self.note, self.keep = repo, commit, note, keep
        self.fetched = set(json.loads(note.read_text(encoding="utf-8"))) if note.exists() else set()

    def fetch(self, file) -> Path:
        """The file, whole; noted beforehand, so that a killed build still knows which are its own."""
        import hub
        if file.path not in self.fetched and not hub.in_cache(self.repo, self.commit, file):
            self.fetched.add(file.path)
            write_atomically(self.note, json.dumps(sorted(self.fetched)).encode())
        return hub.fetch(self.repo, self.commit, file)

    def give_back(self, file) -> None:
        """Remove the file, if it was fetched for this build and is not to be kept."""
        import hub
        path = hub.in_cache(self.repo, self.commit, file)
        if path is not None and file.path in self.fetched and not self.keep:
            hub.remove(path)


def whole_files(cache: Borrowed, files: list, column: str, ahead: bool) -> tuple[Callable, Callable]:
    """Source.chunks and Source.release of parquet files."""
    import hub
    prefetcher = None

    def fetch(u: int) -> Path:
        return cache.fetch(files[u])

    def chunks(unit: int = 0, index: int = 0) -> Iterator[tuple[int, int, Chunk]]:
        nonlocal prefetcher
        units = range(unit, len(files))
        with hub.Prefetcher(fetch, units) if ahead else contextlib.nullcontext() as prefetcher:
            for u, path in prefetcher or ((u, fetch(u)) for u in units):
                print(f"file {u + 1} of {len(files)}: {files[u].path}", file=sys.stderr)
                for i, chunk in enumerate(parquet_chunks(path, column)):
                    if (u, i) >= (unit, index):
                        yield u, i, chunk

    def release(u: int) -> None:
        cache.give_back(files[u])
        if prefetcher:
            prefetcher.release()

    return chunks, release


def row_groups(repo: str, commit: str, files: list, column: str, unit: int = 0,
               index: int = 0) -> Iterator[tuple[int, int, Chunk]]:
    """Source.chunks of parquet files, one chunk per row group: only these are fetched, one ahead."""
    import pyarrow.parquet as pq

    import hub
    for u in range(unit, len(files)):
        file, remote = files[u], None
        try:
            with reading(file.path):
                there = hub.in_cache(repo, commit, file)
                if not there:
                    remote = hub.open_ranges(repo, commit, file)
                    remote.fetch_footer()
                with hub.READING:
                    parquet = pq.ParquetFile(there or remote)
        except Damaged as error:
            yield u, 0, bad_chunk(file.path, f"no parquet file ({error})")
            continue
        metadata, schema = parquet.metadata, parquet.schema_arrow
        kind = schema.field(column).type if column in schema.names else None
        if reason := wrong_column(schema.names, kind, column):
            yield u, 0, bad_chunk(file.path, reason)
            continue
        groups = range(metadata.num_row_groups)
        firsts = [0, *itertools.accumulate(metadata.row_group(group).num_rows for group in groups)]

        def fetch(group: int, remote=remote, metadata=metadata, size=file.size) -> tuple[int, bytes]:
            start, stop = column_span(metadata, group, column, size) if remote else (0, 0)
            return start, remote.fetch(start, stop) if remote else b""

        def read(group: int, file=file, parquet=parquet, firsts=firsts) -> Chunk:
            try:
                with reading(file.path), hub.READING:
                    table = parquet.read_row_group(group, columns=[column], use_threads=False)
            except Damaged as error:
                rows = f"rows {firsts[group]} to {firsts[group + 1] - 1}"
                return bad_chunk(f"{file.path}, row group {group}, {rows}", f"damaged ({error})")
            arrays = table.column(0).chunks
            starts = itertools.accumulate((len(array) for array in arrays), initial=firsts[group])
            return Chunk(iter, ([arrow_documents(array, f"{file.path}, row ", start)
                                 for array, start in zip(arrays, starts)],))

        with hub.Prefetcher(fetch, groups[index if u == unit else 0:]) as fetched:
            for group, (start, data) in fetched:
                if remote:
                    remote.hold(start, data)
                yield u, group, read(group)
                fetched.release()


def column_span(metadata, group: int, column: str, size: int) -> tuple[int, int]:
    """Where in a file of `size` bytes the pages of a column of a row group are: [start, stop).

    Empty where the footer does not say it, or says what cannot be: Arrow, asked to read it, names the damage.
    """
    row_group = metadata.row_group(group)
    for part in map(row_group.column, range(metadata.num_columns)):
        if part.path_in_schema == column:
            start, dictionary = part.data_page_offset, part.dictionary_page_offset or 0
            if 0 < dictionary < start:
                start = dictionary
            stop = start + part.total_compressed_size
            return (start, stop) if 0 <= start <= stop <= size else (0, 0)
    return 0, 0


def python_source(seed: int) -> Source:
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
    facts = {"documents": len(documents), "files_left_out": left_out}
    identity = hashlib.sha256(b"".join(sorted(found))).hexdigest()[:16]
    return source_of(facts, identity, [functools.partial(document_chunks, documents)])


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
