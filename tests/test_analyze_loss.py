"""analyze_loss.py: means against their definitions, losses against slow loops and models in closed form."""

import csv
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from training import ROOT, attempt, read_log, train

import analyze_loss
from analyze_loss import (
    Row,
    along_training,
    draw_training,
    draw_windows,
    pick,
    position_bins,
    rank_bands,
    ratio,
)
from bpe import Tokenizer, load_tokenizer
from checkpoint import build_model, describe_model, describe_tokenizer, save_checkpoint
from configurator import UserError, configure
from convert_hf import export_hf
from model import GPT, GPTConfig
from shards import TokenStream, WindowLoader, write_manifest, write_shard

T, STEP, BATCH = 16, 60, 128  # context, steps done, tokens per step: 480 windows, a quarter of tiny_data's


@pytest.fixture
def state(tiny_data, byte_tokenizer):
    """The checkpoint of a run on tiny_data, its weights large enough for losses that differ."""
    torch.manual_seed(0)
    tok = load_tokenizer(str(byte_tokenizer))
    model = GPT(GPTConfig(block_size=T, vocab_size=384, n_vocab=tok.n_vocab, n_layer=1, n_head=2, n_embd=16))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return {"step": STEP, "model": model.state_dict(), "model_config": describe_model(model),
            "tokenizer": describe_tokenizer(tok), "data": TokenStream(tiny_data, "train").fingerprint,
            "config": {"data_dir": str(tiny_data), "seed": 7, "batch_tokens": BATCH, "block_size": T,
                       "val_tokens": 2000}}


def measure(folder, state, **overrides):
    folder.mkdir(exist_ok=True)
    path = save_checkpoint(folder, state["step"], state)
    settings = {"data_dir": "", "val_tokens": 0, "device": "cpu", "dtype": "float32", "seed": 1}
    return analyze_loss.measure(str(path), **{**settings, **overrides})


def report(monkeypatch, folder, *flags):
    """analyze_loss.py in this process, in `folder`, on the CPU."""
    monkeypatch.chdir(folder)
    namespace = vars(analyze_loss)
    for key in ("checkpoint", "data_dir", "out_dir", "val_tokens", "device", "dtype", "seed"):
        monkeypatch.setitem(namespace, key, namespace[key])  # put back after the test
    configure(namespace, ["--checkpoint=log", "--data_dir=", "--device=cpu", "--dtype=float32", *flags])
    analyze_loss.main()


def write_log(folder):
    lines = "".join(f"{step} train {5 - step / 100}\n" for step in range(STEP))
    (folder / "log.txt").write_text(f"{lines}0 val 5.1\n{STEP} val 4.5\n", encoding="utf-8")


