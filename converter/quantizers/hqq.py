"""Half-quadratic quantization: zero-points for an error with few large values, without data."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rilq.converter.quantizers.grid import LARGEST_SCALE, as_groups, encode, minmax_grid, row_chunks
from rilq.formats.spec import QuantizedLinear, QuantSpec


@dataclass(frozen=True)
class HqqQuantizer:
    """Minimise `|W - What|_p^p`, p < 1, over the zero-points; scales span the extremes.

    The error is split into a part that a heavy-tailed prior explains (shrunk in closed form) and
    the rest, for which the zero-point is a mean; the two are solved in turn while the penalty
    that ties them grows. A group keeps the zero-point of its least error.

    Attributes:
        norm: `p`.
        penalty, growth: of the split, at the start and its factor per turn; in weights of the
            size that a language model has. Weights are scaled to a group's step first, so that
            they do not depend on it.
        turns: at most.

    Source: HQQ, Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning
    Models"; settings of its released code.
    """

    norm: float = 0.7
    penalty: float = 10.0
    growth: float = 1.01
    turns: int = 20

    name = "hqq"
    needs_hessian = False

    def prepare(self, hessian: Tensor, warn: Callable[[str], None]) -> Tensor:
        """Nothing: the Hessian is not looked at."""
        return hessian

    def quantize(
        self, weight: Tensor, spec: QuantSpec, prepared: Tensor | None = None
    ) -> QuantizedLinear:
        """Quantize one weight matrix; see `Quantizer`."""
        groups = as_groups(weight, spec)
        rows, count, size = groups.shape
        scale, zero_point = minmax_grid(groups, spec)
        for chunk in row_chunks(rows, count * size, groups.device):
            steps = groups[chunk] / scale[chunk].float()[..., None]
            zero_point[chunk] = self._zero_points(steps, zero_point[chunk], spec)
        return QuantizedLinear(encode(groups, scale, zero_point, spec), scale, zero_point, spec)

    def _zero_points(self, steps: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
        """The best zero-point of each group, float16.

        Args:
            steps: weights in units of their group's step, `[rows, groups, group_size]`.
            zero_point: where to begin, `[rows, groups]`.
        """
        zero = best = zero_point.float()
        least = self._error(steps, best, spec)
        penalty = self.penalty
        for _ in range(self.turns):
            codes = (steps + zero[..., None]).round_().clamp_(0, spec.max_code)
            error = steps - (codes - zero[..., None])
            size = error.abs()
            # The proximal step of |x|^p, p < 1: small errors vanish, large ones stay.
            shrunk = size - size.clamp(min=1e-8).pow(self.norm - 1) / penalty
            sparse = error.sign() * shrunk.clamp(min=0)
            zero = (codes - (steps - sparse)).mean(-1)
            if spec.zero_point == "integer":
                zero = zero.round().clamp(0, spec.max_code)
            stored = zero.clamp(-LARGEST_SCALE, LARGEST_SCALE).to(torch.float16).float()
            found = self._error(steps, stored, spec)
            best = torch.where(found < least, stored, best)
            least = torch.minimum(found, least)
            penalty *= self.growth
        return best.to(torch.float16)

    def _error(self, steps: Tensor, zero: Tensor, spec: QuantSpec) -> Tensor:
        """`|W - What|_p^p` of each group, in units of its step."""
        codes = (steps + zero[..., None]).round_().clamp_(0, spec.max_code)
        return (steps - (codes - zero[..., None])).abs_().pow_(self.norm).sum(-1)
