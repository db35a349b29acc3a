"""`rilq report`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from rilq.cli.app import app
from rilq.cli.options import AsJson, Quiet
from rilq.cli.session import reporting, user_errors
from rilq.errors import OptionError


@app.command()
def report(
    subjects: Annotated[
        list[str],
        typer.Argument(metavar="DIR|RUN...", help="Checkpoints made by rilq, or numbers of runs."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file to write.")] = Path(
        "report.html"
    ),
    db: Annotated[
        str,
        typer.Option(
            help="Database of runs; none for what is in the folders alone. (default: RILQ_DB, or "
            "rilq.db beside the checkpoint, or for a RUN in the current folder)",
            show_default=False,
        ),
    ] = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Show what is known and measured of checkpoints on one page that needs no network."""
    with user_errors(), reporting(quiet, None) as progress:
        from rilq.evaluation.report.page import write_page
        from rilq.evaluation.report.sources import gather

        for folder in map(Path, subjects):
            if folder.resolve() in output.resolve().parents:
                raise OptionError(
                    f"-o {output}: lies inside {folder}, whose files are all in its rilq.json\n"
                    "  choose a file outside of it"
                )
        found = gather(subjects, db)
        write_page(output, found)
        progress.note(f"{output}: {', '.join(subject.name for subject in found)}")
    if as_json:
        print(json.dumps({"report": str(output), "subjects": [s.name for s in found]}))
