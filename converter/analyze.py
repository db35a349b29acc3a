"""analyze(): RILQ's comparison of loss scopes against rank, on any model.

One streaming pass gives the plain 2-bit base, the teacher's final states, and adapters fitted at
three scopes; the model's scope is trained on the base afterwards. Every set of adapters is then put
beside the base in turn, and measured on held-out text.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rilq.calib.activations import ActivationStore
from rilq.calib.dataset import Rows, calibration_rows, evaluation_rows
from rilq.calib.sources import parse_source
from rilq.calib.tokenizer import check_vocabulary, load_tokenizer
from rilq.converter.adapters import AdapterSpec
from rilq.converter.analysis import Analysis, AnalyzeOptions, Measured, Row, as_markdown
from rilq.converter.analysis_plot import plot
from rilq.converter.finish import QuantizedParts
from rilq.converter.initial import set_values
from rilq.converter.job import Job
from rilq.converter.job_source import base_name
from rilq.converter.layers import StreamedModel
from rilq.converter.loss import next_token_loss
from rilq.converter.pipeline import prepare
from rilq.converter.plan import check_fits
from rilq.converter.quantizers import build_quantizer
from rilq.converter.scopes import Fit, LayerFits
from rilq.converter.spectrum import SpectrumSum
from rilq.converter.stream import StreamingPass
from rilq.converter.stream_options import StreamOptions
from rilq.converter.student import Student
from rilq.converter.train import Trainer, TrainOptions
from rilq.converter.workdir import WorkDir, open_workdir
from rilq.errors import OptionError, OutputError, RilqError, UnsupportedArchitectureError
from rilq.evaluation.forward import Subject, mean_loss
from rilq.evaluation.gap import gap_closed
from rilq.formats.durable import write_bytes
from rilq.formats.spec import QuantSpec
from rilq.progress import Reporter

SPECTRUM_BITS = (2, 3, 4)
JSON_NAME, TABLE_NAME, PLOT_NAME = "analysis.json", "analysis.md", "analysis.png"


def analyze(options: AnalyzeOptions, report: Reporter) -> Analysis:
    """Fit adapters at all scopes and ranks, measure them, and write JSON, table and plot.

    Raises:
        InputError: before any work, for what cannot succeed.
        RilqError: the work failed; nothing is kept of it.
    """
    with _temporary(options.output) as folder:
        job = prepare(options.conversion(folder), report)
        _check(job, options)
        check_fits(job.plan)
        rows, held_out = _text(job, options, report)
        with open_workdir(
            job.options.work, {}, {"files": {}}, resume="never", report=report
        ) as work:
            found = _Analyzer(options, job, work, rows, held_out, report).run()
    write_bytes(options.output / JSON_NAME, (json.dumps(found.as_dict(), indent=2) + "\n").encode())
    write_bytes(options.output / TABLE_NAME, as_markdown(found).encode())
    write_bytes(options.output / PLOT_NAME, plot(found))
    return found


class _Analyzer:
    """One analysis inside its open work folder."""

    def __init__(
        self,
        options: AnalyzeOptions,
        job: Job,
        work: WorkDir,
        rows: Rows,
        held_out: Rows,
        report: Reporter,
    ) -> None:
        self.options, self.job, self.work, self.report = options, job, work, report
        self.rows, self.held_out = rows, held_out
        self.choices, self.streamed = job.plan.choices, job.streamed
        self.layers = len(job.streamed.layers)
        self.count = len(rows.tokens)
        self.validation = max(1, round(self.count * job.options.val_ratio))
        self.quantization = job.plan.quantization({}, options.bits, options.group_size)
        self.training = TrainOptions(
            self.choices.learning_rate,
            options.steps,
            batch_size=options.batch_size,
            micro_batch=self.choices.micro_batch,
            val_every=job.options.val_every,
            patience=job.options.patience,
            seed=options.seed,
        )
        self.lines = options.lines()
        self.wanted = list(dict.fromkeys(fit for line in self.lines.values() for fit in line))
        self.spectra = [SpectrumSum(bits, sorted(set(options.ranks))) for bits in SPECTRUM_BITS]
        self.fits = self._layer_fits()
        self.stream = self._stream()

    def run(self) -> Analysis:
        """Stream, train, measure."""
        self.stream.run(targets=True)
        self.streamed.unload()
        full = self._full_perplexity()
        plain = self._measured(self._student(None, plain=True), None, full)
        base = plain
        if self.options.quantizer != "rtn":
            base = self._measured(self._student(None), plain, full)
        results: dict[Fit, Measured] = {}
        self.report.note(f"measuring {len(self.wanted)} sets of adapters on the held-out text")
        for fit in self.wanted:
            student = self._student(fit.spec)
            if fit.scope == "model":
                self._train(fit, student)
            else:
                for found in self.fits.adapters(fit):
                    set_values(student.trained, found)
            results[fit] = self._measured(student, plain, full)
            self.report.note(
                f"{fit.scope}, rank {fit.spec.rank}, alpha {fit.spec.alpha:g}: perplexity "
                f"{results[fit].perplexity:.4g}, gap closed {results[fit].gap_closed:.3f}"
            )
            del student
        return Analysis(
            model=base_name(self.job.checkpoint),
            settings=self._settings(),
            data={
                "calibration": {"sources": list(self.rows.sources), "digest": self.rows.digest,
                                "rows": self.count, "validation_rows": self.validation,
                                "seqlen": self.rows.tokens.shape[1]},
                "held_out": {"sources": list(self.held_out.sources), "digest": self.held_out.digest,
                             "windows": len(self.held_out.tokens)},
            },
            full=full,
            plain=plain,
            base=base,
            rows=tuple(
                Row(scope, scaling, fit.spec.rank,
                    None if scaling == "none" else fit.spec.alpha,
                    results[fit], self.fits.weight_error(fit))
                for (scope, scaling), line in self.lines.items()
                for fit in line
            ),
            spectra=tuple(spectrum.result() for spectrum in self.spectra),
        )  # fmt: skip

    def _settings(self) -> dict[str, Any]:
        without = {"model", "revision", "text", "dataset", "text_key", "output_dir", "device",
                   "dtype", "student", "nsamples", "seqlen", "windows"}  # fmt: skip
        chosen = {k: v for k, v in asdict(self.options).items() if k not in without}
        return {
            **chosen,
            "learning_rate": self.choices.learning_rate,
            "compute_dtype": self.choices.dtype,
        }

    def _layer_fits(self) -> LayerFits:
        """All adapters but those of the model's scope, to be found while streaming."""
        return LayerFits(
            self.streamed,
            [fit for fit in self.wanted if fit.scope != "model"],
            QuantSpec(self.options.bits, self.options.group_size),
            self.options.quantizer,
            rows=self.count,
            train_rows=self.count - self.validation,
            batch_rows=self.choices.batch_rows,
            options=self.training,
            folder=self.work.path,
            spectra=self.spectra,
            report=self.report,
        )

    def _stream(self) -> StreamingPass:
        """The base and the teacher's states, of calibration rows and held-out windows."""
        return StreamingPass(
            self.job.checkpoint,
            self.streamed,
            torch.cat([self.rows.tokens, self.held_out.tokens]),
            self.work,
            StreamOptions(
                build_quantizer("rtn", clip="none"),
                self.job.options.spec_for,
                self.choices.batch_rows,
                train_rows=self.count - self.validation,
                after_layer=self.fits,
            ),
            self.report,
        )

    def _full_perplexity(self) -> float:
        """Of the source on the held-out text; `rilq eval`'s own pass over it."""
        old = self.streamed
        streamed = StreamedModel(old.checkpoint, dtype=old.dtype, device=old.device)
        place = self.work.file("full")
        place.mkdir()
        loss = mean_loss(Subject(streamed, None), self.held_out.tokens, place, self.report)
        shutil.rmtree(place)
        return math.exp(loss)

    def _student(self, spec: AdapterSpec | None, *, plain: bool = False) -> Student:
        """The base with new adapters; with `plain`, the rounded one in any case."""
        parts = QuantizedParts(self.work, self.layers)
        student = Student(
            self.streamed.config,
            self.quantization,
            read_layer=parts.layer,
            outer=parts.outer(),
            train="none" if spec is None else "adapters",
            adapters=spec,
            tier=self.choices.student,
            dtype=self.streamed.dtype,
            device=self.streamed.device,
        )
        for values in () if plain else self.fits.values():
            for name, value in values.items():
                module = student.model.get_submodule(name)
                linear = getattr(module, "base", module)
                weight = value.to(self.streamed.device)
                linear.weight = nn.Parameter(weight, requires_grad=False)
        return student

    def _train(self, fit: Fit, student: Student) -> None:
        """RILQ's own loss, on all layers together."""
        self.report.note(f"model-loss, rank {fit.spec.rank}, alpha {fit.spec.alpha:g}")
        trainer = Trainer(
            student,
            self.rows.tokens,
            self.stream.targets(),
            validation=self.validation,
            options=self.training,
        )
        trainer.run(lambda: None, self.report)
        trainer.use_best()

    def _measured(self, student: Student, plain: Measured | None, full: float) -> Measured:
        perplexity, error = held_out_figures(
            student,
            self.held_out.tokens,
            self.stream.targets(),
            first=self.count,
            batch=self.choices.micro_batch,
            device=self.streamed.device,
        )
        zero = perplexity if plain is None else plain.perplexity
        # At 8 bits rounding may do no harm at all; then there is no gap to close.
        gap = (
            0.0 if plain is None or zero == full else gap_closed(perplexity, plain=zero, full=full)
        )
        return Measured(perplexity, gap, error)


