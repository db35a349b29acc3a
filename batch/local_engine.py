"""Jobs on this machine: child processes, each with a GPU of its own."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rilq.batch.engine import start_convert
from rilq.batch.jobs import BatchJob
from rilq.batch.outlook import BatchPlan, Outlook, check_memory


@dataclass(frozen=True)
class LocalRun:
    """A child process; see `Run`.

    Attributes:
        device: GPU that it has; empty on the CPU.
    """

    process: subprocess.Popen[bytes]
    device: str
    begun: float

    @property
    def place(self) -> str:
        """Its GPU."""
        return f"GPU {self.device}" if self.device else ""

    def poll(self) -> int | None:
        """Its exit code once it has ended."""
        return self.process.poll()

    def stop(self) -> None:
        """Ask it to keep its state and end."""
        self.process.terminate()

    def wait(self) -> int:
        """Its exit code, when it has ended."""
        return self.process.wait()


class LocalEngine:
    """This machine; see `Engine`.

    Args:
        lock: file descriptor that jobs hold too, so that those of a killed batch count.
    """

    def __init__(self, lock: int | None) -> None:
        self._inherited = () if lock is None else (lock,)
        self._runs: list[LocalRun] = []

    def check(self, jobs: Sequence[BatchJob], plan: BatchPlan) -> None:
        """Refuse what does not fit into memory together."""
        check_memory(plan)

    def start(self, job: BatchJob, outlook: Outlook, log: Path) -> LocalRun | None:
        """Start a job; None if no GPU is free for it."""
        visible = visible_devices(outlook.devices, os.environ)
        taken = [run.device for run in self._runs if run.process.returncode is None]
        device = device_for(outlook.device, visible, taken)
        if device is None:
            return None
        process = start_convert(
            job.arguments,
            log,
            os.environ | _environment(outlook.device, device),
            folder=Path.cwd(),
            inherited=self._inherited,
        )
        self._runs.append(LocalRun(process, device, time.monotonic()))
        return self._runs[-1]


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
    return {"CUDA_VISIBLE_DEVICES": device} if device and wanted == "cuda" else {}
