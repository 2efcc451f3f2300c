"""Second moment of the inputs: the mean over rows of x x^T, the Hessian of a linear layer's squared output error."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from lowbit.stats import State, Statistic

STRIPE = 512  # most rows of the result that are computed at a time
_CHUNK_ROWS, _CHUNK_ELEMENTS = 4096, 1 << 24


def chunk_rows(cols: int) -> int:
    """Rows that are multiplied in float32 before their products are added in float64."""
    return max(min(_CHUNK_ROWS, _CHUNK_ELEMENTS // max(cols, 1)), 1)


def stripes(cols: int) -> Iterator[slice]:
    """Rows of the result that are computed at a time."""
    height = min(max(cols // 12 // 64, 1) * 64, STRIPE)
    return (slice(start, min(start + height, cols)) for start in range(0, cols, height))


def _triangle(sums: Float[Tensor, "all"], cols: int) -> Iterator[tuple[slice, Float[Tensor, "high wide"]]]:
    """Stripes of the upper block triangle as they lie one after the other."""
    at = 0
    for rows in stripes(cols):
        high, wide = rows.stop - rows.start, cols - rows.start
        yield rows, sums[at : at + high * wide].view(high, wide)
        at += high * wide


def _elements(cols: int) -> int:
    return sum((rows.stop - rows.start) * (cols - rows.start) for rows in stripes(cols))


def start(cols: int, seed: int) -> State:
    """Float64 sums of the upper block triangle, and the numbers of columns and rows."""
    sums = torch.zeros(_elements(cols), dtype=torch.float64)
    return {"cols": torch.tensor(cols), "count": torch.zeros(1, dtype=torch.float64), "sums": sums}


def update(state: State, rows: Float[Tensor, "n cols"], float_rows: Float[Tensor, "n cols"] | None) -> None:
    """Add the products of these rows: float32 within a chunk, float64 between chunks."""
    state["count"] += rows.shape[0]
    for chunk in torch.split(rows, chunk_rows(rows.shape[1])):
        _add(state, chunk.float())


def _add(state: State, rows: Float[Tensor, "n cols"]) -> None:
    for at, sums in _triangle(state["sums"], rows.shape[1]):
        sums += rows[:, at].T @ rows[:, at.start :]


def finish(state: State) -> Float[Tensor, "cols cols"]:
    """The mean, float32, symmetric to the bit; zero where there was no row.

    It takes the memory of the sums: rows of float32 end before the sums that are still to be read.
    """
    count, cols, sums = state["count"].clamp(min=1).item(), int(state["cols"]), state["sums"]
    moment = sums.view(torch.float32)[: cols * cols].view(cols, cols)
    for at, part in _triangle(sums, cols):
        moment[at, at.start :] = (part / count).float()
    for at in stripes(cols):
        moment[at.stop :, at] = moment[at, at.stop :].T
        moment[at, at] = moment[at, at].triu() + moment[at, at].triu(1).T
    return moment


def nbytes(cols: int) -> int:
    """Half the matrix in float64; beside it a chunk and a stripe's product, or a stripe of the result."""
    height = min(STRIPE, cols)
    chunk = 4 * chunk_rows(cols) * cols + 12 * height * cols
    return 8 * _elements(cols) + 16 + max(chunk, 12 * height * cols)


STATISTIC = Statistic(
    about="second moment of the inputs", start=start, update=update, finish=finish, nbytes=nbytes, anywhere=True
)
