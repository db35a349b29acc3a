"""rilq from Python: `rilq.plan`, `convert`, `evaluate`; the commands call the same functions.

Importing this imports torch and transformers, so `import rilq` leaves it until it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import gettempdir
from types import MappingProxyType
from typing import Any, overload

from rilq.converter import pipeline
from rilq.converter.job import Job
from rilq.converter.options import ConvertOptions
from rilq.converter.pipeline import ConvertResult
from rilq.converter.plan import Plan
from rilq.converter.ranks import join
from rilq.evaluation.evaluate import evaluate_with_passages
from rilq.evaluation.export import check_planned, export
from rilq.evaluation.figures import Evaluation
from rilq.evaluation.identity import pinned
from rilq.evaluation.perplexity import DEFAULT_TEXT
from rilq.evaluation.push import PushOptions, open_planned
from rilq.evaluation.push import push as push_folder
from rilq.evaluation.report.sources import write_conversion_page
from rilq.formats.export.kind import ExportOptions
from rilq.progress import Reporter, SilentReporter
from rilq.records.conversion import conversion_found, conversion_run, losses_so_far
from rilq.records.evaluation import database_of, evaluation_found, measured_run
from rilq.records.place import AUTO, database_for
from rilq.records.recorder import recording


@overload
def plan(model: ConvertOptions, *, report: Reporter = ...) -> Plan: ...
@overload
def plan(
    model: str | Path, *, recipe: str = ..., report: Reporter = ..., **options: Any
) -> Plan: ...
def plan(
    model: str | Path | ConvertOptions,
    *,
    report: Reporter = SilentReporter(),  # noqa: B008 - stateless
    **options: Any,
) -> Plan:
    """What `convert` would do and need; reads headers, touches nothing.

    That it does not fit is not an error here; `rilq.check_fits(plan)` raises it.

    Args:
        model: a folder, or `owner/name` on the Hub; or all options at once.
        report: receives notes and warnings.
        options: of `ConvertOptions`, by name; those left out, or None, are the recipe's.

    Raises:
        InputError: the options, the checkpoint or the architecture cannot be used.
    """
    return pipeline.prepare(_options(model, options), report).plan


@overload
def convert(
    model: ConvertOptions,
    *,
    report: Reporter = ...,
    planned: Callable[[Plan], None] = ...,
    exports: Mapping[str, Path] = ...,
    push: PushOptions | None = ...,
    page: Path | None = ...,
    db: str | Path = ...,
) -> ConvertResult: ...
@overload
def convert(
    model: str | Path,
    *,
    recipe: str = ...,
    report: Reporter = ...,
    planned: Callable[[Plan], None] = ...,
    exports: Mapping[str, Path] = ...,
    push: PushOptions | None = ...,
    page: Path | None = ...,
    db: str | Path = ...,
    **options: Any,
) -> ConvertResult: ...
def convert(
    model: str | Path | ConvertOptions,
    *,
    report: Reporter = SilentReporter(),  # noqa: B008 - stateless
    planned: Callable[[Plan], None] = lambda plan: None,
    exports: Mapping[str, Path] = MappingProxyType({}),  # noqa: B008 - immutable
    push: PushOptions | None = None,
    page: Path | None = None,
    db: str | Path = AUTO,
    **options: Any,
) -> ConvertResult:
    """Convert a checkpoint; a job that was stopped is continued by the same call.

    Of several processes that a launcher has started, all call it with the same options; the first
    writes, records, exports and pushes. See docs/ranks.md.

    Args:
        model: a folder, or `owner/name` on the Hub; or all options at once.
        report: receives progress.
        planned: called with the plan before the work begins; what it raises ends the call.
        exports: kind to the folder to make, of the result; what a kind cannot hold is refused
            before the work begins.
        push: where the result goes then, itself and none of its exports; the right to push is
            checked before the work begins.
        page: where a report of the result is written, as one HTML file; that it cannot be is only
            a warning.
        db: file of the database that the run is recorded in, or "none"; "auto" is what RILQ_DB
            says, else `rilq.db` beside the output. See docs/runs.md.
        options: of `ConvertOptions`, by name; those left out, or None, are the recipe's.

    Raises:
        InputError: before any work, for what cannot succeed.
        RilqError: the work failed; its state is in the work folder.
    """
    chosen = _options(model, options)
    ranks = join(chosen.device)
    job = pipeline.prepare(chosen, report, ranks)
    if not ranks.first:  # works along; what surrounds the conversion is the first one's
        return pipeline.convert(job, report)
    if exports:
        check_planned(job, exports, ExportOptions())
    if push is not None:
        if push.base is None and job.checkpoint.source.commit is None:
            push = replace(push, base=chosen.model)
        open_planned(job, push, report)
    database = _database(db, job)
    planned(job.plan)
    pipeline.progress(job)  # raises what would be refused, which is no run
    with (
        ExitStack() as afterwards,
        recording(database, conversion_run(job), report, chosen.work) as record,
    ):
        try:
            result = pipeline.convert(job, record.report)
        except BaseException:
            with suppress(Exception):  # what ended the conversion is what counts
                record.tell(losses=losses_so_far(chosen.work))
            raise
        record.tell(**conversion_found(job, result))
        state = "already converted by this command" if result.already_done else "done"
        report.note(f"{result.output}: {state}")
        if page is not None and not (result.already_done and page.is_file()):
            # When the record has ended, so that it is on the page, and if a push fails as well.
            afterwards.callback(write_conversion_page, page, result.output, database, report)
        if exports:
            written = export(result.output, exports, device=chosen.device, report=record.report)
            result = replace(result, exports=tuple(written))
        if push is not None:
            result = replace(result, pushed=push_folder(result.output, push, record.report))
    return result


def evaluate(
    model: str,
    text: str = DEFAULT_TEXT,
    *,
    revision: str | None = None,
    report: Reporter = SilentReporter(),  # noqa: B008 - stateless
    db: str | Path = AUTO,
    **options: Any,
) -> Evaluation:
    """Measure a checkpoint, dense or converted; see docs/evaluation.md.

    Args:
        model: a folder, or `owner/name` on the Hub.
        text: a file, `c4`, `wikitext2` or `owner/name` on the Hub.
        revision: of `model` on the Hub.
        report: receives progress.
        db: file of the database that the run is recorded in, or "none"; "auto" is what RILQ_DB
            says, else `rilq.db` beside a converted checkpoint, or in the current folder.
        options: of `rilq.evaluation.evaluate.evaluate_with_passages`, by name.

    Raises:
        InputError: before any work, for what cannot succeed.
        RilqError: the model computes NaN or infinity, or the work failed.
    """
    names = [model, *filter(None, [options.get("against")])]
    wanted = [revision, options.get("against_revision")][: len(names)]
    # Of a stopped one, also where the loaded model is measured and in the record.
    revision, *other = pinned(options.get("work"), options.get("resume", "auto"), names, wanted)
    if other:
        options["against_revision"] = other[0]
    run = measured_run(model, revision=revision, options={"text": text, **options})
    with recording(database_of(run, db), run, report, Path(gettempdir())) as record:
        found, passages = evaluate_with_passages(
            model, text, revision=revision, report=record.report, **options
        )
        record.tell(**evaluation_found(found, passages))
    return found


def _database(db: str | Path, job: Job) -> Path | None:
    """Where a conversion is recorded: outside of every folder that it reads or makes."""
    options = job.options
    folders = [options.output, options.work]
    if job.checkpoint.source.commit is None:
        folders.append(Path(options.model).expanduser())
    return database_for(db, options.output.absolute().parent, tuple(folders))


def _options(model: str | Path | ConvertOptions, given: Mapping[str, Any]) -> ConvertOptions:
    """Options from what Python callers write: lists, a mapping, paths as text.

    Raises:
        TypeError: an option that there is not.
        OptionError: impossible values.
    """
    if isinstance(model, ConvertOptions):
        if given:
            raise TypeError(f"{', '.join(given)}: set them in the ConvertOptions that you pass")
        return model
    chosen = {name: value for name, value in given.items() if value is not None}
    recipe = chosen.pop("recipe", "default")
    for name in ("dataset", "skip", "adapter_targets"):
        if name in chosen:
            value = chosen[name]
            several = [value] if isinstance(value, str | Path) else value
            chosen[name] = tuple(map(str, several))
    if "bits_for" in chosen:
        chosen["bits_for"] = tuple(dict(chosen["bits_for"]).items())
    for name in ("output_dir", "work_dir"):
        if name in chosen:
            chosen[name] = Path(chosen[name])
    return ConvertOptions.of_recipe(recipe, model=str(model), **chosen)
