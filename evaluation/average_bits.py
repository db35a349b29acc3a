"""Bits that a checkpoint spends on average: of a weight, an activation, a cached value."""

from __future__ import annotations

from torch import nn

from rilq.converter.architecture import head_size
from rilq.converter.layers import StreamedModel
from rilq.evaluation.figures import SIXTEEN
from rilq.formats.native import RilqLinear
from rilq.formats.resq.cache import stored_bits
from rilq.formats.resq.config import ResqConfig
from rilq.formats.resq.linear import ResqLinear
from rilq.formats.spec import QuantSpec


def bits_per_weight(streamed: StreamedModel) -> float | None:
    """Stored bits per weight of the quantized linears, or of all of a dense model's decoder.

    Codes count with their 16-bit scales and zero-points. None if there is no linear.
    """
    linears = _linears(streamed)
    packed = [each for each in linears.values() if isinstance(each, RilqLinear | ResqLinear)]
    weights = [_weights(each) for each in packed or linears.values()]
    if packed:
        bits = sum(map(_stored_bits, packed))
    else:
        tensors = streamed.checkpoint.tensors
        bits = sum(8.0 * tensors[f"{name}.weight"].nbytes for name in linears)
    return bits / sum(weights) if weights else None


def _stored_bits(linear: RilqLinear | ResqLinear) -> float:
    if isinstance(linear, ResqLinear):
        # Not the Hadamard factors: one matrix for the model, that each layer has for itself.
        return 8.0 * (linear.weight.nbytes + linear.weight_scale.nbytes)
    return _weights(linear) * QuantSpec(linear.bits, linear.group_size).bits_per_weight


def activation_bits(streamed: StreamedModel) -> float:
    """Bits of an input code, on average over the multiplications in the decoder's linears.

    Scales are not counted: they are made when the model runs, one for each part of a token.
    """
    linears = _linears(streamed).values()
    total = sum(
        _weights(each) * (each.parts.average_bits if isinstance(each, ResqLinear) else SIXTEEN)
        for each in linears
    )
    weights = sum(map(_weights, linears))
    return total / weights if weights else SIXTEEN


def cache_bits(streamed: StreamedModel) -> float:
    """Stored bits per value of the KV cache, with scales and zeros."""
    quantization = streamed.quantization
    if not isinstance(quantization, ResqConfig):
        return SIXTEEN
    return stored_bits(quantization.cache_parts(head_size(streamed.config)))


def _linears(streamed: StreamedModel) -> dict[str, nn.Linear]:
    return {
        name: module
        for index in range(len(streamed.layers))
        for name, module in streamed.linears(index).items()
    }


def _weights(linear: nn.Linear) -> int:
    return linear.in_features * linear.out_features
