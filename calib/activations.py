"""Hidden states of one layer boundary on disk: `[rows, seq_len, hidden]`, one flat file.

The file has no header: elements in C order, each in the machine's (little-endian) byte order.
Shape, dtype and checksum are kept by whoever wrote it, in the journal. Reading goes through plain
reads into fresh memory and not through a mapping, because mapped pages count as resident memory.
"""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from io import FileIO
from math import prod
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, TypeVar

import torch
import xxhash
from torch import Tensor

from rilq.errors import RilqError
from rilq.formats.durable import atomic_file

T = TypeVar("T")

WRITE_BEHIND = 4 << 20  # bytes of batches that may wait to be written, if not a single one
_CHUNK = 8 << 20  # bytes per read while a whole file is hashed
# Bytes after which what was written is forced to the disk: it gets there while the next batches are
# computed, and the sync at the end, which everything waits for, has little left to do.
_SYNC = 16 << 20


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor of any dtype (numpy has no bfloat16, bytes it has)."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def _on_host(stored: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A contiguous copy in host memory, and what says when it is there, for one from a GPU."""
    if stored.device.type != "cuda":
        return stored.cpu().contiguous(), None
    # Page-locked: the copy runs behind the computation, and nobody waits for it but the writer.
    host = torch.empty(stored.shape, dtype=stored.dtype, pin_memory=True)
    host.copy_(stored, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(stored.device))
    return host, copied


