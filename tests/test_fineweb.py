"""fineweb.py: every kind of input gives the shards that a slow twin gives: tiktoken, document by document."""
import base64
import gzip
import hashlib
import itertools
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import documents
import fineweb
from bpe import load_tokenizer
from configurator import UserError
from shards import TokenStream, list_shards, read_manifest, read_shard

ROOT = Path(fineweb.__file__).resolve().parent
EOT = 50_256
DEFAULTS = {"dataset": "fineweb-edu", "subset": "", "input": "", "text_column": "text", "revision": "main",
            "tokenizer": "gpt2", "shard_tokens": 1000, "val_fraction": 0.1, "max_tokens": 0, "num_workers": 1,
            "shard_format": "npy", "skip_bad": False, "verify": False}


def build(data_dir, **flags):
    flags = {key: str(value) if isinstance(value, Path) else value for key, value in flags.items()}
    fineweb.build(**{**DEFAULTS, "data_dir": str(data_dir), **flags})
    return data_dir


def fineweb_command(data_dir, **flags):
    flags = {**DEFAULTS, "data_dir": data_dir, **flags}
    return [sys.executable, str(ROOT / "fineweb.py"), *(f"--{key}={value}" for key, value in flags.items())]


def run(data_dir, env=None, **flags):
    return subprocess.run(fineweb_command(data_dir, **flags), capture_output=True, text=True,
                          encoding="utf-8", timeout=120, env={**os.environ, **(env or {})})


def contents(folder):
    """Hashes of the files; build.json's command, which may be spelled in many ways, apart."""
    return {path.name: hashlib.sha256(re.sub(rb'\n *"command": .*', b"", path.read_bytes())).hexdigest()
            for path in Path(folder).iterdir()}


def tokens_of(folder, split):
    if not list_shards(folder, split):
        return []
    stream = TokenStream(folder, split)
    return stream.read(0, len(stream)).tolist()


# ---- the slow twin -------------------------------------------------------------


def slow_hash(text: bytes) -> int:
    mask = 2**64 - 1
    h = len(text) * 0x9E3779B97F4A7C15 & mask
    for i in range(0, len(text), 8):
        h = (h ^ int.from_bytes(text[i:i + 8], "little")) * 0xD6E8FEB86659FD93 & mask
        h ^= h >> 32
    h = (h ^ h >> 33) * 0xFF51AFD7ED558CCD & mask
    h = (h ^ h >> 33) * 0xC4CEB9FE1A85EC53 & mask
    return h ^ h >> 33


def slow_build(docs, encoding, val_fraction=0.1, max_tokens=0):
    """(train ids, val ids) of documents: bytes, or (bytes, side) where the place decides."""
    sides, total = ([], []), 0
    for document in docs:
        text, side = document if isinstance(document, tuple) else (document, None)
        if text:
            ids = [EOT, *encoding.encode_ordinary(text.decode())]
            sides[slow_hash(text) < int(val_fraction * 2**64) if side is None else side].extend(ids)
            total += len(ids)
        if max_tokens and total >= max_tokens:
            break
    return sides


def slow_txt(text, val_fraction=0.1):
    """The documents of a txt file below 64 MB."""
    if b"<|endoftext|>" in text:
        return [part.strip(b"\r\n") for part in text.split(b"<|endoftext|>")]
    at = len(text) - int(len(text) * val_fraction)
    if len(text) - at < 1000:
        return [text]
    start = text.rfind(b"\n", 0, at) + 1
    if at - start > len(text) - at:  # the line is longer than the validation part
        start = at
        while text[start] & 0xC0 == 0x80:
            start -= 1
    return [(text[:start], False), (text[start:], True)]


def make_documents(count=150, seed=0):
    rng = random.Random(seed)
    words = ["the", "model", " learns", "\n", "naïve", "日本語", "🙂", "  ", "12345", "def f(x):", "\t"]
    docs = [" ".join(rng.choices(words, k=rng.randrange(1, 60))).encode() for _ in range(count)]
    docs[3] = docs[40] = b"twice the same"
    docs[5] = b""
    docs[7] = b"before <|endoftext|> after"
    docs[11] = b"\n".join(b"line %d" % i for i in range(2000))  # longer than a shard
    return docs


