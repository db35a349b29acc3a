"""An embedding over packed codes, and the head of a model that has one matrix for both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rilq.formats.packed_linear import PackedModule, RilqLinear
from rilq.formats.packing import dequantize_packed
from rilq.formats.spec import QuantSpec

# Gemma multiplies in the embedding; each is `nn.Embedding` times its `embed_scale`.
_SCALED = ("Gemma2TextScaledWordEmbedding", "Gemma3TextScaledWordEmbedding")


class RilqEmbedding(PackedModule, nn.Embedding):
    """An embedding over packed codes: only the rows that are looked up are dequantized.

    The result is exactly that of the dense module with the dequantized weight in `dtype`.

    Attributes:
        weight: `[num_embeddings, embedding_dim * bits / 32]` int32 parameter without gradient.
        weight_scale, zero_point: `[num_embeddings, embedding_dim / group_size]` float16.
        dtype: of the rows; follows the module when it is cast, since the codes have none.
    """

    def __init__(
        self, dense: nn.Embedding, spec: QuantSpec, *, device: torch.device | str | None = None
    ) -> None:
        """Allocate the tensors, unset, for an embedding that computes what `dense` does.

        Raises:
            ValueError: `embedding_dim` is not a multiple of the group size, or `dense` does
                something else than to look up rows and multiply them by a number.
        """
        nn.Module.__init__(self)  # nn.Embedding's own would allocate a dense weight
        kind = type(dense)
        scaled = kind.__name__ in _SCALED and hasattr(dense, "scalar_embed_scale")
        if not (kind is nn.Embedding or scaled) or dense.max_norm is not None:
            norm = f" with max_norm {dense.max_norm}" if dense.max_norm is not None else ""
            raise ValueError(f"an embedding of class {kind.__name__}{norm} cannot be quantized")
        self.num_embeddings, self.embedding_dim = dense.num_embeddings, dense.embedding_dim
        self.padding_idx = dense.padding_idx  # matters for gradients only, and there are none
        self.max_norm, self.norm_type = None, dense.norm_type
        self.scale_grad_by_freq, self.sparse = dense.scale_grad_by_freq, dense.sparse
        self.dtype: torch.dtype = dense.weight.dtype
        self._kind = kind
        # A plain number: transformers would leave a buffer that no checkpoint holds unset.
        self._factor: float | None = dense.scalar_embed_scale if scaled else None  # type: ignore[assignment]
        self._allocate(dense.num_embeddings, dense.embedding_dim, spec, device)

    @property
    def embed_scale(self) -> Tensor | None:
        """What rows are multiplied by, float32; PEFT asks for it by this name."""
        if self._factor is None:
            return None
        return torch.tensor(self._factor, dtype=torch.float32, device=self.weight.device)

    def forward(self, input: Tensor) -> Tensor:
        """Token ids `[...]` to rows `[..., embedding_dim]` in `dtype`."""
        ids = input.flatten()
        if not len(ids):
            return torch.empty(
                *input.shape, self.embedding_dim, dtype=self.dtype, device=self.weight.device
            )
        words, scale, zero_point = (
            part.index_select(0, ids) for part in (self.weight, self.weight_scale, self.zero_point)
        )
        rows = dequantize_packed(words, scale, zero_point, self.bits, dtype=self.dtype)
        rows = rows.view(*input.shape, self.embedding_dim)
        factor = self.embed_scale
        return rows if factor is None else rows * factor.to(self.dtype)

    def dense(self, dtype: torch.dtype) -> nn.Embedding:
        """The module that this one stands for, its weight dequantized to `dtype`."""
        more: dict[str, Any] = {} if self._factor is None else {"embed_scale": self._factor}
        with torch.device("meta"):
            made = self._kind(self.num_embeddings, self.embedding_dim, self.padding_idx, **more)
        made.weight = nn.Parameter(self.dense_weight(dtype), requires_grad=False)
        if (factor := self.embed_scale) is not None:
            made.embed_scale = factor  # made on the meta device, without its value
        return made.train(self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedModule:
        """Move like any module; a cast changes the dtype of the rows and no stored tensor."""
        probe = torch.empty(0, dtype=self.dtype, device=self.weight.device)
        super()._apply(fn, recurse)
        self.dtype = fn(probe).dtype
        return self


class TiedRilqLinear(RilqLinear):
    """The head of a model whose head is its embedding: the embedding's own tensors.

    Only `weight` is this module's too, as in any tied model; transformers ties it again when it
    loads. Scale and zero-point are asked of the embedding, so they cannot come apart.
    """

    kept_buffers = ()

    def __init__(
        self, embedding: RilqEmbedding, *, bias: bool = False, dtype: torch.dtype | None = None
    ) -> None:
        spec = QuantSpec(embedding.bits, embedding.group_size)
        width, rows = embedding.embedding_dim, embedding.num_embeddings
        super().__init__(width, rows, spec, bias=bias, device="meta", dtype=dtype)
        self.weight = embedding.weight
        self.__dict__["embedding"] = embedding  # not a submodule: its tensors have one name

    @property
    def weight_scale(self) -> Tensor:  # type: ignore[override]
        """The embedding's, on the device of this module's codes."""
        return self.__dict__["embedding"].weight_scale.to(self.weight.device)  # type: ignore[no-any-return]

    @property
    def zero_point(self) -> Tensor:  # type: ignore[override]
        """The embedding's, on the device of this module's codes."""
        return self.__dict__["embedding"].zero_point.to(self.weight.device)  # type: ignore[no-any-return]


def replace_embedding(model: nn.Module, spec: QuantSpec) -> str:
    """Put an empty `RilqEmbedding` on the meta device in place of a model's input embedding.

    Returns:
        Its full module name.

    Raises:
        ValueError: this embedding cannot be quantized; the message names it.
    """
    old = model.get_input_embeddings()  # type: ignore[operator]
    name = name_of(model, old)
    try:
        new = RilqEmbedding(old, spec, device="meta")
    except ValueError as err:
        raise ValueError(f"{name}: {err}\n  quantization_config needs embed_bits 16") from err
    model.set_submodule(name, new.train(old.training))
    return name


def replace_head(model: nn.Module, spec: QuantSpec, *, tied: bool) -> str | None:
    """Put an empty packed linear on the meta device in place of a model's output head.

    Args:
        tied: the head is the embedding's matrix; the embedding has been replaced already.

    Returns:
        Its full module name; None for a model without a head.

    Raises:
        ValueError: the group size does not divide its width.
    """
    get_head = getattr(model, "get_output_embeddings", None)
    old = get_head() if callable(get_head) else None
    if old is None:
        return None
    name, bias, dtype = name_of(model, old), old.bias is not None, old.weight.dtype
    new: RilqLinear
    if tied:
        new = TiedRilqLinear(model.get_input_embeddings(), bias=bias, dtype=dtype)  # type: ignore[operator]
    else:
        try:
            new = RilqLinear(
                old.in_features, old.out_features, spec, bias=bias, device="meta", dtype=dtype
            )
        except ValueError as err:
            raise ValueError(f"{name}: {err}\n  quantization_config needs head_bits 16") from err
    model.set_submodule(name, new.train(old.training))
    return name


def name_of(model: nn.Module, module: nn.Module) -> str:
    """Full module name of a part of a model."""
    found: str = next(name for name, each in model.named_modules() if each is module)
    return found
