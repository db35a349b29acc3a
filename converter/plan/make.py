"""Makes the plan of a conversion."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from rilq.converter.layers import StreamedModel
from rilq.converter.machine import Machine, large_blocks_returned, least_returned
from rilq.converter.options import DEFAULT_ROWS, DEFAULT_SEQLEN, ConvertOptions
from rilq.converter.outer import is_tied, outer_specs
from rilq.converter.plan.choose import choose
from rilq.converter.plan.disks import beside_bytes, disks_needed, folder_bytes, work_bytes
from rilq.converter.plan.linears import (
    LinearPlan,
    adapter_spec,
    check_adapted,
    check_group_size,
    planned_linears,
)
from rilq.converter.plan.memory import (
    FIXED,
    host_bytes,
    peak_bytes,
    stream_bytes,
    train_bytes,
    train_host_bytes,
)
from rilq.converter.plan.pace import Measure
from rilq.converter.plan.plan import Choices, Plan
from rilq.converter.plan.seconds import estimated_seconds, work_to_time
from rilq.converter.plan.sizes import Sizes
from rilq.errors import OptionError
from rilq.progress import gigabytes


def make_plan(
    streamed: StreamedModel,
    options: ConvertOptions,
    machine: Machine,
    measure: Measure[Any],
    *,
    processes: int = 1,
) -> Plan:
    """Decide how to convert a checkpoint; reads headers, touches nothing.

    Args:
        measure: times what the conversion consists of; `seconds` and `time_basis` depend on it,
            and nothing else does.
        processes: that convert together; likewise.

    Raises:
        OptionError: options that this model contradicts; a linear that no group size divides.
    """
    config, checkpoint = streamed.config, streamed.checkpoint
    rows = options.nsamples or DEFAULT_ROWS
    seqlen = _seqlen(options, config.max_position_embeddings)
    validation = max(1, round(rows * options.val_ratio))
    linears = planned_linears(streamed, options)
    quantized = tuple(p for p in linears if p.spec is not None)
    kept = tuple((p.name, p.kept_because) for p in linears if p.spec is None)
    spec = adapter_spec(options)
    adapted = tuple(p for p in quantized if spec.adapts(p.name)) if options.trains_adapters else ()
    check_group_size(options, quantized)
    _check_rows(options, rows, validation)
    check_adapted(options, quantized, adapted)
    outer = tuple(
        LinearPlan(name, config.vocab_size, config.hidden_size, spec)
        for name, spec in outer_specs(streamed, options).items()
    )
    sizes = Sizes.of(streamed, quantized, outer, options, rows, seqlen)
    choices = choose(sizes, options, machine)
    item = getattr(torch, choices.dtype).itemsize
    stream, train = stream_bytes(sizes, item, choices), train_bytes(sizes, item, choices)
    on_cpu = machine.device_free is None
    peak = peak_bytes(max(stream, train if options.trains != "none" else 0), sizes, choices)
    host = max(host_bytes(sizes, item, choices), train_host_bytes(sizes, choices)) + FIXED
    beside = beside_bytes(sizes, quantized, options)
    output = sizes.output_bytes + beside
    # On its way to being rotated, a tensor is in memory beside the others.
    rotates = options.rotate or options.resq is not None
    rotating = max(t.nbytes for t in checkpoint.tensors.values()) if rotates else 0
    work = work_to_time(quantized, choices, sizes)
    with large_blocks_returned(least_returned(choices.student)):  # fresh pages have their price
        pace = measure(work, options, machine, checkpoint)
    seconds, basis = estimated_seconds(sizes, options, machine, validation, pace, processes)
    return Plan(
        model=checkpoint.source.label,
        architecture=type(streamed.model).__name__,
        layers=len(streamed.layers),
        hidden_size=config.hidden_size,
        parameters=sizes.parameters,
        quantized=quantized,
        kept=kept,
        avg_bits=options.avg_bits,
        embed_bits=options.embed_bits,
        head_bits=options.head_bits,
        tied=is_tied(streamed),
        experts=sizes.experts,
        outer=outer,
        rows=rows,
        validation_rows=validation,
        choices=choices,
        read_bytes=_read_bytes(streamed),
        host_bytes=(peak if on_cpu else host) + rotating,
        device_bytes=None if on_cpu else peak,
        host_free=machine.host_free,
        device_free=machine.device_free,
        disks=disks_needed(
            options,
            streamed,
            work_bytes(sizes, item, options, len(linears)),
            folder_bytes(checkpoint, output, len(linears)),
        ),
        output_bytes=output,
        bits_per_weight=sizes.quantized_bits / max(1, sizes.quantized_weights),
        bits_per_parameter=8 * sizes.output_bytes / sizes.parameters,
        seconds=seconds,
        time_basis=basis,
        notes=_notes(options, adapted, beside)
        + _expert_notes(options, choices, sizes.experts)
        + (_untied(streamed) if rotates else ()),
    )


def _seqlen(options: ConvertOptions, most: int) -> int:
    if options.seqlen is None:
        return min(DEFAULT_SEQLEN, most)
    if options.seqlen > most:
        raise OptionError(
            f"--seqlen {options.seqlen}: the model's max_position_embeddings is {most}\n"
            f"  use --seqlen {most} or less"
        )
    return options.seqlen


def _check_rows(options: ConvertOptions, rows: int, validation: int) -> None:
    if rows - validation < 1:
        raise OptionError(
            f"--val-ratio {options.val_ratio}: {validation} of {rows} rows leave none to train on"
        )


def _notes(
    options: ConvertOptions, adapted: tuple[LinearPlan, ...], beside: int
) -> tuple[str, ...]:
    notes = []
    groups = [p.in_features // options.group_size for p in adapted]
    if (
        options.trains_adapters
        and options.adapter == "pooled"
        and groups
        and options.rank > min(groups)
    ):
        limited = Counter(g for g in groups if g < options.rank)
        notes.append(
            f"rank {options.rank}: a pooled adapter's effective rank is min(rank, groups): "
            + ", ".join(f"{g} in {n} linears" for g, n in sorted(limited.items()))
        )
    if options.trains_adapters and options.adapter == "lora":
        notes.append("a plain LoRA cannot be merged; it is kept beside the base as a PEFT folder")
    if options.keep_adapter:
        notes.append(f"integer zero-points and the adapter are kept beside: {gigabytes(beside)}")
    return tuple(notes)


def _expert_notes(options: ConvertOptions, choices: Choices, experts: int) -> tuple[str, ...]:
    notes = []
    if choices.experts_apart:
        notes.append(f"the {experts} experts of a layer come one by one: together they do not fit")
    if not choices.trains_experts:
        notes.append(
            f"experts are quantized by least squares of their outputs: {options.quantizer} of a "
            "whole layer does not fit the memory, and trains the rest of it"
        )
    return tuple(notes)


def _untied(streamed: StreamedModel) -> tuple[str, ...]:
    """What a rotation adds to the output: a tied head takes up the final norm by itself."""
    outer, checkpoint = streamed.outer_names(), streamed.checkpoint
    added = checkpoint.nbytes(outer) - checkpoint.source_bytes(outer)
    if added <= 0:
        return ()
    return (f"rotated: the head is no longer tied to the embedding: {gigabytes(added)} more",)


def _read_bytes(streamed: StreamedModel) -> int:
    layers = range(len(streamed.layers))
    needed = [*streamed.outer_names(), *(n for i in layers for n in streamed.layer_names(i))]
    return streamed.checkpoint.source_bytes(needed)
