"""Faults of the system around a conversion: memory, disks, clocks, planted links."""

import errno
import itertools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

QUICK: dict[str, Any] = {"quantizer": "rtn", "rank": 0}
PLAIN = ("--quantizer", "rtn", "--rank", 0)


def check_refused(ended: Any, *named: object, code: int) -> None:
    """One screen without a traceback that names every one of `named`."""
    assert ended.code == code, ended
    assert "Traceback" not in ended.err and ended.out == ""
    for word in named:
        assert str(word) in ended.err, (word, ended.err)


@pytest.fixture(scope="module")
def unbroken() -> dict[str, str]:
    """What `expected` finds, once for all tests here."""
    return {}


@pytest.fixture
def expected(
    unbroken: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
    convert: Any,
    quick: Any,
    hashes: Callable[[Path], dict[str, str]],
) -> dict[str, str]:
    """The files of an unbroken quick conversion."""
    if not unbroken:
        folder = tmp_path_factory.mktemp("unbroken")
        assert convert(quick(folder, **QUICK)).code == 0
        unbroken |= hashes(folder / "out")
    return unbroken


# -- memory ----------------------------------------------------------------------------------------


# In a fresh process: the heap of this one may hold enough free memory for any layer here.
SHORT_OF_MEMORY = """
import resource

import psutil
from rilq import cli
from rilq.converter import workdir

def reached(at):
    if at == "layers:cleaned":
        size = psutil.Process().memory_info().vms + (16 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (size, size))

workdir.reached = reached
cli.main()
"""


def test_memory_that_runs_out_is_named_with_the_stage_and_the_rerun_finishes(
    tmp_path: Path,
    run_cli: Any,
    run_script: Any,
    arguments: Any,
    make_model: Any,
    hashes: Callable[[Path], dict[str, str]],
) -> None:
    # Layers of 20 MB: they are what does not fit, and not the stack of a thread that reads them.
    model = make_model(tmp_path / "wide", hidden_size=512, intermediate_size=2048)
    words = [*PLAIN, "--max-shard-size", "5GB", "--quiet"]
    ended = run_script(SHORT_OF_MEMORY, *arguments(tmp_path, *words, model=model))
    check_refused(ended, "memory ran out after", "run the same command again", code=1)
    assert run_cli(*arguments(tmp_path, *words, model=model)).code == 0
    assert run_cli(*arguments(tmp_path / "anew", *words, model=model)).code == 0
    assert hashes(tmp_path / "out") == hashes(tmp_path / "anew" / "out")


# -- disks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "call"), [("fsync", 1), ("fsync", 16), ("replace", 9), ("rename", 1)]
)
def test_a_sync_or_rename_that_fails_is_named_and_the_rerun_finishes(
    operation: str,
    call: int,
    tmp_path: Path,
    run_cli: Any,
    arguments: Any,
    hashes: Callable[[Path], dict[str, str]],
    expected: dict[str, str],
) -> None:
    def fail() -> None:
        calls, real = itertools.count(1), getattr(os, operation)

        def failing(*given: Any) -> Any:
            if next(calls) >= call:  # and all that come after it: the volume is broken
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(*given)

        setattr(os, operation, failing)

    ended = run_cli(*arguments(tmp_path, *PLAIN, "--quiet"), first=fail)
    check_refused(ended, tmp_path, "Input/output error", code=2)
    assert not (tmp_path / "out").exists()
    assert run_cli(*arguments(tmp_path, *PLAIN)).code == 0
    assert hashes(tmp_path / "out") == expected


# -- planted links ---------------------------------------------------------------------------------


def test_links_planted_under_every_name_of_a_run_lead_nowhere(
    tmp_path: Path,
    convert: Any,
    quick: Any,
    hashes: Callable[[Path], dict[str, str]],
    expected: dict[str, str],
) -> None:
    (tmp_path / "seen").mkdir()
    names: set[str] = set()
    for at in (4, 8, 12, 16):  # resumed each time, so that the names of all stages are seen
        convert(quick(tmp_path / "seen", **QUICK), at=at)
        names |= {p.name for p in (tmp_path / "seen").rglob("*") if p.is_file()}
    assert {"rows.safetensors", "layer-0001.safetensors", "teacher-0001.bin"} <= names
    victim, work = tmp_path / "victim", tmp_path / "out.rilq-work"
    victim.write_text("mine")
    assert convert(quick(tmp_path, **QUICK), at=2).code == -signal.SIGKILL
    planted = [work / name for name in names if not (work / name).exists()]
    for path in planted:
        path.symlink_to(victim)
    assert len(planted) > 5 and convert(quick(tmp_path, **QUICK)).code == 0
    assert victim.read_text() == "mine" and hashes(tmp_path / "out") == expected


# -- clocks, places --------------------------------------------------------------------------------


def test_no_decision_rests_on_a_clock(
    tmp_path: Path,
    run_cli: Any,
    arguments: Any,
    convert: Any,
    quick: Any,
    hashes: Callable[[Path], dict[str, str]],
    expected: dict[str, str],
) -> None:
    assert convert(quick(tmp_path, **QUICK), at=8).code == -signal.SIGKILL
    future = 4_000_000_000
    for path in (tmp_path / "out.rilq-work").iterdir():
        os.utime(path, (future, future))

    def back_to_1970() -> None:
        time.time = lambda: 0.0
        os.environ["TZ"] = "Pacific/Kiritimati"
        time.tzset()

    ended = run_cli(*arguments(tmp_path, *PLAIN), first=back_to_1970)
    assert ended.code == 0 and "continuing after" in ended.err
    assert hashes(tmp_path / "out") == expected


def test_the_source_by_a_relative_path_from_another_folder_is_the_same_source(
    tmp_path: Path,
    tiny_llama: Path,
    run_cli: Any,
    arguments: Any,
    convert: Any,
    quick: Any,
    hashes: Callable[[Path], dict[str, str]],
    expected: dict[str, str],
) -> None:
    assert convert(quick(tmp_path, **QUICK), at=8).code == -signal.SIGKILL
    command = arguments(tmp_path, *PLAIN, model=Path(tiny_llama.name))
    ended = run_cli(*command, first=lambda: os.chdir(tiny_llama.parent))
    assert ended.code == 0 and "continuing after" in ended.err
    assert hashes(tmp_path / "out") == expected
