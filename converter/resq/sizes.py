"""What a ResQ checkpoint takes: bits of its weights, activations and cache."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PretrainedConfig

from rilq.converter.resq.options import ResqOptions
from rilq.converter.resq.rotated import resq_sizes
from rilq.errors import OptionError
from rilq.formats.packing import WORD
from rilq.formats.resq.cache import stored_bits
from rilq.formats.resq.config import ResqConfig
from rilq.formats.resq.install import PER_HEAD
from rilq.formats.resq.parts import Parts
from rilq.formats.resq.weight import words_of

SCALE_BITS = 16


@dataclass(frozen=True)
class PartsSpec:
    """How a linear is quantized: the parts of its input, or of each head's share of it."""

    parts: Parts
    heads: int

    @property
    def bits(self) -> float:
        """Code bits per weight on average."""
        return self.parts.average_bits

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, whole words and scales counted."""
        stored = WORD * sum(words_of(self.parts, self.heads))
        return (stored + SCALE_BITS * len(self.parts.bits)) / (self.parts.size * self.heads)


@dataclass(frozen=True)
class RunTimeBits:
    """What a model computes with, as an evaluation of it says it.

    Attributes:
        activation_bits: of an input's codes, on average over the multiplications of the quantized
            linears.
        cache_bits: stored in the KV cache for each value, scales and zeros counted.
    """

    activation_bits: float
    cache_bits: float

    @classmethod
    def of(
        cls,
        options: ResqOptions,
        config: PretrainedConfig,
        linears: Iterable[tuple[int, PartsSpec]],
    ) -> RunTimeBits:
        """Those of a model with some quantized linears: outputs and spec of each."""
        weights = [(out * spec.parts.size * spec.heads, spec.bits) for out, spec in linears]
        bits = sum(count * bits for count, bits in weights) / sum(count for count, _ in weights)
        head = resq_sizes(config).head_dim
        return cls(bits, stored_bits(quantization(options).cache_parts(head)))


def quantization(options: ResqOptions, hadamard: tuple[int, ...] = (1,)) -> ResqConfig:
    """`quantization_config` of the output, without its recipe.

    Args:
        hadamard: sizes of U_D's factors; of no meaning without D.
    """
    bits, fractions = options.parts
    return ResqConfig(
        bits,
        fractions,
        down_bits=(options.low_bits,),
        down_fractions=(1.0,),
        rotations=options.rotations,
        hadamard=hadamard if "D" in options.rotations else (),
    )


def parts_spec(
    options: ResqOptions, config: PretrainedConfig, name: str, in_features: int
) -> PartsSpec:
    """How the linear `name` is quantized.

    Raises:
        OptionError: a part of its input would have no channel.
    """
    heads = config.num_attention_heads if name.rpartition(".")[2] == PER_HEAD else 1
    try:
        return PartsSpec(quantization(options).linear_parts(name, in_features // heads), heads)
    except ValueError as err:
        raise OptionError(f"{name}: {err}\n  use a larger --high-fraction") from err