DOCUMENTS = make_documents()


def write_input(folder, kind, docs):
    """The documents as files of a kind; returns what to pass as --input."""
    folder.mkdir(exist_ok=True)
    path, texts = folder / f"corpus.{kind}", [document.decode() for document in docs]
    lines = "".join(f"{json.dumps({'id': i, 'text': text})}\n" for i, text in enumerate(texts)).encode()
    types = {"large": pa.large_string(), "view": pa.string_view(), "binary": pa.binary(),
             "dictionary": pa.dictionary(pa.int32(), pa.string())}
    match kind.split("."):
        case ["parquet"]:
            pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), path, row_group_size=40)
        case [name, "parquet"]:
            array = pa.array(docs if name == "binary" else texts).cast(types[name])
            pq.write_table(pa.table({"text": array}), path, row_group_size=30, compression="zstd")
        case ["jsonl"]:
            path.write_bytes(lines.replace(b"\n", b"\r\n\n", 1).removesuffix(b"\n"))  # a blank line, too
        case [_, "gz"]:
            path.write_bytes(gzip.compress(lines) + bytes(512))  # with padding
        case [_, "zst"]:
            with pa.output_stream(str(path), compression="zstd") as file:
                file.write(lines)
        case ["txt"]:
            path = folder / "texts"
            path.mkdir()
            for i, document in enumerate(docs):
                (path / f"{i:04d}.txt").write_bytes(document)
        case ["tinystories", "txt"]:
            path.write_bytes(b"\n<|endoftext|>\n".join(docs))
        case _:
            path.write_bytes(b"\xef\xbb\xbf" + lines)  # with a byte order mark
    return path


def expected(kind, docs, encoding, val_fraction=0.1):
    if kind == "txt":
        docs = [part for document in docs for part in slow_txt(document, val_fraction)]
    if kind == "tinystories.txt":
        docs = slow_txt(b"\n<|endoftext|>\n".join(docs))
    return slow_build(docs, encoding, val_fraction)


KINDS = ["parquet", "large.parquet", "dictionary.parquet", "view.parquet", "binary.parquet", "jsonl",
         "NDJSON", "json", "jsonl.gz", "jsonl.zst", "txt", "tinystories.txt"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_equals_the_slow_twin(tmp_path, encoding, kind, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_BYTES", 512)
    monkeypatch.setattr(documents, "CHUNK_BYTES", 3000)  # several chunks, and documents larger than one
    source = write_input(tmp_path / "in", kind, DOCUMENTS)
    folder = build(tmp_path / "out", input=source)
    train, val = expected(kind, DOCUMENTS, encoding)
    assert tokens_of(folder, "train") == train and tokens_of(folder, "val") == val and len(val) > 100
    manifest = read_manifest(folder)
    sizes = [record["tokens"] for record in manifest["files"] if "_train_" in record["file"]]
    assert len(sizes) > 3 and all(size >= 1000 for size in sizes[:-1])
    assert {f["file"]: f["sha256"] for f in manifest["files"]} == {
        name: digest for name, digest in contents(folder).items() if name.endswith(".npy")}
    assert contents(folder).keys() - {f["file"] for f in manifest["files"]} == {
        "build.json", "manifest.json", "tokenizer.tiktoken"}
    assert manifest["tokens"] == len(train) + len(val) and manifest["eot"] == EOT
    assert manifest["splits"]["val"]["tokens"] == len(val)
    for split, ids in ("train", train), ("val", val):
        assert manifest["splits"][split]["documents"] == ids.count(EOT)
    assert manifest["tokenizer"]["name"] == "gpt2" and len(manifest["tokenizer"]["sha256"]) == 64
    if "txt" not in kind:
        assert manifest["documents"] == len(DOCUMENTS) - 1 and manifest["empty_documents"] == 1
        assert manifest["text_bytes"] == sum(map(len, DOCUMENTS))


def test_a_pair_ends_with_the_chunk_that_fills_train(tmp_path, monkeypatch):
    """Chunks of 10 rows: the train and val shards of one number hold the same chunks."""
    texts = [f"{i} " * 40 for i in range(200)]
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"text": texts}), tmp_path / "in" / "a.parquet", row_group_size=10)
    folder = build(tmp_path / "out", input=tmp_path / "in", shard_tokens=2000)
    tok, seen = load_tokenizer(), 0
    for train in list_shards(folder, "train"):
        numbers = []
        for path in (train, folder / train.name.replace("train", "val")):
            text = tok.decode(read_shard(path)) if path.exists() else ""
            numbers += [int(part.split()[0]) for part in text.split("<|endoftext|>")[1:]]
        assert sorted(numbers) == list(range(seen, seen + len(numbers))) and len(numbers) % 10 == 0
        seen += len(numbers)
    assert seen == 200


