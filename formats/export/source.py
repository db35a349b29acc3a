"""The native checkpoint that exports are made from: what it is, and its tensors one at a time."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from rilq.errors import CheckpointError
from rilq.formats.checkpoint import SOURCE_DTYPES, Checkpoint
from rilq.formats.lora import ADAPTER_FOLDER, KEY_PREFIX
from rilq.formats.native import QUANT_METHOD, RilqConfig, native_config, native_layout
from rilq.formats.packed_linear import row_chunks
from rilq.formats.packing import dequantize_packed
from rilq.formats.peft_folder import CONFIG_NAME, PeftFolder
from rilq.formats.resq import config as resq
from rilq.formats.shard import listing, tensor_hash
from rilq.formats.source import LocalFolder
from rilq.formats.spec import EXPERTS, QuantSpec
from rilq.formats.verify import MANIFEST_NAME, read_manifest
from rilq.progress import Reporter

DECODER = ".layers."  # in the name of every module of a decoder layer, and of no other


@dataclass(frozen=True)
class NativeForm:
    """What there is to export, as far as it is known before the first tensor.

    Attributes:
        label: what messages call the checkpoint.
        config: `config.json` without the quantization.
        linears: the decoder's quantized linears by full name.
        kept: its linears that stay in 16 bits.
        outer: embedding and head, where they are quantized.
        lora: an adapter lies beside the base and is not merged.
        recipe: the conversion's options, as `rilq.json` records them.
    """

    label: str
    config: Mapping[str, Any]
    linears: Mapping[str, QuantSpec]
    kept: tuple[str, ...]
    outer: Mapping[str, QuantSpec]
    lora: bool
    recipe: Mapping[str, Any]

    @property
    def is_mixture(self) -> bool:
        """Whether there are experts among its linears."""
        return any(EXPERTS in name for name in (*self.linears, *self.kept))

    @property
    def model_type(self) -> str:
        """The architecture, as transformers calls it."""
        return str(self.config.get("model_type"))


@dataclass(frozen=True)
class NativeCheckpoint:
    """A native checkpoint with its headers, `config.json` and `rilq.json` checked.

    Attributes:
        form: what it is.
        folder: where it is.
        checkpoint: its tensors as they are stored; what is read of it is hashed.
        quantization: `quantization_config`.
        manifest: `rilq.json`.
        adapter: the LoRA beside it, if there is one.
    """

    form: NativeForm
    folder: Path
    checkpoint: Checkpoint
    quantization: RilqConfig
    manifest: Mapping[str, Any]
    adapter: PeftFolder | None

    @classmethod
    def open(cls, folder: Path, report: Reporter) -> "NativeCheckpoint":
        """Check everything but the weights; reads headers and JSON.

        Raises:
            CheckpointError: it is not a native checkpoint, or is damaged or incomplete.
        """
        checkpoint = Checkpoint.open(
            LocalFolder(folder), report=report, dtypes=SOURCE_DTYPES | {torch.int32}
        )
        raw = checkpoint.config.get("quantization_config")
        if isinstance(raw, dict) and raw.get("quant_method") == resq.QUANT_METHOD:
            raise CheckpointError(
                f"{folder}: a ResQ checkpoint (quant_method {resq.QUANT_METHOD!r} in config.json), "
                "which no other format can hold: its inputs and cache are quantized and rotated "
                "when it runs\n"
                "  load it with transformers after `import rilq`, or convert the model again with "
                "--method rilq to export it"
            )
        if not isinstance(raw, dict) or raw.get("quant_method") != QUANT_METHOD:
            raise CheckpointError(
                f"{folder}: is not a checkpoint in rilq's native format (quant_method "
                f"{QUANT_METHOD!r} in config.json)\n  give a folder that `rilq convert` has written"
            )
        quantization = native_config(checkpoint)
        assert quantization is not None, "there is a quantization_config"
        manifest = read_manifest(folder)
        if unlisted := [n for n in checkpoint.tensors if n not in manifest["tensors"]]:
            raise CheckpointError(
                f"{folder}: tensors that {MANIFEST_NAME} does not list: {listing(unlisted)}\n"
                "  the files are of different checkpoints; copy the folder again"
            )
        present = {path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors")}
        weights = [name for name in manifest["files"] if name.endswith(".safetensors")]
        if missing := [name for name in weights if name not in present]:
            raise CheckpointError(
                f"{folder}: missing, though {MANIFEST_NAME} lists them: {listing(missing)}\n"
                "  copy the folder again, with all that is in it"
            )
        specs = _specs(checkpoint, quantization)
        shapes = _linear_shapes(checkpoint, specs)
        adapter = None
        if (folder / ADAPTER_FOLDER / CONFIG_NAME).is_file():
            adapter = PeftFolder.open(folder / ADAPTER_FOLDER, shapes)
        form = NativeForm(
            label=str(folder),
            config={k: v for k, v in checkpoint.config.items() if k != "quantization_config"},
            linears={name: spec for name, spec in specs.items() if DECODER in name},
            kept=tuple(name for name in shapes if name not in specs),
            outer={name: spec for name, spec in specs.items() if DECODER not in name},
            lora=adapter is not None,
            recipe=manifest.get("recipe", {}),
        )
        return cls(form, folder, checkpoint, quantization, manifest, adapter)

    @property
    def specs(self) -> dict[str, QuantSpec]:
        """Every quantized module by full name."""
        return {**self.form.linears, **self.form.outer}

    @property
    def content_hash(self) -> str:
        """xxh3 (128 bits, hexadecimal) of the checksums of all files and tensors."""
        tables = {key: self.manifest[key] for key in ("files", "tensors")}
        return str(xxhash.xxh3_128_hexdigest(json.dumps(tables, sort_keys=True).encode()))

    def shape(self, module: str) -> tuple[int, int]:
        """`(rows, width)` of a quantized module's dense weight."""
        rows, groups = self.checkpoint.tensors[f"{module}.weight_scale"].shape
        return rows, groups * self.specs[module].group_size

    def tensor(self, name: str) -> Tensor:
        """One tensor as it is stored."""
        return self.checkpoint.read([name])[name]

    def dense_weight(self, module: str, dtype: torch.dtype) -> Tensor:
        """A quantized module's weight `[rows, width]`, with the adapter's part if it has one.

        Computed in float32 and rounded once; beside the result, memory for a bounded part of it.
        """
        bits = self.specs[module].bits
        words, scale, zero_point = (
            self.tensor(f"{module}.{part}") for part in ("weight", "weight_scale", "zero_point")
        )
        correction = self._correction(module)
        weight = torch.empty(self.shape(module), dtype=dtype)
        for rows in row_chunks(*weight.shape):
            part = dequantize_packed(words[rows], scale[rows], zero_point[rows], bits)
            if correction is not None:
                part += correction[0][rows] @ correction[1]
            weight[rows] = part
        return weight

    def _correction(self, module: str) -> tuple[Tensor, Tensor] | None:
        """`[rows, rank]` and `[rank, width]` float32, whose product the adapter adds; or None.

        Raises:
            CheckpointError: the adapter is not what was written.
        """
        if self.adapter is None or module not in self.adapter.linears:
            return None
        a, b = self.adapter.factors([module])[module]
        listed = self.manifest["tensors"]
        keys = [f"{KEY_PREFIX}{module}.lora_{letter}.weight" for letter in "AB"]
        if [tensor_hash(a), tensor_hash(b)] != [listed.get(key) for key in keys]:
            raise self._changed(keys)
        return self.adapter.scaling * b.float(), a.float()

    def check_read(self) -> None:
        """Compare what has been read so far with the checksums in `rilq.json`.

        Raises:
            CheckpointError: a tensor is not what was written.
        """
        listed = self.manifest["tensors"]
        wrong = [n for n, found in self.checkpoint.hashes.items() if listed[n] != found]
        if wrong:
            raise self._changed(wrong)

    def _changed(self, names: list[str]) -> CheckpointError:
        return CheckpointError(
            f"{self.folder}: not what {MANIFEST_NAME} says: {listing(names)}\n"
            "  the checkpoint is damaged; copy it again, or convert the model again"
        )


