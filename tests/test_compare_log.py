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
from plot_log import CURVE, FLOOR, REFERENCE, band, parse_log, read_runs

ROOT = Path(__file__).resolve().parent.parent
STEPS = range(0, 1201, 200)
DEMO = ROOT / "results" / "demo_cpu"  # a real run
SCRIPT = [sys.executable, str(ROOT / "plot_log.py")]


def write_run(folder, seed, shift=0.0, steps=STEPS, data="d5705165a538cab6", settings=None):
    """A run whose val follows a power law; seeds move it by 0.2%, `shift` nats by what is put in."""
    folder.mkdir()
    rng, lines = np.random.default_rng(seed), []
    for step in steps:
        val = 3 + 7.6 * (1 + step / 30) ** -0.7 + 0.01 * rng.standard_normal() + (shift if step else 0)
        lines += [f"{step} val {val:.8g}", f"{step} val_bpb {val / 1.51:.8g}", f"{step} train {val:.8g}"]
    (folder / "log.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    config = {"seed": seed, "n_layer": 6, "max_lr": 2e-3, "max_steps": 1200, "device": "cpu",
              "init_from": f"xavier_s{seed}.pt"}
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
    assert done.stdout.startswith("reference/demo.json: 7 steps, 0 to 1200, 3 runs, band mean +- max(3 sd")
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
        code, out, figure = compare(write_run(tmp_path / f"right{seed}", seed))
        assert code == 0, out
    lines = out.splitlines()
    assert [line.endswith("  inside") for line in lines].count(True) == 7
    assert lines[-1] == "inside: 7 of 7 values up to step 1200 of 1200 are in the band"
    value = parse_log(tmp_path / "right13" / "log.txt")["val_bpb"][200]
    assert re.search(rf"^200 +{value:.4f} ", out, re.M)
    for axis in figure.get_axes():
        assert [text.get_text() for text in axis.get_legend().get_texts()] == ["reference", "right13"]
        assert axis.get_lines()[1].get_xdata().tolist() == list(STEPS)


