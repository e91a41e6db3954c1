"""
The tokenizer against tiktoken and against a slow twin in plain Python.

    python -m pytest tests/test_bpe.py

Reads the corpora under GPT2_SHARED_DATA where that is set, and GPT-2's vocabulary, else
bootstrapped.
"""

import base64
import hashlib
import importlib
import importlib.metadata
import itertools
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bpe
from bpe import load_tokenizer, tokenizer_from_ranks
from configurator import UserError

REPO = Path(__file__).parent.parent
DATA = Path(os.environ["GPT2_SHARED_DATA"]) if "GPT2_SHARED_DATA" in os.environ else None
# Where it is set and a file is missing, that is a failure.
needs_data = pytest.mark.skipif(DATA is None, reason="GPT2_SHARED_DATA is not set")

# How many members each class has and the sha256 of them (UTF-8, by code point) in tiktoken 0.14.0. A
# release that changes a class changes the tokens of texts that hold its characters.
CLASSES = {
    bpe.LETTER: (141028, "8192a1dcc0cae66ef7888a27dc546e3c758d994435fa88302acf52cb50e66292"),
    bpe.NUMBER: (1911, "08fc258c1e391e3d68efae939d8a1cc3cc7bc91c6290006133415a192b9b2a55"),
    bpe.SPACE: (25, "c15308e40d85febdfed0e22e587f8319ce6609a2a09b062ca7238df2a065fafd"),
}

# A vocabulary of 256 bytes and 14 more tokens. Merging pairs never makes "xyz", only looking up whole pieces.
SMALL_MERGES = [b"ab", b"bc", b"cd", b"abcd", b" a", b"aa", b"aaaa", b"\xc3\xa9", b"  ", b"th", b"he", b"the",
                b"xyz", b"'s"]
SMALL_RANK_FILE = b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in
                           enumerate([bytes([byte]) for byte in reversed(range(256))] + SMALL_MERGES))

gpt2 = load_tokenizer("gpt2" if DATA is None else str(DATA / "tokenizer" / "gpt2.tiktoken"))
small = tokenizer_from_ranks(SMALL_RANK_FILE, "small")
TIKTOKEN = {tokenizer: tokenizer.to_tiktoken() for tokenizer in (gpt2, small)}

ALPHABETS = [
    st.characters(),  # any, lone surrogates included
    st.sampled_from(" \t\n\r\x0b\x0c\x1c\x85\xa0\u2003\u3000a1.'"),  # spaces of one, two and three bytes
    st.sampled_from("'\u2019sStTmdlvre aZ1\n"),  # contractions, and what only looks like them
    st.sampled_from("0123456789٣²½Ⅷ ,.xé"),  # numbers
    st.sampled_from("abcdeth é\x00_-\u0301\U0001f600東"),
]
texts = st.one_of([st.text(alphabet, max_size=80) for alphabet in ALPHABETS])


def pack(documents: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Documents -> (text, offsets) as encode_documents wants them."""
    offsets = np.cumsum([0, *map(len, documents)])
    return np.frombuffer(b"".join(documents), np.uint8), offsets


def check(tokenizer, text: str):
    """The ids are tiktoken's and decode to the text."""
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint16
    assert ids.tolist() == TIKTOKEN[tokenizer].encode_ordinary(text)
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # as tiktoken does
    assert tokenizer.decode(ids) == whole


def check_documents(tokenizer, documents: list[bytes]):
    """Each document is the end-of-text id and tiktoken's ids, or else the error is Python's for the first."""
    for i, document in enumerate(documents):
        try:
            document.decode()
        except UnicodeDecodeError as error:
            with pytest.raises(UnicodeDecodeError, match=rf"{error.reason}, in document {i}$") as raised:
                tokenizer.encode_documents(*pack(documents))
            assert (raised.value.start, raised.value.object) == (error.start, document)
            return
    ids, id_offsets = tokenizer.encode_documents(*pack(documents))
    assert ids.dtype == np.uint16 and id_offsets.dtype == np.int64
    expected = [[tokenizer.eot, *TIKTOKEN[tokenizer].encode_ordinary(doc.decode())] for doc in documents]
    assert id_offsets.tolist() == np.cumsum([0, *map(len, expected)]).tolist()
    assert ids.tolist() == list(itertools.chain.from_iterable(expected))


def slow_twin(tokens: list[bytes], text: str) -> list[int]:
    """Ids of ASCII text by GPT-2's original pattern and textbook merging, in plain Python."""
    import re

    pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+"
    ranks = {token: rank for rank, token in enumerate(tokens)}
    ids = []
    for piece in re.findall(pattern, text, re.ASCII):
        parts = [piece.encode()] if piece.encode() in ranks else [bytes([byte]) for byte in piece.encode()]
        while len(parts) > 1:
            rank, i = min((ranks.get(parts[i] + parts[i + 1], 1 << 20), i) for i in range(len(parts) - 1))
            if rank == 1 << 20:
                break
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[part] for part in parts]
    return ids


