#!/usr/bin/env python3
"""What 2 bits cost and what each tool wins back: ours and its peers on one checkpoint, one table.

Every method gets the same calibration rows, the same number of threads and the same evaluation:
`rilq eval` over our own checkpoint, or over the dense weights that a peer's output dequantizes to.
Each peer runs in a virtual environment of its own, which this script makes (`--envs`); one that
cannot be made or run is listed with the reason.

    python benchmarks/accuracy.py                                # the demo's model, everything
    python benchmarks/accuracy.py --model DIR --quick            # ours, AutoRound, MLX rounding
    python benchmarks/accuracy.py --model DIR --only "hqq*"      # these again, the rest as saved

The gap counts from plain rounding at our group size (0) to full precision (1), in nats, on the
calibration's own domain. KL divergence and top-1 agreement are with full precision's predictions
there. Wall time is the whole command, imports included. Options that this script does not know go
to every `rilq convert`.
"""

import argparse
import fnmatch
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accuracy_report import FULL, PLAIN, Result, Table, draw, read_table, save
from accuracy_run import NotRun, llama_quantize_of, python_of, run

ROOT = Path(__file__).resolve().parent.parent
PEERS = Path(__file__).resolve().parent / "peers"
DEMO_MODEL = ROOT / "examples/demo/model"
SEED = 42
OTHER_CHARACTERS = 200_000  # of a text of another domain; that of the own domain is read whole
SEPARATOR = "\n<|endoftext|>\n"  # between the documents of some plain text files

# Our runs: the options that make each.
OURS: dict[str, tuple[str, ...]] = {
    PLAIN: ("--quantizer", "rtn", "--rank", "0"),
    "RTN, clip search": ("--quantizer", "rtn", "--clip", "search", "--rank", "0"),
    "GPTQ": ("--quantizer", "gptq", "--rank", "0"),
    "blockap, no training after it": ("--rank", "0"),
    "fast": ("--recipe", "fast"),
    "default": (),
    "best": ("--recipe", "best"),
    "plain LoRA on clipped RTN, not merged": (
        "--quantizer", "rtn", "--clip", "search", "--adapter", "lora",
    ),
    "the paper's recipe": ("--recipe", "paper", "--rows", "packed"),  # on the rows of all others
}  # fmt: skip
QUICK_OURS = (PLAIN, "fast", "default")

TORCH = "torch==2.13.0"
# What each environment is made of; "rilq" is the one that runs this script.
ENVIRONMENTS: dict[str, tuple[str, ...]] = {
    "autoround": (TORCH, "auto-round==0.16.1", "transformers==5.24.0"),
    "mlx": (TORCH, "mlx[cpu]==0.32.4", "mlx-lm==0.32.2", "transformers==5.24.0"),
    "hqq": (TORCH, "hqq==0.2.8.post1", "transformers==5.24.0"),
    "gptqmodel": (TORCH, "gptqmodel==7.6.0", "transformers==5.24.0"),
    "llamacpp": (TORCH, "gguf==0.19.0", "transformers==5.24.0", "cmake==4.4.5", "ninja==1.13.2"),
}
LLAMA_CPP_SOURCE = "llama-cpp-python==0.3.36"


@dataclass(frozen=True)
class Peer:
    """A way to run another tool.

    Attributes:
        environment: a key of `ENVIRONMENTS`, or "rilq".
        script: of `benchmarks/peers`.
        options: of that script.
        zero_bits: a group's zero-point takes; None if the tool has no group size to choose.
        quick: is part of `--quick`.
    """

    environment: str
    script: str
    options: tuple[str, ...] = ()
    zero_bits: int | None = 16
    quick: bool = False


