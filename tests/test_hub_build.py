"""fineweb.py against a hub on this machine that misbehaves: the real client, complete builds."""
import json
import os
import random
import signal
import subprocess
import sys
import time
from queue import SimpleQueue

import kill_build
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import Fault, HubServer
from huggingface_hub import constants, hf_hub_download
from test_fineweb import build, contents, fineweb_command, run, slow_build, tokens_of

import fineweb
import hub
from bpe import load_tokenizer
from configurator import UserError
from shards import list_shards, read_manifest

REPO, COMMIT = "HuggingFaceFW/fineweb-edu", "c" * 40
FIRST, LAST = "sample/10BT/000_00000.parquet", "sample/10BT/003_00000.parquet"
SHARDS = {"shard_tokens": 20_000}  # of 650,000 tokens in 48 row groups


def make_parquet(seed, rows, path):
    """A file of texts, and of more bytes in other columns; returns the texts."""
    rng = random.Random(seed)
    words = [f"{a}{b}" for a in ("mol", "re", "über") for b in ("ecule", "action", "angle", "all", "42")]
    texts = [f"{seed}.{i}: {' '.join(rng.choices(words, k=rng.randrange(50, 150)))}" for i in range(rows)]
    other = [rng.randbytes(200) for _ in texts]
    pq.write_table(pa.table({"id": other, "text": texts, "url": other}), path, row_group_size=50)
    return [text.encode() for text in texts]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """({path on the hub: bytes}, texts in order)"""
    path, files, texts = tmp_path_factory.mktemp("corpus") / "file.parquet", {}, []
    for i in range(4):
        texts += make_parquet(i, 600, path)
        files[f"sample/10BT/{i:03d}_00000.parquet"] = path.read_bytes()
    make_parquet(9, 10, path)
    return files | {"sample/100BT/000_00000.parquet": path.read_bytes(), "README.md": b"# words\n"}, texts


@pytest.fixture
def server(corpus, tmp_path, monkeypatch):
    """A hub with the corpus; this process is as if started with its HF_ENDPOINT, and HF_HOME=tmp_path/hf."""
    with HubServer({**corpus[0]}, REPO) as server:
        monkeypatch.setattr(hub, "FIRST_WAIT", 0.0005)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                            server.url + "/{repo_id}/resolve/{revision}/{filename}")
        yield server


def environment(server, tmp_path, **more):
    return {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "*", **more}


def splits_of(folder):
    return tokens_of(folder, "train"), tokens_of(folder, "val")


def names_sent(server):
    """Numbers of the parquet files of which the server sent something."""
    return {request.path.rpartition("/")[2][:3] for request in server.bodies(".parquet") if request.sent}


# ---- downloads -----------------------------------------------------------------


def test_complete_files_through_a_bad_network(server, corpus, tmp_path, encoding, capsys):
    server.cdn = True
    server.faults += [Fault("status", status=502, match="/api/"), Fault("status", status=416),
                      Fault("status", status=429, headers=(("Retry-After", "0"),)),
                      Fault("drop", after=3000, match="/cdn/"), Fault("truncate", after=9000, match="/cdn/"),
                      Fault("corrupt", match="/cdn/")]
    (tmp_path / "out" / "downloads").mkdir(parents=True)  # a folder of the user's
    folder = build(tmp_path / "out", num_workers=2, **SHARDS)
    said = capsys.readouterr()
    assert not server.faults and said.err.count("attempt") == 5 and "000_00000.parquet: corrupt" in said.err
    assert "4 parquet files" in said.out and "GB are free" in said.out
    assert "next: python train_gpt2.py config/own_text.py " in said.out  # a sample this small is no FineWeb
    assert splits_of(folder) == slow_build(corpus[1], encoding)
    manifest = read_manifest(folder)
    assert manifest["source"] == {"repo": REPO, "revision": COMMIT, "files": 4}
    assert {path.name for path in folder.iterdir()} - {record["file"] for record in manifest["files"]} == {
        "downloads", "build.json", "manifest.json", "tokenizer.tiktoken"}
    assert list_shards(folder, "train")[0].name == "edufineweb_train_000000.npy"
    assert not (tmp_path / "hf" / "hub").exists()


