"""`rilq runs`."""

import csv
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer
from rich.console import Console

from rilq.cli.app import app
from rilq.cli.options import AsJson
from rilq.cli.session import user_errors
from rilq.errors import OptionError

if TYPE_CHECKING:
    from rilq.records.run import Run, State

LISTED = (
    "id", "command", "state", "started", "seconds", "model", "checkpoint", "place",
    "content_hash", "source_hash", "job", "message",
)  # fmt: skip


@app.command()
def runs(
    number: Annotated[
        int | None, typer.Argument(metavar="[RUN]", help="Show this run whole.")
    ] = None,
    db: Annotated[
        str,
        typer.Option(
            help="Database of runs. (default: RILQ_DB, or rilq.db in the current folder)",
            show_default=False,
        ),
    ] = "auto",
    command: Annotated[str | None, typer.Option(help="Only of convert, or of eval.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Only of this full-precision model; or a shell pattern.")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Only of this checkpoint; or a shell pattern.")
    ] = None,
    state: Annotated[
        str | None, typer.Option(help="Only those running, done, failed or stopped.")
    ] = None,
    sort: Annotated[
        str | None,
        typer.Option(help="Figure to sort by, lowest first, such as perplexity or kl_p99."),
    ] = None,
    reverse: Annotated[
        bool, typer.Option("--reverse", help="The other way round: oldest or highest first.")
    ] = False,
    limit: Annotated[int, typer.Option(help="At most so many; 0 for all.", min=0)] = 0,
    as_json: AsJson = False,
    as_csv: Annotated[
        bool, typer.Option("--csv", help="Comma-separated values on standard output.")
    ] = False,
    tensorboard: Annotated[
        Path | None, typer.Option(help="Write RUN as TensorBoard's event files in this folder.")
    ] = None,
) -> None:
    """List the runs of convert and eval, or show one."""
    from rilq.records.database import read_database
    from rilq.records.place import database_for

    with user_errors():
        _check(number, as_json, as_csv, tensorboard, state)
        path = database_for(db, Path())
        if path is None:
            raise OptionError("--db none: there is nothing to list\n  pass --db with a file")
        with read_database(path) as database:
            if number is not None:
                one = database.run(number)
            else:
                found = database.runs(
                    command=command,
                    model=model,
                    checkpoint=checkpoint,
                    state=cast("State | None", state),
                )
        if number is None:
            _list(_sorted(found, sort, reverse)[: limit or None], sort, as_json, as_csv)
        elif tensorboard is not None:
            from rilq.records.tensorboard import write_events

            print(write_events(one, tensorboard))
        else:
            _show(one, as_json)


def _check(
    number: int | None, as_json: bool, as_csv: bool, tensorboard: Path | None, state: str | None
) -> None:
    from rilq.records.run import State

    if as_json and as_csv:
        raise OptionError("--json, --csv: give one of them")
    if tensorboard is not None and number is None:
        raise OptionError("--tensorboard: which run? `rilq runs RUN --tensorboard FOLDER`")
    if tensorboard is not None and as_json:
        raise OptionError("--tensorboard, --json: give one of them")
    if as_csv and number is not None:
        raise OptionError("--csv: is for the list; one run is shown whole with --json")
    if state is not None and state not in get_args(State):
        raise OptionError(f"--state {state}: expected one of {', '.join(get_args(State))}")


def _sorted(found: "list[Run]", figure: str | None, reverse: bool) -> "list[Run]":
    """By a figure, runs without it last; without one as they are, the newest first."""
    if figure is None:
        return found[::-1] if reverse else found
    known = [run for run in found if figure in run.figures]
    if not known and found:
        names = sorted({name for run in found for name in run.figures})
        raise OptionError(f"--sort {figure}: no run has it; there are {', '.join(names) or 'none'}")
    known.sort(key=lambda run: run.figures[figure], reverse=reverse)
    return known + [run for run in found if figure not in run.figures]


def _list(found: "list[Run]", figure: str | None, as_json: bool, as_csv: bool) -> None:
    from rilq.cli.run_tables import runs_table

    if as_json:
        print(json.dumps([{**_listed(run), "figures": run.figures} for run in found]))
    elif as_csv:
        names = sorted({name for run in found for name in run.figures})
        rows = csv.DictWriter(sys.stdout, [*LISTED, *names], lineterminator="\n")
        rows.writeheader()
        rows.writerows({**_listed(run), **run.figures} for run in found)
    else:
        console = Console(highlight=False)
        console.print(runs_table(found, console.width, figure))


def _listed(run: "Run") -> dict[str, Any]:
    return {name: getattr(run, name) for name in LISTED}


def _show(run: "Run", as_json: bool) -> None:
    from dataclasses import asdict

    from rilq.cli.run_tables import run_tables

    if as_json:
        print(json.dumps(asdict(run)))
        return
    console = Console(highlight=False)
    for table in run_tables(run):
        console.print(table)
