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

import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any, Literal

import xxhash

from rilq.errors import WorkDirError
from rilq.formats.durable import sync_folder
from rilq.formats.verify import file_hash
from rilq.progress import Reporter

STATE_FORMAT = 1
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
    """

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
        _append(self.path, _record_line(record))
        self.records.append(record)
        reached(f"{stage}:committed")
        for key in before[-1].passing if before else ():
            (self.path / key).unlink(missing_ok=True)
        reached(f"{stage}:cleaned")
        return record

    def drop(self, stage: str) -> None:
        """Forget a stage's units and all that came after them."""
        keep = next((i for i, r in enumerate(self.records) if r.stage == stage), len(self.records))
        gone, self.records = self.records[keep:], self.records[:keep]
        _append(self.path, {"drop": keep})
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
    _make_folder(path)
    strangers = sorted(p.name for p in path.iterdir())
    if strangers and not {"rilq.lock", "journal.jsonl"} & set(strangers):
        raise WorkDirError(
            f"{path}: not a work folder: it holds {', '.join(strangers[:5])}\n"
            "  pass --work-dir with a new or empty folder"
        )
    with _lock(path):
        if resume == "never":
            (path / "journal.jsonl").unlink(missing_ok=True)
        lines, good = _read_journal(path)
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
            _append(path, job)
            reached("job:committed")
            lines = [job]
        _check_job(path, lines[0], fingerprint)
        yield WorkDir(path, lines[0], _records(lines[1:]))


def peek(path: Path) -> dict[str, Any] | None:
    """The job line of an unfinished work folder, without locking it; None if there is none."""
    lines, _ = _read_journal(path)
    return lines[0] if lines else None


def peek_facts(path: Path, stage: str) -> dict[str, Any] | None:
    """Facts of the last unit of a stage, likewise."""
    lines, _ = _read_journal(path)
    records = [record for record in _records(lines[1:]) if record.stage == stage]
    return records[-1].facts if records else None


def _run_id(path: Path) -> str:
    """Not random: whoever deletes the folder and starts anew finds the old staging folder."""
    return str(xxhash.xxh3_64_hexdigest(f"{socket.gethostname()}:{path.resolve()}".encode()))


# A unit's file, a shard, or one of either that was never finished.
_OURS = re.compile(r"[^.].*\.(safetensors|bin)|[0-9a-f]{40,64}\.part|\..+\.[0-9a-f]{16}\.tmp")


def _is_ours(path: Path) -> bool:
    return _OURS.fullmatch(path.name) is not None and (path.is_symlink() or path.is_file())


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as err:
        raise WorkDirError(
            f"{path}: the work folder cannot be made: {err.strerror}\n"
            "  pass --work-dir with a folder on a volume that can be written"
        ) from err
    if not os.access(path, os.W_OK | os.X_OK):
        raise WorkDirError(f"{path}: the work folder cannot be written\n  pass another --work-dir")


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold `rilq.lock` for as long as the run lasts; the kernel frees it if the run is killed."""
    lock = path / "rilq.lock"
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    with ExitStack() as stack:
        try:
            handle = os.open(lock, flags, 0o600)
            file = stack.enter_context(os.fdopen(handle, "r+b", buffering=0))
            _take_lock(file, lock)
        except OSError as err:
            raise WorkDirError(
                f"{lock}: cannot be used: {err.strerror}\n"
                "  delete it if no run is using this folder, or pass another --work-dir"
            ) from err
        stack.callback(file.truncate, 0)
        yield


def _take_lock(file: FileIO, lock: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise WorkDirError(
            f"{lock.parent}: in use by {_holder(file) or 'another run'}\n"
            "  wait for it, stop it, or pass another --work-dir"
        ) from None
    holder, host = _holder(file), socket.gethostname()
    # Some network file systems grant every flock, so a holder elsewhere may still be alive.
    if holder and f" on host {host} " not in holder:
        raise WorkDirError(
            f"{lock.parent}: last held by {holder}\n"
            f"  if that run is over, delete {lock} and run again"
        )
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    file.truncate(0)
    file.seek(0)
    file.write(f"pid {os.getpid()} on host {host} since {since}\n".encode())


def _holder(file: FileIO) -> str:
    """Who wrote the lock file; nothing if that is not what `_take_lock` writes."""
    text = file.read(200).decode(errors="replace").strip()
    return text if re.fullmatch(r"pid \d+ on host \S+ since [\d: -]+", text) else ""


def _append(path: Path, line: Mapping[str, Any]) -> None:
    """Add one checksummed line to the journal and sync it."""
    body = json.dumps(line, sort_keys=True)
    text = json.dumps({"line": body, "sum": xxhash.xxh3_128_hexdigest(body.encode())}) + "\n"
    journal = path / "journal.jsonl"
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
    try:
        with os.fdopen(os.open(journal, flags, 0o600), "ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        sync_folder(path)
    except OSError as err:
        raise WorkDirError(
            f"{journal}: cannot be written: {err.strerror}\n"
            "  make room on that volume, then run the same command again"
        ) from err


def _read_journal(path: Path) -> tuple[list[dict[str, Any]], int | None]:
    """Lines up to the first damaged one, and where the journal must be cut if there is one."""
    journal = path / "journal.jsonl"
    if not journal.is_file():
        return [], None
    lines: list[dict[str, Any]] = []
    good = 0
    raw = journal.read_bytes()
    for text in raw.splitlines(keepends=True):
        body = _checked(text)
        if body is None:
            break
        lines.append(body)
        good += len(text)
    return lines, good if good < len(raw) else None


def _checked(text: bytes) -> dict[str, Any] | None:
    try:
        outer = json.loads(text)
        body = outer["line"]
        if not text.endswith(b"\n") or outer["sum"] != xxhash.xxh3_128_hexdigest(body.encode()):
            return None
        return dict(json.loads(body))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


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
