"""Where text comes from: a local file or a dataset on the Hub, found, named and opened.

A source is a local file (`.jsonl`, `.json` with one object a line, `.parquet`, anything else is
plain text) or a dataset on the Hub, read as a stream. It gives documents.
"""

import codecs
import io
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import xxhash

from rilq.calib.hub_stream import HubSet, find_commit, hub_records
from rilq.calib.texts import Record, Text, joined, pieces, record_texts, shuffled
from rilq.errors import DatasetError, OptionError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 1 << 20  # bytes per read
_BATCH = 64  # rows of a parquet file read together
_LINE_SUFFIXES = (".jsonl", ".ndjson", ".json")
_FILE_SUFFIXES = (*_LINE_SUFFIXES, ".parquet", ".txt", ".text", ".md", ".csv", ".gz", ".zst")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class DataSource:
    """A text to read: a file, `c4`, `wikitext2` or `owner/name` on the Hub, and its weight."""

    location: str
    weight: float = 1.0


@dataclass(frozen=True)
class Opened:
    """A source that exists: its name for messages, its label, its texts, and their nature.

    Attributes:
        plain: one text without records.
        on_hub: as long as one likes to read.
        form: what was made of the records, for people.
    """

    name: str
    label: str
    texts: Iterator[Text]
    plain: bool = False
    on_hub: bool = False
    form: str = ""


def parse_source(text: str) -> DataSource:
    """Read the command line's `PATH_OR_NAME[=WEIGHT]`, for example `c4=0.7`.

    A path that exists under the full text wins, so a file name may hold an equals sign.

    Raises:
        OptionError: no location, or a weight that is not a positive number.
    """
    location, equals, tail = text.rpartition("=")
    if not equals or os.path.exists(os.path.expanduser(text)):
        location, tail = text, "1"
    try:
        weight = float(tail)
    except ValueError:
        location, weight = text, 1.0  # not a weight: part of the name
    if not location.strip():
        raise OptionError(f"--dataset {text!r}: no file or dataset name before the weight")
    if not (weight > 0 and math.isfinite(weight)):
        raise OptionError(f"--dataset {text!r}: the weight must be a positive number")
    return DataSource(location, weight)


def describe_source(source: DataSource) -> str:
    """What identifies a source without reading the Hub: a file's content, a dataset's name.

    Raises:
        DatasetError: a file is missing, unreadable or empty.
    """
    if _hub_set(source.location, evaluating=False) is not None:
        return f"{source.location} x {source.weight:g}"
    path = Path(os.path.expanduser(source.location))
    return f"{path.name}@xxh3:{_content_hash(path)} x {source.weight:g}"


def open_texts(
    source: DataSource, tokenizer: "PreTrainedTokenizerBase", text_key: str, seed: int | None
) -> Opened:
    """Find a source, and refuse at once what is missing or empty.

    Args:
        source: a file, or a name on the Hub.
        tokenizer: its chat template renders records that hold messages.
        text_key: of the text in a record.
        seed: of the order in which a Hub stream is taken; None evaluates, in the stream's order.

    Raises:
        DatasetError: a file is missing, unreadable or empty, or the Hub does not know the dataset;
            what is wrong further on is raised while the texts are read.
    """
    hub = _hub_set(source.location, evaluating=seed is None)
    if hub is not None:
        revision = find_commit(hub.name)
        label = ":".join(filter(None, (f"{hub.name}@{revision[:12]}", hub.config, hub.split)))
        texts = record_texts(hub_records(hub, revision), tokenizer, text_key)
        if hub.between is not None:
            texts = joined(texts, hub.between)
            return Opened(
                source.location, label, texts, on_hub=hub.first is not None, form=hub.form
            )
        if seed is not None:
            texts = shuffled(texts, torch.Generator().manual_seed(seed))
        return Opened(source.location, label, texts, on_hub=True)
    path = Path(os.path.expanduser(source.location))
    label = f"{path.name}@xxh3:{_content_hash(path)}"
    if path.suffix.lower() in _LINE_SUFFIXES:
        texts = record_texts(_json_records(path), tokenizer, text_key)
    elif path.suffix.lower() == ".parquet":
        texts = record_texts(_parquet_records(path, text_key), tokenizer, text_key)
    else:
        texts = (Text(piece, specials=False) for piece in pieces(_decoded(path)))
        return Opened(str(path), label, texts, plain=True)
    return Opened(str(path), label, texts)


