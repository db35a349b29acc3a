"""How the database's file is opened, and what its errors mean."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rilq.errors import InputError, OutputError, printable

BUSY = 30.0  # seconds that a transaction waits for those of others


def connect(path: Path, mode: str) -> sqlite3.Connection:
    """A connection without transactions of its own making.

    Args:
        mode: of SQLite's: "ro", "rw", or "rwc", which makes a file that is not there.
    """
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}", uri=True, timeout=BUSY, isolation_level=None
    )
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


def writable(path: Path) -> bool:
    """Whether SQLite could change a database: it puts a journal beside it."""
    return os.access(path, os.W_OK) and os.access(path.absolute().parent, os.W_OK)


@contextmanager
def immediate(connection: sqlite3.Connection) -> Iterator[None]:
    """A transaction that has the right to write from its start, so that it cannot be refused."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        if connection.in_transaction:  # some errors have ended it already
            connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


# What SQLite says, and what to do about it.
_REMEDIES = (
    (
        "not a database",
        InputError,
        "it is no database of runs; pass --db with another file, or --db none for no record",
    ),
    (
        "malformed",
        InputError,
        "the file is damaged; move it away, or save what can be read with "
        "`sqlite3 FILE .recover | sqlite3 NEW`",
    ),
    ("locked", OutputError, f"another program has held it for {BUSY:.0f} s; end that, or wait"),
    (
        "locking protocol",
        OutputError,
        "this file system has no locks; pass --db with a file on a local one",
    ),
    (
        "disk I/O error",
        OutputError,
        "if this is a network file system without locks, pass --db with a file on a local one",
    ),
    ("full", OutputError, "make room on that volume"),
)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into one screen.

    Raises:
        InputError: the file is no database.
        OutputError: it cannot be written, or locked.
    """
    try:
        yield
    except sqlite3.Error as err:
        kind, remedy = next(
            ((kind, remedy) for words, kind, remedy in _REMEDIES if words in str(err)),
            (OutputError, "pass --db with a file in a folder that you may write to"),
        )
        raise kind(f"{path}: {printable(str(err))}\n  {remedy}") from err
