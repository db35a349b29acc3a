"""Where the hidden states of a streaming pass lie: a file for each process's calibration rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from rilq.calib.activations import ActivationStore, ActivationWriter, part_path
from rilq.converter.layers import StreamedModel
from rilq.converter.ranks import Ranks
from rilq.converter.workdir import Record


class StateFiles:
    """Hidden states `[rows, seq_len, hidden]` in the compute dtype, in the work folder.

    Each process writes states of its own rows, and reads those of any.

    Args:
        streamed: the model whose states they are.
        tokens: calibration rows `[rows, seq_len]` int64, of all processes.
        ranks: this process among those that share them.

    Attributes:
        rows: this process's.
        starts: first row of each process's file.
    """

    def __init__(self, streamed: StreamedModel, tokens: Tensor, ranks: Ranks) -> None:
        self.streamed, self.tokens, self.ranks = streamed, tokens, ranks
        self.shape = (*tokens.shape, streamed.config.hidden_size)
        self.rows = ranks.share(len(tokens))
        self.starts = ranks.starts(len(tokens))

    def own(self, path: Path) -> Path:
        """This process's file of some states."""
        return part_path(path, self.rows.start, self.ranks.count)

    def writer(self, path: Path, label: str) -> ActivationWriter:
        """For states of this process's rows."""
        shape = (len(self.rows), *self.shape[1:])
        dtype, first_row = self.streamed.dtype, self.rows.start
        return ActivationWriter(self.own(path), shape, dtype, label=label, first_row=first_row)

    def embedded(self, path: Path, size: int) -> dict[Path, str]:
        """Write the first states with the embedding as it is loaded; file and xxh3.

        Args:
            size: rows at once.
        """
        with self.writer(path, "the embedding") as writer:
            for start in range(self.rows.start, self.rows.stop, size):
                rows = self.tokens[start : min(start + size, self.rows.stop)]
                writer.append(self.streamed.embed(rows))
        return {self.own(path): writer.digest}

    def facts(self) -> dict[str, Any]:
        """How states of a unit lie in files, for the journal: nothing where it is one."""
        return {"starts": list(self.starts)} if self.ranks.several else {}

    def store(self, path: Path, unit: Record) -> ActivationStore:
        """States of all rows that a unit has written: another number of processes may go on."""
        return self._store(path, tuple(unit.facts.get("starts", (0,))))

    def just_written(self, path: Path) -> ActivationStore:
        """States of all rows that the processes of this run have written."""
        return self._store(path, self.starts)

    def batches(self, states: ActivationStore, size: int) -> Iterator[Tensor]:
        """This process's rows of some states in order, at most `size` at once, on the device."""
        for _, batch in states.batches(size, self.rows):
            yield self.here(batch)

    def here(self, batch: Tensor) -> Tensor:
        """A batch on the device; from page-locked memory it comes while others are computed."""
        return batch.to(self.streamed.device, non_blocking=True)

    def _store(self, path: Path, starts: tuple[int, ...]) -> ActivationStore:
        pinned, dtype = self.streamed.device.type == "cuda", self.streamed.dtype
        return ActivationStore(path, self.shape, dtype, pinned=pinned, starts=starts)
