"""fineweb.py as a whole: builds that are killed, damaged, shared by machines, checked; bad input left out."""
import dataclasses
import gzip
import json
import os
import random
import subprocess
import sys
import time

import kill_build
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_fineweb import (
    DEFAULTS,
    DOCUMENTS,
    EOT,
    ROOT,
    build,
    contents,
    fineweb_command,
    slow_build,
    tokens_of,
    wait_for,
    write_input,
)

import documents
import fineweb
from configurator import UserError
from files import locked
from shards import TokenStream, list_shards, read_manifest

# ---- bad input that is tolerated -----------------------------------------------


def bad_files(folder):
    """Files of every kind in which something is bad; returns (folder, good documents, bad places)."""
    folder.mkdir()
    good = [document.decode() for document in DOCUMENTS if document]
    lines = [json.dumps({"text": text}) for text in good[:30]]
    lines[3:3] = ["{", '{"text": null}', '{"body": "x"}']
    (folder / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 50)[:-9])
    table = pa.table({"text": [*good[30:50], None, *good[50:90]], "n": range(61)})
    pq.write_table(table, folder / "c.parquet", row_group_size=20, compression="none", use_dictionary=False)
    content, metadata = bytearray((folder / "c.parquet").read_bytes()), pq.read_metadata(folder / "c.parquet")
    where = metadata.row_group(2).column(0).data_page_offset  # rows 40 to 59: good[69:89]
    content[where:where + 16] = b"\xff" * 16
    (folder / "c.parquet").write_bytes(content)
    pq.write_table(pa.table({"other": ["x"]}), folder / "d.parquet")
    (folder / "e.parquet").write_bytes(b"not one")
    (folder / "f.txt").write_bytes(b"caf\xe9")
    (folder / "g.txt").write_text(good[100], encoding="utf-8")
    strings = pa.Array.from_buffers(pa.string(), 3, [None, pa.array([0, 2, 4, 6], pa.int32()).buffers()[1],
                                                     pa.py_buffer(b"ok\xc3(ok")])
    pq.write_table(pa.table({"text": strings}), folder / "h.parquet")
    places = ["a.jsonl, line 4", "a.jsonl, line 5", "a.jsonl, line 6", "b.jsonl.gz, from line 1 on",
              "c.parquet, row 20", "c.parquet, row group 2, rows 40 to 59", "d.parquet", "e.parquet", "f.txt",
              "h.parquet, row 1"]
    kept = [*good[:69], good[89], good[100], "ok", "ok"]
    return folder, [text.encode() for text in kept], places


@pytest.mark.parametrize("num_workers", [1, 2])
def test_skip_bad_leaves_out_and_lists(tmp_path, encoding, num_workers):
    source, kept, places = bad_files(tmp_path / "in")
    flags = {"input": source, "num_workers": num_workers, "shard_tokens": 10**6}
    folder = build(tmp_path / "out", **flags, skip_bad=len(places))
    assert [tokens_of(folder, split) for split in ("train", "val")] == list(slow_build(kept, encoding))
    bad = read_manifest(folder)["bad"]
    assert [place.removeprefix(f"{source}/") for place, _ in bad] == places
    assert all(reason for _, reason in bad)
    for allowed in range(len(places)):
        with pytest.raises(UserError) as error:
            build(tmp_path / "less", **flags, skip_bad=allowed)
        assert f"{source}/{places[allowed]}: " in str(error.value) and "--skip_bad=N" in str(error.value)
        assert not list((tmp_path / "less").iterdir())


def test_skip_bad_can_be_raised_to_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "CHUNK_BYTES", 3000)
    source, _, places = bad_files(tmp_path / "in")
    with pytest.raises(UserError):
        build(tmp_path / "out", input=source, skip_bad=8)
    kept = {path: path.stat().st_mtime_ns for path in list_shards(tmp_path / "out", "train")}
    build(tmp_path / "out", input=source, skip_bad=len(places))
    assert kept and all(path.stat().st_mtime_ns == at for path, at in kept.items())
    assert contents(tmp_path / "out") == contents(build(tmp_path / "whole", input=source, skip_bad=99))


