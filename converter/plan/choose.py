"""What a plan chooses from the free memory: the student's tier, and rows at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from rilq.converter.adapters import learning_rate, scales_learning_rate
from rilq.converter.machine import Machine
from rilq.converter.options import LAYER_QUANTIZERS, ConvertOptions, Tier
from rilq.converter.plan.memory import peak_bytes, stream_bytes, train_bytes
from rilq.converter.plan.plan import Choices
from rilq.converter.plan.sizes import Sizes
from rilq.errors import OptionError
from rilq.formats.writer import parse_size

STREAM_TOKENS = 1024  # tokens that run through a layer at once on a CPU: enough for any product
GPU_TOKENS = 8192  # the most on a GPU, where the memory allows them
APART_TOKENS = 16384  # likewise where experts come one by one, each again for every batch


def choose(sizes: Sizes, options: ConvertOptions, machine: Machine) -> Choices:
    """Tier and batch sizes that fit the free memory; the fastest first.

    Raises:
        OptionError: an average of bits, of a mixture whose experts have to come one by one.
    """
    dtype = options.dtype if options.dtype != "auto" else str(machine.dtype).rpartition(".")[2]
    item = getattr(torch, dtype).itemsize
    free = machine.device_free if machine.device_free is not None else machine.host_free

    def streaming(choices: Choices) -> int:
        return peak_bytes(stream_bytes(sizes, item, choices), sizes, choices)

    def training(choices: Choices) -> int:
        return peak_bytes(train_bytes(sizes, item, choices), sizes, choices)

    tiers: list[Tier] = ["dense", "packed"]
    # The state of codes nothing but the device can hold; ResQ's layers are not moved.
    if options.trains != "all+codes" and options.resq is None:
        tiers.append("offload")
    if options.student != "auto":
        tiers = [options.student]
    micros = [m for m in range(options.batch_size, 0, -1) if options.batch_size % m == 0]
    if options.micro_batch is not None:
        micros = [min(options.micro_batch, options.batch_size)]
    rate = options.learning_rate or learning_rate(sizes.hidden)
    scales_rate = options.scales_learning_rate or scales_learning_rate(sizes.hidden)
    apart = sizes.expert_values * item > _expert_memory(options, free)
    if apart and options.avg_bits is not None:
        raise OptionError(
            "--avg-bits: the experts of a layer do not fit the memory together, and each would be "
            "tried in it at other bits\n  leave out --avg-bits, or allow more --expert-memory"
        )
    batch_rows = options.micro_batch or max(1, STREAM_TOKENS // sizes.seqlen)
    plain = Choices(dtype, str(machine.device), tiers[0], batch_rows, micros[-1], rate, scales_rate,
                    sizes.seqlen, experts_apart=apart)  # fmt: skip
    if sizes.experts and options.quantizer in LAYER_QUANTIZERS:
        trains = not apart and streaming(plain) <= 0.8 * free
        plain = replace(plain, trains_experts=trains)
    tries = [replace(plain, student=t, micro_batch=m) for t in tiers for m in micros]
    # A packed student dequantizes anew for every micro-batch; a dense one with small micro-batches
    # is still faster, so the order of `tries` is that of speed.
    fitting = [c for c in tries if max(training(c), streaming(c)) <= 0.8 * free]
    chosen = fitting[0] if fitting else tries[-1]
    if options.micro_batch is None and (apart or machine.device_free is not None):
        most = min((APART_TOKENS if apart else GPU_TOKENS) // sizes.seqlen, sizes.rows)
        chosen = _filled(chosen, most, lambda c: streaming(c) <= 0.8 * free)
    if chosen.student != "dense":  # asked for, or needed, to save memory
        return chosen
    whole = replace(chosen, recompute=False)
    return whole if training(whole) <= 0.4 * free else chosen


def _filled(choices: Choices, most: int, fits: Callable[[Choices], bool]) -> Choices:
    """With `most` rows through a layer at once, halved until they fit; at least one."""
    chosen = replace(choices, batch_rows=max(1, most))
    while chosen.batch_rows > 1 and not fits(chosen):
        chosen = replace(chosen, batch_rows=chosen.batch_rows // 2)
    return chosen


def _expert_memory(options: ConvertOptions, free: int) -> int:
    """Bytes that the experts of a layer may take together."""
    return parse_size(options.expert_memory) if options.expert_memory else free // 2
