"""Pushes with the real client library to a Hub on this machine that fails on request."""

import json
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from upload_hub import UploadHub, serving

from rilq.errors import HubError, OptionError
from rilq.formats.hub_push import LocalFile, Pushed, push_files
from rilq.formats.hub_requests import Patience
from rilq.formats.hub_target import Target, check_holds, described, open_target
from rilq.progress import SilentReporter

# The client library's own, of how it hands a file to its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "org/tiny-w2"
QUICK = Patience(delays=(0.01,) * 6)
MANIFEST = {
    "source": {"name": "org/base", "header_hash": "12"},
    "recipe": {"bits": 2, "group_size": 64},
}
TITLE = "Upload tiny (job 1234)"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[UploadHub]:
    """An empty Hub, and a client in this process that uses it with the token of a writer."""
    with serving(monkeypatch, tmp_path / "cache") as hub:
        yield hub


@pytest.fixture
def opened(hub: UploadHub) -> Callable[..., Target]:
    """A function that opens a target on the hub."""

    def open_(repo_id: str = REPO, **options: Any) -> Target:
        usual = {"report": SilentReporter(), "patience": QUICK}
        return open_target(repo_id, **{**usual, **options})

    return open_


@pytest.fixture
def push(opened: Callable[..., Target]) -> Callable[..., Pushed]:
    """A function that pushes files, to a target that it opens with the options given."""

    def push_(files: dict[str, bytes], target: Target | None = None, **options: Any) -> Pushed:
        target = target or opened(**options)
        return push_files(target, {n: LocalFile.of(c) for n, c in files.items()}, title=TITLE)

    return push_


def model(seed: int = 0, shards: int = 2) -> dict[str, bytes]:
    """Files such as a conversion makes, with contents that depend on the seed."""
    names = [f"model-0000{i + 1}-of-0000{shards}.safetensors" for i in range(shards)]
    return {
        **{name: f"{name} {seed}".encode() * 5000 for name in names},
        "model.safetensors.index.json": b"{}" + b" " * seed,
        "config.json": b'{"seed": %d}' % seed,
        "rilq.json": json.dumps(MANIFEST).encode(),
        "README.md": b"---\nlicense: mit\n---\n",
    }


def puts(hub: UploadHub) -> int:
    return len(hub.got("PUT /lfs"))


def test_everything_becomes_visible_in_one_commit(
    hub: UploadHub, push: Callable[..., Pushed]
) -> None:
    pushed = push(model())
    (commit,) = hub.made
    assert pushed.commit == commit.id and set(commit.added) == set(model())
    assert hub.files(REPO) == {".gitattributes": b"", **model()}
    assert pushed.url == f"{hub.url}/{REPO}/tree/main"


def test_weights_are_up_before_the_commit_that_names_them(
    hub: UploadHub, push: Callable[..., Pushed]
) -> None:
    seen: list[str] = []
    hub.watchers.append(seen.append)
    push(model())
    assert seen == ["put", "put", "commit"]


def test_a_rerun_of_a_complete_push_commits_nothing_and_sends_nothing(
    hub: UploadHub, push: Callable[..., Pushed]
) -> None:
    first, sent = push(model()), puts(hub)
    again = push(model())
    assert again.unchanged and again.commit == first.commit
    assert len(hub.made) == 1 and puts(hub) == sent


# faults.md, row 77


