"""fineweb.py as a whole: builds that are killed, damaged, shared by machines, repeated and checked."""
import contextlib
import itertools
import json
import multiprocessing
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import kill_build
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_fineweb import (
    DOCUMENTS,
    EOT,
    ROOT,
    build,
    contents,
    fineweb_command,
    run,
    tokens_of,
    write_input,
)

import documents
import fineweb
from configurator import UserError
from files import locked
from shards import TokenStream, list_shards, read_manifest


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A parquet file of several chunks."""
    monkeypatch.setattr(documents, "CHUNK_BYTES", 3000)
    return write_input(tmp_path / "in", "parquet", DOCUMENTS)


# ---- builds that are repeated --------------------------------------------------


def test_existing_folders(tmp_path, source, capsys, monkeypatch):
    folder = build(tmp_path / "out", input=source)
    before = contents(folder)
    monkeypatch.chdir(tmp_path)
    build(folder, input=os.path.relpath(source), num_workers=2)  # the same file, spelled differently
    assert "already built" in capsys.readouterr().out and contents(folder) == before
    with pytest.raises(UserError, match=r"build by other settings: max_tokens=0, not 5; .*--data_dir"):
        build(folder, input=source, max_tokens=5)
    for name, match in (("build.json", "already holds manifest.json"), ("manifest.json", "holds text_")):
        (folder / name).unlink()  # then as build-nanogpt would leave it
        with pytest.raises(UserError, match=match):
            build(folder, input=source)
    assert contents(folder).items() <= before.items()
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="cannot make the folder"):
        build(tmp_path / "file", input=source)


@pytest.mark.parametrize("kind, flags", [
    ("parquet", {}), ("jsonl.gz", {"max_tokens": 9000, "val_fraction": 0.3}),
    ("txt", {"val_fraction": 0.4, "shard_format": "bin"})])
def test_missing_and_cut_shards_are_made_again_and_nothing_else(tmp_path, kind, flags, monkeypatch, capsys):
    monkeypatch.setattr(documents, "PIECE_BYTES", 512)
    monkeypatch.setattr(documents, "CHUNK_BYTES", 3000)
    source = write_input(tmp_path / "in", kind, DOCUMENTS)
    folder = build(tmp_path / "out", input=source, **flags)
    before, shards = contents(folder), list_shards(folder, "train") + list_shards(folder, "val")
    assert len(list_shards(folder, "train")) > 1
    for some in ([shards[0], shards[-1]], shards[1:2], shards[1::3], shards):
        times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
        some[0].write_bytes(some[0].read_bytes()[:-2])
        for path in some[1:]:
            path.unlink()
        build(folder, input=source, **flags)
        said = capsys.readouterr().err
        assert contents(folder) == before
        assert "again: missing or incomplete" in said
        numbers = {path.stem[-6:] for path in some}
        assert all(path.stat().st_mtime_ns == times[path] for path in shards if path.stem[-6:] not in numbers)


def test_a_shard_that_comes_out_different_is_not_kept(tmp_path, source, monkeypatch):
    folder = build(tmp_path / "out", input=source)
    list_shards(folder, "train")[2].unlink()
    monkeypatch.setattr(documents, "hash_kernel", lambda _, offsets, out: out.fill(2**64 - 1))
    with pytest.raises(UserError, match=r"_train_000002\.npy comes out different .*another --data_dir"):
        build(folder, input=source)
    assert not (folder / "text_train_000002.npy").exists() and not list(folder.glob("*.tmp"))


def test_other_contents_of_the_same_size_are_refused(tmp_path):
    source = write_input(tmp_path / "in", "jsonl", DOCUMENTS)
    folder = build(tmp_path / "out", input=source)
    time_before, text = source.stat().st_mtime_ns, source.read_bytes()
    source.write_bytes(text.replace(b"model", b"madel", 1))
    with pytest.raises(UserError, match=r"began with other files: names, sizes or times differ"):
        build(folder, input=source)
    source.write_bytes(text)
    os.utime(source, ns=(0, time_before))
    build(folder, input=source)


def test_files_of_the_user_stay(tmp_path):
    mine = "progress_notes.part.md", "downloads_2024.json", "my.json.old.tmp", "a.txt"
    folder = tmp_path / "out"
    folder.mkdir()
    for name in mine:
        (folder / name).write_text("mine", encoding="utf-8")
    source = write_input(tmp_path / "in", "jsonl", DOCUMENTS)
    for _ in range(2):
        build(folder, input=source)
        assert all((folder / name).exists() for name in mine)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 9999, '{"settings": []}', "{}"])
def test_a_corrupt_build_json_is_named(tmp_path, source, text):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "build.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"build\.json.*delete the folder"):
        build(tmp_path / "out", input=source)


@pytest.mark.parametrize("name", ["../x_train_000000.npy", "/tmp/x_train_000000.npy", "x_train_0.txt", "."])
@pytest.mark.parametrize("file", ["build.json", "manifest.json"])
def test_names_in_notes_are_not_paths(tmp_path, source, file, name):
    """A note that names a file elsewhere must not make us read or write it."""
    folder = build(tmp_path / "out", input=source)
    text = (folder / file).read_text(encoding="utf-8")
    (folder / file).write_text(text.replace("text_train_000002.npy", name), encoding="utf-8")
    (folder / "text_train_000002.npy").unlink()
    with pytest.raises(UserError, match=re.escape(str(folder / file))):
        fineweb.verify_folder(folder) if file == "manifest.json" else build(folder, input=source)
    assert not (tmp_path / "x_train_000000.npy").exists()


# ---- processes that die, disks that are full -----------------------------------


def wait_for(condition, seconds=240):
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.005)
    return result


def is_running(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.fixture(scope="module")
def large_input(tmp_path_factory):
    """20 MB in 120 files, and so in as many chunks: some seconds of work."""
    folder = tmp_path_factory.mktemp("large")
    line = " ".join(f"word{i % 977}" for i in range(20_000))
    for i in range(120):
        (folder / f"{i:03d}.jsonl").write_text(json.dumps({"text": f"{i} {line}"}), encoding="utf-8")
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_killed_worker_is_an_error_and_the_rerun_is_identical(tmp_path, large_input):
    """Also one that dies while the pool still starts others."""
    flags = {"input": large_input, "num_workers": 4, "shard_tokens": 200_000}
    for _ in range(3):
        process = subprocess.Popen(fineweb_command(tmp_path / "out", **flags), stderr=subprocess.PIPE,
                                   text=True, encoding="utf-8")
        os.kill(wait_for(lambda process=process: kill_build.children(process.pid))[0], signal.SIGKILL)
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 2 and "worker processes died" in stderr, stderr
    expected = contents(build(tmp_path / "undisturbed", **{**flags, "num_workers": 1}))
    assert contents(build(tmp_path / "out", **flags)) == expected


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGSTOP")
def test_the_end_does_not_wait_for_workers():
    chunk = documents.Chunk(documents.from_texts, ([(b"text", "", None)], 0, []))
    results = fineweb.encode_in_order((((0, i, 0), chunk) for i in range(9)), "gpt2", 2)
    assert len(list(itertools.islice(results, 9))) == 9
    workers = multiprocessing.active_children()
    for worker in workers:
        os.kill(worker.pid, signal.SIGSTOP)
    end = threading.Thread(target=results.close)
    end.start()
    end.join(20)
    for worker in workers:
        worker.kill()
    assert len(workers) == 2 and not end.is_alive()


def read_much():
    """Documents whose result takes long to send."""
    return documents.from_texts([(b"text", "", None)], 0, ["x" * 100_000_000])


def test_a_worker_killed_while_it_sends_is_an_error():
    """The rest of its result never comes: waiting for it would be forever."""
    for delay in (0.0, 0.01, 0.02, 0.04):
        chunks = (((0, i, 0), documents.Chunk(read_much, ())) for i in range(9))
        results = fineweb.encode_in_order(chunks, "gpt2", 2)
        next(results)
        with ThreadPoolExecutor(1) as thread:
            end = thread.submit(list, results)
            time.sleep(delay)
            for process in multiprocessing.active_children():
                process.kill()
            with pytest.raises(UserError, match="one of 2 worker processes died"):
                end.result(60)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_killed_build_goes_on_and_is_identical(tmp_path, large_input):
    out, flags = tmp_path / "out", {"input": large_input, "num_workers": 2, "shard_tokens": 20_000}
    process = subprocess.Popen(fineweb_command(out, **flags), stderr=subprocess.DEVNULL)
    wait_for(lambda: list(out.glob("*_train_000000.npy")))
    workers = kill_build.children(process.pid)
    process.kill()
    process.wait()
    assert (out / "build.json").exists() and not (out / "manifest.json").exists() and workers
    wait_for(lambda: not any(is_running(pid) for pid in workers))  # they end by themselves
    with pytest.raises(UserError, match=r"unfinished build; run it again: python fineweb\.py") as error:
        TokenStream(out, "train")
    assert f"--input={large_input}" in str(error.value) and f"--data_dir={out}" in str(error.value)
    with pytest.raises(UserError, match="other settings"):
        build(out, **{**flags, "max_tokens": 5})
    done = json.loads((out / "build.json").read_text(encoding="utf-8"))["pairs"]
    names = [record["file"] for pair in done for record in pair["files"]]
    written = {name: (out / name).stat().st_mtime_ns for name in names}
    (out / "text_train_999999.npy.77.tmp").write_bytes(b"torn")  # as a kill in the middle of a write does
    (out / "mine.txt").write_text("kept", encoding="utf-8")
    assert run(out, **{**flags, "num_workers": 1}).returncode == 0
    assert all((out / name).stat().st_mtime_ns == at for name, at in written.items())
    assert (out / "mine.txt").unlink() is None
    assert contents(out) == contents(build(tmp_path / "undisturbed", **{**flags, "num_workers": 1}))


def ignores_interrupts(pid):
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return int(re.search(r"SigIgn:\s+(\w+)", status)[1], 16) >> (signal.SIGINT - 1) & 1


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_ctrl_c_while_workers_import_is_one_message(tmp_path, large_input):
    """A terminal sends it to the whole process group."""
    flags = {"input": large_input, "num_workers": 2, "shard_tokens": 200_000}
    for delay in (0.1, 0.3, 0.6):
        process = subprocess.Popen(fineweb_command(tmp_path / "out", **flags), stderr=subprocess.PIPE,
                                   text=True, start_new_session=True)
        wait_for(lambda process=process: len(kill_build.children(process.pid)) == 2
                 and not ignores_interrupts(process.pid))  # as it does while it starts them
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 130 and stderr.endswith("interrupted\n") and "Traceback" not in stderr
    expected = contents(build(tmp_path / "undisturbed", **{**flags, "num_workers": 1}))
    assert contents(build(tmp_path / "out", **flags)) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_killed_at_random_moments(tmp_path):
    corpus = kill_build.make_corpus(tmp_path / "in", 10)
    command = [sys.executable, str(ROOT / "fineweb.py"), f"--input={corpus}", "--shard_tokens=50000"]
    kill_build.rounds(command, tmp_path, 5, random.Random(0))


def test_two_builds_at_once_are_refused(tmp_path, source):
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out", "build"), pytest.raises(UserError, match="a build is at work"):
        build(tmp_path / "out", input=source)
    build(tmp_path / "out", input=source)


@pytest.mark.parametrize("blocks, done", [(4, False), (900, True)])
def test_a_full_disk_keeps_what_is_done_and_the_rerun_is_identical(tmp_path, blocks, done):
    """`ulimit -f` allows for files of some size: no shard fits, or all but those of one long document."""
    rng = random.Random(0)
    docs = [" ".join(rng.choices(["a", "longer", "text"], k=500_000 if i == 20 else 3000)) for i in range(40)]
    source = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": docs}), source, row_group_size=1)  # each a chunk
    flags = {"input": source, "shard_tokens": 1000, "num_workers": 1, "val_fraction": 0.0}
    limit = ["bash", "-c", f'ulimit -f {blocks}; exec "$@"', "-"]
    command = [*limit, *fineweb_command(tmp_path / "out", **flags)]
    first = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120,
                           env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
    assert first.returncode == 2 and "no space" in first.stderr, first
    assert ("What is done is kept" in first.stderr) == done and not list((tmp_path / "out").glob("*.tmp"))
    assert len(list_shards(tmp_path / "out", "train")) == (20 if done else 0)
    build(tmp_path / "out", **flags)
    assert contents(tmp_path / "out") == contents(build(tmp_path / "undisturbed", **flags))


# ---- several machines ----------------------------------------------------------


def machines(data_dir, count, ranks=None, **flags):
    env = {**os.environ, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return [subprocess.Popen(fineweb_command(data_dir, **flags), env={**env, "RANK": str(rank)}, text=True,
                             stderr=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
            for rank in ranks or range(count)]


def documents_of(folder, split):
    ids = np.array(tokens_of(folder, split))
    return sorted(tuple(part.tolist()) for part in np.split(ids, np.flatnonzero(ids == EOT))[1:])


def test_machines_share_the_files_and_do_not_wait_for_each_other(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(5):
        table = pa.table({"text": [text.decode() for text in DOCUMENTS[i::5] if text]})
        pq.write_table(table, tmp_path / "in" / f"{i}.parquet", row_group_size=10)
    flags, out = {"input": tmp_path / "in", "num_workers": 1}, tmp_path / "out"
    last, = machines(out, 3, ranks=[2], **flags)  # alone, and first
    assert last.wait(120) == 0
    with pytest.raises(UserError, match=r"manifest_2_of_3\.json but no manifest_0_of_3\.json"):
        TokenStream(out, "train")
    with pytest.raises(UserError, match=r"already holds .*_2_of_3\.json"):
        build(out, **flags)  # one machine does not mix with three
    runs = machines(out, 3, ranks=[0, 1, 2], **flags)
    outputs = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], outputs
    assert "already built" in outputs[2][0]
    alone = build(tmp_path / "alone", **flags)
    for split in ("train", "val"):
        assert documents_of(out, split) == documents_of(alone, split) and len(documents_of(out, split)) > 3
    one, many = read_manifest(alone), read_manifest(out)
    for key in ("documents", "tokens", "text_bytes", "splits", "empty_documents"):
        assert one[key] == many[key]
    fineweb.verify_folder(out)
    before = contents(out)
    mine = [path for path in list_shards(out, "train") if int(path.stem[-6:]) % 3 == 1]
    mine[-1].unlink()
    assert all(run.wait(120) == 0 for run in machines(out, 3, **flags))
    assert contents(out) == before


def test_two_starts_of_one_machine_are_refused(tmp_path, source, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    (tmp_path / "out").mkdir()
    with (locked(tmp_path / "out", "build", name=".lock_1_of_2"),
          pytest.raises(UserError, match="a build is at work")):
        build(tmp_path / "out", input=source)
    with locked(tmp_path / "out", "build", name=".lock_0_of_2"):
        build(tmp_path / "out", input=source)


@pytest.mark.parametrize("flags", [{"max_tokens": 5}, {"dataset": "python", "input": ""}])
def test_what_machines_cannot_share_is_refused(tmp_path, monkeypatch, flags):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"several machines .*run this on one"):
        build(tmp_path / "out", **{"input": tmp_path, **flags})


# ---- verify --------------------------------------------------------------------


def verify(folder):
    return subprocess.run([sys.executable, str(ROOT / "fineweb.py"), "--verify", f"--data_dir={folder}"],
                          capture_output=True, text=True, encoding="utf-8", timeout=120)


@pytest.mark.parametrize("name, harm", [
    ("text_train_000002.npy", "flip"), ("text_train_000002.npy", "cut"), ("text_train_000002.npy", "missing"),
    ("text_val_000000.npy", "other ids"), ("text_val_000000.npy", "missing")])
def test_verify_names_the_file_and_the_command_that_makes_it_again(tmp_path, source, harm, name):
    folder = build(tmp_path / "out it", input=source)
    before, path = contents(folder), folder / name
    good = verify(folder)
    assert good.returncode == 0 and "is complete: 8 shards" in good.stdout, good
    content = bytearray(path.read_bytes())
    match harm:
        case "flip":
            content[-1] ^= 1
        case "cut":
            content = content[:-2]
        case "other ids":
            content[-2:] = b"\xff\xff"
    path.unlink() if harm == "missing" else path.write_bytes(content)
    done = verify(folder)
    assert done.returncode == 2 and f"{path}" in done.stderr.splitlines()[-1], done
    command = done.stderr.rpartition("to make it again: ")[2]
    command = command.replace("python fineweb.py", shlex.join([sys.executable, str(ROOT / "fineweb.py")]))
    subprocess.run(command, shell=True, check=True, timeout=120)
    assert contents(folder) == before


def test_verify_finds_what_the_checksums_cannot(tmp_path, source):
    folder = build(tmp_path / "out", input=source)
    good = (folder / "manifest.json").read_text(encoding="utf-8")

    def rewrite(change):
        change(manifest := json.loads(good))
        (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")

    rewrite(lambda manifest: manifest["tokenizer"].update(n_vocab=EOT))
    with pytest.raises(UserError, match="has the id 50256, but the vocabulary 50,256"):
        fineweb.verify_folder(folder)
    rewrite(lambda manifest: manifest["splits"]["train"].update(documents=7))
    with pytest.raises(UserError, match=r"has \d+ train documents .* not the 7 "):
        fineweb.verify_folder(folder)
    rewrite(lambda manifest: None)
    (folder / "text_train_000999.npy").write_bytes((folder / "text_train_000000.npy").read_bytes())
    with pytest.raises(UserError, match=r"000999\.npy is not in the manifest"):
        fineweb.verify_folder(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"no manifest\.json"):
        fineweb.verify_folder(folder)
