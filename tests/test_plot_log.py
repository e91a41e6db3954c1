"""Figures of logs: what is parsed is what was logged, and every kind of log is drawn; groups of runs; right
curves are inside the band of a reference and wrong ones are not."""

import csv
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from matplotlib.figure import Figure

import plot_log
from configurator import UserError, configure
from files import read_json
from plot_log import (
    CURVE,
    FLOOR,
    REFERENCE,
    band,
    incomplete_beta,
    parse_log,
    read_runs,
    seeds_needed,
    smooth,
    welch,
)

ROOT = Path(__file__).resolve().parent.parent
STEPS = range(0, 1201, 200)
DEMO = ROOT / "results" / "demo_cpu"  # a real run
GPT2 = ROOT / "reference" / "gpt2_124m_fineweb.json"


def plot(cwd, *flags):
    command = [sys.executable, str(ROOT / "plot_log.py"), *flags]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


class Drawn(NamedTuple):
    code: int  # exit code
    out: str  # what was printed
    figure: Figure | None = None


@pytest.fixture
def draw(tmp_path, monkeypatch, capsys):
    """draw(*flags, cwd=tmp_path): plot_log.py in this process, up to the figure, which is not written."""
    def run(*flags, cwd=tmp_path):
        figures = []
        monkeypatch.chdir(cwd)
        namespace = vars(plot_log)
        for key in ("log_dir", "log", "out", "model_size", "a", "b", "ref", "make"):
            monkeypatch.setitem(namespace, key, defaults[key])
        configure(namespace, list(flags))
        monkeypatch.setattr(plot_log, "save_figure", lambda figure, path: figures.append(figure))
        code = plot_log.main()
        plot_log.pyplot().close("all")
        return Drawn(code, capsys.readouterr().out, *figures)
    defaults = dict(vars(plot_log))
    return run


def lines_of(axis):
    """{label in the legend: its line}"""
    lines = {line.get_label(): line for line in axis.get_lines()}
    return {text.get_text(): lines[text.get_text()] for text in axis.get_legend().get_texts()}


def write_run(folder, *lines, seed=1, data="d5705165a538cab6", **config):
    """A log of these lines; beside it a runs.jsonl of two starts, if there are settings."""
    folder.mkdir(exist_ok=True)
    (folder / "log.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    starts = [{"config": {"seed": 99, "n_layer": 99, "data_dir": "of an earlier start"}, "data": ""},
              {"config": {"seed": seed, **config}, "data": data, "git": "abc", "device": "EPYC"}]
    if config:
        (folder / "runs.jsonl").write_text("".join(f"{json.dumps(start)}\n" for start in starts),
                                           encoding="utf-8")
    return folder


def write_val(folder, seed, loss=4.0, **config):
    """A run of 100 steps that ends near this val loss."""
    write_run(folder, f"100 val {loss + seed / 100}", f"100 val_bpb {loss / 3 + seed / 100}", seed=seed,
              **{"max_steps": 100, **config})


def write_curve(folder, seed, shift=0.0, steps=STEPS, **config):
    """A run whose val follows a power law; seeds move it by 0.2%, `shift` nats by what is put in."""
    rng, lines = np.random.default_rng(seed), []
    for step in steps:
        val = 3 + 7.6 * (1 + step / 30) ** -0.7 + 0.01 * rng.standard_normal() + (shift if step else 0)
        lines += [f"{step} val {val:.8g}", f"{step} val_bpb {val / 1.51:.8g}", f"{step} train {val:.8g}"]
    config = {"n_layer": 6, "max_lr": 2e-3, "max_steps": 1200, "init_from": f"xavier_s{seed}.pt"} | config
    return write_run(folder, *lines, seed=seed, **config)


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
    with pytest.raises(UserError, match=r"line 2: '1 train nine'"):
        parse_log(path)


@pytest.mark.parametrize("line", ["-1 val 3", "1.5 val 3", "9007199254740993 val 3", "1 val", "1 val 3 4", "",
                                  "1 val 3,5", "x" * 1000])
def test_a_line_that_is_none_of_a_log_is_named(tmp_path, line):
    write_run(tmp_path, "0 val 10.9", line, "2 val 9")
    with pytest.raises(UserError, match=r"log\.txt, line 2: '.*' is not `step stream value`") as error:
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


