"""A converted checkpoint on the Hub as a folder on this machine, with what lies in its folders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rilq.errors import CheckpointError
from rilq.formats.hub import HubRepository, open_source
from rilq.formats.hub_cache import RepositoryCache
from rilq.formats.hub_listing import fetch_listing
from rilq.formats.hub_requests import Address, explain, safe_cause, with_patience
from rilq.formats.source import leaves_folder, read_json
from rilq.formats.verify import MANIFEST_NAME
from rilq.progress import Reporter


def local_folder(model: str | Path, *, revision: str | None = None, report: Reporter) -> Path:
    """The folder of a checkpoint; of one on the Hub, its snapshot in the client's cache.

    What its `rilq.json` lists is fetched, as far as the cache lacks it, and each file's digest is
    compared with the Hub's.

    Args:
        model: a folder, or `owner/name` on the Hub.
        revision: branch, tag or commit on the Hub.
        report: receives progress.

    Raises:
        CheckpointError: it is neither, or the repository holds no checkpoint made by rilq.
        HubError: the Hub refused, or could not be reached.
    """
    if isinstance(model, Path):
        return model
    source = open_source(model, revision=revision, report=report)
    if not isinstance(source, HubRepository):
        return Path(source.label)
    files = (read_json(source, source.files(), MANIFEST_NAME) or {}).get("files")
    if not isinstance(files, dict):
        raise CheckpointError(
            f"{source.label}: has no {MANIFEST_NAME} that lists files\n"
            "  give a checkpoint that `rilq convert` has written"
        )
    source = _with_folders(source)
    names = [name for name in files if name in source.listing and not leaves_folder(name)]
    report.stage("fetch", len(names), "file")
    for count, name in enumerate(names, start=1):
        source.path(name)
        report.step(count)
    return source.path(MANIFEST_NAME).parent


def _with_folders(source: HubRepository) -> HubRepository:
    """The same commit, with the files that lie in its folders too."""
    if source.offline:
        cache = RepositoryCache(source.at.cache, source.label)
        return replace(source, listing=cache.listing(source.path(MANIFEST_NAME).parent))
    at = Address(source.label, source.commit, source.at.endpoint, source.at.cache)
    try:
        found = with_patience(
            lambda: fetch_listing(at), source.label, source.patience, source.report
        )
    except Exception as err:
        raise explain(err, at) from safe_cause(err)
    return replace(source, listing=found.files)
