"""`QTensor`: a tensor on a grid, the one value in which methods, formats and kernels meet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import ceil, prod
from typing import final

import torch
from jaxtyping import Float, Int32, UInt8
from torch import Tensor

from lowbit import native
from lowbit.errors import FormatError
from lowbit.schemes import SCALE_BITS, Block, Grid, Scheme

Shape = tuple[int, ...]


def view_shape(shape: Shape, block: Block) -> tuple[int, int]:
    """Rows and columns under which a tensor is quantized: `[prod(shape[:-1]), shape[-1]]`; one row for flat blocks."""
    if block.flat or not shape:
        return 1, prod(shape)
    return prod(shape[:-1]), shape[-1]


def block_size(shape: Shape, block: Block) -> tuple[int, int]:
    """Rows and columns of one block on a tensor of this shape (0, the whole axis, filled in; at least 1)."""
    rows, cols = view_shape(shape, block)
    return max(block.rows or rows, 1), max(block.cols or cols, 1)


def scale_shape(shape: Shape, block: Block) -> tuple[int, int]:
    """Number of scale blocks down and across a tensor of this shape; tails count as blocks."""
    (rows, cols), (high, wide) = view_shape(shape, block), block_size(shape, block)
    return ceil(rows / high), ceil(cols / wide)


@cache
def level_table(grid: Grid) -> Float[Tensor, "256"]:
    """The 256-entry table that dequantizing kernels read; codes that the grid does not have are NaN."""
    table = torch.full((256,), float("nan"))
    levels = torch.tensor(grid.levels)
    table[: len(levels)] = torch.where(levels.isinf(), float("nan"), levels)
    return table


@final
@dataclass(frozen=True)
class QTensor:
    """A weight as codes on a grid.

    The weight of `shape` is seen as `[rows, cols]` (`view_shape`). With zero kind `none` an element is
    `levels[code] * scale`, with `int` or `float` it is `(code - zero) * scale`, with `min` it is
    `code * scale - minimum`, in float32.

    Attributes:
        scheme: grid, block and kinds; says how the other parts are read.
        shape: shape of the weight.
        codes: `[rows, cols]`, one unsigned code per element, whatever the bits.
        scales: `[block_rows, block_cols]`, float32, every value exact in `scheme.scale`; or, where `scheme.nested`
            is set, the quantized scales of that same shape.
        zeros: like the scales: uint8 codes (kind `int`) or float32 in units of a code (kind `float`).
        offset: one float32 that is added when this tensor is dequantized (double-quantized scales: their mean).
        group_index: block of each column, `[cols]`, where blocks are not consecutive (GPTQ's act-order).
        minima: what is subtracted (zero kind `min`), like the scales: float32 or quantized.
    """

    scheme: Scheme
    shape: Shape
    codes: UInt8[Tensor, "rows cols"]
    scales: Tensor | QTensor
    zeros: Tensor | None = None
    offset: Float[Tensor, ""] | None = None
    group_index: Int32[Tensor, "cols"] | None = None
    minima: Tensor | QTensor | None = None

    def __post_init__(self) -> None:
        blocks = scale_shape(self.shape, self.scheme.block)
        _expect("codes", self.codes.shape, view_shape(self.shape, self.scheme.block))
        _expect("scales", self.scales.shape, blocks)
        if self.zeros is not None:
            _expect("zeros", self.zeros.shape, blocks)
        if self.minima is not None:
            _expect("minima", self.minima.shape, blocks)
        wanted = (self.scheme.zero in ("int", "float"), self.scheme.zero == "min")
        if (self.zeros is not None, self.minima is not None) != wanted:
            raise FormatError(f"scheme {self.scheme} and its zero points do not agree")

    def scale_values(self) -> Float[Tensor, "block_rows block_cols"]:
        """The scales as float32, dequantized where they are quantized themselves."""
        return self.scales.dequantize() if isinstance(self.scales, QTensor) else self.scales

    @property
    def shifts(self) -> Tensor | QTensor | None:
        """The zero points or the minima, whichever it has."""
        return self.zeros if self.minima is None else self.minima

    def zero_values(self) -> Float[Tensor, "block_rows block_cols"] | None:
        """The zero points, or the minima, as float32, dequantized where they are quantized themselves."""
        shifts = self.shifts.dequantize() if isinstance(self.shifts, QTensor) else self.shifts
        return None if shifts is None else shifts.float()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that this tensor stands for, in `shape`; computed in float32, rounded once to `dtype`."""
        codes, scales, zeros = self.codes, self.scale_values(), self.zero_values()
        block = block_size(self.shape, self.scheme.block)
        if self.group_index is not None:
            index = self.group_index.long()
            scales, zeros, block = scales[:, index], None if zeros is None else zeros[:, index], (block[0], 1)
        table, minus = level_table(self.scheme.grid), self.scheme.zero == "min"
        zeros = None if zeros is None else zeros.contiguous()
        out = torch.empty(codes.shape, dtype=torch.float32 if self.offset is not None else dtype)
        native.dequantize(codes, scales.contiguous(), zeros, table, *block, minus=minus, out=out)
        if self.offset is not None:
            out = (out + self.offset).to(dtype)
        return out.reshape(self.shape)

    @property
    def nbytes(self) -> int:
        """Exact bytes of codes, scales and zero points, each packed to its own bits; containers may pad beyond it."""
        return scheme_bytes(self.scheme, self.shape) + (0 if self.group_index is None else 4 * self.codes.shape[1])

    @property
    def bits_per_weight(self) -> float:
        """`8 * nbytes` over the number of weights; 0 for an empty tensor."""
        return 8 * self.nbytes / prod(self.shape) if prod(self.shape) else 0.0

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """Every stored tensor with its name (nested ones dotted), in a fixed order: what digests are taken of."""
        yield "codes", self.codes
        if isinstance(self.scales, QTensor):
            yield from ((f"scales.{name}", part) for name, part in self.scales.parts())
        else:
            yield "scales", self.scales
        if isinstance(self.minima, QTensor):
            yield from ((f"minima.{name}", part) for name, part in self.minima.parts())
        minima = None if isinstance(self.minima, QTensor) else self.minima
        optional = {"zeros": self.zeros, "minima": minima, "offset": self.offset, "group_index": self.group_index}
        yield from ((name, part) for name, part in optional.items() if part is not None)


def _expect(what: str, found: Shape, wanted: Shape) -> None:
    if tuple(found) != wanted:
        raise FormatError(f"{what} have shape {list(found)} where the scheme and the weight need {list(wanted)}")


def scheme_bytes(scheme: Scheme, shape: Shape) -> int:
    """Exact bytes that a weight of this shape takes under a scheme (no act-order index), without making it."""
    blocks = scale_shape(shape, scheme.block)
    scales = scheme_bytes(scheme.nested, blocks) if scheme.nested else ceil(prod(blocks) * SCALE_BITS[scheme.scale] / 8)
    integers = ceil(prod(blocks) * scheme.grid.bits / 8)
    floats = ceil(prod(blocks) * SCALE_BITS[scheme.scale] / 8)
    zeros = {"none": 0, "int": integers, "float": floats, "min": scales}[scheme.zero]
    offset = 4 if scheme.offset else 0
    return ceil(prod(shape) * scheme.grid.stored_bits / 8) + scales + zeros + offset
