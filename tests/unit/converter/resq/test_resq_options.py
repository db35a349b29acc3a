"""Options of ResQ and its baselines: defaults, names, what has no meaning, what is recorded."""

from typing import Any

import pytest

from rilq.converter.options import ConvertOptions
from rilq.converter.resq.options import BITS, METHODS, ResqOptions
from rilq.errors import OptionError
from rilq.formats.resq.parts import PART_BITS


def options(**given: Any) -> ConvertOptions:
    return ConvertOptions.of_recipe("default", model="some/model", **given)


def resq(**given: Any) -> ResqOptions:
    found = options(**{"method": "resq", **given}).resq
    assert found is not None
    return found


def test_resq_has_an_eighth_of_the_channels_in_8_bits() -> None:
    assert resq().parts == ((4, 8), (0.875, 0.125))
    assert (resq().rotations, resq().quantizer) == ("ABCD", "gptq")


def test_the_equal_variant_has_4_bits_on_average() -> None:
    bits, shares = resq(high_bits=6, lowest_bits=2).parts
    assert (bits, shares) == ((2, 4, 6), (0.125, 0.75, 0.125))
    assert sum(b * s for b, s in zip(bits, shares, strict=True)) == 4


@pytest.mark.parametrize("method", ["quarot", "rtn-w4a4"])
def test_baselines_without_a_high_part_have_one(method: str) -> None:
    assert resq(method=method).parts == ((4,), (1.0,))
    assert resq(method=method, low_bits=3).parts == ((3,), (1.0,))


def test_weights_of_plain_rounding_are_rounded_to_nearest() -> None:
    assert resq(method="rtn-w4a4").quantizer == "rtn"
    assert resq(method="rtn-w4a4").rotations == ""


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"method": "resq"}, "model-w4a4kv4-resq"),
        ({"method": "quarot", "low_bits": 6}, "model-w6a6kv6-quarot"),
        ({"method": "rtn-w4a4"}, "model-w4a4kv4-rtn"),
        ({}, "model-w2g64-rilq"),
    ],
)
def test_the_output_is_named_after_the_method(given: dict[str, Any], name: str) -> None:
    assert options(**given).output.name == name


def test_a_recipe_of_rilq_has_none_of_these_options() -> None:
    # The fingerprint of a job is made of it: one begun before there were others must go on.
    recorded = options().recorded()
    assert not recorded.keys() & {"method", "high_fraction", "low_bits", "rotations"}
    assert "group_size" in recorded


def test_a_recipe_of_resq_has_what_makes_its_result_and_nothing_else() -> None:
    assert options(method="resq").recorded() == {
        "method": "resq", "quantizer": "gptq", "rank": 0, "text_key": "text", "rows": "packed",
        "nsamples": None, "seqlen": None, "val_ratio": 0.2, "seed": 42, "max_shard_size": "5GB",
        "high_fraction": 0.125, "high_bits": 8, "low_bits": 4, "lowest_bits": None,
        "rotations": "ABCD",
    }  # fmt: skip


def test_of_a_training_it_is_recorded_where_there_is_one() -> None:
    recorded = options(method="resq", rank=8, steps=30).recorded()
    assert (recorded["rank"], recorded["steps"], recorded["adapter"]) == (8, 30, "lora")
    assert "scales_learning_rate" not in recorded


def test_every_width_of_the_format_can_be_asked_for_and_no_other() -> None:
    assert BITS == PART_BITS


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"method": "spinquant"}, "--method spinquant: expected one of rilq, resq"),
        ({"method": "resq", "bits": 3}, "--bits 3: has no meaning with --method resq"),
        ({"method": "resq", "group_size": 32}, "--group-size 32: has no meaning"),
        ({"method": "resq", "rotate": True}, "--rotate True: has no meaning"),
        ({"method": "resq", "train": "all"}, "--train all: scales of whole output channels"),
        ({"method": "resq", "adapter": "pooled"}, "--adapter pooled, --train none: scales"),
        ({"method": "resq", "student": "offload"}, "--student offload: expected auto, dense or"),
        ({"method": "resq", "scales_learning_rate": 1e-3}, "--scales-lr 0.001: has no meaning"),
        ({"method": "resq", "quantizer": "blockap"}, "--quantizer blockap: expected gptq or rtn"),
        ({"method": "resq", "low_bits": 8}, "--low-bits 8, --high-bits 8: expected more bits"),
        ({"method": "resq", "lowest_bits": 4}, "--lowest-bits 4, --low-bits 4, --high-bits 8"),
        ({"method": "resq", "high_bits": 7}, "--high-bits 7: expected one of 2, 3, 4, 6, 8"),
        ({"method": "resq", "high_fraction": 0.6}, "--high-fraction 0.6: expected above 0"),
        ({"method": "resq", "high_fraction": 0.3, "lowest_bits": 2}, "at most 0.25"),
        ({"method": "resq", "rotations": "DA"}, "--rotations DA: expected some of the letters"),
        ({"method": "resq", "rotations": ""}, "--rotations : expected some of the letters"),
        ({"method": "quarot", "high_bits": 6}, "--high-bits 6: --method quarot has one part"),
        ({"method": "quik", "rotations": "A"}, "--rotations A: --method quik has no rotations"),
        ({"high_bits": 6, "rotations": "A"}, "--high-bits, --rotations: of --method resq"),
    ],
)
def test_what_has_no_meaning_is_refused_by_name(given: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError) as refused:
        options(**given)
    assert said in str(refused.value)


@pytest.mark.parametrize("method", METHODS)
def test_recipes_are_those_of_rilq(method: str) -> None:
    with pytest.raises(OptionError, match="--recipe fast"):
        ConvertOptions.of_recipe("fast", model="some/model", method=method)


def test_all_mistakes_are_said_at_once() -> None:
    with pytest.raises(OptionError) as refused:
        options(method="resq", bits=3, low_bits=9, rotations="X")
    assert all(f in str(refused.value) for f in ("--bits 3", "--low-bits 9", "--rotations X"))
