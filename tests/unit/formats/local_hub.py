"""A small Hugging Face Hub on this machine, with faults on request; standard library only.

The real `huggingface_hub` client downloads from it: it pins commits, asks for ranges, and is
redirected to a second origin (the "CDN") for large files.

    with LocalHub() as hub:
        hub.add("org/model", {"config.json": b"{}"})
        hub.fail_next("reset", on="GET /org/model/resolve")
"""

import contextlib
import hashlib
import json
import re
import socket
import struct
import sys
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".pth", ".gguf", ".model")
ALWAYS = 10**9


@dataclass
class Blob:
    """One file's content, and the size that the Hub states for it."""

    name: str
    content: bytes
    size: int

    @property
    def lfs(self) -> bool:
        return self.name.endswith(LFS_SUFFIXES)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        """Git's blob id: of the content, or of the pointer that stands for it."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\n"
        text = (pointer + f"size {self.size}\n").encode() if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(text) + text).hexdigest()

    def row(self) -> dict[str, Any]:
        """The file as tree and paths-info list it."""
        lfs = {"oid": self.sha256, "sha256": self.sha256, "size": self.size, "pointerSize": 134}
        row = {"type": "file", "path": self.name, "size": self.size, "oid": self.oid}
        return {**row, "lfs": lfs} if self.lfs else row


@dataclass
class Repository:
    """Commits, and the branches that point at them."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)


@dataclass
class Fault:
    """What happens to the next `times` requests in which `on` is found ("GET /path range")."""

    kind: str
    times: int
    on: str
    retry_after: int | None


@dataclass
class Request:
    """One request as the log keeps it; `sent` counts the bytes of its answer's body."""

    method: str
    path: str
    origin: str
    authorized: bool
    range: str | None
    sent: int = 0


