"""
Files of the Hugging Face hub: listed, fetched whole or by ranges, whatever the network does.

    commit, files = list_files("HuggingFaceFW/fineweb-edu")
    path = fetch("HuggingFaceFW/fineweb-edu", commit, files[0])         # whole, in the hub's cache (HF_HOME)
    table = pq.ParquetFile(open_ranges("HuggingFaceFW/fineweb-edu", commit, files[0]))  # only what is read

Requests go through the session of huggingface_hub, so HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE, HF_TOKEN,
HF_HUB_DOWNLOAD_TIMEOUT and the proxy variables mean what they mean there, and its cache holds the files. The
bytes are fetched here, because hf_hub_download (2.4) starts a file anew when its process was killed or its
connection reset, and HfFileSystem takes the answer of a server that ignores ranges for the range.

Imported by fineweb.py and convert_hf.py; nothing to run.
"""
import atexit
import contextlib
import email.utils
import errno
import hashlib
import io
import os
import random
import re
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from huggingface_hub import HfApi, constants, get_session, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import WeakFileLock, build_hf_headers, hf_raise_for_status
from tqdm import tqdm

from configurator import UserError, without_passwords
from files import write_atomically

ATTEMPTS = 10          # in a row without a byte more; with the waits below, about four minutes
LIST_ATTEMPTS = 5      # for the list, the first thing that is asked: a quarter of a minute without a network
FIRST_WAIT = 1.0       # seconds before the second attempt; doubled before each further one
LONGEST_WAIT = 60.0    # seconds
LONGEST_ASKED = 300.0  # seconds to wait when the hub says so; its rate limits count over five minutes
LIST_TIMEOUT = 60.0    # seconds of silence; a listing of 30,000 files takes the hub a while
COPIES = 3             # of a file that arrive damaged before it is given up
FOOTER_BYTES = 1 << 16  # what Arrow reads first of a parquet file

PASSING = (408, 416, 425, 429)  # statuses below 500 after which another attempt may succeed
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS)
# OSError, and the base of what the session raises: httpx's HTTPError, or its successor's in other versions
NETWORK_ERRORS = (OSError, *HfHubHTTPError.__bases__)

ENDING = threading.Event()  # the interpreter ends
READING = threading.Lock()  # held by whoever has Arrow read a RangeFile


@atexit.register
def end() -> None:
    """Before the client's own end, as it was imported above: that closes connections of threads that still
    read, which is no failure of the network, to be told and repeated. And nobody has Arrow read any more."""
    ENDING.set()
    READING.acquire(timeout=5)

T = TypeVar("T")


class HubFile(NamedTuple):
    """A file of a repository on the hub."""
    path: str  # in the repository
    size: int  # bytes
    etag: str  # names its contents: the sha256 of a large file, git's id of a small one; both in hex

    @property
    def sha256(self) -> str | None:
        """Of the contents, in hex, where the hub gives it."""
        return self.etag if len(self.etag) == 64 else None


# ---- attempts ------------------------------------------------------------------


def say(text: str) -> None:
    """A line on stderr that leaves progress bars intact and shows no password of a URL."""
    tqdm.write(without_passwords(text), file=sys.stderr)


def asked_wait(headers) -> float:
    """Seconds to wait that an answer asks for: Retry-After (seconds or a date) or t= of RateLimit; else 0."""
    text = headers.get("retry-after", "").strip()
    if not text and (found := re.search(r"r=0\s*;\s*t=(\d+)", headers.get("ratelimit", ""))):
        text = found[1]
    if re.fullmatch(r"\d+", text):
        return min(float(text), LONGEST_ASKED)
    try:
        until = email.utils.parsedate_to_datetime(text).timestamp()
    except ValueError:
        return 0.0
    return min(max(0.0, until - time.time()), LONGEST_ASKED)


