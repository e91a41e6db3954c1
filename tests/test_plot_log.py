"""Figures of logs: what is parsed is what was logged, and every kind of log is drawn."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import plot_log
from configurator import UserError, configure
from plot_log import parse_log, smooth
from shards import write_manifest

ROOT = Path(__file__).resolve().parent.parent


def plot(cwd, *flags):
    command = [sys.executable, str(ROOT / "plot_log.py"), *flags]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def draw(monkeypatch, folder, *flags):
    """plot_log.py in this process, in `folder`, up to the figure, which is returned and not written."""
    figures = []
    monkeypatch.chdir(folder)
    namespace = vars(plot_log)
    for key in ("log_dir", "log", "out", "model_size", "val_baseline"):
        monkeypatch.setitem(namespace, key, namespace[key])  # put back after the test
    configure(namespace, list(flags))
    monkeypatch.setattr(plot_log, "save_figure", lambda figure, path: figures.append(figure))
    plot_log.main()
    return figures[0]


def lines_of(axis):
    """{label in the legend: its line}"""
    lines = {line.get_label(): line for line in axis.get_lines()}
    return {text.get_text(): lines[text.get_text()] for text in axis.get_legend().get_texts()}


def write_lines(folder, *lines, config=None):
    folder.mkdir(exist_ok=True)
    (folder / "log.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    if config:
        record = {"config": {"seed": 1, **config}, "data": "d5705165a538cab6"}
        (folder / "runs.jsonl").write_text(f"not read\n{json.dumps(record)}\n", encoding="utf-8")


def write_log(folder, hella=False):
    folder.mkdir()
    lines = []
    for step in range(100):
        lines.append(f"{step} train {10 * (step + 1) ** -0.3:.6f}")
        if step % 25 == 0:
            lines.append(f"{step} val {10.5 * (step + 1) ** -0.3:.6f}")
            lines += [f"{step} hella {0.25 + step / 1000:.4f}"] if hella else []
    (folder / "log.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_parse_log_takes_the_later_line_of_a_step(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text("0 val 10.9\n0 train 10.9\n1 train 9\n1 train 8.5\n1 hella 0.2501\n", encoding="utf-8")
    assert parse_log(path) == {"val": {0: 10.9}, "train": {0: 10.9, 1: 8.5}, "hella": {1: 0.2501}}
    path.write_text("0 val 10.9\n1 tra", encoding="utf-8")  # killed while it wrote
    assert parse_log(path) == {"val": {0: 10.9}}
    path.write_text("0 val 10.9\n1 train nine\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"line 2: got '1 train nine'"):
        parse_log(path)


@pytest.mark.parametrize("line", ["-1 val 3", "1.5 val 3", "9007199254740993 val 3", "1 val", "1 val 3 4", "",
                                  "1 val 3,5", "x" * 1000])
def test_a_line_that_is_none_of_a_log_is_named(tmp_path, line):
    write_lines(tmp_path, "0 val 10.9", line, "2 val 9")
    with pytest.raises(UserError, match=r"log\.txt, line 2: got '.*wanted `step stream value`") as error:
        parse_log(tmp_path / "log.txt")
    assert len(str(error.value)) < len(str(tmp_path)) + 200


def test_bytes_that_are_no_log(tmp_path):
    path, text = tmp_path / "log.txt", "0 val nan\n1 train -inf\n2 val 3\n"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())  # as Notepad saves it
    assert str(parse_log(path)) == "{'val': {0: nan, 2: 3.0}, 'train': {1: -inf}}"
    for data, words in ((text.encode("utf-16"), "UTF-16"), (b"0 val 3\n1 v\xe9l 3\n", "byte 11 is not UTF-8"),
                        (b"0 val 3\n\x01\x02\n", "line 2")):
        path.write_bytes(data)
        with pytest.raises(UserError, match=rf"log\.txt.* {words}"):
            parse_log(path)


@pytest.mark.parametrize("width", [1, 3, 7])
def test_smooth_is_centred(width):
    values = np.append(np.arange(20.0) ** 2, 1e30)  # the last, a spike, may not reach beyond its windows
    half = width // 2
    expected = [np.mean([values[k] for k in range(21) if abs(k - i) <= half]) for i in range(21)]
    np.testing.assert_allclose(smooth(values, width), expected)
    np.testing.assert_allclose(smooth(np.flip(values), width), np.flip(expected))
    line = np.arange(20.0)  # no lag: away from the ends a line stays what it is
    np.testing.assert_allclose(smooth(line, width)[half:20 - half], line[half:20 - half])
    assert len(smooth(line[:0], width)) == 0


def test_values_that_are_not_finite_are_left_out_and_marked(tmp_path, monkeypatch, capsys):
    """Steps skipped for a nan and a spike, a train loss of inf without a guard, val losses of nan and inf."""
    train = {step: 10 * (step + 1) ** -0.3 for step in range(400)} | {20: math.nan, 30: 8.5, 40: math.inf}
    write_lines(tmp_path / "log", "0 unigram nan", *(f"{step} train {loss}" for step, loss in train.items()),
                "20 skipped 1", "30 skipped 2", "0 val 10", "100 val 5", "200 val nan", "300 val 4",
                "390 val 4.5", "399 val -inf", "0 hella nan", "399 hella 0.26")
    losses, hella = draw(monkeypatch, tmp_path).get_axes()
    raw, *_ = losses.get_lines()
    steps = [step for step in range(400) if step not in (20, 40)]
    assert raw.get_xdata().tolist() == steps and raw.get_ydata().tolist() == [train[step] for step in steps]
    found = lines_of(losses)
    marks = {"log skipped (2)": [20, 30], "log train nan or inf (1)": [40],
             "log val nan or inf (2)": [200, 399]}
    assert list(found) == ["log train (mean of 3 steps)", "log val (last 4.500, best 4.000)", *marks]
    smoothed = found["log train (mean of 3 steps)"]
    assert smoothed.get_xdata().tolist() == steps
    np.testing.assert_allclose(smoothed.get_ydata()[18:21], np.mean(  # steps 18, 19, 21
        [[train[k] for k in window] for window in ((17, 18, 19), (18, 19, 21), (19, 21, 22))], axis=1))
    assert found["log val (last 4.500, best 4.000)"].get_xdata().tolist() == [0, 100, 300, 390]
    for label, marked in marks.items():
        assert list(found[label].get_xdata()) == marked and found[label].get_linestyle() == "None"
    assert list(lines_of(hella)) == ["log (last 0.260)"]
    assert capsys.readouterr().out.splitlines()[:2] == [
        f"log, last values: train {train[399]:.6g}, skipped 2, val 4.5, hella 0.26",
        "log, steps marked: skipped 2, train nan or inf 1, val nan or inf 2"]


def test_a_run_of_nothing_but_nan(tmp_path, monkeypatch, capsys):
    write_lines(tmp_path / "log", "0 val nan", "0 train nan", "0 hella inf")
    losses, = draw(monkeypatch, tmp_path).get_axes()  # no panel for a HellaSwag without values
    assert list(lines_of(losses)) == ["log train nan or inf (1)", "log val nan or inf (1)"]
    assert "log, last values: none yet\n" in capsys.readouterr().out


def test_the_val_loss_of_gpt2_is_drawn_beside_fineweb_edu_alone(tmp_path, monkeypatch, capsys):
    """By the dataset in the manifest where there is one, otherwise by the folder's name; HellaSwag always."""
    lines = ("0 val 3.5", "0 hella 0.26")
    cases = {"python": {"data_dir": "python_corpus"}, "edu": {"data_dir": "/data/edu_fineweb10B/"},
             "plain": {"data_dir": "fineweb10B"}, "parent": {"data_dir": "edu_fineweb/books"},
             "made": {"data_dir": "data"}, "misnamed": {"data_dir": "edu_fineweb_python"}, "unknown": None}
    for folder, dataset in (("data", "fineweb-edu"), ("edu_fineweb_python", "python")):
        (tmp_path / folder).mkdir()
        write_manifest(tmp_path / folder, {"tokenizer": {"name": "gpt2", "sha256": 64 * "0"}, "files": [],
                                           "settings": {"dataset": dataset}})
    for name, config in cases.items():
        write_lines(tmp_path / name, *lines, config=config)
    line = "OpenAI GPT-2 124M on FineWeb-Edu val (3.29)"

    def drawn(*flags):
        figure = draw(monkeypatch, tmp_path, "--model_size=124M", "--val_baseline=no", *flags)
        losses, hella = figure.get_axes()
        assert list(lines_of(hella))[-2:] == ["OpenAI GPT-2 124M on HellaSwag (0.294)",
                                              "OpenAI GPT-3 124M on HellaSwag (0.337)"]
        found, out = lines_of(losses), capsys.readouterr().out
        assert (line in found) != ("--val_baseline draws it anyway" in out)
        assert line not in found or found[line].get_ydata()[0] == plot_log.VAL_LOSS_GPT2["124M"]
        return line in found, out

    assert {name for name in cases if drawn(f"--log_dir={name}")[0]} == {"edu", "made"}
    assert drawn("--log_dir=edu,made")[0] and not drawn("--log_dir=edu,python")[0]
    assert "python/log.txt is of a run on python_corpus;" in drawn("--log_dir=edu,python")[1]
    assert "no runs.jsonl beside unknown/log.txt" in drawn("--log_dir=unknown")[1]
    assert drawn("--log_dir=python", "--val_baseline")[0]
    with pytest.raises(UserError, match=r"val_baseline: .*type --model_size=124M"):
        draw(monkeypatch, tmp_path, "--log_dir=edu", "--model_size=350M", "--val_baseline")
    for record in ("[]", '{"config": {}}', "garbage"):
        (tmp_path / "edu" / "runs.jsonl").write_text(f"{{}}\n{record}\n", encoding="utf-8")
        with pytest.raises(UserError, match=r"edu/runs\.jsonl, line 2"):
            draw(monkeypatch, tmp_path, "--log_dir=edu", "--model_size=124M", "--val_baseline=no")


