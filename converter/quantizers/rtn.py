"""Round to nearest: each group by itself, no data. Plain, it is the zero of every gap figure."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from rilq.converter.options import Clip
from rilq.converter.quantizers.grid import as_groups, encode
from rilq.converter.quantizers.lsq import start_grid
from rilq.formats.spec import QuantizedLinear, QuantSpec


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

    def prepare(self, hessian: Tensor, warn: Callable[[str], None]) -> Tensor:
        """Nothing: the Hessian is not looked at."""
        return hessian

    def quantize(
        self, weight: Tensor, spec: QuantSpec, prepared: Tensor | None = None
    ) -> QuantizedLinear:
        """Quantize one weight matrix; see `Quantizer`."""
        groups = as_groups(weight, spec)
        scale, zero_point = start_grid(groups, spec, self.clip)
        return QuantizedLinear(encode(groups, scale, zero_point, spec), scale, zero_point, spec)
