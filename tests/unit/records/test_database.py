"""The database of runs: what is read back, several writers, kills, and files that are not ours."""

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rilq.errors import InputError, OutputError
from rilq.evaluation.figures import Passages
from rilq.records import connection as connection_module
from rilq.records import schema
from rilq.records.connection import explained
from rilq.records.database import open_database, read_database
from rilq.records.liveness import SILENCE
from rilq.records.run import LayerFigure, LossPoint, Run, Sample, Stage

RUN = Run(
    id=0,
    command="convert",
    started=1_700_000_000.0,
    seconds=12.5,
    state="done",
    model="org/model",
    checkpoint="model-w2g64-rilq",
    place="/models/model-w2g64-rilq",
    source_hash="aa",
    content_hash="bb",
    job="cc",
    recipe={"bits": 2, "skip": []},
    options={"text": "wikitext2"},
    versions={"rilq": "0.1.0"},
    machine={"cores": 2},
    figures={"perplexity": 19.5, "kl_p99": 0.25},
    evaluation={"perplexity": 19.5},
    stages=(Stage("layers", 0.0, 10.0, 10**9, None, 10**10), Stage("train", 10.0, 2.5, 2, 3, 4)),
    samples=(Sample(1.0, 10**9, None, 10**10),),
    losses=(LossPoint("validation", "total", 0, 1.5), LossPoint("train", "kl", 50, 1.25)),
    layers=(LayerFigure(0, 0.125, 2.5), LayerFigure(1, 0.25, None)),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a database can be made."""
    return tmp_path / "rilq.db"


def in_process(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Another Python, which has the modules and `RUN` of this file's names at hand."""
    before = """
        import sys, time
        from dataclasses import replace
        from pathlib import Path
        from rilq.records.database import open_database
        from rilq.records.run import Run, Sample
        RUN = Run(0, "convert", time.time(), 0.0, "running", "m", "c", "/c")
        path = Path(sys.argv[1])
    """
    script = textwrap.dedent(before) + textwrap.dedent(code)
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


# -- what is read back -----------------------------------------------------------------------------


def test_a_run_is_read_back_as_it_was_written(path: Path) -> None:
    with open_database(path) as database:
        number = database.begin(RUN)
        assert database.run(number) == replace(RUN, id=number)


def test_a_saved_run_replaces_what_was_there(path: Path) -> None:
    with open_database(path) as database:
        number = database.begin(replace(RUN, state="running", figures={"old": 1.0}))
        later = replace(RUN, id=number, samples=(Sample(1, 2, 3, 4), Sample(2, 3, 4, 5)))
        database.save(later)
        assert database.run(number) == later


def test_passages_are_read_back_with_their_types(path: Path) -> None:
    passages = Passages(
        loss=np.array([1.5, 2.5]), tokens=3, kl=np.array([[0.5, 1, 2]] * 2, dtype=np.float16)
    )
    with open_database(path) as database:
        number, other = database.begin(RUN, passages), database.begin(RUN)
        database.save(replace(RUN, id=number))  # leaves them
        found = database.passages(number)
        assert database.passages(other) is None
    assert found is not None and found.tokens == 3 and found.base_loss is None
    np.testing.assert_array_equal(found.loss, passages.loss)
    assert found.kl is not None and found.kl.dtype == np.float16
    np.testing.assert_array_equal(found.kl, passages.kl)


def test_a_loss_that_is_not_finite_is_kept_and_such_a_figure_left_out(path: Path) -> None:
    point = LossPoint("train", "total", 1, float("nan"))
    with open_database(path) as database:
        number = database.begin(replace(RUN, losses=(point,), figures={"a": float("nan"), "b": 1}))
        found = database.run(number)
    assert np.isnan(found.losses[0].value)
    assert found.figures == {"b": 1}


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, [3, 2, 1]),
        ({"limit": 2}, [3, 2]),
        ({"command": "eval"}, [2]),
        ({"model": "org/model"}, [3, 1]),
        ({"model": "org/*"}, [3, 2, 1]),
        ({"state": "failed"}, [3]),
        ({"source_hash": "aa"}, [3, 2, 1]),
        ({"content_hash": "b2"}, [2]),
        ({"checkpoint": "*w3*"}, [2]),
        ({"checkpoint": "model-w2g64-rilq", "state": "done"}, [1]),
        ({"checkpoint": "' OR 1 --"}, []),
    ],
)
def test_runs_are_filtered_and_the_newest_come_first(
    path: Path, chosen: dict[str, object], expected: list[int]
) -> None:
    other = replace(
        RUN, command="eval", model="org/b", content_hash="b2", checkpoint="b-w3g64", started=2e9
    )
    with open_database(path) as database:
        for run in (RUN, other, replace(RUN, state="failed", message="no", started=3e9)):
            database.begin(run)
        found = database.runs(**chosen)  # type: ignore[arg-type]
    assert [run.id for run in found] == expected
    assert all(run.figures == RUN.figures for run in found)


