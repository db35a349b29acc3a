#!/usr/bin/env python3
"""ResQ, its baselines and its ablation on one or more models: perplexity and average bits.

    python benchmarks/resq.py                                  # the demo's model
    python benchmarks/resq.py --models DIR DIR --json FILE     # it and others
    python benchmarks/resq.py --seeds 42 43 44 --only resq quarot

Every method is run as a user runs it: `rilq.convert`, then `rilq.evaluate` on held-out text, with
the same calibration rows and the same windows. The gap counts in nats per token, from QuaRot (0) to
full precision (1); with several seeds the nats are averaged, and the table says how far apart they
lie. `--dataset` and `--text` name the texts of a model that `accuracy.py` does not know.
"""

import argparse
import json
import math
import os
import platform
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accuracy import DATA, DEMO, DEMO_MODEL

import rilq

FULL, QUAROT = "full precision", "quarot"

# The options that make each; of full precision, none.
RUNS: dict[str, dict[str, Any]] = {
    FULL: {},
    "rtn-w4a4": {"method": "rtn-w4a4"},
    "quik": {"method": "quik"},
    QUAROT: {"method": "quarot"},
    "resq": {"method": "resq"},
    "resq, 4 bits on average": {"method": "resq", "lowest_bits": 2, "high_bits": 6},
    "resq without U_A": {"method": "resq", "rotations": "BCD"},
    "resq without U_B, U_C": {"method": "resq", "rotations": "AD"},
    "resq without U_D": {"method": "resq", "rotations": "ABC"},
    "resq, LoRA of rank 16": {"method": "resq", "rank": 16},
}


@dataclass(frozen=True)
class Rows:
    """What a model is calibrated and measured on."""

    dataset: Path
    text: Path
    nsamples: int
    seqlen: int


@dataclass(frozen=True)
class Result:
    """One method on one model.

    Attributes:
        nats: of each seed, the logarithm of the perplexity.
        weight_bits, activation_bits, cache_bits: as `rilq eval` says them.
        seconds: of the processor, for a conversion and its evaluation; the most.
    """

    method: str
    nats: tuple[float, ...]
    weight_bits: float
    activation_bits: float
    cache_bits: float
    seconds: float

    @property
    def mean(self) -> float:
        return sum(self.nats) / len(self.nats)

    def gap(self, results: dict[str, "Result"]) -> float | None:
        """The part of the way from QuaRot to full precision that it goes."""
        if not {FULL, QUAROT} <= results.keys():
            return None
        worst = results[QUAROT].mean
        return (worst - self.mean) / (worst - results[FULL].mean)


def main() -> None:
    args = parse_arguments()
    facts = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, device {args.device}",
        "versions": f"python {platform.python_version()}, torch {version('torch')}, "
        f"transformers {version('transformers')}, rilq {version('rilq')}",
        "seeds": args.seeds,
    }
    print("\n".join(f"{key}: {value}" for key, value in facts.items()))
    found: dict[str, Any] = {}
    for model in args.models:
        rows = rows_of(model, args)
        print(f"\n{heading(model.name if model != DEMO_MODEL else 'demo', rows)}", flush=True)
        results: dict[str, Result] = {}
        for method in RUNS:
            if args.only and method not in args.only and method != FULL:
                continue
            results[method] = measured(method, model, rows, args)
            print(line(results[method], results), flush=True)
            found[str(model)] = {
                "rows": {key: str(value) for key, value in asdict(rows).items()},
                "results": [
                    {**asdict(each), "perplexity": math.exp(each.mean), "gap": each.gap(results)}
                    for each in results.values()
                ],
            }
            if args.json:
                args.json.write_text(json.dumps({"facts": facts, "models": found}, indent=2))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", type=Path, nargs="+", default=[DEMO_MODEL], help="folders")
    add("--dataset", type=Path, help="calibration text, of all models")
    add("--text", type=Path, help="held-out text, of all models")
    add("--nsamples", type=int, default=64, help="calibration rows")
    add("--seqlen", type=int, default=256, help="of calibration rows and of evaluation windows")
    add("--seeds", type=int, nargs="+", default=[42])
    add("--only", nargs="+", metavar="METHOD", choices=RUNS, help="besides full precision")
    add("--device", default="cpu")
    add("--json", type=Path, metavar="FILE", help="also write all figures there")
    args = parser.parse_args()
    args.models = [model.resolve() for model in args.models]
    return args


def rows_of(model: Path, args: argparse.Namespace) -> Rows:
    """The texts of a model that `accuracy.py` knows, unless others are asked for."""
    data = DATA.get(model.name, DEMO)
    base = DEMO_MODEL if data is DEMO else model
    return Rows(
        (args.dataset or base / data.dataset).resolve(),
        (args.text or base / data.text).resolve(),
        args.nsamples,
        args.seqlen,
    )


def measured(method: str, model: Path, rows: Rows, args: argparse.Namespace) -> Result:
    """Convert with each seed, and evaluate."""
    evaluations, seconds = [], []
    for seed in args.seeds[:1] if method == FULL else args.seeds:
        with tempfile.TemporaryDirectory(prefix="rilq-resq-") as folder:
            begun = time.process_time()
            subject = model
            if method != FULL:
                subject = Path(folder) / "out"
                rilq.convert(
                    model,
                    dataset=rows.dataset,
                    nsamples=rows.nsamples,
                    seqlen=rows.seqlen,
                    seed=seed,
                    device=args.device,
                    output_dir=subject,
                    db="none",
                    **RUNS[method],
                )
            evaluations.append(
                rilq.evaluate(
                    str(subject),
                    str(rows.text),
                    seqlen=rows.seqlen,
                    device=args.device,
                    speed=False,
                    db="none",
                )
            )
            seconds.append(time.process_time() - begun)
    first = evaluations[0]
    return Result(
        method,
        tuple(math.log(each.perplexity) for each in evaluations),
        first.bits_per_weight or 16.0,
        first.activation_bits,
        first.cache_bits,
        max(seconds),
    )


def heading(name: str, rows: Rows) -> str:
    return (
        f"{name}: {rows.nsamples} x {rows.seqlen} calibration tokens of {rows.dataset.name}, "
        f"evaluated on {rows.text.name}\n\n"
        "| method | bits: weights | activations | cache | perplexity | gap closed | CPU s |\n"
        "|---|---|---|---|---|---|---|"
    )


def line(result: Result, results: dict[str, Result]) -> str:
    gap = result.gap(results)
    spread = max(result.nats) - min(result.nats)
    perplexity = f"{math.exp(result.mean):.3f}" + (
        f" ± {math.exp(result.mean) * spread / 2:.3f}" if len(result.nats) > 1 else ""
    )
    return (
        f"| {result.method} | {result.weight_bits:.2f} | {result.activation_bits:.2f} "
        f"| {result.cache_bits:.2f} | {perplexity} | {'' if gap is None else f'{gap:.2f}'} "
        f"| {result.seconds:.0f} |"
    )


if __name__ == "__main__":
    main()
