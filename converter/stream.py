"""The one pass over the checkpoint: teacher states, quantized layers, student states, targets.

Order per decoder layer: read, run the teacher, collect, quantize, save, read back what was saved,
run the student with it, commit. A packing fault thus shows at layer 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rilq.calib.activations import ActivationStore, prefetch
from rilq.calib.statistics import HessianSum, SquareSum
from rilq.converter.adapters import Adapter
from rilq.converter.alternatives import ROWS, Alternatives, alternative_file, measured_gains
from rilq.converter.experts import (
    DATA_FREE,
    FEW,
    ExpertTokens,
    InputGroup,
    expert_groups,
    least_tokens,
    quantizer_for,
)
from rilq.converter.fewer_rows import RowsAtOnce, with_fewer_rows
from rilq.converter.initial import PREFIX, InitialAdapters, adapter_tensors, corrected
from rilq.converter.layer_method import LayerMethod, LayerToQuantize
from rilq.converter.layer_reader import LayerReader, reading_ahead
from rilq.converter.layers import StreamedModel, input_groups, linear_input, module_inputs
from rilq.converter.machine import large_blocks_returned, return_free_memory
from rilq.converter.options import Target
from rilq.converter.outer import (
    QUANTIZED_FILE,
    SOURCE_FILE,
    embed_as_saved,
    embedding_name,
    quantize_outer,
)
from rilq.converter.quantizers import LayerQuantizer, LayerTask, Quantizer
from rilq.converter.quantizers.lsq import LsqQuantizer
from rilq.converter.quantizers.shared import SharedQuantizer
from rilq.converter.ranks import ALONE, Ranks
from rilq.converter.states import StateFiles
from rilq.converter.train import row_order
from rilq.converter.workdir import WorkDir
from rilq.errors import CheckpointError, named
from rilq.formats.checkpoint import Checkpoint
from rilq.formats.native import native_tensors
from rilq.formats.packing import dequantize_packed
from rilq.formats.shard_writer import write_tensors
from rilq.formats.spec import EXPERTS, QuantizedLinear, QuantSpec
from rilq.formats.verify import file_hash
from rilq.progress import Reporter

T = TypeVar("T")


@dataclass(frozen=True)
class StreamOptions:
    """What the streaming pass needs to know.

    Attributes:
        quantizer: of every quantized linear; or another method, which knows by itself which
            linears it quantizes and how.
        spec_for: full module name to spec; None leaves a linear as it is.
        batch_rows: calibration rows that run at once.
        train_rows: the first so many rows may be trained on, by quantizers that train.
        batch_size, micro_batch: rows of an update, and of one forward pass of it.
        seed: of the order of rows.
        target: what is cached for training: after the final norm, or before it.
        outer: embedding and head by module name, where they are quantized.
        initial: what adapters start from, to be found with the codes; None for what needs no data.
            The student's states are then those of the layers with their adapters.
        trains_experts: experts are among what a quantizer that trains a layer trains.
        more_bits: each linear is also quantized to these, and what that gains is measured.
        after_layer: told of every layer while it is still loaded; what it returns is kept with
            the layer's facts.
    """

    quantizer: Quantizer | LayerQuantizer | LayerMethod
    spec_for: Callable[[str], QuantSpec | None]
    batch_rows: int
    train_rows: int
    batch_size: int = 8
    micro_batch: int = 8
    seed: int = 42
    target: Target = "post-norm"
    outer: Mapping[str, QuantSpec] = field(default_factory=dict)
    initial: InitialAdapters | None = None
    trains_experts: bool = True
    more_bits: tuple[int, ...] = ()
    after_layer: Callable[[StreamedLayer], Mapping[str, Any] | None] | None = None


@dataclass(frozen=True)
class StreamedLayer:
    """A decoder layer that is quantized, still loaded.

    Attributes:
        tensors, saved: as read from the checkpoint, and as they are stored, by full name.
        inputs: what the student's layer was run on.
        wanted: the teacher's output.
    """

    index: int
    tensors: Mapping[str, Tensor]
    saved: dict[str, Tensor]
    inputs: ActivationStore
    wanted: ActivationStore


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
            others = Alternatives(self.options.more_bits)
            tokens = ExpertTokens()
            saved, adapters = self._quantize(index, tensors, student, wanted, others, tokens)
            path = self.work.file(f"layer-{index:04d}.safetensors")
            self.ranks.once(partial(write_tensors, path, saved))
            paths = [path]
            if adapters:
                paths.append(self.work.file(f"{PREFIX}{index:04d}.safetensors"))
                self.ranks.once(partial(write_tensors, paths[1], adapter_tensors(adapters)))
            stored = {n: t for each in paths for n, t in load_file(each).items()}
            with self._as_saved(index, stored) as run:
                more = self._save_alternatives(index, others)
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
                **tokens.facts(),
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

    def _quantize(
        self,
        index: int,
        tensors: Mapping[str, Tensor],
        student: ActivationStore,
        wanted: ActivationStore,
        others: Alternatives,
        tokens: ExpertTokens,
    ) -> tuple[dict[str, Tensor], dict[str, Adapter]]:
        """Quantize a loaded layer's linears, and add their alternatives to `others`.

        Returns:
            All of its tensors as they will be stored; the adapters that start from something
            found here.
        """
        quantizer = self.options.quantizer
        if isinstance(quantizer, LayerMethod):
            batches = partial(self._batches, student)
            layer = LayerToQuantize(index, tensors, batches, self.ranks)
            return quantizer.quantize(layer), {}
        specs = {n: s for n in self.streamed.linears(index) if (s := self.options.spec_for(n))}
        kept = {n: tensors[n] for n in tensors if n.removesuffix(".weight") not in specs}
        if not specs:
            return kept, {}
        if isinstance(quantizer, LayerQuantizer):
            saved = self._train_layer(
                quantizer, index, tensors, specs, student, wanted, others, tokens
            )
            return kept | saved, {}
        saved, adapters = self._by_groups(quantizer, index, tensors, specs, student, others, tokens)
        return kept | saved, adapters

    def _by_groups(
        self,
        quantizer: Quantizer,
        index: int,
        tensors: Mapping[str, Tensor],
        specs: dict[str, QuantSpec],
        student: ActivationStore,
        others: Alternatives,
        tokens: ExpertTokens,
    ) -> tuple[dict[str, Tensor], dict[str, Adapter]]:
        """One weight after the other, those that share an input together.

        They are taken in the order in which they run, so that each sees what the quantized ones
        before it produce; experts after all others.
        """
        linears = {n: m for n, m in self.streamed.linears(index).items() if n in specs}
        initial = self.options.initial
        adapters: dict[str, Adapter] = {}
        saved: dict[str, Tensor] = {}
        for group in self._input_groups(index, linears, student, quantizer):
            prepared = None
            hessian, group.hessian = group.hessian, None
            own = quantizer_for(quantizer, group, linears[group.names[0]].in_features)
            tokens.count(group, used=own is quantizer)
            chosen = SharedQuantizer(own, self.ranks)
            if chosen.needs_hessian:
                assert hessian is not None
                kept = hessian.clone() if self._starts_from_hessian(group) else None
                with named(group.names[0]):
                    prepared = chosen.prepare(hessian, partial(self._warn, group.names))
                hessian = kept  # of a wide linear it is the largest thing in memory
            for name in group.names:
                weight = tensors[f"{name}.weight"].to(self.streamed.device, torch.float32)
                with named(name):
                    if initial is None or not initial.spec.adapts(name):
                        quantized = chosen.quantize(weight, specs[name], prepared)
                    else:
                        quantized, adapters[name] = initial.quantize(
                            name, weight, chosen, specs[name], prepared, hessian
                        )
                    others.add(name, weight, specs[name], chosen, prepared)
                native = native_tensors(name, quantized)
                started = adapter_tensors({n: a for n, a in adapters.items() if n == name})
                self._assign(linears[name], native | started, name, specs[name])
                saved |= {n: t.cpu() for n, t in native.items()}
            return_free_memory()
        return saved, adapters

    def _starts_from_hessian(self, group: InputGroup) -> bool:
        """Whether an adapter of some linear of a group does."""
        initial = self.options.initial
        if initial is None or not initial.needs_hessian:
            return False
        return any(map(initial.spec.adapts, group.names))

    def _input_groups(
        self,
        index: int,
        linears: dict[str, nn.Linear],
        student: ActivationStore,
        quantizer: Quantizer,
    ) -> Iterator[InputGroup]:
        """Linears of a loaded layer that read the same input, with what is needed to know of it.

        Adapters of experts start from nothing, so only the quantizer may need their Hessians.
        """
        initial = self.options.initial
        needed = quantizer.needs_hessian or (initial is not None and initial.needs_hessian)
        plain = {name: module for name, module in linears.items() if EXPERTS not in name}
        probe = student.read(0, 1).to(self.streamed.device)
        for names in input_groups(self.streamed, index, plain, probe) if plain else []:
            first = plain[names[0]]
            yield InputGroup(names, self._hessian(index, first, student) if needed else None)
        if (found := self.streamed.experts(index)) is not None:
            yield from expert_groups(
                *found,
                linears.keys() - plain.keys(),
                partial(self._expert_inputs, index, found[1], student),
                hessians=quantizer.needs_hessian,
                device=self.streamed.device,
                added=self.ranks.added,
            )

    def _expert_inputs(
        self, index: int, experts: nn.Module, student: ActivationStore
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for _, batch in student.batches(self.options.batch_rows, self.rows):
            hidden = self.states.here(batch)
            inputs, chosen, _ = module_inputs(self.streamed, index, experts, hidden)
            yield inputs, chosen

    def _train_layer(
        self,
        quantizer: LayerQuantizer,
        index: int,
        tensors: Mapping[str, Tensor],
        specs: dict[str, QuantSpec],
        student: ActivationStore,
        wanted: ActivationStore,
        others: Alternatives,
        tokens: ExpertTokens,
    ) -> dict[str, Tensor]:
        """All linears together, on the layer's output; alternatives by least squares.

        Experts that saw too few tokens for that, or all of them if they are not to be trained, are
        quantized before, one by one.
        """
        device, o = self.streamed.device, self.options
        order = row_order(o.train_rows, o.seed + index)

        def read() -> list[tuple[Tensor, Tensor]]:
            drawn = [next(order) for _ in range(o.batch_size)]
            rows = [drawn[place] for place in self.ranks.share(o.batch_size)]
            parts = [rows[i : i + o.micro_batch] for i in range(0, len(rows), o.micro_batch)]
            return [(student.gather(part), wanted.gather(part)) for part in parts]

        linears = self.streamed.linears(index)
        squares = self._squares(index, specs, student)
        saved: dict[str, Tensor] = {}
        fixed = self._quantize_experts(quantizer, linears, tensors, specs, squares, tokens)
        for name, quantized in fixed:
            native = native_tensors(name, quantized)
            self._assign(linears[name], native, name, specs[name])
            saved |= {n: t.cpu() for n, t in native.items()}
        trained = {n: s for n, s in specs.items() if f"{n}.weight" not in saved}
        if not trained:
            return saved
        weights = {n: tensors[f"{n}.weight"].to(device, torch.float32) for n in trained}
        layer = f"{self.streamed.prefix}.{index}"
        with (
            named(layer),
            closing(prefetch(repeat(read))) as batches,
        ):
            result = quantizer.quantize_layer(
                LayerTask(
                    weights,
                    trained,
                    {n: squares[n].value() for n in trained},
                    run=partial(self.streamed.run, index),
                    batches=(
                        [(self.states.here(x), self.states.here(y)) for x, y in b] for b in batches
                    ),
                    note=lambda text: self.report.note(f"{layer}: {text}"),
                    ranks=self.ranks,
                )
            )
        for name, spec in specs.items() if o.more_bits else ():
            weight = tensors[f"{name}.weight"].to(device, torch.float32)
            shared = SharedQuantizer(LsqQuantizer(), self.ranks)
            others.add(name, weight, spec, shared, squares[name].value())
        for name, linear in result.items():
            saved |= {n: t.cpu() for n, t in native_tensors(name, linear).items()}
        return saved

    def _quantize_experts(
        self,
        quantizer: LayerQuantizer,
        linears: Mapping[str, nn.Linear],
        tensors: Mapping[str, Tensor],
        specs: Mapping[str, QuantSpec],
        squares: Mapping[str, SquareSum],
        tokens: ExpertTokens,
    ) -> Iterator[tuple[str, QuantizedLinear]]:
        """Experts' linears that are not trained, by least squares: of outputs, or of weights."""
        for name in [n for n in specs if EXPERTS in n]:
            seen = squares[name].tokens
            group = InputGroup([name], tokens=seen)
            enough = seen >= least_tokens(quantizer.name, linears[name].in_features)
            if enough and self.options.trains_experts:
                tokens.count(group, used=True)
                continue
            chosen = LsqQuantizer() if seen >= FEW else DATA_FREE
            tokens.count(group, used=chosen is not DATA_FREE)
            weight = tensors[f"{name}.weight"].to(self.streamed.device, torch.float32)
            with named(name):
                shared = SharedQuantizer(chosen, self.ranks)
                yield name, shared.quantize(weight, specs[name], squares[name].value())

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

    def _squares(
        self, index: int, names: Iterable[str], student: ActivationStore
    ) -> dict[str, SquareSum]:
        """Sums over the inputs of a loaded layer's linears, over all rows."""
        linears = self.streamed.linears(index)
        sums = {name: SquareSum(linears[name].in_features, self.streamed.device) for name in names}
        handles = [
            linears[name].register_forward_pre_hook(lambda _module, args, s=each: s.add(args[0]))
            for name, each in sums.items()
        ]
        try:
            for _, batch in student.batches(self.options.batch_rows, self.rows):
                self.streamed.run(index, self.states.here(batch))
        finally:
            for handle in handles:
                handle.remove()
        for each in sums.values():
            each.merge(self.ranks.added)
        return sums

    def _hessian(self, index: int, linear: nn.Linear, student: ActivationStore) -> Tensor:
        total = HessianSum(linear.in_features, self.streamed.device)
        for _, batch in student.batches(self.options.batch_rows, self.rows):
            hidden = self.states.here(batch)
            total.add(linear_input(self.streamed, index, linear, hidden))
        total.merge(self.ranks.added)
        return total.take()

    def _warn(self, linears: list[str], text: str) -> None:
        self.report.warn(f"{', '.join(linears)}: {text}")

    @contextmanager
    def _as_saved(
        self, index: int, saved: dict[str, Tensor]
    ) -> Iterator[Callable[[Tensor], Tensor]]:
        """What runs a layer with the weights that its stored tensors stand for."""
        if isinstance(method := self.options.quantizer, LayerMethod):
            with method.as_saved(index, saved) as run:
                yield run
            return
        for name, module in self.streamed.linears(index).items():
            if (spec := self.options.spec_for(name)) is not None:
                self._assign(module, saved, name, spec)
        yield partial(self.streamed.run, index)

    def _assign(
        self, module: nn.Linear, stored: dict[str, Tensor], name: str, spec: QuantSpec
    ) -> None:
        """Give a loaded linear the weight that its stored tensors stand for, adapter included."""
        if EXPERTS in name and self.streamed.experts_apart:
            self.streamed.pack_linear(name, stored, spec)
            return
        words, scale, zero_point = (
            stored[f"{name}.{part}"].to(module.weight.device)
            for part in ("weight", "weight_scale", "zero_point")
        )
        weight = dequantize_packed(words, scale, zero_point, spec.bits, dtype=module.weight.dtype)
        if self.options.initial is not None and f"{name}.a" in stored:
            a, b = stored[f"{name}.a"], stored[f"{name}.b"]
            weight = corrected(weight, a, b, self.options.initial.spec, spec.group_size)
        module.weight = nn.Parameter(weight, requires_grad=False)

    def _propagate(self, index: int, source: ActivationStore, target: Path) -> str:
        """Run a loaded layer over this process's rows, from file to file; the new file's xxh3."""
        with self.states.writer(target, f"decoder layer {index}") as writer:
            for _, batch in source.batches(self.options.batch_rows, self.rows):
                writer.append(self.streamed.run(index, self.states.here(batch)))
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

    def _batches(self, states: ActivationStore) -> Iterator[Tensor]:
        """This process's rows, on the device."""
        for _, batch in states.batches(self.options.batch_rows, self.rows):
            yield self.states.here(batch)

    def _states(self, who: str, index: int) -> Path:
        return self.work.file(f"{who}-{index:04d}.bin")

    def _source_hashes(self, names: Iterable[str]) -> dict[str, str]:
        return {name: self.checkpoint.hashes[name] for name in names}


def check_source(checkpoint: Checkpoint, work: WorkDir) -> None:
    """That the source is still what the finished units were made from.

    Files whose size, times and inode are what they were are taken as unchanged; the tensors that
    were read from any other file are hashed again.

    Raises:
        CheckpointError: a file changed; the message names it.
    """
    now = {k: list(v) for k, v in checkpoint.file_signatures().items()}
    touched = [k for k, v in work.job["choices"]["files"].items() if now.get(k) != v]
    if not touched:
        return
    read: dict[str, str] = {}
    for record in work.records:
        read |= record.facts.get("source", {})
    for shard in touched:
        names = [n for n in checkpoint.tensors if shard in checkpoint.shards_of([n])]
        for name in names:
            expected = read.get(name)
            if expected is None:
                what = f"it was touched, and {name} had not been read yet"
            else:
                checkpoint.read([name])
                if checkpoint.hashes[name] == expected:
                    continue
                what = f"{name} differs"
            raise CheckpointError(
                f"{checkpoint.source.label}/{shard}: the source changed since {work.path} was "
                f"begun: {what}\n"
                "  pass --work-dir with a new folder to convert the checkpoint as it is now"
            )
