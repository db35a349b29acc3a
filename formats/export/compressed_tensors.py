"""`compressed-tensors`: the integer base in its packed format, the adapter as a PEFT folder beside.

`W = scale * (code - zero)`: `weight_packed` int32 `[out, in * bits / 32]`, `weight_scale` float16
`[out, groups]`, `weight_zero_point` int32 `[out * bits / 32, groups]`, `weight_shape` int64 `[2]`.
The runtime's codes are signed, and it adds `2**(bits - 1)` before it packs: the words hold our
codes.
Source: compressors/pack_quantized of compressed-tensors 0.20.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rilq.formats.export.adapted import AdaptedReader
from rilq.formats.export.folder import Entry, unpack_stream
from rilq.formats.export.integer import IntegerBase, bits_of, check_base, write_base
from rilq.formats.export.kind import ROUNDING, DenseReader, ExportOptions
from rilq.formats.export.source import NativeCheckpoint, NativeForm
from rilq.formats.packing import WORD, pack
from rilq.formats.shard_writer import TensorLayout
from rilq.formats.spec import QuantSpec
from rilq.progress import Reporter


def bound(options: ExportOptions) -> float:
    """Codes and scales are the same; the native's merged zero-points are rounded to 16 bits."""
    return ROUNDING[options.dtype]


def check(form: NativeForm, options: ExportOptions) -> None:
    """Real zero-points, and more than one setting of bits: transformers reads the first alone.

    Raises:
        OptionError: one of them.
    """
    check_base(form, "compressed-tensors")


def write(native: NativeCheckpoint, folder: Path, options: ExportOptions, report: Reporter) -> None:
    """Write weights, `config.json`, the adapter and the files beside them."""
    write_base(native, folder, options, report, _entries, _quantization(native))


def read(folder: Path) -> DenseReader:
    """The dense model that the packed one and its adapter stand for."""
    return _Reader(folder)


def _entries(base: IntegerBase, name: str, spec: QuantSpec) -> dict[str, Entry]:
    native = base.native
    rows, width = native.shape(name)
    words = -(-rows * spec.bits // WORD)

    def zero_point() -> Tensor:
        zero = base.zero_point(name)  # [out, groups]
        filled = torch.zeros(-(-rows // WORD) * WORD, zero.shape[1], dtype=torch.uint8)
        filled[:rows] = zero
        return pack(filled.T.contiguous(), spec.bits).T[:words].contiguous()

    return {
        f"{name}.weight_shape": Entry(
            TensorLayout(torch.int64, (2,)), lambda: torch.tensor([rows, width])
        ),
        f"{name}.weight_packed": Entry(
            TensorLayout(torch.int32, (rows, width * spec.bits // WORD)),
            lambda: native.tensor(f"{name}.weight"),
        ),
        f"{name}.weight_zero_point": Entry(
            TensorLayout(torch.int32, (words, width // spec.group_size)), zero_point
        ),
        f"{name}.weight_scale": Entry(
            TensorLayout(torch.float16, (rows, width // spec.group_size)),
            lambda: native.tensor(f"{name}.weight_scale"),
        ),
    }


def _quantization(native: NativeCheckpoint) -> dict[str, Any]:
    weights = {
        "num_bits": bits_of(native),
        "type": "int",
        "symmetric": False,
        "strategy": "group",
        "group_size": native.quantization.group_size,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head", *native.form.kept],
    }


class _Reader(AdaptedReader):
    def _dense_shapes(self) -> dict[str, tuple[int, ...]]:
        config = self.checkpoint.config["quantization_config"]
        self._bits = int(config["config_groups"]["group_0"]["weights"]["num_bits"])
        shapes = dict[str, tuple[int, ...]]()
        for name, info in self.checkpoint.tensors.items():
            module, _, part = name.rpartition(".")
            if part == "weight_packed":
                shape = self.checkpoint.read([f"{module}.weight_shape"])[f"{module}.weight_shape"]
                shapes[f"{module}.weight"] = tuple(shape.tolist())
            elif part not in ("weight_scale", "weight_zero_point", "weight_shape"):
                shapes[name] = info.shape
        return shapes

    def _packed(self, module: str) -> Tensor:
        parts = ("weight_packed", "weight_scale", "weight_zero_point")
        words, scale, zeros = self.checkpoint.read([f"{module}.{part}" for part in parts]).values()
        codes = unpack_stream(words, self._bits).float()  # [out, in]
        # A single word in each row counts as contiguous with any stride; a clone has its own.
        rows = zeros.T.clone(memory_format=torch.contiguous_format)
        zero = unpack_stream(rows, self._bits)[:, : len(codes)].T.float()
        groups = codes.view(len(codes), scale.shape[1], -1)
        return (groups - zero[..., None]).mul_(scale.float()[..., None]).flatten(1)
