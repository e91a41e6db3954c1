"""hub.py with the real client, against a loopback server that misbehaves on purpose."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from hub_server import Fault, HubServer
from huggingface_hub import constants

import hub
from configurator import UserError
from hub import HubFile, ahead, cached, fetch, fetch_range, list_files, need_space

ROOT = Path(__file__).resolve().parent.parent
REPO, COMMIT = "HuggingFaceFW/fineweb-edu", "c" * 40
NAME = "sample/10BT/000_00000.parquet"
DATA = random.Random(0).randbytes(700_000)


@pytest.fixture
def server():
    with HubServer({NAME: DATA, "README.md": b"# FineWeb-Edu\n"}) as server:
        yield server


@pytest.fixture(autouse=True)
def client(tmp_path, monkeypatch, request):
    """The client, as if started with HF_ENDPOINT and HF_HOME; with short waits."""
    monkeypatch.setattr(hub, "FIRST_WAIT", 0.0005)
    monkeypatch.setattr(hub, "LIST_TIMEOUT", 2)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 2)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    if "server" in request.fixturenames:
        url = request.getfixturevalue("server").url
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                            url + "/{repo_id}/resolve/{revision}/{filename}")


def the_file(server, name=NAME):
    return HubFile(name, len(server.files[name]), server.etag(name))


def run_python(code, **environment):
    """A new process with these variables and no others of the hub; its CompletedProcess.

    At its end, its daemon threads have time to find that the client was closed.
    """
    clean = {key: value for key, value in os.environ.items()
             if not key.startswith("HF_") and "proxy" not in key.lower()}
    start = (f"import atexit, sys, time\natexit.register(time.sleep, 0.3)\n"
             f"sys.path.insert(0, {str(ROOT)!r})\nfrom pathlib import Path\nimport hub\n")
    return subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True, timeout=120,
                          env=clean | environment, cwd=ROOT)


# ---- the listing ---------------------------------------------------------------


def test_list_files(server):
    commit, files = list_files(REPO)
    assert commit == COMMIT
    assert files == [the_file(server, "README.md"), the_file(server)]
    assert [len(file.etag) for file in files] == [40, 64]
    assert list_files(REPO, COMMIT) == (commit, files)


@pytest.mark.parametrize("fault", [Fault("drop", after=50), Fault("truncate", after=50), Fault("stall"),
                                   Fault("status", status=500), Fault("status", status=503),
                                   Fault("status", status=429, headers=(("Retry-After", "0"),))],
                         ids=lambda fault: f"{fault.kind}-{fault.status}")
def test_a_listing_is_asked_for_again(server, fault, capsys):
    server.faults += [fault._replace(match="/api/")] * 2
    assert len(list_files(REPO)[1]) == 2
    assert not server.faults
    assert capsys.readouterr().err.count("attempt") == 2


def test_no_listing_names_the_other_ways(server, monkeypatch, capsys):
    with pytest.raises(UserError, match="check the name and the revision"):
        list_files(REPO, "no-such-branch")
    with pytest.raises(UserError, match="404"):
        list_files("HuggingFaceFW/no-such-dataset")
    assert not capsys.readouterr().err  # without another attempt
    monkeypatch.setattr(constants, "ENDPOINT", "http://user:password@127.0.0.1:1")
    with pytest.raises(UserError) as caught:
        list_files(REPO)
    for way in ("http://127.0.0.1:1", "HF_ENDPOINT=", "--input=FOLDER", "--dataset=python", "make demo"):
        assert way in str(caught.value)
    assert "password" not in str(caught.value) + capsys.readouterr().err


SIBLING = {"rfilename": "a.parquet", "size": 12, "blobId": "b" * 40, "lfs": {"sha256": "d" * 64}}
PATHS = ["", ".", "..", "../x", "/etc/passwd", "a//b", "a/", "a/..", "a/../b", "a/./b", "a\\b", "C:x", "c:/x",
         "a\0b", "a\nb", "a\n", "..\n", "\x1b[31m", "a\x9b", "\ud800", 1, None, ["a"]]


@pytest.mark.parametrize("answer", [
    *({"siblings": [SIBLING, SIBLING | {"rfilename": path}]} for path in PATHS),
    *({"siblings": [SIBLING | {"size": size}]} for size in (-1, "12", True, 1.0, None, 1 << 60, 1e999)),
    *({"siblings": [SIBLING | {"lfs": {"sha256": text}}]} for text in ("../" * 20 + "x", "D" * 64, "d" * 63,
                                                                      "d" * 40, "d" * 64 + "\n", None)),
    *({"siblings": [SIBLING | {"lfs": None, "blobId": text}]} for text in ("../x", "b" * 64, None)),
    *({"sha": sha} for sha in ("main", "../" * 13 + "x", "c" * 64, 1, None)),
    *({"siblings": siblings} for siblings in ({}, "x", [1], [{}], [SIBLING | {"lfs": "x"}])),
    b"<html>log in here</html>", b"[]", b"\xff\xfe", b'{"sha":', b"[" * 1_000_000, b"9" * 10_000], ids=repr)
def test_a_hostile_listing(server, monkeypatch, answer):
    """Nothing of a listing is used before all of it was checked."""
    if isinstance(answer, dict):
        answer = json.dumps({"sha": COMMIT, "siblings": [SIBLING]} | answer).encode()
    monkeypatch.setattr(server, "listing", lambda *_: answer)
    with pytest.raises(UserError, match=r"cannot list(.|\n)*login"):
        list_files(REPO)


def test_unusual_names_are_names(server):
    for name in ("a b/ü.parquet", "..a/b..", "...", "ab:c", "100%/x?y#z.parquet"):
        server.files[name] = name.encode()
    commit, files = list_files(REPO)
    assert {file.path for file in files} == set(server.files)
    for file in files:
        assert fetch_range(REPO, commit, file, 0, file.size) == server.files[file.path]


def test_a_listing_of_a_gigabyte(server):
    """It is refused at the limit, and the memory stays near that."""
    resource = pytest.importorskip("resource")
    server.faults += [Fault("flood", match="/api/")]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="more than 33,554,432 bytes"):
        list_files(REPO)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 3 * hub.LIST_LIMIT // 1024  # KB


# ---- complete files ------------------------------------------------------------

FAULTS = {
    "drop": Fault("drop", after=100_000), "truncate": Fault("truncate", after=100_000),
    "short": Fault("short", after=100_000), "stall": Fault("stall", after=100_000), "silence": Fault("stall"),
    **{str(status): Fault("status", status=status) for status in (408, 416, 500, 502, 503, 504)},
    "429": Fault("status", status=429, headers=(("Retry-After", "0"),)),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("cdn", [False, True], ids=["direct", "cdn"])
def test_fetch_survives(server, tmp_path, name, cdn, capsys):
    server.cdn = cdn
    server.faults += [FAULTS[name]._replace(match="/cdn/" if cdn else "/resolve/")] * 2
    path = fetch(REPO, COMMIT, the_file(server), tmp_path / "new" / "downloads")
    assert path.read_bytes() == DATA
    assert [path] == list((tmp_path / "new" / "downloads").iterdir()) and not server.faults
    said = capsys.readouterr().err
    assert said.count("attempt") == 2 and "secret" not in said  # as the rest of a CDN's address is
    if name in ("truncate", "short", "stall"):  # what came is kept
        assert [request.range for request in server.bodies()] == [
            f"bytes={k * 100_000}-{len(DATA) - 1}" for k in range(3)]
        assert sum(request.sent for request in server.bodies()) == len(DATA)
    seen = len(server.requests)
    assert fetch(REPO, COMMIT, the_file(server), path.parent) == path and len(server.requests) == seen


def test_progress_is_followed_by_as_many_attempts_again(server, tmp_path):
    server.faults += [Fault("truncate", after=20_000)] * 30
    assert fetch(REPO, COMMIT, the_file(server), tmp_path).read_bytes() == DATA
    assert len(server.bodies()) == 31 > hub.ATTEMPTS


def test_fetch_gives_up_and_continues_when_run_again(server, tmp_path):
    server.faults += [Fault("truncate", after=100_000)] + [Fault("status", status=503)] * hub.ATTEMPTS
    with pytest.raises(UserError, match="run the same command again") as caught:
        fetch(REPO, COMMIT, the_file(server), tmp_path)
    assert "HTTP 503" in str(caught.value) and NAME in str(caught.value)
    assert len(server.faults) == 1  # the first failure was followed by nine
    server.faults.clear()
    assert fetch(REPO, COMMIT, the_file(server), tmp_path).read_bytes() == DATA
    assert server.bodies()[-1].range == f"bytes=100000-{len(DATA) - 1}"


@pytest.mark.parametrize(("status", "advice"), [(401, "HF_TOKEN"), (403, "HF_TOKEN"), (404, "revision")])
def test_what_stays_wrong_is_not_asked_for_again(server, tmp_path, status, advice, capsys):
    server.faults += [Fault("status", status=status)] * 2
    with pytest.raises(UserError, match=advice):
        fetch(REPO, COMMIT, the_file(server), tmp_path)
    with pytest.raises(UserError, match=advice):
        fetch_range(REPO, COMMIT, the_file(server), 0, 10)
    assert "attempt" not in capsys.readouterr().err and len(server.requests) == 2


def test_a_server_that_ignores_ranges_or_sends_others(server, tmp_path, capsys):
    server.faults += [Fault("truncate", after=100_000), Fault("other_range"), Fault("ignore_range")]
    assert fetch(REPO, COMMIT, the_file(server), tmp_path).read_bytes() == DATA
    assert [request.status for request in server.bodies()] == [206, 206, 200]
    assert "Content-Range 'bytes 100001-" in capsys.readouterr().err


@pytest.mark.parametrize("name", [NAME, "README.md"])
def test_corrupt_contents_are_found_by_the_hash(server, tmp_path, name, capsys):
    file = the_file(server, name)
    (tmp_path / f"{file.etag}.incomplete").write_bytes(server.files[name] + b"more")
    server.faults += [Fault("corrupt")]
    assert fetch(REPO, COMMIT, file, tmp_path).read_bytes() == server.files[name]
    assert capsys.readouterr().err.count("corrupt") == 2
    os.unlink(tmp_path / f"{file.etag}.parquet")
    server.faults += [Fault("corrupt")] * 3
    with pytest.raises(UserError, match="3 downloads were corrupt"):
        fetch(REPO, COMMIT, file, tmp_path)
    assert not server.faults and not list(tmp_path.glob("[0-9a-f]*"))


def test_a_full_disk_is_named_at_once(server, tmp_path):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            fetch(REPO, COMMIT, the_file(server), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(server.bodies()) == 1
    assert fetch(REPO, COMMIT, the_file(server), tmp_path).read_bytes() == DATA  # there is room again
    assert int(server.bodies()[-1].range[6:].split("-")[0]) > 100_000


def test_kill_9_in_the_middle_of_a_download(server, tmp_path):
    file = the_file(server)
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import hub\n"
            f"hub.fetch({REPO!r}, {COMMIT!r}, hub.HubFile(*{tuple(file)!r}), hub.Path({str(tmp_path)!r}))")
    partial = tmp_path / f"{file.etag}.incomplete"
    environment = os.environ | {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"),
                                "HF_HUB_DOWNLOAD_TIMEOUT": "20"}
    for k in (1, 2):  # killed twice
        server.faults.append(Fault("stall", after=200_000))
        process = subprocess.Popen([sys.executable, "-c", code], env=environment)
        while process.poll() is None and not (partial.exists() and partial.stat().st_size >= k * 200_000):
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert fetch(REPO, COMMIT, file, tmp_path).read_bytes() == DATA
    assert [request.range for request in server.bodies()] == [
        f"bytes={k * 200_000}-{len(DATA) - 1}" for k in range(3)]


def test_the_cache_of_the_client_is_read_and_never_written(server, tmp_path):
    file, cache = the_file(server), tmp_path / "home" / "hub"
    assert cached(REPO, file) is None
    link = Path(huggingface_hub.hf_hub_download(REPO, NAME, revision=COMMIT, repo_type="dataset"))
    server.requests.clear()
    assert cached(REPO, file) == link.resolve() == fetch(REPO, "d" * 40, file, tmp_path / "new")
    assert not server.requests and not (tmp_path / "new").exists()
    os.truncate(link, 1000)
    before = {path: path.lstat().st_mtime_ns for path in cache.rglob("*")}
    assert fetch(REPO, COMMIT, file, tmp_path / "new").read_bytes() == DATA
    list_files(REPO)
    assert {path: path.lstat().st_mtime_ns for path in cache.rglob("*")} == before


# ---- ranges --------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FAULTS, "ignore_range", "other_range"])
def test_a_range_is_complete_whatever_happens(server, name):
    fault = FAULTS.get(name, Fault(name))
    server.faults += [fault._replace(after=min(fault.after, 10_000))] * 2
    assert fetch_range(REPO, COMMIT, the_file(server), 50_000, 150_000) == DATA[50_000:150_000]
    assert not server.faults or name == "ignore_range"
    if name in ("truncate", "short", "stall"):  # what came is kept
        assert [request.range for request in server.bodies()] == [
            f"bytes={50_000 + k * 10_000}-149999" for k in range(3)]
    assert fetch_range(REPO, COMMIT, the_file(server), 7, 7) == b""


# ---- waits ---------------------------------------------------------------------


def test_waits(monkeypatch):
    waits = []
    monkeypatch.setattr(hub, "time", SimpleNamespace(sleep=waits.append))
    monkeypatch.setattr(hub, "FIRST_WAIT", 1.0)

    def fail():
        raise OSError("no route")

    with pytest.raises(UserError, match="no route"):
        hub.retry("a file", fail)
    assert len(waits) == hub.ATTEMPTS - 1
    for wait, middle in zip(waits, (1, 2, 4, 8, 16, 32, 60, 60, 60)):
        assert 0.5 * middle <= wait <= 1.5 * middle
    assert len(set(waits)) == len(waits)  # jitter
    with pytest.raises(ZeroDivisionError):  # a bug of ours is not the network's
        hub.retry("a file", lambda: 1 / 0)


@pytest.mark.parametrize(("name", "text", "seconds"), [
    ("Retry-After", "7", 7), ("Retry-After", "100000", 300), ("Retry-After", "soon", 0),
    ("RateLimit", '"api";r=0;t=55', 55), ("RateLimit", '"api";r=9;t=55', 0)])
def test_the_hub_says_how_long_to_wait(server, monkeypatch, name, text, seconds, capsys):
    waits = []
    monkeypatch.setattr(hub, "time", SimpleNamespace(sleep=waits.append))
    server.faults.append(Fault("status", status=429, headers=((name, text),)))
    assert fetch_range(REPO, COMMIT, the_file(server), 0, 10) == DATA[:10]
    assert len(waits) == 1
    assert waits[0] == seconds if seconds else 0 < waits[0] < 0.1
    assert f"HTTP 429 for GET {server.url}" in capsys.readouterr().err


# ---- the environment: new processes, as the client reads it when it is imported ----


def test_variables_of_the_client(server, tmp_path):
    """HF_ENDPOINT, HF_HOME, HF_TOKEN and HTTP_PROXY in one process; then HF_HUB_OFFLINE in another."""
    server.cdn, server.token = True, "hf_secret"
    code = (f"commit, files = hub.list_files({REPO!r})\n"
            f"path = hub.fetch({REPO!r}, commit, files[1], Path({str(tmp_path)!r}))\n"
            f"print(hub.fetch_range({REPO!r}, commit, files[1], 0, 10) == path.read_bytes()[:10])")
    environment = {"HF_ENDPOINT": "http://hub.invalid", "HF_HOME": str(tmp_path / "elsewhere"),
                   "HF_TOKEN": "hf_secret", "HTTP_PROXY": server.url}
    done = run_python(code, **environment)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
    assert {request.headers["host"] for request in server.requests} == {
        "hub.invalid", f"localhost:{server.port}"}  # all of it went through the proxy
    for request in server.requests:  # the token goes to the hub, and not to the other host
        token = "Bearer hf_secret" if request.headers["host"] == "hub.invalid" else None
        assert request.headers.get("authorization") == token
    denied = run_python(code, **environment | {"HF_TOKEN": "hf_wrong"})
    assert denied.returncode == 1 and "HF_TOKEN" in denied.stderr and "attempt 2" not in denied.stderr

    done = run_python("from huggingface_hub import hf_hub_download\n"
                      f"hf_hub_download({REPO!r}, {NAME!r}, repo_type='dataset')", **environment)
    assert done.returncode == 0, done.stderr
    seen = len(server.requests)
    code = (f"commit, files = hub.list_files({REPO!r})\n"
            f"file = hub.HubFile(*{tuple(the_file(server))!r})\n"
            f"print(commit, files == [file], hub.fetch({REPO!r}, commit, file, Path('none')).is_file())\n"
            f"other = hub.HubFile('other.parquet', 1, 'e' * 64)\n"
            f"for call in (lambda: hub.fetch({REPO!r}, commit, other, Path({str(tmp_path)!r})),\n"
            f"             lambda: hub.fetch_range({REPO!r}, commit, files[0], 0, 1),\n"
            f"             lambda: hub.list_files({REPO!r}, 'v2')):\n"
            f"    try:\n        call()\n"
            f"    except hub.UserError as error:\n        print('USER', error)\n")
    offline = run_python(code, **environment | {"HF_HUB_OFFLINE": "1"})
    assert offline.returncode == 0, offline.stderr
    first, *errors = offline.stdout.splitlines()
    assert first == f"{COMMIT} True True"
    assert len(errors) == 3 and all("USER" in error and "HF_HUB_OFFLINE" in error for error in errors)
    assert len(server.requests) == seen


def test_a_socks_proxy_without_its_package():
    done = run_python(f"try:\n    hub.list_files({REPO!r})\nexcept hub.UserError as error:\n    print(error)",
                      ALL_PROXY="socks5://user:password@127.0.0.1:1")
    assert done.returncode == 0 and done.stdout.startswith(f"cannot list {REPO}"), done.stderr
    assert "unset ALL_PROXY" in done.stdout and "password" not in done.stdout + done.stderr
    assert "attempt" not in done.stderr


# ---- ahead ---------------------------------------------------------------------


def begun_after(wait_for, calls):
    """The calls, once there are `wait_for` of them and, after a while, no more."""
    for _ in range(2000):
        if len(calls) >= wait_for:
            break
        time.sleep(0.005)
    time.sleep(0.05)
    return "".join(calls)


def test_ahead_is_two_items_ahead_in_order():
    calls = []
    results = ahead(lambda item: calls.append(item) or item.upper(), iter("abcdef"))
    for number, result in enumerate(results):
        assert result == "ABCDEF"[number]
        assert begun_after(min(number + 3, 6), calls) == "abcdef"[:number + 3]
    assert list(ahead(str, [])) == []


def test_ahead_raises_where_the_item_is_due():
    calls = []

    def function(item):
        calls.append(item)
        if item == "b":
            raise UserError("bad file")
        return item

    results = ahead(function, "abc")
    assert next(results) == "a"
    assert begun_after(2, calls) == "ab"
    with pytest.raises(UserError, match="bad file"):
        next(results)
    assert list(results) == [] and begun_after(2, calls) == "ab"

    def items():
        yield 1
        raise UserError("no more items")

    results = ahead(str, items())
    assert next(results) == "1"
    with pytest.raises(UserError, match="no more items"):
        next(results)


def test_ahead_closed_begins_nothing():
    calls, gate = [], threading.Semaphore(1)
    results = ahead(lambda item: calls.append(item) or gate.acquire(timeout=20), "abcd")
    next(results)
    assert begun_after(2, calls) == "ab"
    results.close()
    gate.release(100)
    assert begun_after(2, calls) == "ab"


def test_ahead_holds_up_neither_exit_nor_ctrl_c():
    done = run_python("results = hub.ahead(lambda item: time.sleep(1000 * item), [0, 1])\n"
                      "print(next(results))")
    assert (done.returncode, done.stdout, done.stderr) == (0, "None\n", "")
    done = run_python("import signal, threading\n"
                      "results = hub.ahead(lambda item: time.sleep(1000), [0])\n"
                      "try:\n    threading.Timer(0.2, lambda: signal.raise_signal(signal.SIGINT)).start()\n"
                      "    next(results)\nexcept KeyboardInterrupt:\n    print('stopped')")
    assert (done.stdout, done.stderr) == ("stopped\n", "")


def test_exit_in_the_middle_of_a_download_is_quiet(server, tmp_path):
    file = the_file(server)
    server.faults.append(Fault("drip"))
    code = (f"file, folder = hub.HubFile(*{tuple(file)!r}), Path({str(tmp_path)!r})\n"
            f"results = hub.ahead(lambda item: item and hub.fetch({REPO!r}, {COMMIT!r}, item, folder),\n"
            f"                    [None, file])\n"
            f"next(results)\n"
            f"partial = folder / (file.etag + '.incomplete')\n"
            f"while not (partial.exists() and partial.stat().st_size >= 100):\n    time.sleep(0.01)\n")
    done = run_python(code, HF_ENDPOINT=server.url, HF_HOME=str(tmp_path / "home"),
                      HF_HUB_DOWNLOAD_TIMEOUT="60")
    assert (done.returncode, done.stderr) == (0, "")


# ---- the disk ------------------------------------------------------------------


def test_need_space(tmp_path, capsys, monkeypatch):
    free = 7_000_000_000
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    folder = tmp_path / "not" / "yet"
    need_space(folder, free)
    assert capsys.readouterr().out == f"disk of {folder}: needs 7.00 GB, 7.00 GB are free\n"
    with pytest.raises(UserError, match=r"needs 7\.00 GB.*--data_dir.*--max_tokens"):
        need_space(folder, free + 1)
