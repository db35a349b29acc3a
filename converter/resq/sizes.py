"""What a ResQ checkpoint takes: bits of its weights, activations and cache."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PretrainedConfig

from rilq.converter.resq.options import ResqOptions
from rilq.errors import OptionError
from rilq.formats.packing import WORD
from rilq.formats.resq.cache import bytes_of
from rilq.formats.resq.config import ResqConfig
from rilq.formats.resq.install import PER_HEAD
from rilq.formats.resq.parts import Parts
from rilq.formats.resq.weight import words_of

SCALE_BITS = 16  # of a scale, and of a zero of the cache


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
class AverageBits:
    """Of what a ResQ model computes with, for people to compare.

    Attributes:
        weights, activations, cache: code bits per weight of the quantized linears, per channel of
            their inputs, and per channel of keys and values.
        cache_stored: of the cache, scales, zeros and whole bytes counted.
    """

    weights: float
    activations: float
    cache: float
    cache_stored: float

    @classmethod
    def of(
        cls, options: ResqOptions, config: PretrainedConfig, linears: Iterable[tuple[int, PartsSpec]]
    ) -> AverageBits:
        """Those of a model with some linears, each as its number of outputs and its spec."""
        linears = tuple(linears)
        widths = [spec.parts.size * spec.heads for _, spec in linears]
        weights = [out * width for (out, _), width in zip(linears, widths, strict=True)]
        bits = [spec.bits for _, spec in linears]
        cache = quantization(options).cache_parts(head_dim(config))
        stored = 8 * sum(bytes_of(cache)) + 2 * SCALE_BITS * len(cache.bits)
        return cls(
            weights=_mean(bits, weights),
            activations=_mean(bits, widths),
            cache=cache.average_bits,
            cache_stored=stored / cache.size,
        )


def _mean(values: list[float], weights: list[int]) -> float:
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)


def head_dim(config: PretrainedConfig) -> int:
    """Channels of a head: what config.json says, else what the other sizes give."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


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
