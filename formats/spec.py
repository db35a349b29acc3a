"""The nouns of quantization: how a linear is to be quantized, and a linear that has been."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

BITS = (2, 3, 4, 8)
OUTER_BITS = (16, 8, 4)  # of embedding and head; 16: as in the source
GROUP_SIZES = (32, 64, 128)
EXPERTS = ".experts."  # in the name of every linear of an expert, and of no other


@dataclass(frozen=True)
class QuantSpec:
    """How one linear is quantized.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: input channels that share a scale and a zero-point.
        zero_point: "real" stores any float16; "integer" keeps it in `0 .. 2**bits - 1`.
    """

    bits: int = 2
    group_size: int = 64
    zero_point: Literal["real", "integer"] = "real"

    @property
    def max_code(self) -> int:
        """The largest code, `2**bits - 1`."""
        return int(2**self.bits - 1)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight: the code plus a 16-bit scale and zero-point per group."""
        return self.bits + 32 / self.group_size


@dataclass(frozen=True)
class QuantizedLinear:
    """A quantized weight matrix: `W[o, i] ~ scale[o, g] * (codes[o, i] - zero_point[o, g])`.

    Attributes:
        codes: `[out_features, in_features]` uint8 in `0 .. 2**bits - 1`.
        scale: `[out_features, groups]` float16, positive and finite.
        zero_point: `[out_features, groups]` float16, finite.
        spec: bits and group size; `groups = in_features / group_size`.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    spec: QuantSpec


def names_module(pattern: str, module_name: str) -> bool:
    """Whether `pattern` is the module, its last parts, a parent of it, or a glob that fits."""
    return (
        f".{module_name}".endswith(f".{pattern}")
        or module_name.startswith(f"{pattern}.")
        or fnmatchcase(module_name, pattern)
    )
