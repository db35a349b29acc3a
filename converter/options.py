"""What a user can ask of a conversion, checked before anything else happens.

Imports no torch, so that a wrong option is refused at once.
"""

from __future__ import annotations

import fnmatch
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from rilq.converter.resq import options as resq_options
from rilq.errors import OptionError
from rilq.formats.spec import BITS, EXPERTS, GROUP_SIZES, OUTER_BITS, QuantSpec

AdapterKind = Literal["pooled", "lora"]
AdapterInit = Literal["zero", "loftq", "eora"]
Clip = Literal["none", "search", "lsq"]
Tier = Literal["dense", "packed", "offload"]
Train = Literal["none", "adapters", "scales", "adapters+scales", "all", "all+codes"]
Target = Literal["post-norm", "pre-norm", "logits"]
Schedule = Literal["decay", "constant"]
# Every quantizer, and the grid that it starts from where none is asked for.
DEFAULT_CLIP: dict[str, Clip] = {
    "rtn": "none",
    "lsq": "lsq",
    "hqq": "none",
    "gptq": "lsq",
    "lwc": "none",
    "signround": "lsq",
    "blockap": "lsq",
}
QUANTIZERS = tuple(DEFAULT_CLIP)
OWN_GRID = ("lsq", "hqq", "lwc")  # these find their grid themselves: --clip says nothing to them
LAYER_QUANTIZERS = ("lwc", "signround", "blockap")  # trained on a decoder layer's output

LOSSES = ("mse", "ce", "kl")
# Named sets of options, over the defaults of `ConvertOptions`; docs/recipes.md says why.
RECIPES: dict[str, dict[str, Any]] = {
    "fast": {"layer_steps": 80, "steps": 80, "val_every": 40},
    "default": {},
    "best": {
        "layer_steps": 250,
        "train": "all+codes",
        "steps": 600,
        "batch_size": 4,
        "val_every": 100,
    },
    "paper": {
        "quantizer": "rtn",
        "zero_point": "integer",
        "adapter": "lora",
        "loss": "mse+ce",
        "learning_rate": 1e-4,
        "schedule": "constant",
        "steps": 1250,
        "batch_size": 8,
        "val_every": 25,
        "rows": "documents",
        "nsamples": 320,
        "seqlen": 512,
    },
}

DEFAULT_ROWS = 320  # rows of the paper's calibration set
DEFAULT_SEQLEN = 512
MOST_AVERAGE_BITS = 4  # the most bits of a linear with --avg-bits
ROUTERS = ("gate", "shared_expert_gate")  # what chooses experts or weighs them is never quantized
TARGETS = ("attention", "mlp", "experts", "all")  # of adapters; anything else is a pattern


