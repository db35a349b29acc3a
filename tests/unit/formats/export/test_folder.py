"""Tensors into shards, and dense weights read back by code that the writer does not share."""

import pytest
import torch

from rilq.errors import OptionError
from rilq.formats.export.folder import unpack_stream
from rilq.formats.export.kind import export_dtype
from rilq.formats.export.kinds import KINDS, kind_of
from rilq.formats.packing import pack


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint32])
def test_codes_come_back_from_the_bit_stream(bits: int, dtype: torch.dtype) -> None:
    codes = torch.randint(2**bits, (5, 64), generator=torch.Generator().manual_seed(bits))
    words = pack(codes.to(torch.uint8), bits).view(dtype)
    assert torch.equal(unpack_stream(words, bits), codes.to(torch.uint8))


def test_the_first_code_is_in_the_lowest_bits() -> None:
    """0b11_10_01_00 and twelve zeros: the codes 0, 1, 2, 3, 0, ..., by hand."""
    assert unpack_stream(torch.tensor([[0b11100100]], dtype=torch.int32), 2)[0, :5].tolist() == [
        *(0, 1, 2, 3, 0)
    ]


def test_kinds_and_dtypes_are_named_in_refusals() -> None:
    with pytest.raises(OptionError, match=", ".join(KINDS)):
        kind_of("onnx")
    with pytest.raises(OptionError, match="bf16"):
        export_dtype("int8")
    assert export_dtype("bf16") == export_dtype("bfloat16") == torch.bfloat16
