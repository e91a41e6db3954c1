"""hub.py with the hub's real client, against a loopback server that misbehaves on purpose."""

import email.utils
import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import Fault, HubServer
from huggingface_hub import constants

import hub
from configurator import UserError
from documents import column_span
from hub import HubFile, Prefetcher, fetch, in_cache, list_files, need_space, open_ranges, remove

ROOT = Path(__file__).resolve().parent.parent
REPO, COMMIT = "HuggingFaceFW/fineweb-edu", "c" * 40
NAME = "sample/10BT/000_00000.parquet"


def fineweb_parquet(documents, rows, seed=1, **settings):
    """A parquet file with FineWeb-Edu's columns, `rows` documents in a row group."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(1, 9))) for _ in range(3000)]
    texts = [" ".join(draw.choices(words, k=draw.randint(20, 600))) for _ in range(documents)]
    scores = [draw.uniform(2.5, 5) for _ in texts]
    table = pa.table({
        "text": texts,
        "id": [f"<urn:uuid:{i:032x}>" for i in range(documents)],
        "dump": ["CC-MAIN-2024-10"] * documents,
        "url": [f"https://example.org/{i}" for i in range(documents)],
        "file_path": [f"s3://commoncrawl/{i}.warc.gz" for i in range(documents)],
        "language": ["en"] * documents,
        "language_score": [0.9] * documents,
        "token_count": [len(text) // 4 for text in texts],
        "score": scores,
        "int_score": [round(score) for score in scores]})
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=rows, **settings)
    return sink.getvalue()


@pytest.fixture(scope="module")
def parquet():
    return fineweb_parquet(1000, 125, compression="snappy")


@pytest.fixture
def server(parquet):
    with HubServer({NAME: parquet, "README.md": b"# FineWeb-Edu\n"}) as server:
        yield server


@pytest.fixture(autouse=True)
def client(tmp_path, monkeypatch, request):
    """The client, as if started with HF_ENDPOINT and HF_HOME; with short waits."""
    monkeypatch.setattr(hub, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(hub, "LONGEST_WAIT", 0.02)
    monkeypatch.setattr(hub, "LIST_TIMEOUT", 0.5)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    if "server" in request.fixturenames:
        use(request.getfixturevalue("server"), monkeypatch)


def use(server, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                        server.url + "/{repo_id}/resolve/{revision}/{filename}")


def the_file(server, name=NAME):
    return HubFile(name, len(server.files[name]), server.etag(name))


def blobs():
    return sorted(path.name for path in (hub.repo_folder(REPO) / "blobs").glob("*"))


def run_python(code, **environment):
    """A new process with these variables and no others of the hub; its CompletedProcess."""
    clean = {key: value for key, value in os.environ.items()
             if not key.startswith("HF_") and "proxy" not in key.lower()}
    start = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom pathlib import Path\nimport hub\n"
    return subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True, timeout=120,
                          env=clean | environment, cwd=ROOT)


# ---- the listing ---------------------------------------------------------------


def test_list_files(server):
    commit, files = list_files(REPO)
    assert commit == COMMIT
    assert files == [the_file(server, "README.md"), the_file(server)]
    assert files[0].sha256 is None and files[1].sha256 == server.etag(NAME)
    assert list_files(REPO, COMMIT) == (commit, files)


@pytest.mark.parametrize("fault", [Fault("drop", after=50), Fault("truncate", after=50), Fault("stall"),
                                   Fault("status", status=500), Fault("status", status=503),
                                   Fault("status", status=429, headers=(("Retry-After", "0"),))],
                         ids=lambda fault: f"{fault.kind}-{fault.status}")
def test_a_listing_is_asked_for_again(server, fault, capsys):
    server.faults += [fault._replace(match="/api/")] * 2
    assert len(list_files(REPO)[1]) == 2
    assert not server.faults
    assert capsys.readouterr().err.count(f"list of {REPO}") == 2


def test_no_listing_names_the_other_ways(server, monkeypatch, capsys):
    with pytest.raises(UserError, match="--revision"):
        list_files(REPO, "no-such-branch")
    with pytest.raises(UserError, match="404"):
        list_files("HuggingFaceFW/no-such-dataset")
    assert not capsys.readouterr().err  # without another attempt
    monkeypatch.setattr(server, "listing", lambda *_: b"<html>log in here</html>")
    with pytest.raises(UserError, match="login"):
        list_files(REPO)
    monkeypatch.setattr(server, "listing", lambda *_: json.dumps(
        {"id": REPO, "sha": COMMIT, "siblings": [{"rfilename": NAME}]}).encode())
    with pytest.raises(UserError, match="sizes"):
        list_files(REPO)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(UserError) as caught:
        list_files(REPO)
    for way in ("HF_ENDPOINT=", "--input=FOLDER", "data_dir", "--dataset=python", "make demo"):
        assert way in str(caught.value)


# ---- whole files ---------------------------------------------------------------


def test_fetch_lands_in_the_cache_of_the_client(server, parquet):
    file = the_file(server)
    assert in_cache(REPO, COMMIT, file) is None
    path = fetch(REPO, COMMIT, file)
    assert path.read_bytes() == parquet
    assert [(request.status, request.sent) for request in server.bodies()] == [(206, len(parquet))]
    seen = len(server.requests)
    assert in_cache(REPO, COMMIT, file) == path == fetch(REPO, COMMIT, file)
    assert str(path) == huggingface_hub.hf_hub_download(REPO, NAME, revision=COMMIT, repo_type="dataset")
    assert len(server.requests) == seen  # none of these asked the hub
    cache = huggingface_hub.scan_cache_dir(constants.HF_HUB_CACHE)
    assert not cache.warnings and cache.size_on_disk == len(parquet)
    assert fetch(REPO, COMMIT, the_file(server, "README.md")).read_bytes() == server.files["README.md"]
    remove(path)
    assert in_cache(REPO, COMMIT, file) is None and blobs() == [server.etag("README.md")]
    assert not os.path.lexists(path)


FAULTS = {
    "drop": Fault("drop", after=100_000), "truncate": Fault("truncate", after=100_000),
    "short": Fault("short", after=100_000), "stall": Fault("stall", after=100_000), "silence": Fault("stall"),
    **{str(status): Fault("status", status=status) for status in (408, 416, 500, 502, 503, 504)},
    "429": Fault("status", status=429, headers=(("Retry-After", "0"),)),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("cdn", [False, True], ids=["direct", "cdn"])
def test_fetch_survives(server, parquet, name, cdn, capsys):
    server.cdn = cdn
    server.faults += [FAULTS[name]._replace(match="/cdn/" if cdn else "/resolve/")] * 2
    assert fetch(REPO, COMMIT, the_file(server)).read_bytes() == parquet
    assert not server.faults
    said = capsys.readouterr().err
    assert said.count("attempt") == 2 and "secret" not in said  # as the rest of a CDN's address is
    if name in ("truncate", "short", "stall"):  # what came is kept
        assert [request.range for request in server.bodies()] == [
            f"bytes={k * 100_000}-{len(parquet) - 1}" for k in range(3)]
        assert sum(request.sent for request in server.bodies()) == len(parquet)


def test_progress_is_followed_by_as_many_attempts_again(server, parquet):
    assert len(parquet) > 30 * 20_000 > hub.ATTEMPTS * 20_000
    server.faults += [Fault("truncate", after=20_000)] * 30
    assert fetch(REPO, COMMIT, the_file(server)).read_bytes() == parquet
    assert len(server.bodies()) == 31


def test_fetch_gives_up_and_continues_when_run_again(server, parquet):
    server.faults += [Fault("truncate", after=100_000)] + [Fault("status", status=503)] * hub.ATTEMPTS
    with pytest.raises(UserError, match="run the same command again") as caught:
        fetch(REPO, COMMIT, the_file(server))
    assert "HTTP 503" in str(caught.value) and NAME in str(caught.value)
    assert len(server.faults) == 1  # the first failure was followed by nine
    server.faults.clear()
    assert fetch(REPO, COMMIT, the_file(server)).read_bytes() == parquet
    assert server.bodies()[-1].range == f"bytes=100000-{len(parquet) - 1}"


@pytest.mark.parametrize(("status", "advice"), [(401, "HF_TOKEN"), (403, "HF_TOKEN"), (404, "--revision")])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_what_stays_wrong_is_not_asked_for_again(server, status, advice, method, capsys):
    server.faults += [Fault("status", status=status, method=method)] * 5
    with pytest.raises(UserError, match=advice):
        fetch(REPO, COMMIT, the_file(server))
    if method == "HEAD":  # of the client, after the file is complete: nothing of it is lost
        assert blobs() == [server.etag(NAME)]
    with pytest.raises(UserError, match=advice):
        open_ranges(REPO, COMMIT, the_file(server)).read() if method == "GET" else fetch(
            REPO, COMMIT, the_file(server))
    assert "attempt 2" not in capsys.readouterr().err and len(server.requests) in (2, 3)


def test_head_is_asked_for_again(server, parquet, capsys):
    """The request of hf_hub_download for the file's name in the cache fails."""
    server.faults += [Fault("status", status=400, method="HEAD")]
    with pytest.raises(UserError, match="HTTP 400"):
        fetch(REPO, COMMIT, the_file(server))
    server.faults += [Fault("status", status=507, method="HEAD")] * 2
    assert fetch(REPO, COMMIT, the_file(server)).read_bytes() == parquet
    assert not server.faults and len(server.bodies()) == 1
    assert capsys.readouterr().err.count("HTTP 507 for HEAD") == 2