def test_what_is_bad_stays_bad_when_run_again(tmp_path):
    lines = [json.dumps({"text": text.decode()}) for text in DOCUMENTS]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, '{"text": null}']), encoding="utf-8")
    for _ in range(2):
        with pytest.raises(UserError, match="line 151"):
            build(tmp_path / "out", input=tmp_path / "a.jsonl", shard_tokens=500)
    build(tmp_path / "out", input=tmp_path / "a.jsonl", shard_tokens=500, skip_bad=1)
    with pytest.raises(UserError, match="line 151"):
        build(tmp_path / "other", input=tmp_path / "a.jsonl", shard_tokens=500)


def test_a_file_that_may_not_be_read_is_not_skipped(tmp_path, monkeypatch):
    source = write_input(tmp_path / "in", "jsonl", DOCUMENTS)

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pa, "input_stream", denied)
    with pytest.raises(UserError, match=r"corpus\.jsonl: cannot be read \(Permission denied\)"):
        build(tmp_path / "out", input=source, skip_bad=5)


# ---- large txt files -----------------------------------------------------------


def awkward_text(seed):
    rng = random.Random(seed)
    words = ["word", " word", "\n", "\n\n", "  ", " ", "\t", "'s", " 'll", "naïve", "日本語", "。\n",
             "\u3000", "\u2003 ", "\u00a0", "12", "...", "\r\n", "🙂", "x'", "\u0085\n"]
    return "".join(rng.choices(words, k=600))


@pytest.mark.parametrize("seed", range(20))
def test_pieces_of_a_txt_file_give_the_tokens_of_the_whole(tmp_path, encoding, monkeypatch, seed):
    monkeypatch.setattr(documents, "CHUNK_BYTES", 128)
    monkeypatch.setattr(documents, "BIG", 256)
    (tmp_path / "in").mkdir()
    texts = ["short", awkward_text(seed), "between", awkward_text(seed + 100), "last"]
    for i, text in enumerate(texts):
        (tmp_path / "in" / f"{i}.txt").write_bytes(text.encode())
    assert len(list(documents.input_source(str(tmp_path / "in"), "text").chunks())) > 20
    folder = build(tmp_path / "out", input=tmp_path / "in", val_fraction=0.5)
    train, val = slow_build([text.encode() for text in texts], encoding, 0.5)
    if train and val:
        assert tokens_of(folder, "train") == train and tokens_of(folder, "val") == val
        assert read_manifest(folder)["documents"] == 5
    everything = build(tmp_path / "all", input=tmp_path / "in", val_fraction=0)
    assert tokens_of(everything, "train") == slow_build([text.encode() for text in texts], encoding, 0)[0]


def test_max_tokens_takes_the_whole_of_a_large_txt_file(tmp_path, encoding, monkeypatch):
    monkeypatch.setattr(documents, "CHUNK_BYTES", 128)
    monkeypatch.setattr(documents, "BIG", 256)
    (tmp_path / "in").mkdir()
    for i, text in enumerate(["first", awkward_text(1), "never reached"]):
        (tmp_path / "in" / f"{i}.txt").write_bytes(text.encode())
    folder = build(tmp_path / "out", input=tmp_path / "in", max_tokens=100, val_fraction=0)
    assert tokens_of(folder, "train") == slow_build([b"first", awkward_text(1).encode()], encoding, 0)[0]


