"""Whether a stored weight can be what it claims to be: finite, on its grid, under scales that mean something.

One weight at a time; temporaries are bounded by `CHUNK` elements beside the weight's own codes and scales.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from math import isfinite

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from numpy import unravel_index
from torch import Tensor

from lowbit.inspect.facts import Codes, Finding, Level
from lowbit.tensors import QTensor, block_size, level_table

Fact = tuple[Level, str]

CHUNK = 1 << 20
# Below this many weights per code of the grid, codes that do not occur say nothing.
ENOUGH = 64


def check_plain(name: str, tensor: Tensor) -> list[Finding]:
    """NaN, Inf, and matrices of nothing but zeros, in a weight that is stored as it is; integers pass."""
    if not tensor.dtype.is_floating_point:
        return []
    nan, inf, first, blank = 0, 0, -1, True
    for start, piece in _pieces(tensor):
        low, high = (float(end) for end in torch.aminmax(piece))
        blank = blank and low == high == 0
        if not isfinite(low) or not isfinite(high):
            bad = ~torch.isfinite(piece)
            first = start + int(bad.int().argmax()) if first < 0 else first
            missing = int(piece.isnan().sum())
            nan, inf = nan + missing, inf + int(bad.sum()) - missing
    if first >= 0:
        return [Finding("error", name, f"{nan:,} NaN and {inf:,} Inf, the first at {_position(first, tensor.shape)}")]
    if blank and tensor.ndim > 1 and tensor.numel():
        return [Finding("note", name, "every element is zero")]
    return []


def check_quantized(name: str, q: QTensor, dtype: torch.dtype) -> tuple[Codes, list[Finding]]:
    """Codes off the grid or hardly used, scales and zero points that mean nothing, values that `dtype` cannot hold."""
    if q.vectors:
        return _check_vectors(name, q, dtype)
    on_grid = ~level_table(q.scheme.grid).isnan()
    counts, scales = code_counts(q.codes), q.scale_values()
    codes = Codes(int((counts[on_grid] > 0).sum()), int(on_grid.sum()))
    facts = chain(_stray(q, counts, on_grid), _few(q, codes), _scales(q, scales), _zeros(q), _index(q))
    found = [Finding(level, name, text) for level, text in facts]
    wrong = any(finding.level == "error" for finding in found)
    if q.codes.numel() and not wrong and _overflows(q, scales, dtype):
        text = f"values beyond the range of {str(dtype).removeprefix('torch.')} become Inf when it is loaded"
        found.append(Finding("error", name, text))
    return codes, found


def _check_vectors(name: str, q: QTensor, dtype: torch.dtype) -> tuple[Codes, list[Finding]]:
    """Entries of codebooks that occur; numbers that are not finite, values that `dtype` cannot hold."""
    used, available, facts = 0, 0, list(_zeros(q))
    for vectors in q.vectors:
        for book, codes in zip(vectors.books, vectors.codes, strict=True):
            groups, entries = book.shape[:2]
            group = torch.arange(codes.shape[1]) * groups // max(codes.shape[1], 1)
            seen = torch.zeros(groups * entries, dtype=torch.bool)
            seen[codes + group * entries] = True
            used, available = used + int(seen.sum()), available + seen.numel()
    numbers = {"scales": q.scale_values(), **{part: value for part, value in q.parts() if ".books." in part}}
    for part, values in numbers.items():
        if not torch.isfinite(values).all():
            facts.append(("error", _some(f"{part} are NaN or Inf", ~torch.isfinite(values))))
    if not facts and not all(bool(torch.isfinite(piece).all()) for _, piece in _pieces(q.dequantize(dtype))):
        facts.append(("error", f"values beyond the range of {str(dtype).removeprefix('torch.')} become Inf"))
    return Codes(used, available), [Finding(level, name, text) for level, text in facts]


def code_counts(codes: UInt8[Tensor, "..."]) -> Int64[Tensor, "256"]:
    """How often each code occurs."""
    counts = torch.zeros(256, dtype=torch.int64)
    for _, piece in _pieces(codes):
        counts += torch.bincount(piece, minlength=256)
    return counts


def _pieces(tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Runs of the flattened tensor with their first index; 8-bit floats, which torch cannot compare, as float32."""
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), CHUNK):
        piece = flat[start : start + CHUNK]
        yield start, piece.float() if piece.dtype.is_floating_point and piece.dtype.itemsize == 1 else piece


