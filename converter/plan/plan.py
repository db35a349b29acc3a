"""A plan: what it says, and whether it fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from rilq.converter.options import Tier
from rilq.converter.plan.linears import LinearPlan, stored_bits, weight_count
from rilq.converter.resq.sizes import RunTimeBits
from rilq.errors import OptionError, OutputError
from rilq.formats.native import EXPERTS_FORMAT_VERSION, RilqConfig
from rilq.formats.spec import QuantSpec
from rilq.progress import gigabytes


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
        bound = stored_bits(self.quantized, self.avg_bits)
        quantized = tuple(
            replace(p, spec=replace(p.spec, bits=chosen.get(p.name, p.spec.bits)))
            for p in self.quantized
            if isinstance(p.spec, QuantSpec)
        )
        bits = stored_bits(quantized)
        output = self.output_bytes - bound // 8 + bits // 8
        return replace(
            self,
            quantized=quantized,
            avg_bits=None,
            output_bytes=output,
            bits_per_weight=bits / max(1, weight_count(quantized)),
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
