"""What a record says of a conversion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rilq.converter.job import Job, job_fingerprint, job_hash, versions
from rilq.converter.job_source import base_name
from rilq.converter.pipeline import ConvertResult
from rilq.converter.train import Progress
from rilq.converter.training_stage import curves
from rilq.converter.workdir import peek_facts
from rilq.formats.verify import MANIFEST_NAME, file_hash, read_manifest
from rilq.records.losses import finite_or_nan, losses_of
from rilq.records.machine import machine_facts
from rilq.records.run import LayerFigure, LossPoint, Run


def conversion_run(job: Job) -> Run:
    """A conversion about to begin."""
    options = job.options
    return Run(
        id=0,
        command="convert",
        started=0.0,
        seconds=0.0,
        state="running",
        model=base_name(job.checkpoint),
        source_hash=job.checkpoint.header_hash(),
        checkpoint=options.output.name,
        place=str(options.output.resolve()),
        job=job_hash(job_fingerprint(job)),
        recipe=options.recorded(),
        options={
            "commit": job.checkpoint.source.commit,
            "dataset": list(options.dataset),
            "choices": asdict(job.plan.choices),
        },
        versions=versions(),
        machine=machine_facts(),
    )


def conversion_found(job: Job, result: ConvertResult) -> dict[str, Any]:
    """What is known of it when it is done: fields of `Run`."""
    manifest, quality = read_manifest(result.output), result.quality
    numbers = {k: v for k, v in quality.items() if isinstance(v, int | float)}
    weights = [f["size"] for n, f in manifest["files"].items() if n.endswith(".safetensors")]
    return {
        "content_hash": file_hash(result.output / MANIFEST_NAME),
        "recipe": manifest["recipe"],
        "figures": {
            **numbers,
            "bits_per_weight": manifest["bits_per_weight"],
            "bits_per_parameter": manifest["bits_per_parameter"],
            **{n: manifest[n] for n in ("activation_bits", "cache_bits") if n in manifest},
            "size_bytes": sum(weights),
            "bytes_read": result.bytes_read,
        },
        "losses": losses_of(quality),
        "layers": layers_of(job, quality),
    }


def losses_so_far(work: Path) -> tuple[LossPoint, ...]:
    """Losses of a training that did not come to its end."""
    facts = peek_facts(work, "train")
    return () if facts is None else losses_of(curves(Progress(**facts)))


def layers_of(job: Job, quality: Mapping[str, Any]) -> tuple[LayerFigure, ...]:
    """Error and stored bits of every decoder layer."""
    plan = job.plan
    if "bits" in quality:
        plan = plan.with_bits(quality["bits"]["chosen"])
    figures = []
    for index, error in enumerate(quality["layer_errors"]):
        prefix = f"{job.streamed.prefix}.{index}."
        linears = [p for p in plan.quantized if p.spec and p.name.startswith(prefix)]
        weights = sum(p.out_features * p.in_features for p in linears)
        bits = sum(
            p.out_features * p.in_features * p.spec.bits_per_weight for p in linears if p.spec
        )
        figures.append(
            LayerFigure(index, finite_or_nan(error), bits / weights if weights else None)
        )
    return tuple(figures)
