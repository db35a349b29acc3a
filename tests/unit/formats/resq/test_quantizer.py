"""Vectors to codes: grids, their errors and the gradient."""

import pytest
import torch
from torch import Tensor

from rilq.formats.resq.parts import Parts
from rilq.formats.resq.quantizer import dequantize_vectors, quantize_dequantize, quantize_vectors

PARTS = Parts((4, 8), (28, 4))


@pytest.fixture
def x() -> Tensor:
    """Vectors of very different sizes, off centre."""
    drawn = torch.randn(50, 3, 32, generator=torch.Generator().manual_seed(0))
    return drawn * torch.logspace(-3, 3, 50)[:, None, None] + 0.3


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16])
def test_each_part_is_off_by_half_a_step_of_its_own_grid(
    x: Tensor, scale_dtype: torch.dtype
) -> None:
    error = (quantize_dequantize(x, PARTS, scale_dtype=scale_dtype) - x).abs()
    more = 1e-5 if scale_dtype == torch.float32 else 2**-10
    for bits, own, off in zip((4, 8), x.split((28, 4), -1), error.split((28, 4), -1), strict=True):
        extremes = own.amax(-1) - own.amin(-1)
        step = extremes / (2**bits - 1)
        # In float16 the greatest value is off by what rounding scale and zero cost.
        allowed = step / 2 + more * (extremes + own.abs().amax(-1)) + 2**-24 * 2**bits
        assert bool((off.amax(-1) <= allowed).all())


def test_every_code_is_used_and_none_beyond(x: Tensor) -> None:
    low, high = quantize_vectors(x, PARTS).codes.split((28, 4), -1)
    assert (low.min(), low.max()) == (0, 15)
    assert (high.min(), high.max()) == (0, 255)


def test_a_constant_part_comes_back_as_it_is() -> None:
    x = torch.cat([torch.full((2, 28), -3.25), torch.zeros(2, 4)], -1)
    vectors = quantize_vectors(x, PARTS, scale_dtype=torch.float16)
    assert torch.equal(dequantize_vectors(vectors, PARTS, torch.float32), x)


def test_values_beyond_float16_stay_finite_in_a_cache() -> None:
    x = torch.linspace(-1e8, 1e8, 32)[None]
    left = quantize_dequantize(x, PARTS, scale_dtype=torch.float16)
    assert bool(torch.isfinite(left).all())


def test_nan_is_not_quantized_away() -> None:
    x = torch.zeros(1, 32)
    x[0, 3] = torch.nan
    assert bool(quantize_dequantize(x, PARTS)[0, :28].isnan().all())


def test_the_gradient_passes_straight_through(x: Tensor) -> None:
    x.requires_grad_()
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    (quantize_dequantize(x, PARTS) * weight).sum().backward()
    assert torch.equal(x.grad, weight)
