"""The passages where a model is farthest from its base, as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rilq.calib.activations import ActivationStore
from rilq.evaluation.figures import PassageToken, WorstPassage
from rilq.evaluation.forward import Subject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PASSAGES = 5
AROUND = 12  # tokens shown before the worst one, and after it
_BEFORE = 8  # tokens that are decoded before a passage: they settle its first character and space
_BROKEN = "\ufffd"  # what a decoder writes for bytes that are no character, or not one yet


def worst_places(kl: Tensor) -> list[tuple[int, int]]:
    """The tokens with the highest KL whose passages do not overlap, the worst one first.

    Args:
        kl: per predicted token `[windows, predicted]`; tokens that do not differ are left out.

    Returns:
        Window, and position of the token in it; position 0 is never predicted.
    """
    predicted = kl.shape[1]
    # Each passage rules out the tokens within two reaches of its own.
    enough = min(kl.numel(), PASSAGES * (4 * AROUND + 1))
    places: list[tuple[int, int]] = []
    values, indices = kl.flatten().topk(enough)
    for value, index in sorted(zip(values.tolist(), indices.tolist(), strict=True), key=_worst):
        window, position = index // predicted, index % predicted + 1
        apart = all(w != window or abs(p - position) > 2 * AROUND for w, p in places)
        if value > 0 and apart:
            places.append((window, position))
    return places[:PASSAGES]


def _worst(place: tuple[float, int]) -> tuple[float, int]:
    """Sorts by falling KL; equal ones by their place in the text."""
    return -place[0], place[1]


def token_texts(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], start: int, stop: int
) -> list[str]:
    """What each of the tokens `start .. stop - 1` adds to the text before it.

    A character whose bytes are spread over several tokens belongs to the last of them; the others
    are empty. Together the texts are what the tokens spell.

    Args:
        ids: tokens of a whole window.
    """
    begin = max(0, start - _BEFORE)

    def spelled(end: int) -> str:
        return str(tokenizer.decode(ids[begin:end], clean_up_tokenization_spaces=False))

    # Decoders give up all of a run of bytes that begins within a character.
    while begin > max(0, start - 4 * _BEFORE) and spelled(start).startswith(_BROKEN):
        begin -= 1
    texts, before = [], ""
    for end in range(begin + 1, stop + 1):
        now = spelled(end)
        if end < stop:  # the last token takes what remains
            now = now.rstrip(_BROKEN)
        texts.append(now[len(before) :])
        before = max(before, now, key=len)
    return texts[start - begin :]


@torch.no_grad()
def worst_passages(
    subjects: Sequence[Subject],
    stores: Sequence[ActivationStore],
    tokens: Tensor,
    kl: Tensor,
    tokenizer: PreTrainedTokenizerBase,
) -> list[WorstPassage]:
    """The worst-hit passages, with what both models think most likely in the worst place.

    Args:
        subjects: the model and its base, with norm and head on the device.
        stores: the last decoder layer's output of each.
        tokens: `[windows, seq_len]` int64.
        kl: per predicted token `[windows, seq_len - 1]`.
    """
    found = []
    for window, position in worst_places(kl):
        ids = tokens[window].tolist()
        start, stop = max(0, position - AROUND), min(len(ids), position + AROUND + 1)
        differs = [0.0, *kl[window].tolist()]  # nothing predicts a window's first token
        choices = []
        for subject, store in zip(subjects, stores, strict=True):
            state = store.read(window, window + 1)[:, position - 1 : position]
            choice = int(subject.streamed.logits(state.to(subject.streamed.device)).argmax())
            choices += token_texts(tokenizer, [*ids[:position], choice], position, position + 1)
        texts = token_texts(tokenizer, ids, start, stop)
        found.append(
            WorstPassage(
                window,
                start,
                tuple(map(PassageToken, texts, differs[start:stop])),
                worst=position - start,
                base_choice=choices[1],
                choice=choices[0],
            )
        )
    return found
