"""Weights in parts: for each part of the input channels its own bits, symmetric, without groups.

A weight is `scale[o, p] * code[o, i]` for an input channel `i` of part `p`, with whole codes in
`-2^(bits - 1) .. 2^(bits - 1) - 1`: one scale to an output channel and part, so that a product
with whole inputs needs no other arithmetic than whole numbers.

Source: ResQ, Saxena et al. 2024 (arXiv:2412.14363), section 5.1; GPTQ, Frantar et al. 2023
(arXiv:2210.17323).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from rilq.converter.quantizers.gptq import column_importance, round_in_turn
from rilq.converter.quantizers.grid import LARGEST_SCALE, SMALLEST_SCALE, row_chunks
from rilq.converter.quantizers.inverse_factor import inverse_factor
from rilq.errors import NonFiniteError
from rilq.formats.resq.hadamard import kronecker_apply
from rilq.formats.resq.parts import Parts
from rilq.formats.resq.weight import ResqWeight

BLOCK = 128  # columns whose errors reach the later columns together; speed only
DAMPING = 0.01  # of the Hessian's mean diagonal, for `inverse_factor`
LARGEST_WEIGHT = 65504.0 * 128  # the largest scale times the largest code of 8 bits

# The largest code may stand for so much of the largest weight of an output channel and part. At 2
# bits the best is near a half, at 8 bits near 1; then each hundredth around the best of these.
COARSE_FACTORS = tuple(1.0 - 0.05 * step for step in range(17))
FINE_STEPS = tuple(0.01 * step for step in (-4, -3, -2, -1, 1, 2, 3, 4))


def round_parts(weight: Tensor, parts: Parts, *, heads: int = 1) -> ResqWeight:
    """Round each weight to the nearest code of the scale with the least squared error.

    Args:
        weight: `[out_features, heads * parts.size]`, any float dtype; computed in float32.
        parts: of the input channels, for `o_proj` of those of each head.
        heads: of the input of `o_proj`.

    Raises:
        NonFiniteError: the weight holds NaN or infinity.
    """
    order = part_order(parts, heads).to(weight.device)
    W = _in_order(weight, order)
    codes = torch.empty(W.shape, dtype=torch.int8, device=W.device)
    scales = []
    for span, bits in _spans(parts, heads):
        scales.append(clipped_scale(W[:, span], bits))
        codes[:, span] = _nearest(W[:, span], scales[-1].float()[:, None], bits)
    return ResqWeight(_as_stored(codes, order), torch.stack(scales, dim=1), parts, heads)


def gptq_parts(weight: Tensor, parts: Parts, prepared: Tensor, *, heads: int = 1) -> ResqWeight:
    """Round column by column; the columns still to come make up for the error of each.

    Columns go part by part, those of all heads together, so that those of the most bits come last
    and make up for what is left. The scale of a part is found when its first column is reached, on
    weights that carry the errors of the parts before, each column weighted by what an error of it
    costs in the end.

    Args:
        weight, parts, heads: as of `round_parts`.
        prepared: of `prepare_hessian`, with the same parts and heads.

    Raises:
        NonFiniteError: the weight holds NaN or infinity.

    Source: algorithm 1 of GPTQ (arXiv:2210.17323).
    """
    order = part_order(parts, heads).to(weight.device)
    W = _in_order(weight, order)
    assert prepared.shape == (W.shape[1],) * 2, "the Hessian belongs to other inputs"
    U = prepared.to(W.device)
    codes = torch.empty(W.shape, dtype=torch.int8, device=W.device)
    scales = []
    for span, bits in _spans(parts, heads):
        scales.append(clipped_scale(W[:, span], bits, column_importance(U.diagonal()[span])))
        for start in range(span.start, span.stop, BLOCK):
            block = slice(start, min(start + BLOCK, span.stop))
            # One column to a row: the inner loop reads and writes contiguous memory.
            columns = W[:, block].T.contiguous()
            block_codes, errors = _round_block(columns, U[block, block], scales[-1].float(), bits)
            codes[:, block] = block_codes.T
            W[:, block.stop :].addmm_(errors.T, U[block, block.stop :], alpha=-1)
    return ResqWeight(_as_stored(codes, order), torch.stack(scales, dim=1), parts, heads)


def prepare_hessian(
    hessian: Tensor, parts: Parts, warn: Callable[[str], None], *, heads: int = 1
) -> Tensor:
    """What `gptq_parts` takes; see `inverse_factor`.

    Args:
        hessian: `[in_features, in_features]` float32 of the inputs as they are quantized, in the
            order of the model, positive semidefinite, in any scale; given away.
        parts, heads: of the linear.
        warn: is told of a damping that had to be raised.

    Raises:
        RilqError: the Hessian is not finite, or not positive definite even when damped.
    """
    if heads > 1:
        order = part_order(parts, heads).to(hessian.device)
        hessian = hessian[order][:, order]
    return inverse_factor(hessian, DAMPING, warn)


def clipped_scale(weight: Tensor, bits: int, importance: Tensor | None = None) -> Tensor:
    """The scale of each output channel with the least squared error, out of a grid of 25.

    Args:
        weight: `[out_features, width]` float32, finite; one part.
        bits: of its codes.
        importance: `[width]`, a factor of each column's squared error.

    Returns:
        `[out_features]` float16, positive and finite. It never does worse than the scale that
        clips nothing, which is the first of the grid.
    """
    found = torch.empty(len(weight), dtype=torch.float16, device=weight.device)
    for chunk in row_chunks(len(weight), weight.shape[1], weight.device):
        found[chunk] = _best_scale(weight[chunk], bits, importance)
    return found


def part_order(parts: Parts, heads: int) -> Tensor:
    """The columns with the first part of every head first, then the second of every head, ...

    Returns:
        `[heads * parts.size]` int64: the column that each place takes.
    """
    places = torch.arange(heads * parts.size).view(heads, -1)
    return torch.cat([part.flatten() for part in places.split(parts.widths, dim=1)])


def fold(weight: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """`W H` in float32, for inputs that are `x H` when they come: `(x H) (W H)^T = x W^T`.

    Args:
        weight: `[out_features, in_features]`, any float dtype; computed in float64.
        factors: float64, of U_D; `H` is their Kronecker product.
    """
    folded = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    for chunk in row_chunks(len(weight), weight.shape[1], weight.device):
        folded[chunk] = kronecker_apply(weight[chunk].double(), factors).float()
    return folded


def _spans(parts: Parts, heads: int) -> Iterator[tuple[slice, int]]:
    """Columns in `part_order` and bits of each part."""
    start = 0
    for bits, width in zip(parts.bits, parts.widths, strict=True):
        yield slice(start, start + width * heads), bits
        start += width * heads


def _as_stored(codes: Tensor, order: Tensor) -> Tensor:
    """The columns back in the order of the model."""
    return torch.empty_like(codes).index_copy_(1, order, codes)


def _in_order(weight: Tensor, order: Tensor) -> Tensor:
    """A copy in float32 with its columns in another order, checked."""
    assert weight.shape[1] == len(order), "the parts are those of another weight"
    W = weight.detach().to(torch.float32)[:, order]
    if not bool(torch.isfinite(torch.stack(torch.aminmax(W))).all()):
        raise NonFiniteError(
            f"weight {list(W.shape)}: {int((~torch.isfinite(W)).sum())} of {W.numel()} values are "
            "NaN or infinite\n"
            "  the checkpoint is damaged or its training diverged; download it again"
        )
    return W.clamp_(-LARGEST_WEIGHT, LARGEST_WEIGHT)


def _round_block(columns: Tensor, U: Tensor, scale: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and scaled errors of one block, both `[block, out]`; see `round_in_turn`."""
    codes = torch.empty(columns.shape, dtype=torch.int8, device=columns.device)

    def rounded(j: int) -> Tensor:
        code = _nearest(columns[j], scale, bits)
        codes[j] = code
        return code * scale

    return codes, round_in_turn(columns, U, rounded)