def test_the_footer_of_a_parquet_file_is_parsed_once(tmp_path):
    documents.open_parquet.cache_clear()
    build(tmp_path / "out", input=write_input(tmp_path / "in", "parquet", DOCUMENTS))
    info = documents.open_parquet.cache_info()
    assert info.misses == 1 and info.hits > 4


def test_any_number_of_workers(tmp_path, encoding, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_BYTES", 512)
    monkeypatch.setattr(documents, "CHUNK_BYTES", 3000)
    source = write_input(tmp_path / "in", "parquet", DOCUMENTS)
    flags = {"input": source, "shard_format": "bin", "max_tokens": 9000, "val_fraction": 0.3}
    folders = [build(tmp_path / f"out{n}", num_workers=n, **flags) for n in (1, 2, 3)]
    assert contents(folders[0]) == contents(folders[1]) == contents(folders[2])
    assert [tokens_of(folders[2], split) for split in ("train", "val")] == list(
        slow_build(DOCUMENTS, encoding, 0.3, max_tokens=9000))


def test_large_row_groups_are_read_in_pieces(tmp_path, encoding, monkeypatch):
    source = write_input(tmp_path / "in", "parquet", DOCUMENTS)
    monkeypatch.setattr(documents, "CHUNK_BYTES", 500)
    monkeypatch.setattr(documents, "MOST_BYTES", 1000)
    places = [place for place, _ in documents.input_source(str(source), "text", 0.1).chunks()]
    assert len(places) > 20 and places == sorted(places) and max(piece for _, _, piece in places) > 3
    folder = build(tmp_path / "pieces", input=source)
    assert [tokens_of(folder, split) for split in ("train", "val")] == list(slow_build(DOCUMENTS, encoding))


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "txt"])
def test_chunks_go_on_from_any_place(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(documents, "PIECE_BYTES", 512)
    monkeypatch.setattr(documents, "CHUNK_BYTES", 2000)
    monkeypatch.setattr(documents, "MOST_BYTES", 4000)
    for name in "ab":
        write_input(tmp_path / name, kind, DOCUMENTS)
    source = documents.input_source(f"{tmp_path / 'a'},{tmp_path / 'b'}", "text", 0.1)

    def read(start):
        return [(place, chunk.read(*chunk.args).text.tobytes()) for place, chunk in source.chunks(start)]

    everything = read((0, 0, 0))
    assert len(everything) > 10
    for i, ((unit, group, piece), _) in enumerate(everything):
        assert read((unit, group, piece)) == everything[i:]
        assert read((unit, group, piece + 1)) == everything[i + 1:]


def test_rows_in_arrows_own_buffers():
    array = pa.array(["zero", "one", None, "", "four", "five"])
    for kind in (pa.string(), pa.large_string()):
        got = documents.read_rows(array.cast(kind)[1:5], "a.parquet", 11, 0)
        assert got.text.tobytes() == b"onefour" and got.offsets.tolist() == [0, 3, 7] and got.empty == 1
        assert got.bad == ["a.parquet, row 12: null, not text"]
        got = documents.read_rows(array.cast(kind)[3:], "", 0, 0)  # and without a null
        assert got.text.tobytes() == b"fourfive" and got.offsets.tolist() == [0, 4, 8] and not got.bad
    buffers = [pa.py_buffer(b"\x05"), *pa.array(["ab", "hidden", "c"]).buffers()[1:]]  # bits: 1, null, 1
    got = documents.read_rows(pa.Array.from_buffers(pa.string(), 3, buffers), "", 0, 0)
    assert got.text.tobytes() == b"abc" and got.offsets.tolist() == [0, 2, 3]
    for values, empty in (([], 0), ([None, None], 0), (["", ""], 2)):
        got = documents.read_rows(pa.array(values, pa.string()), "", 0, 0)
        assert len(got.text) == 0 and got.offsets.tolist() == [0] and got.empty == empty


@given(st.lists(st.binary(max_size=40), max_size=8), st.floats(0, 1, exclude_max=True))
@settings(deadline=None)
def test_sides_equal_their_slow_twin(docs, val_fraction):
    offsets = np.cumsum([0, *map(len, docs)])
    got = documents.with_sides(np.frombuffer(b"".join(docs), np.uint8), offsets, val_fraction)
    sides = [slow_hash(document) < int(val_fraction * 2**64) for document in docs if document]
    assert got.is_val.tolist() == sides


def test_hash_is_fair():
    """Near-equal documents fall on the two sides as often as val_fraction says."""
    docs = [(b"document number %d" % i, "", None) for i in range(100_000)]
    assert abs(documents.from_texts(docs, 0.01, []).is_val.mean() - 0.01) < 0.0016  # 5 standard errors


def test_sides_share_no_document_whatever_the_order(tmp_path):
    docs = [b"document %d" % (i % 60) for i in range(200)]
    sides = []
    for seed in range(2):
        random.Random(seed).shuffle(docs)
        folder = build(tmp_path / f"out{seed}", input=write_input(tmp_path / f"in{seed}", "jsonl", docs))
        parts = [np.array(tokens_of(folder, split)) for split in ("train", "val")]
        sides.append([{tuple(document) for document in np.split(part, np.flatnonzero(part == EOT))} - {()}
                      for part in parts])
        assert not sides[-1][0] & sides[-1][1] and sum(map(len, sides[-1])) == 60 and sides[-1][1]
    assert sides[0] == sides[1]


# ---- txt files -----------------------------------------------------------------


def awkward_text(seed):
    rng = random.Random(seed)
    words = ["word", " word", "\n", "\n\n", "  ", " ", "\t", "'s", " 'll", "naïve", "日本語", "。\n",
             "\u3000", "\u2003 ", "\u00a0", "12", "...", "\r\n", "🙂", "x'", "\u0085\n"]
    return "".join(rng.choices(words, k=2000))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("lines", [True, False])
def test_a_large_txt_file_is_several_documents(tmp_path, encoding, monkeypatch, seed, lines):
    text = awkward_text(seed).encode()
    if not lines:
        text = text.replace(b"\n", b"")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text))
    monkeypatch.setattr(documents, "PIECE_BYTES", 64)
    monkeypatch.setattr(documents, "MOST_BYTES", 640)
    monkeypatch.setattr(documents, "VAL_BYTES", 100)
    file = documents.plan_file(tmp_path / "a.txt.gz")
    parts = list(documents.split_text(file, 0.4))
    assert b"".join(part for part, *_ in parts) == text and len(parts) > 4
    assert all(part.decode() and len(part) <= 2 * 640 for part, *_ in parts)
    if lines:
        assert all(part.endswith(b"\n") for part, *_ in parts[:-1])
    if parts[-1][2] is None:  # the last document may be too short to be divided
        parts.pop()
    assert [side for *_, side in parts] == [False, True] * (len(parts) // 2)
    for (train, *_), (val, *_) in zip(parts[::2], parts[1::2]):
        assert abs(len(val) - 0.4 * len(train + val)) < (100 if lines else 4)


@pytest.mark.parametrize("text, val_fraction, sides", [
    (b"word\n" * 2000, 0.1, [(9000, False), (1000, True)]),   # a book
    (b"word\n" * 2000, 0.05, [(10_000, None)]),              # 500 bytes of it: as its hash says
    (b"x" * 10_000, 0.1, [(9000, False), (1000, True)]),     # one long line
    (b"title\n" + b"x" * 9994, 0.1, [(9000, False), (1000, True)]),
    ("é".encode() * 5001, 0.1, [(9002, False), (1000, True)]),  # not inside a character
    (b"word\n" * 2000, 0, [(10_000, None)]),
    (b"", 0.1, [(0, None)]),
])
def test_where_a_txt_file_is_divided(tmp_path, text, val_fraction, sides):
    (tmp_path / "a.txt").write_bytes(text)
    file = documents.plan_file(tmp_path / "a.txt")
    assert [(len(part), side) for part, _, side in documents.split_text(file, val_fraction)] == sides


def test_five_books_have_a_validation_split(tmp_path, encoding, capsys):
    (tmp_path / "in").mkdir()
    for i in range(5):
        text = b"".join(b"book %d, line %d\n" % (i, k) for k in range(9000))
        (tmp_path / "in" / f"{i}.TXT").write_bytes(text)
    folder = build(tmp_path / "out", input=tmp_path / "in", val_fraction=0.01)
    text = encoding.decode(tokens_of(folder, "val"))
    assert all(f"book {i}, line 8999" in text for i in range(5)) and text.count("<|endoftext|>") == 5
    assert abs(len(tokens_of(folder, "val")) / read_manifest(folder)["tokens"] - 0.01) < 0.001
    tokens = len(tokens_of(folder, "val"))
    said = f"validation: 5 documents, {tokens:,} tokens; windows: {(tokens - 1) // 128} of 128"
    assert said in capsys.readouterr().out


def test_shakespeare(tmp_path, shared_data, encoding):
    source = shared_data / "shakespeare" / "input.txt"
    folder = build(tmp_path / "out", input=source, val_fraction=0.01, shard_tokens=10**8)
    train, val = tokens_of(folder, "train"), tokens_of(folder, "val")
    assert encoding.decode(train[1:]) + encoding.decode(val[1:]) == source.read_text(encoding="utf-8")
    assert encoding.decode(train).endswith("\n") and 0.008 < len(val) / len(train) < 0.012


def test_a_txt_file_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good<|endoftext|>caf\xe9 \xff")
    with pytest.raises(UserError, match=r"a\.txt, document 2: not UTF-8 at byte 3 \(invalid continuation"):
        build(tmp_path / "out", input=tmp_path / "a.txt")


# ---- max_tokens ----------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [1, 500, 3000, 10**9])
def test_max_tokens_ends_with_the_document_that_reaches_it(tmp_path, encoding, max_tokens):
    docs = DOCUMENTS[12:] + DOCUMENTS[:12]
    val_fraction = 0.5 if max_tokens > 1 else 0
    source = write_input(tmp_path / "in", "jsonl", docs)
    folder = build(tmp_path / "out", input=source, max_tokens=max_tokens, val_fraction=val_fraction)
    train, val = slow_build(docs, encoding, val_fraction, max_tokens)
    assert tokens_of(folder, "train") == train and tokens_of(folder, "val") == val


# ---- bad input -----------------------------------------------------------------


def good_parquet(path):
    pq.write_table(pa.table({"text": ["a b c"] * 3000, "n": range(3000)}), path, compression="none")
    return path.read_bytes()


def corrupt_parquet(path):
    content = bytearray(good_parquet(path))
    content[4:40] = b"\xff" * 36  # the first page header
    return bytes(content)


def twice_parquet(path):
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"]), path)
    return path.read_bytes()


def list_parquet(path):
    pq.write_table(pa.table({"text": [["a", "b"]]}), path)
    return path.read_bytes()


# a frame whose header asks for a window of 2 GB, as `zstd --long=31` does, and one raw block: "hello"
LONG_WINDOW = bytes.fromhex("28b52ffd00a8") + (5 << 3 | 1).to_bytes(3, "little") + b"hello"


@pytest.mark.parametrize("name, content, flags, words", [
    ("a.txt", b"", {}, ["no text found"]),
    ("a.jsonl", b"\n\n", {}, ["no text found: 0 documents"]),
    ("a.jsonl", b'{"text": ""}\n{"text": ""}\n', {}, ["no text found: 2 documents are empty"]),
    ("a.jsonl", b'{"text": "a"}\n{"text": null}\n', {}, ["a.jsonl, line 2: ", "no text", "--skip_bad"]),
    ("a.jsonl", b'{"text": "a\\ud800"}\n', {}, ["line 1: not JSON, or not text", "surrogates"]),
    ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', {}, ["a.jsonl, line 2: not JSON"]),
    ("a.jsonl", b'{"text": "a"}\n\n\xff\n', {}, ["a.jsonl, line 3: not JSON"]),
    ("a.jsonl", b'{"body": "a"}\n', {}, ["line 1: b'{\"body\": \"a\"}' has no text", "--text_column"]),
    ("a.jsonl", b"3\n", {}, ["line 1: b'3' has no text"]),
    ("a.json", b' [{"text": "a"}]', {}, ["a.json is a JSON array", "python -c 'import json"]),
    ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), {}, ["a.jsonl is UTF-16", "iconv"]),
    ("a.txt", b"x", {}, ["all documents (1) are for training", "--val_fraction"]),
    ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-20], {}, ["a.jsonl.gz: cannot be read"]),
    ("a.jsonl.gz", b'{"text": "a"}\n', {"skip_bad": True}, ["a.jsonl.gz: cannot be read"]),
    ("a.jsonl.zst", b"nonsense", {"skip_bad": True}, ["a.jsonl.zst: cannot be read"]),
    ("a.jsonl.zst", LONG_WINDOW, {}, ["a.jsonl.zst: cannot be read", "made with zstd --long"]),
    ("a.parquet", b"PAR1 nonsense PAR1", {"skip_bad": True}, ["a.parquet: cannot be read"]),
    ("a.parquet", corrupt_parquet, {"skip_bad": True}, ["a.parquet, row group 0: cannot be read"]),
    ("a.parquet", corrupt_parquet, {"num_workers": 2}, ["a.parquet, row group 0: cannot be read"]),
    ("a.parquet", twice_parquet, {}, ["a.parquet: wanted a column 'text', found two of them"]),
    ("a.parquet", good_parquet, {"text_column": "body"}, ["found only text, n", "--text_column"]),
    ("a.parquet", good_parquet, {"text_column": "n"}, ["holds int64", "--text_column"]),
    ("a.parquet", list_parquet, {}, ["a.parquet: column 'text' holds list<", "--text_column"]),
    ("a.pdf", b"x", {}, ["a.pdf is no file of a known kind: .parquet; .jsonl, .ndjson, .json"]),
    ("b.txt", b"x", {"input": "nowhere/*.txt"}, ["nowhere/*.txt", "found no file"]),
    ("a.txt", b"x", {"dataset": "wiki", "input": ""}, ["wiki", "fineweb-edu, fineweb, python", "--input"]),
])
def test_bad_input_is_named_and_no_file_is_left(tmp_path, name, content, flags, words):
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / name
    path.write_bytes(content(path) if callable(content) else content)
    with pytest.raises(UserError) as error:
        build(tmp_path / "out", **{"input": path, **flags})
    for word in words:
        assert word in str(error.value)
    assert not list((tmp_path / "out").glob("*"))


