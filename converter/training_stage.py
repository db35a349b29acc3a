"""The training of the quantized model as one unit of a conversion, and what merging changes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from rilq.calib.activations import ActivationStore
from rilq.converter.adapters import AdapterSpec
from rilq.converter.fewer_rows import RowsAtOnce, with_fewer_rows
from rilq.converter.finish import QuantizedParts, integer_base
from rilq.converter.initial import set_values, use_initial
from rilq.converter.layers import StreamedModel
from rilq.converter.loss import Loss, logit_differences
from rilq.converter.machine import return_free_memory
from rilq.converter.merge import merges
from rilq.converter.options import ConvertOptions, Train
from rilq.converter.plan import Choices
from rilq.converter.ranks import Ranks
from rilq.converter.student import Student
from rilq.converter.train import Progress, Trainer, TrainOptions, validation_losses
from rilq.converter.workdir import WorkDir
from rilq.formats.native import RilqConfig
from rilq.formats.resq.config import ResqConfig
from rilq.formats.shard_writer import write_tensors
from rilq.formats.verify import file_hash
from rilq.progress import Reporter

COMPARED_ROWS = 2  # validation rows on which merged and unmerged logits are compared


@dataclass(frozen=True, kw_only=True)
class TrainingStage:
    """Trains what the streaming pass has quantized.

    Attributes:
        streamed: the model; its weights are not needed.
        work: with all layers done.
        quantization: of the output.
        adapters: None where only the scales are trained.
        bits: of linears that were given more than the base's.
        tokens: calibration rows `[rows, seq_len]` int64.
        targets: the teacher's final hidden states of them.
        validation: the last so many rows are not trained on.
    """

    options: ConvertOptions
    choices: Choices
    streamed: StreamedModel
    work: WorkDir
    quantization: RilqConfig | ResqConfig
    adapters: AdapterSpec | None
    bits: Mapping[str, int]
    tokens: Tensor
    targets: ActivationStore
    validation: int
    report: Reporter
    ranks: Ranks

    def run(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Train, unless that is done.

        Returns:
            Figures for `rilq.json`, and the best values by `<linear>.<part>`, float32.
        """
        if not self.work.stage("trained"):
            rows = RowsAtOnce(self.choices.batch_rows, self.choices.micro_batch)
            with_fewer_rows("the training", rows, self._with_rows, self.work, self.report)
            return_free_memory()
        return self.work.stage("trained")[-1].facts, load_file(self._path)

    @property
    def _path(self) -> Path:
        return self.work.file("trained.safetensors")

    @property
    def _layers(self) -> int:
        return len(self.streamed.layers)

    @property
    def _loss(self) -> Loss:
        weights = {"mse": 0.0, "ce": 0.0, **self.options.loss_weights}
        return Loss(**weights, target=self.options.target)

    def _with_rows(self, rows: RowsAtOnce) -> None:
        """Train from the last checkpoint on, with so many rows in a forward pass."""
        replace(self, choices=replace(self.choices, micro_batch=rows.micro_batch))._train()

    def _student(self, parts: QuantizedParts, *, train: Train) -> Student:
        return Student(
            copy.deepcopy(self.streamed.config),  # a method may set its own attention in it
            self.quantization,
            read_layer=parts.layer,
            outer=parts.outer(),
            train=train,
            adapters=self.adapters,
            tier=self.choices.student,
            dtype=self.streamed.dtype,
            device=self.streamed.device,
            recompute=self.choices.recompute,
        )

    def _train(self) -> None:
        """Train, keep the best values, and measure what merging them changes."""
        o = self.options
        parts = QuantizedParts(self.work, self._layers, bits=self.bits)
        student = self._student(parts, train=o.trains)
        use_initial(student.trained, self.work)
        trainer = Trainer(
            student,
            self.tokens,
            self.targets,
            validation=self.validation,
            options=TrainOptions(
                learning_rate=self.choices.learning_rate,
                scales_learning_rate=self.choices.scales_learning_rate,
                schedule=o.schedule,
                loss=self._loss,
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
            path = self.work.path / next(iter(done[-1].files))
            trainer.restore(load_file(path), done[-1].facts)
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
        best = dict(trainer.best)
        self.ranks.once(partial(write_tensors, self._path, best))
        if merges(self.adapters):
            sample = self.tokens[-self.validation :][:COMPARED_ROWS].to(self.streamed.device)
            with torch.no_grad():
                before = student.states(sample)[1]
            del student, trainer
            parts = QuantizedParts(self.work, self._layers, best, self.adapters, bits=self.bits)
            merged = self._student(parts, train="none")
            measured = partial(self._measured, before, sample)
            facts |= self._merge_figures(*measured(merged))
            if o.keep_adapter:
                del merged
                facts |= self._kept_figures(best, measured)
        self.work.commit("trained", "trained", facts, files={self._path: file_hash(self._path)})

    def _measured(
        self, before: Tensor, sample: Tensor, stored: Student
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
            self.tokens,
            self.targets,
            rows=range(len(self.tokens) - self.validation, len(self.tokens)),
            batch=self.choices.micro_batch,
            loss=self._loss,
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
        measured: Callable[[Student], tuple[tuple[float, float], float]],
    ) -> dict[str, Any]:
        """The integer base as it will be stored, with its adapter beside it and alone."""
        parts = integer_base(self.work, self._layers, best, self.bits)
        beside = self._student(parts, train="adapters")
        set_values(beside.trained, {n: best[n] for n in beside.trained})
        (apart, _), loss = measured(beside)
        del beside
        alone = measured(self._student(parts, train="none"))[1]
        self.report.note(
            f"kept: integer base and adapter: validation loss {loss:.4f}, logits differ from the "
            f"trained ones by at most {apart:.2g}; the base alone {alone:.4f}"
        )
        return {
            "kept_max_logit_difference": apart,
            "validation_loss_kept": loss,
            "validation_loss_integer_base": alone,
        }

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
