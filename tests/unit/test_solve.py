"""The solver against trying everything, and its speed."""

from __future__ import annotations

import ctypes
import itertools
import time

import numpy as np
import pytest

from lowbit.errors import UsageError
from lowbit.stages.budgets.solve import Limit, closest, exact, relaxed, solve


def brute(losses: list[list[float]], sizes: list[list[float]], budget: float) -> float:
    """The least loss of all combinations that fit."""
    loss, size = np.zeros(1), np.zeros(1)
    for ours, theirs in zip(losses, sizes, strict=True):
        loss, size = (loss[:, None] + np.array(ours)).ravel(), (size[:, None] + np.array(theirs)).ravel()
    return float(loss[size <= budget].min())


def case(dice: np.random.Generator, items: int, most: int) -> tuple[list[list[float]], list[list[float]], float]:
    """Sizes that grow, losses that mostly fall, as those of schemes of more and more bits do."""
    losses, sizes = [], []
    for _ in range(items):
        count = int(dice.integers(1, most + 1))
        bits = np.sort(dice.choice([2.25, 3.125, 3.5, 4.125, 5.0, 6.5, 8.125], count, replace=False))
        weights = int(dice.choice([65536, 131072, 196608, 1_000_003]))
        losses.append((dice.lognormal(-6, 2) * 4.0**-bits * dice.lognormal(0, 0.3, count)).tolist())
        sizes.append(np.ceil(bits * weights / 8).tolist())
    least, most_size = sum(map(min, sizes)), sum(map(max, sizes))
    return losses, sizes, float(least + dice.random() * (most_size - least))


def test_a_thousand_cases_are_within_half_a_percent_of_trying_everything() -> None:
    dice = np.random.default_rng(0)
    for _ in range(1000):
        losses, sizes, budget = case(dice, int(dice.integers(1, 9)), 4)
        found = solve(losses, sizes, budget)
        best = brute(losses, sizes, budget)
        assert found.size <= budget
        assert found.loss == pytest.approx(sum(row[k] for row, k in zip(losses, found.picked, strict=True)))
        assert found.bound <= best * (1 + 1e-9) and found.loss <= best * 1.005


def both(
    losses: list[list[float]], sizes: list[list[float]], budget: float, times: list[list[float]], limit: float
) -> float | None:
    """The least loss of all combinations that keep two budgets; None where none does."""
    every = [
        (sum(losses[i][k] for i, k in enumerate(ks)), sum(times[i][k] for i, k in enumerate(ks)))
        for ks in itertools.product(*(range(len(row)) for row in losses))
        if sum(sizes[i][k] for i, k in enumerate(ks)) <= budget
    ]
    return min((loss for loss, took in every if took <= limit), default=None)


def test_two_budgets_are_both_kept_and_the_loss_is_that_of_trying_everything() -> None:
    dice, outcomes = np.random.default_rng(5), {"found": 0, "neither": 0, "between": 0}
    for _ in range(80):
        losses, sizes, budget = case(dice, int(dice.integers(2, 6)), 4)
        times = [(np.array(row) * dice.lognormal(0, 0.7, len(row))).tolist() for row in sizes]  # not in order of size
        least, most = sum(map(min, times)), sum(map(max, times))
        limit = float(least + dice.random() ** 2 * (most - least))
        best = both(losses, sizes, budget, times, limit)
        if best is None:
            outcomes["neither"] += 1
            with pytest.raises(UsageError, match="both budgets"):
                solve(losses, sizes, budget, Limit(times, limit))
            continue
        found = solve(losses, sizes, budget, Limit(times, limit))
        taken = [sum(row[k] for row, k in zip(rows, found.picked, strict=True)) for rows in (sizes, times)]
        assert taken[0] <= budget and taken[1] <= limit
        assert best * (1 - 1e-9) <= found.loss <= best * 1.005 and found.bound <= best * (1 + 1e-9)
        alone = (brute(losses, sizes, budget), brute(losses, times, limit))
        outcomes["found"] += 1
        outcomes["between"] += found.loss > 1.001 * max(alone)
    assert outcomes["neither"] > 1 and outcomes["between"] > 8, outcomes  # cases that need both at once


def test_two_thousand_tensors_with_two_budgets_take_seconds() -> None:
    dice = np.random.default_rng(6)
    losses, sizes, budget = case(dice, 2000, 5)
    times = [[size * (1.6 if size % 2 else 1.0) for size in row] for row in sizes]
    alone = solve(losses, sizes, budget)
    took = sum(row[k] for row, k in zip(times, alone.picked, strict=True))
    start = time.process_time()
    found = solve(losses, sizes, budget, Limit(times, 0.97 * took))
    assert time.process_time() - start < 10
    assert found.size <= budget and found.loss <= found.bound * 1.2


