"""The README is true: its commands parse, its files are there, every dependency has its reason."""

import ast
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from test_configurator import settings_of

from configurator import configure

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def shown_commands(text):
    """The commands of a text: lines of sh blocks in Markdown, command lines in a docstring or comment."""
    text = re.sub(r"\\+\n *", "", text)  # a command on two lines
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).splitlines() or re.findall(r"^[# ]*((?:python|torchrun) .*)$", text, re.M)
    return [re.sub(r"\s+#\s.*", "", line).strip() for line in lines if line.strip()]


SOURCES = ["README.md", "RESULTS.md", "CONTRIBUTING.md", *(p.name for p in ROOT.glob("*.py")),
           *(f"config/{p.name}" for p in (ROOT / "config").glob("*.py"))]
COMMANDS = [(name, command) for name in SOURCES if (ROOT / name).exists()
            for command in shown_commands((ROOT / name).read_text(encoding="utf-8").split('"""\nimport')[0])]


@pytest.mark.parametrize(("source", "command"), COMMANDS, ids=[f"{s}: {c[:60]}" for s, c in COMMANDS])
def test_commands_parse(source, command, monkeypatch):
    for part in re.split(r"&&|\|", command):
        words = shlex.split(part)
        scripts = [word for word in words if word.endswith(".py") and "/" not in word]
        if words[0] in ("python", "torchrun") and scripts:
            monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # configure replaces it
            flags = [word for word in words[words.index(scripts[0]) + 1:] if word != "--help"]
            configure(settings_of(ROOT / scripts[0]), flags)
        elif words[0] == "make":
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            assert re.search(rf"^{words[1] if len(words) > 1 else 'help'}:", makefile, re.M)
        else:
            assert words[0] in ("git", "cd", "python3", "source", ".", "echo", "python", "sh", "export"), part


def test_there_are_commands_to_parse():
    assert sum(source == "README.md" for source, _ in COMMANDS) >= 12
    assert {"train_gpt2.py", "generate.py", "fineweb.py"} <= {source for source, _ in COMMANDS}


def test_every_file_is_in_the_file_map():
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    tracked = listing.stdout.split()
    scripts = [name for name in tracked if name.endswith(".py") and "/" not in name]
    for name in [*scripts, *(name for name in tracked if name.startswith("config/"))]:
        assert f"`{name}`" in README, f"{name} is missing in README.md"
    for name in re.findall(r"`([a-z_0-9/]+\.(?:py|md))`", README):
        assert (ROOT / name).exists(), f"README.md names {name}, which is not there"


def test_nothing_is_left_to_fill_in_and_links_lead_somewhere():
    for name in ("README.md", "RESULTS.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not re.search(r"[A-Z]+_[A-Z]+ |TODO|TBD|XXX", text.replace("GPT2_SHARED_DATA ", "")), name
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert target.startswith("https://") or (ROOT / target).exists(), f"{name} links to {target}"


def test_every_dependency_has_its_reason():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for line in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        package = re.match(r"[a-z_0-9-]+", line)[0]
        assert re.search(rf"^\| `{package}` \|", README, re.M), f"{package} is not in the README"


def test_every_open_names_its_encoding():
    """Text read or written in the platform's encoding breaks on Windows."""
    for path in [*ROOT.glob("*.py"), *(ROOT / "tests").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called, text = ast.unparse(node.func), ast.unparse(node)
            opens_text = called == "open" and not re.search(r"'[rwax+]*b[rwax+]*'", text)
            if opens_text or called.endswith((".read_text", ".write_text")):
                assert "encoding=" in text, f"{path.name}:{node.lineno}: {text}"
