"""Weights, Hessians and layers that tests of quantizers share."""

from itertools import repeat

import torch
from torch import Tensor

from rilq.converter.quantizers import LayerQuantizer, LayerTask, Quantizer
from rilq.formats.packing import dequantize
from rilq.formats.spec import QuantizedLinear, QuantSpec

LARGEST = 65504.0 * 2.0**15  # what a float16 grid can stand for


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_weight(rows: int, width: int, seed: int = 0) -> Tensor:
    """Rows and channels of different sizes, a few outliers: like a linear's weight."""
    weight = torch.randn(rows, width, generator=draw(seed))
    weight *= 1 + torch.rand(width, generator=draw(seed + 1))
    return weight * torch.exp(torch.randn(rows, width, generator=draw(seed + 2)) / 3)


def correlated_hessian(width: int, tokens: int = 400, seed: int = 3) -> Tensor:
    """Inputs with few strong directions and channels of very different sizes."""
    mixed = torch.randn(tokens, width // 4, generator=draw(seed)) @ torch.randn(
        width // 4, width, generator=draw(seed + 1)
    )
    noise = torch.randn(tokens, width, generator=draw(seed + 2))
    x = (mixed + noise) * torch.logspace(-1, 1, width)[torch.randperm(width, generator=draw(seed))]
    return x.T @ x


def layer_task(weight: Tensor, spec: QuantSpec, hessian: Tensor, parts: int = 1) -> LayerTask:
    """A layer of one linear whose inputs have that Hessian: its error is the proxy loss.

    Its `[in_features]` rows of one token each are all in every batch, in so many parts.
    """
    values, vectors = torch.linalg.eigh(hessian.double())
    inputs = (vectors * values.clamp(min=0).sqrt()).T.float()[:, None]  # [rows, 1, in]
    wanted = inputs @ weight.float().clamp(-LARGEST, LARGEST).T
    batch = list(zip(inputs.chunk(parts), wanted.chunk(parts), strict=True))
    return LayerTask(
        weight={"linear": weight}.__getitem__,
        specs={"linear": spec},
        squares={"linear": hessian.diagonal() / len(hessian)},
        run=lambda hidden, weights: hidden @ weights["linear"].T,
        batches=repeat(batch),
        note=lambda text: None,
    )


def quantized(
    quantizer: Quantizer | LayerQuantizer, weight: Tensor, spec: QuantSpec, hessian: Tensor
) -> QuantizedLinear:
    """What any quantizer makes of a linear whose inputs have that Hessian."""
    if isinstance(quantizer, LayerQuantizer):
        return quantizer.quantize_layer(layer_task(weight, spec, hessian))["linear"]
    return quantizer.quantize(weight, spec, quantizer.prepare(hessian, lambda text: None))


def values(linear: QuantizedLinear) -> Tensor:
    return dequantize(linear.codes, linear.scale, linear.zero_point)


def proxy_loss(weight: Tensor, linear: QuantizedLinear, hessian: Tensor) -> float:
    error = (weight - values(linear)).double()
    return float((error @ hessian.double() * error).sum())


def same_bytes(left: QuantizedLinear, right: QuantizedLinear) -> bool:
    return all(
        getattr(left, part).equal(getattr(right, part)) for part in ("codes", "scale", "zero_point")
    )
