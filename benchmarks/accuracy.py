#!/usr/bin/env python3
"""What each base quantizer and adapter gives on one model, as a table.

Converts the model once for each recipe with the `rilq` command, evaluates every result on held-out
text, streamed, against the source, and prints a Markdown table. The gap counts from plain RTN (0)
to full precision (1), in nats; KL divergence and top-1 agreement are with the source's predictions.

    python benchmarks/accuracy.py MODEL --dataset CALIB --text HELDOUT --seqlen 256 \\
        --group-size 64 --nsamples 320

More options go to every `rilq convert`.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import rilq
from rilq.converter.options import ConvertOptions
from rilq.evaluation.gap import gap_closed

# What is printed: the options that make it. The first is the zero of the gap.
PAPERS_LOSS = ("--train", "adapters", "--loss", "mse+ce")
RECIPES: dict[str, tuple[str, ...]] = {
    "rtn": ("--quantizer", "rtn", "--train", "none"),
    "rtn, clip search": ("--quantizer", "rtn", "--clip", "search", "--train", "none"),
    "gptq": ("--quantizer", "gptq", "--clip", "search", "--train", "none"),
    "rtn + pooled": ("--quantizer", "rtn", *PAPERS_LOSS),
    "rtn + plain LoRA, not merged": ("--quantizer", "rtn", "--adapter", "lora", *PAPERS_LOSS),
    "gptq + pooled": ("--quantizer", "gptq", "--clip", "search", *PAPERS_LOSS),
    "default": (),
}


def main() -> None:
    """Convert, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--dataset", required=True, help="calibration text")
    parser.add_argument("--text", required=True, help="held-out text")
    parser.add_argument("--seqlen", default="256", help="of calibration rows and of windows")
    args, more = parser.parse_known_args()
    print(
        f"machine: {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, python {platform.python_version()}, "
        f"rilq {rilq.__version__}, seed {ConvertOptions.seed} unless given\n\n"
        "| recipe | perplexity | gap closed | KL mean | top-1 | bits per weight | convert |\n"
        "|---|---|---|---|---|---|---|"
    )
    measured = ("--text", args.text, "--seqlen", args.seqlen)
    full = run("eval", args.model, *measured)
    print(f"| full precision | {full['perplexity']:.4g} | 1 | 0 | 1 | 16 | |", flush=True)
    plain = None
    for name, recipe in RECIPES.items():
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            data = ("--dataset", args.dataset, "--seqlen", args.seqlen)
            begun = time.perf_counter()
            run("convert", args.model, *data, *more, *recipe, "-o", out)
            seconds = time.perf_counter() - begun
            found = run("eval", out, *measured, "--against", args.model)
        perplexity, against = found["perplexity"], found["against"]
        plain = plain or perplexity
        gap = gap_closed(perplexity, plain=plain, full=full["perplexity"])
        print(
            f"| {name} | {perplexity:.4g} | {gap:.3f} | {against['kl_mean']:.4f} | "
            f"{against['top1_agreement']:.3f} | {found['bits_per_weight']:.2f} | {seconds:.0f} s |",
            flush=True,
        )


def run(*arguments: object) -> dict[str, Any]:
    """What one `rilq` command says with `--json`."""
    command = [sys.executable, "-m", "rilq", *map(str, arguments), "--json", "--quiet"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    said: dict[str, Any] = json.loads(done.stdout)
    return said


if __name__ == "__main__":
    main()
