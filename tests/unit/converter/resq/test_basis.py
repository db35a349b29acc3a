"""Bases: orthogonal, in ascending order of variance, mixed within parts and not across."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rilq.converter.resq.basis import (
    Bases,
    Covariances,
    Sizes,
    ascending_eigenvectors,
    hadamard_bases,
    identity_bases,
    mixing,
    permuted_bases,
    resq_bases,
)
from rilq.errors import RilqError
from rilq.formats.resq.parts import Parts

SIZES = Sizes(hidden=48, layers=3, kv_heads=2, head_dim=16)
HIDDEN, HEAD = Parts((2, 4, 8), (6, 36, 6)), Parts((4, 8), (14, 2))


def covariance(size: int, seed: int) -> Tensor:
    """With eigenvalues from 0.01 to 100, in directions that are no channel's."""
    draw = torch.Generator().manual_seed(seed)
    vectors, _ = torch.linalg.qr(torch.randn(size, size, generator=draw, dtype=torch.float64))
    return vectors * torch.logspace(-2, 2, size, dtype=torch.float64) @ vectors.T


@pytest.fixture(scope="module")
def covariances() -> Covariances:
    heads = torch.stack([covariance(16, seed) for seed in range(9)])
    return Covariances(covariance(48, 9), heads[:6].view(3, 2, 16, 16), heads[6:])


@pytest.fixture(scope="module")
def bases(covariances: Covariances) -> Bases:
    return resq_bases(covariances, HIDDEN, HEAD, seed=1)


def pairs(bases: Bases, covariances: Covariances) -> list[tuple[Tensor, Tensor, Parts]]:
    """Each matrix with the covariance and the parts that it is for."""
    heads = torch.cat([bases.values.flatten(0, 1), bases.keys])
    theirs = torch.cat([covariances.values.flatten(0, 1), covariances.keys])
    others = [(u, c, HEAD) for u, c in zip(heads, theirs, strict=True)]
    return [(bases.residual, covariances.residual, HIDDEN), *others]


@pytest.mark.parametrize("kind", ["resq", "permuted", "hadamard", "identity"])
def test_every_basis_is_orthogonal(kind: str, bases: Bases, covariances: Covariances) -> None:
    made = {
        "resq": bases,
        "permuted": permuted_bases(covariances),
        "hadamard": hadamard_bases(SIZES, seed=3),
        "identity": identity_bases(SIZES),
    }[kind]
    assert made.sizes == SIZES
    for matrix in vars(made).values():
        identity = torch.eye(matrix.shape[-1], dtype=torch.float64).expand_as(matrix)
        torch.testing.assert_close(matrix @ matrix.mT, identity, rtol=0, atol=1e-12)


def test_parts_are_in_ascending_order_of_variance(bases: Bases, covariances: Covariances) -> None:
    for basis, covariance, parts in pairs(bases, covariances):
        variances = (basis.T @ covariance @ basis).diagonal().split(parts.widths)
        for lower, higher in zip(variances, variances[1:], strict=False):
            assert lower.max() < higher.min()


def test_the_high_part_holds_the_largest_eigenvalues(
    bases: Bases, covariances: Covariances
) -> None:
    for basis, covariance, parts in pairs(bases, covariances):
        high = basis[:, -parts.widths[-1] :]
        largest = torch.linalg.eigvalsh(covariance)[-parts.widths[-1] :].sum()
        torch.testing.assert_close((high.T @ covariance @ high).trace(), largest)


def test_nothing_is_mixed_across_parts(bases: Bases, covariances: Covariances) -> None:
    """Directions of two parts are uncorrelated, as eigenvectors are; those of one part are not."""
    for basis, covariance, parts in pairs(bases, covariances):
        turned = basis.T @ covariance @ basis
        inside = torch.block_diag(*(torch.ones(width, width) for width in parts.widths)).bool()
        assert turned[~inside].abs().max() < 1e-10 * turned.abs().max()
        off_diagonal = inside & ~torch.eye(len(basis)).bool()
        assert turned[off_diagonal].abs().max() > 1e-2


def test_mixing_spreads_a_channel_over_its_part(covariances: Covariances) -> None:
    plain = ascending_eigenvectors(covariances.residual)
    mixed = plain @ mixing(HIDDEN, torch.Generator().manual_seed(0))
    wide = slice(HIDDEN.widths[0], -HIDDEN.widths[-1])
    before, after = (
        (u.T @ covariances.residual @ u).diagonal()[wide].max() for u in (plain, mixed)
    )
    assert after < before / 2


def test_damping_changes_no_direction(covariances: Covariances) -> None:
    values, vectors = torch.linalg.eigh(covariances.residual)
    found = ascending_eigenvectors(covariances.residual)
    torch.testing.assert_close((found * vectors).sum(0).abs(), torch.ones_like(values))


def test_each_head_and_layer_has_its_own_basis(bases: Bases) -> None:
    heads = torch.cat([bases.values.flatten(0, 1), bases.keys]).flatten(1)
    distances = torch.cdist(heads, heads) + 9 * torch.eye(len(heads))
    assert distances.min() > 1


def test_the_seed_decides(bases: Bases, covariances: Covariances) -> None:
    same, other = (resq_bases(covariances, HIDDEN, HEAD, seed=seed) for seed in (1, 2))
    for name, matrix in vars(bases).items():
        assert torch.equal(matrix, getattr(same, name))
        assert not torch.allclose(matrix, getattr(other, name))


def test_permuted_bases_put_the_largest_channels_last(covariances: Covariances) -> None:
    found = permuted_bases(covariances)
    for basis, covariance, _ in pairs(found, covariances):
        turned = basis.T @ covariance @ basis
        assert turned.diagonal().equal(covariance.diagonal().sort().values)


def test_hadamard_bases_spread_a_channel_over_all() -> None:
    found = hadamard_bases(SIZES, seed=0)
    for matrix in vars(found).values():
        expected = torch.full_like(matrix, matrix.shape[-1] ** -0.5)
        torch.testing.assert_close(matrix.abs(), expected)


@pytest.mark.parametrize("letters", ["", "A", "BC", "ABC", "CD"])
def test_bases_that_are_not_named_become_identities(letters: str, bases: Bases) -> None:
    plain, kept = identity_bases(SIZES), bases.only(letters)
    for letter, name in zip("ABC", ("residual", "values", "keys"), strict=True):
        source = bases if letter in letters else plain
        assert torch.equal(getattr(kept, name), getattr(source, name))


def test_what_is_saved_is_loaded(bases: Bases, tmp_path: Path) -> None:
    bases.save(tmp_path / "bases.safetensors")
    loaded = Bases.load(tmp_path / "bases.safetensors")
    for name, matrix in vars(bases).items():
        assert torch.equal(getattr(loaded, name), matrix)


def test_covariances_that_overflowed_are_refused(covariances: Covariances) -> None:
    spoilt = replace(
        covariances, keys=covariances.keys.clone().index_fill(2, torch.tensor(3), 1e999)
    )
    with pytest.raises(RilqError, match=r"covariance \[16, 16\]: expected finite sums"):
        resq_bases(spoilt, HIDDEN, HEAD, seed=0)
