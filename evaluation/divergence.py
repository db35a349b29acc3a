"""How far one model's predictions are from another's, token by token."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rilq.evaluation.figures import Divergence

# Bins of the histogram: ten to a decade, from far below what matters to beyond any real KL.
_EDGES = tuple(float(f"{10 ** (i / 10):.6g}") for i in range(-80, 21))
_TOP = 5


class DivergenceSum:
    """Gathers what `Divergence` needs, batch by batch: four bytes for each token."""

    def __init__(self) -> None:
        self._kl: list[Tensor] = []
        self._agreeing = 0
        self._shared, self._of = 0, _TOP

    def add(self, base: Tensor, logits: Tensor) -> None:
        """Count the predictions of one batch.

        Args:
            base: the base's logits `[rows, positions, vocabulary]`, float32.
            logits: the other model's, alike.
        """
        self._agreeing += int((base.argmax(-1) == logits.argmax(-1)).sum())
        size = min(_TOP, base.shape[-1])
        top, own = base.topk(size, -1).indices, logits.topk(size, -1).indices
        self._shared += int((top[..., :, None] == own[..., None, :]).sum())
        self._of = size
        expected, found = base.log_softmax(-1), logits.log_softmax(-1)
        kl = F.kl_div(found, expected, reduction="none", log_target=True).sum(-1)
        # Rounding can bring the sum for two equal distributions just below zero.
        self._kl.append(kl.clamp_min(0).flatten().cpu())

    def result(self, base_perplexity: float) -> Divergence:
        """The figures over everything added; at least one token must have been."""
        kl = torch.cat(self._kl).double().numpy()
        median, p99 = np.quantile(kl, (0.5, 0.99))
        inside = np.clip(kl, _EDGES[0], np.nextafter(_EDGES[-1], 0))
        return Divergence(
            kl_mean=float(kl.mean()),
            kl_median=float(median),
            kl_p99=float(p99),
            kl_max=float(kl.max()),
            top1_agreement=self._agreeing / len(kl),
            top5_agreement=self._shared / (self._of * len(kl)),
            base_perplexity=base_perplexity,
            kl_edges=_EDGES,
            kl_counts=tuple(np.histogram(inside, _EDGES)[0].tolist()),
        )
