"""`rilq.json`: what a finished folder holds, by checksum; written once, checked by anybody.

It tells what made the checkpoint and never when, where or by whom: two runs of the same command
write the same bytes.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from rilq.errors import CheckpointError, printable
from rilq.formats.durable import write_bytes
from rilq.formats.shard import read_header

MANIFEST_NAME = "rilq.json"
CARD = "README.md"
CARD_PLOT = "rilq-training.png"
# What a push, or a user, adds to a folder; it is none of the conversion's output.
_CARD_FILES = (CARD, CARD_PLOT)
_CHUNK = 1 << 20


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found; the folder is whole if there are no `problems`.

    Attributes:
        damage: what is missing or has changed.
        unlisted: names of files that `rilq.json` does not know; a card is no such file.
    """

    files_checked: int
    tensors_checked: int
    damage: tuple[str, ...]
    unlisted: tuple[str, ...]

    @property
    def problems(self) -> tuple[str, ...]:
        """`damage`, and a line for each file that is `unlisted`."""
        return self.damage + tuple(f"{name}: not in {MANIFEST_NAME}" for name in self.unlisted)


@dataclass(frozen=True)
class _FileFacts:
    """One file as it is on the disk; `tensors` maps name to checksum."""

    size: int
    xxh3: str
    tensors: Mapping[str, str]


def file_hash(path: Path) -> str:
    """xxh3 (128 bits, hexadecimal) of a file's bytes."""
    return _hash_ranges(path, [])[0]


def _hash_ranges(path: Path, ranges: Iterable[tuple[str, int, int]]) -> tuple[str, dict[str, str]]:
    """Checksums of a whole file and of `(name, begin, end)` ranges in it, read once.

    The ranges must not overlap.
    """
    whole, parts = xxhash.xxh3_128(), {}
    with path.open("rb") as file:

        def read(size: int, *sums: Any) -> None:
            while size > 0 and (chunk := file.read(min(size, _CHUNK))):
                for checksum in (whole, *sums):
                    checksum.update(chunk)
                size -= len(chunk)

        for name, begin, end in sorted(ranges, key=lambda r: r[1:]):
            read(begin - file.tell())
            part = xxhash.xxh3_128()
            read(end - begin, part)
            parts[name] = part.hexdigest()
        while file.peek(1):
            read(_CHUNK)
    return whole.hexdigest(), parts


def _facts(path: Path) -> _FileFacts:
    ranges = []
    if path.suffix == ".safetensors":
        ranges = [(t.name, t.begin, t.end) for t in read_header(path).tensors.values()]
    xxh3, tensors = _hash_ranges(path, ranges)
    return _FileFacts(path.stat().st_size, xxh3, tensors)


def _files(folder: Path) -> list[str]:
    """The checkpoint's files: not the manifest, and nothing hidden (`.git`, `.cache`)."""
    relative = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    names = [p.as_posix() for p in relative if not any(part.startswith(".") for part in p.parts)]
    return [name for name in names if name != MANIFEST_NAME]


def write_manifest(folder: Path, payload: Mapping[str, Any]) -> None:
    """Durably write `rilq.json`, the last file of a folder.

    Args:
        folder: everything else is in it already; every file is read once, for its checksum.
        payload: recipe, versions, seeds, figures; it must hold no time, host or path. The keys
            "files" and "tensors" are ours.

    Raises:
        CheckpointError: a safetensors file in the folder is damaged.
    """
    assert not payload.keys() & {"files", "tensors"}, "files and tensors are computed here"
    facts = {name: _facts(folder / name) for name in _files(folder)}
    content = {
        **payload,
        "files": {name: {"size": f.size, "xxh3": f.xxh3} for name, f in facts.items()},
        "tensors": {name: xxh3 for f in facts.values() for name, xxh3 in f.tensors.items()},
    }
    text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"
    write_bytes(folder / MANIFEST_NAME, text.encode("utf-8"))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The parsed `rilq.json`, its tables of checksums checked for form.

    Raises:
        CheckpointError: it is missing, or not what `write_manifest` writes.
    """
    path = folder / MANIFEST_NAME
    try:
        content = json.loads(path.read_bytes())
    except OSError as err:
        raise CheckpointError(
            f"{path}: cannot be read: {err.strerror or err}\n"
            "  only folders written by rilq can be verified"
        ) from err
    except (ValueError, RecursionError) as err:
        raise CheckpointError(f"{path}: is not valid JSON\n  download it again") from err
    files, tensors = (
        content.get(key) if isinstance(content, dict) else None for key in ("files", "tensors")
    )
    if (
        not isinstance(files, dict)
        or not isinstance(tensors, dict)
        or not all(isinstance(f, dict) and f.keys() >= {"size", "xxh3"} for f in files.values())
    ):
        raise CheckpointError(
            f"{path}: has no usable table of files and tensors\n  download it again"
        )
    return dict(content)


def verify(folder: Path) -> VerifyReport:
    """Compare every file and every tensor of a folder with `rilq.json`; a card may lie beside them.

    Only files found in the folder are opened; names in `rilq.json` are compared, never followed.

    Raises:
        CheckpointError: `rilq.json` is missing or garbled.
    """
    manifest = read_manifest(folder)
    files, tensors = manifest["files"], dict(manifest["tensors"])
    present = _files(folder)
    problems = [f"{name}: missing" for name in files if name not in present]
    others = (name for name in present if name not in files and name not in _CARD_FILES)
    unlisted = tuple(printable(name, 400) for name in others)
    checked = 0
    for name in (name for name in present if name in files):
        expected = files[name]
        try:
            found = _facts(folder / name)
        except (CheckpointError, OSError) as err:
            problems.append(f"{name}: cannot be read: {err}")
            continue
        if found.size != expected["size"]:
            problems.append(f"{name}: has {found.size} bytes, expected {expected['size']}")
        elif found.xxh3 != expected["xxh3"]:
            problems.append(f"{name}: checksum {found.xxh3}, expected {expected['xxh3']}")
        for tensor, xxh3 in found.tensors.items():
            checked += 1
            wanted = tensors.pop(tensor, None)
            if wanted != xxh3:
                problems.append(f"{name}: tensor {tensor}: checksum {xxh3}, expected {wanted}")
    problems += [f"tensor {name}: missing" for name in tensors]
    both = sum(name in files for name in present)
    damage = tuple(printable(problem, 400) for problem in problems)
    return VerifyReport(both, checked, damage, unlisted)
