"""What a job asks of a node of a Ray cluster."""

import pytest

from rilq.batch.outlook import Need, Outlook
from rilq.batch.ray_engine import Demand, demand

CPU_NODE = {"CPU": 8.0, "memory": 100.0}
GPU_NODE = {"CPU": 32.0, "memory": 100.0, "GPU": 4.0}
NEEDS = (Need(1, "/a", "x", True, 30, 100), Need(2, "/b", "y", False, 12, 100))
OUTLOOK = Outlook("new", "cpu", 0, 10, 70, 100, NEEDS)


@pytest.mark.parametrize(
    ("device", "nodes", "threads", "cpus", "gpus"),
    [
        ("cpu", [CPU_NODE, GPU_NODE], "", 8, 0),
        ("auto", [CPU_NODE, GPU_NODE], "", 1, 1),
        ("auto", [CPU_NODE, {"memory": 9.0}], "", 8, 0),  # a head that runs no tasks
        ("cuda", [CPU_NODE], "", 1, 1),
        ("cpu", [CPU_NODE], "3", 3, 0),
        ("cuda", [GPU_NODE], "3", 3, 1),
        ("cpu", [CPU_NODE], "many", 8, 0),
    ],
)
def test_a_job_asks_for_a_gpu_if_it_wants_one_and_for_the_threads_it_will_have(
    device: str, nodes: list[dict[str, float]], threads: str, cpus: int, gpus: int
) -> None:
    asked = demand(device, OUTLOOK, nodes, {"OMP_NUM_THREADS": threads})
    assert asked == Demand(cpus, gpus, memory=70, disk=0)


def test_disk_is_asked_for_where_a_node_says_how_much_it_has() -> None:
    disk = {**CPU_NODE, "disk": 42.0}
    asked = demand("cpu", OUTLOOK, [CPU_NODE, disk], {})
    assert asked.disk == 42 and asked.fits(disk) and not asked.fits(CPU_NODE)
    assert not asked.fits({**disk, "disk": 41.0})


def test_a_node_needs_all_that_a_job_asks_for() -> None:
    asked = demand("cuda", OUTLOOK, [GPU_NODE], {"OMP_NUM_THREADS": "8"})
    assert asked.fits(GPU_NODE)
    for lacking in ({"CPU": 7.0}, {"GPU": 0.0}, {"memory": 69.0}):
        assert not asked.fits({**GPU_NODE, **lacking})
