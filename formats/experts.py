"""Mixtures of experts as linears of their own, by the names that checkpoints store them under.

On disk every expert is three matrices. transformers fuses them when it loads: all gates and ups of
a layer into one tensor, all downs into another. Here they stay apart, so that an expert's linear is
quantized, packed, adapted, read and written like any other.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ExpertNames:
    """What a checkpoint calls a mixture, and the three linears of each of its experts.

    Attributes:
        block: the module of a decoder layer that holds router and experts.
        gate, up, down: `down(act(gate(x)) * up(x))`.
    """

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


# By model_type; those that are not named here use the defaults.
NAMES = {"mixtral": ExpertNames("block_sparse_moe", "w1", "w3", "w2")}

BLOCK = "mlp"  # what transformers calls it, whatever the checkpoint does


class Expert(nn.Module):
    """One expert: three linears without a bias, on the meta device."""

    def __init__(
        self, hidden: int, width: int, names: ExpertNames, act_fn: Any, dtype: torch.dtype
    ) -> None:
        super().__init__()
        for name, (into, out) in {
            names.gate: (hidden, width),
            names.up: (hidden, width),
            names.down: (width, hidden),
        }.items():
            self.add_module(name, nn.Linear(into, out, bias=False, device="meta", dtype=dtype))
        self.names, self.act_fn = names, act_fn

    def inner(self, x: Tensor) -> Tensor:
        """The input of `down` `[tokens, width]` for `x [tokens, hidden]`."""
        gate, up = self.get_submodule(self.names.gate), self.get_submodule(self.names.up)
        inner: Tensor = self.act_fn(gate(x)) * up(x)
        return inner

    def forward(self, x: Tensor) -> Tensor:
        """`[tokens, hidden]` to `[tokens, hidden]`."""
        out: Tensor = self.get_submodule(self.names.down)(self.inner(x))
        return out


class Experts(nn.Module):
    """All experts of a decoder layer, by number; takes the place of transformers' fused module."""

    def __init__(self, fused: nn.Module, names: ExpertNames) -> None:
        super().__init__()
        count, hidden, width = fused.get_parameter("down_proj").shape
        dtype = fused.get_parameter("down_proj").dtype
        self.count = count
        first = Expert(hidden, width, names, fused.act_fn, dtype)
        for number in range(count):  # copied: to set up thousands of linears takes a minute
            self.add_module(str(number), copy.deepcopy(first))

    def expert(self, number: int) -> Expert:
        """One of them."""
        found = self.get_submodule(str(number))
        assert isinstance(found, Expert), "no expert"
        return found

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The sum of the chosen experts' outputs, each by its weight.

        Args:
            hidden_states: `[tokens, hidden]`.
            top_k_index, top_k_weights: the router's choice, `[tokens, chosen]`.
        """
        out = torch.zeros_like(hidden_states)
        for number, rows, places in routes(top_k_index, self.count):
            part = self.expert(number)(hidden_states[rows]) * top_k_weights[rows, places, None]
            out.index_add_(0, rows, part.to(out.dtype))
        return out


def routes(top_k_index: Tensor, count: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Every expert that was chosen, the tokens that chose it, and as which of their choices.

    Args:
        top_k_index: `[tokens, chosen]`.
        count: of experts.
    """
    chosen = torch.bincount(top_k_index.flatten(), minlength=count).nonzero().flatten()
    for number in chosen.tolist():
        rows, places = torch.where(top_k_index == number)
        yield number, rows, places


def separate_experts(model: nn.Module) -> bool:
    """Put `Experts` on the meta device in place of every fused module, under the stored names.

    Args:
        model: a causal language model of transformers, or its decoder alone; changed in place.

    Returns:
        Whether it is a mixture of experts.
    """
    names = NAMES.get(str(model.config.model_type), ExpertNames())  # type: ignore[union-attr]
    fused = [path for path, module in model.named_modules() if _is_fused(module)]
    for path in fused:
        experts = Experts(model.get_submodule(path), names)
        model.set_submodule(path, experts.train(model.training))
        if names.block != BLOCK:
            _rename_block(model.get_submodule(path.rpartition(f".{BLOCK}.")[0]), names.block)
    return bool(fused)


def turns_into_fused(source_patterns: Iterable[str]) -> bool:
    """Whether a weight conversion of transformers takes the tensors of experts, or their block."""
    blocks = {names.block for names in NAMES.values()}
    return any(word in pattern for pattern in source_patterns for word in ("experts", *blocks))


def _is_fused(module: nn.Module) -> bool:
    weights = [getattr(module, name, None) for name in ("gate_up_proj", "down_proj")]
    return all(isinstance(each, nn.Parameter) and each.dim() == 3 for each in weights)


def _rename_block(layer: nn.Module, name: str) -> None:
    """Register a decoder layer's mixture as `name`; its code goes on finding it as `mlp`."""
    block = layer._modules.pop(BLOCK)
    layer.add_module(name, block)
    layer.__dict__[BLOCK] = block  # not a submodule: its tensors have one name
