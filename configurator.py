"""
Settings of scripts: module globals, overridden by config files and --key=value flags, checked before use.

    batch_size: Between(1, 65_536) = 16                # sequences per process per micro-step
    optimizer: OneOf("adamw", "muon") = "adamw"        # one of these words
    data_dir: PathName = "edu_fineweb10B"              # a leading ~ is your home folder
    config = configure(globals())

    python train_gpt2.py config/demo_cpu.py --batch_size=8 --max-lr=1e-3   # later wins
    python train_gpt2.py --help                                            # every key, default, type, range

A setting is a lower-case global without a leading underscore whose value is a bool, int, float or str. An
unknown key is an error, and so is a value of another type or out of its range; 1e3 is a whole number. A
config file is Python and runs with your rights: read it first.
"""

import contextlib
import difflib
import errno
import itertools
import json
import math
import os
import re
import reprlib
import runpy
import signal
import sys
import time
import traceback
import typing
from pathlib import Path

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errors of a full disk or quota
TYPES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
BOOLS = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)
OTHER_NAMES = {  # of nanoGPT, build-nanogpt and llm.c: the name here, and the unit where theirs is another
    "learning_rate": "max_lr", "learning_rate_decay_frac": "min_lr, a rate and not a fraction",
    "max_iters": "max_steps", "num_iterations": "max_steps", "lr_decay_iters": "max_steps",
    "warmup_iters": "warmup_steps", "decay_lr": "schedule", "sequence_length": "block_size",
    "total_batch_size": "batch_tokens", "gradient_accumulation_steps": "batch_tokens, tokens per step",
    "eval_interval": "val_interval", "val_loss_every": "val_interval", "sample_every": "sample_interval",
    "eval_iters": "val_tokens, in tokens", "val_max_steps": "val_tokens, in tokens",
    "always_save_checkpoint": "checkpoint_interval, in steps", "wandb_log": "wandb",
    "out_dir": "log_dir", "output_dir": "log_dir", "dataset": "data_dir, a folder of shards",
    "input_bin": "data_dir, a folder of shards", "start": "prompt",
}


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

    def __contains__(self, value) -> bool:
        return self.low <= value <= self.high  # False for nan

    def __str__(self) -> str:
        return f"{self.low:,} to {self.high:,}"


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
    the script. Raises UserError, and then changes nothing. --help prints the table of settings and exits 0.
    """
    sys.excepthook = _exit_with_message
    if hasattr(sys.stdout, "reconfigure"):  # text of a model must not end a run where stdout is not UTF-8
        sys.stdout.reconfigure(errors="replace")
    argv = sys.argv[1:] if argv is None else argv
    settings = _settings(namespace)
    if "--help" in argv or "-h" in argv:
        print(_help(namespace, settings), flush=True)
        sys.exit(0)
    resolved = {key: _check(namespace[key], *settings[key], f"{key}={namespace[key]}") for key in settings}
    for arg, following in itertools.pairwise([*argv, ""]):
        if re.search("[\ud800-\udfff]", arg):  # how Python spells bytes that are not UTF-8
            raise UserError(f"{arg!r} is not UTF-8; rename the file, or correct the text")
        if arg.startswith("--"):
            resolved |= _read_flag(arg, following, settings)
        else:
            resolved |= _read_config_file(arg, Path(namespace["__file__"]).resolve().parent, settings)
    namespace.update(resolved)
    return resolved


def _settings(namespace):
    """{key: (type, annotation or None)} of the settings among a script's globals, in the order written."""
    annotations = annotations_of(namespace)
    return {key: (type(value), annotations.get(key)) for key, value in namespace.items()
            if key.islower() and not key.startswith("_") and type(value) in TYPES}


def annotations_of(namespace: dict) -> dict:
    """{name: annotation} of a module's globals."""
    annotate = namespace.get("__annotate__")  # Python 3.14 and later compute them when asked
    return namespace.get("__annotations__") or (annotate(1) if annotate else {})


