"""Where the jobs of a batch run: what every such place can do, and how a job is started."""

from __future__ import annotations

import ctypes
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from rilq.batch.jobs import BatchJob
from rilq.batch.outlook import BatchPlan, Outlook

POLL = 0.2  # seconds between two looks at running jobs


class Run(Protocol):
    """A job that was given to an engine."""

    @property
    def place(self) -> str:
        """What it has, for people; empty where there is nothing to tell apart."""

    @property
    def begun(self) -> float | None:
        """`time.monotonic()` of its start; None while it waits for a place."""

    def poll(self) -> int | None:
        """Its exit code, or minus the signal that killed it, once it has ended."""

    def stop(self) -> None:
        """Ask it to keep its state and end."""

    def wait(self) -> int:
        """As `poll`, when it has ended."""


class Engine(Protocol):
    """A place for jobs."""

    def check(self, jobs: Sequence[BatchJob], plan: BatchPlan) -> None:
        """Refuse jobs that cannot run here, before the first one starts.

        Args:
            jobs: those of the plan.

        Raises:
            OptionError: which, and why.
        """

    def start(self, job: BatchJob, outlook: Outlook, log: Path) -> Run | None:
        """Start a job; None if there is no room for it now.

        Args:
            log: what it says is added here.
        """


def start_convert(
    arguments: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    *,
    folder: Path,
    inherited: tuple[int, ...] = (),
) -> subprocess.Popen[bytes]:
    """Start `rilq convert` in a process of its own, which SIGTERM reaches when its parent dies.

    Args:
        log: its own words are added to this file, after the command.
        environment: all that it sees, but for what keeps the files in `folder` from being imported.
        folder: that its relative paths are meant from.
        inherited: file descriptors that stay open in it.
    """
    with log.open("ab") as words:
        words.write(f"$ rilq convert {shlex.join(arguments)}\n".encode())
        words.flush()
        return subprocess.Popen(
            [sys.executable, "-m", "rilq", "convert", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=words,
            # The folder is the user's: no file in it may stand in for a module.
            env={**environment, "PYTHONSAFEPATH": "1"},
            cwd=folder,
            pass_fds=inherited,
            start_new_session=True,  # Ctrl-C is the batch's, which tells its jobs once
            preexec_fn=_end_with_parent(),
        )


def _end_with_parent() -> Callable[[], None] | None:
    """For a job to call first: SIGTERM when its parent is killed, however. Linux only."""
    try:
        prctl = ctypes.CDLL(None).prctl
    except (OSError, AttributeError):  # another C library has no such function
        return None

    def ask() -> None:
        prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG

    return ask
