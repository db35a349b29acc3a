"""Shards, config and side files on their way to a published folder, and its manifest."""

import json
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from rilq.errors import CheckpointError, OptionError, OutputError
from rilq.formats.native import RilqConfig
from rilq.formats.verify import file_hash, verify, write_manifest
from rilq.formats.writer import (
    check_output,
    copy_side_files,
    open_staging,
    parse_size,
    plan_shards,
    publish,
    shard_names,
    write_config,
    write_index,
)


@pytest.fixture
def umask_022() -> Iterator[None]:
    old = os.umask(0o022)
    yield
    os.umask(old)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# -- shards ------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 60))
def test_shards_keep_order_and_limit_and_are_never_empty(sizes: list[int], limit: int) -> None:
    named = {f"t{i}": size for i, size in enumerate(sizes)}
    shards = plan_shards(named, limit)
    assert [name for shard in shards for name in shard] == list(named)
    assert all(shards)
    for shard in shards:
        assert len(shard) == 1 or sum(named[name] for name in shard) <= limit


def test_a_shard_is_filled_to_the_byte() -> None:
    assert plan_shards({"a": 6, "b": 4, "c": 1}, 10) == [["a", "b"], ["c"]]


def test_tensor_above_the_limit_has_a_shard_to_itself() -> None:
    assert plan_shards({"a": 99, "b": 1, "c": 99, "d": 1}, 10) == [["a"], ["b"], ["c"], ["d"]]


def test_shard_names_are_those_of_transformers() -> None:
    assert shard_names(1) == ["model.safetensors"]
    assert shard_names(2) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("5 gib", 5 * 2**30),
        ("1.5MB", 1_500_000),
        ("500MiB", 500 * 2**20),
        ("2KB", 2000),
        ("123", 123),
        ("7B", 7),
    ],
)
def test_sizes_are_read_with_decimal_and_binary_units(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "5XB", "5 G B", "0", "0.2B", "1e9", "nan"])
def test_nonsense_sizes_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(OptionError, match="5GB"):
        parse_size(text)


# -- json files --------------------------------------------------------------------------------


def test_index_maps_sorted_names_to_shards(tmp_path: Path) -> None:
    write_index(tmp_path, {"b": "two", "a": "one"}, 12)
    content = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert content == {"metadata": {"total_size": 12}, "weight_map": {"a": "one", "b": "two"}}
    assert list(content["weight_map"]) == ["a", "b"]


def test_config_is_the_sources_with_dtype_and_quantization(tmp_path: Path) -> None:
    source = {"z": 1, "a": [2], "dtype": "float32"}
    write_config(tmp_path, source, RilqConfig(3, 128), torch.bfloat16)
    content = json.loads((tmp_path / "config.json").read_text())
    assert list(content) == ["z", "a", "dtype", "quantization_config"]
    assert content["dtype"] == "bfloat16"
    assert content["quantization_config"]["quant_method"] == "rilq"
    assert RilqConfig.from_dict(content["quantization_config"]).bits == 3
    assert source == {"z": 1, "a": [2], "dtype": "float32"}


def test_dense_config_loses_the_sources_quantization_and_code(tmp_path: Path) -> None:
    source = {"quantization_config": {"bits": 2}, "auto_map": {"AutoModel": "x.Y"}}
    write_config(tmp_path, source, None, torch.float16)
    assert json.loads((tmp_path / "config.json").read_text()) == {"dtype": "float16"}


def test_older_dtype_key_is_kept_up_to_date(tmp_path: Path) -> None:
    write_config(tmp_path, {"torch_dtype": "float32"}, None, torch.float16)
    assert json.loads((tmp_path / "config.json").read_text()) == {"torch_dtype": "float16"}


# -- side files --------------------------------------------------------------------------------


