"""How the channels of a vector are split: consecutive parts, each with its own bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

PART_BITS = (2, 3, 4, 6, 8)


@dataclass(frozen=True)
class Parts:
    """Consecutive parts of the channels, in ascending order of their variance.

    ResQ at 4.5 bits on 128 channels is `Parts((4, 8), (112, 16))`; one part is a uniform quantizer.

    Attributes:
        bits: of each part, one of `PART_BITS`.
        widths: channels of each part, 1 or more.

    Raises:
        ValueError: bits or widths that make no parts.
    """

    bits: tuple[int, ...]
    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.bits or len(self.bits) != len(self.widths):
            raise ValueError(f"parts: {len(self.bits)} bits for {len(self.widths)} widths")
        if strange := [bits for bits in self.bits if bits not in PART_BITS]:
            raise ValueError(f"parts: bits {strange}, expected some of {PART_BITS}")
        if min(self.widths) < 1:
            raise ValueError(f"parts: widths {list(self.widths)}: a part has no channel")

    @classmethod
    def of(cls, size: int, bits: Sequence[int], fractions: Sequence[float]) -> Parts:
        """The parts of `size` channels: boundaries at the fractions, rounded to whole channels.

        Raises:
            ValueError: a part would be empty.
        """
        ends = [round(size * end) for end in accumulate(fractions)]
        widths = tuple(end - start for start, end in zip([0, *ends], ends, strict=False))
        if min(widths, default=0) < 1:
            raise ValueError(
                f"{size} channels cannot be split into fractions {list(fractions)}: "
                "a part has no channel"
            )
        return cls(tuple(bits), widths)

    @property
    def size(self) -> int:
        """Channels of all parts together."""
        return sum(self.widths)

    @property
    def average_bits(self) -> float:
        """Bits per channel, without scales."""
        pairs = zip(self.bits, self.widths, strict=True)
        return sum(bits * width for bits, width in pairs) / self.size
