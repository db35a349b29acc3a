"""`rilq export` and `rilq verify`."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

import rilq
from rilq.cli.app import app
from rilq.cli.options import AsJson, LogFile, Quiet, Revision
from rilq.cli.session import reporting, stoppable, user_errors


@app.command()
def export(
    model: Annotated[
        str, typer.Argument(help="A checkpoint made by rilq: a folder, or owner/name on the Hub.")
    ],
    to: Annotated[
        list[str],
        typer.Option(help="dense, gguf, gptq, mlx, metal, vllm or compressed-tensors; repeatable."),
    ],
    output_dir: Annotated[
        Path,
        typer.Option(
            "--output-dir", "-o", help="To write; with several kinds, a folder in it for each."
        ),
    ],
    dtype: Annotated[str, typer.Option(help="fp16 or bf16, of all that is not packed.")] = "fp16",
    gguf_type: Annotated[
        str, typer.Option(help="q4_1 (exact, 5 bits) or q2_k (re-encoded, 2.6 bits).")
    ] = "q4_1",
    text: Annotated[
        str | None,
        typer.Option(help="To compare logits on: a file, wikitext2, c4, or owner/name on the Hub."),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Such as 5GB or 500MiB.")] = "5GB",
    revision: Revision = None,
    device: Annotated[str, typer.Option(help="That compares: auto, cpu, cuda, ...")] = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
    log_file: LogFile = None,
) -> None:
    """Write a converted checkpoint for another runtime, read back and compared; docs/exports.md."""
    with (
        user_errors(),
        stoppable("nothing unfinished was kept"),
        reporting(quiet, log_file, output_dir) as report,
    ):
        from rilq.evaluation.export import export as write_exports
        from rilq.formats.export.kind import ExportOptions, export_dtype
        from rilq.formats.writer import parse_size

        kinds = list(dict.fromkeys(to))
        several = len(kinds) > 1
        exported = write_exports(
            model,
            {kind: output_dir / kind if several else output_dir for kind in kinds},
            ExportOptions(export_dtype(dtype), parse_size(max_shard_size), gguf_type),
            revision=revision,
            text=text,
            device=device,
            report=report,
        )
    if as_json:
        print(json.dumps({"exports": [each.as_dict() for each in exported]}))
    else:
        for each in exported:
            state = "already there; " if each.already_done else ""
            print(
                f"{each.output}: {each.kind}, {state}logits differ by at most "
                f"{each.difference.largest:.3g} (bound {each.bound:.3g})"
            )


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="A checkpoint made by rilq.")],
    as_json: AsJson = False,
) -> None:
    """Check every hash in rilq.json."""
    with user_errors():
        found = rilq.verify(folder)
    if as_json:
        print(json.dumps({
            "files_checked": found.files_checked,
            "tensors_checked": found.tensors_checked,
            "problems": list(found.problems),
        }))  # fmt: skip
    else:
        for problem in found.problems:
            print(problem, file=sys.stderr)
        state = f"{len(found.problems)} problems" if found.problems else "whole"
        print(f"{folder}: {found.files_checked} files, {found.tensors_checked} tensors: {state}")
    if found.problems:
        raise typer.Exit(1)
