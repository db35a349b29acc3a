"""`vllm`: the native tensors under the names of vLLM's `humming` method.

`W = scale * (code - zero_point)` with real zero-points, in the model's dtype. vLLM fuses q, k, v
and gate, up into one linear each, whose parts must be quantized alike; it packs linears of the
decoder only, so embedding and head are dequantized.
Source: vLLM's model_executor/layers/quantization/humming.py, and `HummingWeightSchema` of
humming-kernels 0.1.19.
"""

import json
import re
from pathlib import Path

import torch
from torch import Tensor

from rilq.errors import OptionError
from rilq.formats.export.affine import refuse_lora
from rilq.formats.export.folder import (
    Entry,
    PackedReader,
    cast_entry,
    copy_companions,
    dense_entry,
    entries,
    write_weights,
)
from rilq.formats.export.kind import ROUNDING, DenseReader, ExportOptions
from rilq.formats.export.source import NativeCheckpoint, NativeForm
from rilq.formats.shard import listing
from rilq.formats.shard_writer import TensorLayout
from rilq.formats.spec import QuantSpec
from rilq.formats.writer import write_config
from rilq.progress import Reporter

# What vLLM makes one linear of, in every architecture that we convert.
_FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
_NO_FLOAT16 = ("gemma2", "gemma3_text")  # which vLLM refuses to run in float16


def bound(options: ExportOptions) -> float:
    """In float16 the packed tensors are the native's own; what is not packed is rounded."""
    return ROUNDING[options.dtype]


def check(form: NativeForm, options: ExportOptions) -> None:
    """Parts of a fused linear that differ, float16 for Gemma, an unmerged adapter.

    Raises:
        OptionError: one of them.
    """
    refuse_lora(form, "vllm")
    if form.model_type in _NO_FLOAT16 and options.dtype == torch.float16:
        raise OptionError(
            f"{form.label}: vLLM does not run {form.model_type} in float16\n"
            "  export --to vllm with --dtype bf16"
        )
    bits: dict[str, set[int | None]] = {}
    for name in (*form.linears, *form.kept):
        spec = form.linears.get(name)
        bits.setdefault(_fused(name), set()).add(spec.bits if spec else None)
    if mixed := [name for name, found in bits.items() if len(found) > 1]:
        raise OptionError(
            f"{form.label}: vLLM makes one linear of several that are not quantized alike: "
            f"{listing(mixed, 3)}\n"
            "  export --to mlx or --to dense, or convert with the same bits for q, k and v, and "
            "for gate and up (--bits-for, --skip; not --avg-bits)"
        )


def write(native: NativeCheckpoint, folder: Path, options: ExportOptions, report: Reporter) -> None:
    """Write weights, `config.json` and the files beside them."""
    form, dtype = native.form, options.dtype

    def packing(name: str, spec: QuantSpec) -> dict[str, Entry]:
        if name not in form.linears:
            return dense_entry(native, name, dtype)
        words = f"{name}.weight"
        info = native.checkpoint.tensors[words]
        return {
            words: Entry(TensorLayout(info.dtype, info.shape), lambda: native.tensor(words)),
            **{
                key: cast_entry(native, key, dtype)
                for key in (f"{name}.weight_scale", f"{name}.zero_point")
            },
        }

    write_weights(folder, entries(native, dtype, packing), options.max_shard_size, report)
    bits = native.quantization.bits
    quantization = {
        "quant_method": "humming",
        "b_dtype": f"uint{bits}",
        "weight_scale_group_size": native.quantization.group_size,
        "has_zero_point": True,
        "is_fp_zero_point": True,
        "ignore": ["lm_head", *dict.fromkeys(map(_fused, form.kept))],
        "dynamic": {
            f"+:{re.escape(name)}$": {"b_dtype": f"uint{spec.bits}"}
            for name, spec in ((_fused(n), s) for n, s in form.linears.items())
            if spec.bits != bits
        },
    }
    write_config(folder, form.config, quantization, dtype)
    copy_companions(native, folder)


def read(folder: Path) -> DenseReader:
    """The dense model that the packed one stands for."""
    config = json.loads((folder / "config.json").read_bytes())["quantization_config"]

    def bits_of(module: str) -> int:
        own = [
            entry["b_dtype"]
            for pattern, entry in config["dynamic"].items()
            if re.match(pattern.removeprefix("+:"), _fused(module))
        ]
        return int((own or [config["b_dtype"]])[0].removeprefix("uint"))

    return PackedReader(folder, "weight_scale", "zero_point", bits_of, _dequantized)


def _dequantized(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return scale * (codes - zero_point)


def _fused(name: str) -> str:
    """vLLM's name of the linear that a linear becomes a part of; else its own."""
    parent, _, leaf = name.rpartition(".")
    return f"{parent}.{_FUSED.get(leaf, leaf)}"
