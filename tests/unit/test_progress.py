"""What long work shows: plain lines for pipes, a live display for terminals."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from rilq import progress
from rilq.progress import LogReporter, Reporters, RichReporter, usage


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that reporters see, in seconds; a test sets `clock[0]`."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def lines_of(stream: io.StringIO) -> list[str]:
    """What was logged, without the time of day."""
    return [line.partition(" ")[2] for line in stream.getvalue().splitlines()]


def test_steps_are_logged_at_most_once_in_an_interval_and_always_at_the_end(
    clock: list[float],
) -> None:
    stream = io.StringIO()
    report = LogReporter(stream, interval=5)
    report.stage("layers", 40, "layer")
    for done in range(1, 41):
        clock[0] += 1
        report.step(done)
    shown = [line.split(",")[0] for line in lines_of(stream)]
    assert shown[0] == "layers: 40 layers" and shown[-1] == "layers: layer 40/40"
    assert len(shown) == 1 + 8 + 1


def test_time_left_does_not_count_what_an_earlier_run_finished(clock: list[float]) -> None:
    stream = io.StringIO()
    report = LogReporter(stream, interval=0)
    report.stage("layers", 12, "layer")
    report.step(8)
    clock[0] += 6
    report.step(10, error=0.5)
    assert "layer 10/12, error 0.5, about 6 s left, " in lines_of(stream)[-1]


def test_quiet_leaves_warnings() -> None:
    stream = io.StringIO()
    report = LogReporter(stream, quiet=True)
    report.stage("layers", 2, "layer")
    report.step(1)
    report.note("a note")
    report.warn("a warning")
    assert lines_of(stream) == ["warning: a warning"]


def test_a_terminal_shows_stage_figures_memory_and_disk_and_keeps_notes() -> None:
    stream = io.StringIO()
    with RichReporter(Console(file=stream, force_terminal=True, width=120)) as report:
        report.stage("train", 20, "step")
        report.step(5, loss=1.25)
        report.note("[not markup]")
    shown = stream.getvalue()
    for expected in ("train", "5/20", "loss 1.25", "GB used", "disk free", "[not markup]"):
        assert expected in shown


def test_several_reporters_are_told_the_same() -> None:
    streams = [io.StringIO(), io.StringIO()]
    both = Reporters(*map(LogReporter, streams))
    both.stage("write", 1, "shard")
    both.warn("a warning")
    assert lines_of(streams[0]) == lines_of(streams[1]) == ["write: 1 shards", "warning: a warning"]


def test_usage_of_a_folder_that_does_not_exist_yet_is_that_of_its_volume(tmp_path: Path) -> None:
    free = usage(tmp_path).rpartition(", ")[2]
    assert free.endswith("GB disk free")
    assert usage(tmp_path / "not" / "yet").rpartition(", ")[2] == free
