"""The studies' numbers, from hand-made logs; their shell loops; Xavier's weights."""

import json
import math
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from training import ROOT, SHAPE, load_model

sys.path.insert(0, str(ROOT / "experiments"))
import demo
import plot
import published
import xavier

from bpe import GPT2_SHA256, load_tokenizer
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
        make_table({name: {"val": [[20], [6.0]], "max_steps": 20, "unigram": 6.5}})


def test_a_vocabulary_with_fewer_seeds_has_its_own_mean():
    run = {"flops": 1e9, "max_steps": 20, "val": [[20], [5.0]]}
    runs = {f"vocab{k}k_s{seed}": {**run, "val_bpb": [[20], [bits]]}
            for k, seed, bits in ((1, 1, 2.5), (1, 2, 2.7), (50, 1, 2.25))}
    *_, heading, small, large = plot.vocabularies_table(runs)
    assert heading.split()[-3:] == ["each", "seed", "mean"]
    assert small.split()[-3:] == ["2.5000", "2.7000", "2.6000"]
    assert large.split()[-2:] == ["2.2500", "2.2500"]


def test_what_is_kept_of_a_run(tmp_path):
    write_run(tmp_path / "run", np.arange(20.0), {0: 8.3, 20: 6.0})
    run = plot.read_run(tmp_path / "run")
    assert run["train"] == [[0, 10], [4.5, 14.5]]  # means of 10 steps
    assert run["val"] == [[0, 20], [8.3, 6.0]]
    assert (run["ms"], run["max_steps"], run["unigram"]) == (250, 20, 6.5)
    assert run["first_block"] == [[0, 19], [1, 20]] and run["last_block"] == [[0, 19], [2, 40]]


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


def test_every_study_is_drawn_again_without_its_logs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plot, "gradient_table", lambda: ["gradients"])
    monkeypatch.setattr(plot, "ROOT", tmp_path)
    names = {"norm": [f"{norm}_{weights}_lr{lr}_w{warmup}_s1" for norm in ("pre", "post")
                      for weights in ("gpt2", "xavier") for lr in ("20e-4", "80e-4") for warmup in (0, 200)],
             "optimizers": ["adamw_lr4e-3_s1", "muon_lr16e-3_s1", "separate_lr16e-3_s1", "short_lr16e-3_s1"],
             "vocabularies": ["vocab1k_s1", "vocab1k_s2", "vocab50k_s1", "vocab50k_s2"]}
    for study, runs in names.items():
        for name in runs:
            write_run(tmp_path / f"log_{study}" / name, np.linspace(8, 6, 20) / 3, {0: 8.0, 20: 5.1 / 3})
            with open(tmp_path / f"log_{study}" / name / "log.txt", "a", encoding="utf-8") as file:
                file.write("0 val_bpb 3\n20 val_bpb 2\n")
        folder, published = tmp_path / f"log_{study}", tmp_path / "results" / plot.STUDIES[study][0]
        monkeypatch.setattr(plot, "log_dir", str(folder))
        printed = []
        for redraw, results in ((False, folder), (True, published)):
            monkeypatch.setattr(plot, "redraw", redraw)
            plot.main(study)
            assert (results / "figure.png").stat().st_size > 10_000
            printed.append(capsys.readouterr().out.partition("results:")[0])
            if not redraw:
                published.mkdir(parents=True)
                shutil.move(folder / "runs.json", published)
                assert (folder / "table.txt").read_text(encoding="utf-8") == printed[0]
                shutil.rmtree(folder)
        assert not folder.exists()
        assert printed[0].removesuffix("\ngradients\n") == printed[1] and len(printed[1]) > 200
    run = {"val": [[20], [5.0]], "val_bpb": [[20], [2.0]], "max_steps": 20}
    assert plot.bytes_per_token(run) == pytest.approx(5.0 / math.log(2) / 2.0)


