"""What is checked before a push, and what becomes public: real conversions, a Hub on this machine.

Numbers in names are rows of the fault catalogue.
"""

import json
import logging
import re
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from upload_hub import WRITER, UploadHub

from rilq.converter import pipeline
from rilq.converter.options import ConvertOptions
from rilq.errors import CheckpointError, DatasetError, HubError, OptionError, RilqError
from rilq.evaluation.push import PushOptions, PushResult, push
from rilq.formats.verify import write_manifest
from rilq.progress import SilentReporter

# The client library's own, of how it hands a file to its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "org/tiny-w2"


@dataclass
class Lines(SilentReporter):
    """Keeps what was reported, and which stages began."""

    lines: list[str] = field(default_factory=list)
    stages: list[str] = field(default_factory=list)

    def stage(self, name: str, total: int | None = None, unit: str = "") -> None:
        self.stages.append(name)

    def note(self, message: str) -> None:
        self.lines.append(message)

    def warn(self, message: str) -> None:
        self.lines.append(message)


Push = Callable[..., PushResult]


def rewritten(folder: Path) -> None:
    """Renew `rilq.json` after a change, as if the conversion had written it so."""
    manifest = json.loads((folder / "rilq.json").read_text())
    payload = {k: v for k, v in manifest.items() if k not in ("files", "tensors")}
    write_manifest(folder, payload)


def test_the_card_of_a_resq_checkpoint_tells_its_bits_and_offers_no_export(
    hub: UploadHub, tiny_llama: Path, words: Path, tmp_path: Path
) -> None:
    options = ConvertOptions.of_recipe(
        "default",
        model=str(tiny_llama),
        method="resq",
        dataset=(str(words),),
        nsamples=4,
        seqlen=32,
        device="cpu",
        output_dir=tmp_path / "tiny-resq",
    )
    folder = pipeline.convert(pipeline.prepare(options, SilentReporter()), SilentReporter()).output
    push(folder, PushOptions(REPO, text=str(words), force=True, device="cpu"), SilentReporter())
    card = hub.files(REPO)["README.md"].decode()
    assert "in 4 bits by `--method resq`" in card and "8 in 0.125 of the channels" in card
    assert "per activation, 8.50 per value in the KV cache" in card and "rilq export" not in card
    assert "4-bit" in ModelCard(card).data.tags


def test_everything_that_the_conversion_wrote_is_pushed_with_a_card(
    hub: UploadHub, folder: Path, try_push: Push, measured: dict[str, Any]
) -> None:
    result = try_push(**measured)
    files = hub.files(REPO)
    card = files.pop("README.md").decode()
    assert files.pop(".gitattributes") == b""
    assert files == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert result.figures is not None and result.figures.against is not None
    (model,) = ModelCard(card).data.to_dict()["model-index"]
    measured = model["results"][0]["metrics"][0]["value"]
    assert measured == pytest.approx(result.figures.perplexity, rel=1e-5)
    assert f"{result.figures.against.base_perplexity:.4g}" in card


def test_a_rerun_measures_nothing_again_and_commits_nothing(
    hub: UploadHub, try_push: Push, measured: dict[str, Any]
) -> None:
    first, again = try_push(**measured), Lines()
    second = try_push(again, **measured)
    assert second.pushed.unchanged and second.pushed.commit == first.pushed.commit
    assert len(hub.made) == 1 and again.stages == ["verify", "reload"]
    assert second.figures == first.figures


def test_figures_of_another_text_or_of_another_conversion_are_not_used(
    hub: UploadHub,
    folder: Path,
    try_push: Push,
    measured: dict[str, Any],
    tmp_path: Path,
    text: str,
) -> None:
    try_push(**measured)
    other, report = tmp_path / "other.txt", Lines()
    other.write_text(text[3000:6000])
    try_push(report, **{**measured, "text": str(other)})
    assert "evaluate" in report.stages
    (folder / "generation_config.json").write_text('{"eos_token_id": 1}')
    rewritten(folder)
    report = Lines()
    try_push(report, **{**measured, "text": str(other)})
    assert "evaluate" in report.stages