@dataclass(frozen=True)
class ConvertOptions:
    """The options of `rilq convert` and `rilq plan`; see the README for what each means.

    `None` means that the value is chosen from the model or the machine; what was chosen is printed,
    and kept when a stopped job continues.
    """

    model: str
    revision: str | None = None
    method: str = "rilq"
    recipe: str = "default"
    # of the other methods; see converter/resq/options.py
    high_fraction: float | None = None
    high_bits: int | None = None
    low_bits: int | None = None
    lowest_bits: int | None = None
    rotations: str | None = None
    # the base
    bits: int = 2
    group_size: int = 64
    quantizer: str = "blockap"
    clip: Clip | None = None
    layer_steps: int = 150
    zero_point: Literal["real", "integer"] = "real"
    skip: tuple[str, ...] = ()
    bits_for: tuple[tuple[str, int], ...] = ()
    avg_bits: float | None = None
    rotate: bool = False
    embed_bits: int = 16
    head_bits: int = 16
    # calibration
    dataset: tuple[str, ...] = ("c4",)
    text_key: str = "text"
    rows: Literal["packed", "documents"] = "packed"
    nsamples: int | None = None
    seqlen: int | None = None
    val_ratio: float = 0.2
    seed: int = 42
    # the training
    rank: int = 16
    alpha: float = 16.0
    adapter: AdapterKind = "pooled"
    adapter_targets: tuple[str, ...] = ("attention", "mlp")
    adapter_init: AdapterInit = "zero"
    keep_adapter: bool = False
    train: Train | None = None
    loss: str = "kl"
    target: Target = "post-norm"
    learning_rate: float | None = None
    scales_learning_rate: float | None = None
    schedule: Schedule = "decay"
    steps: int = 200
    batch_size: int = 2
    val_every: int = 50
    patience: int = 5
    # the machine
    expert_memory: str | None = None
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    student: Tier | Literal["auto"] = "auto"
    micro_batch: int | None = None
    device_memory: str | None = None
    # the source's shards on disk, where it is on the Hub
    evict: bool = False
    max_disk: str | None = None
    # the output
    max_shard_size: str = "5GB"
    output_dir: Path | None = None
    work_dir: Path | None = None
    resume: Literal["auto", "never", "required"] = "auto"
    keep_work: bool = False

    def __post_init__(self) -> None:
        _check(self)

    @classmethod
    def of_recipe(cls, recipe: str, **given: Any) -> ConvertOptions:
        """A recipe's options, with what is `given` (and not None) in the place of its own.

        With a rank of 0, a plain LoRA or an adapter that is kept, what is trained follows from
        that, as without a recipe. Recipes are RILQ's; another method has defaults of its own.

        Raises:
            OptionError: no such recipe, or impossible values.
        """
        if recipe not in RECIPES:
            raise OptionError(f"--recipe {recipe}: expected one of {', '.join(RECIPES)}")
        chosen = {name: value for name, value in given.items() if value is not None}
        own = dict(RECIPES[recipe])
        if (method := chosen.get("method")) in resq_options.METHODS:
            resq_options.refuse_recipe(recipe, method)
            own = resq_options.DEFAULTS[method]
        decided = chosen.get("rank") == 0 or chosen.get("adapter") == "lora"
        if decided or chosen.get("keep_adapter"):
            own.pop("train", None)
        return cls(**{"recipe": recipe, **own, **chosen})

    @property
    def trains(self) -> Train:
        """What is trained: as given, else what adapter and rank allow."""
        if self.train is not None:
            return self.train
        if self.rank == 0:
            return "none"
        return "adapters" if self.adapter == "lora" else "adapters+scales"

    @property
    def trains_adapters(self) -> bool:
        """Whether adapters are among what is trained."""
        return self.trains in ("adapters", "adapters+scales")

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weight of each term of `loss`; those without a number share what is alike.

        `mse+ce` weighs both 0.5, as the paper; `kl` is 1; `0.2*mse+kl` weighs 0.2 and 1.
        """
        return parse_loss(self.loss)

    @property
    def output(self) -> Path:
        """The output folder: as given, or here `<model>-w<bits>g<group size>-rilq` or the like."""
        if self.output_dir is not None:
            return self.output_dir
        name = Path(self.model).resolve().name if Path(self.model).exists() else self.model
        suffix = f"w{self.avg_bits or self.bits:g}g{self.group_size}-rilq"
        if self.resq is not None:
            suffix = self.resq.suffix
        return Path(f"{name.rpartition('/')[2]}-{suffix}")

    @property
    def resq(self) -> resq_options.ResqOptions | None:
        """What ResQ or a baseline of it needs to know; None for RILQ."""
        return None if self.method == "rilq" else resq_options.ResqOptions.of(self)

    @property
    def work(self) -> Path:
        """The work folder: as given, or beside the output."""
        return self.work_dir or self.output.with_name(self.output.name + ".rilq-work")

    @property
    def evicts(self) -> bool:
        """Whether shards from the Hub are deleted once they are used up."""
        return self.evict or self.max_disk is not None

    @property
    def more_bits(self) -> tuple[int, ...]:
        """What a linear may get instead of `bits`, where an average is asked for."""
        if self.avg_bits is None:
            return ()
        return tuple(b for b in BITS if self.bits < b <= MOST_AVERAGE_BITS)

    def spec_for(self, name: str) -> QuantSpec | None:
        """How the linear `name` is quantized; None if it stays as it is."""
        if is_router(name) or any(matches(pattern, name) for pattern in self.skip):
            return None
        bits = self.bits
        for pattern, value in self.bits_for:
            if matches(pattern, name):
                bits = value
        return QuantSpec(bits, self.group_size, self.zero_point)

    def recorded(self) -> dict[str, Any]:
        """Every option that has an effect on the result, as JSON values without any path."""
        without = {
            "model", "revision", "dataset", "output_dir", "work_dir", "resume", "keep_work",
            "device", "dtype", "student", "micro_batch", "device_memory", "evict", "max_disk",
            "expert_memory",
        }  # fmt: skip
        values = {k: v for k, v in asdict(self).items() if k not in without}
        values["bits_for"] = dict(self.bits_for)
        values["skip"] = list(self.skip)
        values["adapter_targets"] = list(self.adapter_targets)
        if self.method != "rilq":
            return resq_options.recorded(self, values)
        # Nothing of them: a job that was begun before there were other methods goes on.
        for name in ("method", *resq_options.OWN):
            del values[name]
        return values


def is_router(name: str) -> bool:
    """Whether the linear `name` chooses experts, or weighs one that always runs."""
    return name.rpartition(".")[2] in ROUTERS


def is_target(target: str, name: str) -> bool:
    """Whether an adapter target, one of `TARGETS` or a pattern, names the linear `name`."""
    if target not in TARGETS:
        return matches(target, name)
    kind = "mlp"
    if EXPERTS in name:
        kind = "experts"
    elif "self_attn" in name.split("."):
        kind = "attention"
    return target in ("all", kind)


def matches(pattern: str, name: str) -> bool:
    """Whether a shell-style pattern names a module: its full name or its last dotted parts.

    `down_proj`, `mlp.*` and `model.layers.0.*` all match `model.layers.0.mlp.down_proj`.
    """
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[i:]), pattern) for i in range(len(parts)))


def parse_loss(text: str) -> dict[str, float]:
    """Terms and weights of `mse+ce`, `kl`, `0.5*mse+2*kl`; terms without a weight share 1.

    Raises:
        OptionError: an unknown term, one named twice, or a weight that is no positive number.
    """
    parts = [part.rpartition("*") for part in text.replace(" ", "").split("+")]
    names = [name for _, _, name in parts]
    shared = sum(1 for weight, _, _ in parts if not weight) or 1
    try:
        weights = {name: float(weight) if weight else 1 / shared for weight, _, name in parts}
    except ValueError:
        weights = {}
    good = all(0 < weight < float("inf") for weight in weights.values())
    if not good or len(weights) < len(names) or not set(names) <= set(LOSSES):
        raise OptionError(
            f"--loss {text}: expected terms out of {', '.join(LOSSES)} joined by +, each with an "
            "optional weight: mse+ce, kl, 0.5*mse+kl"
        )
    return weights


def _check(options: ConvertOptions) -> None:
    """Raises OptionError, naming every impossible value at once."""
    o = options
    problems = []
    allowed: dict[str, tuple[object, ...]] = {
        "bits": BITS,
        "embed_bits": OUTER_BITS,
        "head_bits": OUTER_BITS,
        "group_size": GROUP_SIZES,
        "quantizer": QUANTIZERS,
        "recipe": tuple(RECIPES),
        "clip": (None, "none", "search", "lsq"),
        "zero_point": ("real", "integer"),
        "rows": ("packed", "documents"),
        "adapter": ("pooled", "lora"),
        "train": (None, "none", "adapters", "scales", "adapters+scales", "all", "all+codes"),
        "target": ("post-norm", "pre-norm", "logits"),
        "schedule": ("decay", "constant"),
        "adapter_init": ("zero", "loftq", "eora"),
        "dtype": ("auto", "float32", "bfloat16", "float16"),
        "student": ("auto", "dense", "packed", "offload"),
        "resume": ("auto", "never", "required"),
    }
    for key, values in allowed.items():
        if getattr(o, key) not in values:
            names = ", ".join(str(v) for v in values if v is not None)
            problems.append(f"{flag(key)} {getattr(o, key)}: expected one of {names}")
    least = {
        "nsamples": 2,
        "seqlen": 2,
        "layer_steps": 1,
        "steps": 1,
        "batch_size": 1,
        "micro_batch": 1,
        "val_every": 1,
        "patience": 1,
    }
    for key, low in least.items():
        if getattr(o, key) is not None and getattr(o, key) < low:
            problems.append(f"{flag(key)} {getattr(o, key)}: expected at least {low}")
    if o.clip is not None and o.quantizer in OWN_GRID:
        problems.append(f"--clip {o.clip}: --quantizer {o.quantizer} finds its own grid")
    if not 0 < o.val_ratio < 1:
        problems.append(f"--val-ratio {o.val_ratio}: expected between 0 and 1")
    if not 0 < o.alpha < float("inf"):
        problems.append(f"--alpha {o.alpha}: expected a positive number")
    for key in ("learning_rate", "scales_learning_rate"):
        if (rate := getattr(o, key)) is not None and not 0 < rate < float("inf"):
            problems.append(f"{flag(key)} {rate}: expected a positive number")
    if not o.adapter_targets:
        problems.append("--adapter-targets: expected at least one")
    if not o.dataset:
        problems.append("--dataset: expected at least one")
    if "lm_head" in o.skip and o.head_bits in OUTER_BITS[1:]:
        problems.append(f"--skip lm_head, --head-bits {o.head_bits}: give one of them")
    for pattern, bits in o.bits_for:
        if bits not in BITS:
            problems.append(f"--bits-for {pattern}={bits}: expected one of {BITS}")
    flags = {f.name: flag(f.name) for f in fields(o)}
    problems += _training_problems(o) + _average_problems(o) + _kept_problems(o)
    problems += resq_options.problems(o, flags)
    if problems:
        raise OptionError("\n".join(problems))


def _training_problems(o: ConvertOptions) -> list[str]:
    problems = []
    if o.rank == 0 and o.train in ("adapters", "adapters+scales"):
        problems.append(f"--train {o.train}: adapters of --rank 0 are none; expected 1 or more")
    if o.adapter == "lora" and o.train not in (None, "none", "adapters"):
        problems.append(
            f"--train {o.train}: a plain LoRA stays beside a base that does not change\n"
            "  use --train adapters, or --adapter pooled"
        )
    if o.student == "offload" and o.train == "all+codes":
        problems.append(
            "--student offload, --train all+codes: trained codes have 16 bytes of state per "
            "weight, which is not offloaded\n  use --student packed, or --train all"
        )
    try:
        terms = o.loss_weights
        if o.target == "pre-norm" and "kl" in terms:
            problems.append(
                f"--loss {o.loss}: kl needs the states that feed the head\n  use --target post-norm"
            )
        if o.target != "post-norm" and "mse" not in terms:
            problems.append(
                f"--target {o.target}: is what mse compares, and --loss {o.loss} has no mse"
            )
    except OptionError as err:
        problems.append(str(err))
    if o.rank < 0:
        problems.append(f"--rank {o.rank}: expected 0 (no adapters) or more")
    if o.adapter_init != "zero" and not o.trains_adapters:
        problems.append(f"--adapter-init {o.adapter_init}: needs adapters; pass --rank above 0")
    if o.adapter_init != "zero" and o.quantizer in LAYER_QUANTIZERS:
        problems.append(
            f"--adapter-init {o.adapter_init}: fits the error that rounding leaves, and "
            f"--quantizer {o.quantizer} trains the weights before\n"
            "  use --quantizer rtn, hqq, lsq or gptq"
        )
    return problems


def _average_problems(o: ConvertOptions) -> list[str]:
    if o.avg_bits is None:
        return []
    problems = []
    if not o.bits <= o.avg_bits <= MOST_AVERAGE_BITS:
        problems.append(
            f"--avg-bits {o.avg_bits}: expected between --bits ({o.bits}) and {MOST_AVERAGE_BITS}"
        )
    if o.bits_for:
        problems.append("--avg-bits, --bits-for: give one of them")
    if o.adapter_init != "zero":
        problems.append(
            f"--avg-bits, --adapter-init {o.adapter_init}: fits the error that the base's bits "
            "leave\n  use --adapter-init zero"
        )
    return problems


def _kept_problems(o: ConvertOptions) -> list[str]:
    if not o.keep_adapter:
        return []
    problems = []
    if o.zero_point != "integer":
        problems.append(
            f"--keep-adapter, --zero-point {o.zero_point}: keeps the base without its adapter for "
            "formats whose zero-points are integers\n  add --zero-point integer"
        )
    if o.adapter == "lora":
        problems.append(
            "--keep-adapter, --adapter lora: a plain LoRA is never merged, and kept anyway\n"
            "  leave out --keep-adapter, or use --adapter pooled"
        )
    if o.rank == 0:
        problems.append("--keep-adapter, --rank 0: there is no adapter to keep")
    elif o.train in ("all", "all+codes"):
        problems.append(
            f"--keep-adapter, --train {o.train}: moves the minima off the integer zero-points, and "
            "trains no adapter\n  use --train adapters+scales, or --train adapters"
        )
    elif o.train in ("none", "scales"):
        problems.append(f"--keep-adapter, --train {o.train}: there is no adapter to keep")
    return problems


def flag(field_name: str) -> str:
    """The command line's name of an option."""
    assert field_name in {f.name for f in fields(ConvertOptions)}, field_name
    own = {"learning_rate": "--lr", "scales_learning_rate": "--scales-lr"}
    return own.get(field_name, "--" + field_name.replace("_", "-"))
