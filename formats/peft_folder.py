"""A plain LoRA in a PEFT folder: checked whole, read one linear at a time.

PEFT itself wants the whole model in memory.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from rilq.errors import CheckpointError
from rilq.formats.lora import KEY_PREFIX
from rilq.formats.shard import ShardHeader, listing, read_header, read_tensors

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

_A, _B = ".lora_A.weight", ".lora_B.weight"

# Options of PEFT's LoRA that make it something else than `y + alpha / r * B A x`.
_VARIANTS = (
    "alora_invocation_tokens",
    "alpha_pattern",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "use_rslora",
)


@dataclass(frozen=True)
class PeftFolder:
    """A LoRA in a PEFT folder, checked against the model that it is for.

    Attributes:
        weights: the safetensors file.
        header: of that file.
        scaling: `alpha / rank`.
        linears: full module names of the adapted linears.
    """

    weights: Path
    header: ShardHeader = field(repr=False)
    scaling: float
    linears: frozenset[str]

    @classmethod
    def open(cls, folder: Path, shapes: Mapping[str, tuple[int, int]]) -> "PeftFolder":
        """Check the folder's configuration, and names and shapes of its tensors; reads no weights.

        Args:
            folder: with `adapter_config.json` and `adapter_model.safetensors`.
            shapes: full module name to `(out_features, in_features)` of the model's linears.

        Raises:
            CheckpointError: it is not a plain LoRA, is damaged, or is for another model.
        """
        rank, alpha = _rank_and_alpha(folder / CONFIG_NAME)
        weights = folder / WEIGHTS_NAME
        header = read_header(weights)
        linears = frozenset(
            key.removeprefix(KEY_PREFIX).removesuffix(_A) for key in header.tensors if _A in key
        )
        expected = {}
        for name in linears:
            out_features, in_features = shapes.get(name, (0, 0))
            expected[f"{KEY_PREFIX}{name}{_A}"] = (rank, in_features)
            expected[f"{KEY_PREFIX}{name}{_B}"] = (out_features, rank)
        found = {key: info.shape for key, info in header.tensors.items()}
        wrong = [k for k in sorted({*expected, *found}) if expected.get(k) != found.get(k)]
        if wrong or not linears:
            raise CheckpointError(
                f"{weights}: not a LoRA of rank {rank} for this model: "
                f"{listing(wrong) if wrong else 'no tensors'}\n"
                "  the adapter belongs to another checkpoint, or is damaged; copy it again"
            )
        return cls(weights, header, alpha / rank, linears)

    def factors(self, linears: Iterable[str]) -> dict[str, tuple[Tensor, Tensor]]:
        """Name to A `[rank, in_features]` and B `[out_features, rank]` of some adapted linears."""
        names = list(linears)
        keys = [f"{KEY_PREFIX}{name}{part}" for name in names for part in (_A, _B)]
        tensors = read_tensors(self.weights, self.header, keys)
        return {
            name: (tensors[f"{KEY_PREFIX}{name}{_A}"], tensors[f"{KEY_PREFIX}{name}{_B}"])
            for name in names
        }


def _rank_and_alpha(path: Path) -> tuple[int, float]:
    """Rank and alpha of a plain LoRA's configuration."""
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as err:
        raise CheckpointError(f"{path}: cannot be read as JSON: {err}\n  copy it again") from err
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: is not a LoRA of PEFT\n  remove the adapter, or merge it")
    variants = [key for key in _VARIANTS if config.get(key)]
    variants += ["bias"] if config.get("bias", "none") != "none" else []
    if variants:
        raise CheckpointError(
            f"{path}: only plain LoRA can be streamed, but this one sets {', '.join(variants)}\n"
            "  merge the adapter into a 16-bit checkpoint with PEFT, and evaluate that"
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1 or not isinstance(alpha, (int, float)):
        raise CheckpointError(f"{path}: r {rank!r} and lora_alpha {alpha!r} are no LoRA's")
    return rank, float(alpha)