def test_77_the_right_to_write_is_checked_before_any_work(
    hub: UploadHub, try_push: Push, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_guest")
    report = Lines()
    with pytest.raises(HubError, match="right to write"):
        try_push(report)
    assert not report.stages


def test_78_81_a_refused_upload_leaves_the_folder_whole_and_says_so(
    hub: UploadHub, folder: Path, try_push: Push, converted: tuple[Path, Path]
) -> None:
    hub.quota = 1000
    with pytest.raises(HubError, match=f"Storage limit reached.*\n.*{folder} is whole"):
        try_push()
    assert [p.read_bytes() for p in sorted(folder.iterdir())] == [
        p.read_bytes() for p in sorted(converted[0].iterdir())
    ]
    hub.quota = 10**9
    assert not try_push().pushed.unchanged and len(hub.made) == 1


def test_83_another_model_is_refused_before_any_work_and_replaced_if_asked(
    hub: UploadHub, try_push: Push
) -> None:
    hub.add(REPO, {"config.json": b"{}", "model-00009-of-00009.safetensors": b"old"})
    report = Lines()
    with pytest.raises(HubError, match="holds a model that rilq has not pushed"):
        try_push(report)
    assert not report.stages and not hub.made
    try_push(replace=True)
    (commit,) = hub.made
    assert commit.deleted == ("model-00009-of-00009.safetensors",)


def test_84_what_the_branch_holds_loads_at_every_moment_as_the_old_or_the_new_model(
    hub: UploadHub, try_push: Push, converted: tuple[Path, Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    def logits(files: dict[str, bytes], place: Path) -> torch.Tensor:
        place.mkdir()
        for name, content in files.items():
            (place / name).write_bytes(content)
        model = AutoModelForCausalLM.from_pretrained(place, device_map="cpu")
        with torch.no_grad():
            return model(torch.arange(3, 11)[None]).logits

    changed = Path(shutil.copytree(converted[1], tmp_path / "there" / "tiny-w2"))
    for shard in changed.glob("*.safetensors"):
        tensors = {n: t * 1.5 if "norm" in n else t for n, t in load_file(shard).items()}
        save_file(tensors, shard, metadata={"format": "pt"})
    rewritten(changed)
    try_push()
    old = hub.files(REPO)
    seen: list[dict[str, bytes]] = []
    hub.watchers.append(lambda what: seen.append(hub.files(REPO)))
    hub.fail_next("cut", on="PUT /lfs")
    hub.fail_next("lost", on="/commit/")
    try_push(source=changed)
    new = hub.files(REPO)
    assert len(seen) >= 4 and all(files == old for files in seen) and len(hub.made) == 2
    before, after = logits(old, tmp_path / "old"), logits(new, tmp_path / "new")
    expected = logits({p.name: p.read_bytes() for p in changed.iterdir()}, tmp_path / "expected")
    assert torch.equal(after, expected) and not torch.equal(after, before)


def test_85_nothing_that_is_published_names_a_path_or_host_of_this_machine(
    hub: UploadHub, folder: Path, try_push: Push, tiny_llama: Path, tmp_path: Path
) -> None:
    try_push()
    said = b"\n".join(c for n, c in hub.files(REPO).items() if not n.endswith(".safetensors"))
    for private in (Path.home(), tmp_path, folder, tiny_llama, tiny_llama.parent):
        assert f"{private}/".encode() not in said and f'{private}"'.encode() not in said
    assert socket.gethostname().encode() not in said
    assert "base_model" not in ModelCard(hub.files(REPO)["README.md"].decode()).data.to_dict()


def test_85_the_name_of_a_private_base_is_not_published(
    hub: UploadHub, try_push: Push, measured: dict[str, Any], tiny_llama: Path
) -> None:
    files = {path.name: path.read_bytes() for path in tiny_llama.iterdir()}
    hub.add("org/secret", files, private=True)
    options = {**measured, "base": "org/secret"}
    with pytest.raises(HubError, match="org/secret: this base is private"):
        try_push(**options)
    assert not hub.made
    hub.repositories.pop(REPO)
    try_push(**options, private=True)
    assert ModelCard(hub.files(REPO)["README.md"].decode()).data.base_model == "org/secret"


@pytest.mark.parametrize("name", ["tokenizer_config.json", "README.md"])
def test_85_a_file_that_holds_a_path_of_this_machine_is_refused_by_name(
    hub: UploadHub, folder: Path, try_push: Push, name: str
) -> None:
    if name == "README.md":
        (folder / name).write_text(f"see {folder.parent}/notes")
    else:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, "name_or_path": f"{folder.parent}/x"}))
        rewritten(folder)
    with pytest.raises(CheckpointError, match=f"{name}: holds a path of this machine"):
        try_push()
    assert not hub.made


