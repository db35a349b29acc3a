"""Weights of parts: stored, dequantized, and multiplied with quantized inputs in integers."""

import pytest
import torch
from resq_examples import obvious_weight, orthogonal, rounded
from torch import Tensor, nn
from torch.nn import functional as F

from rilq.errors import CheckpointError, InputError
from rilq.formats.resq.hadamard import kronecker_apply
from rilq.formats.resq.integer import integer_matmul, integers_work
from rilq.formats.resq.linear import QuantizedInputLinear, ResqLinear
from rilq.formats.resq.parts import Parts
from rilq.formats.resq.quantizer import quantize_dequantize
from rilq.formats.resq.weight import ResqWeight, resq_layout, resq_tensors, resq_weight_from

# Parts, heads: ResQ, its equal-bits variant, uniform, sizes that fill no words, and o_proj's input.
SHAPES = [
    (Parts((4, 8), (56, 8)), 1),
    (Parts((2, 4, 6), (8, 48, 8)), 1),
    (Parts((4,), (172,)), 1),
    (Parts((3, 8), (17, 3)), 1),
    (Parts((4, 8), (28, 4)), 3),
    (Parts((4, 8), (7, 1)), 8),
]


def drawn_weight(parts: Parts, heads: int, out: int = 20) -> ResqWeight:
    generator = torch.Generator().manual_seed(0)
    return rounded(torch.randn(out, heads * parts.size, generator=generator), parts, heads)


def drawn_input(parts: Parts, heads: int, rows: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, rows, heads * parts.size, generator=generator) * 3 + 1


def linear_of(
    weight: ResqWeight, *, bias: bool = False, factors: tuple[Tensor, ...] = ()
) -> ResqLinear:
    out, width = weight.codes.shape
    sizes = [len(factor) for factor in factors]
    linear = ResqLinear(
        width, out, weight.parts, heads=weight.heads, hadamard=sizes, bias=bias, device="meta"
    )
    state = {n.removeprefix("x."): t for n, t in resq_tensors("x", weight, factors).items()}
    if bias:
        state["bias"] = torch.arange(float(out))
    linear.load_state_dict(state, assign=True)
    return linear.requires_grad_(False)


@pytest.mark.parametrize(("parts", "heads"), SHAPES)
def test_a_weight_comes_back_from_its_tensors(parts: Parts, heads: int) -> None:
    weight = drawn_weight(parts, heads)
    tensors = resq_tensors("x", weight)
    layout = resq_layout("x", 20, parts, heads=heads)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == {
        n: (t.dtype, t.shape) for n, t in layout.items()
    }
    again = resq_weight_from(tensors, "x", parts, heads=heads)
    assert torch.equal(again.codes, weight.codes) and torch.equal(again.scale, weight.scale)
    assert torch.equal(again.dense(), obvious_weight(weight))


def test_extreme_codes_come_back_too() -> None:
    codes = torch.tensor([[-8, 7, 0, -1, -128, 127]], dtype=torch.int8)
    weight = ResqWeight(codes, torch.ones(1, 2).half(), Parts((4, 8), (4, 2)))
    assert torch.equal(resq_weight_from(resq_tensors("x", weight), "x", weight.parts).codes, codes)


def test_a_code_of_too_many_bits_is_refused() -> None:
    codes = torch.tensor([[8, 0, 0, 0]], dtype=torch.int8)
    with pytest.raises(InputError, match="expected 0 .. 15, found 16"):
        resq_tensors("x", ResqWeight(codes, torch.ones(1, 1).half(), Parts((4,), (4,))))


def test_tensors_of_other_parts_are_refused_by_name() -> None:
    tensors = resq_tensors("model.x", drawn_weight(*SHAPES[0]))
    with pytest.raises(CheckpointError, match=r"model.x.weight: .*\[20, 9\].* need .*\[20, 8\]"):
        resq_weight_from(tensors, "model.x", Parts((4,), (64,)))
    del tensors["model.x.weight_scale"]
    with pytest.raises(CheckpointError, match="model.x.weight_scale: missing"):
        resq_weight_from(tensors, "model.x", SHAPES[0][0])


