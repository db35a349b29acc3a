"""How far the logits of an export, read back from its own bytes, are from the native checkpoint's.

Both run layer by layer in float32, so what differs is what the export stores, not how its runtime
computes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rilq.converter.layers import StreamedModel
from rilq.evaluation.forward import Subject, last_states, predictions
from rilq.formats.checkpoint import Checkpoint
from rilq.formats.export.kind import DenseReader
from rilq.formats.export.source import NativeCheckpoint
from rilq.formats.shard import TensorInfo
from rilq.formats.source import LocalFolder
from rilq.progress import Reporter


@dataclass(frozen=True)
class LogitDifference:
    """An export's logits compared with the native's, over every predicted token of a text.

    Attributes:
        largest, mean: absolute difference.
        spread: standard deviation of the native's logits; what a difference is to be held against.
        tokens: predicted tokens.
    """

    largest: float
    mean: float
    spread: float
    tokens: int

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


class ExportedCheckpoint(Checkpoint):
    """What an export stands for, as the dense checkpoint that a streamed model reads.

    Args:
        reader: gives its tensors.
        folder: of the export.
        native: what it was made from; its `config.json` describes the model.
        report: receives warnings.
    """

    def __init__(
        self, reader: DenseReader, folder: Path, native: NativeCheckpoint, report: Reporter
    ) -> None:
        super().__init__(LocalFolder(folder), dict(native.form.config), {}, {}, {}, report)
        self._reader = reader
        self.tensors = {
            name: TensorInfo(name, torch.float32, tuple(shape), 0, 4 * math.prod(shape))
            for name, shape in reader.shapes.items()
        }

    def read(self, names: Iterable[str], *, check_finite: bool = True) -> dict[str, Tensor]:
        """Some tensors in float32; the comparison itself finds what is not finite."""
        return {name: self._reader.read(name) for name in self._known(names)}


class ReadBack:
    """The native's hidden states on a text, computed once and held against each export.

    Args:
        native: computes in float32.
        tokens: `[rows, seq_len]` int64.
        folder: an empty one, for hidden states; must outlive this object.
    """

    def __init__(self, native: Subject, tokens: Tensor, folder: Path, report: Reporter) -> None:
        self._native, self._tokens, self._folder, self._report = native, tokens, folder, report
        report.stage("native", len(native.streamed.layers), "layer")
        place = folder / "native"
        place.mkdir()
        with torch.no_grad():
            self._states = last_states(native, tokens, place, report)

    @torch.no_grad()
    def compare(self, exported: Checkpoint) -> LogitDifference:
        """Run an export and compare its logits.

        Raises:
            CheckpointError: tensors are missing, or have other shapes than the model's.
            RilqError: the model computes NaN or infinity.
        """
        native = self._native.streamed
        subject = Subject(
            StreamedModel(exported, dtype=native.dtype, device=native.device), adapter=None
        )
        self._report.stage("read back", len(subject.streamed.layers), "layer")
        place = self._folder / "export"
        place.mkdir()
        states = last_states(subject, self._tokens, place, self._report)
        largest = total = first = second = 0.0
        logits = tokens = 0
        pairs = predictions([self._native, subject], [self._states, states], self._tokens)
        for _, (expected, found), targets in pairs:
            apart = (found - expected).abs()
            largest = max(largest, apart.max().item())  # NaN is found by `last_states`
            total += apart.sum(dtype=torch.float64).item()
            first += expected.sum(dtype=torch.float64).item()
            second += expected.double().square().sum().item()
            logits, tokens = logits + expected.numel(), tokens + targets.numel()
        states.delete()
        place.rmdir()
        spread = math.sqrt(max(0.0, second / logits - (first / logits) ** 2))
        return LogitDifference(largest, total / logits, spread, tokens)
