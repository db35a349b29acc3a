"""The headers of LLaMA-2-70B, for what reads no weight."""

import json
import struct
from pathlib import Path

import torch

from rilq.converter.layers import StreamedModel
from rilq.formats.checkpoint import Checkpoint
from rilq.formats.source import LocalFolder
from rilq.progress import SilentReporter

HIDDEN, INTERMEDIATE, KV, LAYERS, VOCABULARY = 8192, 28672, 1024, 80, 32000
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
WEIGHTS = sum(rows * columns for rows, columns in SHAPES.values())  # of one decoder layer
GROUPS = WEIGHTS // 64


def write_70b(folder: Path) -> StreamedModel:
    """LLaMA-2-70B: its config and the headers of its shard, which is a hole of 138 GB."""
    config = dict(
        model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=VOCABULARY,
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=LAYERS,
        num_attention_heads=64, num_key_value_heads=8, max_position_embeddings=4096,
        tie_word_embeddings=False,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,),
              "lm_head.weight": (VOCABULARY, HIDDEN)}  # fmt: skip
    for index in range(LAYERS):
        start = f"model.layers.{index}"
        shapes |= {f"{start}.{name}.weight": shape for name, shape in SHAPES.items()}
        shapes |= {f"{start}.{n}.weight": (HIDDEN,)
                   for n in ("input_layernorm", "post_attention_layernorm")}  # fmt: skip
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    checkpoint = Checkpoint.open(LocalFolder(folder), report=SilentReporter())
    return StreamedModel(checkpoint, dtype=torch.bfloat16, device=torch.device("cpu"))
