"""The source of a job: what it must not become while the job is stopped."""

from __future__ import annotations

from rilq.converter.workdir import WorkDir
from rilq.errors import CheckpointError
from rilq.formats.checkpoint import Checkpoint


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
