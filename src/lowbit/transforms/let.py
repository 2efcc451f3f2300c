"""Learned equivalent transformation: factors by gradient descent on the block's output. See `docs/methods/let.md`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from lowbit.blocks import Block, Site
from lowbit.methods import Stats
from lowbit.methods._learn import grouped, within_rows
from lowbit.schemes import Scheme
from lowbit.transforms import Transform
from lowbit.transforms._search import Factors, balanced, choose, rounded, smoothing, tokens_tried


@final
@dataclass(frozen=True)
class Options:
    """How factors are learned.

    Attributes:
        steps: of Adam, for each set of weights that read one input.
        batch: windows per step.
        lr: rate for the logarithms of the factors; it falls to 0 along a line.
        strengths: of smoothing, tried for the start as `smoothquant` tries them.
        windows: calibration windows by which start and end are judged, a longer one than 512 tokens for several; as
            many others confirm the choice.
    """

    steps: int = 40
    batch: int = 4
    lr: float = 0.01
    strengths: int = 5
    windows: int = 16

    def __post_init__(self) -> None:
        if self.steps < 0 or self.batch < 1 or self.lr < 0:
            raise ValueError("steps and lr must be 0 or more, batch 1 or more")
        if self.strengths < 2 or self.windows < 1:
            raise ValueError("strengths must be 2 or more, windows 1 or more")


def search(site: Site, block: Block, stats: Stats, options: Options) -> Factors | None:
    """Factors learned with all weights of the site rounded to nearest (Shao et al., arXiv:2308.13137, section 3.3).

    None where neither they nor those of the start have less error than no factors.
    """
    inputs = stats["absmax"].float()
    candidates = list(smoothing(site, block, inputs, options.strengths))
    if not candidates:
        return None
    start = choose(site, block, candidates, options.windows)
    if any(within_rows(block.schemes[name]) for name in site.weights):
        return start
    first = torch.ones(site.channels) if start is None else start
    learned = _descend(site, block, first, options)
    return choose(site, block, [first, learned], options.windows)


def _descend(site: Site, block: Block, start: Factors, options: Options) -> Factors:
    """The factors after all steps, or where the loss was last finite."""
    logs, dice = start.log(), torch.Generator().manual_seed(block.seed)
    adam = torch.optim.Adam([logs], lr=options.lr)
    for step in range(options.steps):
        adam.param_groups[0]["lr"] = options.lr * (1 - step / options.steps)
        batch = torch.randperm(block.windows, generator=dice)[: options.batch].tolist()
        logs.grad = _slopes(site, block, logs.exp(), batch)
        if not logs.grad.isfinite().all():
            break
        adam.step()
    return balanced(logs.exp())


def _slopes(site: Site, block: Block, factors: Factors, batch: Sequence[int]) -> Factors:
    """Derivatives of the loss by the logarithms of the factors; roundings pass them straight through."""
    weights = {name: weight.requires_grad_() for name, weight in rounded(site, block, factors).items()}
    given = factors.clone().requires_grad_()
    with torch.enable_grad():
        shared = (dict.fromkeys(site.weights, given),) if block.activations else ()
        gap = block.run(batch, weights, *shared).float() - block.target(batch).float()
        (gap * block.weighed(gap)).mean().backward()  # type: ignore[no-untyped-call]
    total = torch.zeros_like(factors) if given.grad is None else given.grad * factors
    for name, made in weights.items():
        assert made.grad is not None
        total += weight_slopes(block.weights[name], made.detach(), made.grad, factors, block.schemes[name])
    return total


def weight_slopes(
    weight: Float[Tensor, "rows cols"],
    made: Float[Tensor, "rows cols"],
    grad: Float[Tensor, "rows cols"],
    factors: Factors,
    scheme: Scheme,
) -> Factors:
    """Derivatives by the logarithms of the factors `s` of a loss whose derivative by `made = Q(W s) / s` is `grad`.

    With the rounding's derivative 1, a weight moves by its error, `W - made`, against its own factor, and by as much
    with the range of its group: that of the weights at the ends of the range.
    """
    pulls = grad * (weight - made)
    source = grouped(weight * factors, scheme)
    sums = source.split(pulls).sum(1, keepdim=True)
    if scheme.zero == "none":
        above = (source.high >= -source.low).float()
        shares = (above, 1 - above)
    else:
        span = (source.high - source.low).clamp(min=torch.finfo(torch.float32).tiny)
        shares = (source.high / span, -source.low / span)
    ends = torch.zeros_like(source.values)
    for share, at in zip(shares, (source.values.argmax(1), source.values.argmin(1)), strict=True):
        ends.scatter_add_(1, at[:, None], share * sums)
    flat: Factors = (pulls - ends.view(len(weight), -1)[:, : weight.shape[1]]).sum(0)
    return flat


TRANSFORM = Transform(
    about="factors learned from the block's output, for what smoothing alone leaves (OmniQuant's LET)",
    search=search,
    options=Options,
    needs=frozenset({"absmax"}),
    method="omniquant",
    # Forward, and backward twice as long; the start's candidates, and both ends on the windows that choose and confirm.
    batch=lambda options: options.batch,
    tokens=lambda options, length: (
        length * 3 * options.steps * options.batch
        + tokens_tried(options.windows, length, options.strengths)
        + tokens_tried(options.windows, length, 2)
    ),
)
