"""A plain LoRA kept beside a checkpoint as a PEFT folder, applied one decoder layer at a time.

PEFT itself wants the whole model in memory.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from rilq.converter.layers import StreamedModel
from rilq.errors import CheckpointError
from rilq.formats.lora import ADAPTER_FOLDER
from rilq.formats.shard import ShardHeader, listing, read_header, read_tensors
from rilq.formats.source import LocalFolder
from rilq.progress import Reporter

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

_PREFIX = "base_model.model."
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


class LoraLinear(nn.Module):
    """A linear with a LoRA beside it: `y + scaling * B (A x)`, in the adapter's own dtype as PEFT.

    Args:
        base: the linear, `[..., in_features]` to `[..., out_features]`.
        a: `[rank, in_features]`.
        b: `[out_features, rank]`.
        scaling: `alpha / rank`.
    """

    def __init__(self, base: nn.Module, a: Tensor, b: Tensor, scaling: float) -> None:
        super().__init__()
        self.base, self.a, self.b, self.scaling = base, a, b, scaling

    def forward(self, x: Tensor) -> Tensor:
        """The linear's output with the correction, in the linear's dtype."""
        out: Tensor = self.base(x)
        down = F.linear(x.to(self.a.dtype), self.a)  # [..., rank]
        return (out + F.linear(down, self.b) * self.scaling).to(out.dtype)


@dataclass(frozen=True)
class PeftAdapter:
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
    def open(cls, folder: Path, streamed: StreamedModel) -> "PeftAdapter":
        """Check the folder's configuration, and names and shapes of its tensors; reads no weights.

        Raises:
            CheckpointError: it is not a plain LoRA, is damaged, or is for another model.
        """
        rank, alpha = _rank_and_alpha(folder / CONFIG_NAME)
        weights = folder / WEIGHTS_NAME
        header = read_header(weights)
        shapes = {
            name: (module.out_features, module.in_features)
            for index in range(len(streamed.layers))
            for name, module in streamed.linears(index).items()
        }
        linears = frozenset(
            key.removeprefix(_PREFIX).removesuffix(_A) for key in header.tensors if _A in key
        )
        expected = {}
        for name in linears:
            out_features, in_features = shapes.get(name, (0, 0))
            expected[f"{_PREFIX}{name}{_A}"] = (rank, in_features)
            expected[f"{_PREFIX}{name}{_B}"] = (out_features, rank)
        found = {key: info.shape for key, info in header.tensors.items()}
        wrong = [k for k in sorted({*expected, *found}) if expected.get(k) != found.get(k)]
        if wrong or not linears:
            raise CheckpointError(
                f"{weights}: not a LoRA of rank {rank} for this model: "
                f"{listing(wrong) if wrong else 'no tensors'}\n"
                "  the adapter belongs to another checkpoint, or is damaged; copy it again"
            )
        return cls(weights, header, alpha / rank, linears)

    @contextmanager
    def applied(self, streamed: StreamedModel, index: int) -> Iterator[None]:
        """Decoder layer `index` (loaded) with its part of the adapter; afterwards without."""
        plain = {n: m for n, m in streamed.linears(index).items() if n in self.linears}
        keys = [f"{_PREFIX}{name}{part}" for name in plain for part in (_A, _B)]
        tensors = read_tensors(self.weights, self.header, keys)
        try:
            for name, module in plain.items():
                a, b = (tensors[f"{_PREFIX}{name}{p}"].to(streamed.device) for p in (_A, _B))
                adapted = LoraLinear(module, a, b, self.scaling)
                streamed.model.set_submodule(name, adapted)
            yield
        finally:
            for name, module in plain.items():
                streamed.model.set_submodule(name, module)


def find_adapter(streamed: StreamedModel, report: Reporter) -> PeftAdapter | None:
    """The LoRA that a conversion with `--adapter lora` left beside a checkpoint, if there is one.

    Raises:
        CheckpointError: it cannot be used, or is on the Hub, from where only the checkpoint is
            fetched.
    """
    source = streamed.checkpoint.source
    if isinstance(source, LocalFolder):
        folder = source.folder / ADAPTER_FOLDER
        if (folder / CONFIG_NAME).is_file():
            return PeftAdapter.open(folder, streamed)
    recipe: Mapping[str, Any] = streamed.quantization.recipe if streamed.quantization else {}
    if recipe.get("adapter") != "lora" or not recipe.get("rank"):
        return None
    if source.commit is not None:
        raise CheckpointError(
            f"{source.label}: its adapter ({ADAPTER_FOLDER}/) cannot be read from the Hub\n"
            "  download the whole repository and give its folder"
        )
    report.warn(
        f"{source.label}: was made with an adapter, but has no {ADAPTER_FOLDER}/{CONFIG_NAME}; "
        "what follows is the base alone"
    )
    return None


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