def test_the_clients_cache_is_read_and_never_written(server, tmp_path):
    def blobs():
        return {path.name: path.stat().st_mtime_ns for path in (tmp_path / "hf").rglob("blobs/*")}

    hf_hub_download(REPO, FIRST, revision=COMMIT, repo_type="dataset")
    before = blobs()
    build(tmp_path / "some", **SHARDS)
    assert len(server.bodies("000_")) == 1 and blobs() == before and len(before) == 1
    for name in server.files:
        if "10BT" in name:
            hf_hub_download(REPO, name, repo_type="dataset")
    server.requests.clear()
    build(tmp_path / "part", max_tokens=200_000)
    assert [request.path[:5] for request in server.requests] == ["/api/"]
    server.requests.clear()
    env = environment(server, tmp_path, HF_HUB_OFFLINE="1")
    for out in ("all", "some"):
        done = run(tmp_path / out, env=env, **SHARDS)
        assert done.returncode == 0 and ("already built" in done.stdout) == (out == "some"), done.stderr
    build(tmp_path / "some", **SHARDS)  # not offline, it asks for nothing either
    assert contents(tmp_path / "all") == contents(tmp_path / "some") and not server.requests


class ReadyWorker:
    """A process and its pipe that need no time to start."""

    def __init__(self):
        self.results = SimpleQueue()

    def send(self, chunk):
        self.results.put(fineweb.encode_chunk(chunk, "gpt2"))

    def recv(self):
        return self.results.get()

    def kill(self):
        pass

    join = kill


@pytest.mark.parametrize("num_workers", [1, 3])
def test_max_tokens_fetches_only_what_it_needs(server, corpus, tmp_path, encoding, monkeypatch, num_workers):
    """Of the second file: its footer, in two parts, 5 of 12 row groups, and what is ahead of them."""
    monkeypatch.setattr(fineweb, "start_worker", lambda _: [ReadyWorker()] * 2)
    server.pause = 0.05 * num_workers
    server.faults += [Fault("drop", after=50, match="000_"), Fault("ignore_range", match="000_"),
                      Fault("status", status=503, match="000_"), Fault("truncate", after=99, match="000_")]
    folder = build(tmp_path / "out", max_tokens=220_000, val_fraction=0.2, num_workers=num_workers, **SHARDS)
    assert splits_of(folder) == slow_build(corpus[1], encoding, 0.2, 220_000) and not server.faults
    assert names_sent(server) == {"000", "001"} and len(server.bodies("/001_")) <= 11
    assert all(request.sent < 60_000 for request in server.bodies("/001_"))  # of 460,000
    assert not (folder / "fineweb_downloads").exists()


def test_the_end_neither_waits_for_what_is_ahead_nor_aborts(server, tmp_path):
    server.faults += [Fault("none")] * 3 + [Fault("drip")] * 20  # after the footer and two row groups
    done = run(tmp_path / "out", env=environment(server, tmp_path), max_tokens=10_000, val_fraction=0.3)
    assert done.returncode == 0 and "attempt" not in done.stderr, done.stderr
    assert len(server.faults) > 17


@pytest.mark.parametrize("max_tokens", [0, 500_000])
def test_a_build_that_was_cut_off_goes_on(server, tmp_path, max_tokens):
    """With the commit that it began with, though the branch moves; files that are done are not fetched."""
    flags = {"max_tokens": max_tokens, **SHARDS}
    expected = contents(build(tmp_path / "undisturbed", **flags))
    server.faults.append(Fault("status", status=404, match="/003_"))
    with pytest.raises(UserError, match=r"check the name and the revision\. What is done is kept"):
        build(tmp_path / "out", **flags)
    kept = {path.stem for path in (tmp_path / "out" / "fineweb_downloads").iterdir()}
    assert server.etag("sample/10BT/002_00000.parquet") in kept and server.etag(FIRST) not in kept
    for name in ("build.json", "manifest.json", "tokenizer.tiktoken", "edufineweb_train_000003.npy"):
        (tmp_path / "out" / f"{name}.123.tmp").write_bytes(b"of a killed process")
    moved = "sample/10BT/004_00000.parquet"
    server.older, server.commit, server.files[moved] = [COMMIT], "d" * 40, server.files.pop(LAST)
    with pytest.raises(UserError, match="began with other files"):  # the publisher has changed history
        build(tmp_path / "out", **flags)
    server.files[LAST] = server.files.pop(moved)
    server.requests.clear()
    assert contents(build(tmp_path / "out", **flags)) == expected
    assert f"/revision/{COMMIT}" in server.requests[0].path and names_sent(server) <= {"002", "003"}
    assert len(server.bodies("/002_")) <= 4  # its footer, and the last row groups


