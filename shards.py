"""
The token files: how they are written, checked and read, and the order in which training reads them.

    from shards import TokenStream, WindowLoader
    stream = TokenStream("edu_fineweb10B", "train")
    loader = WindowLoader(stream, T=1024, batch_tokens=524_288, seed=1, n_vocab=50257)
    x, y = loader.batch(step, first=0, count=16)  # int64, (16, 1024) each

A folder holds NAME_{train,val}_000000.npy, ... (1-D uint16), or .bin with llm.c's header, and manifest.json,
which fineweb.py writes last. Folders made by build-nanogpt (.npy), llm.c and modded-nanogpt (.bin) have no
manifest and are read as they are. Files appear by rename, so one that is there is whole.

The shards of a split are one long array, the stream. Window w is its tokens [w*T, w*T + T]: T inputs, and
the same shifted by one as targets. Neighbouring windows share one token, and only the tail of the stream,
fewer than T tokens, is never a target. Sample i of a run is window permute(i % n_windows) in the order of
epoch i // n_windows: every window once per epoch, each epoch in its own order, and the step is all that a
resume needs. Memory stays flat whatever the size of the data: windows are read one by one, as uint16, and
become int64 only in the batch.

Imported by the other scripts; nothing to run. Opening 10,000 shards takes half a second.
"""
import hashlib
import io
import json
import math
import os
import re
from bisect import bisect_right
from collections import OrderedDict
from itertools import accumulate
from pathlib import Path

import numpy as np

from configurator import Between, OneOf, UserError
from files import check, read_json, write_atomically

BIN_MAGIC, BIN_VERSION, BIN_HEADER_INTS = 20240520, 1, 256  # llm.c, dev/data/data_common.py
TOKEN = np.dtype("<u2")     # on disk, whatever the machine's byte order
MAX_OPEN_SHARDS = 128       # file descriptors held; the usual limit is 1024
MANIFEST, UNFINISHED = "manifest.json", "build.json"  # fineweb.py writes the second first and removes it last
SHARD_NAME = re.compile(r"(?P<name>[^/\\\0]+)_(?P<split>train|val)(?:_(?P<index>\d+))?\.(?:npy|bin)")
NPY_START = b"\x93NUMPY\x01\x00"  # version 1.0; then two bytes of the header's length, then the header
NPY_HEADER = re.compile(rb"\{'descr': '<u2', 'fortran_order': False, 'shape': \((\d{1,15}),\), \}\s*")
COUNT, SHA256 = Between(0, 2**48), re.compile("[0-9a-f]{64}")
PLAIN, SIDES = (bool, int, float, str, None), OneOf("by hash", "by place", "as they came")
SCHEMA = {"format": OneOf(1), "tokenizer": {"name": str, "sha256": SHA256},
          "files": [{"file": SHARD_NAME, "tokens": COUNT, "sha256": SHA256,
                     "origin?": [COUNT, COUNT, COUNT, COUNT]}]}
BUILD_SCHEMA = {  # what fineweb.py needs of its own, beside that
    "tokenizer": {"n_vocab": Between(257, 65_536)}, "eot": Between(0, 65_535), "settings": {str: PLAIN},
    "source": {str: PLAIN}, "cut": (None, {"at_byte": COUNT, "of_bytes": COUNT}), "sides?": SIDES,
    "documents": COUNT, "tokens": COUNT,
    "splits": {"train": {"documents": COUNT}, "val": {"documents": COUNT}}}

# ---- one file ------------------------------------------------------------------


