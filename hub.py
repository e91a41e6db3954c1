"""
Files of datasets on the Hugging Face hub: listed, downloaded, or read by ranges, over a bad network too.

    commit, files = list_files("HuggingFaceFW/fineweb-edu")
    path = fetch("HuggingFaceFW/fineweb-edu", commit, files[0], Path("downloads"))    # a complete file
    data = fetch_range("HuggingFaceFW/fineweb-edu", commit, files[0], start, stop)    # some of its bytes

Requests use huggingface_hub's session, so HF_ENDPOINT, HF_HOME, HF_TOKEN, HF_HUB_OFFLINE and the proxies work
as they do there. Its cache is only read, and its downloads are not used: they start anew after a kill.

Imported by documents.py, convert_hf.py and hellaswag.py; nothing to run.
"""
import contextlib
import errno
import functools
import hashlib
import io
import json
import queue
import random
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.parse import quote

from huggingface_hub import constants, get_session, hf_hub_url, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers
from tqdm import tqdm

from configurator import DISK_FULL, Between, UserError, without_passwords
from files import check, sync_file

ATTEMPTS = 10          # in a row without new bytes; with the waits below, about four minutes
FIRST_WAIT = 1.0       # seconds before the second attempt; doubled before each further one, up to 60
LIST_TIMEOUT = 60.0    # seconds of silence; the hub needs a while to list 30,000 files
LIST_LIMIT = 32 << 20  # bytes of a listing; one of 30,000 files has 9 MB
COPIES = 3             # corrupt downloads of a file before giving up

TEMPORARY = (408, 416, 425, 429)  # HTTP statuses below 500 that another attempt may not get
DISK_ERRORS = (*DISK_FULL, errno.EACCES, errno.EPERM, errno.EROFS)
NETWORK_ERRORS = (OSError, *HfHubHTTPError.__bases__)  # with the HTTPError of the client's HTTP library

# What a listing may contain: its names and hashes become URLs and paths. No part is empty, "." or "..".
PART = r"(?!\.\.?(?:/|$))[^/\\\x00-\x1f\x7f-\x9f\ud800-\udfff]+"
PATH = re.compile(f"(?![A-Za-z]:){PART}(?:/{PART})*")
SHA1, SHA256 = re.compile("[0-9a-f]{40}"), re.compile("[0-9a-f]{64}")
LISTING = {"sha": SHA1, "siblings": [{"rfilename": PATH, "size": Between(0, 2**50), "blobId": SHA1,
                                      "lfs?": (None, {"sha256": SHA256})}]}


class HubFile(NamedTuple):
    """A file of a dataset on the hub."""
    path: str  # in the dataset
    size: int  # bytes
    etag: str  # hash of the contents, in hex: sha256, or of a small file git's blob id (a sha1)


def retry(what: str, attempt: Callable, progress: Callable[[], int] = int, attempts: int = ATTEMPTS):
    """Return attempt(), repeated while the network or the server fails, with a line on stderr each time.

    The waits double, with jitter, and last at least as long as the server asks. When progress() has grown,
    the count of attempts starts anew. Raises UserError after `attempts`, and at once for 401,
    403, 404, HF_HUB_OFFLINE or a proxy that needs another package. An OSError of the disk passes through.
    """
    best, failures = progress(), 0
    while True:
        try:
            return attempt()
        except ImportError as error:
            raise UserError(f"{what}: {error} Or unset ALL_PROXY, HTTPS_PROXY and HTTP_PROXY") from error
        except NETWORK_ERRORS as error:
            # when the interpreter ends, the client closes connections that daemon threads still read
            if getattr(error, "errno", None) in DISK_ERRORS or not threading.main_thread().is_alive():
                raise
            reason, asked = diagnose(what, error)
            failures = 1 if progress() > best else failures + 1
            best = max(best, progress())
            if failures >= attempts:
                raise UserError(f"{what}: {reason}; no new bytes in {failures} attempts; run the same "
                                f"command again: it continues where it stopped") from error
        wait = max(asked, min(FIRST_WAIT * 2 ** (failures - 1), 60) * random.uniform(0.5, 1.5))
        line = f"{what}: {reason}; attempt {failures + 1} of {attempts} in {wait:.1f} s"
        tqdm.write(without_passwords(line), file=sys.stderr)
        time.sleep(wait)


