"""What the conformance suite cannot say of single statistics: the reservoir's chances, the sketch's error and range."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lowbit.stats import percentiles, rows


def reservoir(count: int, seed: int, sizes: int = 100_000) -> Tensor:
    """Indices that are kept of so many rows."""
    state = rows.STATISTIC.start(2, seed)
    numbers = torch.arange(count, dtype=torch.float32)[:, None].repeat(1, 2)
    for part in torch.split(numbers, sizes):
        rows.STATISTIC.update(state, part, None)
    return rows.STATISTIC.finish(state)[:, 0]


def test_a_reservoir_is_full_distinct_ordered_and_seeded() -> None:
    kept = reservoir(20_000, seed=3)
    assert len(kept) == rows.SIZE and (kept.diff() > 0).all()
    assert torch.equal(kept, reservoir(20_000, seed=3))
    assert not torch.equal(kept, reservoir(20_000, seed=4))


@pytest.mark.parametrize("size", [1, 7, 1000, 1024, 1025, 4999])
def test_chunks_do_not_change_what_a_reservoir_keeps(size: int) -> None:
    assert torch.equal(reservoir(5000, 0, size), reservoir(5000, 0))


def test_every_row_is_as_likely_as_others() -> None:
    """Of 2,048 rows half are kept: chi-squared over 32 runs of neighbours, and the counts of single rows."""
    kept = torch.stack([torch.bincount(reservoir(2048, seed).long(), minlength=2048) for seed in range(200)]).double()
    groups = kept.view(200, 32, 64).sum((0, 2))
    # Counts of 12,800 draws without replacement: variance n p (1 - p).
    statistic = ((groups - 6400) ** 2 / (12800 * 0.25)).sum()
    assert 9 < statistic < 70  # the 0.01% and 99.99% points of chi-squared with 31 degrees of freedom, rounded outwards
    each = kept.sum(0)
    assert each.min() > 60 and each.max() < 140 and 6 < each.std() < 8.2  # binomial: mean 100, deviation 7.07


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_percentiles_are_within_their_error(scale: float) -> None:
    x = torch.from_numpy(np.random.default_rng(0).standard_t(2, (20_000, 5)) * scale).float()
    state = percentiles.STATISTIC.start(5, 0)
    for part in torch.split(x, 3000):
        percentiles.STATISTIC.update(state, part, None)
    found = percentiles.STATISTIC.finish(state)
    exact = np.quantile(np.abs(x.numpy()), percentiles.SHARES, axis=0, method="inverted_cdf").T
    kept = exact < percentiles.LARGEST
    assert (np.abs(found.numpy() / exact - 1)[kept] <= percentiles.ERROR).all() and kept.mean() > 0.9
    assert (found[:, -1] == x.abs().amax(0)).all()
    assert (found.diff(dim=1) >= 0).all()


def test_percentiles_outside_of_the_range() -> None:
    state = percentiles.STATISTIC.start(3, 0)
    x = torch.tensor([[percentiles.SMALLEST * 0.9, 1e9, 0.0]]).repeat(10, 1)
    percentiles.STATISTIC.update(state, x, None)
    found = percentiles.STATISTIC.finish(state)
    assert (found[0, :-1] == 0).all() and found[0, -1] == x[0, 0]
    assert (found[1, :-1] >= percentiles.LARGEST * (1 - percentiles.ERROR)).all() and found[1, -1] == 1e9
    assert (found[2] == 0).all()
