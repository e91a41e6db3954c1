"""Checkpoints: whole or refused, safe to load, enough to generate."""

import ast
import pickle
from pathlib import Path

import pytest
import torch

from bpe import load_tokenizer, tokenizer_from_ranks
from checkpoint import (
    checkpoint_tokenizer,
    describe_model,
    describe_tokenizer,
    list_checkpoints,
    load_checkpoint,
    load_model,
    prune_checkpoints,
    save_checkpoint,
)
from configurator import UserError
from model import GPT, GPTConfig

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def state(byte_tokenizer):
    torch.manual_seed(0)
    model = GPT(GPTConfig(16, 384, 257, 2, 2, 32))
    optimizer, = model.configure_optimizers("adamw", 0.1, 1e-3, (0.9, 0.95), fused=True)
    model(torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long)).backward()
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 7,
            "model_config": describe_model(model),
            "tokenizer": describe_tokenizer(load_tokenizer(str(byte_tokenizer)))}


def test_round_trip(state, tmp_path, byte_tokenizer):
    path = save_checkpoint(tmp_path, 7, state)
    assert path.name == "ckpt_0000007.pt" and [p.name for p in tmp_path.iterdir()] == [path.name]
    model, loaded = load_model(path)
    assert loaded["step"] == 7 and not model.training
    assert all(torch.equal(tensor, state["model"][name]) for name, tensor in model.state_dict().items())
    assert model.lm_head.weight is model.transformer.wte.weight
    for key, moments in state["optimizer"]["state"].items():
        assert all(torch.equal(moments[k], loaded["optimizer"]["state"][key][k]) for k in moments)
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
    torch.save({"format": "gpt2-checkpoint-1", "step": Malicious()}, tmp_path / "ckpt_0000001.pt")
    with pytest.raises(UserError, match="could run code"):
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
            if called in ("torch.load", "pickle.load", "pickle.loads"):
                calls += 1
                assert "weights_only=True" in ast.unparse(node), f"{path.name}:{node.lineno}"
    assert calls >= 1


def test_not_a_checkpoint_of_ours(tmp_path):
    for path, words in [(tmp_path / "none.pt", "not there"), (tmp_path, "got none")]:
        with pytest.raises(UserError, match=words):
            load_checkpoint(path)
    torch.save({"model": {}}, tmp_path / "foreign.pt")
    with pytest.raises(UserError, match="not written by train_gpt2"):
        load_checkpoint(tmp_path / "foreign.pt")


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
