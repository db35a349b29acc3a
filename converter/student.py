"""The quantized model to train: transformers' modules over 2-bit linears.

Three tiers hold the same weights: `packed` keeps the packed codes and dequantizes in every forward
and backward pass; `dense` dequantizes them once or, where scales are trained, keeps a byte for each
code; so do both where codes are trained. `offload` is `packed` with the decoder layers elsewhere
(offload.py), but for adapters. Their losses and gradients agree to float rounding.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig
from transformers.modeling_outputs import MoeModelOutputWithPast

from rilq.converter.adapters import Adapter, AdapterSpec
from rilq.converter.architecture import build_skeleton, decoder_layers
from rilq.converter.layers import place_buffers, place_tensor
from rilq.converter.machine import LARGE_BLOCK
from rilq.converter.merge import trained_grid
from rilq.converter.offload import (
    Homes,
    Layers,
    call_with,
    elsewhere,
    own_forward,
    zeros_on_host,
)
from rilq.converter.options import Tier, Train
from rilq.converter.quantizers.layerwise import round_through
from rilq.formats.native import RilqConfig, RilqLinear, packed_linear
from rilq.formats.packing import stored_codes
from rilq.formats.resq.config import ResqConfig
from rilq.formats.resq.linear import ResqLinear


class AdaptedLinear(nn.Module):
    """A frozen linear with an adapter beside it."""

    def __init__(self, base: nn.Module, adapter: Adapter) -> None:
        super().__init__()
        self.base, self.adapter = base, adapter

    def forward(self, x: Tensor) -> Tensor:
        """`base(x) + adapter(x)`, `[..., in_features]` to `[..., out_features]`."""
        out: Tensor = self.base(x) + self.adapter(x)
        return out


class TrainedLinear(nn.Module):
    """A quantized linear whose scales are trained, with what moves its minima.

    `W = s * (e^t * (code - zero_point) + d) + c * B A`: stored scale `s` and zero-point, trained
    `t` and, without an adapter, `d`; or a pooled adapter's `c * B A`. Each of these is one value
    per group, so that all of it merges into scale and zero-point (merge.py). Codes that are trained
    are rounded in every forward pass, and merge into new codes. `t` and `d` start at zero
    and have no unit, so one learning rate serves weights of any size.

    Args:
        base: the linear as it is stored; its codes may be one byte each, as of `stored_codes`.
        zeros: makes float32 zeros of a shape, where what is trained is to be.

    Attributes:
        log_scale: `t`, `[out_features, groups]` float32.
        offset: `d`, alike, in steps of the stored scale; None with an adapter or a fixed minimum.
        code_shift: what moves each code before it is rounded, `[out_features, in_features]`
            float32, straight-through; None where codes are frozen.
        adapter: a pooled one, or None.
    """

    def __init__(
        self,
        base: RilqLinear,
        *,
        offsets: bool,
        trains_codes: bool,
        adapter: Adapter | None,
        zeros: Callable[[int, int], Tensor],
    ) -> None:
        super().__init__()
        self.base = base
        grid = (base.out_features, base.in_features // base.group_size)
        self.log_scale = nn.Parameter(zeros(*grid))
        self.offset = nn.Parameter(zeros(*grid)) if offsets else None
        self.code_shift = (
            nn.Parameter(zeros(base.out_features, base.in_features)) if trains_codes else None
        )
        self.adapter = adapter

    def forward(self, x: Tensor) -> Tensor:
        """`x W^T + bias`, `[..., in_features]` to `[..., out_features]`."""
        base = self.base
        scale, zero_point = trained_grid(
            base.weight_scale,
            base.zero_point,
            log_scale=self.log_scale,
            offset=self.offset,
            shift=self.adapter.shift() if self.adapter else None,
        )
        if self.code_shift is None:
            return packed_linear(x, base.weight, scale, zero_point, base.bias, base.bits)
        codes = round_through((base.weight + self.code_shift).clamp(0, 2**base.bits - 1))
        groups = codes.unflatten(1, (scale.shape[1], -1))
        weight = (groups - zero_point[..., None]) * scale[..., None]
        bias = None if base.bias is None else base.bias.to(x.dtype)
        return F.linear(x, weight.flatten(1).to(x.dtype), bias)


class _Given(nn.Module):
    """Stands in for the decoder: its final hidden states are given, the head does the rest."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, **_: object) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=self.hidden)


class _Last:
    """The last decoder layer's output, from its call until it is taken."""

    def __init__(self) -> None:
        self._output: Tensor | None = None

    def keep(self, _layer: nn.Module, _args: object, output: Tensor | tuple[Tensor]) -> None:
        """A forward hook."""
        self._output = output[0] if isinstance(output, tuple) else output

    def taken(self) -> Tensor:
        output, self._output = self._output, None
        assert output is not None, "the last decoder layer was not called"
        return output


