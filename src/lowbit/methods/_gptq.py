"""The column loop that GPTQ and its relatives share. See `docs/methods/gptq.md`.

With the error D = W - Q of the columns that are done, the next column k is rounded from the target

    T_k = W_k + sum_i D_i F[k, i]

F is strictly lower triangular in the order of rounding for the first pass: H = R R^T with R upper triangular gives
F[k, i] = R[i, k] / R[k, k] (QuIP, arXiv:2307.13304, section 3.1; equal to GPTQ, theorem 6). Later passes take the whole
row, F[k, i] = H[i, k] / H[k, k] for i != k: then T_k is where the error D H D^T is least with all other columns as they
are. Both are one sweep over blocks of columns: a matrix product for the errors of other blocks, a kernel within one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from math import inf
from typing import Literal, final

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from lowbit import native
from lowbit.methods import Stats, _blocks, _elsewhere, _runs
from lowbit.methods._scales import (
    Affine,
    Blocks,
    Range,
    candidates,
    code_zeros,
    coder_of,
    finish,
    finite_range,
    fit,
    global_divisor,
    improve,
    refine,
    round_scales,
    round_zeros,
    rounder_of,
    shares_rows,
    squared_errors,
    unscaled,
)
from lowbit.schemes import GGML_TYPES, Scheme
from lowbit.tensors import QTensor, block_size, level_table

Order = Literal["static", "none", "group", "aware"]

# Rows that are rounded together on the processor; a fixed number, so that products round the same however rows are cut.
# Another device takes all at once: there it is the number of operations that counts.
LANES = 128
_WIDEST = 512  # columns of the widest block whose scale is searched or refitted on the way
_NARROWEST = 32  # columns of the narrowest block whose scale is refitted: below, it gains little and costs most
# Columns up to which products are in float32; then in bfloat16, several times as fast where the processor has units for
# it (and thirty times as slow where it has none), to 0.3% alike.
_FULL = 2048
_STRIPE = 512  # rows
# Operations that take as long as one visit of a weight beside products: of small blocks that are refitted, of runs that
# are searched. Measured on a matrix of 768 x 256; `_cost` doubles them with the others.
_REFITTED, _SEARCHED = 9_000, 16_000
_DOUBLE = 4096  # columns up to which the factorization is in float64


@final
@dataclass(frozen=True)
class Loop:
    """What the loop does; the options of the methods that use it.

    Attributes:
        damp: added to the diagonal of the second moment, as a share of its mean.
        block: columns between two matrix products.
        order: of rounding; see `docs/methods/gptq.md`.
        search: whether scales are searched for the least weighted error, else they cover the range.
        fresh: whether a block's scale is chosen when its first column is reached, from the targets.
        passes: of coordinate descent after the first.
        refit: whether these passes also move scales and zero points.
        signed: whether searched scales may be negative.
    """

    damp: float
    block: int
    order: Order
    search: bool
    fresh: bool
    passes: int
    refit: bool
    signed: bool


# ---- what depends on the inputs alone ----


def prepare(stats: Stats, scheme: Scheme, loop: Loop) -> Stats:
    """Order, factor and scaled rows of the damped second moment, and the damping that was needed (`damp`, a share).

    For types with tables also what their runs are rounded by (`_runs.forms`), in the first pass and later.

    Where no damping up to 10 times the mean makes it positive definite (it is not finite), the columns are taken as
    independent and `damp` is infinite. The second moment itself is left out of the result.
    """
    moment = stats["second_moment"]
    cols = moment.shape[0]
    order = _order(moment.diagonal(), scheme, loop.order)
    feedback, curvature, pivot, damp = _factor(moment, order, loop.damp)
    rows = order if _regroups(scheme, loop, cols) else torch.arange(cols, device=moment.device)
    found = {"order": order, "feedback": feedback, "curvature": curvature, "damp": torch.tensor([damp])}
    if loop.passes:
        found["pull"] = torch.zeros_like(feedback)
        for part in _stripes(cols) if damp < inf else ():
            found["pull"][part] = moment[rows[part, None], rows].div_(curvature[rows[part], None])
        found["pull"].fill_diagonal_(0)
    if scheme.grid.table:
        found["solve"], found["metric"] = _runs.forms(feedback, pivot, first=True)
        if loop.passes:
            found["later_solve"], found["later_metric"] = _runs.forms(found["pull"], curvature[rows], first=False)
    return {name: value for name, value in stats.items() if name != "second_moment"} | found


def _product_type(moment: Tensor) -> torch.dtype:
    wide = moment.device.type == "cpu" and len(moment) > _FULL
    return torch.bfloat16 if wide and native.computes_bfloat16() else torch.float32


def _stripes(size: int) -> Iterator[slice]:
    """Rows of a square matrix of which a copy may be made beside it."""
    return (slice(start, min(start + _STRIPE, size)) for start in range(0, size, _STRIPE))


def prepared_bytes(cols: int) -> int:
    """Most bytes that `prepare` holds: the moment, its factor in `precision`, what comes of that; or both results."""
    made = 4 if cols <= _FULL or not native.computes_bfloat16() else 2
    return (4 + made + max(made, precision(cols).itemsize)) * cols**2 + stripe_bytes(cols)


def stripe_bytes(cols: int) -> int:
    """Of the copies that are made of some rows at a time."""
    return 16 * min(cols, _STRIPE) * cols


def operations(rows: int, cols: int, passes: int, scheme: Scheme) -> float:
    """Floating-point operations for one weight: a factorization, the loop, and passes over all pairs of columns."""
    visits = _SEARCHED if scheme.grid.table else _REFITTED if _blocks.special(scheme) else 0
    return cols**3 / 3 + rows * cols * ((1 + 2 * passes) * cols + (1 + passes) * visits)


def precision(cols: int) -> torch.dtype:
    """In which a second moment is factored: float64 as long as that costs little memory."""
    return torch.float64 if cols <= _DOUBLE else torch.float32


def _factor(
    moment: Float[Tensor, "cols cols"], order: Int64[Tensor, "cols"], damp: float
) -> tuple[Float[Tensor, "cols cols"], Float[Tensor, "cols"], Float[Tensor, "cols"], float]:
    """F in this order, the damped diagonal as columns are, pivots in this order, the damping as a share of its mean.

    R comes of the Cholesky factor of the matrix with its axes reversed.
    """
    size, back, feedback = len(order), order.flip(0), torch.zeros_like(moment, dtype=_product_type(moment))
    reverse = torch.empty_like(moment, dtype=precision(size))
    diagonal = moment.diagonal()[back].to(reverse.dtype)
    mean = diagonal.mean().item() if size else 0.0
    diagonal[diagonal == 0] = mean or 1.0  # inputs that are always zero: any code does, round-to-nearest's is taken
    for share in [damp * 10**i for i in range(12) if damp * 10**i <= 10] or [damp]:
        for part in _stripes(size):
            reverse[part] = moment[back[part, None], back]
        reverse.diagonal().copy_(diagonal + share * mean)
        if cholesky_(reverse):
            for part in _stripes(size):
                scaled = reverse[part] / reverse.diagonal()[part, None]
                feedback[size - part.stop : size - part.start] = scaled.flip(0, 1)
            pivot = reverse.diagonal().square().flip(0).float()
            return feedback.fill_diagonal_(0), (diagonal + share * mean)[back.argsort()].float(), pivot, share
    ones = torch.ones_like(moment[0])
    return feedback, ones, ones, inf


def cholesky_(matrix: Float[Tensor, "cols cols"]) -> bool:
    """Put its Cholesky factor, transposed, in the place of a matrix; whether there is one, and it is finite."""
    lower, failed = matrix.mT, torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(lower, out=(lower, failed))
    return not failed and all(matrix[part].isfinite().all() for part in _stripes(len(matrix)))


def _order(diagonal: Float[Tensor, "cols"], scheme: Scheme, order: Order) -> Int64[Tensor, "cols"]:
    """Columns in the order of rounding: those of the largest inputs first."""
    cols = len(diagonal)
    if order == "none":
        return torch.arange(cols, device=diagonal.device)
    if scheme.grid.table:
        return _runs.order(diagonal)
    if order != "aware":
        return diagonal.argsort(descending=True, stable=True)
    width = scheme.block.cols or max(cols, 1)
    parts = [start + part.argsort(descending=True, stable=True) for start, part in _parts(diagonal, width)]
    largest = torch.stack([part.max() for _, part in _parts(diagonal, width)]) if parts else diagonal
    return torch.cat(
        [parts[i] for i in largest.argsort(descending=True, stable=True).tolist()]
        or [torch.arange(0, device=diagonal.device)]
    )


def _parts(diagonal: Float[Tensor, "cols"], width: int) -> list[tuple[int, Tensor]]:
    return [(start, diagonal[start : start + width]) for start in range(0, len(diagonal), width)]


# ---- scales ----


def choose(
    weight: Float[Tensor, "rows cols"],
    ranges: Range,
    importance: Float[Tensor, "cols"],
    scheme: Scheme,
    loop: Loop,
    divisor: float,
) -> Affine:
    """Scales that cover the ranges; with `loop.search` those of the least error, weighted by column."""
    best = fit(ranges, scheme, divisor)
    if not loop.search or shares_rows(scheme):
        return best

    def searched(
        part: Float[Tensor, "high wide"], ranges: Range, start: Affine, block: tuple[int, int], cols: slice
    ) -> Affine:
        def error_of(affine: Affine) -> Blocks:
            return squared_errors(part, affine, scheme, block, importance[cols])

        trials = candidates(ranges, scheme, divisor, _ratios(scheme), loop.signed)
        return improve(start, error_of(start), trials, error_of)[0]

    return refine(weight, ranges, best, scheme, searched)


def _ratios(scheme: Scheme) -> Iterator[float]:
    """Factors on the range; upwards too on grids of uneven steps, where a larger scale may fit better."""
    if scheme.scale == "e8m0":
        yield from (2.0, 0.5)
    elif scheme.grid.kind == "int":
        yield from (1 - i / 20 for i in range(1, 11))
    else:
        yield from (1 + i / 16 for i in range(-7, 9) if i)


# ---- the loop ----


@final
@dataclass(frozen=True)
class _Tile:
    """Some rows on their way, transposed: a lane is a row. Tensors are changed in place.

    Attributes:
        weight, error, codes: `error` is weight minus what the code stands for, once there is one.
        scales: as they are stored, by block.
        zeros: likewise, None where there are none; minima as they are subtracted, in units of the weight.
        steps: the scales above these, where there are some.
        rounded: the error as products take it: itself, or in bfloat16.
        group: block of each column.
    """

    weight: Float[Tensor, "cols lanes"]
    error: Float[Tensor, "cols lanes"]
    codes: UInt8[Tensor, "cols lanes"]
    scales: Float[Tensor, "blocks lanes"]
    zeros: Float[Tensor, "blocks lanes"] | None
    rounded: Float[Tensor, "cols lanes"]
    group: Int64[Tensor, "cols"]
    steps: _blocks.Steps

    def reorder(self, order: Int64[Tensor, "cols"]) -> None:
        """Put columns into another order."""
        for columns in (self.weight, self.error, self.codes, self.group):
            columns.copy_(columns[order])
        self.rounded.copy_(self.error)

    def target(self, at: slice, factors: Float[Tensor, "n known"]) -> Float[Tensor, "n lanes"]:
        """The targets of some columns, from the errors of the first or of all columns."""
        return self.weight[at] + factors @ self.rounded[: factors.shape[1]]


@final
@dataclass(frozen=True)
class _Rule:
    """What all tiles share: scheme, loop, global divisor, the kernel that finds codes, and what these stand for."""

    scheme: Scheme
    loop: Loop
    divisor: float
    sweep: Callable[..., None]
    table: Float[Tensor, "256"]

    @property
    def unit(self) -> float:
        return (1 / torch.tensor(self.divisor)).item()


def quantize(weight: Float[Tensor, "rows cols"], stats: Stats, scheme: Scheme, loop: Loop) -> QTensor:
    """Round a weight column by column under prepared statistics.

    Raises:
        WeightError: NaN or Inf, with its place.
    """
    ranges, device = finite_range(weight, stats, scheme), stats["curvature"].device
    special = _blocks.special(scheme)
    divisor = 1.0 if special else global_divisor(ranges, stats, scheme)
    rule = _Rule(scheme, loop, divisor, _sweep_of(scheme, device), level_table(scheme.grid).to(device))
    wide = block_size((weight.shape[0], weight.shape[1]), scheme.block)[1]
    order, permuted = stats["order"], _regroups(scheme, loop, weight.shape[1])
    view, importance = (weight[:, order.cpu()], stats["curvature"][order]) if permuted else (weight, stats["curvature"])
    if permuted:
        ranges = native.block_range(view, *block_size((view.shape[0], view.shape[1]), scheme.block))[:2]
    there = view.to(device)
    affine, steps, codes = _start(view, there, ranges, importance, rule, wide)
    turn = torch.arange(len(order), device=device) if permuted else order
    local, lanes = {**stats, "turn": turn, "importance": importance}, LANES if device.type == "cpu" else len(view)
    for start in range(0, len(view), lanes):
        _tile_of_rows(there[start : start + lanes], start, lanes, (affine, steps), local, rule, codes)
    affine, steps = affine.to("cpu"), steps.to("cpu")
    result = _blocks.finish(codes, affine, steps, scheme) if special else finish(view, affine, scheme)
    index = None
    if permuted:
        back = order.cpu().argsort()
        codes, index = codes[:, back], (back // wide).int()
    return replace(result, codes=codes, group_index=index)


def _sweep_of(scheme: Scheme, device: torch.device) -> Callable[..., None]:
    """What finds the codes of a run of columns between two matrix products."""
    if scheme.grid.table and device.type == "cpu":
        return partial(native.sweep_runs, GGML_TYPES[scheme.grid.name], level=level_table(scheme.grid))
    if scheme.grid.table:
        return _runs.Sweep(scheme, device)
    if device.type == "cpu":
        return partial(native.sweep, coder=coder_of(scheme))
    return _elsewhere.Sweep(rounder_of(scheme, device))


def _start(
    view: Float[Tensor, "rows cols"],
    there: Float[Tensor, "rows cols"],
    ranges: Range,
    importance: Float[Tensor, "cols"],
    rule: _Rule,
    wide: int,
) -> tuple[Affine, _blocks.Steps, UInt8[Tensor, "rows cols"]]:
    """The scales to start from, on the device of `there` (the weight) and of `importance`; memory for codes."""
    device, scheme = importance.device, rule.scheme
    if _blocks.special(scheme):
        affine, steps, codes = _blocks.start(view, importance.cpu(), scheme)
        return affine.to(device), steps.to(device), codes
    first = replace(rule.loop, search=rule.loop.search and not _on_the_way(rule, wide))
    low, high = (part.to(device) for part in ranges)
    affine = choose(there, (low, high), importance, scheme, first, rule.divisor)
    return affine, _blocks.Steps(None, None), torch.empty(view.shape, dtype=torch.uint8)


def _regroups(scheme: Scheme, loop: Loop, cols: int) -> bool:
    """Whether blocks are formed in the order of rounding."""
    return loop.order == "group" and 0 < scheme.block.cols < cols


def _on_the_way(rule: _Rule, wide: int) -> bool:
    """Whether scales are chosen block by block from the targets."""
    wanted = rule.loop.fresh and rule.loop.order != "static" and not _blocks.special(rule.scheme)
    return wanted and _movable(rule.scheme, wide)


def _movable(scheme: Scheme, wide: int) -> bool:
    """Whether a scale belongs to one row and to few enough columns to be changed during a pass."""
    return scheme.block.rows == 1 and wide <= _WIDEST


def _tile_of_rows(
    rows: Float[Tensor, "rows cols"],
    start: int,
    lanes: int,
    maps: tuple[Affine, _blocks.Steps],
    stats: Stats,
    rule: _Rule,
    codes: UInt8[Tensor, "all cols"],
) -> None:
    """Round up to so many rows; codes and changed scales go to their places."""
    (affine, steps), device = maps, rows.device
    count, cols = rows.shape
    high, wide = block_size((codes.shape[0], cols), rule.scheme.block)
    lane = (start + torch.arange(lanes, device=device).clamp(max=count - 1)) // high
    full = torch.zeros(cols, lanes, device=device)
    full[:, :count] = rows.T
    zeros = None if affine.zeros is None else affine.zeros[lane].T.contiguous()
    places = torch.zeros(cols, lanes, dtype=torch.uint8, device=device)
    if rule.scheme.grid.table:
        places[:, :count] = codes[start : start + count].T.to(device)  # runs keep some of what they start with
    scales = affine.scales[lane].T.contiguous()
    error = torch.zeros_like(full)
    rounded, group = error.to(stats["feedback"].dtype), torch.arange(cols, device=device) // wide
    tile = _Tile(full, error, places, scales, zeros, rounded, group, steps.lanes(lane))
    _round(tile, stats, rule, wide)
    codes[start : start + count] = tile.codes[:, :count].T
    if _movable(rule.scheme, wide):
        affine.scales[start : start + count] = tile.scales[:, :count].T
        if affine.zeros is not None and tile.zeros is not None:
            affine.zeros[start : start + count] = tile.zeros[:, :count].T


def _round(tile: _Tile, stats: Stats, rule: _Rule, wide: int) -> None:
    """The first pass in the order of rounding, the others in the order of the columns."""
    turn = stats["turn"]
    tile.reorder(turn)
    fresh = _on_the_way(rule, wide)
    # Runs of codes are not cut.
    block = -(-rule.loop.block // _runs.WIDTH) * _runs.WIDTH if rule.scheme.grid.table else rule.loop.block
    for at in _segments(tile.group, block, fresh):
        target = tile.target(at, stats["feedback"][at, : at.start])
        if fresh:
            _fit_fresh(tile, at, _compensated(tile, at, target, stats), stats["importance"][turn[at]], rule)
        _sweep(tile, at, target, stats, rule, first=True)
    tile.reorder(turn.argsort())
    worth = wide >= _NARROWEST or _blocks.special(rule.scheme)
    refit = rule.loop.refit and worth and _movable(rule.scheme, wide) and rule.scheme.scale != "e8m0"
    for _ in range(rule.loop.passes):
        for at in _segments(tile.group, block, refit):
            target = tile.target(at, stats["pull"][at])
            if refit:
                _refit(tile, at, target, stats, rule)
            _sweep(tile, at, target, stats, rule, first=False)


def _segments(group: Int64[Tensor, "cols"], block: int, by_group: bool) -> Iterator[slice]:
    """Runs of columns between matrix products: blocks of equal scale, or a fixed number of columns."""
    sizes = [len(list(run)) for _, run in groupby(group.tolist())] if by_group else []
    if not by_group:
        sizes = [block] * (len(group) // block) + [len(group) % block] * (len(group) % block > 0)
    start = 0
    for size in sizes:
        yield slice(start, start + size)
        start += size


def _sweep(tile: _Tile, at: slice, target: Float[Tensor, "n lanes"], stats: Stats, rule: _Rule, first: bool) -> None:
    scale = tile.scales[tile.group[at]] * rule.unit
    coupling = stats["feedback" if first else "pull"][at, at].T.float().contiguous()
    given = (target, tile.weight[at], tile.error[at], coupling, scale)
    if rule.scheme.grid.table:
        runs = slice(at.start // _runs.WIDTH, -(-at.stop // _runs.WIDTH))
        forms = (stats[name if first else f"later_{name}"][runs] for name in ("solve", "metric"))
        rule.sweep(*given, *forms, first=first, out=tile.codes[at])
    else:
        zero = code_zeros(None if tile.zeros is None else tile.zeros[tile.group[at]], scale, rule.scheme)
        rule.sweep(*given, zero, out=tile.codes[at])
    if tile.rounded is not tile.error:
        tile.rounded[at] = tile.error[at]


def _compensated(tile: _Tile, at: slice, target: Float[Tensor, "n lanes"], stats: Stats) -> Float[Tensor, "n lanes"]:
    """What the columns of a block would best be, were none of them rounded: each moves those that follow it."""
    weight, within = tile.weight[at], stats["feedback"][at, at].float()
    moved: Tensor = torch.linalg.solve_triangular(within, target - weight, upper=False, unitriangular=True)
    return weight + moved


def _fit_fresh(
    tile: _Tile, at: slice, weight: Float[Tensor, "n lanes"], importance: Float[Tensor, "n"], rule: _Rule
) -> None:
    """The scale of one block from its compensated weights."""
    block, rows = int(tile.group[at.start]), weight.T.contiguous()
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    scheme = replace(rule.scheme, block=replace(rule.scheme.block, cols=0))
    found = choose(rows, (low, high), importance, scheme, rule.loop, rule.divisor)
    live = (tile.weight[at] != 0).any(0)
    tile.scales[block] = torch.where(live, found.scales[:, 0], tile.scales[block])
    if tile.zeros is not None and found.zeros is not None:
        tile.zeros[block] = torch.where(live, found.zeros[:, 0], tile.zeros[block])


def _refit(tile: _Tile, at: slice, target: Float[Tensor, "n lanes"], stats: Stats, rule: _Rule) -> None:
    """Least squares for the scale of one block, and for its zero point, with codes as they are (rounded to storage)."""
    block, scheme = int(tile.group[at.start]), rule.scheme
    codes = tile.codes[at]
    minus = scheme.zero == "min"
    if tile.zeros is None:
        value = rule.table[codes.long()]
    else:
        value = codes.float() if minus else codes.float() - tile.zeros[block]
    scale = tile.scales[block] * rule.unit
    slope, curve, pulled = _products(tile, at, target, value, stats)
    stored = _stored_scale(tile, block, scale, scale + _best_step(slope, curve), rule)
    moved = _move(tile, at, target, value, stored * rule.unit - scale, slope, curve, pulled)
    tile.scales[block] = torch.where(moved, stored, tile.scales[block])
    if tile.zeros is None:
        return
    value = (-torch.ones_like(scale) if minus else -tile.scales[block]).expand_as(value)
    slope, curve, pulled = _products(tile, at, target, value, stats)
    zero = _stored_zero(tile, block, tile.zeros[block] + _best_step(slope, curve), scheme)
    moved = _move(tile, at, target, value, zero - tile.zeros[block], slope, curve, pulled)
    tile.zeros[block] = torch.where(moved, zero, tile.zeros[block])


def _stored_scale(
    tile: _Tile, block: int, scale: Float[Tensor, "lanes"], wanted: Float[Tensor, "lanes"], rule: _Rule
) -> Float[Tensor, "lanes"]:
    """The scale that can be stored nearest to the wanted one, of the same sign and not 0."""
    if tile.steps.scale is not None:
        return _blocks.nearest_scale(wanted, tile.steps.scale[block], rule.scheme)
    sign = torch.where(scale < 0, -1.0, 1.0)
    return sign * round_scales((sign * wanted)[None] * rule.divisor, torch.ones_like(scale)[None], rule.scheme)[0]


def _stored_zero(tile: _Tile, block: int, wanted: Float[Tensor, "lanes"], scheme: Scheme) -> Float[Tensor, "lanes"]:
    if tile.steps.least is not None:
        return _blocks.nearest_least(wanted, tile.steps.least[block], scheme)
    return round_zeros(wanted[None], scheme)[0]


def _products(
    tile: _Tile, at: slice, target: Float[Tensor, "n lanes"], value: Float[Tensor, "n lanes"], stats: Stats
) -> tuple[Float[Tensor, "lanes"], Float[Tensor, "lanes"], Float[Tensor, "n lanes"]]:
    """v^T H D and v^T H v for the direction v within one block, and what v adds to the targets there."""
    curvature = stats["importance"][at, None]
    pulled = stats["pull"][at, at].float() @ value
    weighted = curvature * value
    slope = (weighted * (target - tile.weight[at] + tile.error[at])).sum(0)
    return slope, (weighted * (value + pulled)).sum(0), pulled


def _best_step(slope: Float[Tensor, "lanes"], curve: Float[Tensor, "lanes"]) -> Float[Tensor, "lanes"]:
    """How far along a direction the error is least, by what `_products` found."""
    return torch.where(curve > 0, slope / curve, 0.0)


def _move(
    tile: _Tile,
    at: slice,
    target: Float[Tensor, "n lanes"],
    value: Float[Tensor, "n lanes"],
    step: Float[Tensor, "lanes"],
    slope: Float[Tensor, "lanes"],
    curve: Float[Tensor, "lanes"],
    pulled: Float[Tensor, "n lanes"],
) -> Bool[Tensor, "lanes"]:
    """Go along `value` where that lessens the error, by what `_products` found; says where."""
    better = step * (2 * slope - step * curve) > 0
    step = torch.where(better, step, 0.0)
    tile.error[at] -= step * value
    target -= step * pulled
    return better


def objection(scheme: Scheme) -> str | None:
    """Why the loop cannot serve a scheme."""
    if scheme.block.flat:
        return (
            "it goes along the columns of a weight, and flat blocks, as bitsandbytes has them, have none; blocks of "
            "columns (g64 in compressed-tensors or gptq) do"
        )
    return None if _blocks.special(scheme) else unscaled(scheme)
