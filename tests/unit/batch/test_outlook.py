"""The plans of several jobs, merged."""

import pytest

from rilq.batch.outlook import Need, Outlook, check_disks, check_memory, merge
from rilq.errors import OptionError, OutputError


def outlook(
    *needs: Need, device: str = "cpu", seconds: float = 10, host_bytes: int = 3, devices: int = 0
) -> Outlook:
    return Outlook("new", device, devices, seconds, host_bytes, 10, needs)


def need(size: int, shared: str, *, lasting: bool = True, device: int = 1) -> Need:
    return Need(device, f"/volume{device}", shared, lasting, size, 100)


def test_outputs_add_up_downloads_count_once_and_work_folders_as_many_as_run_at_once() -> None:
    jobs = {
        name: outlook(need(5, f"output {name}"), need(30, "model"), need(work, "w", lasting=False))
        for name, work in (("a", 7), ("b", 1), ("c", 9))
    }
    assert [v.needed for v in merge(jobs, 1).volumes] == [3 * 5 + 30 + 9]
    assert [v.needed for v in merge(jobs, 2).volumes] == [3 * 5 + 30 + 9 + 7]
    assert [v.needed for v in merge(jobs, 9).volumes] == [3 * 5 + 30 + 9 + 7 + 1]


def test_each_volume_is_counted_and_the_full_one_is_named() -> None:
    jobs = {
        "a": outlook(need(60, "a"), need(20, "x", device=2)),
        "b": outlook(need(60, "b"), need(20, "y", device=2)),
    }
    merged = merge(jobs, 1)
    assert [(v.folder, v.needed) for v in merged.volumes] == [("/volume1", 120), ("/volume2", 40)]
    with pytest.raises(OutputError, match="/volume1: 120 B needed for 2 jobs, 100 B free"):
        check_disks(merged)


def test_memory_of_jobs_that_run_at_once_must_fit_together() -> None:
    jobs = {name: outlook(host_bytes=4) for name in "abc"}
    check_memory(merge(jobs, 2))
    with pytest.raises(OptionError, match="--max-parallel 3: 12 B of host memory needed"):
        check_memory(merge(jobs, 3))


def test_jobs_on_gpus_run_side_by_side_and_those_on_a_cpu_share_it() -> None:
    on_cpu = {name: outlook(seconds=10) for name in "abc"}
    assert merge(on_cpu, 3).seconds == 30
    on_gpu = {n: outlook(seconds=10, device="cuda", devices=2, host_bytes=1) for n in "abc"}
    assert merge(on_gpu, 1).seconds == 30
    assert merge(on_gpu, 2).seconds == 20
    assert merge(on_gpu, 3).seconds == 20  # there are two GPUs


def test_nothing_to_do_needs_nothing() -> None:
    nothing = merge({}, 2)
    check_disks(nothing)
    check_memory(nothing)
    assert nothing.seconds == 0 and nothing.volumes == ()