def test_the_relaxation_alone_is_near_the_exact_solution() -> None:
    dice, worst = np.random.default_rng(1), 0.0
    for _ in range(10):
        losses, sizes, budget = case(dice, 60, 4)
        table = [np.array([row + [np.inf] * (4 - len(row)) for row in rows]) for rows in (losses, sizes)]
        near, best = relaxed(table[0], table[1], budget)[0], exact(table[0], table[1:], [budget])
        assert best is not None
        sums = [sum(row[k] for row, k in zip(losses, picked, strict=True)) for picked in (near, best)]
        worst = max(worst, sums[0] / sums[1])
    assert 1 - 1e-4 <= worst < 1.05


def test_two_thousand_tensors_with_eight_schemes_take_under_two_seconds() -> None:
    dice = np.random.default_rng(2)
    losses, sizes, budget = case(dice, 2000, 7)
    losses, sizes = [[*row, row[-1] / 2] for row in losses], [[*row, row[-1] * 2] for row in sizes]
    start = time.process_time()
    found = solve(losses, sizes, budget)
    assert time.process_time() - start < 2
    assert found.size <= budget and found.loss <= found.bound * 1.001


def test_loss_and_size_may_change_places() -> None:
    dice = np.random.default_rng(3)
    for _ in range(10):
        losses, sizes, budget = case(dice, 6, 4)
        limit = solve(losses, sizes, budget).loss
        found = solve(sizes, losses, limit)
        assert found.size <= limit and found.loss <= brute(sizes, losses, limit) * 1.005


@pytest.mark.parametrize("losses", [[[0.0, 0.0]], [[1.0], [2.0]], [[0.0, 1.0], [3.0, 3.0]]])
def test_losses_of_zero_and_equal_ones(losses: list[list[float]]) -> None:
    sizes = [[2.0] * len(row) for row in losses]
    assert solve(losses, sizes, 2.0 * len(losses)).loss == brute(losses, sizes, 2.0 * len(losses))


def test_too_small_a_budget_is_refused_with_the_least() -> None:
    with pytest.raises(UsageError, match="add up to 30, more than 29"):
        solve([[1.0, 0.5], [1.0]], [[10.0, 20.0], [20.0]], 29.0)


def test_nothing_to_choose() -> None:
    assert solve([], [], 0.0).picked == ()


def test_the_nearest_decisions_are_those_whose_loss_a_byte_is_nearest_to_the_price() -> None:
    losses, sizes = [[4.0, 1.0], [10.0, 1.0], [3.1, 1.0], [1.1, 1.0], [5.0]], [[1.0, 2.0]] * 4 + [[1.0]]
    found = solve(losses, sizes, 7.0)
    assert found.picked == (1, 1, 0, 0, 0)
    # Losses a byte: 3 and 9 are paid, 2.1 and 0.1 are not; the price is between 2.1 and 3.
    assert set(closest(losses, sizes, found.picked, 2)) == {(0, 0), (2, 1)}
    assert closest(losses, sizes, found.picked, 9)[2:] == [(1, 0), (3, 1)]
    assert closest([[1.0]], [[1.0]], [0], 3) == []


def test_the_brute_force_itself() -> None:
    losses, sizes = [[3.0, 1.0], [5.0, 4.0]], [[1.0, 2.0], [1.0, 3.0]]
    sums = [
        (sum(losses[i][k] for i, k in enumerate(ks)), sum(sizes[i][k] for i, k in enumerate(ks)))
        for ks in itertools.product(range(2), repeat=2)
    ]
    assert brute(losses, sizes, 4.0) == min(loss for loss, size in sums if size <= 4)


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    """HiGHS writes a line of its own to standard output over this case, among what `--json` prints."""
    dice = np.random.default_rng(110)
    count, bits = int(dice.integers(8, 60)), np.array([2.5, 3.1, 4.1, 8.1])
    weights = dice.integers(1, 20, size=count) * 1000.0
    sizes = [[float(each) for each in weight * bits] for weight in weights]
    losses = [
        sorted((float(v) for v in np.exp(dice.normal(size=4)) * 4.0**-bits * dice.lognormal()), reverse=True)
        for _ in weights
    ]
    solve(losses, sizes, float(weights.sum() * dice.uniform(2.6, 7)))
    ctypes.CDLL(None).fflush(None)
    assert capfd.readouterr().out == ""
