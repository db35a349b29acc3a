"""Adapters fitted layer by layer at three of the scopes that RILQ's paper compares.

* `svd`: `min |W - What - B A|`, linear by linear, without data.
* `linear`: the output error of each linear. The closed form is its exact optimum.
* `layer`: the output error of each decoder layer, by gradient.

The fourth, the whole model's, is `rilq.converter.train`. All of them are found in one streaming
pass: each fit has hidden states of its own, so that every layer is fitted on what the layers before
it, with their adapters, give.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from rilq.calib.activations import ActivationStore, ActivationWriter
from rilq.calib.statistics import HessianSum
from rilq.converter.adapters import Adapter, AdapterSpec
from rilq.converter.initial import adapter_tensors, corrected, start_from
from rilq.converter.layers import StreamedModel, input_groups, linear_input
from rilq.converter.low_rank import Factors, closed_form, normal_float, svd_adapter
from rilq.converter.low_rank import pooled_error as group_means
from rilq.converter.quantizers.rtn import RtnQuantizer
from rilq.converter.spectrum import SpectrumSum
from rilq.converter.stream_options import StreamedLayer
from rilq.converter.student import AdaptedLinear
from rilq.converter.train import TrainOptions, learning_rate_at, row_order
from rilq.formats.packing import dequantize
from rilq.formats.shard_writer import write_tensors
from rilq.formats.spec import QuantSpec
from rilq.progress import Reporter

Scope = Literal["svd", "linear", "layer", "model"]
SCOPES: tuple[Scope, ...] = ("svd", "linear", "layer", "model")
CLOSED_FORMS: tuple[Scope, ...] = ("svd", "linear")
Rounding = Literal["rtn", "nf2"]


@dataclass(frozen=True)
class Fit:
    """One set of adapters: a scope, and the adapters' shape and scaling."""

    scope: Scope
    spec: AdapterSpec

    @property
    def label(self) -> str:
        """For messages and file names."""
        return f"{self.scope}-r{self.spec.rank}-a{self.spec.alpha:g}"


def base_value(weight: Tensor, spec: QuantSpec, quantizer: Rounding) -> Tensor:
    """The weight that plain rounding makes of another one, float32, both `[out, in]`."""
    if quantizer == "nf2":
        return normal_float(weight, spec.bits, spec.group_size)
    quantized = RtnQuantizer().quantize(weight, spec)
    return dequantize(quantized.codes, quantized.scale, quantized.zero_point)


