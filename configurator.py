"""
Settings of scripts: module globals, overridden by config files and --key=value flags, all checked first.

    batch_size: Between(1, 65_536) = 16                # sequences per process per micro-step
    val_tokens: Between(1, 2**40) | None = None        # a number, or none
    optimizer: OneOf("adamw", "muon") = "adamw"        # one of these words
    data_dir: PathName = "edu_fineweb10B"              # a leading ~ is your home folder
    config = configure(globals())

    python train_gpt2.py config/demo_cpu.py --batch_size=8 --max-lr=1e-3   # later wins
    python train_gpt2.py --help                                            # every key, default, type, range

A setting is a lower-case global without a leading underscore whose value is a bool, int, float or str, or
None where its annotation allows that. Nothing is guessed: an unknown key is an error in files and flags
alike, and so is a value of another type or out of its range. A whole float fills an int (1e3 -> 1000), an int
fills a float, text is taken as it stands. Reads the config files named on the command line and, for --help,
the script's own comments. A config file is Python and runs with your rights: read it before you use it.
"""

import ast
import contextlib
import difflib
import errno
import math
import os
import re
import reprlib
import signal
import sys
import tokenize
import traceback
import typing
from pathlib import Path

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a write says where there is no more room
TYPES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
BOOLS = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)


class UserError(ValueError):
    """A mistake the user can fix: the message says what is wrong and what to type next.

    In a script that called `configure`, it ends the process with that message and exit code 2.
    """

    def __init__(self, message: object):
        super().__init__(without_passwords(str(message)))


class TemporaryError(UserError):
    """A UserError that may be gone at the next try: torchrun may start the process again."""


def without_passwords(text: str) -> str:
    """`text` with https://host in place of every https://user:password@host."""
    return re.sub(r"(?<=://)[^/\s@]*@", "", text)


class Between(typing.NamedTuple):
    """Annotation of a number: from `low` to `high`, both included."""
    low: float
    high: float
    optional: bool = False  # Between(1, 9) | None: or None

    def __contains__(self, value) -> bool:
        return self.low <= value <= self.high  # False for nan

    def __or__(self, none: None) -> "Between":
        return self._replace(optional=True)

    def __str__(self) -> str:
        return f"{self.low:,} to {self.high:,}{' or none' * self.optional}"


class OneOf(tuple):
    """Annotation of a text: one of these words."""

    def __new__(cls, *words):
        return super().__new__(cls, words)

    def __str__(self) -> str:
        *others, last = (str(word) or "nothing" for word in self)
        return f"{', '.join(others)} or {last}" if others else last


class PathName:
    """Annotation of a text that names a file or folder, or several with commas: a leading ~ is expanded."""


def configure(namespace: dict, argv: list[str] | None = None) -> dict:
    """Override the settings in `namespace`, a script's globals(), from `argv`; return all as {key: value}.

    `argv` (default: the command line) holds paths of config files and --key=value flags, applied in order. A
    bare --key switches a bool on. `-` in a key equals `_`. A config file is looked up as given, then beside
    the script. Raises UserError. --help prints the table of settings and exits 0.
    """
    sys.excepthook = _exit_with_message
    if hasattr(sys.stdout, "reconfigure"):  # text of a model must not end a run where stdout is not UTF-8
        sys.stdout.reconfigure(errors="replace")
    settings = _settings(namespace)
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(help_text(namespace, settings), flush=True)
        sys.exit(0)
    resolved = {key: namespace[key] for key in settings}
    for arg in argv:
        if arg.startswith("--"):
            key, equals, text = arg[2:].partition("=")  # the first = only: a value may hold others
            key, where = key.replace("-", "_"), f"flag {arg}"
            setting = _find(key, settings, where)
            if not equals and setting[0] is not bool:
                raise UserError(f"{where}: needs a value; type --{key}={namespace[key]}, for example")
            resolved[key] = _check(_parse(text if equals else "true", *setting), *setting, where)
        elif arg.startswith("-"):
            raise UserError(f"got {arg!r}, wanted --key=value or a config file; --help lists the keys")
        else:
            for key, value in _read_config_file(arg, namespace).items():
                setting = _find(key, settings, f"config file {arg}")
                resolved[key] = _check(value, *setting, f"config file {arg}: {key} = {reprlib.repr(value)}")
    for key, (_, legal) in settings.items():
        if legal is PathName:
            resolved[key] = ",".join(map(os.path.expanduser, resolved[key].split(",")))
    namespace.update(resolved)
    return resolved


