"""Counts from which memory, disk and time of a plan follow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from transformers import PretrainedConfig

from rilq.converter.adapters import AdapterSpec
from rilq.converter.alternatives import ROWS as GAIN_ROWS
from rilq.converter.architecture import head_size
from rilq.converter.experts import names_apart, names_at_once
from rilq.converter.layers import StreamedModel
from rilq.converter.options import LAYER_QUANTIZERS, MOST_AVERAGE_BITS, ConvertOptions
from rilq.converter.plan.linears import (
    LinearPlan,
    adapter_spec,
    grid_values,
    stored_bits,
    trained_values,
    weight_count,
)
from rilq.converter.quantizers.layerwise import LEARNED
from rilq.converter.tiers import OffloadSizes, pinned_bytes
from rilq.formats.shard import TensorInfo
from rilq.formats.spec import EXPERTS, QuantSpec


@dataclass(frozen=True)
class Sizes:
    """Counts from which all figures follow; bytes are as stored unless said."""

    layers: int
    layer_values: int  # parameters of the largest decoder layer
    layer_bytes: int
    layer_page_locked: int  # the same in page-locked memory
    rest_values: int  # likewise three of the largest decoder layer without experts
    rest_bytes: int
    rest_page_locked: int
    outer_values: int
    outer_bytes: int
    outer_packed: int  # weights of embedding and head that are quantized
    outer_packed_bytes: int  # of them, as stored in the output
    packed_head: int  # weights of a quantized head, which a student holds dense
    parameters: int
    largest_linear: int
    largest_of_experts: int  # 0 without
    widest_input: int
    widest_output: int
    hidden: int
    intermediate: int  # of all experts that a token meets, with what they read
    widest_inner: int  # of one of them
    keys_and_values: int  # of a token
    normed: int  # values of a token that the norms of a decoder layer read
    vocabulary: int
    quantized_weights: int
    quantized_bits: int
    output_bytes: int
    trained_values: int
    offload: OffloadSizes
    trains_scales: bool
    trains_codes: bool
    pooled: bool  # adapters that read sums of groups, not the inputs
    batch_size: int
    rows: int
    seqlen: int
    in_pieces: bool  # how a weight is quantized: a few rows at a time
    hessians: bool
    factors: bool  # whether Hessians are, or eigenvectors are computed of them
    keeps_hessians: bool  # for adapters, beside what the quantizer makes of them
    learned_values: int  # weights of a decoder layer that are trained at once; 0 for none
    learned_copies: int  # float32 values for each of them
    experts: int  # of a decoder layer, at most
    expert_values: int  # parameters of all experts of a decoder layer
    idle_values: int  # of them, those that no token meets on average
    alternatives: int  # other bits that each linear is quantized to
    alternative_bytes: float  # of all alternatives of one weight
    gain_passes: float  # over all rows, to measure what alternatives gain

    @classmethod
    def of(
        cls,
        streamed: StreamedModel,
        quantized: tuple[LinearPlan, ...],
        packed_outer: tuple[LinearPlan, ...],
        options: ConvertOptions,
        rows: int,
        seqlen: int,
    ) -> Sizes:
        """Count, from headers alone.

        Args:
            quantized: of the decoder layers.
            packed_outer: embedding and head, where they are quantized.
            rows, seqlen: of the calibration set.
        """
        tensors, checkpoint = streamed.checkpoint.tensors, streamed.checkpoint
        config = streamed.config
        layers = [streamed.layer_names(i) for i in range(len(streamed.layers))]
        outer = streamed.outer_names()
        weights = {f"{p.name}.weight" for p in (*quantized, *packed_outer)}
        bits, outer_bits = stored_bits(quantized, options.avg_bits), stored_bits(packed_outer)
        adapters = adapter_spec(options)
        outer_stored = outer_bits // 8 + sum(tensors[n].nbytes for n in outer if n not in weights)
        apart, rest = [names_apart(n) for n in layers], [names_at_once(n) for n in layers]
        expert_values = max(_values(streamed, names) for names in apart)
        found = [streamed.experts(index) for index in range(len(layers))]
        experts = max(each[1].count if each else 0 for each in found)
        chosen = config.num_experts_per_tok if experts else 0
        # What all tokens run through, which a mixture may name and have no use for.
        widest = max(width for names in rest for n in names for width in tensors[n].shape)
        dense = min(config.intermediate_size, widest)
        # What a token takes in all experts that it meets, one after the other.
        width = getattr(config, "moe_intermediate_size", config.intermediate_size)
        met = chosen * (width + config.hidden_size)
        learns = options.quantizer in LAYER_QUANTIZERS

        def page_locked(names: Iterable[str]) -> int:
            return sum(pinned_bytes(tensors[name].nbytes) for name in names)

        return cls(
            layers=len(layers),
            layer_values=max(_values(streamed, names) for names in layers),
            layer_bytes=max(checkpoint.nbytes(names) for names in layers),
            layer_page_locked=max(page_locked(names) for names in layers),
            rest_values=max(_values(streamed, names) for names in rest),
            rest_bytes=max(checkpoint.nbytes(names) for names in rest),
            rest_page_locked=max(page_locked(names) for names in rest),
            outer_values=_values(streamed, outer),
            outer_bytes=checkpoint.nbytes(outer),
            outer_packed=weight_count(packed_outer),
            outer_packed_bytes=outer_bits // 8,
            packed_head=config.vocab_size * config.hidden_size * (options.head_bits < 16),
            parameters=_values(streamed, outer) + sum(_values(streamed, n) for n in layers),
            largest_linear=max((p.out_features * p.in_features for p in quantized), default=0),
            largest_of_experts=max(
                (p.out_features * p.in_features for p in quantized if EXPERTS in p.name), default=0
            ),
            widest_input=max((p.in_features for p in quantized), default=0),
            widest_output=max((p.out_features for p in quantized), default=0),
            hidden=streamed.config.hidden_size,
            intermediate=max(dense, met),
            widest_inner=max(dense, width if experts else 0),
            keys_and_values=2 * _kv_heads(config) * head_size(config),
            normed=max(sum(_normed(config, n) for n in names) for names in layers),
            vocabulary=streamed.config.vocab_size,
            quantized_weights=weight_count(quantized),
            quantized_bits=bits,
            output_bytes=bits // 8
            + outer_stored
            + sum(tensors[n].nbytes for names in layers for n in names if n not in weights),
            trained_values=sum(trained_values(p, options, adapters) for p in quantized),
            offload=_offload_sizes(outer_stored, layers, tensors, quantized, options, adapters),
            trains_scales=options.trains in ("scales", "adapters+scales", "all", "all+codes"),
            trains_codes=options.trains == "all+codes",
            pooled=options.adapter == "pooled",
            batch_size=options.batch_size,
            rows=rows,
            seqlen=seqlen,
            in_pieces=options.quantizer in ("rtn", "hqq", "lsq"),
            hessians=options.quantizer in ("gptq", "lsq") or options.adapter_init == "eora",
            factors=options.quantizer == "gptq" or options.adapter_init == "eora",
            keeps_hessians=options.adapter_init == "eora",
            learned_values=max(_values(streamed, names) for names in layers) * learns,
            learned_copies=LEARNED[options.quantizer].COPIES if learns else 0,
            experts=experts,
            expert_values=expert_values,
            idle_values=expert_values - expert_values * chosen // max(1, experts),
            alternatives=len(options.more_bits),
            alternative_bytes=sum(
                QuantSpec(bits, options.group_size).bits_per_weight / 8
                for bits in options.more_bits
            ),
            # A layer is run for each alternative of each of its linears, and once with none.
            gain_passes=min(1.0, GAIN_ROWS / rows)
            * (1 + len(options.more_bits) * len(quantized) / len(layers))
            * bool(options.more_bits),
        )

    @property
    def layer_alternatives(self) -> int:
        """Bytes of the largest decoder layer's alternatives."""
        return round(self.alternative_bytes * self.layer_values)

    @property
    def layer_packed(self) -> int:
        """Bytes of the largest decoder layer as the output holds it."""
        return self._packed(self.layer_values)

    @property
    def packed_experts(self) -> int:
        """Bytes of the experts of a decoder layer as the output holds them."""
        return self._packed(self.expert_values)

    def _packed(self, values: int) -> int:
        return int(values * self.quantized_bits / max(1, self.quantized_weights)) // 8

    def states_bytes(self, item: int) -> int:
        """Hidden states of all rows at a layer boundary, of `item` bytes each."""
        return self.rows * self.seqlen * self.hidden * item

    def kept_bytes(self, tokens: int, item: int, *, inputs: bool) -> int:
        """What one decoder layer keeps for its backward pass, of values with `item` bytes.

        Of the norms their inputs in float32; queries and attention's output, keys and values; of
        the MLP its gate, that through the activation, and the other factor.

        Args:
            inputs: of the linears, too.
        """
        values = 2 * self.hidden + self.keys_and_values + 3 * self.intermediate
        if inputs:
            values += 2 * self.hidden + self.intermediate
        return tokens * (4 * self.normed + values * item)


