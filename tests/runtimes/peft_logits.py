"""Runs in an environment with PEFT and gptqmodel or compressed-tensors: load as users do.

    python peft_logits.py FOLDER ROWS.npy LOGITS.npy

Logits of base and adapter, in float32; of the base alone they are saved in LOGITS.base.npy. Then a
backward pass must reach the adapter.
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
from transformers import AutoModelForCausalLM  # noqa: E402

PACKAGES = {
    "gptq": ("transformers", "optimum", "gptqmodel", "peft", "torch"),
    "compressed-tensors": ("transformers", "compressed-tensors", "peft", "torch"),
}


def main() -> None:
    """Load, compute with and without the adapter, train a step's gradient."""
    folder, rows, out = map(Path, sys.argv[1:])
    config = json.loads((folder / "config.json").read_text())
    method = config["quantization_config"]["quant_method"]
    settings = {}
    if method == "compressed-tensors":
        from transformers import CompressedTensorsConfig

        settings["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings)
    kind = type(model.model.layers[0].self_attn.o_proj)
    adapted = PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True).eval()
    tokens = torch.from_numpy(np.load(rows))
    with torch.no_grad():
        np.save(out, adapted(input_ids=tokens).logits.numpy())
        with adapted.disable_adapter():
            np.save(out.with_suffix(".base.npy"), adapted(input_ids=tokens).logits.numpy())
    adapted(input_ids=tokens, labels=tokens).loss.backward()
    trained = [p for n, p in adapted.named_parameters() if "lora_" in n]
    assert trained and all(p.grad is not None and p.grad.abs().max() > 0 for p in trained)
    print(kind.__name__, ", ".join(f"{name} {version(name)}" for name in PACKAGES[method]))


if __name__ == "__main__":
    main()
