"""The training script as its users run it: in a process of its own, killed, resumed, on several processes."""

import ast
import functools
import hashlib
import json
import math
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from training import (
    LAYERS,
    PYTHON,
    ROOT,
    RUN_THE_REST,
    SHAPE,
    STREAMS,
    assert_same_run,
    assert_same_tensors,
    attempt,
    command,
    fault,
    kill_once_there_is,
    losses,
    read_log,
    run_by_hand,
    snapshot,
    train,
)

from checkpoint import list_checkpoints, load_checkpoint
from files import read_jsonl
from model import GPT, GPTConfig
from shards import RANK_FILE, TokenStream, WindowLoader, list_shards, write_manifest, write_shard

STEP_LINE = re.compile(r"step (\d+) \| loss: \d+\.\d{6} \| lr: \d\.\d\de-\d\d \| norm: \d+\.\d{4} \| "
                       r"dt: \d+\.\d\dms \| tok/sec: \d+\.\d\d \| mfu: (n/a|\d+\.\d%) \| "
                       r"eta: \d+:\d\d:\d\d")


def load_get_lr():
    """The schedule, taken out of the script, which is never imported."""
    tree = ast.parse((ROOT / "train_gpt2.py").read_text(encoding="utf-8"))
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "get_lr")
    scope = {"math": math}
    exec(compile(ast.Module([function], []), "get_lr", "exec"), scope)
    return scope["get_lr"]


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize(("warmup", "steps"), [
    (0, 1), (0, 10), (1, 1), (3, 12), (10, 10), (9, 10), (85, 100), (715, 19_073),
])
def test_schedule(warmup, steps, schedule):
    get_lr = functools.partial(load_get_lr(), schedule=schedule, warmup_steps=warmup, max_steps=steps,
                               max_lr=6e-4, min_lr=6e-5, decay_fraction=0.2)
    rates = [get_lr(step) for step in range(steps)]
    assert rates[0] > 0 and max(rates) <= 6e-4
    up, down = rates[:warmup], rates[warmup:]
    assert up == pytest.approx([6e-4 * (step + 1) / (warmup + 1) for step in range(warmup)])
    assert down == sorted(down, reverse=True)
    if warmup < steps:
        assert rates[warmup] == 6e-4
    if warmup < steps - 1:
        assert rates[-1] == 6e-5
    middle = warmup + (steps - 1 - warmup) / 2
    if warmup < steps - 1 and schedule == "cosine":
        assert get_lr(middle) == pytest.approx((6e-4 + 6e-5) / 2)
    if schedule == "wsd" and warmup < 0.7 * steps and steps > 1:
        assert get_lr(0.7 * steps) == 6e-4
        assert get_lr(steps - 1 - 0.1 * steps) == pytest.approx((6e-4 + 6e-5) / 2)
    assert get_lr(steps + 100) == 6e-5


