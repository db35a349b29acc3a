"""What a batch remembers between runs: how each job ended, and its log.

jobs.rilq-batch/
    rilq.lock        held by the batch and by its jobs, so that those of a killed batch count too
    journal.jsonl    a checksummed line each time that a job ends; append-only
    logs/NAME.log    what `rilq convert` said, run after run
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rilq.batch.jobs import BatchJob
from rilq.converter.journal import append_line, hold_lock, make_folder, read_lines
from rilq.errors import Interrupted


@dataclass(frozen=True)
class Ended:
    """How a job ended.

    Attributes:
        key: of its arguments then.
        exit_code: of `rilq convert`; minus the signal that killed it.
        seconds: that it ran.
        detail: the reason, if it failed.
    """

    key: str
    exit_code: int
    seconds: float
    detail: str

    @property
    def failed(self) -> bool:
        """Neither finished nor stopped."""
        return self.exit_code not in (0, Interrupted.exit_code)


class BatchState:
    """The memory of a batch; see `open_state`.

    Attributes:
        path: its folder.
        ended: how each job ended last, by name.
        lock: file descriptor of the held lock; None if it is only looked at.
    """

    def __init__(self, path: Path, lines: list[dict[str, Any]], lock: int | None) -> None:
        self.path, self.lock = path, lock
        self.ended = {
            line["job"]: Ended(line["key"], line["exit_code"], line["seconds"], line["detail"])
            for line in lines
        }

    def succeeded(self, job: BatchJob) -> bool:
        """Whether the job, with these very arguments, ended well last time."""
        last = self.ended.get(job.name)
        return last is not None and last.exit_code == 0 and last.key == job.key

    def failed(self, job: BatchJob) -> bool:
        """Whether the job of this name failed last time; its arguments may have changed."""
        last = self.ended.get(job.name)
        return last is not None and last.failed

    def record(self, job: BatchJob, exit_code: int, seconds: float, detail: str) -> None:
        """Say durably how a job ended."""
        ended = Ended(job.key, exit_code, round(seconds, 1), detail)
        append_line(self.path, {"job": job.name, **vars(ended)})
        self.ended[job.name] = ended

    def log(self, job: BatchJob) -> Path:
        """Where a job's words go."""
        return self.path / "logs" / f"{job.name}.log"


def state_folder(file: Path) -> Path:
    """Where the state of a batch file is, unless another place is given."""
    return file.with_name(file.stem + ".rilq-batch")


def look_at_state(path: Path) -> BatchState:
    """The state as it is now, without a lock; empty if there is none."""
    return BatchState(path, read_lines(path)[0], None)


@contextmanager
def open_state(path: Path) -> Iterator[BatchState]:
    """Make or lock the state of a batch.

    Raises:
        WorkDirError: another run, or a job that it left behind, is at work; or it cannot be made.
    """
    make_folder(path, "--state-dir")
    make_folder(path / "logs", "--state-dir")
    with hold_lock(path, "--state-dir") as lock:
        lines, good = read_lines(path)
        if good is not None:  # a line torn by a kill: that job is looked at again
            os.truncate(path / "journal.jsonl", good)
        yield BatchState(path, lines, lock)
