"""
GPT-2's byte-level BPE tokenizer: numba kernels over raw UTF-8 bytes, ids bit-identical to tiktoken's.

    python bpe.py                                  # fetch and check GPT-2's vocabulary
    python bpe.py --tokenizer=my_vocab.tiktoken    # check another rank file; train_bpe.py makes one

Reads a rank file (tiktoken's format: one `base64 rank` per line); GPT-2's by tiktoken's cache and download.
Prints where it is, its sha256 and one encoded line. Takes a second; the first time, half a minute more, in
which numba compiles the kernels and keeps them on disk.

GPT-2's pattern cuts text into pieces (" word", "'ll", "...", "   "), and the tokens of a piece depend on its
bytes alone. A document goes through the kernels in blocks of about 16 kB, each in three steps:

    mark_block    the class of each byte, then a bit for each byte where a piece starts. Most loops do the
                  same to every byte, so the compiler makes SIMD code of them.
    read_pieces   from bit to bit: one shift and one count of zeros per piece. Each piece becomes two words of
                  eight bytes; its slot in the cache is prefetched.
    encode_kernel looks each piece up in the cache. encode_piece handles a miss: one look-up in the
                  vocabulary, then merging pairs of tokens, lowest rank first.

In the inner loop of encode_kernel no array is passed on except to functions that LLVM inlines (forceinline,
or small enough), because numba counts references with atomic additions at every other call.
"""

import base64
import functools
import hashlib
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.cpython.unsafe.numbers import trailing_zeros  # one instruction
from numba.extending import intrinsic

from configurator import PathName, UserError, configure
from files import read_text

EOT_TEXT = "<|endoftext|>"
# tiktoken's pattern of gpt2 and r50k_base; only to build the equivalent tiktoken.Encoding: the kernels
# implement it by hand, in mark_starts and contraction.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
GPT2_URL = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"  # as in tiktoken

U = np.uint64  # numba makes float64 of int64 + uint64, so words and their constants are typed
U8 = np.uint8  # and int64 of every operation on bytes, eight times as wide in SIMD code
ONES, HIGHS = U(0x0101010101010101), U(0x8080808080808080)
HASH_1, HASH_2 = U(0x9E3779B97F4A7C15), U(0xC2B2AE3D27D4EB4F)  # odd: 2**64 / golden ratio; a prime of xxHash

# What is known of a byte. Bits 0-1: the class of its character, [^\s\p{L}\p{N}], \p{L}, \p{N} or \s.
OTHER, LETTER, NUMBER, SPACE = 0, 1, 2, 3
CLASS = 3
BLANK = 4    # U+0020, the one space that the next piece takes along
WIDE = 8     # first byte of a character of several bytes
INSIDE = 16  # the rest of them
START = 128  # in `starts`: a piece starts at this byte

ABSENT = 1 << 16    # above every id and rank
BLOCK = 1 << 14     # bytes marked at a time, and a few more; their marks stay in the processor's cache
BATCH = 128         # pieces read at a time: their slots are prefetched while the others are read

# A slot of the cache is one 64-byte line of memory: a piece of up to 16 bytes and all its ids, at most 16.
#
#     byte  0      8      16                               48       56      64
#           | head | tail | ids, 16 uint16, as four words  | length | count |     length 0: a free slot
SLOT = np.dtype([("head", "u8"), ("tail", "u8"), ("ids0", "u8"), ("ids4", "u8"), ("ids8", "u8"),
                 ("ids12", "u8"), ("length", "i8"), ("count", "i8")])
CACHE_BITS = 19  # 2**19 slots, 32 MiB: of unseen English 1.3% of the pieces miss, of Python code 1.0%

PIECE = np.dtype([("head", "u8"), ("tail", "u8"), ("length", "i8"), ("slot", "i8")])  # of read_pieces
LONG = np.dtype([("start", "i8"), ("length", "i8"), ("ids", "i8"), ("count", "i8")])  # of encode_long
LONG_SLOTS = 1 << 10


# ---- words of eight bytes ------------------------------------------------------

