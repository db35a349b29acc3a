"""Which GPU a job gets."""

import pytest

from rilq.batch.local_engine import device_for, visible_devices


@pytest.mark.parametrize(
    ("wanted", "taken", "device"),
    [
        ("cpu", ["0", "1"], ""),
        ("cuda", [], "0"),
        ("cuda", ["0"], "1"),
        ("cuda", ["0", "1"], None),
        ("cuda:1", ["0"], "1"),
        ("cuda:1", ["1"], None),
        ("cuda:7", [], ""),  # there is none; the job says so itself
    ],
)
def test_a_job_gets_a_gpu_that_no_other_has(
    wanted: str, taken: list[str], device: str | None
) -> None:
    assert device_for(wanted, ["0", "1"], taken) == device


def test_gpus_are_those_that_the_environment_leaves() -> None:
    assert visible_devices(2, {}) == ["0", "1"]
    assert visible_devices(2, {"CUDA_VISIBLE_DEVICES": "3, GPU-5f"}) == ["3", "GPU-5f"]
    assert visible_devices(0, {"CUDA_VISIBLE_DEVICES": ""}) == []
