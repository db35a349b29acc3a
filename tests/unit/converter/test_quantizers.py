"""Quantizers: against slow and obvious references, and on groups that break divisions."""

import math
from collections.abc import Callable
from typing import Literal, TypeAlias

import pytest
import torch
from quantizer_examples import (
    correlated_hessian,
    draw,
    proxy_loss,
    quantized,
    random_weight,
    same_bytes,
    values,
)
from torch import Tensor

from rilq.converter.options import LAYER_QUANTIZERS
from rilq.converter.quantizers import (
    QUANTIZERS,
    Clip,
    LayerQuantizer,
    Quantizer,
    build_quantizer,
    grid,
)
from rilq.converter.quantizers.gptq import GptqQuantizer
from rilq.converter.quantizers.grid import (
    as_groups,
    encode,
    minmax_grid,
    nearest_codes,
    search_grid,
)
from rilq.converter.quantizers.lsq import lsq_grid
from rilq.errors import InputError, NonFiniteError, OptionError, RilqError
from rilq.formats.packing import dequantize
from rilq.formats.spec import QuantizedLinear, QuantSpec

FindGrid: TypeAlias = Callable[..., tuple[Tensor, Tensor]]
ZeroPoint: TypeAlias = Literal["real", "integer"]

WAYS: list[tuple[str, Clip | None]] = [
    ("rtn", "none"),
    ("rtn", "search"),
    ("rtn", "lsq"),
    ("hqq", None),
    ("lsq", None),
    ("gptq", "none"),
    ("gptq", "search"),
    ("gptq", "lsq"),
    ("lwc", None),
    ("signround", "none"),
    ("signround", "lsq"),
    ("blockap", "none"),
    ("blockap", "search"),
    ("blockap", "lsq"),
]
SPECS = [QuantSpec(bits, 32, zero) for bits in (2, 3, 4, 8) for zero in ("real", "integer")]


def build(name: str, clip: Clip | None = None) -> Quantizer | LayerQuantizer:
    """With few steps, where it is trained."""
    return build_quantizer(name, clip=clip, layer_steps=5)


def reference_gptq(
    weight: Tensor, hessian: Tensor, spec: QuantSpec, clip: Clip, damping: float = 0.01
) -> QuantizedLinear:
    """One column after the other, by elimination in the full inverse, in float64."""
    W = weight.double()
    H = hessian.double()
    H = H + damping * H.diagonal().mean() * torch.eye(len(H))
    Hinv = torch.linalg.inv(H)
    codes, scales, zeros = [], [], []
    for i in range(W.shape[1]):
        if i % spec.group_size == 0:
            group = W[:, i : i + spec.group_size].float()[:, None]
            if clip == "lsq":
                # What an error costs at the end: the later columns have made up for the rest.
                U = torch.linalg.cholesky(Hinv[i:, i:], upper=True).diagonal()[: group.shape[-1]]
                scale, zero = lsq_grid(group, spec, (U**-2 / (U**-2).mean()).float()[None])
            else:
                scale, zero = (search_grid if clip == "search" else minmax_grid)(group, spec)
            scales.append(scale)
            zeros.append(zero)
        s, z = scales[-1].double(), zeros[-1].double()
        code = (W[:, i : i + 1] / s + z).round().clamp(0, spec.max_code)
        codes.append(code.to(torch.uint8))
        error = W[:, i : i + 1] - s * (code - z)
        W = W - error / Hinv[i, i] * Hinv[i]
        Hinv = Hinv - torch.outer(Hinv[:, i], Hinv[i]) / Hinv[i, i]
    return QuantizedLinear(torch.cat(codes, 1), torch.cat(scales, 1), torch.cat(zeros, 1), spec)


# Scale and zero-point


def test_minmax_grid_of_a_worked_group() -> None:
    group = torch.linspace(-1.5, 3.0, 32).reshape(1, 1, 32)
    scale, zero_point = minmax_grid(group, QuantSpec(2, 32))
    assert (scale.item(), zero_point.item()) == (1.5, 1.0)
    assert scale.dtype == zero_point.dtype == torch.float16


