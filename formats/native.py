"""The native format: quantized linears as tensors, as a torch module, and for transformers.

A quantized linear `X` is `X.weight` int32 `[out, in * bits / 32]` (packed codes), `X.weight_scale`
and `X.zero_point` float16 `[out, groups]`, and `X.bias` in 16 bits where the model has one. A
quantized embedding is stored likewise, one row for each token. The packed tensor is called `weight`
on purpose: without `import rilq`, transformers then stops with a size mismatch, where under any
other name it would warn and go on with random weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from rilq.errors import CheckpointError
from rilq.formats.checkpoint import Checkpoint
from rilq.formats.experts import separate_experts, turns_into_fused
from rilq.formats.hf_quantizer import PackedHfQuantizer, keep_from_initializing, prefix_of
from rilq.formats.packed_embedding import (
    RilqEmbedding,
    TiedRilqLinear,
    replace_embedding,
    replace_head,
)
from rilq.formats.packed_linear import PackedModule, RilqLinear, packed_linear
from rilq.formats.packing import pack, unpack
from rilq.formats.shard_writer import TensorLayout, check_layout
from rilq.formats.spec import (
    BITS,
    GROUP_SIZES,
    OUTER_BITS,
    QuantizedLinear,
    QuantSpec,
    names_module,
)

__all__ = [
    "EXPERTS_FORMAT_VERSION",
    "FORMAT_VERSION",
    "OUTER_FORMAT_VERSION",
    "QUANT_METHOD",
    "RilqConfig",
    "RilqEmbedding",
    "RilqHfQuantizer",
    "RilqLinear",
    "native_config",
    "native_layout",
    "native_tensors",
    "packed_linear",
    "quantized_linear_from",
    "replace_linears",
    "replace_modules",
]

QUANT_METHOD = "rilq"
FORMAT_VERSION = 1  # embedding and head in 16 bits: what every rilq reads
OUTER_FORMAT_VERSION = 2  # one of them quantized, which readers of version 1 do not know
EXPERTS_FORMAT_VERSION = 3  # a mixture of experts, whose linears earlier readers do not look for
VERSIONS = (FORMAT_VERSION, OUTER_FORMAT_VERSION, EXPERTS_FORMAT_VERSION)


class RilqConfig(QuantizationConfigMixin):
    """`quantization_config` of a native checkpoint: which linears are quantized, and how.

    Args:
        bits: 2, 3, 4 or 8, for every linear that `bits_for` does not name.
        group_size: input channels that share a scale and a zero-point.
        format_version: of the tensors, one of `VERSIONS`; None for the least that says what is
            quantized of a model without experts.
        modules_to_not_convert: linears kept in 16 bits: a module's full name, its last parts
            (`lm_head`, `mlp.gate`), a parent of it (`model.layers.0`), or a pattern with `*`.
        bits_for: full module name to bits.
        embed_bits, head_bits: of the input embedding and the output head, 16, 8 or 4; 16 is not
            quantized. In a tied model they are one matrix, and equal.
        recipe: what made the checkpoint; carried along, never interpreted.
        other: keys of other programs; ignored, since a change of meaning changes the version.

    Raises:
        ValueError: an unknown version, or bits or a group size that cannot be read.
    """

    def __init__(
        self,
        bits: int = 2,
        group_size: int = 64,
        *,
        format_version: int | None = None,
        modules_to_not_convert: Iterable[str] | None = None,
        bits_for: Mapping[str, int] | None = None,
        embed_bits: int = 16,
        head_bits: int = 16,
        recipe: Mapping[str, Any] | None = None,
        **other: Any,
    ) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # an enum in transformers
        self.bits = bits
        self.group_size = group_size
        self.embed_bits, self.head_bits = embed_bits, head_bits
        plain = (embed_bits, head_bits) == (16, 16)
        least = FORMAT_VERSION if plain else OUTER_FORMAT_VERSION
        self.format_version = least if format_version is None else format_version
        skipped = ("lm_head",) if modules_to_not_convert is None else modules_to_not_convert
        self.modules_to_not_convert = list(skipped)
        self.bits_for = dict(bits_for or {})
        self.recipe = dict(recipe or {})
        self._check()

    def _check(self) -> None:
        if self.format_version not in VERSIONS:
            raise ValueError(
                f"quantization_config: format_version {self.format_version!r}, this rilq reads "
                f"{', '.join(map(str, VERSIONS))}\n"
                "  upgrade rilq, or convert the model again with this one"
            )
        outer = {"embed_bits": self.embed_bits, "head_bits": self.head_bits}
        allowed = (16,) if self.format_version == FORMAT_VERSION else OUTER_BITS
        if strange := {name: bits for name, bits in outer.items() if bits not in allowed}:
            raise ValueError(
                f"quantization_config: {strange}, expected one of {allowed} in format_version "
                f"{self.format_version}\n"
                "  config.json was changed, or is damaged; download it again"
            )
        wrong = {n: b for n, b in {"bits": self.bits, **self.bits_for}.items() if b not in BITS}
        if wrong:
            raise ValueError(
                f"quantization_config: bits {wrong}, expected one of {BITS}\n"
                "  config.json was changed, or is damaged; download it again"
            )
        if self.group_size not in GROUP_SIZES:
            raise ValueError(
                f"quantization_config: group_size {self.group_size!r}, expected one of "
                f"{GROUP_SIZES}\n  config.json was changed, or is damaged; download it again"
            )

    def linear_spec(self, module_name: str) -> QuantSpec | None:
        """How the linear with this full module name is quantized; None if it is not."""
        if any(names_module(pattern, module_name) for pattern in self.modules_to_not_convert):
            return None
        return QuantSpec(self.bits_for.get(module_name, self.bits), self.group_size)

    @property
    def embedding_spec(self) -> QuantSpec | None:
        """How the input embedding is quantized; None if it is not."""
        return QuantSpec(self.embed_bits, self.group_size) if self.embed_bits < 16 else None

    @property
    def head_spec(self) -> QuantSpec | None:
        """How the output head is quantized; None if it is not."""
        return QuantSpec(self.head_bits, self.group_size) if self.head_bits < 16 else None


def native_config(checkpoint: Checkpoint) -> RilqConfig | None:
    """The checkpoint's quantization, if it is in rilq's native format; None for a dense one.

    Raises:
        CheckpointError: quantized by another method, or in a way that cannot be read.
    """
    raw = checkpoint.config.get("quantization_config")
    if raw is None:
        return None
    method = raw.get("quant_method") if isinstance(raw, dict) else None
    if method != "rilq":
        raise CheckpointError(
            f"{checkpoint.source.label}/config.json: quantization_config: the checkpoint is "
            f"already quantized ({method or 'unknown method'})\n"
            "  give the original 16-bit checkpoint"
        )
    try:
        return RilqConfig(**{k: v for k, v in raw.items() if k != "quant_method"})
    except (ValueError, TypeError, AttributeError) as err:
        raise CheckpointError(f"{checkpoint.source.label}/config.json: {err}") from err


def native_layout(
    name: str, out_features: int, in_features: int, spec: QuantSpec
) -> dict[str, TensorLayout]:
    """dtype and shape of the tensors of linear `name` (without a bias)."""
    parameters = TensorLayout(torch.float16, (out_features, in_features // spec.group_size))
    words = TensorLayout(torch.int32, (out_features, in_features * spec.bits // 32))
    return {
        f"{name}.weight": words,
        f"{name}.weight_scale": parameters,
        f"{name}.zero_point": parameters,
    }


def native_tensors(name: str, linear: QuantizedLinear) -> dict[str, Tensor]:
    """The tensors of linear `name` (without a bias), as `native_layout` describes them."""
    return {
        f"{name}.weight": pack(linear.codes, linear.spec.bits),
        f"{name}.weight_scale": linear.scale.to(torch.float16),
        f"{name}.zero_point": linear.zero_point.to(torch.float16),
    }


def quantized_linear_from(
    tensors: Mapping[str, Tensor], name: str, spec: QuantSpec
) -> QuantizedLinear:
    """The inverse of `native_tensors`.

    Raises:
        CheckpointError: a tensor is missing, or has another dtype or shape than `spec` says.
    """
    words = tensors.get(f"{name}.weight", torch.empty(0, 0))
    out_features, width = words.shape if words.dim() == 2 else (0, 0)
    layout = native_layout(name, out_features, width * 32 // spec.bits, spec)
    check_layout(tensors, layout, f"{spec.bits} bits and group size {spec.group_size}")
    codes = unpack(words, spec.bits, width * 32 // spec.bits)
    return QuantizedLinear(
        codes, tensors[f"{name}.weight_scale"], tensors[f"{name}.zero_point"], spec
    )


def replace_linears(model: nn.Module, config: RilqConfig, prefix: str = "") -> list[str]:
    """Put an empty `RilqLinear` on the meta device in place of every quantized linear.

    Args:
        model: a model or a part of one, changed in place; its output head is never replaced.
        config: says which linears, by full module name.
        prefix: name of `model` inside the whole model, for example `model.layers.3`.

    Returns:
        Full names of the replaced modules, in the order of definition.

    Raises:
        ValueError: a linear's `in_features` is not a multiple of the group size.
    """
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    replaced = []
    for path, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or module is head or isinstance(module, PackedModule):
            continue
        name = f"{prefix}.{path}" if prefix else path
        spec = config.linear_spec(name)
        if spec is None:
            continue
        if module.in_features % spec.group_size:
            raise ValueError(
                f"{name}: in_features {module.in_features} is not a multiple of group size "
                f"{spec.group_size}\n  name it in modules_to_not_convert of quantization_config, "
                "if its weight is stored in 16 bits"
            )
        empty = RilqLinear(
            module.in_features,
            module.out_features,
            spec,
            bias=module.bias is not None,
            device="meta",
            dtype=module.weight.dtype,
        )
        model.set_submodule(path, empty.train(module.training))
        replaced.append(name)
    return replaced


def replace_modules(model: nn.Module, config: RilqConfig, prefix: str = "") -> list[str]:
    """`replace_linears` of a whole model, and its embedding and head where they are quantized.

    Raises:
        ValueError: the model does not fit the configuration; the message names the module.
    """
    replaced = replace_linears(model, config, prefix)
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    if tied and config.embed_bits != config.head_bits:
        raise ValueError(
            f"quantization_config: embed_bits {config.embed_bits}, head_bits {config.head_bits}, "
            "but with tie_word_embeddings they are one matrix\n"
            "  config.json was changed, or is damaged; download it again"
        )
    if (spec := config.embedding_spec) is not None:
        replaced.append(replace_embedding(model, spec))
    if (spec := config.head_spec) is not None:
        replaced += filter(None, [replace_head(model, spec, tied=tied)])
    return replaced


class RilqHfQuantizer(PackedHfQuantizer):
    """Lets `from_pretrained` load native checkpoints; it does not quantize."""

    quantization_config: RilqConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        if separate_experts(model) and not hasattr(HfQuantizer, "update_weight_conversions"):
            raise ValueError(
                "this version of transformers would fuse the experts of a mixture, which packed "
                "codes do not survive\n  upgrade transformers"
            )
        replace_modules(model, self.quantization_config, prefix_of(model))
        keep_from_initializing(model)

    def update_weight_conversions(self, weight_conversions: list[Any], *_: Any) -> list[Any]:
        """Leave experts apart and under their stored names, where transformers would fuse them."""
        return [
            each
            for each in weight_conversions
            if not turns_into_fused(getattr(each, "source_patterns", ()))
        ]

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """Replace every packed module by a dense one in `dtype`; a tied head stays tied."""
        dtype, tied = dtype or torch.float16, False
        for path, module in list(model.named_modules()):
            if isinstance(module, RilqEmbedding):
                model.set_submodule(path, module.dense(dtype))
            elif isinstance(module, RilqLinear):
                dense = nn.Linear(module.in_features, module.out_features, False, device="meta")
                if isinstance(module, TiedRilqLinear):
                    tied = True  # takes the embedding's weight below
                else:
                    dense.weight = nn.Parameter(module.dense_weight(dtype), requires_grad=False)
                dense.bias = module.bias
                model.set_submodule(path, dense.train(module.training))
        if tied:
            model.tie_weights()  # type: ignore[operator]
        return model


def register() -> None:
    """Make the format known to transformers; harmless when repeated."""
    if QUANT_METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(QUANT_METHOD)(RilqConfig)
    if QUANT_METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(QUANT_METHOD)(RilqHfQuantizer)


register()  # importing this module is how the format registers itself; see registration.py
