"""`rilq eval`."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import rilq
from rilq.cli.app import app
from rilq.cli.options import (
    OUT,
    AsJson,
    Db,
    Device,
    Dtype,
    LogFile,
    Model,
    Quiet,
    Revision,
    option,
)
from rilq.cli.session import reporting, stoppable, user_errors
from rilq.cli.tables import evaluation_table, worst_passages


@app.command("eval")
def evaluate(
    model: Model,
    text: Annotated[
        str, typer.Option(help="Text, JSON lines or Parquet file, wikitext2, c4, or owner/name.")
    ],
    seqlen: Annotated[
        int | None, typer.Option(help="Context. (default: 2048, or the model's maximum)")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="Base model: adds KL divergence, agreement, layers and worst passages."),
    ] = None,
    text_key: Annotated[str, typer.Option(help="Key of the text in a record.")] = "text",
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    work_dir: Annotated[
        Path | None,
        option(OUT, "State of a run that can be stopped. (default: <model>.rilq-eval-work)"),
    ] = None,
    resume: Annotated[str, option(OUT, "auto, never or required.")] = "auto",
    db: Db = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
    log_file: LogFile = None,
) -> None:
    """Perplexity of any checkpoint, dense or ours, streamed layer by layer."""
    with user_errors():
        from rilq.evaluation.identity import default_work

        work = work_dir or default_work(model)
    with (
        user_errors(),
        stoppable(f"state is in {work}"),
        reporting(quiet, log_file, work) as report,
    ):
        result = rilq.evaluate(
            model,
            text,
            seqlen=seqlen,
            against=against,
            device=device,
            dtype=dtype,
            work=work,
            resume=resume,
            revision=revision,
            text_key=text_key,
            report=report,
            db=db,
        )
    if as_json:
        print(json.dumps(result.as_dict()))
    else:
        console = Console(highlight=False)
        console.print(evaluation_table(model, result), *worst_passages(result), sep="\n")
