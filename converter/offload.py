"""Decoder layers that are elsewhere, and in the device's memory only while they are used.

On a GPU the packed layers lie in pinned host memory. The next one is copied on a stream of its own
while a layer computes: forward through the layers, and backwards through them when the backward
pass computes each one again. On a CPU they are mapped from their files for the time of a call.

accelerate's hooks do not do this: `AlignDevicesHook` copies the weights of a module when it is
called and not before, so that copy and computation take turns.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from rilq.converter.machine import return_free_memory

# Pinned blocks have the size of a power of two: in pieces of this one, little is lost.
PIECE = 1 << 24
_ALIGNED = 256  # bytes; what CUDA's own allocations are aligned to at least


class Layers(Protocol):
    """Where the tensors of decoder layers come from."""

    def fetch(self, index: int) -> dict[str, Tensor]:
        """Tensors of layer `index` by their names in it, on the device."""
        ...

    def restart(self) -> None:
        """Forget what was fetched: a forward pass begins, and what is trained has changed."""
        ...


def own_forward(layer: nn.Module) -> Callable[..., Any]:
    """What a decoder layer computes, to be put in a wrapper that takes the place of its forward.

    The layer would hold the wrapper and the wrapper the layer, and gigabytes would wait for the
    collector of cycles; so the reference is a weak one.
    """
    reference = weakref.ref(layer)

    def forward(*args: Any, **kwargs: Any) -> Any:
        layer = _alive(reference)
        return type(layer).forward(layer, *args, **kwargs)

    return forward


def call_with(layers: Layers, index: int, layer: nn.Module) -> Callable[..., Any]:
    """`own_forward` of a decoder layer on the meta device: fetches its tensors for each call."""
    reference = weakref.ref(layer)

    def forward(*args: Any, **kwargs: Any) -> Any:
        bare = _Bare(_alive(reference))
        tensors = {f"layer.{name}": value for name, value in layers.fetch(index).items()}
        return functional_call(bare, tensors, args, kwargs, tie_weights=False)

    return forward


def _alive(reference: weakref.ref[nn.Module]) -> nn.Module:
    layer = reference()
    assert layer is not None, "a decoder layer was called after its model was let go of"
    return layer


class _Bare(nn.Module):
    """A decoder layer as its class computes it, whatever was put in the place of its forward."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.layer).forward(self.layer, *args, **kwargs)


class Homes:
    """Where the stored tensors of one decoder layer belong.

    Args:
        model: the skeleton, before its linears are wrapped: names change then, modules stay.
        names: full names of the stored tensors.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self._homes: dict[str, tuple[nn.Module, str]] = {}
        for name in names:
            owner, _, leaf = name.rpartition(".")
            self._homes[name] = (model.get_submodule(owner), leaf)

    def named_in(self, layer: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Stored tensors by their names in `layer` as it is now, in the dtypes that it wants."""
        paths = {id(module): path for path, module in layer.named_modules()}
        named = {}
        for name, value in tensors.items():
            module, leaf = self._homes[name]
            path = paths[id(module)]
            named[f"{path}.{leaf}" if path else leaf] = value.to(getattr(module, leaf).dtype)
        return named


def elsewhere(
    layers: Sequence[nn.Module], read: Callable[[int], dict[str, Tensor]], device: torch.device
) -> Layers:
    """The place for decoder layers that a device needs.

    Args:
        layers: on the meta device, but for what is trained.
        read: gives the stored tensors of a layer by their names in it.
    """
    return MappedLayers(read) if device.type == "cpu" else in_host_memory(layers, read, device)


def in_host_memory(
    layers: Sequence[nn.Module], read: Callable[[int], dict[str, Tensor]], device: torch.device
) -> HostLayers:
    """Layers as of `elsewhere`, with what is trained of them in host memory."""
    host = HostLayers(device)
    for index, layer in enumerate(layers):
        on_host = ((n, p) for n, p in layer.named_parameters() if p.device.type == "cpu")
        host.add(read(index), dict(on_host))
    return host


class MappedLayers:
    """Layers that are mapped into memory from their files, one at a time, and let go of again."""

    def __init__(self, read: Callable[[int], dict[str, Tensor]]) -> None:
        self._read = read

    def fetch(self, index: int) -> dict[str, Tensor]:
        """As of `Layers`."""
        return_free_memory()  # of the layer before: what it held in part fragments the heap
        return self._read(index)

    def restart(self) -> None:
        """As of `Layers`."""


@dataclass(frozen=True)
class _Stored:
    """One layer in host memory.

    Attributes:
        pieces: its bytes, and where in a slot each piece goes.
        places: of each tensor: dtype, shape, and first byte in a slot.
        trained: those of them that are trained, whose values are in host memory too.
        nbytes: of a slot that takes it.
    """

    pieces: tuple[tuple[int, Tensor], ...]
    places: Mapping[str, tuple[torch.dtype, torch.Size, int]]
    trained: Mapping[str, nn.Parameter]
    nbytes: int


