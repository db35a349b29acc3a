"""The batch file: what it means, and every mistake in it on one screen."""

from collections.abc import Callable
from pathlib import Path

import pytest

from rilq.batch.jobs import BatchJob, read_jobs, select
from rilq.cli.batch import convert_command
from rilq.errors import InputError, OptionError

Read = Callable[[str], list[BatchJob]]


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Read:
    """A function that reads the jobs of a text."""
    monkeypatch.chdir(tmp_path)

    def jobs(text: str) -> list[BatchJob]:
        (tmp_path / "jobs.yaml").write_text(text)
        return read_jobs(Path("jobs.yaml"), convert_command())

    return jobs


def mistakes(read: Read, text: str) -> str:
    with pytest.raises(InputError) as refused:
        read(text)
    return str(refused.value)


def test_matrix_gives_every_combination_a_name_and_a_folder_of_its_own(read: Read) -> None:
    jobs = read("""
        defaults: {dataset: [a.txt, b.txt], steps: 9, lr: 1e-4, output-dir: "out/{name}"}
        jobs:
          - model: org/small
            matrix: {bits: [2, 3], rank: [8, 16]}
          - {name: other, model: org/large, matrix: {train: [scales, all]}, steps: null}
    """)
    assert [job.name for job in jobs] == [
        "small-bits2-rank8", "small-bits2-rank16", "small-bits3-rank8", "small-bits3-rank16",
        "other-trainscales", "other-trainall",
    ]  # fmt: skip
    assert {(job.options.bits, job.options.rank) for job in jobs[:4]} == {
        (2, 8), (2, 16), (3, 8), (3, 16),
    }  # fmt: skip
    first, last = jobs[0].options, jobs[-1].options
    assert first.dataset == ("a.txt", "b.txt") and first.learning_rate == 1e-4
    assert first.output_dir == Path("out/small-bits2-rank8")
    assert (first.steps, last.steps, last.train) == (9, 200, "all")
    assert len({job.key for job in jobs}) == len(jobs)


def test_models_can_be_a_matrix_and_every_kind_of_value_reaches_the_command(read: Read) -> None:
    jobs = read("""
        jobs:
          - matrix: {model: [org/one, org/two]}
            rotate: true
            keep-work: true
            group_size: 32
            bits-for: {down_proj: 4, "mlp.*": 3}
            skip: [lm_head]
          - {name: third, model: --help, keep-work: false}
    """)
    assert [job.name for job in jobs] == ["one", "two", "third"]
    options = jobs[1].options
    assert options.model == "org/two" and options.rotate and options.keep_work
    assert options.group_size == 32 and options.skip == ("lm_head",)
    assert options.bits_for == (("down_proj", 4), ("mlp.*", 3))
    assert jobs[2].options.model == "--help" and not jobs[2].options.keep_work


def test_all_mistakes_of_all_jobs_are_told_at_once(read: Read) -> None:
    told = mistakes(
        read,
        """
        defaults: {dataset: a.txt, name: x}
        more: 1
        jobs:
          - {model: org/a, matrix: {bits: [2, 5], group-size: [48]}}
          - {name: b, model: org/b, bist: 2, rank: many, rotate: 7, train: [all], json: true}
          - {name: c, model: org/c, val-ratio: 3, rank: -1}
          - {name: d, bits: 2}
          - 7
          - {name: e, model: org/e, matrix: {bits: 2}}
        """,
    )
    for line in (
        "the file: more: expected defaults and jobs",
        "defaults: name: belongs to a job",
        "a-bits5-group-size48: --bits 5: expected one of 2, 3, 4, 8",
        "--group-size 48: expected one of 32, 64, 128",
        "b: bist: no option of rilq convert; did you mean bits?",
        "Invalid value for '--rank'",
        "b: rotate: expected true or false",
        "b: train: expected one value",
        "b: json: no option of rilq convert",
        "c: --val-ratio 3.0: expected between 0 and 1",
        "--rank -1: expected 0 (no adapters) or more",
        "job 4: model: expected a folder, or owner/name",
        "job 5: expected a mapping of options",
        "job 6: matrix: expected a list of values",
    ):
        assert line in told, line


def test_one_mistake_of_many_jobs_is_one_line(read: Read) -> None:
    told = mistakes(read, "jobs: [{model: m, step: 3, matrix: {rank: [1, 2, 3, 4, 5]}}]")
    assert told.count("did you mean") == 1 and "m-rank3 and 2 more: step" in told


def test_two_jobs_cannot_share_a_name_or_a_folder(read: Read) -> None:
    assert "a: the name of two jobs" in mistakes(read, "jobs: [{model: a}, {model: b/a}]")
    told = mistakes(
        read,
        "jobs: [{model: a, output-dir: x}, {model: b, output-dir: x/y}, "
        "{model: c, output-dir: z, work-dir: x}]",
    )
    assert "b: writes to" in told and "c: writes to" in told and "{name}" in told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("jobs: [", "is not valid YAML: line 1"),
        ("jobs: [{model: a, bits: 2, bits: 3}]", "bits comes twice"),
        ("- a", "expected a mapping with defaults and jobs"),
        ("jobs: []", "expected a list with one mapping for each job"),
        ("jobs: [{model: !!python/object/apply:os.getcwd []}]", "is not valid YAML"),
        ('jobs: [{model: a, dataset: "\\e[2J"}]', "cannot be printed"),
        ("\x00", "is not valid YAML"),
    ],
)
def test_what_is_no_batch_file_is_refused(read: Read, text: str, told: str) -> None:
    assert told in mistakes(read, text)


def test_missing_file_is_named(read: Read, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none.yaml: cannot be read"):
        read_jobs(tmp_path / "none.yaml", convert_command())


def test_only_selects_by_shell_patterns(read: Read) -> None:
    jobs = read("jobs: [{model: m, matrix: {bits: [2, 3], rank: [8, 16]}}]")
    assert [job.name for job in select(jobs, ["*rank8", "*bits2-rank16"])] == [
        "m-bits2-rank8", "m-bits2-rank16", "m-bits3-rank8",
    ]  # fmt: skip
    assert select(jobs, []) == jobs
    with pytest.raises(OptionError, match="--only x: fits no job; there are m-bits2-rank8"):
        select(jobs, ["*", "x"])
