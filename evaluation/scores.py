"""How well windows of text are predicted, and how far from a base, token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rilq.evaluation.figures import Passages

TOP = 5


@dataclass(frozen=True)
class Scores:
    """What is kept of the predictions of consecutive windows: four bytes for each token.

    Attributes:
        loss: sum over the predicted tokens of each window, nats: `[windows]` float64.
        predicted: tokens predicted in each window.
        base_loss: the base's; None without one, as the following ones.
        kl: KL(base || this) per token, nats: `[windows, predicted]` float32.
        top1: tokens for which both think the same one most likely: `[windows]` int64.
        shared: how many of the base's most likely tokens, `TOP` for each, are among this one's:
            `[windows]` int64.
        of: how many of them were looked at: `TOP`, or the whole vocabulary if that is less.
    """

    loss: Tensor
    predicted: int
    base_loss: Tensor | None = None
    kl: Tensor | None = None
    top1: Tensor | None = None
    shared: Tensor | None = None
    of: int = TOP

    @classmethod
    def empty(cls, windows: int, predicted: int, *, vocabulary: int, compared: bool) -> Scores:
        """Of windows that nothing has been added to; `compared` with a base, or alone."""
        loss = torch.zeros(windows, dtype=torch.float64)
        if not compared:
            return cls(loss, predicted)
        return cls(
            loss,
            predicted,
            base_loss=loss.clone(),
            kl=torch.zeros(windows, predicted),
            top1=torch.zeros(windows, dtype=torch.int64),
            shared=torch.zeros(windows, dtype=torch.int64),
            of=min(TOP, vocabulary),
        )

    def add(self, windows: slice, at: int, logits: Sequence[Tensor], targets: Tensor) -> None:
        """Count the predictions of one batch.

        Args:
            windows: of the batch, counted from the first one here.
            at: position of the batch's first prediction in its window.
            logits: this model's `[windows, positions, vocabulary]` float32 and, if compared, the
                base's.
            targets: the true tokens `[windows, positions]`.
        """
        found = logits[0].log_softmax(-1)
        self.loss[windows] += _losses(found, targets)
        if self.base_loss is None:
            return
        assert self.kl is not None and self.top1 is not None and self.shared is not None
        expected = logits[1].log_softmax(-1)
        self.base_loss[windows] += _losses(expected, targets)
        agreeing = logits[0].argmax(-1) == logits[1].argmax(-1)
        self.top1[windows] += agreeing.sum(1).cpu()
        own, top = (each.topk(self.of, -1).indices for each in logits)
        self.shared[windows] += (top[..., :, None] == own[..., None, :]).sum((1, 2, 3)).cpu()
        kl = (expected - found).mul_(expected.exp_()).sum(-1)
        # Rounding can bring the sum for two equal distributions just below zero.
        self.kl[windows, at : at + targets.shape[1]] = kl.clamp_min_(0).cpu()

    @property
    def mean_loss(self) -> float:
        """Nats per predicted token."""
        return float(self.loss.sum()) / (len(self.loss) * self.predicted)

    @property
    def base_mean_loss(self) -> float:
        """The base's."""
        assert self.base_loss is not None, "there is no base"
        return float(self.base_loss.sum()) / (len(self.loss) * self.predicted)

    def tensors(self) -> dict[str, Tensor]:
        """What `joined` takes."""
        names = ("loss", "base_loss", "kl", "top1", "shared")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @classmethod
    def joined(
        cls, parts: Sequence[Mapping[str, Tensor]], predicted: int, *, vocabulary: int
    ) -> Scores:
        """Of all windows, from what `tensors` gave for consecutive parts of them."""
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return cls(predicted=predicted, of=min(TOP, vocabulary), **tensors)

    def passages(self) -> Passages:
        """The same, as the plain values that intervals are made from."""
        if self.base_loss is None:
            return Passages(self.loss.numpy(), self.predicted)
        assert self.kl is not None and self.top1 is not None and self.shared is not None
        return Passages(
            self.loss.numpy(),
            self.predicted,
            base_loss=self.base_loss.numpy(),
            kl=self.kl.half().numpy(),
            top1=self.top1.numpy(),
            top5=(self.shared.double() / self.of).numpy(),
        )


def _losses(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    """Sum of the negative log-likelihoods of each window `[windows]` float64, on the CPU."""
    likely = log_probabilities.gather(-1, targets[..., None]).squeeze(-1)
    return likely.sum(1, dtype=torch.float64).neg_().cpu()
