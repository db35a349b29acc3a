"""`dense`: an ordinary 16-bit checkpoint with everything merged, a plain LoRA too."""

from pathlib import Path

from rilq.formats.export.folder import (
    FolderReader,
    copy_companions,
    dense_entry,
    entries,
    write_weights,
)
from rilq.formats.export.kind import ROUNDING, DenseReader, ExportOptions
from rilq.formats.export.source import NativeCheckpoint, NativeForm
from rilq.formats.writer import write_config
from rilq.progress import Reporter


def bound(options: ExportOptions) -> float:
    """Every weight is rounded to 16 bits."""
    return ROUNDING[options.dtype]


def check(form: NativeForm, options: ExportOptions) -> None:
    """Nothing: a dense checkpoint holds whatever a native one stands for."""


def write(native: NativeCheckpoint, folder: Path, options: ExportOptions, report: Reporter) -> None:
    """Write weights, `config.json` and the files beside them."""
    found = entries(native, options.dtype, lambda name, _: dense_entry(native, name, options.dtype))
    write_weights(folder, found, options.max_shard_size, report)
    write_config(folder, native.form.config, None, options.dtype)
    copy_companions(native, folder)


def read(folder: Path) -> DenseReader:
    """The weights as they are."""
    return FolderReader(folder)
