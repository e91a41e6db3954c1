"""Settings: every trap that users of nanoGPT's configurator fell into, and every shipped config file."""

import functools
import math
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import analyze_compute
from configurator import (
    OTHER_NAMES,
    Between,
    OneOf,
    PathName,
    UserError,
    annotations_of,
    configure,
    is_torchrun,
)

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [path for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("experiments/*.py")])
           if re.search(r"^from configurator import .*\bconfigure\b", path.read_text(encoding="utf-8"), re.M)]
SCRIPT = '''
"""A script."""
from configurator import Between, OneOf, PathName, configure
batch_size: Between(1, 65_536) = 16  # sequences
learning_rate: Between(0, 10**9) = 6e-4  # peak
optimizer: OneOf("adamw", "muon") = "adamw"
grad_clip = 1.0
compile = True
wandb_run_name = "gpt2"  # name # with a hash
out_dir: PathName = "out"
start = "\\n"
top_p: Between(0, 1.0) = 1.0  # nucleus
CONSTANT = 3
_private = 1
config = configure(globals())
for key, value in config.items():
    print(f"{key}={value!r}")
'''


@functools.cache
def globals_of(path):
    sys.path.append(str(path.parent))  # where Python finds what a script stands beside
    try:
        return runpy.run_path(str(path))  # not as __main__
    finally:
        sys.path.pop()


def settings_of(path):
    """What `configure` is given by a script."""
    if path.name not in ("train_gpt2.py", "analyze_compute.py"):
        return dict(globals_of(path))
    own, settings = vars(analyze_compute), analyze_compute.train_settings()  # of both scripts
    if path.name == "analyze_compute.py":
        return {**own, **settings}
    limits = settings["__annotations__"].items()
    return {**settings, "__file__": str(path),
            "__annotations__": {key: limit for key, limit in limits if key not in own}}


@pytest.fixture
def namespace(tmp_path):
    """A script's globals as configure sees them: settings, and what is none."""
    names = {"__file__": str(tmp_path / "script.py"), "__name__": "__main__", "CONSTANT": 3, "_private": 1,
             "sys": sys, "configure": configure, "nothing": None}
    names.update(batch_size=16, learning_rate=6e-4, grad_clip=1.0, compile=True, wandb_run_name="gpt2",
                 out_dir="out", start="\n")
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
])
def test_good_flags(namespace, flag, key, value):
    before = dict(namespace)
    resolved = configure(namespace, [flag])
    assert resolved[key] == value and type(resolved[key]) is type(value)
    assert namespace == {**before, key: value}  # and nothing else has leaked into the script
    assert list(resolved) == ["batch_size", "learning_rate", "grad_clip", "compile", "wandb_run_name",
                              "out_dir", "start"]


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
    (f"--learning_rate={400 * '9'}", "wanted a number"),
    ("--batch_size=nan", "wanted a whole number"),
    ("--batch_size=inf", "wanted a whole number"),
    ("--compile=maybe", "wanted true or false"),
    ("--compile=2", "wanted true or false"),
    ("--compile=", "wanted true or false"),
    ("--__name__=x", "unknown setting"),
    ("--_private=2", "unknown setting"),
    ("--CONSTANT=4", "unknown setting"),
    ("--configure=4", "unknown setting"),
    ("--sys=4", "unknown setting"),
    ("--nothing=4", "unknown setting"),
    ("-batch_size=8", "or --key=value for a setting"),
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
    ("batch_size = '8'", "batch_size = '8': wanted a whole number"),
    ("batch_size = True", "batch_size = True: wanted a whole number"),
    ("batch_size = 1.5", "1.5: wanted a whole number"),
    ("batch_size = None", "None: wanted a whole number"),
    ("compile = 1", "compile = 1: wanted true or false"),
    ("out_dir = 1", "out_dir = 1: wanted text"),
    ("learning_rate = [1]", "learning_rate = .1.: wanted a number"),
    ("learning_rate = float('nan')", "learning_rate = nan: wanted a number"),
    ("\nbatch_size = (", "line 2"),
    ("\n\nbatch_size = 1 / 0", "line 3: ZeroDivisionError"),
    ("\n\nexit()", "line 3: SystemExit"),  # not the quiet end of a script that did nothing
    ("import sys\nsys.exit(0)", "line 2: SystemExit"),
    ("def f():\n    raise KeyError('x')\n\n\nf()", "line 2: KeyError"),
    ("batch_size = 8\0", "null bytes"),
])
def test_bad_config_files(namespace, tmp_path, text, words):
    path = tmp_path / "bad.py"
    path.write_text(text, encoding="utf-8")
    before = dict(namespace)
    with pytest.raises(UserError, match=words) as error:
        configure(namespace, [str(path)])
    assert str(path) in str(error.value) and namespace == before


