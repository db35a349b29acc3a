"""Arrays in, arrays out: from weight matrices to codes, scales and zero-points.

A quantizer knows nothing of files or devices. Most take one weight at a time (`Quantizer`); those
of layerwise.py take a whole decoder layer (`LayerQuantizer`). A new one is a class and a line in
`build_quantizer`.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from rilq.converter.options import DEFAULT_CLIP, LAYER_QUANTIZERS, OWN_GRID, QUANTIZERS, Clip
from rilq.converter.quantizers.gptq import GptqQuantizer
from rilq.converter.quantizers.hqq import HqqQuantizer
from rilq.converter.quantizers.layerwise import LayerQuantizer, LayerTask
from rilq.converter.quantizers.lsq import LsqQuantizer
from rilq.converter.quantizers.rtn import RtnQuantizer
from rilq.errors import OptionError
from rilq.formats.spec import QuantizedLinear, QuantSpec

__all__ = ["QUANTIZERS", "Clip", "LayerQuantizer", "LayerTask", "Quantizer", "build_quantizer"]


class Quantizer(Protocol):
    """One way to choose codes, scales and zero-points of one weight."""

    @property
    def name(self) -> str:
        """As the user writes it: one of `QUANTIZERS`."""
        ...

    @property
    def needs_hessian(self) -> bool:
        """Whether `quantize` must be given what `prepare` makes of the Hessian."""
        ...

    def prepare(self, hessian: Tensor, warn: Callable[[str], None]) -> Tensor:
        """What `quantize` needs of the Hessian; once for all linears that share the input.

        Args:
            hessian: `X^T X`, `[in_features, in_features]` float32, in any scale; given away: what
                is returned may lie in its memory.
            warn: is told what had to be done to a Hessian that could not be used as it is.

        Raises:
            RilqError: the Hessian cannot be used.
        """
        ...

    def quantize(
        self, weight: Tensor, spec: QuantSpec, prepared: Tensor | None = None
    ) -> QuantizedLinear:
        """Quantize one weight matrix, on the device of the weight.

        Each of its rows by itself, so that several processes can share them (shared.py).

        Args:
            weight: `[out_features, in_features]`, any float dtype; not changed.
            spec: bits, group size and kind of zero-point.
            prepared: what `prepare` made of the Hessian of the linear's inputs; not changed.

        Returns:
            Codes, scale and zero-point; every value finite.

        Raises:
            InputError: the group size does not divide `in_features`.
            NonFiniteError: the weight holds NaN or infinity.
        """
        ...


def build_quantizer(
    name: str, *, clip: Clip | None = None, layer_steps: int = 100
) -> Quantizer | LayerQuantizer:
    """The quantizer of that name.

    Args:
        name: one of `QUANTIZERS`.
        clip: the grid of each group, or where its training starts: "none" spans the extremes,
            "search" shrinks the range for the least squared error, "lsq" fits scale and
            zero-point by least squares; None takes `DEFAULT_CLIP`.
        layer_steps: updates for each decoder layer, of those that are trained.

    Raises:
        OptionError: unknown name or clip, or a clip for a quantizer that finds its own grid.
    """
    if name not in QUANTIZERS:
        raise OptionError(f"quantizer: expected one of {', '.join(QUANTIZERS)}; found {name!r}")
    if clip not in (None, "none", "search", "lsq"):
        raise OptionError(f"clip: expected none, search or lsq; found {clip!r}")
    if clip and name in OWN_GRID:
        raise OptionError(f"quantizer {name} finds its own grid; it takes no clip")
    clip = clip or DEFAULT_CLIP[name]
    if name in LAYER_QUANTIZERS:
        return LayerQuantizer(name, clip, layer_steps)
    by_name: dict[str, Quantizer] = {
        "rtn": RtnQuantizer(clip),
        "gptq": GptqQuantizer(clip),
        "lsq": LsqQuantizer(),
        "hqq": HqqQuantizer(),
    }
    return by_name[name]
