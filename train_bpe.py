"""
Train a byte-level BPE vocabulary with GPT-2's pattern; the same merges as Hugging Face's BpeTrainer.

    python train_bpe.py --input=books/,more.jsonl.gz --vocab_size=32768 --out=my.tiktoken
    python train_bpe.py --dataset=python --vocab_size=4096 --out=python4k.tiktoken    # the embedded corpus

Reads the documents that fineweb.py, with the same --val_fraction, trains on. Writes a rank file (tiktoken's
format) of --vocab_size - 1 ranks, because <|endoftext|> is the last id and has no line. First come the 256
bytes in the order of GPT-2's file, then the merges. Prints what it read and wrote, and the command that
builds token shards with it. Run again, it changes nothing. 70 MB take seconds; memory grows only with the
distinct pieces of the text.

Two steps: count how often each piece of GPT-2's pattern occurs (threads, a chunk of documents each), then
merge the most frequent pair of neighbours in the distinct pieces, again and again.
"""

import heapq
import shlex
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numba import njit

from bpe import (
    BATCH,
    CACHE_BITS,
    EOT_TEXT,
    PIECE,
    U,
    byte_order,
    check_documents,
    hash_bytes,
    mark_block,
    raise_not_utf8,
    rank_file,
    read_pieces,
    same_bytes,
    say_compiling,
    tokenizer_from_ranks,
    unicode_classes,
)
from configurator import Between, PathName, UserError, configure
from documents import available_cores, input_source, python_source
from files import write_atomically

# A slot of count_kernel's table: the first 16 bytes of a piece, its length, where it stands, how often.
COUNT = np.dtype([("head", "u8"), ("tail", "u8"), ("length", "i8"), ("place", "i8"), ("count", "i8")])
GAP = -1  # no id: between pieces
PAIR = np.dtype([("key", "i8"), ("count", "i8"), ("first", "i4"), ("last", "i4")])  # first and last link
LINK = np.dtype([("place", "i4"), ("after", "i4")])  # where a pair begins, the link after this one or -1
MAX_DISTINCT = 1 << 29  # bytes of distinct pieces: their places are int32, up to three for each byte


# ---- how often each piece occurs -----------------------------------------------

@njit(cache=True, error_model="numpy", nogil=True)
def count_kernel(text, offsets, doc, classes, block, kinds, starts, pieces, table):
    """Count pieces from document `doc` on until the table is half full -> (document, byte) to go on from.

    At the end (n_docs, offsets[n_docs]); the byte is -1 if the document is not UTF-8. text uint8;
    offsets int64 (n_docs + 1,); block, kinds, starts uint8, longest document + 32; pieces PIECE; table COUNT,
    empty.
    """
    used = 0
    while doc < len(offsets) - 1:
        place, end = offsets[doc], offsets[doc + 1]
        while place < end:
            size, pos = mark_block(text, place, end, classes, block, kinds, starts), 0
            if size < 0:
                return doc, -1
            while pos < size:
                for k in range(read_pieces(block, pos, size, starts, table, pieces)):
                    piece = pieces[k]
                    head, tail, length, slot = piece.head, piece.tail, piece.length, piece.slot
                    if length > 16:
                        slot = np.int64(hash_bytes(text, place, length) >> U(64 - CACHE_BITS))
                    while table[slot].count > 0:
                        seen = table[slot]
                        if seen.head == head and seen.tail == tail and seen.length == length and (
                                length <= 16 or same_bytes(text, seen.place, text, place, length)):
                            break
                        slot = slot + 1 & len(table) - 1
                    entry = table[slot]
                    if entry.count == 0:
                        if 2 * used == len(table):
                            return doc, place
                        used += 1
                        entry.head, entry.tail, entry.length, entry.place = head, tail, length, place
                    entry.count += 1
                    pos += length
                    place += length
        doc += 1
    return doc, offsets[doc]


def count_documents(text: np.ndarray, offsets: np.ndarray) -> Counter:
    """{piece: occurrences} of documents; takes and raises what Tokenizer.encode_documents does."""
    text, offsets = check_documents(text, offsets)
    longest = int(np.diff(offsets).max(initial=0))
    block, kinds, starts = np.empty((3, longest + 32), np.uint8)
    pieces, classes = np.empty(BATCH, PIECE), unicode_classes()
    data, counts, doc = text.tobytes(), Counter(), 0
    while doc < len(offsets) - 1:
        table = np.zeros(1 << CACHE_BITS, COUNT)
        doc, pos = count_kernel(text, offsets, doc, classes, block, kinds, starts, pieces, table)
        if pos < 0:
            raise_not_utf8(text, offsets, doc)
        offsets[doc] = pos
        used = table[table["count"] > 0]
        columns = (used[key].tolist() for key in ("place", "length", "count"))
        counts.update({data[place:place + length]: count for place, length, count in zip(*columns)})
    return counts


