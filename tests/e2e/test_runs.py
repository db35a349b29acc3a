"""`rilq convert` and `rilq eval` leave a record beside the checkpoint, and `rilq runs` shows it."""

import csv
import io
import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import rilq
from rilq.converter import workdir
from rilq.formats.checkpoint import Checkpoint
from rilq.formats.source import LocalFolder
from rilq.formats.verify import file_hash
from rilq.records.database import open_database, read_database
from rilq.records.run import Run


@pytest.fixture
def recorded(run_cli: Any) -> Callable[..., Any]:
    """`recorded(*arguments, folder=None, first=None)`: the command as users have it, RILQ_DB unset.

    It runs in `folder`.
    """

    def run(*arguments: object, folder: Path | None = None, first: Any = None) -> Any:
        def before() -> None:
            del os.environ["RILQ_DB"]
            if folder is not None:
                os.chdir(folder)
            if first is not None:
                first()

        return run_cli(*arguments, first=before)

    return run


def all_runs(path: Path) -> list[Run]:
    """Whole, the oldest first."""
    with read_database(path) as database:
        return [database.run(run.id) for run in reversed(database.runs())]


def act_at(point: str, count: int, act: Callable[[], None]) -> Callable[[], None]:
    """For a child: have `act` called at the commit point of that name and number."""

    def first() -> None:
        left = [count]

        def reached(name: str) -> None:
            left[0] -= name == point
            if name == point and left[0] == 0:
                act()

        workdir.reached = reached

    return first


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def shared() -> dict[str, Path]:
    """The folder of `made`, once it is there."""
    return {}


@pytest.fixture
def made(
    shared: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    recorded: Any,
    arguments: Any,
    calib: Path,
    tiny_llama: Path,
) -> Path:
    """A folder with `out`, converted and measured, and the record of both."""
    if "made" not in shared:
        folder = tmp_path_factory.mktemp("made")
        ended = recorded(*arguments(folder))
        assert ended.code == 0, ended.err
        assert f"recorded as run 1 in {folder / 'rilq.db'}" in ended.err
        more = ("--text", calib, "--seqlen", 64, "--against", tiny_llama, "--device", "cpu")
        ended = recorded("eval", folder / "out", *more, "--no-speed", folder=folder)
        assert ended.code == 0, ended.err
        shared["made"] = folder
    return shared["made"]


# -- what is recorded ------------------------------------------------------------------------------


def test_the_record_lies_beside_the_output_which_is_the_same_without_it(
    made: Path, tmp_path: Path, run_cli: Any, arguments: Any, hashes: Any
) -> None:
    assert run_cli(*arguments(tmp_path)).code == 0  # RILQ_DB is none there
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert sorted(path.name for path in made.iterdir()) == ["out", "rilq.db"]
    assert hashes(made / "out") == hashes(tmp_path / "out")


def test_a_conversion_is_recorded(made: Path, tiny_llama: Path) -> None:
    run, manifest = all_runs(made / "rilq.db")[0], json.loads((made / "out/rilq.json").read_text())
    assert (run.command, run.state, run.message) == ("convert", "done", "")
    assert (run.model, run.checkpoint, run.place) == ("tiny-llama", "out", str(made / "out"))
    assert run.source_hash == Checkpoint.open(LocalFolder(tiny_llama)).header_hash()
    assert run.content_hash == file_hash(made / "out" / "rilq.json")
    assert run.job == manifest["job"] and run.recipe == manifest["recipe"]
    assert run.versions == manifest["versions"]
    assert run.machine["cores"] == os.cpu_count() and run.machine["memory_bytes"] > 1e8
    assert [stage.name for stage in run.stages] == ["layers", "train", "write"]
    assert all(stage.host_bytes > 1e7 and stage.disk_free_bytes > 0 for stage in run.stages)
    assert sum(stage.seconds for stage in run.stages) <= run.seconds
    assert run.samples[0].host_bytes > 1e7
    assert [layer.error for layer in run.layers] == manifest["quality"]["layer_errors"]
    # 2 bits, and 32 of scale and zero-point for each group of 32
    assert [layer.bits for layer in run.layers] == [3.0, 3.0]
    assert run.figures["validation_loss"] == manifest["quality"]["validation_loss"]
    assert run.figures["bits_per_weight"] == 3.0
    weights = (made / "out").glob("*.safetensors")
    assert run.figures["size_bytes"] == sum(path.stat().st_size for path in weights)
    validation = [(p.step, p.value) for p in run.losses if (p.kind, p.term) ==
                  ("validation", "total")]  # fmt: skip
    assert validation == [tuple(each) for each in manifest["quality"]["history"]]
    curves = {(p.kind, p.term): 0 for p in run.losses}
    assert curves.keys() == {("train", "total")} | {
        ("validation", term) for term in ("total", "mse", "ce", "kl")
    }


