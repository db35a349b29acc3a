"""The first pass of ResQ: what the bases are made from, of the full-precision model.

Each decoder layer is read once and run over the calibration rows, and is one unit of work: a
stopped pass goes on after the last finished layer, with the same sums to the last bit. Products are
made and summed in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rilq.calib.statistics import HessianSum
from rilq.converter.fewer_rows import RowsAtOnce, with_fewer_rows
from rilq.converter.layer_reader import LayerReader, reading_ahead
from rilq.converter.layers import StreamedModel
from rilq.converter.machine import large_blocks_returned, return_free_memory
from rilq.converter.ranks import ALONE, Ranks
from rilq.converter.resq.basis import Covariances, Sizes
from rilq.converter.resq.rotated import resq_sizes
from rilq.converter.states import StateFiles
from rilq.converter.workdir import WorkDir
from rilq.formats.checkpoint import Checkpoint
from rilq.formats.shard_writer import write_tensors
from rilq.formats.verify import file_hash
from rilq.progress import Reporter

STAGE = "covariances"
# The norms whose outputs, without their weights, are what U_A turns.
NORMS = ("input_layernorm", "post_attention_layernorm")
ATTENTION = "self_attn"


@dataclass
class LayerSums:
    """Sums over one decoder layer's calibration tokens.

    Attributes:
        residual: of the inputs of q/k/v_proj and gate/up_proj with the norms' weights divided out.
        values: of the outputs of v_proj, one sum for each KV head.
        keys: of the keys of all KV heads, after their position is rotated in.
    """

    residual: HessianSum
    values: list[HessianSum]
    keys: HessianSum

    @classmethod
    def zero(cls, sizes: Sizes, device: torch.device) -> LayerSums:
        """Of a layer of a model of these sizes, on a device."""
        new = partial(HessianSum, device=device, dtype=torch.float64)
        heads = [new(sizes.head_dim) for _ in range(sizes.kv_heads)]
        return cls(new(sizes.hidden), heads, new(sizes.head_dim))

    def merge(self, added: Callable[[Tensor], Tensor]) -> None:
        """See `HessianSum.merge`."""
        for each in (self.residual, *self.values, self.keys):
            each.merge(added)

    def add_keys_and_values(self, keys: Tensor, values: Tensor) -> None:
        """Add those of some rows, each `[rows, kv_heads, seq_len, head_dim]`."""
        self.keys.add(keys)
        for head, total in enumerate(self.values):
            total.add(values[:, head])


@dataclass(frozen=True)
class _Seen:
    """Stands in for a cache: is shown the keys and values of a call, and gives them back."""

    show: Callable[[Tensor, Tensor], None]

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.show(keys, values)
        return keys, values


@contextmanager
def watched(layer: nn.Module, sums: LayerSums) -> Iterator[None]:
    """While a loaded decoder layer runs, what passes through it is added to `sums`."""

    def normalized(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        # As the norm itself does it: in float32, before its weight.
        hidden = args[0].float()
        mean = hidden.square().mean(-1, keepdim=True)
        sums.residual.add(hidden * torch.rsqrt(mean + float(norm.variance_epsilon)))  # type: ignore[arg-type]

    def attended(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, "past_key_values": _Seen(sums.add_keys_and_values)}

    with ExitStack() as stack:
        for name in NORMS:
            handle = layer.get_submodule(name).register_forward_pre_hook(normalized)
            stack.callback(handle.remove)
        attention = layer.get_submodule(ATTENTION)
        stack.callback(attention.register_forward_pre_hook(attended, with_kwargs=True).remove)
        yield


class CovariancePass:
    """Streams the full-precision checkpoint once; every decoder layer is one unit of work.

    Args:
        checkpoint: the source.
        streamed: its model, nothing loaded yet.
        tokens: calibration rows `[rows, seq_len]` int64.
        work: where sums and hidden states go, and what is done already.
        at_once: rows that run at once.
        ranks: this process among those that share the rows; each keeps states of its own rows.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        streamed: StreamedModel,
        tokens: Tensor,
        work: WorkDir,
        at_once: RowsAtOnce,
        report: Reporter,
        ranks: Ranks = ALONE,
    ) -> None:
        self.checkpoint, self.streamed, self.tokens = checkpoint, streamed, tokens
        self.work, self.at_once, self.report = work, at_once, report
        self.layers = len(streamed.layers)
        self.ranks, self.states = ranks, StateFiles(streamed, tokens, ranks)

    @torch.no_grad()
    @large_blocks_returned()
    def run(self) -> Covariances:
        """Do what is not done yet."""
        done = len(self.work.stage(STAGE))
        self.report.stage(STAGE, self.layers, "layer")
        if done <= self.layers:
            self._stream(done)
            self.streamed.unload()
        return self._means()

    def _stream(self, done: int) -> None:
        outer, *layers = self.streamed.reading_steps()
        left = layers[max(0, done - 1) :]
        with reading_ahead(
            self.checkpoint,
            left if done else [outer, *left],
            budget=max(map(self.checkpoint.nbytes, layers)),
            pinned=self.streamed.device.type == "cuda",
        ) as reader:
            if not done:
                self._load_outer(self._read_outer())
                self._recovering(self._embedding)
                reader.advance()
            else:
                self._load_outer(load_file(self._outer))
            self.streamed.drop_embeddings()
            reader.start(left)
            self._layers(max(0, done - 1), reader)

    def _read_outer(self) -> dict[str, Tensor]:
        """From the source, once: a stopped pass finds them in the work folder."""
        tensors = self.checkpoint.read(self.streamed.outer_names())
        self.ranks.once(partial(write_tensors, self._outer, tensors))
        return tensors

    def _load_outer(self, tensors: dict[str, Tensor]) -> None:
        """What the layers are called with depends on them."""
        self.streamed.load_outer(tensors)
        self.streamed.prepare(self.tokens.shape[1])

    def _embedding(self, size: int) -> None:
        self.streamed.check_tied()
        passing = self.states.embedded(self._states(0), size)
        self.work.commit(
            STAGE,
            "embedding",
            {"source": self._hashes(self.streamed.outer_names()), **self.states.facts()},
            files={self._outer: file_hash(self._outer)},
            passing=passing,
        )

    def _layers(self, first: int, reader: LayerReader) -> None:
        self.report.step(first)
        for index in range(first, self.layers):
            tensors = self.streamed.layer_tensors(index, reader.take())
            self._recovering(partial(self._layer, index, tensors))
            reader.advance()
            self.report.step(index + 1)

    def _layer(self, index: int, tensors: Mapping[str, Tensor], size: int) -> None:
        """Stream one decoder layer; what comes out of the last one is needed by nobody."""
        sizes, device = resq_sizes(self.streamed.config), self.streamed.device
        sums = LayerSums.zero(sizes, device)
        states = self.states.store(self._states(index), self.work.stage(STAGE)[index])
        passing: dict[Path, str] = {}
        with self.streamed.loaded(index, tensors) as layer, watched(layer, sums):
            outputs = (
                self.streamed.run(index, hidden) for hidden in self.states.batches(states, size)
            )
            if index + 1 < self.layers:
                target = self._states(index + 1)
                with self.states.writer(target, f"decoder layer {index}") as writer:
                    for out in outputs:
                        writer.append(out)
                passing[self.states.own(target)] = writer.digest
            else:
                for _ in outputs:
                    pass
        return_free_memory()
        sums.merge(self.ranks.added)
        residual, heads = self._save(index, sums)
        self.work.commit(
            STAGE,
            f"layer {index}",
            {"source": self._hashes(list(tensors)), **self.states.facts()},
            files={heads: file_hash(heads)},
            passing={**passing, residual: file_hash(residual)},
        )

    def _save(self, index: int, sums: LayerSums) -> tuple[Path, Path]:
        """Write a layer's means, that of the residual stream on top of those before it."""
        residual, heads = self._residual(index), self._heads(index)
        total = sums.residual.take().cpu()
        if index:
            total += load_file(self._residual(index - 1))["residual"]
        values = torch.stack([each.value() for each in sums.values])
        means = {"values": values.cpu(), "keys": sums.keys.value().cpu()}
        self.ranks.once(partial(write_tensors, residual, {"residual": total}))
        self.ranks.once(partial(write_tensors, heads, means))
        return residual, heads

    def _means(self) -> Covariances:
        """All layers have the same number of tokens, so the mean of their means is the mean."""
        heads = [load_file(self._heads(index)) for index in range(self.layers)]
        return Covariances(
            load_file(self._residual(self.layers - 1))["residual"] / self.layers,
            torch.stack([each["values"] for each in heads]),
            torch.stack([each["keys"] for each in heads]),
        )

    def _recovering(self, unit: Callable[[int], None]) -> None:
        """Do one unit, with fewer rows at once where memory asks for it."""
        with_fewer_rows(
            "the covariances",
            self.at_once,
            lambda rows: unit(rows.batch_rows),
            self.work,
            self.report,
        )

    @property
    def _outer(self) -> Path:
        """Embedding, final norm and head, as in the source."""
        return self.work.file("plain-outer.safetensors")

    def _residual(self, index: int) -> Path:
        """The sum over decoder layers `0 .. index` of their means."""
        return self.work.file(f"residual-{index:04d}.safetensors")

    def _heads(self, index: int) -> Path:
        return self.work.file(f"heads-{index:04d}.safetensors")

    def _states(self, index: int) -> Path:
        return self.work.file(f"plain-{index:04d}.bin")

    def _hashes(self, names: list[str]) -> dict[str, str]:
        return {name: self.checkpoint.hashes[name] for name in names}
