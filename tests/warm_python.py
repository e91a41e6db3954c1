"""A Python that starts at once, for tests that run many scripts: importing torch takes most of a short run.

    warm_python()  # the path of an interpreter: python [-u] SCRIPT|-m MODULE|-c CODE [ARGUMENT ...]

A server imports the libraries once, computes nothing and starts no thread; every start is a fork of it. In
front stands a process of the caller's own, with which all is done as with a real interpreter: it hands over
its arguments, environment, folder and open files, passes signals on, and ends as the fork ends; the fork dies
with it. None of this repository's files are imported before the fork. Needs Linux; elsewhere, and with
WARM_PYTHON=0, the path is sys.executable.

What is not as with a real one, and tests of it start that: the parent and the process group are others; what
an import reads from the environment (OMP_NUM_THREADS, here 1; PYTHONHASHSEED) is the server's; a script that
forgets to import a library's module finds it; the interpreter is not taken down at the end.
"""

import atexit
import contextlib
import functools
import io
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import types
from pathlib import Path

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
LIBRARIES = ("torch", "torch._dynamo", "torch._inductor", "torch.distributed.run", "torch.distributed.fsdp",
             "torch.distributed.checkpoint", "torch.utils.checkpoint", "numba", "tqdm")


@functools.cache
def warm_python() -> str:
    """The path of the interpreter; its server ends with this process, however that ends."""
    if not hasattr(os, "pidfd_open") or os.environ.get("WARM_PYTHON") == "0":
        return sys.executable
    folder = Path(tempfile.mkdtemp(prefix="warm_python"))
    server = subprocess.Popen([sys.executable, __file__, "--serve", str(folder / "socket")],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert server.stdout.read(1) == b"+", "the server of warm processes did not start"  # it still imports
    atexit.register(server.communicate)  # its input ends, and so does it
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -IS "{__file__}" "{folder}/socket" "$@"\n',
                      encoding="utf-8")
    python.chmod(0o755)
    return str(python)


# ---- the process in front ----------------------------------------------------------


def stand_in(path: str, arguments: list[str]) -> None:
    """Have the server fork, and end as the fork ends."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        request = json.dumps([arguments, dict(os.environ), os.getcwd()]).encode()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)  # until they are passed on
        socket.send_fds(server, [b"+"], [0, 1, 2])
        server.sendall(len(request).to_bytes(8, "big") + request)

        def pass_on(number, frame):
            with contextlib.suppress(OSError):  # the fork has ended
                server.sendall(bytes([number]))

        for number in PASSED_ON:
            signal.signal(number, pass_on)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        status = int(server.makefile().readline() or sys.exit("the server of warm processes has ended"))
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


# ---- the server ----------------------------------------------------------------------


def serve(listener: socket.socket) -> tuple[list[str], dict[str, str], str]:
    """Fork for every request, and return it in the fork alone; the server ends with its standard input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, whose end is this one's
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # who has ended need not be waited for
    while True:
        ready, _, _ = select.select([listener, 0], [], [])
        if 0 in ready:
            shutil.rmtree(Path(sys.argv[2]).parent)
            os._exit(0)
        client, _ = listener.accept()
        if os.fork():
            client.close()
            continue
        listener.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _, files, _, _ = socket.recv_fds(client, 1, 3)
        size = int.from_bytes(read(client, 8), "big")
        request = json.loads(read(client, size))
        script = os.fork()
        if not script:
            client.close()
            for number, file in enumerate(files):
                os.dup2(file, number)
                os.close(file)
            return request
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for file in (0, 1, 2, *files):
            os.close(file)
        os._exit(guard(script, client))


def read(client: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += client.recv(size - len(data)) or sys.exit("the process in front has gone")
    return data


def guard(script: int, client: socket.socket) -> int:
    """Pass signals to the script, kill it when the process in front has gone, and say how it ended."""
    ended = os.pidfd_open(script)
    while True:
        ready, _, _ = select.select([ended, client], [], [])
        if ended in ready:
            status = os.waitstatus_to_exitcode(os.waitpid(script, 0)[1])
            client.sendall(f"{status}\n".encode())
            return 0
        for number in client.recv(64) or [signal.SIGKILL]:
            signal.pidfd_send_signal(ended, number)


def run(arguments: list[str], environment: dict[str, str], folder: str) -> None:
    """What `python ARGUMENTS` does, in this process."""
    import numpy as np
    import torch

    torch.default_generator.seed()  # as an import does; or all forks would draw the same
    np.random.seed()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    unbuffered = arguments[0] == "-u" or bool(environment.get("PYTHONUNBUFFERED"))
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(open(file, "wb", 0 if unbuffered else -1, closefd=False), "utf-8", errors,
                         write_through=unbuffered, line_buffering=file == 2 or os.isatty(file))
        for file, errors in ((1, "strict"), (2, "backslashreplace")))

    kind, *sys.argv = arguments[arguments[0] == "-u":]
    sys.path[0] = folder if kind == "-m" else "" if kind == "-c" else os.path.dirname(os.path.realpath(kind))
    sys.path[1:1] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    main = sys.modules["__main__"] = sys.modules["__mp_main__"] = types.ModuleType("__main__")
    if kind == "-m":
        sys.modules.pop(sys.argv[0], None)
        runpy._run_module_as_main(sys.argv[0])  # what the interpreter itself calls
        return
    if kind == "-c":
        source, sys.argv[0] = sys.argv[0], "-c"
    else:
        main.__file__, source = os.path.join(folder, kind), Path(kind).read_text(encoding="utf-8")
        sys.argv.insert(0, kind)
    exec(compile(source, main.__dict__.get("__file__", "<string>"), "exec"), main.__dict__)


def main(status=1) -> None:
    """The server, and every fork of it. A fork ends as any Python does (threads, atexit) up to the point
    where the interpreter frees what it holds, which takes a second in a fork: each page is copied first."""
    def end():
        sys.stdout.flush()
        sys.stderr.flush()
        if status < 0:
            signal.signal(-status, signal.SIG_DFL)
            os.kill(os.getpid(), -status)
        os._exit(status)

    atexit.register(end)  # the first to come is the last to be called
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(sys.argv[2])
    listener.listen(64)
    os.write(1, b"+")
    for name in LIBRARIES:
        __import__(name)
    request = serve(listener)
    try:
        try:
            run(*request)
            status = 0
        except (Exception, KeyboardInterrupt) as error:
            status = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
            sys.excepthook(*sys.exc_info())  # a script's own may end it with another code
    except SystemExit as error:
        status = error.code & 255 if isinstance(error.code, int) else int(error.code is not None)
        raise


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        main()
    else:
        stand_in(sys.argv[1], sys.argv[2:])
