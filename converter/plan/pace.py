"""How fast this machine does what a conversion consists of: its kernels, timed on small pieces.

Pieces have the widths of the model's own linears and the tokens of its own batches, but few rows of
weights; what they take is multiplied. All of it ends within about two seconds, whatever the model.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import xxhash
from torch import Tensor
from torch.nn import functional as F

from rilq.converter.machine import Machine, large_blocks_returned, seconds_of
from rilq.converter.options import ConvertOptions, Tier
from rilq.converter.quantizers import Quantizer, build_quantizer
from rilq.converter.quantizers.layerwise import LayerQuantizer
from rilq.formats.checkpoint import Checkpoint
from rilq.formats.packed_linear import packed_linear
from rilq.formats.packing import pack, stored_codes
from rilq.formats.spec import QuantSpec

PIECE = 1 << 21  # weights of a matrix product: more than a processor's own cache holds
TOKENS = 512  # of it, at most
COLUMNS, ROWS = 512, (64, 512)  # of what is quantized
READING, CHUNK = 1.0, 8 << 20  # seconds; bytes at once

Shape = tuple[int, int]  # out_features, in_features


@dataclass(frozen=True)
class Work:
    """What is to be timed: all quantized linears of a model, and how they will be used.

    Attributes:
        linears: how many there are of each shape and spec.
        tokens, step_tokens: that run at once, in the pass and in training.
    """

    linears: Mapping[tuple[Shape, QuantSpec], int]
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
        student_token: through the student's.
        step_token: through the student's and back, once more forward where activations are not
            kept.
        hessian_token: to add a token to the Hessians of their inputs; 0 for a quantizer without.
        prepare: for what the quantizer makes of these Hessians before it begins.
        quantize: for the quantizer; 0 for one that is trained, whose steps are counted elsewhere.
        read: bytes per second of the source, hashed; None if it is not here.
    """

    token: float
    student_token: float
    step_token: float
    hessian_token: float
    prepare: float
    quantize: float
    read: float | None


# How a plan asks for it: `measure_pace`, or what takes its place.
Measure = Callable[[Work, ConvertOptions, Machine, Checkpoint], Pace]


@large_blocks_returned()  # as in the conversion, where fresh pages have their price
def measure_pace(
    work: Work, options: ConvertOptions, machine: Machine, checkpoint: Checkpoint
) -> Pace:
    """Time the kernels that `work` needs."""
    device, dtype = machine.device, _dtype(options, machine)
    shapes: Counter[Shape] = Counter()
    for (shape, _), count in work.linears.items():
        shapes[shape] += count
    token = sum(n * _product(shape, work.tokens, dtype, device) for shape, n in shapes.items())
    steps = {key: _step(*key, work, dtype, device) for key in work.linears}
    hessians, prepare, quantize = _quantizing(work, options, machine)
    return Pace(
        token=token,
        student_token=sum(n * steps[key][0] for key, n in work.linears.items()),
        step_token=sum(n * steps[key][1] for key, n in work.linears.items()),
        hessian_token=hessians,
        prepare=prepare,
        quantize=quantize,
        read=_reading(checkpoint),
    )


def _dtype(options: ConvertOptions, machine: Machine) -> torch.dtype:
    return machine.dtype if options.dtype == "auto" else getattr(torch, options.dtype)


