"""`rilq batch`."""

import inspect
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from rilq.cli.app import app
from rilq.cli.convert import convert_options
from rilq.cli.options import AsJson, Quiet
from rilq.cli.session import reporting, stoppable, user_errors
from rilq.errors import InputError, Interrupted, OptionError

if TYPE_CHECKING:
    from rilq.batch.jobs import ConvertCommand
    from rilq.converter.options import ConvertOptions


# Of click, or of the copy of it that newer versions of typer have.
_UsageError: Any = typer.BadParameter.__mro__[1]


@app.command()
def batch(
    file: Annotated[Path, typer.Argument(help="YAML file of jobs; see docs/batch.md.")],
    max_parallel: Annotated[
        int | None,
        typer.Option(help="Jobs at once; one to a GPU. (default: 1; with Ray, all)", min=1),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="local, or ray: the Ray cluster that this machine is a node of.")
    ] = "local",
    only: Annotated[
        list[str] | None, typer.Option(help="Jobs that fit this shell pattern; repeatable.")
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Only jobs that failed the last time.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and plan all jobs, run none.")
    ] = False,
    state_dir: Annotated[
        Path | None, typer.Option(help="Logs and state. (default: <file>.rilq-batch)")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Convert many models; run it again to do what is not done."""
    from rilq.batch.display import (
        LinesDisplay,
        LiveDisplay,
        failure,
        plan_lines,
        status_dict,
        status_table,
    )
    from rilq.batch.jobs import read_jobs, select
    from rilq.batch.local_engine import LocalEngine
    from rilq.batch.outlook import check_disks, look_ahead, merge
    from rilq.batch.ray_engine import connect
    from rilq.batch.run import run_batch
    from rilq.batch.state import look_at_state, open_state, state_folder

    place = (state_dir or state_folder(file)).absolute()
    with user_errors(), stoppable(f"state is in {place}"), ExitStack() as stack:
        if engine not in ("local", "ray"):
            raise OptionError(f"--engine {engine}: expected local or ray")
        _change_folder(file)
        jobs = select(read_jobs(Path(file.name), convert_command()), only or ())
        state = look_at_state(place) if dry_run else stack.enter_context(open_state(place))
        if retry_failed:
            jobs = [job for job in jobs if state.failed(job)]
        on_ray = engine == "ray"
        cluster = stack.enter_context(connect(state)) if on_ray else LocalEngine(state.lock)
        with reporting(quiet, None, place) as report:
            outlooks = look_ahead(jobs, report)
            todo = {
                job.name: outlooks[job.name]
                for job in jobs
                if outlooks[job.name].progress != "done" or not state.succeeded(job)
            }
            parallel = max_parallel or (max(1, len(todo)) if on_ray else 1)
            merged = merge(todo, parallel, together=1 if on_ray else None)
            for line in () if dry_run else plan_lines(merged):
                report.note(line)
        if dry_run:
            print(json.dumps(merged.as_dict()) if as_json else "\n".join(plan_lines(merged)))
        check_disks(merged)
        cluster.check([job for job in jobs if job.name in todo], merged)
        if dry_run:
            return
        show = LinesDisplay(sys.stderr, quiet=quiet).show
        if sys.stderr.isatty() and not quiet:
            show = stack.enter_context(LiveDisplay(Console(stderr=True))).show
        ended = run_batch(jobs, todo, state, cluster, parallel=parallel, show=show)
    if as_json:
        print(json.dumps({"jobs": [status_dict(status) for status in ended]}))
    else:
        Console(highlight=False).print(status_table(ended))
    for status in ended:
        if status.state == "failed":
            print(f"rilq: {status.job.name}: {failure(status)}", file=sys.stderr)
    states = {status.state for status in ended}
    if states & {"failed", "stopped"}:
        raise typer.Exit(1 if "failed" in states else Interrupted.exit_code)


def _change_folder(file: Path) -> None:
    """Go where a batch file is: its paths are meant from there, whoever runs it."""
    try:
        os.chdir(file.absolute().parent)
    except OSError as err:
        raise InputError(f"{file}: cannot be read: {err.strerror or err}") from err


def convert_command() -> "ConvertCommand":
    """What a batch file may say of a job: the options of `convert`, read as its command line."""
    from rilq.batch.jobs import ConvertCommand, Option

    shared = inspect.signature(convert_options).parameters
    group: Any = typer.main.get_command(app)
    command = group.commands["convert"]
    options = {
        name.removeprefix("--"): Option(
            flag=parameter.is_flag,
            repeatable=parameter.multiple,
            off=next(iter(parameter.secondary_opts), None),
        )
        for parameter in command.params
        for name in parameter.opts
        if parameter.param_type_name == "option"
        and name.startswith("--")
        # The batch itself says how its jobs report.
        and parameter.name not in ("help", "quiet", "as_json", "log_file")
    }

    def read(words: Sequence[str]) -> dict[str, Any]:
        try:
            with command.make_context("convert", list(words)) as context:
                return dict(context.params)
        except _UsageError as err:
            raise OptionError(err.format_message()) from err

    def make(values: Mapping[str, Any]) -> "ConvertOptions":
        return convert_options(**{name: values[name] for name in shared})

    return ConvertCommand(options, read, make)
