"""Claims about whole checkpoints: spoilt ones are refused by name, sound ones are read lazily."""

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rilq.errors import CheckpointError, NonFiniteError
from rilq.formats.checkpoint import Checkpoint, scan_tensor
from rilq.formats.shard import listing, tensor_hash
from rilq.formats.source import LocalFolder
from rilq.progress import SilentReporter

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


class Notes(SilentReporter):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def weights() -> dict[str, dict[str, Tensor]]:
    """Shard to tensors of the sound checkpoint."""
    draw = torch.Generator().manual_seed(0)
    return {
        FIRST: {
            "embed.weight": torch.randn(6, 4, generator=draw),
            "layers.0.mlp.weight": torch.randn(4, 4, generator=draw).to(torch.bfloat16),
        },
        SECOND: {
            "layers.1.mlp.weight": torch.randn(4, 4, generator=draw).to(torch.float16),
            "norm.weight": torch.randn(4, generator=draw),
        },
    }


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_weights(folder: Path, shards: dict[str, dict[str, Tensor]]) -> None:
    for shard, tensors in shards.items():
        save_file(tensors, folder / shard, {"format": "pt"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound checkpoint of two shards."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    shards = weights()
    write_weights(folder, shards)
    write_index(folder, {name: shard for shard, tensors in shards.items() for name in tensors})
    return folder


@pytest.fixture
def single(folder: Path) -> Path:
    """The same in one file without an index."""
    shards = weights()
    for name in [FIRST, SECOND, INDEX]:
        (folder / name).unlink()
    write_weights(folder, {"model.safetensors": shards[FIRST] | shards[SECOND]})
    return folder


def snapshot(folder: Path) -> dict[str, str]:
    """Every file at or below the folder's parent, with its content's hash."""
    return {
        str(file): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.parent.rglob("*")
        if file.is_file()
    }


def open_and_read(folder: Path, report: SilentReporter | None = None) -> dict[str, Tensor]:
    checkpoint = Checkpoint.open(LocalFolder(folder), report=report or SilentReporter())
    return checkpoint.read(checkpoint.tensors)


# --- spoilt checkpoints ----------------------------------------------------------------------

Spoil = Callable[[Path], object]


def edit_header(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the second shard's header; its data stay."""
    path = folder / SECOND
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def edit_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    change(weight_map)
    write_index(folder, weight_map)


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = weights()[SECOND]
    change(tensors)
    write_weights(folder, {SECOND: tensors})


def edit_bytes(folder: Path, change: Callable[[bytes], bytes], name: str = SECOND) -> None:
    (folder / name).write_bytes(change((folder / name).read_bytes()))


def only_files(folder: Path, *names: str) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    for name in names:
        (folder / name).write_bytes(b"\x80\x02cos\nsystem\n")


def in_turn(*steps: Spoil) -> Spoil:
    def spoil(folder: Path) -> None:
        for step in steps:
            step(folder)

    return spoil


def retype(code: str, width: int) -> Spoil:
    """The norm becomes `code`, with as many elements as fit its 16 bytes."""
    entry = {"dtype": code, "shape": [16 // width]}
    return lambda folder: edit_header(folder, lambda h: h["norm.weight"].update(entry))


def reoffset(begin: int, end: int) -> Spoil:
    entry = {"data_offsets": [begin, end]}
    return lambda folder: edit_header(folder, lambda h: h["norm.weight"].update(entry))


def rename_many(tensors: dict[str, Tensor]) -> None:
    tensors.update({f"extra.{n:02d}": torch.ones(1) for n in range(12)})


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4976698672\n"
NORM, MLP = "norm.weight", "layers.1.mlp.weight"

# name -> (what is done to the sound checkpoint, words that the message must have)
SPOILT: dict[str, tuple[Spoil, list[str]]] = {
    # rows 1 to 13 and 26: the shards themselves (more of them in test_shard.py)
    "header_length_huge": (
        lambda f: edit_bytes(f, lambda b: (2**63 - 1).to_bytes(8, "little") + b[8:]),
        [SECOND, f"header says {2**63 - 1} bytes, file has", "download it again"],
    ),
    "header_longer_than_file": (
        lambda f: edit_bytes(f, lambda b: (80_000_000).to_bytes(8, "little") + b[8:]),
        [SECOND, "header says 80000000 bytes, file has"],
    ),
    "shard_empty": (lambda f: edit_bytes(f, lambda b: b""), [SECOND, "has 0 bytes"]),
    "shard_five_bytes": (lambda f: edit_bytes(f, lambda b: b[:5]), [SECOND, "has 5 bytes"]),
    "shard_truncated": (
        lambda f: edit_bytes(f, lambda b: b[:-3]),
        [SECOND, "has", "needs", "truncated", "download it again"],
    ),
    "shard_trailing_bytes": (lambda f: edit_bytes(f, lambda b: b + b"PK"), [SECOND, "added after"]),
    "header_not_json": (lambda f: edit_bytes(f, lambda b: b[:8] + b"x" + b[9:]), [SECOND, "JSON"]),
    "header_deep_nesting": (
        lambda f: edit_bytes(f, lambda b: (10**5).to_bytes(8, "little") + b"[" * 10**5),
        [SECOND, "nested too deeply"],
    ),
    "offsets_overlap": (
        lambda f: edit_header(f, lambda h: h["layers.1.mlp.weight"].update(data_offsets=[8, 40])),
        [SECOND, "tensor layers.1.mlp.weight overlaps tensor norm.weight"],
    ),
    "offsets_reversed": (reoffset(16, 0), [SECOND, NORM, "before they begin"]),
    "offsets_outside": (reoffset(2**40, 2**40 + 16), [SECOND, NORM, "has", "needs"]),
    "offsets_hole": (
        lambda f: edit_header(f, lambda h: h.pop(NORM)),
        [SECOND, "hole"],
    ),
    "shape_mismatch": (
        lambda f: edit_header(f, lambda h: h[NORM].update(shape=[5])),
        [SECOND, NORM, "needs 20 bytes, has 16"],
    ),
    "shape_overflow": (
        lambda f: edit_header(f, lambda h: h[NORM].update(shape=[2**62, 2**62])),
        [SECOND, NORM, "overflows 64 bits"],
    ),
    "dtype_unknown": (retype("F31", 4), [SECOND, NORM, "F31", "unknown", "BF16"]),
    "dtype_integer": (retype("I16", 2), [SECOND, NORM, "I16", "supported: BF16, F16, F32"]),
    "dtype_float8": (retype("F8_E4M3", 1), [SECOND, NORM, "F8_E4M3", "supported: BF16, F16, F32"]),
    "dtype_float4": (
        lambda f: edit_header(f, lambda h: h[NORM].update(dtype="F4", shape=[32])),
        [SECOND, NORM, "F4 is not supported", "take a 16-bit version"],
    ),
    "dtype_float64": (retype("F64", 8), [SECOND, NORM, "F64"]),
    "dtype_of_a_quantized_model": (
        in_turn(
            retype("U8", 1),
            lambda f: (f / "config.json").write_text('{"quantization_config": {}}'),
        ),
        [SECOND, NORM, "U8", "quantized already", "quantization_config"],
    ),
    "shard_is_html": (
        lambda f: edit_bytes(f, lambda b: b"<!DOCTYPE html><title>Sign in</title>"),
        [SECOND, "HTML page"],
    ),
    "shard_is_lfs_pointer": (
        lambda f: edit_bytes(f, lambda b: LFS),
        [SECOND, "is a git-lfs pointer", "git lfs pull"],
    ),
    "tensor_name_control": (
        lambda f: edit_header(f, lambda h: h.update({"\x1b[31mx\n": h.pop(NORM)})),
        [SECOND, r"\x1b[31mx\n"],
    ),
    "weight_empty": (
        lambda f: edit_tensors(f, lambda t: t.update(empty=torch.ones(0, 4))),
        [SECOND, "tensor empty", "[0, 4]"],
    ),
    # rows 14 to 22: index and files
    "index_shard_missing": (lambda f: (f / SECOND).unlink(), ["1 of 2 shards", SECOND, INDEX]),
    "index_shard_a_folder": (
        in_turn(lambda f: (f / SECOND).unlink(), lambda f: (f / SECOND).mkdir()),
        ["missing", SECOND],
    ),
    "index_path_traversal": (
        lambda f: edit_index(f, lambda m: m.update({NORM: "../outside.safetensors"})),
        [INDEX, "../outside.safetensors", NORM, "points outside the checkpoint folder"],
    ),
    "index_absolute_path": (
        lambda f: edit_index(f, lambda m: m.update({NORM: "/etc/passwd"})),
        [INDEX, "/etc/passwd", "points outside"],
    ),
    "index_windows_path": (
        lambda f: edit_index(f, lambda m: m.update({NORM: r"..\outside.safetensors"})),
        [INDEX, "points outside"],
    ),
    "index_path_of_a_subfolder": (
        lambda f: edit_index(f, lambda m: m.update({NORM: "a/b.safetensors"})),
        [INDEX, "missing", "a/b.safetensors"],
    ),
    "tensor_missing": (
        lambda f: edit_index(f, lambda m: m.pop(NORM)),
        [f"1 tensors are not in {INDEX}", NORM, "download"],
    ),
    "tensor_missing_from_shard": (
        lambda f: edit_tensors(f, lambda t: t.pop(NORM)),
        [f"1 tensors of {INDEX} are in no shard", NORM, "download"],
    ),
    "tensors_missing_many": (
        lambda f: edit_tensors(f, rename_many),
        ["12 tensors are not in", "extra.00", "extra.09", "(12 in all)"],
    ),
    "tensor_in_two_shards_but_not_where_the_index_says": (
        in_turn(
            lambda f: (f / "third.safetensors").write_bytes((f / SECOND).read_bytes()),
            lambda f: edit_index(f, lambda m: m.update({NORM: FIRST, MLP: "third.safetensors"})),
            lambda f: edit_index(f, lambda m: m.update(x=SECOND)),
            lambda f: edit_tensors(f, lambda t: t.update(x=torch.ones(1))),
        ),
        [NORM, "several shards"],
    ),
    "index_not_json": (lambda f: edit_bytes(f, lambda b: b[:40], INDEX), [INDEX, "line", "column"]),
    "index_is_list": (lambda f: (f / INDEX).write_text("[]"), [INDEX, "list, not an object"]),
    "index_without_map": (lambda f: (f / INDEX).write_text("{}"), [INDEX, "no weight_map"]),
    "index_map_a_list": (lambda f: write_index(f, ["a"]), [INDEX, "no weight_map"]),
    "index_value_no_string": (
        lambda f: edit_index(f, lambda m: m.update({NORM: 7})),
        [INDEX, NORM, "7"],
    ),
    "index_deep_nesting": (
        lambda f: (f / INDEX).write_text("[" * 100_000),
        [INDEX, "cannot be read"],
    ),
    "pickle_only": (
        lambda f: only_files(f, "pytorch_model.bin"),
        ["pytorch_model.bin is a pickle, which can run code", "convert it to safetensors"],
    ),
    "meta_weights": (
        lambda f: only_files(f, "consolidated.00.pth", "consolidated.01.pth"),
        ["original Meta weights", "consolidated.00.pth", "-hf"],
    ),
    "no_weights": (lambda f: only_files(f), [INDEX, "model.safetensors", "neither"]),
    "shards_without_index": (lambda f: (f / INDEX).unlink(), ["neither", INDEX, FIRST]),
    # row 24
    "norm_nan": (
        lambda f: edit_tensors(f, lambda t: t[NORM].view(-1)[1:3].fill_(float("nan"))),
        [NORM, SECOND, "2 of 4 elements are NaN or infinite"],
    ),
    "weight_inf": (
        lambda f: edit_tensors(f, lambda t: t["layers.1.mlp.weight"][0].fill_(-float("inf"))),
        ["layers.1.mlp.weight", "4 of 16 elements"],
    ),
    # row 29, as far as the file goes
    "config_missing": (lambda f: (f / "config.json").unlink(), ["has no config.json"]),
    "config_cut": (
        lambda f: (f / "config.json").write_text('{"a": 1,\n "b"'),
        ["config.json", "line 2, column 5"],
    ),
    "config_not_utf8": (lambda f: (f / "config.json").write_bytes(b'{"\xff"'), ["config.json"]),
    "config_is_list": (
        lambda f: (f / "config.json").write_text("[]"),
        ["config.json", "list, not an object"],
    ),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_spoilt_checkpoint_is_refused_by_name_and_left_alone(folder: Path, fault: str) -> None:
    spoil, words = SPOILT[fault]
    spoil(folder)
    before = snapshot(folder)
    with pytest.raises(CheckpointError) as caught:
        open_and_read(folder)
    message = str(caught.value)
    assert [word for word in words if word not in message] == [], message
    assert "\n  " in message, "no remedy"
    assert message.replace("\n", "").isprintable()
    assert snapshot(folder) == before


def test_all_faults_but_values_are_found_before_any_weight_is_read(folder: Path) -> None:
    values = {"norm_nan", "weight_inf"}
    assert values < SPOILT.keys()
    for name in values:
        SPOILT[name][0](folder)
        checkpoint = Checkpoint.open(LocalFolder(folder))
        with pytest.raises(NonFiniteError):
            checkpoint.read(checkpoint.tensors)


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: is not a folder that can be read"):
        Checkpoint.open(LocalFolder(tmp_path / "nowhere"))


_opened: list[str] | None = None


def _watch(event: str, args: tuple[Any, ...]) -> None:
    if _opened is not None and event == "open":
        _opened.append(str(args[0]))


sys.addaudithook(_watch)  # stays for the life of the process, idle


@contextmanager
def opened_files() -> Iterator[list[str]]:
    """Every path that Python opens meanwhile."""
    global _opened
    _opened = []
    try:
        yield _opened
    finally:
        _opened = None


def test_a_file_outside_the_folder_is_not_opened(folder: Path) -> None:
    (folder.parent / "outside.safetensors").write_bytes((folder / SECOND).read_bytes())
    edit_index(folder, lambda m: m.update({NORM: "../outside.safetensors"}))
    with opened_files() as opened, pytest.raises(CheckpointError):
        Checkpoint.open(LocalFolder(folder))
    assert any(path.endswith(INDEX) for path in opened)
    assert not any(path.endswith("outside.safetensors") for path in opened)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", "", "a\nb", "C:x"])
def test_a_local_folder_hands_out_only_plain_names(folder: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="points outside the checkpoint folder"):
        LocalFolder(folder).path(name)


def test_mutated_shards_and_indices_are_refused_or_read(folder: Path) -> None:
    """300 seeds of 1 to 8 changed bytes in a header or the index."""
    sound = {name: (folder / name).read_bytes() for name in [SECOND, INDEX]}
    reach = {SECOND: 8 + int.from_bytes(sound[SECOND][:8], "little"), INDEX: len(sound[INDEX])}
    refused = 0
    for seed in range(300):
        draw = random.Random(seed)
        name = draw.choice([SECOND, INDEX])
        content = bytearray(sound[name])
        for _ in range(draw.randint(1, 8)):
            content[draw.randrange(reach[name])] = draw.randrange(256)
        (folder / name).write_bytes(content)
        try:
            open_and_read(folder)
        except CheckpointError:
            refused += 1
        (folder / name).write_bytes(sound[name])
    assert refused > 200
    assert len(open_and_read(folder)) == 4


# --- odd, but handled ------------------------------------------------------------------------


def test_tensor_in_another_shard_than_the_index_says_is_read_from_where_it_is(folder: Path) -> None:
    edit_index(folder, lambda m: m.update({NORM: FIRST}))
    notes = Notes()
    assert torch.equal(open_and_read(folder, notes)[NORM], weights()[SECOND][NORM])
    assert [NORM in line and "another shard" in line for line in notes.warnings] == [True]


@pytest.mark.parametrize("named", [FIRST, SECOND])
def test_tensor_in_two_shards_is_read_from_the_one_in_the_index(folder: Path, named: str) -> None:
    write_weights(folder, {FIRST: weights()[FIRST] | {NORM: torch.full((4,), 7.0)}})
    edit_index(folder, lambda m: m.update({NORM: named}))
    notes = Notes()
    expected = torch.full((4,), 7.0) if named == FIRST else weights()[SECOND][NORM]
    assert torch.equal(open_and_read(folder, notes)[NORM], expected)
    assert [NORM in line and "two shards" in line for line in notes.warnings] == [True]


def test_with_index_and_single_file_the_index_decides_and_a_note_says_so(folder: Path) -> None:
    write_weights(folder, {"model.safetensors": {NORM: torch.zeros(4)}})
    notes = Notes()
    assert torch.equal(open_and_read(folder, notes)[NORM], weights()[SECOND][NORM])
    assert len(notes.notes) == 1 and "the index is used" in notes.notes[0]


def test_pickles_beside_safetensors_do_not_matter(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\n")
    assert len(open_and_read(folder)) == 4


def test_shards_may_be_links_to_another_folder(folder: Path) -> None:
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for file in list(folder.iterdir()):
        file.rename(blobs / file.name)
        file.symlink_to(blobs / file.name)
    assert torch.equal(open_and_read(folder)[NORM], weights()[SECOND][NORM])


def test_masks_of_old_releases_are_no_weights(folder: Path) -> None:
    masks = {
        "layers.0.attention.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool),
        "embeddings.position_ids": torch.arange(4)[None],
    }
    edit_tensors(folder, lambda t: t.update(masks))
    edit_index(folder, lambda m: m.update(dict.fromkeys(masks, SECOND)))
    assert open_and_read(folder)["layers.0.attention.bias"].dtype is torch.bool


def test_other_dtypes_can_be_allowed(folder: Path) -> None:
    codes = torch.arange(4, dtype=torch.int32)
    edit_tensors(folder, lambda t: t.update({NORM: codes}))
    checkpoint = Checkpoint.open(
        LocalFolder(folder),
        dtypes=frozenset({torch.float16, torch.bfloat16, torch.float32, torch.int32}),
    )
    assert torch.equal(checkpoint.read([NORM])[NORM], codes)


def test_config_may_hold_infinity_as_published_ones_do(folder: Path) -> None:
    (folder / "config.json").write_text('{"time_step_limit": [0.0, Infinity]}')
    assert Checkpoint.open(LocalFolder(folder)).config["time_step_limit"][1] == float("inf")


# --- reading ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["folder", "single"])
def test_reads_every_tensor_as_stored(form: str, request: pytest.FixtureRequest) -> None:
    found = open_and_read(request.getfixturevalue(form))
    expected = weights()[FIRST] | weights()[SECOND]
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_reads_what_transformers_saved(tiny_llama: Path) -> None:
    checkpoint = Checkpoint.open(LocalFolder(tiny_llama))
    stored = {k: v for shard in checkpoint.shards for k, v in load_file(tiny_llama / shard).items()}
    found = checkpoint.read(stored)
    assert len(checkpoint.shards) >= 3
    assert all(torch.equal(found[name], tensor) for name, tensor in stored.items())


def test_knows_sizes_and_places_without_reading(folder: Path) -> None:
    checkpoint = Checkpoint.open(LocalFolder(folder))
    assert checkpoint.shards == (FIRST, SECOND)
    assert checkpoint.shard_of[NORM] == SECOND
    assert checkpoint.tensors["layers.0.mlp.weight"].shape == (4, 4)
    assert checkpoint.nbytes([NORM, "layers.0.mlp.weight"]) == 16 + 32
    assert checkpoint.total_bytes == 6 * 4 * 4 + 32 + 32 + 16
    assert (checkpoint.bytes_read, checkpoint.hashes) == (0, {})


def test_counts_and_hashes_what_was_read(folder: Path) -> None:
    checkpoint = Checkpoint.open(LocalFolder(folder))
    checkpoint.read([NORM])
    checkpoint.read([NORM, "layers.1.mlp.weight"])
    assert checkpoint.bytes_read == 16 + 16 + 32
    stored = weights()[SECOND]
    assert checkpoint.hashes == {name: tensor_hash(tensor) for name, tensor in stored.items()}


def test_keeps_the_order_that_was_asked_for(folder: Path) -> None:
    names = [NORM, "embed.weight", "layers.1.mlp.weight"]
    assert list(Checkpoint.open(LocalFolder(folder)).read(names)) == names


def test_unknown_tensors_are_named(folder: Path) -> None:
    checkpoint = Checkpoint.open(LocalFolder(folder))
    with pytest.raises(CheckpointError, match="holds no tensor layers.9.weight"):
        checkpoint.read([NORM, "layers.9.weight"])


def test_writing_to_a_tensor_leaves_the_file_alone(folder: Path) -> None:
    before = snapshot(folder)
    Checkpoint.open(LocalFolder(folder)).read([NORM])[NORM].zero_()
    assert snapshot(folder) == before


def test_a_value_changed_between_two_reads_is_refused(folder: Path) -> None:
    checkpoint = Checkpoint.open(LocalFolder(folder))
    checkpoint.read([NORM])
    edit_tensors(folder, lambda t: t[NORM].mul_(2))
    with pytest.raises(CheckpointError, match="norm.weight changed since it was first read"):
        checkpoint.read([NORM])


def test_a_shard_replaced_after_the_check_is_refused(folder: Path) -> None:
    checkpoint = Checkpoint.open(LocalFolder(folder))
    edit_bytes(folder, lambda b: b[:-1])
    with pytest.raises(CheckpointError, match=SECOND):
        checkpoint.read([NORM])


def test_all_tensors_that_are_not_finite_are_named_at_once(folder: Path) -> None:
    SPOILT["norm_nan"][0](folder)
    edit_tensors(folder, lambda t: [v.view(-1)[0].fill_(float("nan")) for v in t.values()])
    checkpoint = Checkpoint.open(LocalFolder(folder))
    with pytest.raises(NonFiniteError) as caught:
        checkpoint.read(checkpoint.tensors)
    assert "layers.1.mlp.weight" in str(caught.value) and "norm.weight" in str(caught.value)


def test_not_finite_weights_are_read_when_that_is_asked_for(folder: Path) -> None:
    SPOILT["norm_nan"][0](folder)
    found = Checkpoint.open(LocalFolder(folder)).read([NORM], check_finite=False)
    assert int(found[NORM].isnan().sum()) == 2


def test_all_zero_rows_are_warned_of_once(folder: Path) -> None:
    edit_tensors(folder, lambda t: t["layers.1.mlp.weight"][1:].zero_())
    notes = Notes()
    checkpoint = Checkpoint.open(LocalFolder(folder), report=notes)
    checkpoint.read(checkpoint.tensors)
    checkpoint.read(checkpoint.tensors)
    assert len(notes.warnings) == 1
    assert "layers.1.mlp.weight: 3 of 4 rows are all zero" in notes.warnings[0]


def test_a_shard_half_of_zeros_is_warned_of(folder: Path) -> None:
    save_file({"w": torch.ones(8, 64)}, folder / SECOND)
    edit_index(folder, lambda m: [m.pop(NORM), m.pop("layers.1.mlp.weight"), m.update(w=SECOND)])
    edit_bytes(folder, lambda b: b[: len(b) // 2] + bytes(len(b) - len(b) // 2))
    notes = Notes()
    open_and_read(folder, notes)
    assert len(notes.warnings) == 1 and SECOND in notes.warnings[0]


def test_a_padding_row_and_a_zero_bias_are_normal(folder: Path) -> None:
    edit_tensors(folder, lambda t: [t["layers.1.mlp.weight"][0].zero_(), t[NORM].zero_()])
    notes = Notes()
    open_and_read(folder, notes)
    assert notes.warnings == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 1_500_000), (5_000, 700), (3_000_000,), (2, 1_000, 700)])
def test_scan_counts_across_chunks_as_the_obvious_way_does(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    tensor = torch.ones(shape, dtype=dtype)
    faults = torch.tensor([float("nan"), float("inf"), -float("inf")]).to(dtype)
    tensor.view(-1)[[0, 1_200_000, -1]] = faults
    if tensor.ndim > 1:
        tensor.view(-1, shape[-1])[1] = 0.0
    scan = scan_tensor(tensor)
    rows = tensor.view(-1, shape[-1])
    assert scan.non_finite == int((~tensor.isfinite()).sum()) > 0
    assert scan.zero_rows == (int((rows == 0).all(1).sum()) if tensor.ndim > 1 else 0)
    assert scan.hash == tensor_hash(tensor)


def test_sums_that_overflow_are_finite_all_the_same() -> None:
    assert scan_tensor(torch.full((300, 300), 60_000.0, dtype=torch.float16)).non_finite == 0


# In a fresh process: what other tests left free on the heap goes back to the system at any time.
MEMORY = """
import sys
from pathlib import Path
import psutil
import torch
from rilq.formats.checkpoint import Checkpoint
from rilq.formats.source import LocalFolder

process, checkpoint = psutil.Process(), Checkpoint.open(LocalFolder(Path(sys.argv[1])))
names = sorted(checkpoint.shard_of)
checkpoint.read(names[:1])  # torch's own one-time allocations
start, peak = process.memory_info().rss, 0
for name in names:
    found = checkpoint.read([name])
    peak = max(peak, process.memory_info().rss - start)
    del found
kept = [checkpoint.read([name]) for name in names]
print(len(kept), peak, process.memory_info().rss - start)
"""


def test_memory_does_not_grow_with_what_was_read_and_dropped(single: Path) -> None:
    """24 tensors of 4 MB in one file: at most about one is resident at a time."""
    names = [f"layers.{n}.weight" for n in range(24)]
    write_weights(single, {"model.safetensors": {n: torch.ones(1024, 1024) for n in names}})
    command = [sys.executable, "-c", MEMORY, str(single)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    count, peak, kept = map(int, out.split())
    assert count == 24
    assert kept > 80 * 2**20, "the measure does not see mapped pages"
    assert peak < 16 * 2**20


# --- fingerprints and side files -------------------------------------------------------------


def test_header_hash_is_the_same_for_a_copy_and_for_other_values(folder: Path) -> None:
    before = Checkpoint.open(LocalFolder(folder)).header_hash()
    edit_tensors(folder, lambda t: t[NORM].mul_(2))
    moved = folder.rename(folder.with_name("moved"))
    assert Checkpoint.open(LocalFolder(moved)).header_hash() == before


@pytest.mark.parametrize(
    "change",
    [
        lambda f: (f / "config.json").write_text('{"model_type": "llamb"}'),
        lambda f: edit_header(f, lambda h: h.update(__metadata__={"format": "np"})),
        lambda f: edit_tensors(f, lambda t: t.update({NORM: torch.ones(2, 2)})),
    ],
)
def test_header_hash_follows_config_and_headers(folder: Path, change: Spoil) -> None:
    before = Checkpoint.open(LocalFolder(folder)).header_hash()
    change(folder)
    assert Checkpoint.open(LocalFolder(folder)).header_hash() != before


def test_signatures_see_a_change_that_keeps_size_and_time(folder: Path) -> None:
    checkpoint = Checkpoint.open(LocalFolder(folder))
    before = checkpoint.file_signatures()
    assert before.keys() == {"config.json", INDEX, FIRST, SECOND}
    times = (folder / SECOND).stat()
    with (folder / SECOND).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    os.utime(folder / SECOND, ns=(times.st_atime_ns, times.st_mtime_ns))
    after = checkpoint.file_signatures()
    assert [name for name in after if after[name] != before[name]] == [SECOND]
    assert after[SECOND][:2] == before[SECOND][:2]


def test_side_files_are_an_allow_list(folder: Path) -> None:
    wanted = {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
        "LICENSE.txt",
    }
    others = {"modeling_evil.py", "tokenizer.py", "pytorch_model.bin", "README.md", ".env"}
    for name in (wanted | others) - {"config.json"}:
        (folder / name).write_text("{}")
    assert set(Checkpoint.open(LocalFolder(folder)).side_files()) == wanted


def test_optional_json_is_read_or_absent_or_refused(folder: Path) -> None:
    checkpoint = Checkpoint.open(LocalFolder(folder))
    assert checkpoint.read_json("generation_config.json") is None
    (folder / "generation_config.json").write_text('{"top_k": 5}')
    assert checkpoint.read_json("generation_config.json") == {"top_k": 5}
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="generation_config.json: is not valid JSON"):
        checkpoint.read_json("generation_config.json")


def test_long_lists_are_cut_and_counted() -> None:
    assert listing(["a", "b"]) == "a, b"
    assert listing([str(n) for n in range(12)]) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ... (12 in all)"
