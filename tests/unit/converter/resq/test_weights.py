"""Weights in parts: on their grid, in the right columns, and better with GPTQ than without."""

import pytest
import torch
from quantizer_examples import correlated_hessian, draw, random_weight
from torch import Tensor

from rilq.converter.hadamard import hadamard_factors
from rilq.converter.resq import weights
from rilq.converter.resq.weights import (
    clipped_scale,
    fold,
    gptq_parts,
    part_order,
    prepare_hessian,
    round_parts,
)
from rilq.errors import NonFiniteError
from rilq.formats.resq.hadamard import kronecker_apply
from rilq.formats.resq.parts import Parts
from rilq.formats.resq.weight import ResqWeight, resq_tensors, resq_weight_from

PARTS = {
    "resq": Parts((4, 8), (42, 6)),
    "equal 4 bits": Parts((2, 4, 6), (6, 36, 6)),
    "uniform": Parts((4,), (48,)),
}


def no_warning(text: str) -> None:
    raise AssertionError(text)


def gptq(weight: Tensor, parts: Parts, hessian: Tensor, heads: int = 1) -> ResqWeight:
    prepared = prepare_hessian(hessian.clone(), parts, no_warning, heads=heads)
    return gptq_parts(weight, parts, prepared, heads=heads)


def output_error(weight: Tensor, found: ResqWeight, hessian: Tensor) -> float:
    error = weight - found.dense()
    return float((error @ hessian * error).sum())


def inputs_hessian(width: int) -> Tensor:
    hessian = correlated_hessian(width)
    return hessian / hessian.diagonal().mean()


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_values_lie_on_the_grid_of_their_part(parts: Parts) -> None:
    weight, hessian = random_weight(24, 96), inputs_hessian(96)
    for found in (round_parts(weight, parts, heads=2), gptq(weight, parts, hessian, heads=2)):
        assert found.scale.shape == (24, len(parts.bits)) and found.scale.dtype == torch.float16
        split = found.codes.unflatten(1, (2, 48)).split(parts.widths, -1)
        for part, bits in enumerate(parts.bits):
            low, high = (int(extreme) for extreme in split[part].aminmax())
            assert -(2 ** (bits - 1)) <= low and high < 2 ** (bits - 1)
            values = found.dense().unflatten(1, (2, 48)).split(parts.widths, -1)[part]
            steps = values / found.scale[:, part].float()[:, None, None]
            torch.testing.assert_close(steps, split[part].float())
        stored = resq_tensors("linear", found)
        assert torch.equal(resq_weight_from(stored, "linear", parts, heads=2).codes, found.codes)


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_rounding_takes_the_nearest_code(parts: Parts) -> None:
    weight = random_weight(24, 48)
    found = round_parts(weight, parts)
    scale = found.scale.float().repeat_interleave(torch.tensor(parts.widths), dim=1)
    half = 2 ** (torch.tensor(parts.bits).repeat_interleave(torch.tensor(parts.widths)) - 1)
    nearest = (weight / scale).round().clamp(-half, half - 1)
    assert torch.equal(found.codes.float(), nearest)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_clipping_comes_near_the_least_squares_scale(bits: int) -> None:
    """A thousand scales are the slow reference; without clipping the error is never less."""
    weight = random_weight(16, 64, seed=bits)
    largest = weight.abs().amax(1) / (2 ** (bits - 1) - 1)

    def error(scale: Tensor) -> Tensor:
        half = 2 ** (bits - 1)
        codes = (weight / scale[:, None]).round().clamp(-half, half - 1)
        return (codes * scale[:, None] - weight).square().sum(1)

    found = error(clipped_scale(weight, bits).float())
    least = torch.stack([error(largest * f) for f in torch.linspace(0.15, 1, 1000)]).amin(0)
    assert (found <= 1.0001 * error(largest.half().float())).all()
    assert found.sum() < 1.02 * least.sum()


