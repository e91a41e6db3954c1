"""fineweb.py: every kind of input gives the shards that a slow twin gives: tiktoken, document by document."""
import contextlib
import functools
import gzip
import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import kill_build
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
from shards import TokenStream, list_shards, read_manifest

ROOT = Path(fineweb.__file__).resolve().parent
EOT = 50_256
DEFAULTS = {"dataset": "fineweb-edu", "subset": "sample-10BT", "input": "", "text_column": "text",
            "revision": "main", "tokenizer": "gpt2", "shard_tokens": 1000, "val_fraction": 0.1,
            "max_tokens": 0, "num_workers": 1, "shard_format": "npy", "skip_bad": 0, "keep_downloads": False,
            "verify": False, "seed": 1}


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
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).iterdir()}


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
    """(train ids, val ids) of documents, bytes or None."""
    sides, total = ([], []), 0
    for document in filter(None, docs):
        ids = [EOT, *encoding.encode_ordinary(document.decode("utf-8", "replace"))]
        sides[slow_hash(document) < int(val_fraction * 2**64)].extend(ids)
        total += len(ids)
        if max_tokens and total >= max_tokens:
            break
    return sides


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
    match kind:
        case "parquet":
            pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), path, row_group_size=40)
        case "large.parquet":
            table = pa.table({"text": pa.array(texts, pa.large_string())})
            pq.write_table(table, path, row_group_size=64, compression="zstd")
        case "dictionary.parquet":
            pq.write_table(pa.table({"text": pa.array(texts).dictionary_encode()}), path, row_group_size=50)
        case "jsonl":
            path.write_bytes(lines.replace(b"\n", b"\r\n\n", 1).removesuffix(b"\n"))  # a blank line, too
        case "jsonl.gz":
            path.write_bytes(gzip.compress(lines))
        case "jsonl.zst":
            with pa.output_stream(str(path), compression="zstd") as file:
                file.write(lines)
        case "txt":
            path = folder / "texts"
            path.mkdir()
            for i, document in enumerate(docs):
                (path / f"{i:04d}.txt").write_bytes(document)
    return path


@pytest.mark.parametrize("kind", ["parquet", "large.parquet", "dictionary.parquet", "jsonl", "jsonl.gz",
                                  "jsonl.zst", "txt"])
