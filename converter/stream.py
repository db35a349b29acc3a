"""The one pass over the checkpoint: teacher states, quantized layers, student states, targets.

Order per decoder layer: read, run the teacher, collect, quantize, save, read back what was saved,
run the student with it, commit. A packing fault thus shows at layer 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor

from rilq.calib.activations import ActivationStore
from rilq.converter.alternatives import ROWS, Alternatives, alternative_file, measured_gains
from rilq.converter.fewer_rows import RowsAtOnce, with_fewer_rows
from rilq.converter.initial import PREFIX, adapter_tensors
from rilq.converter.layer_quantizing import LayerQuantizing
from rilq.converter.layer_reader import LayerReader, reading_ahead
from rilq.converter.layers import StreamedModel
from rilq.converter.machine import large_blocks_returned, return_free_memory
from rilq.converter.outer import (
    QUANTIZED_FILE,
    SOURCE_FILE,
    embed_as_saved,
    embedding_name,
    quantize_outer,
)
from rilq.converter.ranks import ALONE, Ranks
from rilq.converter.states import StateFiles
from rilq.converter.stream_options import StreamedLayer, StreamOptions
from rilq.converter.workdir import WorkDir
from rilq.formats.checkpoint import Checkpoint
from rilq.formats.shard_writer import write_tensors
from rilq.formats.verify import file_hash
from rilq.progress import Reporter

T = TypeVar("T")


class StreamingPass:
    """Streams a checkpoint once; every decoder layer is one unit of work.

    Args:
        checkpoint: the source.
        streamed: its model, nothing loaded yet.
        tokens: calibration rows `[rows, seq_len]` int64.
        work: where quantized layers and hidden states go, and what is done already.
        ranks: this process among those that share the rows; each keeps states of its own rows.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        streamed: StreamedModel,
        tokens: Tensor,
        work: WorkDir,
        options: StreamOptions,
        report: Reporter,
        ranks: Ranks = ALONE,
    ) -> None:
        self.checkpoint, self.streamed, self.tokens = checkpoint, streamed, tokens
        self.work, self.options, self.report = work, options, report
        self.ranks, self.states = ranks, StateFiles(streamed, tokens, ranks)
        self.rows = self.states.rows

    @torch.no_grad()
    @large_blocks_returned()
    def run(self, *, targets: bool) -> None:
        """Do what is not done yet; with `targets`, also the teacher's final hidden states."""
        done = len(self.work.stage("layers"))
        outer = len(self.work.stage("outer"))
        steps = self.streamed.reading_steps()
        at_once = [self.streamed.names_at_once(n) for n in range(len(self.streamed.layers))]
        with reading_ahead(
            self.checkpoint,
            steps[outer + max(0, done - 1) :],
            budget=max(map(self.checkpoint.nbytes, at_once)),
            pinned=self._on_gpu,
        ) as reader:
            self._outer(reader.advance)
            if done < len(steps) + targets:
                reader.start(at_once[max(0, done - 1) :])
                self._layers(done, reader)
        if targets and done < len(steps) + targets:
            self._recovering(self._targets)

    def _recovering(self, unit: Callable[[], T]) -> T:
        """Do one unit, with fewer rows at once than planned where memory asks for it."""

        def run(rows: RowsAtOnce) -> T:
            self.options = replace(self.options, **asdict(rows))
            return unit()

        rows = RowsAtOnce(self.options.batch_rows, self.options.micro_batch)
        return with_fewer_rows("the decoder layers", rows, run, self.work, self.report)

    @property
    def _on_gpu(self) -> bool:
        return self.streamed.device.type == "cuda"

    def _layers(self, done: int, reader: LayerReader) -> None:
        """What follows the outer tensors, of which `done` units are finished."""
        count = len(self.streamed.layers)
        self.streamed.prepare(self.tokens.shape[1])
        self.report.stage("layers", count, "layer")
        if done == 0:
            self._recovering(self._embedding)
            done = 1
        self.streamed.drop_embeddings()
        self.report.step(done - 1)
        for index in range(done - 1, count):
            error = self._recovering(
                partial(self._layer, index, self.streamed.layer_tensors(index, reader.take()))
            )
            reader.advance()
            self.report.step(index + 1, error=round(error, 4))

    def _outer(self, advance: Callable[[], None]) -> None:
        """Embedding, final norm and head: on the device, and saved for the output.

        The checkpoint is asked for them, and for a head that should be one of them, once only.
        """
        if self.work.stage("outer"):
            self.streamed.load_outer(load_file(self.work.file(SOURCE_FILE)))
            return
        self.ranks.once(self._save_outer)
        self.streamed.load_outer(load_file(self.work.file(SOURCE_FILE)))
        self.streamed.check_tied()
        facts = {}
        if self.ranks.first:  # the only one that has read them from the checkpoint
            facts = {"source": self._source_hashes(self.streamed.outer_names())}
        paths = [self.work.file(SOURCE_FILE)]
        if self.options.outer:
            paths.append(self.work.file(QUANTIZED_FILE))
        self.work.commit("outer", "outer", facts, files={p: file_hash(p) for p in paths})
        advance()

    def _save_outer(self) -> None:
        """Write them as in the source and, where any is quantized, as in the output too."""
        tensors = self.checkpoint.read(self.streamed.outer_names())
        write_tensors(self.work.file(SOURCE_FILE), tensors)
        if self.options.outer:
            write_tensors(
                self.work.file(QUANTIZED_FILE),
                quantize_outer(tensors, self.options.outer, self.streamed.device),
            )

    def _embedding(self) -> None:
        """First hidden states: of the teacher and, with a quantized embedding, of the student."""
        states = self._embedded("teacher")
        if self._student_embeds:
            embed_as_saved(
                self.streamed, load_file(self.work.file(QUANTIZED_FILE)), self.options.outer
            )
            states |= self._embedded("student")
        self.work.commit("layers", "embedding", self.states.facts(), passing=states)

    def _embedded(self, who: str) -> dict[Path, str]:
        return self.states.embedded(self._states(who, 0), self.options.batch_rows)

    @property
    def _student_embeds(self) -> bool:
        """Whether the embedding is quantized; else the student starts from the teacher's file."""
        return embedding_name(self.streamed) in self.options.outer

    def _layer(self, index: int, tensors: Mapping[str, Tensor]) -> float:
        """Stream one decoder layer; the student's relative squared error after it."""
        before = self.work.stage("layers")[index]
        teacher = self.states.store(self._states("teacher", index), before)
        apart = bool(index) or self._student_embeds
        student = self.states.store(self._states("student" if apart else "teacher", index), before)
        next_teacher, next_student = (self._states(w, index + 1) for w in ("teacher", "student"))
        with self.streamed.loaded(index, tensors):
            digest = self._propagate(index, teacher, next_teacher)
            self.ranks.wait()  # quantizing may look at any rows
            wanted = self.states.just_written(next_teacher)
            quantizing = self._quantizing(index, tensors, student, wanted)
            saved, adapters = quantizing.quantize()
            path = self.work.file(f"layer-{index:04d}.safetensors")
            self.ranks.once(partial(write_tensors, path, saved))
            paths = [path]
            if adapters:
                paths.append(self.work.file(f"{PREFIX}{index:04d}.safetensors"))
                self.ranks.once(partial(write_tensors, paths[1], adapter_tensors(adapters)))
            stored = {n: t for each in paths for n, t in load_file(each).items()}
            with quantizing.as_saved(stored) as run:
                more = self._save_alternatives(index, quantizing.others)
                gains = self._gains(index, more, student, wanted)
                student_digest, error = self._propagate_compared(
                    index, run, student, next_student, wanted
                )
            found: Mapping[str, Any] | None = None
            if self.options.after_layer is not None:
                layer = StreamedLayer(index, tensors, saved, student, wanted)
                try:
                    found = self.options.after_layer(layer)
                except torch.OutOfMemoryError as err:
                    # It may have kept something of this layer, so it is not asked again.
                    raise MemoryError(str(err)) from err
        return_free_memory()
        self.work.commit(
            "layers",
            f"layer {index}",
            {
                "error": error,
                "source": self._source_hashes(tensors),
                **gains,
                **quantizing.tokens.facts(),
                **(found or {}),
                **self.states.facts(),
            },
            files={each: file_hash(each) for each in [*paths, *more.values()]},
            passing={
                self.states.own(next_teacher): digest,
                self.states.own(next_student): student_digest,
            },
        )
        return error

    def _quantizing(
        self,
        index: int,
        tensors: Mapping[str, Tensor],
        student: ActivationStore,
        wanted: ActivationStore,
    ) -> LayerQuantizing:
        """How a loaded layer is quantized, with as many rows at once as memory allows by now."""
        return LayerQuantizing(
            self.streamed, self.options, self.states, self.report, index, tensors, student, wanted
        )

    def _save_alternatives(self, index: int, others: Alternatives) -> dict[int, Path]:
        """Write a layer's linears at more bits; the files by bits."""
        files = {bits: self.work.file(alternative_file(index, bits)) for bits in others.tensors}
        for bits, path in files.items():
            self.ranks.once(partial(write_tensors, path, others.tensors.pop(bits)))
        return files

    def _gains(
        self, index: int, files: dict[int, Path], student: ActivationStore, wanted: ActivationStore
    ) -> dict[str, Any]:
        """What each saved alternative gains, as facts for the journal; none without files."""
        if not files:
            return {}
        gains = measured_gains(
            self.streamed,
            index,
            files,
            student,
            wanted,
            rows=min(ROWS, self.options.train_rows),
            batch_rows=self.options.batch_rows,
        )
        return {"gains": gains}

    def _propagate(self, index: int, source: ActivationStore, target: Path) -> str:
        """Run a loaded layer over this process's rows, from file to file; the new file's xxh3."""
        with self.states.writer(target, f"decoder layer {index}") as writer:
            for hidden in self.states.batches(source, self.options.batch_rows):
                writer.append(self.streamed.run(index, hidden))
        return writer.digest

    def _propagate_compared(
        self,
        index: int,
        run: Callable[[Tensor], Tensor],
        source: ActivationStore,
        target: Path,
        reference: ActivationStore,
    ) -> tuple[str, float]:
        """As `_propagate`, by `run`; also `|out - reference|^2 / |reference|^2` over all rows."""
        size = self.options.batch_rows
        errors: list[tuple[Tensor, Tensor]] = []  # asked for at the end: asking waits for a GPU
        with self.states.writer(target, f"quantized decoder layer {index}") as writer:
            pairs = zip(
                source.batches(size, self.rows), reference.batches(size, self.rows), strict=True
            )
            for (_, batch), (_, wanted) in pairs:
                out = run(self.states.here(batch))
                wanted = self.states.here(wanted).float()
                errors.append(((out.float() - wanted).square().sum(), wanted.square().sum()))
                writer.append(out)
        apart, norm = (
            self.ranks.total(sum(each.item() for each in part))
            for part in zip(*errors, strict=True)
        )
        return writer.digest, apart / norm if norm else 0.0

    def _targets(self) -> None:
        """The end of the full-precision model, which is never needed again."""
        path = self.work.file("targets.bin")
        count = len(self.streamed.layers)
        before = self.work.stage("layers")[count]
        source = self.states.store(self._states("teacher", count), before)
        with self.states.writer(path, "the final norm") as writer:
            for _, batch in source.batches(self.options.batch_rows, self.rows):
                if self.options.target != "pre-norm":
                    batch = self.streamed.final_norm(self.states.here(batch))
                writer.append(batch)
        self.work.commit(
            "layers", "targets", self.states.facts(), files={self.states.own(path): writer.digest}
        )

    def targets(self) -> ActivationStore:
        """The teacher's final hidden states, `[rows, seq_len, hidden]` in the compute dtype.

        What feeds the head, or what comes before the final norm, as `StreamOptions.target` says.
        """
        return self.states.store(self.work.file("targets.bin"), self.work.stage("layers")[-1])

    def _states(self, who: str, index: int) -> Path:
        return self.work.file(f"{who}-{index:04d}.bin")

    def _source_hashes(self, names: Iterable[str]) -> dict[str, str]:
        return {name: self.checkpoint.hashes[name] for name in names}
