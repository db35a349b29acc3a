"""`rilq compare`: the same evaluation of every checkpoint, measured now or recorded earlier."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import torch

from rilq.calib.dataset import FIELD_SEQLEN, evaluation_rows
from rilq.calib.sources import parse_source
from rilq.calib.tokenizer import load_tokenizer
from rilq.converter.machine import measure_machine
from rilq.converter.pipeline import versions
from rilq.errors import InputError, OptionError, printable
from rilq.evaluation.comparison import Comparison, Version, hold_against
from rilq.evaluation.figures import Evaluation, Passages
from rilq.evaluation.perplexity import measure_texts
from rilq.evaluation.recorded import (
    Pick,
    check_comparable,
    find_baseline,
    recorded_of,
    recorded_version,
)
from rilq.evaluation.rules import AGAINST_BASE, Rule, check_figures, parse_rule
from rilq.formats.checkpoint import SOURCE_DTYPES, Checkpoint
from rilq.formats.hub import open_source
from rilq.formats.verify import MANIFEST_NAME, file_hash
from rilq.progress import Reporter, SilentReporter
from rilq.records.database import Database, open_database, read_database
from rilq.records.run import Run

_ALWAYS = ("perplexity", "bits_per_byte", "bits_per_weight", "size_bytes")


@dataclass(frozen=True)
class _Question:
    """What is measured of every checkpoint; the fields are those of `measure_texts`."""

    text: str
    text_key: str
    seqlen: int | None
    against: str | None
    against_revision: str | None
    device: str
    dtype: str

    @property
    def figures(self) -> tuple[str, ...]:
        """Names of those that it gives, if the text's bytes are known."""
        return _ALWAYS if self.against is None else (*_ALWAYS, *AGAINST_BASE)


@dataclass(frozen=True)
class _Target:
    """A checkpoint to compare, its `rilq.json` (empty without one), and which model it is."""

    name: str
    checkpoint: Checkpoint
    manifest: dict[str, Any]

    @property
    def label(self) -> str:
        return self.name if self.checkpoint.source.commit else Path(self.name).resolve().name

    @property
    def source_hash(self) -> str:
        """Of the headers of the full-precision model."""
        source = self.manifest.get("source", {})
        return str(source.get("header_hash") or self.checkpoint.header_hash())

    @property
    def content_hash(self) -> str:
        """As `Run` has it; that of headers alone does not tell two trainings apart."""
        if not self.manifest:
            return self.checkpoint.header_hash()
        return file_hash(self.checkpoint.source.path(MANIFEST_NAME))