def test_shards_are_made_again_from_their_files_alone(server, tmp_path, capsys):
    """The last two: file 1 is still being fetched ahead for the first shard when the second needs it."""
    folder = build(tmp_path / "out", **SHARDS)
    before, shards = contents(folder), list_shards(folder, "train")
    server.pause = 0.1
    for missing in [-1], [0, len(shards) // 3]:
        for i in missing:
            shards[i].unlink()
        server.requests.clear()
        assert contents(build(folder, **SHARDS)) == before and (0 in missing or names_sent(server) == {"003"})
        said = capsys.readouterr().err
        assert all(shards[i].name in said for i in missing) and "corrupt" not in said


def test_a_file_that_is_there_twice_is_taken_once(server, tmp_path):
    server.files["sample/10BT/000_00001.parquet"] = server.files[FIRST]
    manifest = read_manifest(build(tmp_path / "out", **SHARDS))
    assert manifest["documents"] == 2400 and manifest["source"]["files"] == 4


def test_machines_share_the_files(server, corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):
        server.requests.clear()
        monkeypatch.setenv("RANK", str(rank))
        build(tmp_path / "out", **SHARDS)
        assert names_sent(server) == {f"00{rank}", f"00{rank + 2}"}
    manifest = read_manifest(tmp_path / "out")
    assert manifest["documents"] == 2400 and manifest["source"]["files"] == 4
    train, val = splits_of(tmp_path / "out")
    texts = load_tokenizer().decode([*train, *val]).split("<|endoftext|>")[1:]
    assert sorted(texts) == sorted(text.decode() for text in corpus[1])
    assert not list((tmp_path / "out").glob("fineweb_downloads*"))


# ---- any dataset ---------------------------------------------------------------


@pytest.mark.parametrize("names, subset, taken", [
    ("data/test-0.parquet data/train-0.parquet data/train-1.parquet data/x.csv", "", [1, 2]),
    ("a/1.parquet b/2.parquet ab/3.parquet", "a", [0]),
    ("a/1.parquet 2.parquet", "", [1, 0]),
    ("a/1.parquet b/2.jsonl", "b", r"no parquet files in b; name .* --subset=\.\.\.: a$"),
    ("b/2.jsonl", "", r"no parquet files in any folder; .* hf download a/my-texts --repo-type"),
])
def test_any_parquet_dataset(server, tmp_path, encoding, names, subset, taken):
    texts = [make_parquet(i, 50, tmp_path / f"{i}.parquet") for i in range(len(names.split()))]
    server.files = {name: (tmp_path / f"{i}.parquet").read_bytes() for i, name in enumerate(names.split())}
    flags = {"dataset": "a/my-texts", "subset": subset}
    server.repo = flags["dataset"]
    if isinstance(taken, str):
        with pytest.raises(UserError, match=taken):
            build(tmp_path / "out", **flags)
    else:
        folder = build(tmp_path / "out", **flags)
        assert splits_of(folder) == slow_build([text for i in taken for text in texts[i]], encoding)
        assert list_shards(folder, "val")[0].name == "my_texts_val_000000.npy"


# ---- hostile and corrupt -------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [0, 100_000])
@pytest.mark.parametrize(("change", "words"), [
    ({"rfilename": "sample/10BT/../../../../x.parquet"}, "cannot list"),
    ({"lfs": {"sha256": "../" * 8 + "x"}}, "cannot list"), ({"size": 1 << 45}, "free some space|HTTP 416")])
def test_a_hostile_listing_writes_nothing(server, tmp_path, monkeypatch, max_tokens, change, words):
    listing = json.loads(server.listing("main"))
    listing["siblings"][0] |= change
    monkeypatch.setattr(server, "listing", lambda _: json.dumps(listing).encode())
    with pytest.raises(UserError, match=words):
        build(tmp_path / "out", max_tokens=max_tokens)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("max_tokens, num_workers", [(0, 2), (10**6, 1)])
def test_a_corrupt_file_is_named_and_ends_the_build(server, tmp_path, max_tokens, num_workers):
    data = bytearray(server.files[LAST])
    place = pq.read_metadata(pa.BufferReader(bytes(data))).row_group(1).column(1)
    data[place.dictionary_page_offset:place.dictionary_page_offset + 20] = b"\xff" * 20
    server.files[LAST] = bytes(data)
    flags = {"max_tokens": max_tokens, "skip_bad": True, **SHARDS}
    with pytest.raises(UserError, match=r"/003_00000\.parquet, row group 1: cannot be read .* corrupt"):
        build(tmp_path / "out", num_workers=num_workers, **flags)
    for number, data in enumerate([b"", b"PAR1", b"\xff" * 99 + b"PAR1", b"\0" * 99 + b"PAR1"]):
        server.files[FIRST] = data
        with pytest.raises(UserError, match=r"/000_00000\.parquet: cannot be read .* hub's copy is corrupt"):
            build(tmp_path / f"out{number}", **flags)


def test_too_little_space_is_reported_first(server, tmp_path, monkeypatch):
    size = sum(len(data) for path, data in server.files.items() if "10BT" in path)
    needs = []
    with monkeypatch.context() as patch:
        patch.setattr(hub, "need_space", lambda *need: needs.append(need))
        server.faults.append(Fault("status", status=404, match="/003_"))
        with pytest.raises(UserError):
            build(tmp_path / "out", **SHARDS)
        build(tmp_path / "out", **SHARDS)
        build(tmp_path / "some", max_tokens=1000)
        build(tmp_path / "all", max_tokens=10**12)
    assert needs[0] == (tmp_path / "out", size * 3 // 4 + size)
    assert needs[1][1] < 0.6 * needs[0][1]  # minus what is there already
    assert [need for _, need in needs[2:]] == [2000, size * 3 // 4]
    monkeypatch.setattr(hub, "list_files", lambda *_: (COMMIT, [hub.HubFile(FIRST, 10**15, "e" * 64)]))
    with pytest.raises(UserError, match=r"1750000\.00 GB, .* GB are free; .*--max_tokens"):
        build(tmp_path / "none")


# ---- interrupted ---------------------------------------------------------------


@pytest.mark.parametrize("sent, code, kind, max_tokens", [
    (signal.SIGINT, 130, "stall", 0), (signal.SIGINT, 130, "status", 10**6),
    (signal.SIGKILL, -9, "stall", 10**6)])
def test_interrupted_while_bytes_are_waited_for(server, tmp_path, sent, code, kind, max_tokens):
    server.faults += [Fault(kind, after=10_000, match="/003_")] * 20
    command = fineweb_command(tmp_path / "out", max_tokens=max_tokens, num_workers=2, **SHARDS)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               env=environment(server, tmp_path))
    while len(server.faults) == 20 or not list_shards(tmp_path / "out", "train"):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(sent)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in stderr, stderr
    assert code < 0 or stderr.count("interrupted\n") == 1  # a thread may still print its attempt after it
    server.faults.clear()
    flags = {"max_tokens": max_tokens, **SHARDS}
    assert contents(build(tmp_path / "out", **flags)) == contents(build(tmp_path / "undisturbed", **flags))


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_killed_at_random_moments(server, tmp_path):
    server.pause = 0.1
    command = [sys.executable, str(kill_build.ROOT / "fineweb.py"), "--shard_tokens=20000"]
    kill_build.rounds(command, tmp_path, 2, random.Random(1), environment(server, tmp_path))