def diagnose(what: str, error: Exception) -> tuple[str, float]:
    """(reason, seconds the hub asks to wait) of a failure that may pass; UserError for one that will not."""
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, NETWORK_ERRORS):
        error = error.__cause__  # of hf_hub_download: it got no answer about the file
    response = getattr(error, "response", None)
    if isinstance(error, OfflineModeIsEnabled):
        raise UserError(f"{what}: not in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set; "
                        f"unset it, or name the cache that has the file with HF_HOME=...") from error
    if response is not None:
        status = response.status_code
        url = str(response.request.url).partition("?")[0]  # the rest of a CDN's is a signature
        reason = f"HTTP {status} for {response.request.method} {url}"
        if status in (401, 403):
            raise UserError(f"{what}: got {reason}; wanted leave to read it: set HF_TOKEN=hf_... to a valid "
                            f"token of an account that may, or unset one that has expired") from error
        if status < 500 and status not in PASSING:
            raise UserError(f"{what}: got {reason}; check --dataset, --subset and --revision") from error
        return reason, asked_wait(response.headers)
    if getattr(error, "errno", None) in DISK_ERRORS:
        raise UserError(f"{what}: cannot be stored in {constants.HF_HUB_CACHE} ({error.strerror}); make room "
                        f"there and run the same command again: it continues where it stopped; or choose "
                        f"another folder with HF_HOME=...") from error
    return f"{type(error).__name__}: {error}", 0.0


def retry(what: str, attempt: Callable[[], T], progress: Callable[[], object] = int,
          attempts: int | None = None) -> T:
    """attempt(), repeated while the network or the hub fails, with a line on stderr each time.

    The waits double, with jitter, and are as long as the hub asks for. `progress()` tells how far the work
    has come: the count of attempts starts anew whenever it has grown. Raises UserError after `attempts`
    (ATTEMPTS) without that, and at once for what another will not mend: 401, 403, 404, a full disk, offline.
    """
    best, failures, attempts = progress(), 0, attempts or ATTEMPTS
    while True:
        try:
            return attempt()
        except NETWORK_ERRORS as error:
            if ENDING.is_set():
                raise
            reason, asked = diagnose(what, error)
            if progress() > best:
                best, failures = progress(), 0
            failures += 1
            if failures >= attempts:
                raise UserError(f"{what}: got {reason}, and no byte more in {failures} attempts; run the "
                                f"same command again: it continues where it stopped") from error
        wait = min(FIRST_WAIT * 2 ** (failures - 1), LONGEST_WAIT) * random.uniform(0.5, 1.5)
        wait = max(wait, asked)
        say(f"{what}: {reason}; attempt {failures + 1} of {attempts} in {wait:.1f} s")
        time.sleep(wait)


