"""
The token files: how they are written, checked and read, and the order in which training reads them.

    stream = TokenStream("edu_fineweb10B", "train")
    loader = WindowLoader(stream, T=1024, batch_tokens=524_288, seed=1, n_vocab=50257)
    x, y = loader.batch(step, first=0, count=16)  # int64, (16, 1024) each

A folder from fineweb.py holds NAME_{train,val}_000000.npy, ... (1-D uint16) or .bin (with llm.c's header),
the rank file of their tokenizer, build.json (progress) and manifest.json; each of several machines writes its
own manifest_0_of_2.json. Folders of other projects have no manifest: build-nanogpt (.npy), llm.c and
modded-nanogpt (.bin), nanoGPT (train.bin and val.bin, uint16 without a header).

The shards of a split are one long array, the stream. Window w is its tokens [w*T, w*T + T]: T inputs, and
the same shifted by one as targets. Only the tail of the stream, fewer than T tokens, is never a target.
Sample i of a run is window permute(i % n_windows) of epoch i // n_windows: every window once per epoch, each
epoch in its own order, and the step is all that a resume needs. Windows are read one by one, as uint16, so
memory stays flat whatever the size of the data.
"""
import functools
import hashlib
import itertools
import json
import math
import operator
import os
import re
import struct
import threading
from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from configurator import Between, OneOf, UserError
from files import check, read_json, write_atomically

RANK_FILE = "tokenizer.tiktoken"  # in a data_dir: the vocabulary of its shards
BIN_MAGIC, BIN_VERSION, BIN_HEADER_BYTES = 20240520, 1, 1024  # llm.c, dev/data/data_common.py
TOKEN = np.dtype("<u2")  # on disk, whatever the machine's byte order
MAX_OPEN_SHARDS = 128    # file descriptors held; the usual limit is 1024
SPLITS = ("train", "val")
SHARD_NAME = re.compile(r"(?:(?P<name>[^/\\:\0]+)_)?(?P<split>train|val)(?:_(?P<number>\d+))?\.(?:npy|bin)")
MANIFEST_NAME, BUILD_NAME = (  # of one machine, or of one of several
    re.compile(rf"{stem}(?:_\d{{1,4}}_of_(?P<ranks>\d{{1,4}}))?\.json") for stem in ("manifest", "build"))
NPY_HEADER = re.compile(  # version 1.0: the length of the dict in two bytes, then the dict
    rb"(?s)\x93NUMPY\x01\0(..)(\{'descr': '<u2', 'fortran_order': False, 'shape': \((\d{1,15}),\), \} *\n)")

COUNT, SHA256 = Between(0, 2**48), re.compile("[0-9a-f]{64}")
PLAIN = (bool, int, float, str, None, list)
TOTALS = {"documents": COUNT, "tokens": COUNT, "text_bytes": COUNT}
MANIFEST = {  # what training reads
    "format": OneOf(1), "tokenizer": {"name": str, "sha256": SHA256},
    "files": [{"file": SHARD_NAME, "tokens": COUNT, "sha256": SHA256}]}
BUILT = {  # what fineweb.py reads besides
    **TOTALS, "splits": {"train": TOTALS, "val": TOTALS}, "empty_documents": COUNT, "bad_documents": COUNT,
    "tokenizer": {"n_vocab": Between(257, 65_536)}, "eot": Between(0, 65_535), "settings": {str: PLAIN},
    "source": dict}

# ---- one file ------------------------------------------------------------------


def write_shard(path: Path, *parts: np.ndarray) -> dict:
    """Write `parts`, uint16 (n,) each, end to end as one .npy or .bin file, by suffix.

    Returns the manifest's record: {"file": name, "tokens": count, "sha256": of the file}. Raises UserError
    for a full disk, TypeError for ids of another type.
    """
    for ids in parts:
        if ids.dtype != np.uint16 or ids.ndim != 1:
            raise TypeError(f"{path}: ids must be uint16 (n,), not {ids.dtype} of shape {ids.shape}")
    tokens = sum(map(len, parts))
    if path.suffix == ".bin":
        header = struct.pack("<3i", BIN_MAGIC, BIN_VERSION, tokens).ljust(BIN_HEADER_BYTES, b"\0")
    else:  # 128 bytes, as np.save writes them
        shape = f"{{'descr': '<u2', 'fortran_order': False, 'shape': ({tokens},), }}".ljust(117)
        header = b"\x93NUMPY\x01\0" + struct.pack("<H", 118) + f"{shape}\n".encode()
    buffers = [header, *(np.ascontiguousarray(ids, TOKEN) for ids in parts)]
    write_atomically(path, *buffers)
    sha256 = hashlib.sha256()
    for buffer in buffers:
        sha256.update(buffer)
    return {"file": path.name, "tokens": tokens, "sha256": sha256.hexdigest()}


