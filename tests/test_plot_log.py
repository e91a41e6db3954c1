"""Figures of logs: what is parsed is what was logged, and every kind of log is drawn."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from configurator import UserError
from plot_log import parse_log, smooth

ROOT = Path(__file__).resolve().parent.parent


def plot(cwd, *flags):
    command = [sys.executable, str(ROOT / "plot_log.py"), *flags]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


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


def test_smooth_is_the_mean_of_the_last_values():
    values = np.arange(10.0) ** 2
    expected = [values[max(0, i - 2) : i + 1].mean() for i in range(10)]
    np.testing.assert_allclose(smooth(values, 3), expected)
    np.testing.assert_allclose(smooth(values, 1), values)


@pytest.mark.parametrize(("hella", "model_size"), [(False, ""), (True, "124M"), (True, ""), (False, "1558M")])
def test_a_figure_is_drawn(tmp_path, hella, model_size):
    write_log(tmp_path / "log", hella)
    done = plot(tmp_path, f"--model_size={model_size}")
    assert done.returncode == 0, done.stderr
    last = f"train 2.51189, val {10.5 * 76**-0.3:.6g}{', hella 0.325' if hella else ''}"
    assert done.stdout == f"log, last values: {last}\nfigure: log/log_plot.png\n"
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
    for flag, words in [("--log_dir=nosuch", "no log.txt"), ("--model_size=1B", "wanted one of 124M"),
                        ("--out=figure.txt", "--out=FIGURE.png"), ("--out=/proc/x/y.png", "/proc/x")]:
        done = plot(tmp_path, flag)
        assert done.returncode == 2 and words in done.stderr
