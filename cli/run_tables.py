"""What `rilq runs` shows: a list of runs, and one run whole."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from rilq.errors import printable
from rilq.progress import duration, gigabytes

if TYPE_CHECKING:
    from rilq.records.run import Run

# Heading, what it shows, and the width of a terminal from which on there is room for it.
_COLUMNS: Sequence[tuple[str, "Callable[[Run], str]", int]] = (
    ("run", lambda run: str(run.id), 0),
    ("began", lambda run: _when(run), 0),
    ("command", lambda run: run.command, 0),
    ("checkpoint", lambda run: run.checkpoint, 0),
    ("state", lambda run: run.state, 0),
    ("perplexity", lambda run: _figure(run, "perplexity"), 0),
    ("loss", lambda run: _figure(run, "validation_loss"), 100),
    ("bits", lambda run: _bits(run), 100),
    ("KL mean", lambda run: _figure(run, "kl_mean"), 120),
    ("top-1", lambda run: _figure(run, "top1_agreement"), 120),
    ("took", lambda run: duration(run.seconds), 120),
    ("model", lambda run: run.model, 140),
)
_TEXTS = ("began", "command", "checkpoint", "state", "model")


def runs_table(found: "Sequence[Run]", width: int, figure: str | None) -> Table:
    """A list, with more columns where there is room.

    Args:
        width: of the terminal.
        figure: one more column, that the list is sorted by.
    """
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    columns = [(name, value) for name, value, least in _COLUMNS if width >= least]
    if figure is not None and figure != "perplexity":
        columns = [(n, v) for n, v in columns if n != "perplexity" or width >= 100]
        columns.append((figure, lambda run: _figure(run, figure)))
    for name, _ in columns:
        # Names give way first.
        named = name in ("checkpoint", "model")
        table.add_column(
            Text(printable(name)),
            justify="left" if name in _TEXTS else "right",
            no_wrap=not named,
            overflow="fold" if named else "ellipsis",
        )
    for run in found:
        table.add_row(*(Text(printable(value(run), 400)) for _, value in columns))
    return table


def run_tables(run: "Run") -> Iterator[Table]:
    """All that is known of a run, in parts; a part that is empty is left out."""
    head = [
        ("command", run.command),
        ("state", run.state),
        ("began", f"{_when(run)}, took {duration(run.seconds)}"),
        ("message", run.message),
        ("model", run.model),
        ("checkpoint", run.checkpoint),
        ("place", run.place),
        ("content hash", run.content_hash or ""),
        ("hash of the model's headers", run.source_hash or ""),
        ("job", run.job or ""),
        ("versions", ", ".join(f"{name} {version}" for name, version in run.versions.items())),
    ]
    yield _table(f"run {run.id}", (), [(name, value) for name, value in head if value])
    for title, values in (
        ("machine", run.machine),
        ("options", run.options),
        ("recipe", run.recipe),
        ("figures", {name: f"{value:.6g}" for name, value in run.figures.items()}),
    ):
        if values:
            yield _table(title, (), [(name, str(value)) for name, value in values.items()])
    if run.stages:
        yield _table("stages", ("stage", "from", "took", "memory", "GPU", "least free disk"), [
            (
                stage.name,
                duration(stage.started),
                duration(stage.seconds),
                gigabytes(stage.host_bytes),
                "" if stage.device_bytes is None else gigabytes(stage.device_bytes),
                gigabytes(stage.disk_free_bytes),
            )
            for stage in run.stages
        ])  # fmt: skip
    if run.losses:
        kinds = list(dict.fromkeys((point.kind, point.term) for point in run.losses))
        found = {(p.kind, p.term, p.step): f"{p.value:.5g}" for p in run.losses}
        steps = sorted({point.step for point in run.losses})
        yield _table("losses", ("step", *(f"{kind}\n{term}" for kind, term in kinds)), [
            (str(step), *(found.get((*kind, step), "") for kind in kinds)) for step in steps
        ])  # fmt: skip
    if run.layers:
        yield _table("decoder layers", ("layer", "error", "bits"), [
            (str(f.index), f"{f.error:.4g}", "" if f.bits is None else f"{f.bits:.3g}")
            for f in run.layers
        ])  # fmt: skip


def _table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        box=SIMPLE_HEAD,
        show_header=bool(headings),
        pad_edge=False,
    )
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left")
    for row in rows:
        table.add_row(*(Text(printable(value, 2000)) for value in row))
    return table


def _when(run: "Run") -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(run.started))


def _bits(run: "Run") -> str:
    """Per weight; where they are not 16 too, per weight/activation/cached value."""
    names = ("bits_per_weight", "activation_bits", "cache_bits")
    rest = {run.figures.get(name, 16) for name in names[1:]}
    shown = names[:1] if rest == {16} else names
    return "/".join(f"{run.figures[name]:.4g}" for name in shown if name in run.figures)


def _figure(run: "Run", name: str) -> str:
    value = run.figures.get(name)
    return "" if value is None else f"{value:.5g}"
