"""Which shards make up a checkpoint and where its tensors lie, by its index and all headers."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from rilq.errors import CheckpointError, printable
from rilq.formats.shard import DAMAGED, ShardHeader, listing
from rilq.formats.source import Source, label_of, leaves_folder, read_json
from rilq.progress import Reporter

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def read_weight_map(source: Source, files: Mapping[str, int]) -> dict[str, str] | None:
    """The index's tensor to shard, or None where there is no index.

    Args:
        source: where the index is.
        files: what `source.files()` gave.

    Raises:
        CheckpointError: the index is damaged, or names files outside the checkpoint's folder.
    """
    table = read_json(source, files, INDEX)
    if table is None:
        return None
    label, weight_map = f"{label_of(source)}/{INDEX}", table.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{label}: has no weight_map of tensors to shards\n  {DAMAGED}")
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CheckpointError(
                f"{label}: weight_map names no file for {printable(name)}, "
                f"but {printable(str(shard))}\n  {DAMAGED}"
            )
        if leaves_folder(shard):
            raise CheckpointError(
                f"{label}: {printable(shard)} (of {printable(name)}) points outside the checkpoint "
                "folder\n  do not use this checkpoint; it was made to read other files"
            )
    return weight_map


def choose_shards(
    source: Source,
    files: Mapping[str, int],
    weight_map: Mapping[str, str] | None,
    report: Reporter,
) -> list[str]:
    """The safetensors files that make up the checkpoint, sorted.

    Args:
        source: the checkpoint, for messages.
        files: what `source.files()` gave.
        weight_map: what `read_weight_map` gave.
        report: receives a note if the index decides over a single file.

    Raises:
        CheckpointError: shards are missing, or there are no safetensors weights at all.
    """
    if weight_map is None:
        if SINGLE in files:
            return [SINGLE]
        raise CheckpointError(f"{label_of(source)}: {_why_no_weights(files)}")
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if shard not in files]
    if missing:
        raise CheckpointError(
            f"{label_of(source)}: {len(missing)} of {len(shards)} shards that {INDEX} names are "
            f"missing: {listing(missing)}\n  download them"
        )
    if SINGLE in files and SINGLE not in shards:
        report.note(f"{label_of(source)}: has {INDEX} and {SINGLE}; the index is used")
    return shards


def _why_no_weights(files: Mapping[str, int]) -> str:
    """What there is in place of safetensors weights, and what to do about it."""
    pickles = sorted(name for name in files if name.endswith(PICKLES))
    if any(fnmatchcase(name, "consolidated.*.pth") for name in pickles):
        return (
            f"these are original Meta weights ({listing(pickles, 3)})\n"
            "  use the model's repository in Hugging Face form, whose name ends in -hf"
        )
    if pickles:
        return (
            f"{listing(pickles, 3)} is a pickle, which can run code; it is not opened\n"
            "  convert it to safetensors, or take a revision that has them"
        )
    others = sorted(name for name in files if name.endswith((".safetensors", ".gguf")))
    return (
        f"has neither {INDEX} nor {SINGLE}" + (f", only {listing(others, 3)}" if others else "")
    ) + "\n  download the checkpoint again"


def locate_tensors(
    source: Source,
    headers: Mapping[str, ShardHeader],
    weight_map: Mapping[str, str] | None,
    report: Reporter,
) -> dict[str, str]:
    """Tensor to shard, from headers and index compared in both directions.

    Args:
        source: the checkpoint, for messages.
        headers: shard to header, of all that `choose_shards` gave.
        weight_map: what `read_weight_map` gave.
        report: receives warnings of tensors that lie elsewhere than the index says.

    Raises:
        CheckpointError: index and headers contradict each other, or there are no tensors.
    """
    holders: dict[str, list[str]] = {}
    for shard, header in headers.items():
        for name in header.tensors:
            holders.setdefault(name, []).append(shard)
    if not holders:
        raise CheckpointError(f"{label_of(source)}: its shards hold no tensors\n  {DAMAGED}")
    if weight_map is None:
        return {name: shards[0] for name, shards in holders.items()}
    _compare_names(source, holders, weight_map)
    elsewhere = [name for name, shard in weight_map.items() if shard not in holders[name]]
    unclear = [name for name in elsewhere if len(holders[name]) > 1]
    if unclear:
        raise CheckpointError(
            f"{label_of(source)}: in several shards, but not in the one that {INDEX} names: "
            f"{listing(unclear)}\n  download the checkpoint again"
        )
    if elsewhere:
        report.warn(
            f"{label_of(source)}: in another shard than {INDEX} says, read from where they are: "
            f"{listing(elsewhere)}"
        )
    twice = [name for name, shards in holders.items() if len(shards) > 1]
    if twice:
        report.warn(
            f"{label_of(source)}: in two shards, read from the one that {INDEX} names: "
            f"{listing(twice)}"
        )
    return {
        name: shard if shard in holders[name] else holders[name][0]
        for name, shard in weight_map.items()
    }


def _compare_names(
    source: Source, holders: Mapping[str, Sequence[str]], weight_map: Mapping[str, str]
) -> None:
    """Refuse tensors that only the index or only a shard knows."""
    missing = [name for name in weight_map if name not in holders]
    unlisted = [name for name in holders if name not in weight_map]
    problems = []
    if missing:
        problems.append(f"{len(missing)} tensors of {INDEX} are in no shard: {listing(missing)}")
    if unlisted:
        problems.append(f"{len(unlisted)} tensors are not in {INDEX}: {listing(unlisted)}")
    if problems:
        raise CheckpointError(
            "\n".join(f"{label_of(source)}: {problem}" for problem in problems)
            + "\n  index and shards are of different versions; download the checkpoint again"
        )
