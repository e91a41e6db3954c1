"""
GPT-2's byte-level BPE tokenizer: numba kernels over raw UTF-8 bytes, ids bit-identical to tiktoken's.

    python bpe.py                                  # fetch and check GPT-2's vocabulary
    python bpe.py --tokenizer=my_vocab.tiktoken    # check another rank file

Reads a rank file (tiktoken's format: one `base64 rank` per line); GPT-2's is taken from tiktoken's cache
folder, and put there when it is missing. Prints where it is, its sha256 and one encoded line. Takes a second,
about ten more the first time, which compiles the kernels (numba keeps them on disk).

GPT-2's pattern cuts text into pieces (" word", "'ll", "...", "   "), and the tokens of a piece depend on its
bytes alone. The kernels go through a document three times:

    1. classify: letter, number, space or other for each byte; mark_starts: a mark on each byte where a piece
       starts. Both do the same to every byte, whatever it is, so the compiler makes SIMD code of them.
    2. encode_kernel: from mark to mark, eight bytes a step. A piece of up to 16 bytes is looked up by its
       bytes, as two machine words, in a cache that holds its tokens.
    3. encode_piece, for what the cache lacks: one look-up in the vocabulary, or merging pairs, lowest rank
       first.

Arrays go to plain @njit functions, never through inline="always", which would count references per piece. In
the machine code of encode_kernel NRT_incref is called per call and per document. encode_piece, which calls
others, still counts its arrays (16 atomic additions), but only for what the cache lacks. forceinline=True is
LLVM's inlining, after numba's own passes, and costs no counting.
"""

import binascii
import hashlib
import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from numba import njit

from configurator import UserError, configure
from shards import write_atomically

EOT_TEXT = "<|endoftext|>"
# tiktoken's pattern of gpt2 and r50k_base; only to build the equivalent tiktoken.Encoding: the kernels
# have it by hand, in mark_starts and contraction.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
GPT2_CACHE_NAME = "0ea1e91bbb3a60f729a8dc8f777fd2fc07cd8df4"  # tiktoken's name for r50k_base in its cache
WHISPER_VERSION = "20250625"  # of openai-whisper, whose source distribution carries the same file
WHISPER_MEMBER = "whisper/assets/gpt2.tiktoken"
DOWNLOAD_SECONDS = 60  # limit per source; tiktoken itself has none

U = np.uint64  # numba makes float64 of int64 + uint64, so words and their constants are typed
ONES, HIGHS = U(0x0101010101010101), U(0x8080808080808080)
HASH_1, HASH_2 = U(0x9E3779B97F4A7C15), U(0xC2B2AE3D27D4EB4F)  # odd: 2**64 / golden ratio; a prime of xxHash

# What is known of a byte. Bits 0-1: the class of its character, [^\s\p{L}\p{N}], \p{L}, \p{N} or \s.
OTHER, LETTER, NUMBER, SPACE = 0, 1, 2, 3
CLASS = 3
BLANK = 4    # U+0020, the one space that the next piece takes along
WIDE = 8     # first byte of a character of several bytes
INSIDE = 16  # the rest of them
START = 128  # in `starts`: a piece starts at this byte

NO_MERGE = 1 << 16  # above every rank
SHORT_PIECE = 64    # bytes; up to here looking through all pairs beats a heap
CACHE_BITS = 17     # 2**17 slots, 4 MiB: 3.3% of the pieces of English miss, 2.1% of Python code's
CACHED_IDS = 7      # a slot is four words: 16 bytes of text; ids 0-3; ids 4-6, their number and the length
LONG_BITS = 10      # 2**10 slots of (where, length, where in ids, count)


# ---- words of eight bytes ------------------------------------------------------

@njit(cache=True, error_model="numpy")
def load_word(buffer, i):
    """buffer[i:i+8] as a little-endian uint64; one load, as an unsigned i needs no wrap-around."""
    i = U(i)
    return (U(buffer[i]) | U(buffer[i + U(1)]) << U(8) | U(buffer[i + U(2)]) << U(16)
            | U(buffer[i + U(3)]) << U(24) | U(buffer[i + U(4)]) << U(32) | U(buffer[i + U(5)]) << U(40)
            | U(buffer[i + U(6)]) << U(48) | U(buffer[i + U(7)]) << U(56))


@njit(cache=True, error_model="numpy")
def bytes_before_mark(word):
    """Bytes of `word` below its first START byte, 8 if there is none: 0x80 at byte k -> k."""
    below = ((word & -word) >> U(7)) - U(1)  # ones in bytes 0 to k-1
    return np.int64((below & ONES) * ONES >> U(56))  # the product's top byte is the sum of all bytes


