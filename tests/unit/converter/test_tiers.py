"""Which tier the plan chooses, and its arithmetic, at the shapes of LLaMA-2-70B."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from llama_70b import GROUPS, LAYERS, WEIGHTS, write_70b

from rilq.converter.layers import StreamedModel
from rilq.converter.machine import Machine
from rilq.converter.options import ConvertOptions
from rilq.converter.plan import Plan, make_plan
from rilq.converter.plan.pace import Pace
from rilq.converter.tiers import pinned_bytes

GB = 10**9


@pytest.fixture(scope="module")
def streamed(tmp_path_factory: pytest.TempPathFactory) -> StreamedModel:
    """The headers of LLaMA-2-70B."""
    return write_70b(tmp_path_factory.mktemp("70b"))


@pytest.fixture
def planned(streamed: StreamedModel, tmp_path: Path) -> Callable[..., Plan]:
    """`planned(device GB or None, **options)` on a machine with 64 GB of host memory."""

    def plan(device_gb: float | None, **options: object) -> Plan:
        asked = dict(quantizer="rtn", nsamples=256, batch_size=8, output_dir=tmp_path / "out")
        device = torch.device("cpu" if device_gb is None else "cuda")
        free = None if device_gb is None else int(device_gb * GB)
        machine = Machine(device, torch.bfloat16, 64 * GB, free, 1e12, 1e11, "made up")
        options = {**asked, **options}
        asked = ConvertOptions(model="70b", **options)  # type: ignore[arg-type]
        return make_plan(streamed, asked, machine, lambda *_: Pace())

    return plan


@pytest.mark.parametrize(
    ("device_gb", "tier"), [(250, "dense"), (80, "packed"), (48, "packed"), (24, "offload")]
)
def test_the_first_tier_that_fits_is_chosen(
    device_gb: float, tier: str, planned: Callable[..., Plan]
) -> None:
    assert planned(device_gb, train="adapters").choices.student == tier


def test_70b_fits_24_gb_offloaded_with_its_layers_in_host_memory(
    planned: Callable[..., Plan],
) -> None:
    plan = planned(24, train="adapters")
    assert plan.device_bytes is not None and plan.device_bytes <= 22 * GB
    packed = LAYERS * (WEIGHTS / 4 + 4 * GROUPS)  # 2 bits, and two float16 for each group
    assert 21e9 < packed < 22e9
    assert packed < plan.host_bytes < 1.25 * packed


def test_trained_scales_are_in_host_memory_with_their_state(planned: Callable[..., Plan]) -> None:
    adapters, scales = (planned(24, train=t) for t in ("adapters", "adapters+scales"))
    assert scales.choices.student == "offload"
    assert adapters.device_bytes is not None and scales.device_bytes is not None
    # A layer's scales in two slots, its gradients, and work space: nothing for all layers.
    assert scales.device_bytes - adapters.device_bytes < 1 * GB
    more = scales.host_bytes - adapters.host_bytes
    state = 5 * 4 * LAYERS * GROUPS  # scales, gradients, two moments, the best: 21 GB
    assert state < more < 1.15 * state  # pinned blocks have sizes of powers of two
    assert scales.host_bytes < 56 * GB


def test_an_offloaded_student_on_a_cpu_needs_no_memory_for_its_layers(
    planned: Callable[..., Plan],
) -> None:
    offload, packed = (planned(None, train="adapters", student=t) for t in ("offload", "packed"))
    assert packed.host_bytes - offload.host_bytes > 0.95 * LAYERS * (WEIGHTS / 4 + 4 * GROUPS)


def test_trained_codes_are_never_offloaded(planned: Callable[..., Plan]) -> None:
    assert planned(24, train="all+codes").choices.student == "packed"


@pytest.mark.parametrize(("nbytes", "block"), [(0, 0), (1, 1), (4 << 20, 4 << 20), (5, 8)])
def test_pinned_blocks_have_sizes_of_powers_of_two(nbytes: int, block: int) -> None:
    assert pinned_bytes(nbytes) == block
