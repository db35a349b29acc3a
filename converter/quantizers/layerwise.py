"""Quantizers that are trained on what a whole decoder layer puts out, one layer at a time.

Each of them gives every linear a `LearnedWeight`: a differentiable function from a few tensors to
the quantized weight, with straight-through rounding. They are trained together so that the layer,
fed by the quantized layers before it, puts out what the full-precision layer did; then frozen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rilq.converter.options import Clip
from rilq.converter.quantizers.grid import (
    LARGEST_WEIGHT,
    as_groups,
    encode,
    grid_of_range,
)
from rilq.converter.quantizers.lsq import group_importance, start_grid
from rilq.converter.ranks import ALONE, Ranks
from rilq.errors import RilqError
from rilq.formats.packing import dequantize
from rilq.formats.spec import QuantizedLinear, QuantSpec

FEW_STEPS = 40  # fewer updates go less far instead of in leaps of whole codes


@dataclass(frozen=True)
class LayerTask:
    """A decoder layer to quantize, as far as a quantizer has to know it.

    Attributes:
        weight: of a linear by its name, `[out_features, in_features]` float32, full precision;
            asked for once, so that no more is in memory than is trained.
        specs: how each is quantized, by the linears' names.
        squares: mean squares `[in_features]` of each linear's inputs.
        run: the layer with some weights replaced: hidden states `[rows, seq_len, hidden]` and
            weights by name, to the layer's output; differentiable in the weights.
        batches: an endless order of training rows in batches, each in parts that fit the memory:
            pairs of the quantized prefix's hidden states and the full-precision layer's outputs.
        note: takes a line about this layer that the user should see.
        ranks: this process among those that share the rows of every batch.
    """

    weight: Callable[[str], Tensor]
    specs: Mapping[str, QuantSpec]
    squares: Mapping[str, Tensor]
    run: Callable[[Tensor, dict[str, Tensor]], Tensor]
    batches: Iterator[list[tuple[Tensor, Tensor]]]
    note: Callable[[str], None]
    ranks: Ranks = ALONE


@dataclass(frozen=True)
class LayerQuantizer:
    """How the linears of one decoder layer are trained together.

    Attributes:
        name: one of `LEARNED`.
        clip: the grid that training starts from.
        steps: updates for each decoder layer.
    """

    name: str
    clip: Clip
    steps: int

    def quantize_layer(self, task: LayerTask) -> dict[str, QuantizedLinear]:
        """Quantize all linears of a layer.

        Where training ends no better than it began, on the first batch and as stored, the start
        is kept: a few updates, or many bits, may gain nothing.

        Raises:
            InputError: the group size does not divide a linear's `in_features`.
            NonFiniteError: a weight holds NaN or infinity.
            RilqError: the loss is not finite.
        """
        learned = {
            name: LEARNED[self.name](
                *started(task.weight(name), spec, self.clip, task.squares[name], task.ranks)
            )
            for name, spec in task.specs.items()
        }
        start = _results(learned)
        first = next(task.batches)
        self._train(learned, task.run, chain([first], task.batches), task.ranks)
        end = _results(learned)
        after, before = (
            task.ranks.total(_error(task.run, first, linears)) for linears in (end, start)
        )
        if after < before:
            return end
        task.note(f"{self.name} gained nothing in {self.steps} updates: its start is kept")
        return start

    @torch.enable_grad()
    def _train(
        self,
        learned: Mapping[str, LearnedWeight],
        run: Callable[[Tensor, dict[str, Tensor]], Tensor],
        batches: Iterator[list[tuple[Tensor, Tensor]]],
        ranks: Ranks,
    ) -> None:
        groups = [group for each in learned.values() for group in each.groups(self.steps)]
        optimizer = learned_optimizer(self.name, groups)
        for step in range(self.steps):
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate_at(step, self.steps)
            optimizer.zero_grad(set_to_none=True)
            batch = next(batches)
            # Relative to the output's size, so that layers of any scale train alike.
            size = ranks.total(sum(wanted.float().square().sum().item() for _, wanted in batch))
            for hidden, wanted in batch:
                error = _add_gradients(learned, run, hidden, wanted, max(size, 1e-12))
                if not math.isfinite(error):
                    raise RilqError(
                        f"{self.name}: the layer's error is not finite at update {step}\n"
                        "  try --dtype float32 or bfloat16, or another --quantizer"
                    )
            ranks.add_gradients([p for group in groups for p in group["params"]])
            optimizer.step()


def _add_gradients(
    learned: Mapping[str, LearnedWeight],
    run: Callable[[Tensor, dict[str, Tensor]], Tensor],
    hidden: Tensor,
    wanted: Tensor,
    size: float,
) -> float:
    """Add a micro-batch's gradients, and return its share of the error.

    In a function of its own so that the weights that it ran with are gone before the next ones, and
    before the optimizer's temporaries.
    """
    weights = {name: each().to(hidden.dtype) for name, each in learned.items()}
    apart = run(hidden, weights).float() - wanted.float()
    loss = apart.square().sum() / size
    loss.backward()
    return loss.item()


@torch.no_grad()
def _results(learned: Mapping[str, LearnedWeight]) -> dict[str, QuantizedLinear]:
    return {name: each.result() for name, each in learned.items()}


@torch.no_grad()
def _error(
    run: Callable[[Tensor, dict[str, Tensor]], Tensor],
    batch: list[tuple[Tensor, Tensor]],
    linears: Mapping[str, QuantizedLinear],
) -> float:
    """Squared difference of the layer with these linears from what is wanted of it."""
    weights = {
        name: dequantize(each.codes, each.scale, each.zero_point) for name, each in linears.items()
    }
    total = 0.0
    for hidden, wanted in batch:
        given = {name: weight.to(hidden.dtype) for name, weight in weights.items()}
        total += (run(hidden, given).float() - wanted.float()).square().sum().item()
    return total


def rate_at(step: int, steps: int) -> float:
    """Part of the peak rate: a warm-up over a twentieth of the steps, then a cosine to zero."""
    return min((step + 1) / max(1, round(0.05 * steps)), (1 + math.cos(math.pi * step / steps)) / 2)


def rate_of(path: float, steps: int) -> float:
    """Peak rate for a path of so many codes, or factors, over all updates."""
    return path / max(steps, FEW_STEPS)


def learned_optimizer(name: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Adam; for `signround` plain descent along the gradient's sign, as its authors have it."""
    return SignDescent(groups) if name == "signround" else torch.optim.Adam(groups, foreach=True)