def test_a_run_logs_what_happened(flags, tmp_path):
    log_dir = tmp_path / "log"
    out = train(flags, log_dir=log_dir, sample_interval=5, prompt="def ", max_new_tokens=8, num_samples=3)
    assert [int(m[1]) for m in map(STEP_LINE.fullmatch, out.splitlines()) if m] == list(range(12))
    assert out.count("\n> def ") == 6  # three samples at steps 5 and 10
    log = read_log(log_dir, "train", "val", "val_bpb", "lr", "norm", "tok_s", "mfu")
    get_lr = load_get_lr()
    assert {s: float(v) for s, v in log["lr"].items()} == pytest.approx(
        {s: get_lr(s, "cosine", 3, 12, 1e-2, 1e-3, 0.2) for s in range(12)}, rel=1e-6)
    assert list(log["train"]) == list(log["norm"]) == list(log["tok_s"]) == list(range(12))
    assert list(log["val"]) == list(log["val_bpb"]) == [0, 4, 8, 12]  # the last: after the last update
    assert not log["mfu"], "the peak of a CPU is not known"
    first, last = float(log["val"][0]), float(log["val"][12])
    assert abs(first - math.log(257)) < 0.3 and last < first - 1
    # one token is one byte here, but for EOT, which has none: bits per byte is the loss in bits
    assert float(log["val_bpb"][12]) == pytest.approx(last / math.log(2), rel=0.01)
    assert [path.name for path in list_checkpoints(log_dir)] == ["ckpt_0000008.pt", "ckpt_0000012.pt"]
    runs = [json.loads(line) for line in (log_dir / "runs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(runs) == 1 and runs[0]["config"]["max_lr"] == 1e-2 and runs[0]["torch"] == torch.__version__
    state = load_checkpoint(log_dir)
    assert state["step"] == 12 and state["config"] == runs[0]["config"]
    assert "unigram" in out and f"checkpoint: {log_dir / 'ckpt_0000012.pt'}" in out


def test_each_step_trains_on_the_loaders_batch(flags, tmp_path, tiny_data):
    """At learning rate 0 the model stays as it was drawn, so each step's loss says which tokens it saw."""
    train(flags, log_dir=tmp_path, max_lr=0, min_lr=0, dropout=0)
    torch.manual_seed(1337)
    model = GPT(GPTConfig(**SHAPE))
    loader = WindowLoader(TokenStream(tiny_data, "train"), 64, 512, 1337, 257)
    batches = [map(torch.from_numpy, loader.batch(step, 0, 8)) for step in range(12)]
    with torch.no_grad():
        assert losses(tmp_path) == pytest.approx([model(x, y).item() for x, y in batches], rel=1e-5)


def test_killed_and_resumed_equals_never_stopped(flags, tmp_path, tiny_data):
    """kill -9 in the middle, with dropout, across the edge of an epoch: logs and weights are equal to the
    last bit."""
    epoch = WindowLoader(TokenStream(tiny_data, "train"), 64, 512, 1337, 257).steps_per_epoch
    saved = int(epoch) // 4 * 4  # the last checkpoint before the edge, at most 4 steps away
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    train(flags, log_dir=straight, max_steps=saved + 12)
    script = fault(tmp_path, 4 * (saved + 3) + 1, kill_once_there_is(broken / f"ckpt_{saved:07d}.pt"))
    done = attempt(flags, 1, script, python=sys.executable, log_dir=broken, max_steps=saved + 12)
    assert done.returncode == -signal.SIGKILL and f"step {saved + 2} | loss" in done.stdout
    for name, half in (("log.txt", f"{saved + 3} tra"), ("runs.jsonl", '{"config": {')):
        with open(broken / name, "a", encoding="utf-8") as file:
            file.write(half)  # as a power cut or a full disk may leave it
    assert f"starting at {saved}" in train(flags, log_dir=broken, max_steps=saved + 12, resume="true")
    assert [start["start_step"] for start in read_jsonl(broken / "runs.jsonl", {})] == [0, saved]
    assert read_log(straight, *STREAMS) == read_log(broken, *STREAMS)
    assert_same_tensors(load_checkpoint(straight), load_checkpoint(broken))


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_and_accumulation_do_not_matter(flags, tmp_path, shared_run, processes):
    """(1, 4), (2, 2), (4, 1) processes x micro-steps: the same losses and gradient norms, with dropout on."""
    train(flags, processes, log_dir=tmp_path)
    assert_same_run(tmp_path, shared_run())


@pytest.mark.parametrize("B", [1, 4, 8])
def test_micro_batch_size_does_not_matter(flags, tmp_path, shared_run, B):
    train(flags, log_dir=tmp_path, batch_size=B, dropout=0)
    assert_same_run(tmp_path, shared_run(dropout=0))


def test_best_and_newest_checkpoints_are_kept(flags, tmp_path):
    """A learning rate that ruins the model after a while: the best is an old one."""
    train(flags, log_dir=tmp_path, max_steps=12, val_interval=2, checkpoint_interval=2, keep_checkpoints=1,
          max_lr=3.0, min_lr=3.0, warmup_steps=12, grad_clip=0)
    val = {int(s): float(v) for s, v in read_log(tmp_path, "val")["val"].items() if int(s) > 0}
    best = min(val, key=val.get)
    assert best < 12, "the run was meant to get worse"
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"ckpt_{best:07d}.pt", "ckpt_0000012.pt"]
    assert load_checkpoint(tmp_path)["best"] == pytest.approx({"step": best, "val_loss": val[best]})


def test_target_loss_and_num_epochs(flags, tmp_path):
    """A run that reached its target stays done, until the target is another."""
    flags |= {"log_dir": tmp_path / "a", "max_steps": 300, "resume": "true"}
    for _ in range(2):
        out = train(flags, target_loss=4.5)
        seen = losses(tmp_path / "a")
        assert seen[-1] <= 4.5 < min(seen[:-1]) and f"done: step {len(seen)}," in out
        assert list_checkpoints(tmp_path / "a")[-1].name == f"ckpt_{len(seen):07d}.pt"
    train(flags, target_loss=4.2)
    assert len(losses(tmp_path / "a")) > len(seen)
    out = train(flags, log_dir=tmp_path / "b", num_epochs=2)
    epoch = float(re.search(r"an epoch is ([\d.]+) steps", out)[1])
    assert len(losses(tmp_path / "b")) == pytest.approx(2 * epoch, abs=1)


@pytest.mark.parametrize("micro_steps", [1, 2])
def test_a_compiled_run_equals_an_eager_one(flags, tmp_path, micro_steps):
    flags |= {"batch_tokens": micro_steps * 2 * 64}
    train(flags, log_dir=tmp_path / "eager", dropout=0, max_steps=5)
    out = train(flags, log_dir=tmp_path / "compiled", dropout=0, max_steps=5, sample_interval=2,
                compile="true")
    assert "compile on" in out, "docs/install.md asks for a C++ compiler: it must be found here"
    assert "recompiled" not in out
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-4)
    eager, compiled = (load_checkpoint(tmp_path / name)["model"] for name in ("eager", "compiled"))
    assert list(eager) == list(compiled)


