"""convert(): plan, stream, train, merge, write, publish; every step resumable."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from rilq.calib.tokenizer import load_tokenizer
from rilq.converter.architecture import refuse_quantized
from rilq.converter.conversion import Conversion, begun_with
from rilq.converter.job import Job, job_fingerprint, job_hash
from rilq.converter.job_source import check_source, open_job_source
from rilq.converter.layers import StreamedModel
from rilq.converter.machine import (
    Machine,
    large_blocks_returned,
    least_returned,
    measure_machine,
    memory_errors_explained,
)
from rilq.converter.options import ConvertOptions
from rilq.converter.plan import Plan, check_fits, make_plan, measure_pace
from rilq.converter.ranks import ALONE, Ranks
from rilq.converter.resq.pace import measure_resq_pace
from rilq.converter.resq.plan import resq_plan
from rilq.converter.rotation import RotatedCheckpoint, refuse_fp8
from rilq.converter.shared_workdir import SharedWorkDir
from rilq.converter.workdir import (
    Record,
    WorkDir,
    has_begun,
    open_workdir,
)
from rilq.errors import OptionError, WorkDirError
from rilq.formats.fp8 import open_source_checkpoint
from rilq.formats.verify import MANIFEST_NAME, read_manifest
from rilq.formats.writer import check_output, parse_size
from rilq.progress import Reporter

if TYPE_CHECKING:
    from rilq.evaluation.export import Exported
    from rilq.evaluation.push import PushResult


@dataclass(frozen=True)
class ConvertResult:
    """What a conversion made.

    Attributes:
        output: the published folder.
        plan: what was decided.
        quality: figures as in `rilq.json`: errors per layer, validation losses, merge difference.
        bytes_read: of the checkpoint's tensors, by this run.
        already_done: the folder was there, from the same command; nothing was run.
        exports: of it, where they were asked for.
        pushed: where it is on the Hub, likewise.
    """

    output: Path
    plan: Plan
    quality: dict[str, Any]
    bytes_read: int = 0
    already_done: bool = False
    exports: tuple[Exported, ...] = ()
    pushed: PushResult | None = None


def prepare(options: ConvertOptions, report: Reporter, ranks: Ranks = ALONE) -> Job:
    """Open the source and plan; reads headers, writes nothing.

    A job that was stopped goes on with the Hub commit and the choices that it began with.

    Args:
        ranks: this process among those that convert together.

    Raises:
        InputError: the options, the checkpoint or the architecture cannot be used.
    """
    for size in (options.max_shard_size, options.device_memory, options.expert_memory):
        if size is not None:
            parse_size(size)
    if ranks.several and options.evicts:
        raise OptionError(
            f"--evict, --max-disk: not with {ranks.count} processes, which would delete shards "
            "that others still read\n  leave them out, or convert in one process"
        )
    source = open_job_source(options, report)
    checkpoint = open_source_checkpoint(source, report=report)
    refuse_quantized(checkpoint)
    if (
        ranks.several and source.commit is not None
    ):  # into the cache that a machine's processes share
        if ranks.local_index == 0:
            for shard in checkpoint.shards:
                source.path(shard)
        ranks.wait()
    if options.resq is not None:
        refuse_fp8(checkpoint, f"--method {options.method}")
    if options.rotate:
        refuse_fp8(checkpoint)
        checkpoint = RotatedCheckpoint(checkpoint, seed=options.seed)
    machine = _measure(options, ranks)
    dtype = machine.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    streamed = StreamedModel(checkpoint, dtype=dtype, device=machine.device)
    if options.resq is None:
        plan = make_plan(streamed, options, machine, measure_pace, processes=ranks.count)
    else:
        plan = resq_plan(streamed, options, machine, measure_resq_pace, processes=ranks.count)
    if ranks.several:  # the same words for all of them, and for a single process that goes on
        plan = replace(plan, choices=replace(plan.choices, device=machine.device.type))
    return Job(options, checkpoint, streamed, plan, ranks)


def _measure(options: ConvertOptions, ranks: Ranks) -> Machine:
    """The machine; of several processes, with this one's device and part of the host's memory."""
    if ranks.device is None:
        return measure_machine(options.device, limit=options.device_memory)
    machine = measure_machine(str(ranks.device), limit=options.device_memory)
    return replace(machine, host_free=machine.host_free // ranks.local_count)


def progress(job: Job) -> Literal["done", "begun", "new"]:
    """How far earlier runs of this job have come; changes nothing.

    Raises:
        InputError: `convert` would refuse it, for what stands at its places.
    """
    fingerprint = job_fingerprint(job)
    if _finished(job.options.output, fingerprint) is not None:
        return "done"
    _check_places(job)
    resumes = job.options.resume != "never" and has_begun(job.options.work, fingerprint)
    return "begun" if resumes else "new"


def convert(job: Job, report: Reporter) -> ConvertResult:
    """Convert a checkpoint as planned; see the README for what is written.

    Raises:
        InputError: before any work, for what cannot succeed.
        RilqError: the work failed; its state is in the work folder.
    """
    options, ranks = job.options, job.ranks
    fingerprint = job_fingerprint(job)
    _check_alike(fingerprint, ranks)
    quality = ranks.of_first(_finished(options.output, fingerprint))
    if quality is not None:
        if ranks.first:
            _clean(options, fingerprint, report)
        return ConvertResult(options.output, job.plan, quality, already_done=True)
    _check_places(job)
    check_fits(job.plan)
    tokenizer = load_tokenizer(job.checkpoint)
    with _open_work(job, fingerprint, report) as work:
        conversion = Conversion(job, work, report)
        with (
            memory_errors_explained(lambda: f"after {work.last_unit} of {work.path}"),
            large_blocks_returned(least_returned(conversion.choices.student)),
        ):
            quality = conversion.run(tokenizer, fingerprint)
        if ranks.first and not options.keep_work:
            work.remove()
    return ConvertResult(options.output, job.plan, quality, job.checkpoint.bytes_read)


@contextmanager
def _open_work(job: Job, fingerprint: dict[str, Any], report: Reporter) -> Iterator[WorkDir]:
    """The work folder, checked; the first of several processes holds it, and tells the others."""
    options, ranks = job.options, job.ranks
    if not ranks.first:
        begun, records = ranks.of_first((dict[str, Any](), list[Record]()))
        yield SharedWorkDir(options.work, begun, records, ranks)
        return
    choices = {
        **asdict(job.plan.choices),
        "files": job.checkpoint.file_signatures(),
        "processes": ranks.count,
    }
    with open_workdir(
        options.work, fingerprint, choices, resume=options.resume, report=report
    ) as work:
        work.check_files(report)
        work.remove_strays(report)
        if work.records:
            report.note(f"continuing after {work.last_unit} of {options.work}")
            check_source(job.checkpoint, work)
            if (before := begun_with(work)) != ranks.count:
                report.note(
                    f"begun with {before} processes, going on with {ranks.count}: the result is "
                    "that of an unbroken run but for rounding"
                )
        if ranks.several:
            work = SharedWorkDir(work.path, *ranks.of_first((work.job, work.records)), ranks)
        yield work


def _check_alike(fingerprint: dict[str, Any], ranks: Ranks) -> None:
    """That all processes were given the same job.

    Raises:
        OptionError: this one's differs from the first one's; the message says in what.
    """
    first = ranks.of_first(fingerprint)
    differences = [
        f"{key}: {first.get(key)!r} there, {fingerprint.get(key)!r} here"
        for key in sorted(first.keys() | fingerprint.keys())
        if first.get(key) != fingerprint.get(key)
    ]
    if differences:
        raise OptionError(
            f"process {ranks.index} has another job than process 0:\n  "
            + "\n  ".join(differences)
            + "\n  start all processes with the same options, files and versions"
        )


def _finished(output: Path, fingerprint: dict[str, Any]) -> dict[str, Any] | None:
    """Quality figures of `output`, if this very job has published it already."""
    if not (output / MANIFEST_NAME).is_file():
        return None
    manifest = read_manifest(output)
    return dict(manifest["quality"]) if manifest.get("job") == job_hash(fingerprint) else None


def _check_places(job: Job) -> None:
    """Nothing is ever written to the source folder, so the work folder cannot be in it either."""
    work = job.options.work
    source = Path(job.options.model) if job.checkpoint.source.commit is None else None
    check_output(job.options.output, source=source, work=work)
    place = work.resolve()
    if source is not None and source.resolve() in (place, *place.parents):
        raise WorkDirError(
            f"{work}: the work folder lies inside the source folder {source}\n"
            "  choose another folder with --work-dir"
        )


def _clean(options: ConvertOptions, fingerprint: dict[str, Any], report: Reporter) -> None:
    """Remove the work folder of a job that was killed between publishing and cleaning up."""
    if options.keep_work or not options.work.is_dir():
        return
    with open_workdir(options.work, fingerprint, {}, resume="auto", report=report) as work:
        work.remove()