def test_log_names_files(tmp_path, monkeypatch, capsys):
    write_lines(tmp_path / "a", "0 val 3")
    write_lines(tmp_path, "0 val 4")
    (tmp_path / "log.txt").rename(tmp_path / "old.log")
    losses, = draw(monkeypatch, tmp_path, "--log=a/log.txt,old.log", "--out=plots/p.png").get_axes()
    assert list(lines_of(losses)) == ["a val (last 3.000, best 3.000)",
                                      "old.log val (last 4.000, best 4.000)"]
    assert capsys.readouterr().out.endswith("figure: plots/p.png\n")
    with pytest.raises(UserError, match="leave one of them out"):
        draw(monkeypatch, tmp_path, "--log=a/log.txt", "--log_dir=a")
    monkeypatch.setenv("HOME", str(tmp_path))
    draw(monkeypatch, tmp_path, "--log=~/a/log.txt,~/old.log", "--log_dir=log")
    assert capsys.readouterr().out.count("last values: val") == 2


@pytest.mark.parametrize("text", ["", "0 val 3", "0 unigram 5.4\n", "garbage without an end"])
def test_a_log_with_nothing_to_draw_is_refused(tmp_path, monkeypatch, text):
    write_lines(tmp_path / "good", "0 val 3")
    (tmp_path / "log.txt").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"^log\.txt: .*nothing to draw"):
        draw(monkeypatch, tmp_path, "--log_dir=good,log.txt")


