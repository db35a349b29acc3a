"""What a user can ask of ResQ and its baselines. Imports no torch.

resq      eigenvectors of the covariances, mixed inside each part; the last part in high bits
quarot    random Hadamard rotations, one part of low bits (Ashkboos et al., arXiv:2404.00456)
quik      no rotation: the channels with the largest magnitudes in high bits, by permutation
rtn-w4a4  no rotation, one part of low bits, weights rounded to nearest
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from rilq.errors import OptionError

if TYPE_CHECKING:
    from rilq.converter.options import ConvertOptions

METHODS = ("resq", "quarot", "quik", "rtn-w4a4")
ROTATIONS = "ABCD"  # U_A residual stream, U_B values, U_C keys, U_D the input of down_proj
NO_ROTATION = "none"
BITS = (2, 3, 4, 6, 8)

# What differs from the defaults of `ConvertOptions`, over which options that are given go.
DEFAULTS: dict[str, dict[str, Any]] = {
    name: {"quantizer": "rtn" if name == "rtn-w4a4" else "gptq", "rank": 0, "adapter": "lora"}
    for name in METHODS
}
_PARTED = ("resq", "quik")  # those with a high part
_ROTATED = ("resq", "quarot")  # those whose rotations can be chosen
_ROTATIONS = {"resq": ROTATIONS, "quarot": ROTATIONS, "quik": "ABC", "rtn-w4a4": NO_ROTATION}
# Options of RILQ's conversion that say something here as well; of the others none may be given.
_SHARED = {
    "model", "revision", "method", "quantizer", "dataset", "text_key", "rows", "nsamples",
    "seqlen", "val_ratio", "seed", "rank", "evict", "max_disk", "device", "dtype", "micro_batch",
    "device_memory", "student", "max_shard_size", "output_dir", "work_dir", "resume", "keep_work",
}  # fmt: skip
# Of the training of adapters, where there are some.
_TRAINING = ("adapter", "alpha", "adapter_targets", "train", "loss", "target", "learning_rate",
             "schedule", "steps", "batch_size", "val_every", "patience")  # fmt: skip
OWN = ("high_fraction", "high_bits", "low_bits", "lowest_bits", "rotations")
# What has an effect on the result, apart from this module's own options.
_RECORDED = ("method", "quantizer", "rank", "text_key", "rows", "nsamples", "seqlen", "val_ratio",
             "seed", "max_shard_size")  # fmt: skip


@dataclass(frozen=True)
class ResqOptions:
    """How channels are quantized, decided.

    Attributes:
        method: one of `METHODS`.
        quantizer: of the weights, gptq or rtn.
        high_fraction: share of the channels in the high part, and in the lowest where there is
            one; 0 for one part.
        high_bits, low_bits: of the two parts; of one part, `low_bits`.
        lowest_bits: of the channels of least variance; None for two parts.
        rotations: which of `ROTATIONS` are applied, in order; of quik these are permutations.
    """

    method: str
    quantizer: str
    high_fraction: float
    high_bits: int
    low_bits: int
    lowest_bits: int | None
    rotations: str

    @classmethod
    def of(cls, options: ConvertOptions) -> ResqOptions:
        """Those of a conversion by another method than RILQ's, defaults filled in."""
        o, parted = options, options.method in _PARTED
        low = 4 if o.low_bits is None else o.low_bits
        rotations = o.rotations or _ROTATIONS[o.method]
        return cls(
            method=o.method,
            quantizer=o.quantizer,
            high_fraction=(0.125 if o.high_fraction is None else o.high_fraction) * parted,
            high_bits=(8 if o.high_bits is None else o.high_bits) if parted else low,
            low_bits=low,
            lowest_bits=o.lowest_bits if parted else None,
            rotations="" if rotations == NO_ROTATION else rotations,
        )

    @property
    def needs_covariances(self) -> bool:
        """Whether a pass of its own comes before the one that quantizes."""
        return self.method in ("resq", "quik")

    @property
    def parts(self) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Bits of the parts of a vector, and their shares of its channels."""
        share = self.high_fraction
        if not share:
            return (self.low_bits,), (1.0,)
        if self.lowest_bits is None:
            return (self.low_bits, self.high_bits), (1 - share, share)
        return (self.lowest_bits, self.low_bits, self.high_bits), (share, 1 - 2 * share, share)

    @property
    def suffix(self) -> str:
        """What is added to a model's name, such as `w4a4kv4-resq`."""
        bits, name = self.low_bits, self.method.removesuffix("-w4a4")
        return f"w{bits}a{bits}kv{bits}-{name}"

    def recorded(self) -> dict[str, Any]:
        """As JSON values, for the recipe; `method` and `quantizer` are recorded with the rest."""
        names = (f.name for f in fields(self) if f.name not in ("method", "quantizer"))
        return {name: getattr(self, name) for name in names}


