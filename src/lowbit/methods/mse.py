"""Search each block's scale (and zero point) for the least p-norm of the error. See `docs/methods/mse.md`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import inf
from typing import final

from jaxtyping import Float
from torch import Tensor

from lowbit.methods import Method, Stats
from lowbit.methods._scales import (
    Affine,
    Blocks,
    Range,
    block_mean,
    candidates,
    finish,
    finite_range,
    fit,
    global_divisor,
    improve,
    refine,
    residual,
    round_zeros,
    shares_rows,
    squared_errors,
    unscaled,
    zero_unit,
)
from lowbit.schemes import Scheme
from lowbit.tensors import QTensor

# A candidate replaces another only where it is better by more than float32 sums can err; so the first of equals stays.
_MARGIN = 2.0**-16
_GROWTH = 1.5  # FP4's 6/4: the greatest weight on the second greatest level
_EIGHTHS = tuple(i / 8 for i in (-4, -3, -2, -1, 1, 2, 3, 4))
_SHIFTS = {"none": (), "int": (-1.0, 1.0), "float": _EIGHTHS, "min": _EIGHTHS}  # in units of a code


@final
@dataclass(frozen=True)
class Options:
    """What is searched.

    Attributes:
        steps: ratios between the whole range and the most shrunk one.
        max_shrink: share of the range that the last ratio takes away, in (0, 1).
        p: the error is the sum of |w - w^|**p over a block.
        signed: whether scales of symmetric integers may be negative, as in `autoround`.
    """

    steps: int = 100
    max_shrink: float = 0.8
    p: float = 2.0
    signed: bool = True

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.max_shrink < 1 or not 0 < self.p < inf:
            raise ValueError("steps must be 1 or more, max_shrink between 0 and 1, p above 0")


def quantize(weight: Float[Tensor, "rows cols"], stats: Stats, scheme: Scheme, options: Options) -> QTensor:
    """Start from round-to-nearest, keep for every block the candidate with the least error.

    Raises:
        WeightError: NaN or Inf, with its place.
    """
    ranges = finite_range(weight, stats, scheme)
    divisor = global_divisor(ranges, stats, scheme)
    best = fit(ranges, scheme, divisor)
    if shares_rows(scheme) and "range" in stats:
        return finish(weight, best, scheme)  # a run of rows cannot choose the scale of all

    def search(
        part: Float[Tensor, "high wide"], ranges: Range, start: Affine, block: tuple[int, int], cols: slice
    ) -> Affine:
        return _search(part, ranges, start, scheme, block, options)

    return finish(weight, refine(weight, ranges, best, scheme, search), scheme)


def _search(
    weight: Float[Tensor, "rows cols"],
    ranges: Range,
    start: Affine,
    scheme: Scheme,
    block: tuple[int, int],
    options: Options,
) -> Affine:
    """The best of `start`, the fits to scaled ranges, and small shifts of the zero point of the best of these."""

    def error_of(affine: Affine) -> Blocks:
        if options.p == 2:
            return squared_errors(weight, affine, scheme, block)
        return block_mean(residual(weight, affine, scheme, block).abs_().pow_(options.p), block)

    trials = candidates(ranges, scheme, start.divisor, _ratios(scheme, options), options.signed)
    best, least = improve(start, error_of(start), trials, error_of, _MARGIN)
    for shift in _SHIFTS[scheme.zero]:
        assert best.zeros is not None
        zeros = best.zeros + shift * zero_unit(best.scales, scheme)
        shifted = replace(best, zeros=round_zeros(zeros, scheme))
        best, least = improve(best, least, [shifted], error_of, _MARGIN)
    return best


def _ratios(scheme: Scheme, options: Options) -> Iterator[float]:
    """Factors on the range, 1 left out, as it is the start.

    E8M0 scales: the neighbouring powers of two. E4M3: sixteenths of an octave, which meets every E4M3 value in
    reach. Else even steps, on grids of uneven steps also upwards, where a larger scale may fit better.
    """
    least = 1 - options.max_shrink
    if scheme.scale == "e8m0":
        yield from (2.0, 0.5, 0.25)
    elif scheme.scale == "e4m3":
        ratio = _GROWTH
        while ratio >= least:
            yield ratio
            ratio *= 2 ** (-1 / 16)
    else:
        step = options.max_shrink / options.steps
        larger = 0 if scheme.grid.kind == "int" else int((_GROWTH - 1) / step)
        yield from (1 - step * i for i in range(-larger, options.steps + 1) if i)


def _objection(scheme: Scheme) -> str | None:
    if shares_rows(scheme):
        return "it searches the scales of some rows at a time, and here all rows share one; a scale per row is searched"
    return unscaled(scheme)


METHOD = Method(
    about="search each block's scale and zero point for the least error",
    quantize=quantize,
    options=Options,
    workspace=12.0,
    supports=_objection,
)