def test_an_unknown_number_is_refused_with_the_newest_one(path: Path) -> None:
    with open_database(path) as database:
        with pytest.raises(InputError, match="run 7: not in .*none yet"):
            database.run(7)
        database.begin(RUN)
        with pytest.raises(InputError, match="run 7: not in .*the newest is 1"):
            database.passages(7)
        with pytest.raises(InputError, match="run 7"):
            database.save(replace(RUN, id=7))


def test_figures_can_be_asked_for_in_sql(path: Path) -> None:
    with open_database(path) as database:
        database.begin(RUN)
    connection = sqlite3.connect(path)
    query = """
        SELECT checkpoint, value, json_extract(recipe, '$.bits') FROM runs
        JOIN figures ON run = id WHERE name = 'perplexity'
    """
    assert connection.execute(query).fetchall() == [("model-w2g64-rilq", 19.5, 2)]
    connection.close()


# -- several writers, and kills --------------------------------------------------------------------


def test_two_processes_that_write_at_once_lose_nothing(path: Path) -> None:
    code = """
        print("ready", flush=True)
        sys.stdin.readline()
        for index in range(40):
            with open_database(path) as database:
                run = replace(RUN, model=sys.argv[2])
                number = database.begin(run)
                database.save(replace(run, id=number, state="done", samples=(Sample(1, 2, 3, 4),)))
    """
    writers = [in_process(code, path, name) for name in ("one", "two")]
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("\n")
        writer.stdin.flush()
    assert [writer.wait(60) for writer in writers] == [0, 0]
    with read_database(path) as database:
        for name in ("one", "two"):
            found = database.runs(model=name, state="done")
            assert len(found) == 40
            assert all(database.run(run.id).samples for run in found)
    for writer in writers:
        writer.communicate()


@pytest.mark.parametrize("after", [0.0, 0.013, 0.037, 0.1])
def test_a_writer_killed_at_any_moment_leaves_whole_rows_and_is_marked(
    path: Path, after: float
) -> None:
    code = """
        with open_database(path) as database:
            run = replace(RUN, id=database.begin(RUN))
            print("begun", flush=True)
            for count in range(1, 10**6):
                samples = tuple(Sample(count, 2, 3, 4) for _ in range(200))
                database.save(replace(run, seconds=count, samples=samples))
    """
    writer = in_process(code, path)
    assert writer.stdout is not None and writer.stdout.readline() == "begun\n"
    with read_database(path) as database:
        assert database.runs()[0].state == "running"
    time.sleep(after)
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    with read_database(path) as database:
        found = database.run(1)
        assert database.runs(state="failed") != []
    assert (found.state, found.message) == ("failed", "killed")
    # All that one save wrote, or what the one before did.
    assert {sample.at for sample in found.samples} <= {found.seconds}
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


def test_a_run_on_another_host_counts_as_killed_after_a_silence(path: Path) -> None:
    with open_database(path) as database:
        database.begin(replace(RUN, state="running"))
        database.begin(replace(RUN, state="running"))
    connection = sqlite3.connect(path)
    heard = time.time() - SILENCE
    connection.execute("UPDATE runs SET host = 'elsewhere', pid = 1")
    connection.execute("UPDATE runs SET heartbeat = ? WHERE id = 1", (heard - 60,))
    connection.execute("UPDATE runs SET heartbeat = ? WHERE id = 2", (heard + 60,))
    connection.commit()
    connection.close()
    with read_database(path) as database:
        assert [run.state for run in database.runs()] == ["running", "failed"]


def test_a_sign_of_life_takes_back_that_a_run_was_killed(path: Path) -> None:
    with open_database(path) as database:
        run = replace(RUN, state="running", id=database.begin(replace(RUN, state="running")))
        connection = sqlite3.connect(path)
        connection.execute("UPDATE runs SET state = 'failed', message = 'killed'")
        connection.commit()
        connection.close()
        database.save(run)
        assert database.run(run.id).state == "running"


