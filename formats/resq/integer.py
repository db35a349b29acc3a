"""Products of integer codes, of which GPUs do more in a second than of floats (`torch._int_mm`)."""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from rilq.errors import one_line
from rilq.formats.resq.parts import Parts
from rilq.formats.resq.quantizer import QuantizedVectors

# What cuBLAS asks of the operands of an int8 product: more than 16 rows, the rest multiples of 8.
_LEAST_ROWS, _MULTIPLE = 17, 8


@cache
def integers_work(device_type: str) -> bool:
    """Whether torch multiplies int8 matrices there; if not, a warning says so once."""
    codes = torch.ones(_LEAST_ROWS, _MULTIPLE, dtype=torch.int8, device=device_type)
    try:
        integer_matmul(codes, codes)
    except (AttributeError, RuntimeError) as err:  # torch._int_mm is no public function
        warnings.warn(f"no products of int8, so slower: {one_line(err)}", stacklevel=2)
        return False
    return True


def integer_matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b^T`, exactly.

    Args:
        a: `[rows, width]` int8.
        b: `[out, width]` int8.

    Returns:
        `[rows, out]` int32.
    """
    (rows, width), out = a.shape, len(b)
    more_width, more_out = -width % _MULTIPLE, -out % _MULTIPLE
    a = F.pad(a, (0, more_width, 0, max(0, _LEAST_ROWS - rows)))
    b = F.pad(b, (0, more_width, 0, more_out))
    return torch._int_mm(a, b.T)[:rows, :out]


def integer_product(
    vectors: QuantizedVectors, codes: Tensor, scale: Tensor, parts: Parts, dtype: torch.dtype
) -> Tensor:
    """What quantized inputs and a quantized weight multiply to: only codes of one part meet.

        sum over heads and parts of  s_x s_w (X C^T) + z_x s_w sum_i C[:, i]

    with input codes X, their scale `s_x` and zero `z_x`, weight codes C and their scale `s_w`.

    Args:
        vectors: of the inputs, codes `[rows, heads, parts.size]`.
        codes: of the weight, `[out, heads * parts.size]` int8.
        scale: of the weight, `[out, parts]`.
        dtype: of the result; sums are int32 within a part of a head, float32 beyond.

    Returns:
        `[rows, out]`.
    """
    rows, heads, _ = vectors.codes.shape
    inputs = vectors.codes.split(parts.widths, -1)
    weights = codes.unflatten(1, (heads, parts.size)).split(parts.widths, -1)
    total = torch.zeros(rows, len(codes), dtype=torch.float32, device=codes.device)
    for p, (x, weight) in enumerate(zip(inputs, weights, strict=True)):
        # 0 .. 2**bits - 1 does not fit int8 with 8 bits: half of it is taken off, and put back.
        middle = 2 ** (parts.bits[p] - 1)
        signed = (x.to(torch.int16) - middle).to(torch.int8)
        steps = vectors.scale[..., p].float()
        offsets = vectors.zero[..., p].float() + middle * steps  # [rows, heads]
        part = offsets @ weight.sum(-1, dtype=torch.int32).float().T
        for head in range(heads):
            product = integer_matmul(signed[:, head].contiguous(), weight[:, head].contiguous())
            part.addcmul_(product.float(), steps[:, head, None])
        total.addcmul_(part, scale[:, p].float())
    return total.to(dtype)