def diagnose(what: str, error: Exception) -> tuple[str, float]:
    """(reason, seconds the server asks to wait) of a failure that may pass; UserError for any other."""
    if isinstance(error, OfflineModeIsEnabled):
        raise UserError(f"{what}: not in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set; "
                        f"unset it, or name another cache with HF_HOME=...") from error
    response = getattr(error, "response", None)
    if response is None:
        return f"{type(error).__name__}: {error}", 0
    url = str(response.request.url).partition("?")[0]  # the query of a CDN's URL is a signature
    reason = f"HTTP {response.status_code} for {response.request.method} {url}"
    if response.status_code in (401, 403):
        raise UserError(f"{what}: {reason}: permission denied; set HF_TOKEN=hf_... to a token of an account "
                        f"with access, or unset it if it has expired") from error
    if response.status_code < 500 and response.status_code not in TEMPORARY:
        raise UserError(f"{what}: {reason}; check the name and the revision") from error
    asked = (re.fullmatch(r"\s*(\d+)\s*", response.headers.get("retry-after", ""))
             or re.search(r"r=0\s*;\s*t=(\d+)", response.headers.get("ratelimit", "")))
    return reason, min(float(asked[1]), 300) if asked else 0


@contextlib.contextmanager
def get(url: str, timeout: float, **headers: str):
    """The answer to a request for `url`, its body not yet read; one of NETWORK_ERRORS if it is no success."""
    headers = {**build_hf_headers(), "Accept-Encoding": "identity", **headers}
    with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
        response.raise_for_status()
        yield response


def list_files(repo: str, revision: str = "main") -> tuple[str, list[HubFile]]:
    """(commit, files sorted by path) of a dataset at a branch, tag or commit.

    With HF_HUB_OFFLINE=1, what the client's cache has. Raises UserError if the hub cannot be reached, does
    not know the dataset, or answers anything but a listing.
    """
    if constants.HF_HUB_OFFLINE:
        return list_cached(repo, revision)
    url = f"{constants.ENDPOINT}/api/datasets/{quote(repo)}/revision/{quote(revision, safe='')}?blobs=true"

    def attempt() -> bytearray:
        body = bytearray()
        with get(url, LIST_TIMEOUT) as response:
            for data in response.iter_raw():
                body += data
                if len(body) > LIST_LIMIT:
                    raise UserError(f"the answer has more than {LIST_LIMIT:,} bytes")
        return body

    try:  # five attempts: without a network, 15 seconds
        listing = check(json.loads(retry("the listing", attempt, attempts=5)), LISTING, "the listing")
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"cannot list {repo} at {constants.ENDPOINT}: {error}.\n"
            f"Check HF_ENDPOINT and the proxy, and whether the network asks for a login first. Other ways: a "
            f"mirror, with HF_ENDPOINT=https://...; files downloaded elsewhere, with --input=FOLDER; or "
            f"--dataset=python or `make demo`, which need no download") from error
    files = [HubFile(file["rfilename"], file["size"], (file.get("lfs") or {}).get("sha256", file["blobId"]))
             for file in listing["siblings"]]
    return listing["sha"], sorted(files)


def list_cached(repo: str, revision: str) -> tuple[str, list[HubFile]]:
    """`list_files` of the client's cache, where snapshots/COMMIT/PATH is a link to blobs/ETAG."""
    try:
        folder = Path(snapshot_download(repo, repo_type="dataset", revision=revision, local_files_only=True))
    except LocalEntryNotFoundError as error:
        raise UserError(f"HF_HUB_OFFLINE is set, and the cache {constants.HF_HUB_CACHE} has no revision "
                        f"{revision} of {repo}; unset it, or name another cache with HF_HOME=...") from error
    files = [HubFile(path.relative_to(folder).as_posix(), path.stat().st_size, path.resolve().name)
             for path in folder.rglob("*") if path.is_file()]
    return folder.name, sorted(check(files, [[PATH, int, (SHA256, SHA1)]], str(folder)))


