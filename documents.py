"""
Documents of text, in chunks that many processes can work on: from parquet, JSON lines, txt and the hub.

    source = input_source("books/,more.jsonl.gz", column="text", val_fraction=0.01)
    for place, chunk in source.chunks():      # cheap: a chunk says where to read, or holds the bytes
        documents = chunk.read(*chunk.args)   # in any process

A document is a row of a parquet file, a line of a JSON lines file, or what stands between two <|endoftext|>
in a txt file. A hash of its text decides whether it is for training or for validation, so equal documents are
on the same side. A txt file without <|endoftext|> is a document per 64 MB, of which the last val_fraction, if
that is 1,000 bytes or more, is validation, from the start of a line on.

Chunks and their order depend on the files alone. So the result is the same for any number of processes, and
the place of a chunk is all that a later run needs to go on from there.

Imported by fineweb.py, train_bpe.py, analyze_tokenizer.py and bench.py; nothing to run.
"""
import collections
import contextlib
import functools
import glob
import gzip
import hashlib
import itertools
import json
import os
import platform
import re
import sysconfig
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numba import njit

from bpe import EOT_TEXT, U, load_word
from configurator import UserError
from shards import list_shards

PIECE_BYTES = 1 << 16  # of a file that is read in order
CHUNK_BYTES = 1 << 23  # text that a process works on at a time; enough to hide the pool's overhead
MOST_BYTES = 1 << 26   # of a txt document, and of a row group that a worker reads in one go
VAL_BYTES = 1000       # a txt file whose val_fraction is less than this is not divided
KINDS = re.compile(r".+\.(parquet|(jsonl|ndjson|json|txt)(\.gz|\.zst)?)", re.IGNORECASE)
KINDS_TEXT = ".parquet; .jsonl, .ndjson, .json (a document per line) and .txt, also as .gz or .zst"
READ_ERRORS = (OSError, EOFError, ValueError, NotImplementedError, zlib.error)
# below a folder: hidden files, what macOS adds to an archive, and the notes of another build
NO_TEXT = re.compile(r"/(\.|__MACOSX|(manifest|build)(_\d+_of_\d+)?\.json$)")
# of the standard library's folder: tests, generated tables, packages, and what differs between machines
LEFT_OUT = re.compile(r"/(tests?|idle_test|encodings|pydoc_data|(site|dist)-packages|config-[^/]*|"
                      r"_sysconfigdata[^/]*)(/|$)")
FETCHING = threading.Lock()  # one complete file at a time: a thread of an earlier call may still be at work
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
Place = tuple[int, int, int]  # of a chunk: unit; row group, line or number; piece of a large row group
Text = tuple[bytes, str, bool | None]  # its place, for messages; for validation? None: as its hash says


class Documents(NamedTuple):
    """D documents of valid UTF-8, none of them empty."""
    text: np.ndarray     # uint8 (n,): all of them, end to end
    offsets: np.ndarray  # int64 (D+1,): document d is text[offsets[d]:offsets[d+1]]
    is_val: np.ndarray   # bool (D,): for validation
    empty: int           # documents left out because they are empty
    bad: list[str]       # and because they cannot be read: "FILE, line 3: not JSON"

    def part(self, val: bool) -> tuple[np.ndarray, np.ndarray]:
        """Text and offsets, as above, of the documents for validation alone, or of the others."""
        sizes, chosen = np.diff(self.offsets), self.is_val == val
        text = self.text[np.repeat(chosen, sizes)]
        return text, np.cumsum([0, *sizes[chosen]])


class Chunk(NamedTuple):
    """Some megabytes of documents, cheap to send to a process."""
    read: Callable[..., Documents]
    args: tuple


Unit = Iterator[tuple[tuple[int, int], Chunk]]  # of a file, or of a group of txt files: (place[1:], chunk)


class Source(NamedTuple):
    """Where documents come from."""
    facts: dict    # for the manifest
    identity: str  # hash of the files' names, sizes and times: a build continues only with the same ones
    units: Callable[[Place], Iterable[Unit]]  # units(start): from number start[0] on
    release: Callable[[int], None] = lambda unit: None  # when a unit is no longer needed

    def chunks(self, start: Place = (0, 0, 0)) -> Iterator[tuple[Place, Chunk]]:
        """(place, chunk) from place `start` on, in order."""
        for u, unit in enumerate(self.units(start), start[0]):
            yield from (((u, *where), chunk) for where, chunk in unit if (u, *where) >= start)


