"""Carry: a quantized weight on another scheme with the same codes, the same values to the bit, or a reason why not.

What may change is how a value is spelled: the type of the scales where it has them exactly, a zero point where it says
nothing new, the blocks where each new one lies within an old one, the grid where it has every level that is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from math import copysign, isfinite

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from lowbit import native
from lowbit.errors import UnsupportedError, UsageError
from lowbit.formats._checks import equal, row_chunks
from lowbit.formats._linear import row_block
from lowbit.schemes import FAMILIES, FLOATS, Block, Grid, Scheme, Zero, parse
from lowbit.stages.quantize import Error
from lowbit.tensors import QTensor, Shape, block_size, level_table, scale_shape, view_shape

_ZEROS: dict[Zero, tuple[Zero, ...]] = {
    "none": ("none", "int", "float", "min"),
    "int": ("int", "none", "float", "min"),
    "float": ("float", "none", "int", "min"),
    "min": ("min", "none", "int", "float"),
    "quantized": ("quantized",),
}
_GROUPS = (1024, 512, 256, 128, 64, 32, 16)
_NOWHERE = 255
# For each block of a scheme, in order, the one that it lies in; how many lie in each, side by side; None: the same.
Inside = Int64[Tensor, "blocks"] | int | None
_FEW = 1024


def variants(scheme: Scheme) -> Iterator[Scheme]:
    """Schemes that may hold the values of a tensor in `scheme`, those that change least first; `carried` decides."""
    if scheme.smooth:
        yield from (replace(each, smooth=True) for each in variants(replace(scheme, smooth=False)))
        scheme = replace(scheme, smooth=False)
    plain = replace(scheme, nested=None, scale="f32")
    bases = [scheme, plain] if scheme.nested or scheme.scale == "e8m0" else [scheme]
    for grid in chain([scheme.grid], wider(scheme.grid)):  # the others are hardly ever needed
        for block in [scheme.block, *finer(scheme.block)]:
            for zero in _ZEROS[scheme.zero] if grid.kind == "int" else (scheme.zero,):
                found = [replace(base, grid=grid, block=block, zero=zero) for base in bases]
                yield from (each for each in found if each == scheme or spelled(each))


def spelled(scheme: Scheme) -> bool:
    """Whether a scheme has a name: what has none is no scheme of any format."""
    try:
        return parse(str(scheme)) == scheme
    except UsageError:
        return False


def wider(grid: Grid) -> Iterator[Grid]:
    """Other grids that have all levels of this one, fewest bits first."""
    kinds = ("int", "levels") if grid.kind == "levels" else (grid.kind,)
    others = {scheme.grid for scheme in FAMILIES.values() if scheme.grid.bits >= grid.bits} - {grid}
    for other in sorted(others, key=lambda each: (each.bits, each.kind, each.name)):
        if other.kind in kinds and {*map(_key, grid.levels)} <= {*map(_key, other.levels)}:
            yield other


def finer(block: Block) -> Iterator[Block]:
    """Blocks that lie within these, largest first."""
    if block == Block(0, 0):
        yield Block(1, 0)
    size = block.cols or max(_GROUPS) + 1
    yield from (Block(1, group) for group in _GROUPS if group < size and (not block.cols or size % group == 0))


def carried(q: QTensor, scheme: Scheme, rounding: bool = False) -> QTensor:
    """The same codes under another scheme; codes are shared with `q`, or changed in place where the grid has others.

    Args:
        q: as it was read.
        scheme: of the result.
        rounding: scales and zero points that the scheme does not have become the nearest that it has.

    Raises:
        UnsupportedError: the values do not fit, with the first that does not.
    """
    if q.scheme == scheme:
        return q
    if q.vectors or q.order is not None or q.points is not None:
        raise UnsupportedError(f"its codes are of {q.scheme}, and nothing else has them")
    if q.factors is not None and not scheme.smooth and bool((q.factors != 1).any()):
        raise UnsupportedError("its inputs are multiplied by factors of their own, and there is no place for these")
    index = _blocks_within(q, scheme)
    scales = _block_values(q.scales, q, scheme, index, "scale", rounding)
    zeros, minima = _zeros(q, scheme, index, rounding), _minima(q, scheme, index, rounding)
    codes = _codes(q, scheme).view(view_shape(q.shape, scheme.block))
    factors = q.factors if scheme.smooth else None
    return QTensor(scheme, q.shape, codes, scales, zeros, q.offset, q.group_index, minima, factors=factors)


def _blocks_within(q: QTensor, scheme: Scheme) -> Inside:
    """The block of `q` that each block of the scheme lies in."""
    old, new = q.scheme.block, scheme.block
    (high, wide), (down, across), cols = block_size(q.shape, old), block_size(q.shape, new), q.shape[-1]
    same_size = old.flat == new.flat and (high, wide) == (down, across)
    if same_size or row_block(old, cols) == row_block(new, cols):
        return None
    aligned = not (old.flat or new.flat) and high == down and cols % wide == wide % across == 0
    if aligned and q.group_index is None:
        return wide // across
    index = _index_of(q.shape, old, new)
    if index is None:
        raise UnsupportedError(f"its blocks ({old}) are not whole blocks of {new}")
    if q.group_index is not None:
        raise UnsupportedError(f"its columns are in groups of {old} in an order of their own (act-order)")
    plain = torch.equal(index, torch.arange(len(index))) and len(index) == _count(q.shape, old)
    return None if plain else index


def _index_of(shape: Shape, old: Block, new: Block) -> Int64[Tensor, "blocks"] | None:
    """For each new block, in order, the old one that it lies in; None where one lies in several."""
    if not old.flat and not new.flat:
        pairs = zip(view_shape(shape, new), block_size(shape, old), block_size(shape, new), strict=True)
        down, across = (_along(*pair) for pair in pairs)
        wide = scale_shape(shape, old)[1]
        return None if down is None or across is None else (down[:, None] * wide + across).reshape(-1)
    first, last = _corners(shape, new)
    index, end = _block_of(shape, old, *first), _block_of(shape, old, *last)
    whole = old.flat or block_size(shape, old)[1] >= shape[-1]
    inside = (index == end) & ((first[0] == last[0]) | torch.tensor(whole or not new.flat))
    return index if bool(inside.all()) else None


def _along(length: int, old: int, new: int) -> Int64[Tensor, "blocks"] | None:
    """The same for runs of one axis."""
    first = torch.arange(0, length, new)
    index = first // old
    return index if torch.equal(index, ((first + new).clamp(max=length) - 1) // old) else None


def _count(shape: Shape, block: Block) -> int:
    down, across = scale_shape(shape, block)
    return down * across


def _corners(shape: Shape, block: Block) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Row and column of the first and of the last element of each block, blocks in order."""
    rows, cols = view_shape(shape, Block(1, 0))
    (high, wide), (down, across) = block_size(shape, block), scale_shape(shape, block)
    if block.flat:
        first = torch.arange(across) * wide
        last = (first + wide).clamp(max=rows * cols) - 1
        return (first // cols, first % cols), (last // cols, last % cols)
    top, left = torch.arange(down) * high, torch.arange(across) * wide
    bottom, right = (top + high).clamp(max=rows) - 1, (left + wide).clamp(max=cols) - 1
    grids = [torch.meshgrid(*pair, indexing="ij") for pair in ((top, left), (bottom, right))]
    one, other = ((row.reshape(-1), col.reshape(-1)) for row, col in grids)
    return one, other


def _block_of(shape: Shape, block: Block, row: Tensor, col: Tensor) -> Tensor:
    """Number of the block that an element lies in."""
    high, wide = block_size(shape, block)
    if block.flat:
        return (row * shape[-1] + col) // wide
    return (row // high) * scale_shape(shape, block)[1] + col // wide


def _block_values(
    given: Tensor | QTensor, q: QTensor, scheme: Scheme, index: Inside, what: str, rounding: bool
) -> Tensor | QTensor:
    """The scales of `q`, or its minima, as the scheme has them."""
    blocks = scale_shape(q.shape, scheme.block)
    if isinstance(given, QTensor) and scheme.nested:
        if scheme.nested != given.scheme or index is not None:
            raise UnsupportedError("its scales are quantized themselves, in another way or other blocks")
        return replace(given, shape=blocks, codes=given.codes.view(view_shape(blocks, scheme.nested.block)))
    if scheme.nested:
        raise UnsupportedError(f"its scales are not quantized, those of {scheme} are")
    dtype = FLOATS.get(scheme.scale)
    if isinstance(given, QTensor):
        if dtype is not None and not rounding:  # before all are dequantized
            rows, cols = view_shape(given.shape, Block(1, 0))
            _stored(given.rows(0, min(rows, -(-_FEW // max(cols, 1)))), dtype, what, rounding)
        given = given.dequantize()
    return _spread(given if dtype is None else _stored(given, dtype, what, rounding), index, blocks)


def _spread(values: Tensor, index: Inside, blocks: Shape) -> Tensor:
    if isinstance(index, int):
        return values.unsqueeze(-1).expand(*values.shape, index).reshape(blocks)
    found = values.reshape(-1) if index is None else values.reshape(-1)[index]
    return found.reshape(blocks)


def _stored(values: Float[Tensor, "..."], dtype: torch.dtype, what: str, rounding: bool) -> Float[Tensor, "..."]:
    """Values as a type has them.

    Raises:
        UnsupportedError: it has not; where they may be rounded, only where one becomes infinite, or 0.
    """
    if not rounding and values.numel() > _FEW:  # what a type lacks is mostly found at once
        _stored(values.reshape(-1)[:_FEW], dtype, what, rounding)
    found = values.to(dtype).float()
    if not rounding and equal(found, values):
        return found
    wrong = (~found.isfinite() | ((found == 0) & (values != 0))) if rounding else found != values
    if bool(wrong.any()):
        first = int(wrong.reshape(-1).view(torch.uint8).argmax())
        value, name = values.reshape(-1)[first].item(), str(dtype).removeprefix("torch.")
        raise UnsupportedError(f"the {what} {value:.9g} is no {name}, in which it would be stored")
    return found


def _minima(q: QTensor, scheme: Scheme, index: Inside, rounding: bool) -> Tensor | QTensor | None:
    """What is subtracted; of a tensor with zero points their product with the scales."""
    if scheme.zero != "min":
        return None
    zeros = torch.full(q.scales.shape, _middle(q, scheme)) if q.zeros is None else q.zeros.float()
    given = zeros * q.scale_values() if q.minima is None else q.minima
    return _block_values(given, q, scheme, index, "minimum", rounding)


def _zeros(q: QTensor, scheme: Scheme, index: Inside, rounding: bool) -> Tensor | None:
    if scheme.zero == "min":
        return None
    blocks, half = scale_shape(q.shape, scheme.block), _half(q.scheme.grid)
    own = q.zeros if q.minima is None else _in_codes(q, rounding)
    if own is None and scheme.zero == "none":
        return None
    values = torch.full(blocks, _middle(q, scheme)) if own is None else _spread(own.float(), index, blocks)
    if scheme.zero == "float":
        return _stored(values, FLOATS.get(scheme.scale, torch.float32), "zero point", rounding)
    if scheme.zero == "none":
        if bool((values != half).any()):
            raise UnsupportedError(f"its zero points are not all {half:g}, as those of a symmetric scheme are")
        return None
    whole = values.round().clamp(0, 2**scheme.grid.bits - 1)
    if not rounding and not equal(whole, values):
        value = values[whole != values][0].item()
        raise UnsupportedError(f"the zero point {value:.9g} is no whole number from 0 to {2**scheme.grid.bits - 1}")
    return whole.to(torch.uint8)


def _in_codes(q: QTensor, rounding: bool) -> Float[Tensor, "blocks_down blocks_across"]:
    """Minima in units of a code."""
    scales, minima = q.scale_values(), q.zero_values()
    assert minima is not None
    found = torch.where(scales == 0, 0.0, minima / scales)
    if not rounding and not equal(found * scales, minima):
        raise UnsupportedError("it subtracts minima that are no multiples of its scales")
    return found


def _half(grid: Grid) -> float:
    return float(2 ** (grid.bits - 1)) if grid.kind == "int" else 0.0


def _middle(q: QTensor, scheme: Scheme) -> float:
    """The code that stands for 0, as codes are under the scheme, where `q` has no zero points."""
    return _half(q.scheme.grid if _same_codes(q.scheme, scheme) else scheme.grid)


def _same_codes(old: Scheme, new: Scheme) -> bool:
    """Whether codes stay: those of integers with a zero point count from 0 on every grid."""
    both_whole = old.grid.kind == new.grid.kind == "int" and new.grid.bits >= old.grid.bits
    return old.grid == new.grid or (new.zero != "none" and both_whole)


def _codes(q: QTensor, scheme: Scheme) -> UInt8[Tensor, "rows cols"]:
    """Codes of the same values."""
    old, new = q.scheme.grid, scheme.grid
    if _same_codes(q.scheme, scheme):
        return q.codes
    known = {_key(level): code for code, level in enumerate(new.levels) if abs(level) != float("inf")}
    table = torch.tensor([known.get(_key(level), _NOWHERE) for level in old.levels], dtype=torch.uint8)
    absent = [code for code, level in enumerate(old.levels) if abs(level) != float("inf") and _key(level) not in known]
    if absent:
        raise UnsupportedError(f"{new.name} has no level {old.levels[absent[0]]:g}, which {old.name} has")
    for rows in row_chunks(*q.codes.shape):
        q.codes[rows] = table[q.codes[rows].int()]
    return q.codes


def _key(level: float) -> tuple[float, float]:
    """A level with its sign, which 0 has too."""
    return level, copysign(1.0, level)


def gap(q: QTensor, start: int, stop: int, found: Float[Tensor, "rows cols"] | torch.dtype) -> Error:
    """How far floats, of any type, are from these rows of `q`; or the rows themselves in a float type."""
    if q.plain:
        part, table, minus = q.part(start, stop), level_table(q.scheme.grid), q.scheme.zero == "min"
        error = Error(*native.error(found, part.codes, part.scales, part.zeros, table, 1, part.wide, minus=minus))
        if isfinite(error.power):
            return error
    wanted = q.rows(start, stop)
    return error_of(wanted, (wanted.to(found) if isinstance(found, torch.dtype) else found).float())


def error_of(wanted: Float[Tensor, "rows cols"], found: Float[Tensor, "rows cols"]) -> Error:
    """How far floats are from others."""
    apart = found - wanted
    squared, power = (float(each.square().sum(dtype=torch.float64)) for each in (apart, wanted))
    return Error(squared, power, float(apart.abs().max()) if apart.numel() else 0.0)
