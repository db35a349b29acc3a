"""Checkpoints in block-wise FP8, made as their publishers make them, with their dense twins."""

import json
import shutil
from math import ceil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FP8 = torch.float8_e4m3fn


def in_fp8(source: Path, to: Path, block: tuple[int, int]) -> tuple[Path, Path]:
    """`to/fp8`, with every linear of the decoder layers in FP8, and `to/dense`, what it stands for.

    Args:
        source: in bfloat16, one file.
        block: rows and columns that share a scale.
    """
    state, dense = load_file(source / "model.safetensors"), dict[str, Tensor]()
    stored = dict[str, Tensor]()
    for name, value in state.items():
        kept = ".layers." not in name or value.dim() != 2 or name.endswith("gate.weight")
        dense[name] = stored[name] = value
        if kept:
            continue
        rows, columns = value.shape
        scales = torch.empty(ceil(rows / block[0]), ceil(columns / block[1]))
        packed = torch.empty(value.shape, dtype=FP8)
        dense[name] = torch.empty_like(value)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                at = (slice(i * block[0], (i + 1) * block[0]),
                      slice(j * block[1], (j + 1) * block[1]))  # fmt: skip
                scales[i, j] = value[at].float().abs().max() / 448
                packed[at] = (value[at].float() / scales[i, j]).to(FP8)
                dense[name][at] = (packed[at].float() * scales[i, j]).to(value.dtype)
        stored[name], stored[f"{name}_scale_inv"] = packed, scales
    for folder, tensors in (("dense", dense), ("fp8", stored)):
        shutil.copytree(source, to / folder)
        save_file(tensors, to / folder / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(block),
    }
    (to / "fp8" / "config.json").write_text(json.dumps(config))
    return to / "fp8", to / "dense"
