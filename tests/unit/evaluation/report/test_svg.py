"""Plots as SVG for the page and as PNG for the card."""

import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from importlib import resources

import pytest
import report_examples as examples
from matplotlib.figure import Figure

from rilq.evaluation.report.plots import (
    Version,
    kl_plot,
    layers_plot,
    loss_plot,
    timeline_plot,
    versions_plot,
)
from rilq.evaluation.report.svg import PALETTE, to_png, to_svg
from rilq.records.run import LayerFigure, LossPoint

RUN = examples.run()
AGAINST = examples.evaluation().against
assert AGAINST is not None
PLOTS: dict[str, Callable[[], Figure]] = {
    "loss": lambda: loss_plot([p for p in RUN.losses if p.term == "total"]),
    "layers": lambda: layers_plot(RUN.layers, (0.02, 0.03, 0.04)),
    "layers of a dense model": lambda: layers_plot((), (0.02, 0.0)),
    "one layer": lambda: layers_plot([LayerFigure(0, 0.0, None)], ()),
    "versions": lambda: versions_plot(
        [Version("A", 2.5, 19.5), Version("B", 4.5, 17.4)], ylabel="perplexity", base=17.3
    ),
    "kl": lambda: kl_plot(AGAINST),
    "timeline": lambda: timeline_plot(RUN),
    "timeline without samples": lambda: timeline_plot(replace(RUN, samples=())),
}


@pytest.mark.parametrize("name", PLOTS)
def test_a_plot_has_the_pages_colours_and_font_and_is_the_same_each_time(name: str) -> None:
    svg, again = (to_svg(PLOTS[name](), prefix="A", label="some plot") for _ in range(2))
    assert svg == again
    assert not re.search(r"#[0-9a-f]{6}", svg), "a colour that is no variable"
    assert "font-family" not in svg and "<style" not in svg and "DejaVu" not in svg
    assert "<text" in svg and len(svg) < 30_000
    root = ET.fromstring(svg)
    assert root.get("role") == "img" and root.get("aria-label") == "some plot"
    assert "width" not in root.attrib and root.get("viewBox")


def test_every_variable_of_a_plot_is_defined_by_the_page() -> None:
    css = resources.files("rilq.evaluation.report").joinpath("page.css").read_text()
    for variable, colour in PALETTE.items():
        assert f"{variable}: light-dark({colour}, #" in css


def test_ids_begin_with_the_prefix_and_are_all_referred_to() -> None:
    svg = to_svg(PLOTS["loss"](), prefix="B-loss", label="")
    ids = re.findall(r' id="([^"]*)"', svg)
    links = set(re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', svg))
    assert ids and len(ids) == len(set(ids))
    assert set(ids) == {a or b for a, b in links} and all(i.startswith("B-loss-") for i in ids)


def test_text_is_escaped_and_may_be_of_letters_that_the_font_lacks() -> None:
    figure = Figure()
    figure.text(0.5, 0.5, "<script>&\u6f22")
    svg = to_svg(figure, prefix="A", label='a "label" <b>')
    assert "&lt;script&gt;&amp;\u6f22" in svg and "<script" not in svg and "<b>" not in svg


def test_a_png_is_the_same_each_time() -> None:
    first, second = (to_png(PLOTS["loss"]()) for _ in range(2))
    assert first == second and first.startswith(b"\x89PNG")


def test_the_best_validation_loss_is_marked() -> None:
    points = [LossPoint("validation", "total", s, v) for s, v in ((0, 3.0), (10, 1.5), (20, 2.0))]
    axes = loss_plot(points).axes[0]
    line, best = axes.get_lines()
    assert line.get_xydata().tolist() == [[0, 3], [10, 1.5], [20, 2]]
    assert best.get_xydata().tolist() == [[10, 1.5]] and best.get_label() == "best: 1.5"


def test_the_histogram_is_in_percent_of_the_tokens_without_empty_ends() -> None:
    bars = kl_plot(AGAINST).axes[0].patches
    assert len(bars) == 22  # of the 24 bins, those at both ends are empty
    assert sum(bar.get_height() for bar in bars) == pytest.approx(100)
