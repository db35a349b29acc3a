"""Which evaluation a work folder belongs to, and where it lies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rilq.converter.workdir import WorkDir, peek
from rilq.errors import CheckpointError, WorkDirError
from rilq.evaluation.forward import Subject
from rilq.formats.lora import ADAPTER_FOLDER
from rilq.formats.peft_folder import CONFIG_NAME
from rilq.formats.verify import MANIFEST_NAME, file_hash


def default_work(model: str) -> Path:
    """Work folder of a model's evaluation: beside a converted one, else in the current folder.

    Where the current folder is the model's own, it is beside any.
    """
    folder, here = Path(model).expanduser().resolve(), Path().resolve()
    name = f"{folder.name}.rilq-eval-work"
    beside = (folder / MANIFEST_NAME).is_file() or folder in (here, *here.parents)
    return folder.with_name(name) if beside else Path(name)


def identity(number: int, model: str, subject: Subject) -> dict[str, Any]:
    """What fixes a checkpoint's content, as far as it can be known without reading all of it.

    Args:
        number: of the checkpoint, in the order of the command.
        model: as it was given.

    Returns:
        JSON values, one comparable value per key. Of weights in a folder headers are hashed, and a
        converted one's `rilq.json`, which holds a hash of every tensor; see `check_unchanged`.
    """
    checkpoint, name = subject.streamed.checkpoint, f"checkpoint {number}"
    source = checkpoint.source
    if source.commit is not None:
        return {name: model, f"{name} commit": source.commit}
    hashes = dict(checkpoint.digests)
    beside = [*checkpoint.side_files(), MANIFEST_NAME]
    hashes |= {n: file_hash(source.path(n)) for n in beside if n in source.files()}
    if subject.adapter is not None:
        weights = subject.adapter.files.weights
        for path in (weights, weights.with_name(CONFIG_NAME)):
            hashes[f"{ADAPTER_FOLDER}/{path.name}"] = file_hash(path)
    return {name: "local folder", **{f"{name} {n}": hashes[n] for n in sorted(hashes)}}


def pinned(
    work: Path | None, resume: str, models: Sequence[str], revisions: Sequence[str | None]
) -> list[str | None]:
    """The commits that a stopped evaluation began with, or else the revisions that are asked for.

    Args:
        work, resume: as of `measure_texts`.
        models: as they were given, the base last; each with its revision.
    """
    begun = peek(work) if work is not None and resume != "never" else None
    known = begun["fingerprint"] if begun else {}
    commits = (
        known.get(f"checkpoint {number} commit")
        if known.get(f"checkpoint {number}") == model
        else None
        for number, model in enumerate(models)
    )
    return [commit or given for commit, given in zip(commits, revisions, strict=True)]


def signatures(subjects: Sequence[Subject]) -> dict[str, Any]:
    """Sizes, times and inodes of all files of local checkpoints."""
    return {
        f"{number}/{name}": list(signature)
        for number, subject in enumerate(subjects)
        for name, signature in subject.streamed.checkpoint.file_signatures().items()
    }


def check_unchanged(work: WorkDir, subjects: Sequence[Subject]) -> None:
    """That nobody has written to the checkpoints since the work was begun.

    Raises:
        CheckpointError: somebody may have; all touched files are named.
    """
    now, begun = signatures(subjects), work.job["choices"]["files"]
    touched = [name for name in begun if now.get(name) != begun[name]]
    if touched:
        files = []
        for name in touched:
            number, _, file = name.partition("/")
            files.append(f"{subjects[int(number)].label}/{file}")
        raise CheckpointError(
            f"{', '.join(files)}: written to since {work.path} was begun\n"
            "  pass --resume never to measure the checkpoint as it is now"
        )


def check_place(work: Path, subjects: Sequence[Subject]) -> None:
    """That the work folder is in no checkpoint: those are never written to.

    Raises:
        WorkDirError: it is.
    """
    place = work.resolve()
    for subject in subjects:
        if subject.streamed.checkpoint.source.commit is not None:
            continue
        folder = Path(subject.label)
        if folder.resolve() in (place, *place.parents):
            raise WorkDirError(
                f"{work}: the work folder lies inside the checkpoint {folder}\n"
                "  choose another folder with --work-dir"
            )
