"""Least squares: the scale and the real-valued zero-point that fit each group's weights best."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rilq.converter.options import Clip
from rilq.converter.quantizers.grid import (
    LARGEST_WEIGHT,
    as_groups,
    encode,
    grid_of_range,
    minmax_grid,
    row_chunks,
    search_grid,
    squared_error,
)
from rilq.formats.spec import QuantizedLinear, QuantSpec

# Ranges to begin from: so many widths, from the whole one to the smallest, each at so many places
# from one end to the other. In the middle alone, groups of 32 weights with uneven importance end
# 10 % above the least possible error (tests/unit/converter/test_lsq.py); so spread, 0.1 %.
WIDTHS, SMALLEST, PLACES = 5, 0.3, 5
# And then widths around the best: what matters at 8 bits, where codes hardly move.
FINE, NEAR = 9, 0.05
# Codes and fit settle in a few turns: more than 2 per candidate, or 8 at the end, gain nothing.
TURNS, LAST_TURNS = 2, 8


def lsq_grid(
    groups: Tensor, spec: QuantSpec, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scale and zero-point of least (weighted) squared error, found by alternation.

    For given codes the best scale and minimum are a weighted linear regression of the weights on
    the codes; for a given scale and minimum the best codes are the nearest. Alternating the two
    never raises the error. It is begun from ranges of several widths at several places within the
    group's, and the best end is kept; where the extremes do better, they are.

    Args:
        groups: `[out_features, groups, group_size]` float32, finite.
        spec: bits and kind of zero-point; an integer one is fitted by rounding the real one.
        importance: a factor of each weight's squared error, in any scale, `[groups, group_size]`
            or for each row by itself; None weighs all alike.

    Returns:
        As of `grid.minmax_grid`; the error never exceeds that of `minmax_grid`.

    Source: NeUQI (arXiv:2505.17595): real-valued zero-points, a search of the scale, weights of
    the Hessian's diagonal; here with regression in the place of its case analysis.
    """
    rows, count, size = groups.shape
    pieces = [
        _fit_rows(groups[chunk], spec, importance)
        for chunk in row_chunks(rows, WIDTHS * PLACES * count * size, groups.device)
    ]
    return torch.cat([scale for scale, _ in pieces]), torch.cat([zero for _, zero in pieces])


@dataclass(frozen=True)
class LsqQuantizer:
    """Nearest codes on the grid of `lsq_grid`, weighted by the inputs' mean squares."""

    name = "lsq"
    needs_hessian = True

    def prepare(self, hessian: Tensor, warn: Callable[[str], None]) -> Tensor:
        """The diagonal of the Hessian, `[in_features]`."""
        return hessian.diagonal().to(torch.float32, copy=True)  # a view would keep all of it

    def quantize(
        self, weight: Tensor, spec: QuantSpec, prepared: Tensor | None = None
    ) -> QuantizedLinear:
        """Quantize one weight matrix; see `Quantizer`."""
        assert prepared is not None, "lsq needs the Hessian of the linear's inputs"
        groups = as_groups(weight, spec)
        scale, zero_point = lsq_grid(groups, spec, group_importance(prepared, groups))
        return QuantizedLinear(encode(groups, scale, zero_point, spec), scale, zero_point, spec)


