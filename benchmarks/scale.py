#!/usr/bin/env python3
"""How memory and time of `rilq convert` grow, and whether the plan knows (docs/scale.md).

On a CPU, with random checkpoints of LLaMA-2-70B's structure (scale_checkpoint.py), one thread:

  limit     80 layers are converted under a limit of the interpreter's own, measured in the same
            run, and a quarter of the checkpoint: on private memory (the process is killed where
            more is seen), and on private address space (RLIMIT_DATA)
  growth    processor time and resident memory with layers, rows and hidden size, and the exponents
            that fit them
  plan      what `rilq plan` says of each of these conversions, against what was measured

    python benchmarks/scale.py                      # some twenty minutes
    python benchmarks/scale.py --rounds 3           # medians of three
    python benchmarks/scale.py --quick              # four minutes, with 20 layers at most
    python benchmarks/scale.py --only limit
    python benchmarks/scale.py --gpu [--dry]        # LLaMA-2-70B's own shapes: scale_gpu.py
"""

import argparse
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from scale_checkpoint import LAYERS, SEED, llama_config, write_checkpoint, write_mixture
from scale_run import Watched, convert, watch

import rilq

SEQLEN = 128
IMPORTS = "from rilq import cli\nimport rilq.converter.pipeline"
SHARE = 4  # of a checkpoint, one part is the memory that it is converted in
STREAM = ("--quantizer", "gptq", "--clip", "none", "--train", "none")
TRAIN = (
    *("--quantizer", "gptq", "--clip", "none", "--steps", "4", "--batch-size", "2"),
    *("--val-every", "2", "--rank", "16"),
)

# The default quantizer and training, with a fraction of their updates.
DEFAULT = ("--layer-steps", "40", "--steps", "8", "--val-every", "4")

# Rank 8: at rank 16 the adapters' state of 80 layers takes more than a quarter of so narrow ones.
LIMITED = (
    *("--quantizer", "rtn", "--clip", "none", "--steps", "2", "--batch-size", "1"),
    *("--val-every", "2", "--rank", "8"),
)


@dataclass(frozen=True)
class Size:
    """A checkpoint and the calibration rows that run through it; 0 experts for a plain Llama."""

    hidden: int
    layers: int
    rows: int
    experts: int = 0


@dataclass(frozen=True)
class Measured:
    """One conversion above the interpreter's own, beside what the plan said of it.

    Attributes:
        resident_bytes: mapped shards among them; as the plan counts them, above an interpreter
            that has imported everything and done nothing.
    """

    what: str
    size: Size
    checkpoint_bytes: int
    cpu_seconds: float
    private_bytes: int
    resident_bytes: int
    disk_bytes: int
    read_bytes: int
    planned_seconds: float
    planned_resident_bytes: int
    planned_disk_bytes: int
    planned_read_bytes: int
    time_basis: str


@dataclass(frozen=True)
class Course:
    """Conversions that differ in one size; all others are those of `base`."""

    name: str
    base: Size
    values: tuple[int, ...]

    def sizes(self) -> Iterator[Size]:
        """The sizes, in order."""
        for value in self.values:
            yield Size(**{**asdict(self.base), self.name: value})


# Few rows where layers are counted, so that what each layer takes by itself is most of the time.
COURSES = (
    Course("layers", Size(256, 0, 4), (10, 20, 40, 80)),
    Course("rows", Size(256, 3, 0), (16, 64, 256)),
    Course("hidden", Size(0, 3, 8), (256, 512, 1024)),
)
QUICK = (
    Course("layers", Size(256, 0, 4), (5, 10, 20)),
    Course("rows", Size(256, 3, 0), (16, 32, 64)),
    Course("hidden", Size(0, 3, 8), (256, 512, 768)),
)
PLANNED = Size(512, 4, 32)
MIXTURE = Size(512, 2, 32, experts=8)
DEEP = Size(256, 40, 4)  # what each layer leaves as holes in the heap adds up
PARTS = ("limit", "layers", "rows", "hidden", "plan")


