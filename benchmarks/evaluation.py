#!/usr/bin/env python3
"""Speed and memory of `rilq eval`, as ratios to something measured in the same run.

speed     streaming evaluation of a random Llama that fits in memory (hidden 1024, vocabulary
          8192, 8 layers, windows of 512 tokens) against a plain loop of transformers over the
          same rows, with the model loaded already; alone, and against itself as the base, where
          the plain loop has two models. Runs alternate; medians of processor and wall time
memory    peak of `rilq eval` above the interpreter's own, 32 layers against 8

  python benchmarks/evaluation.py                  # about ten minutes on 2 cores
  python benchmarks/evaluation.py --only memory
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from streaming import SEED, make_checkpoint, peak_of
from transformers import AutoModelForCausalLM

import rilq
from rilq.calib.dataset import evaluation_rows
from rilq.calib.sources import parse_source
from rilq.calib.tokenizer import load_tokenizer
from rilq.evaluation.perplexity import measure_texts
from rilq.formats.checkpoint import Checkpoint
from rilq.formats.source import LocalFolder

SEQLEN, BATCH = 512, 4  # the plain loop is given more than one window at a time: it is faster


def main() -> None:
    """Run the measurements and print one line each, then all as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("speed", "memory"))
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    print(
        f"machine: {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__} with "
        f"{torch.get_num_threads()} threads, transformers {transformers.__version__}, python "
        f"{platform.python_version()}, rilq {rilq.__version__}, seed {SEED}",
        flush=True,
    )
    results: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        text = folder / "letters.txt"
        letters = torch.randint(97, 123, (args.windows * SEQLEN,),
                                generator=torch.Generator().manual_seed(SEED))  # fmt: skip
        text.write_text("".join(map(chr, letters.tolist())))  # one token for each letter
        eight = make_checkpoint(folder, 8)
        if args.only in (None, "speed"):
            results |= measure_speed(eight, text, args.repeats)
        if args.only in (None, "memory"):
            results |= measure_memory(eight, make_checkpoint(folder, 32), text)
    print(json.dumps({name: float(f"{value:.4g}") for name, value in results.items()}))


# -- speed -----------------------------------------------------------------------------------------


def measure_speed(path: Path, text: Path, repeats: int) -> dict[str, float]:
    """Processor and wall time of streaming over the plain loop's, in turn."""
    tokenizer = load_tokenizer(Checkpoint.open(LocalFolder(path)))
    tokens = evaluation_rows(parse_source(str(text)), tokenizer, seqlen=SEQLEN).tokens
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for _ in range(2)
    ]
    results = compare(
        "alone",
        lambda: streamed(path, text, None),
        lambda: plain_loop(models[:1], tokens),
        repeats,
    )
    return results | compare(
        "against",
        lambda: streamed(path, text, str(path)),
        lambda: plain_loop(models, tokens),
        repeats,
    )


def compare(
    name: str, streaming: Callable[[], float], plain: Callable[[], float], repeats: int
) -> dict[str, float]:
    """Ratios of the medians of alternating runs, and how far the perplexities are apart."""
    times: dict[str, list[tuple[float, float]]] = {"streamed": [], "plain": []}
    found = {}
    for _ in range(repeats):
        for kind, work in (("streamed", streaming), ("plain", plain)):
            processor, wall, found[kind] = timed(work)
            times[kind].append((processor, wall))
            print(f"{name}: {kind} {processor:.1f} s processor, {wall:.1f} s", flush=True)
    results = {f"{name}_perplexity_difference": abs(found["streamed"] / found["plain"] - 1)}
    for number, kind in enumerate(("processor", "wall")):
        medians = [statistics.median(t[number] for t in times[k]) for k in ("streamed", "plain")]
        results[f"{name}_{kind}_over_plain"] = medians[0] / medians[1]
    return results


def streamed(path: Path, text: Path, against: str | None) -> float:
    """All of it: opening, tokens, files, scores."""
    options = {"seqlen": SEQLEN, "against": against, "device": "cpu"}
    ((found, _),) = measure_texts([str(path)], str(text), **options)
    return found.perplexity


@torch.no_grad()
def plain_loop(models: list[Any], tokens: torch.Tensor) -> float:
    """Perplexity of the first model; if there is a second one, KL and agreement with it too."""
    total = kl = 0.0
    agreeing = 0
    for batch in tokens.split(BATCH):
        logits = [model(batch, use_cache=False).logits[:, :-1].float() for model in models]
        own = logits[0].log_softmax(-1)
        losses = F.nll_loss(own.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
        total += losses.sum(dtype=torch.float64).item()
        for base in logits[1:]:
            expected = base.log_softmax(-1)
            kl += F.kl_div(own, expected, reduction="sum", log_target=True).item()
            agreeing += int((logits[0].argmax(-1) == base.argmax(-1)).sum())
    return float(torch.tensor(total / tokens[:, 1:].numel()).double().exp())


def timed(work: Callable[[], float]) -> tuple[float, float, float]:
    """Processor and wall seconds that a call takes, and what it gives."""
    begun, at = time.process_time(), time.perf_counter()
    found = work()
    return time.process_time() - begun, time.perf_counter() - at, found


# -- memory ----------------------------------------------------------------------------------------


def measure_memory(eight: Path, deep: Path, text: Path) -> dict[str, float]:
    """Peak above an interpreter that has imported everything, for both depths."""
    own, _ = peak_of([])
    results = {}
    for name, more in (("alone", False), ("against", True)):
        peaks = []
        for path in (eight, deep):
            command = ["eval", str(path), "--text", str(text), "--seqlen", str(SEQLEN)]
            if more:
                command += ["--against", str(path)]
            place = ["--work-dir", str(text.with_name("work"))]
            peak, _ = peak_of(
                [*command, *place, "--no-speed", "--quiet", "--json", "--resume", "never"]
            )
            peaks.append(peak - own)
            print(
                f"{name}, {path.name}: {peaks[-1] / 1e6:.0f} MB above the interpreter's "
                f"{own / 1e6:.0f} MB",
                flush=True,
            )
        results[f"{name}_memory_32_over_8_layers"] = peaks[1] / peaks[0]
    return results


if __name__ == "__main__":
    main()
