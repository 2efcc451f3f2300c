"""What grids and types of scales hold: every value written out, the nearest found by looking at all of them."""

from __future__ import annotations

from bisect import bisect_left
from functools import cache
from math import inf, log2

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
Codes = NDArray[np.uint8]

# OCP MX specification 1.0, table 5, and the sign in the high bit.
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


@cache
def positive_values(kind: str) -> list[float]:
    """0 and every positive finite value of a type of scales, ascending, so that the index is the bit pattern."""
    if kind == "e8m0":
        return [2.0 ** (byte - 127) for byte in range(255)]
    exponent_bits, mantissa_bits, count = {"f16": (5, 10, 31), "bf16": (8, 7, 255), "e4m3": (4, 3, 16)}[kind]
    bias, steps = 2 ** (exponent_bits - 1) - 1, 2**mantissa_bits
    values = [m / steps * 2.0 ** (1 - bias) for m in range(steps)]
    values += [(1 + m / steps) * 2.0 ** (e - bias) for e in range(1, count) for m in range(steps)]
    return values[:-1] if kind == "e4m3" else values  # its last pattern is NaN


def round_positive(value: float, kind: str) -> float:
    """The nearest positive value of the type, ties to the even pattern; never 0, never beyond the greatest."""
    if kind == "f32":
        return float(np.clip(np.float32(value), np.float32(2.0**-149), np.finfo(np.float32).max))
    table = positive_values(kind)
    above = bisect_left(table, value)
    if above == len(table):
        return table[-1]
    at = min((max(above - 1, 0), above), key=lambda i: (abs(table[i] - value), i % 2))
    return table[max(at, 1)]


def mx_scale(largest: float, greatest_level: float) -> float:
    """Power of two for a block's absmax: floor of both logarithms, absmax rounded up from 1.75 * 2**n on."""
    if largest < 2.0**-126:
        return 2.0**-127
    exponent = int(np.floor(log2(largest)))
    if largest >= 1.75 * 2.0**exponent:
        exponent += 1
    return 2.0 ** min(max(exponent - int(np.floor(log2(greatest_level))), -127), 127)


def nearest_codes(quotients: FloatArray, levels: list[float]) -> Codes:
    """For each quotient the code of the nearest level; ties to the even code, then the smaller magnitude, then upwards.

    Levels that are not finite are no candidates; of equal levels (0 and -0) the lower code is taken.
    """
    order = sorted(
        (code for code, level in enumerate(levels) if abs(level) < inf),
        key=lambda code: (code % 2, abs(levels[code]), -levels[code], code),
    )
    candidates = np.array([levels[code] for code in order])
    distance = np.abs(quotients.astype(np.float64)[..., None] - candidates)
    codes: Codes = np.array(order, np.uint8)[distance.argmin(-1)]
    return codes


def fp8_codes(quotients: FloatArray, levels: list[float]) -> Codes:
    """Like `nearest_codes`, but a negative number that rounds to zero keeps its sign, as FP8 has it."""
    codes = nearest_codes(quotients, levels)
    return np.where((codes == 0) & np.signbit(quotients), np.uint8(0x80), codes)
