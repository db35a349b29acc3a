"""What the streaming pass asks of a method that quantizes a decoder layer in a way of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor

from rilq.converter.ranks import Ranks


@dataclass(frozen=True)
class LayerToQuantize:
    """A decoder layer whose full-precision weights are loaded.

    Attributes:
        tensors: as read from the checkpoint, by full name.
        batches: what the quantized layer will be run on, from the first row of this process at
            every call: `[rows, seq_len, hidden]` on the device.
        ranks: this process among those that quantize the same layer.
    """

    index: int
    tensors: Mapping[str, Tensor]
    batches: Callable[[], Iterator[Tensor]]
    ranks: Ranks


class LayerMethod(ABC):
    """How a decoder layer is quantized, and how what was saved of it is run."""

    @abstractmethod
    def quantize(self, layer: LayerToQuantize) -> dict[str, Tensor]:
        """All tensors of the layer as they will be stored, by full name, on the CPU."""

    @abstractmethod
    def as_saved(
        self, index: int, saved: Mapping[str, Tensor]
    ) -> AbstractContextManager[Callable[[Tensor], Tensor]]:
        """Run a layer as it is stored: hidden states in, hidden states out, on the device."""
