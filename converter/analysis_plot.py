"""The figure of an analysis: perplexity and final-state error against rank, and the spectrum."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rilq.converter.analysis import Analysis, Row, labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"svd": "#7f7f7f", "linear": "#1f77b4", "layer": "#e08214", "model": "#b2182b"}
MARKERS = {"svd": "s", "linear": "^", "layer": "D", "model": "o"}
DASHES = {"none": "-", "alpha": "-", "alpha/rank": "--"}
BITS_COLOURS = {2: "#b2182b", 3: "#e08214", 4: "#1f77b4"}


def plot(found: Analysis) -> bytes:
    """A PNG image of three panels."""
    from matplotlib.figure import Figure

    settings = found.settings
    figure = Figure(figsize=(14, 4.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    figure.suptitle(
        f"{found.model}: {settings['adapter']} adapters on {settings['bits']}-bit "
        f"{settings['quantizer']}, groups of {settings['group_size']}"
    )
    _against_rank(left, found, lambda row: row.measured.perplexity)
    left.set(title="Held-out perplexity", ylabel="perplexity", yscale="log")
    left.axhline(found.base.perplexity, color="black", linewidth=1, linestyle=":")
    left.axhline(found.full, color="black", linewidth=1)
    _beside(left, found.base.perplexity, "no adapters", below=True)
    _beside(left, found.full, "full precision", below=False)
    _plain_numbers(left)
    _against_rank(middle, found, lambda row: row.measured.state_error)
    middle.set(
        title="Final hidden states on held-out text",
        ylabel=r"relative error $\|h-h_{teacher}\|^2/\|h_{teacher}\|^2$",
        yscale="log",
    )
    middle.axhline(found.base.state_error, color="black", linewidth=1, linestyle=":")
    _beside(middle, found.base.state_error, "no adapters", below=True)
    _plain_numbers(middle)
    _spectrum(right, found)
    handles, names = left.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=90, metadata={"Software": ""})
    return image.getvalue()


def _against_rank(axes: Axes, found: Analysis, value: Callable[[Row], float]) -> None:
    """One curve per scope and scaling."""
    lines: dict[tuple[Any, Any], list[Row]] = {}
    for row in found.rows:
        lines.setdefault((row.scope, row.scaling), []).append(row)
    for (scope, scaling), rows in lines.items():
        name, kind = labels(scope, scaling)
        axes.plot(
            [row.rank for row in rows],
            [value(row) for row in rows],
            color=COLOURS[scope],
            marker=MARKERS[scope],
            linestyle=DASHES[scaling],
            label=f"{name} ({kind})" if scaling == "none" else f"{name} (fixed {kind})",
        )
    ranks = sorted({row.rank for row in found.rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.minorticks_off()
    axes.set_xlabel("rank")
    axes.grid(alpha=0.3)


def _plain_numbers(axes: Axes) -> None:
    """A logarithmic axis that spans little is labelled 20, 30, 40 and not 2 x 10^1."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0), numticks=12))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())


def _beside(axes: Axes, value: float, text: str, *, below: bool) -> None:
    """Name a horizontal line, at its right end."""
    axes.annotate(
        text,
        (1, value),
        xycoords=("axes fraction", "data"),
        xytext=(-4, -4 if below else 4),
        textcoords="offset points",
        ha="right",
        va="top" if below else "bottom",
        fontsize=8,
    )


def _spectrum(axes: Axes, found: Analysis) -> None:
    """Singular values of the error at each number of bits, with what the largest rank removes."""
    for spectrum in found.spectra:
        rank = max(spectrum.captured)
        axes.plot(
            spectrum.positions,
            spectrum.singular_values,
            color=BITS_COLOURS.get(spectrum.bits),
            label=f"{spectrum.bits} bits: rank {rank} removes {spectrum.captured[rank]:.0%}",
        )
    axes.set(
        title=f"Singular values of the {found.settings['quantizer']} error",
        xlabel="place in the spectrum (0 first, 1 last)",
        ylabel=r"singular value of $W-\hat{W}$ / $\|W\|$",
        yscale="log",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
