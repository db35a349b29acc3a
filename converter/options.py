"""What a user can ask of a conversion, checked before anything else happens.

Imports no torch, so that a wrong option is refused at once.
"""

from __future__ import annotations

import fnmatch
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from rilq.errors import OptionError
from rilq.formats.spec import BITS, GROUP_SIZES, QuantSpec

AdapterKind = Literal["pooled", "lora"]
AdapterInit = Literal["zero", "loftq", "eora"]
Clip = Literal["none", "search"]
Tier = Literal["dense", "packed"]
DEFAULT_CLIP: dict[str, Clip] = {"rtn": "none", "gptq": "search"}
QUANTIZERS = tuple(DEFAULT_CLIP)

DEFAULT_ROWS = 320  # rows of the paper's calibration set
DEFAULT_SEQLEN = 512


@dataclass(frozen=True)
class ConvertOptions:
    """The options of `rilq convert` and `rilq plan`; see the README for what each means.

    `None` means that the value is chosen from the model or the machine; what was chosen is printed,
    and kept when a stopped job continues.
    """

    model: str
    revision: str | None = None
    # the base
    bits: int = 2
    group_size: int = 64
    quantizer: str = "gptq"
    clip: Clip | None = None
    zero_point: Literal["real", "integer"] = "real"
    skip: tuple[str, ...] = ()
    bits_for: tuple[tuple[str, int], ...] = ()
    # calibration
    dataset: tuple[str, ...] = ("c4",)
    text_key: str = "text"
    rows: Literal["packed", "documents"] = "packed"
    nsamples: int | None = None
    seqlen: int | None = None
    val_ratio: float = 0.2
    seed: int = 42
    # the adapters
    rank: int = 16
    alpha: float = 16.0
    adapter: AdapterKind = "pooled"
    adapter_init: AdapterInit = "zero"
    learning_rate: float | None = None
    steps: int = 100
    batch_size: int = 8
    val_every: int = 25
    patience: int = 5
    # the machine
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    student: Tier | Literal["auto"] = "auto"
    # the output
    max_shard_size: str = "5GB"
    output_dir: Path | None = None
    work_dir: Path | None = None
    resume: Literal["auto", "never", "required"] = "auto"
    keep_work: bool = False

    def __post_init__(self) -> None:
        _check(self)

    @property
    def output(self) -> Path:
        """The output folder: as given, or `<model>-w<bits>g<group size>-rilq` here."""
        if self.output_dir is not None:
            return self.output_dir
        name = Path(self.model).resolve().name if Path(self.model).exists() else self.model
        return Path(f"{name.rpartition('/')[2]}-w{self.bits}g{self.group_size}-rilq")

    @property
    def work(self) -> Path:
        """The work folder: as given, or beside the output."""
        return self.work_dir or self.output.with_name(self.output.name + ".rilq-work")

    def spec_for(self, name: str) -> QuantSpec | None:
        """How the linear `name` is quantized; None if it stays as it is."""
        if any(matches(pattern, name) for pattern in self.skip):
            return None
        bits = self.bits
        for pattern, value in self.bits_for:
            if matches(pattern, name):
                bits = value
        return QuantSpec(bits, self.group_size, self.zero_point)

    def recipe(self) -> dict[str, Any]:
        """Every option that has an effect on the result, as JSON values without any path."""
        without = {
            "model", "revision", "dataset", "output_dir", "work_dir", "resume", "keep_work",
            "device", "dtype", "student",
        }  # fmt: skip
        values = {k: v for k, v in asdict(self).items() if k not in without}
        values["bits_for"] = dict(self.bits_for)
        values["skip"] = list(self.skip)
        return values


def matches(pattern: str, name: str) -> bool:
    """Whether a shell-style pattern names a module: its full name or its last dotted parts.

    `down_proj`, `mlp.*` and `model.layers.0.*` all match `model.layers.0.mlp.down_proj`.
    """
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[i:]), pattern) for i in range(len(parts)))


def _check(options: ConvertOptions) -> None:
    """Raises OptionError, naming every impossible value at once."""
    o = options
    problems = []
    allowed: dict[str, tuple[object, ...]] = {
        "bits": BITS,
        "group_size": GROUP_SIZES,
        "quantizer": QUANTIZERS,
        "clip": (None, "none", "search"),
        "zero_point": ("real", "integer"),
        "rows": ("packed", "documents"),
        "adapter": ("pooled", "lora"),
        "adapter_init": ("zero", "loftq", "eora"),
        "dtype": ("auto", "float32", "bfloat16", "float16"),
        "student": ("auto", "dense", "packed"),
        "resume": ("auto", "never", "required"),
    }
    for key, values in allowed.items():
        if getattr(o, key) not in values:
            names = ", ".join(str(v) for v in values if v is not None)
            problems.append(f"{flag(key)} {getattr(o, key)}: expected one of {names}")
    least = {"nsamples": 2, "seqlen": 2, "steps": 1, "batch_size": 1, "val_every": 1, "patience": 1}
    for key, low in least.items():
        if getattr(o, key) is not None and getattr(o, key) < low:
            problems.append(f"{flag(key)} {getattr(o, key)}: expected at least {low}")
    if o.rank < 0:
        problems.append(f"--rank {o.rank}: expected 0 (no adapters) or more")
    if o.adapter_init != "zero" and o.rank == 0:
        problems.append(f"--adapter-init {o.adapter_init}: needs adapters; pass --rank above 0")
    if not 0 < o.val_ratio < 1:
        problems.append(f"--val-ratio {o.val_ratio}: expected between 0 and 1")
    if not 0 < o.alpha < float("inf"):
        problems.append(f"--alpha {o.alpha}: expected a positive number")
    if o.learning_rate is not None and not 0 < o.learning_rate < float("inf"):
        problems.append(f"--lr {o.learning_rate}: expected a positive number")
    if not o.dataset:
        problems.append("--dataset: expected at least one")
    for pattern, bits in o.bits_for:
        if bits not in BITS:
            problems.append(f"--bits-for {pattern}={bits}: expected one of {BITS}")
    if problems:
        raise OptionError("\n".join(problems))


def flag(field_name: str) -> str:
    """The command line's name of an option."""
    assert field_name in {f.name for f in fields(ConvertOptions)}, field_name
    return {"learning_rate": "--lr"}.get(field_name, "--" + field_name.replace("_", "-"))
