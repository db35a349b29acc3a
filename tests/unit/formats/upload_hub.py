"""The local Hub, with uploads: repositories, branches, LFS objects, commits and pull requests.

    with UploadHub() as hub:
        hub.fail_next("cut", on="PUT /lfs")     # closed half way through the request
        hub.fail_next("lost", on="/commit/")    # applied, and then no answer

`hf_member` may write to what belongs to `org`; `hf_guest` may only read.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml
from huggingface_hub import close_session, constants, hf_api
from huggingface_hub.utils import _http
from local_hub import LFS_SUFFIXES, Blob, Handler, LocalHub, Refusal, Repository, Request

WRITER, OWNER = "hf_member", "org"


@dataclass(frozen=True)
class Commit:
    """One commit that a client made."""

    repo_id: str
    branch: str
    parent: str
    title: str
    added: tuple[str, ...]
    deleted: tuple[str, ...]
    id: str


class UploadHandler(Handler):
    """The routes that write."""

    hub: "UploadHub"

    def answer(self) -> None:
        self.hub, path = self.server.hub, urlsplit(self.path).path  # type: ignore[assignment]
        writes = self.command in ("POST", "PUT")
        fault = self.hub.due(f"{self.command} {path}", body=True) if writes else None
        self.lost = fault is not None and fault.kind == "lost"
        if fault is not None and fault.kind == "cut":
            length = int(self.headers["Content-Length"])
            self.hub.requests.append(Request(self.command, path, self.server.name, False, None))
            self.rfile.read(length // 2)
            return self.hang_up()
        super().answer()

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def hang_up(self) -> None:
        """Close the connection with a TCP reset."""
        self.close_connection = True
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.connection.close()

    def reply(
        self, status: int, body: bytes, headers: dict[str, str], length: int | None = None
    ) -> None:
        if self.lost:
            return self.hang_up()
        super().reply(status, body, headers, length)

    def route(self, path: str, token: str, body: bytes) -> None:
        path = re.sub(r"/refs/pr/(\d+)", r"/refs-pr-\1", path)  # one word, as every other branch
        if self.server.name == "hub":
            if found := re.fullmatch(r"/lfs/(\w{64})", path):  # signed: without a token
                return self.on_put(found[1], body)
            if path == "/api/validate-yaml":
                return self.on_validate(json.loads(body))
            if token and token not in self.hub.tokens:
                raise Refusal(401, "Invalid credentials in Authorization header")
            if path == "/api/repos/create":
                return self.on_create(json.loads(body), token)
            if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
                return self.on_batch(found[1], json.loads(body), token)
            pattern = (
                r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch|discussions)(?:/([^/]+))?"
            )
            if found := re.fullmatch(pattern, path):
                repo_id, what, branch = found.groups()
                repo = self.repository(repo_id, token)
                if what == "discussions":
                    return self.on_discussions(repo_id)
                proposed = "create_pr" in parse_qs(urlsplit(self.path).query)
                if not proposed:
                    self.may_write(repo_id, token)
                if what == "preupload":
                    return self.on_preupload(repo, branch, json.loads(body))
                if what == "branch":
                    repo.branches[branch] = repo.branches["main"]
                    return self.reply_json({})
                lines = [json.loads(line) for line in body.splitlines()]
                return self.on_commit(repo_id, branch, lines, proposed)
        super().route(path, token, body)

    def may_write(self, repo_id: str, token: str) -> None:
        if token != WRITER or repo_id.partition("/")[0] != OWNER:
            raise Refusal(
                403, f"You don't have the rights to write, {token}"
            )  # it echoes on purpose

    def on_create(self, asked: dict[str, Any], token: str) -> None:
        repo_id = f"{asked['organization']}/{asked['name']}"
        self.may_write(repo_id, token)
        if repo_id in self.hub.repositories:
            raise Refusal(409, "You already created this model repo")
        self.hub.add(repo_id, {".gitattributes": b""}, private=asked.get("visibility") == "private")
        self.reply_json({"url": f"{self.hub.url}/{repo_id}"})

    def on_validate(self, asked: dict[str, Any]) -> None:
        """As the Hub does: `base_model` must be a name on the Hub, `license` a word."""
        front = re.match(r"---\n(.*?)\n---", asked["content"], re.S)
        values = yaml.safe_load(front[1]) if front else {}
        errors = [
            {"message": f'"{key}" is not valid'}
            for key, form in (("base_model", r"[\w.-]+/[\w.-]+"), ("license", r"[\w.-]+"))
            if key in values and not re.fullmatch(form, str(values[key]))
        ]
        if errors:
            answer = json.dumps({"errors": errors, "warnings": []}).encode()
            return self.reply(400, answer, {"Content-Type": "application/json"})
        self.reply_json({"errors": [], "warnings": [{"message": "no widget"}]})

    def on_preupload(self, repo: Repository, branch: str, asked: dict[str, Any]) -> None:
        blobs = repo.commits[self.commit(repo, branch)]
        rows = []
        for file in asked["files"]:
            held = blobs.get(file["path"])
            lfs = file["path"].endswith(LFS_SUFFIXES)
            oid = held and (held.sha256 if held.lfs else held.oid)
            mode = "lfs" if lfs else "regular"
            row = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}
            rows.append(row)
        self.reply_json({"files": rows})

    def on_batch(self, repo_id: str, asked: dict[str, Any], token: str) -> None:
        self.repository(repo_id, token)
        rows = []
        for item in asked["objects"]:
            row: dict[str, Any] = {"oid": item["oid"], "size": item["size"]}
            if item["size"] > self.hub.quota:
                row["error"] = {"code": 403, "message": "Storage limit reached"}
            elif item["oid"] not in self.hub.objects:
                row["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
            rows.append(row)
        self.reply_json({"transfer": "basic", "objects": rows})

    def on_put(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, "the content has another sha256")
        self.hub.objects[oid] = body
        self.hub.called("put")
        self.reply_json({})

    def on_discussions(self, repo_id: str) -> None:
        rows = [
            {
                "title": commit.title,
                "num": int(commit.branch.rpartition("-")[2]),
                "createdAt": "2026-01-01T00:00:00.000Z",
                "status": "open",
                "repo": {"name": repo_id, "type": "model"},
                "isPullRequest": True,
            }
            for commit in self.hub.made
            if commit.repo_id == repo_id and commit.branch.startswith("refs-pr-")
        ]
        self.reply_json({"count": len(rows), "start": 0, "discussions": rows})

    def on_commit(
        self, repo_id: str, branch: str, lines: list[dict[str, Any]], proposed: bool
    ) -> None:
        self.hub.called("commit")
        repo = self.hub.repositories[repo_id]
        header = lines[0]["value"]
        parent = self.commit(repo, branch)
        if header.get("parentCommit") not in (None, parent):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        blobs, added, deleted = dict(repo.commits[parent]), [], []
        for line in lines[1:]:
            value = line["value"]
            path = value["path"]
            if line["key"] == "deletedFile":
                del blobs[path]
                deleted.append(path)
                continue
            lfs = line["key"] == "lfsFile"
            if lfs and value["oid"] not in self.hub.objects:
                raise Refusal(400, f"{path} was never uploaded")
            content = self.hub.objects[value["oid"]] if lfs else base64.b64decode(value["content"])
            blobs[path] = Blob(path, content, len(content))
            added.append(path)
        if proposed:
            branch = f"refs-pr-{1 + sum(b.startswith('refs-pr-') for b in repo.branches)}"
        new = hashlib.sha1(f"{repo_id} {len(repo.commits)}".encode()).hexdigest()
        repo.commits[new], repo.branches[branch] = blobs, new
        self.hub.made.append(
            Commit(repo_id, branch, parent, header["summary"], tuple(added), tuple(deleted), new)
        )
        number = branch.rpartition("-")[2]
        pr = f"{self.hub.url}/{repo_id}/discussions/{number}" if proposed else None
        url = f"{self.hub.url}/{repo_id}/commit/{new}"
        self.reply_json({"commitOid": new, "commitUrl": url, "pullRequestUrl": pr})


class UploadHub(LocalHub):
    """A local Hub that can be pushed to.

    Attributes:
        objects: sha256 to content of everything uploaded.
        made: the commits that clients made, in order.
        quota: bytes of the largest object that is taken.
        watchers: called at each "put" (after it) and "commit" (before it).
    """

    handler = UploadHandler

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.made: list[Commit] = []
        self.quota = 10**12
        self.watchers: list[Any] = []
        super().__init__()

    def called(self, what: str) -> None:
        for watcher in self.watchers:
            watcher(what)

    def files(self, repo_id: str, branch: str = "main") -> dict[str, bytes]:
        """What a branch holds."""
        repo = self.repositories[repo_id]
        return {blob.name: blob.content for blob in repo.commits[repo.branches[branch]].values()}


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[UploadHub]:
    """An empty Hub, which the client in this process takes for the only one, as its writer."""
    # The client waits for a second and longer before it asks again.
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda _: time.sleep(0.01)))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", WRITER)
    close_session()  # it may hold proxies from before
    with UploadHub() as hub:
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(hf_api.api, "endpoint", hub.url)  # of the functions, for transformers
        yield hub
    close_session()
