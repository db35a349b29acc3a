"""Every error that rilq raises on purpose.

    RilqError                        exit code 1: the work failed
    ├── Stopped                      work in the background was told to end; never shown
    ├── OtherEndedError              of several processes, another one is gone
    └── InputError                   exit code 2: something the user gave is wrong
        ├── OptionError              an option, or two options together
        ├── CheckpointError          a file or tensor of a checkpoint
        │   ├── NonFiniteError       NaN or infinity in a weight
        │   └── UnsupportedArchitectureError
        ├── DatasetError             calibration or evaluation text
        ├── HubError                 the Hub refused, or could not be reached
        ├── OutputError              the output folder, or space on a volume
        └── WorkDirError             the work folder: another job's, locked, changed source
    KeyboardInterrupt
    └── Interrupted                  exit code 75: stopped by a signal, resumable

A message says which file and tensor, what is wrong, what was expected, and what to do;
the command line prints it as it is, without a traceback. What others wrote enters a message
through `printable` or `one_line`.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class RilqError(Exception):
    """Base of all errors raised on purpose; its text is meant for the user."""

    exit_code = 1


class Stopped(RilqError):
    """A transfer or a reading thread was told to end; what has arrived stays."""


class OtherEndedError(RilqError):
    """Another process of the same conversion ended; it has said why, if it could."""


class InputError(RilqError):
    """Something the user gave cannot be used."""

    exit_code = 2


class OptionError(InputError):
    """An option has an impossible value, or two options contradict each other."""


class CheckpointError(InputError):
    """A file or tensor of a checkpoint is damaged, missing or of an unsupported kind."""


class NonFiniteError(CheckpointError):
    """A weight holds NaN or infinity."""


class UnsupportedArchitectureError(CheckpointError):
    """The model's architecture cannot be streamed (yet)."""


class DatasetError(InputError):
    """A calibration or evaluation text cannot be read, or is too short."""


class HubError(InputError):
    """The Hub refused a request, or could not be reached."""


class OutputError(InputError):
    """The output cannot be written where it was asked for."""


class WorkDirError(InputError):
    """The work folder is in use, belongs to another job, or no longer fits its source."""


class Interrupted(KeyboardInterrupt):
    """A signal stopped the run; its state is on disk and the same command continues.

    Not a `RilqError`: libraries that swallow any `Exception` must not swallow a stop.
    """

    exit_code = 75


@contextmanager
def named(subject: str) -> Iterator[None]:
    """Put a name before what is found wrong by code that knows no names, such as a quantizer."""
    try:
        yield
    except RilqError as err:
        raise type(err)(f"{subject}: {err}") from err


def printable(text: str, limit: int = 120) -> str:
    """`text` fit for a terminal: control characters escaped, and not longer than about `limit`."""
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text[:limit]
    )
    return shown if len(text) <= limit else f"{shown}... ({len(text)} characters)"


def one_line(err: BaseException) -> str:
    """Kind and text of another library's error, fit for the middle of a message.

    All of its lines: transformers tells the reason in the second or third.
    """
    text = " ".join(str(err).split())
    return printable(f"{type(err).__name__}: {text}" if text else type(err).__name__, 400)
