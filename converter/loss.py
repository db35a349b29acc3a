"""What training minimises: how far the quantized model's end is from the full-precision one's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rilq.converter.options import Target

# Logits that exist at once: 2^24 float32 are 64 MB, each for student, teacher and their gradients.
LOGITS = 2**24


@dataclass(frozen=True)
class Loss:
    """Weights of the terms, and where hidden states are compared.

    Attributes:
        mse: of the mean squared difference from the teacher, over every element of `target`.
        ce: of the cross-entropy of the next token.
        kl: of KL(teacher || student) of the next token's distribution, mean over all positions.
        target: what `mse` compares, and what the teacher's cache holds: "post-norm", exactly what
            feeds the head; "pre-norm", the last decoder layer's output; or "logits", computed from
            the cached post-norm states.

    Source: `0.5 * mse + 0.5 * ce` after the norm is RILQ's, Lee et al. 2025 (arXiv:2412.01129),
    eq. 5 and 6 and its reference code; `kl` is common distillation.
    """

    mse: float = 0.5
    ce: float = 0.5
    kl: float = 0.0
    target: Target = "post-norm"


class Model(Protocol):
    """What a loss needs of the model in training; `Student` is one.

    Attributes:
        vocabulary: logits of each position.
    """

    vocabulary: int

    def states(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states `[rows, seq_len, hidden]` before and after the final norm."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `[..., vocabulary]` float32 of states after the norm."""
        ...


def discrepancy(model: Model, tokens: Tensor, target: Tensor, loss: Loss) -> Tensor:
    """The loss of some rows, a scalar in float32, differentiable in what `model` trains.

    The teacher's logits are computed here, from its cached states. Neither they nor the student's
    ever exist for all positions at once: with a large vocabulary the head works in chunks of
    positions, computed again in the backward pass.

    Args:
        tokens: `[rows, seq_len]`.
        target: the teacher's cached states of the same rows, `[rows, seq_len, hidden]`.
    """
    before, after = model.states(tokens)
    target = target.to(after.device)
    total = torch.zeros((), device=after.device)
    if loss.mse and loss.target != "logits":
        states = before if loss.target == "pre-norm" else after
        total = total + loss.mse * F.mse_loss(states.float(), target.float())
    if loss.ce or loss.kl or loss.target == "logits":
        total = total + _head_terms(model, after, target, tokens, loss)
    return total


def next_token_loss(model: Model, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy of the next token, mean over all that have one; a scalar in float32.

    Args:
        hidden: states that feed the head, `[rows, seq_len, hidden]`.
        tokens: `[rows, seq_len]`.
    """
    return _head_terms(model, hidden, hidden, tokens, Loss(mse=0.0, ce=1.0))


@torch.no_grad()
def logit_differences(model: Model, first: Tensor, second: Tensor) -> tuple[float, float]:
    """The largest and the mean absolute difference between the logits of two sets of states.

    Args:
        first, second: states that feed the head, `[..., hidden]`, on the model's device.
    """
    device, width = first.device, first.shape[-1]
    size = chunk_size(model)
    largest, total = torch.zeros((), device=device), torch.zeros((), device=device).double()
    for one, two in zip(
        first.reshape(-1, width).split(size), second.reshape(-1, width).split(size), strict=True
    ):
        apart = (model.logits(one) - model.logits(two)).abs()
        largest = torch.maximum(largest, apart.max())  # NaN stays NaN
        total += apart.sum(dtype=torch.float64)
    return largest.item(), total.item() / (first.numel() // width * model.vocabulary)


def chunk_size(model: Model) -> int:
    """Positions whose logits may exist at once."""
    return max(1, LOGITS // model.vocabulary)


def _head_terms(model: Model, hidden: Tensor, target: Tensor, tokens: Tensor, loss: Loss) -> Tensor:
    """The terms that need logits, in chunks of positions."""
    rows, length, width = hidden.shape
    # The last position of a row predicts no token of it.
    labels = F.pad(tokens[:, 1:], (0, 1), value=-100).flatten()
    hidden, target = hidden.reshape(-1, width), target.reshape(-1, width)
    size = chunk_size(model)

    def chunk(hidden: Tensor, target: Tensor, labels: Tensor) -> Tensor:
        logits = model.logits(hidden)
        total = torch.zeros((), device=hidden.device)
        if loss.ce:
            ce = F.cross_entropy(logits, labels, reduction="sum")
            total = total + loss.ce * ce / (rows * (length - 1))
        if loss.kl or loss.target == "logits":
            with torch.no_grad():
                wanted = model.logits(target)
            if loss.kl:
                apart = F.kl_div(
                    logits.log_softmax(-1),
                    wanted.log_softmax(-1),
                    log_target=True,
                    reduction="sum",
                )
                total = total + loss.kl * apart / (rows * length)
            if loss.target == "logits":
                apart = (logits - wanted).square().sum()
                total = total + loss.mse * apart / (rows * length * model.vocabulary)
        return total

    pieces = list(zip(hidden.split(size), target.split(size), labels.split(size), strict=True))
    if len(pieces) == 1:
        return chunk(*pieces[0])
    parts = [checkpoint(chunk, *piece, use_reentrant=False) for piece in pieces]
    return torch.stack(parts).sum()
