"""
GPT-2's byte-level BPE tokenizer: numba kernels over raw UTF-8 bytes, ids bit-identical to tiktoken's.

    python bpe.py                                  # fetch and check GPT-2's vocabulary
    python bpe.py --tokenizer=my_vocab.tiktoken    # check another rank file
    python bpe.py --input=books/,more.jsonl.gz --vocab_size=32768 --out=my_vocab.tiktoken    # train one
    python bpe.py --dataset=python --vocab_size=4096 --out=python4k.tiktoken    # on the embedded corpus

Reads a rank file (tiktoken's format: one `base64 rank` per line); GPT-2's is taken from tiktoken's cache
folder, and put there when it is missing. Prints where it is, its sha256 and one encoded line. Takes a second,
about ten more the first time, which compiles the kernels (numba keeps them on disk).

With --input or --dataset=python, as in fineweb.py, it trains a vocabulary and writes it to --out, a new file:
one rank less than --vocab_size, as <|endoftext|> is the last id and has no line. First come the 256 bytes,
in the order of GPT-2's file, then the merges. 70 MB take two seconds; memory grows with the different pieces
only.

GPT-2's pattern cuts text into pieces (" word", "'ll", "...", "   "), and the tokens of a piece depend on its
bytes alone. The kernels take a document in blocks and go through each block three times:

    1. classify: letter, number, space or other for each byte; mark_starts: a mark on each byte where a piece
       starts; mark_block packs them into bits. All do the same to every byte, whatever it is, so the
       compiler makes SIMD code of them: 2% of the time on Python code, less than a tenth on English.
    2. encode_kernel: from mark to mark, one shift and one count of zeros a step. A piece of up to 16 bytes is
       looked up by its bytes, as two machine words, in a cache that holds its tokens. That is larger than
       the processor's, so each slot is asked for AHEAD pieces before it is needed.
    3. encode_piece, for what the cache lacks: one look-up in the vocabulary, or merging pairs, lowest rank
       first.

Arrays go to plain @njit functions, never through inline="always", which would count references per piece. In
the machine code of encode_kernel NRT_incref is called per call and per document. encode_piece, which calls
others, still counts its arrays (atomic additions), but only for what the cache lacks. forceinline=True is
LLVM's inlining, after numba's own passes, and costs no counting.
"""

import binascii
import functools
import hashlib
import importlib.metadata
import itertools
import os
import shlex
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from configurator import Between, PathName, UserError, configure, read_text
from files import write_atomically

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
BLOCK = 1 << 14     # bytes marked at a time
CACHE_BITS = 18     # 2**18 slots, 8 MiB: in text never seen, 1.9% of the pieces of English miss, 2.8% of code
SLOT_IDS = 7        # a slot is four words: 16 bytes of text; ids 0-3; ids 4-6, their number and the length
AHEAD = 32          # pieces read before the one that is encoded, a power of two; 32 to 128 are equally fast
LONG_BITS = 10      # 2**10 slots of (where, length, where in ids, count)

INLINE_BYTES = 16   # of a piece that count_piece keeps in its slot
GAP = U(0xFFFF)     # no id: 65,536 ids leave the ranks 0 to 65,534
GAP_ID = 0xFFFF
MAX_DISTINCT = 1 << 29  # bytes of different pieces to train on: 36 bytes of memory each, numbered by int32


# ---- words of eight bytes ------------------------------------------------------

@njit(cache=True, error_model="numpy")
def load_word(buffer, i):
    """buffer[i:i+8] as a little-endian uint64; one load, as an unsigned i needs no wrap-around."""
    i = U(i)
    return (U(buffer[i]) | U(buffer[i + U(1)]) << U(8) | U(buffer[i + U(2)]) << U(16)
            | U(buffer[i + U(3)]) << U(24) | U(buffer[i + U(4)]) << U(32) | U(buffer[i + U(5)]) << U(40)
            | U(buffer[i + U(6)]) << U(48) | U(buffer[i + U(7)]) << U(56))


