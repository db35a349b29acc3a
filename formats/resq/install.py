"""Turns transformers' model of a supported architecture into one that runs as ResQ does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from rilq.formats.resq.attention import CacheSwap, KeyRotation, quantize_attention
from rilq.formats.resq.config import ResqConfig
from rilq.formats.resq.linear import QuantizedInputLinear, ResqLinear

# model_type of those whose attention was read, and tried; see formats/resq/attention.py.
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
ATTENTION_MODULE, PER_HEAD, TRANSFORMED = "self_attn", "o_proj", "down_proj"


def install(model: nn.Module, config: ResqConfig, prefix: str = "") -> list[str]:
    """Put empty `ResqLinear`s in the place of linears, and quantize keys and values.

    Args:
        model: a model or a part of one that holds whole decoder layers, changed in place; its
            output head is never replaced.
        config: says which linears, by full module name.
        prefix: name of `model` inside the whole model, for example `model.layers.3`.

    Returns:
        Full names of the replaced linears, in the order of definition. They are on the meta
        device, and so are the key rotations.

    Raises:
        ValueError: an architecture without support, or sizes that do not fit the configuration.
    """
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    attentions = list(_attentions(model))
    replaced = []
    for path, module in list(model.named_modules()):
        name = f"{prefix}.{path}" if prefix else path
        if not isinstance(module, nn.Linear) or module is head or not config.quantizes(name):
            continue
        leaf = path.rpartition(".")[2]
        heads = attentions[0].config.num_attention_heads if leaf == PER_HEAD else 1
        with _named(name):
            empty = _empty_linear(module, config, leaf, heads)
        model.set_submodule(path, empty.train(module.training))
        replaced.append(name)
    for attention in attentions:
        with _named("keys and values"):
            parts = config.cache_parts(attention.head_dim)
        if config.rotates_keys:
            attention.key_rotation = KeyRotation(attention.head_dim, device="meta")
        quantize_attention(attention, parts)
    decoder: Any = getattr(model, "base_model", model)
    if hasattr(decoder, "layers"):
        swap = CacheSwap(len(decoder.layers), config.cache_parts(attentions[0].head_dim))
        decoder.register_forward_pre_hook(swap, with_kwargs=True)
    return replaced


def _attentions(model: nn.Module) -> Iterator[Any]:
    """The attention modules of the decoder layers.

    Raises:
        ValueError: there is none, or they are of an architecture without support.
    """
    found = 0
    for path, module in model.named_modules():
        if path.rpartition(".")[2] == ATTENTION_MODULE:
            model_type = getattr(module.config, "model_type", None)
            if model_type not in ARCHITECTURES:
                raise ValueError(
                    f"quantization_config: rilq-resq of model_type {model_type!r}, expected one of "
                    f"{', '.join(ARCHITECTURES)}"
                )
            found += 1
            yield module
    if not found:
        raise ValueError(f"quantization_config: rilq-resq: no module named {ATTENTION_MODULE}")


def _empty_linear(linear: nn.Linear, config: ResqConfig, leaf: str, heads: int) -> ResqLinear:
    return ResqLinear(
        linear.in_features,
        linear.out_features,
        config.linear_parts(leaf, linear.in_features // heads),
        heads=heads,
        hadamard=config.hadamard if leaf == TRANSFORMED else (),
        bias=linear.bias is not None,
        device="meta",
        dtype=linear.weight.dtype,
    )


@contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as err:
        raise ValueError(f"{name}: {err}") from err


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """Within it, inputs of linears, keys and values are not quantized (without a cache)."""
    switched: list[Any] = []
    for module in model.modules():
        if isinstance(module, QuantizedInputLinear):
            switched.append(module)
        elif hasattr(module, "key_values"):
            switched.append(module.key_values)
    before = [each.quantizes for each in switched]
    for each in switched:
        each.quantizes = False
    try:
        yield
    finally:
        for each, quantizes in zip(switched, before, strict=True):
            each.quantizes = quantizes
