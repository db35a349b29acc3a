"""What a conversion will do and need; pure, printable, made before anything is touched.

Memory and disk figures are upper bounds, from shapes alone. The time is an estimate, and says what
it is based on.
"""

from rilq.converter.plan.make import (
    DOWNLOADS,
    FIXED,
    GPU_TOKENS,
    STREAM_TOKENS,
    WORK,
    Choices,
    Disk,
    LinearPlan,
    Plan,
    check_fits,
    fixed_on_cpu,
    make_plan,
)
from rilq.converter.plan.pace import measure_pace

__all__ = [
    "DOWNLOADS",
    "FIXED",
    "GPU_TOKENS",
    "STREAM_TOKENS",
    "WORK",
    "Choices",
    "Disk",
    "LinearPlan",
    "Plan",
    "check_fits",
    "fixed_on_cpu",
    "make_plan",
    "measure_pace",
]
