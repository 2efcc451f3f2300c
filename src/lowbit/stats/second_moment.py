"""Second moment of the inputs: the mean over rows of x x^T, the Hessian of a linear layer's squared output error."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lowbit.stats import State, Statistic

STRIPE = 512  # most rows of the result that are computed at a time
_CHUNK_ROWS, _CHUNK_ELEMENTS = 4096, 1 << 24


def chunk_rows(cols: int) -> int:
    """Rows that are multiplied in float32 before their products are added in float64."""
    return max(min(_CHUNK_ROWS, _CHUNK_ELEMENTS // max(cols, 1)), 1)


def stripes(cols: int) -> list[tuple[str, int, int]]:
    """Name, first row and end of the stripes in which the result is kept."""
    height = min(max(cols // 12 // 64, 1) * 64, STRIPE)
    return [(f"stripe{start:06d}", start, min(start + height, cols)) for start in range(0, cols, height)]


def start(cols: int, seed: int) -> State:
    """Float64 sums of the upper block triangle, stripe by stripe, and the number of rows."""
    sums = {name: torch.zeros(end - first, cols - first).double() for name, first, end in stripes(cols)}
    return {"count": torch.zeros(1, dtype=torch.float64)} | sums


def update(state: State, rows: Float[Tensor, "n cols"], float_rows: Float[Tensor, "n cols"] | None) -> None:
    """Add the products of these rows: float32 within a chunk, float64 between chunks."""
    state["count"] += rows.shape[0]
    for chunk in torch.split(rows, chunk_rows(rows.shape[1])):
        _add(state, chunk.float())


def _add(state: State, rows: Float[Tensor, "n cols"]) -> None:
    for name, first, end in stripes(rows.shape[1]):
        state[name] += rows[:, first:end].T @ rows[:, first:]


def finish(state: State) -> Float[Tensor, "cols cols"]:
    """The mean, float32, symmetric to the bit; zero where there was no row. The stripes are given up one by one."""
    count = state["count"].clamp(min=1).item()
    cols = state["stripe000000"].shape[1] if "stripe000000" in state else 0
    moment = torch.empty(cols, cols)
    for name, first, end in stripes(cols):
        at = slice(first, end)
        moment[at, first:] = state.pop(name).div_(count)
        moment[end:, at] = moment[at, end:].T
        moment[at, at] = moment[at, at].triu() + moment[at, at].triu(1).T
    return moment


def nbytes(cols: int) -> int:
    """Half the matrix in float64; beside it a chunk and a stripe's product, or the result in float32."""
    sums = 8 * sum([(end - first) * (cols - first) for _, first, end in stripes(cols)])
    height = min(STRIPE, cols)
    chunk = 4 * chunk_rows(cols) * cols + 12 * height * cols
    return sums + 8 + max(chunk, 4 * cols * cols + 16 * height * height)


STATISTIC = Statistic(
    about="second moment of the inputs", start=start, update=update, finish=finish, nbytes=nbytes, anywhere=True
)
