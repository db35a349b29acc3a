"""Perplexity of a checkpoint and its base, measured once and kept beside the checkpoint.

A push that has to be repeated, for a lost network or a full quota, does not measure again.
`rilq.json` cannot say it: the losses in it are distances from the base on calibration rows.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rilq.calib.sources import describe_source, parse_source
from rilq.errors import OutputError
from rilq.evaluation.figures import Evaluation
from rilq.formats.durable import write_bytes
from rilq.formats.verify import MANIFEST_NAME, file_hash
from rilq.progress import Reporter


def measure_once(
    folder: Path,
    base: str,
    base_revision: str | None,
    text: str,
    *,
    text_key: str,
    seqlen: int | None,
    device: str,
    dtype: str,
    report: Reporter,
) -> Evaluation:
    """The figures from `<folder>.rilq-eval.json`, if they answer this question, or new ones.

    Args:
        folder: a checkpoint with `rilq.json`, whose hash stands for its content.
        base: what it was made from, known to be that; the other arguments are those of `evaluate`.

    Raises:
        RilqError: as of `evaluate`.
    """
    asked = {
        "checkpoint": file_hash(folder / MANIFEST_NAME),
        "text": describe_source(parse_source(text)),
        "text_key": text_key,
        "seqlen": seqlen,
        "dtype": dtype,
    }
    place = _place(folder)
    if (kept := _read(place, asked)) is not None:
        report.note(f"{place}: figures of an earlier push are used")
        return kept
    from rilq.evaluation.perplexity import (
        measure_texts,
    )  # slow, and not needed to read what is kept

    ((figures, _),) = measure_texts(
        [str(folder)],
        text,
        seqlen=seqlen,
        against=base,
        against_revision=base_revision,
        device=device,
        dtype=dtype,
        text_key=text_key,
        report=report,
    )
    content = json.dumps({"asked": asked, "figures": figures.as_dict()}, indent=2) + "\n"
    try:
        write_bytes(place, content.encode())
    except OutputError as err:  # only a convenience
        report.warn(str(err))
    return figures


def kept_figures(folder: Path) -> list[Evaluation]:
    """What an earlier push has measured of the checkpoint as it is now; empty if none did."""
    asked = {"checkpoint": file_hash(folder / MANIFEST_NAME)}
    figures = _read(_place(folder), asked)
    return [] if figures is None else [figures]


def _place(folder: Path) -> Path:
    place = folder.resolve()
    return place.with_name(f"{place.name}.rilq-eval.json")


def _read(path: Path, asked: Mapping[str, Any]) -> Evaluation | None:
    try:
        content = json.loads(path.read_bytes())
        if not asked.items() <= content["asked"].items():
            return None
        return Evaluation.from_dict(content["figures"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # not there, or damaged
        return None
