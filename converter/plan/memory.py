"""Memory that a conversion takes at most: bytes, of which `item` are those of a computed value."""

from __future__ import annotations

from rilq.calib.activations import WRITE_BEHIND
from rilq.calib.statistics import CHUNK as ROWS_IN_FLOAT32
from rilq.converter.experts import HESSIANS
from rilq.converter.loss import LOGITS
from rilq.converter.machine import LARGE_BLOCK
from rilq.converter.plan.plan import Choices
from rilq.converter.plan.sizes import Sizes
from rilq.converter.quantizers.grid import weights_at_once
from rilq.converter.quantizers.inverse_factor import AT_ONCE, factor_bytes
from rilq.converter.tiers import COPIES, pinned_bytes
from rilq.formats.packed_linear import CHUNK

FIXED, HOLES = 300 << 20, 0.08  # of a device: its context, kernels; holes in what was freed
# Of a process on a CPU, above one that has imported everything: code that is read when it is first
# used, the tokenizer; the modules of each decoder layer; and what it takes in the end, to draw the
# page of the conversion.
FIXED_CPU, MODULES, PAGE = 55 << 20, 200 << 10, 82 << 20
# Of a quantizer that takes a few rows at a time: float32 copies of the whole weight, and of them.
WHOLE, PIECES = 2.5, 16
# Blocks below `LARGE_BLOCK` stay in the heap when they are freed, and leave holes: so much while a
# model is trained in batches of such blocks, and in each layer.
HEAP, HEAP_LAYER = 12 << 20, 360 << 10
# Where the activations of all layers are kept, nodes of the graph lie between what was freed: more,
# and in each layer so many blocks of hidden states; if adapters are beside the linears also these,
# and those inside an MLP.
HEAP_KEPT, FREED, FREED_BESIDE, FREED_INNER = 16 << 20, 6, 4, 2
# Float32 values per weight while a decoder layer is trained, beside the `COPIES` of its quantizer:
# the gradient, from the second part of a batch on; the holes that small matrices leave. And of one
# linear at a time, what its backward pass takes.
LEARNED_GRADIENT, LEARNED_HOLES, LEARNED_BACK = 1, 2, 7.5


def process_bytes(work: int, layers: int) -> int:
    """Bytes of host memory that a process on a CPU takes, above an idle one.

    Args:
        work: bytes that its fullest moment needs.
        layers: decoder layers of the model.
    """
    return max(FIXED_CPU + round((1 + HOLES) * work), PAGE) + MODULES * layers


def peak_bytes(work: int, sizes: Sizes, choices: Choices) -> int:
    """Memory of the device at its fullest: `work`, and what is taken whatever the sizes."""
    if choices.device == "cpu":
        return process_bytes(work, sizes.layers)
    return round((1 + HOLES) * work) + FIXED


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
    """The layer as stored, as computed and as quantized, and the widest moment beside it.

    That is running a batch, summing or factoring a Hessian, or quantizing a linear: what one of
    them took is free again when the next one begins. On a CPU also the layer that is read
    meanwhile. Embedding and head are dropped before the first layer comes; they are quantized in
    parts.
    """
    held = sizes.layer_bytes + sizes.layer_values * item + sizes.layer_packed
    ahead = sizes.layer_bytes
    if choices.experts_apart:  # those of the output stay packed; none is read ahead
        held = sizes.rest_bytes + sizes.rest_values * item
        held += 2 * sizes.packed_experts + 3 * sizes.largest_linear * item
        ahead = sizes.rest_bytes
    if choices.device == "cpu":  # shards are mapped, and their pages counted while they are read
        held += ahead
    held += sizes.layer_alternatives
    tokens = min(choices.batch_rows, sizes.rows) * sizes.seqlen
    batch = tokens * sizes.hidden * item
    running = _running_bytes(sizes, tokens, item)
    quantizer = 8 * 4 * sizes.largest_linear
    if sizes.in_pieces:
        piece = min(sizes.largest_linear, weights_at_once(choices.device))
        quantizer = int(4 * (WHOLE * sizes.largest_linear + PIECES * piece))
    if sizes.learned_values:
        learned = sizes.learned_values if choices.trains_experts else sizes.rest_values
        quantizer = max(quantizer + 4 * learned, _learning_bytes(sizes, item, choices, learned))
    # Batches of teacher and student, each with the one that is read ahead; and to be written.
    passing = 4 * batch + running
    if choices.device == "cpu":
        passing += max(min(WRITE_BEHIND, sizes.states_bytes(item)), batch)
    moments = [passing, quantizer]
    if sizes.hessians:
        sums = 4 * sizes.widest_input**2
        kept = sums * sizes.keeps_hessians  # where adapters start from them
        width = sizes.widest_input
        experts = min(sizes.experts * sums, max(HESSIANS, sums)) if sizes.experts else 0
        moments += [
            sums + experts + 2 * batch + running + 4 * width * min(tokens, ROWS_IN_FLOAT32),
            sums + kept + quantizer + experts,
        ]
        if sizes.factors:
            factor = max(factor_bytes(width), factor_bytes(min(width, AT_ONCE)))
            moments.append(factor + kept + experts)
    outer = sizes.outer_bytes + sizes.outer_values * item + sizes.outer_packed_bytes
    outer += 8 * 4 * min(CHUNK, sizes.outer_packed)
    return max(outer, held + max(moments))


