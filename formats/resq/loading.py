"""Makes `rilq-resq` known to transformers, so that `from_pretrained` loads it."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.quantizers import auto

from rilq.formats.hf_quantizer import PackedHfQuantizer, keep_from_initializing, prefix_of
from rilq.formats.resq.config import QUANT_METHOD, ResqConfig


class ResqHfQuantizer(PackedHfQuantizer):
    """Lets `from_pretrained` load ResQ checkpoints; it does not quantize."""

    quantization_config: ResqConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        # transformers imports this module before the ones that attention needs.
        from rilq.formats.resq.install import install

        install(model, self.quantization_config, prefix_of(model))
        keep_from_initializing(model)


def register() -> None:
    """Make the format known to transformers; harmless when repeated."""
    if QUANT_METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(QUANT_METHOD)(ResqConfig)
    if QUANT_METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(QUANT_METHOD)(ResqHfQuantizer)


register()  # importing this module is how the format registers itself; see registration.py
