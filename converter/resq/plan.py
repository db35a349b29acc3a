"""What a conversion by ResQ needs: the plan of its second pass, and what the first one adds.

The second pass is planned as any conversion; memory and disk are upper bounds here too.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

from rilq.calib.activations import WRITE_BEHIND
from rilq.calib.statistics import CHUNK as ROWS_AT_ONCE
from rilq.converter.layers import StreamedModel
from rilq.converter.machine import Machine
from rilq.converter.options import ConvertOptions
from rilq.converter.plan import FIXED, WORK, Disk, Measure, Plan, make_plan, process_bytes
from rilq.converter.ranks import most_rows
from rilq.converter.resq.base import planned_checkpoint, resq_config
from rilq.converter.resq.rotated import ROWS as TURNED_ROWS
from rilq.converter.resq.rotated import resq_sizes
from rilq.converter.resq.sizes import PartsSpec, RunTimeBits

FLOAT64 = 8  # bytes
EIGH_COPIES = 8  # of the covariance: damped, eigenvectors, LAPACK's work space, the mixing
TURNING = 30  # bytes for each value of the rows that are being rotated
SLOWER = 2  # a product in float64 against one in float32
HOST_FLOPS = 4e11  # in float32 of the processors beside a GPU, assumed: nothing of them is timed


def resq_plan(
    source: StreamedModel,
    options: ConvertOptions,
    machine: Machine,
    measure: Measure[PartsSpec],
    *,
    processes: int = 1,
) -> Plan:
    """Decide how to convert by `options.method`; reads headers, touches nothing.

    Args:
        source: the full-precision model.
        measure: see `make_plan`.
        processes: that convert together.

    Raises:
        UnsupportedArchitectureError: one that ResQ is not for.
        OptionError: options that this model contradicts.
    """
    chosen = options.resq
    assert chosen is not None, "a method of ResQ's family"
    rotated = StreamedModel(
        planned_checkpoint(source.checkpoint, source), dtype=source.dtype, device=source.device
    )
    plan = make_plan(rotated, options, machine, measure, processes=processes)
    sizes, config = resq_sizes(source.config), source.config
    residual = FLOAT64 * sizes.hidden**2
    heads = FLOAT64 * sizes.layers * (sizes.kv_heads + 1) * sizes.head_dim**2
    calibrated = chosen.needs_covariances
    outer = calibrated * source.checkpoint.nbytes(source.outer_names())
    factors = resq_config(chosen, config.intermediate_size).hadamard
    online = sizes.layers * sum(order**2 for order in factors)
    online += sizes.layers * sizes.head_dim**2 * ("C" in chosen.rotations)
    output = plan.output_bytes + 4 * online
    largest = max(prod(tensor.shape) for tensor in source.checkpoint.tensors.values())
    host = plan.host_bytes + residual + heads + TURNING * min(TURNED_ROWS * sizes.hidden, largest)
    device = plan.device_bytes
    if calibrated:
        first = _first_pass(source, plan)
        host = max(host, process_bytes(EIGH_COPIES * residual + heads, plan.layers))
        if device is None:
            host = max(host, process_bytes(first, plan.layers))
        else:
            device = max(device, first + FIXED)
    specs = [(p.out_features, p.spec) for p in plan.quantized if isinstance(p.spec, PartsSpec)]
    student = max(
        sum(
            int(p.out_features * p.in_features * p.spec.bits_per_weight) // 8
            for p in plan.quantized
            if p.spec is not None and p.name.startswith(f"{source.prefix}.{index}.")
        )
        for index in range(sizes.layers)
    )
    passes = (1 + calibrated) * plan.read_bytes
    added = _seconds(source, plan, machine, processes, calibrated=calibrated)
    return replace(
        plan,
        read_bytes=passes,
        host_bytes=host + student,
        device_bytes=None if device is None else device + student,
        disks=tuple(
            _with_state(disk, (1 + 2 * calibrated) * (residual + heads) + outer, 4 * online)
            for disk in plan.disks
        ),
        output_bytes=output,
        bits_per_parameter=8 * output / plan.parameters,
        seconds=plan.seconds + added,
        notes=(*plan.notes, *_notes(calibrated)),
        run_time_bits=RunTimeBits.of(chosen, config, specs),
    )


def _first_pass(source: StreamedModel, plan: Plan) -> int:
    """Bytes at most while covariances are summed: layers, hidden states, and sums in float64."""
    checkpoint, config, choices = source.checkpoint, source.config, plan.choices
    layers = [source.layer_names(index) for index in range(plan.layers)]
    values = max(sum(prod(checkpoint.tensors[n].shape) for n in names) for names in layers)
    item, tokens = source.dtype.itemsize, choices.batch_rows * choices.seqlen
    batch = tokens * config.hidden_size * item
    held = 2 * max(map(checkpoint.nbytes, layers)) + values * item + 4 * batch
    held += max(2 * batch, WRITE_BEHIND)
    running = tokens * (10 * config.hidden_size + 4 * config.intermediate_size) * item
    rows = min(tokens, ROWS_AT_ONCE) * config.hidden_size * FLOAT64 + 3 * 4 * batch // item
    return int(held + running + rows + 2 * FLOAT64 * config.hidden_size**2)


def _with_state(disk: Disk, state: int, output: int) -> Disk:
    """A volume that also holds bases and covariances, if it holds the work folder."""
    if WORK not in dict(disk.parts):
        return disk
    added = state + output
    parts = tuple((name, size + added * (name == WORK)) for name, size in disk.parts)
    return replace(disk, needed=disk.needed + added, parts=parts)


def _seconds(
    source: StreamedModel, plan: Plan, machine: Machine, processes: int, *, calibrated: bool
) -> float:
    """Of the sums of the first pass, of the bases and of the rotation, at the machine's rates.

    Processes share the rows of the pass; each of them rotates every layer.
    """
    width = source.config.hidden_size
    tokens = most_rows(plan.rows, processes) * plan.choices.seqlen
    turning = SLOWER * 2.0 * plan.parameters * width  # every weight times U_A, by the processors
    flops = 0.0
    if calibrated:
        flops += SLOWER * 2 * 2.0 * tokens * plan.layers * width**2  # both inputs of a layer
        flops += SLOWER * 10.0 * width**3  # eigenvectors
    rate = machine.flops if machine.device_free is None else HOST_FLOPS
    return float(flops / machine.flops + turning / rate)


def _notes(calibrated: bool) -> tuple[str, ...]:
    if not calibrated:
        return ()
    return ("the checkpoint is read twice: for covariances, then to rotate and quantize it",)
