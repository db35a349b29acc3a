"""A plain LoRA beside a base, as a folder that stock PEFT loads."""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from rilq.formats.durable import write_bytes
from rilq.formats.shard_writer import write_tensors

# A folder of its own: an adapter_config.json beside config.json would make transformers load the
# adapter's base model instead of the checkpoint.
ADAPTER_FOLDER = "adapter"
KEY_PREFIX = "base_model.model."


def write_peft_adapter(
    checkpoint: Path, adapters: Mapping[str, Tensor], *, rank: int, alpha: float
) -> None:
    """Write `checkpoint/adapter`, for `PeftModel.from_pretrained(base, checkpoint / "adapter")`.

    Args:
        checkpoint: the base's folder.
        adapters: `<linear>.a [rank, in_features]` and `<linear>.b [out_features, rank]`.
        rank, alpha: of all of them; the correction is `alpha / rank * B A x`.
    """
    from peft import LoraConfig, TaskType  # takes a second to import

    folder = checkpoint / ADAPTER_FOLDER
    folder.mkdir(exist_ok=True)
    linears = [name.removesuffix(".a") for name in adapters if name.endswith(".a")]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT computes with any number
        target_modules=linears,
        task_type=TaskType.CAUSAL_LM,
        inference_mode=True,
    ).to_dict()
    # PEFT holds the targets in a set, whose order differs from process to process.
    config = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    tensors = {}
    for linear in linears:
        tensors[f"{KEY_PREFIX}{linear}.lora_A.weight"] = adapters[f"{linear}.a"]
        tensors[f"{KEY_PREFIX}{linear}.lora_B.weight"] = adapters[f"{linear}.b"]
    write_tensors(folder / "adapter_model.safetensors", tensors)
    text = json.dumps(config, indent=2, sort_keys=True, default=str) + "\n"
    write_bytes(folder / "adapter_config.json", text.encode())
