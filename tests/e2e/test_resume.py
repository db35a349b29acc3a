"""A stopped conversion, however it was stopped, continues to the bytes of one never stopped."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import xxhash

from rilq.cli.session import stoppable
from rilq.converter import pipeline, workdir
from rilq.converter.options import ConvertOptions
from rilq.errors import Interrupted
from rilq.formats.checkpoint import Checkpoint
from rilq.formats.source import LocalFolder
from rilq.progress import SilentReporter

KILLED = -signal.SIGKILL
STOPPED = 75


class Unbroken(NamedTuple):
    """A conversion that was never stopped: its commit points in order, and its files' sha256."""

    points: list[str]
    files: dict[str, str]

    def nth(self, point: str, count: int = 1) -> int:
        """Number of the commit point where `point` comes for the `count`-th time."""
        return [i for i, name in enumerate(self.points, start=1) if name == point][count - 1]


@pytest.fixture(scope="module")
def runs() -> dict[Any, Any]:
    """What tests of this file share, made by the first one that needs it."""
    return {}


@pytest.fixture
def unbroken(
    runs: dict[Any, Any],
    tmp_path_factory: pytest.TempPathFactory,
    in_child: Any,
    quick: Any,
    hashes: Any,
) -> Unbroken:
    """The default (blockap, adapters and scales) conversion of `quick`, run once."""
    if "unbroken" not in runs:
        folder = tmp_path_factory.mktemp("unbroken")
        ended = in_child(lambda: record(quick(folder), folder / "points"))
        assert ended.code == 0, ended.err
        points = (folder / "points").read_text().split("\n")[:-1]
        runs["quality"] = json.loads((folder / "out" / "rilq.json").read_text())["quality"]
        runs["unbroken"] = Unbroken(points, hashes(folder / "out"))
    whole: Unbroken = runs["unbroken"]
    return whole


def record(options: ConvertOptions, to: Path) -> None:
    """Convert, writing the name of every commit point to a file."""
    with to.open("w") as file:
        workdir.reached = lambda point: print(point, file=file)
        run_quietly(options)


def run_quietly(options: ConvertOptions) -> None:
    """Convert in this process; only ever called in a child."""
    pipeline.convert(pipeline.prepare(options, SilentReporter()), SilentReporter())


@pytest.fixture
def stopped(
    runs: dict[Any, Any],
    tmp_path_factory: pytest.TempPathFactory,
    convert: Any,
    quick: Any,
    unbroken: Unbroken,
) -> Callable[[str, int], Path]:
    """`stopped(point, count)`: the work folder of a conversion killed there; to be copied."""

    def make(point: str, count: int = 1) -> Path:
        if (point, count) not in runs:
            folder = tmp_path_factory.mktemp("stopped")
            ended = convert(quick(folder), at=unbroken.nth(point, count))
            assert ended.code == KILLED, ended.err
            runs[point, count] = folder / "out.rilq-work"
        work: Path = runs[point, count]
        return work

    return make


def check_whole(folder: Path, unbroken: Unbroken, hashes: Any) -> None:
    """The output is that of an unbroken run, and nothing else is left in `folder`."""
    assert hashes(folder / "out") == unbroken.files
    assert sorted(path.name for path in folder.iterdir()) == ["out"]


# -- kills -----------------------------------------------------------------------------------------


def test_two_unbroken_runs_give_the_same_bytes(
    tmp_path: Path, convert: Any, quick: Any, hashes: Any, unbroken: Unbroken
) -> None:
    assert convert(quick(tmp_path)).code == 0
    check_whole(tmp_path, unbroken, hashes)


def test_the_compared_output_depends_on_training(runs: dict[Any, Any], unbroken: Unbroken) -> None:
    assert runs["quality"]["best_step"] == 4


def test_every_stage_has_commit_points(unbroken: Unbroken) -> None:
    stages = [point.partition(":")[0] for point in unbroken.points]
    assert list(dict.fromkeys(stages)) == [
        "job", "rows", "outer", "layers", "train", "trained", "shards", "publish", "remove"
    ]  # fmt: skip
    # Embedding, two decoder layers, targets; step 0 and two validations; three shards.
    counts = {stage: unbroken.points.count(f"{stage}:committed") for stage in stages}
    assert (counts["layers"], counts["train"], counts["shards"]) == (4, 3, 3)