def test_side_files_become_real_files_with_the_umasks_mode(tmp_path: Path, umask_022: None) -> None:
    blob, link, out = tmp_path / "blob", tmp_path / "link", tmp_path / "out"
    blob.write_bytes(b"{}")
    blob.chmod(0o600)
    link.symlink_to(blob)
    out.mkdir()
    copy_side_files({"tokenizer.json": link, "templates/a.jinja": blob}, out)
    copied = out / "tokenizer.json"
    assert copied.read_bytes() == b"{}" and not copied.is_symlink()
    assert mode(copied) == 0o644
    assert (out / "templates/a.jinja").read_bytes() == b"{}"


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/evil"])
def test_side_file_outside_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "a").write_text("x")
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="outside"):
        copy_side_files({name: tmp_path / "a"}, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_missing_side_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.json"):
        copy_side_files({"tokenizer.json": tmp_path / "gone.json"}, tmp_path)


# -- where the output may be -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "problem"),
    [
        ("source", "source folder itself"),
        ("elsewhere/../source", "source folder itself"),
        ("source/out", "inside the source folder"),
        ("work", "work folder itself"),
        ("work/a/out", "inside the work folder"),
        ("around", "contain the work folder"),
        ("full", "not empty"),
        ("file", "is a file"),
        ("file/out", "cannot be written here"),
        ("link-to-source", "source folder itself"),
    ],
)
def test_impossible_outputs_are_refused_at_once(tmp_path: Path, output: str, problem: str) -> None:
    for folder in ("source", "work", "around/work", "full/x", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "file").write_text("x")
    (tmp_path / "link-to-source").symlink_to(tmp_path / "source")
    work = tmp_path / ("around/work" if output == "around" else "work")
    with pytest.raises(OutputError, match=problem) as caught:
        check_output(tmp_path / output, source=tmp_path / "source", work=work)
    assert caught.value.exit_code == 2


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc, where nobody may write")
def test_output_where_nobody_may_write_is_refused_at_once() -> None:
    with pytest.raises(OutputError, match="/proc/out"):
        check_output(Path("/proc/out"), source=None, work=None)


def test_mount_point_is_refused_with_a_folder_inside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Mounting needs rights that a test lacks; only the question to the kernel is answered here.
    monkeypatch.setattr(Path, "is_mount", lambda self: self == tmp_path)
    with pytest.raises(OutputError, match=str(tmp_path / "model")):
        check_output(tmp_path, source=None, work=None)


@pytest.mark.parametrize("output", ["new", "new/deep/er", "empty"])
def test_possible_outputs_pass_and_nothing_is_left(tmp_path: Path, output: str) -> None:
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / output, source=tmp_path / "source", work=tmp_path / "work")
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


# -- staging and publishing --------------------------------------------------------------------


def test_staging_is_a_private_hidden_sibling(tmp_path: Path) -> None:
    staging = open_staging(tmp_path / "a" / "out", "r1")
    assert staging.parent == tmp_path / "a" and staging.name.startswith(".")
    assert mode(staging) == 0o700
    assert not (tmp_path / "a" / "out").exists()


def test_staging_of_the_same_run_starts_empty_and_others_stay(tmp_path: Path) -> None:
    mine, other = (open_staging(tmp_path / "out", run) for run in ("r1", "r2"))
    (mine / "left-over").write_text("x")
    (other / "kept").write_text("x")
    assert list(open_staging(tmp_path / "out", "r1").iterdir()) == []
    assert (other / "kept").exists()


def test_planted_staging_symlink_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").write_text("x")
    staging = open_staging(tmp_path / "out", "r1")
    staging.rmdir()
    staging.symlink_to(victim)
    assert not open_staging(tmp_path / "out", "r1").is_symlink()
    assert (victim / "precious").exists()


@pytest.mark.parametrize("exists", [False, True])
def test_publish_gives_the_whole_folder_its_name_and_mode(
    tmp_path: Path, umask_022: None, exists: bool
) -> None:
    output = tmp_path / "out"
    if exists:
        output.mkdir(mode=0o700)
    staging = open_staging(output, "r1")
    (staging / "sub").mkdir(mode=0o700)
    (staging / "sub" / "f").write_text("x")
    publish(staging, output)
    assert (output / "sub" / "f").read_text() == "x"
    assert mode(output) == mode(output / "sub") == 0o755
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_publish_refuses_an_output_that_appeared_and_keeps_both(tmp_path: Path) -> None:
    output = tmp_path / "out"
    staging = open_staging(output, "r1")
    (staging / "mine").write_text("x")
    output.mkdir()
    (output / "theirs").write_text("x")
    with pytest.raises(OutputError, match="appeared"):
        publish(staging, output)
    assert (staging / "mine").exists() and (output / "theirs").exists()


