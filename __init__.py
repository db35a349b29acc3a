"""rilq: stream a checkpoint into 2 bits and win the accuracy back.

After `import rilq`, `transformers.AutoModelForCausalLM.from_pretrained` loads native checkpoints.
What else there is, docs/api.md tells; torch is imported with the first use of it.
"""

import importlib
from typing import TYPE_CHECKING, Any

from rilq.formats.registration import install

if TYPE_CHECKING:
    from rilq.api import convert as convert
    from rilq.api import evaluate as evaluate
    from rilq.api import plan as plan
    from rilq.converter.analysis import AnalyzeOptions as AnalyzeOptions
    from rilq.converter.analyze import analyze as analyze
    from rilq.converter.options import ConvertOptions as ConvertOptions
    from rilq.converter.plan import check_fits as check_fits
    from rilq.errors import InputError as InputError
    from rilq.errors import RilqError as RilqError
    from rilq.evaluation.compare import compare as compare
    from rilq.evaluation.export import export as export
    from rilq.evaluation.push import PushOptions as PushOptions
    from rilq.evaluation.push import push as push
    from rilq.evaluation.whole import load as load
    from rilq.formats.export.kind import ExportOptions as ExportOptions
    from rilq.formats.verify import verify as verify
    from rilq.progress import LogReporter as LogReporter
    from rilq.progress import Reporter as Reporter
    from rilq.progress import RichReporter as RichReporter
    from rilq.progress import SilentReporter as SilentReporter

__version__ = "0.1.0"

# Name -> the module it comes from, imported when the name is first used.
_HOMES = {
    "AnalyzeOptions": "rilq.converter.analysis",
    "ConvertOptions": "rilq.converter.options",
    "ExportOptions": "rilq.formats.export.kind",
    "InputError": "rilq.errors",
    "LogReporter": "rilq.progress",
    "PushOptions": "rilq.evaluation.push",
    "Reporter": "rilq.progress",
    "RichReporter": "rilq.progress",
    "RilqError": "rilq.errors",
    "SilentReporter": "rilq.progress",
    "analyze": "rilq.converter.analyze",
    "check_fits": "rilq.converter.plan",
    "compare": "rilq.evaluation.compare",
    "convert": "rilq.api",
    "evaluate": "rilq.api",
    "export": "rilq.evaluation.export",
    "load": "rilq.evaluation.whole",
    "plan": "rilq.api",
    "push": "rilq.evaluation.push",
    "verify": "rilq.formats.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rilq' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


install()
