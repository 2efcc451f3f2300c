"""What the statistics that are a mean over rows share: float64 sums of a size of each value."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from lowbit.stats import State, Statistic

_ELEMENTS = 2**18  # values that are made float64 at a time


def mean_of(about: str, size: Callable[[Tensor], Tensor]) -> Statistic:
    """The mean of a size of the values of each channel; `size` may work in place."""

    def update(state: State, rows: Float[Tensor, "n cols"], float_rows: Float[Tensor, "n cols"] | None) -> None:
        """Sums in float64: the order of rows seldom changes a bit of the float32 mean."""
        state["count"] += len(rows)
        for part in torch.split(rows, max(_ELEMENTS // max(rows.shape[1], 1), 1)):
            state["sum"] += size(part.double()).sum(0)

    return Statistic(about=about, start=_start, update=update, finish=_finish, nbytes=_nbytes)


def _start(cols: int, seed: int) -> State:
    """Float64 sums and the number of rows."""
    return {"sum": torch.zeros(cols, dtype=torch.float64), "count": torch.zeros(1, dtype=torch.float64)}


def _finish(state: State) -> Float[Tensor, " cols"]:
    """The mean; zero where there was no row."""
    return (state["sum"] / state["count"].clamp(min=1)).float()


def _nbytes(cols: int) -> int:
    """The state, one part in float64 twice, and the result."""
    return 8 * (cols + 1) + 2 * 8 * max(_ELEMENTS, cols) + 2 * 8 * cols
