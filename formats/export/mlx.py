"""`mlx`: for mlx-lm, with bits of each module in `config.json`.

Tensors `X.weight` uint32, `X.scales`, `X.biases`; `quantization` in `config.json` with group size
and bits, and those of each module that has others. Embedding and head may be packed too.
Source: mlx_lm/utils.py (`load_model`) and mlx_lm/models/*.py of mlx-lm 0.32.2.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rilq.errors import OptionError
from rilq.formats.export.affine import affine, affine_entries, refuse_lora
from rilq.formats.export.folder import PackedReader, copy_companions, entries, write_weights
from rilq.formats.export.kind import ROUNDING, DenseReader, ExportOptions
from rilq.formats.export.source import NativeCheckpoint, NativeForm
from rilq.formats.writer import write_config
from rilq.progress import Reporter

# Architectures whose sliding windows mlx-lm does not apply: it attends to every earlier token.
_FULL_ATTENTION = ("mistral", "qwen2", "qwen3", "gemma2", "phi3")


def bound(options: ExportOptions) -> float:
    """Codes are the same; scales, minima and what is not packed are rounded to 16 bits."""
    return ROUNDING[options.dtype]


def check(form: NativeForm, options: ExportOptions) -> None:
    """An unmerged adapter, and layer types that mlx-lm's Gemma 3 cannot express.

    Raises:
        OptionError: one of them.
    """
    refuse_lora(form, "mlx")
    mlx_config(form)


def write(native: NativeCheckpoint, folder: Path, options: ExportOptions, report: Reporter) -> None:
    """Write weights, `config.json` and the files beside them."""
    found = entries(
        native,
        options.dtype,
        lambda name, spec: affine_entries(native, name, spec, options.dtype, "biases"),
    )
    write_weights(folder, found, options.max_shard_size, report)
    config = mlx_config(native.form)
    window = config.get("sliding_window")
    if window and native.form.model_type in _FULL_ATTENTION:
        report.warn(
            f"mlx-lm ignores this model's sliding window: beyond {window} tokens it predicts "
            "something else than the model was trained for"
        )
    write_config(folder, config | {"quantization": _quantization(native)}, None, options.dtype)
    copy_companions(native, folder)


def read(folder: Path) -> DenseReader:
    """The dense model that the packed one stands for."""
    table = json.loads((folder / "config.json").read_bytes())["quantization"]
    return PackedReader(
        folder, "scales", "biases", lambda name: int(table.get(name, table)["bits"]), affine
    )


def _quantization(native: NativeCheckpoint) -> dict[str, Any]:
    """What mlx-lm is told: the decoder's bits, and those of every module with others."""
    bits, group_size = native.quantization.bits, native.quantization.group_size
    others = {
        name: {"group_size": group_size, "bits": spec.bits, "mode": "affine"}
        for name, spec in native.specs.items()
        if spec.bits != bits
    }
    return {"group_size": group_size, "bits": bits, "mode": "affine", **others}


def mlx_config(form: NativeForm) -> dict[str, Any]:
    """The configuration with everything spelled out, by the names that mlx-lm reads.

    transformers leaves out what is its own default, and mlx-lm has other defaults; and it keeps
    rotary settings under `rope_parameters`, of which mlx-lm knows the older names only.

    Raises:
        OptionError: Gemma 3 whose full attention is not in every n-th layer.
    """
    spelled_out = CONFIG_MAPPING[form.model_type].from_dict(dict(form.config)).to_dict()
    of_any_model = PretrainedConfig().to_dict()
    full = {**form.config, **{k: v for k, v in spelled_out.items() if k not in of_any_model}}
    rope = full.get("rope_parameters") or {}
    if "full_attention" in rope:
        full |= _older_rope(rope["full_attention"])
        full["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        full["sliding_window_pattern"] = _pattern(form, full["layer_types"])
    elif rope:
        full |= _older_rope(rope)
    return full


def _older_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    kind = rope.get("rope_type", "default")
    scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
    older = {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if kind == "default" else {"type": kind, **scaling},
    }
    if "partial_rotary_factor" in rope:
        older["partial_rotary_factor"] = rope["partial_rotary_factor"]
    return older


def _pattern(form: NativeForm, layer_types: list[str]) -> int:
    """n, where every n-th layer and no other has full attention."""
    full = [index for index, kind in enumerate(layer_types) if kind == "full_attention"]
    step = full[0] + 1 if full else 0
    if not full or full != list(range(step - 1, len(layer_types), step)):
        raise OptionError(
            f"{form.label}: layer_types in config.json have full attention in the layers "
            f"{full or 'none'}, but mlx-lm has it in every n-th layer only\n"
            "  export --to dense"
        )
    return step
