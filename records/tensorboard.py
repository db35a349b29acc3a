"""A run as TensorBoard's event files: losses, figures, layers, memory and disk."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rilq.errors import OptionError, OutputError, one_line
from rilq.records.run import Run


def write_events(run: Run, folder: Path) -> Path:
    """Write `folder/run-<number>`, which appears whole or not at all.

    Raises:
        OptionError: the package tensorboard is missing.
        OutputError: it is there already, or cannot be written.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as err:
        raise OptionError(
            f"--tensorboard: the package tensorboard cannot be imported: {one_line(err)}\n"
            "  pip install 'rilq[tensorboard]'"
        ) from err
    place = folder / f"run-{run.id}"
    if place.exists():
        raise OutputError(f"{place}: is there already\n  delete it, or choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=folder))
        try:
            writer = SummaryWriter(str(staging))
            for name, step, value, at in _scalars(run):
                writer.add_scalar(name, value, step, walltime=run.started + at)
            text = json.dumps({"recipe": run.recipe, "options": run.options}, indent=2)
            writer.add_text("recipe", f"```\n{text}\n```", walltime=run.started)
            writer.close()
            staging.chmod(0o755)
            staging.rename(place)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    except OSError as err:
        raise OutputError(
            f"{place}: cannot be written: {err.strerror or err}\n  choose another folder"
        ) from err
    return place


def _scalars(run: Run) -> Iterator[tuple[str, int, float, float]]:
    """Name, step, value, and seconds since the run's start."""
    for point in run.losses:
        yield f"loss/{point.kind}/{point.term}", point.step, point.value, run.seconds
    for name, value in run.figures.items():
        yield f"figures/{name}", 0, value, run.seconds
    for layer in run.layers:
        yield "layers/error", layer.index, layer.error, run.seconds
        if layer.bits is not None:
            yield "layers/bits", layer.index, layer.bits, run.seconds
    for sample in run.samples:
        seconds = round(sample.at)
        yield "machine/host_bytes", seconds, sample.host_bytes, sample.at
        yield "machine/disk_free_bytes", seconds, sample.disk_free_bytes, sample.at
        if sample.device_bytes is not None:
            yield "machine/device_bytes", seconds, sample.device_bytes, sample.at
