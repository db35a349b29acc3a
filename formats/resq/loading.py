"""Makes `rilq-resq` known to transformers, so that `from_pretrained` loads it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from rilq.formats.packed_linear import KeptBuffers
from rilq.formats.resq.config import QUANT_METHOD, ResqConfig


class ResqHfQuantizer(HfQuantizer):
    """Lets `from_pretrained` load ResQ checkpoints; it does not quantize."""

    requires_calibration = True  # transformers' word for "pre-quantized checkpoints only"
    quantization_config: ResqConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        # transformers imports this module before the ones that attention needs.
        from rilq.formats.resq.install import install

        # A bare decoder (AutoModel) names its modules without the prefix that config.json has.
        base = getattr(model, "base_model_prefix", "")
        install(model, self.quantization_config, base if base and not hasattr(model, base) else "")
        for module in model.modules():
            if isinstance(module, KeptBuffers):
                # What transformers has not loaded it draws from a normal distribution, codes too.
                module._is_hf_initialized = True  # type: ignore[assignment]

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        """Turn transformers' mere report of missing tensors into an error.

        Raises:
            ValueError: tensors of quantized modules were not in the checkpoint.
        """
        tensors: dict[str, Tensor] = {}
        for path, module in model.named_modules():
            if isinstance(module, KeptBuffers):
                tensors |= {f"{path}.{n}": t for n, t in module.state_dict(keep_vars=True).items()}
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


def register() -> None:
    """Make the format known to transformers; harmless when repeated."""
    if QUANT_METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(QUANT_METHOD)(ResqConfig)
    if QUANT_METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(QUANT_METHOD)(ResqHfQuantizer)


register()  # importing this module is how the format registers itself; see registration.py