def squares(log, step):
    return sum(float(by_step[step]) ** 2 for stream, by_step in log.items() if stream.startswith("norm_"))


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_gradient_norms_of_layers_are_those_of_the_first_batch(flags, tmp_path, tiny_data, norm_position):
    """By one backward pass over the 8 windows that the run takes 2 at a time; clipping comes later."""
    train(flags, log_dir=tmp_path, dropout=0, max_steps=5, grad_norm_interval=4, grad_clip=0.01,
          norm_position=norm_position)
    torch.manual_seed(1337)
    model = GPT(GPTConfig(**SHAPE, norm_position=norm_position))
    x, y = WindowLoader(TokenStream(tiny_data, "train"), 64, 512, 1337, 257).batch(0, 0, 8)
    model(torch.tensor(x, dtype=torch.long), torch.tensor(y, dtype=torch.long)).backward()
    expected = {}
    for name, parameter in model.named_parameters():
        layer = re.sub(r"^transformer\.(?:h\.(\d+)|(\w+))\..*", lambda m: f"norm_{m[2] or 'h' + m[1]}", name)
        expected[layer] = expected.get(layer, 0.0) + parameter.grad.square().sum().item()
    assert sorted(expected) == sorted(set(LAYERS) - ({"norm_ln_f"} if norm_position == "post" else set()))
    log = read_log(tmp_path, "norm", *expected)
    for layer, square in expected.items():
        assert list(log[layer]) == [0, 4]
        assert float(log[layer][0]) == pytest.approx(math.sqrt(square), rel=1e-4), layer
    for step in (0, 4):
        assert squares(log, step) == pytest.approx(float(log["norm"][step]) ** 2, rel=1e-5)


def test_gradient_norms_of_layers_change_nothing(flags, tmp_path):
    """In float16, where the gradients are unscaled just before."""
    flags |= {"dtype": "float16", "max_steps": 6}
    train(flags, log_dir=tmp_path / "with", grad_norm_interval=5)
    train(flags, log_dir=tmp_path / "without")
    streams = ("train", "val", "norm", "lr")
    assert read_log(tmp_path / "with", *streams) == read_log(tmp_path / "without", *streams)
    assert not any(read_log(tmp_path / "without", *LAYERS).values())
    log = read_log(tmp_path / "with", "norm", *LAYERS)
    assert all(list(log[layer]) == [0, 5] for layer in LAYERS)
    for step in (0, 5):
        assert squares(log, step) == pytest.approx(float(log["norm"][step]) ** 2, rel=1e-5)


def test_bfloat16_learns_the_same(flags, tmp_path, shared_run):
    train(flags, log_dir=tmp_path, dtype="bfloat16")
    assert_same_run(tmp_path, shared_run(), ["train"], rel=0.05)
    assert losses(tmp_path) != losses(shared_run())  # it did compute in 16 bits
    assert all(t.dtype == torch.float32 for t in load_checkpoint(tmp_path)["model"].values())


