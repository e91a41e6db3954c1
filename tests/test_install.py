"""The ways in: pyproject.toml, make, uv, Slurm, GitHub's machines, and what git ignores."""

import ast
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
import tomllib
import venv
from pathlib import Path

import pytest
import yaml
from test_configurator import settings_of

from configurator import PathName, annotations_of, configure

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
SCRIPTS = sorted(ROOT.glob("*.py"))
needs_make = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no make")


# ---- dependencies --------------------------------------------------------------


def names_of(requirements):
    return {re.match(r"[a-zA-Z0-9_-]+", line)[0] for line in requirements}


def imported(paths):
    """The packages that files import, wherever they do: those of the standard library and ours left out."""
    names = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module.partition(".")[0])
    folders = ROOT, ROOT / "experiments", ROOT / "tests"
    ours = {path.stem for folder in folders for path in folder.glob("*.py")}
    return names - ours - set(sys.stdlib_module_names)


def test_dependencies_are_what_the_scripts_import():
    run = names_of(PROJECT["project"]["dependencies"])
    dev = names_of(PROJECT["project"]["optional-dependencies"]["dev"])
    with_others = {"llvmlite", "regex", "tiktoken_ext", "packaging", "yaml"}  # numba, tiktoken, the hub
    optional = {"wandb", "gigatoken", "transformers", "tokenizers"}  # where they are used, with a message
    assert imported([*SCRIPTS, *ROOT.glob("experiments/*.py")]) - with_others - optional == run
    assert imported(ROOT.glob("tests/*.py")) - with_others - run == dev - {"pytest-xdist", "ruff"}


def test_what_is_pinned_is_what_is_asked_for():
    from packaging.requirements import Requirement

    wanted = {Requirement(line).name: Requirement(line) for line in PROJECT["project"]["dependencies"]}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    assert [pin.name for pin in pins] == ["torch"]
    for pin in pins:
        (exact,) = pin.specifier
        assert exact.operator == "==" and wanted[pin.name].specifier.contains(exact.version)
    assert wanted["torch"].specifier.contains("2.11.0") and not wanted["torch"].specifier.contains("2.10.0")


def test_an_installation_has_no_modules():
    """A script's name as a module of every environment would hide others' modules."""
    assert PROJECT["tool"]["setuptools"] == {"py-modules": []} and PROJECT["tool"]["uv"] == {"package": False}


# ---- make ----------------------------------------------------------------------


def make(*arguments, **environment):
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True, check=True,
                          env={**inherited, **environment})  # of `make test`, which runs this
    return done.stdout


@needs_make
def test_make_help_lists_the_targets():
    documented = re.findall(r"^([a-z-]+):.*?  ## (.*)$", MAKEFILE, re.M)
    assert make("help") == "".join(f"{name:16}{text}\n" for name, text in documented)
    (targets,) = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.M)
    assert {name for name, _ in documented} | {"vocabulary", "python4k"} == set(targets.split())


@needs_make
@pytest.mark.parametrize("with_pip", [True, False])
def test_make_installs_into_the_environment_it_is_given(tmp_path, with_pip):
    """With pip, or where uv made the environment with uv; without torch there, the tested one."""
    python = tmp_path / "environment" / "bin" / "python"
    venv.create(python.parent.parent, with_pip=False)
    if with_pip:
        (site,) = python.parent.parent.glob("lib/python*/site-packages")
        (site / "pip.py").touch()
    install = f"{python} -m pip install" if with_pip else f"uv pip install --python={python}"
    lines = make("--dry-run", "test", PYTHON=str(python)).splitlines()
    assert lines[:2] == [f"{install} -c constraints.txt '.[dev]'",
                         f"touch {tmp_path}/environment/.gpt2-requirements-dev"]
    assert f"{install} -c constraints.txt ." in lines
    if with_pip:
        (site / "torch.py").touch()
        assert f"{install} ." in make("--dry-run", "demo", PYTHON=str(python)).splitlines()