def write_shard(path: Path, ids: np.ndarray) -> dict:
    """Write token ids (1-D, any integer type, 0 to 65,535) as .npy or .bin, by suffix.

    Returns the manifest's record: {"file": name, "tokens": count, "sha256": of the whole file}. Raises
    UserError for ids that do not fit, another suffix, or a full disk.
    """
    path, ids = Path(path), np.asarray(ids)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise UserError(f"{path.name}: got ids of {ids.dtype} and shape {ids.shape}, wanted 1-D integers")
    if ids.dtype != TOKEN and ids.size and not 0 <= ids.min() <= ids.max() <= 65_535:
        raise UserError(f"{path.name}: got ids from {ids.min()} to {ids.max()}, wanted 0 to 65,535 (uint16); "
                        f"choose a tokenizer of at most 65,536 tokens")
    ids = np.ascontiguousarray(ids, dtype=TOKEN)
    if path.suffix == ".npy":
        stream = io.BytesIO()
        np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(ids))
        header = stream.getvalue()
    elif path.suffix == ".bin":
        ints = np.zeros(BIN_HEADER_INTS, dtype="<i4")
        ints[:3] = BIN_MAGIC, BIN_VERSION, len(ids)
        header = ints.tobytes()
    else:
        raise UserError(f"got shard format {path.suffix!r}, wanted --shard_format=npy or --shard_format=bin")
    write_atomically(path, header, ids.data)
    sha256 = hashlib.sha256(header)
    sha256.update(ids.data)
    return {"file": path.name, "tokens": len(ids), "sha256": sha256.hexdigest()}


def read_header(path: Path) -> tuple[int, int]:
    """(tokens, bytes before the first one) of a shard; UserError if its header or its size is wrong."""
    fix = "the file is damaged or not a shard: build or download it again"
    if path.exists() and not path.is_file():  # reading a pipe would wait for whoever writes into it
        raise UserError(f"{path}: not a regular file; {fix}")
    try:
        with open(path, "rb") as file:
            if path.suffix == ".bin":
                ints = np.frombuffer(file.read(12).ljust(12, b"\0"), dtype="<i4").tolist()
                if ints[:2] != [BIN_MAGIC, BIN_VERSION] or ints[2] < 0:
                    raise UserError(f"{path}: got a .bin header that starts with {ints}, wanted "
                                    f"{[BIN_MAGIC, BIN_VERSION]} (magic, version; llm.c's format) and the "
                                    f"number of tokens; {fix}")
                tokens, offset = ints[2], 4 * BIN_HEADER_INTS
            else:
                start = file.read(len(NPY_START) + 2)
                header = file.read(int.from_bytes(start[len(NPY_START):], "little"))
                match = NPY_HEADER.fullmatch(header)
                if not start.startswith(NPY_START) or not match:
                    raise UserError(f"{path}: got a header that starts with {(start + header)[:80]!r}, "
                                    f"wanted .npy, version 1.0, one dimension of {TOKEN.str} (uint16); {fix}")
                tokens, offset = int(match[1]), file.tell()
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check that the file is there") from error
    if size != offset + TOKEN.itemsize * tokens:
        raise UserError(f"{path}: got {size:,} bytes, wanted {offset + TOKEN.itemsize * tokens:,} for the "
                        f"{tokens:,} tokens its header states; {fix}")
    return tokens, offset


def read_shard(path: Path) -> np.ndarray:
    """The ids of a shard as a read-only memory map, uint16 (tokens,); UserError as read_header raises it."""
    tokens, offset = read_header(Path(path))
    if tokens == 0:
        return np.frombuffer(b"", dtype=TOKEN)  # an empty range cannot be mapped
    return np.memmap(path, dtype=TOKEN, mode="r", offset=offset, shape=(tokens,))


# ---- a folder of them ----------------------------------------------------------


def list_shards(data_dir: str | Path, split: str) -> list[Path]:
    """The shards of a split in order: *_{split}_{index}.npy or .bin; llm.c's small sets have no index."""
    found = []
    for path in Path(data_dir).iterdir() if Path(data_dir).is_dir() else ():
        match = SHARD_NAME.fullmatch(path.name)
        if match and match["split"] == split:
            found.append((match["name"], int(match["index"] or 0), path.suffix, path))
    return [path for *_, path in sorted(found)]


def read_manifest(data_dir: str | Path, built: bool = False) -> dict | None:
    """manifest.json of a finished build, or None where there is none; UserError if it makes no sense.

    built: it must have all that fineweb.py writes, not only what training reads.
    """
    path = Path(data_dir) / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = read_json(path, SCHEMA)
        return check(manifest, BUILD_SCHEMA, str(path)) if built else manifest
    except UserError as error:
        raise UserError(f"{error}; the file is damaged: build the data again into another --data_dir, or "
                        f"delete it to use the shards without it") from error


