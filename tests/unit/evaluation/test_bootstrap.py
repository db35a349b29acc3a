"""Intervals of paired differences: coverage, exact quantiles, pairing, and their limits."""

import math
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from rilq.evaluation.bootstrap import Interval, _WindowQuantile, holm, paired_intervals
from rilq.evaluation.figures import Passages

# A population of windows: the logarithm of a token's KL is normal within its window, and the
# windows' centres are normal too, so that over all tokens it is lognormal, with a heavy tail.
SPREAD, HARDNESS = 1.2, 0.4
CENTRES = (-2.0, -2.2)  # of the model and its baseline
AGREE = (0.88, 0.9)
WINDOWS, TOKENS = 60, 128


def draw(random: np.random.Generator, windows: int = WINDOWS) -> tuple[Passages, Passages]:
    """A model's and its baseline's passages: the same windows are hard for both."""
    hardness = random.normal(0, HARDNESS, (windows, 1))
    token = random.normal(size=(windows, TOKENS))
    found = []
    for centre, agree in zip(CENTRES, AGREE, strict=True):
        noise = 0.8 * token + 0.6 * random.normal(size=(windows, TOKENS))
        kl = np.exp(centre + hardness + SPREAD * noise)
        agreeing = random.random((windows, TOKENS)) < stats.norm.cdf(
            stats.norm.ppf(agree) * math.hypot(1, HARDNESS) - hardness
        )
        found.append(
            Passages(
                loss=kl.sum(axis=1) + 3 * TOKENS,  # the base's loss and what was lost
                tokens=TOKENS,
                kl=kl.astype(np.float16),
                top1=agreeing.sum(axis=1),
                top5=agreeing.mean(axis=1) * TOKENS,
            )
        )
    return found[0], found[1]


def lognormal(figure: str) -> float:
    """The true difference of the two populations."""
    total = math.hypot(SPREAD, HARDNESS)
    spread = {"kl_mean": total**2 / 2, "kl_median": 0, "kl_p99": total * stats.norm.ppf(0.99)}
    ours, theirs = (math.exp(centre + spread[figure]) for centre in CENTRES)
    return ours - theirs


TRUE = {figure: lognormal(figure) for figure in ("kl_mean", "kl_median", "kl_p99")} | {
    "perplexity": math.exp(lognormal("kl_mean")),
    "top1_agreement": AGREE[0] - AGREE[1],
    "top5_agreement": AGREE[0] - AGREE[1],
}


def share_held(found: list[Interval], true: float) -> float:
    """Share of the intervals that hold the truth."""
    return sum(each.low <= true <= each.high for each in found) / len(found)


def test_95_percent_intervals_of_perplexity_hold_the_truth_in_93_to_97_percent_of_texts() -> None:
    # The base's losses differ much between windows; what the models lose to it is lognormal.
    random, found = np.random.default_rng(1), []
    for _ in range(1500):
        base = random.lognormal(1, 0.4, 141)  # windows of WikiText-2's test set, of 2048 tokens
        lost = random.lognormal((-2.0, -2.2), 0.5, (141, 2))
        model, baseline = (Passages((base + lost[:, i]) * 2047, 2047) for i in (0, 1))
        found.append(paired_intervals(model, baseline, resamples=799)["perplexity"])
    true = math.exp(0.5**2 / 2) * (math.exp(-2.0) - math.exp(-2.2))
    assert 0.93 <= share_held(found, math.exp(true)) <= 0.97


def test_95_percent_intervals_of_kl_hold_the_truth_in_93_to_97_percent_of_texts() -> None:
    random = np.random.default_rng(2)
    found = [paired_intervals(*draw(random), resamples=399) for _ in range(300)]
    held = {figure: share_held([each[figure] for each in found], TRUE[figure]) for figure in TRUE}
    assert all(0.93 <= share <= 0.97 for share in held.values()), held


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("shape", [(2, 1), (3, 2), (7, 50), (40, 200)])
def test_quantiles_of_drawn_windows_are_those_of_numpy(
    share: float, shape: tuple[int, int]
) -> None:
    random = np.random.default_rng(0)
    # One decimal: many equal values. The last window is far from the others.
    kl = random.lognormal(0, 2, shape).round(1).astype(np.float16)
    kl[-1] *= 30
    drawn = random.integers(0, shape[0], (200, shape[0]))
    counts = np.array([np.bincount(row, minlength=shape[0]) for row in drawn])
    expected = [np.quantile(kl[row].astype(np.float64), share) for row in drawn]
    np.testing.assert_allclose(_WindowQuantile(kl, share).of(counts), expected, rtol=1e-12)


