"""Checkpoints: whole or refused, written beside the training, safe to load, enough to generate and resume."""

import ast
import copy
import errno
import json
import os
import pickle
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from checkpoint_ranks import accept, build, guard_of, run, state_of, train
from training import ENVIRONMENT, PYTHON

import checkpoint
from bpe import load_tokenizer, tokenizer_from_ranks
from checkpoint import (
    CheckpointWriter,
    ForeignCheckpoint,
    checkpoint_tokenizer,
    describe_model,
    describe_tokenizer,
    list_checkpoints,
    load_checkpoint,
    load_into,
    load_model,
    newest_checkpoint,
    prune_checkpoints,
    restore,
    save_checkpoint,
    training_state,
)
from configurator import UserError
from model import GPT, GPTConfig

ROOT = Path(__file__).resolve().parent.parent


def tensors_of(value, path=()):
    """{path: tensor} of all tensors in nested containers."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {place: tensor for key, item in items for place, tensor in tensors_of(item, (*path, key)).items()}


def assert_same_tensors(one, other):
    one, other = tensors_of(one), tensors_of(other)
    assert one.keys() == other.keys() and one
    assert [path for path in one if not torch.equal(one[path], other[path])] == []


@pytest.fixture
def state(byte_tokenizer):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=384, n_vocab=257, n_layer=2, n_head=2, n_embd=32))
    optimizer, = model.configure_optimizers("adamw", 0.1, 1e-3, (0.9, 0.95), fused=True)
    model(torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long)).backward()
    optimizer.step()
    return {**training_state(model, [optimizer]), "step": 7, "model_config": describe_model(model),
            "tokenizer": describe_tokenizer(load_tokenizer(str(byte_tokenizer)))}


def test_round_trip(state, tmp_path, byte_tokenizer):
    path = save_checkpoint(tmp_path, 7, state)
    assert path.name == "ckpt_0000007.pt" and [p.name for p in tmp_path.iterdir()] == [path.name]
    model, loaded = load_model(path)
    assert loaded["step"] == 7 and not model.training
    assert all(torch.equal(tensor, state["model"][name]) for name, tensor in model.state_dict().items())
    assert model.lm_head.weight is model.transformer.wte.weight
    assert_same_tensors(state["optimizers"], loaded["optimizers"])
    tok, expected = checkpoint_tokenizer(loaded), load_tokenizer(str(byte_tokenizer))
    assert (tok.name, tok.sha256, tok.n_vocab) == (expected.name, expected.sha256, 257)
    assert load_model(tmp_path)[1]["step"] == 7  # the folder means its newest


def test_the_tied_matrix_is_stored_once(state, tmp_path):
    path = save_checkpoint(tmp_path, 1, {"model": state["model"]})
    numbers = sum(t.numel() for name, t in state["model"].items() if name != "lm_head.weight")
    assert path.stat().st_size < 4 * numbers + 30_000


def test_only_gpt2s_own_rank_file_is_not_stored(byte_tokenizer):
    """What counts is the file's hash: another vocabulary may be called gpt2, and GPT-2's anything."""
    gpt2, own = load_tokenizer("gpt2"), tokenizer_from_ranks(byte_tokenizer.read_bytes(), "gpt2")
    renamed = tokenizer_from_ranks(gpt2.rank_file, "mine")
    for tok, stored in [(gpt2, False), (renamed, False), (own, True)]:
        saved = describe_tokenizer(tok)
        assert (saved["rank_file"] is not None) == stored
        assert checkpoint_tokenizer({"tokenizer": saved}).sha256 == tok.sha256


def damage_at_the_end(path):
    path.write_bytes(path.read_bytes()[:-100])


def damage_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_one_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def damage_all(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [damage_at_the_end, damage_half, damage_one_bit, damage_all])
def test_damage_is_noticed_and_the_one_before_is_used(state, tmp_path, damage, capsys):
    save_checkpoint(tmp_path, 1, {**state, "step": 1})
    path = save_checkpoint(tmp_path, 2, {**state, "step": 2})
    damage(path)
    with pytest.raises(UserError, match=r"ckpt_0000002\.pt: damaged"):
        load_checkpoint(path)
    assert load_checkpoint(tmp_path)["step"] == 1
    assert "ckpt_0000002.pt: damaged" in capsys.readouterr().err


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
    for path, words in [(tmp_path / "none.pt", "not there"), (tmp_path, "got none")]:
        with pytest.raises(UserError, match=words):
            load_checkpoint(path)
    torch.save({"model": {}}, tmp_path / "foreign.pt")
    with pytest.raises(ForeignCheckpoint, match="not written by train_gpt2"):
        load_checkpoint(tmp_path / "foreign.pt")
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(UserError, match="got none"):
        load_checkpoint(tmp_path / "pipe.pt")


@pytest.mark.parametrize("key, size", [("n_layer", 2**31), ("n_embd", 2**23), ("block_size", 2**24)])
def test_a_size_beyond_memory_is_refused_before_it_is_allocated(state, tmp_path, key, size):
    state["model_config"][key] = size
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"ckpt_0000001\.pt.*n_layer|do not fit its own model_config"):
        load_checkpoint(save_checkpoint(tmp_path, 1, state))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_the_rank_file_is_that_of_its_hash(state):
    gpt2 = {**state["tokenizer"], "rank_file": None}
    damaged = {**state["tokenizer"], "rank_file": state["tokenizer"]["rank_file"][:-1]}
    for saved in (gpt2, damaged):
        with pytest.raises(UserError, match="sha256"):
            checkpoint_tokenizer({"tokenizer": saved})


def test_optimizer_state_of_another_shape_is_refused(tmp_path):
    model, optimizers = build(sharded=False)
    train(model, optimizers, 0, 1)

    def refused(change):
        damaged = copy.deepcopy(training_state(model, optimizers))
        muon, adamw = damaged["optimizers"]
        change(muon["state"], adamw["state"])
        with pytest.raises(UserError, match="optimizer state of transformer"):
            restore(model, optimizers, damaged)

    name = "transformer.wpe.weight"
    refused(lambda muon, adamw: adamw[name].update(exp_avg=torch.zeros(3)))
    refused(lambda muon, adamw: adamw[name].update(step=torch.zeros(1)))
    refused(lambda muon, adamw: adamw[name].update(exp_avg=adamw[name]["exp_avg"].long()))
    refused(lambda muon, adamw: adamw[name].pop("step"))
    refused(lambda muon, adamw: adamw.pop(name))
    refused(lambda muon, adamw: muon.clear())


def test_a_model_config_of_another_kind(state, tmp_path):
    state["model_config"]["rotary"] = True
    save_checkpoint(tmp_path, 1, state)
    with pytest.raises(UserError, match="rotary"):
        load_model(tmp_path)


def test_tensors_that_do_not_fit_are_named(state, tmp_path):
    state["model_config"]["n_layer"] = 3
    save_checkpoint(tmp_path, 1, state)
    with pytest.raises(UserError, match=r"transformer\.h\.2"):
        load_model(tmp_path)


def test_the_default_is_the_run_that_was_written_to_last(tmp_path, monkeypatch):
    """Whether its checkpoints are files or, of a sharded model, folders; never what a killed write left."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="make demo"):
        newest_checkpoint()
    for time, place in enumerate(("log_a/ckpt_0000009.pt", "log_b/ckpt_0000002", "log_c/ckpt_0000003.tmp")):
        path = tmp_path / place
        path.parent.mkdir()
        path.mkdir() if path.suffix == "" else path.touch()
        os.utime(path, (time, time))
    assert newest_checkpoint() == Path("log_b")


