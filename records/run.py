"""What the database keeps of one run of a command, as plain values; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal["running", "done", "failed", "stopped"]


@dataclass(frozen=True)
class Stage:
    """A part of a run, as its progress display names it.

    Attributes:
        started: seconds since the run's start.
        seconds: that it took.
        host_bytes: resident memory of the process at its peak.
        device_bytes: memory held on a GPU at its peak; None without one.
        disk_free_bytes: the least free space on the volume of the work folder.
    """

    name: str
    started: float
    seconds: float
    host_bytes: int
    device_bytes: int | None
    disk_free_bytes: int


@dataclass(frozen=True)
class Sample:
    """Memory and disk at one moment of a run; the units are those of `Stage`."""

    at: float
    host_bytes: int
    device_bytes: int | None
    disk_free_bytes: int


@dataclass(frozen=True)
class LossPoint:
    """A loss of a training.

    Attributes:
        kind: over the updates since the last validation, or over the held-out rows.
        term: what was minimised ("total"), or one part of it, not weighted: "mse", "ce" or "kl".
        step: updates done.
    """

    kind: Literal["train", "validation"]
    term: Literal["total", "mse", "ce", "kl"]
    step: int
    value: float


@dataclass(frozen=True)
class LayerFigure:
    """A decoder layer of a conversion.

    Attributes:
        error: relative squared error of its output against the full-precision layer's.
        bits: stored per weight of its quantized linears, on average; None if there is none.
    """

    index: int
    error: float
    bits: float | None


@dataclass(frozen=True)
class Run:
    """One run of `rilq convert` or `rilq eval`.

    Attributes:
        id: in this database.
        command: "convert" or "eval".
        started: Unix time.
        seconds: that it took; of one that is running, until its last sign of life.
        state: of a run that was killed, "running" until the next one looks.
        message: why it failed, for people.
        model: the full-precision model: `owner/name`, or a folder's name.
        source_hash: hash of that model's headers, by which runs of the same model are found.
        checkpoint: name of the checkpoint that was made or measured.
        place: its absolute path, or `owner/name@commit`.
        content_hash: xxh3 of its `rilq.json`, which holds a hash of every tensor; of a checkpoint
            without one, hash of its headers. None before there is one.
        job: hash of all that determines a conversion's result: runs that continued one another have
            the same one.
        recipe: of the conversion, as in `rilq.json`; empty for a full-precision model.
        options: of the evaluation; of a conversion its texts and what was chosen automatically.
        versions: of rilq and the libraries that have an effect on the result.
        machine: processor, cores, memory, GPU, system.
        figures: all numbers found, by name: `perplexity`, `kl_p99`, `bits_per_weight`, ...
        evaluation: `Evaluation.as_dict()`; None for a conversion.
        stages, samples, losses, layers: see those.
    """

    id: int
    command: str
    started: float
    seconds: float
    state: State
    model: str
    checkpoint: str
    place: str
    message: str = ""
    source_hash: str | None = None
    content_hash: str | None = None
    job: str | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    evaluation: dict[str, Any] | None = None
    stages: tuple[Stage, ...] = ()
    samples: tuple[Sample, ...] = ()
    losses: tuple[LossPoint, ...] = ()
    layers: tuple[LayerFigure, ...] = ()
