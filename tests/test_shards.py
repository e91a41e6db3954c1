"""shards.py: what is written is what is read, damage is refused, an epoch uses every window exactly once."""
import hashlib
import itertools
import json
import re
import shutil
import struct
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import files
import shards
from configurator import UserError
from shards import (
    TokenStream,
    WindowLoader,
    list_shards,
    permute,
    read_manifest,
    read_shard,
    write_manifest,
    write_shard,
)


@pytest.fixture(scope="module", autouse=True)
def no_fsync():
    """Hundreds of tiny files: waiting for the disk would be all that these tests do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.os, "fsync", lambda _: None)
        yield


TOKENIZER = {"name": "gpt2", "sha256": 64 * "0", "n_vocab": 50257}


def ids_of(*ids):
    return np.array(ids, dtype=np.uint16)


def zeros(count):
    return np.zeros(count, dtype=np.uint16)


def make_folder(folder, sizes, split="train", suffix=".npy", first=0):
    """Shards that together hold first, first + 1, ... modulo 65,536, so that a token tells its position."""
    folder.mkdir(exist_ok=True)
    for i, size in enumerate(sizes):
        ids = (np.arange(first, first + size) % 65_536).astype(np.uint16)
        write_shard(folder / f"x_{split}_{i:06d}{suffix}", ids)
        first += size
    return folder


# ---- one file ------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".npy", ".bin"])
@pytest.mark.parametrize("size", [0, 1, 1000])
def test_round_trip(tmp_path, suffix, size):
    ids = np.random.default_rng(size).integers(0, 65_536, size).astype(np.uint16)
    record = write_shard(tmp_path / f"x_train_000000{suffix}", ids[:1], ids[1:1], ids[1:300], ids[300:])
    path = tmp_path / record["file"]
    assert record["tokens"] == size and record["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    back = read_shard(path)
    assert back.dtype == np.uint16 and np.array_equal(back, ids) and not back.flags.writeable
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # no temporary file stays


def test_npy_is_numpys_own_format(tmp_path):
    write_shard(tmp_path / "x_train_000000.npy", ids_of(1, 2, 65_535))
    np.save(tmp_path / "numpy.npy", np.array([1, 2, 65_535], dtype=np.uint16))
    assert (tmp_path / "x_train_000000.npy").read_bytes() == (tmp_path / "numpy.npy").read_bytes()


def test_bin_is_llm_c_format(tmp_path):
    write_shard(tmp_path / "x_train_000000.bin", ids_of(1, 2, 50_256))
    expected = struct.pack("<256i", 20240520, 1, 3, *[0] * 253) + struct.pack("<3H", 1, 2, 50_256)
    assert (tmp_path / "x_train_000000.bin").read_bytes() == expected


@pytest.mark.parametrize("ids", [np.array([65_536]), np.array([-1]), np.array([1.0]), ids_of([1, 2])])
def test_ids_of_another_type_are_refused(tmp_path, ids):
    with pytest.raises(TypeError, match="must be uint16"):
        write_shard(tmp_path / "x_train_000000.npy", ids_of(1), ids)
    assert not list(tmp_path.iterdir())


def bin_file(magic=20240520, version=1, count=4, tokens=4):
    return struct.pack("<256i", magic, version, count, *[0] * 253) + bytes(2 * tokens)


@pytest.mark.parametrize("content, reason", [
    (bin_file(magic=20240522), "20240522"),
    (bin_file(version=2), r"\[20240520, 2, 4\]"),
    (bin_file(count=5), "1,032 bytes instead of 1,034"),
    (bin_file(tokens=5), "1,034 bytes instead of 1,032"),
    (bin_file(count=-1), r"\[20240520, 1, -1\]"),
    (bin_file()[:-1], "1,031 bytes"),
    (bin_file()[:100], "100 bytes"),
    (b"", "header"),
])
def test_corrupt_bin_is_refused(tmp_path, content, reason):
    path = tmp_path / "x_train_000000.bin"
    path.write_bytes(content)
    with pytest.raises(UserError, match=reason) as error:
        read_shard(path)
    assert str(path) in str(error.value) and "again" in str(error.value)


@pytest.mark.parametrize("array", [np.zeros((2, 2), np.uint16), np.zeros(4, np.int32), np.zeros(4, ">u2")])
def test_npy_of_another_kind_is_refused(tmp_path, array):
    np.save(tmp_path / "x_train_000000.npy", array)
    with pytest.raises(UserError, match="one dimension"):
        read_shard(tmp_path / "x_train_000000.npy")


@pytest.mark.parametrize("keep, then", [(0, b""), (3, b""), (60, b""), (128, b""), (130, b""), (137, b""),
                                        (8, b"\x77\0"), (127, b" ")])  # a wrong length, and no line end
def test_npy_cut_or_changed_is_refused(tmp_path, keep, then):
    path = tmp_path / "x_train_000000.npy"
    write_shard(path, zeros(5))  # 128 bytes of header, 10 of ids
    data = path.read_bytes()
    path.write_bytes(data[:keep] + then + (data[keep + len(then):] if then else b""))
    with pytest.raises(UserError, match=path.name):
        read_shard(path)


@pytest.mark.parametrize("header", [
    "{'descr': '<u2', 'fortran_order': False, 'shape': (-5,), }", "{'descr': '<u2', 'shape': (5,), }",
    "{'descr': '<u2', 'fortran_order': False, 'shape': (%s,), }" % (9 * "9"), "[" * 3000, "9" * 5000,
])
def test_corrupt_npy_headers_are_refused(tmp_path, header):
    path = tmp_path / "x_train_000000.npy"
    start = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1)
    path.write_bytes(start + header.encode() + b"\n" + bytes(10))
    with pytest.raises(UserError, match=path.name):
        read_shard(path)


# ---- a folder of them ----------------------------------------------------------


def test_split_is_a_field_of_the_name(tmp_path):
    for name in ["val_set_train_000001.npy", "edu_fineweb_train_000000.npy", "x_train_000002.bin",
                 "retrain_000001.npy", "x_train_000000.npy.123.tmp", "x_train_notes.npy", "x_val_000000.npy",
                 "training.bin", "x_train.txt"]:
        (tmp_path / name).write_bytes(b"")
    assert [p.name for p in list_shards(tmp_path, "train")] == [
        "edu_fineweb_train_000000.npy", "val_set_train_000001.npy", "x_train_000002.bin"]
    assert [p.name for p in list_shards(str(tmp_path), "val")] == ["x_val_000000.npy"]
    assert list_shards(tmp_path / "nowhere", "train") == []


@pytest.mark.parametrize("train, val", [
    # build-nanogpt; llm.c and modded-nanogpt; llm.c's small sets
    (["edufineweb_train_000001.npy", "edufineweb_train_000002.npy"], "edufineweb_val_000000.npy"),
    (["fineweb_train_000001.bin", "fineweb_train_000002.bin"], "fineweb_val_000000.bin"),
    (["tiny_shakespeare_train.bin"], "tiny_shakespeare_val.bin"),
    (["TinyStories_train.bin"], "TinyStories_val.bin"),
    (["train.bin"], "val.bin"),  # a name of nanoGPT's, but with llm.c's header
])
def test_folders_of_other_projects(tmp_path, train, val):
    for i, name in enumerate(train):
        write_shard(tmp_path / name, np.arange(100 * i, 100 * i + 100, dtype=np.uint16))
    write_shard(tmp_path / val, zeros(7))
    stream = TokenStream(tmp_path, "train")
    assert np.array_equal(stream.read(0, len(stream)), np.arange(100 * len(train)))
    assert stream.manifest is None
    assert len(TokenStream(tmp_path, "val")) == 7


@pytest.mark.parametrize("size", [0, 1, 1000])
def test_nanogpts_files_have_no_header(tmp_path, size):
    ids = np.random.default_rng(size).integers(0, 50_257, size).astype(np.uint16)
    ids.tofile(tmp_path / "train.bin")
    assert np.array_equal(read_shard(tmp_path / "train.bin"), ids)
    stream = TokenStream(tmp_path, "train")
    assert np.array_equal(stream.read(0, len(stream)), ids)
    (tmp_path / "train.bin").write_bytes(bytes(2 * size + 1))
    with pytest.raises(UserError, match=r"train\.bin: has .* bytes instead of"):
        TokenStream(tmp_path, "train")


@pytest.mark.parametrize("names, words", [
    (["a_train_000000.npy", "b_train_000001.npy"], "a_train_000000.npy, b_train_000001.npy: keep one kind"),
    (["a_train_000000.npy", "b_val_000000.npy"], "a_train_000000.npy, b_val_000000.npy: keep one kind"),
    (["a_train_000000.npy", "a_train_000000.bin"], "keep one kind"),
    (["a_train_000001.bin", "a_val_000000.npy"], "keep one kind"),
    (["a_train_000000.bin", "train.bin"], "keep one kind"),
    (["a_train_000001.bin", "a_train_000003.bin"], "a_train_000003.bin: expected number 2 here"),
    (["a_train_000002.bin", "a_train_000003.bin"], "a_train_000002.bin: expected number 1 here"),
    (["a_train_000000.bin", "a_train_0.bin"], "a_train_000000.bin: expected number 1 here"),
])
def test_shards_that_do_not_belong_together(tmp_path, names, words):
    for name in names:
        write_shard(tmp_path / name, zeros(5))
    with pytest.raises(UserError, match=re.escape(words)):
        TokenStream(tmp_path, "train")


def test_no_shards_names_the_ways_to_get_some(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError) as error:
            TokenStream(folder, "train")
        assert str(folder) in str(error.value) and "build it: make prepare" in str(error.value)
    make_folder(tmp_path, [10])
    with pytest.raises(UserError, match=r"has no val shards .* fineweb\.py --val_fraction=0\.01 --data_dir="):
        TokenStream(tmp_path, "val")


def describe(files, **more):
    """A manifest as fineweb.py writes it."""
    totals = {"documents": 2, "tokens": 20, "text_bytes": 70}
    return {"tokenizer": TOKENIZER, "eot": 50256, "settings": {"dataset": "Käse", "input": ["a", "b"]},
            "source": {}, **totals, "splits": {"train": totals, "val": totals}, "empty_documents": 3,
            "bad_documents": 4, "files": files, **more}


def test_manifest(tmp_path):
    records = [write_shard(tmp_path / f"x_train_{i:06d}.npy", zeros(10)) for i in (0, 3)]
    records.append(write_shard(tmp_path / "x_val_000000.npy", zeros(4)))
    write_manifest(tmp_path, describe(records))
    stream = TokenStream(tmp_path, "train")
    assert stream.manifest == read_manifest(tmp_path, built=True) == {"format": 1, **describe(records)}
    assert len(stream.fingerprint) == 16
    assert stream.fingerprint == TokenStream(tmp_path, "train").fingerprint
    assert stream.fingerprint != TokenStream(tmp_path, "val").fingerprint

    write_shard(tmp_path / "x_train_000002.npy", zeros(10))
    with pytest.raises(UserError, match=r"x_train_000002\.npy is not in"):
        TokenStream(tmp_path, "train")
    (tmp_path / "x_train_000002.npy").unlink()
    write_shard(tmp_path / "x_train_000003.npy", zeros(9))
    with pytest.raises(UserError, match="has 9 tokens, in the manifest 10"):
        TokenStream(tmp_path, "train")
    (tmp_path / "x_train_000003.npy").unlink()
    with pytest.raises(UserError, match=r"x_train_000003\.npy is in the manifest but missing"):
        TokenStream(tmp_path, "train")


RECORD = {"file": "x_train_0.npy", "tokens": 9, "sha256": 64 * "0"}


@pytest.mark.parametrize("manifest", [
    [], {"format": 1}, {"format": 2, "tokenizer": TOKENIZER, "files": [RECORD]},
    *({"format": 1, "tokenizer": tokenizer, "files": files} for tokenizer, files in [
        ({"name": "x"}, []), (TOKENIZER, [{}]), (TOKENIZER, [{**RECORD, "tokens": -1}]),
        (TOKENIZER, [{**RECORD, "sha256": 64 * "g"}]),
        *((TOKENIZER, [{**RECORD, "file": name}]) for name in (
            "../x_train_0.npy", "/x_train_0.npy", "x_train_0.npy/..", "c:x_train_0.npy", "notes", ".."))])])
def test_manifests_that_are_refused(tmp_path, manifest):
    make_folder(tmp_path, [9])
    (tmp_path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(UserError, match=r"manifest\.json.*; build the data again"):
        TokenStream(tmp_path, "train")


def test_training_needs_little_of_a_manifest(tmp_path):
    """A tool of another kind, or an earlier version of this one, may have written it."""
    records = [write_shard(tmp_path / "x_train_000000.npy", zeros(10))]
    write_manifest(tmp_path, {"tokenizer": {"name": "x", "sha256": 64 * "0"}, "files": records})
    assert len(TokenStream(tmp_path, "train")) == 10
    with pytest.raises(UserError, match="is missing; build the data again"):
        read_manifest(tmp_path, built=True)


def test_manifests_of_several_machines(tmp_path):
    """Each wrote every third shard: one manifest, once all are there and agree."""
    parts = [[write_shard(tmp_path / f"x_train_{number:06d}.npy", np.full(10, number, dtype=np.uint16))
              for number in range(rank, 7, 3)] for rank in range(3)]
    for rank in (2, 0):
        write_manifest(tmp_path, describe(parts[rank]), rank, 3)
    with pytest.raises(UserError, match=r"no manifest_1_of_3\.json: that machine has not finished"):
        TokenStream(tmp_path, "train")
    write_manifest(tmp_path, describe(parts[1]), 1, 3)
    stream = TokenStream(tmp_path, "train")
    assert stream.read(0, 70).tolist() == np.repeat(np.arange(7), 10).tolist()
    totals = {"documents": 6, "tokens": 60, "text_bytes": 210}
    together = sorted(itertools.chain(*parts), key=lambda record: record["file"])
    assert stream.manifest == {"format": 1, **describe(
        together, **totals, splits={"train": totals, "val": totals}, empty_documents=9, bad_documents=12)}
    for other in ({"settings": {}}, {"tokenizer": {**TOKENIZER, "sha256": 64 * "1"}}, {"eot": 5}):
        write_manifest(tmp_path, describe(parts[1], **other), 1, 3)
        with pytest.raises(UserError, match=f"{next(iter(other))} is .* in manifest_1_of_3"):
            read_manifest(tmp_path)
    write_manifest(tmp_path, {"tokenizer": TOKENIZER, "files": parts[1]}, 1, 3)
    with pytest.raises(UserError, match=r"manifest_1_of_3\.json: .* is missing"):
        read_manifest(tmp_path)


def test_verify(tmp_path):
    """A zeroed shard of the same size, and two swapped ones, by each process that reads a part of them."""
    records = [write_shard(tmp_path / f"x_train_{i:06d}.npy", np.full(10, i, np.uint16)) for i in range(5)]
    write_manifest(tmp_path, describe(records))
    stream = TokenStream(tmp_path, "train")
    stream.verify()
    write_shard(stream.paths[3], zeros(10))
    for part in (1, 2):
        stream.verify(part, 3)
    with pytest.raises(UserError, match=r"x_train_000003\.npy: its sha256 is not that of the manifest"):
        stream.verify(0, 3)  # shards 0 and 3
    stream.paths[1].rename(stream.paths[3])
    write_shard(stream.paths[1], np.full(10, 3, np.uint16))
    with pytest.raises(UserError, match=r"x_train_000001\.npy: its sha256"):
        stream.verify()
    assert TokenStream(tmp_path, "train").fingerprint == stream.fingerprint  # which sees sizes only


def test_fingerprint_follows_the_data(tmp_path):
    prints = {TokenStream(make_folder(tmp_path / name, sizes), "train").fingerprint
              for name, sizes in [("a", [10, 10]), ("b", [10, 11]), ("c", [10]), ("d", [11, 10])]}
    assert len(prints) == 4


@pytest.mark.parametrize("name", ["build.json", "build_1_of_2.json"])
def test_unfinished_build_is_refused(tmp_path, name):
    records = [write_shard(tmp_path / "x_train_000000.npy", zeros(10))]
    (tmp_path / name).write_text(json.dumps({"command": "python fineweb.py --x=1"}), encoding="utf-8")
    with pytest.raises(UserError, match=r"unfinished build; run it again: python fineweb\.py --x=1"):
        TokenStream(tmp_path, "train")
    write_manifest(tmp_path, describe(records))
    TokenStream(tmp_path, "train")


@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=8), data=st.data())
@settings(max_examples=60, deadline=None)
def test_stream_reads_across_shards(tmp_path_factory, sizes, data):
    stream = TokenStream(make_folder(tmp_path_factory.mktemp("s"), sizes), "train")
    start = data.draw(st.integers(0, len(stream)))
    count = data.draw(st.integers(0, len(stream) - start))
    tokens = stream.read(start, count)
    assert tokens.dtype == np.uint16 and np.array_equal(tokens, np.arange(start, start + count))
    if start < len(stream):
        path, offset = stream.locate(start)
        assert read_shard(path)[offset] == start
    with pytest.raises(IndexError):
        stream.read(start, len(stream) - start + 1)


def test_a_disk_that_fails_is_an_error_with_the_shards_name(tmp_path, monkeypatch):
    class Broken:
        def seek(self, position):
            pass

        def readinto(self, buffer):
            raise OSError(5, "Input/output error")

    stream = TokenStream(make_folder(tmp_path, [50, 50]), "train")
    monkeypatch.setattr(stream, "_file", lambda i: Broken())
    with pytest.raises(OSError) as raised:
        stream.read(60, 10)
    assert raised.value.filename == str(stream.paths[1])


def test_a_shard_that_shrinks_while_it_is_in_use(tmp_path):
    stream = TokenStream(make_folder(tmp_path, [50, 50]), "train")
    stream.read(0, 100)
    with open(stream.paths[1], "r+b") as file:
        file.truncate(file.seek(0, 2) - 20)
    assert np.array_equal(stream.read(0, 90), np.arange(90))
    with pytest.raises(UserError, match=r"x_train_000001\.npy has become shorter"):
        stream.read(0, 100)


# ---- the order -----------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 9, 10, 16, 17, 1000, 65_537])
@pytest.mark.parametrize("seed, epoch", [(0, 0), (-1, 7), (2**70, 1)])
def test_permutation_is_a_bijection(n, seed, epoch):
    assert np.array_equal(np.sort(permute(np.arange(n), n, seed, epoch)), np.arange(n))


def test_permutation_of_a_trillion():
    n = 10**12
    index = np.unique(np.random.default_rng(0).integers(0, n, 200_000))
    out = permute(index, n, 1, 0)
    assert out.min() >= 0 and out.max() < n and len(np.unique(out)) == len(index)
    assert abs(out.mean() / n - 0.5) < 0.005  # standard error 0.0006


def test_permutation_is_keyed_and_looks_random():
    n = 10_000
    keys = [(0, 0), (0, 1), (1, 0), (11, 0), (1, 10)]
    orders = [permute(np.arange(n), n, seed, epoch) for seed, epoch in keys]
    orders.append(np.arange(n))
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert (a == b).sum() < 10  # 1 expected; more than 10 once in 10 million
            assert abs(np.corrcoef(a, b)[0, 1]) < 0.05  # 5 standard errors
    assert np.array_equal(orders[0][[5, 9]], permute(np.array([5, 9]), n, 0, 0))  # whatever is asked with it


def test_every_order_of_a_few_windows_occurs():
    orders = [tuple(permute(np.arange(3), 3, seed, 0).tolist()) for seed in range(600)]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 6 and min(counts) > 60, counts  # 100 expected of each, standard error 9


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6), T=st.integers(1, 20),
       windows_per_step=st.integers(1, 24), seed=st.integers(0, 2**32), data=st.data())
@settings(max_examples=150, deadline=None)
def test_every_window_once_per_epoch_in_any_world(tmp_path_factory, sizes, T, windows_per_step, seed, data):
    stream = TokenStream(make_folder(tmp_path_factory.mktemp("e"), sizes), "train")
    if len(stream) <= T:
        with pytest.raises(UserError, match="block_size"):
            WindowLoader(stream, T, T, seed, 65_536)
        return
    loader = WindowLoader(stream, T, T * windows_per_step, seed, 65_536)
    n = loader.n_windows
    assert n == (len(stream) - 1) // T and loader.steps_per_epoch == n / windows_per_step
    assert len(stream) - 1 - n * T < T  # what is never a target
    seen = []
    for step in range(-(-2 * n // windows_per_step)):  # two epochs; steps cross the edge between them
        ids = loader.window_ids(step)
        x, y = loader.batch(step, 0, windows_per_step)
        assert x.dtype == y.dtype == np.int64 and x.shape == y.shape == (windows_per_step, T)
        # the tokens are those of the window, over the edges of shards
        assert np.array_equal(x, ids[:, None] * T + np.arange(T)) and np.array_equal(y, x + 1)
        # the same rows, whoever takes them, and in whatever pieces
        world = data.draw(st.sampled_from([w for w in range(1, 9) if windows_per_step % w == 0]))
        share = windows_per_step // world
        micro = data.draw(st.sampled_from([m for m in range(1, share + 1) if share % m == 0]))
        again = WindowLoader(stream, T, T * windows_per_step, seed, 65_536)  # a resume starts here
        pieces = [again.batch(step, first, micro)[0] for first in range(0, windows_per_step, micro)]
        assert np.array_equal(np.concatenate(pieces), x)
        seen += ids.tolist()
    assert sorted(seen[:n]) == sorted(seen[n:2 * n]) == list(range(n))
    if n >= 12:  # 1 in 479 million that two orders are equal by chance
        assert seen[:n] != seen[n:2 * n] and seen[:n] != list(range(n))


def test_validation_order_is_the_files(tmp_path):
    stream = TokenStream(make_folder(tmp_path, [25, 30], "val"), "val")
    loader = WindowLoader(stream, 5, 20, 0, 65_536, shuffle=False)
    ids = [loader.window_ids(step).tolist() for step in range(3)]
    assert ids == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]]


def test_too_little_data(tmp_path):
    stream = TokenStream(make_folder(tmp_path, [256]), "train")
    with pytest.raises(UserError, match=r"have 256 tokens, too few .*--block_size=255 or smaller"):
        WindowLoader(stream, 256, 256, 0, 65_536)
    assert WindowLoader(stream, 255, 255, 0, 65_536).n_windows == 1


def test_ids_beyond_the_vocabulary(tmp_path):
    make_folder(tmp_path, [100, 100])
    stream = TokenStream(tmp_path, "train")
    loader = WindowLoader(stream, 10, 10, 0, n_vocab=150)
    loader.read_windows(np.arange(14))  # reads token 140, the last target of window 13, and not yet 150
    with pytest.raises(UserError) as error:
        loader.read_windows(np.array([3, 14]))
    for word in ("x_train_000001.npy", "got id 150 at token 50", "vocabulary has 150 ids", "--vocab_size"):
        assert word in str(error.value)


def test_targets_are_counted(tmp_path):
    make_folder(tmp_path, [40_000, 60_000])
    loader = WindowLoader(TokenStream(tmp_path, "train"), 10, 10, 0, n_vocab=65_540)
    for n_windows in (1, 1024, 1025, loader.n_windows):
        counts = loader.count_targets(n_windows)
        expected = np.bincount(np.arange(1, 10 * n_windows + 1) % 65_536, minlength=65_540)
        assert counts.dtype == np.int64 and np.array_equal(counts, expected)  # token 0 is no target


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_memory_stays_flat(tmp_path):
    """320 MB of shards, read in random order: what is resident grows by less than 8 MB."""
    make_folder(tmp_path, [20_000_000] * 8)
    code = ("import pathlib, sys, shards\n"
            "loader = shards.WindowLoader(shards.TokenStream(sys.argv[1], 'train'), 256, 16_384, 0, 65_536)\n"
            "def resident(): return int(pathlib.Path('/proc/self/statm').read_text('ascii').split()[1])\n"
            "before = resident()\n"
            "print(max(loader.batch(step, 0, 50) and resident() for step in range(2000)) - before)\n")
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True,
                          encoding="utf-8", cwd=shards.__file__.rpartition("/")[0], check=True)
    assert int(done.stdout) * 4 < 8 * 1024, f"grew by {done.stdout} pages of 4 KiB"


def test_import_is_light():
    """The loader does not pull in torch, numba or Arrow, and prints nothing."""
    code = "import sys, shards; print([m for m in ('torch', 'numba', 'pyarrow', 'tqdm') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8",
                          cwd=shards.__file__.rpartition("/")[0], check=True)
    assert done.stdout == "[]\n"


# ---- a trillion tokens ---------------------------------------------------------

N_SHARDS, SHARD_TOKENS = 10_000, 100_000_000


@pytest.fixture(scope="module")
def huge_folder(tmp_path_factory):
    """10,000 shards of 100M tokens; the disk holds their headers, the rest of each file is a hole."""
    folder = tmp_path_factory.mktemp("huge")
    for i in range(N_SHARDS):
        with open(folder / f"x_train_{i:06d}.bin", "wb") as file:
            file.write(bin_file(count=SHARD_TOKENS, tokens=0))
            file.truncate(1024 + 2 * SHARD_TOKENS)
    yield folder
    shutil.rmtree(folder)  # pytest keeps the folders of three sessions


def count_lines(function):
    """Lines of Python that `function` runs: what it costs, on any machine."""
    lines = 0

    def trace(frame, event, arg):
        nonlocal lines
        lines += event == "line"
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(previous)
    return lines


def peak_memory(function):
    """The most bytes that `function` holds at once, beyond what there was before."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("with_manifest", [False, True])
