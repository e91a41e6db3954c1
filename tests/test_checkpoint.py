"""Checkpoints: valid or refused, written beside the training, safe to load, enough to generate and resume."""

import ast
import copy
import errno
import json
import os
import pickle
import shutil
import stat
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoint_ranks import accept, build, state_of, train
from training import PYTHON, ROOT, assert_same_tensors, load_model, run_by_hand, tensors_of

import analyze_compute
import checkpoint
from bpe import load_tokenizer, tokenizer_from_ranks
from checkpoint import (
    CheckpointWriter,
    ForeignCheckpoint,
    checkpoint_tokenizer,
    describe_model,
    describe_tokenizer,
    holds_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_into,
    newest_checkpoint,
    restore,
    save_checkpoint,
    training_state,
)
from configurator import UserError
from convert_hf import load_any
from model import GPT, GPTConfig


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


@pytest.fixture
def state(byte_tokenizer):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=384, n_vocab=257, n_layer=2, n_head=2, n_embd=32))
    optimizer, = model.configure_optimizers("adamw", 0.1, 1e-3, (0.9, 0.95), fused=True)
    model(torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long)).backward()
    optimizer.step()
    return {**training_state(model, [optimizer]), "step": 7, "model_config": describe_model(model),
            "tokenizer": describe_tokenizer(load_tokenizer(str(byte_tokenizer)))}


def writable(log_dir, *steps, **changed):
    """A trained model, its optimizers, and a writer that has written `steps`."""
    model, optimizers = build()
    train(model, optimizers, 0, 2)
    writer = CheckpointWriter(log_dir, keep=2)
    for step in steps:
        writer.save(step, state_of(step, model, optimizers, **changed), None)
        writer.wait()
    return model, optimizers, writer


def test_round_trip(state, tmp_path, byte_tokenizer):
    path = save_checkpoint(tmp_path, 7, state)
    assert names(tmp_path) == ["ckpt_0000007.pt"]
    tensors = tensors_of(state).values()  # among them the tied matrix twice, which is stored once
    assert path.stat().st_size < sum(tensor.nbytes for tensor in tensors)
    model, loaded = load_model(path)
    assert loaded["step"] == 7 and not model.training
    assert_same_tensors(model.state_dict(), state["model"])
    assert model.lm_head.weight is model.transformer.wte.weight
    assert_same_tensors(state["optimizers"], loaded["optimizers"])
    tok, expected = checkpoint_tokenizer(loaded), load_tokenizer(str(byte_tokenizer))
    assert (tok.name, tok.sha256, tok.n_vocab) == (expected.name, expected.sha256, 257)
    assert load_model(tmp_path)[1]["step"] == 7  # the folder means its newest


def test_only_gpt2s_own_rank_file_is_not_stored(byte_tokenizer):
    """By the file's hash: another vocabulary may be called gpt2, and GPT-2's anything."""
    gpt2, own = load_tokenizer("gpt2"), tokenizer_from_ranks(byte_tokenizer.read_bytes(), "gpt2")
    renamed = tokenizer_from_ranks(gpt2.rank_file, "mine")
    for tok, stored in [(gpt2, False), (renamed, False), (own, True)]:
        saved = describe_tokenizer(tok)
        assert (saved["rank_file"] is not None) == stored
        assert checkpoint_tokenizer({"tokenizer": saved}).sha256 == tok.sha256