def _position(index: int, shape: Sequence[int]) -> str:
    """A flat index as the tensor's own, `[3, 17]`."""
    return str([int(part) for part in unravel_index(index, shape)])


def _some(what: str, bad: Bool[Tensor, "..."]) -> str:
    """How many of a tensor's elements are bad, and where the first is."""
    first = _position(int(bad.reshape(-1).int().argmax()), bad.shape)
    return f"{int(bad.sum()):,} of {bad.numel():,} {what}, the first at {first}"


def _stray(q: QTensor, counts: Int64[Tensor, "256"], on_grid: Bool[Tensor, "256"]) -> Iterator[Fact]:
    """Codes that the grid does not have."""
    count = int(counts[~on_grid].sum())
    if count:
        code = int((counts * ~on_grid).nonzero()[0])
        where = next(start + int(hit.int().argmax()) for start, p in _pieces(q.codes) if (hit := p == code).any())
        place = _position(where, q.codes.shape)
        yield "error", f"{count:,} codes that {q.scheme.grid.name} does not have, as {code} at {place}"


def _few(q: QTensor, codes: Codes) -> Iterator[Fact]:
    """Codes that hardly occur: the bits are paid for and not used."""
    if 2 * codes.used < codes.available and q.codes.numel() >= ENOUGH * codes.available:
        yield "note", f"only {codes.used} of {codes.available} codes occur"


def _scales(q: QTensor, scales: Float[Tensor, "down across"]) -> Iterator[Fact]:
    """Scales that are not finite, zero or negative. A zero scale loses its block, unless the block held one value.

    Of symmetric integers a negative one only says which end of the range the level without a counterpart is.
    """
    bad, zero, negative = ~torch.isfinite(scales), scales == 0, scales < 0
    if bad.any():
        yield "error", _some("scales are NaN or Inf", bad)
    if zero.any():
        lost = any(_varies(q, row, col) for row, col in zero.nonzero().tolist())
        text = _some("scales are zero", zero)
        yield (
            ("error", f"{text}; the codes under them are lost")
            if lost
            else ("note", f"{text}, over blocks of one code")
        )
    if negative.any() and not (q.scheme.grid.kind == "int" and q.zeros is None):
        yield "note", _some("scales are negative", negative)


def _varies(q: QTensor, row: int, col: int) -> bool:
    """Whether the codes under one scale differ."""
    high, wide = block_size(q.shape, q.scheme.block)
    rows = q.codes[row * high : (row + 1) * high]
    block = rows[:, col * wide : (col + 1) * wide] if q.group_index is None else rows[:, q.group_index == col]
    return block.numel() > 0 and bool(block.min() != block.max())


def _zeros(q: QTensor) -> Iterator[Fact]:
    """Zero points and offsets that are not finite, or lie beyond the codes."""
    for what, values in (("zero points", q.zero_values()), ("offsets", q.offset)):
        if values is not None and not torch.isfinite(values).all():
            yield "error", _some(f"{what} are NaN or Inf", ~torch.isfinite(values))
    if q.scheme.zero == "int" and q.zeros is not None and (q.zeros >= 2**q.scheme.grid.bits).any():
        yield "note", _some("zero points lie beyond the codes", q.zeros >= 2**q.scheme.grid.bits)


def _index(q: QTensor) -> Iterator[Fact]:
    """Columns under a scale that is not there."""
    if q.group_index is not None:
        bad = (q.group_index < 0) | (q.group_index >= q.scales.shape[1])
        if bad.any():
            yield "error", _some("columns name a block that is not there", bad)


def _overflows(q: QTensor, scales: Float[Tensor, "down across"], dtype: torch.dtype) -> bool:
    """Whether a value leaves the range of the dtype; looked at one by one only where the largest scale allows it."""
    reach = float(level_table(q.scheme.grid).abs().nan_to_num().max())
    zeros, apart = q.zero_values(), 0.0
    if zeros is not None:
        most, minus = float(zeros.abs().max()), q.scheme.zero == "min"
        reach, apart = 2**q.scheme.grid.bits + (0.0 if minus else most), most if minus else 0.0
    if float(scales.abs().max()) * reach + apart <= torch.finfo(dtype).max:
        return False
    return not all(bool(torch.isfinite(piece).all()) for _, piece in _pieces(q.dequantize(dtype)))
