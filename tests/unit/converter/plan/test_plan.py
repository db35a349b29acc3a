"""What the plan decides from a machine's figures, without that machine."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mixture_examples import MIXTURES

from rilq.converter.layers import StreamedModel
from rilq.converter.machine import Machine
from rilq.converter.options import ConvertOptions
from rilq.converter.plan import GPU_TOKENS, STREAM_TOKENS, Plan, make_plan
from rilq.formats.checkpoint import Checkpoint
from rilq.formats.source import LocalFolder

SEQLEN = 64
GPU = Machine(torch.device("cuda"), torch.bfloat16, 64 << 30, 80 << 30, 1e15, 3e12, "a large GPU")
CPU = replace(GPU, device=torch.device("cpu"), device_free=None)


@pytest.fixture
def plan(tiny_llama: Path, tmp_path: Path) -> Callable[..., Plan]:
    """`plan(machine, **options)` of tiny_llama, or of another `model`."""

    def make(machine: Machine, model: Path = tiny_llama, **options: int | str) -> Plan:
        checkpoint = Checkpoint.open(LocalFolder(model))
        streamed = StreamedModel(checkpoint, dtype=torch.bfloat16, device=torch.device("meta"))
        asked = ConvertOptions(str(model), seqlen=SEQLEN, output_dir=tmp_path / "out", **options)
        return make_plan(streamed, asked, machine)

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


def test_rows_that_were_asked_for_are_taken(plan: Callable[..., Plan]) -> None:
    choices = plan(GPU, micro_batch=5, batch_size=16).choices
    assert (choices.batch_rows, choices.micro_batch) == (5, 5)


def test_experts_one_by_one_take_more_rows_and_less_memory(
    plan: Callable[..., Plan], make_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Each batch reads every expert again, and none is read ahead."""
    many = {**MIXTURES["qwen3_moe"], "num_experts": 32}
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
