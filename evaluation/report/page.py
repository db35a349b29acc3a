"""The report as one HTML file that needs nothing else: no network, no other file.

Whatever comes from a model, a text or a database is escaped by the template; beside that the page
forbids every script but its own, by hash, and everything from the network.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import rilq
from rilq.errors import OutputError
from rilq.evaluation.report.comparison import comparison
from rilq.evaluation.report.section import SHADES, section
from rilq.evaluation.report.subject import Subject
from rilq.formats.durable import write_bytes

_MADE_BY = b'<meta name="generator" content="rilq">'


def page_beside(output: Path) -> Path:
    """Where the report of a conversion to `output` goes: never into that folder."""
    place = output.absolute()
    return place.with_name(f"{place.name}.report.html")


def write_page(path: Path, subjects: Sequence[Subject]) -> None:
    """Write the report of some checkpoints; the file appears whole or not at all.

    Raises:
        OutputError: it cannot be written there, or something else has that name.
    """
    check_page(path)
    # A lone surrogate, which a damaged tokenizer can make, is no character of UTF-8.
    write_bytes(path, make_page(subjects).encode("utf-8", errors="replace"))


def check_page(path: Path) -> None:
    """Refuse to replace what is no report.

    Raises:
        OutputError: there is such a thing.
    """
    if not path.exists():
        return
    try:
        with path.open("rb") as file:
            ours = _MADE_BY in file.read(4096)
    except OSError:  # a folder, or not to be read
        ours = False
    if not ours:
        raise OutputError(
            f"{path}: is there already, and is no report of rilq\n  choose another name"
        )


def make_page(subjects: Sequence[Subject]) -> str:
    """The report's HTML, the same for the same subjects; there is at least one."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    marks = [_mark(index) for index in range(len(subjects))]
    style, script = _asset("page.css"), _asset("page.js")
    policy = (
        "default-src 'none'",
        f"script-src 'sha256-{_sha256(script)}'",
        "style-src 'unsafe-inline'",  # of plots, whose styles are attributes
        "base-uri 'none'",
        "form-action 'none'",
    )
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["svg"] = Markup  # made here, with its texts escaped
    return environment.from_string(_asset("page.html")).render(
        title=_title(subjects),
        policy="; ".join(policy),
        style=Markup(style),
        script=Markup(script),
        comparison=comparison(subjects, marks) if len(subjects) > 1 else None,
        sections=[section(each, mark) for each, mark in zip(subjects, marks, strict=True)],
        shades=SHADES,
        version=rilq.__version__,
    )


def _title(subjects: Sequence[Subject]) -> str:
    if len(subjects) == 1:
        return subjects[0].name
    models = sorted({subject.model for subject in subjects if subject.model})
    return f"{len(subjects)} versions of {', '.join(models)}" if models else "Checkpoints"


def _mark(index: int) -> str:
    """A, B, ... Z, AA, AB, ..."""
    more, last = divmod(index, 26)
    return (_mark(more - 1) if more else "") + chr(ord("A") + last)


def _asset(name: str) -> str:
    return resources.files("rilq.evaluation.report").joinpath(name).read_text(encoding="utf-8")


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