def test_publish_syncs_the_folder_before_its_rename_and_the_parent_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging = open_staging(tmp_path / "out", "r1")
    log: list[str] = []
    fsync, rename = os.fsync, os.rename

    def logged_fsync(handle: int) -> None:
        log.append(f"sync {Path(os.readlink(f'/proc/self/fd/{handle}')).name}")
        fsync(handle)

    def logged_rename(old: Path, new: Path) -> None:
        log.append("rename")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "rename", logged_rename)
    publish(staging, tmp_path / "out")
    assert log == [f"sync {staging.name}", "rename", f"sync {tmp_path.name}"]


# -- the manifest ------------------------------------------------------------------------------


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    folder = tmp_path / "finished"
    (folder / "templates").mkdir(parents=True)
    save_file({"b": torch.arange(5), "a": torch.ones(3, 2)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "templates" / "t.jinja").write_text("hello")
    write_manifest(folder, {"recipe": {"bits": 2}})
    return folder


def test_untouched_folder_verifies(finished: Path) -> None:
    report = verify(finished)
    assert (report.files_checked, report.tensors_checked, report.problems) == (3, 2, ())


def test_manifest_holds_payload_and_checksums_and_nothing_else(finished: Path) -> None:
    content = json.loads((finished / "rilq.json").read_text())
    assert sorted(content) == ["files", "recipe", "tensors"]
    assert content["files"]["config.json"] == {
        "size": 2,
        "xxh3": file_hash(finished / "config.json"),
    }
    assert content["tensors"]["a"] == xxhash.xxh3_128_hexdigest(struct.pack("<6f", *[1.0] * 6))


def test_manifest_of_equal_folders_is_equal_byte_for_byte(finished: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    other.mkdir()
    names = ["config.json", "model.safetensors", "templates/t.jinja"]
    copy_side_files({name: finished / name for name in reversed(names)}, other)
    write_manifest(other, {"recipe": {"bits": 2}})
    assert (other / "rilq.json").read_bytes() == (finished / "rilq.json").read_bytes()


def test_flipped_weight_byte_names_file_and_tensor(finished: Path) -> None:
    path = finished / "model.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1  # "a" (float32) lies behind "b" (int64): the wider dtype comes first
    path.write_bytes(damaged)
    problems = verify(finished).problems
    assert [p.split(": checksum")[0] for p in problems] == [
        "model.safetensors",
        "model.safetensors: tensor a",
    ]


def test_damaged_header_is_reported_with_its_tensors(finished: Path) -> None:
    path = finished / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    problems = "\n".join(verify(finished).problems)
    assert "model.safetensors: cannot be read" in problems and "tensor a: missing" in problems


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json: missing"),
        (lambda folder: (folder / "new").write_text("x"), "new: not in rilq.json"),
        (lambda folder: (folder / "config.json").write_text("{ }"), "config.json: has 3 bytes"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json: checksum"),
    ],
)
def test_changed_files_are_named(finished: Path, change: object, problem: str) -> None:
    assert callable(change)
    change(finished)
    (found,) = verify(finished).problems
    assert found.startswith(problem)


def test_hidden_files_of_git_and_the_hub_do_not_count(finished: Path) -> None:
    (finished / ".cache" / "huggingface").mkdir(parents=True)
    (finished / ".cache" / "huggingface" / "x.metadata").write_text("x")
    (finished / ".gitattributes").write_text("x")
    assert verify(finished).problems == ()


def test_a_card_and_its_picture_may_lie_beside_what_was_written(finished: Path) -> None:
    for name in ("README.md", "rilq-training.png"):
        (finished / name).write_text("of the user, or of a push")
    assert verify(finished).problems == ()


def test_a_card_that_was_written_with_the_rest_is_checked(finished: Path) -> None:
    (finished / "README.md").write_text("as it was")
    write_manifest(finished, {"recipe": {"bits": 2}})
    (finished / "README.md").write_text("changed")
    assert "README.md: has 7 bytes, expected 9" in verify(finished).problems


@pytest.mark.parametrize(
    "content", [None, b"", b"[]", b"{", b'{"files": {}}', b"\xff", b"[" * 9999]
)
def test_missing_or_garbled_manifest_is_refused(finished: Path, content: bytes | None) -> None:
    (finished / "rilq.json").unlink()
    if content is not None:
        (finished / "rilq.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"rilq\.json"):
        verify(finished)


def test_names_in_the_manifest_are_never_followed(finished: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("x")
    content = json.loads((finished / "rilq.json").read_text())
    content["files"]["../outside"] = {"size": 1, "xxh3": file_hash(outside)}
    (finished / "rilq.json").write_text(json.dumps(content))
    assert verify(finished).problems == ("../outside: missing",)
