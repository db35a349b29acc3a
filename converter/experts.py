"""Experts in the streaming pass: what each of them reads, and layers that are too large to hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from rilq.calib.statistics import HessianSum
from rilq.converter.quantizers import Quantizer
from rilq.converter.quantizers.rtn import RtnQuantizer
from rilq.formats.checkpoint import Checkpoint
from rilq.formats.experts import Expert, Experts, routes
from rilq.formats.spec import EXPERTS

# What an expert with too few tokens is quantized with: least squares of its weights alone.
DATA_FREE = RtnQuantizer("lsq")
FEW = 32  # tokens from which mean squares of input channels say something
HESSIANS = 1 << 30  # bytes of Hessians that are summed at once; at least those of one expert


def least_tokens(quantizer: str, in_features: int) -> int:
    """Tokens that an expert's linear needs, to be quantized by what they are.

    Mean squares of each channel settle early. What looks at all pairs of channels, or is trained,
    would fit itself to fewer tokens than channels.
    """
    return FEW if quantizer == "lsq" else in_features


@dataclass
class InputGroup:
    """Linears that read the same input.

    Attributes:
        names: full names.
        hessian: of that input, where it was asked for; for the caller to take.
        tokens: of that input, where experts share them out; None where all tokens come.
    """

    names: list[str]
    hessian: Tensor | None = None
    tokens: int | None = None


def quantizer_for(quantizer: Quantizer, group: InputGroup, in_features: int) -> Quantizer:
    """The quantizer itself, or `DATA_FREE` for experts that saw too few tokens for it."""
    if group.tokens is None or group.tokens >= least_tokens(quantizer.name, in_features):
        return quantizer
    return DATA_FREE


def expert_groups(
    name: str,
    experts: Experts,
    specs: Iterable[str],
    inputs: Callable[[], Iterator[tuple[Tensor, Tensor]]],
    *,
    hessians: bool,
    device: torch.device,
    added: Callable[[Tensor], Tensor],
) -> Iterator[InputGroup]:
    """The linears of all experts in the order they run, with the tokens that the router gave them.

    The caller replaces the weights of a group before it asks for the next one, so that `down` sees
    what the quantized gate and up of its expert produce.

    Args:
        name: full name of `experts`, loaded.
        specs: names of those that are quantized.
        inputs: once over this process's rows, the experts' inputs `[tokens, hidden]` and the
            router's choice `[tokens, chosen]`.
        hessians: whether to sum them, on `device`; else no data is looked at.
        added: adds a tensor up over all processes.
    """
    wanted = set(specs)
    for numbers in _parts(experts) if hessians else [range(experts.count)]:
        for parts in ("gate", "up"), ("down",):
            members: dict[int, list[str]] = {}
            for number in numbers:
                own = experts.expert(number).names
                paths = [f"{name}.{number}.{getattr(own, part)}" for part in parts]
                if kept := [path for path in paths if path in wanted]:
                    members[number] = kept
            if not hessians:
                yield from map(InputGroup, members.values())
                continue
            sums = {
                n: HessianSum(_linear(experts.expert(n), parts[0]).in_features, device)
                for n in members
            }
            _add_inputs(experts, sums, parts[0], inputs())
            for number, names in members.items():
                total = sums.pop(number)
                total.merge(added)
                yield InputGroup(names, total.take(), total.tokens)


def _parts(experts: Experts) -> list[range]:
    """Experts whose Hessians are summed together."""
    down = _linear(experts.expert(0), "down")
    each = 4 * max(down.in_features, down.out_features) ** 2
    step = max(1, HESSIANS // each)
    return [range(i, min(i + step, experts.count)) for i in range(0, experts.count, step)]


def _linear(expert: Expert, part: str) -> nn.Linear:
    found = expert.get_submodule(getattr(expert.names, part))
    assert isinstance(found, nn.Linear), "no linear"
    return found


@torch.no_grad()
def _add_inputs(
    experts: Experts,
    sums: Mapping[int, HessianSum],
    part: str,
    batches: Iterable[tuple[Tensor, Tensor]],
) -> None:
    """Add what one linear of some experts reads, each expert its own tokens alone."""
    handles = []
    if part == "down":
        for number, total in sums.items():
            down = _linear(experts.expert(number), part)
            handles.append(down.register_forward_pre_hook(_adds(total)))
    try:
        for hidden, chosen in batches:
            for number, rows, _ in routes(chosen, experts.count):
                if number in sums and part == "down":
                    experts.expert(number)(hidden[rows])
                elif number in sums:
                    sums[number].add(hidden[rows])
    finally:
        for handle in handles:
            handle.remove()


def _adds(total: HessianSum) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    return lambda _module, args: total.add(args[0])


@dataclass
class ExpertTokens:
    """How many tokens the experts of a layer saw, as far as anybody looked.

    Attributes:
        seen: by the expert's full name.
        data_free: of linears that were quantized without data, for having seen too few.
    """

    seen: dict[str, int] = field(default_factory=dict)
    data_free: dict[str, int] = field(default_factory=dict)

    def count(self, group: InputGroup, *, used: bool) -> None:
        """Note the tokens of a group of linears, and whether these were used."""
        if group.tokens is None:
            return
        for name in group.names:
            self.seen[name.rpartition(".")[0]] = group.tokens
            if not used:
                self.data_free[name] = group.tokens

    def facts(self) -> dict[str, Any]:
        """As JSON values for the journal; nothing where nobody looked."""
        return {"experts": {"seen": self.seen, "data_free": self.data_free}} if self.seen else {}


def expert_quality(layers: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What `rilq.json` tells of experts; empty where nobody looked at any.

    Args:
        layers: facts of every decoder layer, in order.
    """
    tokens: list[list[float] | None] = []
    data_free: dict[str, int] = {}
    for facts in layers:
        found = facts.get("experts", {"seen": {}, "data_free": {}})
        counts = list(found["seen"].values())
        tokens.append([min(counts), median(counts), max(counts)] if counts else None)
        data_free |= found["data_free"]
    if not any(tokens):
        return {}
    return {"expert_tokens": tokens, "experts_without_data": data_free}


