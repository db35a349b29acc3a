"""Text into token rows, with a seed and a content hash.

A source is a local file (`.jsonl`, `.json` with one object a line, `.parquet`, anything else is
plain text) or a dataset on the Hub, read as a stream. It gives documents; documents become tokens;
tokens become rows. How long texts stay within memory, and how much of a text is read:

- A text of at most `_PIECE` characters is tokenized in one call, exactly as `tokenizer(text)`
  does it. A longer one is cut before a space between two words (or after a line end, or, where
  there is neither, anywhere). For byte-level BPE without a prefix space (GPT-2, Llama 3, Qwen)
  the tokens of a cut before a space are those of the whole text; tokenizers that put a space
  before every text (SentencePiece) get about one other token at each cut.
- In mode "documents" each piece of a document that long counts as a document.
- For calibration a local source is read until it has given `_OVERSAMPLE` times the rows asked,
  and the rows are spread over what was read. A Hub stream is shuffled through a buffer and read
  until there are enough rows.
"""

import codecs
import io
import json
import logging
import math
import os
import queue
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
import xxhash
from torch import Tensor

from rilq.errors import DatasetError, OptionError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
Mode = Literal["packed", "documents"]
_Record = tuple[str, Mapping[str, Any]]  # where it stands, for messages; the record

DEFAULT_ROWS = 320  # 256 to train and 64 to validate (RILQ's code)
MINIMUM_ROWS = 8  # one effective batch
HUB_EVALUATION_ROWS = 256  # what the field takes of C4's validation split (GPTQ's code)

_OVERSAMPLE = 8
_PIECE = 4 << 20  # characters; one to three million tokens, up to 700 MB inside the tokenizer
_BATCH = 64  # documents tokenized together, on several threads
_SHUFFLE = 1000  # documents in the buffer of a Hub stream
_PATIENCE = 60.0  # seconds to wait for the Hub's next document
_CHUNK = 1 << 20  # bytes per read
_LINE_SUFFIXES = (".jsonl", ".ndjson", ".json")
_FILE_SUFFIXES = (*_LINE_SUFFIXES, ".parquet", ".txt", ".text", ".md", ".csv", ".gz", ".zst")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_CUT = re.compile(r"(?<=\S)(?= [^\W\d_])|(?<=\S\n)(?=\S)")


@dataclass(frozen=True)
class DataSource:
    """A text to read: a file, `c4`, `wikitext2` or `owner/name` on the Hub, and its weight."""

    location: str
    weight: float = 1.0


@dataclass(frozen=True)
class Rows:
    """Token rows, and what they came from.

    Attributes:
        tokens: `[rows, seq_len]` int64.
        digest: xxh3_128 of the shape and the tokens, in hex.
        notes: what the user should know, one line each.
        sources: labels without any path of this machine: `name@xxh3:hash`, `owner/name@commit:…`.
    """

    tokens: Tensor
    digest: str
    notes: tuple[str, ...]
    sources: tuple[str, ...]


@dataclass(frozen=True)
class _Text:
    """A document, or a piece of a plain text; `specials`: the tokenizer adds its own."""

    text: str
    specials: bool


@dataclass(frozen=True)
class _Opened:
    """A source that exists: its name for messages, its label, its texts, and their nature."""

    name: str
    label: str
    texts: Iterator[_Text]
    plain: bool = False
    on_hub: bool = False


@dataclass(frozen=True)
class _HubSet:
    """What `datasets.load_dataset` is asked for; `joined`: all records are one document."""

    name: str
    split: str = "train"
    config: str | None = None
    file: str | None = None
    joined: bool = False


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


