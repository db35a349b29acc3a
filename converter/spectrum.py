"""How a quantization error is spread over singular values, summed over many linears."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

POINTS = 64  # of the curve, from the first singular value to the last


@dataclass(frozen=True)
class Spectrum:
    """The errors of all linears at one number of bits.

    Attributes:
        relative_error: `|E|^2 / |W|^2` over all linears.
        positions: place in the spectrum, from 0 (first singular value) to 1 (last).
        singular_values: there, over `|W|`: the root of the mean square over the linears.
        captured: rank to the share of `|E|^2` that the best correction of that rank removes.
    """

    bits: int
    relative_error: float
    positions: tuple[float, ...]
    singular_values: tuple[float, ...]
    captured: dict[int, float]


class SpectrumSum:
    """Gathers a `Spectrum` linear by linear; memory does not grow with them."""

    def __init__(self, bits: int, ranks: Sequence[int]) -> None:
        self.bits, self.linears = bits, 0
        self._error = self._weight = 0.0
        self._captured = dict.fromkeys(ranks, 0.0)
        self._squares = torch.zeros(POINTS, dtype=torch.float64)

    def add(self, weight: Tensor, error: Tensor) -> None:
        """Count one linear: `W` and `W - What`, `[out_features, in_features]` float32."""
        rows = error if error.shape[0] <= error.shape[1] else error.T
        squares = torch.linalg.eigvalsh((rows @ rows.T).double()).clamp(min=0).flip(0).cpu()
        size = weight.square().sum().item()
        self._error += squares.sum().item()
        self._weight += size
        for rank in self._captured:
            self._captured[rank] += squares[:rank].sum().item()
        self._squares += _resampled(squares / size)
        self.linears += 1

    def result(self) -> Spectrum:
        """Over everything added; at least one linear must have been."""
        values = (self._squares / self.linears).sqrt()
        return Spectrum(
            self.bits,
            self._error / self._weight,
            tuple(i / (POINTS - 1) for i in range(POINTS)),
            tuple(values.tolist()),
            {rank: part / (self._error or 1.0) for rank, part in self._captured.items()},
        )


def _resampled(values: Tensor) -> Tensor:
    """`POINTS` values at equal distances from the first to the last, linearly between."""
    places = torch.linspace(0, len(values) - 1, POINTS, dtype=torch.float64)
    low = places.long().clamp(max=max(0, len(values) - 2))
    high = (low + 1).clamp(max=len(values) - 1)
    return torch.lerp(values[low], values[high], places - low)
