"""Adapters that start from a closed form, beside the linear that they belong to."""

from typing import Literal

import pytest
import torch
from torch import Tensor

from rilq.converter.adapters import Adapter, AdapterSpec
from rilq.converter.initial import (
    InitialAdapters,
    adapter_tensors,
    corrected,
    set_values,
    start_from,
)
from rilq.converter.low_rank import closed_form, correction
from rilq.converter.merge import merged_grid
from rilq.converter.options import AdapterKind
from rilq.converter.quantizers import build_quantizer
from rilq.formats.packing import dequantize
from rilq.formats.spec import QuantizedLinear, QuantSpec

CPU = torch.device("cpu")
SPEC = QuantSpec(2, 32)
KINDS: list[AdapterKind] = ["lora", "pooled"]


def weight_of(rows: int = 48, width: int = 128) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0))


def hessian_of(width: int = 128) -> Tensor:
    x = torch.randn(300, width, generator=torch.Generator().manual_seed(1))
    x = (x + x.roll(1, 1)) * torch.linspace(0.2, 2, width)
    return x.T @ x / 300


def value_of(quantized: QuantizedLinear) -> Tensor:
    return dequantize(quantized.codes, quantized.scale, quantized.zero_point)


def made(
    init: Literal["loftq", "eora"], kind: AdapterKind, rank: int = 3, alpha: float = 16.0
) -> tuple[QuantizedLinear, Adapter]:
    initial = InitialAdapters(init, AdapterSpec(kind, rank, alpha, seed=0))
    quantizer = build_quantizer("rtn", clip="none")
    return initial.quantize("x", weight_of(), quantizer, SPEC, None, hessian_of())


def with_adapter(quantized: QuantizedLinear, adapter: Adapter) -> Tensor:
    """The effective weight, read off from the adapter's own forward pass."""
    return value_of(quantized) + adapter(torch.eye(128)).T


def output_error(value: Tensor) -> float:
    left = weight_of() - value
    return (left @ hessian_of() @ left.T).trace().item()


@pytest.mark.parametrize("alpha", [1.0, 16.0])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_the_closed_form_whatever_its_scaling(
    kind: AdapterKind, alpha: float
) -> None:
    quantized, adapter = made("eora", kind, alpha=alpha)
    error, group_size = weight_of() - value_of(quantized), 32 if kind == "pooled" else None
    factors = closed_form(error, 3, group_size=group_size, hessian=hessian_of())
    torch.testing.assert_close(
        adapter(torch.eye(128)).T, correction(*factors, group_size), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(adapter.b.T @ adapter.b, adapter.a @ adapter.a.T)  # even


@pytest.mark.parametrize("kind", KINDS)
def test_eora_keeps_the_codes_and_lowers_the_output_error_more_than_loftq(
    kind: AdapterKind,
) -> None:
    plain = build_quantizer("rtn", clip="none").quantize(weight_of(), SPEC)
    quantized, adapter = made("eora", kind)
    assert torch.equal(quantized.codes, plain.codes)
    eora, loftq = output_error(with_adapter(quantized, adapter)), with_adapter(*made("loftq", kind))
    assert eora < output_error(loftq) and eora < output_error(value_of(plain))


def test_loftq_changes_the_codes_and_lowers_the_weight_error() -> None:
    plain = build_quantizer("rtn", clip="none").quantize(weight_of(), SPEC)
    quantized, adapter = made("loftq", "lora", rank=8)
    one_round = closed_form(weight_of() - value_of(plain), 8)
    assert not torch.equal(quantized.codes, plain.codes)
    left = (weight_of() - with_adapter(quantized, adapter)).norm()
    assert left < (weight_of() - value_of(plain) - correction(*one_round)).norm()


def test_a_rank_above_the_groups_leaves_the_rest_as_drawn_with_nothing_in_b() -> None:
    _, adapter = made("eora", "pooled", rank=6)  # 128 channels are 4 groups
    drawn = Adapter(adapter.spec, "x", out_features=48, in_features=128, group_size=32, device=CPU)
    assert torch.equal(adapter.a[4:], drawn.a[4:]) and not adapter.b[:, 4:].any()
    assert adapter.b[:, :4].any(0).all()


@pytest.mark.parametrize("init", ["loftq", "eora"])
def test_a_pooled_start_merges_to_what_it_is_unmerged(init: Literal["loftq", "eora"]) -> None:
    quantized, adapter = made(init, "pooled")
    trained = {"a": adapter.a, "b": adapter.b}
    grid = merged_grid(quantized.scale, quantized.zero_point, trained, adapter.spec)
    value = dequantize(quantized.codes, *grid)
    # float16 zero-points of up to 8 are off by 2**-9 at most, times scales of about 1.5
    torch.testing.assert_close(value, with_adapter(quantized, adapter), rtol=0, atol=8e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_corrected_is_the_weight_that_the_adapter_makes(kind: AdapterKind) -> None:
    quantized, adapter = made("eora", kind)
    value = corrected(value_of(quantized), adapter.a, adapter.b, adapter.spec, 32)
    torch.testing.assert_close(value, with_adapter(quantized, adapter), rtol=0, atol=1e-5)


def test_saved_adapters_come_back() -> None:
    spec = AdapterSpec("lora", 2, 16.0, seed=0)
    first, second = (
        Adapter(spec, name, out_features=8, in_features=32, group_size=32, device=CPU)
        for name in ("first", "second")
    )
    start_from(first, torch.ones(8, 2), torch.ones(2, 32))
    set_values({"first.a": second.a, "first.b": second.b}, adapter_tensors({"first": first}))
    assert torch.equal(second.a, first.a) and torch.equal(second.b, first.b)
