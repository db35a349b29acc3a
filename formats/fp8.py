"""Sources in 8-bit floating point with a scale for each block, read as if they were dense.

`X.weight` is float8 (e4m3) `[out, in]` and `X.weight_scale_inv` has one number for each block of
`weight_block_size`, at the edges for what is left of one: `W = weight * scale` of its block. Many
of the largest models are published so and in no other way (DeepSeek-V3).
"""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil
from typing import Any

import torch
import xxhash
from torch import Tensor

from rilq.errors import CheckpointError, NonFiniteError
from rilq.formats.checkpoint import SOURCE_DTYPES, Checkpoint
from rilq.formats.shard import TensorInfo, listing
from rilq.formats.source import Source
from rilq.progress import Reporter, SilentReporter

FP8 = torch.float8_e4m3fn
METHOD = "fp8"  # quant_method in config.json
SCALE = "_scale_inv"  # after the weight's name


def open_source_checkpoint(
    source: Source,
    *,
    report: Reporter = SilentReporter(),  # noqa: B008 - stateless
    dtypes: frozenset[torch.dtype] = SOURCE_DTYPES,
) -> Checkpoint:
    """`Checkpoint.open`, which also takes block-wise FP8 and gives it dequantized.

    Raises:
        CheckpointError: as `Checkpoint.open`; FP8 of another kind.
    """
    opened = Checkpoint.open(source, report=report, dtypes=dtypes | {FP8})
    quantization = opened.config.get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == METHOD:
        return BlockFp8Checkpoint(opened, quantization)
    opened.check_dtypes(dtypes)
    return opened


class BlockFp8Checkpoint(Checkpoint):
    """A checkpoint that gives the dequantized weights of an FP8 one by their names.

    They are computed in float32 and rounded once, to the dtype that config.json names. While it
    works, `read` holds the tensors that it will return, and a row of blocks in float32.

    `bytes_read`, the digests and file signatures are those of the source's own bytes; the hash of a
    weight is of its own and its scales'. `config` has no `quantization_config`, and `tensors` no
    scales; a weight's size there is that of what is read.

    Args:
        source: opened; not used any more by anybody else.
        quantization: `quantization_config` of its config.json.

    Raises:
        CheckpointError: not block-wise e4m3, or weights and scales do not belong together.
    """

    def __init__(self, source: Checkpoint, quantization: dict[str, Any]) -> None:
        config = {k: v for k, v in source.config.items() if k != "quantization_config"}
        super().__init__(
            source.source, config, source.headers, source.shard_of, source.digests, source.report
        )
        self._source, self.stop = source, source.stop
        self._where = f"{source.source.label}/config.json: quantization_config"
        self._block = self._block_size(quantization)
        named = config.get("dtype") or config.get("torch_dtype")
        found = getattr(torch, str(named), None)
        self._dtype = found if found in SOURCE_DTYPES else torch.bfloat16
        self._scales = {n: n + SCALE for n, info in source.tensors.items() if info.dtype == FP8}
        self._check_scales()
        size = self._dtype.itemsize
        self.tensors = {
            name: TensorInfo(name, self._dtype, info.shape, 0, info.nbytes * size)
            if name in self._scales
            else info
            for name, info in source.tensors.items()
            if name.removesuffix(SCALE) not in self._scales or name in self._scales
        }

    def _block_size(self, quantization: dict[str, Any]) -> tuple[int, int]:
        size, kind = quantization.get("weight_block_size"), quantization.get("fmt", "e4m3")
        if (
            kind != "e4m3"
            or not isinstance(size, list)
            or len(size) != 2
            or not all(type(n) is int and n > 0 for n in size)
        ):
            raise CheckpointError(
                f"{self._where}: already quantized (fp8, fmt {kind!r}, weight_block_size {size!r})"
                "; expected e4m3 with a scale for each block, such as [128, 128]\n"
                "  give the original 16-bit checkpoint"
            )
        return size[0], size[1]

    def _check_scales(self) -> None:
        found = self._source.tensors
        wrong = []
        for name, scale in self._scales.items():
            shape = found[name].shape
            blocks = tuple(ceil(n / size) for n, size in zip(shape, self._block, strict=False))
            info = found.get(scale)
            if len(shape) != 2 or info is None or info.shape != blocks:
                wrong.append(scale)
            elif info.dtype not in SOURCE_DTYPES:
                wrong.append(scale)
        wrong += [
            n for n in found if n.endswith(SCALE) and n.removesuffix(SCALE) not in self._scales
        ]
        if wrong:
            raise CheckpointError(
                f"{self._where}: not a scale for each block of {list(self._block)} of a weight in "
                f"FP8: {listing(wrong)}\n  download the checkpoint again"
            )

    def source_names(self, names: Iterable[str]) -> list[str]:
        """What `read` takes from the source to give some tensors: weights with their scales."""
        known = self._known(names)
        return [each for n in known for each in (n, *filter(None, [self._scales.get(n)]))]

    def source_bytes(self, names: Iterable[str]) -> int:
        """Bytes of the files that `read` takes to give some tensors."""
        return self._source.nbytes(self.source_names(names))

    def read(self, names: Iterable[str], *, check_finite: bool = True) -> dict[str, Tensor]:
        """Some tensors, dequantized.

        Raises:
            CheckpointError: as `Checkpoint.read`.
            NonFiniteError: a tensor holds NaN or infinity, or does not fit its dtype.
        """
        wanted = self._known(names)
        plain = [name for name in wanted if name not in self._scales]
        found = self._source.read(plain, check_finite=check_finite)
        self.hashes |= {name: self._source.hashes[name] for name in plain}
        for name in wanted:
            if name not in self._scales:
                continue
            scale = self._scales[name]
            weight, scales = self._source.read([name, scale], check_finite=check_finite).values()
            both = self._source.hashes[name] + self._source.hashes[scale]
            self.hashes[name] = xxhash.xxh3_128_hexdigest(both.encode())
            found[name] = dequantize_blocks(weight, scales, self._block, self._dtype)
            if check_finite and not all(map(torch.isfinite, torch.aminmax(found[name]))):
                raise NonFiniteError(
                    f"{name}: too large for {self._dtype} once it is dequantized\n"
                    "  the model cannot be right; download these files again"
                )
        with self._counting:
            self.bytes_read = self._source.bytes_read
        return {name: found[name] for name in wanted}


def dequantize_blocks(
    weight: Tensor, scales: Tensor, block: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """`weight * scale` of each block, computed in float32.

    Args:
        weight: `[out, in]` float8.
        scales: `[ceil(out / block[0]), ceil(in / block[1])]`.
        dtype: of the result.
    """
    dense = torch.empty(weight.shape, dtype=dtype)
    for row, own in enumerate(scales.float()):
        rows = slice(row * block[0], (row + 1) * block[0])
        wide = own.repeat_interleave(block[1])[: weight.shape[1]]  # one scale for each column
        dense[rows] = (weight[rows].float() * wide).to(dtype)
    return dense