def test_killed_at_every_commit_point_it_finishes_with_the_same_bytes(
    tmp_path: Path, convert: Any, quick: Any, hashes: Any, unbroken: Unbroken
) -> None:
    wrong = []
    for number, point in enumerate(unbroken.points, start=1):
        folder = tmp_path / str(number)
        try:
            assert convert(quick(folder), at=number).code == KILLED
            # Nothing carries the output's name before all of it is there.
            assert (folder / "out").exists() == (number >= unbroken.nth("publish:after"))
            ended = convert(quick(folder))
            # A warning would say that a stage had to start again.
            assert ended.code == 0 and "warning" not in ended.err, ended.err
            check_whole(folder, unbroken, hashes)
        except AssertionError as err:
            wrong.append(f"{point} ({number}): {err}")
    assert not wrong


@pytest.mark.parametrize(
    "changes",
    [
        {"quantizer": "lwc", "train": "scales"},
        {"quantizer": "signround", "train": "all"},
        {"quantizer": "blockap", "train": "all+codes", "layer_steps": 20},
        {"quantizer": "hqq", "adapter": "lora", "rank": 4, "loss": "mse+ce"},
        {"quantizer": "gptq", "target": "pre-norm", "loss": "mse", "schedule": "constant"},
        {"quantizer": "lsq", "zero_point": "integer", "keep_adapter": True},
    ],
    ids=lambda changes: f"{changes['quantizer']}-{changes.get('train', 'default')}",
)
def test_killed_in_a_layer_and_in_training_every_way_finishes_with_the_same_bytes(
    changes: dict[str, Any],
    tmp_path: Path,
    convert: Any,
    quick: Any,
    hashes: Any,
    unbroken: Unbroken,
) -> None:
    ended = convert(quick(tmp_path / "unbroken", **changes))
    assert ended.code == 0, ended.err
    options = quick(tmp_path / "killed", **changes)
    # Before the second layer and then the second training checkpoint is committed.
    first, second = unbroken.nth("layers:written", 3), unbroken.nth("train:written", 2)
    assert convert(options, at=first).code == KILLED
    assert convert(options, at=second - first + 1).code == KILLED
    ended = convert(options)
    assert ended.code == 0 and "continuing after 'step 0'" in ended.err, ended.err
    assert hashes(tmp_path / "killed" / "out") == hashes(tmp_path / "unbroken" / "out")


@pytest.mark.slow
def test_killed_twice_in_a_row_it_finishes_with_the_same_bytes(
    tmp_path: Path, convert: Any, quick: Any, hashes: Any, unbroken: Unbroken
) -> None:
    draw = random.Random(0)
    for number in range(8):
        first = draw.randrange(1, len(unbroken.points) - 2)
        second = draw.randrange(1, 8)  # commit points after the resume
        options = quick(tmp_path / str(number))
        assert convert(options, at=first).code == KILLED
        assert convert(options, at=second).code in (KILLED, 0), (first, second)
        ended = convert(options)
        assert ended.code == 0, (first, second, ended.err)
        check_whole(tmp_path / str(number), unbroken, hashes)


def test_the_output_is_published_by_one_rename(
    tmp_path: Path, in_child: Any, quick: Any, unbroken: Unbroken
) -> None:
    def body() -> None:
        inodes = []

        def reached(point: str) -> None:
            if point.startswith("publish:"):
                [folder] = [p for p in tmp_path.iterdir() if p.name != "out.rilq-work"]
                inodes.append((folder.stat().st_ino, sorted(os.listdir(folder))))

        workdir.reached = reached
        run_quietly(quick(tmp_path))
        assert inodes[0] == inodes[1] and "rilq.json" in inodes[0][1]

    ended = in_child(body)
    assert ended.code == 0, ended.err


