"""The results of `accuracy.py` as a table: in the terminal, in Markdown, as JSON, as a plot."""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

FULL, PLAIN = "full precision", "plain RTN"  # the one and the zero of the gap
COLUMNS = "| method | group | bits per weight | {texts} | gap closed | KL | top-1 | {costs} |"
COSTS = "wall s | CPU s | peak MB"
INTRODUCTION = """\
# Accuracy: ours and other tools on one checkpoint

Written by `python benchmarks/accuracy.py --model DIR`, which states how it measures. Every method
calibrated on the same rows with the same number of threads; every perplexity is `rilq eval`'s.
"Bits per weight" is what the tool stores for the quantized linears: codes, scales, zero-points, and
an adapter if it stays beside them. Wall time is the whole command; on a machine shared with other
work, CPU time is the better measure. These are models of 0.2 to 10 million parameters: the order of
the methods may differ on large ones.
"""


@dataclass(frozen=True)
class Result:
    """One line: figures, or the reason why there are none.

    Attributes:
        name: of the method.
        group_size: inputs that share a scale; None where the format fixes it or nothing is rounded.
        made_by: a peer's version and settings.
        bits_per_weight: stored, over the quantized linears.
        perplexities: on the calibration's own domain, then on each other text.
        kl, top1: divergence from and agreement with full precision, on the own domain.
        seconds, cpu_seconds, peak_bytes: of the whole conversion command.
        reason: why it was not run.
    """

    name: str
    group_size: int | None
    made_by: str = "rilq"
    bits_per_weight: float | None = None
    perplexities: list[float] = field(default_factory=list)
    kl: float | None = None
    top1: float | None = None
    seconds: float | None = None
    cpu_seconds: float | None = None
    peak_bytes: int | None = None
    reason: str | None = None

    @property
    def key(self) -> str:
        """Tells two lines apart."""
        return f"{self.name} @ {self.group_size}"


@dataclass
class Table:
    """All results of a model, in order."""

    model: str
    texts: list[str]
    facts: dict[str, Any]
    results: dict[str, Result]

    def add(self, result: Result) -> Result:
        """Put a result in, in place of an earlier one of the same method and group size."""
        self.results[result.key] = result
        return result

    def gap(self, result: Result) -> float | None:
        """0 at plain rounding, 1 at full precision, in nats; None until both are there."""
        if result.name == FULL:
            return 1.0
        ends = {r.name: r.perplexities[0] for r in self.results.values() if r.perplexities}
        if not result.perplexities or not {FULL, PLAIN} <= set(ends):
            return None
        return math.log(ends[PLAIN] / result.perplexities[0]) / math.log(ends[PLAIN] / ends[FULL])

    def heading(self) -> str:
        """The first two lines of the Markdown table."""
        texts = " | ".join(f"perplexity, {text}" for text in self.texts)
        line = COLUMNS.format(texts=texts, costs=COSTS)
        return f"{line}\n|{'---|' * (line.count('|') - 1)}"

    def line(self, result: Result) -> str:
        """One result as a line of the table."""
        group = "" if result.group_size is None else str(result.group_size)
        if result.reason is not None:
            cells = [result.name, group, f"not run: {result.reason}".replace("|", "/")]
            return f"| {' | '.join(cells)} |{' |' * (len(self.texts) + 6)}"
        costs, gap = ["", "", ""], self.gap(result)
        if result.seconds is not None:
            megabytes = result.peak_bytes / 1e6
            costs = [f"{result.seconds:.0f}", f"{result.cpu_seconds:.0f}", f"{megabytes:.0f}"]
        cells = [
            result.name,
            group,
            f"{result.bits_per_weight:.2f}",
            *(f"{perplexity:.4g}" for perplexity in result.perplexities),
            "" if gap is None else f"{gap:.3f}",
            f"{result.kl:.4f}",
            f"{result.top1:.3f}",
            *costs,
        ]
        return f"| {' | '.join(cells)} |"


def read_table(folder: Path, model: str) -> dict[str, Result]:
    """The results of an earlier run; none if there was none."""
    file = folder / f"accuracy-{model}.json"
    if not file.is_file():
        return {}
    results = [Result(**saved) for saved in json.loads(file.read_text())["results"]]
    return {result.key: result for result in results}


def save(table: Table, folder: Path) -> None:
    """Write `accuracy-MODEL.json` and the model's section of `accuracy.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    saved = {
        "model": table.model,
        "texts": table.texts,
        "facts": table.facts,
        "results": [asdict(result) for result in table.results.values()],
    }
    (folder / f"accuracy-{table.model}.json").write_text(json.dumps(saved, indent=1) + "\n")
    lines = [f"## {table.model}", ""]
    lines += [f"* {key}: {value}" for key, value in table.facts.items() if value != ""]
    lines += ["", table.heading(), *map(table.line, table.results.values()), ""]
    lines += [f"![gap closed](accuracy-{table.model}.png)", ""]
    write_section(folder / "accuracy.md", table.model, "\n".join(lines))


def write_section(file: Path, model: str, section: str) -> None:
    """Replace the model's section of the document, or add it at the end."""
    text = file.read_text() if file.is_file() else INTRODUCTION
    before, heading, after = text.partition(f"## {model}\n")
    following = after.find("\n## ")
    rest = after[following + 1 :] if heading and following >= 0 else ""
    file.write_text(before.rstrip("\n") + "\n\n" + section + (f"\n{rest}" if rest else ""))


def draw(table: Table, folder: Path) -> str:
    """Plot gap closed against stored bits and against wall time; what was drawn, in words."""
    figure = Figure(figsize=(12, 8), layout="constrained")
    by_bits, by_time = figure.subplots(1, 2, sharey=True)
    points = [
        result
        for result in table.results.values()
        if result.seconds is not None and table.gap(result) is not None
    ]
    for index, result in enumerate(points):
        style = {
            "color": f"C{index % 10}",
            "marker": "o" if result.made_by == "rilq" else "s^vD"[index // 10 % 4],
            "markersize": 12 if result.made_by == "rilq" else 8,
            "linestyle": "none",
        }
        group = f", G {result.group_size}" if result.group_size else ""
        by_time.plot(result.seconds, table.gap(result), label=result.name + group, **style)
        if result.bits_per_weight < 16:
            by_bits.plot(result.bits_per_weight, table.gap(result), **style)
    by_bits.set(xlabel="stored bits per weight", ylabel="gap closed")
    by_time.set(xlabel="wall time of the whole command, s")
    ticks = {by_bits: (2, 2.5, 3, 4, 6, 8, 12, 16), by_time: (3, 10, 30, 100, 300, 1000)}
    for axes, values in ticks.items():
        limits = axes.get_xlim()  # before ticks outside them widen it
        axes.set_xscale("log")
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.minorticks_off()
        axes.set_xlim(max(limits[0], 0.8 * values[0]), 1.1 * limits[1])
        axes.axhline(1, color="grey", linewidth=1)
        axes.grid(alpha=0.3)
    figure.suptitle(f"{table.model}: plain rounding is 0, full precision is 1; ours are circles")
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    file = folder / f"accuracy-{table.model}.png"
    figure.savefig(file, dpi=90)
    return str(file)
