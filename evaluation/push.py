"""push(): a converted folder to the Hub, after everything that can be wrong with it was checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

from rilq.calib.sources import describe_source, parse_source
from rilq.converter.pipeline import Job, source_facts
from rilq.errors import CheckpointError, HubError, OptionError, printable
from rilq.evaluation.card import CARD, Base, CardFacts, card_metadata, make_card
from rilq.evaluation.kept_figures import measure_once
from rilq.evaluation.perplexity import Evaluation
from rilq.evaluation.reload import check_generates
from rilq.formats.checkpoint import Checkpoint
from rilq.formats.hub import HubRepository, open_source
from rilq.formats.hub_listing import fetch_listing, some
from rilq.formats.hub_push import LocalFile, Pushed, push_files
from rilq.formats.hub_requests import PATIENCE, Address, Patience, explain, with_patience
from rilq.formats.hub_target import Target, check_holds, described, open_target
from rilq.formats.verify import MANIFEST_NAME, read_manifest, verify
from rilq.progress import Reporter, SilentReporter

DEFAULT_TEXT = "wikitext2"  # the field's test text, in its standard windows
DEFAULT_RATIO = 2.0
# Words of a vocabulary may look like paths; what describes the model may not hold any.
_TOLD = (".json", ".jinja", ".md")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocabulary.json")

# Of rilq.json: key to the keys in it.
_NEEDED: Mapping[str, tuple[str, ...]] = {
    "source": ("name", "commit", "header_hash"),
    "recipe": ("bits", "group_size"),
    "versions": ("rilq",),
    "calibration": ("sources", "rows", "seqlen", "digest"),
    "quality": (),
    "compute_dtype": (),
    "bits_per_weight": (),
    "bits_per_parameter": (),
}


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
    recipe = {"bits": job.options.bits, "group_size": job.options.group_size}
    model = {"source": source_facts(job.checkpoint), "recipe": recipe}
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
    folder, in `<folder>.rilq-eval.json`.

    Args:
        folder: made by `rilq convert`; nothing in it is changed.
        options: where to and how.
        report: receives progress.
        patience: as of `open_target`.

    Raises:
        InputError: the folder is damaged, not good enough, or the Hub refuses.
    """
    manifest = read_manifest(folder)
    _check_told(folder, manifest)
    base = _base_model(folder, manifest, options)
    target = open_push(options, report, model=manifest, patience=patience)
    _check_whole(folder, report)
    names = [name for name in sorted(manifest["files"]) if name != CARD]
    files = {name: LocalFile.of(folder / name) for name in (*names, MANIFEST_NAME)}
    _check_tells_nothing(files, folder, options)
    told = _told(base, options, target)
    report.stage("reload")
    check_generates(folder)
    figures = base and measure_once(
        folder,
        *base,
        options.text,
        text_key=options.text_key,
        seqlen=options.seqlen,
        device=options.device,
        dtype=options.dtype,
        report=report,
    )
    _check_good(folder, figures, options, report)
    at = target.at
    facts = CardFacts(at.endpoint, at.repo_id, at.revision, manifest, told, files, figures)
    card = LocalFile.of(make_card(facts, _existing_card(folder, target)).encode())
    _check_tells_nothing({CARD: card}, folder, options)
    title = f"Upload a checkpoint made by rilq (job {str(manifest.get('job'))[:12]})"
    try:
        return PushResult(push_files(target, {**files, CARD: card}, title=title), figures)
    except HubError as err:
        raise HubError(f"{err}\n  the checkpoint in {folder} is whole and stays") from err.__cause__


