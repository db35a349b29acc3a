"""Half-quadratic quantization: against its iteration written out for one group at a time."""

import pytest
import torch
from quantizer_examples import random_weight, values

from rilq.converter.quantizers.hqq import HqqQuantizer
from rilq.converter.quantizers.rtn import RtnQuantizer
from rilq.formats.spec import QuantSpec

SPECS = [QuantSpec(bits, 32, zero) for bits in (2, 3, 4) for zero in ("real", "integer")]


def group_errors(weight: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """`|W - What|_0.7^0.7` of each group of 32."""
    return (weight - found).abs().pow(0.7).reshape(len(weight), -1, 32).sum(-1)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_no_group_is_worse_than_rounded(spec: QuantSpec) -> None:
    weight = random_weight(32, 128) + 0.2
    found, plain = (
        group_errors(weight, values(q.quantize(weight, spec)))
        for q in (HqqQuantizer(), RtnQuantizer())
    )
    assert bool((found <= plain * (1 + 1e-4)).all())
    if spec == QuantSpec(2, 32):
        assert found.sum() < 0.97 * plain.sum()


def test_zero_points_are_those_of_the_iteration_written_out() -> None:
    weight, spec = random_weight(16, 32), QuantSpec(2, 32)
    linear = HqqQuantizer().quantize(weight, spec)
    start = RtnQuantizer().quantize(weight, spec)
    for row, scale, zero, found in zip(
        weight.tolist(),
        start.scale[:, 0].tolist(),
        start.zero_point[:, 0].tolist(),
        linear.zero_point[:, 0].tolist(),
        strict=True,
    ):
        assert found == pytest.approx(iterate(row, scale, zero), abs=2e-3)


def iterate(row: list[float], scale: float, zero: float) -> float:
    """The best zero-point of 20 turns: shrink the error, then refit the zero-point to the rest."""

    def code(weight: float) -> int:
        return min(max(round(weight / scale + zero), 0), 3)

    def error() -> float:
        return sum(abs(w / scale - (code(w) - zero)) ** 0.7 for w in row)

    candidates = [(error(), zero)]
    penalty = 10.0
    for _ in range(20):
        total = 0.0
        for w in row:
            apart = w / scale - (code(w) - zero)
            size = max(abs(apart) - max(abs(apart), 1e-8) ** -0.3 / penalty, 0.0)
            sparse = size if apart > 0 else -size
            total += code(w) - (w / scale - sparse)
        zero = total / len(row)
        candidates.append((error(), zero))
        penalty *= 1.01
    return min(candidates)[1]
