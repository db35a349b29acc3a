"""Exports of a native checkpoint: checked, written, read back, compared, and then published."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rilq
from rilq.calib.dataset import evaluation_rows
from rilq.calib.sources import parse_source
from rilq.calib.tokenizer import check_vocabulary, load_tokenizer
from rilq.converter.architecture import load_config
from rilq.converter.job import Job
from rilq.converter.layers import StreamedModel
from rilq.converter.machine import large_blocks_returned, measure_machine
from rilq.converter.plan import LinearPlan
from rilq.errors import OptionError, RilqError
from rilq.evaluation.forward import Subject
from rilq.evaluation.lora import find_adapter
from rilq.evaluation.perplexity import positions
from rilq.evaluation.readback import ExportedCheckpoint, LogitDifference, ReadBack
from rilq.evaluation.scratch import scratch_folder
from rilq.formats.export.kind import ExportOptions
from rilq.formats.export.kinds import check_kind, kind_of
from rilq.formats.export.source import NativeCheckpoint, NativeForm
from rilq.formats.hub_folder import local_folder
from rilq.formats.spec import QuantSpec
from rilq.formats.verify import MANIFEST_NAME, read_manifest, write_manifest
from rilq.formats.writer import check_output, open_staging, publish
from rilq.progress import Reporter, SilentReporter

ROWS, SEQLEN = 4, 256  # of the text that is compared: some thousand tokens, at any model size
_CARRIED = ("source", "recipe", "compute_dtype", "calibration", "quality", "versions")


@dataclass(frozen=True)
class Exported:
    """An export that is published.

    Attributes:
        kind: `dense`, `mlx`, ...
        output: its folder.
        difference: of its logits from the native's.
        bound: the largest difference that would have been accepted; of a mixture of experts the
            mean one.
        already_done: it was there, from the same checkpoint and options; nothing was written.
    """

    kind: str
    output: Path
    difference: LogitDifference
    bound: float
    already_done: bool = False

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "kind": self.kind,
            "output": str(self.output),
            "already_done": self.already_done,
            "logit_difference": self.difference.as_dict(),
            "bound": self.bound,
        }


def export(
    model: str | Path,
    outputs: Mapping[str, Path],
    options: ExportOptions = ExportOptions(),  # noqa: B008 - immutable
    *,
    revision: str | None = None,
    text: str | None = None,
    device: str = "auto",
    report: Reporter = SilentReporter(),  # noqa: B008 - stateless
) -> list[Exported]:
    """Write a native checkpoint in other formats, each read back before it is published.

    In memory are one tensor while writing, and while reading back one decoder layer, embedding and
    head in float32. On disk are hidden states and logits of a short text.

    Args:
        model: the native checkpoint, a folder or `owner/name` on the Hub.
        outputs: kind to the folder to make, absent or empty.
        options: of all of them.
        revision: branch, tag or commit on the Hub.
        text: to compare logits on, as `rilq.calib.sources` takes it; None for a text of our own.
        device: where the comparison runs: "auto", "cpu", "cuda" or "cuda:1".
        report: receives progress.

    Raises:
        InputError: before any work, for what cannot be exported so.
        RilqError: an export is further from the native checkpoint than its kind's bound; nothing
            of it is left.
    """
    for name in outputs:
        kind_of(name)  # before anything is fetched
    folder = local_folder(model, revision=revision, report=report)
    native = NativeCheckpoint.open(folder, report)
    load_config(native.checkpoint)  # refuses what could not be run for the comparison
    for name in outputs:
        check_kind(name, native.form, options)
    done = {
        name: found
        for name, output in outputs.items()
        if (found := _finished(name, output, native, options)) is not None
    }
    missing = {name: output for name, output in outputs.items() if name not in done}
    for output in missing.values():
        check_output(output, source=folder, work=None)
    if missing:
        done |= _write_all(native, missing, options, text, device, report)
    return [done[name] for name in outputs]


def check_planned(job: Job, outputs: Mapping[str, Path], options: ExportOptions) -> None:
    """Refuse, before a conversion begins, exports that its result cannot be written as.

    Args:
        job: the conversion.
        outputs: kind to the folder to make, which an earlier run of the same job may have made.
        options: of all of them.

    Raises:
        InputError: the message names the remedy.
    """
    plan = job.plan
    if job.options.resq is not None:
        raise OptionError(
            f"--export {', '.join(outputs)}: no other format can hold what --method "
            f"{job.options.method} makes, whose inputs and cache are quantized when it runs\n"
            "  leave out --export, or use --method rilq"
        )
    form = NativeForm(
        label=plan.model,
        config=job.checkpoint.config,
        linears=_specs(plan.quantized),
        kept=tuple(name for name, _ in plan.kept),
        outer=_specs(plan.outer),
        lora=job.options.adapter == "lora" and job.options.trains_adapters,
        recipe={**job.options.recorded(), "train": job.options.trains},
    )
    local = Path(job.options.model) if job.checkpoint.source.commit is None else None
    for name, output in outputs.items():
        check_kind(name, form, options)
        if not (output / MANIFEST_NAME).is_file():
            check_output(output, source=local, work=job.options.work)


def _specs(linears: Iterable[LinearPlan]) -> dict[str, QuantSpec]:
    return {each.name: s for each in linears if isinstance(s := each.spec, QuantSpec)}


def _write_all(
    native: NativeCheckpoint,
    outputs: Mapping[str, Path],
    options: ExportOptions,
    text: str | None,
    device: str,
    report: Reporter,
) -> dict[str, Exported]:
    machine = measure_machine(device)
    streamed = StreamedModel(native.checkpoint, dtype=torch.float32, device=machine.device)
    subject = Subject(streamed, find_adapter(streamed, report))
    tokens, label = _rows(subject, text)
    done = {}
    with scratch_folder([subject, subject], tokens) as scratch:
        compared = ReadBack(subject, tokens, scratch, report)
        for name, output in outputs.items():
            done[name] = _export(name, output, native, options, compared, label, report)
    return done


def _export(
    name: str,
    output: Path,
    native: NativeCheckpoint,
    options: ExportOptions,
    compared: ReadBack,
    label: str,
    report: Reporter,
) -> Exported:
    kind = kind_of(name)
    staging = open_staging(output, "export")
    try:
        with large_blocks_returned():
            kind.write(native, staging, options, report)
        native.check_read()
        exported = ExportedCheckpoint(kind.read(staging), staging, native, report)
        difference = compared.compare(exported)
        bound = kind.bound(options) * difference.spread
        # Where two experts are nearly alike, any rounding lets another one be chosen: a few tokens
        # differ by much. Tensors that are mixed up would show in all of them.
        found = difference.mean if native.form.is_mixture else difference.largest
        report.note(
            f"{name}: logits differ from the native checkpoint's by at most "
            f"{difference.largest:.2g} (mean {difference.mean:.2g}; bound {bound:.2g})"
        )
        if not found <= bound:
            raise RilqError(
                f"{output}: refused: its logits differ from those of {native.folder} by up to "
                f"{difference.largest:.3g} (mean {difference.mean:.3g}), expected at most "
                f"{bound:.3g}\n"
                f"  nothing was kept; export --to dense, or report the model with this message"
            )
        result = Exported(name, output, difference, bound)
        write_manifest(staging, _manifest(result, native, options, label))
        publish(staging, output)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return result


def _rows(subject: Subject, text: str | None) -> tuple[Tensor, str]:
    """Token rows to compare logits on `[rows, seq_len]`, and what they came from."""
    checkpoint = subject.streamed.checkpoint
    tokenizer = load_tokenizer(checkpoint)
    with resources.as_file(resources.files("rilq.evaluation") / "readback.txt") as own:
        rows = evaluation_rows(
            parse_source(text or str(own)),
            tokenizer,
            seqlen=min(SEQLEN, positions(subject)),
        )
    tokens = rows.tokens[:ROWS]
    check_vocabulary(tokens, subject.streamed.config.vocab_size, subject.label)
    return tokens, ", ".join(rows.sources)


def _manifest(
    result: Exported, native: NativeCheckpoint, options: ExportOptions, label: str
) -> dict[str, Any]:
    """What the export's `rilq.json` tells, but for the checksums."""
    return {
        **{key: native.manifest[key] for key in _CARRIED if key in native.manifest},
        "export": {
            **_identity(result.kind, native, options),
            "rilq": rilq.__version__,
            "logit_difference": result.difference.as_dict(),
            "bound": result.bound,
            "text": label,
        },
    }


def _identity(kind: str, native: NativeCheckpoint, options: ExportOptions) -> dict[str, Any]:
    """What determines an export's bytes."""
    return {
        "kind": kind,
        "dtype": str(options.dtype).removeprefix("torch."),
        "max_shard_size": options.max_shard_size,
        **({"gguf_type": options.gguf_type} if kind == "gguf" else {}),
        "native": native.content_hash,
    }


def _finished(
    kind: str, output: Path, native: NativeCheckpoint, options: ExportOptions
) -> Exported | None:
    """The export at `output`, if it was made from this checkpoint with these options."""
    if not (output / MANIFEST_NAME).is_file():
        return None
    found = read_manifest(output).get("export", {})
    if not _identity(kind, native, options).items() <= found.items():
        return None
    difference = LogitDifference(**found["logit_difference"])
    return Exported(kind, output, difference, found["bound"], already_done=True)
