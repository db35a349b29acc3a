"""The report's page: what it says, what it leaves out, and that nothing in it can run."""

import re
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import pytest
import report_examples as examples

from rilq.errors import OutputError
from rilq.evaluation.figures import Evaluation
from rilq.evaluation.report.page import make_page, page_beside, write_page
from rilq.evaluation.report.subject import Subject


class Read(HTMLParser):
    """Tags with their attributes, and the text, as a browser sees them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.text = "".join(self.texts)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def count(self, tag: str) -> int:
        return sum(each == tag for each, _ in self.tags)


@cache
def full_page() -> str:
    """Of two checkpoints of which all is known."""
    return make_page([examples.subject(), examples.subject("other")])


def slim(name: str, **changes: object) -> Subject:
    """With no plots but that of the KL: those take most of the time."""
    return examples.subject(name, **{"losses": (), "layers": (), "runs": (), **changes})


def test_it_says_the_figures_first() -> None:
    text = " ".join(Read(full_page()).text.split())
    assert "1.127 times the 17.31 of full precision. For 78.5% of the tokens" in text
    for shown in (
        "KL from the base0.11799th percentile 0.842",
        "Bits per weight2.50",
        "Size911 kB",
        "Tokens per second35.2",
        "winogrande",
        "3c2a4e01a67e3f30",
    ):
        assert shown in text, shown


def test_experts_without_data_are_listed_and_layers_with_experts_by_their_number() -> None:
    text = " ".join(Read(full_page()).text.split())
    assert "Tokens of the experts layer least median most 1 12 480.5 2,210" in text
    assert "Experts quantized without data linear tokens model.layers.1.mlp.experts.3." in text


def test_whatever_it_shows_is_escaped() -> None:
    bad = examples.HOSTILE
    calm = examples.subject()
    hostile = examples.subject(
        bad,
        model=bad,
        recipe={**calm.recipe, bad: bad, "quantizer": bad, "loss": bad},
        versions={bad: bad},
        machine={bad: [bad]},
        calibration={bad: {bad: bad}},
        evaluations=(examples.evaluation(text=bad, dtype=bad, tokens_digest=bad),),
        runs=(examples.run(command=bad),),
        files=(),
    )
    pages = [Read(full_page()), Read(make_page([hostile, slim(bad)]))]
    for tag in ("script", "style", "img", "b"):
        assert pages[0].count(tag) == pages[1].count(tag) == (tag in ("script", "style")), tag
    assert bad in pages[1].text
    assert not any(key.startswith("on") for _, attributes in pages[1].tags for key in attributes)


def test_nothing_outside_is_asked_for_and_only_its_own_script_may_run() -> None:
    page, read = full_page(), Read(full_page())
    for tag, attributes in read.tags:
        assert tag not in ("link", "iframe", "img", "object", "embed", "base", "form"), tag
        assert not attributes.get("src") and (attributes.get("href") or "#").startswith("#")
    assert "url(http" not in page and "@import" not in page
    policy = next(a["content"] for _, a in read.tags if "http-equiv" in a)
    assert policy is not None and policy.startswith("default-src 'none'; script-src 'sha256-")


def test_ids_are_unique_with_several_checkpoints() -> None:
    read = Read(full_page())
    ids = [attributes["id"] for _, attributes in read.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) > 20


def test_what_is_not_known_is_not_there() -> None:
    page = make_page([Subject("bare")])
    assert "Its perplexity has not been measured." in page
    read = Read(page)
    for tag in ("table", "svg", "details", "blockquote", "dl", "h3"):
        assert not read.count(tag), tag


def test_the_best_of_each_figure_is_marked_among_those_on_one_text() -> None:
    def measured(ppl: float, bits: float, **text: str) -> Evaluation:
        return examples.evaluation(ppl, bits, layer_errors=None, **text)

    subjects = [
        slim(name, bits_per_weight=bits, evaluations=(measured(ppl, bits),))
        for name, bits, ppl in (("two", 2.5, 19.5), ("four", 4.5, 17.4))
    ]
    marked = re.findall(r'best" data-sort="([\d.]+)"', make_page(subjects))
    assert marked[:3] == ["2.5", "17.4", str(17.4 / 17.31)]
    other = measured(17.4, 4.5, tokens_digest="another", text="other.txt")
    apart = make_page([subjects[0], replace(subjects[1], evaluations=(other,))])
    assert re.findall(r'best" data-sort="([\d.]+)"', apart) == ["2.5"]
    assert "Perplexity against bits" not in apart and "other.txt" in apart


def test_bits_of_activations_and_cache_are_there_where_they_are_not_sixteen() -> None:
    plain = slim("plain", activation_bits=16.0, cache_bits=16.0)
    four = slim("four", activation_bits=4.4375, cache_bits=5.0)
    assert "ctivation" not in make_page([plain, slim("old")])
    page = make_page([plain, four])
    assert page.count("Bits per activation") == page.count("Bits per cached value") == 1
    assert re.findall(r'best" data-sort="([\d.]+)"', page)[:2] == ["4.4375", "5.0"]


def test_versions_on_one_text_are_plotted_against_their_bits() -> None:
    page = full_page()
    assert 'aria-label="Perplexity against bits per weight, 2 checkpoints"' in page
    assert 'aria-label="KL against bits per weight, 2 checkpoints"' in page


def test_a_loss_of_one_term_is_plotted_once() -> None:
    total = [p for p in examples.run().losses if p.term == "total"]
    same = [replace(p, term="kl") for p in total]
    assert make_page([slim("a", losses=tuple(total + same))]).count("over updates") == 1
    assert full_page().count("over updates") == 2 * 4


def test_the_same_subjects_give_the_same_bytes() -> None:
    assert make_page([examples.subject(), examples.subject("other")]) == full_page()


def test_a_page_is_written_even_with_half_characters(tmp_path: Path) -> None:
    write_page(tmp_path / "r.html", [examples.subject("half \ud83d")])
    assert "half ?" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_only_a_report_is_replaced(tmp_path: Path) -> None:
    report = tmp_path / "r.html"
    write_page(report, [Subject("one")])
    write_page(report, [Subject("two")])
    assert "two" in report.read_text() and "one<" not in report.read_text()
    (tmp_path / "thesis.html").write_text("<h1>mine")
    for place in (tmp_path / "thesis.html", tmp_path):
        with pytest.raises(OutputError, match="is no report of rilq"):
            write_page(place, [Subject("one")])
    assert (tmp_path / "thesis.html").read_text() == "<h1>mine"


def test_the_page_of_a_conversion_lies_beside_its_output(tmp_path: Path) -> None:
    assert page_beside(tmp_path / "out") == tmp_path / "out.report.html"
