"""Arrays in, arrays out: from a weight matrix to codes, scales and zero-points.

A quantizer knows nothing of layers, files or devices; a new one is a class with the members of
`Quantizer` and a line in `build_quantizer`.
"""

from typing import Protocol

from torch import Tensor

from rilq.converter.options import DEFAULT_CLIP, QUANTIZERS, Clip
from rilq.converter.quantizers.gptq import GptqQuantizer
from rilq.converter.quantizers.rtn import RtnQuantizer
from rilq.errors import OptionError
from rilq.formats.spec import QuantizedLinear, QuantSpec

__all__ = ["QUANTIZERS", "Clip", "Quantizer", "build_quantizer"]


class Quantizer(Protocol):
    """One way to choose codes, scales and zero-points.

    Attributes:
        name: as the user writes it.
        needs_hessian: whether `quantize` must be given what `prepare` makes of the Hessian.
    """

    @property
    def name(self) -> str: ...

    @property
    def needs_hessian(self) -> bool: ...

    def prepare(self, hessian: Tensor) -> Tensor:
        """What `quantize` needs of the Hessian; once for all linears that share the input.

        Args:
            hessian: `X^T X`, `[in_features, in_features]` float32, in any scale; not changed.

        Raises:
            RilqError: the Hessian cannot be used.
        """
        ...

    def quantize(
        self, weight: Tensor, spec: QuantSpec, prepared: Tensor | None = None
    ) -> QuantizedLinear:
        """Quantize one weight matrix, on the device of the weight.

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


def build_quantizer(name: str, *, clip: Clip | None = None) -> Quantizer:
    """The quantizer of that name.

    Args:
        name: one of `QUANTIZERS`.
        clip: "none" takes each group's range from its extremes, "search" shrinks it for the
            least squared error; None takes `DEFAULT_CLIP`.

    Raises:
        OptionError: unknown name or clip.
    """
    if clip not in (None, "none", "search"):
        raise OptionError(f"clip: expected none or search, found {clip!r}")
    if name not in QUANTIZERS:
        raise OptionError(f"quantizer: expected one of {', '.join(QUANTIZERS)}; found {name!r}")
    clip = clip or DEFAULT_CLIP[name]
    return RtnQuantizer(clip) if name == "rtn" else GptqQuantizer(clip)
