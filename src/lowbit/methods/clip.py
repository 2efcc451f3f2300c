"""Search each block's range for the least error of the layer's output. See `docs/methods/clip.md`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from lowbit.methods import Method, Stats
from lowbit.methods._scales import (
    Affine,
    Blocks,
    Range,
    candidates,
    finish,
    finite_range,
    fit,
    global_divisor,
    improve,
    refine,
    residual,
    shares_rows,
    unscaled,
)
from lowbit.schemes import Scheme
from lowbit.tensors import QTensor

_MARGIN = 2.0**-16  # a candidate wins only by more than float32 sums can err
_TILE = 256  # columns whose inputs' correlations count; the work per weight grows with them
_REGION = 1 << 18  # weights whose errors, and products of these, are in the cache
_GROWTH = 1.5

Tiles = Float[Tensor, "tiles size size"]


@final
@dataclass(frozen=True)
class Options:
    """What is searched.

    Attributes:
        steps: ranges between the whole one and the most shrunk.
        max_shrink: share of the range that the last one takes away, in (0, 1).
        signed: whether scales of symmetric integers may be negative, as in `autoround`.
    """

    steps: int = 20
    max_shrink: float = 0.5
    signed: bool = True

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.max_shrink < 1:
            raise ValueError("steps must be 1 or more, max_shrink between 0 and 1")


def quantize(weight: Float[Tensor, "rows cols"], stats: Stats, scheme: Scheme, options: Options) -> QTensor:
    """Start from round-to-nearest, keep for every block the range with the least error of its part of the output.

    Raises:
        WeightError: NaN or Inf, with its place.
    """
    ranges = finite_range(weight, stats, scheme)
    best = fit(ranges, scheme, global_divisor(ranges, stats, scheme))

    def search(
        part: Float[Tensor, "high wide"], ranges: Range, start: Affine, block: tuple[int, int], cols: slice
    ) -> Affine:
        tiles = _tiles(stats["second_moment"][cols, cols], block[1])
        return _search(part, ranges, start, scheme, block, tiles, options)

    return finish(weight, refine(weight, ranges, best, scheme, search, _REGION), scheme)


def _search(
    weight: Float[Tensor, "rows cols"],
    ranges: Range,
    start: Affine,
    scheme: Scheme,
    block: tuple[int, int],
    tiles: Tiles,
    options: Options,
) -> Affine:
    """The best of `start` and the fits to scaled ranges."""

    def error_of(affine: Affine) -> Blocks:
        return _output_error(residual(weight, affine, scheme, block), tiles, block)

    trials = candidates(ranges, scheme, start.divisor, _ratios(scheme, options), options.signed)
    return improve(start, error_of(start), trials, error_of, _MARGIN)[0]


def _ratios(scheme: Scheme, options: Options) -> Iterator[float]:
    """Factors on the range: on grids of uneven steps also upwards, with E8M0 scales the neighbouring powers of two."""
    if scheme.scale == "e8m0":
        yield from (2.0, 0.5)
        return
    step = options.max_shrink / options.steps
    larger = 0 if scheme.grid.kind == "int" else int((_GROWTH - 1) / step)
    yield from (1 - step * i for i in range(-larger, options.steps + 1) if i)


def _tiles(moment: Float[Tensor, "cols cols"], wide: int) -> Tiles:
    """The squares on the diagonal of the second moment that belong to the blocks, blocks cut into equal tiles."""
    size, count = _tile_size(wide)
    squares = moment.float().unfold(0, wide, wide).unfold(1, wide, wide).diagonal().permute(2, 0, 1)
    squares = pad(squares, (0, size * count - wide, 0, size * count - wide))
    tiles = squares.unfold(1, size, size).unfold(2, size, size).diagonal(dim1=1, dim2=2)
    return tiles.permute(0, 3, 1, 2).reshape(-1, size, size).contiguous()


def _tile_size(wide: int) -> tuple[int, int]:
    """Columns of a tile, and tiles of a block of this width; the last tile may reach beyond the block."""
    count = ceil(wide / _TILE)
    return ceil(wide / count), count


def _output_error(error: Float[Tensor, "rows cols"], tiles: Tiles, block: tuple[int, int]) -> Blocks:
    """`e H e` of every block of the weights' error e, H the mean of x x^T over its inputs, within tiles."""
    (high, wide), (rows, cols) = block, error.shape
    size, count = _tile_size(wide)
    parts = error.view(rows, cols // wide, wide)
    parts = pad(parts, (0, size * count - wide)).reshape(rows, len(tiles), size).transpose(0, 1)
    sums = torch.bmm(parts, tiles).mul_(parts).sum(2)
    return sums.view(cols // wide, count, rows // high, high).sum((1, 3)).T.contiguous()


def _objection(scheme: Scheme) -> str | None:
    if shares_rows(scheme):
        return "it searches the scales of some rows at a time, and here all rows share one; a scale per row is searched"
    if scheme.block.flat:
        return "it needs to know which inputs a block reads, and flat blocks run on over rows; use g64 or another gN"
    return unscaled(scheme)


METHOD = Method(
    about="search each block's range for the least error of the layer's output",
    quantize=quantize,
    options=Options,
    needs=frozenset({"second_moment"}),
    workspace=24.0,
    supports=_objection,
)
