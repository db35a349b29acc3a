"""What must be true of a folder before it is pushed: whole, discreet, and good enough."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

from rilq.errors import CheckpointError, OptionError
from rilq.evaluation.figures import Evaluation
from rilq.evaluation.recipes import in_parts
from rilq.formats.export.kinds import kind_of
from rilq.formats.export.source import NativeCheckpoint
from rilq.formats.hub_listing import some
from rilq.formats.hub_push import LocalFile
from rilq.formats.verify import MANIFEST_NAME, verify
from rilq.progress import Reporter, SilentReporter

# Words of a vocabulary may look like paths; what describes the model may not hold any.
_TOLD = (".json", ".jinja", ".md")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocabulary.json")


# Of rilq.json: key to the keys in it.
_NEEDED: Mapping[str, tuple[str, ...]] = {
    "source": ("name", "commit", "header_hash"),
    "versions": ("rilq",),
    "calibration": ("sources", "rows", "seqlen", "digest"),
    "quality": (),
    "compute_dtype": (),
}
_OF_GROUPS, _OF_PARTS = ("bits", "group_size"), ("method", "low_bits")  # recipes
_OF_NATIVE: Mapping[str, tuple[str, ...]] = {"bits_per_weight": (), "bits_per_parameter": ()}
_OF_EXPORT: Mapping[str, tuple[str, ...]] = {
    "export": ("kind", "native", "rilq", "text", "logit_difference")
}


def check_told(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse a `rilq.json` that lacks what the card is made of; no checksum covers that file.

    Raises:
        CheckpointError: it does.
    """
    parted = in_parts(recipe) if isinstance(recipe := manifest.get("recipe"), dict) else False
    needed = {
        **_NEEDED,
        "recipe": _OF_PARTS if parted else _OF_GROUPS,
        **(_OF_EXPORT if "export" in manifest else _OF_NATIVE),
        **(dict.fromkeys(("activation_bits", "cache_bits"), ()) if parted else {}),
    }
    missing = [key for key in needed if key not in manifest] + [
        f"{key}.{inner}"
        for key, wanted in needed.items()
        for inner in wanted
        if key in manifest and not (isinstance(manifest[key], dict) and inner in manifest[key])
    ]
    if missing:
        raise CheckpointError(
            f"{folder / MANIFEST_NAME}: has no {', '.join(missing)}\n  convert the model again"
        )


def check_whole(folder: Path, report: Reporter) -> None:
    """Compare every checksum.

    Raises:
        CheckpointError: a file is missing, or is not what was written.
    """
    report.stage("verify")
    found = verify(folder)
    if found.damage:
        raise CheckpointError(
            f"{folder}: is not what rilq has written: {'; '.join(found.damage[:5])}\n"
            "  convert, or export, the model again; only what is whole is pushed"
        )
    if others := list(found.unlisted):
        report.warn(f"{folder}: not pushed, since {MANIFEST_NAME} does not list it: {some(others)}")


def measured_folder(folder: Path, manifest: Mapping[str, Any], native: Path | None) -> Path | None:
    """Whose perplexity stands for the folder's: its own, or the checkpoint that was exported.

    Returns:
        None for an export whose native checkpoint is not given.

    Raises:
        OptionError: that is another one, or the folder is no export.
    """
    export = manifest.get("export")
    if export is None and native is None:
        return folder
    if export is None:
        raise OptionError(f"--native {native}: {folder} is no export\n  leave the option out")
    kind_of(export["kind"])
    if native is None:
        return None
    if NativeCheckpoint.open(native, SilentReporter()).content_hash != export["native"]:
        raise OptionError(
            f"--native {native}: not the checkpoint that {folder} was exported from\n"
            "  give the folder, as it was, that `rilq export` was given"
        )
    return native


def check_measurable(
    folder: Path, base: tuple[str, str | None] | None, measured: Path | None
) -> None:
    """Refuse what cannot be compared with its base.

    Raises:
        OptionError: the message names what is to be given.
    """
    if base is None:
        raise OptionError(
            f"{folder}: was made from a local folder, so that its perplexity has nothing to be "
            "compared with\n  give --base FOLDER, or --force to push it without figures"
        )
    if measured is None:
        raise OptionError(
            f"{folder}: is an export, whose perplexity is measured on the checkpoint that it was "
            "made from\n  give --native FOLDER, or --force to push it without figures"
        )


def check_tells_nothing(files: Mapping[str, LocalFile], folders: Iterable[Path]) -> None:
    """Refuse to publish a token, or paths of this machine, which tell who its user is.

    Args:
        files: to be published.
        folders: that the push knows; neither they nor what they lie in may be told.

    Raises:
        CheckpointError: a file holds such a thing.
    """
    ours = [Path.home(), *(path for f in folders for path in (f.absolute(), f.resolve()))]
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


def check_good(
    folder: Path,
    figures: Evaluation | None,
    *,
    max_ppl_ratio: float,
    force: bool,
    report: Reporter,
) -> None:
    """Refuse a perplexity above the base's times a ratio; with `force`, warn.

    Raises:
        CheckpointError: it is.
    """
    if figures is None or figures.against is None:
        report.warn(f"{folder}: perplexity was not measured")
        return
    ours, theirs = figures.perplexity, figures.against.base_perplexity
    found = f"perplexity {ours:.4g}, {ours / theirs:.3g} times the base's {theirs:.4g}"
    report.note(f"{folder}: {found}, on {figures.text}")
    if ours <= max_ppl_ratio * theirs:
        return
    if not force:
        raise CheckpointError(
            f"{folder}: {found} on {figures.text}, and --max-ppl-ratio is "
            f"{max_ppl_ratio:g}\n  convert with a better recipe (--recipe best, or more "
            "bits), raise the ratio, or use `rilq push --force`"
        )
    report.warn(f"{folder}: pushed in spite of its {found}")
