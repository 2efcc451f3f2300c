"""What the processor's kernels do for the loop over columns, by torch, on tensors of another device."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from threading import Lock
from typing import final

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from lowbit.native import Coder

_ONE_RECORDS = Lock()  # it begins by waiting for the device, which is refused while another thread records


@final
@dataclass(frozen=True)
class Rounder:
    """The rule of a `Coder`, with its tables on a device.

    Attributes:
        thresholds: float64; a value that reaches so many of them has the code and the level of that rank.
    """

    coder: Coder
    thresholds: Tensor | None = None
    codes: Tensor | None = None
    levels: Tensor | None = None

    @staticmethod
    def of(coder: Coder, device: torch.device) -> Rounder:
        """Midpoints between levels; at one the even code is taken, of alike ones that of the smaller level."""
        if coder.levels is None or coder.codes is None:
            return Rounder(coder)
        levels, even = coder.levels.double(), coder.codes % 2 == 0
        middle, sizes = (levels[:-1] + levels[1:]) / 2, levels.abs()
        up = torch.where(even[:-1] == even[1:], sizes[1:] <= sizes[:-1], even[1:])
        thresholds = torch.where(up, middle, middle.nextafter(torch.tensor(inf, dtype=torch.float64)))
        return Rounder(coder, thresholds.to(device), coder.codes.to(device), coder.levels.to(device))

    def __call__(self, exact: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor]:
        """Codes, and what they stand for, of values in units of their scales; zero points are those of the values."""
        if self.thresholds is not None and self.codes is not None and self.levels is not None:
            rank = torch.bucketize(exact.double(), self.thresholds, right=True)
            return self.codes[rank], self.levels[rank]
        at = self.coder.offset if zero is None else zero
        code = ((exact + at).round() if self.coder.round_sum else exact.round() + at).clamp(0, self.coder.code_max)
        return code, code - at


@final
class Sweep:
    """As `native.sweep`, by one rule, for any number of lanes.

    On CUDA the operations of a block are recorded once for each size of block, and replayed: there are about ten to a
    column, and starting them takes longer than they do.
    """

    def __init__(self, rounder: Rounder) -> None:
        self._rounder = rounder
        self._recorded: dict[torch.Size, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}

    def __call__(
        self,
        target: Float[Tensor, "cols lanes"],
        weight: Float[Tensor, "cols lanes"],
        error: Float[Tensor, "cols lanes"],
        coupling: Float[Tensor, "cols cols"],
        scale: Float[Tensor, "cols lanes"],
        zero: Float[Tensor, "cols lanes"] | None,
        *,
        out: UInt8[Tensor, "cols lanes"],
    ) -> None:
        given = [target, weight, error, coupling, scale, *([] if zero is None else [zero])]
        if target.device.type != "cuda":
            _columns(self._rounder, out, *given)
            return
        if target.shape not in self._recorded:
            self._recorded[target.shape] = self._record(given, out)
        graph, own, codes = self._recorded[target.shape]
        for mine, theirs in zip(own, given, strict=True):
            mine.copy_(theirs)
        graph.replay()
        error.copy_(own[2])
        out.copy_(codes)

    def _record(self, given: list[Tensor], out: Tensor) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        own, codes, graph = [tensor.clone() for tensor in given], out.clone(), torch.cuda.CUDAGraph()
        with _ONE_RECORDS:
            _columns(self._rounder, codes, *own)  # what is loaded on first use must not be while it records
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                _columns(self._rounder, codes, *own)
        return graph, own, codes


def _columns(
    rounder: Rounder,
    out: UInt8[Tensor, "cols lanes"],
    target: Float[Tensor, "cols lanes"],
    weight: Float[Tensor, "cols lanes"],
    error: Float[Tensor, "cols lanes"],
    coupling: Float[Tensor, "cols cols"],
    scale: Float[Tensor, "cols lanes"],
    zero: Float[Tensor, "cols lanes"] | None = None,
) -> None:
    live = (weight != 0).float()
    for j in range(len(target)):
        exact = target[j] / scale[j]
        if rounder.coder.keep_zeros:
            exact *= live[j]
        code, value = rounder(exact, None if zero is None else zero[j])
        kept = weight[j] - value * scale[j]
        target[j + 1 :].addr_(coupling[j, j + 1 :], kept - error[j])
        error[j], out[j] = kept, code


def residual(
    weight: Float[Tensor, "rows cols"],
    scales: Float[Tensor, "down across"],
    zeros: Float[Tensor, "down across"] | None,
    rounder: Rounder,
    block: tuple[int, int],
) -> Float[Tensor, "rows cols"]:
    """Encoded and decoded weight minus the weight."""

    def spread(blocks: Tensor) -> Tensor:
        return blocks.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)

    wide = spread(scales)
    _, value = rounder(weight / wide, None if zeros is None else spread(zeros))
    return value.mul_(wide).sub_(weight)
