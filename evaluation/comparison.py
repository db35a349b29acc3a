"""Versions of a model held against a baseline, from their evaluations: what changed, how surely."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rilq.evaluation.bootstrap import CONFIDENCE, FEW_WINDOWS, Interval, holm, paired_intervals
from rilq.evaluation.figures import Evaluation, Passages
from rilq.evaluation.rules import Outcome, Rule, apply_rule

# Figures of `Evaluation.figures()` that are better higher, besides those of tasks.
_HIGHER = {"top1_agreement", "top5_agreement", "tokens_per_s", "prefill_tokens_per_s"}


@dataclass(frozen=True)
class Version:
    """An evaluated checkpoint.

    Attributes:
        label: what it is called here.
        run: its number in the database; None if it is in none.
        passages: None if the record has none.
    """

    label: str
    run: int | None
    evaluation: Evaluation
    passages: Passages | None


@dataclass(frozen=True)
class Candidate:
    """A version and what sets it apart from the baseline.

    Attributes:
        changes: with confidence intervals, by figure.
        adjusted: p values of the changes, raised for the number of candidates (Holm), by figure.
        outcomes: of the rules, in their order.
    """

    version: Version
    changes: Mapping[str, Interval]
    adjusted: Mapping[str, float]
    outcomes: tuple[Outcome, ...]

    def verdict(self, figure: str) -> str:
        """In words: "better", "worse" or "no significant difference"."""
        change = self.changes[figure]
        if self.adjusted[figure] >= 1 - CONFIDENCE:
            return "no significant difference"
        more = change.change > (1 if change.kind == "ratio" else 0)
        return "better" if more == higher_is_better(figure, self.version.evaluation) else "worse"


@dataclass(frozen=True)
class Comparison:
    """Candidates against one baseline, on the same windows of the same text.

    Attributes:
        notes: what to know about the intervals, one line each.
    """

    baseline: Version
    candidates: tuple[Candidate, ...]
    notes: tuple[str, ...]

    @property
    def versions(self) -> tuple[Version, ...]:
        """All, the baseline first."""
        return (self.baseline, *(each.version for each in self.candidates))

    @property
    def violations(self) -> tuple[tuple[Version, Outcome], ...]:
        """The rules that were broken, and by which candidate."""
        return tuple(
            (each.version, outcome)
            for each in self.candidates
            for outcome in each.outcomes
            if outcome.violated
        )

    def figures(self) -> dict[str, list[float | None]]:
        """Every figure that a version has, of each version in the order of `versions`."""
        found = [version.evaluation.figures() for version in self.versions]
        names = dict.fromkeys(name for each in found for name in each)
        return {name: [each.get(name) for each in found] for name in names}

    def best(self, figure: str) -> set[int]:
        """Which versions, by number, are best in a figure; none if it tells none apart."""
        values = {n: v for n, v in enumerate(self.figures()[figure]) if v is not None}
        pick = max if higher_is_better(figure, self.baseline.evaluation) else min
        top = pick(values.values())
        chosen = {number for number, value in values.items() if value == top}
        return chosen if len(chosen) < len(values) else set()

    def as_dict(self) -> dict[str, Any]:
        """As JSON values, without passages."""
        evaluation = self.baseline.evaluation
        return {
            "text": evaluation.text,
            "tokens_digest": evaluation.tokens_digest,
            "windows": evaluation.windows,
            "seqlen": evaluation.seqlen,
            "confidence": CONFIDENCE,
            "baseline": _described(self.baseline),
            "candidates": [
                {
                    **_described(each.version),
                    "changes": {
                        figure: {
                            **asdict(change),
                            "adjusted_p": each.adjusted[figure],
                            "verdict": each.verdict(figure),
                        }
                        for figure, change in each.changes.items()
                    },
                    "rules": [
                        {
                            "rule": outcome.rule.text,
                            "figure": outcome.rule.figure,
                            "value": outcome.value,
                            "baseline": outcome.baseline,
                            "limit": outcome.allowed,
                            "violated": outcome.violated,
                        }
                        for outcome in each.outcomes
                    ],
                }
                for each in self.candidates
            ],
            "notes": list(self.notes),
            "violated": len(self.violations),
        }


def higher_is_better(figure: str, evaluation: Evaluation) -> bool:
    """The direction of a figure; that of a task's metric is told by an evaluation that has it."""
    tasks = {f"{each.task}.{each.metric}": each.higher_is_better for each in evaluation.tasks}
    return figure in _HIGHER or tasks.get(figure, False)


def hold_against(
    baseline: Version, candidates: Sequence[Version], rules: Sequence[Rule]
) -> Comparison:
    """Compare versions that were evaluated on the same windows.

    Raises:
        InputError: a rule needs a figure that a version has not.
    """
    theirs = baseline.evaluation.figures()
    changes = [_changes(candidate, baseline) for candidate in candidates]
    adjusted = _adjusted(changes)
    outcomes = [
        tuple(
            apply_rule(rule, each.label, each.evaluation.figures(), theirs, intervals)
            for rule in rules
        )
        for each, intervals in zip(candidates, changes, strict=True)
    ]
    judged = map(Candidate, candidates, changes, adjusted, outcomes)
    return Comparison(baseline, tuple(judged), tuple(_notes(baseline, candidates, changes)))


def _changes(candidate: Version, baseline: Version) -> dict[str, Interval]:
    if candidate.passages is None or baseline.passages is None:
        return {}
    return paired_intervals(candidate.passages, baseline.passages)


def _adjusted(changes: Sequence[Mapping[str, Interval]]) -> list[dict[str, float]]:
    """p values of each candidate's changes; one figure of all candidates is a family."""
    adjusted: list[dict[str, float]] = [{} for _ in changes]
    for figure in dict.fromkeys(name for each in changes for name in each):
        having = [number for number, each in enumerate(changes) if figure in each]
        raised = holm([changes[number][figure].p for number in having])
        for number, p in zip(having, raised, strict=True):
            adjusted[number][figure] = p
    return adjusted


def _notes(
    baseline: Version, candidates: Sequence[Version], changes: Sequence[Mapping[str, Interval]]
) -> list[str]:
    windows, notes = baseline.evaluation.windows, []
    if windows < 2:
        notes.append("one window of text: no confidence intervals")
    elif windows < FEW_WINDOWS:
        notes.append(f"{windows} windows of text: too few for intervals to be relied on")
    lacking = [each.label for each in (baseline, *candidates) if each.passages is None]
    if lacking:
        notes.append(f"no confidence intervals: no passages are recorded of {', '.join(lacking)}")
    if sum(map(bool, changes)) > 1:
        notes.append(
            f"significance is corrected for {len(candidates)} candidates (Holm), figure by figure; "
            "the intervals are not"
        )
    return notes


def _described(version: Version) -> dict[str, Any]:
    return {
        "label": version.label,
        "run": version.run,
        "figures": version.evaluation.figures(),
    }
