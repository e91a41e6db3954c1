"""
Settings for scripts: module globals, overridden by config files and --key=value flags, all checked first.

    batch_size = 16    # sequences per process per micro-step
    config = configure(globals())

    python train_gpt2.py config/demo_cpu.py --batch_size=8 --max-lr=1e-3   # later wins
    python train_gpt2.py --help                                            # every key, type, default, comment

A setting is a lower-case global without a leading underscore whose value is a bool, int, float or str, or
that is annotated `name: TYPE | None`. Nothing is ever guessed: an unknown key is an error in files and flags
alike, and so is a value of another type. A whole float fills an int (1e3 -> 1000), an int fills a float, text
is taken as it stands. Reads the config files named on the command line and, for --help, the script's own
comments. Writes nothing.
"""

import difflib
import errno
import math
import os
import sys
import tokenize
import types
import typing
from pathlib import Path

TYPES = (bool, int, float, str)
TRUE_WORDS, FALSE_WORDS = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


class UserError(ValueError):
    """A mistake the user can mend: the message says what was got, what was wanted and what to type next.

    In a script that called `configure`, it ends the process with that message and exit code 2.
    """


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
            if not equals and settings[key][0] is not bool:
                raise UserError(f"flag {arg}: needs a value; type --{key}={namespace[key]!r} "
                                f"or another {_kind(settings[key])}")
            resolved[key] = _from_text(key, text if equals else "true", settings[key])
        elif arg.startswith("-"):
            raise UserError(f"got {arg!r}, wanted --key=value or a config file; --help lists the keys")
        else:
            for key, value in _read_config_file(arg, namespace).items():
                _check_known(key, settings, f"config file {arg}")
                resolved[key] = _from_python(key, value, settings[key], arg)
    namespace.update(resolved)
    return resolved


def _settings(namespace):
    """{key: (type, may be None)} of the settings among a script's globals, in the order they are written."""
    annotations = namespace.get("__annotations__", {})
    settings = {}
    for key, value in namespace.items():
        if not key.islower() or key.startswith("_"):
            continue
        hint = annotations.get(key)
        args = typing.get_args(hint) if isinstance(hint, types.UnionType) else ()
        if len(args) == 2 and args[0] in TYPES and args[1] is types.NoneType:
            settings[key] = (args[0], True)
        elif type(value) in TYPES:
            settings[key] = (type(value), False)
    return settings


def _check_known(key, settings, where):
    if key not in settings:
        near = difflib.get_close_matches(key, settings, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(settings)}"
        raise UserError(f"{where}: unknown setting {key!r}; {hint} (--help lists all)")


def _kind(setting):
    kind, optional = setting
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return words[kind] + (" or none" if optional else "")


def _from_text(key, text, setting):
    """The value of a flag. Text settings are taken verbatim; the words true, false and none in any case."""
    kind, optional = setting
    word = text.strip().lower()
    if optional and word == "none":
        return None
    if kind is str:
        return text
    if kind is bool and word in TRUE_WORDS + FALSE_WORDS:
        return word in TRUE_WORDS
    if kind in (int, float):
        for convert in (int, float):  # int first: a float would round above 2**53
            try:
                return _from_python(key, convert(word), setting, "")
            except ValueError:
                continue
    raise UserError(f"flag --{key}={text}: got {text!r}, wanted {_kind(setting)}; type --{key}=VALUE")


def _from_python(key, value, setting, path):
    """The value of an assignment in a config file, checked: True is no int here, and 1 is no bool."""
    kind, optional = setting
    if value is None and optional:
        return value
    if type(value) is kind and (kind is not float or math.isfinite(value)):
        return value
    if kind is float and type(value) is int:
        return float(value)
    if kind is int and type(value) is float and value.is_integer():
        return int(value)
    raise UserError(f"config file {path}: {key} = {value!r} is {type(value).__name__}, "
                    f"wanted {_kind(setting)}")


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
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), scope)
    except Exception as error:
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
    for key, (kind, optional) in settings.items():
        flag = f"--{key}={namespace[key]}"
        type_name = kind.__name__ + (" or none" if optional else "")
        lines.append(f"  {flag:38s} {type_name:6s} {comments.get(key, '')}".rstrip())
    return "\n".join(lines)


def _exit_with_message(kind, error, traceback):
    if kind is BrokenPipeError:  # `... | head` has read enough
        os._exit(1)
    if kind is KeyboardInterrupt:
        print("interrupted", file=sys.__stderr__, flush=True)
        sys.exit(130)  # a SystemExit raised inside the hook sets the exit code; 128 + SIGINT
    if issubclass(kind, OSError) and error.errno == errno.ENOSPC:
        error = f"no space left on the disk ({error.filename or 'while writing'}); free some, then run again"
    elif issubclass(kind, OSError) and error.filename is not None:
        error = f"{error.filename}: {error.strerror}; name another path, or mend this one"
    elif not issubclass(kind, UserError):
        return sys.__excepthook__(kind, error, traceback)
    # not sys.stderr: torch.distributed calls this hook with a buffer there, which a SystemExit would lose
    print(f"error: {error}", file=sys.__stderr__, flush=True)
    sys.exit(2)