def test_figures_of_two_processes_do_not_meet(tmp_path, monkeypatch):
    """The temporary name has the process's id; a figure that cannot be written leaves nothing behind."""
    write_lines(tmp_path / "log", "0 val 3")
    replaced = []
    monkeypatch.setattr(os, "replace", lambda a, b: replaced.append((Path(a).name, Path(a).read_bytes()[:4])))
    save_figure = plot_log.save_figure
    figure = draw(monkeypatch, tmp_path)
    save_figure(figure, tmp_path / "figure.png")
    assert replaced == [(f"figure.png.{os.getpid()}.tmp", b"\x89PNG")]
    before = sorted(tmp_path.iterdir())
    for name in ("figure.txt", "figure"):
        with pytest.raises(UserError, match=r"type --out=FIGURE\.png"):
            save_figure(figure, tmp_path / name)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(("hella", "model_size"), [(False, ""), (True, "124M"), (True, ""), (False, "1558M")])
def test_a_figure_is_drawn(tmp_path, hella, model_size):
    write_log(tmp_path / "log", hella)
    done = plot(tmp_path, f"--model_size={model_size}")
    assert done.returncode == 0, done.stderr
    last = f"train 2.51189, val {10.5 * 76**-0.3:.6g}{', hella 0.325' if hella else ''}"
    head, *note, path = done.stdout.splitlines()
    assert (head, path) == (f"log, last values: {last}", "figure: log/log_plot.png")
    assert ["no runs.jsonl beside log/log.txt" in line for line in note] == [True] * (model_size == "124M")
    assert (tmp_path / "log" / "log_plot.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (tmp_path / "log").iterdir()) == ["log.txt", "log_plot.png"]


def test_norms_of_layers_have_a_line_of_their_own(tmp_path):
    (tmp_path / "log").mkdir()
    lines = [f"{step} {stream} {step + i}" for step in (0, 10)
             for i, stream in enumerate(("train", "norm", "norm_wte", "norm_h0", "norm_h11"))]
    (tmp_path / "log" / "log.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    done = plot(tmp_path)
    assert done.stdout == ("log, last values: train 10, norm 11\n"
                           "log, last gradient norms: wte 12, h0 13, h11 14\nfigure: log/log_plot.png\n")


def test_several_runs_in_one_figure(tmp_path):
    write_log(tmp_path / "a", hella=True)
    write_log(tmp_path / "b")
    done = plot(tmp_path, "--log_dir=a,b/log.txt", "--out=plots/both.svg")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "plots" / "both.svg").read_text(encoding="utf-8").startswith("<?xml")
    assert "a, last values: train" in done.stdout and "b, last values: train" in done.stdout


def test_mistakes_exit_2(tmp_path):
    write_log(tmp_path / "log")
    (tmp_path / "empty.log").touch()
    (tmp_path / "latin1.log").write_bytes(b"0 val 3\n1 v\xe9l 3\n")
    for flag, words in [("--log_dir=nosuch", "nosuch is no log"), ("--model_size=1B", "124M, 350M"),
                        ("--log=nosuch.log", "nosuch.log is no log"), ("--log_dir=", "an empty name"),
                        ("--log=empty.log", "empty.log: no line"), ("--log=latin1.log", "log: byte 11"),
                        ("--out=figure.txt", "--out=FIGURE.png"), ("--out=/proc/x/y.png", "/proc/x")]:
        done = plot(tmp_path, flag)
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