def read_header(path: Path) -> tuple[int, int]:
    """(tokens, bytes before the first one) of a shard; UserError if its header or size is wrong, OSError."""
    fix = "the file is corrupt or not a shard: build or download it again"
    with open(path, "rb", buffering=0) as file:
        start, size = file.read(512), os.fstat(file.fileno()).st_size
    if path.suffix == ".bin":
        magic, version, tokens = struct.unpack("<3i", start[:12].ljust(12, b"\0"))
        offset = BIN_HEADER_BYTES
        if path.stem in SPLITS and magic != BIN_MAGIC:  # nanoGPT's have no header
            tokens, offset = size // TOKEN.itemsize, 0
        elif (magic, version) != (BIN_MAGIC, BIN_VERSION) or tokens < 0:
            raise UserError(f"{path}: its header starts with {[magic, version, tokens]}, not with "
                            f"{[BIN_MAGIC, BIN_VERSION]} (llm.c's magic and version) and a count; {fix}")
    else:
        match = NPY_HEADER.match(start)
        if not match or len(match[2]) != int.from_bytes(match[1], "little"):
            raise UserError(f"{path}: its header {start[:80]!r} is not that of .npy, version 1.0, one "
                            f"dimension of {TOKEN.str} (uint16); {fix}")
        tokens, offset = int(match[3]), match.end()

    expected = offset + TOKEN.itemsize * tokens
    if size != expected:
        raise UserError(f"{path}: has {size:,} bytes instead of {expected:,} for {tokens:,} tokens; {fix}")
    return tokens, offset


def read_shard(path: Path) -> np.ndarray:
    """The ids of a shard as a read-only memory map, uint16 (tokens,); UserError as read_header raises it."""
    tokens, offset = read_header(path)
    if tokens == 0:
        return np.frombuffer(b"", dtype=TOKEN)  # an empty range cannot be mapped
    return np.memmap(path, dtype=TOKEN, mode="r", offset=offset, shape=(tokens,))


# ---- a folder of them ----------------------------------------------------------


def list_shards(folder: str | Path, split: str) -> list[Path]:
    """The shards of a split in order: *_{split}_{number}.npy or .bin, or llm.c's *_{split}.bin."""
    found = [match for match in _find(folder, SHARD_NAME) if match["split"] == split]
    found.sort(key=lambda match: (match["name"] or "", int(match["number"] or 0), match[0]))
    return [Path(folder, match[0]) for match in found]


def _find(folder, pattern):
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else ()
    return [match for name in names if (match := pattern.fullmatch(name))]


def manifest_name(rank: int = 0, ranks: int = 1, stem: str = "manifest") -> str:
    """manifest.json, or manifest_RANK_of_RANKS.json with several machines."""
    return f"{stem}.json" if ranks == 1 else f"{stem}_{rank}_of_{ranks}.json"


def write_manifest(folder: str | Path, manifest: dict, rank: int = 0, ranks: int = 1) -> None:
    """Write the manifest of machine `rank`. No date in it: same build, same bytes."""
    text = json.dumps({"format": 1, **manifest}, indent=1, sort_keys=True, ensure_ascii=False)
    write_atomically(Path(folder, manifest_name(rank, ranks)), f"{text}\n".encode())


