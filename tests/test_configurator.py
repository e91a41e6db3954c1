"""Settings: every trap that users of nanoGPT's configurator fell into, and every shipped config file."""

import subprocess
import sys
from pathlib import Path

import pytest
from training import PYTHON

from configurator import UserError, configure

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = '''
"""A script."""
batch_size = 16  # sequences
learning_rate = 6e-4  # peak
grad_clip = 1.0
compile = True
wandb_run_name = "gpt2"  # name # with a hash
out_dir = "out"
start = "\\n"
top_p: float | None = None  # nucleus
stop_at: int | None = 5
CONSTANT = 3
_private = 1
from configurator import configure
config = configure(globals())
for key, value in config.items():
    print(f"{key}={value!r}")
'''


@pytest.fixture
def namespace(tmp_path):
    """A script's globals as configure sees them: settings, and what is none."""
    names = {"__file__": str(tmp_path / "script.py"), "__name__": "__main__", "CONSTANT": 3, "_private": 1,
             "sys": sys, "configure": configure,
             "__annotations__": {"top_p": float | None, "stop_at": int | None}}
    names.update(batch_size=16, learning_rate=6e-4, grad_clip=1.0, compile=True, wandb_run_name="gpt2",
                 out_dir="out", start="\n", top_p=None, stop_at=5)
    return names


@pytest.mark.parametrize(("flag", "key", "value"), [
    ("--learning_rate=1", "learning_rate", 1.0),
    ("--grad_clip=0", "grad_clip", 0.0),
    ("--batch_size=1e3", "batch_size", 1000),
    ("--batch_size=1_024", "batch_size", 1024),
    ("--batch_size=9007199254740993", "batch_size", 2**53 + 1),
    ("--wandb_run_name=124", "wandb_run_name", "124"),
    ("--compile=false", "compile", False),
    ("--compile=False", "compile", False),
    ("--compile=0", "compile", False),
    ("--compile=TRUE", "compile", True),
    ("--compile", "compile", True),
    ("--out_dir=None", "out_dir", "None"),
    ("--out_dir=", "out_dir", ""),
    ("--start=FILE:a=b.txt", "start", "FILE:a=b.txt"),
    ("--start==", "start", "="),
    ("--learning-rate=1e-3", "learning_rate", 1e-3),
    ("--top_p=0.9", "top_p", 0.9),
    ("--top-p=1", "top_p", 1.0),
    ("--stop_at=None", "stop_at", None),
    ("--stop_at=none", "stop_at", None),
])
def test_good_flags(namespace, flag, key, value):
    before = dict(namespace)
    resolved = configure(namespace, [flag])
    assert resolved[key] == value and type(resolved[key]) is type(value)
    assert namespace == {**before, key: value}  # and nothing else has leaked into the script
    assert list(resolved) == ["batch_size", "learning_rate", "grad_clip", "compile", "wandb_run_name",
                              "out_dir", "start", "top_p", "stop_at"]


@pytest.mark.parametrize(("flag", "words"), [
    ("--batchsize=8", "did you mean batch_size"),
    ("--batch_size=1.5", "wanted a whole number"),
    ("--batch_size=1e-3", "wanted a whole number"),
    ("--batch_size=eight", "wanted a whole number"),
    ("--batch_size=", "wanted a whole number"),
    ("--batch_size", "needs a value"),
    ("--batch_size=none", "wanted a whole number"),
    ("--learning_rate=nan", "wanted a number"),
    ("--learning_rate=inf", "wanted a number"),
    ("--compile=maybe", "wanted true or false"),
    ("--compile=2", "wanted true or false"),
    ("--compile=", "wanted true or false"),
    ("--__name__=x", "unknown setting"),
    ("--_private=2", "unknown setting"),
    ("--CONSTANT=4", "unknown setting"),
    ("--configure=4", "unknown setting"),
    ("--sys=4", "unknown setting"),
    ("-batch_size=8", "wanted --key=value"),
    ("batch_size=8", "not found"),
    ("config/nosuch.py", "not found"),
])
def test_bad_flags(namespace, flag, words):
    before = dict(namespace)
    with pytest.raises(UserError, match=words):
        configure(namespace, ["--grad_clip=3", flag])
    assert namespace == before  # a mistake anywhere changes nothing