def test_every_kind_equals_the_slow_twin(tmp_path, encoding, kind, monkeypatch):
    monkeypatch.setattr(documents, "CHUNK_BYTES", 3000)  # several chunks, and documents larger than one
    source = write_input(tmp_path / "in", kind, DOCUMENTS)
    folder = build(tmp_path / "out", input=source)
    train, val = slow_build(DOCUMENTS, encoding)
    assert tokens_of(folder, "train") == train and tokens_of(folder, "val") == val and len(val) > 100
    manifest = read_manifest(folder)
    assert [f["tokens"] for f in manifest["files"] if "_train_" in f["file"]] == [
        *[1000] * (len(train) // 1000), len(train) % 1000]
    assert {f["file"]: f["sha256"] for f in manifest["files"]} == {
        name: digest for name, digest in contents(folder).items() if name != "manifest.json"}
    assert manifest["tokens"] == len(train) + len(val) and manifest["eot"] == EOT
    assert manifest["documents"] == len(DOCUMENTS) - 1 and manifest["empty_documents"] == 1
    assert manifest["text_bytes"] == sum(map(len, DOCUMENTS))
    assert manifest["splits"]["val"]["tokens"] == len(val) and manifest["cut"] is None
    assert manifest["splits"]["val"]["documents"] == val.count(EOT)
    assert manifest["tokenizer"]["name"] == "gpt2" and len(manifest["tokenizer"]["sha256"]) == 64
    assert not (folder / "build.json").exists()


def test_any_number_of_workers(tmp_path, encoding, monkeypatch):
    monkeypatch.setattr(documents, "CHUNK_BYTES", 3000)
    source = write_input(tmp_path / "in", "parquet", DOCUMENTS)
    flags = {"input": source, "shard_format": "bin", "max_tokens": 9000, "val_fraction": 0.3}
    folders = [build(tmp_path / f"out{n}", num_workers=n, **flags) for n in (1, 2, 3)]
    assert contents(folders[0]) == contents(folders[1]) == contents(folders[2])
    assert [tokens_of(folders[2], split) for split in ("train", "val")] == list(
        slow_build(DOCUMENTS, encoding, 0.3, max_tokens=9000))


def test_big_row_groups_are_read_in_pieces(tmp_path, monkeypatch):
    source = write_input(tmp_path / "in", "parquet", DOCUMENTS)
    whole = build(tmp_path / "whole", input=source)
    monkeypatch.setattr(documents, "CHUNK_BYTES", 500)
    monkeypatch.setattr(documents, "BIG", 1000)
    assert len(list(documents.parquet_chunks(source, "text"))) > 8
    pieces = build(tmp_path / "pieces", input=source)
    for folder in (whole, pieces):  # its manifest says in which chunk each shard begins
        assert (folder / "manifest.json").unlink() is None
    assert contents(pieces) == contents(whole)


def test_sliced_arrays_and_bytes_under_nulls():
    array = pa.array(["zero", "one", None, "", "four", "five"])
    for kind in (pa.string(), pa.large_string()):
        got = documents.arrow_documents(array.cast(kind)[1:5], "row ", 11)
        assert got.text.tobytes() == b"onefour" and got.offsets.tolist() == [0, 3, 3, 7]
        assert list(got.numbers) == [11, 13, 14] and got.bad == [("row 12", "null, wanted text")]
        got = documents.arrow_documents(array.cast(kind)[3:], "row ", 0)  # and without a null
        assert got.text.tobytes() == b"fourfive" and got.offsets.tolist() == [0, 0, 4, 8]
        assert list(got.numbers) == [0, 1, 2] and not got.bad
    buffers = [pa.py_buffer(b"\x05"), *pa.array(["ab", "hidden", "c"]).buffers()[1:]]  # bits: 1, null, 1
    got = documents.arrow_documents(pa.Array.from_buffers(pa.string(), 3, buffers), "", 0)
    assert got.text.tobytes() == b"abc" and got.offsets.tolist() == [0, 2, 3]
    for values, left in (([], 0), ([None, None], 0), (["", ""], 2)):
        got = documents.arrow_documents(pa.array(values, pa.string()), "", 0)
        assert len(got.text) == 0 and got.offsets.tolist() == [0] * (left + 1)


@given(st.lists(st.binary(max_size=40), max_size=8))
@settings(deadline=None)
def test_hash_equals_its_slow_twin(docs):
    text, offsets = documents.pack(docs)
    assert documents.hash_documents(text, offsets).tolist() == [slow_hash(document) for document in docs]


def test_hash_is_fair():
    """Near-equal documents fall on the two sides as often as val_fraction says."""
    docs = [b"document number %d" % i for i in range(100_000)]
    share = (documents.hash_documents(*documents.pack(docs)) < np.uint64(0.01 * 2.0**64)).mean()
    assert abs(share - 0.01) < 0.0016  # 5 standard errors


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


# ---- a corpus that a hash cannot split -----------------------------------------


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
@pytest.mark.parametrize("count", [1, 3])
def test_few_documents_are_cut_at_a_line(tmp_path, encoding, kind, count, monkeypatch):
    monkeypatch.setattr(documents, "CHUNK_BYTES", 100)  # every document is its own chunk
    docs = [b"".join(b"%d: line %d\n" % (d, i) for i in range(500)) for d in range(count)]
    folder = build(tmp_path / "out", input=write_input(tmp_path / "in", kind, docs), val_fraction=0.01)
    cut = docs[-1].rindex(b"\n", 0, len(docs[-1]) - int(0.01 * sum(map(len, docs))) + 8) + 1
    train, val = tokens_of(folder, "train"), tokens_of(folder, "val")
    text = encoding.decode(val[1:]).encode()
    assert docs[-1].endswith(text) and docs[-1][:-len(text)].endswith(b"\n") and val[0] == EOT
    assert abs(len(text) - 0.01 * sum(map(len, docs))) < 12, cut  # to the nearest line
    expected = [EOT, *encoding.encode_ordinary(docs[-1][:-len(text)].decode())]
    assert train[-len(expected):] == expected and train.count(EOT) == count and val.count(EOT) == 1
    assert read_manifest(folder)["documents"] == count + 1 and read_manifest(folder)["cut"]["at_byte"] > 0


def test_cut_removes_the_shards_of_the_first_pass(tmp_path):
    folder = build(tmp_path / "out", input=write_input(tmp_path / "in", "txt", [b"some words\n" * 1000]),
                   shard_tokens=100, val_fraction=0.5)
    assert {f["file"] for f in read_manifest(folder)["files"]} == contents(folder).keys() - {"manifest.json"}


@pytest.mark.parametrize("text, near, span, cut", [
    (b"one\ntwo\nthree", 9, 5, 8), (b"one\ntwo\nthree", 5, 5, 4), (b"one\ntwo\nthree", 7, 5, 8),
    (b"title\n" + b"x" * 100, 90, 16, 90),          # the only line boundary is far away
    (b"x" * 90 + b"\n", 88, 9, 88),                 # nothing would be left behind the last newline
    ("é".encode() * 10, 11, 3, 12),                 # not inside a character
])
def test_cut_point(text, near, span, cut):
    assert fineweb.cut_point(text, near, span) == cut


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_cut_with_equal_documents_and_max_tokens(tmp_path, encoding, kind, monkeypatch):
    monkeypatch.setattr(documents, "CHUNK_BYTES", 10)  # parquet: pieces of a chunk beyond the last token
    source = write_input(tmp_path / "in", kind, [b"same\nsame\n"] * 50)
    folder = build(tmp_path / "out", input=source, max_tokens=60, val_fraction=0.2)
    train, val = tokens_of(folder, "train"), tokens_of(folder, "val")
    length = 1 + len(encoding.encode_ordinary("same\nsame\n"))
    text = encoding.decode([i for i in train + val if i != EOT])
    assert text == "same\nsame\n" * -(-60 // length) and val and train


def test_shakespeare(tmp_path, shared_data, encoding):
    source = shared_data / "shakespeare" / "input.txt"
    folder = build(tmp_path / "out", input=source, val_fraction=0.01, shard_tokens=10**8)
    train, val = tokens_of(folder, "train"), tokens_of(folder, "val")
    assert encoding.decode(train[1:]) + encoding.decode(val[1:]) == source.read_text(encoding="utf-8")
    assert encoding.decode(train).endswith("\n") and 0.008 < len(val) / len(train) < 0.012
    assert len(train) + len(val) == 338_027  # 338,025 of the whole text, and one <|endoftext|> for each side


def test_no_validation(tmp_path, encoding):
    source = write_input(tmp_path / "in", "txt", [b"one document"])
    folder = build(tmp_path / "out", input=source, val_fraction=0)
    assert tokens_of(folder, "train") == [EOT, *encoding.encode_ordinary("one document")]
    assert list_shards(folder, "val") == []


# ---- max_tokens ----------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [1, 500, 3000, 10**9])
def test_max_tokens_ends_with_the_document_that_reaches_it(tmp_path, encoding, max_tokens):
    docs = DOCUMENTS[12:] + DOCUMENTS[:12]
    val_fraction = 0.5 if max_tokens > 1 else 0  # a single document would be cut
    source = write_input(tmp_path / "in", "jsonl", docs)
    folder = build(tmp_path / "out", input=source, max_tokens=max_tokens, val_fraction=val_fraction)
    train, val = slow_build(docs, encoding, val_fraction, max_tokens)
    assert tokens_of(folder, "train") == train and tokens_of(folder, "val") == val


# ---- bad input -----------------------------------------------------------------


def good_parquet(path):
    pq.write_table(pa.table({"text": ["a b c"] * 3000, "n": range(3000)}), path, compression="none")
    return path.read_bytes()


@pytest.mark.parametrize("name, content, flags, words", [
    ("a.txt", b"", {}, ["corpus without text"]),
    ("a.jsonl", b"\n\n", {}, ["corpus without text"]),
    ("a.jsonl", b'{"text": ""}\n{"text": ""}\n', {}, ["corpus without text", "2 empty"]),
    ("a.jsonl", b'{"text": "a"}\n{"text": null}\n', {}, ["a.jsonl, line 2: wanted an object with a string"]),
    ("a.jsonl", b'{"text": "a\\ud800"}\n', {}, ["line 1: half of a surrogate pair"]),
    ("a.txt", b"caf\xe9 \xff\xfe ok", {}, ["a.txt: not UTF-8: invalid continuation byte at byte 3"]),
    ("a.txt", b"x", {}, ["1 bytes", "--val_fraction=0"]),
    ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', {}, ["a.jsonl, line 2: not JSON"]),
    ("a.jsonl", b'{"text": "a"}\n\n\xff\n', {}, ["a.jsonl, line 3: not JSON"]),
    ("a.jsonl", b'{"body": "a"}\n', {}, ["line 1: got fields body", "--text_column"]),
    ("a.jsonl", b'["text"]\n', {}, ["line 1: wanted an object", "'text'"]),
    ("a.jsonl", b'{"text": 3}\n', {}, ["line 1: wanted an object"]),
    ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-20], {},
     ["a.jsonl.gz, from line 1 on: damaged"]),
    ("a.jsonl.gz", b'{"text": "a"}\n', {}, ["a.jsonl.gz, from line 1 on: damaged"]),
    ("a.jsonl.zst", b"nonsense", {}, ["a.jsonl.zst, from line 1 on: damaged"]),
    ("a.parquet", b"PAR1 nonsense PAR1", {}, ["a.parquet: no parquet file"]),
    ("a.parquet", good_parquet, {"text_column": "body"}, ["got columns text, n", "--text_column"]),
    ("a.parquet", good_parquet, {"text_column": "n"}, ["type int64", "--text_column"]),
    ("a.pdf", b"x", {}, ["got a.pdf", ".parquet, .jsonl, .jsonl.gz, .jsonl.zst, .txt"]),
    ("b.txt", b"x", {"input": "nowhere/*.txt"}, ["nowhere/*.txt", "no such files"]),
    ("a.txt", b"x", {"dataset": "wiki"}, ["'wiki'", "fineweb-edu, fineweb, python", "--input"]),
])
def test_bad_input_is_named_and_nothing_is_left(tmp_path, name, content, flags, words):
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / name
    path.write_bytes(content(path) if callable(content) else content)
    with pytest.raises(UserError) as error:
        build(tmp_path / "out", **{"input": path, **flags})
    for word in words:
        assert word in str(error.value)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_bad_line_of_a_later_chunk_has_its_number(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "CHUNK_BYTES", 50)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "some words"}\n' * 40 + b"{\n")
    with pytest.raises(UserError, match=r"a\.jsonl, line 41: not JSON"):
        build(tmp_path / "out", input=tmp_path / "a.jsonl")


