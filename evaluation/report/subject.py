"""What a report shows of one checkpoint, gathered from its folder and from recorded runs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from rilq.errors import CheckpointError
from rilq.evaluation.figures import SIXTEEN, Evaluation
from rilq.evaluation.kept_figures import kept_figures
from rilq.formats.shard import read_header
from rilq.formats.verify import read_manifest
from rilq.records.losses import losses_of
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
        started: when its conversion began, Unix time; of one that was not recorded, the evaluation.
        recipe, calibration, versions, machine: likewise.
        bits_per_weight, size_bytes, activation_bits, cache_bits: as of `Evaluation`.
        quality: further figures of `rilq.json`, by name.
        expert_tokens: of each decoder layer, the least, median and greatest number of tokens that
            one of its experts saw; None without experts.
        experts_without_data: linears of experts that were quantized without data, with the tokens
            that they saw.
        evaluations: the newest first, one for each text.
        losses: of its training; finite.
        layers: as they were quantized, with finite errors.
        runs: conversion and these evaluations, if their stages were recorded; the oldest first.
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
    activation_bits: float | None = None
    cache_bits: float | None = None
    quality: Mapping[str, float] = field(default_factory=dict)
    expert_tokens: tuple[tuple[float, ...] | None, ...] = ()
    experts_without_data: Mapping[str, int] = field(default_factory=dict)
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
            activation_bits=manifest.get("activation_bits", SIXTEEN),
            cache_bits=manifest.get("cache_bits", SIXTEEN),
            quality={n: v for n, v in quality.items() if isinstance(v, int | float)},
            expert_tokens=tuple(each and tuple(each) for each in quality.get("expert_tokens", ())),
            experts_without_data=dict(quality.get("experts_without_data", {})),
            evaluations=recorded.evaluations or tuple(kept_figures(folder)),
            losses=recorded.losses or finite_losses(losses_of(quality)),
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
    conversions = [run for run in runs if run.command == "convert"]
    # One that found its work done already has next to nothing to tell.
    conversion = max(conversions, key=lambda run: (bool(run.losses), len(run.stages)), default=None)
    first = conversion or (runs[0] if runs else None)
    measured: dict[str, tuple[Run, Evaluation]] = {}  # by text, the newest
    for run in runs:
        if (found := _evaluation(run)) is not None:
            measured.setdefault(found.tokens_digest, (run, found))
    shown = {run.id for run, _ in measured.values()} | ({conversion.id} if conversion else set())
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
        activation_bits=figures.get("activation_bits"),
        cache_bits=figures.get("cache_bits"),
        evaluations=tuple(found for _, found in measured.values()),
        losses=finite_losses(conversion.losses) if conversion else (),
        layers=tuple(f for f in conversion.layers if isfinite(f.error)) if conversion else (),
        runs=tuple(run for run in reversed(runs) if run.id in shown and run.stages),
    )


def _evaluation(run: Run) -> Evaluation | None:
    """What a run has measured; None as well if another version of rilq has kept it in its way."""
    try:
        return None if run.evaluation is None else Evaluation.from_dict(run.evaluation)
    except (KeyError, TypeError):
        return None


def finite_losses(losses: Iterable[LossPoint]) -> tuple[LossPoint, ...]:
    """Those that can be plotted."""
    return tuple(point for point in losses if isfinite(point.value))


def _layer_bits(folder: Path, manifest: Mapping[str, Any]) -> dict[int, float]:
    """Stored bits per weight of the quantized linears of each decoder layer that has some."""
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
    if "method" in manifest["recipe"]:  # all layers alike, in parts instead of groups
        return dict.fromkeys(sizes, float(manifest["bits_per_weight"]))
    group_size, found = int(manifest["recipe"]["group_size"]), {}
    for layer, tensors in sizes.items():
        scales = {name for name, _, _ in tensors if name.endswith(".weight_scale")}
        if scales:
            quantized = {name.removesuffix(".weight_scale") for name in scales}
            bits = 8 * sum(size for n, size, _ in tensors if n.rpartition(".")[0] in quantized)
            found[layer] = bits / sum(n * group_size for name, _, n in tensors if name in scales)
    return found
