"""The rules of `--fail-if`: when a figure counts as a regression.

    RULE   NAME OP LIMIT [significantly]
    NAME   a figure: ppl, kl_p99, tokens_per_s, ..., or TASK.METRIC
    OP     >  >=  <  <=
    LIMIT  1.02x    times the baseline's figure
           +0.1     above the baseline's by this much; -0.1: below it
           20       the figure itself, whatever the baseline's is

A rule says what fails: `ppl > 1.02x` fails a model whose perplexity is above 1.02 times the
baseline's. With `significantly` it fails only if the whole confidence interval is beyond the limit.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from rilq.errors import InputError, OptionError, printable
from rilq.evaluation.bootstrap import COMPARED, Interval

Compares = Literal[">", ">=", "<", "<="]
Kind = Literal["ratio", "difference", "value"]

# Short names, as people write them.
ALIASES = {
    "ppl": "perplexity",
    "bpb": "bits_per_byte",
    "bits": "bits_per_weight",
    "size": "size_bytes",
    "kl": "kl_mean",
    "top1": "top1_agreement",
    "top5": "top5_agreement",
    "decode_tokens_per_s": "tokens_per_s",
}
AGAINST_BASE = ("kl_mean", "kl_median", "kl_p99", "kl_max", "top1_agreement", "top5_agreement")
SPEED = ("prefill_tokens_per_s", "tokens_per_s", "host_bytes", "device_bytes")
# `Evaluation.figures()` gives these, and those of tasks as TASK.METRIC.
KNOWN = (
    *("perplexity", "bits_per_byte", "bits_per_weight", "size_bytes"),
    *("activation_bits", "cache_bits"),
    *AGAINST_BASE,
    *SPEED,
)
_OPERATORS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_RULE = re.compile(
    rf"\s*(?P<name>[^\s<>=]+)\s*(?P<op>[<>]=?)\s*(?P<sign>[+-]?)\s*(?P<number>{_NUMBER})"
    r"(?P<times>x?)(?P<significantly>\s+significantly)?\s*"
)
_EXAMPLES = '"ppl > 1.02x", "kl_p99 > +0.1", "tokens_per_s < 0.9x", "ppl > 20"'


@dataclass(frozen=True)
class Rule:
    """A condition under which a model fails.

    Attributes:
        text: as it was written.
        figure: full name.
        kind: what `limit` is: a multiple of the baseline's figure, a difference from it (with its
            sign), or a value of its own.
        significantly: the whole confidence interval has to be beyond the limit.
    """

    text: str
    figure: str
    compares: Compares
    kind: Kind
    limit: float
    significantly: bool = False


@dataclass(frozen=True)
class Outcome:
    """A rule applied to a model.

    Attributes:
        value, baseline: the figures; of a rule about a value the baseline's may be missing.
        allowed: the value at the limit.
    """

    rule: Rule
    value: float
    baseline: float | None
    allowed: float
    violated: bool

    def __str__(self) -> str:
        """`ppl > 1.02x: perplexity 20.1, limit 19.9, baseline 19.5`."""
        told = f"{self.rule.text}: {self.rule.figure} {plain(self.value)}"
        told += f", limit {plain(self.allowed)}"
        return told if self.baseline is None else f"{told}, baseline {plain(self.baseline)}"


def plain(value: float) -> str:
    """A figure for people: six digits, and bytes in full."""
    return f"{value:.0f}" if abs(value) >= 1e6 else f"{value:.6g}"


def parse_rule(text: str) -> Rule:
    """Read one rule.

    Raises:
        OptionError: it is not one, or asks for what cannot be told.
    """
    shown = printable(text)
    if (found := _RULE.fullmatch(text)) is None:
        raise OptionError(
            f'--fail-if "{shown}": expected NAME OP LIMIT, where OP is one of > >= < <=\n'
            f"  for example {_EXAMPLES}"
        )
    name, sign, times = found["name"], found["sign"], found["times"]
    figure = ALIASES.get(name, name)
    task, _, metric = figure.partition(".")
    if figure not in KNOWN and not (task and metric):
        raise OptionError(
            f'--fail-if "{shown}": there is no figure {printable(name)}\n'
            f"  known are {', '.join(KNOWN)}, TASK.METRIC of a task, "
            f"and for short {', '.join(ALIASES)}"
        )
    limit = float(found["number"]) * (-1 if sign == "-" else 1)
    if sign and times or not math.isfinite(limit):
        raise OptionError(
            f'--fail-if "{shown}": a limit is a multiple (1.02x), a difference (+0.1, -0.1) or '
            f"a value (20)\n  for example {_EXAMPLES}"
        )
    kind: Kind = "ratio" if times else "difference" if sign else "value"
    significantly = found["significantly"] is not None
    if significantly and COMPARED.get(figure) != kind:
        known = (f"{name} with {kind}s" for name, kind in COMPARED.items())
        raise OptionError(
            f'--fail-if "{shown}": significantly needs a confidence interval of that {kind}\n'
            f"  there are those of {', '.join(known)}"
        )
    return Rule(
        " ".join(text.split()),
        figure,
        cast(Compares, found["op"]),
        kind,
        limit,
        significantly,
    )


def apply_rule(
    rule: Rule,
    label: str,
    figures: Mapping[str, float],
    baseline: Mapping[str, float],
    intervals: Mapping[str, Interval],
) -> Outcome:
    """Whether a model breaks a rule.

    Args:
        label: what messages call the model.
        figures, baseline: of `Evaluation.figures`: the model's, and the baseline's.
        intervals: of the model against the baseline.

    Raises:
        InputError: a figure or an interval that the rule needs is missing.
    """
    check_figures([rule], {label: figures}, baseline)
    value, reference = figures[rule.figure], baseline.get(rule.figure)
    allowed = rule.limit
    if rule.kind == "ratio":
        allowed = baseline[rule.figure] * rule.limit
    elif rule.kind == "difference":
        allowed = baseline[rule.figure] + rule.limit
    beyond = _OPERATORS[rule.compares]
    violated = beyond(value, allowed)
    if rule.significantly:
        if (interval := intervals.get(rule.figure)) is None:
            raise InputError(
                f'--fail-if "{rule.text}": {label} has no confidence interval of {rule.figure}\n'
                "  it takes the passages of two windows or more, of both; measure them again"
            )
        nearest = interval.low if rule.compares in (">", ">=") else interval.high
        violated = beyond(nearest, rule.limit)
    return Outcome(rule, value, reference, allowed, violated)


def check_figures(
    rules: Sequence[Rule],
    candidates: Mapping[str, Collection[str]],
    baseline: Collection[str],
) -> None:
    """That rules can be applied: a figure that is missing is no pass.

    Args:
        candidates: names of the figures of each, by label.
        baseline: names of the baseline's.

    Raises:
        InputError: a figure is missing; who lacks it is named.
    """
    for rule in rules:
        lacking = [label for label, names in candidates.items() if rule.figure not in names]
        if rule.kind != "value" and rule.figure not in baseline:
            lacking.append("the baseline")
        if lacking:
            raise InputError(
                f'--fail-if "{rule.text}": there is no {rule.figure} of {", ".join(lacking)}\n'
                f"  {_remedy(rule.figure)}"
            )


def _remedy(figure: str) -> str:
    if figure in AGAINST_BASE:
        return "name the base that all are measured against: --against BASE"
    if figure in SPEED:
        return "compare evaluations that measured it: rilq eval --speed"
    if "." in figure:
        return "compare evaluations that ran the task: rilq eval --tasks"
    return "leave the rule out, or compare evaluations that have it"
