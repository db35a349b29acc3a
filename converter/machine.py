"""What the plan needs to know about the machine, measured now."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from rilq.errors import OptionError, RilqError, one_line
from rilq.formats.writer import parse_size


@dataclass(frozen=True)
class Machine:
    """A device and the memory beside it.

    Attributes:
        device: where layers run.
        dtype: the compute dtype that suits the device: float32 on a CPU, else bfloat16.
        host_free: bytes of host memory that can still be had.
        device_free: bytes of device memory free; None on a CPU, where host memory is meant.
        flops: floating-point operations per second of one matrix product, measured.
        bandwidth: bytes per second that one elementwise operation reads and writes, measured.
        name: for people.
    """

    device: torch.device
    dtype: torch.dtype
    host_free: int
    device_free: int | None
    flops: float
    bandwidth: float
    name: str


def measure_machine(device: str, *, limit: str | None = None) -> Machine:
    """Look at `device` ("auto", "cpu", "cuda", "cuda:1") and time a matrix product on it.

    Args:
        limit: most of the device's memory that torch may allocate, from here on.

    Raises:
        OptionError: no such device, or one whose memory is not limited.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        where = torch.device(device)
        torch.empty(1, device=where)
    except (RuntimeError, AssertionError) as err:
        raise OptionError(
            f"--device {device}: cannot be used: {one_line(err)}\n  use --device cpu"
        ) from err
    if limit is not None:
        _limit_memory(where, limit)
    _settle_vector_functions()
    host_free = psutil.virtual_memory().available
    if where.type == "cuda":
        free, _ = torch.cuda.mem_get_info(where)
        free = free if limit is None else min(free, parse_size(limit))
        name, dtype = torch.cuda.get_device_name(where), torch.bfloat16
    else:
        free, dtype = None, torch.float32
        name = f"CPU, {torch.get_num_threads()} threads"
    left = torch.ones(1024, 1024, device=where, dtype=dtype)
    with large_blocks_returned():  # as in the conversion, where fresh pages have their price
        flops = 2 * 1024**3 / seconds_of(lambda: left @ left, where, calls=4)
        bandwidth = 2 * left.nbytes / seconds_of(lambda: left + 1, where, calls=4)
    return Machine(where, dtype, host_free, free, flops, bandwidth, name)


def _limit_memory(where: torch.device, limit: str) -> None:
    """Have torch allocate no more than `limit` of the memory of a GPU."""
    if where.type != "cuda":
        raise OptionError(
            f"--device-memory {limit}: on {where} there is only the host's memory\n"
            "  leave it out; to limit the host's, use ulimit or a cgroup"
        )
    _, total = torch.cuda.mem_get_info(where)
    torch.cuda.set_per_process_memory_fraction(min(1.0, parse_size(limit) / total), where)


def _settle_vector_functions() -> None:
    """Let MKL choose its vector functions on one thread, before anything runs on several.

    Without this, the first `cos` of a process that has multiplied matrices on two threads was wrong
    by up to 1.5e-4 in one thread's half, in 21 of 300 processes (torch 2.13, AVX-512); with it, in
    none of 300. Rotary embeddings would be wrong, and a resumed run not byte-identical.
    """
    few = torch.linspace(0.1, 0.9, 8)  # too few to be shared between threads
    for function in (torch.cos, torch.sin, torch.exp, torch.log, torch.tanh, torch.erf):
        function(few)


def seconds_of(work: Callable[[], object], device: torch.device, calls: int = 3) -> float:
    """The median time of a few calls, after one that pays for initialisation.

    On a CPU the processor time of this thread, which takes part in all that others do for it: what
    else runs on the machine at the moment does not count.
    """
    clock = time.thread_time if device.type == "cpu" else time.perf_counter
    taken = []
    for _ in range(1 + calls):
        start = clock()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(clock() - start)
    return statistics.median(taken[1:])


# What torch, Rust and the system say when memory or address space is used up.
_EXHAUSTED = (
    "can't allocate memory",
    "Cannot allocate memory",
    "not enough memory",
    "bad_alloc",
    "start new thread",
)


@contextmanager
def memory_errors_explained(
    state: Callable[[], str],
    less: str = "with a lower --seqlen, --batch-size or --micro-batch, or with --student offload",
) -> Iterator[None]:
    """Say in one screen that memory ran out, and where.

    Args:
        state: what is finished by then, for the message.
        less: how less memory is needed.

    Raises:
        RilqError: in the place of what torch or the system raised.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as err:
        exhausted = isinstance(err, (MemoryError, torch.OutOfMemoryError)) or (
            err.errno == errno.ENOMEM
            if isinstance(err, OSError)
            else any(words in str(err) for words in _EXHAUSTED)
        )
        if not exhausted:
            raise
        raise RilqError(
            f"memory ran out {state()}: {one_line(err)}\n"
            "  close other programs and run the same command again, it goes on from there; or "
            f"begin anew (--resume never) {less}"
        ) from err


# Bytes from which blocks are returned to the system. From small ones on, hardly any address space
# is lost to holes, at the price of a tenth of the time or more where all tensors are small.
LARGE_BLOCK, SMALL_BLOCK = 1 << 20, 1 << 17
_large = 32 << 20  # as far as glibc raises it by itself


@contextmanager
def large_blocks_returned(least: int = LARGE_BLOCK) -> Iterator[None]:
    """Inside, glibc takes large blocks from the system, and gives them back when freed.

    By default it keeps freed blocks of up to 32 MiB in a heap that fragments and grows from layer
    to layer (docs/log.md). The price is that the system clears every block anew.

    Args:
        least: bytes of a block that is large; a smaller one of a scope around this one holds.
    """
    global _large
    before, _large = _large, min(least, _large)
    _return_blocks_from(_large)
    return_free_memory()
    try:
        yield
    finally:
        _large = before
        _return_blocks_from(before)


def least_returned(student: str) -> int:
    """Bytes of a block that is large to a conversion with this tier of the student.

    Offloading is for jobs that have little memory; others would rather have the time.
    """
    return SMALL_BLOCK if student == "offload" else LARGE_BLOCK


def return_free_memory() -> None:
    """Give what the heap holds free back to the system: smaller blocks fragment it too."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _return_blocks_from(nbytes: int) -> None:
    with suppress(OSError, AttributeError):  # another C library has no such function
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, nbytes)  # M_MMAP_THRESHOLD
        # M_TRIM_THRESHOLD: else large blocks would be cut from free memory at the heap's end.
        libc.mallopt(-1, nbytes)


@dataclass(frozen=True)
class Volume:
    """A mounted volume that the job writes to."""

    path: Path
    device: int
    free: int


def volume_of(path: Path) -> Volume:
    """The volume that `path`, which need not exist yet, will be on."""
    existing = path.resolve()
    while not existing.exists():
        existing = existing.parent
    return Volume(existing, os.stat(existing).st_dev, shutil.disk_usage(existing).free)