def read_csv(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# ---- statistics ----------------------------------------------------------------


def test_means_and_errors_are_those_of_the_definition():
    draw = np.random.default_rng(0)
    s, n = draw.normal(5, 2, (40, 3)), np.ones((40, 3))  # as many tokens in each window
    s[:, 1:], n[:, 1:] = draw.gamma(2, 3, (40, 2)), draw.integers(0, 9, (40, 2))  # and not
    tokens, mean, se = np.array([ratio(*columns) for columns in zip(s.T, n.T)]).T
    np.testing.assert_allclose(tokens, n.sum(axis=0))
    np.testing.assert_allclose(mean, [s[:, 0].mean(), *(s.sum(axis=0) / n.sum(axis=0))[1:]])
    assert se[0] == pytest.approx(s[:, 0].std(ddof=1) / math.sqrt(40))
    residuals = s - mean * n  # of a ratio: each window's part in it, which sum to 0
    np.testing.assert_allclose(se, np.sqrt(40) * residuals.std(axis=0, ddof=1) / n.sum(axis=0))
    leave_one_out = [np.delete(s, i, 0).sum(axis=0) / np.delete(n, i, 0).sum(axis=0) for i in range(40)]
    jackknife = math.sqrt(39) * np.std(leave_one_out, axis=0)
    np.testing.assert_allclose(se, jackknife, rtol=0.05)


def test_no_error_is_given_where_it_is_not_known():
    for s, n, expected in (([1, 3], [1, 1], (2, 2, 1)), ([1], [1], (1, 1, math.nan)),
                           ([2, 0], [1, 0], (1, 2, math.nan)), ([0, 0], [0, 0], (0, math.nan, math.nan))):
        np.testing.assert_equal(ratio(np.array(s), np.array(n)), expected)


def test_bands_are_by_rank():
    counts = np.random.default_rng(1).integers(0, 4, 3000)  # many are equal, many 0
    names, band_of = rank_bands(counts)
    ranked = sorted(np.flatnonzero(counts).tolist(), key=lambda id: (-counts[id], id))
    assert names == ["1-10", "11-100", "101-1000", f"1001-{len(ranked)}", "never"]
    for i, (start, end) in enumerate([(0, 10), (10, 100), (100, 1000), (1000, len(ranked))]):
        assert np.flatnonzero(band_of == i).tolist() == sorted(ranked[start:end])
    np.testing.assert_array_equal(band_of == 4, counts == 0)
    assert rank_bands(np.arange(1, 11))[0] == ["1-10"]  # all counted, and no more than a band
    assert rank_bands(np.array([0, 3]))[0] == ["1-1", "never"]


@pytest.mark.parametrize("T", [1, 3, 16, 256, 1024])
def test_bins_cover_the_positions_once(T):
    starts = position_bins(T)
    assert starts[0] == 0 and (np.diff(starts) > 0).all() and starts[-1] < T
    widths = np.diff([*starts, T])
    assert widths.sum() == T and widths[0] == 1 and len(starts) <= 2 * math.log2(T) + 1
    assert widths.max() <= max(2, T / 2)


def test_train_windows_are_drawn_from_the_whole_split_and_seen_are_those_of_the_run(tiny_data):
    loader = WindowLoader(TokenStream(tiny_data, "train"), T, BATCH, seed=7, n_vocab=257)
    in_batches = np.concatenate([loader.window_ids(step) for step in range(STEP)])
    everything, seen = draw_windows(loader.n_windows, loader, 1, 7, len(in_batches))
    np.testing.assert_array_equal(everything, np.arange(loader.n_windows))
    np.testing.assert_array_equal(np.flatnonzero(seen), np.sort(in_batches))
    some, seen = draw_windows(200, loader, 1, 7, len(in_batches))
    assert len(np.unique(some)) == 200 and (np.diff(some) > 0).all()
    np.testing.assert_array_equal(seen, np.isin(some, in_batches))
    tenths = np.bincount(some * 10 // loader.n_windows, minlength=10)
    assert tenths.min() >= 8  # of 20 expected in each
    assert set(some) != set(draw_windows(200, loader, 2, 7, 0)[0])


def test_along_training_the_train_loss_is_the_mean_around_the_step():
    streams = {"train": {step: 9 - 0.01 * step + (-1) ** step for step in range(400)},
               "val": {0: 9.5, 200: 7.25, 400: 5.5}}
    steps, val, train, se = along_training(streams).T
    assert steps.tolist() == [0, 200, 400] and val.tolist() == [9.5, 7.25, 5.5]
    around = np.array([streams["train"][step] for step in range(190, 211)])
    end = np.mean([streams["train"][step] for step in range(380, 400)])
    np.testing.assert_allclose(train, [9 - 0.005, around.mean(), end])  # at first, steps 0 and 1
    assert se[1] == pytest.approx(around.std(ddof=1) / math.sqrt(21))
    for streams in ({"val": {0: 9.5}}, {"train": {0: 9.5}}, {}):
        assert along_training(streams).shape == (0, 4)


def test_skipped_steps_take_no_point_of_a_report():
    """Of nan and inf only the marks are drawn; a val loss beside them has its gap. The gap of a checkpoint is
    drawn at its step, which need not be the log's last."""
    losses = {step: 9 - 0.01 * step for step in range(400)} | {195: math.nan, 205: math.inf}
    streams = {"train": losses, "val": {0: 9.5, 100: math.nan, 200: 7.25, 300: math.inf}, "skipped": {195: 1}}
    steps, _, train, se = along_training(streams).T
    assert steps.tolist() == [0, 200]
    around = np.array([losses[step] for step in range(190, 211) if step not in (195, 205)])
    assert (train[1], se[1]) == pytest.approx((around.mean(), around.std(ddof=1) / math.sqrt(19)))
    loss_axis, gap_axis = Figure().subplots(2)
    rows = [Row("gap", "train", "all", math.nan, 0.25, 0.01)]
    draw_training(loss_axis, gap_axis, SimpleNamespace(rows=rows, step=200), streams)
    of_log, of_checkpoint = (container.lines[0].get_xydata() for container in gap_axis.containers)
    np.testing.assert_allclose(of_log, [(0, 9.5 - 8.995), (200, 7.25 - around.mean())])
    np.testing.assert_allclose(of_checkpoint, [(200, 0.25)])
    lines = {line.get_label(): line for line in loss_axis.get_lines()}
    assert all(np.isfinite(line.get_ydata()).all() for line in lines.values())
    marks = {"skipped (1)": [195], "train nan or inf (1)": [205], "val nan or inf (2)": [100, 300]}
    assert {label: list(line.get_xdata()) for label, line in list(lines.items())[-3:]} == marks


# ---- models --------------------------------------------------------------------


def slow_losses(state, stream, windows):
    """(losses, targets), lists by window: log-softmax of full logits of each window, token by token."""
    model, losses, targets = build_model(state, "model"), [], []
    for window in windows:
        tokens = torch.from_numpy(stream.read(int(window) * T, T + 1).astype(np.int64))
        with torch.no_grad():
            logs = model(tokens[None, :-1])[0].double().log_softmax(dim=-1)
        losses.append([-logs[t, tokens[t + 1]].item() for t in range(T)])
        targets.append(tokens[1:].tolist())
    return np.array(losses), np.array(targets)


def test_losses_are_those_of_a_slow_loop(tmp_path, state, tiny_data, monkeypatch):
    token_bytes = np.arange(257) % 7 + 1  # the byte tokenizer's are all 1
    monkeypatch.setattr(Tokenizer, "token_bytes", lambda self: token_bytes)
    found = measure(tmp_path, state)
    val, train = (TokenStream(tiny_data, split) for split in ("val", "train"))
    loader = WindowLoader(train, T, BATCH, 7, 257)
    n = 2000 // T
    windows, seen = draw_windows(n, loader, 1, 7, STEP * BATCH // T)
    counts = np.bincount(train.read(0, len(train))[1:loader.n_windows * T + 1], minlength=257)
    ranks = {token: rank for rank, token in enumerate(np.argsort(-counts, kind="stable"), start=1)}
    unigram = -np.log((counts + 1) / (counts + 1).sum())
    assert 0 < seen.sum() < n and found.epochs == pytest.approx(STEP * BATCH / T / loader.n_windows)
    for split, stream, chosen in (("val", val, range(n)), ("train", train, windows),
                                  ("train seen", train, windows[seen]),
                                  ("train unseen", train, windows[~seen])):
        losses, targets = slow_losses(state, stream, chosen)
        W, bits = len(losses), losses.sum() / math.log(2)
        row, = pick(found.rows, "loss", split)
        assert row.n_tokens == losses.size and row.loss == pytest.approx(losses.mean(), rel=1e-5)
        assert row.se == pytest.approx(losses.mean(axis=1).std(ddof=1) / math.sqrt(W), rel=1e-4)
        assert row.unigram == pytest.approx(unigram[targets].mean())
        assert row.bits_per_byte == pytest.approx(bits / token_bytes[targets].sum(), rel=1e-5)
        rows = pick(found.rows, "position", split)
        assert [row.key for row in rows] == [str(t) for t in range(1, T + 1)]
        assert {row.n_tokens for row in rows} == {W}
        np.testing.assert_allclose([row.loss for row in rows], losses.mean(axis=0), rtol=1e-5)
        se = losses.std(axis=0, ddof=1) / math.sqrt(W)
        np.testing.assert_allclose([row.se for row in rows], se, rtol=1e-4)
        for row in pick(found.rows, "positions", split):
            start, end = map(int, row.key.split("-"))
            part = losses[:, start - 1:end]
            assert row.n_tokens == part.size and row.loss == pytest.approx(part.mean(), rel=1e-5)
            assert row.se == pytest.approx(part.mean(axis=1).std(ddof=1) / math.sqrt(W), rel=1e-4)
        rows, total = pick(found.rows, "band", split), 0
        for row in rows:
            inside = np.array([[in_band(ranks[id], counts[id], row.key) for id in ids] for ids in targets])
            total += inside.sum()
            assert row.n_tokens == inside.sum() and row.token_share == pytest.approx(inside.mean())
            if inside.any():
                assert row.loss == pytest.approx(losses[inside].mean(), rel=1e-5)
                assert row.unigram == pytest.approx(unigram[targets[inside]].mean())
            assert row.loss_share == pytest.approx(losses[inside].sum() / losses.sum(), rel=1e-5)
        assert total == losses.size
    assert found.band_ids == {row.key: sum(in_band(ranks[id], counts[id], row.key) for id in range(257))
                              for row in rows}
    for split in ("train", "train seen", "train unseen"):
        (of_val,), (of_train,), (difference,) = (
            pick(found.rows, *where) for where in (("loss", "val"), ("loss", split), ("gap", split)))
        assert difference.loss == pytest.approx(of_val.loss - of_train.loss)
        assert difference.se == pytest.approx(math.sqrt(of_val.se**2 + of_train.se**2))
        assert difference.bits_per_byte == pytest.approx(of_val.bits_per_byte - of_train.bits_per_byte)


def in_band(rank, count, key):
    if key == "never":
        return count == 0
    start, end = map(int, key.split("-"))
    return count > 0 and start <= rank <= end


def test_a_model_that_knows_nothing(tmp_path, state):
    for tensor in state["model"].values():
        tensor.zero_()
    found = measure(tmp_path, state)
    rows = [row for row in found.rows if row.kind != "gap" and row.n_tokens]
    assert {row.kind for row in rows} == {"loss", "position", "positions", "band"}
    for row in rows:  # 257 ids, all alike: padding rows of wte do not count
        assert row.loss == pytest.approx(math.log(257), rel=1e-6)
        assert math.isnan(row.se) or row.se < 1e-6
    assert all(abs(row.loss) < 1e-6 for row in found.rows if row.kind == "gap")


def test_a_unigram_model_has_the_loss_of_the_unigram_column(tmp_path, state, tiny_data):
    stream = TokenStream(tiny_data, "train")
    n_targets = (len(stream) - 1) // T * T
    counts = np.bincount(stream.read(1, n_targets), minlength=257) + 1
    for tensor in state["model"].values():
        tensor.zero_()
    state["model"]["transformer.ln_f.bias"][0] = 1  # so that every output is the first column of wte
    state["model"]["transformer.wte.weight"][:257, 0] = torch.from_numpy(np.log(counts))
    found = measure(tmp_path, state)
    assert f"the first {n_targets:,} train tokens" in found.setup
    for row in (row for row in found.rows if row.kind in ("loss", "band") and row.n_tokens):
        assert row.loss == pytest.approx(row.unigram, rel=1e-5)


def test_a_run_of_an_epoch_has_seen_all(tmp_path, state):
    found = measure(tmp_path, {**state, "step": 500})
    assert {row.split for row in found.rows} == {"val", "train"} and found.epochs > 2
    begun = measure(tmp_path, {**state, "step": 0})
    assert {row.split for row in begun.rows} == {"val", "train"} and begun.epochs == 0


def test_what_a_model_has_seen_of_other_data_is_not_known(tmp_path, state, tiny_data):
    whole, = pick(measure(tmp_path, state, val_tokens=10**6).rows, "loss", "val")
    assert whole.n_tokens == (len(TokenStream(tiny_data, "val")) - 1) // T * T
    for change in ({"data": "another"}, {"config": {**state["config"], "block_size": 2 * T}},
                   {"config": {**state["config"], "init_from": "pruned.pt"}}):  # which had seen some of it
        found = measure(tmp_path, {**state, **change})
        assert math.isnan(found.epochs) and {row.split for row in found.rows} == {"val", "train"}
    export_hf(state, tmp_path / "hf")
    found = analyze_loss.measure(str(tmp_path / "hf"), str(tiny_data), 10**6, "cpu", "float32", 1)
    val, = pick(found.rows, "loss", "val")
    assert math.isnan(found.epochs) and val.loss == pytest.approx(whole.loss, 1e-5)


def test_the_size_of_a_forward_pass_changes_nothing(tmp_path, state, monkeypatch):
    expected = measure(tmp_path, state).rows
    monkeypatch.setattr(analyze_loss, "FORWARD_TOKENS", 40)  # two windows at a time, and one at the end
    for row, other in zip(measure(tmp_path, state).rows, expected, strict=True):
        assert row[:3] == other[:3]
        np.testing.assert_allclose(row[3:], other[3:], rtol=1e-4, atol=1e-6)


# ---- the command ---------------------------------------------------------------


def test_the_val_loss_is_the_runs_own(flags, tmp_path, byte_tokenizer):
    log_dir = tmp_path / "log"
    train(flags, log_dir=log_dir)
    command = [sys.executable, str(ROOT / "analyze_loss.py"), f"--checkpoint={log_dir}", "--device=cpu",
               "--dtype=float32"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    log = read_log(log_dir, "val", "val_bpb", "unigram")
    rows = read_csv(log_dir / "report.csv")
    val = next(row for row in rows if row["kind"] == "loss" and row["split"] == "val")
    assert float(val["loss"]) == pytest.approx(float(log["val"][12]), rel=1e-6)
    assert float(val["bits_per_byte"]) == pytest.approx(float(log["val_bpb"][12]), rel=1e-6)
    assert float(val["unigram"]) == pytest.approx(float(log["unigram"][0]), rel=1e-6)
    evaluated = attempt(flags, eval_only="true", log_dir=log_dir)
    assert f"val loss: {float(val['loss']):.4f} |" in evaluated.stdout
    assert f"on {int(val['n_tokens']):,} tokens" in evaluated.stdout
    assert (log_dir / "report.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_printed_and_written(tmp_path, state, monkeypatch, capsys):
    (tmp_path / "log").mkdir()
    save_checkpoint(tmp_path / "log", STEP, state)
    write_log(tmp_path / "log")
    report(monkeypatch, tmp_path)
    text = capsys.readouterr().out
    rows = read_csv(tmp_path / "log" / "report.csv")
    val, = (row for row in rows if row["kind"] == "loss" and row["split"] == "val")
    number = f"{float(val['loss']):.4f}"
    line = next(line for line in text.splitlines() if line.startswith("val  ")).split()
    assert line[:4] == ["val", "2,000", number, f"{float(val['se']):.4f}"]
    positions = [row for row in rows if row["kind"] == "position" and row["split"] == "val"]
    assert [row["key"] for row in positions] == [str(t) for t in range(1, T + 1)]
    shown = [line.split() for line in text.split("tokens of context")[1].split("rank in")[0].splitlines()[1:]]
    assert [words[:2] for words in shown if words] == [
        [key, f"{float(positions[int(key) - 1]['loss']):.4f}"] for key in ("1", "2", "4", "8", "16")]
    bands = [row for row in rows if row["kind"] == "band" and row["split"] == "val"]
    assert sum(float(row["n_tokens"]) * float(row["loss"]) for row in bands if row["loss"]) / 2000 \
        == pytest.approx(float(val["loss"]), rel=1e-6)
    line = next(line for line in text.splitlines() if line.startswith("never")).split()
    assert line[1:4] == [str(257 - int(bands[-2]["key"].split("-")[1])),
                         f"{float(bands[-1]['token_share']):.2%}", f"{float(bands[-1]['loss']):.4f}"]
    assert line[-1] == f"{float(bands[-1]['loss_share']):.2%}"
    assert "log" not in {row["kind"] for row in rows}
    assert "0.27 epochs of " in text and "figure: log/report.png" in text and "table: log/report.csv" in text
    assert sorted(path.name for path in (tmp_path / "log").iterdir()) == [
        "ckpt_0000060.pt", "log.txt", "report.csv", "report.png"]


def test_where_the_report_goes_and_what_it_never_replaces(tmp_path, state, monkeypatch):
    save_checkpoint(tmp_path, STEP, state)  # and no log beside it
    report(monkeypatch, tmp_path, "--checkpoint=ckpt_0000060.pt", f"--val_tokens={T}")
    assert (tmp_path / "report.png").exists()
    report(monkeypatch, tmp_path, f"--checkpoint={tmp_path}", f"--val_tokens={T}", "--out_dir=a/b")
    assert len(read_csv(tmp_path / "a" / "b" / "report.csv")) == len(read_csv(tmp_path / "report.csv"))
    for name in ("report.csv", "report.png"):
        (tmp_path / name).unlink()
    for there in ("report.csv", "report.png"):  # one of the two is enough
        (tmp_path / there).write_text("mine", encoding="utf-8")
        with pytest.raises(UserError, match=rf"^{there} already exists.*--out_dir=FOLDER"):
            report(monkeypatch, tmp_path, "--checkpoint=openai-community/gpt2", "--out_dir=")
        assert (tmp_path / there).read_text(encoding="utf-8") == "mine"
        (tmp_path / there).unlink()


def test_mistakes_are_named(tmp_path, state, monkeypatch):
    (tmp_path / "log").mkdir()

    def refused(words, *flags):
        with pytest.raises(UserError, match=words):
            report(monkeypatch, tmp_path, *flags)
        assert not list(tmp_path.glob("**/report.*"))

    refused("no checkpoint under log.*--checkpoint=FILE_OR_FOLDER", "--checkpoint=")
    refused(r"nosuch\.pt: not there", "--checkpoint=nosuch.pt")
    save_checkpoint(tmp_path / "log", STEP, state)
    refused("data_dir=nosuch does not exist", "--data_dir=nosuch")

    def write_data(folder, sha256, n_val):
        files = [write_shard(folder / f"other_{split}_000000.npy", np.arange(n, dtype=np.uint16))
                 for split, n in (("train", 200), ("val", n_val))]
        write_manifest(folder, {"tokenizer": {"name": "other.tiktoken", "sha256": sha256}, "files": files})

    for name, sha256, n_val in (("other", "0" * 64, 200), ("short", state["tokenizer"]["sha256"], T)):
        (tmp_path / name).mkdir()
        write_data(tmp_path / name, sha256, n_val)
    refused("other was tokenized with 'other.tiktoken', not with .*; give --data_dir", "--data_dir=other")
    refused("short/.* have 16 tokens, too few for one window of block_size=16", "--data_dir=short")
    moved = {**state, "config": {**state["config"], "data_dir": "gone"}}
    save_checkpoint(tmp_path / "log", STEP, moved)
    refused("was trained on data_dir=gone, which does not exist; give --data_dir=FOLDER")
    save_checkpoint(tmp_path / "log", STEP, {key: value for key, value in state.items() if key != "config"})
    refused("names no data; give --data_dir=FOLDER")
    state["model"]["transformer.wte.weight"][0, 0] = math.nan
    save_checkpoint(tmp_path / "log", STEP, state)
    refused("nan or infinity in 1 tensors, first in transformer.wte.weight")
