"""The source of a job: opened as it was begun, unchanged since, and what it is called."""

from __future__ import annotations

from pathlib import Path

from rilq.converter.options import ConvertOptions
from rilq.converter.workdir import SOURCE_FOLDER, WorkDir, peek, peek_facts
from rilq.errors import CheckpointError
from rilq.formats.checkpoint import Checkpoint
from rilq.formats.hub import HubRepository, open_source
from rilq.formats.hub_cache import RemoteFile
from rilq.formats.hub_window import ShardWindow
from rilq.formats.source import Source
from rilq.formats.writer import parse_size
from rilq.progress import Reporter


def open_job_source(options: ConvertOptions, report: Reporter) -> Source:
    """The source, at the commit that a stopped job began with; with few shards on disk if asked."""
    limit = None if options.max_disk is None else parse_size(options.max_disk)
    begun = peek(options.work) if options.resume != "never" else None
    revision, recorded = options.revision, None
    if begun and begun["fingerprint"].get("model") == options.model:
        revision = begun["fingerprint"].get("commit") or revision
        recorded = peek_facts(options.work, "source") if options.evicts else None
    known = {n: RemoteFile.of(*of) for n, of in recorded["files"].items()} if recorded else None
    source = open_source(options.model, revision=revision, known=known, report=report)
    if not options.evicts:
        return source
    if not isinstance(source, HubRepository):
        report.note(f"{options.model}: a local folder, of which --evict and --max-disk keep all")
        return source
    heads = recorded["heads"] if recorded else None
    return ShardWindow(source, options.work / SOURCE_FOLDER, limit, heads=heads)


def record_source(source: Source, work: WorkDir) -> None:
    """Keep what the Hub said about shards that will be deleted: later steps need not ask again."""
    if isinstance(source, ShardWindow) and not work.stage("source"):
        files = {name: [file.size, file.digest] for name, file in source.repo.listing.items()}
        work.commit("source", "source", {"files": files, "heads": source.heads})


def check_source(checkpoint: Checkpoint, work: WorkDir) -> None:
    """That the source is still what the finished units were made from.

    Files whose size, times and inode are what they were are taken as unchanged; the tensors that
    were read from any other file are hashed again.

    Raises:
        CheckpointError: a file changed; the message names it.
    """
    now = {k: list(v) for k, v in checkpoint.file_signatures().items()}
    touched = [k for k, v in work.job["choices"]["files"].items() if now.get(k) != v]
    if not touched:
        return
    read: dict[str, str] = {}
    for record in work.records:
        read |= record.facts.get("source", {})
    for shard in touched:
        names = [n for n in checkpoint.tensors if shard in checkpoint.shards_of([n])]
        for name in names:
            expected = read.get(name)
            if expected is None:
                what = f"it was touched, and {name} had not been read yet"
            else:
                checkpoint.read([name])
                if checkpoint.hashes[name] == expected:
                    continue
                what = f"{name} differs"
            raise CheckpointError(
                f"{checkpoint.source.label}/{shard}: the source changed since {work.path} was "
                f"begun: {what}\n"
                "  pass --work-dir with a new folder to convert the checkpoint as it is now"
            )


def source_facts(checkpoint: Checkpoint) -> dict[str, str | None]:
    """Which checkpoint this is, for `rilq.json`."""
    return {
        "name": base_name(checkpoint),
        "commit": checkpoint.source.commit,
        "header_hash": checkpoint.header_hash(),
    }


def base_name(checkpoint: Checkpoint) -> str:
    """What a checkpoint is called in results: without any path of this machine."""
    label = checkpoint.source.label
    return label if checkpoint.source.commit else Path(label).resolve().name