def _hub_set(location: str, evaluating: bool) -> HubSet | None:
    """What a location means on the Hub; None where it is a path.

    To evaluate, `c4` and `wikitext2` are in the form of GPTQ's code, which most papers took over:
    the beginning of C4's first validation shard, and WikiText-2's test split, as one document.

    A name on the Hub never looks at the folder one happens to be in, except that an existing
    path `owner/name` wins; `./c4` is a file of that name.
    """
    if location == "c4":
        if evaluating:
            file = "en/c4-validation.00000-of-00008.json.gz"
            form = "the first 1100 documents, joined by a space"
            return HubSet("allenai/c4", "validation", file=file, between=" ", first=1100, form=form)
        return HubSet("allenai/c4", file="en/c4-train.00000-of-01024.json.gz")
    if location == "wikitext2":
        split = "test" if evaluating else "train"
        form = f"the {split} split, its lines joined by blank ones"
        config = "wikitext-2-raw-v1"
        return HubSet("Salesforce/wikitext", split, config, between="\n\n", form=form)
    is_file = location.lower().endswith(_FILE_SUFFIXES) or os.path.exists(location)
    return None if is_file or not _HUB_NAME.fullmatch(location) else HubSet(location)


# ---- local files --------------------------------------------------------------------------------


def _content_hash(path: Path) -> str:
    """xxh3_128 of the file in hex; the first look at it, so it also says what is wrong with it."""
    if not os.path.exists(path):
        raise DatasetError(
            f"{path}: no such file, and not a dataset name (c4, wikitext2, owner/name)\n"
            "  give --dataset a .txt, .jsonl or .parquet file, or one of these names"
        )
    if not path.is_file():
        raise DatasetError(f"{path}: is not a regular file\n  give one file per --dataset")
    state = xxhash.xxh3_128()
    with _reading(path) as file:
        while chunk := file.read(_CHUNK):
            state.update(chunk)
    if not path.stat().st_size:
        raise DatasetError(f"{path}: is empty\n  use a file with text, or --dataset c4")
    return str(state.hexdigest())


@contextmanager
def _reading(path: Path) -> Iterator[io.BufferedReader]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as err:
        raise DatasetError(f"{path}: cannot be read: {err.strerror or err}") from err


def _decoded(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file in chunks, as `Path.read_text` gives it, but without its BOM."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True)
    fed = lines = 0
    with _reading(path) as file:
        while True:
            chunk = file.read(_CHUNK)
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as err:
                raise _not_utf8(path, lines, fed + len(chunk) - len(err.object), err) from err
            yield text.removeprefix("\ufeff") if fed == 0 else text
            if not chunk:
                return
            fed += len(chunk)
            lines += chunk.count(b"\n")


def _json_records(path: Path) -> Iterator[Record]:
    """One JSON object a line; empty lines are passed over."""
    fed = 0
    with _reading(path) as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                # strict=False: control characters inside strings, NUL too, are text.
                record = json.loads(text, strict=False) if text else {}
            except UnicodeDecodeError as err:
                raise _not_utf8(path, number - 1, fed, err) from err
            except (ValueError, RecursionError) as err:
                raise _not_a_record(path, number, one_line(err)) from err
            if not isinstance(record, dict):
                raise _not_a_record(path, number, f"a {type(record).__name__}")
            if text:
                yield f"{path} line {number}", record
            fed += len(line)


def _parquet_records(path: Path, text_key: str) -> Iterator[Record]:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            # The text's columns alone; without one, a record with all names for the message.
            columns = [name for name in (text_key, "messages") if name in names] or None
            number = 0
            for batch in file.iter_batches(batch_size=_BATCH, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", record
    except (ArrowException, OSError) as err:
        raise DatasetError(f"{path}: cannot be read as parquet: {one_line(err)}") from err


def _not_utf8(path: Path, lines: int, offset: int, err: UnicodeDecodeError) -> DatasetError:
    """`lines` end before byte `offset`, where `err.object` begins."""
    line = lines + err.object.count(b"\n", 0, err.start) + 1
    byte = err.object[err.start]
    return DatasetError(
        f"{path} line {line}: is not UTF-8 (byte 0x{byte:02x} at offset {offset + err.start})\n"
        "  convert it, for example with iconv -f latin1 -t utf-8; unpack it if it is compressed"
    )


def _not_a_record(path: Path, number: int, found: str) -> DatasetError:
    return DatasetError(
        f"{path} line {number}: is not a JSON object: {found}\n"
        "  give one object a line (jq -c '.[]' FILE makes that of an array)"
    )