def calibration_rows(
    sources: Sequence[DataSource],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    nsamples: int | None,
    seqlen: int,
    seed: int,
    text_key: str = "text",
    mode: Mode = "packed",
) -> Rows:
    """Rows to calibrate and train on, in an order shuffled by `seed`.

    Sources share the rows by weight. Where a text gives more rows than asked, one is drawn from
    each of `nsamples` equal parts of it. The order is random, so the last rows can validate.

    Args:
        sources: at least one.
        tokenizer: of the model; its own special tokens surround every document.
        nsamples: rows in all; None takes 320, or as many as the texts give (at least 8).
        seqlen: tokens per row.
        seed: of the choice of rows and of their order; the global generator is not touched.
        text_key: of the text in JSON, parquet and Hub records; records without it may have
            `messages`, which go through the tokenizer's chat template.
        mode: "packed" concatenates documents and cuts them to rows; "documents" takes one random
            window from each document longer than `seqlen` (RILQ's and GPTQ's rule).

    Raises:
        DatasetError: a source is missing, unreadable, damaged or too short.
        OptionError: no source, no row, or rows of less than two tokens.
    """
    rows = DEFAULT_ROWS if nsamples is None else nsamples
    if not sources or rows < 1 or seqlen < 2:
        raise OptionError(f"{len(sources)} sources, {rows} rows of {seqlen} tokens: no calibration")
    draw = torch.Generator().manual_seed(seed)
    opened = [_open(source, tokenizer, text_key, seed) for source in sources]
    parts, notes = [], []
    for source, share in zip(opened, _shares([s.weight for s in sources], rows), strict=True):
        if not share:
            notes.append(f"{source.label}: its weight gives it none of {rows} rows")
            continue
        least = share if nsamples is not None else MINIMUM_ROWS if len(opened) == 1 else 1
        part = _take(source, tokenizer, share, least, seqlen, draw, mode)
        if len(part) < share:
            notes.append(f"{source.label}: {len(part)} rows of {seqlen} tokens, not {share}")
        parts.append(part)
    tokens = torch.cat(parts)
    if nsamples is None and len(tokens) < MINIMUM_ROWS:
        raise DatasetError(
            f"{', '.join(source.name for source in opened)}: have {len(tokens)} rows of {seqlen} "
            f"tokens together, need {MINIMUM_ROWS}\n  use more text, or a smaller --seqlen"
        )
    tokens = tokens[torch.randperm(len(tokens), generator=draw)]
    return _rows(tokens, notes, opened)


def evaluation_rows(
    source: DataSource,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    seqlen: int,
    text_key: str = "text",
) -> Rows:
    """All non-overlapping windows of a text, in order; the last partial one is dropped.

    Of a Hub stream (other than `wikitext2`, which is read whole) the first 256 windows are taken.

    Raises:
        DatasetError: the source is missing, unreadable, damaged, or shorter than one window.
        OptionError: windows of less than two tokens.
    """
    if seqlen < 2:
        raise OptionError(f"evaluation windows of {seqlen} tokens predict nothing")
    opened = _open(source, tokenizer, text_key, seed=None)
    limit = HUB_EVALUATION_ROWS if opened.on_hub else None
    tokens, found = _packed(_tokens(opened, tokenizer), seqlen, limit)
    if not len(tokens):
        raise DatasetError(_too_short(opened.name, found, 1, seqlen))
    notes = [f"{opened.label}: the first {limit} windows"] if len(tokens) == limit else []
    return _rows(tokens, notes, [opened])


# ---- tokens into rows ---------------------------------------------------------------------------


def _rows(tokens: Tensor, notes: Sequence[str], opened: Sequence[_Opened]) -> Rows:
    tokens = tokens.to(torch.int64).contiguous()
    state = xxhash.xxh3_128(repr(tuple(tokens.shape)).encode())
    state.update(tokens.numpy().astype("<i8", copy=False).data)
    labels = tuple(source.label for source in opened)
    return Rows(tokens, str(state.hexdigest()), tuple(notes), labels)


def _shares(weights: Sequence[float], rows: int) -> list[int]:
    """Whole rows by weight; what rounding down leaves goes to the largest remainders."""
    exact = [rows * weight / sum(weights) for weight in weights]
    shares = [int(part) for part in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])
    for i in by_remainder[: rows - sum(shares)]:
        shares[i] += 1
    return shares


def _take(
    source: _Opened,
    tokenizer: "PreTrainedTokenizerBase",
    rows: int,
    least: int,
    seqlen: int,
    draw: torch.Generator,
    mode: Mode,
) -> Tensor:
    """`least` to `rows` rows of one source, `[n, seqlen]`: as many as it gives."""
    # A Hub stream is already a random choice of documents: no more of it than needed.
    limit = rows if source.on_hub else rows * _OVERSAMPLE
    stream = _tokens(source, tokenizer)
    if mode == "documents" and source.plain:
        raise DatasetError(
            f"{source.name}: plain text is one document, and this takes one row from each\n"
            "  use --rows packed, or a .jsonl or .parquet file with a document per record"
        )
    if mode == "documents":
        found, have = _windows(stream, seqlen, limit, draw)
        short = _too_few_documents(source.name, have, least, seqlen)
    else:
        found, have = _packed(stream, seqlen, limit)
        short = _too_short(source.name, have, least, seqlen)
    if len(found) < least:
        raise DatasetError(short)
    return found[_spread(len(found), min(rows, len(found)), draw)]


