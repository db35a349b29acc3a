"""Blocks against gguf's own reader, and the fit of Q2_K against a slow search."""

import math

import gguf
import pytest
import torch
from torch import Tensor

from rilq.formats.export.gguf_blocks import pack_q2_k, pack_q4_1, unpack_q2_k, unpack_q4_1
from rilq.formats.packing import dequantize
from rilq.formats.spec import QuantizedLinear, QuantSpec

TYPE = gguf.GGMLQuantizationType


def linear(
    rows: int, width: int, spec: QuantSpec, *, spread: float = 0.3, seed: int = 0
) -> QuantizedLinear:
    """Random codes; zero-points around the middle code, as far apart as `spread` says."""
    draw = torch.Generator().manual_seed(seed)
    groups = (rows, width // spec.group_size)
    scale = 0.02 * torch.exp(0.5 * torch.randn(groups, generator=draw))
    zero_point = spec.max_code / 2 + spread * torch.randn(groups, generator=draw)
    codes = torch.randint(spec.max_code + 1, (rows, width), generator=draw, dtype=torch.uint8)
    return QuantizedLinear(codes, scale.half(), zero_point.half(), spec)


def dense(of: QuantizedLinear) -> Tensor:
    return dequantize(of.codes, of.scale, of.zero_point, dtype=torch.float32)


def relative_error(packed: Tensor, of: QuantizedLinear) -> float:
    return float((unpack_q2_k(packed) - dense(of)).norm() / dense(of).norm())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_q4_1_is_the_weights_but_for_the_minimum_in_float16(bits: int, group_size: int) -> None:
    quantized = linear(6, 384, QuantSpec(bits, group_size))
    packed = pack_q4_1(quantized)
    minimum = (quantized.scale.float() * quantized.zero_point.float()).abs().max()
    assert packed.shape == (6, 384 // 32 * 20)
    assert (unpack_q4_1(packed) - dense(quantized)).abs().max() <= minimum * 2**-11


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_gguf_reads_from_both_what_we_do(group_size: int) -> None:
    quantized = linear(5, 512, QuantSpec(2, group_size))
    for name, pack, unpack in (("Q4_1", pack_q4_1, unpack_q4_1), ("Q2_K", pack_q2_k, unpack_q2_k)):
        packed = pack(quantized)
        theirs = gguf.quants.dequantize(packed.numpy(), TYPE[name])
        assert torch.equal(torch.from_numpy(theirs), unpack(packed))


def test_a_grid_that_q2_k_has_comes_back_exactly() -> None:
    spec = QuantSpec(2, 64)
    scale = torch.tensor([[3.0, 15, 7, 1], [9, 2, 15, 4]]).half() / 1024
    offset = torch.tensor([[15.0, 7, 0, 2], [1, 15, 8, 3]]).half() / 2048
    zero_point = (offset / scale).half()
    codes = torch.randint(4, (2, 256), dtype=torch.uint8)
    quantized = QuantizedLinear(codes, scale, zero_point, spec)
    assert relative_error(pack_q2_k(quantized), quantized) < 2e-4  # zero_point is not exact


@pytest.mark.parametrize(
    ("group_size", "bound"),
    # What was measured, and a twentieth. The quantizer of llama.cpp 0.3.36 leaves 0.068, 0.053 and
    # 0.033 of these weights.
    [(32, 0.0444), (64, 0.0253), (128, 0.0067)],
)
def test_q2_k_is_near_the_weights(group_size: int, bound: float) -> None:
    quantized = linear(64, 1024, QuantSpec(2, group_size))
    assert relative_error(pack_q2_k(quantized), quantized) < bound


def search(weight: Tensor) -> float:
    """Least squared error of one block `[16, 16]`, of all pairs of units on a fine grid.

    For each pair, each run takes the best of all 256 pairs of scale and minimum, and each weight
    its nearest code.
    """
    low, high = weight.amin(1), weight.amax(1)
    steps, offsets = ((high - low).max() / 3) / torch.linspace(10, 18, 33), -low.min()
    level = torch.arange(16.0)
    least = math.inf
    for d in steps.half().float():
        step = (d * level).view(16, 1, 1, 1)
        for dmin in (offsets / torch.linspace(8, 18, 25)).half().float():
            offset = (dmin * level).view(1, 16, 1, 1)
            codes = torch.where(step == 0, 0, (weight + offset) / step).round_().clamp_(0, 3)
            errors = (step * codes - offset - weight).square_().sum(3)  # [scale, minimum, run]
            least = min(least, float(errors.flatten(0, 1).amin(0).sum()))
    return least


@pytest.mark.parametrize(("group_size", "spread"), [(32, 0.3), (64, 0.3), (64, 1.2)])
def test_q2_k_is_no_worse_than_a_slow_search(group_size: int, spread: float) -> None:
    quantized = linear(1, 256, QuantSpec(2, group_size), spread=spread)
    ours = (unpack_q2_k(pack_q2_k(quantized)) - dense(quantized)).square().sum()
    assert float(ours) <= 1.05 * search(dense(quantized).view(16, 16))


@pytest.mark.parametrize("zero_point", [-2.0, 0.0, 5.0])
def test_q2_k_of_one_sided_or_constant_weights_is_finite_and_near(zero_point: float) -> None:
    quantized = linear(4, 256, QuantSpec(2, 64))
    one_sided = QuantizedLinear(
        quantized.codes,
        quantized.scale,
        torch.full_like(quantized.zero_point, zero_point),
        quantized.spec,
    )
    constant = QuantizedLinear(
        torch.zeros_like(quantized.codes), one_sided.scale, one_sided.zero_point, quantized.spec
    )
    for each in (one_sided, constant):
        error = (unpack_q2_k(pack_q2_k(each)) - dense(each)).norm()
        assert error <= 0.05 * dense(each).norm()