# ---- ids -----------------------------------------------------------------------

@pytest.mark.parametrize("text", [
    "xyz", "1xyz xyz(xyz)", "", " ", "  ", "\n", "a", "'", "''", "it's 'twas I'll they're we've I'm he'd",
    "IT'S don'T", "'S'LL'Ve",
    "a'sb 's ''s '' s'", "'l 'v 'r 'le 'lll", "x  y   z\n\n  w \t\n", "end  ", "end\n", "12 345  6 7a8", " 1",
    "<|endoftext|>", "a<|endoftext|>b <|endoftext|>", "é ñ 東京 ½ ٣٤", "\u00a0a\u00a0\u00a0b \u00a0",
    "a \u3000b", "\u3000\u3000", "\x00", "a\x00", "a\x00\x00 \x00b", "\ud800", "a\ud83d\ude00b\udc00",
    "👩‍👩‍👧", "e\u0301 \u0301",
])  # fmt: skip
def test_chosen_texts(text):
    check(gpt2, text)
    check(small, text)


@settings(max_examples=2000, deadline=None)
@given(texts)
def test_any_text(text):
    check(gpt2, text)
    check(small, text)


@settings(max_examples=500, deadline=None)
@given(st.lists(texts, max_size=6))
def test_any_documents(documents):
    check_documents(gpt2, [document.encode("utf-8", "replace") for document in documents])


@settings(max_examples=500, deadline=None)
@given(st.text(st.sampled_from("abcdethxyzAZ019 '.,_-\t\n\x00slmrv"), max_size=120))
def test_slow_twin(text):
    assert small.encode(text).tolist() == slow_twin(small.tokens[:-1], text)
    assert gpt2.encode(text).tolist() == slow_twin(gpt2.tokens[:-1], text)


@pytest.mark.parametrize("before, after",
                         [("", ""), ("a", "b"), (" ", ""), (" ", " "), ("1", "\n"), ("  ", "!")])
def test_every_code_point(before, after):
    documents = [before + chr(code) + after for code in range(0x110000) if not 0xD800 <= code <= 0xDFFF]
    text = "\n".join(documents)  # as one text: tiktoken takes a minute for a million calls
    assert gpt2.encode(text).tolist() == TIKTOKEN[gpt2].encode_ordinary(text)


def test_every_code_point_alone():
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code <= 0xDFFF]
    ids, id_offsets = gpt2.encode_documents(*pack([character.encode() for character in characters]))
    assert np.array_equal(ids[id_offsets[:-1]], np.full(len(characters), gpt2.eot))
    without_eot = np.delete(ids, id_offsets[:-1])
    assert gpt2.decode_bytes(without_eot) == "".join(characters).encode()
    for i in range(0, len(characters), 97):
        expected = TIKTOKEN[gpt2].encode_ordinary(characters[i])
        assert ids[id_offsets[i] + 1:id_offsets[i + 1]].tolist() == expected