def compare(
    models: Sequence[str],
    *,
    text: str | None = None,
    seqlen: int | None = None,
    against: str | None = None,
    baseline: str | None = None,
    fail_if: Sequence[str] = (),
    database: Path | None = None,
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
        text, text_key, seqlen, device, dtype, work, resume: as of `measure_texts`; `text` is
            needed for checkpoints.
        against: the base that all are compared with; None for the one on the Hub that their
            `rilq.json` names; "none" for no base.
        baseline: "latest" or "best" of the records (see `find_baseline`), or one more of what
            `models` takes; None for the first model.
        fail_if: rules; see `rilq.evaluation.rules`.
        database: of the runs; None for none.
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
    with _opened(database, names, pick) as records:
        known = {
            number: recorded_version(cast(Database, records), int(name))
            for number, name in enumerate(names)
            if name.isdecimal()
        }
        if known:
            check_comparable(list(known.values()))
        targets = {n: _open(name) for n, name in enumerate(names) if n not in known}
        if targets:
            question = _question(
                targets, text, text_key, seqlen, against, device, dtype, report=report
            )
            known |= _recorded(records, targets, question, report)
            missing = {n: target for n, target in targets.items() if n not in known}
            _check_rules(rules, len(names), known, missing, question, pick)
            if missing:
                known |= _measured(records, missing, question, work, resume, report)
        found = [known[number] for number in range(len(names))]
        check_comparable(found)
        if pick:
            found.insert(0, _picked(cast(Database, records), pick, found))
        return hold_against(found[0], found[1:], rules)


# ---- before the work ----------------------------------------------------------------------------


@contextmanager
def _opened(
    database: Path | None, names: Sequence[str], pick: Pick | None
) -> Iterator[Database | None]:
    runs = [name for name in names if name.isdecimal()]
    if database is None:
        if runs or pick:
            wanted = f"run {runs[0]}" if runs else f"--baseline {pick}"
            raise OptionError(f"{wanted}: needs the database of runs\n  pass --db with the file")
        yield None
    elif len(runs) == len(names) or not database.exists() and (runs or pick):
        with read_database(database) as records:
            yield records
    else:
        with open_database(database) as records:
            yield records


def _open(name: str, revision: str | None = None) -> _Target:
    # int32: the packed codes of a converted checkpoint.
    checkpoint = Checkpoint.open(
        open_source(name, revision=revision), dtypes=SOURCE_DTYPES | {torch.int32}
    )
    return _Target(name, checkpoint, checkpoint.read_json(MANIFEST_NAME) or {})


def _question(
    targets: dict[int, _Target],
    text: str | None,
    text_key: str,
    seqlen: int | None,
    against: str | None,
    device: str,
    dtype: str,
    *,
    report: Reporter,
) -> _Question:
    """What to measure, the base found.

    Raises:
        OptionError: there is no text.
    """
    if text is None:
        raise OptionError(
            f"{printable(next(iter(targets.values())).name)}: is measured on a text, and none is "
            "named\n  pass --text with a file, wikitext2, c4, or owner/name on the Hub"
        )
    commit = None
    if against == "none":
        against = None
    elif against is None:
        sources = [target.manifest.get("source", {}) for target in targets.values()]
        bases = {(each["name"], each["commit"]) for each in sources if each.get("commit")}
        if len(bases) == 1:
            against, commit = bases.pop()
        else:
            report.note(
                f"{MANIFEST_NAME} names {'several bases' if bases else 'no base on the Hub'}: KL "
                "and agreement are left out; --against BASE adds them"
            )
    return _Question(text, text_key, seqlen, against, commit, device, dtype)


def _check_rules(
    rules: Sequence[Rule],
    count: int,
    known: dict[int, Version],
    missing: dict[int, _Target],
    question: _Question,
    pick: Pick | None,
) -> None:
    """Refuse what no measurement would answer, before any."""
    figures: dict[int, tuple[str, dict[str, Any]]] = {
        number: (version.label, dict(version.evaluation.figures()))
        for number, version in known.items()
    } | {n: (target.label, dict.fromkeys(question.figures)) for n, target in missing.items()}
    first = 0 if pick else 1
    candidates = dict(figures[number] for number in range(first, count))
    # What is picked has the same figures, but for those of tasks and speed, which is seen then.
    theirs = {rule.figure for rule in rules} if pick else figures[0][1]
    check_figures(rules, candidates, theirs)


# ---- the evaluations ----------------------------------------------------------------------------


def _recorded(
    records: Database | None, targets: dict[int, _Target], question: _Question, report: Reporter
) -> dict[int, Version]:
    """Versions that need not be measured: the same content was, in the same way."""
    # Without `rilq.json`, nothing short of reading a checkpoint tells its content.
    converted = {number: target for number, target in targets.items() if target.manifest}
    if records is None or not converted:
        return {}
    first = targets[min(targets)]
    seqlen = question.seqlen or min(
        target.checkpoint.config.get("max_position_embeddings") or FIELD_SEQLEN
        for target in targets.values()
    )
    rows = evaluation_rows(
        parse_source(question.text),
        load_tokenizer(first.checkpoint),
        seqlen=min(seqlen, FIELD_SEQLEN) if question.seqlen is None else seqlen,
        text_key=question.text_key,
    )
    dtype = question.dtype
    if dtype == "auto":
        dtype = str(measure_machine(question.device).dtype).removeprefix("torch.")
    base = _base_hash(question)
    found = {}
    for number, target in converted.items():
        version = recorded_of(
            records,
            target.content_hash,
            tokens_digest=rows.digest,
            dtype=dtype,
            base_hash=base,
        )
        if version is not None:
            report.note(f"{target.name}: was measured in run {version.run}, which is used")
            found[number] = version
    return found


def _measured(
    records: Database | None,
    targets: dict[int, _Target],
    question: _Question,
    work: Path | None,
    resume: str,
    report: Reporter,
) -> dict[int, Version]:
    """Versions measured now, together, and recorded."""
    started = time.time()
    measured = measure_texts(
        [target.name for target in targets.values()],
        question.text,
        text_key=question.text_key,
        seqlen=question.seqlen,
        against=question.against,
        against_revision=question.against_revision,
        device=question.device,
        dtype=question.dtype,
        work=work,
        resume=resume,
        report=report,
    )
    base = _base_hash(question)
    found = {}
    for (number, target), (evaluation, passages) in zip(targets.items(), measured, strict=True):
        run = None
        if records is not None:
            run = _record(records, target, question, base, started, evaluation, passages)
        label = target.label if run is None else f"{target.label} (run {run})"
        found[number] = Version(label, run, evaluation, passages)
    return found


def _base_hash(question: _Question) -> str | None:
    if question.against is None:
        return None
    return _open(question.against, question.against_revision).checkpoint.header_hash()


def _record(
    records: Database,
    target: _Target,
    question: _Question,
    base: str | None,
    started: float,
    evaluation: Evaluation,
    passages: Passages,
) -> int:
    source, commit = target.manifest.get("source", {}), target.checkpoint.source.commit
    run = Run(
        id=0,
        command="eval",
        started=started,
        seconds=time.time() - started,
        state="done",
        model=source.get("name", target.label),
        checkpoint=target.label,
        place=f"{target.name}@{commit}" if commit else str(Path(target.name).resolve()),
        source_hash=target.source_hash,
        content_hash=target.content_hash,
        recipe=target.manifest.get("recipe", {}),
        options={"text": evaluation.text, "against": question.against, "base_hash": base},
        versions=versions(),
        figures=evaluation.figures(),
        evaluation=evaluation.as_dict(),
    )
    return records.begin(run, passages)


def _picked(records: Database, pick: Pick, candidates: Sequence[Version]) -> Version:
    """The recorded baseline.

    Raises:
        InputError: there is none, or the candidates are of several models.
    """
    runs = [records.run(each.run) for each in candidates if each.run is not None]
    hashes = {run.source_hash for run in runs}
    if len(hashes) != 1 or None in hashes:
        raise InputError(
            f"--baseline {pick}: {', '.join(each.label for each in candidates)} are not versions "
            "of one model\n  name the baseline: a run or a checkpoint"
        )
    return find_baseline(records, pick, str(hashes.pop()), runs)
