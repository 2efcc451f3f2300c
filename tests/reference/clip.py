"""Searched clipping, one block and one range at a time, judged by the outputs of rows of inputs, in float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lowbit.schemes import Scheme
from tests.reference import methods


def output_error(part: NDArray[np.float32], decoded: NDArray[np.float32], inputs: NDArray[np.float64]) -> float:
    """Mean over the inputs of the squared error of a block's contribution to its rows' outputs."""
    difference = decoded.astype(np.float64) - part.astype(np.float64)
    return float(((inputs @ difference.T) ** 2).sum() / len(inputs))


def best_error(
    part: NDArray[np.float32], inputs: NDArray[np.float64], scheme: Scheme, steps: int, most: float, divisor: float = 1
) -> float:
    """The least error over the whole range and those shrunk towards 0, up to half as large again on uneven grids.

    Of symmetric integers that of round-to-nearest, and of scales of either sign for all these ranges.
    """
    signed = scheme.grid.kind == "int" and scheme.zero == "none"
    low, high = float(part.min()), float(part.max())
    least, step = np.inf, most / steps
    larger = 0 if scheme.grid.kind == "int" else int(0.5 / step)
    for i in range(-larger, steps + 1):
        down, up = float(np.float32(low) * np.float32(1 - step * i)), float(np.float32(high) * np.float32(1 - step * i))
        plain = methods.stored(methods.plain_scale(down, up, scheme), max(-down, up), scheme, divisor)
        scales = [plain] if not signed else [methods.signed_scale(down, up, scheme), *([plain] if i == 0 else [])]
        for scale in scales:
            decoded = methods.encode(part, scale, methods.stored_zero(down, scale, scheme), scheme)[1]
            least = min(least, output_error(part, decoded, inputs))
    return least
