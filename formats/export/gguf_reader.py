"""A GGUF file as the dense model that it stands for, under transformers' names.

By the gguf package's own reader and dequantization; names, rotary order and norms are undone here
from what the file says of itself.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INNER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# Where an architecture calls something else by the same name.
_OTHERS = {
    "gemma2": {"ffn_norm": "pre_feedforward_layernorm"},
    "gemma3": {"ffn_norm": "pre_feedforward_layernorm"},
    "phi3": {"ffn_up": "mlp.gate_up_proj"},
}
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


class GgufReader:
    """Dense weights of a GGUF file, an adapter's part added in.

    Attributes:
        shapes: every tensor by transformers' name, without rotary factors and a tied head.
    """

    def __init__(self, model: Path, adapter: Path | None) -> None:
        self._reader = gguf.GGUFReader(model)
        self._arch = str(self._reader.fields["general.architecture"].contents())
        named = {_name(self._arch, each.name): each for each in self._reader.tensors}
        self._tensors = {name: each for name, each in named.items() if name is not None}
        head, embedding = self._tensors.get(_HEAD), self._tensors[_EMBEDDING]
        if head is not None and np.array_equal(head.data, embedding.data):
            del self._tensors[_HEAD]  # OLMo 2 has one even if it is tied
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: tuple(int(n) for n in reversed(each.shape))
            for name, each in self._tensors.items()
        }
        self._factors: dict[str, gguf.ReaderTensor] = {}
        if adapter is not None:
            lora = gguf.GGUFReader(adapter)
            self._alpha = float(lora.fields["adapter.lora.alpha"].contents())
            self._factors = {each.name: each for each in lora.tensors}

    def read(self, name: str) -> Tensor:
        """One tensor in float32."""
        stored = self._tensors[name]
        values = _dense(stored).reshape(self.shapes[name])
        if f"{stored.name}.lora_a" in self._factors:
            a, b = (_dense(self._factors[f"{stored.name}.lora_{part}"]) for part in "ab")
            values += self._alpha / len(a) * (b @ a)
        if self._arch == "llama" and (match := re.search(r"self_attn\.([qk])_proj", name)):
            key = "head_count" if match[1] == "q" else "head_count_kv"
            heads = int(self._reader.fields[f"llama.attention.{key}"].contents())
            pairs = values.reshape(heads, -1, 2, *values.shape[1:])  # [heads, pairs, 2, ...]
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        if self._arch.startswith("gemma") and name.endswith("norm.weight"):
            values = values - 1
        return torch.from_numpy(np.ascontiguousarray(values))


def _dense(tensor: gguf.ReaderTensor) -> np.ndarray:
    """Float32 values, in memory of their own."""
    return np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)


def _name(arch: str, name: str) -> str | None:
    """transformers' name of a tensor; None for rotary factors."""
    if (layer := _LAYER.fullmatch(name)) is None:
        module, _, part = name.rpartition(".")
        return f"{_OUTER[module]}.{part}" if module in _OUTER else None
    inner = {**_INNER, **_OTHERS.get(arch, {})}[layer[2]]
    return f"model.layers.{layer[1]}.{inner}.{layer[3]}"