def _too_short(name: str, tokens: int, rows: int, seqlen: int) -> str:
    fewer = f", --nsamples {tokens // seqlen}" if tokens >= seqlen else ""
    return (
        f"{name}: has {tokens} tokens, needs {rows * seqlen} ({rows} rows of {seqlen})\n"
        f"  use more text{fewer} or a smaller --seqlen"
    )


def _too_few_documents(name: str, documents: int, rows: int, seqlen: int) -> str:
    fewer = f", --nsamples {documents}" if documents else ""
    return (
        f"{name}: has {documents} documents longer than {seqlen} tokens, needs {rows}\n"
        f"  use --rows packed, more text{fewer} or a smaller --seqlen"
    )


def _packed(stream: Iterator[Tensor], seqlen: int, limit: int | None) -> tuple[Tensor, int]:
    """Concatenate, cut to at most `limit` rows `[n, seqlen]`; and the number of tokens read."""
    parts: list[Tensor] = []
    total = 0
    for ids in stream:
        parts.append(ids)
        total += len(ids)
        if limit is not None and total >= limit * seqlen:
            break
    rows = total // seqlen if limit is None else min(limit, total // seqlen)
    return torch.cat(parts)[: rows * seqlen].view(rows, seqlen), total


def _windows(
    stream: Iterator[Tensor], seqlen: int, limit: int, draw: torch.Generator
) -> tuple[Tensor, int]:
    """One random window from each document longer than `seqlen`; and how many there were."""
    windows: list[Tensor] = []
    for ids in stream:
        if len(ids) > seqlen:
            start = _pick(len(ids) - seqlen + 1, draw)
            windows.append(ids[start : start + seqlen].clone())  # lets go of the document
            if len(windows) == limit:
                break
    if not windows:
        return torch.empty((0, seqlen), dtype=torch.int32), 0
    return torch.stack(windows), len(windows)


def _spread(total: int, wanted: int, draw: torch.Generator) -> list[int]:
    """A random index from each of `wanted` equal parts of `range(total)`."""
    edges = [total * k // wanted for k in range(wanted + 1)]
    return [low + _pick(high - low, draw) for low, high in pairwise(edges)]


def _pick(count: int, draw: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=draw))


# ---- texts into tokens --------------------------------------------------------------------------


def _tokens(source: _Opened, tokenizer: "PreTrainedTokenizerBase") -> Iterator[Tensor]:
    """Token ids `[n]` int32 of each document (of each piece of a long one); at least one."""
    empty = True
    for batch in _batches(source.texts):
        empty = False
        if len(batch[0].text) > _PIECE:
            yield from _encode_long(tokenizer, batch[0])
            continue
        yield from _encode(tokenizer, [text.text for text in batch], batch[0].specials)
    if empty:
        raise DatasetError(
            f"{source.name}: holds no text (it is empty, or white space only)\n"
            "  use a file with text, or --dataset c4"
        )


def _batches(texts: Iterable[_Text]) -> Iterator[list[_Text]]:
    """Texts to tokenize together: of one kind, few, and short in all; a long one comes alone."""
    batch: list[_Text] = []
    size = 0
    for text in texts:
        if not text.text.strip():
            continue
        full = len(batch) == _BATCH or size + len(text.text) > _PIECE
        if batch and (full or batch[0].specials != text.specials):
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text.text)
    if batch:
        yield batch


def _encode(tokenizer: "PreTrainedTokenizerBase", texts: list[str], specials: bool) -> list[Tensor]:
    """Token ids `[n]` int32 of each text."""
    # verbose=False: no warning that a text is longer than the model's context; rows are not.
    encoded = tokenizer(
        texts, add_special_tokens=specials, return_attention_mask=False, verbose=False
    )
    lists = encoded["input_ids"]
    # The order matters: tensors made while the encodings live, or integers that outlive this
    # call, fragment the heap (measured: 120 MB more with each piece of a long text).
    del encoded
    return [torch.tensor(ids, dtype=torch.int32) for ids in lists]


def _encode_long(tokenizer: "PreTrainedTokenizerBase", text: _Text) -> Iterator[Tensor]:
    """Token ids `[n]` int32 of the pieces of one document that is too long for a single call."""
    before, after = _specials(tokenizer) if text.specials else (torch.empty(0).int(),) * 2
    yield before
    chunks = (text.text[i : i + _CHUNK] for i in range(0, len(text.text), _CHUNK))
    for piece in _pieces(chunks):
        yield from _encode(tokenizer, [piece], specials=False)
    yield after


