"""The study of Pre-LN against Post-LN: what counts as a spike and as stuck, and the runs it makes."""

import csv
import itertools
import json
import math
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from training import ENVIRONMENT, PYTHON, ROOT, RUN_THE_REST

sys.path.insert(0, str(ROOT / "results" / "norm_study"))
import study

from configurator import UserError
from shards import write_shard


def curve(steps=200, noise=0.1, level=5.0, seed=0):
    return level + noise * np.random.default_rng(seed).normal(size=steps)


def raised(losses, *steps, by=3.0):
    losses = losses.copy()
    losses[list(steps)] += by
    return losses


FLAT = np.full(200, 5.0)
FALL = 5.0 + 3.0 * np.exp(-np.arange(200) / 20)


@pytest.mark.parametrize(("losses", "expected"), [
    (FLAT, []), (curve(), []), (curve(noise=1.0), []), (FALL, []), (FALL + curve(level=0), []),
    (raised(curve(), 100), [100]), (raised(FALL, 100), [100]),
    (raised(curve(), 100, 101, 102), [100]), (raised(curve(), 100, 102), [100, 102]),
    (raised(curve(), 31), []), (raised(curve(), 32), [32]), (raised(curve(), 199), [199]),
    (raised(FLAT, 100, by=1.0), []), (raised(FLAT, 100, by=1.01), [100]),  # a nat or less is none
    (raised(curve(noise=1.0), 100, by=2.0), []),  # within the noise
    (raised(curve(), *range(100, 200)), [100]),  # to another level, which in time is the usual one
    (FLAT + np.arange(200) * 0.02, []),  # a slow rise
    (raised(FLAT, 100, by=math.inf), []), (raised(FLAT, 100, by=math.nan), []),
    (raised(FLAT, 50, by=-3.0), []),
    (raised(raised(FLAT, *range(60, 99), by=math.nan), 99), []),  # nothing to compare with
    (raised(raised(FLAT, *range(60, 90), by=math.nan), 99), [99]), (FLAT[:20], []),
])
def test_spikes(losses, expected):
    """Of a run whose seed has two others, of which nothing is to be said."""
    quiet = np.full(len(losses), 5.0)
    assert study.spikes({"a": losses, "b": quiet, "c": quiet}) == {"a": expected, "b": [], "c": []}


def test_a_spike_is_above_six_robust_deviations():
    """Half of the 32 before are 4.8, half 5.2: median 5, median distance 0.2; 6 * 0.29652 = 1.779."""
    before = [4.8, 5.2] * 16
    quiet = np.full(34, 5.0)
    for last, expected in ((6.77, []), (6.79, [32])):
        assert study.spikes({"a": np.array([*before, last]), "b": quiet, "c": quiet})["a"] == expected
    early = np.array([50.0, *before, 6.79])  # the 33rd before does not count
    assert study.spikes({"a": early, "b": quiet, "c": quiet})["a"] == [33]


def test_what_the_runs_of_a_seed_share_is_the_datas():
    runs = {name: raised(curve(seed=seed), 60) for seed, name in enumerate("abcd")}
    runs["quiet"] = curve(seed=9)
    assert not any(study.spikes(runs).values())
    runs["c"] = raised(raised(runs["c"], 60, by=2.0), 90)  # higher than the others where all rise, and alone
    assert study.spikes(runs) == {"a": [], "b": [], "c": [60, 90], "d": [], "quiet": []}
    short = {"a": raised(curve(100), 60), "b": raised(curve(seed=1), 60, 150), "c": raised(curve(seed=2), 60),
             "d": np.zeros(0)}  # b and c alone are left at 150: what one of them does is its own
    assert study.spikes(short) == {"a": [], "b": [150], "c": [], "d": []}
    assert study.spikes({"a": raised(curve(), 60)}) == {"a": [60]}  # nothing to tell the data's share by


@pytest.mark.parametrize(("loss", "stuck"), [(5.0, False), (6.49, False), (6.51, True), (6.7, True),
                                             (math.nan, False)])
def test_stuck(loss, stuck):
    assert study.is_stuck(loss, unigram=6.6) is stuck


def test_last_loss():
    assert study.last_loss([9.0] * 50 + [2.0] * 99 + [3.0]) == pytest.approx(2.01)
    assert study.last_loss([4.0, math.nan, 2.0, math.inf]) == 3.0
    assert math.isnan(study.last_loss([math.nan])) and math.isnan(study.last_loss([]))


