"""Rotations: orthogonal matrices that spread outliers evenly over all channels, and that are fast to apply.

A rotation is a Kronecker product of small orthogonal factors with random signs in front, so that a vector of n channels
costs n times the sum of the factors' orders instead of n^2. The factors are Hadamard matrices wherever a width has one
that Sylvester's and Paley's constructions reach: every channel then weighs the same in every other.

Sources: Paley, "On orthogonal matrices" (1933); QuIP# (arXiv:2402.04396, section 3) for random signs; QuaRot
(arXiv:2404.00456) for the use.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice, product
from math import isqrt, prod
from typing import final

import torch
from jaxtyping import Float, Int8
from torch import Tensor

# Powers of two are applied as factors of this order: small enough to be cheap, large enough for a matrix product.
_SYLVESTER = 64


@final
@dataclass(frozen=True, eq=False)
class Rotation:
    """The orthogonal matrix `diag(signs) (F1 x F2 x ...)`, `x` being Kronecker's product; rows are turned by `apply`.

    Attributes:
        signs: plus or minus one per channel, float64.
        factors: orthogonal matrices, float64, whose orders multiply to the width.
    """

    signs: Float[Tensor, "width"]
    factors: tuple[Tensor, ...]

    @property
    def width(self) -> int:
        """Channels."""
        return len(self.signs)

    def apply(self, x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
        """`x @ matrix()`, in the dtype of `x`."""
        # The first factor turns the slowest axis, the next one the next; each is moved to the end for its product.
        out, left = (x * self.signs.to(x.dtype)).contiguous(), self.width  # products of strided batches are slow
        for factor in self.factors:
            left //= len(factor)
            turned = out.reshape(-1, len(factor), left).transpose(1, 2)
            out = torch.matmul(turned, factor.to(x.dtype)).transpose(1, 2)
        return out.reshape(x.shape)

    def matrix(self) -> Float[Tensor, "width width"]:
        """The whole matrix, float64."""
        return self.apply(torch.eye(self.width, dtype=torch.float64))


def random_rotation(width: int, seed: int, signs: bool = True) -> Rotation:
    """A random Hadamard rotation; widths without a known Hadamard matrix get a random orthogonal factor for the rest.

    Args:
        width: channels, at least 1.
        seed: of the signs and of the orthogonal factor.
        signs: whether channels get random signs first; without them the matrix is the same for every seed, if Hadamard.
    """
    generator = torch.Generator().manual_seed(seed)
    plus = torch.ones(width, dtype=torch.float64)
    flips = torch.randint(2, (width,), generator=generator) if signs else torch.zeros(width, dtype=torch.int64)
    orders = hadamard_orders(width)
    if orders is not None:
        factors = [hadamard(order).double() / order**0.5 for order in orders]
    else:
        power = width & -width
        rest = _orthogonal(width // power, generator)
        factors = [rest, *(hadamard(order).double() / order**0.5 for order in _halved(power))]
    return Rotation(plus - 2 * flips, tuple(factors))


def orthogonal_rotation(width: int, seed: int) -> Rotation:
    """A rotation drawn uniformly from all orthogonal matrices; it costs `width` operations per channel."""
    generator = torch.Generator().manual_seed(seed)
    return Rotation(torch.ones(width, dtype=torch.float64), (_orthogonal(width, generator),))


def _orthogonal(order: int, generator: torch.Generator) -> Float[Tensor, "order order"]:
    """Uniform over all orthogonal matrices: QR of a Gaussian with the signs of R's diagonal (Mezzadri 2007)."""
    q, r = torch.linalg.qr(torch.randn(order, order, dtype=torch.float64, generator=generator))
    turned: Tensor = q * r.diagonal().sign()
    return turned


