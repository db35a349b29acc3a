"""Recorded evaluations: which are comparable, which are used again, which is the baseline."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rilq.errors import InputError, OptionError
from rilq.evaluation.comparison import Version
from rilq.evaluation.figures import Divergence, Evaluation, Passages
from rilq.evaluation.recorded import (
    check_comparable,
    find_baseline,
    recorded_of,
    recorded_version,
)
from rilq.records.database import Database, open_database
from rilq.records.run import Run

PASSAGES = Passages(np.arange(30.0), 4)


@pytest.fixture
def records(tmp_path: Path) -> Iterator[Database]:
    """An empty database."""
    with open_database(tmp_path / "rilq.db") as database:
        yield database


@pytest.fixture
def add(records: Database, make_evaluation: Callable[..., Evaluation]) -> Callable[..., Run]:
    """`add(content, perplexity, passages=..., run={}, **fields)`: one more recorded evaluation."""

    def record(
        content: str,
        perplexity: float,
        *,
        passages: Passages | None = PASSAGES,
        run: dict[str, Any] = {},  # noqa: B006 - only read
        **fields: Any,
    ) -> Run:
        evaluation = make_evaluation(perplexity, **fields)
        started = float(len(records.runs()))
        made = Run(
            0, "eval", started, 1.0, "done", "org/tiny", content, f"/{content}",
            source_hash="s", content_hash=content, options={"base_hash": "b"},
            figures=evaluation.figures(), evaluation=evaluation.as_dict(),
        )  # fmt: skip
        return records.run(records.begin(replace(made, **run), passages))

    return record


def test_a_recorded_evaluation_is_read_with_its_passages(
    records: Database, add: Callable[..., Run]
) -> None:
    run, found = recorded_version(records, add("w2", 20.0).id)
    assert run.content_hash == "w2"
    assert (found.label, found.run, found.evaluation.perplexity) == ("w2 (run 1)", 1, 20.0)
    assert found.passages is not None
    np.testing.assert_array_equal(found.passages.loss, PASSAGES.loss)


@pytest.mark.parametrize(
    "run, told",
    [
        ({"command": "convert", "evaluation": None}, r"is a convert \(done\)"),
        ({"state": "failed"}, r"is a eval \(failed\)"),
        ({"evaluation": {"perplexity": 3}}, "another version of rilq"),
    ],
)
def test_a_run_that_measured_nothing_is_refused(
    records: Database, add: Callable[..., Run], run: dict[str, Any], told: str
) -> None:
    with pytest.raises(InputError, match=told):
        recorded_version(records, add("w2", 20.0, run=run).id)


@pytest.mark.parametrize(
    "fields, told",
    [
        ({"tokens_digest": "77", "text": "other.txt@xxh3:9", "seqlen": 9},
         "tokens: heldout.txt@xxh3:12ab, 30 x 5 tokens and other.txt@xxh3:9, 30 x 9 tokens"),
        ({"dtype": "bfloat16"}, "computed in: float32 and bfloat16"),
        ({"against": Divergence(0.2, 0.1, 1.0, 2.0, 0.9, 0.8, 11.0, (0.1, 3.0), (120,))},
         "base: its perplexity is 10 and 11"),
    ],
)  # fmt: skip
def test_evaluations_of_other_data_are_refused_with_what_differs(
    make_evaluation: Callable[..., Evaluation], fields: dict[str, Any], told: str
) -> None:
    one, other = make_evaluation(20.0), make_evaluation(21.0, **fields)
    versions = [Version("a", 1, one, None), Version("b", 2, other, None)]
    with pytest.raises(InputError) as refused:
        check_comparable(versions)
    assert f"a and b: {told}" in str(refused.value)


def test_the_same_base_on_another_machine_is_the_same_base(
    make_evaluation: Callable[..., Evaluation],
) -> None:
    one = make_evaluation(20.0)
    assert one.against is not None
    near = replace(one, against=replace(one.against, base_perplexity=10.0001))
    check_comparable([Version("a", 1, one, None), Version("b", 2, near, None)])


def test_latest_is_the_newest_other_evaluation_of_the_same_model_and_data(
    records: Database, add: Callable[..., Run]
) -> None:
    add("old", 20.0)
    wanted = add("new", 30.0)
    add("text", 1.0, tokens_digest="77")
    add("dtype", 1.0, dtype="bfloat16")
    add("no base", 1.0, against=None)
    add("model", 1.0, run={"source_hash": "other"})
    add("failed", 1.0, run={"state": "failed"})
    add("broken", 1.0, run={"evaluation": {"perplexity": 3}})
    add("mine", 25.0)
    candidate = add("mine", 25.0)
    assert find_baseline(records, "latest", [candidate]).run == wanted.id


def test_best_has_the_lowest_perplexity_at_no_more_bits(
    records: Database, add: Callable[..., Run]
) -> None:
    add("w4", 18.0, bits_per_weight=4.5)
    wanted = add("w2", 22.0)
    add("worse", 23.0)
    candidate = add("mine", 25.0)
    assert find_baseline(records, "best", [candidate]).run == wanted.id
    wide = add("wide", 17.0, bits_per_weight=4.5)
    assert find_baseline(records, "best", [wide, candidate]).label.startswith("w4")


@pytest.mark.parametrize("pick", ["latest", "best"])
def test_without_another_evaluation_there_is_no_baseline(
    records: Database, add: Callable[..., Run], pick: Any
) -> None:
    candidate = add("mine", 25.0)
    with pytest.raises(OptionError, match=f"--baseline {pick}: .* no other evaluation"):
        find_baseline(records, pick, [candidate])


@pytest.mark.parametrize(
    "fields",
    [{}, {"tokens_digest": "77"}, {"dtype": "bfloat16"}, {"passages": None},
     {"run": {"content_hash": "w3"}}, {"run": {"options": {}}}, {"run": {"state": "failed"}}],
)  # fmt: skip
def test_only_an_evaluation_of_the_same_content_data_and_base_is_used_again(
    records: Database, add: Callable[..., Run], fields: dict[str, Any]
) -> None:
    add("w2", 20.0, **fields)
    found = recorded_of(records, "w2", tokens_digest="5d41", dtype="float32", base_hash="b")
    assert (found is not None) == (not fields)