def main() -> None:
    """Run the measurements, print tables, and write them all as JSON and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller sizes")
    parser.add_argument("--rounds", type=int, default=1, help="of each conversion")
    parser.add_argument("--only", choices=PARTS, action="append", help="a part; repeatable")
    parser.add_argument("--gpu", action="store_true", help="LLaMA-2-70B's shapes on a GPU")
    parser.add_argument("--dry", action="store_true", help="with --gpu: tiny shapes on a CPU")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written")
    parser.add_argument("--json", type=Path, help="file for all results")
    parser.add_argument("--plot", type=Path, help="PNG of the growth")
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    results: dict[str, Any] = {"machine": machine(), "seed": SEED}
    print(", ".join(f"{name} {value}" for name, value in machine().items()), f"seed {SEED}")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        if args.gpu:
            import scale_gpu

            results |= scale_gpu.measure(Path(folder), dry=args.dry)
        else:
            results |= measure(Path(folder), args.only or PARTS, args.quick, args.rounds)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    if args.plot and results.get("growth"):
        plot(results, args.plot)


def machine() -> dict[str, str]:
    """What figures depend on."""
    name = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": f"{name}, {os.cpu_count()} cores",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "rilq": rilq.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def measure(folder: Path, parts: Sequence[str], quick: bool, rounds: int) -> dict[str, Any]:
    """The CPU's parts."""
    bench = Bench(folder, rounds)
    own = bench.own
    print(
        f"\nthe interpreter's own, with a minimal conversion: {own.cpu_seconds:.1f} s, "
        f"{own.private_bytes / 1e6:.0f} MB private, {own.data_bytes / 1e6:.0f} MB of address "
        f"space; imports alone {bench.imports.resident_bytes / 1e6:.0f} MB resident",
        flush=True,
    )
    results: dict[str, Any] = {
        "rounds": rounds,
        "own": {"cpu_seconds": own.cpu_seconds, "private_bytes": own.private_bytes,
                "data_bytes": own.data_bytes, "resident_bytes": own.resident_bytes,
                "imports": bench.imports.resident_bytes},
        "growth": {}, "exponents": {}, "planned": [],
    }  # fmt: skip
    if "limit" in parts:
        size = Size(512, 20 if quick else LAYERS, 4)
        limits = ("private_limit", "data_limit")
        results["limit"] = [bench.limited(size, kind) for kind in limits]
    every = []
    for course in QUICK if quick else COURSES:
        if course.name in parts:
            found = [bench.measured("streaming", size, STREAM) for size in course.sizes()]
            results["growth"][course.name] = [asdict(m) for m in found]
            results["exponents"][course.name] = exponents(course.name, found)
            print_growth(course.name, found)
            every += found
    if "plan" in parts:
        every += list(planned(bench, quick))
    results["planned"] = [asdict(m) for m in every]
    print_plan(every)
    return results


def planned(bench: "Bench", quick: bool) -> Iterator[Measured]:
    """Conversions of all tiers and quantizers of one size, for the plan alone."""
    yield bench.measured("gptq", PLANNED, STREAM)
    for tier in ("packed",) if quick else ("dense", "packed", "offload"):
        options = (*TRAIN, "--student", tier, "--train", "adapters")
        yield bench.measured(f"gptq, training {tier}", PLANNED, options)
    if not quick:
        # Of few rows it takes no longer than what is subtracted varies.
        more = replace(PLANNED, rows=128)
        yield bench.measured("rtn", more, ("--quantizer", "rtn", "--train", "none"))
        yield bench.measured("default", PLANNED, DEFAULT)
        yield bench.measured("default, rotated", PLANNED, (*DEFAULT, "--rotate"))
        yield bench.measured("default, 2.5 bits", PLANNED, (*DEFAULT, "--avg-bits", "2.5"))
        for quantizer in ("signround", "lwc"):
            options = (*DEFAULT, "--quantizer", quantizer)
            yield bench.measured(quantizer, PLANNED, options)
        yield bench.measured("mixture, gptq", MIXTURE, STREAM)
        yield bench.measured("mixture, default", MIXTURE, DEFAULT)
        yield bench.measured("resq", PLANNED, ("--method", "resq"))
        for tier in ("dense", "packed", "offload"):
            options = (*TRAIN, "--student", tier, "--train", "adapters")
            yield bench.measured(f"gptq, training {tier}", DEEP, options)
        shorter = ("--layer-steps", "4", "--steps", "4", "--val-every", "2")
        yield bench.measured("default, shorter", DEEP, shorter)


