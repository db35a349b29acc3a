"""Small checkpoints and texts that the tests make for themselves; nothing is downloaded."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before torch and huggingface_hub are imported: few threads, no network, no telemetry.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# Tests of the record say where it is; the others look at folders with nothing beside the output.
os.environ["RILQ_DB"] = "none"

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

WORDS = (
    "the a one red small old cat dog bird house river tree walked ran slept sang saw found "
    "under over near with and then because quickly slowly happily home again today"
).split()

TINY: dict[str, Any] = dict(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=128,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
)


def _sentences(count: int, seed: int) -> str:
    draw = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(WORDS), (count, 8), generator=draw).tolist()
    return " ".join(" ".join(WORDS[i] for i in row) + "." for row in picks)


@pytest.fixture(scope="session")
def text() -> str:
    """About 20,000 characters of made-up English words."""
    return _sentences(500, seed=0)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer with 320 tokens, trained here."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        [_sentences(200, seed=1)],
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<s>", "</s>", "<pad>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture(scope="session")
def make_model(tokenizer: PreTrainedTokenizerBase) -> Callable[..., Path]:
    """A function `make_model(folder, model_type="llama", dtype=..., **config)` -> folder.

    It saves a random 2-layer checkpoint of any transformers architecture with its tokenizer;
    every parameter, norms included, is perturbed, so that nothing is accidentally the identity.
    """

    def make(
        folder: Path,
        model_type: str = "llama",
        *,
        dtype: torch.dtype = torch.float32,
        max_shard_size: str = "5GB",
        **overrides: Any,
    ) -> Path:
        config = AutoConfig.for_model(model_type, **{**TINY, **overrides})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.05)
        model.tie_weights()
        model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]) -> Path:
    """A random 2-layer Llama in three or more float32 shards; tests must not change it."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny-llama", max_shard_size="150KB")
