"""From the work folder to the published checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from rilq.converter import workdir
from rilq.converter.adapters import AdapterSpec
from rilq.converter.alternatives import alternative_file
from rilq.converter.merge import merged_codes, merged_grid
from rilq.converter.outer import SOURCE_FILE, saved_outer
from rilq.converter.workdir import WorkDir
from rilq.formats.checkpoint import Checkpoint
from rilq.formats.integer_base import write_zero_points
from rilq.formats.lora import write_peft_adapter
from rilq.formats.native import RilqConfig
from rilq.formats.resq.config import ResqConfig
from rilq.formats.shard import read_header
from rilq.formats.shard_writer import TensorLayout, write_shard
from rilq.formats.verify import file_hash, write_manifest
from rilq.formats.writer import (
    copy_side_files,
    open_staging,
    plan_shards,
    publish,
    shard_names,
    write_config,
    write_index,
)
from rilq.progress import Reporter

_GRID = ("weight_scale", "zero_point")  # the tensors of a linear that any training changes


class QuantizedParts:
    """The quantized checkpoint as the work folder holds it, with or without the training merged.

    Args:
        work: with all layers done.
        layers: number of decoder layers.
        trained: what was trained, by `<linear>.<part>`, float32; None to merge nothing.
        spec: of the adapters among it.
        bits: of linears that were given more than the base's (bit_choice.py).
    """

    def __init__(
        self,
        work: WorkDir,
        layers: int,
        trained: Mapping[str, Tensor] | None = None,
        spec: AdapterSpec | None = None,
        *,
        bits: Mapping[str, int] | None = None,
    ) -> None:
        self.files = [saved_outer(work)]
        self.files += [work.file(f"layer-{i:04d}.safetensors") for i in range(layers)]
        self.spec = spec
        self._trained: dict[str, dict[str, Tensor]] = {}
        for name, value in (trained or {}).items():
            linear, _, part = name.rpartition(".")
            self._trained.setdefault(linear, {})[part] = value
        self.layout: dict[str, TensorLayout] = {}
        self._file_of: dict[str, Path] = {}
        for path in self.files:
            self._take(path)
        for more in sorted(set((bits or {}).values())):
            names = {name for name, value in (bits or {}).items() if value == more}
            for index in range(layers):
                self._take(work.file(alternative_file(index, more)), names)

    def _take(self, path: Path, linears: set[str] | None = None) -> None:
        """Find tensors in this file, if given only those of some linears, and nowhere else."""
        for name, info in read_header(path).tensors.items():
            if linears is None or name.rpartition(".")[0] in linears:
                self.layout[name] = TensorLayout(info.dtype, info.shape)
                self._file_of[name] = path

    def outer(self) -> dict[str, Tensor]:
        """Embedding, final norm and head."""
        return load_file(self.files[0])

    def layer(self, index: int) -> dict[str, Tensor]:
        """All tensors of one decoder layer."""
        tensors = load_file(self.files[index + 1])
        for name in tensors:
            if self._file_of[name] != self.files[index + 1]:
                tensors[name] = self._stored(name)
        for linear in {name.rpartition(".")[0] for name in tensors} & self._trained.keys():
            tensors |= self._merged_grid(linear, tensors)
            codes = f"{linear}.weight"
            tensors[codes] = self._merged_codes(linear, tensors[codes])
        return tensors

    def tensor(self, name: str) -> Tensor:
        """One tensor, as it is stored in the output."""
        linear, _, part = name.rpartition(".")
        if linear in self._trained and part in _GRID:
            grid = {key: self._stored(key) for key in (f"{linear}.{p}" for p in _GRID)}
            return self._merged_grid(linear, grid)[name]
        if linear in self._trained and part == "weight":
            return self._merged_codes(linear, self._stored(name))
        return self._stored(name)

    def _stored(self, name: str) -> Tensor:
        with safe_open(self._file_of[name], framework="pt") as file:
            value: Tensor = file.get_tensor(name)
            return value

    def _merged_grid(self, linear: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        keys = [f"{linear}.{part}" for part in _GRID]
        grid = merged_grid(tensors[keys[0]], tensors[keys[1]], self._trained[linear], self.spec)
        return dict(zip(keys, grid, strict=True))

    def _merged_codes(self, linear: str, words: Tensor) -> Tensor:
        shift = self._trained[linear].get("code_shift")
        return words if shift is None else merged_codes(words, shift)


def integer_base(
    work: WorkDir, layers: int, trained: Mapping[str, Tensor], bits: Mapping[str, int]
) -> QuantizedParts:
    """The base with its trained scales, without its adapter; arguments as of `QuantizedParts`."""
    scales = {name: t for name, t in trained.items() if name.endswith(".log_scale")}
    return QuantizedParts(work, layers, scales, bits=bits)


def write_output(
    parts: QuantizedParts,
    checkpoint: Checkpoint,
    work: WorkDir,
    *,
    output: Path,
    quantization: RilqConfig | ResqConfig,
    max_shard_size: int,
    manifest: Mapping[str, Any],
    lora: tuple[AdapterSpec, Mapping[str, Tensor]] | None,
    integer_base: QuantizedParts | None,
    report: Reporter,
) -> None:
    """Write the checkpoint beside its place, shard by shard, and publish it by one rename.

    Args:
        parts: what to write.
        manifest: content of `rilq.json` but for the checksums.
        lora: a plain LoRA to keep beside the base, as a PEFT folder.
        integer_base: what is merged in `parts` without its adapter, which is then `lora`; its
            zero-points are kept.
    """
    shards = plan_shards({n: t.nbytes for n, t in parts.layout.items()}, max_shard_size)
    names = shard_names(len(shards))
    done = {record.unit for record in work.stage("shards")}
    staging = open_staging(output, work.run_id, keep=done)
    places = {Path(key).parent for record in work.stage("shards") for key in record.files}
    if elsewhere := places - {staging}:  # the output folder was another one then
        work.drop("shards")
        done = set()
        for folder in elsewhere:
            if folder.name.endswith(f".{work.run_id}.staging"):  # surely ours
                shutil.rmtree(folder, ignore_errors=True)
    report.stage("write", len(shards), "shard")
    for count, (name, members) in enumerate(zip(names, shards, strict=True), start=1):
        if name not in done:
            layout = {member: parts.layout[member] for member in members}
            write_shard(staging / name, layout, parts.tensor)
            facts: dict[str, Any] = {}
            work.commit("shards", name, facts, files={staging / name: file_hash(staging / name)})
        report.step(count)
    if len(shards) > 1:
        weight_map = {m: name for name, ms in zip(names, shards, strict=True) for m in ms}
        write_index(staging, weight_map, sum(t.nbytes for t in parts.layout.values()))
    write_config(staging, checkpoint.config, quantization, _dtype(work))
    side = [name for name in checkpoint.side_files() if name != "config.json"]
    copy_side_files({name: checkpoint.source.path(name) for name in side}, staging)
    if lora is not None:
        spec, adapters = lora
        base = staging
        if integer_base is not None:
            linears = [name.removesuffix(".a") for name in adapters if name.endswith(".a")]
            base = write_zero_points(staging, linears, integer_base.layout, integer_base.tensor)
        write_peft_adapter(base, adapters, rank=spec.rank, alpha=spec.alpha)
    write_manifest(staging, manifest)
    workdir.reached("publish:before")
    publish(staging, output)
    workdir.reached("publish:after")


def _dtype(work: WorkDir) -> torch.dtype:
    """dtype of what is not quantized: that of the source's embedding."""
    outer = read_header(work.file(SOURCE_FILE)).tensors.values()
    return max(outer, key=lambda info: info.nbytes).dtype
