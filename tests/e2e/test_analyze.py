"""rilq analyze on a tiny random model: what it writes, and what must hold of its figures."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rilq.converter.analysis import AnalyzeOptions
from rilq.errors import OptionError

LINES = [("svd", "none"), ("linear", "none"), ("layer", "alpha"), ("layer", "alpha/rank"),
         ("model", "alpha"), ("model", "alpha/rank")]  # fmt: skip
FIGURES = ("perplexity", "gap_closed", "state_error")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]) -> Path:
    """Linears of 64 and 128 channels only, so that rank 64 is full rank."""
    folder = tmp_path_factory.mktemp("square") / "tiny-square"
    return make_model(folder, num_key_value_heads=4)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory, text: str) -> Path:
    path = tmp_path_factory.mktemp("held-out") / "text.txt"
    path.write_text(text[6000:9000])
    return path


@pytest.fixture
def analyze(
    run_cli: Any, model: Path, calib: Path, held_out: Path, tmp_path: Path
) -> Callable[..., Any]:
    """`analyze(*options)`: the command in a child, writing to `tmp_path/found`; how it ended."""

    def run(*options: object, first: Callable[[], None] | None = None) -> Any:
        words = (
            "--group-size 32 --ranks 4,16,64 --nsamples 10 --seqlen 32 --windows 1000 --steps 3 "
            "--lr 1e-3 --device cpu"
        )
        places = ("--dataset", calib, "--text", held_out, "-o", tmp_path / "found")
        return run_cli("analyze", model, *words.split(), *places, *options, first=first)

    return run


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    """The default analysis, made by the first test that needs it."""
    return {}


@pytest.fixture
def found(kept: dict[str, Any], analyze: Callable[..., Any], tmp_path: Path) -> dict[str, Any]:
    """What the default analysis wrote and printed."""
    if not kept:
        ended = analyze("--json")
        assert ended.code == 0, ended.err
        kept["files"] = sorted(path.name for path in (tmp_path / "found").iterdir())
        kept["json"] = json.loads((tmp_path / "found" / "analysis.json").read_text())
        kept["table"] = (tmp_path / "found" / "analysis.md").read_text()
        kept["plot"] = (tmp_path / "found" / "analysis.png").read_bytes()
        kept["printed"], kept["err"] = json.loads(ended.out), ended.err
    return kept


def rows_of(found: dict[str, Any], scope: str, scaling: str = "none") -> list[dict[str, Any]]:
    rows = found["json"]["rows"]
    return [row for row in rows if (row["scope"], row["scaling"]) == (scope, scaling)]


def test_json_has_a_row_for_every_line_and_rank(found: dict[str, Any]) -> None:
    told = found["json"]
    assert found["printed"] == told
    lines = [(row["scope"], row["scaling"], row["rank"]) for row in told["rows"]]
    assert lines == [(*line, rank) for line in LINES for rank in (4, 16, 64)]
    for row in told["rows"]:
        assert set(row) == {"scope", "scaling", "rank", "alpha", "weight_error", *FIGURES}
        assert all(isinstance(row[figure], float) for figure in FIGURES)
    assert {key: set(told[key]) for key in ("full", "plain", "base")} == dict.fromkeys(
        ("full", "plain", "base"), set(FIGURES)
    )
    assert told["plain"] == told["base"] and told["plain"]["gap_closed"] == 0
    assert [s["bits"] for s in told["spectrum"]] == [2, 3, 4]
    assert [list(s["captured"]) for s in told["spectrum"]] == [["4", "16", "64"]] * 3
    assert [(m["scope"], m["scaling"]) for m in told["movement"]] == LINES
    assert told["settings"]["learning_rate"] == 1e-3 and told["model"] == "tiny-square"


def test_alpha_is_fixed_on_one_line_and_alpha_over_rank_on_the_other(found: dict[str, Any]) -> None:
    assert [row["alpha"] for row in rows_of(found, "svd")] == [None] * 3
    for scope in ("layer", "model"):
        first, second = rows_of(found, scope, "alpha"), rows_of(found, scope, "alpha/rank")
        assert [row["alpha"] for row in first] == [16, 16, 16]
        assert [row["alpha"] for row in second] == [4, 16, 64]
        assert [first[1][f] for f in FIGURES] == [second[1][f] for f in FIGURES]
        assert first[0]["perplexity"] != second[0]["perplexity"]


def test_svd_at_full_rank_is_full_precision(found: dict[str, Any]) -> None:
    last, full = rows_of(found, "svd")[-1], found["json"]["full"]
    assert last["perplexity"] == pytest.approx(full["perplexity"], rel=1e-4)
    assert last["gap_closed"] == pytest.approx(1, abs=1e-2)
    assert last["state_error"] < 1e-6 and last["weight_error"] < 1e-9
    assert found["json"]["plain"]["state_error"] > 1e-3  # there was something to restore


@pytest.mark.parametrize("scope", ["svd", "linear"])
def test_errors_of_the_closed_forms_fall_with_the_rank(scope: str, found: dict[str, Any]) -> None:
    for figure in ("weight_error", "state_error"):
        values = [row[figure] for row in rows_of(found, scope)]
        assert values == sorted(values, reverse=True) and values[0] > values[1], figure


def test_each_closed_form_is_best_at_its_own_loss(found: dict[str, Any]) -> None:
    for svd, linear in zip(rows_of(found, "svd")[:2], rows_of(found, "linear")[:2], strict=True):
        assert svd["weight_error"] < linear["weight_error"]
        assert linear["state_error"] < svd["state_error"]


def test_every_trained_scope_comes_nearer_to_the_teacher(found: dict[str, Any]) -> None:
    plain = found["json"]["plain"]["state_error"]
    for scope in ("layer", "model"):
        for scaling in ("alpha", "alpha/rank"):
            assert all(row["state_error"] < plain for row in rows_of(found, scope, scaling))


def test_the_tables_figures_are_the_jsons(found: dict[str, Any]) -> None:
    lines = [line.strip("| ").split(" | ") for line in found["table"].splitlines()]
    start = next(i for i, cells in enumerate(lines) if cells[0] == "plain rounding") + 1
    rows = found["json"]["rows"]
    for cells, row in zip(lines[start : start + len(rows)], rows, strict=True):
        scope = cells[0].removesuffix("-loss").replace("weight-SVD", "svd")
        assert (scope, int(cells[2])) == (row["scope"], row["rank"])
        assert [float(cell) for cell in cells[3:6]] == [
            float(f"{row['perplexity']:.4g}"),
            round(row["gap_closed"], 3),
            round(row["state_error"], 4),
        ]
    for bits in found["json"]["spectrum"]:
        [cells] = [cells for cells in lines if cells[0] == str(bits["bits"])]
        assert float(cells[1]) == round(bits["relative_error"], 4)


def test_base_and_full_precision_measure_as_rilq_eval_does(
    found: dict[str, Any], run_cli: Any, model: Path, calib: Path, held_out: Path, tmp_path: Path
) -> None:
    rounding = ("--quantizer", "rtn", "--rank", 0, "--group-size", 32, "--nsamples", 2)
    place = ("--seqlen", 32, "--device", "cpu")
    convert = ("convert", model, "--dataset", calib, "--no-report", "-o", tmp_path / "rtn")
    ended = run_cli(*convert, *rounding, *place)
    assert ended.code == 0, ended.err
    for name, folder in (("plain", tmp_path / "rtn"), ("full", model)):
        ended = run_cli("eval", folder, "--text", held_out, *place, "--no-speed", "--json")
        assert json.loads(ended.out)["perplexity"] == pytest.approx(
            found["json"][name]["perplexity"], rel=1e-4
        )


def test_two_runs_give_the_same_bytes(
    analyze: Callable[..., Any], tmp_path: Path, hashes: Callable[[Path], dict[str, str]]
) -> None:
    seen = []
    for _ in range(2):
        assert analyze("--ranks", 4, "--scopes", "layer,model").code == 0
        seen.append(hashes(tmp_path / "found"))
    assert seen[0] == seen[1] and len(seen[0]) == 3


def test_normal_float_is_another_base_with_the_same_zero(
    found: dict[str, Any], analyze: Callable[..., Any]
) -> None:
    ended = analyze("--quantizer", "nf2", "--scopes", "svd,model", "--json")
    assert ended.code == 0, ended.err
    told = json.loads(ended.out)
    assert told["plain"] == found["json"]["plain"] != told["base"]
    full = [row for row in told["rows"] if (row["scope"], row["rank"]) == ("svd", 64)]
    assert full[0]["perplexity"] == pytest.approx(told["full"]["perplexity"], rel=1e-4)
    assert told["spectrum"][0]["relative_error"] != found["json"]["spectrum"][0]["relative_error"]


def test_pooled_adapters_are_analysed_up_to_the_number_of_groups(
    analyze: Callable[..., Any],
) -> None:
    ended = analyze("--adapter", "pooled", "--ranks", "1,2", "--json")
    assert ended.code == 0, ended.err
    rows = json.loads(ended.out)["rows"]
    assert [row["rank"] for row in rows] == [1, 2] * 6
    svd = [row["weight_error"] for row in rows if row["scope"] == "svd"]
    assert svd[1] < svd[0]
    refused = analyze("--adapter", "pooled", "--ranks", "1,4")
    assert refused.code == 2 and "allows at most 2" in refused.err


def test_table_json_and_plot_are_written(found: dict[str, Any]) -> None:
    assert found["files"] == ["analysis.json", "analysis.md", "analysis.png"]
    assert found["plot"].startswith(b"\x89PNG") and "warning" not in found["err"]


@pytest.mark.parametrize("tier", ["packed", "offload"])
def test_every_tier_gives_what_the_dense_one_gives(
    tier: str, found: dict[str, Any], analyze: Callable[..., Any]
) -> None:
    ended = analyze("--student", tier, "--json")
    assert ended.code == 0, ended.err
    for dense, other in zip(found["json"]["rows"], json.loads(ended.out)["rows"], strict=True):
        assert other["perplexity"] == pytest.approx(dense["perplexity"], rel=1e-3)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--ranks", "4,x"), "--ranks 4,x: expected whole numbers"),
        (("--ranks", "0"), "from 1 up"),
        (("--ranks", "65"), "allows at most 64"),
        (("--scopes", "svd,head"), "--scopes head: expected some of svd, linear, layer, model"),
        (("--quantizer", "gptq"), "--quantizer gptq: expected rtn or nf2"),
        (("--quantizer", "nf2", "--bits", 3), "nf2: has 2 bits"),
        (("--windows", "0"), "--windows 0"),
    ],
)
def test_impossible_options_are_refused_in_one_line_of_their_own(
    options: tuple[object, ...], expected: str, analyze: Callable[..., Any]
) -> None:
    ended = analyze(*options)
    assert ended.code == 2 and expected in ended.err and "Traceback" not in ended.err


def test_a_stop_leaves_no_hidden_states_behind(analyze: Callable[..., Any], tmp_path: Path) -> None:
    def stop_at_the_first_layer() -> None:
        import os
        import signal

        from rilq.converter import scopes

        def fit(*_: object) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

        scopes.LayerFits.__call__ = fit  # type: ignore[method-assign]

    ended = analyze(first=stop_at_the_first_layer)
    assert ended.code == 75 and "nothing was kept" in ended.err
    assert list((tmp_path / "found").iterdir()) == []


def test_where_the_scalings_meet_one_fit_serves_both_lines() -> None:
    lines = AnalyzeOptions(model="m", text="t", ranks=(32, 16), scopes=("model",)).lines()
    first, second = lines["model", "alpha"], lines["model", "alpha/rank"]
    assert first[0] == second[0] and first[1] != second[1]
    assert [fit.spec.scaling for fit in second] == [1.0, 1.0]


def test_all_wrong_options_are_named_at_once() -> None:
    with pytest.raises(OptionError, match=r"(?s)--ranks.*--windows"):
        AnalyzeOptions(model="m", text="t", ranks=(), windows=0)
