"""What formats with integer zero-points take: a base whose zero-points are codes, and an adapter.

The base is that of a conversion with `--zero-point integer`. Where its adapter was merged, and kept
with `--keep-adapter`, both are in the folder `integer-base`; where it was not merged, or there is
none, the native checkpoint is the base itself. Merged zero-points are never rounded: that would
delete what is merged in them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rilq.errors import CheckpointError, OptionError
from rilq.formats.export.folder import (
    Entry,
    copy_companions,
    dense_entry,
    entries,
    write_weights,
)
from rilq.formats.export.kind import ExportOptions
from rilq.formats.export.source import NativeCheckpoint, NativeForm
from rilq.formats.integer_base import INTEGER_FOLDER, ZERO_POINTS_NAME, zero_point_name
from rilq.formats.lora import ADAPTER_FOLDER
from rilq.formats.peft_folder import CONFIG_NAME, WEIGHTS_NAME
from rilq.formats.shard import ShardHeader, listing, read_header, read_tensors
from rilq.formats.spec import QuantSpec
from rilq.formats.verify import MANIFEST_NAME, file_hash
from rilq.formats.writer import copy_side_files, write_config
from rilq.progress import Reporter

_REMEDY = (
    "convert with --zero-point integer --keep-adapter, which keeps what this format needs beside "
    "the merged result; or export --to dense"
)


def check_base(form: NativeForm, kind: str) -> None:
    """Refuse a checkpoint without integer zero-points, or with more than one setting of bits.

    Raises:
        OptionError: the message names the options that make a base.
    """
    if form.recipe.get("zero_point") != "integer" or not (
        form.recipe.get("keep_adapter") or _unmerged(form.recipe)
    ):
        raise OptionError(
            f"{form.label}: its zero-points are real numbers, and those of --to {kind} are "
            f"integers; to round them would delete what was trained\n  {_REMEDY}"
        )
    bits = {spec.bits for spec in form.linears.values()}
    if len(bits) > 1:
        most = [name for name, spec in form.linears.items() if spec.bits == max(bits)]
        raise OptionError(
            f"{form.label}: linears have different bits, and --to {kind} has one setting for the "
            f"whole model: {max(bits)} bits in {listing(most, 3)}\n"
            "  export --to dense, or convert without --bits-for and --avg-bits"
        )


def bits_of(native: NativeCheckpoint) -> int:
    """Of all its linears; see `check_base`."""
    return next((s.bits for s in native.form.linears.values()), native.quantization.bits)


def write_base(
    native: NativeCheckpoint,
    folder: Path,
    options: ExportOptions,
    report: Reporter,
    packing: Callable[["IntegerBase", str, QuantSpec], Mapping[str, Entry]],
    quantization: Mapping[str, Any],
) -> None:
    """Write the base, `config.json`, the adapter and the files beside them.

    Args:
        packing: gives the tensors of a decoder linear; embedding and head are dequantized.
        quantization: `quantization_config`.
    """
    base, dtype = IntegerBase.open(native), options.dtype

    def packed(name: str, spec: QuantSpec) -> Mapping[str, Entry]:
        if name in native.form.linears:
            return packing(base, name, spec)
        return dense_entry(native, name, dtype)

    write_weights(folder, entries(native, dtype, packed), options.max_shard_size, report)
    write_config(folder, native.form.config, quantization, dtype)
    copy_companions(native, folder)
    base.copy_adapter(folder)


def _unmerged(recipe: Mapping[str, Any]) -> bool:
    """Whether training left the stored zero-points alone."""
    return recipe.get("adapter") == "lora" or recipe.get("train") in ("none", "scales")


@dataclass(frozen=True)
class IntegerBase:
    """Zero-points and adapter of an integer base; codes and scales are the native checkpoint's.

    Attributes:
        native: the checkpoint that it lies in.
        stored: header of the file of zero-points; None where they are the checkpoint's own.
    """

    native: NativeCheckpoint
    stored: ShardHeader | None

    @classmethod
    def open(cls, native: NativeCheckpoint) -> "IntegerBase":
        """Compare its files with their checksums in `rilq.json`.

        Raises:
            CheckpointError: one is missing or damaged.
        """
        kept = bool(native.form.recipe.get("keep_adapter"))
        base = cls(native, None)
        names = [*base._adapter_files()]
        if kept:
            names.append(f"{INTEGER_FOLDER}/{ZERO_POINTS_NAME}")
        for name in names:
            _check_file(native, name)
        if not kept:
            return base
        header = read_header(native.folder / INTEGER_FOLDER / ZERO_POINTS_NAME)
        missing = [n for n in native.form.linears if zero_point_name(n) not in header.tensors]
        if missing:
            raise CheckpointError(
                f"{native.folder / INTEGER_FOLDER / ZERO_POINTS_NAME}: no zero-points of "
                f"{listing(missing)}\n  the checkpoint is damaged; copy it again"
            )
        return cls(native, header)

    def zero_point(self, linear: str) -> Tensor:
        """Zero-points of a decoder linear, `[out_features, groups]` uint8 in `0 .. 2**bits - 1`.

        Raises:
            CheckpointError: they are something else.
        """
        if self.stored is None:
            found = self.native.tensor(f"{linear}.zero_point")
        else:
            path = self.native.folder / INTEGER_FOLDER / ZERO_POINTS_NAME
            name = zero_point_name(linear)
            found = read_tensors(path, self.stored, [name])[name]
        whole = found.to(torch.uint8)
        if not torch.equal(whole.to(found.dtype), found) or not self._in_range(linear, whole):
            raise CheckpointError(
                f"{self.native.form.label}: {linear}: its zero-points are not integers in the "
                f"range of its codes, and rounding would change the model\n  {_REMEDY}"
            )
        return whole

    def _in_range(self, linear: str, zero_point: Tensor) -> bool:
        scale = self.native.checkpoint.tensors[f"{linear}.weight_scale"]
        most = self.native.form.linears[linear].max_code
        return tuple(zero_point.shape) == scale.shape and int(zero_point.max()) <= most

    def copy_adapter(self, folder: Path) -> None:
        """Copy the adapter, if there is one, to `folder/adapter`, for stock PEFT."""
        copy_side_files(
            {
                f"{ADAPTER_FOLDER}/{Path(name).name}": self.native.folder / name
                for name in self._adapter_files()
            },
            folder,
        )

    def _adapter_files(self) -> list[str]:
        """Names in the native folder."""
        recipe = self.native.form.recipe
        place = f"{INTEGER_FOLDER}/{ADAPTER_FOLDER}" if recipe.get("keep_adapter") else ""
        if not place and self.native.adapter is not None:
            place = ADAPTER_FOLDER
        return [f"{place}/{name}" for name in (CONFIG_NAME, WEIGHTS_NAME)] if place else []


def _check_file(native: NativeCheckpoint, name: str) -> None:
    path, listed = native.folder / name, native.manifest["files"].get(name)
    if not path.is_file() or listed is None or file_hash(path) != listed["xxh3"]:
        raise CheckpointError(
            f"{path}: missing, or not what {MANIFEST_NAME} says\n"
            "  the checkpoint is damaged; copy it again, or convert the model again"
        )
