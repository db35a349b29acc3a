"""`rilq batch`: real jobs in real processes; one that fails, reruns, stops, and the examples."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import yaml

from rilq.batch.jobs import read_jobs
from rilq.batch.outlook import _outlook
from rilq.cli.batch import convert_command
from rilq.converter.journal import hold_lock, read_lines
from rilq.errors import InputError, RilqError, WorkDirError

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = {
    "quantizer": "rtn", "group-size": 32, "nsamples": 12, "seqlen": 32, "steps": 4,
    "batch-size": 8, "val-every": 2, "device": "cpu", "output-dir": "out/{name}",
}  # fmt: skip
Run = Callable[..., Any]


Batch: TypeAlias = "subprocess.Popen[str]"


@contextmanager
def started(*arguments: object) -> Iterator[Batch]:
    """The command in a process and a process group of its own, from another folder."""
    with subprocess.Popen(
        [sys.executable, "-m", "rilq", "batch", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def run(*arguments: object) -> tuple[int, str, str]:
    with started(*arguments) as process:
        out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@pytest.fixture
def write(tmp_path: Path, tiny_llama: Path, calib: Path) -> Callable[..., Path]:
    """`write(job, ...)`: a batch file of tiny jobs in a folder of its own."""

    def make(*jobs: dict[str, Any], **defaults: Any) -> Path:
        tiny = {**TINY, "report": False, "model": str(tiny_llama), "dataset": str(calib)}
        content = {
            "defaults": {**tiny, **defaults},
            "jobs": [*jobs],
        }
        file = tmp_path / "jobs.yaml"
        file.write_text(yaml.safe_dump(content))
        return file

    return make


def ended(file: Path) -> list[tuple[str, int]]:
    """Name and exit code of every job that ended, in order."""
    lines, _ = read_lines(file.with_name("jobs.rilq-batch"))
    return [(line["job"], line["exit_code"]) for line in lines]


@pytest.mark.slow
def test_failed_job_stops_no_other_and_a_rerun_does_only_what_was_fixed(
    write: Callable[..., Path], calib: Path, tmp_path: Path
) -> None:
    file = write({"name": "short", "dataset": "short.txt"}, {"name": "good"})
    (tmp_path / "short.txt").write_text("Too short.")
    code, out, err = run(file)
    assert code == 1 and ended(file) == [("short", 2), ("good", 0)]
    assert "rilq: short: exit 2: short.txt: has " in err and "Traceback" not in err
    assert "short: running" in err and "good: done after" in err and "failed" in out
    assert "needs 384" in (tmp_path / "jobs.rilq-batch" / "logs" / "short.log").read_text()
    assert (tmp_path / "out" / "good" / "rilq.json").is_file()

    shutil.copy(calib, tmp_path / "short.txt")
    code, out, err = run(file, "--json", "--retry-failed")
    assert code == 0 and ended(file)[2:] == [("short", 0)]
    (job,) = json.loads(out)["jobs"]
    assert job["state"] == "done" and Path(job["output"]) == tmp_path / "out" / "short"


def test_mistake_in_any_job_starts_none(
    write: Callable[..., Path], run_cli: Run, tmp_path: Path
) -> None:
    file = write({"name": "a"}, {"name": "b", "bits": 5}, {"name": "c", "rnak": 3})
    refused = run_cli("batch", file)
    assert refused.code == 2 and "Traceback" not in refused.err
    assert "b: --bits 5: expected one of" in refused.err
    assert "c: rnak: no option of rilq convert; did you mean rank?" in refused.err
    assert [path.name for path in tmp_path.iterdir()] == ["jobs.yaml"]


def test_dry_run_gives_the_merged_plan_and_touches_nothing(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    file = write({"name": "small", "matrix": {"rank": [2, 4]}}, {"name": "left"})
    code, out, err = run(file, "--dry-run", "--json", "--only", "small*", "--max-parallel", 2)
    assert code == 0, err
    plan = json.loads(out)
    assert list(plan["jobs"]) == ["small-rank2", "small-rank4"] and plan["seconds"] > 0
    outlooks = plan["jobs"].values()
    assert plan["host_bytes"] == sum(each["host_bytes"] for each in outlooks)
    needs = [need["needed"] for each in outlooks for need in each["needs"]]
    assert len(needs) == 4 and sum(v["needed"] for v in plan["volumes"]) == sum(needs)
    assert [path.name for path in tmp_path.iterdir()] == ["jobs.yaml"]


def test_second_batch_on_one_state_is_refused(
    write: Callable[..., Path], run_cli: Run, tmp_path: Path
) -> None:
    file = write({"name": "a"})
    (tmp_path / "state").mkdir()
    with hold_lock(tmp_path / "state", "--state-dir"):
        refused = run_cli("batch", file, "--state-dir", tmp_path / "state")
    assert refused.code == 2
    assert f"in use by pid {os.getpid()}" in refused.err and "--state-dir" in refused.err


def test_outlook_tells_done_from_changed_damaged_and_impossible(
    write: Callable[..., Path],
    run_cli: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)

    def outlook(**options: Any) -> str:
        (job,) = read_jobs(write({"name": "a", **options}), convert_command())
        return _outlook(job.options).progress

    (job,) = read_jobs(write({"name": "a"}), convert_command())
    assert outlook() == "new"
    assert run_cli("convert", *job.arguments, first=lambda: os.chdir(tmp_path)).code == 0
    assert outlook() == "done"
    with pytest.raises(InputError, match="out/a: the output folder is not empty"):
        outlook(bits=3)
    assert outlook(**{"output-dir": "out/b", "bits": 3}) == "new"
    with pytest.raises(InputError, match="none.txt"):
        outlook(dataset="none.txt")
    with pytest.raises(InputError, match="--device cuda:99: cannot be used"):
        outlook(device="cuda:99", **{"output-dir": "out/c"})
    shard = next((tmp_path / "out" / "a").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(RilqError, match="out/a: finished, but damaged since: model.safetensors: "):
        outlook()


def test_examples_are_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documented = (EXAMPLES.parent / "docs" / "batch.md").read_text()
    (tmp_path / "jobs.yaml").write_text(documented.split("```yaml")[1].split("```")[0])
    names = [job.name for job in read_jobs(tmp_path / "jobs.yaml", convert_command())]
    assert names[0] == "Llama-3.2-1B-bits2-rank8" and names[4:] == ["best"]
    monkeypatch.chdir(EXAMPLES)
    jobs = read_jobs(Path("batch.yaml"), convert_command())
    assert len({(job.options.bits, job.options.rank) for job in jobs}) == 4
    assert all(Path(job.options.model).is_dir() for job in jobs)
    workflow = yaml.safe_load(Path("github_actions.yml").read_text())
    steps = [step["run"] for step in workflow["jobs"]["batch"]["steps"] if "run" in step]
    assert any('rilq batch "$BATCH" --json' in step for step in steps)
    scripts = [*steps, *(Path(n).read_text() for n in ("loop.sh", "slurm_array.sh"))]
    for script in scripts:
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.slow
def test_example_batch_with_a_job_that_fails_is_finished_by_a_rerun(tmp_path: Path) -> None:
    content = yaml.safe_load((EXAMPLES / "batch.yaml").read_text())
    tiny = {k: v for k, v in TINY.items() if k not in ("output-dir", "group-size")}
    content["defaults"] |= {**tiny, "output-dir": "demo-out/{name}"}
    shutil.copytree(EXAMPLES / "demo", tmp_path / "demo")
    file = tmp_path / "jobs.yaml"
    file.write_text(yaml.safe_dump(content))
    names = [f"model-bits{bits}-rank{rank}" for bits in (2, 3) for rank in (8, 16)]
    busy = tmp_path / "demo-out" / f"{names[1]}.rilq-work"
    busy.mkdir(parents=True)
    with hold_lock(busy, "--work-dir"):  # another run has this job's work folder
        code, out, err = run(file, "--max-parallel", 2)
    assert code == 1, err
    assert f"rilq: {names[1]}: exit 2: " in err and "in use by pid" in err
    assert sorted(ended(file)) == [(name, 2 if name == names[1] else 0) for name in sorted(names)]
    code, out, err = run(file)
    assert code == 0 and ended(file)[4:] == [(names[1], 0)]
    assert err.count("skipped, done before") == 3
    for name in names:
        assert (tmp_path / "demo-out" / name / "rilq.json").is_file()
        assert (tmp_path / "demo-out" / f"{name}.report.html").is_file()


def wait_for(text: str, log: Path, process: Batch) -> None:
    deadline = time.monotonic() + 120
    while not log.is_file() or text not in log.read_text():
        assert process.poll() is None and time.monotonic() < deadline, log
        time.sleep(0.1)


def wait_until_free(state: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with suppress(WorkDirError), hold_lock(state, "--state-dir"):
            return
        time.sleep(0.1)
    raise AssertionError(f"{state} stays locked")


@pytest.mark.slow
def test_killed_and_stopped_batches_go_on_to_the_bytes_of_an_unbroken_job(
    write: Callable[..., Path], run_cli: Run, tmp_path: Path, hashes: Run
) -> None:
    file = write({"name": "a"}, {"name": "b"}, steps=500, **{"val-every": 10, "patience": 500})
    log = tmp_path / "jobs.rilq-batch" / "logs" / "a.log"
    with started(file) as process:
        wait_for("train: step", log, process)
        process.kill()
    # Its job hears of that, keeps its state, and only with its end is the batch's lock free.
    wait_until_free(file.with_name("jobs.rilq-batch"))
    assert "stopped by SIGTERM" in log.read_text() and ended(file) == []
    log.unlink()
    with started(file) as process:
        wait_for("train: step", log, process)
        assert "continuing after" in log.read_text()
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 75 and "run the same command again" in err
    assert ended(file) == [("a", 75)] and "Traceback" not in err + log.read_text()

    code, _, err = run(file, "--max-parallel", 2)
    assert code == 0, err
    jobs = dict(ended(file)[1:])
    assert jobs == {"a": 0, "b": 0}
    whole = hashes(tmp_path / "out" / "b")
    assert hashes(tmp_path / "out" / "a") == whole


@pytest.mark.slow
def test_shell_loop_goes_on_after_a_model_that_fails(
    tmp_path: Path, tiny_llama: Path, calib: Path
) -> None:
    (tmp_path / "rilq").write_text(f'#!/bin/sh\nexec {sys.executable} -m rilq "$@"\n')
    (tmp_path / "rilq").chmod(0o755)
    tiny = [f"--{key}={value}" for key, value in TINY.items() if key != "output-dir"]
    done = subprocess.run(
        [EXAMPLES / "loop.sh", calib, tmp_path / "out", tmp_path / "none", tiny_llama],
        env={
            **os.environ,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "OPTIONS": " ".join(tiny),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and f"failed: {tmp_path / 'none'}" in done.stderr
    assert (tmp_path / "out" / tiny_llama.name / "rilq.json").is_file()