@pytest.mark.parametrize("num_workers", [1, 2])
def test_damaged_row_group_is_named(tmp_path, num_workers):
    path = tmp_path / "a.parquet"
    content = bytearray(good_parquet(path))
    content[4:40] = b"\xff" * 36  # the first page header
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.parquet, row group 0, rows 0 to 2999: damaged"):
        build(tmp_path / "out", input=path, num_workers=num_workers)


def test_input_takes_lists_globs_and_folders(tmp_path, encoding):
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    for name in ("b.txt", "a.txt", "deep/c.txt", "notes.pdf"):
        (folder / name).write_text(f"text of {name}", encoding="utf-8")
    (tmp_path / "d.jsonl").write_text('{"text": "text of d"}', encoding="utf-8")
    for i, (names, order) in enumerate([([folder], "a.txt b.txt deep/c.txt"),
                                        ([tmp_path / "d.jsonl", folder / "a.txt"], "d a.txt"),
                                        ([folder / "*.txt", folder], "a.txt b.txt deep/c.txt")]):
        out = build(tmp_path / f"out{i}", input=",".join(map(str, names)), val_fraction=0)
        text = encoding.decode(tokens_of(out, "train"))
        assert text == "".join(f"<|endoftext|>text of {name}" for name in order.split())


def test_large_vocabularies_are_refused(tmp_path, monkeypatch):
    class Large:
        name, n_vocab = "large", 100_256

    monkeypatch.setattr(fineweb, "tokenizer_of", lambda _: Large)
    with pytest.raises(UserError, match="100,256"):
        build(tmp_path / "out", input="x")


