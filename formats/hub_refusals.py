"""Requests that write to the Hub: tried again while that can help, and why it said no."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub import get_token
from huggingface_hub.errors import FileMetadataError, HfHubHTTPError, OfflineModeIsEnabled

from rilq.errors import HubError, RilqError, printable
from rilq.formats.hub_requests import (
    Address,
    Patience,
    cause_of,
    explain,
    safe_cause,
    unreachable,
    with_patience,
)
from rilq.progress import Reporter

Result = TypeVar("Result")


def ask_to_write(
    request: Callable[[], Result],
    at: Address,
    name: str | None,
    patience: Patience,
    report: Reporter,
) -> Result:
    """The result of a request that writes, with patience, or what is wrong in one line.

    Args:
        request: does it once.
        at: the repository that is written to.
        name: the file that is on its way, if any.
        patience: how requests that fail are tried again.
        report: receives a note before each wait.

    Raises:
        RilqError: the Hub refused, or could not be reached.
    """
    what = at.repo_id if name is None else f"{at.repo_id}/{name}"
    try:
        return with_patience(lambda: _unwrapped(request), what, patience, report)
    except RilqError:
        raise
    except Exception as err:
        raise explain_push(err, at, name) from safe_cause(err)


class _NoXet(Exception):
    """The Hub does not know the client's faster protocol for uploads; asking again is no use."""


def _unwrapped(request: Callable[[], Result]) -> Result:
    """The request's result; of the client's "error while uploading", what stands behind it."""
    try:
        return request()
    except RuntimeError as err:
        if isinstance(err.__cause__, Exception):
            raise err.__cause__ from None
        raise
    except ConnectionError as err:
        if "404" in str(err) and "/xet-write-token/" in str(err):
            raise _NoXet from None
        raise


def explain_push(err: BaseException, at: Address, name: str | None = None) -> RilqError:
    """The one line, with the remedy, about a push that failed; never with a token in it.

    Args:
        err: what the client raised.
        at: the repository that was to be written to.
        name: the file that was on its way, if any.
    """
    err = cause_of(err)
    if isinstance(err, json.JSONDecodeError):  # HTML, for example, of a proxy
        err = FileMetadataError("the answer is not JSON")
    subject = printable(at.repo_id if name is None else f"{at.repo_id}/{name}", 200)
    owner = at.repo_id.partition("/")[0]
    if isinstance(err, HfHubHTTPError):
        status, words = err.response.status_code, _words(str(err.server_message or ""))
        if status == 403:
            return HubError(
                f"{subject}: {at.endpoint} refuses to have it written{words}; use a token with the "
                f"right to write to {owner} ({at.endpoint}/settings/tokens), or push to another "
                "owner"
            )
        if status in (409, 412):
            return HubError(
                f"{subject}: somebody else has committed to {printable(at.revision)} meanwhile; "
                "nothing of theirs was changed: look at it, then run the same command again"
            )
        if status in (400, 402, 413, 422):
            return HubError(f"{subject}: {at.endpoint} refuses the push ({status}){words}")
    elif isinstance(err, ValueError) and not isinstance(err, UnicodeError):
        # The client's own words around the server's: "LFS batch API returned errors", a quota for
        # example, or "Invalid metadata in README.md".
        return HubError(f"{subject}: {at.endpoint} refuses the push{_words(str(err))}")
    elif isinstance(err, _NoXet):
        return HubError(
            f"{subject}: {at.endpoint} does not take uploads through Xet; set HF_HUB_DISABLE_XET=1 "
            "and run the same command again"
        )
    elif not (
        isinstance(err, (OfflineModeIsEnabled, FileMetadataError, OSError, UnicodeError))
        or unreachable(err)
        or type(err).__name__ == "LocalProtocolError"
    ):
        return HubError(
            f"{subject}: cannot be pushed ({type(err).__name__}){_words(str(err))}; run the same "
            "command again, it goes on from here"
        )
    return explain(err, at, name)


def _words(text: str) -> str:
    """The server's words for the middle of a message; a token in them is blotted out."""
    token, said = get_token(), " ".join(text.split())
    if token:
        said = said.replace(token, "***")
    return f": {printable(said, 300)}" if said else ""