def _specials(tokenizer: "PreTrainedTokenizerBase") -> tuple[Tensor, Tensor]:
    """The special tokens that the tokenizer puts before and after a text."""
    (bare,), (full,) = _encode(tokenizer, ["a"], False), _encode(tokenizer, ["a"], True)
    places = range(len(full) - len(bare) + 1)
    at = next((i for i in places if full[i : i + len(bare)].equal(bare)), 0)
    return full[:at], full[at + len(bare) :]


def _pieces(chunks: Iterable[str]) -> Iterator[str]:
    """The same text in pieces of at most `_PIECE` characters, cut where tokens end."""
    pending = ""
    for chunk in chunks:
        pending += chunk
        while len(pending) > _PIECE:
            # Far enough back to find a space in any prose, near enough to be quick.
            places = [match.start() for match in _CUT.finditer(pending, _PIECE - 65536, _PIECE)]
            cut = places[-1] if places else _PIECE
            yield pending[:cut]
            pending = pending[cut:]
    if pending:
        yield pending


# ---- sources into texts -------------------------------------------------------------------------


def _open(
    source: DataSource, tokenizer: "PreTrainedTokenizerBase", text_key: str, seed: int | None
) -> _Opened:
    """Find a source, and refuse at once what is missing or empty; `seed` None evaluates."""
    hub = _hub_set(source.location, evaluating=seed is None)
    if hub is not None:
        revision = _revision(hub.name)
        label = ":".join(filter(None, (f"{hub.name}@{revision[:12]}", hub.config, hub.split)))
        texts = _record_texts(_hub_records(hub, revision), tokenizer, text_key)
        if hub.joined:
            return _Opened(source.location, label, _joined(texts))
        if seed is not None:
            texts = _shuffled(texts, torch.Generator().manual_seed(seed))
        return _Opened(source.location, label, texts, on_hub=True)
    path = Path(os.path.expanduser(source.location))
    label = f"{path.name}@xxh3:{_content_hash(path)}"
    if path.suffix.lower() in _LINE_SUFFIXES:
        texts = _record_texts(_json_records(path), tokenizer, text_key)
    elif path.suffix.lower() == ".parquet":
        texts = _record_texts(_parquet_records(path, text_key), tokenizer, text_key)
    else:
        texts = (_Text(piece, specials=False) for piece in _pieces(_decoded(path)))
        return _Opened(str(path), label, texts, plain=True)
    return _Opened(str(path), label, texts)


def _record_texts(
    records: Iterable[_Record], tokenizer: "PreTrainedTokenizerBase", text_key: str
) -> Iterator[_Text]:
    """The text of each record, or its `messages` rendered by the chat template."""
    for where, record in records:
        key = text_key if record.get(text_key) is not None else "messages"
        content = record.get(key)
        if isinstance(content, str):
            # JSON can spell half a surrogate pair, which no tokenizer takes.
            yield _Text(content.encode("utf-8", "replace").decode(), specials=True)
        elif isinstance(content, list):
            # The template writes the special tokens itself.
            yield _Text(_render(content, tokenizer, where), specials=False)
        elif content is not None or text_key not in record:
            raise DatasetError(
                f"{where}: no text under {text_key!r}; keys: {', '.join(map(repr, record))[:200]}\n"
                "  name the right one with --text-key"
            )


def _render(messages: list[Any], tokenizer: "PreTrainedTokenizerBase", where: str) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise DatasetError(
            f"{where}: holds chat messages, but the model's tokenizer has no chat template\n"
            "  use records with a text, or a model with chat_template.jinja"
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as err:  # whatever a template from a checkpoint may raise
        raise DatasetError(
            f"{where}: the chat template refuses these messages: {_one_line(err)}\n"
            "  mend or drop this record"
        ) from err


def _one_line(err: BaseException) -> str:
    return (" ".join(str(err).split()) or type(err).__name__)[:200]


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


def _json_records(path: Path) -> Iterator[_Record]:
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
                raise _not_a_record(path, number, _one_line(err)) from err
            if not isinstance(record, dict):
                raise _not_a_record(path, number, f"a {type(record).__name__}")
            if text:
                yield f"{path} line {number}", record
            fed += len(line)


def _parquet_records(path: Path, text_key: str) -> Iterator[_Record]:
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
        raise DatasetError(f"{path}: cannot be read as parquet: {_one_line(err)}") from err


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


# ---- the Hub ------------------------------------------------------------------------------------


def _hub_set(location: str, evaluating: bool) -> _HubSet | None:
    """What a location means on the Hub; None where it is a path.

    A name on the Hub never looks at the folder one happens to be in, except that an existing
    path `owner/name` wins; `./c4` is a file of that name.
    """
    if location == "c4":
        if evaluating:
            file = "en/c4-validation.00000-of-00008.json.gz"
            return _HubSet("allenai/c4", "validation", file=file)
        return _HubSet("allenai/c4", file="en/c4-train.00000-of-01024.json.gz")
    if location == "wikitext2":
        split = "test" if evaluating else "train"
        return _HubSet("Salesforce/wikitext", split, "wikitext-2-raw-v1", joined=True)
    is_file = location.lower().endswith(_FILE_SUFFIXES) or os.path.exists(location)
    return None if is_file or not _HUB_NAME.fullmatch(location) else _HubSet(location)


def _revision(name: str) -> str:
    """The commit of a Hub dataset: pins the stream, and fails quickly without a network."""
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(name, timeout=_PATIENCE / 4).sha)
    except Exception as err:  # httpx, httpx2, requests or the Hub's own, as versions go by
        raise _hub_failure(name, err) from err


