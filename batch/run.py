"""Runs the jobs of a batch, each a `rilq convert` of its own, which nothing else can crash."""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rilq.batch.jobs import BatchJob
from rilq.batch.outlook import Outlook
from rilq.batch.state import BatchState
from rilq.errors import Interrupted, printable

POLL = 0.2  # seconds between two looks at the running jobs

State = Literal["waiting", "running", "done", "skipped", "failed", "stopped"]


@dataclass(frozen=True)
class Status:
    """Where a job stands.

    Attributes:
        state: "skipped": it was done before this run.
        device: GPU that it has; empty on the CPU.
        seconds: that it has run.
        exit_code: of its end in this run, or of the one that is skipped.
        detail: the last word of a running job, or why it failed.
    """

    job: BatchJob
    log: Path
    state: State = "waiting"
    device: str = ""
    seconds: float = 0.0
    exit_code: int | None = None
    detail: str = ""


@dataclass(frozen=True)
class _Running:
    job: BatchJob
    process: subprocess.Popen[bytes]
    device: str
    begun: float
    log: Path
    log_start: int  # size of the log before this run


Show = Callable[[Sequence[Status]], None]


def run_batch(
    jobs: Sequence[BatchJob],
    todo: Mapping[str, Outlook],
    state: BatchState,
    *,
    parallel: int,
    show: Show,
) -> list[Status]:
    """Run the jobs in `todo`, at most `parallel` at once and one to a GPU; the rest is skipped.

    Args:
        jobs: all that are shown, in order.
        todo: names of those to run, and what is known of them.
        show: called with the status of every job whenever something may have changed.

    Raises:
        Interrupted: stopped by a signal; running jobs were stopped too, and can be continued.
    """
    scheduler = _Scheduler(jobs, todo, state)
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
        self, jobs: Sequence[BatchJob], todo: Mapping[str, Outlook], state: BatchState
    ) -> None:
        self.outlooks, self.state = todo, state
        self.statuses = {job.name: Status(job, state.log(job)) for job in jobs}
        self.waiting = [job for job in jobs if job.name in todo]
        self.running: list[_Running] = []
        for name in self.statuses.keys() - todo.keys():
            self._now(name, state="skipped", exit_code=0)
        count = max((outlook.devices for outlook in todo.values()), default=0)
        self.visible = visible_devices(count, os.environ)

    def open(self, parallel: int) -> bool:
        """Start what can be started; whether anything is left to wait for."""
        for job in list(self.waiting):
            if len(self.running) >= parallel:
                break
            wanted = self.outlooks[job.name].device
            taken = [each.device for each in self.running]
            device = device_for(wanted, self.visible, taken)
            if device is not None:
                self.waiting.remove(job)
                self._start(job, wanted, device)
        return bool(self.waiting or self.running)

    def collect(self) -> None:
        """Record what has ended, and hear what the others say."""
        for each in list(self.running):
            code = each.process.poll()
            if code is None:
                seconds = time.monotonic() - each.begun
                self._now(each.job.name, seconds=seconds, detail=_last_line(each.log))
            else:
                self._end(each, code)

    def stop(self) -> None:
        """Ask every job to keep its state and end; wait until they have."""
        for each in self.running:
            each.process.terminate()
        for each in list(self.running):
            code = each.process.wait()
            # One that was still starting dies of the signal; it had nothing to keep.
            self._end(each, Interrupted.exit_code if code == -signal.SIGTERM else code)

    def _start(self, job: BatchJob, wanted: str, device: str) -> None:
        log = self.state.log(job)
        with log.open("ab") as words:
            begin = words.tell()
            words.write(f"$ rilq convert {shlex.join(job.arguments)}\n".encode())
            words.flush()
            process = subprocess.Popen(
                [sys.executable, "-m", "rilq", "convert", *job.arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=words,
                env=os.environ | _environment(wanted, device),
                pass_fds=() if self.state.lock is None else (self.state.lock,),
                start_new_session=True,  # Ctrl-C is the batch's, which tells its jobs once
                preexec_fn=_end_with_batch,
            )
        self.running.append(_Running(job, process, device, time.monotonic(), log, begin))
        self._now(job.name, state="running", device=device)

    def _end(self, each: _Running, code: int) -> None:
        self.running.remove(each)
        detail = _reason(each.log, each.log_start, code) if code else ""
        seconds = time.monotonic() - each.begun
        self.state.record(each.job, code, seconds, detail)
        state: State = "done"
        if code:
            state = "failed" if self.state.failed(each.job) else "stopped"
        self._now(each.job.name, state=state, seconds=seconds, exit_code=code, detail=detail)

    def _now(self, name: str, **changes: object) -> None:
        self.statuses[name] = replace(self.statuses[name], **changes)  # type: ignore[arg-type]


def visible_devices(count: int, environment: Mapping[str, str]) -> list[str]:
    """Names of the machine's GPUs, as `CUDA_VISIBLE_DEVICES` has them: numbers, or what is set."""
    given = [name.strip() for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    return (given if any(given) else [str(i) for i in range(count)])[:count]


def device_for(wanted: str, visible: Sequence[str], taken: Collection[str]) -> str | None:
    """The GPU that a job gets now: empty if it needs none of ours, None if it has to wait.

    Args:
        wanted: "cpu", "cuda", or "cuda:1", which means the second of `visible`.
    """
    kind, _, index = wanted.partition(":")
    candidates = visible[int(index) : int(index) + 1] if index else visible
    if kind != "cuda" or not candidates:
        return ""
    return next((device for device in candidates if device not in taken), None)


def _environment(wanted: str, device: str) -> dict[str, str]:
    """What a job is to see: its own GPU only; one that named its GPU counts as we do."""
    # The current folder is the user's: no file in it may stand in for a module.
    safe = {"PYTHONSAFEPATH": "1"}
    return {**safe, "CUDA_VISIBLE_DEVICES": device} if device and wanted == "cuda" else safe


def _end_with_batch() -> None:
    """For a job to call first: SIGTERM when the batch is killed, however. Linux only."""
    with suppress(OSError, AttributeError):  # another C library has no such function
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _last_line(log: Path) -> str:
    """The last line of a log, without its time."""
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1000))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return printable(lines[-1][9:] if lines[-1][2:3] == ":" else lines[-1]) if lines else ""


def _reason(log: Path, start: int, code: int) -> str:
    """Why a job ended, in one line: its own message, or the signal that killed it."""
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").splitlines()
    message = next((line for line in reversed(lines) if line.startswith("rilq: ")), "")
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return printable(message.removeprefix("rilq: ") or (lines[-1] if lines else ""), 200)
