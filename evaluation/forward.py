"""Checkpoints run over token rows layer by layer, from file to file, up to what they predict."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from rilq.calib.activations import ActivationStore, ActivationWriter
from rilq.converter.layers import StreamedModel
from rilq.errors import RilqError
from rilq.evaluation.lora import PeftAdapter
from rilq.formats.resq.config import ResqConfig
from rilq.progress import Reporter

LAYER_TOKENS = 4096  # tokens that run through a layer at once; more gains nothing on a CPU
LOGITS = 1 << 23  # logits of one model at once: 32 MB, and some six times that in a comparison


@dataclass(frozen=True)
class Subject:
    """A checkpoint about to run, and the LoRA beside it."""

    streamed: StreamedModel
    adapter: PeftAdapter | None

    @property
    def label(self) -> str:
        """What messages call the checkpoint."""
        return self.streamed.checkpoint.source.label

    @property
    def size_bytes(self) -> int:
        """Bytes of all weight files, the adapter's included."""
        headers = list(self.streamed.checkpoint.headers.values())
        if self.adapter is not None:
            headers.append(self.adapter.header)
        return sum(header.file_size for header in headers)

    @property
    def is_rotated(self) -> bool:
        """Whether its hidden states are those of its source turned by an orthogonal matrix."""
        quantization = self.streamed.quantization
        if isinstance(quantization, ResqConfig):
            return "A" in quantization.rotations
        return quantization is not None and bool(quantization.recipe.get("rotate"))

    def states(self, path: Path, tokens: Tensor) -> ActivationStore:
        """Hidden states of token rows `[rows, seq_len]` at one layer boundary, in this file."""
        shape = (*tokens.shape, self.streamed.config.hidden_size)
        return ActivationStore(path, shape, self.streamed.dtype)


@torch.no_grad()
def mean_loss(subject: Subject, tokens: Tensor, folder: Path, report: Reporter) -> float:
    """Mean negative log-likelihood of a checkpoint alone, in nats per predicted token.

    Args:
        tokens: `[rows, seq_len]` int64; in each row all tokens but the first are predicted.
        folder: an empty one, for the hidden states.

    Raises:
        RilqError: the model computes NaN or infinity.
        OutputError: the volume is full.
    """
    report.stage("evaluate", len(subject.streamed.layers), "layer")
    states = last_states(subject, tokens, folder, report)
    total = 0.0
    for _, _, (logits,), targets in predictions([subject], [states], tokens):
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        total += losses.sum(dtype=torch.float64).item()
    return checked_loss(total / tokens[:, 1:].numel(), subject)


def checked_loss(loss: float, subject: Subject) -> float:
    """The mean loss of a checkpoint, if it is a number that has an exponential.

    Raises:
        RilqError: it is not.
    """
    if not loss < 700:  # exp ends near 709; NaN is not below anything
        raise RilqError(
            f"{subject.label}: the loss is {loss} nats per token in {subject.streamed.dtype}\n"
            "  run again with --dtype float32; if that does not help, the model itself is broken"
        )
    return loss


def last_states(
    subject: Subject, tokens: Tensor, folder: Path, report: Reporter
) -> ActivationStore:
    """The last decoder layer's output on disk; embedding and head stay on the device."""
    streamed, checkpoint = subject.streamed, subject.streamed.checkpoint
    with checkpoint.in_order(streamed.reading_steps()) as advance:
        load_outer(subject, tokens.shape[1])
        advance()
        states = subject.states(folder / "embedding.bin", tokens)
        run_embedding(subject, tokens, states)
        for index in range(len(streamed.layers)):
            following = subject.states(folder / f"layer-{index}.bin", tokens)
            run_layer(subject, index, states, following)
            advance()
            states.delete()
            states = following
            report.step(index + 1)
    return states


def load_outer(subject: Subject, seqlen: int) -> None:
    """Embedding, final norm and head on the device, ready for rows of `seqlen` tokens."""
    streamed = subject.streamed
    streamed.load_outer(streamed.checkpoint.read(streamed.outer_names()))
    streamed.check_tied()
    streamed.prepare(seqlen)


def run_embedding(subject: Subject, tokens: Tensor, states: ActivationStore) -> str:
    """Write the first hidden states of token rows; gives the file's xxh3."""
    batches = map(subject.streamed.embed, tokens.split(_rows_at_once(states)))
    return _write(states, batches, f"{subject.label}: embedding")


def run_layer(
    subject: Subject, index: int, states: ActivationStore, following: ActivationStore
) -> str:
    """One decoder layer from file to file, in memory only meanwhile; gives the file's xxh3."""
    streamed, adapter = subject.streamed, subject.adapter
    tensors = streamed.read_layer(index)
    with (
        streamed.loaded(index, tensors),
        adapter.applied(streamed, index) if adapter else nullcontext(),
    ):
        outputs = (
            streamed.run(index, batch.to(streamed.device))
            for _, batch in states.batches(_rows_at_once(states))
        )
        return _write(following, outputs, f"{subject.label}: decoder layer {index}")


def squared_error(states: ActivationStore, base: ActivationStore, device: torch.device) -> float:
    """`|h - h_base|^2 / |h_base|^2` over all hidden states of one layer boundary."""
    size, apart, whole = _rows_at_once(states), 0.0, 0.0
    for (_, own), (_, other) in zip(states.batches(size), base.batches(size), strict=True):
        expected = other.to(device).float()
        difference = own.to(device).float().sub_(expected)
        apart += difference.square_().sum(dtype=torch.float64).item()
        whole += expected.square().sum(dtype=torch.float64).item()
    return apart / whole if whole else 0.0


def _rows_at_once(states: ActivationStore) -> int:
    return max(1, LAYER_TOKENS // states.shape[1])


def _write(store: ActivationStore, batches: Iterable[Tensor], label: str) -> str:
    with ActivationWriter(store.path, store.shape, store.dtype, label=label) as writer:
        for batch in batches:
            writer.append(batch)
    return writer.digest


def predictions(
    subjects: Sequence[Subject],
    stores: Sequence[ActivationStore],
    tokens: Tensor,
    rows: range | None = None,
) -> Iterator[tuple[slice, int, list[Tensor], Tensor]]:
    """Predictions in order, a bounded number at a time.

    Norm and head work on each token by itself, so a row can be cut anywhere.

    Args:
        subjects: with norm and head on the device.
        stores: the last decoder layer's output of each.
        tokens: `[rows, seq_len]` int64.
        rows: consecutive ones; None for all.

    Yields:
        Rows of the batch; its first position; logits of each subject `[rows, positions,
        vocabulary]` float32; the true tokens `[rows, positions]`.
    """
    device, last = subjects[0].streamed.device, tokens.shape[1] - 1
    room = max(1, LOGITS // subjects[0].streamed.config.vocab_size)  # tokens
    size, span = max(1, room // last), min(room, last)
    for batches in zip(*(store.batches(size, rows) for store in stores), strict=True):
        start, hidden = batches[0][0], [batch.to(device) for _, batch in batches]
        chosen = slice(start, start + len(hidden[0]))
        for at in range(0, last, span):
            end = min(at + span, last)
            logits = [
                subject.streamed.logits(states[:, at:end])
                for subject, states in zip(subjects, hidden, strict=True)
            ]
            yield chosen, at, logits, tokens[chosen, at + 1 : end + 1].to(device)
