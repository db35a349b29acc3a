"""The bases that ResQ and its baselines quantize in: U_A of the model, U_B and U_C of each layer.

A basis is an orthogonal matrix whose columns are the directions that the channels become, `x U`.
They are in ascending order of the variance of `x`, so that the last part, of most bits, holds the
directions of the highest variance:

    U = P R     P: eigenvectors of the uncentred covariance, of the smallest eigenvalue first
                R: block-diagonal, a random orthogonal matrix for each part

`R` spreads what is within a part evenly over its channels, and nothing across parts.

Source: ResQ, Saxena et al. 2024 (arXiv:2412.14363), section 4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from rilq.converter.hadamard import random_orthogonal, random_rotation
from rilq.errors import RilqError
from rilq.formats.resq.parts import Parts
from rilq.formats.shard_writer import write_tensors

DAMPING = 0.01  # of the mean diagonal, added before the eigenvalues are taken


@dataclass(frozen=True)
class Sizes:
    """What the bases of a model are made for."""

    hidden: int
    layers: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Covariances:
    """Means of `x x^T` over the calibration tokens, float64.

    Attributes:
        residual: `[hidden, hidden]`, of the inputs of q/k/v_proj and of gate/up_proj of all
            layers, with the norms' weights folded into the linears.
        values: `[layers, kv_heads, head_dim, head_dim]`, of the outputs of v_proj.
        keys: `[layers, head_dim, head_dim]`, of the keys after their position is rotated in, of
            all KV heads.
    """

    residual: Tensor
    values: Tensor
    keys: Tensor

    @property
    def sizes(self) -> Sizes:
        """Of the model they belong to."""
        return _sizes(self.residual, self.values)


@dataclass(frozen=True)
class Bases:
    """Orthogonal matrices, float64; `x U` is what is quantized.

    Attributes:
        residual: U_A `[hidden, hidden]`.
        values: U_B `[layers, kv_heads, head_dim, head_dim]`.
        keys: U_C `[layers, head_dim, head_dim]`.
    """

    residual: Tensor
    values: Tensor
    keys: Tensor

    @property
    def sizes(self) -> Sizes:
        """Of the model they belong to."""
        return _sizes(self.residual, self.values)

    def only(self, letters: str) -> Bases:
        """Those of the bases U_A, U_B and U_C that are named; identities for the others."""
        plain = identity_bases(self.sizes)
        return Bases(
            self.residual if "A" in letters else plain.residual,
            self.values if "B" in letters else plain.values,
            self.keys if "C" in letters else plain.keys,
        )

    def save(self, path: Path) -> None:
        """Write one safetensors file, whole or not at all."""
        write_tensors(path, {name: tensor.contiguous() for name, tensor in vars(self).items()})

    @classmethod
    def load(cls, path: Path) -> Bases:
        """What `save` wrote."""
        return cls(**load_file(path))


def resq_bases(covariances: Covariances, hidden: Parts, head: Parts, seed: int) -> Bases:
    """Eigenvectors in ascending order, mixed at random within each part.

    Args:
        covariances: of the calibration.
        hidden, head: the parts of hidden states and of each head's keys and values; only their
            widths matter here.
        seed: of the mixing.

    Raises:
        RilqError: a covariance is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    return _for_each(
        covariances,
        lambda covariance: _calibrated(covariance, hidden, generator),
        lambda covariance: _calibrated(covariance, head, generator),
    )


def permuted_bases(covariances: Covariances) -> Bases:
    """No rotation, only another order: the channels of the largest mean square come last.

    Source: QUIK, Ashkboos et al. 2023 (arXiv:2310.09259), whose outlier channels these are.
    """
    return _for_each(covariances, _by_magnitude, _by_magnitude)


def hadamard_bases(sizes: Sizes, seed: int) -> Bases:
    """A randomized Hadamard matrix for the residual stream, one for all values, one for all keys.

    Source: QuaRot, Ashkboos et al. 2024 (arXiv:2404.00456).
    """
    generator = torch.Generator().manual_seed(seed)
    plain = identity_bases(sizes)
    turned = (
        random_rotation(matrix.shape[-1], generator).apply(matrix)
        for matrix in (plain.residual, plain.values, plain.keys)
    )
    return Bases(*turned)


def identity_bases(sizes: Sizes) -> Bases:
    """Nothing is turned."""
    head = torch.eye(sizes.head_dim, dtype=torch.float64)
    return Bases(
        torch.eye(sizes.hidden, dtype=torch.float64),
        head.repeat(sizes.layers, sizes.kv_heads, 1, 1),
        head.repeat(sizes.layers, 1, 1),
    )


def ascending_eigenvectors(covariance: Tensor) -> Tensor:
    """Eigenvectors as columns, of the smallest eigenvalue first.

    Args:
        covariance: `[n, n]` float64, symmetric, positive semidefinite.

    Raises:
        RilqError: it is not finite.
    """
    if not bool(torch.isfinite(covariance).all()):
        raise RilqError(
            f"covariance {list(covariance.shape)}: expected finite sums, found NaN or infinity\n"
            "  the layers' inputs overflow; try --dtype float32 or bfloat16"
        )
    damped = covariance.clone()
    damped.diagonal().add_(DAMPING * covariance.diagonal().mean())
    vectors: Tensor = torch.linalg.eigh(damped).eigenvectors
    return vectors


def mixing(parts: Parts, generator: torch.Generator) -> Tensor:
    """Block-diagonal `[n, n]` float64: for each part, uniform over the orthogonal matrices."""
    blocks: Tensor = torch.block_diag(*(random_orthogonal(n, generator) for n in parts.widths))
    return blocks


def _calibrated(covariance: Tensor, parts: Parts, generator: torch.Generator) -> Tensor:
    assert len(covariance) == parts.size, "the parts are those of other channels"
    return ascending_eigenvectors(covariance) @ mixing(parts, generator)


def _by_magnitude(covariance: Tensor) -> Tensor:
    order = covariance.diagonal().argsort(stable=True)
    permutation: Tensor = torch.eye(len(covariance), dtype=torch.float64)[:, order]
    return permutation


def _for_each(
    covariances: Covariances,
    of_hidden: Callable[[Tensor], Tensor],
    of_head: Callable[[Tensor], Tensor],
) -> Bases:
    """Bases from functions of one covariance; layer by layer, values before keys."""
    bases = identity_bases(covariances.sizes)
    bases = replace(bases, residual=of_hidden(covariances.residual))
    for layer, covariance_of_keys in enumerate(covariances.keys):
        for head, covariance in enumerate(covariances.values[layer]):
            bases.values[layer, head] = of_head(covariance)
        bases.keys[layer] = of_head(covariance_of_keys)
    return bases


def _sizes(residual: Tensor, values: Tensor) -> Sizes:
    layers, kv_heads, head_dim, _ = values.shape
    return Sizes(len(residual), layers, kv_heads, head_dim)