def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    for step in (10, 20, 30, 1000, 10_000_000):  # more digits than the name has room for: order is by number
        save_checkpoint(tmp_path, step, {})
    prune_checkpoints(tmp_path, keep=2, best_step=20)
    left = [p.name for p in list_checkpoints(tmp_path)]
    assert left == ["ckpt_0000020.pt", "ckpt_0001000.pt", "ckpt_10000000.pt"]
    prune_checkpoints(tmp_path, keep=1, best_step=None)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["ckpt_10000000.pt"]


def test_a_write_that_fails_leaves_nothing_behind(state, tmp_path):
    save_checkpoint(tmp_path, 1, state)
    unwritable = {**state, "extra": (i for i in range(3))}  # cannot be pickled: torch.save fails half-way
    with pytest.raises((UserError, TypeError)):
        save_checkpoint(tmp_path, 2, unwritable)
    assert [p.name for p in tmp_path.glob("*.pt")] == ["ckpt_0000001.pt"]


# ---- the write in the background
def writable(log_dir, *steps):
    """A trained model, its optimizers and a writer that has written `steps`."""
    model, optimizers = build(sharded=False)
    train(model, optimizers, 0, 2)
    writer = CheckpointWriter(log_dir, keep=2)
    for step in steps:
        writer.save(step, state_of(step, model, optimizers), None)
    writer.wait()
    return model, optimizers, writer


