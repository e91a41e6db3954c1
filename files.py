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

from configurator import DISK_FULL, TYPES, Between, OneOf, TemporaryError, UserError


@contextlib.contextmanager
def locked(folder: str | Path, what: str, patience: float = 0, name: str = ".lock"):
    """Keep a second `what` ("run", "build") out of a folder while this block, or this process, lives.

    The operating system drops the lock when the process ends, however it ends. Raises TemporaryError if
    another process holds it for longer than `patience` seconds. Where the file system has no locks, the block
    runs after a warning. Locks with different names do not exclude each other.
    """
    path, deadline = Path(folder, name), time.monotonic() + patience
    while True:
        file = open(path, "a+", encoding="utf-8", errors="replace")
        try:
            import fcntl  # Windows has none
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_nlink:  # 0: its holder removed it between our open and lock
                break
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
    if error.errno in DISK_FULL:
        free = shutil.disk_usage(path.parent).free
        return UserError(f"no space for {path} ({error.strerror}): {free:,} bytes are free; make room, or "
                         f"write to another disk")
    return UserError(f"cannot write {path} ({error.strerror or error}); check the permissions of the folder, "
                     f"or write to another one")


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


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, without its byte order mark. Raises UserError if it is not one."""
    path = Path(path)
    if path.exists() and not path.is_file():  # reading a pipe would wait for whoever writes into it
        raise UserError(f"{path}: not a regular file; name a text file")
    data = path.read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path}: this text is UTF-16; convert it: iconv -f UTF-16 -t UTF-8 {path}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start:,} is not UTF-8 ({error.reason}); convert the file, for "
                        f"example with iconv") from error


def read_json(path: str | Path, schema):
    """The value of a JSON file that `check` accepts; UserError names the file and what is wrong with it."""
    return check(_parse(read_text(path), path), schema, str(path))


def read_jsonl(path: str | Path, schema) -> list:
    """The values of a file with one JSON value a line, each of which `check` accepts; [] without a file.
    An incomplete last line, left by a kill, is skipped."""
    lines = read_text(path).split("\n")[:-1] if Path(path).exists() else []
    places = [f"{path}, line {number}" for number in range(1, len(lines) + 1)]
    return [check(_parse(line, place), schema, place) for line, place in zip(lines, places)]


def _parse(text, place):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not valid JSON ({error or 'nested too deeply'})") from error


def check(value, schema, place: str):
    """`value`, if it is what `schema` describes. Raises UserError, which begins with `place`, if not.

    A schema is one of these:
        int, str, ...              this type; float takes whole numbers too, and bool is no int
        Between, OneOf, None       Between takes whole numbers only, if both its ends are
        re.compile(...)            a text that matches completely
        (schema, schema, ...)      one of these
        [schema]                   a list of any length
        [schema, schema, ...]      a list of this length
        {name: schema, "n?": ...}  a dict with these names, others too; those that end in ? may be missing
        {str: schema}              a dict of any names
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
    """(whether `value` fits, the schema in words), for all that `check` does not go into."""
    if isinstance(schema, dict):
        return False, "an object"
    if isinstance(schema, list):
        return False, "a list" if len(schema) == 1 else f"a list of {len(schema)}"
    if isinstance(schema, Between):
        kind = float if float in map(type, schema) else int
        return type(value) in (int, kind) and value in schema, f"{TYPES[kind]}, {schema}"
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