def test_ten_thousand_shards_open(huge_folder, monkeypatch, with_manifest):
    if with_manifest:
        records = [{"file": path.name, "tokens": SHARD_TOKENS, "sha256": 64 * "0"}
                   for path in huge_folder.iterdir()]
        write_manifest(huge_folder, {"tokenizer": TOKENIZER, "files": records})
    read, opened = shards.read_header, []
    monkeypatch.setattr(shards, "read_header", lambda path: opened.append(path) or read(path))
    peak = peak_memory(lambda: TokenStream(huge_folder, "train"))
    assert peak < 3000 * N_SHARDS, f"{peak:,} bytes for names, sizes and the manifest"
    assert len(opened) == len(set(opened)) == N_SHARDS  # every file once
    stream = TokenStream(huge_folder, "train")
    (huge_folder / "manifest.json").unlink(missing_ok=True)
    assert len(stream) == N_SHARDS * SHARD_TOKENS and (stream.manifest is not None) == with_manifest
    assert [path.name[8:14] for path in stream.paths] == [f"{i:06d}" for i in range(N_SHARDS)]
    # an edge between shards in the middle of it, where a 32-bit position would long have come round
    edge = 6000 * SHARD_TOKENS
    with open(stream.paths[5999], "r+b") as file:
        file.seek(-4, 2)
        file.write(struct.pack("<2H", 7, 8))
    with open(stream.paths[6000], "r+b") as file:
        file.seek(stream._headers[6000][1])
        file.write(struct.pack("<2H", 9, 10))
    assert stream.read(edge - 3, 6).tolist() == [0, 7, 8, 9, 10, 0]
    assert stream.locate(edge) == (stream.paths[6000], 0)


