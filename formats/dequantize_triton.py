"""Packed words to weights in one pass over memory, for CUDA; packing.py has the reference.

Rows fill whole words and whole groups, so a matrix is one stream of codes, and a program of the
kernel takes the next `BLOCK` of them, whatever rows they are in.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # codes of one program: whole words of any bits, whole groups of any size


@triton.jit
def _dequantize(
    words,
    scale,
    zero_point,
    weight,
    count,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)  # a matrix may have more than 2^31 codes
    code = tl.arange(0, BLOCK)
    inside = code < count - block * BLOCK
    word, shift = code * BITS // 32, code * BITS % 32
    words += block * (BLOCK * BITS // 32)
    # Unsigned: `>>` of a negative number would bring in ones.
    value = tl.load(words + word, mask=inside, other=0).to(tl.uint32, bitcast=True) >> shift
    if 32 % BITS != 0:
        straddles = inside & (shift + BITS > 32)
        above = tl.load(words + word + 1, mask=straddles, other=0).to(tl.uint32, bitcast=True)
        value |= above << ((32 - shift) & 31)
    value = (value & ((1 << BITS) - 1)).to(tl.float32)
    group = block * (BLOCK // GROUP) + code // GROUP
    zero = tl.load(zero_point + group, mask=inside, other=0).to(tl.float32)
    step = tl.load(scale + group, mask=inside, other=0).to(tl.float32)
    result = (value - zero) * step
    tl.store(weight + block * BLOCK + code, result.to(weight.dtype.element_ty), mask=inside)


def dequantize(
    words: Tensor, scale: Tensor, zero_point: Tensor, bits: int, *, dtype: torch.dtype
) -> Tensor:
    """`dequantize_packed` of words, by the kernel; not differentiable.

    Args:
        words: `[out_features, in_features * bits / 32]` int32.
        scale, zero_point: `[out_features, groups]`, any float dtype; groups of 32, 64 or 128.
    """
    rows, width = words.shape[0], words.shape[1] * 32 // bits
    weight = torch.empty(rows, width, dtype=dtype, device=words.device)
    with torch.cuda.device_of(words):
        _dequantize[(triton.cdiv(weight.numel(), BLOCK),)](
            words.contiguous(),
            scale.contiguous(),
            zero_point.contiguous(),
            weight,
            weight.numel(),
            BITS=bits,
            GROUP=width // scale.shape[1],
            BLOCK=BLOCK,
        )
    return weight
