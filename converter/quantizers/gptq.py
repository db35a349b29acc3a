"""GPTQ: round column by column, and let the columns still to come make up for the error."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rilq.converter.options import Clip
from rilq.converter.quantizers.grid import (
    LARGEST_WEIGHT,
    as_groups,
    nearest_codes,
)
from rilq.converter.quantizers.inverse_factor import inverse_factor
from rilq.converter.quantizers.lsq import start_grid
from rilq.errors import OptionError
from rilq.formats.spec import QuantizedLinear, QuantSpec


@dataclass(frozen=True)
class GptqQuantizer:
    """Minimise `tr((W - What) H (W - What)^T)` greedily, for `H = X^T X` of the inputs.

    The scale and zero-point of a group are found when its first column is reached, on weights
    that already carry the errors of the columns before.

    Attributes:
        clip: how the range of a group is found, see `RtnQuantizer`.
        damping: added to the diagonal of the Hessian, in parts of its mean.
        block: columns whose errors reach the later columns together, a multiple of the group
            size; it changes the speed and not the result.

    Source: Frantar et al. 2023 (arXiv:2210.17323), algorithm 1.
    """

    clip: Clip = "lsq"
    damping: float = 0.01
    block: int = 128

    name = "gptq"
    needs_hessian = True

    def prepare(self, hessian: Tensor, warn: Callable[[str], None]) -> Tensor:
        """The factor that `quantize` takes; see `inverse_factor`.

        Raises:
            RilqError: the Hessian is not finite, or not positive definite even when damped.
        """
        return inverse_factor(hessian.to(torch.float32), self.damping, warn)

    def quantize(
        self, weight: Tensor, spec: QuantSpec, prepared: Tensor | None = None
    ) -> QuantizedLinear:
        """Quantize one weight matrix; see `Quantizer`.

        An input channel that the calibration never used keeps its weights' nearest codes; with
        a Hessian of zeros (an expert that was never chosen) all channels do.

        Raises:
            InputError: the group size does not divide `in_features`.
            NonFiniteError: the weight holds NaN or infinity.
            OptionError: the block is not a multiple of the group size.
        """
        assert prepared is not None, "gptq needs the Hessian of the linear's inputs"
        assert prepared.shape == (weight.shape[1],) * 2, (
            f"Hessian {list(prepared.shape)} does not belong to weight {list(weight.shape)}"
        )
        size = spec.group_size
        if self.block % size:
            raise OptionError(
                f"gptq block {self.block}: expected a multiple of the group size {size}"
            )
        W = as_groups(weight, spec).reshape(weight.shape)
        W = W.clamp(-LARGEST_WEIGHT, LARGEST_WEIGHT)
        U = prepared.to(W.device)
        codes = torch.empty(W.shape, dtype=torch.uint8, device=W.device)
        grids: list[tuple[Tensor, Tensor]] = []
        for start in range(0, W.shape[1], self.block):
            stop = min(start + self.block, W.shape[1])
            # One column to a row: the inner loop reads and writes contiguous memory.
            columns = W[:, start:stop].T.contiguous()  # [block, out]
            block_codes, errors, block_grids = self._quantize_block(
                columns, U[start:stop, start:stop], spec
            )
            codes[:, start:stop] = block_codes.T
            grids += block_grids
            W[:, stop:].addmm_(errors.T, U[start:stop, stop:], alpha=-1)
        scale = torch.cat([scale for scale, _ in grids], dim=1)
        zero_point = torch.cat([zero_point for _, zero_point in grids], dim=1)
        return QuantizedLinear(codes, scale, zero_point, spec)

    def _quantize_block(
        self, columns: Tensor, U: Tensor, spec: QuantSpec
    ) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """Codes and scaled errors `[block, out]`, and the grid `[out, 1]` of each group."""
        codes = torch.empty(columns.shape, dtype=torch.uint8, device=columns.device)
        grids: list[tuple[Tensor, Tensor]] = []

        def rounded(j: int) -> Tensor:
            if j % spec.group_size == 0:
                group = columns[j : j + spec.group_size].T.contiguous()[:, None]  # [out, 1, size]
                grids.append(self._grid(group, spec, U.diagonal()[j : j + spec.group_size]))
            scale, zero_point = (part[:, 0] for part in grids[-1])
            code = nearest_codes(columns[j][:, None], scale, zero_point, spec)[:, 0]
            codes[j] = code
            return (code - zero_point.to(torch.float32)) * scale.to(torch.float32)

        return codes, round_in_turn(columns, U, rounded), grids

    def _grid(self, group: Tensor, spec: QuantSpec, diagonal: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero-point `[out, 1]` of one group `[out, 1, group_size]`."""
        if self.clip != "lsq":
            return start_grid(group, spec, self.clip)
        return start_grid(group, spec, self.clip, column_importance(diagonal)[None])


def round_in_turn(columns: Tensor, U: Tensor, rounded: Callable[[int], Tensor]) -> Tensor:
    """Round columns one after another; those still to come make up for the error of each.

    Args:
        columns: `[block, out]` float32, one column of the weight to a row; changed.
        U: `[block, block]`, the block's part of `inverse_factor`.
        rounded: the value `[out]` that stands for column `j`, as `columns[j]` is by then.

    Returns:
        The errors `[block, out]`, each divided by its diagonal of `U`: what the columns after the
        block are to make up for.
    """
    errors = torch.empty_like(columns)
    diagonal = U.diagonal().tolist()
    for j in range(len(columns)):
        errors[j] = (columns[j] - rounded(j)) / diagonal[j]
        columns[j + 1 :].addr_(U[j, j + 1 :], errors[j], alpha=-1)
    return errors


def column_importance(diagonal: Tensor) -> Tensor:
    """What an error of each column costs once later columns have made up for it; 1 on average.

    Args:
        diagonal: of `inverse_factor`, of some columns.
    """
    importance = diagonal.reciprocal().square()
    return importance / importance.mean()
