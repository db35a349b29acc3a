"""Text into token rows, with a seed and a content hash.

Documents become tokens; tokens become rows. How much of a text is read:

- For calibration a local source is read until it has given `_OVERSAMPLE` times the rows asked,
  and the rows are spread over what was read. A Hub stream is shuffled through a buffer and read
  until there are enough rows.
- In mode "documents" each piece of a document that has to be cut (see `rilq.calib.texts`) counts
  as a document.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import torch
import xxhash
from torch import Tensor

from rilq.calib.sources import DataSource, Opened, open_texts
from rilq.calib.texts import Text, batches, pieces
from rilq.errors import DatasetError, OptionError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Mode = Literal["packed", "documents"]

DEFAULT_ROWS = 320  # 256 to train and 64 to validate (RILQ's code)
MINIMUM_ROWS = 8  # one effective batch
HUB_EVALUATION_ROWS = 256  # what the field takes of C4's validation split (GPTQ's code)
FIELD_SEQLEN = 2048  # the field's context for perplexity figures

_OVERSAMPLE = 8
_CHUNK = 1 << 20  # characters of a long document that are looked at together


@dataclass(frozen=True)
class Rows:
    """Token rows, and what they came from.

    Attributes:
        tokens: `[rows, seq_len]` int64.
        digest: xxh3_128 of the shape and the tokens, in hex.
        notes: what the user should know, one line each.
        sources: labels without any path of this machine: `name@xxh3:hash`, `owner/name@commit:…`.
        text_bytes: UTF-8 bytes of the text that the tokens of evaluation rows stand for; None for
            other rows, and if the tokenizer cannot say where in the text its tokens lie.
    """

    tokens: Tensor
    digest: str
    notes: tuple[str, ...]
    sources: tuple[str, ...]
    text_bytes: int | None = None


@dataclass(frozen=True)
class _Encoded:
    """Token ids `[n]` int32 of a text, and the text; special tokens may be among them."""

    ids: Tensor
    text: str = ""
    specials: bool = False


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
    opened = [open_texts(source, tokenizer, text_key, seed) for source in sources]
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

    `wikitext2` and `c4` come in the field's form (`rilq.calib.sources`). Of a Hub stream, `c4` too,
    the first 256 windows are taken.

    Raises:
        DatasetError: the source is missing, unreadable, damaged, or shorter than one window.
        OptionError: windows of less than two tokens.
    """
    if seqlen < 2:
        raise OptionError(f"evaluation windows of {seqlen} tokens predict nothing")
    opened = open_texts(source, tokenizer, text_key, seed=None)
    limit = HUB_EVALUATION_ROWS if opened.on_hub else None
    size = _TextSize(tokenizer, seqlen, limit)
    tokens, found = _packed(size.watched(_encoded(opened, tokenizer)), seqlen, limit)
    if not len(tokens):
        raise DatasetError(_too_short(opened.name, found, 1, seqlen))
    rows = _rows(tokens, _evaluation_notes(opened, len(tokens), seqlen, limit), [opened])
    return replace(rows, text_bytes=size.total())


def _evaluation_notes(
    opened: Opened, windows: int, seqlen: int, limit: int | None
) -> Iterator[str]:
    first = "the first " if windows == limit else ""
    yield f"{opened.label}: {first}{windows} windows of {seqlen} tokens that do not overlap"
    if opened.form:
        yield f"{opened.name}: {opened.form}, as in the field's published figures" + (
            "" if seqlen == FIELD_SEQLEN else f", which have windows of {FIELD_SEQLEN} tokens"
        )


class _TextSize:
    """Counts the bytes of text that whole windows take from a stream of texts.

    Args:
        tokenizer: that encoded them.
        seqlen: tokens of a window.
        limit: windows at most.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", seqlen: int, limit: int | None
    ) -> None:
        self._tokenizer, self._seqlen, self._limit = tokenizer, seqlen, limit
        self._tokens = self._bytes = 0  # of the texts that lie in whole windows
        self._pending: deque[_Encoded] = deque()  # those that follow
        self._read = 0

    def watched(self, stream: Iterator[_Encoded]) -> Iterator[Tensor]:
        """The token ids of each text, counted."""
        for each in stream:
            self._pending.append(each)
            self._read += len(each.ids)
            while self._pending and len(self._pending[0].ids) <= self._left:
                whole = self._pending.popleft()
                self._tokens += len(whole.ids)
                self._bytes += len(whole.text.encode())
            yield each.ids

    @property
    def _left(self) -> int:
        """Tokens in whole windows that are not counted yet."""
        windows = self._read // self._seqlen
        return min(windows, self._limit or windows) * self._seqlen - self._tokens

    def total(self) -> int | None:
        """Bytes in the windows; None if the tokenizer does not know where in a text a token is."""
        if not self._left:
            return self._bytes
        if not self._tokenizer.is_fast:
            return None
        last = self._pending[0]
        places = self._tokenizer(
            last.text,
            add_special_tokens=last.specials,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )["offset_mapping"][: self._left]
        end = max(end for _, end in places)  # special tokens lie at 0
        return self._bytes + len(last.text[:end].encode())


# ---- tokens into rows ---------------------------------------------------------------------------


def _rows(tokens: Tensor, notes: Iterable[str], opened: Sequence[Opened]) -> Rows:
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
    source: Opened,
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


def _packed(stream: Iterable[Tensor], seqlen: int, limit: int | None) -> tuple[Tensor, int]:
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


def _tokens(source: Opened, tokenizer: "PreTrainedTokenizerBase") -> Iterator[Tensor]:
    """Token ids `[n]` int32 of each document (of each piece of a long one); at least one."""
    return (each.ids for each in _encoded(source, tokenizer))


def _encoded(source: Opened, tokenizer: "PreTrainedTokenizerBase") -> Iterator[_Encoded]:
    """Likewise, each with its text."""
    empty = True
    for batch in batches(source.texts):
        empty = False
        if batch[0].long:
            yield from _encode_long(tokenizer, batch[0])
            continue
        found, specials = [text.text for text in batch], batch[0].specials
        for text, ids in zip(found, _encode(tokenizer, found, specials), strict=True):
            yield _Encoded(ids, text, specials)
    if empty:
        raise DatasetError(
            f"{source.name}: holds no text (it is empty, or white space only)\n"
            "  use a file with text, or --dataset c4"
        )


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


def _encode_long(tokenizer: "PreTrainedTokenizerBase", text: Text) -> Iterator[_Encoded]:
    """The pieces of one document that is too long for a single call."""
    before, after = _specials(tokenizer) if text.specials else (torch.empty(0).int(),) * 2
    yield _Encoded(before)
    chunks = (text.text[i : i + _CHUNK] for i in range(0, len(text.text), _CHUNK))
    for piece in pieces(chunks):
        yield from (_Encoded(ids, piece) for ids in _encode(tokenizer, [piece], specials=False))
    yield _Encoded(after)


def _specials(tokenizer: "PreTrainedTokenizerBase") -> tuple[Tensor, Tensor]:
    """The special tokens that the tokenizer puts before and after a text."""
    (bare,), (full,) = _encode(tokenizer, ["a"], False), _encode(tokenizer, ["a"], True)
    places = range(len(full) - len(bare) + 1)
    at = next((i for i in places if full[i : i + len(bare)].equal(bare)), 0)
    return full[:at], full[at + len(bare) :]