class SignDescent(torch.optim.Optimizer):
    """`p -= lr * sign(gradient)`, kept within the group's `bounds`."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad.sign(), alpha=group["lr"])
                    parameter.clamp_(*group["bounds"])


def started(
    weight: Tensor, spec: QuantSpec, clip: Clip, squares: Tensor, ranks: Ranks = ALONE
) -> tuple[QuantSpec, Tensor, Tensor, Tensor]:
    """What `LearnedWeight` begins with; every process finds the grid of its share of the rows.

    Args:
        weight: `[out_features, in_features]`.
        spec: bits, group size, kind of zero-point.
        clip: the grid to start from.
        squares: mean squares of the inputs, `[in_features]`.
        ranks: this process among those that were given the same weight.
    """
    groups = as_groups(weight, spec).clamp(-LARGEST_WEIGHT, LARGEST_WEIGHT)
    importance = group_importance(squares, groups)

    def grid(rows: slice) -> tuple[Tensor, Tensor]:
        return start_grid(groups[rows], spec, clip, importance)

    scale, zero_point = ranks.by_rows(len(groups), grid)
    return spec, groups, scale, zero_point


class LearnedWeight(nn.Module):
    """A weight on its way to codes: trained tensors, and what they stand for.

    Args:
        spec: bits, group size, kind of zero-point.
        weight: `[out_features, groups, group_size]` float32.
        scale, zero_point: the grid to start from, `[out_features, groups]` float16.

    Attributes:
        COPIES: float32 values for each weight that are in memory from one update to the next
            backward pass, the optimizer's among them; gradients are not.
        scale, low: of the starting grid, as stored, `[out_features, groups]` float32.
    """

    COPIES: ClassVar[int]
    scale: Tensor
    low: Tensor

    def __init__(self, spec: QuantSpec, weight: Tensor, scale: Tensor, zero_point: Tensor) -> None:
        super().__init__()
        self.spec, self.scale = spec, scale.float()
        self.low = -self.scale * zero_point.float()

    def forward(self) -> Tensor:
        """The quantized weight `[out_features, in_features]` float32, differentiable."""
        codes, scale, low = self.parts()
        return (codes * scale[..., None] + low[..., None]).flatten(1)

    @property
    def _reach(self) -> float:
        """A factor's effect at 2 bits over that at this spec's: it moves the last code the most."""
        return 3 / self.spec.max_code

    def _lowest(self, scale: Tensor, low: Tensor) -> Tensor:
        """What code 0 stands for, where zero-points must be codes: the nearest such value."""
        if self.spec.zero_point == "real":
            return low
        return -scale * round_through((-low / scale).clamp(0, self.spec.max_code))

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes as floats `[out, groups, group_size]`; scale and lowest value `[out, groups]`."""
        raise NotImplementedError

    def groups(self, steps: int) -> list[dict[str, Any]]:
        """Parameter groups for the optimizer, each with its `peak` rate."""
        raise NotImplementedError

    def result(self) -> QuantizedLinear:
        """Frozen: the stored grid nearest to the learned one, and on it the learned values.

        These keep their codes, unless float16 could not hold the learned grid.
        """
        codes, scale, low = self.parts()
        values = codes * scale[..., None] + low[..., None]
        stored = grid_of_range(low, low + scale * self.spec.max_code, self.spec)
        return QuantizedLinear(encode(values, *stored, self.spec), *stored, self.spec)

    def _rounded(self, steps: Tensor) -> Tensor:
        """Nearest codes of real-valued ones; gradients pass where nothing is clipped."""
        return round_through(steps.clamp(0, self.spec.max_code))


