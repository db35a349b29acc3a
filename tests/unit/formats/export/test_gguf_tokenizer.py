"""What a GGUF file says of a tokenizer."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizer_examples import byte_level, sentencepiece
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rilq.errors import CheckpointError
from rilq.formats.export.gguf_pretokenizer import KNOWN, find_pre_tokenizer, split
from rilq.formats.export.gguf_tokenizer import read_vocabulary
from rilq.progress import SilentReporter

KIND = gguf.TokenType


class Warnings(SilentReporter):
    """Keeps what it is warned of."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


@pytest.fixture
def spm(tmp_path: Path, text: str) -> Path:
    """A folder with a tokenizer of SentencePiece's kind."""
    sentencepiece(text).save_pretrained(tmp_path)
    return tmp_path


def definition(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """tokenizer.json."""
    return dict(json.loads(tokenizer.backend_tokenizer.to_str()))


@pytest.mark.parametrize("name", KNOWN)
def test_a_tokenizer_with_a_known_pattern_gets_its_name(name: str, text: str) -> None:
    found = find_pre_tokenizer(definition(byte_level(text, *KNOWN[name])))
    assert (found.name, found.agreement) == (name, 1.0)


def test_a_pattern_written_otherwise_is_found_by_what_it_does(text: str) -> None:
    pattern = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    found = find_pre_tokenizer(definition(byte_level(text, split(pattern), False)))
    assert (found.name, found.agreement) == ("gpt-2", 1.0)


def test_an_unknown_pattern_gets_the_nearest_name_and_a_warning_with_the_agreement(
    tmp_path: Path, text: str
) -> None:
    byte_level(text, split(r"\p{N}{2}|\p{L}+"), False).save_pretrained(tmp_path)
    report = Warnings()
    assert read_vocabulary(tmp_path, 600, report).pre in KNOWN
    (warning,) = report.warnings
    assert "llama.cpp has no pre-tokenizer like this model's" in warning
    share = int(warning.partition("finds ")[2].partition("%")[0])
    assert 20 < share < 100


def test_byte_level_vocabulary_has_the_tokens_and_pads_up_to_the_embedding(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.save_pretrained(tmp_path)
    found = read_vocabulary(tmp_path, 325, SilentReporter())
    ids = tokenizer.get_vocab()
    assert {found.tokens[i]: i for i in range(len(ids))} == ids
    assert found.tokens[len(ids) :] == tuple(f"[PAD{i}]" for i in range(len(ids), 325))
    assert [found.types[ids[t]] for t in ("<s>", "</s>", "<pad>")] == [KIND.CONTROL] * 3
    assert set(found.types[len(ids) :]) == {KIND.UNUSED}
    assert (found.model, found.scores, found.add_bos, found.add_eos) == ("gpt2", (), False, False)


def test_sentencepiece_scores_fall_in_the_order_of_the_merges(spm: Path) -> None:
    found = read_vocabulary(spm, 512, SilentReporter())
    raw = json.loads((spm / "tokenizer.json").read_text())["model"]
    made = [raw["vocab"]["".join(pair)] for pair in raw["merges"]]
    assert [found.scores[i] for i in made] == sorted((found.scores[i] for i in made), reverse=True)
    never = set(range(512)) - set(made)
    assert max(found.scores[i] for i in never) < min(found.scores[i] for i in made)


def test_sentencepiece_tokens_have_the_types_that_llama_cpp_expects(spm: Path) -> None:
    found = read_vocabulary(spm, 512, SilentReporter())
    types = dict(zip(found.tokens, found.types, strict=True))
    assert (found.model, found.pre, found.add_space_prefix) == ("llama", "default", True)
    assert [types[t] for t in ("<unk>", "<s>", "</s>")] == [
        KIND.UNKNOWN,
        KIND.CONTROL,
        KIND.CONTROL,
    ]
    assert types["<0x0A>"] == KIND.BYTE and types[found.tokens[-1]] == KIND.NORMAL


def merge_by_score(text: str, tokens: tuple[str, ...], scores: tuple[float, ...]) -> list[int]:
    """SentencePiece's rule, as llama.cpp has it: the best-scored pair first, the left of equals."""
    ids = {token: i for i, token in enumerate(tokens)}
    pieces = list("▁" + text.replace(" ", "▁"))
    while True:
        joined = [a + b for a, b in zip(pieces, pieces[1:], strict=False)]
        pairs = [(scores[ids[piece]], -i) for i, piece in enumerate(joined) if piece in ids]
        if not pairs:
            return [ids[piece] for piece in pieces]
        place = -max(pairs)[1]
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]


def test_merging_by_score_gives_the_tokens_of_the_tokenizer(spm: Path) -> None:
    found = read_vocabulary(spm, 512, SilentReporter())
    theirs = Tokenizer.from_file(str(spm / "tokenizer.json"))
    for sentence in ("the cat slept under the old house", "tree tree sang  today", "birds"):
        assert merge_by_score(sentence, found.tokens, found.scores) == theirs.encode(sentence).ids


def test_added_tokens_that_are_typed_are_user_defined_and_steering_ones_are_control(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    raw = json.loads(path.read_text())
    for i, (content, special) in enumerate(
        (("<|turn|>", False), ("<tool>", False), ("<call>", True)), start=320
    ):
        raw["added_tokens"].append(
            {**raw["added_tokens"][0], "id": i, "content": content, "special": special}
        )
    path.write_text(json.dumps(raw))
    found = read_vocabulary(tmp_path, 323, SilentReporter())
    assert found.tokens[320:] == ("<|turn|>", "<tool>", "<call>")
    assert found.types[320:] == (KIND.CONTROL, KIND.USER_DEFINED, KIND.CONTROL)


def test_bos_is_added_where_the_tokenizer_adds_it(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    raw = json.loads(path.read_text())
    parts = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    raw["post_processor"] = {
        "type": "TemplateProcessing",
        "single": parts,
        "pair": [*parts, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }
    path.write_text(json.dumps(raw))
    found = read_vocabulary(tmp_path, 320, SilentReporter())
    assert (found.add_bos, found.add_eos) == (True, False)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "missing, and GGUF holds the tokenizer"),
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"model": {"type": "BPE", "vocab": {}}}', "cannot be read.*no vocabulary"),
        ('{"model": {"type": "Unigram", "vocab": []}}', "its kind is Unigram"),
        ('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}', "neither byte-level BPE"),
        ('{"model": {"type": "BPE", "vocab": {"a": 400}, "merges": []}}', "a token 400"),
    ],
)
def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused_in_words(
    content: str | None, said: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=said):
        read_vocabulary(tmp_path, 320, SilentReporter())
