"""Keeps PEFT from fusing adapters of a mixture whose experts are linears of their own.

PEFT rewrites an adapter for such an architecture as transformers rewrites its weights: targets of
three linears become targets of two fused tensors, which a native checkpoint does not have. This
module wraps the two functions that do so; models of any other kind go on to them.
"""

from typing import Any

from peft.utils import transformers_weight_conversion as peft_conversion
from torch import Tensor, nn

from rilq.formats.experts import Experts

CONFIG = "convert_peft_config_for_transformers"
STATE = "convert_peft_adapter_state_dict_for_transformers"  # PEFT 0.18 has none yet

_peft_config = getattr(peft_conversion, CONFIG, None)
_peft_state = getattr(peft_conversion, STATE, None)


def _are_apart(model: nn.Module) -> bool:
    return any(isinstance(module, Experts) for module in model.modules())


def _convert_config(peft_config: Any, model: nn.Module, conversions: Any) -> None:
    """PEFT's change of an adapter's targets; none where experts are apart."""
    if _peft_config is not None and not _are_apart(model):
        _peft_config(peft_config, model=model, conversions=conversions)


def _convert_state(
    model: nn.Module, peft_config: Any, adapter_state_dict: dict[str, Tensor], **more: Any
) -> dict[str, Tensor]:
    """PEFT's change of an adapter's tensors; none where experts are apart."""
    if _peft_state is None or _are_apart(model):
        return adapter_state_dict
    converted: dict[str, Tensor] = _peft_state(
        model=model, peft_config=peft_config, adapter_state_dict=adapter_state_dict, **more
    )
    return converted


for _name, _ours in ((CONFIG, _convert_config), (STATE, _convert_state)):
    if hasattr(peft_conversion, _name):
        setattr(peft_conversion, _name, _ours)
