"""Bytes of a pinned commit over plain HTTP: ranges of files, and whole files.

The client library fetches a file anew after its process was killed, gives up at a TCP reset, and
takes a flipped byte for good. Here a file grows in a part that stays, is continued by a range
request, and gets its name only when its digest is the one that the Hub states.
"""

import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from io import FileIO
from pathlib import Path
from threading import Event
from typing import Protocol, TypeVar
from urllib.parse import urljoin, urlsplit

from huggingface_hub import constants, get_session, hf_hub_url
from huggingface_hub.errors import FileMetadataError
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    build_hf_headers,
    hf_raise_for_status,
)

from rilq import __version__
from rilq.errors import HubError, OutputError, RilqError, Stopped, printable
from rilq.formats.durable import sync_folder
from rilq.formats.hub_cache import RemoteFile, add_to_hash
from rilq.formats.hub_requests import Address, Patience, explain, safe_cause, with_patience
from rilq.progress import Reporter

Result = TypeVar("Result")

REFETCHES = 3  # after a first copy that was damaged
REDIRECTS = 5
# An attempt that brings so many bytes, or this part of what is missing, was not in vain.
ADVANCE_BYTES, ADVANCE_PART = 1 << 20, 8


class Sink(Protocol):
    """Where bytes go, one after the other."""

    @property
    def begin(self) -> int:
        """Offset in the file of the next byte that is wanted."""

    @property
    def end(self) -> int:
        """Offset behind the last byte that is wanted."""

    def take(self, block: bytes) -> None:
        """The next bytes; never beyond `end`."""


@dataclass
class _Range:
    """A range in memory."""

    first: int
    end: int
    content: bytearray = field(default_factory=bytearray)

    @property
    def begin(self) -> int:
        return self.first + len(self.content)

    def take(self, block: bytes) -> None:
        self.content += block


