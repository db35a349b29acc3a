"""What MLX and Metal share: `W = scale * code + minimum`, with `minimum = -scale * zero_point`."""

import torch
from torch import Tensor

from rilq.errors import OptionError
from rilq.formats.export.folder import Entry, cast
from rilq.formats.export.source import NativeCheckpoint, NativeForm
from rilq.formats.shard_writer import TensorLayout
from rilq.formats.spec import QuantSpec


def affine_entries(
    native: NativeCheckpoint, module: str, spec: QuantSpec, dtype: torch.dtype, minimum: str
) -> dict[str, Entry]:
    """A packed module's tensors: the native's words as uint32, scales, and minima.

    Args:
        dtype: of scales and minima.
        minimum: what the minima are called.
    """

    def stored(part: str) -> Tensor:
        return native.tensor(f"{module}.{part}").float()

    words, scale, low = f"{module}.weight", f"{module}.scales", f"{module}.{minimum}"
    rows, width = native.shape(module)
    packed = TensorLayout(torch.uint32, (rows, width * spec.bits // 32))
    group = TensorLayout(dtype, (rows, width // spec.group_size))
    return {
        words: Entry(packed, lambda: native.tensor(words).view(torch.uint32)),
        scale: Entry(group, lambda: cast(scale, stored("weight_scale"), dtype)),
        low: Entry(group, lambda: cast(low, -stored("weight_scale") * stored("zero_point"), dtype)),
    }


def affine(codes: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    """`scale * code + minimum`."""
    return scale * codes + minimum


def refuse_lora(form: NativeForm, kind: str) -> None:
    """Raises OptionError if an adapter lies beside the base: codes and minima cannot hold it."""
    if form.lora:
        raise OptionError(
            f"{form.label}: has an adapter beside it (--adapter lora), which --to {kind} cannot "
            "hold: a plain LoRA does not fit into scales and zero-points\n"
            "  export --to dense, or convert with --adapter pooled"
        )
