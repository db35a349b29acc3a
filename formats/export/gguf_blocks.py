"""Quantized linears as llama.cpp's blocks: Q4_1, which holds them, and Q2_K, which is fitted.

A Q4_1 block is 32 weights of a row, `d * q + m` with float16 `d` and `m` and q in 0..15: 20 bytes,
5 bits per weight. A Q2_K block is 256 weights of a row in 16 runs of 16, run j of which is
`d * scale_j * q - dmin * min_j` with float16 `d` and `dmin`, `scale_j` and `min_j` in 0..15 and q
in 0..3: 84 bytes, 2.625 bits per weight.

Layouts: `block_q4_1` and `block_q2_K` of ggml-common.h.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rilq.formats.spec import QuantizedLinear

Q4_1_WEIGHTS, Q4_1_BYTES = 32, 20
Q2_K_WEIGHTS, Q2_K_BYTES = 256, 84
RUN = 16  # weights of a Q2_K block that share a scale and a minimum
LEVELS = 15  # of a 4-bit scale or minimum, besides 0

# Units that are tried for the scales and for the minima of a block: those that put its largest
# value at this level. Twice as many lower the error by at most 0.5 %, half as many raise it by 1 %.
_TRIED = tuple(level / 2 for level in range(15, 32))  # 7.5 to 15.5
_REFITS = 3  # rounds; they matter (a fifth less error) where zero-points lie outside the codes
_CHUNK = 1 << 20  # weights that are fitted together: 80 MB of temporaries


def pack_q4_1(linear: QuantizedLinear) -> Tensor:
    """The same weights in Q4_1; only the minimum `-scale * zero_point` is rounded, to float16.

    Args:
        linear: 2, 3 or 4 bits; a group size of 32, 64 or 128 is repeated for every 32 weights.

    Returns:
        `[out_features, in_features / 32 * 20]` uint8.
    """
    rows, width = linear.codes.shape
    assert linear.spec.max_code <= LEVELS, "8-bit codes do not fit into Q4_1"
    scale = linear.scale.to(torch.float16)
    minimum = (-scale.float() * linear.zero_point.float()).to(torch.float16)
    repeat = linear.spec.group_size // Q4_1_WEIGHTS
    halves = torch.stack([scale, minimum], dim=-1).repeat_interleave(repeat, dim=1)
    low, high = linear.codes.view(rows, -1, 2, Q4_1_WEIGHTS // 2).unbind(2)
    blocks = torch.cat([halves.view(torch.uint8), low | high << 4], dim=-1)
    return blocks.reshape(rows, width // Q4_1_WEIGHTS * Q4_1_BYTES)


def unpack_q4_1(packed: Tensor) -> Tensor:
    """Float32 weights `[out_features, in_features]` of what `pack_q4_1` returns."""
    rows = len(packed)
    blocks = packed.reshape(rows, -1, Q4_1_BYTES)
    scale, minimum = blocks[..., :4].contiguous().view(torch.float16).float().chunk(2, dim=-1)
    codes = torch.cat([blocks[..., 4:] & LEVELS, blocks[..., 4:] >> 4], dim=-1)
    return (scale * codes + minimum).reshape(rows, -1)


@dataclass(frozen=True)
class _Fit:
    """Q2_K blocks before they are packed.

    Attributes:
        d, dmin: `[blocks, 1]` float32, representable in float16.
        scale, minimum: `[blocks, 16]` float32, whole numbers in 0..15.
        codes: `[blocks, 16, 16]` float32, whole numbers in 0..3.
    """

    d: Tensor
    dmin: Tensor
    scale: Tensor
    minimum: Tensor
    codes: Tensor

    def errors(self, weight: Tensor) -> Tensor:
        """Squared error of each block, `[blocks]`, against `weight [blocks, 16, 16]`."""
        step, offset = (self.d * self.scale)[..., None], (self.dmin * self.minimum)[..., None]
        return (step * self.codes - offset - weight).square().sum((1, 2))

    def with_nearest_codes(self, weight: Tensor) -> "_Fit":
        """The same grids, with every weight rounded to its nearest code."""
        step, offset = (self.d * self.scale)[..., None], (self.dmin * self.minimum)[..., None]
        codes = torch.where(step == 0, 0, (weight + offset) / step).round_().clamp_(0, 3)
        return replace(self, codes=codes)

    def better_of(self, other: "_Fit", weight: Tensor) -> "_Fit":
        """Block by block, the one with the smaller error."""
        take = other.errors(weight) < self.errors(weight)
        pairs = ((getattr(self, n), getattr(other, n)) for n in self.__dataclass_fields__)
        return _Fit(*(torch.where(take.view(-1, *[1] * (a.dim() - 1)), b, a) for a, b in pairs))


def pack_q2_k(linear: QuantizedLinear) -> Tensor:
    """The weights in Q2_K, with grids and codes that minimise the squared error.

    Args:
        linear: 2 bits; `in_features` a multiple of 256.

    Returns:
        `[out_features, in_features / 256 * 84]` uint8.
    """
    rows, width = linear.codes.shape
    assert linear.spec.bits == 2 and width % Q2_K_WEIGHTS == 0, "no Q2_K for this linear"
    per_block = Q2_K_WEIGHTS // linear.spec.group_size
    codes = linear.codes.reshape(-1, RUN, RUN)  # [blocks, 16, 16]
    scale = linear.scale.reshape(-1, per_block)  # [blocks, groups]
    zero = linear.zero_point.reshape(-1, per_block)
    packed = torch.empty(len(codes), Q2_K_BYTES, dtype=torch.uint8)
    step = _CHUNK // Q2_K_WEIGHTS
    for start in range(0, len(codes), step):
        part = slice(start, start + step)
        fit = _fit(codes[part].float(), scale[part].float(), zero[part].float())
        packed[part] = _pack_fit(fit)
    return packed.reshape(rows, width // Q2_K_WEIGHTS * Q2_K_BYTES)


def unpack_q2_k(packed: Tensor) -> Tensor:
    """Float32 weights `[out_features, in_features]` of what `pack_q2_k` returns."""
    rows = len(packed)
    blocks = packed.reshape(-1, Q2_K_BYTES)
    d, dmin = blocks[:, 80:].contiguous().view(torch.float16).float().chunk(2, dim=1)
    scale, minimum = blocks[:, :RUN] & LEVELS, blocks[:, :RUN] >> 4
    words = blocks[:, RUN:80].reshape(-1, 2, 1, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8).view(1, 1, 4, 1)
    codes = (words >> shifts & 3).reshape(-1, RUN, RUN)
    return ((d * scale)[..., None] * codes - (dmin * minimum)[..., None]).reshape(rows, -1)


def _pack_fit(fit: _Fit) -> Tensor:
    """`[blocks, 84]` uint8."""
    nibbles = fit.scale.to(torch.uint8) | fit.minimum.to(torch.uint8) << 4
    # Byte l of a half holds the codes l, l + 32, l + 64 and l + 96 of its 128.
    parts = fit.codes.to(torch.uint8).reshape(-1, 2, 4, 32)
    words = parts[:, :, 0] | parts[:, :, 1] << 2 | parts[:, :, 2] << 4 | parts[:, :, 3] << 6
    halves = torch.cat([fit.d, fit.dmin], dim=1).to(torch.float16)
    return torch.cat([nibbles, words.flatten(1), halves.view(torch.uint8)], dim=1)


def _fit(codes: Tensor, scale: Tensor, zero_point: Tensor) -> _Fit:
    """Grids and codes near those of some groups.

    Args:
        codes: `[blocks, 16, 16]` float32.
        scale, zero_point: `[blocks, groups]` float32, of the groups that share a block.
    """
    repeat = RUN // scale.shape[1]
    step = scale.repeat_interleave(repeat, dim=1)  # [blocks, 16]
    offset = (scale * zero_point).repeat_interleave(repeat, dim=1)
    weight = step[..., None] * codes - offset[..., None]
    # With these codes, a scale that is off by e costs e^2 times the squares of the codes around
    # their mean: the mean goes into the minimum.
    mean = codes.mean(2)
    squares = (codes - mean[..., None]).square().sum(2)
    spread = squares.view(len(codes), -1, repeat).sum(2)  # [blocks, groups]
    least = torch.full((len(codes), 1), torch.inf)
    d, levels, dmin, minimum = least, step, least, offset
    for unit, level in _grids(scale, spread + 1e-3):  # equal codes still need some scale
        run_level = level.repeat_interleave(repeat, dim=1)
        amiss = unit * run_level - step
        unit_min, level_min, error = _grid(offset + amiss * mean)
        error = RUN * error + (squares * amiss.square()).sum(1, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        d, levels = torch.where(better, unit, d), torch.where(better, run_level, levels)
        dmin = torch.where(better, unit_min, dmin)
        minimum = torch.where(better, level_min, minimum)
    kept = _Fit(d, dmin, levels, minimum, codes)
    best = kept.better_of(kept.with_nearest_codes(weight), weight)
    for _ in range(_REFITS):
        best = best.better_of(_refit(best, weight), weight)
    return best


def _grids(values: Tensor, importance: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Values of each block as `unit * level` with levels in 0..15, in several ways.

    Args:
        values: `[blocks, n]` float32; where signs differ, the weaker sign becomes 0.
        importance: `[blocks, n]`, of each squared error.

    Yields:
        The unit `[blocks, 1]`, representable in float16, and the levels `[blocks, n]`.
    """
    extreme = values.gather(1, values.abs().argmax(1, keepdim=True))  # [blocks, 1], with its sign
    for tried in _TRIED:
        level = _levels(values, _half(extreme / tried))
        among = (importance * level.square()).sum(1, keepdim=True)
        fitted = (importance * level * values).sum(1, keepdim=True) / among
        yield torch.where(among == 0, 0, _half(fitted)), level


