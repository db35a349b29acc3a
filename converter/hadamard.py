"""Random rotations of any size, Hadamard matrices wherever a construction is known."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from rilq.formats.resq.hadamard import kronecker_apply

WIDEST_POWER = 6  # 2^6: wider powers of two are split, which costs less arithmetic


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix `Q = diag(signs) (F_1 x F_2 x ...)`, `x` the Kronecker product.

    Attributes:
        signs: `[size]` of +1 and -1, float64.
        factors: orthogonal matrices whose sizes multiply to `size`, float64.
    """

    signs: Tensor
    factors: tuple[Tensor, ...]

    def apply(self, rows: Tensor) -> Tensor:
        """`rows @ Q`, factor by factor.

        Args:
            rows: `[..., size]`, float64.

        Returns:
            `[..., size]`, float64.
        """
        return kronecker_apply(rows * self.signs, self.factors)


def random_rotation(size: int, generator: torch.Generator) -> Rotation:
    """A randomized Hadamard matrix of order `size`, or what comes closest to one.

    All entries are `+-1/sqrt(size)` where `size` is a product of orders that are powers of two
    (Sylvester), `q + 1` or `2 (q + 1)` (Paley I and II, over fields of any prime power `q`). Such
    are nearly all hidden and head sizes: 3 * 2^k, 5 * 2^k, 7 * 2^k, ... from some k on. Of any
    other size the part without a construction, made as small as can be, is a random orthogonal
    matrix as a Kronecker factor: 172 = 4 * 43 gives a Hadamard matrix of order 4 and a random
    factor of 43; an odd size is random as a whole.

    Args:
        size: 1 or more.
        generator: of the signs and of the random factor.

    Source: randomized Hadamard rotations of weights: QuaRot, Ashkboos et al. 2024
    (arXiv:2404.00456), section 3.
    """
    signs = torch.randint(2, (size,), generator=generator).double() * 2 - 1
    return Rotation(signs, hadamard_factors(size, generator))


def hadamard_factors(size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Orthogonal matrices, float64, whose Kronecker product is `random_rotation` without signs.

    Args:
        size: 1 or more.
        generator: of the factor without a construction, if there is one.
    """
    orders, rest = hadamard_orders(size)
    factors = [hadamard(order) / order**0.5 for order in orders]
    if rest > 1:
        factors.append(random_orthogonal(rest, generator))
    return tuple(factors)


def hadamard_orders(size: int) -> tuple[tuple[int, ...], int]:
    """Orders that `hadamard` can make, whose product divides `size`; and the quotient.

    The quotient is the least possible odd one (1 if `size` can be made whole), but for sizes 2 m
    with m odd: above 2, a Hadamard matrix's order is a multiple of 4.
    """
    odd, twos = size, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    found = ((_orders(twos, odd // rest), rest) for rest in _divisors(odd))
    return next((orders, rest) for orders, rest in found if orders is not None)


def _orders(twos: int, odd: int) -> tuple[int, ...] | None:
    """Orders with product `2^twos * odd`, or None."""
    if odd == 1:
        parts = -(-twos // WIDEST_POWER)
        return tuple(2 ** ((twos + part) // parts) for part in range(parts))
    for power in range(2, twos + 1):
        for part in reversed(_divisors(odd)[1:]):
            if _paley_field(part << power) is not None:
                others = _orders(twos - power, odd // part)
                if others is not None:
                    return (part << power, *others)
    return None


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def hadamard(order: int) -> Tensor:
    """A Hadamard matrix `[order, order]`: entries +-1, rows orthogonal; float64.

    Args:
        order: a power of two, or one that `hadamard_orders` gave.

    Source: Sylvester 1867; Paley, On orthogonal matrices, 1933.
    """
    if order & (order - 1) == 0:
        matrix = torch.ones(1, 1, dtype=torch.float64)
        while len(matrix) < order:
            matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), matrix)
        return matrix
    field = _paley_field(order)
    assert field is not None, f"no construction for order {order}"
    q = field[0] ** field[1]
    border = torch.ones(q + 1, q + 1, dtype=torch.float64)
    border[0, 0] = 0.0
    border[1:, 1:] = _quadratic_characters(*field)
    identity = torch.eye(q + 1, dtype=torch.float64)
    if q % 4 == 3:
        border[1:, 0] = -1.0  # skew-symmetric
        return border + identity
    double = torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double()
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]]).double()
    return torch.kron(border, double) + torch.kron(identity, diagonal)


def _paley_field(order: int) -> tuple[int, int] | None:
    """`(p, k)` of the field with `p^k` elements that gives a Hadamard matrix of `order`."""
    for q, remainder in ((order - 1, 3), (order // 2 - 1, 1)):
        if q % 4 == remainder and (field := _prime_power(q)):
            return field
    return None


def _prime_power(number: int) -> tuple[int, int] | None:
    """`(p, k)` with `p` prime and `number = p^k`, or None."""
    prime = next((d for d in range(2, int(number**0.5) + 1) if number % d == 0), number)
    power = 0
    while number % prime == 0 and number > 1:
        number, power = number // prime, power + 1
    return (prime, power) if number == 1 and power else None


def _quadratic_characters(prime: int, power: int) -> Tensor:
    """`chi(a - b)` for all elements of the field `[q, q]`: 0, +1 for squares, -1 for others."""
    q = prime**power
    places = torch.tensor([prime**i for i in range(power)])
    chi = torch.full((q,), -1.0, dtype=torch.float64)
    chi[0] = 0.0
    chi[torch.tensor(_powers_of_generator(prime, power))[::2] @ places] = 1.0
    elements = torch.arange(q)[:, None] // places % prime  # [q, power], digits in base p
    return chi[(elements[:, None] - elements[None]) % prime @ places]


def _powers_of_generator(prime: int, power: int) -> list[tuple[int, ...]]:
    """All nonzero elements of a finite field in the order `1, x, x^2, ...`, `x` a generator.

    An element is a polynomial in `x` by its coefficients, lowest first, modulo a monic polynomial;
    one modulo which the powers of `x` reach all `p^k - 1` nonzero polynomials makes a field.
    """
    one = (1,) + (0,) * (power - 1)
    for modulus in product(range(prime), repeat=power):
        if modulus[0] == 0:
            continue  # divisible by x
        seen = [one]
        while True:
            *low, lead = seen[-1]
            following = tuple(
                (a - lead * b) % prime for a, b in zip((0, *low), modulus, strict=True)
            )
            if following == one:
                break
            seen.append(following)
        if len(seen) == prime**power - 1:
            return seen
    raise AssertionError(f"{prime} is not a prime")


def random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """Uniform over all orthogonal matrices: the Q of a Gaussian, with R's diagonal positive."""
    gaussian = torch.randn(size, size, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    signed: Tensor = q * r.diagonal().sign()
    return signed.contiguous()