def test_text_of_config_files(namespace, tmp_path):
    path = tmp_path / "a.py"
    path.write_bytes(b"\xef\xbb\xbfbatch_size = 7\n")  # as Notepad saves it
    assert configure(namespace, [str(path)])["batch_size"] == 7
    path.write_bytes("batch_size = 7\n".encode("utf-16"))
    with pytest.raises(UserError, match=r"a\.py, line"):
        configure(namespace, [str(path)])


@pytest.mark.parametrize("how", ["__annotations__", "__annotate__"])  # the latter: Python 3.14
def test_annotations_are_checked_in_flags_and_files(namespace, tmp_path, how):
    limits = {"batch_size": Between(1, 99), "grad_clip": Between(0, 1 - 1e-9),
              "wandb_run_name": OneOf("gpt2", "gpt3", "")}
    with pytest.raises(UserError, match=r"grad_clip=1\.0: wanted 0 to"):  # a default
        configure({**namespace, "__annotations__": limits}, [])
    namespace["grad_clip"] = 0.5
    namespace[how] = limits if how == "__annotations__" else {1: limits}.__getitem__  # 1: values, no strings
    path = tmp_path / "a.py"
    for key, text, value in [("batch_size", "99.0", 99), ("grad_clip", "0", 0.0)]:
        path.write_text(f"{key} = {text}", encoding="utf-8")
        for arg in (f"--{key}={text}", str(path)):
            found = configure(dict(namespace), [arg])[key]
            assert found == value and type(found) is type(value)
    assert configure(dict(namespace), ["--wandb_run_name="])["wandb_run_name"] == ""
    for key, text, wanted in [
        ("batch_size", "0", "1 to 99"), ("batch_size", "1" * 4000, "1 to 99"),
        ("batch_size", "1.5", r"1 to 99 \(a whole number\)"), ("batch_size", "None", "1 to 99"),
        ("grad_clip", "-1e-300", "0 to 0.999999999"), ("grad_clip", "1", "0 to 0.999999999"),
        ("grad_clip", "1e310", "0 to 0.999999999"), ("wandb_run_name", "gpt4", "gpt2, gpt3 or nothing"),
    ]:
        path.write_text(f"{key} = {text!r}" if text == "gpt4" else f"{key} = {text}", encoding="utf-8")
        for arg, where in ((f"--{key}={text}", f"flag --{key}={text}"), (str(path), rf"a\.py: {key} = .*")):
            with pytest.raises(UserError, match=f"{where}: wanted {wanted}"):
                configure(namespace, [arg])


