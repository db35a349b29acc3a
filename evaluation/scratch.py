"""Room on disk for hidden states, and temporary folders for them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from rilq.errors import OutputError
from rilq.evaluation.forward import Subject


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """An empty folder in the system's temporary one; removed with all that is in it.

    Raises:
        OutputError: it cannot be made.
    """
    try:
        temporary = tempfile.TemporaryDirectory(prefix="rilq-eval-")
    except OSError as err:
        raise OutputError(
            f"{tempfile.gettempdir()}: cannot be written: {err.strerror or err}\n"
            "  set TMPDIR to a folder on a volume that you may write to"
        ) from err
    with temporary as name:
        yield Path(name)


@contextmanager
def scratch_folder(subjects: Sequence[Subject], tokens: Tensor) -> Iterator[Path]:
    """A temporary folder with room for hidden states; removed with all that is in it.

    Args:
        subjects: what will run, and what each keeps of itself until all have run.
        tokens: what each will run over.

    Raises:
        OutputError: it cannot be made, or the volume has not the room.
    """
    with temporary_folder() as folder:
        check_room(folder, states_bytes(subjects, tokens))
        yield folder


def states_bytes(subjects: Sequence[Subject], tokens: Tensor) -> int:
    """Bytes of the hidden states on disk at most: one boundary of each, and one more of one."""
    sizes = [subject.states(Path(), tokens).nbytes for subject in subjects]
    return sum(sizes) + max(sizes)


def check_room(folder: Path, needed: int) -> None:
    """That a folder's volume has so many bytes free.

    Raises:
        OutputError: it has not.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OutputError(
            f"{folder.parent}: {needed / 1e9:.1f} GB needed for hidden states, "
            f"{free / 1e9:.1f} GB free\n"
            "  make room, use less text, or name a folder on another volume: --work-dir where the "
            "command has it, else TMPDIR"
        )