def _best_scale(weight: Tensor, bits: int, importance: Tensor | None) -> Tensor:
    """`clipped_scale` of few enough rows to hold some copies of them."""
    largest: Tensor = weight.abs().amax(1) / (2 ** (bits - 1) - 1)  # [out]

    def candidate(factor: Tensor | float) -> Tensor:
        scale = (largest * factor).clamp_(SMALLEST_SCALE, LARGEST_SCALE)
        return scale.half().float()

    def error(scale: Tensor) -> Tensor:
        values = _nearest(weight, scale[:, None], bits).mul_(scale[:, None])
        squares = values.sub_(weight).square_()
        return (squares if importance is None else squares.mul_(importance)).sum(1)

    coarse = torch.stack([error(candidate(factor)) for factor in COARSE_FACTORS])
    least, at = coarse.min(0)
    centre = torch.tensor(COARSE_FACTORS, device=weight.device)[at]
    best = candidate(centre)
    for step in FINE_STEPS:
        scale = candidate(centre + step)
        found = error(scale)
        best = torch.where(found < least, scale, best)
        least = torch.minimum(found, least)
    return best.half()


def _nearest(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The nearest codes, as whole numbers in float32."""
    limit = 2 ** (bits - 1)
    codes: Tensor = (weight / scale).round_().clamp_(-limit, limit - 1)
    return codes
