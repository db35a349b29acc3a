"""The losses of a training, as `rilq.json` has them, as a record has them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rilq.records.run import LossPoint


def losses_of(quality: Mapping[str, Any]) -> tuple[LossPoint, ...]:
    """Losses over the updates, from what `rilq.json` says; none without a training."""
    history = quality.get("history", ())
    steps = [step for step, _ in history]
    points = [LossPoint("validation", "total", step, finite_or_nan(loss)) for step, loss in history]
    for term, losses in quality.get("validation_parts", {}).items():
        pairs = zip(steps, losses, strict=True)
        points += [LossPoint("validation", term, step, finite_or_nan(loss)) for step, loss in pairs]
    points += [
        LossPoint("train", "total", step, finite_or_nan(loss))
        for step, loss in quality.get("train_history", ())
    ]
    return tuple(points)


def finite_or_nan(value: float | None) -> float:
    """What JSON has in the place of a NaN is None."""
    return math.nan if value is None else value
