"""Statistics of calibration inputs: each file accumulates one over the rows that a weight reads.

A statistic is a frozen record of pure functions, `STATISTIC = Statistic(...)`; methods name it in `needs` and find its
value in `stats` under the name of its file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

State = dict[str, Tensor]


@dataclass(frozen=True)
class Statistic:
    """One streamed statistic.

    Attributes:
        about: one line.
        start: `(cols, seed) -> state` before the first row; tensors that `update` changes in place.
        update: `(state, rows, float_rows)`: take more rows, `[n, cols]`, float32 or bfloat16. `float_rows` are the same
            rows as the float model has them; given only to `paired` statistics.
        finish: `state -> value`; may reuse the state's memory.
        nbytes: `cols -> ` most bytes held at any time, `update`'s and `finish`'s temporaries included.
        paired: whether `update` needs `float_rows`.
        anywhere: whether `update` works wherever state and rows are; if not, they are brought to the processor.
    """

    about: str
    start: Callable[[int, int], State]
    update: Callable[[State, Float[Tensor, "n cols"], Float[Tensor, "n cols"] | None], None]
    finish: Callable[[State], Tensor]
    nbytes: Callable[[int], int]
    paired: bool = False
    anywhere: bool = False