class Student(nn.Module):
    """transformers' own model over quantized weights.

    A quantized embedding stays packed: only the rows of a batch are dequantized. A quantized head
    is dequantized once in every tier: each batch needs all of it, in a temporary as large.

    Args:
        config: of the source model.
        quantization: which linears are quantized and how.
        read_layer: native tensors of decoder layer `i` by full name.
        outer: embedding, final norm, head by full name.
        train: what is trained of every quantized linear.
        adapters: of those that are trained; None for none.
        tier: "dense", "packed" or "offload".
        recompute: keep only each decoder layer's input for the backward pass, and run the layer
            again there: a third more time, for a fraction of the memory. Offloaded layers need it.
            On a CPU gradients then come by `backward` only, and not by `torch.autograd.grad`.

    Attributes:
        device: where it computes. Offloaded layers have their trained scales in host memory.
        trained: what is trained, float32, by `<full name of the linear>.<part>`: `a` and `b` of
            an adapter, `log_scale`, `offset` and `code_shift` of a `TrainedLinear`.
        vocabulary: logits of each position.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        quantization: RilqConfig | ResqConfig,
        *,
        read_layer: Callable[[int], dict[str, Tensor]],
        outer: dict[str, Tensor],
        train: Train,
        adapters: AdapterSpec | None,
        tier: Tier,
        dtype: torch.dtype,
        device: torch.device,
        recompute: bool = True,
    ) -> None:
        super().__init__()
        assert tier != "offload" or (recompute and train != "all+codes"), "cannot be offloaded"
        self.model = build_skeleton(config, dtype, quantization)
        self.device, self.vocabulary = device, int(config.vocab_size)
        self.trained: dict[str, nn.Parameter] = {}
        self._elsewhere: Layers | None = None
        prefix, layers = decoder_layers(self.model, config)
        for name, value in outer.items():
            place_tensor(self.model, name, value, device)
        self.model.tie_weights()  # type: ignore[operator]
        place_buffers(self.model, device)
        homes = []
        for index, layer in enumerate(layers):
            tensors = read_layer(index)
            homes.append(Homes(self.model, tensors))
            for name, value in tensors.items() if tier != "offload" else ():
                place_tensor(self.model, name, value, device)
            for path, module in list(layer.named_modules()):
                if isinstance(module, RilqLinear | ResqLinear):
                    full = f"{prefix}.{index}.{path}"
                    self.model.set_submodule(
                        full, self._linear(full, module, train, adapters, tier, dtype)
                    )
        if tier == "offload":
            self._elsewhere = elsewhere(
                list(layers),
                lambda index: homes[index].named_in(layers[index], read_layer(index)),
                device,
            )
        kept = KeptInputs(len(layers))
        for index, layer in enumerate(layers) if recompute else ():
            forward = (
                own_forward(layer)
                if self._elsewhere is None
                else call_with(self._elsewhere, index, layer)
            )
            layer.forward = recomputed(forward, device, kept.of(index))
        self._last = _Last()
        layers[-1].register_forward_hook(self._last.keep)
        head: nn.Module = self.model.get_output_embeddings()  # type: ignore[operator]
        if isinstance(head, RilqLinear):
            self.model.set_output_embeddings(_dense(head, dtype))  # type: ignore[operator]

    def _linear(
        self,
        name: str,
        module: RilqLinear | ResqLinear,
        train: Train,
        spec: AdapterSpec | None,
        tier: Tier,
        dtype: torch.dtype,
    ) -> nn.Module:
        """What stands for a quantized linear while training; enters its parts in `trained`."""
        adapter = None
        if spec is not None and spec.adapts(name) and train in ("adapters", "adapters+scales"):
            adapter = Adapter(
                spec,
                name,
                out_features=module.out_features,
                in_features=module.in_features,
                group_size=module.group_size if isinstance(module, RilqLinear) else 1,
                device=self.device,
            )
            self.trained |= {f"{name}.a": adapter.a, f"{name}.b": adapter.b}
        if train in ("none", "adapters"):
            base = _dense(module, dtype) if tier == "dense" else module
            return base if adapter is None else AdaptedLinear(base, adapter)
        assert isinstance(module, RilqLinear), "ResQ has no scales of groups to train"
        if tier == "dense" or train == "all+codes":
            module.weight = nn.Parameter(stored_codes(module.weight, module.bits), False)
        linear = TrainedLinear(
            module,
            offsets=train in ("all", "all+codes"),
            trains_codes=train == "all+codes",
            adapter=adapter,
            zeros=partial(zeros_on_host if tier == "offload" else torch.zeros, device=self.device),
        )
        self.trained[f"{name}.log_scale"] = linear.log_scale
        if linear.offset is not None:
            self.trained[f"{name}.offset"] = linear.offset
        if linear.code_shift is not None:
            self.trained[f"{name}.code_shift"] = linear.code_shift
        return linear

    def states(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states before and after the final norm; the latter feed the head.

        Args:
            tokens: `[rows, seq_len]`.

        Returns:
            Twice `[rows, seq_len, hidden]`.
        """
        if self._elsewhere is not None:
            self._elsewhere.restart()
        out = self.model.base_model(input_ids=tokens, use_cache=False)  # type: ignore[operator]
        return self._last.taken(), out.last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 logits of states after the final norm.

        Args:
            hidden: `[..., hidden]`.

        Returns:
            `[..., vocabulary]`.
        """
        rows = hidden.reshape(1, -1, hidden.shape[-1])
        with self._decoder_replaced(_Given(rows)):
            logits: Tensor = self.model(input_ids=None).logits
        return logits.float().reshape(*hidden.shape[:-1], -1)

    def forward(self, tokens: Tensor) -> Tensor:
        """float32 logits `[rows, seq_len, vocabulary]` of `tokens [rows, seq_len]`."""
        return self.logits(self.states(tokens)[1])

    @contextmanager
    def _decoder_replaced(self, stand_in: nn.Module) -> Iterator[None]:
        """What transformers does after the decoder (head, scaling, soft caps), and only that."""
        name = str(self.model.base_model_prefix)
        decoder = getattr(self.model, name)
        setattr(self.model, name, stand_in)
        try:
            yield
        finally:
            setattr(self.model, name, decoder)


def recomputed_with_graph(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A decoder layer's `forward` that keeps its input only; the backward pass computes the rest.

    The graph exists all the time, and says what need not be computed again.
    """
    return partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)


