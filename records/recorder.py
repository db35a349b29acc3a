"""Writes a run into the database while it lasts: its stages, memory, disk, and how it ended.

A record is never the reason for a failed run: what cannot be written is said once, and left out.
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from rilq.errors import InputError, Interrupted, RilqError, one_line
from rilq.evaluation.figures import Passages
from rilq.progress import Figure, Reporter, Reporters
from rilq.records.database import open_database
from rilq.records.run import Run, Sample, Stage, State

LOOK = 1.0  # seconds between two looks at memory and disk
SAVE = 10.0  # seconds between two writes
MAX_SAMPLES = 600  # when there are more, every second one goes


class Recorder:
    """A `Reporter` that keeps what it hears in a `Run`; see `recording`.

    Args:
        path: of the database; None keeps no record.
        run: what is known at the beginning.
        report: where other reporters hear the same, and this one's own warning.
        folder: on the volume whose free space counts.
    """

    def __init__(self, path: Path | None, run: Run, report: Reporter, folder: Path) -> None:
        self.report = Reporters(report, self)
        self._path, self._run, self._warn = path, run, report.warn
        self._folder = folder
        self._passages: Passages | None = None
        self._written = self._warned = False
        self._began = time.monotonic()
        self._spacing = LOOK
        self._stage: Stage | None = None
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="rilq-record", daemon=True)

    @property
    def run(self) -> Run:
        """What is known by now."""
        return self._run

    def tell(self, *, passages: Passages | None = None, **changes: Any) -> None:
        """Add to what is known of the run.

        Args:
            passages: figures of an evaluation, window by window.
            changes: of fields of `Run`.
        """
        with self._lock:
            self._run = replace(self._run, **changes)
            self._passages = passages or self._passages

    # -- a Reporter --------------------------------------------------------------------------------

    def stage(self, name: str, total: int | None = None, unit: str = "") -> None:
        """Close the stage before it; the first one puts the run into the database."""
        with self._lock:
            self._look()
            self._close_stage()
            host, device, free = _usage(self._folder)
            self._stage = Stage(name, self._now(), 0.0, host, device, free)
        if self._path is not None and not self._written and not self._warned:
            self._write()

    def step(self, done: int, **figures: Figure) -> None:
        """Nothing: a thread looks at memory and disk by the clock, not by steps."""

    def note(self, message: str) -> None:
        """Nothing: a record holds figures, and the message that a run ended with."""

    def warn(self, message: str) -> None:
        """Nothing, as of notes."""

    # -- the record --------------------------------------------------------------------------------

    def begin(self) -> None:
        """Look at the run regularly from now on; it is written when its first stage begins."""
        if self._path is None:
            return
        with self._lock:
            self._look()
        self._thread.start()

    def end(self, state: State, message: str = "") -> None:
        """Write how the run ended."""
        if self._path is None:
            return
        self._stop()
        with self._lock:
            self._look()
            self._close_stage()
        self.tell(state=state, message=message)
        self._write()
        if self._written:
            self.report.note(f"recorded as run {self._run.id} in {self._path}")

    def refused(self, message: str) -> None:
        """Write that the run failed for its input, unless no work had begun: then it is no run."""
        if self._written:
            self.end("failed", message)
        else:
            self._stop()

    def _stop(self) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        saved = time.monotonic()
        while not self._ended.wait(LOOK):
            with self._lock:
                self._look()
            if self._written and time.monotonic() - saved >= SAVE:
                self._write()
                saved = time.monotonic()

    def _write(self) -> None:
        assert self._path is not None, "nothing to write to"
        with self._lock:
            self._run = replace(self._run, seconds=self._now())
            run, passages = self._run, self._passages
            if self._stage is not None:  # of a run that is killed, the stage it was in is known
                run = replace(run, stages=(*run.stages, self._running_stage()))
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open_database(self._path) as database:
                if self._written:
                    database.save(run, passages)
                else:
                    self.tell(id=database.begin(run, passages))
                    self._written = True
        except (RilqError, OSError) as err:
            if not self._warned:
                self._warn(f"this run is not recorded: {err}")
                self._warned = True

    def _now(self) -> float:
        return time.monotonic() - self._began

    def _running_stage(self) -> Stage:
        assert self._stage is not None, "no stage"
        return replace(self._stage, seconds=self._now() - self._stage.started)

    def _close_stage(self) -> None:
        if self._stage is not None:
            stages = (*self._run.stages, self._running_stage())
            self._run, self._stage = replace(self._run, stages=stages), None

    def _look(self) -> None:
        """Measure now: for the stage that runs, and as one more sample if it is time for one."""
        host, device, free = _usage(self._folder)
        if self._stage is not None:
            self._stage = replace(
                self._stage,
                host_bytes=max(self._stage.host_bytes, host),
                device_bytes=_larger(self._stage.device_bytes, device),
                disk_free_bytes=min(self._stage.disk_free_bytes, free),
            )
        samples, now = self._run.samples, self._now()
        if samples and now - samples[-1].at < 0.9 * self._spacing:
            return
        samples = (*samples, Sample(now, host, device, free))
        if len(samples) > MAX_SAMPLES:
            samples, self._spacing = samples[::2], 2 * self._spacing
        self._run = replace(self._run, samples=samples)


@contextmanager
def recording(path: Path | None, run: Run, report: Reporter, folder: Path) -> Iterator[Recorder]:
    """Record what happens inside, however it ends; bad input before any work is no run.

    Args:
        path: of the database; None keeps no record.
        run: what is known at the beginning; state and times are found here.
        report: to be used inside through the recorder's own `report`.
        folder: on the volume whose free space counts; it need not exist yet.
    """
    recorder = Recorder(path, replace(run, started=time.time(), state="running"), report, folder)
    try:
        recorder.begin()
        yield recorder
    except (Interrupted, KeyboardInterrupt) as err:
        recorder.end("stopped", str(err))
        raise
    except InputError as err:
        recorder.refused(str(err))
        raise
    except BaseException as err:
        recorder.end("failed", str(err) if isinstance(err, RilqError) else one_line(err))
        raise
    recorder.end("done")


def _usage(folder: Path) -> tuple[int, int | None, int]:
    """Resident memory, memory held on a GPU, and free space on the volume of `folder`: bytes."""
    # A work folder is removed in the end, what it lies in is not.
    existing = next(path for path in folder.absolute().parents if path.exists())
    torch = sys.modules.get("torch")  # never imported for this
    device = None
    if torch is not None and torch.cuda.is_initialized():
        device = int(torch.cuda.memory_reserved())
    return psutil.Process().memory_info().rss, device, shutil.disk_usage(existing).free


def _larger(one: int | None, other: int | None) -> int | None:
    known = [value for value in (one, other) if value is not None]
    return max(known, default=None)