class LearnedCodes(LearnedWeight):
    """`blockap`: weights, scales and minima are all trained.

    The weights are trained as real-valued codes, in steps of the grid they start from, so that
    one learning rate serves weights of any size; so are scales (by a factor) and minima.

    Source: EfficientQAT's Block-AP, Chen et al. 2024 (arXiv:2407.11062), section 3.2.
    """

    COPIES = 5  # the codes with two moments, rounded, and the weight they make
    # What an element can move in all, in steps (weights, minima) or as a factor (scales), is about
    # half of `peak * updates`. Found on models of 0.3 and 1.4 million weights: docs/recipes.md.
    WEIGHT_PATH, GRID_PATH = 5.0, 2.0

    def __init__(self, spec: QuantSpec, weight: Tensor, scale: Tensor, zero_point: Tensor) -> None:
        super().__init__(spec, weight, scale, zero_point)
        steps = (weight - self.low[..., None]) / self.scale[..., None]
        self.codes = nn.Parameter(steps)
        self.log_scale = nn.Parameter(torch.zeros_like(self.scale))
        self.offset = nn.Parameter(torch.zeros_like(self.scale))

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """See `LearnedWeight`."""
        scale = self.scale * self.log_scale.exp()
        low = self._lowest(scale, self.low + self.scale * self.offset)
        return self._rounded(self.codes), scale, low

    def groups(self, steps: int) -> list[dict[str, Any]]:
        """See `LearnedWeight`."""
        return [
            {"params": [self.codes], "peak": rate_of(self.WEIGHT_PATH, steps)},
            {"params": [self.offset], "peak": rate_of(self.GRID_PATH, steps)},
            {"params": [self.log_scale], "peak": rate_of(self.GRID_PATH, steps) * self._reach},
        ]


