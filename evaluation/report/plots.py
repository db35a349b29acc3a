"""The plots of a report and of a model card: plain values to matplotlib figures.

A figure is small, so that its text can be read on a phone; the page puts two side by side, larger,
where there is room. What names people have chosen is in the page's text, not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rilq.evaluation.figures import Divergence
from rilq.evaluation.report.svg import PALETTE
from rilq.records.run import LayerFigure, LossPoint, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID, BLUE, ORANGE, GREEN, PURPLE = PALETTE.values()
WIDTH, HEIGHT = 4.3, 2.7  # inches
_UNITS = ((3600, "hours"), (60, "minutes"), (1, "seconds"))


def loss_plot(points: Sequence[LossPoint]) -> Figure:
    """One loss over the updates: of the training, and of the held-out rows with its best marked.

    Args:
        points: of one term.
    """
    figure, [axes] = _figure()
    for kind, colour, marker in (("train", MUTED, None), ("validation", BLUE, "o")):
        line = [(p.step, p.value) for p in points if p.kind == kind]
        if line:
            axes.plot(*zip(*line, strict=True), color=colour, marker=marker, label=kind)
    held_out = [p for p in points if p.kind == "validation"]
    if held_out:
        best = min(held_out, key=lambda p: p.value)
        axes.plot(best.step, best.value, "o", color=ORANGE, label=f"best: {best.value:.4g}")
    axes.set(xlabel="updates", ylabel="loss")
    _legend(axes)
    return figure


def layers_plot(layers: Sequence[LayerFigure], final: Sequence[float]) -> Figure:
    """Relative error of each decoder layer, and below it the bits that it is stored in.

    Args:
        layers: as they were quantized; empty if that is not known.
        final: error of the finished checkpoint's hidden states; empty if it was not measured.
    """
    bits = {layer.index: layer.bits for layer in layers if layer.bits is not None}
    figure, panels = _figure(*((3.0, 1.0) if bits else (1.0,)), height=HEIGHT + 0.4 * bool(bits))
    errors = panels[0]
    if layers:
        made = [(layer.index, layer.error) for layer in layers]
        label = "as quantized, before any training"
        errors.plot(*zip(*made, strict=True), color=BLUE, marker="o", label=label)
    if final:
        errors.plot(range(len(final)), final, color=ORANGE, marker="s", label="of the checkpoint")
    values = [layer.error for layer in layers] + list(final)
    if min(values) > 0:
        _logarithmic(errors, values)
    errors.set(ylabel="relative squared error")
    _legend(errors)
    if bits:
        panels[1].bar(list(bits), list(bits.values()), color=GREEN, width=0.7)
        panels[1].set(ylabel="bits", ylim=(0, None))
    panels[-1].set(xlabel="decoder layer")
    _whole_numbers(panels[-1])
    return figure


@dataclass(frozen=True)
class Version:
    """A checkpoint among others: its mark in the plot, bits per weight, and one figure of it."""

    mark: str
    bits: float
    value: float


def versions_plot(versions: Sequence[Version], *, ylabel: str, base: float | None) -> Figure:
    """A figure of several checkpoints against their bits per weight; lower is better.

    Args:
        base: the full-precision model's, if there is such a thing.
    """
    figure, [axes] = _figure()
    ordered = sorted(versions, key=lambda version: version.bits)
    line = [(version.bits, version.value) for version in ordered]
    axes.plot(*zip(*line, strict=True), color=GRID, zorder=1)
    axes.plot(*zip(*line, strict=True), "o", color=BLUE, markersize=7)
    for version in ordered:
        axes.annotate(
            version.mark,
            (version.bits, version.value),
            xytext=(7, 6),
            textcoords="offset points",
            color=INK,
            weight="bold",
        )
    if base is not None:
        axes.axhline(base, color=MUTED, linestyle="--")
        place = (0, base)
        axes.annotate("full precision", place, xytext=(3, -4), textcoords="offset points",
                      xycoords=("axes fraction", "data"), va="top", color=MUTED)  # fmt: skip
    axes.margins(x=0.12, y=0.15)
    axes.set(xlabel="stored bits per weight", ylabel=ylabel)
    return figure


def kl_plot(found: Divergence) -> Figure:
    """How the KL per token is distributed, with its mean and 99th percentile; there are tokens."""
    figure, [axes] = _figure()
    edges, counts = found.filled_bins()
    shares = [100 * count / sum(counts) for count in counts]
    widths = [right - left for left, right in zip(edges, edges[1:], strict=False)]
    axes.bar(edges[:-1], shares, width=widths, align="edge", color=BLUE)
    for value, name, colour in ((found.kl_mean, "mean", ORANGE), (found.kl_p99, "99 %", PURPLE)):
        axes.axvline(value, color=colour, linestyle="--", label=f"{name}: {value:.3g}")
    axes.set(xscale="log", xlabel="KL per token, nats", ylabel="% of the tokens")
    axes.minorticks_off()
    _legend(axes)
    return figure


def timeline_plot(run: Run) -> Figure:
    """Stages of a run, and below them memory and free disk space while it ran."""
    rows = list(dict.fromkeys(stage.name for stage in run.stages))
    heights = [0.25 * len(rows) + 0.3, *([1.0, 0.8] if run.samples else [])]
    figure, panels = _figure(*heights, height=sum(heights) + 0.8)
    unit, name = next((u, n) for u, n in _UNITS if run.seconds >= 2 * u or u == 1)
    for stage in run.stages:
        place, length = stage.started / unit, stage.seconds / unit
        panels[0].barh(rows.index(stage.name), length, left=place, height=0.6, color=BLUE)
    panels[0].set_yticks(range(len(rows)), rows)
    panels[0].invert_yaxis()
    if run.samples:
        at = [sample.at / unit for sample in run.samples]
        _, memory, disk = panels
        memory.plot(at, [s.host_bytes / 1e9 for s in run.samples], color=ORANGE, label="host")
        device = [(s.device_bytes or 0) / 1e9 for s in run.samples]
        if any(device):
            memory.plot(at, device, color=PURPLE, linestyle="--", label="GPU")
            _legend(memory)
        memory.set(ylabel="memory,\nGB", ylim=(0, None))
        disk.plot(at, [s.disk_free_bytes / 1e9 for s in run.samples], color=GREEN)
        disk.set(ylabel="disk free,\nGB")
    panels[-1].set(xlabel=name)
    return figure


# ---- how they look ------------------------------------------------------------------------------


def _figure(*heights: float, height: float = HEIGHT) -> tuple[Figure, list[Axes]]:
    """A figure of panels, one above the other, over the same x axis.

    Args:
        heights: of the panels, relative to each other; none for one panel.
        height: of the whole, inches.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    ratios = heights or (1.0,)
    grid = figure.subplots(
        len(ratios), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": ratios}
    )
    panels: list[Axes] = list(grid[:, 0])
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GRID)
        axes.tick_params(colors=MUTED, labelsize=9, length=0)
        axes.xaxis.label.set_color(MUTED)
        axes.yaxis.label.set_color(MUTED)
        axes.grid(color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.locator_params(nbins=6)
        if axes is not panels[0]:
            axes.locator_params(axis="y", nbins=3)
    return figure, panels


def _legend(axes: Axes) -> None:
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)


def _logarithmic(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic y axis, labelled with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    wide = max(values) > 30 * min(values)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
