"""What the plan decides from a machine's figures, without that machine."""

import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from mixture_examples import MIXTURES

from rilq.converter import machine as machine_module
from rilq.converter.layers import StreamedModel
from rilq.converter.machine import LARGE_BLOCK, SMALL_BLOCK, Machine
from rilq.converter.options import ConvertOptions
from rilq.converter.pipeline import prepare
from rilq.converter.plan import GPU_TOKENS, STREAM_TOKENS, Plan, make_plan
from rilq.converter.plan.pace import Pace
from rilq.converter.ranks import Ranks
from rilq.formats.checkpoint import Checkpoint
from rilq.formats.source import LocalFolder
from rilq.progress import SilentReporter

SEQLEN = 64
GPU = Machine(torch.device("cuda"), torch.bfloat16, 64 << 30, 80 << 30, 1e15, 3e12, "a large GPU")
CPU = replace(GPU, device=torch.device("cpu"), device_free=None)
NOTHING = Pace()  # as if quantized linears took no time
ENDLESS = 1e40  # operations, or bytes, per second: as if nothing else took any


@pytest.fixture
def plan(tiny_llama: Path, tmp_path: Path) -> Callable[..., Plan]:
    """`plan(machine, **options)` of tiny_llama or another `model`, by one process or several."""

    def make(
        machine: Machine,
        model: Path = tiny_llama,
        pace: Pace = NOTHING,
        processes: int = 1,
        measured: Callable[[], object] = lambda: None,
        **options: int | str,
    ) -> Plan:
        checkpoint = Checkpoint.open(LocalFolder(model))
        streamed = StreamedModel(checkpoint, dtype=torch.bfloat16, device=torch.device("meta"))
        asked = ConvertOptions(str(model), seqlen=SEQLEN, output_dir=tmp_path / "out", **options)

        def measure(*_: object) -> Pace:
            measured()
            return pace

        return make_plan(streamed, asked, machine, measure, processes=processes)

    return make


def test_a_gpu_runs_as_many_rows_at_once_as_its_memory_holds(plan: Callable[..., Plan]) -> None:
    large = plan(GPU)
    assert large.choices.batch_rows * SEQLEN == GPU_TOKENS
    needed = large.device_bytes or 0
    small = plan(replace(GPU, device_free=int(needed / 0.8) - (8 << 20)))
    assert 1 <= small.choices.batch_rows < large.choices.batch_rows
    assert (small.device_bytes or 0) <= 0.8 * (needed / 0.8)
    none = plan(replace(GPU, device_free=1 << 20))
    assert none.choices.batch_rows == 1  # and check_fits will refuse it


def test_a_cpu_runs_the_same_rows_whatever_its_memory(plan: Callable[..., Plan]) -> None:
    for free in (64 << 30, 1 << 30):
        choices = plan(replace(CPU, host_free=free)).choices
        assert choices.batch_rows * SEQLEN == STREAM_TOKENS


