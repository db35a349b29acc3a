"""What a comparison measures: which checkpoints, on which text, against which base."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from rilq.evaluation.rules import AGAINST_BASE
from rilq.formats.checkpoint import SOURCE_DTYPES, Checkpoint
from rilq.formats.fp8 import open_source_checkpoint
from rilq.formats.hub import open_source
from rilq.formats.verify import MANIFEST_NAME
from rilq.progress import Reporter
from rilq.records.evaluation import measured_run
from rilq.records.run import Run

_ALWAYS = (
    *("perplexity", "bits_per_byte", "bits_per_weight", "size_bytes"),
    *("activation_bits", "cache_bits"),
)


@dataclass(frozen=True)
class Question:
    """What is measured of every checkpoint; the fields are those of `measure_texts`."""

    text: str
    text_key: str
    seqlen: int | None
    against: str | None
    against_revision: str | None
    device: str
    dtype: str

    @property
    def figures(self) -> tuple[str, ...]:
        """Names of those that it gives, if the text's bytes are known."""
        return _ALWAYS if self.against is None else (*_ALWAYS, *AGAINST_BASE)


@dataclass(frozen=True)
class Target:
    """A checkpoint to compare, and what a record says of it.

    Attributes:
        name: as the user wrote it, a folder or `owner/name` on the Hub.
        run: of an evaluation that has not begun.
    """

    name: str
    checkpoint: Checkpoint
    run: Run

    @property
    def converted(self) -> bool:
        """Whether it has a `rilq.json`, by which its content is known."""
        return bool(self.run.recipe)

    @property
    def base(self) -> tuple[str, str] | None:
        """Name and commit of the model on the Hub that it was made from; None if there is none."""
        source = (self.checkpoint.read_json(MANIFEST_NAME) or {}).get("source", {})
        commit = source.get("commit") if self.converted else None
        return (self.run.model, str(commit)) if commit else None


def open_target(name: str) -> Target:
    """Read the headers of a checkpoint, dense or converted.

    Raises:
        InputError: it is no checkpoint, or cannot be had.
    """
    run = measured_run(name)
    # int32: the packed codes of a converted checkpoint.
    checkpoint = open_source_checkpoint(open_source(name), dtypes=SOURCE_DTYPES | {torch.int32})
    return Target(name, checkpoint, run)


def ask(
    targets: Collection[Target],
    text: str,
    text_key: str,
    seqlen: int | None,
    against: str | None,
    device: str,
    dtype: str,
    report: Reporter,
) -> Question:
    """What to measure, the base found."""
    commit = None
    if against == "none":
        against = None
    elif against is None:
        bases = {target.base for target in targets if target.base is not None}
        if len(bases) == 1:
            against, commit = bases.pop()
        else:
            report.note(
                f"{MANIFEST_NAME} names {'several bases' if bases else 'no base on the Hub'}: KL "
                "and agreement are left out; --against BASE adds them"
            )
    return Question(text, text_key, seqlen, against, commit, device, dtype)