def test_corrupt_checkpoint_on_resume(flags, tmp_path):
    train(flags, log_dir=tmp_path, max_steps=8, keep_checkpoints=5)
    newest = list_checkpoints(tmp_path)[-1]
    newest.write_bytes(newest.read_bytes()[:-1000])
    done = attempt(flags, log_dir=tmp_path, max_steps=8, resume="true")
    assert done.returncode == 0 and "starting at 4" in done.stdout
    assert "ckpt_0000008.pt: corrupt" in done.stderr and "trying the previous one" in done.stderr
    assert len(losses(tmp_path)) == 8 and len(list(tmp_path.glob("ckpt_0000008.corrupt_*"))) == 1
    for path in list_checkpoints(tmp_path):
        path.write_bytes(b"nothing")
    done = attempt(flags, log_dir=tmp_path, resume="true")
    assert done.returncode == 2 and "corrupt" in done.stderr


@pytest.mark.parametrize(("interval", "step"), [(1, 5), (0, 8)])
def test_a_diverged_model_is_never_saved(flags, four_steps, interval, step):
    """Not even if a checkpoint follows at once on the step that ruins the weights: the good one must stay."""
    done = attempt(flags, log_dir=four_steps, resume="true", max_lr=1e30, grad_clip=0, keep_checkpoints=1,
                   checkpoint_interval=interval)
    assert done.returncode == 1 and f"val loss is nan at step {step}" in done.stderr, done.stderr
    assert f"Last good checkpoint: {four_steps / 'ckpt_0000004.pt'}" in done.stderr
    assert [path.name for path in list_checkpoints(four_steps)] == ["ckpt_0000004.pt"]


def test_what_a_resume_may_change(flags, four_steps):
    log = (four_steps / "log.txt").read_text(encoding="utf-8")
    out = train(flags, log_dir=four_steps, resume="true", max_steps=6, weight_decay=0.5, beta2=0.9,
                dtype="float16", val_tokens=1024, keep_checkpoints=1)
    for words in ("max_steps was 4, is now 6", "weight_decay was 0.1, is now 0.5", "dtype was float32"):
        assert f"resume: {words}" in out
    assert "the validation tokens have changed; the best val loss starts anew, and step 4 is kept" in out
    assert load_checkpoint(four_steps)["best"]["step"] == 6 and (four_steps / "ckpt_0000004.pt").exists()
    done = attempt(flags, log_dir=four_steps, resume="true", init_from=four_steps)
    assert done.returncode == 2 and f"init_from: nothing in the checkpoint, {four_steps} now" in done.stderr
    groups = load_checkpoint(four_steps)["optimizers"][0]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]  # and not what the checkpoint had
    assert all(group["betas"] == (0.9, 0.9) for group in groups)
    assert (four_steps / "log.txt").read_text(encoding="utf-8").startswith(log.partition("4 val ")[0])


def test_nothing_of_an_earlier_run_is_lost(flags, four_steps):
    path = four_steps / "log.txt"
    log = path.read_bytes()
    path.rename(four_steps / "elsewhere.txt")
    done = attempt(flags, log_dir=four_steps)
    assert done.returncode == 2 and "already holds a run" in done.stderr
    (four_steps / "elsewhere.txt").rename(path)
    (four_steps / "ckpt_0000004.pt").unlink()
    assert "no checkpoint" in train(flags, log_dir=four_steps, max_steps=2, warmup_steps=1, resume="true")
    kept, = four_steps.glob("log_before_*.txt")
    assert kept.read_bytes() == log and len(losses(four_steps)) == 2


def test_nodes_that_do_not_share_the_log_dir(flags, tmp_path, four_steps):
    """Two nodes in two folders: rank 0 has a checkpoint and rank 1 has none. Neither may train on."""
    (tmp_path / "other").mkdir()
    for returncode, _, stderr in run_by_hand([command(flags, log_dir=four_steps.name, resume="true")] * 2,
                                             [tmp_path, tmp_path / "other"]):
        assert returncode == 2, stderr
        assert "the newest checkpoint is ['ckpt_0000004.pt'] on rank 0, but [] on rank 1" in stderr, stderr


def test_nodes_with_other_data_under_the_same_name(flags, tmp_path, tiny_data):
    """Their gradients are averaged, so their weights stay equal, and nothing else would show it."""
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        shutil.copytree(tiny_data, folder / "data", ignore=shutil.ignore_patterns("manifest.json"))
    last = list_shards(folders[1] / "data", "train")[-1]
    write_shard(last, np.zeros(2000, np.uint16))
    line = command(flags, data_dir="data", log_dir=tmp_path / "log")
    for returncode, _, stderr in run_by_hand([line] * 2, folders):
        assert returncode == 2 and "processes differ in what they train on" in stderr, stderr
        assert "the train tokens in data_dir=data" in stderr


