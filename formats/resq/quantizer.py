"""Vectors to codes when the model runs: asymmetric, each part with its own scale and zero.

    x[i] ~ zero[p] + scale[p] * code[i]        code in 0 .. 2**bits[p] - 1, p the part of channel i

`zero` is the value that code 0 stands for, the least of the part; the largest code stands for the
greatest. Nothing is clipped, so the straight-through gradient is 1 everywhere.

Source: per-token asymmetric quantizers of both parts: ResQ, Saxena et al. 2024 (arXiv:2412.14363),
section 4; a least value in the place of a whole zero-point needs no range that contains 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rilq.formats.resq.parts import Parts

_LARGEST = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class QuantizedVectors:
    """Vectors as codes.

    Attributes:
        codes: `[..., size]` uint8.
        scale, zero: `[..., parts]`, of one floating dtype.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor


def quantize_vectors(
    x: Tensor, parts: Parts, *, scale_dtype: torch.dtype = torch.float32
) -> QuantizedVectors:
    """Codes of vectors, each on a grid between the least and the greatest of its parts.

    Args:
        x: `[..., parts.size]`, any float dtype; computed in float32.
        scale_dtype: of scale and zero; the codes are chosen for what they are after rounding.
    """
    codes, scales, zeros = [], [], []
    for bits, values in zip(parts.bits, x.float().split(parts.widths, -1), strict=True):
        least, greatest = values.aminmax(dim=-1, keepdim=True)
        scale = (greatest - least) / (2**bits - 1)
        if scale_dtype == torch.float16:
            scale, least = scale.clamp(max=_LARGEST), least.clamp(-_LARGEST, _LARGEST)
        scale, zero = scale.to(scale_dtype), least.to(scale_dtype)
        step = scale.float()
        step = torch.where(step > 0, step, torch.ones_like(step))  # all equal: code 0 says it
        places = ((values - zero.float()) / step).round_().clamp_(0, 2**bits - 1)
        codes.append(places.to(torch.uint8))
        scales.append(scale)
        zeros.append(zero)
    return QuantizedVectors(torch.cat(codes, -1), torch.cat(scales, -1), torch.cat(zeros, -1))


def dequantize_vectors(vectors: QuantizedVectors, parts: Parts, dtype: torch.dtype) -> Tensor:
    """What the codes stand for, `[..., parts.size]`; computed in float32."""
    split = vectors.codes.split(parts.widths, -1)
    scale, zero = vectors.scale.float(), vectors.zero.float()
    return torch.cat(
        [
            torch.addcmul(zero[..., p : p + 1], scale[..., p : p + 1], codes.float()).to(dtype)
            for p, codes in enumerate(split)
        ],
        -1,
    )


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: Parts, scale_dtype: torch.dtype) -> Tensor:
        vectors = quantize_vectors(x, parts, scale_dtype=scale_dtype)
        return dequantize_vectors(vectors, parts, x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


def quantize_dequantize(
    x: Tensor, parts: Parts, *, scale_dtype: torch.dtype = torch.float32
) -> Tensor:
    """What is left of vectors `[..., parts.size]` after quantization, with gradient 1."""
    result: Tensor = _StraightThrough.apply(x, parts, scale_dtype)  # type: ignore[no-untyped-call]
    return result