@dataclass(frozen=True)
class Transfer:
    """How bytes of one commit are had.

    Attributes:
        at, commit: where.
        patience: how what fails is tried again.
        report: receives a note before each wait.
        stop: once it is set, every transfer ends with `Stopped`.
    """

    at: Address
    commit: str
    patience: Patience
    report: Reporter
    stop: Event = field(default_factory=Event)

    def ask(
        self, request: Callable[[], Result], name: str, advanced: Callable[[], bool] = lambda: False
    ) -> Result:
        """The result of a request about `name`, with patience.

        Raises:
            HubError: what is wrong, in one line.
        """
        what = f"{self.at.repo_id}/{name}"
        try:
            return with_patience(request, what, self.patience, self.report, advanced=advanced)
        except RilqError:
            raise
        except Exception as err:
            raise explain(err, self.at, name) from safe_cause(err)

    def read(self, name: str, begin: int, end: int) -> bytes:
        """Bytes `begin` to `end` (exclusive) of a file, and not many more over the network."""
        wanted = _Range(begin, end)
        self._fill(name, wanted)
        return bytes(wanted.content)

    def download(self, name: str, file: RemoteFile, path: Path, *, part: Path, room: str) -> bool:
        """Fetch a file to `path`, where it appears whole and with the digest that the Hub states.

        Another process that does the same is waited for; `False` if the file is that one's.

        Args:
            name: in the repository.
            file: its size and digest; without a digest, an earlier run's part is not used.
            path: its final place.
            part: in the same folder; keeps what has arrived if this is interrupted.
            room: what to do if the volume is full, for the message.

        Raises:
            HubError: the Hub refused, could not be reached, or sent a damaged file each time.
            OutputError: the volume is full or cannot be written.
        """
        label = f"{self.at.repo_id}/{printable(name)}"
        with stored(path.parent, label, room):
            path.parent.mkdir(parents=True, exist_ok=True)
        with _opened(part, self, label, room) as handle:
            if path.exists() and path.stat().st_size == file.size:  # another process was faster
                part.unlink()
                return False
            growing = _Part(handle, file, partial(stored, path.parent, label, room))
            _check_space(path.parent, label, file.size - growing.begin, room)
            for _ in range(1 + REFETCHES):
                self._fill(name, growing)
                if growing.whole():
                    break
                self.report.note(f"{label}: checksum does not match; fetching it again")
                growing.clear()
            else:
                part.unlink(missing_ok=True)
                raise HubError(
                    f"{label}: arrived damaged {1 + REFETCHES} times (its checksum is not the one "
                    "that the Hub states); check the network or the proxy, then run again"
                )
            with stored(path.parent, label, room):
                os.fsync(handle.fileno())
                os.replace(part, path)
                sync_folder(path.parent)
        return True

    def _fill(self, name: str, sink: Sink) -> None:
        """Ask until the sink has all of its bytes, each time from where the last attempt ended."""
        before = sink.begin

        def advanced() -> bool:
            nonlocal before
            gained, missing = sink.begin - before, sink.end - before
            before = sink.begin
            return gained > 0 and gained >= min(ADVANCE_BYTES, missing // ADVANCE_PART)

        def attempt() -> None:
            # Anew each time: the address that the Hub gives for its CDN is valid for an hour only.
            url = hf_hub_url(self.at.repo_id, name, revision=self.commit, endpoint=self.at.endpoint)
            for _ in range(REDIRECTS):
                hop = partial(self._hop, url, sink)
                # By itself, or a busy CDN and a busy Hub would use up one patience.
                location = self.ask(hop, name, advanced) if self._at_home(url) else hop()
                if location is None:
                    return
                url = urljoin(url, location)
            raise HubError(
                f"{self.at.repo_id}/{printable(name)}: {self.at.endpoint} redirects without end; "
                "check HF_ENDPOINT and the proxy settings"
            )

        try:
            while sink.begin < sink.end:
                self.ask(attempt, name, advanced)
        except HubError as err:
            if not isinstance(sink, _Part) or not sink.begin:
                raise
            raise HubError(f"{err} ({sink.begin} of {sink.end} bytes are kept)") from err

    def _at_home(self, url: str) -> bool:
        return urlsplit(url)[:2] == urlsplit(self.at.endpoint)[:2]

    def _hop(self, url: str, sink: Sink) -> str | None:
        """Take the bytes, or return the URL that the server points to instead."""
        if self.stop.is_set():
            raise Stopped("stopped")
        begin, end = sink.begin, sink.end
        headers = build_hf_headers(
            # None: the user's. Never to another origin (the CDN).
            token=None if self._at_home(url) else False,
            library_name="rilq",
            library_version=__version__,
        )
        headers["Accept-Encoding"] = "identity"  # a range of compressed bytes would be of no use
        if begin or isinstance(sink, _Range):
            headers["Range"] = f"bytes={begin}-{end - 1}"
        with get_session().stream(
            "GET",
            url,
            headers=headers,
            follow_redirects=False,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        ) as response:
            if response.has_redirect_location:
                return str(response.headers["Location"])
            hf_raise_for_status(response)
            if response.headers.get("Content-Type", "").startswith("text/html"):
                raise FileMetadataError("a page in the place of a file")
            position = _first_byte(response.status_code, response.headers.get("Content-Range", ""))
            if position > begin:
                raise OSError(f"byte {begin} was asked for, byte {position} came")
            for block in response.iter_bytes():
                if self.stop.is_set():
                    raise Stopped("stopped")
                wanted = block[max(0, begin - position) : end - position]
                position += len(block)
                if wanted:
                    sink.take(wanted)
                if position >= end:
                    break
        if sink.begin < end:
            raise OSError(f"{sink.begin - begin} of {end - begin} bytes arrived")
        return None


def _first_byte(status: int, content_range: str) -> int:
    """Where an answer begins in the file; at 0 if the range was ignored."""
    found = re.match(r"bytes (\d+)-", content_range) if status == 206 else None
    return int(found[1]) if found else 0


class _Part:
    """A file that grows, and its digest."""

    def __init__(
        self,
        handle: FileIO,
        file: RemoteFile,
        storing: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.handle, self.file, self.storing = handle, file, storing
        self.hasher, self.begin = file.hasher(), 0
        size = os.fstat(handle.fileno()).st_size
        if file.digest is None or size > file.size:
            self.clear()
        else:
            self.begin = add_to_hash(self.hasher, handle)

    @property
    def end(self) -> int:
        return self.file.size

    def take(self, block: bytes) -> None:
        left = memoryview(block)
        with self.storing():
            while left:
                left = left[self.handle.write(left) :]
        self.hasher.update(block)
        self.begin += len(block)

    def whole(self) -> bool:
        """Whether this is the file that the Hub states, as far as it states it."""
        return self.file.digest is None or self.hasher.hexdigest() == self.file.digest

    def clear(self) -> None:
        """Begin anew."""
        with self.storing():
            os.ftruncate(self.handle.fileno(), 0)
            self.handle.seek(0)
        self.hasher, self.begin = self.file.hasher(), 0


@contextmanager
def _opened(part: Path, transfer: Transfer, label: str, room: str) -> Iterator[FileIO]:
    """A part, made if need be and locked; the kernel frees it if this process is killed."""
    waiting = False
    while True:
        with stored(part.parent, label, room):
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
            # With the mode that the umask allows; asking for that is not for a thread.
            file = FileIO(os.open(part, flags, 0o666), "r+")
        with file:
            if _locked(file) and _is_at(file, part):
                yield file
                return
        if not waiting:
            transfer.report.note(f"{label}: another process is fetching it; waiting for it")
            waiting = True
        if transfer.stop.wait(0.2):
            raise Stopped("stopped")


def _locked(file: FileIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: two that fetch the same file fetch it twice
        return True
    return True


def _is_at(file: FileIO, path: Path) -> bool:
    """Whether an open file still has its name: who held it before may have finished it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def stored(folder: Path, label: str, room: str) -> Iterator[None]:
    """Say what cannot be stored where, and what to do."""
    try:
        yield
    except OSError as err:
        raise OutputError(
            f"{folder}: {label} cannot be stored: {err.strerror or err}; make room on this volume, "
            f"or {room}"
        ) from err


def _check_space(folder: Path, label: str, needed: int, room: str) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"{folder}: {label} needs {needed / 1e9:,.1f} GB, this volume has {free / 1e9:,.1f} GB "
            f"free; make room, or {room}"
        )
