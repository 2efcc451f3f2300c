"""Uncertainty of values per token: neighbouring windows of a text are alike, so blocks of windows are resampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
RESAMPLES = 9999
FEWEST_BLOCKS = 5  # below, no interval: it would hold the truth clearly less often than it says

Values = NDArray[np.float64]


@final
@dataclass(frozen=True)
class Score:
    """A number, its 95% interval, and the p-value of "this is zero"; None where there is none."""

    value: float
    low: float | None = None
    high: float | None = None
    p_value: float | None = None


@final
@dataclass(frozen=True, eq=False)
class Blocks:
    """Contiguous runs of windows, the units that are resampled.

    Attributes:
        starts: index of each block's first token.
        tokens: number of tokens in all blocks.
        seed: of the random generator; every score starts a generator of its own.
    """

    starts: NDArray[np.intp]
    tokens: int
    seed: int = 0

    def mean(self, values: Values) -> Score:
        """Mean over tokens, with the percentile interval of a bootstrap over separate blocks (Carlstein 1986).

        The level is widened as in Hesterberg 2015 (doi:10.1080/00031305.2015.1089789, "expanded percentile interval"),
        so that the interval holds the truth as often as it says when there are few blocks.
        """
        from scipy import stats  # type: ignore[import-untyped]

        if len(self.starts) < FEWEST_BLOCKS:
            return Score(float(values.mean()))
        sums = np.add.reduceat(values, self.starts)
        sizes = np.diff(np.append(self.starts, self.tokens)).astype(np.float64)
        found = stats.bootstrap(
            (sums, sizes),
            lambda sums, sizes, axis: sums.sum(axis) / sizes.sum(axis),
            paired=True,
            vectorized=True,
            method="percentile",
            confidence_level=_widened(len(sums)),
            **self._resampling(),
        ).confidence_interval
        return Score(float(values.mean()), float(found.low), float(found.high))

    def change(self, differences: Values) -> Score:
        """Mean of paired differences with its interval, and the p-value of "no change".

        The p-value is that of a two-sided sign-flip permutation test on the differences summed over blocks: under
        "no change" a block's difference is as likely to have the other sign.
        """
        from scipy import stats

        score = self.mean(differences)
        if score.low is None:
            return score
        sums = np.add.reduceat(differences, self.starts)
        test = stats.permutation_test(
            (sums,),
            lambda sums, axis: sums.sum(axis),
            permutation_type="samples",
            vectorized=True,
            **self._resampling(),
        )
        return Score(score.value, score.low, score.high, float(test.pvalue))

    def _resampling(self) -> dict[str, Any]:
        """Number of resamples, a generator, and how many resamples to hold in memory at a time."""
        batch = max(2**20 // len(self.starts), 1)
        return {"n_resamples": RESAMPLES, "rng": np.random.default_rng(self.seed), "batch": batch}


def make_blocks(counts: Sequence[int], seed: int = 0) -> Blocks:
    """Blocks of about the cube root of the number of windows, which grows at the rate that is best for a variance.

    Hall, Horowitz and Jing 1995 (doi:10.1093/biomet/82.3.561); never so long that fewer than eight blocks remain.

    Args:
        counts: number of scored tokens of each window.
        seed: of the random generator.
    """
    length = max(min(ceil(len(counts) ** (1 / 3)), len(counts) // 8), 1)
    ends = np.cumsum(counts)
    starts = np.concatenate([[0], ends[:-1]])[::length]
    return Blocks(starts.astype(np.intp), int(ends[-1]), seed)


def _widened(count: int) -> float:
    """Level at which a percentile interval over `count` blocks is as wide as a t interval."""
    from scipy import stats

    half = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * sqrt(count / (count - 1))
    return float(1 - 2 * stats.norm.sf(half))
