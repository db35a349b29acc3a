"""Codes, words and weights: the layout as literal words, and what holds for any codes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rilq.errors import InputError
from rilq.formats.packing import dequantize, dequantize_packed, pack, unpack

BITS = [2, 3, 4, 8]


def random_codes(bits: int, rows: int, width: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(2**bits, (rows, width), generator=draw, dtype=torch.uint8)


def signed(*words: int) -> list[list[int]]:
    return [[word - 2**32 if word >= 2**31 else word for word in words]]


def test_two_bit_codes_fill_a_word_from_its_lowest_bits() -> None:
    codes = torch.tensor([[0, 1, 2, 3] * 4], dtype=torch.uint8)
    assert pack(codes, 2).tolist() == signed(0xE4E4E4E4)  # 3210 in base 4 is 0b11100100


def test_four_bit_codes_fill_a_word_from_its_lowest_bits() -> None:
    codes = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 15]], dtype=torch.uint8)
    assert pack(codes, 4).tolist() == signed(0xF6543210)


def test_eight_bit_codes_are_the_bytes_of_a_word() -> None:
    codes = torch.tensor([[0x78, 0x56, 0x34, 0x92]], dtype=torch.uint8)
    assert pack(codes, 8).tolist() == signed(0x92345678)


def test_three_bit_codes_straddle_words() -> None:
    # By hand: 0..7 is 0o76543210 = 0xFAC688, 24 bits; four of them are 96 bits, 3 words.
    codes = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7] * 4], dtype=torch.uint8)
    assert pack(codes, 3).tolist() == signed(0x88FAC688, 0xC688FAC6, 0xFAC688FA)
    # Codes 10 and 21 alone cross a boundary: bits 30..32 and 63..65.
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, 10] = codes[0, 21] = 0b101
    assert pack(codes, 3).tolist() == signed(0x40000000, 0x80000001, 0b10)


@pytest.mark.parametrize("bits", BITS)
def test_packing_is_a_little_endian_bit_stream(bits: int) -> None:
    codes = random_codes(bits, 3, 96)
    for row, words in zip(codes.tolist(), pack(codes, bits).tolist(), strict=True):
        stream = sum(code << bits * i for i, code in enumerate(row))
        expected = [stream >> 32 * i & 0xFFFFFFFF for i in range(96 * bits // 32)]
        assert [word & 0xFFFFFFFF for word in words] == expected


@given(st.sampled_from(BITS), st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**32))
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
def test_unpack_undoes_pack(bits: int, rows: int, periods: int, seed: int) -> None:
    codes = random_codes(bits, rows, 32 * periods, seed)
    words = pack(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (rows, periods * bits)
    assert torch.equal(unpack(words, bits, 32 * periods), codes)


@given(st.sampled_from(BITS), st.integers(1, 4), st.integers(0, 2**32))
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
def test_pack_undoes_unpack_for_any_words(bits: int, rows: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**31), 2**31, (rows, bits), generator=draw, dtype=torch.int32)
    assert torch.equal(pack(unpack(words, bits, 32), bits), words)


def test_packing_takes_transposed_codes() -> None:
    codes = random_codes(2, 64, 48)
    assert torch.equal(unpack(pack(codes.T, 2), 2, 64), codes.T)


def test_ragged_rows_are_refused() -> None:
    with pytest.raises(InputError, match="24 codes of 2 bits do not fill whole 32-bit words"):
        pack(torch.zeros(1, 24, dtype=torch.uint8), 2)


def test_a_code_that_needs_more_bits_is_refused() -> None:
    with pytest.raises(InputError, match=r"expected 0 \.\. 3, found 4"):
        pack(torch.full((1, 32), 4, dtype=torch.uint8), 2)


def test_words_of_another_width_are_refused() -> None:
    with pytest.raises(InputError, match="64 codes of 3 bits take 6 words in each row, found 4"):
        unpack(torch.zeros(1, 4, dtype=torch.int32), 3, 64)


def test_dequantize_gives_the_worked_number_of_the_convention() -> None:
    codes = torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8)
    half, quarter = torch.tensor([[0.5]]).half(), torch.tensor([[1.25]]).half()
    assert dequantize(codes, half, quarter).tolist() == [[-0.625, -0.125, 0.375, 0.875]]


def test_each_group_has_its_own_scale_and_zero_point() -> None:
    codes = torch.tensor([[3, 1, 3, 1], [0, 2, 0, 2]], dtype=torch.uint8)
    scale = torch.tensor([[1.0, 2.0], [4.0, 8.0]]).half()
    zero_point = torch.tensor([[0.0, 1.0], [2.0, -1.0]]).half()
    expected = [[3.0, 1.0, 4.0, 0.0], [-8.0, 0.0, 8.0, 24.0]]
    assert dequantize(codes, scale, zero_point).tolist() == expected


def test_dequantize_computes_in_float32_and_casts_last() -> None:
    codes = torch.tensor([[3]], dtype=torch.uint8)
    scale, zero_point = torch.tensor([[0.1]]).half(), torch.tensor([[1.2345]]).half()
    exact = scale.double() * (3 - zero_point.double())
    single = dequantize(codes, scale, zero_point)
    assert single.dtype == torch.float32
    assert abs(single.item() - exact.item()) <= 2**-24 * exact.item()
    assert dequantize(codes, scale, zero_point, dtype=torch.bfloat16).equal(exact.bfloat16())


@pytest.mark.parametrize("bits", BITS)
def test_dequantize_packed_equals_dequantize_of_the_codes(bits: int) -> None:
    codes = random_codes(bits, 4, 64)
    scale, zero_point = torch.rand(4, 2).half() + 0.5, torch.randn(4, 2).half()
    packed = dequantize_packed(pack(codes, bits), scale, zero_point, bits, dtype=torch.float16)
    assert packed.equal(dequantize(codes, scale, zero_point, dtype=torch.float16))
