"""Fold what was trained into the scales and zero-points of its linear: the same size, no cost."""

from collections.abc import Mapping

import torch
from torch import Tensor

from rilq.converter.adapters import AdapterSpec, pooled_shift
from rilq.converter.quantizers.grid import LARGEST_SCALE, SMALLEST_SCALE
from rilq.formats.packing import WORD, pack, stored_codes

LARGEST_CHANGE = 8.0  # of a scale's logarithm: beyond it no training is sane, and exp overflows


def merges(spec: AdapterSpec | None) -> bool:
    """Whether what is trained goes into the base; a plain LoRA stays beside it."""
    return spec is None or spec.kind == "pooled"


def trained_grid(
    scale: Tensor,
    zero_point: Tensor,
    *,
    log_scale: Tensor | None,
    offset: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Scale and zero-point in float32 that mean `s * (e^t * (code - z) + d) + shift`.

    Args:
        scale, zero_point: `s` and `z` as stored, `[out_features, groups]`.
        log_scale, offset: `t` and `d`, float32, alike; None for zero.
        shift: what a pooled adapter adds to the minima, alike; None for nothing.

    Returns:
        Two of `[out_features, groups]` float32, differentiable in what was trained.
    """
    scale, zero_point = scale.float(), zero_point.float()
    new_scale = scale
    if log_scale is not None:
        new_scale = scale * log_scale.clamp(-LARGEST_CHANGE, LARGEST_CHANGE).exp()
    if offset is not None:
        shift = scale * offset if shift is None else shift + scale * offset
    return new_scale, zero_point if shift is None else zero_point - shift / new_scale


def merged_grid(
    scale: Tensor,
    zero_point: Tensor,
    trained: Mapping[str, Tensor],
    spec: AdapterSpec | None,
) -> tuple[Tensor, Tensor]:
    """Scale and zero-point that hold what was trained of them.

    Storing them in float16 is the only rounding. What is added to the minima is counted in steps of
    the rounded scale, so that the result is the base at that scale with its adapter beside it;
    where nothing is added the zero-point stays what it was, and an integer an integer.

    Args:
        scale, zero_point: as stored, `[out_features, groups]` float16.
        trained: of this linear, float32: `log_scale`, `offset`, a pooled adapter's `a` and `b`.
        spec: of the adapter.

    Returns:
        Two of `[out_features, groups]` float16, finite.
    """
    shift = None
    if "a" in trained:
        assert spec is not None, "an adapter without its spec"
        shift = pooled_shift(trained["a"], trained["b"], spec)
    exact_scale, exact_zero = trained_grid(
        scale,
        zero_point,
        log_scale=trained.get("log_scale"),
        offset=trained.get("offset"),
        shift=shift,
    )
    stored = exact_scale.clamp(SMALLEST_SCALE, LARGEST_SCALE).to(torch.float16)
    zero = zero_point + (exact_zero - zero_point) * (exact_scale / stored.float())
    return stored, zero.clamp(-LARGEST_SCALE, LARGEST_SCALE).to(torch.float16)


def merged_codes(words: Tensor, shift: Tensor) -> Tensor:
    """The packed codes nearest to real-valued ones that training moved by `shift`.

    Args:
        words: as stored, `[out_features, in_features * bits / 32]` int32.
        shift: `[out_features, in_features]` float32, in codes.

    Returns:
        As `words`.
    """
    bits = words.shape[1] * WORD // shift.shape[1]
    moved = (stored_codes(words, bits) + shift).clamp(0, 2**bits - 1).round()
    return pack(moved.to(torch.uint8), bits)