def stream(url: str, start: int, stop: int) -> Iterator[bytes]:
    """Bytes [start, stop) of a file, as they arrive: all of them, or an error.

    A server that ignores the range is read from its first byte, and the bytes before `start` are dropped.
    """
    headers = {**build_hf_headers(), "Accept-Encoding": "identity", "Range": f"bytes={start}-{stop - 1}"}
    with get_session().stream("GET", url, headers=headers,
                              timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
        hf_raise_for_status(response)
        position = 0
        if response.status_code == 206:
            got = response.headers.get("content-range", "")
            if not got.startswith(f"bytes {start}-"):
                raise OSError(f"asked for bytes {start}-{stop - 1}, got Content-Range: {got!r}")
            position = start
        for data in response.iter_bytes():
            wanted = data[max(0, start - position):max(0, stop - position)]
            position += len(data)
            if wanted:
                yield wanted
            if position >= stop:
                return
        raise OSError(f"the answer ended at byte {position:,} of {stop:,}")


# ---- the listing ---------------------------------------------------------------


def repo_folder(repo: str) -> Path:
    """Where the cache keeps a dataset: blobs/ETAG, snapshots/COMMIT/PATH (links to blobs), refs/BRANCH."""
    return Path(constants.HF_HUB_CACHE) / f"datasets--{repo.replace('/', '--')}"


def list_files(repo: str, revision: str = "main") -> tuple[str, list[HubFile]]:
    """(commit, files sorted by path) of a dataset at a branch, tag or commit.

    With HF_HUB_OFFLINE=1, what the cache holds of that revision, with the sizes on disk. Raises UserError if
    there is none, or the hub cannot be reached or does not know it.
    """
    folder = repo_folder(repo)
    ref = folder / "refs" / revision
    if constants.HF_HUB_OFFLINE:
        commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision
        snapshot = folder / "snapshots" / commit
        files = [HubFile(path.relative_to(snapshot).as_posix(), path.stat().st_size, path.resolve().name)
                 for path in sorted(snapshot.rglob("*")) if path.is_file()]
        if not files:
            there = ", ".join(sorted(path.name for path in folder.glob("snapshots/*"))) or "nothing"
            raise UserError(f"HF_HUB_OFFLINE is set, and {folder} holds no files of revision {revision}, but "
                            f"{there}; name one of these with --revision=..., or another cache with "
                            f"HF_HOME=..., or unset HF_HUB_OFFLINE")
        say(f"HF_HUB_OFFLINE is set: {repo} is the {len(files)} files that {snapshot} holds")
        return commit, files
    try:
        # list_repo_tree would list a folder alone, but has no timeout: a silent server hangs it for ever
        info = retry(f"list of {repo}", lambda: HfApi().repo_info(
            repo, revision=revision, repo_type="dataset", files_metadata=True, timeout=LIST_TIMEOUT),
            attempts=LIST_ATTEMPTS)
        files = [HubFile(file.rfilename, file.size, file.lfs.sha256 if file.lfs else file.blob_id)
                 for file in info.siblings]
        if not all(file.size is not None and file.etag for file in files):
            raise TypeError("sizes or hashes of files are missing in the answer")
    except UserError as error:
        raise UserError(
            f"cannot list {repo} at {constants.ENDPOINT}: {error}.\n"
            f"Other ways: a mirror, with HF_ENDPOINT=https://...; its files fetched elsewhere, with "
            f"--input=FOLDER; ready-made uint16 shards (*_train_*.npy or .bin, *_val_*) put into data_dir; "
            f"or --dataset=python or `make demo`, which need no download") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{constants.ENDPOINT} did not answer as the hub does about {repo} ({error}); check "
                        f"HF_ENDPOINT, the proxy, and whether the network wants a login first") from error
    if revision != info.sha:  # by it HF_HUB_OFFLINE finds the commit of a branch, as with hf_hub_download
        with contextlib.suppress(OSError, UserError):  # a cache that is read only serves as well
            ref.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(ref, info.sha.encode())
    return info.sha, sorted(files)


# ---- whole files ---------------------------------------------------------------


def in_cache(repo: str, commit: str, file: HubFile) -> Path | None:
    """The file, if the hub's cache has it, of this commit or with these contents from another one.

    Ask before the first `fetch`, and write the answer down: a file that was there belongs to somebody else.
    """
    found = try_to_load_from_cache(repo, file.path, revision=commit, repo_type="dataset")
    if isinstance(found, str):
        return Path(found)
    blob = repo_folder(repo) / "blobs" / file.etag
    return blob if blob.is_file() else None


def remove(path: Path) -> None:
    """Remove a file that `fetch` returned from the cache: the contents, and the snapshot's link to them."""
    for name in (path.resolve(), path):
        name.unlink(missing_ok=True)


