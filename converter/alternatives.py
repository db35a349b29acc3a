"""A layer's linears at more bits than the base, and what each would take off the layer's error.

`layer-XXXX-bits-N.safetensors` in the work folder holds the native tensors of all linears of a
layer at N bits. It is committed with the layer's own file; the writer of the output takes from it
what was chosen (bit_choice.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from rilq.calib.activations import ActivationStore
from rilq.converter.layers import StreamedModel
from rilq.converter.quantizers import Quantizer
from rilq.formats.native import native_tensors
from rilq.formats.packing import dequantize_packed
from rilq.formats.spec import QuantSpec

ROWS = 16  # calibration rows on which alternatives are compared


def alternative_file(index: int, bits: int) -> str:
    """Name of the file of decoder layer `index` at so many bits."""
    return f"layer-{index:04d}-bits-{bits}.safetensors"


@dataclass(frozen=True)
class Alternatives:
    """Collects a layer's linears at more bits.

    Attributes:
        bits: of the alternatives; may be empty.
        tensors: native tensors by bits and full name, on the CPU.
    """

    bits: tuple[int, ...]
    tensors: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def add(
        self,
        name: str,
        weight: Tensor,
        spec: QuantSpec,
        quantizer: Quantizer,
        prepared: Tensor | None,
    ) -> None:
        """Quantize a linear once for each of `bits`; arguments as of `Quantizer.quantize`."""
        for bits in self.bits:
            native = native_tensors(
                name, quantizer.quantize(weight, replace(spec, bits=bits), prepared)
            )
            self.tensors.setdefault(bits, {}).update({n: t.cpu() for n, t in native.items()})


def measured_gains(
    streamed: StreamedModel,
    index: int,
    files: Mapping[int, Path],
    inputs: ActivationStore,
    wanted: ActivationStore,
    *,
    rows: int,
    batch_rows: int,
) -> dict[str, dict[int, float]]:
    """What each alternative takes off a layer's relative squared error, alone.

    Args:
        index: of the decoder layer, loaded with the base's quantized weights.
        files: of the alternatives, by bits.
        inputs: the layer's, of the quantized model.
        wanted: the full-precision model's output.
        rows: the first so many are run.

    Returns:
        By linear and bits; negative where the alternative is worse than what the base has.
    """

    def error(weights: Mapping[str, Tensor] | None) -> float:
        apart = norm = 0.0
        for start in range(0, rows, batch_rows):
            stop = min(start + batch_rows, rows)
            hidden = inputs.read(start, stop).to(streamed.device)
            expected = wanted.read(start, stop).to(streamed.device).float()
            out = streamed.run(index, hidden, weights).float()
            apart += (out - expected).square().sum().item()
            norm += expected.square().sum().item()
        return apart / norm if norm else 0.0

    before = error(None)
    gains: dict[str, dict[int, float]] = {}
    for bits, path in files.items():
        for name, weight in _weights(streamed, path, bits):
            gains.setdefault(name, {})[bits] = before - error({name: weight})
    return gains


def _weights(streamed: StreamedModel, path: Path, bits: int) -> Iterator[tuple[str, Tensor]]:
    """Linears of a file of alternatives, dequantized one at a time on the model's device."""
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118  (not a mapping)
            name, _, part = key.rpartition(".")
            if part != "weight":
                continue
            words, scale, zero_point = (
                file.get_tensor(f"{name}.{p}").to(streamed.device)
                for p in ("weight", "weight_scale", "zero_point")
            )
            yield name, dequantize_packed(words, scale, zero_point, bits, dtype=streamed.dtype)
