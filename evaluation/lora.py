"""A plain LoRA kept beside a checkpoint as a PEFT folder, applied one decoder layer at a time."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from rilq.converter.layers import StreamedModel
from rilq.errors import CheckpointError
from rilq.formats.lora import ADAPTER_FOLDER
from rilq.formats.peft_folder import CONFIG_NAME, PeftFolder
from rilq.formats.shard import ShardHeader
from rilq.formats.source import LocalFolder
from rilq.progress import Reporter


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
    """A LoRA in a PEFT folder, to be applied to a streamed model."""

    files: PeftFolder

    @classmethod
    def open(cls, folder: Path, streamed: StreamedModel) -> "PeftAdapter":
        """Check the folder against the model that it is for; see `PeftFolder.open`."""
        shapes = {
            name: (module.out_features, module.in_features)
            for index in range(len(streamed.layers))
            for name, module in streamed.linears(index).items()
        }
        return cls(PeftFolder.open(folder, shapes))

    @property
    def header(self) -> ShardHeader:
        """Of the safetensors file."""
        return self.files.header

    @contextmanager
    def applied(self, streamed: StreamedModel, index: int) -> Iterator[None]:
        """Decoder layer `index` (loaded) with its part of the adapter; afterwards without."""
        linears = streamed.linears(index)
        plain = {name: module for name, module in linears.items() if name in self.files.linears}
        factors = self.files.factors(plain)
        try:
            for name, module in plain.items():
                a, b = (factor.to(streamed.device) for factor in factors[name])
                adapted = LoraLinear(module, a, b, self.files.scaling)
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
