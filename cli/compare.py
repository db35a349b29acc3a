"""`rilq compare`."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from rilq.cli.app import app
from rilq.cli.comparison import comparison_tables
from rilq.cli.options import OUT, AsJson, Db, Device, Dtype, LogFile, Quiet, option
from rilq.cli.session import reporting, stoppable, user_errors
from rilq.errors import OutputError

TEXT, RULES = "Text", "Rules"


@app.command()
def compare(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="CHECKPOINT|RUN",
            help="Checkpoints (folders, or owner/name on the Hub) or numbers of recorded "
            "evaluations; the first is the baseline.",
        ),
    ],
    text: Annotated[
        str,
        option(TEXT, "What checkpoints are measured on: a file, wikitext2, c4, or owner/name."),
    ] = "wikitext2",
    text_key: Annotated[str, option(TEXT, "Key of the text in a record.")] = "text",
    seqlen: Annotated[
        int | None, option(TEXT, "Context. (default: 2048, or the models' maximum)")
    ] = None,
    against: Annotated[
        str | None,
        option(TEXT, "Base for KL and agreement; none for none. (default: on the Hub, as "
                     "rilq.json names it)"),
    ] = None,
    baseline: Annotated[
        str | None,
        option(RULES, "latest or best of the records, a run, or a checkpoint; the others are held "
                      "against it."),
    ] = None,
    fail_if: Annotated[
        list[str] | None,
        option(RULES, "Exit code 1 if it holds of one: NAME OP LIMIT, such as 'ppl > 1.02x', "
                      "'kl_p99 > +0.1', 'top1 < 0.95'; repeatable."),
    ] = None,
    junit: Annotated[Path | None, option(RULES, "Also write JUnit XML to this file.")] = None,
    db: Db = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    work_dir: Annotated[
        Path | None, option(OUT, "State of a run that can be stopped. (default: none is kept)")
    ] = None,
    resume: Annotated[str, option(OUT, "auto, never or required.")] = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
    log_file: LogFile = None,
) -> None:  # fmt: skip
    """Which checkpoint is better, how surely, and did anything get worse?"""
    kept = "nothing was kept" if work_dir is None else f"state is in {work_dir}"
    with user_errors(), stoppable(kept), reporting(quiet, log_file) as report:
        import rilq
        from rilq.evaluation.junit import junit_xml
        from rilq.formats.durable import write_bytes

        if junit is not None and not os.access(junit.absolute().parent, os.W_OK):
            raise OutputError(
                f"--junit {junit}: the folder is not there, or cannot be written\n  make it first"
            )
        found = rilq.compare(
            models,
            text=text,
            text_key=text_key,
            seqlen=seqlen,
            against=against,
            baseline=baseline,
            fail_if=fail_if or (),
            db=db,
            device=device,
            dtype=dtype,
            work=work_dir,
            resume=resume,
            report=report,
        )
        if junit is not None:
            write_bytes(junit, junit_xml(found))
    if as_json:
        print(json.dumps(found.as_dict()))
    else:
        Console(highlight=False).print(comparison_tables(found))
    if found.violations:
        raise typer.Exit(1)
