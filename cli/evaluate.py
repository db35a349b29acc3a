"""`rilq eval`."""

import json
from typing import Annotated

import typer
from rich.console import Console

import rilq
from rilq.cli.app import app
from rilq.cli.options import AsJson, Db, Device, Dtype, LogFile, Model, Quiet, Revision
from rilq.cli.session import reporting, stoppable, user_errors
from rilq.cli.summary import show_evaluation
from rilq.cli.tables import evaluation_table


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
        str | None, typer.Option(help="Base model: adds KL divergence and top-1 agreement.")
    ] = None,
    text_key: Annotated[str, typer.Option(help="Key of the text in a record.")] = "text",
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    db: Db = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
    log_file: LogFile = None,
) -> None:
    """Perplexity of any checkpoint, dense or ours, streamed layer by layer."""
    with (
        user_errors(),
        stoppable("nothing was kept"),
        reporting(quiet, log_file) as report,
    ):
        result = rilq.evaluate(
            model,
            text,
            seqlen=seqlen,
            against=against,
            device=device,
            dtype=dtype,
            revision=revision,
            text_key=text_key,
            report=report,
            db=db,
        )
    if as_json:
        print(json.dumps(result.as_dict()))
    else:
        Console(highlight=False).print(evaluation_table(model, result))
        if not quiet:
            show_evaluation(model, text, result, Console(stderr=True, highlight=False))
