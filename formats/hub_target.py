"""A repository on the Hub that is about to be written to: whether we may, and what it holds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import (
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from rilq import __version__
from rilq.errors import CheckpointError, HubError, OptionError, printable
from rilq.formats.checkpoint import LEGAL_FILES, SIDE_FILES
from rilq.formats.hub import HubRepository, quiet_library
from rilq.formats.hub_listing import Listing, fetch_listing, some
from rilq.formats.hub_refusals import ask_to_write, explain_push
from rilq.formats.hub_requests import PATIENCE, Address, Patience, safe_cause, with_patience
from rilq.formats.index import PICKLES
from rilq.formats.lora import ADAPTER_FOLDER
from rilq.formats.source import CONFIG, read_json
from rilq.formats.verify import CARD_PLOT, MANIFEST_NAME
from rilq.progress import Reporter

Result = TypeVar("Result")

_WEIGHTS = ("*.safetensors", "*.index.json", *(f"*{suffix}" for suffix in PICKLES))
_OTHER_MODELS = (*_WEIGHTS, CONFIG, "*.gguf", "*.onnx", "*.msgpack", "*.h5")
_ADAPTER = f"{ADAPTER_FOLDER}/"
_TOLD_APART = {"base": "name", "tensors of the base": "header_hash"}


@dataclass(frozen=True)
class Target:
    """A repository that this user may write to, as it was when it was opened.

    Attributes:
        at: the repository and the branch.
        head: the commit that the branch pointed at, and its files.
        pull_request: nothing is written to the branch; a pull request for it is opened.
        forked: the branch still points where `main` does, so that no content is only here.
    """

    at: Address
    head: Listing
    pull_request: bool
    forked: bool
    patience: Patience = field(repr=False)
    report: Reporter = field(repr=False)

    def api(self) -> HfApi:
        """The client for this Hub; it takes the token where the user keeps it."""
        return _api(self.at)

    def ask(self, request: Callable[[], Result], name: str | None = None) -> Result:
        """The result of a request, with patience, or what is wrong in one line."""
        return ask_to_write(request, self.at, name, self.patience, self.report)

    def read(self, name: str) -> bytes | None:
        """A small file at the top level of `head`; None where there is none."""
        held = self._held()
        return held.path(name).read_bytes() if name in held.files() else None

    def manifest(self) -> dict[str, Any] | None:
        """What `head` holds as `rilq.json`; None if nothing of ours was pushed here."""
        held = self._held()
        try:
            return read_json(held, held.files(), MANIFEST_NAME)
        except CheckpointError:  # not JSON: whatever it is, a push has not written it
            return None

    def stale(self, keep: Collection[str]) -> list[str]:
        """Files of an earlier model that would be mixed with a new one, whose files are `keep`.

        Weights and their indices, tokenizer and configuration, and whatever an earlier push
        listed; never a licence, a picture, or other things that a person has added.
        """
        listed = (self.manifest() or {}).get("files")
        ours = set(listed) if isinstance(listed, dict) else set()
        patterns = {*_WEIGHTS, CARD_PLOT} | set(SIDE_FILES) - set(LEGAL_FILES)
        return sorted(
            name
            for name in self.head.files
            if name not in keep
            and (name in ours or name.startswith(_ADAPTER) or _matches(name, patterns))
        )

    def _held(self) -> HubRepository:
        files = self.head.top_level()
        return HubRepository(self.at, self.head.commit, files, False, self.patience, self.report)


def open_target(
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool = False,
    pull_request: bool = False,
    report: Reporter,
    patience: Patience = PATIENCE,
) -> Target:
    """Make sure that we may write to a repository; makes it, or the branch, if it is not there.

    Whether a token may make a repository can only be found out by making one. It stays empty, with
    the visibility that was asked for, until the first push is complete.

    Args:
        repo_id: `owner/name`.
        revision: the branch; `main` if None.
        private: the repository must not be public.
        pull_request: open one, which does not need the right to write.
        report: receives notes.
        patience: how requests that fail are tried again.

    Raises:
        HubError: there is no token, it has no right to write, or the Hub cannot be reached.
        OptionError: `repo_id` is no name on the Hub, or the options contradict each other.
    """
    _check_options(repo_id, revision, pull_request)
    quiet_library()
    at = Address(
        repo_id,
        revision or constants.DEFAULT_REVISION,
        constants.ENDPOINT.rstrip("/"),
        Path(constants.HF_HUB_CACHE),
    )
    if get_token() is None:
        raise HubError(
            f"{repo_id}: pushing needs a token; make one with the right to write at "
            f"{at.endpoint}/settings/tokens, then run `hf auth login` or set HF_TOKEN"
        )

    def ask(request: Callable[[], Result], where: Address = at) -> Result:
        return ask_to_write(request, where, None, patience, report)

    api, main = _api(at), Address(repo_id, constants.DEFAULT_REVISION, at.endpoint, at.cache)
    try:
        trunk = with_patience(lambda: fetch_listing(main), repo_id, patience, report, reached=False)
    except RepositoryNotFoundError as err:
        if pull_request:
            raise explain_push(err, at) from safe_cause(err)
        ask(lambda: api.create_repo(repo_id, private=private or None, exist_ok=True))
        report.note(f"{repo_id}: made{' as a private repository' if private else ''}")
        trunk = ask(lambda: fetch_listing(main), main)
    except Exception as err:
        raise explain_push(err, at) from safe_cause(err)
    if private and not trunk.private:
        raise HubError(
            f"{repo_id}: is public already, and --private was given; make it private at "
            f"{at.endpoint}/{repo_id}/settings first, or leave the option out"
        )
    head = trunk if at == main else _branch(at, api, ask)
    # The first request of every upload, with a small file that is not uploaded: the Hub answers
    # 403 to it where the right to write is missing.
    probe = CommitOperationAdd(CONFIG, b"{}")
    ask(
        lambda: api.preupload_lfs_files(
            repo_id, [probe], revision=at.revision, create_pr=pull_request, free_memory=False
        )
    )
    forked = at != main and head.commit == trunk.commit
    return Target(at, head, pull_request, forked, patience, report)


def _check_options(repo_id: str, revision: str | None, pull_request: bool) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        repo_id, shown = "", printable(repo_id)
    else:
        shown = repo_id
    if repo_id.count("/") != 1:
        raise OptionError(
            f"{shown!r}: not a name to push to\n  give owner/name, as in the Hub's address of it"
        )
    if pull_request and revision not in (None, constants.DEFAULT_REVISION):
        raise OptionError(
            f"--pr and --revision {printable(str(revision))}: a pull request is made for main\n"
            "  leave out one of the two"
        )


def _branch(
    at: Address, api: HfApi, ask: Callable[[Callable[[], Listing | None]], Listing | None]
) -> Listing:
    """The head of a branch, which is made from `main` if need be."""

    def find_or_make() -> Listing:
        try:
            return fetch_listing(at)
        except RevisionNotFoundError:
            api.create_branch(at.repo_id, branch=at.revision, exist_ok=True)
            return fetch_listing(at)

    found = ask(find_or_make)
    assert found is not None
    return found


def described(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """By what a checkpoint is another model than a second one: base, method, bits, format.

    Args:
        manifest: `rilq.json`, or its parts `source` and `recipe`.
    """
    source, recipe, export = (
        value if isinstance(value := manifest.get(key), dict) else {}
        for key in ("source", "recipe", "export")
    )
    return {
        **{shown: source.get(key) for shown, key in _TOLD_APART.items()},
        "method": recipe.get("method", "rilq"),
        "bits": recipe.get("bits", recipe.get("low_bits")),
        "group size": recipe.get("group_size"),
        "format": export.get("kind", "native"),
    }


def check_holds(target: Target, model: dict[str, Any]) -> None:
    """Refuse a target that holds another model.

    Args:
        target: where to push to.
        model: what is to be pushed, as `described` gives it.

    Raises:
        HubError: it holds another one.
    """
    held = [name for name in sorted(target.head.files) if _matches(name, _OTHER_MODELS)]
    if not held or target.forked:
        return
    theirs = target.manifest()
    if theirs is None:
        why = f"a model that rilq has not pushed ({some(held)})"
    else:
        there = described(theirs)
        apart = [key for key in model if model[key] != there[key]]
        if not apart:
            return
        why = "another model: " + ", ".join(
            f"{key} {printable(str(there[key]), 80)} there, {printable(str(model[key]), 80)} here"
            for key in apart
        )
    raise HubError(
        f"{target.at.repo_id}: revision {printable(target.at.revision)} holds {why}\n"
        "  choose another name, or let `rilq push --replace` put this model in its place"
    )


def _matches(name: str, patterns: Collection[str]) -> bool:
    """Whether a file at the top level is one of these, in lower case."""
    return "/" not in name and any(fnmatchcase(name.lower(), pattern) for pattern in patterns)


def _api(at: Address) -> HfApi:
    return HfApi(at.endpoint, library_name="rilq", library_version=__version__)
