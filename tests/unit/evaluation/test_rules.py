"""`--fail-if`: what its grammar takes, what a rule means, and what is refused."""

from typing import Any

import pytest

from rilq.errors import InputError, OptionError
from rilq.evaluation.bootstrap import Interval
from rilq.evaluation.figures import Divergence, Evaluation, Speed, TaskFigure
from rilq.evaluation.rules import ALIASES, KNOWN, Rule, apply_rule, parse_rule

BASELINE = {"perplexity": 20.0, "kl_p99": 0.5, "top1_agreement": 0.9, "arc_easy.acc": 0.6}


@pytest.mark.parametrize(
    "text, figure, compares, kind, limit, significantly",
    [
        ("ppl > 1.02x", "perplexity", ">", "ratio", 1.02, False),
        ("kl_p99 > +0.1", "kl_p99", ">", "difference", 0.1, False),
        ("tokens_per_s < 0.9x", "tokens_per_s", "<", "ratio", 0.9, False),
        ("ppl > 20", "perplexity", ">", "value", 20.0, False),
        ("top1<.95", "top1_agreement", "<", "value", 0.95, False),
        ("size_bytes >= 1.1x", "size_bytes", ">=", "ratio", 1.1, False),
        ("  arc_easy.acc  <=  -0.01 ", "arc_easy.acc", "<=", "difference", -0.01, False),
        ("gsm8k.exact_match,strict-match < 0.3", "gsm8k.exact_match,strict-match", "<", "value",
         0.3, False),
        ("size > 1e9", "size_bytes", ">", "value", 1e9, False),
        ("ppl > 1x significantly", "perplexity", ">", "ratio", 1.0, True),
        ("top5 < -0.01 significantly", "top5_agreement", "<", "difference", -0.01, True),
    ],
)  # fmt: skip
def test_a_rule_names_a_figure_a_comparison_and_a_limit(
    text: str, figure: str, compares: Any, kind: Any, limit: float, significantly: bool
) -> None:
    written = " ".join(text.split())
    expected = Rule(written, figure, compares, kind, limit, significantly)
    assert parse_rule(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "ppl", "ppl 20", "ppl > ", "> 20", "ppl == 20", "ppl > 20%", "ppl > x", "ppl > nan",
     "ppl > 1.0.2x", "ppl > 20 or kl > 1", "ppl > 1 x", "ppl > 20 surely", "ppl > 20\n; ls"],
)  # fmt: skip
def test_what_is_no_rule_is_refused_with_examples(text: str) -> None:
    with pytest.raises(OptionError, match=r"expected NAME OP LIMIT.*\n.*kl_p99 > \+0\.1"):
        parse_rule(text)


def test_an_unknown_figure_is_refused_with_the_known_ones() -> None:
    with pytest.raises(OptionError, match="there is no figure perplexty") as refused:
        parse_rule("perplexty > 20")
    assert all(name in str(refused.value) for name in (*KNOWN, *ALIASES))


@pytest.mark.parametrize("text", ["ppl > +1.02x", "kl < -2x", "ppl > 1e999"])
def test_a_limit_of_two_kinds_or_none_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="a multiple .* a difference .* or a value"):
        parse_rule(text)


@pytest.mark.parametrize(
    "text", ["ppl > +1 significantly", "kl > 1.1x significantly", "ppl > 20 significantly",
             "size > 1x significantly"],
)  # fmt: skip
def test_significance_needs_a_figure_with_such_an_interval(text: str) -> None:
    with pytest.raises(OptionError, match="perplexity with ratios, kl_mean with differences"):
        parse_rule(text)


def test_control_characters_of_a_rule_are_not_printed() -> None:
    with pytest.raises(OptionError) as refused:
        parse_rule("\x1b[31mppl")
    assert "\x1b" not in str(refused.value)


