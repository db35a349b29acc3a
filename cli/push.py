"""`rilq push`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from rilq.cli.app import app
from rilq.cli.options import (
    PUSH,
    AsJson,
    Device,
    Dtype,
    EvalText,
    LogFile,
    MaxPplRatio,
    Private,
    Quiet,
    option,
)
from rilq.cli.session import reporting, stoppable, user_errors
from rilq.cli.tables import show_push


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="A checkpoint made by rilq, or an export of one.")],
    repo_id: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="On the Hub.")],
    revision: Annotated[
        str | None, option(PUSH, "Branch, made if it is not there. (default: main)")
    ] = None,
    private: Private = False,
    pr: Annotated[bool, option(PUSH, "Open a pull request instead.", "--pr")] = False,
    replace: Annotated[
        bool, option(PUSH, "Put it in the place of another model.", "--replace")
    ] = False,
    text: EvalText = "wikitext2",
    text_key: Annotated[str, option(PUSH, "Key of the text in a record.")] = "text",
    seqlen: Annotated[
        int | None, option(PUSH, "Context. (default: 2048, or the model's maximum)")
    ] = None,
    base: Annotated[
        str | None, option(PUSH, "What it was converted from, if that is a local folder.")
    ] = None,
    native: Annotated[
        Path | None, option(PUSH, "Of an export: what it was made from, whose perplexity counts.")
    ] = None,
    max_ppl_ratio: MaxPplRatio = 2.0,
    force: Annotated[
        bool, option(PUSH, "Whatever the perplexity is, even if it is unknown.", "--force")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
    log_file: LogFile = None,
) -> None:
    """Check a checkpoint, measure it, and push it with a model card in one commit."""
    with (
        user_errors(),
        stoppable("what was uploaded is not sent again"),
        reporting(quiet, log_file, folder) as report,
    ):
        from rilq.evaluation.push import PushOptions
        from rilq.evaluation.push import push as push_folder

        options = PushOptions(
            repo_id,
            revision=revision,
            private=private,
            pull_request=pr,
            replace=replace,
            force=force,
            max_ppl_ratio=max_ppl_ratio,
            text=text,
            text_key=text_key,
            seqlen=seqlen,
            base=base,
            native=native,
            device=device,
            dtype=dtype,
        )
        pushed = push_folder(folder, options, report)
        show_push(pushed, report)
    if as_json:
        print(json.dumps(pushed.as_dict()))