def _settings(namespace):
    """{key: (type, annotation or None)} of the settings among a script's globals, in the order written."""
    annotations, settings = annotations_of(namespace), {}
    for key, value in namespace.items():
        if key.islower() and not key.startswith("_"):
            legal = annotations.get(key)
            if value is None and isinstance(legal, Between):
                settings[key] = float if float in map(type, legal[:2]) else int, legal
            elif type(value) in TYPES:
                settings[key] = type(value), legal
    return settings


def annotations_of(namespace: dict) -> dict:
    """{name: annotation} of a module's globals."""
    annotate = namespace.get("__annotate__")  # Python 3.14 and later compute them when asked
    return namespace.get("__annotations__") or (annotate(1) if annotate else {})


def _find(key, settings, where):
    if key in settings:
        return settings[key]
    near = difflib.get_close_matches(key, settings, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(settings)}"
    raise UserError(f"{where}: unknown setting {key!r}; {hint} (--help lists all)")


def _parse(text, kind, legal):
    """The value that a flag's text stands for; where it stands for none, _check refuses the text."""
    word = text.strip().lower()
    if word == "none" and getattr(legal, "optional", False):
        return None
    if kind is bool:
        return BOOLS.get(word, text)
    if kind is not str:
        for convert in (int, float):  # int first: a float would round above 2**53
            with contextlib.suppress(ValueError):
                return convert(word)
    return text


