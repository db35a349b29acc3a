"""Options: recipes and what they set, losses as text, what is trained, and refusals."""

from dataclasses import fields
from typing import Any

import pytest

from rilq.converter.options import (
    RECIPES,
    ConvertOptions,
    flag,
    matches,
    parse_loss,
)
from rilq.errors import OptionError
from rilq.formats.spec import QuantSpec

KEEP: dict[str, Any] = {"keep_adapter": True, "zero_point": "integer"}
KEPT_POOLED = KEEP | {"adapter": "pooled"}  # the paper's recipe has a plain LoRA


def options(**given: Any) -> ConvertOptions:
    return ConvertOptions(model="some/model", **given)


# -- recipes ---------------------------------------------------------------------------------------


def test_the_default_recipe_is_the_defaults() -> None:
    assert ConvertOptions.of_recipe("default", model="some/model") == options()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_differs_from_the_defaults_in_what_it_sets_only(name: str) -> None:
    made, plain = ConvertOptions.of_recipe(name, model="some/model"), options()
    changed = {
        f.name: getattr(made, f.name)
        for f in fields(made)
        if getattr(made, f.name) != getattr(plain, f.name)
    }
    named = {} if name == "default" else {"recipe": name}
    # What a recipe sets to the default's own value, to pin it, is no difference.
    assert changed.items() <= {**named, **RECIPES[name]}.items()
    assert {k: getattr(made, k) for k in RECIPES[name]} == RECIPES[name]


def test_the_papers_recipe_is_what_the_paper_and_its_code_do() -> None:
    paper = ConvertOptions.of_recipe("paper", model="some/model")
    # Lee et al. 2025 (arXiv:2412.01129) and its reference code: RTN with integer zero-points, a
    # plain LoRA of alpha 16, Adam at a constant 1e-4, up to 1250 updates of 8 rows, validation
    # every 25, patience 5; 320 windows of 512 tokens, 64 of them held out.
    assert (paper.quantizer, paper.zero_point, paper.clip) == ("rtn", "integer", None)
    assert (paper.adapter, paper.trains, paper.alpha) == ("lora", "adapters", 16)
    assert (paper.loss_weights, paper.target) == ({"mse": 0.5, "ce": 0.5}, "post-norm")
    assert (paper.learning_rate, paper.schedule, paper.steps) == (1e-4, "constant", 1250)
    assert (paper.batch_size, paper.val_every, paper.patience) == (8, 25, 5)
    assert (paper.rows, paper.nsamples, paper.seqlen) == ("documents", 320, 512)
    assert paper.val_ratio == 64 / 320


def test_the_other_recipes_train_what_merges() -> None:
    made = {n: ConvertOptions.of_recipe(n, model="some/model") for n in ("fast", "default", "best")}
    assert all(o.adapter == "pooled" and o.trains != "none" for o in made.values())


def test_what_is_given_goes_before_the_recipe_and_what_is_none_does_not() -> None:
    made = ConvertOptions.of_recipe(
        "paper", model="some/model", steps=7, quantizer="gptq", rows=None
    )
    assert (made.recipe, made.steps, made.quantizer) == ("paper", 7, "gptq")
    assert (made.rows, made.learning_rate) == ("documents", 1e-4)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    ("given", "trains"),
    [({"rank": 0}, "none"), ({"adapter": "lora"}, "adapters"), (KEPT_POOLED, "adapters+scales")],
    ids=str,
)
def test_a_rank_of_zero_a_plain_lora_or_a_kept_adapter_decide_what_any_recipe_trains(
    recipe: str, given: dict[str, Any], trains: str
) -> None:
    assert ConvertOptions.of_recipe(recipe, model="some/model", **given).trains == trains


def test_an_unknown_recipe_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        OptionError, match="--recipe slow: expected one of fast, default, best, pap"
    ):
        ConvertOptions.of_recipe("slow", model="some/model")


