"""How long a conversion takes: an estimate from the machine's rates, or from timed kernels."""

from __future__ import annotations

from collections import Counter

from rilq.converter.machine import Machine
from rilq.converter.options import ConvertOptions
from rilq.converter.plan.linears import LinearPlan
from rilq.converter.plan.pace import Pace, Work
from rilq.converter.plan.plan import Choices
from rilq.converter.plan.sizes import Sizes
from rilq.converter.ranks import most_rows
from rilq.converter.zero_point_cost import KINDS
from rilq.formats.spec import QuantSpec

# Clip search tries 100 ranges for each weight, each in 9 passes over float32 that read and write.
SEARCH_BYTES = 100 * 9 * 8
# A rotated weight is read and written in float64 by some five passes, and converted twice.
ROTATE_BYTES = 100
# Before each group of linears its inputs are computed: of a Llama's layer nothing, then a tenth,
# two tenths and seven tenths, and attention three times.
HESSIAN_PASSES = 1.1
# Adam's passes over what is trained, float32; a rounded weight with its gradients and moments.
UPDATE_BYTES, ROUND_BYTES = 60, 120
SMALL = 512  # hidden size below which overheads decide: 50 s planned, 124 s taken at 128
SYNCED = 0.08  # seconds of each decoder layer in which its files are written, hashed and synced


def work_to_time(quantized: tuple[LinearPlan, ...], choices: Choices, sizes: Sizes) -> Work:
    """What a measured pace has to be told."""
    return Work(
        linears=Counter(
            ((p.out_features, p.in_features), p.spec)
            for p in quantized
            if isinstance(p.spec, QuantSpec)
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
    pace: Pace | None,
    processes: int,
) -> tuple[float, str]:
    """Seconds of the linears at their pace, and of all else at the machine's rates.

    Args:
        validation: rows that are held out of the training.
        pace: as measured; None for an estimate from the machine's rates too.
        processes: that share the rows, of data and of the weights to quantize.

    Returns:
        The seconds, and in words what they rest on.
    """
    basis = f"a matrix product at {machine.flops / 1e9:.0f} GFLOP/s and an addition at "
    basis += f"{machine.bandwidth / 1e9:.1f} GB/s ({machine.name})"
    if pace is not None:
        basis += ", and these linears, their quantizer and training step, timed just now"
    else:
        pace = _estimated(sizes, machine)
        if sizes.hidden < SMALL:
            basis += "; matrices as small as this model's can take three times as long"
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
    forward = _active(sizes) * pace.token + _besides(sizes, machine)
    tokens = most_rows(sizes.rows, processes) * sizes.seqlen
    passes = 2 + HESSIAN_PASSES * sizes.hessians  # teacher, student
    seconds = tokens * (passes * forward + pace.hessian_token)
    # All processes measure the gains on the same rows, and prepare the same Hessians.
    seconds += sizes.rows * sizes.seqlen * sizes.gain_passes * forward
    seconds += pace.prepare + pace.quantize / processes + sizes.layers * SYNCED
    compared = len(KINDS) * options.keep_adapter  # both kinds of zero-point
    searched = sizes.quantized_weights * (sizes.alternatives / processes + compared)
    moved = SEARCH_BYTES * (searched + sizes.outer_packed)
    if options.rotate:
        moved += ROTATE_BYTES * sizes.parameters
    if sizes.learned_values:  # rounded in every update, once their grid is found
        each = options.layer_steps * ROUND_BYTES + SEARCH_BYTES / processes
        moved += sizes.layers * sizes.learned_values * each
        learned = options.layer_steps * most_rows(options.batch_size, processes) * sizes.seqlen
        seconds += learned * 3 * forward  # and backward
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


def _estimated(sizes: Sizes, machine: Machine) -> Pace:
    """What `machine`'s two rates say of the linears."""
    token = 2.0 * sizes.quantized_weights / machine.flops
    quantize = 2.0 * sizes.quantized_weights * sizes.widest_input / machine.flops
    searched = SEARCH_BYTES * sizes.quantized_weights * sizes.searches / machine.bandwidth
    return Pace(
        token=token,
        student_token=token,
        step_token=3 * token,
        hessian_token=1.5 * token * sizes.hessians,
        prepare=0.0,
        quantize=quantize * sizes.hessians + searched,
        read=None,
    )
