"""Decoder layers read ahead: while one computes, a thread reads and hashes the next one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Condition, Thread

from torch import Tensor

from rilq.formats.checkpoint import Checkpoint


class LayerReader:
    """Steps of reading, done by one thread just ahead of their use; made by `reading_ahead`.

    A step is read once what waits to be taken leaves room for it, or nothing waits: the thread
    holds no more bytes than `budget`, or one step where that is larger. What goes wrong is raised
    where the step is taken, so that all steps before it are still made use of.

    Args:
        checkpoint: read by this thread alone from `start` on.
        budget: bytes of tensors that wait to be taken.
        pinned: put them into page-locked memory, from which a GPU copies without the processor.

    Attributes:
        advance: says that the current step is done; see `Checkpoint.in_order`.
    """

    def __init__(
        self, checkpoint: Checkpoint, advance: Callable[[], None], *, budget: int, pinned: bool
    ) -> None:
        self.advance = advance
        self._checkpoint, self._budget, self._pinned = checkpoint, budget, pinned
        self._ready: deque[dict[str, Tensor]] = deque()
        self._waiting = 0  # bytes in `_ready`
        self._failed: BaseException | None = None
        self._changed = Condition()
        self._thread: Thread | None = None

    def start(self, steps: Sequence[Sequence[str]]) -> None:
        """Begin to read; each of `steps` is to be taken once, in this order."""
        self._thread = Thread(target=self._work, args=(steps,), name="rilq-layer-reader")
        self._thread.start()

    def take(self) -> dict[str, Tensor]:
        """The next step's tensors, on the CPU, as `Checkpoint.read` gives them.

        Raises:
            Exception: what reading them raised.
        """
        with self._changed:
            while not self._ready:
                if self._failed is not None:
                    raise self._failed
                self._changed.wait()
            tensors = self._ready.popleft()
            self._waiting -= _nbytes(tensors)
            self._changed.notify_all()
            return tensors

    def stop(self) -> None:
        """Have the thread end at the next tensor."""
        self._checkpoint.stop.set()
        with self._changed:
            self._changed.notify_all()

    def join(self) -> None:
        """Wait for the end of the thread; the checkpoint can be read by others then."""
        if self._thread is not None:
            self._thread.join()
        self._ready.clear()
        self._checkpoint.stop.clear()

    def _work(self, steps: Sequence[Sequence[str]]) -> None:
        try:
            for names in steps:
                if not self._room(self._checkpoint.nbytes(names)):
                    return
                self._put(self._read(names))
        except BaseException as err:  # whatever it is, the caller's thread must learn of it
            with self._changed:
                self._failed = err
                self._changed.notify_all()

    def _room(self, nbytes: int) -> bool:
        """Wait until so many bytes may be read; False if nothing shall be read any more."""
        with self._changed:
            while self._ready and self._waiting + nbytes > self._budget:
                if self._checkpoint.stop.is_set():
                    return False
                self._changed.wait()
            return not self._checkpoint.stop.is_set()

    def _read(self, names: Sequence[str]) -> dict[str, Tensor]:
        tensors = self._checkpoint.read(names)
        return {n: t.pin_memory() for n, t in tensors.items()} if self._pinned else tensors

    def _put(self, tensors: dict[str, Tensor]) -> None:
        """Hand tensors over; this thread keeps none, so that their pages leave with their user."""
        with self._changed:
            self._ready.append(tensors)
            self._waiting += _nbytes(tensors)
            self._changed.notify_all()


def _nbytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


@contextmanager
def reading_ahead(
    checkpoint: Checkpoint, steps: Sequence[Sequence[str]], *, budget: int, pinned: bool
) -> Iterator[LayerReader]:
    """A reader of `steps`, whose files are fetched and given up in this order.

    Leaving the block ends its thread, whatever that is waiting for: first it is told so, then the
    files stop coming, which wakes it, and then it is waited for.
    """
    reader: LayerReader | None = None
    try:
        with checkpoint.in_order(steps) as advance:
            reader = LayerReader(checkpoint, advance, budget=budget, pinned=pinned)
            try:
                yield reader
            finally:
                reader.stop()
    finally:
        if reader is not None:
            reader.join()
