"""A checkpoint whose function stays and whose weights are rotated, tensor by tensor, when read.

With `Q [hidden, hidden]` and, for each KV head, `R [head_dim, head_dim]` orthogonal, hidden states
become `h Q` and a head's values `v R`:

    embedding               E            ->  E Q
    reads the residual      W            ->  W diag(n) Q      n: weight of the norm before it -> 1
    writes to it            W, b         ->  Q^T W, b Q
    v_proj, each KV head    W, b         ->  R^T W, b R       after what is said above
    o_proj, each head       W            ->  W R              before what is said above
    head                    W            ->  W diag(n) Q      n: weight of the final norm -> 1

An RMS norm without its weight commutes with `Q`, and attention is linear in the values, so the
logits do not change; there is nothing to do at inference. The query heads of a group share the `R`
of their KV head. A head tied to the embedding becomes a tensor of its own, since only it takes up
the final norm.

Source: QuaRot, Ashkboos et al. 2024 (arXiv:2404.00456), section 4, the offline part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from rilq.converter.architecture import SUPPORTED, head_size, load_config, tied_head_differs
from rilq.converter.hadamard import Rotation, random_rotation
from rilq.errors import CheckpointError, NonFiniteError, UnsupportedArchitectureError
from rilq.formats.checkpoint import Checkpoint
from rilq.formats.fp8 import BlockFp8Checkpoint
from rilq.formats.shard import listing

# model_type of the architectures that have what this module counts on: RMS norms before attention
# and MLP and nowhere else on the residual stream, and the names below.
ROTATABLE = ("llama", "mistral", "qwen2", "qwen3", "phi3")

# Those that have norms on the outputs of attention and MLP.
_NORMS_AFTER = ("gemma2", "gemma3_text", "olmo2")

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"
LAYERS = "model.layers."

# Linears that read the residual stream, with the norm before them.
_READERS = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.k_proj": "input_layernorm",
    "self_attn.v_proj": "input_layernorm",
    "self_attn.qkv_proj": "input_layernorm",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.up_proj": "post_attention_layernorm",
    "mlp.gate_up_proj": "post_attention_layernorm",
}
_WRITERS = ("self_attn.o_proj", "mlp.down_proj")
_VALUES = ("self_attn.v_proj", "self_attn.qkv_proj")  # the values are the last rows
_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight", FINAL_NORM)
_UNTOUCHED = ("self_attn.q_norm", "self_attn.k_norm")  # between projections and scores
_KNOWN = {*_READERS, *_WRITERS, *_READERS.values(), *_UNTOUCHED}

CHUNK = 1 << 18  # elements turned at once in float64: 2 MB, so that they stay in cache


class Turns(Protocol):
    """The orthogonal matrices that a checkpoint is rotated by."""

    @property
    def chunk(self) -> int:
        """Elements that are best turned at once, in float64."""

    def residual(self, rows: Tensor) -> Tensor:
        """`rows Q` of hidden states `[..., hidden]`, float64."""

    def values(self, layer: int, owners: Sequence[int], blocks: Tensor) -> Tensor:
        """`blocks R` of some heads' values `[heads, n, head_dim]`, float64.

        Args:
            owners: of each head, the KV head whose `R` it takes.
        """


@dataclass(frozen=True)
class RandomHadamard:
    """Turns that spread every channel over all: one matrix for the model, one for all heads."""

    hidden: Rotation
    head: Rotation

    @property
    def chunk(self) -> int:
        """See `Turns`."""
        return CHUNK

    def residual(self, rows: Tensor) -> Tensor:
        """See `Turns`."""
        return self.hidden.apply(rows)

    def values(self, layer: int, owners: Sequence[int], blocks: Tensor) -> Tensor:
        """See `Turns`: the same matrix for all layers and heads, so neither is looked at."""
        return self.head.apply(blocks)


class TurnedCheckpoint(Checkpoint):
    """A checkpoint that gives the rotated tensors of another one by the same names.

    Tensors are rotated in float64 and rounded once, to the dtype that the source stores them in: a
    float32 model's logits stay what they are to float32 precision, those of a model in 16 bits to
    the rounding that storing it in 16 bits is. Nothing is kept: while it works, `read` holds the
    tensors that it will return, one tensor of the source and some chunks (40 MB with Hadamard
    matrices).

    `hashes`, `bytes_read`, the digests and file signatures are those of the source's own bytes, so
    that a stopped job finds out whether the source has changed. `config` has
    `tie_word_embeddings` false; a tied head is in `tensors`, with the hash of the embedding.

    Args:
        source: opened; not used any more by anybody else.
        turns: gives the rotations for a hidden size and a head size.
        option: what asked for the rotation, for messages.
        models: the `model_type`s of which it can be had, out of `ROTATABLE`.

    Raises:
        UnsupportedArchitectureError: the residual stream of this architecture cannot be rotated.
        CheckpointError: config.json makes no model.
    """

    def __init__(
        self,
        source: Checkpoint,
        turns: Callable[[int, int], Turns],
        *,
        option: str,
        models: Sequence[str],
    ) -> None:
        super().__init__(
            source.source,
            {**source.config, "tie_word_embeddings": False},
            source.headers,
            source.shard_of,
            source.digests,
            source.report,
        )
        self._option = option
        config = load_config(source)
        self._check_architecture(config.model_type, models)
        self._stored_head = HEAD in self.tensors
        self._tied = bool(config.tie_word_embeddings) and EMBEDDING in self.tensors
        if self._tied:
            embedding = replace(self.tensors[EMBEDDING], name=HEAD)
            self.tensors = {**self.tensors, HEAD: embedding}
            self.shard_of = {HEAD: self.shard_of[EMBEDDING], **self.shard_of}
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._head_dim = head_size(config)
        self._value_rows = kv_heads * self._head_dim
        self._kv_heads = range(kv_heads)
        self._owners = [head * kv_heads // heads for head in range(heads)]
        self._turns = turns(config.hidden_size, self._head_dim)

    def _check_architecture(self, model_type: str, models: Sequence[str]) -> None:
        option = self._option
        label = f"{self.source.label}/config.json: {option}"
        if model_type not in models:
            raise UnsupportedArchitectureError(
                f"{label}: {SUPPORTED[model_type]} cannot be rotated: {_obstacle(model_type)}\n"
                f"  leave out {option}, which can be had for "
                + ", ".join(SUPPORTED[name] for name in models)
            )
        layers = [n for n in self.tensors if n.startswith(LAYERS) and not n.endswith("inv_freq")]
        unknown = [n for n in layers if _module(n) not in _KNOWN]
        if unknown:
            raise UnsupportedArchitectureError(
                f"{label}: expected the decoder layers of {SUPPORTED[model_type]}, found "
                f"{listing(unknown)}\n  leave out {option}, or download the checkpoint again"
            )

    def source_names(self, names: Iterable[str]) -> list[str]:
        """What `read` takes from the source to give some tensors, each once."""
        needed: list[str] = []
        for name in self._known(names):
            if (norm := _norm_before(name)) is not None:
                needed.append(norm)
            if name == HEAD and self._tied:
                needed.append(EMBEDDING)
            if name != HEAD or self._stored_head:
                needed.append(name)
        return self._known(needed)

    def read(self, names: Iterable[str], *, check_finite: bool = True) -> dict[str, Tensor]:
        """Some tensors, rotated; read one after another, so that only the results add up.

        Raises:
            CheckpointError: as `Checkpoint.read`; a stored head is not the embedding that it is
                said to be tied to.
            NonFiniteError: a tensor holds NaN or infinity, or rotated does not fit its dtype.
        """
        wanted = self._known(names)
        needed = self.source_names(wanted)
        places = [name for name in needed if name.endswith(_NORMS)]
        read = super().read(places, check_finite=check_finite)
        norms = {name: weight.double() for name, weight in read.items()}
        found = {name: torch.ones_like(weight) for name, weight in read.items()}
        for name in needed:
            if name in norms:
                continue
            tensor = super().read([name], check_finite=check_finite)[name]
            for made in self._made_from(name, wanted):
                norm = _norm_before(made)
                found[made] = self._rotated(made, tensor, norms[norm] if norm else None)
                if check_finite:
                    self._check_fits(made, found[made])
        if self._tied and HEAD in wanted:
            self._check_tied()
        return {name: found[name] for name in wanted}

    def _made_from(self, name: str, wanted: list[str]) -> list[str]:
        """Which of the tensors that are wanted come from the source's tensor `name`."""
        if not self._tied:
            return [name]
        made = {EMBEDDING: [EMBEDDING, HEAD], HEAD: []}.get(name, [name])
        return [each for each in made if each in wanted]

    def _check_tied(self) -> None:
        """A stored head is the embedding; one that is not stored has the embedding's hash."""
        if self.hashes.setdefault(HEAD, self.hashes[EMBEDDING]) != self.hashes[EMBEDDING]:
            raise tied_head_differs(self.source.label, HEAD)

    def _rotated(self, name: str, tensor: Tensor, norm: Tensor | None) -> Tensor:
        """One tensor as it is after the rotation; `norm` is the weight of the norm before it."""
        module, kind = _module(name), name.rpartition(".")[2]
        if name not in (EMBEDDING, HEAD) and module not in _KNOWN - {*_UNTOUCHED}:
            return tensor.clone()
        rotated = torch.empty(tensor.shape, dtype=tensor.dtype)
        values = len(tensor) - self._value_rows if module in _VALUES else len(tensor)
        if kind == "bias":
            rotated.copy_(self._bias(name, tensor.double(), values))
        elif module == "self_attn.o_proj":
            self._turn_heads(name, self._owners, tensor.T, rotated.T)
        elif module in _WRITERS:
            self._turn(tensor.T, rotated.T)
        else:
            self._turn(tensor[:values], rotated[:values], norm)
            self._turn_heads(name, self._kv_heads, tensor[values:], rotated[values:], norm)
        return rotated

    def _bias(self, name: str, bias: Tensor, values: int) -> Tensor:
        if _module(name) in _WRITERS:
            return self._turns.residual(bias)
        heads = bias[values:].reshape(-1, 1, self._head_dim)
        owners = self._kv_heads[: len(heads)]  # none but of the values
        return torch.cat([bias[:values], self._turns.values(_layer(name), owners, heads).flatten()])

    def _turn(self, rows: Tensor, out: Tensor, norm: Tensor | None = None) -> None:
        """Write `rows diag(norm) Q` to `out`.

        Args:
            rows, out: `[count, hidden]`.
            norm: `[hidden]` float64.
        """
        step = max(1, self._turns.chunk // rows.shape[1])
        for start in range(0, len(rows), step):
            part = rows[start : start + step].double()
            out[start : start + step] = self._turns.residual(part if norm is None else part * norm)

    def _turn_heads(
        self,
        name: str,
        owners: Sequence[int],
        rows: Tensor,
        out: Tensor,
        norm: Tensor | None = None,
    ) -> None:
        """As `_turn`, and multiply the rows of each head by its `R^T` from the left.

        Args:
            name: of the tensor.
            owners: of each head, the KV head whose `R` it takes.
            rows, out: `[heads * head_dim, hidden]`; `heads` may be 0.
        """
        width, unit = rows.shape[1], self._head_dim
        heads = max(1, self._turns.chunk // (width * unit))
        for head in range(0, len(rows) // unit, heads):
            span = slice(head * unit, (head + heads) * unit)
            part = rows[span].double()
            turned = self._turns.residual(part if norm is None else part * norm)
            blocks = turned.reshape(-1, unit, width).transpose(1, 2)  # [heads, hidden, head_dim]
            turned = self._turns.values(_layer(name), owners[head : head + heads], blocks)
            out[span] = turned.transpose(1, 2).reshape(-1, width)

    def _check_fits(self, name: str, tensor: Tensor) -> None:
        if not all(torch.isfinite(bound) for bound in torch.aminmax(tensor)):
            raise NonFiniteError(
                f"{name}: too large for {str(tensor.dtype).removeprefix('torch.')} once it is "
                f"rotated and its norm is folded in\n  leave out {self._option}, or give the "
                "checkpoint in bfloat16"
            )


class RotatedCheckpoint(TurnedCheckpoint):
    """A checkpoint rotated by randomized Hadamard matrices; see `TurnedCheckpoint`.

    Args:
        source: opened; not used any more by anybody else.
        seed: of the rotations.
    """

    def __init__(self, source: Checkpoint, *, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        super().__init__(
            source,
            lambda hidden, head: RandomHadamard(
                random_rotation(hidden, generator), random_rotation(head, generator)
            ),
            option="--rotate",
            models=ROTATABLE,
        )


def refuse_fp8(checkpoint: Checkpoint, option: str = "--rotate") -> None:
    """Raises CheckpointError for a source whose weights are not read as they are stored."""
    if isinstance(checkpoint, BlockFp8Checkpoint):
        raise CheckpointError(
            f"{checkpoint.source.label}: {option}: its weights are in FP8\n"
            f"  leave out {option}, or give the checkpoint in 16 bits"
        )


def _obstacle(model_type: str) -> str:
    """Why an architecture is not among `ROTATABLE`."""
    if model_type in _NORMS_AFTER:
        return (
            "norms with a weight for each channel stand between its linears and the residual stream"
        )
    return "it is a mixture of experts, which this does not know"


def _module(name: str) -> str:
    """A tensor's module within its decoder layer, such as `mlp.up_proj`; else empty."""
    inner = name.removeprefix(LAYERS).partition(".")[2] if name.startswith(LAYERS) else ""
    return inner.rpartition(".")[0]


def _layer(name: str) -> int:
    """The decoder layer of a tensor."""
    return int(name.removeprefix(LAYERS).partition(".")[0])


def _norm_before(name: str) -> str | None:
    """The weight of the norm that a tensor takes up."""
    if name == HEAD:
        return FINAL_NORM
    module = _module(name)
    if module not in _READERS or not name.endswith(".weight"):
        return None
    return f"{name.removesuffix(module + '.weight')}{_READERS[module]}.weight"
