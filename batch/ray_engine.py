"""Jobs on a Ray cluster: each a task that starts `rilq convert` and waits for it.

The batch file, outputs, work folders and state lie on storage that all nodes share. When a node is
lost, its task is given to another one, where the job goes on from its work folder.
The package ray is an extra, and is imported late.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rilq.batch.engine import POLL, start_convert
from rilq.batch.jobs import BatchJob
from rilq.batch.outlook import BatchPlan, Outlook
from rilq.batch.state import BatchState
from rilq.converter.journal import free_lock
from rilq.errors import Interrupted, OptionError, RilqError, one_line
from rilq.progress import gigabytes

LOSSES = 3  # nodes that a job may lose before it counts as failed
REACH = 10  # seconds that a head may take to accept a connection
# Seconds. A node that has lost sight of the cluster ends itself after 60 (Ray's default), and its
# jobs with it; only then is a lock that it has left behind nobody's.
GRACE = 90
LOCK_WAIT = GRACE + 30


@dataclass(frozen=True)
class Demand:
    """What a job asks of one node.

    Attributes:
        memory: bytes.
        disk: bytes, if the cluster's nodes say how much they have; else 0.
    """

    cpus: int
    gpus: int
    memory: int
    disk: int

    def fits(self, node: Mapping[str, float]) -> bool:
        """Whether a node with these resources, idle, could have the job."""
        return (
            self.cpus <= node.get("CPU", 0)
            and self.gpus <= node.get("GPU", 0)
            and self.memory <= node.get("memory", 0)
            and self.disk <= node.get("disk", 0)
        )

    def __str__(self) -> str:
        words = [f"{self.cpus} CPU", f"{gigabytes(self.memory)} of memory"]
        words += [f"{self.gpus} GPU"] if self.gpus else []
        words += [f"{gigabytes(self.disk)} of the resource disk"] if self.disk else []
        return ", ".join(words)


def demand(
    device: str,
    outlook: Outlook,
    nodes: Sequence[Mapping[str, float]],
    environment: Mapping[str, str],
) -> Demand:
    """What a job asks of the node that it runs on.

    Args:
        device: as asked for; "auto" means a GPU if the cluster has any.
        nodes: resources of each node.
        environment: `OMP_NUM_THREADS` is the number of CPUs. Without it, a job on a GPU has one,
            and one on CPUs as many as the smallest node has: all nodes then give the same bytes.
    """
    threads = environment.get("OMP_NUM_THREADS", "")
    on_gpu = device.startswith("cuda") or (
        device == "auto" and any(node.get("GPU", 0) >= 1 for node in nodes)
    )
    if threads.isdigit() and int(threads):
        cpus = int(threads)
    elif on_gpu:
        cpus = 1
    else:
        cpus = int(min((n["CPU"] for n in nodes if n.get("CPU", 0) >= 1), default=1))
    declared = any("disk" in node for node in nodes)
    disk = sum(need.needed for need in outlook.needs) if declared else 0
    return Demand(cpus, int(on_gpu), outlook.host_bytes, disk)


@contextmanager
def connect(state: BatchState) -> Iterator[RayEngine]:
    """The cluster that this machine belongs to, or the one that `RAY_ADDRESS` names.

    Raises:
        OptionError: Ray is not installed, or there is no cluster; none is ever started.
    """
    try:
        import ray
    except ImportError as err:
        raise OptionError(
            f"--engine ray: the package ray cannot be imported: {one_line(err)}\n"
            "  pip install 'rilq[ray]', with the cluster's version of ray"
        ) from err
    address = os.environ.get("RAY_ADDRESS", "")
    if address not in ("", "auto"):
        _check_reachable(address)
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address="auto", logging_level="error", log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as err:
        raise OptionError(
            f"--engine ray: no Ray cluster can be reached: {one_line(err)}\n"
            "  start one with `ray start --head` here and `ray start --address=HOST:PORT` on other "
            "nodes, or set RAY_ADDRESS"
        ) from err
    finally:
        signal.signal(signal.SIGTERM, before)  # Ray puts its own in the place of the batch's
    try:
        yield RayEngine(ray, state)
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Ask for a connection; Ray itself would try for a quarter of an hour, or start a cluster.

    Raises:
        OptionError: nobody answers, or it is no address.
    """
    host, _, port = address.rpartition(":")
    if "://" in address or not port.isdigit():
        raise OptionError(
            f"RAY_ADDRESS={address}: expected HOST:PORT of a cluster that this machine is a node of"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH).close()
    except (OSError, OverflowError) as err:
        raise OptionError(
            f"RAY_ADDRESS={address}: no Ray cluster can be reached there: {one_line(err)}\n"
            "  start it, or set RAY_ADDRESS to the HOST:PORT that `ray start --head` has shown"
        ) from err