def test_values_that_are_not_finite_are_left_out_and_marked(tmp_path, draw):
    """Steps skipped for a nan and a spike, a train loss of inf without a guard, val losses of nan and inf."""
    train = {step: 10 * (step + 1) ** -0.3 for step in range(400)} | {20: math.nan, 30: 8.5, 40: math.inf}
    write_run(tmp_path / "log", "0 unigram nan", *(f"{step} train {loss}" for step, loss in train.items()),
                "20 skipped 1", "30 skipped 2", "0 val 10", "100 val 5", "200 val nan", "300 val 4",
                "390 val 4.5", "399 val -inf", "0 hella nan", "399 hella 0.26")
    _, out, figure = draw()
    losses, hella = figure.get_axes()
    raw, *_ = losses.get_lines()
    steps = [step for step in range(400) if step not in (20, 40)]
    assert raw.get_xdata().tolist() == steps and raw.get_ydata().tolist() == [train[step] for step in steps]
    found = lines_of(losses)
    marks = {"log: skipped (2)": [20, 30], "log: train nan or inf (1)": [40],
             "log: val nan or inf (2)": [200, 399]}
    assert list(found) == ["log: train (mean of 3 steps)", "log: val (last 4.500, best 4.000)", *marks]
    smoothed = found["log: train (mean of 3 steps)"]
    assert smoothed.get_xdata().tolist() == steps
    np.testing.assert_allclose(smoothed.get_ydata()[18:21], np.mean(  # steps 18, 19, 21
        [[train[k] for k in window] for window in ((17, 18, 19), (18, 19, 21), (19, 21, 22))], axis=1))
    assert found["log: val (last 4.500, best 4.000)"].get_xdata().tolist() == [0, 100, 300, 390]
    for label, marked in marks.items():
        assert list(found[label].get_xdata()) == marked and found[label].get_linestyle() == "None"
    assert list(lines_of(hella)) == ["log (last 0.260)"]
    assert out.startswith(f"log, last values: train {train[399]:.6g}, val 4.5, hella 0.26\n")


def test_a_run_of_nothing_but_nan(tmp_path, draw):
    write_run(tmp_path / "log", "0 val nan", "0 train nan", "0 hella inf")
    _, out, figure = draw()
    losses, = figure.get_axes()  # no panel for a HellaSwag without values
    assert list(lines_of(losses)) == ["log: train nan or inf (1)", "log: val nan or inf (1)"]
    assert "log, last values: none yet\n" in out


def test_the_val_loss_of_gpt2_is_drawn_beside_fineweb_edu_alone(tmp_path, draw):
    cases = {"python": {"data_dir": "python_corpus"}, "edu": {"data_dir": "/data/edu_fineweb10B/"},
             "plain": {"data_dir": "fineweb10B"}, "parent": {"data_dir": "edu_fineweb/books"}, "unknown": {}}
    for name, config in cases.items():
        write_run(tmp_path / name, "0 val 3.5", "0 hella 0.26", **config)

    def drawn(names):
        losses, hella = draw("--model_size=124M", f"--log_dir={names}").figure.get_axes()
        assert list(lines_of(hella))[-2:] == ["OpenAI GPT-2 124M (0.294)", "OpenAI GPT-3 124M (0.337)"]
        line = lines_of(losses).get("OpenAI GPT-2 124M on FineWeb-Edu val (3.29)")
        assert line is None or line.get_ydata()[0] == plot_log.VAL_LOSS_GPT2["124M"]
        return line is not None

    assert {name for name in cases if drawn(name)} == {"edu"}
    assert drawn("edu,edu") and not drawn("edu,python")


@pytest.mark.parametrize("record", ["[]", '{"config": {}}', "garbage"])
def test_a_line_that_is_none_of_runs_jsonl_is_named(tmp_path, draw, record):
    write_run(tmp_path / "log", "0 val 3", n_layer=6)
    with open(tmp_path / "log" / "runs.jsonl", "a", encoding="utf-8") as file:
        file.write(record + "\n")
    with pytest.raises(UserError, match=r"log/runs\.jsonl, line 3"):
        draw()


