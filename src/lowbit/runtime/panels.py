"""From a `QTensor`, or a float weight, to the order in which the products of `csrc/product.h` read it."""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm
from typing import Literal, final

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import pad

from lowbit.errors import UnsupportedError
from lowbit.native import Matrix, Panels, interleave, interleave_floats
from lowbit.schemes import Grid, Scheme
from lowbit.tensors import QTensor, Shape, block_size, level_table, view_shape

LAYOUT = 1  # of panels; raise it with every change of what `pack` gives, so that no cache of another order is found
_LANES = 16
_UNITS = (1.0, 2.0, 4.0, 8.0)


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


def pack_dense(weight: Float[Tensor, "rows cols"], threads: int = 1) -> Packed:
    """A weight of floats, in the dtype that it has."""
    rows, cols = weight.shape
    codes = interleave_floats(weight.contiguous(), -(-cols // 32) * 32, threads)
    return Packed(Panels("dense", rows, 8 * weight.element_size(), 16, codes), cols)


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
    scale, zero = _spread(q, q.scale_values(), step, full), None
    values = q.zero_values()
    if values is not None:
        zero = _spread(q, values, step, full)
    codes = q.codes.reshape(-1, cols)
    grid, minus = q.scheme.grid, q.scheme.zero == "min"
    bits = _bits(grid)
    meaning = _meaning(grid, zero is not None, exact)
    narrow = _exact_half(scale) and (zero is None or _exact_half(zero))
    dtype = torch.float16 if narrow else torch.float32
    return Packed(
        Panels(
            rows=codes.shape[0], bits=bits, step=step, codes=interleave(codes, order, bits, full, threads),
            scale=interleave_floats(scale.to(dtype), full // step, threads),
            zero=None if zero is None else interleave_floats(zero.to(dtype), full // step, threads), minus=minus,
            way=meaning.way, offset=meaning.offset, level=meaning.level, table=meaning.table, unit=meaning.unit,
        ),
        cols,
        order,
    )  # fmt: skip


@final
@dataclass(frozen=True)
class _Meaning:
    """How codes are computed with; see `Panels`."""

    way: Literal["floats", "codes", "table"]
    offset: float = 0.0
    level: Tensor | None = None
    table: Tensor | None = None
    unit: float = 1.0


def _meaning(grid: Grid, shifted: bool, exact: bool) -> _Meaning:
    """Integers as they are, other grids of 16 levels or fewer as small integers where they are that; else floats."""
    levels = torch.tensor(grid.levels)
    steps = levels.diff()
    if shifted:
        ramp = torch.arange(256, dtype=torch.float32)
        return _Meaning("floats", level=ramp) if exact else _Meaning("codes")
    if exact:
        return _Meaning("floats", level=level_table(grid))
    if bool((steps == 1).all()) and float(levels[0]).is_integer():
        return _Meaning("codes", offset=-float(levels[0]))
    units = [unit for unit in _UNITS if len(levels) <= 16 and _small(levels * unit)]
    if not units:
        return _Meaning("floats", level=level_table(grid))
    table = pad((levels * units[0]).to(torch.int8), (0, 16 - len(levels)))
    return _Meaning("table", table=table.view(torch.uint8), unit=1 / units[0])


def _small(values: Tensor) -> bool:
    return bool(((values == values.round()) & (values.abs() <= 127)).all())


def _order(q: QTensor) -> Tensor | None:
    """Columns so that those of a block stand together, where they do not."""
    if q.group_index is None:
        return None
    counts, width = q.group_index.bincount(), block_size(q.shape, q.scheme.block)[1]
    if bool((counts[:-1] != width).any()) or int(counts[-1]) > width:
        raise UnsupportedError(f"blocks of {q.scheme} have {int(counts.min())} to {int(counts.max())} columns")
    return q.group_index.long().argsort(stable=True)


def _bits(grid: Grid) -> int:
    """In which a code is held."""
    return next(bits for bits in (2, 4, 8) if len(grid.levels) <= 2**bits)


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
    sizes = _sizes(scheme, shape)
    return _LANES * sizes.panels * (sizes.full * _bits(scheme.grid) // 8 + sizes.numbers * sizes.dtype.itemsize)


def dense_bytes(shape: Shape, itemsize: int) -> int:
    """Bytes of what `pack_dense` makes of such a weight."""
    return -(-shape[0] // _LANES) * _LANES * -(-shape[1] // 32) * 32 * itemsize


def pack_noise(scheme: Scheme, shape: Shape) -> Packed:
    """What `pack` would make of such a weight, with codes at random: to see how fast it is multiplied.

    Raises:
        UnsupportedError: as `pack`.
    """
    sizes, bits, shifted = _sizes(scheme, shape), _bits(scheme.grid), scheme.zero != "none"
    # Below 120, since small floats of 8 bits have patterns above that are no numbers.
    codes = torch.randint(0, 120, (sizes.panels, sizes.full * bits // 32, 64), dtype=torch.uint8)
    scale = torch.full((sizes.panels, sizes.full // sizes.step, _LANES), 2.0**-7, dtype=sizes.dtype)
    meaning = _meaning(scheme.grid, shifted, False)
    panels = Panels(
        rows=shape[0], bits=bits, step=sizes.step, codes=codes, scale=scale, zero=scale.clone() if shifted else None,
        minus=scheme.zero == "min", way=meaning.way, offset=meaning.offset, level=meaning.level, table=meaning.table,
        unit=meaning.unit,
    )  # fmt: skip
    return Packed(panels, shape[1])


@final
@dataclass(frozen=True)
class _Sizes:
    """Panels of a weight, columns with those that fill up and that share a scale, numbers beside codes in a row."""

    panels: int
    full: int
    step: int
    numbers: int
    dtype: torch.dtype


def _sizes(scheme: Scheme, shape: Shape) -> _Sizes:
    if (
        scheme.grid.runs
        or scheme.outliers
        or scheme.smooth
        or scheme.offset
        or scheme.perm
        or scheme.zero == "quantized"
    ):
        raise UnsupportedError(f"{scheme} has more than codes, scales and zero points")
    step = _step(scheme, shape)
    full = -(-shape[1] // lcm(step, 32)) * lcm(step, 32)
    numbers = full // step * (1 if scheme.zero == "none" else 2)
    dtype = torch.float32 if scheme.nested or scheme.scale == "f32" else torch.float16
    return _Sizes(-(-shape[0] // _LANES), full, step, numbers, dtype)


def _spread(q: QTensor, values: Tensor, step: int, full: int) -> Float[Tensor, "rows steps"]:
    """Scales or zero points for each row and each step; those that fill up are 0."""
    rows, high = q.shape[0], block_size(q.shape, q.scheme.block)[0]
    if q.scheme.block.flat:
        found = values.reshape(rows, -1)
    else:
        view_rows = view_shape(q.shape, q.scheme.block)[0]
        found = values if high == 1 else values.repeat_interleave(high, 0)[:view_rows]
    return pad(found.float(), (0, full // step - found.shape[1])).contiguous()


def _exact_half(values: Tensor) -> bool:
    return torch.equal(values.half().float(), values)
