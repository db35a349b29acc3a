"""Where the database of runs is."""

from __future__ import annotations

import os
from pathlib import Path

from rilq.errors import OptionError

NAME = "rilq.db"
AUTO, NONE = "auto", "none"


def database_for(given: str | Path, root: Path, keep_out: tuple[Path, ...] = ()) -> Path | None:
    """The database that a run goes into; None for none.

    Args:
        given: a file, "none", or "auto": what the environment's RILQ_DB says, else `rilq.db` in
            `root`.
        root: folder of the database that is meant by default.
        keep_out: folders that it must not be in: checkpoints hold nothing of one run.

    Raises:
        OptionError: it would be in one of those.
    """
    wanted = str(given)
    if wanted == AUTO:
        wanted = os.environ.get("RILQ_DB") or str(root / NAME)
    if wanted == NONE:
        return None
    path = Path(wanted).expanduser().absolute()
    for folder in keep_out:
        if folder.resolve() in path.resolve().parents:
            raise OptionError(
                f"--db {wanted}: lies inside {folder}, which is a checkpoint's\n"
                "  choose a file outside of it, or --db none for no record"
            )
    return path
