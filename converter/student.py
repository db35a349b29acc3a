"""The quantized model to train: frozen 2-bit linears with adapters, whole in memory.

Two tiers hold the same weights: `dense` dequantizes them once, `packed` keeps the codes and
dequantizes in every forward and backward pass. Their losses and gradients agree to float rounding.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig

from rilq.converter.adapters import Adapter, AdapterSpec
from rilq.converter.architecture import build_skeleton, decoder_layers
from rilq.converter.layers import place_buffers, place_tensor
from rilq.converter.options import Tier
from rilq.formats.native import RilqConfig, RilqLinear


class AdaptedLinear(nn.Module):
    """A frozen linear with an adapter beside it."""

    def __init__(self, base: nn.Module, adapter: Adapter) -> None:
        super().__init__()
        self.base, self.adapter = base, adapter

    def forward(self, x: Tensor) -> Tensor:
        """`base(x) + adapter(x)`, `[..., in_features]` to `[..., out_features]`."""
        out: Tensor = self.base(x) + self.adapter(x)
        return out


class Student(nn.Module):
    """transformers' own model over quantized weights.

    A quantized embedding stays packed: only the rows of a batch are dequantized. A quantized head
    is dequantized once in either tier: each batch needs all of it, in a temporary as large.

    Args:
        config: of the source model.
        quantization: which linears are quantized and how.
        read_layer: native tensors of decoder layer `i` by full name.
        outer: embedding, final norm, head by full name.
        adapters: what to put beside each quantized linear; None for none.
        tier: "dense" or "packed".

    Attributes:
        adapters: every `Adapter` by the full name of its linear.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        quantization: RilqConfig,
        *,
        read_layer: Callable[[int], dict[str, Tensor]],
        outer: dict[str, Tensor],
        adapters: AdapterSpec | None,
        tier: Tier,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.model = build_skeleton(config, dtype, quantization)
        self.adapters: dict[str, Adapter] = {}
        prefix, layers = decoder_layers(self.model, config)
        for name, value in outer.items():
            place_tensor(self.model, name, value, device)
        self.model.tie_weights()  # type: ignore[operator]
        place_buffers(self.model, device)
        for index, layer in enumerate(layers):
            for name, value in read_layer(index).items():
                place_tensor(self.model, name, value, device)
            for path, module in list(layer.named_modules()):
                if isinstance(module, RilqLinear):
                    base = module if tier == "packed" else _dense(module, dtype)
                    full = f"{prefix}.{index}.{path}"
                    self.model.set_submodule(full, self._adapted(full, base, module, adapters))
            # Only the layer's input is kept; the rest is computed again in the backward pass.
            layer.forward = partial(
                checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
            )
        self._final: Tensor | None = None
        head: nn.Module = self.model.get_output_embeddings()  # type: ignore[operator]
        if isinstance(head, RilqLinear):
            head = _dense(head, dtype)
            self.model.set_output_embeddings(head)  # type: ignore[operator]
        head.register_forward_pre_hook(self._keep_input)

    def _adapted(
        self, name: str, base: nn.Module, module: RilqLinear, spec: AdapterSpec | None
    ) -> nn.Module:
        if spec is None:
            return base
        self.adapters[name] = Adapter(
            spec,
            name,
            out_features=module.out_features,
            in_features=module.in_features,
            group_size=module.group_size,
            device=module.weight.device,
        )
        return AdaptedLinear(base, self.adapters[name])

    def _keep_input(self, _head: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._final = args[0]

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Final hidden states (what feeds the head) and float32 logits.

        Args:
            tokens: `[rows, seq_len]`.

        Returns:
            `[rows, seq_len, hidden]` and `[rows, seq_len, vocabulary]`.
        """
        logits = self.model(input_ids=tokens, use_cache=False).logits.float()
        final, self._final = self._final, None
        assert final is not None, "the head was not called"
        return final, logits


def _dense(module: RilqLinear, dtype: torch.dtype) -> nn.Linear:
    """The same linear with its weight dequantized once."""
    dense = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    dense.weight = nn.Parameter(module.dense_weight(dtype), requires_grad=False)
    dense.bias = module.bias
    return dense
