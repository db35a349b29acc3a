"""How far one model's predictions are from another's, token by token."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Divergence:
    """A model compared with its base on the same tokens; it shows damage that perplexity hides.

    Attributes:
        kl_mean, kl_median, kl_p99, kl_max: of KL(base || this) per predicted token, in nats; the
            99th percentile is interpolated linearly.
        top1_agreement: share of the tokens for which both think the same one most likely.
        base_perplexity: the base's own.
    """

    kl_mean: float
    kl_median: float
    kl_p99: float
    kl_max: float
    top1_agreement: float
    base_perplexity: float


class DivergenceSum:
    """Gathers what `Divergence` needs, batch by batch: four bytes for each token."""

    def __init__(self) -> None:
        self._kl: list[Tensor] = []
        self._agreeing = 0

    def add(self, base: Tensor, logits: Tensor) -> None:
        """Count the predictions of one batch.

        Args:
            base: the base's logits `[rows, positions, vocabulary]`, float32.
            logits: the other model's, alike.
        """
        self._agreeing += int((base.argmax(-1) == logits.argmax(-1)).sum())
        expected, found = base.log_softmax(-1), logits.log_softmax(-1)
        kl = F.kl_div(found, expected, reduction="none", log_target=True).sum(-1)
        # Rounding can bring the sum for two equal distributions just below zero.
        self._kl.append(kl.clamp_min(0).flatten().cpu())

    def result(self, base_perplexity: float) -> Divergence:
        """The figures over everything added; at least one token must have been."""
        kl = torch.cat(self._kl).double().numpy()
        median, p99 = np.quantile(kl, (0.5, 0.99))
        return Divergence(
            kl_mean=float(kl.mean()),
            kl_median=float(median),
            kl_p99=float(p99),
            kl_max=float(kl.max()),
            top1_agreement=self._agreeing / len(kl),
            base_perplexity=base_perplexity,
        )