@pytest.fixture
def data_dir(tmp_path):
    """Train text of 500 ids, all as frequent: a unigram model's loss is log(500) = 6.2146."""
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(2):
        ids = 3 * np.arange(250 * i, 250 * i + 250, dtype=np.uint16)
        write_shard(folder / f"words_train_{i:06d}.npy", ids)
    write_shard(folder / "words_val_000000.npy", np.zeros(100, dtype=np.uint16))
    return folder


def test_a_unigram_models_loss_on_train_text(tmp_path, data_dir):
    assert study.unigram_loss(data_dir) == pytest.approx(math.log(500))
    ids = np.array([0, 0, 7, 9], dtype=np.uint16)  # 1/2 log 2 + 2 * 1/4 log 4
    write_shard(tmp_path / "halves_train_000000.npy", ids)
    assert study.unigram_loss(tmp_path) == pytest.approx(1.5 * math.log(2))


def write_log(folder, lines, data_dir):
    folder.mkdir(parents=True)
    starts = [{"config": {"data_dir": str(path)}} for path in ("moved", data_dir)]  # the last start counts
    text = "".join(f"{json.dumps(start)}\n" for start in starts)
    (folder / "runs.jsonl").write_text(text, encoding="utf-8")
    (folder / "log.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def test_streams_are_read_as_they_were_logged(tmp_path, data_dir):
    """Also where steps are not equally far apart; of a block's norms the first and the last stay as well."""
    steps = [0, 1, 2, 5, 8, 11, 12, 40]
    lines = [f"{step} train {10 - step / 16}" for step in steps] + ["5 train nan", "0 unigram 6.5", "0 lr 1"]
    lines += [f"{step} norm_h0 {1 / (1 + step)}" for step in range(100)]
    lines += ["0 norm_wte 3", "0 norm 4"]
    write_log(tmp_path / "pre_lr1_w0_s1", lines, data_dir)
    (tmp_path / "streams.txt").write_text(study.collect(tmp_path, ["pre_lr1_w0_s1"]), encoding="utf-8")
    streams = study.read_streams(tmp_path / "streams.txt")["pre_lr1_w0_s1"]
    assert sorted(streams) == ["norm_h0", "train", "unigram", "unigram_train"]
    assert streams["unigram_train"][1] == pytest.approx([math.log(500)], rel=1e-5)
    assert streams["train"][0].tolist() == steps
    expected = [10, 9.9375, 9.875, math.nan, 9.5, 9.3125, 9.25, 7.5]
    np.testing.assert_allclose(streams["train"][1], expected, rtol=1e-3)
    kept, norms = streams["norm_h0"]
    assert kept[0] == 0 and kept[-1] == 99 and kept[:study.KEPT].tolist() == list(range(study.KEPT))
    assert len(kept) <= 2 * study.KEPT + 1
    np.testing.assert_allclose(norms, 1 / (1 + kept), rtol=1e-2)
    with pytest.raises(UserError, match="make experiment-norm"):
        study.read_streams(tmp_path / "nowhere" / "streams.txt")


def test_the_rows_of_the_table(tmp_path, data_dir):
    """Two seeds; with the second, Post-LN is stuck at max_lr 1 and gives up, where val is due, at
    max_lr 4, while Pre-LN has not learned much. By depth, a power law."""
    names = []
    for norm, seed, lr in itertools.product(("pre", "post"), (1, 2), (1, 4)):
        gives_up = (norm, seed, lr) == ("post", 2, 4)
        level = {("pre", 2, 4): 6.06, ("post", 2, 1): 6.08}.get((norm, seed, lr), 5.0)  # stuck: above 6.1146
        losses = np.append(np.full(50, 8.0), curve(101, noise=0.02, level=level, seed=seed))
        losses = raised(losses, 120, *([140] if norm == "post" and lr == 1 else []))
        lines = [f"{step} train {losses[step]}" for step in range(101 if gives_up else 150)]
        lines += [f"{step} val 6" for step in range(0, 101 if gives_up else 151, 50)]
        lines += [f"{step} norm_h{i} {seed * (i + 1)}" for step in (0, 10) for i in range(3)]
        lines += [f"{step} skipped {step - 90}" for step in range(91, 101)] if gives_up else []
        names.append(f"{norm}_lr{lr}_w10_s{seed}")
        write_log(tmp_path / names[-1], lines, data_dir)
    for norm, seed, depth in itertools.product(("pre", "post"), (1, 2), (4, 16)):
        names.append(f"{norm}_depth{depth}_s{seed}")
        scale = depth ** -0.5 if norm == "pre" else 1.0
        write_log(tmp_path / names[-1], ["0 train 8.3", *(f"0 norm_h{i} 7" for i in range(depth - 1)),
                                         f"0 norm_h{depth - 1} {scale}"], data_dir)
    (tmp_path / "streams.txt").write_text(study.collect(tmp_path, names), encoding="utf-8")
    rows, starts = study.judge(study.read_streams(tmp_path / "streams.txt"))
    rows = {row["run"]: row for row in rows}
    expected = np.mean(raised(curve(101, noise=0.02, seed=1), 70)[:100])
    assert rows["pre_lr1_w10_s1"]["last_loss"] == pytest.approx(expected, abs=1e-3)
    # step 120 is the data's
    assert {name: row["spikes"] for name, row in rows.items() if row["spikes"]} == {
        "post_lr1_w10_s1": 1, "post_lr1_w10_s2": 1}
    assert [name for name, row in rows.items() if row["stuck"]] == ["post_lr1_w10_s2"]
    lost = rows.pop("post_lr4_w10_s2")
    assert lost["diverged"] and math.isnan(lost["last_loss"])
    assert lost["skipped"] == 10 and lost["steps"] == 101
    assert not any(row["diverged"] or row["skipped"] for row in rows.values())
    assert [lost[key] for key in ("norm_first_block", "norm_last_block")] == [2, 6]
    assert starts["post", 3].tolist() == [[1, 2, 3], [2, 4, 6]]
    only_depths = {key: value for key, value in starts.items() if key[1] != 3}
    assert study.slope(only_depths, "pre") == pytest.approx(-0.5, abs=0.01)
    assert study.slope(only_depths, "post") == pytest.approx(0, abs=0.01)
    study.report(tmp_path)
    table = (tmp_path / "table.txt").read_text(encoding="utf-8")
    cells = {tuple(line.split()[:3]): line.split()[3:] for line in table.splitlines()}
    assert cells["Post-LN", "10", "1"][:5] == ["2", "0", "1", "2", "0"]  # runs to skipped
    assert cells["Post-LN", "10", "4"][:5] == ["2", "1", "0", "0", "10"]
    stuck, learned = rows["post_lr1_w10_s2"]["last_loss"], rows["post_lr1_w10_s1"]["last_loss"]
    assert cells["Post-LN", "10", "1"][5:] == [f"{learned:.4f}", f"{learned:.4f}", f"{stuck:.4f}"]
    assert cells["Post-LN", "10", "4"][-1] == "nan" and "6.2146 on train text" in table
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_gradients_at_initialisation_are_those_of_theory(monkeypatch):
    """Theorem 1 of Xiong et al. 2020 where it speaks; GPT-2's own initialisation leaves no trace of depth."""
    import theory  # and torch

    monkeypatch.setattr(theory, "DEPTHS", (2, 8, 32))

    def power(norm, start):
        return theory.power([theory.last_norm(norm, depth, 1, start) for depth in theory.DEPTHS])

    assert -0.6 < power("pre", theory.as_in_the_theorem) < -0.3
    assert -0.1 < power("post", theory.as_in_the_theorem) < 0.2
    assert abs(power("pre", theory.GPT.train)) < 0.1 and abs(power("post", theory.GPT.train)) < 0.1
    as_gpt2 = [theory.last_norm(norm, 8, 1, theory.GPT.train) for norm in ("pre", "post")]
    assert as_gpt2[0] > 10 * as_gpt2[1]  # the residual stream starts small, and the last norm divides by it


@pytest.mark.parametrize("norms", [["0 norm_h0 nan", "1 norm_h0 nan"], []])
def test_a_figure_without_a_gradient_norm(tmp_path, data_dir, norms):
    for norm in ("pre", "post"):
        write_log(tmp_path / f"{norm}_lr1_w0_s1", ["0 unigram 5", "0 val nan", "0 train nan", *norms],
                  data_dir)
    runs = ["pre_lr1_w0_s1", "post_lr1_w0_s1"]
    (tmp_path / "streams.txt").write_text(study.collect(tmp_path, runs), encoding="utf-8")
    study.report(tmp_path)
    assert (tmp_path / "figure.png").exists()


def study_command(log_dir, config, **overrides):
    settings = {"train_config": config, "log_dir": log_dir, "max_lrs": "1e-2,1e30", "warmups": "0",
                "seeds": "1", "depths": "1", "parallel_runs": 2, **overrides}
    return [sys.executable, str(ROOT / "results" / "norm_study" / "run.py"),
            *(f"--{key}={value}" for key, value in settings.items())]


def run_study(log_dir, config, **overrides):
    quick = f"import sys; sys.executable = {PYTHON!r}; {RUN_THE_REST}"  # the trainings start at once
    return subprocess.run([PYTHON, "-c", quick, *study_command(log_dir, config, **overrides)[1:]], text=True,
                          capture_output=True, env=ENVIRONMENT, timeout=600)


@pytest.fixture
def config(flags, tmp_path):
    flags |= {"max_steps": 4, "warmup_steps": 0, "checkpoint_interval": 0, "val_interval": 2,
              "max_bad_steps": 2, "grad_norm_interval": 1, "compile": False}
    path = tmp_path / "config.py"
    path.write_text("".join(f"{key} = {value if isinstance(value, (int, float)) else str(value)!r}\n"
                            for key, value in flags.items()), encoding="utf-8")
    return path


def test_the_study_goes_on_after_a_kill_and_counts_what_diverges(config, tmp_path, request):
    folder = tmp_path / "study"
    killed = subprocess.Popen(study_command(folder, config, flags="--max_steps=100000"), env=ENVIRONMENT)
    request.addfinalizer(killed.kill)  # where this test fails before it does that
    log = folder / "pre_lr0.01_w0_s1" / "log.txt"
    while not (log.exists() and " train " in log.read_text(encoding="utf-8")):
        assert killed.poll() is None
        time.sleep(0.05)
    second = run_study(folder, config)
    assert second.returncode == 2 and "a study is at work in" in second.stderr
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    deadline, size = time.monotonic() + 60, -1
    while size != log.stat().st_size:  # its runs end with it
        assert time.monotonic() < deadline
        size = log.stat().st_size
        time.sleep(0.5)
    # what was begun with other settings is not taken for a run of these
    other = run_study(folder, config)
    assert other.returncode == 2 and "with other flags" in other.stderr, other.stderr
    for name in ("pre", "post"):
        path = folder / f"{name}_lr0.01_w0_s1" / "study.json"
        record = json.loads(path.read_text(encoding="utf-8"))
        assert "outcome" not in record
        record["flags"].remove("--max_steps=100000")  # as if it had been a run of these
        path.write_text(json.dumps(record), encoding="utf-8")

    done = run_study(folder, config)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 of 6" in done.stdout
    with open(folder / "runs.csv", encoding="utf-8") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert {name: row["diverged"] for name, row in rows.items()} == {
        "pre_lr0.01_w0_s1": "False", "post_lr0.01_w0_s1": "False", "pre_lr1e+30_w0_s1": "True",
        "post_lr1e+30_w0_s1": "True"}
    assert not any(row["stuck"] == "True" for row in rows.values() if row["diverged"] == "True")
    outcomes = {name: json.loads((folder / name / "study.json").read_text(encoding="utf-8"))["outcome"]
                for name in (*rows, "pre_depth1_s1", "post_depth1_s1")}
    assert [name for name, outcome in outcomes.items() if outcome == "gave up"] == [
        name for name in rows if "1e+30" in name]
    # each run is what its name says
    for name in rows:
        *_, start = (folder / name / "runs.jsonl").read_text(encoding="utf-8").splitlines()
        settings = json.loads(start)["config"]
        assert name == (f"{settings['norm_position']}_lr{settings['max_lr']:g}_w{settings['warmup_steps']}_"
                        f"s{settings['seed']}")
        assert settings["min_lr"] == pytest.approx(settings["max_lr"] / 10)
        assert settings["max_steps"] == 4 and not list((folder / name).glob("ckpt_*"))
    assert "norm_h0 0 1 " in (folder / "streams.txt").read_text(encoding="utf-8")

    # finished runs are left alone
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*")}
    table = (folder / "table.txt").read_text(encoding="utf-8")
    again = run_study(folder, config)
    assert again.returncode == 0 and again.stdout.startswith(table), again.stderr
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/*")} == before


def test_any_other_failure_ends_the_study(config, tmp_path):
    done = run_study(tmp_path / "study", config, flags="--n_head=3", parallel_runs=1)
    assert done.returncode == 2 and "n_head=3" in done.stderr and "run this again" in done.stderr
    for wrong, words in (({"max_lrs": "fast"}, "max_lrs=fast"), ({"seeds": "", "depths": ""}, "got no runs"),
                         ({"train_config": "config/none.py"}, "no such file")):
        done = run_study(tmp_path / "other", config, **wrong)
        assert done.returncode == 2 and words in done.stderr and not (tmp_path / "other").exists()


def test_a_report_of_no_run_writes_nothing(config, tmp_path):
    (tmp_path / "study").mkdir()
    done = run_study(tmp_path / "study", config, report_only=True)
    assert done.returncode == 2 and "no finished run there; leave out --report_only" in done.stderr
    assert not list((tmp_path / "study").iterdir())
