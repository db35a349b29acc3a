"""From what a user names, folders and runs, to the subjects of a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rilq.errors import CheckpointError, OptionError, RilqError, one_line
from rilq.evaluation.report.page import write_page
from rilq.evaluation.report.subject import Subject, folder_subject, runs_subject
from rilq.formats.verify import MANIFEST_NAME, file_hash
from rilq.progress import Reporter
from rilq.records.database import Database, read_database
from rilq.records.place import AUTO, database_for
from rilq.records.run import Run


def gather(words: Sequence[str], db: str) -> list[Subject]:
    """A subject for each word.

    Args:
        words: folders of checkpoints, and numbers of runs. A folder whose name is a number is
            written as `./7`.
        db: as of `database_for`; by default that beside the folder, and of a run that in the
            current folder.

    Raises:
        InputError: there is no such checkpoint or run, or no such database.
    """
    return [
        _of_run(int(word), db) if word.isdecimal() else _of_folder(Path(word), db) for word in words
    ]


def write_conversion_page(
    page: Path, folder: Path, database: Path | None, report: Reporter
) -> None:
    """Write the report of a conversion; what goes wrong is a warning, for the checkpoint is whole.

    Args:
        database: that it was recorded in, if it was.
    """
    try:
        write_page(page, [folder_subject(folder, _content_runs(folder, database))])
    except RilqError as err:
        report.warn(f"no report: {err}")
    except Exception as err:  # a mistake in here must not look like one of the conversion
        report.warn(f"no report: {one_line(err)}")
    else:
        report.note(f"{page}: report")


def _of_folder(folder: Path, db: str) -> Subject:
    if not (folder / MANIFEST_NAME).is_file():
        raise CheckpointError(
            f"{folder}: has no {MANIFEST_NAME}: not a checkpoint made by rilq\n"
            "  give the folder of one, or the number of a run (see `rilq runs`)"
        )
    place = database_for(db, folder.absolute().parent)
    if place is not None and db == AUTO and not place.is_file():
        place = None  # nothing was recorded
    return folder_subject(folder, _content_runs(folder, place))


def _content_runs(folder: Path, place: Path | None) -> list[Run]:
    if place is None:
        return []
    with read_database(place) as database:
        return _same_content(database, file_hash(folder / MANIFEST_NAME))


def _of_run(number: int, db: str) -> Subject:
    place = database_for(db, Path())
    if place is None:
        raise OptionError(f"run {number}: with --db none there are no runs")
    with read_database(place) as database:
        run = database.run(number)
        others = []
        if run.content_hash is not None:
            others = [r for r in _same_content(database, run.content_hash) if r.id != number]
    if run.evaluation is not None:  # it is this one that was asked for
        others = [other for other in others if other.evaluation is None]
    return runs_subject(f"{run.checkpoint}, run {number}", [run, *others])


def _same_content(database: Database, content_hash: str) -> list[Run]:
    """Runs that made or measured a checkpoint, whole, the newest first."""
    return [database.run(run.id) for run in database.runs(content_hash=content_hash)]
