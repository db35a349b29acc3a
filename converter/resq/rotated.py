"""A checkpoint in ResQ's bases: the same function, its channels in ascending order of variance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PretrainedConfig

from rilq.converter.architecture import head_size
from rilq.converter.resq.basis import Bases, Sizes
from rilq.converter.rotation import TurnedCheckpoint
from rilq.formats.checkpoint import Checkpoint
from rilq.formats.resq.install import ARCHITECTURES

ROWS = 256  # turned at once: enough that a dense matrix is worth reading


@dataclass(frozen=True)
class DenseTurns:
    """U_A and U_B as `TurnedCheckpoint` takes them."""

    bases: Bases

    @property
    def chunk(self) -> int:
        """See `Turns`; more than with Hadamard matrices, since every product reads all of U_A."""
        return ROWS * len(self.bases.residual)

    @cached_property
    def _stays(self) -> bool:
        """Whether U_A is the identity, which no row need be multiplied by."""
        return _is_identity(self.bases.residual)

    def residual(self, rows: Tensor) -> Tensor:
        """See `Turns`: `rows U_A`, or `rows` themselves where U_A is the identity."""
        return rows if self._stays else rows @ self.bases.residual

    def values(self, layer: int, owners: Sequence[int], blocks: Tensor) -> Tensor:
        """See `Turns`: each head's block times the U_B of its layer and KV head."""
        return blocks @ self.bases.values[layer, list(owners)]


class ResqCheckpoint(TurnedCheckpoint):
    """A checkpoint whose hidden states are turned by U_A and whose values by U_B.

    Everything else of `TurnedCheckpoint` holds: the norms' weights are folded into the linears
    behind them, a tied head is a tensor of its own, and the logits are the source's. With
    `identity_bases` that is all that is done.

    Memory beside the tensors that `read` returns: U_A, `8 hidden^2` bytes, and about 30 bytes for
    each value of `ROWS` rows.

    Args:
        source: opened; not used any more by anybody else.
        bases: of this model.

    Raises:
        UnsupportedArchitectureError: not one of `ARCHITECTURES`.
        CheckpointError: config.json makes no model.
    """

    def __init__(self, source: Checkpoint, bases: Bases) -> None:
        super().__init__(
            source,
            lambda hidden, head_dim: DenseTurns(_checked(bases, hidden, head_dim)),
            option="--method resq",
            models=ARCHITECTURES,
        )


def resq_sizes(config: PretrainedConfig) -> Sizes:
    """What a model's bases are made for, from its transformers configuration."""
    return Sizes(
        config.hidden_size,
        config.num_hidden_layers,
        config.num_key_value_heads,
        head_size(config),
    )


def _checked(bases: Bases, hidden: int, head_dim: int) -> Bases:
    sizes = bases.sizes
    assert (sizes.hidden, sizes.head_dim) == (hidden, head_dim), "bases of another model"
    return bases


def _is_identity(matrix: Tensor) -> bool:
    return torch.equal(matrix, torch.eye(len(matrix), dtype=matrix.dtype))