def test_416_for_a_part_that_cannot_be_continued(server, parquet):
    """A partial file longer than the file, or one that the hub refuses to continue, is thrown away."""
    file = the_file(server)
    partial = hub.repo_folder(REPO) / "blobs" / f"{file.etag}.incomplete"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(parquet + b"more")
    assert fetch(REPO, COMMIT, file).read_bytes() == parquet
    remove(fetch(REPO, COMMIT, file))
    partial.write_bytes(parquet[:1000])
    server.faults.append(Fault("status", status=416))
    assert fetch(REPO, COMMIT, file).read_bytes() == parquet
    assert [start for start, _ in spans(server)] == [0, 1000, 0]


def test_a_server_that_ignores_ranges(server, parquet, capsys):
    server.faults += [Fault("truncate", after=100_000), Fault("other_range"), Fault("ignore_range")]
    assert fetch(REPO, COMMIT, the_file(server)).read_bytes() == parquet
    assert [request.status for request in server.bodies()] == [206, 206, 200]
    assert "Content-Range: 'bytes 100001-" in capsys.readouterr().err
    server.faults += [Fault("ignore_range")]
    part = open_ranges(REPO, COMMIT, the_file(server))
    part.seek(5000)
    assert part.read(1000) == parquet[5000:6000]


def test_damage_is_found_by_the_hash(server, parquet, capsys):
    file = the_file(server)
    server.faults += [Fault("corrupt")] * 2
    assert fetch(REPO, COMMIT, file).read_bytes() == parquet
    assert capsys.readouterr().err.count("hash") == 2
    remove(fetch(REPO, COMMIT, file))
    server.faults += [Fault("corrupt")] * 3
    with pytest.raises(UserError, match="in each of 3 downloads"):
        fetch(REPO, COMMIT, file)
    assert blobs() == [] and in_cache(REPO, COMMIT, file) is None
    server.faults += [Fault("corrupt")]  # a small file's hash is git's
    assert fetch(REPO, COMMIT, the_file(server, "README.md")).read_bytes() == server.files["README.md"]
    assert not server.faults


