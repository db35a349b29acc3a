"""Runs in an environment with humming-kernels: hold a folder against its schema, without a GPU.

python humming_schema.py FOLDER
"""

import json
import re
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from humming.schema import BaseWeightSchema
from safetensors import safe_open


def main() -> None:
    """Check every packed linear; print how many there are."""
    folder = Path(sys.argv[1])
    config = json.loads((folder / "config.json").read_text())
    quantization = config["quantization_config"]
    dtype = getattr(torch, config.get("dtype") or config["torch_dtype"])
    tensors = {}
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}
    packed = [name.removesuffix(".zero_point") for name in tensors if name.endswith(".zero_point")]
    for name in packed:
        told = dict(quantization)
        prefix = re.sub(r"(gate|up)_proj$", "gate_up_proj", name)  # as vLLM fuses them
        for pattern, more in quantization["dynamic"].items():
            if re.match(pattern[2:], prefix):
                told |= more
        schema = BaseWeightSchema.from_config(told)
        parts = {
            part: tensors[f"{name}.{part}"] for part in ("weight", "weight_scale", "zero_point")
        }
        rows, words = parts["weight"].shape
        width = words * 32 // schema.b_dtype.num_bits
        schema.validate_tensors(parts, rows, width, dtype)
    print(f"humming-kernels {version('humming-kernels')}: {len(packed)} linears")


if __name__ == "__main__":
    main()
