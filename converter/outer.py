"""Embedding and head in 8 or 4 bits: with a large vocabulary they are half of a 2-bit file.

Both are rounded to nearest after a search of each group's range, without calibration: a row of
either is one token, and most tokens are rare in any calibration text.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from rilq.converter.layers import StreamedModel
from rilq.converter.options import ConvertOptions
from rilq.converter.quantizers.rtn import RtnQuantizer
from rilq.converter.workdir import WorkDir
from rilq.errors import OptionError, UnsupportedArchitectureError
from rilq.formats.native import native_tensors
from rilq.formats.packed_embedding import RilqEmbedding, name_of
from rilq.formats.packed_linear import row_chunks
from rilq.formats.packing import dequantize_packed
from rilq.formats.spec import GROUP_SIZES, QuantSpec

SOURCE_FILE = "outer.safetensors"  # embedding, final norm and head, as in the source
QUANTIZED_FILE = "outer-quantized.safetensors"  # the same as in the output, where that differs


def outer_specs(streamed: StreamedModel, options: ConvertOptions) -> dict[str, QuantSpec]:
    """Module names of embedding and head, where they are quantized, with their specs.

    The head of a tied model is the embedding, and not named.

    Raises:
        OptionError: a tied model with two settings, or a width that the group size does not divide.
        UnsupportedArchitectureError: an embedding that does more than to look up rows.
    """
    model, config = streamed.model, streamed.config
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    tied = is_tied(streamed)
    if tied and options.embed_bits != options.head_bits:
        least = min(options.embed_bits, options.head_bits)
        raise OptionError(
            f"--embed-bits {options.embed_bits}, --head-bits {options.head_bits}: in this model "
            "the head is the embedding's matrix (tie_word_embeddings in config.json)\n"
            f"  give both the same value: --embed-bits {least} --head-bits {least}, or neither"
        )
    specs = {}
    for module, bits in ((embedding, options.embed_bits), (head, options.head_bits)):
        if bits < 16 and not (tied and module is head):
            name = name_of(model, module)
            specs[name] = QuantSpec(bits, options.group_size, options.zero_point)
    if specs and config.hidden_size % options.group_size:
        legal = [str(size) for size in GROUP_SIZES if config.hidden_size % size == 0]
        raise OptionError(
            f"--group-size {options.group_size}: {' and '.join(specs)} cannot be quantized: hidden "
            f"size {config.hidden_size} is not a multiple of it\n  "
            + (f"use --group-size {' or '.join(legal)}, or " if legal else "")
            + "leave --embed-bits and --head-bits at 16"
        )
    if options.embed_bits < 16:
        _check_embedding(streamed, embedding, specs[name_of(model, embedding)])
    return specs


def embedding_name(streamed: StreamedModel) -> str:
    """Module name of the input embedding."""
    return name_of(streamed.model, streamed.model.get_input_embeddings())  # type: ignore[operator]


def is_tied(streamed: StreamedModel) -> bool:
    """Whether embedding and head are one matrix."""
    return bool(getattr(streamed.config, "tie_word_embeddings", False))


def _check_embedding(streamed: StreamedModel, embedding: nn.Embedding, spec: QuantSpec) -> None:
    try:
        RilqEmbedding(embedding, spec, device="meta")
    except ValueError as err:
        raise UnsupportedArchitectureError(
            f"{streamed.config.model_type}: {err}\n  leave --embed-bits at 16"
        ) from err


def quantize_outer(
    tensors: Mapping[str, Tensor], specs: Mapping[str, QuantSpec], device: torch.device
) -> dict[str, Tensor]:
    """Embedding, final norm and head as the output holds them.

    Args:
        tensors: as in the source, by full name.
        specs: see `outer_specs`; what is not named stays as it is.
        device: where to compute, with memory for a bounded number of rows.
    """
    quantized = dict(tensors)
    for name, spec in specs.items():
        weight = quantized.pop(f"{name}.weight")
        parts = [
            native_tensors(name, RtnQuantizer("search").quantize(weight[rows].to(device), spec))
            for rows in row_chunks(*weight.shape)
        ]
        for key in parts[0]:
            quantized[key] = torch.cat([part[key].cpu() for part in parts])
    return quantized


def embed_as_saved(
    streamed: StreamedModel, tensors: Mapping[str, Tensor], specs: Mapping[str, QuantSpec]
) -> None:
    """Overwrite the loaded embedding with what its saved tensors stand for.

    Args:
        tensors: content of `QUANTIZED_FILE`.
    """
    name = embedding_name(streamed)
    words, scale, zero_point = (
        tensors[f"{name}.{part}"] for part in ("weight", "weight_scale", "zero_point")
    )
    weight = streamed.model.get_parameter(f"{name}.weight").data
    for rows in row_chunks(*weight.shape):
        code, step, zero = (part[rows].to(weight.device) for part in (words, scale, zero_point))
        weight[rows] = dequantize_packed(code, step, zero, specs[name].bits, dtype=weight.dtype)


def saved_outer(work: WorkDir) -> Path:
    """The file of embedding, final norm and head as they are in the output."""
    quantized = any(QUANTIZED_FILE in record.files for record in work.stage("outer"))
    return work.file(QUANTIZED_FILE if quantized else SOURCE_FILE)
