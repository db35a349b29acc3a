"""Low-rank corrections in closed form: arrays in, arrays out.

A correction of rank `r` is two factors `B [out, r]` and `A [r, in]` to be added to a weight as
`B A`. Of a pooled adapter `A` is `[r, groups]`, and `B A` is added to every channel of its group:
with `P [in, groups]`, 1 where the channel is in the group, that is `B A P^T`.

The factors are those of the product's own singular value decomposition, with the root of each
singular value on either side.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]
T = TypeVar("T")

LOFTQ_ROUNDS = 5  # of LoftQ's released code
NORMAL_QUANTILE = 0.9677083  # of the largest level, in QLoRA's and LoftQ's released code


def svd_adapter(error: Tensor, rank: int) -> Factors:
    """Minimise `|E - B A|` (Frobenius); the factors of a larger rank begin with these.

    Args:
        error: `E [out_features, in_features]`, float32 or float64.
        rank: columns of `B`, fewer where `E` has fewer rows or columns.
    """
    return _projected(error, rank, lambda rows: rows @ rows.T)


def weighted_svd_adapter(error: Tensor, hessian: Tensor, rank: int) -> Factors:
    """Minimise `tr((E - B A) H (E - B A)^T)`: the squared error of the outputs, `H = X^T X`.

    With any root `H = L L^T` this is the truncated decomposition of `E L`, times the inverse of
    `L`. That equals `U U^T E`, `U` the first eigenvectors of `E H E^T`: no root and no inverse are
    formed, so that a singular `H` needs no damping.

    Args:
        error: `E [out_features, in_features]`, float32 or float64.
        hessian: `H [in_features, in_features]`, symmetric, positive semidefinite, in any scale.
        rank: as of `svd_adapter`.

    Source: the minimum that EoRA, Liu et al. 2024 (arXiv:2410.21271), finds from the
    eigenvectors of `H`.
    """
    hessian = hessian.to(error.dtype)
    return _projected(error, rank, lambda rows: rows @ hessian @ rows.T)


def pooled_error(error: Tensor, group_size: int, hessian: Tensor | None = None) -> Tensor:
    """The matrix `C` whose pooled correction `C P^T` comes nearest to `E`, of any rank.

    Without a Hessian the means of the groups; with one the generalised least squares
    `C = E H P M^-1`, `M = P^T H P`. The error of any other `D` exceeds that of `C` by
    `tr((C - D) M (C - D)^T)`, and so the best pooled factors of a rank are
    `svd_adapter(C, rank)` or `weighted_svd_adapter(C, M, rank)`.

    Args:
        error: `E [out_features, in_features]`.
        hessian: `H [in_features, in_features]`; None for the identity.

    Returns:
        `C [out_features, in_features / group_size]`, in the dtype of `error`.
    """
    if hessian is None:
        means: Tensor = error.unflatten(1, (-1, group_size)).mean(-1)
        return means
    pooled = hessian.to(error.dtype).unflatten(1, (-1, group_size)).sum(-1)  # H P [in, groups]
    metric = pooled_hessian(hessian, group_size).to(torch.float64)
    # A pseudo-inverse: channels that are never used leave M singular, and E H P in its range.
    inverse = torch.linalg.pinv(metric, hermitian=True)
    found: Tensor = (error @ pooled).to(torch.float64) @ inverse
    return found.to(error.dtype)


def pooled_hessian(hessian: Tensor, group_size: int) -> Tensor:
    """`P^T H P`, the Hessian of the pooled inputs, `[groups, groups]`."""
    rows = hessian.unflatten(0, (-1, group_size)).sum(1)  # [groups, in]
    found: Tensor = rows.unflatten(1, (-1, group_size)).sum(2)
    return found


def closed_form(
    error: Tensor, rank: int, *, group_size: int | None = None, hessian: Tensor | None = None
) -> Factors:
    """The best factors of a rank: plain or, with a group size, pooled; weighted with a Hessian."""
    if group_size is not None:
        error = pooled_error(error, group_size, hessian)
        hessian = None if hessian is None else pooled_hessian(hessian, group_size)
    if hessian is None:
        return svd_adapter(error, rank)
    return weighted_svd_adapter(error, hessian, rank)


def correction(b: Tensor, a: Tensor, group_size: int | None = None) -> Tensor:
    """What the factors add to a weight, `[out_features, in_features]`."""
    product = b @ a
    return product if group_size is None else product.repeat_interleave(group_size, dim=1)


def loftq(
    weight: Tensor,
    quantize: Callable[[Tensor], tuple[T, Tensor]],
    rank: int,
    *,
    group_size: int | None = None,
    rounds: int = LOFTQ_ROUNDS,
) -> tuple[T, Factors]:
    """Alternate `What = quantize(W - B A)` and `B A` = the best factors of `W - What`.

    One round is the plain decomposition of the quantization error. Later ones need not be better
    (each quantization starts anew), so the round that comes nearest to `W` is kept.

    Args:
        weight: `W [out_features, in_features]`, float32 or float64.
        quantize: gives anything, and the weight that it stands for.
        group_size: of pooled factors; None for plain ones.

    Returns:
        What `quantize` gave in the best round, and the factors that belong to it.

    Source: LoftQ, Li et al. 2023 (arXiv:2310.08659), algorithm 1.
    """
    assert rounds > 0, "nothing is quantized in no round"
    added = torch.zeros_like(weight)
    tried: list[tuple[float, T, Factors]] = []
    for _ in range(rounds):
        quantized, value = quantize(weight - added)
        factors = closed_form(weight - value, rank, group_size=group_size)
        added = correction(*factors, group_size)
        left = torch.linalg.vector_norm(weight - value - added).item()
        if not tried or left < tried[0][0]:
            tried = [(left, quantized, factors)]
    return tried[0][1:]


def normal_levels(bits: int) -> Tensor:
    """The levels of NormalFloat, normal quantiles, in ascending order: `[2**bits]` float64.

    Zero is one of them and both ends are at 1, so that there is one more positive level than
    negative ones; of 2 bits: -1, 0, 0.338, 1. (The released code has a symmetric kind without a
    zero too, which it does not use.)

    Source: `create_normal_map` in LoftQ's released code, after QLoRA (arXiv:2305.14314).
    """
    half = 2 ** (bits - 1)
    positive, negative = (
        torch.special.ndtri(torch.linspace(NORMAL_QUANTILE, 0.5, n, dtype=torch.float64)[:-1])
        for n in (half + 1, half)
    )
    levels = torch.cat([-negative, torch.zeros(1, dtype=torch.float64), positive.flip(0)])
    return levels / levels[-1]


def normal_float(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """A weight rounded to NormalFloat levels, scaled to the largest magnitude of each group.

    Only for analysis: the native format holds uniform codes, and these are not.

    Args:
        weight: `[out_features, in_features]`, any float dtype.
        bits: 2, 3 or 4.

    Returns:
        The simulated weight, same shape and dtype.
    """
    levels = normal_levels(bits).to(weight)
    groups = weight.unflatten(1, (-1, group_size))
    scale = groups.abs().amax(-1, keepdim=True)
    steps = groups / torch.where(scale == 0, 1, scale)
    between = (levels[1:] + levels[:-1]) / 2
    rounded: Tensor = levels[torch.bucketize(steps, between)] * scale
    return rounded.flatten(1)


def _projected(error: Tensor, rank: int, gram: Callable[[Tensor], Tensor]) -> Factors:
    """`U U^T E` as balanced factors, `U` the first eigenvectors of `gram(E)`, in `E`'s dtype.

    The decomposition is of the shorter side: of a tall `E = Q R`, that of `gram(R)`.
    """
    if error.shape[0] <= error.shape[1]:
        vectors = torch.linalg.eigh(gram(error)).eigenvectors  # in ascending order
        left = vectors[:, -rank:]
    else:
        basis, triangle = torch.linalg.qr(error)
        vectors = torch.linalg.eigh(gram(triangle)).eigenvectors
        left = basis @ vectors[:, -rank:]
    turn, singular, right = torch.linalg.svd(left.T @ error, full_matrices=False)
    root = singular.sqrt()
    return left @ (turn * root), root[:, None] * right
