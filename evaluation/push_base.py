"""What a pushed checkpoint was made from: found, compared, and told as far as it may be told."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rilq.errors import HubError, OptionError, printable
from rilq.evaluation.card import Base, card_metadata
from rilq.formats.fp8 import open_source_checkpoint
from rilq.formats.hub import HubRepository, open_source
from rilq.formats.hub_listing import fetch_listing
from rilq.formats.hub_requests import Address, explain, with_patience
from rilq.formats.hub_target import Target
from rilq.formats.verify import CARD, MANIFEST_NAME
from rilq.progress import Reporter


def find_base(manifest: Mapping[str, Any], given: str | None) -> tuple[str, str | None] | None:
    """The base and its commit (None: a folder), checked to be the one that was converted.

    Args:
        manifest: `rilq.json`.
        given: `--base`; None for what the manifest names.

    Returns:
        None if nothing is given, and the manifest names a local folder.

    Raises:
        OptionError: `--base` is another model.
    """
    source = manifest["source"]
    if given is None:
        return (source["name"], source["commit"]) if source["commit"] else None
    local = Path(given).is_dir()
    opened = open_source(given, revision=None if local else source["commit"])
    if open_source_checkpoint(opened).header_hash() != source["header_hash"]:
        raise OptionError(
            f"--base {printable(given)}: not the model that was converted, which is "
            f"{source['name']}\n  give the folder, or owner/name, that `rilq convert` was given"
        )
    return given, opened.commit


def tell_base(base: tuple[str, str | None] | None, target: Target, *, force: bool) -> Base:
    """Name and metadata of the base, as far as they may be told.

    Args:
        base: as `find_base` gives it; None if it is not known.
        target: where its name would be published.
        force: publish the name of a private one.

    Raises:
        HubError: it is private, and the target is not.
    """
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
    if listing.private and not (target.head.private or force):
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
