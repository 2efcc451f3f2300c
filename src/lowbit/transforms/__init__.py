"""Transforms: each file rewrites the float weights of a block so that they quantize better and compute the same.

A transform is a frozen record of pure functions, `TRANSFORM = Transform(...)`. It chooses factors; the stage folds them
and proves that the block's output stayed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lowbit.blocks import Block, Site
from lowbit.methods import NoOptions, Stats


@dataclass(frozen=True)
class Transform:
    """One way to choose a factor per input channel.

    Attributes:
        about: one line for `--help`.
        search: `(site, block, stats, options) -> factors` of `[channels]`, float32, positive and finite, by which the
            columns of the site's weights are multiplied while the input is divided by them; None to leave the site as
            it is. Called in the order of use, for sites where a factor can be folded; `block.weights` hold what was
            folded before.
        options: frozen dataclass of its own options.
        needs: names of statistics of the site's input that `search` reads.
        method: the method that quantizes after it where the user names none.
        tokens: `(options, tokens of a window) -> ` tokens that `search` runs through a block for one site, for the
            estimate of time.
        batch: `options -> ` windows that go back through the block at once, for the estimate of memory; 0 for none.
    """

    about: str
    search: Callable[[Site, Block, Stats, Any], Tensor | None]
    options: type = NoOptions
    needs: frozenset[str] = field(default_factory=frozenset)
    method: str = "rtn"
    tokens: Callable[[Any, int], int] = lambda options, length: 0
    batch: Callable[[Any], int] = lambda options: 0
