"""
Train a byte-level BPE vocabulary with GPT-2's pattern; the same merges as Hugging Face's BpeTrainer.

    python train_bpe.py --input=books/,more.jsonl.gz --vocab_size=32768 --out=my.tiktoken
    python train_bpe.py --dataset=python --vocab_size=4096 --out=python4k.tiktoken    # the embedded corpus

Reads text as fineweb.py does and writes a rank file (tiktoken's format) with one rank less than --vocab_size,
because <|endoftext|> is the last id and has no line. First come the 256 bytes in the order of GPT-2's file,
then the merges. Prints what it read and wrote, and the command that builds token shards with it. 70 MB take
about four seconds. Memory grows only with the distinct pieces of the text.

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
from numba import njit, types
from numba.typed import Dict

from bpe import (
    BATCH,
    CACHE_BITS,
    EOT_TEXT,
    PIECE,
    U,
    byte_order,
    check_documents,
    hash_bytes,
    load_tokenizer,
    mark_block,
    not_utf8,
    rank_file,
    read_pieces,
    same_bytes,
    unicode_classes,
)
from configurator import Between, PathName, UserError, configure
from documents import available_cores, input_source, python_source
from files import write_atomically

# A slot of count_kernel's table: the first 16 bytes of a piece, its length, where it stands, how often.
COUNT = np.dtype([("head", "u8"), ("tail", "u8"), ("length", "i8"), ("place", "i8"), ("count", "i8")])
GAP = -1  # no id: between pieces, and where a token has become part of another
MAX_DISTINCT = 1 << 29  # bytes of distinct pieces: their places are int32, up to three for each byte


# ---- how often each piece occurs -----------------------------------------------

@njit(cache=True, error_model="numpy", nogil=True)
def count_kernel(text, offsets, doc, classes, kinds, starts, pieces, table):
    """Count pieces from document `doc` on until the table is half full -> (document, byte) to go on from.

    The document is len(offsets) - 1 at the end; the byte is -1 if the document is not UTF-8. text uint8;
    offsets int64 (n_docs + 1,); kinds, starts uint8, longest document + 32; pieces PIECE; table COUNT, empty.
    """
    used = 0
    while doc < len(offsets) - 1:
        pos, end = offsets[doc], offsets[doc + 1]
        while pos < end:
            begin = pos
            done = mark_block(text, begin, end, classes, kinds, starts)
            if done < 0:
                return doc, -1
            while pos < begin + done:
                for k in range(read_pieces(text, pos, begin, begin + done, end, starts, table, pieces)):
                    piece = pieces[k]
                    head, tail, length, slot = piece.head, piece.tail, piece.length, piece.slot
                    if length > 16:
                        slot = np.int64(hash_bytes(text, pos, pos + length) >> U(64 - CACHE_BITS))
                    while table[slot].count > 0:
                        seen = table[slot]
                        if seen.head == head and seen.tail == tail and seen.length == length and (
                                length <= 16 or same_bytes(text, seen.place, text, pos, length)):
                            break
                        slot = slot + 1 & len(table) - 1
                    entry = table[slot]
                    if entry.count == 0:
                        if 2 * used == len(table):
                            return doc, pos
                        used += 1
                        entry.head, entry.tail, entry.length, entry.place = head, tail, length, pos
                    entry.count += 1
                    pos += length
        doc += 1
    return doc, 0


def count_documents(text: np.ndarray, offsets: np.ndarray) -> Counter:
    """{piece: occurrences} of documents; takes and raises what Tokenizer.encode_documents does."""
    text, offsets = check_documents(text, offsets)
    longest = int(np.diff(offsets).max(initial=0))
    kinds, starts = np.empty(longest + 32, np.uint8), np.empty(longest + 32, np.uint8)
    pieces, classes = np.empty(BATCH, PIECE), unicode_classes()
    data, counts, doc = text.tobytes(), Counter(), 0
    while doc < len(offsets) - 1:
        table = np.zeros(1 << CACHE_BITS, COUNT)
        doc, pos = count_kernel(text, offsets, doc, classes, kinds, starts, pieces, table)
        if pos < 0:
            raise not_utf8(text, offsets, doc)
        offsets[doc] = max(pos, offsets[doc])
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
    """count_documents of a chunk."""
    documents = chunk.read(*chunk.args)
    if documents.bad:
        raise UserError(f"{documents.bad[0]}; fix or remove it, and run this again")
    return count_documents(documents.text, documents.offsets)


# ---- merges --------------------------------------------------------------------

@njit(cache=True, error_model="numpy")
def add_pair(key, times, place, entry, numbers, keys, counts, first, last, links):
    """Count the pair `key` `times` times more, at `place`; `entry`: the next free one of `links`."""
    k = numbers.get(key, -1)
    if k < 0:
        k = numbers[key] = len(keys)
        keys.append(key)
        counts.append(0)
        first.append(entry)
        last.append(entry)
    where, after = links
    where[entry], after[last[k]] = place, entry
    last[k], after[entry] = entry, -1
    counts[k] += times


@njit(cache=True, error_model="numpy")
def heap_key(count, pair):
    """int64, smallest for the highest count and then the smallest pair; counts from 2**31 on are equal."""
    return -min(count, (1 << 31) - 1) << 32 | pair


@njit(cache=True, error_model="numpy")
def train_kernel(ids, times, n_ranks, lengths, merges, links):
    """Make tokens 256 to n_ranks - 1 -> the ranks there are: fewer where no pair is left.

    ids, int32: the id at the first and at the last byte of each token of each piece, GAP before, between and
    after pieces; what is inside tokens is not used. times, int64: how often the piece occurs. lengths, int64
    (n_ranks,), of tokens in bytes: 1 for the first 256. merges, int64 (n_ranks,), is filled with the pairs,
    left << 16 | right. links: (where, after), int32, room for three times as many places as bytes.

    Pair k has keys[k], counts[k] and the places where it begins: where[first[k]], from there on linked by
    `after`, in order. A merge leaves the places of the pairs it destroys in these lists, where the ids show
    that they are out of date, and their old counts in the heap, to be corrected when they come up. A count
    only grows while the newest token of the pair is made, because a merge makes no other pairs.
    """
    numbers = Dict.empty(types.int64, types.int64)  # {key: k}
    keys, counts, first, last = [0][:0], [0][:0], [0][:0], [0][:0]  # typed empty lists
    where, after = links
    entries = 0
    for i in range(1, len(ids) - 1):
        if ids[i] != GAP and ids[i + 1] != GAP:
            key = np.int64(ids[i]) << 16 | ids[i + 1]
            add_pair(key, times[i], i, entries, numbers, keys, counts, first, last, links)
            entries += 1
    heap = [heap_key(counts[k], keys[k]) for k in range(len(keys))]
    heapq.heapify(heap)
    for n in range(256, n_ranks):
        key = k = -1
        while k < 0:
            if len(heap) == 0:
                return n
            best = heapq.heappop(heap)
            key = best & 0xFFFFFFFF
            k = numbers[key]
            now = heap_key(counts[k], key)
            if now != best:
                if counts[k] > 0:
                    heapq.heappush(heap, now)
                k = -1
        left, right = key >> 16, key & 0xFFFF
        size, both = lengths[left], lengths[left] + lengths[right]
        merges[n], lengths[n] = key, both
        n_pairs = len(keys)
        entry = first[k]
        while entry >= 0:
            i = np.int64(where[entry])
            entry = after[entry]
            if ids[i] != left or ids[i + size] != right:
                continue  # one of them has become part of a longer token
            before, beyond = np.int64(ids[i - 1]), np.int64(ids[i + both])
            if before != GAP:
                counts[numbers[before << 16 | left]] -= times[i]
                key, start = before << 16 | n, i - lengths[before]
                add_pair(key, times[i], start, entries, numbers, keys, counts, first, last, links)
                entries += 1
            if beyond != GAP:
                counts[numbers[right << 16 | beyond]] -= times[i]
                key = n << 16 | beyond
                add_pair(key, times[i], i, entries, numbers, keys, counts, first, last, links)
                entries += 1
            ids[i + size] = GAP
            ids[i] = ids[i + both - 1] = n
        counts[k] = 0
        for k in range(n_pairs, len(keys)):
            if counts[k] > 0:  # aaaa makes (aa, a) and destroys it
                heapq.heappush(heap, heap_key(counts[k], keys[k]))
    return n_ranks


def check_vocab_size(vocab_size: int) -> None:
    if not 257 <= vocab_size <= 1 << 16:
        raise UserError(f"vocab_size={vocab_size}: the smallest is 257 (the bytes and {EOT_TEXT}), the "
                        f"largest 65,536 (ids are uint16); type --vocab_size=32768, for example")


def train_ranks(counts: dict[bytes, int], vocab_size: int) -> list[bytes]:
    """The vocab_size - 1 tokens of a byte-level BPE (Sennrich et al. 2016) by rank; EOT is the last id.

    counts: {piece: occurrences}, in any order. The first 256 tokens are the bytes in GPT-2's order. Then the
    pair of neighbours that occurs most often is merged, of several the one with the smallest (left id, right
    id), again and again, as Hugging Face's BpeTrainer does. No two merges give the same bytes: until a merge
    crosses their ends, equal bytes are cut alike wherever they stand, so that the first merge makes a token
    of them all. Raises UserError for a vocab_size outside 257 to 65,536, for a text too large, and if every
    piece is one token before vocab_size is reached.
    """
    check_vocab_size(vocab_size)
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
    links = np.empty(3 * len(text) + 1, np.int32), np.empty(3 * len(text) + 1, np.int32)
    n = train_kernel(ids, times, n_ranks, lengths, merges, links)
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
vocab_size: Between(257, 65_536) = 32_768  # ids of the new vocabulary: 256 bytes, merges, <|endoftext|>
out: PathName = ""  # the new rank file
num_workers: Between(0, 1024) = 0  # threads that count; 0 = one per core


def train(dataset: str, input: str, text_column: str, vocab_size: int, out: str, num_workers: int) -> None:
    """Train a vocabulary on --dataset or --input and write it to `out`; the arguments are the settings."""
    from tqdm import tqdm

    began, path = time.perf_counter(), Path(out)
    check_vocab_size(vocab_size)
    if dataset not in ("", "python"):
        raise UserError(f"--dataset={dataset}: only python, the embedded corpus, can be trained on by name; "
                        f"for other text type --input=PATH[,PATH...]")
    if bool(dataset) == bool(input) or not out:
        raise UserError("needs one text and a new file; type --input=PATH[,PATH...] or --dataset=python, "
                        "and --out=my.tiktoken")
    if path.exists():
        raise UserError(f"--out={out} exists; type another name, or remove it")
    if not path.parent.is_dir():
        raise UserError(f"--out={out}: make {path.parent} first, or type another --out=...")
    source = python_source(0) if dataset else input_source(input, text_column, 0)
    chunks = (chunk for _, chunk in source.chunks())
    counts = count_chunks(tqdm(chunks, unit=" chunks", leave=False, disable=None), num_workers)
    text_bytes, counted = sum(len(piece) * count for piece, count in counts.items()), time.perf_counter()
    if not counts:
        raise UserError("no text found; check --input and --text_column")
    print(f"text        {text_bytes:,} bytes, {counts.total():,} pieces, {len(counts):,} of them distinct, "
          f"counted in {counted - began:.1f} s")
    data = rank_file(train_ranks(counts, vocab_size))
    trained = time.perf_counter()
    write_atomically(path, data)
    tok = load_tokenizer(out)
    offsets = np.cumsum([0, *map(len, counts)])
    _, id_offsets = tok.encode_documents(np.frombuffer(b"".join(counts), np.uint8), offsets)
    tokens = int((np.diff(id_offsets) - 1) @ np.array([*counts.values()]))
    print(f"vocabulary  {tok.n_vocab:,} ids: 256 bytes, {tok.n_vocab - 257:,} merges in "
          f"{trained - counted:.1f} s, {EOT_TEXT} = {tok.eot}")
    print(f"rank file   {path}, {len(data):,} bytes, sha256 {tok.sha256}")
    print(f"this text   {tokens:,} tokens, {text_bytes / tokens:.3f} bytes per token")
    text = f"--dataset={dataset}" if dataset else f"--input={shlex.quote(input)}"
    print(f"next: python fineweb.py {text} --tokenizer={shlex.quote(out)} "
          f"--data_dir={shlex.quote(path.stem + '_data')}")


if __name__ == "__main__":
    train(**configure(globals()))
