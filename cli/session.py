"""What surrounds every command: errors as one message, signals, and where progress goes."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from rilq.converter.ranks import launched
from rilq.errors import InputError, Interrupted, OtherEndedError, RilqError
from rilq.progress import LogReporter, Reporter, Reporters, RichReporter, SilentReporter

if TYPE_CHECKING:
    from types import FrameType


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn errors raised on purpose into one message and an exit code, without a traceback."""
    try:
        yield
    except RilqError as err:
        _say(err)
        raise typer.Exit(err.exit_code) from None
    except Interrupted as err:
        if is_first():
            print(f"rilq: {err}", file=sys.stderr)
        raise typer.Exit(Interrupted.exit_code) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None


# Seconds: what is wrong for all processes is found by all of them within this time.
ALIKE = 3.0


def _say(err: RilqError) -> None:
    """Print what went wrong, once where several processes find the same.

    Where the first one fails too, the launcher ends the others while they wait here.
    """
    if not is_first():
        if isinstance(err, OtherEndedError):
            return
        time.sleep(ALIKE)
    print(f"rilq: {err}", file=sys.stderr)


def is_first() -> bool:
    """Whether this is the only process, or the one of several that prints."""
    return launched()[0] == 0


@contextmanager
def stoppable(where: str) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP raise `Interrupted` once; a second one ends the process.

    One that is ignored, as SIGHUP is under nohup, stays ignored. A library that answers a stop in
    its native code with an error of its own (safetensors does) is not believed.
    """
    stopped: Interrupted | None = None

    def stop(number: int, _frame: "FrameType | None") -> None:
        nonlocal stopped
        for each in signals:
            signal.signal(each, signal.SIG_DFL)
        name = signal.Signals(number).name
        stopped = Interrupted(f"stopped by {name}; {where}: run the same command again to continue")
        raise stopped

    wanted = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    signals = [each for each in wanted if signal.getsignal(each) is not signal.SIG_IGN]
    before = {each: signal.signal(each, stop) for each in signals}
    try:
        yield
    except Exception as err:
        if stopped:
            raise stopped from err
        raise
    finally:
        for each, handler in before.items():
            if signal.getsignal(each) is stop:  # no signal came; else a second one still ends it
                signal.signal(each, handler)


@contextmanager
def reporting(quiet: bool, log_file: Path | None, folder: Path = Path()) -> Iterator[Reporter]:
    """The reporter for where standard error goes, and one more for a log file.

    Of several processes the first one reports.

    Free disk space is shown for the volume of `folder`.
    """
    with ExitStack() as stack:
        reporters: list[Reporter] = []
        if not is_first():
            yield SilentReporter()
            return
        if sys.stderr.isatty() and not quiet:
            console = Console(stderr=True)
            reporters.append(stack.enter_context(RichReporter(console, folder)))
        else:
            reporters.append(LogReporter(sys.stderr, folder=folder, quiet=quiet))
        if log_file is not None:
            try:
                stream = stack.enter_context(log_file.open("a", encoding="utf-8"))
            except OSError as err:
                raise InputError(f"--log-file {log_file}: {err.strerror or err}") from err
            reporters.append(LogReporter(stream, folder=folder))
        yield Reporters(*reporters)
