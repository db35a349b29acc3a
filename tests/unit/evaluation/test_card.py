"""The model card: what it says, what it keeps, and that the client's own classes read it."""

from dataclasses import replace
from typing import Any

import pytest
from huggingface_hub import ModelCard

from rilq.errors import HubError
from rilq.evaluation.card import Base, CardFacts, make_card
from rilq.evaluation.figures import Divergence, Evaluation
from rilq.formats.hub_push import LocalFile

AGAINST = Divergence(0.25, 0.2, 1.0, 2.0, 0.75, 0.7, 10.0, kl_edges=(0.1, 3.0), kl_counts=(1000,))
FIGURES = Evaluation(
    perplexity=12.5,
    tokens=3100,
    windows=100,
    seqlen=32,
    bits_per_byte=None,
    bits_per_weight=2.5,
    size_bytes=1000,
    adapter=False,
    dtype="float32",
    text="heldout.txt@xxh3:12ab",
    tokens_digest="5d41",
    against=AGAINST,
)
MANIFEST: dict[str, Any] = {
    "recipe": {"bits": 2, "group_size": 64, "rank": 16, "skip": [], "clip": None},
    "versions": {"rilq": "0.1.0", "torch": "2.13.0"},
    "compute_dtype": "float32",
    "bits_per_weight": 2.5,
    "bits_per_parameter": 3.25,
    "calibration": {"sources": ["c4@12:en"], "rows": 320, "seqlen": 512, "digest": "77ff"},
    "quality": {"validation_loss_before": 0.5, "validation_loss": 0.3},
}
WEIGHTS = LocalFile(b"", 1_000_000, "ab" * 32)
FACTS = CardFacts(
    "https://hub.example",
    "org/tiny-w2",
    "main",
    MANIFEST,
    Base("org/tiny", "c0ffee", {"license": "mit", "language": ["en", "de"], "tags": ["theirs"]}),
    {"model.safetensors": WEIGHTS, "config.json": LocalFile(b"", 1, "00")},
    FIGURES,
)


def data(card: str) -> dict[str, Any]:
    return ModelCard(card).data.to_dict()


def test_metadata_names_the_base_and_takes_over_licence_and_language() -> None:
    found = data(make_card(FACTS, None))
    assert (found["base_model"], found["base_model_relation"]) == ("org/tiny", "quantized")
    assert (found["license"], found["language"]) == ("mit", ["en", "de"])
    assert found["library_name"] == "transformers" and found["tags"] == ["rilq", "2-bit"]


def test_model_index_holds_the_measured_figures_and_their_context() -> None:
    (model,) = data(make_card(FACTS, None))["model-index"]
    (result,) = model["results"]
    assert result["dataset"]["args"] == {"context": 32, "windows": 100}
    metrics = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert metrics == {"perplexity": 12.5, "kl-divergence": 0.25, "agreement": 0.75}


@pytest.mark.parametrize(
    "words",
    [
        "| full precision | 10 | 0 |  |",
        "| 2-bit, before RILQ |  |  | 0.5 |",
        "| 2-bit, this model | 12.5 | 0.25 | 0.3 |",
        "100 windows of 32 tokens",
        "2.50 bits per weight",
        "1.00 MB of weights",
        "`c4@12:en`: 320 rows of 512 tokens",
        "`77ff`",
        '"rank": 16',
        f"| `model.safetensors` | 1000000 | `{'ab' * 32}` |",
        "[org/tiny](https://hub.example/org/tiny) (commit `c0ffee`)",
        'AutoModelForCausalLM.from_pretrained("org/tiny-w2", device_map="auto")',
    ],
)
def test_the_text_tells_figures_recipe_data_size_and_checksums(words: str) -> None:
    assert words in make_card(FACTS, None)


def test_a_card_of_the_same_facts_is_the_same_and_stays_so() -> None:
    card = make_card(FACTS, None)
    assert make_card(FACTS, None) == card and make_card(FACTS, card) == card


def test_without_figures_the_card_says_so_and_has_no_model_index() -> None:
    card = make_card(replace(FACTS, figures=None), None)
    assert "Perplexity was not measured." in card and "model-index" not in data(card)


def test_of_a_local_base_nothing_is_told() -> None:
    card = make_card(replace(FACTS, base=Base(None, None, {"license": "mit"})), None)
    assert "base_model" not in data(card) and data(card)["license"] == "mit"
    assert "A model that is not on the Hub, in 2 bits" in card


def test_another_branch_is_in_the_commands() -> None:
    assert '"org/tiny-w2", revision="w2"' in make_card(replace(FACTS, revision="w2"), None)


def test_an_adapter_beside_the_base_is_in_the_commands() -> None:
    files = {**FACTS.files, "adapter/adapter_model.safetensors": WEIGHTS}
    card = make_card(replace(FACTS, files=files), None)
    assert 'PeftModel.from_pretrained(model, "org/tiny-w2", subfolder="adapter")' in card
    assert card.index("import PeftModel") < card.index("model = AutoModel")


USERS = """---
license: apache-2.0
language: fr
tags:
- mine
model-index:
- name: mine
  results:
  - task:
      type: text-generation
    dataset:
      name: MMLU
      type: mmlu
    metrics:
    - type: acc
      value: 0.5
---
# My model

Written by hand.  \nKeep this.

<!-- rilq:begin, of an older version -->
old
<!-- rilq:end -->

And this.
"""


def test_an_existing_card_is_kept_and_only_the_marked_block_is_replaced() -> None:
    card = make_card(FACTS, USERS)
    body = card.partition("\n---\n")[2]
    before, after = USERS.partition("\n---\n")[2].split("<!-- rilq:begin")[0], "\n\nAnd this.\n"
    assert body.startswith(before) and body.endswith(f"<!-- rilq:end -->{after}")
    assert "\nold\n" not in body and "## Figures" in body


def test_metadata_of_an_existing_card_wins_but_for_our_facts() -> None:
    found = data(make_card(FACTS, make_card(FACTS, USERS)))
    assert (found["license"], found["language"]) == ("apache-2.0", "fr")
    assert found["tags"] == ["mine", "rilq", "2-bit"] and found["base_model"] == "org/tiny"
    (model,) = found["model-index"]
    assert model["name"] == "mine" and [r["dataset"]["type"] for r in model["results"]] == [
        "mmlu",
        "heldout.txt",
    ]


def test_figures_of_an_earlier_push_are_replaced_even_on_another_text() -> None:
    newer = replace(FACTS, figures=replace(FIGURES, text="other.txt@xxh3:34", perplexity=11.0))
    (model,) = data(make_card(newer, make_card(FACTS, None)))["model-index"]
    (result,) = model["results"]
    assert result["dataset"]["type"] == "other.txt" and result["metrics"][0]["value"] == 11.0


def test_a_card_without_a_block_gets_one_at_its_end() -> None:
    card = make_card(FACTS, "# Only a title\n")
    assert "# Only a title\n\n<!-- rilq:begin" in card and card.endswith("<!-- rilq:end -->\n")


def test_a_card_with_damaged_metadata_is_not_overwritten() -> None:
    with pytest.raises(HubError, match="metadata of this card cannot be read.*\n.*correct it"):
        make_card(FACTS, "---\nlicense: [unclosed\n---\n# Title\n")