def _find(key, settings, where):
    """The (type, annotation) of a setting; UserError, with the most likely name, for an unknown key."""
    if key in settings:
        return settings[key]
    near = difflib.get_close_matches(key, settings, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(settings)}"
    ours = OTHER_NAMES.get(key, "")
    if ours.partition(",")[0] in settings:
        hint = f"its name here is {ours}"
    raise UserError(f"{where}: unknown setting {key!r}; {hint} (--help lists all)")


def _read_flag(arg, following, settings):
    """{key: value} of --key=value; `following`, the next argument, may be a value after a space."""
    key, equals, text = arg[2:].partition("=")  # the first = only: a value may hold others
    key, where = key.replace("-", "_"), f"flag {arg}"
    kind, legal = _find(key, settings, where)
    if not equals and (kind is not bool or following.lower() in BOOLS):
        value = "VALUE" if following.startswith("--") else following or "VALUE"
        raise UserError(f"{where}: needs a value after an equals sign; type --{key}={value}")

    value = text  # where it stands for no value of this type, _check refuses it
    if kind is bool:
        value = BOOLS.get(text.lower(), text) if equals else True
    elif kind is not str:
        for convert in (float, int):  # int where it is one: a float rounds above 2**53
            with contextlib.suppress(ValueError):
                value = convert(text)
    return {key: _check(value, kind, legal, where)}


def _check(value, kind, legal, where):
    """`value` as the setting's type, where that loses nothing: True is no int, and 1 is no bool."""
    with contextlib.suppress(OverflowError, ValueError):  # an int too large for a float, inf, nan
        if {type(value), kind} == {int, float} and kind(value) == value:
            value = kind(value)
    valid = type(value) is kind and (kind is not float or math.isfinite(value))
    if not valid or (isinstance(legal, (Between, OneOf)) and value not in legal):
        raise UserError(f"{where}: wanted {_describe(kind, legal)}")
    return ",".join(map(os.path.expanduser, value.split(","))) if legal is PathName else value


def _describe(kind, legal):
    """What a setting may be, in words."""
    if isinstance(legal, Between):
        return f"{legal} ({TYPES[kind]})"
    return str(legal) if isinstance(legal, OneOf) else TYPES[kind]


def _read_config_file(arg, folder, settings):
    """{key: value} that a config file assigns; it runs by itself and sees nothing of the script."""
    where = f"config file {arg}"
    path = next((path for path in (Path(arg), folder / arg) if path.exists()), None)
    if path is None:
        known = sorted(f"config/{path.name}" for path in folder.glob("config/*.py"))
        near = difflib.get_close_matches(arg, known, n=1) or known
        raise UserError(f"{where}: not found; try {', '.join(near)}, or --key=value for a setting")
    if path.suffix != ".py" or not path.is_file():
        flags = [f"--{key}={arg}" for key, (_, legal) in settings.items() if legal is PathName]
        raise UserError(f"{arg} is not a config file (.py); flags that take a path: {', '.join(flags)}")
    try:
        assigned = runpy.run_path(str(path))
    except (Exception, SystemExit) as error:  # exit() in it must not end the script as if all were well
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
                 if frame.filename == str(path)]
        raise UserError(f"{where}, line {lines[-1] if lines else getattr(error, 'lineno', None)}: "
                        f"{type(error).__name__}: {error}") from error
    return {key: _check(value, *_find(key, settings, where), f"{where}: {key} = {reprlib.repr(value)}")
            for key, value in assigned.items() if not key.startswith("_")}


