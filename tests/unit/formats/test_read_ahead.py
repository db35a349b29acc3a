"""The thread that fetches ahead, with a shelf in memory."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

import pytest

from rilq.errors import HubError, RilqError, Stopped
from rilq.formats.read_ahead import ReadAhead, reading_ahead


class Shelf:
    """Room for some files; keeps what happened in `log`."""

    def __init__(self, room: int = 3) -> None:
        self.room, self.most = room, 0
        self.held: set[str] = set()
        self.log: list[str] = []
        self.failures: dict[str, int] = {}

    def fetch(self, name: str) -> Path:
        self.log.append(f"get {name}")
        if self.failures.get(name, 0):
            self.failures[name] -= 1
            raise HubError(f"{name}: refused")
        self.held.add(name)
        self.most = max(self.most, len(self.held))
        return Path(name)

    def has_room(self, name: str) -> bool:
        return len(self.held - {name}) < self.room

    def drop(self, name: str) -> None:
        self.log.append(f"drop {name}")
        self.held.discard(name)


def steps(text: str) -> list[list[str]]:
    """`"az a b"` is three steps, the first of which needs files a and z."""
    return [list(step) for step in text.split()]


@contextmanager
def reading(text: str, shelf: Shelf) -> Iterator[ReadAhead]:
    with reading_ahead(steps(text), shelf, Event()) as ahead:
        yield ahead


def run(text: str, shelf: Shelf) -> None:
    """Use every file of every step."""
    with reading(text, shelf) as ahead:
        for step in steps(text):
            for name in step:
                ahead.wait_for(name)
            assert shelf.held >= set(step)
            ahead.advance()


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.parametrize(
    "text",
    ["a b c d", "az a a b bc c d dz z", "az ab bc cd de ez", "a a a", "abz a b z", "a"],
)
def test_each_file_is_fetched_once_and_dropped_after_its_last_use(text: str) -> None:
    shelf = Shelf()
    run(text, shelf)
    names = sorted(set(text) - {" "})
    assert sorted(shelf.log) == [f"drop {n}" for n in names] + [f"get {n}" for n in names]
    assert shelf.most <= 3 and not shelf.held


def test_without_room_the_file_used_last_of_all_gives_way_and_comes_again() -> None:
    shelf = Shelf(room=2)
    run("az ab bc z", shelf)
    assert shelf.most == 2 and shelf.log.count("get z") == 2
    assert [shelf.log.count(f"get {name}") for name in "abc"] == [1, 1, 1]


def test_a_step_that_needs_more_than_the_room_gets_it() -> None:
    shelf = Shelf(room=3)
    run("abcde f", shelf)
    assert shelf.most == 5 and shelf.log[:5] == [f"get {name}" for name in "abcde"]


def test_only_one_file_is_fetched_beyond_the_current_step() -> None:
    shelf = Shelf(room=9)
    with reading("a b c d", shelf) as ahead:
        until(lambda: shelf.held == {"a", "b"})
        time.sleep(0.05)
        assert shelf.held == {"a", "b"}
        ahead.wait_for("a")
        ahead.advance()
        until(lambda: shelf.held == {"b", "c"})


def test_what_is_needed_comes_before_what_is_needed_next() -> None:
    shelf = Shelf(room=9)
    with reading("ab c", shelf):
        until(lambda: len(shelf.held) == 3)
    assert shelf.log == ["get a", "get b", "get c"]


def test_an_error_is_raised_where_the_file_is_asked_for() -> None:
    shelf = Shelf()
    shelf.failures = {"b": 9}
    with reading("a b", shelf) as ahead:
        ahead.wait_for("a")
        until(lambda: "get b" in shelf.log)  # ahead of time: nobody has asked for it
        ahead.advance()
        with pytest.raises(HubError, match="b: refused"):
            ahead.wait_for("b")


def test_a_failure_ahead_of_time_is_tried_again_when_the_file_is_needed() -> None:
    shelf = Shelf()
    shelf.failures = {"b": 1}
    with reading("a b", shelf) as ahead:
        ahead.wait_for("a")
        until(lambda: "get b" in shelf.log)
        ahead.advance()
        ahead.wait_for("b")
    assert shelf.log == ["get a", "get b", "drop a", "get b"]


def test_a_file_that_nobody_announced_is_fetched_and_dropped_with_its_step() -> None:
    shelf = Shelf()
    with reading("a b", shelf) as ahead:
        ahead.wait_for("x")
        assert "x" in shelf.held
        ahead.advance()
        assert "x" not in shelf.held


def in_thread(ahead: ReadAhead, name: str, seen: list[object]) -> Thread:
    def wait() -> None:
        try:
            ahead.wait_for(name)
            seen.append(name)
        except RilqError as err:
            seen.append(type(err))

    thread = Thread(target=wait)
    thread.start()
    return thread


def test_a_file_of_a_later_step_comes_when_there_is_room_without_breaking_it() -> None:
    shelf = Shelf(room=1)
    seen: list[object] = []
    with reading("a b", shelf) as ahead:
        ahead.wait_for("a")
        thread = in_thread(ahead, "b", seen)
        time.sleep(0.05)
        assert shelf.held == {"a"} and not seen
        ahead.advance()
        thread.join(10)
        assert seen == ["b"] and shelf.held == {"b"}
    assert shelf.most == 1


def test_a_failure_that_somebody_ahead_waits_through_counts_only_when_it_is_needed() -> None:
    shelf = Shelf()
    shelf.failures = {"b": 1}
    seen: list[object] = []
    with reading("a b", shelf) as ahead:
        ahead.wait_for("a")
        thread = in_thread(ahead, "b", seen)
        until(lambda: "get b" in shelf.log)
        time.sleep(0.05)
        assert not seen
        ahead.advance()
        thread.join(10)
        assert seen == ["b"]


def test_leaving_ends_the_wait_for_a_file_of_a_later_step() -> None:
    seen: list[object] = []
    with reading("a b", Shelf(room=1)) as ahead:
        ahead.wait_for("a")
        thread = in_thread(ahead, "b", seen)
        time.sleep(0.02)
    thread.join(10)
    assert seen == [Stopped]


def test_leaving_ends_the_thread_though_files_are_wanted() -> None:
    shelf = Shelf()
    with reading("a b c", shelf) as ahead:
        ahead.wait_for("a")
    ahead._thread.join(5)
    assert not ahead._thread.is_alive()


def test_nothing_to_read_is_no_obstacle() -> None:
    none: Sequence[Sequence[str]] = []
    with reading_ahead(none, Shelf(), Event()):
        pass
