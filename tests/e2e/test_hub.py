"""A conversion straight from a Hub, with the real client in a real process."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

SERVER = Path(__file__).parents[1] / "unit" / "formats" / "local_hub.py"
REPO = "org/tiny"


@pytest.fixture
def hub(tiny_llama: Path) -> Iterator[Any]:
    """A local Hub that holds tiny_llama, with a pickle beside its shards."""
    spec = importlib.util.spec_from_file_location("local_hub", SERVER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["local_hub"] = module
    spec.loader.exec_module(module)
    files = {path.name: path.read_bytes() for path in tiny_llama.iterdir()}
    with module.LocalHub() as server:
        server.add(REPO, {**files, "pytorch_model.bin": b"not to be fetched"})
        yield server
    del sys.modules["local_hub"]


@pytest.fixture
def run_on_hub(
    hub: Any, tmp_path: Path, arguments: Callable[..., list[str]], tiny_llama: Path
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_on_hub(*more options)`: the command with the Hub's model in the place of the folder."""

    def run(*more: object, command: str = "convert") -> subprocess.CompletedProcess[str]:
        words = arguments(tmp_path, *more, command=command)
        words = [REPO if word == str(tiny_llama) else word for word in words]
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        return subprocess.run(
            [sys.executable, "-m", "rilq", *words], capture_output=True, text=True, env=environment
        )

    return run


def test_hub_model_gives_the_bytes_that_the_folder_gives(
    run_on_hub: Callable[..., subprocess.CompletedProcess[str]],
    hub: Any,
    tmp_path: Path,
    run_cli: Callable[..., Any],
    arguments: Callable[..., list[str]],
    hashes: Callable[[Path], dict[str, str]],
) -> None:
    hub.fail_next("reset", on=f"GET /{REPO}/resolve")
    ended = run_on_hub()
    assert ended.returncode == 0, ended.stderr
    (tmp_path / "local").mkdir()
    assert run_cli(*arguments(tmp_path / "local")).code == 0
    from_hub, from_folder = hashes(tmp_path / "out"), hashes(tmp_path / "local" / "out")
    assert from_hub.pop("rilq.json") != from_folder.pop("rilq.json")  # it names the source
    assert from_hub == from_folder
    source = json.loads((tmp_path / "out" / "rilq.json").read_text())["source"]
    assert source["name"] == REPO and len(source["commit"]) == 40
    assert not any("pytorch_model.bin" in str(p) for p in (tmp_path / "hf").rglob("*"))


def test_plan_counts_what_is_still_to_be_downloaded(
    run_on_hub: Callable[..., subprocess.CompletedProcess[str]], tiny_llama: Path
) -> None:
    def planned() -> tuple[int, str]:
        ended = run_on_hub("--rank", 0, "--quantizer", "rtn", "--json", command="plan")
        assert ended.returncode == 0, ended.stderr
        disks = json.loads(ended.stdout)["disks"]
        return sum(disk["needed"] for disk in disks), " ".join(disk["holds"] for disk in disks)

    before, holds = planned()
    assert "downloads" in holds
    assert run_on_hub("--rank", 0, "--quantizer", "rtn").returncode == 0
    after, holds = planned()
    assert "downloads" not in holds
    weights = sum(path.stat().st_size for path in tiny_llama.glob("*.safetensors"))
    assert weights < before - after < weights + 100_000  # and the tokenizer


def test_unknown_repository_is_one_line_with_a_remedy(
    run_on_hub: Callable[..., subprocess.CompletedProcess[str]], hub: Any
) -> None:
    ended = run_on_hub("--revision", "nowhere")
    assert ended.returncode == 2
    assert "nowhere" in ended.stderr and "Traceback" not in ended.stderr
