"""Solve: one choice for each item, so that the sum of losses is least while sums of sizes stay within their budgets.

This is the multiple-choice knapsack problem. Its Lagrangian relaxation gives a solution and a bound below the optimum
(Sinha and Zoltners 1979, doi:10.1287/opre.27.3.503); with many items the two meet. Where they do not, HiGHS solves the
integer program exactly (`scipy.optimize.milp`). With two budgets, as bytes and seconds, each is tried alone first: what
keeps the other one too is the best; else the integer program has both.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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


@final
@dataclass(frozen=True)
class Limit:
    """Sizes of another kind, of the same choices, and the most that they may add up to."""

    sizes: Sequence[Sequence[float]]
    most: float


def solve(
    losses: Sequence[Sequence[float]], sizes: Sequence[Sequence[float]], budget: float, also: Limit | None = None
) -> Solution:
    """The choices of least loss within the budget; within a thousandth of the least, or exact.

    Args:
        losses: of each choice of each item, 0 or more; items may have different numbers of choices.
        sizes: of the same choices.
        budget: most that the sizes may add up to. Sizes and losses may change places: the smallest under a loss.
        also: a second budget that must be kept too.

    Raises:
        UsageError: even the smallest choices are over a budget, or no choices were found that keep both.
    """
    loss, size = _table(losses), _table(sizes)
    found, bound = _within(loss, size, budget)
    if also is not None and _sum(_table(also.sizes), found) > also.most:
        found, bound = _within_both(loss, (size, _table(also.sizes)), (budget, also.most), bound)
    return Solution(tuple(map(int, found)), _sum(loss, found), _sum(size, found), bound)


def _within(loss: Table, size: Table, budget: float) -> tuple[Picked, float]:
    """Choices within one budget, and the bound."""
    least = size.min(1).sum()
    if least > budget:
        raise UsageError(f"the smallest choices add up to {least:,.6g}, more than {budget:,.6g}")
    found, bound = relaxed(loss, size, budget)
    if _sum(loss, found) - bound > _GAP * abs(bound):
        better = exact(loss, (size,), (budget,))
        found = better if better is not None and _sum(loss, better) < _sum(loss, found) else found
    return found, bound


def _within_both(
    loss: Table, sizes: tuple[Table, Table], budgets: tuple[float, float], bound: float
) -> tuple[Picked, float]:
    """Choices within both budgets, where those that are best for the first alone are not."""
    found, other = _within(loss, sizes[1], budgets[1])
    bound = max(bound, other)
    if _sum(sizes[0], found) <= budgets[0]:
        return found, bound
    best = exact(loss, sizes, budgets)
    if best is None:
        raise UsageError(
            "no choices were found that keep both budgets, though each alone can be kept: raise one of them"
        )
    return best, bound


def closest(
    losses: Sequence[Sequence[float]], sizes: Sequence[Sequence[float]], picked: Sequence[int], count: int
) -> list[tuple[int, int]]:
    """Items whose choice was nearest to another one, the nearest first, with that other choice.

    A choice is left for another where the loss a byte that this saves, or costs, passes the price of a byte; of the
    price is known that it is between the most that an exchange that was not made would save and the least that it would
    cost. How near is the ratio of the two.
    """
    ups, downs = [0.0], [np.inf]
    slopes: list[tuple[int, int, float]] = []
    for item, (loss, size, at) in enumerate(zip(losses, sizes, picked, strict=True)):
        for other in range(len(loss)):
            more, worse = size[other] - size[at], loss[other] - loss[at]
            if more * worse < 0:
                slopes.append((item, other, -worse / more))
                (ups if more > 0 else downs).append(-worse / more)
    low, high = max(ups), min(downs)
    price = (low * high) ** 0.5 if low > 0 and high < np.inf else low or high
    nearest: dict[int, tuple[float, int]] = {}
    for item, other, slope in slopes:
        apart = abs(float(np.log(slope / price)))
        nearest[item] = min(nearest.get(item, (np.inf, other)), (apart, other))
    order = sorted(nearest, key=lambda item: nearest[item])
    return [(item, nearest[item][1]) for item in order[:count]]


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


def exact(loss: Table, sizes: Sequence[Table], budgets: Sequence[float]) -> Picked | None:
    """The solution of the integer program by HiGHS; None where its search found none within the budgets."""
    from scipy.optimize import LinearConstraint, milp  # type: ignore[import-untyped]
    from scipy.sparse import csr_array  # type: ignore[import-untyped]

    items, choices = np.nonzero(np.isfinite(loss))
    costs, weights = loss[items, choices], [size[items, choices] for size in sizes]
    units = [max(budget, float(each.max()), 1e-300) for each, budget in zip(weights, budgets, strict=True)]
    scale = max(float(costs.max()), 1e-300)
    one = csr_array((np.ones(len(items)), (items, np.arange(len(items)))), shape=(len(loss), len(items)))
    rows = np.stack([each / unit for each, unit in zip(weights, units, strict=True)])
    rooms = np.array([budget / unit for budget, unit in zip(budgets, units, strict=True)])
    for room in (rooms, rooms - _TOLERANCE):  # the second, where the first used the tolerance
        with _unheard():
            found = milp(
                costs / scale, integrality=np.ones(len(items)), bounds=(0, 1),
                constraints=[LinearConstraint(one, 1, 1), LinearConstraint(rows, ub=room)],
                options={"mip_rel_gap": 1e-4, "node_limit": _NODES},
            )  # fmt: skip
        if found.x is None:
            return None
        picked = np.zeros(len(loss), dtype=np.intp)
        chosen = found.x > 0.5
        picked[items[chosen]] = choices[chosen]
        if all(_sum(size, picked) <= budget for size, budget in zip(sizes, budgets, strict=True)):
            return picked
    return None


@contextmanager
def _unheard() -> Iterator[None]:
    """Nothing is written to standard output: HiGHS has a line there that no option turns off, amid a JSON document."""
    library = ctypes.CDLL(None)  # that buffers what it writes
    sys.stdout.flush()
    library.fflush(None)
    kept = os.dup(1)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
        library.fflush(None)
    finally:
        os.dup2(kept, 1)
        os.close(kept)