def test_ids_beyond_the_vocabulary(flags, tmp_path):
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    for split in ("train", "val"):
        ids = np.arange(5000, dtype=np.uint16) % 257
        ids[4000] = 300
        write_shard(data_dir / f"x_{split}_000000.npy", ids)
    done = attempt(flags, data_dir=data_dir, log_dir=tmp_path / "log")
    assert done.returncode == 2 and "got id 300 at token 4,000" in done.stderr, done.stderr
    assert not (tmp_path / "log").exists()


def test_log_dir_that_is_a_file(flags, tmp_path):
    (tmp_path / "log").write_text("mine", encoding="utf-8")
    done = attempt(flags, log_dir=tmp_path / "log")
    assert done.returncode == 2 and str(tmp_path / "log") in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "log").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(("overrides", "words"), [
    ({"data_dir": "/nonexistent"}, ["data_dir=/nonexistent does not exist; build it: make prepare"]),
    ({"data_dir": "/nonexistent", "prepare": "python x.py"}, ["build it: python x.py"]),
    ({"batch_tokens": 500}, ["batch_tokens=500", "--batch_tokens=384 or 512"]),
    ({"batch_tokens": 64}, ["--batch_tokens=128 or 256"]),
    ({"block_size": 100_000, "batch_size": 1, "batch_tokens": 100_000}, ["block_size", "tokens"]),
    ({"tokenizer": "gpt2"}, ["was tokenized with 'bytes', not with 'gpt2'; type --tokenizer=FILE"]),
    ({"n_embd": 33}, ["n_embd=33", "n_head=2"]),
    ({"vocab_size": 200}, ["vocab_size=200", "--vocab_size=384"]),
    ({"warmup_steps": 13}, ["warmup_steps=13"]),
    ({"num_epochs": 0.01, "warmup_steps": 0}, ["max_steps=0", "1 step or more"]),
    ({"max_lr": 1e-4}, ["max_lr=0.0001 is below min_lr=0.001"]),
    ({"eval_only": "true", "dry_run": "true"}, ["leave one of them out"]),
    ({"device": "tpu"}, ["device='tpu'"]),
    ({"device": "cuda:99"}, ["--device=cpu"]),
    ({"btach_size": 1}, ["did you mean batch_size"]),
])
def test_bad_settings_exit_2_and_write_nothing(flags, tmp_path, overrides, words):
    done = attempt(flags, **{"log_dir": tmp_path / "log", **overrides})
    assert done.returncode == 2, done.stdout + done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert not (tmp_path / "log").exists()


def test_an_existing_run_is_not_touched(flags, tmp_path, tiny_data, shared_run):
    log_dir = shared_run(max_steps=4)
    before = snapshot(log_dir)
    other = tmp_path / "other"
    shutil.copytree(tiny_data, other, ignore=shutil.ignore_patterns("manifest.json", "*_train_000003.npy"))
    for overrides, words in [
        ({}, ["already holds a run", "--resume", "--log_dir="]),
        ({"max_steps": 4}, ["already holds a run"]),  # the same command again
        ({"resume": "true", "max_steps": 3}, ["--max_steps=4 or more"]),
        ({"resume": "true", "n_layer": 3}, ["n_layer: 2 in the checkpoint, 3 now"]),
        ({"resume": "true", "seed": 2}, ["seed: 1337 in the checkpoint, 2 now"]),
        ({"resume": "true", "batch_tokens": 256}, ["batch_tokens: 512 in the checkpoint, 256 now"]),
        ({"resume": "true", "data_dir": other}, ["cannot --resume: data: "]),
    ]:
        done = attempt(flags, log_dir=log_dir, **overrides)
        assert done.returncode == 2 and all(word in done.stderr for word in words), done.stderr
    assert before == snapshot(log_dir)