def count_chunks(chunks, num_workers: int = 0) -> Counter:
    """{piece: occurrences} of all chunks, read and counted by num_workers threads, 0 = one per core.

    Raises UserError for what cannot be read, naming the place.
    """
    num_workers = num_workers or available_cores()
    counts, running = Counter(), deque()
    with ThreadPoolExecutor(num_workers) as pool:
        for chunk in chunks:
            running.append(pool.submit(count_chunk, chunk))
            if len(running) > 2 * num_workers:
                counts.update(running.popleft().result())
        while running:
            counts.update(running.popleft().result())
    return counts


def count_chunk(chunk) -> Counter:
    """count_documents of a chunk, without its documents for validation."""
    documents = chunk.read(*chunk.args)
    if documents.bad:
        raise UserError(f"{documents.bad[0]}; fix or remove it, and run this again")
    return count_documents(*documents.part(val=False))


# ---- merges --------------------------------------------------------------------

@njit(cache=True, error_model="numpy", forceinline=True)
def add_pair(key, times, place, entry, index, n_old, n_pairs, numbers, pairs, links, pair_at):
    """Count the pair `key` `times` times more, at `place`, with links[entry] -> how many pairs there are now.

    numbers[index] is its number, unless that is below n_old: then the pair is new.
    """
    k = numbers[index]
    if k < n_old:
        k = numbers[index] = n_pairs
        n_pairs += 1
        pairs[k].key, pairs[k].count, pairs[k].first, pairs[k].last = key, 0, entry, entry
    links[pairs[k].last].after = entry
    links[entry].place, links[entry].after = place, -1
    pairs[k].last = entry
    pairs[k].count += times
    pair_at[place] = k
    return n_pairs


@njit(cache=True, error_model="numpy")
def train_kernel(ids, times, n_ranks, lengths, merges, pairs, links):
    """Make tokens 256 to n_ranks - 1 -> the ranks there are: fewer where no pair is left.

    ids, int32: the id at the first and at the last byte of each token of each piece, GAP before, between and
    after pieces; what is inside tokens is not used. times, int64: how often the piece occurs. lengths, int64
    (n_ranks,), of tokens in bytes: 1 for the first 256. merges, int64 (n_ranks,), is filled with the pairs,
    left << 16 | right. pairs PAIR, links LINK: room for three times as many as there are bytes.

    The places of a pair are a list in order, from links[first] on. pair_at has the number of the pair that
    begins at a place now; other places of its list are out of date. So are counts in the heap, which are
    corrected when they come up: a count only grows while the newest token of its pair is made.
    """
    numbers, pair_at = np.full(1 << 17, -1, np.int32), np.full(len(ids), -1, np.int32)
    entry = n_pairs = n_old = 0
    for i in range(1, len(ids) - 1):
        if ids[i] != GAP and ids[i + 1] != GAP:
            left, right = np.int64(ids[i]), np.int64(ids[i + 1])
            n_pairs = add_pair(left << 16 | right, times[i], i, entry, left << 8 | right, 0, n_pairs, numbers,
                               pairs, links, pair_at)
            entry += 1
    heap = [(0, 0, 0)][:0]  # empty, of (-count, key, number), so the first is the pair to merge
    for n in range(256, n_ranks):
        for k in range(n_old, n_pairs):
            if pairs[k].count > 0:  # aaaa makes (aa, a) and destroys it
                heapq.heappush(heap, (-pairs[k].count, pairs[k].key, k))
        n_old = n_pairs
        while True:
            if len(heap) == 0:
                return n
            count, key, k = heapq.heappop(heap)
            if pairs[k].count == -count:
                break
            if pairs[k].count > 0:
                heapq.heappush(heap, (-pairs[k].count, key, k))
        left, right = key >> 16, key & 0xFFFF
        size, both = lengths[left], lengths[left] + lengths[right]
        merges[n], lengths[n] = key, both
        link = pairs[k].first
        while link >= 0:
            i, link = np.int64(links[link].place), links[link].after
            if pair_at[i] != k:
                continue
            before, beyond = np.int64(ids[i - 1]), np.int64(ids[i + both])
            pair_at[i] = -1
            if before != GAP:
                start = i - lengths[before]
                pairs[pair_at[start]].count -= times[i]
                n_pairs = add_pair(before << 16 | n, times[i], start, entry, before, n_old, n_pairs, numbers,
                                   pairs, links, pair_at)
                entry += 1
            if beyond != GAP:
                pairs[pair_at[i + size]].count -= times[i]
                n_pairs = add_pair(n << 16 | beyond, times[i], i, entry, 1 << 16 | beyond, n_old, n_pairs,
                                   numbers, pairs, links, pair_at)
                entry += 1
            pair_at[i + size] = -1
            ids[i] = ids[i + both - 1] = n
        pairs[k].count = 0
    return n_ranks