def test_integer_zero_point_widens_the_range_to_hold_zero() -> None:
    group = torch.linspace(3.0, 6.0, 32).reshape(1, 1, 32)
    assert [part.item() for part in minmax_grid(group, QuantSpec(2, 32))] == [1.0, -3.0]
    integer = minmax_grid(group, QuantSpec(2, 32, "integer"))
    assert [part.item() for part in integer] == [2.0, 0.0]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("find_grid", [minmax_grid, search_grid])
def test_integer_zero_points_are_codes_and_scales_positive(
    find_grid: FindGrid, spec: QuantSpec
) -> None:
    groups = as_groups(random_weight(16, 96) + 0.3, spec)
    scale, zero_point = find_grid(groups, spec)
    assert scale.shape == zero_point.shape == (16, 3)
    assert bool((scale > 0).all())
    if spec.zero_point == "integer":
        assert zero_point.equal(zero_point.round().clamp(0, spec.max_code))
    else:
        assert not zero_point.equal(zero_point.round())


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_codes_are_the_nearest_of_all_codes(spec: QuantSpec) -> None:
    groups = as_groups(random_weight(8, 64), spec)
    scale, zero_point = search_grid(groups, spec)
    codes = encode(groups, scale, zero_point, spec)
    ladder = torch.arange(spec.max_code + 1)
    every = (ladder - zero_point.double()[..., None, None]) * scale.double()[..., None, None]
    least = (every - groups[..., None]).abs().amin(-1)
    found = (dequantize(codes, scale, zero_point).reshape(groups.shape) - groups).abs()
    torch.testing.assert_close(found.double(), least, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_plain_rounding_is_at_most_half_a_step_off(bits: int) -> None:
    weight = random_weight(16, 128)
    linear = build_quantizer("rtn").quantize(weight, QuantSpec(bits, 64))
    step = linear.scale.float().repeat_interleave(64, 1)
    # Beside half a step: the rounding of the scale and of the zero-point to float16.
    rounding = 2**-10 * weight.abs().max()
    assert bool(((weight - values(linear)).abs() <= step / 2 + rounding).all())


@pytest.mark.parametrize("importance", [None, torch.rand(3, 32, generator=draw(9)) ** 4])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_search_is_never_worse_than_minmax(spec: QuantSpec, importance: Tensor | None) -> None:
    groups = as_groups(random_weight(32, 96), spec)

    def error(find_grid: FindGrid, *args: Tensor | None) -> Tensor:
        scale, zero_point = find_grid(groups, spec, *args)
        found = dequantize(encode(groups, scale, zero_point, spec), scale, zero_point)
        squares = (found.reshape(groups.shape) - groups) ** 2
        return (squares if importance is None else squares * importance).sum(-1)

    searched, plain = error(search_grid, importance), error(minmax_grid)
    assert bool((searched <= plain * (1 + 1e-5)).all())
    if spec.bits == 2:
        assert searched.sum() < 0.75 * plain.sum()


def test_search_comes_near_the_best_of_all_pairs_of_factors() -> None:
    groups = random_weight(64, 32).reshape(64, 1, 32)
    low, high = groups.amin(-1), groups.amax(-1)
    factors = torch.linspace(1, 0.5, 20).tolist()

    def error(scale: Tensor, zero_point: Tensor) -> Tensor:
        s, z = scale.float()[..., None], zero_point.float()[..., None]
        return (s * ((groups / s + z).round().clamp(0, 3) - z) - groups).square().sum(-1)

    def error_of_factors(lower: float, upper: float) -> Tensor:
        scale = ((high * upper - low * lower) / 3).half()
        return error(scale, (-low * lower / scale.float()).half())

    common = torch.stack([error_of_factors(factor, factor) for factor in factors]).amin(0)
    pairs = torch.stack([error_of_factors(a, b) for a in factors for b in factors]).amin(0)
    found = error(*search_grid(groups, QuantSpec(2, 32)))
    assert bool((found >= pairs * 0.9999).all()), "the search looks at these factors only"
    assert bool((found <= common * 1.0001).all())
    assert found.sum() < 1.02 * pairs.sum() < 0.95 * common.sum()


def test_importance_draws_the_grid_to_the_important_channels() -> None:
    groups = random_weight(64, 32).reshape(64, 1, 32)
    importance = torch.full((1, 32), 1e-3)
    importance[0, :4] = 1.0
    spec = QuantSpec(2, 32)

    def important_error(*args: Tensor) -> Tensor:
        scale, zero_point = search_grid(groups, spec, *args)
        found = dequantize(encode(groups, scale, zero_point, spec), scale, zero_point)
        return (found.reshape(groups.shape) - groups)[..., :4].square().sum()

    assert important_error(importance) < 0.6 * important_error()


def test_result_does_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, weight = QuantSpec(2, 32), random_weight(10, 64)
    whole = build_quantizer("rtn", clip="search").quantize(weight, spec)
    monkeypatch.setattr(
        grid, "row_chunks", lambda rows, *_: (slice(i, i + 3) for i in range(0, rows, 3))
    )
    pieces = build_quantizer("rtn", clip="search").quantize(weight, spec)
    assert pieces.codes.equal(whole.codes) and pieces.scale.equal(whole.scale)
    assert pieces.zero_point.equal(whole.zero_point)


# Groups that break divisions: rows of one weight, each with a healthy second group.

HEALTHY = torch.randn(32, generator=draw(5)) / 30
NOISE = torch.randn(32, generator=draw(6))


def with_one_huge(size: float) -> Tensor:
    group = HEALTHY.clone()
    group[7] = size
    return group


DEGENERATE = {
    "zero": torch.zeros(32),
    "constant": torch.full((32,), 0.017578125),
    "negative constant": torch.full((32,), -333.0),
    "constant 1e30": torch.full((32,), 1e30),
    "constant 1e-30": torch.full((32,), -1e-30),
    "one huge": with_one_huge(1e30),
    "one huge negative": with_one_huge(-1e30),
    "largest float32 of both signs": torch.finfo(torch.float32).max * NOISE.sign(),
    "tiny": 1e-9 * NOISE,
    "scale subnormal in float16": 1e-6 * NOISE,
    "smallest float32": torch.full((32,), 1e-45) * NOISE.sign(),
    "far from zero": 100.0 + 1e-4 * NOISE,
    "far below zero": -1e5 + NOISE,
    "wide and far from zero": 1e8 + 1e7 * NOISE,
}


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize(("name", "clip"), WAYS)
def test_degenerate_groups_stay_finite_and_in_range(name: str, clip: Clip, spec: QuantSpec) -> None:
    weight = torch.stack([torch.cat([group, HEALTHY]) for group in DEGENERATE.values()])
    linear = quantized(build(name, clip), weight, spec, correlated_hessian(64))
    assert bool(torch.isfinite(linear.scale).all() and (linear.scale > 0).all())
    assert bool(torch.isfinite(linear.zero_point).all())
    assert int(linear.codes.max()) <= spec.max_code
    assert bool(torch.isfinite(values(linear)).all())


@pytest.mark.parametrize(("name", "clip"), WAYS)
def test_zeros_stay_zeros(name: str, clip: Clip) -> None:
    for spec in SPECS:
        linear = quantized(build(name, clip), torch.zeros(2, 64), spec, correlated_hessian(64))
        assert not values(linear).any() and not linear.codes.any()
        assert not linear.zero_point.any()
        assert linear.scale.eq(1).all() or name == "lwc"  # whose range is learned


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("zero_point", ["real", "integer"])
@pytest.mark.parametrize("clip", ["none", "search"])
def test_constant_groups_come_back_exactly(
    dtype: torch.dtype, zero_point: ZeroPoint, clip: Clip
) -> None:
    constants = torch.logspace(-7, 4.8, 60).to(dtype) * torch.tensor([1, -1] * 30, dtype=dtype)
    if dtype == torch.bfloat16 and zero_point == "integer":
        constants = constants[constants.abs() > 2**-14]  # where float16 holds every bfloat16
    weight = constants[:, None].expand(-1, 32)
    linear = build_quantizer("rtn", clip=clip).quantize(weight, QuantSpec(2, 32, zero_point))
    assert values(linear).equal(weight.float())
    if zero_point == "real":
        mantissa, _ = torch.frexp(linear.scale.float())
        assert mantissa.eq(0.5).all(), "the scale is a power of two"


@pytest.mark.parametrize(
    ("kind", "bound"),
    [
        ("constant 1e-30", 1.01e-30),  # nothing nearer than 0 within reach
        ("tiny", 4e-9),  # all at one code, in the middle of 1e-9 * (-2.1 .. 2.9)
        ("scale subnormal in float16", 0.75e-6),  # half a step of 1.39e-6, and a scale of 5 bits
        ("far from zero", 100 * 2**-11),  # half a unit in the last place of a float16
        ("far below zero", 1e5 * 2**-11),
        ("one huge", 0.2),  # all healthy weights at the code of their minimum, -0.08
        ("one huge negative", 0.2),
    ],
)
def test_degenerate_groups_are_as_near_as_the_format_allows(kind: str, bound: float) -> None:
    weight = DEGENERATE[kind][None]
    found = values(build_quantizer("rtn").quantize(weight, QuantSpec(2, 32)))
    ordinary = weight.abs() < 1e6
    assert float((found - weight)[ordinary].abs().max()) <= bound


def test_a_range_too_wide_for_float16_is_cut_around_zero() -> None:
    weight = torch.linspace(-1e6, 3e6, 32)[None]
    linear = build_quantizer("rtn").quantize(weight, QuantSpec(2, 32))
    assert linear.scale.item() == 65504.0 and linear.zero_point.item() == 1.5
    assert values(linear)[0, [0, -1]].tolist() == [-1.5 * 65504, 1.5 * 65504]


# GPTQ


def assert_same_but_for_ties(left: QuantizedLinear, right: QuantizedLinear) -> None:
    """The same codes and, to a unit in the last place of a float16, grids; in all rows but one.

    A weight within float32's rounding of a tie may fall to either side, and from there on its
    row differs. Over four seeds of the cases below 2 rows of 576 did.
    """
    same = (left.codes == right.codes).all(1)
    for name in ("scale", "zero_point"):
        pair = (getattr(linear, name).float() for linear in (left, right))
        same &= torch.isclose(*pair, rtol=2**-9, atol=1e-4).all(1)
    assert int(same.sum()) >= len(same) - 1


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("clip", ["none", "search", "lsq"])
def test_gptq_equals_elimination_in_the_full_inverse(
    bits: int, group_size: int, clip: Clip
) -> None:
    weight, hessian = random_weight(6, 256), correlated_hessian(256)
    spec = QuantSpec(bits, group_size)
    fast = quantized(GptqQuantizer(clip), weight, spec, hessian)
    slow = reference_gptq(weight, hessian, spec, clip)
    assert_same_but_for_ties(fast, slow)
    expected = proxy_loss(weight, slow, hessian)
    # At 8 bits what is left is small, and a row that fell to the other side of a tie shows.
    assert proxy_loss(weight, fast, hessian) == pytest.approx(expected, rel=4e-2)


def test_gptq_with_integer_zero_points_equals_the_reference() -> None:
    weight, hessian = random_weight(6, 128), correlated_hessian(128)
    spec = QuantSpec(2, 32, "integer")
    fast = quantized(GptqQuantizer("search"), weight, spec, hessian)
    assert_same_but_for_ties(fast, reference_gptq(weight, hessian, spec, "search"))


@pytest.mark.parametrize("width", [96, 160])
def test_gptq_does_not_depend_on_the_block(width: int) -> None:
    weight, hessian, spec = random_weight(8, width), correlated_hessian(width), QuantSpec(3, 32)
    small = quantized(GptqQuantizer(block=32), weight, spec, hessian)
    large = quantized(GptqQuantizer(block=128), weight, spec, hessian)
    assert_same_but_for_ties(small, large)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("clip", ["none", "search", "lsq"])
def test_gptq_beats_rounding_on_the_proxy_loss(spec: QuantSpec, clip: Clip) -> None:
    weight, hessian = random_weight(16, 192), correlated_hessian(192)
    plain = build_quantizer("rtn", clip=clip).quantize(weight, spec)
    fed_back = quantized(build_quantizer("gptq", clip=clip), weight, spec, hessian)
    assert proxy_loss(weight, fed_back, hessian) < 0.7 * proxy_loss(weight, plain, hessian)


def test_gptq_takes_a_hessian_in_any_scale() -> None:
    weight, hessian, spec = random_weight(8, 64), correlated_hessian(64), QuantSpec(2, 32)
    expected = quantized(GptqQuantizer(), weight, spec, hessian)
    for factor in (2.0**-100, 2.0**60):
        assert quantized(GptqQuantizer(), weight, spec, hessian * factor).codes.equal(
            expected.codes
        )


def test_gptq_rounds_dead_channels_to_nearest() -> None:
    weight, hessian, spec = random_weight(8, 64), correlated_hessian(64), QuantSpec(2, 32)
    dead = [0, 5, 40, 63]
    hessian[dead] = 0
    hessian[:, dead] = 0
    linear = quantized(GptqQuantizer(), weight, spec, hessian)
    groups = as_groups(weight, spec)
    rounded = encode(groups, linear.scale, linear.zero_point, spec)
    assert linear.codes[:, dead].equal(rounded[:, dead])
    assert not linear.codes.equal(rounded)


@pytest.mark.parametrize("clip", ["none", "search", "lsq"])
def test_gptq_without_any_data_is_rounding(clip: Clip) -> None:
    weight, spec = random_weight(8, 128), QuantSpec(2, 64)
    blind = quantized(GptqQuantizer(clip), weight, spec, torch.zeros(128, 128))
    assert same_bytes(blind, quantized(build("rtn", clip), weight, spec, torch.zeros(128, 128)))


def test_inversean_with_infinity_is_refused() -> None:
    hessian = torch.eye(64)
    hessian[3, 3] = math.inf
    with pytest.raises(RilqError, match="Hessian .* found NaN or infinity"):
        GptqQuantizer().prepare(hessian, print)


def test_a_block_that_cuts_groups_is_refused() -> None:
    with pytest.raises(OptionError, match="gptq block 64: expected a multiple of the group size"):
        quantized(
            GptqQuantizer(block=64),
            random_weight(4, 128),
            QuantSpec(2, 128),
            correlated_hessian(128),
        )


# All quantizers


@pytest.mark.parametrize("name", QUANTIZERS)
def test_quantizers_have_their_names_and_say_what_they_need(name: str) -> None:
    quantizer = build_quantizer(name)
    assert quantizer.name == name
    if isinstance(quantizer, LayerQuantizer):
        assert name in LAYER_QUANTIZERS
    else:
        assert quantizer.needs_hessian == (name in ("gptq", "lsq"))


def test_default_clip_is_none_for_rtn_and_least_squares_where_a_grid_is_only_begun_from() -> None:
    assert build_quantizer("rtn") == build_quantizer("rtn", clip="none")
    for name in ("gptq", "signround", "blockap"):
        assert build_quantizer(name) == build_quantizer(name, clip="lsq")
        assert build_quantizer(name) != build_quantizer(name, clip="search")


def test_layer_steps_reach_the_quantizers_that_train() -> None:
    assert build_quantizer("blockap", layer_steps=7) == LayerQuantizer("blockap", "lsq", 7)


def test_unknown_quantizer_names_the_known_ones() -> None:
    with pytest.raises(OptionError, match="expected one of rtn, lsq, .*blockap; found 'awq'"):
        build_quantizer("awq")


def test_unknown_clip_is_refused() -> None:
    with pytest.raises(OptionError, match="clip: expected none, search or lsq; found 'some'"):
        build_quantizer("rtn", clip="some")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["lsq", "hqq", "lwc"])
