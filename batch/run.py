"""Runs the jobs of a batch, each a `rilq convert` of its own, which nothing else can crash."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rilq.batch.engine import POLL, Engine, Run
from rilq.batch.jobs import BatchJob
from rilq.batch.outlook import Outlook
from rilq.batch.state import BatchState
from rilq.errors import Interrupted, printable

State = Literal["waiting", "running", "done", "skipped", "failed", "stopped"]


@dataclass(frozen=True)
class Status:
    """Where a job stands.

    Attributes:
        state: "skipped": it was done before this run.
        place: what it has, such as "GPU 0"; empty where there is nothing to tell apart.
        seconds: that it has run.
        exit_code: of its end in this run, or of the one that is skipped.
        detail: the last word of a running job, or why it failed.
    """

    job: BatchJob
    log: Path
    state: State = "waiting"
    place: str = ""
    seconds: float = 0.0
    exit_code: int | None = None
    detail: str = ""


@dataclass(frozen=True)
class _Running:
    job: BatchJob
    run: Run
    log: Path
    log_start: int  # size of the log before this run


Show = Callable[[Sequence[Status]], None]


def run_batch(
    jobs: Sequence[BatchJob],
    todo: Mapping[str, Outlook],
    state: BatchState,
    engine: Engine,
    *,
    parallel: int,
    show: Show,
) -> list[Status]:
    """Run the jobs in `todo`, at most `parallel` at once, where there is room; the rest is skipped.

    Args:
        jobs: all that are shown, in order.
        todo: names of those to run, and what is known of them.
        show: called with the status of every job whenever something may have changed.

    Raises:
        Interrupted: stopped by a signal; running jobs were stopped too, and can be continued.
    """
    scheduler = _Scheduler(jobs, todo, state, engine)
    try:
        while scheduler.open(parallel):
            show(list(scheduler.statuses.values()))
            time.sleep(POLL)
            scheduler.collect()
    except BaseException:
        scheduler.stop()
        raise
    finally:
        show(list(scheduler.statuses.values()))
    return list(scheduler.statuses.values())


class _Scheduler:
    """Jobs that wait, jobs that run, and what became of the others."""

    def __init__(
        self,
        jobs: Sequence[BatchJob],
        todo: Mapping[str, Outlook],
        state: BatchState,
        engine: Engine,
    ) -> None:
        self.outlooks, self.state, self.engine = todo, state, engine
        self.statuses = {job.name: Status(job, state.log(job)) for job in jobs}
        self.waiting = [job for job in jobs if job.name in todo]
        self.running: list[_Running] = []
        for name in self.statuses.keys() - todo.keys():
            self._now(name, state="skipped", exit_code=0)

    def open(self, parallel: int) -> bool:
        """Start what can be started; whether anything is left to wait for."""
        for job in list(self.waiting):
            if len(self.running) >= parallel:
                break
            log = self.state.log(job)
            log_start = log.stat().st_size if log.exists() else 0
            run = self.engine.start(job, self.outlooks[job.name], log)
            if run is not None:
                self.waiting.remove(job)
                self.running.append(_Running(job, run, log, log_start))
                self._look_at(self.running[-1])
        return bool(self.waiting or self.running)

    def collect(self) -> None:
        """Record what has ended, and hear what the others say."""
        for each in list(self.running):
            code = each.run.poll()
            if code is None:
                self._look_at(each)
            else:
                self._end(each, code)

    def stop(self) -> None:
        """Ask every job to keep its state and end; wait until they have."""
        for each in self.running:
            each.run.stop()
        for each in list(self.running):
            code = each.run.wait()
            # One that was still starting dies of the signal; it had nothing to keep.
            self._end(each, Interrupted.exit_code if code == -signal.SIGTERM else code)

    def _look_at(self, each: _Running) -> None:
        begun = each.run.begun
        self._now(
            each.job.name,
            state="waiting" if begun is None else "running",
            place=each.run.place,
            seconds=_since(begun),
            detail=_last_line(each.log, each.log_start),
        )

    def _end(self, each: _Running, code: int) -> None:
        self.running.remove(each)
        detail = _reason(each.log, each.log_start, code) if code else ""
        seconds = _since(each.run.begun)
        self.state.record(each.job, code, seconds, detail)
        state: State = "done"
        if code:
            state = "failed" if self.state.failed(each.job) else "stopped"
        self._now(each.job.name, state=state, seconds=seconds, exit_code=code, detail=detail)

    def _now(self, name: str, **changes: object) -> None:
        self.statuses[name] = replace(self.statuses[name], **changes)  # type: ignore[arg-type]


def _since(begun: float | None) -> float:
    return 0.0 if begun is None else time.monotonic() - begun


def _last_line(log: Path, start: int) -> str:
    """The last line that this run has added to a log, without its time."""
    lines = _read(log, max(start, log.stat().st_size - 1000) if log.exists() else 0)
    last = lines[-1] if lines else ""
    return printable(last[9:] if last[2:3] == ":" else last.removeprefix("rilq: "))


def _reason(log: Path, start: int, code: int) -> str:
    """Why a job ended, in one line: its own message, or the signal that killed it."""
    lines = _read(log, start)
    message = next((line for line in reversed(lines) if line.startswith("rilq: ")), "")
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return printable(message.removeprefix("rilq: ") or (lines[-1] if lines else ""), 200)


def _read(log: Path, start: int) -> list[str]:
    """Lines of a log from a byte on; none, if the job was never begun."""
    if not log.exists():
        return []
    with log.open("rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace").strip().splitlines()