class ActivationWriter:
    """Writes one store, batch after batch; the file appears when the `with` block ends well.

    A thread checks, writes and hashes while the caller computes the next batch. The block ends when
    everything is in the file and the file is on the disk, so what is said of it then (a line in the
    journal) is as true as it would be without the thread.

    Leaving the block with another number of rows than `shape` says is an error, and then, as after
    any exception, an older file of that name stays as it was.

    Args:
        path: final name of the file.
        shape: `(rows, seq_len, hidden)`.
        dtype: what is stored; batches are converted to it.
        label: begins the messages, for example "layer 17 (student)".
        first_row: number of the file's first row, for the messages, where it is one part of many.

    Raises:
        OutputError: the volume is full or read-only.
        RilqError: too few or too many rows, or a value that is not finite.
    """

    def __init__(
        self,
        path: Path,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        label: str = "",
        first_row: int = 0,
    ) -> None:
        self._path = path
        self._shape = shape
        self._dtype = dtype
        self._label = label or path.name
        self._first_row = first_row
        self._rows = 0
        self._hash = xxhash.xxh3_128()
        self._unsynced = 0
        self._stack = ExitStack()
        self._file: BinaryIO | None = None
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rilq-write")
        self._behind: deque[tuple[int, Future[None]]] = deque()  # each batch's bytes and writing
        self._complete = False

    @property
    def digest(self) -> str:
        """xxh3_128 of the file, in hex; known once the block has ended well."""
        if not self._complete:
            raise ValueError(f"{self._label}: the digest is known after the file is complete")
        return str(self._hash.hexdigest())

    def __enter__(self) -> "ActivationWriter":
        self._file = self._stack.enter_context(atomic_file(self._path))
        # Left before the file is closed: what is in the thread's hands ends, the rest is dropped.
        self._stack.callback(self._pool.shutdown, cancel_futures=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:  # drops the temporary file if anything is raised here
            self._wait(0)
            if self._rows != self._shape[0]:
                raise RilqError(
                    f"{self._label}: {self._rows} rows of activations instead of {self._shape[0]}"
                )
        self._file, self._complete = None, True

    def append(self, batch: Tensor) -> None:
        """Write the next rows, soon; what is wrong with them is raised by then or at the end.

        Args:
            batch: `[n, seq_len, hidden]`, any float dtype, any device; not to be changed any more.

        Raises:
            RilqError: a value is not finite in the stored dtype (the message names the first bad
                row of the store), or more rows come than the shape has.
            ValueError: another row shape, or the writer is not open.
        """
        if self._file is None:
            raise ValueError(f"{self._label}: append() outside the with block")
        if batch.ndim != 3 or tuple(batch.shape[1:]) != self._shape[1:]:
            raise ValueError(f"{self._label}: batch {tuple(batch.shape)} for {self._shape}")
        if self._rows + len(batch) > self._shape[0]:
            raise RilqError(f"{self._label}: more than {self._shape[0]} rows of activations")
        stored = batch.detach().to(self._dtype)  # on its device: half the bytes to copy
        self._wait(WRITE_BEHIND - stored.nbytes)
        writing = self._pool.submit(self._write, *_on_host(stored), self._rows)
        self._behind.append((stored.nbytes, writing))
        self._rows += len(batch)

    def _wait(self, most: int) -> None:
        """Until no more than `most` bytes wait to be written; raises what writing raised."""
        while self._behind:
            done = self._behind[0][1].done()
            if not done and sum(nbytes for nbytes, _ in self._behind) <= most:
                break
            self._behind.popleft()[1].result()

    def _write(self, stored: Tensor, copied: torch.cuda.Event | None, first: int) -> None:
        """Check and write rows from row `first` on; runs in the thread, one batch at a time."""
        assert self._file is not None, "the file is open as long as the thread lives"
        if copied is not None:
            copied.synchronize()
        self._check_finite(stored, first)
        content = _bytes_of(stored)
        self._file.write(content)
        self._hash.update(content)
        self._unsynced += len(content)
        if self._unsynced >= _SYNC:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._unsynced = 0

    def _check_finite(self, stored: Tensor, first: int) -> None:
        # A sum is one cheap pass; it is finite unless a value is not, or (rare, harmless) it
        # overflows by itself, so only then are the rows looked at.
        if bool(torch.isfinite(stored.sum(dtype=torch.float32))):
            return
        bad = (~torch.isfinite(stored).flatten(1).all(dim=1)).nonzero().flatten().tolist()
        if not bad:
            return
        kind = str(self._dtype).removeprefix("torch.")
        remedy = (
            "float16 ends at 65504: run again with --dtype bfloat16 or float32"
            if self._dtype == torch.float16
            else "run again with --dtype float32; if that does not help, the model itself is broken"
        )
        raise RilqError(
            f"{self._label}: activations of row {self._first_row + first + bad[0]} hold NaN or "
            f"infinity in {kind} ({len(bad)} of {len(stored)} rows of this batch)\n  {remedy}"
        )


@dataclass(frozen=True)
class ActivationStore:
    """Complete hidden states of one layer boundary, in one file, or in one of each process.

    Attributes:
        path: the file, or what the names of several are made from; see `part_path`.
        shape: `(rows, seq_len, hidden)`.
        dtype: of its elements.
        pinned: read rows into page-locked memory, from which a GPU copies without waiting.
        starts: first rows of the files.
    """

    path: Path
    shape: tuple[int, int, int]
    dtype: torch.dtype
    pinned: bool = False
    starts: tuple[int, ...] = (0,)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the whole file."""
        return self.shape[0] * self.row_bytes

    def read(self, start: int, stop: int) -> Tensor:
        """Rows `start .. stop - 1` as `[stop - start, seq_len, hidden]`.

        Raises:
            ValueError: not `0 <= start <= stop <= rows`.
            RilqError: the file is missing or shorter than its shape says.
        """
        if not 0 <= start <= stop <= self.shape[0]:
            raise ValueError(f"rows {start}:{stop} of {self.shape[0]}")
        rows = self._empty(stop - start)
        for first, part in self._parts():
            low, high = max(start, first), min(stop, first + part.shape[0])
            if low < high:
                with part._open() as file:
                    part._fill(file, low - first, rows[low - start : high - start])
        return rows

    def gather(self, indices: Sequence[int]) -> Tensor:
        """The rows `indices`, in that order, as `[len(indices), seq_len, hidden]`.

        Raises:
            ValueError: an index is not in `0 .. rows - 1`.
            RilqError: the file is missing or shorter than its shape says.
        """
        wrong = [index for index in indices if not 0 <= index < self.shape[0]]
        if wrong:
            raise ValueError(f"rows {wrong[:10]} of {self.shape[0]}")
        rows = self._empty(len(indices))
        for first, part in self._parts():
            places = [i for i, at in enumerate(indices) if 0 <= at - first < part.shape[0]]
            if places:
                with part._open() as file:
                    for place in places:
                        part._fill(file, indices[place] - first, rows[place])
        return rows

    def batches(self, size: int, rows: range | None = None) -> Iterator[tuple[int, Tensor]]:
        """Rows in order: `(first row, [at most size, seq_len, hidden])`, one read ahead.

        Args:
            size: rows at once.
            rows: consecutive ones; None for all.
        """
        if size < 1:
            raise ValueError(f"batches of {size} rows")
        wanted = range(self.shape[0]) if rows is None else rows
        starts = range(wanted.start, wanted.stop, size)
        yield from prefetch(self._reading(at, min(at + size, wanted.stop)) for at in starts)

    def digest(self) -> str:
        """xxh3_128 of the file as it is now, in hex, comparable with `ActivationWriter.digest`.

        Raises:
            RilqError: the file cannot be read.
        """
        state = xxhash.xxh3_128()
        chunk = memoryview(bytearray(_CHUNK))
        with self._open() as file:
            while got := self._read_into(file, chunk):
                state.update(chunk[:got])
        return str(state.hexdigest())

    def verify(self, digest: str) -> bool:
        """Whether the file exists, has the right size and this digest."""
        try:
            return self.path.stat().st_size == self.nbytes and self.digest() == digest
        except (OSError, RilqError):
            return False

    def delete(self) -> None:
        """Remove the file; a missing one is fine."""
        self.path.unlink(missing_ok=True)

    def _empty(self, rows: int) -> Tensor:
        return torch.empty((rows, *self.shape[1:]), dtype=self.dtype, pin_memory=self.pinned)

    def _reading(self, start: int, stop: int) -> Callable[[], tuple[int, Tensor]]:
        return lambda: (start, self.read(start, stop))

    def _parts(self) -> Iterator[tuple[int, "ActivationStore"]]:
        """First row and store of every file; this one itself where there is one."""
        if len(self.starts) == 1:
            yield 0, self
            return
        for start, stop in zip(self.starts, [*self.starts[1:], self.shape[0]], strict=True):
            path = part_path(self.path, start, len(self.starts))
            yield (
                start,
                replace(self, path=path, shape=(stop - start, *self.shape[1:]), starts=(0,)),
            )

    def _open(self) -> FileIO:
        try:
            return open(self.path, "rb", buffering=0)  # straight into the tensor, no copy
        except OSError as err:
            raise self._unreadable(err) from err

    def _read_into(self, file: FileIO, room: memoryview) -> int:
        try:
            return file.readinto(room)
        except OSError as err:
            raise self._unreadable(err) from err

    def _fill(self, file: FileIO, row: int, rows: Tensor) -> None:
        """Read `rows` (contiguous) from the file, beginning at row `row`."""
        room = _bytes_of(rows)
        file.seek(row * self.row_bytes)
        done = 0
        while done < len(room):  # one read gives at most 2 GiB on Linux
            got = self._read_into(file, room[done:])
            if not got:
                raise RilqError(
                    f"{self.path}: ends after {file.tell()} bytes instead of {self.nbytes}\n"
                    "  the file is damaged; run the same command again to make it anew"
                )
            done += got

    def _unreadable(self, err: OSError) -> RilqError:
        return RilqError(
            f"{self.path}: activations cannot be read: {err.strerror or err}\n"
            "  run the same command again to make them anew"
        )


def part_path(path: Path, start: int, parts: int) -> Path:
    """The file of the rows from `start` on, where `parts` files hold what `path` alone would."""
    return path if parts == 1 else path.with_name(f"{path.stem}.from{start}{path.suffix}")


def prefetch(reads: Iterable[Callable[[], T]]) -> Generator[T, None, None]:
    """Results of `reads` in order; while the caller works on one, the next is being read.

    One background thread, one result ahead. An exception of a read is raised when its turn comes.
    The thread has ended when the iterator is exhausted or closed (a `for` loop that is left early
    closes it); nothing is read before the first result is asked for.
    """
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rilq-prefetch")
    current: Future[T] | None = None
    try:
        for read in reads:
            following = pool.submit(read)
            if current is not None:
                yield current.result()
            current = following
        if current is not None:
            yield current.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
