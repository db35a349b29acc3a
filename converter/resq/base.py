"""What ResQ makes before its second pass: bases, the rotated checkpoint, and its quantizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rilq.converter.fewer_rows import RowsAtOnce
from rilq.converter.hadamard import hadamard_factors
from rilq.converter.layers import StreamedModel
from rilq.converter.ranks import ALONE, Ranks
from rilq.converter.resq.basis import (
    Bases,
    Covariances,
    Sizes,
    hadamard_bases,
    identity_bases,
    permuted_bases,
    resq_bases,
)
from rilq.converter.resq.covariances import CovariancePass
from rilq.converter.resq.layer import ResqLayers
from rilq.converter.resq.options import ResqOptions
from rilq.converter.resq.rotated import ResqCheckpoint, resq_sizes
from rilq.converter.resq.sizes import quantization
from rilq.converter.workdir import WorkDir
from rilq.formats.checkpoint import Checkpoint
from rilq.formats.resq.config import ResqConfig
from rilq.formats.resq.parts import Parts
from rilq.formats.verify import file_hash
from rilq.progress import Reporter

BASES = "bases"  # stage of the work folder, and its file


@dataclass(frozen=True)
class ResqBase:
    """What the second pass streams.

    Attributes:
        checkpoint, streamed: rotated, with the function of the source.
        layers: quantizes its decoder layers.
    """

    checkpoint: Checkpoint
    streamed: StreamedModel
    layers: ResqLayers


def planned_checkpoint(source: Checkpoint, streamed: StreamedModel) -> Checkpoint:
    """The source as the second pass will see it, to plan with: it can be asked, but not read.

    Raises:
        UnsupportedArchitectureError: one that ResQ is not for.
    """
    sizes = resq_sizes(streamed.config)
    heads = (sizes.layers, sizes.kv_heads, sizes.head_dim, sizes.head_dim)
    empty = (
        torch.empty(shape, device="meta")
        for shape in ((sizes.hidden, sizes.hidden), heads, (heads[0], *heads[2:]))
    )
    return ResqCheckpoint(source, Bases(*empty))


def resq_config(
    options: ResqOptions, intermediate: int, recipe: Mapping[str, Any] | None = None
) -> ResqConfig:
    """`quantization_config` of the output.

    Args:
        intermediate: width of the input of down_proj.
    """
    config = quantization(options, tuple(map(len, _factors(options, intermediate))))
    config.recipe = dict(recipe or {})
    return config


def _factors(options: ResqOptions, intermediate: int) -> tuple[Tensor, ...]:
    """Of U_D, float64: Hadamard matrices over their root, and an orthogonal rest; or none."""
    if "D" not in options.rotations:
        return ()
    return hadamard_factors(intermediate, torch.Generator().manual_seed(0))


def make_base(
    source: Checkpoint,
    streamed: StreamedModel,
    tokens: Tensor,
    work: WorkDir,
    options: ResqOptions,
    *,
    seed: int,
    rows: RowsAtOnce,
    report: Reporter,
    ranks: Ranks = ALONE,
) -> ResqBase:
    """The bases, found by the first pass unless that is done, and what follows from them.

    Args:
        source, streamed: the full-precision model; nothing of it is loaded afterwards.
        tokens: calibration rows `[rows, seq_len]` int64.
        seed: of what is random in the bases.
        rows: that run at once.
        ranks: this process among those that share the rows.
    """
    sizes = resq_sizes(streamed.config)
    path = work.file(f"{BASES}.safetensors")
    if not work.stage(BASES):
        found: Covariances | None = None
        if options.needs_covariances:
            found = CovariancePass(source, streamed, tokens, work, rows, report, ranks).run()
        ranks.once(lambda: _bases(options, sizes, found, seed).save(path))
        work.commit(BASES, BASES, {}, files={path: file_hash(path)})
    bases = Bases.load(path)
    checkpoint = ResqCheckpoint(source, bases)
    rotated = StreamedModel(checkpoint, dtype=streamed.dtype, device=streamed.device)
    intermediate = streamed.config.intermediate_size
    layers = ResqLayers(
        rotated,
        resq_config(options, intermediate),
        bases.keys if "C" in options.rotations else None,
        _factors(options, intermediate),
        options.quantizer,
        report,
    )
    return ResqBase(checkpoint, rotated, layers)


def _bases(options: ResqOptions, sizes: Sizes, found: Covariances | None, seed: int) -> Bases:
    if found is not None and options.method == "resq":
        hidden, head = (Parts.of(n, *options.parts) for n in (sizes.hidden, sizes.head_dim))
        return resq_bases(found, hidden, head, seed).only(options.rotations)
    if found is not None:
        return permuted_bases(found)
    if options.method == "quarot":
        return hadamard_bases(sizes, seed).only(options.rotations)
    return identity_bases(sizes)
