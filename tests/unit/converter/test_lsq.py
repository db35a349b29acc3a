"""Least squares: against every way to give sorted weights codes, and against coarser grids."""

from itertools import combinations_with_replacement

import pytest
import torch
from quantizer_examples import (
    correlated_hessian,
    draw,
    proxy_loss,
    quantized,
    random_weight,
    values,
)
from torch import Tensor

from rilq.converter.quantizers import build_quantizer
from rilq.converter.quantizers.grid import as_groups, encode, minmax_grid, squared_error
from rilq.converter.quantizers.lsq import group_importance, lsq_grid, start_grid
from rilq.formats.spec import QuantizedLinear, QuantSpec

SPECS = [QuantSpec(bits, 32, zero) for bits in (2, 3, 4, 8) for zero in ("real", "integer")]


def least_error(group: Tensor, importance: Tensor) -> float:
    """The least weighted squared error that any scale, zero-point and codes of 2 bits can have.

    With nearest codes, sorted weights have sorted codes: three cuts say them all. For each, the
    best scale and minimum are the weighted regression; all in float64.
    """
    order = group.argsort()
    weight, factor = group[order].double(), importance[order].double()
    size = len(group)
    cuts = torch.tensor(list(combinations_with_replacement(range(size + 1), 3)))
    codes = (torch.arange(size)[None, :, None] >= cuts[:, None]).sum(-1).double()  # [ways, size]
    mean_code = (codes * factor).sum(1, keepdim=True) / factor.sum()
    mean = (weight * factor).sum() / factor.sum()
    spread = ((codes - mean_code).square() * factor).sum(1)
    slope = ((codes - mean_code) * (weight - mean) * factor).sum(1) / spread.clamp(min=1e-30)
    error = mean + slope[:, None] * (codes - mean_code) - weight
    return float((error.square() * factor).sum(1).amin())


@pytest.mark.parametrize(("size", "bound"), [(16, 1.05), (32, 1.01)])
@pytest.mark.parametrize("weighted", [False, True])
def test_error_comes_near_the_least_of_all_codes_scales_and_zero_points(
    size: int, bound: float, weighted: bool
) -> None:
    groups = random_weight(24, size, seed=size).reshape(24, 1, size)
    importance = torch.rand(24, 1, size, generator=draw(1)) ** 4 + 1e-3
    importance = importance if weighted else torch.ones_like(importance)
    spec = QuantSpec(2, 32)
    found = squared_error(groups, *lsq_grid(groups, spec, importance), spec, importance).flatten()
    least = torch.tensor([least_error(g[0], i[0]) for g, i in zip(groups, importance, strict=True)])
    assert bool((found >= least * 0.999).all()), "nothing is better than all"
    assert found.sum() < bound * least.sum()


@pytest.mark.parametrize("importance", [None, torch.rand(3, 32, generator=draw(9)) ** 4])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_error_is_never_above_that_of_the_extremes(
    spec: QuantSpec, importance: Tensor | None
) -> None:
    groups = as_groups(random_weight(32, 96), spec)
    fitted, plain = (
        squared_error(groups, *grid, spec, importance)
        for grid in (lsq_grid(groups, spec, importance), minmax_grid(groups, spec))
    )
    assert bool((fitted <= plain).all())
    if spec.bits == 2:
        assert fitted.sum() < 0.75 * plain.sum()


def test_weights_on_a_grid_are_found_exactly() -> None:
    """Scale 3/64, so that float16 holds the values too, and zero-points that are no integers."""
    scale = 0.046875
    zero_point = torch.linspace(-2, 6, 20).mul(64).round().div(64)[:, None, None]
    codes = torch.randint(0, 4, (20, 1, 32), generator=draw())
    groups = scale * (codes - zero_point)
    importance = torch.rand(1, 32, generator=draw(1)) + 0.01
    found_scale, found_zero = lsq_grid(groups, QuantSpec(2, 32), importance)
    assert found_scale.eq(scale).all()
    torch.testing.assert_close(found_zero.float(), zero_point[..., 0], rtol=2**-10, atol=2**-10)
    assert encode(groups, found_scale, found_zero, QuantSpec(2, 32)).equal(
        codes.flatten(1).to(torch.uint8)
    )


def test_weighted_error_is_below_that_of_the_clip_search() -> None:
    weight, spec = random_weight(32, 128), QuantSpec(2, 32)
    diagonal = correlated_hessian(128).diagonal().diag()
    groups = as_groups(weight, spec)
    importance = group_importance(diagonal.diagonal(), groups)
    grid = start_grid(groups, spec, "search", importance)
    searched = QuantizedLinear(encode(groups, *grid, spec), *grid, spec)
    fitted = quantized(build_quantizer("lsq"), weight, spec, diagonal)
    assert proxy_loss(weight, fitted, diagonal) < 0.95 * proxy_loss(weight, searched, diagonal)


def test_error_feedback_beats_its_start() -> None:
    weight, hessian, spec = random_weight(32, 128), correlated_hessian(128), QuantSpec(2, 32)
    start = proxy_loss(weight, quantized(build_quantizer("lsq"), weight, spec, hessian), hessian)
    end = proxy_loss(weight, quantized(build_quantizer("gptq"), weight, spec, hessian), hessian)
    assert end < 0.6 * start  # 0.36 here


def test_without_data_all_weights_count_alike() -> None:
    weight, spec = random_weight(8, 64), QuantSpec(2, 32)
    blind = quantized(build_quantizer("lsq"), weight, spec, torch.zeros(64, 64))
    plain = build_quantizer("rtn", clip="lsq").quantize(weight, spec)
    assert values(blind).equal(values(plain))


def test_channels_never_used_keep_a_little_weight() -> None:
    squares = torch.tensor([0.0, 2.0] * 16)
    importance = group_importance(squares, torch.zeros(5, 1, 32))
    assert importance is not None and importance.shape == (1, 32)
    assert torch.tensor([1e-4, 2.0]).equal(importance[0, :2])
    assert group_importance(torch.zeros(32), torch.zeros(5, 1, 32)) is None