# ---- where pieces start --------------------------------------------------------

@njit(cache=True, error_model="numpy")
def classify(text, kinds):
    """kinds[i] of each ASCII byte of text -> the bytes ORed together."""
    seen = np.uint8(0)
    for i in range(len(text)):
        byte = text[i]
        seen = np.uint8(seen | byte)  # without the casts numba takes int64, eight times as wide
        lower = np.uint8(byte | 0x20)
        kind = np.uint8(OTHER)
        kind = np.uint8(LETTER) if (lower >= ord("a")) & (lower <= ord("z")) else kind
        kind = np.uint8(NUMBER) if (byte >= ord("0")) & (byte <= ord("9")) else kind
        kind = np.uint8(SPACE) if (byte >= ord("\t")) & (byte <= ord("\r")) else kind
        kind = np.uint8(SPACE | BLANK) if byte == ord(" ") else kind
        kinds[i] = kind
    return seen


@njit(cache=True, error_model="numpy")
def classify_wide(text, classes, kinds):
    """kinds of the characters of several bytes -> how many are spaces; -1 if text is no UTF-8."""
    spaces = i = 0
    while i < len(text):
        if i + 8 <= len(text) and load_word(text, i) & HIGHS == U(0):
            i += 8
            continue
        lead = np.int64(text[i])
        if lead < 0x80:
            i += 1
            continue
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
        if i + size > len(text) or text[i + 1] < low or text[i + 1] > high:
            return -1
        for j in range(i + 1, i + size):
            if text[j] & 0xC0 != 0x80:
                return -1
            code = code << 6 | text[j] & 0x3F
        for j in range(i, i + size):
            kinds[j] = classes[code] | (WIDE if j == i else INSIDE)
        spaces += classes[code] == SPACE
        i += size
    return spaces


@njit(cache=True, error_model="numpy")
def mark_starts(kinds, n, starts):
    """starts[i] = START where a piece starts at byte i, else 0, for 0 < i < n; starts[n] = START.

    A piece is a run of one class, with the blank before it if there is one. A run of spaces leaves its last
    one to be a piece of its own, or the blank of the next (`\\s+(?!\\S)`), except at the end of the text.
    """
    kinds[n] = SPACE
    for i in range(1, n):  # bit 0 of each value is the answer; the others are noise, shifted out at the end
        kind, last, after = kinds[i], kinds[i - 1], kinds[i + 1]
        differs = kind ^ last
        change = differs | differs >> 1
        space, space_after = kind & kind >> 1, after & after >> 1
        starts[i] = ((change & (space | ~(last >> 2))) | (space & ~space_after)) << 7
    starts[n] = START


@njit(cache=True, error_model="numpy")
def mark_wide_spaces(kinds, n, starts):
    """Put mark_starts right for spaces of several bytes, where the next character is not at the next byte."""
    for i in range(n):
        if kinds[i] == SPACE | WIDE:
            after = i + 1
            while kinds[after] == SPACE | INSIDE:
                starts[after] = 0
                after += 1
            new = kinds[after] & CLASS != SPACE or (i > 0 and kinds[i - 1] & CLASS != SPACE)
            starts[i] = START if new else 0


@njit(cache=True, error_model="numpy")
def mark_pieces(text, classes, kinds, starts):
    """mark_starts for a whole document -> False if it is not UTF-8. kinds, starts: len(text) + 32 or more."""
    wide_spaces = classify_wide(text, classes, kinds) if classify(text, kinds) >= 0x80 else 0
    if wide_spaces < 0:
        return False
    mark_starts(kinds, len(text), starts)
    if wide_spaces > 0:
        mark_wide_spaces(kinds, len(text), starts)
    return True


@njit(cache=True, error_model="numpy")
def contraction(text, start, end):
    """Length of the 's 't 'm 'd 'll 've 're at text[start], 0 if there is none."""
    if start + 2 > end or text[start] != ord("'"):
        return 0
    first, second = text[start + 1], text[start + 2] if start + 2 < end else np.uint8(0)
    if first == ord("s") or first == ord("t") or first == ord("m") or first == ord("d"):
        return 2
    if first == ord("l") and second == ord("l"):
        return 3
    if (first == ord("v") or first == ord("r")) and second == ord("e"):
        return 3
    return 0


# ---- tokens of one piece -------------------------------------------------------

