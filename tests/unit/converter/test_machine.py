"""Which blocks the C library gives back to the system."""

import pytest

from rilq.converter import machine
from rilq.converter.machine import LARGE_BLOCK, SMALL_BLOCK, large_blocks_returned


@pytest.fixture
def thresholds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What glibc is told, in order."""
    told: list[int] = []
    monkeypatch.setattr(machine, "_return_blocks_from", told.append)
    return told


def test_a_scope_leaves_the_one_around_it_as_it_was(thresholds: list[int]) -> None:
    with large_blocks_returned(), large_blocks_returned(SMALL_BLOCK):
        pass
    assert thresholds == [LARGE_BLOCK, SMALL_BLOCK, LARGE_BLOCK, 32 << 20]


def test_a_scope_does_not_take_back_what_the_one_around_it_asks_for(thresholds: list[int]) -> None:
    with large_blocks_returned(SMALL_BLOCK), large_blocks_returned():
        pass
    assert thresholds[:3] == [SMALL_BLOCK] * 3
