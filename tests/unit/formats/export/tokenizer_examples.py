"""Tokenizers of the kinds that llama.cpp has, trained here."""

import json
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


def byte_level(text: str, pre_tokenizer: Any, ignore_merges: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE with 600 tokens behind a pre-tokenizer, given as in tokenizer.json."""
    # Every kind of piece often enough to become a token, and cut otherwise by each pre-tokenizer.
    numbers = [f"{i} {i * 37} it's IT'S  {i}\n\n\n\t{i};\n x={i}//y" for i in range(300)]
    empty = json.loads(Tokenizer(models.BPE()).to_str())
    raw = Tokenizer.from_str(json.dumps({**empty, "pre_tokenizer": pre_tokenizer}))
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        [text, *numbers],
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    trained = json.loads(raw.to_str())
    trained["model"]["ignore_merges"] = ignore_merges
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(trained)), bos_token="<s>", eos_token="</s>"
    )


def sentencepiece(text: str) -> PreTrainedTokenizerFast:
    """SentencePiece's BPE with 512 tokens and fallback to bytes, as Llama 2 has it."""
    raw = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<unk>", "<s>", "</s>"]
    raw.train_from_iterator(
        text.replace(".", ".\n").splitlines(),
        trainers.BpeTrainer(
            vocab_size=512,
            special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))],
            show_progress=False,
        ),
    )
    trained = json.loads(raw.to_str())
    trained["added_tokens"] = trained["added_tokens"][: len(special)]  # bytes are ordinary tokens
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(trained)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