def damage(path: Path, file: HubFile) -> str | None:
    """What is wrong with the contents of a file, or None."""
    size = path.stat().st_size
    if size != file.size:
        return f"got {size:,} bytes, wanted {file.size:,}"
    digest = hashlib.sha256() if file.sha256 else hashlib.sha1(b"blob %d\0" % size)  # git's id of a file
    with open(path, "rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != file.etag:
        return f"got contents with hash {digest.hexdigest()}, wanted {file.etag}"
    return None


def fetch(repo: str, commit: str, file: HubFile) -> Path:
    """A file, whole, in the hub's cache; downloaded if it is not there.

    What arrives goes to blobs/ETAG.incomplete, which the next attempt, or the next process, continues. Size
    and hash are checked once, when the file is complete; of one that was in the cache, the size. A damaged
    file is removed and fetched anew. Processes that want the same file take turns. Raises UserError as
    `retry` does, and when COPIES of the file came damaged.
    """
    folder = repo_folder(repo)
    blob = folder / "blobs" / file.etag
    partial = blob.with_name(f"{file.etag}.incomplete")
    lock = folder.parent / ".locks" / folder.name / f"{file.etag}.lock"  # hf_hub_download takes the same one
    url = hf_hub_url(repo, file.path, repo_type="dataset", revision=commit)
    copies = 0

    def attempt() -> Path:
        found = in_cache(repo, commit, file)
        if found is not None and found.stat().st_size != file.size:
            say(f"{found}: got {found.stat().st_size:,} bytes, wanted {file.size:,}; it is fetched anew")
            remove(found)
            found = None
        if found is None:
            if constants.HF_HUB_OFFLINE:
                raise OfflineModeIsEnabled(file.path)
            for needed in (blob, lock):
                needed.parent.mkdir(parents=True, exist_ok=True)
            with WeakFileLock(lock):
                if not blob.is_file():  # another process may have fetched it meanwhile
                    complete()
        # the client puts its link into the snapshot; without a request, if it is there
        path = Path(hf_hub_download(repo, file.path, revision=commit, repo_type="dataset"))
        if found is None and path.resolve() != blob.resolve():  # it made a copy, where there are no links
            blob.unlink(missing_ok=True)
        return path

    def complete() -> None:
        nonlocal copies
        wrong = None
        with open(partial, "ab") as out, tqdm(desc=file.path, total=file.size, initial=out.tell(), unit="B",
                                              unit_scale=True, leave=False, disable=None) as bar:
            try:
                if out.tell() < file.size:
                    for data in stream(url, out.tell(), file.size):
                        out.write(data)
                        out.flush()  # a process that is killed leaves all that it got
                        bar.update(len(data))
            except HfHubHTTPError as error:
                if error.response.status_code != 416 or not out.tell():
                    raise
                wrong = f"the hub refuses to continue it after {out.tell():,} bytes"
            os.fsync(out.fileno())
        wrong = wrong or damage(partial, file)
        if not wrong:
            os.replace(partial, blob)
            return
        partial.unlink()
        copies += 1
        if copies >= COPIES:
            raise UserError(f"{file.path}: {wrong}, in each of {copies} downloads; a proxy or mirror on the "
                            f"way is broken: try another network, or HF_ENDPOINT=https://...")
        raise OSError(f"{wrong}; it is fetched from the start")

    return retry(file.path, attempt, lambda: (copies, partial.stat().st_size if partial.exists() else 0))


class Prefetcher:
    """fetch(item) of each item, in order, by a background thread that is at most one item ahead.

        with Prefetcher(fetch_one, items) as fetched:
            for item, path in fetched:
                ...
                fetched.release()  # of the oldest that is not released: it was removed, or does not matter

    Item i+2 is begun when item i was released, so that two are on disk; or when the consumer waits for it. An
    error of fetch is raised when its item is due. The thread is a daemon: it holds up neither the exit of the
    interpreter nor Ctrl-C. After close() no further item is begun.
    """

    def __init__(self, fetch: Callable[[T], Path], items: Iterable[T]):
        self._changed = threading.Condition()  # guards what follows
        self._ready: deque = deque()           # (item, path or None, error or None)
        self._asked = self._released = 0       # items that the consumer came for, and that it released
        self._over = self._closed = False      # nothing more to come; nothing more wanted
        threading.Thread(target=self._work, args=(fetch, list(items)), daemon=True).start()

    def _work(self, fetch, items) -> None:
        for number, item in enumerate(items):
            with self._changed:
                while not (self._closed or number < self._asked or number < self._released + 2):
                    self._changed.wait()
                if self._closed:
                    break
            path = error = None
            try:
                path = fetch(item)
            except Exception as caught:
                error = caught
            with self._changed:
                self._ready.append((item, path, error))
                self._changed.notify_all()
            if error is not None:
                break
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def __iter__(self):
        return self

    def __next__(self):
        with self._changed:
            self._asked += 1
            self._changed.notify_all()
            while not self._ready:
                if self._over or self._closed:
                    raise StopIteration
                self._changed.wait(1)  # without a limit, Ctrl-C would not get through on Windows
            item, path, error = self._ready.popleft()
        if error is not None:
            raise error
        return item, path

    def release(self) -> None:
        """The oldest item not yet released is done with; the one after the next may be begun."""
        with self._changed:
            self._released += 1
            self._changed.notify_all()

    def close(self) -> None:
        """Begin no further item."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()


# ---- parts of files ------------------------------------------------------------


class RangeFile(io.RawIOBase):
    """A file on the hub, to be read in parts: one request for each read, and never a short one.

    What is read at the end of the file is kept, and so is the part that `hold` was given last: reads within
    them ask the hub for nothing. So a background thread can fetch what Arrow is to read. It must not have
    Arrow fetch it: Arrow, in a call of `readinto` while the interpreter ends, aborts the process. READING
    keeps it out by then.
    """

    def __init__(self, url: str, file: HubFile):
        self._url, self._file, self._position = url, file, 0
        self._tail, self._tail_start = b"", file.size
        self._held, self._held_start = b"", 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer) -> int:
        start = self._position
        stop = max(start, min(start + len(buffer), self._file.size))
        if self._held_start <= start and stop <= self._held_start + len(self._held):
            data = memoryview(self._held)[start - self._held_start:stop - self._held_start]
        else:
            data = self.fetch(start, min(stop, self._tail_start))
            if stop >= self._tail_start > start:
                self._tail, self._tail_start = data + self._tail, start
            if stop > self._tail_start:
                data = self._tail[start - self._tail_start:stop - self._tail_start]
        buffer[:stop - start] = data
        self._position = stop
        return stop - start

    def hold(self, start: int, data: bytes) -> None:
        """Answer reads within `data`, the file's bytes from `start` on, from there."""
        self._held, self._held_start = data, start

    def fetch_footer(self) -> None:
        """Fetch what pq.ParquetFile reads first: the footer, whose length is in the file's last 8 bytes."""
        self.seek(max(0, self._file.size - FOOTER_BYTES))
        self.readinto(bytearray(FOOTER_BYTES))
        length = 8 + int.from_bytes(self._tail[-8:-4], "little")
        if self._tail.endswith(b"PAR1") and FOOTER_BYTES < length <= self._file.size:
            self.seek(self._file.size - length)
            self.readinto(bytearray(length))

    def fetch(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop) from the hub, and nothing else changes; none if stop <= start."""
        got = bytearray()

        def attempt() -> None:
            for data in stream(self._url, start + len(got), stop):
                got.extend(data)

        if start < stop:
            retry(f"{self._file.path}, bytes {start:,} to {stop:,}", attempt, lambda: len(got))
        return bytes(got)


def open_ranges(repo: str, commit: str, file: HubFile) -> RangeFile:
    """A file on the hub as a seekable binary file that fetches what is read from it, for pq.ParquetFile.

    Arrow reads a column of a row group in one request. The hub has no hashes of parts, so that only parquet's
    own checks would see wrong bytes. Reads raise UserError as `retry` does.
    """
    return RangeFile(hf_hub_url(repo, file.path, repo_type="dataset", revision=commit), file)


# ---- the disk ------------------------------------------------------------------


def need_space(needs: list[tuple[Path, int, str]]) -> None:
    """Print what (folder, bytes, what for) of `needs` take of each disk and what is free there.

    A folder may not exist yet. Raises UserError where the sum of the needs on one disk is more than is free.
    """
    disks: dict[int, tuple[Path, list]] = {}
    for folder, size, what in needs:
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        disks.setdefault(there.stat().st_dev, (there, []))[1].append((size, f"{what} in {folder}"))
    for there, wanted in disks.values():
        free, total = shutil.disk_usage(there).free, sum(size for size, _ in wanted)
        parts = " + ".join(f"{size / 1e9:.2f} GB for {what}" for size, what in wanted)
        line = f"disk: {parts} = {total / 1e9:.2f} GB; {free / 1e9:.2f} GB are free"
        if total > free:
            raise UserError(f"{line}; make room, or choose another disk with --data_dir=... (shards) or "
                            f"HF_HOME=... (downloads), or take less with --max_tokens=...")
        print(line)
