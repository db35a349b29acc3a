"""One run of a conversion: calibration rows, the streaming pass, the training, the output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rilq.calib.dataset import calibration_rows
from rilq.calib.sources import parse_source
from rilq.calib.tokenizer import check_vocabulary
from rilq.converter.adapters import plain_adapters
from rilq.converter.bit_choice import average_bits, choose_bits
from rilq.converter.experts import expert_quality
from rilq.converter.fewer_rows import RowsAtOnce
from rilq.converter.finish import QuantizedParts, integer_base, write_output
from rilq.converter.initial import InitialAdapters
from rilq.converter.job import Job, job_hash, versions
from rilq.converter.job_source import record_source, source_facts
from rilq.converter.layer_method import LayerMethod
from rilq.converter.merge import merges
from rilq.converter.plan import Choices, adapter_spec
from rilq.converter.quantizers import LayerQuantizer, Quantizer, build_quantizer
from rilq.converter.resq.base import make_base, resq_config
from rilq.converter.stream import StreamingPass
from rilq.converter.stream_options import StreamOptions
from rilq.converter.training_stage import TrainingStage
from rilq.converter.workdir import WorkDir
from rilq.converter.zero_point_cost import relative_errors, rounding_errors
from rilq.errors import OptionError
from rilq.formats.native import RilqConfig
from rilq.formats.resq.config import ResqConfig
from rilq.formats.shard import listing
from rilq.formats.shard_writer import write_tensors
from rilq.formats.spec import QuantSpec
from rilq.formats.verify import file_hash
from rilq.formats.writer import parse_size
from rilq.progress import Reporter


def begun_with(work: WorkDir) -> int:
    """How many processes a job was begun with."""
    return int(work.job["choices"].get("processes", 1))


class Conversion:
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
        self.adapter_spec = adapter_spec(self.options) if self.options.trains_adapters else None

    def run(
        self, tokenizer: PreTrainedTokenizerBase, fingerprint: dict[str, Any]
    ) -> dict[str, Any]:
        """Do what is not done yet, and publish the output.

        Args:
            tokenizer: the checkpoint's, which makes the rows.
            fingerprint: of the job.

        Returns:
            Figures as in `rilq.json`.

        Raises:
            RilqError: the work failed; its state is in the work folder.
        """
        tokens, data = self._rows(tokenizer)
        if len(tokens) < self.ranks.count:
            raise OptionError(
                f"--nsamples: {len(tokens)} rows for {self.ranks.count} processes\n"
                "  every process needs rows of its own: start fewer, or use more text"
            )
        record_source(self.job.checkpoint.source, self.work)
        validation = max(1, round(len(tokens) * self.options.val_ratio))
        stream = self._streaming(tokens, validation)
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
            stage = TrainingStage(
                options=self.options,
                choices=self.choices,
                streamed=self.streamed,
                work=self.work,
                quantization=quantization,
                adapters=self.adapter_spec,
                bits=self.bits,
                tokens=tokens,
                targets=stream.targets(),
                validation=validation,
                report=self.report,
                ranks=self.ranks,
            )
            facts, trained = stage.run()
            quality |= facts
        self.ranks.wait()  # the first removes the work folder soon, which the others still read
        if self.ranks.first:
            self._write(trained, quantization, data, quality, recipe, fingerprint)
        return quality

    def _streaming(self, tokens: Tensor, validation: int) -> StreamingPass:
        """The pass over the layers, yet to run; what a method must know before it is found here.

        Args:
            tokens: calibration rows `[rows, seq_len]` int64.
            validation: the last so many rows are not trained on.
        """
        quantizer = self._quantizer(tokens)
        return StreamingPass(
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
        merged = trained if merges(spec) else None
        parts = QuantizedParts(self.work, self.layers, merged, spec, bits=self.bits)
        lora = (spec, trained) if spec is not None and not merges(spec) else None
        kept_base = None
        if self.options.keep_adapter:
            assert spec is not None, "no adapter to keep"
            lora = (spec, plain_adapters(trained, self.options.group_size))
            kept_base = integer_base(self.work, self.layers, trained, self.bits)
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
            integer_base=kept_base,
            report=self.report,
        )

    def _run_time_bits(self) -> dict[str, float]:
        """Of a method that quantizes activations and the cache too, by name."""
        bits = self.plan.run_time_bits
        return {} if bits is None else asdict(bits)

    def _processes(self) -> dict[str, Any]:
        """Of a job of several processes, how many began it, and ended it if they were others."""
        counts = sorted({begun_with(self.work), self.ranks.count})
        return {} if counts == [1] else {"processes": counts}
