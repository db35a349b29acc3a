"""Codes to 32-bit words and back, and what a code means.

The zero-point convention, stated here once and used everywhere:

    W[o, i] ~ scale[o, g] * (code[o, i] - zero_point[o, g])        g = i // group_size

The zero-point is the (real-valued) code that stands for the weight 0. It is stored as it is,
never as `zero_point - 1` as some GPTQ files do. With 2 bits, scale 0.5 and zero-point 1.25 the
codes 0, 1, 2, 3 mean -0.625, -0.125, 0.375, 0.875. The minimum that training and merging work
on is `-scale * zero_point`, here -0.625.

The words of a row are a little-endian bit stream along the input: code `i` has the bits
`bits * i .. bits * i + bits - 1` of the row, and bit `n` of the row is bit `n % 32` of word
`n // 32`. With 2, 4 and 8 bits a word holds 32 / bits codes, the first in its lowest bits;
with 3 bits, 32 codes fill 3 words and two of them straddle a boundary.
"""

import math
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor

from rilq.errors import InputError, one_line

WORD, BYTE = 32, 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes into words, without loss.

    Args:
        codes: `[out_features, in_features]` uint8 in `0 .. 2**bits - 1`.
        bits: 2, 3, 4 or 8.

    Returns:
        `[out_features, in_features * bits / 32]` int32, on the device of the codes.

    Raises:
        InputError: a row does not fill whole words, or a code needs more bits.
    """
    rows, width = codes.shape
    if width * bits % WORD:
        raise InputError(
            f"codes [{rows}, {width}]: {width} codes of {bits} bits do not fill "
            "whole 32-bit words\n  use a group size that divides in_features: 32, 64 or 128"
        )
    if codes.numel() and (largest := int(codes.max())) >= 2**bits:
        raise InputError(f"codes [{rows}, {width}]: expected 0 .. {2**bits - 1}, found {largest}")
    codes_per_period, words_per_period = _period(bits)
    columns = codes.reshape(rows, -1, codes_per_period)
    words = torch.zeros(
        rows, columns.shape[1], words_per_period, dtype=torch.int32, device=codes.device
    )
    for code, word, shift in _places(bits):
        column = columns[:, :, code].to(torch.int32)
        words[:, :, word] |= column << shift
        if shift + bits > WORD:
            words[:, :, word + 1] |= column >> (WORD - shift)
    return words.reshape(rows, width * bits // WORD)


def unpack(words: Tensor, bits: int, in_features: int) -> Tensor:
    """Undo `pack`.

    Args:
        words: `[out_features, in_features * bits / 32]` int32.
        bits: 2, 3, 4 or 8.
        in_features: codes in a row.

    Returns:
        `[out_features, in_features]` uint8 in `0 .. 2**bits - 1`, on the device of the words.

    Raises:
        InputError: the words do not hold `in_features` codes of `bits` bits in each row.
    """
    rows, width = words.shape
    if width * WORD != in_features * bits:
        raise InputError(
            f"words [{rows}, {width}]: {in_features} codes of {bits} bits take "
            f"{in_features * bits / WORD:g} words in each row, found {width}"
        )
    if BYTE % bits == 0 and sys.byteorder == "little":
        return _unpack_bytes(words.contiguous().view(torch.uint8), bits)
    codes_per_period, words_per_period = _period(bits)
    columns = words.reshape(rows, -1, words_per_period)
    codes = torch.empty(
        rows, columns.shape[1], codes_per_period, dtype=torch.uint8, device=words.device
    )
    mask = 2**bits - 1
    for code, word, shift in _places(bits):
        column = columns[:, :, word] >> shift
        if shift + bits > WORD:
            # `>>` on int32 copies the sign bit into the place of the next word's bits.
            column &= 2 ** (WORD - shift) - 1
            column |= columns[:, :, word + 1] << (WORD - shift)
        codes[:, :, code] = column & mask
    return codes.reshape(rows, in_features)


def _unpack_bytes(stored: Tensor, bits: int) -> Tensor:
    """`unpack` of 2, 4 or 8 bits from a row's bytes: a fraction of the work that words take."""
    if bits == BYTE:
        return stored.clone()
    codes = [(stored >> shift).bitwise_and_(2**bits - 1) for shift in range(0, BYTE, bits)]
    return torch.stack(codes, -1).flatten(1)


def dequantize(
    codes: Tensor, scale: Tensor, zero_point: Tensor, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The weights that codes stand for: `scale * (code - zero_point)`.

    Args:
        codes: `[out_features, in_features]` uint8.
        scale: `[out_features, groups]`, any float dtype; `in_features` is a multiple of `groups`.
        zero_point: `[out_features, groups]`, any float dtype.
        dtype: of the result; the arithmetic is float32 in any case.

    Returns:
        `[out_features, in_features]`.
    """
    rows, width = codes.shape
    weight = codes.reshape(rows, scale.shape[1], -1).to(torch.float32)  # [out, groups, group_size]
    weight.sub_(zero_point.to(torch.float32)[..., None]).mul_(scale.to(torch.float32)[..., None])
    return weight.reshape(rows, width).to(dtype)


def dequantize_packed(
    words: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`dequantize` of packed codes; on a GPU by a Triton kernel, where Triton works.

    Args:
        words: `[out_features, in_features * bits / 32]` int32, or the codes themselves, uint8, as
            `stored_codes` takes them.
        scale: `[out_features, groups]`, any float dtype.
        zero_point: `[out_features, groups]`, any float dtype.
        bits: 2, 3, 4 or 8.
        dtype: of the result; the arithmetic is float32 in any case.

    Returns:
        `[out_features, in_features]`.
    """
    if words.is_cuda and words.dtype == torch.int32 and (kernel := _cuda_kernel()):
        return kernel(words, scale, zero_point, bits, dtype=dtype)
    return dequantize(stored_codes(words, bits), scale, zero_point, dtype=dtype)


@cache
def _cuda_kernel() -> Callable[..., Tensor] | None:
    """Triton's `dequantize`, if it comes with torch and compiles here."""
    try:
        from rilq.formats.dequantize_triton import dequantize as kernel
    except ImportError:
        return None
    try:
        words, group = torch.zeros(1, 2, dtype=torch.int32), torch.ones(1, 1)
        kernel(words.cuda(), group.cuda(), group.cuda(), 2, dtype=torch.float32)
    except Exception as err:  # whatever a compiler, or its absence, makes of it
        warnings.warn(f"without Triton, so slower: {one_line(err)}", stacklevel=2)
        return None
    return kernel


def stored_codes(stored: Tensor, bits: int) -> Tensor:
    """The codes `[out_features, in_features]` uint8 of words (int32), or of themselves (uint8).

    A model in training may keep its codes a byte each: four times the memory, but nothing to
    unpack in each forward and backward pass.
    """
    if stored.dtype == torch.uint8:
        return stored
    return unpack(stored, bits, stored.shape[1] * WORD // bits)


def whole_width(width: int, bits: int) -> int:
    """The least number of codes, `width` or more, that fills whole words without a rest."""
    codes_per_period = _period(bits)[0]
    return -(-width // codes_per_period) * codes_per_period


def _period(bits: int) -> tuple[int, int]:
    """The fewest codes that fill whole words, and how many words those are."""
    length = math.lcm(bits, WORD)
    return length // bits, length // WORD


def _places(bits: int) -> Iterator[tuple[int, int, int]]:
    """Of each code in a period: its index, the word of its lowest bit, and the bit within it."""
    for code in range(_period(bits)[0]):
        yield code, code * bits // WORD, code * bits % WORD
