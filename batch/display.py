"""The jobs of a batch for people: a table that lives on a terminal, or a line for each change."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from rilq.batch.outlook import BatchPlan
from rilq.batch.run import Status
from rilq.progress import duration, gigabytes

STYLES = {"done": "green", "running": "cyan", "failed": "red", "stopped": "yellow"}


def status_table(statuses: Sequence[Status]) -> Table:
    """One row for each job."""
    table = Table(box=SIMPLE_HEAD)
    places = any(status.place for status in statuses)
    for heading in ("job", "state", "time", *(["on"] if places else []), ""):
        table.add_column(heading, justify="right" if heading == "time" else "left")
    for status in statuses:
        ran = duration(status.seconds) if status.seconds else ""
        detail = status.detail
        if status.state == "failed":
            detail = f"exit {status.exit_code}: {detail}"
        elif status.state == "skipped":
            detail = "done before"
        table.add_row(
            Text(status.job.name),
            Text(status.state, STYLES.get(status.state, "")),
            ran,
            *([Text(status.place)] if places else []),
            Text(detail),
        )
    return table


def status_dict(status: Status) -> dict[str, Any]:
    """As JSON values."""
    return {
        "job": status.job.name,
        "state": status.state,
        "exit_code": status.exit_code,
        "seconds": round(status.seconds, 1),
        "output": str(status.job.options.output.absolute()),
        "log": str(status.log),
        "detail": status.detail,
    }


def plan_lines(plan: BatchPlan) -> list[str]:
    """What the jobs that are to run need together."""
    lines = [
        f"{name}: {outlook.progress}, about {duration(outlook.seconds)} on {outlook.device}"
        for name, outlook in plan.jobs.items()
    ]
    for volume in plan.volumes:
        lines.append(
            f"disk: at most {gigabytes(volume.needed)} of {gigabytes(volume.free)} free on "
            f"{volume.folder}"
        )
    lines.append(
        f"host memory: at most {gigabytes(plan.host_bytes)} of {gigabytes(plan.host_free)} free, "
        f"{plan.together} at once on one machine"
    )
    return [*lines, f"time: about {duration(plan.seconds)}, {len(plan.jobs)} to do"]


class LiveDisplay:
    """A table on a terminal, drawn anew at each look. No thread draws it, so jobs start safely."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> LiveDisplay:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, statuses: Sequence[Status]) -> None:
        """Draw the table."""
        self._live.update(status_table(statuses), refresh=True)


class LinesDisplay:
    """For pipes: a line when a job starts, and one when it ends.

    Args:
        stream: where the lines go.
        quiet: only those of jobs that fail.
    """

    def __init__(self, stream: TextIO, *, quiet: bool = False) -> None:
        self.stream, self.quiet = stream, quiet
        self._before: dict[str, str] = {}

    def show(self, statuses: Sequence[Status]) -> None:
        """Write what has changed."""
        for status in statuses:
            before = self._before.get(status.job.name, "waiting")
            self._before[status.job.name] = status.state
            if status.state != before and (status.state == "failed" or not self.quiet):
                print(f"{time.strftime('%H:%M:%S')} {_line(status)}", file=self.stream, flush=True)


def _line(status: Status) -> str:
    words = f"{status.job.name}: {status.state}"
    if status.state == "running":
        return words + (f" on {status.place}" if status.place else "")
    if status.state == "waiting":  # again: it has lost its place
        return f"{words}, {status.detail}"
    if status.state == "skipped":
        return words + ", done before"
    words += f" after {duration(status.seconds)}"
    if status.state == "failed":
        words += f", exit {status.exit_code}: {status.detail}"
    return words


def failure(status: Status) -> str:
    """Why a job failed, and where to read more."""
    return f"exit {status.exit_code}: {status.detail}\n  log: {status.log}"
