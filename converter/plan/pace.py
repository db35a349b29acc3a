"""How fast this machine does what a conversion consists of: its kernels, timed on small pieces.

All of it ends within about two seconds, whatever the model.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic

import torch
import xxhash
from torch import Tensor
from torch.nn import functional as F

from rilq.converter.machine import Machine
from rilq.converter.options import ConvertOptions, Tier
from rilq.converter.plan.pieces import (
    LinearPiece,
    Shape,
    Spec,
    WeightPieces,
    product_seconds,
)
from rilq.converter.quantizers import LayerQuantizer, Quantizer, build_quantizer
from rilq.converter.quantizers.layerwise import LEARNED, learned_optimizer, started
from rilq.converter.quantizers.lsq import LsqQuantizer
from rilq.converter.quantizers.rtn import RtnQuantizer
from rilq.converter.zero_point_cost import KINDS
from rilq.formats.checkpoint import Checkpoint
from rilq.formats.packed_linear import packed_linear
from rilq.formats.packing import pack, stored_codes
from rilq.formats.spec import QuantSpec

READING, CHUNK = 1.0, 8 << 20  # seconds; bytes at once


@dataclass(frozen=True)
class Work(Generic[Spec]):
    """What is to be timed: all quantized linears of a model, and how they will be used.

    Attributes:
        linears: how many there are of each shape and spec.
        tokens, step_tokens: that run at once, in the pass and in training.
    """

    linears: Mapping[tuple[Shape, Spec], int]
    tokens: int
    step_tokens: int
    tier: Tier
    recompute: bool
    trains_scales: bool


@dataclass(frozen=True)
class Pace:
    """Seconds for all quantized linears together.

    Attributes:
        token: of a token through their dense weights.
        passing_token: through the student's while it is streamed; None if that is the same.
        student_token: through the student's in training; 0 without training.
        step_token: through these and back, once more forward where activations are not kept.
        hessian_token: to add a token to the Hessians of their inputs; 0 for a quantizer without.
        prepare: for what the quantizer makes of these Hessians before it begins.
        quantize: for the quantizer; for one that is trained, to find what it starts from.
        update: of one that is trained, for all that an update does beside running the layer.
        alternatives: to quantize them at more bits.
        compared: to round them with each kind of zero-point, where that is asked for.
        read: bytes per second of the source, hashed; None if it is not here.
    """

    token: float = 0.0
    passing_token: float | None = None
    student_token: float = 0.0
    step_token: float = 0.0
    hessian_token: float = 0.0
    prepare: float = 0.0
    quantize: float = 0.0
    update: float = 0.0
    alternatives: float = 0.0
    compared: float = 0.0
    read: float | None = None


# How a plan asks for it: `measure_pace`, or what takes its place.
Measure = Callable[[Work[Spec], ConvertOptions, Machine, Checkpoint], Pace]


def measure_pace(
    work: Work[QuantSpec], options: ConvertOptions, machine: Machine, checkpoint: Checkpoint
) -> Pace:
    """Time the kernels that `work` needs."""
    dtype, device = computed_dtype(options, machine), machine.device
    pace = dense_pace(work, options, machine, checkpoint)
    if options.trains != "none":
        pace = trained(pace, work, partial(_linear, work, dtype, device), dtype, device)
    quantizer = build_quantizer(
        options.quantizer, clip=options.clip, layer_steps=options.layer_steps
    )
    if isinstance(quantizer, LayerQuantizer):
        start = WeightPieces(work.linears, partial(_start, quantizer), None, machine)
        update = WeightPieces(work.linears, partial(_update, quantizer), None, machine)
        pace = replace(pace, quantize=start.seconds(), update=update.seconds())
        other = _quantizing(LsqQuantizer(), work, machine)
    else:
        other = _quantizing(quantizer, work, machine)
        pace = replace(
            pace,
            hessian_token=other.hessian_token,
            prepare=other.prepare,
            quantize=other.seconds(),
        )
    rounding = _quantizing(RtnQuantizer("lsq"), work, machine)
    return replace(
        pace,
        alternatives=sum(other.seconds(bits=bits) for bits in options.more_bits),
        compared=sum(
            rounding.seconds(zero_point=kind) for kind in (KINDS if options.keep_adapter else ())
        ),
    )


def dense_pace(
    work: Work[Spec], options: ConvertOptions, machine: Machine, checkpoint: Checkpoint
) -> Pace:
    """Of dense linears and of reading; nothing else takes any time."""
    dtype = computed_dtype(options, machine)
    counts: Counter[Shape] = Counter()
    for (shape, _), count in work.linears.items():
        counts[shape] += count
    token = sum(
        count * product_seconds(shape, work.tokens, dtype, machine.device)
        for shape, count in counts.items()
    )
    return Pace(token=token, read=_reading(checkpoint))


def trained(
    pace: Pace,
    work: Work[Spec],
    make: Callable[[Shape, Spec], Callable[[int], Callable[[Tensor], Tensor]]],
    dtype: torch.dtype,
    device: torch.device,
) -> Pace:
    """The pace with that of training.

    Args:
        make: of a linear's shape and spec what `LinearPiece` takes.
    """
    student = both = 0.0
    for (shape, spec), count in work.linears.items():
        piece = LinearPiece(make(shape, spec), shape, work.step_tokens, dtype, device)
        once = piece.forward()
        student += count * once
        both += count * (piece.step() + once * work.recompute)
    return replace(pace, student_token=student, step_token=both)


def computed_dtype(options: ConvertOptions, machine: Machine) -> torch.dtype:
    """What layers are computed in."""
    return machine.dtype if options.dtype == "auto" else getattr(torch, options.dtype)


def _linear(
    work: Work[QuantSpec], dtype: torch.dtype, device: torch.device, shape: Shape, spec: QuantSpec
) -> Callable[[int], Callable[[Tensor], Tensor]]:
    """How to make pieces of a linear of the student."""
    width = shape[1]

    def make(rows: int) -> Callable[[Tensor], Tensor]:
        if work.tier == "dense" and not work.trains_scales:
            return partial(F.linear, weight=torch.ones(rows, width, dtype=dtype, device=device))
        words = pack(torch.zeros(rows, width, dtype=torch.uint8, device=device), spec.bits)
        if work.tier == "dense":
            words = stored_codes(words, spec.bits)
        groups = (rows, width // spec.group_size)
        scale = torch.ones(groups, device=device, requires_grad=work.trains_scales)
        zero_point = torch.ones(groups, device=device, requires_grad=work.trains_scales)
        return lambda x: packed_linear(x, words, scale, zero_point, None, spec.bits)

    return make


def _quantizing(
    quantizer: Quantizer, work: Work[QuantSpec], machine: Machine
) -> WeightPieces[QuantSpec]:
    """All linears by a quantizer that takes one weight at a time."""

    def quantize(weight: Tensor, spec: QuantSpec, prepared: Tensor | None) -> Callable[[], object]:
        return partial(quantizer.quantize, weight, spec, prepared)

    def prepare(hessian: Tensor) -> Tensor:
        return quantizer.prepare(hessian, lambda _: None)

    needed = prepare if quantizer.needs_hessian else None
    return WeightPieces(work.linears, quantize, needed, machine)


def _start(
    quantizer: LayerQuantizer, weight: Tensor, spec: QuantSpec, _: Tensor | None
) -> Callable[[], object]:
    """Finding the grid that a weight is trained from."""
    squares = torch.ones(weight.shape[1], device=weight.device)
    return lambda: started(weight, spec, quantizer.clip, squares)


def _update(
    quantizer: LayerQuantizer, weight: Tensor, spec: QuantSpec, _: Tensor | None
) -> Callable[[], object]:
    """An update of a weight that is trained: rounded, with the gradients of that, and the step."""
    squares = torch.ones(weight.shape[1], device=weight.device)
    learned = LEARNED[quantizer.name](*started(weight, spec, "none", squares))
    optimizer = learned_optimizer(quantizer.name, learned.groups(quantizer.steps))
    gradient = torch.ones_like(weight)

    @torch.enable_grad()
    def update() -> None:
        optimizer.zero_grad(set_to_none=True)
        learned().backward(gradient)
        optimizer.step()

    return update


def _reading(checkpoint: Checkpoint) -> float | None:
    """Bytes per second at which a folder's shards are read and hashed."""
    if checkpoint.source.commit is not None:
        return None
    done, begun = 0, time.perf_counter()
    for shard in checkpoint.headers:
        with checkpoint.source.path(shard).open("rb") as file:
            while chunk := file.read(CHUNK):
                xxhash.xxh3_128_digest(chunk)
                done += len(chunk)
                if time.perf_counter() - begun > READING:
                    return done / (time.perf_counter() - begun)
    return done / max(1e-9, time.perf_counter() - begun)
