"""A quantized weight beside its original: how far off it is, and which method leaves such a residual.

Round to nearest puts every weight on the nearest code, and takes its scales from the range of each block. GPTQ moves
weights on to make up for the errors of columns before them: many are beyond half a step, some beyond a whole one, and
the residuals of columns go together. AutoRound moves none by more than a step. AWQ and SmoothQuant multiply columns
before they round, and divide what comes before them: a norm, or the rows of the weight before. Either is seen where
factors put weights back on their nearest codes. None of this is proof: the numbers stand beside the name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, log10
from typing import final

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lowbit.inspect.names import CONFIDENCES, Confidence
from lowbit.tensors import QTensor, block_size, level_table

Rows = Float[Tensor, "rows cols"]

_ROWS, _COLUMNS = 512, 192  # of a weight that are looked at for the method; its error is of all
_AWAY = 1e-3  # of a step: this much further than the nearest code is not rounding
_NEAREST, _MOVED = 1e-3, 0.02  # shares of weights off their nearest code: up to here none, from here many
_FAR = 16.0  # steps: further than compensation moves a weight; rows or columns were scaled in a way that is not seen
_FITTED = 0.01  # the same as the first, under factors
_LESS = 0.95  # squared error under factors that are right, over that without; wrong ones make it larger
_TOGETHER = 1.5  # mean squared correlation of two columns' residuals, over that of independent ones
_SCALED = 0.02  # spread of the columns' factors, in powers of two
_BY_COLUMN, _BY_ROW = 5.0, 1.5  # variance of what seem to be factors, over that by chance: GPTQ's are below
_ANOTHER = 0.5  # relative squared error of weights that are not the same
_SHIFTS = (0.0, 1.0)  # what norms add to their weights before they multiply: Gemma's 1
_SURE = 0.9  # share of a model's weights that a method explains
_RANGED, _SEARCHED = "rtn", "nearest codes under searched scales"
_FOLDED = ("awq+", "smoothquant+")


@final
@dataclass(frozen=True)
class Compared:
    """One quantized weight and its original.

    Attributes:
        name: of the weight.
        error: squared error over the original's squares, of all of the weight.
        snr: the same in decibels.
        moved: share of weights that are not on the nearest code, after factors are taken out.
        farthest: largest distance from the original, in steps.
        together: mean squared correlation of columns' residuals, over that of independent columns.
        ranged: whether scales come from the range of each block alone.
        spread: standard deviation of the columns' factors, in powers of two; 0 where they are all 1.
        rows: the same of the rows' factors, which a later weight's columns undo.
        partner: vector of the model that was divided by the columns' factors, where one was.
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
    rows: float
    partner: str | None
    method: str
    confidence: Confidence


@final
@dataclass(frozen=True)
class Verdict:
    """What the weights of a model look like together: a method, how many of them fit in, of how many, how sure."""

    method: str
    weights: int
    total: int
    confidence: Confidence


@final
@dataclass(frozen=True)
class _Sample:
    """Some rows: the original, what was found, and the bounds between which values have that as their nearest code."""

    w: Rows
    found: Rows
    step: Rows
    low: Rows
    high: Rows

    def moved(self, factors: Tensor | float = 1.0) -> float:
        """Share of weights off their nearest code, had they been multiplied by these first."""
        values = self.w * factors
        return float(((values < self.low) | (values > self.high)).float().mean())

    def widened(self, slack: float) -> _Sample:
        """For values that were rounded by so much of themselves after they were multiplied."""
        more = slack * self.found.abs()
        return replace(self, low=self.low - more, high=self.high + more)


@final
@dataclass(frozen=True)
class _Scaled:
    """What columns and rows were multiplied by, `exact` where that puts weights on their nearest codes."""

    columns: Tensor
    rows: Tensor
    partner: str | None = None
    exact: bool = True

    @property
    def both(self) -> Tensor:
        return self.columns * self.rows


