"""Percentiles of the absolute values of each input channel, by a histogram whose bins are a fixed share of their value.

As DDSketch (Masson, Rim and Lee 2019, arXiv:1908.10693): the error is relative to the value and known beforehand, and
the order of rows does not matter. Bins are linear within an octave, so that a float32's own bits name its bin.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lowbit.stats import State, Statistic

# Shares of the values that are at most the result; the last is the maximum, which is exact.
SHARES = (0.5, 0.9, 0.99, 0.999, 0.9999, 1.0)
# Values from 2**-20 up to 2**20 are within 1/32 of the result; smaller ones become 0, larger ones 2**20 or the maximum.
ERROR, SMALLEST, LARGEST = 1 / 32, 2.0**-20, 2.0**20
_PER_OCTAVE_BITS, _OCTAVES, _FIRST = 4, 40, 127 - 20
_BINS = (_OCTAVES << _PER_OCTAVE_BITS) + 1
_ELEMENTS = 2**20  # values that are counted at a time


def start(cols: int, seed: int) -> State:
    """No counts; bin 0 is for what is smaller than all others."""
    return {"counts": torch.zeros(cols, _BINS, dtype=torch.int32), "most": torch.zeros(cols)}


def update(state: State, rows: Float[Tensor, "n cols"], float_rows: Float[Tensor, "n cols"] | None) -> None:
    """Count the values. Exact in any order of rows."""
    if not len(rows):
        return
    counts = state["counts"].view(-1)
    offsets = torch.arange(rows.shape[1]) * _BINS
    for part in torch.split(rows, max(_ELEMENTS // max(rows.shape[1], 1), 1)):
        values = part.float().abs()
        torch.maximum(state["most"], values.amax(0), out=state["most"])
        bins = (values.view(torch.int32) >> (23 - _PER_OCTAVE_BITS)) - (_FIRST << _PER_OCTAVE_BITS) + 1
        at = (bins.clamp_(0, _BINS - 1) + offsets).view(-1)
        counts.scatter_add_(0, at, torch.ones(1, dtype=torch.int32).expand(len(at)))


def finish(state: State) -> Float[Tensor, "cols q"]:
    """For each share the middle of the bin that holds the smallest value with that share at or below it."""
    parts = zip(torch.split(state["counts"], 1024), torch.split(state["most"], 1024), strict=True)
    return torch.cat([_read(counts, most) for counts, most in parts])


def _read(counts: Tensor, most: Tensor) -> Tensor:
    upto = counts.cumsum(1)
    ranks = (upto[:, -1:] * torch.tensor(SHARES, dtype=torch.float64)).ceil().clamp(min=1).long()
    bins = torch.searchsorted(upto, ranks).clamp_(max=_BINS - 1).int()
    edges = (bins - 1 + (_FIRST << _PER_OCTAVE_BITS)) << (23 - _PER_OCTAVE_BITS)
    middle = (edges + (1 << (22 - _PER_OCTAVE_BITS))).view(torch.float32)
    values = torch.where(bins == 0, 0, middle).minimum(most[:, None])
    values[:, -1] = most
    return values


def nbytes(cols: int) -> int:
    """The histograms, and one part with its bins, or the running counts of 1024 channels."""
    return 4 * cols * (_BINS + 8 * len(SHARES)) + max(40 * max(_ELEMENTS, cols), 20 * 1024 * _BINS)


STATISTIC = Statistic(about="percentiles of absolute values", start=start, update=update, finish=finish, nbytes=nbytes)
