"""Downloads with the real client library from a Hub on this machine that fails on request."""

import errno
import importlib.util
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, close_session, constants
from huggingface_hub.utils import WeakFileLock
from safetensors.torch import save

from rilq.errors import CheckpointError, HubError, OptionError, OutputError
from rilq.formats.checkpoint import Checkpoint
from rilq.formats.hub import FIRST_BYTES, HubRepository, open_source
from rilq.formats.hub_requests import Patience
from rilq.formats.hub_window import ShardWindow
from rilq.formats.source import LocalFolder
from rilq.progress import SilentReporter

REPO = "org/model"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
QUICK = Patience(delays=(0.01,) * 6)


def load(name: str) -> ModuleType:
    """A module beside this file; tests/ is no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


local_hub = load("local_hub")


@dataclass
class Notes(SilentReporter):
    """Keeps what was reported."""

    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def note(self, message: str) -> None:
        self.notes.append(message)

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def model(seed: int = 0) -> dict[str, bytes]:
    """Two shards of 200 kB with their index, and a pickle beside them."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {f"layer.{i}.weight": torch.randn(50, 1000, generator=draw) for i in range(2)}
    weight_map = dict(zip(tensors, SHARDS, strict=True))
    files = {shard: save({name: tensors[name]}) for name, shard in weight_map.items()}
    index = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    return {
        "config.json": json.dumps({"model_type": "llama", "seed": seed}).encode(),
        "model.safetensors.index.json": index,
        "pytorch_model.bin": b"a pickle that must not be fetched",
        "original/consolidated.00.pth": b"another one",
        **files,
    }


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """An empty Hub, and a client library in this process that may use a network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "")
    close_session()  # it may hold proxies from before
    with local_hub.LocalHub() as hub:
        yield hub
    close_session()


@pytest.fixture
def open_repo(hub: Any) -> Callable[..., HubRepository]:
    """`HubRepository.open` with short waits."""

    def opener(repo_id: str = REPO, revision: str | None = None, **options: Any) -> HubRepository:
        return HubRepository.open(
            repo_id, revision, endpoint=hub.url, **{"patience": QUICK, **options}
        )

    return opener


def blobs(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "models--org--model" / "blobs").iterdir())


def one_line(caught: pytest.ExceptionInfo[Exception]) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


# What a name means


def test_an_existing_folder_wins_over_a_hub_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert open_source("org/model") == LocalFolder(Path("org/model"))


@pytest.mark.parametrize(
    "text", ["/no/such", "./model", "../x", "~/no-such-folder", "a/b/c", "model/"]
)
def test_a_missing_path_is_named_and_not_looked_up_on_the_hub(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder") as caught:
        open_source(text)
    assert text in str(caught.value)


@pytest.mark.parametrize("text", ["", "my model", "org/na--me", "org/model.git"])
def test_what_can_be_neither_folder_nor_hub_name_is_refused(text: str) -> None:
    with pytest.raises(CheckpointError, match="neither a folder nor a name on the Hub"):
        open_source(text)


def test_a_file_is_not_a_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(CheckpointError, match="is a file"):
        open_source(str(file))


def test_a_revision_of_a_local_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="local folder"):
        open_source(str(tmp_path), revision="main")


def test_any_other_name_is_opened_on_the_hub(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    commit = hub.add(REPO, model())
    source = open_source(REPO)
    assert (source.label, source.commit) == (REPO, commit)


# The commit, and what is fetched of it


def test_the_commit_stays_pinned_when_the_branch_moves(
    hub: Any, open_repo: Callable[..., HubRepository]
) -> None:
    first = hub.add(REPO, model(seed=0))
    repo = open_repo()
    hub.add(REPO, model(seed=1))
    assert repo.path("config.json").read_bytes() == model(seed=0)["config.json"]
    assert repo.path(SHARDS[0]).read_bytes() == model(seed=0)[SHARDS[0]]
    assert repo.commit == first


def test_only_files_at_the_top_level_are_listed_with_their_sizes(
    hub: Any, open_repo: Callable[..., HubRepository]
) -> None:
    hub.add(REPO, model())
    sizes = {name: len(content) for name, content in model().items() if "/" not in name}
    assert open_repo().files() == sizes


def test_reading_everything_fetches_each_shard_once_and_no_pickle(
    hub: Any, open_repo: Callable[..., HubRepository]
) -> None:
    hub.add(REPO, model())
    checkpoint = Checkpoint.open(open_repo())
    tensors = checkpoint.read(checkpoint.tensors)
    draw = torch.Generator().manual_seed(0)
    assert torch.equal(tensors["layer.0.weight"], torch.randn(50, 1000, generator=draw))
    assert not hub.got("pytorch_model.bin") and not hub.got("consolidated")
    for shard in SHARDS:
        assert [r.range for r in hub.got(f"GET /{shard}")] == [f"bytes=0-{FIRST_BYTES - 1}", None]


def test_opening_a_checkpoint_fetches_no_shard(
    hub: Any, open_repo: Callable[..., HubRepository], tmp_path: Path
) -> None:
    hub.add(REPO, model())
    Checkpoint.open(open_repo())
    assert sum(blob.stat().st_size for blob in blobs(tmp_path)) < 1000  # config and index
    assert all(request.range for request in hub.got("GET /model-0000"))


def test_a_long_header_takes_a_second_request_and_no_more_bytes_than_it_has(
    hub: Any, open_repo: Callable[..., HubRepository]
) -> None:
    content = save({"w": torch.zeros(100_000)}, {"padding": "x" * 2 * FIRST_BYTES})
    hub.add(REPO, {"model.safetensors": content})
    length = 8 + int.from_bytes(content[:8], "little")
    assert open_repo().head("model.safetensors") == (content[:length], len(content))
    assert sum(request.sent for request in hub.got("GET /model.safetensors")) == length


def test_the_header_of_a_cached_shard_needs_no_request(
    hub: Any, open_repo: Callable[..., HubRepository]
) -> None:
    hub.add(REPO, model())
    repo = open_repo()
    fetched, path = repo.head(SHARDS[0]), repo.path(SHARDS[0])
    before = len(hub.requests)
    assert open_repo().head(SHARDS[0]) == fetched
    assert len(hub.requests) == before + 1  # the listing
    assert path.read_bytes().startswith(fetched[0])


def test_a_file_that_the_commit_lacks_is_named(
    hub: Any, open_repo: Callable[..., HubRepository]
) -> None:
    hub.add(REPO, model())
    with pytest.raises(HubError, match="org/model/tokenizer.json: is not in commit") as caught:
        open_repo().path("tokenizer.json")
    one_line(caught)


# Damage


@pytest.mark.parametrize("name", [SHARDS[0], "config.json"])
def test_a_flipped_byte_is_noticed_and_the_file_fetched_again(
    hub: Any, open_repo: Callable[..., HubRepository], name: str
) -> None:
    hub.add(REPO, model())
    hub.fail_next("corrupt", on=name)
    report = Notes()
    path = open_repo(report=report).path(name)
    assert path.read_bytes() == model()[name]
    assert f"{REPO}/{name}: checksum does not match; fetching it again" in report.notes


def test_a_file_that_is_damaged_every_time_is_refused_and_not_kept(
    hub: Any, open_repo: Callable[..., HubRepository], tmp_path: Path
) -> None:
    hub.add(REPO, model())
    hub.fail_next("corrupt", local_hub.ALWAYS)
    with pytest.raises(HubError, match=f"{SHARDS[0]}: arrived damaged 4 times") as caught:
        open_repo().path(SHARDS[0])
    one_line(caught)
    assert len(hub.got(f"GET /{SHARDS[0]}")) == 4
    assert blobs(tmp_path) == []


def test_a_file_damaged_in_the_cache_is_fetched_again(
    hub: Any, open_repo: Callable[..., HubRepository]
) -> None:
    hub.add(REPO, model())
    path = open_repo().path(SHARDS[0])
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert open_repo().path(SHARDS[0]).read_bytes() == model()[SHARDS[0]]


def test_a_file_truncated_in_the_cache_is_fetched_again(
    hub: Any, open_repo: Callable[..., HubRepository]
) -> None:
    hub.add(REPO, model())
    path = open_repo().path(SHARDS[0])
    path.write_bytes(b"")
    assert open_repo().head(SHARDS[0])[1] == len(model()[SHARDS[0]])
    assert open_repo().path(SHARDS[0]).read_bytes() == model()[SHARDS[0]]


def test_a_file_changed_after_it_was_verified_is_verified_again(
    hub: Any, open_repo: Callable[..., HubRepository]
) -> None:
    hub.add(REPO, model())
    repo = open_repo()
    path = repo.path(SHARDS[0])
    path.write_bytes(b"something else")
    assert repo.path(SHARDS[0]).read_bytes() == model()[SHARDS[0]]


def test_a_damaged_header_is_fetched_again(
    hub: Any, open_repo: Callable[..., HubRepository]
) -> None:
    sizes = (save({"w": torch.zeros(4)}, {"note": "x" * n}) for n in range(100))
    # The fault hits the middle; a quote there is a part of the header that cannot be missed.
    content = next(content for content in sizes if content[len(content) // 2] == ord('"'))
    hub.add(REPO, {"model.safetensors": content})
    hub.fail_next("corrupt", 2, on="GET /model.safetensors")
    assert open_repo().head("model.safetensors") == (content[:-16], len(content))
    assert len(hub.got("GET /model.safetensors")) == 3


# Faults of the network


@pytest.mark.parametrize("kind", ["fail", "reset", "truncate"])
def test_a_body_that_breaks_off_is_fetched_whole(
    hub: Any, open_repo: Callable[..., HubRepository], kind: str
) -> None:
    hub.add(REPO, model())
    repo = open_repo()
    hub.fail_next(kind, on=f"GET /{SHARDS[1]}")
    assert repo.path(SHARDS[1]).read_bytes() == model()[SHARDS[1]]
    assert len(hub.got(f"GET /{SHARDS[1]}")) == 2


@pytest.mark.parametrize("kind", ["fail", "reset", "truncate", "503", "429"])
def test_a_header_request_that_fails_is_made_again(
    hub: Any, open_repo: Callable[..., HubRepository], kind: str
) -> None:
    hub.add(REPO, model())
    repo = open_repo()
    hub.fail_next(kind, 2, on=f"GET /{SHARDS[1]}")
    assert repo.head(SHARDS[1])[0] == model()[SHARDS[1]][: len(repo.head(SHARDS[1])[0])]


def test_a_busy_hub_and_a_busy_cdn_do_not_use_up_one_patience(
    hub: Any, open_repo: Callable[..., HubRepository]
) -> None:
    hub.add(REPO, model())
    repo = open_repo()
    hub.fail_next("503", 4, on=f"GET /{SHARDS[0]}")
    hub.fail_next("429", 4, on=f"GET /{REPO}/resolve")
    assert repo.head(SHARDS[0])[1] == len(model()[SHARDS[0]])


@pytest.mark.parametrize("on", ["GET /api/models", "HEAD /org/model", f"GET /{SHARDS[0]}"])
@pytest.mark.parametrize("status", ["500", "503"])
def test_a_busy_server_is_asked_again(
    hub: Any, open_repo: Callable[..., HubRepository], on: str, status: str
) -> None:
    hub.add(REPO, model())
    hub.fail_next(status, on=on)
    assert open_repo().path(SHARDS[0]).read_bytes() == model()[SHARDS[0]]


def test_retry_after_is_obeyed(hub: Any, open_repo: Callable[..., HubRepository]) -> None:
    hub.add(REPO, model())
    hub.fail_next("429", on="GET /api/models", retry_after=1)
    started, report = time.monotonic(), Notes()
    open_repo(report=report)
    assert time.monotonic() - started >= 1
    assert f"{REPO}: the Hub answered 429; trying again in 1 s" in report.notes


def test_a_wait_that_is_asked_for_has_an_upper_limit(
    hub: Any, open_repo: Callable[..., HubRepository]
) -> None:
    hub.add(REPO, model())
    hub.fail_next("429", on="GET /api/models", retry_after=86400)
    assert open_repo(patience=Patience(delays=(0.01,), longest=0.02)).commit


@pytest.mark.parametrize(
    "kind, words, in_vain",
    [  # the last half that came counts as the first attempt
        ("truncate", r"0 of 1 bytes arrived; run the same command again.*bytes are kept", 6),
        ("503", "keeps answering 503", 7),
    ],
)
def test_a_file_that_never_comes_is_given_up_by_name(
    hub: Any, open_repo: Callable[..., HubRepository], kind: str, words: str, in_vain: int
) -> None:
    hub.add(REPO, model())
    hub.fail_next(kind, local_hub.ALWAYS, on="GET /model")
    with pytest.raises(HubError, match=words) as caught:
        open_repo().path(SHARDS[0])
    assert one_line(caught).startswith(f"{REPO}/{SHARDS[0]}: ")
    asked = [r for r in hub.got(f"GET /{SHARDS[0]}") if not r.sent or kind == "503"]
    assert len(asked) == in_vain


def test_no_network_is_an_error_within_seconds(
    hub: Any, open_repo: Callable[..., HubRepository]
) -> None:
    hub.stop()
    started = time.monotonic()
    with pytest.raises(HubError, match="cannot be reached.*HF_ENDPOINT") as caught:
        open_repo(patience=Patience())
    assert hub.url in one_line(caught)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("endpoint", ["127.0.0.1:1", "http://127.0.0.1:notaport"])
def test_an_endpoint_that_is_no_url_is_one_line(
    open_repo: Callable[..., HubRepository], monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    with pytest.raises(HubError) as caught:
        HubRepository.open(REPO, endpoint=endpoint, patience=QUICK)
    one_line(caught)


def test_a_login_page_instead_of_the_hub_is_told_as_such(
    hub: Any, open_repo: Callable[..., HubRepository]
) -> None:
    hub.page = "<html>please log in</html>"
    with pytest.raises(HubError, match="does not answer as a Hub does.*proxy") as caught:
        open_repo()
    one_line(caught)


def test_a_login_page_in_the_middle_is_never_taken_for_a_file(
    hub: Any, open_repo: Callable[..., HubRepository], tmp_path: Path
) -> None:
    hub.add(REPO, model())
    repo = open_repo()
    hub.page = "<html>please log in</html>"
    with pytest.raises(HubError, match="does not answer as a Hub does") as caught:
        repo.path("config.json")
    one_line(caught)


def test_a_login_page_in_the_place_of_a_shard_is_told_as_such_and_not_kept(
    hub: Any, open_repo: Callable[..., HubRepository], tmp_path: Path
) -> None:
    hub.add(REPO, model())
    repo = open_repo()
    hub.page = "<html>please log in</html>"
    with pytest.raises(HubError, match="does not answer as a Hub does.*proxy") as caught:
        repo.path(SHARDS[0])
    one_line(caught)
    assert [blob.stat().st_size for blob in blobs(tmp_path)] == [0]


def test_a_renamed_repository_is_read_with_a_warning_that_says_its_name(
    hub: Any, open_repo: Callable[..., HubRepository]
) -> None:
    hub.add(REPO, model())
    hub.renamed["old/name"] = REPO
    report = Notes()
    checkpoint = Checkpoint.open(open_repo("old/name", report=report))
    checkpoint.read(checkpoint.tensors)
    assert report.warnings == ["old/name: is called org/model now; use that name"]


def test_a_proxy_is_used_for_headers_files_and_shards(
    hub: Any, open_repo: Callable[..., HubRepository], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", hub.url)  # it answers requests for any host
    close_session()
    hub.add(REPO, model())
    repo = HubRepository.open(REPO, endpoint="http://hub.example", patience=QUICK)
    assert repo.head(SHARDS[0])[1] == len(model()[SHARDS[0]])
    assert repo.path(SHARDS[0]).read_bytes() == model()[SHARDS[0]]


# Rights


@pytest.mark.parametrize(
    "repo_id, revision, token, words",
    [
        ("org/gated", None, "", "gated; accept its licence at http.*/org/gated then run `hf auth"),
        ("org/gated", None, "hf_guest", "accept its licence at .*/org/gated with the account"),
        ("org/private", None, "", "check the spelling, or if it is private, run `hf auth login`"),
        ("org/private", None, "hf_guest", "if it is private, use a token that may read it"),
        ("org/unknown", None, "", "check the spelling"),
        ("org/unknown", None, "hf_member", "check the spelling"),
        ("org/gated", "v9", "", "has no revision v9; its branches and tags are listed at"),
        ("org/gated", None, "hf_stale", "refused the token; make a new one"),
        ("org/gated", None, "hf_\x0bstale", "the token holds characters that cannot be sent"),
        ("org/gated", None, "hf_stalé", "the token holds characters that cannot be sent"),
    ],
)
def test_a_refusal_is_one_line_with_the_remedy_and_without_the_token(
    open_repo: Callable[..., HubRepository],
    hub: Any,
    monkeypatch: pytest.MonkeyPatch,
    repo_id: str,
    revision: str | None,
    token: str,
    words: str,
) -> None:
    hub.add("org/gated", model(), gated=True)
    hub.add("org/private", model(), private=True)
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError, match=words) as caught:
        open_repo(repo_id, revision).path("config.json")
    assert one_line(caught).startswith(repo_id)
    error: BaseException | None = caught.value
    while error is not None and token:
        assert token[-5:] not in str(error)  # the end, since a quoted token may be escaped
        error = error.__cause__


@pytest.mark.parametrize("repo_id", ["org/gated", "org/private"])
def test_a_token_with_the_right_opens_gated_and_private_repositories(
    hub: Any,
    open_repo: Callable[..., HubRepository],
    monkeypatch: pytest.MonkeyPatch,
    repo_id: str,
) -> None:
    hub.add(repo_id, model(), gated=True, private=repo_id.endswith("private"))
    monkeypatch.setenv("HF_TOKEN", "hf_member")
    Checkpoint.open(open_repo(repo_id)).read(["layer.0.weight"])
    assert all(request.authorized for request in hub.requests if request.origin == "hub")


def test_the_token_never_reaches_the_cdn(
    hub: Any, open_repo: Callable[..., HubRepository], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, model(), gated=True)
    monkeypatch.setenv("HF_TOKEN", "hf_member")
    hub.fail_next("reset", on=f"GET /{SHARDS[0]}")
    repo = open_repo()
    repo.head(SHARDS[0])
    repo.path(SHARDS[0])
    on_cdn = [request for request in hub.requests if request.origin == "cdn"]
    assert len(on_cdn) >= 3 and not any(request.authorized for request in on_cdn)


def test_notes_and_errors_hold_no_signature_of_the_cdn(
    hub: Any, open_repo: Callable[..., HubRepository]
) -> None:
    hub.add(REPO, model())
    hub.fail_next("503", local_hub.ALWAYS, on=f"GET /{SHARDS[0]}")
    report = Notes()
    with pytest.raises(HubError) as caught:
        open_repo(report=report).path(SHARDS[0])
    assert "secret-of-the-cdn" not in "".join([str(caught.value), *report.notes])


# Parts of files


def part_of(tmp_path: Path, repo: HubRepository, name: str) -> Path:
    digest = repo.listing[name].digest
    return tmp_path / "cache" / "models--org--model" / "blobs" / f"{digest}.part"


def test_what_another_process_had_fetched_is_continued_by_range(
    hub: Any, open_repo: Callable[..., HubRepository], tmp_path: Path
) -> None:
    hub.add(REPO, model())
    hub.fail_next("fail", on=f"GET /{SHARDS[0]}")
    with pytest.raises(HubError, match=r"\(100044 of 200088 bytes are kept\)$"):
        open_repo(patience=Patience(delays=())).path(SHARDS[0])
    repo = open_repo()
    assert part_of(tmp_path, repo, SHARDS[0]).stat().st_size == 100044
    assert repo.to_fetch([[SHARDS[0]]]) == {tmp_path / "cache": 100044}
    assert repo.path(SHARDS[0]).read_bytes() == model()[SHARDS[0]]
    asked = [r.range for r in hub.got(f"GET /{SHARDS[0]}")]
    assert asked == [None, "bytes=100044-200087"]
    assert not part_of(tmp_path, repo, SHARDS[0]).exists()
    umask = os.umask(0o022)
    os.umask(umask)
    assert repo.path(SHARDS[0]).stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("damage", ["flipped", "too long", "zeros"])
def test_a_damaged_part_is_noticed_and_the_file_fetched_anew(
    hub: Any, open_repo: Callable[..., HubRepository], tmp_path: Path, damage: str
) -> None:
    hub.add(REPO, model())
    repo = open_repo()
    part, good = part_of(tmp_path, repo, SHARDS[0]), model()[SHARDS[0]]
    part.parent.mkdir(parents=True)
    content = {"flipped": b"x" + good[1:1000], "too long": good + b"x", "zeros": bytes(1000)}
    part.write_bytes(content[damage])
    assert repo.path(SHARDS[0]).read_bytes() == good


def test_nothing_has_a_final_name_before_its_digest_is_right(
    hub: Any, open_repo: Callable[..., HubRepository], tmp_path: Path
) -> None:
    hub.add(REPO, model())
    hub.fail_next("fail", on=f"GET /{SHARDS[0]}")
    with pytest.raises(HubError):
        open_repo(patience=Patience(delays=())).path(SHARDS[0])
    assert [blob.suffix for blob in blobs(tmp_path)] == [".part"]
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_server_that_ignores_the_range_is_no_obstacle(
    hub: Any, open_repo: Callable[..., HubRepository], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, model())
    hub.fail_next("fail", on=f"GET /{SHARDS[0]}")
    repo = open_repo()
    monkeypatch.setattr(hub, "ranges", False)
    assert repo.path(SHARDS[0]).read_bytes() == model()[SHARDS[0]]
    assert [r.sent for r in hub.got(f"GET /{SHARDS[0]}")] == [100044, 200088]


def test_a_silent_connection_is_left_and_the_file_continued(
    hub: Any, open_repo: Callable[..., HubRepository], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    hub.add(REPO, model())
    hub.fail_next("stall", 2, on=f"GET /{SHARDS[0]}")
    report = Notes()
    assert open_repo(report=report).path(SHARDS[0]).read_bytes() == model()[SHARDS[0]]
    assert sum(r.sent for r in hub.got(f"GET /{SHARDS[0]}")) == len(model()[SHARDS[0]])
    assert sum("ReadTimeout" in note for note in report.notes) == 2


def test_a_part_that_is_a_link_is_not_followed(
    hub: Any, open_repo: Callable[..., HubRepository], tmp_path: Path
) -> None:
    hub.add(REPO, model())
    repo = open_repo()
    part, victim = part_of(tmp_path, repo, SHARDS[0]), tmp_path / "victim"
    part.parent.mkdir(parents=True)
    victim.write_text("mine")
    part.symlink_to(victim)
    with pytest.raises(OutputError, match="cannot be stored"):
        repo.path(SHARDS[0])
    assert victim.read_text() == "mine"


def test_a_sync_that_fails_leaves_no_file_under_its_name(
    hub: Any,
    open_repo: Callable[..., HubRepository],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(_handle: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    hub.add(REPO, model())
    repo = open_repo()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        with pytest.raises(OutputError, match="Input/output error") as caught:
            repo.path(SHARDS[0])
    one_line(caught)
    assert [blob.suffix for blob in blobs(tmp_path)] == [".part"]
    assert repo.path(SHARDS[0]).read_bytes() == model()[SHARDS[0]]


def test_of_two_that_fetch_one_file_one_waits_for_the_other(
    hub: Any, open_repo: Callable[..., HubRepository]
) -> None:
    hub.add(REPO, model())
    hub.stall_seconds = 0.5
    hub.fail_next("stall", on=f"GET /{SHARDS[0]}")
    reports = [Notes(), Notes()]
    repos = [open_repo(report=report) for report in reports]
    with ThreadPoolExecutor() as pool:
        paths = list(pool.map(lambda repo: repo.path(SHARDS[0]), repos))
    assert paths[0] == paths[1] and paths[0].read_bytes() == model()[SHARDS[0]]
    assert sum(r.sent for r in hub.got(f"GET /{SHARDS[0]}")) == len(model()[SHARDS[0]])
    assert sum("another process" in note for r in reports for note in r.notes) == 1


def test_content_that_the_cache_has_of_another_commit_is_not_fetched_again(
    hub: Any, open_repo: Callable[..., HubRepository]
) -> None:
    hub.add(REPO, model())
    open_repo().path(SHARDS[0])
    hub.add(REPO, {**model(), "README.md": b"# Now with a card"})
    repo = open_repo()
    assert repo.to_fetch([[SHARDS[0]]]) == {}
    assert repo.path(SHARDS[0]).read_bytes() == model()[SHARDS[0]]
    assert len(hub.got(f"GET /{SHARDS[0]}")) == 1


# A window of few shards


def test_a_window_keeps_shards_out_of_the_cache_and_deletes_them_after_use(
    hub: Any, open_repo: Callable[..., HubRepository], tmp_path: Path
) -> None:
    hub.add(REPO, model())
    window = ShardWindow(open_repo(), tmp_path / "window")
    checkpoint = Checkpoint.open(window)
    with checkpoint.in_order([["layer.0.weight"], ["layer.1.weight"]]) as advance:
        assert checkpoint.read(["layer.0.weight"])["layer.0.weight"].shape == (50, 1000)
        first = window.path(SHARDS[0])
        advance()
        assert not first.exists()
        checkpoint.read(["layer.1.weight"])
        advance()
    assert not (tmp_path / "window").exists()
    assert sum(blob.stat().st_size for blob in blobs(tmp_path)) < 1000  # config and index


def test_a_damaged_shard_in_the_users_cache_is_left_there_and_not_used(
    hub: Any, open_repo: Callable[..., HubRepository], tmp_path: Path
) -> None:
    hub.add(REPO, model())
    cached = open_repo().path(SHARDS[0])
    cached.write_bytes(cached.read_bytes()[:-1] + b"x")
    window = ShardWindow(open_repo(), tmp_path / "window")
    assert window.to_fetch([[SHARDS[0]]]) == {}
    path = window.path(SHARDS[0])
    assert path.parent == tmp_path / "window" and path.read_bytes() == model()[SHARDS[0]]
    assert cached.read_bytes() != model()[SHARDS[0]]


def test_a_shard_damaged_in_the_window_is_fetched_again(
    hub: Any, open_repo: Callable[..., HubRepository], tmp_path: Path
) -> None:
    hub.add(REPO, model())
    path = ShardWindow(open_repo(), tmp_path / "window").path(SHARDS[0])
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    again = ShardWindow(open_repo(), tmp_path / "window").path(SHARDS[0])
    assert again == path and again.read_bytes() == model()[SHARDS[0]]


def test_a_window_removes_what_an_earlier_run_left_and_nothing_of_others(
    hub: Any, open_repo: Callable[..., HubRepository], tmp_path: Path
) -> None:
    hub.add(REPO, model())
    repo, folder = open_repo(), tmp_path / "window"
    digests = [repo.listing[name].digest for name in SHARDS]
    folder.mkdir()
    for name in (f"{digests[0]}.safetensors", f"{digests[1]}.part", "thesis.txt"):
        (folder / name).write_bytes(b"x" * 1000)
    window = ShardWindow(repo, folder)
    # What is there needs no room any more, be it continued or removed.
    assert window.to_fetch([[SHARDS[1]]]) == {folder: 200088 - 2000}
    with window.in_order([[SHARDS[1]]]):
        assert not (folder / f"{digests[0]}.safetensors").exists()
    assert (folder / "thesis.txt").exists()


def test_a_window_smaller_than_a_step_is_refused_with_what_it_needs(
    hub: Any, open_repo: Callable[..., HubRepository], tmp_path: Path
) -> None:
    hub.add(REPO, model())
    window = ShardWindow(open_repo(), tmp_path / "window", max_bytes=300_000)
    assert window.to_fetch([[SHARDS[0]], [SHARDS[1]]]) == {tmp_path / "window": 300_000}
    with pytest.raises(OptionError, match="use --max-disk 401kB or more"):
        window.to_fetch([list(SHARDS)])


def test_a_window_without_room_names_its_volume_and_option(
    hub: Any, open_repo: Callable[..., HubRepository], tmp_path: Path
) -> None:
    hub.add(REPO, model())
    window = ShardWindow(open_repo(), tmp_path / "window")
    with pytest.raises(OutputError, match="cannot be stored: .*another --work-dir") as caught:
        with largest_file(100_000):
            window.path(SHARDS[0])
    assert one_line(caught).startswith(f"{tmp_path / 'window'}: {REPO}/{SHARDS[0]}")
    assert window.path(SHARDS[0]).read_bytes() == model()[SHARDS[0]]


# Repositories that hold something else


def test_original_weights_name_the_converted_sibling(
    hub: Any, open_repo: Callable[..., HubRepository]
) -> None:
    hub.add("meta/Llama-70b", {"consolidated.00.pth": b"p", "params.json": b"{}"}, gated=True)
    hub.add("meta/Llama-70b-hf", model(), gated=True)
    with pytest.raises(CheckpointError, match="consolidated.00.pth.*use meta/Llama-70b-hf$") as e:
        open_repo("meta/Llama-70b")
    one_line(e)


@pytest.mark.parametrize(
    "files, words",
    [
        (["consolidated.00.pth"], r"original weights \(consolidated.00.pth\).*convert it"),
        (["consolidated.safetensors", "params.json"], "original weights.*convert it"),
        (["original/consolidated.00.pth", "README.md"], "original weights.*convert it"),
        (["config.json", "pytorch_model.bin"], r"only as pickles \(pytorch_model.bin\).*convert"),
        (["q4.gguf", "README.md"], "no safetensors weights, only README.md, q4.gguf"),
        (["vae/model.safetensors"], "no safetensors weights"),
        ([f"{i}.gguf" for i in range(9)], "only 0.gguf, 1.gguf, 2.gguf and 6 more"),
    ],
)
def test_a_repository_without_safetensors_weights_says_what_it_holds(
    hub: Any, open_repo: Callable[..., HubRepository], files: list[str], words: str
) -> None:
    hub.add(REPO, dict.fromkeys(files, b"x"))
    with pytest.raises(CheckpointError, match=words) as caught:
        open_repo()
    one_line(caught)


# Without a network


def test_a_full_cache_works_offline_by_branch_name(
    hub: Any, open_repo: Callable[..., HubRepository], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, model())
    online = Checkpoint.open(open_repo())
    online.read(online.tensors)
    hub.stop()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    report = Notes()
    offline = Checkpoint.open(open_repo(report=report))
    offline.read(offline.tensors)
    assert offline.hashes == online.hashes
    assert offline.source.commit == online.source.commit
    assert report.warnings == []


def test_a_hub_that_cannot_be_reached_is_replaced_by_the_cache_with_a_warning(
    hub: Any, open_repo: Callable[..., HubRepository]
) -> None:
    commit = hub.add(REPO, model())
    repo = open_repo()
    for name in ("config.json", "model.safetensors.index.json", *SHARDS):
        repo.path(name)
    hub.stop()
    report = Notes()
    assert open_repo(report=report).path(SHARDS[1]).read_bytes() == model()[SHARDS[1]]
    assert "cannot be reached" in report.warnings[0]
    assert report.notes[-1] == f"{REPO}: working from the cache, commit {commit}"


def test_a_cache_that_lacks_a_shard_says_so_at_once(
    hub: Any, open_repo: Callable[..., HubRepository]
) -> None:
    hub.add(REPO, model())
    repo = open_repo()
    for name in ("config.json", "model.safetensors.index.json", SHARDS[0]):
        repo.path(name)
    hub.stop()
    with pytest.raises(HubError, match=f"cannot be reached.*lacks 1 files.*: {SHARDS[1]}$") as e:
        open_repo()
    one_line(e)


def test_offline_without_a_cache_names_the_variable(
    hub: Any, open_repo: Callable[..., HubRepository], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, model())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE=1") as caught:
        open_repo()
    one_line(caught)
    assert hub.requests == []


def test_offline_a_damaged_file_is_refused_and_kept(
    hub: Any, open_repo: Callable[..., HubRepository], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, {n: c for n, c in model().items() if "index" not in n} | single())
    path = open_repo().path("model.safetensors")
    open_repo().path("config.json")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="damaged in the cache") as caught:
        open_repo().path("model.safetensors")
    one_line(caught)
    assert path.is_file()


def single() -> dict[str, bytes]:
    return {"model.safetensors": save({"w": torch.ones(100)})}


def test_a_deleted_repository_is_read_from_the_cache_by_commit_but_not_by_branch(
    hub: Any, open_repo: Callable[..., HubRepository]
) -> None:
    commit = hub.add(REPO, {"config.json": b"{}", **single()})
    for name in ("config.json", "model.safetensors"):
        open_repo().path(name)
    hub.repositories.clear()
    report = Notes()
    assert open_repo(revision=commit, report=report).path("model.safetensors").is_file()
    assert "check the spelling" in report.warnings[0]
    with pytest.raises(HubError, match="check the spelling"):
        open_repo()


# The cache's volume


def test_left_overs_of_a_killed_download_are_removed_but_no_others(
    hub: Any, open_repo: Callable[..., HubRepository], tmp_path: Path
) -> None:
    hub.add(REPO, model())
    repo = open_repo()
    folder = repo.path("config.json").parents[2] / "blobs"
    digest = repo.listing[SHARDS[0]].digest
    ours, others = folder / f"{digest}.0a1b2c3d.incomplete", folder / "0.0a1b2c3d.incomplete"
    ours.write_bytes(b"half"), others.write_bytes(b"half")
    report = Notes()
    open_repo(report=report).path(SHARDS[0])
    assert not ours.exists() and others.exists()
    assert any("removed 1 unfinished downloads" in note for note in report.notes)


def test_a_download_in_progress_elsewhere_is_left_alone(
    hub: Any, open_repo: Callable[..., HubRepository], tmp_path: Path
) -> None:
    hub.add(REPO, model())
    repo = open_repo()
    digest = repo.listing[SHARDS[0]].digest
    running = tmp_path / f"cache/models--org--model/blobs/{digest}.0a1b2c3d.incomplete"
    lock = tmp_path / f"cache/.locks/models--org--model/{digest}.lock"
    for file in (running, lock):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    with WeakFileLock(lock):
        repo._cache.remove_orphans(digest, repo.report)
        assert running.exists()
    repo._cache.remove_orphans(digest, repo.report)
    assert not running.exists()


def test_a_file_that_does_not_fit_is_refused_before_it_is_fetched(
    hub: Any, open_repo: Callable[..., HubRepository], tmp_path: Path
) -> None:
    hub.add(REPO, model(), sizes={SHARDS[0]: 10**18})
    with pytest.raises(OutputError, match=r"needs 1,000,000,000.0 GB.*HF_HOME") as caught:
        open_repo().path(SHARDS[0])
    assert str(tmp_path / "cache") in one_line(caught)
    assert not hub.got(SHARDS[0])


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writes beyond `size` bytes of a file fail, as they do on a full volume."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_volume_that_fills_up_in_a_download_is_named(
    hub: Any, open_repo: Callable[..., HubRepository], tmp_path: Path
) -> None:
    hub.add(REPO, model())
    repo = open_repo()
    with pytest.raises(OutputError, match="cannot be stored.*HF_HOME") as caught:
        with largest_file(100_000):
            repo.path(SHARDS[0])
    assert one_line(caught).startswith(f"{tmp_path / 'cache'}")
    assert f"{REPO}/{SHARDS[0]}" in one_line(caught)
    assert repo.path(SHARDS[0]).is_file()  # once there is room again


CHILD = """
from rilq.formats.hub import open_source
source = open_source("org/model")
print(source.commit, source.path("model.safetensors").stat().st_size)
"""


def test_the_environment_is_enough_and_the_library_prints_nothing(hub: Any, tmp_path: Path) -> None:
    commit = hub.add(REPO, single(), private=True)
    hub.fail_next("503", on="HEAD")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_member"}
    result = subprocess.run(
        [sys.executable, "-c", CHILD],
        env=environment | {"NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.stdout == f"{commit} {len(single()['model.safetensors'])}\n"
    assert result.stderr == ""


def test_the_local_hub_lists_files_as_the_client_expects(hub: Any) -> None:
    hub.add(REPO, model())
    api = HfApi(hub.url)
    tree = {file.path: file for file in api.list_repo_tree(REPO)}
    (info,) = api.get_paths_info(REPO, [SHARDS[0]])
    assert info.size == tree[SHARDS[0]].size == len(model()[SHARDS[0]])
    assert info.lfs is not None and tree["config.json"].lfs is None
