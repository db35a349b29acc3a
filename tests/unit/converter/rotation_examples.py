"""Checkpoints whose weights tests of rotations fold, and their logits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from rilq.converter.rotation import EMBEDDING, HEAD
from rilq.formats.checkpoint import Checkpoint
from rilq.formats.source import LocalFolder

WEIGHTS = "model.safetensors"
TOKENS = torch.randint(320, (3, 20), generator=torch.Generator().manual_seed(0))

# Name to model_type and what differs from the tiny config in conftest.py.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, every bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, one KV head": ("llama", {"num_key_value_heads": 1}),
    "llama, one KV head per head": ("llama", {"num_key_value_heads": 4}),
    "llama, 12 x 4 and 12": ("llama", {"hidden_size": 48, "head_dim": 12}),
    "llama, 4 x 43 and 2 x 7": ("llama", {"hidden_size": 172, "head_dim": 14}),
    "mistral": ("mistral", {"sliding_window": 8}),
    "qwen2": ("qwen2", {}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "phi3": ("phi3", {}),
}


class Folders:
    """The folder of one of `MODELS` with wild norms and biases; tests must not change it."""

    def __init__(self, root: Path, make_model: Callable[..., Path]) -> None:
        self.root, self.make_model = root, make_model

    def __call__(self, name: str) -> Path:
        model_type, overrides = MODELS[name]
        if not (self.root / name).exists():
            self.make_model(self.root / name, model_type, **overrides)
            edit(self.root / name, wild)
        return self.root / name


def edit(folder: Path, change: Callable[[str, Tensor], Tensor | None]) -> None:
    """Rewrite all tensors; those that become None are left out."""
    changed = {n: change(n, t) for n, t in load_file(folder / WEIGHTS).items()}
    kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
    save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})


def wild(name: str, tensor: Tensor) -> Tensor:
    """Norm weights from 0.2 to 3 and biases of size 1: what a wrong fold cannot survive."""
    draw = torch.Generator().manual_seed(len(name))
    if name.endswith("norm.weight"):
        return 0.2 + 2.8 * torch.rand(tensor.shape, generator=draw)
    return torch.randn(tensor.shape, generator=draw) if name.endswith(".bias") else tensor


def opened(folder: Path) -> Checkpoint:
    return Checkpoint.open(LocalFolder(folder))


def logits(
    config: PretrainedConfig, tensors: dict[str, Tensor], dtype: torch.dtype = torch.float64
) -> Tensor:
    """Of transformers' own model; in float64 its norms are in float32 all the same."""
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if config.tie_word_embeddings:
        tensors = {HEAD: tensors[EMBEDDING], **tensors}
    model.load_state_dict(tensors)
    with torch.no_grad():
        return model.eval()(TOKENS).logits
