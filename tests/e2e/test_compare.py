"""`rilq compare` on small conversions: measured, recorded, used again; rules, baselines, JUnit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from rilq.records.database import read_database

Command = Callable[..., Any]


@pytest.fixture(scope="module")
def heldout(tmp_path_factory: pytest.TempPathFactory, text: str) -> Path:
    """Some 20 windows of 32 tokens that no conversion has seen."""
    path = tmp_path_factory.mktemp("text") / "heldout.txt"
    path.write_text(text[-3000:])
    return path


@pytest.fixture
def versions(native: Callable[..., Path]) -> dict[int, Path]:
    """The same random model in 2 and in 4 bits."""
    return {bits: native("llama", {}, "--bits", bits) for bits in (2, 4)}


@pytest.fixture
def compare(run_cli: Command, heldout: Path, tmp_path: Path) -> Command:
    """`compare(*models, *options)`: the command on the CPU, with a database of this test."""

    def run(*arguments: object) -> Any:
        return run_cli(
            *("compare", *arguments, "--db", tmp_path / "rilq.db", "--device", "cpu"),
            *("--seqlen", 32),
        )

    return run


@pytest.fixture
def both(versions: dict[int, Path], heldout: Path, tmp_path: Path) -> tuple[object, ...]:
    """Arguments that compare 4 with 2 bits against the model that both were made from."""
    base = versions[2].parent / "source"
    return (versions[4], versions[2], "--text", heldout, "--against", base)


@pytest.fixture(scope="session")
def measured_once() -> dict[str, bytes]:
    """A database that an earlier test has filled."""
    return {}


@pytest.fixture
def measured(
    compare: Command, both: tuple[object, ...], tmp_path: Path, measured_once: dict[str, bytes]
) -> None:
    """The database holds run 1 of the 4 bits, and run 2 of the 2 bits."""
    path = tmp_path / "rilq.db"
    if not measured_once:
        ended = compare(*both)
        assert ended.code == 0, ended.err
        measured_once["rilq.db"] = path.read_bytes()
    path.write_bytes(measured_once["rilq.db"])


def test_a_rule_that_holds_of_no_candidate_passes(
    measured: None, compare: Command, both: tuple[Any, ...]
) -> None:
    ended = compare(*both, "--fail-if", "ppl > 100x", "--fail-if", "size >= 1x")
    assert ended.code == 0, ended.err
    assert "A  out (run 1), the baseline" in ended.out and "B  out (run 2)" in ended.out
    assert ended.out.count("passed B") == 2 and "worse" in ended.out
    assert max(map(len, ended.out.splitlines())) <= 80


def test_a_violated_rule_fails_with_both_figures_and_is_in_the_junit_file(
    compare: Command, both: tuple[Any, ...], tmp_path: Path
) -> None:
    rules = ("--fail-if", "kl_mean > +0.001", "--fail-if", "bits < 4", "--fail-if", "ppl > 9x")
    ended = compare(*both, *rules, "--junit", tmp_path / "junit.xml", "--json")
    assert ended.code == 1, ended.err
    told = json.loads(ended.out)
    four, (two,) = told["baseline"]["figures"], told["candidates"]
    assert two["figures"]["kl_mean"] > four["kl_mean"] > 0
    assert [rule["violated"] for rule in two["rules"]] == [True, True, False]
    assert two["rules"][0]["baseline"] == four["kl_mean"]
    assert set(two["changes"]) == {"perplexity", "kl_mean", "kl_median", "kl_p99",
                                   "top1_agreement", "top5_agreement"}  # fmt: skip
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot()[0]
    assert (suite.get("tests"), suite.get("failures")) == ("3", "2")


def test_changes_are_those_of_the_figures(
    measured: None, compare: Command, both: tuple[Any, ...]
) -> None:
    told = json.loads(compare(*both, "--json").out)
    two, four = told["candidates"][0], told["baseline"]["figures"]
    changes = two["changes"]
    ratio = two["figures"]["perplexity"] / four["perplexity"]
    assert changes["perplexity"]["change"] == pytest.approx(ratio, rel=1e-9)
    for figure in ("kl_mean", "kl_median", "kl_p99", "top1_agreement", "top5_agreement"):
        difference = two["figures"][figure] - four[figure]
        # KL per token is kept in float16.
        assert changes[figure]["change"] == pytest.approx(difference, rel=2e-3, abs=1e-9)
    assert all(c["low"] <= c["change"] <= c["high"] for c in changes.values())


def test_what_was_measured_is_recorded_and_not_measured_again(
    compare: Command, both: tuple[Any, ...], tmp_path: Path
) -> None:
    first, second = compare(*both, "--json"), compare(*both, "--json")
    assert first.out == second.out
    assert "was measured in run 1, which is used" in second.err and "evaluate" not in second.err
    with read_database(tmp_path / "rilq.db") as records:
        runs = records.runs()
        assert [(run.command, run.state) for run in runs] == [("eval", "done")] * 2
        passages = records.passages(1)
        assert passages is not None and passages.kl is not None


def test_recorded_runs_are_compared_without_the_checkpoints(
    measured: None, compare: Command, both: tuple[Any, ...]
) -> None:
    assert compare(1, 2, "--json").out == compare(*both, "--json").out != ""


def test_runs_of_rilq_eval_count_too(
    compare: Command, run_cli: Command, both: tuple[Any, ...], tmp_path: Path
) -> None:
    for folder in both[:2]:
        ended = run_cli("eval", folder, *both[2:], "--seqlen", 32, "--device", "cpu", "--no-speed",
                        "--db", tmp_path / "rilq.db")  # fmt: skip
        assert ended.code == 0, ended.err
    ended = compare(*both)
    assert ended.code == 0 and "was measured in run 2, which is used" in ended.err, ended.err


def test_runs_of_other_data_are_refused_with_what_differs(
    measured: None, compare: Command, both: tuple[Any, ...], tmp_path: Path, text: str
) -> None:
    other = tmp_path / "other.txt"
    other.write_text(text[:2000])
    compare(*both[:2], "--text", other)
    ended = compare(1, 3)
    assert ended.code == 2 and not ended.out
    assert "tokens: heldout.txt@xxh3:" in ended.err and "other.txt@xxh3:" in ended.err


def test_latest_and_best_are_taken_from_the_records(
    measured: None, compare: Command, both: tuple[Any, ...], native: Callable[..., Path]
) -> None:
    three = native("llama", {}, "--bits", 3)
    picked = {}
    for pick in ("latest", "best"):
        told = compare(three, *both[2:], "--baseline", pick, "--json")
        assert told.code == 0, told.err
        picked[pick] = json.loads(told.out)["baseline"]["run"]
    assert picked == {"latest": 2, "best": 2}  # 4 bits are more than 3
    told = compare(both[0], *both[2:], "--baseline", "best", "--json")
    assert json.loads(told.out)["baseline"]["run"] == 3


def test_a_named_baseline_is_what_all_others_are_held_against(
    measured: None, compare: Command, both: tuple[Any, ...]
) -> None:
    told = json.loads(compare(both[0], *both[2:], "--baseline", 2, "--json").out)
    assert told["baseline"]["run"] == 2 and [c["run"] for c in told["candidates"]] == [1]


@pytest.mark.parametrize(
    "options, told",
    [
        (("--fail-if", "ppl >> 2"), "expected NAME OP LIMIT"),
        (("--fail-if", "pplx > 2"), "there is no figure pplx"),
        (("--fail-if", "tokens_per_s < 0.9x"), "rilq eval --speed"),
        (("--fail-if", "arc_easy.acc < -0.01"), "rilq eval --tasks"),
        (("--against", "none", "--fail-if", "kl > +1"), "--against BASE"),
        (("--baseline", "latest"), "there is no such database of runs"),
        (("--baseline", "7"), "there is no such database of runs"),
        (("--junit", "nowhere/junit.xml"), "nowhere/junit.xml"),
    ],
)
def test_what_cannot_be_answered_is_refused_before_any_work(
    compare: Command, both: tuple[Any, ...], options: tuple[str, ...], told: str
) -> None:
    ended = compare(*both, *options)
    assert ended.code == 2 and told in ended.err, ended.err
    assert "evaluate" not in ended.err and "Traceback" not in ended.err and not ended.out


def test_one_checkpoint_alone_is_refused(compare: Command, both: tuple[Any, ...]) -> None:
    ended = compare(both[0], *both[2:])
    assert ended.code == 2 and "one checkpoint alone cannot be compared" in ended.err


def test_without_a_base_perplexity_is_compared_and_that_is_said(
    compare: Command, both: tuple[Any, ...]
) -> None:
    ended = compare(*both[:4], "--json")
    assert (
        ended.code == 0 and "names no base on the Hub: KL and agreement are left out" in ended.err
    )
    assert set(json.loads(ended.out)["candidates"][0]["changes"]) == {"perplexity"}
