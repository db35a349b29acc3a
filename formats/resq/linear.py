"""Linears that quantize their input when they run: over packed weights, and over dense ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rilq.formats.packed_linear import KeptBuffers
from rilq.formats.resq.hadamard import kronecker_apply
from rilq.formats.resq.integer import integer_product, integers_work
from rilq.formats.resq.parts import Parts
from rilq.formats.resq.quantizer import quantize_dequantize, quantize_vectors
from rilq.formats.resq.weight import dense_weight, unpack_weight, words_of


class QuantizedInputLinear(KeptBuffers, nn.Linear):
    """A linear whose input is quantized per token (and head), each part on a grid of its own.

    Its weight is dense, and of the transformed input where there is a transform: `W H`.

    Attributes:
        parts, heads: how the input channels are split, see `ResqWeight`.
        hadamard_0, hadamard_1, ...: factors of the input's transform, float32; or none.
        quantizes: False leaves the input as it is.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        parts: Parts,
        *,
        heads: int = 1,
        hadamard: Sequence[int] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Allocate the tensors, unset.

        Raises:
            ValueError: parts or factors that do not fit the input.
        """
        nn.Module.__init__(self)  # nn.Linear's own would allocate a weight, and fill it
        size = 1
        for factor in hadamard:
            size *= factor
        if parts.size * heads != in_features or (hadamard and size != in_features):
            raise ValueError(
                f"in_features {in_features}, but parts of {parts.size} channels for each of "
                f"{heads} heads and a transform of size {size}"
            )
        self.in_features, self.out_features = in_features, out_features
        self.parts, self.heads, self.quantizes = parts, heads, True
        self._factors = len(hadamard)
        self._allocate(device, dtype)
        own = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.register_parameter("bias", None if own is None else nn.Parameter(own, False))
        names = tuple(f"hadamard_{number}" for number in range(len(hadamard)))
        for name, order in zip(names, hadamard, strict=True):
            matrix = torch.empty(order, order, dtype=torch.float32, device=device)
            self.register_buffer(name, matrix)
        self.kept_buffers = (*self.kept_buffers, *names)

    def _allocate(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        shape = (self.out_features, self.in_features)
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device=device), False)

    def reset_parameters(self) -> None:
        """Nothing: weights are loaded, never drawn."""

    @property
    def hadamard(self) -> list[Tensor]:
        """The factors of the input's transform."""
        return [self.get_buffer(f"hadamard_{number}") for number in range(self._factors)]

    def transformed(self, x: Tensor) -> Tensor:
        """The input as it is quantized: after the transform, `[..., heads, parts.size]`."""
        if self._factors:
            x = kronecker_apply(x, [factor.to(x.dtype) for factor in self.hadamard])
        return x.reshape(*x.shape[:-1], self.heads, self.parts.size)

    def quantized_input(self, x: Tensor) -> Tensor:
        """What meets the weight, of the input `[..., in_features]`; the gradient is passed on."""
        x = self.transformed(x)
        return (quantize_dequantize(x, self.parts) if self.quantizes else x).flatten(-2)

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight that the quantized input meets, `[out_features, in_features]`."""
        return self.weight.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(self.quantized_input(x), self.dense_weight(x.dtype), bias)

    def extra_repr(self) -> str:
        """As the dense module shows itself, with the parts."""
        shown = f"{super().extra_repr()}, bits={self.parts.bits}, widths={self.parts.widths}"
        return shown + (f", heads={self.heads}" if self.heads > 1 else "")


class ResqLinear(QuantizedInputLinear):
    """A `QuantizedInputLinear` over packed codes.

    On a GPU, where no gradient is wanted, codes are multiplied with codes (`integer_product`);
    else both sides are dequantized and multiplied as floats.

    Attributes:
        weight: `[out_features, words]` int32 parameter without gradient, see weight.py.
        weight_scale: `[out_features, parts]` float16.
        bias: `[out_features]` or None.
    """

    kept_buffers = ("weight_scale",)
    weight_scale: Tensor

    def _allocate(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        shape = (self.out_features, sum(words_of(self.parts, self.heads)))
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.int32, device=device), False)
        scales = (self.out_features, len(self.parts.bits))
        scale = torch.empty(scales, dtype=torch.float16, device=device)
        self.register_buffer("weight_scale", scale)

    def codes(self) -> Tensor:
        """The weight's codes `[out_features, in_features]` int8."""
        return unpack_weight(self.weight, self.parts, self.heads)

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight `[out_features, in_features]`."""
        return dense_weight(self.codes(), self.weight_scale, self.parts, self.heads, dtype)

    def dense(self, dtype: torch.dtype) -> QuantizedInputLinear:
        """The same linear with its weight dequantized once; its input is quantized still."""
        factors = self.hadamard
        made = QuantizedInputLinear(
            self.in_features,
            self.out_features,
            self.parts,
            heads=self.heads,
            hadamard=[len(factor) for factor in factors],
            device="meta",
            dtype=dtype,
        )
        made.weight = nn.Parameter(self.dense_weight(dtype), requires_grad=False)
        made.bias = self.bias
        for number, factor in enumerate(factors):
            made.register_buffer(f"hadamard_{number}", factor)
        return made.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        wants_gradient = torch.is_grad_enabled() and x.requires_grad
        if x.is_cuda and self.quantizes and not wants_gradient and integers_work("cuda"):
            return self.forward_in_integers(x)
        return super().forward(x)

    def forward_in_integers(self, x: Tensor) -> Tensor:
        """`forward` without a gradient, by products of codes with codes."""
        vectors = quantize_vectors(self.transformed(x).flatten(0, -3), self.parts)
        out = integer_product(vectors, self.codes(), self.weight_scale, self.parts, x.dtype)
        if self.bias is not None:
            out += self.bias.to(x.dtype)
        return out.reshape(*x.shape[:-1], self.out_features)