def hadamard_orders(width: int) -> tuple[int, ...] | None:
    """Orders of the Hadamard matrices whose Kronecker product has this width, large first; None where there is none.

    The part that is no power of two is one Paley matrix of the smallest order that there is, or a product of several.
    """
    power = width & -width
    core = _core(width // power, power)
    if core is None:
        return None
    rest = width // prod(core)
    return (*core, *_halved(rest)) if rest > 1 or not core else core


def _core(odd: int, power: int) -> tuple[int, ...] | None:
    """Paley orders that contain all odd factors of a width and no more than its power of two."""
    if odd == 1:
        return ()
    doublings = [2**k for k in range(2, power.bit_length())]
    single = next((odd * two for two in doublings if _paley_field(odd * two)), None)
    if single is not None:
        return (single,)
    for divisor in (d for d in range(3, isqrt(odd) + 1, 2) if odd % d == 0):
        for two in doublings:
            rest = _core(odd // divisor, power // two) if _paley_field(divisor * two) else None
            if rest is not None:
                return (divisor * two, *rest)
    return None


def _halved(power: int) -> Iterator[int]:
    """A power of two as factors of at most `_SYLVESTER`, of about equal size."""
    bits, most = power.bit_length() - 1, _SYLVESTER.bit_length() - 1
    parts = max(-(-bits // most), 1)
    yield from (2 ** (bits // parts + (n < bits % parts)) for n in range(parts))


@cache
def hadamard(order: int) -> Int8[Tensor, "order order"]:
    """A Hadamard matrix by Sylvester's or Paley's construction: entries plus or minus one, rows orthogonal.

    Raises:
        ValueError: neither construction has this order.
    """
    if order & (order - 1) == 0:
        return _sylvester(order)
    found = _paley_field(order)
    if found is None:
        raise ValueError(f"no Hadamard matrix of order {order} by Sylvester's or Paley's construction")
    p, k, double = found
    residues = _jacobsthal(p, k)
    size = len(residues) + 1
    bordered = torch.zeros(size, size, dtype=torch.int8)
    bordered[0, 1:], bordered[1:, 0], bordered[1:, 1:] = 1, 1 if double else -1, residues
    if not double:  # q = 3 mod 4: the bordered matrix is skew
        return bordered + torch.eye(size, dtype=torch.int8)
    cross, diagonal = torch.tensor([[1, 1], [1, -1]]).to(torch.int8), torch.tensor([[1, -1], [-1, -1]]).to(torch.int8)
    return torch.kron(bordered, cross) + torch.kron(torch.eye(size, dtype=torch.int8), diagonal)


def _sylvester(order: int) -> Int8[Tensor, "order order"]:
    index = torch.arange(order)
    parity = torch.zeros(order, order, dtype=torch.int64)
    for bit in range(order.bit_length()):
        parity ^= (index[:, None] & index) >> bit & 1
    return (1 - 2 * parity).to(torch.int8)


@cache
def _paley_field(order: int) -> tuple[int, int, bool] | None:
    """The field of Paley's construction for an order: prime, degree, and whether it is his second; None for none."""
    for size, rest, double in ((order - 1, 3, False), (order // 2 - 1, 1, True)):
        if order % 4 == 0 and size % 4 == rest and (power := _prime_power(size)):
            return (*power, double)
    return None


def _prime_power(size: int) -> tuple[int, int] | None:
    """Prime and exponent."""
    if size < 2:
        return None
    prime = next((d for d in range(2, isqrt(size) + 1) if size % d == 0), size)
    exponent = 0
    while size % prime == 0:
        size, exponent = size // prime, exponent + 1
    return (prime, exponent) if size == 1 else None


def _jacobsthal(p: int, k: int) -> Int8[Tensor, "q q"]:
    """Entry (a, b): 1 where a - b is a square of the field with `p**k` elements, -1 where it is none, 0 for a = b."""
    weights = torch.tensor([p**digit for digit in range(k)])
    character = torch.zeros(p**k, dtype=torch.int8)
    for exponent, element in enumerate(_powers(p, k)):
        character[int((torch.tensor(element) * weights).sum())] = 1 - 2 * (exponent % 2)
    digits = torch.arange(p**k)[:, None] // weights % p
    return character[((digits[:, None] - digits) % p * weights).sum(-1)]


def _powers(p: int, k: int) -> list[tuple[int, ...]]:
    """Powers 0 to q - 2 of a generator of the field: of x modulo a primitive polynomial, which is searched for."""
    for tail in product(range(p), repeat=k):
        found = list(islice(_walk(p, tail), p**k))
        if len(found) == p**k - 1:
            return found
    raise AssertionError("every finite field has a primitive polynomial")


def _walk(p: int, tail: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """1, x, x^2, ... as coefficients, lowest first, where x^k stands for `tail`, until 1 or 0 comes back."""
    one = (1, *[0] * (len(tail) - 1))
    element = one
    while True:
        yield element
        carry, shifted = element[-1], (0, *element[:-1])
        element = tuple((low + carry * high) % p for low, high in zip(shifted, tail, strict=True))
        if element == one or not any(element):
            return
