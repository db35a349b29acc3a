"""A conversion that was planned, and what makes it this one and no other."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import safetensors
import torch
import transformers
import xxhash

import rilq
from rilq.calib.sources import describe_source, parse_source
from rilq.converter.layers import StreamedModel
from rilq.converter.options import ConvertOptions, flag
from rilq.converter.plan import Plan
from rilq.converter.ranks import ALONE, Ranks
from rilq.formats.checkpoint import Checkpoint
from rilq.formats.verify import file_hash


@dataclass(frozen=True)
class Job:
    """A conversion about to run: options, source and plan; and who else runs it."""

    options: ConvertOptions
    checkpoint: Checkpoint
    streamed: StreamedModel
    plan: Plan
    ranks: Ranks = ALONE


def versions() -> dict[str, str]:
    """Of rilq and of the libraries that have an effect on the result."""
    return {
        "rilq": rilq.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
    }


def job_fingerprint(job: Job) -> dict[str, Any]:
    """Everything that determines the result, as JSON values, one comparable value per key."""
    options, source = job.options, job.checkpoint.source
    return {
        **{flag(name): value for name, value in options.recorded().items()},
        "model": options.model if source.commit else "local folder",
        "commit": source.commit,
        **_file_hashes(job.checkpoint),
        "--dataset": [describe_source(parse_source(text)) for text in options.dataset],
        "--device": job.plan.choices.device,
        "--dtype": job.plan.choices.dtype,
        "--student": options.student,
        **({} if options.micro_batch is None else {"--micro-batch": options.micro_batch}),
        **{f"version of {name}": version for name, version in versions().items()},
    }


def _file_hashes(checkpoint: Checkpoint) -> dict[str, str]:
    """One entry per source file: headers of shards only, whose tensors are hashed when read.

    A commit fixes all files of a Hub model, so that none is fetched for its hash.
    """
    hashes = dict(checkpoint.digests)
    if checkpoint.source.commit is None:
        hashes |= {n: file_hash(checkpoint.source.path(n)) for n in checkpoint.side_files()}
    return {f"source file {name}": digest for name, digest in sorted(hashes.items())}


def job_hash(fingerprint: dict[str, Any]) -> str:
    """xxh3 of a fingerprint: two runs with the same one make the same bytes."""
    return str(xxhash.xxh3_128_hexdigest(json.dumps(fingerprint, sort_keys=True).encode()))
