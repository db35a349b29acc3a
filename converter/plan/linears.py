"""Linears of the decoder layers: which are quantized, and what they come to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rilq.converter.adapters import AdapterSpec, parameter_count
from rilq.converter.bit_choice import budget
from rilq.converter.layers import StreamedModel
from rilq.converter.options import TARGETS, ConvertOptions, is_router, is_target, matches
from rilq.converter.resq.sizes import PartsSpec, parts_spec
from rilq.errors import OptionError
from rilq.formats.spec import EXPERTS, GROUP_SIZES, QuantSpec


@dataclass(frozen=True)
class LinearPlan:
    """One linear: its full name and shape, and its spec, or why it has none."""

    name: str
    out_features: int
    in_features: int
    spec: QuantSpec | PartsSpec | None
    kept_because: str = ""


def planned_linears(streamed: StreamedModel, options: ConvertOptions) -> list[LinearPlan]:
    """All linears of the decoder layers, in their order.

    Raises:
        OptionError: an option names linears, and there are none of that name.
    """
    plans = []
    for index in range(len(streamed.layers)):
        for name, module in streamed.linears(index).items():
            spec: QuantSpec | PartsSpec | None = options.spec_for(name)
            if options.resq is not None:
                spec = parts_spec(options.resq, streamed.config, name, module.in_features)
            pattern = next((p for p in options.skip if matches(p, name)), "")
            why = "" if spec else "router" if is_router(name) else f"--skip {pattern}"
            plans.append(LinearPlan(name, module.out_features, module.in_features, spec, why))
    unused = [
        p for p in options.skip if p != "lm_head" and not any(matches(p, n.name) for n in plans)
    ]
    unused += [p for p, _ in options.bits_for if not any(matches(p, n.name) for n in plans)]
    if unused:
        raise OptionError(
            f"--skip / --bits-for {', '.join(unused)}: matches no linear of the decoder layers\n"
            f"  names look like {plans[0].name}; shell patterns and last parts work"
        )
    return plans


def check_group_size(options: ConvertOptions, quantized: tuple[LinearPlan, ...]) -> None:
    """Raises OptionError for linears that the group size does not divide."""
    grouped = [p for p in quantized if isinstance(p.spec, QuantSpec)]
    ragged = [p for p in grouped if p.in_features % options.group_size]
    if ragged:
        widths = {p.in_features for p in ragged}
        legal = [g for g in GROUP_SIZES if all(p.in_features % g == 0 for p in quantized)]
        remedy = f"use --group-size {legal[-1]}" if legal else "no group size fits all"
        shown = ", ".join(f"{p.name} ({p.in_features})" for p in ragged[:10])
        raise OptionError(
            f"--group-size {options.group_size}: in_features is not a multiple of it in "
            f"{len(ragged)} linears (widths {sorted(widths)}): {shown}\n"
            f"  {remedy}, or keep those linears in 16 bits with "
            f"--skip {ragged[0].name.rpartition('.')[2]}"
        )


def check_adapted(
    options: ConvertOptions, quantized: tuple[LinearPlan, ...], adapted: tuple[LinearPlan, ...]
) -> None:
    """Raises OptionError for adapter targets that name nothing, or what cannot be adapted."""
    if not options.trains_adapters:
        return
    names = [p.name for p in quantized]
    unused = [
        target
        for target in options.adapter_targets
        if target not in TARGETS and not any(is_target(target, name) for name in names)
    ]
    if names and (unused or not adapted):
        raise OptionError(
            f"--adapter-targets {', '.join(unused or options.adapter_targets)}: matches no "
            f"quantized linear\n  expected {', '.join(TARGETS)}, or a pattern; names look like "
            f"{names[0]}"
        )
    if options.adapter_init != "zero" and any(EXPERTS in p.name for p in adapted):
        raise OptionError(
            f"--adapter-init {options.adapter_init}: adapters of experts start from zero\n"
            "  use --adapter-init zero, or other --adapter-targets"
        )
    if options.adapter == "lora":
        least = min((min(p.out_features, p.in_features) for p in adapted), default=options.rank)
        if options.rank > least:
            raise OptionError(
                f"--rank {options.rank}: --adapter lora allows at most {least} here, the least "
                "width of an adapted linear\n  use a smaller --rank"
            )


def adapter_spec(options: ConvertOptions) -> AdapterSpec:
    """What adapters are as asked for; without any, of rank 1, to be asked for its targets."""
    return AdapterSpec(
        options.adapter,
        max(1, options.rank),
        options.alpha,
        options.seed,
        options.adapter_targets,
    )


def trained_values(linear: LinearPlan, options: ConvertOptions, adapters: AdapterSpec) -> int:
    """Values that are trained for one linear."""
    out, width = linear.out_features, linear.in_features
    values = grid_values(linear, options)
    if options.trains_adapters and adapters.adapts(linear.name):
        values += parameter_count(adapters, out, width, options.group_size)
    return values + (out * width if options.trains == "all+codes" else 0)


def grid_values(linear: LinearPlan, options: ConvertOptions) -> int:
    """Scales and minima that are trained for one linear."""
    each = {"scales": 1, "adapters+scales": 1, "all": 2, "all+codes": 2}.get(options.trains, 0)
    return each * linear.out_features * (linear.in_features // options.group_size)


def stored_bits(linears: Iterable[LinearPlan], average: float | None = None) -> int:
    """Bits of codes, scales and zero-points; with an average, the most that it allows."""
    linears = tuple(linears)
    stored = sum(p.out_features * p.in_features * p.spec.bits_per_weight for p in linears if p.spec)
    # With an average, all of them are the same.
    bases = [p.spec.bits for p in linears if isinstance(p.spec, QuantSpec)]
    more = budget(weight_count(linears), bases[0], average) if average is not None and bases else 0
    return int(stored) + more


def weight_count(linears: Iterable[LinearPlan]) -> int:
    """Weights of all linears together."""
    return sum(p.out_features * p.in_features for p in linears)