def write_manifest(data_dir: str | Path, manifest: dict) -> None:
    """Write manifest.json, which makes the folder a finished one. No date in it: same build, same bytes."""
    text = json.dumps({"format": 1, **manifest}, indent=1, sort_keys=True, ensure_ascii=False)
    write_atomically(Path(data_dir) / MANIFEST, f"{text}\n".encode())


class ShardWriter:
    """Cuts a stream of ids into NAME_SPLIT_000000, 000001, ... of `shard_tokens`; the last may be shorter.

    append writes each shard when it is full. add only keeps them in `full`, for a caller that writes them
    elsewhere: write(full) then makes the records.
    """

    def __init__(self, data_dir: str | Path, name: str, split: str, shard_tokens: int,
                 shard_format: str = "npy", first_index: int = 0):
        self.stem, self.suffix = Path(data_dir) / f"{name}_{split}", f".{shard_format}"
        self.next_index = first_index
        self.buffer = np.empty(shard_tokens, dtype=TOKEN)  # the system hands out its pages as they fill
        self.spare: list[np.ndarray] = []  # buffers that are written, to be filled again
        self.used, self.origin = 0, None
        self.full: list[tuple[Path, np.ndarray, object]] = []
        self.records: list[dict] = []

    def append(self, ids: np.ndarray) -> None:
        """Add ids, uint16 (n,); n may be more than a shard, or 0."""
        self.add(ids)
        self.write(self.full)
        self.full = []

    def add(self, ids: np.ndarray, origin: tuple = ()) -> None:
        """Add ids without writing. origin: where ids[0] comes from, integers of which the last counts ids.

        A shard that starts at ids[k] gets "origin": origin, its last integer plus k, in its record.
        """
        taken = 0
        while taken < len(ids):
            if not self.used:
                self.origin = [*origin[:-1], origin[-1] + taken] if origin else None
            part = ids[taken:taken + len(self.buffer) - self.used]
            self.buffer[self.used:self.used + len(part)] = part
            self.used += len(part)
            taken += len(part)
            if self.used == len(self.buffer):
                self._cut()

    def write(self, full: list[tuple[Path, np.ndarray, object]]) -> None:
        """Write shards that add has filled, in order, and note their records."""
        for path, ids, origin in full:
            self.records.append(write_shard(path, ids) | ({"origin": origin} if origin else {}))
            self.spare.append(ids.base)

    def close(self) -> list[dict]:
        """Write what is left; returns the records of all files for the manifest, [] if nothing was added."""
        if self.used:
            self._cut()
        self.append(self.buffer[:0])
        return self.records

    def _cut(self) -> None:
        path = self.stem.with_name(f"{self.stem.name}_{self.next_index:06d}{self.suffix}")
        self.full.append((path, self.buffer[:self.used], self.origin))
        self.buffer = self.spare.pop() if self.spare else np.empty(len(self.buffer), dtype=TOKEN)
        self.next_index, self.used = self.next_index + 1, 0


