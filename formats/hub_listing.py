"""What the Hub says that a repository holds, and whether we can use it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
)

from rilq import __version__
from rilq.errors import CheckpointError, printable
from rilq.formats.hub_cache import RemoteFile
from rilq.formats.hub_requests import Address, is_commit
from rilq.formats.index import PICKLES


@dataclass(frozen=True)
class Listing:
    """A commit: the repository's name, its hash, path to size and digest of its files, privacy."""

    name: str
    commit: str
    files: Mapping[str, RemoteFile]
    private: bool = False

    def top_level(self) -> dict[str, RemoteFile]:
        """Only the files that lie in no folder, as a local checkpoint is listed."""
        return {
            name: file
            for name, file in self.files.items()
            if "/" not in name and "\\" not in name and name not in (".", "..")
        }


def fetch_listing(at: Address) -> Listing:
    """Ask the Hub once for the commit and the files of a revision.

    Raises:
        FileMetadataError: the answer is not one of a Hub.
        Exception: what the client raises for refusals and lost connections.
    """
    api = HfApi(at.endpoint, library_name="rilq", library_version=__version__)
    try:
        info = api.model_info(
            at.repo_id,
            revision=at.revision,
            files_metadata=True,
            timeout=constants.HF_HUB_ETAG_TIMEOUT,
        )
    except (HfHubHTTPError, HFValidationError, UnicodeError):  # some are a ValueError as well
        raise
    except (KeyError, TypeError, ValueError) as err:  # for example HTML instead of JSON
        raise FileMetadataError("the answer is not a description of a model") from err
    if info.sha is None or not is_commit(info.sha) or info.siblings is None:
        raise FileMetadataError("the answer names no commit or no files")
    files = {}
    for file in info.siblings:
        if file.size is None:
            raise FileMetadataError("the answer holds no file sizes")
        files[file.rfilename] = RemoteFile.of(
            file.size, file.lfs.sha256 if file.lfs else file.blob_id
        )
    return Listing(info.id, info.sha, files, bool(info.private))


def check_weights(at: Address, names: Iterable[str]) -> None:
    """Refuse a repository without safetensors weights, and say where they are to be had.

    Args:
        at: the repository.
        names: all its files, those in folders too.

    Raises:
        CheckpointError: there are none.
    """
    names = sorted(names)
    weights = [n for n in names if "/" not in n and n.endswith(".safetensors")]
    if any(not n.startswith("consolidated") for n in weights):
        return
    original = [n for n in names if n.startswith(("consolidated", "original/"))]
    pickles = [n for n in names if "/" not in n and n.endswith(PICKLES)]
    label = printable(at.repo_id)
    if original:
        sibling = f"{at.repo_id}-hf"
        remedy = f"use {sibling}" if _exists(at, sibling) else "convert it to safetensors first"
        raise CheckpointError(
            f"{label}: holds the original weights ({some(original)}) and not those for "
            f"transformers; {remedy}"
        )
    if pickles:
        raise CheckpointError(
            f"{label}: holds weights only as pickles ({some(pickles)}), which can run code and "
            "are never opened; convert it at https://huggingface.co/spaces/safetensors/convert"
        )
    raise CheckpointError(
        f"{label}: holds no safetensors weights, only {some(names)}; "
        "choose the repository that these were made from"
    )


def _exists(at: Address, repo_id: str) -> bool:
    """Whether the Hub knows a repository, as far as can be found out with one request."""
    try:
        HfApi(at.endpoint).model_info(repo_id, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except GatedRepoError:
        return True
    except Exception:  # whatever it is, the advice is left out and the error in hand is shown
        return False
    return True


def some(names: list[str]) -> str:
    """The first few of many names, for a message."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(printable(name, 60) for name in names[:3]) + more
