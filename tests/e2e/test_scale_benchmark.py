"""`benchmarks/scale.py --gpu --dry`: the GPU's part runs to its end on a CPU, in small."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "scale.py"


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