def test_a_rerun_redoes_at_most_one_unit(
    tmp_path: Path, convert: Any, quick: Any, unbroken: Unbroken
) -> None:
    number = unbroken.nth("layers:written", 3)  # the second decoder layer is not committed yet
    assert convert(quick(tmp_path), at=number).code == KILLED
    ended = convert(quick(tmp_path))
    assert "continuing after 'layer 0'" in ended.err


def wait_for_lines(journal: Path, count: int, process: "subprocess.Popen[str]") -> None:
    """Until the journal has `count` lines."""
    until = time.monotonic() + 120
    while not journal.is_file() or journal.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.002)


def test_the_real_command_stopped_and_killed_continues_to_the_same_bytes(
    tmp_path: Path, arguments: Any, hashes: Any, unbroken: Unbroken
) -> None:
    journal = tmp_path / "out.rilq-work" / "journal.jsonl"

    def start() -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "rilq", *arguments(tmp_path)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    with start() as process:
        wait_for_lines(journal, 4, process)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (STOPPED, ""), err
    assert "same command again to continue" in err.splitlines()[-1] and "Traceback" not in err
    with start() as process:
        wait_for_lines(journal, 9, process)
        process.kill()
    assert process.returncode == KILLED
    with start() as process:
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (0, ""), err
    check_whole(tmp_path, unbroken, hashes)


# -- signals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_stops_with_one_line_and_exit_code_75_and_the_same_command_continues(
    name: str,
    tmp_path: Path,
    run_cli: Any,
    arguments: Any,
    hashes: Any,
    unbroken: Unbroken,
) -> None:
    number = unbroken.nth("train:written", 2)

    def signal_in_training() -> None:
        signal.signal(getattr(signal, name), signal.SIG_DFL)  # nohup has tests ignore SIGHUP
        points = iter(range(1, 1000))

        def reached(point: str) -> None:
            if next(points) == number:
                os.kill(os.getpid(), getattr(signal, name))

        workdir.reached = reached

    ended = run_cli(*arguments(tmp_path, "--quiet"), first=signal_in_training)
    work = tmp_path / "out.rilq-work"
    line = f"rilq: stopped by {name}; state is in {work}: run the same command again to continue\n"
    assert (ended.code, ended.out, ended.err) == (STOPPED, "", line)
    assert run_cli(*arguments(tmp_path)).code == 0
    check_whole(tmp_path, unbroken, hashes)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_second_signal_ends_the_process_at_once(name: str, in_child: Any) -> None:
    number = getattr(signal, name)

    def body() -> None:
        with stoppable("nothing was kept"):
            with suppress(Interrupted):
                os.kill(os.getpid(), number)
                time.sleep(10)
            os.kill(os.getpid(), number)  # while the first is still being answered
            time.sleep(10)

    assert in_child(body).code == -number  # 130 and 143 in a shell


def test_a_stop_that_a_library_turns_into_an_error_is_still_a_stop(in_child: Any) -> None:
    def body() -> None:
        with pytest.raises(Interrupted, match="SIGTERM"), stoppable("nothing was kept"):
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(10)
            except Interrupted:
                raise ValueError("could not determine the shape of object type") from None

    assert in_child(body).code == 0


def test_a_hangup_that_nohup_ignores_stays_ignored(in_child: Any) -> None:
    def body() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with stoppable("nothing was kept"):
            os.kill(os.getpid(), signal.SIGHUP)

    assert in_child(body).code == 0


# -- reruns ----------------------------------------------------------------------------------------


def test_a_rerun_after_success_says_so_and_changes_nothing(
    tmp_path: Path, run_cli: Any, arguments: Any, hashes: Any
) -> None:
    assert run_cli(*arguments(tmp_path)).code == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    ended = run_cli(*arguments(tmp_path))
    assert ended.code == 0 and "already converted by this command" in ended.err
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_keep_work_keeps_the_work_folder(tmp_path: Path, convert: Any, quick: Any) -> None:
    assert convert(quick(tmp_path, keep_work=True, quantizer="rtn", rank=0)).code == 0
    assert (tmp_path / "out.rilq-work" / "layer-0001.safetensors").is_file()