# ---- folders that hold something -----------------------------------------------


def test_existing_folders(tmp_path, capsys):
    source = write_input(tmp_path / "in", "parquet", DOCUMENTS)
    folder = build(tmp_path / "out", input=source)
    before = contents(folder)
    build(folder, input=source, num_workers=2)
    assert "already built" in capsys.readouterr().out and contents(folder) == before
    with pytest.raises(UserError, match=r"finished build.* got max_tokens=0, wanted 5; .*--data_dir"):
        build(folder, input=source, max_tokens=5)
    (folder / "manifest.json").unlink()  # as build-nanogpt would leave it
    with pytest.raises(UserError, match=r"holds shards already.*--data_dir"):
        build(folder, input=source)
    (folder / "build.json").write_text('{"settings": {}, "command": "python fineweb.py"}', encoding="utf-8")
    with pytest.raises(UserError, match=r"unfinished build by other settings.*--data_dir"):
        build(folder, input=source)
    assert contents(folder).items() >= {k: v for k, v in before.items() if k != "manifest.json"}.items()
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="cannot make the folder"):
        build(tmp_path / "file", input=source)


@pytest.mark.parametrize("kind, flags", [
    ("parquet", {}), ("jsonl.gz", {"max_tokens": 9000, "val_fraction": 0.3}),
    ("txt", {"val_fraction": 0.4, "shard_format": "bin"}),
    ("few", {"val_fraction": 0.2}), ("few", {"val_fraction": 0.2, "max_tokens": 4000})])