def test_what_is_written_is_the_state_at_the_time_of_save(tmp_path, monkeypatch):
    model, optimizers, writer = writable(tmp_path)
    go, original = threading.Event(), torch.save
    monkeypatch.setattr(torch, "save", lambda *args: go.wait(60) and original(*args))
    state = {"log": [1, [2]], **state_of(2, model, optimizers)}
    expected = {key: value.clone() for key, value in tensors_of(state).items()}
    writer.save(2, state, None)
    assert list_checkpoints(tmp_path) == []  # save has returned, and nothing is written yet
    train(model, optimizers, 2, 4)
    state["log"][1].append(3)
    optimizers[0].param_groups[0]["lr"] = 7.0
    go.set()
    writer.wait()
    loaded = load_checkpoint(tmp_path)
    written = tensors_of(loaded)
    assert all(torch.equal(written[path], tensor) for path, tensor in expected.items())
    assert loaded["log"] == [1, [2]] and loaded["optimizers"][0]["param_groups"][0]["lr"] == 1e-2


def test_host_memory_holds_the_state_once_and_is_filled_again(tmp_path):
    model, optimizers, writer = writable(tmp_path, 1)
    state = training_state(model, optimizers)
    distinct = {id(tensor): tensor for tensor in tensors_of(state).values()}
    assert len(distinct) == len(tensors_of(state)) - 1  # the tied matrix
    buffers = {path: (buffer.data_ptr(), buffer.nbytes) for path, buffer in writer._buffers.items()}
    assert sum(nbytes for _, nbytes in buffers.values()) == sum(t.nbytes for t in distinct.values())
    writer.save(2, state_of(2, model, optimizers), None)
    writer.wait()
    assert {path: (buffer.data_ptr(), buffer.nbytes) for path, buffer in writer._buffers.items()} == buffers
    assert load_checkpoint(tmp_path)["step"] == 2


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EIO, "Input/output error"),
    TypeError("cannot pickle"),
])
def test_a_failed_write_is_told_once_and_the_next_one_works(tmp_path, monkeypatch, error):
    wanted = {errno.ENOSPC: "no space .*--resume", errno.EIO: "cannot write .*--resume"}
    model, optimizers, writer = writable(tmp_path, 1)

    def fail(state, file):
        file.write(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail)
        for at_wait in (True, False):
            writer.save(2, state_of(2, model, optimizers), None)
            writer._thread.join()
            assert writer.failed()
            with pytest.raises(TypeError if isinstance(error, TypeError) else UserError,
                               match=wanted.get(getattr(error, "errno", None), "cannot pickle")) as raised:
                writer.wait() if at_wait else writer.save(3, state_of(3, model, optimizers), None)
            # by which an error that may be gone at a restart is told from one that will not
            assert isinstance(raised.value.__cause__, OSError) == isinstance(error, OSError)
            assert not writer.failed()
            assert [path.name for path in tmp_path.iterdir()] == ["ckpt_0000001.pt"]
    writer.save(3, state_of(3, model, optimizers), None)
    writer.wait()
    assert not writer.failed()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["ckpt_0000001.pt", "ckpt_0000003.pt"]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_folder_that_cannot_be_synced(state, tmp_path, monkeypatch, code):
    """Shared folders refuse it, and the file is complete; a failing disk is an error, and not of space."""
    fsync = os.fsync

    def refuse(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    if code == errno.EIO:
        with pytest.raises(UserError, match=r"cannot write .*output error") as error:
            save_checkpoint(tmp_path, 1, state)
        assert "space" not in str(error.value) and "room" not in str(error.value)
    else:
        assert load_checkpoint(save_checkpoint(tmp_path, 1, state))["step"] == 7


def test_a_full_disk_in_the_middle_of_the_tensors(state, tmp_path):
    """torch's zip writer makes a RuntimeError of it. The kernel refuses the write here, as a disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"no space for .*File too large"):
            save_checkpoint(tmp_path, 1, state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_was_removed_is_a_failed_write(tmp_path):
    model, optimizers, writer = writable(tmp_path, 1)
    shutil.rmtree(tmp_path)
    writer.save(2, state_of(2, model, optimizers), None)
    with pytest.raises(UserError, match="cannot write"):
        writer.wait()


def test_the_newest_and_the_best_are_on_disk_and_no_more(tmp_path):
    (tmp_path / "ckpt_0000009.pt.4711.tmp").write_bytes(b"of a killed write")
    (tmp_path / "ckpt_0000009.tmp").write_bytes(b"of one by an older version")
    (tmp_path / "ckpt_0000008.tmp").mkdir()
    (tmp_path / "ckpt_0000008.tmp" / "__0_0.distcp").write_bytes(b"of another")
    model, optimizers, writer = writable(tmp_path)
    for step in range(1, 7):
        writer.save(step, state_of(step, model, optimizers), min(step, 2))
        writer.wait()
        kept = sorted({2, step - 1, step} if step > 2 else range(1, step + 1))
        assert sorted(path.name for path in tmp_path.iterdir()) == [f"ckpt_{s:07d}.pt" for s in kept]


def test_kill_9_during_a_write(tmp_path):
    """The process is killed with half of the second checkpoint written, by the thread that writes it."""
    script = """
import os, signal, sys, torch
sys.path[:0] = sys.argv[2:]
import test_checkpoint
model, optimizers, writer = test_checkpoint.writable(sys.argv[1], 1)
def half(state, file):
    file.write(bytes(100_000))
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = half
writer.save(2, test_checkpoint.state_of(2, model, optimizers), None)
writer.wait()
"""
    with subprocess.Popen([sys.executable, "-c", script, tmp_path, ROOT, ROOT / "tests"]) as process:
        assert process.wait(timeout=60) == -signal.SIGKILL
        pid = process.pid
    names = ["ckpt_0000001.pt", f"ckpt_0000002.pt.{pid}.tmp"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    model, optimizers = build(sharded=False, seed=1)
    assert load_into(tmp_path, model, optimizers, accept)["step"] == 1
    writer = CheckpointWriter(tmp_path, keep=2)
    writer.save(2, state_of(2, model, optimizers), None)
    writer.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt_0000001.pt", "ckpt_0000002.pt"]


# ---- resume
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("muon", [False, True])
def test_resume_is_exact_and_todays_settings_count(tmp_path, muon, steps):
    model, optimizers = build(sharded=False, muon=muon)
    train(model, optimizers, 0, steps)
    writer = CheckpointWriter(tmp_path, keep=2)
    writer.save(steps, state_of(steps, model, optimizers), None)
    expected = train(model, optimizers, steps, steps + 3)
    writer.wait()

    other, others = build(sharded=False, seed=1, muon=muon)
    others[0].param_groups[0]["weight_decay"] = 0.25
    seen = []
    values = load_into(tmp_path, other, others, seen.append)
    assert seen == [values] and values["step"] == steps and not {"model", "optimizers"} & set(values)
    assert others[0].param_groups[0]["weight_decay"] == 0.25
    others[0].param_groups[0]["weight_decay"] = optimizers[0].param_groups[0]["weight_decay"]
    assert train(other, others, steps, steps + 3) == expected
    assert_same_tensors(training_state(other, others), training_state(model, optimizers))
    assert other.lm_head.weight is other.transformer.wte.weight


def test_optimizer_state_goes_by_name_not_by_number():
    """The same parameters in groups of another order."""
    model, optimizers = build(sharded=False, muon=False)
    train(model, optimizers, 0, 2)
    other, _ = build(sharded=False, muon=False, seed=1)
    parameters = list(other.parameters())
    turned = torch.optim.AdamW([{"params": parameters[5:]}, {"params": parameters[:5]}], lr=1e-2,
                               weight_decay=0.1, fused=True)
    restore(other, [turned], copy.deepcopy(training_state(model, optimizers)))
    assert train(other, [turned], 2, 4) == train(model, optimizers, 2, 4)


def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path):
    writable(tmp_path, 1)

    def refuse(values):
        raise UserError(f"step {values['step']} is not wanted")

    for kwargs, check, words in [({"muon": False}, accept, r"\[8, 20\] parameters, wanted \[28\]"),
                                 ({}, refuse, "step 1 is not wanted")]:
        model, optimizers = build(sharded=False, seed=1, **kwargs)
        with pytest.raises(UserError, match=words):
            load_into(tmp_path, model, optimizers, check)
        assert_same_tensors(model.state_dict(), build(sharded=False, seed=1)[0].state_dict())
    model, optimizers = build(sharded=False, n_layer=3)
    with pytest.raises(UserError, match=r"8, 20\] parameters"):
        load_into(tmp_path, model, optimizers, accept)


def test_format_1_generates_and_does_not_resume(state, tmp_path):
    old = {key: value for key, value in state.items() if key != "optimizers"}
    torch.save({"format": "gpt2-checkpoint-1", "optimizer": {}, **old}, tmp_path / "ckpt_0000007.pt")
    model, _ = load_model(tmp_path)
    assert_same_tensors(model.state_dict(), state["model"])
    model, optimizers = build(sharded=False)
    with pytest.raises(UserError, match="can generate but not be resumed"):
        load_into(tmp_path, model, optimizers, accept)


# ---- sharded checkpoints
def launch(n_processes, *scenarios, survives=True):
    """Run scenarios of checkpoint_ranks.py on n processes: (what they returned, stderr)."""
    words = " then ".join(scenarios).split(" ")
    done = subprocess.run(
        [PYTHON, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_processes}",
         ROOT / "tests" / "checkpoint_ranks.py", *words],
        capture_output=True, text=True, timeout=120, env=ENVIRONMENT)
    assert (done.returncode == 0) == survives, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line], done.stderr


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes did, in one launch: (folder, the lines they printed)."""
    top = tmp_path_factory.mktemp("sharded")
    for name in ("two", "rotate", "begin", "write", "sum", "finish"):
        (top / name).mkdir()
    lines, _ = launch(2, f"run {top}/two", f"rotate {top}/rotate", f"misfit {top}/two",
                      f"fail {top}/begin where=begin rank=0", f"fail {top}/write where=write rank=1",
                      f"fail {top}/sum where=sum rank=1", f"fail {top}/finish where=finish rank=0")
    return top, lines


@pytest.fixture
def sharded(two, tmp_path):
    """A copy of the sharded checkpoint of step 3, in a log_dir."""
    shutil.copytree(two[0] / "two", tmp_path / "log")
    return tmp_path / "log"


def test_sharded_files(two):
    folder = two[0] / "two" / "ckpt_0000003"
    assert sorted(path.name for path in folder.iterdir()) == [
        ".metadata", "__0_0.distcp", "__1_0.distcp", "checksums.json", "values.pt"]
    sizes = [(folder / f"__{rank}_0.distcp").stat().st_size for rank in range(2)]
    assert max(sizes) < 1.2 * min(sizes)  # each process has written its half
    assert str(two[0]).encode() not in (folder / ".metadata").read_bytes()


def test_sharded_keeps_the_newest_and_the_best(two):
    kept = [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [2, 5, 6]]
    assert two[1][1] == [[f"ckpt_{step:07d}" for step in steps] for steps in kept]


def test_all_processes_refuse_a_sharded_checkpoint_that_does_not_fit(two):
    expected = ["transformer.h.2", "[8, 20] parameters, wanted [28]", "step 3 is not wanted"]
    for outcomes, words in zip(two[1][2], expected):
        assert len(outcomes) == 2
        for message, unchanged in outcomes:
            assert words in message and unchanged


def test_a_failure_on_one_process_fails_the_write_on_all_and_hangs_none(two):
    for messages, left, after in two[1][3:]:
        assert len(messages) == 2
        assert all("ckpt_0000002 could not be written ([Errno" in message for message in messages)
        assert left == ["ckpt_0000001"] and after == ["ckpt_0000001", "ckpt_0000003"]
    assert len(two[1]) == 7


@pytest.fixture(scope="module")
def again(two):
    """What one process, and then two once more, made of `two`: (folder, what they returned, stderr).

    One resumes from two's checkpoint into "one"; two resume from that into "one_to_two", from a .pt into
    "file_to_two", and past a damaged one into "past_damage"; in "killed" one of them is killed in a save.
    """
    top, _ = two
    for name in ("one", "file", "damaged", "one_to_two", "file_to_two", "past_damage", "killed"):
        (top / name).mkdir()
    whole, copied = top / "two" / "ckpt_0000003", top / "damaged" / "ckpt_0000005"
    shutil.copytree(whole, top / "damaged" / whole.name)
    shutil.copytree(whole, copied)
    damage_one_bit(copied / "__0_0.distcp")  # the second name in the list, so that process 1 reads it
    save_checkpoint(top / "file", 3, {k: v for k, v in load_checkpoint(whole).items() if k != "format"})
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    lines = [run(top / "one", load=top / "two", steps=0)]
    dist.destroy_process_group()
    more, stderr = launch(2, f"run {top}/one_to_two load={top}/one steps=0",
                          f"run {top}/file_to_two load={top}/file steps=0",
                          f"run {top}/past_damage load={top}/damaged steps=0", f"die {top}/killed",
                          survives=False)
    return top, lines + more, stderr


def test_resharding(two, again):
    """2 processes -> 1 -> 2 and 3, and from a .pt: the same bits in the files, the same losses afterwards."""
    top, lines, _ = again
    (top / "three").mkdir()
    lines = [two[1][0], *lines, launch(3, f"run {top}/three load={top}/one steps=0")[0][0]]
    assert [line["start"] for line in lines] == [0, 3, 3, 3, 3, 3] and len(lines[0]["losses"]) == 3
    parts = {"one": 1, "one_to_two": 2, "file_to_two": 2, "past_damage": 2, "three": 3}
    for name, n_files in parts.items():
        assert len(list((top / name / "ckpt_0000003").glob("*.distcp"))) == n_files
        assert_same_tensors(load_checkpoint(top / name), load_checkpoint(top / "two"))
        assert load_checkpoint(top / name)["guard"] == guard_of(3)
    model, optimizers = build(sharded=False, seed=1)  # sharded -> plain
    assert load_into(top / "two", model, optimizers, accept)["step"] == 3
    losses = [line["losses"] for line in lines] + [train(model, optimizers, 3, 6)]
    assert losses[0] == losses[2] == losses[3] == losses[4]  # all of two processes
    for other in losses:
        assert other == pytest.approx(losses[0], rel=1e-5)


def test_processes_agree_on_the_checkpoint_before_a_damaged_one(again):
    """Only process 1 has read the damaged file, only process 0 speaks of it, and both resume at 3."""
    assert again[1][3]["start"] == 3
    assert again[2].count("ckpt_0000005: damaged, checksum of __0_0.distcp is wrong; trying the one") == 1


def test_generation_from_a_sharded_checkpoint(two, tmp_path):
    from_folder, state = load_model(two[0] / "two" / "ckpt_0000003")
    save_checkpoint(tmp_path, 3, {key: value for key, value in state.items() if key != "format"})
    from_file, _ = load_model(tmp_path)
    tokens = torch.arange(16)[None]
    assert torch.equal(from_folder(tokens), from_file(tokens))
    assert from_folder.lm_head.weight is from_folder.transformer.wte.weight
    model, optimizers = build(sharded=False)  # what two processes trained is what one process trains
    train(model, optimizers, 0, 3)
    torch.testing.assert_close(from_folder(tokens), model.eval()(tokens), rtol=0, atol=5e-3)


def damage_missing(path):
    path.unlink()


@pytest.mark.parametrize("damage", [damage_at_the_end, damage_one_bit, damage_all, damage_missing])
@pytest.mark.parametrize("name", ["__1_0.distcp", ".metadata", "values.pt", "checksums.json"])
def test_damage_in_a_folder_is_noticed_and_the_one_before_is_used(sharded, capsys, damage, name):
    newest = sharded / "ckpt_0000005"
    shutil.copytree(sharded / "ckpt_0000003", newest)
    damage(newest / name)
    with pytest.raises(UserError, match="ckpt_0000005: damaged"):
        load_checkpoint(newest)
    assert load_checkpoint(sharded)["step"] == 3
    assert "ckpt_0000005: damaged" in capsys.readouterr().err


def test_kill_9_during_a_sharded_write(again, tmp_path):
    log_dir = tmp_path / "log"
    shutil.copytree(again[0] / "killed", log_dir)
    assert sorted(path.name for path in log_dir.iterdir()) == ["ckpt_0000001", "ckpt_0000002.tmp"]
    assert (log_dir / "ckpt_0000002.tmp" / ".metadata").exists()  # only checksums and name are missing
    model, optimizers = build(sharded=False, seed=1)
    assert load_into(log_dir, model, optimizers, accept)["step"] == 1
    writer = CheckpointWriter(log_dir, keep=1)
    writer.save(2, state_of(2, model, optimizers), None)
    writer.wait()
    assert [path.name for path in log_dir.iterdir()] == ["ckpt_0000002.pt"]


def rewrite_metadata(folder, data):
    """Put `data` in the place of .metadata, with the checksum it should have."""
    (folder / ".metadata").write_bytes(data)
    record = json.loads((folder / "checksums.json").read_text(encoding="utf-8"))
    record["files"][".metadata"] = checkpoint._checksum(folder / ".metadata")
    (folder / "checksums.json").write_text(json.dumps(record), encoding="utf-8")


class Eval:
    def __reduce__(self):
        return eval, ("print('this code ran')",)


def test_code_in_metadata_is_never_run(sharded, capsys):
    folder = sharded / "ckpt_0000003"
    good = (folder / ".metadata").read_bytes()
    metadata = pickle.loads(good)
    dotted = b"ctorch\nserialization.os.getcwd\n(tR."
    hidden = dcp.Metadata(metadata.state_dict_metadata, Malicious(), metadata.storage_data)
    for data in (pickle.dumps(Malicious()), pickle.dumps(Eval()), pickle.dumps(hidden), dotted):
        rewrite_metadata(folder, data)
        with pytest.raises(UserError, match="could run code"):
            load_checkpoint(folder)
    rewrite_metadata(folder, good)
    assert load_checkpoint(folder)["step"] == 3
    assert "this code ran" not in capsys.readouterr().out


def test_metadata_that_names_pickles_or_foreign_files_is_refused(sharded):
    """torch would load an entry that is no tensor without weights_only, and follow any path."""
    folder = sharded / "ckpt_0000003"
    good = (folder / ".metadata").read_bytes()
    metadata = pickle.loads(good)
    name = next(iter(metadata.state_dict_metadata))
    metadata.state_dict_metadata[name] = dcp.BytesStorageMetadata()
    rewrite_metadata(folder, pickle.dumps(metadata))
    with pytest.raises(UserError, match="could run code"):
        load_checkpoint(folder)
    metadata = pickle.loads(good)
    next(iter(metadata.storage_data.values())).relative_path = "../elsewhere"
    rewrite_metadata(folder, pickle.dumps(metadata))
    with pytest.raises(UserError, match="could run code"):
        load_checkpoint(folder)


def test_files_and_folders_are_listed_and_pruned_together(two, tmp_path):
    for step in (1, 3, 12):
        shutil.copytree(two[0] / "two" / "ckpt_0000003", tmp_path / f"ckpt_{step:07d}")
    for step in (2, 11):
        save_checkpoint(tmp_path, step, {})
    (tmp_path / "ckpt_0000020").write_bytes(b"a file without a suffix")
    (tmp_path / "ckpt_0000021.pt").mkdir()
    (tmp_path / "ckpt_0000022.damaged").mkdir()
    names = ["ckpt_0000001", "ckpt_0000002.pt", "ckpt_0000003", "ckpt_0000011.pt", "ckpt_0000012"]
    assert [path.name for path in list_checkpoints(tmp_path)] == names
    prune_checkpoints(tmp_path, keep=2, best_step=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == [names[0], *names[-2:]]
    assert not list(tmp_path.glob("*.tmp"))
