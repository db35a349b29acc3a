"""Random rotations: orthogonal at every size, Hadamard matrices where one can be made."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rilq.converter.hadamard import Rotation, hadamard, hadamard_orders, random_rotation

# Hidden and head sizes of published models, and small ones, that are Hadamard as a whole.
WHOLE = [
    *(1, 2, 4, 8, 12, 20, 24, 28, 36, 40, 44, 48, 52, 60, 64, 80, 96, 100, 104, 112, 120, 128),
    *(144, 192, 256, 576, 640, 768, 896, 960, 1024, 1152, 1536),
]
LARGE = [2048, 2304, 2560, 3072, 3200, 3584, 3840, 4096, 4544, 4608, 5120, 5376, 6656, 7168]
LARGE += [8192, 12288, 16384, 18432]
# Size to the quotient that stays random: no construction here has the other factor of it.
PARTLY = {3: 3, 6: 3, 10: 5, 14: 7, 86: 43, 92: 23, 172: 43, 90: 45, 180: 1, 276: 1}


def rotation(size: int, seed: int = 0) -> Rotation:
    return random_rotation(size, torch.Generator().manual_seed(seed))


def dense(turn: Rotation) -> Tensor:
    """`diag(signs)` times the Kronecker product of all factors, multiplied out."""
    product = torch.ones(1, 1, dtype=torch.float64)
    for factor in turn.factors:
        product = torch.kron(product, factor)
    return turn.signs[:, None] * product


@pytest.mark.parametrize("size", WHOLE)
def test_entries_are_plus_or_minus_one_over_the_root_where_a_hadamard_matrix_is_known(
    size: int,
) -> None:
    matrix = rotation(size).apply(torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(
        matrix.abs() * math.sqrt(size), torch.ones_like(matrix), rtol=0, atol=1e-12
    )
    torch.testing.assert_close(
        matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("size", LARGE)
def test_widths_of_large_models_are_products_of_exact_hadamard_matrices(size: int) -> None:
    orders, rest = hadamard_orders(size)
    assert rest == 1 and math.prod(orders) == size
    for order in orders:
        matrix = hadamard(order)
        assert torch.equal(matrix.abs(), torch.ones_like(matrix))
        assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("size", PARTLY)
def test_the_random_part_is_as_small_as_it_can_be(size: int) -> None:
    orders, rest = hadamard_orders(size)
    assert rest == PARTLY[size] and rest * math.prod(orders) == size


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 260), seed=st.integers(0, 2**32 - 1))
def test_a_rotation_of_any_size_is_orthogonal_and_applied_as_its_dense_matrix(
    size: int, seed: int
) -> None:
    turn = rotation(size, seed)
    matrix = dense(turn)
    assert matrix.shape == (size, size) and matrix.dtype == torch.float64
    identity = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(matrix.T @ matrix, identity, rtol=0, atol=1e-12)
    rows = torch.randn(2, 3, size, dtype=torch.float64)
    torch.testing.assert_close(turn.apply(rows), rows @ matrix, rtol=0, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 4096))
def test_every_order_is_one_that_a_matrix_is_known_for(size: int) -> None:
    orders, rest = hadamard_orders(size)
    assert math.prod(orders) * rest == size and rest % 2 == 1
    for order in orders:
        matrix = hadamard(order)
        assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("size", [64, 43])
def test_the_seed_alone_decides(size: int) -> None:
    once, again, other = (dense(rotation(size, seed)) for seed in (1, 1, 2))
    assert torch.equal(once, again) and not torch.equal(once, other)


def test_a_spike_in_one_channel_is_spread_evenly() -> None:
    spike = torch.zeros(896, dtype=torch.float64)
    spike[17] = 30.0
    turned = rotation(896).apply(spike)
    torch.testing.assert_close(turned.abs(), torch.full_like(turned, 30 / math.sqrt(896)))
