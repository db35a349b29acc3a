"""The work folder: a unit is finished when its journal line is whole, and never otherwise."""

import fcntl
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from rilq.converter.journal import free_lock
from rilq.converter.workdir import Record, Resume, WorkDir, open_workdir, peek
from rilq.errors import WorkDirError
from rilq.formats.verify import file_hash
from rilq.progress import Reporter, SilentReporter

JOB: dict[str, Any] = {"--bits": 2, "commit": None}


class Notes(SilentReporter):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, message: str) -> None:
        self.lines.append(message)

    def warn(self, message: str) -> None:
        self.lines.append(f"warning: {message}")


def opened(
    path: Path,
    *,
    fingerprint: Mapping[str, Any] = JOB,
    resume: Resume = "auto",
    report: Reporter | None = None,
) -> AbstractContextManager[WorkDir]:
    report = report or SilentReporter()
    return open_workdir(path, fingerprint, {"rows": 4}, resume=resume, report=report)


def finish(work: WorkDir, stage: str, unit: str, *, passing: bool = False) -> Path:
    """Commit a unit with one small file."""
    path = work.file(f"{stage}-{unit}.bin")
    path.write_bytes(unit.encode() * 100)
    files = {path: file_hash(path)}
    if passing:
        work.commit(stage, unit, {"n": unit}, passing=files)
    else:
        work.commit(stage, unit, {"n": unit}, files=files)
    return path