def test_86_the_token_is_in_no_file_line_card_or_error(
    hub: UploadHub,
    folder: Path,
    try_push: Push,
    measured: dict[str, Any],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)  # at DEBUG the HTTP library shows what the server said
    report, errors = Lines(), []
    hub.says = f"no, {WRITER}"
    for kind, on in (("403", "/preupload"), ("400", "PUT /lfs"), ("409", "/commit/")):
        hub.fail_next(kind, on=on)
        with pytest.raises(RilqError) as caught:
            try_push(report)
        errors.append(str(caught.value))
    hub.fail_next("lost", on="/commit/")
    try_push(report, **measured)
    shown = "\n".join([*report.lines, *errors, *capfd.readouterr(), caplog.text])
    assert REPO in shown and WRITER not in shown
    everything = [*hub.files(REPO).values(), *(c.title.encode() for c in hub.made)]
    everything += [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(WRITER.encode() in content for content in everything)


def test_86_a_card_that_holds_the_token_is_refused_without_quoting_it(
    hub: UploadHub, folder: Path, try_push: Push
) -> None:
    (folder / "README.md").write_text(f"export HF_TOKEN={WRITER}")
    with pytest.raises(CheckpointError, match="README.md: holds the token") as caught:
        try_push()
    assert WRITER not in str(caught.value) and not hub.made


def test_87_only_what_the_manifest_lists_is_pushed(
    hub: UploadHub, folder: Path, try_push: Push
) -> None:
    for stray in (".model.safetensors.0123.tmp", "notes.txt", "tiny.rilq-work/layer-0000.bin",
                  ".cache/x", "model.safetensors.part", ".env"):  # fmt: skip
        (folder / stray).parent.mkdir(exist_ok=True)
        (folder / stray).write_text("not to be published")
    report = Lines()
    try_push(report)
    listed = json.loads((folder / "rilq.json").read_text())["files"].keys()
    assert hub.files(REPO).keys() == {*listed, "rilq.json", "README.md", ".gitattributes"}
    assert any("not pushed" in line and "notes.txt" in line for line in report.lines)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_88_a_byte_changed_after_the_conversion_is_refused(
    hub: UploadHub, folder: Path, try_push: Push, name: str
) -> None:
    content = bytearray((folder / name).read_bytes())
    content[-3] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"not what rilq has written: {name}"):
        try_push()
    assert not hub.made and not hub.objects


def test_88_a_missing_file_is_refused(hub: UploadHub, folder: Path, try_push: Push) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="tokenizer.json: missing"):
        try_push()


