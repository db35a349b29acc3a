"""Closed forms against slow references: full decompositions, gradients, LoftQ's own loop."""

import math

import pytest
import torch
from torch import Tensor

from rilq.converter.low_rank import (
    closed_form,
    correction,
    loftq,
    normal_float,
    normal_levels,
    pooled_error,
    pooled_hessian,
    svd_adapter,
    weighted_svd_adapter,
)

GROUP = 4
SHAPES = [(6, 12), (20, 12), (12, 12)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def hessian_of(width: int, tokens: int = 40, seed: int = 1) -> Tensor:
    """`X^T X` of inputs whose channels differ in size and are correlated."""
    x = draw(tokens, width, seed=seed) * torch.linspace(0.2, 3, width, dtype=torch.float64)
    x = x + x.roll(1, dims=1) / 2
    return x.T @ x / tokens


def pooling(width: int) -> Tensor:
    """`P [in, groups]`: 1 where the channel is in the group."""
    groups = torch.arange(width) // GROUP
    return torch.nn.functional.one_hot(groups).to(torch.float64)


def loss(error: Tensor, hessian: Tensor, b: Tensor, a: Tensor) -> Tensor:
    """The weighted squared error that is left, by its definition."""
    left = error - b @ a
    return (left @ hessian @ left.T).trace()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_svd_adapter_is_the_truncated_decomposition(shape: tuple[int, int], rank: int) -> None:
    error = draw(*shape)
    b, a = svd_adapter(error, rank)
    u, s, vt = torch.linalg.svd(error, full_matrices=False)
    torch.testing.assert_close(b @ a, u[:, :rank] * s[:rank] @ vt[:rank])
    assert b.shape == (shape[0], rank) and a.shape == (rank, shape[1])


def test_singular_values_are_split_evenly() -> None:
    b, a = svd_adapter(draw(8, 12), 3)
    singular = torch.linalg.svdvals(draw(8, 12))[:3]
    torch.testing.assert_close(b.T @ b, torch.diag(singular))
    torch.testing.assert_close(a @ a.T, torch.diag(singular))


def test_factors_of_a_larger_rank_begin_with_those_of_a_smaller_one() -> None:
    (b, a), (wide_b, wide_a) = svd_adapter(draw(8, 12), 2), svd_adapter(draw(8, 12), 5)
    torch.testing.assert_close(wide_b[:, :2] @ wide_a[:2], b @ a)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3])
def test_weighted_adapter_is_the_decomposition_in_the_metric_of_the_inputs(
    shape: tuple[int, int], rank: int
) -> None:
    error, hessian = draw(*shape), hessian_of(shape[1])
    values, vectors = torch.linalg.eigh(hessian)  # EoRA's way, root and inverse
    root = vectors * values.sqrt()
    u, s, vt = torch.linalg.svd(error @ root, full_matrices=False)
    expected = u[:, :rank] * s[:rank] @ vt[:rank] @ torch.linalg.inv(root)
    b, a = weighted_svd_adapter(error, hessian, rank)
    torch.testing.assert_close(b @ a, expected)


@pytest.mark.parametrize("pooled", [False, True])
def test_gradient_descent_from_anywhere_ends_at_the_closed_form(pooled: bool) -> None:
    error, hessian = draw(8, 12), hessian_of(12)
    spread = pooling(12).T if pooled else torch.eye(12, dtype=torch.float64)
    b, a = closed_form(error, 2, group_size=GROUP if pooled else None, hessian=hessian)
    least = loss(error, hessian, b, a @ spread).item()
    for seed in range(3):
        left = draw(8, 2, seed=10 + seed).requires_grad_()
        right = draw(2, len(spread), seed=20 + seed).requires_grad_()
        search = torch.optim.LBFGS([left, right], max_iter=2000, line_search_fn="strong_wolfe",
                                   tolerance_grad=1e-10, tolerance_change=1e-14)  # fmt: skip

        def closure(left: Tensor = left, right: Tensor = right) -> Tensor:
            search.zero_grad()  # noqa: B023
            value = loss(error, hessian, left, right @ spread)
            value.backward()
            return value

        search.step(closure)
        found = loss(error, hessian, left, right @ spread).item()
        assert found >= least * (1 - 1e-9)
        assert math.isclose(found, least, rel_tol=1e-5)


def test_weighted_adapter_needs_no_inverse_of_a_singular_hessian() -> None:
    error, hessian = draw(8, 12), hessian_of(12, tokens=5)
    b, a = weighted_svd_adapter(error, hessian, 3)
    x = torch.linalg.eigh(hessian)
    outputs = error @ (x.eigenvectors * x.eigenvalues.clamp(min=0).sqrt())
    least = torch.linalg.svdvals(outputs)[3:].square().sum()
    torch.testing.assert_close(loss(error, hessian, b, a), least)


def test_full_rank_leaves_no_error() -> None:
    for error in (draw(6, 12), draw(20, 12)):
        for factors in (svd_adapter(error, 12), weighted_svd_adapter(error, hessian_of(12), 12)):
            torch.testing.assert_close(correction(*factors), error)


