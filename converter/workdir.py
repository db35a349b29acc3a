"""The work folder: what is complete, who owns it, and how a stopped job continues.

    job.rilq-work/
        rilq.lock        flock held while a run lasts; pid, host and start inside, for the message
        journal.jsonl    one line per finished unit, each with a checksum; append-only
        *.safetensors, *.bin   files that the journal names, each under a name of its own
        source/                shards of the source that are in use, where it is kept in part

A unit of work is finished when its line is in the journal, and never because a file is there. A
line names the unit's files with their size and xxh3; on resume they are checked, and a stage with a
damaged file is done again from its first unit. State files are never overwritten in place.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import xxhash

from rilq.converter.journal import append_line, hold_lock, make_folder, read_lines
from rilq.errors import WorkDirError
from rilq.formats.verify import file_hash
from rilq.progress import Reporter

STATE_FORMAT = 2
SOURCE_FOLDER = "source"

Resume = Literal["auto", "never", "required"]


def reached(point: str) -> None:
    """A named moment between two durable steps. Does nothing; the kill tests replace it."""


@dataclass(frozen=True)
class Record:
    """One finished unit.

    Attributes:
        stage: the part of the job that is done again if a file of it is damaged.
        unit: name within the stage, for example "layer 3".
        facts: JSON values that later units or the result need.
        files: path (relative to the work folder, or absolute) to (size, xxh3).
        passing: those of `files` that the next unit of the stage replaces.
    """

    stage: str
    unit: str
    facts: dict[str, Any]
    files: dict[str, tuple[int, str]] = field(default_factory=dict)
    passing: tuple[str, ...] = ()


class WorkDir:
    """An open, locked work folder; see `open_workdir`.

    Attributes:
        path: the folder.
        job: the first journal line: the fingerprint, the choices made, the run id.
        records: finished units in order.
        shared: whether several processes finish its units together.
    """

    shared = False

    def __init__(self, path: Path, job: dict[str, Any], records: list[Record]) -> None:
        self.path, self.job, self.records = path, job, records

    @property
    def run_id(self) -> str:
        """Hex of this host and the folder's first place; names what lies outside the folder."""
        return str(self.job["run_id"])

    @property
    def last_unit(self) -> str:
        """The unit that was finished last, for messages."""
        return repr(self.records[-1].unit) if self.records else "the beginning"

    def file(self, name: str) -> Path:
        """Path of a file in the folder."""
        return self.path / name

    def stage(self, stage: str) -> list[Record]:
        """Finished units of one stage, in order."""
        return [r for r in self.records if r.stage == stage]

    def commit(
        self,
        stage: str,
        unit: str,
        facts: Mapping[str, Any],
        *,
        files: Mapping[Path, str] | None = None,
        passing: Mapping[Path, str] | None = None,
    ) -> Record:
        """Say durably that a unit is finished, then delete what it replaces.

        Args:
            files: whole and synced files of the unit that stay, each with its xxh3.
            passing: likewise, but replaced by those of the stage's next unit.
        """
        files, passing = files or {}, passing or {}
        before = self.stage(stage)
        record = Record(
            stage,
            unit,
            dict(facts),
            {self._key(p): (p.stat().st_size, d) for p, d in [*files.items(), *passing.items()]},
            tuple(self._key(p) for p in passing),
        )
        reached(f"{stage}:written")
        append_line(self.path, _record_line(record))
        self.records.append(record)
        reached(f"{stage}:committed")
        for key in before[-1].passing if before else ():
            (self.path / key).unlink(missing_ok=True)
        reached(f"{stage}:cleaned")
        return record

    def own(self) -> WorkDir:
        """The folder for what one process does without the others, if there are any."""
        return self

    def drop(self, stage: str) -> None:
        """Forget a stage's units and all that came after them."""
        keep = next((i for i, r in enumerate(self.records) if r.stage == stage), len(self.records))
        gone, self.records = self.records[keep:], self.records[:keep]
        append_line(self.path, {"drop": keep})
        for record in gone:
            for key in record.files:
                (self.path / key).unlink(missing_ok=True)

    def check_files(self, report: Reporter) -> None:
        """Hash every file that is still needed; drop the stage of each damaged one."""
        while (damaged := self._damaged()) is not None:
            record, key = damaged
            report.warn(
                f"{self.path / key}: missing or damaged (unit {record.unit!r}); "
                f"stage {record.stage!r} starts again"
            )
            self.drop(record.stage)

    def remove_strays(self, report: Reporter) -> None:
        """Delete our own left-overs: unfinished temporary files and units never committed."""
        needed = {key for record in self.records for key in self._needed(record)}
        strays = [p for p in self.path.iterdir() if _is_ours(p) and p.name not in needed]
        for path in strays:
            path.unlink()
        if strays:
            report.note(f"{self.path}: removed {len(strays)} unfinished files of an earlier run")

    def remove(self) -> None:
        """Delete the folder: journal first, so that what is left counts as nothing, lock last.

        Files that are not ours stay, and so does the folder then.
        """
        (self.path / "journal.jsonl").unlink(missing_ok=True)
        reached("remove:begun")
        source = self.path / SOURCE_FOLDER
        for path in filter(_is_ours, [*self.path.iterdir(), *source.glob("*")]):
            path.unlink()
        with suppress(OSError):
            source.rmdir()
        (self.path / "rilq.lock").unlink(missing_ok=True)
        with suppress(OSError):
            self.path.rmdir()

    def _key(self, path: Path) -> str:
        return path.name if path.parent == self.path else str(path)

    def _damaged(self) -> tuple[Record, str] | None:
        for record in self.records:
            for key in self._needed(record):
                path, (size, digest) = self.path / key, record.files[key]
                if not path.is_file() or path.stat().st_size != size or file_hash(path) != digest:
                    return record, key
        return None

    def _needed(self, record: Record) -> list[str]:
        """A unit's files without those that a later unit of its stage has replaced."""
        replaced = () if self.stage(record.stage)[-1] is record else record.passing
        return [key for key in record.files if key not in replaced]


