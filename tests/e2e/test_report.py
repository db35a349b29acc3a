"""`rilq report`, and the page that `convert` writes beside its output."""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from rilq.batch.jobs import read_jobs
from rilq.cli.batch import convert_command

Run = Callable[..., Any]


@pytest.fixture
def two(native: Callable[..., Path]) -> tuple[Path, Path]:
    """Conversions of one model at 2 and 4 bits."""
    return native("llama", {}), native("llama", {}, "--bits", 4)


def test_convert_writes_its_page_beside_the_output_and_says_what_next(
    run_cli: Run, arguments: Run, hashes: Run, tiny_llama: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = arguments(tmp_path)
    words.remove("--no-report")
    ended = run_cli(*words)
    assert ended.code == 0 and not ended.out, ended.err
    page = (tmp_path / "out.report.html").read_text()
    assert "<h1" in page and page.count("<svg") >= 2 and "Checksums" in page
    assert not list(out.glob("*.html"))
    for told in (
        "validation loss",
        "error by layer",
        "bits per weight",
        f"{out}.report.html: report",
        f"rilq eval {out} --text wikitext2 --against {tiny_llama}",
        f"rilq push {out} OWNER/NAME",
    ):
        assert told in ended.err, told
    before = hashes(tmp_path)
    (tmp_path / "out.report.html").unlink()
    assert run_cli(*words, "--quiet").err == ""
    assert hashes(tmp_path) == before, "the page is a matter of the checkpoint alone"


def test_with_json_nothing_but_the_object_and_progress_is_written(
    run_cli: Run, arguments: Run, tmp_path: Path
) -> None:
    ended = run_cli(*arguments(tmp_path, "--json"))
    assert ended.code == 0 and json.loads(ended.out)["output"]
    assert "next:" not in ended.err and not (tmp_path / "out.report.html").exists()


def test_a_page_that_cannot_be_written_is_only_a_warning(
    run_cli: Run, arguments: Run, tmp_path: Path
) -> None:
    (tmp_path / "out.report.html").write_text("a thesis")
    ended = run_cli(*arguments(tmp_path, "--report", "--quiet"))
    assert ended.code == 0 and "warning: no report" in ended.err and "is no report" in ended.err
    assert (tmp_path / "out.report.html").read_text() == "a thesis"
    assert (tmp_path / "out" / "rilq.json").is_file()


def test_one_page_shows_several_checkpoints(
    run_cli: Run, two: tuple[Path, Path], tmp_path: Path
) -> None:
    ended = run_cli("report", *two, "-o", tmp_path / "r.html", "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out) == {
        "report": str(tmp_path / "r.html"),
        "subjects": [two[0].name, two[1].name],
    }
    page = (tmp_path / "r.html").read_text()
    assert "2 versions of source" in page and "Versions" in page


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("out/r.html", "lies inside"),
        ("thesis.txt", "is no report of rilq"),
        ("none/r.html", "cannot be written"),
    ],
)
def test_impossible_places_are_refused(
    place: str, expected: str, run_cli: Run, two: tuple[Path, Path], tmp_path: Path, hashes: Run
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    before = hashes(two[0])
    output = two[0] / "r.html" if place.startswith("out") else tmp_path / place
    ended = run_cli("report", two[0], "-o", output)
    assert ended.code == 2 and expected in ended.err and "Traceback" not in ended.err
    assert hashes(two[0]) == before and (tmp_path / "thesis.txt").read_text() == "mine"


def test_what_rilq_has_not_made_is_refused(run_cli: Run, tiny_llama: Path, tmp_path: Path) -> None:
    for subject in (tiny_llama, tmp_path / "nowhere"):
        ended = run_cli("report", subject, "-o", tmp_path / "r.html")
        assert ended.code == 2 and f"{subject}: has no rilq.json" in ended.err
    assert not (tmp_path / "r.html").exists()


def test_a_batch_may_leave_the_page_out(tiny_llama: Path, tmp_path: Path) -> None:
    shared = {"model": str(tiny_llama), "output-dir": "{name}"}
    jobs = [{"name": "shown"}, {"name": "not", "report": False}]
    (tmp_path / "jobs.yaml").write_text(yaml.safe_dump({"defaults": shared, "jobs": jobs}))
    shown, silent = read_jobs(tmp_path / "jobs.yaml", convert_command())
    assert "--no-report" in silent.arguments and "--no-report" not in shown.arguments


def test_recorded_runs_of_this_content_are_shown_and_those_of_another_are_not(
    run_cli: Run, arguments: Run, tiny_llama: Path, calib: Path, tmp_path: Path
) -> None:
    db = ("--db", tmp_path / "rilq.db")
    page = tmp_path / "out.report.html"
    assert run_cli(*arguments(tmp_path, "--report"), *db).code == 0
    assert "<figcaption>convert: " in page.read_text(), "its own stages are on its page"
    measure = ("--text", calib, "--seqlen", 32, "--device", "cpu", "--against", tiny_llama, *db)
    ended = run_cli("eval", tmp_path / "out", *measure)
    assert ended.code == 0 and f"rilq report {tmp_path / 'out'} -o report.html" in ended.err
    by_default = partial(os.environ.pop, "RILQ_DB")  # which the tests set to none
    beside = run_cli("report", tmp_path / "out", "-o", tmp_path / "r.html", first=by_default)
    assert beside.code == 0, beside.err
    by_number = run_cli("report", 2, 1, *db, "-o", tmp_path / "n.html")
    assert by_number.code == 0, by_number.err
    for name, sections in (("r.html", 1), ("n.html", 2)):
        text = (tmp_path / name).read_text()
        assert text.count("<figcaption>KL per token") == sections, name
        assert "<figcaption>convert: " in text and "<figcaption>eval: " in text
    assert "out, run 2" in (tmp_path / "n.html").read_text()
    alone = run_cli("report", tmp_path / "out", "--db", "none", "-o", tmp_path / "r.html")
    assert alone.code == 0 and "KL per token" not in (tmp_path / "r.html").read_text()
    none = ("--db", tmp_path / "none.db")
    for words, expected in (((9, *db), "run 9: not in"), ((1, *none), "there is no such database")):
        refused = run_cli("report", *words, "-o", tmp_path / "x.html")
        assert refused.code == 2 and expected in refused.err
