"""What a conversion will do and need; pure, printable, made before anything is touched.

Memory and disk figures are upper bounds, from shapes alone. The time is an estimate, and says what
it is based on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rilq.calib.activations import WRITE_BEHIND
from rilq.calib.statistics import CHUNK as ROWS_IN_FLOAT32
from rilq.converter.adapters import (
    AdapterSpec,
    learning_rate,
    parameter_count,
    scales_learning_rate,
)
from rilq.converter.alternatives import ROWS as GAIN_ROWS
from rilq.converter.bit_choice import budget
from rilq.converter.experts import HESSIANS, names_apart, names_at_once
from rilq.converter.layers import StreamedModel
from rilq.converter.loss import LOGITS
from rilq.converter.machine import Machine, volume_of
from rilq.converter.options import (
    DEFAULT_CLIP,
    DEFAULT_ROWS,
    DEFAULT_SEQLEN,
    LAYER_QUANTIZERS,
    MOST_AVERAGE_BITS,
    TARGETS,
    ConvertOptions,
    Tier,
    is_router,
    is_target,
    matches,
)
from rilq.converter.outer import is_tied, outer_specs
from rilq.converter.plan.pace import Measure, Pace, Work
from rilq.converter.quantizers.inverse_factor import AT_ONCE, factor_bytes
from rilq.converter.resq.sizes import PartsSpec, RunTimeBits, parts_spec
from rilq.converter.tiers import COPIES, OffloadSizes, pinned_bytes
from rilq.converter.zero_point_cost import KINDS
from rilq.errors import OptionError, OutputError
from rilq.formats.native import EXPERTS_FORMAT_VERSION, RilqConfig
from rilq.formats.packed_linear import CHUNK
from rilq.formats.shard import TensorInfo
from rilq.formats.spec import EXPERTS, GROUP_SIZES, QuantSpec
from rilq.formats.writer import parse_size
from rilq.progress import gigabytes

STREAM_TOKENS = 1024  # tokens that run through a layer at once on a CPU: enough for any product
GPU_TOKENS = 8192  # the most on a GPU, where the memory allows them
APART_TOKENS = 16384  # likewise where experts come one by one, each again for every batch
# Clip search tries 100 ranges for each weight, each in 9 passes over float32 that read and write.
SEARCH_BYTES = 100 * 9 * 8
# A rotated weight is read and written in float64 by some five passes, and converted twice.
ROTATE_BYTES = 100
# Before each group of linears its inputs are computed: of a Llama's layer nothing, then a tenth,
# two tenths and seven tenths, and attention three times.
HESSIAN_PASSES = 1.1
# Adam's passes over what is trained, float32; a rounded weight with its gradients and moments.
UPDATE_BYTES, ROUND_BYTES = 60, 120
JOURNAL = 1 << 20  # bytes of the journal, the rows, and small files beside the output
SMALL = 512  # hidden size below which overheads decide: 50 s planned, 124 s taken at 128
# Float32 values per weight while a decoder layer is trained: itself, what is rounded with gradient
# and two moments, and the rounded one; and of one linear at a time, what its backward pass takes.
LEARNED_COPIES, LEARNED_BACK = 6, 7
WORK, OUTPUT, DOWNLOADS = "the work folder", "the output", "downloads"  # what a volume holds
# Kernels' work space, the tokenizer, code that is read when first used: 40 MB were measured of a
# conversion of one narrow layer on a CPU. And the modules of each decoder layer.
FIXED, FIXED_CPU, MODULES = 300 << 20, 39 << 20, 200 << 10
SYNCED = 0.08  # seconds of each decoder layer in which its files are written, hashed and synced


@dataclass(frozen=True)
class LinearPlan:
    """One linear: its full name and shape, and its spec, or why it has none."""

    name: str
    out_features: int
    in_features: int
    spec: QuantSpec | PartsSpec | None
    kept_because: str = ""


@dataclass(frozen=True)
class Choices:
    """What was chosen automatically; a stopped job keeps it when it continues."""

    dtype: str
    device: str
    student: Tier
    batch_rows: int
    micro_batch: int
    learning_rate: float
    scales_learning_rate: float
    seqlen: int
    recompute: bool = True  # decoder layers in the backward pass, to save their activations
    experts_apart: bool = False  # experts of a layer come one by one: together they do not fit
    trains_experts: bool = True  # with the rest of their layer, by quantizers that train one


@dataclass(frozen=True)
class Disk:
    """Bytes needed on one volume, in all and for each thing that it holds, and bytes free there."""

    volume: str
    holds: str
    needed: int
    free: int
    parts: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Plan:
    """A conversion, decided.

    Attributes:
        quantized, kept: linears of the decoder layers, and what stays in 16 bits with its reason.
        avg_bits: code bits per weight at most, where linears may get more than their spec says;
            sizes and bits below are then upper bounds.
        outer: embedding and head where they are quantized; a tied head is the embedding.
        tied: embedding and head are one matrix.
        experts: in a decoder layer, at most; 0 for a model without.
        read_bytes: of the checkpoint.
        host_bytes, device_bytes: peak memory above the interpreter's own; on a CPU all is host.
        host_free, device_free: what there was of it when this was planned.
        bits_per_weight: over the quantized linears of the decoder layers, scales and zero-points
            counted.
        bits_per_parameter: over all parameters of the output.
        seconds: estimate; `time_basis` says from what.
        run_time_bits: of a method that quantizes activations and the cache too.
    """

    model: str
    architecture: str
    layers: int
    hidden_size: int
    parameters: int
    quantized: tuple[LinearPlan, ...]
    kept: tuple[tuple[str, str], ...]
    avg_bits: float | None
    embed_bits: int
    head_bits: int
    tied: bool
    experts: int
    outer: tuple[LinearPlan, ...]
    rows: int
    validation_rows: int
    choices: Choices
    read_bytes: int
    host_bytes: int
    device_bytes: int | None
    host_free: int
    device_free: int | None
    disks: tuple[Disk, ...]
    output_bytes: int
    bits_per_weight: float
    bits_per_parameter: float
    seconds: float
    time_basis: str
    notes: tuple[str, ...]
    run_time_bits: RunTimeBits | None = None

    def as_dict(self) -> dict[str, Any]:
        """As JSON values, with full words."""
        return asdict(self)

    def with_bits(self, chosen: Mapping[str, int]) -> Plan:
        """The plan once it is chosen which linears get more bits: nothing is a bound any more."""
        bound = _stored_bits(self.quantized, self.avg_bits)
        quantized = tuple(
            replace(p, spec=replace(p.spec, bits=chosen.get(p.name, p.spec.bits)))
            for p in self.quantized
            if isinstance(p.spec, QuantSpec)
        )
        bits = _stored_bits(quantized)
        output = self.output_bytes - bound // 8 + bits // 8
        return replace(
            self,
            quantized=quantized,
            avg_bits=None,
            output_bytes=output,
            bits_per_weight=bits / max(1, _weights(quantized)),
            bits_per_parameter=self.bits_per_parameter
            + 8 * (output - self.output_bytes) / self.parameters,
        )

    def quantization(self, recipe: Mapping[str, Any], bits: int, group_size: int) -> RilqConfig:
        """`quantization_config` of the output."""
        return RilqConfig(
            bits,
            group_size,
            modules_to_not_convert=[
                *(["lm_head"] if self.head_bits == 16 else []),
                *(name for name, _ in self.kept),
            ],
            embed_bits=self.embed_bits,
            head_bits=self.head_bits,
            bits_for={
                p.name: p.spec.bits
                for p in self.quantized
                if isinstance(p.spec, QuantSpec) and p.spec.bits != bits
            },
            recipe=recipe,
            format_version=EXPERTS_FORMAT_VERSION if self.experts else None,
        )


def make_plan(
    streamed: StreamedModel,
    options: ConvertOptions,
    machine: Machine,
    measure: Measure | None = None,
) -> Plan:
    """Decide how to convert a checkpoint; reads headers, touches nothing.

    Args:
        measure: times what the conversion consists of; None for an estimate from `machine` alone.
            Nothing but `seconds` and `time_basis` depends on it.

    Raises:
        OptionError: options that this model contradicts; a linear that no group size divides.
    """
    config, checkpoint = streamed.config, streamed.checkpoint
    rows = options.nsamples or DEFAULT_ROWS
    seqlen = _seqlen(options, config.max_position_embeddings)
    validation = max(1, round(rows * options.val_ratio))
    linears = _linears(streamed, options)
    quantized = tuple(p for p in linears if p.spec is not None)
    kept = tuple((p.name, p.kept_because) for p in linears if p.spec is None)
    spec = _adapter_spec(options)
    adapted = tuple(p for p in quantized if spec.adapts(p.name)) if options.trains_adapters else ()
    _check(options, quantized, rows, validation)
    _check_adapted(options, quantized, adapted)
    outer = tuple(
        LinearPlan(name, config.vocab_size, config.hidden_size, spec)
        for name, spec in outer_specs(streamed, options).items()
    )
    sizes = _Sizes.of(streamed, quantized, outer, options, rows, seqlen)
    choices = _choose(sizes, options, machine, seqlen, config.hidden_size)
    item = getattr(torch, choices.dtype).itemsize
    stream, train = sizes.stream_bytes(item, choices), sizes.train_bytes(item, choices)
    on_cpu = machine.device_free is None
    peak = max(stream, train if options.trains != "none" else 0)
    peak += fixed_on_cpu(len(streamed.layers)) if on_cpu else FIXED
    host = max(sizes.host_bytes(item, choices), sizes.train_host_bytes(choices)) + FIXED
    beside = _beside_bytes(sizes, quantized, options)
    output = sizes.output_bytes + beside
    # On its way to being rotated, a tensor is in memory beside the others.
    rotates = options.rotate or options.resq is not None
    rotating = max(t.nbytes for t in checkpoint.tensors.values()) if rotates else 0
    pace = measure and measure(_work(quantized, choices, sizes), options, machine, checkpoint)
    seconds, basis = _time(sizes, options, machine, validation, rows, pace)
    return Plan(
        model=checkpoint.source.label,
        architecture=type(streamed.model).__name__,
        layers=len(streamed.layers),
        hidden_size=config.hidden_size,
        parameters=sizes.parameters,
        quantized=quantized,
        kept=kept,
        avg_bits=options.avg_bits,
        embed_bits=options.embed_bits,
        head_bits=options.head_bits,
        tied=is_tied(streamed),
        experts=sizes.experts,
        outer=outer,
        rows=rows,
        validation_rows=validation,
        choices=choices,
        read_bytes=_read_bytes(streamed),
        host_bytes=(peak if on_cpu else host) + rotating,
        device_bytes=None if on_cpu else peak,
        host_free=machine.host_free,
        device_free=machine.device_free,
        disks=_disks(options, streamed, sizes.work_bytes(item, options), output),
        output_bytes=output,
        bits_per_weight=sizes.quantized_bits / max(1, sizes.quantized_weights),
        bits_per_parameter=8 * sizes.output_bytes / sizes.parameters,
        seconds=seconds,
        time_basis=basis,
        notes=_notes(options, adapted, beside)
        + _expert_notes(options, choices, sizes.experts)
        + (_untied(streamed) if rotates else ()),
    )


def fixed_on_cpu(layers: int) -> int:
    """Bytes of host memory that a conversion takes whatever its sizes, above an idle process."""
    return FIXED_CPU + MODULES * layers


def check_fits(plan: Plan) -> None:
    """Refuse what cannot fit, before any work.

    Raises:
        OutputError: a volume, naming it; OptionError: memory, with how to lower it.
    """
    for disk in plan.disks:
        if disk.needed > disk.free:
            raise OutputError(
                f"{disk.volume}: {gigabytes(disk.needed)} needed for {disk.holds}, "
                f"{gigabytes(disk.free)} free\n"
                "  make room, or put --output-dir, --work-dir or HF_HOME on another volume"
            )
    for what, needed, free in (
        ("host memory", plan.host_bytes, plan.host_free),
        (f"memory of {plan.choices.device}", plan.device_bytes or 0, plan.device_free or 0),
    ):
        if needed > free:
            raise OptionError(
                f"{what}: {gigabytes(needed)} needed, {gigabytes(free)} free\n"
                "  lower --seqlen, --batch-size or --micro-batch, use --student offload, or train "
                "less (--train adapters or scales, or --rank 0)"
            )


@dataclass(frozen=True)
class _Sizes:
    """Counts from which all figures follow; bytes are as stored unless said."""

    layers: int
    layer_values: int  # parameters of the largest decoder layer
    layer_bytes: int
    layer_page_locked: int  # the same in page-locked memory
    rest_values: int  # likewise three of the largest decoder layer without experts
    rest_bytes: int
    rest_page_locked: int
    outer_values: int
    outer_bytes: int
    outer_packed: int  # weights of embedding and head that are quantized
    outer_packed_bytes: int  # of them, as stored in the output
    packed_head: int  # weights of a quantized head, which a student holds dense
    parameters: int
    largest_linear: int
    widest_input: int
    hidden: int
    intermediate: int  # of all experts that a token meets, with what they read
    widest_inner: int  # of one of them
    vocabulary: int
    quantized_weights: int
    quantized_bits: int
    output_bytes: int
    trained_values: int
    offload: OffloadSizes
    trains_scales: bool
    trains_codes: bool
    rows: int
    seqlen: int
    hessians: bool
    keeps_hessians: bool  # for adapters, beside what the quantizer makes of them
    searches: bool
    learned_values: int  # weights of a decoder layer that are trained at once; 0 for none
    experts: int  # of a decoder layer, at most
    expert_values: int  # parameters of all experts of a decoder layer
    idle_values: int  # of them, those that no token meets on average
    alternatives: int  # other bits that each linear is quantized to
    alternative_bytes: float  # of all alternatives of one weight
    gain_passes: float  # over all rows, to measure what alternatives gain

    @classmethod
    def of(
        cls,
        streamed: StreamedModel,
        quantized: tuple[LinearPlan, ...],
        packed_outer: tuple[LinearPlan, ...],
        options: ConvertOptions,
        rows: int,
        seqlen: int,
    ) -> _Sizes:
        tensors, checkpoint = streamed.checkpoint.tensors, streamed.checkpoint
        config = streamed.config
        layers = [streamed.layer_names(i) for i in range(len(streamed.layers))]
        outer = streamed.outer_names()
        weights = {f"{p.name}.weight" for p in (*quantized, *packed_outer)}
        bits, outer_bits = _stored_bits(quantized, options.avg_bits), _stored_bits(packed_outer)
        head_size = streamed.config.vocab_size * streamed.config.hidden_size
        adapters = _adapter_spec(options)
        outer_stored = outer_bits // 8 + sum(tensors[n].nbytes for n in outer if n not in weights)
        apart, rest = [names_apart(n) for n in layers], [names_at_once(n) for n in layers]
        expert_values = max(_values(streamed, names) for names in apart)
        found = [streamed.experts(index) for index in range(len(layers))]
        experts = max(each[1].count if each else 0 for each in found)
        chosen = config.num_experts_per_tok if experts else 0
        # What a token takes in all experts that it meets, one after the other.
        width = getattr(config, "moe_intermediate_size", config.intermediate_size)
        met = chosen * (width + config.hidden_size)

        def page_locked(names: Iterable[str]) -> int:
            return sum(_page_locked(tensors[name].nbytes) for name in names)

        return cls(
            layers=len(layers),
            layer_values=max(_values(streamed, names) for names in layers),
            layer_bytes=max(checkpoint.nbytes(names) for names in layers),
            layer_page_locked=max(page_locked(names) for names in layers),
            rest_values=max(_values(streamed, names) for names in rest),
            rest_bytes=max(checkpoint.nbytes(names) for names in rest),
            rest_page_locked=max(page_locked(names) for names in rest),
            outer_values=_values(streamed, outer),
            outer_bytes=checkpoint.nbytes(outer),
            outer_packed=sum(p.out_features * p.in_features for p in packed_outer),
            outer_packed_bytes=outer_bits // 8,
            packed_head=head_size if options.head_bits < 16 else 0,
            parameters=_values(streamed, outer) + sum(_values(streamed, n) for n in layers),
            largest_linear=max((p.out_features * p.in_features for p in quantized), default=0),
            widest_input=max((p.in_features for p in quantized), default=0),
            hidden=streamed.config.hidden_size,
            intermediate=max(config.intermediate_size, met),
            widest_inner=max(config.intermediate_size, width),
            vocabulary=streamed.config.vocab_size,
            quantized_weights=_weights(quantized),
            quantized_bits=bits,
            output_bytes=bits // 8
            + outer_stored
            + sum(tensors[n].nbytes for names in layers for n in names if n not in weights),
            trained_values=sum(_trained_values(p, options, adapters) for p in quantized),
            offload=_offload_sizes(outer_stored, layers, tensors, quantized, options, adapters),
            trains_scales=options.trains in ("scales", "adapters+scales", "all", "all+codes"),
            trains_codes=options.trains == "all+codes",
            rows=rows,
            seqlen=seqlen,
            hessians=options.quantizer in ("gptq", "lsq") or options.adapter_init == "eora",
            keeps_hessians=options.adapter_init == "eora",
            searches=(options.clip or DEFAULT_CLIP[options.quantizer]) != "none",
            learned_values=max(_values(streamed, names) for names in layers)
            * (options.quantizer in LAYER_QUANTIZERS),
            experts=experts,
            expert_values=expert_values,
            idle_values=expert_values - expert_values * chosen // max(1, experts),
            alternatives=len(options.more_bits),
            alternative_bytes=sum(
                QuantSpec(bits, options.group_size).bits_per_weight / 8
                for bits in options.more_bits
            ),
            # A layer is run for each alternative of each of its linears, and once with none.
            gain_passes=min(1.0, GAIN_ROWS / rows)
            * (1 + len(options.more_bits) * len(quantized) / len(layers))
            * bool(options.more_bits),
        )

    def host_bytes(self, item: int, choices: Choices) -> int:
        """Beside a GPU: what is outer; layers as stored; hidden states on their way.

        In page-locked memory, the layer at work and the next one, states to be written, and two
        batches each of teacher and student; elsewhere what is saved of the layer at work, and the
        next one as it is read. Experts that are apart are read one at a time, and saved packed.
        """
        outer = self.outer_bytes + self.outer_packed_bytes
        batch = choices.batch_rows * self.seqlen * self.hidden * item
        states = (4 + max(1, WRITE_BEHIND // batch)) * _page_locked(batch)
        layers = 2 * self.layer_page_locked + 2 * self.layer_bytes
        if choices.experts_apart:
            layers = 2 * self.rest_page_locked + 2 * self.rest_bytes
            layers += 2 * self.packed_experts + 3 * self.largest_linear * item
        return layers + outer + self.layer_alternatives + states

    @property
    def layer_alternatives(self) -> int:
        """The largest decoder layer's alternatives."""
        return round(self.alternative_bytes * self.layer_values)

    @property
    def packed_experts(self) -> int:
        """Bytes of the experts of a decoder layer as the output holds them."""
        return int(self.expert_values * self.quantized_bits / max(1, self.quantized_weights)) // 8

    def states_bytes(self, item: int) -> int:
        return self.rows * self.seqlen * self.hidden * item

    def activations(self, rows: int, item: int) -> int:
        """One decoder layer at work on `rows` rows, inputs and outputs included."""
        return rows * self.seqlen * (10 * self.hidden + 4 * self.intermediate) * item

    def stream_bytes(self, item: int, choices: Choices) -> int:
        """Full-precision layer as stored and as computed, hidden states, and the widest moment.

        That is running a batch, factoring a Hessian, or quantizing a linear: what one of them
        took is free again when the next one begins. On a CPU also the layer that is read
        meanwhile, and what waits to be written. Embedding and head are dropped before the first
        layer comes; they are quantized in parts.
        """
        held = self.layer_bytes + self.layer_values * item
        ahead = self.layer_bytes
        if choices.experts_apart:  # those of the output stay packed; none is read ahead
            held = self.rest_bytes + self.rest_values * item
            held += 2 * self.packed_experts + 3 * self.largest_linear * item
            ahead = self.rest_bytes
        if (
            choices.device == "cpu"
        ):  # shards are mapped, and their pages counted while they are read
            held += 2 * ahead + self.written_behind(item, choices)
        # Batches of teacher and student, each with the one that is read ahead.
        tokens = choices.batch_rows * self.seqlen
        held += 4 * tokens * self.hidden * item + self.layer_alternatives
        # Without gradients nothing is kept of an expert once the next one runs.
        running = tokens * (10 * self.hidden + 4 * self.widest_inner) * item
        quantizer = 8 * 4 * self.largest_linear
        if self.learned_values:
            learned = self.learned_values if choices.trains_experts else self.rest_values
            training = LEARNED_COPIES * 4 * learned + LEARNED_BACK * 4 * self.largest_linear
            training += 3 * self.activations(choices.micro_batch, item)
            quantizer = max(quantizer + 4 * learned, training)
        moments = [running, quantizer]
        if self.hessians:
            sums = 4 * self.widest_input**2
            kept = sums * self.keeps_hessians  # where adapters start from them
            width = self.widest_input
            moments = [
                sums + running + 4 * width * min(tokens, ROWS_IN_FLOAT32),
                max(factor_bytes(width), factor_bytes(min(width, AT_ONCE))) + kept,
                sums + kept + quantizer,
            ]
            if self.experts:
                held += min(self.experts * sums, max(HESSIANS, sums))
        outer = self.outer_bytes + self.outer_values * item + self.outer_packed_bytes
        outer += 8 * 4 * min(CHUNK, self.outer_packed)
        return max(outer, held + max(moments))

    def written_behind(self, item: int, choices: Choices) -> int:
        """Hidden states that wait to be written: the queue, or one batch if that is larger."""
        batch = choices.batch_rows * self.seqlen * self.hidden * item
        return max(min(WRITE_BEHIND, self.states_bytes(item)), batch)

    def train_bytes(self, item: int, choices: Choices) -> int:
        """Weights, what is trained with Adam and the best copy, activations, logits."""
        weights = self.output_bytes
        if self.trains_codes or (choices.student == "dense" and self.trains_scales):
            # A byte for each code; where codes are trained, three float32 values for each.
            weights += self.quantized_weights + 3 * 4 * self.trained_values
        elif choices.student == "dense":
            weights = self.outer_values * item + self.layers * self.layer_values * item
            weights += self.outer_packed_bytes
        weights += COPIES * 4 * self.trained_values
        if choices.student == "offload":
            on_cpu = choices.device == "cpu"
            weights = self.offload.on_cpu() if on_cpu else self.offload.on_device()
        tokens = choices.micro_batch * self.seqlen
        width = self.hidden
        if not choices.recompute:  # every input of an operation; float32 copies in the norms
            width = 16 * self.hidden + 6 * self.intermediate
        kept = self.layers * tokens * width * item
        # Student's and teacher's in two forms each, and gradients; a chunk of positions at once.
        logits = 8 * 4 * min(tokens * self.vocabulary, max(LOGITS, self.vocabulary))
        # Where all layers' are kept, those of the layer at work are among them.
        work = (3 if choices.recompute else 2) * self.activations(choices.micro_batch, item)
        once = choices.student == "dense" and not self.trains_scales
        dequantized = 0 if once else 2 * 4 * self.largest_linear
        if self.trains_scales:
            dequantized += 5 * 4 * min(self.largest_linear, CHUNK)
        head = 0 if once else self.packed_head * item
        return weights + head + kept + logits + work + dequantized

    def train_host_bytes(self, choices: Choices) -> int:
        """Host memory beside a GPU while training."""
        if choices.student == "offload":
            return self.offload.on_host()
        return 4 * self.trained_values  # the best ones so far

    def work_bytes(self, item: int, options: ConvertOptions) -> tuple[int, int]:
        """Bytes of the work folder at its fullest, and while the output is written.

        Layers and outer tensors are there all the time: of embedding and head that are quantized,
        both the source's and the output's; of linears all alternatives. To them come, in the pass,
        four sets of states; in training, the targets and two training states; while the output is
        written, the targets, the last training state and the best values.
        """
        kept = self.output_bytes + (self.outer_bytes if self.outer_packed else 0)
        kept += round(self.alternative_bytes * self.quantized_weights) + JOURNAL
        states, values = self.states_bytes(item), 4 * self.trained_values
        if options.adapter_init != "zero":
            kept += values
        if options.trains == "none":
            return kept + 4 * states, kept + 2 * states
        training = states + 2 * 4 * values
        return kept + max(4 * states, training), kept + states + 5 * values