@pytest.mark.parametrize("shift", [-0.3, 0.3, float("nan")])
def test_a_wrong_run_is_outside(made, tmp_path, shift):
    """Worse, too good to be true, or not a number; step 0, before any training, is right."""
    write_run(tmp_path / "wrong", 10, shift)
    done = subprocess.run([*SCRIPT, "--log_dir=wrong", f"--ref={made}/reference/demo.json"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout.count("OUTSIDE") == 6, done
    assert done.stdout.endswith("\noutside: 1 of 7 values up to step 1200 of 1200 are in the band; the "
                                "first that is not is at step 200\nfigure: wrong/comparison.png\n")
    assert (tmp_path / "wrong" / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_one_value_is_enough(compare, tmp_path):
    log = write_run(tmp_path / "bpb", 10) / "log.txt"
    value = parse_log(log)["val_bpb"][800]
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"800 val_bpb {1.05 * value}\n")
    code, out, _ = compare(log)
    assert code == 1 and out.count("OUTSIDE") == 1 and out.endswith("the first that is not is at step 800\n")


def test_a_run_still_in_training(compare, tmp_path):
    code, out, _ = compare(write_run(tmp_path / "short", 10, steps=range(0, 500, 100)))
    assert code == 0
    assert out.endswith("\nso far inside: 3 of 3 values up to step 400 of 1200 are in the band\n")
    code, out, _ = compare(write_run(tmp_path / "bad", 10, 0.3, steps=range(0, 500, 100)))
    assert code == 1 and "\nso far outside: 1 of 3 values" in out
    with pytest.raises(UserError, match=r"no val_bpb at any step of .*: 0, 200, 400, "):
        compare(write_run(tmp_path / "other", 10, steps=range(50, 500, 100)))


@pytest.mark.parametrize("lines", ["410 train nan\n", "410 train 9.0\n410 skipped 3\n"])
def test_a_run_that_gave_up_is_not_inside(compare, script, tmp_path, lines):
    log = write_run(tmp_path / "run", 10, steps=range(0, 500, 100)) / "log.txt"
    good = log.read_text(encoding="utf-8")
    log.write_text(good + lines, encoding="utf-8")
    code, out, _ = compare(log)
    assert code == 1 and "\nrun gave up at step 410: " in out and "so far inside: 3 of 3" in out
    log.write_text(f"{good}{lines}411 train 4\n", encoding="utf-8")  # the guard skipped one step
    assert compare(log)[0] == 0
    (log.parent / "runs.jsonl").unlink()
    log.write_text(good + lines, encoding="utf-8")
    code, out, _ = script(tmp_path, f"--ref={GPT2}", f"--log_dir={log}")
    assert code == 1 and "no verdict" in out


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
            "settings": (2, {"settings": {"max_lr": 1e-3}}), "no_val": (2, {"steps": ()}),
            "short": (2, {"steps": range(0, 900, 100)}), "c": (3, {})}
    for name, (seed, options) in runs.items():
        write_run(tmp_path / name, seed, **options)
    for names, words in [("a", "a: seeds 0, and .* at least 3 different ones"),
                         ("a,b", "a,b: seeds 0, 1, and .* at least 3 different ones"),
                         ("a,b,short", "short .* step 800 of 1200: it is not finished, or target_loss"),
                         ("a,same_seed", "seeds 0, 0, and .*train with another --seed=N"),
                         ("a,b,data", "differ in more than the seed: data=d5705165a538cab6 and ffff"),
                         ("a,b,settings", "max_lr=0.002 and 0.001"), ("a,no_val", "no_val has .* no val"),
                         ("a,nan", "nan has .* nan or inf"), ("a,nosuch", "neither a log nor a folder")]:
        with pytest.raises(UserError, match=words):
            script(tmp_path, f"--make={names}", "--ref=r.json")
    for ref, words in (("reference/demo.json", "json already exists"), ("r.log", "r.log is not a .json")):
        with pytest.raises(UserError, match=words):
            script(made, "--make=a,b,c", f"--ref={ref}")
    with pytest.raises(UserError, match=r"--make has no file to write.*--ref=NAME\.json"):
        script(made, "--make=a,b,c")
    for name in "abc":  # as build-nanogpt's logs
        log = tmp_path / name / "log.txt"
        log.write_text(log.read_text(encoding="utf-8").replace("val_bpb", "other"), encoding="utf-8")
    with pytest.raises(UserError, match="no step at which all of a, b, c have val_bpb"):
        script(tmp_path, "--make=a,b,c", "--ref=r.json")
    with pytest.raises(FileNotFoundError, match=r"nosuch\.json"):  # a message in a process of its own
        script(made, "--log_dir=a", "--ref=nosuch.json")
    assert not list(tmp_path.glob("r.*"))


@pytest.mark.parametrize(("key", "value"), [
    ("points", [[0, "x", 1, 2]]), ("points", None), ("points", [[0, 1, 2]]), ("points", []), ("seeds", 0),
    ("stream", "val_nats"), ("settings", []), ("data", 5)])
def test_a_reference_that_is_none_is_named(script, made, tmp_path, key, value):
    reference = json.loads((made / "reference" / "demo.json").read_text(encoding="utf-8"))
    (tmp_path / "r.json").write_text(json.dumps(reference | {key: value}), encoding="utf-8")
    with pytest.raises(UserError, match=rf"^r\.json.*{key}"):
        script(tmp_path, f"--log_dir={made / 'a'}", "--ref=r.json")


def test_the_streams_are_those_that_the_training_script_logs(script):
    run, = read_runs(str(DEMO))
    assert list(run.streams["val_bpb"]) == list(STEPS)
    assert {*CURVE} - {*run.start} == {"adamw_lr_scale", "init_from"}  # settings that are newer than that run
    assert "inside: 7 of 7" in script(ROOT, f"--log_dir={DEMO}", "--ref=reference/demo_cpu.json")[1]


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


# ---- GPT-2 124M, one seed ------------------------------------------------------

GPT2 = ROOT / "reference" / "gpt2_124m_fineweb.json"


def test_the_reference_for_gpt2_is_the_published_curve(shared_data):
    text = (shared_data / "reference" / "llmc_124m_fineweb10B.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(line for line in text.splitlines() if not line.startswith("#"))
    reference = read_json(GPT2, REFERENCE)
    assert reference["points"] == [[int(row["step"]), *3 * [float(row["val"])]] for row in rows if row["val"]]
    assert reference["points"][-1][:2] == [19560, 3.2722]
    assert (reference["seeds"], reference["stream"]) == (1, "val")
    for words in ("one seed", "llm.c", "8 H100", "KellerJordan/modded-nanogpt", "2024-10-13_llmc/main.log"):
        assert words in reference["source"]


def test_one_seed_gives_distances_and_no_verdict(script, tmp_path):
    """Half-way, and far from it: the distance at every common step, exit code 0."""
    run = write_run(tmp_path / "log", 1, settings={"n_layer": 12, "n_embd": 768, "batch_tokens": 524_288})
    losses = {step: loss + 0.25 for step, loss, *_ in read_json(GPT2, REFERENCE)["points"]
              if step <= 10_000}
    (run / "log.txt").write_text("".join(f"{step} val {loss}\n" for step, loss in losses.items()),
                                 encoding="utf-8")
    code, out, figure = script(tmp_path, f"--ref={GPT2}", "--log_dir=log")
    rows = re.findall(r"^(\d+) +([\d.]+) +[\d.]+ +([+-][\d.]+)$", out, re.M)
    assert rows == [(f"{step}", f"{loss:.4f}", "+0.2500") for step, loss in losses.items()]
    assert len(rows) == 41
    assert code == 0 and "inside" not in out and out.endswith("one seed and has no band\n")
    assert "data: d5705165a538cab6; the reference's: FineWeb 10B" in out
    top, bottom = figure.get_axes()
    assert top.get_lines()[0].get_xdata()[-1] == 19_560
    np.testing.assert_allclose(bottom.get_lines()[1].get_ydata()[:41], 0.25)
    assert np.isnan(bottom.get_lines()[1].get_ydata()[41:]).all()
    with pytest.raises(UserError, match="n_layer=12 and 6"):
        script(ROOT, f"--ref={GPT2}", f"--log_dir={DEMO}")
