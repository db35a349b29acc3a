"""The spectrum of quantization errors against full decompositions."""

import pytest
import torch

from rilq.converter.spectrum import POINTS, SpectrumSum


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_figures_are_those_of_the_full_decompositions() -> None:
    pairs = [(draw(8, 12, seed=0), draw(8, 12, seed=1)), (draw(20, 6, seed=2), draw(20, 6, seed=3))]
    total = SpectrumSum(2, [1, 4, 100])
    for weight, error in pairs:
        total.add(weight, error)
    found = total.result()
    squares = [torch.linalg.svdvals(error).square() for _, error in pairs]
    all_errors = sum(s.sum().item() for s in squares)
    assert found.relative_error == pytest.approx(
        all_errors / sum(w.square().sum().item() for w, _ in pairs)
    )
    for rank in (1, 4, 100):
        removed = sum(s[:rank].sum().item() for s in squares)
        assert found.captured[rank] == pytest.approx(removed / all_errors)
    shares = [s / w.square().sum() for s, (w, _) in zip(squares, pairs, strict=True)]
    for end in (0, -1):
        mean = sum(s[end].item() for s in shares) / 2
        assert found.singular_values[end] == pytest.approx(mean**0.5, rel=1e-4)
    assert (found.positions[0], found.positions[-1], len(found.positions)) == (0, 1, POINTS)
    assert list(found.singular_values) == sorted(found.singular_values, reverse=True)


def test_between_two_singular_values_the_curve_is_between_them() -> None:
    total = SpectrumSum(2, [1])
    total.add(torch.eye(3), torch.diag(torch.tensor([3.0, 2.0, 1.0])))
    squares = [value**2 * 3 for value in total.result().singular_values]  # |W|^2 is 3
    quarter = (POINTS - 1) // 4  # nearly halfway from the first to the second
    expected = 9 + (4 - 9) * 2 * quarter / (POINTS - 1)
    assert squares[quarter] == pytest.approx(expected)


def test_one_singular_value_is_a_flat_curve() -> None:
    total = SpectrumSum(4, [1])
    total.add(torch.full((1, 4), 2.0), torch.full((1, 4), 0.5))
    assert total.result().singular_values == pytest.approx([0.25] * POINTS)
    assert total.result().captured == {1: pytest.approx(1.0)}