@njit(cache=True, error_model="numpy")
def load_word(buffer, i):
    """buffer[i:i+8] as a little-endian uint64; one load, as an unsigned i needs no wrap-around."""
    i = U(i)
    return (U(buffer[i]) | U(buffer[i + U(1)]) << U(8) | U(buffer[i + U(2)]) << U(16)
            | U(buffer[i + U(3)]) << U(24) | U(buffer[i + U(4)]) << U(32) | U(buffer[i + U(5)]) << U(40)
            | U(buffer[i + U(6)]) << U(48) | U(buffer[i + U(7)]) << U(56))


@njit(cache=True, error_model="numpy")
def load_ids(ids, i):
    """ids[i:i+4], four uint16, as a uint64."""
    i = U(i)
    return U(ids[i]) | U(ids[i + U(1)]) << U(16) | U(ids[i + U(2)]) << U(32) | U(ids[i + U(3)]) << U(48)


@njit(cache=True, error_model="numpy")
def store_ids(ids, i, word):
    """ids[i:i+4] = the four uint16 of `word`; one store."""
    i = U(i)
    ids[i], ids[i + U(1)], ids[i + U(2)], ids[i + U(3)] = word, word >> U(16), word >> U(32), word >> U(48)


# ---- where pieces start --------------------------------------------------------

@njit(cache=True, error_model="numpy")
def classify(text, block, kinds):
    """Copy text to `block`, and kinds[i] of each ASCII byte -> the bytes ORed together."""
    seen = U8(0)
    for i in range(len(text)):
        byte = text[i]
        block[i] = byte
        seen = U8(seen | byte)
        lower = U8(byte | 0x20)
        kind = U8(OTHER)
        kind = U8(LETTER) if (lower >= ord("a")) & (lower <= ord("z")) else kind
        kind = U8(NUMBER) if (byte >= ord("0")) & (byte <= ord("9")) else kind
        kind = U8(SPACE) if (byte >= ord("\t")) & (byte <= ord("\r")) else kind
        kind = U8(SPACE | BLANK) if byte == ord(" ") else kind
        kinds[i] = kind
    return seen


@njit(cache=True, error_model="numpy")
def classify_wide(block, n, classes, kinds):
    """kinds of the characters of several bytes in block[:n] -> how many are spaces; -1 if it is no UTF-8."""
    spaces = i = 0
    while i < n:
        wide = load_word(block, i) & HIGHS
        if wide == U(0):
            i += 8
            continue
        i += np.int64(trailing_zeros(wide)) >> 3
        lead, second = np.int64(block[i]), block[i + 1]
        low, high = 0x80, 0xBF  # of the second byte: Unicode 16, table 3-7
        if 0xC2 <= lead <= 0xDF:
            size, code = 2, lead & 0x1F
        elif 0xE0 <= lead <= 0xEF:
            size, code = 3, lead & 0x0F
            low, high = 0xA0 if lead == 0xE0 else low, 0x9F if lead == 0xED else high
        elif 0xF0 <= lead <= 0xF4:
            size, code = 4, lead & 0x07
            low, high = 0x90 if lead == 0xF0 else low, 0x8F if lead == 0xF4 else high
        else:
            return -1
        if second < low or second > high:
            return -1
        for j in range(i + 1, i + size):
            if block[j] & 0xC0 != 0x80:
                return -1
            code = code << 6 | block[j] & 0x3F
        for j in range(i, i + size):
            kinds[j] = classes[code] | (WIDE if j == i else INSIDE)
        spaces += classes[code] == SPACE
        i += size
    return spaces


@njit(cache=True, error_model="numpy")
def mark_starts(kinds, n, starts):
    """starts[i] = START where a piece starts at byte i, else 0, for 0 < i < n; starts[n] = START.

    A piece is a run of one class, with the blank before it if there is one. A run of spaces leaves its last
    one to be a piece of its own, or the blank of the next (`\\s+(?!\\S)`), except at the end of the block.
    """
    kinds[n] = SPACE
    for i in range(1, n):
        last, kind, after = kinds[i - 1], kinds[i], kinds[i + 1]
        last_class, this_class, next_class = U8(last & CLASS), U8(kind & CLASS), U8(after & CLASS)
        changes = last_class != this_class
        is_space, space_follows, after_blank = this_class == SPACE, next_class == SPACE, U8(last & BLANK) != 0
        is_start = (changes & (is_space | (not after_blank))) | (is_space & (not space_follows))
        starts[i] = U8(START) if is_start else U8(0)
    starts[n] = START


