"""The methods without data, block by block and in the words of their papers. Slow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbit.schemes import Scheme
from tests.reference import grids

FloatArray = NDArray[np.float32]
Codes = NDArray[np.uint8]
F = np.float32


@dataclass(frozen=True)
class Block:
    """One block, its codes, its effective scale, its zero point, and what it decodes to."""

    rows: slice
    cols: slice
    codes: Codes
    scale: float
    zero: float | None
    decoded: FloatArray


def cut(shape: tuple[int, int], scheme: Scheme) -> Iterator[tuple[slice, slice]]:
    """Blocks in order, row by row of blocks; those at the end may be shorter."""
    high, wide = scheme.block.rows or shape[0], scheme.block.cols or shape[1]
    for row in range(0, shape[0], high):
        for col in range(0, shape[1], wide):
            yield slice(row, min(row + high, shape[0])), slice(col, min(col + wide, shape[1]))


def encode(weight: FloatArray, scale: float, zero: float | None, scheme: Scheme) -> tuple[Codes, FloatArray]:
    """Codes of a block and what they stand for, every step in float32."""
    grid = scheme.grid
    quotients = (weight / F(scale)).astype(F)
    if grid.kind == "int":
        half, top = 2 ** (grid.bits - 1), 2**grid.bits - 1
        if scheme.zero == "min":
            assert zero is not None
            raw = np.rint((quotients + (F(zero) / F(scale)).astype(F)).astype(F))
            codes = np.clip(raw, 0, top).astype(np.uint8)
            return codes, ((codes.astype(F) * F(scale)).astype(F) - F(zero)).astype(F)
        if scheme.zero == "float":
            assert zero is not None
            raw = np.rint((quotients + F(zero)).astype(F))
        else:
            raw = np.rint(quotients) + F(half if zero is None else zero)
        codes = np.clip(raw, 0, top).astype(np.uint8)
        return codes, ((codes.astype(F) - F(half if zero is None else zero)) * F(scale)).astype(F)
    levels = list(grid.levels)
    find = grids.fp8_codes if grid.name.startswith("fp8") else grids.nearest_codes
    codes = find(quotients, levels)
    return codes, (np.array(levels, F)[codes] * F(scale)).astype(F)


def plain_scale(low: float, high: float, scheme: Scheme) -> float:
    """The scale of round-to-nearest before it is stored, for a block with values from `low` to `high`."""
    bits, levels = scheme.grid.bits, [level for level in scheme.grid.levels if abs(level) < np.inf]
    if scheme.zero == "int":
        return float((F(max(high, 0)) - F(min(low, 0))) / F(2**bits - 1))
    if scheme.zero in ("float", "min"):
        finest = {"f16": 1024.0, "bf16": max(128.0, 2.0**bits), "f32": 2.0**23}[scheme.scale]
        return float(max((F(high) - F(low)) / F(2**bits - 1), F(max(-low, high)) / F(finest)))
    if scheme.grid.kind == "int" and bits > 1:
        return float(F(max(-low, high)) / F((2**bits - 1) / 2))
    ends = [(min(low, 0), min(*levels, 0)), (max(high, 0), max(*levels, 0))]
    sides = [F(value) / F(end) for value, end in ends if value and end]
    return float(max(sides)) if sides else float(F(max(-low, high)) / F(max(map(abs, levels))))


def global_divisor(weight: FloatArray) -> float:
    """compressed-tensors' `weight_global_scale`: greatest E4M3 times greatest E2M1 over the absmax of the tensor."""
    largest = float(np.abs(weight).max())
    return float(min(F(448 * 6) / F(largest), F(2.0**126))) if largest else 1.0