def train_ranks(counts: dict[bytes, int], vocab_size: int) -> list[bytes]:
    """The vocab_size - 1 tokens of a byte-level BPE (Sennrich et al. 2016) by rank; EOT is the last id.

    counts: {piece: occurrences}, in any order. The first 256 tokens are the bytes in GPT-2's order. Then the
    pair of neighbours that occurs most often is merged, of several the one with the smallest (left id, right
    id), again and again, as Hugging Face's BpeTrainer does. No two merges give the same bytes: until a merge
    crosses their ends, equal bytes are cut alike wherever they stand, so that the first merge makes a token
    of them all. Raises UserError for a text too large, and if every piece is one token before vocab_size, 257
    to 65,536, is reached.
    """
    assert 257 <= vocab_size <= 1 << 16, "the 256 bytes and end-of-text, and ids are uint16"
    text, n_ranks = np.frombuffer(b"".join(counts), np.uint8), vocab_size - 1
    if len(text) > MAX_DISTINCT:
        raise UserError(f"the distinct pieces of this text have {len(text):,} bytes; training takes at most "
                        f"{MAX_DISTINCT:,}: give a part of the text to --input")
    order = byte_order()
    byte_ids = np.empty(256, np.int32)
    byte_ids[order] = np.arange(256)

    sizes = np.fromiter(map(len, counts), np.int64, len(counts))
    place = np.arange(len(text)) + np.repeat(np.arange(1, len(counts) + 1), sizes)  # a gap before each piece
    ids = np.full(len(text) + len(counts) + 1, GAP, np.int32)
    times = np.zeros(len(ids), np.int64)
    ids[place] = byte_ids[text]
    times[place] = np.repeat(np.fromiter(counts.values(), np.int64, len(counts)), sizes)
    lengths, merges = np.ones(n_ranks, np.int64), np.zeros(n_ranks, np.int64)
    # Each merge ends two pairs and begins two, and there are fewer merges than bytes.
    pairs, links = np.empty(3 * len(text) + 1, PAIR), np.empty(3 * len(text) + 1, LINK)
    n = train_kernel(ids, times, n_ranks, lengths, merges, pairs, links)
    if n < n_ranks:
        raise UserError(f"every piece of this text is one token after {n - 256:,} merges, too few for "
                        f"vocab_size={vocab_size}; give more text to --input, or type --vocab_size={n + 1}")
    tokens = [bytes([byte]) for byte in order]
    for merge in merges[256:].tolist():
        tokens.append(tokens[merge >> 16] + tokens[merge & 0xFFFF])
    return tokens


# ---- settings: override with a config file and/or --key=value -----------------
input: PathName = ""  # the text: PATH[,PATH...], as in fineweb.py
dataset = ""  # or python: the embedded corpus, Python's own standard library
text_column = "text"  # the parquet column or jsonl field that holds the text
val_fraction: Between(0, 1 - 1e-9) = 0.01  # share that fineweb.py keeps for validation; left out here
vocab_size: Between(257, 65_536) = 32_768  # ids of the new vocabulary: 256 bytes, merges, <|endoftext|>
out: PathName = ""  # the new rank file


def train(dataset: str, input: str, text_column: str, val_fraction: float, vocab_size: int, out: str) -> None:
    """Train a vocabulary on --dataset or --input and write it to `out`; the arguments are the settings."""
    from tqdm import tqdm

    began, path = time.perf_counter(), Path(out)
    if dataset not in ("", "python"):
        raise UserError(f"--dataset={dataset}: only python, the embedded corpus, can be trained on by name; "
                        f"for other text type --input=PATH[,PATH...]")
    if bool(dataset) == bool(input) or not out:
        raise UserError("needs one text and a new file; type --input=PATH[,PATH...] or --dataset=python, "
                        "and --out=my.tiktoken")
    if out == "gpt2":
        raise UserError("--out=gpt2: to other scripts this is OpenAI's vocabulary; type another --out=...")
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"--out={out}: is a folder, or its folder does not exist; type another --out=...")
    say_compiling(count_kernel)
    source = python_source(val_fraction) if dataset else input_source(input, text_column, val_fraction)
    chunks = (chunk for _, chunk in source.chunks())
    counts = count_chunks(tqdm(chunks, unit=" chunks", leave=False, disable=None))
    text_bytes, counted = sum(len(piece) * count for piece, count in counts.items()), time.perf_counter()
    if not counts:
        raise UserError("no text found to train on; check --input, --text_column and --val_fraction")
    print(f"text        {text_bytes:,} bytes, {counts.total():,} pieces, {len(counts):,} of them distinct, "
          f"counted in {counted - began:.1f} s")
    data = rank_file(train_ranks(counts, vocab_size))
    trained = time.perf_counter()
    if path.exists() and path.read_bytes() != data:
        raise UserError(f"--out={out} exists and is another vocabulary; type another name, or remove it")
    write_atomically(path, data)
    tok = tokenizer_from_ranks(data, path.stem)
    print(f"vocabulary  {tok.n_vocab:,} ids: 256 bytes, {tok.n_vocab - 257:,} merges in "
          f"{trained - counted:.1f} s, {EOT_TEXT} = {tok.eot}")
    print(f"rank file   {path}, {len(data):,} bytes, sha256 {tok.sha256}")
    command = ["python", "fineweb.py", f"--dataset={dataset}" if dataset else f"--input={input}",
               f"--tokenizer={out}", f"--data_dir={path.stem}_data"]
    command += [f"--text_column={text_column}"] if text_column != "text" else []
    command += [f"--val_fraction={val_fraction}"] if val_fraction else []
    print(f"next: {shlex.join(command)}")


if __name__ == "__main__":
    train(**configure(globals()))