class TokenStream:
    """The shards of one split as one long array of ids; a read may cross from shard to shard.

    Raises UserError for a folder without shards, with an unfinished build, or that differs from its manifest.
    """

    def __init__(self, data_dir: str | Path, split: str):
        folder = Path(data_dir)
        self.manifest = read_manifest(folder)
        if self.manifest is None and (folder / UNFINISHED).exists():
            raise UserError(f"{folder} holds an unfinished build; run it again: {unfinished_command(folder)}")
        self.paths = list_shards(folder, split)
        if not self.paths:
            raise UserError(f"got no {split} shards in {folder}, wanted *_{split}_*.npy or .bin; "
                            f"`make prepare` builds the FineWeb-Edu data, `make demo` builds and trains on "
                            f"a small corpus without any download, --data_dir=... names another folder")
        if len({path.stem for path in self.paths}) < len(self.paths):
            raise UserError(f"{folder} holds the same {split} shards as .npy and as .bin; keep one kind")
        self._headers = [read_header(path) for path in self.paths]
        counts = [tokens for tokens, _ in self._headers]
        found = {path.name: {"tokens": count} for path, count in zip(self.paths, counts, strict=True)}
        records = found if self.manifest is None else self._check_manifest(folder, found)
        self.ends = list(accumulate(counts))  # stream position just after each shard
        described = [[name, found[name]["tokens"], records[name].get("sha256")] for name in found]
        self.fingerprint = hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]
        self._open: OrderedDict[int, io.FileIO] = OrderedDict()  # by shard number, the oldest use first
        self._pid = os.getpid()

    def _check_manifest(self, folder: Path, found: dict) -> dict:
        records = {record["file"]: record for record in self.manifest["files"]}
        for name in found.keys() - records.keys():
            raise UserError(f"{folder / name} is not in {MANIFEST}: it comes from elsewhere; move it away")
        for name, record in records.items():
            if not (folder / name).exists():
                raise UserError(f"{folder / name} is in {MANIFEST} and missing; put it back, or build again")
            if name in found and found[name]["tokens"] != record["tokens"]:
                raise UserError(f"{folder / name}: got {found[name]['tokens']:,} tokens, wanted "
                                f"{record['tokens']:,} as {MANIFEST} states; build the data again")
        return records

    def __len__(self) -> int:
        return self.ends[-1]

    def locate(self, position: int) -> tuple[Path, int]:
        """The file that holds a stream position, and the position within that file: for messages."""
        if not 0 <= position < len(self):
            raise IndexError(f"position {position:,} is outside the stream of {len(self):,} tokens")
        i = bisect_right(self.ends, position)
        return self.paths[i], position - (self.ends[i - 1] if i else 0)

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count), uint16 (count,)."""
        out = np.empty(count, dtype=TOKEN)
        self.read_into(start, out)
        return out

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Fill `out`, uint16 (n,), with tokens [start, start + n).

        Plain reads, not memory maps: a map of a set larger than memory counts every page it ever touched as
        resident, reads 2 MB for a window of 2 kB, and kills the process when a file shrinks under it.
        """
        if not 0 <= start <= start + len(out) <= len(self):
            raise IndexError(f"tokens {start:,} to {start + len(out):,} of {len(self):,} do not exist")
        i = bisect_right(self.ends, start)
        while len(out):
            first = start - (self.ends[i - 1] if i else 0)
            tokens, header_bytes = self._headers[i]
            wanted = memoryview(out[:tokens - first]).cast("B")
            start, out, i = start + len(wanted) // TOKEN.itemsize, out[tokens - first:], i + 1
            file = self._file(i - 1)
            file.seek(header_bytes + first * TOKEN.itemsize)
            while wanted:
                got = file.readinto(wanted)
                if not got:
                    raise UserError(f"{self.paths[i - 1]} has become shorter since it was opened; build or "
                                    f"download it again")
                wanted = wanted[got:]

    def _file(self, i: int) -> io.FileIO:
        if self._pid != os.getpid():  # a forked process must not move its parent's place in a file
            self._open, self._pid = OrderedDict(), os.getpid()
        if i not in self._open:
            self._open[i] = open(self.paths[i], "rb", buffering=0)
            if len(self._open) > MAX_OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(i)
        return self._open[i]


def unfinished_command(folder: Path) -> str:
    """The command that fineweb.py noted in build.json when it started."""
    try:
        return read_json(folder / UNFINISHED, {"command": str})["command"]
    except (UserError, OSError):
        return f"python fineweb.py --data_dir={folder} (with the settings it had)"


# ---- the order of training -----------------------------------------------------


