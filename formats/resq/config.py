"""`quantization_config` of a ResQ checkpoint: which bits where, and which rotations run online."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from rilq.formats.resq.parts import PART_BITS, Parts
from rilq.formats.spec import names_module

QUANT_METHOD = "rilq-resq"
FORMAT_VERSION = 1
_DAMAGED = "  config.json was changed, or is damaged; download it again"


class ResqConfig(QuantizationConfigMixin):
    """How the linears, their inputs and the KV cache of a checkpoint are quantized.

    Args:
        bits, fractions: of the parts of every vector, in ascending order of variance. An input is
            quantized with the same parts as the weights it meets.
        down_bits, down_fractions: likewise of the input of `down_proj`.
        cache_bits, cache_fractions: likewise of a head's key and value.
        rotations: those of U_A, U_B, U_C, U_D that were applied, as letters. A and B are in the
            weights and change nothing here; with C there is a key rotation for each layer, with D
            the input of `down_proj` takes a Hadamard transform.
        hadamard: sizes of the transform's Kronecker factors, whose product is the intermediate
            size; empty without D.
        modules_to_not_convert: linears kept in 16 bits: as of `RilqConfig`.
        format_version: of the tensors.
        recipe: what made the checkpoint; carried along, never interpreted.
        other: keys of other programs; ignored, since a change of meaning changes the version.

    Raises:
        ValueError: an unknown version, or values that cannot be read.
    """

    def __init__(
        self,
        bits: Sequence[int] = (4, 8),
        fractions: Sequence[float] = (0.875, 0.125),
        *,
        down_bits: Sequence[int] = (4,),
        down_fractions: Sequence[float] = (1.0,),
        cache_bits: Sequence[int] | None = None,
        cache_fractions: Sequence[float] | None = None,
        rotations: str = "ABCD",
        hadamard: Sequence[int] = (),
        modules_to_not_convert: Iterable[str] | None = None,
        format_version: int = FORMAT_VERSION,
        recipe: Mapping[str, Any] | None = None,
        **other: Any,
    ) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # an enum in transformers
        self.format_version = format_version
        self.bits, self.fractions = list(bits), list(fractions)
        self.down_bits, self.down_fractions = list(down_bits), list(down_fractions)
        self.cache_bits = list(bits if cache_bits is None else cache_bits)
        self.cache_fractions = list(fractions if cache_fractions is None else cache_fractions)
        self.rotations = rotations
        self.hadamard = list(hadamard)
        skipped = ("lm_head",) if modules_to_not_convert is None else modules_to_not_convert
        self.modules_to_not_convert = list(skipped)
        self.recipe = dict(recipe or {})
        self._check()

    def _check(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"quantization_config: format_version {self.format_version!r}, this rilq reads "
                f"{FORMAT_VERSION} of {QUANT_METHOD}\n"
                "  upgrade rilq, or convert the model again with this one"
            )
        for kind in ("", "down_", "cache_"):
            bits, fractions = getattr(self, f"{kind}bits"), getattr(self, f"{kind}fractions")
            if not bits or len(bits) != len(fractions) or not set(bits) <= set(PART_BITS):
                raise ValueError(
                    f"quantization_config: {kind}bits {bits} for {kind}fractions {fractions}, "
                    f"expected as many, each one of {PART_BITS}\n{_DAMAGED}"
                )
            if min(fractions) <= 0 or not math.isclose(sum(fractions), 1.0):
                raise ValueError(
                    f"quantization_config: {kind}fractions {fractions}, expected positive numbers "
                    f"whose sum is 1\n{_DAMAGED}"
                )
        letters = sorted(self.rotations)
        if len(letters) != len(set(letters)) or not set(letters) <= set("ABCD"):
            raise ValueError(
                f"quantization_config: rotations {self.rotations!r}, expected letters of ABCD\n"
                + _DAMAGED
            )
        if bool(self.hadamard) != ("D" in letters) or min(self.hadamard, default=1) < 1:
            raise ValueError(
                f"quantization_config: hadamard {self.hadamard} with rotations "
                f"{self.rotations!r}: expected sizes with D, and only then\n{_DAMAGED}"
            )

    @property
    def rotates_keys(self) -> bool:
        """Whether queries and keys are multiplied by a rotation of their layer (U_C)."""
        return "C" in self.rotations

    def quantizes(self, module_name: str) -> bool:
        """Whether the linear with this full module name is quantized."""
        return not any(names_module(p, module_name) for p in self.modules_to_not_convert)

    def linear_parts(self, module_name: str, size: int) -> Parts:
        """Parts of the input of a linear, or of one head's share of it.

        Args:
            module_name: full, or its last part.
            size: channels: of the whole input, for `o_proj` of one head.

        Raises:
            ValueError: a part would be empty.
        """
        if module_name.rpartition(".")[2] == "down_proj":
            return Parts.of(size, self.down_bits, self.down_fractions)
        return Parts.of(size, self.bits, self.fractions)

    def cache_parts(self, head_dim: int) -> Parts:
        """Parts of a head's key and value.

        Raises:
            ValueError: a part would be empty.
        """
        return Parts.of(head_dim, self.cache_bits, self.cache_fractions)