def test_clipping_spares_the_columns_that_matter() -> None:
    weight = random_weight(16, 64)
    column = int(weight.abs().sum(0).argmax())
    importance = torch.ones(64)
    importance[column] = 1000.0

    def error(scale: Tensor) -> Tensor:
        codes = (weight / scale.float()[:, None]).round().clamp(-8, 7)
        return (codes * scale.float()[:, None] - weight)[:, column].square()

    plain = error(clipped_scale(weight, 4))
    assert error(clipped_scale(weight, 4, importance)).sum() < plain.sum() / 4


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_gptq_leaves_less_output_error_than_rounding(parts: Parts) -> None:
    weight, hessian = random_weight(32, 96), inputs_hessian(96)
    plain = output_error(weight, round_parts(weight, parts, heads=2), hessian)
    assert output_error(weight, gptq(weight, parts, hessian, heads=2), hessian) < 0.6 * plain


def slow_gptq(weight: Tensor, parts: Parts, hessian: Tensor) -> Tensor:
    """Dense values by the definition: each rounding, and the least-squares answer of the rest."""
    W, H = weight.double().clone(), hessian.double().clone()
    H.diagonal().add_(weights.DAMPING * H.diagonal().mean())
    starts = [sum(parts.widths[:part]) for part in range(len(parts.widths))]
    scale = torch.empty(0)
    for column in range(W.shape[1]):
        if column in starts:
            part = starts.index(column)
            bits, stop = parts.bits[part], column + parts.widths[part]
            costs = [1 / torch.linalg.inv(H[j:, j:])[0, 0] for j in range(column, stop)]
            importance = torch.stack(costs).float()
            scale = clipped_scale(W[:, column:stop].float(), bits, importance / importance.mean())
        half = 2 ** (bits - 1)
        code = (W[:, column] / scale.double()).round().clamp(-half, half - 1)
        error = W[:, column] - code * scale.double()
        inverse = torch.linalg.inv(H[column:, column:])
        W[:, column:] -= error[:, None] * inverse[0] / inverse[0, 0]
    return W.float()


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_gptq_equals_the_slow_reference(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "BLOCK", 16)  # several to a part, and a rest
    weight, hessian = random_weight(12, 48), inputs_hessian(48)
    expected = slow_gptq(weight, parts, hessian)
    torch.testing.assert_close(gptq(weight, parts, hessian).dense(), expected)


def test_columns_of_heads_go_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of one input whose columns are gathered by hand, and put back."""
    head, heads = Parts((4, 8), (14, 2)), 3
    order = part_order(head, heads)
    assert order.tolist()[:15] == [*range(14), 16] and order.tolist()[-2:] == [46, 47]
    assert order.sort().values.equal(torch.arange(48))
    weight, hessian = random_weight(12, 48), inputs_hessian(48)
    gathered = Parts((4, 8), (42, 6))
    by_hand = gptq(weight[:, order], gathered, hessian[order][:, order])
    found = gptq(weight, head, hessian, heads)
    assert torch.equal(found.scale, by_hand.scale)
    assert torch.equal(found.codes[:, order], by_hand.codes)
    assert torch.equal(
        round_parts(weight, head, heads=heads).codes[:, order],
        round_parts(weight[:, order], gathered).codes,
    )


@pytest.mark.parametrize("size", [128, 172, 96, 43])
def test_a_folded_weight_takes_transformed_inputs(size: int) -> None:
    factors = hadamard_factors(size, draw(1))
    weight, x = torch.randn(10, size, generator=draw(2)), torch.randn(5, size, generator=draw(3))
    x = x.double()
    outputs = kronecker_apply(x, factors) @ fold(weight, factors).double().T
    torch.testing.assert_close(outputs, x @ weight.double().T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 1e-12, 3e38])
def test_strange_weights_have_finite_values(value: float) -> None:
    weight = random_weight(4, 48)
    weight[1], weight[2, 3] = 0.0, value
    for found in (
        round_parts(weight, PARTS["resq"]),
        gptq(weight, PARTS["resq"], inputs_hessian(48)),
    ):
        assert (found.scale > 0).all() and found.dense().isfinite().all()
        assert not found.codes[1].any()


def test_a_weight_that_is_not_finite_is_refused() -> None:
    weight = random_weight(4, 48)
    weight[1, 2] = torch.nan
    with pytest.raises(NonFiniteError, match=r"weight \[4, 48\]: 1 of 192 values"):
        round_parts(weight, PARTS["resq"])
