"""Bits of weights, activations and cache in the tables of runs and comparisons."""

import io
from typing import Any

import pytest
from report_examples import evaluation, run
from rich.console import Console, RenderableType

from rilq.cli.comparison import comparison_tables
from rilq.cli.run_tables import runs_table
from rilq.evaluation.comparison import Version, hold_against

FOUR = {"activation_bits": 4.4375, "cache_bits": 5.0}


def shown(table: RenderableType) -> str:
    stream = io.StringIO()
    Console(file=stream, width=120).print(table)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        ({}, " 4.571 "),
        ({"activation_bits": 16.0, "cache_bits": 16.0}, " 4.571 "),
        (FOUR, " 4.571/4.438/5 "),
    ],
)
def test_a_run_shows_all_three_where_they_are_not_sixteen(
    figures: dict[str, float], expected: str
) -> None:
    found = run(figures={"bits_per_weight": 4.571, **figures})
    assert expected in shown(runs_table([found], 120, None))


def test_a_comparison_has_rows_for_them_where_they_are_not_sixteen() -> None:
    def version(label: str, **fields: Any) -> Version:
        return Version(label, None, evaluation(**fields), None)

    plain = shown(comparison_tables(hold_against(version("a"), [version("b")], [])))
    assert "bits_per_weight" in plain and "activation_bits" not in plain
    mixed = shown(comparison_tables(hold_against(version("a"), [version("c", **FOUR)], [])))
    assert "activation_bits" in mixed and "4.4375 *" in mixed and "cache_bits" in mixed
