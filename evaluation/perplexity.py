"""Perplexity of any checkpoints, with one decoder layer's weights in memory at a time.

The text is cut into windows that do not overlap, and each window's tokens but the first are
predicted. Hidden states lie on disk between the layers, so a checkpoint larger than memory can be
measured, and a run that was stopped goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import torch
from safetensors.torch import load_file
from torch import Tensor

from rilq.calib.dataset import FIELD_SEQLEN, evaluation_rows
from rilq.calib.sources import describe_source, parse_source
from rilq.calib.tokenizer import check_vocabulary, load_tokenizer
from rilq.converter.job import versions
from rilq.converter.layers import StreamedModel
from rilq.converter.machine import Machine, measure_machine, memory_errors_explained
from rilq.converter.workdir import Resume, WorkDir, open_workdir
from rilq.errors import CheckpointError, OptionError
from rilq.evaluation.average_bits import activation_bits, bits_per_weight, cache_bits
from rilq.evaluation.divergence import divergence
from rilq.evaluation.figures import Evaluation, Passages
from rilq.evaluation.forward import Subject, checked_loss
from rilq.evaluation.identity import (
    check_place,
    check_unchanged,
    identity,
    pinned,
    signatures,
)
from rilq.evaluation.lockstep import Lockstep, Measured
from rilq.evaluation.lora import find_adapter
from rilq.evaluation.scratch import check_room, states_bytes, temporary_folder
from rilq.formats.checkpoint import SOURCE_DTYPES
from rilq.formats.fp8 import open_source_checkpoint
from rilq.formats.hub import open_source
from rilq.formats.shard_writer import write_tensors
from rilq.formats.verify import file_hash
from rilq.progress import Reporter, SilentReporter

DEFAULT_TEXT = "wikitext2"  # the field's test text, in its standard windows

_DTYPES = ("auto", "float32", "bfloat16", "float16")


def measure_texts(
    models: Sequence[str],
    text: str,
    *,
    seqlen: int | None = None,
    against: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    work: Path | None = None,
    resume: str = "auto",
    revision: str | None = None,
    against_revision: str | None = None,
    text_key: str = "text",
    complete: Callable[[Evaluation], Evaluation] = lambda figures: figures,
    report: Reporter = SilentReporter(),  # noqa: B008 - stateless
) -> list[tuple[Evaluation, Passages]]:
    """Measure checkpoints, dense or converted, on the same rows of a text.

    On disk are the hidden states of one layer boundary of each, the base's too, and of one more. In
    memory are one decoder layer, embedding and head of two models, one batch, and some bytes for
    each token.

    Args:
        models: folders, or `owner/name` on the Hub. A LoRA that lies beside a converted checkpoint
            is applied. The first one's tokenizer makes the rows.
        text: a file, `c4`, `wikitext2` or `owner/name` on the Hub; see `rilq.calib.sources`.
        seqlen: tokens per window; None takes 2048, or what the models are made for if that is less.
        against: a checkpoint with the same tokens, to compare with: folder or `owner/name`.
        device: "auto", "cpu", "cuda" or "cuda:1".
        dtype: to compute in: "auto" is float32 on a CPU and bfloat16 elsewhere.
        work: folder for hidden states and what is finished, from which a stopped run goes on; it is
            removed at the end. None for a temporary one, of which nothing is kept.
        resume: "auto", "never" or "required"; see `open_workdir`.
        revision, against_revision: of `models` and `against` on the Hub.
        text_key: of the text in JSON, parquet and Hub records.
        complete: adds to a model's figures what is measured otherwise. The work folder stays until
            then, so if it is stopped, the streaming is not done again.
        report: receives progress.

    Returns:
        For each model its figures, and the same by window.

    Raises:
        InputError: before any work, for what cannot succeed.
        RilqError: a model computes NaN or infinity.
    """
    names = [*models, *([] if against is None else [against])]
    revisions = [*(revision for _ in models), *([] if against is None else [against_revision])]
    machine = measure_machine(device)
    subjects = [
        _open(name, machine, dtype, revision, report)
        for name, revision in zip(names, pinned(work, resume, names, revisions), strict=True)
    ]
    base = subjects[-1] if against is not None else None
    length = _check_together(subjects, seqlen)
    fingerprint = {
        "--text": describe_source(parse_source(text)),
        "--text-key": text_key,
        "--seqlen": length,
        "--against": against is not None,
        "--device": str(machine.device),
        "--dtype": _dtype(subjects[0]),
        **{f"version of {name}": version for name, version in versions().items()},
    }
    for number, (name, subject) in enumerate(zip(names, subjects, strict=True)):
        fingerprint |= identity(number, name, subject)
    with (
        _place(work, subjects) as place,
        _opened_work(place, fingerprint, subjects, _resume(resume), report) as folder,
    ):
        rows = _rows(folder, subjects[0], text, length, text_key, report)
        _check_room(folder, subjects, rows.tokens, len(models) if base is not None else 0)
        tokenizer = load_tokenizer(subjects[0].streamed.checkpoint)
        chosen = subjects[: len(models)]
        with memory_errors_explained(
            lambda: f"after {folder.last_unit} of {place}", "with a lower --seqlen"
        ):
            measured = Lockstep(chosen, base, rows.tokens, tokenizer, folder, report).run()
        for subject in subjects:
            subject.streamed.drop_embeddings()
        found = [
            (complete(_evaluation(subject, base, each, rows)), each.scores.passages())
            for subject, each in zip(chosen, measured, strict=True)
        ]
        folder.remove()
    return found


def _resume(word: str) -> Resume:
    if word not in get_args(Resume):
        raise OptionError(f"--resume {word}: expected {', '.join(get_args(Resume))}")
    return cast(Resume, word)


@contextmanager
def _place(work: Path | None, subjects: Sequence[Subject]) -> Iterator[Path]:
    """The work folder's path; that of a temporary one if none is named."""
    if work is not None:
        check_place(work, subjects)
        yield work
        return
    with temporary_folder() as folder:
        yield folder / "work"


