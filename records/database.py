"""The record of all runs: a local SQLite file that several programs may write at once.

A run writes a row when it begins, and again every few seconds. Each write is one short transaction,
so that a writer that is killed leaves the row as it last was; whoever opens the database next sees
that the writer is gone, and marks the run as failed: killed.

The rollback journal is used, and no write-ahead log: that one must not be shared by several hosts,
as the nodes of a cluster do, and cannot be read in a folder without write permission.
"""

from __future__ import annotations

import io
import json
import math
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rilq.errors import InputError
from rilq.evaluation.figures import Passages
from rilq.records.connection import connect, explained, immediate, writable
from rilq.records.liveness import mark_killed, writer
from rilq.records.run import LayerFigure, LossPoint, Run, Sample, Stage, State
from rilq.records.schema import migrate

_JSON = ("recipe", "options", "versions", "machine", "evaluation")
_COLUMNS = (
    "command", "started", "seconds", "state", "message", "model", "source_hash", "checkpoint",
    "place", "content_hash", "job", *_JSON,
)  # fmt: skip


class Database:
    """An open database; see `open_database` and `read_database`."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection, self.path = connection, path

    def begin(self, run: Run, passages: Passages | None = None) -> int:
        """Add a run of this process; returns its number, whatever `run.id` says."""
        names = (*_COLUMNS, "host", "pid", "process_started", "heartbeat")
        with self._transaction():
            cursor = self._connection.execute(
                f"INSERT INTO runs ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})",
                (*_row(run), *writer(), time.time()),
            )
            assert cursor.lastrowid is not None, "SQLite numbers what it inserts"
            self._write_parts(cursor.lastrowid, run, passages)
            return cursor.lastrowid

    def save(self, run: Run, passages: Passages | None = None) -> None:
        """Replace what is known of a run; a sign of life as well.

        Args:
            passages: None leaves what is there.

        Raises:
            InputError: there is no such run (any more).
        """
        names = (*_COLUMNS, "heartbeat")
        with self._transaction():
            cursor = self._connection.execute(
                f"UPDATE runs SET {', '.join(f'{name} = ?' for name in names)} WHERE id = ?",
                (*_row(run), time.time(), run.id),
            )
            if not cursor.rowcount:
                raise self._unknown(run.id)
            for table in ("figures", "stages", "samples", "losses", "layers"):
                self._connection.execute(f"DELETE FROM {table} WHERE run = ?", (run.id,))
            self._write_parts(run.id, run, passages)

    def runs(
        self,
        *,
        command: str | None = None,
        model: str | None = None,
        source_hash: str | None = None,
        content_hash: str | None = None,
        checkpoint: str | None = None,
        state: State | None = None,
        limit: int | None = None,
    ) -> list[Run]:
        """Runs that fit, the newest first, without stages, samples, losses and layers.

        Args:
            model, checkpoint: a name, or a shell pattern.
            limit: at most so many.
        """
        where, values = ["1"], []
        for name, value in (("command", command), ("source_hash", source_hash),
                            ("content_hash", content_hash), ("state", state)):  # fmt: skip
            if value is not None:
                where.append(f"{name} = ?")
                values.append(value)
        for name, value in (("model", model), ("checkpoint", checkpoint)):
            if value is not None:
                where.append(f"({name} = ? OR {name} GLOB ?)")
                values += [value, value]
        with self._reading():
            rows = self._connection.execute(
                f"SELECT * FROM runs WHERE {' AND '.join(where)} "
                "ORDER BY started DESC, id DESC LIMIT ?",
                (*values, -1 if limit is None else limit),
            ).fetchall()
            return [replace(_run(row), figures=self._figures(row["id"])) for row in rows]

    def run(self, number: int) -> Run:
        """All that is known of a run.

        Raises:
            InputError: there is no such run.
        """
        with self._reading():
            row = self._connection.execute("SELECT * FROM runs WHERE id = ?", (number,)).fetchone()
            if row is None:
                raise self._unknown(number)
            stages, samples, losses, layers = (
                self._rows(f"SELECT {columns} FROM {table} WHERE run = ? ORDER BY rowid", number)
                for table, columns in (
                    ("stages", "name, started, seconds, host_bytes, device_bytes, disk_free_bytes"),
                    ("samples", "at, host_bytes, device_bytes, disk_free_bytes"),
                    ("losses", "kind, term, step, value"),
                    ("layers", "number, error, bits"),
                )
            )
            return replace(
                _run(row),
                figures=self._figures(number),
                stages=tuple(Stage(*each) for each in stages),
                samples=tuple(Sample(*each) for each in samples),
                losses=tuple(
                    LossPoint(kind, term, step, _number(v)) for kind, term, step, v in losses
                ),
                layers=tuple(LayerFigure(i, _number(error), bits) for i, error, bits in layers),
            )

    def passages(self, number: int) -> Passages | None:
        """Figures of an evaluation window by window; None for a run that has none.

        Raises:
            InputError: there is no such run.
        """
        with self._reading():
            rows = self._rows("SELECT arrays FROM passages WHERE run = ?", number)
            if not rows:
                self.run(number)
                return None
        with np.load(io.BytesIO(rows[0][0]), allow_pickle=False) as arrays:
            found = dict(arrays)
        return Passages(**{**found, "tokens": int(found["tokens"])})

    # -- inside ------------------------------------------------------------------------------------

    def _write_parts(self, number: int, run: Run, passages: Passages | None) -> None:
        finite = ((n, float(v)) for n, v in run.figures.items() if math.isfinite(v))
        self._insert("figures", number, finite)
        self._insert("stages", number, (
            (s.name, s.started, s.seconds, s.host_bytes, s.device_bytes, s.disk_free_bytes)
            for s in run.stages
        ))  # fmt: skip
        self._insert("samples", number, (
            (s.at, s.host_bytes, s.device_bytes, s.disk_free_bytes) for s in run.samples
        ))  # fmt: skip
        self._insert("losses", number, ((p.kind, p.term, p.step, p.value) for p in run.losses))
        self._insert("layers", number, ((f.index, f.error, f.bits) for f in run.layers))
        if passages is not None:
            arrays = {name: value for name, value in vars(passages).items() if value is not None}
            packed = io.BytesIO()
            np.savez_compressed(packed, allow_pickle=False, **arrays)
            self._connection.execute(
                "INSERT OR REPLACE INTO passages VALUES (?, ?)", (number, packed.getvalue())
            )

    def _insert(self, table: str, number: int, rows: Iterable[tuple[Any, ...]]) -> None:
        given = [(number, *row) for row in rows]
        if given:
            marks = ", ".join("?" * len(given[0]))
            self._connection.executemany(f"INSERT INTO {table} VALUES ({marks})", given)

    def _figures(self, number: int) -> dict[str, float]:
        return dict(self._rows("SELECT name, value FROM figures WHERE run = ?", number))

    def _rows(self, query: str, number: int) -> list[Any]:
        return [tuple(row) for row in self._connection.execute(query, (number,))]

    def _unknown(self, number: int) -> InputError:
        newest = self._connection.execute("SELECT max(id) FROM runs").fetchone()[0]
        has = "it has none yet" if newest is None else f"the newest is {newest}"
        return InputError(f"run {number}: not in {self.path}: {has}\n  see `rilq runs`")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with explained(self.path), immediate(self._connection):
            yield

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """All that is read inside is of the same moment."""
        if self._connection.in_transaction:  # of a caller
            yield
            return
        with explained(self.path):
            self._connection.execute("BEGIN")
            try:
                yield
            finally:
                self._connection.execute("ROLLBACK")


@contextmanager
def open_database(path: Path) -> Iterator[Database]:
    """Open a database to write in it; it is made if there is none.

    Raises:
        InputError: the file is no database of rilq's, damaged, or of a newer rilq.
        OutputError: it cannot be written.
    """
    with explained(path):
        connection = connect(path, "rwc")
    with closing(connection):
        with explained(path):
            migrate(connection, path)
            mark_killed(connection)
        yield Database(connection, path)


@contextmanager
def read_database(path: Path) -> Iterator[Database]:
    """Open a database to read it; one that cannot be written, as it is.

    Raises:
        InputError: there is none, or it is as with `open_database`.
    """
    if not path.is_file():
        raise InputError(
            f"{path}: there is no such database of runs\n"
            "  pass --db with the file; `rilq convert` and `rilq eval` write rilq.db beside the "
            "checkpoint"
        )
    with explained(path):
        connection = connect(path, "rw") if writable(path) else _copy(path)
    with closing(connection):
        with explained(path):
            migrate(connection, path)
            mark_killed(connection)
            connection.execute("PRAGMA query_only = ON")
        yield Database(connection, path)


def _copy(path: Path) -> sqlite3.Connection:
    """A copy in memory, where what the file cannot be told any more can be written."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.row_factory = sqlite3.Row
    with closing(connect(path, "ro")) as source:
        source.backup(connection)
    return connection


def _row(run: Run) -> tuple[Any, ...]:
    values = {name: getattr(run, name) for name in _COLUMNS}
    for name in _JSON:
        if values[name] is not None:
            values[name] = json.dumps(values[name])
    return tuple(values.values())


def _run(row: sqlite3.Row) -> Run:
    values = {name: row[name] for name in ("id", *_COLUMNS)}
    for name in _JSON:
        if values[name] is not None:
            values[name] = json.loads(values[name])
    return Run(**values)


def _number(value: float | None) -> float:
    """A loss that was not finite; SQLite knows no NaN."""
    return math.nan if value is None else value