class KeptInputs:
    """Inputs of the decoder layers, from the forward to the backward pass in one block of memory.

    For a process on a CPU, and small ones: in the heap each would lie among blocks that come and go
    in its layer and then do not fit any more, so that it grows from layer to layer (docs/log.md).
    """

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._block = torch.empty(0, 0)
        self._kept: dict[int, weakref.ref[Tensor]] = {}

    def of(self, index: int) -> saved_tensors_hooks:
        """A context in which autograd saves the input of layer `index`, and nothing else."""
        return saved_tensors_hooks(partial(self._keep, index), lambda kept: kept)

    def _keep(self, index: int, hidden: Tensor) -> Tensor:
        """What autograd keeps in the place of `hidden`: its copy, unless another one is in use."""
        in_use = index in self._kept and self._kept[index]() is not None
        if in_use or hidden.nbytes >= LARGE_BLOCK:
            return hidden
        size = hidden.numel()
        if self._block.shape[1] < size or self._block.dtype != hidden.dtype:
            self._block = hidden.new_empty(self._layers, size)
        kept = self._block[index, :size].view(hidden.shape).copy_(hidden.detach())
        self._kept[index] = weakref.ref(kept)
        return kept


def recomputed(
    forward: Callable[..., Any], device: torch.device, kept: AbstractContextManager[Any]
) -> Callable[..., Any]:
    """The same in the way that suits a device: on a CPU, no graph exists until the backward pass.

    Its nodes are small blocks among the large ones that come and go, which then do not fit any
    more, so that the heap grows from layer to layer; nor does it take more time (docs/log.md).

    Args:
        kept: a context in which the input is kept, on a CPU.
    """
    if device.type != "cpu":
        return recomputed_with_graph(forward)

    def layer(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        def run(hidden_states: Tensor) -> Any:
            return forward(hidden_states, *args, **kwargs)

        if not torch.is_grad_enabled():
            return run(hidden_states)
        if not hidden_states.requires_grad:  # of the first layer: nothing before it is trained
            hidden_states = hidden_states.detach().requires_grad_()
        with kept:
            return checkpoint(run, hidden_states, use_reentrant=True, preserve_rng_state=False)

    return layer


def _dense(module: RilqLinear | ResqLinear, dtype: torch.dtype) -> nn.Linear:
    """The same linear with its weight dequantized once."""
    if isinstance(module, ResqLinear):
        return module.dense(dtype)
    dense = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    dense.weight = nn.Parameter(module.dense_weight(dtype), requires_grad=False)
    dense.bias = module.bias
    return dense
