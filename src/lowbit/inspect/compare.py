"""A quantized weight beside its original: how far off it is, and which method leaves such a residual.

Round to nearest puts every weight on the nearest code, and takes its scales from the range of each block. GPTQ moves
weights on to make up for the errors of columns before them: many are beyond half a step, some beyond a whole one, and
the residuals of columns go together. AutoRound moves none by more than a step. AWQ and SmoothQuant multiply columns
before they round, and divide what comes before them. None of this is proof: the numbers stand beside the name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import inf, log10
from typing import final

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lowbit.inspect.names import Confidence
from lowbit.tensors import QTensor, block_size, level_table

Rows = Float[Tensor, "rows cols"]

_ROWS, _COLUMNS = 512, 192  # of a weight that are looked at for the method; its error is of all
_AWAY = 1e-3  # of a step: this much further than the nearest code is not rounding
_NEAREST, _MOVED = 1e-3, 0.02  # shares of weights off their nearest code: up to here none, from here many
_FAR = 16.0  # steps: further than compensation moves a weight; rows or columns were scaled in a way that is not seen
_FITTED = 0.1  # the same as the first, under factors that were fitted
_TOGETHER = 1.5  # mean squared correlation of two columns' residuals, over that of independent ones
_SCALED = 0.02  # spread of the columns' factors, in powers of two
_BY_COLUMN, _BY_ROW = 5.0, 1.5  # variance of what seem to be factors, over that by chance: GPTQ's are below
_ANOTHER = 0.5  # relative squared error of weights that are not the same


@final
@dataclass(frozen=True)
class Compared:
    """One quantized weight and its original.

    Attributes:
        name: of the weight.
        error: squared error over the original's squares, of all of the weight.
        snr: the same in decibels.
        moved: share of weights that are not on the nearest code, after the columns' factors are taken out.
        farthest: largest distance from the original, in steps.
        together: mean squared correlation of columns' residuals, over that of independent columns.
        ranged: whether scales come from the range of each block alone.
        spread: standard deviation of the columns' factors, in powers of two; 0 where they are all 1.
        partner: vector of the model that was divided by these factors, where one was.
        method: what leaves such residuals.
        confidence: how sure that is.
    """

    name: str
    error: float
    snr: float
    moved: float
    farthest: float
    together: float
    ranged: bool
    spread: float
    partner: str | None
    method: str
    confidence: Confidence


def compare(
    name: str, q: QTensor, weight: Tensor, rounded_inputs: bool, vectors: Mapping[str, tuple[Tensor, Tensor]]
) -> Compared:
    """Errors of a quantized weight, and the method that they look like.

    Args:
        name: of the weight.
        q: the quantized weight; of two dimensions or more, seen as a matrix.
        weight: the original, of the same shape.
        rounded_inputs: whether its inputs are quantized too, which tells SmoothQuant from AWQ.
        vectors: one-dimensional parameters of the model, before and now.
    """
    cols = weight.shape[-1]
    w, found = weight.reshape(-1, cols).float(), q.dequantize().reshape(-1, cols)
    error = float((w - found).double().square().sum() / w.double().square().sum().clamp(min=1e-60))
    rows = torch.linspace(0, len(w) - 1, min(_ROWS, len(w)), dtype=torch.float64).long()
    w, found = w[rows], found[rows]
    step, zero = _steps(q, rows, cols)

    def moved_by(factors: Tensor | float) -> float:
        """Share of weights off the nearest code, had the columns been multiplied by these first."""
        away = (w * factors - found).abs() - (w * factors - _nearest(q, w * factors, step, zero)).abs()
        return float((away / step.abs() > _AWAY).float().mean())

    moved = moved_by(1.0)
    exact = {name: factors for name, factors in _divisors(cols, vectors) if moved > 2 * moved_by(factors)}
    partner = min(exact, key=lambda name: moved_by(exact[name]), default=None)
    factors = exact[partner] if partner else _factors(w, found)
    if factors is not None:
        w, moved = w * factors, moved_by(factors)
    spread = float(factors.log2().std()) if factors is not None else 0.0
    # Factors that were fitted move ranges, and some codes.
    ranged, fitted = (
        (factors is None or partner is not None) and _ranged(q, w, step),
        factors is not None and not partner,
    )
    together, farthest = _together(w - found), float(((w - found) / step).abs().max())
    method, confidence = _method(moved, farthest, together, ranged, _FITTED if fitted else _NEAREST)
    if factors is not None:
        method = f"{'smoothquant' if rounded_inputs else 'awq'}+{method}"
        confidence = "medium" if partner and confidence != "low" else "low"
    elif method == "gptq" and _are_scaled(w, found):  # what AWQ divides and nothing undoes is moved weights too
        confidence = "low"
    if error > _ANOTHER and factors is None:
        method, confidence = "other weights: rotated, trained further, or another model", "low"
    snr = -10 * log10(error) if error > 0 else inf
    return Compared(name, error, snr, moved, farthest, together, ranged, spread, partner, method, confidence)


def _factors(w: Rows, found: Rows) -> Float[Tensor, "cols"] | None:
    """What each column was multiplied by, by least squares; None where factors explain little of the difference."""
    factors = (w * found).sum(0) / w.square().sum(0).clamp(min=1e-30)
    if not bool((factors > 0).all()):
        return None
    before, after = (found - w).square().sum(), (found - w * factors).square().sum()
    scaled = bool(after < before / 2) and float(factors.log2().std()) > _SCALED
    return factors if scaled else None


def _are_scaled(w: Rows, found: Rows) -> bool:
    """Whether rows or columns were multiplied by factors, each by another: more than residuals alone make it seem.

    GPTQ's residuals go together along a row: what seem factors of columns spread by more than chance.
    """
    return any(_spread(w, found - w, along) > most for along, most in ((0, _BY_COLUMN), (1, _BY_ROW)))


def _spread(w: Rows, residual: Rows, along: int) -> float:
    """Variance of the factors that explain most of the residuals of each column or row, over that by chance."""
    squares = w.square().sum(along, keepdim=True).clamp(min=1e-30)
    factors = (w * residual).sum(along, keepdim=True) / squares
    chance = (residual - w * factors).square().mean(along, keepdim=True) / squares
    return float(((factors - factors.mean()) / chance.sqrt().clamp(min=1e-30)).var())


def _divisors(cols: int, vectors: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Vectors of the model that changed, as the factors that they were divided by."""
    for name, (before, now) in vectors.items():
        if before.shape == now.shape == (cols,) and not torch.equal(before, now):
            factors = before.float() / now.float()
            if bool((factors.isfinite() & (factors > 0)).all()):
                yield name, factors