def units(work: WorkDir) -> list[str]:
    return [f"{record.stage} {record.unit}" for record in work.records]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A work folder with three finished units."""
    with opened(tmp_path / "work") as work:
        finish(work, "rows", "a")
        finish(work, "layers", "a")
        finish(work, "layers", "b")
    return tmp_path / "work"


# -- journal ---------------------------------------------------------------------------------------


def test_finished_units_come_back_with_facts_and_files(path: Path) -> None:
    with opened(path) as work:
        record = work.records[1]
    name = "layers-a.bin"
    assert record == Record("layers", "a", {"n": "a"}, {name: (100, file_hash(path / name))})


def test_the_choices_of_the_first_run_are_kept(path: Path) -> None:
    with open_workdir(path, JOB, {"rows": 5}, resume="auto", report=Notes()) as work:
        assert work.job["choices"] == {"rows": 4}


def test_a_file_without_a_journal_line_is_no_finished_unit(path: Path) -> None:
    (path / "layers-c.bin").write_bytes(b"whole, but never committed")
    report = Notes()
    with opened(path) as work:
        work.remove_strays(report)
        assert units(work) == ["rows a", "layers a", "layers b"]
    assert not (path / "layers-c.bin").exists()
    assert report.lines == [f"{path}: removed 1 unfinished files of an earlier run"]


@pytest.mark.parametrize("kept", [0, 1, 50, -1])
def test_a_torn_last_line_is_dropped_with_a_warning(path: Path, kept: int) -> None:
    journal = path / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:-1]) + lines[-1][:kept])
    report = Notes()
    with opened(path, report=report) as work:
        assert units(work) == ["rows a", "layers a"]
        finish(work, "layers", "c")
    assert len(report.lines) == (0 if kept == 0 else 1)
    with opened(path) as work:  # the new line did not join the torn one
        assert units(work) == ["rows a", "layers a", "layers c"]


def test_every_flipped_bit_in_a_line_ends_the_trust_there(path: Path) -> None:
    journal = path / "journal.jsonl"
    content = journal.read_bytes()
    begin = content.index(b"\n", content.index(b"\n") + 1) + 1  # of the third line: layers a
    for place in range(begin, content.index(b"\n", begin), 7):
        spoilt = bytearray(content)
        spoilt[place] ^= 0x01
        journal.write_bytes(spoilt)
        with opened(path) as work:
            assert units(work) == ["rows a"], place


def test_a_disk_that_fills_up_within_a_line_names_the_journal_and_loses_nothing(path: Path) -> None:
    """In a child, whose files may not grow further than half a line."""
    limit = (path / "journal.jsonl").stat().st_size + 50
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from rilq.converter.workdir import open_workdir\n"
        "from rilq.progress import SilentReporter\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        f"args = Path({str(path)!r}), {JOB!r}, {{}}\n"
        "with open_workdir(*args, resume='auto', report=SilentReporter()) as work:\n"
        "    work.commit('layers', 'c', {})\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"{path / 'journal.jsonl'}: cannot be written: File too large" in ended.stderr
    with opened(path) as work:
        assert units(work) == ["rows a", "layers a", "layers b"]


def test_peek_reads_the_job_without_the_lock(path: Path) -> None:
    with opened(path):
        job = peek(path)
    assert job is not None and job["fingerprint"] == JOB


def test_peek_finds_nothing_where_nothing_is(tmp_path: Path) -> None:
    assert peek(tmp_path / "none") is None
    assert not (tmp_path / "none").exists()


# -- files -----------------------------------------------------------------------------------------


def test_a_replaced_file_is_deleted_after_the_line_that_replaces_it(tmp_path: Path) -> None:
    with opened(tmp_path / "work") as work:
        first = finish(work, "train", "1", passing=True)
        second = finish(work, "train", "2", passing=True)
        assert (first.exists(), second.exists()) == (False, True)


def test_a_replaced_file_that_outlived_a_kill_is_a_left_over(tmp_path: Path) -> None:
    with opened(tmp_path / "work") as work:
        first = finish(work, "train", "1", passing=True)
        finish(work, "train", "2", passing=True)
        first.write_bytes(b"killed before it was deleted")
        work.remove_strays(Notes())
        assert not first.exists() and work.file("train-2.bin").exists()


def test_check_files_drops_the_damaged_stage_and_all_after_it(path: Path) -> None:
    with opened(path) as work:
        finish(work, "train", "a")
        work.file("layers-b.bin").write_bytes(b"b" * 99 + b"c")  # the same size
        report = Notes()
        work.check_files(report)
        assert units(work) == ["rows a"]
        assert sorted(p.name for p in path.glob("*.bin")) == ["rows-a.bin"]
    assert report.lines == [
        f"warning: {path / 'layers-b.bin'}: missing or damaged (unit 'b'); "
        "stage 'layers' starts again"
    ]
    with opened(path) as work:  # the drop is in the journal
        assert units(work) == ["rows a"]


def test_check_files_accepts_what_is_whole(path: Path) -> None:
    report = Notes()
    with opened(path) as work:
        work.check_files(report)
        assert len(work.records) == 3
    assert report.lines == []


def test_drop_of_a_stage_without_units_changes_nothing(path: Path) -> None:
    with opened(path) as work:
        work.drop("shards")
        assert len(work.records) == 3
    with opened(path) as work:
        assert len(work.records) == 3


def test_left_overs_of_others_stay(path: Path) -> None:
    (path / "thesis.txt").write_text("mine")
    (path / "folder.bin").mkdir()
    with opened(path) as work:
        work.remove_strays(Notes())
        work.remove()
    assert sorted(p.name for p in path.iterdir()) == ["folder.bin", "thesis.txt"]


def test_remove_leaves_nothing(path: Path) -> None:
    with opened(path) as work:
        work.remove()
    assert not path.exists()


def test_a_new_work_folder_is_its_owners_alone(path: Path) -> None:
    assert path.stat().st_mode & 0o777 == 0o700


# -- another job -----------------------------------------------------------------------------------


def test_another_job_is_refused_with_every_difference(path: Path) -> None:
    with (
        pytest.raises(WorkDirError, match="belongs to another job") as caught,
        opened(path, fingerprint={"--bits": 3, "--seed": 1, "commit": None}),
    ):
        pass
    assert str(caught.value).splitlines()[1:3] == [
        "  --bits: 2 there, 3 now", "  --seed: None there, 1 now"
    ]  # fmt: skip


def test_a_job_without_a_finished_unit_gives_way_to_another(tmp_path: Path) -> None:
    with opened(tmp_path / "work"):
        pass
    with opened(tmp_path / "work", fingerprint={"--bits": 3}) as work:
        assert work.job["fingerprint"] == {"--bits": 3}


def test_resume_never_begins_another_job_in_the_folder_of_an_old_one(path: Path) -> None:
    with opened(path, fingerprint={"--bits": 3}, resume="never") as work:
        assert work.records == []


def test_resume_required_needs_a_finished_unit(tmp_path: Path, path: Path) -> None:
    with opened(path, resume="required") as work:
        assert len(work.records) == 3
    with (
        pytest.raises(WorkDirError, match="nothing to resume"),
        opened(tmp_path / "new", resume="required"),
    ):
        pass


def test_a_folder_with_other_files_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(WorkDirError, match=r"it holds thesis\.txt"), opened(tmp_path):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


# -- lock ------------------------------------------------------------------------------------------


def test_a_held_folder_is_refused_with_pid_host_and_time(path: Path) -> None:
    with opened(path), pytest.raises(WorkDirError) as caught, opened(path):
        pass
    holder = f"in use by pid {os.getpid()} on host {socket.gethostname()} since 20"
    assert holder in str(caught.value)


def test_of_many_at_once_exactly_one_gets_the_folder(tmp_path: Path) -> None:
    start, done, won = threading.Barrier(8), threading.Barrier(8), []

    def run() -> None:
        start.wait()
        try:
            with opened(tmp_path / "work"):
                won.append(1)
                done.wait()
        except WorkDirError:
            done.wait()

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [1]


STALE = {
    "empty": b"",
    "garbage": b"\x00\xff\xfe garbage",
    "torn": b"pid 12",
    "dead pid": f"pid 999999 on host {socket.gethostname()} since 2020-01-01 00:00:00\n".encode(),
}


@pytest.mark.parametrize("kind", STALE)
def test_a_stale_lock_file_is_no_obstacle(path: Path, kind: str) -> None:
    (path / "rilq.lock").write_bytes(STALE[kind])
    with opened(path) as work:
        assert len(work.records) == 3


def test_a_holder_on_another_host_is_refused_with_what_to_delete(path: Path) -> None:
    (path / "rilq.lock").write_text("pid 7 on host elsewhere since 2026-01-01 00:00:00\n")
    with pytest.raises(WorkDirError, match="pid 7 on host elsewhere") as caught, opened(path):
        pass
    assert f"delete {path / 'rilq.lock'} and run again" in str(caught.value)
    (path / "rilq.lock").unlink()
    with opened(path) as work:
        assert len(work.records) == 3


def test_a_lock_is_free_once_nobody_holds_it_or_its_host_is_gone(path: Path) -> None:
    lock = path / "rilq.lock"
    assert free_lock(path) and free_lock(path.parent)
    with opened(path):
        assert not free_lock(path)
        assert not free_lock(path, [socket.gethostname()])  # the kernel knows better
    left = "pid 7 on host elsewhere since 2026-01-01 00:00:00\n"
    lock.write_text(left)
    assert not free_lock(path) and not free_lock(path, ["another"]) and lock.read_text() == left
    assert free_lock(path, ["elsewhere"])
    with opened(path) as work:
        assert len(work.records) == 3


def test_the_lock_is_free_after_a_run(path: Path) -> None:
    assert (path / "rilq.lock").read_bytes() == b""
    with (path / "rilq.lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_lock_file_that_is_a_link_is_not_followed(path: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (path / "rilq.lock").unlink()
    (path / "rilq.lock").symlink_to(victim)
    with pytest.raises(WorkDirError, match=r"rilq\.lock: cannot be used"), opened(path):
        pass
    assert victim.read_text() == "mine"