@njit(cache=True, error_model="numpy", forceinline=True)
def hash_bytes(text, start, stop):
    """uint64 hash, good in its high bits."""
    h = U(stop - start)
    for i in range(start, stop):
        h = (h ^ U(text[i])) * HASH_1
    return h


@njit(cache=True, error_model="numpy", forceinline=True)
def same_bytes(a, i, b, j, length):
    """a[i:i+length] == b[j:j+length]"""
    for k in range(length):
        if a[i + k] != b[j + k]:
            return False
    return True


@njit(cache=True, error_model="numpy")
def find_token(text, start, stop, vocab):
    """(id of the token text[start:stop] or -1, its slot); vocab as Tokenizer builds it."""
    slots, blob, edges = vocab
    slot = np.int64(hash_bytes(text, start, stop) >> U(32)) & len(slots) - 1
    while slots[slot] >= 0:
        token = slots[slot]
        length = edges[token + 1] - edges[token]
        if length == stop - start and same_bytes(text, start, blob, edges[token], length):
            return token, slot
        slot = slot + 1 & len(slots) - 1
    return np.int32(-1), slot


@njit(cache=True, error_model="numpy", forceinline=True)
def find_pair(left, right, pairs):
    """Rank (= id) of the token that left and right make, NO_MERGE if there is none."""
    key = U(left) << U(16) | U(right)
    slot = np.int64(key * HASH_1 >> U(32)) & len(pairs) - 1
    while pairs[slot] != U(0):
        if pairs[slot] >> U(16) == key:
            return np.int64(pairs[slot] & U(0xFFFF))
        slot = slot + 1 & len(pairs) - 1
    return NO_MERGE


@njit(cache=True, error_model="numpy")
def merge_short(ids, n, count, pairs, ranks):
    """Merge ids[n:n+count] in place, lowest rank first, leftmost first -> count left."""
    for i in range(count - 1):
        ranks[i] = find_pair(ids[n + i], ids[n + i + 1], pairs)
    while count > 1:
        best = 0
        for i in range(1, count - 1):
            if ranks[i] < ranks[best]:
                best = i
        if ranks[best] == NO_MERGE:
            break
        ids[n + best] = ranks[best]
        count -= 1
        for i in range(best + 1, count):
            ids[n + i] = ids[n + i + 1]
            ranks[i - 1] = ranks[i]
        if best > 0:
            ranks[best - 1] = find_pair(ids[n + best - 1], ids[n + best], pairs)
        if best < count - 1:
            ranks[best] = find_pair(ids[n + best], ids[n + best + 1], pairs)
    return count


@njit(cache=True, error_model="numpy")
def heap_push(heap, size, key):
    """Put key on the binary heap heap[:size], smallest first -> new size."""
    i = size
    while i > 0 and heap[(i - 1) >> 1] > key:
        heap[i] = heap[(i - 1) >> 1]
        i = (i - 1) >> 1
    heap[i] = key
    return size + 1


@njit(cache=True, error_model="numpy")
def heap_pop(heap, size):
    """Take the smallest key off heap[:size] -> new size."""
    size -= 1
    key = heap[size]
    i, child = 0, 1
    while child < size:
        if child + 1 < size and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= key:
            break
        heap[i] = heap[child]
        i, child = child, 2 * child + 1
    heap[i] = key
    return size


@njit(cache=True, error_model="numpy")
def merge_long(ids, n, count, pairs):
    """merge_short in O(count log count): a linked list of parts and a heap of (rank, position)."""
    heap = np.empty(2 * count, np.int64)  # each merge takes one off and puts at most two on
    rank = np.empty(count, np.int64)  # of the part at i with the next; a heap entry that differs is old
    after = np.empty(count, np.int64)
    before = np.empty(count, np.int64)
    size = 0
    for i in range(count):
        after[i], before[i] = i + 1, i - 1
        rank[i] = NO_MERGE if i == count - 1 else find_pair(ids[n + i], ids[n + i + 1], pairs)
        if rank[i] != NO_MERGE:
            size = heap_push(heap, size, rank[i] << 40 | i)
    while size > 0:
        i = heap[0] & ((1 << 40) - 1)
        merged = heap[0] >> 40
        size = heap_pop(heap, size)
        if rank[i] != merged:
            continue
        ids[n + i] = merged
        gone = after[i]
        rank[gone] = NO_MERGE
        after[i] = after[gone]
        if after[i] < count:
            before[after[i]] = i
            rank[i] = find_pair(merged, ids[n + after[i]], pairs)
            if rank[i] != NO_MERGE:
                size = heap_push(heap, size, rank[i] << 40 | i)
        else:
            rank[i] = NO_MERGE
        j = before[i]
        if j >= 0:
            rank[j] = find_pair(ids[n + j], merged, pairs)
            if rank[j] != NO_MERGE:
                size = heap_push(heap, size, rank[j] << 40 | j)
    left = 0
    i = 0
    while i < count:
        ids[n + left] = ids[n + i]
        left += 1
        i = after[i]
    return left