class Refusal(Exception):
    """An answer with an error status, and the code by which the client tells errors apart."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class LocalHub:
    """Repositories in memory, served by two origins; tokens are `hf_member` and `hf_guest`.

    A member reads everything, a guest and the unknown neither private repositories nor the files of
    gated ones.
    """

    tokens = ("hf_member", "hf_guest")
    handler: "type[Handler]"  # set below
    says = "on request"  # along with a status that was asked for

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.page = ""  # HTML that is answered to everything, as a proxy's login does
        self.renamed: dict[str, str] = {}  # old name to new; requests are redirected
        self.ranges = True  # else they are ignored, as some proxies do
        self.periods: dict[str, int] = {}  # of `fail_every`
        self.counts: Counter[str] = Counter()
        self.stall_seconds, self.stopped = 60.0, threading.Event()
        self.lock = threading.Lock()
        self.servers = {name: _Server(self, name, self.handler) for name in ("hub", "cdn")}
        self.url, self.cdn = (server.url for server in self.servers.values())

    def __enter__(self) -> "LocalHub":
        for server in self.servers.values():
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Close both origins and all connections to them; new ones are refused from now on."""
        self.stopped.set()
        while self.servers:
            _, server = self.servers.popitem()
            server.shutdown()
            server.server_close()
            for connection in server.connections:
                with contextlib.suppress(OSError):  # closed already
                    connection.shutdown(socket.SHUT_RDWR)

    def add(
        self,
        repo_id: str,
        files: dict[str, bytes],
        *,
        private: bool = False,
        gated: bool = False,
        sizes: dict[str, int] | None = None,
    ) -> str:
        """Commit files to `main` in place of the earlier ones; returns the commit's hash.

        `sizes` states other sizes than the true ones.
        """
        repo = self.repositories.setdefault(repo_id, Repository())
        repo.private, repo.gated = private, gated
        blobs = {n: Blob(n, c, (sizes or {}).get(n, len(c))) for n, c in files.items()}
        commit = hashlib.sha1(f"{repo_id} {len(repo.commits)}".encode()).hexdigest()
        repo.commits[commit], repo.branches["main"] = blobs, commit
        return commit

    def fail_next(
        self, kind: str, times: int = 1, *, on: str = "", retry_after: int | None = None
    ) -> None:
        """Make requests fail.

        Args:
            kind: an HTTP status ("503"), or for the body of a file: "fail" (closed half way),
                "reset" (the same with a TCP reset), "stall" (half, then silence for
                `stall_seconds`), "truncate" (half, and a length to match) or "corrupt" (one byte
                flipped).
            times: how many requests.
            on: pattern to find in "METHOD /path range", where a request without a range has the
                word "whole".
            retry_after: seconds, sent along with a status.
        """
        self.faults.append(Fault(kind, times, on, retry_after))

    def fail_every(self, periods: dict[str, int]) -> None:
        """Make every so many-th request fail from now on: `{"fail": 2, "429": 4}`.

        Bodies of files are counted for the faults of `fail_next`, all requests for a status.
        """
        with self.lock:
            self.periods = periods
            self.counts.clear()

    def due_by_period(self, *, body: bool) -> Fault | None:
        """The fault that `fail_every` has for this request; counts it for every kind."""
        due = []
        for kind, period in self.periods.items():
            if kind.isalpha() == body:
                self.counts[kind] += 1
                due += [kind] * (self.counts[kind] % period == 0)
        return Fault(due[0], 1, "", 0) if due else None

    def due(self, request: str, *, body: bool) -> Fault | None:
        """The fault, if any, that this request must suffer; counts it."""
        with self.lock:
            for fault in self.faults:
                fits = fault.kind.isalpha() == body and re.search(fault.on, request)
                if fault.times and fits:
                    fault.times -= 1
                    return fault
            return self.due_by_period(body=body)

    def got(self, part: str) -> list[Request]:
        """All requests so far that `part` is part of ("GET /path")."""
        with self.lock:
            return [r for r in self.requests if part in f"{r.method} {r.path}"]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: LocalHub, name: str, handler: "type[Handler]") -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.hub, self.name = hub, name
        self.connections: list[socket.socket] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.append(request)
        super().process_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients may leave whenever they like; anything else is our own mistake."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, ValueError)):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One connection; a hub that can do more derives its own from it."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else headers and body of an answer come 40 ms apart
    server: _Server

    def log_message(self, format: str, *args: object) -> None:  # the hub keeps its own log
        pass

    def answer(self) -> None:
        self.hub, url = self.server.hub, urlsplit(self.path)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.entry = Request(
            self.command, url.path, self.server.name, bool(token), self.headers.get("Range")
        )
        self.wanted = f"{self.command} {url.path} {self.entry.range or 'whole'}"
        with self.hub.lock:
            self.hub.requests.append(self.entry)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            fault = self.hub.due(self.wanted, body=False)
            if fault:
                return self.refuse(Refusal(int(fault.kind), self.hub.says), fault.retry_after)
            if self.hub.page:
                return self.reply(200, self.hub.page.encode(), {"Content-Type": "text/html"})
            self.route(unquote(url.path), token, body)
        except Refusal as refusal:
            self.refuse(refusal, None)

    do_GET = do_HEAD = do_POST = answer

    def route(self, path: str, token: str, body: bytes) -> None:
        if self.server.name == "cdn":
            return self.send_blob(self.on_cdn(path.rpartition("/")[2]), {})
        for old, new in self.hub.renamed.items():
            if f"/{old}/" in f"{path}/":
                return self.reply(307, b"", {"Location": path.replace(old, new)})
        if token and token not in self.hub.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w[\w-]+)/([^/]+))?", path):
            repo_id, what, revision = found[1], found[2] or "revision", found[3] or "main"
            repo = self.repository(repo_id, token)
            commit = self.commit(repo, revision)
            blobs = repo.commits[commit]
            if what == "revision":
                return self.reply_json(self.info(repo_id, repo, commit))
            if what == "tree":
                return self.reply_json([blob.row() for blob in blobs.values()])
            if what == "paths-info":
                wanted = parse_qs(body.decode()).get("paths", [])
                return self.reply_json([blobs[name].row() for name in wanted if name in blobs])
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.resolve(found[1], found[2], found[3], token)
        raise Refusal(404, f"no such route: {path}")

    def repository(self, repo_id: str, token: str) -> Repository:
        repo = self.hub.repositories.get(repo_id)
        if repo is None or (repo.private and token != "hf_member"):
            raise Refusal(404 if token else 401, "Repository not found", "RepoNotFound")
        return repo

    def commit(self, repo: Repository, revision: str) -> str:
        commit = repo.branches.get(revision, revision)
        if commit not in repo.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def info(self, repo_id: str, repo: Repository, commit: str) -> dict[str, Any]:
        siblings = [
            {"rfilename": b.name, "size": b.size, "blobId": b.oid, "lfs": b.row().get("lfs")}
            for b in repo.commits[commit].values()
        ]
        about = {"_id": "0", "id": repo_id, "private": repo.private, "tags": []}
        return {**about, "sha": commit, "siblings": siblings}

    def resolve(self, repo_id: str, revision: str, name: str, token: str) -> None:
        repo = self.repository(repo_id, token)
        if repo.gated and token != "hf_member":
            raise Refusal(403 if token else 401, "Access is restricted", "GatedRepo")
        commit = self.commit(repo, revision)
        blob = repo.commits[commit].get(name)
        if blob is None:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": commit, "ETag": f'"{blob.sha256 if blob.lfs else blob.oid}"'}
        if not blob.lfs:
            return self.send_blob(blob, headers)
        headers |= {"X-Linked-Size": str(blob.size), "X-Linked-Etag": f'"{blob.sha256}"'}
        location = f"{self.hub.cdn}/{quote(name)}/{blob.sha256}?Signature=secret-of-the-cdn"
        self.reply(302, b"", {**headers, "Location": location})

    def on_cdn(self, sha256: str) -> Blob:
        for repo in self.hub.repositories.values():
            for blobs in repo.commits.values():
                for blob in blobs.values():
                    if blob.sha256 == sha256:
                        return blob
        raise Refusal(404, "no such object")

    def send_blob(self, blob: Blob, headers: dict[str, str]) -> None:
        """Answer with a file or the range of it that was asked for, and with the fault due."""
        content, status = blob.content, 200
        wanted = self.headers.get("Range", "") if self.hub.ranges else ""
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", wanted):
            begin, end = int(asked[1]), min(int(asked[2] or len(content)) + 1, len(content))
            headers = {**headers, "Content-Range": f"bytes {begin}-{end - 1}/{len(content)}"}
            content, status = content[begin:end], 206
        fault = self.command == "GET" and self.hub.due(self.wanted, body=True)
        kind, half = fault.kind if fault else "", len(content) // 2
        if kind == "corrupt":
            content = content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]
        if kind == "truncate":
            content = content[:half]
        cut = kind in ("fail", "reset", "stall")
        self.reply(status, content[:half] if cut else content, headers, len(content))
        if cut:
            self.close_connection = True
        if kind == "stall":
            self.hub.stopped.wait(self.hub.stall_seconds)
        if kind == "reset":  # without lingering, close() sends RST
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()

    def reply(
        self, status: int, body: bytes, headers: dict[str, str], length: int | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.entry.sent = len(body)
            self.wfile.write(body)
            self.wfile.flush()

    def reply_json(self, value: Any) -> None:
        self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, refusal: Refusal, retry_after: int | None) -> None:
        headers = {"X-Error-Message": str(refusal), "Content-Type": "application/json"}
        if refusal.code:
            headers["X-Error-Code"] = refusal.code
        if retry_after is not None:
            headers["Retry-After"] = str(retry_after)
        self.reply(refusal.status, json.dumps({"error": str(refusal)}).encode(), headers)


LocalHub.handler = Handler
