"""The cache of codes: what it gives back, what it takes of memory, what transformers asks of it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rilq.formats.resq.cache import STATE_DTYPE, ResqCache, pack_states, unpack_states
from rilq.formats.resq.parts import Parts
from rilq.formats.resq.quantizer import quantize_dequantize

RESQ = ((4, 8), (0.875, 0.125))
PARTS = Parts.of(32, *RESQ)


def drawn(tokens: int, *, batch: int = 2, heads: int = 3, size: int = 32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, heads, tokens, size, generator=generator)


def left(states: Tensor, parts: Parts = PARTS) -> Tensor:
    return quantize_dequantize(states, parts, scale_dtype=STATE_DTYPE)


@pytest.fixture
def filled() -> tuple[ResqCache, Tensor, Tensor]:
    """A cache of one layer with 7 tokens; the keys and values that it gives back."""
    cache, keys, values = ResqCache(1, PARTS), drawn(7), drawn(7, seed=1)
    return cache, *cache.update(keys, values, 0)


def given_back(cache: ResqCache) -> tuple[Tensor, Tensor]:
    """Keys and values of the tokens that are in the cache now."""
    token = torch.zeros(cache.codes[0].batch_size, 3, 1, 32)
    keys, values = cache.update(token, token, 0)
    return keys[:, :, :-1], values[:, :, :-1]


@pytest.mark.parametrize(
    "parts",
    [
        Parts((4, 8), (112, 16)),
        Parts((4, 8), (7, 1)),
        Parts((2, 4, 6), (16, 96, 16)),
        Parts((3, 6), (5, 3)),
    ],
)
def test_codes_come_back_from_their_bytes(parts: Parts) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.cat(
        [
            torch.randint(2**bits, (2, 3, 5, width), generator=generator, dtype=torch.uint8)
            for bits, width in zip(parts.bits, parts.widths, strict=True)
        ],
        -1,
    )
    packed = pack_states(codes, parts)
    least = sum(b * w for b, w in zip(parts.bits, parts.widths, strict=True)) / 8
    assert least <= packed.shape[-1] < least + len(parts.bits)
    assert torch.equal(unpack_states(packed, parts), codes)


def test_it_gives_back_what_quantization_leaves_of_all_tokens() -> None:
    cache, keys, values = ResqCache(2, PARTS), drawn(9), drawn(9, seed=1)
    for start, end in [(0, 4), (4, 5), (5, 9)]:
        found = cache.update(keys[:, :, start:end], values[:, :, start:end], 1)
        assert torch.equal(found[0], left(keys[:, :, :end]))
        assert torch.equal(found[1], left(values[:, :, :end]))
    assert (cache.get_seq_length(0), cache.get_seq_length(1)) == (0, 9)
    assert cache.get_mask_sizes(3, 1) == (12, 0)


def test_cropping_forgets_the_last_tokens(filled: tuple[ResqCache, Tensor, Tensor]) -> None:
    cache, keys, values = filled
    cache.crop(0)
    cache.crop(-3)
    found = given_back(cache)
    assert torch.equal(found[0], keys[:, :, :4]) and torch.equal(found[1], values[:, :, :4])
    cache.crop(2)  # as transformers 5.5 means it
    assert torch.equal(given_back(cache)[0], keys[:, :, :2])


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([1, 1])), [1, 1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
    ],
    ids=["reorder", "select", "repeat"],
)
def test_rows_of_the_batch_move_as_beam_search_asks(
    filled: tuple[ResqCache, Tensor, Tensor], change: Callable[[ResqCache], None], rows: list[int]
) -> None:
    cache, keys, values = filled
    change(cache)
    found = given_back(cache)
    assert torch.equal(found[0], keys[rows]) and torch.equal(found[1], values[rows])


def test_a_reset_cache_is_empty(filled: tuple[ResqCache, Tensor, Tensor]) -> None:
    cache = filled[0]
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes, cache.codes[0].batch_size) == (0, 0, -1)
    assert torch.equal(cache.update(drawn(2), drawn(2), 0)[0], left(drawn(2)))
