"""`second_moment` and `cross_moment` against float64 numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lowbit.stats import Statistic, cross_moment, second_moment
from tests.reference.memory import peak_bytes

BOTH = [second_moment.STATISTIC, cross_moment.STATISTIC]


def rows_of(count: int, cols: int, dtype: torch.dtype = torch.float32) -> Tensor:
    dice = torch.Generator().manual_seed(cols)
    return (torch.randn(count, cols, generator=dice) * torch.rand(cols, generator=dice) + 0.1).to(dtype)


def taken(statistic: Statistic, pieces: list[Tensor], wanted: list[Tensor], cols: int) -> Tensor:
    state = statistic.start(cols, 0)
    for piece, other in zip(pieces, wanted, strict=True):
        statistic.update(state, piece, other if statistic.paired else None)
    return statistic.finish(state)


def exact(statistic: Statistic, rows: Tensor, wanted: Tensor) -> Tensor:
    x, y = rows.double().numpy(), wanted.double().numpy()
    left = y - x if statistic.paired else x
    return torch.tensor(np.einsum("ni,nj->ij", left, x) / len(x))


@pytest.mark.parametrize("statistic", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("count", "cols"), [(1, 1), (50, 7), (5000, 3), (90, 600), (20, 1030)])
def test_the_mean_of_products(statistic: Statistic, dtype: torch.dtype, count: int, cols: int) -> None:
    rows, wanted = rows_of(count, cols, dtype), (rows_of(count, cols) * 1.1 + 0.01).to(dtype)
    found = taken(statistic, list(torch.split(rows, 37)), list(torch.split(wanted, 37)), cols)
    assert found.dtype == torch.float32 and found.is_contiguous()
    reference = exact(statistic, rows, wanted)
    torch.testing.assert_close(found.double(), reference, rtol=2e-5, atol=2e-6 * float(reference.abs().max()))
    if not statistic.paired:
        assert torch.equal(found, found.T)


@pytest.mark.parametrize("statistic", BOTH)
def test_small_addends_are_not_lost_beside_large_sums(statistic: Statistic) -> None:
    """2**25 and then 10 000 times 1: float32 sums would stay where they are."""
    state = statistic.start(1, 0)
    one = torch.ones(1, 1)
    statistic.update(state, one * 2.0**12, one * 2.0**13 * 1.5 if statistic.paired else None)
    for _ in range(1000):
        statistic.update(state, one, one * 2 if statistic.paired else None)
    large = 2.0**24 * (2 if statistic.paired else 1)
    assert statistic.finish(state).item() == pytest.approx((large + 1000) / 1001, rel=1e-7)


@pytest.mark.parametrize("statistic", BOTH)
def test_no_rows_and_no_columns(statistic: Statistic) -> None:
    assert (statistic.finish(statistic.start(5, 0)) == torch.zeros(5, 5)).all()
    assert taken(statistic, [torch.zeros(3, 0)], [torch.zeros(3, 0)], 0).shape == (0, 0)


@pytest.mark.parametrize("statistic", BOTH)
@pytest.mark.parametrize("cols", [40, 1100])
def test_memory_is_what_it_says(statistic: Statistic, cols: int) -> None:
    rows = rows_of(4500, cols, torch.bfloat16)
    peak = peak_bytes(lambda: taken(statistic, [rows], [rows], cols))
    assert 0.5 * statistic.nbytes(cols) < peak <= statistic.nbytes(cols) + 4096
