"""How long a conversion takes: an estimate from timed kernels, and from the machine's rates."""

from __future__ import annotations

from collections import Counter

from rilq.converter.machine import Machine
from rilq.converter.options import ConvertOptions
from rilq.converter.plan.linears import LinearPlan
from rilq.converter.plan.pace import Pace, Work
from rilq.converter.plan.plan import Choices
from rilq.converter.plan.sizes import Sizes
from rilq.converter.ranks import most_rows
from rilq.converter.resq.sizes import PartsSpec
from rilq.formats.spec import QuantSpec

# To find the range of a group of embedding or head: 100 of them for each weight, each in 9 passes
# over float32 that read and write.
SEARCH_BYTES = 100 * 9 * 8
# A rotated weight is read and written in float64 by some five passes, and converted twice.
ROTATE_BYTES = 100
# Before each group of linears its inputs are computed: of a Llama's layer nothing, then a tenth,
# two tenths and seven tenths, and attention three times.
HESSIAN_PASSES = 1.1
# What lies between the linears, where keys and values are turned and quantized as well.
QUANTIZED_BESIDES = 2.0
UPDATE_BYTES = 40  # Adam's passes over what is trained on the final hidden states, float32
SYNCED = 0.08  # seconds of each decoder layer in which its files are written, hashed and synced


def work_to_time(
    quantized: tuple[LinearPlan, ...], choices: Choices, sizes: Sizes
) -> Work[QuantSpec | PartsSpec]:
    """What a measured pace has to be told."""
    return Work(
        linears=Counter(
            ((p.out_features, p.in_features), p.spec) for p in quantized if p.spec is not None
        ),
        tokens=choices.batch_rows * choices.seqlen,
        step_tokens=choices.micro_batch * choices.seqlen,
        tier=choices.student,
        recompute=choices.recompute,
        trains_scales=sizes.trains_scales,
    )


def estimated_seconds(
    sizes: Sizes,
    options: ConvertOptions,
    machine: Machine,
    validation: int,
    pace: Pace,
    processes: int,
) -> tuple[float, str]:
    """Seconds of the linears at their pace, and of all else at the machine's rates.

    Args:
        validation: rows that are held out of the training.
        pace: of the linears.
        processes: that share the rows, of data and of the weights to quantize.

    Returns:
        The seconds, and in words what they rest on.
    """
    basis = f"a matrix product at {machine.flops / 1e9:.0f} GFLOP/s and an addition at "
    basis += f"{machine.bandwidth / 1e9:.1f} GB/s ({machine.name})"
    basis += ", and these linears, their quantizer and training step, timed just now"
    seconds = _streaming(sizes, options, machine, pace, processes)
    if pace.read is not None:
        read = sizes.layers * sizes.layer_bytes / pace.read
        basis += f"; reading at {pace.read / 1e9:.2g} GB/s beside it"
        seconds = max(seconds, read)
    else:
        basis += "; reading not counted"
    if options.trains != "none":
        seconds += _training(sizes, options, machine, validation, pace, processes)
    if processes > 1:
        basis += f"; shared by {processes} processes, what they send each other not counted"
    return seconds, basis


def _streaming(
    sizes: Sizes, options: ConvertOptions, machine: Machine, pace: Pace, processes: int
) -> float:
    """Seconds of the pass over all decoder layers, without reading them."""
    active, besides = _active(sizes), _besides(sizes, machine)
    teacher = active * pace.token + besides
    student = teacher
    if pace.passing_token is not None:
        student = active * pace.passing_token + QUANTIZED_BESIDES * besides
    tokens = most_rows(sizes.rows, processes) * sizes.seqlen
    # Inputs of the linears: to sum their Hessians; or their squares, of a layer that is trained.
    looked = HESSIAN_PASSES if sizes.hessians else float(sizes.learned_values > 0)
    calibrated = options.resq is not None and options.resq.needs_covariances
    seconds = tokens * ((1 + calibrated) * teacher + (1 + looked) * student + pace.hessian_token)
    seconds += (pace.quantize + pace.alternatives) / processes + sizes.layers * SYNCED
    # All processes measure the gains on the same rows, prepare the same Hessians, and compare.
    seconds += sizes.rows * sizes.seqlen * sizes.gain_passes * teacher
    seconds += pace.prepare + pace.compared
    if sizes.learned_values:
        learned = most_rows(options.batch_size, processes) * sizes.seqlen
        seconds += options.layer_steps * (pace.update + learned * 3 * teacher)  # and backward
    moved = SEARCH_BYTES * sizes.outer_packed
    if options.rotate:
        moved += ROTATE_BYTES * sizes.parameters
    return seconds + moved / machine.bandwidth


def _training(
    sizes: Sizes,
    options: ConvertOptions,
    machine: Machine,
    validation: int,
    pace: Pace,
    processes: int,
) -> float:
    """Seconds of the training on the final hidden states, with its validations."""
    active, besides = _active(sizes), _besides(sizes, machine)
    head = 2.0 * sizes.vocabulary * sizes.hidden / machine.flops  # student's, and the teacher's
    trained = options.steps * most_rows(options.batch_size, processes) * sizes.seqlen
    seconds = trained * (active * pace.step_token + 4 * besides + 5 * head)
    validations = options.steps // options.val_every + 3
    validated = validations * most_rows(validation, processes) * sizes.seqlen
    seconds += validated * (active * pace.student_token + besides + 2 * head)
    return seconds + options.steps * UPDATE_BYTES * sizes.trained_values / machine.bandwidth


def _active(sizes: Sizes) -> float:
    """Part of a decoder layer that a token meets: it does not see all experts."""
    return 1 - sizes.idle_values / sizes.layer_values


def _besides(sizes: Sizes, machine: Machine) -> float:
    """Seconds of a token for all but quantized linears.

    Those are linears that stay in 16 bits, attention, and what lies between products: norms, rotary
    embeddings, activations, residuals.
    """
    rest = sizes.layers * sizes.layer_values - sizes.quantized_weights
    flops = 2.0 * rest + 4.0 * sizes.layers * sizes.seqlen * sizes.hidden
    between = sizes.layers * (40 * sizes.hidden + 12 * sizes.intermediate)
    return flops / machine.flops + between * machine.dtype.itemsize / machine.bandwidth
