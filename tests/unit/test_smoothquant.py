"""SmoothQuant's factors against the formula written out, and what they are for: outliers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowbit.blocks import Block, Site
from lowbit.transforms.smoothquant import TRANSFORM, Options
from tests.reference.activations import int8_token
from tests.reference.small_block import SITES, Small, as_block, small, statistics

OUTLIERS = (2, 7, 11, 16, 23, 30)
FEW = Options(strengths=11, windows=3)


def w8a8(model: Small) -> Block:
    return as_block(model, "int8-row-f32", "int8-row", lambda scheme: int8_token)


def slow_factors(model: Small, names: tuple[str, ...], alpha: float) -> Tensor:
    """Equation 4, channel by channel, in float64."""
    x = model.inputs(range(len(model.x)), {}, {})[names[0]]
    out = []
    for channel in range(x.shape[-1]):
        largest = max(float(model.weights[name][:, channel].abs().max()) for name in names)
        out.append(float(x[..., channel].abs().max()) ** alpha / largest ** (1 - alpha))
    return torch.tensor(out, dtype=torch.float64)


def error(block: Block, names: tuple[str, ...], s: Tensor, indices: list[int]) -> float:
    s = s.float()
    weights = {name: block.nearest(name, block.weights[name] * s) / s for name in names}
    found = block.run(indices, weights, dict.fromkeys(names, s))
    return float((found - block.target(indices)).double().square().mean())


@pytest.mark.parametrize("scheme", ["int6-row-f32", "int8-row-f32"])
@pytest.mark.parametrize("outliers", [(), OUTLIERS], ids=str)
@pytest.mark.parametrize("site", SITES, ids=str)
def test_the_search_is_brute_force_over_the_formula(site: Site, outliers: tuple[int, ...], scheme: str) -> None:
    model = small(outliers)
    block = as_block(model, scheme, "int8-row", lambda scheme: int8_token)
    found = TRANSFORM.search(site, block, statistics(model, site), FEW)
    trials = [slow_factors(model, site.weights, a / 10) for a in range(11)]
    errors = [error(block, site.weights, s / (s.max() * s.min()).sqrt(), [0, 2, 4]) for s in trials]
    best = trials[errors.index(min(errors))]
    plain = [error(block, site.weights, torch.ones(site.channels), part) for part in ([0, 2, 4], [1, 3, 5])]
    confirmed = error(block, site.weights, best / (best.max() * best.min()).sqrt(), [1, 3, 5])
    assert (found is not None) == (min(errors) < plain[0] and confirmed < plain[1])
    if found is not None:
        ratio = found.double() / best
        torch.testing.assert_close(ratio / ratio[0], torch.ones_like(ratio), rtol=1e-4, atol=0)


def relative(block: Block, weights: dict[str, Tensor], factors: dict[str, Tensor]) -> float:
    """Error of the output, relative to what the block adds to its input, over all windows."""
    indices = range(block.windows)
    wanted = block.target(indices)
    added = wanted - block.run(indices, {name: torch.zeros_like(w) for name, w in block.weights.items()})
    return float((block.run(indices, weights, factors) - wanted).norm() / added.norm())


@pytest.mark.parametrize("outliers", [(), OUTLIERS])
def test_planted_outliers_break_plain_w8a8_and_not_smoothquant(outliers: tuple[int, ...]) -> None:
    """6 channels of the norm's output are 60 times as large, and the weights that read them 60 times as small."""
    model = small(outliers, times=60.0)
    block = w8a8(model)
    plain = {name: block.nearest(name, w) for name, w in block.weights.items()}
    smooth = dict(plain)
    factors: dict[str, Tensor] = {}
    for site in SITES:
        s = TRANSFORM.search(site, block, statistics(model, site), FEW)
        if s is not None:
            factors |= dict.fromkeys(site.weights, s)
            smooth |= {name: block.nearest(name, block.weights[name] * s) / s for name in site.weights}
    assert relative(block, smooth, factors) < 0.02
    if outliers:
        assert SITES[0].weights[0] in factors
        assert relative(block, plain, {}) > 0.1
    else:
        assert relative(block, plain, {}) < 0.02


def test_smoothing_that_does_not_help_is_left_out() -> None:
    """Inputs that are not rounded, and weights that are exact: every factor can only do harm."""
    model = small(())
    block = as_block(model, "int8-row-f32")
    block = replace(block, nearest=lambda name, w: w.clone() if torch.equal(w, model.weights[name]) else w.round())
    assert TRANSFORM.search(SITES[0], block, statistics(model, SITES[0]), FEW) is None


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_useless_statistics_smooth_nothing(value: float) -> None:
    model = small()
    assert TRANSFORM.search(SITES[0], w8a8(model), {"absmax": torch.full((32,), value)}, FEW) is None


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="2 or more"):
        Options(strengths=1)
