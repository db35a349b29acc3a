"""The tokenizer of a checkpoint as GGUF metadata: vocabulary, merges, special tokens, template.

Two kinds are known to llama.cpp and to the architectures here: byte-level BPE ("gpt2"), whose
merges are stored, and SentencePiece's BPE ("llama"), where each token has a score and the pair
whose union scores highest is merged first. tokenizer.json holds merges for both, so the scores are
made of their order, which SentencePiece's own scores have too.

Types and special tokens follow llama.cpp's converter (conversion/base.py).
"""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from transformers import AutoTokenizer

from rilq.errors import CheckpointError, one_line
from rilq.formats.export.gguf_pretokenizer import find_pre_tokenizer
from rilq.progress import Reporter

_SPACE = "▁"  # SentencePiece's
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# Added tokens that steer a model but are not marked special in some releases.
_STEERING = re.compile(r"<\|.*\|>|<｜.*｜>|<unused\d*>|<pad>|<mask>|<2mass>|\[@BOS@\]")
_NEVER_MERGED = -1e6  # below the score of any merge


@dataclass(frozen=True)
class Vocabulary:
    """What `tokenizer.ggml.*` says.

    Attributes:
        model: "llama" or "gpt2".
        pre: name of llama.cpp's pre-tokenizer.
        tokens: text of every token, as many as the embedding has rows.
        types: `gguf.TokenType` of each.
        scores: of each, for "llama"; empty for "gpt2".
        add_space_prefix: whether a text is encoded as if it began with a space.
        add_bos, add_eos: whether encoding a text puts these tokens around it.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...]
    add_space_prefix: bool
    add_bos: bool
    add_eos: bool


def read_vocabulary(folder: Path, rows: int, report: Reporter) -> Vocabulary:
    """Read the tokenizer of a checkpoint.

    Args:
        folder: holds tokenizer.json.
        rows: of the embedding; those beyond the tokenizer's tokens are named `[PAD<id>]`.
        report: warned where llama.cpp will cut text differently.

    Raises:
        CheckpointError: there is no tokenizer.json, or llama.cpp has no tokenizer of its kind.
    """
    raw = _read(folder)
    model, normalizer = raw["model"], json.dumps(raw.get("normalizer"))
    pre_tokenizer = json.dumps(raw.get("pre_tokenizer"))
    ids = {**model["vocab"], **{token["content"]: token["id"] for token in raw["added_tokens"]}}
    if (largest := max(ids.values())) >= rows:
        raise CheckpointError(
            f"{folder / 'tokenizer.json'}: has a token {largest}, but the embedding has {rows} "
            "rows\n  the tokenizer and the weights do not belong together"
        )
    if model.get("byte_fallback"):
        kind, pre, scores = "llama", "default", _scores(model, ids)
        prefix = '"Prepend"' in normalizer or (
            '"Metaspace"' in pre_tokenizer and '"never"' not in pre_tokenizer
        )
    elif '"ByteLevel"' in pre_tokenizer:
        found = find_pre_tokenizer(raw)
        if found.agreement < 1:
            report.warn(
                f"llama.cpp has no pre-tokenizer like this model's; {found.name!r} comes nearest "
                f"and finds {found.agreement:.0%} of the tokens of a difficult text: what is typed "
                "into llama.cpp may be cut into other tokens than in training"
            )
        kind, pre, scores, prefix = "gpt2", found.name, {}, False
    else:
        raise _unknown(folder, "neither byte-level BPE nor SentencePiece's BPE")
    texts, types = _tokens(raw, ids, rows)
    add_bos, add_eos = _around(folder)
    return Vocabulary(
        model=kind,
        pre=pre,
        tokens=tuple(texts),
        types=tuple(types),
        scores=tuple(scores.get(i, _NEVER_MERGED) for i in range(rows)) if scores else (),
        add_space_prefix=prefix,
        add_bos=add_bos,
        add_eos=add_eos,
    )


def add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary, folder: Path) -> None:
    """Add a vocabulary; merges, special tokens and chat template come from `folder`."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    # It warns of templates for pairs of texts, which nobody asks a language model for.
    logging.getLogger("gguf.vocab").setLevel(logging.ERROR)
    special = gguf.SpecialVocab(
        folder, load_merges=vocabulary.model == "gpt2", n_vocab=len(vocabulary.tokens)
    )
    special.add_special_token = {"bos": vocabulary.add_bos, "eos": vocabulary.add_eos}
    special.add_to_gguf(writer, quiet=True)
    writer.add_add_space_prefix(vocabulary.add_space_prefix)


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        kind, vocab, merges = (raw["model"].get(key) for key in ("type", "vocab", "merges"))
        if kind != "BPE":
            raise _unknown(folder, f"its kind is {kind}")
        if not (isinstance(vocab, dict) and vocab and isinstance(merges, list)):
            raise ValueError("its model has no vocabulary, or no merges")
        raw.setdefault("added_tokens", [])
        return dict(raw)
    except FileNotFoundError as err:
        raise CheckpointError(
            f"{path}: missing, and GGUF holds the tokenizer\n"
            "  load the tokenizer with transformers and save it there: that makes the file"
        ) from err
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
        raise CheckpointError(
            f"{path}: cannot be read: {one_line(err)}\n  download it again"
        ) from err


def _unknown(folder: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{folder / 'tokenizer.json'}: llama.cpp has no such tokenizer: {why}\n"
        "  export for another runtime: dense, gptq, mlx or vllm"
    )


def _scores(model: Mapping[str, Any], ids: Mapping[str, int]) -> dict[int, float]:
    """Token id to score: minus the place of the first merge that makes the token."""
    scores: dict[int, float] = {}
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        scores.setdefault(ids[left + right], -float(len(scores)))
    return scores


def _tokens(
    raw: Mapping[str, Any], ids: Mapping[str, int], rows: int
) -> tuple[list[str], list[int]]:
    """Text and type of every token."""
    texts = [f"[PAD{i}]" for i in range(rows)]
    types = [int(gguf.TokenType.UNUSED)] * rows
    unknown, fallback = raw["model"].get("unk_token"), raw["model"].get("byte_fallback")
    for text, token in ids.items():
        texts[token], types[token] = text, int(gguf.TokenType.NORMAL)
        if fallback and _BYTE.fullmatch(text):
            types[token] = int(gguf.TokenType.BYTE)
    for added in raw["added_tokens"]:
        text, token = added["content"], added["id"]
        if added.get("special") or _STEERING.fullmatch(text):
            types[token] = int(gguf.TokenType.CONTROL)
        else:
            texts[token] = text.replace(_SPACE, " ")  # llama.cpp finds it in the text as typed
            types[token] = int(gguf.TokenType.USER_DEFINED)
    if fallback and unknown in ids:
        types[ids[unknown]] = int(gguf.TokenType.UNKNOWN)
    return texts, types


def _around(folder: Path) -> tuple[bool, bool]:
    """Whether the tokenizer, as transformers loads it, begins a text with BOS and ends it with EOS.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        ids = tokenizer("a").input_ids
    except Exception as err:  # tokenizers raises bare Exception
        raise CheckpointError(
            f"{folder}: the tokenizer cannot be loaded: {one_line(err)}\n"
            "  check tokenizer.json and tokenizer_config.json, or download them again"
        ) from err
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return bos is not None and ids[0] == bos, eos is not None and ids[-1] == eos
