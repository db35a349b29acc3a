"""How ResQ quantizes a decoder layer, for the streaming pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from rilq.calib.statistics import HessianSum
from rilq.converter.layer_method import LayerMethod, LayerToQuantize
from rilq.converter.layers import StreamedModel, module_inputs, place_tensor
from rilq.converter.machine import return_free_memory
from rilq.converter.resq.weights import fold, gptq_parts, prepare_hessian, round_parts
from rilq.errors import named
from rilq.formats.resq.config import ResqConfig
from rilq.formats.resq.linear import ResqLinear
from rilq.formats.resq.weight import ResqWeight, resq_tensors
from rilq.progress import Reporter

KEY_ROTATION, TRANSFORMED = "self_attn.key_rotation.weight", "mlp.down_proj"

# Linears that read the same input, in the order in which they run.
GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    (TRANSFORMED,),
)


@dataclass(frozen=True)
class ResqLayers(LayerMethod):
    """Quantizes the layers of a rotated checkpoint, and runs them as a user will.

    Each group of linears is quantized on what the linears before it, quantized, give it: with
    their inputs, keys and values quantized as well.

    Attributes:
        streamed: the rotated model at full precision, prepared.
        quantization: of the output.
        key_rotations: U_C `[layers, head_dim, head_dim]` float64; None without.
        factors: of U_D, float64; none without.
        quantizer: gptq or rtn.
    """

    streamed: StreamedModel
    quantization: ResqConfig
    key_rotations: Tensor | None
    factors: Sequence[Tensor]
    quantizer: str
    report: Reporter

    @cached_property
    def _student(self) -> StreamedModel:
        """The quantized model; made when the full-precision one is prepared."""
        return self.streamed.over(self.quantization)

    def quantize(self, layer: LayerToQuantize) -> dict[str, Tensor]:
        """See `LayerMethod`."""
        student, index = self._student, layer.index
        linears = {
            name: module
            for name, module in student.linears(index).items()
            if isinstance(module, ResqLinear)
        }
        saved = {n: t for n, t in layer.tensors.items() if n.removesuffix(".weight") not in linears}
        prefix = f"{student.prefix}.{index}."
        if self.key_rotations is not None:
            rotation = self.key_rotations[index].to(torch.float32)
            saved[f"{prefix}{KEY_ROTATION}"] = rotation.contiguous()
        for number, factor in enumerate(self.factors):  # before it is run to see its inputs
            saved[f"{prefix}{TRANSFORMED}.hadamard_{number}"] = factor.to(torch.float32)
        with student.loaded(index, saved):
            for group in GROUPS:
                modules = {name: linears[name] for name in (prefix + each for each in group)}
                for tensors in self._quantize_group(layer, modules):
                    for key, tensor in tensors.items():
                        place_tensor(student.model, key, tensor, student.device)
                        saved[key] = tensor.cpu()
                return_free_memory()
        return saved

    @contextmanager
    def as_saved(
        self, index: int, saved: Mapping[str, Tensor]
    ) -> Iterator[Callable[[Tensor], Tensor]]:
        """See `LayerMethod`."""
        with self._student.loaded(index, saved) as layer:
            # torch computes with tensors of the meta device in places, and gives anything.
            empty = [name for name, tensor in layer.state_dict().items() if tensor.is_meta]
            assert not empty, f"decoder layer {index}: nothing was saved of {empty}"
            yield partial(self._student.run, index)

    def _quantize_group(
        self, layer: LayerToQuantize, modules: Mapping[str, ResqLinear]
    ) -> Iterator[dict[str, Tensor]]:
        """The stored tensors of linears that share an input, linear by linear."""
        first = next(iter(modules.values()))
        device = self.streamed.device
        factors = [f.to(device) for f in self.factors] if first.hadamard else []
        prepared = None
        if self.quantizer == "gptq":
            hessian = self._hessian(layer, first)
            warn = partial(self._warn, list(modules))
            with named(", ".join(modules)):
                prepared = prepare_hessian(hessian, first.parts, warn, heads=first.heads)
        for name, module in modules.items():
            weight = layer.tensors[f"{name}.weight"].to(device)
            if factors:
                weight = fold(weight, factors)
            with named(name):
                share = partial(_quantize_rows, weight, module, prepared)
                codes, scale = layer.ranks.by_rows(len(weight), share)
            yield resq_tensors(name, ResqWeight(codes, scale, module.parts, module.heads))

    def _hessian(self, layer: LayerToQuantize, linear: ResqLinear) -> Tensor:
        """Of a linear's inputs as they are quantized, after the transform of `down_proj`."""
        total = HessianSum(linear.in_features, self.streamed.device)
        for hidden in layer.batches():
            (inputs,) = module_inputs(self._student, layer.index, linear, hidden)
            total.add(linear.quantized_input(inputs))
        total.merge(layer.ranks.added)
        return total.take()

    def _warn(self, linears: list[str], text: str) -> None:
        self.report.warn(f"{', '.join(linears)}: {text}")


def _quantize_rows(
    weight: Tensor, module: ResqLinear, prepared: Tensor | None, rows: slice
) -> tuple[Tensor, Tensor]:
    """Codes and scales of some rows; `prepared` is the Hessian's, None to round each weight."""
    if prepared is None:
        quantized = round_parts(weight[rows], module.parts, heads=module.heads)
    else:
        quantized = gptq_parts(weight[rows], module.parts, prepared, heads=module.heads)
    return quantized.codes, quantized.scale
