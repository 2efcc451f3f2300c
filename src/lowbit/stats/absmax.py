"""Largest absolute value of each input channel: what SmoothQuant and static activation scales are made from."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lowbit.stats import State, Statistic


def start(cols: int, seed: int) -> State:
    """Zeros."""
    return {"most": torch.zeros(cols)}


def update(state: State, rows: Float[Tensor, "n cols"], float_rows: Float[Tensor, "n cols"] | None) -> None:
    """Exact in any order of rows; NaN stays NaN."""
    if len(rows):
        low, high = rows.aminmax(dim=0)
        torch.maximum(state["most"], torch.maximum(-low, high).float(), out=state["most"])


def finish(state: State) -> Float[Tensor, " cols"]:
    """The maximum; zero where there was no row."""
    return state["most"]


def nbytes(cols: int) -> int:
    """The state, and four rows."""
    return 5 * 4 * cols


STATISTIC = Statistic(
    about="largest absolute value per channel", start=start, update=update, finish=finish, nbytes=nbytes
)