def test_missing_shards_are_made_again_and_nothing_else(tmp_path, kind, flags, monkeypatch, capsys):
    monkeypatch.setattr(documents, "CHUNK_BYTES", 3000)
    few = [b"".join(b"%d: line %d\n" % (d, i) for i in range(500)) for d in range(3)]
    corpus = ("jsonl", few) if kind == "few" else (kind, DOCUMENTS)
    source = write_input(tmp_path / "in", *corpus)
    folder = build(tmp_path / "out", input=source, **flags)
    assert (read_manifest(folder)["cut"] is not None) == (kind == "few")
    before = contents(folder)
    shards = list_shards(folder, "train") + list_shards(folder, "val")
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    for some in ([shards[0], shards[-1]], shards[1::3], shards):
        for path in some:
            path.unlink()
        build(folder, input=source, **flags)
        out = capsys.readouterr().out
        assert contents(folder) == before and out.count("again") == len(some) and "already built" in out
        if some is not shards:
            assert all(path.stat().st_mtime_ns == times[path] for path in set(shards) - set(some))
            times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_a_shard_that_comes_out_different_is_not_kept(tmp_path, monkeypatch):
    folder = build(tmp_path / "out", input=write_input(tmp_path / "in", "parquet", DOCUMENTS))
    list_shards(folder, "train")[2].unlink()
    monkeypatch.setattr(fineweb, "cut_documents", None)
    monkeypatch.setattr(fineweb, "hash_documents", lambda _, offsets: np.zeros(len(offsets) - 1, np.uint64))
    with pytest.raises(UserError, match=r"_train_000002\.npy came out with sha256 .*another --data_dir"):
        build(folder, input=tmp_path / "in" / "corpus.parquet")
    assert not (folder / "text_train_000002.npy").exists() and not list(folder.glob("*.tmp"))


