"""What the commands show of their results: tables, and lines of a plan."""

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from rilq.formats.spec import QuantSpec
from rilq.progress import Reporter, duration, gigabytes

if TYPE_CHECKING:
    from rilq.converter.analysis import Analysis
    from rilq.converter.plan import Plan
    from rilq.evaluation.push import PushResult


def show_plan(plan: "Plan", report: Reporter) -> None:
    """The rows of `plan_table` as notes, for a conversion that begins; warns of an empty plan."""
    report.note(f"{plan.model}: {plan.architecture}, {plan.layers} layers")
    for name, value in _plan_rows(plan):
        report.note(f"  {name:<18} {value}")
    if not plan.quantized:
        report.warn("nothing is quantized: every linear is kept")


def show_push(result: "PushResult", report: Reporter) -> None:
    """One note: where it is, at which commit, and whether this push put it there."""
    pushed = result.pushed
    state = "was there already" if pushed.unchanged else "pushed"
    report.note(f"{pushed.url}: {state}, commit {pushed.commit}")


def _plan_rows(plan: "Plan") -> list[tuple[str, str]]:
    choices = plan.choices
    quantized = [p.spec for p in plan.quantized]
    specs = sorted({(s.bits, s.group_size) for s in quantized if isinstance(s, QuantSpec)})
    shown = ", ".join(f"{bits} bits, groups of {size}" for bits, size in specs)
    if (run_time := plan.run_time_bits) is not None:
        shown = f"{run_time.activation_bits:.3g} bits on average, and so are their inputs"
    if plan.avg_bits is not None:
        shown += f"; more where it gains most, {plan.avg_bits:g} bits on average at most"
    memory = f"{gigabytes(plan.host_bytes)} host"
    if plan.device_bytes is not None:
        memory += f", {gigabytes(plan.device_bytes)} {choices.device}"
    rates = f"{choices.learning_rate:.3g} of adapters"
    if run_time is None:
        rates += f", {choices.scales_learning_rate:.3g} of scales"
    rows = [
        ("quantized", f"{len(plan.quantized)} linears: {shown}"),
        *([("KV cache", f"{run_time.cache_bits:.3g} bits, scales counted")] if run_time else []),
        ("embedding", _outer_bits(plan, plan.embed_bits)),
        ("head", "the embedding" if plan.tied else _outer_bits(plan, plan.head_bits)),
        ("kept", "norms" + (f", {len(plan.kept)} linears" if plan.kept else "")),
        *(("", f"{name}: {why}") for name, why in plan.kept[:5]),
        ("calibration", f"{plan.rows} rows of {choices.seqlen} tokens, "
                        f"{plan.validation_rows} for validation"),
        ("compute", f"{choices.dtype} on {choices.device}, student {choices.student}, "
                    f"micro-batch {choices.micro_batch}"),
        ("learning rate", rates),
        ("reads", gigabytes(plan.read_bytes)),
        ("peak memory", memory + ", at most, above the interpreter's own"),
        *(("disk", f"{gigabytes(d.needed)} of {gigabytes(d.free)} free on {d.volume} "
                   f"({d.holds})") for d in plan.disks),
        ("output", f"{gigabytes(plan.output_bytes)}: {plan.bits_per_weight:.2f} bits per "
                   f"quantized weight, {plan.bits_per_parameter:.2f} per parameter"),
        ("time", f"about {duration(plan.seconds)}: {plan.time_basis}"),
    ]  # fmt: skip
    return rows + [("note", note) for note in plan.notes]


def _outer_bits(plan: "Plan", bits: int) -> str:
    specs = [p.spec for p in plan.outer if isinstance(p.spec, QuantSpec)]
    sizes = {spec.group_size for spec in specs if spec.bits == bits}
    return "".join(f"{bits} bits, groups of {size}" for size in sizes) or "as in the source"


def plan_table(plan: "Plan") -> Table:
    """What `rilq plan` prints: two columns, a name and what was decided."""
    table = Table(
        title=f"{plan.model}: {plan.architecture}, {plan.layers} layers, "
        f"{plan.parameters:,} parameters",
        show_header=False,
        title_justify="left",
    )
    for name, value in _plan_rows(plan):
        table.add_row(name, value)
    return table


def analysis_table(found: "Analysis") -> Table:
    """What `rilq analyze` prints: full precision, plain rounding, every set of adapters."""
    from rilq.converter.analysis import HEADINGS, table_rows

    table = Table(title=found.model, title_justify="left", box=SIMPLE_HEAD)
    table.add_column("scope, what is fixed")
    for heading in HEADINGS[2:]:
        table.add_column(heading, justify="right")
    for scope, fixed, *figures in table_rows(found):
        table.add_row(f"{scope}, {fixed}" if fixed else scope, *figures)
    return table