def test_every_recipe_is_recorded_by_name_without_any_path() -> None:
    recorded = ConvertOptions.of_recipe("paper", model="/home/me/model").recorded()
    assert recorded["recipe"] == "paper" and recorded["learning_rate"] == 1e-4
    assert "/home/me" not in str(recorded)


# -- losses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("kl", {"kl": 1.0}),
        ("mse+ce", {"mse": 0.5, "ce": 0.5}),
        ("mse+ce+kl", {"mse": 1 / 3, "ce": 1 / 3, "kl": 1 / 3}),
        ("0.2*mse+kl", {"mse": 0.2, "kl": 1.0}),
        ("0.5*mse+2*kl", {"mse": 0.5, "kl": 2.0}),
        (" 1e-3 * ce + kl ", {"ce": 1e-3, "kl": 1.0}),
        ("3*mse", {"mse": 3.0}),
        ("0.5*kl+mse+ce", {"kl": 0.5, "mse": 0.5, "ce": 0.5}),
    ],
)
def test_a_loss_is_terms_with_weights(text: str, weights: dict[str, float]) -> None:
    assert parse_loss(text) == pytest.approx(weights)
    assert options(loss=text).loss_weights == parse_loss(text)


@pytest.mark.parametrize(
    "text",
    ["", "mae", "kl+", "+kl", "kl+kl", "2*kl+kl", "0*kl", "-1*kl", "nan*kl", "inf*kl", "two*kl",
     "kl*2", "2*", "*kl*", "kl,ce", "KL"],
)  # fmt: skip
def test_a_loss_that_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="expected terms out of mse, ce, kl joined by"):
        parse_loss(text)
    with pytest.raises(OptionError, match="--loss"):
        options(loss=text)