class RayEngine:
    """A cluster; see `Engine`."""

    def __init__(self, ray: Any, state: BatchState) -> None:
        self._ray = ray
        self._held = state.path / "rilq.lock"

    def check(self, jobs: Sequence[BatchJob], plan: BatchPlan) -> None:
        """Refuse jobs that no node of the cluster could run, were it idle."""
        wrong = []
        for job in jobs:
            wanted = self._demand(job, plan.jobs[job.name])
            if ":" in job.options.device:
                wrong.append(
                    f"{job.name}: --device {job.options.device}: Ray chooses the GPU; use cuda"
                )
            elif not any(wanted.fits(node) for node in self._nodes()):
                wrong.append(f"{job.name}: needs {wanted}: no node of the cluster has that")
        if wrong:
            raise OptionError(
                "nothing was started\n  "
                + "\n  ".join(wrong)
                + "\n  `ray status` shows what nodes have; OMP_NUM_THREADS sets the CPUs of a job"
            )

    def start(self, job: BatchJob, outlook: Outlook, log: Path) -> RayRun:
        """Give a job to the cluster, which runs it where and when there is room."""
        wanted = self._demand(job, outlook)
        task = self._ray.remote(_convert).options(
            name=job.name,
            num_returns="streaming",
            max_retries=0,  # we do that, and say so
            scheduling_strategy="SPREAD",
            num_cpus=wanted.cpus,
            num_gpus=wanted.gpus,
            memory=wanted.memory or None,
            resources={"disk": wanted.disk} if wanted.disk else None,
        )

        order = _Order(
            arguments=job.arguments,
            folder=Path.cwd(),
            work=job.options.work,
            log=log,
            held=self._held,
            holder=self._held.read_text(),
            threads=wanted.cpus,
        )
        return RayRun(self._ray, lambda: task.remote(order), log)

    def _demand(self, job: BatchJob, outlook: Outlook) -> Demand:
        return demand(job.options.device, outlook, self._nodes(), os.environ)

    def _nodes(self) -> list[dict[str, float]]:
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]


class RayRun:
    """A task, given to another node when its own is lost; see `Run`.

    Args:
        submit: starts the task, which tells the place that it has got and then the exit code.
        log: of the job.
    """

    def __init__(self, ray: Any, submit: Callable[[], Any], log: Path) -> None:
        self._ray, self._submit, self._log = ray, submit, log
        self._task = submit()
        self._losses = 0
        self._stopping = False
        self.place = ""
        self.begun: float | None = None

    def poll(self) -> int | None:
        """Exit code of the job once it has ended."""
        from ray.exceptions import RayError, RayTaskError, TaskCancelledError

        if not self._ray.wait([self._task], timeout=0)[0]:
            return None
        try:
            said = self._ray.get(next(self._task))
        except (StopIteration, TaskCancelledError):  # a task that was stopped tells no code
            return Interrupted.exit_code
        except RayTaskError as err:
            self._say(str(err.cause) if isinstance(err.cause, RilqError) else one_line(err.cause))
            return 1
        except RayError as err:
            return Interrupted.exit_code if self._stopping else self._lost(err)
        if isinstance(said, int):
            return said
        self.place, self.begun = said, time.monotonic()
        return None

    def stop(self) -> None:
        """Cancel the task, which then stops its job."""
        self._stopping = True
        self._ray.cancel(self._task)

    def wait(self) -> int:
        """Exit code, when the job has ended."""
        while (code := self.poll()) is None:
            time.sleep(POLL)
        return code

    def _lost(self, err: Exception) -> int | None:
        """Give the task to the next node that has room, unless too many were lost with it."""
        self._losses += 1
        lost = f"{self.place or 'its node'} was lost ({type(err).__name__})"
        self.place, self.begun = "", None
        if self._losses > LOSSES:
            self._say(f"{lost}; that makes {self._losses} times, given up")
            return 1
        self._say(f"{lost}; the job goes on where there is room")
        self._task = self._submit()
        return None

    def _say(self, message: str) -> None:
        with self._log.open("a") as words:
            words.write(f"rilq: {message}\n")


# ---- in a worker of the cluster ------------------------------------------------------------------


@dataclass(frozen=True)
class _Order:
    """What a worker is to do.

    Attributes:
        folder: that relative paths are meant from.
        work: the job's work folder.
        held, holder: lock file of the batch, and what is in it while the batch lasts.
    """

    arguments: tuple[str, ...]
    folder: Path
    work: Path
    log: Path
    held: Path
    holder: str
    threads: int


def _convert(order: _Order) -> Iterator[str | int]:
    """Run `rilq convert` to its end, on the CPUs and the GPU that Ray gives.

    Yields:
        The place; the exit code.

    Raises:
        RilqError: the storage is not shared.
    """
    host, gpu = socket.gethostname(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if not order.held.is_file() or order.held.read_text() != order.holder:
        raise RilqError(
            f"{host}: {order.held.parent} is not there, or not the batch's: batch file, outputs "
            "and --state-dir must lie on storage that all nodes share, under the same path"
        )
    yield f"{host} GPU {gpu}" if gpu else host
    _await_lock(order.folder / order.work)
    environment = {**os.environ, "OMP_NUM_THREADS": str(order.threads)}
    yield _ended(start_convert(order.arguments, order.log, environment, folder=order.folder))


def _await_lock(work: Path) -> None:
    """Wait until an earlier run of the job, on a node that was lost, is over.

    One that lasts too long is reported by the job itself.
    """
    begin = time.monotonic()
    while (waited := time.monotonic() - begin) < LOCK_WAIT:
        if free_lock(work, _lost_hosts() if waited > GRACE else ()):
            return
        time.sleep(POLL)


def _lost_hosts() -> set[str]:
    """Hosts of the cluster's dead nodes, without those that have another node by now."""
    import ray

    nodes = ray.nodes()
    alive = {node["NodeManagerHostname"] for node in nodes if node["Alive"]}
    return {node["NodeManagerHostname"] for node in nodes} - alive


def _ended(process: subprocess.Popen[bytes]) -> int:
    """The exit code of a job; it is stopped with its task."""
    try:
        # Ray's cancellation interrupts a sleep, but no wait for a process.
        while process.poll() is None:
            time.sleep(POLL)
    finally:
        process.terminate()
        code = process.wait()
    return code
