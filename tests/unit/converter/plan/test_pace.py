"""What the plan's time rests on: kernels timed on pieces of the model's own shapes."""

import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from llama_70b import write_70b

from rilq.converter.layers import StreamedModel
from rilq.converter.machine import Machine, measure_machine
from rilq.converter.options import ConvertOptions
from rilq.converter.plan import make_plan, pieces
from rilq.converter.plan.pace import Pace, Work, measure_pace
from rilq.converter.resq.pace import measure_resq_pace
from rilq.converter.resq.sizes import parts_spec
from rilq.formats.spec import QuantSpec

SPEC = QuantSpec(2, 64)
LLAMA_70B = {((8192, 8192), SPEC): 160, ((1024, 8192), SPEC): 160,
             ((28672, 8192), SPEC): 160, ((8192, 28672), SPEC): 80}  # fmt: skip
WORK = Work(LLAMA_70B, tokens=1024, step_tokens=512, tier="packed", recompute=True,
            trains_scales=True)  # fmt: skip
GPTQ = ConvertOptions(model="70b", quantizer="gptq", clip="none")


@pytest.fixture(scope="module")
def streamed(tmp_path_factory: pytest.TempPathFactory) -> StreamedModel:
    """The headers of LLaMA-2-70B."""
    return write_70b(tmp_path_factory.mktemp("70b"))


@pytest.fixture(scope="module")
def machine() -> Machine:
    """This one's CPU."""
    return measure_machine("cpu")


def test_70b_is_timed_within_seconds(machine: Machine, streamed: StreamedModel) -> None:
    begun = time.thread_time()
    pace = measure_pace(WORK, GPTQ, machine, streamed.checkpoint)
    assert time.thread_time() - begun < 4
    # 137 GFLOP for each token: no processor does it in a millisecond, nor needs ten minutes.
    assert 1e-3 < pace.token < 600
    assert 0.5 < pace.student_token / pace.token < 5  # it dequantizes, for fewer tokens at once
    assert pace.step_token > 1.5 * pace.student_token
    assert pace.quantize > 0 and pace.prepare > 0 and pace.hessian_token > 0


def test_each_linear_takes_its_time(
    machine: Machine, streamed: StreamedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def a_second(work: Callable[[], object], _device: torch.device, calls: int = 3) -> float:
        work()
        return 1.0

    monkeypatch.setattr(pieces, "seconds_of", a_second)
    shape = ((512, 512), SPEC)
    one, many = (
        measure_pace(replace(WORK, linears={shape: n}), GPTQ, machine, streamed.checkpoint)
        for n in (1, 20)
    )
    assert many.token == pytest.approx(20 * one.token)
    assert many.prepare == pytest.approx(20 * one.prepare)
    assert many.quantize == pytest.approx(20 * one.quantize)


@pytest.mark.parametrize("quantizer", ["lwc", "signround", "blockap"])
def test_of_a_quantizer_that_is_trained_start_and_update_are_timed(
    quantizer: str, machine: Machine, streamed: StreamedModel
) -> None:
    options = ConvertOptions(model="70b", quantizer=quantizer)
    work = replace(WORK, linears={((256, 256), SPEC): 1})
    pace = measure_pace(work, options, machine, streamed.checkpoint)
    assert pace.prepare == pace.hessian_token == pace.alternatives == 0
    assert pace.quantize > 0 and pace.update > 0
    many = replace(options, layer_steps=10_000)  # `update` is one of them, whatever there are
    again = measure_pace(work, many, machine, streamed.checkpoint)
    assert 0.1 < again.update / pace.update < 10


@pytest.mark.parametrize("quantizer", ["rtn", "gptq", "lsq", "blockap"])
def test_alternatives_and_kinds_of_zero_point_are_timed_where_they_are_asked_for(
    quantizer: str, machine: Machine, streamed: StreamedModel
) -> None:
    options = ConvertOptions(model="70b", quantizer=quantizer)
    work = replace(WORK, linears={((128, 256), SPEC): 1})
    plain, average, kept = (
        measure_pace(work, asked, machine, streamed.checkpoint)
        for asked in (
            options,
            replace(options, avg_bits=2.5),
            replace(options, keep_adapter=True, zero_point="integer"),
        )
    )
    assert plain.alternatives == kept.alternatives == plain.compared == average.compared == 0
    assert average.alternatives > 0 and kept.compared > 0


def test_nothing_is_timed_of_a_training_that_will_not_be(
    machine: Machine, streamed: StreamedModel
) -> None:
    work = replace(WORK, linears={((256, 256), SPEC): 1})
    pace = measure_pace(work, replace(GPTQ, rank=0, train="none"), machine, streamed.checkpoint)
    assert pace.student_token == pace.step_token == 0 < pace.token


@pytest.mark.parametrize("method", ["resq", "rtn-w4a4"])
def test_of_resq_linears_that_quantize_their_input_are_timed(
    method: str, machine: Machine, streamed: StreamedModel
) -> None:
    options = ConvertOptions.of_recipe("default", model="70b", method=method)
    assert options.resq is not None
    shapes = {"q_proj": (512, 8192), "o_proj": (512, 8192), "down_proj": (512, 28672)}
    linears = {
        (shape, parts_spec(options.resq, streamed.config, name, shape[1])): 1
        for name, shape in shapes.items()
    }
    work = replace(WORK, linears=linears)
    pace = measure_resq_pace(work, options, machine, streamed.checkpoint)
    assert pace.passing_token is not None and pace.passing_token > pace.token
    assert pace.quantize > 0
    assert (pace.hessian_token > 0) == (pace.prepare > 0) == (method == "resq")


def test_nothing_but_the_time_of_a_plan_depends_on_the_pace(
    machine: Machine, streamed: StreamedModel
) -> None:
    asked: list[Work] = []

    def slow(work: Work, *_: object) -> Pace:
        asked.append(work)
        return Pace(token=1.0, step_token=3.0, prepare=1.0)

    machine = replace(machine, host_free=64 * 10**9, dtype=torch.bfloat16)
    options = replace(GPTQ, nsamples=16, student="offload")
    plain, timed = (make_plan(streamed, options, machine, m) for m in (lambda *_: Pace(), slow))
    assert sum(asked[0].linears.values()) == 80 * 7 and asked[0].tier == "offload"
    assert timed.seconds > 1000 * 16  # two seconds and more for each of 16 x 512 tokens
    same = dict(seconds=plain.seconds, time_basis=plain.time_basis, disks=plain.disks)
    assert replace(timed, **same) == plain  # but for the disk's free bytes at two moments
    assert [d.needed for d in timed.disks] == [d.needed for d in plain.disks]
