"""Fold trained pooled adapters into the zero-points of their linears."""

import torch
from torch import Tensor

from rilq.converter.adapters import AdapterSpec


def merged_zero_point(
    scale: Tensor, zero_point: Tensor, a: Tensor, b: Tensor, spec: AdapterSpec
) -> Tensor:
    """The zero-points that hold a pooled adapter; codes and scales stay as they are.

    The adapter adds `c * B A` to the groups' minima `m = -s * z`, so `z' = z - c * B A / s`,
    computed in float32. Storing it in float16 is the only rounding.

    Args:
        scale, zero_point: `[out_features, groups]` float16.
        a, b: `[rank, groups]` and `[out_features, rank]` float32.
        spec: of the adapter; its scaling is `c`.

    Returns:
        `[out_features, groups]` float16.

    Source: QA-LoRA, Xu et al. 2024 (arXiv:2309.14717), section 3.3.
    """
    assert spec.kind == "pooled", "a plain LoRA is no addition to minima"
    shift = spec.scaling * (b @ a) / scale.float()
    limit = torch.finfo(torch.float16).max
    return (zero_point.float() - shift).clamp(-limit, limit).half()
