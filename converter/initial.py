"""What adapters start from: closed forms found while a layer is quantized, beside its file.

`init-XXXX.safetensors` in the work folder is committed with the layer's own file, so that the two
are of one moment; the writer of the output does not know it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors.torch import load_file
from torch import Tensor

from rilq.converter.adapters import Adapter, AdapterSpec
from rilq.converter.low_rank import closed_form, correction, loftq
from rilq.converter.options import AdapterInit
from rilq.converter.quantizers import Quantizer
from rilq.converter.workdir import WorkDir
from rilq.formats.packing import dequantize
from rilq.formats.spec import QuantizedLinear, QuantSpec

PREFIX = "init-"


@dataclass(frozen=True)
class InitialAdapters:
    """How the adapters of a conversion start.

    Attributes:
        kind: "loftq" chooses the codes together with the factors, "eora" fits factors to the
            error that the codes leave in the outputs.
        spec: of the adapters.
    """

    kind: AdapterInit
    spec: AdapterSpec

    @property
    def needs_hessian(self) -> bool:
        """Whether `quantize` must be given the Hessian of the linear's inputs."""
        return self.kind == "eora"

    def quantize(
        self,
        name: str,
        weight: Tensor,
        quantizer: Quantizer,
        spec: QuantSpec,
        prepared: Tensor | None,
        hessian: Tensor | None,
    ) -> tuple[QuantizedLinear, Adapter]:
        """Quantize a linear and fit its adapter.

        Args:
            name: full name of the linear.
            weight: `[out_features, in_features]` float32.
            prepared: as `Quantizer.quantize` takes it.
            hessian: `[in_features, in_features]` float32, if `needs_hessian`.

        Returns:
            The linear as it is stored, and the adapter to train from, on the weight's device.
        """

        def rounded(part: Tensor) -> tuple[QuantizedLinear, Tensor]:
            quantized = quantizer.quantize(part, spec, prepared)
            return quantized, dequantize(quantized.codes, quantized.scale, quantized.zero_point)

        adapter = Adapter(
            self.spec,
            name,
            out_features=weight.shape[0],
            in_features=weight.shape[1],
            group_size=spec.group_size,
            device=weight.device,
        )
        group_size = adapter.pooled_over
        if self.kind == "loftq":
            quantized, (b, a) = loftq(weight, rounded, self.spec.rank, group_size=group_size)
        else:
            quantized, value = rounded(weight)
            b, a = closed_form(
                weight - value, self.spec.rank, group_size=group_size, hessian=hessian
            )
        start_from(adapter, b, a)
        return quantized, adapter


@torch.no_grad()
def start_from(adapter: Adapter, b: Tensor, a: Tensor) -> None:
    """Make an adapter the correction `B A`: the factors over the root of its scaling each.

    Where there are fewer factors than the adapter's rank (few groups), the rest stays as it was
    drawn, with nothing in `B`.
    """
    root = math.sqrt(adapter.spec.scaling)
    adapter.b[:, : b.shape[1]] = b / root
    adapter.a[: len(a)] = a / root


@torch.no_grad()
def corrected(weight: Tensor, a: Tensor, b: Tensor, spec: AdapterSpec, group_size: int) -> Tensor:
    """A dequantized weight with its adapter added, in the weight's dtype, computed in float32."""
    a, b = a.to(weight.device), b.to(weight.device)
    added = correction(b, a, group_size if spec.kind == "pooled" else None)
    return (weight.float() + spec.scaling * added).to(weight.dtype)


def adapter_tensors(adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """`<linear>.a` and `<linear>.b`, on the CPU."""
    return {
        f"{name}.{part}": getattr(adapter, part).detach().cpu().contiguous()
        for name, adapter in adapters.items()
        for part in ("a", "b")
    }


@torch.no_grad()
def set_values(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Give those parameters that `values` names their values."""
    for name, value in values.items():
        parameters[name].copy_(value)


def use_initial(parameters: Mapping[str, Tensor], work: WorkDir) -> None:
    """Start adapters from what the streaming pass left in the work folder, if it left anything.

    Args:
        parameters: `Student.trained`.
    """
    for record in work.stage("layers"):
        for key in record.files:
            if key.startswith(PREFIX):
                set_values(parameters, load_file(work.file(key)))
