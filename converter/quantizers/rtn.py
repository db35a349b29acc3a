"""Round to nearest: each group by itself, no data. Plain, it is the zero of every gap figure."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from rilq.converter.options import Clip
from rilq.converter.quantizers.grid import as_groups, encode, minmax_grid, search_grid
from rilq.converter.quantizers.lsq import lsq_grid
from rilq.formats.spec import QuantizedLinear, QuantSpec

GRIDS: dict[Clip, Callable[[Tensor, QuantSpec], tuple[Tensor, Tensor]]] = {
    "none": minmax_grid,
    "search": search_grid,
    "lsq": lsq_grid,
}


@dataclass(frozen=True)
class RtnQuantizer:
    """Round each weight to the nearest code of its group.

    Attributes:
        clip: "none" spans the whole range of a group, "search" shrinks it for the least
            squared error of the weights, "lsq" fits scale and zero-point to them.
    """

    clip: Clip = "none"

    name = "rtn"
    needs_hessian = False

    def prepare(self, hessian: Tensor) -> Tensor:
        """Nothing: the Hessian is not looked at."""
        return hessian

    def quantize(
        self, weight: Tensor, spec: QuantSpec, prepared: Tensor | None = None
    ) -> QuantizedLinear:
        """Quantize one weight matrix; see `Quantizer`."""
        groups = as_groups(weight, spec)
        scale, zero_point = GRIDS[self.clip](groups, spec)
        return QuantizedLinear(encode(groups, scale, zero_point, spec), scale, zero_point, spec)