def test_the_rank_file_is_that_of_its_hash(state):
    gpt2 = {**state["tokenizer"], "rank_file": None}
    cut = {**state["tokenizer"], "rank_file": state["tokenizer"]["rank_file"][:-1]}
    for saved in (gpt2, cut):
        with pytest.raises(UserError, match="sha256"):
            checkpoint_tokenizer({"tokenizer": saved})


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def compress(path):
    """As `zip` would: torch would map the compressed bytes as they are."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


@pytest.mark.parametrize("corrupt", [
    flip_a_bit, compress,
    lambda path: os.truncate(path, path.stat().st_size - 100),
    lambda path: os.truncate(path, path.stat().st_size // 2),
    lambda path: os.truncate(path, 0),
])
def test_corruption_is_noticed_and_the_previous_checkpoint_used(state, tmp_path, corrupt, capsys):
    save_checkpoint(tmp_path, 1, {**state, "step": 1})
    path = save_checkpoint(tmp_path, 2, {**state, "step": 2})
    corrupt(path)
    with pytest.raises(UserError, match=r"ckpt_0000002\.pt: corrupt"):
        load_checkpoint(path)
    assert load_checkpoint(tmp_path)["step"] == 1
    assert "ckpt_0000002.pt: corrupt" in capsys.readouterr().err


class Malicious:
    def __reduce__(self):
        return print, ("this code ran",)


def test_code_is_never_run(tmp_path, capsys):
    torch.save({"format": checkpoint.FORMAT, "step": Malicious()}, tmp_path / "ckpt_0000001.pt")
    with pytest.raises(ForeignCheckpoint, match="could run code"):
        load_checkpoint(tmp_path / "ckpt_0000001.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(UserError):
        load_checkpoint(tmp_path / "plain.pt")
    assert "this code ran" not in capsys.readouterr().out


def test_every_load_in_the_repository_is_weights_only():
    calls = 0
    for path in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called in ("torch.load", "pickle.load", "pickle.loads", "pickle.Unpickler"):
                calls += 1
                assert "weights_only=True" in ast.unparse(node), f"{path.name}:{node.lineno}"
    assert calls >= 1


def test_not_a_checkpoint_of_ours(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    for name, words in [("none.pt", "not there"), ("", "got none"), ("pipe.pt", "got none")]:
        with pytest.raises(UserError, match=words):
            load_checkpoint(tmp_path / name)
    torch.save({"model": {}}, tmp_path / "foreign.pt")
    with pytest.raises(ForeignCheckpoint, match="not written by train_gpt2"):
        load_checkpoint(tmp_path / "foreign.pt")


@pytest.mark.parametrize(("key", "value", "words"), [
    ("n_layer", 2**31, "n_layer"), ("n_embd", 2**23, "do not fit its own model_config"),
    ("block_size", 2**24, "do not fit its own model_config"), ("n_layer", 3, r"transformer\.h\.2"),
    ("rotary", True, "rotary"),
])
def test_a_wrong_model_config_is_refused_before_memory_is_taken(state, tmp_path, key, value, words):
    resource = pytest.importorskip("resource")
    state["model_config"][key] = value
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=rf"(?s)ckpt_0000001\.pt.*{words}"):
        load_checkpoint(save_checkpoint(tmp_path, 1, state))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_an_untied_lm_head_is_refused(state, tmp_path):
    """As a changed model.py saves it, with the names and shapes of the tied model."""
    state["model"]["lm_head.weight"] = state["model"]["lm_head.weight"] + 1
    with pytest.raises(UserError, match=r"lm_head\.weight is not transformer\.wte\.weight"):
        load_checkpoint(save_checkpoint(tmp_path, 1, state))


# ---- which one
def test_the_default_is_the_run_that_was_written_to_last(tmp_path, monkeypatch):
    """Not the temporary file of a killed write."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="make demo"):
        newest_checkpoint()
    for time, place in enumerate(("log_b/ckpt_9.pt", "log_a/ckpt_2.pt", "log_c/ckpt_3.pt.1.tmp")):
        path = tmp_path / place
        path.parent.mkdir()
        path.touch()
        os.utime(path, (time, time))
    assert newest_checkpoint() == Path("log_a")


@pytest.mark.parametrize("load", [load_checkpoint, load_any])
def test_the_best_can_be_named(state, tmp_path, monkeypatch, load):
    """By the newest valid checkpoint; a file of that name comes first."""
    monkeypatch.chdir(tmp_path)

    def refused(name, words):
        with pytest.raises(UserError, match=words):
            load(name)

    refused("log:best", "not there")
    Path("log").mkdir()
    for step, best in ((4, 4), (8, 4), (12, 8)):
        save_checkpoint("log", step, {**state, "step": step, "best": {"step": best, "val_loss": 2.0}})
    assert load("log:best")["step"] == load(f"{tmp_path}/log:best")["step"] == 8
    assert holds_checkpoint("log:best")
    flip_a_bit(Path("log/ckpt_0000012.pt"))
    assert load(Path("log:best"))["step"] == 4
    flip_a_bit(Path("log/ckpt_0000004.pt"))  # never another one in its place
    refused("log:best", r"ckpt_0000004\.pt: corrupt")
    Path("log/ckpt_0000004.pt").unlink()
    refused("log:best", r"log/ckpt_0000004\.pt is gone, the best one by log/ckpt_0000008\.pt")
    refused("log/ckpt_0000008.pt:best", "not there")
    for best in ({}, {"best": None}):
        save_checkpoint("log", 16, {**state, "step": 16, **best})
        refused("log:best", "records no best one")
    Path("log:best").mkdir()
    save_checkpoint("log:best", 5, {**state, "step": 5})
    assert load("log:best")["step"] == 5


