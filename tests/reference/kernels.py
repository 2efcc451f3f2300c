"""What the native kernels mean, one element at a time: exact rationals and Python's big integers, no vectors."""

from __future__ import annotations

from fractions import Fraction
from itertools import product
from math import fsum, isnan

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
Codes = NDArray[np.uint8]


def expand(blocks: FloatArray, shape: tuple[int, ...], block: tuple[int, int]) -> FloatArray:
    """The value of each element's block, in the shape of the weight."""
    full = np.empty(shape, np.float32)
    for row, col in product(*map(range, shape)):
        full[row, col] = blocks[row // block[0], col // block[1]]
    return full


def block_range(weight: FloatArray, block: tuple[int, int]) -> tuple[FloatArray, FloatArray]:
    """Least and greatest value of each block."""
    across = [range(0, size, step) for size, step in zip(weight.shape, block, strict=True)]
    parts = [[weight[r : r + block[0], c : c + block[1]] for c in across[1]] for r in across[0]]
    return np.array([[p.min() for p in row] for row in parts]), np.array([[p.max() for p in row] for row in parts])


def quantize_affine(weight: FloatArray, scale: FloatArray, zero: FloatArray, top: int, *, round_sum: bool) -> Codes:
    """Codes from full-shape scales and zeros. Python's `round` takes ties to even."""
    codes = np.empty(weight.shape, np.uint8)
    with np.errstate(over="ignore"):
        for at in np.ndindex(weight.shape):
            quotient = weight[at] / scale[at]
            if round_sum:
                value = float(quotient + zero[at])
            else:
                value = float(quotient) if np.isinf(quotient) else round(float(quotient)) + float(zero[at])
            codes[at] = top if value >= top else 0 if value <= 0 else round(value)
    return codes


def nearest(value: float, table: dict[int, float]) -> int:
    """Code of the nearest level, measured exactly; ties by even code, then magnitude, then the greater level."""

    def badness(code: int) -> tuple[Fraction, int, float, float]:
        return abs(Fraction(value) - Fraction(table[code])), code % 2, abs(table[code]), -table[code]

    return min(table, key=badness)


def quantize_levels(weight: FloatArray, scale: FloatArray, table: dict[int, float]) -> Codes:
    """Codes of the levels nearest to `weight / scale` (full shape)."""
    codes = np.empty(weight.shape, np.uint8)
    for at in np.ndindex(weight.shape):
        codes[at] = nearest(float(weight[at] / scale[at]), table)
    return codes


def fp8_table(exponent_bits: int, mantissa_bits: int, greatest: float) -> dict[int, float]:
    """Byte to value of every finite FP8 number: sign, exponent, mantissa, as the paper writes them."""
    bias = 2 ** (exponent_bits - 1) - 1
    table: dict[int, float] = {}
    for sign, exponent, mantissa in product((0, 1), range(2**exponent_bits), range(2**mantissa_bits)):
        fraction, power = mantissa / 2**mantissa_bits, max(exponent, 1) - bias
        value = (fraction + (exponent > 0)) * 2.0**power
        if value <= greatest:
            table[sign << 7 | exponent << mantissa_bits | mantissa] = -value if sign else value
    return table


def dequantize(codes: Codes, scale: FloatArray, zero: FloatArray | None, levels: FloatArray) -> FloatArray:
    """Full-shape scales and zeros; every operation rounds to float32."""
    out = np.empty(codes.shape, np.float32)
    for at in np.ndindex(codes.shape):
        level = levels[codes[at]] if zero is None else np.float32(codes[at]) - zero[at]
        out[at] = level * scale[at]
    return out


def error_sums(weight: FloatArray, dequantized: FloatArray) -> tuple[float, float, float]:
    """Squared error, squared weight, greatest absolute error; the differences are float32, the sums exact."""
    errors = [float(e) for e in (weight - dequantized).ravel()]
    weights = [float(w) for w in weight.ravel()]
    greatest = max((abs(e) for e in errors if not isnan(e)), default=0.0)
    return fsum(e * e for e in errors), fsum(w * w for w in weights), greatest


def pack_bits(codes: Codes, bits: int) -> NDArray[np.int32]:
    """Each row as one big integer, cut into little-endian words."""
    size = -(-codes.shape[1] * bits // 32) * 4
    rows = [sum(int(code) % 2**bits << bits * i for i, code in enumerate(row)) for row in codes]
    data = b"".join(row.to_bytes(size, "little") for row in rows)
    return np.frombuffer(data, "<i4").reshape(codes.shape[0], size // 4)


def pack_awq(codes: Codes) -> NDArray[np.int32]:
    """Eight rows as the digits of a hexadecimal number, those of AutoAWQ's `order_map` from the lowest."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    words = [
        [
            int("".join(f"{eight[row][col] % 16:x}" for row in reversed(order)), 16)
            for eight in codes.reshape(-1, 8, codes.shape[1])
        ]
        for col in range(codes.shape[1])
    ]
    return np.array(words, np.uint32).reshape(codes.shape[1], codes.shape[0] // 8).view(np.int32)


def pack_nibbles_high_first(codes: Codes) -> Codes:
    """Two codes per byte, the first in the high nibble."""
    digits = "".join(f"{code:x}" for code in codes)
    return np.frombuffer(bytes.fromhex(digits + "0" * (len(digits) % 2)), np.uint8)