def compare(
    name: str,
    q: QTensor,
    weight: Tensor,
    rounded_inputs: bool,
    vectors: Mapping[str, tuple[Tensor, Tensor]],
    slack: float = 0.0,
) -> Compared:
    """Errors of a quantized weight, and the method that they look like.

    Args:
        name: of the weight.
        q: the quantized weight; of two dimensions or more, seen as a matrix.
        weight: the original, of the same shape.
        rounded_inputs: whether its inputs are quantized too, which tells SmoothQuant from AWQ.
        vectors: one-dimensional parameters of the model, before and now.
        slack: by how much of itself a weight may have been rounded after factors were put into it, and these factors.
    """
    cols = weight.shape[-1]
    w, found = weight.reshape(-1, cols).float(), q.dequantize().reshape(-1, cols)
    error = float((w - found).double().square().sum() / w.double().square().sum().clamp(min=1e-60))
    snr = -10 * log10(error) if error > 0 else inf
    if q.scheme.grid.kind == "vectors":
        return Compared(name, error, snr, 0.0, 0.0, 1.0, False, 0.0, 0.0, None, "codebooks, of any method", "low")
    sample = _sample(q, w, found)
    scaled = _scaled(sample, vectors, slack)
    factors = scaled.both if scaled else torch.ones(1)
    moved = (sample.widened(slack) if scaled else sample).moved(factors)
    residual = sample.w * factors - sample.found
    together, farthest = _together(residual), float((residual / sample.step).abs().max())
    ranged = (scaled is None or scaled.exact) and _ranged(q, sample.w * factors, sample.step)
    method, confidence = _method(moved, farthest, together, ranged, _FITTED if scaled else _NEAREST)
    if scaled:
        method = f"{'smoothquant' if rounded_inputs else 'awq'}+{method}"
        confidence = "medium" if (scaled.exact or scaled.partner) and confidence != "low" else "low"
    elif method == "gptq" and _are_scaled(sample):  # what AWQ divides and nothing undoes is moved weights too
        confidence = "low"
    if error > _ANOTHER and scaled is None:
        method, confidence = "other weights: rotated, trained further, or another model", "low"
    spread, rows = (_deviation(scaled.columns), _deviation(scaled.rows)) if scaled else (0.0, 0.0)
    partner = scaled.partner if scaled else None
    return Compared(name, error, snr, moved, farthest, together, ranged, spread, rows, partner, method, confidence)


def _sample(q: QTensor, w: Rows, found: Rows) -> _Sample:
    rows = torch.linspace(0, len(w) - 1, min(_ROWS, len(w)), dtype=torch.float64).long()
    step, zero = _steps(q, rows, w.shape[1])
    low, high = _bounds(q, found[rows], step, zero)
    near = _AWAY * step.abs()
    return _Sample(w[rows], found[rows], step, low - near, high + near)


def _bounds(q: QTensor, found: Rows, step: Rows, zero: Rows | None) -> tuple[Rows, Rows]:
    """Between which values the one that was found is the nearest that the weight's own scales allow."""
    if zero is not None:
        shift, top = (zero / step if q.scheme.zero == "min" else zero), 2**q.scheme.grid.bits - 1
        code = (found / step + shift).round()
        low = torch.where(code <= 0, -inf, code - 0.5) - shift
        high = torch.where(code >= top, inf, code + 0.5) - shift
    else:
        table = level_table(q.scheme.grid)
        levels = torch.tensor(sorted(set(table[table.isfinite()].tolist())))
        between = (levels[1:] + levels[:-1]) / 2
        at = torch.bucketize(found / step, between)
        edges = torch.cat([torch.tensor([-inf]), between, torch.tensor([inf])])
        low, high = edges[at], edges[at + 1]
    low, high = low * step, high * step
    return torch.minimum(low, high), torch.maximum(low, high)


def _scaled(sample: _Sample, vectors: Mapping[str, tuple[Tensor, Tensor]], slack: float) -> _Scaled | None:
    """The factors that explain the difference; None where weights are on their codes without, or none explain it."""
    if sample.moved() <= _NEAREST:
        return None
    wide, one = sample.widened(slack), torch.ones(1)
    partner, columns = _partner(sample, vectors)
    for each in _explanations(wide, partner, columns):
        if wide.moved(each.both) <= _FITTED:
            return each
    if partner:
        return _Scaled(columns, one, partner, exact=False)
    factors = _least_squares(sample)
    return None if factors is None else _Scaled(factors, one, exact=False)


def _explanations(sample: _Sample, partner: str | None, columns: Tensor) -> Iterator[_Scaled]:
    """Factors that may put weights on their codes: of a vector, alone and with rows; fitted ones of the columns."""
    one = torch.ones(1)
    if partner:
        yield _Scaled(columns, one, partner)
    yield _Scaled(columns, _fitted(replace(sample, w=sample.w * columns), along=1), partner)
    yield _Scaled(_fitted(sample, along=0), one)


