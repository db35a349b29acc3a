"""What training minimises: how far the quantized model's end is from the full-precision one's."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rilq.converter.options import Target

# Logits that exist at once: 2^24 float32 are 64 MB, each for student, teacher and their gradients.
LOGITS = 2**24

Term = Literal["mse", "ce", "kl"]
TERMS: tuple[Term, ...] = ("mse", "ce", "kl")


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

    Args:
        tokens: `[rows, seq_len]`.
        target: the teacher's cached states of the same rows, `[rows, seq_len, hidden]`.
    """
    wanted = [term for term in TERMS if getattr(loss, term)]
    return weighted(loss_terms(model, tokens, target, loss.target, wanted), loss)


def weighted(terms: Mapping[Term, Tensor], loss: Loss) -> Tensor:
    """The loss that these terms make, a scalar."""
    parts = [getattr(loss, term) * terms[term] for term in TERMS if getattr(loss, term)]
    return torch.stack(parts).sum()


def measurable_terms(target: Target) -> tuple[Term, ...]:
    """What can be told with a cache of `target`: states before the norm feed no head."""
    return ("mse", "ce") if target == "pre-norm" else TERMS


def loss_terms(
    model: Model, tokens: Tensor, target: Tensor, compared: Target, wanted: Collection[Term]
) -> dict[Term, Tensor]:
    """Terms of the loss without their weights, each a scalar in float32; see `discrepancy`.

    The teacher's logits are computed here, from its cached states. Neither they nor the student's
    ever exist for all positions at once: with a large vocabulary the head works in chunks of
    positions, computed again in the backward pass.

    Args:
        compared: what `mse` compares.
        wanted: out of `measurable_terms(compared)`.
    """
    before, after = model.states(tokens)
    target = target.to(after.device)
    found: dict[Term, Tensor] = {}
    of_head = set(wanted)
    if "mse" in wanted and compared != "logits":
        states = before if compared == "pre-norm" else after
        found["mse"] = F.mse_loss(states.float(), target.float())
        of_head.remove("mse")
    if of_head:
        found |= _head_terms(model, after, target, tokens, [t for t in TERMS if t in of_head])
    return found


def next_token_loss(model: Model, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy of the next token, mean over all that have one; a scalar in float32.

    Args:
        hidden: states that feed the head, `[rows, seq_len, hidden]`.
        tokens: `[rows, seq_len]`.
    """
    return _head_terms(model, hidden, hidden, tokens, ["ce"])["ce"]


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


def _head_terms(
    model: Model, hidden: Tensor, target: Tensor, tokens: Tensor, wanted: Sequence[Term]
) -> dict[Term, Tensor]:
    """The terms that need logits, in chunks of positions."""
    rows, length, width = hidden.shape
    # The last position of a row predicts no token of it.
    labels = F.pad(tokens[:, 1:], (0, 1), value=-100).flatten()
    hidden, target = hidden.reshape(-1, width), target.reshape(-1, width)
    size = chunk_size(model)

    def chunk(hidden: Tensor, target: Tensor, labels: Tensor) -> Tensor:
        logits = model.logits(hidden)
        found: dict[Term, Tensor] = {}
        if "mse" in wanted or "kl" in wanted:
            with torch.no_grad():
                aim = model.logits(target)
        if "mse" in wanted:
            found["mse"] = (logits - aim).square().sum() / (rows * length * model.vocabulary)
        if "ce" in wanted or "kl" in wanted:
            log_probabilities = logits.log_softmax(-1)
        if "ce" in wanted:
            ce = F.nll_loss(log_probabilities, labels, reduction="sum")
            found["ce"] = ce / (rows * (length - 1))
        if "kl" in wanted:
            apart = F.kl_div(
                log_probabilities, aim.log_softmax(-1), log_target=True, reduction="sum"
            )
            found["kl"] = apart / (rows * length)
        return torch.stack([found[term] for term in wanted])

    pieces = list(zip(hidden.split(size), target.split(size), labels.split(size), strict=True))
    if len(pieces) == 1:
        sums = chunk(*pieces[0])
    else:
        parts = [checkpoint(chunk, *piece, use_reentrant=False) for piece in pieces]
        sums = torch.stack(parts).sum(0)
    return dict(zip(wanted, sums.unbind(), strict=True))
