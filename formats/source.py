"""Where a checkpoint's files come from: what any source offers, and the one that is a folder."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Protocol

from rilq.errors import CheckpointError, printable
from rilq.formats.shard import DAMAGED, read_head

CONFIG = "config.json"
JSON_CAP = 100_000_000  # bytes; the largest index published is about 10 MB


class Source(Protocol):
    """Where a checkpoint's files come from; a name is relative and has been listed by `files`."""

    @property
    def label(self) -> str:
        """What messages call the checkpoint."""

    @property
    def commit(self) -> str | None:
        """The pinned revision that fixes the content; None for a folder."""

    def files(self) -> dict[str, int]:
        """Name to size in bytes."""

    def path(self, name: str) -> Path:
        """The file on this machine, fetched first if need be."""

    def head(self, name: str) -> tuple[bytes, int]:
        """A safetensors file's first 8 + N bytes and its size, without fetching all of it."""

    def to_fetch(self, steps: Sequence[Sequence[str]]) -> dict[Path, int]:
        """The most bytes that using files step by step will still write, by folder."""

    def in_order(
        self, steps: Sequence[Sequence[str]]
    ) -> AbstractContextManager[Callable[[], None]]:
        """Say which files each of the next steps will ask `path` for, so that they are there.

        What the context gives is to be called after each step, when nothing of its files is open
        any more.
        """


@dataclass(frozen=True)
class LocalFolder:
    """The files at the top level of a folder; links to files elsewhere are followed."""

    folder: Path
    commit: None = None

    @property
    def label(self) -> str:
        """The folder as it was given."""
        return str(self.folder)

    def files(self) -> dict[str, int]:
        """Name to size in bytes of every regular file.

        Raises:
            CheckpointError: there is no such folder, or it cannot be listed.
        """
        try:
            return {f.name: f.stat().st_size for f in sorted(self.folder.iterdir()) if f.is_file()}
        except OSError as err:
            raise CheckpointError(
                f"{printable(self.label, 400)}: is not a folder that can be read: {err.strerror}\n"
                "  give a checkpoint's folder, or the name of a repository on the Hub"
            ) from err

    def path(self, name: str) -> Path:
        """`name` in the folder.

        Raises:
            CheckpointError: `name` is not a plain file name.
        """
        if name in ("", ".", "..") or "/" in name or leaves_folder(name):
            raise CheckpointError(
                f"{printable(self.label, 400)}: {printable(name)} points outside the checkpoint "
                "folder\n  put all files of a checkpoint into one folder"
            )
        return self.folder / name

    def head(self, name: str) -> tuple[bytes, int]:
        """A safetensors file's first 8 + N bytes, and its size."""
        return read_head(self.path(name), f"{self.label}/{name}")

    def to_fetch(self, steps: Sequence[Sequence[str]]) -> dict[Path, int]:
        """Nothing: everything is there."""
        return {}

    def in_order(
        self, steps: Sequence[Sequence[str]]
    ) -> AbstractContextManager[Callable[[], None]]:
        """Everything is there, and stays."""
        return nullcontext(lambda: None)


def label_of(source: Source) -> str:
    """What messages call the checkpoint, fit for a terminal."""
    return printable(source.label, 400)


def leaves_folder(name: str) -> bool:
    """Whether a relative name from outside could point out of its folder, on any system."""
    return (
        PurePosixPath(name).is_absolute()
        or bool(PureWindowsPath(name).anchor)
        or ".." in re.split(r"[/\\]", name)
        or not name.isprintable()
    )


def read_json(source: Source, files: Mapping[str, int], name: str) -> dict[str, Any] | None:
    """A JSON object, or None where there is no file `name`.

    Args:
        source: where the file is.
        files: what `source.files()` gave.
        name: of the file.

    Raises:
        CheckpointError: the file cannot be read, or is not a JSON object.
    """
    if name not in files:
        return None
    label = f"{label_of(source)}/{printable(name)}"
    if files[name] > JSON_CAP:
        raise CheckpointError(f"{label}: has {files[name]} bytes, over {JSON_CAP}\n  {DAMAGED}")
    try:
        table = json.loads(source.path(name).read_bytes().decode("utf-8"))
    except json.JSONDecodeError as err:
        raise CheckpointError(
            f"{label}: is not valid JSON at line {err.lineno}, column {err.colno}: {err.msg}\n"
            f"  {DAMAGED}"
        ) from err
    except (OSError, ValueError, RecursionError) as err:  # ValueError: UTF-8, or endless digits
        raise CheckpointError(f"{label}: cannot be read: {err}\n  {DAMAGED}") from err
    if not isinstance(table, dict):
        raise CheckpointError(
            f"{label}: is a JSON {type(table).__name__}, not an object\n  {DAMAGED}"
        )
    return table
