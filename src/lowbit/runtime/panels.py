"""From a `QTensor`, or a float weight, to the order in which the products of `csrc/product.h` read it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from math import lcm
from typing import Literal, final

import torch
from jaxtyping import Float, Int8, Int64, UInt8
from torch import Tensor
from torch.nn.functional import pad

from lowbit.errors import UnsupportedError
from lowbit.formats._ggml import BlockType
from lowbit.native import (
    CODE_BITS,
    PANEL_PARTS,
    WIDE_RUN,
    Matrix,
    Panels,
    Room,
    ggml_panels,
    interleave,
    interleave_floats,
    interleave_wide,
    runs_fit,
)
from lowbit.schemes import Grid, Scheme
from lowbit.tensors import QTensor, Shape, block_size, level_table, scale_shape, view_shape

LAYOUT = 6  # of panels; raise it with every change of what `pack` gives, so that no cache of another order is found
_LANES = 16
_NUMBERS = 120  # codes that are numbers in every grid: patterns of small floats of 8 bits above it may be none
_UNITS = (1.0, 2.0, 4.0, 8.0)
_MANTISSA = {"fp8-e4m3": 3, "fp8-e5m2": 2}  # bits of the fraction
_LEAST = 0.005  # of the levels' root mean square, what rounding inputs to int8 in blocks of 32 makes of these


@final
@dataclass(frozen=True)
class Packed:
    """A weight that is ready to be multiplied, its number of inputs, and the order in which it takes these, if any."""

    panels: Panels
    inputs: int
    order: Int64[Tensor, " cols"] | None = None

    def matrix(self, bias: Float[Tensor, " rows"] | None = None) -> Matrix:
        """What multiplies by it."""
        return Matrix(
            self.panels, self.inputs, self.order, None if bias is None else bias.detach().float().contiguous()
        )

    def part(self, first: int, count: int) -> Packed:
        """Some of its rows, of whole panels, in the memory where they are."""
        panels, part = self.panels, slice(first // _LANES, -(-(first + count) // _LANES))
        if count == panels.rows:
            return self
        parts = {name: value[part] for name in PANEL_PARTS if (value := getattr(panels, name)) is not None}
        return replace(self, panels=replace(panels, rows=count, **parts))


def pack_dense(weight: Float[Tensor, "rows cols"], threads: int = 1) -> Packed:
    """A weight of floats, in the dtype that it has."""
    rows, cols = weight.shape
    codes = interleave_floats(weight.contiguous(), -(-cols // 32) * 32, threads)
    return Packed(Panels("dense", rows, 8 * weight.element_size(), 16, codes), cols)


def pack_wide(weight: Float[Tensor, "rows cols"], threads: int = 1) -> Packed:
    """A weight of floats as integers of 16 bits; as it is, where one is not finite."""
    rows, cols = weight.shape
    found = interleave_wide(weight.contiguous(), -(-cols // 32) * 32, threads)
    if found is None:
        return pack_dense(weight, threads)
    words, scale = found
    return Packed(Panels("wide", rows, 16, WIDE_RUN, words, scale), cols)


def pack(q: QTensor, exact: bool = False, threads: int = 1) -> Packed:
    """A quantized weight `[rows, cols]`, its codes as they are; `exact`: for inputs that are not rounded.

    Raises:
        UnsupportedError: blocks cut through the rows in a way that no scale per row and run of columns tells.
    """
    if not q.plain:
        raise UnsupportedError(f"{q.scheme} has more than codes, scales and zero points")
    order, cols = _order(q), q.shape[-1]
    step = _step(q.scheme, q.shape)
    full = -(-cols // lcm(step, 32)) * lcm(step, 32)
    codes, grid = q.codes.reshape(-1, cols), q.scheme.grid
    meaning = _with_all_levels(_meaning(grid, q.scheme.zero != "none", exact), grid, codes)
    if not exact and _small(meaning, grid) and runs_fit(step, full):
        meaning = replace(meaning, way="small")
    least = 4 if meaning.way == "table" else 2  # small tables other than those of 16 entries are too rare for a loop
    bits = next(bits for bits in CODE_BITS if bits >= least and len(grid.levels) <= 2**bits)
    bare = _bare(q.scheme, meaning, codes.shape[0], bits, step, interleave(codes, order, bits, full, threads))
    nested = _nested(q, step) if meaning.way in ("codes", "table") else None
    return Packed(_with_nested(bare, nested, threads) if nested else _with_scales(bare, q, full, threads), cols, order)


def pack_blocks(
    kind: BlockType,
    stored: UInt8[Tensor, "rows row_bytes"],
    order: Int64[Tensor, " rows"] | None,
    threads: int = 1,
    room: Room | None = None,
) -> Packed | None:
    """What `pack` makes of the weight whose row r is `order[r]` of these rows of ggml's blocks, without its `QTensor`.

    None where that way is needed: for some types, and for scales that are not finite or whose integers are all small.
    """
    found = ggml_panels(kind.id, stored, order, threads, room)
    if found is None or not found.finite or (found.fine_zero is not None and not found.wide):
        return None
    rows, cols = stored.shape[0], stored.shape[1] // kind.bytes * kind.weights
    meaning = _meaning(kind.scheme.grid, kind.scheme.zero != "none", exact=False)
    bits = found.codes.shape[1] * 32 // cols if cols else 8
    bare = _bare(kind.scheme, meaning, rows, bits, kind.scheme.block.cols, found.codes)
    panels = replace(
        bare, scale=found.scale, zero=found.zero, over=0 if found.fine is None else kind.weights, fine=found.fine,
        fine_zero=found.fine_zero, joined=found.fine is not None and found.zero is not None and found.fine_zero is None,
    )  # fmt: skip
    return Packed(panels, cols)


def _bare(scheme: Scheme, meaning: _Meaning, rows: int, bits: int, step: int, codes: Tensor) -> Panels:
    """Panels without scales."""
    return Panels(
        rows=rows, bits=bits, step=step, codes=codes, minus=scheme.zero == "min", way=meaning.way,
        offset=meaning.offset, level=meaning.level, table=meaning.table, unit=meaning.unit,
    )  # fmt: skip


def _with_scales(bare: Panels, q: QTensor, full: int, threads: int) -> Panels:
    """Panels with the scales and zero points of each step as they are."""
    scale, values = _spread(q, q.scale_values(), bare.step, full), q.zero_values()
    zero = None if values is None else _spread(q, values, bare.step, full)
    narrow = _exact_half(scale) and (zero is None or _exact_half(zero))
    dtype = torch.float16 if narrow else torch.float32
    return replace(
        bare, scale=_lanes(scale.to(dtype), threads), zero=None if zero is None else _lanes(zero.to(dtype), threads)
    )


def _with_nested(bare: Panels, nested: _Nested, threads: int) -> Panels:
    """Panels with the integers of scales and minima, and the scales of these for each run of columns."""
    (fine, outer), (fine_zero, zero) = nested.scale, nested.low or (None, None)
    joined = fine_zero is not None and bool(((fine | fine_zero) & ~15 == 0).all())
    if joined:
        assert fine_zero is not None
        fine, fine_zero = fine | fine_zero << 4, None
    return replace(
        bare, over=nested.over, scale=_lanes(outer.half(), threads),
        zero=None if zero is None else _lanes(zero.half(), threads), fine=_pairs(fine, threads),
        fine_zero=None if fine_zero is None else _pairs(fine_zero, threads), joined=joined,
    )  # fmt: skip


_Integers = tuple[Int8[Tensor, "rows steps"], Float[Tensor, "rows runs"]]


@final
@dataclass(frozen=True)
class _Nested:
    """Scales, and minima where there are some, as integers times the scale of a run of `over` columns."""

    over: int
    scale: _Integers
    low: _Integers | None


def _nested(q: QTensor, step: int) -> _Nested | None:
    """Nested scales, where kernels take them nested."""
    if step not in (16, 32) or q.group_index is not None or not isinstance(q.scales, QTensor):
        return None
    over = step * q.scales.scheme.block.cols
    fits = 0 < over <= 512 and over % (2 * step) == 0 and q.shape[-1] % over == 0 and q.scheme.block.rows == 1
    if not fits or q.scheme.zero not in ("none", "min"):
        return None
    scale, low = _integers(q.scales), _integers(q.minima)
    return None if scale is None or (low is None) != (q.minima is None) else _Nested(over, scale, low)


def _integers(values: Tensor | QTensor | None) -> _Integers | None:
    """Quantized scales as small integers and their own scales, if they are that and these are exact in float16."""
    if not isinstance(values, QTensor) or isinstance(values.scales, QTensor) or not values.plain:
        return None
    block, levels = values.scheme.block, torch.tensor(values.scheme.grid.levels)
    small = bool(((levels == levels.round()) & (levels >= -128) & (levels <= 127)).all())
    if not small or block.flat or block.rows != 1 or values.scheme.zero != "none" or not _exact_half(values.scales):
        return None
    return levels.to(torch.int8)[values.codes.long()], values.scales


def _lanes(values: Float[Tensor, "rows steps"], threads: int) -> Float[Tensor, "panels steps 16"]:
    return interleave_floats(values.contiguous(), values.shape[1], threads)


def _pairs(values: Int8[Tensor, "rows steps"], threads: int) -> Int8[Tensor, "panels pairs 16 2"]:
    """Two steps are moved as one element of 16 bits."""
    lanes = _lanes(values.contiguous().view(torch.float16), threads)
    return lanes.view(torch.int8).view(*lanes.shape, 2)


@final
@dataclass(frozen=True)
class _Meaning:
    """How codes are computed with; see `Panels`."""

    way: Literal["floats", "codes", "table", "small"]
    offset: float = 0.0
    level: Tensor | None = None
    table: Tensor | None = None
    unit: float = 1.0


def _meaning(grid: Grid, shifted: bool, exact: bool) -> _Meaning:
    """Integers as they are, other grids of 16 levels or fewer as bytes where they nearly are that; else floats."""
    levels = torch.tensor(grid.levels)
    steps = levels.diff()
    if shifted:
        ramp = torch.arange(256, dtype=torch.float32)
        return _Meaning("floats", level=ramp) if exact else _Meaning("codes")
    if exact:
        return _Meaning("floats", level=level_table(grid))
    if bool((steps == 1).all()) and float(levels[0]).is_integer() and abs(float(levels[0])) <= 128:
        return _Meaning("codes", offset=-float(levels[0]))
    unit = _unit(levels) if len(levels) <= 16 else None
    if unit is None:
        return _Meaning("floats", level=level_table(grid))
    table = pad((levels * unit).round().to(torch.int8), (0, 16 - len(levels)))
    return _Meaning("table", table=table.view(torch.uint8), unit=1 / unit)


def _with_all_levels(meaning: _Meaning, grid: Grid, codes: UInt8[Tensor, "rows cols"]) -> _Meaning:
    """Patterns of small floats that are no numbers as the numbers that they would be, where no code is one.

    Kernels then need no table: what a pattern stands for follows from its bits.
    """
    mantissa = _MANTISSA.get(grid.name)
    if mantissa is None or meaning.level is None or not codes.numel():
        return meaning
    patterns, missing = torch.arange(256, dtype=torch.int32), ~meaning.level.isfinite()
    if int((codes & 127).max()) >= int(patterns[missing].min()):
        return meaning
    spelled = ((patterns & 127) << 23 - mantissa).view(torch.float32) * 2.0 ** (127 - 2 ** (6 - mantissa) + 1)
    numbers = torch.where(patterns < 128, spelled, -spelled)
    return replace(meaning, level=torch.where(missing, numbers, meaning.level))


def _small(meaning: _Meaning, grid: Grid) -> bool:
    """Whether codes are small floats of 8 bits, all of them numbers."""
    return grid.name in _MANTISSA and meaning.level is not None and bool(meaning.level.isfinite().all())


def _unit(levels: Float[Tensor, " levels"]) -> float | None:
    """What makes levels bytes: exactly, or with the least error if that is no more than inputs have (NF4, FP4)."""
    for unit in _UNITS:
        if bool(((levels * unit == (levels * unit).round()) & (levels.abs() * unit <= 127)).all()):
            return unit
    units = torch.arange(64, 127.5, 1 / 64, dtype=torch.float64)[:, None] / levels.abs().max()
    errors = ((levels * units).round() / units - levels).square().mean(1)
    least, at = errors.min(0)
    return float(units[at]) if least.sqrt() < _LEAST * levels.square().mean().sqrt() else None


def _order(q: QTensor) -> Tensor | None:
    """Columns so that those of a block stand together, where they do not."""
    if q.group_index is None:
        return None
    counts, width = q.group_index.bincount(), block_size(q.shape, q.scheme.block)[1]
    if bool((counts[:-1] != width).any()) or int(counts[-1]) > width:
        raise UnsupportedError(f"blocks of {q.scheme} have {int(counts.min())} to {int(counts.max())} columns")
    return q.group_index.long().argsort(stable=True)


def _step(scheme: Scheme, shape: Shape) -> int:
    """Columns of a row that share a scale.

    Raises:
        UnsupportedError: no multiple of 16, or blocks do not end with the rows.
    """
    wide, cols = block_size(shape, scheme.block)[1], shape[-1]
    if len(shape) != 2 or (scheme.block.flat and cols % wide):
        raise UnsupportedError(f"{scheme} on {list(shape)} has no scale for each part of a row")
    if wide >= cols:
        return -(-cols // 32) * 32
    if wide % _LANES:
        raise UnsupportedError(f"{scheme} has a scale for every {wide} columns, which is no multiple of {_LANES}")
    return wide


def packed_bytes(scheme: Scheme, shape: Shape) -> int:
    """Bytes of what `pack` makes of such a weight; scales of 16 bits or fewer are taken to be exact in float16.

    Raises:
        UnsupportedError: as `pack`.
    """
    _step(scheme, shape)
    return -(-shape[0] // _LANES) * _panel_bytes(scheme, shape[1])


@cache
def _panel_bytes(scheme: Scheme, cols: int) -> int:
    return pack_noise(scheme, (_LANES, cols)).panels.nbytes


def wide_bytes(shape: Shape) -> int:
    """Bytes of what `pack_wide` makes of such a weight."""
    full = -(-shape[1] // 32) * 32
    return -(-shape[0] // _LANES) * _LANES * (2 * full + 4 * -(-full // WIDE_RUN))


def pack_noise(scheme: Scheme, shape: Shape) -> Packed:
    """What `pack` makes of such a weight with codes at random: to see how large it is, and how fast it is multiplied.

    Raises:
        UnsupportedError: as `pack`.
    """
    if scheme.grid.runs or scheme.outliers or scheme.smooth or scheme.perm or scheme.zero == "quantized":
        raise UnsupportedError(f"{scheme} has more than codes, scales and zero points")
    most = min(len(scheme.grid.levels), _NUMBERS)
    q = _alike(scheme, shape)
    return pack(replace(q, codes=torch.randint(0, most, q.codes.shape, dtype=torch.uint8)))


def _alike(scheme: Scheme, shape: Shape) -> QTensor:
    """A weight of one code and one scale, which have all the bits that they can have.

    What float16 does not hold as a rule, alone or times a code, it does not hold here.
    """
    blocks, last = scale_shape(shape, scheme.block), min(len(scheme.grid.levels), _NUMBERS) - 1
    one = 2.0**-7 * (1 + {"f32": 2.0**-20, "f16": 2.0**-10}.get(scheme.scale, 0))

    def scales() -> Tensor | QTensor:
        return _alike(scheme.nested, blocks) if scheme.nested else torch.full(blocks, one)

    return QTensor(
        scheme, shape, torch.full(view_shape(shape, scheme.block), last, dtype=torch.uint8), scales(),
        zeros={"int": torch.zeros(blocks, dtype=torch.uint8), "float": torch.ones(blocks)}.get(scheme.zero),
        offset=torch.zeros(()) if scheme.offset else None, minima=scales() if scheme.zero == "min" else None,
    )  # fmt: skip


def _spread(q: QTensor, values: Tensor, step: int, full: int) -> Float[Tensor, "rows steps"]:
    """Scales or zero points for each row and each step; those that fill up are 0."""
    rows, high = q.shape[0], block_size(q.shape, q.scheme.block)[0]
    if q.scheme.block.flat:
        found = values.reshape(rows, -1)
    else:
        view_rows = view_shape(q.shape, q.scheme.block)[0]
        found = values if high == 1 else values.repeat_interleave(high, 0)[:view_rows]
    return pad(found.float(), (0, full // step - found.shape[1]))


def _exact_half(values: Tensor) -> bool:
    return torch.equal(values.half().float(), values)