def test_log_names_files(tmp_path, monkeypatch, draw):
    write_run(tmp_path / "a", "0 val 3")
    write_run(tmp_path, "0 val 4")
    (tmp_path / "log.txt").rename(tmp_path / "old.log")
    _, out, figure = draw("--log=a/log.txt,old.log", "--out=plots/p.png")
    losses, = figure.get_axes()
    assert list(lines_of(losses)) == ["a: val (last 3.000, best 3.000)",
                                      "old.log: val (last 4.000, best 4.000)"]
    assert out.endswith("figure: plots/p.png\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert draw("--log=~/a/log.txt,~/old.log", "--log_dir=log").out.count("last values: val") == 2


@pytest.mark.parametrize("text", ["", "0 val 3", "0 unigram 5.4\n", "garbage without an end"])
def test_a_log_with_nothing_to_draw_is_refused(tmp_path, draw, text):
    write_run(tmp_path / "good", "0 val 3")
    (tmp_path / "log.txt").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"^log\.txt has .*nothing to draw"):
        draw("--log_dir=good,log.txt")


@pytest.mark.parametrize(("hella", "model_size"), [(False, ""), (True, "124M"), (False, "1558M")])
def test_a_figure_is_drawn(tmp_path, hella, model_size):
    write_log(tmp_path / "log", hella)
    done = plot(tmp_path, f"--model_size={model_size}")
    assert done.returncode == 0, done.stderr
    last = f"train 2.51189, val {10.5 * 76**-0.3:.6g}{', hella 0.325' if hella else ''}"
    assert done.stdout.splitlines() == [f"log, last values: {last}", "figure: log/log_plot.png"]
    assert (tmp_path / "log" / "log_plot.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (tmp_path / "log").iterdir()) == ["log.txt", "log_plot.png"]


def test_no_legend_is_a_path_and_runs_of_one_name_differ(tmp_path, draw):
    for folder in (tmp_path, tmp_path / "x", tmp_path / "y"):
        folder.mkdir(exist_ok=True)
        write_run(folder / "log", "0 val 3", "0 unigram 5")
    figure = draw(f"--log_dir=.,../../y/log,{tmp_path}/log", cwd=tmp_path / "x" / "log").figure
    val = "val (last 3.000, best 3.000)"
    assert list(lines_of(figure.get_axes()[0])) == [
        f"log: {val}", f"log (2): {val}", f"log (3): {val}", "unigram model on val (5.00)"]


def test_several_runs_in_one_figure(tmp_path, draw):
    write_log(tmp_path / "a", hella=True)
    write_log(tmp_path / "b")
    _, out, figure = draw("--log_dir=a,b/log.txt", "--out=plots/both.svg")
    losses, hella = figure.get_axes()
    assert [label.partition(" (")[0] for label in lines_of(losses)] == [
        "a: train", "a: val", "b: train", "b: val"]
    assert list(lines_of(hella)) == ["a (last 0.325)"]
    assert re.findall("^(.), last values: train", out, re.M) == ["a", "b"]


@pytest.mark.parametrize(("flag", "words"), [
    ("--log_dir=nosuch", "nosuch is neither"), ("--log=nosuch.log", "nosuch.log is neither"),
    ("--log_dir=", "an empty name"), ("--log=empty.log", "empty.log has no train"),
    ("--log=latin1.log", "log: byte 11"), ("--model_size=1B", "124M, 350M"),
    ("--ref=r.json --log_dir=log,log", "draw one"), ("--ref=r.json --model_size=124M", "draw one")])
def test_mistakes_are_named(tmp_path, draw, flag, words):
    write_log(tmp_path / "log")
    (tmp_path / "empty.log").touch()
    (tmp_path / "latin1.log").write_bytes(b"0 val 3\n1 v\xe9l 3\n")
    with pytest.raises(UserError, match=words):
        draw(*flag.split())


@pytest.mark.parametrize(("flag", "words"), [("--out=a.txt", "FIGURE.png"), ("--out=/proc/x/y.png", "/proc")])
def test_a_figure_that_cannot_be_written_exits_2(tmp_path, flag, words):
    write_log(tmp_path / "log")
    done = plot(tmp_path, flag)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1


def test_a_plot_needs_no_torch():
    code = "import sys, plot_log; assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# ---- two groups of runs --------------------------------------------------------

@pytest.mark.parametrize(("t", "df", "p"), [
    (12.7062047, 1, 0.05), (4.30265273, 2, 0.05), (2.77644511, 4, 0.05), (2.22813885, 10, 0.05),
    (63.6567412, 1, 0.01), (4.60409487, 4, 0.01), (1.97993, 120, 0.05), (0.0, 3.3, 1.0),
    (1.0, 1, 0.5), (2**0.5, 2, 1 - 2**-0.5)])  # tables of Student's t; the last two in closed form
def test_p_is_that_of_students_t(t, df, p):
    assert incomplete_beta(df / 2, 0.5, df / (df + t**2)) == pytest.approx(p, rel=1e-5)


def test_welch_on_students_sleep_data():
    """As R's documentation prints it: t = -1.8608, df = 17.776, p-value = 0.07939."""
    a = np.array([0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0])
    b = np.array([1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4])
    difference, se, df, p = welch(a, b)
    assert (difference, difference / se, df, p) == pytest.approx((1.58, 1.8608, 17.776, 0.07939), rel=1e-4)
    assert welch(b, a) == pytest.approx((-difference, se, df, p))


def test_welch_is_wrong_in_5_percent_of_studies_without_a_difference():
    rng = np.random.default_rng(0)
    found = [welch(rng.normal(3, 0.01, 4), rng.normal(3, 0.04, 6))[3] < 0.05 for _ in range(4000)]
    assert 0.04 < np.mean(found) < 0.06


def test_seeds_needed_find_an_effect_in_80_percent_of_studies():
    """Also where a few seeds are enough, and never 1, which has no standard deviation."""
    rng, spread = np.random.default_rng(0), np.array([-1.0, 1.0]) / 2**0.5
    for effect, expected in ((1.5, 9), (2, 6), (3, 4), (5, 3), (50, 3)):
        n = seeds_needed(effect, spread, spread)
        found = [welch(rng.normal(0, 1, n), rng.normal(effect, 1, n))[3] < 0.05 for _ in range(1000)]
        assert n == expected and np.mean(found) > 0.77


@pytest.mark.parametrize(("d", "n"), [(0.5, 64), (0.8, 26), (1.0, 17), (1.2, 12)])
def test_seeds_needed_are_those_of_cohens_table(d, n):
    """Cohen (1988), table 2.4.1: runs per group for power 0.80 at 0.05, two-sided, by the effect in sds."""
    spread = np.array([-1.0, 1.0]) / 2**0.5  # with an sd of 1
    assert seeds_needed(d, spread, 7 + spread) == seeds_needed(-d, spread, spread) == n
    assert seeds_needed(3 * d, 3 * spread, 3 * spread) == n and seeds_needed(0.0, spread, spread) == math.inf


def write_groups(folder):
    """log_1 to log_6: seeds 1 to 6, the later three with another optimizer and a loss lower by 0.05."""
    for n in range(1, 7):
        loss = 4 + n % 3 / 50 - 0.05 * (n > 3)
        write_run(folder / f"log_{n}", f"0 val {11 + n / 100}", f"100 val {loss}",
                  seed=n, optimizer="muon" if n > 3 else "adamw", max_steps=100, tokenizer="gpt2",
                  val_tokens=64)


def test_groups_of_runs(tmp_path, draw):
    write_groups(tmp_path)
    _, out, figure = draw("--a=log_1, log_2,log_3", "--b=log_4,log_5 ,log_6")
    a = np.array([4.02, 4.04, 4.0])
    _, se, df, p = welch(a, a - 0.05)
    lines = out.splitlines()
    assert lines[0] == "a: mean 4.0200, standard deviation 0.0200 (log_1 4.0200, log_2 4.0400, log_3 4.0000)"
    assert lines[2] == "a and b differ in optimizer=adamw and muon"
    assert lines[3] == (
        f"final val loss, step 100, b minus a: -0.0500 nats per token, standard error {se:.4f}, p = {p:.2g} "
        f"(Welch's t test, {df:.1f} degrees of freedom): a difference at the 5% level")
    assert f"detecting half of it takes roughly {seeds_needed(0.025, a, a)} seeds per group" in lines[4]
    assert df == pytest.approx(4) and lines[5] == "figure: log_1/groups.png"
    curves, differences = figure.get_axes()
    assert list(lines_of(curves)) == ["a: log_1, log_2, log_3", "b: log_4, log_5, log_6"]
    for axis, at_end in ((curves, [(4.02, 4.0, 4.04), (3.97, 3.95, 3.99)]),
                         (differences, [(0, -0.02, 0.02), (-0.05, -0.07, -0.03)])):
        for line, shade, (mean, low, high) in zip(axis.get_lines(), axis.collections, at_end):
            shaded = [y for x, y in shade.get_paths()[0].vertices if x == 100]
            assert (line.get_ydata()[-1], min(shaded), max(shaded)) == pytest.approx((mean, low, high))


def test_groups_with_different_tokenizers_are_compared_in_bits_per_byte(tmp_path, draw):
    for seed in (1, 2):
        write_val(tmp_path / f"a{seed}", seed, 4, tokenizer="gpt2")
        write_val(tmp_path / f"b{seed}", seed, 3, data="ffff", tokenizer="mine.tiktoken")
    _, out, figure = draw("--a=a1,a2", "--b=b1,b2")
    assert "b minus a: -0.3333 bits per byte" in out and "a and b differ in tokenizer=gpt2 and mine" in out
    assert "data: d5705165a538cab6; that of b: ffff. Losses on different data are not directly" in out
    assert "a and b share seeds; Welch's t test ignores this pairing" in out
    assert [axis.get_ylabel() for axis in figure.get_axes()] == ["loss (bits per byte, log scale)",
                                                                 "difference (bits per byte)"]


def test_groups_with_other_seeds_and_the_same_data_are_not_warned_about(tmp_path, draw):
    for seed in range(1, 5):  # the same curve, from weights of each seed
        write_val(tmp_path / f"log_{seed}", seed, 4 - seed // 3 / 100, init_from=f"xavier_{seed}.pt")
    out = draw("--a=log_1,log_2", "--b=log_3,log_4").out
    assert "no difference shown at the 5% level" in out and "directly" not in out and "share" not in out


@pytest.mark.parametrize(("a", "b", "message"), [
    ("log_1", "log_4,log_5", "log_1: seeds 1, and .* at least 2 different ones; .* --seed=N"),
    ("log_1,log_2", "log_4", "log_4: seeds 4, and"),
    ("log_1,log_1", "log_4,log_5", "seeds 1, 1, and .* 2 different ones"),
    ("log_1,log_4", "log_5,log_6", "log_1 and log_4 differ in more than the seed: optimizer=adamw and muon"),
    ("log_1,log_2", "log_2,log_3", "log_2/log.txt is in both groups"),
    ("log_1,short", "log_4,log_5", "short .* step 0 of 100: it is not finished, or target_loss stopped it"),
    ("log_1,log_2", "long_1,long_2", "max_steps=100 and 200: .*same number of steps"),
    ("log_1,log_2", "few_1,few_2", "val_tokens=64 and 32"),
    ("log_1,log_2", "bpe_1,bpe_2", "no step at which all of log_1, log_2, bpe_1, bpe_2 have val_bpb"),
    ("log_1,log_2", "nan,log_5", "nan has .* nan or inf; name finished runs"),
    ("log_1,no_val", "log_4,log_5", "no_val has .* no val loss"),
    ("log_1,data", "log_4,log_5", "differ in more than the seed: data=d5705165a538cab6 and data"),
    ("log_1,unknown", "log_4,log_5", "unknown has no runs.jsonl with its seed"),
    ("log_1,log_2", "", "--a and --b are compared with each other; name the runs of both"),
    ("", "log_1,log_2", "--a and --b are compared")])
def test_no_claim_from_one_seed_or_unlike_runs(tmp_path, draw, capsys, a, b, message):
    write_groups(tmp_path)
    for seed, name, *lines in ((8, "short", "0 val 11"), (9, "nan", "0 val 11", "100 val nan"),
                               (8, "no_val", "0 train 11"), (8, "data", "100 val 4")):
        write_run(tmp_path / name, *lines, seed=seed, max_steps=100, data=name)
    write_run(tmp_path / "unknown", "0 val 11", "100 val 4")
    for seed in (1, 2):
        write_run(tmp_path / f"long_{seed}", f"200 val 3.{seed}", seed=seed, max_steps=200)
        write_run(tmp_path / f"bpe_{seed}", f"100 val 3.{seed}", seed=seed, max_steps=100, tokenizer="mine")
        write_val(tmp_path / f"few_{seed}", seed, val_tokens=32)
    with pytest.raises(UserError, match=message):
        draw(f"--a={a}", f"--b={b}")
    assert "p =" not in capsys.readouterr().out and not list(tmp_path.glob("*/*.png"))


def test_copies_of_a_run_show_nothing(tmp_path, draw):
    for n in range(4):
        write_run(tmp_path / f"log_{n}", "100 val 3.3", seed=n, max_steps=100)
    write_val(tmp_path / "other", 5)
    for a in ("log_0,log_1,log_2", "log_3,other"):  # three equal losses have a standard deviation above 0
        with pytest.raises(UserError, match=r"equal losses in [ab]: copies of one run"):
            draw(f"--a={a}", f"--b={'log_3,other' if a[-1] == '2' else 'log_0,log_1'}")


# ---- a run and a reference -----------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with three runs and the reference made of them, by the command itself."""
    folder = tmp_path_factory.mktemp("made")
    for seed, name in enumerate("abc"):
        write_curve(folder / name, seed)
    done = plot(folder, "--make=a,b,c", "--ref=reference/demo.json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("reference/demo.json: 7 steps, 0 to 1200, 3 runs, band mean +- max(3 sd")
    return folder


@pytest.fixture
def compare(made, draw):
    """compare(run): what the script prints and draws of a run beside that reference."""
    return lambda run: draw(f"--log_dir={run}", "--ref=reference/demo.json", cwd=made)


def test_bands_are_the_formula():
    """Three steps of five seeds, of which one has less spread than the median, one a floor."""
    values = np.random.default_rng(0).normal(3, [0.1, 0.01, 0.02], (5, 3))
    sd, means = values.std(axis=0, ddof=1), values.mean(axis=0)
    assert sd[0] > sd[2] > sd[1]
    half = np.array([3 * sd[0] * np.sqrt(6 / 5), 3 * sd[2] * np.sqrt(6 / 5), 9])
    found = band([0, 7, 9], values, np.array([0, 0, 9]))
    np.testing.assert_allclose(found, np.transpose([(0, 7, 9), means, means - half, means + half]))


def test_how_often_a_right_run_is_outside():
    """Seven steps, three seeds: 12% of right runs have a step outside (46% with each step's sd alone), and
    2% with the floor where seeds differ by 0.3%."""
    rng = np.random.default_rng(0)

    def outside(spread, floor):
        runs = 1 + spread * rng.standard_normal((2000, 4, 7))
        count = 0
        for *seeds, new in runs:
            _, _, low, high = np.transpose(band([*range(7)], np.array(seeds), np.full(7, floor)))
            count += not ((low <= new) & (new <= high)).all()
        return count / len(runs)

    assert 0.09 < outside(0.003, 0.0) < 0.16
    assert outside(0.003, FLOOR) < 0.03


def test_a_reference_is_the_mean_the_band_and_what_they_come_from(made):
    reference = read_json(made / "reference" / "demo.json", REFERENCE)
    runs = [run.streams for run in read_runs(", ".join(str(made / name) for name in "abc"))]
    steps, mean, low, high = np.transpose(reference["points"])
    np.testing.assert_allclose(steps, STEPS)
    np.testing.assert_allclose(mean, [np.mean([run["val_bpb"][step] for run in runs]) for step in STEPS])
    assert (high - mean >= 0.999 * FLOOR * mean).all()
    np.testing.assert_allclose(high - mean, mean - low)
    assert (reference["data"], reference["stream"], reference["seeds"]) == ("d5705165a538cab6", "val_bpb", 3)
    assert all(f"seed {seed}, git abc, EPYC" in reference["source"] for seed in range(3))
    # weights to start from differ between the seeds: a run that starts from others is comparable
    assert reference["settings"] == {"n_layer": 6, "max_lr": 2e-3, "max_steps": 1200}


def test_a_right_run_is_inside(compare, tmp_path):
    for seed in range(10, 14):
        code, out, figure = compare(write_curve(tmp_path / f"right{seed}", seed))
        assert code == 0, out
    lines = out.splitlines()
    assert [line.endswith("  inside") for line in lines].count(True) == 7
    assert lines[-2] == "inside: 7 of 7 values up to step 1200 of 1200 are in the band"
    value = parse_log(tmp_path / "right13" / "log.txt")["val_bpb"][200]
    assert re.search(rf"^200 +{value:.4f} ", out, re.M)
    for axis in figure.get_axes():
        assert [text.get_text() for text in axis.get_legend().get_texts()] == ["reference", "right13"]
        assert axis.get_lines()[1].get_xdata().tolist() == list(STEPS)


@pytest.mark.parametrize("shift", [-0.3, 0.3, float("nan")])
def test_a_wrong_run_is_outside(made, tmp_path, shift):
    """Worse, too good to be true, or not a number; step 0, before any training, is right."""
    write_curve(tmp_path / "wrong", 10, shift)
    done = plot(tmp_path, "--log_dir=wrong", f"--ref={made}/reference/demo.json")
    assert done.returncode == 1 and done.stdout.count("OUTSIDE") == 6, done
    assert done.stdout.endswith("\noutside: 1 of 7 values up to step 1200 of 1200 are in the band; the "
                                "first that is not is at step 200\nfigure: wrong/comparison.png\n")
    assert (tmp_path / "wrong" / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_one_value_is_enough(compare, tmp_path):
    log = write_curve(tmp_path / "bpb", 10) / "log.txt"
    value = parse_log(log)["val_bpb"][800]
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"800 val_bpb {1.05 * value}\n")
    code, out, _ = compare(log)
    assert code == 1 and out.count("OUTSIDE") == 1 and "the first that is not is at step 800\n" in out


def test_a_run_still_in_training(compare, tmp_path):
    code, out, _ = compare(write_curve(tmp_path / "short", 10, steps=range(0, 500, 100)))
    assert code == 0
    assert "\nso far inside: 3 of 3 values up to step 400 of 1200 are in the band\n" in out
    code, out, _ = compare(write_curve(tmp_path / "bad", 10, 0.3, steps=range(0, 500, 100)))
    assert code == 1 and "\nso far outside: 1 of 3 values" in out
    with pytest.raises(UserError, match=r"no val_bpb at any step of .*: 0, 200, 400, "):
        compare(write_curve(tmp_path / "other", 10, steps=range(50, 500, 100)))


@pytest.mark.parametrize("lines", ["410 train nan\n", "410 train 9.0\n410 skipped 3\n"])
def test_a_run_that_gave_up_is_not_inside(compare, draw, tmp_path, lines):
    log = write_curve(tmp_path / "run", 10, steps=range(0, 500, 100)) / "log.txt"
    good = log.read_text(encoding="utf-8")
    log.write_text(good + lines, encoding="utf-8")
    code, out, _ = compare(log)
    assert code == 1 and "\nrun gave up at step 410: " in out and "so far inside: 3 of 3" in out
    log.write_text(f"{good}{lines}411 train 4\n", encoding="utf-8")  # the guard skipped one step
    assert compare(log)[0] == 0
    (log.parent / "runs.jsonl").unlink()
    log.write_text(good + lines, encoding="utf-8")
    code, out, _ = draw(f"--ref={GPT2}", f"--log_dir={log}")
    assert code == 1 and "no verdict" in out


def test_other_data_is_reported_and_other_settings_are_refused(compare, made, tmp_path):
    assert "data:" not in compare(made / "a")[1]
    code, out, _ = compare(write_curve(tmp_path / "data", 10, data="ffff"))
    assert code == 0 and "data: ffff; the reference's: d5705165a538cab6. Losses" in out
    for key, value in (("n_layer", 4), ("max_lr", 3e-3), ("max_steps", 600)):
        with pytest.raises(UserError, match=f"{key}=.* and {value}; compare"):
            compare(write_curve(tmp_path / key, 10, **{key: value}))
    # what does not move the curve, or is not known to the older of the two, is no reason to refuse
    same = write_curve(tmp_path / "same", 10, device="cuda", optimizer="adamw")
    assert compare(same)[0] == 0
    good = (same / "runs.jsonl").read_text(encoding="utf-8").splitlines()[0]
    for line in ('{"config": {"n_l', "[]", '{"data": "ffff"}'):
        (same / "runs.jsonl").write_text(f"{good}\n{line}\n", encoding="utf-8")
        with pytest.raises(UserError, match=r"runs\.jsonl, line 2: "):
            compare(same)
    (same / "runs.jsonl").unlink()
    code, out, _ = compare(same / "log.txt")
    assert code == 0 and "data: unknown (no runs.jsonl); the" in out


def test_what_no_reference_is_made_of(draw, made, tmp_path):
    for flags, words in [("--make=a,b --ref=r.json", "a,b: seeds 0, 1, and .* at least 3 different ones"),
                         ("--make=a,b,c --ref=reference/demo.json", "json already exists"),
                         ("--make=a,b,c --ref=r.log", "r.log is not a .json"),
                         ("--make=a,b,c", r"--make has no file to write.*--ref=NAME\.json")]:
        with pytest.raises(UserError, match=words):
            draw(*flags.split(), cwd=made)
    with pytest.raises(FileNotFoundError, match=r"nosuch\.json"):  # a message in a process of its own
        draw("--log_dir=a", "--ref=nosuch.json", cwd=made)
    for seed, name in enumerate("abc"):  # as build-nanogpt's logs
        write_run(tmp_path / name, "1200 val 3", seed=seed, max_steps=1200)
    with pytest.raises(UserError, match="no step at which all of a, b, c have val_bpb"):
        draw("--make=a,b,c", "--ref=r.json")
    assert not [*made.glob("r.*"), *tmp_path.glob("r.*")]


@pytest.mark.parametrize(("key", "value"), [
    ("points", [[0, "x", 1, 2]]), ("points", None), ("points", [[0, 1, 2]]), ("points", []), ("seeds", 0),
    ("stream", "val_nats"), ("settings", []), ("data", 5)])
def test_a_reference_that_is_none_is_named(draw, made, tmp_path, key, value):
    reference = json.loads((made / "reference" / "demo.json").read_text(encoding="utf-8"))
    (tmp_path / "r.json").write_text(json.dumps(reference | {key: value}), encoding="utf-8")
    with pytest.raises(UserError, match=rf"^r\.json.*{key}"):
        draw(f"--log_dir={made / 'a'}", "--ref=r.json")


def test_the_streams_are_those_that_the_training_script_logs(draw):
    run, = read_runs(str(DEMO))
    assert list(run.streams["val_bpb"]) == list(range(0, 321, 80))
    assert {*CURVE} <= {*run.start}
    assert "inside: 5 of 5" in draw(f"--log_dir={DEMO}", "--ref=reference/demo_cpu.json", cwd=ROOT).out


def test_every_setting_of_training_is_compared_or_known_not_to_change_the_curve():
    """Of the settings in force at the end of the run: num_epochs and max_steps are in config as max_steps."""
    lines = (ROOT / "train_gpt2.py").read_text(encoding="utf-8").split("config = configure")[0]
    settings = set(re.findall(r"^([a-z]\w*)(?:: [^=]*)? = ", lines, re.M))
    unchanged = set(
        "data_dir prepare verify_data log_dir resume eval_only dry_run tensorboard wandb batch_size "
        "num_epochs max_hours max_bad_steps val_interval hellaswag_interval hellaswag_data "
        "checkpoint_interval keep_checkpoints sample_interval prompt num_samples max_new_tokens "
        "grad_norm_interval device dtype parallel activation_checkpointing attention loss_chunk compile "
        "peak_tflops deterministic first_loss_check seed".split())
    assert len(settings) > 50 and not unchanged & {*CURVE}
    assert settings == unchanged | {*CURVE}


def test_the_reference_for_gpt2_is_the_published_curve(shared_data):
    text = (shared_data / "reference" / "llmc_124m_fineweb10B.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(line for line in text.splitlines() if not line.startswith("#"))
    reference = read_json(GPT2, REFERENCE)
    assert reference["points"] == [[int(row["step"]), *3 * [float(row["val"])]] for row in rows if row["val"]]
    assert reference["points"][-1][:2] == [19560, 3.2722]
    assert (reference["seeds"], reference["stream"]) == (1, "val")
    for words in ("one seed", "llm.c", "8 H100", "KellerJordan/modded-nanogpt", "2024-10-13_llmc/main.log"):
        assert words in reference["source"]


def test_one_seed_gives_distances_and_no_verdict(draw, tmp_path):
    """Half-way, and far from it: the distance at every common step, exit code 0."""
    run = write_curve(tmp_path / "log", 1, n_layer=12, n_embd=768, batch_tokens=524_288)
    losses = {step: loss + 0.25 for step, loss, *_ in read_json(GPT2, REFERENCE)["points"]
              if step <= 10_000}
    (run / "log.txt").write_text("".join(f"{step} val {loss}\n" for step, loss in losses.items()),
                                 encoding="utf-8")
    code, out, figure = draw(f"--ref={GPT2}", "--log_dir=log")
    rows = re.findall(r"^(\d+) +([\d.]+) +[\d.]+ +([+-][\d.]+)$", out, re.M)
    assert rows == [(f"{step}", f"{loss:.4f}", "+0.2500") for step, loss in losses.items()]
    assert len(rows) == 41
    assert code == 0 and "inside" not in out and "one seed and has no band\n" in out
    assert "data: d5705165a538cab6; the reference's: FineWeb 10B" in out
    top, bottom = figure.get_axes()
    assert top.get_lines()[0].get_xdata()[-1] == 19_560
    np.testing.assert_allclose(bottom.get_lines()[1].get_ydata()[:41], 0.25)
    assert np.isnan(bottom.get_lines()[1].get_ydata()[41:]).all()
    with pytest.raises(UserError, match="n_layer=12 and 2"):
        draw(f"--ref={GPT2}", f"--log_dir={DEMO}")
