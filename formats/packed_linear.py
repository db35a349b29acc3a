"""A linear layer over packed codes, as a differentiable function and as a torch module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from rilq.formats.packing import dequantize_packed, stored_codes
from rilq.formats.spec import QuantSpec

CHUNK = 1 << 24  # weights that are dequantized together: 64 MB in float32


class _PackedLinear(torch.autograd.Function):
    """`x @ W^T + bias`, W dequantized anew in each direction so that no dense copy is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        words: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        bias: Tensor | None,
        bits: int,
    ) -> Tensor:
        trains_groups = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        # The input is needed for the gradients of scale and zero-point only.
        ctx.save_for_backward(words, scale, zero_point, x if trains_groups else None)
        ctx.bits = bits
        weight = dequantize_packed(words, scale, zero_point, bits, dtype=x.dtype)
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        words, scale, zero_point, x = ctx.saved_tensors
        grad_x = grad_scale = grad_zero = grad_bias = None
        if ctx.needs_input_grad[0]:
            weight = dequantize_packed(words, scale, zero_point, ctx.bits, dtype=grad.dtype)
            grad_x = grad @ weight
        if x is not None:
            grad_scale, grad_zero = _group_gradients(grad, x, words, scale, zero_point, ctx.bits)
        if ctx.needs_input_grad[4]:
            grad_bias = grad.flatten(0, -2).sum(0)
        return grad_x, None, grad_scale, grad_zero, grad_bias, None


def _group_gradients(
    grad: Tensor, x: Tensor, words: Tensor, scale: Tensor, zero_point: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """Gradients of scale and zero-point, `[out, groups]` each, from W = scale * (code - zero)."""
    groups = scale.shape[1]
    by_scale, by_zero = torch.empty_like(scale), torch.empty_like(zero_point)
    grad, x = grad.flatten(0, -2), x.flatten(0, -2).float()
    for part in row_chunks(scale.shape[0], x.shape[1]):
        full = grad[:, part].T.float() @ x  # dL/dW, [rows, in]
        codes = stored_codes(words[part], bits).float().unflatten(1, (groups, -1))
        full = full.unflatten(1, (groups, -1))
        by_scale[part] = (full * (codes - zero_point[part].float()[..., None])).sum(-1)
        by_zero[part] = -scale[part].float() * full.sum(-1)
    return by_scale, by_zero


def packed_linear(
    x: Tensor, words: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None, bits: int
) -> Tensor:
    """A linear layer over packed codes, differentiable in all its floating-point inputs.

    Args:
        x: `[..., in_features]`; the weight is dequantized to its dtype (under autocast: to
            autocast's dtype), and the sum accumulates as in `F.linear`.
        words: `[out_features, in_features * bits / 32]` int32, or codes as of `stored_codes`.
        scale: `[out_features, groups]`, any float dtype.
        zero_point: `[out_features, groups]`, any float dtype.
        bias: `[out_features]` or None.
        bits: 2, 3, 4 or 8.

    Returns:
        `[..., out_features]`, in the dtype of the computation.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    result: Tensor = _PackedLinear.apply(x, words, scale, zero_point, bias, bits)  # type: ignore[no-untyped-call]
    return result


class KeptBuffers(nn.Module):
    """A module with buffers whose dtype stays what it is, whatever the module is cast to.

    Attributes:
        kept_buffers: names of these.
        shapes: of its tensors, where transformers loads it.
    """

    kept_buffers: tuple[str, ...] = ()
    shapes: Mapping[str, tuple[int, ...]] = MappingProxyType({})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeptBuffers:
        """Move like any module, but keep the dtype of some buffers."""
        kept = {name: self._buffers.pop(name) for name in self.kept_buffers}
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            for name, old in kept.items():
                moved = fn(old)  # type: ignore[arg-type]
                kept[name] = moved if moved.dtype == old.dtype else old.to(moved.device)  # type: ignore[union-attr]
        finally:
            self._buffers.update(kept)
        return self


class PackedModule(KeptBuffers):
    """A module whose weight is packed codes, with a scale and a zero-point for each group.

    Scale and zero-point are buffers and stay float16 whatever the module is cast to: bfloat16 has
    three bits less, so `.to(torch.bfloat16)` would quietly change the weights.

    Attributes:
        weight: `[rows, width * bits / 32]` int32 parameter without gradient.
        weight_scale, zero_point: `[rows, width / group_size]` float16.
    """

    kept_buffers: tuple[str, ...] = ("weight_scale", "zero_point")

    weight: Tensor
    weight_scale: Tensor
    zero_point: Tensor
    bits: int
    group_size: int

    def _allocate(
        self, rows: int, width: int, spec: QuantSpec, device: torch.device | str | None
    ) -> None:
        """Allocate the tensors, unset.

        Raises:
            ValueError: `width` is not a multiple of the group size.
        """
        if width % spec.group_size:
            raise ValueError(
                f"in_features {width} is not a multiple of group size {spec.group_size}"
            )
        self.bits, self.group_size = spec.bits, spec.group_size
        words, groups = (rows, width * spec.bits // 32), (rows, width // spec.group_size)
        self.weight = nn.Parameter(torch.empty(words, dtype=torch.int32, device=device), False)
        for name in self.kept_buffers:
            self.register_buffer(name, torch.empty(groups, dtype=torch.float16, device=device))

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight `[rows, width]`; beside it, memory for a bounded part of it."""
        rows, words = self.weight.shape
        dense = torch.empty(rows, words * 32 // self.bits, dtype=dtype, device=self.weight.device)
        for part in row_chunks(*dense.shape):
            dense[part] = dequantize_packed(
                self.weight[part],
                self.weight_scale[part],
                self.zero_point[part],
                self.bits,
                dtype=dtype,
            )
        return dense

    def reset_parameters(self) -> None:
        """Nothing: codes are loaded, never drawn."""

    def extra_repr(self) -> str:
        """As the dense module shows itself, with bits and group size."""
        return f"{super().extra_repr()}, bits={self.bits}, group_size={self.group_size}"


def row_chunks(rows: int, width: int) -> Iterator[slice]:
    """Slices of the rows of a matrix, of at most `CHUNK` values each (but at least one row)."""
    step = max(1, CHUNK // width)
    for start in range(0, rows, step):
        yield slice(start, start + step)


class RilqLinear(PackedModule, nn.Linear):
    """A linear over packed codes; an `nn.Linear`, because PEFT adapts no other kind of module.

    Only inputs and adapters can be trained; the codes are integers.

    Attributes:
        weight: `[out_features, in_features * bits / 32]` int32 parameter without gradient.
        weight_scale, zero_point: `[out_features, in_features / group_size]` float16.
        bias: `[out_features]` or None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spec: QuantSpec,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Allocate the tensors, unset; `dtype` is the bias's.

        Raises:
            ValueError: `in_features` is not a multiple of the group size.
        """
        nn.Module.__init__(self)  # nn.Linear's own would allocate a dense weight
        self.in_features, self.out_features = in_features, out_features
        self._allocate(out_features, in_features, spec, device)
        own = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.register_parameter("bias", None if own is None else nn.Parameter(own, False))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        return packed_linear(
            x, self.weight, self.weight_scale, self.zero_point, self.bias, self.bits
        )