def test_the_workflow_runs_what_make_runs():
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8"))
    job = workflow["jobs"]["test"]
    unix, windows = (step for step in job["steps"] if "run" in step)
    assert unix == {"if": "runner.os != 'Windows'", "run": "make test"}
    commands = windows["run"].splitlines()
    assert commands[0] == 'python -m pip install -c constraints.txt ".[dev]"'
    assert "pytest" in commands[-1]
    for command in commands[1:]:
        assert command.replace("python", "$(PYTHON)", 1) in MAKEFILE
    oldest = PROJECT["project"]["requires-python"].removeprefix(">=")
    matrix = job["strategy"]["matrix"]
    assert [system.partition("-")[0] for system in matrix["system"]] == ["ubuntu", "macos", "windows"]
    assert oldest in matrix["python"] and all(isinstance(version, str) for version in matrix["python"])


# ---- Slurm ---------------------------------------------------------------------


SCONTROL = """#!/bin/sh
[ "$1" = show ] && echo host7 || echo "scontrol $@"
"""
SRUN = """#!/bin/sh
trap 'echo stopped; exit 0' TERM
echo "$@"
for i in $(seq $SECONDS_TO_RUN); do sleep 0.1; done
"""


def start_job(folder, seconds):
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(0o755)
    slurm = {"JOB_ID": 41, "JOB_NODELIST": "host[7-8]", "NNODES": 2, "GPUS_ON_NODE": 8, "CPUS_PER_TASK": 32}
    return subprocess.Popen(
        ["bash", str(ROOT / "train.sbatch"), "config/demo_cpu.py", "--max_steps=9"], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env={
            **os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "SECONDS_TO_RUN": str(10 * seconds),
            **{f"SLURM_{key}": str(value) for key, value in slurm.items()}})


@pytest.mark.skipif(sys.platform == "win32", reason="needs bash")
def test_a_slurm_job_ends_with_its_run(tmp_path):
    job = start_job(tmp_path, 0)
    out, err = job.communicate(timeout=60)
    assert job.returncode == 0 and "requeue" not in out + err
    words = shlex.split(out)
    start = words.index("train_gpt2.py")
    assert words[1:3] == ["torchrun", "--nnodes=2"] and "--rdzv_endpoint=host7:29500" in words[:start]
    config = configure(settings_of(ROOT / "train_gpt2.py"), words[start + 1:])
    assert config["resume"] and config["max_steps"] == 9 and config["log_dir"] == "log_demo"


@pytest.mark.skipif(sys.platform == "win32", reason="needs bash")
def test_a_slurm_job_near_its_time_limit_saves_and_queues_again(tmp_path):
    job = start_job(tmp_path, 60)
    first = job.stdout.readline()
    assert "torchrun" in first
    time.sleep(2)  # until the script waits
    job.send_signal(signal.SIGTERM)  # and nothing else, as --signal=B:TERM does
    out, err = job.communicate(timeout=60)
    assert out == "stopped\nscontrol requeue 41\n", err
    text = (ROOT / "train.sbatch").read_text(encoding="utf-8")
    assert "--requeue" in text and "--signal=B:TERM@" in text and len(text.splitlines()) <= 15


# ---- git -----------------------------------------------------------------------


def written_by_default():
    """Folders and files that scripts write where nothing else is said, by who says so."""
    for script in SCRIPTS:
        namespace = settings_of(script)
        for key in ("data_dir", "log_dir", "out_dir", "out"):
            if annotations_of(namespace).get(key) is PathName and namespace[key]:
                yield script.name, namespace[key]
    for config in sorted(ROOT.glob("config/*.py")):
        settings = runpy.run_path(str(config))
        yield from ((config.name, settings[key]) for key in ("data_dir", "log_dir") if key in settings)
    flags = r"--(?:data_dir|log_dir|out_dir|out)=([\w.]+)"
    yield from (("Makefile", name) for name in re.findall(flags, MAKEFILE))


def test_git_ignores_what_scripts_write():
    written = set(written_by_default())
    assert ("analyze_heads.py", "heads") in written and ("Makefile", "python4k.tiktoken") in written
    for who, name in written:
        path = name if "." in name else f"{name}/file"
        done = subprocess.run(["git", "check-ignore", "--quiet", path], cwd=ROOT)
        assert done.returncode == 0, f"{who} writes {name}, which .gitignore does not name"
    tracked = subprocess.run(["git", "ls-files", "--cached", "--ignored", "--exclude-standard"], cwd=ROOT,
                             capture_output=True, text=True, check=True)
    assert tracked.stdout == ""
