"""Requests to the Hub: tried again while that can help, explained in one line where it cannot."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import get_token
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from rilq.errors import HubError, OutputError, RilqError, printable
from rilq.progress import Reporter

Result = TypeVar("Result")

# The HTTP library's base error. The client speaks through httpx up to its version 1 and through
# httpx2 from version 2 on; its own error derives from whichever of the two is in use.
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]

_PASSING_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_BAD_REQUEST = frozenset({"UnsupportedProtocol", "LocalProtocolError", "TooManyRedirects"})
_RATE_LIMIT = re.compile(r";\s*r=0\s*;\s*t=(\d+)")  # the Hub's RateLimit header: "api";r=0;t=55


@dataclass(frozen=True)
class Patience:
    """How long a request is tried again that failed for a reason that may pass.

    Attributes:
        delays: seconds before the second, third, ... attempt.
        first_contact: how many of them are used for a Hub that was not reached even once.
        longest: seconds; a server that asks for a longer wait is asked again after these.
    """

    delays: tuple[float, ...] = (1, 2, 4, 8, 16, 30)
    first_contact: int = 1
    longest: float = 300


PATIENCE = Patience()


@dataclass(frozen=True)
class Address:
    """A model on a Hub.

    Attributes:
        repo_id: `owner/name`, or `name` for the oldest ones.
        revision: branch, tag or commit hash.
        endpoint: the Hub's URL without a slash at its end.
        cache: the folder of all cached repositories.
    """

    repo_id: str
    revision: str
    endpoint: str
    cache: Path


def is_commit(revision: str) -> bool:
    """Whether this is a full commit hash, whose content can never change."""
    return re.fullmatch(r"[0-9a-f]{40}", revision) is not None


def with_patience(
    request: Callable[[], Result],
    what: str,
    patience: Patience,
    report: Reporter,
    *,
    reached: bool = True,
    advanced: Callable[[], bool] = lambda: False,
) -> Result:
    """Make a request, again and again while it fails for a reason that may pass.

    Args:
        request: does it once.
        what: the request's subject, for the notes.
        patience: delays between attempts; a longer Retry-After of the server is obeyed.
        report: receives one note before each wait.
        reached: whether the Hub answered before, in this run.
        advanced: whether the attempt that just failed still brought so much that the attempts are
            counted anew.

    Raises:
        Exception: whatever the last attempt raised.
    """
    attempt = 0
    while True:
        try:
            return request()
        except Exception as err:
            attempt = 0 if advanced() else attempt
            allowed = len(patience.delays)
            if not reached and unreachable(err):
                allowed = min(allowed, patience.first_contact)
            if attempt >= allowed or not may_pass(err):
                raise
            wait = max(patience.delays[attempt], min(_asked_wait(err), patience.longest))
            report.note(f"{printable(what)}: {_reason(err)}; trying again in {wait:g} s")
        attempt += 1
        time.sleep(wait)


def cause_of(err: BaseException) -> BaseException:
    """What stands behind the client's "not in the cache and not to be had"."""
    while isinstance(err, LocalEntryNotFoundError) and err.__cause__ is not None:
        err = err.__cause__
    return err


def unreachable(err: BaseException) -> bool:
    """Whether no answer came at all, or only one that says to come back later."""
    err = cause_of(err)
    if isinstance(err, HfHubHTTPError):
        return False
    if isinstance(err, _HTTP_ERROR):
        return type(err).__name__ not in _BAD_REQUEST
    return isinstance(err, (ConnectionError, TimeoutError))


def may_pass(err: BaseException) -> bool:
    """Whether the same request may succeed later."""
    err = cause_of(err)
    if isinstance(err, HfHubHTTPError):
        return err.response.status_code in _PASSING_STATUS
    if isinstance(err, OfflineModeIsEnabled):
        return False
    if unreachable(err):
        return True
    if isinstance(err, (FileMetadataError, LocalEntryNotFoundError)):
        return False
    if isinstance(err, OSError):  # the client's "consistency check failed" comes without a number
        return err.errno is None
    # Failures of a transfer through Xet: its own class, or a bare RuntimeError from Rust.
    return isinstance(err, RuntimeError) or type(err).__name__ == "XetDownloadError"


def _asked_wait(err: BaseException) -> float:
    """Seconds that the server asked to wait for, or 0."""
    err = cause_of(err)
    if not isinstance(err, HfHubHTTPError):
        return 0
    seconds = err.response.headers.get("Retry-After", "").strip()
    if seconds.isdigit():
        return float(seconds)
    limit = _RATE_LIMIT.search(err.response.headers.get("RateLimit", ""))
    return float(limit[1]) if limit else 0


