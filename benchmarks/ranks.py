#!/usr/bin/env python3
"""How much faster two processes of one thread each convert than one, and what the machine allows.

Each round measures, one after the other,

  one loop        a loop of matrix products in one process
  two loops       the same loop in two processes at once: 2 x one / two is what the machine allows
  one process     a conversion of a random Llama (hidden 1024, 3 layers) in one process
  two processes   the same conversion in two: one / two is what sharing the rows gains

The time of a conversion counts from where its processes have met to the published output; starting
Python and importing torch do not count. The last line has medians and their ratio as JSON.

    python benchmarks/ranks.py                      # about ten minutes on 2 cores
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import accelerate
import torch
import transformers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import rilq
from rilq.converter import pipeline
from rilq.converter.options import ConvertOptions
from rilq.converter.ranks import join, launched
from rilq.progress import SilentReporter

SEED = 0
HIDDEN, INTERMEDIATE, LAYERS = 1024, 2816, 3
ROWS, SEQLEN, STEPS, BATCH = 32, 256, 5, 8
PRODUCTS, SIZE = 500, 1024  # of the loop
DEMO = Path(__file__).parents[1] / "examples" / "demo"


def main() -> None:
    """Run the measurements and print one line for each round, then the medians as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quantizer", default="lsq")
    parser.add_argument("--part", choices=["loop", "convert"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        seconds = loop() if given.part == "loop" else convert(given.folder, given.quantizer)
        if launched()[0] == 0:
            print(seconds)
        return
    transformers.utils.logging.disable_progress_bar()
    print(
        f"machine: {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, "
        f"accelerate {accelerate.__version__}, transformers {transformers.__version__}, python "
        f"{platform.python_version()}, rilq {rilq.__version__}, seed {SEED}, one thread for each "
        "process",
        flush=True,
    )
    rounds = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_checkpoint(folder / "llama")
        for number in range(given.rounds):
            seconds = {
                "one loop": loops(1),
                "two loops": loops(2),
                "one process": converting(folder, 1, given.quantizer),
                "two processes": converting(folder, 2, given.quantizer),
            }
            print(f"round {number + 1}: " + ", ".join(f"{k} {v:.2f} s" for k, v in seconds.items()))
            rounds.append(seconds)
    medians = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    allowed = 2 * medians["one loop"] / medians["two loops"]
    gained = medians["one process"] / medians["two processes"]
    figures = {"loops": allowed, "conversion": gained, "ratio": gained / allowed}
    print(json.dumps({**medians, **figures}, indent=1))


def make_checkpoint(folder: Path) -> None:
    """A random Llama with the demo's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(SEED)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            num_hidden_layers=LAYERS,
            num_attention_heads=8,
            max_position_embeddings=SEQLEN,
            tie_word_embeddings=False,
        )
    ).save_pretrained(folder)


def loop() -> float:
    """Seconds of the loop of matrix products."""
    left = torch.ones(SIZE, SIZE)
    left @ left
    start = time.perf_counter()
    for _ in range(PRODUCTS):
        left @ left
    return time.perf_counter() - start


def convert(folder: Path, quantizer: str) -> float:
    """Seconds of a conversion in the processes that a launcher started, seen from this one."""
    ranks = join("cpu")
    options = ConvertOptions(
        model=str(folder / "llama"),
        dataset=(str(DEMO / "calib.txt"),),
        quantizer=quantizer,  # type: ignore[arg-type]
        layer_steps=20,
        nsamples=ROWS,
        seqlen=SEQLEN,
        steps=STEPS,
        val_every=STEPS,
        batch_size=BATCH,
        device="cpu",
        output_dir=folder / f"out-{ranks.count}-{time.time_ns() if ranks.first else 0}",
    )
    options = ranks.of_first(options)
    report = SilentReporter()
    ranks.wait()
    start = time.perf_counter()
    pipeline.convert(pipeline.prepare(options, report, ranks), report)
    seconds = time.perf_counter() - start
    return max(ranks.gather(seconds))


def loops(count: int) -> float:
    """The longest of so many loops at once."""
    running = [start("loop") for _ in range(count)]
    return max(float(each.communicate()[0]) for each in running)


def converting(folder: Path, count: int, quantizer: str) -> float:
    """A conversion in so many processes."""
    words = ("convert", "--folder", str(folder), "--quantizer", quantizer)
    out = start(*words, count=count).communicate()[0]
    return float(out.split()[0])


def start(part: str, *words: str, count: int = 1) -> "subprocess.Popen[str]":
    """This program's own `part`, in `count` processes of one thread."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    return subprocess.Popen(
        [sys.executable, *(launcher if count > 1 else []), __file__, "--part", part, *words],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
    )


if __name__ == "__main__":
    main()
