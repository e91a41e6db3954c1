"""Runs that evaluate, sample and save every few steps, that begin with given weights, that only evaluate."""

import re
import shutil

import pytest
import torch
from training import (
    SHAPE,
    assert_same_tensors,
    attempt,
    load_model,
    losses,
    on_forward,
    read_log,
    snapshot,
    train,
    with_fault,
)

import hellaswag
from bpe import load_tokenizer
from checkpoint import describe_model, list_checkpoints, load_checkpoint, save_checkpoint
from convert_hf import export_hf
from device import resolve_device
from model import GPT, GPTConfig
from shards import TokenStream, WindowLoader


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, base_flags, questions):
    """(log_dir, stdout) of a compiled run that evaluates, samples and saves every other step, and ends at an
    odd one."""
    log_dir = tmp_path_factory.mktemp("evaluated") / "log"
    flags = {**base_flags, "compile": "true", "max_steps": 7, "val_interval": 2, "hellaswag_interval": 2,
             "hellaswag_data": questions, "sample_interval": 2, "checkpoint_interval": 2,
             "keep_checkpoints": 9, "num_samples": 1, "prompt": "x",
             "max_new_tokens": 90}  # past the context of 64
    return log_dir, train(flags, log_dir=log_dir)


def test_a_compiled_run_validates_scores_samples_and_saves(evaluated):
    log_dir, out = evaluated
    found = read_log(log_dir, "train", "val", "hella", "hella_acc")
    assert list(found["train"]) == list(range(7))
    assert list(found["val"]) == [0, 2, 4, 6, 7]
    assert list(found["hella"]) == list(found["hella_acc"]) == [2, 4, 6, 7]
    assert out.count("\n> x") == 3
    assert sorted(path.name for path in log_dir.glob("ckpt_*")) == [f"ckpt_{s:07d}.pt" for s in (2, 4, 6, 7)]
    keys = load_checkpoint(log_dir)["model"].keys()
    assert keys == GPT(GPTConfig(**SHAPE)).state_dict().keys()
    assert "compile on" in out and "recompiled" not in out


def test_the_scores_in_the_log_are_those_of_the_checkpoints(evaluated, questions):
    log_dir, out = evaluated
    found = read_log(log_dir, "hella", "hella_acc")
    for step in (2, 7):
        model, state = load_model(log_dir / f"ckpt_{step:07d}.pt")
        tok = load_tokenizer(state["config"]["tokenizer"])
        examples = hellaswag.read_examples(questions, tok, "completion")
        result = hellaswag.evaluate(model, examples, resolve_device("cpu", "float32"))
        assert float(found["hella"][step]) == pytest.approx(result.acc_norm, abs=1e-6)
        assert float(found["hella_acc"][step]) == pytest.approx(result.acc, abs=1e-6)
    assert "is not the public file" in out and "not GPT-2's" in out


def test_evaluation_never_touches_the_training(evaluated, base_flags, tmp_path):
    """Without it, losses and norms are the same to the last digit."""
    train({**base_flags, "compile": "true", "max_steps": 7, "val_interval": 0, "hellaswag_interval": 0,
           "checkpoint_interval": 0}, log_dir=tmp_path)
    assert read_log(tmp_path, "train", "norm") == read_log(evaluated[0], "train", "norm")
    assert list(read_log(tmp_path, "val")["val"]) == [7]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["ckpt_0000007.pt"]


def test_without_the_data_there_is_a_warning_and_no_score(flags, tmp_path, monkeypatch):
    """No network: a file that is named must be there, the public one need not."""
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)
    out = train({**flags, "max_steps": 3, "hellaswag_interval": 1}, log_dir="log")
    assert out.count("warning: this run has no HellaSwag scores") == 1 and "--hellaswag_interval=0" in out
    assert not read_log("log", "hella")["hella"] and len(losses("log")) == 3
    done = attempt({**flags, "hellaswag_data": "nosuch.jsonl", "hellaswag_interval": 1}, log_dir="other")
    assert done.returncode == 2
    assert "nosuch.jsonl: No such file or directory; give --hellaswag_data=FILE" in done.stderr