class File(NamedTuple):
    """A file as it was when the build was planned."""
    path: Path
    size: int
    mtime: int | None  # nanoseconds; None for a file of the hub, of which parts may still come in
    name: str          # for messages


def plan_file(path: Path) -> File:
    status = path.stat()
    return File(path, status.st_size, status.st_mtime_ns, str(path))


def identity_of(described: object) -> str:
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]


def available_cores() -> int:
    """Cores that this process may use: its affinity, and the quota of its container, rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no control groups, or no quota: "max"
        quota, period = map(int, CPU_QUOTA.read_text(encoding="ascii").split())
        cores = min(cores, -(-quota // period))
    return max(1, cores)


# ---- the side of a document ----------------------------------------------------


@njit(cache=True, error_model="numpy")
def hash_kernel(text, offsets, out):
    """out[d], uint64 (D,), becomes the hash of document d: eight bytes at a time, MurmurHash3's finaliser."""
    for d in range(len(out)):
        i, stop = offsets[d], offsets[d + 1]
        h = U(stop - i) * U(0x9E3779B97F4A7C15)
        while i < stop:
            word = U(0)
            if i + 8 <= stop:
                word = load_word(text, i)
            else:  # the rest, padded with zeros
                for k in range(stop - i):
                    word |= U(text[i + k]) << U(8 * k)
            h = (h ^ word) * U(0xD6E8FEB86659FD93)
            h ^= h >> U(32)
            i += 8
        h = (h ^ (h >> U(33))) * U(0xFF51AFD7ED558CCD)
        h = (h ^ (h >> U(33))) * U(0xC4CEB9FE1A85EC53)
        out[d] = h ^ (h >> U(33))


def with_sides(text: np.ndarray, offsets: np.ndarray, val_fraction: float) -> Documents:
    """Documents, each on the side that its hash says; empty ones are left out."""
    text = text.view()
    text.flags.writeable = False  # as Arrow's buffers: one compiled kernel for both
    kept = np.unique(offsets)  # an empty document ends where the previous one did
    hashes = np.empty(len(kept) - 1, dtype=np.uint64)
    hash_kernel(text, kept, hashes)
    return Documents(text, kept, hashes < np.uint64(val_fraction * 2.0**64), len(offsets) - len(kept), [])


def from_texts(texts: list[Text], val_fraction: float, bad: list[str]) -> Documents:
    """Documents of texts that may not be UTF-8; bad: reasons for what is left out already."""
    good, bad = [], [*bad]
    for text, place, side in texts:
        try:
            text.decode("utf-8")
            good.append((text, side))
        except UnicodeDecodeError as error:
            bad.append(f"{place}: not UTF-8 at byte {error.start:,} ({error.reason})")
    offsets = np.cumsum([0, *(len(text) for text, _ in good)])
    joined = np.frombuffer(b"".join([text for text, _ in good]), np.uint8)
    documents = with_sides(joined, offsets, val_fraction)
    for d, side in enumerate(side for text, side in good if text):
        if side is not None:
            documents.is_val[d] = side
    return documents._replace(bad=bad)


# ---- parquet -------------------------------------------------------------------


def check_unchanged(file: File) -> None:
    status = os.stat(file.path)
    if status.st_size != file.size or file.mtime not in (None, status.st_mtime_ns):
        raise UserError(f"{file.name} has changed since the build began; choose another --data_dir")


@contextlib.contextmanager
def reading(file: File, place: str = ""):
    """UserError for what goes wrong in this block, and where the file is no longer the planned one."""
    try:
        check_unchanged(file)
        yield
        check_unchanged(file)
    except UserError:
        raise
    except READ_ERRORS as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        if "too much memory" in reason:
            reason += "; it was made with zstd --long: decompress it with zstd -d --long=31"
        advice = ("fix the file, or leave it out of --input" if file.mtime is not None else
                  "the hub's copy is corrupt: take another --subset or --revision")
        raise UserError(f"{file.name}{place}: cannot be read ({reason}); {advice}") from error


