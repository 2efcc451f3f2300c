"""The native kernels on torch CPU tensors: shapes are checked here, the work is in `csrc/`.

A weight is `[rows, cols]` in float32, float16 or bfloat16; a scale block is `block_rows x block_cols` elements, with
shorter tails, so that scales are float32 `[ceil(rows / block_rows), ceil(cols / block_cols)]`. Blocks may exceed the
weight. Codes are one uint8 each. All tensors are contiguous and on the CPU; results go to `out` where it is given.

Kernels run on the calling thread and release the interpreter lock: give each thread its own rows, cut at multiples of
`block_rows`. Every instruction set gives the same bits. All functions raise `ValueError` that names the argument.
"""

from __future__ import annotations

import functools
import mmap
import re
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path
from typing import Literal, final

import torch
from jaxtyping import Float, Int8, Int16, Int32, Int64, UInt8
from torch import Tensor

from lowbit import _native

WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_ROOM = 256  # positions for which a text has room at least
_AS_FAST = 1.25  # of a float32 product's time: what is beside the products of a pass is faster in bfloat16
_LARGE = 1 << 22  # bytes from which pages of 2 MiB pay
_PAGE, _REGION = 1 << 21, 1 << 25


def isa() -> str:
    """Name of the instruction set in use: `scalar`; `avx2`, `avx512`, `avx512_vnni`; `neon`, `neon_dotprod`."""
    return _native.isa()


def supported_isas() -> tuple[str, ...]:
    """The instruction sets that this machine can run, `scalar` first."""
    return tuple(_native.supported_isas())


