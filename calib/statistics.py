"""Sums over the inputs of one linear."""

from collections.abc import Callable

import torch
from torch import Tensor

# Rows that are cast to float32 at a time: 8192 x 28672 of them take 0.9 GB.
CHUNK = 8192


class HessianSum:
    """`X^T X` over any number of batches, the Hessian of a linear's squared output error.

    Args:
        dtype: in which products are made and summed.

    Attributes:
        tokens: input vectors added so far.
    """

    def __init__(
        self,
        in_features: int,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.tokens = 0
        self._sum = torch.zeros(in_features, in_features, dtype=dtype, device=device)

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Add the inputs of one batch.

        Args:
            x: `[..., in_features]`, any float dtype; summed on the sum's device.
        """
        assert x.shape[-1] == len(self._sum), (
            f"inputs of {x.shape[-1]} features do not belong to a Hessian of {len(self._sum)}"
        )
        for rows in torch.split(x.reshape(-1, x.shape[-1]), CHUNK):
            rows = rows.to(self._sum)
            self._sum.addmm_(rows.T, rows)
            self.tokens += len(rows)

    def merge(self, added: Callable[[Tensor], Tensor]) -> None:
        """Make the sums those of several processes; `added` adds a tensor up over all of them."""
        self._sum = added(self._sum)
        self.tokens = int(added(torch.tensor(self.tokens)).item())

    def value(self) -> Tensor:
        """The mean of `x x^T` over the tokens: `[in_features, in_features]`.

        Divided by the tokens so that its size does not depend on how much text there was; GPTQ
        takes any scale. Before anything was added (an expert that no token chose) it is zero.
        """
        return self._sum / max(self.tokens, 1)

    def take(self) -> Tensor:
        """`value()` in the memory of the sums: of a wide linear there is no room for two.

        Nothing can be added any more.
        """
        total, self._sum = self._sum, self._sum.new_empty(0, 0)
        return total.div_(max(self.tokens, 1))


class SquareSum:
    """Mean squares of each input channel over any number of batches: a Hessian's diagonal.

    Attributes:
        tokens: input vectors added so far.
    """

    def __init__(self, in_features: int, device: torch.device | str) -> None:
        self.tokens = 0
        self._sum = torch.zeros(in_features, dtype=torch.float32, device=device)

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Add the inputs of one batch, `[..., in_features]`, any float dtype."""
        rows = x.reshape(-1, x.shape[-1])
        self._sum += rows.to(self._sum.device, torch.float32).square().sum(0)
        self.tokens += len(rows)

    def merge(self, added: Callable[[Tensor], Tensor]) -> None:
        """See `HessianSum.merge`."""
        self._sum = added(self._sum)
        self.tokens = int(added(torch.tensor(self.tokens)).item())

    def value(self) -> Tensor:
        """The mean of `x^2` over the tokens, `[in_features]` float32; zero before any."""
        return self._sum / max(self.tokens, 1)
