"""
Settings for scripts: module globals, overridden by config files and --key=value flags, all checked first.

    batch_size = 16    # sequences per process per micro-step
    config = configure(globals())

    python train_gpt2.py config/demo_cpu.py --batch_size=8 --max-lr=1e-3   # later wins
    python train_gpt2.py --help                                            # every key, type, default, comment

A setting is a lower-case global without a leading underscore whose value is a bool, int, float or str, or
that is annotated `name: TYPE | None`. What it may be stands beside it:

    batch_size: Between(1, 65_536) = 32           # numbers, both ends included
    optimizer: OneOf("adamw", "muon") = "adamw"   # one of these words
    data_dir: PathName = "edu_fineweb10B"         # ~ is the home folder

Nothing is ever guessed: an unknown key is an error in files and flags alike, and so is a value of another
type or out of its range. A whole float fills an int (1e3 -> 1000), an int fills a float, text is taken as it
stands. Reads the config files named on the command line and, for --help, the script's own comments. A config
file is Python and runs with your rights: read one before you use it. Writes nothing.
"""

import difflib
import errno
import math
import os
import re
import signal
import sys
import tokenize
import types
import typing
from pathlib import Path

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a write says where there is no more room
TYPES = (bool, int, float, str)
TRUE_WORDS, FALSE_WORDS = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


class UserError(ValueError):
    """A mistake the user can fix: the message says what is wrong and what to type next.

    In a script that called `configure`, it ends the process with that message and exit code 2.
    """

    def __init__(self, message: object):
        super().__init__(without_passwords(str(message)))


def without_passwords(text: str) -> str:
    """`text` with https://host in place of every https://user:password@host."""
    return re.sub(r"(?<=://)[^/\s@]*@", "", text)


class Between(typing.NamedTuple):
    """Annotation of a number: from `low` to `high`, both included."""
    low: float
    high: float

    def __contains__(self, value) -> bool:
        return self.low <= value <= self.high  # False for nan

    def __str__(self) -> str:
        return f"{self.low:,} to {self.high:,}"


class OneOf(tuple):
    """Annotation of a text: one of these words."""

    def __new__(cls, *words):
        return super().__new__(cls, words)

    def __str__(self) -> str:
        return " or ".join(map(str, self))


class PathName:
    """Annotation of a text that names a file or folder, or several with commas: a leading ~ is expanded."""


class Setting(typing.NamedTuple):
    kind: type
    optional: bool = False  # may be None
    legal: Between | OneOf | type | None = None  # what its annotation says


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
            key = key.replace("-", "_")
            _check_known(key, settings, f"flag {arg}")
            if not equals and settings[key].kind is not bool:
                raise UserError(f"flag {arg}: needs a value; type --{key}={namespace[key]!r} "
                                f"or another {_kind(settings[key])}")
            resolved[key] = _from_text(key, text if equals else "true", settings[key])
        elif arg.startswith("-"):
            raise UserError(f"got {arg!r}, wanted --key=value or a config file; --help lists the keys")
        else:
            for key, value in _read_config_file(arg, namespace).items():
                _check_known(key, settings, f"config file {arg}")
                resolved[key] = _from_python(key, value, settings[key], arg)
    for key, (_, _, legal) in settings.items():
        if legal is PathName:
            resolved[key] = ",".join(os.path.expanduser(name) for name in resolved[key].split(","))
    namespace.update(resolved)
    return resolved


def _settings(namespace):
    """{key: Setting} of the settings among a script's globals, in the order they are written."""
    if "__annotate__" in namespace:  # Python 3.14 and later: annotations are computed when asked for
        annotations = namespace["__annotate__"](1)
    else:
        annotations = namespace.get("__annotations__", {})
    settings = {}
    for key, value in namespace.items():
        if not key.islower() or key.startswith("_"):
            continue
        hint = annotations.get(key)
        args = typing.get_args(hint) if isinstance(hint, types.UnionType) else ()
        if len(args) == 2 and args[0] in TYPES and args[1] is types.NoneType:
            settings[key] = Setting(args[0], optional=True)
        elif type(value) in TYPES:
            limited = isinstance(hint, (Between, OneOf)) or hint is PathName
            settings[key] = Setting(type(value), legal=hint if limited else None)
    return settings


def _check_known(key, settings, where):
    if key not in settings:
        near = difflib.get_close_matches(key, settings, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(settings)}"
        raise UserError(f"{where}: unknown setting {key!r}; {hint} (--help lists all)")


