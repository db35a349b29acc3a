"""Runs `rilq ARGUMENTS` and notes the most bytes that files in some folders had.

    python scale_disk.py RESULT FOLDER... -- ARGUMENTS

What files take shrinks only where one is deleted, replaced or cut, so it is enough to look right
before: nothing passes unseen, as it does between two looks from outside. RESULT is a JSON number.
"""

import json
import os
import runpy
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

SHRINKING = ("os.remove", "os.truncate", "shutil.rmtree")


def main() -> None:
    """Run the command in this process."""
    split = sys.argv.index("--")
    result, *folders = sys.argv[1:split]
    most, looking = 0, threading.local()

    def look() -> None:
        nonlocal most
        most = max(most, sum(map(_size, folders)))

    def seen(event: str, args: tuple[Any, ...]) -> None:
        if getattr(looking, "now", False):  # listing folders is an event too
            return
        replaced = event == "os.rename" and os.path.exists(args[1])
        if event in SHRINKING or replaced or (event == "open" and _cuts(*args)):
            looking.now = True
            look()
            looking.now = False

    sys.path.pop(0)  # this folder: a script's own, which `python -m` does not have
    sys.argv = ["rilq", *sys.argv[split + 1 :]]
    sys.addaudithook(seen)
    try:
        runpy.run_module("rilq", run_name="__main__")
    finally:
        look()
        Path(result).write_text(json.dumps(most))


def _cuts(path: Any, _mode: str | None, flags: int) -> bool:
    return bool(flags & os.O_TRUNC) and isinstance(path, str) and os.path.exists(path)


def _size(folder: str) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # another thread renames it meanwhile
                total += os.stat(os.path.join(parent, name)).st_size
    return total


if __name__ == "__main__":
    main()
