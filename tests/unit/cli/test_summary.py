"""What the terminal shows at the end of a command."""

import io
from dataclasses import replace
from math import inf, nan
from pathlib import Path

import pytest
import report_examples as examples
from rich.console import Console

from rilq.cli.summary import BLOCKS, WIDTH, show_evaluation, sparkline


def shown(show: object, *arguments: object, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    show(*arguments, Console(file=stream, highlight=False, width=80))  # type: ignore[operator]
    stream.flush()
    return raw.getvalue().decode(encoding)


def test_a_sparkline_goes_from_its_least_to_its_largest() -> None:
    assert sparkline([8, 4, 2, 1], "utf-8") == "█▄▂▁"
    assert sparkline([1, 2, 3, 4, 5, 6, 7, 8], "utf-8") == BLOCKS
    assert sparkline([1, 2, 3, 4, 5, 6, 7, 8], "ascii") == "_.-~=+*#"
    assert sparkline([1, 2], "cp437") == "_#", "the page has some of the blocks only"


def test_a_sparkline_of_equal_no_or_impossible_values() -> None:
    assert sparkline([], "utf-8") == ""
    assert sparkline([3, 3], "utf-8") == "▁▁"
    assert sparkline([1, nan, inf, 2], "utf-8") == "▁  █"


def test_a_long_sparkline_is_averaged_to_its_width() -> None:
    line = sparkline(range(1000), "utf-8")
    assert len(line) == WIDTH and line[0] == "▁" and line[-1] == "█"
    assert list(line) == sorted(line, key=BLOCKS.index)


@pytest.mark.parametrize(("encoding", "full"), [("utf-8", "█"), ("ascii", "#")])
def test_an_evaluation_shows_the_kl_and_what_may_follow(encoding: str, full: str) -> None:
    told = shown(show_evaluation, "some model", "t.txt", examples.evaluation(), encoding=encoding)
    assert "KL per token" in told and full in told
    assert "rilq" not in told, "nothing to report or push: it was not made by rilq"


def test_an_evaluation_without_a_base_says_how_to_compare() -> None:
    found = replace(examples.evaluation(), against=None)
    told = shown(show_evaluation, "some model", "t.txt", found)
    assert "rilq eval 'some model' --text t.txt --against BASE" in told and "KL" not in told


def test_names_are_no_markup(tmp_path: Path) -> None:
    folder = tmp_path / "[red]w2"
    folder.mkdir()
    (folder / "rilq.json").write_text(
        '{"files": {}, "tensors": {}, "quality": {"history": [[0, 2.0], [5, null], [9, 1.0]]}}'
    )
    told = shown(show_evaluation, str(folder), "t.txt", examples.evaluation())
    assert f"rilq push '{folder}' OWNER/NAME" in told
    assert "loss of its training  █▁  2 before, 1 at best" in told
