"""Scale and zero-point of each group, and the codes that go with them.

What is stored is float16, so the scale is rounded first, the zero-point is computed from the
rounded scale, and codes and errors are always those of the stored pair. Groups that float16
cannot serve as they are (constant, tiny, huge, or far from zero) get the nearest pair that is
finite; see `grid_of_range`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from rilq.errors import InputError, NonFiniteError
from rilq.formats.spec import GROUP_SIZES, QuantSpec

SMALLEST_SCALE = 2.0**-24  # the smallest positive float16
LARGEST_SCALE = 65504.0  # the largest float16
# A power-of-two scale times the largest zero-point; nothing larger can be told apart.
LARGEST_WEIGHT = 65504.0 * 2.0**15
# Up to 2048 neighbouring float16 numbers are at most 1, a whole code, apart.
LARGEST_PRECISE_ZERO_POINT = 2048.0

SHRINK_FACTORS = 20
SMALLEST_FACTOR = 0.5
# A second round comes near all 20 x 20 pairs (see `search_grid`); a third gains nothing.
REFINEMENTS = 2


def as_groups(weight: Tensor, spec: QuantSpec) -> Tensor:
    """View a weight matrix as groups, after checking that it can be quantized.

    Args:
        weight: `[out_features, in_features]`, any float dtype.
        spec: its group size must divide `in_features`.

    Returns:
        `[out_features, groups, group_size]` float32; the weight's memory where it was float32.

    Raises:
        InputError: the weight is empty, or the group size does not divide `in_features`.
        NonFiniteError: the weight holds NaN or infinity.
    """
    rows, width = weight.shape
    if not weight.numel():
        raise InputError(f"weight [{rows}, {width}]: expected at least one value, found none")
    if width % spec.group_size:
        legal = [str(size) for size in GROUP_SIZES if width % size == 0]
        remedy = f"use --group-size {' or '.join(legal)}" if legal else "no group size divides it"
        raise InputError(
            f"weight [{rows}, {width}]: in_features {width} is not a multiple of "
            f"group size {spec.group_size}\n  {remedy}"
        )
    groups = weight.detach().to(torch.float32).reshape(rows, -1, spec.group_size)
    if not bool(torch.isfinite(groups).all()):
        bad = int((~torch.isfinite(groups)).sum())
        raise NonFiniteError(
            f"weight [{rows}, {width}]: {bad} of {weight.numel()} values are NaN or infinite\n"
            "  the checkpoint is damaged or its training diverged; download it again"
        )
    return groups


def minmax_grid(groups: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero-point from the extremes of each group, nothing clipped.

    Args:
        groups: `[out_features, groups, group_size]` float32, finite.
        spec: bits; a real zero-point `-min / scale`, or an integer one in `0 .. 2**bits - 1`
            with the range widened to hold 0.

    Returns:
        Scale, positive, and zero-point, both `[out_features, groups]` float16 and finite.

    Source: asymmetric min/max, Jacob et al. 2018 (arXiv:1712.05877), eq. 1.
    """
    return grid_of_range(*_extremes(groups), spec)