@contextmanager
def _opened_work(
    place: Path,
    fingerprint: Mapping[str, Any],
    subjects: Sequence[Subject],
    resume: Resume,
    report: Reporter,
) -> Iterator[WorkDir]:
    """The work folder, checked, as are the checkpoints that a stopped run has read."""
    begun = {"files": signatures(subjects)}
    with (
        open_workdir(place, fingerprint, begun, resume=resume, report=report) as work,
        _removed_if_fruitless(work),
    ):
        work.check_files(report)
        work.remove_strays(report)
        if work.records:
            report.note(f"continuing after {work.last_unit} of {place}")
            check_unchanged(work, subjects)
        yield work


@contextmanager
def _removed_if_fruitless(work: WorkDir) -> Iterator[None]:
    """Leave no work folder behind where nothing but the rows was made."""
    try:
        yield
    except BaseException:
        if all(record.stage == "rows" for record in work.records):
            work.remove()
        raise


def _check_room(work: WorkDir, subjects: Sequence[Subject], tokens: Tensor, compared: int) -> None:
    """That states and scores fit on the volume, besides those that are there.

    Args:
        compared: models with a base, of which a KL in float32 is kept for each token.
    """
    there = sum(f.stat().st_size for p in ("*.bin", "score-*") for f in work.path.glob(p))
    check_room(work.path, states_bytes(subjects, tokens) + 4 * tokens.numel() * compared - there)


@dataclass(frozen=True)
class _Text:
    """Token rows `[windows, seq_len]`, and what is known of them; see `Rows`."""

    tokens: Tensor
    digest: str
    notes: tuple[str, ...]
    sources: tuple[str, ...]
    text_bytes: int | None


