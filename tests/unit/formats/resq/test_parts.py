"""How channels are split into parts, and what config.json may say about it."""

from typing import Any

import pytest

from rilq.formats.resq.config import ResqConfig
from rilq.formats.resq.parts import Parts


@pytest.mark.parametrize(
    ("size", "widths"), [(128, (112, 16)), (32, (28, 4)), (8, (7, 1)), (20, (18, 2))]
)
def test_the_last_eighth_of_the_channels_has_eight_bits(size: int, widths: tuple[int, int]) -> None:
    assert Parts.of(size, (4, 8), (0.875, 0.125)) == Parts((4, 8), widths)


def test_resq_has_four_and_a_half_bits_on_average_and_the_equal_variant_four() -> None:
    assert Parts((4, 8), (112, 16)).average_bits == 4.5
    assert Parts.of(64, (2, 4, 6), (0.125, 0.75, 0.125)).average_bits == 4.0


def test_a_part_without_a_channel_is_refused() -> None:
    with pytest.raises(ValueError, match="4 channels cannot be split .* has no channel"):
        Parts.of(4, (4, 8), (0.9, 0.1))


def test_the_configuration_comes_back_from_its_json() -> None:
    config = ResqConfig(
        (2, 4, 6), (0.125, 0.75, 0.125), hadamard=[4, 43], recipe={"method": "resq"}
    )
    again = ResqConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert again.linear_parts("model.layers.0.mlp.down_proj", 172) == Parts((4,), (172,))
    assert again.linear_parts("model.layers.0.mlp.up_proj", 64) == Parts((2, 4, 6), (8, 48, 8))
    assert again.cache_parts(16) == Parts((2, 4, 6), (2, 12, 2))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (dict(format_version=2), "format_version 2, this rilq reads 1"),
        (dict(bits=(4, 7)), r"bits \[4, 7\]"),
        (dict(bits=(4,)), r"bits \[4\] for fractions \[0.875, 0.125\]"),
        (dict(cache_fractions=(0.5, 0.25)), "cache_fractions .* whose sum is 1"),
        (dict(rotations="ABX"), "rotations 'ABX'"),
        (dict(rotations="ABC"), "expected sizes with D, and only then"),
        (dict(hadamard=()), "expected sizes with D, and only then"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ResqConfig(**{"hadamard": (64, 2), **wrong})