@functools.cache
def computes_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 matrices by itself, and about as fast as float32 ones.

    torch is thirty times slower where it has no instruction for it. Where it has one and no unit for matrices, that is
    faster than float32 on some processors and half as fast on others: a product is timed.
    """
    info = Path("/proc/cpuinfo")
    known = info.read_text() if info.exists() else ""
    if re.search(r"\bamx_bf16\b", known):
        return True
    timed = re.search(r"\bavx512_bf16\b", known) is not None
    return timed and _product_seconds(torch.bfloat16) < _AS_FAST * _product_seconds(torch.float32)


def _product_seconds(dtype: torch.dtype, side: int = 256, times: int = 7) -> float:
    """Seconds of the fastest of some products of two square matrices."""
    left, right = (torch.ones(side, side, dtype=dtype) for _ in range(2))
    found = []
    for _ in range(times):
        start = time.perf_counter()
        torch.mm(left, right)
        found.append(time.perf_counter() - start)
    return min(found)


def block_range(
    weight: Float[Tensor, "rows cols"], block_rows: int, block_cols: int
) -> tuple[Float[Tensor, "blocks_down blocks_across"], Float[Tensor, "blocks_down blocks_across"], int]:
    """Least and greatest value of each block, and the flat index of the first NaN or Inf (-1: none).

    NaN is skipped (a block of nothing else has least +inf and greatest -inf); negative zero counts as zero.
    """
    blocks = _blocks(_weight(weight), block_rows, block_cols)
    least, greatest = (torch.empty(blocks, dtype=torch.float32) for _ in range(2))
    first_bad = _native.block_range(weight.detach(), block_rows, block_cols, least, greatest)
    return least, greatest, first_bad


def quantize_affine(
    weight: Float[Tensor, "rows cols"],
    scale: Float[Tensor, "blocks_down blocks_across"],
    zero: Float[Tensor, "blocks_down blocks_across"] | None,
    code_offset: int,
    code_max: int,
    block_rows: int,
    block_cols: int,
    *,
    round_sum: bool = False,
    out: UInt8[Tensor, "rows cols"] | None = None,
) -> UInt8[Tensor, "rows cols"]:
    """`clamp(rint(weight / scale) + zero, 0, code_max)`, ties to even, in float32.

    `code_offset` stands in for an absent `zero`. With `round_sum` it is `rint(weight / scale + zero)`, which is what
    a zero point that is no integer needs. NaN becomes code 0.
    """
    blocks = _blocks(_weight(weight), block_rows, block_cols)
    _scales(blocks, scale, zero)
    if not 0 <= code_max <= 255:
        raise ValueError(f"code_max is {code_max}; it must be 0 to 255")
    codes = _out(out, weight.shape)
    _native.quantize_affine(
        weight.detach(), scale, zero, code_offset, code_max, round_sum, block_rows, block_cols, codes
    )
    return codes


def quantize_levels(
    weight: Float[Tensor, "rows cols"],
    scale: Float[Tensor, "blocks_down blocks_across"],
    levels: Float[Tensor, "levels"],
    codes: UInt8[Tensor, "levels"],
    block_rows: int,
    block_cols: int,
    *,
    out: UInt8[Tensor, "rows cols"] | None = None,
) -> UInt8[Tensor, "rows cols"]:
    """Code of the level nearest to `weight / scale` (float32); `levels` ascend, `codes[i]` is the code of `levels[i]`.

    An exact midpoint goes to the level with the even code; if both or neither are even, to the one of smaller
    magnitude; if these are equal too, to the greater. NaN becomes the code of the least level.
    """
    blocks = _blocks(_weight(weight), block_rows, block_cols)
    _scales(blocks, scale, None)
    count = min(max(levels.numel(), 1), 256)
    _check("levels", levels, (count,), torch.float32)
    _check("codes", codes, (count,), torch.uint8)
    if not levels.isfinite().all() or (levels.diff() < 0).any():
        raise ValueError("levels must be finite and in ascending order")
    result = _out(out, weight.shape)
    _native.quantize_levels(weight.detach(), scale, levels, codes, block_rows, block_cols, result)
    return result


def quantize_fp8(
    weight: Float[Tensor, "rows cols"],
    scale: Float[Tensor, "blocks_down blocks_across"],
    format: Literal["e4m3fn", "e5m2"],
    block_rows: int,
    block_cols: int,
    *,
    out: UInt8[Tensor, "rows cols"] | None = None,
) -> UInt8[Tensor, "rows cols"]:
    """The FP8 byte of `weight / scale`, ties to even, saturated to the greatest finite value (448 or 57344).

    The formats are those of Micikevicius et al. 2022, "FP8 formats for deep learning", section 3.
    """
    blocks = _blocks(_weight(weight), block_rows, block_cols)
    _scales(blocks, scale, None)
    if format not in ("e4m3fn", "e5m2"):
        raise ValueError(f"format is {format!r}; it must be 'e4m3fn' or 'e5m2'")
    codes = _out(out, weight.shape)
    _native.quantize_fp8(weight.detach(), scale, format == "e5m2", block_rows, block_cols, codes)
    return codes


def dequantize(
    codes: UInt8[Tensor, "rows cols"],
    scale: Float[Tensor, "blocks_down blocks_across"],
    zero: Float[Tensor, "blocks_down blocks_across"] | None,
    levels: Float[Tensor, "256"] | None,
    block_rows: int,
    block_cols: int,
    *,
    minus: bool = False,
    dtype: torch.dtype = torch.float32,
    out: Float[Tensor, "rows cols"] | None = None,
) -> Float[Tensor, "rows cols"]:
    """`levels[code] * scale`, or `(code - zero) * scale` where `zero` is given; float32, rounded once, ties to even.

    With `minus` it is `code * scale - zero`. `levels` holds NaN for codes that the grid does not have. `dtype` is that
    of the result where `out` is not given.
    """
    _quantized(codes, scale, zero, levels, block_rows, block_cols)
    weight = torch.empty(codes.shape, dtype=dtype) if out is None else out
    _check("out", weight, codes.shape, *WEIGHT_DTYPES)
    _native.dequantize(codes, scale, zero, levels, minus, block_rows, block_cols, weight)
    return weight


def error(
    weight: Float[Tensor, "rows cols"] | torch.dtype,
    codes: UInt8[Tensor, "rows cols"],
    scale: Float[Tensor, "blocks_down blocks_across"],
    zero: Float[Tensor, "blocks_down blocks_across"] | None,
    levels: Float[Tensor, "256"] | None,
    block_rows: int,
    block_cols: int,
    *,
    minus: bool = False,
) -> tuple[float, float, float]:
    """Sum of squared errors, sum of squared weights, and greatest absolute error of what `dequantize` gives (float32).

    A float type stands for the weight that `dequantize` gives in it, which is not made. Sums are float64 in a fixed
    order within a row; rows are added in order.
    """
    _quantized(codes, scale, zero, levels, block_rows, block_cols)
    if isinstance(weight, torch.dtype):
        weight = torch.empty(0, dtype=weight)
        _check("weight", weight, (0,), *WEIGHT_DTYPES)
    else:
        _check("weight", weight, codes.shape, *WEIGHT_DTYPES)
    return _native.error(weight.detach(), codes, scale, zero, levels, minus, block_rows, block_cols)


@final
@dataclass(frozen=True)
class Coder:
    """How `sweep` finds codes: as `quantize_affine` does, or as `quantize_levels` does where `levels` is set.

    Attributes:
        offset: the zero point where none is given.
        code_max: the greatest code, 0 to 255.
        round_sum: whether zero points are added before rounding.
        keep_zeros: whether weights that are 0 have the target 0.
        levels: ascending values.
        codes: the code of each.
        table: the level of each code, NaN where there is none.
    """

    offset: int = 0
    code_max: int = 255
    round_sum: bool = False
    keep_zeros: bool = False
    levels: Float[Tensor, "levels"] | None = None
    codes: UInt8[Tensor, "levels"] | None = None
    table: Float[Tensor, "256"] | None = None


def sweep(
    target: Float[Tensor, "cols lanes"],
    weight: Float[Tensor, "cols lanes"],
    error: Float[Tensor, "cols lanes"],
    coupling: Float[Tensor, "cols cols"],
    scale: Float[Tensor, "cols lanes"],
    zero: Float[Tensor, "cols lanes"] | None,
    coder: Coder,
    *,
    out: UInt8[Tensor, "cols lanes"],
) -> None:
    """Codes column by column, each with the errors of those before: a lane is a row of a weight, lanes come in 16s.

    For j = 0, 1, ...: `out[j]` is the code nearest to `target[j]`; `error[j]` becomes `weight[j]` minus what the code
    stands for, and `coupling[j, k]` times its change is added to `target[k]` for every k > j. `target` is used up.
    """
    shape = _swept(target, weight, error, coupling, scale)
    if zero is not None:
        _check("zero", zero, shape, torch.float32)
    codes = _out(out, shape)
    _native.sweep(target, weight, error, coupling, scale, zero, *_rule(coder), codes)


def _swept(target: Tensor, weight: Tensor, error: Tensor, coupling: Tensor, scale: Tensor) -> tuple[int, int]:
    """Columns and lanes of what both kinds of `sweep` take, which is checked."""
    shape = _two(target.shape)
    if shape[1] % 16:
        raise ValueError(f"target has {shape[1]} lanes; it must be a multiple of 16")
    for name, tensor in {"target": target, "weight": weight, "error": error, "scale": scale}.items():
        _check(name, tensor, shape, torch.float32)
    _check("coupling", coupling, (shape[0], shape[0]), torch.float32)
    return shape


@functools.cache
def ggml_runs(type: int) -> UInt8[Tensor, "entries group"]:
    """The table of a type of ggml: of each entry the codes of 8 (or 4) columns, halved.

    Raises:
        ValueError: the type has none.
    """
    digits = _native.ggml_runs(type)
    if not digits:
        raise ValueError(f"type {type} of ggml has no table of runs")
    return torch.tensor(digits, dtype=torch.uint8).view(-1, 4 if max(digits) > 2 else 8)


def sweep_runs(
    type: int,
    target: Float[Tensor, "cols lanes"],
    weight: Float[Tensor, "cols lanes"],
    error: Float[Tensor, "cols lanes"],
    coupling: Float[Tensor, "cols cols"],
    scale: Float[Tensor, "cols lanes"],
    solve: Float[Tensor, "runs 8 8"],
    metric: Float[Tensor, "runs 8 8"],
    *,
    level: Float[Tensor, "256"],
    first: bool,
    out: UInt8[Tensor, "cols lanes"],
) -> None:
    """`sweep` for a type of ggml with a table of runs of codes, by eight columns at once, which have one scale.

    With all else as it is, the error of a run is `(x - best)^T metric (x - best)`, where `best` is, from the values
    that the columns have now, `solve` times what the targets are beyond these. Its codes become the best that a search
    finds; those in `out` stay where it finds none better and this is not the `first` time. Those of IQ1_S keep their
    shifts, which they have in common with other runs, in any case. Beyond the last column `metric` is 0.
    """
    shape = _swept(target, weight, error, coupling, scale)
    for name, tensor in {"solve": solve, "metric": metric}.items():
        _check(name, tensor, (-(-shape[0] // 8), 8, 8), torch.float32)
    _check("level", level, (256,), torch.float32)
    ggml_runs(type)
    _native.sweep_runs(type, target, weight, error, coupling, scale, solve, metric, level, first, _out(out, shape))


def block_errors(
    weight: Float[Tensor, "rows cols"],
    scale: Float[Tensor, "blocks_down blocks_across"],
    zero: Float[Tensor, "blocks_down blocks_across"] | None,
    coder: Coder,
    block_rows: int,
    block_cols: int,
    *,
    importance: Float[Tensor, "cols"] | None = None,
) -> Float[Tensor, "blocks_down blocks_across"]:
    """Of each block the sum of squared errors under the codes nearest to its weights, in one pass, in float32.

    `importance`: what a column's squares count. Rows are added in order, columns of a row in 16 sums.
    """
    blocks = _blocks(_two(weight.shape), block_rows, block_cols)
    _check("weight", weight, _two(weight.shape), torch.float32)
    _scales(blocks, scale, zero)
    if importance is not None:
        _check("importance", importance, (weight.shape[1],), torch.float32)
    out = torch.empty(blocks, dtype=torch.float32)
    _native.block_errors(weight, scale, zero, *_rule(coder), importance, block_rows, block_cols, out)
    return out


def pack_bits(
    codes: UInt8[Tensor, "rows cols"], bits: int, *, out: Int32[Tensor, "rows words"] | None = None
) -> Int32[Tensor, "rows words"]:
    """Each row as a dense stream of `bits` (1 to 8) per code, least significant first, padded with zero bits to int32.

    Only the low `bits` of a code are kept. `words` is `ceil(cols * bits / 32)`.
    """
    _check("codes", codes, _two(codes.shape), torch.uint8)
    rows, cols = codes.shape
    words = _out(out, (rows, _words(cols, bits)), torch.int32)
    _native.pack_bits(codes, bits, words)
    return words


def unpack_bits(
    words: Int32[Tensor, "rows words"], bits: int, cols: int, *, out: UInt8[Tensor, "rows cols"] | None = None
) -> UInt8[Tensor, "rows cols"]:
    """The codes that `pack_bits` was given."""
    _check("words", words, (_two(words.shape)[0], _words(cols, bits)), torch.int32)
    codes = _out(out, (words.shape[0], cols))
    _native.unpack_bits(words, bits, codes)
    return codes


def pack_bits_transposed(
    codes: UInt8[Tensor, "rows cols"], bits: int, *, out: Int32[Tensor, "words rows"] | None = None
) -> Int32[Tensor, "words rows"]:
    """`pack_bits(codes, bits).T`: GPTQ's qweight, where rows are output features. `out` may be some of its columns."""
    _check("codes", codes, _two(codes.shape), torch.uint8)
    rows, cols = codes.shape
    words = _lines_out(out, (_words(cols, bits), rows))
    _native.pack_bits_transposed(codes, bits, words)
    return words