def test_resume_never_begins_anew(
    stopped: Any, tmp_path: Path, convert: Any, quick: Any, hashes: Any, unbroken: Unbroken
) -> None:
    work = shutil.copytree(stopped("train:cleaned", 2), tmp_path / "work")
    ended = convert(quick(tmp_path, work_dir=work, resume="never"))
    assert ended.code == 0 and "continuing" not in ended.err
    check_whole(tmp_path, unbroken, hashes)


def test_resume_required_refuses_a_new_job(tmp_path: Path, convert: Any, quick: Any) -> None:
    ended = convert(quick(tmp_path, resume="required"))
    assert ended.code == 2 and "nothing to resume" in ended.err


def test_resume_required_continues_in_a_moved_work_folder(
    stopped: Any, tmp_path: Path, convert: Any, quick: Any, hashes: Any, unbroken: Unbroken
) -> None:
    work = shutil.copytree(stopped("train:cleaned", 2), tmp_path / "elsewhere")
    ended = convert(quick(tmp_path, work_dir=work, resume="required"))
    assert ended.code == 0 and "continuing after 'step 2'" in ended.err
    check_whole(tmp_path, unbroken, hashes)


def test_another_output_folder_gets_every_shard(
    tmp_path: Path, convert: Any, quick: Any, hashes: Any, unbroken: Unbroken
) -> None:
    options = quick(tmp_path, work_dir=tmp_path / "work", output_dir=tmp_path / "first")
    assert convert(options, at=unbroken.nth("shards:cleaned", 2)).code == KILLED
    assert convert(quick(tmp_path, work_dir=tmp_path / "work")).code == 0
    check_whole(tmp_path, unbroken, hashes)


# -- damage ----------------------------------------------------------------------------------------


