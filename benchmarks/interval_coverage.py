"""How often 95 % intervals hold the truth: those of `rilq compare`, and plain ones by scipy.

    python benchmarks/interval_coverage.py

Prints the table of docs/compare.md: share of simulated texts whose interval of a mean difference
holds the true one.
"""

import math

import numpy as np
import scipy
from numpy.typing import NDArray
from scipy import stats

from rilq.evaluation.bootstrap import paired_intervals
from rilq.evaluation.figures import Passages

TEXTS, RESAMPLES, SEED = 1000, 999, 3
WINDOWS = (10, 40, 141)


def draw(kind: str, random: np.random.Generator, windows: int) -> tuple[NDArray[np.float64], float]:
    """Differences of each window, and their true mean."""
    if kind == "Student's t, 3 degrees":
        return 0.1 * random.standard_t(3, windows) + 0.2, 0.2
    spread = float(kind.split()[-1])
    return 0.1 * random.lognormal(0, spread, windows), 0.1 * math.exp(spread**2 / 2)


def holds(differences: NDArray[np.float64], true: float, method: str) -> bool:
    """Whether one interval holds the truth."""
    if method == "ours":
        zero = Passages(np.zeros_like(differences), 1)
        found = paired_intervals(Passages(differences, 1), zero, resamples=RESAMPLES)["perplexity"]
        return math.log(found.low) <= true <= math.log(found.high)
    ends = stats.bootstrap(
        (differences,), np.mean, n_resamples=RESAMPLES, method=method, rng=SEED
    ).confidence_interval
    return bool(ends.low <= true <= ends.high)


def main() -> None:
    print(f"{TEXTS} texts, {RESAMPLES} resamples, seed {SEED}, scipy {scipy.__version__}\n")
    print("| windows' differences | windows | ours | percentile | BCa |\n|---|---|---|---|---|")
    for kind in ("lognormal 0.5", "lognormal 1.0", "Student's t, 3 degrees"):
        for windows in WINDOWS:
            random = np.random.default_rng(SEED)
            held = dict.fromkeys(("ours", "percentile", "BCa"), 0)
            for _ in range(TEXTS):
                differences, true = draw(kind, random, windows)
                for method in held:
                    held[method] += holds(differences, true, method)
            shares = " | ".join(f"{count / TEXTS:.3f}" for count in held.values())
            print(f"| {kind} | {windows} | {shares} |", flush=True)


if __name__ == "__main__":
    main()
