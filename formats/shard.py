"""One safetensors file: its header checked before anything is allocated, its tensors read.

The file is 8 bytes of header length (little-endian), that many bytes of JSON, and the bytes of the
tensors without holes: https://huggingface.co/docs/safetensors/index#format
"""

import json
import math
import os
import stat
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rilq.errors import CheckpointError, printable

HEADER_CAP = 100_000_000  # bytes; the cap of the reference implementation
NAME_CAP = 1_000  # characters; the longest name seen in a published checkpoint is under 200
MAX_DIMENSIONS = 64  # what torch's own loops take
INT64_MAX = 2**63 - 1

DAMAGED = "the file is damaged; download it again"

# In the reference implementation's order, which is also its order of tensors in a file (from the
# widest down). Codes without a torch dtype are legal but cannot be read here; older torch releases
# lack some float8 kinds.
_CODES: dict[str, torch.dtype | None] = {
    "BOOL": torch.bool,
    "F4": None,
    "F6_E2M3": None,
    "F6_E3M2": None,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": getattr(torch, "float8_e8m0fnu", None),
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
CODE_OF: dict[torch.dtype, str] = {d: code for code, d in _CODES.items() if d is not None}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `begin` and `end` are byte offsets from the start of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's elements."""
        return self.end - self.begin


@dataclass(frozen=True)
class ShardHeader:
    """A header that has passed every check.

    Attributes:
        tensors: name to place, in the header's order.
        metadata: the header's `__metadata__`.
        file_size: bytes of the whole file.
        digest: xxh3 of the header's bytes, its length included.
    """

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    file_size: int
    digest: str


def listing(names: Sequence[str], limit: int = 10) -> str:
    """Up to `limit` names, fit for a terminal, and how many there are if that is not all."""
    shown = ", ".join(printable(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown}, ... ({len(names)} in all)"


def _fail(shard: str, problem: str, remedy: str = DAMAGED) -> NoReturn:
    raise CheckpointError(f"{printable(shard, 400)}: {problem}\n  {remedy}")


def header_length(head8: bytes, file_size: int, shard: str) -> int:
    """The length of the JSON header, from a file's first 8 bytes.

    Args:
        head8: the first 8 bytes, or fewer if the file is shorter.
        file_size: bytes of the whole file.
        shard: the file's name for messages.

    Raises:
        CheckpointError: the length cannot be right; a git-lfs pointer, a web page and a pickle are
            recognised and named.
    """
    if len(head8) < 8 or file_size < 8:
        _fail(shard, f"has {file_size} bytes, needs at least 8 for the length of its header")
    length = int.from_bytes(head8[:8], "little")
    if length <= min(HEADER_CAP, file_size - 8):
        return length
    start = head8.lstrip().lower()
    if start.startswith(b"version"):
        _fail(
            shard,
            f"is a git-lfs pointer ({file_size} bytes) and not the weights themselves",
            "run `git lfs pull` in the checkpoint's folder",
        )
    if start.startswith((b"<!", b"<?xml", b"<html", b"<head", b"<body")):
        _fail(
            shard,
            "is an HTML page (of a login or a proxy error?) and not a safetensors file",
            "download the file again",
        )
    if head8.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")):
        _fail(
            shard,
            "is a PyTorch pickle under another name and not a safetensors file",
            "convert it to safetensors; pickles can run code and are never opened here",
        )
    if length > file_size - 8:
        _fail(shard, f"header says {length} bytes, file has {file_size}")
    _fail(shard, f"header says {length} bytes, at most {HEADER_CAP} are accepted")


def parse_header(head: bytes, file_size: int, shard: str) -> ShardHeader:
    """Check a safetensors header in full and turn it into offsets that can be trusted.

    Args:
        head: the file's first 8 + N bytes, N being `header_length`.
        file_size: bytes of the whole file.
        shard: the file's name for messages.

    Raises:
        CheckpointError: the header is not valid, or does not describe exactly `file_size` bytes.
    """
    length = header_length(head[:8], file_size, shard)
    if len(head) < 8 + length:
        _fail(shard, f"header has {len(head) - 8} bytes, needs {length}")
    entries = _parse_json(head[8 : 8 + length], shard)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        _fail(shard, "__metadata__ in the header is not a table of texts")
    data = 8 + length
    tensors = {name: _tensor_info(name, entry, data, shard) for name, entry in entries.items()}
    _check_cover(tensors.values(), data, file_size, shard)
    return ShardHeader(tensors, metadata, file_size, xxhash.xxh3_128_hexdigest(head[:data]))


def _parse_json(text: bytes, shard: str) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            _fail(shard, f"tensor {printable(twice)} is in the header twice")
        return table

    def integer(digits: str) -> int:
        if len(digits) > 20:  # 2**64 has 20 digits; longer ones are slow to convert, and wrong
            raise ValueError(f"a number of {len(digits)} digits")
        return int(digits)

    try:
        table = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=once,
            parse_int=integer,
            parse_constant=lambda word: _fail(shard, f"header holds {word}"),
        )
    except RecursionError:
        _fail(shard, "header is nested too deeply")
    except ValueError as err:  # also UnicodeDecodeError and JSONDecodeError
        raise CheckpointError(
            f"{printable(shard, 400)}: header is not valid JSON: {printable(str(err))}\n  {DAMAGED}"
        ) from err
    if not isinstance(table, dict):
        _fail(shard, f"header is a JSON {type(table).__name__}, not an object")
    return table


def _sizes(value: object) -> tuple[int, ...] | None:
    """A list of integers from 0 up, or None for anything else (`True` is no integer here)."""
    if not isinstance(value, list) or not all(type(n) is int and n >= 0 for n in value):
        return None
    return tuple(value)


def _tensor_info(name: str, entry: object, data: int, shard: str) -> TensorInfo:
    """Check one tensor's entry by itself; `data` is where the tensors' bytes begin."""
    label = f"tensor {printable(name)}"
    if len(name) > NAME_CAP or not name.isprintable():
        _fail(
            shard,
            f"{label}: its name is over {NAME_CAP} characters or holds control characters",
            "the file was not written by a sane program; do not use it",
        )
    if not isinstance(entry, dict):
        _fail(shard, f"{label}: its header entry is not an object")
    code = entry.get("dtype")
    dtype = _CODES.get(code) if isinstance(code, str) else None
    if dtype is None:
        _fail(
            shard,
            f"{label}: dtype {printable(str(code), 40)} is "
            + ("not supported" if str(code) in _CODES else "unknown"),
            f"readable are {', '.join(CODE_OF.values())}; take a 16-bit version of the model",
        )
    shape, offsets = _sizes(entry.get("shape")), _sizes(entry.get("data_offsets"))
    if shape is None or len(shape) > MAX_DIMENSIONS:
        _fail(shard, f"{label}: its shape is not a list of at most {MAX_DIMENSIONS} sizes")
    if offsets is None or len(offsets) != 2:
        _fail(shard, f"{label}: its data_offsets are not two positions")
    if 0 in shape:
        _fail(
            shard, f"{label}: shape {list(shape)} is empty", "a weight needs elements; " + DAMAGED
        )
    needed = math.prod(shape) * dtype.itemsize
    if needed > INT64_MAX:
        _fail(shard, f"{label}: shape {list(shape)} overflows 64 bits")
    if offsets[1] < offsets[0]:
        _fail(shard, f"{label}: its data end at {offsets[1]}, before they begin at {offsets[0]}")
    if offsets[1] - offsets[0] != needed:
        _fail(
            shard,
            f"{label}: shape {list(shape)} of {code} needs {needed} bytes, "
            f"has {offsets[1] - offsets[0]}",
        )
    return TensorInfo(name, dtype, shape, data + offsets[0], data + offsets[1])


def _check_cover(infos: Iterable[TensorInfo], data: int, file_size: int, shard: str) -> None:
    """Check that the tensors cover the file from `data` to its end, each byte exactly once."""
    ordered = sorted(infos, key=lambda info: (info.begin, info.end))
    last = max(ordered, key=lambda info: info.end, default=None)
    if last is not None and last.end > file_size:
        _fail(
            shard,
            f"has {file_size} bytes, needs {last.end} (tensor {printable(last.name)} ends there)",
            "the file is truncated or damaged; download it again",
        )
    position, previous = data, "the header"
    for info in ordered:
        if info.begin != position:
            kind = "overlaps" if info.begin < position else "leaves a hole after"
            _fail(shard, f"tensor {printable(info.name)} {kind} {previous}")
        position, previous = info.end, f"tensor {printable(info.name)}"
    if position != file_size:
        _fail(shard, f"has {file_size} bytes, needs {position}: something was added after the data")


def read_head(path: Path, shard: str | None = None) -> tuple[bytes, int]:
    """A file's first 8 + N bytes, N being its header's length, and the size of the whole file.

    Raises:
        CheckpointError: the file cannot be read, or its header length cannot be right.
    """
    shard = shard or path.name
    try:
        with _open_regular(path, shard) as file:
            size = os.fstat(file.fileno()).st_size
            head8 = file.read(8)
            return head8 + file.read(header_length(head8, size, shard)), size
    except OSError as err:
        raise CheckpointError(
            f"{printable(shard, 400)}: cannot be read: {err.strerror or err}\n"
            "  check that the file exists and that you may read it"
        ) from err


def _open_regular(path: Path, shard: str) -> BinaryIO:
    if not stat.S_ISREG(path.stat().st_mode):  # opening a named pipe would wait for ever
        _fail(shard, "is not a regular file", "put the checkpoint's own file in its place")
    return path.open("rb")


def read_header(path: Path) -> ShardHeader:
    """Read and check the header of a safetensors file; see `parse_header`."""
    head, size = read_head(path)
    return parse_header(head, size, path.name)


def read_tensors(
    path: Path, header: ShardHeader, names: Iterable[str], shard: str | None = None
) -> dict[str, Tensor]:
    """Views of some tensors in a private memory mapping of the file; nothing is read yet.

    The mapping lives as long as any tensor of this call: pages that were touched leave memory only
    when all of them are dropped. So call it anew for each unit of work.

    Args:
        path: the file.
        header: what `parse_header` said about it.
        names: tensors of `header`.
        shard: the file's name for messages; the name of `path` if None.

    Raises:
        CheckpointError: the file is gone, or is not what `header` describes.
    """
    shard = shard or path.name
    head, size = read_head(path, shard)
    if (size, xxhash.xxh3_128_hexdigest(head)) != (header.file_size, header.digest):
        _fail(
            shard,
            "its header is not the one that was checked at the start",
            "the file changed meanwhile; do not write to a checkpoint in use, and start again",
        )
    try:
        with safe_open(path, framework="pt", device="cpu") as handle:
            return {name: handle.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as err:
        raise CheckpointError(
            f"{printable(shard, 400)}: cannot be read: {printable(str(err))}\n  {DAMAGED}"
        ) from err


def raw_bytes(tensor: Tensor) -> memoryview:
    """A tensor's elements as bytes, row after row; no copy for a contiguous tensor on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    content: memoryview = flat.view(torch.uint8).numpy().data
    return content


def tensor_hash(tensor: Tensor) -> str:
    """xxh3 (128 bits, hexadecimal) of a tensor's bytes; dtype and shape do not enter."""
    return xxhash.xxh3_128_hexdigest(raw_bytes(tensor))
