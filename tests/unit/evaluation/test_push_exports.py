"""Pushes of exports, and of a conversion with files in folders: a Hub on this machine."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from upload_hub import UploadHub

from rilq.converter import pipeline
from rilq.converter.options import ConvertOptions
from rilq.errors import CheckpointError, HubError, OptionError
from rilq.evaluation.export import export
from rilq.evaluation.loading import RUNTIMES, from_hub
from rilq.evaluation.push import PushResult
from rilq.formats.export.kinds import KINDS
from rilq.formats.hub import HubRepository
from rilq.formats.verify import read_manifest, write_manifest
from rilq.progress import SilentReporter

# The client library's own, of how it hands a file to its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "org/tiny-w2"
CARD, PLOT = "README.md", "rilq-training.png"
Push = Callable[..., PushResult]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, words: Path) -> Path:
    """A trained conversion that every kind of export can be made from; not to be changed."""
    options = ConvertOptions(
        model=str(tiny_llama),
        dataset=(str(words),),
        quantizer="rtn",
        zero_point="integer",
        keep_adapter=True,
        rank=2,
        group_size=32,
        nsamples=6,
        seqlen=32,
        steps=2,
        val_every=1,
        learning_rate=1e-3,
        device="cpu",
        output_dir=tmp_path_factory.mktemp("kept") / "tiny-w2",
    )
    return pipeline.convert(pipeline.prepare(options, SilentReporter()), SilentReporter()).output


@pytest.fixture(scope="module")
def exports(kept: Path) -> dict[str, Path]:
    """Kind to folder of every kind of export; not to be changed."""
    folders = {kind: kept.with_name(f"tiny-w2-{kind}") for kind in KINDS}
    export(kept, folders, device="cpu")
    return folders


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_is_pushed_with_a_card_of_its_kind(
    kind: str, hub: UploadHub, exports: dict[str, Path], kept: Path, try_push: Push, measured: Any
) -> None:
    result = try_push(source=exports[kind], native=kept, **measured)
    files = hub.files(REPO)
    card, metadata = files.pop(CARD).decode(), ModelCard(hub.files(REPO)[CARD].decode()).data
    assert files.pop(PLOT).startswith(b"\x89PNG") and files.pop(".gitattributes") == b""
    assert files == contents(exports[kind])
    assert metadata.library_name == RUNTIMES[kind].library
    assert set(RUNTIMES[kind].tags) <= set(metadata.tags)
    assert ("2-bit" in metadata.tags) == (kind not in ("dense", "gguf"))
    # Merged in all but these two, which have it in a folder.
    adapter = kind in ("gptq", "compressed-tensors")
    assert from_hub(kind, REPO, adapter=adapter) in card
    assert f"exported for {RUNTIMES[kind].title}" in card and "differ from those of" in card
    assert result.figures is not None and f"| {result.figures.perplexity:.4g} |" in card
    name = metadata.to_dict()["model-index"][0]["results"][0]["metrics"][0]["name"]
    assert "of the checkpoint that was exported" in name


def test_what_loads_with_transformers_is_loaded_and_refused_if_it_computes_nan(
    hub: UploadHub, exports: dict[str, Path], try_push: Push, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(exports["dense"], tmp_path / "dense"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    manifest = read_manifest(folder)
    write_manifest(folder, {k: v for k, v in manifest.items() if k not in ("files", "tensors")})
    with pytest.raises(CheckpointError, match="computes NaN or infinity"):
        try_push(source=folder)


def test_an_export_without_its_native_checkpoint_is_refused_unless_forced(
    hub: UploadHub, exports: dict[str, Path], try_push: Push, measured: Any
) -> None:
    with pytest.raises(OptionError, match="is an export.*\n.*--native FOLDER, or --force"):
        try_push(source=exports["mlx"], **measured)
    assert not hub.requests
    assert try_push(source=exports["mlx"]).figures is None
    assert "Perplexity was not measured." in hub.files(REPO)[CARD].decode()


def test_a_native_checkpoint_that_was_not_exported_is_refused(
    hub: UploadHub,
    exports: dict[str, Path],
    kept: Path,
    converted: tuple[Path, Path],
    try_push: Push,
) -> None:
    with pytest.raises(OptionError, match="not the checkpoint that .* was exported from"):
        try_push(source=exports["mlx"], native=converted[0])
    with pytest.raises(OptionError, match="--native .* is no export"):
        try_push(source=kept, native=kept)
    assert not hub.requests


def test_83_an_export_does_not_take_the_place_of_the_native_checkpoint_unasked(
    hub: UploadHub, exports: dict[str, Path], kept: Path, try_push: Push
) -> None:
    try_push(source=kept)
    with pytest.raises(HubError, match="another model: format native there, gguf here"):
        try_push(source=exports["gguf"])
    try_push(source=exports["gguf"], replace=True)
    assert hub.files(REPO).keys() == {*contents(exports["gguf"]), CARD, PLOT, ".gitattributes"}
    assert ModelCard(hub.files(REPO)[CARD].decode()).data.library_name == "gguf"


def test_88_a_byte_changed_in_a_gguf_file_is_refused(
    hub: UploadHub, exports: dict[str, Path], try_push: Push, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(exports["gguf"], tmp_path / "gguf"))
    content = bytearray((folder / "model.gguf").read_bytes())
    content[-3] ^= 1
    (folder / "model.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match="not what rilq has written: model.gguf"):
        try_push(source=folder)
    assert not hub.made and not hub.objects


# -- a conversion with --keep-adapter --------------------------------------------------------------


def test_files_in_folders_are_pushed_and_loading_is_what_it_was(
    hub: UploadHub, kept: Path, try_push: Push
) -> None:
    try_push(source=kept)
    pushed = hub.files(REPO)
    assert {name for name in pushed if "/" in name} == {
        "integer-base/zero_points.safetensors",
        "integer-base/adapter/adapter_config.json",
        "integer-base/adapter/adapter_model.safetensors",
    }
    assert {n: c for n, c in pushed.items() if n in contents(kept)} == contents(kept)
    tokens = torch.arange(3, 11)[None]
    with torch.no_grad():
        there, here = (
            AutoModelForCausalLM.from_pretrained(place, device_map="cpu")(tokens).logits
            for place in (REPO, kept)
        )
    assert torch.equal(there, here)
    assert not any("/" in name for name in HubRepository.open(REPO).files())


# -- the plot --------------------------------------------------------------------------------------


def test_the_card_shows_the_training(hub: UploadHub, kept: Path, try_push: Push) -> None:
    try_push(source=kept)
    assert f"]({PLOT})" in hub.files(REPO)[CARD].decode() and PLOT in hub.files(REPO)
    assert try_push(source=kept).pushed.unchanged, "drawn again, it has the same bytes"


def test_without_a_training_there_is_no_plot(
    hub: UploadHub, converted: tuple[Path, Path], try_push: Push
) -> None:
    try_push(source=converted[0])
    assert PLOT not in hub.files(REPO)
