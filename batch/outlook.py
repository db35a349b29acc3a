"""What a batch will need, from the plans of its jobs, before the first one starts.

Jobs are planned in one child process: torch, and the memory it takes on a GPU, are gone with it
when the jobs begin.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Literal

from rilq.batch.jobs import BatchJob
from rilq.converter.options import ConvertOptions
from rilq.errors import InputError, OptionError, OutputError, RilqError
from rilq.progress import Reporter, SilentReporter, gigabytes

if TYPE_CHECKING:
    from rilq.converter.plan import Plan
    from rilq.formats.source import Source

Progress = Literal["done", "begun", "new"]


@dataclass(frozen=True)
class Need:
    """Bytes on a volume.

    Attributes:
        device: number of the volume.
        folder: on it.
        shared: jobs with the same word need these bytes once.
        lasting: they are still there when the job is over.
        free: bytes free on the volume.
    """

    device: int
    folder: str
    shared: str
    lasting: bool
    needed: int
    free: int


@dataclass(frozen=True)
class Outlook:
    """What is known of a job before it runs.

    Attributes:
        progress: of earlier runs; "done": the output is there, from the same options and source,
            and every hash of it is right.
        device: "cpu", "cuda" (any), or "cuda:1".
        devices: GPUs of this machine.
        seconds: estimate.
        host_bytes, host_free: peak memory of the host, and what there is.
    """

    progress: Progress
    device: str
    devices: int
    seconds: float
    host_bytes: int
    host_free: int
    needs: tuple[Need, ...]


@dataclass(frozen=True)
class Volume:
    """Bytes that a batch needs on one volume, and bytes free there."""

    folder: str
    needed: int
    free: int


@dataclass(frozen=True)
class BatchPlan:
    """What the jobs that are to run need together.

    Attributes:
        jobs: name to what is known of it.
        together: jobs that run at once on one machine.
        volumes: upper bounds: outputs and downloads of all jobs, and the largest work folders of
            as many as run at once.
        host_bytes, host_free: of as many jobs as run at once on this machine; upper bound.
        seconds: estimate; jobs on a CPU share it, so they count one after the other.
    """

    jobs: dict[str, Outlook]
    together: int
    volumes: tuple[Volume, ...]
    host_bytes: int
    host_free: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """As JSON values, with full words."""
        return asdict(self)


def look_ahead(jobs: Sequence[BatchJob], report: Reporter) -> dict[str, Outlook]:
    """Plan every job; reads headers and hashes finished outputs, writes nothing.

    Raises:
        InputError: what is wrong with any of the jobs.
    """
    report.stage("plan", len(jobs), "job")
    found: dict[str, Outlook] = {}
    wrong: list[str] = []
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_look_at_all, args=([j.options for j in jobs], theirs))
    child.start()
    theirs.close()  # so that the end of the child is the end of what it sends
    try:
        for count, job in enumerate(jobs, start=1):
            outlook = ours.recv()
            if isinstance(outlook, str):
                wrong.append(f"{job.name}: {outlook}".replace("\n", "\n    "))
            else:
                found[job.name] = outlook
            report.step(count)
    except EOFError as err:
        raise RilqError("the process that plans the jobs was killed; run again") from err
    finally:
        child.terminate()
        child.join()
    if wrong:
        raise InputError("nothing was started\n" + "\n".join(f"  {line}" for line in wrong))
    return found


def merge(outlooks: dict[str, Outlook], parallel: int, together: int | None = None) -> BatchPlan:
    """One plan of several jobs, at most `parallel` of which run at once.

    Args:
        together: those of them on one machine; all, if it is None.
    """
    together = parallel if together is None else together
    jobs = list(outlooks.values())
    needs = [need for job in jobs for need in job.needs]
    devices = dict.fromkeys(need.device for need in needs)
    gpus = [job.seconds for job in jobs if job.device != "cpu"]
    slots = [0.0] * max(1, min(parallel, max((job.devices for job in jobs), default=1)))
    for seconds in gpus:
        slots[slots.index(min(slots))] += seconds
    return BatchPlan(
        jobs=outlooks,
        together=together,
        volumes=tuple(_volume([n for n in needs if n.device == d], parallel) for d in devices),
        host_bytes=_largest((job.host_bytes for job in jobs), together),
        host_free=min((job.host_free for job in jobs), default=0),
        seconds=max(slots) + sum(job.seconds for job in jobs if job.device == "cpu"),
    )


def check_disks(plan: BatchPlan) -> None:
    """Refuse what cannot fit on a volume, before the first job.

    Raises:
        OutputError: names the volume.
    """
    for volume in plan.volumes:
        if volume.needed > volume.free:
            raise OutputError(
                f"{volume.folder}: {gigabytes(volume.needed)} needed for {len(plan.jobs)} jobs, "
                f"{gigabytes(volume.free)} free\n"
                "  make room, run some with --only, or put output-dir, work-dir or HF_HOME on "
                "another volume"
            )


def check_memory(plan: BatchPlan) -> None:
    """Refuse jobs that cannot be in the memory of this machine together.

    Raises:
        OptionError: what they need, and what there is.
    """
    if plan.host_bytes > plan.host_free:
        raise OptionError(
            f"--max-parallel {plan.together}: {gigabytes(plan.host_bytes)} of host memory needed, "
            f"{gigabytes(plan.host_free)} free\n  lower it"
        )


def _volume(needs: list[Need], parallel: int) -> Volume:
    lasting: dict[str, int] = {}
    for need in needs:
        if need.lasting:
            lasting[need.shared] = max(need.needed, lasting.get(need.shared, 0))
    passing = _largest((need.needed for need in needs if not need.lasting), parallel)
    return Volume(needs[0].folder, sum(lasting.values()) + passing, min(n.free for n in needs))


def _largest(sizes: Iterable[int], count: int) -> int:
    return sum(sorted(sizes, reverse=True)[:count])


# ---- in the child process ------------------------------------------------------------------------


def _look_at_all(jobs: list[ConvertOptions], answers: Connection) -> None:
    """Send what is known of each job, or what is wrong with it, until nobody listens."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it reaches the parent too, which ends this
    with suppress(BrokenPipeError):
        for options in jobs:
            try:
                answers.send(_outlook(options))
            except RilqError as err:
                answers.send(str(err))


