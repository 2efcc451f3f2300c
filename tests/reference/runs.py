"""Runs of codes of llama.cpp's types with tables by their definition: every legal run of eight, by the `gguf` package.

Of IQ3 a run has two entries of four weights: all their pairs are too many, so that its halves are looked through apart,
which finds the least error where the form has nothing between them.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]
EVEN = ("iq2_xxs", "iq2_xs", "iq3_xxs")  # their eight signs have an even number of minuses
TABLES = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s")


def entries(name: str) -> Matrix:
    """Values of the table, without signs or shift: eight or four to an entry."""
    table: Any = getattr(gguf.quants, name.upper())
    table.init_grid()
    return np.asarray(table.grid.reshape(table.grid_shape), dtype=np.float64)


def runs(name: str, shift: float | None = None) -> dict[bool, Matrix]:
    """Every run of eight (of IQ3 every half of one), by whether its number of minuses is odd."""
    table = entries(name)
    if name.startswith("iq1"):
        shifts = (0.125, -0.125) if shift is None else (shift,)
        return {False: np.concatenate([table + each for each in shifts])}
    signs = np.array(list(product((1.0, -1.0), repeat=table.shape[1])))
    odd = signs.prod(1) < 0
    made = {half: (table[:, None] * signs[odd == half]).reshape(-1, table.shape[1]) for half in (False, True)}
    return made if name in EVEN else {False: np.concatenate(list(made.values()))}


def nearest(at: Matrix, form: Matrix, of: Matrix) -> tuple[float, Matrix]:
    """That of least (x - at)^T form (x - at)."""
    away = of - at
    errors = np.einsum("ni,ij,nj->n", away, form, away, optimize=True)
    best = int(errors.argmin())
    return float(errors[best]), of[best]


def best(name: str, at: Matrix, form: Matrix, shift: float | None = None) -> tuple[float, Matrix]:
    """The legal run of eight with the least error, and that error."""
    legal = runs(name, shift)
    if not name.startswith("iq3"):
        return nearest(at, form, legal[False])
    halves = [
        {odd: nearest(at[part], form[part, part], each) for odd, each in legal.items()}
        for part in (slice(0, 4), slice(4, 8))
    ]
    pairs = [(halves[0][odd], halves[1][odd]) for odd in legal]
    errors = [one[0] + two[0] for one, two in pairs]
    one, two = pairs[int(np.argmin(errors))]
    return min(errors), np.concatenate([one[1], two[1]])


def quantize(name: str, weight: Matrix, scales: Matrix, hessian: Matrix, order: list[int]) -> Matrix:
    """GPTQ (`tests.reference.gptq.quantize`) with eight columns at once.

    Of the columns that are not done, those of the run have the form inverse(inverse(H)[run, run]) around what they
    would best be, and the others make up for `error inverse(inverse(H)[run, run]) inverse(H)[run, left]`.
    """
    work, result = weight.copy(), np.zeros_like(weight)
    for step in range(0, len(order), 8):
        run, left = order[step : step + 8], order[step:]
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        form = np.linalg.inv(inverse[:8, :8])
        for row in range(len(weight)):
            scale = scales[row, run[0]]
            result[row, run] = scale * best(name, work[row, run] / scale, form)[1]
        work[:, left] -= (work[:, run] - result[:, run]) @ form @ inverse[:8]
    return result