def test_a_damaged_file_in_the_cache_is_fetched_anew(server, parquet):
    path = fetch(REPO, COMMIT, the_file(server))
    os.truncate(path, 1000)
    assert fetch(REPO, COMMIT, the_file(server)).read_bytes() == parquet
    path.unlink()  # only the contents are there, from another commit, say, and damaged
    os.truncate(hub.repo_folder(REPO) / "blobs" / server.etag(NAME), 1000)
    assert fetch(REPO, COMMIT, the_file(server)).read_bytes() == parquet


def test_contents_of_another_commit_are_not_fetched_again(server, parquet):
    other = "d" * 40
    path = fetch(REPO, COMMIT, the_file(server))
    server.commit = other
    assert in_cache(REPO, other, the_file(server)) == path.resolve()  # whoever asks must not remove it
    assert fetch(REPO, other, the_file(server)).read_bytes() == parquet
    assert len(server.bodies()) == 1


def test_a_full_disk_is_named_at_once(server, parquet):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(UserError, match="HF_HOME"):
            fetch(REPO, COMMIT, the_file(server))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(server.bodies()) == 1
    assert fetch(REPO, COMMIT, the_file(server)).read_bytes() == parquet  # there is room again
    assert int(server.bodies()[-1].range[6:].split("-")[0]) > 100_000