def permute(index: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Where the order drawn by (seed, epoch) puts each index of range(n): int64 (k,) in, int64 (k,) out.

    A bijection of range(n) in O(1) memory: an 8-round Feistel network (Luby and Rackoff, 1988) over pairs of
    digits in base `side`, the smallest whose square holds n. A result of n or more goes through again until
    it is below n ("cycle walking", Black and Rogaway, 2002; rare, as side**2 - n < 2 * side).
    Example: permute(np.arange(5), 5, seed=1, epoch=0) holds 0 to 4, each once.
    """
    side = np.uint64(math.isqrt(n - 1) + 1)
    keys = np.frombuffer(hashlib.sha512(f"{seed} {epoch}".encode()).digest(), dtype="<u8")  # one per round
    out = np.asarray(index).astype(np.uint64)
    walking = np.arange(len(out))  # the entries that still need a turn
    while len(walking):
        left, right = np.divmod(out[walking], side)
        for key in keys:
            mixed = right ^ key  # then MurmurHash3's 64-bit finaliser: every bit reaches every other
            mixed = (mixed ^ (mixed >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
            mixed = (mixed ^ (mixed >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
            left, right = right, (left + (mixed ^ (mixed >> np.uint64(33))) % side) % side
        out[walking] = left * side + right
        walking = walking[out[walking] >= n]
    return out.astype(np.int64)


class WindowLoader:
    """Batches of windows of a stream, a pure function of (seed, data, batch_tokens, T, step).

    shuffle=False gives the windows in their order (validation). Ids of n_vocab or more are refused when they
    are read. Raises UserError if the data is shorter than one window or batch_tokens is not a multiple of T.
    """

    def __init__(self, stream: TokenStream, T: int, batch_tokens: int, seed: int, n_vocab: int,
                 shuffle: bool = True):
        if len(stream) < T + 1:
            raise UserError(f"got {len(stream):,} tokens ({stream.paths[0].name}, ...), wanted at least "
                            f"{T + 1:,} for one window of block_size={T}; choose "
                            f"--block_size={len(stream) - 1} or smaller, or build more data")
        if batch_tokens < T or batch_tokens % T:
            below = batch_tokens // T * T
            legal = [f"--batch_tokens={n}" for n in (below, below + T) if n]
            raise UserError(f"batch_tokens={batch_tokens} is not a multiple of block_size={T}; "
                            f"the nearest legal values are {' and '.join(legal)}")
        self.stream, self.T, self.seed, self.n_vocab, self.shuffle = stream, T, seed, n_vocab, shuffle
        self.n_windows = (len(stream) - 1) // T
        self.windows_per_step = batch_tokens // T
        self.steps_per_epoch = self.n_windows / self.windows_per_step
        self._step, self._ids = -1, np.zeros(0, dtype=np.int64)  # window_ids of the step last asked for

    def window_ids(self, step: int) -> np.ndarray:
        """The windows of a step, int64 (windows_per_step,). A step may cross from one epoch into the next."""
        if step != self._step:
            samples = step * self.windows_per_step + np.arange(self.windows_per_step)
            epochs, ids = samples // self.n_windows, samples % self.n_windows
            for epoch in range(epochs[0], epochs[-1] + 1) if self.shuffle else ():
                chosen = epochs == epoch
                ids[chosen] = permute(ids[chosen], self.n_windows, self.seed, epoch)
            self._step, self._ids = step, ids
        return self._ids

    def read_windows(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of the windows `ids` (B,): x and y, int64 (B, T), y one token ahead of x."""
        tokens = np.empty((len(ids), self.T + 1), dtype=TOKEN)  # (B, T+1)
        for row in np.argsort(ids, kind="stable").tolist():  # in file order: a shard is opened once
            self.stream.read_into(int(ids[row]) * self.T, tokens[row])
        if len(ids) and tokens.max() >= self.n_vocab:
            row, column = np.argwhere(tokens >= self.n_vocab)[0].tolist()
            path, offset = self.stream.locate(int(ids[row]) * self.T + column)
            raise UserError(f"{path}: got id {tokens[row, column]} at token {offset:,}, wanted ids below the "
                            f"vocabulary's {self.n_vocab:,}; the file is damaged or was made with another "
                            f"tokenizer: build the data again with this run's, or raise --vocab_size")
        return tokens[:, :-1].astype(np.int64), tokens[:, 1:].astype(np.int64)

    def count_targets(self, n_windows: int) -> np.ndarray:
        """How often each id is a target in the first windows of the stream, int64 (n_vocab,)."""
        counts = np.zeros(self.n_vocab, dtype=np.int64)
        for first in range(0, n_windows, 1024):
            _, y = self.read_windows(np.arange(first, min(first + 1024, n_windows)))
            counts += np.bincount(y.ravel(), minlength=self.n_vocab)
        return counts

    def batch(self, step: int, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Windows first to first + count of the step's windows_per_step, read: a rank's micro-batch."""
        if not 0 <= first <= first + count <= self.windows_per_step:
            raise IndexError(f"got windows {first} to {first + count} of a step of {self.windows_per_step}")
        return self.read_windows(self.window_ids(step)[first:first + count])
