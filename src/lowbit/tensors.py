"""`QTensor`: a tensor on a grid, the one value in which methods, formats and kernels meet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from math import ceil, prod
from typing import final

import torch
from jaxtyping import Float, Int32, UInt8
from torch import Tensor

from lowbit import native
from lowbit.errors import FormatError
from lowbit.schemes import SCALE_BITS, Block, Grid, Run, Scheme

Shape = tuple[int, ...]
_PIECE = 1 << 18  # elements whose temporaries stay small


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
class Vectors:
    """One run of columns in vectors: vector `[i, j]` is the sum over books of `books[b][group of j, codes[b, i, j]]`.

    Attributes:
        codes: `[books, down, across]`, the index of each vector into each codebook.
        books: for each, `[groups, 2**bits, rows, cols]` float32, every value exact in `scheme.scale`.
    """

    codes: Int32[Tensor, "books down across"]
    books: tuple[Float[Tensor, "groups _ rows cols"], ...]

    def rows(self, start: int, stop: int) -> Float[Tensor, "rows cols"]:
        """Rows of the columns, before scales; the sum is in the order of the books, in float32."""
        high = self.books[0].shape[2]
        first, last = start // high, ceil(stop / high)
        groups, across = self.books[0].shape[0], self.codes.shape[2]
        group = torch.arange(across) // max(across // groups, 1)
        total = torch.zeros(())
        for book, codes in zip(self.books, self.codes[:, first:last], strict=True):
            found = book.flatten(0, 1)[codes + group * book.shape[1]]
            total = found if total.ndim == 0 else total + found
        values = total.permute(0, 2, 1, 3).reshape((last - first) * high, -1)
        return values[start - first * high : stop - first * high]


@final
@dataclass(frozen=True)
class Outliers:
    """Numbers, each added to the weight at its row and its stored column; rows in order, float32 exact in float16."""

    rows: Int32[Tensor, "count"]
    cols: Int32[Tensor, "count"]
    values: Float[Tensor, "count"]


@final
@dataclass(frozen=True)
class Part:
    """Some rows of a tensor as kernels take them: codes, and a scale and zero point for each `wide` columns."""

    codes: UInt8[Tensor, "held cols"]  # of vectors none
    scales: Float[Tensor, "rows blocks"]
    zeros: Float[Tensor, "rows blocks"] | None
    wide: int


@final
@dataclass(frozen=True, repr=False)
class QTensor:
    """A weight as codes on a grid.

    The weight of `shape` is seen as `[rows, cols]` (`view_shape`). With zero kind `none` an element is
    `levels[code] * scale`, with `int` or `float` it is `(code - zero) * scale`, with `min` it is
    `code * scale - minimum`, in float32. On a grid of vectors the value of an element in its vector stands for the
    level, and for the code.

    What some layouts have beside that is the least that holds them exactly: codebooks belong to a tensor and are a
    part of it (`vectors`), since a grid is what tensors share; an order of the columns (`order`) is not undone in
    codes, since blocks and vectors are of columns as they are stored. Factors of inputs are scales under blocks of one
    column, or `factors` where there are other scales too.

    Attributes:
        scheme: grid, block and kinds; says how the other parts are read.
        shape: shape of the weight.
        codes: `[rows, cols]`, one unsigned code per element, whatever the bits; of vectors none, `[0, 0]`.
        scales: `[block_rows, block_cols]`, float32, every value exact in `scheme.scale`; or, where `scheme.nested`
            is set, the quantized scales of that same shape.
        zeros: like the scales: uint8 codes (kind `int`) or float32 in units of a code (kind `float`).
        offset: one float32 that is added when this tensor is dequantized (double-quantized scales: their mean).
        group_index: block of each column, `[cols]`, where blocks are not consecutive (GPTQ's act-order).
        minima: what is subtracted (zero kind `min`), like the scales: float32 or quantized.
        vectors: of each run of the grid (`vectors`), from the first column to the last; else none.
        order: column of the weight that each stored column is, `[cols]`, where `scheme.perm` is set.
        points: zero points of the kind `quantized`, of the shape of the scales.
        outliers: what is added to some weights, `scheme.outliers` of them.
        factors: what each column of the weight is multiplied by at last, `[cols]`, where `scheme.smooth` is set.
    """

    scheme: Scheme
    shape: Shape
    codes: UInt8[Tensor, "rows cols"]
    scales: Tensor | QTensor
    zeros: Tensor | None = None
    offset: Float[Tensor, ""] | None = None
    group_index: Int32[Tensor, "cols"] | None = None
    minima: Tensor | QTensor | None = None
    vectors: tuple[Vectors, ...] = ()
    order: Int32[Tensor, "inputs"] | None = None
    points: QTensor | None = None
    outliers: Outliers | None = None
    factors: Float[Tensor, "inputs"] | None = None

    def __post_init__(self) -> None:
        blocks = scale_shape(self.shape, self.scheme.block)
        runs = self.scheme.grid.runs
        _expect("codes", self.codes.shape, (0, 0) if runs else view_shape(self.shape, self.scheme.block))
        _expect("vectors", (len(self.vectors),), (len(runs),))
        for run, size, vectors in zip(runs, run_shapes(self.scheme.grid, self.shape), self.vectors, strict=True):
            _expect("indices", vectors.codes.shape, size)
            for bits, book in zip(run.bits, vectors.books, strict=True):
                _expect("codebooks", book.shape, (run_groups(run, size), 2**bits, run.rows, run.cols))
        if (self.order is not None) != self.scheme.perm:
            raise FormatError(f"scheme {self.scheme} and its order of columns do not agree")
        factors = () if self.factors is None else tuple(self.factors.shape)
        _expect("factors", factors, view_shape(self.shape, Block(1, 0))[1:] if self.scheme.smooth else ())
        _expect("outliers", (len(self.outliers.values) if self.outliers else 0,), (self.scheme.outliers,))
        _expect("scales", self.scales.shape, blocks)
        if self.zeros is not None:
            _expect("zeros", self.zeros.shape, blocks)
        if self.minima is not None:
            _expect("minima", self.minima.shape, blocks)
        if self.points is not None:
            _expect("points", self.points.shape, blocks)
        kinds = {"int": self.zeros, "float": self.zeros, "min": self.minima, "quantized": self.points}
        held = [part for part in (self.zeros, self.minima, self.points) if part is not None]
        wanted = kinds.get(self.scheme.zero)
        if len(held) != (self.scheme.zero != "none") or (held and wanted is not held[0]):
            raise FormatError(f"scheme {self.scheme} and its zero points do not agree")

    def __repr__(self) -> str:
        """Scheme, shape and size, for a notebook."""
        return f"QTensor({self.scheme}, {list(self.shape)}, {self.bits_per_weight:.4g} bits per weight)"

    def scale_values(self) -> Float[Tensor, "block_rows block_cols"]:
        """The scales as float32, dequantized where they are quantized themselves."""
        return self.scales.dequantize() if isinstance(self.scales, QTensor) else self.scales

    @property
    def shifts(self) -> Tensor | QTensor | None:
        """The zero points or the minima, whichever it has."""
        found = self.zeros if self.minima is None else self.minima
        return found if self.points is None else self.points

    def zero_values(self) -> Float[Tensor, "block_rows block_cols"] | None:
        """The zero points, or the minima, as float32, dequantized where they are quantized themselves."""
        shifts = self.shifts.dequantize() if isinstance(self.shifts, QTensor) else self.shifts
        return None if shifts is None else shifts.float()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that this tensor stands for, in `shape`; computed in float32, rounded once to `dtype`."""
        if self.vectors or self.order is not None or self.outliers is not None or self.factors is not None:
            rows, cols = view_shape(self.shape, Block(1, 0))
            found, step = torch.empty(rows, cols, dtype=dtype), max(_PIECE // max(cols, 1), 1)
            for start in range(0, rows, step):
                found[start : start + step] = self.rows(start, min(start + step, rows))
            return found.reshape(self.shape)
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
    def plain(self) -> bool:
        """Whether it is codes, scales and zero points alone, which is what kernels take."""
        beside = (self.order, self.offset, self.factors)
        return not (self.vectors or self.outliers or self.points) and all(part is None for part in beside)

    def part(self, start: int, stop: int) -> Part:
        """Some rows of the codes (none, of vectors), with their scales and zero points."""
        cols = view_shape(self.shape, Block(1, 0))[1]
        codes = self.codes if self.vectors else self.codes.view(-1, cols)[start:stop]
        high, wide = block_size(self.shape, self.scheme.block)
        flat = self.scheme.block.flat
        each = cols // wide if flat and cols % wide == 0 else 0
        if (each or not flat) and high == 1 and self.group_index is None:
            zeros = None if self.shifts is None else _rows_of(_in_rows(self.shifts, each), start, stop)
            return Part(codes, _rows_of(_in_rows(self.scales, each), start, stop), zeros, wide)
        down, across = (torch.arange(start, stop) // high)[:, None], torch.arange(self.scales.shape[1])
        if flat:
            across, down, wide = torch.arange(start * cols, stop * cols).view(-1, cols) // wide, torch.tensor(0), 1
        elif self.group_index is not None:
            across, wide = self.group_index.long(), 1
        shifts = self.zero_values()
        return Part(codes, self.scale_values()[down, across], None if shifts is None else shifts[down, across], wide)

    def rows(self, start: int, stop: int, out: Tensor | None = None) -> Float[Tensor, "rows cols"]:
        """Rows of what `dequantize()` gives, without the rest; in the type of `out`, where it is given."""
        part = self.part(start, stop)
        if self.plain:
            return self._decoded(part, out)
        if self.vectors:
            cols = view_shape(self.shape, Block(1, 0))[1]
            found = torch.cat([run.rows(start, stop) for run in self.vectors], 1)
            found *= _spread(part.scales, part.wide, cols)
            found -= 0.0 if part.zeros is None else _spread(part.zeros, part.wide, cols)
        else:
            found = self._decoded(part, None)
        found = found if self.offset is None else found + self.offset
        if self.outliers is not None:
            at = (self.outliers.rows >= start) & (self.outliers.rows < stop)
            place = (self.outliers.rows[at] - start, self.outliers.cols[at])
            found.index_put_(place, self.outliers.values[at], accumulate=True)
        if self.order is not None:
            found = torch.empty_like(found).index_copy_(1, self.order.long(), found)
        found = found if self.factors is None else found.mul_(self.factors)
        return found if out is None else out.copy_(found)

    def _decoded(self, part: Part, out: Tensor | None) -> Float[Tensor, "rows cols"]:
        out = torch.empty(part.codes.shape) if out is None else out
        table, minus = level_table(self.scheme.grid), self.scheme.zero == "min"
        native.dequantize(part.codes, part.scales, part.zeros, table, 1, part.wide, minus=minus, out=out)
        return out

    def some(self, start: int, stop: int, codes: UInt8[Tensor, "rows cols"]) -> QTensor:
        """Rows of a matrix whose blocks lie within a row, with codes that are given."""
        zeros = None if self.zeros is None else self.zeros[start:stop]
        minima = None if self.minima is None else _cut(self.minima, start, stop)
        scales, shape = _cut(self.scales, start, stop), (stop - start, self.shape[1])
        return replace(self, shape=shape, codes=codes, scales=scales, zeros=zeros, minima=minima)

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
        optional |= {"order": self.order, "factors": self.factors}
        for i, vectors in enumerate(self.vectors):
            optional[f"vectors.{i}.codes"] = vectors.codes
            optional |= {f"vectors.{i}.books.{b}": book for b, book in enumerate(vectors.books)}
        if self.points is not None:
            optional |= {f"points.{name}": part for name, part in self.points.parts()}
        if self.outliers is not None:
            optional |= {f"outliers.{name}": part for name, part in vars(self.outliers).items()}
        yield from ((name, part) for name, part in optional.items() if part is not None)


def _expect(what: str, found: Shape, wanted: Shape) -> None:
    if tuple(found) != wanted:
        raise FormatError(f"{what} have shape {list(found)} where the scheme and the weight need {list(wanted)}")


def _cut(values: Tensor | QTensor, start: int, stop: int) -> Tensor | QTensor:
    """Rows of scales or zero points as they are."""
    return values.some(start, stop, values.codes[start:stop]) if isinstance(values, QTensor) else values[start:stop]


def _in_rows(values: Tensor | QTensor, each: int) -> Tensor | QTensor:
    """Scales or zero points of flat blocks, `each` of them to a row; as they are where that is 0."""
    if not each:
        return values
    if not isinstance(values, QTensor):
        return values.view(-1, each)
    if values.scheme.block.flat:
        return replace(values, shape=(prod(values.shape) // each, each))
    return values.dequantize().view(-1, each)


def _rows_of(values: Tensor | QTensor, start: int, stop: int) -> Float[Tensor, "rows blocks"]:
    """Rows of scales or zero points in float32."""
    return values.rows(start, stop) if isinstance(values, QTensor) else values[start:stop].float().contiguous()


def _spread(values: Float[Tensor, "rows across"], wide: int, cols: int) -> Float[Tensor, "rows cols"]:
    """A value of each block for each of its columns."""
    return values if wide == 1 else values.repeat_interleave(wide, 1)[:, :cols]


def run_shapes(grid: Grid, shape: Shape) -> list[tuple[int, int, int]]:
    """Books, vectors down and vectors across of each run on a weight of this shape.

    Raises:
        FormatError: vectors, or groups of columns, that do not divide a run.
    """
    (rows, left), found = view_shape(shape, Block(1, 0)), []
    for run in grid.runs:
        width = run.width or left
        if width > left or width % run.cols or width % (run.group or width or 1) or (run.group or width) % run.cols:
            raise FormatError(f"vectors {run} do not divide {left} columns of a weight of {list(shape)}")
        found.append((len(run.bits), ceil(rows / run.rows), width // run.cols))
        left -= width
    return found


def run_groups(run: Run, shape: tuple[int, int, int]) -> int:
    """Groups of columns with codebooks of their own, in a run of that many books, vectors down and across."""
    return shape[2] * run.cols // run.group if run.group else 1


def _vector_bytes(scheme: Scheme, shape: Shape) -> int:
    """Bytes of indices and codebooks."""
    total = 0
    for run, (books, down, across) in zip(scheme.grid.runs, run_shapes(scheme.grid, shape), strict=True):
        entries = run_groups(run, (books, down, across)) * sum(2**bits for bits in run.bits)
        total += ceil(down * across * sum(run.bits) / 8)
        total += ceil(entries * run.rows * run.cols * SCALE_BITS[scheme.scale] / 8)
    return total


def scheme_bytes(scheme: Scheme, shape: Shape) -> int:
    """Exact bytes that a weight of this shape takes under a scheme (no act-order index), without making it."""
    blocks = scale_shape(shape, scheme.block)
    scales = scheme_bytes(scheme.nested, blocks) if scheme.nested else ceil(prod(blocks) * SCALE_BITS[scheme.scale] / 8)
    integers = ceil(prod(blocks) * scheme.grid.bits / 8)
    floats = ceil(prod(blocks) * SCALE_BITS[scheme.scale] / 8)
    zeros = {"none": 0, "int": integers, "float": floats, "min": scales, "quantized": scales}[scheme.zero]
    offset = 4 if scheme.offset else 0
    # formats have 16 bits for the number of a column, and for its factor
    order = 2 * view_shape(shape, Block(1, 0))[1] * (scheme.perm + scheme.smooth)
    # of outliers 16 bits for the column and 16 for the value, and where each row starts
    outliers = 4 * (scheme.outliers + view_shape(shape, Block(1, 0))[0] + 1) if scheme.outliers else 0
    vectors = scheme.grid.kind == "vectors"
    scales = 0 if vectors and scheme.block == Block(0, 0) else scales  # it is 1: codebooks have it in them
    codes = _vector_bytes(scheme, shape) if vectors else ceil(prod(shape) * scheme.grid.stored_bits / 8)
    return codes + scales + zeros + offset + order + outliers