def test_77_a_missing_token_is_refused_without_a_request(
    hub: UploadHub, opened: Callable[..., Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(HubError, match="needs a token.*hf auth login"):
        opened()
    assert not hub.requests


def test_77_a_token_that_only_reads_is_refused_and_nothing_is_made(
    hub: UploadHub, opened: Callable[..., Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_guest")
    with pytest.raises(HubError, match="right to write to org"):
        opened()
    assert not hub.repositories
    hub.add(REPO, {})
    with pytest.raises(HubError, match="right to write to org"):
        opened()


def test_77_a_namespace_of_others_is_refused(hub: UploadHub, opened: Callable[..., Target]) -> None:
    with pytest.raises(HubError, match="right to write to meta"):
        opened("meta/model")


def test_77_an_invalid_token_is_refused(
    hub: UploadHub, opened: Callable[..., Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match="refused the token"):
        opened()


@pytest.mark.parametrize("name", ["model", "a/b/c", "../up", "/abs/path", "org/sp ace", ""])
def test_what_is_no_name_on_the_hub_is_refused_without_a_request(
    hub: UploadHub, opened: Callable[..., Target], name: str
) -> None:
    with pytest.raises(OptionError, match="owner/name"):
        opened(name)
    assert not hub.requests


# row 78


class Stops(SilentReporter):
    """Stops the process, so to speak, when the first file has arrived."""

    def step(self, done: int, **_: Any) -> None:
        raise KeyboardInterrupt


def test_78_an_interrupted_upload_is_taken_up_where_it_was(
    hub: UploadHub, push: Callable[..., Pushed]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        push(model(), report=Stops())
    assert puts(hub) == 1 and not hub.made
    push(model())
    assert puts(hub) == 2 and len(hub.made) == 1


def test_78_a_cut_connection_in_an_upload_is_tried_again(
    hub: UploadHub, push: Callable[..., Pushed]
) -> None:
    hub.fail_next("cut", on="PUT /lfs")
    push(model())
    assert puts(hub) == 3 and hub.files(REPO).keys() >= model().keys()


def test_a_hub_without_xet_is_told_with_the_remedy(
    hub: UploadHub, push: Callable[..., Pushed], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    with pytest.raises(HubError, match="HF_HUB_DISABLE_XET=1"):
        push(model())
    assert len(hub.got("/xet-write-token/")) == 1


# row 79


@pytest.mark.parametrize("kind", ["lost", "cut"])
def test_79_a_lost_commit_answer_leaves_one_commit(
    hub: UploadHub, push: Callable[..., Pushed], kind: str
) -> None:
    hub.fail_next(kind, on="/commit/")
    pushed = push(model())
    (commit,) = hub.made
    assert pushed.commit == commit.id and not pushed.unchanged
    assert push(model()).unchanged and len(hub.made) == 1


def test_79_a_rerun_after_a_lost_commit_answer_makes_no_second_commit(
    hub: UploadHub, push: Callable[..., Pushed]
) -> None:
    hub.fail_next("lost", on="/commit/")
    with pytest.raises(HubError):
        push(model(), patience=Patience(delays=()))
    assert push(model()).unchanged and len(hub.made) == 1


def test_79_a_lost_answer_opens_no_second_pull_request(
    hub: UploadHub, push: Callable[..., Pushed]
) -> None:
    hub.add(REPO, {"config.json": b"{}"})
    hub.fail_next("lost", on="/commit/")
    pushed = push(model(), pull_request=True)
    assert pushed.url == f"{hub.url}/{REPO}/discussions/1"
    assert push(model(), pull_request=True).url == pushed.url
    assert [commit.branch for commit in hub.made] == ["refs-pr-1"]
    assert hub.files(REPO) == {"config.json": b"{}"}


def test_a_reader_may_open_a_pull_request(
    hub: UploadHub, push: Callable[..., Pushed], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_guest")
    hub.add(REPO, {})
    assert push(model(), pull_request=True).url.endswith("/discussions/1")


def test_a_pull_request_is_not_made_for_a_branch(
    hub: UploadHub, opened: Callable[..., Target]
) -> None:
    with pytest.raises(OptionError, match="--pr and --revision dev"):
        opened(pull_request=True, revision="dev")


# row 80


def test_80_a_commit_of_somebody_else_is_never_overwritten(
    hub: UploadHub, opened: Callable[..., Target], push: Callable[..., Pushed]
) -> None:
    target = opened()
    theirs = hub.add(REPO, {"config.json": b"theirs"})
    with pytest.raises(HubError, match=f"somebody else.*{theirs[:12]}.*run the same command"):
        push(model(), target)
    assert hub.files(REPO) == {"config.json": b"theirs"}


def test_80_a_commit_in_the_last_moment_is_refused_by_its_parent(
    hub: UploadHub, push: Callable[..., Pushed]
) -> None:
    hub.watchers.append(lambda what: what == "commit" and hub.add(REPO, {"a": b"theirs"}))
    with pytest.raises(HubError, match="somebody else has committed to main meanwhile"):
        push(model())
    assert hub.files(REPO) == {"a": b"theirs"}


# row 81


def test_81_a_full_quota_is_told_in_the_words_of_the_hub(
    hub: UploadHub, push: Callable[..., Pushed]
) -> None:
    hub.quota = 1000
    with pytest.raises(HubError, match="Storage limit reached"):
        push(model())
    assert not hub.made


# row 82


@pytest.mark.parametrize(
    "on", ["/repos/create", "/preupload", "/objects/batch", "PUT /lfs", "/commit/", "/revision"]
)
def test_82_a_busy_hub_is_waited_for(hub: UploadHub, push: Callable[..., Pushed], on: str) -> None:
    hub.fail_next("503" if on in ("/commit/", "PUT /lfs") else "429", on=on, retry_after=0)
    push(model())
    assert len(hub.made) == 1 and hub.files(REPO).keys() >= model().keys()


def test_82_retry_after_is_obeyed(hub: UploadHub, push: Callable[..., Pushed]) -> None:
    hub.fail_next("429", on="/commit/", retry_after=1)
    begun = time.monotonic()
    push(model())
    assert time.monotonic() - begun >= 1


# row 83


def test_83_a_model_of_others_is_refused_unless_asked(
    hub: UploadHub, opened: Callable[..., Target]
) -> None:
    hub.add(REPO, {"pytorch_model.bin": b"theirs", "config.json": b"{}"})
    with pytest.raises(
        HubError, match=r"not pushed \(config.json, pytorch_model.bin\)\n.*--replace"
    ):
        check_holds(opened(), described(MANIFEST))


@pytest.mark.parametrize("part", ["source", "recipe"])
def test_83_a_model_of_another_base_or_of_other_bits_is_refused(
    hub: UploadHub, opened: Callable[..., Target], part: str
) -> None:
    theirs = {**MANIFEST, part: {"name": "org/other", "bits": 4}}
    hub.add(REPO, {"model.safetensors": b"", "rilq.json": json.dumps(theirs).encode()})
    with pytest.raises(HubError, match="another model: .*(base org/other there|bits 4 there)"):
        check_holds(opened(), described(MANIFEST))
    hub.add(REPO, {"model.safetensors": b"", "rilq.json": json.dumps(MANIFEST).encode()})
    check_holds(opened(), described(MANIFEST))


def test_83_a_damaged_manifest_is_no_reason_to_overwrite(
    hub: UploadHub, opened: Callable[..., Target], push: Callable[..., Pushed]
) -> None:
    hub.add(REPO, {"model.safetensors": b"theirs", "rilq.json": b"{cut"})
    with pytest.raises(HubError, match="that rilq has not pushed"):
        check_holds(opened(), described(MANIFEST))
    push(model())  # as with --replace
    assert hub.files(REPO) == model()


def test_83_a_card_and_pictures_alone_are_no_model(
    hub: UploadHub, opened: Callable[..., Target]
) -> None:
    hub.add(REPO, {"README.md": b"soon", "plot.png": b"", ".gitattributes": b""})
    check_holds(opened(), described(MANIFEST))


def test_83_stale_files_leave_in_the_commit_that_brings_the_new_ones(
    hub: UploadHub, push: Callable[..., Pushed]
) -> None:
    theirs = ["LICENSE", "README.md", "plot.png", "weights.gguf"]
    old = ["model-00003-of-00003.safetensors", "pytorch_model.bin", "tokenizer.model",
           "adapter/adapter_config.json", "old.txt"]  # fmt: skip
    manifest = {**MANIFEST, "files": {"old.txt": {}}}
    files = dict.fromkeys([*theirs, *old], b"-") | {"rilq.json": json.dumps(manifest).encode()}
    hub.add(REPO, files)
    push(model())
    (commit,) = hub.made
    assert sorted(commit.deleted) == sorted(old)
    assert hub.files(REPO).keys() == {*theirs, *model()}


def test_a_new_branch_may_hold_another_model_than_main(
    hub: UploadHub, opened: Callable[..., Target], push: Callable[..., Pushed]
) -> None:
    main = {"model.safetensors": b"theirs", "config.json": b"{}"}
    hub.add(REPO, main)
    target = opened(revision="w2")
    check_holds(target, described(MANIFEST))
    push(model(), target)
    assert hub.files(REPO) == main and hub.files(REPO, "w2") == model()
    with pytest.raises(HubError, match="revision w2 holds"):
        check_holds(opened(revision="w2"), described(MANIFEST) | {"base": "org/third"})


# row 84


def test_84_the_branch_holds_the_old_or_the_new_model_at_every_moment(
    hub: UploadHub, push: Callable[..., Pushed]
) -> None:
    old, new = model(0, shards=3), model(1, shards=2)
    push(old)
    seen = []
    hub.watchers.append(lambda what: seen.append(hub.files(REPO)))
    hub.fail_next("cut", on="PUT /lfs")
    hub.fail_next("lost", on="/commit/")
    push(new)
    gitattributes = {".gitattributes": b""}
    assert len(seen) == 3 and all(files == gitattributes | old for files in seen)
    assert hub.files(REPO) == gitattributes | new and len(hub.made) == 2


# row 85, and visibility


@pytest.mark.parametrize("line", ["base_model: /home/me/model", "license: a b"])
def test_85_a_card_that_the_hub_finds_invalid_stops_the_push(
    hub: UploadHub, push: Callable[..., Pushed], line: str
) -> None:
    card = f"---\n{line}\n---\n".encode()
    with pytest.raises(HubError, match="Invalid metadata in README.md.*is not valid"):
        push({**model(), "README.md": card})
    assert not hub.made


def test_a_private_repository_is_made_private_before_anything_is_sent(
    hub: UploadHub, push: Callable[..., Pushed]
) -> None:
    push(model(), private=True)
    assert hub.repositories[REPO].private


def test_private_is_refused_for_what_is_public_already(
    hub: UploadHub, opened: Callable[..., Target]
) -> None:
    hub.add(REPO, {})
    with pytest.raises(HubError, match="is public already"):
        opened(private=True)


# row 86


def test_86_no_refusal_quotes_the_token(hub: UploadHub, push: Callable[..., Pushed]) -> None:
    hub.says = "You sent hf_member, which may not"
    for on in ("/repos/create", "/preupload", "PUT /lfs", "/commit/"):
        for status in ("400", "401", "403", "409", "412", "413", "422"):
            hub.repositories.clear()
            hub.objects.clear()
            hub.faults.clear()
            hub.fail_next(status, 99, on=on)
            with pytest.raises(HubError) as caught:
                push(model())
            shown = "".join(traceback.format_exception(caught.value))
            assert REPO in str(caught.value) and "\n" not in str(caught.value), (on, status)
            assert "hf_member" not in str(caught.value), (on, status)
            assert "Authorization" not in shown, (on, status)