def unpack_bits_transposed(
    words: Int32[Tensor, "words rows"], bits: int, cols: int, *, out: UInt8[Tensor, "rows cols"] | None = None
) -> UInt8[Tensor, "rows cols"]:
    """The codes that `pack_bits_transposed` was given; `words` may be some columns of a matrix."""
    _check_lines("words", words, (_words(cols, bits), _two(words.shape)[1]))
    codes = _out(out, (words.shape[1], cols))
    _native.unpack_bits_transposed(words, bits, codes)
    return codes


def transpose_words(
    words: Int32[Tensor, "rows cols"], *, out: Int32[Tensor, "cols rows"] | None = None
) -> Int32[Tensor, "cols rows"]:
    """`words.T`, made contiguous; both may be some columns of a matrix."""
    rows, cols = _two(words.shape)
    _check_lines("words", words, (rows, cols))
    turned = _lines_out(out, (cols, rows))
    _native.transpose_words(words, turned)
    return turned


def file_holds(file: int, parts: Sequence[tuple[Tensor, int]]) -> bool:
    """Whether an open file holds the bytes of each contiguous tensor from the byte on that stands beside it.

    What cannot be read is not held. The lock is released once for all parts.
    """
    views = [part.reshape(-1).view(torch.uint8) for part, _ in parts if part.numel()]
    return _native.file_holds(file, views, [start for part, start in parts if part.numel()])


def pack_awq(
    codes: UInt8[Tensor, "rows cols"], *, out: Int32[Tensor, "cols words"] | None = None
) -> Int32[Tensor, "cols words"]:
    """AWQ's qweight: the four low bits of eight rows to a word, the lowest those of row 0, then 2, 4, 6, 1, 3, 5, 7.

    `rows` is a multiple of 8. `out` may be some columns of a matrix.
    """
    _check("codes", codes, _two(codes.shape), torch.uint8)
    words = _lines_out(out, (codes.shape[1], _eighth(codes.shape[0])))
    _native.pack_awq(codes, words)
    return words


def unpack_awq(
    words: Int32[Tensor, "cols words"], *, out: UInt8[Tensor, "rows cols"] | None = None
) -> UInt8[Tensor, "rows cols"]:
    """The codes that `pack_awq` was given; `words` may be some columns of a matrix."""
    _check_lines("words", words, _two(words.shape))
    codes = _out(out, (8 * words.shape[1], words.shape[0]))
    _native.unpack_awq(words, codes)
    return codes


def lines_to_awq(
    lines: Int32[Tensor, "lines rows"], *, out: Int32[Tensor, "cols words"] | None = None
) -> Int32[Tensor, "cols words"]:
    """`pack_awq` of the codes of which `pack_bits_transposed` made `lines`, 4 bits each; `cols` is a multiple of 8."""
    _check("lines", lines, _two(lines.shape), torch.int32)
    words = _lines_out(out, (8 * lines.shape[0], _eighth(lines.shape[1])))
    _native.lines_to_awq(lines, words)
    return words


def awq_to_lines(
    words: Int32[Tensor, "cols words"], *, out: Int32[Tensor, "lines rows"] | None = None
) -> Int32[Tensor, "lines rows"]:
    """What `lines_to_awq` was given; `words` may be some columns of a matrix."""
    _check_lines("words", words, _two(words.shape))
    lines = _out(out, (_eighth(words.shape[0]), 8 * words.shape[1]), torch.int32)
    _native.awq_to_lines(words, lines)
    return lines


def awq_to_rows(
    words: Int32[Tensor, "cols words"], *, out: Int32[Tensor, "rows row_words"] | None = None
) -> Int32[Tensor, "rows row_words"]:
    """`pack_bits` of those codes; `words` may be some columns of a matrix."""
    _check_lines("words", words, _two(words.shape))
    rows = _out(out, (8 * words.shape[1], _eighth(words.shape[0])), torch.int32)
    _native.awq_to_rows(words, rows)
    return rows


def pack_nibbles_high_first(
    codes: UInt8[Tensor, "count"], *, out: UInt8[Tensor, "bytes"] | None = None
) -> UInt8[Tensor, "bytes"]:
    """Two 4-bit codes per byte, the first in the high nibble (bitsandbytes); an odd last byte has a zero low nibble."""
    _check("codes", codes, (codes.numel(),), torch.uint8)
    packed = _out(out, (ceil(codes.numel() / 2),))
    _native.pack_nibbles_high_first(codes, packed)
    return packed


def unpack_nibbles_high_first(
    packed: UInt8[Tensor, "bytes"], count: int, *, out: UInt8[Tensor, "count"] | None = None
) -> UInt8[Tensor, "count"]:
    """The `count` codes that `pack_nibbles_high_first` was given."""
    _check("packed", packed, (ceil(count / 2),), torch.uint8)
    codes = _out(out, (count,))
    _native.unpack_nibbles_high_first(packed, codes)
    return codes


@final
@dataclass(frozen=True)
class GgmlParts:
    """What is in `blocks` blocks of a type of ggml, contiguous uint8 on the CPU; None where the type has none.

    Attributes:
        codes: one byte per weight, signed ones in offset binary.
        scale: of each block, as stored: float16, the byte of a power of two, or four of E4M3.
        min: float16 of each block.
        scale_codes: of the blocks within each block.
        min_codes: of the blocks within each block.
    """

    codes: UInt8[Tensor, "..."]
    scale: UInt8[Tensor, "..."]
    min: UInt8[Tensor, "..."] | None = None
    scale_codes: UInt8[Tensor, "..."] | None = None
    min_codes: UInt8[Tensor, "..."] | None = None


def ggml_pack(type: int, blocks: int, parts: GgmlParts, *, out: UInt8[Tensor, "..."]) -> int | None:
    """Blocks of a type of ggml, under its number in GGUF, from their parts.

    Returns the flat index of the first weight of a run of codes that the type does not have, None where it has all.
    """
    _ggml_parts(type, blocks, parts, out)
    each = (parts.codes, parts.scale, parts.min, parts.scale_codes, parts.min_codes)
    wrong = _native.ggml_pack(type, *each, blocks, out)
    return None if wrong < 0 else wrong


