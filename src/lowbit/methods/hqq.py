"""Half-quadratic quantization: zero points moved until what error is left is sparse. See `docs/methods/hqq.md`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from lowbit.methods import Method, Stats
from lowbit.methods._scales import (
    Affine,
    Blocks,
    Range,
    block_mean,
    candidates,
    code_zeros,
    finish,
    finite_range,
    fit,
    improve,
    refine,
    residual,
    round_zeros,
    shares_rows,
    squared_errors,
    unscaled,
    zero_unit,
)
from lowbit.schemes import Scheme
from lowbit.tensors import QTensor


@final
@dataclass(frozen=True)
class Options:
    """The published defaults, but for the ranges.

    Attributes:
        ranges: tried for the scale, from the whole one down to half of it; 1: the whole one, as published. None: 16
            below 4 bits, else 1.
        iterations: updates of every zero point.
        lp_norm: p of the norm whose proximal operator shrinks the error, in (0, 1].
        beta: weight of the quadratic term at the start.
        kappa: its growth per iteration, 1 or more.
    """

    ranges: int | None = None
    iterations: int = 20
    lp_norm: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01

    def __post_init__(self) -> None:
        least = min(1 if self.ranges is None else self.ranges, self.iterations)
        if least < 1 or not 0 < self.lp_norm <= 1 or self.beta <= 0 or self.kappa < 1:
            raise ValueError("ranges, iterations and kappa must be 1 or more, lp_norm in (0, 1], beta above 0")


def quantize(weight: Float[Tensor, "rows cols"], stats: Stats, scheme: Scheme, options: Options) -> QTensor:
    """For every block the scale of the best range, and the zero point of the least mean error met on the way.

    Raises:
        WeightError: NaN or Inf, with its place.
    """
    ranges = finite_range(weight, stats, scheme)

    def search(
        part: Float[Tensor, "high wide"], ranges: Range, start: Affine, block: tuple[int, int], cols: slice
    ) -> Affine:
        return _solve(part, ranges, start, scheme, block, options)

    return finish(weight, refine(weight, ranges, fit(ranges, scheme), scheme, search), scheme)


def _solve(
    weight: Float[Tensor, "rows cols"],
    ranges: Range,
    start: Affine,
    scheme: Scheme,
    block: tuple[int, int],
    options: Options,
) -> Affine:
    """The best range's scale and the best zero point of each block, as they are stored."""

    def error_of(affine: Affine) -> Blocks:
        return _loss(residual(weight, affine, scheme, block), scheme, block)

    def squares_of(affine: Affine) -> Blocks:
        return squared_errors(weight, affine, scheme, block)

    count = options.ranges or (16 if scheme.grid.bits < 4 else 1)
    shrunk = candidates(ranges, scheme, 1.0, (1 - i / (2 * count) for i in range(1, count)), False)
    best = improve(start, squares_of(start), shrunk, squares_of)[0] if count > 1 else start
    unit = zero_unit(best.scales, scheme)
    walked = (round_zeros(z * unit, scheme) for z in _descend(weight, best, scheme, block, options))
    return improve(best, error_of(best), (replace(best, zeros=zeros) for zeros in walked), error_of)[0]


def _descend(
    weight: Float[Tensor, "rows cols"], start: Affine, scheme: Scheme, block: tuple[int, int], options: Options
) -> tuple[Blocks, Blocks]:
    """Unrounded zero points of the least error met, and those after the last update (Badri & Shaji 2023).

    With the codes q of the present zero point z and the error e = (q - z) s - w, the published update
    z' = mean(q - (w - shrink(w - w^)) / s) is z + mean(e - shrink(e)) / s.
    """
    zeros, scheme = code_zeros(start.zeros, start.scales, scheme), replace(scheme, zero="float")
    assert zeros is not None
    zeros = zeros.round() if scheme.grid.bits == 4 else zeros  # so the package starts at 4 bits
    best, least, beta = zeros, torch.full_like(zeros, torch.inf), options.beta
    for _ in range(options.iterations):
        error = residual(weight, replace(start, zeros=zeros), scheme, block)
        size = _loss(error, scheme, block)
        best, least = torch.where(size < least, zeros, best), torch.minimum(size, least)
        zeros = zeros + block_mean(_kept(error, options.lp_norm, beta), block) / start.scales
        beta *= options.kappa
    return best, zeros


def _loss(error: Float[Tensor, "rows cols"], scheme: Scheme, block: tuple[int, int]) -> Blocks:
    """What zero points are judged by: the package's mean |e|; below 4 bits mean e^2, of which outputs suffer there."""
    return block_mean(error.abs() if scheme.grid.bits >= 4 else error.square(), block)


def _kept(error: Float[Tensor, "rows cols"], p: float, beta: float) -> Float[Tensor, "rows cols"]:
    """What the shrinkage operator takes off: `sign(e) min(|e|, |e|**(p - 1) / beta)`."""
    size = error.abs()
    if size.max() < 0.999 * beta ** (1 / (p - 2)):
        return error  # |e| is the smaller one throughout, as it is for weights of ordinary magnitude
    return torch.minimum(size, size.pow(p - 1).div_(beta), out=size).copysign_(error)


def _objection(scheme: Scheme) -> str | None:
    if scheme.grid.kind != "int" or scheme.zero == "none":
        return "it moves zero points, which only integer grids with the option fzero (or asym) have, as int4-g64-fzero"
    if shares_rows(scheme):
        return "it needs blocks within rows; a zero point for the whole tensor is not searched"
    return unscaled(scheme)


METHOD = Method(
    about="half-quadratic: zero points of least error under a sparse norm, no data",
    quantize=quantize,
    options=Options,
    workspace=20.0,
    supports=_objection,
)