AUTOROUND = ("autoround", "run_autoround.py")
GPTQMODEL = ("gptqmodel", "run_gptqmodel.py")
MLX = ("mlx", "run_mlx.py")
LLAMA_CPP = ("llamacpp", "run_llamacpp.py")
PEER_RUNS: dict[str, Peer] = {
    "AutoRound": Peer(*AUTOROUND, zero_bits=2, quick=True),
    "AutoRound, NeUQI and extension": Peer(
        *AUTOROUND, ("--neuqi", "--extension"), zero_bits=2, quick=True
    ),
    "GPTQModel": Peer(*GPTQMODEL, zero_bits=2),
    "GPTQModel, clip search": Peer(*GPTQMODEL, ("--mse", "2.4"), zero_bits=2),
    "mlx-lm, rounding to nearest": Peer(*MLX, ("--method", "rtn"), quick=True),
    "mlx-lm GPTQ": Peer(*MLX, ("--method", "gptq")),
    "mlx-lm DWQ": Peer(*MLX, ("--method", "dwq")),
    # Its default rate of 1e-6 does next to nothing for models this small.
    "mlx-lm DWQ, rate 1e-3, 4 passes": Peer(
        *MLX, ("--method", "dwq", "--learning-rate", "1e-3", "--passes", "4")
    ),
    "HQQ": Peer("hqq", "run_hqq.py"),
    "llama.cpp Q2_K with importances": Peer(*LLAMA_CPP, ("--type", "Q2_K"), zero_bits=None),
    "llama.cpp IQ2_XS with importances": Peer(*LLAMA_CPP, ("--type", "IQ2_XS"), zero_bits=None),
    "control: full precision, trained": Peer("rilq", "run_control.py", zero_bits=None, quick=True),
}


@dataclass(frozen=True)
class Data:
    """Texts, as paths relative to the model's folder, and how many rows of them.

    Attributes:
        dataset: calibration text.
        text: held-out text of the same domain.
        others: texts of other domains.
        nsamples: calibration rows.
        group_size: of our runs.
        seqlen: of rows and evaluation windows.
    """

    dataset: str
    text: str
    others: tuple[str, ...]
    nsamples: int
    group_size: int
    seqlen: int = 256


DATA = {
    "stories260K-w192": Data(
        dataset="../../data/tinystories/sampled-calib.jsonl",
        text="../../data/tinystories/sampled-eval.jsonl",
        others=("../../data/tinystories/sample.txt", "../../data/wikitext-2/test.txt"),
        nsamples=120,
        group_size=32,
    ),
    "wikillama-1.4M": Data(
        dataset="../../data/wikitext-2/calib.txt",
        text="../../data/wikitext-2/test.txt",
        others=("../../data/tinyshakespeare/input.txt",),
        nsamples=320,
        group_size=64,
    ),
}
DEMO = Data("../calib.txt", "../heldout.txt", ("../../../LICENSE",), nsamples=320, group_size=64)


