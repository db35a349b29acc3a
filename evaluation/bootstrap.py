"""How sure a difference between two models is: paired bootstrap over the passages of one text.

The windows of a text are drawn again and again, with replacement, the same ones for both models:
what makes a window hard for both cancels out. Windows, not tokens, since the tokens of a window
depend on each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from rilq.evaluation.figures import Passages

CONFIDENCE = 0.95
RESAMPLES = 9999
FEW_WINDOWS = 10  # below, resampling a sample this small says little
_DRAWS = 1 << 22  # window numbers in memory at once
_SEED = 42

# Figure -> how two models' are compared.
COMPARED: dict[str, Literal["ratio", "difference"]] = {
    "perplexity": "ratio",
    "kl_mean": "difference",
    "kl_median": "difference",
    "kl_p99": "difference",
    "top1_agreement": "difference",
    "top5_agreement": "difference",
}


@dataclass(frozen=True)
class Interval:
    """A figure's change from one model to another, and where it lies with 95 % confidence.

    Attributes:
        kind: "ratio" to the baseline's figure, or "difference" from it.
        change: of the text as it is.
        low, high: ends of the confidence interval.
        p: of no change, two-sided: below 0.05 where the interval excludes it.
    """

    kind: Literal["ratio", "difference"]
    change: float
    low: float
    high: float
    p: float

    @property
    def significant(self) -> bool:
        """The interval excludes that there is no change."""
        return self.p < 1 - CONFIDENCE


def paired_intervals(
    model: Passages, baseline: Passages, *, resamples: int = RESAMPLES
) -> dict[str, Interval]:
    """The changes from a baseline to a model, by figure.

    Args:
        model, baseline: of the same windows.
        resamples: times that the windows are drawn; always the same ones.

    Returns:
        Perplexity and, if both were compared with a base, KL and agreement; empty for fewer than
        two windows.

    Raises:
        ValueError: they are not of the same windows.
    """
    windows = len(model.loss)
    if (windows, model.tokens) != (len(baseline.loss), baseline.tokens):
        raise ValueError("the passages of both models must be those of the same windows")
    if windows < 2:
        return {}
    found = {
        "perplexity": _of_means((model.loss - baseline.loss) / model.tokens, resamples),
    }
    if model.kl is not None and baseline.kl is not None:
        found |= {
            "kl_mean": _of_means(_window_means(model.kl) - _window_means(baseline.kl), resamples),
            "kl_median": _of_quantiles(model.kl, baseline.kl, 0.5, resamples),
            "kl_p99": _of_quantiles(model.kl, baseline.kl, 0.99, resamples),
        }
    pairs = (("top1", "top1_agreement"), ("top5", "top5_agreement"))
    for field, figure in pairs:
        ours, theirs = getattr(model, field), getattr(baseline, field)
        if ours is not None and theirs is not None:
            found[figure] = _of_means((ours - theirs) / model.tokens, resamples)
    log = found["perplexity"]
    change, low, high = (math.exp(value) for value in (log.change, log.low, log.high))
    return {**found, "perplexity": Interval("ratio", change, low, high, log.p)}


def holm(p_values: Sequence[float]) -> list[float]:
    """p values of several comparisons, each raised so that one in 20 families has a false alarm.

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        least = max(least, min(1.0, p_values[index] * (len(p_values) - rank)))
        adjusted[index] = least
    return adjusted


# ---- one figure ---------------------------------------------------------------------------------


def _window_means(kl: NDArray[np.float16]) -> NDArray[np.float64]:
    return np.asarray(kl.mean(axis=1, dtype=np.float64))


def _of_means(differences: NDArray[np.float64], resamples: int) -> Interval:
    """For a figure that is a mean over windows of the same size: `[windows]` in."""
    return _interval(lambda drawn: differences[drawn].mean(axis=-1), len(differences), resamples)


def _of_quantiles(
    model: NDArray[np.float16], baseline: NDArray[np.float16], share: float, resamples: int
) -> Interval:
    """For a quantile over all tokens: `[windows, tokens]` in."""
    ours, theirs = _WindowQuantile(model, share), _WindowQuantile(baseline, share)
    windows = len(model)

    def difference(drawn: NDArray[np.int64]) -> NDArray[np.float64]:
        rows = drawn.reshape(-1, windows)
        at = rows + windows * np.arange(len(rows))[:, None]
        counts = np.bincount(at.ravel(), minlength=rows.size).reshape(rows.shape)
        return (ours.of(counts) - theirs.of(counts)).reshape(drawn.shape[:-1])

    return _interval(difference, windows, resamples)


