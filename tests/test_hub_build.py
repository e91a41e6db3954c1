"""fineweb.py against a hub on this machine that misbehaves: the real client, real parquet, whole builds."""
import hashlib
import os
import random
import signal
import subprocess
import sys
import time

import kill_build
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import Fault, HubServer
from test_fineweb import EOT, ROOT, build, contents, slow_build, tokens_of

import fineweb
from shards import list_shards, read_manifest, write_shard

REPO = "HuggingFaceFW/fineweb-edu"


def make_parquet(seed, rows, path):
    """A file with FineWeb-Edu's columns; returns its texts."""
    rng = random.Random(seed)
    words = [f"{a}{b}" for a in ("mol", "re", "über") for b in ("ecule", "action", "angle", "all", "42")]
    texts = [f"{row}: " + " ".join(rng.choices(words, k=rng.randrange(50, 150))) for row in range(rows)]
    table = pa.table({
        "text": texts, "id": [f"<urn:uuid:{rng.getrandbits(128):032x}>" for _ in texts],
        "dump": ["CC-MAIN-2013-20"] * rows, "url": [f"http://example.org/{rng.random()}" for _ in texts],
        "file_path": [f"s3://commoncrawl/{rng.random()}" for _ in texts], "language": ["en"] * rows,
        "language_score": [rng.random() for _ in texts], "token_count": [len(text) // 5 for text in texts],
        "score": [rng.uniform(2.5, 5) for _ in texts], "int_score": [rng.randrange(3, 6) for _ in texts]})
    pq.write_table(table, path, row_group_size=100)
    return [text.encode() for text in texts]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """({path on the hub: bytes}, texts in order)"""
    folder, files, texts = tmp_path_factory.mktemp("corpus"), {}, []
    for i in range(4):
        texts += make_parquet(i, 600, folder / "file.parquet")
        files[f"sample/10BT/{i:03d}_00000.parquet"] = (folder / "file.parquet").read_bytes()
    make_parquet(9, 10, folder / "file.parquet")
    files["sample/100BT/000_00000.parquet"] = (folder / "file.parquet").read_bytes()
    files["README.md"] = b"# a dataset\n"
    return files, texts


def command(out, *flags):
    return [sys.executable, str(ROOT / "fineweb.py"), f"--data_dir={out}", "--num_workers=2",
            "--shard_tokens=20000", "--val_fraction=0.1", *flags]


def environment(server, home, **more):
    return {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(home), "NO_PROXY": "*", **more}


def run(server, home, out, *flags, **more):
    return subprocess.run(command(out, *flags), capture_output=True, text=True, encoding="utf-8", timeout=120,
                          env=environment(server, home, **more))


def downloaded(home):
    """Files of the cache, whole and partial."""
    return [path.name for path in (home / "hub").rglob("blobs/*")]


def names_sent(server):
    """Parquet files of which the server sent something."""
    paths = [request.path for request in server.requests if request.sent]
    return {path.rpartition("/")[2] for path in paths if path.endswith(".parquet")}


def test_whole_files_through_a_bad_network(tmp_path, corpus, encoding):
    files, texts = corpus
    with HubServer(files, REPO, cdn=True) as server:
        server.faults += [Fault("status", status=502, match="/api/"), Fault("drop", after=3000),
                          Fault("status", status=429, headers=(("Retry-After", "0"),)),
                          Fault("truncate", after=9000), Fault("corrupt", after=500, match="002_"),
                          Fault("status", status=416, match="003_")]
        done = run(server, tmp_path / "hf", tmp_path / "out")
        assert done.returncode == 0, done.stderr
        assert not server.faults
    train, val = slow_build(texts, encoding)
    assert tokens_of(tmp_path / "out", "train") == train and tokens_of(tmp_path / "out", "val") == val
    assert list_shards(tmp_path / "out", "train")[0].name == "edufineweb_train_000000.npy"
    assert read_manifest(tmp_path / "out")["source"] == {"repo": REPO, "revision": "c" * 40, "files": 4}
    assert not downloaded(tmp_path / "hf")  # each was removed when its shards were safe
    assert [path.name for path in (tmp_path / "out").iterdir() if "_0" not in path.name] == ["manifest.json"]
    for line in ("file 1 of 4: sample/10BT/000_00000.parquet", "429"):
        assert line in done.stderr
    assert "GB for shards in" in done.stdout and "GB for downloads in" in done.stdout


def test_files_that_were_in_the_cache_stay_there(tmp_path, corpus):
    files, _ = corpus
    with HubServer(files, REPO) as server:
        script = ("import sys; from huggingface_hub import hf_hub_download; hf_hub_download(sys.argv[1], "
                  "'sample/10BT/001_00000.parquet', repo_type='dataset', revision='c' * 40)")
        subprocess.run([sys.executable, "-c", script, REPO], check=True, timeout=60, capture_output=True,
                       env=environment(server, tmp_path / "hf"))
        assert run(server, tmp_path / "hf", tmp_path / "out").returncode == 0
        mine = hashlib.sha256(files["sample/10BT/001_00000.parquet"]).hexdigest()
        assert downloaded(tmp_path / "hf") == [mine]
        got = [request for request in server.requests if request.method == "GET" and "001_" in request.path]
        assert len(got) == 1
        assert run(server, tmp_path / "hf", tmp_path / "kept", "--keep_downloads").returncode == 0
        assert len(downloaded(tmp_path / "hf")) == 4
        before = len(server.requests)
        offline = run(server, tmp_path / "hf", tmp_path / "offline", HF_HUB_OFFLINE="1")
        assert offline.returncode == 0 and len(server.requests) == before, offline.stderr
        assert len(downloaded(tmp_path / "hf")) == 4
        again = run(server, tmp_path / "hf", tmp_path / "out", HF_HUB_OFFLINE="1")
        assert again.returncode == 0 and "already built" in again.stdout
        online = run(server, tmp_path / "hf", tmp_path / "offline")  # the cache may have lacked some
        assert online.returncode == 2 and "offline=True, wanted None" in online.stderr
    assert contents(tmp_path / "out") == contents(tmp_path / "kept")
    for folder in ("out", "offline"):  # its manifest says so
        (tmp_path / folder / "manifest.json").unlink()
    assert contents(tmp_path / "out") == contents(tmp_path / "offline")


def test_max_tokens_fetches_only_what_it_needs(tmp_path, corpus, encoding):
    files, texts = corpus
    flags = "--max_tokens=300000", "--val_fraction=0.2"
    with HubServer(files, REPO) as server:
        server.faults += [Fault("drop", after=50, match="000_"), Fault("ignore_range", match="000_"),
                          Fault("status", status=503, match="000_"),
                          Fault("truncate", after=1000, match="000_")]
        done = run(server, tmp_path / "hf", tmp_path / "out", *flags)
        assert done.returncode == 0 and not server.faults, done.stderr
        del server.requests[:]
        assert run(server, tmp_path / "hf", tmp_path / "again", *flags).returncode == 0
        sent = sum(request.sent for request in server.requests if "/resolve/" in request.path)
        touched = names_sent(server)
    assert [tokens_of(tmp_path / "out", split) for split in ("train", "val")] == list(
        slow_build(texts, encoding, 0.2, max_tokens=300_000))
    assert contents(tmp_path / "out") == contents(tmp_path / "again") and not downloaded(tmp_path / "hf")
    assert sent < 0.7 * sum(map(len, files.values())) and "003_00000.parquet" not in touched


def test_the_end_does_not_wait_for_what_is_read_ahead(tmp_path, corpus):
    """Nor does it abort: bytes of a row group that is not needed come in all the while."""
    files, _ = corpus
    with HubServer(files, REPO) as server:
        server.faults += [Fault("none")] * 3 + [Fault("drip")] * 20  # after the footer and two row groups
        done = run(server, tmp_path / "hf", tmp_path / "out", "--max_tokens=10000", "--val_fraction=0.3")
        assert 0 < len(server.faults) < 20
    assert done.returncode == 0 and done.stderr.count("attempt") == 0, done.stderr


def test_a_shard_is_made_again_from_its_file_alone(tmp_path, corpus):
    files, _ = corpus
    with HubServer(files, REPO) as server:
        assert run(server, tmp_path / "hf", tmp_path / "out").returncode == 0
        before = contents(tmp_path / "out")
        units = {record["file"]: record["origin"][0] for record in read_manifest(tmp_path / "out")["files"]}
        crossing = max(name for name, unit in units.items() if "train" in name and unit == 1)
        (tmp_path / "out" / crossing).unlink()
        del server.requests[:]
        done = run(server, tmp_path / "hf", tmp_path / "out")
        assert done.returncode == 0 and "again" in done.stdout, done.stderr
        assert names_sent(server) == {"001_00000.parquet", "002_00000.parquet"}
    assert not downloaded(tmp_path / "hf")
    assert contents(tmp_path / "out") == before


def interrupted(server, home, out, *flags):
    """A build that was killed when it had shards, in the middle of the last file's download."""
    server.faults.append(Fault("stall", after=100, match="003_"))
    process = subprocess.Popen(command(out, *flags), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env=environment(server, home))
    while server.faults or not list(out.glob("progress_*.part")):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()


def test_a_build_does_not_go_on_with_other_files(tmp_path, corpus):
    files, _ = corpus
    with HubServer(files, REPO) as server:
        interrupted(server, tmp_path / "hf", tmp_path / "out")
        offline = run(server, tmp_path / "hf", tmp_path / "out", HF_HUB_OFFLINE="1")
        assert offline.returncode == 2 and "offline=None, wanted True" in offline.stderr
        server.files = {path: data for path, data in files.items() if "10BT/000_" not in path}
        fewer = run(server, tmp_path / "hf", tmp_path / "out")
        assert fewer.returncode == 2 and "not those that the build" in fewer.stderr
        server.files = files
        assert run(server, tmp_path / "hf", tmp_path / "out").returncode == 0
        assert run(server, tmp_path / "hf", tmp_path / "whole").returncode == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_download_that_a_killed_build_did_not_remove_is_removed(tmp_path, corpus):
    files, _ = corpus
    with HubServer(files, REPO) as server:
        interrupted(server, tmp_path / "hf", tmp_path / "out")
        script = ("import sys; from huggingface_hub import hf_hub_download; hf_hub_download(sys.argv[1], "
                  "'sample/10BT/000_00000.parquet', repo_type='dataset', revision='c' * 40)")
        subprocess.run([sys.executable, "-c", script, REPO], check=True, timeout=60,
                       env=environment(server, tmp_path / "hf"))  # as if it had not come to the removal
        assert run(server, tmp_path / "hf", tmp_path / "out").returncode == 0
    assert not downloaded(tmp_path / "hf")


def test_a_bad_row_group_is_named_and_skipped_on_both_roads(tmp_path, corpus, encoding):
    files, texts = corpus
    data = bytearray(files["sample/10BT/000_00000.parquet"])
    (tmp_path / "a.parquet").write_bytes(data)
    where = pq.read_metadata(tmp_path / "a.parquet").row_group(1).column(0)
    start = where.dictionary_page_offset or where.data_page_offset
    data[start:start + 20] = b"\xff" * 20
    kept = texts[:100] + texts[200:]
    with HubServer({**files, "sample/10BT/000_00000.parquet": bytes(data)}, REPO) as server:
        for flags, limit in (((), 0), (("--max_tokens=150000",), 150_000)):
            out = tmp_path / f"out{limit}"
            done = run(server, tmp_path / "hf", out, *flags)
            assert done.returncode == 2, done
            assert "000_00000.parquet, row group 1, rows 100 to 199: damaged" in done.stderr
            assert run(server, tmp_path / "hf", out, "--skip_bad=1", *flags).returncode == 0
            assert [tokens_of(out, split) for split in ("train", "val")] == list(
                slow_build(kept, encoding, 0.1, limit))
        other = run(server, tmp_path / "hf", tmp_path / "other", "--max_tokens=1000", "--text_column=body")
        assert other.returncode == 2 and "got columns text, id" in other.stderr
    assert not downloaded(tmp_path / "hf")


def test_ctrl_c_while_a_part_is_waited_for(tmp_path, corpus):
    files, _ = corpus
    with HubServer(files, REPO) as server:
        server.faults += [Fault("status", status=503, match="000_") for _ in range(20)]
        process = subprocess.Popen(command(tmp_path / "out", "--max_tokens=100000"), stderr=subprocess.PIPE,
                                   stdout=subprocess.DEVNULL, env=environment(server, tmp_path / "hf"))
        while len(server.faults) > 18:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130


def test_a_branch_that_moves_does_not_mix_revisions(tmp_path, corpus):
    """A build that was killed goes on with the commit it began with."""
    files, _ = corpus
    with HubServer(files, REPO) as server:
        interrupted(server, tmp_path / "hf", tmp_path / "out")
        server.older, server.commit = [server.commit], "d" * 40
        done = run(server, tmp_path / "hf", tmp_path / "out")
        assert done.returncode == 0, done.stderr
        assert read_manifest(tmp_path / "out")["source"]["revision"] == "c" * 40


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_killed_while_downloading(tmp_path, corpus):
    files, _ = corpus
    with HubServer(files, REPO) as server:
        flags = [flag for flag in command("") if not flag.startswith(("--data_dir", "--num_workers"))]
        kill_build.rounds(flags, tmp_path, 4, random.Random(1), environment(server, tmp_path / "hf"))
    assert not downloaded(tmp_path / "hf")


def test_too_little_space_is_said_first(tmp_path, corpus, monkeypatch):
    import hub

    monkeypatch.setattr(hub, "list_files", lambda *_: ("c" * 40, [
        hub.HubFile("sample/10BT/000.parquet", 10**15, "e" * 64)]))
    with pytest.raises(fineweb.UserError, match=r"750000\.00 GB for shards .* GB are free; .*--max_tokens"):
        build(tmp_path / "out")


# ---- ready-made shards ---------------------------------------------------------


def make_shards(folder, ids_of):
    folder.mkdir()
    files = {}
    for name, ids in ids_of.items():
        write_shard(folder / name, np.array(ids, dtype=np.uint16))
        files[name] = (folder / name).read_bytes()
    return files


READY = {"fineweb_val_000000.bin": [EOT, 1, 2, EOT, 3], "fineweb_train_000001.bin": [EOT, 11, 12, 13],
         "fineweb_train_000002.bin": [14, EOT, 15, 16], "fineweb_train_000003.bin": [EOT, 17]}


def test_ready_made_shards_are_taken_as_they_are(tmp_path):
    files = make_shards(tmp_path / "made", READY)
    with HubServer(files, "someone/tokens") as server:
        server.faults += [Fault("drop", after=600, match="train_000002")]
        done = run(server, tmp_path / "hf", tmp_path / "out", "--dataset=someone/tokens")
        assert done.returncode == 0, done.stderr
        some = run(server, tmp_path / "hf", tmp_path / "some", "--dataset=someone/tokens", "--max_tokens=5")
        assert some.returncode == 0
        for name, data in files.items():
            assert (tmp_path / "out" / name).read_bytes() == data
        names = sorted(path.name for path in (tmp_path / "some").glob("*.bin"))
        assert names == ["fineweb_train_000001.bin", "fineweb_train_000002.bin", "fineweb_val_000000.bin"]
        manifest = read_manifest(tmp_path / "out")
        assert manifest["splits"]["train"]["documents"] == 3 and manifest["documents"] == 5
        assert manifest["tokens"] == 15 and manifest["text_bytes"] > 9 and not downloaded(tmp_path / "hf")
        fineweb.verify_folder(tmp_path / "out")
        before = contents(tmp_path / "out")
        (tmp_path / "out" / "fineweb_train_000001.bin").unlink()
        assert run(server, tmp_path / "hf", tmp_path / "out", "--dataset=someone/tokens").returncode == 0
    assert contents(tmp_path / "out") == before


def test_ready_made_shards_of_one_name_are_refused(tmp_path):
    files = make_shards(tmp_path / "made", {"a_train_000001.bin": [EOT, 1]})
    twice = {f"{folder}/a_train_000001.bin": files["a_train_000001.bin"] for folder in ("10B", "1B")}
    with HubServer(twice, "someone/tokens") as server:
        done = run(server, tmp_path / "hf", tmp_path / "out", "--dataset=someone/tokens")
    assert done.returncode == 2 and "several files a_train_000001.bin" in done.stderr


def test_ready_made_shards_that_are_wrong_are_refused(tmp_path):
    files = make_shards(tmp_path / "made", {**READY, "fineweb_train_000002.bin": [EOT, 60_000]})
    with HubServer(files, "someone/tokens") as server:
        done = run(server, tmp_path / "hf", tmp_path / "out", "--dataset=someone/tokens")
        assert done.returncode == 2 and "000002.bin: got id 60000, wanted ids below 50257" in done.stderr
        assert "What is done is kept" in done.stderr and not (tmp_path / "out" / "manifest.json").exists()
        files["fineweb_train_000002.bin"] = files["fineweb_train_000001.bin"][:-2]
        done = run(server, tmp_path / "hf", tmp_path / "new", "--dataset=someone/tokens")
        assert done.returncode == 2 and "000002.bin: got 1,030 bytes, wanted 1,032" in done.stderr
    with HubServer({"README.md": b"#"}, "someone/else") as server:
        done = run(server, tmp_path / "hf", tmp_path / "none", "--dataset=someone/else")
        assert done.returncode == 2 and "no *_train_*.bin" in done.stderr and "fineweb-edu" in done.stderr
