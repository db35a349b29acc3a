"""What a conversion will do and need; pure, printable, made before anything is touched.

Memory and disk figures are upper bounds, from shapes alone. The time is an estimate, and says what
it is based on.
"""

from rilq.converter.plan.choose import GPU_TOKENS, STREAM_TOKENS
from rilq.converter.plan.disks import DOWNLOADS, WORK
from rilq.converter.plan.linears import LinearPlan, adapter_spec
from rilq.converter.plan.make import make_plan
from rilq.converter.plan.memory import FIXED, process_bytes
from rilq.converter.plan.pace import Measure, measure_pace
from rilq.converter.plan.plan import Choices, Disk, Plan, check_fits

__all__ = [
    "DOWNLOADS",
    "FIXED",
    "GPU_TOKENS",
    "STREAM_TOKENS",
    "WORK",
    "Choices",
    "Disk",
    "LinearPlan",
    "Measure",
    "Plan",
    "adapter_spec",
    "check_fits",
    "make_plan",
    "measure_pace",
    "process_bytes",
]