def _kind(setting):
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return words[setting.kind] + (" or none" if setting.optional else "")


def _from_text(key, text, setting):
    """The value of a flag. Text settings are taken verbatim; the words true, false and none in any case."""
    word, where = text.strip().lower(), f"flag --{key}={text}"
    if setting.optional and word == "none":
        return None
    if setting.kind is str:
        return _in_range(key, text, setting, where)
    if setting.kind is bool and word in TRUE_WORDS + FALSE_WORDS:
        return word in TRUE_WORDS
    if setting.kind in (int, float):
        for convert in (int, float):  # int first: a float would round above 2**53
            try:
                number = _as_kind(convert(word), setting)
            except (ValueError, OverflowError):
                continue
            return _in_range(key, number, setting, where)
    raise UserError(f"{where}: got {text!r}, wanted {_kind(setting)}; type --{key}=VALUE")


def _from_python(key, value, setting, path):
    """The value of an assignment in a config file, checked: True is no int here, and 1 is no bool."""
    if value is None and setting.optional:
        return value
    try:
        value = _as_kind(value, setting)
    except (ValueError, OverflowError):
        raise UserError(f"config file {path}: {key} = {value!r} is {type(value).__name__}, "
                        f"wanted {_kind(setting)}") from None
    return _in_range(key, value, setting, f"config file {path}")


def _as_kind(value, setting):
    """`value` as the setting's type where that loses nothing; else ValueError or OverflowError."""
    kind = setting.kind
    if kind is float and type(value) is int:
        value = float(value)
    elif kind is int and type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise ValueError
    return value


def _in_range(key, value, setting, where):
    if isinstance(setting.legal, (Between, OneOf)) and value not in setting.legal:
        raise UserError(f"{where}: {key}={value!r}: wanted {setting.legal}; type --{key}=VALUE")
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
    """{name: value} that a config file assigns; it runs in its own namespace and sees none of the
    script's."""
    folder = Path(namespace.get("__file__", ".")).resolve().parent
    path = next((p for p in (Path(arg), folder / arg) if p.is_file()), None)
    if path is None:
        known = sorted(f"config/{p.name}" for p in (folder / "config").glob("*.py"))
        near = difflib.get_close_matches(arg, known, n=1) or known
        raise UserError(f"config file {arg}: not found; try {', '.join(near) or 'another path'}, "
                        f"or --key=value for a setting")
    scope = {}
    try:
        exec(compile(read_text(path), str(path), "exec"), scope)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # exit() in it must not end the script as if all were well
        line = error.lineno if isinstance(error, SyntaxError) else error.__traceback__.tb_next.tb_lineno
        raise UserError(f"config file {path}, line {line}: {type(error).__name__}: {error}") from error
    return {key: value for key, value in scope.items() if not key.startswith("_")}


def help_text(namespace: dict, settings: dict) -> str:
    """The script's docstring and one line per setting: --key=default, type, the comment beside it in the
    source."""
    comments = {}
    with tokenize.open(namespace["__file__"]) as file:
        line_start = None
        for token in tokenize.generate_tokens(file.readline):
            if token.start[1] == 0 and token.type == tokenize.NAME:
                line_start = token.string
            elif token.type == tokenize.COMMENT and token.start[1] > 0:
                comments.setdefault(line_start, token.string.lstrip("# "))
    lines = [(namespace.get("__doc__") or "").strip(), "", "settings (default; type):"]
    for key, (kind, optional, legal) in settings.items():
        flag = f"--{key}={namespace[key]}"
        type_name = kind.__name__ + (" or none" if optional else "")
        comment = comments.get(key, "")
        if isinstance(legal, (Between, OneOf)):
            comment = f"{comment} [{legal}]"
        lines.append(f"  {flag:38s} {type_name:6s} {comment}".rstrip())
    return "\n".join(lines)


def end_launcher() -> None:
    """End torchrun, if it would start this process again only for it to fail in the same way."""
    left = os.environ.get("TORCHELASTIC_MAX_RESTARTS") != os.environ.get("TORCHELASTIC_RESTART_COUNT")
    if "TORCHELASTIC_RUN_ID" in os.environ and left:
        os.kill(os.getppid(), signal.SIGTERM)


def _exit_with_message(kind, error, traceback):
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
        return sys.__excepthook__(kind, error, traceback)
    # not sys.stderr: torch.distributed calls this hook with a buffer there, which a SystemExit would lose
    print(f"error: {error}", file=sys.__stderr__, flush=True)
    end_launcher()
    sys.exit(2)
