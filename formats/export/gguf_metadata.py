"""An architecture and its sizes as GGUF metadata, and what llama.cpp cannot be told.

The keys are those that llama.cpp's converter writes (conversion/*.py), the checks what its graphs
take for granted (src/models/*.cpp).
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rilq.errors import CheckpointError, OptionError
from rilq.formats.export.source import NativeCheckpoint, NativeForm

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "olmo2": gguf.MODEL_ARCH.OLMO2,
}

GEMMA = ("gemma2", "gemma3_text")
_WIDE_HEADS = ("phi3", "olmo2")  # llama.cpp gives all heads together the width of the model
_BIASED = {"llama": ("attn", "mlp"), "mistral": (), "qwen2": ("attn",)}
# In a model of this name llama.cpp looks for tokens, and does not load it if they are missing.
_PHI3_NAME, _PHI3_TOKENS = (
    re.compile("phi-?3", re.IGNORECASE),
    {"<unk>", "<s>", "</s>", "<|endoftext|>"},
)
# Numbers of layers that llama.cpp takes for the 27 B model, whose attention is scaled otherwise.
_SCALED_BY_WIDTH = {"gemma2": 46, "gemma3_text": 62}
_ROPES = {
    "llama": ("default", "linear", "yarn", "llama3"),
    "mistral": ("default", "linear", "yarn", "llama3"),
    "qwen2": ("default", "linear", "yarn"),
    "qwen3": ("default", "linear", "yarn"),
    "gemma2": ("default", "linear"),
    "gemma3_text": ("default", "linear"),
    "phi3": ("default", "longrope"),
    "olmo2": ("default", "linear", "yarn"),
}


def configuration(form: NativeForm) -> PretrainedConfig:
    """The checkpoint's configuration with transformers' defaults filled in."""
    return CONFIG_MAPPING[form.model_type].from_dict(dict(form.config))


def head_dim(config: PretrainedConfig) -> int:
    """Width of an attention head."""
    given = getattr(config, "head_dim", None)
    return int(given or config.hidden_size // config.num_attention_heads)


def row_width(form: NativeForm, linear: str) -> int:
    """`in_features` of a decoder linear with this full name."""
    config = configuration(form)
    widths = {
        "o_proj": config.num_attention_heads * head_dim(config),
        "down_proj": config.intermediate_size,
    }
    return int(widths.get(linear.rpartition(".")[2], config.hidden_size))


def check_architecture(form: NativeForm) -> None:
    """That llama.cpp computes what transformers does.

    Raises:
        OptionError: it does not; all differences are named.
    """
    if form.model_type not in ARCHITECTURES:
        raise OptionError(
            f"{form.label}: --to gguf does not know the architecture {form.model_type!r}\n"
            f"  it knows {', '.join(ARCHITECTURES)}; export --to dense"
        )
    if differences := list(_differences(form.model_type, configuration(form))):
        raise OptionError(
            f"{form.label}: llama.cpp computes something else than config.json says: "
            f"{'; '.join(differences)}\n  export --to dense"
        )


def _differences(kind: str, config: PretrainedConfig) -> Iterator[str]:
    activation = "gelu_pytorch_tanh" if kind in GEMMA else "silu"
    found = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", activation)
    if found != activation:
        yield f"activation {found!r}, llama.cpp has {activation!r}"
    width = head_dim(config)
    if kind in _WIDE_HEADS and width * config.num_attention_heads != config.hidden_size:
        yield f"head_dim {width}, llama.cpp has hidden_size / num_attention_heads"
    for part in ("attn", "mlp"):
        key = {"attn": "attention_bias", "mlp": "mlp_bias"}[part]
        if getattr(config, key, False) and part not in _BIASED.get(kind, ()):
            yield f"{key}, llama.cpp has no such tensors"
    for name, rope in _ropes(config).items():
        allowed = ("default",) if name == "sliding_attention" else _ROPES[kind]
        if (rope_type := rope.get("rope_type", "default")) not in allowed:
            yield f"rope_type {rope_type!r} of {name}, it has {', '.join(allowed)}"
        if kind != "phi3" and rope.get("partial_rotary_factor", 1.0) != 1.0:
            yield f"partial_rotary_factor of {name}, it rotates whole heads"
    if kind in GEMMA:
        yield from _gemma_differences(kind, config)


def _gemma_differences(kind: str, config: PretrainedConfig) -> Iterator[str]:
    scale = head_dim(config)
    if config.num_hidden_layers == _SCALED_BY_WIDTH[kind]:
        scale = config.hidden_size // config.num_attention_heads
    if config.query_pre_attn_scalar != scale:
        yield f"query_pre_attn_scalar {config.query_pre_attn_scalar}, llama.cpp has {scale}"
    if not config.tie_word_embeddings:
        yield "a head of its own, llama.cpp has the embedding's"
    if kind == "gemma3_text" and config.attn_logit_softcapping is not None:
        yield "attn_logit_softcapping, llama.cpp has none"
    if kind == "gemma2" and None in (
        config.attn_logit_softcapping,
        config.final_logit_softcapping,
    ):
        yield "no softcapping, llama.cpp always has it"


def ignored_window(form: NativeForm) -> int | None:
    """The sliding window that llama.cpp does not apply: beyond it, its logits differ."""
    config = configuration(form)
    window = getattr(config, "sliding_window", None)
    if form.model_type in GEMMA or not window:
        return None
    layers = getattr(config, "layer_types", None) or ["sliding_attention"]
    return int(window) if "sliding_attention" in layers else None


def _ropes(config: PretrainedConfig) -> dict[str, Mapping[str, Any]]:
    """Layer type to rotary settings; all layers are "full_attention" where there is one setting."""
    rope = config.rope_parameters or {}
    return dict(rope) if "full_attention" in rope else {"full_attention": rope}


def add_general(
    writer: gguf.GGUFWriter,
    native: NativeCheckpoint,
    tokens: Collection[str],
    parameters: int,
    file_type: int,
) -> None:
    """Add `general.*`: what the model is, and where it comes from.

    Args:
        tokens: of the vocabulary.
        parameters: of the dense model.
        file_type: `gguf.LlamaFileType`.
    """
    source = native.manifest.get("source", {})
    name = str(source.get("name") or native.folder.name)
    writer.add_type(gguf.GGUFType.MODEL)
    if not _PHI3_NAME.search(name) or _PHI3_TOKENS.issubset(tokens):
        writer.add_name(name.rpartition("/")[2])
    writer.add_size_label(gguf.size_label(parameters, 0, 0, 0))
    if source.get("commit"):
        owner, _, base = name.rpartition("/")
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base)
        writer.add_base_model_organization(0, owner)
        writer.add_base_model_version(0, str(source["commit"]))
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{name}")
    sampling = native.checkpoint.read_json("generation_config.json") or {}
    if (top_k := sampling.get("top_k")) is not None:
        writer.add_sampling_top_k(top_k)
    if (top_p := sampling.get("top_p")) is not None:
        writer.add_sampling_top_p(top_p)
    if (temperature := sampling.get("temperature")) is not None:
        writer.add_sampling_temp(temperature)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(file_type)


def add_architecture(writer: gguf.GGUFWriter, form: NativeForm) -> None:
    """Add the architecture's sizes, rotary settings, windows and soft caps."""
    config = configuration(form)
    width = head_dim(config)
    full = _ropes(config)["full_attention"]
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(int(width * full.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(full["rope_theta"])
    _add_rope_scaling(writer, config, full)
    if form.model_type in GEMMA:
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern([t == "sliding_attention" for t in config.layer_types])
        if (local := _ropes(config).get("sliding_attention")) is not None:
            writer.add_rope_freq_base_swa(local["rope_theta"])
        if config.attn_logit_softcapping is not None:
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        if config.final_logit_softcapping is not None:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
    elif form.model_type == "phi3":
        writer.add_sliding_window(config.sliding_window or 0)  # 0 tells Phi-4 from the others


def _add_rope_scaling(
    writer: gguf.GGUFWriter, config: PretrainedConfig, rope: Mapping[str, Any]
) -> None:
    kind = rope.get("rope_type", "default")
    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    if config.model_type == "phi3":
        writer.add_rope_scaling_orig_ctx_len(
            getattr(config, "original_max_position_embeddings", None) or original
        )
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(original)
        if (beta_fast := rope.get("beta_fast")) is not None:
            writer.add_rope_scaling_yarn_beta_fast(beta_fast)
        if (beta_slow := rope.get("beta_slow")) is not None:
            writer.add_rope_scaling_yarn_beta_slow(beta_slow)
    elif kind == "longrope":
        writer.add_rope_scaling_attn_factors(_longrope_attention(config, rope))


def _longrope_attention(config: PretrainedConfig, rope: Mapping[str, Any]) -> float:
    """The factor on queries and keys of Phi-3's long context variants."""
    if (given := rope.get("attention_factor")) is not None:
        return float(given)
    original = getattr(config, "original_max_position_embeddings", None) or rope.get(
        "original_max_position_embeddings"
    )
    if original is None:
        raise CheckpointError(
            f"config.json: longrope without original_max_position_embeddings ({config.model_type})"
            "\n  download it again"
        )
    factor = config.max_position_embeddings / original
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def rope_tensors(form: NativeForm) -> dict[str, Tensor]:
    """Rotary factors that GGUF holds as float32 tensors, by their GGUF names."""
    config = configuration(form)
    rope = _ropes(config)["full_attention"]
    if rope.get("rope_type") == "llama3":
        return {"rope_freqs.weight": _llama3_factors(rope, head_dim(config))}
    if rope.get("rope_type") == "longrope":
        return {
            f"rope_factors_{reach}.weight": torch.tensor(rope[f"{reach}_factor"]).float()
            for reach in ("long", "short")
        }
    return {}


def _llama3_factors(rope: Mapping[str, Any], width: int) -> Tensor:
    """What Llama 3.1 divides its rotary frequencies by, `[head_dim / 2]`.

    High frequencies stay, low ones are divided by `factor`, and those between by something between.
    """
    frequencies = rope["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # 1 for high frequencies
    factors: Tensor = 1 / ((1 - kept) / rope["factor"] + kept)
    return factors.float()
