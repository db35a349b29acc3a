"""What long work tells the world: the `Reporter` that library code is given, in three forms."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

Figure = float | int | str


class Reporter(Protocol):
    """Receives progress; library code never prints."""

    def stage(self, name: str, total: int | None = None, unit: str = "") -> None:
        """A new stage begins: `total` steps of one `unit` (for example "layer")."""

    def step(self, done: int, **figures: Figure) -> None:
        """`done` of the stage's steps are finished; `figures` (loss, error) go beside the bar."""

    def note(self, message: str) -> None:
        """One line worth keeping."""

    def warn(self, message: str) -> None:
        """One line that the user should act on."""


class SilentReporter:
    """Reports nothing; the default of library functions."""

    def stage(self, name: str, total: int | None = None, unit: str = "") -> None:
        """Ignored."""

    def step(self, done: int, **figures: Figure) -> None:
        """Ignored."""

    def note(self, message: str) -> None:
        """Ignored."""

    def warn(self, message: str) -> None:
        """Ignored; what went wrong is raised, and so is not lost."""


class LogReporter:
    """Plain lines, for pipes and log files: at most one per `interval` seconds and stage step.

    Args:
        stream: where the lines go.
        folder: on the volume whose free space is shown.
        quiet: leave out everything but warnings.
    """

    def __init__(
        self,
        stream: TextIO,
        *,
        folder: Path = Path(),
        quiet: bool = False,
        interval: float = 5.0,
    ) -> None:
        self.stream, self.folder = stream, folder
        self.quiet, self.interval = quiet, interval
        self._name, self._total, self._unit = "", 0, ""
        self._begun = self._last = 0.0
        self._first: int | None = None

    def stage(self, name: str, total: int | None = None, unit: str = "") -> None:
        """One line, unless `quiet`; what is left of the stage is estimated from now on."""
        self._name, self._total, self._unit = name, total or 0, unit
        self._begun, self._last, self._first = time.monotonic(), 0.0, None
        if not self.quiet:
            self._line(f"{name}: {total} {unit}s" if total else name)

    def step(self, done: int, **figures: Figure) -> None:
        """A line, unless `quiet`: for the last step, and if the one before is `interval` s old."""
        now = time.monotonic()
        if self._first is None:
            # What a resumed run finds done took no time; the estimate starts after it.
            self._first, self._begun = done, now if done else self._begun
        if self.quiet or (done < self._total and now - self._last < self.interval):
            return
        self._last = now
        new = done - self._first
        left = (now - self._begun) / new * (self._total - done) if new else None
        shown = "".join(f", {name} {value}" for name, value in figures.items())
        self._line(
            f"{self._name}: {self._unit} {done}/{self._total}{shown}, "
            + (f"about {left:.0f} s left, " if left is not None and done < self._total else "")
            + usage(self.folder)
        )

    def note(self, message: str) -> None:
        """One line, unless `quiet`."""
        if not self.quiet:
            self._line(message)

    def warn(self, message: str) -> None:
        """One line that begins with "warning: ", in any case."""
        self._line(f"warning: {message}")

    def _line(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {text}", file=self.stream, flush=True)


class RichReporter:
    """A live display for terminals: stage, bar, figures, ETA, memory and disk.

    Args:
        console: the terminal.
        folder: on the volume whose free space is shown.
    """

    def __init__(self, console: Console, folder: Path = Path()) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self.console, self.folder = console, folder
        self._progress: Progress = RichProgress(
            TextColumn("{task.description:>9}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[usage]}"),
            console=console,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> RichReporter:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def stage(self, name: str, total: int | None = None, unit: str = "") -> None:
        """A new bar below those of the stages before it."""
        self._task = self._progress.add_task(
            name, total=total, figures="", usage=usage(self.folder)
        )

    def step(self, done: int, **figures: Figure) -> None:
        """Move the last bar, and measure memory and disk; nothing before the first stage."""
        if self._task is None:
            return
        shown = "  ".join(f"{name} {value}" for name, value in figures.items())
        self._progress.update(self._task, completed=done, figures=shown, usage=usage(self.folder))

    def note(self, message: str) -> None:
        """One line above the bars, as it is written: no markup of rich's is looked for."""
        self._progress.console.print(message, highlight=False, markup=False)

    def warn(self, message: str) -> None:
        """The same in yellow."""
        self._progress.console.print(f"warning: {message}", style="yellow", markup=False)


class Reporters:
    """Tells several reporters the same."""

    def __init__(self, *reporters: Reporter) -> None:
        self.reporters = reporters

    def stage(self, name: str, total: int | None = None, unit: str = "") -> None:
        """To each, in the order given."""
        for reporter in self.reporters:
            reporter.stage(name, total, unit)

    def step(self, done: int, **figures: Figure) -> None:
        """To each, in the order given."""
        for reporter in self.reporters:
            reporter.step(done, **figures)

    def note(self, message: str) -> None:
        """To each, in the order given."""
        for reporter in self.reporters:
            reporter.note(message)

    def warn(self, message: str) -> None:
        """To each, in the order given."""
        for reporter in self.reporters:
            reporter.warn(message)


def gigabytes(count: float) -> str:
    """Bytes for people, in powers of ten: `1.4 MB`, `22 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def duration(seconds: float) -> str:
    """Seconds for people: `95 s`, `12 min`, `5.5 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def usage(folder: Path) -> str:
    """Resident memory of this process, memory it holds on a GPU, and free space, for people.

    Args:
        folder: on the volume that is meant; it need not exist yet.
    """
    import psutil

    place = folder.absolute()
    existing = next(path for path in (place, *place.parents) if path.exists())
    resident = psutil.Process().memory_info().rss
    shown = f"{resident / 1e9:.2f} GB used, "
    torch = sys.modules.get("torch")  # never imported for this
    if torch is not None and torch.cuda.is_initialized():
        shown += f"{torch.cuda.memory_reserved() / 1e9:.1f} GB on the GPU, "
    return shown + f"{shutil.disk_usage(existing).free / 1e9:.0f} GB disk free"