def start_grid(
    groups: Tensor, spec: QuantSpec, clip: Clip, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The grid that `clip` names: of the extremes, searched, or by least squares.

    Args:
        groups: `[out_features, groups, group_size]` float32, finite.
        importance: see `lsq_grid`; the extremes do not depend on it.

    Returns:
        As of `grid.minmax_grid`.
    """
    if clip == "none":
        return minmax_grid(groups, spec)
    return (search_grid if clip == "search" else lsq_grid)(groups, spec, importance)


def group_importance(squares: Tensor, groups: Tensor) -> Tensor | None:
    """Mean squares of input channels as `importance` of their groups.

    A channel that the calibration never used keeps a little weight, so that it is not left to
    chance; where no channel was used, all weigh alike.

    Args:
        squares: `[in_features]`, of the inputs.
        groups: `[out_features, groups, group_size]`.

    Returns:
        `[groups, group_size]` float32 of mean 1, or None.
    """
    squares = squares.to(groups.device, torch.float32).view(groups.shape[1:])
    mean = squares.mean()
    if not bool(torch.isfinite(mean)) or mean == 0:
        return None
    return (squares / mean).clamp(min=1e-4)


def _fit_rows(groups: Tensor, spec: QuantSpec, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """`lsq_grid` of few enough rows to hold a copy of them for each candidate."""
    groups = groups.clamp(-LARGEST_WEIGHT, LARGEST_WEIGHT)
    low, high = torch.aminmax(groups, dim=-1)
    middle, half = (low + high) / 2, (high - low) / 2  # [out, groups]
    # In units of half the group's range: every candidate then works on numbers around 1.
    unit = half.clamp(min=torch.finfo(torch.float32).tiny)
    weights = (groups - middle[..., None]) / unit[..., None]
    factor = torch.ones_like(weights[:1]) if importance is None else importance.expand_as(weights)
    device = groups.device
    widths = torch.linspace(1.0, SMALLEST, WIDTHS, device=device)[:, None].expand(-1, PLACES)
    places = torch.linspace(-1.0, 1.0, PLACES, device=device) * (1 - widths)
    starts = torch.stack([widths, places]).reshape(2, -1, 1, 1).expand(2, -1, *middle.shape)
    errors = _fit(weights, factor, starts[0], starts[1], spec)[2]  # [candidates, out, groups]
    width, place = starts.gather(1, errors.argmin(0).expand(2, 1, -1, -1))
    near = torch.linspace(-NEAR, NEAR, FINE, device=device)[:, None, None]
    scales, lows, errors = _fit(weights, factor, width + near, place, spec)
    pick = errors.argmin(0, keepdim=True)
    scales, lows = scales.gather(0, pick), lows.gather(0, pick)
    for _ in range(LAST_TURNS):
        scales, lows = _regress(weights, factor, scales, lows, spec)
    lowest = lows[0] * unit + middle
    grid = grid_of_range(lowest, lowest + scales[0] * unit * spec.max_code, spec)
    plain = minmax_grid(groups, spec)
    better = squared_error(groups, *grid, spec, importance) < squared_error(
        groups, *plain, spec, importance
    )
    return torch.where(better, grid[0], plain[0]), torch.where(better, grid[1], plain[1])


def _fit(
    weights: Tensor, factor: Tensor, widths: Tensor, places: Tensor, spec: QuantSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, lowest value and error from each range to begin with, `[candidates, out, groups]`."""
    scale, low = 2 * widths / spec.max_code, places - widths
    for _ in range(TURNS):
        scale, low = _regress(weights, factor, scale, low, spec)
    error = _codes(weights, scale, low, spec).mul_(scale[..., None]).add_(low[..., None])
    return scale, low, error.sub_(weights).square_().mul_(factor).sum(-1)


def _regress(
    weights: Tensor, factor: Tensor, scale: Tensor, low: Tensor, spec: QuantSpec
) -> tuple[Tensor, Tensor]:
    """Nearest codes, and the weighted regression of the weights on them."""
    codes = _codes(weights, scale, low, spec)
    total = factor.sum(-1)
    weighted = codes * factor
    sum_code, sum_square = weighted.sum(-1), (weighted * codes).sum(-1)
    sum_weight, sum_both = (factor * weights).sum(-1), (weighted * weights).sum(-1)
    spread = sum_square - sum_code.square() / total
    # All weights at one code: nothing can be said about the scale.
    useful = spread > 1e-6 * total
    slope = (sum_both - sum_code * sum_weight / total) / torch.where(useful, spread, 1.0)
    slope = torch.where(useful & (slope > 0), slope, scale)
    return slope, (sum_weight - slope * sum_code) / total


def _codes(weights: Tensor, scale: Tensor, low: Tensor, spec: QuantSpec) -> Tensor:
    """Nearest codes as floats, `[candidates, out, groups, group_size]`."""
    codes = (weights - low[..., None]).div_(scale[..., None])
    return codes.round_().clamp_(0, spec.max_code)
