"""Which linears get more bits, so that the average over all weights is the one asked for.

A knapsack: every linear takes the base's bits or one of its alternatives, which costs
`weights * (bits - base)` and gains what it takes off the error of its decoder layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

import torch
from torch import Tensor

# Table of the exact solution: sizes of Llama models have a large common divisor, and up to 405B
# (48,000 units of 2^24 weights) they stay below this.
MOST_UNITS = 1 << 16


def budget(weights: int, base: int, average: float) -> int:
    """Code bits that an average allows above `base` bits for each of so many weights.

    The average is taken as the decimal number that it is written as: 2.3 of 10 weights are 23.
    """
    return math.floor((Fraction(str(average)) - base) * weights)


def choose_bits(
    weights: Mapping[str, int],
    gains: Mapping[str, Mapping[int, float]],
    *,
    base: int,
    average: float,
    most_units: int = MOST_UNITS,
) -> dict[str, int]:
    """Spend as much of the bits above the base as the sizes allow, where they gain most.

    An alternative that gains nothing over one of fewer bits (the base's gain is 0) is never
    chosen, however much of the average stays unused. Among the choices whose total comes nearest
    to the average from below, the one of the greatest sum of gains is taken.

    Exact while what is to be spent has at most `most_units` units of the costs' common divisor.
    Beyond, a unit is larger and each linear's cost is rounded up to it: never more than the
    average, and at least what the sizes allow for `linears + 1` units less, less one unit for each
    linear (of 1000 linears at most 3 % of what is spent, were it all waste).

    Args:
        weights: number of weights by linear.
        gains: by linear and bits, all above `base`; NaN is no gain.
        base: bits of a linear that gets no more.
        average: code bits per weight at most.

    Returns:
        Bits of the linears that get more than `base`.
    """
    useful = {name: _useful(gains.get(name, {})) for name in weights}
    costs = {n: {b: weights[n] * (b - base) for b in options} for n, options in useful.items()}
    most = sum(max(each.values(), default=0) for each in costs.values())
    spend = min(most, budget(sum(weights.values()), base, average))
    if spend <= 0:
        return {}
    unit = math.gcd(*(cost for each in costs.values() for cost in each.values()))
    unit = max(unit, -(-spend // most_units))
    units = {n: {b: -(-cost // unit) for b, cost in each.items()} for n, each in costs.items()}
    best = torch.full((spend // unit + 1,), -math.inf, dtype=torch.float64)
    best[0] = 0.0
    taken: dict[str, Tensor] = {}  # bits of each linear by the units spent with it
    for name, options in useful.items():
        best, taken[name] = _with(best, base, options, units[name])
    left = int(best.isfinite().nonzero().max())
    chosen = {}
    for name in reversed(taken):
        if (bits := int(taken[name][left])) != base:
            chosen[name] = bits
            left -= units[name][bits]
    return {name: chosen[name] for name in weights if name in chosen}


def average_bits(weights: Mapping[str, int], chosen: Mapping[str, int], base: int) -> float:
    """Code bits per weight where linears that `chosen` does not name have `base`."""
    total = sum(weights.values())
    return sum(w * chosen.get(n, base) for n, w in weights.items()) / total if total else base


def _useful(gains: Mapping[int, float]) -> dict[int, float]:
    """Those that gain more than every one of fewer bits."""
    useful: dict[int, float] = {}
    most = 0.0
    for bits, gain in sorted(gains.items()):
        if gain > most:
            useful[bits] = most = gain
    return useful


def _with(
    best: Tensor, base: int, gains: Mapping[int, float], units: Mapping[int, int]
) -> tuple[Tensor, Tensor]:
    """Greatest gain for each number of units spent, with one linear more; and that one's bits.

    Args:
        best: without it, `[units + 1]` float64; minus infinity where nothing adds up to it.
    """
    found, taken = best.clone(), torch.full(best.shape, base, dtype=torch.uint8)
    for bits, gain in gains.items():
        cost = units[bits]
        if cost >= len(best):
            continue
        moved = best[:-cost] + gain
        better = moved > found[cost:]
        found[cost:] = torch.where(better, moved, found[cost:])
        taken[cost:][better] = bits
    return found, taken