def test_a_database_that_stays_locked_is_named_with_what_to_do(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_database(path) as database:
        database.begin(RUN)
    monkeypatch.setattr(connection_module, "BUSY", 0.1)
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(OutputError, match="locked\n  another program has held it"):
        with open_database(path):
            pass
    holder.close()


@pytest.mark.parametrize("said", ["locking protocol", "disk I/O error"])
def test_a_file_system_without_locks_is_named(path: Path, said: str) -> None:
    # What SQLite says on such a one, which a test cannot mount.
    with pytest.raises(OutputError, match=f"{said}\n  .*without locks|has no locks"):
        with explained(path):
            raise sqlite3.OperationalError(said)


# -- files that are not ours -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a database" * 100, "not a database"),
        (b"SQLite format 3\0" + b"\xff" * 4096, "not a database"),
    ],
)
def test_a_file_that_is_no_database_is_refused_and_left(
    path: Path, content: bytes, message: str
) -> None:
    path.write_bytes(content)
    for opened in (open_database, read_database):
        with pytest.raises(InputError, match=message), opened(path):
            pass
    assert path.read_bytes() == content


def test_a_damaged_database_is_refused_in_one_screen(path: Path) -> None:
    with open_database(path) as database:
        for _ in range(50):
            database.begin(RUN)
    content = bytearray(path.read_bytes())
    content[4096:] = b"\x5a" * (len(content) - 4096)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"malformed\n  the file is damaged"):
        with read_database(path) as database:
            database.runs()


def test_a_database_of_another_program_is_refused_and_left(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE runs (id)")
    connection.close()
    content = path.read_bytes()
    for opened in (open_database, read_database):
        with pytest.raises(InputError, match="database of another program"), opened(path):
            pass
    assert path.read_bytes() == content


def test_a_database_of_a_newer_rilq_is_refused_and_left(path: Path) -> None:
    with open_database(path):
        pass
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    content = path.read_bytes()
    for opened in (open_database, read_database):
        with pytest.raises(InputError, match="newer rilq .version 99"), opened(path):
            pass
    assert path.read_bytes() == content


def test_an_older_database_keeps_its_runs_when_it_is_brought_up_to_date(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_database(path) as database:
        database.begin(RUN)
    newer = (*schema.MIGRATIONS, "ALTER TABLE runs ADD COLUMN more TEXT; CREATE TABLE extra (id);")
    monkeypatch.setattr(schema, "MIGRATIONS", newer)
    with open_database(path) as database:
        assert database.run(1) == replace(RUN, id=1)
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA user_version").fetchone() == (len(newer),)
    assert connection.execute("SELECT more FROM runs").fetchall() == [(None,)]
    connection.close()


def test_a_migration_that_fails_changes_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_database(path) as database:
        database.begin(RUN)
    broken = (*schema.MIGRATIONS, "CREATE TABLE extra (id); CREATE TABLE runs (id);")
    monkeypatch.setattr(schema, "MIGRATIONS", broken)
    with pytest.raises(OutputError, match="already exists"), open_database(path):
        pass
    monkeypatch.undo()
    with open_database(path) as database:
        assert database.run(1) == replace(RUN, id=1)


def test_a_missing_database_is_not_made_by_reading(path: Path) -> None:
    with pytest.raises(InputError, match="there is no such database"), read_database(path):
        pass
    assert not path.exists()


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="unable to open"):
        with open_database(tmp_path / "missing" / "rilq.db"):
            pass


def test_a_database_that_cannot_be_written_is_read_as_it_is(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_database(path) as database:
        database.begin(replace(RUN, state="running"))
    connection = sqlite3.connect(path)
    connection.execute("UPDATE runs SET pid = 0, host = 'elsewhere', heartbeat = 0")
    connection.commit()
    connection.close()
    content = path.read_bytes()
    # root may write everywhere, so that permissions would show nothing
    monkeypatch.setattr(os, "access", lambda *_: False)
    with read_database(path) as database:
        assert database.run(1).message == "killed"
        with pytest.raises(OutputError, match="readonly"):
            database.begin(RUN)
    assert path.read_bytes() == content


def test_the_queries_of_the_documentation_run(path: Path) -> None:
    text = (Path(__file__).parents[3] / "docs" / "runs.md").read_text()
    queries = [part.split("```")[0] for part in text.split("```sql\n")[1:]]
    with open_database(path) as database:
        database.begin(RUN)
        database.begin(replace(RUN, command="eval"))
    connection = sqlite3.connect(path)
    found = [connection.execute(query).fetchall() for query in queries]
    connection.close()
    assert found[0] == [("org/model", "model-w2g64-rilq", 2, 19.5)]
    assert found[1] == [("layers", 1, 10.0, 1.0), ("train", 1, 2.5, 2e-9)]
    assert found[2] == [(2, 1, 12.5)]