@njit(cache=True, error_model="numpy")
def mark_wide_spaces(kinds, n, starts):
    """Correct mark_starts at spaces of several bytes, whose next character is not at the next byte."""
    for i in range(n):
        if kinds[i] == SPACE | WIDE:
            after = i + 1
            while kinds[after] == SPACE | INSIDE:
                starts[after] = 0
                after += 1
            new = kinds[after] & CLASS != SPACE or (i > 0 and kinds[i - 1] & CLASS != SPACE)
            starts[i] = START if new else 0


@njit(cache=True, error_model="numpy")
def mark_block(text, start, end, classes, block, kinds, starts):
    """Copy the first block of text[start:end], with 16 zeros after it, and mark its pieces -> its bytes.

    Bit i of `starts` becomes 1 where a piece starts at block[i], for i > 0, and at the block's end. A block
    ends before an ASCII space that follows another character: a piece starts there, and no piece depends on
    what is on the other side. Returns -1 if the block is not UTF-8. block, kinds, starts: uint8, 32 bytes
    longer than the document.
    """
    stop = min(start + BLOCK, end)
    while stop < end:
        last, byte = text[stop - 1], text[stop]
        if (byte == ord(" ") or ord("\t") <= byte <= ord("\r")) and (ord(" ") < last < 0x80 or last >= 0xB0):
            break  # from 0xB0 on: no space of several bytes ends so
        stop += 1
    n = stop - start
    seen = classify(text[start:stop], block, kinds)
    block[n:n + 16] = 0
    wide_spaces = classify_wide(block, n, classes, kinds) if seen >= 0x80 else 0
    if wide_spaces < 0:
        return -1
    mark_starts(kinds, n, starts)
    if wide_spaces > 0:
        mark_wide_spaces(kinds, n, starts)
    for i in range(n // 8 + 1):  # the product's top byte has the lowest bit of each byte
        starts[i] = (load_word(starts, 8 * i) >> U(7) & ONES) * U(0x0102040810204080) >> U(56)
    return n


@njit(cache=True, error_model="numpy")
def contraction(block, pos):
    """Length of the 's 't 'm 'd 'll 've 're whose apostrophe is at block[pos], 0 if there is none."""
    second, third = block[pos + 1], block[pos + 2]
    if second == ord("s") or second == ord("t") or second == ord("m") or second == ord("d"):
        return 2
    if second == ord("l") and third == ord("l"):
        return 3
    if (second == ord("v") or second == ord("r")) and third == ord("e"):
        return 3
    return 0


@intrinsic
def prefetch(typing_context, array, i):
    """Load the memory of array[i] into the cache without waiting for it: llvm.prefetch."""
    def generate(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        place = builder.bitcast(builder.gep(data, [arguments[1]]), ir.IntType(8).as_pointer())
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [place.type, number, number, number])
        ask = builder.module.declare_intrinsic("llvm.prefetch", [place.type], kind)
        builder.call(ask, [place, number(0), number(3), number(1)])  # to read; near; data, not code
        return context.get_dummy_value()
    return types.void(array, i), generate


@njit(cache=True, error_model="numpy")
def read_pieces(block, pos, stop, starts, table, pieces):
    """Fill `pieces` with those of block[pos:stop], marked by `starts`, as there is room -> their number.

    head and tail are the first 16 bytes of a piece as two words, zeros after its end. slot: where `table`,
    2**CACHE_BITS long, has it; it is prefetched.
    """
    n = 0
    while pos < stop and n < len(pieces):
        after = U(pos + 1)
        marks = load_word(starts, after >> U(3)) >> (after & U(7))
        while marks == U(0):  # 57 or more bytes without one
            after += U(56)
            marks = load_word(starts, after >> U(3)) >> (after & U(7))
        length = np.int64(after + trailing_zeros(marks)) - pos
        if block[pos] == ord("'"):
            length = contraction(block, pos) or length
        known = min(length, 16)
        head = load_word(block, pos) & ~U(0) >> U(64 - 8 * min(known, 8))  # lengths are hard to predict, so
        tail = load_word(block, pos + 8) & ~U(0) >> U(128 - 8 * known) if known > 8 else U(0)  # no branches
        slot = np.int64((head ^ tail * HASH_2) * HASH_1 >> U(64 - CACHE_BITS))
        prefetch(table, slot)
        piece = pieces[n]
        piece.head, piece.tail, piece.length, piece.slot = head, tail, length, slot
        n += 1
        pos += length
    return n


# ---- tokens of one piece -------------------------------------------------------

@njit(cache=True, error_model="numpy", forceinline=True)
def hash_bytes(text, start, length):
    """uint64 hash, good in its high bits."""
    h = U(length)
    for i in range(start, start + length):
        h = (h ^ U(text[i])) * HASH_1
    return h


@njit(cache=True, error_model="numpy", forceinline=True)
def token_key(text, start, length):
    """The key of a token in the table of the vocabulary: 48 bits, never 0."""
    return hash_bytes(text, start, length) >> U(16) | U(1)


@njit(cache=True, error_model="numpy", forceinline=True)
def same_bytes(a, i, b, j, length):
    """a[i:i+length] == b[j:j+length]"""
    for k in range(length):
        if a[i + k] != b[j + k]:
            return False
    return True


@njit(cache=True, error_model="numpy", forceinline=True)
def first_slot(key, table):
    """Where to look for a key first."""
    return np.int64(U(key) * HASH_1 >> U(32)) & len(table) - 1


@njit(cache=True, error_model="numpy", forceinline=True)
def find(key, table):
    """The value of a key in a table of make_table, ABSENT if it has none."""
    slot = first_slot(key, table)
    while table[slot] != U(0):
        if table[slot] >> U(16) == U(key):
            return np.int64(table[slot] & U(0xFFFF))
        slot = slot + 1 & len(table) - 1
    return ABSENT


@njit(cache=True, error_model="numpy")
def make_table(keys, values):
    """Table of 48-bit keys, not 0, and 16-bit values: key << 16 | value at first_slot or after; 0 is free."""
    size = 4
    while size < 2 * len(keys):
        size *= 2
    table = np.zeros(size, np.uint64)
    for key, value in zip(keys, values):
        slot = first_slot(key, table)
        while table[slot] != U(0):
            slot = slot + 1 & size - 1
        table[slot] = U(key) << U(16) | U(value)
    return table


@njit(cache=True, error_model="numpy", forceinline=True)
def find_token(text, start, length, vocab):
    """Id of the token text[start:start+length], ABSENT if it is none; vocab: (table, blob, edges)."""
    table, blob, edges = vocab
    token = find(token_key(text, start, length), table)
    if token != ABSENT and (edges[token + 1] - edges[token] != length
                            or not same_bytes(text, start, blob, edges[token], length)):
        return ABSENT
    return token


@njit(cache=True, error_model="numpy", forceinline=True)
def find_pair(left, right, pairs):
    """Rank (= id) of the token that left and right make, ABSENT if there is none."""
    return find(U(left) << U(16) | U(right), pairs)


@njit(cache=True, error_model="numpy", forceinline=True)
def set_rank(tree, i, rank):
    """Give the pair at i a rank. tree[1] is the lowest rank << 40 | position, the leftmost of equal ones."""
    node = (len(tree) >> 1) + i
    tree[node] = rank << 40 | i
    while node > 1:
        node >>= 1
        tree[node] = min(tree[2 * node], tree[2 * node + 1])


@njit(cache=True, error_model="numpy")
def merge(ids, n, count, pairs, scratch):
    """Merge ids[n:n+count] in place, lowest rank first, leftmost first -> count left; O(count log count)."""
    work = scratch if len(scratch) >= 4 * count else np.empty(4 * count, np.int64)
    before, after, tree = work[:count], work[count:2 * count], work[2 * count:4 * count]
    for i in range(count - 1):  # the slots are far apart in memory: ask for all before the first is needed
        prefetch(pairs, first_slot(U(ids[n + i]) << U(16) | U(ids[n + i + 1]), pairs))
    for i in range(count):
        before[i], after[i] = i - 1, i + 1  # a linked list
        rank = find_pair(ids[n + i], ids[n + i + 1], pairs) if i < count - 1 else ABSENT
        tree[count + i] = rank << 40 | i  # as set_rank, for all
    for node in range(count - 1, 0, -1):
        tree[node] = min(tree[2 * node], tree[2 * node + 1])
    while tree[1] >> 40 != ABSENT:
        rank, i = tree[1] >> 40, tree[1] & (1 << 40) - 1
        ids[n + i] = rank
        set_rank(tree, after[i], ABSENT)
        after[i] = after[after[i]]
        rank_after = ABSENT
        if after[i] < count:
            before[after[i]] = i
            rank_after = find_pair(rank, ids[n + after[i]], pairs)
        set_rank(tree, i, rank_after)
        if before[i] >= 0:
            set_rank(tree, before[i], find_pair(ids[n + before[i]], rank, pairs))
    left = i = 0
    while i < count:
        ids[n + left] = ids[n + i]
        left, i = left + 1, after[i]
    return left


@njit(cache=True, error_model="numpy")
def encode_piece(text, start, length, vocab, byte_ids, pairs, scratch, ids, n):
    """Write the tokens of the piece at text[start] to ids[n:], where one per byte fits -> their number."""
    token = find_token(text, start, length, vocab)
    if token != ABSENT:
        ids[n] = token
        return 1
    for i in range(length):
        ids[n + i] = byte_ids[text[start + i]]
    return merge(ids, n, length, pairs, scratch)


@njit(cache=True, error_model="numpy")
def encode_long(text, start, length, vocab, byte_ids, pairs, scratch, longs, ids, n):
    """encode_piece, copying from `ids` where a piece of the same bytes (deep indentation) came before."""
    last = longs[np.int64(hash_bytes(text, start, length) >> U(32)) & len(longs) - 1]
    if last.length == length and same_bytes(text, last.start, text, start, length):
        for i in range(last.count):
            ids[n + i] = ids[last.ids + i]
        return last.count
    count = encode_piece(text, start, length, vocab, byte_ids, pairs, scratch, ids, n)
    last.start, last.length, last.ids, last.count = start, length, n, count
    return count


# ---- documents -----------------------------------------------------------------

@njit(cache=True, error_model="numpy")
def encode_kernel(text, offsets, eot, classes, vocab, byte_ids, pairs, cache, pieces, scratch, longs, block,
                  kinds, starts, ids, id_offsets):
    """Tokens of all documents -> -1, or the first document that is not UTF-8 (the rest is then undefined).

    text uint8; offsets int64 (n_docs + 1,), checked before; pieces PIECE; longs LONG, free; block, kinds,
    starts uint8, longest document + 32; ids uint16, len(text) + n_docs + 16; id_offsets int64 (n_docs + 1,),
    to be filled; tables as in Tokenizer.
    """
    n = 0
    for doc in range(len(offsets) - 1):
        place, end = offsets[doc], offsets[doc + 1]
        id_offsets[doc] = n
        ids[n] = eot
        n += 1
        while place < end:
            size, pos = mark_block(text, place, end, classes, block, kinds, starts), 0
            if size < 0:
                return doc
            while pos < size:
                for k in range(read_pieces(block, pos, size, starts, cache, pieces)):
                    piece = pieces[k]
                    slot, length = cache[piece.slot], piece.length
                    if length > 16:
                        count = encode_long(text, place, length, vocab, byte_ids, pairs, scratch, longs, ids,
                                            n)
                    elif slot.head == piece.head and slot.tail == piece.tail and slot.length == length:
                        # all 16: the next piece overwrites what is too many
                        store_ids(ids, n, slot.ids0)
                        store_ids(ids, n + 4, slot.ids4)
                        store_ids(ids, n + 8, slot.ids8)
                        store_ids(ids, n + 12, slot.ids12)
                        count = slot.count
                    else:
                        count = encode_piece(text, place, length, vocab, byte_ids, pairs, scratch, ids, n)
                        slot.head, slot.tail, slot.length, slot.count = piece.head, piece.tail, length, count
                        slot.ids0, slot.ids4 = load_ids(ids, n), load_ids(ids, n + 4)
                        slot.ids8, slot.ids12 = load_ids(ids, n + 8), load_ids(ids, n + 12)
                    n += count
                    pos += length
                    place += length
    id_offsets[len(offsets) - 1] = n
    return -1


@njit(cache=True, error_model="numpy")
def hash_tokens(blob, edges, keys):
    """keys[i] = token_key of blob[edges[i]:edges[i+1]]"""
    for i in range(len(keys)):
        keys[i] = token_key(blob, edges[i], edges[i + 1] - edges[i])


# ---- tables --------------------------------------------------------------------

@functools.cache
def unicode_classes() -> np.ndarray:
    """uint8 (0x110000,): OTHER, LETTER, NUMBER or SPACE for each code point, by tiktoken's own regex engine.

    An Encoding whose pattern is one class and whose tokens are single bytes drops all other characters, so
    encoding a text of every code point gives the members of the class.
    """
    import tiktoken  # here, so that importing this module stays cheap

    code_points = np.arange(0x110000, dtype="<u4")
    code_points = code_points[(code_points < 0xD800) | (code_points > 0xDFFF)]  # no surrogates
    text = code_points.tobytes().decode("utf-32-le")
    single_bytes = {bytes([byte]): byte for byte in range(256)}
    classes = np.full(0x110000, OTHER, np.uint8)
    for kind, pattern in ((LETTER, r"\p{L}"), (NUMBER, r"\p{N}"), (SPACE, r"\s")):
        engine = tiktoken.Encoding(pattern, pat_str=pattern, mergeable_ranks=single_bytes, special_tokens={})
        members = bytes(engine.encode_ordinary(text)).decode()
        classes[np.frombuffer(members.encode("utf-32-le"), "<u4")] = kind
    return classes


def raise_not_utf8(text: np.ndarray, offsets: np.ndarray, document: int) -> None:
    """Raise Python's error for a document that is not UTF-8, and name the document in it."""
    try:
        text[offsets[document]:offsets[document + 1]].tobytes().decode()
    except UnicodeDecodeError as error:
        error.reason += f", in document {document}"
        raise


def check_documents(text: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(text, read-only; offsets, a copy in int64) for kernels that check no bounds. Raises ValueError."""
    text, offsets = np.ascontiguousarray(text).view(), np.asarray(offsets)
    if text.dtype != np.uint8 or text.ndim != 1:
        raise ValueError(f"text is {text.dtype} {text.shape}; it must be uint8 (n,): try np.frombuffer")
    if offsets.ndim != 1 or len(offsets) == 0 or offsets.dtype.kind not in "iu":
        raise ValueError(f"offsets are {offsets.dtype} {offsets.shape}; they must be integers (n_docs + 1,)")
    offsets = offsets.astype(np.int64)
    if offsets[0] < 0 or offsets.max() > len(text) or np.any(offsets[1:] < offsets[:-1]):
        raise ValueError(f"offsets must increase from 0 or more to at most {len(text)}, the bytes of text")
    text.flags.writeable = False  # as Arrow's buffers are: one type, one compiled kernel
    return text, offsets


class Tokenizer:
    """A byte-level BPE vocabulary with GPT-2's pattern. Build it with load_tokenizer or tokenizer_from_ranks.

    name, n_vocab, eot (the last id), sha256 (hex, of the rank file), rank_file (its bytes) and tokens (bytes
    by id) describe it. Kernels hold the GIL, so threads may share one.
    """

    def __init__(self, tokens: list[bytes], rank_file: bytes, name: str):
        self.name = name
        self.eot = len(tokens)
        self.n_vocab = len(tokens) + 1
        self.sha256 = hashlib.sha256(rank_file).hexdigest()
        self.rank_file = rank_file
        self.tokens = [*tokens, EOT_TEXT.encode()]

    @functools.cached_property
    def _tables(self) -> tuple:
        """What encode_kernel looks up; made when it is first needed, as it takes longer than the rest."""
        tokens = self.tokens[:-1]
        ranks = {token: rank for rank, token in enumerate(tokens)}
        byte_ids = np.array([ranks[bytes([byte])] for byte in range(256)], np.uint16)

        # All splits of a token into two tokens, not only the one that training merged: tiktoken merges two
        # neighbours whenever their bytes together are a token.
        merges = np.fromiter((left << 32 | right << 16 | rank for token, rank in ranks.items()
                              for i in range(1, len(token))
                              if (left := ranks.get(token[:i])) is not None
                              and (right := ranks.get(token[i:])) is not None), np.uint64)
        pairs = make_table(merges >> U(16), merges & U(0xFFFF))

        blob, edges = np.frombuffer(b"".join(tokens), np.uint8), np.cumsum([0, *map(len, tokens)])
        keys = np.empty(len(tokens), np.uint64)
        hash_tokens(blob, edges, keys)
        assert len(np.unique(keys)) == len(keys), "two tokens have the same hash of 48 bits; change HASH_1"
        table = make_table(keys, np.arange(len(keys), dtype=np.uint64))

        lines = np.zeros(64 * ((1 << CACHE_BITS) + 1), np.uint8)
        cache = lines[-lines.ctypes.data % 64:][:64 << CACHE_BITS].view(SLOT)  # each slot on one line
        pieces, scratch = np.empty(BATCH, PIECE), np.empty(256, np.int64)  # merges of up to 64 bytes
        return unicode_classes(), (table, blob, edges), byte_ids, pairs, cache, pieces, scratch

    def encode_documents(self, text: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Documents text[offsets[i]:offsets[i+1]] -> (ids uint16, id_offsets int64 (n_docs + 1,)).

        text is a uint8 array of UTF-8 (an Arrow buffer as it is), offsets has n_docs + 1 integers. Document i
        is ids[id_offsets[i]:id_offsets[i+1]]: the end-of-text id, then its tokens. Raises UnicodeDecodeError
        for the first document that is not UTF-8, and names it; a character cut by an offset is invalid on
        both sides. Raises ValueError for other types and for offsets that decrease or
        lie outside the text.
        """
        text, offsets = check_documents(text, offsets)
        longest = int(np.diff(offsets).max(initial=0))
        block, kinds, starts = np.empty((3, longest + 32), np.uint8)
        ids = np.empty(len(text) + len(offsets) + 16, np.uint16)  # memory never written is never allocated
        id_offsets = np.empty(len(offsets), np.int64)
        longs = np.zeros(LONG_SLOTS, LONG)
        invalid = encode_kernel(text, offsets, self.eot, *self._tables, longs, block, kinds, starts, ids,
                                id_offsets)
        if invalid >= 0:
            raise_not_utf8(text, offsets, invalid)
        ids.resize(id_offsets[-1], refcheck=False)
        return ids, id_offsets

    def encode(self, text: str) -> np.ndarray:
        """uint16 ids of the text, as tiktoken's encode_ordinary: "<|endoftext|>" in it is ordinary text.

        Halves of surrogate pairs are joined where they meet and U+FFFD where they do not, as tiktoken does.
        """
        try:
            data = text.encode()
        except UnicodeEncodeError:
            data = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
        return self.encode_documents(np.frombuffer(data, np.uint8), np.array([0, len(data)]))[0][1:]

    def decode_bytes(self, ids) -> bytes:
        """Bytes of any iterable or array of ids. Raises ValueError for an id outside the vocabulary."""
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        for i in (min(ids), max(ids)) if ids else ():
            if not 0 <= i < self.n_vocab:
                raise ValueError(f"id {i} is not in vocabulary {self.name}, whose ids are 0 to {self.eot}")
        return b"".join([self.tokens[i] for i in ids])

    def decode(self, ids) -> str:
        """Text of the ids; what is not UTF-8 (a character of which tokens are missing) becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self) -> np.ndarray:
        """int64 (n_vocab,): bytes of text per id, 0 for end-of-text; the divisor of bits per byte."""
        return np.array([*map(len, self.tokens[:-1]), 0])

    def to_tiktoken(self):
        """The tiktoken.Encoding of the same ranks, pattern and end-of-text id."""
        import tiktoken

        ranks = {token: rank for rank, token in enumerate(self.tokens[:-1])}
        return tiktoken.Encoding(self.name, pat_str=PATTERN, mergeable_ranks=ranks,
                                 special_tokens={EOT_TEXT: self.eot})


# ---- vocabulary files ----------------------------------------------------------

def tokenizer_from_ranks(rank_file: bytes, name: str) -> Tokenizer:
    """Tokenizer of a rank file's bytes, whose ranks count from 0. Raises UserError that names the line."""
    ranks = {}
    for number, line in enumerate(rank_file.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            encoded, rank = line.split()
            token = base64.b64decode(encoded, validate=True)
            if int(rank) != len(ranks):
                raise ValueError(f"the next rank is {len(ranks)}")
            if token in ranks:
                raise ValueError(f"the token {token!r} has rank {ranks[token]} already")
        except ValueError as error:  # binascii.Error is one
            raise UserError(f"vocabulary {name}, line {number}: {line[:80]!r} is not a new token in base64, "
                            f"a space and the next rank: {error}") from None
        ranks[token] = len(ranks)
    if len(ranks) > 0xFFFF:
        raise UserError(f"vocabulary {name} has {len(ranks)} ranks, more than 65535: token files are uint16 "
                        f"and {EOT_TEXT} takes one more id; keep its first 65535 lines")
    if missing := {bytes([byte]) for byte in range(256)} - set(ranks):
        raise UserError(f"vocabulary {name} lacks {len(missing)} of the 256 single bytes, first "
                        f"{min(missing)!r}; add a line for each, so that it encodes any text")
    return Tokenizer([*ranks], rank_file, name)


def rank_file(tokens: list[bytes]) -> bytes:
    """tiktoken's format: one line per token, in base64, with its rank."""
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


def byte_order() -> list[int]:
    """The 256 bytes as GPT-2 numbers them: those that Latin-1 prints first, the others after them."""
    printed = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    return printed + sorted(set(range(256)) - set(printed))


def load_tokenizer(source: str = "gpt2") -> Tokenizer:
    """Tokenizer for "gpt2" (downloaded if need be) or for the path of a rank file, which gives its name."""
    if source == "gpt2":
        return tokenizer_from_ranks(gpt2_rank_file(), "gpt2")
    path = Path(source)
    if not path.is_file():
        raise UserError(f"tokenizer={source}: no such file; type gpt2 or the path of a rank file")
    return tokenizer_from_ranks(read_text(path).encode(), path.stem)


def cache_file() -> Path:
    """Where tiktoken caches GPT-2's rank file, by its rule."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    name = hashlib.sha1(GPT2_URL.encode()).hexdigest()
    return Path(folder or Path(tempfile.gettempdir()) / "data-gym-cache") / name


def gpt2_rank_file() -> bytes:
    """GPT-2's rank file, sha256 checked, from tiktoken's cache or else downloaded to it. Raises UserError."""
    from tiktoken.load import read_file_cached  # here, as it takes a while

    try:
        data = read_file_cached(GPT2_URL, GPT2_SHA256)
        if hashlib.sha256(data).hexdigest() != GPT2_SHA256:  # tiktoken checks only what it caches
            raise ValueError("its sha256 is wrong")
        return data
    except (OSError, ValueError) as error:  # ValueError: wrong sha256
        raise UserError(f"GPT-2's vocabulary is not in the cache and cannot be downloaded from {GPT2_URL} "
                        f"({error}); put r50k_base.tiktoken (or Whisper's gpt2.tiktoken), sha256 "
                        f"{GPT2_SHA256}, at {cache_file()}, or type --tokenizer=FILE") from error


def say_compiling(kernel) -> None:
    """Print a note if a numba kernel is not cached yet: compiling it and those it calls takes a while."""
    line, version = kernel.py_func.__code__.co_firstlineno, "".join(map(str, sys.version_info[:2]))
    if not any(Path(kernel.stats.cache_path).glob(f"*.{kernel.__name__}-{line}.py{version}*.nbc")):
        print("compiling the tokenizer's kernels, once: about half a minute", file=sys.stderr, flush=True)


# ---- settings: override with a config file and/or --key=value -----------------
tokenizer: PathName = "gpt2"  # to check: gpt2, or the path of a rank file


def check(tokenizer: str) -> None:
    """Print where a vocabulary is and one encoded line, and compare its ids with tiktoken's."""
    say_compiling(encode_kernel)
    tok = load_tokenizer(tokenizer)
    probe = "Hello, world! It's 2024: na\u00efve caf\u00e9, \u6771\u4eac.\n\n    return <|endoftext|>"
    path = cache_file() if tokenizer == "gpt2" else Path(tokenizer).resolve()
    print(f"rank file   {path}, {len(tok.rank_file):,} bytes")
    print(f"sha256      {tok.sha256} ({'ok, GPT-2' if tok.sha256 == GPT2_SHA256 else 'not GPT-2'})")
    print(f"vocabulary  {tok.name}, {tok.n_vocab:,} ids, {EOT_TEXT} = {tok.eot}")
    ids = tok.encode(probe).tolist()
    print(f"probe       {probe!r} -> {ids}")
    assert ids == tok.to_tiktoken().encode_ordinary(probe), "these are not tiktoken's ids"
    assert tok.decode(ids) == probe, "the ids decode to another text"
    print("check       ids equal tiktoken's, and decode to the same text")


if __name__ == "__main__":
    configure(globals())
    check(tokenizer)
