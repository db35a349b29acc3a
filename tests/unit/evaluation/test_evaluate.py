"""Streaming and the loaded models together."""

import weakref
from pathlib import Path
from typing import Any

import pytest

from rilq.api import evaluate
from rilq.evaluation import whole
from rilq.evaluation.evaluate import evaluate_with_passages
from rilq.evaluation.perplexity import measure_texts

# Large enough for three windows.
SEQLEN = 32


@pytest.fixture
def words(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "words.txt"
    path.write_text(text[:600])
    return path


def test_one_model_is_in_memory_at_a_time(
    tiny_llama: Path, words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, loaded = whole.load, []

    def watched(*args: Any, **options: Any) -> Any:
        assert not [each for each in loaded if each() is not None], "one is still there"
        model, tokenizer = load(*args, **options)
        loaded.append(weakref.ref(model))
        return model, tokenizer

    monkeypatch.setattr(whole, "load", watched)
    options = {"seqlen": SEQLEN, "device": "cpu", "against": str(tiny_llama), "speed": False}
    found = evaluate(str(tiny_llama), str(words), prompts=["the cat"], max_new_tokens=3, **options)
    assert len(loaded) == 2
    assert [each() for each in loaded] == [None, None]
    (generation,) = found.generations
    assert generation.text and generation.text == generation.base
    assert generation.first_difference is None


def test_figures_and_passages_are_those_of_the_streaming_alone(
    tiny_llama: Path, words: Path
) -> None:
    options = {"seqlen": SEQLEN, "device": "cpu"}
    figures, passages = evaluate_with_passages(
        str(tiny_llama), str(words), prompts=["the"], max_new_tokens=1, speed=False, **options
    )
    ((streamed, wanted),) = measure_texts([str(tiny_llama)], str(words), **options)
    assert {**figures.as_dict(), "generations": ()} == streamed.as_dict()
    assert passages.loss.tolist() == wanted.loss.tolist()
    assert figures.generations[0].base is None
