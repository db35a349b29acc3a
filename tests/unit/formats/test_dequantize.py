"""Packed words to weights, by torch and by Triton, against one code after another.

The Triton kernel runs here under its interpreter: `TRITON_INTERPRET=1 pytest <this file>`, where
triton is installed. tests/e2e/test_gpu.py has it on a GPU.
"""

import importlib.util
import os
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rilq.formats.packed_linear import packed_linear
from rilq.formats.packing import dequantize_packed, pack
from rilq.formats.spec import BITS, GROUP_SIZES

INTERPRETED = (
    os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def one_by_one(words: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Each row as one large number, from whose bits a code after the other is taken; float32."""
    rows, width = words.shape[0], words.shape[1] * 32 // bits
    weight = torch.empty(rows, width)
    for row in range(rows):
        number = sum((word % 2**32) << (32 * n) for n, word in enumerate(words[row].tolist()))
        for column in range(width):
            code = number >> (bits * column) & (2**bits - 1)
            group = column * scale.shape[1] // width
            weight[row, column] = scale[row, group].float() * (
                code - zero_point[row, group].float()
            )
    return weight


@st.composite
def packed(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, int]:
    """Words, scales, zero-points and bits of a small matrix of any format; odd rows too."""
    bits, size = draw(st.sampled_from(BITS)), draw(st.sampled_from(GROUP_SIZES))
    rows, groups = draw(st.integers(1, 7)), draw(st.integers(1, 5))
    made = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    codes = torch.randint(2**bits, (rows, groups * size), generator=made).to(torch.uint8)
    scale, zero = torch.rand(2, rows, groups, generator=made)
    scale, zero = (scale + 0.01).to(draw(st.sampled_from(FLOATS))), 2**bits * zero - 0.5
    return pack(codes, bits), scale, zero.to(draw(st.sampled_from(FLOATS))), bits


def check(dequantized: Callable[..., Tensor], case: tuple[Tensor, Tensor, Tensor, int]) -> None:
    expected = one_by_one(*case)
    assert torch.equal(dequantized(*case, dtype=torch.float32), expected)
    for dtype, steps in ((torch.float16, 2**-10), (torch.bfloat16, 2**-7)):
        found = dequantized(*case, dtype=dtype)
        assert found.dtype == dtype
        # Within one step: Triton's interpreter cuts bfloat16 off.
        torch.testing.assert_close(found.float(), expected, rtol=steps, atol=1e-7)


@settings(max_examples=40, deadline=None)
@given(packed())
def test_torch_gives_what_one_code_after_another_gives(
    case: tuple[Tensor, Tensor, Tensor, int],
) -> None:
    check(dequantize_packed, case)


@pytest.mark.skipif(not INTERPRETED, reason="needs triton and TRITON_INTERPRET=1")
@settings(max_examples=60, deadline=None)
@given(packed())
def test_triton_gives_what_one_code_after_another_gives(
    case: tuple[Tensor, Tensor, Tensor, int],
) -> None:
    from rilq.formats.dequantize_triton import dequantize

    check(dequantize, case)


@settings(max_examples=25, deadline=None)
@given(packed(), st.integers(0, 2**32))
def test_the_packed_linear_and_all_its_gradients_are_those_of_the_dense_one(
    case: tuple[Tensor, Tensor, Tensor, int], seed: int
) -> None:
    words, scale, zero, bits = case
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, words.shape[1] * 32 // bits, generator=made)
    bias, grad = (torch.randn(*s, len(words), generator=made) for s in ((), (2, 3)))
    codes = one_by_one(words, torch.ones_like(scale), torch.zeros_like(zero), bits)

    def dense(x: Tensor, scale: Tensor, zero: Tensor, bias: Tensor) -> Tensor:
        size = codes.shape[1] // scale.shape[1]
        step, low = (t.repeat_interleave(size, dim=1) for t in (scale, zero))
        return x @ (step * (codes - low)).T + bias

    results = []
    for linear in (lambda x, s, z, b: packed_linear(x, words, s, z, b, bits), dense):
        leaves = [t.float().clone().requires_grad_() for t in (x, scale, zero, bias)]
        out = linear(*leaves)
        out.backward(grad)
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