def test_full_disk(tmp_path):
    source = write_input(tmp_path / "in", "jsonl", DOCUMENTS)
    command = ["bash", "-c", 'ulimit -f 4; exec "$@"', "-", *fineweb_command(tmp_path / "out", input=source,
                                                                             shard_tokens=10_000)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120,
                          env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
    assert done.returncode == 2 and "no space" in done.stderr, done
    assert not list((tmp_path / "out").iterdir())


# ---- processes that die --------------------------------------------------------


@pytest.fixture(scope="module")
def large_input(tmp_path_factory):
    """20 MB of jsonl: some seconds of work, in several chunks."""
    path = tmp_path_factory.mktemp("large") / "large.jsonl"
    line = " ".join(f"word{i % 977}" for i in range(20_000))
    path.write_text("".join(f"{json.dumps({'text': f'{i} {line}'})}\n" for i in range(120)), encoding="utf-8")
    return path


def is_running(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    return False


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.005)
    return result


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_killed_worker_is_an_error_and_the_rerun_is_identical(tmp_path, large_input):
    """Also one that dies while the pool still starts others, for which CPython's pool waits for ever."""
    flags = {"input": large_input, "num_workers": 8, "shard_tokens": 200_000}
    for _ in range(4):
        process = subprocess.Popen(fineweb_command(tmp_path / "out", **flags), stderr=subprocess.PIPE,
                                   text=True, encoding="utf-8")
        os.kill(wait_for(functools.partial(kill_build.children, process.pid))[0], signal.SIGKILL)
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 2 and "worker processes died" in stderr, stderr
        assert "--num_workers" in stderr
    expected = contents(build(tmp_path / "whole", **{**flags, "num_workers": 1}))
    assert contents(build(tmp_path / "out", **flags)) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_killed_build_goes_on_and_is_identical(tmp_path, large_input):
    out, flags = tmp_path / "out", {"input": large_input, "num_workers": 2, "shard_tokens": 20_000}
    process = subprocess.Popen(fineweb_command(out, **flags), stderr=subprocess.DEVNULL)
    wait_for(lambda: list(out.glob("progress_00000.part")))
    workers = kill_build.children(process.pid)
    process.kill()
    process.wait()
    assert (out / "build.json").exists() and not (out / "manifest.json").exists() and workers
    first = list_shards(out, "train")[0]
    written = first.stat().st_mtime_ns
    wait_for(lambda: not any(is_running(pid) for pid in workers))
    with pytest.raises(UserError, match=r"unfinished build; run it again: python fineweb\.py") as error:
        TokenStream(out, "train")
    assert f"--input={large_input}" in str(error.value) and f"--data_dir={out}" in str(error.value)
    with pytest.raises(UserError, match="other settings"):
        build(out, **{**flags, "max_tokens": 5})
    (out / "text_train_999999.npy.77.tmp").write_bytes(b"torn")  # as a kill in the middle of a write does
    (out / "mine.txt").write_text("kept", encoding="utf-8")
    assert run(out, **{**flags, "num_workers": 1}).returncode == 0
    assert first.stat().st_mtime_ns == written
    assert contents(out).pop("mine.txt") and (out / "mine.txt").unlink() is None
    assert contents(out) == contents(build(tmp_path / "whole", **{**flags, "num_workers": 1}))


# ---- the embedded corpus -------------------------------------------------------


def test_python_corpus_is_deterministic(tmp_path, encoding, monkeypatch):
    stdlib = documents.sysconfig.get_path("stdlib")  # alone: the test reads it three times
    monkeypatch.setattr(documents.sysconfig, "get_path", lambda _: stdlib)
    flags = {"dataset": "python", "max_tokens": 50_000, "shard_tokens": 10**6}
    first, second = build(tmp_path / "a", **flags), build(tmp_path / "b", **flags)
    assert contents(first) == contents(second) and 50_000 <= read_manifest(first)["tokens"] < 400_000
    assert contents(build(tmp_path / "c", **{**flags, "seed": 2})) != contents(first)
    text = encoding.decode(tokens_of(first, "train"))
    assert "def " in text and "import " in text and len(tokens_of(first, "val")) > 0
    docs = text.split("<|endoftext|>")[1:]
    assert len(set(docs)) == len(docs)


def test_python_corpus_order_is_not_the_file_systems(tmp_path, monkeypatch):
    for name in ("lib/b.py", "lib/a.py", "lib/site-packages/no.py", "lib/__pycache__/no.py",
                 "packages/c/README.md", "packages/.hidden/no.py", "packages/copy_of_a.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {'lib/a.py' if 'copy' in name else name}\n" * 20, encoding="utf-8")
    (tmp_path / "lib/table.txt").write_text("1234 5678\n" * 100, encoding="utf-8")
    monkeypatch.setattr(documents.sysconfig, "get_path",
                        lambda key: tmp_path / ("lib" if key == "stdlib" else "packages"))
    monkeypatch.setattr("pydoc_data.topics.topics", {"for": "The for statement\n"})

    def order():
        source = documents.python_source(seed=3)
        assert source.facts == {"documents": 4, "files_left_out": 1}
        return [bytes(docs.text[a:b]).splitlines()[0] for _, _, chunk in source.chunks()
                for docs in chunk.read(*chunk.args) for a, b in itertools.pairwise(docs.offsets)]

    once, walk = order(), os.walk
    assert sorted(once) == [b"The for statement", b"text of lib/a.py", b"text of lib/b.py",
                            b"text of packages/c/README.md"]

    def backwards(root):
        for folder, subfolders, names in walk(root):
            yield folder, subfolders, names[::-1]
            subfolders.reverse()

    monkeypatch.setattr(documents.os, "walk", backwards)
    assert order() == once


@pytest.mark.parametrize("text, worth", [
    (b"def f(x):\n    return x\n" * 20, True), (b"short", False), (b"def f(): pass\n" * 50_000, False),
    (b"x = 1\n" + b"a" * 2000 + b"\n", False), (b"0.123, 4.567,\n" * 50, False),
    (b"caf\xe9 words\n" * 50, False),
])
def test_worth_learning(text, worth):
    assert documents.worth_learning(text) == worth


def test_ids_of_the_whole_embedded_corpus_are_tiktokens():
    """Every document of this Python installation: 100M tokens where torch and numba are installed."""
    tok = load_tokenizer("gpt2")
    encoding, n_documents = tok.to_tiktoken(), 0
    source = documents.python_source(seed=0)
    for _, _, chunk in source.chunks():
        for docs in chunk.read(*chunk.args):
            ids, id_offsets = tok.encode_documents(docs.text, docs.offsets)
            for d in range(len(docs.offsets) - 1):
                document = docs.text[docs.offsets[d]:docs.offsets[d + 1]].tobytes().decode("utf-8")
                expected = encoding.encode_to_numpy(document, disallowed_special=())
                assert ids[id_offsets[d]] == tok.eot
                assert np.array_equal(ids[id_offsets[d] + 1:id_offsets[d + 1]], expected), document[:200]
                n_documents += 1
    assert n_documents == source.facts["documents"] > 1000