def test_a_manifest_without_what_the_card_needs_is_refused(
    hub: UploadHub, folder: Path, try_push: Push
) -> None:
    manifest = json.loads((folder / "rilq.json").read_text())
    del manifest["quality"], manifest["recipe"]["bits"]
    (folder / "rilq.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="rilq.json: has no quality, recipe.bits"):
        try_push()
    assert not hub.requests


def test_a_card_that_is_not_utf_8_is_not_overwritten(hub: UploadHub, try_push: Push) -> None:
    hub.add(REPO, {"README.md": b"caf\xe9"})
    with pytest.raises(HubError, match="README.md: the card is not UTF-8"):
        try_push()
    assert not hub.made


# -- is it good enough? ----------------------------------------------------------------------------


def test_a_checkpoint_that_does_not_load_is_refused(
    hub: UploadHub, folder: Path, try_push: Push
) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (folder / "config.json").write_text(json.dumps(config))
    rewritten(folder)
    with pytest.raises(CheckpointError, match="does not load with transformers: .*upgrade rilq"):
        try_push()
    assert not hub.objects


def test_a_checkpoint_that_computes_nan_is_refused(
    hub: UploadHub, folder: Path, try_push: Push
) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    rewritten(folder)
    with pytest.raises(CheckpointError, match="computes NaN or infinity"):
        try_push()


def test_a_perplexity_above_the_ratio_is_refused_unless_forced(
    hub: UploadHub, folder: Path, try_push: Push, measured: dict[str, Any]
) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("norm.weight"):
            tensor.mul_(4)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    rewritten(folder)
    with pytest.raises(CheckpointError, match=r"times the base's .* --max-ppl-ratio is 2\n"):
        try_push(**measured)
    assert not hub.objects
    report = Lines()
    result = try_push(report, **{**measured, "force": True})
    assert any("pushed in spite of its perplexity" in line for line in report.lines)
    assert result.figures is not None and len(hub.made) == 1
    assert f"| {result.figures.perplexity:.4g} |" in hub.files(REPO)["README.md"].decode()


def test_a_local_base_that_is_not_given_is_asked_for_before_any_request(
    hub: UploadHub, try_push: Push, measured: dict[str, Any]
) -> None:
    with pytest.raises(OptionError, match="--base FOLDER, or --force"):
        try_push(**{**measured, "base": None})
    assert not hub.requests
    assert try_push().figures is None
    assert "Perplexity was not measured." in hub.files(REPO)["README.md"].decode()


def test_a_base_that_is_another_model_is_refused(
    hub: UploadHub, try_push: Push, tmp_path: Path, make_model: Callable[..., Path]
) -> None:
    other = make_model(tmp_path / "other", intermediate_size=64)
    with pytest.raises(OptionError, match="not the model that was converted, which is tiny-llama"):
        try_push(base=str(other))
    assert not hub.requests


def test_a_text_that_is_missing_is_told_before_any_request(hub: UploadHub, try_push: Push) -> None:
    with pytest.raises(DatasetError, match="nowhere.txt"):
        try_push(text="./nowhere.txt")
    assert not hub.requests


@pytest.mark.parametrize("ratio", [0.5, float("nan"), -1])
def test_a_ratio_below_one_is_refused(ratio: float) -> None:
    with pytest.raises(OptionError, match="--max-ppl-ratio"):
        PushOptions(REPO, max_ppl_ratio=ratio)


# -- the card of a repository ----------------------------------------------------------------------


def test_licence_and_language_come_from_the_card_of_a_local_base(
    hub: UploadHub, try_push: Push, measured: dict[str, Any], tiny_llama: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    (base / "README.md").write_text("---\nlicense: mit\nlanguage: de\n---\n# Base\n")
    try_push(**{**measured, "base": str(base)})
    found = ModelCard(hub.files(REPO)["README.md"].decode()).data.to_dict()
    assert (found["license"], found["language"]) == ("mit", "de")


@pytest.mark.parametrize("where", ["hub", "folder"])
def test_a_card_that_a_user_has_written_is_kept(
    hub: UploadHub, folder: Path, try_push: Push, where: str
) -> None:
    card = b"---\nlicense: mit\n---\n# By hand\n\nKeep this.\n"
    if where == "hub":
        hub.add(REPO, {"README.md": card})
        card = b"# Not this one, which is older"
    (folder / "README.md").write_bytes(card)
    try_push()
    pushed = hub.files(REPO)["README.md"].decode()
    assert "# By hand\n\nKeep this.\n" in pushed and "license: mit" in pushed
    assert len(re.findall("rilq:begin", pushed)) == 1
