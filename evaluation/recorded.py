"""Recorded evaluations that a comparison may use: the same content, or another version of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

from rilq.errors import InputError, OptionError
from rilq.evaluation.comparison import Version
from rilq.evaluation.figures import Evaluation
from rilq.records.database import Database
from rilq.records.run import Run

Pick = Literal["latest", "best"]

# Two figures of the same model on the same tokens are this close, whatever the machine.
_SAME = 1e-4


def recorded_version(database: Database, number: int) -> tuple[Run, Version]:
    """A run and its evaluation.

    Raises:
        InputError: there is no such run, or it measured nothing.
    """
    run = database.run(number)
    if run.evaluation is None or run.state != "done":
        raise InputError(
            f"run {number}: is a {run.command} ({run.state}), not a finished evaluation\n"
            "  give a run of `rilq eval`, as `rilq runs` lists them"
        )
    return run, _version(database, run)


def _version(database: Database, run: Run) -> Version:
    assert run.evaluation is not None, "the caller has looked"
    try:
        evaluation = Evaluation.from_dict(run.evaluation)
    except (KeyError, TypeError) as err:
        raise InputError(
            f"run {run.id}: its figures are those of another version of rilq\n"
            "  measure the checkpoint again: rilq eval"
        ) from err
    return Version(
        f"{run.checkpoint} (run {run.id})", run.id, evaluation, database.passages(run.id)
    )


def differences(one: Evaluation, other: Evaluation) -> list[str]:
    """What keeps two evaluations from being compared, one line each; empty if nothing does."""
    found = []
    if one.tokens_digest != other.tokens_digest:
        tokens = (f"{each.text}, {each.windows} x {each.seqlen} tokens" for each in (one, other))
        found.append("tokens: " + " and ".join(tokens))
    if one.dtype != other.dtype:
        found.append(f"computed in: {one.dtype} and {other.dtype}")
    if one.against is not None and other.against is not None:
        bases = one.against.base_perplexity, other.against.base_perplexity
        if not math.isclose(*bases, rel_tol=_SAME):
            found.append("base: its perplexity is {:.6g} and {:.6g}".format(*bases))
    return found


def check_comparable(versions: Sequence[Version]) -> None:
    """That all were measured on the same windows, against the same base, in the same dtype.

    Raises:
        InputError: they were not; what differs from the first is named.
    """
    lines = [
        f"  {versions[0].label} and {each.label}: {difference}"
        for each in versions[1:]
        for difference in differences(versions[0].evaluation, each.evaluation)
    ]
    if lines:
        raise InputError(
            "these evaluations are of different data:\n"
            + "\n".join(lines)
            + "\n  give the checkpoints themselves, with --text, to measure all of them alike"
        )


def find_baseline(database: Database, pick: Pick, candidates: Sequence[Run]) -> Version:
    """The recorded evaluation that candidates are held against.

    Args:
        pick: "latest" is the newest one; "best" has the lowest perplexity of those with no more
            bits per weight than the candidate that has most.
        candidates: recorded; they and what has their content are no baseline.

    Raises:
        InputError: there is none, or the candidates are of several models.
    """
    wanted = [Evaluation.from_dict(each.evaluation) for each in candidates if each.evaluation]
    others = other_evaluations(database, candidates)
    found = [run for run in others if _fits(run, wanted)]
    if pick == "best":
        limits = [each.bits_per_weight for each in wanted if each.bits_per_weight is not None]
        most = max(limits, default=math.inf)
        found = [run for run in found if run.figures.get("bits_per_weight", math.inf) <= most]
        found.sort(key=lambda run: run.figures["perplexity"])
    if not found:
        raise no_baseline(database, pick)
    return _version(database, found[0])


def other_evaluations(database: Database, candidates: Sequence[Run]) -> list[Run]:
    """Finished evaluations of the same model as the candidates, but of other content; newest first.

    Raises:
        InputError: the candidates are of several models.
    """
    if len({each.source_hash for each in candidates}) > 1:
        raise InputError(
            f"{', '.join(each.checkpoint for each in candidates)}: are not versions of one model\n"
            "  name the baseline: a run or a checkpoint"
        )
    contents = {each.content_hash for each in candidates}
    runs = database.runs(command="eval", source_hash=candidates[0].source_hash, state="done")
    return [run for run in runs if run.content_hash not in contents]


def no_baseline(database: Database, pick: Pick) -> OptionError:
    """The message for a database without one."""
    of = "" if pick == "latest" else " with no more bits per weight"
    return OptionError(
        f"--baseline {pick}: {database.path} has no other evaluation of this model on this "
        f"text{of}\n  record one: rilq eval CHECKPOINT with the same --text, --seqlen and "
        "--against"
    )


def _fits(run: Run, wanted: Iterable[Evaluation]) -> bool:
    """Whether a run's evaluation can be compared with all of these, its KL too if they have it."""
    try:
        own = Evaluation.from_dict(run.evaluation or {})
    except (KeyError, TypeError):  # of another version of rilq
        return False
    return all(
        not differences(own, each) and (own.against is None) == (each.against is None)
        for each in wanted
    )


def recorded_of(
    database: Database,
    content_hash: str,
    *,
    tokens_digest: str,
    dtype: str,
    base_hash: str | None,
) -> Version | None:
    """The newest evaluation of a checkpoint that answers the same question.

    Args:
        base_hash: headers of the base; None for no comparison with one.
    """
    for run in database.runs(command="eval", content_hash=content_hash, state="done"):
        known = run.evaluation or {}
        if (
            known.get("tokens_digest") == tokens_digest
            and known.get("dtype") == dtype
            and run.options.get("base_hash") == base_hash
        ):
            version = _version(database, run)
            if version.passages is not None:
                return version
    return None