@functools.lru_cache(maxsize=1)
def open_parquet(file: File):
    """A pyarrow.parquet.ParquetFile, whose footer is parsed once per file and process."""
    import pyarrow.parquet as pq
    return pq.ParquetFile(file.path, buffer_size=1 << 20)


def check_column(file: File, column: str) -> None:
    """UserError unless the file has one column of that name, and it holds text."""
    schema = open_parquet(file).schema_arrow
    if schema.names.count(column) != 1:
        found = "two of them" if column in schema.names else f"only {', '.join(schema.names)}"
        raise UserError(f"{file.name}: wanted a column {column!r}, found {found}; type --text_column=NAME")
    kind = schema.field(column).type
    kind = kind.value_type if hasattr(kind, "index_type") else kind  # of a dictionary
    if str(kind).removeprefix("large_").removesuffix("_view") not in ("string", "binary"):
        raise UserError(f"{file.name}: column {column!r} holds {kind}, not text; type --text_column=NAME")


def column_of(metadata, group: int, column: str):
    """The metadata of a row group's column."""
    columns = map(metadata.row_group(group).column, range(metadata.num_columns))
    return next(part for part in columns if part.path_in_schema == column)


def parquet_chunks(file: File, column: str, val_fraction: float,
                   groups: Iterable[int] | None = None) -> Unit:
    """((row group, piece), chunk) of a file; only row groups above 64 MB have several pieces.

    groups: those to read, each yielded when its bytes are there; None = all.
    """
    with reading(file):
        metadata = open_parquet(file).metadata
        check_column(file, column)
    rows = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
    for g in range(len(rows)) if groups is None else groups:
        row, size = sum(rows[:g]), column_of(metadata, g, column).total_uncompressed_size
        if size <= MOST_BYTES:
            yield (g, 0), Chunk(read_row_group, (file, g, column, row, val_fraction))
        else:  # it cannot be entered in the middle, and would fill the memory if every worker read one
            with reading(file, f", row group {g}"):
                batches = open_parquet(file).iter_batches(max(1, rows[g] * CHUNK_BYTES // size),
                                                          row_groups=[g], columns=[column], use_threads=False)
                for piece, batch in enumerate(batches):
                    yield (g, piece), Chunk(read_rows, (batch.column(0), file.name, row, val_fraction))
                    row += len(batch)


def read_row_group(file: File, group: int, column: str, row: int, val_fraction: float) -> Documents:
    with reading(file, f", row group {group}"):
        table = open_parquet(file).read_row_group(group, columns=[column], use_threads=False)
        return read_rows(table.column(0).combine_chunks(), file.name, row, val_fraction)


def read_rows(array, name: str, row: int, val_fraction: float) -> Documents:
    """Documents of an Arrow array, in Arrow's own buffers; row: the number of its first one, for messages."""
    import pyarrow as pa
    with contextlib.suppress(pa.ArrowInvalid):  # it is not UTF-8
        strings = array.cast(pa.large_string())
        strings.validate(full=True)
        if not strings.null_count:
            _, offsets, text = strings.buffers()
            offsets = np.frombuffer(offsets, np.int64)[strings.offset:strings.offset + len(strings) + 1]
            text = np.frombuffer(text or b"", np.uint8)[offsets[0]:offsets[-1]]
            return with_sides(text, offsets - offsets[0], val_fraction)
    rows = [(text, f"{name}, row {number}") for number, text in
            enumerate(array.cast(pa.large_binary()).to_pylist(), row)]
    bad = [f"{place}: null, not text" for text, place in rows if text is None]
    return from_texts([(text, place, None) for text, place in rows if text is not None], val_fraction, bad)


# ---- JSON lines and txt --------------------------------------------------------


def read_blocks(file: File, size: int) -> Iterator[bytes]:
    """The decompressed contents, about `size` bytes at a time, without a byte order mark.

    A truncated compressed file yields all that can be read, then raises UserError.
    """
    import pyarrow as pa
    suffix = file.path.suffix.lower()
    with reading(file):  # Python's gzip, as Arrow's refuses padding
        stream = gzip.open(file.path) if suffix == ".gz" else pa.input_stream(
            str(file.path), compression="zstd" if suffix == ".zst" else None)
        with stream:
            block = bytearray(stream.read1(PIECE_BYTES))
            if block[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise UserError(f"{file.name} is UTF-16; convert it: iconv -f UTF-16 -t UTF-8 OLD > NEW")
            block = block.removeprefix(b"\xef\xbb\xbf")
            try:
                while piece := stream.read1(PIECE_BYTES):
                    if len(block) >= size:
                        yield bytes(block)
                        block.clear()
                    block += piece
            except READ_ERRORS:
                yield bytes(block)
                raise
            yield bytes(block)


def jsonl_chunks(file: File, column: str, val_fraction: float) -> Unit:
    """((line, 0), chunk) of complete lines: decompressed here, as a file cannot be entered in the middle."""
    line, rest = 1, b""
    try:
        for block in itertools.chain(read_blocks(file, CHUNK_BYTES), [b"\n"]):
            if line == 1 and not rest and block.lstrip()[:1] == b"[":
                raise UserError(f"{file.name} is a JSON array, not a document a line; convert it: python -c "
                                f"'import json, sys; [print(json.dumps(x)) for x in json.load(sys.stdin)]' "
                                f"< OLD.json > NEW.jsonl")
            lines, newline, rest = (rest + block).rpartition(b"\n")
            if newline:
                yield (line, 0), Chunk(read_jsonl, (file.name, line, lines, column, val_fraction))
                line += lines.count(b"\n") + 1
    except UserError as error:
        if error.__cause__ is None or line == 1:  # only a file that is cut off has complete lines before
            raise
        yield (line, 0), Chunk(from_texts, ([], val_fraction, [str(error)]))


def read_jsonl(name: str, first_line: int, lines: bytes, column: str, val_fraction: float) -> Documents:
    """The documents of some lines; first_line: the number of the first one, for messages."""
    texts, bad = [], []
    for number, line in enumerate(lines.split(b"\n"), first_line):
        try:
            if line.strip():
                texts.append((json.loads(line)[column].encode(), "", None))
        except (ValueError, RecursionError) as error:  # also for half of a surrogate pair
            bad.append(f"{name}, line {number}: not JSON, or not text ({error})")
        except (KeyError, TypeError, AttributeError):
            bad.append(f"{name}, line {number}: {line[:50]!r} has no text in a field {column!r}; name the "
                       f"right one with --text_column=NAME")
    return from_texts(texts, val_fraction, bad)


def text_chunks(documents: Iterable[Text], val_fraction: float) -> Unit:
    """((number, 0), chunk) of documents in their order."""
    some, size, number = [], 0, 0
    for document in documents:
        some.append(document)
        size += len(document[0])
        if size >= CHUNK_BYTES:
            yield (number, 0), Chunk(from_texts, (some, val_fraction, []))
            some, size, number = [], 0, number + 1
    yield (number, 0), Chunk(from_texts, (some, val_fraction, []))


def split_text(file: File, val_fraction: float) -> Iterator[Text]:
    """The documents of a txt file."""
    separator, rest = EOT_TEXT.encode(), b""
    blocks = read_blocks(file, MOST_BYTES)
    first = next(blocks)
    if separator in first:
        number = itertools.count(1)
        for block in itertools.chain([first], blocks, [separator]):
            *texts, rest = (rest + block).split(separator)
            for text in texts:
                yield text.strip(b"\r\n"), f"{file.name}, document {next(number)}", None
        return

    position = 0
    for block, following in itertools.pairwise(itertools.chain([first], blocks, [b""])):
        text = rest + block
        end = line_start(text, len(text) - 1, MOST_BYTES // 2) if following else len(text)
        text, rest = text[:end], text[end:]
        val_bytes = int(end * val_fraction)
        if val_bytes < VAL_BYTES:
            yield text, f"{file.name}, from byte {position:,} on", None
        else:
            cut = line_start(text, end - val_bytes, val_bytes)
            yield text[:cut], f"{file.name}, from byte {position:,} on", False
            yield text[cut:], f"{file.name}, from byte {position + cut:,} on", True
        position += end


def line_start(text: bytes, near: int, reach: int) -> int:
    """Where the last line up to byte `near` starts, or a character where that is more than `reach` away."""
    start = text.rfind(b"\n", 0, near) + 1
    if not start or near - start > reach:
        start = near
        while start and text[start] & 0xC0 == 0x80:  # a continuation byte of UTF-8
            start -= 1
    return start


# ---- sources -------------------------------------------------------------------


def input_files(input: str) -> list[File]:
    """The files named by --input, in the order given, each once; those of a folder or glob sorted by path."""
    files, ignored = {}, set()
    for name in filter(None, input.split(",")):
        path = Path(name)
        if path.is_dir():  # may hold other files too; what is named itself must be of a known kind
            below = [file for file in sorted(path.rglob("*")) if file.is_file()]
            found = [file for file in below if KINDS.fullmatch(file.name)
                     and not NO_TEXT.search(f"/{file.relative_to(path).as_posix()}")]
            ignored |= set(below) - set(found)
        else:
            found = [path] if path.exists() else sorted(map(Path, glob.glob(name, recursive=True)))
        wrong = [file.name for file in found if not KINDS.fullmatch(file.name) or not file.is_file()]
        if wrong or not found:
            raise UserError(f"--input={name}: {f'{wrong[0]} is no' if wrong else 'found no'} file of a known "
                            f"kind: {KINDS_TEXT}; a comma separates names")
        files |= {file.resolve(): plan_file(file) for file in found if file.resolve() not in files}
    for path in map(str, files):
        if path != path.encode(errors="replace").decode():
            raise UserError(f"--input: the file name {path!a} is not UTF-8; rename the file")
    kinds = collections.Counter(kind_of(file) for file in files.values())
    print(f"input: {', '.join(f'{count} {kind}' for kind, count in kinds.items())}, "
          f"{sum(file.size for file in files.values()):,} bytes"
          + (f"; ignored: {len(ignored)} other files, such as {min(ignored)}" if ignored else ""))
    return list(files.values())


def kind_of(file: File) -> str:
    return KINDS.fullmatch(file.path.name)[1].lower().partition(".")[0]


def input_source(input: str, column: str, val_fraction: float, rank: int = 0, ranks: int = 1) -> Source:
    """The files named by --input, as input_files finds them; of several machines, each takes its share."""
    files = input_files(input)

    def units() -> Iterator[Unit]:
        for kind, group in itertools.groupby(files[rank::ranks], key=kind_of):
            if kind == "txt":  # one unit, as there may be many small ones
                texts = (split_text(file, val_fraction) for file in list(group))
                yield text_chunks(itertools.chain.from_iterable(texts), val_fraction)
            else:
                read = parquet_chunks if kind == "parquet" else jsonl_chunks
                yield from (read(file, column, val_fraction) for file in group)

    identity = identity_of([[str(file.path.resolve()), *file[1:3]] for file in files])
    return Source({"files": len(files), "file_bytes": sum(file.size for file in files)}, identity,
                  lambda start: itertools.islice(units(), start[0], None))


def python_source(val_fraction: float) -> Source:
    """The embedded corpus: the standard library's .py files, but tests and tables, sorted by path, each once.

    The same for everyone with the same Python: what is installed or configured beside it is left out.
    """
    root, found = Path(sysconfig.get_path("stdlib")), {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not LEFT_OUT.search(f"/{name}"):
            found.setdefault(path.read_bytes(), name)
    documents = [(text, name, None) for text, name in found.items()]
    identity = identity_of([hashlib.sha256(text).hexdigest() for text in found])
    return Source({"documents": len(documents), "python": platform.python_version()}, identity,
                  lambda start: [text_chunks(documents, val_fraction)])


def hub_files(dataset: str, subset: str, revision: str) -> tuple[str, str, list]:
    """(repository, commit, parquet files) of a dataset on the hub: those for training, where names say so.

    subset: a folder; of fineweb and fineweb-edu, the name that their authors gave a part.
    """
    import hub
    repo, folder = dataset, subset
    if "/" not in dataset:
        repo, subset = f"HuggingFaceFW/{dataset}", subset or "sample-10BT"
        folder = f"sample/{subset[7:]}" if subset.startswith("sample-") else f"data/{subset}"
        folder = "data" if subset == "default" else folder
    commit, everything = hub.list_files(repo, revision)
    everything = [file for file in everything if file.path.endswith(".parquet")]
    files = [file for file in everything if file.path.startswith(f"{folder}/" if folder else "")]
    files = [file for file in files if "train" in file.path.rpartition("/")[2]] or files
    files = sorted({file.etag: file for file in reversed(files)}.values())  # equal files share a local name
    if not files:
        folders = sorted({file.path.rpartition("/")[0] for file in everything})
        raise UserError(f"{repo} has no parquet files in {folder or 'any folder'}; " + (
            f"name another folder with --subset=...: {', '.join(folders[:20])}" if folders else
            f"for .jsonl or .txt: hf download {repo} --repo-type dataset --local-dir DIR, then --input=DIR"))
    print(f"{repo} at {commit}: {len(files)} parquet files, {sum(file.size for file in files):,} bytes")
    return repo, commit, files


class HubFiles(NamedTuple):
    """Parquet files of the hub, fetched for a build: complete ones, or the parts of them that are needed."""
    repo: str
    commit: str
    files: list
    column: str
    val_fraction: float
    max_tokens: int  # 0: complete files
    downloads: Path

    def need_space(self) -> None:
        """UserError where the disk has no room for what is left of the build."""
        import hub
        size = sum(file.size for file in self.files)
        needed = min(size * 3 // 4, 2 * self.max_tokens or size)  # shards take 3/4 of the files
        if not self.max_tokens:  # one is read, two are ahead, and one stays until its last shard is written
            needed += sum(sorted(file.size for file in self.files if not hub.cached(self.repo, file))[-4:])
        folder = self.downloads.parent
        existing = [*self.downloads.glob("*"), *list_shards(folder, "train"), *list_shards(folder, "val")]
        hub.need_space(folder, max(0, needed - sum(path.stat().st_size for path in existing)))

    def units(self, start: Place) -> Iterable[Unit]:
        """Source.units: the next files are fetched while one is read."""
        import hub
        files = self.files[start[0]:]
        if self.max_tokens:
            return (self.partial(file, start[1] if i == 0 else 0) for i, file in enumerate(files))
        return hub.ahead(self.complete, files)

    def complete(self, file) -> Unit:
        """The chunks of a file, which is fetched first."""
        import hub
        with FETCHING:
            path = hub.fetch(self.repo, self.commit, file, self.downloads)
        return parquet_chunks(File(path, file.size, None, file.path), self.column, self.val_fraction)

    def partial(self, file, first: int) -> Unit:
        """The chunks of a file from row group `first` on; only its footer and one column are fetched.

        They go to their places in a local file with holes, which Arrow reads like the complete one.
        """
        import hub
        if hub.cached(self.repo, file):
            yield from self.complete(file)
            return
        fetch = functools.partial(hub.fetch_range, self.repo, self.commit, file)
        footer_bytes = 8 + int.from_bytes(fetch(max(0, file.size - 8), file.size)[:4], "little")
        footer_start = max(0, file.size - footer_bytes)
        path = self.downloads / f"{file.etag}.part"
        self.downloads.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        write_at(path, footer_start, fetch(footer_start, file.size))
        local = File(path, file.size, None, file.path)
        with reading(local):
            metadata = open_parquet(local).metadata

        def fetch_group(group: int) -> int:
            part = column_of(metadata, group, self.column)
            start = min(part.dictionary_page_offset or part.data_page_offset, part.data_page_offset)
            write_at(path, start, fetch(start, min(file.size, start + part.total_compressed_size)))
            return group

        groups = hub.ahead(fetch_group, range(first, metadata.num_row_groups))
        yield from parquet_chunks(local, self.column, self.val_fraction, groups)

    def release(self, unit: int) -> None:
        for suffix in (".parquet", ".part"):
            (self.downloads / f"{self.files[unit].etag}{suffix}").unlink(missing_ok=True)


def write_at(path: Path, start: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(data)


def hub_source(dataset: str, subset: str, revision: str, column: str, val_fraction: float, max_tokens: int,
               downloads: Path, rank: int = 0, ranks: int = 1) -> Source:
    """The parquet files of a dataset on the hub: complete ones, or with max_tokens the parts that are needed.

    downloads: where they are kept until `release`; what the hub's own cache has is read from there.
    """
    repo, commit, files = hub_files(dataset, subset, revision)
    mine = HubFiles(repo, commit, files[rank::ranks], column, val_fraction, max_tokens, downloads)
    mine.need_space()
    facts = {"repo": repo, "revision": commit, "files": len(files)}
    return Source(facts, identity_of([file[:2] for file in files]), mine.units, mine.release)