def test_bad_line_of_a_later_chunk_has_its_number(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "some words"}\n' * 400 + b"{\n")
    monkeypatch.setattr(documents, "PIECE_BYTES", 64)
    monkeypatch.setattr(documents, "CHUNK_BYTES", 500)
    with pytest.raises(UserError, match=r"a\.jsonl, line 401: not JSON"):
        build(tmp_path / "out", input=tmp_path / "a.jsonl")


@pytest.mark.parametrize("num_workers", [1, 2])
def test_skip_bad_leaves_out_what_cannot_be_read(tmp_path, encoding, num_workers, capsys):
    folder, good = tmp_path / "in", [document.decode() for document in DOCUMENTS if document]
    folder.mkdir()
    lines = [json.dumps({"text": text}) for text in good[:60]]
    lines[3:3] = ["{", '{"text": null}', '{"body": "x"}']
    (folder / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    cut = gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in good[60:90]).encode(), 0)
    (folder / "b.jsonl.gz").write_bytes(cut[:-100])  # in the last line
    pq.write_table(pa.table({"text": [*good[90:120], None]}), folder / "c.parquet")
    binary = pa.array([b"ok", b"\xc3(", b"also"])
    strings = pa.Array.from_buffers(pa.string(), 3, binary.buffers())  # Arrow does not look at its bytes
    pq.write_table(pa.table({"text": binary}), folder / "d.parquet")
    pq.write_table(pa.table({"text": strings}), folder / "d2.parquet")
    (folder / "e.txt").write_bytes(b"caf\xe9")
    kept = [*good[:89], *good[90:120], "ok", "also", "ok", "also"]
    build(tmp_path / "out", input=folder, num_workers=num_workers, skip_bad=True)
    assert [tokens_of(tmp_path / "out", split) for split in ("train", "val")] == list(
        slow_build([text.encode() for text in kept], encoding))
    assert read_manifest(tmp_path / "out")["bad_documents"] == 8
    said = capsys.readouterr()
    places = ["a.jsonl, line 4", "a.jsonl, line 5", "a.jsonl, line 6", "b.jsonl.gz", "c.parquet, row 30",
              "d.parquet, row 1", "d2.parquet, row 1", "e.txt, from byte 0 on"]
    told = [line for line in said.err.splitlines() if "left out: " in line]
    assert len(told) == 8 and all(f"{folder}/{place}: " in line for place, line in zip(places, told)), told
    assert "8 bad left out" in said.out


