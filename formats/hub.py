"""A checkpoint on the Hub: one pinned commit of which only the needed files are fetched."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from logging import ERROR
from pathlib import Path
from typing import TypeVar
from urllib.parse import urljoin, urlsplit

from huggingface_hub import constants, get_session, hf_hub_download, hf_hub_url
from huggingface_hub.errors import FileMetadataError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    build_hf_headers,
    disable_progress_bars,
    hf_raise_for_status,
    validate_repo_id,
)
from huggingface_hub.utils.logging import set_verbosity

from rilq import __version__
from rilq.errors import CheckpointError, HubError, OptionError, RilqError, printable
from rilq.formats.hub_cache import RemoteFile, RepositoryCache, missing_weights
from rilq.formats.hub_listing import check_weights, fetch_listing, some
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
from rilq.formats.shard import header_length, parse_header, read_head
from rilq.formats.source import CONFIG, LocalFolder, Source
from rilq.progress import Reporter, SilentReporter

Result = TypeVar("Result")

REFETCHES = 3  # after a first copy that was damaged
REDIRECTS = 5
FIRST_BYTES = 1 << 16  # of a shard: the headers of most fit, which saves a second request


def open_source(
    model: str,
    *,
    revision: str | None = None,
    report: Reporter = SilentReporter(),  # noqa: B008 - stateless
) -> Source:
    """The folder or the Hub repository that `model` means; an existing folder comes first.

    Args:
        model: a folder, or `owner/name` on the Hub.
        revision: branch, tag or commit hash on the Hub; "main" if None.
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
    return HubRepository.open(model, revision, report=report)


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
    _verified: dict[str, tuple[int, ...]] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def open(
        cls,
        repo_id: str,
        revision: str | None = None,
        *,
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
            return cls._open_cached(at, err, patience, report)
        check_weights(at, found.files)
        report.note(f"{repo_id}: revision {printable(at.revision)} is commit {found.commit}")
        return cls(at, found.commit, found.top_level(), False, patience, report)

    @classmethod
    def _open_cached(
        cls, at: Address, err: Exception, patience: Patience, report: Reporter
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
        if missing:
            raise HubError(
                f"{why}; the cache lacks {len(missing)} files of commit {folder.name}: "
                f"{some(missing)}"
            ) from err
        if not offline:  # that was asked for
            report.warn(str(why))
        report.note(f"{at.repo_id}: working from the cache, commit {folder.name}")
        return cls(at, folder.name, cache.listing(folder), True, patience, report)

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
        file = self._listed(name)
        shard = f"{self.label}/{name}"
        cached = self._cache.find(name, self.commit)
        if cached is not None and cached.stat().st_size == file.size:
            return read_head(cached, shard)
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
        file = self._listed(name)
        for _ in range(1 + REFETCHES):
            path = self._cache.find(name, self.commit) or self._download(name, file)
            if self._verify(name, path, file):
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

    def to_fetch(self, names: Iterable[str]) -> tuple[Path, int]:
        """The folder of the cache, and bytes of those of `names` that are not in it yet."""
        missing = [name for name in names if self._cache.find(name, self.commit) is None]
        return self.at.cache, sum(self._listed(name).size for name in missing)

    @property
    def _cache(self) -> RepositoryCache:
        return RepositoryCache(self.at.cache, self.label)

    def _listed(self, name: str) -> RemoteFile:
        if name not in self.listing:
            raise HubError(
                f"{self.label}/{printable(name)}: is not in commit {self.commit}; choose another "
                "revision with --revision"
            )
        return self.listing[name]

    def _ask(self, request: Callable[[], Result], name: str) -> Result:
        """The result of a request about `name`, with patience, or what is wrong in one line."""
        if self.offline:
            raise HubError(
                f"{self.label}/{printable(name)}: not in the cache {self.at.cache}, and the Hub "
                "cannot be asked now; run the same command again when it can"
            )
        try:
            return with_patience(request, f"{self.label}/{name}", self.patience, self.report)
        except RilqError:
            raise
        except Exception as err:
            raise explain(err, self.at, name) from safe_cause(err)

    def _fetch_head(self, name: str, size: int) -> bytes:
        first = self._fetch_range(name, 0, min(size, FIRST_BYTES))
        end = 8 + header_length(first[:8], size, f"{self.label}/{name}")
        rest = self._fetch_range(name, len(first), end) if end > len(first) else b""
        return (first + rest)[:end]

    def _fetch_range(self, name: str, begin: int, end: int) -> bytes:
        """Bytes `begin` to `end` (exclusive) of a file, and not many more over the network.

        Each hop of a redirect is tried again by itself, or a busy CDN behind a ready Hub would use
        up the patience of both.
        """
        if begin == end:
            return b""
        url = hf_hub_url(self.label, name, revision=self.commit, endpoint=self.at.endpoint)
        for _ in range(REDIRECTS):
            found = self._ask(partial(self._get_range, url, begin, end), name)
            if isinstance(found, bytes):
                return found
            url = urljoin(url, found)
        raise HubError(
            f"{self.label}/{printable(name)}: {self.at.endpoint} redirects without end; check "
            "HF_ENDPOINT and the proxy settings"
        )

    def _get_range(self, url: str, begin: int, end: int) -> bytes | str:
        """The bytes, or the URL that the server points to instead."""
        at_home = urlsplit(url)[:2] == urlsplit(self.at.endpoint)[:2]
        headers = build_hf_headers(
            token=None if at_home else False,  # None: the user's. Never to another origin (the CDN)
            library_name="rilq",
            library_version=__version__,
        )
        # Identity: a range of compressed bytes would be of no use.
        headers |= {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        content = bytearray()
        with get_session().stream(
            "GET", url, headers=headers, follow_redirects=False, timeout=timeout
        ) as response:
            if response.has_redirect_location:
                return str(response.headers["Location"])
            hf_raise_for_status(response)
            skip = 0 if response.status_code == 206 else begin  # 200: the range was ignored
            for block in response.iter_bytes():
                content += block
                if len(content) >= skip + end - begin:
                    break
        if len(content) < skip + end - begin:
            raise ConnectionError(f"{len(content)} of {end - begin} bytes")
        return bytes(content[skip : skip + end - begin])

    def _download(self, name: str, file: RemoteFile) -> Path:
        """Fetch a file into the ordinary cache."""
        if not self.offline:
            self._cache.check_space(name, file.size)
            if file.digest:
                self._cache.remove_orphans(file.digest, self.report)
            self.report.note(f"{self.label}/{name}: downloading {file.size / 1e6:,.1f} MB")
        path = self._ask(
            lambda: hf_hub_download(
                self.label,
                name,
                revision=self.commit,
                endpoint=self.at.endpoint,
                cache_dir=self.at.cache,
                library_name="rilq",
                library_version=__version__,
            ),
            name,
        )
        self._cache.remember(self.at.revision, self.commit)
        return Path(path)

    def _verify(self, name: str, path: Path, file: RemoteFile) -> bool:
        stat = path.stat()
        seen = (stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_dev)
        if self._verified.get(name) == seen:
            return True
        if not file.matches(path):
            return False
        self._verified[name] = seen
        return True


def quiet_library() -> None:
    """Switch the client library's bars and log lines off, unless the user asked for them."""
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is not False:
        disable_progress_bars()
    if "HF_HUB_VERBOSITY" not in os.environ:
        set_verbosity(ERROR)