def test_file_systems_without_links(server, parquet, monkeypatch):
    monkeypatch.setattr(huggingface_hub.file_download, "are_symlinks_supported", lambda *_: False)
    path = fetch(REPO, COMMIT, the_file(server))
    assert path.read_bytes() == parquet and not path.is_symlink() and blobs() == []
    remove(path)
    assert in_cache(REPO, COMMIT, the_file(server)) is None


def test_two_that_want_one_file_take_turns(server, parquet):
    server.faults += [Fault("stall", after=100_000)]
    results = []
    threads = [threading.Thread(target=lambda: results.append(fetch(REPO, COMMIT, the_file(server))))
               for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.read_bytes() for path in results] == [parquet] * 2
    assert sum(request.sent for request in server.bodies()) == len(parquet)


def test_kill_9_in_the_middle_of_a_download(server, parquet, tmp_path):
    file = the_file(server)
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import hub\n"
            f"hub.fetch({REPO!r}, {COMMIT!r}, hub.HubFile(*{tuple(file)!r}))")
    partial = hub.repo_folder(REPO) / "blobs" / f"{file.etag}.incomplete"
    environment = os.environ | {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"),
                                "HF_HUB_DOWNLOAD_TIMEOUT": "20"}
    for k in (1, 2):  # killed twice
        server.faults.append(Fault("stall", after=200_000))
        process = subprocess.Popen([sys.executable, "-c", code], env=environment)
        while process.poll() is None and not (partial.exists() and partial.stat().st_size >= k * 200_000):
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert fetch(REPO, COMMIT, file).read_bytes() == parquet
    assert [request.range for request in server.bodies()] == [
        f"bytes={k * 200_000}-{len(parquet) - 1}" for k in range(3)]
    assert blobs() == [file.etag]


# ---- waits ---------------------------------------------------------------------


def test_waits(monkeypatch):
    waits = []
    monkeypatch.setattr(hub, "time", SimpleNamespace(sleep=waits.append, time=time.time))
    monkeypatch.setattr(hub, "FIRST_WAIT", 1.0)
    monkeypatch.setattr(hub, "LONGEST_WAIT", 60.0)

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
    ("Retry-After", "Tue, 31 Dec 2999 23:59:59 GMT", 300),
    ("Retry-After", "Sat, 01 Jan 2000 00:00:00 GMT", 0),
    ("RateLimit", '"api";r=0;t=55', 55), ("RateLimit", '"api";r=9;t=55', 0)])