def test_an_evaluation_is_recorded(made: Path, calib: Path, tiny_llama: Path) -> None:
    convert, run = all_runs(made / "rilq.db")
    assert (run.command, run.state, run.checkpoint) == ("eval", "done", "out")
    assert (run.model, run.source_hash) == (convert.model, convert.source_hash)
    assert (run.content_hash, run.job) == (convert.content_hash, convert.job)
    assert run.recipe == convert.recipe and run.place == convert.place
    assert run.options["text"] == str(calib) and run.options["seqlen"] == 64
    assert run.options["against"] == str(tiny_llama)
    assert run.evaluation is not None
    found = rilq.evaluate(
        str(made / "out"), str(calib), seqlen=64, against=str(tiny_llama), device="cpu", speed=False
    )
    assert run.figures == pytest.approx(found.figures(), rel=1e-6)
    assert run.evaluation["tokens_digest"] == found.tokens_digest


def test_a_dense_model_is_recorded_in_the_current_folder_and_never_inside_it(
    tmp_path: Path, recorded: Any, tiny_llama: Path, calib: Path, make_model: Any
) -> None:
    options = ("--text", calib, "--seqlen", 64, "--device", "cpu", "--quiet", "--no-speed")
    assert recorded("eval", tiny_llama, *options, folder=tmp_path).code == 0
    [run] = all_runs(tmp_path / "rilq.db")
    assert run.model == run.checkpoint == "tiny-llama" and run.recipe == {}
    assert run.source_hash == run.content_hash
    model = make_model(tmp_path / "models" / "own")
    before = sorted(model.iterdir())
    assert recorded("eval", ".", *options, folder=model).code == 0
    assert sorted(model.iterdir()) == before
    assert [run.model for run in all_runs(tmp_path / "models" / "rilq.db")] == ["own"]


def test_bad_input_of_an_evaluation_is_no_run(
    tmp_path: Path, recorded: Any, tiny_llama: Path, calib: Path
) -> None:
    for wrong in (("--text", tmp_path / "nothing.txt"), ("--text", calib, "--seqlen", 100_000)):
        assert recorded("eval", tiny_llama, *wrong, "--no-speed", folder=tmp_path).code == 2
    assert not (tmp_path / "rilq.db").exists()


def test_python_records_too_and_where_it_is_told(
    tmp_path: Path, in_child: Any, quick: Any, calib: Path
) -> None:
    def work() -> None:
        result = rilq.convert(quick(tmp_path), db=tmp_path / "own.db")
        options = {"seqlen": 64, "device": "cpu", "speed": False}
        rilq.evaluate(str(result.output), str(calib), db="none", **options)
        del os.environ["RILQ_DB"]
        rilq.evaluate(str(result.output), str(calib), **options)

    ended = in_child(work)
    assert ended.code == 0, ended.err
    assert [run.command for run in all_runs(tmp_path / "own.db")] == ["convert"]
    assert [run.command for run in all_runs(tmp_path / "rilq.db")] == ["eval"]


@pytest.mark.parametrize(("point", "count"), [("train:committed", 2), ("publish:after", 1)])
def test_a_killed_conversion_is_marked_and_the_next_one_has_the_same_job(
    tmp_path: Path, recorded: Any, arguments: Any, point: str, count: int
) -> None:
    words = arguments(tmp_path)
    assert recorded(*words, first=act_at(point, count, kill)).code == -signal.SIGKILL
    assert recorded(*words).code == 0
    first, second = all_runs(tmp_path / "rilq.db")
    assert (first.state, first.message) == ("failed", "killed")
    assert first.content_hash is None
    assert second.state == "done" and first.job == second.job
    assert second.content_hash == file_hash(tmp_path / "out" / "rilq.json")
    assert [p.step for p in second.losses if (p.kind, p.term) == ("validation", "kl")] == [0, 2, 4]