def receive(repo: str, commit: str, file: HubFile, start: int, stop: int, out: BinaryIO) -> None:
    """Append to `out` what it lacks of bytes [start, stop) of a file; errors as of `retry`."""
    url = hf_hub_url(repo, file.path, repo_type="dataset", revision=commit)

    def attempt() -> None:
        first = start + out.tell()
        if first >= stop:
            return
        with get(url, constants.HF_HUB_DOWNLOAD_TIMEOUT, Range=f"bytes={first}-{stop - 1}") as response:
            position = 0  # a server that ignores ranges sends the file from its first byte
            if response.status_code == 206:
                position = first
                got, expected = response.headers.get("content-range"), f"bytes {first}-{stop - 1}/{file.size}"
                if got != expected:
                    raise OSError(f"got Content-Range {got!r} instead of {expected!r}")
            for data in response.iter_raw():
                out.write(data[max(0, first - position):max(0, stop - position)])
                out.flush()  # a killed process leaves all that it received
                position += len(data)
                if position >= stop:
                    return
        raise OSError(f"the answer ended at byte {position:,} of {stop:,}")

    retry(f"{file.path}, bytes {start:,} to {stop:,}", attempt, out.tell)


def fetch_range(repo: str, commit: str, file: HubFile, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a file, within its size; errors as of `retry`.

    The hub has no hashes of parts: wrong bytes are found only by checks within the file, such as parquet's.
    """
    out = io.BytesIO()
    receive(repo, commit, file, start, stop, out)
    return out.getvalue()


def cached(repo: str, file: HubFile) -> Path | None:
    """The file in the client's cache, from whatever commit, if its size is right."""
    path = Path(constants.HF_HUB_CACHE, f"datasets--{repo.replace('/', '--')}", "blobs", file.etag)
    return path if path.is_file() and path.stat().st_size == file.size else None


def fetch(repo: str, commit: str, file: HubFile, folder: Path) -> Path:
    """The complete file: from the client's cache, or downloaded to folder/ETAG.parquet.

    The bytes go to ETAG.incomplete, which the next attempt, or the next process, continues; it is renamed if
    the hash is right. One process at a time may use `folder`. Raises what `retry` does, and UserError when
    COPIES downloads were corrupt.
    """
    path, partial = folder / f"{file.etag}.parquet", folder / f"{file.etag}.incomplete"
    if found := path if path.is_file() else cached(repo, file):
        return found
    folder.mkdir(parents=True, exist_ok=True)
    git_hash = functools.partial(hashlib.sha1, b"blob %d\0" % file.size)
    new_hash = hashlib.sha256 if len(file.etag) == 64 else git_hash
    for _ in range(COPIES):
        with open(partial, "ab") as opened, tqdm.wrapattr(
                opened, "write", total=file.size, initial=opened.tell(), desc=file.path, leave=False,
                disable=None) as out:
            receive(repo, commit, file, 0, file.size, out)
            sync_file(opened)
        with open(partial, "rb") as opened:
            got = hashlib.file_digest(opened, new_hash).hexdigest()
        if got == file.etag:
            return partial.replace(path)
        partial.unlink()
        print(f"{file.path}: corrupt, with hash {got} instead of {file.etag}", file=sys.stderr)
    raise UserError(f"{file.path}: {COPIES} downloads were corrupt; a proxy or mirror on the way changes "
                    f"them: try another network, or HF_ENDPOINT=https://...")


def ahead(function: Callable, items: Iterable) -> Iterator:
    """function(item) of each item, in order, computed by a thread that is up to two items ahead.

    An exception of function is raised where its result is due. The thread is a daemon: it holds up neither
    exit nor Ctrl-C. Once the iterator is closed, it begins no further item.
    """
    results, closed = queue.Queue(1), threading.Event()  # pairs (result, error), then None

    def work() -> None:
        try:
            for item in items:
                if closed.is_set():
                    return
                results.put((function(item), None))
            results.put(None)
        except Exception as error:
            results.put((None, error))

    def get_result():
        while results.empty():  # Ctrl-C interrupts a sleep, but not everywhere a wait for the queue
            time.sleep(0.01)
        return results.get()

    threading.Thread(target=work, daemon=True).start()
    try:
        for result, error in iter(get_result, None):
            if error is not None:
                raise error
            yield result
    finally:
        closed.set()


def need_space(folder: Path, needed: int) -> None:
    """Print what is needed and what is free, in bytes, on the disk of a folder, which may not exist yet.

    Raises UserError if less is free.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    line = f"disk of {folder}: needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"
    if needed > free:
        raise UserError(f"{line}; free some space, choose another disk with --data_dir=..., or take less "
                        f"with --max_tokens=...")
    print(line)
