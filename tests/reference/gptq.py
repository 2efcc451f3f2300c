"""GPTQ by its definition, in float64: no Cholesky, no blocks, one inverse per column."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]
# (column, compensated weight [rows, cols]) -> what each row's code stands for
Round = Callable[[int, Matrix], Matrix]


def damped(moment: Matrix, damp: float) -> Matrix:
    """Dead columns get the mean as diagonal, then all get `damp` times the mean of the original."""
    mean = float(np.mean(np.diag(moment)))
    fixed = moment.copy()
    for k in range(len(fixed)):
        fixed[k, k] = (fixed[k, k] or mean or 1.0) + damp * mean
    return fixed


def order_of(diagonal: list[float], kind: str, wide: int) -> list[int]:
    """Columns in the order of rounding."""
    cols = list(range(len(diagonal)))
    if kind == "none":
        return cols
    if kind == "aware":
        groups = [cols[i : i + wide] for i in range(0, len(cols), wide)]
        groups.sort(key=lambda group: -max(diagonal[k] for k in group))
        return [k for group in groups for k in sorted(group, key=lambda k: -diagonal[k])]
    return sorted(cols, key=lambda k: -diagonal[k])


def quantize(weight: Matrix, hessian: Matrix, order: list[int], nearest: Round) -> Matrix:
    """Frantar et al. 2022 (arXiv:2210.17323), equation 2: the error of a column moves all that are not yet rounded."""
    work, result = weight.copy(), np.zeros_like(weight)
    for step, k in enumerate(order):
        left = order[step:]
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        result[:, k] = nearest(k, work)
        error = (work[:, k] - result[:, k]) / inverse[0, 0]
        work[:, left] -= np.outer(error, inverse[0])
    return result


def loss(error: Matrix, hessian: Matrix) -> float:
    """tr(E H E^T)."""
    return float(np.sum((error @ hessian) * error))
