"""`rilq push` and `convert --push-to`, with a Hub on this machine, stopped and run again."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard
from upload_hub import WRITER, UploadHub, serving

from rilq import cli
from rilq.formats import hub_requests

# The client library's own, of how it hands a file to its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

BASE, REPO = "org/tiny", "org/tiny-w2"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_llama: Path) -> Iterator[UploadHub]:
    """A Hub that holds tiny_llama with a card, for this process and its children."""
    files = {path.name: path.read_bytes() for path in tiny_llama.iterdir()}
    monkeypatch.setattr(hub_requests, "time", SimpleNamespace(sleep=lambda _: time.sleep(0.01)))
    with serving(monkeypatch, tmp_path / "cache") as hub:
        hub.add(BASE, {**files, "README.md": b"---\nlicense: mit\nlanguage: en\n---\n# Tiny\n"})
        yield hub


@pytest.fixture
def convert_hub_model(
    hub: UploadHub, tmp_path: Path, arguments: Any, tiny_llama: Path, calib: Path, run_cli: Any
) -> Callable[..., Any]:
    """A function that converts the Hub's model, by rounding, and pushes it."""

    def run(*more: object) -> Any:
        words = arguments(tmp_path, "--quantizer", "rtn", "--rank", 0, "--push-to", REPO, *more)
        words = [BASE if word == str(tiny_llama) else word for word in words]
        return run_cli(*words, "--eval-text", calib)

    return run


def test_77_convert_asks_for_the_right_to_write_before_it_quantizes(
    hub: UploadHub,
    convert_hub_model: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_guest")
    ended = convert_hub_model()
    assert ended.code == 2 and "right to write to org" in ended.err, ended.err
    assert "Traceback" not in ended.err and "hf_guest" not in ended.err
    assert not list(tmp_path.glob("out*")) and not hub.made
    assert all(request.range for request in hub.got("GET /model-0000"))  # headers only, to plan


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--push-to", "tiny"], "owner/name"),
        (["--push-to", REPO, "--eval-text", "./nowhere.txt"], "nowhere.txt"),
        (["--push-to", REPO, "--max-ppl-ratio", "0.5"], "--max-ppl-ratio 0.5"),
        (["--private"], "--push-to OWNER/NAME"),
    ],
)
def test_a_push_that_cannot_be_is_refused_before_the_conversion(
    hub: UploadHub, run_cli: Any, arguments: Any, tmp_path: Path, more: list[str], words: str
) -> None:
    ended = run_cli(*arguments(tmp_path, *more))
    assert ended.code == 2 and words in ended.err and "Traceback" not in ended.err
    assert not list(tmp_path.glob("out*")) and not hub.requests


def test_convert_pushes_its_result_with_a_card_of_the_base_once(
    hub: UploadHub, convert_hub_model: Callable[..., Any]
) -> None:
    hub.fail_next("lost", on="/commit/")
    ended = convert_hub_model("--json")
    assert ended.code == 0, ended.err
    answer = json.loads(ended.out)["pushed"]
    (commit,) = hub.made
    assert answer["commit"] == commit.id and answer["figures"]["perplexity"] > 1
    card = hub.files(REPO)["README.md"].decode()
    found = ModelCard(card).data.to_dict()
    assert (found["base_model"], found["base_model_relation"]) == (BASE, "quantized")
    assert (found["license"], found["language"]) == ("mit", "en")
    assert WRITER not in ended.out + ended.err + card
    again = json.loads(convert_hub_model("--json").out)
    assert again["already_done"] and again["pushed"]["unchanged"] and len(hub.made) == 1


def test_78_79_a_push_killed_in_an_upload_is_finished_by_the_same_command_in_one_commit(
    hub: UploadHub, native: Any, run_cli: Any, start_child: Any, calib: Path
) -> None:
    folder = native("llama", {})
    words = ["rilq", "push", str(folder), REPO, "--force", "--text", str(calib)]

    def command() -> None:
        sys.argv = words
        cli.main()

    started, child = threading.Event(), None

    def kill(what: str) -> None:
        started.wait()
        assert child is not None
        os.kill(child.pid, signal.SIGKILL)

    hub.watchers.append(kill)
    child = start_child(command)
    started.set()
    assert child.wait().code == -signal.SIGKILL
    hub.watchers.clear()
    assert hub.files(REPO).keys() == {".gitattributes"} and len(hub.objects) == 1
    hub.fail_next("cut", on="PUT /lfs")
    hub.fail_next("lost", on="/commit/")
    for _ in range(2):  # the second finds all done
        ended = run_cli(*words[1:])
        assert ended.code == 0, ended.err
    shards = len(list(folder.glob("*.safetensors")))
    assert shards > 1 and len(hub.got("PUT /lfs")) == shards + 1  # the cut one twice
    (commit,) = hub.made
    pushed = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert hub.files(REPO).keys() == {".gitattributes", "README.md", *pushed}
    assert all(hub.files(REPO)[name] == content for name, content in pushed.items())


def test_86_a_token_on_the_command_line_is_refused_and_not_repeated(
    hub: UploadHub, run_cli: Any, tmp_path: Path
) -> None:
    for words in (["--token", WRITER], [f"--token={WRITER}"]):
        ended = run_cli("push", tmp_path, REPO, *words)
        assert ended.code == 2 and WRITER not in ended.out + ended.err
    assert not hub.requests


def test_a_folder_that_rilq_has_not_made_is_refused_without_a_request(
    hub: UploadHub, run_cli: Any, tiny_llama: Path
) -> None:
    ended = run_cli("push", tiny_llama, REPO)
    assert ended.code == 2 and "rilq.json" in ended.err and not hub.requests