# ---- the write in the background
def test_only_the_newest_and_the_best_stay_on_disk(tmp_path):
    (tmp_path / "ckpt_0000009.pt.4711.tmp").write_bytes(b"of a killed write")
    (tmp_path / "ckpt_mine.pt.old.tmp").write_bytes(b"the user's own")
    (tmp_path / "ckpt_0000021.pt").mkdir()
    writer, steps = CheckpointWriter(tmp_path, keep=2), [1, 2, 3, 9_999_999, 10_000_000]  # order is by number
    for i, step in enumerate(steps):
        writer.save(step, {}, min(step, 2))
        writer.wait()
        kept = [f"ckpt_{s:07d}.pt" for s in steps[: i + 1] if s == 2 or s in steps[max(0, i - 1) :]]
        assert [path.name for path in list_checkpoints(tmp_path)] == kept
        assert names(tmp_path) == sorted([*kept, "ckpt_0000021.pt", "ckpt_mine.pt.old.tmp"])
    writer.save(10_000_001, {}, None)  # nothing is the best any more
    writer.wait()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["ckpt_10000000.pt", "ckpt_10000001.pt"]


def test_what_is_written_is_the_state_at_the_time_of_save(tmp_path, monkeypatch):
    model, optimizers, writer = writable(tmp_path)
    go, original = threading.Event(), torch.save
    monkeypatch.setattr(torch, "save", lambda *args: go.wait(60) and original(*args))
    state = {"log": [1, [2]], **state_of(2, model, optimizers)}
    expected = copy.deepcopy(state)
    writer.save(2, state, None)
    assert list_checkpoints(tmp_path) == []  # save has returned, and nothing is written yet
    train(model, optimizers, 2, 4)
    state["log"][1].append(3)
    optimizers[0].param_groups[0]["lr"] = 7.0
    go.set()
    writer.wait()
    loaded = load_checkpoint(tmp_path)
    assert_same_tensors(loaded, expected)
    assert loaded["log"] == [1, [2]] and loaded["optimizers"][0]["param_groups"][0]["lr"] == 1e-2


def test_host_memory_holds_the_state_once_and_is_filled_again(tmp_path):
    model, optimizers, writer = writable(tmp_path, 1)
    state = training_state(model, optimizers)
    distinct = {id(tensor): tensor for tensor in tensors_of(state).values()}
    assert len(distinct) == len(tensors_of(state)) - 1  # the tied matrix
    buffers = {place: (buffer.data_ptr(), buffer.nbytes) for place, buffer in writer._buffers.items()}
    assert sum(nbytes for _, nbytes in buffers.values()) == sum(t.nbytes for t in distinct.values())
    writer.save(2, state_of(2, model, optimizers), None)
    writer.wait()
    assert {place: (buffer.data_ptr(), buffer.nbytes) for place, buffer in writer._buffers.items()} == buffers
    assert load_checkpoint(tmp_path)["step"] == 2


def test_only_the_master_writes(tmp_path):
    model, optimizers, _ = writable(tmp_path)
    writer = CheckpointWriter(tmp_path, keep=2, master=False)
    writer.save(2, state_of(2, model, optimizers), None)
    writer.wait()
    assert not (writer.failed() or writer._buffers or names(tmp_path))


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EIO, "Input/output error"),
    TypeError("cannot pickle"),
])
def test_a_failed_write_is_reported_once_and_the_next_one_works(tmp_path, monkeypatch, error):
    """By `wait`; `save`, in which other processes may take part, neither raises nor loses it."""
    wanted = {errno.ENOSPC: "no space .*--resume", errno.EIO: "cannot write .*--resume"}
    model, optimizers, writer = writable(tmp_path, 1)

    def fail(state, file):
        file.write(b"half")
        raise error

    for then in ([], [3]):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "save", fail)
            writer.save(2, state_of(2, model, optimizers), None)
            writer._thread.join()
        for step in then:
            writer.save(step, state_of(step, model, optimizers), None)
        assert writer.failed()
        with pytest.raises(TypeError if isinstance(error, TypeError) else UserError,
                           match=wanted.get(getattr(error, "errno", None), "cannot pickle")) as raised:
            writer.wait()
        # the cause says whether a restart may succeed
        assert isinstance(raised.value.__cause__, OSError) == isinstance(error, OSError)
        assert not writer.failed()
        assert names(tmp_path) == ["ckpt_0000001.pt", *(f"ckpt_000000{step}.pt" for step in then)]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_folder_that_cannot_be_synced(state, tmp_path, monkeypatch, code):
    """Shared folders refuse it, and the file is complete; a failing disk is another error than a full one."""
    fsync = os.fsync

    def refuse_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    if code == errno.EIO:
        with pytest.raises(UserError, match=r"cannot write .*output error") as error:
            save_checkpoint(tmp_path, 1, state)
        assert "space" not in str(error.value) and "room" not in str(error.value)
    else:
        assert load_checkpoint(save_checkpoint(tmp_path, 1, state))["step"] == 7


