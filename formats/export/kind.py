"""What a kind of export must be able to do; each is a module of this package."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from rilq.errors import OptionError
from rilq.formats.export.source import NativeCheckpoint, NativeForm
from rilq.progress import Reporter

_DTYPES = {
    "fp16": torch.float16,
    "float16": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
}

# Of the logits' standard deviation: how far an export may be from its native checkpoint where it
# differs by rounding alone. float16 has 11 bits of precision, bfloat16 8.
ROUNDING = {torch.float16: 0.05, torch.bfloat16: 0.4}


@dataclass(frozen=True)
class ExportOptions:
    """What the user decides about an export.

    Attributes:
        dtype: of everything that is not packed, float16 or bfloat16.
        max_shard_size: bytes of tensors in a shard.
    """

    dtype: torch.dtype = torch.float16
    max_shard_size: int = 5 * 10**9


def export_dtype(name: str) -> torch.dtype:
    """The dtype that a command line names.

    Raises:
        OptionError: not one of `_DTYPES`.
    """
    if name not in _DTYPES:
        raise OptionError(f"--dtype {name}: expected one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


class DenseReader(Protocol):
    """An export read back from its own bytes, as the dense model that it stands for.

    It shares no code with what wrote the export, so that one mistake cannot hide another.
    """

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor of the dense model by transformers' name; a tied head is left out."""

    def read(self, name: str) -> Tensor:
        """One of them in float32, an adapter that lies beside added in."""


class ExportKind(Protocol):
    """A module that writes native checkpoints in one format, and reads them back."""

    def bound(self, options: ExportOptions) -> float:
        """How far logits may be from the native's, in standard deviations of those."""

    def check(self, form: NativeForm, options: ExportOptions) -> None:
        """Refuse at once what the format or its runtime cannot hold.

        Raises:
            InputError: the message names the remedy.
        """

    def write(
        self, native: NativeCheckpoint, folder: Path, options: ExportOptions, report: Reporter
    ) -> None:
        """Write everything but `rilq.json` into an empty folder, one tensor at a time in memory.

        Raises:
            InputError: a value does not fit; the volume is full.
        """

    def read(self, folder: Path) -> DenseReader:
        """Open what `write` has written."""
