"""Documents on their way to the tokenizer: taken from records, shuffled, batched, cut.

A text of at most `_PIECE` characters is tokenized in one call, exactly as `tokenizer(text)` does
it. A longer one is cut before a space between two words (or after a line end, or, where there is
neither, anywhere). For byte-level BPE without a prefix space (GPT-2, Llama 3, Qwen) the tokens of
a cut before a space are those of the whole text; tokenizers that put a space before every text
(SentencePiece) get about one other token at each cut.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rilq.errors import DatasetError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Record = tuple[str, Mapping[str, Any]]  # where it stands, for messages; the record

_PIECE = 4 << 20  # characters; one to three million tokens, up to 700 MB inside the tokenizer
_BATCH = 64  # documents tokenized together, on several threads
_SHUFFLE = 1000  # documents in the buffer of a Hub stream
_CUT = re.compile(r"(?<=\S)(?= [^\W\d_])|(?<=\S\n)(?=\S)")


@dataclass(frozen=True)
class Text:
    """A document, or a piece of a plain text; `specials`: the tokenizer adds its own."""

    text: str
    specials: bool

    @property
    def long(self) -> bool:
        """Whether it is too long to be tokenized in a single call."""
        return len(self.text) > _PIECE


def record_texts(
    records: Iterable[Record], tokenizer: "PreTrainedTokenizerBase", text_key: str
) -> Iterator[Text]:
    """The text of each record, or its `messages` rendered by the chat template.

    Raises:
        DatasetError: a record has neither, or messages that the template refuses.
    """
    for where, record in records:
        key = text_key if record.get(text_key) is not None else "messages"
        content = record.get(key)
        if isinstance(content, str):
            # JSON can spell half a surrogate pair, which no tokenizer takes.
            yield Text(content.encode("utf-8", "replace").decode(), specials=True)
        elif isinstance(content, list):
            # The template writes the special tokens itself.
            yield Text(_render(content, tokenizer, where), specials=False)
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
            f"{where}: the chat template refuses these messages: {one_line(err)}\n"
            "  mend or drop this record"
        ) from err


def joined(texts: Iterable[Text], between: str) -> Iterator[Text]:
    """One document of all."""
    yield Text(between.join(text.text for text in texts), specials=True)


def shuffled(texts: Iterable[Text], draw: torch.Generator) -> Iterator[Text]:
    """The same texts, each picked at random from a buffer of the next ones."""
    buffer: list[Text] = []
    size = 0
    for text in texts:
        buffer.append(text)
        size += len(text.text)
        if len(buffer) == _SHUFFLE or size > _PIECE:
            picked = buffer.pop(int(torch.randint(len(buffer), (), generator=draw)))
            size -= len(picked.text)
            yield picked
    for index in torch.randperm(len(buffer), generator=draw).tolist():
        yield buffer[index]


def batches(texts: Iterable[Text]) -> Iterator[list[Text]]:
    """Texts to tokenize together: of one kind, few, and short in all; a long one comes alone."""
    batch: list[Text] = []
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


def pieces(chunks: Iterable[str]) -> Iterator[str]:
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
