"""Costs: bytes of memory that a weight takes as it runs here, and seconds to multiply by it, measured."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import linear

from lowbit.errors import UnsupportedError
from lowbit.formats import Weight
from lowbit.runtime.bench import seconds
from lowbit.runtime.panels import Packed, pack_noise, pack_wide, packed_bytes, wide_bytes
from lowbit.stages._policy import is_expert
from lowbit.stages.running import Use

_ONE = 2**23  # bytes of a weight that is timed
_ALL = 2**26  # and of all that are multiplied in turn: no cache holds them
_SPENT = 0.1  # seconds for each kind


def held_bytes(use: Use) -> int:
    """Bytes in memory of a weight that `open_model` opened: panels, a table of rows, or floats, both in float32."""
    weight, count = use.entry.weight, prod(use.entry.weight.shape)
    table = 4 * count if use.looked else 0
    if (use.looked and not use.share) or not _multiplied(weight):
        return table or 4 * count
    if weight.scheme is None:
        return table + wide_bytes(weight.shape)
    try:
        return table + packed_bytes(weight.scheme, weight.shape)
    except UnsupportedError:
        return table or 4 * count


def _multiplied(weight: Weight) -> bool:
    """Whether it is a matrix that the kernels take: no stack of experts."""
    return len(weight.shape) == 2 and not is_expert(weight.name)


def product_timer(threads: int, tokens: int) -> Callable[[Use], float]:
    """Seconds to multiply `tokens` inputs by a weight, measured once for each scheme and width.

    Of each kind as many rows are multiplied as no cache holds, and the time is taken in proportion to the rows.
    """
    rates: dict[tuple[str, int], float] = {}

    def took(use: Use) -> float:
        weight = use.entry.weight
        if len(weight.shape) != 2:
            return 0.0  # norms and biases
        key = (f"{weight.scheme or weight.dtype}{'' if _multiplied(weight) else ' as floats'}", weight.shape[1])
        if key not in rates:
            rates[key] = _seconds_a_row(weight, threads, tokens)
        return rates[key] * weight.shape[0]

    return took


def _seconds_a_row(weight: Weight, threads: int, tokens: int) -> float:
    """Seconds for each row of a weight like this one: the best of several rounds."""
    cols, x = weight.shape[1], torch.randn(tokens, weight.shape[1])
    rows = max(_ONE // max(cols * _bits(weight) // 8, 1) // 16 * 16, 16)
    works = [_work(weight, (rows, cols), threads) for _ in range(_ALL // _ONE)]

    def once() -> None:
        for work in works:
            work(x)

    once()
    best, spent = float("inf"), 0.0
    while spent < _SPENT:
        took = seconds(once)
        best, spent = min(best, took), spent + took
    return best / (rows * len(works))


def _bits(weight: Weight) -> int:
    return weight.scheme.grid.bits if weight.scheme and _multiplied(weight) else 8 * weight.dtype.itemsize


def _work(weight: Weight, shape: tuple[int, int], threads: int) -> Callable[[Tensor], Tensor]:
    """What multiplies by a weight of this kind: a kernel, or torch where none does."""
    packed = _packed(weight, shape)
    if packed is None:
        floats = torch.randn(shape)
        return lambda x: linear(x, floats)
    matrix = packed.matrix()
    return lambda x: matrix(x, threads)


def _packed(weight: Weight, shape: tuple[int, int]) -> Packed | None:
    if not _multiplied(weight):
        return None
    if weight.scheme is None:
        return pack_wide(torch.randn(shape).to(weight.dtype))
    try:
        return pack_noise(weight.scheme, shape)
    except UnsupportedError:
        return None