def ggml_unpack(type: int, blocks: int, stored: UInt8[Tensor, "..."], *, out: GgmlParts) -> None:
    """What `ggml_pack` was given; without codes, where `out` has these on the device `meta`.

    Raises:
        ValueError: without codes, of a type with a table of runs of these.
    """
    _ggml_parts(type, blocks, out, stored, hollow=out.codes.is_meta)
    each = (None if out.codes.is_meta else out.codes, out.scale, out.min, out.scale_codes, out.min_codes)
    _native.ggml_unpack(type, stored, blocks, *each)


def ggml_words(
    type: int, stored: UInt8[Tensor, "rows row_bytes"], bits: int, *, out: Int32[Tensor, "rows words"]
) -> None:
    """`pack_bits` of the codes that `ggml_unpack` finds in rows of blocks; `bits` are those of the type."""
    weights, size, *_ = _ggml_shape(type)
    rows, row_bytes = _two(stored.shape)
    _check("stored", stored, (rows, row_bytes), torch.uint8)
    if row_bytes % size:
        raise ValueError(f"rows of {row_bytes} bytes are no blocks of {size}")
    _check("out", out, (rows, _words(row_bytes // size * weights, bits)), torch.int32)
    _native.ggml_words(type, stored, rows * row_bytes // size, bits, out)


def ggml_pack_words(
    type: int, words: Int32[Tensor, "rows words"], bits: int, parts: GgmlParts, *, out: UInt8[Tensor, "rows row_bytes"]
) -> None:
    """`ggml_pack` of codes of which `ggml_words` would find `words`; `parts` has all else, and codes on `meta`.

    Raises:
        ValueError: of a type with a table of runs of codes.
    """
    weights, size, *_ = _ggml_shape(type)
    rows, row_bytes = _two(out.shape)
    _check("words", words, (rows, _words(row_bytes // size * weights, bits)), torch.int32)
    _ggml_parts(type, rows * row_bytes // size, parts, out, hollow=True)
    each = (parts.scale, parts.min, parts.scale_codes, parts.min_codes)
    _native.ggml_pack_words(type, words, bits, *each, rows * row_bytes // size, out)


@final
class Table:
    """Rows that tokens look up, in float32: floats, or blocks of a type of ggml.

    Attributes:
        rows: that there are.
        cols: of each.
    """

    def __init__(
        self,
        values: Tensor,
        type: int | None = None,
        levels: Float[Tensor, "256"] | None = None,
        scales: Float[Tensor, "256"] | None = None,
        step: int = 1,
    ) -> None:
        """`values` are floats `[rows, cols]`, or rows of blocks in uint8, as `ggml_unpack` takes them.

        Codes stand for `levels`, those of scales and minima for `scales` where the type has these; `step` weights share
        a scale.
        """
        self.rows, self.cols = _two(values.shape)
        if type is None:
            _check("values", values, (self.rows, self.cols), *WEIGHT_DTYPES)
        else:
            weights, size, subs, _, scale_bytes = _ggml_shape(type)
            if scale_bytes > 2 or self.cols % size or step < 1 or step * max(subs, 1) != weights:
                raise ValueError(f"type {type} has no scales of each {step} weights in rows of {self.cols} bytes")
            _check("values", values, (self.rows, self.cols), torch.uint8)
            _check_present("levels", levels, True, (256,), torch.float32)
            _check_present("scales", scales, subs > 0, (256,), torch.float32)
            self.cols = self.cols // size * weights
        self._kept = values, levels, scales  # their memory is read
        self.handle = _native.Table(values, self.cols, type or 0, levels, scales, step)

    def check(self, ids: Sequence[int]) -> None:
        """Raise LookupError where a row is not there."""
        if ids and not 0 <= min(ids) <= max(ids) < self.rows:
            raise LookupError(f"rows {min(ids)} to {max(ids)} of a table of {self.rows}")

    def __call__(self, ids: Sequence[int]) -> Float[Tensor, "ids cols"] | None:
        """Some rows, what `dequantize` makes of what `ggml_unpack` gives; None where one is not finite."""
        self.check(ids)
        out = torch.empty(len(ids), self.cols, dtype=torch.float32)
        return out if self.handle.rows(list(ids), out) else None


@final
@dataclass(frozen=True)
class GgmlBlocks:
    """What `ggml_encode` finds; None where the type has none.

    Attributes:
        codes: of every weight, signed ones in offset binary.
        scale: of each block, exact in the type that stores it.
        min: what each block subtracts, or the scale of these where they are codes; exact in float16.
        scale_codes: of the blocks within each block.
        min_codes: of the blocks within each block.
    """

    codes: UInt8[Tensor, "rows cols"]
    scale: Float[Tensor, "rows blocks"]
    min: Float[Tensor, "rows blocks"] | None = None
    scale_codes: UInt8[Tensor, "rows subs"] | None = None
    min_codes: UInt8[Tensor, "rows subs"] | None = None


def ggml_encode(
    type: int,
    weight: Float[Tensor, "rows cols"],
    importance: Float[Tensor, " cols"] | None,
    *,
    out: GgmlBlocks,
    fitted: bool = False,
) -> bool:
    """llama.cpp's encoder of a type, under its number in GGUF: what `ggml_quantize_chunk` finds, to the bit.

    With `fitted`, codes and scales of less error: sum of importance (or 1) * (weight - value)**2, block by block.
    `weight` is in rows of whole blocks. Scales that float16 does not have become the greatest that it has. False where
    a weight is not finite: what is in `out` is then of no use.
    """
    rows, cols = _two(weight.shape)
    weights, _, subs, has_min, _ = _ggml_shape(type)
    if cols % weights:
        raise ValueError(f"blocks of {weights} weights do not divide rows of {cols}")
    across = cols // weights
    _check("weight", weight, (rows, cols), *WEIGHT_DTYPES)
    _check("codes", out.codes, (rows, cols), torch.uint8)
    _check("scale", out.scale, (rows, across), torch.float32)
    _check_present("min", out.min, has_min, (rows, across), torch.float32)
    _check_present("scale_codes", out.scale_codes, subs > 0, (rows, across * subs), torch.uint8)
    _check_present("min_codes", out.min_codes, subs > 0 and has_min, (rows, across * subs), torch.uint8)
    if importance is not None:
        _check("importance", importance, (cols,), torch.float32)
    each = (out.codes, out.scale, out.min, out.scale_codes, out.min_codes)
    return _native.ggml_encode(type, weight.detach(), importance, fitted, *each)


def _ggml_shape(type: int) -> tuple[int, int, int, bool, int]:
    shape = _native.ggml_shape(type)
    if not shape[0]:
        raise ValueError(f"ggml has no type {type} that is known here")
    return shape


def _ggml_parts(type: int, blocks: int, parts: GgmlParts, stored: Tensor, hollow: bool = False) -> None:
    weights, size, subs, has_min, scale_bytes = _ggml_shape(type)
    counts = {
        **({} if hollow else {"codes": (parts.codes, weights)}),
        "scale": (parts.scale, scale_bytes),
        "min": (parts.min, 2 * has_min),
        "scale_codes": (parts.scale_codes, subs),
        "min_codes": (parts.min_codes, subs * has_min),
        "stored": (stored, size),
    }
    for name, (tensor, each) in counts.items():
        flat = None if tensor is None else tensor.shape
        _check_present(name, tensor, each > 0, flat or (), torch.uint8)
        if tensor is not None and tensor.numel() != each * blocks:
            raise ValueError(f"{name} has {tensor.numel()} bytes; {blocks} blocks take {each * blocks}")


def _check_present(name: str, tensor: Tensor | None, wanted: bool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if (tensor is not None) != wanted:
        raise ValueError(f"{name} is {'missing' if wanted else 'given, and the type has none'}")
    if tensor is not None:
        _check(name, tensor, shape, dtype)


def causal_softmax(
    scores: Float[Tensor, "rows cols"], period: int, first: int, scale: float, *, out: Float[Tensor, "rows cols"]
) -> None:
    """Softmax of `scale * scores` in float32, where row r sees the columns up to `first + r % period`; 0 beyond.

    `out` may be of another dtype, or the scores themselves. A row that sees NaN or +Inf is NaN in all that it sees.
    """
    _check("scores", scores, _two(scores.shape), *WEIGHT_DTYPES)
    _check("out", out, _two(scores.shape), *WEIGHT_DTYPES)
    _causal(period, first, scale)
    _native.causal_softmax(scores, period, first, scale, out)


def causal_softmax_slopes(
    shares: Float[Tensor, "rows cols"], period: int, first: int, scale: float, slopes: Float[Tensor, "rows cols"]
) -> None:
    """In place, from the derivative by what `causal_softmax` gave (`shares`) that by the scores, in float32."""
    _check("shares", shares, _two(shares.shape), *WEIGHT_DTYPES)
    _check("slopes", slopes, _two(shares.shape), shares.dtype)
    _causal(period, first, scale)
    _native.causal_softmax_slopes(shares, period, first, scale, slopes)


WAYS = ("floats", "codes", "table", "dense", "wide", "small")
WIDE_RUN = 256  # columns that share a scale in the way `wide`
CODE_BITS = (2, 3, 4, 5, 6, 8)  # of codes in panels
PANEL_PARTS = ("codes", "scale", "zero", "fine", "fine_zero")  # of `Panels`: these have an entry per panel


@final
@dataclass(frozen=True)
class Panels:
    """A weight `[rows, cols]` as products read it: panels of 16 rows, zeros where rows or columns end.

    The order in which codes lie is that of `csrc/product.h`.

    Attributes:
        way: how it is computed: `floats` (what codes stand for, times the inputs), `codes` or `table` (codes, or the
            entries of `table` at them, times inputs rounded to int8), `dense` (a weight of floats), `wide` (integers of
            16 bits, times inputs rounded to such), `small` (small floats of 8 bits: 15 tokens as `floats`, more as
            `wide`).
        rows: of the weight.
        bits: 2, 3, 4, 5, 6 or 8 of a code, 4 with a `table`; of an element where it is dense; 16 where it is wide.
        step: columns that share a scale, a multiple of 16; `WIDE_RUN` where it is wide.
        codes: `[panels, words, 64]` bytes, `bits` words for 32 columns. Dense: `[panels, cols, 16]`; wide: int16 of
            this shape, two columns side by side in each lane.
        scale: `[panels, cols / step, 16]`, float16 or float32; None where it is dense. Nested: one for each
            run, `[panels, cols / over, 16]`. Wide: float32, and the last may be of fewer columns.
        zero: the same of zero points, or of minima with `minus`.
        minus: whether it is `code * scale - zero`, not `(code - zero) * scale`.
        offset: what a code is above what it stands for, beside `zero`.
        over: where scales are nested, the columns that share `scale`, a multiple of `2 * step`; else 0.
        fine: int8 `[panels, cols / step / 2, 16, 2]`, what `scale` is multiplied by in each step.
        fine_zero: the same for `zero`; None where there is none, or with `joined`.
        joined: whether `fine` has both, scales in the lower four bits and minima in the upper.
        level: what codes stand for, 256 entries (ways `floats` and `small`).
        table: the same as bytes, 16 entries (way `table`), `unit` times as large as they should be.
    """

    way: Literal["floats", "codes", "table", "dense", "wide", "small"]
    rows: int
    bits: int
    step: int
    codes: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None
    minus: bool = False
    offset: float = 0.0
    over: int = 0
    fine: Int8[Tensor, "panels pairs 16 2"] | None = None
    fine_zero: Int8[Tensor, "panels pairs 16 2"] | None = None
    joined: bool = False
    level: Float[Tensor, "256"] | None = None
    table: UInt8[Tensor, "16"] | None = None
    unit: float = 1.0

    @property
    def cols(self) -> int:
        """Columns with those that fill up, a multiple of 32."""
        return self.codes.shape[1] if self.way in ("dense", "wide") else self.codes.shape[1] * 32 // self.bits

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads of it."""
        return sum(part.nbytes for name in PANEL_PARTS if (part := getattr(self, name)) is not None)

    @property
    def sub(self) -> int:
        """Inputs that are rounded together, where they are: as llama.cpp does it, also for ternary blocks of 256."""
        if self.over or self.way == "wide" or (self.bits == 2 and self.step == 256):
            return self.over or self.step
        if self.way == "small":
            return min(self.step, WIDE_RUN)
        return 16 if self.step % 32 else 32


@final
class Matrix:
    """A weight that can be multiplied; checked once.

    Attributes:
        rows: of the weight, outputs.
        inputs: columns that it takes.
    """

    def __init__(
        self,
        panels: Panels,
        inputs: int,
        order: Int64[Tensor, "inputs"] | None = None,
        bias: Float[Tensor, "rows"] | None = None,
    ) -> None:
        """`inputs`: columns that are there, of which `order` says how the panels have them; `bias` is added."""
        _check_panels(panels)
        if not 0 <= inputs <= panels.cols:
            raise ValueError(f"inputs is {inputs} where the panels have {panels.cols} columns")
        if order is not None:
            _check("order", order, (inputs,), torch.int64)
            if not torch.equal(order.sort().values, torch.arange(inputs)):
                raise ValueError("order must name every input once")
        if bias is not None:
            _check("bias", bias, (panels.rows,), torch.float32)
        self.rows, self.inputs = panels.rows, inputs
        self.handle = _native.Matrix(
            WAYS.index(panels.way), panels.bits, panels.step, panels.over or panels.step, panels.sub, panels.rows,
            panels.cols, panels.codes.view(torch.uint8), panels.scale, panels.zero, _as_bytes(panels.fine),
            _as_bytes(panels.fine_zero), panels.joined, panels.minus, panels.offset, panels.level, panels.table,
            panels.unit, WEIGHT_DTYPES.index(panels.codes.dtype) if panels.way == "dense" else 0,
            inputs, order, bias, (panels, order, bias),
        )  # fmt: skip

    def __call__(self, inputs: Float[Tensor, "tokens inputs"], threads: int = 1) -> Float[Tensor, "tokens rows"]:
        """`inputs @ weight.T + bias` in float32.

        With the ways `codes` and `table`, inputs are rounded to int8 in blocks of 32, of 16 where scales are such, of a
        run where scales are nested, or of the 256 that share a scale of 2-bit codes; with `wide`, to 16 bits in runs of
        256 (`interleave_wide`), and so with `small` where tokens are 16 or more, in runs of a step that has fewer.
        Sums are in an order of the weight's own: any number of threads and every instruction set gives the same bits.
        """
        _check("inputs", inputs, (inputs.shape[0], self.inputs), torch.float32)
        out = torch.empty(inputs.shape[0], self.rows, dtype=torch.float32)
        self.handle.multiply(inputs.detach(), max(threads, 1), out)
        return out


KEEPS = ("float32", "float16", "int8")


@final
@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a decoder of the Llama family.

    Attributes:
        hidden: width of the hidden state.
        heads: of queries; a multiple of `key_heads`.
        head_size: a multiple of 16.
        inner: width of the feed-forward layer.
        turned: dimensions of a head that turn with the position, even.
        epsilon: of its norms.
        scale: of attention's scores.
        cap: of these: they become `cap * tanh(score / cap)`; 0 for none.
        gelu: whether the feed-forward layer's gate is GELU (with tanh), not SiLU.
    """

    hidden: int
    heads: int
    key_heads: int
    head_size: int
    inner: int
    turned: int
    epsilon: float
    scale: float
    cap: float = 0.0
    gelu: bool = False


@final
@dataclass(frozen=True)
class DecoderLayer:
    """Weights of a block: matrices, the norms before attention and feed-forward, and others where it has these.

    Attributes:
        attended: norm of what attention gives.
        fed: norm of what the feed-forward layer gives.
        window: positions that a token sees; 0 for all before it.
        angles: number of the table of angles that turns its heads; -1 for none.
    """

    query: Matrix
    key: Matrix
    value: Matrix
    output: Matrix
    gate: Matrix
    up: Matrix
    down: Matrix
    before: Float[Tensor, "hidden"]
    after: Float[Tensor, "hidden"]
    query_norm: Float[Tensor, "head_size"] | None = None
    key_norm: Float[Tensor, "head_size"] | None = None
    attended: Float[Tensor, "hidden"] | None = None
    fed: Float[Tensor, "hidden"] | None = None
    window: int = 0
    angles: int = 0


@final
@dataclass(frozen=True)
class DecoderEnds:
    """What stands before and after the blocks.

    Attributes:
        embedding: of tokens.
        norm: weight of that before the head.
        head: gives logits.
        steps: of each table of angles, the turn of each pair of dimensions per position.
        factors: of each, what cosine and sine are multiplied by.
        factor: of embeddings.
    """

    embedding: Table
    norm: Float[Tensor, "hidden"]
    head: Matrix
    steps: Float[Tensor, "tables pairs"]
    factors: Float[Tensor, "tables"]
    factor: float = 1.0


MATRICES = ("query", "key", "value", "output", "gate", "up", "down")
NORMS = ("before", "after", "query_norm", "key_norm", "attended", "fed")


@final
class Cache:
    """Keys and values of one text in all blocks of a decoder, which makes it.

    Attributes:
        known: tokens that it has.
        limit: most that it takes; it grows to that.
    """

    def __init__(self, handle: _native.Cache, limit: int) -> None:
        self.handle, self.limit, self.known = handle, limit, 0

    def forget(self, known: int) -> None:
        """Keep the first tokens alone."""
        if not 0 <= known <= self.known:
            raise ValueError(f"{known} tokens cannot be kept of {self.known}")
        self.known = known

    @property
    def nbytes(self) -> int:
        """Bytes that are set aside."""
        return self.handle.bytes


@final
class Decoder:
    """A model of the Llama family."""

    def __init__(self, shape: DecoderShape, layers: Sequence[DecoderLayer], ends: DecoderEnds, threads: int) -> None:
        sizes = (shape.hidden, shape.heads, shape.key_heads, shape.head_size, shape.inner, shape.turned)
        odd = min(sizes) < 1 or shape.head_size % 16 or shape.heads % shape.key_heads or shape.turned % 2
        if odd or shape.turned > shape.head_size:
            raise ValueError(f"{shape} is no decoder that runs here")
        if any(layer.window < 0 or not -1 <= layer.angles < len(ends.factors) for layer in layers):
            raise ValueError("windows are at least 0, and angles are of tables that are there, or -1")
        _check_ends(ends, shape)
        self.shape, self._texts = shape, 0
        self._ends, self._layers = ends, tuple(layers)  # their memory is read
        self._handle = _native.Decoder(
            shape.hidden, shape.heads, shape.key_heads, shape.head_size, shape.inner, shape.turned, shape.epsilon,
            shape.scale, shape.cap, shape.gelu, ends.embedding.handle, ends.factor, ends.norm, ends.head.handle,
            ends.steps, ends.factors, max(threads, 1),
        )  # fmt: skip
        for layer in layers:
            self._add(layer)

    def _add(self, of: DecoderLayer) -> None:
        shape = self.shape
        queries, keys = shape.heads * shape.head_size, shape.key_heads * shape.head_size
        wanted = {
            "query": (queries, shape.hidden), "key": (keys, shape.hidden), "value": (keys, shape.hidden),
            "output": (shape.hidden, queries), "gate": (shape.inner, shape.hidden), "up": (shape.inner, shape.hidden),
            "down": (shape.hidden, shape.inner),
        }  # fmt: skip
        for name, size in wanted.items():
            matrix: Matrix = getattr(of, name)
            if (matrix.rows, matrix.inputs) != size:
                raise ValueError(f"{name} is {matrix.rows} x {matrix.inputs}; it must be {size[0]} x {size[1]}")
        for name in NORMS:
            if getattr(of, name) is not None:
                count = shape.head_size if name in ("query_norm", "key_norm") else shape.hidden
                _check(name, getattr(of, name), (count,), torch.float32)
        matrices = [getattr(of, name).handle for name in MATRICES]
        self._handle.add(matrices, [getattr(of, name) for name in NORMS], of.window, of.angles)

    def cache(self, keep: str = "float32", limit: int = 1 << 31) -> Cache:
        """Room for the keys and values of a text, kept as `float32`, `float16` or `int8` (a scale for each 32)."""
        if keep not in KEEPS:
            raise ValueError(f"keys and values are kept as one of {', '.join(KEEPS)}, not as {keep}")
        return Cache(self._handle.cache(KEEPS.index(keep)), limit)

    def read(self, ids: Sequence[int], parts: Sequence[tuple[Cache, int]]) -> bool:
        """Some tokens for each text, at least one, after those that it has; then it has these too.

        The tokens of all texts stand one after the other. False, and nothing is done, where an embedding is not finite.
        """
        if len(ids) != sum(count for _, count in parts) or any(count < 1 for _, count in parts):
            raise ValueError(f"{len(ids)} tokens for {[count for _, count in parts]}")
        self._ends.embedding.check(ids)
        if len({id(cache) for cache, _ in parts}) < len(parts):
            raise ValueError("a text is there twice")
        for cache, count in parts:
            if cache.known + count > cache.limit:
                raise ValueError(f"{cache.known} tokens and {count} more are over the limit of {cache.limit}")
        for cache, count in parts:
            cache.handle.reserve(min(max(cache.known + count, _ROOM), max(cache.limit, 1)))
        caches, known = [cache.handle for cache, _ in parts], [cache.known for cache, _ in parts]
        if not self._handle.read(list(ids), caches, known, [count for _, count in parts]):
            return False
        for cache, count in parts:
            cache.known += count
        self._texts = len(parts)
        return True

    def logits(self) -> Float[Tensor, "texts rows"]:
        """After the last token of each text that was read last."""
        out = torch.empty(self._texts, self._ends.head.rows, dtype=torch.float32)
        self._handle.logits(out)
        return out

    def likeliest(self) -> list[int]:
        """The greatest of these."""
        return self._handle.likeliest()


def _check_ends(of: DecoderEnds, shape: DecoderShape) -> None:
    _check("norm", of.norm, (shape.hidden,), torch.float32)
    _check("angles", of.steps, (len(of.factors), shape.turned // 2), torch.float32)
    _check("factors", of.factors, (len(of.factors),), torch.float32)
    found = (of.embedding.rows, of.embedding.cols, of.head.inputs)
    if found != (of.head.rows, shape.hidden, shape.hidden):
        raise ValueError(f"embedding is {found[0]} x {found[1]}; it must be {of.head.rows} x {shape.hidden}")


def interleave(
    codes: UInt8[Tensor, "rows cols"], order: Int64[Tensor, "cols"] | None, bits: int, full: int, threads: int = 1
) -> UInt8[Tensor, "panels words 64"]:
    """Codes as `Panels.codes` of `full` columns, of which column c is `order[c]` of the codes."""
    rows, cols = _two(codes.shape)
    _check("codes", codes, (rows, cols), torch.uint8)
    if bits not in CODE_BITS or full < cols or full % 32:
        raise ValueError(f"{cols} columns of {bits} bits make no panels of {full}")
    if order is not None:
        _check_order(order, cols)
    out = _room((ceil(rows / 16), full * bits // 32, 64), torch.uint8)
    _native.interleave(codes, order, bits, full, max(threads, 1), out)
    return out


@final
@dataclass(frozen=True)
class GgmlPanels:
    """Blocks of a type of ggml as parts of `Panels`; None where the type has none.

    Attributes:
        codes: of every weight, in the bits that the type has.
        scale: of each block.
        zero: what each block subtracts, or the scale of these where they are integers.
        fine: integers of scales; those of minima too (`Panels.joined`), where both have four bits in the type.
        fine_zero: integers of minima.
        finite: whether `scale` and `zero` are.
        wide: whether an integer of `fine` or `fine_zero` has more than four bits, where both are there.
    """

    codes: UInt8[Tensor, "panels words 64"]
    scale: Float[Tensor, "panels blocks 16"]
    zero: Float[Tensor, "panels blocks 16"] | None
    fine: Int8[Tensor, "panels pairs 16 2"] | None
    fine_zero: Int8[Tensor, "panels pairs 16 2"] | None
    finite: bool
    wide: bool


def ggml_panels(
    type: int,
    stored: UInt8[Tensor, "rows bytes"],
    order: Int64[Tensor, "rows"] | None,
    threads: int = 1,
    room: Room | None = None,
) -> GgmlPanels | None:
    """What `interleave` and `interleave_floats` make of rows of blocks that `ggml_unpack` took apart, row r `order[r]`.

    None for types that have no such way. Floats are float16. They lie in `room`, if that is given.
    """
    bits, (weights, size, subs, has_min, _) = _native.ggml_panel_bits(type), _ggml_shape(type)
    rows, width = _two(stored.shape)
    _check("stored", stored, (rows, width), torch.uint8)
    if width % size:
        raise ValueError(f"blocks of {size} bytes do not divide rows of {width}")
    if not bits:
        return None
    if order is not None:
        _check_order(order, rows)
    down, blocks = ceil(rows / 16), width // size
    apart = has_min and bits > 2  # integers of minima have a place of their own
    take = room.take if room else _room
    codes = take((down, blocks * weights * bits // 32, 64), torch.uint8)
    scale = take((down, blocks, 16), torch.float16)
    zero = take((down, blocks, 16), torch.float16) if has_min else None
    fine, fine_zero = (
        take((down, blocks * subs // 2, 16, 2), torch.int8) if there else None for there in (subs, subs and apart)
    )
    finite, wide = _native.ggml_panels(
        type, stored, blocks, order, max(threads, 1), codes, scale.view(torch.uint8), _as_bytes(zero), _as_bytes(fine),
        _as_bytes(fine_zero),
    )  # fmt: skip
    return GgmlPanels(codes, scale, zero, fine, fine_zero, finite, wide)


def interleave_floats(
    values: Float[Tensor, "rows cols"], full: int, threads: int = 1
) -> Float[Tensor, "panels full 16"]:
    """Floats of 16 or 32 bits in panels of 16 rows and `full` columns, zeros where there are none."""
    rows, cols = _weight(values)
    if full < cols:
        raise ValueError(f"{cols} columns are more than {full}")
    out = _room((ceil(rows / 16), full, 16), values.dtype)
    _native.interleave_floats(values.detach(), full, max(threads, 1), out)
    return out


def interleave_wide(
    values: Float[Tensor, "rows cols"], full: int, threads: int = 1
) -> tuple[Int16[Tensor, "panels full 16"], Float[Tensor, "panels runs 16"]] | None:
    """Floats as integers of 16 bits and the scale of each run of `WIDE_RUN` columns; None where one is not finite.

    A run of integers has a norm (the root of the sum of squares) of 46300, or its largest is 12287, whichever is less;
    that of inputs has 46300 or 20479. So the sum of products fits int32, and its error is a share of both norms.
    """
    panels = interleave_floats(values, full, threads)
    words = panels.view(torch.int16) if panels.element_size() == 2 else _room(tuple(panels.shape), torch.int16)
    scale = torch.empty(len(panels), -(-full // WIDE_RUN), 16, dtype=torch.float32)
    finite = _native.widen_panels(panels, len(panels), full, max(threads, 1), words.view(torch.uint8), scale)
    return (words, scale) if finite else None


def _check_order(order: Tensor, count: int) -> None:
    _check("order", order, (count,), torch.int64)
    if count and not 0 <= int(order.min()) <= int(order.max()) < count:
        raise ValueError(f"order must name places below {count}")


def _room(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An empty tensor; a large one in large pages, where looking up addresses does not hold up reading."""
    size = prod(shape) * dtype.itemsize
    return (torch.empty(size, dtype=torch.uint8) if size < _LARGE else _pages(size)).view(dtype).view(shape)


def _pages(size: int) -> UInt8[Tensor, " size"]:
    if sys.platform != "linux":
        return torch.empty(size, dtype=torch.uint8)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory seldom gets large pages
    pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


@final
class Room:
    """Memory for many tensors that live together: small ones are in large pages too, and no page is half used."""

    def __init__(self) -> None:
        self._lock, self._free = threading.Lock(), torch.empty(0, dtype=torch.uint8)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An empty tensor; any thread may ask."""
        size = prod(shape) * dtype.itemsize
        with self._lock:
            if self._free.numel() < size:
                self._free = _pages(-(-max(size, _REGION) // _PAGE) * _PAGE)
            found, self._free = self._free[:size], self._free[-(-size // 64) * 64 :]
        return found.view(dtype).view(shape)


def runs_fit(step: int, cols: int) -> bool:
    """Whether small floats can be multiplied as 16 bits: runs of 256 columns have one scale, those of a step fewer."""
    return step % 32 == 0 and (step <= WIDE_RUN or step % WIDE_RUN == 0 or step == cols)


def _check_panels(of: Panels) -> None:
    down = ceil(of.rows / 16)
    if of.way == "dense":
        _check("codes", of.codes, (down, of.cols, 16), *WEIGHT_DTYPES)
        return
    if of.way == "wide":
        _check_wide(of, down)
        return
    fits = of.bits in CODE_BITS and (of.way != "table" or of.bits == 4)
    if not fits or of.step < 16 or of.step % 16 or of.cols % 32 or of.cols % of.step:
        raise ValueError(f"{of.cols} columns of {of.bits} bits in steps of {of.step} make no panels")
    _check("codes", of.codes, (down, of.cols * of.bits // 32, 64), torch.uint8)
    _check_nested(of, down)
    for name, part in {"scale": of.scale, "zero": of.zero}.items():
        if part is not None or name == "scale":
            assert part is not None and of.scale is not None
            _check(name, part, (down, of.cols // (of.over or of.step), 16), torch.float16, torch.float32)
            if part.dtype != of.scale.dtype:
                raise ValueError(f"zero is {part.dtype} beside scales in {of.scale.dtype}")
    if not float(of.offset).is_integer() or abs(of.offset) > 128:
        raise ValueError(f"the offset of codes is {of.offset}; it must be an integer of at most 128")
    if of.way == "small" and not (of.bits == 8 and of.zero is None and runs_fit(of.step, of.cols)):
        raise ValueError(f"{of.bits} bits in steps of {of.step} on {of.cols} columns are no panels of small floats")
    wanted = {"floats": of.level, "small": of.level, "table": of.table}.get(of.way, of.codes)
    if wanted is None:
        raise ValueError(f"panels for {of.way} need what codes stand for")
    if of.level is not None:
        _check("level", of.level, (256,), torch.float32)
    if of.table is not None:
        _check("table", of.table, (16,), torch.uint8)


def _check_wide(of: Panels, down: int) -> None:
    if of.cols % 32 or (of.bits, of.step, of.over) != (16, WIDE_RUN, 0) or of.scale is None:
        raise ValueError(f"{of.cols} columns of {of.bits} bits in steps of {of.step} are no wide panels")
    _check("codes", of.codes, (down, of.cols, 16), torch.int16)
    _check("scale", of.scale, (down, ceil(of.cols / WIDE_RUN), 16), torch.float32)


def _check_nested(of: Panels, down: int) -> None:
    """`over` and the integers of nested scales; the sums of a run must fit int32."""
    fine = (of.fine, of.fine_zero)
    if not of.over:
        if any(part is not None for part in fine) or of.joined:
            raise ValueError("steps have integers, and no run that they are in")
        return
    if of.step not in (16, 32) or of.over % (2 * of.step) or not 0 < of.over <= 512 or of.cols % of.over:
        raise ValueError(f"steps of {of.step} in runs of {of.over} on {of.cols} columns make no panels")
    apart = of.zero is not None and not of.joined
    if of.way not in ("codes", "table") or of.bits == 8 or of.fine is None or apart != (of.fine_zero is not None):
        raise ValueError(f"nested scales of {of.bits} bits for {of.way} need integers for scales and for minima")
    if (of.zero is not None) != of.minus:
        raise ValueError("nested zero points are minima")
    for name, part in zip(("fine", "fine_zero"), fine, strict=True):
        if part is not None:
            _check(name, part, (down, of.cols // of.step // 2, 16, 2), torch.int8)


def _as_bytes(part: Tensor | None) -> Tensor | None:
    return None if part is None else part.view(torch.uint8)


def _causal(period: int, first: int, scale: float) -> None:
    if period < 1 or first < 0 or not scale > 0:
        raise ValueError(f"period {period} must be at least 1, first {first} at least 0, scale {scale} above 0")


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}; it must be {' or '.join(map(str, dtypes))}")
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {list(tensor.shape)}; it must be {list(shape)}")
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous and on the CPU")


def _check_lines(name: str, words: Tensor, shape: tuple[int, int]) -> None:
    """As `_check` for words whose rows are contiguous each."""
    _check(name, words[:1], (min(shape[0], 1), shape[1]), torch.int32)
    if tuple(words.shape) != shape:
        raise ValueError(f"{name} has shape {list(words.shape)}; it must be {list(shape)}")


def _lines_out(out: Tensor | None, shape: tuple[int, int]) -> Tensor:
    words = torch.empty(shape, dtype=torch.int32) if out is None else out
    _check_lines("out", words, shape)
    return words


def _two(shape: tuple[int, ...]) -> tuple[int, int]:
    if len(shape) != 2:
        raise ValueError(f"a matrix is needed, and the shape is {list(shape)}")
    return shape[0], shape[1]


def _weight(weight: Tensor) -> tuple[int, int]:
    shape = _two(weight.shape)
    _check("weight", weight, shape, *WEIGHT_DTYPES)
    return shape


def _blocks(shape: tuple[int, int], block_rows: int, block_cols: int) -> tuple[int, int]:
    if block_rows < 1 or block_cols < 1:
        raise ValueError(f"a block of {block_rows} x {block_cols} elements is empty; both must be at least 1")
    return -(-shape[0] // block_rows), -(-shape[1] // block_cols)


def _rule(coder: Coder) -> tuple[int, int, bool, bool, Tensor | None, Tensor | None, Tensor | None]:
    """A coder as the extension takes it."""
    if coder.levels is not None:
        _check("coder.levels", coder.levels, (min(max(coder.levels.numel(), 1), 256),), torch.float32)
    if (coder.levels is None) != (coder.codes is None) or (coder.levels is None) != (coder.table is None):
        raise ValueError("levels, codes and table of a coder are given together or not at all")
    rounding = coder.offset, coder.code_max, coder.round_sum, coder.keep_zeros
    return *rounding, coder.levels, coder.codes, coder.table


def _scales(blocks: tuple[int, int], scale: Tensor, zero: Tensor | None) -> None:
    _check("scale", scale, blocks, torch.float32)
    if zero is not None:
        _check("zero", zero, blocks, torch.float32)


def _quantized(
    codes: Tensor, scale: Tensor, zero: Tensor | None, levels: Tensor | None, block_rows: int, block_cols: int
) -> None:
    _check("codes", codes, _two(codes.shape), torch.uint8)
    _scales(_blocks(_two(codes.shape), block_rows, block_cols), scale, zero)
    if levels is not None:
        _check("levels", levels, (256,), torch.float32)
    if levels is None and zero is None:
        raise ValueError("levels are needed where there is no zero")


def _eighth(rows: int) -> int:
    if rows % 8:
        raise ValueError(f"there are {rows} rows; they must be a multiple of 8")
    return rows // 8


def _words(cols: int, bits: int) -> int:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits is {bits}; it must be 1 to 8")
    return ceil(cols * bits / 32)


def _out(out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype = torch.uint8) -> Tensor:
    result = torch.empty(shape, dtype=dtype) if out is None else out
    _check("out", result, shape, dtype)
    return result
