"""README.md and docs/ are true: commands and flags parse, files and links are there, every dependency has its
reason."""

import ast
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
from test_configurator import SCRIPTS, settings_of

import fineweb
from configurator import TYPES, UserError, configure

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MANUAL = {f"docs/{path.name}": path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("docs/*.md"))}
FOREIGN = ("max-restarts", "nnodes", "requeue", "signal")  # flags of torchrun and Slurm
PROGRAMS = "git cd curl python3 source . echo python sh export hf sbatch".split()  # that are not scripts here


def shown_commands(text):
    """The commands of a text: lines of sh blocks in Markdown, command lines in a docstring or comment."""
    text = re.sub(r"\\+\n *", "", text)  # a command on two lines
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).splitlines() or re.findall(r"^[# ]*((?:python|torchrun) .*)$", text, re.M)
    return [re.sub(r"\s+#\s.*", "", line).strip() for line in lines if line.strip() and line[0] != "#"]


SOURCES = ["README.md", "RESULTS.md", "CONTRIBUTING.md", *MANUAL, *(p.name for p in ROOT.glob("*.py")),
           *(f"config/{p.name}" for p in (ROOT / "config").glob("*.py"))]
COMMANDS = [(name, command) for name in SOURCES if (ROOT / name).exists()
            for command in shown_commands((ROOT / name).read_text(encoding="utf-8").split('"""\nimport')[0])]
COMMANDS += [("Makefile", command) for command in
             re.findall(r"next: (.*)'", (ROOT / "Makefile").read_text(encoding="utf-8"))]


@pytest.mark.parametrize(("source", "command"), COMMANDS, ids=[f"{s}: {c[:60]}" for s, c in COMMANDS])
def test_commands_parse(source, command):
    for part in re.split(r"&&|\|", command):
        words = shlex.split(part)
        scripts = [word for word in words if word.endswith(".py") and "/" not in word]
        if words[0] in ("python", "torchrun") and scripts:
            flags = [word for word in words[words.index(scripts[0]) + 1:] if word != "--help"]
            configure(settings_of(ROOT / scripts[0]), flags)
        elif words[0] == "make":
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            assert re.search(rf"^{words[1] if len(words) > 1 else 'help'}:", makefile, re.M)
        else:
            assert words[0] in PROGRAMS, part
        named = [word for word in words if re.fullmatch(r"(experiments|tests|results)/.*\.(py|sh)", word)]
        assert all((ROOT / word).exists() for word in named), part


def test_there_are_commands_to_parse():
    assert sum(source == "README.md" for source, _ in COMMANDS) >= 12
    assert {"train_gpt2.py", "generate.py", "fineweb.py", *MANUAL} <= {source for source, _ in COMMANDS}


def test_every_file_is_in_the_file_map():
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    tracked = listing.stdout.split()
    scripts = [name for name in tracked if name.endswith(".py") and "/" not in name]
    for name in scripts:
        assert f"`{name}`" in README, f"{name} is missing in README.md"
    for name in re.findall(r"`([a-z_0-9/]+\.(?:py|md))`", README):
        assert (ROOT / name).exists() or (ROOT / "config" / name).exists(), f"README.md names {name}"
    for name in re.findall(r"`(test_\w+)`", README):
        assert (ROOT / "tests" / f"{name}.py").exists(), f"README.md names {name}, which is not there"


