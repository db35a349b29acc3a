"""`rilq batch --engine ray` on a Ray cluster of two nodes, in an environment with Ray.

Opt-in (`make test-runtimes`), but for what needs no Ray. Both nodes are on this machine, so their
shared storage is its disk.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import yaml
from accuracy_run import python_of

ROOT = Path(__file__).resolve().parents[2]
RAY = (
    *("torch==2.13.0", "ray==2.60.0"),
    *("--constraint", str(ROOT / "constraints.txt"), "--editable", str(ROOT)),
)
ONE_CPU = {"num_cpus": 1}
TINY = {
    "quantizer": "rtn", "group-size": 32, "nsamples": 12, "seqlen": 32, "steps": 4,
    "batch-size": 8, "val-every": 2, "device": "cpu", "output-dir": "out/{name}",
}  # fmt: skip
LONG = {"steps": 500, "val-every": 10, "patience": 500}
Process: TypeAlias = "subprocess.Popen[str]"
Ask = Callable[[str], Any]


@pytest.fixture(scope="module")
def python() -> Path:
    """The interpreter of the environment, which is made on first use."""
    homes = Path(os.environ.get("RILQ_ENVS", "~/.cache/rilq-benchmarks")).expanduser()
    homes.mkdir(parents=True, exist_ok=True)
    return python_of(homes / "ray", RAY)


@pytest.fixture
def write(tmp_path: Path, tiny_llama: Path, calib: Path) -> Callable[..., Path]:
    """`write(job, ...)`: a batch file of tiny jobs."""

    def make(*jobs: dict[str, Any], file: str = "jobs.yaml", **defaults: Any) -> Path:
        content = {
            "defaults": {
                **TINY,
                "report": False,
                "model": str(tiny_llama),
                "dataset": str(calib),
                **defaults,
            },
            "jobs": [*jobs],
        }
        (tmp_path / file).write_text(yaml.safe_dump(content))
        return tmp_path / file

    return make


@contextmanager
def started(*command: object, **environment: str) -> Iterator[Process]:
    """A program in a process of its own, from another folder."""
    with subprocess.Popen(
        [str(word) for word in command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()


@contextmanager
def cluster(python: Path, *nodes: dict[str, Any]) -> Iterator[tuple[str, Ask]]:
    """Address of a new cluster, and a function that gives an order to it."""
    script = ROOT / "tests" / "runtimes" / "ray_cluster.py"
    with started(python, script, *map(json.dumps, nodes)) as process:
        assert process.stdin is not None and process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def ask(order: str) -> Any:
            stdin.write(order + "\n")
            stdin.flush()
            return answer()

        def answer() -> Any:
            while line := stdout.readline():
                if line[0] in '["':
                    return json.loads(line)
            raise AssertionError(process.stderr and process.stderr.read())

        yield answer(), ask
        stdin.close()
        process.wait(60)


def run(*command: object, **environment: str) -> tuple[int, str, str]:
    with started(*command, **environment) as process:
        out, err = process.communicate(timeout=400)
    return process.returncode, out, err


def log_of(file: Path, job: str) -> Path:
    return file.with_name("jobs.rilq-batch") / "logs" / f"{job}.log"


def wait_for(text: str, log: Path, process: Process) -> None:
    deadline = time.monotonic() + 200
    while not log.is_file() or text not in log.read_text():
        assert process.poll() is None and time.monotonic() < deadline, log
        time.sleep(0.1)


def test_without_the_package_it_is_one_line_with_the_remedy(
    write: Callable[..., Path], run_cli: Callable[..., Any]
) -> None:
    refused = run_cli(
        "batch", write({"name": "a"}), "--engine", "ray",
        first=lambda: sys.modules.update({"ray": None}),  # type: ignore[dict-item]
    )  # fmt: skip
    assert refused.code == 2 and "pip install 'rilq[ray]'" in refused.err
    assert "Traceback" not in refused.err


def test_another_engine_is_refused(write: Callable[..., Path], run_cli: Callable[..., Any]) -> None:
    refused = run_cli("batch", write({"name": "a"}), "--engine", "slurm")
    assert refused.code == 2 and "--engine slurm: expected local or ray" in refused.err


@pytest.mark.slow_runtime
def test_job_of_a_killed_node_is_finished_by_the_other_with_the_bytes_of_a_local_run(
    python: Path,
    write: Callable[..., Path],
    tmp_path: Path,
    hashes: Callable[[Path], dict[str, str]],
) -> None:
    file = write({"name": "a"}, {"name": "b"}, **LONG)
    with (
        cluster(python, ONE_CPU, ONE_CPU) as (address, ask),
        started(
            python, "-m", "rilq", "batch", file, "--engine", "ray", RAY_ADDRESS=address
        ) as batch,
    ):
        for job in "ab":
            wait_for("train: step", log_of(file, job), batch)
        (here,), (there,) = ask("jobs")
        kept, lost = ("a", "b") if "out/a" in here else ("b", "a")
        assert f"out/{lost}" in there
        ask("kill 1")
        out, err = batch.communicate(timeout=400)
        assert batch.returncode == 0, err
    print(err)
    assert "Traceback" not in err
    text = log_of(file, lost).read_text()
    assert text.count("$ rilq convert") == 2 and "continuing after" in text
    assert " was lost (" in text and f"{lost}: waiting" in err
    assert log_of(file, kept).read_text().count("$ rilq convert") == 1

    code, _, err = run(
        python, "-m", "rilq", "batch", write({"name": "c"}, file="local.yaml", **LONG)
    )
    assert code == 0, err
    whole = hashes(tmp_path / "out" / "c")
    assert hashes(tmp_path / "out" / lost) == whole
    assert hashes(tmp_path / "out" / kept) == whole


@pytest.mark.slow_runtime
def test_stopped_batch_stops_its_jobs_wherever_they_are_and_goes_on_later(
    python: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    file = write({"name": "a"}, {"name": "b"}, **LONG)
    command = (python, "-m", "rilq", "batch", file, "--engine", "ray")
    with cluster(python, ONE_CPU) as (address, ask):
        with started(*command, RAY_ADDRESS=address) as batch:
            wait_for("train: step", log_of(file, "a"), batch)
            batch.send_signal(signal.SIGINT)
            _, err = batch.communicate(timeout=60)
        assert batch.returncode == 75 and "run the same command again" in err, err
        assert "Traceback" not in err and "a: stopped" in err and "b: stopped" in err
        assert ask("jobs") == [[]]
        assert "stopped by SIGTERM" in log_of(file, "a").read_text()
        assert not log_of(file, "b").exists()  # it had been waiting for a place
        code, _, err = run(*command, "--quiet", RAY_ADDRESS=address)
        assert code == 0, err
    assert "continuing after" in log_of(file, "a").read_text()
    assert all((tmp_path / "out" / job / "rilq.json").is_file() for job in "ab")


@pytest.mark.slow_runtime
def test_jobs_go_where_gpu_and_disk_are_and_one_that_fits_nowhere_starts_none(
    python: Path, write: Callable[..., Path]
) -> None:
    rich = {**ONE_CPU, "num_gpus": 1, "resources": {"disk": 1_000_000_000}}
    file = write({"name": "a"}, device="auto")
    command = (python, "-m", "rilq", "batch", file, "--engine", "ray")
    with cluster(python, ONE_CPU, rich) as (address, _):
        code, out, err = run(*command, RAY_ADDRESS=address)
        assert code == 0, err
        assert "a: running on " in err and " GPU 0" in err

        write({"name": "c"}, device="auto")
        code, _, err = run(*command, RAY_ADDRESS=address, OMP_NUM_THREADS="64")
        assert code == 2 and "c: needs 64 CPU, " in err and "1 GPU" in err
        assert "no node of the cluster has that" in err and not log_of(file, "c").exists()


@pytest.mark.slow_runtime
@pytest.mark.parametrize("address", ["127.0.0.1:1", "local", "ray://127.0.0.1:10001"])
def test_where_no_cluster_is_none_is_started_and_the_address_is_named(
    python: Path, write: Callable[..., Path], address: str
) -> None:
    command = (python, "-m", "rilq", "batch", write({"name": "a"}), "--engine", "ray")
    code, _, err = run(*command, RAY_ADDRESS=address)
    assert code == 2 and "Traceback" not in err
    assert f"RAY_ADDRESS={address}: " in err