def test_a_clip_for_a_quantizer_with_its_own_grid_is_refused(name: str) -> None:
    with pytest.raises(OptionError, match=f"quantizer {name} finds its own grid"):
        build_quantizer(name, clip="search")


@pytest.mark.parametrize(("name", "clip"), WAYS)
def test_the_same_task_twice_gives_the_same_bytes(name: str, clip: Clip) -> None:
    weight, hessian, spec = random_weight(8, 64), correlated_hessian(64), QuantSpec(2, 32)
    once, again = (quantized(build(name, clip), weight, spec, hessian) for _ in range(2))
    assert same_bytes(once, again)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(("name", "clip"), WAYS)
def test_integer_zero_points_of_every_quantizer_are_codes(name: str, clip: Clip, bits: int) -> None:
    spec = QuantSpec(bits, 32, "integer")
    linear = quantized(build(name, clip), random_weight(8, 64) + 0.3, spec, correlated_hessian(64))
    assert linear.zero_point.equal(linear.zero_point.round().clamp(0, spec.max_code))
    assert 0 < len(linear.zero_point.unique()) and int(linear.codes.max()) == spec.max_code


@pytest.mark.parametrize(("name", "clip"), WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weight_and_hessian_are_left_alone(name: str, clip: Clip, dtype: torch.dtype) -> None:
    weight, hessian = random_weight(4, 64).to(dtype), correlated_hessian(64)
    before = weight.clone(), hessian.clone()
    linear = quantized(build(name, clip), weight, QuantSpec(2, 32), hessian)
    assert weight.equal(before[0]) and hessian.equal(before[1])
    assert linear.codes.dtype == torch.uint8 and linear.codes.shape == weight.shape
    assert linear.scale.dtype == linear.zero_point.dtype == torch.float16
    assert linear.scale.shape == linear.zero_point.shape == (4, 2)


@pytest.mark.parametrize(("name", "clip"), WAYS)
def test_ragged_width_is_refused_with_the_legal_group_sizes(name: str, clip: Clip) -> None:
    with pytest.raises(
        InputError, match="in_features 192 is not a multiple of group size 128"
    ) as e:
        quantized(
            build(name, clip),
            random_weight(4, 192),
            QuantSpec(2, 128),
            correlated_hessian(192),
        )
    assert "use --group-size 32 or 64" in str(e.value)


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_weights_are_refused_and_counted(name: str, bad: float) -> None:
    weight = random_weight(4, 64)
    weight[1, 2] = weight[3, 4] = bad
    with pytest.raises(NonFiniteError, match="2 of 256 values are NaN or infinite"):
        quantized(build(name), weight, QuantSpec(2, 32), correlated_hessian(64))


@pytest.mark.parametrize("name", QUANTIZERS)
def test_empty_weights_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"weight \[0, 64\]: expected at least one value"):
        quantized(build(name), torch.zeros(0, 64), QuantSpec(2, 32), torch.eye(64))