class LayerFits:
    """Fits adapters to every decoder layer as it is streamed; call it with each layer in turn.

    Args:
        streamed: the model that is being streamed.
        fits: those of the scopes `svd`, `linear` and `layer`.
        spec: of every quantized linear.
        quantizer: what makes the base: "rtn" (the streamed one) or "nf2".
        rows: calibration rows, the first of those that are streamed.
        options: of the gradient steps; the last `rows - train_rows` rows take no part.
        folder: for hidden states and what is found.
        spectra: told of every linear's error.
    """

    def __init__(
        self,
        streamed: StreamedModel,
        fits: Sequence[Fit],
        spec: QuantSpec,
        quantizer: Rounding,
        *,
        rows: int,
        train_rows: int,
        batch_rows: int,
        options: TrainOptions,
        folder: Path,
        spectra: Sequence[SpectrumSum],
        report: Reporter,
    ) -> None:
        self.streamed, self.fits, self.spec, self.quantizer = streamed, fits, spec, quantizer
        self.rows, self.train_rows, self.batch_rows = rows, train_rows, batch_rows
        self.options, self.folder, self.spectra = options, folder, spectra
        self.report = report
        self.weight_errors: dict[Fit, float] = dict.fromkeys(fits, 0.0)
        self.weight_size = 0.0
        self._inputs: dict[Fit, ActivationStore] = {}

    def adapters(self, fit: Fit) -> Iterator[dict[str, Tensor]]:
        """What was found, layer by layer: `<linear>.a` and `<linear>.b`."""
        count = len(self.streamed.layers)
        yield from (load_file(self._adapters_file(fit, index)) for index in range(count))

    def values(self) -> Iterator[dict[str, Tensor]]:
        """The base's simulated weights, where the native format cannot hold them."""
        if self.quantizer != "rtn":
            count = len(self.streamed.layers)
            yield from (load_file(self._values_file(index)) for index in range(count))

    def _adapters_file(self, fit: Fit, index: int) -> Path:
        return self.folder / f"{fit.label}-{index:04d}.safetensors"

    def _values_file(self, index: int) -> Path:
        return self.folder / f"values-{index:04d}.safetensors"

    def weight_error(self, fit: Fit) -> float | None:
        """`|W - What - c B A|^2 / |W|^2` over all linears; None for the model's scope."""
        return self.weight_errors[fit] / self.weight_size if fit in self.weight_errors else None

    def __call__(self, layer: StreamedLayer) -> None:
        """Fit adapters of all kinds to a layer that is loaded and quantized."""
        linears = {
            name: module
            for name, module in self.streamed.linears(layer.index).items()
            if f"{name}.weight_scale" in layer.saved
        }
        weights = {n: layer.tensors[f"{n}.weight"].to(self.streamed.device).float()
                   for n in linears}  # fmt: skip
        values = {n: base_value(w, self.spec, self.quantizer) for n, w in weights.items()}
        self._look_at(weights)
        if self.quantizer != "rtn":
            stored = {n: v.to(self.streamed.dtype).cpu() for n, v in values.items()}
            write_tensors(self._values_file(layer.index), stored)
        for name, module in linears.items():
            value = values[name].to(module.weight.dtype)
            module.weight = nn.Parameter(value, requires_grad=False)
        ranks = [fit.spec.rank for fit in self.fits if fit.scope == "svd"]
        factors = {n: self._svd(weights[n] - values[n], max(ranks)) for n in linears if ranks}
        for fit in self.fits:
            self.report.step(layer.index, fit=fit.label)
            with self._adapted(linears, fit.spec) as adapters:
                if fit.scope == "svd":
                    for name, (b, a) in factors.items():
                        rank = fit.spec.rank  # the factors of a smaller rank come first
                        start_from(adapters[name], b[:, :rank], a[:rank])
                else:
                    self._fit_on_data(fit, layer, linears, adapters, weights, values)
            write_tensors(self._adapters_file(fit, layer.index), adapter_tensors(adapters))
            for name, adapter in adapters.items():
                size = self.spec.group_size
                whole = corrected(values[name], adapter.a, adapter.b, fit.spec, size)
                self.weight_errors[fit] += (weights[name] - whole).square().sum().item()

    def _look_at(self, weights: dict[str, Tensor]) -> None:
        """Add the errors of a layer's linears to the spectra."""
        for weight in weights.values():
            self.weight_size += weight.square().sum().item()
            for spectrum in self.spectra:
                spec = QuantSpec(spectrum.bits, self.spec.group_size)
                spectrum.add(weight, weight - base_value(weight, spec, self.quantizer))

    def _svd(self, error: Tensor, rank: int) -> Factors:
        if self._pooled:
            error = group_means(error, self.spec.group_size)
        return svd_adapter(error, rank)

    @property
    def _pooled(self) -> bool:
        return any(fit.spec.kind == "pooled" for fit in self.fits)

    # -- fits on data ------------------------------------------------------------------------------

    def _fit_on_data(
        self,
        fit: Fit,
        layer: StreamedLayer,
        linears: dict[str, nn.Linear],
        adapters: dict[str, Adapter],
        weights: dict[str, Tensor],
        values: dict[str, Tensor],
    ) -> None:
        """Fit a loaded layer's adapters, and write what the layer then gives."""
        first = ActivationStore(layer.inputs.path, self._shape(layer), layer.inputs.dtype)
        inputs = self._inputs.get(fit, first)
        if fit.scope == "linear":
            errors = {name: weights[name] - values[name] for name in linears}
            self._fit_linears(fit, layer.index, linears, adapters, errors, inputs)
        else:
            self._fit_layer(layer.index, adapters, inputs, layer.wanted)
        path = self.folder / f"{fit.label}-{layer.index + 1:04d}.bin"
        with ActivationWriter(path, inputs.shape, inputs.dtype, label=fit.label) as writer:
            for _, batch in inputs.batches(self.batch_rows):
                hidden = batch.to(self.streamed.device)
                writer.append(self.streamed.run(layer.index, hidden))
        if fit in self._inputs:
            inputs.delete()
        self._inputs[fit] = ActivationStore(path, inputs.shape, inputs.dtype)

    def _shape(self, layer: StreamedLayer) -> tuple[int, int, int]:
        return (self.rows, *layer.inputs.shape[1:])

    def _fit_linears(
        self,
        fit: Fit,
        index: int,
        linears: dict[str, nn.Linear],
        adapters: dict[str, Adapter],
        errors: dict[str, Tensor],
        inputs: ActivationStore,
    ) -> None:
        """Each linear's best correction, on inputs that the corrected ones before it make."""
        probe = inputs.read(0, 1).to(self.streamed.device)
        for group in input_groups(self.streamed, index, linears, probe):
            module = linears[group[0]]
            total = HessianSum(module.in_features, self.streamed.device)
            for start, batch in inputs.batches(self.batch_rows):
                if (batch := batch[: max(0, self.train_rows - start)]).numel():
                    hidden = batch.to(self.streamed.device)
                    total.add(linear_input(self.streamed, index, module, hidden))
            hessian = total.value()
            for name in group:
                b, a = closed_form(
                    errors[name],
                    fit.spec.rank,
                    group_size=adapters[name].pooled_over,
                    hessian=hessian,
                )
                start_from(adapters[name], b, a)

    def _fit_layer(
        self,
        index: int,
        adapters: dict[str, Adapter],
        inputs: ActivationStore,
        wanted: ActivationStore,
    ) -> None:
        """Adam on the mean squared error of the layer's output; as many steps as the model gets."""
        o = self.options
        parameters = [p for adapter in adapters.values() for p in adapter.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=o.learning_rate, foreach=True)
        order = row_order(self.train_rows, o.seed)
        for step in range(o.steps):
            for group in optimizer.param_groups:
                group["lr"] = o.learning_rate * learning_rate_at(step, o.steps)
            optimizer.zero_grad(set_to_none=True)
            rows = [next(order) for _ in range(o.batch_size)]
            for start in range(0, o.batch_size, o.micro_batch):
                part = rows[start : start + o.micro_batch]
                hidden, target = (
                    store.gather(part).to(self.streamed.device) for store in (inputs, wanted)
                )
                with torch.enable_grad():
                    out = self.streamed.run(index, hidden)
                    loss = F.mse_loss(out.float(), target.float())
                    (loss * (len(part) / o.batch_size)).backward()
            optimizer.step()

    @contextmanager
    def _adapted(
        self, linears: dict[str, nn.Linear], spec: AdapterSpec
    ) -> Iterator[dict[str, Adapter]]:
        """New adapters beside a loaded layer's linears; afterwards the linears alone again."""
        adapters = {
            name: Adapter(
                spec,
                name,
                out_features=module.out_features,
                in_features=module.in_features,
                group_size=self.spec.group_size,
                device=self.streamed.device,
            )
            for name, module in linears.items()
        }
        try:
            for name, module in linears.items():
                self.streamed.model.set_submodule(name, AdaptedLinear(module, adapters[name]))
            yield adapters
        finally:
            for name, module in linears.items():
                self.streamed.model.set_submodule(name, module)
