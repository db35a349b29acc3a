"""Refuses PEFT's own merge where it would write into packed codes.

Left alone, PEFT adds a float matrix to the int32 words and fails on their shapes, with a message
that helps nobody. This module wraps the check that PEFT makes before any merge.
"""

from typing import Any

from peft.tuners.tuners_utils import BaseTuner

from rilq.formats.packed_linear import PackedModule
from rilq.formats.resq.linear import ResqLinear

_peft_check = BaseTuner._check_merge_allowed


def _check_merge_allowed(tuner: Any) -> None:
    """PEFT's check, and ours.

    Raises:
        ValueError: an adapter lies on a packed module.
    """
    adapted = [
        name
        for name, module in tuner.model.named_modules()
        if isinstance(getattr(module, "base_layer", None), PackedModule | ResqLinear)
    ]
    if adapted:
        raise ValueError(
            f"{adapted[0]} and {len(adapted) - 1} more: an adapter cannot be merged into packed "
            "codes; rounding would delete it\n"
            "  keep the adapter beside the model, or call model.dequantize() before attaching it "
            "and merge in 16 bits"
        )
    _peft_check(tuner)  # type: ignore[no-untyped-call]


BaseTuner._check_merge_allowed = _check_merge_allowed  # type: ignore[method-assign]
