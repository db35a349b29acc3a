"""A checkpoint, as a folder or a repository holds it: checked whole at the start, read lazily."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from threading import Event, Lock
from typing import Any

import torch
import xxhash
from torch import Tensor

from rilq.errors import CheckpointError, NonFiniteError, Stopped, printable
from rilq.formats.index import INDEX, choose_shards, locate_tensors, read_weight_map
from rilq.formats.shard import (
    CODE_OF,
    ShardHeader,
    TensorInfo,
    listing,
    parse_header,
    raw_bytes,
    read_tensors,
)
from rilq.formats.source import CONFIG, Source, label_of, read_json
from rilq.progress import Reporter, SilentReporter

SOURCE_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})
CHUNK = 2**20  # elements that are hashed and scanned together: 2 to 4 MB, so they stay in cache

# Masks and positions that older transformers releases saved along with the weights. They are
# whole numbers by nature, and no module of today takes them.
_OLD_BUFFERS = re.compile(r"(^|\.)(attn\.bias|attention\.bias|masked_bias|position_ids)$")

# What belongs to a model besides its weights and card; never code. Matched in lower case.
LEGAL_FILES = ("license", "license.txt", "license.md", "notice", "notice.txt", "use_policy.md")
SIDE_FILES = (
    CONFIG,
    "generation_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*.json",
    "vocab*.txt",
    "merges*.txt",
    "chat_template*.json",
    "chat_template*.jinja",
    "*.model",
    "*.tiktoken",
    *LEGAL_FILES,
)


@dataclass
class Checkpoint:
    """All tensors of a checkpoint by name; opened with `Checkpoint.open`.

    Several threads may read at once, each other tensors than the others.

    Attributes:
        source: where the files come from.
        config: config.json.
        headers: shard to checked header.
        shard_of: tensor to the shard that it is read from.
        tensors: tensor to dtype, shape and place.
        bytes_read: bytes of all tensors returned by `read` so far.
        hashes: tensor to `tensor_hash`, for all tensors read so far.
        stop: once it is set, reading ends with `Stopped` before the next tensor.
    """

    source: Source
    config: dict[str, Any]
    headers: Mapping[str, ShardHeader]
    shard_of: Mapping[str, str]
    digests: Mapping[str, str] = field(repr=False)
    report: Reporter = field(repr=False)
    tensors: Mapping[str, TensorInfo] = field(init=False, repr=False)
    bytes_read: int = field(default=0, init=False)
    hashes: dict[str, str] = field(default_factory=dict, init=False, repr=False)
    stop: Event = field(default_factory=Event, init=False, repr=False)
    _counting: Lock = field(default_factory=Lock, init=False, repr=False)

    def __post_init__(self) -> None:
        self.tensors = {
            name: self.headers[shard].tensors[name] for name, shard in self.shard_of.items()
        }

    @classmethod
    def open(
        cls,
        source: Source,
        *,
        report: Reporter = SilentReporter(),  # noqa: B008 - stateless
        dtypes: frozenset[torch.dtype] = SOURCE_DTYPES,
    ) -> "Checkpoint":
        """Check config.json, the index and the headers of all shards; fetches no weights.

        With both an index and a `model.safetensors`, the index decides. A tensor that lies in
        another shard than the index says is read from where it is, and one that lies in two shards
        is read from the one in the index; both with a warning.

        Args:
            source: the folder or repository.
            report: receives notes and warnings.
            dtypes: what weights may be stored in.

        Raises:
            CheckpointError: anything is missing, damaged, contradictory or not supported.
        """
        files = source.files()
        config = read_json(source, files, CONFIG)
        if config is None:
            raise CheckpointError(
                f"{label_of(source)}: has no {CONFIG}\n"
                "  give the folder or repository that holds config.json and *.safetensors"
            )
        digests = {CONFIG: _file_digest(source.path(CONFIG))}
        weight_map = read_weight_map(source, files)
        if weight_map is not None:
            digests[INDEX] = _file_digest(source.path(INDEX))
        headers = {}
        for shard in choose_shards(source, files, weight_map, report):
            head, size = source.head(shard)
            headers[shard] = parse_header(head, size, f"{source.label}/{shard}")
            digests[shard] = headers[shard].digest
        shard_of = locate_tensors(source, headers, weight_map, report)
        checkpoint = cls(source, config, headers, shard_of, digests, report)
        checkpoint.check_dtypes(dtypes)
        return checkpoint

    @property
    def shards(self) -> tuple[str, ...]:
        """The safetensors files, sorted."""
        return tuple(sorted(self.headers))

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return self.nbytes(self.tensors)

    def nbytes(self, names: Iterable[str]) -> int:
        """Bytes of some tensors."""
        return sum(self.tensors[name].nbytes for name in self._known(names))

    def source_names(self, names: Iterable[str]) -> list[str]:
        """What `read` takes from the files to give some tensors: just those."""
        return self._known(names)

    def source_bytes(self, names: Iterable[str]) -> int:
        """Bytes of the files that `read` takes to give some tensors."""
        return self.nbytes(self.source_names(names))

    def shards_of(self, names: Iterable[str]) -> list[str]:
        """The shards that `read` opens to give some tensors, each once."""
        return list(dict.fromkeys(self.shard_of[name] for name in self.source_names(names)))

    def in_order(
        self, steps: Sequence[Sequence[str]]
    ) -> AbstractContextManager[Callable[[], None]]:
        """Say which tensors each of the next steps reads, so that their shards are there in time.

        What the context gives is to be called after each step, when none of its tensors is held
        any more: a shard that no later step needs may be deleted then.
        """
        return self.source.in_order([self.shards_of(names) for names in steps])

    def read(self, names: Iterable[str], *, check_finite: bool = True) -> dict[str, Tensor]:
        """Views of some tensors in memory-mapped shards, all touched, hashed and checked once.

        Drop all tensors of a call before the next one, and memory does not grow: pages leave it
        when the last tensor of the call that lies in their shard is gone.

        Args:
            names: tensors of this checkpoint.
            check_finite: refuse NaN and infinity.

        Returns:
            name to tensor on the CPU, in the order of `names`.

        Raises:
            CheckpointError: no such tensor, or a file changed while it was in use.
            NonFiniteError: weights hold NaN or infinity; all that do are named.
            Stopped: `stop` was set meanwhile.
        """
        wanted = self._known(names)
        by_shard: dict[str, list[str]] = {}
        for name in wanted:
            by_shard.setdefault(self.shard_of[name], []).append(name)
        found: dict[str, Tensor] = {}
        faults: list[str] = []
        for shard, members in by_shard.items():
            self._check_wanted()
            label = f"{self.source.label}/{shard}"
            views = read_tensors(self.source.path(shard), self.headers[shard], members, label)
            for name, tensor in views.items():
                self._check_wanted()
                scan = scan_tensor(tensor)
                self._remember(name, tensor, scan)
                if check_finite and scan.non_finite:
                    faults.append(
                        f"{printable(name)} in {printable(shard)}: {scan.non_finite} "
                        f"of {tensor.numel()} elements are NaN or infinite"
                    )
            found.update(views)
        if faults:
            raise NonFiniteError(
                "\n".join(faults) + "\n  the model cannot be right; download these files again, "
                "or take another revision"
            )
        return {name: found[name] for name in wanted}

    def _check_wanted(self) -> None:
        if self.stop.is_set():
            raise Stopped("stopped")

    def _known(self, names: Iterable[str]) -> list[str]:
        wanted = list(dict.fromkeys(names))
        unknown = [name for name in wanted if name not in self.tensors]
        if unknown:
            raise CheckpointError(
                f"{label_of(self.source)}: holds no tensor {listing(unknown)}\n"
                "  the files do not fit config.json; download the checkpoint again"
            )
        return wanted

    def _remember(self, name: str, tensor: Tensor, scan: "TensorScan") -> None:
        """Count one tensor that was read, and compare it with earlier reads of it."""
        with self._counting:
            self.bytes_read += tensor.nbytes
        first = name not in self.hashes
        place = (
            f"{label_of(self.source)}/{printable(self.shard_of[name])}: tensor {printable(name)}"
        )
        if self.hashes.setdefault(name, scan.hash) != scan.hash:
            raise CheckpointError(
                f"{place} changed since it was first read\n"
                "  do not write to a checkpoint in use; start again"
            )
        # A padding token leaves one zero row in many embeddings; damage is wider than one row.
        if first and scan.zero_rows > 1:
            self.report.warn(
                f"{place}: {scan.zero_rows} of {tensor.numel() // tensor.shape[-1]} rows are all "
                "zero; unless the model is meant to be so, download the file again"
            )

    def check_dtypes(self, dtypes: frozenset[torch.dtype]) -> None:
        """Raises CheckpointError for weights that are stored in none of them."""
        wrong = [
            f"{name} ({CODE_OF[info.dtype]} in {self.shard_of[name]})"
            for name, info in self.tensors.items()
            if info.dtype not in dtypes
            and (info.dtype.is_floating_point or not _OLD_BUFFERS.search(name))
        ]
        if wrong:
            remedy = "take the model in 16 bits"
            if "quantization_config" in self.config:
                remedy = "it is quantized already (quantization_config in config.json); " + remedy
            raise CheckpointError(
                f"{label_of(self.source)}: weights of a dtype that is not supported: "
                f"{listing(wrong)}\n"
                f"  supported: {', '.join(sorted(CODE_OF[d] for d in dtypes))}; {remedy}"
            )

    def header_hash(self) -> str:
        """xxh3 of config.json, the index and all headers: which model this is, not its values."""
        lines = "".join(f"{len(n)} {n} {d}\n" for n, d in sorted(self.digests.items()))
        return xxhash.xxh3_128_hexdigest(lines.encode("utf-8"))

    def file_signatures(self) -> dict[str, tuple[int, ...]]:
        """Name to (size, mtime in ns, ctime in ns, inode) of each file that `header_hash` covers.

        A quick "nothing was touched" for a folder: setting mtime back still changes ctime. Empty
        for a pinned commit, which fixes the content by itself.
        """
        if self.source.commit is not None:
            return {}
        stats = {name: self.source.path(name).stat() for name in sorted(self.digests)}
        return {n: (s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for n, s in stats.items()}

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A JSON object beside the weights, or None if there is no such file.

        Raises:
            CheckpointError: it is not a JSON object.
        """
        return read_json(self.source, self.source.files(), name)

    def side_files(self) -> list[str]:
        """Files to copy to the output: config, tokenizer, chat template, licence; never code."""
        names = sorted(self.source.files())
        return [
            name
            for name in names
            if "/" not in name and any(fnmatchcase(name.lower(), p) for p in SIDE_FILES)
        ]


