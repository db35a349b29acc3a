"""What a command says at its end, for those who never open a page: the loss, figures, what next."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rilq.progress import gigabytes

if TYPE_CHECKING:
    from rilq.converter.pipeline import ConvertResult
    from rilq.evaluation.figures import Evaluation

BLOCKS, ASCII = "▁▂▃▄▅▆▇█", "_.-~=+*#"
WIDTH = 32  # characters of a sparkline at most


def sparkline(values: Sequence[float], encoding: str) -> str:
    """Values as characters from low to high: blocks, or ASCII where those cannot be written.

    Of more than `WIDTH` values, neighbours are averaged; what is no number is a blank.
    """
    characters = BLOCKS if _can_write(BLOCKS, encoding) else ASCII
    count = min(len(values), WIDTH)
    cuts = [i * len(values) // count for i in range(count + 1)] if count else []
    parts = [values[start:end] for start, end in zip(cuts, cuts[1:], strict=False)]
    means = [sum(part) / len(part) for part in parts]
    finite = [mean for mean in means if math.isfinite(mean)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    last = len(characters) - 1
    return "".join(
        characters[round((mean - low) / ((high - low) or 1.0) * last)]
        if math.isfinite(mean)
        else " "
        for mean in means
    )


def _can_write(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def show_conversion(result: ConvertResult, model: str, page: Path | None, console: Console) -> None:
    """After `rilq convert`.

    Args:
        model: as it was given, for commands that need it.
        page: of the report, if one was asked for; it has been told.
    """
    quality, plan = result.quality, result.plan
    losses = [loss for _, loss in quality.get("history", ()) if loss is not None]
    rows = []
    if len(losses) > 1:
        rows.append(("validation loss", _course(losses, console)))
        rows.append(("", f"best after update {quality['best_step']} of {quality['steps']}"))
    if errors := [error for error in quality["layer_errors"] if math.isfinite(error)]:
        line = sparkline(errors, console.encoding)
        rows.append(("error by layer", f"{line}  {min(errors):.3g} to {max(errors):.3g}"))
    rows.append(("bits per weight", f"{plan.bits_per_weight:.2f}"))
    if (bits := plan.run_time_bits) is not None:
        shown = f"{bits.activation_bits:.2f} per activation, {bits.cache_bits:.2f} per cached value"
        rows.append(("bits when it runs", shown))
    rows.append(("size", f"{gigabytes(plan.output_bytes)}, of {gigabytes(plan.read_bytes)} read"))
    output = str(result.output)
    following = [
        ["eval", output, "--text", "wikitext2", "--against", model],
        ["compare", output, model, "--text", "wikitext2"],
    ]
    if page is None:
        following.append(["report", output, "-o", "report.html"])
    if result.pushed is None:
        following.append(["push", output, "OWNER/NAME"])
    _show(rows, following, console)


def show_evaluation(model: str, text: str, result: Evaluation, console: Console) -> None:
    """After `rilq eval`, whose figures are on standard output."""
    rows = []
    folder = Path(model)
    losses = _training(folder)
    if len(losses) > 1:
        rows.append(("loss of its training", _course(losses, console)))
    following = []
    if (base := result.against) is None:
        following.append(["eval", model, "--text", text, "--against", "BASE"])
    else:
        edges, counts = base.filled_bins()
        line = sparkline(counts, console.encoding)
        rows.append(("KL per token", f"{line}  {edges[0]:.1g} to {edges[-1]:.2g} nats"))
    if losses or (folder / "rilq.json").is_file():
        following += [
            ["compare", model, "OTHER", "--text", text],
            ["report", model, "-o", "report.html"],
            ["push", model, "OWNER/NAME"],
        ]
    _show(rows, following, console)


def _training(folder: Path) -> list[float]:
    """Validation losses of a checkpoint made by rilq; none of another one."""
    from rilq.errors import CheckpointError
    from rilq.formats.verify import read_manifest

    try:
        history = read_manifest(folder)["quality"].get("history", ())
        return [loss for _, loss in history if loss is not None]
    except (CheckpointError, KeyError, TypeError, ValueError, AttributeError):
        return []


def _course(losses: Sequence[float], console: Console) -> str:
    line = sparkline(losses, console.encoding)
    return f"{line}  {losses[0]:.4g} before, {min(losses):.4g} at best"


def _show(
    rows: Sequence[tuple[str, str]], following: Sequence[Sequence[str]], console: Console
) -> None:
    table = Table.grid(padding=(0, 2))
    for name, value in rows:
        table.add_row(Text(name, style="dim"), Text(value))
    if rows:
        console.print(table)
    if following:
        console.print("next:", style="dim")
        for words in following:
            console.print(Text(f"  rilq {shlex.join(words)}"), soft_wrap=True)
