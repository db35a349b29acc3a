"""What every peer's script shares: the command line, the token rows, and the dense checkpoint.

Runs inside the peer's virtual environment, where rilq is not installed (`rows.py` and
`run_control.py` are ours and run in rilq's).
"""

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SCALE_BITS = 16  # scales, and zero-points that are real numbers, are stored as 16-bit floats


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with what every peer is given."""
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder of the full-precision checkpoint")
    add("--rows", type=Path, required=True, help="safetensors file with `rows`, int64 [n, seq_len]")
    add("--group-size", type=int, help="where the tool has a choice")
    add("--out", type=Path, required=True, help="folder for the dense checkpoint")
    return parser


def read_rows(path: Path) -> Tensor:
    """Token ids `[n, seq_len]` int64: the rows that every method calibrates on."""
    return load_file(path)["rows"]


def decoder_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears of the decoder layers, by their full name."""
    modules = dict(model.named_modules())
    return {
        name: module
        for name, module in modules.items()
        if isinstance(module, nn.Linear) and ".layers." in name
    }


def bits_per_weight(bits: int, group_size: int, *, zero_bits: float) -> float:
    """Stored bits of a group's codes, its 16-bit scale and its zero-point, for one weight."""
    return bits + (SCALE_BITS + zero_bits) / group_size


def save_dense(
    source: Path, weights: Mapping[str, Tensor], out: Path, *, stored_bits: float, made_by: str
) -> None:
    """Write `source` with some of its weights replaced, in float32, and the report `peer.json`.

    Args:
        source: the full-precision checkpoint; its other tensors and files are copied.
        weights: `X.weight` to `[out_features, in_features]`, already dequantized.
        out: folder to write; made if missing.
        stored_bits: per weight of the replaced linears, everything counted.
        made_by: the tool, its version and its settings.
    """
    tensors: dict[str, Tensor] = {}
    for shard in sorted(source.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}
    unknown = sorted(set(weights) - set(tensors))
    if unknown:
        raise SystemExit(f"{source}: has no {', '.join(unknown)}")
    for name, weight in weights.items():
        if weight.shape != tensors[name].shape or not weight.isfinite().all():
            raise SystemExit(f"{name}: {tuple(weight.shape)} or not finite")
        tensors[name] = weight.detach().to(torch.float32).contiguous()
    out.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and ".safetensors" not in file.name:
            shutil.copy(file, out)
    config = json.loads((source / "config.json").read_text())
    config |= {"dtype": "float32", "torch_dtype": "float32"}
    (out / "config.json").write_text(json.dumps(config, indent=2))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    report = {"bits_per_weight": stored_bits, "made_by": made_by}
    (out / "peer.json").write_text(json.dumps(report))
