"""Perplexity of any checkpoint, with one decoder layer's weights in memory at a time.

The text is cut into windows that do not overlap, and each window's tokens but the first are
predicted. Hidden states lie on disk between the layers, so a checkpoint larger than memory can be
measured.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rilq.calib.dataset import evaluation_rows
from rilq.calib.sources import DataSource, parse_source
from rilq.calib.tokenizer import check_vocabulary, load_tokenizer
from rilq.converter.layers import StreamedModel
from rilq.converter.machine import Machine, measure_machine
from rilq.errors import CheckpointError, OptionError, OutputError
from rilq.evaluation.figures import Evaluation
from rilq.evaluation.forward import Subject, measure
from rilq.evaluation.lora import find_adapter
from rilq.formats.checkpoint import SOURCE_DTYPES
from rilq.formats.fp8 import open_source_checkpoint
from rilq.formats.hub import open_source
from rilq.formats.native import RilqLinear
from rilq.formats.spec import QuantSpec
from rilq.progress import Reporter, SilentReporter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_SEQLEN = 2048  # the field's context for perplexity figures
SPELLED_TOKENS = 20_000_000  # longer texts are not decoded again just to count their bytes

_DTYPES = ("auto", "float32", "bfloat16", "float16")


def evaluate(
    model: str,
    text: str,
    *,
    seqlen: int | None = None,
    against: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    scratch: Path | None = None,
    revision: str | None = None,
    against_revision: str | None = None,
    text_key: str = "text",
    report: Reporter = SilentReporter(),  # noqa: B008 - stateless
) -> Evaluation:
    """Measure a checkpoint, dense or converted, on a text.

    On disk are the hidden states of two layer boundaries; with `against`, of three. In memory are
    one decoder layer, embedding and head, and one batch.

    Args:
        model: a folder, or `owner/name` on the Hub. A LoRA that lies beside a converted checkpoint
            is applied.
        text: a file, `c4`, `wikitext2` or `owner/name` on the Hub; see `rilq.calib.sources`.
        seqlen: tokens per window; None takes 2048, or what the model is made for if that is less.
        against: a checkpoint with the same tokens, to compare with: folder or `owner/name`.
        device: "auto", "cpu", "cuda" or "cuda:1".
        dtype: to compute in: "auto" is float32 on a CPU and bfloat16 elsewhere.
        scratch: folder for the hidden states; None for the system's temporary one.
        revision, against_revision: of `model` and `against` on the Hub.
        text_key: of the text in JSON, parquet and Hub records.
        report: receives progress.

    Raises:
        InputError: before any work, for what cannot succeed.
        RilqError: the model computes NaN or infinity.
    """
    machine = measure_machine(device)
    subject = _open(model, machine, dtype, revision, report)
    base = None
    if against is not None:
        base = _open(against, machine, dtype, against_revision, report)
    subjects = [subject] if base is None else [subject, base]
    length = _check_together(subjects, seqlen)
    source = parse_source(text)
    tokenizer = load_tokenizer(subject.streamed.checkpoint)
    rows = evaluation_rows(source, tokenizer, seqlen=length, text_key=text_key)
    check_vocabulary(rows.tokens, subject.streamed.config.vocab_size, subject.label)
    for note in rows.notes:
        report.note(note)
    with scratch_folder(scratch, subjects, rows.tokens) as folder:
        losses, divergence = measure(subjects, rows.tokens, folder, report)
    return Evaluation(
        perplexity=math.exp(losses[0]),
        tokens=len(rows.tokens) * (length - 1),
        windows=len(rows.tokens),
        seqlen=length,
        bits_per_byte=_bits_per_byte(losses[0], rows.tokens, source, tokenizer),
        bits_per_weight=bits_per_weight(subject.streamed),
        size_bytes=subject.size_bytes,
        adapter=subject.adapter is not None,
        dtype=str(subject.streamed.dtype).removeprefix("torch."),
        text=", ".join(rows.sources),
        tokens_digest=rows.digest,
        against=None if divergence is None else divergence.result(math.exp(losses[1])),
    )


# ---- before the work ----------------------------------------------------------------------------


def _open(
    model: str, machine: Machine, dtype: str, revision: str | None, report: Reporter
) -> Subject:
    if dtype not in _DTYPES:
        raise OptionError(f"--dtype {dtype}: expected one of {', '.join(_DTYPES)}")
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
        return min(DEFAULT_SEQLEN, most)
    if seqlen > most:
        raise OptionError(
            f"--seqlen {seqlen}: max_position_embeddings of {label} is {most}\n"
            f"  use --seqlen {most} or less"
        )
    return seqlen


def positions(subject: Subject) -> int:
    """Tokens that the model is made for."""
    return getattr(subject.streamed.config, "max_position_embeddings", None) or DEFAULT_SEQLEN


@contextmanager
def scratch_folder(parent: Path | None, subjects: list[Subject], tokens: Tensor) -> Iterator[Path]:
    """A temporary folder with room for the hidden states; removed with all that is in it.

    Args:
        parent: folder to make it in; None for the system's temporary one.
        subjects: what will run, one after the other.
        tokens: what each will run over.

    Raises:
        OutputError: it cannot be made, or the volume has not the room.
    """
    try:
        if parent is not None:
            parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix="rilq-eval-", dir=parent)
    except OSError as err:
        raise OutputError(
            f"{parent or tempfile.gettempdir()}: cannot be written: {err.strerror or err}\n"
            "  set TMPDIR to a folder on a volume that you may write to"
        ) from err
    # Two boundaries of the one that runs, and before it the last one of the other.
    sizes = [subject.states_bytes(tokens.numel()) for subject in subjects]
    needed = max(sum(sizes[:i]) + 2 * size for i, size in enumerate(sizes))
    with temporary as name:
        free = shutil.disk_usage(name).free
        if needed > free:
            raise OutputError(
                f"{Path(name).parent}: {needed / 1e9:.1f} GB needed for hidden states, "
                f"{free / 1e9:.1f} GB free\n"
                "  make room, set TMPDIR to a folder on another volume, or use less text"
            )
        yield Path(name)


# ---- figures ------------------------------------------------------------------------------------


def bits_per_weight(streamed: StreamedModel) -> float | None:
    """Stored bits per weight of the quantized linears, or of all of a dense model's decoder.

    Codes count with their 16-bit scales and zero-points. None if there is no linear.
    """
    linears = {
        name: module
        for index in range(len(streamed.layers))
        for name, module in streamed.linears(index).items()
    }
    packed = [module for module in linears.values() if isinstance(module, RilqLinear)]
    weights = [m.in_features * m.out_features for m in packed or linears.values()]
    if packed:
        specs = [QuantSpec(module.bits, module.group_size) for module in packed]
        bits = sum(w * s.bits_per_weight for w, s in zip(weights, specs, strict=True))
    else:
        tensors = streamed.checkpoint.tensors
        bits = sum(8 * tensors[f"{name}.weight"].nbytes for name in linears)
    return bits / sum(weights) if weights else None


def _bits_per_byte(
    loss: float, tokens: Tensor, source: DataSource, tokenizer: PreTrainedTokenizerBase
) -> float | None:
    """Mean loss in bits times tokens per byte, where the tokens spell the beginning of a file."""
    path = Path(os.path.expanduser(source.location))
    if tokens.numel() > SPELLED_TOKENS or not path.is_file():
        return None
    ids = tokens.flatten().tolist()
    spelled = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)).encode()
    with path.open("rb") as file:
        if not spelled or file.read(len(spelled)) != spelled:
            return None
    return loss / math.log(2) * len(ids) / len(spelled)