LONG = 1_000_000
LONG_TEXTS = {
    "a": "a" * LONG, "^": "^" * LONG, "blank": " " * LONG, "newline": "\n" * LONG, "_": "_" * LONG,
    "letters": "".join(map(chr, np.random.default_rng(1).integers(97, 123, LONG))),
    "digits": "".join(map(chr, np.random.default_rng(2).integers(48, 58, LONG))),
    "cjk": "".join(map(chr, np.random.default_rng(3).integers(0x4E00, 0x9FA6, LONG // 3))),
    "nul": "\x00" * LONG, "mark": "\u0301" * (LONG // 2), "marked": "e\u0301" * (LONG // 3),
    "emoji": "\U0001F469\u200D\U0001F469\u200D\U0001F467\U0001F3FD" * (LONG // 22),
    "wide blank": "\u3000" * (LONG // 3),
}  # fmt: skip


@pytest.mark.parametrize("name", LONG_TEXTS)
def test_long_runs(name):
    """One piece of a million bytes: tokens as tiktoken's, in far less than quadratic time."""
    expected = np.array(TIKTOKEN[gpt2].encode_ordinary(LONG_TEXTS[name]), np.uint16)
    assert np.array_equal(gpt2.encode(LONG_TEXTS[name]), expected)


def test_long_blank_before_a_word():
    """Where tiktoken 0.14 panics (a limit on backtracking): the last blank goes with the word."""
    expected = [*gpt2.encode(" " * (LONG - 1)), *TIKTOKEN[gpt2].encode_ordinary(" word")]
    assert gpt2.encode(" " * LONG + "word").tolist() == expected


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 200), st.sampled_from(["a", "_", " ", "-=", "abcd", "é", "0x1f"]), st.integers(0, 20))
def test_piece_lengths(length, unit, shift):
    """Around a word (8), two words (16) and merge's scratch (64), at any distance from the end."""
    check(gpt2, "x" * shift + " " + unit * length + "!")
    check(small, "x" * shift + " " + unit * length)


def test_cache_of_pieces():
    """Pieces from the cache equal fresh ones, when many share a slot and differ in one part of the key."""
    suffixes = ["".join(letters) for letters in itertools.product("abcdefghijklmnop", repeat=4)]
    same_head = [f"1 abcdefg{suffix}" for suffix in suffixes]
    same_tail = [f"1 {suffix}xyzabcdefgh" for suffix in suffixes]
    same_but_length = ["1" + "\x00" * (i % 17) + " 22" + "\x00" * (i % 11) for i in range(1000)]
    same_16_bytes = [f"1 abcdefghijklmno{letter}" for letter in "abcdefgh"]  # and of 17, too long for it
    text = " ".join(same_head + same_tail + same_but_length + same_16_bytes)
    expected = TIKTOKEN[gpt2].encode_ordinary(text)
    for _ in range(2):
        assert gpt2.encode(text).tolist() == expected


def test_slots_hold_every_number_of_ids():
    """Pieces of 1 to 16 tokens, cached and fresh."""
    generator = np.random.default_rng(5)
    letters = np.frombuffer(b"~^|`\\\x01\x7f{", np.uint8)
    pieces = [generator.choice(letters, size).tobytes() for size in generator.integers(1, 17, 60_000)]
    pieces = [piece.decode() for piece in pieces]
    assert {*range(1, 17)} <= {len(row) for row in TIKTOKEN[gpt2].encode_ordinary_batch(pieces)}
    for some in (pieces, pieces[::-1]):  # the second time at other places of the output
        text = "1".join(some)
        assert gpt2.encode(text).tolist() == TIKTOKEN[gpt2].encode_ordinary(text)


def test_a_slot_is_one_line_of_the_processors_cache():
    cache = gpt2._tables[4]
    assert (bpe.SLOT.itemsize, cache.ctypes.data % 64, len(cache)) == (64, 0, 1 << bpe.CACHE_BITS)


@settings(max_examples=300, deadline=None)
@given(texts, st.sampled_from(["", "'", " ", "\u3000", "a"]), st.integers(0, 90))
def test_block_edges(text, before, distance):
    """Any text where one block of marks ends and the next begins."""
    check(gpt2, "a " * (bpe.BLOCK // 2 - 45) + "b" * distance + before + text + " c")


def test_a_block_ends_after_no_space():
    """Nor in the middle of spaces: after each character, the block ends at the blank or beyond it."""
    for code in range(0x80, 0x110000):
        if bpe.unicode_classes()[code] == bpe.SPACE:
            assert chr(code).encode()[-1] < 0xB0
    for last in "a!\x00\x7fé東\u3000\u2003\x85\xa0\n ":
        for spaces in (" x", "  x", "\n\n x", "\n"):
            text = "a" * (bpe.BLOCK - len(last.encode())) + last + spaces
            check(gpt2, text)


@pytest.mark.parametrize("distance", range(-6, 3))
def test_invalid_utf8_at_a_block_edge(distance):
    emoji = b"\xf0\x9f\x98\x80"
    for odd in (b"\xff", b"\x80", b"\x80" * 9, emoji[:3], b"\xe6\x9d", emoji):
        for after in (b"", b" b"):
            check_documents(gpt2, [b"a" * (bpe.BLOCK + distance) + odd + after, b"ok"])
            check_documents(gpt2, [b"a " * (bpe.BLOCK // 2) + b"a" * (distance + 6) + odd + after, b"ok"])


@needs_data
def test_shakespeare():
    text = (DATA / "shakespeare" / "input.txt").read_text(encoding="utf-8")
    check(gpt2, text)
    assert len(gpt2.encode(text)) == 338_025  # published with run B


@needs_data
def test_hellaswag():
    check(gpt2, (DATA / "hellaswag" / "hellaswag_val.jsonl").read_text(encoding="utf-8"))


@needs_data
def test_openstax_from_arrow():
    """All 4,609 sections straight from Arrow's buffers, one call per row group."""
    parquet = pytest.importorskip("pyarrow.parquet")
    tokens = documents = 0
    for column in parquet.read_table(DATA / "openstax" / "openstax.parquet", columns=["text"])["text"].chunks:
        _, offsets, text = column.buffers()
        width = np.int64 if "large" in str(column.type) else np.int32
        offsets = np.frombuffer(offsets, width)[column.offset:column.offset + len(column) + 1]
        ids, id_offsets = gpt2.encode_documents(np.frombuffer(text, np.uint8), offsets)
        expected = [[gpt2.eot, *TIKTOKEN[gpt2].encode_ordinary(document.as_py())] for document in column]
        assert id_offsets.tolist() == np.cumsum([0] + [len(row) for row in expected]).tolist()
        assert np.array_equal(ids, np.concatenate(expected))
        tokens, documents = tokens + len(ids) - len(column), documents + len(column)
    assert (tokens, documents) == (15_353_736, 4_609)


def test_python_source():
    sources = [path.read_bytes() for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))]
    check_documents(gpt2, [source.decode("utf-8", "replace").encode() for source in sources])


def test_tables_find_what_is_there_and_nothing_else():
    """Small open-addressing tables, whose runs of full slots often go round the end."""
    generator = np.random.default_rng(4)
    for _ in range(300):
        keys = generator.choice(np.arange(1, 1 << 16), 8, replace=False).astype(np.uint64)
        table = bpe.make_table(keys[:7], np.arange(7, dtype=np.uint64))
        assert len(table) == 16
        assert [bpe.find(key, table) for key in keys] == [*range(7), bpe.ABSENT]


# ---- documents, bytes that are not UTF-8 ---------------------------------------

almost_utf8 = st.lists(st.sampled_from(
    [b"a", b" ", b"\x80", b"\xc2", b"\xc0\x80", b"\xe0\xa0", b"\xed\xa0\x80", b"\xed\x9f\xbf",
     b"\xf0\x90\x80", b"\xf4\x90", b"\xf4\x8f\xbf\xbf", b"\xe2\x80\x99", b"\xff", b"\xc2\xa0"]),
    max_size=12).map(b"".join)


@settings(max_examples=1500, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=24), almost_utf8), max_size=4))
def test_invalid_utf8(documents):
    check_documents(gpt2, documents)
    check_documents(small, documents)


def test_every_lead_and_second_byte():
    for lead, second in itertools.product(range(0xC0, 0x100), range(0x7E, 0xC2)):
        for tail in (b"", b"\x80", b"\x80\x80", b"\xbfa"):
            check_documents(gpt2, [bytes([lead, second]) + tail])


@pytest.mark.parametrize("character", ["é", "東", "\U0001f600", "\u00a0"])
def test_character_cut_by_an_offset(character):
    data = f"ab{character}cd".encode()
    for cut in range(len(data) + 1):
        check_documents(gpt2, [data[:cut], data[cut:]])


def test_offsets_need_not_cover_the_text():
    text = np.frombuffer(b"skip this hello skip", np.uint8)
    ids, id_offsets = gpt2.encode_documents(text, np.array([9, 9, 15], np.int32))
    assert ids.tolist() == [gpt2.eot, gpt2.eot, *TIKTOKEN[gpt2].encode_ordinary(" hello")]
    assert id_offsets.tolist() == [0, 1, 3]


def test_no_documents():
    ids, id_offsets = gpt2.encode_documents(np.empty(0, np.uint8), np.array([0]))
    assert len(ids) == 0 and id_offsets.tolist() == [0]


@pytest.mark.parametrize("text, offsets", [
    (b"abc", [0, 4]), (b"abc", [-1, 3]), (b"abc", [2, 1, 3]), (b"abc", []), (b"abc", [0.0, 3.0]),
    (b"abc", [[0, 3]]), (b"abc", [0, 2**63 - 1, -2, 3]), (b"abc", [0, 9, 3]), ("utf-16", [0, 3]),
])  # fmt: skip
def test_bad_arguments(text, offsets):
    text = np.frombuffer(text, np.uint8) if isinstance(text, bytes) else np.zeros(3, np.uint16)
    with pytest.raises(ValueError, match="must"):
        gpt2.encode_documents(text, np.array(offsets))


# ---- decode, description, other processes --------------------------------------

def test_decode():
    ids = gpt2.encode("naïve 東京")
    assert gpt2.decode(ids.tolist()) == gpt2.decode(iter(ids)) == gpt2.decode(ids) == "naïve 東京"
    assert gpt2.decode([gpt2.eot]) == bpe.EOT_TEXT and gpt2.decode_bytes([]) == b""
    assert gpt2.decode(ids[:-1]).endswith("\ufffd")  # the last character's bytes are not all there
    for bad in (-1, gpt2.n_vocab):
        with pytest.raises(ValueError, match=f"id {bad} .*ids are 0 to 50256"):
            gpt2.decode([5, bad])


def test_description():
    assert (gpt2.name, gpt2.n_vocab, gpt2.eot, gpt2.sha256) == ("gpt2", 50257, 50256, bpe.GPT2_SHA256)
    lengths = gpt2.token_bytes()
    assert lengths.dtype == np.int64 and lengths.shape == (50257,) and lengths[gpt2.eot] == 0
    text = "It's naïve, 東京!"
    assert lengths[gpt2.encode(text)].sum() == len(text.encode())


def test_character_classes():
    classes = bpe.unicode_classes()
    for kind, expected in CLASSES.items():
        members = "".join(map(chr, np.flatnonzero(classes == kind))).encode()
        found = int((classes == kind).sum()), hashlib.sha256(members).hexdigest()
        version = importlib.metadata.version("tiktoken")
        assert found == expected, f"tiktoken {version}: class {kind} is not 0.14.0's: other tokens"


# ---- rank files ----------------------------------------------------------------

@pytest.mark.parametrize("damage, message", [
    (lambda lines: [*lines, b"not base64! 270"], "line 271.*is not a new token in base64"),
    (lambda lines: [*lines, b"YWI="], "line 271"),
    (lambda lines: [*lines, b"YWI= x"], "line 271"),
    (lambda lines: [*lines, b"YWJj 3"], "line 271.*the next rank is 270"),
    (lambda lines: [*lines, b"YWJj 271"], "the next rank is 270"),
    (lambda lines: [*lines, b"YWI= 270"], r"token b'ab' has rank 256 already"),
    (lambda lines: lines[1:], "line 1:.*the next rank is 0"),
    (lambda lines: [b"eHl4eQ== 0", *lines[1:]], r"lacks 1 of the 256 single bytes, first b'\\xff'"),
    (lambda lines: lines + [base64.b64encode(b"%07d" % rank) + b" %d" % rank for rank in range(270, 65537)],
     "65537 ranks, more than 65535"),
    (lambda lines: [], "lacks 256"),
])  # fmt: skip
def test_bad_rank_files(damage, message):
    with pytest.raises(UserError, match=message):
        tokenizer_from_ranks(b"\n".join(damage(SMALL_RANK_FILE.splitlines())), "mine")


def test_largest_vocabulary():
    lines = SMALL_RANK_FILE.splitlines()
    lines += [base64.b64encode(b"%06x" % rank) + b" %d" % rank for rank in range(len(lines), 65535)]
    large = tokenizer_from_ranks(b"\r\n".join(lines), "large")
    assert (large.n_vocab, large.eot) == (65536, 65535)
    text = "00fffe 00ffff 000110 ab'00ffxy"
    assert large.encode(text).tolist() == large.to_tiktoken().encode_ordinary(text)


def test_load_tokenizer_from_a_path(tmp_path):
    (tmp_path / "my_words.tiktoken").write_bytes(SMALL_RANK_FILE)
    tokenizer = load_tokenizer(str(tmp_path / "my_words.tiktoken"))
    assert (tokenizer.name, tokenizer.n_vocab, tokenizer.rank_file) == ("my_words", 271, SMALL_RANK_FILE)
    with pytest.raises(UserError, match="no such file; type gpt2 or the path"):
        load_tokenizer(str(tmp_path / "absent"))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="no such file"):
        load_tokenizer(str(tmp_path / "pipe"))


def test_marks_of_editors_in_a_rank_file(tmp_path):
    """UTF-8's is no part of the vocabulary, nor of its hash; UTF-16 is refused by name."""
    path = tmp_path / "small.tiktoken"
    path.write_bytes(b"\xef\xbb\xbf" + SMALL_RANK_FILE)
    loaded = load_tokenizer(str(path))
    assert (loaded.sha256, loaded.rank_file) == (small.sha256, SMALL_RANK_FILE)
    path.write_bytes(SMALL_RANK_FILE.decode().encode("utf-16"))
    with pytest.raises(UserError, match="UTF-16"):
        load_tokenizer(str(path))


# ---- bootstrap -----------------------------------------------------------------

@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Where GPT-2's vocabulary is cached, in an empty folder; the server is a file that does not exist."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(bpe, "GPT2_URL", str(tmp_path / "server"))
    return bpe.cache_file()


def test_the_cache_is_tiktokens(tmp_path, monkeypatch):
    """tiktoken finds what is there under this name, and would fetch it from the same address."""
    import tiktoken_ext.openai_public
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    bpe.cache_file().write_bytes(gpt2.rank_file)
    ranks = tiktoken_ext.openai_public.r50k_base()["mergeable_ranks"]
    assert ranks == {token: rank for rank, token in enumerate(gpt2.tokens[:-1])}
    assert bpe.gpt2_rank_file() == gpt2.rank_file


@pytest.mark.parametrize("cached", [None, gpt2.rank_file[:-1]])
def test_download(cache, tmp_path, cached):
    if cached:
        cache.parent.mkdir()
        cache.write_bytes(cached)
    with pytest.raises(UserError, match=r"vocabulary is not in the cache.*--tokenizer=FILE") as raised:
        bpe.gpt2_rank_file()
    assert str(cache) in str(raised.value) and bpe.GPT2_SHA256 in str(raised.value)
    (tmp_path / "server").write_bytes(b"a captive portal")
    with pytest.raises(UserError, match="Hash mismatch"):
        bpe.gpt2_rank_file()
    (tmp_path / "server").write_bytes(gpt2.rank_file)
    assert bpe.gpt2_rank_file() == gpt2.rank_file == cache.read_bytes()
    assert [*cache.parent.iterdir()] == [cache]  # no temporary file left


def test_compiling_is_announced_once(tmp_path, monkeypatch, capsys):
    (tmp_path / "kernels_of_a_test.py").write_text(
        "from numba import njit\n\n\n@njit(cache=True)\ndef double(x):\n    return 2 * x\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    double = importlib.import_module("kernels_of_a_test").double
    bpe.say_compiling(double)
    assert "compiling" in capsys.readouterr().err
    assert double(2) == 4
    bpe.say_compiling(double)
    assert not capsys.readouterr().err


def test_script(tmp_path):
    path = tmp_path / "small.tiktoken"
    path.write_bytes(SMALL_RANK_FILE)
    done = subprocess.run([sys.executable, REPO / "bpe.py", f"--tokenizer={path}"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(path) in done.stdout and "ids equal tiktoken's" in done.stdout


def test_bounds(tmp_path):
    """No kernel indexes outside an array: the tests of odd texts again, with numba's bounds checks."""
    environment = os.environ | {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    names = "chosen or any_documents or piece_lengths or invalid_utf8 or cut_by or cover or bad_arguments"
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", names],
                          cwd=REPO, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
