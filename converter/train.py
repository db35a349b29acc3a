"""RILQ's training loop, resumable to the byte."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rilq.calib.activations import ActivationStore, prefetch
from rilq.converter.loss import Loss, discrepancy, loss_terms, measurable_terms, weighted
from rilq.converter.options import Schedule
from rilq.converter.quantizers.layerwise import rate_of
from rilq.converter.ranks import ALONE, Ranks
from rilq.converter.student import Student
from rilq.errors import RilqError
from rilq.progress import Reporter

MAX_BAD_STEPS = 3
CODES_PATH = 6.0  # peak rate of codes times updates: docs/recipes.md


@dataclass(frozen=True)
class TrainOptions:
    """How to train.

    Attributes:
        learning_rate: Adam's peak learning rate of adapters.
        scales_learning_rate: of scales and minima, which are trained relative to their size.
        schedule: "decay" (see `learning_rate_at`) or "constant".
        loss: what is minimised.
        steps: updates at most.
        batch_size: rows per update.
        micro_batch: rows per forward pass; gradients add up to those of `batch_size` rows.
        val_every: updates between two validations (and two checkpoints).
        patience: validations without a gain after which training stops.
        seed: of the order of rows.
    """

    learning_rate: float
    steps: int
    scales_learning_rate: float = 1e-2
    schedule: Schedule = "decay"
    loss: Loss = Loss()
    batch_size: int = 8
    micro_batch: int = 8
    val_every: int = 25
    patience: int = 5
    seed: int = 42


@dataclass
class Progress:
    """Where training stands; with the tensors of `Trainer.tensors()` all that a resume needs.

    Attributes:
        applied: steps whose loss was finite; Adam's own count.
        history: `(step, validation loss)` of every validation.
        parts: unweighted terms of the validation loss that can be told, one for each of `history`.
        train_losses: mean training loss of every interval between validations.
        bad: steps in a row whose loss was not finite.
    """

    step: int = 0
    applied: int = 0
    best_step: int = 0
    best_loss: float = float("inf")
    stale: int = 0
    history: list[tuple[int, float]] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=dict)
    train_losses: list[float] = field(default_factory=list)
    bad: int = 0

    def as_facts(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def row_order(rows: int, seed: int) -> Iterator[int]:
    """Training rows without end: one seeded permutation after another.

    A pure function of its arguments, so a resume needs no saved random state: it skips the rows
    of the steps that are done.
    """
    epoch = 0
    while True:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        yield from torch.randperm(rows, generator=generator).tolist()
        epoch += 1


def learning_rate_at(step: int, steps: int) -> float:
    """Part of the peak rate: warm-up over a twentieth, constant to the half, linearly to zero.

    The paper keeps the rate constant for up to 1250 updates; docs/recipes.md has what the decay
    gains in 100, and why it is not a cosine.
    """
    warm = max(1, round(0.05 * steps))
    return min(1.0, (step + 1) / warm, 2 * (1 - step / steps))


class Trainer:
    """Trains adapters, scales and minima of a student against the teacher's final hidden states.

    Args:
        student: with something to train.
        tokens: `[rows, seq_len]` int64; the last `validation` rows are held out.
        targets: the teacher's final hidden states of the same rows, on disk.
        validation: number of held-out rows, at least 1.
        ranks: this process among those that share the rows of every update.
    """

    def __init__(
        self,
        student: Student,
        tokens: Tensor,
        targets: ActivationStore,
        *,
        validation: int,
        options: TrainOptions,
        ranks: Ranks = ALONE,
    ) -> None:
        self.ranks = ranks
        self.student, self.tokens, self.targets = student, tokens, targets
        self.options, self.validation = options, validation
        self.train_rows = len(tokens) - validation
        self.parameters = student.trained
        self.device = student.device
        adapters: list[nn.Parameter] = []
        scales: list[nn.Parameter] = []
        codes: list[nn.Parameter] = []
        kinds = {"a": adapters, "b": adapters, "code_shift": codes}
        for name, parameter in self.parameters.items():
            kinds.get(name.rpartition(".")[2], scales).append(parameter)
        rates = (
            (adapters, options.learning_rate),
            (scales, options.scales_learning_rate),
            (codes, rate_of(CODES_PATH, options.steps)),
        )
        self.optimizer = torch.optim.Adam(
            [{"params": part, "peak": rate} for part, rate in rates if part],
            fused=True,  # foreach makes temporaries twice as large as all that is trained
        )
        self.progress = Progress()
        self.best = {n: p.detach().cpu().clone() for n, p in self.parameters.items()}

    # -- state -------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """What is trained, Adam's moments and the best values so far, float32 on the CPU."""
        state = {f"now.{n}": p.detach().cpu() for n, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                value = self.optimizer.state.get(parameter, {}).get(moment)
                if value is not None:
                    state[f"{moment}.{name}"] = value.cpu()
        return state | {f"best.{n}": t for n, t in self.best.items()}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Continue from what `tensors()` and `progress.as_facts()` gave."""
        self.progress = Progress(**facts)
        self.progress.history = [(int(s), float(v)) for s, v in self.progress.history]
        self.best = {n: tensors[f"best.{n}"].clone() for n in self.parameters}
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[f"now.{name}"])
            if f"exp_avg.{name}" in tensors:
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(self.progress.applied), device=parameter.device),
                    "exp_avg": tensors[f"exp_avg.{name}"].to(parameter.device, copy=True),
                    "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(parameter.device, copy=True),
                }

    @torch.no_grad()
    def use_best(self) -> None:
        """Give the student the best values seen."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.best[name])

    @property
    def finished(self) -> bool:
        """All steps are done, or validation stopped gaining."""
        at_end = self.progress.step >= self.options.steps
        return at_end or self.progress.stale >= self.options.patience

    # -- the loop ----------------------------------------------------------------------------------

    def run(self, commit: Callable[[], None], report: Reporter) -> None:
        """Train to the end, calling `commit` after every validation, step 0 included.

        Raises:
            RilqError: the loss is not finite `MAX_BAD_STEPS` times in a row.
        """
        report.stage("train", self.options.steps, "step")
        if not self.progress.history:
            self._validate()
            commit()
        batches = self._batches()
        while not self.finished:
            losses = []
            stop = min(self.options.steps, self.progress.step + self.options.val_every)
            while self.progress.step < stop:
                loss, applied = self._step(next(batches))
                self.progress.bad = 0 if applied else self.progress.bad + 1
                if self.progress.bad == MAX_BAD_STEPS:
                    raise RilqError(self._diverged())
                losses.append(loss)
                self.progress.step += 1
                report.step(
                    self.progress.step, loss=round(loss, 4), best=round(self.progress.best_loss, 4)
                )
            self.progress.train_losses.append(sum(losses) / len(losses))
            self._validate()
            commit()

    def _step(self, batch: list[tuple[Tensor, Tensor]]) -> tuple[float, bool]:
        """One update; the loss, and whether it was finite and so applied."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * self._rate(self.progress.step)
        self._clear_gradients()
        total = 0.0
        for tokens, target in batch:
            total += self._add_gradients(tokens, target)
        total = self.ranks.total(total)
        self.ranks.add_gradients(list(self.parameters.values()))
        self._fill_gradients()  # of experts that no token chose: Adam counts one step
        finite = total == total and abs(total) != float("inf")
        if finite:
            self.optimizer.step()
            self.progress.applied += 1
        return total, finite

    def _add_gradients(self, tokens: Tensor, target: Tensor) -> float:
        """Add a micro-batch's gradients, and return its share of the loss.

        In a function of its own so that its graph is gone at the end: beside the next one's, the
        nodes that are left would break up the heap of a process on a CPU (docs/log.md).
        """
        share = len(tokens) / self.options.batch_size
        loss = discrepancy(self.student, tokens, target, self.options.loss) * share
        loss.backward()
        return loss.item()

    def _clear_gradients(self) -> None:
        """On a CPU they stay where they are: made anew, they would break up the heap's free blocks.

        Of layers on a GPU, the host's would be added to instead of replaced.
        """
        on_cpu = self.device.type == "cpu"
        self.optimizer.zero_grad(set_to_none=not on_cpu)
        if on_cpu:
            self._fill_gradients()

    def _fill_gradients(self) -> None:
        """Zeros where there is no gradient."""
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def _rate(self, step: int) -> float:
        if self.options.schedule == "constant":
            return 1.0
        return learning_rate_at(step, self.options.steps)

    def _batches(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Micro-batches of every update from the current step on, read one update ahead."""
        order = row_order(self.train_rows, self.options.seed)
        size, micro = self.options.batch_size, self.options.micro_batch
        for _ in range(self.progress.step * size):
            next(order)

        def read(rows: list[int]) -> list[tuple[Tensor, Tensor]]:
            parts = [rows[i : i + micro] for i in range(0, len(rows), micro)]
            return [(self.tokens[part], self.targets.gather(part)) for part in parts]

        def reads() -> Iterator[Callable[[], list[tuple[Tensor, Tensor]]]]:
            while True:
                drawn = [next(order) for _ in range(size)]
                yield partial(read, [drawn[place] for place in self.ranks.share(size)])

        for batch in prefetch(reads()):
            yield [(t.to(self.device), h.to(self.device, non_blocking=True)) for t, h in batch]

    @torch.no_grad()
    def _validate(self) -> None:
        """Measure the held-out loss and keep the values if they are the best so far."""
        losses, progress = self._validation_losses(), self.progress
        loss = losses.pop("total")
        for term, value in losses.items():
            progress.parts.setdefault(term, []).append(value)
        progress.history.append((progress.step, loss))
        if loss < progress.best_loss:
            progress.best_loss, progress.best_step, progress.stale = loss, progress.step, 0
            for name, parameter in self.parameters.items():
                self.best[name].copy_(parameter)
        else:
            progress.stale += 1

    def _validation_losses(self) -> dict[str, float]:
        return validation_losses(
            self.student,
            self.tokens,
            self.targets,
            rows=range(self.train_rows, len(self.tokens)),
            batch=self.options.micro_batch,
            loss=self.options.loss,
            device=self.device,
            ranks=self.ranks,
        )

    def _diverged(self) -> str:
        return (
            f"training diverged: the loss is not finite {MAX_BAD_STEPS} times in a row at step "
            f"{self.progress.step}; no such step was applied\n"
            f"  the best values, of step {self.progress.best_step}, are in the work folder; run "
            f"again in a new one with a smaller --lr than {self.options.learning_rate:g} and a "
            f"smaller --scales-lr than {self.options.scales_learning_rate:g}"
        )


@torch.no_grad()
def validation_losses(
    student: Student,
    tokens: Tensor,
    targets: ActivationStore,
    *,
    rows: range,
    batch: int,
    loss: Loss,
    device: torch.device,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """The loss ("total") and its terms without their weights, of one forward pass.

    All are means over consecutive `rows`, `batch` of them at a time, shared between processes;
    terms without a weight are told too.
    """
    totals: dict[str, float] = {}
    wanted = measurable_terms(loss.target)
    share = ranks.share(len(rows))
    mine = rows[share.start : share.stop]
    for start in range(mine.start, mine.stop, batch):
        stop = min(start + batch, mine.stop)
        part = tokens[start:stop].to(device)
        terms = loss_terms(student, part, targets.read(start, stop), loss.target, wanted)
        for name, value in [("total", weighted(terms, loss)), *terms.items()]:
            totals[name] = totals.get(name, 0.0) + value.item() * (stop - start)
    shares = ranks.gather(totals)
    names = next(filter(None, shares))  # of a process that had any rows
    return {name: sum(each.get(name, 0.0) for each in shares) / len(rows) for name in names}