class Bench:
    """Conversions in one folder.

    Attributes:
        imports: of the interpreter that has imported everything; the plan counts memory above it.
        own: of a conversion of two narrow layers, the median of three: the interpreter, imports,
            torch's own memory, the page in the end. Time and memory limits are above it.
        rounds: of each conversion; times are medians, memory and disk the most.
    """

    def __init__(self, folder: Path, rounds: int) -> None:
        self.folder, self.rounds = folder, rounds
        self.imports = watch([sys.executable, "-c", IMPORTS])
        smallest = Size(256, 2, 2)
        self._checkpoint(smallest)  # writes it: the first conversion reads from the page cache too
        runs = [self._convert(smallest, STREAM, seqlen=16) for _ in range(3)]
        assert all(run.told["output"] for run in runs)
        self.own = sorted(runs, key=lambda run: run.cpu_seconds)[1]

    def measured(self, what: str, size: Size, options: tuple[str, ...]) -> Measured:
        """One conversion, above the interpreter's own."""
        model = self._checkpoint(size)
        took = [self._convert(size, options) for _ in range(self.rounds)]
        print(f"{what}, {size}: done", file=sys.stderr, flush=True)
        plans = [each.told["plan"] for each in took]
        plan = plans[0]
        return Measured(
            what,
            size,
            _size(model),
            statistics.median(each.cpu_seconds for each in took) - self.own.cpu_seconds,
            max(each.private_bytes for each in took) - self.own.private_bytes,
            max(each.resident_bytes for each in took) - self.imports.resident_bytes,
            max(each.disk_bytes for each in took),
            took[0].told["bytes_read"],
            statistics.median(each["seconds"] for each in plans),
            plan["host_bytes"],
            sum(disk["needed"] for disk in plan["disks"]),
            plan["read_bytes"],
            plan["time_basis"],
        )

    def limited(self, size: Size, kind: str) -> dict[str, Any]:
        """A whole conversion, training included, in a quarter of the checkpoint's size.

        Args:
            kind: "data_limit" or "private_limit", see `scale_run.watch`.
        """
        model = self._checkpoint(size)
        room = _size(model) // SHARE
        options = (*LIMITED, "--student", "offload", "--train", "adapters", "--micro-batch", "1")
        took = self._convert(
            size, options, **{kind: getattr(self.own, kind.replace("limit", "bytes")) + room}
        )
        said = took.err.strip().splitlines() or [f"killed ({took.code})"]
        ended = "converted" if took.code == 0 else f"failed: {said[0]}"
        print(
            f"limit: {size.layers} layers of hidden size {size.hidden}, "
            f"{_size(model) / 1e6:.0f} MB, under a {kind} of the interpreter's own and "
            f"{room / 1e6:.0f} MB: {ended} in {took.cpu_seconds:.0f} s; most seen "
            f"{(took.data_bytes - self.own.data_bytes) / 1e6:.0f} MB of address space, "
            f"{(took.private_bytes - self.own.private_bytes) / 1e6:.0f} MB of private memory",
            flush=True,
        )
        return {
            "kind": kind,
            "size": asdict(size),
            "checkpoint_bytes": _size(model),
            "limit_bytes": room,
            "code": took.code,
            "cpu_seconds": took.cpu_seconds,
            "data_bytes": took.data_bytes - self.own.data_bytes,
            "private_bytes": took.private_bytes - self.own.private_bytes,
            "error": took.err if took.code else "",
        }

    def _convert(
        self,
        size: Size,
        options: tuple[str, ...],
        seqlen: int = SEQLEN,
        **limits: int,
    ) -> Watched:
        model = self._checkpoint(size)
        with tempfile.TemporaryDirectory(dir=self.folder) as out:
            return convert(
                model,
                Path(out) / "out",
                *options,
                rows=size.rows,
                seqlen=seqlen,
                **limits,
            )

    def _checkpoint(self, size: Size) -> Path:
        """A checkpoint of that size, written once."""
        path = self.folder / "-".join(map(str, asdict(size).values()))
        tokens = 2 * size.rows * SEQLEN
        if path.exists():
            return path
        if size.experts:
            sizes = (size.hidden, size.layers, size.experts)
            write_mixture(path, *sizes, tokens, positions=SEQLEN)
        else:
            write_checkpoint(path, llama_config(size.hidden, size.layers, positions=SEQLEN), tokens)
        return path


def _size(model: Path) -> int:
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))


# -- growth ----------------------------------------------------------------------------------------


