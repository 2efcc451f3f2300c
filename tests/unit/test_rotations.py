"""Hadamard matrices and the rotations made of them, judged by their definitions."""

from __future__ import annotations

from functools import reduce

import pytest
import torch

from lowbit.rotations import Rotation, hadamard, hadamard_orders, random_rotation


@pytest.mark.parametrize("order", [1, 2, 4, 8, 64, 12, 20, 28, 36, 44, 52, 60, 68, 76, 84, 100, 108, 124, 148, 244])
def test_hadamard_rows_are_orthogonal_and_plus_or_minus_one(order: int) -> None:
    matrix = hadamard(order).long()
    assert matrix.shape == (order, order)
    assert (matrix.abs() == 1).all()
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.int64))


@pytest.mark.parametrize("order", [3, 6, 10, 92, 172])
def test_an_order_out_of_reach_is_refused(order: int) -> None:
    with pytest.raises(ValueError, match=f"order {order}"):
        hadamard(order)


# Hidden and intermediate sizes of published models, and whether a Hadamard matrix is in reach.
@pytest.mark.parametrize(
    "width",
    [288, 576, 768, 896, 1536, 2048, 2304, 2560, 3072, 3584, 4096, 4864, 5120, 8192, 8960, 11008, 13824, 14336, 18944,
     27648, 28672, 29568],
)  # fmt: skip
def test_widths_of_real_models_are_products_of_hadamard_orders(width: int) -> None:
    orders = hadamard_orders(width)
    assert orders is not None
    assert reduce(lambda left, right: left * right, orders) == width
    assert sum(orders) < 1200  # what a channel costs


@pytest.mark.parametrize("width", [1, 2, 8, 24, 96, 128, 240, 6, 10, 92, 172])
def test_a_rotation_is_the_matrix_that_it_says(width: int) -> None:
    rotation = random_rotation(width, seed=3)
    dense = torch.diag(rotation.signs) @ reduce(torch.kron, [factor.contiguous() for factor in rotation.factors])
    x = torch.randn(5, 2, width, dtype=torch.float64)
    torch.testing.assert_close(rotation.matrix(), dense)
    torch.testing.assert_close(dense @ dense.T, torch.eye(width, dtype=torch.float64))
    torch.testing.assert_close(rotation.apply(x), x @ dense)


@pytest.mark.parametrize("width", [64, 96, 4864])
def test_hadamard_rotations_spread_a_channel_evenly(width: int) -> None:
    spike = torch.zeros(1, width, dtype=torch.float64)
    spike[0, width // 3] = 7.0
    spread = random_rotation(width, seed=0).apply(spike).abs()
    torch.testing.assert_close(spread, torch.full_like(spread, 7 / width**0.5))


def test_seeds_choose_signs() -> None:
    first, again, other = (random_rotation(64, seed).matrix() for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(random_rotation(64, 0, signs=False).matrix() * 8, hadamard(64).double())


def test_a_rotation_keeps_the_dtype() -> None:
    rotation = Rotation(torch.ones(4, dtype=torch.float64), (hadamard(4).double() / 2,))
    assert rotation.apply(torch.ones(3, 4)).dtype == torch.float32