@pytest.mark.parametrize("at", [0.3, 0.5, 0.77])
def test_one_large_txt_file_is_cut_in_two(tmp_path, encoding, monkeypatch, at):
    text = "".join(f"line {i} of the text\n" for i in range(400)).encode()
    (tmp_path / "a.txt").write_bytes(text)
    whole = build(tmp_path / "whole", input=tmp_path / "a.txt", val_fraction=at)
    monkeypatch.setattr(documents, "CHUNK_BYTES", 128)
    monkeypatch.setattr(documents, "BIG", 256)
    folder = build(tmp_path / "out", input=tmp_path / "a.txt", val_fraction=at)
    train, val = (encoding.decode(tokens_of(folder, split)[1:]).encode() for split in ("train", "val"))
    assert train + val == text and abs(len(val) - at * len(text)) < 24
    assert tokens_of(folder, "train").count(EOT) == tokens_of(folder, "val").count(EOT) == 1
    assert abs(len(train) - len(encoding.decode(tokens_of(whole, "train")[1:]))) <= 24
    fineweb.verify_folder(folder)


def test_a_cut_between_two_pieces_starts_a_document(tmp_path, monkeypatch):
    text = "".join(f"line {i} of the text\n" for i in range(400)).encode()
    (tmp_path / "a.txt").write_bytes(text)
    monkeypatch.setattr(documents, "CHUNK_BYTES", 128)
    monkeypatch.setattr(documents, "BIG", 256)
    starts = [chunk.args[1] for chunk in documents.text_pieces(tmp_path / "a.txt")]
    cut = starts[len(starts) // 2]
    folder = build(tmp_path / "out", input=tmp_path / "a.txt", val_fraction=1 - (cut + 0.5) / len(text))
    assert read_manifest(folder)["cut"]["at_byte"] == cut
    assert [tokens_of(folder, split).count(EOT) for split in ("train", "val")] == [1, 1]
    assert tokens_of(folder, "val")[0] == EOT and read_manifest(folder)["documents"] == 2
    fineweb.verify_folder(folder)


def test_a_large_txt_file_that_is_not_utf8_is_left_out_whole(tmp_path, encoding, monkeypatch):
    monkeypatch.setattr(documents, "CHUNK_BYTES", 128)
    monkeypatch.setattr(documents, "BIG", 256)
    (tmp_path / "a.txt").write_bytes(b"some words " * 50 + b"\xff" + b" more " * 50)
    (tmp_path / "b.txt").write_bytes(b"good")
    flags = {"input": f"{tmp_path / 'a.txt'},{tmp_path / 'b.txt'}", "val_fraction": 0}
    with pytest.raises(UserError, match=r"a\.txt: not UTF-8 in bytes 512 to 640"):
        build(tmp_path / "out", **flags)
    folder = build(tmp_path / "out", **flags, skip_bad=1)
    assert tokens_of(folder, "train") == slow_build([b"good"], encoding, 0)[0]


# ---- several machines ----------------------------------------------------------


def machines(data_dir, count, ranks=None, **flags):
    env = {**os.environ, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return [subprocess.Popen(fineweb_command(data_dir, **flags), env={**env, "RANK": str(rank)}, text=True,
                             stderr=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
            for rank in ranks or range(count)]


def documents_of(folder, split):
    ids = np.array(tokens_of(folder, split))
    return sorted(tuple(part.tolist()) for part in np.split(ids, np.flatnonzero(ids == EOT))[1:])


def test_machines_share_the_files_and_make_one_manifest(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(5):
        table = pa.table({"text": [text.decode() for text in DOCUMENTS[i::5] if text]})
        pq.write_table(table, tmp_path / "in" / f"{i}.parquet", row_group_size=10)
    flags = {"input": tmp_path / "in", "num_workers": 1}
    alone = build(tmp_path / "alone", **flags)
    runs = machines(tmp_path / "out", 3, **flags)
    outputs = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], outputs
    out = tmp_path / "out"
    assert {path.name.rsplit("_", 1)[1][:2] for path in list_shards(out, "train")} == {"00", "01", "02"}
    assert not [path for path in out.iterdir() if path.name.startswith(("progress", "build"))]
    for split in ("train", "val"):
        assert documents_of(out, split) == documents_of(alone, split) and len(documents_of(out, split)) > 3
    one, many = read_manifest(alone), read_manifest(out)
    for key in ("documents", "tokens", "text_bytes", "splits", "empty_documents"):
        assert one[key] == many[key]
    fineweb.verify_folder(out)
    before = contents(out)
    list_shards(out, "train")[-1].unlink()  # of the third machine; one alone can make it again
    build(out, **flags)
    assert contents(out) == before


def test_a_machine_that_was_killed_goes_on(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(2):
        write_input(tmp_path / "in" / str(i), "jsonl", DOCUMENTS[i * 70:][:70])
    flags = {"input": tmp_path / "in", "num_workers": 1}
    first, second = machines(tmp_path / "out", 2, **flags)
    second.kill()
    wait_for((tmp_path / "out" / "progress_00000.part").exists)
    time.sleep(1)
    assert first.poll() is None  # it waits
    again, = machines(tmp_path / "out", 2, ranks=[1], **flags)
    assert again.wait(60) == 0 and first.wait(60) == 0
    TokenStream(tmp_path / "out", "train")


@pytest.mark.parametrize("flags", [{"max_tokens": 5}, {"dataset": "python", "input": ""}])
def test_what_machines_cannot_share_is_refused(tmp_path, monkeypatch, flags):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"on 2 machines.*run it on one"):
        build(tmp_path / "out", **{"input": tmp_path, **flags})


def test_one_machine_does_not_go_on_for_two(tmp_path, monkeypatch):
    source = write_input(tmp_path / "in", "jsonl", DOCUMENTS)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "build.json").write_text(json.dumps({"settings": {"machines": 2}}), encoding="utf-8")
    with pytest.raises(UserError, match="machines=2, wanted None"):
        build(tmp_path / "out", input=source)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 9999, '{"settings": []}', '{"settings": {"a": []}}'])
