"""Several checkpoints side by side: one table, and figures against bits per weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rilq.evaluation.figures import SIXTEEN, Evaluation
from rilq.evaluation.report.plots import Version, versions_plot
from rilq.evaluation.report.subject import Subject
from rilq.evaluation.report.svg import to_svg
from rilq.evaluation.report.tables import Cell, Table
from rilq.progress import gigabytes


@dataclass(frozen=True)
class Plot:
    """A plot with its title, and what there is to say about it."""

    title: str
    svg: str
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """Above the sections of the checkpoints."""

    table: Table
    plots: tuple[Plot, ...]


@dataclass(frozen=True)
class _Column:
    """A figure of a subject: how it is found and shown.

    Attributes:
        better: "lower" or "higher"; of a figure on a text, only among those of the same text.
    """

    title: str
    of: Callable[[Subject], float | None]
    shown: Callable[[float], str]
    better: str


def comparison(subjects: Sequence[Subject], marks: Sequence[str]) -> Comparison:
    """All that can be compared of them."""
    return Comparison(_table(subjects, marks), tuple(_plots(subjects, marks)))


def _measured(of: Callable[[Evaluation], float | None]) -> Callable[[Subject], float | None]:
    return lambda subject: None if subject.evaluation is None else of(subject.evaluation)


def _figure(name: str) -> Callable[[Subject], float | None]:
    return _measured(lambda evaluation: evaluation.figures().get(name))


def _ratio(evaluation: Evaluation) -> float | None:
    base = evaluation.against
    return None if base is None else evaluation.perplexity / base.base_perplexity


# Left out where it is 16 everywhere.
_RUNNING = (
    _Column("bits per activation", lambda s: s.activation_bits, "{:.2f}".format, "lower"),
    _Column("bits per cached value", lambda s: s.cache_bits, "{:.2f}".format, "lower"),
)
_OF_ANY_TEXT = (
    _Column("bits per weight", lambda s: s.bits_per_weight, "{:.2f}".format, "lower"),
    *_RUNNING,
    _Column("size", lambda s: s.size_bytes, gigabytes, "lower"),
)
_COLUMNS = (
    *_OF_ANY_TEXT,
    _Column("perplexity", _figure("perplexity"), "{:.4g}".format, "lower"),
    _Column("of full precision", _measured(_ratio), "{:.3f} ×".format, "lower"),
    _Column("KL mean", _figure("kl_mean"), "{:.3g}".format, "lower"),
    _Column("KL 99 %", _figure("kl_p99"), "{:.3g}".format, "lower"),
    _Column("same top token", _figure("top1_agreement"), "{:.1%}".format, "higher"),
    _Column("tokens/s", _figure("tokens_per_s"), "{:.3g}".format, "higher"),
)


def _table(subjects: Sequence[Subject], marks: Sequence[str]) -> Table:
    tasks = {
        f"{task.task}.{task.metric}": "higher" if task.higher_is_better else "lower"
        for subject in subjects
        for evaluation in subject.evaluations[:1]
        for task in evaluation.tasks
    }
    columns = [*_COLUMNS]
    columns += [_Column(n, _figure(n), "{:.4g}".format, better) for n, better in tasks.items()]
    texts = {s.evaluation.tokens_digest: s.evaluation.text for s in subjects if s.evaluation}
    rows: list[list[Cell]] = [
        [Cell(f"{mark}  {subject.name}")] for subject, mark in zip(subjects, marks, strict=True)
    ]
    shown = []
    for column in columns:
        values = [column.of(subject) for subject in subjects]
        known = [value for value in values if value is not None]
        if not known or (column in _RUNNING and set(known) == {SIXTEEN}):
            continue
        shown.append(column.title)
        best = (min if column.better == "lower" else max)(known)
        # Figures on different texts do not compete.
        fair = len(set(known)) > 1 and (len(texts) == 1 or column in _OF_ANY_TEXT)
        for row, value in zip(rows, values, strict=True):
            if value is None:
                row.append(Cell(""))
            else:
                row.append(Cell(column.shown(value), value, fair and value == best))
    numbers = frozenset(range(1, len(shown) + 1))
    if len(texts) > 1:
        shown.append("text")
        for row, subject in zip(rows, subjects, strict=True):
            row.append(Cell(subject.evaluation.text if subject.evaluation else ""))
    note = f"Measured on {next(iter(texts.values()))}." if len(texts) == 1 else ""
    return Table("Versions", ("checkpoint", *shown), tuple(map(tuple, rows)), numbers, note)


def _plots(subjects: Sequence[Subject], marks: Sequence[str]) -> list[Plot]:
    """One plot of each figure and text on which two or more were measured."""
    groups: dict[str, list[tuple[str, float, Evaluation]]] = {}
    for subject, mark in zip(subjects, marks, strict=True):
        for each in subject.evaluations:
            bits = each.bits_per_weight
            if bits is not None:
                groups.setdefault(each.tokens_digest, []).append((mark, bits, each))
    found = []
    for digest, members in groups.items():
        text = members[0][2].text.partition("@")[0]
        if len(members) < 2:
            continue
        bases = [e.against.base_perplexity for _, _, e in members if e.against is not None]
        versions = [Version(mark, bits, each.perplexity) for mark, bits, each in members]
        figure = versions_plot(versions, ylabel="perplexity", base=bases[0] if bases else None)
        label = f"Perplexity against bits per weight, {len(versions)} checkpoints"
        svg = to_svg(figure, prefix=f"ppl-{digest[:12]}", label=label)
        found.append(Plot("Perplexity against bits", svg, text))
        versions = [
            Version(mark, bits, each.against.kl_mean)
            for mark, bits, each in members
            if each.against is not None
        ]
        if len(versions) > 1:
            figure = versions_plot(versions, ylabel="KL mean, nats per token", base=None)
            label = f"KL against bits per weight, {len(versions)} checkpoints"
            svg = to_svg(figure, prefix=f"kl-{digest[:12]}", label=label)
            found.append(Plot("KL from full precision against bits", svg, text))
    return found