def _steps(q: QTensor, rows: Int64[Tensor, "rows"], cols: int) -> tuple[Rows, Rows | None]:
    """Scale and zero point (or minimum) of every weight of some rows; scales of 0 are 1."""
    high, wide = block_size(q.shape, q.scheme.block)
    scales, zeros = q.scale_values(), q.zero_values()
    across = torch.arange(cols) // wide if q.group_index is None else q.group_index.long()
    if q.scheme.block.flat:
        at = (torch.zeros(1, dtype=torch.int64), (rows[:, None] * cols + torch.arange(cols)) // wide)
    else:
        at = ((rows // high)[:, None], across[None, :])
    step = scales[at]
    return torch.where(step == 0, 1.0, step), None if zeros is None else zeros[at]


def _nearest(q: QTensor, w: Rows, step: Rows, zero: Rows | None) -> Rows:
    """The nearest values that the weight's own scales allow."""
    if zero is not None:
        shift, top = (zero / step if q.scheme.zero == "min" else zero), 2**q.scheme.grid.bits - 1
        return ((w / step + shift).round().clamp(0, top) - shift) * step
    table = level_table(q.scheme.grid)
    levels = torch.tensor(sorted(set(table[table.isfinite()].tolist())))
    found: Tensor = levels[torch.bucketize(w / step, (levels[1:] + levels[:-1]) / 2)] * step
    return found


def _together(residual: Rows) -> float:
    """Mean squared correlation of pairs of columns, times the rows: about 1 where they have nothing in common."""
    some = residual[:, torch.linspace(0, residual.shape[1] - 1, min(_COLUMNS, residual.shape[1])).long()]
    some = some - some.mean(0)
    some = some[:, some.norm(dim=0) > 0]
    if min(some.shape) < 2:
        return 1.0
    unit = some / some.norm(dim=0)
    squares = (unit.T @ unit).square()
    count = len(squares)
    return float((squares.sum() - squares.diagonal().sum()) / (count * (count - 1)) * (len(residual) - 1))


def _ranged(q: QTensor, w: Rows, step: Rows) -> bool:
    """Whether each block's range is one and the same number of steps, so that its scale follows from it."""
    block = q.scheme.block
    wide = block_size(q.shape, block)[1]
    if q.group_index is not None or w.shape[1] % wide or block.rows != 1:
        return False
    blocks = w.reshape(len(w), -1, wide)
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    reach = torch.maximum(-low, high) if q.scheme.zero == "none" else high - low
    ratio = reach / step.reshape(len(w), -1, wide)[..., 0].abs()
    middle = ratio.median()
    return float(((ratio - middle).abs() < 0.02 * middle).float().mean()) > 0.9


def _method(moved: float, farthest: float, together: float, ranged: bool, nearest: float) -> tuple[str, Confidence]:
    if moved <= nearest:
        return ("rtn", "high") if ranged else ("nearest codes under searched scales", "medium")
    if moved >= _MOVED and farthest <= 1.05:
        return "autoround", "medium"
    if moved >= _MOVED and farthest <= _FAR:
        return "gptq", "high" if together > _TOGETHER else "medium"
    return "unknown", "low"


def methods_of(found: Iterable[Compared]) -> dict[str, int]:
    """How many weights look like each method, the most first."""
    counts: dict[str, int] = {}
    for each in found:
        counts[each.method] = counts.get(each.method, 0) + 1
    return dict(sorted(counts.items(), key=lambda pair: -pair[1]))
