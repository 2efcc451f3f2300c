"""Cross moment: the mean over rows of (x_float - x) x^T, the float model's inputs less the present ones, along these.

GPTAQ (arXiv:2504.02692) names its sum dXXT.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lowbit.stats import State, Statistic
from lowbit.stats.second_moment import STRIPE, chunk_rows, stripes


def start(cols: int, seed: int) -> State:
    """Float64 sums, and the number of rows."""
    sums = torch.zeros(cols, cols, dtype=torch.float64)
    return {"count": torch.zeros(1, dtype=torch.float64), "sums": sums}


def update(state: State, rows: Float[Tensor, "n cols"], float_rows: Float[Tensor, "n cols"] | None) -> None:
    """Add the products of these rows: float32 within a chunk, float64 between chunks."""
    assert float_rows is not None, "a paired statistic"
    state["count"] += rows.shape[0]
    size = chunk_rows(rows.shape[1])
    for chunk, wanted in zip(torch.split(rows, size), torch.split(float_rows, size), strict=True):
        present = chunk.float()
        _add(state, wanted.float() - present, present)
        del present  # before the next is made


def _add(state: State, difference: Float[Tensor, "n cols"], rows: Float[Tensor, "n cols"]) -> None:
    for at in stripes(rows.shape[1]):
        state["sums"][at] += difference[:, at].T @ rows


def finish(state: State) -> Float[Tensor, "cols cols"]:
    """The mean, float32; zero where there was no row."""
    return state["sums"].div_(state["count"].clamp(min=1)).float()


def nbytes(cols: int) -> int:
    """The sums in float64; beside them three chunks and a stripe's product, or the result in float32."""
    chunks = 3 * 4 * chunk_rows(cols) * cols + 12 * min(STRIPE, cols) * cols
    return 8 * cols * cols + 8 + max(chunks, 4 * cols * cols)


STATISTIC = Statistic(
    about="difference of the float model's inputs along the present ones",
    start=start,
    update=update,
    finish=finish,
    nbytes=nbytes,
    paired=True,
    anywhere=True,
)