def _grid(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The best of `_grids`, all values being as important, and its squared error `[blocks, 1]`."""
    best_unit, best_level = torch.zeros_like(values[:, :1]), torch.zeros_like(values)
    least = torch.full_like(best_unit, torch.inf)
    for unit, level in _grids(values, torch.ones_like(values)):
        error = (values - unit * level).square().sum(1, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        best_unit = torch.where(better, unit, best_unit)
        best_level = torch.where(better, level, best_level)
    return best_unit, best_level, least


def _refit(fit: _Fit, weight: Tensor) -> _Fit:
    """Scales to the codes, minima to the scales, `d` and `dmin` to both, then codes to all."""
    offset = fit.dmin * fit.minimum
    squares = fit.codes.square().sum(2)
    ideal = (fit.codes * (weight + offset[..., None])).sum(2) / squares
    scale = torch.where(squares == 0, fit.scale, _levels(ideal, fit.d))
    residual = (fit.d * scale)[..., None] * fit.codes - weight
    minimum = _levels(residual.mean(2), fit.dmin)
    # Least squares in (d, dmin) with regressors scale * code and -minimum.
    first, second = scale[..., None] * fit.codes, -minimum[..., None].expand_as(weight)
    aa, ab, bb = (
        (x * y).sum((1, 2))[:, None] for x, y in ((first, first), (first, second), (second, second))
    )
    aw, bw = ((x * weight).sum((1, 2))[:, None] for x in (first, second))
    det = aa * bb - ab * ab
    solved = det > 1e-6 * aa * bb
    d = torch.where(solved, _half((aw * bb - bw * ab) / det), fit.d)
    dmin = torch.where(solved, _half((bw * aa - aw * ab) / det), fit.dmin)
    return _Fit(d, dmin, scale, minimum, fit.codes).with_nearest_codes(weight)


def _levels(values: Tensor, unit: Tensor) -> Tensor:
    return torch.where(unit == 0, 0, values / unit).round_().clamp_(0, LEVELS)


def _half(values: Tensor) -> Tensor:
    return values.to(torch.float16).float()
