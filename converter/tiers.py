"""What the tiers of a student take in memory beside activations: arithmetic on shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rilq.converter.offload import PIECE

# Of each trained value, float32: itself, its gradient, Adam's two moments, the best one so far.
COPIES = 5


@dataclass(frozen=True)
class OffloadSizes:
    """What is where with `--student offload`.

    Attributes:
        outer_bytes: of embedding, final norm and head, as stored.
        layer_bytes: of each decoder layer, as stored.
        adapter_values: trained values of adapters.
        grid_values: trained scales and minima of all layers.
        layer_grid_values: those of the layer that has most.
        pinned_grid_bytes: of all in float32, in pinned blocks of a power of two each.
    """

    outer_bytes: int
    layer_bytes: Sequence[int]
    adapter_values: int
    grid_values: int
    layer_grid_values: int
    pinned_grid_bytes: int

    def on_cpu(self) -> int:
        """Private memory without a GPU: layers are mapped, parts of two of them copied."""
        trained = self.adapter_values + self.grid_values
        return self.outer_bytes + 2 * max(self.layer_bytes) + COPIES * 4 * trained

    def on_device(self) -> int:
        """Device memory: two slots, adapters with all their state, one layer's gradients."""
        slot = max(self.layer_bytes) + 4 * self.layer_grid_values
        adapters = COPIES * 4 * self.adapter_values
        return self.outer_bytes + 2 * slot + adapters + 2 * 4 * self.layer_grid_values

    def on_host(self) -> int:
        """Host memory beside a device: all layers, trained scales with their state, best values."""
        layers = sum(-(-size // PIECE) * PIECE for size in self.layer_bytes)
        grids = 2 * self.pinned_grid_bytes + 3 * 4 * self.grid_values
        return layers + max(self.layer_bytes) + grids + 4 * self.adapter_values


def pinned_bytes(nbytes: int) -> int:
    """What torch allocates for a pinned tensor of that size: the next power of two."""
    return 1 << (nbytes - 1).bit_length() if nbytes else 0
