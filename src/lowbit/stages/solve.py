"""Solve: one choice for each item, so that the sum of losses is least while the sum of sizes stays within a budget.

This is the multiple-choice knapsack problem. Its Lagrangian relaxation gives a solution and a bound below the optimum
(Sinha and Zoltners 1979, doi:10.1287/opre.27.3.503); with many items the two meet. Where they do not, HiGHS solves the
integer program exactly (`scipy.optimize.milp`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from lowbit.errors import UsageError

_GAP = 1e-3  # of the loss: a solution that is so near to the bound is taken
_HALVINGS = 60
_NODES = 20_000  # of HiGHS' search; a limit of time would make plans depend on the machine
_TOLERANCE = 2e-6  # by which HiGHS may pass a constraint

Table = NDArray[np.float64]
Picked = NDArray[np.intp]


@final
@dataclass(frozen=True)
class Solution:
    """What was found.

    Attributes:
        picked: index of the choice of each item.
        loss: sum of the losses.
        size: sum of the sizes.
        bound: below the least loss that any solution within the budget has.
    """

    picked: tuple[int, ...]
    loss: float
    size: float
    bound: float


def solve(losses: Sequence[Sequence[float]], sizes: Sequence[Sequence[float]], budget: float) -> Solution:
    """The choices of least loss within the budget; within a thousandth of the least, or exact.

    Args:
        losses: of each choice of each item, 0 or more; items may have different numbers of choices.
        sizes: of the same choices.
        budget: most that the sizes may add up to. Sizes and losses may change places: the smallest under a loss.

    Raises:
        UsageError: even the smallest choices are over the budget.
    """
    loss, size = _table(losses), _table(sizes)
    least = size.min(1).sum()
    if least > budget:
        raise UsageError(f"the smallest choices add up to {least:,.6g}, more than {budget:,.6g}")
    found, bound = relaxed(loss, size, budget)
    if _sum(loss, found) - bound > _GAP * abs(bound):
        better = exact(loss, size, budget)
        found = better if better is not None and _sum(loss, better) < _sum(loss, found) else found
    return Solution(tuple(map(int, found)), _sum(loss, found), _sum(size, found), bound)


def _table(rows: Sequence[Sequence[float]]) -> Table:
    """One row per item, filled up with what nobody takes."""
    table = np.full((len(rows), max(map(len, rows), default=1)), np.inf)
    for at, row in enumerate(rows):
        table[at, : len(row)] = row
    return table


def _sum(table: Table, picked: Picked) -> float:
    return float(table[np.arange(len(table)), picked].sum())


def relaxed(loss: Table, size: Table, budget: float) -> tuple[Picked, float]:
    """A solution of the Lagrangian relaxation, filled up, and the bound; `inf` marks choices that are not there."""
    real = np.isfinite(loss)
    size = np.where(real, size, 0.0)

    def pick(price: float) -> tuple[Picked, float]:
        paid = np.where(real, loss + price * size, np.inf)
        ties = np.where(paid <= paid.min(1, keepdims=True) * (1 + 1e-12), size, np.inf)  # the smallest of equals
        return ties.argmin(1), float(paid.min(1).sum() - price * budget)

    free, bound = pick(0.0)
    if _sum(size, free) <= budget:
        return free, bound
    low, high = 0.0, 1.0
    while _sum(size, pick(high)[0]) > budget and high < 1e300:
        low, high = high, 4 * high
    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5 if low > 1e-300 else high / 4
        found, below = pick(middle)
        bound = max(bound, below)
        low, high = (middle, high) if _sum(size, found) > budget else (low, middle)
    smallest = np.where(real, size, np.inf).argmin(1)
    found = pick(high)[0]
    found = found if _sum(size, found) <= budget else smallest
    return _filled(np.where(real, loss, np.inf), size, budget, found), max(bound, pick(high)[1])


def _filled(loss: Table, size: Table, budget: float, picked: Picked) -> Picked:
    """Better choices for what is left of the budget, the one that saves most loss first."""
    rows, picked = np.arange(len(loss)), picked.copy()
    while len(rows):
        left = budget - _sum(size, picked)
        gain = loss[rows, picked][:, None] - loss
        gain[size - size[rows, picked][:, None] > left] = 0.0
        item, choice = np.unravel_index(gain.argmax(), gain.shape)
        if gain[item, choice] <= 0:
            return picked
        picked[item] = choice
    return picked


def exact(loss: Table, size: Table, budget: float) -> Picked | None:
    """The solution of the integer program by HiGHS; None where its search found none within the budget."""
    from scipy.optimize import LinearConstraint, milp  # type: ignore[import-untyped]
    from scipy.sparse import csr_array  # type: ignore[import-untyped]

    items, choices = np.nonzero(np.isfinite(loss))
    costs, weights = loss[items, choices], size[items, choices]
    unit, scale = max(budget, float(weights.max()), 1e-300), max(float(costs.max()), 1e-300)
    one = csr_array((np.ones(len(items)), (items, np.arange(len(items)))), shape=(len(loss), len(items)))
    for room in (budget, budget - _TOLERANCE * unit):  # the second, where the first used the tolerance
        limits = [LinearConstraint(one, 1, 1), LinearConstraint(weights[None] / unit, ub=room / unit)]
        found = milp(
            costs / scale, integrality=np.ones(len(items)), bounds=(0, 1), constraints=limits,
            options={"mip_rel_gap": 1e-4, "node_limit": _NODES},
        )  # fmt: skip
        if found.x is None:
            return None
        picked = np.zeros(len(loss), dtype=np.intp)
        chosen = found.x > 0.5
        picked[items[chosen]] = choices[chosen]
        if _sum(size, picked) <= budget:
            return picked
    return None