@dataclass(frozen=True)
class TensorScan:
    """What one pass over a tensor's bytes found; `zero_rows` counts for two dimensions and more."""

    hash: str
    non_finite: int
    zero_rows: int


def scan_tensor(tensor: Tensor) -> TensorScan:
    """Hash a tensor, count its non-finite elements and its all-zero rows, touching it once."""
    width = tensor.shape[-1] if tensor.ndim >= 2 else max(1, tensor.numel())
    digest, non_finite, zero_rows = xxhash.xxh3_128(), 0, 0
    rows, step = tensor.reshape(-1, width), max(1, CHUNK // width)  # [rows, width]
    for start in range(0, len(rows), step):
        chunk = rows[start : start + step]
        digest.update(raw_bytes(chunk))
        if tensor.is_floating_point():
            values = chunk if chunk.element_size() > 1 else chunk.float()  # float8 has no min, max
            non_finite += _count_non_finite(values)
            zero_rows += _count_zero_rows(values) if tensor.ndim >= 2 else 0
    return TensorScan(digest.hexdigest(), non_finite, zero_rows)


def _count_non_finite(values: Tensor) -> int:
    low, high = torch.aminmax(values)  # NaN in any place becomes both; no temporary, 10 GB/s
    if torch.isfinite(low) and torch.isfinite(high):
        return 0
    return values.numel() - int(torch.isfinite(values).sum())


def _count_zero_rows(rows: Tensor) -> int:
    candidates = (rows[:, 0] == 0) & (rows[:, -1] == 0)  # few, so that few rows are looked at whole
    if not candidates.any():
        return 0
    return int((rows[candidates] == 0).all(dim=1).sum())


def _file_digest(path: Path) -> str:
    return xxhash.xxh3_128_hexdigest(path.read_bytes())