def main() -> None:
    """Run everything, print each result as it comes, save the report."""
    args, more = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="rilq-accuracy-") as folder:
        bench = Bench(args, more, Path(folder))
        table = bench.table
        print(table.heading(), flush=True)
        for name, group_size, peer in bench.runs():
            print(table.line(bench.result(name, group_size, peer)), flush=True)
            save(table, args.out)
    print(f"\nsaved: {args.out / 'accuracy.md'}; {draw(table, args.out)}")


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """The command line; what it leaves open comes from `DATA`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, default=DEMO_MODEL)
    add("--dataset", help="file with calibration text")
    add("--text", help="file with held-out text of the same domain")
    add("--other-text", nargs="+", help="files with texts of other domains")
    add("--seqlen", type=int, help="of calibration rows and of evaluation windows")
    add("--nsamples", type=int, help="calibration rows")
    add("--group-size", type=int, help="of our runs")
    add("--threads", type=int, default=2, help="of every tool")
    add("--quick", action="store_true", help="ours, AutoRound, MLX's rounding and the control")
    add("--only", nargs="+", metavar="PATTERN", help="measure these again, keep the other results")
    add("--envs", type=Path, default=Path("~/.cache/rilq-benchmarks"), help="peers' environments")
    add("--llama-cpp", action="store_true", help="build llama.cpp and run it")
    add("--out", type=Path, help="folder of the report (docs; accuracy-quick with --quick)")
    args, more = parser.parse_known_args()
    args.model, args.envs = args.model.resolve(), args.envs.expanduser().resolve()
    data = DATA.get(args.model.name, DEMO)
    base = DEMO_MODEL if data is DEMO else args.model
    args.dataset = Path(args.dataset or base / data.dataset).resolve()
    args.text = Path(args.text or base / data.text).resolve()
    others = args.other_text or [base / other for other in data.others]
    args.other_text = [Path(other).resolve() for other in others]
    for key in ("seqlen", "nsamples", "group_size"):
        setattr(args, key, getattr(args, key) or getattr(data, key))
    args.out = args.out or (Path("accuracy-quick") if args.quick else ROOT / "docs")
    return args, more


class Bench:
    """One model and its rows; makes each result and adds it to the table.

    Args:
        args: of the command line.
        more: options for every `rilq convert`.
        folder: for checkpoints and rows while they are needed.
    """

    def __init__(self, args: argparse.Namespace, more: list[str], folder: Path) -> None:
        self.args, self.more, self.folder = args, more, folder
        self.texts = [args.text, *(shortened(text, folder) for text in args.other_text)]
        self.rows = folder / "rows.safetensors"
        command = [sys.executable, PEERS / "rows.py", *self.data(), "--out", self.rows]
        finished = run([*command, "--model", args.model, "--seed", SEED], args.threads)
        self.digest = finished.output.strip()
        self.table = Table(
            model=args.model.name,
            texts=[f"{t.parent.name}/{t.name}" for t in (args.text, *args.other_text)],
            facts={
                "rows": f"{args.nsamples} x {args.seqlen} tokens of "
                f"{args.dataset.parent.name}/{args.dataset.name}",
                "digest of the rows": self.digest,
                "threads": args.threads,
                "machine": f"{platform.machine()}, {os.cpu_count()} cores, "
                f"load {os.getloadavg()[0]:.1f} at the start",
                "versions": f"python {platform.python_version()}, torch {version('torch')}, "
                f"transformers {version('transformers')}, rilq {version('rilq')}",
                "date": date.today().isoformat(),
                # What was not, is from an earlier run of which nothing but its results is kept.
                "measured in this run": ", ".join(args.only or ["all"]),
                "convert options": " ".join(more),
                "seed": SEED,
            },
            results={},
        )
        if args.only:
            self.table.results |= read_table(args.out, args.model.name)

    def data(self) -> list[object]:
        """The options that rows come from, the same for `rilq convert` and for the peers' rows."""
        a = self.args
        return ["--dataset", a.dataset, "--nsamples", a.nsamples, "--seqlen", a.seqlen]

    def runs(self) -> Iterator[tuple[str, int | None, Peer | None]]:
        """What to measure: name, group size, and the peer (None is ours)."""
        quick, only, ours = self.args.quick, self.args.only, self.args.group_size
        planned: list[tuple[str, int | None, Peer | None]] = [(FULL, None, None)]
        planned += [(name, ours, None) for name in OURS if not quick or name in QUICK_OURS]
        for name, peer in PEER_RUNS.items():
            if not quick or peer.quick:
                planned += [(name, size, peer) for size in group_sizes(peer, ours)]
        for name, size, peer in planned:
            wanted = not only or any(fnmatch.fnmatch(name, pattern) for pattern in only)
            if wanted or size is None and peer is None:
                yield name, size, peer

    def result(self, name: str, group_size: int | None, peer: Peer | None) -> Result:
        """Convert and evaluate; or say why not. The result is in the table then."""
        try:
            with tempfile.TemporaryDirectory(dir=self.folder) as folder:
                out = Path(folder) / "out"
                if name == FULL:
                    facts: dict[str, Any] = {"bits_per_weight": 16.0}
                    out = self.args.model
                elif peer is None:
                    facts = self.convert(OURS[name], group_size, out)
                else:
                    facts = self.run_peer(peer, group_size, out)
                result = Result(name=name, group_size=group_size, **facts, **self.evaluate(out))
        except NotRun as reason:
            result = Result(name=name, group_size=group_size, reason=str(reason))
        return self.table.add(result)

    def convert(
        self, options: tuple[str, ...], group_size: int | None, out: Path
    ) -> dict[str, Any]:
        """Run `rilq convert`; its stored bits with the adapter's, if one lies beside it."""
        command = [sys.executable, "-m", "rilq", "convert", self.args.model, *self.data()]
        command += ["--seed", SEED, "--group-size", group_size, *self.more, *options]
        finished = run([*command, "-o", out, "--no-report", "--json", "--quiet"], self.args.threads)
        said = json.loads((out / "rilq.json").read_text())
        if self.digest not in json.dumps(said):
            raise NotRun("it calibrated on other rows than the peers")
        return {**finished.costs(), "bits_per_weight": stored_bits(out)}

    def run_peer(self, peer: Peer, group_size: int | None, out: Path) -> dict[str, Any]:
        """Run a peer's script in its environment."""
        options: list[object] = ["--model", self.args.model, "--rows", self.rows, "--out", out]
        if group_size is not None:
            options += ["--group-size", group_size]
        home, python = self.args.envs / peer.environment, Path(sys.executable)
        if peer.environment == "llamacpp":
            self.check_llama_cpp_applies()
        if peer.environment != "rilq":
            python = python_of(home, ENVIRONMENTS[peer.environment])
        if peer.environment == "llamacpp":
            options += ["--llama-quantize", llama_quantize_of(home, python, LLAMA_CPP_SOURCE)]
        finished = run([python, PEERS / peer.script, *peer.options, *options], self.args.threads)
        return {**finished.costs(), **json.loads((out / "peer.json").read_text())}

    def check_llama_cpp_applies(self) -> None:
        """Raises NotRun unless its blocks of 256 weights fit the model, and it is wanted."""
        config = json.loads((self.args.model / "config.json").read_text())
        widths = sorted({config["hidden_size"], config["intermediate_size"]})
        if any(width % 256 for width in widths):
            raise NotRun(f"not applicable: rows of {widths} weights, not multiples of 256")
        if not self.args.llama_cpp:
            raise NotRun("it has to be built from source: pass --llama-cpp")

    def evaluate(self, out: Path) -> dict[str, Any]:
        """Perplexity on every text; KL and agreement on the first; the gap."""
        found = []
        for text in self.texts:
            command = [sys.executable, "-m", "rilq", "eval", out, "--text", text]
            command += ["--seqlen", self.args.seqlen, "--no-speed", "--json", "--quiet"]
            if text is self.texts[0] and out != self.args.model:
                command += ["--against", self.args.model]
            found.append(json.loads(run(command, self.args.threads).output))
        against = found[0]["against"] or {"kl_mean": 0.0, "top1_agreement": 1.0}
        return {
            "perplexities": [one["perplexity"] for one in found],
            "kl": against["kl_mean"],
            "top1": against["top1_agreement"],
        }


