"""The commands of model cards and of docs/exports.md, run as they stand.

mlx-lm, gptqmodel and compressed-tensors have theirs in test_runtimes.py.
"""

import os
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from upload_hub import UploadHub, serving

from rilq.evaluation.loading import RUNTIMES, code
from rilq.evaluation.push import PushOptions, push

# The client library's own, of how it hands a file to its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

Run = Callable[..., Any]

REPO = "org/tiny-w2"
DOCS = Path(__file__).parents[2] / "docs" / "exports.md"
TRAINED = ("--steps", 20, "--val-every", 20, "--batch-size", 8)
KEEP = ("--zero-point", "integer", "--keep-adapter", "--rank", 16, "--lr", "1e-2", *TRAINED)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[UploadHub]:
    with serving(monkeypatch, tmp_path / "cache") as hub:
        yield hub


def pushed_card(hub: UploadHub, folder: Path, text: Path) -> str:
    push(folder, PushOptions(REPO, force=True, text=str(text), device="cpu"))
    return hub.files(REPO)["README.md"].decode()


def blocks(language: str, markdown: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)\n```", markdown, re.DOTALL)


def sections(card: str) -> dict[str, str]:
    """Title to text of what the card says of each runtime but the first."""
    use = card.partition("## Use\n")[2].partition("\n## ")[0]
    _, *parts = use.split("\n### ")
    return dict(part.split("\n", 1) for part in parts)  # type: ignore[misc]


def generates(in_child: Run, python: str, folder: Path) -> None:
    """Run a block of Python in a folder; it must write a continuation."""

    def body() -> None:
        os.chdir(folder)
        exec(python, {})

    shown = in_child(body)
    assert shown.code == 0, shown.err
    assert shown.out.startswith("Once upon a time") and len(shown.out) > len("Once upon a time\n")


def test_every_export_of_the_card_is_made_from_the_hub_and_loads_where_its_runtime_is_here(
    hub: UploadHub, native: Run, calib: Path, run_cli: Run, in_child: Run, tmp_path: Path
) -> None:
    folder = native("llama", {}, *KEEP)
    card = pushed_card(hub, folder, calib)
    expected = logits(folder)
    found = sections(card)
    titles = {runtime.title: kind for kind, runtime in RUNTIMES.items() if kind != "native"}
    assert found.keys() == titles.keys()
    generates(in_child, blocks("python", card)[0], tmp_path)
    for title, text in found.items():
        kind = titles[title]
        command, *use = blocks("sh", text)[0].splitlines()
        ended = run_cli(*shlex.split(command)[1:], first=lambda: os.chdir(tmp_path))
        assert ended.code == 0, ended.err
        out = tmp_path / f"tiny-w2-{kind}"
        adapter = (out / "adapter").is_dir()
        said = use[0] if use else blocks("python", text)[0]
        assert said == code(kind, out.name, adapter=adapter)
        if kind in ("dense", "metal"):
            generates(in_child, said, tmp_path)
            assert (logits(out) - expected).abs().max() < 0.02 * expected.std()
    words = ("push", out, "org/tiny-w2-out", "--text", calib, "--device", "cpu", "--force")
    assert run_cli(*words, "--native", out).code == 2
    assert run_cli(*words, "--native", folder).code == 0 and hub.files("org/tiny-w2-out")


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    with torch.no_grad():
        found = torch.nn.Module.float(model)(torch.arange(3, 51)[None]).logits
    return found  # type: ignore[no-any-return]


# PEFT 0.21 asks transformers 5.23 for an attribute by its old name.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_a_lora_beside_the_base_is_attached_by_the_cards_commands(
    hub: UploadHub, native: Run, calib: Path, in_child: Run, tmp_path: Path
) -> None:
    lora = ("--rank", 4, "--adapter", "lora", "--steps", 24, "--lr", "3e-3", "--val-every", 4)
    card = pushed_card(hub, native("llama", {}, *lora), calib)
    (python,) = [block for block in blocks("python", card) if "import rilq" in block]
    assert "PeftModel" in python
    generates(in_child, python, tmp_path)
    assert "--lora tiny-w2-gguf/adapter.gguf" in sections(card)["llama.cpp"]
    assert "mlx-lm" not in sections(card), "which cannot hold a LoRA"


def test_the_documentation_says_what_the_cards_say_and_its_code_runs(
    native: Run, export: Run, in_child: Run, tmp_path: Path
) -> None:
    text = DOCS.read_text()
    kinds = [kind for kind in RUNTIMES if kind != "native"]
    said = {
        kind: code(kind, f"OUT/{kind}", adapter=kind in ("gptq", "compressed-tensors"))
        for kind in kinds
    }
    python = {kind: text for kind, text in said.items() if not RUNTIMES[kind].commands}
    assert sorted(blocks("python", text)) == sorted(python.values())
    assert all(said[kind] in text for kind in kinds)
    assert export(native("llama", {}), tmp_path / "OUT", "dense", "metal").code == 0
    for kind in ("dense", "metal"):
        generates(in_child, said[kind], tmp_path)