def _partner(sample: _Sample, vectors: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[str | None, Tensor]:
    """The vector whose change, as factors of the columns, leaves the least error, and these; ones where none does.

    Each row may have a factor of its own beside them, the best one for it.
    """
    w, found, one = sample.w.double(), sample.found.double(), torch.ones(sample.w.shape[1], dtype=torch.float64)
    ratios = {
        (name, shift): factors
        for name, pair in vectors.items() for shift in _SHIFTS
        if (factors := _ratio(*pair, shift, len(one))) is not None
    }  # fmt: skip
    tried = torch.stack([one, *ratios.values()], 1)
    explained = ((w * found) @ tried).square() / (w.square() @ tried.square()).clamp(min=1e-60)
    left = found.square().sum() - explained.sum(0)
    best = int(left.argmin())
    if left[best] > _LESS * left[0]:
        return None, torch.ones(1)
    return list(ratios)[best - 1][0], tried[:, best].float()


def _ratio(before: Tensor, now: Tensor, shift: float, cols: int) -> Tensor | None:
    """What a vector was divided by; None where it was not, or is none of the columns."""
    if not before.shape == now.shape == (cols,) or torch.equal(before, now):
        return None
    factors = (before.double() + shift) / (now.double() + shift)
    return factors if bool((factors.isfinite() & (factors > 0)).all()) else None


def _fitted(sample: _Sample, along: int) -> Tensor:
    """The factor of each row (`along` 1) or column (0) under which the most of its weights are on their codes."""
    ends = [(end / sample.w).nan_to_num(nan=0.0, posinf=inf, neginf=-inf) for end in (sample.low, sample.high)]
    starts, stops = torch.minimum(*ends), torch.maximum(*ends)
    starts, stops = (end.movedim(along, -1).contiguous() for end in (starts, stops))
    starts, stops = starts.clamp(min=1e-6).sort(-1).values, stops.sort(-1).values
    closed = torch.searchsorted(stops, starts)  # intervals that end before each start
    best = (torch.arange(starts.shape[-1]) - closed).argmax(-1, keepdim=True)
    start = starts.gather(-1, best)
    stop = stops.gather(-1, closed.gather(-1, best).clamp(max=stops.shape[-1] - 1))
    middle = torch.where(stop.isfinite() & (stop >= start), (start + stop) / 2, start)
    return middle.movedim(-1, along)


def _least_squares(sample: _Sample) -> Float[Tensor, "cols"] | None:
    """What each column was multiplied by, about; None where factors explain little of the difference."""
    w, found = sample.w, sample.found
    factors = (w * found).sum(0) / w.square().sum(0).clamp(min=1e-30)
    if not bool((factors > 0).all()):
        return None
    before, after = (found - w).square().sum(), (found - w * factors).square().sum()
    return factors if bool(after < before / 2) and _deviation(factors) > _SCALED else None


def _deviation(factors: Tensor) -> float:
    """Standard deviation in powers of two."""
    return float(factors.log2().std(correction=0))


def _are_scaled(sample: _Sample) -> bool:
    """Whether rows or columns were multiplied by factors, each by another: more than residuals alone make it seem.

    GPTQ's residuals go together along a row: what seem factors of columns spread by more than chance.
    """
    residual = sample.found - sample.w
    return any(_spread(sample.w, residual, along) > most for along, most in ((0, _BY_COLUMN), (1, _BY_ROW)))


def _spread(w: Rows, residual: Rows, along: int) -> float:
    """Variance of the factors that explain most of the residuals of each column or row, over that by chance."""
    squares = w.square().sum(along, keepdim=True).clamp(min=1e-30)
    factors = (w * residual).sum(along, keepdim=True) / squares
    chance = (residual - w * factors).square().mean(along, keepdim=True) / squares
    return float(((factors - factors.mean()) / chance.sqrt().clamp(min=1e-30)).var())


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
        return (_RANGED, "high") if ranged else (_SEARCHED, "medium")
    if moved >= _MOVED and farthest <= 1.05:
        return "autoround", "medium"
    if moved >= _MOVED and farthest <= _FAR:
        return "gptq", "high" if together > _TOGETHER else "medium"
    return "unknown", "low"


def methods_of(found: Iterable[Compared]) -> dict[str, int]:
    """How many weights look like each method, the most first."""
    return dict(Counter(each.method for each in found).most_common())


def verdict(found: Sequence[Compared]) -> Verdict | None:
    """What the weights look like together; None where there are none.

    Where some were multiplied by factors first, the others are those for which the search found none.
    """
    if not found:
        return None
    folded = [each for each in found if each.method.startswith(_FOLDED)]
    first = Counter(each.method.partition("+")[0] for each in folded).most_common(1)
    kinds = [_kind(each) for each in found]
    kind, count = Counter(kinds).most_common(1)[0]
    own = [each for each, other in zip(found, kinds, strict=True) if other == kind]
    then = _SEARCHED if any(each.method.endswith(_SEARCHED) for each in own) else own[0].method.rpartition("+")[2]
    confidence: Confidence = sorted((each.confidence for each in own), key=CONFIDENCES.index)[count // 2]
    if folded:
        confidence = "high" if any(each.partner for each in folded) else "medium"
    if count < _SURE * len(found):
        confidence = "low" if count < len(found) / 2 or confidence == "low" else "medium"
    return Verdict(f"{first[0][0]}+{then}" if first else then, count, len(found), confidence)


def _kind(each: Compared) -> str:
    """The method without factors; one word for all that put weights on their nearest codes."""
    method = each.method.rpartition("+")[2]
    return _RANGED if method == _SEARCHED else method
