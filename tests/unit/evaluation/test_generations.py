"""Greedy continuations, compared token by token."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from rilq.errors import InputError, OptionError
from rilq.evaluation.figures import Generation
from rilq.evaluation.generations import check_lengths, compared, continuations, read_prompts
from rilq.progress import SilentReporter

PROMPTS = ["the cat sat", "an old tree", "x"]


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama).eval()


def written(model: Any, tokenizer: PreTrainedTokenizerBase, count: int = 12) -> list[list[int]]:
    return continuations(PROMPTS, model, tokenizer, count, "model", SilentReporter())


@torch.no_grad()
def test_each_token_is_the_most_likely_one_after_all_before_it(
    model: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    for prompt, tokens in zip(PROMPTS, written(model, tokenizer), strict=True):
        ids = tokenizer(prompt)["input_ids"]
        for token in tokens:
            logits = model(torch.tensor([ids]), use_cache=False).logits
            assert token == int(logits[0, -1].argmax())
            ids = [*ids, token]
        assert len(tokens) == 12 or tokens[-1] == tokenizer.eos_token_id


def test_a_model_s_own_generation_settings_change_nothing(
    tiny_llama: Path, model: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    other = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    other.generation_config.update(
        do_sample=True, temperature=3.0, top_k=2, repetition_penalty=9.0, no_repeat_ngram_size=1
    )
    assert written(other, tokenizer) == written(model, tokenizer)


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])  # each has a way of its own to generate
# PEFT 0.21 asks transformers 5.23 for an attribute by its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_a_model_with_a_lora_is_continued_as_the_same_model_with_it_merged(
    tiny_llama: Path, model: Any, tokenizer: PreTrainedTokenizerBase, task: str | None
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LoraConfig(
            r=4, target_modules=["down_proj"], init_lora_weights=False, task_type=task
        )
        other = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config).eval()
    other.generation_config.repetition_penalty = 9.0
    found = written(other, tokenizer)
    assert other.generation_config.repetition_penalty == 9.0
    assert found != written(model, tokenizer)
    merged = other.merge_and_unload()
    assert found == written(merged, tokenizer)


def test_a_continuation_ends_with_the_end_token(
    tiny_llama: Path, model: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    longer = written(model, tokenizer)
    other = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    end = other.generation_config.eos_token_id = longer[0][4]
    cut = longer[0].index(end) + 1
    assert written(other, tokenizer)[0] == longer[0][:cut]


def test_the_same_tokens_have_no_first_difference(tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = tokenizer(" sat")["input_ids"]
    found = compared("the cat", tokens, list(tokens), tokenizer)
    assert found == Generation("the cat", " sat", " sat", None, " sat")
    assert compared("the cat", tokens, None, tokenizer).base is None


def test_the_common_text_ends_before_the_token_that_differs(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    own, base = (tokenizer(text)["input_ids"] for text in (" sat on it", " sat in it"))
    found = compared("the cat", own, base, tokenizer)
    assert (found.text, found.base) == (" sat on it", " sat in it")
    assert found.first_difference is not None
    first = found.first_difference
    assert own[:first] == base[:first] and own[first] != base[first]
    assert found.same == tokenizer.decode(own[:first])
    assert found.same.startswith(" sat")


def test_a_character_that_differs_in_its_second_byte_is_not_cut(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    own, base = (tokenizer(text)["input_ids"] for text in ("aé!", "aè!"))  # c3 a9 and c3 a8
    found = compared("é", own, base, tokenizer)
    assert (found.text, found.base) == ("aé!", "aè!")
    assert (found.first_difference, found.same) == (2, "a")


def test_one_that_ends_where_the_other_goes_on_differs_there(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    tokens = tokenizer(" sat")["input_ids"]
    more = [*tokens, *tokenizer(" down")["input_ids"]]
    ended = [*tokens, tokenizer.eos_token_id]
    found = compared("the cat", ended, more, tokenizer)
    assert (found.text, found.base, found.same) == (" sat", " sat down", " sat")
    assert found.first_difference == len(tokens)


def test_prompts_are_lines_or_json_lines(tmp_path: Path) -> None:
    text, records = tmp_path / "p.txt", tmp_path / "p.jsonl"
    text.write_text("one\n\n  two words\u2028still two\n", encoding="utf-8")
    records.write_text('{"prompt": "a\\nb", "n": 1}\n\n{"prompt": " c"}\n')
    assert read_prompts(text) == ["one", "  two words\u2028still two"]
    assert read_prompts(records) == ["a\nb", " c"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"\n \n", "is empty"),
        ("p.txt", b"\xff\xfe", "is not UTF-8"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt"', "line 2: not JSON"),
        ("p.jsonl", b'{"text": "a"}\n', 'line 1: expected an object whose "prompt"'),
        ("p.jsonl", b'"a"\n', 'line 1: expected an object whose "prompt"'),
    ],
)
def test_a_file_without_prompts_is_refused(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_prompts(tmp_path / name)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none.txt: cannot be read: No such file"):
        read_prompts(tmp_path / "none.txt")


def test_a_prompt_longer_than_the_context_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    count = len(tokenizer("the cat sat")["input_ids"])
    check_lengths(["x", "the cat sat"], tokenizer, 4, count + 4)
    check_lengths(["the cat sat"], tokenizer, 4, None)
    with pytest.raises(OptionError, match=f"prompt 2 has {count} tokens, and 5 more"):
        check_lengths(["x", "the cat sat"], tokenizer, 5, count + 4)
    with pytest.raises(OptionError, match="--max-new-tokens 0"):
        check_lengths(["x"], tokenizer, 0, None)
