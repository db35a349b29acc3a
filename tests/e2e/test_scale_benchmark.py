"""benchmarks/scale.py: its GPU part runs to its end on a CPU; a plan holds what it measures."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPT = BENCHMARKS / "scale.py"

TRAINED = (
    *("--layer-steps", "2", "--steps", "2", "--val-every", "2", "--rank", "8"),
    *("--batch-size", "8"),
)
ADAPTERS = (*TRAINED, "--quantizer", "gptq", "--train", "adapters")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hidden", "layers", "options"),
    [
        (512, 3, (*TRAINED, "--micro-batch", "1")),
        (512, 3, (*TRAINED, "--micro-batch", "8")),
        (512, 3, (*ADAPTERS, "--micro-batch", "8")),
        (256, 24, (*ADAPTERS, "--micro-batch", "2", "--student", "packed")),
    ],
    ids=["blockap in rows", "blockap in batches", "adapters in batches", "many narrow layers"],
)
def test_memory_and_disk_are_what_the_plan_said(
    hidden: int, layers: int, options: tuple[str, ...], tmp_path: Path
) -> None:
    """Resident memory above that of a process which has imported everything."""
    told = json.loads(in_process(MEASURE, str(tmp_path), str(hidden), str(layers), *options))
    assert 0.97 < told["planned"] / told["resident"] < 1.2
    assert 1.0 <= told["planned_disk"] / told["disk"] < 1.15


# In a process of its own, because the benchmark's modules have names of their own at the top level.
MEASURE = """
import json, sys
from pathlib import Path
from scale import IMPORTS
from scale_checkpoint import llama_config, write_checkpoint
from scale_run import convert, watch

folder, hidden, layers, options = Path(sys.argv[1]), *map(int, sys.argv[2:4]), sys.argv[4:]
write_checkpoint(folder / "model", llama_config(hidden, layers, positions=128), 2 * 32 * 128)
imports = watch([sys.executable, "-c", IMPORTS])
took = convert(folder / "model", folder / "out", *options, rows=32, seqlen=128)
plan = took.told["plan"]
print(json.dumps({
    "resident": took.resident_bytes - imports.resident_bytes, "planned": plan["host_bytes"],
    "disk": took.disk_bytes, "planned_disk": sum(disk["needed"] for disk in plan["disks"]),
}))
"""


def in_process(code: str, *arguments: str) -> str:
    """What Python code prints, run in the benchmarks' folder."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=BENCHMARKS)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_gpu_part_times_every_stage_and_tier_when_dry(tmp_path: Path) -> None:
    told = tmp_path / "told.json"
    command = [sys.executable, str(SCRIPT), "--gpu", "--dry", "--json", str(told)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(told.read_text())
    assert results["dry"] and results["machine"]["date"]
    stages = {"read", "teacher", "hessians", "quantize", "student", "write"}
    for one in results["passes"]:
        assert all(one[f"{stage}_s"] > 0 for stage in stages)
    assert {step["tier"] for step in results["steps"]} == {"dense", "packed", "offload"}
    assert not [step for step in results["steps"] if "failed" in step]
    assert all(math.isfinite(value) for value in results["rates"].values())