def test_order_later_wins(namespace, tmp_path):
    (tmp_path / "a.py").write_text("batch_size = 1\nlearning_rate = 1\n", encoding="utf-8")
    (tmp_path / "b.py").write_text("batch_size = 2e0\n", encoding="utf-8")
    a, b = str(tmp_path / "a.py"), str(tmp_path / "b.py")
    assert configure(dict(namespace), [a, b])["batch_size"] == 2
    assert configure(dict(namespace), [b, a])["batch_size"] == 1
    assert configure(dict(namespace), ["--batch_size=3", a])["batch_size"] == 1
    resolved = configure(dict(namespace), [a, "--batch_size=3", "--batch-size=4"])
    assert resolved["batch_size"] == 4 and resolved["learning_rate"] == 1.0


@pytest.mark.parametrize(("text", "words"), [
    ("batchsize = 8", "unknown setting 'batchsize'; did you mean batch_size"),
    ("Batch_Size = 8", "unknown setting"),
    ("import os", "unknown setting 'os'"),
    ("batch_size = '8'", "batch_size = '8' is str, wanted a whole number"),
    ("batch_size = True", "is bool, wanted a whole number"),
    ("batch_size = 1.5", "is float"),
    ("batch_size = None", "is NoneType"),
    ("compile = 1", "is int, wanted true or false"),
    ("out_dir = 1", "is int, wanted text"),
    ("learning_rate = [1]", "is list, wanted a number"),
    ("learning_rate = float('nan')", "is float, wanted a number"),
    ("\nbatch_size = (", "line 2"),
    ("\n\nbatch_size = 1 / 0", "line 3: ZeroDivisionError"),
])
def test_bad_config_files(namespace, tmp_path, text, words):
    path = tmp_path / "bad.py"
    path.write_text(text, encoding="utf-8")
    before = dict(namespace)
    with pytest.raises(UserError, match=words) as error:
        configure(namespace, [str(path)])
    assert str(path) in str(error.value) and namespace == before


def test_config_file_beside_the_script_from_any_folder(namespace, tmp_path, monkeypatch):
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "small.py").write_text("batch_size = 7\ntop_p = None\n", encoding="utf-8")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert configure(dict(namespace), ["config/small.py"])["batch_size"] == 7
    with pytest.raises(UserError, match=r"try config/small\.py"):
        configure(namespace, ["config/smal.py"])


def run(tmp_path, *args):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    return subprocess.run([sys.executable, str(script), *args], capture_output=True, text=True,
                          env={"PYTHONPATH": str(ROOT)}, cwd=tmp_path)


def test_as_a_script(tmp_path):
    done = run(tmp_path, "--batch_size=8", "--start=a=b c")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "batch_size=8" and "start='a=b c'" in done.stdout


def test_a_mistake_exits_2_without_a_traceback(tmp_path):
    done = run(tmp_path, "--batchsize=8")
    assert done.returncode == 2 and done.stdout == ""
    message = "unknown setting 'batchsize'; did you mean batch_size? (--help lists all)"
    assert done.stderr == f"error: flag --batchsize=8: {message}\n"


def test_a_full_disk_exits_2_and_a_closed_pipe_is_quiet(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"{SCRIPT}\nopen('/dev/full', 'wb', buffering=0).write(b'x')\n", encoding="utf-8")
    for command, code, words in [(f"{sys.executable} {script}", 2, "no space left on the disk"),
                                 (f"{sys.executable} {script} --help | true", 0, "")]:
        done = subprocess.run(command, shell=True, capture_output=True, text=True,
                              env={"PYTHONPATH": str(ROOT)})
        assert done.returncode == code and words in done.stderr and "Traceback" not in done.stderr


def test_help_lists_key_type_default_and_comment(tmp_path):
    done = run(tmp_path, "--help")
    assert done.returncode == 0
    lines = {line.split("=")[0].strip(): line for line in done.stdout.splitlines() if line.startswith("  --")}
    assert len(lines) == 9
    assert lines["--batch_size"].split() == ["--batch_size=16", "int", "sequences"]
    assert lines["--wandb_run_name"].endswith("name # with a hash")
    assert "float or none" in lines["--top_p"]
    assert lines["--grad_clip"].split() == ["--grad_clip=1.0", "float"]


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.py")), ids=lambda path: path.name)
def test_every_config_file_fits_train_gpt2(path, tmp_path):
    flags = [f"--data_dir={tmp_path}/none", f"--log_dir={tmp_path}/log", "--device=cpu", "--compile=false"]
    done = subprocess.run([PYTHON, str(ROOT / "train_gpt2.py"), str(path), *flags],
                          capture_output=True, text=True)
    # settings are all accepted: the first thing missed is the data
    assert done.returncode == 2 and "make prepare" in done.stderr, done.stderr
    assert not (tmp_path / "log").exists()