def _check(value, kind, legal, where):
    """`value` as the setting's type, where that loses nothing: True is no int, and 1 is no bool."""
    if value is None and getattr(legal, "optional", False):
        return None
    with contextlib.suppress(OverflowError, ValueError):  # an int too large for a float, inf, nan
        if {type(value), kind} == {int, float} and kind(value) == value:
            value = kind(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise UserError(f"{where}: wanted {TYPES[kind]}{f', {legal}' if isinstance(legal, Between) else ''}")
    if isinstance(legal, (Between, OneOf)) and value not in legal:
        raise UserError(f"{where}: wanted {legal}")
    return value


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, without the mark that some editors put in front.

    Raises UserError for what is no file, for UTF-16 and for bytes that are not UTF-8; OSError as open does.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # reading a pipe would wait for whoever writes into it
        raise UserError(f"{path}: not a regular file; name a text file")
    data = path.read_bytes()
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in data[:2]:
        raise UserError(f"{path}: this text is UTF-16; convert it, for example with "
                        f"iconv -f UTF-16 -t UTF-8 {path}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start:,} is not UTF-8 ({error.reason}); convert the file, for "
                        f"example with iconv") from error


def _read_config_file(arg, namespace):
    """{name: value} that a config file assigns; it runs by itself and sees nothing of the script."""
    folder = Path(namespace.get("__file__", ".")).resolve().parent
    path = next((p for p in (Path(arg), folder / arg) if p.is_file()), None)
    if path is None:
        known = sorted(f"config/{p.name}" for p in (folder / "config").glob("*.py"))
        near = difflib.get_close_matches(arg, known, n=1) or known
        raise UserError(f"config file {arg}: not found; try {', '.join(near) or 'another path'}, "
                        f"or --key=value for a setting")
    text, scope = read_text(path), {}
    try:
        exec(compile(text, str(path), "exec"), scope)
    except (Exception, SystemExit) as error:  # exit() in it must not end the script as if all were well
        lines = [line for frame, line in traceback.walk_tb(error.__traceback__)
                 if frame.f_code.co_filename == str(path)] or [getattr(error, "lineno", None)]
        raise UserError(f"config file {path}, line {lines[-1]}: {type(error).__name__}: {error}") from error
    return {key: value for key, value in scope.items() if not key.startswith("_")}


def settings_of(path: str | Path) -> dict:
    """The settings that a script's source assigns, and their `__annotations__`: the script does not run."""
    nodes = []
    for node in ast.parse(read_text(path)).body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            if ast.unparse(node.value) == "configure(globals())":
                break
            annotated = isinstance(node, ast.AnnAssign)
            name = ast.unparse(node.target if annotated else node.targets[0])
            literal = not any(isinstance(part, ast.Name) for part in ast.walk(node.value))
            if name.islower() and (annotated or literal):
                nodes.append(node)
    scope = {"__file__": str(path), "Between": Between, "OneOf": OneOf, "PathName": PathName, "Path": Path}
    exec(compile(ast.Module(nodes, []), str(path), "exec"), scope)
    return {key: value for key, value in scope.items() if key.islower() and not key.startswith("_")} | {
        "__annotations__": annotations_of(scope)}


def help_text(namespace: dict, settings: dict) -> str:
    """The script's docstring and a line per setting: --key=default, type and range, the comment beside it."""
    comments = {}
    with tokenize.open(namespace["__file__"]) as file:
        line_start = None
        for token in tokenize.generate_tokens(file.readline):
            if token.start[1] == 0 and token.type == tokenize.NAME:
                line_start = token.string
            elif token.type == tokenize.COMMENT and token.start[1] > 0:
                comments.setdefault(line_start, token.string.lstrip("# "))
    rows = []
    for key, (kind, legal) in settings.items():
        what = "path" if legal is PathName else str(legal) if isinstance(legal, OneOf) else kind.__name__
        if isinstance(legal, Between):
            huge = f", {legal.low:,} or more{' or none' * legal.optional}"
            what += huge if legal.high >= 10**9 else f", {legal}"
        rows.append((f"--{key}={namespace[key]}", what, comments.get(key, "")))
    wide, wider = (min(most, max(len(row[i]) for row in rows)) for i, most in ((0, 30), (1, 24)))
    lines = [f"  {flag:{wide}}  {what:{wider}}  {comment}".rstrip() for flag, what, comment in rows]
    return "\n".join([(namespace.get("__doc__") or "").strip(), "", "settings:", *lines])


def env_number(name: str, default: int) -> int:
    """A whole number in the environment; UserError where something else stands there."""
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise UserError(f"{name}={text!r} in the environment is not a whole number: start with torchrun, or "
                        f"type `unset {name}`")
    return int(text)


def end_launcher() -> None:
    """End torchrun, if it would start this process again only for it to fail in the same way."""
    left = os.environ.get("TORCHELASTIC_MAX_RESTARTS") != os.environ.get("TORCHELASTIC_RESTART_COUNT")
    if "TORCHELASTIC_RUN_ID" in os.environ and left:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which it will send to its workers
        with contextlib.suppress(OSError):  # of another user, or gone; and only torchrun itself, no wrapper
            if b"torch" in Path(f"/proc/{os.getppid()}/cmdline").read_bytes():
                os.kill(os.getppid(), signal.SIGTERM)


def _exit_with_message(kind, error, trace):
    if kind is BrokenPipeError:  # `... | head` has read enough
        os._exit(1)
    if kind is KeyboardInterrupt:
        print("interrupted", file=sys.__stderr__, flush=True)
        sys.exit(130)  # a SystemExit raised inside the hook sets the exit code; 128 + SIGINT
    if issubclass(kind, OSError) and error.errno in DISK_FULL:
        error = f"no space left on the disk ({error.filename or 'while writing'}); free some, then run again"
    elif issubclass(kind, OSError) and error.filename is not None:
        error = f"{error.filename}: {error.strerror}; name another path, or fix this one"
    elif not issubclass(kind, UserError):
        return sys.__excepthook__(kind, error, trace)
    # not sys.stderr: torch.distributed calls this hook with a buffer there, which a SystemExit would lose
    print(f"error: {error}", file=sys.__stderr__, flush=True)
    lasting = issubclass(kind, UserError) and not issubclass(kind, TemporaryError)
    if lasting and not isinstance(error.__cause__, OSError):
        end_launcher()
    sys.exit(2)