def test_nearest_codes_of_a_tie_go_to_the_even_code() -> None:
    one = torch.ones(1).half()
    assert nearest_codes(torch.tensor([[0.5, 1.5, 2.5]]), one, 0 * one, QuantSpec()).tolist() == [
        [0.0, 2.0, 2.0]
    ]


@pytest.mark.parametrize(("name", "clip"), [way for way in WAYS if way[0] not in LAYER_QUANTIZERS])
@pytest.mark.parametrize("zero_point", ["real", "integer"])
def test_rows_do_not_depend_on_each_other(
    name: str, clip: Clip | None, zero_point: ZeroPoint
) -> None:
    """So processes can share them; products of another height may round differently in gptq."""
    quantizer, spec = build(name, clip), QuantSpec(2, 32, zero_point)
    weight, hessian = random_weight(9, 64), correlated_hessian(64)
    whole = quantized(quantizer, weight, spec, hessian)
    for rows in (slice(0, 1), slice(1, 6), slice(6, 9)):
        part = quantized(quantizer, weight[rows], spec, hessian)
        for found, wanted in (
            (part.codes, whole.codes),
            (part.scale, whole.scale),
            (part.zero_point, whole.zero_point),
        ):
            torch.testing.assert_close(found, wanted[rows], rtol=2e-3, atol=0)
