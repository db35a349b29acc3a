"""Quantizers trained on a layer's output: gradients, what training gains, what it may not break."""

from collections.abc import Callable
from dataclasses import replace
from itertools import repeat

import pytest
import torch
from quantizer_examples import (
    correlated_hessian,
    draw,
    layer_task,
    proxy_loss,
    quantized,
    random_weight,
    same_bytes,
    values,
)
from torch import Tensor

from rilq.converter.quantizers import LayerQuantizer, LayerTask, build_quantizer, layerwise
from rilq.converter.quantizers.layerwise import (
    LEARNED,
    LearnedClipping,
    LearnedCodes,
    LearnedRounding,
    LearnedWeight,
    rate_at,
    rate_of,
    round_through,
    started,
)
from rilq.errors import RilqError
from rilq.formats.spec import QuantSpec

SPEC = QuantSpec(2, 32)
NAMES = sorted(LEARNED)


def even_hessian(width: int, tokens: int = 400, seed: int = 3) -> Tensor:
    """Inputs of a normalized layer: correlated, but channels of about the same size."""
    mixed = torch.randn(tokens, width // 4, generator=draw(seed)) @ torch.randn(
        width // 4, width, generator=draw(seed + 1)
    )
    x = mixed / 4 + torch.randn(tokens, width, generator=draw(seed + 2))
    return x.T @ x


def learned(kind: type[LearnedWeight], spec: QuantSpec = SPEC) -> LearnedWeight:
    """With its trained tensors moved off their start."""
    each = kind(*started(random_weight(6, 64), spec, "lsq", torch.ones(64)))
    with torch.no_grad():
        for name, parameter in each.named_parameters():
            noise = torch.rand(parameter.shape, generator=draw(len(name))) - 0.5
            parameter.add_(noise * (1.0 if name in ("rounding", "codes") else 0.3))
    return each


# -- gradients -------------------------------------------------------------------------------------