# -- what is trained -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "trains", "adapters"),
    [
        ({}, "adapters+scales", True),
        ({"adapter": "pooled"}, "adapters+scales", True),
        ({"adapter": "lora"}, "adapters", True),
        ({"rank": 0}, "none", False),
        ({"rank": 0, "adapter": "lora"}, "none", False),
        ({"rank": 0, "train": "all"}, "all", False),
        ({"rank": 0, "train": "scales"}, "scales", False),
        ({"train": "none"}, "none", False),
        ({"train": "scales"}, "scales", False),
        ({"train": "all"}, "all", False),
        ({"train": "adapters"}, "adapters", True),
        ({"train": "adapters", "adapter": "lora"}, "adapters", True),
        ({"train": "none", "adapter": "lora"}, "none", False),
    ],
    ids=str,
)
def test_what_is_trained_is_as_given_or_what_adapter_and_rank_allow(
    given: dict[str, Any], trains: str, adapters: bool
) -> None:
    assert (options(**given).trains, options(**given).trains_adapters) == (trains, adapters)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"adapter": "lora", "train": "scales"},
            "--train scales: a plain LoRA stays beside a base",
        ),
        ({"adapter": "lora", "train": "adapters+scales"}, "use --train adapters, or --adapter poo"),
        ({"adapter": "lora", "train": "all"}, "--train all: a plain LoRA stays"),
        ({"rank": 0, "train": "adapters"}, "--train adapters: adapters of --rank 0 are none"),
        ({"rank": 0, "train": "adapters+scales"}, "adapters of --rank 0 are none"),
        ({"train": "codes"}, "--train codes: expected one of none, adapters, scales"),
        ({"loss": "kl", "target": "pre-norm"}, "kl needs the states that feed the head"),
        ({"loss": "mse+kl", "target": "pre-norm"}, "kl needs the states that feed the head"),
        ({"loss": "ce", "target": "pre-norm"}, "--target pre-norm: is what mse compares"),
        ({"loss": "kl", "target": "logits"}, "--target logits: is what mse compares"),
        ({"target": "last"}, "--target last: expected one of post-norm, pre-norm, logits"),
        ({"schedule": "cosine"}, "--schedule cosine: expected one of decay, constant"),
        (
            {"quantizer": "lsq", "clip": "search"},
            "--clip search: --quantizer lsq finds its own gri",
        ),
        ({"quantizer": "hqq", "clip": "none"}, "--quantizer hqq finds its own grid"),
        ({"quantizer": "lwc", "clip": "lsq"}, "--quantizer lwc finds its own grid"),
        ({"quantizer": "awq"}, "--quantizer awq: expected one of rtn, lsq, hqq, gptq, lwc, signr"),
        ({"clip": "hard"}, "--clip hard: expected one of none, search, lsq"),
        ({"layer_steps": 0}, "--layer-steps 0: expected at least 1"),
        ({"learning_rate": 0.0}, "--lr 0.0: expected a positive number"),
        ({"scales_learning_rate": -1.0}, "--scales-lr -1.0: expected a positive number"),
        ({"scales_learning_rate": float("nan")}, "--scales-lr nan: expected a positive number"),
        ({"recipe": "slow"}, "--recipe slow: expected one of fast, default, best, paper"),
        ({"keep_adapter": True}, "--keep-adapter, --zero-point real: keeps the base"),
        (KEEP | {"train": "all"}, "--keep-adapter, --train all: moves the minima"),
        (KEEP | {"train": "all+codes"}, "use --train adapters+scales, or --train adapters"),
        (KEEP | {"train": "scales"}, "--keep-adapter, --train scales: there is no adapter"),
        (KEEP | {"train": "none"}, "--keep-adapter, --train none: there is no adapter"),
        (KEEP | {"rank": 0}, "--keep-adapter, --rank 0: there is no adapter"),
        (KEEP | {"adapter": "lora"}, "--keep-adapter, --adapter lora: a plain LoRA is never merg"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_with_the_way_out(given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as refused:
        options(**given)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    "given",
    [
        {"loss": "mse", "target": "pre-norm"},
        {"loss": "mse+ce", "target": "pre-norm"},
        {"loss": "mse+kl", "target": "logits"},
        {"quantizer": "gptq", "clip": "search"},
        {"quantizer": "signround", "clip": "none"},
        KEEP,
        KEEP | {"train": "adapters"},
    ],
    ids=str,
)
def test_what_goes_together_is_accepted(given: dict[str, Any]) -> None:
    options(**given)


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(OptionError) as refused:
        options(bits=5, train="codes", loss="mae", scales_learning_rate=0.0, alpha=0.0)
    for name in ("--bits 5", "--train codes", "--loss mae", "--scales-lr 0.0", "--alpha 0.0"):
        assert name in str(refused.value)


# -- patterns --------------------------------------------------------------------------------------


def test_patterns_match_the_whole_name_or_its_last_parts() -> None:
    name = "model.layers.0.mlp.down_proj"
    for pattern in ("down_proj", "mlp.*", "model.layers.0.*", "*_proj", name):
        assert matches(pattern, name)
    for pattern in ("up_proj", "mlp", "layers.1.*", "down"):
        assert not matches(pattern, name)


def test_the_last_pattern_that_matches_says_the_bits_and_skip_goes_first() -> None:
    o = options(
        skip=("v_proj",), bits_for=(("mlp.*", 4), ("down_proj", 8), ("v_proj", 3)), group_size=32
    )
    assert o.spec_for("m.0.mlp.down_proj") == QuantSpec(8, 32)
    assert o.spec_for("m.0.mlp.up_proj") == QuantSpec(4, 32)
    assert o.spec_for("m.0.q_proj") == QuantSpec(2, 32)
    assert o.spec_for("m.0.v_proj") is None


def test_flags_are_the_command_lines() -> None:
    assert [flag(n) for n in ("learning_rate", "scales_learning_rate", "layer_steps", "train")] == [
        "--lr", "--scales-lr", "--layer-steps", "--train"
    ]  # fmt: skip