def anchors(text):
    """The targets of links to the headings of a text, by GitHub's rule."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^a-z0-9_ -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", ["README.md", "RESULTS.md", *MANUAL])
def test_nothing_is_left_to_fill_in_and_links_lead_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not re.search(r"[A-Z]+_[A-Z]+ |TODO|TBD|XXX", text.replace("GPT2_SHARED_DATA ", "")), name
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", text):
        if not target.startswith("https://"):
            path = (ROOT / name).parent / target if target else ROOT / name
            assert path.exists(), f"{name} links to {target}"
            assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), (
                f"{name} links to {target}#{anchor}")


@pytest.mark.parametrize("name", MANUAL)
def test_files_and_flags_of_the_manual_exist(name):
    prose = re.sub(r"```.*?```", "", MANUAL[name], flags=re.DOTALL)
    for path in re.findall(r"`([a-z_0-9/]+\.(?:py|md|sh|json))`", prose):
        made_by_a_run = path in ("manifest.json", "build.json", "tokenizer.json")
        assert made_by_a_run or (ROOT / path).exists(), f"{name} names {path}, which is not there"
    for key, value in re.findall(r"`--([a-z_-]+)(=[^`\s]+)?`", prose):
        owners = [settings for settings in map(settings_of, SCRIPTS) if type(settings.get(key)) in TYPES]
        assert owners or key in FOREIGN, f"{name}: no script has --{key}"
        errors = []
        for settings in owners if value else ():
            try:
                configure(settings, [f"--{key}{value}"])
                break
            except UserError as error:
                errors.append(error)
        else:
            assert not errors, errors


def test_the_table_of_sizes_is_what_fineweb_suggests(monkeypatch):
    """For each row's number of tokens, the command's settings are the row's."""
    monkeypatch.chdir(ROOT)
    rows = re.findall(r"^\| [\d.]+ [MG]B \| ([\d.]+)([kMB]) \| [^|]* \| (\d+) x (\d+) \| (\d+) \| "
                      r"([\d.]+) \| ([\d.]+) \|", README, re.M)
    commands = {}
    for number, unit, *numbers in rows:
        tokens = float(number) * {"k": 1e3, "M": 1e6, "B": 1e9}[unit]
        command = fineweb.training_command(Path("books_data"), tokens)
        chosen = configure(settings_of(ROOT / "train_gpt2.py"), shlex.split(command)[2:])
        assert chosen["data_dir"] == "books_data"
        names = "n_layer", "n_embd", "block_size", "dropout", "num_epochs"
        assert [chosen[name] for name in names] == list(map(float, numbers))
        commands[command] = numbers
    assert len(commands) == len(fineweb.COMMANDS) - 1  # the largest is the 10B tokens of `make prepare`


@pytest.mark.parametrize(("folder", "log_dir"), [("my books/", "log_my books"), ("b{0}_data", "log_b{0}"),
                                                 (".", None)])
def test_the_suggested_command_takes_any_folder(folder, log_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(fineweb.training_command(Path(folder), 10**6))
    monkeypatch.chdir(ROOT)
    chosen = configure(settings_of(ROOT / "train_gpt2.py"), words[2:])
    assert Path(chosen["data_dir"]) == Path(folder)
    assert chosen["log_dir"] == (log_dir or f"log_{tmp_path.name}")


def test_lines_of_the_manual_are_short():
    for name, text in {"README.md": README, **MANUAL}.items():
        in_code = False
        for number, line in enumerate(text.splitlines(), start=1):
            in_code ^= line.startswith("```")
            free = line.startswith(("|", "!["))  # tables and figures
            assert free or len(line) <= (110 if in_code else 100), f"{name}:{number}: {len(line)} columns"


def test_install_md_has_the_commands_behind_make():
    makefile = re.sub(r"\\\n\s*", "", (ROOT / "Makefile").read_text(encoding="utf-8"))
    shown = shown_commands(MANUAL["docs/install.md"])
    values = {"PYTHON": "python", "NPROC": "2", "RUN": "log_demo", "REF": "reference/demo_cpu.json"}
    for target in ("python4k", "demo", "prepare", "prepare-small", "lint", "test", "bench", "doctor",
                   "compare"):
        recipe = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", makefile, re.M)[1]
        commands = [line for line in map(str.strip, recipe.splitlines()) if line.startswith("$(PYTHON)")]
        assert commands, target
        for command in commands:
            command = re.sub(r"\$\((\w+)\)", lambda match: values[match[1]], command)
            assert command in shown, f"docs/install.md lacks a command of make {target}: {command}"


def test_every_dependency_has_its_reason():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for line in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        package = re.match(r"[a-z_0-9-]+", line)[0]
        assert re.search(rf"^\| `{package}` \|", MANUAL["docs/install.md"], re.M), package


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
