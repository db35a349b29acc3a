"""Candidates held against a baseline: verdicts, families of tests, the best, and JUnit XML."""

import json
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from rilq.evaluation.comparison import Comparison, Version, hold_against
from rilq.evaluation.figures import Evaluation, Passages, TaskFigure
from rilq.evaluation.junit import junit_xml
from rilq.evaluation.rules import parse_rule

Make = Callable[..., Version]


@pytest.fixture
def version(make_evaluation: Callable[..., Evaluation]) -> Make:
    """`version(label, loss, spread=0.05, **fields)`: 30 windows that differ by `spread`."""

    def make(label: str, loss: float, spread: float = 0.05, **fields: Any) -> Version:
        windows = fields.get("windows", 30)
        noise = np.random.default_rng(sum(map(ord, label))).normal(0, spread, windows)
        losses = 4 * (loss + noise - noise.mean())
        passages = Passages(losses, 4, top1=np.full(windows, 3))
        return Version(label, None, make_evaluation(float(np.exp(loss)), **fields), passages)

    return make


@pytest.fixture
def three(version: Make) -> Comparison:
    """A baseline, a candidate much better, and one that is hardly worse."""
    rules = [parse_rule(text) for text in ("ppl > 1.02x", "size > 1x")]
    better, same = version("better", 2.0, size_bytes=3_000_000), version("same", 3.001)
    return hold_against(version("base", 3.0), [better, same], rules)


def test_verdicts_say_the_direction_and_whether_it_is_significant(three: Comparison) -> None:
    better, same = three.candidates
    assert better.verdict("perplexity") == "better"
    assert same.verdict("perplexity") == "no significant difference"
    assert same.verdict("top1_agreement") == "no significant difference"


def test_agreement_is_better_higher(version: Make) -> None:
    base, more = version("base", 3.0), version("more", 3.0)
    assert base.passages is not None and more.passages is not None
    more.passages.top1[:] = 4
    (candidate,) = hold_against(base, [more], []).candidates
    assert candidate.verdict("top1_agreement") == "better"


def test_the_number_of_candidates_raises_the_p_values(version: Make) -> None:
    base = version("base", 3.0)
    # On its own just significant; beside seven others that are not, not any more.
    edge = version("edge", 3.031)
    others = [version(f"other {number}", 3.0001) for number in range(7)]
    alone, among = (hold_against(base, [edge, *more], []) for more in ([], others))
    p = alone.candidates[0].changes["perplexity"].p
    assert 0.05 / 8 < p < 0.05
    assert alone.candidates[0].verdict("perplexity") == "worse"
    assert among.candidates[0].adjusted["perplexity"] == pytest.approx(8 * p)
    assert among.candidates[0].verdict("perplexity") == "no significant difference"
    assert "corrected for 8 candidates (Holm)" in among.notes[-1] and not alone.notes


def test_violations_name_candidate_and_rule(three: Comparison) -> None:
    ((version, outcome),) = three.violations
    assert version.label == "better" and outcome.rule.text == "size > 1x"


def test_the_best_of_each_figure_is_known_and_ties_of_all_are_not(three: Comparison) -> None:
    assert three.best("perplexity") == {1}
    assert three.best("size_bytes") == {0, 2}
    assert three.best("bits_per_weight") == set()


def test_the_direction_of_a_task_is_its_own(version: Make) -> None:
    def scored(label: str, value: float, higher: bool) -> Version:
        task = TaskFigure("t", "1", "m", value, None, 0, 9, higher)
        return version(label, 3.0, tasks=(task,))

    for higher, best in ((True, {1}), (False, {0})):
        found = hold_against(scored("a", 0.1, higher), [scored("b", 0.2, higher)], [])
        assert found.best("t.m") == best


@pytest.mark.parametrize(
    "windows, note, intervals",
    [(1, "one window of text: no confidence intervals", 0), (9, "9 windows of text: too few", 2)],
)
def test_few_windows_are_told(version: Make, windows: int, note: str, intervals: int) -> None:
    pair = (version(label, 3.0, windows=windows) for label in ("a", "b"))
    base, other = pair
    found = hold_against(base, [other], [])
    assert note in found.notes[0] and len(found.candidates[0].changes) == intervals


def test_without_recorded_passages_there_are_figures_and_no_intervals(version: Make) -> None:
    base = version("base", 3.0)
    bare = Version("bare", 4, base.evaluation, None)
    found = hold_against(base, [bare], [parse_rule("ppl > 1.02x")])
    assert not found.candidates[0].changes and not found.violations
    assert found.notes == ("no confidence intervals: no passages are recorded of bare",)


def test_json_holds_figures_changes_and_rules(three: Comparison) -> None:
    told = json.loads(json.dumps(three.as_dict()))
    better = told["candidates"][0]
    assert told["violated"] == 1 and told["baseline"]["label"] == "base"
    assert better["figures"]["perplexity"] == pytest.approx(np.exp(2.0))
    assert better["changes"]["perplexity"]["change"] == pytest.approx(np.exp(-1.0))
    assert better["changes"]["perplexity"]["verdict"] == "better"
    assert [rule["violated"] for rule in better["rules"]] == [False, True]


def check_junit(root: ElementTree.Element) -> list[ElementTree.Element]:
    """The structure that CI systems read: counts that are right, and cases with both names."""
    assert root.tag == "testsuites"
    suites = root.findall("testsuite")
    for element in (root, *suites):
        cases = list(element.iter("testcase"))
        kinds = {"failures": "failure", "errors": "error", "skipped": "skipped"}
        assert element.get("name") and element.get("tests") == str(len(cases)) and cases
        for count, kind in kinds.items():
            assert element.get(count) == str(sum(case.find(kind) is not None for case in cases))
    cases = [case for suite in suites for case in suite.findall("testcase")]
    assert all(case.get("name") and case.get("classname") for case in cases)
    return cases


def test_junit_has_a_case_for_every_rule_and_candidate(three: Comparison) -> None:
    cases = check_junit(ElementTree.fromstring(junit_xml(three)))
    names = [(case.get("classname"), case.get("name")) for case in cases]
    assert names == [(who, rule) for who in ("better", "same")
                     for rule in ("ppl > 1.02x", "size > 1x")]  # fmt: skip
    failures = [case.find("failure") for case in cases]
    assert [failure is not None for failure in failures] == [False, True, False, False]
    assert failures[1] is not None
    expected = "size > 1x: size_bytes 3000000, limit 2000000, baseline 2000000"
    assert failures[1].get("message") == expected and expected in (failures[1].text or "")


def test_junit_without_rules_has_one_case_for_each_comparison(version: Make) -> None:
    found = hold_against(version("base", 3.0), [version("b", 3.1), version("c", 3.2)], [])
    cases = check_junit(ElementTree.fromstring(junit_xml(found)))
    assert [case.get("name") for case in cases] == ["compared with base"] * 2


def test_junit_escapes_markup_and_what_xml_forbids(version: Make) -> None:
    label = '<script>&"\x1b[31m\x00\ufffe]]>'
    found = hold_against(version("base", 3.0), [version(label, 3.5)], [parse_rule("ppl > 1x")])
    (case,) = check_junit(ElementTree.fromstring(junit_xml(found)))
    assert case.get("classname") == '<script>&"\\x1b[31m\\x00\\ufffe]]>'