def exponents(name: str, course: list[Measured]) -> dict[str, float]:
    """How time and memory grow with a size.

    Memory by the slope of logarithms. Time beside a constant: what is subtracted from it is known
    to a second only, which is much of the smallest sizes' time.
    """
    sizes = [getattr(m.size, name) for m in course]
    return {
        "cpu_seconds": exponent_beside_constant(sizes, [m.cpu_seconds for m in course]),
        "resident_bytes": exponent(sizes, [m.resident_bytes for m in course]),
    }


def exponent(sizes: list[int], values: list[float]) -> float:
    """`p` of the `c * size^p` that fits best."""
    xs, ys = [math.log(s) for s in sizes], [math.log(v) for v in values]
    middle = sum(xs) / len(xs)
    return sum((x - middle) * y for x, y in zip(xs, ys, strict=True)) / sum(
        (x - middle) ** 2 for x in xs
    )


def exponent_beside_constant(sizes: list[int], values: list[float]) -> float:
    """`p` of the `a + c * size^p` that fits best, from 0.05 to 4."""
    assert len(sizes) > 2, "through two points goes every such curve"

    def apart(power: float) -> float:
        ones = torch.ones(len(sizes), dtype=torch.float64)
        columns = torch.stack([ones, torch.tensor(sizes, dtype=torch.float64) ** power], 1)
        wanted = torch.tensor(values, dtype=torch.float64)[:, None]
        found = torch.linalg.lstsq(columns, wanted).solution
        return float((columns @ found - wanted).square().sum())

    return min((step / 100 for step in range(5, 401)), key=apart)


def print_growth(name: str, course: list[Measured]) -> None:
    """One table."""
    print(f"\n| {name} | checkpoint MB | processor s | memory MB |\n|---|---|---|---|")
    for m in course:
        print(
            f"| {getattr(m.size, name)} | {m.checkpoint_bytes / 1e6:.0f} | {m.cpu_seconds:.1f} | "
            f"{m.resident_bytes / 1e6:.0f} |"
        )
    found = exponents(name, course)
    print(
        f"| exponent | | {found['cpu_seconds']:.2f} | {found['resident_bytes']:.2f} |", flush=True
    )


def plot(results: dict[str, Any], path: Path) -> None:
    """Time against each size on linear axes, memory on logarithmic ones."""
    import matplotlib

    matplotlib.use("Agg")  # no display
    from matplotlib import pyplot

    courses = results["growth"]
    figure, axes = pyplot.subplots(
        2, len(courses), figsize=(3.4 * len(courses), 5.5), sharey="row", squeeze=False
    )
    kinds: list[tuple[str, str, Callable[[dict[str, Any]], float]]] = [
        ("cpu_seconds", "processor time, s", lambda m: m["cpu_seconds"]),
        ("resident_bytes", "memory, MB", lambda m: m["resident_bytes"] / 1e6),
    ]
    for row, (kind, label, value) in zip(axes, kinds, strict=True):
        for axis, (name, course) in zip(row, courses.items(), strict=True):
            sizes = [m["size"][name] for m in course]
            fitted = results["exponents"][name][kind]
            draw = axis.plot if kind == "cpu_seconds" else axis.loglog
            draw(sizes, [value(m) for m in course], "o-", label=f"exponent {fitted:.2f}")
            axis.set_xlabel(name)
            axis.set_xticks(sizes, [str(size) for size in sizes])
            axis.xaxis.minorticks_off()
            axis.legend()
        row[0].set_ylabel(label)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


# -- the plan --------------------------------------------------------------------------------------


def print_plan(every: list[Measured]) -> None:
    """Planned over measured, for each conversion."""
    print(
        "\n| conversion | hidden | layers | rows | memory: planned, measured MB | | disk: planned, "
        "measured MB | | read | time: planned, measured s | |\n|" + "---|" * 11
    )
    for m in every:
        cells = [
            *(m.what, m.size.hidden, m.size.layers, m.size.rows),
            *_compared(m.planned_resident_bytes / 1e6, m.resident_bytes / 1e6),
            *_compared(m.planned_disk_bytes / 1e6, m.disk_bytes / 1e6),
            f"{m.planned_read_bytes / m.read_bytes:.3f} x",
            *_compared(m.planned_seconds, m.cpu_seconds),
        ]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def _compared(planned: float, measured: float) -> tuple[str, str]:
    return f"{planned:.1f}, {measured:.1f}", f"{planned / measured:.2f} x"


if __name__ == "__main__":
    main()