@njit(cache=True, error_model="numpy")
def encode_piece(text, start, stop, vocab, byte_ids, pairs, ranks, ids, n):
    """Write the tokens of the piece text[start:stop] to ids[n:], where one per byte fits -> their number."""
    token, _ = find_token(text, start, stop, vocab)
    if token >= 0:
        ids[n] = token
        return 1
    for i in range(stop - start):
        ids[n + i] = byte_ids[text[start + i]]
    if stop - start <= SHORT_PIECE:
        return merge_short(ids, n, stop - start, pairs, ranks)
    return merge_long(ids, n, stop - start, pairs)


@njit(cache=True, error_model="numpy")
def encode_long(text, start, stop, vocab, byte_ids, pairs, ranks, longs, ids, n):
    """encode_piece, copying from `ids` where a piece of the same bytes (deep indentation) came before."""
    slot = np.int64(hash_bytes(text, start, stop) >> U(64 - LONG_BITS)) * 4
    before, length, tokens, count = longs[slot], longs[slot + 1], longs[slot + 2], longs[slot + 3]
    if length == stop - start and same_bytes(text, before, text, start, length):
        for i in range(count):
            ids[n + i] = ids[tokens + i]
        return count
    count = encode_piece(text, start, stop, vocab, byte_ids, pairs, ranks, ids, n)
    longs[slot], longs[slot + 1], longs[slot + 2], longs[slot + 3] = start, stop - start, n, count
    return count


# ---- the cache of pieces -------------------------------------------------------

@njit(cache=True, error_model="numpy")
def last_words(text, pos, length):
    """The 1 to 16 bytes at text[pos] as two words, byte by byte: no word fits before the text's end."""
    head = tail = U(0)
    for i in range(min(length, 8)):
        head |= U(text[pos + i]) << U(8 * i)
    for i in range(8, length):
        tail |= U(text[pos + i]) << U(8 * i - 64)
    return head, tail


@njit(cache=True, error_model="numpy")
def remember(cache, slot, head, tail, length, ids, n, count):
    """Fill a slot: the piece's words, its first four ids; then the others, their number and its length."""
    first, rest = U(0), U(length) << U(56) | U(count) << U(48)
    for i in range(min(count, 4)):
        first |= U(ids[n + i]) << U(16 * i)
    for i in range(4, count):
        rest |= U(ids[n + i]) << U(16 * i - 64)
    cache[slot], cache[slot + U(1)], cache[slot + U(2)], cache[slot + U(3)] = head, tail, first, rest


# ---- documents -----------------------------------------------------------------