def test_a_file_that_may_not_be_read_is_not_skipped(tmp_path, monkeypatch):
    source = write_input(tmp_path / "in", "jsonl", DOCUMENTS)

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pa, "input_stream", denied)
    with pytest.raises(UserError, match=r"corpus\.jsonl: cannot be read \(Permission denied\)"):
        build(tmp_path / "out", input=source, skip_bad=True)


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "txt"])
@pytest.mark.parametrize("when", ["planned", "first chunk"])
def test_a_file_that_changes_during_the_build_is_noticed(tmp_path, monkeypatch, kind, when):
    monkeypatch.setattr(documents, "PIECE_BYTES", 512)
    monkeypatch.setattr(documents, "CHUNK_BYTES", 1000)
    source = write_input(tmp_path / "in", kind, DOCUMENTS)
    path = max(tmp_path.glob("in/**/*.*"), key=os.path.getmtime)

    def change():
        content = path.read_bytes()
        path.write_bytes(content)  # of the same size
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1_000_000))

    take = fineweb.encode_in_order

    def changed(*args):
        if when == "planned":
            change()
        for i, chunk in enumerate(take(*args)):
            if when == "first chunk" and i == 0:
                change()
            yield chunk

    monkeypatch.setattr(fineweb, "encode_in_order", changed)
    with pytest.raises(UserError, match="has changed since the build began"):
        build(tmp_path / "out", input=source, num_workers=1)


