"""A converted checkpoint on the Hub, fetched whole: files in folders, damage, no network."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from upload_hub import UploadHub, serving

from rilq.errors import CheckpointError, OptionError
from rilq.formats.hub_folder import local_folder
from rilq.progress import SilentReporter

REPO = "org/tiny-w2"
ADAPTER = "integer-base/adapter/adapter_model.safetensors"
LISTED = {
    "config.json": b"{}",
    "model.safetensors": b"weights" * 1000,
    "integer-base/adapter/adapter_config.json": b'{"r": 2}',
    ADAPTER: b"adapter" * 1000,
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[UploadHub]:
    """A Hub that holds a converted checkpoint, and more that is none of it."""
    manifest = json.dumps({"files": dict.fromkeys([*LISTED, "../escaped", "gone.json"])}).encode()
    others = {"README.md": b"# Tiny", "notes/plan.txt": b"mine"}
    with serving(monkeypatch, tmp_path / "cache") as hub:
        hub.add(REPO, {**LISTED, **others, "rilq.json": manifest})
        yield hub


def fetched(revision: str | None = None) -> dict[str, bytes]:
    folder = local_folder(REPO, revision=revision, report=SilentReporter())
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_what_the_manifest_lists_is_fetched_and_nothing_else(hub: UploadHub) -> None:
    found = fetched()
    assert {name: content for name, content in found.items() if name != "rilq.json"} == LISTED


@pytest.mark.parametrize("name", ["model.safetensors", ADAPTER])
def test_a_file_that_arrives_damaged_is_fetched_again(hub: UploadHub, name: str) -> None:
    hub.fail_next("corrupt", on=f"GET /{name}")
    assert fetched()[name] == LISTED[name]
    assert len(hub.got(f"GET /{name}")) >= 2


def test_again_and_without_a_network_it_comes_from_the_cache(
    hub: UploadHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, sent = fetched(), len(hub.got(f"GET /{ADAPTER}"))
    assert fetched() == first and len(hub.got(f"GET /{ADAPTER}")) == sent
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    assert fetched() == first and len(hub.requests) == asked


def test_a_repository_that_rilq_has_not_made_is_refused(hub: UploadHub) -> None:
    hub.add("org/base", {"config.json": b"{}", "model.safetensors": b"w"})
    with pytest.raises(CheckpointError, match="org/base: has no rilq.json.*\n.*rilq convert"):
        local_folder("org/base", report=SilentReporter())


def test_a_folder_is_itself_and_has_no_revision(tmp_path: Path) -> None:
    for model in (tmp_path, str(tmp_path)):
        assert local_folder(model, report=SilentReporter()) == tmp_path
    with pytest.raises(OptionError, match="--revision w2"):
        local_folder(str(tmp_path), revision="w2", report=SilentReporter())
