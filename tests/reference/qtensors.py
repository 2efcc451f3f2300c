"""Random `QTensor`s of any scheme, made without any method, and the slow definition of what they stand for."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import gguf
import gguf.quants
import numpy as np
import torch
from torch import Tensor

from lowbit.schemes import Block, Scheme
from lowbit.tensors import Outliers, QTensor, Vectors

_SCALES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}


def matrix(shape: tuple[int, ...], block: Block) -> tuple[int, int]:
    """Rows and columns under which a shape is quantized."""
    count = math.prod(shape)
    return (1, count) if block.flat else (count // max(shape[-1], 1), shape[-1])


def blocks(shape: tuple[int, ...], block: Block) -> tuple[int, int]:
    """Scale blocks down and across."""
    rows, cols = matrix(shape, block)
    return -(-rows // (block.rows or rows)), -(-cols // (block.cols or cols))


def random_qtensor(scheme: Scheme, shape: tuple[int, ...], seed: int = 0, lowest_zero: int = 0) -> QTensor:
    """Codes over the whole grid, scales over some decades; integer zero points from `lowest_zero` upwards."""
    dice = torch.Generator().manual_seed(seed)
    if scheme.smooth:
        found = random_qtensor(replace(scheme, smooth=False), shape, seed, lowest_zero)
        factors = (torch.rand(shape[-1], generator=dice) + 0.5).bfloat16().float()
        return replace(found, scheme=scheme, factors=factors)
    if scheme.grid.runs:
        return _random_vectors(scheme, shape, dice)
    if scheme.zero == "quantized":
        return _random_sparse(scheme, shape, dice)
    legal = torch.tensor([code for code, level in enumerate(scheme.grid.levels) if math.isfinite(level)])
    size = matrix(shape, scheme.block)
    codes = legal[torch.randint(len(legal), size, generator=dice)].to(torch.uint8)
    if scheme.grid.table:
        codes = table_codes(scheme.grid.name, size, dice)
    across = blocks(shape, scheme.block)
    zeros, minima = None, None
    if scheme.zero == "int":
        zeros = torch.randint(lowest_zero, 2**scheme.grid.bits, across, generator=dice).to(torch.uint8)
    elif scheme.zero == "float":
        zeros = _storable(torch.rand(across, generator=dice) * 2**scheme.grid.bits, scheme)
    elif scheme.zero == "min":
        minima = _random_scales(scheme, across, dice)
    return QTensor(scheme, shape, codes, _random_scales(scheme, across, dice), zeros, minima=minima)


def table_codes(name: str, size: tuple[int, int], dice: torch.Generator) -> Tensor:
    """Runs of codes that a type of llama.cpp with a table has, by the table of the `gguf` package."""
    table: Any = getattr(gguf.quants, name.upper())
    table.init_grid()
    values = np.rint(table.grid.reshape(table.grid_shape).astype(np.float64))
    digits = torch.from_numpy(np.searchsorted(table.grid_map, values))
    rows, cols = size[0], -(-size[1] // 32) * 32
    runs = digits[torch.randint(len(digits), (rows, cols // digits.shape[1]), generator=dice)].reshape(rows, cols)
    signs = torch.randint(2, (rows, cols // 8, 8), generator=dice)
    if name in ("iq2_xxs", "iq2_xs", "iq3_xxs"):  # an even number of negative ones in eight
        signs[..., 7] = signs[..., :7].sum(-1) % 2
    shared = {"iq1_s": 32, "iq1_m": 8}.get(name, 1)  # weights with one shift
    odd = signs.reshape(rows, cols // shared, shared)[..., :1].expand(-1, -1, shared).reshape(rows, cols)
    return (2 * runs + odd)[:, : size[1]].to(torch.uint8)


def _random_vectors(scheme: Scheme, shape: tuple[int, ...], dice: torch.Generator) -> QTensor:
    """Every index, entries of both signs, columns in any order."""
    rows, left = matrix(shape, Block(1, 0))
    held, order = [], torch.randperm(left, generator=dice).int() if scheme.perm else None
    for run in scheme.grid.runs:
        width = run.width or left
        size, groups, left = (-(-rows // run.rows), width // run.cols), width // (run.group or width), left - width
        codes = [torch.randint(2**bits, size, generator=dice).int() for bits in run.bits]
        books = [torch.randn(groups, 2**bits, run.rows, run.cols, generator=dice) for bits in run.bits]
        held.append(Vectors(torch.stack(codes), tuple(_storable(book, scheme) for book in books)))
    across = blocks(shape, scheme.block)
    minima = _storable(torch.randn(across, generator=dice), scheme) if scheme.zero == "min" else None
    single = scheme.block == Block(0, 0)
    scales = torch.ones(1, 1) if single else _random_scales(scheme, across, dice)
    nothing = torch.empty(0, 0, dtype=torch.uint8)
    return QTensor(scheme, shape, nothing, scales, minima=minima, vectors=tuple(held), order=order)


def _random_sparse(scheme: Scheme, shape: tuple[int, ...], dice: torch.Generator) -> QTensor:
    """Quantized scales and zero points, outliers anywhere, columns in any order."""
    (rows, cols), count, nested = shape, scheme.outliers, scheme.nested
    assert nested
    across = blocks(shape, scheme.block)
    scales, points = (random_qtensor(nested, across, int(torch.randint(99, (), generator=dice))) for _ in range(2))
    where = (
        torch.randint(rows, (count,), generator=dice).int().sort().values,
        torch.randint(cols, (count,), generator=dice),
    )
    values = torch.randn(count, generator=dice).half().float()
    return QTensor(
        scheme,
        shape,
        torch.randint(8, (rows, cols), generator=dice).to(torch.uint8),
        scales,
        order=torch.randperm(cols, generator=dice).int() if scheme.perm else None,
        points=points,
        outliers=Outliers(where[0], where[1].int(), values) if count else None,
    )


def _random_scales(scheme: Scheme, shape: tuple[int, int], dice: torch.Generator) -> Tensor | QTensor:
    exponents = torch.randint(-9, -3, shape, generator=dice)
    if scheme.nested:
        return _random_nested(scheme.nested, shape, dice)
    if scheme.scale == "e8m0":
        return torch.tensor(2.0) ** exponents
    return _storable((1 + torch.rand(shape, generator=dice)) * 2.0**exponents, scheme)


def _random_nested(nested: Scheme, shape: tuple[int, int], dice: torch.Generator) -> QTensor:
    """Quantized scales, positive throughout; the scale of the scales is a float32 that is the reciprocal of one."""
    positive = [code for code, level in enumerate(nested.grid.levels) if 0 < level < math.inf]
    choices = torch.tensor(range(len(nested.grid.levels)) if nested.offset else positive)
    codes = choices[torch.randint(len(choices), matrix(shape, nested.block), generator=dice)].to(torch.uint8)
    outer = 1 / (1 / (0.001 + torch.rand(blocks(shape, nested.block), generator=dice) / 100))
    outer = _storable(outer, nested)
    offset = torch.tensor(0.0625) if nested.offset else None
    return QTensor(nested, shape, codes, outer, offset=offset)


def _storable(values: Tensor, scheme: Scheme) -> Tensor:
    return values.to(_SCALES[scheme.scale]).float()


def slow_dequantize(q: QTensor) -> Tensor:
    """Element by element, in float32: level times scale, or code minus zero point, times scale; plus the offset.

    With the zero kind `min`: code times scale, minus what is subtracted. Of vectors the sum over books, in their order.
    """
    scales = (slow_dequantize(q.scales) if isinstance(q.scales, QTensor) else q.scales).numpy()
    minima = slow_dequantize(q.minima) if isinstance(q.minima, QTensor) else q.minima
    zeros = q.zeros if q.points is None else slow_dequantize(q.points)
    (rows, cols), block = matrix(q.shape, q.scheme.block), q.scheme.block
    out = np.empty((rows, cols), np.float32)
    for row in range(rows):
        for col in range(cols):
            down, across = row // (block.rows or rows), col // (block.cols or cols)
            if q.group_index is not None:
                across = int(q.group_index[col])
            code = 0 if q.vectors else int(q.codes[row, col])
            value = _in_vector(q, row, col) if q.vectors else np.float32(q.scheme.grid.levels[code])
            if zeros is not None:
                value = np.float32(code) - np.float32(zeros[down, across].item())
            if minima is not None:
                value = value if q.vectors else np.float32(code)
            out[row, col] = value * np.float32(scales[down, across])
            if minima is not None:
                out[row, col] -= np.float32(minima[down, across].item())
    if q.offset is not None:
        out += np.float32(q.offset.item())
    if q.outliers is not None:
        for row, col, number in zip(*(part.tolist() for part in vars(q.outliers).values()), strict=True):
            out[row, col] += np.float32(number)
    if q.order is not None:
        columns = q.order.tolist()
        out = np.stack([out[:, columns.index(col)] for col in range(cols)], 1)
    if q.factors is not None:
        out = out * q.factors.numpy()
    return torch.from_numpy(out).reshape(q.shape)


def _in_vector(q: QTensor, row: int, col: int) -> np.float32:
    """What the codebooks say of one element."""
    at = 0
    while q.scheme.grid.runs[at].width and col >= q.scheme.grid.runs[at].width:
        col -= q.scheme.grid.runs[at].width
        at += 1
    run, vectors = q.scheme.grid.runs[at], q.vectors[at]
    total = np.float32(0)
    for i, book in enumerate(vectors.books):
        index = int(vectors.codes[i, row // run.rows, col // run.cols])
        part = book[col // run.group if run.group else 0, index, row % run.rows, col % run.cols]
        total = np.float32(part.item()) if i == 0 else total + np.float32(part.item())
    return total
