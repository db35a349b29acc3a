"""A conversion straight from a Hub, with the real client in a real process."""

import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

SERVER = Path(__file__).parents[1] / "unit" / "formats" / "local_hub.py"
REPO = "org/tiny"
DEEP = "org/deep"


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


@pytest.fixture(scope="session")
def deep_llama(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]) -> Path:
    """A Llama of six decoder layers in seven shards or so, most of which hold parts of two."""
    folder = tmp_path_factory.mktemp("models") / "deep-llama"
    return make_model(folder, max_shard_size="180KB", num_hidden_layers=6)


@pytest.fixture
def deep_hub(hub: Any, deep_llama: Path) -> Any:
    """The Hub, with deep_llama too."""
    hub.add(DEEP, {path.name: path.read_bytes() for path in deep_llama.iterdir()})
    return hub


QUICK = ("--quantizer", "rtn", "--rank", 0)


@pytest.fixture
def from_hub(
    deep_hub: Any, tmp_path: Path, arguments: Callable[..., list[str]], run_cli: Callable[..., Any]
) -> Callable[..., Any]:
    """A quick conversion of the Hub's deep_llama in a forked child; waits are cut short."""

    def run(*more: object, first: Callable[[], None] | None = None, **options: Any) -> Any:
        def use_the_hub() -> None:
            use_hub(deep_hub, tmp_path / "hf")
            if first is not None:
                first()

        words = arguments(tmp_path, *QUICK, *more, model=Path(DEEP), **options)
        return run_cli(*words, first=use_the_hub)

    return run


def use_hub(hub: Any, home: Path) -> None:
    """Point this process's client to the local Hub, as the environment does for a new process."""
    constants.HF_HUB_OFFLINE = False
    constants.ENDPOINT = hub.url
    constants.HUGGINGFACE_CO_URL_TEMPLATE = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    constants.HF_HUB_CACHE = str(home / "hub")
    constants.HF_TOKEN_PATH = str(home / "token")
    os.environ["NO_PROXY"] = "127.0.0.1"
    sleep = time.sleep
    time.sleep = lambda seconds: sleep(seconds / 100)  # between attempts, the client's too


@pytest.fixture
def folder_hashes(
    deep_llama: Path,
    tmp_path: Path,
    arguments: Callable[..., list[str]],
    run_cli: Callable[..., Any],
    hashes: Callable[[Path], dict[str, str]],
) -> dict[str, str]:
    """What the same conversion of the folder gives; rilq.json, which names the source, left out."""
    (tmp_path / "local").mkdir()
    assert run_cli(*arguments(tmp_path / "local", *QUICK, model=deep_llama)).code == 0
    return without_manifest(hashes(tmp_path / "local" / "out"))


def without_manifest(found: dict[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in found.items() if name != "rilq.json"}


class ShardWatch:
    """Looks at a folder all the time: how many shards there are at most, whole or in part."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.most, self.most_bytes, self.looks = folder, 0, 0, 0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.look, daemon=True)

    def look(self) -> None:
        while not self.stop.wait(0.0005):
            sizes: dict[str, int] = {}
            with suppress(OSError):
                for entry in os.scandir(self.folder):
                    with suppress(OSError):
                        sizes[Path(entry).stem] = entry.stat().st_size
            self.looks += 1
            self.most = max(self.most, len(sizes))
            self.most_bytes = max(self.most_bytes, sum(sizes.values()))

    def __enter__(self) -> "ShardWatch":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()


def shards_in(folder: Path) -> list[Path]:
    """Files of weights, whole or in part."""
    return [p for p in folder.rglob("*") if p.suffix in (".safetensors", ".part")]


def test_a_bad_network_and_three_shards_of_disk_give_the_bytes_that_the_folder_gives(
    deep_hub: Any,
    from_hub: Callable[..., Any],
    tmp_path: Path,
    deep_llama: Path,
    folder_hashes: dict[str, str],
    hashes: Callable[[Path], dict[str, str]],
) -> None:
    deep_hub.fail_every({"fail": 2, "reset": 3, "corrupt": 5, "429": 4})
    shards = list(deep_llama.glob("*.safetensors"))
    assert len(shards) >= 6
    with ShardWatch(tmp_path / "out.rilq-work" / "source") as watch:
        ended = from_hub("--evict")
    assert ended.code == 0, ended.err
    assert without_manifest(hashes(tmp_path / "out")) == folder_hashes
    assert 1 < watch.most <= 3, watch.looks
    assert not shards_in(tmp_path / "hf")  # the user's cache stays without weights
    assert not (tmp_path / "out.rilq-work").exists()


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
