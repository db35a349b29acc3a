"""What a report shows of one checkpoint, gathered from its folder and from recorded runs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from rilq.errors import CheckpointError
from rilq.evaluation.figures import Evaluation
from rilq.evaluation.kept_figures import kept_figures
from rilq.formats.shard import read_header
from rilq.formats.verify import read_manifest
from rilq.records.run import LayerFigure, LossPoint, Run

_LAYER = re.compile(r"\.layers\.(\d+)\..+\.(weight|weight_scale|zero_point)$")


@dataclass(frozen=True)
class FileSum:
    """A file of a checkpoint: its size in bytes and its xxh3."""

    name: str
    size: int
    xxh3: str


@dataclass(frozen=True)
class Subject:
    """One checkpoint; what nobody knows of it is None or empty.

    Attributes:
        name: of its folder, or `owner/name`.
        model: name of the full-precision model.
        started: when its conversion began, Unix time.
        recipe, calibration, versions, machine: of its conversion.
        bits_per_weight, size_bytes: as of `Evaluation`.
        quality: further figures of `rilq.json`, by name.
        evaluations: the newest first, one for each text.
        losses: of its training; finite.
        layers: as they were quantized, with finite errors.
        runs: conversion and evaluations whose stages were recorded.
        files: of the folder, with their checksums.
    """

    name: str
    model: str = ""
    started: float | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    bits_per_weight: float | None = None
    size_bytes: int | None = None
    quality: Mapping[str, float] = field(default_factory=dict)
    evaluations: tuple[Evaluation, ...] = ()
    losses: tuple[LossPoint, ...] = ()
    layers: tuple[LayerFigure, ...] = ()
    runs: tuple[Run, ...] = ()
    files: tuple[FileSum, ...] = ()

    @property
    def evaluation(self) -> Evaluation | None:
        """The newest."""
        return self.evaluations[0] if self.evaluations else None


def folder_subject(folder: Path, runs: Sequence[Run] = ()) -> Subject:
    """A converted checkpoint as its folder tells it, and what was recorded of it.

    Args:
        folder: with `rilq.json`.
        runs: of this very content, the newest first.

    Raises:
        CheckpointError: `rilq.json` is missing, or not ours.
    """
    manifest = read_manifest(folder)
    recorded = runs_subject(folder.resolve().name, runs)
    try:
        quality = manifest["quality"]
        files = [FileSum(n, f["size"], f["xxh3"]) for n, f in sorted(manifest["files"].items())]
        weights = sum(f.size for f in files if f.name.endswith((".safetensors", ".gguf")))
        errors, bits = quality.get("layer_errors", ()), _layer_bits(folder, manifest)
        layers = tuple(
            LayerFigure(i, e, bits.get(i)) for i, e in enumerate(errors) if e is not None
        )
        return Subject(
            name=recorded.name,
            model=str(manifest["source"]["name"]),
            started=recorded.started,
            recipe=manifest["recipe"],
            calibration=manifest["calibration"],
            versions=manifest["versions"],
            machine=recorded.machine,
            bits_per_weight=manifest["bits_per_weight"],
            size_bytes=weights,
            quality={n: v for n, v in quality.items() if isinstance(v, int | float)},
            evaluations=recorded.evaluations or tuple(kept_figures(folder)),
            losses=recorded.losses or validation_losses(quality),
            layers=recorded.layers or layers,
            runs=recorded.runs,
            files=tuple(files),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise CheckpointError(
            f"{folder}/rilq.json: is not what rilq writes: {err!r}\n"
            "  download the checkpoint again, or convert it again"
        ) from err


def runs_subject(name: str, runs: Sequence[Run]) -> Subject:
    """A checkpoint as its recorded runs tell it.

    Args:
        name: to show; empty for the name that was recorded.
        runs: of one checkpoint, the newest first.
    """
    conversion = next((run for run in runs if run.command == "convert"), None)
    first = conversion or (runs[0] if runs else None)
    evaluations = _newest_of_each_text(
        Evaluation.from_dict(run.evaluation) for run in runs if run.evaluation is not None
    )
    figures = {name: value for run in reversed(runs) for name, value in run.figures.items()}
    size = figures.get("size_bytes")
    return Subject(
        name=name or (first.checkpoint if first else ""),
        model=first.model if first else "",
        started=first.started if first else None,
        recipe=first.recipe if first else {},
        versions=first.versions if first else {},
        machine=first.machine if first else {},
        bits_per_weight=figures.get("bits_per_weight"),
        size_bytes=None if size is None else int(size),
        evaluations=evaluations,
        losses=tuple(p for p in conversion.losses if isfinite(p.value)) if conversion else (),
        layers=tuple(f for f in conversion.layers if isfinite(f.error)) if conversion else (),
        runs=tuple(run for run in reversed(runs) if run.stages),
    )


def validation_losses(quality: Mapping[str, Any]) -> tuple[LossPoint, ...]:
    """Of the training, as `rilq.json` has them; those that were no number are left out."""
    history = [(step, loss) for step, loss in quality.get("history", ()) if loss is not None]
    return tuple(LossPoint("validation", "total", step, loss) for step, loss in history)


def _newest_of_each_text(evaluations: Iterable[Evaluation]) -> tuple[Evaluation, ...]:
    newest: dict[str, Evaluation] = {}
    for each in evaluations:
        newest.setdefault(each.tokens_digest, each)
    return tuple(newest.values())


def _layer_bits(folder: Path, manifest: Mapping[str, Any]) -> dict[int, float]:
    """Stored bits per weight of the linears of each decoder layer that has a quantized one."""
    sizes: dict[int, list[tuple[str, int, int]]] = {}  # layer to name, bytes, elements
    for name in manifest["files"]:
        path = folder / name
        # Shards lie at the top; an adapter beside the base does not.
        if "/" in name or path.suffix != ".safetensors" or not path.is_file():
            continue
        for tensor, info in read_header(path).tensors.items():
            match = _LAYER.search(tensor)
            if match and len(info.shape) == 2:
                elements = info.shape[0] * info.shape[1]
                sizes.setdefault(int(match[1]), []).append((tensor, info.nbytes, elements))
    group_size, found = int(manifest["recipe"]["group_size"]), {}
    for layer, tensors in sizes.items():
        scales = {name for name, _, _ in tensors if name.endswith(".weight_scale")}
        weights = sum(
            elements * group_size if name in scales else elements
            for name, _, elements in tensors
            if name in scales or (name.endswith(".weight") and f"{name}_scale" not in scales)
        )
        if scales:
            found[layer] = 8 * sum(size for _, size, _ in tensors) / weights
    return found
