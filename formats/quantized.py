"""The quantization of a checkpoint in any format of rilq's, and models made to fit it."""

from __future__ import annotations

from torch import nn

from rilq.errors import CheckpointError
from rilq.formats.checkpoint import Checkpoint
from rilq.formats.native import RilqConfig, native_config, replace_modules
from rilq.formats.resq.config import QUANT_METHOD, ResqConfig
from rilq.formats.resq.install import install


def quantization_of(checkpoint: Checkpoint) -> RilqConfig | ResqConfig | None:
    """The checkpoint's quantization, if it is in a format of rilq's; None for a dense one.

    Raises:
        CheckpointError: quantized by another method, or in a way that cannot be read.
    """
    raw = checkpoint.config.get("quantization_config")
    if not isinstance(raw, dict) or raw.get("quant_method") != QUANT_METHOD:
        return native_config(checkpoint)
    try:
        return ResqConfig(**{k: v for k, v in raw.items() if k != "quant_method"})
    except (ValueError, TypeError, AttributeError) as err:
        raise CheckpointError(f"{checkpoint.source.label}/config.json: {err}") from err


def apply_quantization(model: nn.Module, quantization: RilqConfig | ResqConfig) -> None:
    """Give a whole model on the meta device the modules that the checkpoint has tensors for.

    Raises:
        ValueError: the model does not fit the configuration; the message names the module.
    """
    if isinstance(quantization, ResqConfig):
        install(model, quantization)
    else:
        replace_modules(model, quantization)
