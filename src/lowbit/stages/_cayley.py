"""A learned rotation of the residual stream: Cayley steps that lower the rounding noise that the weights will get.

SpinQuant (arXiv:2405.16406, section 3.2) learns by the loss of the whole quantized model on text. Here the objective is
the weights' own and needs neither text nor a pass through the model: rounding to nearest with one scale for each run of
columns makes an error whose variance goes with the square of the run's largest magnitude, so the mean of these squares,
relative to the mean square of each weight, is what falls. The steps are the paper's: momentum on the tangent, Cayley's
transform as the way back to the orthogonal matrices (Li et al., arXiv:2002.01113), a step size that falls to zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from lowbit.rotations import Rotation

# Elements of all weights together that one step looks at.
_SAMPLE = 2**22
# Mean angle of the first step in radians, and momentum.
_STEP, _MOMENTUM = 0.02, 0.9


@final
@dataclass(frozen=True)
class Part:
    """A matrix that will be turned and then rounded.

    Attributes:
        load: it, `[rows, cols]`, any dtype; may be a view of a file.
        scale: float64 factor per column, of a norm that is folded into it; None for a weight that writes the stream.
        writes: whether its rows are the stream's channels; else its columns are.
    """

    load: Callable[[], Tensor]
    scale: Tensor | None
    writes: bool


@final
@dataclass(frozen=True, eq=False)
class Learned:
    """A rotation, and the objective on one sample before and after."""

    rotation: Rotation
    before: float
    after: float


def learn(start: Rotation, parts: Sequence[Part], steps: int, group: int, seed: int) -> Learned:
    """Improve a rotation; where the objective does not fall on a sample that no step saw, it stays as it was.

    Args:
        start: where to begin.
        parts: what it turns.
        steps: number of Cayley steps.
        group: columns that share a scale; 0 for whole rows.
        seed: of the samples.
    """
    generator = torch.Generator().manual_seed(seed)
    fixed = _draw(parts, group, generator)
    matrix = start.matrix().float()
    before = float(_noise(matrix, fixed, group))
    velocity = torch.zeros_like(matrix)
    for step in range(steps):
        velocity = _MOMENTUM * velocity + _tangent(matrix, _draw(parts, group, generator), group)
        angle = _STEP * (1 - step / steps) * len(matrix) ** 0.5 / velocity.norm().clamp(min=1e-30)
        half = velocity * (angle / 2)
        unit = torch.eye(len(matrix))
        matrix = torch.linalg.solve(unit + half, (unit - half) @ matrix)
    exact, upper = torch.linalg.qr(matrix.double())
    turned = Rotation(torch.ones(len(matrix), dtype=torch.float64), (exact * upper.diagonal().sign(),))
    after = float(_noise(turned.factors[0].float(), fixed, group))
    return Learned(turned, before, after) if after < before else Learned(start, before, before)


def _tangent(matrix: Float[Tensor, "width width"], sample: Sequence[Tensor], group: int) -> Tensor:
    """The skew matrix along which the objective rises fastest."""
    with torch.inference_mode(False), torch.enable_grad():
        point = matrix.clone().requires_grad_()
        (slope,) = torch.autograd.grad(_noise(point, sample, group), point)
    outer = slope @ matrix.T
    return (outer - outer.T) / 2


def _noise(matrix: Float[Tensor, "width width"], sample: Sequence[Tensor], group: int) -> Float[Tensor, ""]:
    """Mean over the parts of `max(w^2)` in a run of columns, over the mean of `w^2`.

    A reader's sample is `[rows, width]`, a writer's `[runs, cols, width]`: both are turned along the last axis.
    """
    total = torch.zeros(())
    for each in sample:
        turned = each @ matrix
        runs = turned.transpose(1, 2) if each.ndim == 3 else turned.reshape(len(each), -1, _run(each.shape[1], group))
        total = total + runs.abs().amax(-1).square().mean() / each.square().mean().clamp(min=1e-30)
    return total / max(len(sample), 1)


def _run(cols: int, group: int) -> int:
    return group if group and cols % group == 0 else cols


def _draw(parts: Sequence[Part], group: int, generator: torch.Generator) -> list[Tensor]:
    """Some rows of every reader, some runs of columns of every writer, float32."""
    share, found = _SAMPLE // max(len(parts), 1), []
    for part in parts:
        weight = part.load()
        width = weight.shape[0 if part.writes else 1]
        if part.writes:
            run = _run(weight.shape[1], group)
            whole = weight.shape[1] // run
            chosen = torch.randperm(whole, generator=generator)[: max(share // (width * run), 1)]
            found.append(weight.reshape(width, whole, run)[:, chosen].float().permute(1, 2, 0).contiguous())
        else:
            chosen = torch.randperm(len(weight), generator=generator)[: max(share // width, 1)]
            rows = weight[chosen].float()
            found.append(rows if part.scale is None else rows * part.scale.float())
    return found