# ---- sizes and texts ----------------------------------------------------------------------------


def group_sizes(peer: Peer, ours: int) -> list[int | None]:
    """Our group size, and the one whose stored bits are nearest to ours and not below them."""
    if peer.zero_bits is None:
        return [None]
    stored = {size: 2 + (16 + peer.zero_bits) / size for size in (16, 32, 64, 128)}
    enough = [size for size, bits in stored.items() if bits >= 2 + 32 / ours]
    return list(dict.fromkeys([ours, max(enough)]))


def stored_bits(folder: Path) -> float:
    """Bits per weight of our checkpoint: codes, scales, zero-points, and the adapter's tensors."""
    weights = bits = 0
    for shard in folder.glob("*.safetensors"):
        tensors = header(shard)
        for name in tensors:
            if name.endswith(".weight_scale"):
                base = name.removesuffix(".weight_scale")
                sizes = {
                    part: tensors.get(f"{base}.{part}", 0) for part in ("weight", "zero_point")
                }
                weights += sizes["weight"] * 8 // 2  # 2-bit codes
                bits += 8 * (tensors[name] + sizes["weight"] + sizes["zero_point"])
    for file in folder.glob("adapter/*.safetensors"):
        bits += 8 * sum(header(file).values())
    return bits / weights


def header(file: Path) -> dict[str, int]:
    """Bytes of each tensor of a safetensors file."""
    with file.open("rb") as opened:
        found = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    found.pop("__metadata__", None)
    offsets = {name: tensor["data_offsets"] for name, tensor in found.items()}
    return {name: end - begin for name, (begin, end) in offsets.items()}


def shortened(text: Path, folder: Path) -> Path:
    """The beginning of a plain text, with a document per record where the file separates them."""
    if text.suffix == ".jsonl":
        return text
    beginning = text.read_text()[:OTHER_CHARACTERS]
    if SEPARATOR not in beginning:
        short = folder / f"{text.stem}.txt"
        short.write_text(beginning)
        return short
    records = [json.dumps({"text": document}) for document in beginning.split(SEPARATOR)]
    short = folder / f"{text.stem}.jsonl"
    short.write_text("\n".join(records))
    return short


if __name__ == "__main__":
    try:
        main()
    except NotRun as reason:  # of the rows: nothing can be measured
        raise SystemExit(str(reason)) from reason
