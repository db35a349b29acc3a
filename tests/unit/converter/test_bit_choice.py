"""The choice of bits is the best there is: compared with every possible one."""

import itertools
import math
from collections.abc import Mapping
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rilq.converter.bit_choice import average_bits, budget, choose_bits

Gains = dict[str, dict[int, float]]

# A few sizes with and without a common divisor; whole numbers as gains, so that sums are exact.
SIZES = st.sampled_from([32, 64, 96, 160, 1000, 1001])
GAIN = st.integers(-3, 12).map(float) | st.just(math.nan)
LINEARS = st.lists(st.tuples(SIZES, GAIN, GAIN), min_size=1, max_size=6)
AVERAGE = st.integers(200, 400).map(lambda hundredths: hundredths / 100)


def problem(linears: list[tuple[int, float, float]]) -> tuple[dict[str, int], Gains]:
    weights = {f"linear{i}": size for i, (size, _, _) in enumerate(linears)}
    gains = {f"linear{i}": {3: three, 4: four} for i, (_, three, four) in enumerate(linears)}
    return weights, gains


def spent(weights: Mapping[str, int], chosen: Mapping[str, int], base: int = 2) -> int:
    return sum(weights[name] * (bits - base) for name, bits in chosen.items())


def gained(gains: Gains, chosen: Mapping[str, int]) -> float:
    return sum(gains[name][bits] for name, bits in chosen.items())


def of_all_choices(weights: Mapping[str, int], gains: Gains, allowed: int) -> tuple[int, float]:
    """The most that can be spent, and the most gained with that, by trying everything."""
    options = []
    for name in weights:
        three, four = gains[name][3], gains[name][4]
        useful = [3] * (three > 0) + [4] * (four > max(0.0, three, key=_number))
        options.append([None, *((name, bits) for bits in useful)])
    results = []
    for picks in itertools.product(*options):
        chosen = dict(pick for pick in picks if pick is not None)
        if spent(weights, chosen) <= allowed:
            results.append((spent(weights, chosen), gained(gains, chosen)))
    return max(results)


def _number(value: float) -> float:
    """Of NaN, which gains nothing, less than anything."""
    return -math.inf if math.isnan(value) else value


@settings(deadline=None, max_examples=300)
@given(LINEARS, AVERAGE)
def test_choice_is_the_best_of_all(linears: list[tuple[int, float, float]], average: float) -> None:
    weights, gains = problem(linears)
    chosen = choose_bits(weights, gains, base=2, average=average)
    allowed = math.floor((Fraction(str(average)) - 2) * sum(weights.values()))
    assert (spent(weights, chosen), gained(gains, chosen)) == of_all_choices(
        weights, gains, allowed
    )


@settings(deadline=None, max_examples=200)
@given(LINEARS, AVERAGE, st.integers(1, 200))
def test_with_a_bounded_table_the_average_is_never_exceeded_and_the_shortfall_is_bounded(
    linears: list[tuple[int, float, float]], average: float, most_units: int
) -> None:
    weights, gains = problem(linears)
    chosen = choose_bits(weights, gains, base=2, average=average, most_units=most_units)
    allowed = budget(sum(weights.values()), 2, average)
    assert spent(weights, chosen) <= allowed
    unit = -(-allowed // most_units)
    most, _ = of_all_choices(weights, gains, 4 * sum(weights.values()))
    less = max(0, min(allowed, most) - (len(weights) + 1) * unit)
    reachable, _ = of_all_choices(weights, gains, less)
    assert spent(weights, chosen) >= reachable - len(weights) * unit


def test_an_average_that_the_sizes_allow_is_met_exactly() -> None:
    weights = {f"linear{i}": 4096 for i in range(20)}
    gains = {name: {3: 1.0 + i, 4: 1.5 + i} for i, name in enumerate(weights)}
    chosen = choose_bits(weights, gains, base=2, average=2.3)
    assert average_bits(weights, chosen, 2) == 2.3
    assert set(chosen) == {f"linear{i}" for i in range(14, 20)} and set(chosen.values()) == {3}


@pytest.mark.parametrize("gain", [-1.0, 0.0, math.nan])
def test_an_alternative_that_gains_nothing_is_never_chosen(gain: float) -> None:
    weights = {"good": 64, "useless": 64}
    gains = {"good": {3: 2.0, 4: 1.0}, "useless": {3: gain, 4: gain}}
    assert choose_bits(weights, gains, base=2, average=4.0) == {"good": 3}


def test_the_base_as_average_gives_nothing_more() -> None:
    assert choose_bits({"a": 64}, {"a": {3: 1.0, 4: 2.0}}, base=2, average=2.0) == {}
    assert choose_bits({}, {}, base=2, average=3.0) == {}


def test_the_choice_keeps_the_order_of_the_linears() -> None:
    weights = {"b": 64, "a": 64, "c": 64}
    gains = {name: {3: 1.0} for name in weights}
    assert list(choose_bits(weights, gains, base=2, average=3.0)) == ["b", "a", "c"]


def test_a_decimal_average_is_not_rounded_down_by_its_binary_form() -> None:
    # In floats (2.3 - 2) * 10 is 2.9999999999999982.
    assert budget(10, 2, 2.3) == 3
