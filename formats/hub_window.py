"""A Hub checkpoint of which only a few shards are on this machine at any time."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from rilq.errors import OptionError
from rilq.formats.hub import HubRepository
from rilq.formats.read_ahead import ReadAhead, reading_ahead

SHARDS = 3  # at once: one in use, one that is needed again later, one that comes next
ROOM = "choose another --work-dir"


class ShardWindow:
    """The shards of a repository in a folder of our own, each for as long as it is needed.

    A shard that lies in the user's cache is used from there, and never deleted; other files than
    shards go through the cache as always.

    Args:
        repo: the repository.
        folder: where shards come to lie; made when the first one comes.
        max_bytes: for all shards in it, whole or in part; None for no limit but `SHARDS`.
        heads: `heads` of an earlier run.
    """

    def __init__(
        self,
        repo: HubRepository,
        folder: Path,
        max_bytes: int | None = None,
        *,
        heads: Mapping[str, str] | None = None,
    ) -> None:
        self.repo, self.folder, self.max_bytes = repo, folder, max_bytes
        self.heads = dict(heads or {})  # shard to the text of its header; shards come and go
        self._ahead: ReadAhead | None = None
        self._damaged: set[str] = set()  # of the user's cache

    @property
    def label(self) -> str:
        """`owner/name`."""
        return self.repo.label

    @property
    def commit(self) -> str:
        """The pinned one."""
        return self.repo.commit

    def files(self) -> dict[str, int]:
        """Name to size in bytes of the files at the top level."""
        return self.repo.files()

    def head(self, name: str) -> tuple[bytes, int]:
        """A shard's first 8 + N bytes and its size; see `HubRepository.head`."""
        if name not in self.heads:
            head, _ = self.repo.head(name)
            self.heads[name] = head[8:].decode("utf-8")
        text = self.heads[name].encode("utf-8")
        return len(text).to_bytes(8, "little") + text, self.repo.listed(name).size

    def path(self, name: str) -> Path:
        """The file in the folder or in the cache, fetched first if need be, its digest checked.

        Raises:
            HubError, OutputError: as `HubRepository.path`.
        """
        if self._ahead is not None and _is_shard(name):
            self._ahead.wait_for(name)
        return self.fetch(name)

    def fetch(self, name: str) -> Path:
        """As `path`, now and by the calling thread."""
        if not _is_shard(name):
            return self.repo.fetch(name)
        if (cached := self._in_cache(name)) is not None:
            if self.repo.verified(name, cached):
                return cached
            self.repo.report.note(f"{cached}: damaged; fetching {self.label}/{name} beside it")
            self._damaged.add(name)
        path = self._file(name)
        if path.is_file() and not self.repo.verified(name, path):
            self.repo.report.note(f"{path}: damaged; fetching {self.label}/{name} again")
            path.unlink()
        if not path.is_file():
            self.repo.download(name, path, part=self._part(name), room=ROOM)
        return path

    @contextmanager
    def in_order(self, steps: Sequence[Sequence[str]]) -> Iterator[Callable[[], None]]:
        """Fetch the shard that is needed next while the caller works; delete those used up."""
        self._clean({name for step in steps for name in step})
        with self.repo.stoppable() as stop, reading_ahead(steps, self, stop) as ahead:
            self._ahead = ahead
            try:
                yield ahead.advance
            finally:
                self._ahead = None
        with suppress(OSError):  # parts of what is needed again, or never made
            self.folder.rmdir()

    def has_room(self, name: str) -> bool:
        """Whether one more shard keeps both limits; one in the user's cache needs no room."""
        if self._in_cache(name) is not None:
            return True
        sizes = [size for each, size in self._held().items() if each != name]
        total = sum(sizes) + self.repo.listed(name).size
        return len(sizes) < SHARDS and (self.max_bytes is None or total <= self.max_bytes)

    def drop(self, name: str) -> None:
        """Delete our own copy, whole or in part."""
        for path in (self._file(name), self._part(name)):
            path.unlink(missing_ok=True)

    def to_fetch(self, steps: Sequence[Sequence[str]]) -> dict[Path, int]:
        """The most bytes that are still to be written, by folder.

        Raises:
            OptionError: the shards of one step alone exceed `max_bytes`.
        """
        sizes = [
            sorted((self.repo.listed(n).size for n in set(step) if self._is_ours(n)), reverse=True)
            for step in steps
        ]
        least = max((sum(each) for each in sizes), default=0)
        if self.max_bytes is not None and least > self.max_bytes:
            raise OptionError(
                f"--max-disk {_kilobytes(self.max_bytes)}: embedding and head, or one decoder "
                f"layer, lie in shards of {_kilobytes(least)}\n"
                f"  use --max-disk {_kilobytes(least)} or more"
            )
        ours = {name for step in steps for name in step if self._is_ours(name)}
        largest = sorted((self.repo.listed(name).size for name in ours), reverse=True)
        most = max(sum(largest[:SHARDS]), least)
        if self.max_bytes is not None:
            most = min(most, self.max_bytes)
        others = [[n for n in step if not _is_shard(n)] for step in steps]
        there = sum(
            path.stat().st_size
            for name in self._held()
            for path in (self._file(name), self._part(name))
            if path.exists()
        )
        here = {self.folder: max(0, most - there)} if ours else {}
        return here | self.repo.to_fetch(others)

    def _is_ours(self, name: str) -> bool:
        return _is_shard(name) and self._in_cache(name) is None

    def _in_cache(self, name: str) -> Path | None:
        """A shard in the user's cache, as far as is known without reading it."""
        cached = None if name in self._damaged else self.repo.cached(name)
        whole = cached is not None and cached.stat().st_size == self.repo.listed(name).size
        return cached if whole else None

    def _held(self) -> dict[str, int]:
        """Name to size, once it is whole, of all shards in the folder."""
        shards = {name: size for name, size in self.files().items() if _is_shard(name)}
        return {
            name: size
            for name, size in shards.items()
            if self._file(name).exists() or self._part(name).exists()
        }

    def _clean(self, needed: Iterable[str]) -> None:
        """Delete what an earlier run left and nobody needs."""
        for name in self._held().keys() - set(needed):
            self.drop(name)

    def _file(self, name: str) -> Path:
        return self.folder / f"{self._stem(name)}.safetensors"

    def _part(self, name: str) -> Path:
        return self.folder / f"{self._stem(name)}.part"

    def _stem(self, name: str) -> str:
        """Names of files here do not come from outside."""
        digest = self.repo.listed(name).digest
        return digest or hashlib.sha256(f"{self.commit}/{name}".encode()).hexdigest()


def _is_shard(name: str) -> bool:
    return name.endswith(".safetensors")


def _kilobytes(count: int) -> str:
    """Rounded up, as `--max-disk` takes it."""
    return f"{-(-count // 1000)}kB"
