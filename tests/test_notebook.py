"""notebooks/demo.ipynb: its cells run in order, offline, on a tiny model and with nothing of Jupyter."""

import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
from training import PYTHON, ROOT, arguments

NOTEBOOK = json.loads((ROOT / "notebooks" / "demo.ipynb").read_text(encoding="utf-8"))
TINY = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 64, "batch_size": 4, "batch_tokens": 256,
        "max_steps": 4, "num_epochs": 0, "warmup_steps": 1, "val_interval": 2, "val_tokens": 512,
        "checkpoint_interval": 2, "sample_interval": 0, "compile": "false", "device": "cpu",
        "dtype": "float32"}
PYTHON_TEXT = """#!/bin/sh
echo "$@" >> {log}
case "$1" in
    -m) exit ;;
    train_gpt2.py) set -- "$@" {tiny} ;;
    fineweb.py) set -- "$@" --num_workers=2 ;;
    generate.py) set -- "$@" --max_new_tokens=4 --device=cpu ;;
esac
exec {python} "$@"
"""
GIT_TEXT = """#!/bin/sh
[ "$1" = clone ] || exit 1
mkdir "$4" && ln -s {root}/*.py {root}/config "$4"
"""


def as_python(source):
    """A cell's source with calls of shell("...") and chdir("...") in place of IPython's ! and %cd."""
    return re.sub(r"^( *)(!|%cd )(.*)$",
                  lambda line: f"{line[1]}{'shell' if line[2] == '!' else 'chdir'}({line[3]!r})", source,
                  flags=re.M)


def test_the_notebook_is_six_cells_without_output():
    assert NOTEBOOK["nbformat"] == 4 and len(NOTEBOOK["cells"]) == 6
    for cell in NOTEBOOK["cells"]:
        assert cell["cell_type"] == "code" and not cell["outputs"] and cell["execution_count"] is None
        source = "".join(cell["source"])
        compile(as_python(source), cell["id"], "exec")
        assert max(map(len, source.splitlines())) <= 110


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
def test_the_notebook_runs(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    log = tmp_path / "commands.txt"
    for name, text in {"python": PYTHON_TEXT, "git": GIT_TEXT}.items():
        (tmp_path / "bin" / name).write_text(text.format(
            log=log, tiny=" ".join(arguments(TINY)), python=PYTHON, root=ROOT), encoding="utf-8")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    shown = types.ModuleType("IPython.display")
    shown.Image = Path
    monkeypatch.setitem(sys.modules, "IPython.display", shown)

    def shell(line):
        line = re.sub(r"\{(\w+)\}", lambda name: str(names[name[1]]), line)
        subprocess.run(line, shell=True, check=True)

    names = {"shell": shell, "chdir": os.chdir}
    for cell in NOTEBOOK["cells"]:
        source = "".join(cell["source"]).replace('REPOSITORY = ""', 'REPOSITORY = "URL"')
        exec(compile(as_python(source), cell["id"], "exec"), names)
        if cell["id"] == "install":  # no download: this text, in place of Shakespeare's
            text = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("model.py", "ranks.py"))
            Path("shakespeare.txt").write_text(text, encoding="utf-8")
    assert Path.cwd() == tmp_path / "gpt2"
    commands = log.read_text(encoding="utf-8").splitlines()
    assert commands[0] == "-m pip install -q ." and [line.split()[0] for line in commands[1:]] == [
        "train_bpe.py", "fineweb.py", "train_gpt2.py", "plot_log.py", "generate.py", "convert_hf.py"]
    for name in ("log_shakespeare/log_plot.png", "shakespeare_hf/model.safetensors"):
        assert Path(name).stat().st_size > 1000
    assert "\nThe " in capfd.readouterr().out
    exec(compile(as_python("".join(NOTEBOOK["cells"][2]["source"])), "again", "exec"), names)
    assert "starting at 4" in capfd.readouterr().out  # a cell that is run again continues