def _offload_sizes(
    outer_stored: int,
    layers: Iterable[list[str]],
    tensors: Mapping[str, TensorInfo],
    quantized: tuple[LinearPlan, ...],
    options: ConvertOptions,
    adapters: AdapterSpec,
) -> OffloadSizes:
    """Per decoder layer, upper bounds: with an average, any linear may have the most bits."""
    linears = {f"{p.name}.weight": p for p in quantized}
    stored, grids, values = [], [], 0
    for names in layers:
        own = [linears[n] for n in names if n in linears]
        size = sum(tensors[n].nbytes for n in names if n not in linears)
        for p in own:
            assert p.spec is not None, "a quantized linear without a spec"
            spec = p.spec
            if options.avg_bits is not None and isinstance(spec, QuantSpec):
                spec = replace(spec, bits=MOST_AVERAGE_BITS)
            size += int(p.out_features * p.in_features * spec.bits_per_weight) // 8
        stored.append(size)
        grids.append([grid_values(p, options) for p in own])
        values += sum(trained_values(p, options, adapters) for p in own)
    return OffloadSizes(
        outer_bytes=outer_stored,
        layer_bytes=stored,
        adapter_values=values - sum(map(sum, grids)),
        grid_values=sum(map(sum, grids)),
        layer_grid_values=max(map(sum, grids)),
        pinned_grid_bytes=sum(pinned_bytes(4 * count) for each in grids for count in each),
    )


def _kv_heads(config: PretrainedConfig) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _normed(config: PretrainedConfig, name: str) -> int:
    """Values of a token that a norm reads, by the name of its weight; 0 for other tensors."""
    if not name.endswith("norm.weight"):
        return 0
    heads = {"q_norm": config.num_attention_heads, "k_norm": _kv_heads(config)}
    module = name.split(".")[-2]
    return heads[module] * head_size(config) if module in heads else int(config.hidden_size)


def _values(streamed: StreamedModel, names: Iterable[str]) -> int:
    return sum(torch.Size(streamed.checkpoint.tensors[n].shape).numel() for n in names)