@pytest.mark.parametrize(("parts", "heads"), SHAPES)
def test_the_reference_multiplies_what_the_codes_stand_for(parts: Parts, heads: int) -> None:
    weight, x = drawn_weight(parts, heads), drawn_input(parts, heads)
    by_head = quantize_dequantize(x.unflatten(-1, (heads, parts.size)), parts).flatten(-2)
    expected = F.linear(by_head, obvious_weight(weight), torch.arange(20.0))
    assert torch.equal(linear_of(weight, bias=True)(x), expected)
    assert not torch.allclose(F.linear(x, obvious_weight(weight), torch.arange(20.0)), expected)


@pytest.mark.parametrize("rows", [1, 5, 30])
@pytest.mark.parametrize(("parts", "heads"), SHAPES)
def test_products_of_codes_are_those_of_the_reference(parts: Parts, heads: int, rows: int) -> None:
    linear = linear_of(drawn_weight(parts, heads), bias=True).double()
    x = drawn_input(parts, heads, rows)
    expected = linear(x.double()).float()
    torch.testing.assert_close(linear.forward_in_integers(x), expected, rtol=1e-5, atol=1e-4)


def test_products_of_codes_are_exact_at_their_largest() -> None:
    a, b = torch.full((3, 1000), -128, dtype=torch.int8), torch.full((5, 1000), -128).char()
    assert torch.equal(integer_matmul(a, b), torch.full((3, 5), 1000 * 2**14, dtype=torch.int32))


def test_where_int8_cannot_be_multiplied_a_warning_says_so_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert integers_work("cpu")
    integers_work.cache_clear()
    monkeypatch.delattr(torch, "_int_mm")
    with pytest.warns(UserWarning, match="no products of int8, so slower: .*_int_mm"):
        assert not integers_work("cpu")
    assert not integers_work("cpu")
    integers_work.cache_clear()


def test_a_transform_of_the_input_undoes_that_of_the_weight() -> None:
    generator = torch.Generator().manual_seed(2)
    factors = (orthogonal(4, generator), orthogonal(43, generator))
    dense = torch.randn(20, 172, generator=generator)
    linear = QuantizedInputLinear(172, 20, Parts((4,), (172,)), hadamard=(4, 43), device="meta")
    turned = kronecker_apply(dense, factors)
    state = {"weight": turned, "hadamard_0": factors[0], "hadamard_1": factors[1]}
    linear.load_state_dict(state, assign=True)
    x = torch.randn(7, 172, generator=generator)
    torch.testing.assert_close(turned, dense @ torch.kron(*factors), rtol=1e-5, atol=1e-5)
    linear.quantizes = False
    torch.testing.assert_close(linear(x), F.linear(x, dense), rtol=1e-5, atol=1e-4)


def test_the_gradient_of_an_input_is_that_of_a_dense_linear() -> None:
    parts, heads = SHAPES[4]
    weight, x = drawn_weight(parts, heads), drawn_input(parts, heads).requires_grad_()
    linear_of(weight)(x).sum().backward()
    expected = obvious_weight(weight).sum(0).expand_as(x)
    torch.testing.assert_close(x.grad, expected)


def test_a_cast_leaves_scales_and_factors_as_they_are() -> None:
    generator = torch.Generator().manual_seed(2)
    weight = drawn_weight(Parts((4,), (64,)), 1)
    linear = linear_of(weight, bias=True, factors=(orthogonal(64, generator),))
    before = {n: t.clone() for n, t in linear.state_dict().items()}
    linear.to(torch.bfloat16)
    after = linear.state_dict()
    assert after.pop("bias").dtype == torch.bfloat16
    assert all(torch.equal(after[name], before[name]) for name in after)
    assert isinstance(linear, nn.Linear)


def test_parts_that_do_not_fit_the_input_are_refused() -> None:
    with pytest.raises(ValueError, match="in_features 60, but parts of 64 channels"):
        ResqLinear(60, 8, Parts((4, 8), (56, 8)), device="meta")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("parts", "heads"), SHAPES)
def test_on_a_gpu_products_of_codes_are_those_of_the_reference(parts: Parts, heads: int) -> None:
    linear, x = linear_of(drawn_weight(parts, heads), bias=True), drawn_input(parts, heads, 40)
    expected = linear(x)
    torch.testing.assert_close(linear.cuda()(x.cuda()).cpu(), expected, rtol=1e-4, atol=1e-3)
