"""Tables of the report as plain values: text to show, and what to sort by."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from rilq.evaluation.report.subject import Subject
from rilq.progress import duration, gigabytes
from rilq.records.run import Run


@dataclass(frozen=True)
class Cell:
    """A cell.

    Attributes:
        text: as it is shown.
        sort: a number to sort by; None to sort by the text.
        best: of its column.
    """

    text: str
    sort: float | None = None
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: above it.
        columns: headings; those of numbers, which stand at the right, are in `numbers`.
        rows: cells, the first one names the row.
        note: below it.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    numbers: frozenset[int] = frozenset()
    note: str = ""


def number(value: float, digits: int = 4) -> Cell:
    """A number with some significant digits."""
    return Cell(f"{value:.{digits}g}", value)


def folded_tables(subject: Subject) -> list[Table]:
    """What few read, and some need: values of the plots, recipe, versions, machine, checksums."""
    found = [_losses(subject), _layers(subject), _expert_tokens(subject), _without_data(subject)]
    found += map(_stages, subject.runs)
    named = {
        "Recipe": subject.recipe,
        "Calibration data": subject.calibration,
        "Figures of the conversion": subject.quality,
        "Evaluation": _measured_how(subject),
        "Versions": subject.versions,
        "Machine": subject.machine,
    }
    found += [_named(title, values) for title, values in named.items() if values]
    found.append(_files(subject))
    return [table for table in found if table is not None and table.rows]


def open_tables(subject: Subject) -> list[Table]:
    """Task scores, and the figures on every text if there are several."""
    found = [_tasks(subject)]
    if len(subject.evaluations) > 1:
        found.append(_texts(subject))
    return [table for table in found if table.rows]


def _tasks(subject: Subject) -> Table:
    rows = tuple(
        (
            Cell(f"{each.task}"),
            Cell(each.metric),
            number(each.value),
            Cell("") if each.stderr is None else Cell(f"± {each.stderr:.2g}", each.stderr),
            Cell(str(each.shots), each.shots),
            Cell(f"{each.samples:,}", each.samples),
        )
        for evaluation in subject.evaluations
        for each in evaluation.tasks
    )
    return Table(
        "Task scores",
        ("task", "metric", "score", "standard error", "shots", "samples"),
        rows,
        frozenset({2, 3, 4, 5}),
        "By lm-evaluation-harness.",
    )


def _texts(subject: Subject) -> Table:
    rows = []
    for each in subject.evaluations:
        against = each.against
        rows.append((
            Cell(each.text),
            number(each.perplexity),
            number(against.base_perplexity) if against else Cell(""),
            number(against.kl_mean, 3) if against else Cell(""),
            Cell(f"{each.seqlen:,}", each.seqlen),
            Cell(f"{each.tokens:,}", each.tokens),
        ))  # fmt: skip
    return Table(
        "On each text",
        ("text", "perplexity", "of full precision", "KL mean", "context", "tokens"),
        tuple(rows),
        frozenset(range(1, 6)),
    )


def _losses(subject: Subject) -> Table:
    rows = tuple(
        (Cell(str(p.step), p.step), Cell(p.kind), Cell(p.term), number(p.value, 5))
        for p in subject.losses
    )
    return Table("Losses", ("updates", "of", "term", "loss"), rows, frozenset({0, 3}))


def _layers(subject: Subject) -> Table:
    evaluation = subject.evaluation
    final = (evaluation.layer_errors if evaluation else None) or ()
    made = {layer.index: layer for layer in subject.layers}
    rows = []
    for index in range(max([len(final), *(i + 1 for i in made)], default=0)):
        layer = made.get(index)
        rows.append((
            Cell(str(index), index),
            number(layer.error) if layer else Cell(""),
            number(final[index]) if index < len(final) else Cell(""),
            number(layer.bits) if layer and layer.bits is not None else Cell(""),
        ))  # fmt: skip
    return Table(
        "Decoder layers",
        ("layer", "error as quantized", "error of the checkpoint", "bits per weight"),
        tuple(rows),
        frozenset(range(4)),
    )


def _expert_tokens(subject: Subject) -> Table:
    rows = tuple(
        (Cell(str(index), index), *(Cell(f"{count:,.10g}", count) for count in counts))
        for index, counts in enumerate(subject.expert_tokens)
        if counts is not None
    )
    return Table(
        "Tokens of the experts",
        ("layer", "least", "median", "most"),
        rows,
        frozenset(range(4)),
    )


def _without_data(subject: Subject) -> Table:
    rows = tuple(
        (Cell(name), Cell(f"{count:,}", count))
        for name, count in subject.experts_without_data.items()
    )
    return Table(
        "Experts quantized without data",
        ("linear", "tokens"),
        rows,
        frozenset({1}),
        "They saw too few tokens. More calibration rows reach more experts.",
    )


def _stages(run: Run) -> Table:
    rows = tuple(
        (
            Cell(stage.name),
            Cell(duration(stage.seconds), stage.seconds),
            Cell(gigabytes(stage.host_bytes), stage.host_bytes),
            Cell("") if stage.device_bytes is None
            else Cell(gigabytes(stage.device_bytes), stage.device_bytes),
            Cell(gigabytes(stage.disk_free_bytes), stage.disk_free_bytes),
        )
        for stage in run.stages
    )  # fmt: skip
    return Table(
        f"Stages of {run.command}, {when(run.started)}",
        ("stage", "time", "memory, peak", "GPU, peak", "disk free, least"),
        rows,
        frozenset(range(1, 5)),
    )


def _measured_how(subject: Subject) -> dict[str, Any]:
    found = subject.evaluation
    if found is None:
        return {}
    return {
        "text": found.text,
        "context": found.seqlen,
        "windows": found.windows,
        "predicted tokens": found.tokens,
        "xxh3 of the tokens": found.tokens_digest,
        "computed in": found.dtype,
        "notes": " ".join(found.notes),
    }


def _named(title: str, values: Mapping[str, Any]) -> Table:
    rows = tuple((Cell(name), Cell(text)) for name, text in _shown(values))
    return Table(title, ("name", "value"), rows)


def _shown(values: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for name, value in sorted(values.items()):
        if value not in (None, "", [], {}, ()):
            yield name, value if isinstance(value, str) else json.dumps(value, default=str)


def _files(subject: Subject) -> Table:
    rows = tuple(
        (Cell(each.name), Cell(f"{each.size:,}", each.size), Cell(each.xxh3))
        for each in subject.files
    )
    note = "A checksum of every tensor is in rilq.json; `rilq verify` checks them."
    return Table("Checksums", ("file", "bytes", "xxh3"), rows, frozenset({1}), note)


def when(moment: float) -> str:
    """Unix time for people."""
    return datetime.fromtimestamp(moment, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