def _hub_records(hub: _HubSet, revision: str) -> Iterator[_Record]:
    with _quiet_hub():
        try:
            for number, record in enumerate(_patient(_stream(hub, revision), _PATIENCE), 1):
                yield f"{hub.name} record {number}", record
        except Exception as err:  # any exception of datasets, fsspec, pyarrow or the HTTP client
            raise _hub_failure(hub.name, err) from err


def _stream(hub: _HubSet, revision: str) -> Iterator[Mapping[str, Any]]:
    import datasets

    files = {hub.split: hub.file} if hub.file else None
    yield from datasets.load_dataset(
        hub.name,
        hub.config,
        data_files=files,
        split=hub.split,
        revision=revision,
        streaming=True,
    )


def _hub_failure(name: str, err: Exception) -> DatasetError:
    return DatasetError(
        f"{name}: cannot be read from the Hub ({_one_line(err)}); "
        "check the name and the network, or give a local file: --dataset FILE"
    )


def _joined(texts: Iterable[_Text]) -> Iterator[_Text]:
    """One document of all, joined as GPTQ's and most papers' WikiText-2 code does."""
    yield _Text("\n\n".join(text.text for text in texts), specials=True)


def _shuffled(texts: Iterable[_Text], draw: torch.Generator) -> Iterator[_Text]:
    """The same texts, each picked at random from a buffer of the next ones."""
    buffer: list[_Text] = []
    size = 0
    for text in texts:
        buffer.append(text)
        size += len(text.text)
        if len(buffer) == _SHUFFLE or size > _PIECE:
            picked = buffer.pop(_pick(len(buffer), draw))
            size -= len(picked.text)
            yield picked
    for index in torch.randperm(len(buffer), generator=draw).tolist():
        yield buffer[index]


def _patient(items: Iterable[T], seconds: float) -> Iterator[T]:
    """The same items, read ahead on a thread; TimeoutError if the next one takes too long.

    The client libraries retry for minutes and have no switch for it; a daemon thread may be left
    behind in such a wait without holding up the program's end.
    """
    ready: queue.Queue[tuple[T | None, Exception | None]] = queue.Queue(maxsize=_BATCH)
    stop = threading.Event()

    def deliver(item: T | None, error: Exception | None) -> None:
        while not stop.is_set():
            try:
                return ready.put((item, error), timeout=0.2)
            except queue.Full:
                continue

    def pump() -> None:
        try:
            for item in items:
                deliver(item, None)
                if stop.is_set():
                    return
            deliver(None, None)
        except Exception as err:  # raised again where the items are wanted
            deliver(None, err)

    threading.Thread(target=pump, name="rilq-hub", daemon=True).start()
    try:
        while True:
            item, error = ready.get(timeout=seconds)
            if error is not None:
                raise error
            if item is None:
                return
            yield item
    except queue.Empty as err:
        raise TimeoutError(f"no answer for {seconds:.0f} s") from err
    finally:
        stop.set()


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """No progress bars and no retry messages of the client libraries; what was set comes back."""
    import datasets
    from huggingface_hub.utils import logging as hub_logging

    bars = datasets.are_progress_bars_disabled()
    levels = [(log, log.get_verbosity()) for log in (datasets.logging, hub_logging)]
    datasets.disable_progress_bars()
    for log, _ in levels:
        log.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        for log, level in levels:
            log.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()
