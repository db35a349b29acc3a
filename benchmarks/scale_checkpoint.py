"""Checkpoints of LLaMA-2-70B's structure in any size, written shard by shard.

64 query heads to 8 of keys and values, an MLP 3.5 times as wide as the hidden states, an untied
head. Weights are random; each decoder layer is a shard of its own, and one tensor at a time is in
memory, so that writing a checkpoint needs less memory than converting it.
"""

import json
from pathlib import Path

import torch
from streaming import write_text, write_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

from rilq.formats.shard_writer import TensorLayout, write_shard

LAYERS = 80
HIDDEN, HEADS, KV_HEADS, INTERMEDIATE, VOCABULARY = 8192, 64, 8, 28672, 32000
SEED = 0


def llama_config(
    hidden: int, layers: int, *, positions: int, vocabulary: int = 1024
) -> LlamaConfig:
    """LLaMA-2-70B with narrower layers: its ratios, with as many heads of 32 channels and more.

    Args:
        hidden: a multiple of 256; 8192 gives the model's own shapes.
        positions: tokens of a row at most.
    """
    assert hidden % 256 == 0, f"hidden size {hidden}: 8 query heads for each pair of keys, values"
    kv_heads = max(1, hidden * KV_HEADS // HIDDEN)
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * INTERMEDIATE // HIDDEN,
        vocab_size=vocabulary,
        num_hidden_layers=layers,
        num_attention_heads=kv_heads * HEADS // KV_HEADS,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )


def write_checkpoint(
    path: Path, config: LlamaConfig, tokens: int, device: torch.device | str = "cpu"
) -> int:
    """Write a random bfloat16 checkpoint with a small tokenizer and a text of `tokens` letters.

    Args:
        path: a new folder.
        device: where random numbers are drawn.

    Returns:
        Bytes of its shards.
    """
    path.mkdir(parents=True)
    with torch.device("meta"):
        one = AutoModelForCausalLM.from_config(_with_layers(config, 1))
    shapes = {name: tuple(value.shape) for name, value in one.state_dict().items()}
    of_layer = "model.layers.0."
    shards = [{n: s for n, s in shapes.items() if not n.startswith(of_layer)}]
    for index in range(config.num_hidden_layers):
        shards.append(
            {
                n.replace(of_layer, f"model.layers.{index}."): s
                for n, s in shapes.items()
                if n.startswith(of_layer)
            }
        )
    draw = torch.Generator(device).manual_seed(SEED)
    weight_map = {}
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        layout = {name: TensorLayout(torch.bfloat16, shape) for name, shape in shard.items()}
        write_shard(path / file, layout, lambda name, of=shard: _random(of[name], draw))
        weight_map |= dict.fromkeys(shard, file)
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    index_file = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index_file))
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(path)
    write_tokenizer(path)
    write_text(path / "text.txt", tokens)
    return size


def write_mixture(
    path: Path, hidden: int, layers: int, experts: int, tokens: int, *, positions: int
) -> int:
    """Write a random bfloat16 mixture of experts, two of which a token meets; else the same.

    Args:
        path: a new folder.
        tokens, positions: as of `write_checkpoint` and `llama_config`.

    Returns:
        Bytes of its shards.
    """
    like = llama_config(hidden, layers, positions=positions)
    torch.manual_seed(SEED)
    config = Qwen3MoeConfig(
        hidden_size=hidden,
        intermediate_size=like.intermediate_size,
        moe_intermediate_size=hidden // 2,
        num_experts=experts,
        num_experts_per_tok=2,
        vocab_size=like.vocab_size,
        num_hidden_layers=layers,
        num_attention_heads=like.num_attention_heads,
        num_key_value_heads=like.num_key_value_heads,
        head_dim=hidden // like.num_attention_heads,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    write_tokenizer(path)
    write_text(path / "text.txt", tokens)
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def _with_layers(config: LlamaConfig, layers: int) -> LlamaConfig:
    return LlamaConfig(**{**config.to_dict(), "num_hidden_layers": layers})


def _random(shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
    """Ones for a norm; else as transformers initialises."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    values = torch.empty(shape, dtype=torch.bfloat16, device=draw.device)
    return values.normal_(0.0, 0.02, generator=draw)
