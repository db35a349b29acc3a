"""How a comparison looks in a terminal, within 80 columns."""

from string import ascii_uppercase
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rilq.errors import printable
from rilq.progress import gigabytes

if TYPE_CHECKING:
    from rilq.evaluation.bootstrap import Interval
    from rilq.evaluation.comparison import Candidate, Comparison

# After Z come numbers.
_LETTERS = (*ascii_uppercase, *map(str, range(27, 1000)))
_USUALLY_16 = ("activation_bits", "cache_bits")  # shown where they are something else


def comparison_tables(found: "Comparison") -> RenderableType:
    """Who is who, all figures with the best marked, what changed, and what the rules say."""
    evaluation = found.baseline.evaluation
    parts: list[RenderableType] = [
        Text(
            f"{printable(evaluation.text)}: {evaluation.windows} windows of "
            f"{evaluation.seqlen} tokens"
        )
    ]
    for letter, version in zip(_LETTERS, found.versions, strict=False):
        role = ", the baseline" if letter == "A" else ""
        parts.append(Text(f"{letter}  {printable(version.label)}{role}"))
    parts.append(_figures(found))
    for letter, candidate in zip(_LETTERS[1:], found.candidates, strict=False):
        if candidate.changes:
            parts.append(_changes(letter, candidate))
    parts += [Text(f"note: {note}", style="dim") for note in found.notes]
    for letter, candidate in zip(_LETTERS[1:], found.candidates, strict=False):
        for outcome in candidate.outcomes:
            word, style = ("FAILED", "bold red") if outcome.violated else ("passed", "green")
            parts.append(Text.assemble((word, style), f" {letter}  {printable(str(outcome), 200)}"))
    return Group(*parts)


def _figures(found: "Comparison") -> Table:
    table = Table(title="* best", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("")
    for letter, _ in zip(_LETTERS, found.versions, strict=False):
        table.add_column(letter, justify="right")
    for name, values in found.figures().items():
        if name in _USUALLY_16 and set(values) == {16.0}:
            continue
        best = found.best(name)
        cells = [
            Text("") if value is None else Text(
                _shown(name, value) + (" *" if number in best else "  "),
                style="bold" if number in best else "",
            )
            for number, value in enumerate(values)
        ]  # fmt: skip
        table.add_row(Text(printable(name)), *cells)
    return table


def _shown(name: str, value: float) -> str:
    return gigabytes(value) if name.endswith("_bytes") else f"{value:.5g}"


def _changes(letter: str, candidate: "Candidate") -> Table:
    table = Table(title=f"{letter} against A", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("")
    for heading in ("change", "95 % interval"):
        table.add_column(heading, justify="right")
    table.add_column("")
    styles = {"better": "green", "worse": "red"}
    for name, change in candidate.changes.items():
        verdict = candidate.verdict(name)
        ends = f"{_change(change, change.low)} to {_change(change, change.high)}"
        table.add_row(
            name, _change(change, change.change), ends, Text(verdict, styles.get(verdict, ""))
        )
    return table


def _change(change: "Interval", value: float) -> str:
    """As a rule's limit is written: `1.020x`, `+0.10`."""
    return f"{value:.4f}x" if change.kind == "ratio" else f"{value:+.3g}"
