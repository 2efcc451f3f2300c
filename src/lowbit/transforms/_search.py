"""What the transforms that search have in common: the error of a block's output under candidate factors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import isnan

import torch
from jaxtyping import Float
from torch import Tensor

from lowbit.blocks import Block, Site, Weights

Factors = Float[Tensor, "channels"]

_BATCH = 4  # windows per run: enough rows for fast products, few enough that activations stay small beside weights
_WINDOW = 512  # tokens of a window that counts as one where candidates are judged
_SCREEN = 1024  # tokens that tell which candidates are worth all
_KEPT = 8  # candidates are
_LEAST = 1e-4  # of the largest: a channel that is nearly never used pulls no other factor


def spread(block: Block, count: int) -> tuple[list[int], list[int]]:
    """Two disjoint, evenly spread sets of up to `count` windows: one to choose by, one to confirm the choice.

    The second is empty where the block has one window.
    """
    total = min(2 * count, block.windows)
    chosen = [i * block.windows // total for i in range(total)]
    return chosen[::2], chosen[1::2]


def judging(windows: int, length: int) -> int:
    """How many windows of `length` tokens judge where `windows` were asked for: longer ones are several."""
    return max(windows * _WINDOW // max(length, _WINDOW), 1)


def _screening(windows: int, length: int) -> int:
    """How many of the windows that judge tell which candidates are worth all."""
    return min(-(-_SCREEN // length), windows)


def tokens_tried(windows: int, length: int, candidates: int) -> int:
    """Tokens that `choose` runs through a block, those without factors and of the last comparison included."""
    judges = judging(windows, length)
    few = _screening(judges, length)
    screened = few < judges and candidates > _KEPT
    return length * ((few * candidates + judges * _KEPT if screened else judges * candidates) + 3 * judges)


def rounded(site: Site, block: Block, factors: Factors) -> dict[str, Tensor]:
    """The site's weights times the factors, quantized, and divided by them again: what they mean to the old input."""
    return {name: block.nearest(name, block.weights[name] * factors).div_(factors) for name in site.weights}


@torch.no_grad()
def output_error(block: Block, indices: Sequence[int], weights: Weights, factors: Weights) -> float:
    """Mean loss by the difference between the block's output with these weights and what the float model computes."""
    error, count = 0.0, 0
    for start in range(0, len(indices), _BATCH):
        batch = indices[start : start + _BATCH]
        # Factors matter where inputs are quantized, and only there has `run` a use for them.
        found = block.run(batch, weights, factors) if block.activations else block.run(batch, weights)
        difference = found.float() - block.target(batch).float()
        error += block.loss(difference)
        count += difference.numel()
    return error / max(count, 1)


def choose(site: Site, block: Block, candidates: Iterable[Factors], windows: int) -> Factors | None:
    """The candidate with the least output error; None where it does not beat no factors, on other windows too.

    All are tried on a few windows, and the best of these on all that judge.
    """
    length = block.target([0]).shape[1]
    search, confirm = spread(block, judging(windows, length))

    def error_of(factors: Factors, indices: Sequence[int]) -> float:
        return output_error(block, indices, rounded(site, block, factors), dict.fromkeys(site.weights, factors))

    ones, tried = torch.ones(site.channels), [site.tied(factors) for factors in candidates]
    few = search[:: len(search) // _screening(len(search), length)]
    if len(few) < len(search) and len(tried) > _KEPT:
        errors = [error_of(factors, few) for factors in tried]
        order = sorted(range(len(tried)), key=lambda at: (isnan(errors[at]), errors[at]))
        tried = [tried[at] for at in sorted(order[:_KEPT])]
    best, least = None, error_of(ones, search)
    for factors in tried:
        error = error_of(factors, search)
        if error < least:  # never so for NaN
            best, least = factors, error
    if best is not None and confirm and error_of(best, confirm) >= error_of(ones, confirm):
        return None
    return best


def smoothing(site: Site, block: Block, inputs: Factors, strengths: int) -> Iterator[Factors]:
    """`x**a / w**(1 - a)` (Xiao et al., arXiv:2211.10438, equation 4), a from 0 to 1; nothing for inputs of 0.

    x and w are the greatest magnitudes of a channel among the inputs and the weights that read it.
    """
    weights = torch.stack([block.weights[name].abs().amax(0) for name in site.weights]).amax(0)
    if inputs.isfinite().all() and inputs.any() and weights.any():
        x, w = floored(inputs), floored(weights)
        powers = (i / (strengths - 1) for i in range(strengths))
        yield from (balanced(x**a / w ** (1 - a)) for a in powers)


def balanced(factors: Factors) -> Factors:
    """Positive, finite factors scaled so that the largest and the least are each other's reciprocals."""
    factors = floored(factors)
    return factors / (factors.max() * factors.min()).sqrt()


def floored(sizes: Factors) -> Factors:
    """Magnitudes with those near 0 raised to a small share of the largest."""
    return sizes.clamp(min=_LEAST * sizes.max().item())