def flip_middle_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "deleted": Path.unlink,
    "emptied": lambda path: path.write_bytes(b""),
    "cut": lambda path: os.truncate(path, path.stat().st_size * 2 // 3),
    "one bit flipped": flip_middle_byte,
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}
STREAMING = ("layers:cleaned", 2)
TRAINING = ("train:cleaned", 2)
STATE = {
    STREAMING: [
        "layer-0000.safetensors", "outer.safetensors", "rows.safetensors", "student-0001.bin",
        "teacher-0001.bin",
    ],
    TRAINING: [
        "layer-0000.safetensors", "layer-0001.safetensors", "outer.safetensors",
        "rows.safetensors", "targets.bin", "train-000002.safetensors",
    ],
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("stage", [STREAMING, TRAINING], ids=lambda stage: stage[0])
def test_a_damaged_state_file_is_named_and_made_again(
    stage: tuple[str, int],
    damage: str,
    tmp_path: Path,
    stopped: Any,
    convert: Any,
    quick: Any,
    hashes: Any,
    unbroken: Unbroken,
) -> None:
    source = stopped(*stage)
    assert sorted(p.name for p in source.iterdir()) == sorted(
        ["journal.jsonl", "rilq.lock", *STATE[stage]]
    )
    for name in STATE[stage]:
        folder = tmp_path / name
        work = shutil.copytree(source, folder / "work")
        DAMAGES[damage](work / name)
        ended = convert(quick(folder, work_dir=work))
        assert ended.code == 0, (name, ended.err)
        assert f"warning: {work / name}: missing or damaged" in ended.err
        check_whole(folder, unbroken, hashes)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_journal_is_trusted_only_as_far_as_it_is_whole(
    damage: str,
    tmp_path: Path,
    stopped: Any,
    convert: Any,
    quick: Any,
    hashes: Any,
    unbroken: Unbroken,
) -> None:
    work = shutil.copytree(stopped(*TRAINING), tmp_path / "work")
    journal = work / "journal.jsonl"
    DAMAGES[damage](journal)
    said = journal.is_file() and journal.stat().st_size > 0
    ended = convert(quick(tmp_path, work_dir=work))
    assert ended.code == 0, ended.err
    assert (f"warning: {journal}: torn or damaged" in ended.err) == said
    check_whole(tmp_path, unbroken, hashes)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_lock_file_is_no_obstacle(
    damage: str,
    tmp_path: Path,
    stopped: Any,
    convert: Any,
    quick: Any,
    hashes: Any,
    unbroken: Unbroken,
) -> None:
    work = shutil.copytree(stopped(*TRAINING), tmp_path / "work")
    DAMAGES[damage](work / "rilq.lock")
    ended = convert(quick(tmp_path, work_dir=work))
    assert ended.code == 0 and "continuing after 'step 2'" in ended.err
    check_whole(tmp_path, unbroken, hashes)


def test_swapped_state_files_are_found(
    tmp_path: Path,
    stopped: Any,
    convert: Any,
    quick: Any,
    hashes: Any,
    unbroken: Unbroken,
) -> None:
    work = shutil.copytree(stopped(*TRAINING), tmp_path / "work")
    one, two = work / "layer-0000.safetensors", work / "layer-0001.safetensors"
    one.rename(work / "aside")
    two.rename(one)
    (work / "aside").rename(two)
    ended = convert(quick(tmp_path, work_dir=work))
    assert ended.code == 0 and f"{one}: missing or damaged" in ended.err
    check_whole(tmp_path, unbroken, hashes)


@pytest.mark.parametrize("damage", ["deleted", "one bit flipped"])
def test_a_damaged_staged_shard_is_written_again(
    damage: str, tmp_path: Path, convert: Any, quick: Any, hashes: Any, unbroken: Unbroken
) -> None:
    assert convert(quick(tmp_path), at=unbroken.nth("shards:cleaned", 2)).code == KILLED
    [shard] = tmp_path.glob(".out.*.staging/model-00001-of-00003.safetensors")
    DAMAGES[damage](shard)
    ended = convert(quick(tmp_path))
    assert ended.code == 0 and f"warning: {shard}: missing or damaged" in ended.err
    check_whole(tmp_path, unbroken, hashes)


def test_a_deleted_work_folder_leaves_no_staging_folder_behind(
    tmp_path: Path, convert: Any, quick: Any, hashes: Any, unbroken: Unbroken
) -> None:
    assert convert(quick(tmp_path), at=unbroken.nth("shards:cleaned", 2)).code == KILLED
    shutil.rmtree(tmp_path / "out.rilq-work")
    assert convert(quick(tmp_path)).code == 0
    check_whole(tmp_path, unbroken, hashes)


# -- another job -----------------------------------------------------------------------------------

CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "bits": ({"bits": 4}, "--bits: 2 there, 4 now"),
    "group size": ({"group_size": 64}, "--group-size: 32 there, 64 now"),
    "quantizer": ({"quantizer": "rtn"}, "--quantizer: 'blockap' there, 'rtn' now"),
    "clip": ({"clip": "none"}, "--clip: None there, 'none' now"),
    "zero-point": ({"zero_point": "integer"}, "--zero-point: 'real' there, 'integer' now"),
    "skip": ({"skip": ("o_proj",)}, "--skip: [] there, ['o_proj'] now"),
    "embedding": ({"embed_bits": 8}, "--embed-bits: 16 there, 8 now"),
    "head": ({"head_bits": 4}, "--head-bits: 16 there, 4 now"),
    "bits for": ({"bits_for": (("o_proj", 4),)}, "--bits-for: {} there, {'o_proj': 4} now"),
    "average bits": ({"avg_bits": 2.5}, "--avg-bits: None there, 2.5 now"),
    "rotate": ({"rotate": True}, "--rotate: False there, True now"),
    "rows": ({"rows": "documents"}, "--rows: 'packed' there, 'documents' now"),
    "nsamples": ({"nsamples": 9}, "--nsamples: 12 there, 9 now"),
    "seqlen": ({"seqlen": 15}, "--seqlen: 32 there, 15 now"),
    "val-ratio": ({"val_ratio": 0.3}, "--val-ratio: 0.2 there, 0.3 now"),
    "seed": ({"seed": 43}, "--seed: 42 there, 43 now"),
    "rank": ({"rank": 5}, "--rank: 16 there, 5 now"),
    "alpha": ({"alpha": 8.0}, "--alpha: 16.0 there, 8.0 now"),
    "adapter": ({"adapter": "lora"}, "--adapter: 'pooled' there, 'lora' now"),
    "adapter-init": (
        {"adapter_init": "eora", "quantizer": "gptq"},
        "--adapter-init: 'zero' there, 'eora' now",
    ),
    "keep adapter": (
        {"keep_adapter": True, "zero_point": "integer"},
        "--keep-adapter: False there, True now\n  --zero-point: 'real' there, 'integer' now",
    ),
    "recipe": ({"recipe": "fast"}, "--recipe: 'default' there, 'fast' now"),
    "layer steps": ({"layer_steps": 4}, "--layer-steps: 3 there, 4 now"),
    "train": ({"train": "all"}, "--train: None there, 'all' now"),
    "loss": ({"loss": "mse+ce"}, "--loss: 'kl' there, 'mse+ce' now"),
    "target": (
        {"loss": "mse", "target": "pre-norm"},
        "--target: 'post-norm' there, 'pre-norm' now",
    ),
    "schedule": ({"schedule": "constant"}, "--schedule: 'decay' there, 'constant' now"),
    "lr": ({"learning_rate": 0.5}, "--lr: 0.001 there, 0.5 now"),
    "scales lr": ({"scales_learning_rate": 0.5}, "--scales-lr: None there, 0.5 now"),
    "steps": ({"steps": 5}, "--steps: 4 there, 5 now"),
    "batch size": ({"batch_size": 4}, "--batch-size: 8 there, 4 now"),
    "val-every": ({"val_every": 1}, "--val-every: 2 there, 1 now"),
    "patience": ({"patience": 6}, "--patience: 5 there, 6 now"),
    "dtype": ({"dtype": "bfloat16"}, "--dtype: 'float32' there, 'bfloat16' now"),
    "student": ({"student": "packed"}, "--student: 'auto' there, 'packed' now"),
    "shard size": ({"max_shard_size": "50kB"}, "--max-shard-size: '40kB' there, '50kB' now"),
    "two at once": ({"seed": 1, "rank": 0}, "--rank: 16 there, 0 now\n  --seed: 42 there, 1 now"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_options_are_refused_with_old_and_new(
    change: str, stopped: Any, convert: Any, quick: Any, hashes: Any
) -> None:
    work = stopped("rows:cleaned", 1)
    before = hashes(work)
    changed, expected = CHANGES[change]
    ended = convert(quick(work.parent, work_dir=work, **changed))
    assert ended.code == 2 and "Traceback" not in ended.err
    assert f"{work}: belongs to another job:\n  " in ended.err and f"  {expected}\n" in ended.err
    assert hashes(work) | {"rilq.lock": ""} == before | {"rilq.lock": ""}


def test_options_without_effect_on_the_result_may_change(
    tmp_path: Path, stopped: Any, convert: Any, quick: Any, hashes: Any, unbroken: Unbroken
) -> None:
    work = shutil.copytree(stopped(*TRAINING), tmp_path / "work")
    ended = convert(quick(tmp_path, work_dir=work, dtype="float32", keep_work=True))
    assert ended.code == 0, ended.err
    assert hashes(tmp_path / "out") == unbroken.files


def change_byte(checkpoint: Path, tensor: str) -> str:
    """Change one bit of a tensor, keep size and time of its shard; the shard's name."""
    opened = Checkpoint.open(LocalFolder(checkpoint))
    name = opened.shard_of[tensor]
    path, header = checkpoint / name, opened.headers[name]
    stat = path.stat()
    content = bytearray(path.read_bytes())
    content[header.tensors[tensor].begin] ^= 1  # the lowest bit of a float32: still a number
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size and path.stat().st_mtime_ns == stat.st_mtime_ns
    return name


@pytest.mark.parametrize(
    "tensor",
    ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"],
    ids=["read already", "not read yet"],
)
def test_a_source_with_one_changed_bit_is_refused_by_name(
    tensor: str,
    tmp_path: Path,
    tiny_llama: Path,
    convert: Any,
    quick: Any,
    hashes: Any,
    unbroken: Unbroken,
) -> None:
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    options = quick(tmp_path, model=str(model))
    assert convert(options, at=unbroken.nth(*STREAMING)).code == KILLED
    shard = change_byte(model, tensor)
    before = hashes(model)
    ended = convert(options)
    assert ended.code == 2 and f"{model}/{shard}: the source changed since" in ended.err
    assert tensor.rpartition(".mlp")[0] in ended.err and "Traceback" not in ended.err
    assert hashes(model) == before and not (tmp_path / "out").exists()


def test_the_source_under_another_name_is_the_same_source(
    tmp_path: Path, tiny_llama: Path, stopped: Any, convert: Any, quick: Any
) -> None:
    work = shutil.copytree(stopped(*TRAINING), tmp_path / "work")
    (tmp_path / "link").symlink_to(tiny_llama)
    assert convert(quick(tmp_path, work_dir=work, model=str(tmp_path / "link"))).code == 0


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "generation_config.json"])
def test_a_changed_file_beside_the_weights_is_refused_by_name(
    name: str, tmp_path: Path, tiny_llama: Path, stopped: Any, convert: Any, quick: Any
) -> None:
    work = shutil.copytree(stopped(*TRAINING), tmp_path / "work")
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    (model / name).write_text((model / name).read_text() + "\n")
    ended = convert(quick(tmp_path, work_dir=work, model=str(model)))
    assert ended.code == 2 and f"source file {name}: " in ended.err