def _specs(checkpoint: Checkpoint, quantization: RilqConfig) -> dict[str, QuantSpec]:
    """Every quantized module with its spec, config.json and headers compared."""
    specs, wrong = {}, []
    for key in checkpoint.tensors:
        module, _, part = key.rpartition(".")
        if part != "weight_scale":
            continue
        spec, shape = _configured(module, quantization), checkpoint.tensors[key].shape
        if spec is None or len(shape) != 2:
            wrong.append(module)
            continue
        expected = native_layout(module, shape[0], shape[1] * spec.group_size, spec)
        found = {name: checkpoint.tensors.get(name) for name in expected}
        if any(
            info is None or (info.dtype, info.shape) != (expected[n].dtype, expected[n].shape)
            for n, info in found.items()
        ):
            wrong.append(module)
        else:
            specs[module] = spec
    if wrong:
        raise CheckpointError(
            f"{checkpoint.source.label}: not quantized as quantization_config in config.json says: "
            f"{listing(wrong)}\n  config.json and the tensors do not belong together; copy both "
            "again"
        )
    return specs


def _configured(module: str, quantization: RilqConfig) -> QuantSpec | None:
    if DECODER in module:
        return quantization.linear_spec(module)
    is_head = module.rpartition(".")[2] == "lm_head"
    return quantization.head_spec if is_head else quantization.embedding_spec


def _linear_shapes(
    checkpoint: Checkpoint, specs: Mapping[str, QuantSpec]
) -> dict[str, tuple[int, int]]:
    """`(out_features, in_features)` of every linear of the decoder layers, quantized or not."""
    shapes = {}
    for key, info in checkpoint.tensors.items():
        module, _, part = key.rpartition(".")
        if DECODER in module and part == "weight" and len(info.shape) == 2:
            rows, width = info.shape
            packed = specs.get(module)
            shapes[module] = (rows, width * 32 // packed.bits if packed else width)
    return shapes