def read_manifest(folder: str | Path, built: bool = False) -> dict | None:
    """The manifest of a folder, those of several machines merged; None where there is none.

    built: require all that fineweb.py writes, not only what training reads. Raises UserError for a manifest
    that is missing or invalid, and for machines whose tokenizer or settings differ.
    """
    found = {match[0]: int(match["ranks"] or 1) for match in _find(folder, MANIFEST_NAME)}
    if not found:
        return None
    ranks = max(found.values())
    manifests = {}
    for name in (manifest_name(rank, ranks) for rank in range(ranks)):
        if name not in found:
            raise UserError(f"{folder} has {next(iter(found))} but no {name}: that machine has not finished "
                            f"its part; run fineweb.py there again, or copy its files into this folder")
        try:
            manifests[name] = read_json(Path(folder, name), MANIFEST)
            if built or ranks > 1:
                check(manifests[name], BUILT, str(Path(folder, name)))
        except UserError as error:
            raise UserError(f"{error}; build the data again into another --data_dir") from error

    (first, merged), *others = manifests.items()
    for name, other in others:
        for key in ("tokenizer", "eot", "settings"):
            if other[key] != merged[key]:
                raise UserError(f"{folder}: {key} is {other[key]} in {name}, {merged[key]} in {first}; "
                                f"build all parts again with the same command")
        for key in (*TOTALS, "empty_documents", "bad_documents", "files"):
            merged[key] += other[key]
        for split, key in itertools.product(SPLITS, TOTALS):
            merged["splits"][split][key] += other["splits"][split][key]
    merged["files"].sort(key=operator.itemgetter("file"))
    return merged


