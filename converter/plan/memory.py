"""Memory that a conversion takes at most: bytes, of which `item` are those of a computed value."""

from __future__ import annotations

from rilq.calib.activations import WRITE_BEHIND
from rilq.calib.statistics import CHUNK as ROWS_IN_FLOAT32
from rilq.converter.experts import HESSIANS
from rilq.converter.loss import LOGITS
from rilq.converter.plan.plan import Choices
from rilq.converter.plan.sizes import Sizes
from rilq.converter.quantizers.inverse_factor import AT_ONCE, factor_bytes
from rilq.converter.tiers import COPIES, pinned_bytes
from rilq.formats.packed_linear import CHUNK

# Kernels' work space, the tokenizer, code that is read when first used: 40 MB were measured of a
# conversion of one narrow layer on a CPU. And the modules of each decoder layer.
FIXED, FIXED_CPU, MODULES = 300 << 20, 39 << 20, 200 << 10
# Float32 values per weight while a decoder layer is trained: itself, what is rounded with gradient
# and two moments, and the rounded one; and of one linear at a time, what its backward pass takes.
LEARNED_COPIES, LEARNED_BACK = 6, 7
# And activations, with their gradients. Those of experts have other sizes in every batch, and leave
# holes in the heap: this much was measured of two small mixtures.
LEARNED_ACTIVATIONS, EXPERT_ACTIVATIONS = 3.0, 7.5


def fixed_on_cpu(layers: int) -> int:
    """Bytes of host memory that a conversion takes whatever its sizes, above an idle process."""
    return FIXED_CPU + MODULES * layers


def host_bytes(sizes: Sizes, item: int, choices: Choices) -> int:
    """Beside a GPU: what is outer; layers as stored; hidden states on their way.

    In page-locked memory, the layer at work and the next one, states to be written, and two
    batches each of teacher and student; elsewhere what is saved of the layer at work, and the
    next one as it is read. Experts that are apart are read one at a time, and saved packed.
    """
    outer = sizes.outer_bytes + sizes.outer_packed_bytes
    batch = choices.batch_rows * sizes.seqlen * sizes.hidden * item
    states = (4 + max(1, WRITE_BEHIND // batch)) * pinned_bytes(batch)
    layers = 2 * sizes.layer_page_locked + 2 * sizes.layer_bytes
    if choices.experts_apart:
        layers = 2 * sizes.rest_page_locked + 2 * sizes.rest_bytes
        layers += 2 * sizes.packed_experts + 3 * sizes.largest_linear * item
    return layers + outer + sizes.layer_alternatives + states


def stream_bytes(sizes: Sizes, item: int, choices: Choices) -> int:
    """Full-precision layer as stored and as computed, hidden states, and the widest moment.

    That is running a batch, factoring a Hessian, or quantizing a linear: what one of them
    took is free again when the next one begins. On a CPU also the layer that is read
    meanwhile, and what waits to be written. Embedding and head are dropped before the first
    layer comes; they are quantized in parts.
    """
    held = sizes.layer_bytes + sizes.layer_values * item
    ahead = sizes.layer_bytes
    if choices.experts_apart:  # those of the output stay packed; none is read ahead
        held = sizes.rest_bytes + sizes.rest_values * item
        held += 2 * sizes.packed_experts + 3 * sizes.largest_linear * item
        ahead = sizes.rest_bytes
    if choices.device == "cpu":  # shards are mapped, and their pages counted while they are read
        held += 2 * ahead + _written_behind(sizes, item, choices)
    # Batches of teacher and student, each with the one that is read ahead.
    tokens = choices.batch_rows * sizes.seqlen
    held += 4 * tokens * sizes.hidden * item + sizes.layer_alternatives
    # Without gradients nothing is kept of an expert once the next one runs.
    running = tokens * (10 * sizes.hidden + 4 * sizes.widest_inner) * item
    quantizer = 8 * 4 * sizes.largest_linear
    if sizes.learned_values:
        learned = sizes.learned_values if choices.trains_experts else sizes.rest_values
        training = LEARNED_COPIES * 4 * learned + LEARNED_BACK * 4 * sizes.largest_linear
        sets = EXPERT_ACTIVATIONS if sizes.experts else LEARNED_ACTIVATIONS
        training += int(sets * sizes.activations(choices.micro_batch, item))
        quantizer = max(quantizer + 4 * learned, training)
    moments = [running, quantizer]
    if sizes.hessians:
        sums = 4 * sizes.widest_input**2
        kept = sums * sizes.keeps_hessians  # where adapters start from them
        width = sizes.widest_input
        moments = [
            sums + running + 4 * width * min(tokens, ROWS_IN_FLOAT32),
            max(factor_bytes(width), factor_bytes(min(width, AT_ONCE))) + kept,
            sums + kept + quantizer,
        ]
        if sizes.experts:
            held += min(sizes.experts * sums, max(HESSIANS, sums))
    outer = sizes.outer_bytes + sizes.outer_values * item + sizes.outer_packed_bytes
    outer += 8 * 4 * min(CHUNK, sizes.outer_packed)
    return max(outer, held + max(moments))


def _written_behind(sizes: Sizes, item: int, choices: Choices) -> int:
    """Hidden states that wait to be written: the queue, or one batch if that is larger."""
    batch = choices.batch_rows * sizes.seqlen * sizes.hidden * item
    return max(min(WRITE_BEHIND, sizes.states_bytes(item)), batch)


def train_bytes(sizes: Sizes, item: int, choices: Choices) -> int:
    """Weights, what is trained with Adam and the best copy, activations, logits."""
    weights = sizes.output_bytes
    if sizes.trains_codes or (choices.student == "dense" and sizes.trains_scales):
        # A byte for each code; where codes are trained, three float32 values for each.
        weights += sizes.quantized_weights + 3 * 4 * sizes.trained_values
    elif choices.student == "dense":
        weights = sizes.outer_values * item + sizes.layers * sizes.layer_values * item
        weights += sizes.outer_packed_bytes
    weights += COPIES * 4 * sizes.trained_values
    if choices.student == "offload":
        on_cpu = choices.device == "cpu"
        weights = sizes.offload.on_cpu() if on_cpu else sizes.offload.on_device()
    tokens = choices.micro_batch * sizes.seqlen
    width = sizes.hidden
    if not choices.recompute:  # every input of an operation; float32 copies in the norms
        width = 16 * sizes.hidden + 6 * sizes.intermediate
    kept = sizes.layers * tokens * width * item
    # Student's and teacher's in two forms each, and gradients; a chunk of positions at once.
    logits = 8 * 4 * min(tokens * sizes.vocabulary, max(LOGITS, sizes.vocabulary))
    # Where all layers' are kept, those of the layer at work are among them.
    work = (3 if choices.recompute else 2) * sizes.activations(choices.micro_batch, item)
    once = choices.student == "dense" and not sizes.trains_scales
    dequantized = 0 if once else 2 * 4 * sizes.largest_linear
    if sizes.trains_scales:
        dequantized += 5 * 4 * min(sizes.largest_linear, CHUNK)
    head = 0 if once else sizes.packed_head * item
    return weights + head + kept + logits + work + dequantized


def train_host_bytes(sizes: Sizes, choices: Choices) -> int:
    """Host memory beside a GPU while training."""
    if choices.student == "offload":
        return sizes.offload.on_host()
    return 4 * sizes.trained_values  # the best ones so far
