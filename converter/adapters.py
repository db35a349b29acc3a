"""Adapters: the low-rank corrections that RILQ trains beside frozen 2-bit linears.

A plain LoRA (`lora`) sees every input channel; merging it into 2-bit codes would throw it away. A
pooled adapter (`pooled`) sees only the sum of its input over each quantization group, and so is an
addition to the groups' minima, which the format stores: it merges without a loss.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor, nn

from rilq.converter.options import AdapterKind, is_target


@dataclass(frozen=True)
class AdapterSpec:
    """What adapters to put beside quantized linears.

    Attributes:
        kind: "pooled" merges exactly; "lora" is the paper's and stays beside the base.
        rank: columns of `B`; for a pooled adapter the effective rank is `min(rank, groups)`.
        alpha: the output is scaled by `alpha / rank`.
        seed: of the initial `A`.
        targets: which linears have one, see `is_target`.
    """

    kind: AdapterKind
    rank: int
    alpha: float
    seed: int
    targets: tuple[str, ...] = ("all",)

    def adapts(self, name: str) -> bool:
        """Whether the linear `name` has an adapter."""
        return any(is_target(target, name) for target in self.targets)

    @property
    def scaling(self) -> float:
        """The factor `c = alpha / rank` of the adapter's output."""
        return self.alpha / self.rank


class Adapter(nn.Module):
    """`c * B A f(x)`, with `f` the identity (LoRA) or the sum over each group (pooled).

    Args:
        spec: kind, rank, alpha, seed.
        name: full module name of the linear; with the seed it determines the initial `A`, so that
            the order in which adapters are made does not matter.
        group_size: of the linear's quantization; a pooled adapter sums over such groups.

    `A [rank, in_features or groups]` is drawn from N(0, (1/rank)^2), `B [out_features, rank]` is
    zero; both are float32 (in bfloat16 most updates to `A` would round away).

    Source: RILQ, Lee et al. 2025 (arXiv:2412.01129), reference code; pooling: QA-LoRA, Xu et al.
    2024 (arXiv:2309.14717), eq. 6, with a sum in the place of the mean.
    """

    def __init__(
        self,
        spec: AdapterSpec,
        name: str,
        *,
        out_features: int,
        in_features: int,
        group_size: int,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.spec, self.group_size = spec, group_size
        width = in_features // group_size if spec.kind == "pooled" else in_features
        # Drawn on the CPU: the same numbers on every device.
        generator = torch.Generator().manual_seed(_seed_of(spec.seed, name))
        a = torch.randn(spec.rank, width, generator=generator) / spec.rank
        self.a = nn.Parameter(a.to(device))
        self.b = nn.Parameter(torch.zeros(out_features, spec.rank, device=device))

    @property
    def pooled_over(self) -> int | None:
        """The group size that a pooled adapter sums over; None for a plain LoRA."""
        return self.group_size if self.spec.kind == "pooled" else None

    def forward(self, x: Tensor) -> Tensor:
        """The correction `[..., out_features]` for input `x [..., in_features]`."""
        if self.spec.kind == "pooled":
            x = x.unflatten(-1, (-1, self.group_size)).sum(-1)  # [..., groups]
        down = F.linear(x, self.a.to(x.dtype))
        return F.linear(down, (self.b * self.spec.scaling).to(x.dtype))

    def shift(self) -> Tensor:
        """What a pooled adapter adds to the minima: `c * B A`, `[out_features, groups]` float32."""
        return pooled_shift(self.a, self.b, self.spec)


def pooled_shift(a: Tensor, b: Tensor, spec: AdapterSpec) -> Tensor:
    """`c * B A`, `[out_features, groups]`: what a pooled adapter adds to its linear's minima.

    Source: QA-LoRA, Xu et al. 2024 (arXiv:2309.14717), section 3.3.
    """
    assert spec.kind == "pooled", "a plain LoRA is no addition to minima"
    return spec.scaling * (b @ a)


def plain_adapters(trained: Mapping[str, Tensor], group_size: int) -> dict[str, Tensor]:
    """Pooled adapters as the plain LoRAs that they are: `A P`, with `P x` the sums over groups.

    Args:
        trained: by `<linear>.<part>`; `a [rank, groups]` and `b` are taken.

    Returns:
        `<linear>.a [rank, in_features]`, and `<linear>.b` as it is.
    """
    plain = {}
    for name, value in trained.items():
        part = name.rpartition(".")[2]
        if part in ("a", "b"):
            plain[name] = value.repeat_interleave(group_size, dim=1) if part == "a" else value
    return plain


def learning_rate(hidden_size: int) -> float:
    """The default peak learning rate for a model of that width: `1e-4 * 4096 / hidden`.

    The paper's 1e-4 was found at hidden 4096. Adam moves every element of `A` and `B` by about
    the learning rate per step, and an output of a wider layer sums more of them, so the rate goes
    with 1 / width (maximal-update parametrization, Yang et al. 2022, arXiv:2203.03466). Capped at
    1e-2, for widths below any that was measured (docs/recipes.md).
    """
    return min(1e-2, 1e-4 * 4096 / hidden_size)


def scales_learning_rate(hidden_size: int) -> float:
    """The default peak learning rate of scales and minima: ten times that of adapters.

    They are trained relative to their size, and so move by this part of it per step. EfficientQAT
    (arXiv:2407.11062) trains the scales of models of width 4096 at about 1e-3 of their size; at
    widths 64 and 128 a rate of 1e-2 was the best of those tried (docs/recipes.md).
    """
    return min(1e-2, 10 * learning_rate(hidden_size))


def _seed_of(seed: int, name: str) -> int:
    digest = xxhash.xxh3_64_intdigest(f"{seed}:{name}".encode())
    return int(digest & ((1 << 63) - 1))


def parameter_count(spec: AdapterSpec, out_features: int, in_features: int, group_size: int) -> int:
    """Trained values of one adapter."""
    width = math.ceil(in_features / group_size) if spec.kind == "pooled" else in_features
    return spec.rank * (width + out_features)