class TokenStream:
    """The shards of one split as one long array of ids; a read may cross from shard to shard.

    Raises UserError for a folder without shards, with an unfinished build, with shards that differ from its
    manifest, or, without a manifest, with shards of several kinds or a gap in their numbers.
    """

    def __init__(self, data_dir: str | Path, split: str, prepare: str = "make prepare"):
        """`prepare` is the command that builds the folder: the message names it if the folder is missing."""
        self.folder = folder = Path(data_dir)
        if not folder.is_dir():
            raise UserError(f"data_dir={data_dir} does not exist; build it: {prepare}, or name another "
                            f"folder with --data_dir")
        self.manifest = read_manifest(folder)
        if self.manifest is None and (builds := _find(folder, BUILD_NAME)):
            command = read_json(folder / builds[0][0], {"command": str})["command"]
            raise UserError(f"{folder} holds an unfinished build; run it again: {command}")

        self.paths = list_shards(folder, split)
        if not self.paths:
            cure = ("training needs both splits: build the data again with fineweb.py --val_fraction=0.01 "
                    "--data_dir=ANOTHER" if _find(folder, SHARD_NAME) else f"build it: {prepare}")
            raise UserError(f"{folder} has no {split} shards (*_{split}_*.npy or .bin); {cure}")
        self._headers = [read_header(path) for path in self.paths]
        counts = [tokens for tokens, _ in self._headers]
        if self.manifest:
            self._sha256 = self._check_manifest(folder, split, counts)
        else:
            self._sha256 = [None] * len(counts)
            self._check_names(folder)
        self.ends = list(itertools.accumulate(counts))  # stream position just after each shard
        facts = list(zip((path.name for path in self.paths), counts, self._sha256))
        self.fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
        paths = self.paths
        self._file = functools.lru_cache(MAX_OPEN_SHARDS)(lambda i: open(paths[i], "rb", buffering=0))

    def _check_manifest(self, folder, split, counts):
        """The sha256 of each shard by the manifest, which must name these shards and no others."""
        found = {path.name: tokens for path, tokens in zip(self.paths, counts)}
        records = {record["file"]: record for record in self.manifest["files"]
                   if SHARD_NAME.fullmatch(record["file"])["split"] == split}
        for name in sorted(found.keys() | records.keys()):
            if name not in records:
                raise UserError(f"{folder / name} is not in the manifest: it belongs to another build; move "
                                f"it elsewhere")
            if name not in found:
                raise UserError(f"{folder / name} is in the manifest but missing; run fineweb.py again")
            if found[name] != records[name]["tokens"]:
                raise UserError(f"{folder / name} has {found[name]:,} tokens, in the manifest "
                                f"{records[name]['tokens']:,}; delete it and run fineweb.py again")
        return [records[name]["sha256"] for name in found]

    def _check_names(self, folder):
        """Without a manifest: shards must have one name and suffix, and no gap in their numbers."""
        kinds = {(match["name"], Path(match[0]).suffix): match[0] for match in _find(folder, SHARD_NAME)}
        if len(kinds) > 1:
            raise UserError(f"{folder} mixes shards of {len(kinds)} kinds, {', '.join(kinds.values())}: keep "
                            f"one kind, and move the others into another folder")
        numbers = [int(SHARD_NAME.fullmatch(path.name)["number"] or 0) for path in self.paths]
        for path, number, expected in zip(self.paths, numbers, itertools.count(min(numbers[0], 1))):
            if number != expected:
                raise UserError(f"{path}: expected number {expected} here: add the missing shards, or rename "
                                f"them so that their numbers run from 0 or 1 without a gap")

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Read shards part, part + parts, ...; UserError where a sha256 differs from the manifest's, or where
        there is no manifest."""
        if self.manifest is None:
            raise UserError(f"{self.folder} has no manifest.json to compare with; leave out --verify_data")
        for path, sha256 in list(zip(self.paths, self._sha256))[part::parts]:
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    raise UserError(f"{path}: its sha256 is not that of the manifest: it is corrupt or from "
                                    f"another build; delete it and run fineweb.py again")

    def tokenizer(self):
        """The tokenizer of the folder's rank file, by the manifest's name for it; GPT-2's without them."""
        from bpe import load_tokenizer, tokenizer_from_ranks  # here, as numba takes a while

        path = self.folder / RANK_FILE
        if self.manifest is None or not path.exists():
            return load_tokenizer("gpt2")
        tok = tokenizer_from_ranks(path.read_bytes(), self.manifest["tokenizer"]["name"])
        if tok.sha256 != self.manifest["tokenizer"]["sha256"]:
            raise UserError(f"{path} is not the vocabulary {tok.name!r} that the manifest names; run "
                            f"fineweb.py again, or name the file with --tokenizer=FILE")
        return tok

    def require_tokenizer(self, tok, cure: str = "") -> None:
        """Raise UserError if the manifest names another vocabulary than `tok`; `cure` is what else helps."""
        built_with = self.manifest["tokenizer"] if self.manifest else {"sha256": tok.sha256}
        if built_with["sha256"] != tok.sha256:
            raise UserError(f"{self.folder} was tokenized with {built_with['name']!r}, not with "
                            f"{tok.name!r}; {cure}build the data again")

    def __len__(self) -> int:
        return self.ends[-1]

    def locate(self, position: int) -> tuple[Path, int]:
        """The file that holds a stream position, and the position within that file: for messages."""
        i = bisect_right(self.ends, position)
        return self.paths[i], position - (self.ends[i] - self._headers[i][0])

    def read(self, start: int, count: int, out: np.ndarray | None = None) -> np.ndarray:
        """Tokens [start, start + count), uint16 (count,), in `out` if given.

        Plain reads, not memory maps: a map counts every page it ever touched as resident, reads 2 MB for a
        window of 2 kB, and kills the process when a file shrinks under it.
        """
        if not 0 <= start <= start + count <= len(self):
            raise IndexError(f"tokens {start:,} to {start + count:,} of {len(self):,} do not exist")
        tokens = np.empty(count, dtype=TOKEN) if out is None else out
        done = 0
        while done < count:
            i = bisect_right(self.ends, start + done)
            length, offset = self._headers[i]
            place = start + done - (self.ends[i] - length)  # in shard i
            part = tokens[done:done + length - place]
            file = self._file(i)
            file.seek(offset + place * TOKEN.itemsize)
            try:
                n_bytes = file.readinto(part.view(np.uint8))
            except OSError as error:  # it names no file
                raise OSError(error.errno, error.strerror, str(self.paths[i])) from error
            if n_bytes != part.nbytes:
                raise UserError(f"{self.paths[i]} has become shorter since it was opened; build or download "
                                f"it again")
            done += len(part)
        return tokens


def open_stream(data_dir: str | Path, split: str, tok) -> TokenStream:
    """A split for a model with the tokenizer `tok`. Raises UserError if the shards have another one."""
    stream = TokenStream(data_dir, split)
    stream.require_tokenizer(tok, "give --data_dir=FOLDER of shards with the model's vocabulary, or ")
    return stream


# ---- the order of training -----------------------------------------------------


