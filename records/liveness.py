"""Which process writes a run, and whether it still does."""

from __future__ import annotations

import os
import socket
import sqlite3
import time
from contextlib import suppress

import psutil

from rilq.records.connection import immediate

SILENCE = 300.0  # seconds without a sign of life after which a run on another host counts as killed
KILLED = "killed"


def writer() -> tuple[str, int, float]:
    """Host, number and start of this process."""
    process = psutil.Process()
    return _host(), process.pid, process.create_time()


def mark_killed(connection: sqlite3.Connection) -> None:
    """Say of runs whose process is gone that they were killed."""
    query = "SELECT id, host, pid, process_started, heartbeat FROM runs WHERE state = 'running'"
    gone = [row["id"] for row in connection.execute(query).fetchall() if _is_gone(row)]
    if gone:
        with immediate(connection):
            connection.executemany(
                "UPDATE runs SET state = 'failed', message = ? WHERE id = ? AND state = 'running'",
                [(KILLED, number) for number in gone],
            )


def _is_gone(row: sqlite3.Row) -> bool:
    """Whether the process that wrote a run is no more."""
    silent: bool = time.time() - row["heartbeat"] > SILENCE
    if row["host"] != _host():
        return silent
    try:
        # A number may be another process's by now; but a clock that was set also moves the start.
        moved: bool = abs(psutil.Process(row["pid"]).create_time() - row["process_started"]) > 1
    except psutil.NoSuchProcess:
        return True
    return silent and moved


def _host() -> str:
    """This host and, as containers may share its name, where its process numbers count."""
    space = ""
    with suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()} {space}".strip()
