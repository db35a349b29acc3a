"""The one place that makes a file durable: whole under its final name, or not there at all."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from rilq.errors import OutputError


def current_umask() -> int:
    """The process's umask (POSIX can only read it by setting it)."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def sync_folder(folder: Path) -> None:
    """Make renames and deletions inside `folder` survive a power loss."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Write a file that appears under `path` only when it is complete and on the disk.

    The bytes go to a sibling with a random name (so that no planted symlink is followed), are
    synced, get the mode that the umask allows, and are renamed; then the folder is synced. If the
    block raises, the sibling is removed and an older `path` stays as it was.

    Raises:
        OutputError: the volume is full, read-only, or over a quota.
    """
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}.tmp")
    try:
        handle = os.open(
            temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o600
        )
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fchmod(file.fileno(), 0o666 & ~current_umask())
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    except OSError as err:
        raise OutputError(
            f"{path}: cannot be written: {err.strerror or err}\n"
            "  make room or choose another volume, then run the same command again"
        ) from err


def write_bytes(path: Path, content: bytes) -> None:
    """Durably write `content` to `path`; see `atomic_file`."""
    with atomic_file(path) as file:
        file.write(content)