def test_input_takes_lists_globs_and_folders(tmp_path, encoding, capsys):
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    (folder / "__MACOSX").mkdir()
    for name in ("b.txt", "a.txt", "deep/c.txt", "notes.pdf", ".hidden.txt", "__MACOSX/._b.txt",
                 "deep/build_0_of_2.json", "manifest.json"):
        (folder / name).write_text(f"text of {name}", encoding="utf-8")
    (folder / "link.txt").symlink_to(folder / "a.txt")
    (tmp_path / "d.jsonl").write_text('{"text": "text of d"}', encoding="utf-8")
    for i, (names, order) in enumerate([([folder], "a.txt b.txt deep/c.txt"),
                                        ([tmp_path / "d.jsonl", folder / "a.txt"], "d a.txt"),
                                        ([folder / "*.txt", folder], "a.txt b.txt deep/c.txt")]):
        out = build(tmp_path / f"out{i}", input=",".join(map(str, names)), val_fraction=0)
        text = encoding.decode(tokens_of(out, "train"))
        assert text == "".join(f"<|endoftext|>text of {name}" for name in order.split())
        if i == 0:
            said = capsys.readouterr().out
            assert "input: 3 txt, 44 bytes; ignored: 5 other files, such as " in said
            assert "no validation, which training needs" in said and list_shards(out, "val") == []


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_is_not_utf8_is_one_line(tmp_path):
    (tmp_path / "in").mkdir()
    with open(os.fsencode(tmp_path / "in") + b"/caf\xe9.txt", "wb") as file:
        file.write(b"text")
    done = run(tmp_path / "out", input=tmp_path / "in")
    assert done.returncode == 2 and "is not UTF-8; rename the file" in done.stderr
    assert "Traceback" not in done.stderr


