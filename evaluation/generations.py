"""What a checkpoint and its base write after the same prompts, greedily, side by side."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from transformers import GenerationConfig

from rilq.errors import InputError, OptionError, one_line
from rilq.evaluation.figures import Generation
from rilq.progress import Reporter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_NEW_TOKENS = 64


def read_prompts(path: Path) -> list[str]:
    """Prompts from a text file, one a line, or from JSON lines with a "prompt" key.

    A file is JSON lines if its name ends in `.jsonl` or `.json`. Empty lines mean nothing.

    Raises:
        InputError: it cannot be read, or holds no prompt.
    """
    try:
        # Not splitlines: a prompt may hold U+2028 and its like.
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as err:
        raise InputError(f"--prompts {path}: cannot be read: {err.strerror or err}") from err
    except UnicodeDecodeError as err:
        raise InputError(f"--prompts {path}: is not UTF-8: {one_line(err)}") from err
    numbered = [(n, line) for n, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise InputError(
            f"--prompts {path}: is empty\n"
            '  write one prompt a line, or JSON lines with a "prompt" key into a .jsonl file'
        )
    if path.suffix in {".jsonl", ".json"}:
        return [_prompt(line, f"{path}, line {n}") for n, line in numbered]
    return [line for _, line in numbered]


def _prompt(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as err:
        raise InputError(f"--prompts {where}: not JSON: {one_line(err)}") from err
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(prompt, str) or not prompt:
        raise InputError(
            f'--prompts {where}: expected an object whose "prompt" is a text that is not empty'
        )
    return prompt


def check_lengths(
    prompts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    positions: int | None,
) -> None:
    """That prompts and what is generated fit into the model's context.

    Args:
        positions: tokens that the model is made for; None if it does not say.

    Raises:
        OptionError: one does not, or no token is asked for.
    """
    if max_new_tokens < 1:
        raise OptionError(f"--max-new-tokens {max_new_tokens}: expected 1 or more")
    for number, prompt in enumerate(prompts, 1):
        count = len(tokenizer(prompt)["input_ids"])
        if positions is not None and count + max_new_tokens > positions:
            raise OptionError(
                f"--prompts: prompt {number} has {count} tokens, and {max_new_tokens} more are "
                f"asked for; the model's context is {positions}\n"
                "  shorten it, or lower --max-new-tokens"
            )


@torch.no_grad()
def continuations(
    prompts: Sequence[str],
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    label: str,
    report: Reporter,
) -> list[list[int]]:
    """The most likely token, again and again, until the end token or `max_new_tokens`.

    One prompt at a time, so that padding has no effect on it.

    Args:
        prompts: texts to continue.
        label: of the model, for the progress.

    Returns:
        For each prompt its generated tokens, the end token included.
    """
    found: list[list[int]] = []
    generate: Any = model.generate  # of a union of classes, and typed in none
    if prompts:
        report.stage(f"generate, {label}", len(prompts), "prompt")
    with _greedy(model, max_new_tokens):
        for done, prompt in enumerate(prompts, 1):
            given = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
            out = generate(**given.to(model.device))
            found.append(out[0, given["input_ids"].shape[1] :].tolist())
            report.step(done)
    return found


@contextmanager
def _greedy(model: PreTrainedModel | PeftModel, max_new_tokens: int) -> Iterator[None]:
    """The model without its own settings, such as a penalty on repetitions.

    `generate` fills what it is not told from them, so they have to go for the while.
    """
    # PEFT generates with the settings of the model inside.
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    own = inner.generation_config
    pad = own.pad_token_id
    end = own.eos_token_id
    if pad is None:  # one row is never padded; without a value, transformers warns
        pad = end[0] if isinstance(end, list) else end
    inner.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        bos_token_id=own.bos_token_id,
        eos_token_id=end,
        pad_token_id=pad,
    )
    try:
        yield
    finally:
        inner.generation_config = own


def compared(
    prompt: str,
    tokens: Sequence[int],
    base: Sequence[int] | None,
    tokenizer: PreTrainedTokenizerBase,
) -> Generation:
    """Both continuations as text, and where they part.

    A character may lie in several tokens; `same` ends before the one that holds the difference.

    Args:
        tokens: generated after the prompt; `base`: by the base, None if there was none.
    """
    given: list[int] = tokenizer(prompt)["input_ids"]
    text = _text(given, tokens, tokenizer)
    if base is None:
        return Generation(prompt, text, None, None, text)
    base_text = _text(given, base, tokenizer)
    if list(tokens) == list(base):
        return Generation(prompt, text, base_text, None, text)
    first = len(os.path.commonprefix([list(tokens), list(base)]))
    before = _text(given, tokens[:first], tokenizer)
    # An unfinished character at its end reads as U+FFFD, which the whole texts do not have there.
    same = os.path.commonprefix([before, text, base_text])
    return Generation(prompt, text, base_text, first, same)


def _text(given: list[int], tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Text of the tokens as it continues the prompt: some tokenizers drop a space at the start."""

    def decoded(ids: list[int]) -> str:
        kept = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return str(tokenizer.decode(ids, **kept))

    return decoded([*given, *tokens])[len(decoded(given)) :]