def test_any_step_of_a_trillion_tokens_costs_the_same(huge_folder):
    stream = TokenStream(huge_folder, "train")
    T, batch_tokens = 1024, 524_288

    def one_step(step, count=64):
        loader = WindowLoader(stream, T, batch_tokens, 1337, 65_536)  # a resume starts here
        x, _ = loader.batch(step, 0, count)
        assert x.shape == (count, T) and 0 <= loader.window_ids(step).min()
        assert loader.window_ids(step).max() < loader.n_windows == (10**12 - 1) // T

    for step in range(3):  # 192 windows in as many shards: from here on a file takes another's place
        one_step(step)
    steps = (3, 1000, 10**6, 10**9, 10**12)  # the last in epoch 524,288
    lines = [count_lines(lambda step=step: one_step(step)) for step in steps]
    peaks = [peak_memory(lambda step=step: one_step(step)) for step in steps]
    assert max(lines) < 1.1 * min(lines), lines
    assert max(peaks) < 1.1 * min(peaks) and max(peaks) < 4 * 64 * T * 8, peaks  # x and y are half of that


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_trillion_tokens_in_constant_memory(huge_folder):
    loader = WindowLoader(TokenStream(huge_folder, "train"), 1024, 524_288, 1337, 65_536)

    def some_steps(n):
        for step in np.random.default_rng(n).integers(0, 10**9, n).tolist():
            loader.batch(step, 0, 8)

    before = len(list(shards.Path("/proc/self/fd").iterdir()))
    peak = peak_memory(lambda: some_steps(30))  # 240 windows in as many shards: all the files there may be
    assert peak_memory(lambda: some_steps(300)) < 1.5 * peak < 2**20
    assert len(list(shards.Path("/proc/self/fd").iterdir())) == before + shards.MAX_OPEN_SHARDS