def test_changes_are_those_of_the_whole_text() -> None:
    model, baseline = draw(np.random.default_rng(5))
    found = paired_intervals(model, baseline, resamples=99)
    assert model.kl is not None and baseline.kl is not None
    ours, theirs = (kl.astype(np.float64) for kl in (model.kl, baseline.kl))
    predicted = WINDOWS * TOKENS
    ratio = math.exp((model.loss.sum() - baseline.loss.sum()) / predicted)
    assert found["perplexity"].kind == "ratio"
    assert found["perplexity"].change == pytest.approx(ratio, rel=1e-12)
    for figure, share in (("kl_median", 0.5), ("kl_p99", 0.99)):
        change = np.quantile(ours, share) - np.quantile(theirs, share)
        assert found[figure].change == pytest.approx(change, abs=1e-12)
    assert found["kl_mean"].change == pytest.approx(ours.mean() - theirs.mean(), abs=1e-12)


def test_a_model_compared_with_itself_has_not_changed() -> None:
    model, _ = draw(np.random.default_rng(6))
    for figure, found in paired_intervals(model, model, resamples=99).items():
        none = 1.0 if figure == "perplexity" else 0.0
        assert (found.change, found.low, found.high) == (none, none, none)
        assert found.p == 1 and not found.significant


def test_same_passages_give_the_same_interval() -> None:
    pair = draw(np.random.default_rng(7))
    assert paired_intervals(*pair, resamples=99) == paired_intervals(*pair, resamples=99)


def test_pairing_makes_intervals_shorter_than_those_of_shuffled_windows() -> None:
    model, baseline = draw(np.random.default_rng(8))
    order = np.random.default_rng(9).permutation(WINDOWS)
    shuffled = replace(baseline, loss=baseline.loss[order])
    paired, apart = (
        paired_intervals(model, other, resamples=999)["perplexity"]
        for other in (baseline, shuffled)
    )
    assert paired.high - paired.low < 0.75 * (apart.high - apart.low)


def test_significance_is_that_the_interval_excludes_no_change() -> None:
    random, differ = np.random.default_rng(10), 0
    for size in np.linspace(0, 0.6, 60):
        losses = random.normal(size, 1, 30)
        model = Passages(losses, 1)
        found = paired_intervals(model, Passages(np.zeros(30), 1), resamples=9999)["perplexity"]
        if min(abs(found.low - 1), abs(found.high - 1)) > 0.01:  # not at the very edge
            assert found.significant == (not found.low <= 1 <= found.high)
            differ += found.significant
    assert 10 < differ < 50


def test_few_windows_give_longer_intervals_than_the_plain_bootstrap() -> None:
    losses: NDArray[np.float64] = np.random.default_rng(12).normal(0, 1, 5)
    found = paired_intervals(Passages(losses, 1), Passages(np.zeros(5), 1))["perplexity"]
    plain = stats.bootstrap((losses,), np.mean, method="percentile", rng=0).confidence_interval
    assert math.log(found.high) - math.log(found.low) > 1.3 * (plain.high - plain.low)


def test_one_window_gives_no_interval() -> None:
    one = Passages(np.ones(1), 4)
    assert paired_intervals(one, one) == {}


def test_passages_of_other_windows_are_refused() -> None:
    with pytest.raises(ValueError, match="same windows"):
        paired_intervals(Passages(np.ones(3), 4), Passages(np.ones(4), 4))


def test_holm_multiplies_by_the_hypotheses_that_are_left() -> None:
    # Worked by hand: 0.01 * 3, 0.02 * 2, and 0.03 * 1, which may not fall below the one before.
    assert holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