@njit(cache=True, error_model="numpy")
def encode_kernel(text, offsets, eot, classes, vocab, byte_ids, pairs, cache, ranks, kinds, starts,
                  ids, id_offsets):
    """Tokens of all documents -> -1, or the first document that is not UTF-8 (then nothing else is of use).

    text uint8; offsets int64 (n_docs + 1,), checked before; kinds, starts uint8, longest document + 32;
    ids uint16, len(text) + n_docs + 8; id_offsets int64 (n_docs + 1,), to be filled; tables as in Tokenizer.
    """
    longs = np.zeros(4 << LONG_BITS, np.int64)
    n = 0
    for doc in range(len(offsets) - 1):
        begin, end = offsets[doc], offsets[doc + 1]
        if not mark_pieces(text[begin:end], classes, kinds, starts):
            return doc
        id_offsets[doc] = n
        ids[n] = eot
        n += 1
        pos = begin
        while pos < end:
            # Length of the piece: 1 to 8 by one word of marks, 9 to 16 by two.
            length = 1 + bytes_before_mark(load_word(starts, pos - begin + 1))
            if length > 8:
                length += bytes_before_mark(load_word(starts, pos - begin + 9))
            if text[pos] == ord("'"):
                length = contraction(text, pos, end) or length
            if length > 16:
                while starts[pos - begin + length] == 0:
                    length += 1
                n += encode_long(text, pos, pos + length, vocab, byte_ids, pairs, ranks, longs, ids, n)
                pos += length
                continue
            if pos + 16 <= len(text):
                head, tail = load_word(text, pos), load_word(text, pos + 8)
            else:
                head, tail = last_words(text, pos, length)
            if length <= 8:
                head, tail = head & ~U(0) >> U(64 - 8 * length), U(0)
            else:
                tail &= ~U(0) >> U(128 - 8 * length)
            slot = ((head ^ tail * HASH_2) * HASH_1 >> U(64 - CACHE_BITS)) << U(2)
            first, rest = cache[slot + U(2)], cache[slot + U(3)]
            if cache[slot] == head and cache[slot + U(1)] == tail and rest >> U(56) == U(length):
                k = U(n)
                ids[k] = first  # four at once: one store; what is too many is overwritten by the next piece
                ids[k + U(1)] = first >> U(16)
                ids[k + U(2)] = first >> U(32)
                ids[k + U(3)] = first >> U(48)
                count = np.int64(rest >> U(48) & U(0xFF))
                if count > 4:
                    ids[k + U(4)] = rest
                    ids[k + U(5)] = rest >> U(16)
                    ids[k + U(6)] = rest >> U(32)
            else:
                count = encode_piece(text, pos, pos + length, vocab, byte_ids, pairs, ranks, ids, n)
                if count <= CACHED_IDS:
                    remember(cache, slot, head, tail, length, ids, n, count)
            n += count
            pos += length
    id_offsets[len(offsets) - 1] = n
    return -1


# ---- tables --------------------------------------------------------------------

@njit(cache=True, error_model="numpy")
def fill_vocab(vocab):
    """Enter every token into the slots -> the first whose bytes were there already, or -1."""
    slots, blob, edges = vocab
    for token in range(len(edges) - 1):
        same, slot = find_token(blob, edges[token], edges[token + 1], vocab)
        if same >= 0:
            return token
        slots[slot] = token
    return -1


@njit(cache=True, error_model="numpy")
def token_pairs(vocab):
    """Every left + right = merged of tokens, as uint64 left << 32 | right << 16 | merged.

    All ways to cut a token, not only the one its training took: tiktoken asks whether two neighbours joined
    are a token, whatever they came from.
    """
    _, blob, edges = vocab
    entries = np.empty(len(blob), np.uint64)
    n = 0
    for token in range(len(edges) - 1):
        for middle in range(edges[token] + 1, edges[token + 1]):
            left, _ = find_token(blob, edges[token], middle, vocab)
            if left >= 0:
                right, _ = find_token(blob, middle, edges[token + 1], vocab)
                if right >= 0:
                    entries[n] = U(left) << U(32) | U(right) << U(16) | U(token)
                    n += 1
    return entries[:n].copy()


@njit(cache=True, error_model="numpy")
def fill_pairs(entries, pairs):
    """Enter token_pairs' entries into the empty table `pairs` of find_pair."""
    for entry in entries:
        slot = np.int64((entry >> U(16)) * HASH_1 >> U(32)) & len(pairs) - 1
        while pairs[slot] != U(0):
            slot = slot + 1 & len(pairs) - 1
        pairs[slot] = entry


def unicode_classes() -> np.ndarray:
    """uint8 (0x110000,): OTHER, LETTER, NUMBER or SPACE for each code point, by tiktoken's own regex engine.

    An Encoding whose pattern is one class and whose tokens are single bytes drops all other characters, so
    encoding a text of every code point gives the members of the class. Raises UserError for tiktoken < 0.13.
    """
    import tiktoken  # here, so that importing this module stays cheap

    version = importlib.metadata.version("tiktoken")
    if tuple(int(part) for part in version.split(".")[:2]) < (0, 13):  # before: quadratic on long runs
        raise UserError(f"tiktoken {version} is installed, wanted 0.13 or later: pip install -U tiktoken")
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


def table_size(entries: int) -> int:
    """Slots of an open-addressing table for so many entries: a power of two, at most half full."""
    return 1 << max(2 * entries - 1, 1).bit_length()


