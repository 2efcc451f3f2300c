"""Scales, zero points and codes: the arithmetic that the methods share.

A method reads the range of every block, turns ranges into `Affine` maps (`fit`), perhaps improves them, and encodes
the weight under them. Scales and zero points are rounded to the type in which they are stored before any code is
computed, so that what is stored is what was meant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from math import isfinite
from typing import Literal, final

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from lowbit import native
from lowbit.errors import WeightError
from lowbit.methods import Stats, _elsewhere
from lowbit.schemes import FLOATS, Block, Grid, ScaleType, Scheme
from lowbit.tensors import QTensor, block_size, level_table, scale_shape, view_shape

Blocks = Float[Tensor, "down across"]
Range = tuple[Blocks, Blocks]

_TYPES: dict[ScaleType, torch.dtype] = {**FLOATS, "e4m3": torch.float8_e4m3fn}
_FP8: dict[str, Literal["e4m3fn", "e5m2"]] = {"fp8-e4m3": "e4m3fn", "fp8-e5m2": "e5m2"}
_LARGEST = torch.finfo(torch.float32).max
_DIVISOR_LIMIT = 2.0**126  # the reciprocal of a global divisor stays a normal float32
_REGION = 1 << 21  # weights, mostly a piece: where calls are short, threads wait for each other between them


@final
@dataclass(frozen=True)
class Affine:
    """What turns codes into weights, block by block, before it becomes part of a `QTensor`.

    Attributes:
        scales: as they are stored, every value exact in the scheme's type of scales.
        zeros: in units of a code (kind `min`: of the weight), float32; None where the scheme has none.
        divisor: divides all scales, a float32 value; 1 unless the scales are quantized under one scale (NVFP4).
    """

    scales: Blocks
    zeros: Blocks | None
    divisor: float = 1.0

    @property
    def unit(self) -> float:
        """The float32 reciprocal of the divisor: scale of the scales."""
        return (1 / torch.tensor(self.divisor)).item()

    def __getitem__(self, blocks: tuple[slice, slice]) -> Affine:
        """The part for some blocks."""
        zeros = None if self.zeros is None else self.zeros[blocks].contiguous()
        return Affine(self.scales[blocks].contiguous(), zeros, self.divisor)

    def to(self, device: torch.device | str) -> Affine:
        """The same on a device."""
        return Affine(self.scales.to(device), None if self.zeros is None else self.zeros.to(device), self.divisor)

    def where(self, mask: Tensor, other: Affine) -> Affine:
        """This map where the mask is set, the other elsewhere."""
        zeros = None
        if self.zeros is not None and other.zeros is not None:
            zeros = torch.where(mask, self.zeros, other.zeros)
        return Affine(torch.where(mask, self.scales, other.scales), zeros, self.divisor)


def shares_rows(scheme: Scheme) -> bool:
    """Whether one scale spans all rows of a weight, so that no run of rows can choose it alone."""
    return scheme.block.rows == 0 and not scheme.block.flat


def unscaled(scheme: Scheme) -> str | None:
    """Why scales and zero points that are chosen here cannot serve a scheme; None where they can."""
    if scheme.grid.kind == "vectors":
        return "no method makes vectors of codebooks yet; convert keeps those of a checkpoint"
    if scheme.zero == "quantized":
        return "no method makes SpQR's zero points and outliers yet; convert keeps those of a checkpoint"
    if scheme.nested and not scheme.nested.offset and scheme.scale != "e4m3":
        return "its scales in super-blocks are llama.cpp's; use ggml-fit, or with --calibration gptq or imatrix-fit"
    return None


def has_free_zeros(scheme: Scheme) -> bool:
    """Whether zero points are no codes: any float, or a minimum in units of the weight."""
    return scheme.zero in ("float", "min")


def zero_unit(scales: Tensor, scheme: Scheme) -> Tensor | float:
    """What a code is in the units of zero points: these count codes, but for minima, which are of the weight."""
    return scales if scheme.zero == "min" else 1.0


def code_zeros(zeros: Tensor | None, scales: Tensor, scheme: Scheme) -> Tensor | None:
    """Zero points in units of a code."""
    return zeros if zeros is None or scheme.zero != "min" else zeros / zero_unit(scales, scheme)


def finite_range(weight: Float[Tensor, "rows cols"], stats: Stats, scheme: Scheme) -> Range:
    """Least and greatest value of every block; those of the whole tensor (`stats["range"]`) where blocks span all rows.

    Raises:
        WeightError: NaN or Inf, with its value, row and column in `weight`.
    """
    low, high, bad = native.block_range(weight, *block_size(tuple(weight.shape), scheme.block))
    if bad >= 0:
        row, col = divmod(bad, weight.shape[1])
        raise WeightError(f"{weight[row, col].item()} at row {row}, column {col} (element {bad})")
    if "range" in stats and shares_rows(scheme):
        least, greatest = stats["range"].float()
        return least.expand_as(low).clone(), greatest.expand_as(high).clone()
    return low, high


def global_divisor(ranges: Range, stats: Stats, scheme: Scheme) -> float:
    """NVFP4's global scale g, as it is stored: largest scale times largest level, over the largest weight (float32).

    Block scales are quantized as g * scale; 1 for other schemes and for an all-zero tensor. Tensors whose largest
    value is below 3e-35 get 2**126.
    """
    if scheme.nested is None or scheme.nested.offset or ranges[0].numel() == 0:
        return 1.0
    low, high = stats["range"].float() if "range" in stats else (ranges[0].min(), ranges[1].max())
    largest = torch.maximum(-low, high)
    top = _reach(scheme.nested.grid) * _reach(scheme.grid)
    return (top / largest).clamp(max=_DIVISOR_LIMIT).item() if largest > 0 else 1.0


def fit(ranges: Range, scheme: Scheme, divisor: float = 1.0) -> Affine:
    """Scales and zero points that cover these ranges: round-to-nearest's choice.

    Symmetric integers: `scale = 2 * absmax / (2**bits - 1)`, as GPTQ and compressed-tensors. Other tables: the least
    scale under which nothing clips on the sides that the table has. Integer zero points: the range is widened to
    hold 0, `scale = (max - min) / (2**bits - 1)`, `zero = rint(-min / scale)`. Float zero points: the range as it is,
    `zero = -min / scale`; minima that are subtracted: `-min`. An all-zero block has scale 1.
    """
    if has_free_zeros(scheme):
        return _free_zero(ranges, scheme)
    low, high = ranges[0].clamp(max=0), ranges[1].clamp(min=0)
    largest = torch.maximum(-low, high)
    if scheme.zero == "int":
        top = 2**scheme.grid.bits - 1
        scales = round_scales((high - low) / top, largest, scheme)
        return Affine(scales, round_zeros(-low / scales, scheme))
    wanted = divisor * _covering_scale(low, high, largest, scheme.grid)
    return Affine(round_scales(wanted, largest, scheme), None, divisor)


def takes_signs(scheme: Scheme) -> bool:
    """Whether scales may be negative: for integers whose least level has no counterpart, in a type with a sign."""
    whole = scheme.grid.kind == "int" and scheme.grid.bits > 1 and scheme.zero == "none"
    return whole and not scheme.nested and scheme.scale in FLOATS


def fit_signed(ranges: Range, scheme: Scheme) -> Affine:
    """Scales of either sign: the end of each range that is further from 0 is the level `-2**(bits - 1)`."""
    low, high = ranges[0].clamp(max=0), ranges[1].clamp(min=0)
    largest = torch.maximum(-low, high)
    scales = round_scales(largest / 2.0 ** (scheme.grid.bits - 1), largest, scheme)
    return Affine(torch.where(high > -low, -scales, scales), None)


def round_scales(scales: Blocks, largest: Blocks, scheme: Scheme) -> Blocks:
    """Scales in the type that stores them: nearest, ties to even, never 0 nor infinite; 1 where a block is all zero.

    All-zero blocks have the least positive scale instead where the grid has no 0, and where scales are doubly
    quantized: a 1 would stretch the range in which `nest` has to store the scales of their neighbours.

    For E8M0 the rule of the OCP MX specification 1.0 (section 6.3) is applied to `largest`, the greatest magnitude
    in each block, and `scales` is not read.
    """
    if scheme.scale == "e8m0":
        return torch.where(largest > 0, _power_of_two(largest, scheme.grid), 1.0)
    info = torch.finfo(_TYPES[scheme.scale])
    least = info.smallest_normal * info.eps
    reach = _reach(scheme.grid) if scheme.zero == "none" else 2.0**scheme.grid.bits
    greatest = min(info.max, _LARGEST / reach)  # no code may stand for more than float32 holds
    rounded = scales.clamp(least, greatest).to(_TYPES[scheme.scale]).float()
    idle = least if 0.0 not in scheme.grid.levels or (scheme.nested and scheme.nested.offset) else 1.0
    return torch.where(largest > 0, rounded, idle)


def round_zeros(zeros: Blocks, scheme: Scheme) -> Blocks:
    """Zero points as they are stored: codes of the grid, or the type of the scales (finite); never -0."""
    if scheme.zero == "int":
        return zeros.round().clamp(0, 2**scheme.grid.bits - 1) + 0.0
    kind = _TYPES[scheme.scale]
    limit = torch.finfo(kind).max
    return zeros.clamp(-limit, limit).to(kind).float() + 0.0


def _applied(affine: Affine, scheme: Scheme) -> tuple[Blocks, Blocks | None]:
    """What codes are multiplied by, and zero points in units of a code."""
    scales = affine.scales * affine.unit
    return scales, code_zeros(affine.zeros, scales, scheme)


def encode(
    weight: Float[Tensor, "rows cols"],
    affine: Affine,
    scheme: Scheme,
    block: tuple[int, int],
    out: UInt8[Tensor, "rows cols"] | None = None,
) -> UInt8[Tensor, "rows cols"]:
    """The codes nearest to the weight, in `out` where it is given; `block` is the size of one block in elements."""
    grid, (scales, zeros) = scheme.grid, _applied(affine, scheme)
    if grid.kind == "int":
        offset, top, fractional = 2 ** (grid.bits - 1), 2**grid.bits - 1, has_free_zeros(scheme)
        return native.quantize_affine(weight, scales, zeros, offset, top, *block, round_sum=fractional, out=out)
    if grid.name in _FP8:
        return native.quantize_fp8(weight, scales, _FP8[grid.name], *block, out=out)
    return native.quantize_levels(weight, scales, *_sorted_levels(grid), *block, out=out)


def coder_of(scheme: Scheme) -> native.Coder:
    """The rule by which `encode` finds codes."""
    grid = scheme.grid
    if grid.kind == "int":
        return native.Coder(2 ** (grid.bits - 1), 2**grid.bits - 1, has_free_zeros(scheme), True)
    levels, codes = _sorted_levels(grid)
    return native.Coder(keep_zeros=0.0 in grid.levels, levels=levels, codes=codes, table=level_table(grid))


@cache
def rounder_of(scheme: Scheme, device: torch.device) -> _elsewhere.Rounder:
    """The same on another device, where it is asked for each candidate."""
    return _elsewhere.Rounder.of(coder_of(scheme), device)


def residual(
    weight: Float[Tensor, "rows cols"], affine: Affine, scheme: Scheme, block: tuple[int, int]
) -> Float[Tensor, "rows cols"]:
    """Encoded and decoded weight minus the weight, in float32."""
    scales, zeros = _applied(affine, scheme)
    if weight.device.type != "cpu":
        return _elsewhere.residual(weight, scales, zeros, rounder_of(scheme, weight.device), block)
    codes = encode(weight, affine, scheme, block)
    decoded = native.dequantize(codes, scales, zeros, level_table(scheme.grid), *block)
    return decoded.sub_(weight)


def squared_errors(
    weight: Float[Tensor, "rows cols"],
    affine: Affine,
    scheme: Scheme,
    block: tuple[int, int],
    importance: Float[Tensor, "cols"] | None = None,
) -> Blocks:
    """Of each block the mean of the squares of `residual`, each times the importance of its column.

    Blocks divide the matrix exactly. In one pass where codes are found without a search in memory.
    """
    if weight.device.type != "cpu" or (scheme.grid.kind != "int" and len(scheme.grid.levels) > 16):
        squares = residual(weight, affine, scheme, block).square_()
        return block_mean(squares if importance is None else squares.mul_(importance), block)
    sums = native.block_errors(weight, *_applied(affine, scheme), coder_of(scheme), *block, importance=importance)
    return sums.div_(block[0] * block[1])


def block_mean(values: Float[Tensor, "rows cols"], block: tuple[int, int]) -> Blocks:
    """Mean over each block; blocks divide the matrix exactly."""
    rows, cols = values.shape
    means = values.view(rows // block[0], block[0], cols // block[1], block[1]).mean(3)
    return means.mean(1) if block[0] > 1 else means[:, 0]


def finish(
    weight: Float[Tensor, "rows cols"],
    affine: Affine,
    scheme: Scheme,
    out: UInt8[Tensor, "rows cols"] | None = None,
) -> QTensor:
    """The weight encoded under these scales and zero points, its codes in `out` where that is given.

    Double quantization with an offset is left to `nest`: the result then has float32 scales and no nested scheme.
    """
    shape = (weight.shape[0], weight.shape[1])
    if scheme.nested and scheme.nested.offset:
        scheme = replace(scheme, nested=None)
    codes = encode(weight, affine, scheme, block_size(shape, scheme.block), out)
    zeros = affine.zeros.to(torch.uint8) if affine.zeros is not None and scheme.zero == "int" else affine.zeros
    if scheme.zero == "min":
        return QTensor(scheme, shape, codes, affine.scales, minima=zeros)
    if scheme.nested is None:
        return QTensor(scheme, shape, codes, affine.scales, zeros)
    blocks = (affine.scales.shape[0], affine.scales.shape[1])
    unit = torch.full(scale_shape(blocks, scheme.nested.block), affine.unit)
    scales = QTensor(scheme.nested, blocks, affine.scales.to(_TYPES["e4m3"]).view(torch.uint8), unit)
    return QTensor(scheme, shape, codes, scales, zeros)


def nearest(
    weight: Float[Tensor, "rows cols"], stats: Stats, scheme: Scheme, out: UInt8[Tensor, "rows cols"] | None = None
) -> QTensor:
    """Round to nearest: scales from the range of each block, in two passes over the weight; codes go to `out`, if any.

    Raises:
        WeightError: NaN or Inf, with its place.
    """
    ranges = finite_range(weight, stats, scheme)
    return finish(weight, fit(ranges, scheme, global_divisor(ranges, stats, scheme)), scheme, out)


def refine(
    weight: Float[Tensor, "rows cols"],
    ranges: Range,
    best: Affine,
    scheme: Scheme,
    search: Callable[[Float[Tensor, "high wide"], Range, Affine, tuple[int, int], slice], Affine],
    size: int = _REGION,
) -> Affine:
    """A map improved part by part, in place: `search(part, ranges, best, block, columns)` gives each part's own.

    `size`: weights of a part.
    """
    low, high = ranges
    for rows, cols, down, across, block in regions((weight.shape[0], weight.shape[1]), scheme.block, size):
        part, at = weight[rows, cols].float().contiguous(), (down, across)
        found = search(part, (low[at], high[at]), best[at], block, cols)
        best.scales[at] = found.scales
        if found.zeros is not None and best.zeros is not None:
            best.zeros[at] = found.zeros
    return best


def improve(
    best: Affine, least: Blocks, trials: Iterable[Affine], error_of: Callable[[Affine], Blocks], margin: float = 0.0
) -> tuple[Affine, Blocks]:
    """For every block the map of least error, and that error; a trial wins by more than a share `margin` of it."""
    for trial in trials:
        error = error_of(trial)
        wins = error < least * (1 - margin)
        best, least = trial.where(wins, best), torch.where(wins, error, least)
    return best, least


def candidates(
    ranges: Range, scheme: Scheme, divisor: float, ratios: Iterable[float], signed: bool
) -> Iterator[Affine]:
    """Fits to the ranges times each ratio; with `signed`, if the scheme allows it, signed ones, and to them whole."""
    if signed and takes_signs(scheme):
        return (fit_signed(scaled_range(ranges, ratio, scheme), scheme) for ratio in (1.0, *ratios))
    return (fit(scaled_range(ranges, ratio, scheme), scheme, divisor) for ratio in ratios)


def scaled_range(ranges: Range, ratio: float, scheme: Scheme) -> Range:
    """Ranges scaled towards 0, or towards their own middle where the zero point is free."""
    low, high = ranges
    if not has_free_zeros(scheme):
        return low * ratio, high * ratio
    margin = (high - low) * ((1 - ratio) / 2)
    return low + margin, high - margin


def nest(scales: Float[Tensor, "down across"], scheme: Scheme) -> QTensor:
    """Scales quantized themselves: minus their mean, absmax blocks, nearest level (QLoRA, arXiv:2305.14314, section 3).

    Codes equal bitsandbytes' `quantize_blockwise` but for exact midpoints, which go to the even code here, and for
    blocks whose scales would come out 0 or negative: these take the least level that keeps them positive.
    """
    shape = (scales.shape[0], scales.shape[1])
    offset = scales.mean(dtype=torch.float64).float() if scales.numel() else torch.tensor(0.0)
    flat = (scales - offset).reshape(view_shape(shape, scheme.block))
    block = block_size(shape, scheme.block)
    low, high, _ = native.block_range(flat, *block)
    largest = torch.maximum(-low, high)
    affine = Affine(round_scales(largest, largest, scheme), None)
    codes = encode(flat, affine, scheme, block)
    while True:
        nested = QTensor(scheme, shape, codes, affine.scales, offset=offset)
        sunk = nested.dequantize().reshape(codes.shape) <= 0
        if not sunk.any():
            return nested
        codes = codes + sunk.to(torch.uint8)


def regions(
    shape: tuple[int, int], block: Block, size: int = _REGION
) -> Iterator[tuple[slice, slice, slice, slice, tuple[int, int]]]:
    """Cut a matrix into parts of about so many elements and whole blocks of one size; shorter tail blocks come apart.

    Yields rows, columns, block rows, block columns, and the size of a block.
    """
    high, wide = block_size(shape, block)
    across = max(size // (high * wide), 1)
    down = max(size // (high * max(min(shape[1], across * wide), 1)), 1)
    for rows, block_rows, height in _runs(shape[0], high, down):
        for cols, block_cols, width in _runs(shape[1], wide, across):
            yield rows, cols, block_rows, block_cols, (height, width)


def _runs(size: int, block: int, count: int) -> Iterator[tuple[slice, slice, int]]:
    """Runs of up to `count` whole blocks along an axis as elements and as blocks, and then the tail."""
    whole = size // block
    for start in range(0, whole, count):
        stop = min(start + count, whole)
        yield slice(start * block, stop * block), slice(start, stop), block
    if size % block:
        yield slice(whole * block, size), slice(whole, whole + 1), size % block


def _free_zero(ranges: Range, scheme: Scheme) -> Affine:
    """Scale and unrounded zero point; the scale is widened until the zero point is stored to a quarter of a code."""
    low, high = ranges
    largest = torch.maximum(-low, high).clamp(min=0)
    precise = max(1 / torch.finfo(_TYPES[scheme.scale]).eps, 2.0**scheme.grid.bits)
    wanted = torch.maximum((high - low) / (2**scheme.grid.bits - 1), largest / precise)
    scales = round_scales(wanted, largest, scheme)
    return Affine(scales, round_zeros(-low if scheme.zero == "min" else -low / scales, scheme))


def _covering_scale(low: Blocks, high: Blocks, largest: Blocks, grid: Grid) -> Blocks:
    """The symmetric scale before rounding; `low <= 0 <= high`."""
    if grid.kind == "int" and grid.bits > 1:
        return largest / (((1 << grid.bits) - 1) / 2)
    levels = _sorted_levels(grid)[0]
    bottom, top = levels[0].item(), levels[-1].item()
    upper = high / top if top > 0 else torch.zeros_like(high)
    scales = torch.maximum(upper, low / bottom) if bottom < 0 else upper
    return torch.where(scales > 0, scales, largest / _reach(grid))


def _power_of_two(largest: Blocks, grid: Grid) -> Blocks:
    """2**(floor(log2(absmax)) - floor(log2(greatest level))), absmax first rounded up where it is 1.75 * 2**n or more.

    So compressed-tensors and, for MXFP4, its consumers: less of a block's top saturates than by the plain floor.
    """
    exponent = (largest.contiguous().view(torch.int32) + (1 << 21)) >> 23
    top = torch.tensor(_reach(grid)).view(torch.int32) >> 23
    stored = (exponent - top + 127).clamp(0, 254)
    return torch.where(stored == 0, 1 << 22, stored << 23).to(torch.int32).view(torch.float32)


@cache
def _reach(grid: Grid) -> float:
    """The greatest magnitude among the levels of a grid."""
    return max(abs(level) for level in grid.levels if isfinite(level))


@cache
def _sorted_levels(grid: Grid) -> tuple[Float[Tensor, "levels"], UInt8[Tensor, "levels"]]:
    """Distinct finite levels in ascending order, and the lowest code of each."""
    code_of: dict[float, int] = {}
    for code, level in enumerate(grid.levels):
        if isfinite(level):
            code_of.setdefault(level, code)
    levels = sorted(code_of)
    return torch.tensor(levels), torch.tensor([code_of[level] for level in levels], dtype=torch.uint8)