@pytest.mark.parametrize("study", plot.STUDIES)
def test_the_published_table_is_that_of_the_published_runs(study):
    folder, make_table, _ = plot.STUDIES[study]
    runs = json.loads((ROOT / "results" / folder / "runs.json").read_text(encoding="utf-8"))
    table = (ROOT / "results" / folder / "table.txt").read_text(encoding="utf-8")
    assert table.startswith("\n".join(make_table(runs)))


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


def test_the_last_gradient_scales_with_depth_as_the_theory_says():
    """Xiong et al. 2020, "On Layer Normalization in the Transformer Architecture", theorem 1."""
    for norm, ratio in (("pre", 0.5), ("post", 1.0)):
        shallow, deep = (xavier.last_gradient(norm, depth, 1, xavier.draw_xavier) for depth in (2, 8))
        assert deep / shallow == pytest.approx(ratio, abs=0.15)


def test_xavier_draws_every_matrix_with_its_own_deviation():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SHAPE, "n_embd": 64}))
    xavier.draw_xavier(model)
    block = model.transformer.h[1]
    for weight, std in ((block.attn.c_attn.weight, (2 / 128)**0.5), (block.mlp.c_proj.weight, (2 / 320)**0.5),
                        (block.attn.c_proj.weight, (2 / 128)**0.5), (model.transformer.wte.weight, 1 / 8)):
        assert weight.std().item() == pytest.approx(std, rel=0.05)
    assert model.lm_head.weight is model.transformer.wte.weight and not block.mlp.c_fc.bias.any()


def test_the_published_runs_are_drawn_beside_what_their_authors_state(tmp_path):
    with pytest.raises(UserError, match="there are no logs in"):
        published.draw(tmp_path)
    curves = {"a": (100, 3.5), "tuned_1": (50, 2.5), "b": (40, 3.0)}
    for name, (last, bits) in curves.items():
        (tmp_path / name).mkdir()
        lines = [f"{step} train {10 - step / 50}\n" for step in range(last)]
        lines += [f"{step} val {9.5 - step / 50}\n{step} val_bpb {bits - step / 100}\n" for step in (0, last)]
        (tmp_path / name / "log.txt").write_text("".join(lines), encoding="utf-8")
    figure = published.draw(tmp_path)
    of_a, tuned, of_b = figure.get_axes()
    assert "100 of 2,848 steps" in of_a.get_title() and "first 39 steps" in of_b.get_title()
    assert of_a.get_lines()[0].get_label() == "train, ours (at the end 8.30)"  # the mean of 29 steps
    val = next(line for line in of_a.get_lines() if line.get_label().startswith("val, ours"))
    assert val.get_xydata()[-1] == pytest.approx([100 * 8192 / 1e6, 7.5])
    assert [line.get_label() for line in tuned.get_lines()] == ["run A (2.500 at step 100)",
                                                                "ours, seed 1 (2.000 at step 50)"]
    assert of_b.get_lines()[2].get_xydata()[-1].tolist() == [100, 6.61]  # its author's
    demo.pyplot().close(figure)


def test_the_demos_picture_has_its_losses_and_its_sample():
    folder = ROOT / "results" / "demo_cpu"
    figure = demo.draw(folder)
    losses, sample = figure.get_axes()
    train, val, unigram = losses.get_lines()
    log = plot.parse_log(folder / "log.txt")
    assert [tuple(point) for point in val.get_xydata()] == sorted(log["val_bpb"].items())
    last = max(log["train"])
    nats, bits = log["val"][max(log["val"])], log["val_bpb"][max(log["val"])]
    assert train.get_xydata()[-1] == pytest.approx([last, log["train"][last] / nats * bits])
    assert unigram.get_ydata()[0] == pytest.approx(log["unigram"][0] / nats * bits)
    assert sample.texts[0].get_text() == (folder / "sample.txt").read_text(encoding="utf-8")
    demo.pyplot().close(figure)
