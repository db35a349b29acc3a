"""How much of the damage of plain rounding a checkpoint undoes."""

import math


def gap_closed(perplexity: float, *, plain: float, full: float) -> float:
    """0 at the perplexity of plain rounding, 1 at that of full precision; negative below plain.

    Counted in nats per token: `(ln plain - ln perplexity) / (ln plain - ln full)`. All three must
    be of the same windows of the same text.
    """
    return math.log(plain / perplexity) / math.log(plain / full)
