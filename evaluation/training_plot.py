"""The picture in a model card: the validation loss of the training against its updates."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any


def training_plot(quality: Mapping[str, Any]) -> bytes | None:
    """A PNG image, the same for the same figures; None without a training or without matplotlib.

    Args:
        quality: of `rilq.json`.
    """
    history = [(s, loss) for s, loss in quality.get("history", ()) if loss is not None]
    if len(history) < 2:
        return None
    try:
        from matplotlib.figure import Figure  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return None
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*history, strict=True), marker="o", color="#b2182b")
    axes.axvline(quality["best_step"], color="black", linewidth=1, linestyle=":")
    axes.set(xlabel="updates", ylabel="validation loss")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=90, metadata={"Software": ""})
    return image.getvalue()
