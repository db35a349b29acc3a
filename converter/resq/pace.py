"""How fast this machine does what a conversion by ResQ consists of, for its plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from rilq.converter.hadamard import hadamard_orders
from rilq.converter.machine import Machine
from rilq.converter.options import ConvertOptions
from rilq.converter.plan.pace import Pace, Work, computed_dtype, dense_pace, trained
from rilq.converter.plan.pieces import LinearPiece, Shape, WeightPieces
from rilq.converter.resq.sizes import PartsSpec
from rilq.converter.resq.weights import gptq_parts, prepare_hessian, round_parts
from rilq.formats.checkpoint import Checkpoint
from rilq.formats.resq.linear import ResqLinear
from rilq.formats.resq.parts import Parts


def measure_resq_pace(
    work: Work[PartsSpec], options: ConvertOptions, machine: Machine, checkpoint: Checkpoint
) -> Pace:
    """Time the kernels that `work` needs; see `measure_pace`."""
    assert options.resq is not None, "a method of ResQ's family"
    transforms: dict[int, tuple[int, ...]] = {}  # by the width that only down_proj has
    if "D" in options.resq.rotations:
        width = checkpoint.config["intermediate_size"]
        orders, rest = hadamard_orders(width)
        transforms[width] = (*orders, rest) if rest > 1 else orders
    dtype, device = computed_dtype(options, machine), machine.device

    def make(shape: Shape, spec: PartsSpec) -> Callable[[int], ResqLinear]:
        return partial(_linear, spec, transforms.get(shape[1], ()), dtype, device)

    passing = summing = 0.0
    for (shape, spec), count in work.linears.items():
        linear = make(shape, spec)
        # A Hessian is of quantized inputs. On average two linears share it, see `WeightPieces`.
        inputs = partial(_quantized_input, linear)
        own, shared = (
            LinearPiece(each, shape, work.tokens, dtype, device).forward()
            for each in (linear, inputs)
        )
        passing += count * own
        summing += count / 2 * shared

    pace = dense_pace(work, options, machine, checkpoint)
    if options.trains != "none":
        pace = trained(pace, work, make, dtype, device)
    prepare = _prepare if options.resq.quantizer == "gptq" else None
    weights = WeightPieces(work.linears, _quantizing, prepare, machine)
    return replace(
        pace,
        passing_token=passing,
        hessian_token=weights.hessian_token + (0.0 if prepare is None else summing),
        prepare=weights.prepare,
        quantize=weights.seconds(),
    )


def _linear(
    spec: PartsSpec,
    hadamard: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    rows: int,
) -> ResqLinear:
    """A linear of the student, with weights of zero."""
    linear = ResqLinear(
        spec.parts.size * spec.heads, rows, spec.parts,
        heads=spec.heads, hadamard=hadamard, device=device, dtype=dtype,
    )  # fmt: skip
    for tensor in linear.state_dict().values():
        tensor.zero_()
    return linear


def _quantized_input(make: Callable[[int], ResqLinear], rows: int) -> Callable[[Tensor], Tensor]:
    return make(rows).quantized_input


def _quantizing(weight: Tensor, spec: PartsSpec, prepared: Tensor | None) -> Callable[[], object]:
    """Quantizing a weight, which may have fewer columns than the spec says."""
    shares = [width / spec.parts.size for width in spec.parts.widths]
    parts = Parts.of(weight.shape[1], spec.parts.bits, shares)
    if prepared is None:
        return partial(round_parts, weight, parts)
    return partial(gptq_parts, weight, parts, prepared)


def _prepare(hessian: Tensor) -> Tensor:
    return prepare_hessian(hessian, Parts((8,), (len(hessian),)), lambda _: None)
