"""ResQ checkpoints are measured as they run, with the bits that they spend."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from resq_examples import HADAMARD, Example, make_resq
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from rilq.errors import CheckpointError
from rilq.evaluation.evaluate import evaluate_with_passages
from rilq.evaluation.export import export
from rilq.evaluation.figures import Evaluation
from rilq.formats.resq.config import ResqConfig

SEQLEN = 32


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "base", head_dim=32)


@pytest.fixture(scope="module")
def resq(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Example:
    config = ResqConfig(hadamard=HADAMARD, rotations="CD")
    return make_resq(base, tmp_path_factory.mktemp("resq") / "resq", config)


@pytest.fixture(scope="module")
def found(resq: Example, base: Path, words: Path) -> Evaluation:
    return evaluate_with_passages(
        str(resq.folder),
        str(words),
        seqlen=SEQLEN,
        against=str(base),
        prompts=("the small cat",),
        speed=False,
        max_new_tokens=4,
        device="cpu",
    )[0]


def test_perplexity_is_that_of_the_model_in_memory(
    found: Evaluation, resq: Example, words: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    ids = tokenizer(words.read_text(), add_special_tokens=False)["input_ids"]
    count = len(ids) // SEQLEN
    rows = torch.tensor(ids[: count * SEQLEN]).view(count, SEQLEN)
    model = AutoModelForCausalLM.from_pretrained(resq.folder).eval()
    with torch.no_grad():
        logits = model(rows, use_cache=False).logits[:, :-1].flatten(0, 1)
    loss = F.cross_entropy(logits.double(), rows[:, 1:].flatten()).item()
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    assert found.against is not None and found.against.kl_mean > 0
    assert found.layer_errors is not None and 0 < found.layer_errors[0] < found.layer_errors[1] < 1


def test_hidden_states_that_are_turned_are_not_held_against_the_base(
    resq: Example, base: Path, words: Path, tmp_path: Path
) -> None:
    turned = Path(shutil.copytree(resq.folder, tmp_path / "turned"))
    config = json.loads((turned / "config.json").read_text())
    config["quantization_config"]["rotations"] = "ABCD"
    (turned / "config.json").write_text(json.dumps(config))
    found = evaluate_with_passages(
        str(turned), str(words), seqlen=SEQLEN, against=str(base), speed=False, device="cpu"
    )[0]
    assert found.layer_errors is None and found.against is not None


def test_bits_are_those_of_codes_and_what_is_stored(found: Evaluation) -> None:
    hidden, heads, middle = 64, 4 * 32, 128
    by_four_and_a_half = 2 * hidden * heads + 2 * hidden * heads // 2 + 2 * hidden * middle
    by_four = hidden * middle
    scales = 16 * (2 * (heads + heads + 2 * middle + hidden) + hidden)  # q, k+v, gate+up, o; down
    codes = 4.5 * by_four_and_a_half + 4 * by_four
    weights = by_four_and_a_half + by_four
    assert found.bits_per_weight == pytest.approx((codes + scales) / weights)
    assert found.activation_bits == pytest.approx(codes / weights)
    assert found.cache_bits == (28 * 4 + 4 * 8 + 2 * 32) / 32
    assert found.figures()["cache_bits"] == 6.5


def test_what_it_generates_is_held_against_the_base(found: Evaluation) -> None:
    (generation,) = found.generations
    assert generation.text and generation.base


def test_a_dense_model_has_sixteen_bits_when_it_runs(base: Path, words: Path) -> None:
    dense = evaluate_with_passages(str(base), str(words), seqlen=SEQLEN, speed=False, device="cpu")
    assert (dense[0].activation_bits, dense[0].cache_bits) == (16, 16)


def test_an_evaluation_of_an_earlier_version_had_sixteen_bits(found: Evaluation) -> None:
    kept = found.as_dict()
    assert Evaluation.from_dict(kept) == found
    del kept["activation_bits"], kept["cache_bits"]
    earlier = Evaluation.from_dict(kept)
    assert (earlier.activation_bits, earlier.cache_bits) == (16, 16)


def test_it_is_not_exported(resq: Example, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="a ResQ checkpoint .*no other format can hold"):
        export(resq.folder, {"dense": tmp_path / "dense"})
    assert not (tmp_path / "dense").exists()
