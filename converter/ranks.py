"""Several processes that make one conversion together, as a launcher started them.

Each runs calibration rows of its own through the same layers; sums over rows are added up over all
of them, and the first alone writes, reports and publishes. What they say to each other goes through
accelerate, which knows the launchers (torchrun, accelerate launch) and the devices.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, TypeVar

from rilq.errors import OptionError, OtherEndedError, one_line

if TYPE_CHECKING:  # imported without torch by the command line, for `launched` alone
    import torch
    from torch import Tensor

T = TypeVar("T")

BUCKET = 32 << 20  # bytes of gradients that are added up at a time
# The first may quantize or write for long while the others wait. A process that ended is noticed
# by its connection and by the launcher, and not by this.
PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Ranks:
    """This process among those of a conversion; one alone by default.

    Attributes:
        index, count: its number, and how many there are.
        local_index, local_count: likewise on this machine.
        device: of what accelerate sends; None for one alone, which sends nothing.
    """

    index: int = 0
    count: int = 1
    local_index: int = 0
    local_count: int = 1
    device: torch.device | None = None

    @property
    def first(self) -> bool:
        """Whether this process writes and reports."""
        return self.index == 0

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.count > 1

    def starts(self, rows: int) -> tuple[int, ...]:
        """First row of each process, where `rows` are shared between them in order."""
        return tuple(rows * index // self.count for index in range(self.count))

    def share(self, rows: int) -> range:
        """This process's part of `rows`; empty where there are too few."""
        return range(rows * self.index // self.count, rows * (self.index + 1) // self.count)

    def wait(self) -> None:
        """Until all are here."""
        if self.several:
            from accelerate import PartialState

            with _lost():
                PartialState().wait_for_everyone()

    def once(self, act: Callable[[], object]) -> None:
        """Let the first do something; all wait until it is done."""
        if self.first:
            act()
        self.wait()

    def gather(self, value: T) -> list[T]:
        """Everybody's value, in their order: small things that can be pickled."""
        if not self.several:
            return [value]
        from accelerate.utils import gather_object

        with _lost():
            return list(gather_object([value]))

    def of_first(self, value: T) -> T:
        """The first one's value."""
        if not self.several:
            return value
        from accelerate.utils import broadcast_object_list

        values = [value]
        with _lost():
            broadcast_object_list(values)
        return values[0]

    def total(self, value: float) -> float:
        """The sum of everybody's value."""
        return sum(self.gather(value)) if self.several else value

    def added(self, tensor: Tensor) -> Tensor:
        """The sum of everybody's tensor, the same to the last bit in all processes."""
        if not self.several:
            return tensor
        from accelerate.utils import reduce

        with _lost():
            whole: Tensor = reduce(tensor.to(self.device), reduction="sum")
        return whole.to(tensor.device)

    def by_rows(self, rows: int, make: Callable[[slice], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What `make` gives for `rows`, of which every process makes its share.

        Args:
            make: the rows in a slice, as the first dimension of each tensor; in all processes the
                same dtypes and other dimensions, and each row by itself.
        """
        if not self.several or rows < self.count:
            return make(slice(rows))
        import torch
        from accelerate.utils import gather

        starts = (*self.starts(rows), rows)
        sizes = [stop - start for start, stop in pairwise(starts)]

        def joined(part: Tensor) -> Tensor:
            alike = part.new_zeros(max(sizes), *part.shape[1:])  # as everybody's must be
            alike[: len(part)] = part
            with _lost():
                whole: Tensor = gather(alike.to(self.device))
            shares = zip(whole.to(part.device).split(max(sizes)), sizes, strict=True)
            return torch.cat([share[:size] for share, size in shares])

        return tuple(map(joined, make(slice(*starts[self.index : self.index + 2]))))

    def add_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Make each parameter's gradient the sum over all processes; none counts as zero.

        One that has none in any process, of an expert that no token chose, stays without.

        Args:
            parameters: the same in all processes, all of one dtype.
        """
        if not self.several:
            return
        import torch

        for bucket in _buckets(parameters):
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            there = gradients[0].new_tensor([p.grad is not None for p in bucket])
            whole = self.added(torch.cat([each.flatten() for each in (*gradients, there)]))
            *sums, there = whole.split([*(p.numel() for p in bucket), len(bucket)])
            for parameter, total, count in zip(bucket, sums, there.tolist(), strict=True):
                parameter.grad = total.view_as(parameter) if count else None


ALONE = Ranks()


def most_rows(rows: int, processes: int) -> int:
    """Rows of the process that has most, for which the others wait; shared as by `Ranks.share`."""
    return -(-rows // processes)


def launched() -> tuple[int, int]:
    """Number of this process and of all, as a launcher says; `(0, 1)` without one."""
    if "LOCAL_RANK" not in os.environ:
        return 0, 1
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join(device: str) -> Ranks:
    """Meet the other processes, if a launcher started any.

    Args:
        device: as asked for: "auto", "cpu" or "cuda"; every process gets a GPU of its own.

    Raises:
        OptionError: a single GPU is asked for, or a machine has fewer GPUs than processes.
    """
    if launched()[1] == 1:
        return ALONE
    import torch
    from accelerate import PartialState

    local = int(os.environ["LOCAL_RANK"])
    on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    if ":" in device:
        raise OptionError(
            f"--device {device}: every process of a launcher takes a GPU of its own\n"
            "  use --device cuda, and choose GPUs with CUDA_VISIBLE_DEVICES"
        )
    if not on_cpu and local >= torch.cuda.device_count():
        raise OptionError(
            f"process {local} of this machine has no GPU: it has {torch.cuda.device_count()}\n"
            "  start as many processes as there are GPUs, or use --device cpu"
        )
    with _lost():
        state = PartialState(cpu=on_cpu, timeout=PATIENCE)
    return Ranks(
        index=state.process_index,
        count=state.num_processes,
        local_index=local,
        local_count=int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes)),
        # accelerate's own is "cpu:0", to which a tensor of "cpu" is copied.
        device=torch.device("cpu") if on_cpu else state.device,
    )


def _buckets(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """In order, so many at a time that their gradients are no more than `BUCKET` bytes."""
    bucket: list[Tensor] = []
    for parameter in parameters:
        if bucket and sum(p.nbytes for p in bucket) + parameter.nbytes > BUCKET:
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


@contextmanager
def _lost() -> Iterator[None]:
    """What torch raises while processes talk means that one of them is gone."""
    try:
        yield
    except RuntimeError as err:
        raise OtherEndedError(
            f"another process of this run ended, or cannot be reached: {one_line(err)}\n"
            "  what is finished is kept: run the same command again to continue"
        ) from err
