"""How a loaded decoder layer is quantized: linear by linear, or all linears together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from itertools import repeat

import torch
from torch import Tensor, nn

from rilq.calib.activations import ActivationStore, prefetch
from rilq.calib.statistics import HessianSum, SquareSum
from rilq.converter.adapters import Adapter
from rilq.converter.alternatives import Alternatives
from rilq.converter.experts import (
    DATA_FREE,
    FEW,
    ExpertTokens,
    InputGroup,
    expert_groups,
    least_tokens,
    quantizer_for,
)
from rilq.converter.initial import adapter_tensors, corrected
from rilq.converter.layer_method import LayerMethod, LayerToQuantize
from rilq.converter.layers import StreamedModel, input_groups, linear_input, module_inputs
from rilq.converter.machine import return_free_memory
from rilq.converter.quantizers import LayerQuantizer, LayerTask, Quantizer
from rilq.converter.quantizers.lsq import LsqQuantizer
from rilq.converter.quantizers.shared import SharedQuantizer
from rilq.converter.states import StateFiles
from rilq.converter.stream_options import StreamOptions
from rilq.converter.train import row_order
from rilq.errors import named
from rilq.formats.native import native_tensors
from rilq.formats.packing import dequantize_packed
from rilq.formats.spec import EXPERTS, QuantizedLinear, QuantSpec
from rilq.progress import Reporter


class LayerQuantizing:
    """Quantizes one decoder layer, and runs it as it was saved.

    Args:
        streamed: the model, this layer loaded with its full-precision weights.
        states: says which rows are this process's.
        index: of the layer.
        tensors: as read from the checkpoint, by full name.
        inputs: what the quantized layer will be run on.
        wanted: the teacher's output.

    Attributes:
        others: the layer's linears at more bits, once it is quantized.
        tokens: what its experts saw by then.
    """

    def __init__(
        self,
        streamed: StreamedModel,
        options: StreamOptions,
        states: StateFiles,
        report: Reporter,
        index: int,
        tensors: Mapping[str, Tensor],
        inputs: ActivationStore,
        wanted: ActivationStore,
    ) -> None:
        self.streamed, self.options, self.report = streamed, options, report
        self.states, self.ranks = states, states.ranks
        self.index, self.tensors, self.inputs, self.wanted = index, tensors, inputs, wanted
        self.others = Alternatives(options.more_bits)
        self.tokens = ExpertTokens()

    def quantize(self) -> tuple[dict[str, Tensor], dict[str, Adapter]]:
        """Quantize the layer's linears; the loaded weights are then no longer the source's.

        Returns:
            All of its tensors as they will be stored; the adapters that start from something
            found here.
        """
        quantizer = self.options.quantizer
        if isinstance(quantizer, LayerMethod):
            layer = LayerToQuantize(self.index, self.tensors, self._batches, self.ranks)
            return quantizer.quantize(layer), {}
        linears = self.streamed.linears(self.index)
        specs = {n: s for n in linears if (s := self.options.spec_for(n))}
        kept = {n: self.tensors[n] for n in self.tensors if n.removesuffix(".weight") not in specs}
        if not specs:
            return kept, {}
        if isinstance(quantizer, LayerQuantizer):
            return kept | self._train_layer(quantizer, specs), {}
        saved, adapters = self._by_groups(quantizer, specs)
        return kept | saved, adapters

    @contextmanager
    def as_saved(self, saved: dict[str, Tensor]) -> Iterator[Callable[[Tensor], Tensor]]:
        """What runs the layer with the weights that its stored tensors stand for."""
        if isinstance(method := self.options.quantizer, LayerMethod):
            with method.as_saved(self.index, saved) as run:
                yield run
            return
        for name, module in self.streamed.linears(self.index).items():
            if (spec := self.options.spec_for(name)) is not None:
                self._assign(module, saved, name, spec)
        yield partial(self.streamed.run, self.index)

    def _assign(
        self, module: nn.Linear, stored: dict[str, Tensor], name: str, spec: QuantSpec
    ) -> None:
        """Give a loaded linear the weight that its stored tensors stand for, adapter included."""
        if EXPERTS in name and self.streamed.experts_apart:
            self.streamed.pack_linear(name, stored, spec)
            return
        words, scale, zero_point = (
            stored[f"{name}.{part}"].to(module.weight.device)
            for part in ("weight", "weight_scale", "zero_point")
        )
        weight = dequantize_packed(words, scale, zero_point, spec.bits, dtype=module.weight.dtype)
        if self.options.initial is not None and f"{name}.a" in stored:
            a, b = stored[f"{name}.a"], stored[f"{name}.b"]
            weight = corrected(weight, a, b, self.options.initial.spec, spec.group_size)
        module.weight = nn.Parameter(weight, requires_grad=False)

    # -- one weight after the other ----------------------------------------------------------------

    def _by_groups(
        self, quantizer: Quantizer, specs: dict[str, QuantSpec]
    ) -> tuple[dict[str, Tensor], dict[str, Adapter]]:
        """One weight after the other, those that share an input together.

        They are taken in the order in which they run, so that each sees what the quantized ones
        before it produce; experts after all others.
        """
        linears = {n: m for n, m in self.streamed.linears(self.index).items() if n in specs}
        adapters: dict[str, Adapter] = {}
        saved: dict[str, Tensor] = {}
        for group in self._input_groups(linears, quantizer):
            self._quantize_group(group, quantizer, linears, specs, saved, adapters)
            return_free_memory()
        return saved, adapters

    def _quantize_group(
        self,
        group: InputGroup,
        quantizer: Quantizer,
        linears: Mapping[str, nn.Linear],
        specs: Mapping[str, QuantSpec],
        saved: dict[str, Tensor],
        adapters: dict[str, Adapter],
    ) -> None:
        """Quantize linears that share an input; only what is added to the last two stays behind.

        Float weights and codes of a wide linear are not to be in memory any more when the Hessian
        of the next one is factored.
        """
        initial, prepared = self.options.initial, None
        hessian, group.hessian = group.hessian, None
        own = quantizer_for(quantizer, group, linears[group.names[0]].in_features)
        self.tokens.count(group, used=own is quantizer)
        chosen = SharedQuantizer(own, self.ranks)
        if chosen.needs_hessian:
            assert hessian is not None
            kept = hessian.clone() if self._starts_from_hessian(group) else None
            with named(group.names[0]):
                prepared = chosen.prepare(hessian, partial(self._warn, group.names))
            hessian = kept  # of a wide linear it is the largest thing in memory
        for name in group.names:
            weight = self._weight(name)
            with named(name):
                if initial is None or not initial.spec.adapts(name):
                    quantized = chosen.quantize(weight, specs[name], prepared)
                else:
                    quantized, adapters[name] = initial.quantize(
                        name, weight, chosen, specs[name], prepared, hessian
                    )
                self.others.add(name, weight, specs[name], chosen, prepared)
            native = native_tensors(name, quantized)
            started = adapter_tensors({n: a for n, a in adapters.items() if n == name})
            self._assign(linears[name], native | started, name, specs[name])
            saved |= {n: t.cpu() for n, t in native.items()}

    def _starts_from_hessian(self, group: InputGroup) -> bool:
        """Whether an adapter of some linear of a group does."""
        initial = self.options.initial
        if initial is None or not initial.needs_hessian:
            return False
        return any(map(initial.spec.adapts, group.names))

    def _input_groups(
        self, linears: dict[str, nn.Linear], quantizer: Quantizer
    ) -> Iterator[InputGroup]:
        """Linears that read the same input, with what is needed to know of it.

        Adapters of experts start from nothing, so only the quantizer may need their Hessians.
        """
        initial = self.options.initial
        needed = quantizer.needs_hessian or (initial is not None and initial.needs_hessian)
        plain = {name: module for name, module in linears.items() if EXPERTS not in name}
        probe = self.inputs.read(0, 1).to(self.streamed.device)
        for names in input_groups(self.streamed, self.index, plain, probe) if plain else []:
            yield InputGroup(names, self._hessian(plain[names[0]]) if needed else None)
        if (found := self.streamed.experts(self.index)) is not None:
            yield from expert_groups(
                *found,
                linears.keys() - plain.keys(),
                partial(self._expert_inputs, found[1]),
                hessians=quantizer.needs_hessian,
                device=self.streamed.device,
                added=self.ranks.added,
            )

    def _expert_inputs(self, experts: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """What the experts read, and which of them the router chose."""
        for hidden in self._batches():
            inputs, chosen, _ = module_inputs(self.streamed, self.index, experts, hidden)
            yield inputs, chosen

    def _hessian(self, linear: nn.Linear) -> Tensor:
        """Of a linear's inputs, over all rows."""
        total = HessianSum(linear.in_features, self.streamed.device)
        for hidden in self._batches():
            total.add(linear_input(self.streamed, self.index, linear, hidden))
        total.merge(self.ranks.added)
        return total.take()

    # -- all together ------------------------------------------------------------------------------

    def _train_layer(
        self, quantizer: LayerQuantizer, specs: dict[str, QuantSpec]
    ) -> dict[str, Tensor]:
        """All linears together, on the layer's output; alternatives by least squares.

        Experts that saw too few tokens for that, or all of them if they are not to be trained, are
        quantized before, one by one.
        """
        o = self.options
        order = row_order(o.train_rows, o.seed + self.index)

        def read() -> list[tuple[Tensor, Tensor]]:
            drawn = [next(order) for _ in range(o.batch_size)]
            rows = [drawn[place] for place in self.ranks.share(o.batch_size)]
            parts = [rows[i : i + o.micro_batch] for i in range(0, len(rows), o.micro_batch)]
            return [(self.inputs.gather(part), self.wanted.gather(part)) for part in parts]

        linears = self.streamed.linears(self.index)
        squares = self._squares(specs)
        saved: dict[str, Tensor] = {}
        for name, quantized in self._quantize_experts(quantizer, linears, specs, squares):
            native = native_tensors(name, quantized)
            self._assign(linears[name], native, name, specs[name])
            saved |= {n: t.cpu() for n, t in native.items()}
        trained = {n: s for n, s in specs.items() if f"{n}.weight" not in saved}
        if not trained:
            return saved
        layer = f"{self.streamed.prefix}.{self.index}"
        with (
            named(layer),
            closing(prefetch(repeat(read))) as batches,
        ):
            result = quantizer.quantize_layer(
                LayerTask(
                    self._weight,
                    trained,
                    {n: squares[n].value() for n in trained},
                    run=partial(self.streamed.run, self.index),
                    batches=(
                        [(self.states.here(x), self.states.here(y)) for x, y in b] for b in batches
                    ),
                    note=lambda text: self.report.note(f"{layer}: {text}"),
                    ranks=self.ranks,
                )
            )
        for name, spec in specs.items() if o.more_bits else ():
            shared = SharedQuantizer(LsqQuantizer(), self.ranks)
            self.others.add(name, self._weight(name), spec, shared, squares[name].value())
        for name, linear in result.items():
            saved |= {n: t.cpu() for n, t in native_tensors(name, linear).items()}
        return saved

    def _quantize_experts(
        self,
        quantizer: LayerQuantizer,
        linears: Mapping[str, nn.Linear],
        specs: Mapping[str, QuantSpec],
        squares: Mapping[str, SquareSum],
    ) -> Iterator[tuple[str, QuantizedLinear]]:
        """Experts' linears that are not trained, by least squares: of outputs, or of weights."""
        for name in [n for n in specs if EXPERTS in n]:
            seen = squares[name].tokens
            group = InputGroup([name], tokens=seen)
            enough = seen >= least_tokens(quantizer.name, linears[name].in_features)
            if enough and self.options.trains_experts:
                self.tokens.count(group, used=True)
                continue
            chosen = LsqQuantizer() if seen >= FEW else DATA_FREE
            self.tokens.count(group, used=chosen is not DATA_FREE)
            weight = self._weight(name)
            with named(name):
                shared = SharedQuantizer(chosen, self.ranks)
                yield name, shared.quantize(weight, specs[name], squares[name].value())

    def _squares(self, names: Iterable[str]) -> dict[str, SquareSum]:
        """Sums over the inputs of the layer's linears, over all rows."""
        linears = self.streamed.linears(self.index)
        sums = {name: SquareSum(linears[name].in_features, self.streamed.device) for name in names}
        handles = [
            linears[name].register_forward_pre_hook(lambda _module, args, s=each: s.add(args[0]))
            for name, each in sums.items()
        ]
        try:
            for hidden in self._batches():
                self.streamed.run(self.index, hidden)
        finally:
            for handle in handles:
                handle.remove()
        for each in sums.values():
            each.merge(self.ranks.added)
        return sums

    # -- for both ----------------------------------------------------------------------------------

    def _weight(self, name: str) -> Tensor:
        """A linear's weight as it is in the source, `[out, in]` float32 on the device."""
        return self.tensors[f"{name}.weight"].to(self.streamed.device, torch.float32)

    def _batches(self) -> Iterator[Tensor]:
        """This process's rows of the layer's inputs, on the device."""
        return self.states.batches(self.inputs, self.options.batch_rows)

    def _warn(self, linears: list[str], text: str) -> None:
        self.report.warn(f"{', '.join(linears)}: {text}")