def test_pooled_error_without_a_hessian_is_the_mean_of_each_group() -> None:
    error = draw(5, 12)
    expected = torch.stack([error[:, i : i + GROUP].mean(1) for i in range(0, 12, GROUP)], dim=1)
    torch.testing.assert_close(pooled_error(error, GROUP), expected)


def test_pooled_error_is_the_generalised_least_squares_solution() -> None:
    error, hessian, p = draw(5, 12), hessian_of(12), pooling(12)
    root = torch.linalg.cholesky(hessian)  # E L = C (P^T L) + residual, row by row
    expected = torch.linalg.lstsq((p.T @ root).T, (error @ root).T).solution.T
    torch.testing.assert_close(pooled_error(error, GROUP, hessian), expected)
    torch.testing.assert_close(pooled_hessian(hessian, GROUP), p.T @ hessian @ p)


def test_channels_that_are_never_used_do_not_spoil_a_pooled_fit() -> None:
    error, hessian = draw(5, 12), hessian_of(12)
    hessian[:GROUP] = hessian[:, :GROUP] = 0
    b, a = closed_form(error, 2, group_size=GROUP, hessian=hessian)
    assert torch.isfinite(b).all() and torch.isfinite(a).all()
    rest, small = error[:, GROUP:], hessian[GROUP:, GROUP:]
    alone = closed_form(rest, 2, group_size=GROUP, hessian=small)
    spread = correction(b, a, GROUP)[:, GROUP:]
    torch.testing.assert_close(spread, correction(*alone, GROUP))


def test_a_pooled_fit_has_at_most_as_many_factors_as_groups() -> None:
    b, a = closed_form(draw(8, 12), 16, group_size=GROUP, hessian=hessian_of(12))
    assert b.shape == (8, 3) and a.shape == (3, 3)


def test_single_precision_agrees_with_double() -> None:
    error, hessian = draw(32, 64), hessian_of(64, tokens=500)
    for group_size in (None, GROUP):
        exact = correction(*closed_form(error, 5, group_size=group_size, hessian=hessian),
                           group_size)  # fmt: skip
        b, a = closed_form(error.float(), 5, group_size=group_size, hessian=hessian.float())
        assert b.dtype == a.dtype == torch.float32
        torch.testing.assert_close(correction(b, a, group_size).double(), exact, rtol=0, atol=1e-4)


def to_steps(weight: Tensor) -> tuple[str, Tensor]:
    """A quantizer: whole steps of a half, clipped."""
    return "codes", (weight * 2).round().clamp(-2, 2) / 2


def test_one_round_of_loftq_is_the_plain_decomposition() -> None:
    weight = draw(8, 12)
    label, (b, a) = loftq(weight, to_steps, 3, rounds=1)
    plain_b, plain_a = svd_adapter(weight - to_steps(weight)[1], 3)
    assert label == "codes"
    torch.testing.assert_close(b @ a, plain_b @ plain_a)


def test_loftq_keeps_the_best_of_the_rounds_of_its_slow_reference() -> None:
    weight = draw(16, 12, seed=3)
    residual, errors = weight.clone(), []
    for _ in range(5):  # the released loop
        value = to_steps(residual)[1]
        u, s, vt = torch.linalg.svd(weight - value, full_matrices=False)
        low = u[:, :3] * s[:3] @ vt[:3]
        residual = weight - low
        errors.append((weight - value - low).norm().item())
    values: list[Tensor] = []

    def quantize(part: Tensor) -> tuple[int, Tensor]:
        values.append(to_steps(part)[1])
        return len(values) - 1, values[-1]

    best, (b, a) = loftq(weight, quantize, 3, rounds=5)
    assert best == min(range(5), key=errors.__getitem__) and min(errors) < errors[0]
    assert math.isclose((weight - values[best] - b @ a).norm().item(), min(errors), rel_tol=1e-9)


def test_levels_of_normal_float_are_those_of_the_released_code() -> None:
    # create_normal_map(num_bits=4) is NF4, whose levels QLoRA prints in its appendix E.
    nf4 = [
        *(-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0),
        *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
    ]
    torch.testing.assert_close(normal_levels(4).float(), torch.tensor(nf4), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        normal_levels(2), torch.tensor([-1, 0, 0.33792, 1], dtype=torch.float64), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_normal_float_takes_the_nearest_level_of_each_group(bits: int) -> None:
    weight = draw(5, 12)
    weight[0, :GROUP] = 0
    rounded, levels = normal_float(weight, bits, GROUP), normal_levels(bits).tolist()
    for row in range(5):
        for start in range(0, 12, GROUP):
            group = weight[row, start : start + GROUP].tolist()
            largest = max(map(abs, group))
            for offset, value in enumerate(group):
                nearest = min((level * largest for level in levels), key=lambda x: abs(x - value))
                assert math.isclose(rounded[row, start + offset].item(), nearest, abs_tol=1e-12)
