"""A rotation of a wide vector by Kronecker factors, as `down_proj` takes it at run time (U_D)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def kronecker_apply(rows: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """`rows @ (F_1 x F_2 x ...)`, `x` the Kronecker product, factor by factor.

    Args:
        rows: `[..., size]`.
        factors: square, of the dtype of the rows; their sizes multiply to `size`.

    Returns:
        `[..., size]`.
    """
    turned = rows.reshape(-1, *(len(factor) for factor in factors))
    for factor in factors:  # each takes the axis after the rows, and puts it last
        turned = torch.tensordot(turned, factor, dims=([1], [0]))
    return turned.reshape(rows.shape)