def _page_locked(nbytes: int) -> int:
    """What torch takes of page-locked memory for a tensor: the next power of two."""
    return 1 << (nbytes - 1).bit_length()


def _beside_bytes(sizes: _Sizes, quantized: tuple[LinearPlan, ...], options: ConvertOptions) -> int:
    """What lies beside the checkpoint: a plain LoRA, or an integer base with its adapter."""
    if options.adapter == "lora":
        return 4 * sizes.trained_values
    if not options.keep_adapter:
        return 0
    grids = sum(p.out_features * (p.in_features // options.group_size) for p in quantized)
    return grids + sum(4 * options.rank * (p.out_features + p.in_features) for p in quantized)


def _adapter_spec(options: ConvertOptions) -> AdapterSpec:
    return AdapterSpec(
        options.adapter,
        max(1, options.rank),
        options.alpha,
        options.seed,
        options.adapter_targets,
    )


def _trained_values(linear: LinearPlan, options: ConvertOptions, adapters: AdapterSpec) -> int:
    """Values that are trained for one linear."""
    out, width = linear.out_features, linear.in_features
    values = _grid_values(linear, options)
    if options.trains_adapters and adapters.adapts(linear.name):
        values += parameter_count(adapters, out, width, options.group_size)
    return values + (out * width if options.trains == "all+codes" else 0)


def _grid_values(linear: LinearPlan, options: ConvertOptions) -> int:
    """Scales and minima that are trained for one linear."""
    each = {"scales": 1, "adapters+scales": 1, "all": 2, "all+codes": 2}.get(options.trains, 0)
    return each * linear.out_features * (linear.in_features // options.group_size)


def _offload_sizes(
    outer_stored: int,
    layers: Iterable[list[str]],
    tensors: Mapping[str, TensorInfo],
    quantized: tuple[LinearPlan, ...],
    options: ConvertOptions,
    adapters: AdapterSpec,
) -> OffloadSizes:
    """Per decoder layer, upper bounds: with an average, any linear may have the most bits."""
    linears = {f"{p.name}.weight": p for p in quantized}
    stored, grids, values = [], [], 0
    for names in layers:
        own = [linears[n] for n in names if n in linears]
        size = sum(tensors[n].nbytes for n in names if n not in linears)
        for p in own:
            assert p.spec is not None, "a quantized linear without a spec"
            spec = p.spec
            if options.avg_bits is not None and isinstance(spec, QuantSpec):
                spec = replace(spec, bits=MOST_AVERAGE_BITS)
            size += int(p.out_features * p.in_features * spec.bits_per_weight) // 8
        stored.append(size)
        grids.append([_grid_values(p, options) for p in own])
        values += sum(_trained_values(p, options, adapters) for p in own)
    return OffloadSizes(
        outer_bytes=outer_stored,
        layer_bytes=stored,
        adapter_values=values - sum(map(sum, grids)),
        grid_values=sum(map(sum, grids)),
        layer_grid_values=max(map(sum, grids)),
        pinned_grid_bytes=sum(pinned_bytes(4 * count) for each in grids for count in each),
    )


def _stored_bits(linears: Iterable[LinearPlan], average: float | None = None) -> int:
    """Bits of codes, scales and zero-points; with an average, the most that it allows."""
    linears = tuple(linears)
    stored = sum(p.out_features * p.in_features * p.spec.bits_per_weight for p in linears if p.spec)
    # With an average, all of them are the same.
    bases = [p.spec.bits for p in linears if isinstance(p.spec, QuantSpec)]
    more = budget(_weights(linears), bases[0], average) if average is not None and bases else 0
    return int(stored) + more


def _weights(linears: Iterable[LinearPlan]) -> int:
    return sum(p.out_features * p.in_features for p in linears)


def _values(streamed: StreamedModel, names: Iterable[str]) -> int:
    return sum(torch.Size(streamed.checkpoint.tensors[n].shape).numel() for n in names)


def _read_bytes(streamed: StreamedModel) -> int:
    layers = range(len(streamed.layers))
    needed = [*streamed.outer_names(), *(n for i in layers for n in streamed.layer_names(i))]
    return streamed.checkpoint.source_bytes(needed)


def _seqlen(options: ConvertOptions, most: int) -> int:
    if options.seqlen is None:
        return min(DEFAULT_SEQLEN, most)
    if options.seqlen > most:
        raise OptionError(
            f"--seqlen {options.seqlen}: the model's max_position_embeddings is {most}\n"
            f"  use --seqlen {most} or less"
        )
    return options.seqlen


def _linears(streamed: StreamedModel, options: ConvertOptions) -> list[LinearPlan]:
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


def _check(
    options: ConvertOptions, quantized: tuple[LinearPlan, ...], rows: int, validation: int
) -> None:
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
    if rows - validation < 1:
        raise OptionError(
            f"--val-ratio {options.val_ratio}: {validation} of {rows} rows leave none to train on"
        )


def _check_adapted(
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


def _expert_notes(options: ConvertOptions, choices: Choices, experts: int) -> tuple[str, ...]:
    notes = []
    if choices.experts_apart:
        notes.append(f"the {experts} experts of a layer come one by one: together they do not fit")
    if not choices.trains_experts:
        notes.append(
            f"experts are quantized by least squares of their outputs: {options.quantizer} of a "
            "whole layer does not fit the memory, and trains the rest of it"
        )
    return tuple(notes)


def _notes(
    options: ConvertOptions, adapted: tuple[LinearPlan, ...], beside: int
) -> tuple[str, ...]:
    notes = []
    groups = [p.in_features // options.group_size for p in adapted]
    if (
        options.trains_adapters
        and options.adapter == "pooled"
        and groups
        and options.rank > min(groups)
    ):
        limited = Counter(g for g in groups if g < options.rank)
        notes.append(
            f"rank {options.rank}: a pooled adapter's effective rank is min(rank, groups): "
            + ", ".join(f"{g} in {n} linears" for g, n in sorted(limited.items()))
        )
    if options.trains_adapters and options.adapter == "lora":
        notes.append("a plain LoRA cannot be merged; it is kept beside the base as a PEFT folder")
    if options.keep_adapter:
        notes.append(f"integer zero-points and the adapter are kept beside: {gigabytes(beside)}")
    return tuple(notes)


def _untied(streamed: StreamedModel) -> tuple[str, ...]:
    """What a rotation adds to the output: a tied head takes up the final norm by itself."""
    outer, checkpoint = streamed.outer_names(), streamed.checkpoint
    added = checkpoint.nbytes(outer) - checkpoint.source_bytes(outer)
    if added <= 0:
        return ()
    return (f"rotated: the head is no longer tied to the embedding: {gigabytes(added)} more",)


def _choose(
    sizes: _Sizes, options: ConvertOptions, machine: Machine, seqlen: int, hidden: int
) -> Choices:
    """Tier and batch sizes that fit the free memory; the fastest first."""
    dtype = options.dtype if options.dtype != "auto" else str(machine.dtype).rpartition(".")[2]
    item = getattr(torch, dtype).itemsize
    free = machine.device_free if machine.device_free is not None else machine.host_free
    tiers: list[Tier] = ["dense", "packed"]
    # The state of codes nothing but the device can hold; ResQ's layers are not moved.
    if options.trains != "all+codes" and options.resq is None:
        tiers.append("offload")
    if options.student != "auto":
        tiers = [options.student]
    micros = [m for m in range(options.batch_size, 0, -1) if options.batch_size % m == 0]
    if options.micro_batch is not None:
        micros = [min(options.micro_batch, options.batch_size)]
    rate = options.learning_rate or learning_rate(hidden)
    scales_rate = options.scales_learning_rate or scales_learning_rate(hidden)
    apart = sizes.expert_values * item > _expert_memory(options, free)
    if apart and options.avg_bits is not None:
        raise OptionError(
            "--avg-bits: the experts of a layer do not fit the memory together, and each would be "
            "tried in it at other bits\n  leave out --avg-bits, or allow more --expert-memory"
        )
    batch_rows = options.micro_batch or max(1, STREAM_TOKENS // seqlen)
    plain = Choices(dtype, str(machine.device), tiers[0], batch_rows, micros[-1], rate, scales_rate,
                    seqlen, experts_apart=apart)  # fmt: skip
    if sizes.experts and options.quantizer in LAYER_QUANTIZERS:
        trains = not apart and sizes.stream_bytes(item, plain) + FIXED <= 0.8 * free
        plain = replace(plain, trains_experts=trains)
    tries = [replace(plain, student=t, micro_batch=m) for t in tiers for m in micros]
    # A packed student dequantizes anew for every micro-batch; a dense one with small micro-batches
    # is still faster, so the order of `tries` is that of speed.
    fitting = [c for c in tries if sizes.train_bytes(item, c) + FIXED <= 0.8 * free]
    chosen = fitting[0] if fitting else tries[-1]
    if options.micro_batch is None and (apart or machine.device_free is not None):
        most = min((APART_TOKENS if apart else GPU_TOKENS) // seqlen, sizes.rows)
        chosen = _filled(chosen, most, lambda c: sizes.stream_bytes(item, c) + FIXED <= 0.8 * free)
    if chosen.student != "dense":  # asked for, or needed, to save memory
        return chosen
    whole = replace(chosen, recompute=False)
    return whole if sizes.train_bytes(item, whole) + FIXED <= 0.4 * free else chosen


def _filled(choices: Choices, most: int, fits: Callable[[Choices], bool]) -> Choices:
    """With `most` rows through a layer at once, halved until they fit; at least one."""
    chosen = replace(choices, batch_rows=max(1, most))
    while chosen.batch_rows > 1 and not fits(chosen):
        chosen = replace(chosen, batch_rows=chosen.batch_rows // 2)
    return chosen


def _expert_memory(options: ConvertOptions, free: int) -> int:
    """Bytes that the experts of a layer may take together."""
    return parse_size(options.expert_memory) if options.expert_memory else free // 2


def _disks(
    options: ConvertOptions, streamed: StreamedModel, work: tuple[int, int], output: int
) -> tuple[Disk, ...]:
    """Bytes per volume; folders on one volume are added up.

    Args:
        work: as of `_Sizes.work_bytes`. The output takes what the work folder has given up.
    """
    needs: dict[int, Disk] = {}
    fullest, writing = work
    shared = volume_of(options.work).device == volume_of(options.output).device
    wanted: list[tuple[Path, str, int]] = [
        (options.work, WORK, fullest),
        (options.output, OUTPUT, max(0, writing + output - fullest) if shared else output),
    ]
    checkpoint = streamed.checkpoint
    steps = [checkpoint.shards_of(names) for names in streamed.reading_steps()]
    missing = checkpoint.source.to_fetch([*steps, checkpoint.side_files()])
    wanted += [(folder, DOWNLOADS, count) for folder, count in missing.items()]
    for path, holds, needed in wanted:
        volume = volume_of(path)
        known = needs.get(volume.device)
        parts = (*(known.parts if known is not None else ()), (holds, needed))
        needs[volume.device] = Disk(
            str(volume.path),
            " and ".join(name for name, _ in parts),
            sum(size for _, size in parts),
            volume.free,
            parts,
        )
    return tuple(needs.values())


def _work(quantized: tuple[LinearPlan, ...], choices: Choices, sizes: _Sizes) -> Work:
    """What is to be timed."""
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


def _estimated(sizes: _Sizes, machine: Machine) -> Pace:
    """What `machine`'s two rates say of the linears."""
    token = 2.0 * sizes.quantized_weights / machine.flops
    quantize = 2.0 * sizes.quantized_weights * sizes.widest_input / machine.flops
    searched = SEARCH_BYTES * sizes.quantized_weights * sizes.searches / machine.bandwidth
    return Pace(
        token=token,
        student_token=token,
        step_token=3 * token,
        hessian_token=1.5 * token * sizes.hessians,
        quantize=quantize * sizes.hessians + searched,
        read=None,
    )


def _time(
    sizes: _Sizes,
    options: ConvertOptions,
    machine: Machine,
    validation: int,
    rows: int,
    pace: Pace | None,
) -> tuple[float, str]:
    """Seconds of the linears at their pace, and of all else at the machine's rates."""
    basis = f"a matrix product at {machine.flops / 1e9:.0f} GFLOP/s and an addition at "
    basis += f"{machine.bandwidth / 1e9:.1f} GB/s ({machine.name})"
    if pace is not None:
        basis += ", and these linears, their quantizer and training step, timed just now"
    else:
        pace = _estimated(sizes, machine)
        if sizes.hidden < SMALL:
            basis += "; matrices as small as this model's can take three times as long"
    tokens = rows * sizes.seqlen
    # Linears that stay in 16 bits, attention, and what lies between products: norms, rotary
    # embeddings, activations, residuals.
    rest = sizes.layers * sizes.layer_values - sizes.quantized_weights
    active = 1 - sizes.idle_values / sizes.layer_values  # a token does not see all experts
    flops = 2.0 * rest + 4.0 * sizes.layers * sizes.seqlen * sizes.hidden
    between = sizes.layers * (40 * sizes.hidden + 12 * sizes.intermediate)
    besides = flops / machine.flops + between * machine.dtype.itemsize / machine.bandwidth
    passes = 2 + HESSIAN_PASSES * sizes.hessians + sizes.gain_passes  # teacher, student
    streaming = (
        tokens * (passes * (active * pace.token + besides) + pace.hessian_token) + pace.quantize
    )
    streaming += sizes.layers * SYNCED
    compared = len(KINDS) * options.keep_adapter  # both kinds of zero-point
    searched = sizes.quantized_weights * (sizes.alternatives + compared) + sizes.outer_packed
    moved = SEARCH_BYTES * searched + (ROTATE_BYTES * sizes.parameters if options.rotate else 0)
    streaming += moved / machine.bandwidth
    if sizes.learned_values:
        streaming += sizes.layers * _learning(sizes, options, machine)
        learned = options.layer_steps * options.batch_size * sizes.seqlen
        streaming += learned * 3 * (active * pace.token + besides)  # forward and backward
    if pace.read is not None:
        read = sizes.layers * sizes.layer_bytes / pace.read
        basis += f"; reading at {pace.read / 1e9:.2g} GB/s beside it"
        streaming = max(streaming, read)
    else:
        basis += "; reading not counted"
    seconds = streaming
    if options.trains != "none":
        trained = options.steps * options.batch_size * sizes.seqlen
        validated = (options.steps // options.val_every + 3) * validation * sizes.seqlen
        head = 2.0 * sizes.vocabulary * sizes.hidden / machine.flops  # student's, and the teacher's
        seconds += trained * (active * pace.step_token + 4 * besides + 5 * head)
        seconds += validated * (active * pace.student_token + besides + 2 * head)
        updated = UPDATE_BYTES * sizes.trained_values / machine.bandwidth
        seconds += options.steps * updated
    return seconds, basis


def _learning(sizes: _Sizes, options: ConvertOptions, machine: Machine) -> float:
    """Seconds to round one decoder layer's weights in every update, and to start them."""
    moved = (options.layer_steps * ROUND_BYTES + SEARCH_BYTES) * sizes.learned_values
    return moved / machine.bandwidth
