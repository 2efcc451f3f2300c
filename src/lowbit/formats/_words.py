"""Rows of words that hold codes densely, as `native.pack_bits` makes them, and the layouts that turn them."""

from __future__ import annotations

from jaxtyping import Int32
from torch import Tensor, uint8

from lowbit import native

_BYTE = 8  # a word is moved as four codes of a byte, whatever it holds


def turn(words: Int32[Tensor, "rows words"], out: Int32[Tensor, "words rows"]) -> None:
    """`out = words.T`; `out` may be some columns of a matrix."""
    native.pack_bits_transposed(words.view(uint8), _BYTE, out=out)


def turn_back(lines: Int32[Tensor, "words rows"], out: Int32[Tensor, "rows words"]) -> None:
    """`out = lines.T`; `lines` may be some columns of a matrix."""
    native.unpack_bits_transposed(lines, _BYTE, 4 * len(lines), out=out.view(uint8))
