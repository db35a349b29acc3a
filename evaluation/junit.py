"""A comparison as JUnit XML, which CI systems show as test results.

A candidate is a test suite, and each rule of `--fail-if` a test case in it. Without rules the
comparison itself is the only case.
"""

from __future__ import annotations

from xml.etree import ElementTree

from rilq.errors import printable
from rilq.evaluation.comparison import Candidate, Comparison
from rilq.evaluation.rules import plain

_LONGEST = 10_000  # characters of a text


def junit_xml(comparison: Comparison) -> bytes:
    """The whole file, in UTF-8."""
    suites = [_suite(each, comparison) for each in comparison.candidates]
    root = ElementTree.Element("testsuites", name="rilq compare")
    for name in ("tests", "failures", "errors", "skipped"):
        root.set(name, str(sum(int(suite.get(name, "0")) for suite in suites)))
    root.extend(suites)
    ElementTree.indent(root)
    return bytes(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)) + b"\n"


def _suite(candidate: Candidate, comparison: Comparison) -> ElementTree.Element:
    # What is not allowed in XML, control characters among it, `printable` writes as escapes.
    label = printable(candidate.version.label)
    failures = sum(outcome.violated for outcome in candidate.outcomes)
    suite = ElementTree.Element(
        "testsuite",
        name=label,
        tests=str(max(1, len(candidate.outcomes))),
        failures=str(failures),
        errors="0",
        skipped="0",
    )
    baseline = printable(comparison.baseline.label)
    for outcome in candidate.outcomes:
        case = ElementTree.SubElement(
            suite, "testcase", classname=label, name=printable(outcome.rule.text)
        )
        if outcome.violated:
            message = printable(str(outcome), _LONGEST)
            failure = ElementTree.SubElement(case, "failure", message=message, type="regression")
            failure.text = f"{label} against {baseline}\n{message}"
    if not candidate.outcomes:
        ElementTree.SubElement(suite, "testcase", classname=label, name=f"compared with {baseline}")
    told = ElementTree.SubElement(suite, "system-out")
    told.text = "\n".join([f"{label} against {baseline}", *_changes(candidate, comparison)])
    return suite


def _changes(candidate: Candidate, comparison: Comparison) -> list[str]:
    theirs = comparison.baseline.evaluation.figures()
    lines = []
    for figure, value in candidate.version.evaluation.figures().items():
        line = f"{printable(figure)}: {plain(value)}"
        if figure in theirs:
            line += f", baseline {plain(theirs[figure])}"
        if (change := candidate.changes.get(figure)) is not None:
            line += (
                f", {change.kind} {change.change:.6g} ({change.low:.6g} to {change.high:.6g}), "
                f"{candidate.verdict(figure)}"
            )
        lines.append(line)
    return lines