def _check_told(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse a `rilq.json` that lacks what the card is made of; no checksum covers that file."""
    missing = [key for key in _NEEDED if key not in manifest] + [
        f"{key}.{inner}"
        for key, wanted in _NEEDED.items()
        for inner in wanted
        if key in manifest and not (isinstance(manifest[key], dict) and inner in manifest[key])
    ]
    if missing:
        raise CheckpointError(
            f"{folder / MANIFEST_NAME}: has no {', '.join(missing)}\n  convert the model again"
        )


def _check_whole(folder: Path, report: Reporter) -> None:
    report.stage("verify")
    found = verify(folder)
    if found.damage:
        raise CheckpointError(
            f"{folder}: is not what was written by the conversion: {'; '.join(found.damage[:5])}\n"
            "  convert the model again; only what is whole is pushed"
        )
    others = [name for name in found.unlisted if name != CARD]
    if others:
        report.warn(f"{folder}: not pushed, since {MANIFEST_NAME} does not list it: {some(others)}")


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


def _check_tells_nothing(
    files: Mapping[str, LocalFile], folder: Path, options: PushOptions
) -> None:
    """Refuse to publish a token, or paths of this machine, which tell who its user is."""
    ours = [Path.home(), folder.absolute(), folder.resolve()]
    if options.base is not None and Path(options.base).is_dir():
        ours.append(Path(options.base).resolve())
    # Not /tmp or /data, which anybody's examples may name.
    places = {*ours, *(path.parent for path in ours if len(path.parts) > 3)} - {Path("/")}
    paths = {f"{place}{end}": "a path of this machine" for place in places for end in ("/", '"')}
    secrets = {**paths, **({token: "the token"} if (token := get_token()) else {})}
    for name, file in files.items():
        if not name.endswith(_TOLD) or name in _VOCABULARIES:
            continue
        content = file.content if isinstance(file.content, bytes) else file.content.read_bytes()
        text = content.decode("utf-8", errors="replace")
        if found := {what for secret, what in secrets.items() if secret in text}:
            raise CheckpointError(
                f"{name}: holds {' and '.join(sorted(found))}, which must not be published\n"
                "  remove it from the source checkpoint and convert again, or from the card"
            )


# ---- the base -----------------------------------------------------------------------------------


def _base_model(
    folder: Path, manifest: Mapping[str, Any], options: PushOptions
) -> tuple[str, str | None] | None:
    """The base and its commit (None: a folder), checked to be the one that was converted.

    Raises:
        OptionError: `--base` is another model, or is needed.
    """
    source = manifest["source"]
    if options.base is None:
        if source["commit"]:
            return source["name"], source["commit"]
        if options.force:
            return None
        raise OptionError(
            f"{folder}: was made from a local folder, so that its perplexity has nothing to be "
            "compared with\n  give --base FOLDER, or --force to push it without figures"
        )
    local = Path(options.base).is_dir()
    opened = open_source(options.base, revision=None if local else source["commit"])
    if Checkpoint.open(opened).header_hash() != source["header_hash"]:
        raise OptionError(
            f"--base {printable(options.base)}: not the model that was converted, which is "
            f"{source['name']}\n  give the folder, or owner/name, that `rilq convert` was given"
        )
    return options.base, opened.commit


def _told(base: tuple[str, str | None] | None, options: PushOptions, target: Target) -> Base:
    """Name and metadata of the base, as far as they may be told."""
    if base is None:
        return Base()
    model, commit = base
    report, patience = target.report, target.patience
    if commit is None:
        card = Path(model) / CARD
        return Base(None, None, _metadata(card, report) if card.is_file() else {})
    at = Address(model, commit, target.at.endpoint, target.at.cache)
    try:
        listing = with_patience(lambda: fetch_listing(at), model, patience, report)
        source = HubRepository(at, commit, listing.top_level(), False, patience, report)
        metadata = _metadata(source.path(CARD), report) if CARD in source.files() else {}
    except Exception as err:
        report.warn(f"licence and language of the base are not known: {explain(err, at)}")
        return Base(model, commit)
    if listing.private and not (target.head.private or options.force):
        raise HubError(
            f"{model}: this base is private, and the card and {MANIFEST_NAME} would publish its "
            f"name in {target.at.repo_id}\n  push with --private, or if that is meant, use "
            "`rilq push --force`"
        )
    return Base(model, commit, metadata)


def _metadata(card: Path, report: Reporter) -> dict[str, Any]:
    try:
        return card_metadata(card.read_text(encoding="utf-8-sig"))
    except Exception as err:  # a YAML parser's own kinds, or not UTF-8
        report.warn(f"the base's {CARD} cannot be read ({type(err).__name__}): no licence is taken")
        return {}


def _check_good(
    folder: Path, figures: Evaluation | None, options: PushOptions, report: Reporter
) -> None:
    if figures is None or figures.against is None:
        report.warn(f"{folder}: perplexity was not measured")
        return
    ours, theirs = figures.perplexity, figures.against.base_perplexity
    found = f"perplexity {ours:.4g}, {ours / theirs:.3g} times the base's {theirs:.4g}"
    report.note(f"{folder}: {found}, on {figures.text}")
    if ours <= options.max_ppl_ratio * theirs:
        return
    if not options.force:
        raise CheckpointError(
            f"{folder}: {found} on {figures.text}, and --max-ppl-ratio is "
            f"{options.max_ppl_ratio:g}\n  convert with a better recipe (--recipe best, or more "
            "bits), raise the ratio, or use `rilq push --force`"
        )
    report.warn(f"{folder}: pushed in spite of its {found}")
