"""The `rilq` program itself: its options before any command, and how it starts."""

import os
import sys
from typing import Annotated

import typer

import rilq
from rilq.converter.ranks import launched
from rilq.errors import OptionError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Turn a Hugging Face checkpoint into a 2-bit one, layer by layer, and win the accuracy "
    "back with RILQ.",
    context_settings={
        # --group_size is the same as --group-size.
        "token_normalize_func": lambda name: name.replace("_", "-"),
        "help_option_names": ["-h", "--help"],
    },
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"rilq {rilq.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand != "convert" and launched()[1] > 1:
        raise SystemExit(_alone(context.invoked_subcommand))


def _alone(command: str | None) -> int:
    """Refuse a command that several processes would each do on their own; the exit code."""
    index, count = launched()
    if index == 0:
        print(
            f"rilq: {command} runs in one process, and a launcher started {count}\n"
            "  only rilq convert works with torchrun or accelerate launch; start it without them",
            file=sys.stderr,
        )
    return OptionError.exit_code


def main() -> None:
    """Entry point of the `rilq` command."""
    _open_closed_streams()
    # OpenMP's threads spin by default while they wait for each other: with one other busy process
    # on two cores, streaming then took 16 times as long. Read when torch is loaded, later.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app()


def _open_closed_streams() -> None:
    """Send closed standard streams (`>&-`) to nowhere: else the next file gets their number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
            setattr(sys, name, open(number, "w" if number else "r"))
