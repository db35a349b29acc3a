"""`rilq analyze`."""

import json
from pathlib import Path
from typing import Annotated

from rich.console import Console

import rilq
from rilq.cli.app import app
from rilq.cli.options import (
    BASE,
    DATA,
    MACHINE,
    OUT,
    TRAIN,
    AsJson,
    Device,
    Dtype,
    LogFile,
    Model,
    Quiet,
    Revision,
    option,
)
from rilq.cli.session import reporting, stoppable, user_errors
from rilq.cli.tables import analysis_table
from rilq.errors import OptionError


@app.command()
def analyze(
    model: Model,
    text: Annotated[
        str, option(DATA, "Held-out text: a file, wikitext2, c4, or owner/name on the Hub.")
    ],
    ranks: Annotated[str, option(TRAIN, "Ranks to compare, comma-separated.")] = "4,8,16,32",
    scopes: Annotated[
        str, option(TRAIN, "Some of svd, linear, layer, model.")
    ] = "svd,linear,layer,model",
    bits: Annotated[int, option(BASE, "Bits per code: 2, 3, 4, 8.")] = 2,
    group_size: Annotated[int, option(BASE, "Inputs that share a scale: 32, 64, 128.")] = 64,
    quantizer: Annotated[str, option(BASE, "rtn, or nf2: 2-bit NormalFloat, simulated.")] = "rtn",
    adapter: Annotated[
        str, option(TRAIN, "lora, or pooled for ranks up to the groups of a linear.")
    ] = "lora",
    alpha: Annotated[
        float, option(TRAIN, "At every rank; where alpha / rank is fixed, at rank 16.")
    ] = 16.0,
    dataset: Annotated[
        list[str] | None, option(DATA, "Calibration text, as of convert. (default: c4)")
    ] = None,
    text_key: Annotated[str, option(DATA, "Key of the text in a record.")] = "text",
    nsamples: Annotated[int, option(DATA, "Calibration rows.")] = 96,
    seqlen: Annotated[int, option(DATA, "Tokens per row and per held-out window.")] = 256,
    windows: Annotated[int, option(DATA, "Held-out windows at most, spread evenly.")] = 64,
    seed: Annotated[
        int, option(DATA, "Of rows, their order, and the adapters.", min=0, max=2**32 - 1)
    ] = 42,
    steps: Annotated[int, option(TRAIN, "Updates, of each layer and of the model.")] = 30,
    batch_size: Annotated[int, option(TRAIN, "Rows per update.")] = 8,
    lr: Annotated[
        float | None, option(TRAIN, "Learning rate. (default: 1e-4 x 4096 / hidden size)")
    ] = None,
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    student: Annotated[
        str, option(MACHINE, "Weights while training: auto, dense, packed or offload.")
    ] = "auto",
    output_dir: Annotated[
        Path | None, option(OUT, "(default: <model>-analysis)", "--output-dir", "-o")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
    log_file: LogFile = None,
) -> None:
    """Fit adapters at four scopes and several ranks, and compare: the figure of RILQ's paper."""
    with user_errors():
        from rilq.converter.analysis import AnalyzeOptions

        options = AnalyzeOptions(
            model=model,
            text=text,
            ranks=_ranks(ranks),
            scopes=tuple(scopes.split(",")),  # type: ignore[arg-type]  # checked, as the next ones
            bits=bits,
            group_size=group_size,
            quantizer=quantizer,  # type: ignore[arg-type]
            adapter=adapter,  # type: ignore[arg-type]
            alpha=alpha,
            dataset=tuple(dataset or ("c4",)),
            text_key=text_key,
            nsamples=nsamples,
            seqlen=seqlen,
            windows=windows,
            steps=steps,
            batch_size=batch_size,
            learning_rate=lr,
            seed=seed,
            revision=revision,
            device=device,
            dtype=dtype,  # type: ignore[arg-type]
            student=student,  # type: ignore[arg-type]
            output_dir=output_dir,
        )
        with (
            stoppable("nothing was kept"),
            reporting(quiet, log_file, options.output) as report,
        ):
            found = rilq.analyze(options, report)
            report.note(f"{options.output}: done")
    if as_json:
        print(json.dumps(found.as_dict()))
    else:
        Console(highlight=False).print(analysis_table(found))


def _ranks(text: str) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdigit() for word in words):
        raise OptionError(f"--ranks {text}: expected whole numbers, for example 4,8,16,32")
    return tuple(map(int, words))
