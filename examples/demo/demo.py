"""Convert the demo model to 2 bits, with and without RILQ, and compare.

    make demo

Runs the `rilq` command as a user would, on the files beside this script, and leaves the
converted checkpoints in `demo-out/` at the root of the repository.
"""

import json
import os
import shlex
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rilq.evaluation.gap import gap_closed

ROOT = Path(__file__).resolve().parents[2]
DEMO = Path("examples/demo")  # this and the next: relative to ROOT, where every command runs
OUT = Path("demo-out")
MODEL = DEMO / "model"
PLAIN = OUT / "model-w2g64-rtn"
RILQ = OUT / "model-w2g64-rilq"
SEQLEN = 256
PROMPT = " The city"
NEW_TOKENS = 48


@dataclass(frozen=True)
class Measured:
    """One checkpoint's row of the table."""

    name: str
    perplexity: float
    bits_per_weight: float
    megabytes: float


def rilq(console: Console, *arguments: str | Path, capture: bool = False) -> str:
    """Show and run one `rilq` command.

    Its progress (standard error) goes to the terminal; its standard output too, unless
    `capture` asks for it back.

    Raises:
        SystemExit: the command failed; with its exit code.
    """
    words = [str(argument) for argument in arguments]
    shown = f"\n$ rilq {shlex.join(words)}"
    console.print(shown, style="bold", markup=False, highlight=False, soft_wrap=True)
    script = Path(sysconfig.get_path("scripts")) / "rilq"
    finished = subprocess.run(
        [str(script), *words], cwd=ROOT, text=True, stdout=subprocess.PIPE if capture else None
    )
    if finished.returncode != 0:
        raise SystemExit(finished.returncode)
    return finished.stdout or ""


def measure(console: Console, name: str, checkpoint: Path) -> Measured:
    """Evaluate `checkpoint` on the held-out text, and weigh its shards."""
    text = DEMO / "heldout.txt"
    printed = rilq(
        *(console, "eval", checkpoint, "--text", text, "--seqlen", str(SEQLEN)),
        *("--no-speed", "--db", OUT / "rilq.db", "--json"),
        capture=True,
    )
    figures = json.loads(printed)
    shards = (ROOT / checkpoint).glob("*.safetensors")
    return Measured(
        name=name,
        perplexity=figures["perplexity"],
        bits_per_weight=figures["bits_per_weight"],
        megabytes=sum(shard.stat().st_size for shard in shards) / 1e6,
    )


def comparison(full: Measured, plain: Measured, merged: Measured) -> Table:
    """The table that the demo is run for."""
    table = Table(title=f"Held-out WikiText-2 text, windows of {SEQLEN} tokens")
    table.add_column("model")
    for heading in ("perplexity", "bits/weight", "size on disk", "gap closed"):
        table.add_column(heading, justify="right")
    for row in (full, plain, merged):
        table.add_row(
            row.name,
            f"{row.perplexity:.2f}",
            f"{row.bits_per_weight:.2f}",
            f"{row.megabytes:.2f} MB",
            f"{gap_closed(row.perplexity, plain=plain.perplexity, full=full.perplexity):.2f}",
        )
    return table


def continuation(checkpoint: Path) -> str:
    """`PROMPT` and a sampled continuation, the same seed for every checkpoint."""
    # Imported here: torch and transformers take seconds, and the commands above need neither.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    import rilq  # noqa: F401  (teaches transformers to load the 2-bit format)

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(ROOT / checkpoint)
    model = AutoModelForCausalLM.from_pretrained(ROOT / checkpoint)
    torch.manual_seed(0)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=True, temperature=0.7)
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True)).strip()


def main() -> None:
    """Convert twice, evaluate three times, print one table and two continuations."""
    # The model and the text are here, so nothing should ask the Hub.
    os.environ["HF_HUB_OFFLINE"] = "1"
    console = Console()
    shutil.rmtree(ROOT / OUT, ignore_errors=True)
    (ROOT / OUT).mkdir()
    dataset = ("--dataset", DEMO / "calib.txt")
    rilq(console, "convert", MODEL, *dataset, "-o", RILQ)
    # Min-max, no training: no text has an effect on it, so few rows do.
    rounding = ("--quantizer", "rtn", "--clip", "none", "--rank", "0", "--nsamples", "8")
    rilq(console, "convert", MODEL, *dataset, *rounding, "-o", PLAIN)
    full = measure(console, "full precision", MODEL)
    plain = measure(console, "2-bit plain", PLAIN)
    merged = measure(console, "2-bit + RILQ merged", RILQ)
    console.print()
    console.print(comparison(full, plain, merged))
    for row, checkpoint in ((full, MODEL), (merged, RILQ)):
        console.print(f"\n{row.name}:", style="bold")
        console.print(continuation(checkpoint), markup=False, highlight=False)


if __name__ == "__main__":
    main()
