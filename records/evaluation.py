"""What a record says of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rilq.converter.job import versions
from rilq.converter.job_source import base_name
from rilq.evaluation.figures import Evaluation, Passages
from rilq.formats.checkpoint import SOURCE_DTYPES, Checkpoint
from rilq.formats.fp8 import open_source_checkpoint
from rilq.formats.hub import open_source
from rilq.formats.verify import MANIFEST_NAME, file_hash
from rilq.records.machine import machine_facts
from rilq.records.place import database_for
from rilq.records.run import Run


def measured_run(
    model: str, *, revision: str | None = None, options: Mapping[str, Any] | None = None
) -> Run:
    """An evaluation about to begin: which checkpoint it is of, and what that was made from.

    Args:
        model: a folder, or `owner/name` on the Hub.
        revision: on the Hub.
        options: of the evaluation; see `recorded_options`.

    Raises:
        InputError: it is no checkpoint.
    """
    checkpoint = _open(model, revision)
    source = checkpoint.source
    name, headers = base_name(checkpoint), checkpoint.header_hash()
    local = source.commit is None
    run = Run(
        id=0,
        command="eval",
        started=0.0,
        seconds=0.0,
        state="running",
        model=name,
        checkpoint=name,
        place=str(Path(source.label).resolve()) if local else f"{name}@{source.commit}",
        source_hash=headers,
        content_hash=headers,
        options=recorded_options(options or {}),
        versions=versions(),
        machine=machine_facts(),
    )
    manifest = checkpoint.read_json(MANIFEST_NAME)
    return run if manifest is None else _converted(run, manifest, source.path(MANIFEST_NAME))


def _open(model: str, revision: str | None) -> Checkpoint:
    # int32: the packed codes of a converted checkpoint.
    return open_source_checkpoint(
        open_source(model, revision=revision), dtypes=SOURCE_DTYPES | {torch.int32}
    )


def _converted(run: Run, manifest: dict[str, Any], path: Path) -> Run:
    """The same, of a checkpoint that rilq has made."""
    try:
        return replace(
            run,
            model=str(manifest["source"]["name"]),
            source_hash=str(manifest["source"]["header_hash"]),
            content_hash=file_hash(path),
            job=str(manifest["job"]),
            recipe=dict(manifest["recipe"]),
        )
    except (KeyError, TypeError, ValueError):  # another program's; the evaluation goes on
        return run


def recorded_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of an evaluation as a record has them: paths as text, and what is None left out.

    With `against`, `base_hash` is added: hash of that model's headers.

    Raises:
        InputError: that is no checkpoint.
    """
    known = {name: _plain(value) for name, value in options.items() if value is not None}
    if "against" in known:
        base = _open(str(known["against"]), known.get("against_revision"))
        known["base_hash"] = base.header_hash()
    return known


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def database_of(run: Run, given: str | Path) -> Path | None:
    """Where an evaluation is recorded by default: beside a converted checkpoint, else here.

    Args:
        run: as `measured_run` gives it.
        given: see `database_for`.

    Raises:
        OptionError: that is inside the checkpoint.
    """
    place = Path(run.place)
    if not place.is_absolute():  # on the Hub
        return database_for(given, Path())
    here = Path().resolve()
    beside = run.recipe or place in (here, *here.parents)
    return database_for(given, place.parent if beside else here, keep_out=(place,))


def evaluation_found(found: Evaluation, passages: Passages | None = None) -> dict[str, Any]:
    """What is known of an evaluation when it is done, for `Recorder.tell`."""
    return {"evaluation": found.as_dict(), "figures": found.figures(), "passages": passages}
