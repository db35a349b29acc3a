"""A checkpoint folder on its way to disk: planned in shards, staged beside its place, published.

Nothing carries the output's name until everything in it is whole and synced; then one rename makes
it a checkpoint.
"""

import copy
import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Container, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from rilq.errors import CheckpointError, OptionError, OutputError
from rilq.formats.durable import atomic_file, current_umask, sync_folder, write_bytes
from rilq.formats.index import INDEX

_UNITS = {"B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS |= {f"{_letter}B": 1000**_power, f"{_letter}IB": 1024**_power}


def parse_size(text: str) -> int:
    """Bytes in a size such as `5GB` (10^9), `500 MiB` (2^20) or `1000000`.

    Raises:
        OptionError: not a size, or not even one byte.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(found[2].upper() or "B") if found else None
    size = int(float(found[1]) * unit) if found and unit else 0
    if size < 1:
        raise OptionError(
            f"size {text!r} is not understood: expected a number and a unit\n"
            f"  write it like 5GB or 500MiB; units are {', '.join(_UNITS)}"
        )
    return size


def plan_shards(sizes: Mapping[str, int], max_shard_size: int) -> list[list[str]]:
    """Distribute tensors over shards, in order.

    Args:
        sizes: name to bytes.
        max_shard_size: bytes of tensors in a shard; a larger tensor has a shard to itself.

    Returns:
        The names of each shard; no shard is empty.
    """
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = max_shard_size
        shards[-1].append(name)
        room -= size
    return shards


def shard_names(count: int) -> list[str]:
    """File names of `count` shards, as transformers writes them."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_bytes(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode("utf-8"))


def write_index(folder: Path, weight_map: Mapping[str, str], total_size: int) -> None:
    """Durably write the index of a checkpoint with several shards.

    Args:
        folder: where it goes, as `INDEX`.
        weight_map: tensor name to shard name.
        total_size: bytes of all tensors.
    """
    content = {
        "metadata": {"total_size": total_size},
        "weight_map": dict(sorted(weight_map.items())),
    }
    _write_json(folder / INDEX, content)


def write_config(
    folder: Path,
    source_config: Mapping[str, Any],
    quantization: QuantizationConfigMixin | Mapping[str, Any] | None,
    dtype: torch.dtype,
) -> None:
    """Durably write `config.json`: the source's, with our dtype and quantization.

    `auto_map` is left out, because the Python files that it points to are never copied, and
    `_name_or_path`, an older transformers' note of where somebody had the model on disk.

    Args:
        folder: where it goes.
        source_config: the source's `config.json`, parsed; its order of keys is kept.
        quantization: of the tensors in `folder`, ours or another program's; None for a dense
            checkpoint.
        dtype: of the 16-bit (or wider) tensors.
    """
    config = copy.deepcopy(dict(source_config))
    for key in ("auto_map", "quantization_config", "_name_or_path"):
        config.pop(key, None)
    # "torch_dtype" is the key's older name; a reader that knows only that one still exists.
    for key in {"dtype", "torch_dtype"} & config.keys() or {"dtype"}:
        config[key] = str(dtype).removeprefix("torch.")
    if quantization is not None:
        if isinstance(quantization, QuantizationConfigMixin):
            quantization = quantization.to_dict()
        config["quantization_config"] = dict(sorted(quantization.items()))
    _write_json(folder / "config.json", config)


def copy_side_files(paths: Mapping[str, Path], folder: Path) -> None:
    """Durably copy tokenizer files and the like, as real files with the mode the umask allows.

    Args:
        paths: name in the output (relative, `/` between folders) to the source; symlinks, as in
            the Hub's cache, are followed.
        folder: the staging folder.

    Raises:
        CheckpointError: a source cannot be read, or a name leaves the folder.
        OutputError: a copy cannot be written.
    """
    for name, source in paths.items():
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts or not relative.parts:
            raise CheckpointError(
                f"{name}: points outside the checkpoint folder\n  remove it from the checkpoint"
            )
        target = folder / relative
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            file = source.open("rb")
        except OSError as err:
            raise CheckpointError(
                f"{source}: cannot be read: {err.strerror or err}\n"
                "  check that the file exists and that you may read it"
            ) from err
        with file, atomic_file(target) as copied:
            shutil.copyfileobj(file, copied)


def check_output(output: Path, *, source: Path | None, work: Path | None) -> None:
    """Find out in the first second whether `output` can be published in the end.

    The nearest existing parent is tried by making and removing a folder in it: permissions alone
    say nothing about read-only volumes and quotas.

    Args:
        output: the folder to be made; it may exist if it is empty.
        source: the checkpoint's folder, if it is local.
        work: the work folder.

    Raises:
        OutputError: `output` is a file, not empty, a mount point, in the way of the source or the
            work folder, or its parent cannot be written to.
    """
    try:
        place = output.resolve()
        for label, other in (("source", source), ("work", work)):
            if other is not None:
                _check_apart(place, other.resolve(), f"{output}: the output folder", label)
        if place.exists():
            _check_empty(output, place)
        parent = next(p for p in place.parents if p.exists())
        with tempfile.TemporaryDirectory(prefix=".rilq-probe-", dir=parent):
            pass
    except OSError as err:
        raise OutputError(
            f"{output}: the output cannot be written here: {err.strerror or err}\n"
            "  choose a folder on a volume that you may write to"
        ) from err


def _check_apart(place: Path, other: Path, subject: str, label: str) -> None:
    relation = ""
    if place == other:
        relation = f"is the {label} folder itself"
    elif other in place.parents:
        relation = f"lies inside the {label} folder {other}"
    elif place in other.parents:
        relation = f"would contain the {label} folder {other}"
    if relation:
        raise OutputError(f"{subject} {relation}\n  choose another folder with -o/--output-dir")


def _check_empty(output: Path, place: Path) -> None:
    if not place.is_dir():
        raise OutputError(f"{output}: is a file, expected a folder\n  choose another name")
    if any(place.iterdir()):
        raise OutputError(
            f"{output}: the output folder is not empty\n"
            "  choose a new folder, or move away what is in it"
        )
    if place.is_mount():
        raise OutputError(
            f"{output}: is a mount point, which one rename cannot replace\n"
            f"  name a folder inside it, for example {output / 'model'}"
        )


def open_staging(output: Path, run_id: str, *, keep: Container[str] = ()) -> Path:
    """Make a hidden folder beside `output`, readable by its owner only until published.

    What an earlier, stopped attempt of the same run left there is removed first.

    Args:
        output: where the finished folder will be; missing parents are made.
        run_id: a short word that is the run's own, and the same when it is resumed.
        keep: names of files there that are known to be whole.

    Raises:
        OutputError: the folder cannot be made.
    """
    place = output.resolve()
    staging = place.with_name(f".{place.name[:100]}.{run_id}.staging")
    try:
        staging.parent.mkdir(parents=True, exist_ok=True)
        if staging.is_symlink() or staging.is_file():
            staging.unlink()
        staging.mkdir(mode=0o700, exist_ok=True)
        for path in staging.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name not in keep:
                path.unlink()
    except OSError as err:
        raise OutputError(
            f"{staging}: cannot be made: {err.strerror or err}\n"
            "  choose an output folder on a volume that you may write to"
        ) from err
    return staging


def publish(staging: Path, output: Path) -> None:
    """Give the finished folder its name, in one rename that cannot leave half of it.

    Args:
        staging: from `open_staging`; every file in it is durable already.
        output: absent, or an empty folder.

    Raises:
        OutputError: `output` has appeared meanwhile, or the volume fails; `staging` stays.
    """
    place = output.resolve()
    folders = [staging, *(path for path in staging.rglob("*") if path.is_dir())]
    try:
        for folder in folders:
            folder.chmod(0o777 & ~current_umask())
            sync_folder(folder)
        os.rename(staging, place)  # onto an empty folder too; refuses any other
        sync_folder(place.parent)
    except OSError as err:
        appeared = err.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
        what = "something else has appeared there meanwhile" if appeared else err.strerror or err
        raise OutputError(
            f"{output}: cannot be published: {what}\n"
            f"  the finished checkpoint is in {staging}; move away what is in {output} and run "
            "the same command again"
        ) from err
