"""The studies' numbers, from hand-made logs; their shell loops; Xavier's weights."""

import json
import math
import re
import sys

import numpy as np
import pytest
import torch
from training import ROOT, SHAPE

sys.path.insert(0, str(ROOT / "experiments"))
import plot
import xavier

from bpe import GPT2_SHA256, load_tokenizer
from checkpoint import load_model
from configurator import UserError
from model import GPT, GPTConfig

CONFIG = {"block_size": 128, "vocab_size": 4096, "n_layer": 4, "n_head": 2, "n_embd": 128,
          "norm_position": "pre", "batch_tokens": 4096}


@pytest.mark.parametrize(("goal", "step"), [(6.0, 0), (5.0, 5), (4.0, 10), (3.5, 15), (3.0, 20),
                                            (2.9, math.nan)])
def test_crossing_is_interpolated_between_validations(goal, step):
    steps, losses = np.array([0, 10, 20, 30]), np.array([6.0, 4.0, 3.0, 3.2])
    assert plot.crossing(steps, losses, goal) == pytest.approx(step, nan_ok=True)


def write_run(folder, losses, val):
    """A run with these train losses, and `val`, {step: loss}; its steps take 0.5 s but the third, 0.25 s."""
    folder.mkdir(parents=True)
    lines = ["0 unigram 6.5"]
    for step, loss in enumerate(losses):
        lines += [f"{step} train {loss}", f"{step} norm_h0 {step + 1}", f"{step} norm_h3 {2 * step + 2}",
                  f"{step} tok_s {4096 / (0.25 if step == 2 else 0.5)}"]
        if not math.isfinite(loss):
            lines.append(f"{step} skipped 1")
    lines += [f"{step} val {loss}" for step, loss in val.items()]
    starts = [json.dumps({"config": {**CONFIG, "max_steps": steps}}) for steps in (99, 20)]  # the last counts
    for name, text in (("log.txt", lines), ("runs.jsonl", starts)):
        (folder / name).write_text("\n".join([*text, ""]), encoding="utf-8")


@pytest.mark.parametrize(("losses", "val", "outcome"), [
    ([7.0] * 20, {0: 8.3, 20: 6.39}, "learned"), ([7.0] * 20, {0: 8.3, 20: 6.41}, "not learned"),
    ([7.0] * 20, {0: 8.3, 20: 7.0}, "not learned"), ([7.0] * 20, {0: 8.3, 20: math.nan}, "diverged"),
    ([7.0] * 10 + [math.nan] * 3, {0: 8.3}, "diverged"), ([7.0] * 10, {0: 8.3, 10: math.inf}, "diverged"),
])
def test_outcome(tmp_path, losses, val, outcome):
    write_run(tmp_path / "run", losses, val)
    assert plot.outcome(plot.read_run(tmp_path / "run")) == outcome


def test_a_run_that_is_not_finished_is_named(tmp_path):
    write_run(tmp_path / "run", [math.nan, *[7.0] * 9], {0: 8.3})  # one skipped step is no end
    with pytest.raises(UserError, match="run is not finished"):
        plot.read_run(tmp_path / "run")
    write_run(tmp_path / "begun", [], {})  # the unigram model's loss alone
    with pytest.raises(UserError, match="begun is not finished"):
        plot.read_run(tmp_path / "begun")
    write_run(tmp_path / "lost", [7.0] * 20, {20: 6.0})
    (tmp_path / "lost" / "runs.jsonl").unlink()
    with pytest.raises(UserError, match="lost is not finished"):
        plot.read_run(tmp_path / "lost")


def test_half_a_line_of_runs_jsonl_is_left_out(tmp_path):
    write_run(tmp_path / "run", [7.0] * 20, {20: 6.0})
    with open(tmp_path / "run" / "runs.jsonl", "a", encoding="utf-8") as file:
        file.write('{"config": {"max_st')
    assert plot.final(plot.read_run(tmp_path / "run")) == 6.0


@pytest.mark.parametrize(("make_table", "name"), [
    (plot.norm_table, "pre_gpt2_try"), (plot.norm_table, "mid_gpt2_lr5e-4_w0_s1"),
    (plot.optimizers_table, "lion_lr4e-3_s1"), (plot.vocabularies_table, "vocab1k_old")])
def test_a_folder_that_is_no_run_of_the_study_is_named(make_table, name):
    with pytest.raises(UserError, match=f"{name} is not named like a run of this study"):
        make_table({name: {"val": {20: 6.0}, "max_steps": {0: 20}, "unigram": {0: 6.5}}})


def test_a_vocabulary_with_fewer_seeds_has_its_own_mean():
    streams = {"flops": {0: 1e9}, "max_steps": {0: 20}, "val": {20: 5.0}}
    runs = {f"vocab{k}k_s{seed}": {**streams, "val_bpb": {20: bits}}
            for k, seed, bits in ((1, 1, 2.5), (1, 2, 2.7), (50, 1, 2.25))}
    *_, heading, small, large = plot.vocabularies_table(runs)
    assert heading.split()[-3:] == ["each", "seed", "mean"]
    assert small.split()[-3:] == ["2.5000", "2.7000", "2.6000"]
    assert large.split()[-2:] == ["2.2500", "2.2500"]


