"""One safetensors file, written durably with one tensor at a time in memory."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from rilq.errors import CheckpointError
from rilq.formats.durable import atomic_file
from rilq.formats.shard import CODE_OF, parse_header, raw_bytes

_HF_METADATA: Mapping[str, str] = {"format": "pt"}  # transformers refuses a file without it
_RANK = {dtype: rank for rank, dtype in enumerate(CODE_OF)}  # the widest dtype comes last


@dataclass(frozen=True)
class TensorLayout:
    """What a tensor looks like before it exists."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's elements."""
        return math.prod(self.shape) * self.dtype.itemsize


def check_layout(
    tensors: Mapping[str, Tensor], layout: Mapping[str, TensorLayout], says: str
) -> None:
    """That a checkpoint has the tensors that its configuration asks for.

    Args:
        tensors: as read.
        layout: what they should look like.
        says: what in the configuration asks for that, to be followed by "need".

    Raises:
        CheckpointError: a tensor is missing, or has another dtype or shape.
    """
    for key, expected in layout.items():
        found = tensors.get(key)
        if found is None:
            raise CheckpointError(
                f"{key}: missing from the checkpoint\n  download the checkpoint again"
            )
        if found.dtype != expected.dtype or tuple(found.shape) != expected.shape:
            raise CheckpointError(
                f"{key}: {found.dtype} {list(found.shape)}, but {says} need {expected.dtype} "
                f"{list(expected.shape)}\n"
                "  config.json and the tensors do not belong together; download both again"
            )


def _described(tensor: Tensor | TensorLayout) -> str:
    return f"{CODE_OF.get(tensor.dtype, tensor.dtype)} {list(tensor.shape)}"


def _header_bytes(layout: Mapping[str, TensorLayout], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, tensor in layout.items():
        end = position + tensor.nbytes
        entries[name] = {
            "dtype": CODE_OF[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)  # so that the data begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def write_shard(
    path: Path,
    layout: Mapping[str, TensorLayout],
    produce: Callable[[str], Tensor],
    metadata: Mapping[str, str] = _HF_METADATA,
) -> dict[str, str]:
    """Durably write one safetensors file, with one tensor at a time in memory.

    Tensors lie in the order of `layout`. Listed from the widest dtype to the narrowest, each begins
    at a multiple of its element size, which some memory-mapping readers want.

    Args:
        path: where the file appears once it is whole.
        layout: name to dtype and shape, in the order of the file.
        produce: called once per name, in that order; returns the tensor, on any device.
        metadata: the header's `__metadata__`.

    Returns:
        name to `tensor_hash`.

    Raises:
        CheckpointError: a name or shape that `parse_header` would refuse.
        OutputError: the file cannot be written; nothing is left behind.
        ValueError: `produce` returned something else than `layout` declares.
    """
    head = _header_bytes(layout, metadata)
    size = len(head) + sum(tensor.nbytes for tensor in layout.values())
    parse_header(head, size, path.name)  # never write what we would not read
    hashes: dict[str, str] = {}
    with atomic_file(path) as file:
        file.write(head)
        for name, declared in layout.items():
            tensor = produce(name)
            if tensor.dtype != declared.dtype or tuple(tensor.shape) != declared.shape:
                raise ValueError(
                    f"{path.name}: {name}: {_described(declared)} was declared, "
                    f"{_described(tensor)} was produced"
                )
            content = raw_bytes(tensor)
            hashes[name] = xxhash.xxh3_128_hexdigest(content)
            file.write(content)
            del tensor, content  # before the next one is produced
    return hashes


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] = _HF_METADATA
) -> dict[str, str]:
    """Durably write tensors that are in memory; same bytes as `safetensors.torch.save_file`.

    The order is the reference implementation's: from the widest dtype down, then by name.

    Returns:
        name to `tensor_hash`.
    """
    order = sorted(tensors, key=lambda name: (-_RANK[tensors[name].dtype], name))
    layout = {n: TensorLayout(tensors[n].dtype, tuple(tensors[n].shape)) for n in order}
    return write_shard(path, layout, tensors.__getitem__, metadata)