def test_a_changed_calibration_text_is_refused(
    tmp_path: Path, calib: Path, stopped: Any, convert: Any, quick: Any
) -> None:
    work = shutil.copytree(stopped(*TRAINING), tmp_path / "work")
    text = tmp_path / "calib.txt"
    text.write_text(calib.read_text() + "x")
    ended = convert(quick(tmp_path, work_dir=work, dataset=(str(text),)))
    assert ended.code == 2 and "--dataset: ['calib.txt@xxh3:" in ended.err


def edit_job_line(work: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the journal's first line with a checksum that fits."""
    first, *others = (work / "journal.jsonl").read_text().splitlines(keepends=True)
    job = json.loads(json.loads(first)["line"])
    edit(job)
    body = json.dumps(job, sort_keys=True)
    line = json.dumps({"line": body, "sum": xxhash.xxh3_128_hexdigest(body.encode())})
    (work / "journal.jsonl").write_text("".join([line + "\n", *others]))


def test_another_version_of_a_library_is_refused_with_both_versions(
    tmp_path: Path, stopped: Any, convert: Any, quick: Any
) -> None:
    work = shutil.copytree(stopped(*TRAINING), tmp_path / "work")
    edit_job_line(work, lambda job: job["fingerprint"].update({"version of torch": "1.0"}))
    ended = convert(quick(tmp_path, work_dir=work))
    assert ended.code == 2 and "version of torch: '1.0' there, '" in ended.err


def test_a_state_from_the_future_is_refused(
    tmp_path: Path, stopped: Any, convert: Any, quick: Any
) -> None:
    work = shutil.copytree(stopped(*TRAINING), tmp_path / "work")
    edit_job_line(work, lambda job: job.update(state_format=99))
    ended = convert(quick(tmp_path, work_dir=work))
    assert ended.code == 2 and "state format 99, this one reads 2" in ended.err


# -- two runs --------------------------------------------------------------------------------------


def test_a_second_run_stops_at_once_and_says_who_holds_the_folder(
    tmp_path: Path,
    start_child: Any,
    convert: Any,
    quick: Any,
    hashes: Any,
    unbroken: Unbroken,
) -> None:
    here, go = tmp_path.parent / "here", tmp_path.parent / "go"

    def wait_in_training() -> None:
        def reached(point: str) -> None:
            if point == "train:written" and not here.exists():
                here.touch()
                while not go.exists():
                    time.sleep(0.01)

        workdir.reached = reached
        run_quietly(quick(tmp_path))

    first = start_child(wait_in_training)
    while not here.exists():
        time.sleep(0.01)
    second = convert(quick(tmp_path))
    go.touch()
    assert second.code == 2
    holder = f"in use by pid {first.pid} on host {socket.gethostname()} since 20"
    assert f"{tmp_path / 'out.rilq-work'}: {holder}" in second.err
    assert first.wait().code == 0
    check_whole(tmp_path, unbroken, hashes)