def recorded(options: ConvertOptions, values: Mapping[str, Any]) -> dict[str, Any]:
    """`ConvertOptions.recorded` of these methods, of all its `values`."""
    names = (*_RECORDED, *(_TRAINING if options.rank else ()))
    return {name: values[name] for name in names} | ResqOptions.of(options).recorded()


def problems(o: ConvertOptions, flag: Mapping[str, str]) -> list[str]:
    """What is impossible, of the method and its options.

    Args:
        flag: the command line's names of all options that may be given.
    """
    if o.method not in ("rilq", *METHODS):
        return [f"--method {o.method}: expected one of rilq, {', '.join(METHODS)}"]
    given = [name for name in OWN if getattr(o, name) is not None]
    if o.method == "rilq":
        names = ", ".join(flag[name] for name in given)
        return [f"{names}: of --method resq and its baselines; --method rilq has none"] * bool(
            given
        )
    found = _without_meaning(o, flag)
    meaningless = [] if o.method in _PARTED else ["high_fraction", "high_bits", "lowest_bits"]
    meaningless += [] if o.method in _ROTATED else ["rotations"]
    found += [
        f"{flag[name]} {getattr(o, name)}: --method {o.method} has "
        + ("no rotations" if name == "rotations" else "one part, of --low-bits")
        for name in given
        if name in meaningless
    ]
    return found + _bit_problems(o) + _rotation_problems(o)


def refuse_recipe(recipe: str, method: str) -> None:
    """Raises OptionError: the recipes are sets of RILQ's options."""
    if recipe != "default":
        raise OptionError(
            f"--recipe {recipe}: a set of options of --method rilq, not of --method {method}\n"
            "  leave out --recipe"
        )


def _without_meaning(o: ConvertOptions, flag: Mapping[str, str]) -> list[str]:
    """Options that are not as they are by default, and that no method but RILQ's knows."""
    found = [
        f"{flag[f.name]} {_shown(getattr(o, f.name))}: has no meaning with --method {o.method}"
        for f in fields(o)
        if f.name not in (*_SHARED, *OWN, *_TRAINING) and getattr(o, f.name) != f.default
    ]
    if o.quantizer not in ("gptq", "rtn"):
        found.append(
            f"--quantizer {o.quantizer}: expected gptq or rtn with --method {o.method}, whose "
            "scales are one for each output channel and part"
        )
    if o.adapter != "lora" or o.train not in (None, "none", "adapters"):
        found.append(
            f"--adapter {o.adapter}, --train {o.trains}: scales of whole output channels take up "
            f"no adapter\n  --method {o.method} trains with --adapter lora, --train adapters"
        )
    if o.student == "offload":
        found.append(f"--student offload: expected auto, dense or packed with --method {o.method}")
    return found


def _shown(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _bit_problems(o: ConvertOptions) -> list[str]:
    chosen, found = ResqOptions.of(o), []
    levels = {"--lowest-bits": chosen.lowest_bits, "--low-bits": chosen.low_bits}
    if o.method in _PARTED:
        levels["--high-bits"] = chosen.high_bits
        most = 0.5 if chosen.lowest_bits is None else 0.25
        if not 0 < chosen.high_fraction <= most:
            found.append(
                f"--high-fraction {chosen.high_fraction}: expected above 0, at most {most}"
            )
    asked = {name: bits for name, bits in levels.items() if bits is not None}
    wrong = [f"{name} {bits}" for name, bits in asked.items() if bits not in BITS]
    if wrong:
        found.append(f"{', '.join(wrong)}: expected one of {', '.join(map(str, BITS))}")
    if sorted(asked.values()) != list(asked.values()) or len({*asked.values()}) < len(asked):
        shown = ", ".join(f"{name} {bits}" for name, bits in asked.items())
        found.append(f"{shown}: expected more bits for channels of more variance, in this order")
    return found


def _rotation_problems(o: ConvertOptions) -> list[str]:
    text = o.rotations
    if text in (None, NO_ROTATION):
        return []
    if text and [letter for letter in ROTATIONS if letter in text] == list(text):
        return []
    return [
        f"--rotations {text}: expected some of the letters {ROTATIONS}, in this order, or "
        f"{NO_ROTATION}"
    ]
