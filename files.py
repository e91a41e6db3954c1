"""
Files and folders that outlive a process: locked while one writes, written completely or not at all, and
checked when they are read.

    with locked("log", "run"):                           # no second run in this folder meanwhile
    write_atomically(Path("log/log.txt"), b"...")        # temporary name, fsync, rename
    record = read_json(path, {"format": OneOf(1), "files": [{"file": str, "tokens": Between(0, 2**40)}]})

Imported by the other scripts; nothing to run.
"""

import contextlib
import errno
import json
import os
import platform
import re
import reprlib
import shutil
import sys
import time
from pathlib import Path

from configurator import DISK_FULL, TYPES, Between, OneOf, TemporaryError, UserError, read_text


@contextlib.contextmanager
def locked(folder: str | Path, what: str, patience: float = 0, name: str = ".lock"):
    """Keep a second `what` ("run", "build") out of a folder while this block, or this process, lives.

    The operating system drops the lock when the process ends, however it ends. Raises TemporaryError while
    another process holds it, after `patience` seconds. Where the file system has no locks, a line on stderr
    says so, and the block runs. Locks with different names do not exclude each other.
    """
    path, deadline = Path(folder, name), time.monotonic() + patience
    while True:
        file = open(path, "a+", encoding="utf-8", errors="replace")
        try:
            import fcntl  # Windows has none
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                break
        except FileNotFoundError:
            pass  # its holder has just removed it
        except BlockingIOError:
            if time.monotonic() >= deadline:
                file.seek(0)
                holder = file.read(1000).strip() or "another process"
                raise TemporaryError(f"a {what} is at work in {folder}: {holder}; wait until it ends, stop "
                                     f"it, or choose another folder") from None
            time.sleep(1)
        except (ImportError, OSError) as error:
            print(f"warning: {folder} cannot be locked ({getattr(error, 'strerror', None) or error}); make "
                  f"sure that only one {what} at a time writes there", file=sys.stderr, flush=True)
            yield
            return
        file.close()
    with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}, since {time.strftime('%F %T')}\n")
        file.flush()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def write_atomically(path: Path, *parts) -> None:
    """Write the byte buffers `parts` to `path`: temporary name, fsync, rename.

    Raises UserError when the disk is full or the folder cannot be written; nothing is left behind then.
    """
    with replacing(path) as file:
        file.writelines(parts)


@contextlib.contextmanager
def replacing(path: Path):
    """A new binary file that takes the place of `path` when the block ends; if it fails, nothing is left."""
    if path.exists() and not path.is_file():  # as root, the rename would replace /dev/null
        raise UserError(f"cannot write {path}: it is not a regular file; name another")
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            sync_file(file)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):  # the first error is the one to report
            temporary.unlink()
        if isinstance(error, OSError):
            raise not_written(path, error) from error
        raise


def not_written(path: Path, error: OSError) -> UserError:
    """The UserError for a file that could not be written."""
    if error.errno not in DISK_FULL:
        return UserError(f"cannot write {path} ({error.strerror or error}); check the permissions of the "
                         f"folder, or write to another one")
    free = shutil.disk_usage(path.parent).free
    return UserError(f"no space for {path} ({error.strerror}): {free:,} bytes are free; make room, or write "
                     f"to another disk")


def sync_file(file) -> None:
    """Flush an open file to the disk."""
    file.flush()
    _sync(file.fileno())


def sync_folder(path: str | Path) -> None:
    """Make the renames in a folder survive a power cut."""
    if os.name == "nt":  # Windows cannot open a folder
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        _sync(folder)
    finally:
        os.close(folder)


def _sync(descriptor):
    try:
        os.fsync(descriptor)
    except OSError as error:  # shared folders, SMB and FUSE often cannot; EIO is a failing disk
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise


def read_json(path: str | Path, schema):
    """The value of a JSON file that `check` accepts; UserError names the file and what is wrong with it."""
    return check(_parse(read_text(path), path), schema, str(path))


def read_jsonl(path: str | Path, schema) -> list:
    """The values of a file with one JSON value a line, each of which `check` accepts; [] where there is no
    file. Half a last line, left by a kill, is passed over."""
    if not Path(path).exists():
        return []
    values = []
    for number, line in enumerate(read_text(path).splitlines(keepends=True), start=1):
        if line.endswith("\n"):
            values.append(check(_parse(line, f"{path}, line {number}"), schema, f"{path}, line {number}"))
    return values


def _parse(text, place):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not valid JSON ({error or 'nested too deeply'})") from error


def check(value, schema, place: str):
    """Raise UserError, which speaks of `place`, unless `value` is what `schema` describes; returns `value`.

    A schema is a type (float takes whole numbers too, and bool is no int), a Between (of whole numbers, if
    both its ends are), a OneOf, None, a compiled pattern of text, a tuple of schemas of which one must fit,
    [schema] for a list of such, [schema, schema, ...] for a list of just these, {name: schema} for a dict
    with these names (those that end in ? may be missing, others may stand beside them), or {str: schema} for
    a dict of any names.
    """
    if isinstance(schema, dict) and isinstance(value, dict):
        for name, part in schema.items():
            if name is str:
                for key, item in value.items():
                    check(key, str, f"{place}, a name")
                    check(item, part, f"{place}, {key}")
            elif (plain := name.rstrip("?")) in value:
                check(value[plain], part, f"{place}, {plain}")
            elif plain == name:
                raise UserError(f"{place}: {name} is missing")
    elif isinstance(schema, list) and isinstance(value, (list, tuple)) and len(schema) in (1, len(value)):
        for i, item in enumerate(value):
            check(item, schema[i % len(schema)], f"{place}, number {i + 1}")
    else:
        fits, words = _compare(value, schema)
        if not fits:
            raise UserError(f"{place}: {reprlib.repr(value)}, wanted {words}")
    return value


def _compare(value, schema):
    """(whether `value` fits, the schema in words), where it is not a dict or list of the schema's form."""
    if isinstance(schema, dict):
        return False, "an object"
    if isinstance(schema, list):
        return False, "a list" if len(schema) == 1 else f"a list of {len(schema)}"
    if isinstance(schema, Between):
        return type(value) in (int, schema.kind) and value in schema, f"{TYPES[schema.kind]}, {schema}"
    if isinstance(schema, OneOf):
        return (type(value), value) in [(type(word), word) for word in schema], str(schema)
    if isinstance(schema, tuple):
        for part in schema:
            with contextlib.suppress(UserError):
                check(value, part, "")
                return True, ""
        return False, " or ".join(_compare(None, part)[1] for part in schema)
    if isinstance(schema, re.Pattern):
        return isinstance(value, str) and schema.fullmatch(value), f"text like {schema.pattern}"
    if schema is None:
        return value is None, "null"
    return type(value) in ((int, float) if schema is float else (schema,)), TYPES.get(schema, schema.__name__)
