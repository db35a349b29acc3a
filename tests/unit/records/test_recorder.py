"""What is recorded of a run while it lasts, and that a record never stops it."""

import time
from pathlib import Path
from typing import Any

import pytest

from rilq.errors import InputError, Interrupted
from rilq.progress import SilentReporter
from rilq.records import recorder as module
from rilq.records.database import open_database, read_database
from rilq.records.recorder import recording
from rilq.records.run import Run

RUN = Run(0, "convert", 0.0, 0.0, "running", "model", "checkpoint", "/place")


class Heard(SilentReporter):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.stages: list[str] = []

    def stage(self, name: str, total: int | None = None, unit: str = "") -> None:
        self.stages.append(name)

    def note(self, message: str) -> None:
        self.notes.append(message)

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def only_run(path: Path) -> Run:
    with read_database(path) as database:
        [found] = database.runs()
        return database.run(found.id)


def test_stages_have_their_times_and_their_peaks(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "LOOK", 0.02)
    path, heard = tmp_path / "rilq.db", Heard()
    with recording(path, RUN, heard, tmp_path) as record:
        record.report.stage("small", 1, "step")
        time.sleep(0.1)
        record.report.stage("large", 1, "step")
        block = bytearray(b"\1" * (80 << 20))  # held for a while, and gone before the end
        time.sleep(0.2)
        del block
        time.sleep(0.1)
    found = only_run(path)
    assert heard.stages == ["small", "large"]
    assert [stage.name for stage in found.stages] == ["small", "large"]
    small, large = found.stages
    assert small.seconds >= 0.1 and large.seconds >= 0.3
    assert large.started == pytest.approx(small.started + small.seconds, abs=0.05)
    assert large.host_bytes > small.host_bytes + (60 << 20)
    assert large.device_bytes is None or large.device_bytes >= 0
    assert 0 < large.disk_free_bytes
    assert found.state == "done" and found.seconds >= 0.4
    assert abs(found.started + found.seconds - time.time()) < 5
    assert heard.notes == [f"recorded as run 1 in {path}"]


def test_samples_are_few_and_cover_the_whole_run(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "LOOK", 0.005)
    monkeypatch.setattr(module, "MAX_SAMPLES", 10)
    path = tmp_path / "rilq.db"
    with recording(path, RUN, SilentReporter(), tmp_path):
        time.sleep(0.6)
    times = [sample.at for sample in only_run(path).samples]
    assert 3 <= len(times) <= 10
    assert times[0] < 0.1 and times[-1] > 0.3 and times == sorted(times)


def test_a_run_that_lasts_can_be_looked_at(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "LOOK", 0.02)
    monkeypatch.setattr(module, "SAVE", 0.05)
    path = tmp_path / "rilq.db"
    with recording(path, RUN, SilentReporter(), tmp_path) as record:
        assert only_run(path).state == "running"
        record.report.stage("layers", 1, "layer")
        record.tell(figures={"loss": 1.5})
        deadline = time.monotonic() + 10
        while not (seen := only_run(path)).figures and time.monotonic() < deadline:
            time.sleep(0.02)
    assert seen.state == "running" and seen.figures == {"loss": 1.5}
    assert [stage.name for stage in seen.stages] == ["layers"]


@pytest.mark.parametrize(
    ("raised", "state", "message"),
    [
        (InputError("x: is wrong\n  do y"), "failed", "x: is wrong\n  do y"),
        (ValueError("odd"), "failed", "ValueError: odd"),
        (Interrupted("stopped by SIGTERM"), "stopped", "stopped by SIGTERM"),
        (KeyboardInterrupt(), "stopped", ""),
    ],
)
def test_how_a_run_ended_is_told_and_raised(
    tmp_path: Path, raised: BaseException, state: str, message: str
) -> None:
    path = tmp_path / "rilq.db"
    with pytest.raises(type(raised)), recording(path, RUN, SilentReporter(), tmp_path):
        raise raised
    assert (only_run(path).state, only_run(path).message) == (state, message)


@pytest.mark.parametrize("spoilt", ["garbage", "folder", "newer"])
def test_a_record_that_cannot_be_written_is_said_once_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: Any, spoilt: str
) -> None:
    monkeypatch.setattr(module, "LOOK", 0.01)
    monkeypatch.setattr(module, "SAVE", 0.02)
    path, heard, done = tmp_path / "rilq.db", Heard(), False
    if spoilt == "garbage":
        path.write_bytes(b"garbage" * 1000)
    elif spoilt == "folder":
        path = Path("/proc/rilq/rilq.db")  # where nobody, root neither, can make a folder
    else:
        with open_database(path) as database:
            database._connection.execute("PRAGMA user_version = 99")
    with recording(path, RUN, heard, tmp_path):
        time.sleep(0.1)
        done = True
    assert done and len(heard.warnings) == 1
    assert heard.warnings[0].startswith(f"this run is not recorded: {path}" if spoilt != "folder"
                                        else "this run is not recorded: ")  # fmt: skip
    assert heard.notes == []


def test_without_a_database_nothing_is_written_and_no_thread_runs(tmp_path: Path) -> None:
    heard = Heard()
    with recording(None, RUN, heard, tmp_path) as record:
        record.report.stage("layers")
        record.tell(figures={"loss": 1.0})
    assert heard.stages == ["layers"] and heard.notes == []
    assert list(tmp_path.iterdir()) == []