def search_grid(
    groups: Tensor, spec: QuantSpec, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scale and zero-point that shrink the range of each group for the least squared error.

    Both ends of the range are multiplied by one common factor first (20 from 1 to 0.5), then
    the lower and the upper end each by its own, in two rounds: 100 candidates. All 400 pairs of
    factors lower the error (Frobenius) by another 0.3 % at four times the cost, common factors
    alone leave 5 % more. The extremes are the first candidate, so the error never exceeds that of
    `minmax_grid`.

    Args:
        groups: `[out_features, groups, group_size]` float32, finite.
        spec: bits and kind of zero-point.
        importance: `[groups, group_size]`, a factor of each input channel's squared error.

    Returns:
        As of `minmax_grid`.

    Source: the shrink factors of OmniQuant (arXiv:2308.13137), on a grid instead of learned.
    """
    rows, count, size = groups.shape
    pieces = [
        _search_rows(groups[chunk], spec, importance)
        for chunk in row_chunks(rows, SHRINK_FACTORS * count * size, groups.device)
    ]
    return torch.cat([scale for scale, _ in pieces]), torch.cat([zero for _, zero in pieces])


def encode(groups: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """The nearest code of each weight, given the stored scale and zero-point.

    Args:
        groups: `[out_features, groups, group_size]` float32.
        scale: `[out_features, groups]` float16, positive.
        zero_point: `[out_features, groups]` float16.
        spec: bits.

    Returns:
        `[out_features, groups * group_size]` uint8 in `0 .. 2**bits - 1`.
    """
    rows, count, size = groups.shape
    codes = torch.empty(groups.shape, dtype=torch.uint8, device=groups.device)
    for chunk in row_chunks(rows, count * size, groups.device):
        codes[chunk] = nearest_codes(groups[chunk], scale[chunk], zero_point[chunk], spec)
    return codes.reshape(rows, count * size)


def nearest_codes(weight: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """`encode` of `[..., n]` weights as whole numbers in float32; scale and zero-point `[...]`."""
    steps = weight / scale.to(torch.float32)[..., None]
    return steps.add_(zero_point.to(torch.float32)[..., None]).round_().clamp_(0, spec.max_code)


def _search_rows(
    groups: Tensor, spec: QuantSpec, importance: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`search_grid` of few enough rows to hold 20 copies of them."""
    low, high = _extremes(groups)  # [out, groups]
    groups = groups.clamp(-LARGEST_WEIGHT, LARGEST_WEIGHT)  # whose squares are finite
    factors = torch.linspace(1.0, SMALLEST_FACTOR, SHRINK_FACTORS, device=groups.device)
    lows, highs = (end * factors[:, None, None] for end in (low, high))  # [20, out, groups]
    low, high = _best_range(groups, lows, highs, spec, importance)
    for _ in range(REFINEMENTS):
        low, high = _best_range(groups, lows, high.expand_as(highs), spec, importance)
        low, high = _best_range(groups, low.expand_as(lows), highs, spec, importance)
    return grid_of_range(low, high, spec)


def _best_range(
    groups: Tensor, lows: Tensor, highs: Tensor, spec: QuantSpec, importance: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The range of least error of each group, out of `[candidates, out_features, groups]`."""
    scale, zero_point = grid_of_range(lows, highs, spec)
    best = squared_error(groups, scale, zero_point, spec, importance).argmin(0, keepdim=True)
    return lows.gather(0, best)[0], highs.gather(0, best)[0]


def squared_error(
    groups: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, importance: Tensor | None
) -> Tensor:
    """The (weighted) squared error of each group; scale, zero-point and result `[..., groups]`."""
    values = nearest_codes(groups, scale, zero_point, spec)
    values.sub_(zero_point.to(torch.float32)[..., None]).mul_(scale.to(torch.float32)[..., None])
    error = values.sub_(groups).square_()
    return (error if importance is None else error.mul_(importance)).sum(-1)


def _extremes(groups: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest weight of each group, `[out_features, groups]`."""
    low, high = torch.aminmax(groups, dim=-1)
    return low.clamp(-LARGEST_WEIGHT, LARGEST_WEIGHT), high.clamp(-LARGEST_WEIGHT, LARGEST_WEIGHT)


def grid_of_range(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero-point whose codes span `low .. high`, as well as float16 can.

    The scale is kept in float16's range, and so large that the zero-point is precise to a code.
    A range wider than the largest scale spans is cut, to as much around 0 as it holds.
    """
    if spec.zero_point == "integer":
        return _integer_grid_of_range(low, high, spec)
    width = high - low
    floor = torch.maximum(low.abs(), high.abs()) / LARGEST_PRECISE_ZERO_POINT
    floor.clamp_(min=SMALLEST_SCALE)
    step = torch.maximum(width / spec.max_code, floor).clamp_(max=LARGEST_SCALE)
    scale = step.to(torch.float16)
    # 0 - x and not -x, here and below: zero has one sign in the file.
    zero_point = (0.0 - _lowest(low, high, spec) / scale.to(torch.float32)).to(torch.float16)
    flat = width < floor
    flat_scale, flat_zero_point = _flat_grid(low + width / 2)
    return torch.where(flat, flat_scale, scale), torch.where(flat, flat_zero_point, zero_point)


def _flat_grid(value: Tensor) -> tuple[Tensor, Tensor]:
    """For a group narrower than a step: code 0 stands for its middle.

    The scale is the power of two below the value, so a value of at most 11 significant bits,
    as any bfloat16 or float16 is, comes back exactly; from 2**-38 up, smaller ones are rounded.
    """
    exponent = torch.frexp(value).exponent - 1
    scale = torch.exp2(exponent.clamp(-24, 15).to(torch.float32))
    scale = torch.where(value == 0, 1.0, scale).to(torch.float16)
    return scale, (0.0 - value / scale.to(torch.float32)).to(torch.float16)


def _integer_grid_of_range(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """`grid_of_range` with a whole zero-point in `0 .. 2**bits - 1`."""
    constant = (low == high) & (low.abs() <= LARGEST_SCALE)
    value = low
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    step = ((high - low) / spec.max_code).clamp_(SMALLEST_SCALE, LARGEST_SCALE)
    # A constant is one step away from 0, which float16 and most bfloat16 numbers survive exactly.
    step = torch.where(constant, value.abs().clamp(min=SMALLEST_SCALE), step)
    step = torch.where(value.eq(0) & constant, 1.0, step)
    scale = step.to(torch.float16)
    zero_point = (0.0 - _lowest(low, high, spec) / scale.to(torch.float32)).round_()
    return scale, zero_point.clamp_(0, spec.max_code).to(torch.float16)


def _lowest(low: Tensor, high: Tensor, spec: QuantSpec) -> Tensor:
    """The weight of code 0: `low`, unless the range is wider than the largest scale spans."""
    span = LARGEST_SCALE * spec.max_code
    centred = torch.maximum(low, torch.full_like(low, -span / 2))
    return torch.where(high - low > span, torch.minimum(centred, high - span), low)


def weights_at_once(device: str) -> int:
    """Weights, or candidates for them, in a slice of rows: what a CPU's cache, or a GPU, likes."""
    # On a CPU a float32 copy is a little smaller than what is returned to the system when freed
    # (machine.LARGE_BLOCK): clearing it anew for every operation took a sixth of the time.
    return 2**18 - 2**12 if device == "cpu" else 2**25


def row_chunks(rows: int, row_size: int, device: torch.device) -> Iterator[slice]:
    """Slices of rows that hold at most `weights_at_once`, or a single row."""
    step = max(1, weights_at_once(device.type) // row_size)
    for start in range(0, rows, step):
        yield slice(start, start + step)
