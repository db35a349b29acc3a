"""Any supported transformers model, with at most one decoder layer's weights in memory.

What a decoder layer is called with (masks, positions, rotary embeddings) is recorded from
transformers' own forward pass, so that nothing about an architecture is written here.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn
from torch.func import functional_call

from rilq.converter.architecture import (
    build_skeleton,
    decoder_layers,
    load_config,
    tied_head_differs,
)
from rilq.converter.experts import LayerTensors, fetched_when_run, names_at_once
from rilq.errors import CheckpointError, UnsupportedArchitectureError
from rilq.formats.checkpoint import Checkpoint
from rilq.formats.experts import Experts
from rilq.formats.native import RilqConfig
from rilq.formats.packed_linear import RilqLinear
from rilq.formats.quantized import quantization_of
from rilq.formats.resq.config import ResqConfig
from rilq.formats.shard import listing
from rilq.formats.spec import QuantSpec

# Old exports stored these buffers; transformers computes them from the config.
_DERIVED = ("rotary_emb.inv_freq", "attn.masked_bias", "attn.bias.causal")


class StreamedModel:
    """A checkpoint's decoder, run one layer at a time.

    Attributes:
        config: transformers' configuration.
        model: the causal language model; its decoder layers are on the meta device unless loaded.
        prefix: module name of the layer list, for example `model.layers`.
        dtype, device: where and in what the layers compute.
        experts_apart: the experts of a layer do not fit the memory together; each is in it only
            while it runs.
    """

    def __init__(self, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> None:
        self.checkpoint = checkpoint
        self.quantization = quantization_of(checkpoint)
        self.config = load_config(checkpoint)
        self.dtype, self.device = dtype, device
        self.model = build_skeleton(self.config, dtype, self.quantization)
        self.prefix, self.layers = decoder_layers(self.model, self.config)
        self._calls: list[dict[str, Any]] = []
        self._seqlen = 0
        self.experts_apart = False
        self._check_tensors()

    def over(self, quantization: RilqConfig | ResqConfig) -> StreamedModel:
        """The same model over quantized linears, in modules of its own, none loaded.

        It shares what `prepare` has recorded by now.
        """
        other = copy.copy(self)
        other.quantization, other.config = quantization, load_config(self.checkpoint)
        other.model = build_skeleton(other.config, self.dtype, quantization)
        other.prefix, other.layers = decoder_layers(other.model, other.config)
        return other

    # -- what the checkpoint must hold -----------------------------------------------------------

    def _check_tensors(self) -> None:
        """Every tensor of the model is in the checkpoint with its shape, and nothing else is."""
        expected = {name: tensor.shape for name, tensor in self.model.state_dict().items()}
        tied = _tied_names(self.model)
        found = self.checkpoint.tensors
        missing = [n for n in expected if n not in found and n not in tied]
        # Layers of DeepSeek-V3 that guess further tokens; transformers does not know them either.
        ignored: Any = self.model._keys_to_ignore_on_load_unexpected or []
        extra = [
            n
            for n in found
            if n not in expected
            and not n.endswith(_DERIVED)
            and not any(re.search(pattern, n) for pattern in ignored)
        ]
        wrong = [n for n in expected if n in found and tuple(expected[n]) != found[n].shape]
        count = len(self.layers)
        label = self.checkpoint.source.label
        if missing:
            raise CheckpointError(
                f"{label}: missing from the checkpoint: {listing(missing)}\n"
                f"  config.json (num_hidden_layers {count}) asks for them; download the "
                "checkpoint again, or correct config.json"
            )
        if extra:
            raise CheckpointError(
                f"{label}: not part of the model that config.json describes "
                f"(num_hidden_layers {count}): {listing(extra)}\n"
                "  correct config.json, or download the checkpoint again"
            )
        if wrong:
            name = wrong[0]
            raise CheckpointError(
                f"{label}: {name}: shape {list(found[name].shape)}, but config.json asks for "
                f"{list(expected[name])} ({len(wrong)} of {len(expected)} tensors disagree)\n"
                "  correct hidden_size, intermediate_size, the head counts or vocab_size"
            )

    def layer_names(self, index: int) -> list[str]:
        """Checkpoint names of decoder layer `index`, as stored."""
        return list(self._names_by_layer.get(str(index), []))

    @cached_property
    def _names_by_layer(self) -> dict[str, list[str]]:
        """Of all decoder layers, by number; a mixture has a hundred thousand."""
        found: dict[str, list[str]] = {}
        for name in self.checkpoint.tensors:
            if name.startswith(f"{self.prefix}.") and not name.endswith(_DERIVED):
                index = name.removeprefix(f"{self.prefix}.").partition(".")[0]
                found.setdefault(index, []).append(name)
        return found

    def outer_names(self) -> list[str]:
        """Checkpoint names of everything outside the decoder layers (a tied head is left out)."""
        tied = _tied_names(self.model)
        return [
            n
            for n in self.checkpoint.tensors
            if not n.startswith(self.prefix + ".") and not n.endswith(_DERIVED) and n not in tied
        ]

    def scoring_names(self) -> list[str]:
        """Those of `outer_names` that `logits` needs: an embedding only where it is the head."""
        embedding = self.model.get_input_embeddings()  # type: ignore[operator]
        if _tied_names(self.model):
            return self.outer_names()
        unused = {f"{n}.weight" for n, m in self.model.named_modules() if m is embedding}
        return [name for name in self.outer_names() if name not in unused]

    def tied_names(self) -> list[str]:
        """Checkpoint names of a head that is stored although it is the embedding."""
        return sorted(_tied_names(self.model) & self.checkpoint.tensors.keys())

    def reading_steps(self) -> list[list[str]]:
        """What is read of the checkpoint, in order: all that is outer, then layer by layer."""
        layers = [self.layer_names(index) for index in range(len(self.layers))]
        return [[*self.outer_names(), *self.tied_names()], *layers]

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """The linears of decoder layer `index` by full module name, in the order of definition."""
        return {
            f"{self.prefix}.{index}.{name}": module
            for name, module in self.layers[index].named_modules()
            if isinstance(module, nn.Linear)
        }

    def experts(self, index: int) -> tuple[str, Experts] | None:
        """The experts of decoder layer `index` with their full name, if it has any."""
        for name, module in self.layers[index].named_modules():
            if isinstance(module, Experts):
                return f"{self.prefix}.{index}.{name}", module
        return None

    def expert_bytes(self) -> int:
        """What the experts of the largest layer take in memory together."""
        sizes = [0]
        for found in filter(None, map(self.experts, range(len(self.layers)))):
            tensors = found[1].state_dict().values()
            sizes.append(sum(tensor.numel() * tensor.element_size() for tensor in tensors))
        return max(sizes)

    # -- weights in and out ----------------------------------------------------------------------

    def load_outer(self, tensors: dict[str, Tensor]) -> None:
        """Put embedding, final norm and head on the device; they stay until dropped."""
        for name, value in tensors.items():
            # Cloned: a view would keep the whole shard mapped for as long as the model lives.
            place_tensor(self.model, name, value.clone(), self.device)
        self.model.tie_weights()  # type: ignore[operator]
        place_buffers(self.model, self.device)

    def check_tied(self) -> None:
        """transformers would use a stored head that differs; the embedding must not stand in.

        Raises:
            CheckpointError: a head is stored that is not the embedding it is said to be tied to.
        """
        for name in self.tied_names():
            head = self.model.get_parameter(name)
            if not torch.equal(self.checkpoint.read([name])[name].to(head), head):
                raise tied_head_differs(self.checkpoint.source.label, name)

    def read_layer(self, index: int) -> LayerTensors:
        """The tensors of decoder layer `index`; those of experts later, if they are apart."""
        return self.layer_tensors(index, self.checkpoint.read(self.names_at_once(index)))

    def names_at_once(self, index: int) -> list[str]:
        """Names of what decoder layer `index` is loaded with: not of experts that are apart."""
        names = self.layer_names(index)
        return names_at_once(names) if self.experts_apart else names

    def layer_tensors(self, index: int, read: Mapping[str, Tensor]) -> LayerTensors:
        """As `read_layer`, of a layer whose `names_at_once` are read already."""
        return LayerTensors(self.checkpoint, self.layer_names(index), read)

    @contextmanager
    def loaded(self, index: int, tensors: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        """Decoder layer `index` with its weights on the device; afterwards back on meta.

        Args:
            tensors: by full checkpoint name, as `read_layer` gives them.
        """
        apart = tensors.apart if isinstance(tensors, LayerTensors) else set()
        linears = dict(self.linears(index)) if apart else {}

        def place(name: str) -> None:
            place_tensor(self.model, name, tensors[name], self.device)

        try:
            for name in tensors:
                if name not in apart:
                    place(name)
            found = self.experts(index) if apart else None
            with fetched_when_run(found[1], found[0], place) if found else nullcontext():
                yield self.layers[index]
        finally:
            for name, linear in linears.items():  # of what `pack_linear` replaced
                self.model.set_submodule(name, linear)
            self.layers[index].to("meta")

    def pack_linear(self, name: str, native: Mapping[str, Tensor], spec: QuantSpec) -> None:
        """Run a linear of a loaded layer, whose experts are apart, over its packed codes.

        Args:
            native: tensors of its layer by full name, as the output will hold them.
        """
        old = self.model.get_submodule(name)
        assert isinstance(old, nn.Linear), "no linear"
        packed = RilqLinear(old.in_features, old.out_features, spec, device="meta")
        self.model.set_submodule(name, packed)
        for part in ("weight", "weight_scale", "zero_point"):
            place_tensor(self.model, f"{name}.{part}", native[f"{name}.{part}"], self.device)

    def drop_embeddings(self) -> None:
        """Free the embedding and the head: layers and final norm run without them."""
        for module in (self.model.get_input_embeddings(), self.model.get_output_embeddings()):  # type: ignore[operator]
            module.to("meta")

    def unload(self) -> None:
        """Drop every weight; the model can be asked about, but not run."""
        self.model.to("meta")

    # -- running -----------------------------------------------------------------------------------

    @torch.no_grad()
    def prepare(self, seqlen: int) -> None:
        """Record what transformers passes to every decoder layer for rows of `seqlen` tokens.

        Two different rows are recorded and compared: arguments that depend on the tokens cannot
        be used again for other rows.

        Raises:
            UnsupportedArchitectureError: they do differ.
        """
        if seqlen == self._seqlen:
            return
        first = torch.zeros(1, seqlen, dtype=torch.long, device=self.device)
        second = torch.arange(seqlen, device=self.device)[None] % self.config.vocab_size
        calls = [r.kwargs for r in self._record(input_ids=first)]
        again = [r.kwargs for r in self._record(input_ids=second)]
        if not _equal(calls, again):
            raise UnsupportedArchitectureError(
                f"{self.config.model_type}: a decoder layer's arguments depend on the tokens; "
                "such a model cannot be streamed"
            )
        self._calls, self._seqlen = calls, seqlen

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """First hidden states `[rows, seq_len, hidden]` of token rows `[rows, seq_len]`."""
        return self._record(input_ids=tokens.to(self.device))[0].hidden

    def run(
        self, index: int, hidden: Tensor, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Decoder layer `index` (loaded) on hidden states `[rows, seq_len, hidden]`.

        Args:
            weights: in the place of some of the layer's own, by the full name of their linear.
        """
        layer, call = self.layers[index], self._calls[index]
        if weights is None:
            out = layer(hidden, **call)
        else:
            start = len(f"{self.prefix}.{index}.")
            own = {f"{name[start:]}.weight": weight for name, weight in weights.items()}
            out = functional_call(layer, own, (hidden,), call)
        out = out[0] if isinstance(out, tuple) else out
        if out.shape != hidden.shape:
            raise UnsupportedArchitectureError(
                f"{self.config.model_type}: a decoder layer turned {list(hidden.shape)} into "
                f"{list(out.shape)}"
            )
        return out  # type: ignore[no-any-return]

    def final_norm(self, hidden: Tensor) -> Tensor:
        """What feeds the head `[rows, seq_len, hidden]`, from the last decoder layer's output."""
        with self._recorders(last=hidden):
            out = self.model.base_model(inputs_embeds=hidden, use_cache=False)  # type: ignore[operator]
        return out.last_hidden_state  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `[rows, seq_len, vocabulary]` float32 from the last decoder layer's output."""
        with self._recorders(last=hidden):
            out = self.model(inputs_embeds=hidden, use_cache=False)
        return out.logits.float()  # type: ignore[no-any-return]

    def _record(self, **inputs: Tensor) -> list[_Recorder]:
        """Run everything but the decoder layers; what each of them would have been called with."""
        with self._recorders() as recorders:
            self.model.base_model(**inputs, use_cache=False)  # type: ignore[operator]
        for before, after in zip(recorders, recorders[1:], strict=False):
            if after.hidden is not before.hidden or after.version != before.version:
                raise UnsupportedArchitectureError(
                    f"{self.config.model_type}: the model works on hidden states between decoder "
                    "layers; such a model cannot be streamed"
                )
        return recorders

    @contextmanager
    def _recorders(self, last: Tensor | None = None) -> Iterator[list[_Recorder]]:
        """Recorders in place of the decoder layers; the last one returns `last`, if given."""
        real = list(self.layers)
        recorders = [_Recorder(layer) for layer in real]
        recorders[-1].answer = last
        try:
            for index, recorder in enumerate(recorders):
                self.layers[index] = recorder
            yield recorders
        finally:
            for index, layer in enumerate(real):
                self.layers[index] = layer


