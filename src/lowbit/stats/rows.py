"""A reservoir of input rows: a sample of equal size of however many there are, each row as likely in it as others.

Every row gets a random number, and the rows with the largest are kept (Efraimidis and Spirakis 2006,
doi:10.1016/j.ipl.2005.11.003, algorithm A-Res with equal weights). The numbers depend on the seed and on the place of
the row among all rows alone, so that the rows may come in chunks of any size.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lowbit.stats import State, Statistic

SIZE = 1024


def start(cols: int, seed: int) -> State:
    """An empty reservoir: keys below every other, and the state of the generator."""
    return {
        "rows": torch.empty(SIZE, cols),
        "keys": torch.full((SIZE,), -1.0, dtype=torch.float64),
        "places": torch.zeros(SIZE, dtype=torch.int64),
        "count": torch.zeros(1, dtype=torch.int64),
        "dice": torch.Generator().manual_seed(seed).get_state(),
    }


def update(state: State, rows: Float[Tensor, "n cols"], float_rows: Float[Tensor, "n cols"] | None) -> None:
    """Put the rows with the largest numbers in the place of those with the smallest."""
    dice = torch.Generator()
    dice.set_state(state["dice"])
    keys = torch.cat([state["keys"], torch.rand(len(rows), generator=dice, dtype=torch.float64)])
    state["dice"].copy_(dice.get_state())
    kept = torch.zeros(len(keys), dtype=torch.bool)
    kept[keys.topk(SIZE).indices] = True
    new, free = kept[SIZE:].nonzero()[:, 0], (~kept[:SIZE]).nonzero()[:, 0]
    free = free[: len(new)]
    state["rows"][free] = rows[new].float()
    state["keys"][free] = keys[SIZE:][new]
    state["places"][free] = state["count"] + new
    state["count"] += len(rows)


def finish(state: State) -> Float[Tensor, "n cols"]:
    """The rows in the order in which they came; all of them, if they were not more than the reservoir holds."""
    held = min(int(state["count"]), SIZE)
    order = torch.where(state["keys"] < 0, torch.iinfo(torch.int64).max, state["places"]).argsort()[:held]
    return state["rows"][order]


def nbytes(cols: int) -> int:
    """The reservoir, as many new rows twice, and numbers for half a million rows."""
    return 3 * 4 * SIZE * cols + 2**25


STATISTIC = Statistic(about="reservoir of rows", start=start, update=update, finish=finish, nbytes=nbytes)
