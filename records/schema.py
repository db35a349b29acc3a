"""The tables of the database, step by step: docs/runs.md describes them."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from rilq.errors import InputError
from rilq.records.connection import immediate

# Says that a SQLite file is ours (PRAGMA application_id): "RILQ".
APPLICATION_ID = 0x52494C51

# The n-th script (from 0) leads from version n to version n + 1 (PRAGMA user_version). A script
# that has been released is never changed; what is new comes in one more.
MIGRATIONS = (
    """
    CREATE TABLE runs (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        command TEXT NOT NULL,
        started REAL NOT NULL,
        seconds REAL NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('running', 'done', 'failed', 'stopped')),
        message TEXT NOT NULL,
        model TEXT NOT NULL,
        source_hash TEXT,
        checkpoint TEXT NOT NULL,
        place TEXT NOT NULL,
        content_hash TEXT,
        job TEXT,
        recipe TEXT NOT NULL,
        options TEXT NOT NULL,
        versions TEXT NOT NULL,
        machine TEXT NOT NULL,
        evaluation TEXT,
        host TEXT NOT NULL,
        pid INTEGER NOT NULL,
        process_started REAL NOT NULL,
        heartbeat REAL NOT NULL
    );
    CREATE INDEX runs_by_model ON runs (source_hash);
    CREATE INDEX runs_by_content ON runs (content_hash);
    CREATE TABLE figures (
        run INTEGER NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
        name TEXT NOT NULL,
        value REAL NOT NULL,
        PRIMARY KEY (run, name)
    ) WITHOUT ROWID;
    CREATE TABLE stages (
        run INTEGER NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
        name TEXT NOT NULL,
        started REAL NOT NULL,
        seconds REAL NOT NULL,
        host_bytes INTEGER NOT NULL,
        device_bytes INTEGER,
        disk_free_bytes INTEGER NOT NULL
    );
    CREATE INDEX stages_of_run ON stages (run);
    CREATE TABLE samples (
        run INTEGER NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
        at REAL NOT NULL,
        host_bytes INTEGER NOT NULL,
        device_bytes INTEGER,
        disk_free_bytes INTEGER NOT NULL
    );
    CREATE INDEX samples_of_run ON samples (run);
    CREATE TABLE losses (
        run INTEGER NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
        kind TEXT NOT NULL,
        term TEXT NOT NULL,
        step INTEGER NOT NULL,
        value REAL
    );
    CREATE INDEX losses_of_run ON losses (run);
    CREATE TABLE layers (
        run INTEGER NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
        number INTEGER NOT NULL,
        error REAL,
        bits REAL
    );
    CREATE INDEX layers_of_run ON layers (run);
    CREATE TABLE passages (
        run INTEGER PRIMARY KEY REFERENCES runs (id) ON DELETE CASCADE,
        arrays BLOB NOT NULL
    );
    """,
)


def migrate(connection: sqlite3.Connection, path: Path) -> None:
    """Bring the tables to this version, from nothing if need be.

    Raises:
        InputError: they are another program's, or of a newer rilq.
    """
    if _version(connection, path) == len(MIGRATIONS):
        return
    with immediate(connection):
        # Again, for two that begin at once.
        for script in MIGRATIONS[_version(connection, path) :]:
            for statement in filter(str.strip, script.split(";")):
                connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")


def _version(connection: sqlite3.Connection, path: Path) -> int:
    owner, version, tables = (
        connection.execute(query).fetchone()[0]
        for query in (
            "PRAGMA application_id",
            "PRAGMA user_version",
            "SELECT count(*) FROM sqlite_master",
        )
    )
    if owner != APPLICATION_ID and (owner, version, tables) != (0, 0, 0):
        raise InputError(
            f"{path}: a SQLite database of another program\n"
            "  pass --db with another file, or --db none for no record"
        )
    if version > len(MIGRATIONS):
        raise InputError(
            f"{path}: written by a newer rilq (version {version} of the tables, this one "
            f"reads {len(MIGRATIONS)})\n  update rilq, or pass --db with another file"
        )
    return int(version)
