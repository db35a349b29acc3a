"""What the plan decides from a machine's figures, without that machine."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rilq.converter.layers import StreamedModel
from rilq.converter.machine import Machine
from rilq.converter.options import ConvertOptions
from rilq.converter.plan import GPU_TOKENS, STREAM_TOKENS, Plan, make_plan
from rilq.formats.checkpoint import Checkpoint
from rilq.formats.source import LocalFolder

SEQLEN = 64
GPU = Machine(torch.device("cuda"), torch.bfloat16, 64 << 30, 80 << 30, 1e15, 3e12, "a large GPU")


@pytest.fixture
def plan(tiny_llama: Path, tmp_path: Path) -> Callable[..., Plan]:
    """`plan(machine, **options)` of tiny_llama."""
    streamed = StreamedModel(
        Checkpoint.open(LocalFolder(tiny_llama)), dtype=torch.bfloat16, device=torch.device("meta")
    )

    def make(machine: Machine, **options: int | str) -> Plan:
        asked = ConvertOptions(
            str(tiny_llama), seqlen=SEQLEN, output_dir=tmp_path / "out", **options
        )
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
    cpu = replace(GPU, device=torch.device("cpu"), device_free=None)
    for free in (64 << 30, 1 << 30):
        choices = plan(replace(cpu, host_free=free)).choices
        assert choices.batch_rows * SEQLEN == STREAM_TOKENS


def test_rows_that_were_asked_for_are_taken(plan: Callable[..., Plan]) -> None:
    choices = plan(GPU, micro_batch=5, batch_size=16).choices
    assert (choices.batch_rows, choices.micro_batch) == (5, 5)
