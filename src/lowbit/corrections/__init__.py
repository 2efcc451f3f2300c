"""Corrections: each file makes a low-rank term that is added beside a quantized weight.

A correction is a frozen record of pure functions, `CORRECTION = Correction(...)`. Its terms are written as a PEFT
adapter (LoRA) next to the quantized checkpoint, which any runtime with LoRA support adds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, cast, final

import torch
from jaxtyping import Float
from torch import Tensor

from lowbit.methods import Stats
from lowbit.schemes import FLOATS, ScaleType

LowRank = tuple[Float[Tensor, "rank cols"], Float[Tensor, "rows rank"]]
_RANK = 32
_MOST = 4  # times the even rank: what one weight of a block may get of the budget


@final
@dataclass(frozen=True)
class Options:
    """Options of every correction.

    Attributes:
        rank: of each term; 32 where no budget is given.
        budget: in place of a rank: bits of the adapter per quantized weight. Each block has its share, which goes to
            those of its weights where a rank takes most loss for its bytes.
        dtype: in which the terms are exact, and stored.
    """

    rank: int | None = None
    budget: float | None = None
    dtype: str = "bf16"

    def __post_init__(self) -> None:
        if self.rank is not None and self.budget is not None:
            raise ValueError("rank and budget cannot both be given: a budget chooses the ranks")
        if self.rank is not None and (self.rank < 1 or self.rank % 1):
            raise ValueError(f"rank {self.rank}: a low-rank term needs a rank of at least 1; leave the correction out")
        if self.budget is not None and not (isfinite(self.budget) and self.budget > 0):
            raise ValueError(f"budget {self.budget}: it is bits per weight, more than 0; leave the correction out")
        if self.dtype not in FLOATS:
            raise ValueError(f"dtype {self.dtype!r} is none of {', '.join(FLOATS)}")

    @property
    def storage(self) -> torch.dtype:
        """The dtype of the adapter."""
        return FLOATS[cast(ScaleType, self.dtype)]

    def even(self, rows: int, cols: int) -> int:
        """The rank of a weight where all have the same: the rank asked for, or the same bits per weight."""
        return int(self._share(rows, cols))

    def most(self, rows: int, cols: int) -> int:
        """The rank up to which a term is fitted: that of `even`, or the most that a weight may get of the budget."""
        return int(self._share(rows, cols) * (1 if self.budget is None else _MOST)) or 1

    def _share(self, rows: int, cols: int) -> float:
        if self.budget is None:
            return float(self.rank or _RANK)
        return self.budget * rows * cols / (8 * self.storage.itemsize * (rows + cols))


@final
@dataclass(frozen=True, eq=False)
class Term:
    """A low-rank term, `up @ down`, its ranks in the order of what they bring.

    Attributes:
        down: float32, exact in the dtype in which it is stored.
        up: likewise.
        gains: what each rank takes from the loss, falling.
        nbytes: of one rank, as it is stored.
    """

    down: Float[Tensor, "rank cols"]
    up: Float[Tensor, "rows rank"]
    gains: Float[Tensor, "rank"]
    nbytes: int

    def first(self, rank: int) -> Term:
        """The term of its first ranks: the best of that rank, up to the rounding of what is stored."""
        return Term(self.down[:rank], self.up[:, :rank], self.gains[:rank], self.nbytes)


@dataclass(frozen=True)
class Correction:
    """One way to approximate a matrix by a product of two thin ones.

    Attributes:
        about: one line for `--help`.
        fit: `(matrix, stats, options) -> Term` of the rank `options.most`, or of the smaller side where that is less.
            The matrix is `[rows, cols]`, float32: the error `weight - quantized`, or the weight (`before`).
        options: frozen dataclass of its options.
        needs: names of statistics of the weight's input that `fit` reads.
        before: whether the term is taken out of the weight before the codes are made of what is left; it is else made
            of what the codes left.
    """

    about: str
    fit: Callable[[Float[Tensor, "rows cols"], Stats, Any], Term]
    options: type[Options] = Options
    needs: frozenset[str] = field(default_factory=frozenset)
    before: bool = False