def _rows(shape: Shape, weights: int = PIECE) -> int:
    """Rows of a piece of a weight matrix."""
    return max(1, min(shape[0], weights // shape[1]))


def _product(shape: Shape, tokens: int, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds for a token through a dense linear."""
    rows, tokens = _rows(shape), min(tokens, TOKENS)
    x = torch.ones(tokens, shape[1], dtype=dtype, device=device)
    weight = torch.ones(rows, shape[1], dtype=dtype, device=device)
    return seconds_of(lambda: F.linear(x, weight), device) / tokens * shape[0] / rows


def _step(
    shape: Shape, spec: QuantSpec, work: Work, dtype: torch.dtype, device: torch.device
) -> tuple[float, float]:
    """Seconds for a token through the student's linear, and there and back in a training step."""
    rows, tokens = _rows(shape, PIECE // 4), min(work.step_tokens, TOKENS)
    x = torch.ones(tokens, shape[1], dtype=dtype, device=device, requires_grad=True)
    if work.tier == "dense" and not work.trains_scales:
        weight = torch.ones(rows, shape[1], dtype=dtype, device=device)

        def forward() -> Tensor:
            return F.linear(x, weight)
    else:
        codes = torch.zeros(rows, shape[1], dtype=torch.uint8, device=device)
        words = pack(codes, spec.bits)
        if work.tier == "dense":
            words = stored_codes(words, spec.bits)
        groups = (rows, shape[1] // spec.group_size)
        scale = torch.ones(groups, device=device, requires_grad=work.trains_scales)
        zero_point = torch.ones(groups, device=device, requires_grad=work.trains_scales)

        def forward() -> Tensor:
            return packed_linear(x, words, scale, zero_point, None, spec.bits)

    grad = torch.ones(tokens, rows, dtype=dtype, device=device)
    with torch.enable_grad():
        once = seconds_of(forward, device, calls=2)
        both = seconds_of(lambda: forward().backward(grad), device, calls=2)
    share = shape[0] / rows / tokens
    again = once if work.recompute else 0.0
    return once * share, (both + again) * share


def _quantizing(
    work: Work, options: ConvertOptions, machine: Machine
) -> tuple[float, float, float]:
    """Seconds for a token's part in all Hessians, to prepare them, and to quantize all linears."""
    quantizer = build_quantizer(
        options.quantizer, clip=options.clip, layer_steps=options.layer_steps
    )
    if isinstance(quantizer, LayerQuantizer):
        return 0.0, 0.0, 0.0
    per_token = preparing = total = 0.0
    widths = {width for (_, width), _ in work.linears} if quantizer.needs_hessian else set()
    hessians = {width: _hessian(quantizer, width, machine.device) for width in widths}
    for ((out, width), spec), count in work.linears.items():
        prepared = None
        if quantizer.needs_hessian:
            prepared, added, prepare = hessians[width]
            # Linears that share an input share its Hessian: on average two of a decoder layer's.
            per_token += count / 2 * added
            preparing += count / 2 * prepare
            # What a column's error does to those after it, beyond the columns of the piece.
            total += count * out * width * max(0, width - COLUMNS) / machine.flops
        total += count * _quantize(quantizer, (out, width), spec, prepared, machine.device)
    return per_token, preparing, total


def _hessian(quantizer: Quantizer, width: int, device: torch.device) -> tuple[Tensor, float, float]:
    """What `prepare` makes of a Hessian, of a piece; seconds to add a token, and to prepare."""
    columns = min(width, COLUMNS)
    x = torch.randn(TOKENS, columns, generator=torch.Generator().manual_seed(0)).to(device)
    sums = torch.zeros(columns, columns, device=device)
    added = seconds_of(lambda: sums.addmm_(x.T, x), device) / TOKENS
    prepared: list[Tensor] = []

    def prepare() -> None:  # which may take the Hessian's memory
        prepared.append(quantizer.prepare(sums.clone(), lambda _: None))

    preparing = seconds_of(prepare, device, calls=1)
    return prepared[-1], added * (width / columns) ** 2, preparing * (width / columns) ** 3


def _quantize(
    quantizer: Quantizer,
    shape: Shape,
    spec: QuantSpec,
    prepared: Tensor | None,
    device: torch.device,
) -> float:
    """Seconds for one weight matrix, from a piece with few rows and one with many."""
    out, width = shape
    columns = min(width, COLUMNS)
    few, many = (min(out, rows) for rows in ROWS)
    taken = []
    for rows in (few, many):
        draw = torch.Generator().manual_seed(0)
        weight = torch.randn(rows, columns, generator=draw).to(device)
        quantize = partial(quantizer.quantize, weight, spec, prepared)
        taken.append(seconds_of(quantize, device, calls=1))
    each = max(0.0, taken[1] - taken[0]) / max(1, many - few)
    return (taken[0] + each * (out - few)) * width / columns


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