def test_large_vocabularies_are_refused(tmp_path):
    lines = [*(bytes([b]) for b in range(256)), *(b"%c%c%c" % (a, b, c) for a in range(4) for b in range(200)
                                                  for c in range(100))][:66_000]
    (tmp_path / "large.tiktoken").write_bytes(b"".join(
        base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(lines)))
    with pytest.raises(UserError, match="66000 ranks, more than 65535"):
        build(tmp_path / "out", input="x", tokenizer=tmp_path / "large.tiktoken")


# ---- the embedded corpus -------------------------------------------------------


def test_the_embedded_corpus_is_the_standard_library(tmp_path, monkeypatch):
    for name in ("z.py", "a/b.py", "copy_of_z.py", "site-packages/no.py", "__pycache__/no.txt", "test/no.py",
                 "a/tests/no.py", "encodings/no.py", "pydoc_data/no.py", "config-3.11-x/no.py",
                 "_sysconfigdata__linux.py", "contest.py"):
        path = tmp_path / "lib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {'z.py' if 'copy' in name else name}\n", encoding="utf-8")
    monkeypatch.setattr(documents.sysconfig, "get_path", lambda key: tmp_path / "lib")
    source = documents.python_source(0)
    (_, chunk), = source.chunks()
    text = chunk.read(*chunk.args).text.tobytes().decode()
    assert text == "text of a/b.py\ntext of contest.py\ntext of z.py\n" and source.facts["documents"] == 3


def test_ids_of_the_embedded_corpus_are_tiktokens(tmp_path, encoding):
    folder = build(tmp_path / "out", dataset="python", shard_tokens=10**8)
    source = documents.python_source(0.1)
    docs = []
    for _, chunk in source.chunks():
        got = chunk.read(*chunk.args)
        docs += [got.text[a:b].tobytes() for a, b in itertools.pairwise(got.offsets)]
    assert len(docs) in (source.facts["documents"], source.facts["documents"] - 1) and len(docs) > 500
    train, val = slow_build(docs, encoding)
    assert tokens_of(folder, "train") == train and tokens_of(folder, "val") == val


# ---- cores ---------------------------------------------------------------------


@pytest.mark.parametrize("text, most", [("200000 100000\n", 2), ("150000 100000\n", 2), ("50000 100000\n", 1),
                                        ("max 100000\n", 64), (None, 64), ("", 64)])
def test_cores_honour_the_quota_of_a_container(tmp_path, monkeypatch, text, most):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    monkeypatch.setattr(documents, "CPU_QUOTA", tmp_path / "cpu.max")
    if text is not None:
        (tmp_path / "cpu.max").write_text(text, encoding="ascii")
    assert documents.available_cores() == most