@contextmanager
def open_workdir(
    path: Path,
    fingerprint: Mapping[str, Any],
    choices: Mapping[str, Any],
    *,
    resume: Resume,
    report: Reporter,
) -> Iterator[WorkDir]:
    """Lock a work folder and read what an earlier run of the same job finished.

    Its files are not looked at yet: see `check_files` and `remove_strays`.

    Args:
        fingerprint: everything that determines the result; must equal the earlier run's.
        choices: what was chosen automatically; an earlier run's are kept.
        resume: "never" forgets what an earlier run finished; "required" refuses to begin anew.

    Raises:
        WorkDirError: held by another run; of another job (with the list of differences); from
            another version of the state; nothing to resume where it is required.
    """
    make_folder(path, "--work-dir")
    strangers = sorted(p.name for p in path.iterdir())
    if strangers and not {"rilq.lock", "journal.jsonl"} & set(strangers):
        raise WorkDirError(
            f"{path}: not a work folder: it holds {', '.join(strangers[:5])}\n"
            "  pass --work-dir with a new or empty folder"
        )
    with hold_lock(path, "--work-dir"):
        if resume == "never":
            (path / "journal.jsonl").unlink(missing_ok=True)
        lines, good = read_lines(path)
        if good is not None:
            report.warn(
                f"{path / 'journal.jsonl'}: torn or damaged after {len(lines)} lines; "
                "what is missing is done again"
            )
            os.truncate(path / "journal.jsonl", good)  # appending must start cleanly
        if len(lines) == 1:  # no unit was finished: the job may as well be another one now
            (path / "journal.jsonl").unlink()
            lines = []
        if not lines:
            if resume == "required":
                raise WorkDirError(f"{path}: nothing to resume\n  run without --resume required")
            job = {
                "state_format": STATE_FORMAT,
                "run_id": _run_id(path),
                "fingerprint": dict(fingerprint),
                "choices": dict(choices),
            }
            append_line(path, job)
            reached("job:committed")
            lines = [job]
        _check_job(path, lines[0], fingerprint)
        yield WorkDir(path, lines[0], _records(lines[1:]))


def peek(path: Path) -> dict[str, Any] | None:
    """The job line of an unfinished work folder, without locking it; None if there is none."""
    lines, _ = read_lines(path)
    return lines[0] if lines else None


def has_begun(path: Path, fingerprint: Mapping[str, Any]) -> bool:
    """Whether a job has finished units here; looks without locking, and changes nothing.

    Raises:
        WorkDirError: what is there is another job's; see `open_workdir`.
    """
    lines, _ = read_lines(path)
    if len(lines) < 2:  # with no unit, the job may as well be another one now
        return False
    _check_job(path, lines[0], fingerprint)
    return True


def peek_facts(path: Path, stage: str) -> dict[str, Any] | None:
    """Facts of the last unit of a stage, likewise."""
    lines, _ = read_lines(path)
    records = [record for record in _records(lines[1:]) if record.stage == stage]
    return records[-1].facts if records else None


def _run_id(path: Path) -> str:
    """Not random: whoever deletes the folder and starts anew finds the old staging folder."""
    return str(xxhash.xxh3_64_hexdigest(f"{socket.gethostname()}:{path.resolve()}".encode()))


# A unit's file, a shard, or one of either that was never finished.
_OURS = re.compile(r"[^.].*\.(safetensors|bin)|[0-9a-f]{40,64}\.part|\..+\.[0-9a-f]{16}\.tmp")


def _is_ours(path: Path) -> bool:
    return _OURS.fullmatch(path.name) is not None and (path.is_symlink() or path.is_file())


def _check_job(path: Path, job: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> None:
    if job.get("state_format") != STATE_FORMAT:
        raise WorkDirError(
            f"{path}: written by another version of rilq (state format "
            f"{job.get('state_format')}, this one reads {STATE_FORMAT})\n"
            "  finish it with that version, or pass --work-dir with a new folder"
        )
    old, new = dict(job["fingerprint"]), json.loads(json.dumps(fingerprint))
    differences = [
        f"{key}: {old.get(key)!r} there, {new.get(key)!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    if differences:
        raise WorkDirError(
            f"{path}: belongs to another job:\n  "
            + "\n  ".join(differences)
            + "\n  pass the original options to resume, --resume never to begin anew, or another "
            "--work-dir"
        )


def _record_line(record: Record) -> dict[str, Any]:
    return {
        "stage": record.stage,
        "unit": record.unit,
        "facts": record.facts,
        "files": record.files,
        "passing": record.passing,
    }


def _records(lines: Iterable[Mapping[str, Any]]) -> list[Record]:
    records: list[Record] = []
    for line in lines:
        if "drop" in line:
            del records[int(line["drop"]) :]
            continue
        files = {str(k): (int(v[0]), str(v[1])) for k, v in line["files"].items()}
        records.append(
            Record(line["stage"], line["unit"], line["facts"], files, tuple(line["passing"]))
        )
    return records