def _running_bytes(sizes: Sizes, tokens: int, item: int) -> int:
    """A decoder layer at work without gradients, where nothing is kept: attention, or an MLP.

    An MLP has its gate, the other factor and their product, or both factors as one linear gives
    them with two more; of experts one at a time.
    """
    inner = max(3 * sizes.widest_inner, 2 * sizes.widest_output)
    return tokens * (3 * sizes.hidden + max(7 * sizes.hidden, inner)) * item


def _learning_bytes(sizes: Sizes, item: int, choices: Choices, learned: int) -> int:
    """While `learned` weights of a decoder layer are trained on its output."""
    copies = sizes.learned_copies + LEARNED_GRADIENT * (choices.micro_batch < sizes.batch_size)
    if choices.device == "cpu" and 0 < 4 * sizes.largest_of_experts < LARGE_BLOCK:
        copies += LEARNED_HOLES
    values = copies * learned + LEARNED_BACK * sizes.largest_linear
    # Codes of the start, to compare with; a batch and the next, of teacher and student.
    beside = learned + 4 * sizes.batch_size * sizes.seqlen * sizes.hidden * item
    tokens = choices.micro_batch * sizes.seqlen
    loss = 4 * 4 * tokens * sizes.hidden
    return int(4 * values) + beside + loss + sizes.kept_bytes(tokens, item, inputs=True)


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
    batch = tokens * sizes.hidden * item
    # Inputs are kept for what is trained of a linear's weight, or of an adapter without groups.
    layer = sizes.kept_bytes(tokens, item, inputs=sizes.trains_scales or not sizes.pooled)
    kept = sizes.layers * (batch if choices.recompute else layer)
    # Student's and teacher's in two forms each, and gradients; a chunk of positions at once.
    logits = 8 * 4 * min(tokens * sizes.vocabulary, max(LOGITS, sizes.vocabulary))
    # Gradients of the layer at work; what is kept of it, where that is not among all layers'.
    work = tokens * (6 * sizes.hidden + 3 * sizes.intermediate) * item
    work += layer if choices.recompute else 0
    once = choices.student == "dense" and not sizes.trains_scales
    dequantized = 0 if once else 2 * 4 * sizes.largest_linear
    if sizes.trains_scales:
        dequantized += 4 * 4 * min(sizes.largest_linear, CHUNK)
    head = 0 if once else sizes.packed_head * item
    if choices.device == "cpu" and batch < LARGE_BLOCK:
        kept += _heap_bytes(sizes, batch, tokens * sizes.widest_inner * item, choices)
    kept += 2 * sizes.batch_size * sizes.seqlen * sizes.hidden * item  # targets, and the next ones
    return weights + head + kept + max(logits, work + dequantized)


def _heap_bytes(sizes: Sizes, batch: int, inner: int, choices: Choices) -> int:
    """Holes in the heap of a process on a CPU.

    An offloaded student gives blocks back from a smaller size on (`SMALL_BLOCK`).

    Args:
        batch, inner: bytes of hidden states of a micro-batch, and of what is inside an MLP.
    """
    if choices.recompute:
        return HEAP // 2 if choices.student == "offload" else HEAP + HEAP_LAYER * sizes.layers
    freed = FREED * batch
    if not sizes.trains_scales:
        freed += FREED_BESIDE * batch + FREED_INNER * inner * (inner < LARGE_BLOCK)
    return HEAP_KEPT + sizes.layers * freed


def train_host_bytes(sizes: Sizes, choices: Choices) -> int:
    """Host memory beside a GPU while training."""
    if choices.student == "offload":
        return sizes.offload.on_host()
    return 4 * sizes.trained_values  # the best ones so far
