"""Kernels timed on pieces of a model's linears; what a piece takes is multiplied.

Pieces have the widths of the model's own linears and the tokens of its own batches, but few rows of
weights, and where weights are quantized few columns. Each takes a fraction of a second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from rilq.converter.machine import Machine, seconds_of
from rilq.converter.resq.sizes import PartsSpec
from rilq.formats.spec import QuantSpec

PIECE = 1 << 21  # weights of a matrix product: more than a processor's own cache holds
TOKENS = 512  # of it, at most
COLUMNS, ROWS = 512, (64, 512)  # of what is quantized

Shape = tuple[int, int]  # out_features, in_features
Spec = TypeVar("Spec", bound=QuantSpec | PartsSpec)
Prepare = Callable[[Tensor], Tensor]


def product_seconds(shape: Shape, tokens: int, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds for a token through a dense linear, of so many at once."""
    rows, tokens = _rows_of(shape), min(tokens, TOKENS)
    x = torch.ones(tokens, shape[1], dtype=dtype, device=device)
    weight = torch.ones(rows, shape[1], dtype=dtype, device=device)
    return seconds_of(lambda: F.linear(x, weight), device) / tokens * shape[0] / rows


class LinearPiece:
    """A linear of the student with tokens running through it.

    Args:
        make: a linear with so many rows, as the student has it.
        tokens: that run at once.
    """

    def __init__(
        self,
        make: Callable[[int], Callable[[Tensor], Tensor]],
        shape: Shape,
        tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.make, self.shape, self.tokens = make, shape, min(tokens, TOKENS)
        self.dtype, self.device = dtype, device

    @torch.no_grad()
    def forward(self) -> float:
        """Seconds of a token."""
        x = self._ones(self.shape[1])
        return self._seconds(lambda linear, _: linear(x))

    @torch.enable_grad()
    def step(self) -> float:
        """Seconds of a token, there and back."""
        x = self._ones(self.shape[1]).requires_grad_()

        def there_and_back(linear: Callable[[Tensor], Tensor], rows: int) -> None:
            linear(x).backward(self._ones(rows))

        return self._seconds(there_and_back)

    def _ones(self, width: int) -> Tensor:
        return torch.ones(self.tokens, width, dtype=self.dtype, device=self.device)

    def _seconds(self, call: Callable[[Callable[[Tensor], Tensor], int], object]) -> float:
        def taken(rows: int) -> float:
            work = partial(call, self.make(rows), rows)
            return seconds_of(work, self.device, calls=2)

        many = _rows_of(self.shape, PIECE // 4)
        return _by_rows(taken, self.shape[0], max(1, many // 4), many) / self.tokens


class WeightPieces(Generic[Spec]):
    """What is done to weight matrices, row by row; each size of piece is timed once.

    Args:
        linears: how many there are of each shape and spec.
        work: makes what is timed, of a random weight `[rows, columns]` float32, how it is
            quantized, and what `prepare` makes of a Hessian.
        prepare: takes a Hessian `[columns, columns]` float32, which is given away; None for work
            that needs none.
    """

    def __init__(
        self,
        linears: Mapping[tuple[Shape, Spec], int],
        work: Callable[[Tensor, Spec, Tensor | None], Callable[[], object]],
        prepare: Prepare | None,
        machine: Machine,
    ) -> None:
        self.linears, self.work, self.machine = linears, work, machine
        self._taken: dict[tuple[int, int, Spec], float] = {}
        self._hessians: dict[int, _HessianPiece] = {}
        if prepare is not None:
            for columns in {_columns(width) for (_, width), _ in linears}:
                self._hessians[columns] = _HessianPiece(prepare, columns, machine.device)

    @property
    def hessian_token(self) -> float:
        """Seconds to add a token to the Hessians of all linears' inputs."""
        return self._hessian_seconds(lambda piece: piece.added, 2)

    @property
    def prepare(self) -> float:
        """Seconds to prepare these Hessians."""
        return self._hessian_seconds(lambda piece: piece.preparing, 3)

    def seconds(self, **changed: Any) -> float:
        """Seconds to do the work to all linears.

        Args:
            changed: fields of their specs that have other values.
        """
        total = 0.0
        for ((out, width), spec), count in self.linears.items():
            total += count * self._weight((out, width), replace(spec, **changed))
            if self._hessians:
                # What a column's error does to those after it, beyond the columns of the piece.
                rest = max(0, width - COLUMNS)
                total += count * out * width * rest / self.machine.flops
        return total

    def _hessian_seconds(self, of: Callable[[_HessianPiece], float], order: int) -> float:
        # Linears that share an input share its Hessian: on average two of a decoder layer's.
        return sum(
            count / 2 * of(piece) * (width / piece.columns) ** order
            for ((_, width), _), count in self.linears.items()
            if (piece := self._hessians.get(_columns(width))) is not None
        )

    def _weight(self, shape: Shape, spec: Spec) -> float:
        out, width = shape
        columns = _columns(width)
        few, many = (min(out, rows) for rows in ROWS)
        piece = _by_rows(lambda rows: self._piece(rows, columns, spec), out, few, many)
        return piece * width / columns

    def _piece(self, rows: int, columns: int, spec: Spec) -> float:
        key = (rows, columns, spec)
        if key not in self._taken:
            draw, device = torch.Generator().manual_seed(0), self.machine.device
            weight = torch.randn(rows, columns, generator=draw).to(device)
            hessian = self._hessians.get(columns)
            work = self.work(weight, spec, None if hessian is None else hessian.prepared)
            self._taken[key] = seconds_of(work, device, calls=1)
        return self._taken[key]


class _HessianPiece:
    """A Hessian of few columns: seconds to add a token and to prepare it, and what that gives."""

    def __init__(self, prepare: Prepare, columns: int, device: torch.device) -> None:
        self.columns = columns
        x = torch.randn(TOKENS, columns, generator=torch.Generator().manual_seed(0)).to(device)
        sums = torch.zeros(columns, columns, device=device)
        self.added = seconds_of(lambda: sums.addmm_(x.T, x), device) / TOKENS
        self.preparing = seconds_of(lambda: prepare(sums.clone()), device, calls=1)
        self.prepared = prepare(sums)


def _by_rows(taken: Callable[[int], float], rows: int, few: int, many: int) -> float:
    """Seconds for `rows` rows, on the straight line through pieces with few of them and many."""
    least = taken(few)
    each = max(0.0, taken(many) - least) / max(1, many - few)
    return least + each * (rows - few)


def _rows_of(shape: Shape, weights: int = PIECE) -> int:
    """Rows of a piece of a weight matrix with about so many weights."""
    return max(1, min(shape[0], weights // shape[1]))


def _columns(width: int) -> int:
    """Columns of a piece of a weight matrix that is quantized."""
    return min(width, COLUMNS)
