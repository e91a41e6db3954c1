"""compare_log.py: right curves are inside the band and wrong ones are not, whoever made them and when."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from compare_log import CURVE, FLOOR, JUDGED, bands, read_run
from plot_log import parse_log

ROOT = Path(__file__).resolve().parent.parent
STEPS = range(0, 1201, 200)
DEMO = ROOT / "results" / "demo_cpu"  # a real run


def script(cwd, *flags):
    command = [sys.executable, str(ROOT / "compare_log.py"), *flags]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def write_run(folder, seed, shift=0.0, steps=STEPS, data="d5705165a538cab6", unigram=5.4, settings=None):
    """A run whose val follows a power law; seeds move it by 0.2%, `shift` nats by what is put in."""
    folder.mkdir()
    rng, lines = np.random.default_rng(seed), [f"0 unigram {unigram}"]
    for step in steps:
        val = 3 + 7.6 * (1 + step / 30) ** -0.7 + 0.01 * rng.standard_normal() + (shift if step else 0)
        lines += [f"{step} val {val:.8g}", f"{step} val_bpb {val / 1.51:.8g}", f"{step} train {val:.8g}"]
    (folder / "log.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    config = {"seed": seed, "n_layer": 6, "max_lr": 2e-3, "max_steps": 1200, "device": "cpu"}
    record = {"config": config | (settings or {}), "data": data, "git": "abc", "torch": "2.13.0",
              "device": "EPYC", "world_size": 1}
    (folder / "runs.jsonl").write_text('{"config": {"n_layer": 99}}\n' + json.dumps(record) + "\n",
                                       encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with three runs and the reference made of them."""
    folder = tmp_path_factory.mktemp("made")
    for seed, name in enumerate("abc"):
        write_run(folder / name, seed)
    done = script(folder, "--make=a,b,c", "--ref=reference/demo.log")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("reference/demo.log: 7 steps, 0 to 1200, mean of 3 seeds +- max(3 sd")
    return folder


def compare(made, run, ref="demo.log"):
    return script(made, f"--run={run}", f"--ref={made / 'reference' / ref}")


def test_bands_are_the_formula():
    """Against numpy: three steps of five seeds, of which one has less spread than the median, one a floor."""
    values = np.random.default_rng(0).normal(3, [[0.1], [0.01], [0.02]], (3, 5))
    found = bands(dict(enumerate(values.tolist())), {0: 0.0, 1: 0.0, 2: 9.0})
    sd, means = values.std(axis=1, ddof=1), values.mean(axis=1)
    assert sd[0] > sd[2] > sd[1]
    half = [3 * sd[0] * np.sqrt(6 / 5), 3 * sd[2] * np.sqrt(6 / 5), 9]
    for step in range(3):
        assert found[step] == pytest.approx((means[step], means[step] - half[step], means[step] + half[step]))


def test_how_often_a_right_run_is_outside():
    """Seven steps, three seeds: 12% of right runs have a step outside (46% with each step's sd alone), and
    2% with the floor where seeds differ by 0.3%."""
    rng = np.random.default_rng(0)

    def outside(spread, floor):
        runs = 1 + spread * rng.standard_normal((2000, 4, 7))
        count = 0
        for *seeds, new in runs:
            found = bands(dict(enumerate(np.transpose(seeds).tolist())), dict.fromkeys(range(7), floor))
            count += any(not found[step][1] <= new[step] <= found[step][2] for step in range(7))
        return count / len(runs)

    assert 0.09 < outside(0.003, 0.0) < 0.16
    assert outside(0.003, FLOOR) < 0.03


def test_a_reference_is_a_log_and_its_facts(made):
    streams = parse_log(made / "reference" / "demo.log")
    assert set(streams) == {"unigram", "val", *(f"{s}{end}" for s in JUDGED for end in ("", "_low", "_high"))}
    runs = [read_run(str(made / name))[0] for name in "abc"]
    for stream in ("val", *JUDGED):
        assert list(streams[stream]) == list(STEPS)
        for step in STEPS:
            assert streams[stream][step] == pytest.approx(np.mean([r[stream][step] for r in runs]), rel=1e-7)
    for step in STEPS:  # the floors are shares of the loss, also where val_minus_unigram is nearly 0
        for stream, scale in JUDGED.items():
            half = streams[f"{stream}_high"][step] - streams[stream][step]
            assert half >= 0.999 * FLOOR * streams[scale][step]
    facts = json.loads((made / "reference" / "demo.json").read_text(encoding="utf-8"))
    assert facts["seeds"] == [0, 1, 2] and facts["data"] == "d5705165a538cab6"
    assert [origin["git"] for origin in facts["made_from"]] == ["abc"] * 3
    assert facts["settings"] == {"n_layer": 6, "max_lr": 2e-3, "max_steps": 1200}


def test_a_right_run_is_inside(made):
    for seed in range(10, 14):
        done = compare(made, write_run(made / f"right{seed}", seed))
        assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert len(lines) == 3 + 14 + 2 and lines[3].split()[:2] == ["0", "val_bpb"]
    assert all(line.endswith("  inside") for line in lines[3:17])
    assert lines[-1] == "inside: 14 of 14 values up to step 1200 of 1200 are in the band"