def test_a_damaged_build_json_is_told(tmp_path, text):
    source = write_input(tmp_path / "in", "jsonl", DOCUMENTS)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "build.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"build\.json.*delete its shards"):
        build(tmp_path / "out", input=source)


# ---- verify --------------------------------------------------------------------


def verify(folder):
    return subprocess.run([sys.executable, str(ROOT / "fineweb.py"), "--verify", f"--data_dir={folder}"],
                          capture_output=True, text=True, encoding="utf-8", timeout=120)


def test_verify_accepts_a_good_folder(tmp_path):
    folder = build(tmp_path / "out", input=write_input(tmp_path / "in", "parquet", DOCUMENTS))
    done = verify(folder)
    assert done.returncode == 0 and "is whole: 19 shards" in done.stdout
    assert "share no document" in done.stdout
    assert "100%" in done.stderr


@pytest.mark.parametrize("name", ["text_train_000003.npy", "text_val_000000.npy"])
@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "other ids"])
def test_verify_names_the_file_and_the_command_that_mends_it(tmp_path, damage, name):
    folder = build(tmp_path / "out it", input=write_input(tmp_path / "in", "parquet", DOCUMENTS))
    before, path = contents(folder), folder / name
    content = bytearray(path.read_bytes())
    match damage:
        case "flip":
            content[-1] ^= 1
        case "cut":
            content = content[:-2]
        case "other ids":
            content[-2:] = b"\xff\xff"
    path.unlink() if damage == "missing" else path.write_bytes(content)
    done = verify(folder)
    assert done.returncode == 2 and f"{path}" in done.stderr.splitlines()[-1], done
    command = done.stderr.rpartition("and only it: ")[2]
    command = command.replace("python fineweb.py", f"{sys.executable} {ROOT / 'fineweb.py'}")
    subprocess.run(command, shell=True, check=True, timeout=120)
    assert contents(folder) == before and verify(folder).returncode == 0