def _rows(
    work: WorkDir, subject: Subject, text: str, seqlen: int, text_key: str, report: Reporter
) -> _Text:
    """The windows, cut once and kept: a stopped run needs no network to go on."""
    path = work.file("rows.safetensors")
    if not work.stage("rows"):
        tokenizer = load_tokenizer(subject.streamed.checkpoint)
        rows = evaluation_rows(parse_source(text), tokenizer, seqlen=seqlen, text_key=text_key)
        check_vocabulary(rows.tokens, subject.streamed.config.vocab_size, subject.label)
        write_tensors(path, {"tokens": rows.tokens})
        facts = {k: v for k, v in vars(rows).items() if k != "tokens"}
        work.commit("rows", "rows", facts, files={path: file_hash(path)})
    facts = work.stage("rows")[0].facts
    for note in facts["notes"]:
        report.note(note)
    return _Text(
        load_file(path)["tokens"],
        facts["digest"],
        tuple(facts["notes"]),
        tuple(facts["sources"]),
        facts["text_bytes"],
    )


def _evaluation(
    subject: Subject, base: Subject | None, measured: Measured, text: _Text
) -> Evaluation:
    scores, (windows, seqlen) = measured.scores, text.tokens.shape
    loss = checked_loss(scores.mean_loss, subject)
    against = None
    if base is not None:
        against = divergence(scores, math.exp(checked_loss(scores.base_mean_loss, base)))
    bits = loss / math.log(2) * text.tokens.numel()
    return Evaluation(
        perplexity=math.exp(loss),
        tokens=windows * (seqlen - 1),
        windows=windows,
        seqlen=seqlen,
        bits_per_byte=bits / text.text_bytes if text.text_bytes else None,
        bits_per_weight=bits_per_weight(subject.streamed),
        size_bytes=subject.size_bytes,
        adapter=subject.adapter is not None,
        dtype=_dtype(subject),
        text=", ".join(text.sources),
        tokens_digest=text.digest,
        notes=text.notes,
        against=against,
        layer_errors=measured.layer_errors,
        worst=measured.worst,
        activation_bits=activation_bits(subject.streamed),
        cache_bits=cache_bits(subject.streamed),
    )


def _dtype(subject: Subject) -> str:
    return str(subject.streamed.dtype).removeprefix("torch.")


# ---- before the work ----------------------------------------------------------------------------


def check_dtype(dtype: str) -> None:
    """That it is one to compute in, or "auto".

    Raises:
        OptionError: it is not.
    """
    if dtype not in _DTYPES:
        raise OptionError(f"--dtype {dtype}: expected one of {', '.join(_DTYPES)}")


def _open(
    model: str, machine: Machine, dtype: str, revision: str | None, report: Reporter
) -> Subject:
    check_dtype(dtype)
    computing = machine.dtype if dtype == "auto" else getattr(torch, dtype)
    source = open_source(model, revision=revision, report=report)
    # int32: the packed codes of a converted checkpoint.
    checkpoint = open_source_checkpoint(source, report=report, dtypes=SOURCE_DTYPES | {torch.int32})
    streamed = StreamedModel(checkpoint, dtype=computing, device=machine.device)
    adapter = find_adapter(streamed, report)
    free = machine.host_free if machine.device_free is None else machine.device_free
    # An adapter is put in the place of linears, and so needs all of them there.
    streamed.experts_apart = adapter is None and streamed.expert_bytes() > free // 2
    return Subject(streamed, adapter)


def _check_together(subjects: list[Subject], seqlen: int | None) -> int:
    """The window's length, if all subjects can take it and predict the same vocabulary."""
    sizes = [subject.streamed.config.vocab_size for subject in subjects]
    if len(set(sizes)) > 1:
        pairs = zip(subjects, sizes, strict=True)
        raise CheckpointError(
            "vocabularies differ in size: "
            + ", ".join(f"{subject.label} has {size} tokens" for subject, size in pairs)
            + "\n  compare a checkpoint with the one that it was made from"
        )
    most, label = min((positions(subject), subject.label) for subject in subjects)
    if seqlen is None:
        return min(FIELD_SEQLEN, most)
    if seqlen > most:
        raise OptionError(
            f"--seqlen {seqlen}: max_position_embeddings of {label} is {most}\n"
            f"  use --seqlen {most} or less"
        )
    return seqlen


def positions(subject: Subject) -> int:
    """Tokens that the model is made for."""
    return getattr(subject.streamed.config, "max_position_embeddings", None) or FIELD_SEQLEN
