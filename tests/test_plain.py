"""plain_gpt2.py, GPT-2 training in 200 lines, against train_gpt2.py: the same losses, norms and weights."""

import ast
import runpy

import plain_gpt2
import pytest
import torch
from training import ROOT, read_log, train

from analyze_compute import train_settings
from checkpoint import load_checkpoint

TINY = {"n_layer": 2, "n_head": 2, "n_embd": 32, "T": 64, "B": 32, "vocab_size": 384, "max_steps": 20,
        "warmup_steps": 3, "max_lr": 1e-2, "min_lr": 1e-3}


def test_it_trains_as_train_gpt2_does(flags, tmp_path, tiny_data, monkeypatch):
    """Across the end of an epoch, with gradients above and below the clip."""
    for name, value in TINY.items():
        monkeypatch.setattr(plain_gpt2, name, value)
    assert len(plain_gpt2.read_tokens(tiny_data)) // 64 < 20 * 32
    model, history = plain_gpt2.train(tiny_data)
    train(flags, log_dir=tmp_path, dropout=0, max_steps=20, batch_size=32, batch_tokens=32 * 64,
          val_interval=0, checkpoint_interval=0)

    log = read_log(tmp_path, "train", "lr", "norm")
    assert len(history) == len(log["train"]) == 20
    for step, (loss, norm) in enumerate(history):
        assert loss == pytest.approx(float(log["train"][step]), rel=1e-6)
        assert norm == pytest.approx(float(log["norm"][step]), rel=1e-6)
        assert plain_gpt2.get_lr(step) == pytest.approx(float(log["lr"][step]), rel=1e-6)
    norms = [norm for _, norm in history]
    assert min(norms) < plain_gpt2.grad_clip < max(norms)
    weights = load_checkpoint(tmp_path)["model"]
    assert weights.keys() == model.state_dict().keys()
    for name, tensor in weights.items():  # rounding leaves 4e-6; the last step alone moves 1e-3
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=2e-5)


def test_its_settings_are_those_of_the_demo():
    """With AdamW, as its docstring says."""
    demo = {**train_settings(), **runpy.run_path(str(ROOT / "config" / "demo_cpu.py")), "max_lr": 4e-3}
    assert "config/demo_cpu.py --optimizer=adamw --max_lr=4e-3`" in plain_gpt2.__doc__
    plain = vars(plain_gpt2)
    assert (plain["T"], plain["B"] * plain["T"]) == (demo["block_size"], demo["batch_tokens"])
    for key in ("n_layer", "n_head", "n_embd", "max_steps", "warmup_steps", "max_lr", "min_lr", "beta1",
                "beta2", "weight_decay", "grad_clip", "seed"):
        assert plain[key] == demo[key], key


def test_it_is_short_and_stands_alone():
    source = (ROOT / "tests" / "plain_gpt2.py").read_text(encoding="utf-8")
    assert source.count("\n") <= 200
    nodes = list(ast.walk(ast.parse(source)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    assert not {name.split(".")[0] for name in names} & {path.stem for path in ROOT.glob("*.py")}
