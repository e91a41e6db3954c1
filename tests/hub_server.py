"""
A loopback server that speaks enough of the Hugging Face hub's protocol, and misbehaves when told to.

    with HubServer({"sample/10BT/000_00000.parquet": data}) as server:
        server.faults.append(Fault("drop", after=1000))
        ...  # run a client with HF_ENDPOINT=server.url and an empty HF_HOME
        server.requests  # what was asked for, and what was sent

It knows the listing (/api/datasets/REPO/revision/REV, with sizes and hashes), and files with HEAD, GET, ETag
and ranges, directly or behind a redirect to another host name, as the hub's CDN is. Imported by the tests.
"""
import hashlib
import json
import re
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import unquote, urlsplit


class Fault(NamedTuple):
    """What goes wrong with the next request that matches, and with that one alone.

    kind: "drop" (the connection is reset), "truncate" (it ends early), "stall" (nothing more comes, until the
    client leaves), each after `after` bytes of the body, under a Content-Length of the whole; "short" (an
    honest Content-Length, of `after` bytes); "drip" (a byte per millisecond); "flood" (the body again and
    again, 1 GB under that Content-Length); "none" (nothing); "corrupt" (one wrong byte); "ignore_range" (200
    and the complete file); "other_range" (206 for one that starts a byte later); "status" (that status, with
    `headers`).
    """
    kind: str
    after: int = 0
    status: int = 503
    headers: tuple = ()        # of the answer, ((name, value), ...)
    method: str = "GET"
    match: str = "/resolve/"   # part of the path


class Request(NamedTuple):
    """A request about the dataset that was answered."""
    method: str
    path: str
    range: str | None
    status: int
    sent: int      # bytes of body
    headers: dict  # of the request, names in lower case


class HubServer:
    """Serves {path: bytes} as a dataset; files are "large" (ETag: a sha256) unless they end in .md.

    prefix: what the URLs of files have before the repository's name; "" makes a model of it.
    cdn: contents come from another host, after a redirect. token: what HF_TOKEN has to be, if anything.
    """

    def __init__(self, files: dict[str, bytes], repo: str = "HuggingFaceFW/fineweb-edu",
                 commit: str = "c" * 40, cdn: bool = False, token: str | None = None,
                 prefix: str = "datasets/"):
        self.prefix = prefix
        self.files, self.repo, self.commit, self.cdn, self.token = files, repo, commit, cdn, token
        self.pause = 0.0  # seconds after each 64 KB
        self.older: list[str] = []  # commits that the branch has left behind, with the same files
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def etag(self, path: str) -> str:
        """As the hub's: the sha256 of a large file, git's blob id of a small one."""
        data = self.files[path]
        return git_id(data) if path.endswith(".md") else hashlib.sha256(data).hexdigest()

    def listing(self, revision: str) -> bytes:
        siblings = []
        for path, data in self.files.items():
            sibling = {"rfilename": path, "size": len(data), "blobId": git_id(data)}
            if not path.endswith(".md"):
                sibling["lfs"] = {"size": len(data), "sha256": self.etag(path), "pointerSize": 134}
            siblings.append(sibling)
        commit = self.commit if revision == "main" else revision
        return json.dumps({"id": self.repo, "sha": commit, "siblings": siblings}).encode()

    def bodies(self, path: str = "") -> list[Request]:
        """The GET requests for contents of files whose path contains `path`, in order."""
        return [request for request in self.requests if request.method == "GET" and path in request.path
                and re.search("/resolve/|/cdn/", request.path) and request.status != 302]


def git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"  # connections are kept, as the hub does

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer("HEAD")

    def do_GET(self):
        self.answer("GET")

    def answer(self, method):
        hub = self.hub
        parts = urlsplit(self.path)  # the whole URL, if a proxy is asked
        path = unquote(parts.path)
        if hub.repo not in path:  # another dataset, or a question of the client's own
            return self.send(method, path, 404, {"X-Error-Code": "RepoNotFound"}, b"")
        fault = next((f for f in hub.faults if f.method == method and f.match in path), None)
        if fault:
            hub.faults.remove(fault)
        if fault and fault.kind == "status":
            return self.send(method, path, fault.status, dict(fault.headers), b"a fault")
        from_cdn = path.startswith("/cdn/")
        if hub.token and not from_cdn and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.send(method, path, 401, {"X-Error-Message": "Invalid username or password."}, b"")
        if match := re.fullmatch(rf"/api/datasets/{hub.repo}/revision/(.+)", path):
            if match[1] not in ("main", hub.commit, *hub.older):
                return self.send(method, path, 404, {"X-Error-Code": "RevisionNotFound"}, b"")
            body = hub.listing(match[1])
            return self.send(method, path, 200, {"Content-Type": "application/json"}, body, fault)
        match = re.fullmatch(rf"(?:/cdn)?/{hub.prefix}{hub.repo}/resolve/([0-9a-f]+|main)/(.+)", path)
        commit = match and (hub.commit if match[1] == "main" else match[1])
        if commit not in (hub.commit, *hub.older) or match[2] not in hub.files:
            return self.send(method, path, 404, {"X-Error-Code": "EntryNotFound"}, b"")
        data, etag = hub.files[match[2]], hub.etag(match[2])
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if hub.cdn and not from_cdn:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data)),
                        "ETag": '"of-the-redirect"',
                        "Location": f"http://localhost:{hub.port}/cdn{parts.path}?signature=secret"}
            return self.send(method, path, 302, headers, b"")
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted or (fault and fault.kind == "ignore_range"):
            return self.send(method, path, 200, headers, data, fault)
        start, stop = int(wanted[1]), min(int(wanted[2] or len(data)) + 1, len(data))
        if fault and fault.kind == "other_range":
            start += 1
        if start >= stop:
            return self.send(method, path, 416, {"Content-Range": f"bytes */{len(data)}"}, b"")
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        return self.send(method, path, 206, headers, data[start:stop], fault)

    def send(self, method, path, status, headers, body, fault=None):
        kind = fault.kind if fault else ""
        length = len(body)
        if kind == "corrupt":
            body = body[:length // 2] + bytes([body[length // 2] ^ 1]) + body[length // 2 + 1:]
        if kind in ("drop", "truncate", "stall", "short"):
            body = body[:fault.after]
        if kind == "flood":
            length = 1 << 30
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if kind == "short" else length))
        if method == "HEAD":
            body = b""
        if self.hub.repo in path:
            asked = {name.lower(): value for name, value in self.headers.items()}
            self.hub.requests.append(Request(method, path, asked.get("range"), status, len(body), asked))
        if kind == "stall" and not fault.after:  # not even a status line
            self._headers_buffer = []
        else:
            self.end_headers()
        try:
            step, pause = (1, 0.001) if kind == "drip" else (1 << 16, self.hub.pause)
            for start in range(0, len(body), step):
                self.wfile.write(body[start:start + step])
                time.sleep(pause)
            while kind == "flood":
                self.wfile.write(body)
            self.wfile.flush()
            if kind == "stall":
                self.connection.recv(1)  # comes back when the client leaves
        except OSError:
            pass
        if kind == "drop":  # a reset, rather than an orderly end
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        if kind in ("drop", "truncate", "stall"):
            self.close_connection = True
