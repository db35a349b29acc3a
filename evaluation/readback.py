"""How far the logits of an export, read back from its own bytes, are from the native checkpoint's.

Both run layer by layer in float32, so what differs is what the export stores, not how its runtime
computes.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rilq.calib.activations import ActivationStore, ActivationWriter
from rilq.converter.layers import StreamedModel
from rilq.converter.machine import large_blocks_returned
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

    def source_names(self, names: Iterable[str]) -> list[str]:
        """Nothing that the files here hold by these names: the reader opens them by itself."""
        return []

    def read(self, names: Iterable[str], *, check_finite: bool = True) -> dict[str, Tensor]:
        """Some tensors in float32; the comparison itself finds what is not finite."""
        return {name: self._reader.read(name) for name in self._known(names)}


class ReadBack:
    """The native's logits on a text, computed once, kept on disk and held against each export.

    So only one model is in memory at a time: a decoder layer, embedding and head.

    Args:
        native: computes in float32; its weights are dropped afterwards.
        tokens: `[rows, seq_len]` int64.
        folder: an empty one for hidden states and logits; must outlive this object.

    Raises:
        RilqError: the model computes NaN or infinity.
        OutputError: the volume is full.
    """

    def __init__(self, native: Subject, tokens: Tensor, folder: Path, report: Reporter) -> None:
        self._streamed, self._tokens = native.streamed, tokens
        self._folder, self._report = folder, report
        predicted = tokens[:, 1:].numel()
        shape = (predicted, 1, native.streamed.config.vocab_size)
        self._logits = ActivationStore(folder / "logits.bin", shape, torch.float32)
        with ActivationWriter(self._logits.path, shape, torch.float32, native.label) as writer:
            for batch in self._run(native, "native"):
                writer.append(batch[:, None])
        native.streamed.unload()

    @torch.no_grad()
    def compare(self, exported: Checkpoint) -> LogitDifference:
        """Run an export and compare its logits.

        Raises:
            CheckpointError: tensors are missing, or have other shapes than the model's.
            RilqError: the model computes NaN or infinity.
            OutputError: the volume is full.
        """
        streamed = StreamedModel(exported, dtype=self._streamed.dtype, device=self._streamed.device)
        largest = total = first = second = 0.0
        done = 0
        for found in self._run(Subject(streamed, adapter=None), "read back"):
            expected = self._logits.read(done, done + len(found))[:, 0].to(found.device)
            apart = (found - expected).abs()
            largest = max(largest, apart.max().item()) if apart.isfinite().all() else math.inf
            total += apart.sum(dtype=torch.float64).item()
            first += expected.sum(dtype=torch.float64).item()
            second += expected.double().square().sum().item()
            done += len(found)
        values = done * self._logits.shape[2]
        spread = math.sqrt(max(0.0, second / values - (first / values) ** 2))
        return LogitDifference(largest, total / values, spread, done)

    @torch.no_grad()
    def _run(self, subject: Subject, stage: str) -> Iterator[Tensor]:
        """All logits of a model, a bounded number at a time: `[tokens, vocabulary]` float32."""
        self._report.stage(stage, len(subject.streamed.layers), "layer")
        with tempfile.TemporaryDirectory(dir=self._folder) as place, large_blocks_returned():
            states = last_states(subject, self._tokens, Path(place), self._report)
            for _, _, (logits,), _ in predictions([subject], [states], self._tokens):
                yield logits.flatten(0, 1)
