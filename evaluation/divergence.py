"""How far one model's predictions are from another's: the figures over all tokens."""

import numpy as np

from rilq.evaluation.figures import Divergence
from rilq.evaluation.scores import Scores

# Bins of the histogram: ten to a decade, from far below what matters to beyond any real KL.
_EDGES = tuple(float(f"{10 ** (i / 10):.6g}") for i in range(-80, 21))


def divergence(scores: Scores, base_perplexity: float) -> Divergence:
    """The figures over all windows; at least one token must have been compared."""
    assert scores.kl is not None and scores.top1 is not None and scores.shared is not None
    kl = scores.kl.numpy().reshape(-1)
    median, p99 = np.quantile(kl, (0.5, 0.99))
    inside = np.clip(kl, _EDGES[0], np.nextafter(_EDGES[-1], 0))
    return Divergence(
        kl_mean=float(kl.mean(dtype=np.float64)),
        kl_median=float(median),
        kl_p99=float(p99),
        kl_max=float(kl.max()),
        top1_agreement=int(scores.top1.sum()) / kl.size,
        top5_agreement=int(scores.shared.sum()) / (scores.of * kl.size),
        base_perplexity=base_perplexity,
        kl_edges=_EDGES,
        kl_counts=tuple(np.histogram(inside, _EDGES)[0].tolist()),
    )
