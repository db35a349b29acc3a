"""Which database a run goes into."""

from pathlib import Path

import pytest

from rilq.errors import OptionError
from rilq.records.place import database_for


def test_a_given_file_comes_before_the_environment_and_that_before_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RILQ_DB", str(tmp_path / "of-environment.db"))
    given = tmp_path / "given.db"
    assert database_for(given, tmp_path) == given
    assert database_for("auto", tmp_path) == tmp_path / "of-environment.db"
    monkeypatch.delenv("RILQ_DB")
    assert database_for("auto", tmp_path) == tmp_path / "rilq.db"


def test_none_is_no_record_from_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert database_for("none", tmp_path) is None
    monkeypatch.setenv("RILQ_DB", "none")
    assert database_for("auto", tmp_path) is None
    assert database_for("./none", tmp_path) == Path("none").absolute()


def test_a_database_inside_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="lies inside"):
        database_for(tmp_path / "out" / "deep" / "x.db", tmp_path, (tmp_path / "out",))