def permute(index: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of range(n) keyed by (seed, epoch), at each `index`: int64 (k,) in, int64 (k,) out.

    In O(1) memory: an 8-round Feistel network (Luby and Rackoff, 1988) over pairs of digits in base `side`,
    the smallest whose square holds n. A result of n or more goes through again until it is below n ("cycle
    walking", Black and Rogaway, 2002; rare, as side**2 - n < 2 * side).
    """
    side = np.uint64(math.isqrt(n - 1) + 1)
    keys = np.frombuffer(hashlib.sha512(f"{seed} {epoch}".encode()).digest(), dtype="<u8")  # one per round
    out = np.asarray(index).astype(np.uint64)
    walking = np.arange(len(out))  # the entries that are not below n yet
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

    batch_tokens is a multiple of T. shuffle=False gives the windows in file order, for validation. Raises
    UserError if the data is shorter than one window, and when an id of n_vocab or more is read.
    """

    def __init__(self, stream: TokenStream, T: int, batch_tokens: int, seed: int, n_vocab: int,
                 shuffle: bool = True):
        if len(stream) < T + 1:
            raise UserError(f"{stream.paths[0]}, ... have {len(stream):,} tokens, too few for one window of "
                            f"block_size={T} and its targets; build more data" + (
                            f", or train with --block_size={len(stream) - 1} or smaller"
                            if len(stream) > 1 else ""))
        assert batch_tokens % T == 0 < batch_tokens, f"batch_tokens={batch_tokens} is not a multiple of {T}"
        self.stream, self.T, self.seed, self.n_vocab, self.shuffle = stream, T, seed, n_vocab, shuffle
        self.n_windows = (len(stream) - 1) // T
        self.windows_per_step = batch_tokens // T
        self.steps_per_epoch = self.n_windows / self.windows_per_step
        self._latest = -1, np.zeros(0, dtype=np.int64)  # a step and its window_ids

    def window_ids(self, step: int) -> np.ndarray:
        """The windows of a step, int64 (windows_per_step,). A step may cross from one epoch into the next."""
        cached, ids = self._latest  # one object: two threads may ask for two steps
        if step != cached:
            samples = step * self.windows_per_step + np.arange(self.windows_per_step)
            epochs, ids = samples // self.n_windows, samples % self.n_windows
            for epoch in range(epochs[0], epochs[-1] + 1) if self.shuffle else ():
                chosen = epochs == epoch
                ids[chosen] = permute(ids[chosen], self.n_windows, self.seed, epoch)
            self._latest = step, ids
        return ids

    def read_windows(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of the windows `ids` (B,): x and y, int64 (B, T), y one token ahead of x."""
        tokens = np.empty((len(ids), self.T + 1), dtype=TOKEN)  # (B, T+1)
        for row in np.argsort(ids, kind="stable").tolist():  # in file order: a shard is opened once
            self.stream.read(int(ids[row]) * self.T, self.T + 1, tokens[row])
        if len(ids) and tokens.max() >= self.n_vocab:
            row, column = np.argwhere(tokens >= self.n_vocab)[0].tolist()
            path, offset = self.stream.locate(int(ids[row]) * self.T + column)
            raise UserError(f"{path}: got id {tokens[row, column]} at token {offset:,}, but the vocabulary "
                            f"has {self.n_vocab:,} ids; the file is corrupt or was made with another "
                            f"tokenizer: build the data again, or raise --vocab_size")
        return tokens[:, :-1].astype(np.int64), tokens[:, 1:].astype(np.int64)

    def count_targets(self, n_windows: int) -> np.ndarray:
        """Occurrences of each id among the targets of the first windows, int64 (n_vocab,)."""
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


# ---- beside the training --------------------------------------------------------


def unigram_loss(train: WindowLoader, val: WindowLoader, n_val_windows: int) -> float:
    """Val loss of a model that knows frequencies only: add-one counts of the first 2**24 train tokens."""
    counts = 1 + train.count_targets(min(train.n_windows, 2**24 // train.T + 1))
    val_counts = val.count_targets(n_val_windows)
    return math.log(counts.sum()) - (val_counts * np.log(counts)).sum() / val_counts.sum()


def verify_in_background(streams: Iterable[TokenStream], part: int, parts: int,
                         failures: list[Exception]) -> threading.Thread:
    """A thread that runs `TokenStream.verify` and appends its error, if any, to `failures`."""
    def verify():
        try:
            for stream in streams:
                stream.verify(part, parts)
        except (UserError, OSError) as error:
            failures.append(error)

    thread = threading.Thread(target=verify, daemon=True)
    thread.start()
    return thread