def rewrite_manifest(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def test_verify_finds_what_the_checksums_cannot(tmp_path):
    folder = build(tmp_path / "out", input=write_input(tmp_path / "in", "parquet", DOCUMENTS))
    good = (folder / "manifest.json").read_bytes()
    rewrite_manifest(folder, lambda manifest: manifest["tokenizer"].update(n_vocab=EOT))
    with pytest.raises(UserError, match="got id 50256, wanted ids below 50256"):
        fineweb.verify_folder(folder)
    (folder / "manifest.json").write_bytes(good)
    rewrite_manifest(folder, lambda manifest: manifest["splits"]["train"].update(documents=7))
    with pytest.raises(UserError, match=r"got \d+ train documents .* wanted 7"):
        fineweb.verify_folder(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"no manifest\.json"):
        fineweb.verify_folder(folder)


@pytest.mark.parametrize("shared", [0, 20, 79])
def test_verify_finds_a_document_on_both_sides(tmp_path, monkeypatch, shared):
    docs = [b"document number %d, of some words" % i for i in range(80)] + [b"in validation"]
    docs[shared] = b"in validation"
    hashes = iter([*range(80), 2**64 - 1])  # not a function of the text, as a build that mixes documents up

    def wrong(_, offsets):
        return np.array([2**64 - 1 - next(hashes) for _ in offsets[1:]], dtype=np.uint64)

    monkeypatch.setattr(fineweb, "hash_documents", wrong)
    folder = build(tmp_path / "out", input=write_input(tmp_path / "in", "jsonl", docs), shard_tokens=100)
    with pytest.raises(UserError, match=rf"got 1 train documents, .* number {shared} .*validation too"):
        fineweb.verify_folder(folder)


def test_verify_tells_near_equal_documents_apart(tmp_path):
    """Also those that differ by leading tokens of id 0, which is "!"."""
    docs = [b"!" * n + b" foo" for n in range(12)] + [b" foo" + b"!" * n for n in range(12)]
    folder = build(tmp_path / "out", input=write_input(tmp_path / "in", "jsonl", docs), val_fraction=0.5)
    assert read_manifest(folder)["sides"] == "by hash"
    fineweb.verify_folder(folder)


def test_verify_reports_what_is_not_in_the_manifest(tmp_path):
    folder = build(tmp_path / "out", input=write_input(tmp_path / "in", "parquet", DOCUMENTS))
    (folder / "text_train_000999.npy").write_bytes(b"")
    with pytest.raises(UserError, match=r"000999\.npy is not in manifest"):
        fineweb.verify_folder(folder)


# ---- what is the user's --------------------------------------------------------


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
    with pytest.raises(UserError, match="where the text is"):
        build(tmp_path / "in", input=tmp_path / "in")


def test_input_files_are_taken_once_and_through_links(tmp_path):
    (tmp_path / "in" / "folder.parquet").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for name in ("in/a.txt", "in/folder.parquet/b.txt", "elsewhere/c.txt"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "in")
    folder, relative = tmp_path / "in", os.path.relpath(tmp_path / "in" / "a.txt")
    found = [path.name for path in documents.input_files(f"{relative},{folder},{folder / 'a.txt'}")]
    assert found == ["a.txt", "b.txt", "c.txt"]


def test_other_contents_of_the_same_size_are_refused(tmp_path, monkeypatch):
    source = write_input(tmp_path / "in", "jsonl", DOCUMENTS)
    folder = build(tmp_path / "out", input=source)
    source.write_bytes(source.read_bytes().replace(b"model", b"madel", 1))
    with pytest.raises(UserError, match=r"input_contents=\w+, wanted \w+; delete .* --data_dir"):
        build(folder, input=source)
    source.write_bytes(source.read_bytes().replace(b"madel", b"model", 1))
    monkeypatch.chdir(tmp_path)
    build(folder, input=os.path.relpath(source))  # the same, spelled otherwise


def test_the_progress_of_another_build_is_not_used(tmp_path):
    """As it stays behind where somebody removes build.json alone."""
    few = write_input(tmp_path / "few", "txt", [b"some words\n" * 500])
    plan = fineweb.make_plan(**{**DEFAULTS, "data_dir": str(tmp_path / "out"), "input": str(few)})
    (tmp_path / "out").mkdir()
    fineweb.save_progress(plan, dataclasses.asdict(fineweb.Progress(cut_at=7, sizes=[9], chunks=3)), {})
    source = write_input(tmp_path / "in", "jsonl", DOCUMENTS)
    folders = [build(tmp_path / name, input=source) for name in ("out", "whole")]
    assert contents(folders[0]) == contents(folders[1])


def test_a_corpus_that_changes_is_not_mixed(tmp_path, monkeypatch):
    """The embedded corpus is what is installed, which may change between a kill and the next run."""
    monkeypatch.setattr(documents, "CHUNK_BYTES", 3000)
    (tmp_path / "lib").mkdir()
    monkeypatch.setattr(documents.sysconfig, "get_path", lambda key: tmp_path / "lib")
    for i in range(40):
        (tmp_path / "lib" / f"{i}.py").write_text(f"# file {i}\n" + "some = text\n" * 40, encoding="utf-8")
    flags = {"dataset": "python", "shard_tokens": 500}
    take, calls = fineweb.Output.add, iter(range(6))

    def add(output, place, done):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        take(output, place, done)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fineweb.Output, "add", add)
        build(tmp_path / "out", **flags)
    assert (tmp_path / "out" / "progress_00000.part").exists()
    (tmp_path / "lib" / "new.py").write_text("# installed since\n" * 40, encoding="utf-8")
    with pytest.raises(UserError, match="not those that the build"):
        build(tmp_path / "out", **flags)
    (tmp_path / "lib" / "new.py").unlink()
    build(tmp_path / "out", **flags)
    assert contents(tmp_path / "out") == contents(build(tmp_path / "whole", **flags))


