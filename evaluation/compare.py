"""`rilq compare`: the same evaluation of every checkpoint, measured now or recorded earlier."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import gettempdir
from typing import Any, cast, get_args

from rilq.calib.dataset import FIELD_SEQLEN, evaluation_rows
from rilq.calib.sources import parse_source
from rilq.calib.tokenizer import load_tokenizer
from rilq.converter.machine import measure_machine
from rilq.errors import OptionError
from rilq.evaluation.comparison import Comparison, Version, hold_against
from rilq.evaluation.perplexity import DEFAULT_TEXT, measure_texts
from rilq.evaluation.question import Question, Target, ask, open_target
from rilq.evaluation.recorded import (
    Pick,
    check_comparable,
    find_baseline,
    no_baseline,
    other_evaluations,
    recorded_of,
    recorded_version,
)
from rilq.evaluation.rules import Rule, check_figures, parse_rule
from rilq.progress import Reporter, SilentReporter
from rilq.records.database import Database, read_database
from rilq.records.evaluation import (
    database_of,
    evaluation_found,
    recorded_options,
)
from rilq.records.place import AUTO, database_for
from rilq.records.recorder import recording
from rilq.records.run import Run


def compare(
    models: Sequence[str],
    *,
    text: str = DEFAULT_TEXT,
    seqlen: int | None = None,
    against: str | None = None,
    baseline: str | None = None,
    fail_if: Sequence[str] = (),
    db: str | Path = AUTO,
    text_key: str = "text",
    device: str = "auto",
    dtype: str = "auto",
    work: Path | None = None,
    resume: str = "auto",
    report: Reporter = SilentReporter(),  # noqa: B008 - stateless
) -> Comparison:
    """Hold versions of a model against a baseline, on the same windows of the same text.

    Checkpoints are measured together, and what was measured is recorded. A converted checkpoint
    that the database has such an evaluation of is not measured again.

    Args:
        models: folders, `owner/name` on the Hub, or numbers of recorded evaluations.
        text, text_key, seqlen, device, dtype, work, resume: as of `measure_texts`.
        against: the base that all are compared with; None for the one on the Hub that their
            `rilq.json` names; "none" for no base.
        baseline: "latest" or "best" of the records (see `find_baseline`), or one more of what
            `models` takes; None for the first model.
        fail_if: rules; see `rilq.evaluation.rules`.
        db: file of the database of runs, or "none"; "auto" is what RILQ_DB says, else `rilq.db`
            beside the first checkpoint if that is a converted one, or in the current folder.
        report: receives progress.

    Raises:
        InputError: before any work, for what cannot succeed; recorded evaluations are of other
            data; there is no baseline; a rule needs a figure that is not there.
        RilqError: a model computes NaN or infinity.
    """
    rules = [parse_rule(rule) for rule in fail_if]
    pick = cast(Pick, baseline) if baseline in get_args(Pick) else None
    names = [*([baseline] if baseline and not pick else []), *models]
    if len(names) < (1 if pick else 2):
        raise OptionError(
            "one checkpoint alone cannot be compared\n"
            "  name another one, or a --baseline: latest, best, a run or a checkpoint"
        )
    targets = {n: open_target(name) for n, name in enumerate(names) if not name.isdecimal()}
    place = _database(targets, db)
    with _opened(place, names, pick) as records:
        recorded = _recorded(records, names)
        check_comparable([version for _, version in recorded.values()])
        known = {number: version for number, (_, version) in recorded.items()}
        runs = {number: run for number, (run, _) in recorded.items()}
        runs |= {number: target.run for number, target in targets.items()}
        if pick and records and not other_evaluations(records, list(runs.values())):
            raise no_baseline(records, pick)
        if targets:
            question = ask(targets.values(), text, text_key, seqlen, against, device, dtype, report)
            asked = recorded_options(vars(question))
            known |= _answered(records, targets, question, asked, report)
            missing = {n: target for n, target in targets.items() if n not in known}
            _check_rules(rules, len(names), known, missing, question, pick)
            if missing:
                known |= _measured(place, missing, question, asked, work, resume, report)
        found = [known[number] for number in range(len(names))]
        check_comparable(found)
        if pick and records:
            judged = [
                replace(runs[number], evaluation=version.evaluation.as_dict())
                for number, version in enumerate(found)
            ]
            found.insert(0, find_baseline(records, pick, judged))
    return hold_against(found[0], found[1:], rules)


# ---- before the work ----------------------------------------------------------------------------


def _database(targets: dict[int, Target], db: str | Path) -> Path | None:
    if targets:
        return database_of(targets[min(targets)].run, db)
    return database_for(db, Path())


@contextmanager
def _opened(
    database: Path | None, names: Sequence[str], pick: Pick | None
) -> Iterator[Database | None]:
    """The records, to be read; None if there are none and none are asked for."""
    runs = [name for name in names if name.isdecimal()]
    if database is None and (runs or pick):
        wanted = f"run {runs[0]}" if runs else f"--baseline {pick}"
        raise OptionError(f"{wanted}: needs the database of runs\n  pass --db with the file")
    if database is None or not (runs or pick or database.exists()):
        yield None
        return
    with read_database(database) as records:
        yield records


def _check_rules(
    rules: Sequence[Rule],
    count: int,
    known: dict[int, Version],
    missing: dict[int, Target],
    question: Question,
    pick: Pick | None,
) -> None:
    """Refuse what no measurement would answer, before any."""
    figures: dict[int, tuple[str, dict[str, Any]]] = {
        number: (version.label, dict(version.evaluation.figures()))
        for number, version in known.items()
    } | {
        n: (target.run.checkpoint, dict.fromkeys(question.figures)) for n, target in missing.items()
    }
    first = 0 if pick else 1
    candidates = dict(figures[number] for number in range(first, count))
    # What is picked has the same figures, but for those of tasks and speed, which is seen then.
    theirs = {rule.figure for rule in rules} if pick else figures[0][1]
    check_figures(rules, candidates, theirs)


# ---- the evaluations ----------------------------------------------------------------------------


def _recorded(records: Database | None, names: Sequence[str]) -> dict[int, tuple[Run, Version]]:
    """The runs that are named, and what they measured."""
    if records is None:
        return {}
    return {
        number: recorded_version(records, int(name))
        for number, name in enumerate(names)
        if name.isdecimal()
    }


def _answered(
    records: Database | None,
    targets: dict[int, Target],
    question: Question,
    asked: dict[str, Any],
    report: Reporter,
) -> dict[int, Version]:
    """Versions that need not be measured: the same content was, in the same way."""
    if records is None:
        return {}
    # Of one that is not converted, nothing short of reading all of it tells the content.
    measured = {
        number: target
        for number, target in targets.items()
        if target.converted
        and records.runs(command="eval", content_hash=target.run.content_hash, state="done")
    }
    if not measured:
        return {}
    sizes = [target.checkpoint.config.get("max_position_embeddings") for target in targets.values()]
    rows = evaluation_rows(
        parse_source(question.text),
        load_tokenizer(targets[min(targets)].checkpoint),
        seqlen=question.seqlen or min(FIELD_SEQLEN, *(size or FIELD_SEQLEN for size in sizes)),
        text_key=question.text_key,
    )
    dtype = question.dtype
    if dtype == "auto":
        dtype = str(measure_machine(question.device).dtype).removeprefix("torch.")
    found = {}
    for number, target in measured.items():
        version = recorded_of(
            records,
            str(target.run.content_hash),
            tokens_digest=rows.digest,
            dtype=dtype,
            base_hash=asked.get("base_hash"),
        )
        if version is not None:
            report.note(f"{target.name}: was measured in run {version.run}, which is used")
            found[number] = version
    return found


def _measured(
    database: Path | None,
    targets: dict[int, Target],
    question: Question,
    asked: dict[str, Any],
    work: Path | None,
    resume: str,
    report: Reporter,
) -> dict[int, Version]:
    """Versions measured now, together; each is a run in the database."""
    folder = work or Path(gettempdir()) / "rilq"
    with ExitStack() as stack:
        recorders = []
        for target in targets.values():
            run = replace(target.run, options=asked)
            recorder = stack.enter_context(recording(database, run, report, folder))
            report = recorder.report
            recorders.append(recorder)
        measured = measure_texts(
            [target.name for target in targets.values()],
            work=work,
            resume=resume,
            report=report,
            **vars(question),
        )
        for recorder, found in zip(recorders, measured, strict=True):
            recorder.tell(**evaluation_found(*found))
    # Without a number it could not be written, which the recorder has said.
    runs = [recorder.run for recorder in recorders]
    return {
        number: Version(
            f"{run.checkpoint} (run {run.id})" if run.id else run.checkpoint, run.id or None, *found
        )
        for number, run, found in zip(targets, runs, measured, strict=True)
    }