def test_the_hub_says_how_long_to_wait(server, monkeypatch, name, text, seconds, parquet, capsys):
    waits = []
    monkeypatch.setattr(hub, "time", SimpleNamespace(sleep=waits.append, time=time.time))
    server.faults.append(Fault("status", status=429, headers=((name, text),)))
    assert fetch(REPO, COMMIT, the_file(server)).read_bytes() == parquet
    assert len(waits) == 1
    assert waits[0] == seconds if seconds else 0 < waits[0] < 0.1
    assert f"HTTP 429 for GET {server.url}" in capsys.readouterr().err


def test_a_date_to_wait_for():
    header = {"retry-after": email.utils.formatdate(time.time() + 30, usegmt=True)}
    assert 20 < hub.asked_wait(header) <= 30


# ---- the environment: new processes, as the client reads it when it is imported ----


def test_variables_of_the_client(parquet, tmp_path):
    """HF_ENDPOINT, HF_HOME, HF_TOKEN and HTTP_PROXY in one process; then HF_HUB_OFFLINE in another."""
    with HubServer({NAME: parquet}, cdn=True, token="hf_secret") as server:
        code = (f"commit, files = hub.list_files({REPO!r})\n"
                f"path = hub.fetch({REPO!r}, commit, files[0])\n"
                f"part = hub.open_ranges({REPO!r}, commit, files[0]).read(10)\n"
                f"print(path, part == path.read_bytes()[:10])")
        environment = {"HF_ENDPOINT": "http://hub.invalid", "HF_HOME": str(tmp_path / "elsewhere"),
                       "HF_TOKEN": "hf_secret", "HTTP_PROXY": server.url}
        done = run_python(code, **environment)
        assert done.returncode == 0, done.stderr
        path, same = done.stdout.split()
        assert same == "True" and Path(path).is_relative_to(tmp_path / "elsewhere" / "hub")
        assert Path(path).read_bytes() == parquet
        assert {request.headers["host"] for request in server.requests} == {
            "hub.invalid", f"localhost:{server.port}"}  # all of it went through the proxy
        for request in server.requests:  # the token goes to the hub, and not to the other host
            token = "Bearer hf_secret" if request.headers["host"] == "hub.invalid" else None
            assert request.headers.get("authorization") == token
        denied = run_python(code, **environment | {"HF_TOKEN": "hf_wrong"})
        assert denied.returncode == 1 and "HF_TOKEN" in denied.stderr and "attempt 2" not in denied.stderr

        seen = len(server.requests)
        code = (f"commit, files = hub.list_files({REPO!r})\n"
                f"print(commit, files[0] == hub.HubFile({NAME!r}, {len(parquet)}, {server.etag(NAME)!r}),\n"
                f"      hub.fetch({REPO!r}, commit, files[0]))\n"
                f"other = hub.HubFile('other.parquet', 1, 'e' * 64)\n"
                f"for call in (lambda: hub.fetch({REPO!r}, commit, other),\n"
                f"             lambda: hub.open_ranges({REPO!r}, commit, files[0]).read(1),\n"
                f"             lambda: hub.list_files({REPO!r}, 'v2')):\n"
                f"    try:\n        call()\n"
                f"    except hub.UserError as error:\n        print('USER', error)\n")
        offline = run_python(code, **environment | {"HF_HUB_OFFLINE": "1"})
        assert offline.returncode == 0, offline.stderr
        first, *errors = offline.stdout.splitlines()
        assert first == f"{COMMIT} True {path}"
        assert len(errors) == 3 and all("USER" in error and "HF_HUB_OFFLINE" in error for error in errors)
        assert COMMIT in errors[2]
        assert len(server.requests) == seen


# ---- one file ahead ------------------------------------------------------------


