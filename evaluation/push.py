"""push(): a converted folder to the Hub, after everything that can be wrong with it was checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rilq.calib.sources import describe_source, parse_source
from rilq.converter.job import Job
from rilq.converter.job_source import source_facts
from rilq.errors import HubError, OptionError
from rilq.evaluation.card import CardFacts, make_card
from rilq.evaluation.figures import Evaluation
from rilq.evaluation.kept_figures import measure_once
from rilq.evaluation.perplexity import DEFAULT_TEXT
from rilq.evaluation.push_base import find_base, tell_base
from rilq.evaluation.push_checks import (
    check_good,
    check_measurable,
    check_tells_nothing,
    check_told,
    check_whole,
    measured_folder,
)
from rilq.evaluation.recipes import in_parts
from rilq.evaluation.reload import check_generates
from rilq.evaluation.report.plots import loss_plot
from rilq.evaluation.report.subject import finite_losses
from rilq.evaluation.report.svg import to_png
from rilq.formats.export.kinds import possible
from rilq.formats.export.source import NativeCheckpoint
from rilq.formats.hub_push import LocalFile, Pushed, push_files
from rilq.formats.hub_requests import PATIENCE, Patience
from rilq.formats.hub_target import Target, check_holds, described, open_target
from rilq.formats.verify import CARD, CARD_PLOT, MANIFEST_NAME, read_manifest
from rilq.progress import Reporter, SilentReporter
from rilq.records.losses import losses_of

DEFAULT_RATIO = 2.0
# Exports that transformers loads wherever rilq is installed. The others were read back and compared
# when they were written, by code of ours.
_RELOADED = ("dense", "metal")


@dataclass(frozen=True)
class PushOptions:
    """What is asked of a push.

    Attributes:
        repo_id: `owner/name`.
        revision: branch; `main` if None.
        private: make the repository private; one that is public is refused.
        pull_request: open one instead of writing to the branch.
        replace: whatever model the repository holds may be replaced.
        force: push in spite of a perplexity that is too high or unknown, or of a private base.
        max_ppl_ratio: the perplexity allowed, as a multiple of the base's.
        text, text_key, seqlen: what perplexity is measured on, as of `evaluate`.
        base: the model that the checkpoint was made from, folder or `owner/name`; None for what
            `rilq.json` names, if that is on the Hub.
        native: of an export, the folder that it was made from; perplexity is that one's.
        device, dtype: to measure with, as of `evaluate`.
    """

    repo_id: str
    revision: str | None = None
    private: bool = False
    pull_request: bool = False
    replace: bool = False
    force: bool = False
    max_ppl_ratio: float = DEFAULT_RATIO
    text: str = DEFAULT_TEXT
    text_key: str = "text"
    seqlen: int | None = None
    base: str | None = None
    native: Path | None = None
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if not self.max_ppl_ratio >= 1:
            raise OptionError(
                f"--max-ppl-ratio {self.max_ppl_ratio:g}: expected 1 or more; a quantized model is "
                "hardly ever better than its base"
            )


@dataclass(frozen=True)
class PushResult:
    """What was pushed where, and what was measured of it (None: nothing)."""

    pushed: Pushed
    figures: Evaluation | None

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self.pushed), "figures": self.figures and self.figures.as_dict()}


def open_push(
    options: PushOptions,
    report: Reporter,
    *,
    model: Mapping[str, Any],
    patience: Patience = PATIENCE,
) -> Target:
    """Make sure of the text, of the right to push, and that no other model is in the way.

    Args:
        options: where to, and whether replacing is asked for.
        report: receives notes.
        model: `rilq.json` of what will be pushed, or its parts `source` and `recipe` while there is
            no such file yet.
        patience: as of `open_target`.

    Raises:
        InputError: a push could not succeed.
    """
    describe_source(parse_source(options.text))  # a file that is not there is told now
    target = open_target(
        options.repo_id,
        revision=options.revision,
        private=options.private,
        pull_request=options.pull_request,
        report=report,
        patience=patience,
    )
    if not options.replace:
        check_holds(target, described(model))
    return target


def open_planned(job: Job, options: PushOptions, report: Reporter) -> Target:
    """The same before a conversion, of what it will make.

    Raises:
        InputError: a push could not succeed.
    """
    model = {"source": source_facts(job.checkpoint), "recipe": job.options.recorded()}
    return open_push(options, report, model=model)


def push(
    folder: Path,
    options: PushOptions,
    report: Reporter = SilentReporter(),  # noqa: B008 - stateless
    *,
    patience: Patience = PATIENCE,
) -> PushResult:
    """Check a folder and push it; run again, it continues and commits nothing twice.

    In this order: the right to write, every checksum, loading and generating, perplexity against
    the base, the card; then files, and one commit at the end. What was measured is kept beside the
    folder that was measured, in `<folder>.rilq-eval.json`.

    Args:
        folder: made by `rilq convert` or `rilq export`; nothing in it is changed.
        options: where to and how.
        report: receives progress.
        patience: as of `open_target`.

    Raises:
        InputError: the folder is damaged, not good enough, or the Hub refuses.
    """
    manifest = read_manifest(folder)
    check_told(folder, manifest)
    base = find_base(manifest, options.base)
    measured = measured_folder(folder, manifest, options.native)
    if not options.force:
        check_measurable(folder, base, measured)
    target = open_push(options, report, model=manifest, patience=patience)
    check_whole(folder, report)
    names = [name for name in sorted(manifest["files"]) if name != CARD]
    files = {name: LocalFile.of(folder / name) for name in (*names, MANIFEST_NAME)}
    known = [folder, *(Path(p) for p in (options.base, options.native) if p and Path(p).is_dir())]
    check_tells_nothing(files, known)
    told = tell_base(base, target, force=options.force)
    export = manifest.get("export")
    if export is None or export["kind"] in _RELOADED:
        report.stage("reload")
        check_generates(folder)
    figures = None
    if base is not None and measured is not None:
        if measured != folder:
            check_whole(measured, report)
        figures = measure_once(
            measured,
            *base,
            options.text,
            text_key=options.text_key,
            seqlen=options.seqlen,
            device=options.device,
            dtype=options.dtype,
            report=report,
        )
    check_good(
        folder,
        figures,
        max_ppl_ratio=options.max_ppl_ratio,
        force=options.force,
        report=report,
    )
    losses = finite_losses(losses_of(manifest["quality"]))
    if len(total := [point for point in losses if point.term == "total"]) > 1:
        files[CARD_PLOT] = LocalFile.of(to_png(loss_plot(total)))
    at = target.at
    alone = export or in_parts(manifest["recipe"])  # nothing else can be made of it
    exports = {} if alone else possible(NativeCheckpoint.open(folder, report).form)
    facts = CardFacts(at.endpoint, at.repo_id, at.revision, manifest, told, files, figures, exports)
    card = LocalFile.of(make_card(facts, _existing_card(folder, target)).encode())
    check_tells_nothing({CARD: card}, known)
    try:
        pushed = push_files(target, {**files, CARD: card}, title=_title(manifest))
        return PushResult(pushed, figures)
    except HubError as err:
        raise HubError(f"{err}\n  the checkpoint in {folder} is whole and stays") from err.__cause__


def _title(manifest: Mapping[str, Any]) -> str:
    """Of the commit; the same for the same content."""
    if (export := manifest.get("export")) is not None:
        return f"Upload a {export['kind']} export made by rilq (of {export['native'][:12]})"
    return f"Upload a checkpoint made by rilq (job {str(manifest.get('job'))[:12]})"


def _existing_card(folder: Path, target: Target) -> str | None:
    """The card that is on the Hub, else one that the user has put into the folder."""
    content = target.read(CARD)
    if content is None and (folder / CARD).is_file():
        content = (folder / CARD).read_bytes()
    try:
        return None if content is None else content.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        raise HubError(
            f"{target.at.repo_id}/{CARD}: the card is not UTF-8\n  save it as UTF-8, then run the "
            "same command again"
        ) from err
