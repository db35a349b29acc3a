"""What a record says of the machine."""

from __future__ import annotations

import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch


def machine_facts() -> dict[str, Any]:
    """Processor, cores, threads, memory, GPUs and system; nothing that says whose machine it is."""
    facts: dict[str, Any] = {
        "system": platform.platform(),
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
    }
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        facts["gpus"] = [{"name": c.name, "memory_bytes": c.total_memory} for c in cards]
    return facts


def _processor() -> str:
    """The processor's name; Python knows it on some systems only."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
