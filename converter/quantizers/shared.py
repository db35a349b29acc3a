"""The rows of a weight, which no quantizer makes depend on each other, shared by processes."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from rilq.converter.quantizers import Quantizer
from rilq.converter.ranks import Ranks
from rilq.formats.spec import QuantizedLinear, QuantSpec


@dataclass(frozen=True)
class SharedQuantizer:
    """A quantizer of whose rows every process quantizes its share; see `Quantizer`.

    Attributes:
        own: what quantizes a share.
        ranks: this process among those that were given the same weight.
    """

    own: Quantizer
    ranks: Ranks

    @property
    def name(self) -> str:
        """See `Quantizer`."""
        return self.own.name

    @property
    def needs_hessian(self) -> bool:
        """See `Quantizer`."""
        return self.own.needs_hessian

    def prepare(self, hessian: Tensor, warn: Callable[[str], None]) -> Tensor:
        """See `Quantizer`; every process for itself."""
        return self.own.prepare(hessian, warn)

    def quantize(
        self, weight: Tensor, spec: QuantSpec, prepared: Tensor | None = None
    ) -> QuantizedLinear:
        """Quantize one weight matrix; see `Quantizer`."""

        def share(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
            part = self.own.quantize(weight[rows], spec, prepared)
            return part.codes, part.scale, part.zero_point

        codes, scale, zero_point = self.ranks.by_rows(len(weight), share)
        return QuantizedLinear(codes, scale, zero_point, spec)