def test_a_checkpoint_that_cannot_be_read_now_is_not_called_corrupt(state, tmp_path, monkeypatch):
    """Or a resume would go on from an older one, and set this one aside."""
    _, newest = save_checkpoint(tmp_path, 1, state), save_checkpoint(tmp_path, 2, state)

    def fail(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(zipfile, "ZipFile", fail)
    with pytest.raises(OSError) as raised:
        load_checkpoint(tmp_path)
    assert raised.value.filename == str(newest)


def test_whatever_training_accepts_can_be_loaded():
    accepted = analyze_compute.train_settings()["__annotations__"]
    for key in ("seed", "block_size", "batch_tokens", "val_tokens"):
        assert checkpoint.CONFIG[key].high >= accepted[key].high, key
    for key in ("n_layer", "n_head", "n_embd", "vocab_size", "block_size"):
        assert checkpoint.USABLE["model_config"][key].high >= accepted[key].high, key


def test_a_full_disk_in_the_middle_of_the_tensors(state, tmp_path):
    """torch's zip writer makes it a RuntimeError. Here the kernel refuses the write, as a full disk does."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"no space for .*File too large"):
            save_checkpoint(tmp_path, 1, state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == []


def test_a_folder_that_was_removed_is_a_failed_write(tmp_path):
    model, optimizers, writer = writable(tmp_path, 1)
    shutil.rmtree(tmp_path)
    writer.save(2, state_of(2, model, optimizers), None)
    with pytest.raises(UserError, match="cannot write"):
        writer.wait()


# ---- resume
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("muon", [False, True])
def test_resume_is_exact_and_uses_the_new_settings(tmp_path, muon, steps):
    model, optimizers = build(muon=muon)
    train(model, optimizers, 0, steps)
    writer = CheckpointWriter(tmp_path, keep=2)
    writer.save(steps, state_of(steps, model, optimizers), None)
    expected = train(model, optimizers, steps, steps + 3)
    writer.wait()

    other, others = build(seed=1, muon=muon)
    others[0].param_groups[0]["weight_decay"] = 0.25
    seen = []
    values = load_into(tmp_path, other, others, seen.append)
    assert seen == [values] and values["step"] == steps and not {"model", "optimizers"} & set(values)
    assert others[0].param_groups[0]["weight_decay"] == 0.25
    others[0].param_groups[0]["weight_decay"] = optimizers[0].param_groups[0]["weight_decay"]
    assert train(other, others, steps, steps + 3) == expected
    assert_same_tensors(training_state(other, others), training_state(model, optimizers))
    assert other.lm_head.weight is other.transformer.wte.weight


def mapped(path):
    return str(path) in Path("/proc/self/maps").read_text(encoding="utf-8")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux what is mapped")
def test_a_file_is_mapped_while_it_is_read_and_never_trained_in(tmp_path, byte_tokenizer):
    tokenizer = describe_tokenizer(load_tokenizer(str(byte_tokenizer)))
    model, optimizers, _ = writable(tmp_path, 1, tokenizer=tokenizer)
    path = tmp_path / "ckpt_0000001.pt"
    before = path.read_bytes()
    other, others = build(seed=1)
    values = load_into(path, other, others, lambda values: mapped(path) or pytest.fail("read, not mapped"))
    loaded, state = load_model(path)
    assert mapped(path)
    expected = copy.deepcopy(state)
    path.unlink()  # while it is mapped
    assert train(other, others, 2, 4) == train(model, optimizers, 2, 4)
    assert_same_tensors(state, expected)
    del state
    assert not mapped(path)  # neither weights, nor optimizers, nor the values hold on to it
    path.write_bytes(before)
    assert checkpoint_tokenizer(values).n_vocab == 257 and not loaded.training


def test_optimizer_state_is_matched_by_name_not_by_number():
    """The same parameters in groups of another order."""
    model, optimizers = build(muon=False)
    train(model, optimizers, 0, 2)
    other, _ = build(muon=False, seed=1)
    parameters = list(other.parameters())
    reordered = torch.optim.AdamW([{"params": parameters[5:]}, {"params": parameters[:5]}], lr=1e-2,
                                  weight_decay=0.1, fused=True)
    restore(other, [reordered], training_state(model, optimizers))
    assert train(other, [reordered], 2, 4) == train(model, optimizers, 2, 4)


def test_optimizer_state_of_another_shape_is_refused(tmp_path):
    model, optimizers, _ = writable(tmp_path)

    def refused(change):
        changed = copy.deepcopy(training_state(model, optimizers))
        muon, adamw = changed["optimizers"]
        change(muon["state"], adamw["state"])
        with pytest.raises(UserError, match="optimizer state of transformer"):
            restore(model, optimizers, changed)

    name = "transformer.wpe.weight"
    refused(lambda muon, adamw: adamw[name].update(exp_avg=torch.zeros(3)))
    refused(lambda muon, adamw: adamw[name].update(step=torch.zeros(1)))
    refused(lambda muon, adamw: adamw[name].update(exp_avg=adamw[name]["exp_avg"].long()))
    refused(lambda muon, adamw: adamw[name].pop("step"))
    refused(lambda muon, adamw: adamw.pop(name))
    refused(lambda muon, adamw: muon.clear())


def refuse(values):
    raise UserError(f"step {values['step']} is not wanted")


@pytest.mark.parametrize(("settings", "check", "words"), [
    ({"n_layer": 3}, accept, r"\[8, 20\] parameters, wanted \[12, 28\]"),
    ({"muon": False}, accept, r"\[8, 20\] parameters, wanted \[28\]"),
    ({"block_size": 8}, accept, r"weights do not fit this model: transformer\.wpe\.weight"),
    ({}, refuse, "step 1 is not wanted"),
])
def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path, settings, check, words):
    writable(tmp_path, 1)
    model, optimizers = build(seed=1, **settings)
    with pytest.raises(UserError, match=words):
        load_into(tmp_path, model, optimizers, check)
    assert_same_tensors(model.state_dict(), build(seed=1, **settings)[0].state_dict())


# ---- sharded models
def launch(n_processes, *scenarios):
    """What scenarios of checkpoint_ranks.py return on n processes."""
    words = " then ".join(scenarios).split(" ")
    line = [PYTHON, ROOT / "tests" / "checkpoint_ranks.py", *words]
    ends = run_by_hand([line] * n_processes)
    assert [returncode for returncode, _, _ in ends] == [0] * n_processes, ends
    return [json.loads(line) for line in ends[0][1].splitlines()]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """(folder, results of its runs); "two" is saved by two processes, "two_four" loads it into four."""
    top = tmp_path_factory.mktemp("sharded")
    for name in ("one", "two", "one_two", "one_four", "two_four", "fail"):
        (top / name).mkdir()
    model, optimizers = build()
    train(model, optimizers, 0, 3)
    writer = CheckpointWriter(top / "one", keep=2)
    writer.save(3, state_of(3, model, optimizers), None)
    writer.wait()
    two = launch(2, f"resume {top}/two -", f"resume {top}/one_two {top}/one", f"fail {top}/fail")
    four = launch(4, f"resume {top}/one_four {top}/one", f"resume {top}/two_four {top}/two")
    return top, dict(zip(("two", "one_two", "fail", "one_four", "two_four"), two + four))


def stored_tensors(log_dir):
    """(name, CRC) of each, in the order of the file."""
    with zipfile.ZipFile(log_dir / "ckpt_0000003.pt") as archive:
        return [(member.filename, member.CRC) for member in archive.infolist() if "/data/" in member.filename]


def test_any_number_of_processes_resumes_what_any_other_saved(sharded):
    """Bit for bit, in a file as one process writes it; only the order of sums differs afterwards."""
    top, returned = sharded
    for copied, original in (("one_two", "one"), ("one_four", "one"), ("two_four", "two")):
        assert names(top / copied) == ["ckpt_0000003.pt"]
        one, other = (load_checkpoint(top / name) for name in (copied, original))
        assert_same_tensors(one, other)
        for state in (one, other):
            del state["model"], state["optimizers"]
        assert one == other
        assert stored_tensors(top / copied) == stored_tensors(top / original)
    for name in ("one", "two"):
        model, optimizers = build(seed=1)
        assert load_into(top / name, model, optimizers, accept)["step"] == 3
        assert_same_tensors(training_state(model, optimizers), load_checkpoint(top / name))
        assert_same_tensors(load_model(top / name)[0].state_dict(), model.state_dict())
        losses = train(model, optimizers, 3, 6)
        for other in ("two", "one_two", "one_four", "two_four"):
            assert returned[other] == pytest.approx(losses, rel=1e-5)


def test_a_full_disk_under_fsdp_is_reported_by_the_master_and_hangs_no_process(sharded):
    (master, other), files = sharded[1]["fail"]
    assert [master[0], master[2]] == [None, None] and "no space" in master[1]
    assert other == [None] * 3
    assert files == ["ckpt_0000001.pt", "ckpt_0000003.pt"]
