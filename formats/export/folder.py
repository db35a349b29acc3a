"""Exports that are checkpoint folders: tensors into shards, and dense weights back from them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rilq.errors import NonFiniteError
from rilq.formats.checkpoint import SOURCE_DTYPES, Checkpoint
from rilq.formats.export.source import NativeCheckpoint
from rilq.formats.packed_linear import row_chunks
from rilq.formats.shard_writer import TensorLayout, write_shard
from rilq.formats.source import LocalFolder
from rilq.formats.spec import QuantSpec
from rilq.formats.writer import copy_side_files, plan_shards, shard_names, write_index
from rilq.progress import Reporter

_PACKED = ("weight", "weight_scale", "zero_point")  # a quantized module's tensors in the native


@dataclass(frozen=True)
class Entry:
    """A tensor of an export: what it looks like, and how it is made when its turn comes."""

    layout: TensorLayout
    make: Callable[[], Tensor]


Packing = Callable[[str, QuantSpec], Mapping[str, Entry]]


def entries(native: NativeCheckpoint, dtype: torch.dtype, packing: Packing) -> dict[str, Entry]:
    """Every tensor of an export, in the order of the native checkpoint.

    Args:
        dtype: of what is not quantized; it is cast.
        packing: gives the tensors of a quantized module, by their full names.
    """
    specs, found = native.specs, dict[str, Entry]()
    for name in native.checkpoint.tensors:
        module, _, part = name.rpartition(".")
        if module not in specs or part not in _PACKED:
            found[name] = cast_entry(native, name, dtype)
        elif part == "weight":
            found |= packing(module, specs[module])
    return found


def dense_entry(native: NativeCheckpoint, module: str, dtype: torch.dtype) -> dict[str, Entry]:
    """A quantized module's weight, dequantized."""
    name = f"{module}.weight"

    def make() -> Tensor:
        return _finite(name, native.dense_weight(module, dtype))

    return {name: Entry(TensorLayout(dtype, native.shape(module)), make)}


def cast_entry(native: NativeCheckpoint, name: str, dtype: torch.dtype) -> Entry:
    """A tensor of the native checkpoint in another dtype."""
    layout = TensorLayout(dtype, native.checkpoint.tensors[name].shape)
    return Entry(layout, lambda: cast(name, native.tensor(name), dtype))


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in another dtype.

    Raises:
        NonFiniteError: a value is too large for it.
    """
    return _finite(name, tensor.to(dtype))


def _finite(name: str, tensor: Tensor) -> Tensor:
    if not all(torch.isfinite(bound) for bound in torch.aminmax(tensor)):
        raise NonFiniteError(
            f"{name}: holds values that are too large for "
            f"{str(tensor.dtype).removeprefix('torch.')}\n  export with --dtype bf16"
        )
    return tensor


def write_weights(
    folder: Path, found: Mapping[str, Entry], max_shard_size: int, report: Reporter
) -> None:
    """Durably write tensors into shards, with their index; one tensor at a time in memory.

    Raises:
        OutputError: the volume is full.
    """
    shards = plan_shards({n: entry.layout.nbytes for n, entry in found.items()}, max_shard_size)
    names = shard_names(len(shards))
    report.stage("write", len(shards), "shard")
    for count, (shard, members) in enumerate(zip(names, shards, strict=True), start=1):
        # The widest first, so that each tensor begins at a multiple of its element size.
        members.sort(key=lambda name: -found[name].layout.dtype.itemsize)
        layout = {name: found[name].layout for name in members}
        write_shard(folder / shard, layout, lambda name: found[name].make())
        report.step(count)
    if len(shards) > 1:
        weight_map = {n: shard for shard, ms in zip(names, shards, strict=True) for n in ms}
        write_index(folder, weight_map, sum(entry.layout.nbytes for entry in found.values()))


def copy_companions(native: NativeCheckpoint, folder: Path) -> None:
    """Copy tokenizer, chat template, generation config and licence, as they are."""
    source = native.checkpoint.source
    names = [name for name in native.checkpoint.side_files() if name != "config.json"]
    copy_side_files({name: source.path(name) for name in names}, folder)


class FolderReader:
    """The dense model in an export folder in safetensors, nothing in which is packed."""

    def __init__(self, folder: Path) -> None:
        self.checkpoint = Checkpoint.open(
            LocalFolder(folder), dtypes=SOURCE_DTYPES | {torch.int32, torch.int64, torch.uint32}
        )
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: info.shape for name, info in self.checkpoint.tensors.items()
        }

    def read(self, name: str) -> Tensor:
        """One tensor in float32."""
        return self.checkpoint.read([name])[name].float()


class PackedReader(FolderReader):
    """The dense model that an export folder with packed modules stands for.

    Args:
        folder: the export; it holds packed codes as a little-endian bit stream along the input.
        scale, offset: what a packed module's tensors beside `weight` are called.
        bits_of: a packed module's bits, as config.json gives them to the runtime.
        combine: codes `[rows, groups, group_size]`, scale and offset `[rows, groups, 1]`, all
            float32, to weights of the codes' shape.
    """

    def __init__(
        self,
        folder: Path,
        scale: str,
        offset: str,
        bits_of: Callable[[str], int],
        combine: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> None:
        super().__init__(folder)
        self._scale, self._offset, self._combine = scale, offset, combine
        stored = self.shapes
        self._bits = {
            module: bits_of(module)
            for module, _, part in (name.rpartition(".") for name in stored)
            if part == scale
        }
        shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in stored.items():
            module, _, part = name.rpartition(".")
            if module in self._bits and part == "weight":
                shapes[name] = (shape[0], shape[1] * 32 // self._bits[module])
            elif module not in self._bits or part not in (scale, offset):
                shapes[name] = shape
        self.shapes = shapes

    def read(self, name: str) -> Tensor:
        """One tensor in float32, dequantized if it is packed."""
        module, _, part = name.rpartition(".")
        if module not in self._bits or part != "weight":
            return super().read(name)
        keys = [name, f"{module}.{self._scale}", f"{module}.{self._offset}"]
        words, scale, offset = self.checkpoint.read(keys).values()
        weight = torch.empty(self.shapes[name], dtype=torch.float32)
        for rows in row_chunks(*weight.shape):
            codes = unpack_stream(words[rows], self._bits[module])
            groups = codes.reshape(len(codes), scale.shape[1], -1).float()
            s, o = (part[rows].float()[..., None] for part in (scale, offset))
            weight[rows] = self._combine(groups, s, o).reshape_as(codes)
        return weight


def unpack_stream(words: Tensor, bits: int) -> Tensor:
    """Codes of a little-endian bit stream, bit by bit: slow, and obviously right.

    Args:
        words: `[rows, n]` int32 or uint32.
        bits: up to 8.

    Returns:
        `[rows, n * 32 / bits]` uint8.
    """
    stream = words.contiguous().view(torch.uint8).numpy()  # [rows, n * 4]
    single = np.unpackbits(stream, axis=1, bitorder="little").reshape(len(words), -1, bits)
    return torch.from_numpy(np.packbits(single, axis=-1, bitorder="little")[..., 0])