class Tokenizer:
    """A byte-level BPE vocabulary with GPT-2's pattern. Build it with load_tokenizer or tokenizer_from_ranks.

    name, n_vocab, eot (the last id), sha256 (hex, of the rank file) and rank_file (its bytes) describe it. It
    pickles as its rank file. Kernels hold the GIL, so threads may share one.
    """

    def __init__(self, tokens: list[bytes], rank_file: bytes, name: str):
        self.name = name
        self.eot = len(tokens)
        self.n_vocab = len(tokens) + 1
        self.sha256 = hashlib.sha256(rank_file).hexdigest()
        self.rank_file = rank_file
        self.tokens = [*tokens, EOT_TEXT.encode()]  # by id
        lengths = np.array([len(token) for token in tokens], np.int64)
        # int32 slots of ids, -1 where free; uint8 all tokens end to end; int64 (n + 1,) where each begins
        edges = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        slots = np.full(table_size(len(tokens)), -1, np.int32)
        vocab = slots, np.frombuffer(b"".join(tokens), np.uint8), edges
        twice = fill_vocab(vocab)
        if twice >= 0:
            raise UserError(f"vocabulary {name}: the token {tokens[twice]!r} of rank {twice} has a lower "
                            f"rank too, wanted each token once; remove one of the two lines and renumber")
        byte_ids = np.zeros(256, np.uint16)
        for token in np.flatnonzero(lengths == 1):
            byte_ids[tokens[token][0]] = token
        entries = token_pairs(vocab)
        pairs = np.zeros(table_size(len(entries)), np.uint64)
        fill_pairs(entries, pairs)
        cache, ranks = np.zeros(4 << CACHE_BITS, np.uint64), np.zeros(SHORT_PIECE, np.int64)
        # Plain tuples: numba's disk cache would pickle a NamedTuple by its module, which is __main__ when
        # this file runs as a script, and then fail to load where it is imported.
        self._tables = unicode_classes(), vocab, byte_ids, pairs, cache, ranks

    def __reduce__(self):
        return tokenizer_from_ranks, (self.rank_file, self.name)

    def encode_documents(self, text: np.ndarray, offsets: np.ndarray,
                         errors: str = "replace") -> tuple[np.ndarray, np.ndarray]:
        """Documents text[offsets[i]:offsets[i+1]] -> (ids uint16, id_offsets int64 (n_docs + 1,)).

        text is a uint8 array of UTF-8 (an Arrow buffer as it is), offsets has n_docs + 1 integers. Document i
        is ids[id_offsets[i]:id_offsets[i+1]]: the end-of-text id, then its tokens. What is not UTF-8 becomes
        U+FFFD as in bytes.decode("utf-8", errors="replace"), document by document: a character cut by an
        offset is invalid on both sides. Raises ValueError for other types, and for offsets that fall or lie
        outside the text.
        """
        text, offsets = np.ascontiguousarray(text), np.asarray(offsets)
        if text.dtype != np.uint8 or text.ndim != 1:
            raise ValueError(f"text is {text.dtype} {text.shape}, wanted uint8 (n,): try np.frombuffer")
        if offsets.ndim != 1 or len(offsets) == 0 or offsets.dtype.kind not in "iu":
            raise ValueError(f"offsets are {offsets.dtype} {offsets.shape}, wanted integers (n_docs + 1,)")
        offsets = offsets.astype(np.int64)
        sizes = np.diff(offsets)
        if offsets.min() < 0 or offsets.max() > len(text) or sizes.min(initial=0) < 0:
            raise ValueError(f"offsets lie in {offsets.min()} to {offsets.max()}, smallest step "
                             f"{sizes.min(initial=0)}; wanted them to rise within the {len(text)} bytes")
        id_offsets = np.empty(len(offsets), np.int64)
        ids = self._encode(text, offsets, id_offsets)
        if ids is None:  # rare: go through Python's decoder, which sets the rule for what is not UTF-8
            documents = [text[offsets[i]:offsets[i + 1]].tobytes() for i in range(len(sizes))]
            documents = [document.decode("utf-8", errors).encode() for document in documents]
            offsets = np.cumsum([0] + [len(document) for document in documents])
            ids = self._encode(np.frombuffer(b"".join(documents), np.uint8), offsets, id_offsets)
            assert ids is not None, "Python wrote UTF-8 that classify_wide refuses"
        return ids, id_offsets

    def _encode(self, text: np.ndarray, offsets: np.ndarray, id_offsets: np.ndarray) -> np.ndarray | None:
        """encode_documents for checked arguments; fills id_offsets; None if a document is not valid UTF-8."""
        text = text.view()
        text.flags.writeable = False  # Arrow's buffers are; one type, one compiled kernel
        longest = int(np.diff(offsets).max(initial=0))
        kinds, starts = np.empty(longest + 32, np.uint8), np.empty(longest + 32, np.uint8)
        ids = np.empty(len(text) + len(offsets) + 8, np.uint16)  # memory that is never written is never taken
        if encode_kernel(text, offsets, self.eot, *self._tables, kinds, starts, ids, id_offsets) >= 0:
            return None
        ids.resize(id_offsets[-1], refcheck=False)
        return ids

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
                raise ValueError(f"id {i} is not in vocabulary {self.name}, wanted 0 to {self.n_vocab - 1}")
        return b"".join([self.tokens[i] for i in ids])

    def decode(self, ids) -> str:
        """Text of the ids; what is not UTF-8 (a character whose tokens are not all there) becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self) -> np.ndarray:
        """int64 (n_vocab,): bytes of text per id, 0 for end-of-text; what bits per byte divide by."""
        return np.append(np.diff(self._tables[1][2]), 0)

    def to_tiktoken(self):
        """The tiktoken.Encoding of the same ranks, pattern and end-of-text id."""
        import tiktoken

        ranks = {token: rank for rank, token in enumerate(self.tokens[:-1])}
        return tiktoken.Encoding(self.name, pat_str=PATTERN, mergeable_ranks=ranks,
                                 special_tokens={EOT_TEXT: self.eot})


# ---- vocabulary files ----------------------------------------------------------

def tokenizer_from_ranks(rank_file: bytes, name: str) -> Tokenizer:
    """Tokenizer of a rank file's bytes. Raises UserError that names the line, byte or rank at fault."""
    tokens = {}
    for number, line in enumerate(rank_file.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            encoded, rank = line.split()
            token, rank = binascii.a2b_base64(encoded, strict_mode=True), int(rank)
        except ValueError as error:  # binascii.Error is one
            raise UserError(f"vocabulary {name}, line {number}: got {line[:80]!r} ({error}), "
                            f"wanted a token in base64, a space and its rank") from None
        if rank in tokens:
            raise UserError(f"vocabulary {name}, line {number}: rank {rank} occurs twice, wanted each once")
        tokens[rank] = token
    if len(tokens) > 0xFFFF:
        raise UserError(f"vocabulary {name} has {len(tokens)} ranks, wanted at most 65535: token files "
                        f"are uint16 and {EOT_TEXT} takes one more id; keep its first 65535 lines")
    missing = next((rank for rank in range(len(tokens)) if rank not in tokens), None)
    if missing is not None:
        raise UserError(f"vocabulary {name} has no rank {missing}, wanted 0 to {len(tokens) - 1}")
    lost = sorted(set(range(256)) - {token[0] for token in tokens.values() if len(token) == 1})
    if lost:
        raise UserError(f"vocabulary {name} lacks {len(lost)} of the 256 single bytes, first "
                        f"{bytes(lost[:1])!r}; wanted all, to encode any text: add a line for each")
    return Tokenizer([tokens[rank] for rank in range(len(tokens))], rank_file, name)


def load_tokenizer(source: str = "gpt2") -> Tokenizer:
    """Tokenizer for "gpt2" (fetched if need be) or for the path of a rank file, which gives it its name."""
    if source == "gpt2":
        return tokenizer_from_ranks(gpt2_rank_file(), "gpt2")
    path = Path(source)
    if not path.is_file():
        raise UserError(f"tokenizer={source}: no such file; wanted gpt2 or the path of a rank file")
    return tokenizer_from_ranks(path.read_bytes(), path.stem)


def cache_file() -> Path | None:
    """Where tiktoken caches GPT-2's rank file, by its rule; None where the variable is empty: no cache."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    if folder is None:
        folder = Path(tempfile.gettempdir()) / "data-gym-cache"
    return Path(folder) / GPT2_CACHE_NAME if folder != "" else None


def gpt2_rank_file() -> bytes:
    """GPT-2's rank file, sha256 checked: tiktoken's cache, tiktoken's download or the package openai-whisper.

    What was fetched is put into the cache by rename, so several processes may do it at once. Raises UserError
    with the reason why each source failed.
    """
    failures = []
    for source, read in (("tiktoken's cache", read_cached), ("tiktoken's download", fetch_with_tiktoken),
                         (f"openai-whisper {WHISPER_VERSION} by pip", fetch_with_pip)):
        try:
            data = read()
        except (OSError, tarfile.TarError, KeyError) as error:
            failures.append(f"{source}: {error}")
            continue
        digest = hashlib.sha256(data).hexdigest()
        if digest == GPT2_SHA256:
            break
        failures.append(f"{source}: damaged, its sha256 is {digest}")
        print(f"bpe.py: {failures[-1]}; not used, trying the next source", file=sys.stderr)
    else:
        path = cache_file() or Path(tempfile.gettempdir()) / "data-gym-cache" / GPT2_CACHE_NAME
        raise UserError("\n    ".join(["GPT-2's vocabulary could not be had:", *failures]) + "\n"
                        f"Put r50k_base.tiktoken (or Whisper's gpt2.tiktoken), sha256 {GPT2_SHA256}, at\n"
                        f"    {path}\nor name it with --tokenizer=FILE, and run this again.")
    if read is not read_cached and cache_file() is not None:
        try:
            cache_file().parent.mkdir(parents=True, exist_ok=True)
            write_atomically(cache_file(), data)
        except (OSError, UserError) as error:  # the vocabulary is here; the next start will fetch it again
            print(f"bpe.py: could not keep GPT-2's vocabulary in the cache: {error}", file=sys.stderr)
    return data


def read_cached() -> bytes:
    """The cached file. Raises OSError if there is none."""
    if cache_file() is None:
        raise OSError("switched off by an empty TIKTOKEN_CACHE_DIR or DATA_GYM_CACHE_DIR")
    return cache_file().read_bytes()


def fetch_with_tiktoken() -> bytes:
    """r50k_base by tiktoken, as a rank file; in a process of its own, for tiktoken has no timeout."""
    code = ("import base64, tiktoken_ext.openai_public as t\n"
            "for token, rank in sorted(t.r50k_base()['mergeable_ranks'].items(), key=lambda item: item[1]):\n"
            "    print(base64.b64encode(token).decode(), rank)")
    return run_python(["-c", code], TIKTOKEN_CACHE_DIR="").replace(b"\r\n", b"\n")


def fetch_with_pip() -> bytes:
    """The file out of openai-whisper's source distribution, downloaded but neither unpacked nor installed."""
    with tempfile.TemporaryDirectory() as folder:
        run_python(["-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--retries=1",
                    "--timeout=15", "--no-deps", "--no-binary=openai-whisper", f"--dest={folder}",
                    f"openai-whisper=={WHISPER_VERSION}"])
        archive, = Path(folder).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            member = next(name for name in tar.getnames() if name.endswith(WHISPER_MEMBER))
            return tar.extractfile(member).read()


def run_python(arguments: list[str], **environment: str) -> bytes:
    """Output of this Python with the arguments. Raises OSError: its last line of errors, or the limit."""
    # Files, not pipes: a grandchild (pip builds in one) that lives on would hold a pipe open past the limit.
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        try:
            done = subprocess.run([sys.executable, *arguments], stdin=subprocess.DEVNULL, stdout=output,
                                  stderr=errors, env=os.environ | environment, timeout=DOWNLOAD_SECONDS)
        except subprocess.TimeoutExpired:
            raise OSError(f"no answer within {DOWNLOAD_SECONDS} seconds") from None
        output.seek(0)
        errors.seek(0)
        if done.returncode != 0:
            lines = errors.read().decode(errors="replace").strip().splitlines()
            raise OSError(lines[-1].strip() if lines else f"exit code {done.returncode}")
        return output.read()


tokenizer = "gpt2"  # gpt2, or the path of a rank file in tiktoken's format: one `base64 rank` per line

if __name__ == "__main__":
    configure(globals())
    encoder = load_tokenizer(tokenizer)
    probe = "Hello, world! It's 2024: na\u00efve caf\u00e9, \u6771\u4eac.\n\n    return <|endoftext|>"
    probe_ids = encoder.encode(probe)
    path = cache_file() if tokenizer == "gpt2" else Path(tokenizer).resolve()
    print(f"rank file   {path or 'not kept, the cache is switched off'}, {len(encoder.rank_file):,} bytes")
    print(f"sha256      {encoder.sha256} ({'ok, GPT-2' if encoder.sha256 == GPT2_SHA256 else 'not GPT-2'})")
    print(f"vocabulary  {encoder.name}, {encoder.n_vocab:,} ids, {EOT_TEXT} = {encoder.eot}")
    print(f"probe       {probe!r} -> {probe_ids.tolist()}")
    assert probe_ids.tolist() == encoder.to_tiktoken().encode_ordinary(probe), "these are not tiktoken's ids"
    assert encoder.decode(probe_ids) == probe, "the ids decode to another text"
    print("check       ids equal tiktoken's, and decode to the same text")
