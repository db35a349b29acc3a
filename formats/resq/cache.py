"""A KV cache of codes: what transformers calls a cache, at a third of the memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache, CacheLayerMixin

from rilq.formats.packing import WORD, pack, unpack, whole_width
from rilq.formats.resq.parts import Parts
from rilq.formats.resq.quantizer import QuantizedVectors, dequantize_vectors, quantize_vectors

STATE_DTYPE = torch.float16  # of scale and zero


def bytes_of(parts: Parts) -> list[int]:
    """Bytes that the codes of each part of a vector take: of each part whole ones."""
    pairs = zip(parts.bits, parts.widths, strict=True)
    return [-(-width * bits // 8) for bits, width in pairs]


def stored_bits(parts: Parts) -> float:
    """Bits per value of what is stored of a vector: codes, scales and zeros."""
    return (8 * sum(bytes_of(parts)) + 2 * 16 * len(parts.bits)) / parts.size


def pack_states(codes: Tensor, parts: Parts) -> Tensor:
    """Codes `[..., parts.size]` uint8 as bytes `[..., sum(bytes_of(parts))]` uint8.

    Each part is a little-endian bit stream, as in formats/packing.py, cut after its last byte.
    """
    packed = []
    for bits, count, part in zip(
        parts.bits, bytes_of(parts), codes.split(parts.widths, -1), strict=True
    ):
        width = part.shape[-1]
        rows = F.pad(part.reshape(-1, width), (0, whole_width(width, bits) - width))
        packed.append(pack(rows, bits).view(torch.uint8)[:, :count])
    return torch.cat(packed, -1).reshape(*codes.shape[:-1], -1)


def unpack_states(packed: Tensor, parts: Parts) -> Tensor:
    """Undo `pack_states`."""
    codes = []
    rows = packed.reshape(-1, packed.shape[-1])
    for bits, width, part in zip(
        parts.bits, parts.widths, rows.split(bytes_of(parts), -1), strict=True
    ):
        whole = whole_width(width, bits)
        filled = F.pad(part, (0, whole * bits // 8 - part.shape[1])).view(torch.int32)
        assert filled.shape[1] * WORD == whole * bits, "whole words"
        codes.append(unpack(filled, bits, whole)[:, :width])
    return torch.cat(codes, -1).reshape(*packed.shape[:-1], -1)


@dataclass(frozen=True)
class PackedStates:
    """Keys or values of one layer.

    Attributes:
        codes: `[batch, heads, tokens, bytes]` uint8.
        scale, zero: `[batch, heads, tokens, parts]` float16.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor

    @classmethod
    def of(cls, states: Tensor, parts: Parts) -> PackedStates:
        """States `[batch, heads, tokens, head_dim]`, quantized."""
        vectors = quantize_vectors(states, parts, scale_dtype=STATE_DTYPE)
        return cls(pack_states(vectors.codes, parts), vectors.scale, vectors.zero)

    def dense(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        """What the codes stand for, `[batch, heads, tokens, head_dim]`."""
        codes = unpack_states(self.codes, parts)
        return dequantize_vectors(QuantizedVectors(codes, self.scale, self.zero), parts, dtype)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """All that is kept."""
        return self.codes, self.scale, self.zero

    def followed_by(self, other: PackedStates) -> PackedStates:
        """These tokens, then those of `other`."""
        pairs = zip(self.tensors(), other.tensors(), strict=True)
        return PackedStates(*(torch.cat(pair, -2) for pair in pairs))

    def first(self, tokens: int) -> PackedStates:
        """The first tokens, in memory of their own."""
        return PackedStates(*(t[..., :tokens, :].clone() for t in self.tensors()))

    def rows(self, index: Tensor) -> PackedStates:
        """Some rows of the batch."""
        return PackedStates(*(t.index_select(0, index.to(t.device)) for t in self.tensors()))


class ResqCacheLayer(CacheLayerMixin):
    """Keys and values of one decoder layer as codes.

    A layer with a sliding window keeps all tokens too; the mask takes care of the window.
    """

    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, parts: Parts) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.parts = parts
        self.packed: tuple[PackedStates, PackedStates] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the first `update` brings the shapes."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Quantize and keep new tokens; what is kept of all tokens, dequantized.

        Args:
            key_states, value_states: `[batch, heads, tokens, head_dim]`, in the basis that they
                are quantized in.
        """
        new = (PackedStates.of(key_states, self.parts), PackedStates.of(value_states, self.parts))
        if self.packed is not None:
            new = (self.packed[0].followed_by(new[0]), self.packed[1].followed_by(new[1]))
        self.packed, self.is_initialized = new, True
        keys, values = new
        return keys.dense(self.parts, key_states.dtype), values.dense(
            self.parts, value_states.dtype
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens that the mask is for, and where they start."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens that are kept."""
        return 0 if self.packed is None else self.packed[0].codes.shape[-2]

    def get_max_length(self) -> int:
        """No bound."""
        return -1

    get_max_cache_shape = get_max_length  # its name in transformers 5.5

    @property
    def nbytes(self) -> int:
        """Memory of all that is kept."""
        return sum(t.nbytes for states in self.packed or () for t in states.tensors())

    @property
    def batch_size(self) -> int:
        """Rows that are kept; -1 before the first token."""
        return -1 if self.packed is None else len(self.packed[0].codes)

    def reset(self) -> None:
        """Forget all tokens."""
        self.packed, self.is_initialized = None, False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens.

        A positive number is how many are kept, as transformers 5.5 means it.
        """
        length = self.get_seq_length()
        kept = min(tokens_to_remove, length) if tokens_to_remove > 0 else length + tokens_to_remove
        if kept < length:
            self._each(lambda states: states.first(max(0, kept)))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row `i` becomes what row `beam_idx[i]` was."""
        self._each(lambda states: states.rows(beam_idx))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self._each(lambda states: states.rows(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, one after the other."""
        rows = torch.arange(max(0, self.batch_size)).repeat_interleave(repeats)
        self._each(lambda states: states.rows(rows))

    def _each(self, change: Callable[[PackedStates], PackedStates]) -> None:
        if self.packed is not None:
            self.packed = (change(self.packed[0]), change(self.packed[1]))


class ResqCache(Cache):
    """Keys and values of all decoder layers as codes.

    Args:
        layers: decoder layers.
        parts: of a head's key and value.
    """

    def __init__(self, layers: int, parts: Parts) -> None:
        self.codes = [ResqCacheLayer(parts) for _ in range(layers)]
        super().__init__(layers=[*self.codes])

    @classmethod
    def in_place_of(cls, empty: Cache, layers: int, parts: Parts) -> ResqCache:
        """The same object as an empty cache of transformers, from now on one of these.

        Whoever passed it to a model may go on with it, and not with what the model returns.
        """
        made = cls(layers, parts)
        empty.__class__ = cls
        empty.__dict__.clear()
        empty.__dict__.update(made.__dict__)
        assert isinstance(empty, cls), "it has become one"
        return empty

    @property
    def nbytes(self) -> int:
        """Memory of all that is kept: codes, scales and zeros."""
        return sum(layer.nbytes for layer in self.codes)