@pytest.mark.parametrize("shift", [-0.3, 0.3, float("nan")])
def test_a_wrong_run_is_outside(made, tmp_path, shift):
    """Worse, too good to be true, or not a number; step 0, before any training, is right."""
    done = compare(made, write_run(tmp_path / "wrong", 10, shift))
    assert done.returncode == 1 and done.stdout.count("OUTSIDE") == 12, done.stdout
    assert done.stdout.endswith("\noutside: 2 of 14 values up to step 1200 of 1200 are in the band; "
                                "the first that is not is val_bpb at step 200\n")


def test_one_value_is_enough_and_either_stream_can_be_it(made, tmp_path):
    run = write_run(tmp_path / "bpb", 10)
    log = run / "log.txt"
    good = log.read_text(encoding="utf-8")
    value = parse_log(log)["val_bpb"][800]
    log.write_text(f"{good}800 val_bpb {1.05 * value}\n", encoding="utf-8")
    done = compare(made, run)
    assert done.returncode == 1 and done.stdout.count("OUTSIDE") == 1
    assert done.stdout.endswith("the first that is not is val_bpb at step 800\n")
    log.write_text(f"{good}0 unigram 5.0\n", encoding="utf-8")  # another unigram: easier data
    done = compare(made, run)
    assert done.returncode == 1 and done.stdout.count("OUTSIDE") == 7
    assert "the first that is not is val_minus_unigram at step 0" in done.stdout


def test_a_run_still_in_training(made, tmp_path):
    done = compare(made, write_run(tmp_path / "short", 10, steps=range(0, 500, 100)))
    assert done.returncode == 0
    assert done.stdout.endswith("\nso far inside: 6 of 6 values up to step 400 of 1200 are in the band\n")
    done = compare(made, write_run(tmp_path / "bad", 10, 0.3, steps=range(0, 500, 100)))
    assert done.returncode == 1 and "\nso far outside: 2 of 6 values" in done.stdout
    done = compare(made, write_run(tmp_path / "other", 10, steps=range(50, 500, 100)))
    assert done.returncode == 2 and re.search(r"no val_bpb at any step of .*: 0, 200, 400", done.stderr)


def test_other_data_is_said_and_other_settings_are_refused(made, tmp_path):
    assert "data:" not in compare(made, made / "a").stdout
    done = compare(made, write_run(tmp_path / "data", 10, data="ffff"))
    assert done.returncode == 0
    assert "data:      ffff, the reference's is d5705165a538cab6: another corpus" in done.stdout
    for key, value in (("n_layer", 4), ("max_lr", 3e-3), ("max_steps", 600)):
        done = compare(made, write_run(tmp_path / key, 10, settings={key: value}))
        assert done.returncode == 2 and f" and {value};" in done.stderr, done
    # what does not move the curve, or is not known to the older of the two, is no reason to refuse
    done = compare(made, write_run(tmp_path / "same", 10, settings={"device": "cuda", "optimizer": "adamw"}))
    assert done.returncode == 0
    for text in ('{"config": {"n_l', "{}\n[]", '{}\n{"data": "ffff"}'):
        (tmp_path / "same" / "runs.jsonl").write_text(text, encoding="utf-8")
        done = compare(made, tmp_path / "same")
        place = f"runs.jsonl, line {text.count(chr(10)) + 1}: "
        assert done.returncode == 2 and place in done.stderr and "Traceback" not in done.stderr
    (tmp_path / "same" / "runs.jsonl").unlink()
    done = compare(made, tmp_path / "same" / "log.txt")
    assert done.returncode == 0 and "has no runs.jsonl" in done.stdout


def test_what_no_reference_is_made_of(made, tmp_path):
    runs = {"a": (0, {}), "b": (1, {}), "nan": (2, {"shift": float("nan")}),
            "same_seed": (0, {}), "data": (2, {"data": "ffff"}),
            "settings": (2, {"settings": {"max_lr": 1e-3}}), "no_val": (2, {"steps": ()})}
    for name, (seed, options) in runs.items():
        write_run(tmp_path / name, seed, **options)
    for names, words in [("a", "two seeds or more"), ("a,same_seed", "all different; train with --seed=N"),
                         ("a,b,data", "differ in more than the seed: data d5705165a538cab6 and ffff"),
                         ("a,b,settings", "max_lr=0.002 and 0.001"), ("a,no_val", "no val, val_bpb"),
                         ("a,nan", "nan has nan or inf for val at step 200, "),
                         ("a,nosuch", "no log and no folder")]:
        done = script(tmp_path, f"--make={names}", "--ref=r.log")
        assert done.returncode == 2 and words in done.stderr, (names, done)
        assert not list(tmp_path.glob("r.*"))
    done = script(made, "--make=a,b", "--ref=reference/demo.log")
    assert done.returncode == 2 and "is there already; remove it" in done.stderr
    done = script(made, "--run=a", "--ref=nosuch.log")
    assert done.returncode == 2 and "wanted a reference and its .json" in done.stderr


def test_the_streams_are_those_that_the_training_script_logs(tmp_path):
    streams, record = read_run(str(DEMO))
    assert streams["val_minus_unigram"][1200] == pytest.approx(3.1986451 - 5.3934627)
    assert list(streams["val_bpb"]) == list(STEPS)
    assert {*CURVE} <= {*record["config"]}
    for reference in (ROOT / "reference").glob("*.log"):
        facts = json.loads(reference.with_suffix(".json").read_text(encoding="utf-8"))
        assert facts["format"] == 1 and set(parse_log(reference)) >= {"val", *JUDGED}
