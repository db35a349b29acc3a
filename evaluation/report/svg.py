"""A matplotlib figure as inline SVG for the page, or as PNG for a model card.

The page decides the colours, for light and dark, and the font: in the SVG each colour of
`PALETTE` is a CSS variable, and text stays text, so that it scales, can be found, and is small.
"""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Variable of page.css, and its colour in the PNG, which is the one in light; all are different.
PALETTE = {
    "--ink": "#22262b",
    "--muted": "#667079",
    "--grid": "#e1e4e8",
    "--blue": "#2a67b1",
    "--orange": "#c2540a",
    "--green": "#2c7d51",
    "--purple": "#7a4fa3",
}
_SVG, _LINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_HREF = f"{{{_LINK}}}href"
_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # none: the same bytes each time
_REFERENCE = re.compile(r"url\(#([^)]*)\)")
_NUMBER = re.compile(r"-?\d+\.\d+")
# matplotlib's own font, which the page replaces; before 3.10 it stood in the shorthand.
_FONT = (
    (re.compile(r"font-family: [^;]*(; )?"), ""),
    (re.compile(r"font: (\S+) [^;]*"), r"font-size: \1"),
)


def to_png(figure: Figure) -> bytes:
    """The same bytes for the same figure."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120, metadata={"Software": ""})
    return image.getvalue()


def to_svg(figure: Figure, *, prefix: str, label: str) -> str:
    """An `<svg>` element, the same for the same figure, to be put into an HTML page.

    Args:
        figure: coloured from `PALETTE` only.
        prefix: of its ids, another one for each figure of a page.
        label: what it shows, for those who do not see it.
    """
    import matplotlib

    written = io.StringIO()
    settings = matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "rilq"})
    with settings, warnings.catch_warnings():
        # A letter that matplotlib's font lacks: the reader's font is used, and may have it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        figure.savefig(written, format="svg", transparent=True, metadata=_METADATA)
    root = ET.fromstring(written.getvalue())
    for style in [each for each in root.iter() if each.find(f"{{{_SVG}}}style") is not None]:
        style.clear()  # it would count for the whole page; page.css has it for plots
    _own_ids(root, prefix)
    for element in root.iter():
        _tidy(element)
    box = root.attrib["viewBox"]
    root.attrib.clear()
    root.attrib |= {"viewBox": box, "role": "img", "aria-label": label, "class": "plot"}
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", _LINK)
    return ET.tostring(root, encoding="unicode")


def _own_ids(root: ET.Element, prefix: str) -> None:
    """Rename the ids that are referred to, and drop the others."""
    texts = [value for element in root.iter() for value in element.attrib.values()]
    used = {name for text in texts for name in _REFERENCE.findall(text)}
    used |= {link.removeprefix("#") for each in root.iter() if (link := each.get(_HREF))}
    for element in root.iter():
        if (name := element.attrib.pop("id", None)) in used:
            element.set("id", f"{prefix}-{name}")
        if link := element.get(_HREF):
            element.set(_HREF, f"#{prefix}-{link.removeprefix('#')}")
        for key, value in element.attrib.items():
            element.set(key, _REFERENCE.sub(rf"url(#{prefix}-\1)", value))


def _tidy(element: ET.Element) -> None:
    """The page's colours and font, short numbers, and no line breaks but those in text."""
    if "style" in element.attrib:
        style = element.attrib["style"]
        for variable, colour in PALETTE.items():
            style = style.replace(colour, f"var({variable})")
        for pattern, instead in _FONT:
            style = pattern.sub(instead, style)
        element.set("style", style)
    for key in element.attrib.keys() & {"d", "x", "y", "width", "height", "points", "transform"}:
        value = " ".join(element.attrib[key].split())
        element.set(key, _NUMBER.sub(lambda number: f"{float(number[0]):.2f}", value))
    if element.get("transform", "").startswith("rotate(-0 "):
        del element.attrib["transform"]
    if not element.tag.endswith(("text", "tspan")):
        element.text = None
    element.tail = None
