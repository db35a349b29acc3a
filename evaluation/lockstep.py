"""Checkpoints and their base advance together, decoder layer by decoder layer, and can be stopped.

    model-0-0007.bin            hidden states before its decoder layer 7; the next ones replace them
    score-0-00064.safetensors   scores of some windows, beginning with window 64

Each decoder layer of each model is a unit of work, and so is each part of the scoring. The base
runs first, so that a layer's output can be held against the base's, and once for all models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor

from rilq.calib.activations import ActivationStore
from rilq.converter.machine import large_blocks_returned, return_free_memory
from rilq.converter.workdir import WorkDir
from rilq.evaluation.figures import WorstPassage
from rilq.evaluation.forward import (
    Subject,
    load_outer,
    predictions,
    run_embedding,
    run_layer,
    squared_error,
)
from rilq.evaluation.scores import Scores
from rilq.evaluation.worst import worst_passages
from rilq.formats.shard_writer import write_tensors
from rilq.formats.verify import file_hash
from rilq.progress import Reporter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCORED_TOKENS = 1 << 16  # scored between two commits: minutes for a model of 7B on a CPU


@dataclass(frozen=True)
class Measured:
    """What was measured of one checkpoint.

    Attributes:
        scores: of all windows.
        layer_errors: see `Evaluation`.
        worst: likewise.
    """

    scores: Scores
    layer_errors: tuple[float, ...] | None
    worst: tuple[WorstPassage, ...]


@dataclass(frozen=True)
class _Runner:
    """A checkpoint on its way through its layers; its units are the journal's stage `name`."""

    name: str
    subject: Subject
    tokens: Tensor
    work: WorkDir

    @property
    def layers(self) -> int:
        return len(self.subject.streamed.layers)

    @property
    def done(self) -> int:
        """Finished units: the embedding, then the layers."""
        return len(self.work.stage(self.name))

    def states(self, boundary: int) -> ActivationStore:
        """Hidden states before a decoder layer, or after the last one."""
        return self.subject.states(self.work.file(f"{self.name}-{boundary:04d}.bin"), self.tokens)