def test_known_figures_are_those_that_an_evaluation_has() -> None:
    against = Divergence(0.2, 0.1, 1.0, 2.0, 0.9, 0.8, 10.0, kl_edges=(0.1, 3.0), kl_counts=(9,))
    task = TaskFigure("arc_easy", "1", "acc", 0.5, 0.1, 0, 20, True)
    speed = Speed(90.0, 9.0, 512, 64, 10**9, 10**9, 2.0, "cuda", "bfloat16")
    evaluation = Evaluation(
        12.0, 9, 3, 4, 1.5, 2.5, 10**6, False, "float32", "text", "5d41", against=against,
        tasks=(task,), speed=speed,
    )  # fmt: skip
    found = set(evaluation.figures())
    assert {name for name in found if "." not in name} == set(KNOWN)
    assert set(ALIASES.values()) <= found


@pytest.mark.parametrize(
    "text, value, violated",
    [
        ("ppl > 1.02x", 20.4, False),  # at the limit
        ("ppl > 1.02x", 20.5, True),
        ("ppl >= 1.02x", 20.4, True),
        ("ppl > +1", 20.9, False),
        ("ppl > +1", 21.1, True),
        ("ppl > 21", 20.9, False),
        ("ppl > 21", 21.1, True),
        ("ppl < 0.9x", 17.9, True),
        ("ppl < -1", 19.5, False),
        ("ppl < -1", 18.5, True),
    ],
)
def test_limits_count_from_the_baseline_or_alone(text: str, value: float, violated: bool) -> None:
    outcome = apply_rule(parse_rule(text), "b", {"perplexity": value}, BASELINE, {})
    assert outcome.violated == violated and outcome.baseline == 20.0


def test_an_outcome_tells_both_figures_and_the_limit() -> None:
    outcome = apply_rule(parse_rule("ppl > 1.02x"), "b", {"perplexity": 21.0}, BASELINE, {})
    assert str(outcome) == "ppl > 1.02x: perplexity 21, limit 20.4, baseline 20"


@pytest.mark.parametrize(
    "text, lacking",
    [
        ("kl_p99 > +0.1", "there is no kl_p99 of candidate\\n"),
        ("kl_mean > +0.1", "no kl_mean of candidate, the baseline\\n"),
        ("bpb > 1x", "no bits_per_byte of the baseline\\n"),
        ("arc_easy.acc < 0.5", "no arc_easy.acc of candidate\\n"),
    ],
)
def test_a_missing_figure_is_an_error_and_no_pass(text: str, lacking: str) -> None:
    ours = {"perplexity": 20.0, "bits_per_byte": 1.0}
    with pytest.raises(InputError, match=lacking):
        apply_rule(parse_rule(text), "candidate", ours, BASELINE, {})


def test_a_value_needs_no_figure_of_the_baseline() -> None:
    outcome = apply_rule(parse_rule("size > 10"), "b", {"size_bytes": 11.0}, BASELINE, {})
    assert outcome.violated and outcome.baseline is None


@pytest.mark.parametrize(
    "text, low, high, violated",
    [
        ("ppl > 1x significantly", 0.99, 1.2, False),
        ("ppl > 1x significantly", 1.01, 1.2, True),
        ("ppl < 1x significantly", 0.8, 1.01, False),
        ("ppl < 1x significantly", 0.8, 0.99, True),
    ],
)
def test_significantly_takes_the_whole_interval_beyond_the_limit(
    text: str, low: float, high: float, violated: bool
) -> None:
    intervals = {"perplexity": Interval("ratio", 1.05, low, high, 0.04)}
    outcome = apply_rule(parse_rule(text), "b", {"perplexity": 21.0}, BASELINE, intervals)
    assert outcome.violated == violated


def test_significantly_without_an_interval_is_an_error() -> None:
    rule = parse_rule("ppl > 1x significantly")
    with pytest.raises(InputError, match="b has no confidence interval of perplexity"):
        apply_rule(rule, "b", {"perplexity": 21.0}, BASELINE, {})