class Fetched:
    """A fetch that can be held back, and that notes what is on disk: begun and not released."""

    def __init__(self, items, open_gate=100):
        self.items, self.begun, self.gate = list(items), [], threading.Semaphore(open_gate)

    def __call__(self, item):
        self.begun.append(item)
        assert self.gate.acquire(timeout=20)
        if item == "bad":
            raise UserError("bad file")
        return Path(item)

    def settled(self, count):
        """Whether `count` were begun and, after a while, no more."""
        for _ in range(2000):
            if len(self.begun) >= count:
                break
            time.sleep(0.005)
        time.sleep(0.05)
        return self.begun == self.items[:count]


def test_prefetcher_keeps_two_on_disk():
    fetch_one = Fetched("abcdef")
    with Prefetcher(fetch_one, fetch_one.items) as fetched:
        for number, (item, path) in enumerate(fetched):
            assert (item, path) == ("abcdef"[number], Path("abcdef"[number]))
            assert fetch_one.settled(min(number + 2, 6))
            fetched.release()
            assert fetch_one.settled(min(number + 3, 6))


def test_prefetcher_gives_what_is_waited_for():
    """A consumer that has not released gets the next one all the same, but nothing is fetched ahead."""
    fetch_one = Fetched("abcd")
    fetched = Prefetcher(fetch_one, "abcd")
    assert [next(fetched)[0] for _ in range(3)] == ["a", "b", "c"]
    assert fetch_one.settled(3)
    fetched.release()
    assert fetch_one.settled(3)
    fetched.release()
    assert fetch_one.settled(4)
    assert [item for item, _ in fetched] == ["d"]
    assert list(fetched) == []


def test_prefetcher_raises_where_the_file_is_due():
    fetch_one = Fetched(["a", "bad", "c"])
    fetched = Prefetcher(fetch_one, fetch_one.items)
    assert fetch_one.settled(2)
    assert next(fetched)[0] == "a"
    fetched.release()
    with pytest.raises(UserError, match="bad file"):
        next(fetched)
    assert list(fetched) == [] and fetch_one.settled(2)
    assert list(Prefetcher(fetch_one, [])) == []


def test_a_closed_prefetcher_begins_nothing():
    fetch_one = Fetched("abcd", open_gate=1)
    with Prefetcher(fetch_one, "abcd") as fetched:
        assert next(fetched)[0] == "a"
        assert fetch_one.settled(2)
    fetch_one.gate.release(100)
    fetched.release()
    assert fetch_one.settled(2)


def test_prefetcher_holds_up_neither_exit_nor_ctrl_c():
    done = run_python("import time\n"
                      "fetched = hub.Prefetcher(lambda item: time.sleep(1000 * item), [0, 1])\n"
                      "print(next(fetched))")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    done = run_python("import _thread, signal, threading, time\n"
                      "fetched = hub.Prefetcher(lambda item: time.sleep(1000), [0])\n"
                      "threading.Timer(0.2, lambda: signal.raise_signal(signal.SIGINT)).start()\n"
                      "try:\n    next(fetched)\nexcept KeyboardInterrupt:\n    print('stopped')")
    assert (done.stdout, done.stderr) == ("stopped\n", "")


def test_exit_in_the_middle_of_a_prefetch_is_quiet(server, tmp_path):
    file = tuple(the_file(server))
    server.faults.append(Fault("stall", after=100_000))
    code = (f"import time\nfile = hub.HubFile(*{file!r})\n"
            f"partial = hub.repo_folder({REPO!r}) / 'blobs' / (file.etag + '.incomplete')\n"
            f"fetched = hub.Prefetcher(lambda item: hub.fetch({REPO!r}, {COMMIT!r}, item), [file])\n"
            f"while not (partial.exists() and partial.stat().st_size >= 100_000):\n    time.sleep(0.01)\n")
    done = run_python(code, HF_ENDPOINT=server.url, HF_HOME=str(tmp_path / "home"),
                      HF_HUB_DOWNLOAD_TIMEOUT="60")
    assert (done.returncode, done.stderr) == (0, "")


