"""Sums over a linear's inputs."""

import pytest
import torch

from rilq.calib import statistics
from rilq.calib.statistics import HessianSum


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_hessian_is_the_mean_outer_product() -> None:
    total = HessianSum(2, "cpu")
    total.add(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    assert total.tokens == 2
    assert total.value().tolist() == [[5.0, 1.0], [1.0, 2.0]]


def test_hessian_by_batches_equals_hessian_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs(6, 7, 16)
    at_once, by_batches = HessianSum(16, "cpu"), HessianSum(16, "cpu")
    at_once.add(x)
    monkeypatch.setattr(statistics, "CHUNK", 5)  # so that a batch is summed in pieces, too
    for batch in (x[:1], x[1:3], x[3:]):
        by_batches.add(batch)
    assert by_batches.tokens == at_once.tokens == 42
    torch.testing.assert_close(by_batches.value(), at_once.value(), rtol=1e-5, atol=1e-6)


def test_sums_are_float32_whatever_the_inputs_are() -> None:
    x = torch.full((4096, 1), 1.0, dtype=torch.bfloat16)
    total = HessianSum(1, "cpu")
    for _ in range(3):
        total.add(x)
    # bfloat16 stops counting ones at 256
    assert total.value().dtype == torch.float32
    assert total.tokens == 12288 and total.value().item() == 1.0


def test_value_does_not_change_with_later_batches() -> None:
    total = HessianSum(4, "cpu")
    total.add(inputs(3, 4))
    before = total.value()
    copy = before.clone()
    total.add(inputs(5, 4))
    assert before.equal(copy)


def test_an_expert_without_tokens_has_a_zero_hessian() -> None:
    assert HessianSum(3, "cpu").value().equal(torch.zeros(3, 3))


def test_the_mean_can_be_taken_in_the_memory_of_the_sums_once() -> None:
    total = HessianSum(4, "cpu")
    total.add(inputs(3, 4))
    expected, place = total.value(), total._sum.data_ptr()
    taken = total.take()
    assert taken.equal(expected) and taken.data_ptr() == place
    with pytest.raises(AssertionError, match="Hessian of 0"):
        total.add(inputs(3, 4))


def test_inputs_of_another_width_are_refused() -> None:
    with pytest.raises(AssertionError, match="inputs of 5 features"):
        HessianSum(4, "cpu").add(inputs(2, 5))


def test_adding_needs_no_gradient() -> None:
    total = HessianSum(4, "cpu")
    total.add(inputs(2, 4).requires_grad_())
    assert not total.value().requires_grad
