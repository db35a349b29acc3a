"""A checkpoint to the Hub: its files first, which nobody sees, then one commit that shows them all.

The Hub keeps contents apart from commits. So every weight file is uploaded before there is a commit
that names it, and the commit brings weights, index, configuration and card together and removes the
shards of an earlier model: whoever loads the repository gets the old model or the new one. What an
interrupted push has uploaded is not sent again.
"""

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete

from rilq.errors import HubError, printable
from rilq.formats.hub_cache import RemoteFile, digest_of
from rilq.formats.hub_listing import Listing, fetch_listing, some
from rilq.formats.hub_requests import Address
from rilq.formats.hub_target import Target

WEIGHTS = (".safetensors", ".gguf")


@dataclass(frozen=True)
class LocalFile:
    """A file to push: where it lies or what it holds, its size in bytes, and its sha256."""

    content: Path | bytes
    size: int
    sha256: str

    @classmethod
    def of(cls, content: Path | bytes) -> "LocalFile":
        """Measure a file, which is read once, or bytes."""
        if isinstance(content, bytes):
            return cls(content, len(content), hashlib.sha256(content).hexdigest())
        return cls(content, content.stat().st_size, digest_of(content, hashlib.sha256()))

    def is_at(self, remote: RemoteFile | None) -> bool:
        """Whether the Hub's file is this one; it states git's hash for what is not in LFS."""
        if remote is None or remote.size != self.size or remote.digest is None:
            return False
        if len(remote.digest) == 64:
            return remote.digest == self.sha256
        if isinstance(self.content, Path):
            return remote.digest == digest_of(self.content, remote.hasher())
        blob = b"blob %d\0" % self.size + self.content
        return remote.digest == hashlib.sha1(blob, usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class Pushed:
    """Where a checkpoint lies now.

    Attributes:
        commit: that holds it.
        url: to look at it.
        unchanged: it was all there, so that no commit was made by this call.
    """

    commit: str
    url: str
    unchanged: bool


def push_files(target: Target, files: Mapping[str, LocalFile], *, title: str) -> Pushed:
    """Upload what the target lacks, then commit all of it at once on top of `target.head`.

    Args:
        target: where to.
        files: path in the repository to file; these and no others are sent.
        title: of the commit; a pull request that is open under it is not opened twice.

    Raises:
        HubError: the Hub refused, could not be reached for long, or holds another commit by now.
    """
    stale = target.stale(files.keys())
    if done := target.ask(lambda: _find_done(target, files, stale, title)):
        return done
    missing = [n for n, file in files.items() if not file.is_at(target.head.files.get(n))]
    additions = {name: _addition(name, files[name]) for name in missing}
    weights = [name for name in missing if name.endswith(WEIGHTS)]
    target.report.stage("upload", len(weights), "file")
    for count, name in enumerate(weights, start=1):
        upload = partial(
            target.api().preupload_lfs_files,
            target.at.repo_id,
            [additions[name]],
            revision=target.at.revision,
            create_pr=target.pull_request,
            free_memory=False,
        )
        target.ask(upload, name)
        target.report.step(count)

    def commit() -> Pushed:
        # Asked again after an answer that was lost, it finds what the first request has done.
        if done := _find_done(target, files, stale, title):
            return Pushed(done.commit, done.url, unchanged=False)
        return _commit(target, list(additions.values()), stale, title)

    pushed = target.ask(commit)
    _check_arrived(target, files, pushed)
    return pushed


def _addition(name: str, file: LocalFile) -> CommitOperationAdd:
    addition = CommitOperationAdd(name, file.content)
    addition.upload_info.sha256 = bytes.fromhex(file.sha256)  # else the client reads it all again
    return addition


def _find_done(
    target: Target, files: Mapping[str, LocalFile], stale: Sequence[str], title: str
) -> Pushed | None:
    """The commit that holds all this already, on the branch or in our own open pull request.

    Raises:
        HubError: the branch has moved to a commit that does not.
        Exception: what the client raises.
    """
    now = fetch_listing(target.at)
    if _complete(now, files, stale):
        return Pushed(now.commit, _url(target.at), unchanged=True)
    if now.commit != target.head.commit:
        raise HubError(
            f"{target.at.repo_id}: somebody else has committed to {printable(target.at.revision)} "
            f"meanwhile ({now.commit[:12]}); nothing of theirs was changed: look at it, then run "
            "the same command again"
        )
    if not target.pull_request:
        return None
    for opened in target.api().get_repo_discussions(
        target.at.repo_id, discussion_type="pull_request"
    ):
        if opened.title == title and opened.status in ("open", "draft"):
            ref = f"refs/pr/{opened.num}"
            at = Address(target.at.repo_id, ref, target.at.endpoint, target.at.cache)
            if _complete(found := fetch_listing(at), files, stale):
                return Pushed(found.commit, str(opened.url), unchanged=True)
    return None


def _complete(now: Listing, files: Mapping[str, LocalFile], stale: Sequence[str]) -> bool:
    there = all(file.is_at(now.files.get(name)) for name, file in files.items())
    return there and not now.files.keys() & set(stale)


def _commit(
    target: Target, additions: Sequence[CommitOperationAdd], stale: Sequence[str], title: str
) -> Pushed:
    deletions = [CommitOperationDelete(name, is_folder=False) for name in stale]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the card's validator; its errors are raised
        info = target.api().create_commit(
            target.at.repo_id,
            [*additions, *deletions],
            commit_message=title,
            revision=target.at.revision,
            create_pr=target.pull_request,
            parent_commit=target.head.commit,
        )
    return Pushed(info.oid, info.pr_url or _url(target.at), unchanged=False)


def _check_arrived(target: Target, files: Mapping[str, LocalFile], pushed: Pushed) -> None:
    """Compare what the commit holds with what was to be sent, digest by digest."""
    at = Address(target.at.repo_id, pushed.commit, target.at.endpoint, target.at.cache)
    found = target.ask(lambda: fetch_listing(at))
    if wrong := [name for name, file in files.items() if not file.is_at(found.files.get(name))]:
        raise HubError(
            f"{at.repo_id}: commit {pushed.commit[:12]} does not hold what was sent: {some(wrong)}"
            "\n  a file was changed while it was pushed; run `rilq verify`, then push again"
        )


def _url(at: Address) -> str:
    return f"{at.endpoint}/{at.repo_id}/tree/{at.revision}"
