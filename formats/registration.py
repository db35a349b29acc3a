"""`import rilq` makes the native format known to transformers, without importing transformers.

Importing torch and transformers takes seconds, and `rilq --help` must not wait for them. So a
module of ours is imported right after the module of theirs that it extends: now, if that one is
loaded already, else as soon as anybody imports it.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# Their module -> ours, imported just after it.
FOLLOWERS = {
    "transformers.quantizers.auto": ("rilq.formats.native", "rilq.formats.resq.loading"),
    "peft.tuners.tuners_utils": ("rilq.formats.peft_guard",),
    "peft.utils.transformers_weight_conversion": ("rilq.formats.peft_experts",),
}


class FollowingFinder(MetaPathFinder):
    """Finds nothing itself; adds one step to the loading of the modules in `FOLLOWERS`."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that the other finders give, its loader importing the follower at the end."""
        if name not in FOLLOWERS:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_then_follow(module: ModuleType) -> None:
            execute(module)
            _follow(name)

        spec.loader.exec_module = execute_then_follow  # type: ignore[method-assign]
        return spec


def _follow(name: str) -> None:
    for follower in FOLLOWERS[name]:
        importlib.import_module(follower)


def install() -> None:
    """Import the followers of what is loaded, and arrange for the others; harmless if repeated."""
    for name in FOLLOWERS:
        if name in sys.modules:
            _follow(name)
    if not any(isinstance(finder, FollowingFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, FollowingFinder())