@njit(cache=True, error_model="numpy")
def trailing_zeros(word):
    """Zero bits of the uint64 below its lowest one, 64 if there is none. LLVM makes one instruction of it."""
    below = ~word & word - U(1)  # ones where those zeros are; the rest counts ones
    below -= below >> U(1) & U(0x5555555555555555)
    below = (below & U(0x3333333333333333)) + (below >> U(2) & U(0x3333333333333333))
    return np.int64((below + (below >> U(4)) & U(0x0F0F0F0F0F0F0F0F)) * ONES >> U(56))


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
        if i + 8 <= len(text):
            wide = load_word(text, i) & HIGHS
            if wide == U(0):
                i += 8
                continue
            i += trailing_zeros(wide) >> 3
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
def mark_block(text, start, stop, classes, kinds, starts):
    """Mark the pieces of the first block of text[start:stop], as bits -> its bytes, -1 if it is not UTF-8.

    Bit i of `starts` is 1 where a piece starts at text[start + i], for i > 0 up to the block's end, which is
    such a place. Blocks are small, for their marks to stay in the processor's cache, unless a piece is long.
    """
    size = BLOCK
    while True:
        n = min(size, stop - start)
        for _ in range(3):  # whole characters; four bytes of this kind in a row are no UTF-8
            if start + n < stop and text[start + n] & 0xC0 == 0x80:
                n -= 1
        if not mark_pieces(text[start:start + n], classes, kinds, starts):
            return -1
        done = n
        if start + n < stop:  # mark_starts takes what follows for space, which hides a mark but makes none
            done -= 1
            while done > 0 and starts[done] == 0:
                done -= 1
        if done > 0:
            break
        size *= 2
    for i in range(n // 8 + 1):  # the product's top byte has the lowest bit of each byte
        starts[i] = (load_word(starts, 8 * i) >> U(7) & ONES) * U(0x0102040810204080) >> U(56)
    return done


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


@njit(cache=True, error_model="numpy", forceinline=True)
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


@njit(cache=True, error_model="numpy", forceinline=True)
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


@intrinsic
def prefetch(typing_context, array, i):
    """Ask the processor for the memory of array[i] without waiting for it; LLVM's llvm.prefetch."""
    def generate(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        place = builder.gep(data, [arguments[1]])
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [place.type, number, number, number])
        ask = builder.module.declare_intrinsic("llvm.prefetch", [place.type], kind)
        builder.call(ask, [place, number(0), number(3), number(1)])  # to read; near; data, not code
        return context.get_dummy_value()
    return types.void(array, i), generate


@njit(cache=True, error_model="numpy", forceinline=True)
def read_piece(text, pos, begin, end, starts):
    """(length, head, tail, slot) of the piece at text[pos]; begin: of the block that `starts` marks.

    head and tail are its bytes as two words, zeros after them, and slot is where the cache has it; for a
    piece longer than 16 bytes they are those of its first 16.
    """
    after = U(pos - begin + 1)
    marks = load_word(starts, after >> U(3)) >> (after & U(7))
    while marks == U(0):  # 57 or more bytes without one
        after += U(56)
        marks = load_word(starts, after >> U(3)) >> (after & U(7))
    length = np.int64(after) + trailing_zeros(marks) - (pos - begin)
    if text[pos] == ord("'"):
        length = contraction(text, pos, end) or length
    known = min(length, 16)
    if pos + 16 <= len(text):
        head, tail = load_word(text, pos), load_word(text, pos + 8)
    else:
        head, tail = last_words(text, pos, known)
    head &= ~U(0) >> U(64 - 8 * min(known, 8))  # no branches: lengths are hard to predict
    tail = tail & ~U(0) >> U(128 - 8 * known) if known > 8 else U(0)
    return length, head, tail, ((head ^ tail * HASH_2) * HASH_1 >> U(64 - CACHE_BITS)) << U(2)


@njit(cache=True, error_model="numpy")
def remember(cache, slot, head, tail, length, ids, n, count):
    """Fill a slot with a piece and its tokens ids[n:n+count]; what follows these is copied, and never used.

    More than SLOT_IDS, as of deep indentation, go on in the other slot of the same line of the processor's
    cache, which then is no piece's: its length is 0. Whoever needs that slot takes this one out.
    """
    other = slot ^ U(4)
    if count > SLOT_IDS or cache[other + U(3)] >> U(48) & U(0xFF) > U(SLOT_IDS):
        cache[other + U(3)] = U(0)
    cache[slot], cache[slot + U(1)], cache[slot + U(2)] = head, tail, load_ids(ids, n)
    cache[slot + U(3)] = load_ids(ids, n + 4) & ~U(0) >> U(16) | U(count) << U(48) | U(length) << U(56)
    if count > SLOT_IDS:
        for i in range(3):
            cache[other + U(i)] = load_ids(ids, n + SLOT_IDS + 4 * i)


# ---- documents -----------------------------------------------------------------

@njit(cache=True, error_model="numpy")
def encode_kernel(text, offsets, eot, classes, vocab, byte_ids, pairs, cache, ranks, kinds, starts,
                  ids, id_offsets):
    """Tokens of all documents -> -1, or the first document that is not UTF-8 (then nothing else is of use).

    text uint8; offsets int64 (n_docs + 1,), checked before; kinds, starts uint8, longest document + 32;
    ids uint16, len(text) + n_docs + 16; id_offsets int64 (n_docs + 1,), to be filled; tables as in Tokenizer.
    """
    longs = np.zeros(4 << LONG_BITS, np.int64)
    ring = np.empty(4 * AHEAD, np.uint64)  # length, head, tail and slot of the pieces read ahead
    n = 0
    for doc in range(len(offsets) - 1):
        pos, end = offsets[doc], offsets[doc + 1]
        id_offsets[doc] = n
        ids[n] = eot
        n += 1
        while pos < end:
            begin = ahead = pos
            done = mark_block(text, begin, end, classes, kinds, starts)
            if done < 0:
                return doc
            filled = used = 0  # words of `ring`, since the block's begin
            while pos < begin + done:
                while ahead < begin + done and filled < used + len(ring):
                    length, head, tail, slot = read_piece(text, ahead, begin, end, starts)
                    prefetch(cache, slot)  # not loaded yet: the pieces before may change it
                    i = U(filled & len(ring) - 1)
                    ring[i], ring[i + U(1)], ring[i + U(2)], ring[i + U(3)] = U(length), head, tail, slot
                    filled += 4
                    ahead += length
                i = U(used & len(ring) - 1)
                length, head, tail, slot = np.int64(ring[i]), ring[i + U(1)], ring[i + U(2)], ring[i + U(3)]
                used += 4
                if length > 16:
                    n += encode_long(text, pos, pos + length, vocab, byte_ids, pairs, ranks, longs, ids, n)
                    pos += length
                    continue
                first, rest = cache[slot + U(2)], cache[slot + U(3)]
                if cache[slot] == head and cache[slot + U(1)] == tail and rest >> U(56) == U(length):
                    # Eight ids whatever their number: the next piece overwrites what is too many.
                    store_ids(ids, n, first)
                    store_ids(ids, n + 4, rest)
                    count = np.int64(rest >> U(48) & U(0xFF))
                    if count > SLOT_IDS:
                        for k in range(3):
                            store_ids(ids, n + SLOT_IDS + 4 * k, cache[(slot ^ U(4)) + U(k)])
                else:
                    count = encode_piece(text, pos, pos + length, vocab, byte_ids, pairs, ranks, ids, n)
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


def check_documents(text: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(text, contiguous; offsets, int64) as kernels take them. Raises ValueError for what they cannot."""
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
    return text, offsets


def replace_invalid(text: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(text, offsets) of the documents with U+FFFD for what is not UTF-8, by Python's decoder."""
    documents = [text[start:stop].tobytes() for start, stop in itertools.pairwise(offsets)]
    documents = [document.decode("utf-8", errors="replace").encode() for document in documents]
    offsets = np.cumsum([0] + [len(document) for document in documents])
    return np.frombuffer(b"".join(documents), np.uint8), offsets


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
        self._vocab = slots, np.frombuffer(b"".join(tokens), np.uint8), edges
        twice = fill_vocab(self._vocab)
        if twice >= 0:
            raise UserError(f"vocabulary {name}: the token {tokens[twice]!r} of rank {twice} has a lower "
                            f"rank too, wanted each token once; remove one of the two lines and renumber")

    @functools.cached_property
    def _tables(self) -> tuple:
        """What encode_kernel looks up; made when it is first needed, as it takes longer than the rest."""
        byte_ids = np.zeros(256, np.uint16)
        for token, text in enumerate(self.tokens[:-1]):
            if len(text) == 1:
                byte_ids[text[0]] = token
        entries = token_pairs(self._vocab)
        pairs = np.zeros(table_size(len(entries)), np.uint64)
        fill_pairs(entries, pairs)
        cache, ranks = np.zeros((4 << CACHE_BITS) + 8, np.uint64), np.zeros(SHORT_PIECE, np.int64)
        cache = cache[-cache.ctypes.data % 64 // 8:][:4 << CACHE_BITS]  # two slots to a line of 64 bytes
        # Plain tuples: numba's disk cache would pickle a NamedTuple by its module, which is __main__ when
        # this file runs as a script, and then fail to load where it is imported.
        return unicode_classes(), self._vocab, byte_ids, pairs, cache, ranks

    def __reduce__(self):
        return tokenizer_from_ranks, (self.rank_file, self.name)

    def encode_documents(self, text: np.ndarray, offsets: np.ndarray,
                         errors: str = "replace") -> tuple[np.ndarray, np.ndarray]:
        """Documents text[offsets[i]:offsets[i+1]] -> (ids uint16, id_offsets int64 (n_docs + 1,)).

        text is a uint8 array of UTF-8 (an Arrow buffer as it is), offsets has n_docs + 1 integers. Document i
        is ids[id_offsets[i]:id_offsets[i+1]]: the end-of-text id, then its tokens. A character cut by an
        offset is invalid UTF-8 on both sides. errors="replace" makes U+FFFD of what is not UTF-8, as
        bytes.decode does, document by document; errors="strict" raises bytes.decode's UnicodeDecodeError for
        the first such document, whose index is in its message and its attribute `document`. Raises ValueError
        for other types or errors, and for offsets that fall or lie outside the text.
        """
        if errors not in ("replace", "strict"):
            raise ValueError(f"errors={errors!r}, wanted replace or strict")
        text, offsets = check_documents(text, offsets)
        id_offsets = np.empty(len(offsets), np.int64)
        ids, invalid = self._encode(text, offsets, id_offsets)
        if invalid >= 0 and errors == "strict":
            try:
                text[offsets[invalid]:offsets[invalid + 1]].tobytes().decode()
            except UnicodeDecodeError as error:
                error.document = invalid
                error.reason += f", in document {invalid}"
                raise
        if invalid >= 0:  # rare: go through Python's decoder, which sets the rule for what is not UTF-8
            ids, invalid = self._encode(*replace_invalid(text, offsets), id_offsets)
        assert invalid < 0, "Python takes for UTF-8 what classify_wide refuses"
        return ids, id_offsets

    def _encode(self, text: np.ndarray, offsets: np.ndarray,
                id_offsets: np.ndarray) -> tuple[np.ndarray, int]:
        """(ids, -1) of encode_documents for checked arguments, and fills id_offsets; or (no ids, the first
        document that is not UTF-8)."""
        text = text.view()
        text.flags.writeable = False  # Arrow's buffers are; one type, one compiled kernel
        longest = int(np.diff(offsets).max(initial=0))
        kinds, starts = np.empty(longest + 32, np.uint8), np.empty(longest + 32, np.uint8)
        ids = np.empty(len(text) + len(offsets) + 16, np.uint16)  # memory never written is never taken
        invalid = encode_kernel(text, offsets, self.eot, *self._tables, kinds, starts, ids, id_offsets)
        ids.resize(0 if invalid >= 0 else id_offsets[-1], refcheck=False)
        return ids, invalid

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
        return np.append(np.diff(self._vocab[2]), 0)

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
    return tokenizer_from_ranks(read_text(path).encode(), path.stem)


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


# ---- training: how often each piece occurs -------------------------------------

@njit(cache=True, error_model="numpy")
def first_bytes(head, tail, length):
    """The first 1 to 16 bytes of two words, zeros after them."""
    if length <= 8:
        return head & ~U(0) >> U(64 - 8 * length), U(0)
    return head, tail & ~U(0) >> U(128 - 8 * length)


@njit(cache=True, error_model="numpy")
def bytes_before_mark(word):
    """Bytes of `word` below its first START byte, 8 if there is none: 0x80 at byte k -> k."""
    return trailing_zeros(word) >> 3


@njit(cache=True, error_model="numpy")
def count_slot(head, tail, slots):
    """Where to look for a piece first: its words, or its hash and 0, stand in four words of `slots`."""
    return ((head ^ tail * HASH_2) * HASH_1 >> U(32) & U((len(slots) >> 2) - 1)) << U(2)


@njit(cache=True, error_model="numpy")
def count_piece(text, pos, length, times, slots, longs, edges, used):
    """Count the piece text[pos:pos+length] `times` times -> False, and nothing done, if a table is full.

    A slot is four words: the 1 to 16 bytes of the piece in two, its length and its count. For more bytes the
    first is their hash and the second is k, where longs[edges[k]:edges[k+1]] are the bytes. used: slots, ks,
    bytes of all pieces.
    """
    long = length > INLINE_BYTES
    if long:
        head, tail = hash_bytes(text, pos, pos + length), U(0)
    else:
        head, tail = last_words(text, pos, length)
    at = count_slot(head, tail, slots)
    while slots[at | U(2)] != U(0):
        if slots[at] == head and slots[at | U(2)] == U(length) and (
                same_bytes(text, pos, longs, edges[slots[at | U(1)]], length) if long
                else slots[at | U(1)] == tail):
            slots[at | U(3)] += U(times)
            return True
        at = at + U(4) & U(len(slots) - 1)
    if (used[0] + 1) * 8 > len(slots):
        return False
    if long:
        k = used[1]
        if k + 2 > len(edges) or edges[k] + length > len(longs):
            return False
        for i in range(length):
            longs[edges[k] + i] = text[pos + i]
        edges[k + 1] = edges[k] + length
        tail = U(k)
        used[1] += 1
    slots[at], slots[at | U(1)], slots[at | U(2)], slots[at | U(3)] = head, tail, U(length), U(times)
    used[0] += 1
    used[2] += length
    return True


@njit(cache=True, error_model="numpy")
def count_document(text, pos, begin, end, starts, slots, longs, edges, used):
    """Count the pieces of a marked document from text[pos] on -> (end, 0), or (where, length) of a piece for
    which a table was full."""
    while pos < end:
        length = 1 + bytes_before_mark(load_word(starts, pos - begin + 1))
        if length > 8:
            length += bytes_before_mark(load_word(starts, pos - begin + 9))
        if text[pos] == ord("'"):
            length = contraction(text, pos, end) or length
        if length <= INLINE_BYTES and pos + 16 <= len(text):
            head, tail = first_bytes(load_word(text, pos), load_word(text, pos + 8), length)
            at = count_slot(head, tail, slots)
            if slots[at] == head and slots[at | U(1)] == tail and slots[at | U(2)] == U(length):
                slots[at | U(3)] += U(1)
                pos += length
                continue
        elif length > INLINE_BYTES:
            while starts[pos - begin + length] == 0:
                length += 1
        if not count_piece(text, pos, length, 1, slots, longs, edges, used):
            return pos, length
        pos += length
    return pos, 0


@njit(cache=True, error_model="numpy")
def grow_counts(slots, longs, edges, used, length):
    """(slots, longs, edges) with room for one more piece of `length` bytes."""
    if (used[0] + 1) * 8 > len(slots):
        old, slots = slots, np.zeros(2 * len(slots), np.uint64)
        for i in range(0, len(old), 4):
            if old[i + 2] != U(0):
                tail = old[i + 1] if old[i + 2] <= U(INLINE_BYTES) else U(0)
                at = count_slot(old[i], tail, slots)
                while slots[at | U(2)] != U(0):
                    at = at + U(4) & U(len(slots) - 1)
                for k in range(4):
                    slots[at | U(k)] = old[i + k]
    if used[1] + 2 > len(edges):
        more = np.empty(2 * len(edges), np.int64)
        more[:len(edges)] = edges
        edges = more
    if edges[used[1]] + length > len(longs):
        room = np.empty(2 * len(longs) + length, np.uint8)
        room[:len(longs)] = longs
        longs = room
    return slots, longs, edges


@njit(cache=True, error_model="numpy", nogil=True)
def count_kernel(text, offsets, classes, kinds, starts, slots, longs, edges, used):
    """Count the pieces of documents -> (documents counted, slots, longs, edges); less than all: no UTF-8.

    text uint8; offsets int64 (n_docs + 1,); kinds, starts uint8, longest document + 32.
    """
    for doc in range(len(offsets) - 1):
        begin, end = offsets[doc], offsets[doc + 1]
        if not mark_pieces(text[begin:end], classes, kinds, starts):
            return doc, slots, longs, edges
        pos, length = count_document(text, begin, begin, end, starts, slots, longs, edges, used)
        while pos < end:
            slots, longs, edges = grow_counts(slots, longs, edges, used, length)
            pos, length = count_document(text, pos, begin, end, starts, slots, longs, edges, used)
    return len(offsets) - 1, slots, longs, edges


@njit(cache=True, error_model="numpy")
def add_kernel(text, offsets, counts, slots, longs, edges, used):
    """Count piece text[offsets[i]:offsets[i+1]] counts[i] times -> (slots, longs, edges)."""
    for i in range(len(counts)):
        pos, length = offsets[i], offsets[i + 1] - offsets[i]
        if not count_piece(text, pos, length, counts[i], slots, longs, edges, used):
            slots, longs, edges = grow_counts(slots, longs, edges, used, length)
            count_piece(text, pos, length, counts[i], slots, longs, edges, used)
    return slots, longs, edges


@njit(cache=True, error_model="numpy")
def list_kernel(slots, longs, edges, text, offsets, counts):
    """Write the pieces end to end to text, where each begins to offsets, how often it occurs to counts."""
    n = 0
    offsets[0] = 0
    for i in range(0, len(slots), 4):
        length = np.int64(slots[i + 2])
        if length == 0:
            continue
        pos = offsets[n]
        if length > INLINE_BYTES:
            k = edges[slots[i + 1]]
            for j in range(length):
                text[pos + j] = longs[k + j]
        else:
            for j in range(length):
                text[pos + j] = slots[i + (j >> 3)] >> U(8 * (j & 7))
        counts[n] = slots[i + 3]
        n += 1
        offsets[n] = pos + length


class PieceCounts(NamedTuple):
    """N different pieces of a text, in no particular order, and how often each occurs in it."""
    text: np.ndarray     # uint8 (n,): the pieces end to end
    offsets: np.ndarray  # int64 (N + 1,): piece i is text[offsets[i]:offsets[i + 1]]
    counts: np.ndarray   # int64 (N,)


class PieceCounter:
    """Counts the pieces of documents in tables that grow with the different ones, 64 to 128 bytes for each.

    One thread at a time; threads with a counter each add theirs up in the end. classes: unicode_classes().
    """

    def __init__(self, classes: np.ndarray):
        self.classes = classes
        self.bytes = 0  # of the documents so far
        self._tables = np.zeros(4 << 14, np.uint64), np.empty(1 << 14, np.uint8), np.zeros(1 << 10, np.int64)
        self._used = np.zeros(3, np.int64)

    def count(self, text: np.ndarray, offsets: np.ndarray) -> None:
        """Count the pieces of documents text[offsets[i]:offsets[i + 1]], uint8 (n,) and int64 (n_docs + 1,).

        What is not UTF-8 counts as U+FFFD, and ValueError is raised, as in Tokenizer.encode_documents. Raises
        UserError when the different pieces get too many to train on.
        """
        text, offsets = check_documents(text, offsets)
        self.bytes += int(offsets[-1] - offsets[0])
        done = self._count(text, offsets)
        if done < len(offsets) - 1:
            text, offsets = replace_invalid(text, offsets[done:])
            done = self._count(text, offsets)
            assert done == len(offsets) - 1, "Python wrote UTF-8 that classify_wide refuses"
        if self._used[2] > MAX_DISTINCT:
            raise too_many(int(self._used[2]))

    def _count(self, text: np.ndarray, offsets: np.ndarray) -> int:
        """Count documents up to the first that is not UTF-8 -> how many."""
        text = text.view()
        text.flags.writeable = False  # Arrow's buffers are; one type, one compiled kernel
        longest = int(np.diff(offsets).max(initial=0))
        kinds, starts = np.empty(longest + 32, np.uint8), np.empty(longest + 32, np.uint8)
        done, *self._tables = count_kernel(text, offsets, self.classes, kinds, starts, *self._tables,
                                           self._used)
        return done

    def add(self, pieces: PieceCounts) -> None:
        """Add counts of another counter."""
        self._tables = add_kernel(*pieces, *self._tables, self._used)

    def pieces(self) -> PieceCounts:
        """The counts so far."""
        slots, longs, edges = self._tables
        n, size = int(self._used[0]), int(self._used[2])
        pieces = PieceCounts(np.empty(size, np.uint8), np.empty(n + 1, np.int64), np.empty(n, np.int64))
        list_kernel(slots, longs, edges, *pieces)
        return pieces


# ---- training: merges ----------------------------------------------------------

@njit(cache=True, error_model="numpy")
def lay_out(text, offsets, counts, byte_ids, cells):
    """Spread pieces over cells, as train_kernel wants them."""
    cells[0] = GAP
    n = 1
    for i in range(len(counts)):
        for k in range(offsets[i], offsets[i + 1]):
            cells[n] = U(counts[i]) << U(16) | U(byte_ids[text[k]])
            n += 1
        cells[n] = GAP
        n += 1


@njit(cache=True, error_model="numpy", forceinline=True)
def id_at(cells, i):
    """The id of the token that begins or ends at byte i, GAP_ID between pieces."""
    return np.int64(cells[i] & GAP)


@njit(cache=True, error_model="numpy", forceinline=True)
def pair_slot(key, slots):
    """The slot that holds the pair left << 16 | right, or the free one where it goes."""
    mask = U(len(slots) - 1)
    slot = U(key) * HASH_1 >> U(32) & mask
    while slots[slot] != U(0) and slots[slot] >> U(32) != U(key):
        slot = slot + U(1) & mask
    return slot


@njit(cache=True, error_model="numpy", forceinline=True)
def pair_at(slot, slots):
    """Where the four fields of the pair in a slot are: key, count, first and last entry."""
    return 4 * (np.int64(slots[slot] & U(0xFFFFFFFF)) - 1)


@njit(cache=True, error_model="numpy", forceinline=True)
def add_pair(left, right, times, pos, slots, pairs, where, after, used):
    """Count a pair that begins at cells[pos]. used: pairs, entries of `where`."""
    key = left << 16 | right
    slot = pair_slot(key, slots)
    if slots[slot] == U(0):
        pair = 4 * used[0]
        used[0] += 1
        slots[slot] = U(key) << U(32) | U(used[0])
        pairs[pair], pairs[pair + 1], pairs[pair + 2] = key, 0, -1
    else:
        pair = pair_at(slot, slots)
    entry = used[1]
    used[1] += 1
    where[entry], after[entry] = pos, -1
    if pairs[pair + 2] < 0:
        pairs[pair + 2] = entry
    else:
        after[pairs[pair + 3]] = entry
    pairs[pair + 1] += times
    pairs[pair + 3] = entry


@njit(cache=True, error_model="numpy", forceinline=True)
def drop_pair(left, right, times, slots, pairs):
    """Take a pair off its count; its entry stays, and is found out of date when it is used."""
    pairs[pair_at(pair_slot(left << 16 | right, slots), slots) + 1] -= times


@njit(cache=True, error_model="numpy")
def count_pairs(cells, slots, pairs, where, after, used):
    """Enter all pairs of bytes; at most 65,536, for which slots and pairs have room."""
    for i in range(1, len(cells) - 1):
        left, right = id_at(cells, i), id_at(cells, i + 1)
        if left != GAP_ID and right != GAP_ID:
            add_pair(left, right, np.int64(cells[i] >> U(16)), i, slots, pairs, where, after, used)


@njit(cache=True, error_model="numpy")
def merge_pair(pair, merged, lengths, cells, slots, pairs, where, after, used):
    """Make `merged` of every left, right in cells, from left to right, and keep the counts of all pairs.

    The entries of a pair are in order: all are made in one go, either at the start or while its later token
    is merged, and from left to right.
    """
    left, right = pairs[pair] >> 16, pairs[pair] & 0xFFFF
    size, both = lengths[left], lengths[left] + lengths[right]
    entry = pairs[pair + 2]
    while entry >= 0:
        i = np.int64(where[entry])
        entry = after[entry]
        if id_at(cells, i) != left or id_at(cells, i + size) != right:
            continue  # one of them has become part of a longer token
        times, last, coming = np.int64(cells[i] >> U(16)), id_at(cells, i - 1), id_at(cells, i + both)
        if last != GAP_ID:
            drop_pair(last, left, times, slots, pairs)
            add_pair(last, merged, times, i - lengths[last], slots, pairs, where, after, used)
        if coming != GAP_ID:
            drop_pair(right, coming, times, slots, pairs)
            add_pair(merged, coming, times, i, slots, pairs, where, after, used)
        cells[i + size] = GAP  # so that entries of this place are seen to be old
        cells[i] = cells[i + both - 1] = U(times) << U(16) | U(merged)
    pairs[pair + 1] = 0  # so far less only by those that overlapped one before, as in aaa


@njit(cache=True, error_model="numpy", forceinline=True)
def heap_key(count, pair):
    """int64, smallest for the highest count and then the smallest pair; counts from 2**31 on are equal."""
    return -min(count, (1 << 31) - 1) << 32 | pair


@njit(cache=True, error_model="numpy")
def grow_pairs(slots, pairs, wanted):
    """(slots, pairs) with room for `wanted` pairs, at most twice as many as now."""
    n = len(pairs) >> 2
    if wanted <= n:
        return slots, pairs
    room, table = np.empty(8 * n, np.int64), np.zeros(2 * len(slots), np.uint64)
    room[:4 * n] = pairs
    for slot in slots:
        if slot != U(0):
            table[pair_slot(slot >> U(32), table)] = slot
    return table, room


@njit(cache=True, error_model="numpy")
def train_kernel(cells, n_ranks, lengths, merges, slots, pairs, where, after):
    """Make tokens 256 to n_ranks - 1 -> the ranks there are: fewer where no pair is left.

    cells, uint64: count << 16 | id at the first and at the last byte of each token of each piece, and GAP
    before, between and after pieces; what is inside tokens is not used. lengths, int64 (n_ranks,), of tokens
    in bytes: 1 for the first 256. merges, int64 (n_ranks,), is filled with left << 16 | right. slots: key <<
    32 | number, from 1, of each pair, whose fields are at pair_at in `pairs`; its entries are the places in
    `where` at which it begins, linked by `after`.
    """
    used = np.zeros(2, np.int64)
    count_pairs(cells, slots, pairs, where, after, used)
    heap = np.empty(len(pairs) >> 2, np.int64)
    size = least = 0  # the heap holds the pairs that occur `least` times or more
    for n in range(256, n_ranks):
        while True:
            if size == 0:
                most = 0
                for pair in range(0, 4 * used[0], 4):
                    most = max(most, pairs[pair + 1])
                if most == 0:
                    return n
                least = most + 1 >> 1
                for pair in range(0, 4 * used[0], 4):
                    if pairs[pair + 1] >= least:
                        size = heap_push(heap, size, heap_key(pairs[pair + 1], pairs[pair]))
            best = heap[0]
            size = heap_pop(heap, size)
            key = best & 0xFFFFFFFF
            pair = pair_at(pair_slot(key, slots), slots)
            current = heap_key(pairs[pair + 1], key)
            if current == best:
                break
            if pairs[pair + 1] >= least:  # it has lost some since
                size = heap_push(heap, size, current)
        merges[n], lengths[n] = key, lengths[key >> 16] + lengths[key & 0xFFFF]
        old = used[0]
        slots, pairs = grow_pairs(slots, pairs, old + 2 * n)  # each new pair has the new token on one side
        if len(heap) < len(pairs) >> 2:
            more = np.empty(len(pairs) >> 2, np.int64)
            more[:size] = heap[:size]
            heap = more
        merge_pair(pair, n, lengths, cells, slots, pairs, where, after, used)
        for pair in range(4 * old, 4 * used[0], 4):
            if pairs[pair + 1] >= least:
                size = heap_push(heap, size, heap_key(pairs[pair + 1], pairs[pair]))
    return n_ranks


def too_many(size: int) -> UserError:
    """The error for pieces of `size` bytes in all."""
    return UserError(f"got {size:,} bytes of pieces that differ from each other, wanted at most "
                     f"{MAX_DISTINCT:,} to train on; give a part of the text to --input")


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def count_pieces(parts: Iterable[Callable], num_workers: int = 0) -> tuple[PieceCounts, int]:
    """(pieces of all documents, bytes of text) by num_workers threads, 0 = one per core, in any order.

    parts: functions that return an iterable of (text uint8, offsets int64), some megabytes of documents; a
    thread that is free calls the next. Threads, not processes: counting and reading parquet hold no GIL, and
    a process takes longer to start than 100 MB take to be counted.
    """
    num_workers = num_workers or available_cores()
    classes = unicode_classes()
    parts, lock, stop = iter(parts), threading.Lock(), threading.Event()

    def work() -> PieceCounter:
        counter = PieceCounter(classes)
        while not stop.is_set():
            with lock:
                part = next(parts, None)
            if part is None:
                break
            for text, offsets in part():
                counter.count(text, offsets)
        return counter

    with ThreadPoolExecutor(num_workers) as pool:
        futures = [pool.submit(work) for _ in range(num_workers)]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()  # after an error or Ctrl-C the others need not read on
    first, *others = (future.result() for future in futures)
    for other in others:
        first.add(other.pieces())
    return first.pieces(), first.bytes + sum(other.bytes for other in others)


def byte_order() -> list[int]:
    """The 256 bytes as GPT-2 numbers them: those that Latin-1 prints first, the others after them."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return printed + sorted(set(range(256)) - set(printed))


def check_vocab_size(vocab_size: int) -> None:
    if not 257 <= vocab_size <= 1 << 16:
        raise UserError(f"got vocab_size={vocab_size}, wanted 257 (the bytes and {EOT_TEXT}) to 65,536 (ids "
                        f"are uint16); type --vocab_size=32768, say")


def train_ranks(pieces: PieceCounts, vocab_size: int) -> list[bytes]:
    """The vocab_size - 1 tokens of a byte-level BPE (Sennrich et al. 2016) by rank; EOT is the last id.

    The first 256 are the bytes in GPT-2's order. Then the pair of neighbours that occurs most often is
    merged, of several the one with the smallest (left id, right id), again and again, as Hugging Face's
    BpeTrainer does. No two merges give the same bytes: until a merge crosses their ends, equal bytes are cut
    alike wherever they stand, so that the first merge makes a token of them all. The order of the pieces does
    not matter. Raises UserError for a vocab_size outside 257 to 65,536, and if every piece is one token
    before it is reached.
    """
    check_vocab_size(vocab_size)
    if len(pieces.text) > MAX_DISTINCT:
        raise too_many(len(pieces.text))
    n_ranks, size = vocab_size - 1, len(pieces.text)
    order = byte_order()
    byte_ids = np.empty(256, np.uint16)
    byte_ids[order] = np.arange(256)
    cells = np.empty(size + len(pieces.counts) + 1, np.uint64)
    lay_out(*pieces, byte_ids, cells)
    lengths, merges = np.ones(n_ranks, np.int64), np.zeros(n_ranks, np.int64)
    # Each merge ends two pairs and begins two, and there are fewer merges than bytes.
    where, after = np.empty(3 * size, np.int32), np.empty(3 * size, np.int32)
    # Room for the pairs of bytes and those of one merge, 2 * 65,536; from there on it doubles.
    slots, pairs = np.zeros(1 << 19, np.uint64), np.empty(4 << 18, np.int64)
    n = train_kernel(cells, n_ranks, lengths, merges, slots, pairs, where, after)
    if n < n_ranks:
        raise UserError(f"got a text whose every piece is one token after {n - 256:,} merges, wanted "
                        f"{n_ranks - 256:,} for vocab_size={vocab_size}; give more text to --input, or type "
                        f"--vocab_size={n + 1}")
    tokens = [bytes([byte]) for byte in order]
    for merge in merges[256:].tolist():
        tokens.append(tokens[merge >> 16] + tokens[merge & 0xFFFF])
    return tokens


def rank_file(tokens: list[bytes]) -> bytes:
    """tiktoken's format: one line per token, in base64, with its rank."""
    return b"".join(binascii.b2a_base64(token, newline=False) + b" %d\n" % rank
                    for rank, token in enumerate(tokens))


def read_parts(dataset: str, input: str, text_column: str) -> Iterator[Callable]:
    """The embedded corpus or the files of --input, as count_pieces takes them. Raises UserError for nulls and
    damaged files."""
    from documents import input_source, python_source  # here: it imports this file

    def read(chunk) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for documents in chunk.read(*chunk.args):
            for place, reason in documents.bad:
                raise UserError(f"{place}: {reason}; mend or remove it, and run this again")
            yield documents.text, documents.offsets

    source = python_source(0) if dataset else input_source(input, text_column)  # in any order: it counts
    for _, _, chunk in source.chunks():
        yield functools.partial(read, chunk)


def train(dataset: str, input: str, text_column: str, vocab_size: int, out: str, num_workers: int) -> None:
    """Train a vocabulary on --dataset or --input and write it to `out`; the arguments are the settings."""
    from tqdm import tqdm

    began, path = time.perf_counter(), Path(out)
    if dataset not in ("", "python"):
        raise UserError(f"got --dataset={dataset}, wanted python, the embedded corpus; fetch others with "
                        f"fineweb.py, and give the text itself: --input=PATH[,PATH...]")
    if dataset and input:
        raise UserError(f"got --dataset={dataset} and --input={input}, wanted one text; leave out one of "
                        f"them")
    if not (dataset or input) or not out:
        raise UserError(f"got --input={input} --out={out}, wanted the text to train on and a name for the "
                        f"rank file; type --input=PATH[,PATH...] or --dataset=python, and --out=my.tiktoken")
    if path.exists():
        raise UserError(f"got --out={out}, which exists; wanted a new name: type another, or remove {out}")
    if not path.parent.is_dir():
        raise UserError(f"got --out={out}, wanted a name in a folder that exists; make {path.parent}, or "
                        f"type another --out=...")
    parts = tqdm(read_parts(dataset, input, text_column), unit=" parts", leave=False, disable=None)
    pieces, text_bytes = count_pieces(parts, num_workers)
    counted = time.perf_counter()
    if not text_bytes:
        raise UserError("got a corpus without text, wanted some; check --input and --text_column")
    print(f"text        {text_bytes:,} bytes, {pieces.counts.sum():,} pieces, {len(pieces.counts):,} of them "
          f"different, counted in {counted - began:.1f} s")
    data = rank_file(train_ranks(pieces, vocab_size))
    trained = time.perf_counter()
    write_atomically(path, data)
    tok = load_tokenizer(out)
    _, id_offsets = tok.encode_documents(pieces.text, pieces.offsets)
    tokens = int((np.diff(id_offsets) - 1) @ pieces.counts)
    print(f"vocabulary  {tok.n_vocab:,} ids: 256 bytes, {tok.n_vocab - 257:,} merges in "
          f"{trained - counted:.1f} s, {EOT_TEXT} = {tok.eot}")
    print(f"rank file   {path}, {len(data):,} bytes, sha256 {tok.sha256}")
    print(f"this text   {tokens:,} tokens, {text_bytes / tokens:.3f} bytes per token")
    text = f"--dataset={dataset}" if dataset else f"--input={shlex.quote(input)}"
    print(f"next: python fineweb.py {text} --tokenizer={shlex.quote(out)} "
          f"--data_dir={shlex.quote(path.stem + '_data')}")


# ---- settings: override with a config file and/or --key=value -----------------
tokenizer: PathName = "gpt2"  # to check: gpt2, or the path of a rank file
input: PathName = ""  # to train on: PATH[,PATH...], as in fineweb.py
dataset = ""  # or python: the embedded corpus, the source of the Python installation itself
text_column = "text"  # the parquet column or jsonl field that holds the text
vocab_size: Between(257, 65_536) = 32_768  # ids of the new vocabulary: 256 bytes, merges, <|endoftext|>
out: PathName = ""  # the new rank file
num_workers: Between(0, 1024) = 0  # threads that count; 0 = one per core


def check(tokenizer: str) -> None:
    """Print where a vocabulary is and one encoded line, and compare its ids with tiktoken's."""
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


if __name__ == "__main__":
    configure(globals())
    if dataset or input or out:
        train(dataset, input, text_column, vocab_size, out, num_workers)
    else:
        check(tokenizer)