class _Recorder(nn.Module):
    """Stands in for a decoder layer: keeps what it was called with, passes the input on."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # not a submodule: its weights are not this module's
        self.hidden = torch.empty(0)
        self.version = 0
        self.kwargs: dict[str, Any] = {}
        self.answer: Tensor | None = None

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        self.hidden, self.version, self.kwargs = hidden, hidden._version, kwargs
        return hidden if self.answer is None else self.answer

    def __getattr__(self, name: str) -> Any:
        # Older transformers ask the layer for its attention type.
        return getattr(self.__dict__["layer"], name)


def place_tensor(model: nn.Module, name: str, value: Tensor, device: torch.device) -> None:
    """Give the parameter or buffer `name` its value, in the dtype that the model was built with."""
    owner, _, leaf = name.rpartition(".")
    dtype = getattr(model.get_submodule(owner), leaf).dtype
    set_module_tensor_to_device(model, name, device, value=value, dtype=dtype, non_blocking=True)


def place_buffers(model: nn.Module, device: torch.device) -> None:
    """Move buffers that transformers computed (rotary frequencies) to the device, dtypes kept."""
    for name, buffer in list(model.named_buffers()):
        if not buffer.is_meta:
            set_module_tensor_to_device(model, name, device, value=buffer)


def input_groups(
    streamed: StreamedModel, index: int, linears: dict[str, nn.Linear], hidden: Tensor
) -> list[list[str]]:
    """Linears of a loaded decoder layer that read the same input, in the order they run.

    For Llama: q, k, v; o; gate, up; down. Found by running one batch, so fused projections and
    other layouts need no list of names.

    Args:
        linears: those to group, by full name.
        hidden: any hidden states of that layer, `[rows, seq_len, hidden]`.
    """
    inputs: list[Tensor] = []
    groups: list[list[str]] = []

    def seen(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if inputs and args[0] is inputs[-1]:
                groups[-1].append(name)
            else:
                inputs.append(args[0])
                groups.append([name])

        return hook

    handles = [m.register_forward_pre_hook(seen(name)) for name, m in linears.items()]
    try:
        streamed.run(index, hidden)
    finally:
        for handle in handles:
            handle.remove()
    return groups


class _Reached(Exception):
    """Ends a decoder layer's forward pass once the input that was wanted is known."""


def linear_input(streamed: StreamedModel, index: int, linear: nn.Linear, hidden: Tensor) -> Tensor:
    """The input of one linear of a loaded decoder layer; what comes after it is not computed.

    Returns:
        `[rows, seq_len, in_features]`, in the compute dtype.
    """
    return module_inputs(streamed, index, linear, hidden)[0]


def module_inputs(
    streamed: StreamedModel, index: int, module: nn.Module, hidden: Tensor
) -> tuple[Tensor, ...]:
    """What a part of a loaded decoder layer is called with; what comes after is not computed."""
    caught: list[tuple[Tensor, ...]] = []

    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        caught.append(args)
        raise _Reached

    handle = module.register_forward_pre_hook(hook)
    try:
        streamed.run(index, hidden)
    except _Reached:
        pass
    finally:
        handle.remove()
    return caught[0]


def _tied_names(model: nn.Module) -> set[str]:
    """Names of tensors that are another tensor: a head tied to the embedding is not stored."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return set()
    head = model.get_output_embeddings()  # type: ignore[operator]
    return {f"{n}.weight" for n, module in model.named_modules() if module is head}


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_equal(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(_equal, left, right))
    return bool(left == right)
