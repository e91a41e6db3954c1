"""Figures of logs: what is parsed is what was logged, and every kind of log is drawn; groups of runs."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import plot_log
from configurator import UserError, configure
from plot_log import incomplete_beta, parse_log, seeds_needed, smooth, welch
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
    for key in ("log_dir", "log", "out", "model_size", "val_baseline", "a", "b", "ref"):
        monkeypatch.setitem(namespace, key, namespace[key])  # put back after the test
    configure(namespace, list(flags))
    monkeypatch.setattr(plot_log, "save_figure", lambda figure, path: figures.append(figure))
    plot_log.main()
    plot_log.pyplot().close(figures[0])
    return figures[0]


def lines_of(axis):
    """{label in the legend: its line}"""
    lines = {line.get_label(): line for line in axis.get_lines()}
    return {text.get_text(): lines[text.get_text()] for text in axis.get_legend().get_texts()}


def write_lines(folder, *lines, config=None):
    folder.mkdir(exist_ok=True)
    (folder / "log.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    if config:
        starts = [{"config": {"seed": 0, "data_dir": "of an earlier start"}, "data": ""},
                  {"config": {"seed": 1, **config}, "data": "d5705165a538cab6"}]
        (folder / "runs.jsonl").write_text("".join(f"{json.dumps(start)}\n" for start in starts),
                                           encoding="utf-8")


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
    write_lines(tmp_path, "0 val 10.9", line, "2 val 9")
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
    assert capsys.readouterr().out.startswith(
        f"log, last values: train {train[399]:.6g}, val 4.5, hella 0.26\n")


def test_a_run_of_nothing_but_nan(tmp_path, monkeypatch, capsys):
    write_lines(tmp_path / "log", "0 val nan", "0 train nan", "0 hella inf")
    losses, = draw(monkeypatch, tmp_path).get_axes()  # no panel for a HellaSwag without values
    assert list(lines_of(losses)) == ["log: train nan or inf (1)", "log: val nan or inf (1)"]
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
        assert list(lines_of(hella))[-2:] == ["OpenAI GPT-2 124M (0.294)",
                                              "OpenAI GPT-3 124M (0.337)"]
        found, out = lines_of(losses), capsys.readouterr().out
        assert (line in found) != ("--val_baseline draws it anyway" in out)
        assert line not in found or found[line].get_ydata()[0] == plot_log.VAL_LOSS_GPT2["124M"]
        return line in found, out

    assert {name for name in cases if drawn(f"--log_dir={name}")[0]} == {"edu", "made"}
    assert drawn("--log_dir=edu,made")[0] and not drawn("--log_dir=edu,python")[0]
    assert "python was trained on python_corpus;" in drawn("--log_dir=edu,python")[1]
    assert "no runs.jsonl beside unknown/log.txt" in drawn("--log_dir=unknown")[1]
    assert drawn("--log_dir=python", "--val_baseline")[0]
    for record in ("[]", '{"config": {}}', "garbage"):
        (tmp_path / "edu" / "runs.jsonl").write_text(
            f'{{"config": {{"seed": 1}}, "data": ""}}\n{record}\n', encoding="utf-8")
        with pytest.raises(UserError, match=r"edu/runs\.jsonl, line 2"):
            draw(monkeypatch, tmp_path, "--log_dir=edu", "--model_size=124M", "--val_baseline=no")


def test_log_names_files(tmp_path, monkeypatch, capsys):
    write_lines(tmp_path / "a", "0 val 3")
    write_lines(tmp_path, "0 val 4")
    (tmp_path / "log.txt").rename(tmp_path / "old.log")
    losses, = draw(monkeypatch, tmp_path, "--log=a/log.txt,old.log", "--out=plots/p.png").get_axes()
    assert list(lines_of(losses)) == ["a: val (last 3.000, best 3.000)",
                                      "old.log: val (last 4.000, best 4.000)"]
    assert capsys.readouterr().out.endswith("figure: plots/p.png\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    draw(monkeypatch, tmp_path, "--log=~/a/log.txt,~/old.log", "--log_dir=log")
    assert capsys.readouterr().out.count("last values: val") == 2


@pytest.mark.parametrize("text", ["", "0 val 3", "0 unigram 5.4\n", "garbage without an end"])
def test_a_log_with_nothing_to_draw_is_refused(tmp_path, monkeypatch, text):
    write_lines(tmp_path / "good", "0 val 3")
    (tmp_path / "log.txt").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"^log\.txt has .*nothing to draw"):
        draw(monkeypatch, tmp_path, "--log_dir=good,log.txt")


@pytest.mark.parametrize(("hella", "model_size"), [(False, ""), (True, "124M"), (False, "1558M")])
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


def test_no_legend_is_a_path_and_runs_of_one_name_differ(tmp_path, monkeypatch):
    for folder in (tmp_path, tmp_path / "x", tmp_path / "y"):
        folder.mkdir(exist_ok=True)
        write_lines(folder / "log", "0 val 3", "0 unigram 5")
    figure = draw(monkeypatch, tmp_path / "x" / "log", f"--log_dir=.,../../y/log,{tmp_path}/log")
    val = "val (last 3.000, best 3.000)"
    assert list(lines_of(figure.get_axes()[0])) == [
        f"log: {val}", f"log (2): {val}", f"log (3): {val}", "unigram model on val (5.00)"]


def test_several_runs_in_one_figure(tmp_path, monkeypatch, capsys):
    write_log(tmp_path / "a", hella=True)
    write_log(tmp_path / "b")
    losses, hella = draw(monkeypatch, tmp_path, "--log_dir=a,b/log.txt", "--out=plots/both.svg").get_axes()
    assert [label.partition(" (")[0] for label in lines_of(losses)] == [
        "a: train", "a: val", "b: train", "b: val"]
    assert list(lines_of(hella)) == ["a (last 0.325)"]
    assert re.findall("^(.), last values: train", capsys.readouterr().out, re.M) == ["a", "b"]


@pytest.mark.parametrize(("flag", "words"), [
    ("--log_dir=nosuch", "nosuch is neither"), ("--log=nosuch.log", "nosuch.log is neither"),
    ("--log_dir=", "an empty name"), ("--log=empty.log", "empty.log has no train"),
    ("--log=latin1.log", "log: byte 11"), ("--model_size=1B", "124M, 350M"),
    ("--ref=r.json --log_dir=log,log", "draw one"), ("--ref=r.json --model_size=124M", "draw one")])
def test_mistakes_are_named(tmp_path, monkeypatch, flag, words):
    write_log(tmp_path / "log")
    (tmp_path / "empty.log").touch()
    (tmp_path / "latin1.log").write_bytes(b"0 val 3\n1 v\xe9l 3\n")
    with pytest.raises(UserError, match=words):
        draw(monkeypatch, tmp_path, *flag.split())


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
        write_lines(folder / f"log_{n}", f"0 val {11 + n / 100}", f"100 val {loss}",
                    config={"seed": n, "optimizer": "muon" if n > 3 else "adamw", "max_steps": 100,
                            "tokenizer": "gpt2", "val_tokens": 64})


def test_groups_of_runs(tmp_path, monkeypatch, capsys):
    write_groups(tmp_path)
    figure = draw(monkeypatch, tmp_path, "--a=log_1, log_2,log_3", "--b=log_4,log_5 ,log_6")
    a = np.array([4.02, 4.04, 4.0])
    _, se, df, p = welch(a, a - 0.05)
    lines = capsys.readouterr().out.splitlines()
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


def write_val(folder, seed, loss=4.0, data=None, **config):
    """A run of 100 steps that ends with this val loss, or of another size by `config`."""
    config = {"seed": seed, "max_steps": 100, **config}
    write_lines(folder, f"100 val {loss + seed / 100}", f"100 val_bpb {loss / 3 + seed / 100}", config=config)
    if data:
        path = folder / "runs.jsonl"
        path.write_text(path.read_text(encoding="utf-8").replace("d5705165a538cab6", data), encoding="utf-8")


def test_groups_with_different_tokenizers_are_compared_in_bits_per_byte(tmp_path, monkeypatch, capsys):
    for seed in (1, 2):
        write_val(tmp_path / f"a{seed}", seed, 4, tokenizer="gpt2")
        write_val(tmp_path / f"b{seed}", seed, 3, data="ffff", tokenizer="mine.tiktoken")
    figure = draw(monkeypatch, tmp_path, "--a=a1,a2", "--b=b1,b2")
    out = capsys.readouterr().out
    assert "b minus a: -0.3333 bits per byte" in out and "a and b differ in tokenizer=gpt2 and mine" in out
    assert "data: d5705165a538cab6; that of b: ffff. Losses on different data are not directly" in out
    assert "a and b share seeds; Welch's t test ignores this pairing" in out
    assert [axis.get_ylabel() for axis in figure.get_axes()] == ["loss (bits per byte, log scale)",
                                                                 "difference (bits per byte)"]


def test_groups_with_other_seeds_and_the_same_data_are_not_warned_about(tmp_path, monkeypatch, capsys):
    for seed in range(1, 5):  # the same curve, from weights of each seed
        write_val(tmp_path / f"log_{seed}", seed, 4 - seed // 3 / 100, init_from=f"xavier_{seed}.pt")
    draw(monkeypatch, tmp_path, "--a=log_1,log_2", "--b=log_3,log_4")
    out = capsys.readouterr().out
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
    ("log_1,unknown", "log_4,log_5", "unknown has no runs.jsonl with its seed"),
    ("log_1,log_2", "", "--a and --b are compared with each other; name the runs of both"),
    ("", "log_1,log_2", "--a and --b are compared")])
def test_no_claim_from_one_seed_or_unlike_runs(tmp_path, monkeypatch, capsys, a, b, message):
    write_groups(tmp_path)
    for name, lines, config in (("short", ["0 val 11"], {"seed": 8, "optimizer": "adamw"}),
                                ("nan", ["0 val 11", "100 val nan"], {"seed": 9, "optimizer": "muon"}),
                                ("unknown", ["0 val 11", "100 val 4"], None)):
        write_lines(tmp_path / name, *lines, config=config and {**config, "max_steps": 100})
    for seed in (1, 2):
        write_lines(tmp_path / f"long_{seed}", f"200 val 3.{seed}", config={"seed": seed, "max_steps": 200})
        write_val(tmp_path / f"bpe_{seed}", seed, tokenizer="mine.tiktoken")
        write_val(tmp_path / f"few_{seed}", seed, val_tokens=32)
    with pytest.raises(UserError, match=message):
        draw(monkeypatch, tmp_path, f"--a={a}", f"--b={b}")
    assert "p =" not in capsys.readouterr().out and not list(tmp_path.glob("*/*.png"))


def test_copies_of_a_run_show_nothing(tmp_path, monkeypatch, capsys):
    for n in range(4):
        write_lines(tmp_path / f"log_{n}", "100 val 3.3", config={"seed": n, "max_steps": 100})
    write_val(tmp_path / "other", 5)
    for a in ("log_0,log_1,log_2", "log_3,other"):  # three equal losses have a standard deviation above 0
        with pytest.raises(UserError, match=r"equal losses in [ab]: copies of one run"):
            draw(monkeypatch, tmp_path, f"--a={a}", f"--b={'log_3,other' if a[-1] == '2' else 'log_0,log_1'}")