def _outlook(options: ConvertOptions) -> Outlook:
    import torch

    from rilq.converter import pipeline
    from rilq.converter.plan import check_fits
    from rilq.formats.verify import verify

    job = pipeline.prepare(options, SilentReporter())
    progress = pipeline.progress(job)
    if progress == "done" and (problems := verify(options.output).problems):
        raise OutputError(
            f"{options.output}: finished, but damaged since: {problems[0]}"
            + (f" and {len(problems) - 1} more" if len(problems) > 1 else "")
            + "\n  delete the folder, to convert it again"
        )
    plan = job.plan
    if progress == "done":  # at most, it is run to say so
        plan = replace(plan, disks=(), seconds=0.0, host_bytes=0)
    check_fits(replace(plan, disks=()))  # disks are for all jobs together
    return Outlook(
        progress=progress,
        device=plan.choices.device,
        devices=torch.cuda.device_count(),
        seconds=plan.seconds,
        host_bytes=plan.host_bytes,
        host_free=plan.host_free,
        needs=tuple(_needs(plan, job.checkpoint.source, options)),
    )


def _needs(plan: Plan, source: Source, options: ConvertOptions) -> Iterator[Need]:
    from rilq.converter.plan import DOWNLOADS, WORK

    for disk in plan.disks:
        device = os.stat(disk.volume).st_dev
        for holds, needed in disk.parts:
            of = f"{source.label}@{source.commit}" if holds == DOWNLOADS else options.output
            lasting = holds != WORK or options.keep_work
            yield Need(device, disk.volume, f"{holds} of {of}", lasting, needed, disk.free)