def _help(namespace, settings):
    """The script's docstring and a line per setting: --key=default, what it may be, the comment beside it."""
    source = Path(namespace["__file__"]).read_text(encoding="utf-8")
    lines = [(namespace.get("__doc__") or "").strip(), "", "settings:"]
    for key, (kind, legal) in settings.items():
        # the value may go on in indented lines; a comment stands after two spaces
        comment = re.search(rf"^{key}\b[^=\n]*=(?:.|\n[ )])*?  # (.*)", source, re.MULTILINE)
        flag, what = f"--{key}={namespace[key]}", _describe(kind, legal)
        lines.append(f"  {flag:30}  {what:32}  {comment[1] if comment else ''}".rstrip())
    return "\n".join(lines)


def env_number(name: str, default: int) -> int:
    """A whole number in the environment, or `default`. Raises UserError for any other text there."""
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise UserError(f"{name}={text!r} in the environment is not a whole number: start with torchrun, or "
                        f"type `unset {name}`")
    return int(text)


def report_failure(message: object, again: bool = False) -> None:
    """Print why this process is about to end; `again`: another try may succeed.

    Most errors hit all processes at once. Under torchrun the first process of each machine prints, while the
    others wait to be terminated. torchrun repeats the message in its summary, and restarts only if `again`.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")  # of this process: .../LOCAL_RANK/error.json
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_RANK", "0") != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)  # still alive after this, it is the only one with an error, or missed the signal
        if path and Path(path).parents[1].joinpath("0", Path(path).name).exists():
            return
    # not sys.stderr: torch.distributed calls excepthook with a buffer there, which a SystemExit would lose
    print(f"error: {message}", file=sys.__stderr__, flush=True)
    if path:
        when = int(time.time()) - 1  # torchrun prints the earliest failure last, as the root cause
        record = {"message": {"message": f"error: {message}", "extraInfo": {"timestamp": when}}}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps(record), encoding="utf-8")
    if not again:
        end_launcher()


def end_launcher() -> None:
    """End torchrun, if it would start this process again only for it to fail in the same way."""
    left = os.environ.get("TORCHELASTIC_MAX_RESTARTS") != os.environ.get("TORCHELASTIC_RESTART_COUNT")
    if "TORCHELASTIC_RUN_ID" in os.environ and left:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which it will send to its workers
        with contextlib.suppress(OSError):  # of another user, or gone; and only torchrun itself, no wrapper
            if is_torchrun(Path(f"/proc/{os.getppid()}/cmdline").read_bytes()):
                os.kill(os.getppid(), signal.SIGTERM)


def is_torchrun(command: bytes) -> bool:
    """Whether that is its command line, as in /proc; a shell or a folder may have torch in its name too."""
    names = {os.path.basename(word) for word in command.split(b"\0")}
    return bool(names & {b"torchrun", b"torch.distributed.run", b"torch.distributed.launch"})


def as_user_error(error: BaseException) -> BaseException:
    """A TemporaryError for a full or failing disk, or a UserError caused by one; else `error` itself."""
    if isinstance(error, OSError) and (error.filename is not None or error.errno in DISK_FULL):
        return TemporaryError(f"{error.filename or 'writing'}: {error.strerror}; name another path, or fix "
                              f"this one")
    failing_disk = isinstance(error, UserError) and isinstance(error.__cause__, OSError)
    return TemporaryError(error) if failing_disk else error


def _exit_with_message(kind, error, trace):
    """sys.excepthook of scripts: one line and exit code 2 for what the user can fix."""
    if kind is BrokenPipeError:  # `... | head` has read enough
        os._exit(1)
    causes = [error]
    while causes[-1].__context__:
        causes.append(causes[-1].__context__)
    if any(isinstance(cause, KeyboardInterrupt) for cause in causes):  # after it, cleaning up may have failed
        print("interrupted", file=sys.__stderr__, flush=True)
        sys.exit(130)  # a SystemExit raised inside the hook sets the exit code; 128 + SIGINT
    shown = as_user_error(error)
    if not isinstance(shown, UserError):
        return sys.__excepthook__(kind, error, trace)
    report_failure(shown, again=isinstance(shown, TemporaryError))
    sys.exit(2)