def stored(wanted: float, largest: float, scheme: Scheme, divisor: float = 1.0) -> float:
    """The effective scale once it is rounded to its type."""
    if largest == 0:
        return float(F(1) * (F(1) / F(divisor))) if 0 in scheme.grid.levels else grids.round_positive(0, scheme.scale)
    if scheme.scale == "e8m0":
        return grids.mx_scale(largest, max(level for level in scheme.grid.levels if level < np.inf))
    if scheme.nested and not scheme.nested.offset:
        return float(F(grids.round_positive(float(F(divisor) * F(wanted)), "e4m3")) * (F(1) / F(divisor)))
    return grids.round_positive(wanted, scheme.scale)


def stored_zero(low: float, scale: float, scheme: Scheme) -> float | None:
    """The zero point of a block whose least value is `low`."""
    if scheme.zero == "none":
        return None
    if scheme.zero == "int":
        return float(np.clip(np.rint(-F(min(low, 0)) / F(scale)), 0, 2**scheme.grid.bits - 1))
    return round_signed(float(-F(low) if scheme.zero == "min" else -F(low) / F(scale)), scheme)


def round_signed(value: float, scheme: Scheme) -> float:
    """A float zero point in the type of the scales."""
    return float(np.copysign(grids.round_positive(abs(value), scheme.scale), value)) if value else 0.0


def rtn(weight: FloatArray, scheme: Scheme) -> list[Block]:
    """Round to nearest."""
    divisor = global_divisor(weight) if scheme.nested and not scheme.nested.offset else 1.0
    blocks = []
    for rows, cols in cut((weight.shape[0], weight.shape[1]), scheme):
        part = weight[rows, cols]
        low, high = float(part.min()), float(part.max())
        scale = stored(plain_scale(low, high, scheme), max(-low, high), scheme, divisor)
        zero = stored_zero(low, scale, scheme)
        blocks.append(Block(rows, cols, *_placed(part, scale, zero, scheme)))
    return blocks


def _placed(part: FloatArray, scale: float, zero: float | None, scheme: Scheme) -> Any:
    codes, decoded = encode(part, scale, zero, scheme)
    return codes, scale, zero, decoded


def norm(part: FloatArray, decoded: FloatArray, p: float) -> float:
    """Sum of |w - w^|**p, in float64."""
    return float((np.abs(part.astype(np.float64) - decoded.astype(np.float64)) ** p).sum())


def signed_scale(low: float, high: float, scheme: Scheme) -> float:
    """As llama.cpp's Q4_0, for any number of bits: the value furthest from 0 becomes the least level."""
    furthest = low if -low >= high else high
    return -float(np.sign(furthest)) * stored(abs(float(F(furthest) / F(2 ** (scheme.grid.bits - 1)))), 1.0, scheme)


def shrink_search(part: FloatArray, scheme: Scheme, p: float, signed: bool = False) -> float:
    """Least error of one block over 101 ranges from the whole one down to a fifth of it, as GPTQ's `mse` option."""
    least, low, high = np.inf, float(part.min()), float(part.max())
    for step in range(101):
        ratio = 1 - 0.8 * step / 100
        down, up = float(F(low * ratio)), float(F(high * ratio))
        plain = stored(plain_scale(down, up, scheme), max(-down, up), scheme)
        scale = signed_scale(down, up, scheme) if signed else plain
        decoded = encode(part, scale, stored_zero(down, scale, scheme), scheme)[1]
        least = min(least, norm(part, decoded, p))
    return least


def half_quadratic(part: FloatArray, scale: float, zero: float, bits: int, iterations: int = 20) -> list[float]:
    """The zero points that HQQ walks through on one block (Badri & Shaji 2023), in float64."""
    w, z, beta, p, zeros = part.astype(np.float64), zero, 10.0, 0.7, []
    for _ in range(iterations):
        q = np.clip(np.rint(w / scale + z), 0, 2**bits - 1)
        x = w - (q - z) * scale
        with np.errstate(divide="ignore"):
            shrunk = np.sign(x) * np.maximum(np.abs(x) - np.abs(x) ** (p - 1) / beta, 0)
        z = float((q - (w - shrunk) / scale).mean())
        beta *= 1.01
        zeros.append(z)
    return zeros