def test_eval_only_repeats_the_runs_numbers_and_writes_nothing(evaluated, base_flags, questions, tmp_path):
    """Whatever the batch size and the number of processes; the shape is the checkpoint's."""
    log_dir, out = evaluated
    before = snapshot(log_dir)
    where = {key: base_flags[key] for key in ("data_dir", "val_tokens", "device", "dtype")}
    flags = {**where, "hellaswag_data": questions, "eval_only": "true", "compile": "false", "num_epochs": 2}
    wanted = [line.removeprefix("step ") for line in out.splitlines()
              if re.match(r"step [67] \| (val|completion)", line)]
    six, seven = ([line for line in wanted if line.startswith(step)] for step in "67")
    assert len(six) == len(seven) == 2
    alone = train(flags, log_dir=log_dir)
    two = train({**flags, "batch_size": 3, "init_from": log_dir / "ckpt_0000006.pt"}, 2,
                log_dir=tmp_path / "none")
    assert [line in alone for line in seven] == [line in two for line in six] == [True, True]
    assert snapshot(log_dir) == before and not (tmp_path / "none").exists()
    assert "checkpoint:" not in alone
    del flags["data_dir"]  # the run's own
    assert all(line in train(flags, log_dir=log_dir) for line in seven)


@pytest.fixture(scope="module")
def tuned(evaluated, base_flags, tmp_path_factory):
    """(flags, log_dir, stdout) of a run of 6 steps from that run's weights, in another shape."""
    log_dir = tmp_path_factory.mktemp("tuned") / "log"
    flags = {**base_flags, "init_from": evaluated[0] / "ckpt_0000006.pt", "n_layer": 5, "n_head": 1,
             "n_embd": 64, "block_size": 32, "max_steps": 6, "val_interval": 3, "checkpoint_interval": 3,
             "warmup_steps": 0}
    flags.pop("tokenizer")  # comes with the weights
    return flags, log_dir, train(flags, log_dir=log_dir)


def test_fine_tuning_begins_with_the_weights(tuned, evaluated):
    """Their shape and tokenizer too; fewer positions are a shorter table, and dropout is the run's own."""
    _, log_dir, out = tuned
    shown = re.search("^init: (.*) as in .*, step 6$", out, re.M)[1].split(", ")
    assert {"n_layer=2", "n_head=2", "n_embd=32", "block_size=32"} <= {*shown}
    first, source = (load_checkpoint(path) for path in (log_dir / "ckpt_0000003.pt",
                                                        evaluated[0] / "ckpt_0000006.pt"))
    assert first["model"]["transformer.wpe.weight"].shape == (32, 32)
    assert first["model_config"] == {**source["model_config"], "block_size": 32}
    assert first["tokenizer"]["sha256"] == source["tokenizer"]["sha256"]
    val = read_log(log_dir, "val")["val"]
    model, _ = load_model(evaluated[0] / "ckpt_0000006.pt")
    stream = TokenStream(tuned[0]["data_dir"], "val")
    loader = WindowLoader(stream, 32, 64, 0, 257, shuffle=False)
    x, y = (torch.from_numpy(part.astype("int64")) for part in loader.read_windows(range(64)))
    with torch.no_grad():
        assert float(val[0]) == pytest.approx(model(x, y).item(), abs=1e-5)
    assert losses(log_dir)[0] < 5  # where random weights have ln 384 = 5.95


NO_WPE = """
import pathlib, sys, types
source = pathlib.Path(sys.path[0], "model.py").read_text(encoding="utf-8")
for part in ('"wpe": nn.Embedding(config.block_size, config.n_embd),', " + self.transformer.wpe(position)"):
    assert source.count(part) == 1
    source = source.replace(part, "")
model = sys.modules["model"] = types.ModuleType("model")
exec(source, vars(model))
"""


def test_a_changed_model_without_wpe_trains_and_begins_with_its_own_weights(flags, tmp_path):
    script = with_fault(tmp_path, NO_WPE)
    flags |= {"max_steps": 2, "warmup_steps": 0}
    train(flags, 1, script, log_dir=tmp_path / "one")
    train(flags, 1, script, log_dir=tmp_path / "two", init_from=tmp_path / "one", block_size=32)
    state = torch.load(tmp_path / "two" / "ckpt_0000002.pt", weights_only=True)
    assert "transformer.wpe.weight" not in state["model"] and state["model_config"]["block_size"] == 32
    assert losses(tmp_path / "two")[0] < losses(tmp_path / "one")[0] - 0.3
    done = attempt(flags, log_dir=tmp_path / "three", init_from=tmp_path / "one")  # with model.py as it is
    assert done.returncode == 2 and "model.py" in done.stderr and "wpe" in done.stderr


