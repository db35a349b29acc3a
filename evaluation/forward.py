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
from rilq.evaluation.divergence import DivergenceSum
from rilq.evaluation.lora import PeftAdapter
from rilq.progress import Reporter

LAYER_TOKENS = 4096  # tokens that run through a layer at once; more gains nothing on a CPU
LOGITS = 1 << 25  # logits of one model at once: 128 MB, and some six times that in a comparison


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

    def states_bytes(self, tokens: int) -> int:
        """Bytes of the hidden states of so many tokens at one layer boundary."""
        return int(tokens * self.streamed.config.hidden_size * self.streamed.dtype.itemsize)


@torch.no_grad()
def measure(
    subjects: Sequence[Subject], tokens: Tensor, folder: Path, report: Reporter
) -> tuple[list[float], DivergenceSum | None]:
    """Run each subject up to its last decoder layer, then score all of them side by side.

    Args:
        subjects: the one to measure and, for a comparison, its base.
        tokens: `[rows, seq_len]` int64; in each row all tokens but the first are predicted.
        folder: an empty one, for the hidden states.

    Returns:
        Mean loss per predicted token of each subject, in nats, and how the first diverges from
        the second.

    Raises:
        RilqError: a model computes NaN or infinity.
        OutputError: the volume is full.
    """
    stores: list[ActivationStore] = []
    for subject, stage in zip(subjects, ("evaluate", "evaluate base"), strict=False):
        report.stage(stage, len(subject.streamed.layers), "layer")
        place = folder / f"model-{len(stores)}"
        place.mkdir()
        stores.append(last_states(subject, tokens, place, report))
    report.stage("score", len(tokens), "window")
    totals, scored = [0.0] * len(subjects), 0
    divergence = DivergenceSum() if len(subjects) > 1 else None
    for rows, logits, targets in predictions(subjects, stores, tokens):
        for number, each in enumerate(logits):
            losses = F.cross_entropy(each.flatten(0, 1), targets.flatten(), reduction="none")
            totals[number] += losses.sum(dtype=torch.float64).item()
        if divergence is not None:
            divergence.add(base=logits[1], logits=logits[0])
        scored += targets.numel()
        report.step(rows, loss=round(totals[0] / scored, 4))
    means = [_checked(t / scored, s) for t, s in zip(totals, subjects, strict=True)]
    return means, divergence


def _checked(loss: float, subject: Subject) -> float:
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
        streamed.load_outer(checkpoint.read(streamed.outer_names()))
        streamed.check_tied()
        advance()
        streamed.prepare(tokens.shape[1])
        batches = tokens.split(max(1, LAYER_TOKENS // tokens.shape[1]))
        shape = (*tokens.shape, streamed.config.hidden_size)
        states = ActivationStore(folder / "embedding.bin", shape, streamed.dtype)
        _write(states, map(streamed.embed, batches), f"{subject.label}: embedding")
        for index in range(len(streamed.layers)):
            following = ActivationStore(folder / f"layer-{index}.bin", shape, streamed.dtype)
            _run_layer(subject, index, states, following)
            advance()
            states.delete()
            states = following
            report.step(index + 1)
    return states


def _run_layer(
    subject: Subject, index: int, states: ActivationStore, following: ActivationStore
) -> None:
    """One decoder layer from file to file; it is in memory only meanwhile."""
    streamed, adapter = subject.streamed, subject.adapter
    tensors = streamed.read_layer(index)
    with (
        streamed.loaded(index, tensors),
        adapter.applied(streamed, index) if adapter else nullcontext(),
    ):
        outputs = (
            streamed.run(index, batch.to(streamed.device))
            for _, batch in states.batches(max(1, LAYER_TOKENS // states.shape[1]))
        )
        _write(following, outputs, f"{subject.label}: decoder layer {index}")


def _write(store: ActivationStore, batches: Iterable[Tensor], label: str) -> None:
    with ActivationWriter(store.path, store.shape, store.dtype, label=label) as writer:
        for batch in batches:
            writer.append(batch)


def predictions(
    subjects: Sequence[Subject], stores: Sequence[ActivationStore], tokens: Tensor
) -> Iterator[tuple[int, list[Tensor], Tensor]]:
    """All predictions, a bounded number at a time.

    Norm and head work on each token by itself, so a row can be cut anywhere.

    Yields:
        Number of rows that are complete with this batch; logits of each subject
        `[rows, positions, vocabulary]` float32; the true tokens `[rows, positions]`.
    """
    device, last = subjects[0].streamed.device, tokens.shape[1] - 1
    room = max(1, LOGITS // subjects[0].streamed.config.vocab_size)  # tokens
    rows, span = max(1, room // last), min(room, last)
    for batches in zip(*(store.batches(rows) for store in stores), strict=True):
        start, hidden = batches[0][0], [batch.to(device) for _, batch in batches]
        stop = start + len(hidden[0])
        for at in range(0, last, span):
            end = min(at + span, last)
            logits = [
                subject.streamed.logits(states[:, at:end])
                for subject, states in zip(subjects, hidden, strict=True)
            ]
            targets = tokens[start:stop, at + 1 : end + 1].to(device)
            yield stop if end == last else start, logits, targets
