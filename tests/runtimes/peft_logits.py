"""Runs in an environment with PEFT and gptqmodel or compressed-tensors: load as users do.

    python peft_logits.py ROWS.npy FOLDER...

Logits of base and adapter, in float32, go to FOLDER.npy, of the base alone to FOLDER.base.npy. Then
a backward pass must reach the adapter.
"""

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

# gptqmodel compiles its dequantization: half a minute for each model, and the same values.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
import numpy as np  # noqa: E402
import torch  # noqa: E402 - reads the variable
from peft import PeftModel  # noqa: E402
from transformers import AutoModelForCausalLM, CompressedTensorsConfig  # noqa: E402

PACKAGES = {
    "gptq": ("transformers", "optimum", "gptqmodel", "peft", "torch"),
    "compressed-tensors": ("transformers", "compressed-tensors", "peft", "torch"),
}


def main() -> None:
    """Compute each; print the versions."""
    tokens = torch.from_numpy(np.load(sys.argv[1]))
    for folder in map(Path, sys.argv[2:]):
        config = json.loads((folder / "config.json").read_text())
        method = config["quantization_config"]["quant_method"]
        kind = compute(folder, method, tokens)
        print(kind, ", ".join(f"{name} {version(name)}" for name in PACKAGES[method]))


def compute(folder: Path, method: str, tokens: torch.Tensor) -> str:
    """Load, run with and without the adapter, and backward; the packed module's class."""
    settings = {}
    if method == "compressed-tensors":
        settings["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings)
    kind = type(model.model.layers[0].self_attn.o_proj).__name__
    adapted = PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True).eval()
    with torch.no_grad():
        np.save(f"{folder}.npy", adapted(input_ids=tokens).logits.numpy())
        with adapted.disable_adapter():
            np.save(f"{folder}.base.npy", adapted(input_ids=tokens).logits.numpy())
    adapted(input_ids=tokens, labels=tokens).loss.backward()
    trained = [p for n, p in adapted.named_parameters() if "lora_" in n]
    assert trained and all(p.grad is not None for p in trained)
    return kind


if __name__ == "__main__":
    main()