def _interval(
    statistic: Callable[[NDArray[np.int64]], NDArray[np.float64]], windows: int, resamples: int
) -> Interval:
    """The expanded percentile interval of a difference.

    A plain percentile interval is too short for few windows: resampling underestimates the
    variance by `(windows - 1) / windows`, and knows no t distribution. Taking its ends further out
    makes up for both. In simulations it holds the truth more often than the plain one and than BCa
    (docs/compare.md).

    Args:
        statistic: of window numbers `[..., windows]`: `[...]`.

    Source: the expanded percentile interval of Hesterberg 2015 (arXiv:1411.5279), "What Teachers
    Should Know About the Bootstrap".
    """
    stretch, freedom = math.sqrt(windows / (windows - 1)), windows - 1
    tail = stats.norm.cdf(stretch * stats.t.ppf((1 - CONFIDENCE) / 2, freedom))
    numbers = np.arange(windows)
    found = stats.bootstrap(
        (numbers,),
        lambda drawn, axis: statistic(drawn),
        n_resamples=resamples,
        batch=max(1, _DRAWS // windows),
        vectorized=True,
        confidence_level=1 - 2 * tail,
        method="percentile",
        rng=np.random.default_rng(_SEED),
    )
    drawn = found.bootstrap_distribution
    # The smaller tail beyond no change, never zero: the text as it is counts as one more draw.
    beyond = (min((drawn <= 0).sum(), (drawn >= 0).sum()) + 1) / (resamples + 1)
    quantile = stats.norm.ppf(min(beyond, 0.5)) / stretch
    return Interval(
        "difference",
        float(statistic(numbers)),
        float(found.confidence_interval.low),
        float(found.confidence_interval.high),
        float(2 * stats.t.cdf(quantile, freedom)),
    )


class _WindowQuantile:
    """A quantile over the tokens of windows that were drawn several times, or not at all.

    Exact, with linear interpolation as `np.quantile` has it, but only the values near the quantile
    are looked at: sorting the tokens of each draw would take minutes.

    Args:
        kl: `[windows, tokens]`.
        share: 0.5 for the median; below 1.
    """

    def __init__(self, kl: NDArray[np.float16], share: float) -> None:
        self._kl = kl.astype(np.float64)
        self._sorted, self._share = np.sort(self._kl, axis=None), share
        # Counts up to 2**24 are exact in float32, and so are their sums.
        self._exact = np.float32 if kl.size < 1 << 24 else np.float64
        below = (self._kl <= np.quantile(self._sorted, share)).mean(axis=1)
        # How far the share below the quantile strays when windows are drawn: standard error.
        self._stray = below.std() / math.sqrt(len(kl)) + 1 / self._kl.size

    def of(self, counts: NDArray[np.int64]) -> NDArray[np.float64]:
        """The quantile of each draw: times that each window is in it, `[draws, windows]`."""
        position = self._share * (self._kl.size - 1)
        first = math.floor(position)
        drawn = counts.astype(self._exact)
        reach = 4 * self._stray  # widened until it holds every draw's
        while True:
            values, below, upto = self._near(reach)
            reached = drawn @ upto  # tokens of each draw up to each value: [draws, values]
            lower, upper = (
                np.count_nonzero(reached <= rank, axis=1) for rank in (first, first + 1)
            )
            if (drawn @ below <= first).all() and upper.max() < len(values):
                break
            reach *= 2
        low, high = values[lower], values[upper]
        return np.asarray(low + (position - first) * (high - low))

    def _near(self, reach: float) -> tuple[NDArray[np.float64], NDArray[Any], NDArray[Any]]:
        """Distinct values around the quantile, and each window's tokens below and up to them.

        Returns:
            `[values]`, `[windows]`, `[windows, values]`.
        """
        last = len(self._sorted) - 1
        ends = ((self._share - reach) * last, (self._share + reach) * last + 1)
        low, high = (self._sorted[int(min(max(end, 0), last))] for end in ends)
        window, token = np.nonzero((self._kl >= low) & (self._kl <= high))
        values, number = np.unique(self._kl[window, token], return_inverse=True)
        shape = len(self._kl), len(values)
        here = np.bincount(window * len(values) + number, minlength=math.prod(shape))
        below = (self._kl < low).sum(axis=1)
        upto = below[:, None] + here.reshape(shape).cumsum(axis=1)
        return values, below.astype(self._exact), upto.astype(self._exact)