def test_home_folder(namespace, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USERPROFILE", "/home/me")
    namespace.update(out_dir="~/default", __annotations__={"out_dir": PathName})
    for flags, path in [([], "/home/me/default"), (["--out_dir=~"], "/home/me"), (["--out_dir=gpt2"], "gpt2"),
                        (["--out_dir=~/a/*.txt,b~,~/c"], "/home/me/a/*.txt,b~,/home/me/c")]:
        assert configure(dict(namespace), flags)["out_dir"] == path
    (tmp_path / "a.py").write_text("out_dir = 1", encoding="utf-8")
    with pytest.raises(UserError, match="out_dir = 1: wanted text"):
        configure(namespace, [str(tmp_path / "a.py")])
    assert configure(namespace, ["--start=~/a,~/b"])["start"] == "~/a,~/b"  # a prompt is no path


# ---- advice for mistakes that people make


@pytest.mark.parametrize(("argv", "words"), [
    (["--batch_size", "100"], "flag --batch_size: needs a value after an equals sign; type --batch_size=100"),
    (["--out-dir", "x.py"], "type --out_dir=x.py"),
    (["--compile", "false"], "type --compile=false"),
    (["--batch_size", "--compile"], "type --batch_size=VALUE"),
    (["--compile", "nosuch.py"], "config file nosuch.py: not found"),
])
def test_a_space_in_place_of_the_equals_sign(namespace, argv, words):
    with pytest.raises(UserError, match=f"{words}$" if "type" in words else words):
        configure(namespace, argv)
    assert configure(namespace, ["--compile"])["compile"] is True


def test_names_of_nanogpt_and_llm_c(namespace, tmp_path):
    settings = settings_of(ROOT / "train_gpt2.py")
    for theirs, ours in OTHER_NAMES.items():
        assert ours.partition(",")[0] in settings
        with pytest.raises(UserError, match=rf"'{theirs}'; its name here is {re.escape(ours)} \("):
            configure(settings, [f"--{theirs}=1"])
    path = tmp_path / "theirs.py"
    path.write_text("learning_rate = 1\n", encoding="utf-8")
    with pytest.raises(UserError, match="its name here is max_lr "):
        configure(settings, [str(path)])
    assert configure(namespace, ["--out_dir=x", str(path)])["out_dir"] == "x"  # a setting of this script
    with pytest.raises(UserError, match="'max_iters'; known: batch_size"):  # which has no max_steps
        configure(namespace, ["--max_iters=1"])


@pytest.mark.parametrize("name", ["input.txt", "data", "folder.py"])
def test_what_is_no_config_file_is_named_as_such(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("input.txt").write_text("batch_size = 1\n", encoding="utf-8")
    Path("data").mkdir()
    Path("folder.py").mkdir()
    words = f"{name} is not a config file (.py); flags that take a path: --input={name}, --data_dir={name}, "
    with pytest.raises(UserError, match=re.escape(words)):
        configure(settings_of(ROOT / "fineweb.py"), [name])


# ---- the settings of all scripts

PATHS = {"checkpoint", "data_dir", "hellaswag_data", "init_from", "input", "log_dir", "out", "out_dir",
         "tokenizer"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_every_number_has_a_range_that_its_default_keeps(path):
    settings = configure(settings_of(path), [])
    limits = {key: limit for key, limit in annotations_of(settings_of(path)).items() if key.islower()}
    assert settings and limits.keys() <= settings.keys()
    for key, value in settings.items():
        limit = limits.get(key)
        assert isinstance(limit, Between) or type(value) in (bool, str), f"{key}: no Between stands beside it"
        assert limit is PathName or key not in PATHS, f"{key}: no PathName stands beside it"
        assert isinstance(limit, OneOf) or key != "dtype"
        if isinstance(limit, (Between, OneOf)):
            assert value in limit, key


@pytest.mark.parametrize(("flag", "words"), [
    ("norm_position=mid", "wanted pre or post"), ("max_steps=0", "wanted 1 to"), ("beta1=1.5", "wanted 0 to"),
    ("max_new_tokens=0", "wanted 1 to"), ("grad_clip=-1", "wanted 0 to"), ("seed=-1", "wanted 0 to"),
    ("dtype=int8", "wanted auto, float32"), ("stride=-1", "wanted 0 to"), ("num_samples=0", "wanted 1 to")])
def test_limits_that_matter(flag, words):
    script = "generate.py" if flag.startswith(("stride", "num_samples")) else "train_gpt2.py"
    with pytest.raises(UserError, match=f"{flag}: {words}"):
        configure(settings_of(ROOT / script), [f"--{flag}"])


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_what_is_outside_of_a_range_is_refused(path):
    settings = settings_of(path)
    before = ["--min_lr=0"] if "min_lr" in settings else []  # which once switched the other checks off

    def value_of(key, value):
        return configure(dict(settings), [*before, f"--{key}={value}"])[key]

    for key, limit in annotations_of(settings).items():
        if isinstance(limit, Between):
            whole = type(settings[key]) is not float
            below = limit.low - 1 if whole else math.nextafter(limit.low, -math.inf)
            above = limit.high + 1 if whole else math.nextafter(limit.high, math.inf)
            for value, limited in ((below, True), (above, True), (limit.low, False), (limit.high, False)):
                if not limited:
                    assert value_of(key, value) == value
                    continue
                with pytest.raises(UserError, match=re.escape(f"flag --{key}={value}: wanted {limit} (")):
                    value_of(key, value)
        elif isinstance(limit, OneOf):
            assert [value_of(key, word) for word in limit] == list(limit)
            with pytest.raises(UserError, match=f"flag --{key}=sgd,: wanted {limit}"):
                value_of(key, "sgd,")


def test_config_file_beside_the_script_from_any_folder(namespace, tmp_path, monkeypatch):
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "small.py").write_text("batch_size = 7\n", encoding="utf-8")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert configure(dict(namespace), ["config/small.py"])["batch_size"] == 7
    with pytest.raises(UserError, match=r"try config/small\.py"):
        configure(namespace, ["config/smal.py"])


def run(tmp_path, *args, more=""):
    script = tmp_path / "script.py"
    script.write_text(f"{SCRIPT}\n{more}\n", encoding="utf-8")
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


def test_a_name_that_is_not_utf8_is_one_line(tmp_path):
    for argument in (b"--out_dir=caf\xe9.txt", b"caf\xe9.py"):
        done = run(tmp_path, argument)
        assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
        assert "caf\\udce9" in done.stderr and "is not UTF-8; rename the file" in done.stderr
    assert "out_dir='café.txt'" in run(tmp_path, "--out_dir=café.txt").stdout


@pytest.mark.parametrize(("command", "is_one"), [
    ("python /venv/bin/torchrun --nproc_per_node=2 train_gpt2.py", True),
    ("python -m torch.distributed.run train_gpt2.py", True),
    ("/opt/pytorch/bin/python -m torch.distributed.launch train_gpt2.py", True),
    ("bash /home/me/torch/run.sh", False), ("/opt/pytorch/bin/python -m pytest", False)])
def test_torchrun_is_known_by_the_name_of_its_command(command, is_one):
    assert is_torchrun(command.replace(" ", "\0").encode()) == is_one
    assert not is_torchrun(b"\0".join((b"sh", b"-c", command.encode(), b"")))


def test_a_full_disk_exits_2_and_a_closed_pipe_is_quiet(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"{SCRIPT}\nopen('/dev/full', 'wb', buffering=0).write(b'x')\n", encoding="utf-8")
    for command, code, words in [(f"{sys.executable} {script}", 2, "No space left on device"),
                                 (f"{sys.executable} {script} --help | true", 0, "")]:
        done = subprocess.run(command, shell=True, capture_output=True, text=True,
                              env={"PYTHONPATH": str(ROOT)})
        assert done.returncode == code and words in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("cleaning_up", [
    "pass", "raise RuntimeError('cannot release un-acquired lock')",
    "try:\n        raise OSError\n    except OSError as error:\n        raise ValueError from error"])
def test_an_interrupt_exits_130_also_when_cleaning_up_fails(tmp_path, cleaning_up):
    """As tqdm.write's does when Ctrl-C comes before it has its lock."""
    done = run(tmp_path, more=f"try:\n    raise KeyboardInterrupt\nfinally:\n    {cleaning_up}")
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_help_lists_key_type_default_and_comment(tmp_path):
    done = run(tmp_path, "--help")
    assert done.returncode == 0
    lines = {line.split("=")[0].strip(): line for line in done.stdout.splitlines() if line.startswith("  --")}
    assert len(lines) == 9
    assert re.fullmatch(r" +--batch_size=16 +1 to 65,536 \(a whole .* +sequences", lines["--batch_size"])
    assert lines["--optimizer"].endswith("  adamw or muon") and lines["--out_dir"].endswith("  text")
    assert lines["--wandb_run_name"].endswith("name # with a hash")
    assert re.search(r"  0 to 1.0 \(a number\) +nucleus", lines["--top_p"])
    assert lines["--grad_clip"].split() == ["--grad_clip=1.0", "a", "number"]


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.py")), ids=lambda path: path.name)
def test_every_config_file_fits_train_gpt2(path):
    assert configure(settings_of(ROOT / "train_gpt2.py"), [str(path)])