def test_a_fine_tuned_run_resumes_without_its_source(tuned, tmp_path):
    flags, log_dir, _ = tuned
    short = {**flags, "max_steps": 6, "log_dir": tmp_path / "log"}
    done = attempt({**short, "target_loss": 99})  # one step, and a checkpoint
    assert done.returncode == 0, done.stderr
    short.pop("init_from")  # the run remembers that it began with weights, and has its own by now
    train({**short, "resume": "true"})
    ours, theirs = (read_log(folder, "train", "val", "norm") for folder in (tmp_path / "log", log_dir))
    assert ours == theirs
    assert_same_tensors(load_checkpoint(tmp_path / "log"), load_checkpoint(log_dir))


@pytest.mark.parametrize(("overrides", "words"), [
    ({"eval_only": "true"}, "not there"),
    ({"init_from": "RUN", "tokenizer": "OTHER"}, "leave out --tokenizer"),
    ({"init_from": "NAN", "eval_only": "true"}, "nan: nan or infinity in 1 tensors"),
])
def test_weights_that_do_not_fit(flags, evaluated, tmp_path, overrides, words):
    (tmp_path / "other.tiktoken").write_bytes(flags["tokenizer"].read_bytes() + b"YWI= 256\n")
    state = load_checkpoint(evaluated[0])
    state["model"]["transformer.h.0.ln_1.weight"][0] = float("nan")
    (tmp_path / "nan").mkdir()
    save_checkpoint(tmp_path / "nan", 7, state)
    values = {"RUN": evaluated[0], "OTHER": tmp_path / "other.tiktoken", "NAN": tmp_path / "nan"}
    overrides = {key: values.get(value, value) for key, value in overrides.items()}
    done = attempt({**flags, **overrides}, log_dir=tmp_path / "log")
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert not (tmp_path / "log").exists()


def test_a_signal_stops_after_what_is_being_evaluated(flags, tmp_path, questions):
    """In the middle of validation, of HellaSwag, and of a run that only evaluates: no step follows."""
    flags |= {"hellaswag_interval": 3, "hellaswag_data": questions, "log_dir": tmp_path / "log"}

    def signalled(reduction, call):
        return on_forward(tmp_path, f"""
            batches.append(kwargs.get("reduction") == "{reduction}")
            if batches[-1] and sum(batches) == {call}:
                os.kill(os.getpid(), signal.SIGTERM)""", before="batches = []")

    # 32 windows, 2 at a time: the second batch of the validation of step 4
    out = train(flags, 1, signalled("sum", 16 + 2))
    assert "stopped by SIGTERM: step 4," in out and "step 4 | val loss" in out
    assert load_checkpoint(tmp_path / "log")["val_loss"] is not None
    out = train({**flags, "resume": "true"}, 1, signalled("none", 2))
    assert "step 4 | val loss" in out and "stopped by SIGTERM: step 6," in out
    assert "step 6 | completion" in out and load_checkpoint(tmp_path / "log")["step"] == 6
    out = train({**flags, "eval_only": "true"}, 1, signalled("sum", 2))
    assert "val loss" not in out and "completion" not in out


def test_pruned_weights_are_tuned_by_two_processes_with_fsdp(flags, evaluated, tmp_path):
    """The remaining heads are the same; exported, the model has the same val loss."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=257, n_vocab=257, n_layer=2, n_head=2, n_embd=32,
                          heads=(1, 2)))
    state = {**load_checkpoint(evaluated[0]), "step": 0, "model": model.state_dict(),
             "model_config": describe_model(model)}
    (tmp_path / "pruned").mkdir()
    save_checkpoint(tmp_path / "pruned", 0, state)
    export_hf(state, tmp_path / "hf")
    flags |= {"dropout": 0, "max_steps": 2, "warmup_steps": 0, "val_interval": 1}
    data_dir = shutil.copytree(flags["data_dir"], tmp_path / "data",  # without its train shards
                               ignore=shutil.ignore_patterns("manifest.json", "*_train_*"))
    train(flags, log_dir=tmp_path / "one", init_from=tmp_path / "pruned")
    train(flags, 2, log_dir=tmp_path / "two", init_from=tmp_path / "pruned", parallel="fsdp")
    assert load_checkpoint(tmp_path / "two")["model_config"]["heads"] == (1, 2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    out = train({**flags, "eval_only": "true"}, log_dir=tmp_path / "none", init_from=tmp_path / "hf",
                data_dir=data_dir)
    assert f"val loss: {float(read_log(tmp_path / 'one', 'val')['val'][0]):.4f}" in out