def test_data_brings_its_tokenizer(flags, tmp_path, tiny_data):
    """A run without --tokenizer is the same run, to the byte of its log; so it is if shards are verified."""
    flags |= {"deterministic": "true", "max_steps": 4, "warmup_steps": 1}
    train(flags, log_dir=tmp_path / "named")
    named = flags.pop("tokenizer")
    train(flags, log_dir=tmp_path / "log", verify_data="true")
    assert (tmp_path / "log" / "log.txt").read_bytes() == (tmp_path / "named" / "log.txt").read_bytes()
    one, other = (load_checkpoint(tmp_path / folder)["tokenizer"] for folder in ("named", "log"))
    assert one["sha256"] == other["sha256"] and torch.equal(one["rank_file"], other["rank_file"])
    train(flags, log_dir=tmp_path / "log", resume="true", max_steps=5)
    assert "val loss" in train(flags, log_dir=tmp_path / "log", eval_only="true")

    data_dir = tmp_path / "data"
    shutil.copytree(tiny_data, data_dir)
    with open(data_dir / RANK_FILE, "ab") as file:
        file.write(b"YWI= 256\n")
    done = attempt(flags, log_dir=tmp_path / "other", data_dir=data_dir)
    assert done.returncode == 2 and f"{RANK_FILE} is not the vocabulary" in done.stderr, done.stderr
    (data_dir / RANK_FILE).unlink()
    train(flags, log_dir=tmp_path / "other", data_dir=data_dir, tokenizer=named)
    done = attempt(flags, log_dir=tmp_path / "third", data_dir=data_dir)
    assert done.returncode == 2 and "type --tokenizer=FILE of that one" in done.stderr, done.stderr


@pytest.mark.parametrize(("change", "processes", "verify_data"), [
    ("zeroed", 1, "false"), ("zeroed", 2, "false"), ("swapped", 1, "false"), ("swapped", 1, "true")])
def test_shards_that_changed_since_the_build(flags, tmp_path, byte_tokenizer, change, processes, verify_data):
    """Their sizes are right, so that only the sha256 can tell; rank 1 of 2 reads the second shard."""
    names = "x_train_000000.npy", "x_train_000001.npy", "x_val_000000.npy"
    files, paths = [], [tmp_path / name for name in names]
    for i, path in enumerate(paths):
        files.append(write_shard(path, np.random.default_rng(i).integers(0, 256, 5000).astype(np.uint16)))
    sha256 = hashlib.sha256(byte_tokenizer.read_bytes()).hexdigest()
    write_manifest(tmp_path, {"tokenizer": {"name": "bytes", "sha256": sha256}, "files": files})
    if change == "zeroed":
        write_shard(paths[1], np.zeros(5000, dtype=np.uint16))
    else:
        contents = [path.read_bytes() for path in paths[1::-1]]
        for path, content in zip(paths, contents):
            path.write_bytes(content)
    done = attempt(flags, processes, data_dir=tmp_path, log_dir=tmp_path / "log", verify_data=verify_data)
    wrong = "x_train_000001.npy" if change == "zeroed" else "x_train_000000.npy"
    assert done.returncode != 0 and f"{wrong}: its sha256 is not that of" in done.stderr, done.stderr
    assert not list_checkpoints(tmp_path / "log")
    assert verify_data == "false" or not (tmp_path / "log").exists()


def test_data_without_a_manifest_cannot_be_verified(flags, tmp_path, tiny_data):
    shutil.copytree(tiny_data, tmp_path / "data", ignore=shutil.ignore_patterns("manifest.json"))
    done = attempt(flags, data_dir=tmp_path / "data", log_dir=tmp_path / "log", verify_data="true")
    assert done.returncode == 2 and "has no manifest.json to compare with" in done.stderr, done.stderr


def test_a_full_disk_leaves_the_old_checkpoint_valid(flags, four_steps):
    size = list_checkpoints(four_steps)[0].stat().st_size
    limited = ("import resource; "
               f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size // 2}, {size // 2})); {RUN_THE_REST}")
    arguments = command(flags, log_dir=four_steps, resume="true", max_steps=8)[1:]
    done = subprocess.run([PYTHON, "-c", limited, *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and "no space" in done.stderr, done.stderr
    assert [path.name for path in four_steps.glob("ckpt_*")] == ["ckpt_0000004.pt"]
    assert "starting at 4" in train(flags, log_dir=four_steps, resume="true", max_steps=8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_cuda_run_with_compile(flags, tmp_path, shared_run, dtype):
    out = train(flags, log_dir=tmp_path, dropout=0, device="cuda", dtype=dtype, compile="true",
                sample_interval=4)
    assert "compile on" in out
    assert_same_run(tmp_path, shared_run(dropout=0), ["train"], rel=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_deterministic_samples_on_cuda(flags, tmp_path):
    """Sampling takes cumulative sums, for which CUDA has no deterministic kernel."""
    out = train(flags, log_dir=tmp_path, device="cuda", deterministic="true", sample_interval=4)
    assert out.count("\n> Hello") == 4
