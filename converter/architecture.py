"""The transformers model that a checkpoint's config.json describes, built without its weights.

The architecture is transformers' own modelling code, built on the meta device; nothing about an
architecture is written here but the list of those that were tried.
"""

from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rilq.converter.machine import SMALL_BLOCK, large_blocks_returned
from rilq.errors import CheckpointError, UnsupportedArchitectureError, one_line, printable
from rilq.formats.checkpoint import Checkpoint
from rilq.formats.experts import separate_experts
from rilq.formats.native import RilqConfig
from rilq.formats.quantized import apply_quantization, quantization_of
from rilq.formats.resq.config import ResqConfig

# model_type of every architecture whose streamed states were tested against transformers in memory.
SUPPORTED = {
    "llama": "Llama 2/3",
    "mistral": "Mistral",
    "qwen2": "Qwen2/2.5",
    "qwen3": "Qwen3",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3 (text)",
    "phi3": "Phi-3",
    "olmo2": "OLMo 2",
    "mixtral": "Mixtral",
    "qwen2_moe": "Qwen2-MoE",
    "qwen3_moe": "Qwen3-MoE",
    "olmoe": "OLMoE",
    "deepseek_v2": "DeepSeek-V2",
    "deepseek_v3": "DeepSeek-V3",
}

# Sizes in config.json that must be positive where they are given.
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)

# What config.json may hold that does not describe the model that is built here.
_NOT_THE_MODEL = (
    "quantization_config",
    "auto_map",
    "return_dict",
    "output_hidden_states",
    "output_attentions",
)


def load_config(checkpoint: Checkpoint) -> PretrainedConfig:
    """The checkpoint's configuration as transformers understands it; no remote code is run.

    Raises:
        UnsupportedArchitectureError: not one of `SUPPORTED`; the message names the architecture.
        CheckpointError: `config.json` has no `model_type`, or values that make no model.
    """
    raw = dict(checkpoint.config)
    where = f"{checkpoint.source.label}/config.json"
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(
            f"{where}: no model_type: cannot tell the architecture\n"
            "  expected a Hugging Face causal language model; check that the folder is complete"
        )
    if model_type not in SUPPORTED:
        named = raw.get("architectures") or ["?"]
        name = named[0] if isinstance(named, list) and named else named
        remote = " (its remote code is never run)" if "auto_map" in raw else ""
        raise UnsupportedArchitectureError(
            f"{where}: architecture {printable(str(name))} (model_type {model_type!r}) is not "
            f"supported{remote}\n"
            f"  supported: {', '.join(SUPPORTED.values())}"
        )
    _check_sizes(checkpoint)
    try:
        return CONFIG_MAPPING[model_type].from_dict(
            {key: value for key, value in raw.items() if _of_model(key, value)}
        )
    except Exception as err:  # transformers validates with many exception types
        raise CheckpointError(f"{where}: {one_line(err)}\n  correct config.json") from err


def _of_model(key: str, value: Any) -> bool:
    """Whether an entry of config.json describes the model, not a run or its machine."""
    if key.endswith("attn_implementation"):
        return value in ("eager", "sdpa")  # others need kernels that may not be installed here
    return key not in _NOT_THE_MODEL


def _check_sizes(checkpoint: Checkpoint) -> None:
    """Sizes are positive, and no more layers are asked for than the checkpoint has tensors."""
    sizes = {key: checkpoint.config.get(key) for key in _SIZES}
    wrong = {k: v for k, v in sizes.items() if v is not None and not (type(v) is int and v > 0)}
    if wrong:
        found = ", ".join(f"{key} {printable(repr(value))}" for key, value in wrong.items())
        raise CheckpointError(
            f"{checkpoint.source.label}/config.json: {found}: expected a positive whole number\n"
            "  correct config.json, or download it again"
        )
    if (sizes["num_hidden_layers"] or 0) > len(checkpoint.tensors):  # would be built for hours
        raise CheckpointError(
            f"{checkpoint.source.label}/config.json: num_hidden_layers "
            f"{sizes['num_hidden_layers']}, but the checkpoint has only "
            f"{len(checkpoint.tensors)} tensors\n  correct num_hidden_layers"
        )


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError if the checkpoint is quantized, by us or by anybody."""
    if quantization_of(checkpoint) is not None:
        raise CheckpointError(
            f"{checkpoint.source.label}/config.json: quantization_config: already converted by "
            "rilq\n  give the original 16-bit checkpoint"
        )


def head_size(config: PretrainedConfig) -> int:
    """Channels of an attention head.

    What config.json says where it says it, and not `hidden_size` over the heads: Qwen3 and others
    choose it freely.
    """
    given = getattr(config, "head_dim", None)
    return int(given or config.hidden_size // config.num_attention_heads)


def tied_head_differs(label: str, name: str) -> CheckpointError:
    """The error for a stored head `name` that is not the embedding it is said to be tied to."""
    return CheckpointError(
        f"{label}: {name} differs from the embedding, but config.json has tie_word_embeddings "
        "true\n"
        "  set tie_word_embeddings to false in config.json"
    )


def build_skeleton(
    config: PretrainedConfig,
    dtype: torch.dtype,
    quantization: RilqConfig | ResqConfig | None = None,
) -> nn.Module:
    """transformers' causal language model on the meta device, its buffers real, in eval mode.

    Raises:
        CheckpointError: the sizes in the configuration make no model.
    """
    if getattr(config, "attn_logit_softcapping", None):
        # transformers 5.17 still takes sdpa for Gemma 2, which leaves the caps out in silence.
        config._attn_implementation = "eager"
    try:
        # Each weight is real for a moment, if never touched: without the first one, holes in the
        # heap remain of it, 470 MB of address space for 80 layers of hidden size 512.
        with (
            large_blocks_returned(SMALL_BLOCK),
            init_empty_weights(include_buffers=False),
            _FusedExpertsOnMeta(),
        ):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as err:
        raise CheckpointError(
            f"config.json: transformers cannot build this model: {one_line(err)}\n"
            "  check the sizes, hidden_act, rope_parameters and pad_token_id"
        ) from err
    separate_experts(model)
    _widen(model, dtype)
    if quantization is not None:
        try:
            apply_quantization(model, quantization)
        except ValueError as err:
            raise CheckpointError(f"config.json: quantization_config: {err}") from err
    model.requires_grad_(False)
    return model.eval()  # type: ignore[no-any-return]


class _FusedExpertsOnMeta(TorchFunctionMode):
    """Experts that are fused are not even asked for: 15 GB at once for a layer of DeepSeek-V3."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and len(args) == 3:  # [experts, out, in]
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _widen(model: nn.Module, dtype: torch.dtype) -> None:
    """Give what transformers never computes in 16 bits (a router's bias) the dtype that it takes.

    It does so when it loads a checkpoint, not when it builds a model.
    """
    for part, wider in model._get_dtype_plan(dtype).items():  # type: ignore[operator]
        for name, buffer in list(model.named_buffers()):
            if part in name.split("."):
                owner, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(owner), leaf, buffer.to(wider))


def decoder_layers(model: nn.Module, config: PretrainedConfig) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers, and its module name.

    Raises:
        UnsupportedArchitectureError: there is not exactly one list of `num_hidden_layers` modules.
    """
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers
    ]
    if len(lists) != 1:
        raise UnsupportedArchitectureError(
            f"{config.model_type}: expected one list of {config.num_hidden_layers} decoder "
            f"layers, found {len(lists)}"
        )
    return lists[0]