def test_a_stopped_conversion_keeps_its_losses_so_far(
    tmp_path: Path, recorded: Any, arguments: Any
) -> None:
    stop = act_at("train:committed", 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert recorded(*arguments(tmp_path), first=stop).code == 75
    [run] = all_runs(tmp_path / "rilq.db")
    assert run.state == "stopped" and "SIGTERM" in run.message
    assert [p.step for p in run.losses if (p.kind, p.term) == ("validation", "total")] == [0, 2]
    assert [stage.name for stage in run.stages] == ["layers", "train"]


def test_a_conversion_that_fails_says_why_and_bad_input_is_no_run(
    tmp_path: Path, recorded: Any, arguments: Any
) -> None:
    assert recorded(*arguments(tmp_path, "--bits", 5)).code == 2
    assert not list(tmp_path.iterdir())

    def fail() -> None:
        raise rilq.RilqError("the work failed")

    ended = recorded(*arguments(tmp_path), first=act_at("layers:committed", 1, fail))
    assert ended.code == 1
    [run] = all_runs(tmp_path / "rilq.db")
    assert (run.state, run.message) == ("failed", "the work failed")


@pytest.mark.parametrize("option", ["none", "out/x.db", "unwritable"])
def test_the_record_can_be_off_is_never_in_the_output_and_never_the_reason_to_fail(
    tmp_path: Path, recorded: Any, arguments: Any, option: str
) -> None:
    place = {"none": "none", "out/x.db": tmp_path / "out" / "x.db", "unwritable": "/proc/rilq/x.db"}
    ended = recorded(*arguments(tmp_path, "--db", place[option]))
    if option == "out/x.db":
        assert ended.code == 2 and "lies inside" in ended.err
        assert not list(tmp_path.iterdir())
        return
    assert ended.code == 0, ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert ended.err.count("not recorded") == (option == "unwritable")


@pytest.mark.parametrize(
    ("options", "reason"), [("ro", "unable to open|readonly"), ("size=32k", "full")]
)
def test_a_volume_without_room_or_right_to_write_costs_the_record_only(
    tmp_path: Path,
    recorded: Any,
    arguments: Any,
    mount_tmpfs: Any,
    skip_without_mounts: Any,
    options: str,
    reason: str,
) -> None:
    volume = tmp_path / "volume"
    ended = recorded(
        *arguments(tmp_path, "--db", volume / "rilq.db"), first=lambda: mount_tmpfs(volume, options)
    )
    skip_without_mounts(ended)
    assert ended.code == 0 and (tmp_path / "out" / "rilq.json").is_file()
    [line] = [line for line in ended.err.splitlines() if "not recorded" in line]
    assert re.search(reason, line), line


# -- rilq runs -------------------------------------------------------------------------------------


def test_runs_lists_in_80_columns_and_more_where_there_is_room(made: Path, recorded: Any) -> None:
    narrow, wide = (
        recorded("runs", folder=made, first=lambda w=w: os.environ.update(COLUMNS=w)).out
        for w in ("80", "160")
    )
    for text, width in ((narrow, 80), (wide, 160)):
        assert max(map(len, text.splitlines())) <= width
        assert "convert" in text and "eval" in text and "done" in text
    assert "KL mean" in wide and "KL mean" not in narrow


def test_runs_filters_sorts_and_writes_json_and_csv(made: Path, recorded: Any) -> None:
    found = json.loads(recorded("runs", "--json", folder=made).out)
    assert [run["id"] for run in found] == [2, 1]
    assert found[0]["figures"]["perplexity"] > 1
    for words, expected in (
        (("--command", "convert"), [1]),
        (("--model", "tiny-*"), [2, 1]),
        (("--checkpoint", "other"), []),
        (("--state", "failed"), []),
        (("--limit", 1), [2]),
        (("--sort", "validation_loss"), [1, 2]),
        (("--reverse",), [1, 2]),
    ):
        ended = recorded("runs", "--json", *words, "--db", made / "rilq.db")
        assert [run["id"] for run in json.loads(ended.out)] == expected, words
    rows = list(csv.DictReader(io.StringIO(recorded("runs", "--csv", folder=made).out)))
    assert [row["command"] for row in rows] == ["eval", "convert"]
    assert float(rows[0]["perplexity"]) == found[0]["figures"]["perplexity"]
    assert rows[1]["perplexity"] == "" and rows[1]["checkpoint"] == "out"


def test_one_run_is_shown_whole(made: Path, recorded: Any) -> None:
    shown = recorded("runs", 1, folder=made)
    assert shown.code == 0
    for words in ("recipe", "stages", "decoder layers", "losses", "validation_loss", "blockap"):
        assert words in shown.out, words
    [run, _] = all_runs(made / "rilq.db")
    told = json.loads(recorded("runs", 1, "--json", folder=made).out)
    assert told["losses"][0]["value"] == run.losses[0].value
    assert told["stages"][1]["name"] == "train"


def test_one_run_becomes_event_files(made: Path, tmp_path: Path, recorded: Any) -> None:
    ended = recorded("runs", 1, "--tensorboard", tmp_path / "events", folder=made)
    assert ended.code == 0 and ended.out.strip() == str(tmp_path / "events" / "run-1")
    [events] = (tmp_path / "events" / "run-1").iterdir()
    assert events.name.startswith("events.out.tfevents.")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("7",), "the newest is 2"),
        (("--db", "missing.db"), "there is no such database"),
        (("--db", "none"), "nothing to list"),
        (("--state", "odd"), "expected one of running"),
        (("--sort", "odd"), "no run has it; there are activation_bits"),
        (("--tensorboard", "x"), "which run"),
        (("--json", "--csv"), "give one of them"),
    ],
)
def test_what_runs_cannot_do_is_one_screen(
    made: Path, recorded: Any, words: tuple[str, ...], message: str
) -> None:
    ended = recorded("runs", *words, folder=made)
    assert ended.code == 2 and message in ended.err and "Traceback" not in ended.err


def test_texts_from_outside_are_shown_as_they_are(tmp_path: Path, recorded: Any) -> None:
    odd = Run(0, "eval", 1.7e9, 1.0, "done", "m", "[red]x\x1b[31m:smile:", "/p")
    with open_database(tmp_path / "rilq.db") as database:
        database.begin(odd)
    for words in (("runs",), ("runs", 1)):
        shown = recorded(*words, folder=tmp_path).out
        assert "[red]x\\x1b[31m:smile:" in shown.replace("\n", "")