class LearnedRounding(LearnedWeight):
    """`signround`: an offset of at most half a step for each weight, and the ends of each range.

    Source: AutoRound, Cheng et al. 2023 (arXiv:2309.05516), with real-valued zero-points and a
    least-squares grid to start from.
    """

    COPIES = 6  # the weight and its offset; in steps, with the offset, rounded, and as a weight

    def __init__(self, spec: QuantSpec, weight: Tensor, scale: Tensor, zero_point: Tensor) -> None:
        super().__init__(spec, weight, scale, zero_point)
        self.weight = weight
        self.rounding = nn.Parameter(torch.zeros_like(weight))
        # The two ends, as parts of half the starting range away from its middle.
        self.ends = nn.Parameter(torch.ones(2, *self.scale.shape, device=self.scale.device))

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """See `LearnedWeight`."""
        half = self.scale * self.spec.max_code / 2
        middle = self.low + half
        low = middle - half * self.ends[0]
        scale = half * (self.ends[0] + self.ends[1]) / self.spec.max_code
        low = self._lowest(scale, low)
        steps = (self.weight - low[..., None]) / scale[..., None]
        # Rounded before it is clipped: an offset must be able to leave the last code.
        codes = round_through(steps + self.rounding).clamp(0, self.spec.max_code)
        return codes, scale, low

    def groups(self, steps: int) -> list[dict[str, Any]]:
        """See `LearnedWeight`."""
        return [
            {"params": [self.rounding], "peak": rate_of(2.0, steps), "bounds": (-0.5, 0.5)},
            {
                "params": [self.ends],
                "peak": rate_of(2.0, steps) * self._reach,
                "bounds": (0.5, 1.5),
            },
        ]


class LearnedClipping(LearnedWeight):
    """`lwc`: both ends of each group's range shrink by a learned factor.

    Source: OmniQuant's learnable weight clipping, Shao et al. 2023 (arXiv:2308.13137), eq. 2.
    """

    COPIES = 5  # the weight; in steps, rounded, clamped, and as a weight
    START = 4.0  # sigmoid(4) = 0.98: nearly the whole range
    RATE = 1e-2  # at the paper's thousands of updates; more where there are fewer

    def __init__(self, spec: QuantSpec, weight: Tensor, scale: Tensor, zero_point: Tensor) -> None:
        super().__init__(spec, weight, scale, zero_point)
        self.weight = weight
        start = torch.full((2, *self.scale.shape), self.START, device=self.scale.device)
        self.ends = nn.Parameter(start)

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """See `LearnedWeight`."""
        low, high = torch.aminmax(self.weight, dim=-1)
        shrink = self.ends.sigmoid()
        low, high = low * shrink[0], high * shrink[1]
        floor = torch.finfo(torch.float16).tiny
        scale = ((high - low) / self.spec.max_code).clamp(min=floor)
        low = self._lowest(scale, low)
        return self._rounded((self.weight - low[..., None]) / scale[..., None]), scale, low

    def groups(self, steps: int) -> list[dict[str, Any]]:
        """See `LearnedWeight`."""
        return [{"params": [self.ends], "peak": max(self.RATE, 10.0 / steps)}]

    def result(self) -> QuantizedLinear:
        """See `LearnedWeight`; nearest codes on the stored grid."""
        _, scale, low = self.parts()
        stored = grid_of_range(low, low + scale * self.spec.max_code, self.spec)
        return QuantizedLinear(encode(self.weight, *stored, self.spec), *stored, self.spec)


LEARNED: dict[str, type[LearnedWeight]] = {
    "lwc": LearnedClipping,
    "signround": LearnedRounding,
    "blockap": LearnedCodes,
}


class _RoundThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def round_through(x: Tensor) -> Tensor:
    """`x.round()` whose gradient is that of `x` itself (straight-through).

    Source: Bengio et al. 2013 (arXiv:1308.3432).
    """
    return _RoundThrough.apply(x)  # type: ignore[no-any-return, no-untyped-call]
