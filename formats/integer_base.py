"""An integer base beside a merged checkpoint: for formats whose zero-points must be integers.

    OUT/integer-base/zero_points.safetensors   zero-points of the base, before merging
    OUT/integer-base/adapter/                  what was merged: a plain LoRA that stock PEFT loads

Merging a pooled adapter changes zero-points alone, so codes and scales of the base are those of the
checkpoint itself and are not stored twice. `X.integer_zero_point` uint8 `[out, groups]` belongs to
its linear `X`, and is in `0 .. 2**bits - 1`. The name differs from the checkpoint's, so that
`rilq.json` has one entry for each tensor.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from rilq.formats.shard_writer import TensorLayout, write_shard

INTEGER_FOLDER = "integer-base"
ZERO_POINTS_NAME = "zero_points.safetensors"
_STORED, _INTEGER = ".zero_point", ".integer_zero_point"


def zero_point_name(linear: str) -> str:
    """What the zero-points of a linear are called."""
    return linear + _INTEGER


def write_zero_points(
    checkpoint: Path,
    linears: Iterable[str],
    layout: Mapping[str, TensorLayout],
    read: Callable[[str], Tensor],
) -> Path:
    """Write `checkpoint/integer-base` with its zero-points, one tensor at a time in memory.

    Args:
        checkpoint: folder of the merged checkpoint.
        linears: full names of those with an adapter.
        layout: of the base's native tensors.
        read: gives one of them.

    Returns:
        The new folder, for the adapter.
    """
    folder = checkpoint / INTEGER_FOLDER
    folder.mkdir(exist_ok=True)

    def integers(name: str) -> Tensor:
        linear = name.removesuffix(_INTEGER)
        stored = read(linear + _STORED)
        whole = stored.to(torch.uint8)
        assert bool((whole == stored).all()), f"{linear}: a zero-point is no integer"
        return whole

    write_shard(
        folder / ZERO_POINTS_NAME,
        {zero_point_name(n): TensorLayout(torch.uint8, layout[n + _STORED].shape) for n in linears},
        integers,
    )
    return folder
