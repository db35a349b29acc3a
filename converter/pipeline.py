"""convert(): plan, stream, train, merge, write, publish; every step resumable."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import safetensors
import torch
import transformers
import xxhash
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import rilq
from rilq.calib.dataset import calibration_rows
from rilq.calib.sources import describe_source, parse_source
from rilq.calib.tokenizer import check_vocabulary, load_tokenizer
from rilq.converter.adapters import AdapterSpec, plain_adapters
from rilq.converter.architecture import refuse_quantized
from rilq.converter.bit_choice import average_bits, choose_bits
from rilq.converter.experts import expert_quality
from rilq.converter.fewer_rows import RowsAtOnce, with_fewer_rows
from rilq.converter.finish import QuantizedParts, write_output
from rilq.converter.initial import InitialAdapters, set_values, use_initial
from rilq.converter.job_source import check_source
from rilq.converter.layer_method import LayerMethod
from rilq.converter.layers import StreamedModel
from rilq.converter.loss import Loss, logit_differences
from rilq.converter.machine import (
    LARGE_BLOCK,
    SMALL_BLOCK,
    Machine,
    large_blocks_returned,
    measure_machine,
    memory_errors_explained,
)
from rilq.converter.options import ConvertOptions, Train, flag
from rilq.converter.pace import measure_pace
from rilq.converter.plan import Choices, Plan, check_fits, make_plan
from rilq.converter.quantizers import LayerQuantizer, Quantizer, build_quantizer
from rilq.converter.ranks import ALONE, Ranks
from rilq.converter.resq.base import make_base, resq_config
from rilq.converter.resq.plan import resq_plan
from rilq.converter.rotation import RotatedCheckpoint, refuse_fp8
from rilq.converter.shared_workdir import SharedWorkDir
from rilq.converter.stream import StreamingPass
from rilq.converter.stream_options import StreamOptions
from rilq.converter.student import Student
from rilq.converter.train import Progress, Trainer, TrainOptions, validation_losses
from rilq.converter.workdir import (
    SOURCE_FOLDER,
    Record,
    WorkDir,
    has_begun,
    open_workdir,
    peek,
    peek_facts,
)
from rilq.converter.zero_point_cost import relative_errors, rounding_errors
from rilq.errors import OptionError, WorkDirError
from rilq.formats.checkpoint import Checkpoint
from rilq.formats.fp8 import open_source_checkpoint
from rilq.formats.hub import HubRepository, open_source
from rilq.formats.hub_cache import RemoteFile
from rilq.formats.hub_window import ShardWindow
from rilq.formats.native import RilqConfig
from rilq.formats.resq.config import ResqConfig
from rilq.formats.shard import listing
from rilq.formats.shard_writer import write_tensors
from rilq.formats.source import Source
from rilq.formats.spec import QuantSpec
from rilq.formats.verify import MANIFEST_NAME, file_hash, read_manifest
from rilq.formats.writer import check_output, parse_size
from rilq.progress import Reporter

if TYPE_CHECKING:
    from rilq.evaluation.export import Exported
    from rilq.evaluation.push import PushResult

COMPARED_ROWS = 2  # validation rows on which merged and unmerged logits are compared


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


@dataclass(frozen=True)
class Job:
    """A conversion about to run: options, source and plan; and who else runs it."""

    options: ConvertOptions
    checkpoint: Checkpoint
    streamed: StreamedModel
    plan: Plan
    ranks: Ranks = ALONE


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
    source = _open_source(options, report)
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
        plan = make_plan(streamed, options, machine, measure_pace)
    else:
        plan = resq_plan(streamed, options, machine)
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
        conversion = _Conversion(job, work, report)
        # Offloading is for jobs that have little memory; others would rather have the time.
        block = SMALL_BLOCK if conversion.choices.student == "offload" else LARGE_BLOCK
        with (
            memory_errors_explained(lambda: f"after {work.last_unit} of {work.path}"),
            large_blocks_returned(block),
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
            if (before := _processes(work)) != ranks.count:
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


def _processes(work: WorkDir) -> int:
    """How many processes a job was begun with."""
    return int(work.job["choices"].get("processes", 1))


class _Conversion:
    """One run of a job inside its open work folder."""

    def __init__(self, job: Job, work: WorkDir, report: Reporter) -> None:
        self.job, self.work, self.report, self.ranks = job, work, report, job.ranks
        self.options, self.streamed, self.plan = job.options, job.streamed, job.plan
        self.checkpoint = job.checkpoint
        self.bits: dict[str, int] = {}  # of linears that get more than the base's
        saved = {k: v for k, v in work.job["choices"].items() if k not in ("files", "processes")}
        self.choices = Choices(**saved)
        job.streamed.experts_apart = self.choices.experts_apart
        self.layers = len(job.streamed.layers)
        self.adapter_spec = (
            AdapterSpec(
                self.options.adapter,
                self.options.rank,
                self.options.alpha,
                self.options.seed,
                self.options.adapter_targets,
            )
            if self.options.trains_adapters
            else None
        )
        self.loss = Loss(
            **{"mse": 0.0, "ce": 0.0, **self.options.loss_weights}, target=self.options.target
        )

    def run(
        self, tokenizer: PreTrainedTokenizerBase, fingerprint: dict[str, Any]
    ) -> dict[str, Any]:
        tokens, data = self._rows(tokenizer)
        if len(tokens) < self.ranks.count:
            raise OptionError(
                f"--nsamples: {len(tokens)} rows for {self.ranks.count} processes\n"
                "  every process needs rows of its own: start fewer, or use more text"
            )
        _record_source(self.job.checkpoint.source, self.work)
        validation = max(1, round(len(tokens) * self.options.val_ratio))
        quantizer = self._quantizer(tokens)
        stream = StreamingPass(
            self.checkpoint,
            self.streamed,
            tokens,
            self.work,
            StreamOptions(
                quantizer,
                self.options.spec_for,
                self.choices.batch_rows,
                train_rows=len(tokens) - validation,
                batch_size=self.options.batch_size,
                micro_batch=self.choices.micro_batch,
                seed=self.options.seed,
                target=self.options.target,
                outer={p.name: s for p in self.plan.outer if isinstance(s := p.spec, QuantSpec)},
                initial=self._initial(),
                trains_experts=self.choices.trains_experts,
                more_bits=self.options.more_bits,
                after_layer=partial(
                    rounding_errors,
                    spec_for=self.options.spec_for,
                    device=self.streamed.device,
                )
                if self.options.keep_adapter
                else None,
            ),
            self.report,
            self.ranks,
        )
        training = self.options.trains != "none"
        stream.run(targets=training)
        self.streamed.unload()
        quality: dict[str, Any] = {
            "layer_errors": [
                r.facts["error"] for r in self.work.stage("layers") if "error" in r.facts
            ],
            **self._expert_quality(),
        }
        if self.options.keep_adapter:
            quality["rounding_error"] = self._zero_point_cost()
        if self.options.avg_bits is not None:
            quality["bits"] = self._choose_bits()
            self.bits = quality["bits"]["chosen"]
            self.plan = self.plan.with_bits(self.bits)
        recipe = self._recipe()
        quantization = self._quantization(recipe)
        trained: dict[str, Tensor] = {}
        if training:
            if not (ready := self.work.stage("trained")):
                rows = RowsAtOnce(self.choices.batch_rows, self.choices.micro_batch)
                train = partial(self._train, stream, tokens, validation, quantization)
                with_fewer_rows("the training", rows, train, self.work, self.report)
                ready = self.work.stage("trained")
            quality |= ready[-1].facts
            trained = load_file(self.work.file("trained.safetensors"))
        self.ranks.wait()  # the first removes the work folder soon, which the others still read
        if self.ranks.first:
            self._write(trained, quantization, data, quality, recipe, fingerprint)
        return quality

    def _quantizer(self, tokens: Tensor) -> Quantizer | LayerQuantizer | LayerMethod:
        """What quantizes the layers; of ResQ, they are then those of a rotated checkpoint."""
        o = self.options
        if o.resq is None:
            return build_quantizer(o.quantizer, clip=o.clip, layer_steps=o.layer_steps)
        base = make_base(
            self.checkpoint,
            self.streamed,
            tokens,
            self.work,
            o.resq,
            seed=o.seed,
            rows=RowsAtOnce(self.choices.batch_rows, self.choices.micro_batch),
            report=self.report,
            ranks=self.ranks,
        )
        self.checkpoint, self.streamed = base.checkpoint, base.streamed
        return base.layers

    def _recipe(self) -> dict[str, Any]:
        """What was asked for, and what was chosen, for `rilq.json`."""
        recipe = self.options.recorded()
        chosen = {
            "train": self.options.trains,
            "learning_rate": self.choices.learning_rate,
            "scales_learning_rate": self.choices.scales_learning_rate,
        }
        if self.options.resq is not None:  # of a training, if there is one, and of no scales
            return recipe | {name: chosen[name] for name in chosen if name in recipe}
        recipe |= chosen
        if self.plan.experts:  # as the memory allowed
            recipe["trains_experts"] = self.choices.trains_experts
        return recipe

    def _quantization(self, recipe: Mapping[str, Any]) -> RilqConfig | ResqConfig:
        if self.options.resq is not None:
            return resq_config(self.options.resq, self.streamed.config.intermediate_size, recipe)
        return self.plan.quantization(recipe, self.options.bits, self.options.group_size)

    def _choose_bits(self) -> dict[str, Any]:
        """Which linears get more bits, once and for all; facts for `rilq.json`."""
        if not self.work.stage("bits"):
            assert self.options.avg_bits is not None, "nothing to choose"
            weights = {p.name: p.out_features * p.in_features for p in self.plan.quantized}
            # JSON made strings of the bits of what an earlier run measured.
            gains = {
                name: {int(bits): gain for bits, gain in by_bits.items() if isfinite(gain)}
                for record in self.work.stage("layers")
                for name, by_bits in record.facts.get("gains", {}).items()
            }
            base = self.options.bits
            chosen = choose_bits(weights, gains, base=base, average=self.options.avg_bits)
            facts: dict[str, Any] = {
                "average": average_bits(weights, chosen, base),
                "chosen": chosen,
                "gains": {n: {str(b): g for b, g in each.items()} for n, each in gains.items()},
            }
            self.work.commit("bits", "bits", facts)
        facts = self.work.stage("bits")[-1].facts
        self.report.note(
            f"bits: {facts['average']:.4f} per weight on average; more than {self.options.bits} in "
            f"{len(facts['chosen'])} of {len(self.plan.quantized)} linears"
        )
        return facts

    def _expert_quality(self) -> dict[str, Any]:
        """Tokens of the experts, and those that saw too few; both also said."""
        quality = expert_quality(r.facts for r in self.work.stage("layers") if "error" in r.facts)
        if few := quality.get("experts_without_data"):
            self.report.warn(
                f"{len(few)} linears of experts saw too few tokens, and were quantized without "
                f"data: {listing(list(few))}\n  more rows (--nsamples) reach more experts"
            )
        return quality

    def _zero_point_cost(self) -> dict[str, float]:
        errors = relative_errors(record.facts for record in self.work.stage("layers"))
        self.report.note(
            "integer zero-points: rounding to a least-squares grid leaves "
            f"{errors['integer']:.4f} of the weights' squares, with real ones {errors['real']:.4f}"
        )
        return errors

    def _initial(self) -> InitialAdapters | None:
        """How adapters start, where that is found while quantizing."""
        if self.adapter_spec is None or self.options.adapter_init == "zero":
            return None
        return InitialAdapters(self.options.adapter_init, self.adapter_spec)

    def _rows(self, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, dict[str, Any]]:
        """Calibration rows, cut once and kept: a stopped job needs no network to go on."""
        path = self.work.file("rows.safetensors")
        if not self.work.stage("rows"):
            facts = self._cut_rows(tokenizer, path) if self.ranks.first else {}
            self.ranks.wait()
            self.work.commit("rows", "rows", facts, files={path: file_hash(path)})
        tokens = load_file(path)["tokens"]
        facts = self.work.stage("rows")[0].facts
        return tokens, {**facts, "rows": len(tokens), "seqlen": tokens.shape[1]}

    def _cut_rows(self, tokenizer: PreTrainedTokenizerBase, path: Path) -> dict[str, Any]:
        """Write the rows to a file; facts about them for the journal."""
        rows = calibration_rows(
            [parse_source(text) for text in self.options.dataset],
            tokenizer,
            nsamples=self.options.nsamples,
            seqlen=self.choices.seqlen,
            seed=self.options.seed,
            text_key=self.options.text_key,
            mode=self.options.rows,
        )
        check_vocabulary(
            rows.tokens, self.streamed.config.vocab_size, self.job.checkpoint.source.label
        )
        for note in rows.notes:
            self.report.note(note)
        write_tensors(path, {"tokens": rows.tokens})
        return {"digest": rows.digest, "sources": list(rows.sources)}

    @property
    def _merging(self) -> bool:
        """Whether what is trained goes into the base; a plain LoRA stays beside it."""
        return self.adapter_spec is None or self.adapter_spec.kind == "pooled"

    def _student(
        self, parts: QuantizedParts, quantization: RilqConfig | ResqConfig, *, train: Train
    ) -> Student:
        return Student(
            copy.deepcopy(self.streamed.config),  # a method may set its own attention in it
            quantization,
            read_layer=parts.layer,
            outer=parts.outer(),
            train=train,
            adapters=self.adapter_spec,
            tier=self.choices.student,
            dtype=self.streamed.dtype,
            device=self.streamed.device,
            recompute=self.choices.recompute,
        )

    def _train(
        self,
        stream: StreamingPass,
        tokens: Tensor,
        validation: int,
        quantization: RilqConfig | ResqConfig,
        rows: RowsAtOnce,
    ) -> None:
        """Train, keep the best values, and measure what merging them changes."""
        o, self.choices = self.options, replace(self.choices, micro_batch=rows.micro_batch)
        parts = QuantizedParts(self.work, self.layers, bits=self.bits)
        student = self._student(parts, quantization, train=o.trains)
        use_initial(student.trained, self.work)
        trainer = Trainer(
            student,
            tokens,
            stream.targets(),
            validation=validation,
            options=TrainOptions(
                learning_rate=self.choices.learning_rate,
                scales_learning_rate=self.choices.scales_learning_rate,
                schedule=o.schedule,
                loss=self.loss,
                steps=o.steps,
                batch_size=o.batch_size,
                micro_batch=self.choices.micro_batch,
                val_every=o.val_every,
                patience=o.patience,
                seed=o.seed,
            ),
            ranks=self.ranks,
        )
        if done := self.work.stage("train"):
            trainer.restore(load_file(next(iter(self._paths(done[-1].files)))), done[-1].facts)
        trainer.run(self._checkpointer(trainer), self.report)
        trainer.use_best()
        facts: dict[str, Any] = {
            "validation_loss_before": trainer.progress.history[0][1],
            "validation_loss": trainer.progress.best_loss,
            "best_step": trainer.progress.best_step,
            "steps": trainer.progress.step,
            **curves(trainer.progress),
        }
        self.report.note(
            f"trained: validation loss {facts['validation_loss_before']:.4f} before, "
            f"{facts['validation_loss']:.4f} after step {facts['best_step']}"
        )
        path = self.work.file("trained.safetensors")
        best = dict(trainer.best)
        self.ranks.once(partial(write_tensors, path, best))
        if self._merging:
            sample = tokens[-validation:][:COMPARED_ROWS].to(self.streamed.device)
            with torch.no_grad():
                before = student.states(sample)[1]
            del student, trainer
            parts = QuantizedParts(self.work, self.layers, best, self.adapter_spec, bits=self.bits)
            merged = self._student(parts, quantization, train="none")
            measured = partial(self._measured, before, sample, stream, tokens, validation)
            facts |= self._merge_figures(*measured(merged))
            if self.options.keep_adapter:
                del merged
                facts |= self._kept_figures(best, quantization, measured)
        self.work.commit("trained", "trained", facts, files={path: file_hash(path)})

    def _measured(
        self,
        before: Tensor,
        sample: Tensor,
        stream: StreamingPass,
        tokens: Tensor,
        validation: int,
        stored: Student,
    ) -> tuple[tuple[float, float], float]:
        """How far a stored student's logits are from the trained one's; its validation loss.

        Args:
            before: the trained student's states on `sample`; both have the same head.

        Returns:
            The largest and the mean difference, and the loss.
        """
        with torch.no_grad():
            apart = logit_differences(stored, before, stored.states(sample)[1])
        losses = validation_losses(
            stored,
            tokens,
            stream.targets(),
            rows=range(len(tokens) - validation, len(tokens)),
            batch=self.choices.micro_batch,
            loss=self.loss,
            device=self.streamed.device,
            ranks=self.ranks,
        )
        return apart, losses["total"]

    def _merge_figures(self, apart: tuple[float, float], loss: float) -> dict[str, Any]:
        figures = {
            "merge_max_logit_difference": apart[0],
            "merge_mean_logit_difference": apart[1],
            "validation_loss_merged": loss,
        }
        self.report.note(
            f"merged: logits differ from the unmerged ones by at most "
            f"{figures['merge_max_logit_difference']:.2g} (mean "
            f"{figures['merge_mean_logit_difference']:.2g}, float16 rounding)"
        )
        return figures

    def _kept_figures(
        self,
        best: Mapping[str, Tensor],
        quantization: RilqConfig | ResqConfig,
        measured: Callable[[Student], tuple[tuple[float, float], float]],
    ) -> dict[str, Any]:
        """The integer base as it will be stored, with its adapter beside it and alone."""
        parts = self._integer_base(best)
        beside = self._student(parts, quantization, train="adapters")
        set_values(beside.trained, {n: best[n] for n in beside.trained})
        (apart, _), loss = measured(beside)
        del beside
        alone = measured(self._student(parts, quantization, train="none"))[1]
        self.report.note(
            f"kept: integer base and adapter: validation loss {loss:.4f}, logits differ from the "
            f"trained ones by at most {apart:.2g}; the base alone {alone:.4f}"
        )
        return {
            "kept_max_logit_difference": apart,
            "validation_loss_kept": loss,
            "validation_loss_integer_base": alone,
        }

    def _integer_base(self, trained: Mapping[str, Tensor]) -> QuantizedParts:
        """The base with its trained scales, without its adapter."""
        scales = {name: t for name, t in trained.items() if name.endswith(".log_scale")}
        return QuantizedParts(self.work, self.layers, scales, bits=self.bits)

    def _checkpointer(self, trainer: Trainer) -> Callable[[], None]:
        def commit() -> None:
            step = trainer.progress.step
            path = self.work.file(f"train-{step:06d}.safetensors")
            self.ranks.once(lambda: write_tensors(path, trainer.tensors()))
            self.work.commit(
                "train",
                f"step {step}",
                trainer.progress.as_facts(),
                passing={path: file_hash(path)},
            )

        return commit

    def _paths(self, keys: Any) -> list[Path]:
        return [self.work.path / key for key in keys]

    def _write(
        self,
        trained: dict[str, Tensor],
        quantization: RilqConfig | ResqConfig,
        data: dict[str, Any],
        quality: dict[str, Any],
        recipe: dict[str, Any],
        fingerprint: dict[str, Any],
    ) -> None:
        spec = self.adapter_spec
        merged = trained if self._merging else None
        parts = QuantizedParts(self.work, self.layers, merged, spec, bits=self.bits)
        lora = (spec, trained) if spec is not None and not self._merging else None
        integer_base = None
        if self.options.keep_adapter:
            assert spec is not None, "no adapter to keep"
            lora = (spec, plain_adapters(trained, self.options.group_size))
            integer_base = self._integer_base(trained)
        manifest = {
            "format_version": quantization.format_version,
            "job": job_hash(fingerprint),
            "versions": versions(),
            "source": source_facts(self.job.checkpoint),
            "recipe": recipe,
            "compute_dtype": self.choices.dtype,
            **self._processes(),
            "bits_per_weight": self.plan.bits_per_weight,
            "bits_per_parameter": self.plan.bits_per_parameter,
            **self._run_time_bits(),
            "kept_in_16_bits": dict(self.job.plan.kept),
            "calibration": data,
            "quality": quality,
        }
        write_output(
            parts,
            self.checkpoint,
            self.work.own(),
            output=self.options.output,
            quantization=quantization,
            max_shard_size=parse_size(self.options.max_shard_size),
            manifest=manifest,
            lora=lora,
            integer_base=integer_base,
            report=self.report,
        )

    def _run_time_bits(self) -> dict[str, float]:
        """Of a method that quantizes activations and the cache too, by name."""
        bits = self.plan.run_time_bits
        return {} if bits is None else asdict(bits)

    def _processes(self) -> dict[str, Any]:
        """Of a job of several processes, how many began it, and ended it if they were others."""
        counts = sorted({_processes(self.work), self.ranks.count})
        return {} if counts == [1] else {"processes": counts}


def curves(progress: Progress) -> dict[str, Any]:
    """Losses over the updates, for `rilq.json`; None for NaN, of a training that failed."""

    def finite(value: float) -> float | None:
        return value if isfinite(value) else None

    after = [step for step, _ in progress.history[1:]]
    return {
        "history": [(step, finite(loss)) for step, loss in progress.history],
        "train_history": [
            (step, finite(loss)) for step, loss in zip(after, progress.train_losses, strict=True)
        ],
        "validation_parts": {
            term: [finite(loss) for loss in losses] for term, losses in progress.parts.items()
        },
    }


def source_facts(checkpoint: Checkpoint) -> dict[str, str | None]:
    """Which checkpoint this is, for `rilq.json`."""
    return {
        "name": base_name(checkpoint),
        "commit": checkpoint.source.commit,
        "header_hash": checkpoint.header_hash(),
    }


def _open_source(options: ConvertOptions, report: Reporter) -> Source:
    """The source, at the commit that a stopped job began with; with few shards on disk if asked."""
    limit = None if options.max_disk is None else parse_size(options.max_disk)
    begun = peek(options.work) if options.resume != "never" else None
    revision, recorded = options.revision, None
    if begun and begun["fingerprint"].get("model") == options.model:
        revision = begun["fingerprint"].get("commit") or revision
        recorded = peek_facts(options.work, "source") if options.evicts else None
    known = {n: RemoteFile.of(*of) for n, of in recorded["files"].items()} if recorded else None
    source = open_source(options.model, revision=revision, known=known, report=report)
    if not options.evicts:
        return source
    if not isinstance(source, HubRepository):
        report.note(f"{options.model}: a local folder, of which --evict and --max-disk keep all")
        return source
    heads = recorded["heads"] if recorded else None
    return ShardWindow(source, options.work / SOURCE_FOLDER, limit, heads=heads)


def _record_source(source: Source, work: WorkDir) -> None:
    """Keep what the Hub said about shards that will be deleted: later steps need not ask again."""
    if isinstance(source, ShardWindow) and not work.stage("source"):
        files = {name: [file.size, file.digest] for name, file in source.repo.listing.items()}
        work.commit("source", "source", {"files": files, "heads": source.heads})


def versions() -> dict[str, str]:
    """Of rilq and of the libraries that have an effect on the result."""
    return {
        "rilq": rilq.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
    }


def job_fingerprint(job: Job) -> dict[str, Any]:
    """Everything that determines the result, as JSON values, one comparable value per key."""
    options, source = job.options, job.checkpoint.source
    return {
        **{flag(name): value for name, value in options.recorded().items()},
        "model": options.model if source.commit else "local folder",
        "commit": source.commit,
        **_file_hashes(job.checkpoint),
        "--dataset": [describe_source(parse_source(text)) for text in options.dataset],
        "--device": job.plan.choices.device,
        "--dtype": job.plan.choices.dtype,
        "--student": options.student,
        **({} if options.micro_batch is None else {"--micro-batch": options.micro_batch}),
        **{f"version of {name}": version for name, version in versions().items()},
    }


def _file_hashes(checkpoint: Checkpoint) -> dict[str, str]:
    """One entry per source file: headers of shards only, whose tensors are hashed when read.

    A commit fixes all files of a Hub model, so that none is fetched for its hash.
    """
    hashes = dict(checkpoint.digests)
    if checkpoint.source.commit is None:
        hashes |= {n: file_hash(checkpoint.source.path(n)) for n in checkpoint.side_files()}
    return {f"source file {name}": digest for name, digest in sorted(hashes.items())}


def job_hash(fingerprint: dict[str, Any]) -> str:
    """xxh3 of a fingerprint: two runs with the same one make the same bytes."""
    return str(xxhash.xxh3_128_hexdigest(json.dumps(fingerprint, sort_keys=True).encode()))


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


def base_name(checkpoint: Checkpoint) -> str:
    """What a checkpoint is called in results: without any path of this machine."""
    label = checkpoint.source.label
    return label if checkpoint.source.commit else Path(label).resolve().name
