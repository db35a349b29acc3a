"""Attention over quantized keys and values, with transformers' own modelling code.

Attention modules of Llama, Mistral, Qwen2 and Qwen3 pass rotary-encoded keys and values to
`past_key_values.update` and what that returns to an attention function by name. Both places are
ours: a hook gives the module an `update` that rotates the keys, and quantizes keys and values with
or without a cache; the function `rilq_resq` rotates the queries likewise and calls sdpa.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rilq.formats.packed_linear import KeptBuffers
from rilq.formats.resq.cache import STATE_DTYPE, ResqCache
from rilq.formats.resq.parts import Parts
from rilq.formats.resq.quantizer import quantize_dequantize

ATTENTION = "rilq_resq"


class KeyRotation(KeptBuffers):
    """The rotation U_C of a layer, for queries and keys after RoPE: `x U_C` in each head.

    Attributes:
        weight: `[head_dim, head_dim]` float32, orthogonal, channels in ascending order of variance.
    """

    kept_buffers = ("weight",)
    weight: Tensor

    def __init__(self, head_dim: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        # Not transformers' default dtype, which is the model's while it is built.
        matrix = torch.empty(head_dim, head_dim, dtype=torch.float32, device=device)
        self.register_buffer("weight", matrix)

    def forward(self, states: Tensor) -> Tensor:
        """`[..., head_dim]` to the same."""
        return states @ self.weight.to(states.dtype)


class KeyValueQuantizer:
    """How an attention module quantizes keys and values.

    Attributes:
        parts: of a head's key and value.
        quantizes: False leaves them as they are, where there is no cache.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts, self.quantizes = parts, True


@dataclass(frozen=True)
class _Update:
    """What an attention module calls as its cache: rotates, quantizes, and keeps if there is one.

    Attributes:
        rotation: U_C of the layer, or None.
        cache: of the model, or None.
    """

    quantizer: KeyValueQuantizer
    rotation: KeyRotation | None
    cache: ResqCache | None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values `[batch, heads, tokens, head_dim]` to what attention reads."""
        if self.rotation is not None:
            key_states = self.rotation(key_states)
        if self.cache is not None:
            return self.cache.update(key_states, value_states, layer_idx)
        if not self.quantizer.quantizes:
            return key_states, value_states
        keys, values = (
            quantize_dequantize(states, self.quantizer.parts, scale_dtype=STATE_DTYPE)
            for states in (key_states, value_states)
        )
        return keys, values


def quantize_attention(attention: nn.Module, parts: Parts) -> None:
    """Let an attention module quantize its keys and values, and use `rilq_resq`."""
    register_attention()
    attention.key_values = KeyValueQuantizer(parts)  # type: ignore[assignment]
    attention.register_forward_pre_hook(_pass_update, with_kwargs=True)
    attention.config._attn_implementation = ATTENTION  # type: ignore[union-attr]


def _pass_update(
    attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    quantizer, cache = attention.key_values, kwargs.get("past_key_values")
    assert isinstance(quantizer, KeyValueQuantizer), "quantize_attention was called"
    if cache is not None and not isinstance(cache, ResqCache):
        raise foreign_cache(cache)
    update = _Update(quantizer, getattr(attention, "key_rotation", None), cache)
    return args, {**kwargs, "past_key_values": update}


def resq_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' sdpa, the query in the basis of the keys."""
    rotation = getattr(module, "key_rotation", None)
    if rotation is not None:
        query = rotation(query)
    result: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, *args, **kwargs)
    return result


def register_attention() -> None:
    """Make `rilq_resq` known to transformers; harmless when repeated."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, resq_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


class CacheSwap:
    """A pre-hook for the decoder: where transformers would use a cache of its own, ours.

    Args:
        layers: decoder layers.
        parts: of a head's key and value.
    """

    def __init__(self, layers: int, parts: Parts) -> None:
        self.layers, self.parts = layers, parts

    def __call__(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The decoder's arguments; an empty `DynamicCache` among them becomes a `ResqCache`.

        Raises:
            ValueError: a cache of another kind, or one with tokens in it.
        """
        given, use_cache = kwargs.get("past_key_values"), kwargs.get("use_cache")
        if use_cache is None:
            use_cache = getattr(decoder.config, "use_cache", False)
            use_cache &= not (
                decoder.training and getattr(decoder, "gradient_checkpointing", False)
            )
        if isinstance(given, ResqCache) or (given is None and not use_cache):
            return args, kwargs
        if given is None:
            cache = ResqCache(self.layers, self.parts)
        elif _is_empty(given):
            cache = ResqCache.in_place_of(given, self.layers, self.parts)
        else:
            raise foreign_cache(given)
        return args, {**kwargs, "past_key_values": cache}


def _is_empty(cache: Cache) -> bool:
    return type(cache) is DynamicCache and not cache.offloading and cache.get_seq_length() == 0


def foreign_cache(cache: Any) -> ValueError:
    """The error for a cache that holds other things than codes."""
    return ValueError(
        f"past_key_values: {type(cache).__name__}, but this model keeps keys and values quantized, "
        "in a rilq.formats.resq.ResqCache\n"
        "  pass none, or the past_key_values of an earlier output of this model"
    )
