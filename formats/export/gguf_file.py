"""The GGUF files of a native checkpoint: headers first, then one tensor after another."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from rilq.errors import OptionError, OutputError
from rilq.formats.export import gguf_metadata as metadata
from rilq.formats.export.folder import cast
from rilq.formats.export.gguf_blocks import pack_q2_k, pack_q4_1
from rilq.formats.export.gguf_tokenizer import add_vocabulary, read_vocabulary
from rilq.formats.export.kind import ExportOptions
from rilq.formats.export.source import NativeCheckpoint, NativeForm
from rilq.formats.native import quantized_linear_from
from rilq.formats.peft_folder import PeftFolder
from rilq.formats.spec import QuantSpec
from rilq.progress import Reporter

_EMBEDDING = "model.embed_tokens"
_PARAMETERS = ("weight_scale", "zero_point")
_HALF = {torch.float16: Type.F16, torch.bfloat16: Type.BF16}


@dataclass(frozen=True)
class _Stored:
    """A tensor of a file: shape of its values, type, and how it is made when its turn comes.

    What `make` returns is written byte by byte.
    """

    shape: tuple[int, ...]
    type: Type
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        weights, size = gguf.GGML_QUANT_SIZES[self.type]
        return int(torch.Size(self.shape).numel() // weights * size)


def write_model(
    native: NativeCheckpoint, path: Path, options: ExportOptions, report: Reporter
) -> None:
    """Write the model.

    Raises:
        CheckpointError: its tokenizer is none of llama.cpp's.
        NonFiniteError: a value is too large for 16 bits.
        OutputError: the volume is full.
    """
    form = native.form
    if (window := metadata.ignored_window(form)) is not None:
        report.warn(
            f"llama.cpp ignores this model's sliding window: beyond {window} tokens it predicts "
            "something else than the model was trained for"
        )
    tensors = dict(_tensors(native, options))
    vocabulary = read_vocabulary(native.folder, tensors["token_embd.weight"].shape[0], report)
    writer = _writer(form)
    parameters = sum(torch.Size(each.shape).numel() for each in tensors.values())
    file_type = gguf.LlamaFileType[f"MOSTLY_{options.gguf_type.upper()}"]
    metadata.add_general(writer, native, vocabulary.tokens, parameters, int(file_type))
    metadata.add_architecture(writer, form)
    add_vocabulary(writer, vocabulary, native.folder)
    _write(writer, path, tensors, report)


def write_adapter(
    native: NativeCheckpoint, adapter: PeftFolder, path: Path, report: Reporter
) -> None:
    """Write a LoRA in float32, for `--lora` of llama.cpp's programs.

    Raises:
        OutputError: the volume is full.
    """
    tensors = dict(_factors(native.form, adapter))
    rank = next(each.shape[0] for name, each in tensors.items() if name.endswith("lora_a"))
    writer = _writer(native.form)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, adapter.scaling * rank)
    _write(writer, path, tensors, report)


def _writer(form: NativeForm) -> gguf.GGUFWriter:
    return gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[metadata.ARCHITECTURES[form.model_type]])


def _write(
    writer: gguf.GGUFWriter, path: Path, tensors: Mapping[str, _Stored], report: Reporter
) -> None:
    """Durably write a file, one tensor at a time in memory."""
    for name, each in tensors.items():
        # The dtype says only that the shape is of values, not of bytes.
        writer.add_tensor_info(name, each.shape, np.dtype(np.float32), each.nbytes, each.type)
    report.stage(f"write {path.name}", len(tensors), "tensor")
    try:
        with closing(writer):  # whose own flush may fail too
            writer.write_header_to_file(path)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for count, each in enumerate(tensors.values(), start=1):
                writer.write_tensor_data(each.make().contiguous().view(torch.uint8).numpy())
                report.step(count)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    except OSError as err:
        raise OutputError(
            f"{path}: cannot be written: {err.strerror or err}\n"
            "  make room or choose another volume, then run the same command again"
        ) from err


def _names(form: NativeForm) -> Callable[[str], str]:
    """A function from transformers' names to llama.cpp's.

    Raises:
        OptionError: (the function) llama.cpp's architecture has no such tensor.
    """
    layers = metadata.configuration(form).num_hidden_layers
    table = gguf.get_tensor_name_map(metadata.ARCHITECTURES[form.model_type], layers)

    def name_of(name: str) -> str:
        found = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise OptionError(
                f"{form.label}: llama.cpp's {form.model_type} has no tensor like {name}\n"
                "  export --to dense"
            )
        return str(found)

    return name_of


def _tensors(native: NativeCheckpoint, options: ExportOptions) -> Iterator[tuple[str, _Stored]]:
    """Every tensor of a model with its name, in the order of the native checkpoint."""
    form, name_of, specs = native.form, _names(native.form), native.specs
    for name, info in native.checkpoint.tensors.items():
        module, _, part = name.rpartition(".")
        if module not in specs or part not in (*_PARAMETERS, "weight"):
            yield name_of(name), _plain(native, name, info.shape, options.dtype)
        elif part == "weight":
            yield name_of(name), _packed(native, module, specs[module], options)
    if form.model_type == "olmo2" and metadata.configuration(form).tie_word_embeddings:
        # For all other architectures llama.cpp takes the embedding itself.
        embedding = f"{_EMBEDDING}.weight"
        if _EMBEDDING in specs:
            yield "output.weight", _packed(native, _EMBEDDING, specs[_EMBEDDING], options)
        else:
            shape = native.checkpoint.tensors[embedding].shape
            yield "output.weight", _plain(native, embedding, shape, options.dtype)
    for name, factors in metadata.rope_tensors(form).items():
        yield name, _Stored(tuple(factors.shape), Type.F32, factors.clone)


def _plain(
    native: NativeCheckpoint, name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> _Stored:
    """What is not quantized: vectors in float32, matrices in `dtype`."""
    order = _row_order(native.form, name)
    # Gemma multiplies by one plus the weight, llama.cpp by what is stored.
    shift = 1 if native.form.model_type in metadata.GEMMA and name.endswith("norm.weight") else 0
    kind = torch.float32 if len(shape) == 1 else dtype

    def make() -> Tensor:
        tensor = native.tensor(name)
        return cast(name, (tensor.float() + shift if shift else tensor)[order], kind)

    return _Stored(shape, Type.F32 if len(shape) == 1 else _HALF[dtype], make)


def _packed(
    native: NativeCheckpoint, module: str, spec: QuantSpec, options: ExportOptions
) -> _Stored:
    """A quantized module in the smallest type that holds it."""
    shape, order = native.shape(module), _row_order(native.form, f"{module}.weight")
    as_q2_k = options.gguf_type == "q2_k" and module in native.form.linears and spec.bits == 2
    pack = pack_q2_k if as_q2_k else pack_q4_1

    def packed() -> Tensor:
        names = (f"{module}.{part}" for part in ("weight", *_PARAMETERS))
        linear = quantized_linear_from({n: native.tensor(n) for n in names}, module, spec)
        codes, scale, zero_point = linear.codes, linear.scale, linear.zero_point
        return pack(
            replace(linear, codes=codes[order], scale=scale[order], zero_point=zero_point[order])
        )

    def dense() -> Tensor:
        base = replace(native, adapter=None)
        return cast(module, base.dense_weight(module, options.dtype)[order], options.dtype)

    if spec.bits == 8:
        return _Stored(shape, _HALF[options.dtype], dense)
    return _Stored(shape, Type.Q2_K if as_q2_k else Type.Q4_1, packed)


def _factors(form: NativeForm, adapter: PeftFolder) -> Iterator[tuple[str, _Stored]]:
    """Both factors of every adapted linear with their names."""
    name_of = _names(form)
    for module in sorted(adapter.linears):
        name, order = f"{module}.weight", _row_order(form, f"{module}.weight")
        a, b = adapter.factors([module])[module]
        first = _factor_later(adapter, module, 0, slice(None))
        second = _factor_later(adapter, module, 1, order)
        yield f"{name_of(name)}.lora_a", _Stored(tuple(a.shape), Type.F32, first)
        yield f"{name_of(name)}.lora_b", _Stored(tuple(b.shape), Type.F32, second)


def _factor_later(
    adapter: PeftFolder, module: str, index: int, order: Tensor | slice
) -> Callable[[], Tensor]:
    return lambda: adapter.factors([module])[module][index].float()[order]


def _row_order(form: NativeForm, name: str) -> Tensor | slice:
    """Where llama.cpp wants the rows of a tensor, as an index into transformers' order.

    llama.cpp's Llama rotates pairs of neighbours, transformers' the first half of a head with the
    second.
    """
    if metadata.ARCHITECTURES[form.model_type] != gguf.MODEL_ARCH.LLAMA:
        return slice(None)
    config = metadata.configuration(form)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = heads.get(name.split(".")[-2])
    if count is None:
        return slice(None)
    rows = torch.arange(count * metadata.head_dim(config))
    return rows.view(count, 2, -1).transpose(1, 2).flatten()
