"""The plan of ResQ: what its two passes read, hold and store, from a machine's figures."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rilq.converter.layers import StreamedModel
from rilq.converter.machine import Machine
from rilq.converter.options import ConvertOptions
from rilq.converter.plan import Plan
from rilq.converter.plan.pace import Pace
from rilq.converter.resq.plan import resq_plan
from rilq.errors import OptionError, UnsupportedArchitectureError
from rilq.formats.checkpoint import Checkpoint
from rilq.formats.source import LocalFolder

GPU = Machine(torch.device("cuda"), torch.bfloat16, 64 << 30, 80 << 30, 1e15, 3e12, "a large GPU")
NOTHING = Pace()  # as if quantized linears took no time
CPU = replace(GPU, device=torch.device("cpu"), device_free=None)


@pytest.fixture
def plan(tiny_llama: Path, tmp_path: Path) -> Callable[..., Plan]:
    """`plan(machine, method, **options)` of tiny_llama, or of another `model`."""

    def make(
        machine: Machine,
        method: str,
        model: Path = tiny_llama,
        processes: int = 1,
        pace: Pace = NOTHING,
        **given: object,
    ) -> Plan:
        checkpoint = Checkpoint.open(LocalFolder(model))
        streamed = StreamedModel(checkpoint, dtype=torch.bfloat16, device=torch.device("meta"))
        asked = {"model": str(model), "method": method, "seqlen": 64, "output_dir": tmp_path / "o"}
        options = ConvertOptions.of_recipe("default", **asked, **given)
        return resq_plan(streamed, options, machine, lambda *_: pace, processes=processes)

    return make


def test_methods_that_are_calibrated_read_the_checkpoint_twice(plan: Callable[..., Plan]) -> None:
    read = {name: plan(CPU, name).read_bytes for name in ("resq", "quik", "quarot", "rtn-w4a4")}
    assert read["resq"] == read["quik"] == 2 * read["quarot"] == 2 * read["rtn-w4a4"]


@pytest.mark.parametrize("machine", [GPU, CPU], ids=["gpu", "cpu"])
def test_two_passes_need_no_less_than_one(machine: Machine, plan: Callable[..., Plan]) -> None:
    two, one = plan(machine, "resq"), plan(machine, "quarot")
    assert two.seconds > one.seconds
    assert two.host_bytes >= one.host_bytes
    assert (two.device_bytes or 0) >= (one.device_bytes or 0)
    assert two.disks[0].needed > one.disks[0].needed
    assert sum(size for _, size in two.disks[0].parts) == two.disks[0].needed


def test_processes_share_the_rows_of_the_first_pass_and_each_rotates(
    plan: Callable[..., Plan],
) -> None:
    slow = replace(GPU, flops=1e8)
    first = [
        plan(slow, "resq", processes=n).seconds - plan(slow, "quarot", processes=n).seconds
        for n in (1, 2)
    ]
    assert first[1] == pytest.approx(first[0] / 2, rel=0.01)  # but for the eigenvectors
    instant = replace(GPU, flops=1e40, bandwidth=1e40)  # so the processors' rotating is left
    one, two = (plan(instant, "quarot", processes=n) for n in (1, 2))
    assert two.seconds == pytest.approx(one.seconds)
    assert "shared by 2 processes" in two.time_basis


def test_a_wide_model_needs_room_for_its_eigenvectors(
    plan: Callable[..., Plan], make_model: Callable[..., Path], tmp_path: Path
) -> None:
    wide = make_model(
        tmp_path / "wide", hidden_size=2048, intermediate_size=64, num_attention_heads=2,
        num_key_value_heads=1, num_hidden_layers=1,
    )  # fmt: skip
    least = 4 * 8 * 2048**2  # covariance, damped, eigenvectors, mixed: float64
    assert plan(GPU, "resq", wide).host_bytes > least
    assert plan(CPU, "resq", wide).host_bytes > least


def test_an_average_of_bits_is_that_of_the_parts(plan: Callable[..., Plan]) -> None:
    bits = plan(CPU, "resq", high_bits=6, lowest_bits=2).run_time_bits
    assert bits is not None
    assert bits.activation_bits == pytest.approx(4)
    assert plan(CPU, "rtn-w4a4").bits_per_weight == pytest.approx(4 + 16 / 73, abs=0.02)


def test_layers_that_are_trained_are_never_offloaded(plan: Callable[..., Plan]) -> None:
    small = replace(GPU, device_free=1 << 20)
    assert plan(small, "resq", rank=4).choices.student == "packed"


def test_a_part_without_a_channel_is_refused(plan: Callable[..., Plan]) -> None:
    with pytest.raises(OptionError, match="--high-fraction"):
        plan(CPU, "resq", high_fraction=0.01)


def test_an_architecture_that_it_is_not_for_is_refused(
    plan: Callable[..., Plan], make_model: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedArchitectureError, match="--method resq"):
        plan(CPU, "resq", make_model(tmp_path / "model", "gemma2"))
