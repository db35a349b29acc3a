"""All that `rilq eval` measures: text by streaming, and what needs the model loaded whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rilq.calib.tokenizer import load_tokenizer
from rilq.converter.machine import measure_machine
from rilq.errors import OptionError, RilqError, one_line
from rilq.evaluation.figures import Evaluation, Generation, Passages, TaskFigure
from rilq.evaluation.generations import (
    DEFAULT_NEW_TOKENS,
    check_lengths,
    compared,
    continuations,
)
from rilq.evaluation.perplexity import DEFAULT_TEXT, check_dtype, measure_texts
from rilq.evaluation.speed import measure_speed
from rilq.evaluation.tasks import LoadedTasks, load_tasks, run_tasks
from rilq.evaluation.whole import Place
from rilq.progress import Reporter, SilentReporter

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def evaluate_with_passages(
    model: str,
    text: str = DEFAULT_TEXT,
    *,
    seqlen: int | None = None,
    against: str | None = None,
    tasks: Sequence[str] = (),
    num_fewshot: int | None = None,
    limit: int | None = None,
    task_path: Path | None = None,
    prompts: Sequence[str] = (),
    max_new_tokens: int = DEFAULT_NEW_TOKENS,
    speed: bool = True,
    device: str = "auto",
    dtype: str = "auto",
    work: Path | None = None,
    resume: str = "auto",
    revision: str | None = None,
    against_revision: str | None = None,
    text_key: str = "text",
    report: Reporter = SilentReporter(),  # noqa: B008 - stateless
) -> tuple[Evaluation, Passages]:
    """Measure a checkpoint, dense or converted.

    Perplexity and the comparison with a base stream both models layer by layer, so neither needs to
    fit into memory. Tasks, prompts and speed load the model whole with transformers; what is asked
    for is checked before the streaming begins.

    Args:
        model: a folder, or `owner/name` on the Hub. A LoRA that lies beside a converted checkpoint
            is applied.
        text: a file, `c4`, `wikitext2` or `owner/name` on the Hub; see `rilq.calib.sources`.
        seqlen: tokens per window; None takes 2048, or what the model is made for if that is less.
        against: a checkpoint with the same tokens, to compare with: folder or `owner/name`.
        tasks: of lm-evaluation-harness: names, patterns, or paths of YAML files.
        num_fewshot: examples in each prompt of a task; None for the task's own number.
        limit: samples of each task; None for all.
        task_path: folder with further tasks.
        prompts: texts that model and base continue, greedily.
        max_new_tokens: after each prompt, at most.
        speed: time the loaded model too, and take its peak memory.
        device: "auto", "cpu", "cuda" or "cuda:1".
        dtype: to compute in. "auto" streams in float32 on a CPU and in bfloat16 elsewhere, and
            loads whole as the checkpoint is stored.
        work: folder from which a stopped run goes on; None for a temporary one. It keeps what is
            streamed; tasks, prompts and speed begin anew.
        resume: "auto", "never" or "required".
        revision, against_revision: of `model` and `against` on the Hub.
        text_key: of the text in JSON, parquet and Hub records.
        report: receives progress.

    Returns:
        The figures, and those of the text window by window.

    Raises:
        InputError: before any work, for what cannot succeed.
        RilqError: the model computes NaN or infinity, or the work failed.
    """
    check_dtype(dtype)
    place = Place(model, revision, device, dtype)
    base = None if against is None else Place(against, against_revision, device, dtype)
    _check_tasks(tasks, num_fewshot, limit, task_path)
    if tasks or prompts:
        measure_machine(device)  # refuses a device that there is not
        checkpoint = place.check_room("--tasks" if tasks else "--prompts")
        if base is not None and prompts:
            base.check_room("--prompts")
        positions = checkpoint.config.get("max_position_embeddings")
        check_lengths(prompts, load_tokenizer(checkpoint), max_new_tokens, positions)
    whole = _Whole(
        place,
        base,
        load_tasks(tasks, task_path) if tasks else None,
        num_fewshot,
        limit,
        prompts,
        max_new_tokens,
        speed,
        report,
    )
    (found,) = measure_texts(
        [model],
        text,
        seqlen=seqlen,
        against=against,
        device=device,
        dtype=dtype,
        work=work,
        resume=resume,
        revision=revision,
        against_revision=against_revision,
        text_key=text_key,
        complete=whole.added_to,
        report=report,
    )
    return found


@dataclass(frozen=True)
class _Whole:
    """What is measured of models that are loaded whole, one at a time.

    Attributes:
        base: continues the prompts too; None without one.
        tasks: None without any.
        num_fewshot, limit, prompts, max_new_tokens, speed: as of `evaluate_with_passages`.
    """

    place: Place
    base: Place | None
    tasks: LoadedTasks | None
    num_fewshot: int | None
    limit: int | None
    prompts: Sequence[str]
    max_new_tokens: int
    speed: bool
    report: Reporter

    def added_to(self, figures: Evaluation) -> Evaluation:
        """Figures of a text, and those of prompts, tasks and speed."""
        written = self._written_by_base()
        generations, scores = self._generations_and_scores(written)
        timed = measure_speed(self.place, self.report) if self.speed else None
        return replace(figures, tasks=scores, generations=generations, speed=timed)

    def _written_by_base(self) -> list[list[int]] | None:
        """The tokens that the base puts after each prompt; None if it is not asked."""
        if self.base is None or not self.prompts:
            return None
        with _in_memory(self.base) as (model, tokenizer):
            written = self._continuations(model, tokenizer, "base")
            del model  # else its memory would not be free when the next one is loaded
        return written

    def _generations_and_scores(
        self, written: list[list[int]] | None
    ) -> tuple[tuple[Generation, ...], tuple[TaskFigure, ...]]:
        """What the model writes after each prompt, beside what the base wrote; and its tasks."""
        scores: tuple[TaskFigure, ...] = ()
        if not self.prompts and self.tasks is None:
            return (), scores
        with _in_memory(self.place) as (model, tokenizer):
            own = self._continuations(model, tokenizer, "model")
            generations = tuple(
                compared(prompt, own[i], None if written is None else written[i], tokenizer)
                for i, prompt in enumerate(self.prompts)
            )
            if self.tasks is not None:
                scores = run_tasks(
                    self.tasks,
                    model,
                    tokenizer,
                    num_fewshot=self.num_fewshot,
                    limit=self.limit,
                    report=self.report,
                )
            del model
        return generations, scores

    def _continuations(
        self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, name: str
    ) -> list[list[int]]:
        return continuations(self.prompts, model, tokenizer, self.max_new_tokens, name, self.report)


def _check_tasks(
    tasks: Sequence[str], num_fewshot: int | None, limit: int | None, task_path: Path | None
) -> None:
    given = {"--num-fewshot": num_fewshot, "--limit": limit, "--task-path": task_path}
    alone = [name for name, value in given.items() if value is not None]
    if alone and not tasks:
        raise OptionError(f"{', '.join(alone)}: for tasks, and none is named\n  add --tasks NAME")
    if num_fewshot is not None and num_fewshot < 0:
        raise OptionError(f"--num-fewshot {num_fewshot}: expected 0 or more")
    if limit is not None and limit < 1:
        raise OptionError(f"--limit {limit}: expected 1 or more")


@contextmanager
def _in_memory(
    place: Place,
) -> Iterator[tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]]:
    try:
        with place.loaded() as found:
            yield found
    except (MemoryError, torch.OutOfMemoryError) as err:
        raise RilqError(
            f"memory ran out with {place.model} loaded as a whole: {one_line(err)}\n"
            "  close other programs, or leave --tasks and --prompts out"
        ) from err
