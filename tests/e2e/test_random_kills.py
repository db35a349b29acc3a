"""The real command, killed at random moments until it is done, gives the bytes of an unbroken run.

Named commit points cannot show what a kill between them does: in the middle of a write, of a
matrix product, of the clean-up. Here nothing is forked, shimmed or faster than for a user.
"""

import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytestmark = pytest.mark.slow

KILLS = 20
SEED = 20261122
MOST_RERUNS = 5  # of one conversion; each may be killed again


class Unbroken(NamedTuple):
    """When work begins and the run ends, in seconds after the start, and the output's sha256."""

    begin: float
    end: float
    files: dict[str, str]


def start(command: list[str], folder: Path) -> "subprocess.Popen[bytes]":
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "rilq", *command],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
        )


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, arguments: Any, hashes: Any) -> Unbroken:
    folder = tmp_path_factory.mktemp("unbroken")
    began, begin = time.monotonic(), 0.0
    process = start(arguments(folder), folder)
    while process.poll() is None:
        if not begin and (folder / "out.rilq-work").exists():
            begin = time.monotonic() - began
        time.sleep(0.005)
    assert process.returncode == 0, (folder / "log").read_text()
    return Unbroken(begin, time.monotonic() - began, hashes(folder / "out"))


@pytest.mark.parametrize("number", range(KILLS))
def test_killed_at_random_moments_it_finishes_with_the_same_bytes(
    number: int, tmp_path: Path, arguments: Any, hashes: Any, unbroken: Unbroken
) -> None:
    draw = random.Random(SEED + number)
    moments = []
    for rerun in range(MOST_RERUNS + 1):
        process = start(arguments(tmp_path), tmp_path)
        if rerun < MOST_RERUNS:
            # Three of four hit the work and not the imports before it.
            first = unbroken.begin if draw.random() < 0.75 else 0.0
            moments.append(draw.uniform(first, unbroken.end))
            try:
                process.wait(moments[-1])
            except subprocess.TimeoutExpired:
                process.kill()
        if process.wait() == 0:
            break
        assert process.returncode == -9, (SEED, moments, (tmp_path / "log").read_text())
    assert process.returncode == 0, (SEED, moments, (tmp_path / "log").read_text())
    assert hashes(tmp_path / "out") == unbroken.files, (SEED, moments)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log", "out"], (SEED, moments)
