"""plot_log.py --ref: right curves are inside the band and wrong ones are not, whoever made them and when."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import plot_log
from configurator import UserError, configure
from files import read_json
from plot_log import BANDED, CURVE, FLOOR, REFERENCE, band, parse_log, read_runs

ROOT = Path(__file__).resolve().parent.parent
STEPS = range(0, 1201, 200)
DEMO = ROOT / "results" / "demo_cpu"  # a real run
SCRIPT = [sys.executable, str(ROOT / "plot_log.py")]


def write_run(folder, seed, shift=0.0, steps=STEPS, data="d5705165a538cab6", unigram=5.4, settings=None):
    """A run whose val follows a power law; seeds move it by 0.2%, `shift` nats by what is put in."""
    folder.mkdir()
    rng, lines = np.random.default_rng(seed), [f"0 unigram {unigram}"]
    for step in steps:
        val = 3 + 7.6 * (1 + step / 30) ** -0.7 + 0.01 * rng.standard_normal() + (shift if step else 0)
        lines += [f"{step} val {val:.8g}", f"{step} val_bpb {val / 1.51:.8g}", f"{step} train {val:.8g}"]
    (folder / "log.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    config = {"seed": seed, "n_layer": 6, "max_lr": 2e-3, "max_steps": 1200, "device": "cpu"}
    start = {"config": config | (settings or {}), "data": data, "git": "abc", "device": "EPYC"}
    earlier = {"config": {"seed": 99, "n_layer": 99}, "data": ""}
    (folder / "runs.jsonl").write_text(f"{json.dumps(earlier)}\n{json.dumps(start)}\n", encoding="utf-8")
    return folder


@pytest.fixture
def script(monkeypatch, capsys):
    """script(cwd, *flags): plot_log.py in this process; its exit code, what it prints, and its figure."""
    def run(cwd, *flags):
        figures = []
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(plot_log, "save_figure", lambda figure, path: figures.append(figure))
        for key in ("log_dir", "ref", "make", "out"):
            monkeypatch.setattr(plot_log, key, "")
        configure(vars(plot_log), list(flags))
        code = plot_log.main()
        plot_log.pyplot().close("all")
        return code, capsys.readouterr().out.rpartition("figure: ")[0], *figures
    return run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with three runs and the reference made of them, by the command itself."""
    folder = tmp_path_factory.mktemp("made")
    for seed, name in enumerate("abc"):
        write_run(folder / name, seed)
    done = subprocess.run([*SCRIPT, "--make=a,b,c", "--ref=reference/demo.json"], cwd=folder,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("reference/demo.json: 7 steps, 0 to 1200, 3 runs, bands mean +- max(3 sd")
    return folder


@pytest.fixture
def compare(made, script):
    """compare(run): what the script says of a run beside that reference."""
    return lambda run: script(made, f"--log_dir={run}", "--ref=reference/demo.json")


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


def test_a_reference_is_the_mean_the_bands_and_what_they_come_from(made):
    reference = read_json(made / "reference" / "demo.json", REFERENCE)
    runs = [run.streams for run in read_runs(",".join(str(made / name) for name in "abc"))]
    means = {stream: [np.mean([run[stream][step] for run in runs]) for step in STEPS]
             for stream in ("val", *BANDED)}
    np.testing.assert_allclose(reference["val"], [*zip(STEPS, means["val"])])
    for stream, scale in BANDED.items():  # the floors are shares of the loss, also where that is nearly 0
        steps, mean, low, high = np.transpose(reference["bands"][stream])
        np.testing.assert_allclose((steps, mean), (STEPS, means[stream]))
        assert ((high - mean) >= 0.999 * FLOOR * np.array(means[scale])).all()
        np.testing.assert_allclose(high - mean, mean - low)
    assert reference["data"] == "d5705165a538cab6"
    assert all(f"seed {seed}, git abc, EPYC" in reference["source"] for seed in range(3))
    assert reference["settings"] == {"n_layer": 6, "max_lr": 2e-3, "max_steps": 1200}


def test_a_right_run_is_inside(compare, tmp_path):
    for seed in range(10, 14):
        code, out, figure = compare(write_run(tmp_path / f"right{seed}", seed))
        assert code == 0, out
    lines = out.splitlines()
    assert [line.endswith("  inside") for line in lines].count(True) == 14
    assert lines[-1] == "inside: 14 of 14 values up to step 1200 of 1200 are in the bands"
    value = parse_log(tmp_path / "right13" / "log.txt")["val_bpb"][200]
    assert re.search(rf"^200 +val_bpb +{value:.4f} ", out, re.M)
    for axis in figure.get_axes():
        assert [text.get_text() for text in axis.get_legend().get_texts()] == ["reference", "right13"]
        assert axis.get_lines()[1].get_xdata().tolist() == list(STEPS) and len(axis.collections) == 1


@pytest.mark.parametrize("shift", [-0.3, 0.3, float("nan")])
def test_a_wrong_run_is_outside(made, tmp_path, shift):
    """Worse, too good to be true, or not a number; step 0, before any training, is right."""
    write_run(tmp_path / "wrong", 10, shift)
    done = subprocess.run([*SCRIPT, "--log_dir=wrong", f"--ref={made}/reference/demo.json"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout.count("OUTSIDE") == 12, done
    assert done.stdout.endswith("\noutside: 2 of 14 values up to step 1200 of 1200 are in the bands; the "
                                "first that is not is val_bpb at step 200\nfigure: wrong/comparison.png\n")
    assert (tmp_path / "wrong" / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_one_value_is_enough_and_either_stream_can_be_it(compare, tmp_path):
    run = write_run(tmp_path / "bpb", 10)
    log = run / "log.txt"
    good = log.read_text(encoding="utf-8")
    value = parse_log(log)["val_bpb"][800]
    for line, n, first in ((f"800 val_bpb {1.05 * value}", 1, "val_bpb at step 800"),
                           ("0 unigram 5.0", 7, "val_minus_unigram at step 0")):  # easier data
        log.write_text(f"{good}{line}\n", encoding="utf-8")
        code, out, _ = compare(run)
        assert code == 1 and out.count("OUTSIDE") == n
        assert out.endswith(f"the first that is not is {first}\n")


def test_a_run_still_in_training(compare, tmp_path):
    code, out, _ = compare(write_run(tmp_path / "short", 10, steps=range(0, 500, 100)))
    assert code == 0
    assert out.endswith("\nso far inside: 6 of 6 values up to step 400 of 1200 are in the bands\n")
    code, out, _ = compare(write_run(tmp_path / "bad", 10, 0.3, steps=range(0, 500, 100)))
    assert code == 1 and "\nso far outside: 2 of 6 values" in out
    with pytest.raises(UserError, match=r"no val_bpb or val_minus_unigram at any step of .*: 0, 200, 400, "):
        compare(write_run(tmp_path / "other", 10, steps=range(50, 500, 100)))


def test_other_data_is_reported_and_other_settings_are_refused(compare, made, tmp_path):
    assert "data:" not in compare(made / "a")[1]
    code, out, _ = compare(write_run(tmp_path / "data", 10, data="ffff"))
    assert code == 0 and "data: ffff; the reference's: d5705165a538cab6. Losses" in out
    for key, value in (("n_layer", 4), ("max_lr", 3e-3), ("max_steps", 600)):
        with pytest.raises(UserError, match=f"{key}=.* and {value}; compare"):
            compare(write_run(tmp_path / key, 10, settings={key: value}))
    # what does not move the curve, or is not known to the older of the two, is no reason to refuse
    same = write_run(tmp_path / "same", 10, settings={"device": "cuda", "optimizer": "adamw"})
    assert compare(same)[0] == 0
    good = (same / "runs.jsonl").read_text(encoding="utf-8").splitlines()[0]
    for line in ('{"config": {"n_l', "[]", '{"data": "ffff"}'):
        (same / "runs.jsonl").write_text(f"{good}\n{line}\n", encoding="utf-8")
        with pytest.raises(UserError, match=r"runs\.jsonl, line 2: "):
            compare(same)
    (same / "runs.jsonl").unlink()
    code, out, _ = compare(same / "log.txt")
    assert code == 0 and "data: unknown (no runs.jsonl); the" in out


def test_what_no_reference_is_made_of(script, made, tmp_path):
    runs = {"a": (0, {}), "b": (1, {}), "nan": (2, {"shift": float("nan")}),
            "same_seed": (0, {}), "data": (2, {"data": "ffff"}),
            "settings": (2, {"settings": {"max_lr": 1e-3}}), "no_val": (2, {"steps": ()})}
    for name, (seed, options) in runs.items():
        write_run(tmp_path / name, seed, **options)
    for names, words in [("a", "a: seeds 0, and .* at least two different ones"),
                         ("a,same_seed", "seeds 0, 0, and .*train with another --seed=N"),
                         ("a,b,data", "differ in more than the seed: data=d5705165a538cab6 and ffff"),
                         ("a,b,settings", "max_lr=0.002 and 0.001"), ("a,no_val", "no_val has .* no val"),
                         ("a,nan", "nan has .* nan or inf"), ("a,nosuch", "neither a log nor a folder")]:
        with pytest.raises(UserError, match=words):
            script(tmp_path, f"--make={names}", "--ref=r.json")
    for ref, words in (("reference/demo.json", "demo.json exists"), ("r.log", "r.log is not a .json")):
        with pytest.raises(UserError, match=words):
            script(made, "--make=a,b", f"--ref={ref}")
    with pytest.raises(FileNotFoundError, match=r"nosuch\.json"):  # a message in a process of its own
        script(made, "--log_dir=a", "--ref=nosuch.json")
    assert not list(tmp_path.glob("r.*"))


@pytest.mark.parametrize(("key", "value"), [
    ("val", [[0, "x"]]), ("val", None), ("bands", [[0, 1, 2, 3]]), ("bands", {"val_bpb": [[0, 1, 2]]}),
    ("settings", []), ("data", 5)])
def test_a_reference_that_is_none_is_named(script, made, tmp_path, key, value):
    reference = json.loads((made / "reference" / "demo.json").read_text(encoding="utf-8"))
    (tmp_path / "r.json").write_text(json.dumps(reference | {key: value}), encoding="utf-8")
    with pytest.raises(UserError, match=rf"^r\.json: .*{key}|^r\.json, {key}"):
        script(tmp_path, f"--log_dir={made / 'a'}", "--ref=r.json")


def test_the_streams_are_those_that_the_training_script_logs(script):
    run, = read_runs(str(DEMO))
    assert run.streams["val_minus_unigram"][1200] == pytest.approx(3.1986451 - 5.3934627)
    assert list(run.streams["val_bpb"]) == list(STEPS)
    assert {*CURVE} <= {*run.start}
    assert set(read_json(ROOT / "reference" / "demo_cpu.json", REFERENCE)["bands"]) == set(BANDED)
    assert "inside: 14 of 14" in script(ROOT, f"--log_dir={DEMO}", "--ref=reference/demo_cpu.json")[1]


# ---- GPT-2 124M, one seed ------------------------------------------------------

GPT2 = ROOT / "reference" / "gpt2_124m_fineweb.json"


def test_the_reference_for_gpt2_is_the_published_curve(shared_data):
    text = (shared_data / "reference" / "llmc_124m_fineweb10B.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(line for line in text.splitlines() if not line.startswith("#"))
    reference = read_json(GPT2, REFERENCE)
    assert reference["val"] == [[int(row["step"]), float(row["val"])] for row in rows if row["val"]]
    assert reference["val"][-1] == [19560, 3.2722] and not reference["bands"]
    for words in ("one seed", "llm.c", "8 H100", "KellerJordan/modded-nanogpt", "2024-10-13_llmc/main.log"):
        assert words in reference["source"]


def test_one_seed_gives_distances_and_no_verdict(script, tmp_path):
    """Half-way, and far from it: the distance at every common step, exit code 0."""
    run = write_run(tmp_path / "log", 1, settings={"n_layer": 12, "n_embd": 768, "batch_tokens": 524_288})
    losses = {step: loss + 0.25 for step, loss in read_json(GPT2, REFERENCE)["val"] if step <= 10_000}
    (run / "log.txt").write_text("".join(f"{step} val {loss}\n" for step, loss in losses.items()),
                                 encoding="utf-8")
    code, out, figure = script(tmp_path, f"--ref={GPT2}", "--log_dir=log")
    rows = re.findall(r"^(\d+) +val +([\d.]+) +[\d.]+ +([+-][\d.]+)$", out, re.M)
    assert rows == [(f"{step}", f"{loss:.4f}", "+0.2500") for step, loss in losses.items()]
    assert len(rows) == 41
    assert code == 0 and "inside" not in out and out.endswith("one seed and has no bands\n")
    assert "data: d5705165a538cab6; the reference's: FineWeb 10B" in out
    top, bottom = figure.get_axes()
    assert top.get_lines()[0].get_xdata()[-1] == 19_560
    np.testing.assert_allclose(bottom.get_lines()[1].get_ydata()[:41], 0.25)
    assert np.isnan(bottom.get_lines()[1].get_ydata()[41:]).all()
    with pytest.raises(UserError, match="n_layer=12 and 6"):
        script(ROOT, f"--ref={GPT2}", f"--log_dir={DEMO}")
