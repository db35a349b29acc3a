"""What it costs that zero-points are integers: the same weights rounded both ways.

A figure for each decoder layer while it is loaded, before and apart from any training: nearest
codes on each group's least-squares grid, once with integer zero-points and once with real ones.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Final, Literal

import torch

from rilq.converter.quantizers.rtn import RtnQuantizer
from rilq.converter.stream_options import StreamedLayer
from rilq.formats.packing import dequantize
from rilq.formats.spec import QuantSpec

KINDS: Final[tuple[Literal["integer", "real"], ...]] = ("integer", "real")
_KEY = "zero_point_cost"


def rounding_errors(
    layer: StreamedLayer, *, spec_for: Callable[[str], QuantSpec | None], device: torch.device
) -> dict[str, Any]:
    """Squared errors of a layer's quantized weights with either kind of zero-point, and their size.

    Args:
        spec_for: full module name to spec.
        device: where to compute.

    Returns:
        Facts for the layer's line in the journal.
    """
    sums = dict.fromkeys((*KINDS, "weights"), 0.0)
    scales = ".weight_scale"
    for name in (n.removesuffix(scales) for n in layer.saved if n.endswith(scales)):
        spec = spec_for(name)
        assert spec is not None, f"{name} is quantized, and has no spec"
        weight = layer.tensors[f"{name}.weight"].to(device, torch.float32)
        sums["weights"] += weight.square().sum().item()
        for kind in KINDS:
            found = RtnQuantizer("lsq").quantize(weight, replace(spec, zero_point=kind))
            value = dequantize(found.codes, found.scale, found.zero_point)
            sums[kind] += (value - weight).square().sum().item()
    return {_KEY: sums}


def relative_errors(facts: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """`|What - W|^2 / |W|^2` over all layers, by kind of zero-point.

    Args:
        facts: of the layers' lines in the journal.
    """
    sums = [each[_KEY] for each in facts if _KEY in each]
    size = sum(each["weights"] for each in sums)
    return {kind: sum(each[kind] for each in sums) / size if size else 0.0 for kind in KINDS}
