"""Learning with a whole block: weights as groups, their rounding with its derivatives, and the loop around them.

The straight-through estimator is had in closed form: of a weight `w^ = s (q - z)` with `q = clamp(rint(w / s + v) + z)`
every derivative follows from that of `w^`, which the block's backward pass gives. So no graph is built through the
rounding, and the block runs in its own type with plain weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import repeat
from math import ceil, isfinite
from typing import Protocol, final, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from lowbit.blocks import CPU, Block
from lowbit.methods import Learned, _blocks
from lowbit.methods._attention import TiledAttention
from lowbit.methods._scales import (
    Affine,
    code_zeros,
    encode,
    finish,
    finite_range,
    fit,
    global_divisor,
    has_free_zeros,
    round_scales,
    takes_signs,
    unscaled,
)
from lowbit.schemes import Grid, Scheme
from lowbit.tensors import QTensor, block_size

Groups = Float[Tensor, "groups width"]
PerGroup = Float[Tensor, "groups 1"]

CHUNK = 1 << 18  # weights: what the arithmetic on them takes stays in the cache


@final
@dataclass(frozen=True)
class Grouped:
    """A weight as rows of scale groups, the last group of each row filled up with zeros.

    Attributes:
        scheme: how it is stored.
        shape: of the weight.
        values: the groups.
        low: least value of each group, of the weight alone; 0 where that is greater, unless zero points are free.
        high: greatest value of each, 0 where that is less.
        divisor: of all scales (NVFP4), else 1.
        signs: of the scales as they are stored, where these may be negative. A group with -1 is turned over here, so
            that of symmetric integers the level that has no counterpart, `-2**(bits - 1)`, is its greatest magnitude.
        fixed: scales and minima in super-blocks, a row per group, and the scales above them; None where they are moved.
    """

    scheme: Scheme
    shape: tuple[int, int]
    values: Groups
    low: PerGroup
    high: PerGroup
    divisor: float
    signs: PerGroup | None = None
    fixed: tuple[Affine, _blocks.Steps] | None = None

    def fit(self, lower: PerGroup, upper: PerGroup) -> Affine:
        """Scales and zero points for the ranges times these factors, rounded as they are stored; a row per group."""
        if self.fixed:
            return self.fixed[0]
        low, high = self.low * lower, self.high * upper
        if self.signs is None:
            return fit((low, high), self.scheme, self.divisor)
        largest = torch.maximum(-low, high)
        return Affine(round_scales(largest / 2.0 ** (self.scheme.grid.bits - 1), largest, self.scheme), None)

    def search(self) -> PerGroup:
        """Factor on the range of each group with the least squared error when its weights are rounded to nearest."""
        best, least = torch.ones_like(self.low), torch.full_like(self.low, torch.inf)
        ratios = (1.0, 0.5, 2.0) if self.scheme.scale == "e8m0" else tuple(1 - step / 100 for step in range(51))
        for ratio in ratios:
            affine = self.fit(*[torch.full_like(self.low, ratio)] * 2)
            error = self.split(self.decode(None, affine, torch.float32)).sub_(self.values)
            error = error.square_().sum(1, keepdim=True)
            best, least = torch.where(error < least, ratio, best), torch.minimum(error, least)
        return best

    def split(self, matrix: Tensor) -> Tensor:
        """A matrix of the weight's shape as groups, tails filled up with zeros."""
        return self._turned(_split(matrix, self.values.shape[1]))

    def _turned(self, groups: Tensor, at: slice = slice(None)) -> Tensor:
        """What is turned over with the values of some groups, or back: weights, their derivatives, scales."""
        return groups if self.signs is None else groups * self.signs[at]

    def parts(self, affine: Affine) -> Iterator[tuple[slice, PerGroup, PerGroup | None]]:
        """Runs of groups that fit the cache (a GPU takes all at once), with their scales and zero points."""
        here = self.values.device.type == "cpu"
        size = max(CHUNK // max(self.values.shape[1], 1), 1) if here else max(len(self.values), 1)
        zeros = code_zeros(affine.zeros, affine.scales, self.scheme)
        for start in range(0, len(self.values), size):
            at = slice(start, start + size)
            yield at, affine.scales[at] * affine.unit, None if zeros is None else zeros[at]

    def decode(self, shift: Groups | None, affine: Affine, dtype: torch.dtype) -> Tensor:
        """The quantized weight, `[rows, cols]`, computed in float32 and rounded once; a view."""
        out = torch.empty_like(self.values, dtype=dtype)
        for at, scales, zeros in self.parts(affine):
            moved = None if shift is None else shift[at]
            level = rounded(self.values[at], moved, scales, zeros, self.scheme).level
            if self.scheme.zero == "min":  # as it is decoded: not a zero point is stored, but what is subtracted
                assert zeros is not None and affine.zeros is not None
                torch.sub(level.add_(zeros).round_().mul_(scales), affine.zeros[at], out=out[at])
            else:
                torch.mul(level, self._turned(scales, at), out=out[at])
        return out.view(self.shape[0], -1)[:, : self.shape[1]]

    def store(self, shift: Groups | None, affine: Affine) -> QTensor:
        """The quantized weight as it is stored: values that lie on the grid meet the same codes again."""
        across = (self.shape[0], -1)
        zeros = None if affine.zeros is None else affine.zeros.view(across).cpu()
        whole = Affine(self._turned(affine.scales).view(across).cpu(), zeros, affine.divisor)
        weight = self.decode(shift, affine, torch.float32).cpu().contiguous()
        if self.fixed is None:
            return finish(weight, whole, self.scheme)
        codes = encode(weight, whole, self.scheme, block_size(self.shape, self.scheme.block))
        return _blocks.finish(codes, whole, self.fixed[1], self.scheme)


def grouped(
    weight: Float[Tensor, "rows cols"],
    scheme: Scheme,
    signed: bool = False,
    device: torch.device = CPU,
    importance: Float[Tensor, "cols"] | None = None,
) -> Grouped:
    """A weight in the groups of a scheme whose blocks lie within rows, on a device.

    `signed`: scales may be negative, where the scheme allows it; `importance`: of each column, for scales in
    super-blocks.

    Raises:
        WeightError: NaN or Inf, with its place.
    """
    weight, shape = weight.detach().float().contiguous(), (weight.shape[0], weight.shape[1])
    if _blocks.in_super_blocks(scheme):
        return _in_super_blocks(weight, scheme, device, importance)
    low, high = finite_range(weight, {}, scheme)
    divisor = global_divisor((low, high), {}, scheme)
    if not has_free_zeros(scheme):
        low, high = low.clamp(max=0), high.clamp(min=0)
    width = min(block_size(shape, scheme.block)[1], max(shape[1], 1))
    values, low, high = _split(weight, width).to(device), low.view(-1, 1).to(device), high.view(-1, 1).to(device)
    if not signed or not takes_signs(scheme):
        return Grouped(scheme, shape, values, low, high, divisor)
    turned = high > -low
    signs = torch.where(turned, -1.0, 1.0)
    low, high = torch.where(turned, -high, low), torch.where(turned, -low, high)
    return Grouped(scheme, shape, values * signs, low, high, divisor, signs)


def _in_super_blocks(weight: Tensor, scheme: Scheme, device: torch.device, importance: Tensor | None) -> Grouped:
    """A weight under the scales and minima of the fitted encoder; groups whose scale is negative are turned over."""
    affine, steps, _ = _blocks.start(weight, importance, scheme)
    scales, values = affine.scales.view(-1, 1).to(device), _split(weight, scheme.block.cols).to(device)
    zeros = None if affine.zeros is None else affine.zeros.view(-1, 1).to(device)
    signs = torch.where(scales < 0, -1.0, 1.0) if zeros is None else None  # beside minima none is
    turn, nothing = 1.0 if signs is None else signs, torch.zeros_like(scales)
    fixed, shape = Affine(scales * turn, zeros), (weight.shape[0], weight.shape[1])
    return Grouped(scheme, shape, values * turn, nothing, nothing, 1.0, signs, (fixed, steps))


def within_rows(scheme: Scheme) -> str | None:
    """Why ranges cannot be learned under a scheme; None where they can."""
    if scheme.block.flat or scheme.block.rows != 1:
        return "it learns a range for every group within a row; use a scheme with -gN or -row"
    return unscaled(scheme)


def _split(matrix: Tensor, width: int) -> Tensor:
    cols = matrix.shape[1]
    tail = ceil(cols / width) * width - cols
    return (pad(matrix, (0, tail)) if tail else matrix).reshape(-1, width)


@final
@dataclass(frozen=True)
class Rounded:
    """Weights on their grid, in units of the scale, and what the derivatives need.

    Attributes:
        exact: the weight over its scale.
        level: what the grid has in its place: `q - z`.
        place: where the weight was rounded to, before it was clipped.
        clipped: the same after.
    """

    exact: Groups
    level: Groups
    place: Groups
    clipped: Groups

    def kept(self, grad: Groups) -> Groups:
        """The derivative by the weight in units of the scale: that by the level, where the code was not clipped."""
        return grad.masked_fill(self.place != self.clipped, 0.0)


def rounded(weight: Groups, shift: Groups | None, scales: PerGroup, zeros: PerGroup | None, scheme: Scheme) -> Rounded:
    """The nearest levels of weights that are moved by `shift`, in steps between neighbouring levels."""
    exact = weight / scales
    if scheme.grid.kind != "int":
        return _on_table(exact, shift, scheme.grid)
    place = exact.clone() if shift is None else exact + shift
    if zeros is None:
        half = 2.0 ** (scheme.grid.bits - 1)
        level = place.round_().clamp(-half, half - 1)
    else:
        place = place.add_(zeros).round_().sub_(zeros) if has_free_zeros(scheme) else place.round_()
        level = place.clamp(-zeros, 2.0**scheme.grid.bits - 1 - zeros)
    return Rounded(exact, level, place, level)


def _on_table(exact: Groups, shift: Groups | None, grid: Grid) -> Rounded:
    """For levels at uneven distances: positions between neighbours are linear, beyond the ends as in the last step."""
    levels = _levels(grid).to(exact.device)
    above = torch.bucketize(exact, levels).clamp_(1, len(levels) - 1)
    lower = levels[above - 1]
    position = (exact - lower) / (levels[above] - lower) + (above - 1)
    place = (position if shift is None else position + shift).round_()
    index = place.clamp(0, len(levels) - 1)
    return Rounded(exact, levels[index.long()], place, index)


@cache
def _levels(grid: Grid) -> Float[Tensor, "levels"]:
    """Distinct finite levels in ascending order."""
    return torch.tensor(sorted({level + 0.0 for level in grid.levels if isfinite(level)}))


def range_slopes(
    grad: Groups, kept: Groups, at: Rounded, scales: PerGroup, low: PerGroup | None, top: float
) -> tuple[PerGroup, PerGroup]:
    """Derivatives of the loss by the lower and the upper end of each group's range.

    `grad` is that by `w^`, `kept` the same where no code was clipped.

    With `w^ = s (q - z)`: by `s` it is `q - z - w / s` (`q - z` where clipped), by `z` it is 0 (`-s` where clipped).
    `s = (high - low) / top` and `z = -low / s`, where there is a zero point; else (`low` is None) the scale follows
    the greater end, and both are the derivative by the scale.
    """
    by_scale = (grad * at.level).sum(1, keepdim=True) - (kept * at.exact).sum(1, keepdim=True)
    if low is None:
        return by_scale, by_scale
    clipped = grad.sum(1, keepdim=True) - kept.sum(1, keepdim=True)
    by_scale = (by_scale - clipped * low / scales) / top  # by_zero = -clipped * scales
    return clipped - by_scale, by_scale


@runtime_checkable
class Learner(Protocol):
    """What is learned of one weight."""

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The quantized weight, `[rows, cols]`."""

    def step(self, grad: Tensor, progress: float) -> None:
        """Go against the loss's derivative by that weight; `progress` runs from 0 to 1."""

    def result(self) -> QTensor:
        """The weight as it is stored: the very codes that the loss saw."""


def learned(block: Block, learners: Mapping[str, Learner], iterations: int, batch: int) -> Learned:
    """What the learners come to, and what they began with.

    Raises:
        WeightError: NaN or Inf in a weight, with its place.
    """
    start = _results(learners)
    done = descend(block, learners, iterations, batch)
    stopped = None if done == iterations else f"the loss was not finite after {done:,} of {iterations:,} steps"
    return Learned(_results(learners) if done else start, start, stopped)


def _results(learners: Mapping[str, Learner]) -> dict[str, QTensor]:
    return {name: learner.result() for name, learner in learners.items()}


def descend(block: Block, learners: Mapping[str, Learner], iterations: int, batch: int) -> int:
    """Steps on batches drawn at random, every window once before any comes again; their number.

    They end early where the loss is NaN. The loss is the squared difference from the float block's output, its channels
    weighed by the information there, if that is known; its mean would change no sign.
    """
    dtype, names = block.target([0]).dtype, sorted(learners, key=lambda name: -block.weights[name].numel())
    dice = torch.Generator().manual_seed(block.seed)

    def leaf(name: str) -> Tensor:
        return learners[name].weight(dtype).detach().requires_grad_()

    def move(name: str, grads: Sequence[Tensor | None], progress: float) -> Tensor:
        known = [grad for grad in grads if grad is not None]
        if known:
            learners[name].step(sum(known[1:], known[0]), progress)
        return leaf(name)

    with nullcontext(block.pool) if block.pool else ThreadPoolExecutor(block.threads, "learn") as pool:
        leaves = dict(zip(names, pool.map(leaf, names), strict=True))
        for step, indices in zip(range(iterations), _batches(block.windows, batch, dice), strict=False):
            # Each worker has windows of its own: waking threads for small products costs more than these take.
            parts = [indices[at :: block.threads] for at in range(min(block.threads, len(indices)))]
            found = list(pool.map(_slopes, repeat(block), repeat(leaves), parts))
            grads = [each for each in found if each is not None]
            if len(grads) < len(found):
                return step
            by_weight = zip(*grads, strict=True)
            leaves = dict(zip(names, pool.map(move, names, by_weight, repeat(step / iterations)), strict=True))
    return iterations


@torch.enable_grad()
def _slopes(block: Block, leaves: Mapping[str, Tensor], indices: Sequence[int]) -> tuple[Tensor | None, ...] | None:
    """How the loss on some windows depends on each weight; None where the loss is not finite."""
    with TiledAttention():
        output = block.run(indices, leaves)
    error = output.detach() - block.target(indices)
    if not error.abs().max().isfinite():
        return None
    return torch.autograd.grad(output, list(leaves.values()), block.weighed(error), allow_unused=True)


def _batches(windows: int, batch: int, dice: torch.Generator) -> Iterator[list[int]]:
    while True:
        order: list[int] = torch.randperm(windows, generator=dice).tolist()
        for start in range(0, max(windows - batch, 0) + 1, batch):
            yield order[start : start + batch]
