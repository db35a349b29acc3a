"""A folder of state: its lock, and a journal of checksummed lines that survives any kill.

Imports no torch: whoever only waits for conversions need not hold it in memory.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import xxhash

from rilq.errors import WorkDirError
from rilq.formats.durable import sync_folder


def make_folder(path: Path, option: str) -> None:
    """Make a folder of state, for its owner alone.

    Args:
        option: that names another folder, for the message.

    Raises:
        WorkDirError: it cannot be made, or not be written to.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as err:
        raise WorkDirError(
            f"{path}: the folder cannot be made: {err.strerror}\n"
            f"  pass {option} with a folder on a volume that can be written"
        ) from err
    if not os.access(path, os.W_OK | os.X_OK):
        raise WorkDirError(f"{path}: the folder cannot be written\n  pass another {option}")


@contextmanager
def hold_lock(path: Path, option: str) -> Iterator[int]:
    """Hold `rilq.lock` for as long as the run lasts; the kernel frees it if the run is killed.

    Args:
        path: the folder.
        option: that names another folder, for the message.

    Yields:
        The lock's file descriptor; a child that inherits it holds the lock too.

    Raises:
        WorkDirError: another run holds it.
    """
    lock = path / "rilq.lock"
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    with ExitStack() as stack:
        try:
            handle = os.open(lock, flags, 0o600)
            file = stack.enter_context(os.fdopen(handle, "r+b", buffering=0))
            _take_lock(file, lock, option)
        except OSError as err:
            raise WorkDirError(
                f"{lock}: cannot be used: {err.strerror}\n"
                f"  delete it if no run is using this folder, or pass another {option}"
            ) from err
        stack.callback(file.truncate, 0)
        yield handle


def free_lock(path: Path, gone: Collection[str] = ()) -> bool:
    """Whether a run could have the lock of a folder now.

    Args:
        gone: hosts that are known to be no more; a holder on one of them is forgotten.
    """
    try:
        handle = os.open(path / "rilq.lock", os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    except OSError:  # there is none, or the run itself will say what is wrong with it
        return True
    with os.fdopen(handle, "r+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        host = _host(_holder(file))
        if host in gone:
            file.truncate(0)
        return host in ("", socket.gethostname(), *gone)


def _take_lock(file: FileIO, lock: Path, option: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise WorkDirError(
            f"{lock.parent}: in use by {_holder(file) or 'another run'}\n"
            f"  wait for it, stop it, or pass another {option}"
        ) from None
    holder, host = _holder(file), socket.gethostname()
    # Some network file systems grant every flock, so a holder elsewhere may still be alive.
    if _host(holder) not in ("", host):
        raise WorkDirError(
            f"{lock.parent}: last held by {holder}\n"
            f"  if that run is over, delete {lock} and run again"
        )
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    file.truncate(0)
    file.seek(0)
    file.write(f"pid {os.getpid()} on host {host} since {since}\n".encode())


def _holder(file: FileIO) -> str:
    """Who wrote the lock file; nothing if that is not what `_take_lock` writes."""
    text = file.read(200).decode(errors="replace").strip()
    return text if re.fullmatch(r"pid \d+ on host \S+ since [\d: -]+", text) else ""


def _host(holder: str) -> str:
    return holder.split()[4] if holder else ""


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Add one checksummed line to the journal and sync it."""
    body = json.dumps(line, sort_keys=True)
    text = json.dumps({"line": body, "sum": xxhash.xxh3_128_hexdigest(body.encode())}) + "\n"
    journal = path / "journal.jsonl"
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
    try:
        with os.fdopen(os.open(journal, flags, 0o600), "ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        sync_folder(path)
    except OSError as err:
        raise WorkDirError(
            f"{journal}: cannot be written: {err.strerror}\n"
            "  make room on that volume, then run the same command again"
        ) from err


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int | None]:
    """Lines up to the first damaged one, and where the journal must be cut if there is one."""
    journal = path / "journal.jsonl"
    if not journal.is_file():
        return [], None
    lines: list[dict[str, Any]] = []
    good = 0
    raw = journal.read_bytes()
    for text in raw.splitlines(keepends=True):
        body = _checked(text)
        if body is None:
            break
        lines.append(body)
        good += len(text)
    return lines, good if good < len(raw) else None


def _checked(text: bytes) -> dict[str, Any] | None:
    try:
        outer = json.loads(text)
        body = outer["line"]
        if not text.endswith(b"\n") or outer["sum"] != xxhash.xxh3_128_hexdigest(body.encode()):
            return None
        return dict(json.loads(body))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
