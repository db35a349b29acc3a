"""`rilq eval`."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import rilq
from rilq.cli.app import app
from rilq.cli.evaluation_view import evaluation_view
from rilq.cli.options import (
    MACHINE,
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
from rilq.cli.summary import show_evaluation

TASKS, PROMPTS = "Tasks, by lm-evaluation-harness", "Prompts, continued greedily"


@app.command("eval")
def evaluate(
    model: Model,
    text: Annotated[
        str, typer.Option(help="Text, JSON lines or Parquet file, wikitext2, c4, or owner/name.")
    ] = "wikitext2",
    seqlen: Annotated[
        int | None, typer.Option(help="Context. (default: 2048, or the model's maximum)")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="Base model: adds KL divergence, agreement, layers and worst passages."),
    ] = None,
    text_key: Annotated[str, typer.Option(help="Key of the text in a record.")] = "text",
    tasks: Annotated[
        list[str] | None,
        option(TASKS, "Names or YAML files, separated by commas; repeatable."),
    ] = None,
    num_fewshot: Annotated[
        int | None, option(TASKS, "Examples in each prompt. (default: the task's)")
    ] = None,
    limit: Annotated[int | None, option(TASKS, "Samples of each task. (default: all)")] = None,
    task_path: Annotated[
        Path | None, option(TASKS, "Folder with further tasks: YAML files.")
    ] = None,
    prompts: Annotated[
        Path | None,
        option(
            PROMPTS,
            'One a line, or JSON lines with a "prompt" key; --against shows the base\'s too.',
        ),
    ] = None,
    max_new_tokens: Annotated[int, option(PROMPTS, "Tokens after each prompt, at most.")] = 64,
    speed: Annotated[
        bool,
        option(MACHINE, "Time the loaded model, and take its peak memory.", "--speed/--no-speed"),
    ] = True,
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
    """Measure any checkpoint, dense or ours: perplexity streamed, tasks, prompts, speed."""
    with user_errors():
        from rilq.evaluation.identity import default_work

        work = work_dir or default_work(model)
    with (
        user_errors(),
        stoppable(f"state is in {work}"),
        reporting(quiet, log_file, work) as report,
    ):
        from rilq.evaluation.generations import read_prompts

        result = rilq.evaluate(
            model,
            text,
            seqlen=seqlen,
            against=against,
            tasks=[name for each in tasks or () for name in each.split(",") if name],
            num_fewshot=num_fewshot,
            limit=limit,
            task_path=task_path,
            prompts=() if prompts is None else read_prompts(prompts),
            max_new_tokens=max_new_tokens,
            speed=speed,
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
        Console(highlight=False).print(evaluation_view(model, result))
        if not quiet:
            show_evaluation(model, text, result, Console(stderr=True, highlight=False))
