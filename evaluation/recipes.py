"""What a recipe in `rilq.json` says of the bits of a checkpoint, of whichever method it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def in_parts(recipe: Mapping[str, Any]) -> bool:
    """Whether it is ResQ's or one of its baselines': weights, activations and cache in parts."""
    return "method" in recipe


def most_bits(recipe: Mapping[str, Any]) -> int:
    """Bits of most weights."""
    return int(recipe["low_bits" if in_parts(recipe) else "bits"])


def levels(recipe: Mapping[str, Any]) -> str:
    """Bits of the parts of ResQ or a baseline of it."""
    found = [f"{recipe['low_bits']} bits"]
    if share := recipe.get("high_fraction"):
        found.append(f"{recipe['high_bits']} in {share:g} of the channels")
        if lowest := recipe.get("lowest_bits"):
            found.append(f"{lowest} in as many")
    return ", ".join(found)
