"""`gptq`: the integer base as GPTQ's second format, with the adapter as a PEFT folder beside it.

`W = scale * (code - zero)`: `qweight` int32 `[in * bits / 32, out]`, `qzeros` int32
`[groups, out * bits / 32]`, `scales` float16 `[groups, out]`, `g_idx` int32 `[in]`. The second
format stores zero-points as they are; the first stores `zero - 1`, which has no code for 0.
Source: `GPTQConfig` of transformers 5.23, optimum 2.3, and `TorchLinear` of gptqmodel 7.6.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rilq.errors import OptionError
from rilq.formats.export.adapted import AdaptedReader
from rilq.formats.export.folder import Entry, unpack_stream
from rilq.formats.export.integer import IntegerBase, bits_of, check_base, write_base
from rilq.formats.export.kind import ROUNDING, DenseReader, ExportOptions
from rilq.formats.export.source import NativeCheckpoint, NativeForm
from rilq.formats.packing import WORD, pack
from rilq.formats.shard import listing
from rilq.formats.shard_writer import TensorLayout
from rilq.formats.spec import QuantSpec
from rilq.progress import Reporter


def bound(options: ExportOptions) -> float:
    """Codes and scales are the same; the native's merged zero-points are rounded to 16 bits."""
    return ROUNDING[options.dtype]


def check(form: NativeForm, options: ExportOptions) -> None:
    """Real zero-points, and more than one setting of bits.

    Raises:
        OptionError: one of them.
    """
    check_base(form, "gptq")


def write(native: NativeCheckpoint, folder: Path, options: ExportOptions, report: Reporter) -> None:
    """Write weights, `config.json`, the adapter and the files beside them."""
    _check_outputs(native)
    write_base(native, folder, options, report, _entries, _quantization(native))


def read(folder: Path) -> DenseReader:
    """The dense model that the packed one and its adapter stand for."""
    return _Reader(folder)


def _check_outputs(native: NativeCheckpoint) -> None:
    """Zero-points are packed along the outputs, and must fill whole words.

    Raises:
        OptionError: a linear's do not.
    """
    ragged = [
        name
        for name, spec in native.form.linears.items()
        if native.shape(name)[0] * spec.bits % WORD
    ]
    if ragged:
        raise OptionError(
            f"{native.form.label}: out_features times bits is not a multiple of {WORD}, as --to "
            f"gptq needs it, in {listing(ragged, 3)}\n"
            "  export --to compressed-tensors or --to dense"
        )


def _entries(base: IntegerBase, name: str, spec: QuantSpec) -> dict[str, Entry]:
    native = base.native
    rows, width = native.shape(name)
    groups = width // spec.group_size

    def scales() -> Tensor:
        return native.tensor(f"{name}.weight_scale").T.contiguous()

    return {
        # Native words are packed along the input too: the transpose is all that differs.
        f"{name}.qweight": Entry(
            TensorLayout(torch.int32, (width * spec.bits // WORD, rows)),
            lambda: native.tensor(f"{name}.weight").T.contiguous(),
        ),
        f"{name}.qzeros": Entry(
            TensorLayout(torch.int32, (groups, rows * spec.bits // WORD)),
            lambda: pack(base.zero_point(name).T.contiguous(), spec.bits),
        ),
        f"{name}.g_idx": Entry(
            TensorLayout(torch.int32, (width,)),
            lambda: torch.arange(width, dtype=torch.int32) // spec.group_size,
        ),
        f"{name}.scales": Entry(TensorLayout(torch.float16, (groups, rows)), scales),
    }


def _quantization(native: NativeCheckpoint) -> dict[str, Any]:
    """`quantization_config`; without what only a quantization run would read."""
    form = native.form
    quantization = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2",
        "bits": bits_of(native),
        "group_size": native.quantization.group_size,
        "desc_act": False,
        "sym": False,
        "lm_head": False,
    }
    if form.kept:  # else all linears of the decoder layers are taken to be packed
        quantization["modules_in_block_to_quantize"] = [list(form.linears)]
        quantization["dynamic"] = {f"-:{name}": {} for name in form.kept}
    return quantization


class _Reader(AdaptedReader):
    def _dense_shapes(self) -> dict[str, tuple[int, ...]]:
        config = self.checkpoint.config["quantization_config"]
        self._bits = int(config["bits"])
        shapes = dict[str, tuple[int, ...]]()
        for name, info in self.checkpoint.tensors.items():
            module, _, part = name.rpartition(".")
            if part == "g_idx":
                rows = self.checkpoint.tensors[f"{module}.scales"].shape[1]
                shapes[f"{module}.weight"] = (rows, info.shape[0])
            elif part not in ("qweight", "qzeros", "scales"):
                shapes[name] = info.shape
        return shapes

    def _packed(self, module: str) -> Tensor:
        parts = ("qweight", "qzeros", "scales", "g_idx")
        words, zeros, scales, group = self.checkpoint.read(
            [f"{module}.{part}" for part in parts]
        ).values()
        codes = unpack_stream(words.T.contiguous(), self._bits)  # [out, in]
        zero = unpack_stream(zeros, self._bits).float()  # [groups, out]
        value = codes.float() - zero[group.long()].T
        return value * scales.float()[group.long()].T
