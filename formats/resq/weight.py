"""Quantized weights of a linear, and the tensors that store them.

A linear `X` is `X.weight` int32 `[out, words]`, `X.weight_scale` float16 `[out, parts]`, `X.bias`
where the model has one, and for a Hadamard transform of its input `X.hadamard_0`, `X.hadamard_1`,
... float32, the Kronecker factors. The weight is symmetric, and the input channels of a head (of
all of them, where the input has no heads) are in parts:

    W[o, i] = scale[o, p] * code[o, i]         code in -2**(bits-1) .. 2**(bits-1) - 1

Stored is `code + 2**(bits-1)` as in formats/packing.py: of each part the channels of all heads, one
head after the other, filled up with zeros to whole words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rilq.formats.packing import WORD, pack, unpack, whole_width
from rilq.formats.resq.parts import Parts
from rilq.formats.shard_writer import TensorLayout, check_layout


@dataclass(frozen=True)
class ResqWeight:
    """A quantized weight matrix.

    Attributes:
        codes: `[out, heads * parts.size]` int8.
        scale: `[out, parts]` float16, positive and finite.
        parts: of the input channels of each head.
        heads: 1 where the input has none.
    """

    codes: Tensor
    scale: Tensor
    parts: Parts
    heads: int = 1

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[out, heads * parts.size]` that the codes stand for."""
        return dense_weight(self.codes, self.scale, self.parts, self.heads, dtype)


def dense_weight(
    codes: Tensor, scale: Tensor, parts: Parts, heads: int, dtype: torch.dtype
) -> Tensor:
    """`scale * code`, computed in float32: see `ResqWeight`."""
    by_head = codes.reshape(len(codes), heads, parts.size).split(parts.widths, -1)
    steps = scale.float()[:, :, None, None].unbind(1)
    split = [own.float().mul_(step).to(dtype) for own, step in zip(by_head, steps, strict=True)]
    return torch.cat(split, -1).flatten(1)


def words_of(parts: Parts, heads: int) -> list[int]:
    """32-bit words that each part of a row takes."""
    pairs = zip(parts.bits, parts.widths, strict=True)
    return [whole_width(heads * width, bits) * bits // WORD for bits, width in pairs]


def resq_layout(
    name: str, out_features: int, parts: Parts, *, heads: int = 1, hadamard: Sequence[int] = ()
) -> dict[str, TensorLayout]:
    """dtype and shape of the tensors of linear `name` (without a bias).

    Args:
        hadamard: sizes of the transform's factors, for a linear that takes one.
    """
    return {
        f"{name}.weight": TensorLayout(torch.int32, (out_features, sum(words_of(parts, heads)))),
        f"{name}.weight_scale": TensorLayout(torch.float16, (out_features, len(parts.bits))),
        **{
            f"{name}.hadamard_{number}": TensorLayout(torch.float32, (size, size))
            for number, size in enumerate(hadamard)
        },
    }


def resq_tensors(
    name: str, weight: ResqWeight, hadamard: Sequence[Tensor] = ()
) -> dict[str, Tensor]:
    """The tensors of linear `name` (without a bias), as `resq_layout` describes them.

    Args:
        hadamard: the factors of the transform, for a linear that takes one.
    """
    return {
        f"{name}.weight": pack_weight(weight),
        f"{name}.weight_scale": weight.scale.to(torch.float16),
        **{f"{name}.hadamard_{n}": factor.float() for n, factor in enumerate(hadamard)},
    }


def pack_weight(weight: ResqWeight) -> Tensor:
    """Codes as words `[out, words]` int32, without loss.

    Raises:
        InputError: a code needs more bits than its part has.
    """
    parts, heads = weight.parts, weight.heads
    split = weight.codes.unflatten(1, (heads, parts.size)).split(parts.widths, -1)
    words = []
    for bits, codes in zip(parts.bits, split, strict=True):
        stored = (codes.flatten(1).to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
        width = stored.shape[1]
        words.append(pack(F.pad(stored, (0, whole_width(width, bits) - width)), bits))
    return torch.cat(words, 1)


def unpack_weight(words: Tensor, parts: Parts, heads: int) -> Tensor:
    """The codes `[out, heads * parts.size]` int8 of `pack_weight`'s words."""
    codes = []
    split = words.split(words_of(parts, heads), 1)
    for bits, width, part in zip(parts.bits, parts.widths, split, strict=True):
        stored = unpack(part, bits, part.shape[1] * WORD // bits)[:, : heads * width]
        # The bytes of 128 .. 255 are those of -128 .. -1, and int8 is added modulo 256.
        signed = stored.view(torch.int8) + -(2 ** (bits - 1))
        codes.append(signed.unflatten(1, (heads, width)))
    return torch.cat(codes, -1).flatten(1)


def resq_weight_from(
    tensors: Mapping[str, Tensor], name: str, parts: Parts, *, heads: int = 1
) -> ResqWeight:
    """The inverse of `resq_tensors`.

    Raises:
        CheckpointError: a tensor is missing, or has another dtype or shape than the parts say.
    """
    out_features = len(tensors.get(f"{name}.weight", ()))
    layout = resq_layout(name, out_features, parts, heads=heads)
    needs = f"parts of {list(parts.bits)} bits and {list(parts.widths)} channels"
    check_layout(tensors, layout, needs)
    codes = unpack_weight(tensors[f"{name}.weight"], parts, heads)
    return ResqWeight(codes, tensors[f"{name}.weight_scale"], parts, heads)