class Lockstep:
    """One evaluation inside its open work folder.

    Args:
        models: the checkpoints to measure.
        base: what they are compared with.
        tokens: `[windows, seq_len]` int64; in each window all tokens but the first are predicted.
        work: checked; what it says is finished is not done again.
    """

    def __init__(
        self,
        models: Sequence[Subject],
        base: Subject | None,
        tokens: Tensor,
        tokenizer: PreTrainedTokenizerBase,
        work: WorkDir,
        report: Reporter,
    ) -> None:
        self.tokens, self.tokenizer, self.work, self.report = tokens, tokenizer, work, report
        self.models = [
            _Runner(f"model-{number}", subject, tokens, work)
            for number, subject in enumerate(models)
        ]
        self.base = _Runner("base", base, tokens, work) if base is not None else None
        self.runners = [*([self.base] if self.base else []), *self.models]

    @torch.no_grad()
    @large_blocks_returned()
    def run(self) -> list[Measured]:
        """Do what is not done yet.

        Raises:
            RilqError: a model computes NaN or infinity.
            OutputError: the volume is full.
        """
        self._run_layers()
        self.report.stage("score", len(self.models) * len(self.tokens), "window")
        return [self._measured(number) for number in range(len(self.models))]

    # -- layers ------------------------------------------------------------------------------------

    def _run_layers(self) -> None:
        waiting = [runner for runner in self.runners if runner.done <= runner.layers]
        self.report.stage("evaluate", sum(runner.layers for runner in self.runners), "layer")
        with ExitStack() as stack:
            advance = {runner.name: stack.enter_context(_reading(runner)) for runner in waiting}
            for runner in waiting:
                self._begin(runner)
                advance[runner.name]()
            for index in range(max((runner.layers for runner in waiting), default=0)):
                for runner in waiting:
                    if runner.done == index + 1 and index < runner.layers:
                        self._run_layer(runner, index)
                        advance[runner.name]()

    def _begin(self, runner: _Runner) -> None:
        """What layers are called with, and the first hidden states; no embedding stays."""
        load_outer(runner.subject, self.tokens.shape[1])
        if not runner.done:
            states = runner.states(0)
            digest = run_embedding(runner.subject, self.tokens, states)
            self.work.commit(runner.name, "embedding", {}, passing={states.path: digest})
        runner.subject.streamed.drop_embeddings()

    def _run_layer(self, runner: _Runner, index: int) -> None:
        states, following = runner.states(index), runner.states(index + 1)
        digest = run_layer(runner.subject, index, states, following)
        facts = {}
        if self._comparable(runner):
            assert self.base is not None, "compared with a base"
            base = self.base.states(index + 1)
            facts["error"] = squared_error(following, base, runner.subject.streamed.device)
        unit = f"layer {index}"
        return_free_memory()  # else the heap grows by some megabytes from layer to layer
        self.work.commit(runner.name, unit, facts, passing={following.path: digest})
        finished = sum(max(0, each.done - 1) for each in self.runners)
        self.report.step(finished, **{k: round(v, 4) for k, v in facts.items()})

    def _comparable(self, runner: _Runner) -> bool:
        """Whether there is a base with layers and hidden states like this one's."""
        if self.base is None or runner is self.base:
            return False
        if runner.subject.is_rotated != self.base.subject.is_rotated:
            return False
        own, other = (each.subject.streamed for each in (runner, self.base))
        shapes = [(len(each.layers), each.config.hidden_size) for each in (own, other)]
        return shapes[0] == shapes[1]

    # -- scores ------------------------------------------------------------------------------------

    def _measured(self, number: int) -> Measured:
        runner, stage = self.models[number], f"score-{number}"
        pair = [runner, *([self.base] if self.base else [])]
        if not any(record.unit == "worst" for record in self.work.stage(stage)):
            for each in pair:
                _load_head(each.subject)
            self._score(pair, number)
            runner.subject.streamed.drop_embeddings()
        records = self.work.stage(stage)
        worst = [WorstPassage.from_dict(values) for values in records[-1].facts["worst"]]
        errors = [r.facts["error"] for r in self.work.stage(runner.name) if "error" in r.facts]
        return Measured(self._scores(pair, number), tuple(errors) or None, tuple(worst))

    def _score(self, pair: Sequence[_Runner], number: int) -> None:
        subjects = [runner.subject for runner in pair]
        stores = [runner.states(runner.layers) for runner in pair]
        count, seqlen = self.tokens.shape
        step = max(1, SCORED_TOKENS // seqlen)
        begun = step * len(self.work.stage(f"score-{number}"))
        for start in range(begun, count, step):
            rows = range(start, min(start + step, count))
            part = Scores.empty(
                len(rows),
                seqlen - 1,
                vocabulary=subjects[0].streamed.config.vocab_size,
                compared=len(pair) > 1,
            )
            for found, at, logits, targets in predictions(subjects, stores, self.tokens, rows):
                part.add(slice(found.start - start, found.stop - start), at, logits, targets)
                self.report.step(number * count + found.stop)
            path = self.work.file(f"score-{number}-{start:05d}.safetensors")
            write_tensors(path, part.tensors())
            unit = f"windows {start} to {rows.stop - 1}"
            self.work.commit(f"score-{number}", unit, {}, files={path: file_hash(path)})
        worst = []
        if (kl := self._scores(pair, number).kl) is not None:
            worst = worst_passages(subjects, stores, self.tokens, kl, self.tokenizer)
        self.work.commit(f"score-{number}", "worst", {"worst": [asdict(each) for each in worst]})

    def _scores(self, pair: Sequence[_Runner], number: int) -> Scores:
        parts = [
            load_file(self.work.file(name))
            for record in self.work.stage(f"score-{number}")
            for name in record.files
        ]
        vocabulary = pair[0].subject.streamed.config.vocab_size
        return Scores.joined(parts, self.tokens.shape[1] - 1, vocabulary=vocabulary)


def _reading(runner: _Runner) -> AbstractContextManager[Callable[[], None]]:
    """What is still to be read: all that is outer, then the layers that are not done."""
    streamed = runner.subject.streamed
    outer, *layers = streamed.reading_steps()
    return streamed.checkpoint.in_order([outer, *layers[max(0, runner.done - 1) :]])


def _load_head(subject: Subject) -> None:
    """Final norm and head on the device, if they are not there."""
    streamed = subject.streamed
    if streamed.model.get_output_embeddings().weight.is_meta:  # type: ignore[operator]
        streamed.load_outer(streamed.checkpoint.read(streamed.scoring_names()))