# ---- parts of files ------------------------------------------------------------


def spans(server):
    """(start, stop) of each range asked for."""
    ranges = [request.range.removeprefix("bytes=").split("-") for request in server.bodies()]
    return [(int(start), int(stop) + 1) for start, stop in ranges]


@pytest.mark.parametrize("compression", ["snappy", "zstd"])
@pytest.mark.parametrize("pre_buffer", [False, True])
def test_a_row_group_is_one_request(server, compression, pre_buffer):
    data = server.files[NAME] = fineweb_parquet(2000, 125, compression=compression)
    local = pq.ParquetFile(io.BytesIO(data))
    remote = pq.ParquetFile(open_ranges(REPO, COMMIT, the_file(server)), pre_buffer=pre_buffer)
    footer = spans(server)
    assert len(footer) <= 2 and footer[0][1] == len(data)
    for group in (0, 7, 3):
        want = local.read_row_group(group, columns=["text"])
        assert remote.read_row_group(group, columns=["text"], use_threads=False).equals(want)
    assert len(spans(server)) == len(footer) + 3
    text = [local.metadata.row_group(group).column(0).total_compressed_size for group in (0, 7, 3)]
    tail = sum(stop - start for start, stop in footer)
    assert sum(request.sent for request in server.bodies()) == tail + sum(text) < len(data) / 2


def test_a_long_footer_is_fetched_once(server):
    data = server.files[NAME] = fineweb_parquet(2000, 5, compression="snappy")
    length = int.from_bytes(data[-8:-4], "little")
    assert length > 2 * 65536  # Arrow asks for the last 64 kB first
    assert pq.ParquetFile(open_ranges(REPO, COMMIT, the_file(server))).metadata.num_row_groups == 400
    assert spans(server) == [(len(data) - 65536, len(data)), (len(data) - length - 8, len(data) - 65536)]


@pytest.mark.parametrize("settings", [{}, {"use_dictionary": False}, {"data_page_size": 1000},
                                      {"write_page_index": True}, {"compression": "none"}])
@pytest.mark.parametrize("rows, column", [(5, "text"), (125, "url"), (2000, "text")])
def test_arrow_itself_asks_for_nothing(server, rows, column, settings):
    """Footer and pages are fetched before: from a thread, Arrow must not wait for the network."""
    data = server.files[NAME] = fineweb_parquet(2000, rows, **settings)
    local = pq.ParquetFile(io.BytesIO(data))
    part = open_ranges(REPO, COMMIT, the_file(server))
    part.fetch_footer()
    footer = spans(server)
    remote = pq.ParquetFile(part)
    for group in (local.metadata.num_row_groups - 1, 0):
        start, stop = column_span(remote.metadata, group, column, len(data))
        part.hold(start, part.fetch(start, stop))
        asked = len(spans(server))
        assert remote.read_row_group(group, columns=[column], use_threads=False).equals(
            local.read_row_group(group, columns=[column]))
        assert len(spans(server)) == asked
    assert spans(server)[:len(footer)] == footer and asked == len(footer) + 2


@pytest.mark.parametrize("offset, dictionary, length, span", [
    (100, None, 50, (100, 150)), (100, 0, 50, (100, 150)), (100, 60, 90, (60, 150)),
    (100, -5, 50, (100, 150)), (100, 160, 50, (100, 150)), (100, None, 900, (100, 1000)),
    (100, None, 901, (0, 0)), (-1, None, 50, (0, 0)), (100, None, -50, (0, 0))])