def test_streams_keep_what_tables_and_figures_need(tmp_path):
    write_run(tmp_path / "run", np.arange(20.0), {0: 8.3, 20: 6.0})
    streams = plot.read_run(tmp_path / "run")
    assert streams["train"] == {0: 4.5, 10: 14.5}  # means of 10 steps
    assert streams["ms"] == {0: 250} and streams["max_steps"] == {0: 20}
    assert streams["first_block"] == {0: 1, 19: 20} and streams["last_block"] == {0: 2, 19: 40}
    again = plot.parse_streams(plot.format_streams({"a": streams, "b": streams}))
    assert list(again) == ["a", "b"]
    assert again["a"] == {name: pytest.approx(streams[name]) for name in streams}


def runs_of(tmp_path, **val):
    """Runs read from logs of 20 steps, with val losses at 0, 10 and 20."""
    for name, losses in val.items():
        write_run(tmp_path / name.replace("_lr1_", "_lr1e-3_"), [7.0] * 20, dict(zip((0, 10, 20), losses)))
    return {path.name: plot.read_run(path) for path in tmp_path.iterdir()}


def test_muon_against_adamw(tmp_path):
    runs = runs_of(tmp_path, adamw_lr1_s1=(8, 6, 5), adamw_lr1_s2=(8, 6, 5.2), muon_lr1_s1=(8, 5, 4),
                   muon_lr1_s2=(8, 5.2, 4), separate_lr1_s1=(8, 5.5, 4.5))
    shares = plot.steps_to_adamw(runs)
    assert shares["muon"] == pytest.approx([0.5, 0.5]) and shares["separate"] == pytest.approx([0.75])
    text = "\n".join(plot.optimizers_table(runs))
    assert "5.1000 +- 0.1414" in text and "Muon 250 ms" in text


def test_every_study_is_drawn_again_from_its_streams(tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "gradient_table", lambda: ["gradients"])
    names = {"norm": [f"{norm}_{weights}_lr{lr}_w{warmup}_s1" for norm in ("pre", "post")
                      for weights in ("gpt2", "xavier") for lr in ("20e-4", "80e-4") for warmup in (0, 200)],
             "optimizers": ["adamw_lr4e-3_s1", "muon_lr16e-3_s1", "separate_lr16e-3_s1", "short_lr16e-3_s1"],
             "vocabularies": ["vocab1k_s1", "vocab1k_s2", "vocab50k_s1", "vocab50k_s2"]}
    for study, runs in names.items():
        streams = {"val": {0: 8.0, 10: 6.0, 20: 5.0}, "val_bpb": {0: 3.0, 10: 2.5, 20: 2.0},
                   "train": {0: 8.0, 10: 6.0}, "unigram": {0: 6.5}, "max_steps": {0: 20}, "ms": {0: 250},
                   "flops": {0: 1e9}, "first_block": {0: 1.0, 19: 2.0}, "last_block": {0: 1.0, 19: 2.0}}
        folder = tmp_path / study
        folder.mkdir()
        text = plot.format_streams(dict.fromkeys(runs, streams))
        (folder / "streams.txt").write_text(text, encoding="utf-8")
        monkeypatch.setattr(plot, "out_dir", str(folder))
        monkeypatch.setattr(plot, "redraw", True)
        plot.main(study)
        assert (folder / "figure.png").stat().st_size > 10_000 and (folder / "table.txt").stat().st_size > 200
    assert plot.bytes_per_token(streams) == pytest.approx(5.0 / math.log(2) / 2.0)


def test_the_vocabularies_train_for_equal_flops():
    script = (ROOT / "experiments" / "vocabularies.sh").read_text(encoding="utf-8")
    steps = {int(k): int(n) for k, n in re.findall(r"^    train \$seed (\d+) (\d+)$", script, re.M)}
    vocab_sizes = {1: 1024, 4: 4096, 16: 16_384, 50: 50_304}
    flops = {k: plot.flops_per_step({**CONFIG, "vocab_size": vocab_sizes[k]}) for k in vocab_sizes}
    blocks = 4 * (12 * 128**2 + 13 * 128) + 2 * 128  # parameters of 4 blocks, with biases and norms
    assert flops[4] == 4096 * (6 * (blocks + 4096 * 128) + 12 * 4 * 128 * 128)
    assert steps == {k: round(400 * flops[4] / flops[k]) for k in flops}


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_xavier_weights_are_a_checkpoint_to_start_from(tmp_path, monkeypatch, norm):
    class Stream:
        def __init__(self, *where):
            pass

        def tokenizer(self):
            return load_tokenizer("gpt2")

    monkeypatch.setattr(xavier, "TokenStream", Stream)
    monkeypatch.setattr(xavier, "norm_position", norm)
    xavier.write_weights(tmp_path / "start.pt")
    model, state = load_model(tmp_path / "start.pt")
    assert "optimizers" not in state and model.config.norm_position == norm
    assert (state["tokenizer"]["sha256"], model.config.n_layer, model.config.n_embd) == (GPT2_SHA256, 12, 64)


def test_xavier_draws_every_matrix_with_its_own_deviation():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SHAPE, "n_embd": 64}))
    xavier.draw_xavier(model)
    block = model.transformer.h[1]
    for weight, std in ((block.attn.c_attn.weight, (2 / 128)**0.5), (block.mlp.c_proj.weight, (2 / 320)**0.5),
                        (block.attn.c_proj.weight, (2 / 128)**0.5), (model.transformer.wte.weight, 1 / 8)):
        assert weight.std().item() == pytest.approx(std, rel=0.05)
    assert model.lm_head.weight is model.transformer.wte.weight and not block.mlp.c_fc.bias.any()