# ---- kill -9 at any moment -----------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_killed_at_random_moments(tmp_path):
    """A few of what tests/kill_build.py does by the dozen."""
    corpus = kill_build.make_corpus(tmp_path / "in", 10)
    command = [sys.executable, str(ROOT / "fineweb.py"), f"--input={corpus}", "--shard_tokens=50000"]
    struck = kill_build.rounds(command, tmp_path, 5, random.Random(0))
    assert struck.total() >= 5


def test_two_builds_at_once_are_refused(tmp_path):
    (tmp_path / "out").mkdir()
    source = write_input(tmp_path / "in", "jsonl", DOCUMENTS)
    with locked(tmp_path / "out", "build"), pytest.raises(UserError, match="a build is at work"):
        build(tmp_path / "out", input=source)
    build(tmp_path / "out", input=source)


def test_full_disk_keeps_what_is_done_and_the_rerun_is_identical(tmp_path):
    """`ulimit -f` allows for files of some size, which the shards are below, and the progress gets above."""
    rng = random.Random(0)
    docs = [" ".join(rng.choices(["a", "longer", "text"], k=3000)) for _ in range(40)]
    source = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": docs}), source, row_group_size=1)  # each a chunk
    flags = {"input": source, "shard_tokens": 1000, "num_workers": 1}
    limit = ["bash", "-c", 'ulimit -f 8; exec "$@"', "-"]
    command = [*limit, *fineweb_command(tmp_path / "out", **flags)]
    first = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120,
                           env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
    assert first.returncode == 2 and "no space" in first.stderr and "What is done is kept" in first.stderr
    assert (tmp_path / "out" / "progress_00000.part").exists() and not list((tmp_path / "out").glob("*.tmp"))
    build(tmp_path / "out", **flags)
    assert contents(tmp_path / "out") == contents(build(tmp_path / "whole", **flags))