class LayerTensors(Mapping[str, Tensor]):
    """A decoder layer's tensors, of which those of the experts may be read when they are asked for.

    Args:
        checkpoint: holds them.
        names: of all of them.
        read: those that are read already; the others never are kept.

    Attributes:
        apart: names of the others.
    """

    def __init__(
        self, checkpoint: Checkpoint, names: Iterable[str], read: Mapping[str, Tensor]
    ) -> None:
        self._checkpoint, self._names, self.read = checkpoint, list(names), read
        self.apart = {name for name in self._names if name not in read}

    def __getitem__(self, name: str) -> Tensor:
        if name in self.apart:
            return self._checkpoint.read([name])[name]
        return self.read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def names_apart(names: Iterable[str]) -> list[str]:
    """Those of a layer's tensors that belong to single experts."""
    return [name for name in names if EXPERTS in name]


def names_at_once(names: Iterable[str]) -> list[str]:
    """All others."""
    return [name for name in names if EXPERTS not in name]


@contextmanager
def fetched_when_run(experts: Experts, name: str, place: Callable[[str], None]) -> Iterator[None]:
    """Give each expert its weights when it runs, and take them away afterwards.

    Args:
        name: full name of `experts`.
        place: puts the tensor of that full name into its module, on the device.
    """
    fetched: dict[nn.Module, list[nn.Module]] = {}

    def before(path: str) -> Callable[[nn.Module, object], None]:
        def hook(expert: nn.Module, _args: object) -> None:
            fetched[expert] = []
            for child, linear in expert.named_children():
                tensors = linear.state_dict(keep_vars=True)
                if any(tensor.is_meta for tensor in tensors.values()):
                    for leaf in tensors:
                        place(f"{path}.{child}.{leaf}")
                    fetched[expert].append(linear)

        return hook

    def after(expert: nn.Module, _args: object, _output: object) -> None:
        for linear in fetched.pop(expert, []):
            linear.to("meta")

    handles = []
    for number in range(experts.count):
        expert = experts.expert(number)
        handles.append(expert.register_forward_pre_hook(before(f"{name}.{number}")))
        handles.append(expert.register_forward_hook(after, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
