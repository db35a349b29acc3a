"""Files fetched by a thread just ahead of their use, and given up when they are used up."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Condition, Event, Thread
from typing import Protocol

from rilq.errors import Stopped

AHEAD = 1  # files beyond those of the current step: while one is used, the next one comes
PATIENCE = 0.5  # seconds that the end waits for the thread; its part of a file stays for later


class Shelf(Protocol):
    """Where files are put; called by one thread at a time."""

    def fetch(self, name: str) -> Path:
        """Get a file that is not there yet; verify it in any case."""

    def has_room(self, name: str) -> bool:
        """Whether the file can be put beside those that are there."""

    def drop(self, name: str) -> None:
        """The file is not needed, now or any more."""


class ReadAhead:
    """The files of a sequence of steps; made by `reading_ahead`.

    A file that a step needs is fetched at once, if there is no room in the place of the one whose
    next use is farthest. One that a later step needs is fetched ahead only if there is room, and
    what goes wrong then is tried again when the file is needed.
    """

    def __init__(self, steps: Sequence[Sequence[str]], shelf: Shelf, stop: Event) -> None:
        self._steps = [list(step) for step in steps]
        self._at = 0
        self._shelf, self._stop = shelf, stop
        self._ready: set[str] = set()
        self._failed: dict[str, BaseException] = {}
        self._changed = Condition()
        # A daemon: a stalled connection must not keep a process that was told to end.
        self._thread = Thread(target=self._work, name="rilq-read-ahead", daemon=True)

    def start(self) -> None:
        """Begin with the first step's files."""
        self._thread.start()

    def wait_for(self, name: str) -> None:
        """Return when the file is there; it stays until the step that needs it is done.

        A file of a later step comes when there is room for it, at the latest when that step is the
        current one; what goes wrong until then is tried again.

        Raises:
            Stopped: the end came first.
            Exception: what fetching it raised.
        """
        with self._changed:
            if not any(name in step for step in self._steps[self._at :]):
                # A step that needs more than was said.
                self._steps[self._at : self._at + 1] = [[*self._now(), name]]
            if name in self._now():
                self._failed.pop(name, None)  # of an attempt ahead of time; now it counts
            self._changed.notify_all()
            while name not in self._ready:
                if self._stop.is_set():
                    raise Stopped("stopped")
                if name in self._failed and name in self._now():
                    raise self._failed.pop(name)
                self._changed.wait()

    def advance(self) -> None:
        """The current step is done and has none of its files open; drop those of no more use."""
        with self._changed:
            self._at += 1
            self._failed.clear()
            needed = {name for step in self._steps[self._at :] for name in step}
            for name in sorted(self._ready - needed):
                self._drop(name)
            self._changed.notify_all()

    def close(self) -> None:
        """End the thread; what it is fetching stays as a part."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        self._thread.join(PATIENCE)

    def _now(self) -> list[str]:
        return self._steps[self._at] if self._at < len(self._steps) else []

    def _drop(self, name: str) -> None:
        self._shelf.drop(name)
        self._ready.discard(name)

    def _work(self) -> None:
        while (name := self._wait_for_work()) is not None:
            error: BaseException | None = None
            try:
                self._shelf.fetch(name)
            except Stopped:
                return
            except BaseException as err:  # whatever it is, the caller's thread must learn of it
                error = err
            with self._changed:
                if error is None:
                    self._ready.add(name)
                else:
                    self._failed[name] = error
                self._changed.notify_all()

    def _wait_for_work(self) -> str | None:
        with self._changed:
            while not self._stop.is_set():
                if (name := self._next()) is not None:
                    return name
                self._changed.wait()
            return None

    def _next(self) -> str | None:
        """What to fetch now: what the current step needs first, then what comes next."""
        now = self._now()
        order = list(dict.fromkeys(name for step in self._steps[self._at :] for name in step))
        for name in order[: len(set(now)) + AHEAD]:
            if name in self._ready or name in self._failed:
                continue
            if name in now:
                later = [n for n in reversed(order) if n in self._ready and n not in now]
                while later and not self._shelf.has_room(name):
                    self._drop(later.pop(0))
                return name
            return name if self._shelf.has_room(name) else None
        return None


@contextmanager
def reading_ahead(steps: Sequence[Sequence[str]], shelf: Shelf, stop: Event) -> Iterator[ReadAhead]:
    """Fetch the files of `steps` while the caller works, until the block is left.

    Args:
        steps: names of files, in the order of their use.
        stop: set at the end, so that what is on its way stops too.
    """
    ahead = ReadAhead(steps, shelf, stop)
    ahead.start()
    try:
        yield ahead
    finally:
        ahead.close()
