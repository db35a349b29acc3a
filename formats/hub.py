"""A checkpoint on the Hub: one pinned commit of which only the needed files are fetched."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from logging import ERROR
from pathlib import Path
from threading import Event

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import FileMetadataError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    disable_progress_bars,
    validate_repo_id,
)
from huggingface_hub.utils.logging import set_verbosity

from rilq import __version__
from rilq.errors import CheckpointError, HubError, OptionError, printable
from rilq.formats.hub_cache import RemoteFile, RepositoryCache, missing_weights
from rilq.formats.hub_listing import Listing, check_weights, fetch_listing, some
from rilq.formats.hub_requests import (
    PATIENCE,
    Address,
    Patience,
    explain,
    is_commit,
    may_pass,
    safe_cause,
    unreachable,
    with_patience,
)
from rilq.formats.hub_transfer import REFETCHES, Transfer, stored
from rilq.formats.read_ahead import ReadAhead, reading_ahead
from rilq.formats.shard import header_length, parse_header, read_head
from rilq.formats.source import CONFIG, LocalFolder, Source
from rilq.progress import Reporter, SilentReporter

SHA256_DIGITS = 64
FIRST_BYTES = 1 << 16  # of a shard: the headers of most fit, which saves a second request


def open_source(
    model: str,
    *,
    revision: str | None = None,
    known: Mapping[str, RemoteFile] | None = None,
    report: Reporter = SilentReporter(),  # noqa: B008 - stateless
) -> Source:
    """The folder or the Hub repository that `model` means; an existing folder comes first.

    Args:
        model: a folder, or `owner/name` on the Hub.
        revision: branch, tag or commit hash on the Hub; "main" if None.
        known: see `HubRepository.open`.
        report: receives notes and warnings.

    Raises:
        CheckpointError: `model` is neither, or the repository holds no safetensors weights.
        HubError: the Hub refused, or could not be reached.
        OptionError: a revision was given for a local folder.
    """
    folder = Path(model).expanduser() if model.startswith("~") else Path(model)
    shown = printable(model, 400)
    if model and folder.is_dir():
        if revision is not None:
            raise OptionError(
                f"--revision {printable(revision)}: {shown} is a local folder, which has none\n"
                "  leave the option out, or rename the folder if the Hub's model was meant"
            )
        return LocalFolder(folder)
    remedy = "\n  give a checkpoint's folder, or owner/name of a repository on the Hub"
    if model and folder.exists():
        raise CheckpointError(f"{shown}: is a file, not a checkpoint's folder{remedy}")
    if model.startswith(("/", "./", "../", "~")) or model.count("/") > 1 or model.endswith("/"):
        raise CheckpointError(f"{shown}: there is no such folder{remedy}")
    try:
        validate_repo_id(model)
    except HFValidationError as err:
        raise CheckpointError(
            f"{shown or 'an empty text'}: neither a folder nor a name on the Hub{remedy}"
        ) from err
    return HubRepository.open(model, revision, known=known, report=report)


@dataclass
class HubRepository:
    """A model repository on the Hub; opened with `HubRepository.open`.

    Attributes:
        at: the repository; its revision is the one that was asked for.
        commit: the hash that was found for it at the start, used for every later request.
        listing: top-level file to size and digest.
        offline: the Hub is not asked for anything; the cache must do.
    """

    at: Address
    commit: str
    listing: Mapping[str, RemoteFile] = field(repr=False)
    offline: bool
    patience: Patience = field(repr=False)
    report: Reporter = field(repr=False)
    transfer: Transfer = field(init=False, repr=False)
    _ahead: ReadAhead | None = field(default=None, init=False, repr=False)
    _verified: dict[str, tuple[int, ...]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.transfer = Transfer(self.at, self.commit, self.patience, self.report)

    @classmethod
    def open(
        cls,
        repo_id: str,
        revision: str | None = None,
        *,
        known: Mapping[str, RemoteFile] | None = None,
        report: Reporter = SilentReporter(),  # noqa: B008 - stateless
        endpoint: str | None = None,
        cache: Path | None = None,
        patience: Patience = PATIENCE,
    ) -> "HubRepository":
        """Pin a revision's commit hash and list its files; fetches nothing else.

        A Hub that cannot be reached is replaced by the cache where that holds the whole model, with
        a warning; so is one that refuses, if `revision` is a full commit hash. The client library's
        progress bars and log lines are switched off for the process.

        Args:
            repo_id: `owner/name`.
            revision: branch, tag or commit hash; "main" if None.
            known: the files of a commit hash, from an earlier run. With them the cache stands in
                for the Hub although it lacks shards: they may not be needed any more.
            report: receives notes and warnings.
            endpoint: the Hub's URL; None for the client library's (`HF_ENDPOINT`).
            cache: the folder of cached repositories; None for the library's (`HF_HUB_CACHE`).
            patience: how requests that fail are tried again.

        Raises:
            CheckpointError: the repository holds no safetensors weights.
            HubError: the Hub refused, or could not be reached and the cache lacks files.
        """
        quiet_library()
        at = Address(
            repo_id,
            revision or constants.DEFAULT_REVISION,
            (endpoint or constants.ENDPOINT).rstrip("/"),
            Path(cache or constants.HF_HUB_CACHE),
        )
        try:
            found = with_patience(
                lambda: fetch_listing(at), repo_id, patience, report, reached=False
            )
        except Exception as err:
            return cls._open_cached(at, err, patience, report, known)
        if found.name.lower() != repo_id.lower():
            report.warn(f"{repo_id}: is called {printable(found.name)} now; use that name")
        check_weights(at, found.files)
        report.note(f"{repo_id}: revision {printable(at.revision)} is commit {found.commit}")
        return cls(at, found.commit, found.top_level(), False, patience, report)

    @classmethod
    def _open_cached(
        cls,
        at: Address,
        err: Exception,
        patience: Patience,
        report: Reporter,
        known: Mapping[str, RemoteFile] | None,
    ) -> "HubRepository":
        why = explain(err, at)
        offline = isinstance(err, OfflineModeIsEnabled)
        no_answer = offline or may_pass(err) or unreachable(err)
        proxied = isinstance(err, FileMetadataError)
        cache = RepositoryCache(at.cache, at.repo_id)
        config = cache.find(CONFIG, at.revision)
        if config is None or not (no_answer or proxied or is_commit(at.revision)):
            raise why from safe_cause(err)
        folder = config.parent
        missing = missing_weights(folder)
        if missing and known is None:
            raise HubError(
                f"{why}; the cache lacks {len(missing)} files of commit {folder.name}: "
                f"{some(missing)}"
            ) from err
        if not offline:  # that was asked for
            report.warn(str(why))
        report.note(f"{at.repo_id}: working from the cache, commit {folder.name}")
        listing = known or Listing(at.repo_id, folder.name, cache.listing(folder)).top_level()
        return cls(at, folder.name, listing, True, patience, report)

    @property
    def label(self) -> str:
        """`owner/name`."""
        return self.at.repo_id

    def files(self) -> dict[str, int]:
        """Name to size in bytes of the files at the top level."""
        return {name: file.size for name, file in self.listing.items()}

    def head(self, name: str) -> tuple[bytes, int]:
        """A safetensors file's first 8 + N bytes and its size, fetched by range if not cached.

        Raises:
            CheckpointError: the header is not valid, which was tried several times.
            HubError: the Hub refused, or could not be reached.
        """
        file = self.listed(name)
        shard = f"{self.label}/{name}"
        cached = self.cached(name)
        if cached is not None and cached.stat().st_size == file.size:
            return read_head(cached, shard)
        self._check_online(name)
        for attempts_left in reversed(range(1 + REFETCHES)):
            head = self._fetch_head(name, file.size)
            try:
                parse_header(head, file.size, shard)
                break
            except CheckpointError:  # damaged there, or on its way
                if not attempts_left:
                    raise
        return head, file.size

    def path(self, name: str) -> Path:
        """The file in the cache, fetched first if need be, its digest checked once per object.

        Raises:
            HubError: the Hub refused, could not be reached, or sent a damaged file each time.
            OutputError: the volume of the cache is full or cannot be written.
        """
        if self._ahead is not None:
            self._ahead.wait_for(name)
        return self.fetch(name)

    def fetch(self, name: str) -> Path:
        """As `path`, now and by the calling thread."""
        for _ in range(1 + REFETCHES):
            path = self._cache.find(name, self.commit) or self._download(name)
            if self.verified(name, path):
                return path
            if self.offline:
                raise HubError(
                    f"{self.label}/{printable(name)}: damaged in the cache ({path}), and the Hub "
                    "cannot be asked now; run the same command again when it can"
                )
            self.report.note(f"{self.label}/{name}: checksum does not match; fetching it again")
            self._cache.discard(path)
        raise HubError(
            f"{self.label}/{printable(name)}: arrived damaged {1 + REFETCHES} times (its checksum "
            "is not the one that the Hub states); check the network or the proxy, then run again"
        )

    def cached(self, name: str) -> Path | None:
        """Where the file lies in the cache, of this commit or of another; None if it does not."""
        if (found := self._cache.find(name, self.commit)) is not None:
            return found
        digest = self.listed(name).digest
        blob = self._cache.blob(digest) if digest else None
        return blob if blob is not None and blob.is_file() else None

    def verified(self, name: str, path: Path) -> bool:
        """Whether a copy of the file has its digest; it is hashed once per object."""
        seen = _signature(path)
        if self._verified.get(name) == seen:
            return True
        if not self.listed(name).matches(path):
            return False
        self._verified[name] = seen
        return True

    def download(self, name: str, path: Path, *, part: Path, room: str) -> None:
        """Fetch a file to `path`, outside of the cache or in it; see `Transfer.download`."""
        self._check_online(name)
        file = self.listed(name)
        self.report.note(f"{self.label}/{name}: downloading {file.size / 1e6:,.1f} MB")
        if self.transfer.download(name, file, path, part=part, room=room):
            self._verified[name] = _signature(path)  # hashed on its way

    @contextmanager
    def in_order(self, steps: Sequence[Sequence[str]]) -> Iterator[Callable[[], None]]:
        """Fetch the file that is needed next while the caller works; nothing is deleted."""
        with self.stoppable() as stop, reading_ahead(steps, self, stop) as ahead:
            self._ahead = ahead
            try:
                yield ahead.advance
            finally:
                self._ahead = None

    @contextmanager
    def stoppable(self) -> Iterator[Event]:
        """An event that stops the transfers that begin inside, and no later ones."""
        stop = Event()
        self.transfer = replace(self.transfer, stop=stop)
        try:
            yield stop
        finally:
            self.transfer = replace(self.transfer, stop=Event())

    def has_room(self, name: str) -> bool:
        """Always: the plan has counted all files."""
        return True

    def drop(self, name: str) -> None:
        """Nothing is deleted from the user's cache."""

    def to_fetch(self, steps: Sequence[Sequence[str]]) -> dict[Path, int]:
        """Bytes of what is not in the cache yet, by the folder that it will lie in."""
        names = {name for step in steps for name in step if self.cached(name) is None}
        files = [self.listed(name) for name in names]
        parts = [self._cache.part(file.digest) for file in files if file.digest]
        there = sum(part.stat().st_size for part in parts if part.exists())
        return {self.at.cache: sum(file.size for file in files) - there} if names else {}

    def listed(self, name: str) -> RemoteFile:
        """What the Hub says about a file.

        Raises:
            HubError: the commit has no such file.
        """
        if name not in self.listing:
            raise HubError(
                f"{self.label}/{printable(name)}: is not in commit {self.commit}; choose another "
                "revision with --revision"
            )
        return self.listing[name]

    @property
    def _cache(self) -> RepositoryCache:
        return RepositoryCache(self.at.cache, self.label)

    def _check_online(self, name: str) -> None:
        if self.offline:
            raise HubError(
                f"{self.label}/{printable(name)}: not in the cache {self.at.cache}, and the Hub "
                "cannot be asked now; run the same command again when it can"
            )

    def _fetch_head(self, name: str, size: int) -> bytes:
        first = self.transfer.read(name, 0, min(size, FIRST_BYTES))
        end = 8 + header_length(first[:8], size, f"{self.label}/{name}")
        rest = self.transfer.read(name, len(first), end) if end > len(first) else b""
        return (first + rest)[:end]

    def _download(self, name: str) -> Path:
        """Fetch a file into the ordinary cache."""
        self._check_online(name)
        file = self.listed(name)
        if file.digest is not None and len(file.digest) == SHA256_DIGITS:
            path = self._download_blob(name, file.digest)
        else:  # small, and kept by the client under a name that only the answer tells
            path = self._download_small(name)
        self._cache.remember(self.at.revision, self.commit)
        return path

    def _download_blob(self, name: str, digest: str) -> Path:
        blob, room = self._cache.blob(digest), "set HF_HOME to a folder on another one"
        if not blob.is_file():
            self._cache.remove_orphans(digest, self.report)
            self.download(name, blob, part=self._cache.part(digest), room=room)
        with stored(self.at.cache, f"{self.label}/{printable(name)}", room):
            return self._cache.link(name, self.commit, digest)

    def _download_small(self, name: str) -> Path:
        fetch = partial(
            hf_hub_download,
            self.label,
            name,
            revision=self.commit,
            endpoint=self.at.endpoint,
            cache_dir=self.at.cache,
            library_name="rilq",
            library_version=__version__,
        )
        return Path(self.transfer.ask(fetch, name))


def _signature(path: Path) -> tuple[int, ...]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_dev


def quiet_library() -> None:
    """Switch the client library's bars and log lines off, unless the user asked for them."""
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is not False:
        disable_progress_bars()
    if "HF_HUB_VERBOSITY" not in os.environ:
        set_verbosity(ERROR)
