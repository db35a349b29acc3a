"""`rilq eval`: a stopped one continues to the figures of an unbroken one."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rilq.converter import workdir
from rilq.evaluation import lockstep

SEQLEN = 32
KILLED = -signal.SIGKILL


@pytest.fixture
def checkpoint(native: Callable[..., Path]) -> Path:
    """A converted model; what it was made from is its sibling `source`."""
    return native("llama", {})


@pytest.fixture
def command(checkpoint: Path, calib: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """`command(*more)`: an evaluation against the base, with its state in `tmp_path/work`."""

    def make(*more: object) -> list[str]:
        words = ("eval", checkpoint, "--against", checkpoint.parent / "source", "--text", calib,
                 "--seqlen", SEQLEN, "--device", "cpu", "--work-dir", tmp_path / "work",
                 "--no-speed", "--json", *more)  # fmt: skip
        return [str(word) for word in words]

    return make


@pytest.fixture
def unbroken(kept: dict[str, str], command: Callable[..., list[str]], run_cli: Any) -> str:
    """What an evaluation that is never stopped prints."""
    if "out" not in kept:
        ended = run_cli(*command(), first=in_parts)
        assert ended.code == 0, ended.err
        kept["out"] = ended.out
    return kept["out"]


@pytest.fixture(scope="module")
def kept() -> dict[str, str]:
    """What tests of this file share."""
    return {}


def in_parts() -> None:
    """Score in several parts, as a long text is."""
    lockstep.SCORED_TOKENS = 30 * SEQLEN


def at(point: str, count: int = 1, act: Callable[[], None] | None = None) -> Callable[[], None]:
    """To be called in a child: have `act` (kill -9) called where `point` comes for that time."""
    seen: list[str] = []

    def reached(name: str) -> None:
        seen.append(name)
        if name == point and seen.count(point) == count:
            (act or kill)()

    def prepare() -> None:
        in_parts()
        workdir.reached = reached

    return prepare


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def killed_after_the_first_unit() -> None:
    def reached(name: str) -> None:
        if name.endswith(":committed") and name != "job:committed":
            kill()

    in_parts()
    workdir.reached = reached


def test_killed_after_every_unit_it_finishes_with_the_same_figures(
    command: Callable[..., list[str]], run_cli: Any, unbroken: str, tmp_path: Path
) -> None:
    kills = 0
    while (ended := run_cli(*command(), first=killed_after_the_first_unit)).code == KILLED:
        kills += 1
        assert kills < 30, "no progress"
    assert ended.out == unbroken, ended.err
    # The rows; embedding and two layers of two models; three parts of the score, worst passages.
    assert kills == 1 + 2 * 3 + 3 + 1
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("point", "count"),
    [("base:written", 2), ("model-0:written", 3), ("base:committed", 3), ("score-0:written", 2),
     ("remove:begun", 1)],
)  # fmt: skip
def test_killed_between_two_durable_steps_it_finishes_with_the_same_figures(
    command: Callable[..., list[str]], run_cli: Any, unbroken: str, point: str, count: int
) -> None:
    assert run_cli(*command(), first=at(point, count)).code == KILLED
    ended = run_cli(*command("--resume", "auto"), first=in_parts)
    assert ended.out == unbroken, ended.err


def test_a_stop_says_where_the_state_is_and_the_same_command_continues(
    command: Callable[..., list[str]], run_cli: Any, unbroken: str, tmp_path: Path
) -> None:
    ended = run_cli(*command(), first=at("model-0:committed", 2, interrupt))
    assert ended.code == 75
    assert f"stopped by SIGINT; state is in {tmp_path / 'work'}: run the same" in ended.err
    ended = run_cli(*command("--resume", "required"), first=in_parts)
    assert f"continuing after 'layer 0' of {tmp_path / 'work'}" in ended.err
    assert ended.out == unbroken


@pytest.mark.parametrize(
    ("point", "file"),
    [(("model-0:cleaned", 2), "model-0-0001.bin"),
     (("score-0:cleaned", 2), "score-0-00000.safetensors")],
)  # fmt: skip
def test_a_damaged_state_file_is_named_and_made_again(
    command: Callable[..., list[str]],
    run_cli: Any,
    unbroken: str,
    tmp_path: Path,
    point: tuple[str, int],
    file: str,
) -> None:
    assert run_cli(*command(), first=at(*point)).code == KILLED
    path = tmp_path / "work" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    ended = run_cli(*command(), first=in_parts)
    assert f"{path}: missing or damaged" in ended.err
    assert ended.out == unbroken


@pytest.fixture
def stopped(command: Callable[..., list[str]], run_cli: Any) -> None:
    """An evaluation was killed after its first layer."""
    assert run_cli(*command(), first=at("model-0:cleaned", 2)).code == KILLED


@pytest.mark.usefixtures("stopped")
def test_changed_options_are_refused_with_old_and_new(
    command: Callable[..., list[str]], run_cli: Any
) -> None:
    ended = run_cli(*command("--seqlen", 16, "--dtype", "bfloat16"))
    assert ended.code == 2
    assert "--seqlen: 32 there, 16 now" in ended.err
    assert "--dtype: 'float32' there, 'bfloat16' now" in ended.err
    assert run_cli(*command("--seqlen", 16, "--resume", "never")).code == 0


@pytest.mark.usefixtures("stopped")
def test_another_checkpoint_in_the_same_place_is_refused(
    command: Callable[..., list[str]], run_cli: Any, checkpoint: Path, unbroken: str
) -> None:
    manifest = checkpoint / "rilq.json"
    before, times = manifest.read_bytes(), os.stat(manifest)
    manifest.write_bytes(before.replace(b'"seed": 42', b'"seed": 43'))
    try:
        ended = run_cli(*command())
        assert ended.code == 2
        assert "checkpoint 0 rilq.json: " in ended.err
    finally:
        manifest.write_bytes(before)
        os.utime(manifest, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert run_cli(*command(), first=in_parts).out == unbroken


@pytest.mark.usefixtures("stopped")
def test_a_base_that_was_written_to_is_refused_by_name(
    command: Callable[..., list[str]], run_cli: Any, checkpoint: Path
) -> None:
    weights = checkpoint.parent / "source" / "model.safetensors"
    times = os.stat(weights)
    os.utime(weights)
    try:
        ended = run_cli(*command())
    finally:
        os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert ended.code == 2
    assert f"{weights}: written to since" in ended.err
    assert "--resume never" in ended.err


def test_resume_required_refuses_a_new_evaluation(
    command: Callable[..., list[str]], run_cli: Any, tmp_path: Path
) -> None:
    ended = run_cli(*command("--resume", "required"))
    assert (ended.code, "nothing to resume" in ended.err) == (2, True)
    ended = run_cli(*command("--resume", "sometimes"))
    assert (ended.code, "--resume sometimes: expected auto, never, required" in ended.err) == (
        2,
        True,
    )


def test_a_work_folder_inside_the_checkpoint_or_where_none_can_be_is_refused(
    command: Callable[..., list[str]], run_cli: Any, checkpoint: Path, tmp_path: Path
) -> None:
    ended = run_cli(*command("--work-dir", checkpoint / "work"))
    assert (ended.code, "lies inside the checkpoint" in ended.err) == (2, True)
    (tmp_path / "file").touch()
    ended = run_cli(*command("--work-dir", tmp_path / "file" / "work"))
    assert (ended.code, "the folder cannot be made" in ended.err) == (2, True)


@pytest.mark.parametrize("told", [True, False])
def test_a_full_volume_is_said_before_or_where_it_happens(
    command: Callable[..., list[str]],
    run_cli: Any,
    tmp_path: Path,
    mount_tmpfs: Any,
    skip_without_mounts: Any,
    told: bool,
) -> None:
    place = tmp_path / "small"

    def first() -> None:
        mount_tmpfs(place, "size=400k")
        if not told:
            import shutil
            from types import SimpleNamespace

            shutil.disk_usage = lambda _: SimpleNamespace(free=10**12)  # type: ignore[assignment]

    ended = run_cli(*command("--work-dir", place / "work"), first=first)
    skip_without_mounts(ended)
    expected = "needed for hidden states" if told else "cannot be written: No space left"
    assert expected in ended.err, ended.err
    assert "Traceback" not in ended.err
    assert ended.code == 2


def test_state_lies_beside_a_converted_checkpoint_and_goes_away(
    command: Callable[..., list[str]], run_cli: Any, checkpoint: Path
) -> None:
    words = command()
    at_work = words.index("--work-dir")
    words[at_work : at_work + 2] = []
    ended = run_cli(*words, first=at("model-0:committed", 2, interrupt))
    work = checkpoint.with_name("out.rilq-eval-work")
    assert ended.code == 75 and work.is_dir()
    assert run_cli(*words).code == 0
    assert not work.exists()


def test_the_json_shows_layers_and_the_worst_passages_as_text(unbroken: str, calib: Path) -> None:
    found = json.loads(unbroken)
    assert len(found["layer_errors"]) == 2 and all(0 < e < 1 for e in found["layer_errors"])
    text = calib.read_text()
    for passage in found["worst"]:
        assert "".join(token["text"] for token in passage["tokens"]).strip() in text
        kl = [token["kl"] for token in passage["tokens"]]
        assert kl[passage["worst"]] == max(kl)
    assert (
        found["worst"][0]["tokens"][found["worst"][0]["worst"]]["kl"] == found["against"]["kl_max"]
    )
