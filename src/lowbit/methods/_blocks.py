"""llama.cpp's scales and minima while codes are searched: where they may lie, and how they are stored.

In super-blocks a scale is a code times the scale above it, and likewise a minimum. The scales above are those that the
fitted encoder found (`csrc/ggml_fit.h`); codes of scales and minima may move.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from lowbit.methods._ggml import encode, objection
from lowbit.methods._scales import Affine, Blocks
from lowbit.schemes import Scheme
from lowbit.tensors import QTensor

_LEAST = 2.0**-24  # of float16


@final
@dataclass(frozen=True)
class Steps:
    """The scale above each scale, and above each minimum; None where these are float16 themselves.

    Arrays are `[rows, blocks]`, or transposed as a tile of the loop has them.
    """

    scale: Float[Tensor, "..."] | None
    least: Float[Tensor, "..."] | None

    def to(self, device: torch.device | str) -> Steps:
        """The same on a device."""
        return Steps(*(None if part is None else part.to(device) for part in (self.scale, self.least)))

    def lanes(self, rows: Tensor) -> Steps:
        """Those of some rows, as columns."""
        return Steps(*(None if part is None else part[rows].T.contiguous() for part in (self.scale, self.least)))


def special(scheme: Scheme) -> bool:
    """Whether it has minima or scales in super-blocks, and is a type of llama.cpp's."""
    whole = scheme.nested is not None and scheme.scale != "e4m3" and not scheme.nested.offset
    return (scheme.zero == "min" or whole) and objection(scheme) is None


def in_super_blocks(scheme: Scheme) -> bool:
    """Whether its scales are codes under scales of llama.cpp's super-blocks."""
    return scheme.nested is not None and special(scheme)


def start(
    weight: Float[Tensor, "rows cols"], importance: Float[Tensor, "cols"] | None, scheme: Scheme
) -> tuple[Affine, Steps, UInt8[Tensor, "rows cols"]]:
    """Scales, minima and codes of the fitted encoder; a scale of 0 becomes the least that there is.

    Of types with tables llama.cpp's own are taken. They are larger, which `gptq` has no use for but in `iq1_s` (6% less
    divergence).
    """
    q = encode(weight, importance, scheme, None, fitted=not scheme.grid.table)
    least, blocks = q.zero_values(), q.scale_values().shape[1]
    if not isinstance(q.scales, QTensor):
        scales = torch.where(q.scales == 0, _LEAST, q.scales)
        return Affine(scales, least), Steps(None, None), q.codes
    step = _spread(q.scales, blocks)
    scales = q.scale_values()
    lower = _spread(q.minima, blocks) if isinstance(q.minima, QTensor) else None
    return Affine(torch.where(scales == 0, step, scales), least), Steps(step, lower), q.codes


def _spread(nested: QTensor, blocks: int) -> Blocks:
    """The scale above each block; the least in place of 0."""
    assert isinstance(nested.scales, Tensor)
    above = nested.scales.repeat_interleave(nested.scheme.block.cols, 1)[:, :blocks]
    return torch.where(above == 0, _LEAST, above)


def nearest_scale(
    scale: Float[Tensor, "lanes"], step: Float[Tensor, "lanes"], scheme: Scheme
) -> Float[Tensor, "lanes"]:
    """The nearest scale that is a code times the one above; never 0."""
    factors = _nearest(scale, step, scheme)
    return step * torch.where(factors == 0, 1.0, factors)


def nearest_least(
    least: Float[Tensor, "lanes"], step: Float[Tensor, "lanes"], scheme: Scheme
) -> Float[Tensor, "lanes"]:
    """The nearest minimum that is a code times the one above."""
    return step * _nearest(least, step, scheme)


def _nearest(values: Tensor, step: Tensor, scheme: Scheme) -> Tensor:
    """Numbers of steps, of those that the grid of scales has."""
    assert scheme.nested is not None
    first, second, *_ = scheme.nested.grid.levels
    return first + (second - first) * _codes(values, step, scheme.nested)


def _codes(values: Tensor, step: Tensor, nested: Scheme) -> Tensor:
    """Codes of scales or minima; their levels are evenly spaced."""
    first, second, *_ = nested.grid.levels
    return ((values / step - first) / (second - first)).round().clamp(0, len(nested.grid.levels) - 1)


def finish(codes: UInt8[Tensor, "rows cols"], affine: Affine, steps: Steps, scheme: Scheme) -> QTensor:
    """The tensor with these codes under scales and minima that are all storable."""
    shape = (codes.shape[0], codes.shape[1])
    scales = _stored(affine.scales, steps.scale, scheme)
    minima = None if affine.zeros is None else _stored(affine.zeros, steps.least, scheme)
    return QTensor(scheme, shape, codes, scales, minima=minima)


def _stored(values: Blocks, step: Tensor | None, scheme: Scheme) -> Tensor | QTensor:
    if step is None or scheme.nested is None:
        return values
    nested = scheme.nested
    above = step[:, :: nested.block.cols].contiguous()
    return QTensor(nested, (values.shape[0], values.shape[1]), _codes(values, step, nested).to(torch.uint8), above)