def _reason(err: BaseException) -> str:
    """A few words without any URL, since those of a CDN are signed."""
    err = cause_of(err)
    if isinstance(err, HfHubHTTPError):
        return f"the Hub answered {err.response.status_code}"
    if isinstance(err, OSError) and err.errno is None and not isinstance(err, ConnectionError):
        return "the file arrived incomplete"
    return f"the connection failed ({type(err).__name__})"


def _quotes_token(err: BaseException) -> bool:
    """Whether this is the error about a token that does not fit into a header, which quotes it."""
    return isinstance(err, UnicodeError) or type(err).__name__ == "LocalProtocolError"


def safe_cause(err: Exception) -> Exception | None:
    """The error to `raise ... from`; None if a traceback with it would show the token."""
    return None if _quotes_token(err) else err


def explain(err: BaseException, at: Address, name: str | None = None) -> RilqError:
    """The one line, with the remedy, that a user needs; it never holds a token or a signed URL.

    Args:
        err: what the client raised.
        at: the repository that was asked for.
        name: the file that was asked for, if any.
    """
    if isinstance(err, RilqError):
        return err
    err = cause_of(err)
    subject = printable(at.repo_id if name is None else f"{at.repo_id}/{name}", 200)
    if isinstance(err, (HfHubHTTPError, EntryNotFoundError)):
        return HubError(f"{subject}: {_refusal(err, at)}")
    if isinstance(err, OfflineModeIsEnabled):
        return HubError(
            f"{subject}: HF_HUB_OFFLINE=1 forbids to ask the Hub; unset that variable, or put the "
            f"whole model into the cache {at.cache} first"
        )
    if _quotes_token(err):
        return HubError(
            f"{subject}: the token holds characters that cannot be sent; run `hf auth login` again "
            "or correct HF_TOKEN"
        )
    if unreachable(err) or type(err).__name__ in _BAD_REQUEST:
        return HubError(
            f"{subject}: {at.endpoint} cannot be reached ({type(err).__name__}); check the "
            "network, the proxy settings and HF_ENDPOINT, then run again"
        )
    if isinstance(err, FileMetadataError):
        return HubError(
            f"{subject}: {at.endpoint} does not answer as a Hub does; check HF_ENDPOINT, and "
            "whether a proxy or a login page answers in its place"
        )
    if isinstance(err, OSError) and err.errno is not None:
        return OutputError(
            f"{at.cache}: {subject} cannot be stored: {err.strerror}; make room on this volume, or "
            "set HF_HOME to a folder on another one"
        )
    words = printable(str(err).partition("\n")[0], 200)
    return HubError(
        f"{subject}: cannot be fetched: {words}; run the same command again, it goes on from here"
    )


def _refusal(err: Exception, at: Address) -> str:
    """Why the Hub said no, and what to do."""
    has_token = get_token() is not None
    if isinstance(err, GatedRepoError):
        account = "with the account of your token" if has_token else "then run `hf auth login`"
        return f"is gated; accept its licence at {at.endpoint}/{at.repo_id} {account}"
    if isinstance(err, RevisionNotFoundError):
        return (
            f"has no revision {printable(at.revision)}; its branches and tags are listed at "
            f"{at.endpoint}/{at.repo_id}/tree/main"
        )
    if isinstance(err, RepositoryNotFoundError):
        account = "use a token that may read it" if has_token else "run `hf auth login` first"
        return f"is not on {at.endpoint}; check the spelling, or if it is private, {account}"
    if isinstance(err, DisabledRepoError):
        return f"has been disabled by {at.endpoint}; choose another model"
    if not isinstance(err, HfHubHTTPError) or err.response.status_code == 404:
        return f"is not in revision {printable(at.revision)}; choose another one with --revision"
    status = err.response.status_code
    if status == 401:
        return (
            f"{at.endpoint} refused the token; make a new one at {at.endpoint}/settings/tokens and "
            "run `hf auth login`, or correct HF_TOKEN"
        )
    if status == 403:
        return (
            "the token may not read it; give the token the right to read this repository at "
            f"{at.endpoint}/settings/tokens"
        )
    if status in _PASSING_STATUS:
        return f"{at.endpoint} keeps answering {status}; run the same command again later"
    return f"{at.endpoint} answered {status}; check HF_ENDPOINT and the proxy settings"
