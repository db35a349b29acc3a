"""Half the rows at once where a GPU's memory runs out: once in each part of a job, journaled.

The plan's figures are upper bounds, but other programs may take memory meanwhile. A resumed job
goes on with the halved rows, since the number of rows has an effect on the last bits of a result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TypeVar

import torch

from rilq.converter.machine import return_free_memory
from rilq.converter.workdir import WorkDir
from rilq.errors import one_line
from rilq.progress import Reporter

STAGE = "fewer rows"

T = TypeVar("T")


@dataclass(frozen=True)
class RowsAtOnce:
    """Rows that run through a layer at once, and of one forward pass of an update."""

    batch_rows: int
    micro_batch: int

    def halved(self) -> RowsAtOnce:
        """Half of both, where there are two."""
        return RowsAtOnce(max(1, self.batch_rows // 2), max(1, self.micro_batch // 2))


def with_fewer_rows(
    part: str,
    rows: RowsAtOnce,
    run: Callable[[RowsAtOnce], T],
    work: WorkDir,
    report: Reporter,
) -> T:
    """Run a piece of `part`; if memory runs out, run it anew with half the rows, and go on so.

    Args:
        part: of the job, which halves its rows at most once.
        rows: at once, as planned.
        run: begins from what is committed, whatever an attempt before it has done.

    Raises:
        torch.OutOfMemoryError: there is one row only, or half the rows are too many as well, or
            the work is shared between processes.
    """
    unit = f"fewer rows in {part}"
    kept = [record for record in work.stage(STAGE) if record.unit == unit]
    rows = RowsAtOnce(**kept[-1].facts) if kept else rows
    try:
        return run(rows)
    except torch.OutOfMemoryError as err:
        fewer = rows.halved()
        # Of several processes the others have not run out, and would wait for this one's sums.
        if kept or fewer == rows or work.shared:
            raise
        what = one_line(err)
    # Not in the handler: until it is left, the error keeps all that the attempt had in memory.
    report.warn(
        f"memory ran out in {part}: {what}\n  trying again with half the rows at once "
        f"({fewer.batch_rows} instead of {rows.batch_rows} through a layer, {fewer.micro_batch} "
        f"instead of {rows.micro_batch} in training); this is done once"
    )
    work.commit(STAGE, unit, asdict(fewer))
    return_free_memory()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return run(fewer)
