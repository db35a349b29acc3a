"""Exports with an adapter beside packed modules, read back as one dense model."""

from pathlib import Path

from torch import Tensor

from rilq.formats.export.folder import FolderReader
from rilq.formats.lora import ADAPTER_FOLDER
from rilq.formats.peft_folder import CONFIG_NAME, PeftFolder


class AdaptedReader(FolderReader):
    """An export with an adapter beside it, read back as one dense model.

    Subclasses say what their packed modules are.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.shapes = self._dense_shapes()
        place = folder / ADAPTER_FOLDER
        matrices = {
            name.removesuffix(".weight"): (shape[0], shape[1])
            for name, shape in self.shapes.items()
            if name.endswith(".weight") and len(shape) == 2
        }
        found = (place / CONFIG_NAME).is_file()
        self._adapter = PeftFolder.open(place, matrices) if found else None

    def _dense_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of the dense model."""
        raise NotImplementedError

    def _packed(self, module: str) -> Tensor:
        """The weight of a packed module, float32."""
        raise NotImplementedError

    def read(self, name: str) -> Tensor:
        """One tensor in float32, dequantized if it is packed, an adapter added in."""
        if name in self.checkpoint.tensors:
            return super().read(name)
        module = name.removesuffix(".weight")
        weight = self._packed(module)
        if self._adapter is not None and module in self._adapter.linears:
            a, b = self._adapter.factors([module])[module]
            weight.addmm_(b.float(), a.float(), alpha=self._adapter.scaling)
        return weight