@torch.no_grad()
def held_out_figures(
    student: Student,
    tokens: Tensor,
    targets: ActivationStore,
    *,
    first: int,
    batch: int,
    device: torch.device,
) -> tuple[float, float]:
    """Perplexity, and `|h - h_teacher|^2 / |h_teacher|^2` of the final hidden states.

    Args:
        tokens: `[windows, seq_len]`; in each all but the first are predicted.
        targets: the teacher's final hidden states, those of `tokens` from row `first` on.

    Raises:
        RilqError: the student computes NaN or infinity.
    """
    total = apart = norm = 0.0
    for start in range(0, len(tokens), batch):
        part = tokens[start : start + batch].to(device)
        hidden = student.states(part)[1]
        total += next_token_loss(student, hidden, part).item() * len(part)
        wanted = targets.read(first + start, first + start + len(part)).to(device).float()
        apart += (hidden.float() - wanted).square().sum().item()
        norm += wanted.square().sum().item()
    loss = total / len(tokens)
    if not loss < 700:  # exp ends near 709; NaN is not below anything
        raise RilqError(
            f"held-out text: the loss is {loss} nats per token\n  run again with --dtype float32"
        )
    return math.exp(loss), apart / norm


# ---- before the work ----------------------------------------------------------------------------


def _check(job: Job, options: AnalyzeOptions) -> None:
    """Raises OptionError or OutputError for what would go wrong late."""
    if job.plan.experts:
        raise UnsupportedArchitectureError(
            f"{job.plan.model}: is a mixture of experts, of which rilq analyze knows nothing yet"
        )
    groups = min((p.in_features // options.group_size for p in job.plan.quantized), default=0)
    if options.adapter == "pooled" and max(options.ranks) > groups:
        raise OptionError(
            f"--ranks {max(options.ranks)}: --adapter pooled allows at most {groups} here, the "
            "least number of groups of a linear\n  use smaller --ranks, or --adapter lora"
        )
    fits = {f for line in options.lines().values() for f in line if f.scope in ("linear", "layer")}
    rows, item = job.plan.rows, getattr(torch, job.plan.choices.dtype).itemsize
    states = rows * job.plan.choices.seqlen * job.plan.hidden_size * item
    needed, free = (2 * len(fits)) * states, shutil.disk_usage(options.output).free
    if needed > free:
        raise OutputError(
            f"{options.output}: {needed / 1e9:.1f} GB needed for hidden states, "
            f"{free / 1e9:.1f} GB free\n  use fewer --ranks, --scopes or --nsamples"
        )


def _text(job: Job, options: AnalyzeOptions, report: Reporter) -> tuple[Rows, Rows]:
    """Calibration rows, and held-out windows of the same length."""
    tokenizer = load_tokenizer(job.checkpoint)
    seqlen = job.plan.choices.seqlen
    rows = calibration_rows(
        [parse_source(text) for text in options.dataset],
        tokenizer,
        nsamples=options.nsamples,
        seqlen=seqlen,
        seed=options.seed,
        text_key=options.text_key,
    )
    source = parse_source(options.text)
    found = evaluation_rows(source, tokenizer, seqlen=seqlen, text_key=options.text_key)
    spread = torch.linspace(0, len(found.tokens) - 1, min(options.windows, len(found.tokens)))
    held_out = Rows(found.tokens[spread.round().long()], found.digest, found.notes, found.sources)
    for each in (rows, held_out):
        check_vocabulary(each.tokens, job.streamed.config.vocab_size, job.checkpoint.source.label)
        for note in each.notes:
            report.note(note)
    return rows, held_out


@contextmanager
def _temporary(output: Path) -> Iterator[Path]:
    """A work folder inside the output folder, on the volume that the user chose; removed."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix=".work-", dir=output)
    except OSError as err:
        raise OutputError(
            f"{output}: cannot be written: {err.strerror or err}\n  choose another -o"
        ) from err
    with temporary as name:
        yield Path(name)
