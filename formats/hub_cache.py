"""The client library's cache: what lies in it, whether it is whole, and what may be removed.

The layout, documented at https://huggingface.co/docs/huggingface_hub/guides/manage-cache:

    models--owner--name/blobs/<digest>              contents
    models--owner--name/blobs/<digest>.part         ours: the beginning of contents
    models--owner--name/snapshots/<commit>/<file>   links to them
    models--owner--name/refs/<branch>               holds a commit hash
"""

import hashlib
import json
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

from rilq.errors import OutputError
from rilq.formats.durable import write_bytes
from rilq.formats.index import INDEX, SINGLE
from rilq.progress import Reporter

_BLOCK = 1 << 22  # bytes hashed at a time
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True)
class RemoteFile:
    """What the Hub says about a file.

    Attributes:
        size: bytes.
        digest: sha256 (64 digits), git's blob sha1 (40 digits), or None if it says neither.
    """

    size: int
    digest: str | None

    @classmethod
    def of(cls, size: int, digest: str | None) -> "RemoteFile":
        """A file whose digest is kept only if it is one; it becomes part of paths."""
        return cls(size, digest if digest and _DIGEST.fullmatch(digest) else None)

    def hasher(self) -> "hashlib._Hash":
        """What makes `digest` of the file's bytes; sha256 where there is none to compare with."""
        if self.digest is not None and len(self.digest) == 40:
            return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        return hashlib.sha256()

    def matches(self, path: Path) -> bool:
        """Whether the file at `path` has this size and, where known, this digest."""
        if path.stat().st_size != self.size:
            return False
        return self.digest is None or digest_of(path, self.hasher()) == self.digest


def digest_of(path: Path, hasher: "hashlib._Hash") -> str:
    """Hexadecimal digest of a file by a hasher that is new."""
    with path.open("rb") as file:
        add_to_hash(hasher, file)
    return hasher.hexdigest()


def add_to_hash(hasher: "hashlib._Hash", file: BinaryIO) -> int:
    """Hash the rest of an open file; the bytes that there were."""
    count = 0
    while block := file.read(_BLOCK):
        hasher.update(block)
        count += len(block)
    return count


@dataclass(frozen=True)
class RepositoryCache:
    """One model repository's place in the cache.

    Attributes:
        root: the folder of all cached repositories.
        repo_id: `owner/name`.
    """

    root: Path
    repo_id: str

    @property
    def folder(self) -> Path:
        """Where everything of this repository lies."""
        return self.root / f"models--{self.repo_id.replace('/', '--')}"

    def find(self, name: str, revision: str) -> Path | None:
        """A cached file of a branch, tag or commit; None if it is not there."""
        if ".." in revision.split("/"):  # would lead out of the folder
            return None
        found = try_to_load_from_cache(self.repo_id, name, cache_dir=self.root, revision=revision)
        return Path(found) if isinstance(found, str) else None

    def blob(self, digest: str) -> Path:
        """Where content with this digest lies, or would."""
        return self.folder / "blobs" / digest

    def part(self, digest: str) -> Path:
        """What has arrived of it so far, by a transfer of ours."""
        return self.folder / "blobs" / f"{digest}.part"

    def link(self, name: str, commit: str, digest: str) -> Path:
        """Give a blob its name in a commit; the path there.

        Raises:
            OSError: it cannot be written.
        """
        path = self.folder / "snapshots" / commit / name
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{secrets.token_hex(8)}.tmp")
        new.symlink_to(os.path.relpath(self.blob(digest), path.parent))
        os.replace(new, path)
        return path

    def listing(self, snapshot: Path) -> dict[str, RemoteFile]:
        """Path to size and digest of a snapshot's files; digests are the names of their blobs."""
        return {
            path.relative_to(snapshot).as_posix(): RemoteFile.of(
                path.stat().st_size,
                os.path.basename(os.readlink(path)) if path.is_symlink() else None,
            )
            for path in sorted(snapshot.rglob("*"))
            if path.is_file()
        }

    def discard(self, path: Path) -> None:
        """Remove a cached file: the link in the snapshot, and what it leads to in the cache.

        Raises:
            OutputError: it cannot be removed.
        """
        chain = [path]
        while chain[-1].is_symlink():
            chain.append(Path(os.path.normpath(chain[-1].parent / os.readlink(chain[-1]))))
        try:
            for link in chain:
                if link.is_relative_to(self.root):
                    link.unlink(missing_ok=True)
        except OSError as err:
            raise OutputError(
                f"{path}: is damaged and cannot be removed: {err.strerror}; remove it by hand, or "
                "set HF_HOME to a folder of your own"
            ) from err

    def remove_orphans(self, digest: str, report: Reporter) -> None:
        """Remove what killed downloads left of a blob; the client never takes them up again."""
        orphans = list((self.folder / "blobs").glob(f"{digest}.*.incomplete"))
        if not orphans:
            return
        lock = self.root / ".locks" / self.folder.name / f"{digest}.lock"
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            with WeakFileLock(lock, timeout=0.1):  # held by whoever downloads this blob just now
                size = sum(orphan.stat().st_size for orphan in orphans)
                for orphan in orphans:
                    orphan.unlink()
        except OSError:  # busy (its Timeout is a TimeoutError), or not ours to remove
            return
        report.note(
            f"{self.repo_id}: removed {len(orphans)} unfinished downloads "
            f"({size / 1e6:,.1f} MB) that an earlier run left"
        )

    def remember(self, revision: str, commit: str) -> None:
        """Note which commit a branch or tag means, for later runs without a network.

        The client does so itself only when it is asked for a branch, not for a commit.
        """
        if revision == commit or ".." in revision.split("/"):
            return
        ref = self.folder / "refs" / revision
        try:
            if not ref.is_file() or ref.read_text() != commit:
                ref.parent.mkdir(parents=True, exist_ok=True)
                write_bytes(ref, commit.encode())
        except (OSError, OutputError):  # only a convenience; a file that must be written will tell
            return


def missing_weights(snapshot: Path) -> list[str]:
    """The shards that a cached snapshot lacks."""
    try:
        weight_map = json.loads((snapshot / INDEX).read_bytes())["weight_map"]
        shards = sorted({str(shard) for shard in weight_map.values()})
    except FileNotFoundError:
        shards = [SINGLE]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []  # a damaged index: the checkpoint's own check says more about it
    return [name for name in shards if not (snapshot / name).is_file()]