@pytest.mark.parametrize(("tier", "block"), [("packed", LARGE_BLOCK), ("offload", SMALL_BLOCK)])
def test_kernels_are_timed_while_blocks_are_returned_as_in_the_conversion(
    tier: str, block: int, plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    monkeypatch.setattr(machine_module, "_return_blocks_from", told.append)
    plan(CPU, student=tier, measured=lambda: told.append(0))
    assert told[told.index(0) - 1] == block


def test_memory_is_for_what_a_quantizer_does(
    plan: Callable[..., Plan], make_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Only gptq factors Hessians, lsq sums them, rtn and hqq look at none."""
    model = make_model(tmp_path / "wide", "llama", hidden_size=64, intermediate_size=4096)
    asked = {"model": model, "rank": 0, "group_size": 32, "batch_size": 1}
    rtn, hqq, lsq, gptq = (
        plan(CPU, quantizer=name, **asked).host_bytes for name in ("rtn", "hqq", "lsq", "gptq")
    )
    sums = 4 * 4096**2
    assert rtn == hqq
    assert lsq - rtn > 0.8 * sums
    assert gptq - lsq > sums


def test_rows_that_were_asked_for_are_taken(plan: Callable[..., Plan]) -> None:
    choices = plan(GPU, micro_batch=5, batch_size=16).choices
    assert (choices.batch_rows, choices.micro_batch) == (5, 5)


def test_disk_is_for_files_beside_the_tensors_and_for_the_rows(
    plan: Callable[..., Plan], tiny_llama: Path, tmp_path: Path
) -> None:
    def needed(model: Path, rows: int) -> int:
        return sum(disk.needed for disk in plan(CPU, model, train="none", nsamples=rows).disks)

    large = shutil.copytree(tiny_llama, tmp_path / "large")
    with (large / "tokenizer.json").open("a") as file:
        file.write(" " * 50_000_000)  # of a large vocabulary there are as many
    assert 49e6 < needed(large, 16) - needed(tiny_llama, 16) <= 50e6
    (large / "weights.bin").write_bytes(bytes(1000))  # is not copied
    hidden = 2 * 64  # bytes of a token, in bfloat16
    assert needed(large, 32) - needed(large, 16) == 16 * SEQLEN * (8 + 2 * hidden)


def test_experts_one_by_one_take_more_rows_and_less_memory(
    plan: Callable[..., Plan], make_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Each batch reads every expert again, and none is read ahead."""
    many = {**MIXTURES["qwen3_moe"], "num_experts": 64, "moe_intermediate_size": 256}
    source = make_model(tmp_path / "source", "qwen3_moe", **many)
    asked = {"model": source, "quantizer": "rtn", "rank": 0, "group_size": 32}
    for machine, most in ((GPU, 2), (CPU, 16)):
        whole, apart = (plan(machine, expert_memory=m, **asked) for m in ("1GB", "1kB"))
        assert (whole.choices.experts_apart, apart.choices.experts_apart) == (False, True)
        assert apart.choices.batch_rows == most * whole.choices.batch_rows
        same = plan(machine, expert_memory="1kB", **asked, micro_batch=whole.choices.batch_rows)
        given = plan(machine, expert_memory="1GB", **asked, micro_batch=whole.choices.batch_rows)
        assert same.host_bytes < given.host_bytes
    tight = replace(CPU, host_free=int(apart.host_bytes / 0.8) - (8 << 20))
    fewer = plan(tight, expert_memory="1kB", **asked)
    assert fewer.choices.batch_rows < apart.choices.batch_rows
    assert fewer.host_bytes <= 0.8 * tight.host_free


def test_a_dense_mlp_that_a_mixture_names_but_has_not_is_not_counted(
    plan: Callable[..., Plan], make_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Qwen3-MoE's config.json has an `intermediate_size` where all layers have experts."""
    planned = []
    for width in (256, 4096):
        sizes = {**MIXTURES["qwen3_moe"], "intermediate_size": width}
        source = make_model(tmp_path / str(width), "qwen3_moe", **sizes)
        planned.append(plan(CPU, source, quantizer="rtn", rank=0, group_size=32))
    assert planned[0].parameters == planned[1].parameters
    assert planned[0].host_bytes == planned[1].host_bytes


# -- several processes -----------------------------------------------------------------------------


@pytest.fixture
def added(plan: Callable[..., Plan]) -> Callable[..., float]:
    """`added(processes, bandwidth, **given)`: seconds that a pace, or an option, adds to a plan."""

    def seconds(processes: int, bandwidth: float, **given: float | str | bool) -> float:
        machine = replace(CPU, flops=ENDLESS, bandwidth=bandwidth)
        pace = {name: given.pop(name) for name in list(given) if name in asdict(NOTHING)}
        plain = dict(quantizer="gptq", clip="none", nsamples=16, val_ratio=0.25, batch_size=4)
        without, whole = (
            plan(machine, pace=replace(NOTHING, **paced), processes=processes, **options).seconds
            for paced, options in (({}, plain), (pace, plain | given))
        )
        return whole - without

    return seconds


@pytest.mark.parametrize(
    "shared", ["token", "student_token", "step_token", "hessian_token", "quantize"]
)
def test_processes_share_what_is_done_row_by_row(shared: str, added: Callable[..., float]) -> None:
    one, four = (added(n, ENDLESS, **{shared: 1.0}) for n in (1, 4))
    assert one > 0
    assert four == pytest.approx(one / 4)


@pytest.mark.parametrize(
    "alike",
    [
        dict(prepare=1.0),  # the same Hessians
        dict(rotate=True),
        dict(compared=1.0),  # both kinds of zero-point
        dict(head_bits=8),
        dict(rank=32),  # and not 16: more values to update
    ],
    ids=lambda alike: next(iter(alike)),
)
def test_processes_do_not_share_what_each_of_them_does(
    alike: dict[str, float | str | bool], added: Callable[..., float]
) -> None:
    one, four = (added(n, 1e9, **alike) for n in (1, 4))
    assert one > 0
    assert four == pytest.approx(one)


def test_processes_share_the_search_for_alternatives_and_not_their_gains(
    added: Callable[..., float],
) -> None:
    gains = [
        added(n, ENDLESS, token=1.0, avg_bits=2.5) - added(n, ENDLESS, token=1.0) for n in (1, 4)
    ]
    assert gains[0] > 0
    assert gains[1] == pytest.approx(gains[0])
    one, four = (added(n, ENDLESS, alternatives=1.0) for n in (1, 4))
    assert four == pytest.approx(one / 4)


def test_each_process_rounds_all_weights_in_every_update(added: Callable[..., float]) -> None:
    trained = dict(quantizer="blockap", batch_size=1)  # of which one process has the row
    few, more = (
        [added(n, ENDLESS, update=1.0, layer_steps=s, **trained) for n in (1, 4)]
        for s in (100, 200)
    )
    assert few[0] == few[1] == pytest.approx(100, rel=0.01)
    assert more[0] == more[1] == pytest.approx(200, rel=0.01)


def test_the_process_with_most_rows_is_waited_for(added: Callable[..., float]) -> None:
    one, two, four = (added(n, ENDLESS, step_token=1.0, batch_size=2) for n in (1, 2, 4))
    assert two == four == pytest.approx(one / 2)


@pytest.mark.parametrize("quantizer", ["gptq", "blockap"])
def test_nothing_but_the_time_of_a_plan_depends_on_processes(
    quantizer: str, plan: Callable[..., Plan]
) -> None:
    one, three = (plan(GPU, processes=n, quantizer=quantizer, batch_size=6) for n in (1, 3))
    assert one.seconds / 3 < three.seconds < one.seconds
    assert "3 processes" in three.time_basis and "processes" not in one.time_basis
    same = dict(seconds=one.seconds, time_basis=one.time_basis, disks=one.disks)
    assert replace(three, **same) == one  # but for the disk's free bytes at two moments


@pytest.mark.parametrize("method", ["rilq", "resq"])
def test_processes_of_a_launcher_are_planned_for(
    method: str, tiny_llama: Path, tmp_path: Path
) -> None:
    asked = {"model": str(tiny_llama), "device": "cpu", "output_dir": tmp_path / "out"}
    options = ConvertOptions.of_recipe("default", method=method, seqlen=SEQLEN, **asked)
    job = prepare(options, SilentReporter(), Ranks(index=1, count=2))
    assert "shared by 2 processes" in job.plan.time_basis
