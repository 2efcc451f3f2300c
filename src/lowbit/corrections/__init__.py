"""Corrections: each file makes a low-rank term that is added beside a quantized weight.

A correction is a frozen record of pure functions, `CORRECTION = Correction(...)`. Its terms are written as a PEFT
adapter (LoRA) next to the quantized checkpoint, which any runtime with LoRA support adds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor

from lowbit.methods import NoOptions, Stats

LowRank = tuple[Float[Tensor, "rank cols"], Float[Tensor, "rows rank"]]


@dataclass(frozen=True)
class Correction:
    """One way to approximate an error matrix by a product of two thin ones.

    Attributes:
        about: one line for `--help`.
        fit: `(error, stats, options) -> (down, up)`: `up @ down` approximates `error = weight - quantized`, `[rows,
            cols]`, float32.
        options: frozen dataclass of its own options.
        needs: names of statistics of the weight's input that `fit` reads.
    """

    about: str
    fit: Callable[[Float[Tensor, "rows cols"], Stats, Any], LowRank]
    options: type = NoOptions
    needs: frozenset[str] = field(default_factory=frozenset)
