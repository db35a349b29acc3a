"""The worst-hit passages: which tokens are shown, and that what is shown is the text."""

from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rilq.evaluation.worst import AROUND, PASSAGES, token_texts, worst_places

TEXT = "a café, naïve 東京 🙂 and <script>; once\n\tmore ☃ end"


@pytest.fixture
def byte_level(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Characters that are not English are spread over several tokens."""
    return tokenizer


@pytest.fixture
def sentencepiece() -> PreTrainedTokenizerBase:
    """As Llama 2 has it: spaces begin words, and bytes stand for characters that are unknown."""
    tokens = [
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        *map(chr, range(97, 123)),
    ]
    raw = Tokenizer(
        models.BPE(
            {token: number for number, token in enumerate([*tokens, "\u2581a"])},
            [("\u2581", "a")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    raw.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    raw.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_token_texts_together_are_the_text(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer: PreTrainedTokenizerBase = request.getfixturevalue(kind)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    texts = token_texts(tokenizer, ids, 0, len(ids))
    assert len(texts) == len(ids) > len(TEXT) / 2
    assert "".join(texts) == TEXT
    assert "é" in texts and "🙂" in "".join(texts) and "" in texts


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_any_stretch_of_tokens_shows_its_part_of_the_text(
    kind: str, request: pytest.FixtureRequest
) -> None:
    tokenizer: PreTrainedTokenizerBase = request.getfixturevalue(kind)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    whole = token_texts(tokenizer, ids, 0, len(ids))
    for start in range(len(ids) - 9):
        part = token_texts(tokenizer, ids, start, start + 9)
        assert part[:-1] == whole[start : start + 8]
        # A character that is cut off at the end shows as what a decoder writes for it.
        assert part[-1].rstrip("\ufffd") == whole[start + 8] or "\ufffd" in part[-1]


def test_special_tokens_are_shown(byte_level: PreTrainedTokenizerBase) -> None:
    ids = [0, *byte_level("the dog", add_special_tokens=False)["input_ids"]]
    assert "".join(token_texts(byte_level, ids, 0, len(ids))) == "<s>the dog"


@pytest.fixture
def kl() -> Callable[[dict[tuple[int, int], float]], torch.Tensor]:
    """KL of 3 windows of 100 predictions: zero but for some."""

    def make(values: dict[tuple[int, int], float]) -> torch.Tensor:
        found = torch.zeros(3, 100)
        for place, value in values.items():
            found[place] = value
        return found

    return make


def test_worst_places_come_in_order_and_apart(kl: Callable[..., torch.Tensor]) -> None:
    reach = 2 * AROUND
    found = worst_places(
        kl({(0, 50): 9.0, (0, 50 + reach): 8.0, (0, 51 + reach): 7.0, (2, 50): 6.0, (1, 0): 6.0})
    )
    # The second one's passage would overlap the first one's. A prediction is of the next token.
    assert found == [(0, 51), (0, 52 + reach), (1, 1), (2, 51)]


def test_tokens_that_do_not_differ_are_not_shown(kl: Callable[..., torch.Tensor]) -> None:
    assert worst_places(kl({})) == []


def test_neighbours_of_the_worst_do_not_crowd_others_out() -> None:
    kl = torch.ones(2, 400)
    kl[0] = torch.linspace(10, 2, 400)
    assert len(worst_places(kl)) == PASSAGES
