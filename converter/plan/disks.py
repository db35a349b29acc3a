"""Disk space that a conversion takes at most, volume by volume."""

from __future__ import annotations

from pathlib import Path

import torch

from rilq.converter.layers import StreamedModel
from rilq.converter.machine import volume_of
from rilq.converter.options import ConvertOptions
from rilq.converter.plan.linears import LinearPlan
from rilq.converter.plan.plan import Disk
from rilq.converter.plan.sizes import Sizes
from rilq.formats.checkpoint import Checkpoint

WORK, OUTPUT, DOWNLOADS = "the work folder", "the output", "downloads"  # what a volume holds
TOKEN = torch.int64.itemsize  # of a calibration row
RECORD = 4 << 10  # of a linear, in the journal and in the headers of files, or in the manifest


def disks_needed(
    options: ConvertOptions, streamed: StreamedModel, work: tuple[int, int], output: int
) -> tuple[Disk, ...]:
    """Bytes per volume; folders on one volume are added up.

    Args:
        work: as of `work_bytes`.
        output: as of `folder_bytes`; they take the place of what the work folder has given up by
            then.
    """
    needs: dict[int, Disk] = {}
    fullest, writing = work
    shared = volume_of(options.work).device == volume_of(options.output).device
    wanted: list[tuple[Path, str, int]] = [
        (options.work, WORK, fullest),
        (options.output, OUTPUT, max(0, writing + output - fullest) if shared else output),
    ]
    checkpoint = streamed.checkpoint
    steps = [checkpoint.shards_of(names) for names in streamed.reading_steps()]
    missing = checkpoint.source.to_fetch([*steps, checkpoint.side_files()])
    wanted += [(folder, DOWNLOADS, count) for folder, count in missing.items()]
    for path, holds, needed in wanted:
        volume = volume_of(path)
        known = needs.get(volume.device)
        parts = (*(known.parts if known is not None else ()), (holds, needed))
        needs[volume.device] = Disk(
            str(volume.path),
            " and ".join(name for name, _ in parts),
            sum(size for _, size in parts),
            volume.free,
            parts,
        )
    return tuple(needs.values())


def work_bytes(sizes: Sizes, item: int, options: ConvertOptions, linears: int) -> tuple[int, int]:
    """Bytes of the work folder at its fullest, and while the output is written.

    Layers and outer tensors are there all the time: of embedding and head that are quantized,
    both the source's and the output's; of linears all alternatives. To them come, in the pass,
    four sets of states; in training, the targets and two training states; while the output is
    written, the targets, the last training state and the best values.
    """
    kept = sizes.output_bytes + (sizes.outer_bytes if sizes.outer_packed else 0)
    kept += round(sizes.alternative_bytes * sizes.quantized_weights)
    kept += TOKEN * sizes.rows * sizes.seqlen + RECORD * linears
    states, values = sizes.states_bytes(item), 4 * sizes.trained_values
    if options.adapter_init != "zero":
        kept += values
    if options.trains == "none":
        return kept + 4 * states, kept + 2 * states
    training = states + 2 * 4 * values
    return kept + max(4 * states, training), kept + states + 5 * values


def folder_bytes(checkpoint: Checkpoint, tensors: int, linears: int) -> int:
    """Bytes of the output folder: `tensors`, the manifest, tokenizer and licence as they are."""
    files = checkpoint.source.files()
    return tensors + RECORD * linears + sum(files[name] for name in checkpoint.side_files())


def beside_bytes(sizes: Sizes, quantized: tuple[LinearPlan, ...], options: ConvertOptions) -> int:
    """What lies beside the checkpoint: a plain LoRA, or an integer base with its adapter."""
    if options.adapter == "lora":
        return 4 * sizes.trained_values
    if not options.keep_adapter:
        return 0
    grids = sum(p.out_features * (p.in_features // options.group_size) for p in quantized)
    return grids + sum(4 * options.rank * (p.out_features + p.in_features) for p in quantized)