@dataclass
class _Slot:
    """Room for one layer on the device, what it holds, and the event after which it does."""

    memory: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    holds: int = -1
    ready: torch.cuda.Event | None = None


class HostLayers:
    """Layers in pinned host memory that pass through two slots on the device.

    Where a layer's number follows that of the last one, its successor is copied ahead, else its
    predecessor. Two slots and not new memory for each copy: the host runs ahead of the device, and
    would allocate a layer for each one it is ahead.
    """

    def __init__(self, device: torch.device, *, piece: int = PIECE) -> None:
        self.device, self._piece = device, piece
        self._layers: list[_Stored] = []
        self._slots = (_Slot(), _Slot())
        self._last = -1
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def add(self, frozen: Mapping[str, Tensor], trained: Mapping[str, nn.Parameter]) -> None:
        """Take the next layer.

        Args:
            frozen: tensors by their names in the layer; they are copied.
            trained: parameters in host memory, likewise; they are not.
        """
        places, end = {}, 0
        for name, value in (*frozen.items(), *trained.items()):
            places[name] = (value.dtype, value.shape, end)
            end += -(-value.nbytes // _ALIGNED) * _ALIGNED
        whole = torch.empty(end, dtype=torch.uint8)
        for name, value in frozen.items():
            start = places[name][2]
            whole[start : start + value.nbytes] = _bytes(value)
        stop = min((places[name][2] for name in trained), default=end)
        pieces = [
            (n, self._pinned(whole[n : n + self._piece])) for n in range(0, stop, self._piece)
        ]
        pieces = [(n, piece[: stop - n]) for n, piece in pieces]
        pieces += [(places[name][2], _bytes(value.detach())) for name, value in trained.items()]
        self._layers.append(_Stored(tuple(pieces), places, trained, end))

    def fetch(self, index: int) -> dict[str, Tensor]:
        """As of `Layers`; trained ones are differentiable."""
        ahead = index + (1 if index > self._last else -1)
        self._last = index
        self._copy(index)
        slot = self._slots[index % 2]
        if slot.ready is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.ready)
        if 0 <= ahead < len(self._layers):
            self._copy(ahead)
        stored = self._layers[index]
        tensors = {}
        for name, (dtype, shape, start) in stored.places.items():
            flat = slot.memory[start : start + shape.numel() * dtype.itemsize]
            tensors[name] = flat.view(dtype).view(shape)
        for name, parameter in stored.trained.items():
            tensors[name] = _FromHost.apply(parameter, tensors[name])  # type: ignore[no-untyped-call]
        return tensors

    def restart(self) -> None:
        """As of `Layers`."""
        self._last = -1
        for slot in self._slots:
            slot.holds = -1

    def _copy(self, index: int) -> None:
        """Begin to copy a layer into its slot, if it is not there, after all that used the slot.

        The work in the slot was that of a neighbour's neighbour, and is all asked for by now.
        """
        slot, stored = self._slots[index % 2], self._layers[index]
        if slot.holds == index:
            return
        if not len(slot.memory):
            size = max(layer.nbytes for layer in self._layers)
            slot.memory = torch.empty(size, dtype=torch.uint8, device=self.device)
        with torch.no_grad():
            if self._stream is None:
                for start, piece in stored.pieces:
                    slot.memory[start : start + len(piece)].copy_(piece)
            else:
                self._stream.wait_stream(torch.cuda.current_stream(self.device))
                with torch.cuda.stream(self._stream):
                    for start, piece in stored.pieces:
                        slot.memory[start : start + len(piece)].copy_(piece, non_blocking=True)
                    slot.ready = self._stream.record_event()
        slot.holds = index

    def _pinned(self, values: Tensor) -> Tensor:
        """A copy; on a GPU's host in pinned memory, always of a whole piece."""
        if self._stream is None:
            return values.clone()
        piece = torch.empty(self._piece, dtype=torch.uint8, pin_memory=True)
        piece[: len(values)] = values
        return piece


def zeros_on_host(rows: int, columns: int, *, device: torch.device) -> Tensor:
    """float32 zeros `[rows, columns]` in host memory, pinned if the device is a GPU."""
    return torch.zeros(rows, columns, pin_memory=device.type == "cuda")


class _FromHost(torch.autograd.Function):
    """A parameter's values as they are on the device; its gradient goes to the host."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        host = torch.empty(grad.shape, dtype=grad.dtype, pin_memory=grad.is_cuda)
        return host.copy_(grad), None


def _bytes(value: Tensor) -> Tensor:
    """The bytes of a tensor, flat."""
    return value.contiguous().reshape(-1).view(torch.uint8)