def test_the_span_that_a_footer_names(offset, dictionary, length, span):
    """A damaged one is not asked for."""
    part = SimpleNamespace(path_in_schema="text", data_page_offset=offset, dictionary_page_offset=dictionary,
                           total_compressed_size=length)
    other = SimpleNamespace(path_in_schema="id", data_page_offset=4, dictionary_page_offset=None,
                            total_compressed_size=9)
    row_group = SimpleNamespace(column=lambda i: (other, part)[i])
    metadata = SimpleNamespace(row_group=lambda group: row_group, num_columns=2)
    assert column_span(metadata, 0, "text", 1000) == span
    assert column_span(metadata, 0, "none", 1000) == (0, 0)


@pytest.mark.parametrize("end", [b"", b"PAR1", b"\xff\xff\xff\x7fPAR1", b"\0\0\0\0PAR1"])
@pytest.mark.parametrize("size", [15, 200_000])
def test_a_file_without_a_footer(server, end, size):
    server.files[NAME] = bytes(size) + end
    part = open_ranges(REPO, COMMIT, the_file(server))
    part.fetch_footer()
    assert len(spans(server)) == 1 and server.bodies()[0].sent <= 65536
    with pytest.raises((OSError, pa.ArrowInvalid)):
        pq.ParquetFile(part)


@pytest.mark.parametrize("name", [*FAULTS, "ignore_range"])
def test_a_range_is_whole_whatever_happens(server, parquet, name, capsys):
    fault = FAULTS.get(name, Fault("ignore_range"))
    server.faults += [fault._replace(after=min(fault.after, 10_000))] * 2
    part = open_ranges(REPO, COMMIT, the_file(server))
    part.seek(50_000)
    assert part.read(100_000) == parquet[50_000:150_000]
    assert not server.faults or name == "ignore_range"
    if name in ("truncate", "short", "stall"):  # what came is kept
        assert spans(server) == [(50_000 + k * 10_000, 150_000) for k in range(3)]


def test_a_range_file_reads_like_a_file(server, parquet):
    remote, local = open_ranges(REPO, COMMIT, the_file(server)), io.BytesIO(parquet)
    assert remote.readable() and remote.seekable() and not remote.writable()
    draw = random.Random(0)
    for _ in range(60):
        whence = draw.choice([io.SEEK_SET, io.SEEK_CUR, io.SEEK_END])
        offset = draw.choice([0, 5000, -5000, 1 << 16, -(1 << 16), len(parquet) // 2, len(parquet) + 9])
        if whence == io.SEEK_SET:
            offset = abs(offset)
        count = draw.choice([0, 1, 8, 65536, 1 << 17])
        assert remote.seek(offset, whence) == local.seek(offset, whence) == remote.tell()
        assert remote.read(count) == local.read(count)
        assert remote.tell() == local.tell()
    remote.seek(0)
    assert remote.read() == parquet
    with pytest.raises(UserError, match="run the same command again"):
        server.faults += [Fault("status", status=500)] * hub.ATTEMPTS
        open_ranges(REPO, COMMIT, the_file(server)).read(1)


# ---- the disk ------------------------------------------------------------------


def test_need_space(tmp_path, capsys, monkeypatch):
    free = []
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: SimpleNamespace(free=free[0], path=path))
    needs = [(tmp_path / "shards" / "of" / "mine", 3_000_000_000, "shards"),
             (tmp_path, 4_000_000_000, "two parquet files")]
    free[:] = [7_000_000_000]
    need_space(needs)
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1  # one disk, one sum
    for part in ("3.00 GB for shards", "4.00 GB for two parquet files", "7.00 GB;", "7.00 GB are free"):
        assert part in out
    free[:] = [6_999_999_999]
    with pytest.raises(UserError, match=r"= 7\.00 GB.*--data_dir.*HF_HOME.*--max_tokens"):
        need_space(needs)
    monkeypatch.undo()
    if Path("/dev/shm").is_dir() and os.stat("/dev/shm").st_dev != os.stat(tmp_path).st_dev:
        need_space([(tmp_path, 1, "shards"), (Path("/dev/shm"), 1, "downloads")])
        assert len(capsys.readouterr().out.splitlines()) == 2
