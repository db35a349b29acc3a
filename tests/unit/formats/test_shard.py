"""Claims about one safetensors file: what is refused, and what is written byte for byte."""

import json
import os
import random
import stat
import tracemalloc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import xxhash
from torch import Tensor

from rilq.errors import CheckpointError
from rilq.formats.shard import (
    HEADER_CAP,
    TensorInfo,
    header_length,
    parse_header,
    raw_bytes,
    read_head,
    read_header,
    read_tensors,
    tensor_hash,
)
from rilq.formats.shard_writer import TensorLayout, write_shard, write_tensors


def entry(
    shape: object = (2,), offsets: object = (0, 8), dtype: object = "F32", **more: object
) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def frame(header: object, data: bytes = b"", *, text: bytes | None = None) -> bytes:
    """A file of this header (an object, or literally `text`) and data."""
    text = json.dumps(header).encode() if text is None else text
    return len(text).to_bytes(8, "little") + text + data


def parse(content: bytes) -> dict[str, TensorInfo]:
    return parse_header(content, len(content), "s.safetensors").tensors


# --- refused headers -------------------------------------------------------------------------

EIGHT = bytes(8)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4976698672\n"
REFUSED: dict[str, tuple[bytes, list[str]]] = {
    "empty file": (b"", ["has 0 bytes", "needs at least 8", "download it again"]),
    "five bytes": (b"12345", ["has 5 bytes"]),
    "huge length": ((2**63 - 1).to_bytes(8, "little") + b"{}", [str(2**63 - 1), "file has 10"]),
    "all ones length": (b"\xff" * 8 + b"{}", ["header says", "file has 10"]),
    "length past the end": ((80_000_000).to_bytes(8, "little") + b"{}", ["80000000", "file has"]),
    "git-lfs pointer": (LFS, ["git-lfs pointer", "git lfs pull"]),
    "html page": (b"<!DOCTYPE html><html>502</html>", ["HTML page", "download"]),
    "html page after a blank": (b"\n<html><body>log in</body></html>", ["HTML page"]),
    "zipped pickle": (b"PK\x03\x04\x00\x00\x08\x08" + EIGHT, ["pickle", "convert it"]),
    "not JSON": (frame(None, text=b"{oops}"), ["not valid JSON", "download it again"]),
    "no header at all": (frame(None, text=b""), ["not valid JSON"]),
    "not UTF-8": (frame(None, text=b'{"\xff": 1}'), ["not valid JSON"]),
    "UTF-16": (frame(None, text="{}".encode("utf-16")), ["not valid JSON"]),
    "a list": (frame([1]), ["list, not an object"]),
    "NaN": (frame(None, text=b'{"w": NaN}'), ["NaN"]),
    "deep nesting": (frame(None, text=b"[" * 100_000), ["nested too deeply"]),
    "deep nesting in an entry": (frame(None, text=b'{"w":' * 100_000), ["nested too deeply"]),
    "a number of many digits": (
        frame(None, text=b'{"w": ' + b"9" * 1_000_000 + b"}"),
        ["1000000 digits"],
    ),
    "duplicate name": (
        frame(None, EIGHT, text=b'{"a.w":%b,"a.w":%b}' % ((json.dumps(entry()).encode(),) * 2)),
        ["tensor a.w", "twice"],
    ),
    "metadata of numbers": (frame({"__metadata__": {"a": 1}}), ["__metadata__"]),
    "metadata a list": (frame({"__metadata__": []}), ["__metadata__"]),
    "entry a list": (frame({"w": []}, EIGHT), ["tensor w", "not an object"]),
    "shape missing": (frame({"w": {"dtype": "F32", "data_offsets": [0, 8]}}, EIGHT), ["shape"]),
    "shape a number": (frame({"w": entry(2)}, EIGHT), ["tensor w", "shape"]),
    "shape of floats": (frame({"w": entry([2.0])}, EIGHT), ["tensor w", "shape"]),
    "shape of booleans": (frame({"w": entry([True], [0, 4])}, EIGHT), ["tensor w", "shape"]),
    "negative shape": (frame({"w": entry([-2])}, EIGHT), ["tensor w", "shape"]),
    "65 dimensions": (frame({"w": entry([1] * 64 + [2])}, EIGHT), ["tensor w", "shape"]),
    "empty shape": (frame({"w": entry([0, 4], [0, 0])}), ["tensor w", "[0, 4]", "empty"]),
    "shape mismatch": (frame({"w": entry([3])}, EIGHT), ["tensor w", "needs 12 bytes, has 8"]),
    "shape overflow": (
        frame({"w": entry([2**62, 2**62])}, EIGHT),
        ["tensor w", "overflows 64 bits"],
    ),
    "overflow that wraps to fit": (  # 2**62 * 4 bytes is 0 modulo 2**64
        frame({"w": entry([2**62, 1], [0, 0])}),
        ["tensor w", "overflows 64 bits"],
    ),
    "one offset": (frame({"w": entry(offsets=[8])}, EIGHT), ["tensor w", "data_offsets"]),
    "text offsets": (frame({"w": entry(offsets=["0", "8"])}, EIGHT), ["data_offsets"]),
    "reversed offsets": (frame({"w": entry(offsets=[8, 0])}, EIGHT), ["tensor w", "before they"]),
    "out of the file": (
        frame({"w": entry([2**40], [0, 2**42])}, EIGHT),
        ["tensor w", "has 101 bytes, needs 4398046511197", "truncated"],
    ),
    "overlap": (
        frame({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)),
        ["tensor b overlaps tensor a"],
    ),
    "hole": (
        frame({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)),
        ["tensor b", "hole after tensor a"],
    ),
    "hole at the start": (frame({"a": entry(offsets=[8, 16])}, bytes(16)), ["hole after the head"]),
    "truncated": (frame({"w": entry()}, bytes(5)), ["needs", "tensor w", "truncated"]),
    "trailing bytes": (frame({"w": entry()}, bytes(9)), ["added after the data"]),
    "unknown dtype": (frame({"w": entry(dtype="F31")}, EIGHT), ["tensor w", "F31", "unknown"]),
    "dtype a list": (frame({"w": entry(dtype=[])}, EIGHT), ["tensor w", "unknown", "BF16"]),
    "four bits": (frame({"w": entry([16], dtype="F4")}, EIGHT), ["tensor w", "F4 is not supp"]),
    "endless name": (frame({"n" * 5_000: entry()}, EIGHT), ["nnn...", "5000 characters"]),
    "newline in a name": (frame({"a\nError: b": entry()}, EIGHT), [r"a\nError", "control"]),
    "NUL in a name": (frame({"a\0b": entry()}, EIGHT), [r"a\x00b", "control"]),
    "escape code in a name": (frame({"\x1b[2Jw": entry()}, EIGHT), [r"\x1b[2Jw", "control"]),
    "half a character in a name": (frame({"\ud800": entry()}, EIGHT), [r"\ud800", "control"]),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_refuses_file_by_name_and_reason(tmp_path: Path, fault: str) -> None:
    content, words = REFUSED[fault]
    path = tmp_path / "model-00002.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    message = str(caught.value)
    assert "model-00002.safetensors" in message
    assert [word for word in words if word not in message] == [], message
    assert "\n  " in message, "no remedy"
    assert len(message) < 1_500
    assert message.replace("\n", "").isprintable()


def test_refuses_header_over_the_cap_though_the_file_is_long_enough(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes((HEADER_CAP + 1).to_bytes(8, "little"))
    os.truncate(path, 2 * HEADER_CAP)  # sparse: takes no space
    with pytest.raises(CheckpointError, match=f"at most {HEADER_CAP}"):
        read_head(path)


def test_absurd_header_length_allocates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes((80_000_000).to_bytes(8, "little") + b"{}")
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            read_head(path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_refuses_a_header_that_came_short() -> None:
    content = frame({"w": entry()}, EIGHT)
    with pytest.raises(CheckpointError, match="header has 7 bytes, needs"):
        parse_header(content[:15], len(content), "s")


def test_refuses_a_folder_in_place_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_header(tmp_path)


def test_refuses_a_pipe_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_header(tmp_path / "w.safetensors")


def test_names_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="gone.safetensors: cannot be read: No such file"):
        read_header(tmp_path / "gone.safetensors")


def test_mutated_headers_are_refused_or_right() -> None:
    """2,000 seeds; whatever is accepted also lies inside the file."""
    tensors = {"a.weight": torch.ones(3, 4), "b": torch.ones(5, dtype=torch.float16)}
    sound = safetensors.torch.save(tensors, {"format": "pt"})
    length = header_length(sound[:8], len(sound), "s")
    accepted = 0
    for seed in range(2_000):
        draw = random.Random(seed)
        content = bytearray(sound)
        for _ in range(draw.randint(1, 8)):
            content[draw.randrange(8 + length)] = draw.randrange(256)
        try:
            infos = parse(bytes(content)).values()
        except CheckpointError:
            continue
        accepted += 1
        assert all(8 <= info.begin <= info.end <= len(content) for info in infos)
    assert 0 < accepted < 400  # a changed letter in a name is accepted, little else


# --- accepted headers ------------------------------------------------------------------------


def test_offsets_count_from_the_start_of_the_file() -> None:
    content = frame({"a": entry(), "b": entry([1, 3], (8, 14), "BF16")}, bytes(14))
    begin = len(content) - 14
    assert parse(content) == {
        "a": TensorInfo("a", torch.float32, (2,), begin, begin + 8),
        "b": TensorInfo("b", torch.bfloat16, (1, 3), begin + 8, begin + 14),
    }


def test_accepts_scalars_and_any_order_in_the_header() -> None:
    content = frame({"b": entry([], (8, 12)), "a": entry()}, bytes(12))
    assert {name: info.shape for name, info in parse(content).items()} == {"b": (), "a": (2,)}


def test_a_path_as_a_name_is_only_a_name() -> None:
    assert list(parse(frame({"../../../x": entry()}, EIGHT))) == ["../../../x"]


@pytest.mark.parametrize(
    ("code", "dtype"),
    [("I32", torch.int32), ("BOOL", torch.bool), ("F8_E4M3", torch.float8_e4m3fn)],
)
def test_reads_dtypes_that_are_no_source_weights(code: str, dtype: torch.dtype) -> None:
    header = {"w": entry([8 // dtype.itemsize], (0, 8), code)}
    assert parse(frame(header, EIGHT))["w"].dtype is dtype


def test_metadata_is_kept() -> None:
    content = frame({"__metadata__": {"format": "pt"}, "w": entry()}, EIGHT)
    assert parse_header(content, len(content), "s").metadata == {"format": "pt"}


# --- hashes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.bool])
def test_hash_is_xxh3_of_the_stored_bytes(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).to(dtype)
    stored = safetensors.torch.save({"w": tensor})[-tensor.nbytes :]
    assert tensor_hash(tensor) == xxhash.xxh3_128_hexdigest(stored)


def test_hash_follows_values_and_not_memory_layout() -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    assert tensor_hash(tensor.t()) == tensor_hash(tensor.t().contiguous()) != tensor_hash(tensor)


def test_hash_sees_one_bit() -> None:
    tensor = torch.zeros(1000)
    assert tensor_hash(tensor) != tensor_hash(tensor.index_fill(0, torch.tensor([999]), -0.0))


def test_hash_of_scalars_and_parameters() -> None:
    scalar = torch.tensor(1.0)
    assert tensor_hash(scalar) == tensor_hash(torch.nn.Parameter(torch.ones(1)))


def test_raw_bytes_do_not_copy() -> None:
    tensor = torch.zeros(4)
    content = raw_bytes(tensor)
    tensor[0] = 1.0
    assert bytes(content[:4]) == b"\x00\x00\x80\x3f"


# --- writing ---------------------------------------------------------------------------------

# By hand from the format's description: 8 bytes of length, JSON padded with blanks to a multiple
# of 8, then the elements: 1.0f, -2.0f, and the halves 1.0, 0.5, 2.0.
GOLDEN = (
    b"\x98\x00\x00\x00\x00\x00\x00\x00"
    b'{"__metadata__":{"format":"pt"},'
    b'"w.scale":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
    b'"b":{"dtype":"F16","shape":[1,3],"data_offsets":[8,14]}}'
    b"     "
    b"\x00\x00\x80\x3f\x00\x00\x00\xc0"
    b"\x00\x3c\x00\x38\x00\x40"
)
SMALL = {
    "b": torch.tensor([[1.0, 0.5, 2.0]], dtype=torch.float16),
    "w.scale": torch.tensor([1.0, -2.0]),
}


def mixed() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.uint8, torch.int64]
    names = ["c", "b", "a", "é", "e", "f"]
    tensors = {
        name: (torch.rand(3, 5, generator=draw) * 9).to(dtype)
        for name, dtype in zip(names, dtypes, strict=True)
    }
    return tensors | {"scalar": torch.tensor(3.0), "transposed": torch.rand(4, 2).t()}


def layout_of(tensors: dict[str, Tensor]) -> dict[str, TensorLayout]:
    return {name: TensorLayout(t.dtype, tuple(t.shape)) for name, t in tensors.items()}


def test_written_bytes_are_the_golden_bytes(tmp_path: Path) -> None:
    write_tensors(tmp_path / "w.safetensors", SMALL)
    assert (tmp_path / "w.safetensors").read_bytes() == GOLDEN


def test_written_bytes_are_those_of_the_reference_implementation(tmp_path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in mixed().items()}
    write_tensors(tmp_path / "w.safetensors", tensors)
    assert (tmp_path / "w.safetensors").read_bytes() == safetensors.torch.save(
        tensors, {"format": "pt"}
    )


def test_tensors_lie_in_the_order_of_the_layout(tmp_path: Path) -> None:
    tensors = {name: mixed()[name] for name in ["e", "c", "a"]}
    write_shard(tmp_path / "w", layout_of(tensors), tensors.__getitem__)
    infos = read_header(tmp_path / "w").tensors.values()
    assert [info.name for info in sorted(infos, key=lambda info: info.begin)] == ["e", "c", "a"]


def test_reference_implementation_reads_every_tensor_in_any_order(tmp_path: Path) -> None:
    tensors = dict(sorted(mixed().items()))  # some begin at odd offsets then
    write_shard(tmp_path / "w", layout_of(tensors), tensors.__getitem__)
    loaded = safetensors.torch.load_file(tmp_path / "w")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_what_was_written_is_read_back_with_the_returned_hashes(tmp_path: Path) -> None:
    tensors, path = mixed(), tmp_path / "w"
    hashes = write_tensors(path, tensors)
    loaded = read_tensors(path, read_header(path), tensors)
    assert hashes == {name: tensor_hash(loaded[name]) for name in tensors}
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_data_begin_at_a_multiple_of_eight(tmp_path: Path) -> None:
    for length in range(1, 10):
        write_tensors(tmp_path / "w", {"n" * length: torch.ones(1)})
        assert read_header(tmp_path / "w").tensors["n" * length].begin % 8 == 0


def test_one_tensor_at_a_time_is_in_memory(tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def produce(name: str) -> Tensor:
        assert [made for made in alive if made() is not None] == []
        tensor = torch.full((4,), float(name))
        alive.append(weakref.ref(tensor))
        return tensor

    layout = {str(n): TensorLayout(torch.float32, (4,)) for n in range(3)}
    write_shard(tmp_path / "w", layout, produce)
    assert len(alive) == 3


@pytest.mark.parametrize("wrong", [torch.ones(3), torch.ones(2, dtype=torch.float16)])
def test_another_tensor_than_declared_leaves_no_file(tmp_path: Path, wrong: Tensor) -> None:
    layout = {"w": TensorLayout(torch.float32, (2,))}
    with pytest.raises(ValueError, match=r"w: F32 \[2\] was declared"):
        write_shard(tmp_path / "s", layout, lambda name: wrong)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_midway_keeps_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "w"
    write_tensors(path, SMALL)

    def produce(name: str) -> Tensor:
        if name == "b":
            raise KeyboardInterrupt
        return SMALL[name]

    with pytest.raises(KeyboardInterrupt):
        write_shard(path, layout_of({"w.scale": SMALL["w.scale"], "b": SMALL["b"]}), produce)
    assert [file.name for file in tmp_path.iterdir()] == ["w"]
    assert path.read_bytes() == GOLDEN


@pytest.mark.parametrize(("name", "shape"), [("a\nb", (1,)), ("n" * 1_001, (1,)), ("w", (0, 4))])
def test_never_writes_what_would_not_be_read(
    tmp_path: Path, name: str, shape: tuple[int, ...]
) -> None:
    with pytest.raises(CheckpointError):
        write_tensors(tmp_path / "s", {name: torch.ones(shape)})
    assert list(tmp_path.iterdir()) == []


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_mode_follows_the_umask(tmp_path: Path, mask: int, mode: int) -> None:
    with umask(mask):
        write_tensors(tmp_path / "w", SMALL)
    assert stat.S_IMODE((tmp_path / "w").stat().st_mode) == mode


def test_reading_a_file_that_was_replaced_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w"
    write_tensors(path, {"a": torch.ones(2), "b": torch.ones(2)})
    header = read_header(path)
    swapped: dict[str, Any] = {"b": torch.ones(2), "a": torch.ones(2)}
    write_shard(path, layout_of(swapped), swapped.__getitem__)  # same size, other places
    with pytest.raises(CheckpointError, match="w: its header is not the one that was checked"):
        read_tensors(path, header, ["a"])
