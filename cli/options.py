"""Options that several commands share, and how an option is declared."""

from pathlib import Path
from typing import Annotated, Any

import typer

BASE, DATA, TRAIN = "Quantization", "Calibration", "RILQ training"
RESQ = "ResQ and its baselines (--method)"
MACHINE, OUT, PUSH = "Machine", "Output", "Push to the Hub"


def option(panel: str, text: str, *names: str, **limits: int) -> Any:
    """An option, as the metadata of an `Annotated` parameter.

    Args:
        panel: heading that `--help` shows it under.
        text: its help.
        names: its flags, where they do not follow from the parameter's name.
        limits: `min` and `max` of a number; more of what `typer.Option` takes.
    """
    return typer.Option(*names, help=text, rich_help_panel=panel, **limits)  # type: ignore[arg-type]


Model = Annotated[str, typer.Argument(help="Folder of a checkpoint, or owner/name on the Hub.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings and errors.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
LogFile = Annotated[Path | None, typer.Option(help="Also write plain log lines to this file.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the Hub.")]
Device = Annotated[str, option(MACHINE, "auto, cpu, cuda, cuda:1, ...")]
Dtype = Annotated[
    str, option(MACHINE, "Compute in auto (float32 on a CPU, else bfloat16), or a named dtype.")
]
Private = Annotated[bool, option(PUSH, "Make the repository private.", "--private")]
EvalText = Annotated[
    str, option(PUSH, "What perplexity is measured on: a file, wikitext2, c4, or owner/name.")
]
MaxPplRatio = Annotated[
    float, option(PUSH, "Refuse a perplexity above this multiple of the base's.")
]
Db = Annotated[
    str,
    option(
        OUT,
        "Database that the run is recorded in; none for no record. (default: RILQ_DB, or rilq.db "
        "beside the checkpoint)",
        "--db",
        show_default=False,
    ),
]
