"""warm_python.py's interpreter does what the real one does."""

import os
import signal
import subprocess
import sys
import time

import pytest
from training import ENVIRONMENT, PYTHON, ROOT

SCRIPT = """
import multiprocessing, os, sys
from collections import namedtuple
Answer = namedtuple("Answer", "value")

def work(connection):
    connection.send(Answer(6 * 7))

if __name__ == "__main__":
    print(sys.argv[1:], os.getcwd(), sys.path[0], __file__, os.environ["GREETING"], sys.stdin.read())
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    worker = context.Process(target=work, args=(theirs,))
    worker.start()
    print(ours.recv(), isinstance(sys.modules["__main__"].Answer(1), Answer))
    worker.join()
"""


def both(*arguments, **options):
    return [subprocess.run([python, *arguments], capture_output=True, text=True, timeout=60, env=ENVIRONMENT,
                           preexec_fn=let_interrupt, **options)
            for python in (sys.executable, PYTHON)]


def let_interrupt():
    """Ctrl-C's signal is ignored by what a shell starts in the background, and by all below that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def outcome(done):
    return done.returncode, done.stdout, done.stderr.splitlines()[-1:]


@pytest.mark.parametrize("code", [
    "print('ok')", "import sys; sys.exit(3)", "import sys; sys.exit('said')", "1 / 0",
    "raise KeyboardInterrupt", "import sys; sys.exit(-1)", "class Final(BaseException): pass\nraise Final",
    "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "import os, signal; os.kill(os.getpid(), signal.SIGINT); import time; time.sleep(9)",
    "import atexit; atexit.register(print, 'at the end')",
    "import threading, time; threading.Thread(target=lambda: (time.sleep(0.2), print('last'))).start()",
    "import sys; sys.excepthook = lambda *error: sys.exit(7); 1 / 0",
    "import os; os.write(1, b'x'); os.close(1)",
    "import sys; print(sys.argv, sys.stdout.isatty(), sys.flags.dev_mode)",
    "import numpy, torch; print(torch.get_num_threads(), torch.ones(2, 2) @ torch.ones(2))",
])
def test_endings(code):
    real, warm = both("-c", code, "a", "--b=c")
    assert outcome(real) == outcome(warm)


@pytest.mark.parametrize("variable", ["", "1"])
def test_unbuffered(monkeypatch, variable):
    monkeypatch.setitem(ENVIRONMENT, "PYTHONUNBUFFERED", variable)
    real, warm = both("-c", "import os; print('kept?'); os._exit(5)")
    assert outcome(real) == outcome(warm) == (5, "kept?\n" if variable else "", [])
    real, warm = both("-u", "-c", "import os; print('kept'); os._exit(5)")
    assert outcome(real) == outcome(warm) == (5, "kept\n", [])


def test_scripts_and_modules(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    monkeypatch.setitem(ENVIRONMENT, "GREETING", "hello")
    monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", str(tmp_path))
    for arguments in (["../script.py"], [str(tmp_path / "script.py"), "x"], ["-u", "../script.py", "-c", "y"],
                      ["-m", "script", "z"]):
        real, warm = both(*arguments, input="typed", cwd=tmp_path / "here")
        assert (real.returncode, warm.returncode) == (0, 0), warm.stderr
        assert real.stdout == warm.stdout and "hello typed\nAnswer(value=42) True" in warm.stdout, arguments


def test_nothing_of_a_fork_stays_in_the_next():
    code = """
import os, random, sys
import numpy as np
import torch
print(hasattr(torch, "mark"), os.environ.get("MARK"), "model" in sys.modules)
torch.mark = os.environ["MARK"] = "1"
import model
print(torch.rand(1).item())
print(np.random.rand())
print(random.random())
"""
    first, second = (subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout
                     for _ in range(2))
    assert first.startswith("False None False\n") and second.startswith("False None False\n")
    assert len(set(first.split()[3:]) | set(second.split()[3:])) == 6  # nothing random is drawn twice


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGKILL"])
def test_a_signal_to_the_process_in_front(name):
    code = ("import os, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(9)); "
            "print(os.getpid(), flush=True); time.sleep(60)")
    codes = []
    for python in (sys.executable, PYTHON):
        process = subprocess.Popen([python, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                   preexec_fn=let_interrupt)
        inside = int(process.stdout.readline())
        process.send_signal(getattr(signal, name))
        codes.append(process.wait(timeout=60))
        deadline = time.monotonic() + 60
        while os.path.exists(f"/proc/{inside}") and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not os.path.exists(f"/proc/{inside}")
        process.stdout.close()
    assert codes[0] == codes[1] == {"SIGTERM": 9, "SIGINT": -signal.SIGINT, "SIGKILL": -signal.SIGKILL}[name]
