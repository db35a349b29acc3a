"""Which of llama.cpp's pre-tokenizers cuts text as a tokenizer.json does.

llama.cpp does not read the pattern that a BPE tokenizer cuts text with before it merges: a GGUF
file holds the name of one that is built into it (`tokenizer.ggml.pre`). Its own converter finds the
name by a hash of the tokens of a text, which knows released vocabularies only. Here each name's
pattern is put into the tokenizer, and both are tried on a text.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

# The patterns as the models' own tokenizer.json files have them; llama.cpp's are written to do the
# same. Read in the public tokenizers of Llama 3, Qwen2, Mistral NeMo and GPT-4o.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SYMBOLS_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*",
)
_LLAMA3 = "|".join([_CONTRACTIONS, _WORDS, r"\p{N}{1,3}", _SYMBOLS, _REST])
_QWEN2 = "|".join([_CONTRACTIONS, _WORDS, r"\p{N}", _SYMBOLS, _REST])
_TEKKEN = "|".join([*_CASED, r"\p{N}", _SYMBOLS_SLASH, _REST])
_GPT4O = "|".join(
    [*(cased + _CONTRACTIONS + "?" for cased in _CASED), r"\p{N}{1,3}", _SYMBOLS_SLASH, _REST]
)

# Has every kind of piece that those patterns tell apart, in and out of words.
DIFFICULT = (
    "The cat's here; THEY'RE not, we'LL see, it'd be I'Ve been.\n\n\nfor (int i=0; i<1024; ++i) {\n"
    "\treturn a[i] /* 3.14159 */ ;\n    }\r\n  2024-05-01 12345678 1 22 333 4444 ,,, ... !?!? \n \n"
    "camelCase HTTPServer XMLHttpRequest's url://x/y/z\n\n/path  ÜBER naïve Ѓорѓи Αθήνα "
    "\u0939\u093f\u0928\u094d\u0926\u0940 \u4f60\u597d\uff0c\u4e16\u754c3\u4e2a "
    "\u3053\u3093\u306b\u3061\u306f \U0001f999\U0001f680\u200d \u00bd \u2167 x\u00b2    "
)


@dataclass(frozen=True)
class PreTokenizer:
    """What a GGUF file says about cutting.

    Attributes:
        name: for `tokenizer.ggml.pre`.
        agreement: share of the tokens of a difficult text that llama.cpp will find as well, 0..1.
    """

    name: str
    agreement: float


def split(pattern: str) -> dict[str, Any]:
    """The pre-tokenizer of a byte-level BPE that cuts by a pattern."""
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [cut, _byte_level(use_regex=False)]}


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
    plain = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {**plain, "use_regex": use_regex}


_DIGITS = {"type": "Digits", "individual_digits": True}

# llama.cpp's name to the same pre-tokenizer here, and whether words that are tokens skip merging.
KNOWN: Mapping[str, tuple[dict[str, Any], bool]] = {
    "gpt-2": (_byte_level(use_regex=True), False),
    "llama-bpe": (split(_LLAMA3), True),
    "dbrx": (split(_LLAMA3), False),
    "qwen2": (split(_QWEN2), False),
    "tekken": (split(_TEKKEN), True),
    "gpt-4o": (split(_GPT4O), False),
    "smollm": (
        {"type": "Sequence", "pretokenizers": [_DIGITS, _byte_level(use_regex=True)]},
        False,
    ),
}


def find_pre_tokenizer(tokenizer: Mapping[str, Any]) -> PreTokenizer:
    """The one of llama.cpp's that comes nearest to a byte-level BPE tokenizer.

    Args:
        tokenizer: tokenizer.json.
    """
    # Among equals the one whose definition is the same: a small vocabulary may not tell them apart.
    plain = {**tokenizer, "post_processor": None, "truncation": None, "padding": None}
    wanted = _token_ends(plain)
    scores = {}
    for name, (pre_tokenizer, ignore_merges) in KNOWN.items():
        model = {**tokenizer["model"], "ignore_merges": ignore_merges}
        found = _token_ends({**plain, "pre_tokenizer": pre_tokenizer, "model": model})
        same = _pattern_of(pre_tokenizer) == _pattern_of(tokenizer["pre_tokenizer"])
        same_merges = ignore_merges == bool(tokenizer["model"].get("ignore_merges"))
        scores[name] = (len(wanted & found) / len(wanted), same, same_merges)
    best = max(scores, key=lambda name: scores[name])
    return PreTokenizer(best, scores[best][0])


def _token_ends(tokenizer: Mapping[str, Any]) -> set[tuple[int, int, int]]:
    """Tokens of the text with their places."""
    encoded = Tokenizer.from_str(json.dumps(tokenizer)).encode(DIFFICULT, add_special_tokens=False)
    ends, place = set(), 0
    for token, text in zip(encoded.ids, encoded.tokens, strict=True):
        ends.add((place, place + len(text), token))  # byte-level: a character is a byte
        place += len(text)
    return ends


def _pattern_of(pre_tokenizer: Mapping[str, Any] | None) -> list[Any]:
    """What decides where a pre-tokenizer cuts, in comparable form."""
    given = pre_tokenizer or {}
    parts = given.get("pretokenizers", [given])
    keys = ("type", "pattern", "behavior", "individual_digits", "use_regex")
    return [[part.get(key) for key in keys] for part in parts]