def test_rounding_passes_gradients_through() -> None:
    x = torch.tensor([0.4, 0.6, -1.5, 2.5], requires_grad=True)
    rounded = round_through(x)
    rounded.backward(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert rounded.tolist() == [0, 1, -2, 2]
    assert x.grad is not None and x.grad.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("zero_point", ["real", "integer"])
@pytest.mark.parametrize("kind", LEARNED.values(), ids=LEARNED)
def test_gradients_are_those_of_the_weight_with_its_rounding_frozen(
    kind: type[LearnedWeight], zero_point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Central differences in float64, where each rounding adds what it added, whatever it is of.

    It adds 1e-4 less to the last code and more to the first, since at either end of what a clamp
    lets through there is no derivative; gradients pass there.
    """
    each = learned(kind, replace(SPEC, zero_point=zero_point)).double()  # type: ignore[arg-type]
    for name in {"weight", "scale", "low"} & vars(each).keys():
        setattr(each, name, getattr(each, name).double())
    towards = torch.randn(6, 64, generator=draw(1), dtype=torch.float64)
    (each() * towards).sum().backward()
    added: list[Tensor] = []

    def record(x: Tensor) -> Tensor:
        added.append(x.round() - x + 1e-4 * (1 - x.round() / 1.5))
        return x.round()

    monkeypatch.setattr(layerwise, "round_through", record)
    with torch.no_grad():
        each()
    for parameter in each.parameters():
        direction = torch.randn(parameter.shape, generator=draw(2), dtype=torch.float64)
        ends = []
        for step in (1e-6, -1e-6):
            again = iter(added)
            monkeypatch.setattr(layerwise, "round_through", lambda x, again=again: x + next(again))
            with torch.no_grad():
                parameter.add_(direction, alpha=step)
                ends.append(float((each() * towards).sum()))
                parameter.add_(direction, alpha=-step)
        assert parameter.grad is not None and parameter.grad.any()
        expected = (ends[0] - ends[1]) / 2e-6
        assert float((parameter.grad * direction).sum()) == pytest.approx(expected, rel=2e-3)


# -- what is learned -------------------------------------------------------------------------------


@pytest.mark.parametrize("zero_point", ["real", "integer"])
@pytest.mark.parametrize("kind", LEARNED.values(), ids=LEARNED)
def test_the_result_is_what_was_trained_but_for_float16(
    kind: type[LearnedWeight], zero_point: str
) -> None:
    each = learned(kind, replace(SPEC, zero_point=zero_point))  # type: ignore[arg-type]
    with torch.no_grad():
        trained, result = each(), each.result()
    step = result.scale.float().repeat_interleave(32, 1)
    apart = (values(result) - trained).abs() / step
    # A weight in the middle between two codes may fall to either side of the stored grid.
    assert float((apart > 0.01).float().mean()) < 0.01 and float(apart.max()) < 1.1


def test_before_training_signround_and_blockap_are_nearest_codes_of_the_start() -> None:
    weight, hessian = random_weight(6, 64), correlated_hessian(64)
    start = quantized(build_quantizer("lsq"), weight, SPEC, hessian)
    for kind in (LearnedRounding, LearnedCodes):
        each = kind(*started(weight, SPEC, "lsq", hessian.diagonal()))
        with torch.no_grad():
            result = each.result()
        assert result.codes.equal(start.codes) and result.scale.equal(start.scale)
        torch.testing.assert_close(result.zero_point, start.zero_point, rtol=2**-10, atol=2**-10)


def test_before_training_lwc_spans_nearly_the_whole_range() -> None:
    weight = random_weight(6, 64)
    with torch.no_grad():
        result = LearnedClipping(*started(weight, SPEC, "none", torch.ones(64))).result()
    whole = build_quantizer("rtn").quantize(weight, SPEC)  # type: ignore[union-attr]
    ratio = result.scale.float() / whole.scale.float()
    assert bool(((ratio > 0.98) & (ratio < 0.985)).all())  # sigmoid(4) = 0.982


def test_a_rounding_offset_moves_a_code_by_one_at_most_and_reaches_both_neighbours() -> None:
    each = LearnedRounding(*started(random_weight(6, 64), SPEC, "lsq", torch.ones(64)))
    with torch.no_grad():
        nearest = each.parts()[0].clone()
        each.rounding.uniform_(-0.5, 0.5, generator=draw())
        moved = each.parts()[0]
        each.rounding.fill_(-0.5)
        lower = each.parts()[0]
        each.rounding.fill_(0.5)
        upper = each.parts()[0]
    assert float((moved - nearest).abs().max()) == 1
    assert bool(((lower <= nearest) & (nearest <= upper) & (upper - lower <= 1)).all())
    assert float((upper - lower).mean()) > 0.7  # the others are clipped at an end


def test_sign_descent_moves_by_the_rate_and_stays_in_its_bounds() -> None:
    each = LearnedRounding(*started(random_weight(6, 64), SPEC, "lsq", torch.ones(64)))
    optimizer = layerwise.learned_optimizer("signround", each.groups(40))
    for group in optimizer.param_groups:
        group["lr"] = 0.2
    each.rounding.grad = torch.linspace(1, 9, 384).view_as(each.rounding)
    each.ends.grad = torch.full_like(each.ends, -1e-6)
    optimizer.step()
    torch.testing.assert_close(each.rounding.data, torch.full_like(each.rounding, -0.2))
    torch.testing.assert_close(each.ends.data, torch.full_like(each.ends, 1.2))
    for _ in range(3):
        optimizer.step()
    assert each.rounding.eq(-0.5).all() and each.ends.eq(1.5).all()


# -- what training gains ---------------------------------------------------------------------------


# 32 x 128 weights at 2 bits, 100 updates. Measured: lwc 0.56 of the error of rounding, signround
# 0.82 and blockap 0.81 of that of least squares, which both start from.
@pytest.mark.parametrize(
    ("name", "start", "ratio"),
    [("lwc", "rtn", 0.7), ("signround", "lsq", 0.9), ("blockap", "lsq", 0.9)],
)
def test_training_lowers_the_error_of_the_layers_output(
    name: str, start: str, ratio: float
) -> None:
    weight, hessian = random_weight(32, 128), even_hessian(128)
    begun = proxy_loss(weight, quantized(build_quantizer(start), weight, SPEC, hessian), hessian)
    quantizer = build_quantizer(name, layer_steps=100)
    ended = proxy_loss(weight, quantized(quantizer, weight, SPEC, hessian), hessian)
    assert ended < ratio * begun


@pytest.mark.parametrize("name", ["signround", "blockap"])
def test_where_training_gains_nothing_the_start_is_kept_and_said_so(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, hessian = random_weight(16, 64), correlated_hessian(64)
    start = quantized(build_quantizer("lsq"), weight, SPEC, hessian)
    monkeypatch.setattr(layerwise, "rate_of", lambda path, steps: 3.0)  # whole codes in one leap
    notes: list[str] = []
    task = replace(layer_task(weight, SPEC, hessian), note=notes.append)
    leapt = LayerQuantizer(name, "lsq", 1).quantize_layer(task)["linear"]
    assert leapt.codes.equal(start.codes) and leapt.scale.equal(start.scale)
    assert notes == [f"{name} gained nothing in 1 updates: its start is kept"]


def test_few_updates_go_less_far_and_many_go_all_the_way() -> None:
    assert rate_of(5.0, 100) == pytest.approx(0.05) and rate_of(5.0, 50) == pytest.approx(0.1)
    assert rate_of(5.0, 1) == rate_of(5.0, 10) == rate_of(5.0, 40) == pytest.approx(0.125)


@pytest.mark.parametrize("kind", [LearnedCodes, LearnedRounding])
def test_factors_move_the_last_code_as_far_whatever_the_bits(kind: type[LearnedWeight]) -> None:
    def farthest(bits: int) -> float:
        """How far one update at the peak rate moves the last code, in steps."""
        spec = QuantSpec(bits, 32)
        each = kind(*started(random_weight(6, 64), spec, "lsq", torch.ones(64)))
        factor = each.log_scale if isinstance(each, LearnedCodes) else each.ends
        [peak] = [g["peak"] for g in each.groups(100) if any(p is factor for p in g["params"])]
        return float(peak) * spec.max_code

    assert [farthest(bits) for bits in (3, 4, 8)] == pytest.approx([farthest(2)] * 3)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("steps", [1, 3, 20])
@pytest.mark.parametrize("name", ["signround", "blockap"])
def test_it_never_ends_worse_than_it_began(name: str, steps: int, bits: int) -> None:
    spec = QuantSpec(bits, 32)
    weight, hessian = random_weight(16, 64), correlated_hessian(64)
    begun = proxy_loss(weight, quantized(build_quantizer("lsq"), weight, spec, hessian), hessian)
    quantizer = build_quantizer(name, layer_steps=steps)
    ended = proxy_loss(weight, quantized(quantizer, weight, spec, hessian), hessian)
    assert ended <= begun * 1.001


@pytest.mark.parametrize("name", NAMES)
def test_several_linears_are_trained_together(name: str) -> None:
    """The second linear of a pair makes up for the first, whose own output is not looked at."""
    first, second = random_weight(64, 64), random_weight(32, 64, seed=7)
    x = torch.randn(64, 1, 64, generator=draw())
    wanted = x @ first.T @ second.T
    task = LayerTask(
        {"a": first, "b": second}.__getitem__,
        {"a": QuantSpec(2, 32), "b": QuantSpec(4, 32)},
        {"a": torch.ones(64), "b": torch.ones(64)},
        lambda hidden, weights: hidden @ weights["a"].T @ weights["b"].T,
        repeat([(x, wanted)]),
        note=lambda text: None,
    )
    both = LayerQuantizer(name, "lsq", 60).quantize_layer(task)
    assert both["a"].spec.bits == 2 and both["b"].spec.bits == 4
    start = {
        n: build_quantizer("rtn", clip="none" if name == "lwc" else "lsq").quantize(  # type: ignore[union-attr]
            task.weight(n), task.specs[n]
        )
        for n in "ab"
    }

    def error(linears: dict[str, object]) -> float:
        given = {n: values(each) for n, each in linears.items()}  # type: ignore[arg-type]
        return float((task.run(x, given) - wanted).square().sum())

    assert error(dict(both)) < error(dict(start))


def test_a_batch_in_parts_trains_as_the_whole_batch() -> None:
    weight, hessian = random_weight(16, 64), even_hessian(64)
    whole, parts = (
        LayerQuantizer("blockap", "lsq", 10).quantize_layer(layer_task(weight, SPEC, hessian, n))
        for n in (1, 4)
    )
    # Float addition in another order: only weights within its rounding of a tie may differ.
    assert float((whole["linear"].codes != parts["linear"].codes).float().mean()) < 0.01
    apart = (whole["linear"].scale - parts["linear"].scale).float().abs()
    assert bool((apart <= 0.01 * whole["linear"].scale.float()).all())


def test_gradients_of_parts_add_up_to_those_of_the_whole_batch() -> None:
    weight, hessian = random_weight(4, 64), even_hessian(64)
    seen: dict[int, list[Tensor]] = {}

    def record(parts: int) -> Callable[..., torch.optim.Optimizer]:
        class Recorder(torch.optim.SGD):
            def step(self, closure: None = None) -> None:  # type: ignore[override]
                params = [p for group in self.param_groups for p in group["params"]]
                seen[parts] = [p.grad.clone() for p in params]

        return lambda name, groups: Recorder(groups, lr=0.0)

    for parts in (1, 3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layerwise, "learned_optimizer", record(parts))
            LayerQuantizer("blockap", "lsq", 1).quantize_layer(
                layer_task(weight, SPEC, hessian, parts)
            )
    for one, three in zip(seen[1], seen[3], strict=True):
        torch.testing.assert_close(one, three, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_size_of_the_outputs_does_not_matter(name: str) -> None:
    weight, hessian = random_weight(8, 64), even_hessian(64)
    quantizer = LayerQuantizer(name, "lsq", 5)
    task = layer_task(weight, SPEC, hessian)
    [(hidden, wanted)] = next(task.batches)
    loud = replace(
        task,
        run=lambda hidden, weights: 2.0**20 * (hidden @ weights["linear"].T),
        batches=repeat([(hidden, 2.0**20 * wanted)]),
    )
    assert same_bytes(
        quantizer.quantize_layer(task)["linear"], quantizer.quantize_layer(loud)["linear"]
    )


@pytest.mark.parametrize("name", NAMES)
def test_outputs_that_overflow_are_refused(name: str) -> None:
    task = layer_task(random_weight(4, 64), SPEC, even_hessian(64))
    [(hidden, wanted)] = next(task.batches)
    task = replace(task, batches=repeat([(hidden * 1e30, wanted * 1e30)]))
    with pytest.raises(RilqError, match=f"{name}: the layer's error is not finite at update 0"):
        LayerQuantizer(name, "lsq", 3).quantize_layer(task)


def test_rate_warms_up_and_falls_to_zero() -> None:
    rates = [rate_at(step, 100) for step in range(101)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0], abs=0.01)
    assert rates[5:] == sorted(rates[5:], reverse=True) and rates[100] == 0
    assert rate_at(0, 1) == 1
