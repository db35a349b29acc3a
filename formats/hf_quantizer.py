"""What our formats share in transformers' loading: packed tensors are loaded, never made up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer

from rilq.formats.packed_linear import KeptBuffers


class PackedHfQuantizer(HfQuantizer):
    """Lets `from_pretrained` load packed checkpoints; it does not quantize."""

    requires_calibration = True  # transformers' word for "pre-quantized checkpoints only"

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        """Turn transformers' mere report of missing tensors into an error.

        Raises:
            ValueError: tensors of quantized modules were not in the checkpoint or have other
                shapes, or codes that wait on disk would not come back as they are.
        """
        _check_shapes(model)
        tensors: dict[str, Tensor] = {}
        hooked: list[tuple[str, KeptBuffers]] = []
        for path, module in model.named_modules():
            if not isinstance(module, KeptBuffers):
                continue
            if hasattr(module, "_hf_hook"):
                # accelerate has moved the tensors, and with that removed transformers' marks.
                hooked.append((path, module))
            else:
                tensors |= {f"{path}.{n}": t for n, t in module.named_parameters()}
                tensors |= {f"{path}.{n}": t for n, t in module.named_buffers()}
        packed = [pair for pair in hooked if pair[1].weight.dtype == torch.int32]
        for path, module in [pair for pair in packed if pair[1].weight.is_meta][:1]:
            _check_offloaded(path, module)
        missing = [n for n, t in tensors.items() if not getattr(t, "_is_hf_initialized", False)]
        if missing:
            shown = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
            raise ValueError(
                f"tensors missing from the checkpoint ({len(missing)}): {shown}\n"
                "  download the checkpoint again"
            )
        return model

    def is_serializable(self) -> bool:
        """Yes: `save_pretrained` writes the same tensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Yes, with adapters: gradients pass through, the quantized weights themselves stay."""
        return True


def prefix_of(model: nn.Module) -> str:
    """What config.json puts before the names of a model's modules: a bare decoder has none."""
    base = getattr(model, "base_model_prefix", "")
    return base if base and not hasattr(model, base) else ""


def keep_from_initializing(model: nn.Module) -> None:
    """Have transformers draw nothing for our modules, which are empty until they are loaded.

    What it has not loaded it draws from a normal distribution, codes too; weights that wait on disk
    for accelerate look to it as if they were missing.
    """
    for module in model.modules():
        if isinstance(module, KeptBuffers):
            module._is_hf_initialized = True  # type: ignore[assignment]
            module.shapes = {n: tuple(t.shape) for n, t in module.state_dict().items()}


def _check_shapes(model: nn.Module) -> None:
    """transformers 5.5 takes tensors of any shape where there is a quantizer."""
    wrong = [
        f"{path}.{name} {list(tensor.shape)}, expected {list(module.shapes[name])}"
        for path, module in model.named_modules()
        if isinstance(module, KeptBuffers)
        for name, tensor in module.state_dict().items()
        if tuple(tensor.shape) != module.shapes.get(name, tuple(tensor.shape))
    ]
    if wrong:
        raise ValueError(
            f"tensors of other shapes than quantization_config asks for ({len(wrong)}): "
            f"{wrong[0]}\n"
            "  config.json and the tensors do not belong together; download both again"
        )


def _check_offloaded(path: str, module: nn.Module) -> None:
    # transformers 5.5 makes accelerate cast all that it reads from disk to the model's dtype; later
    # versions keep integers. A float holds 24 bits of a word's 32: quietly another weight.
    stored = getattr(module._hf_hook, "weights_map", None)
    if stored is not None and (dtype := stored["weight"].dtype) != torch.int32:
        raise ValueError(
            f"{path}.weight: this version of transformers reads packed codes from disk as {dtype}, "
            "which destroys them\n  upgrade transformers, or pass a device_map without disk"
        )
