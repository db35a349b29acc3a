"""ResQ checkpoints that several of these tests read."""

from collections.abc import Callable
from pathlib import Path

import pytest
from resq_examples import HADAMARD, Example, make_resq

from rilq.formats.resq.config import ResqConfig


@pytest.fixture(scope="session")
def make_example(
    tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]
) -> Callable[..., Example]:
    """A function `make_example(model_type, config, **sizes)` -> a checkpoint."""

    def make(
        model_type: str = "llama", config: ResqConfig | None = None, **overrides: object
    ) -> Example:
        root = tmp_path_factory.mktemp("resq")
        source = make_model(root / "source", model_type, **overrides)
        return make_resq(source, root / "resq", config or ResqConfig(hadamard=HADAMARD))

    return make


@pytest.fixture(scope="session")
def example(make_example: Callable[..., Example]) -> Example:
    """A tied Llama with biases; tests must not change it."""
    return make_example(tie_word_embeddings=True, attention_bias=True)
