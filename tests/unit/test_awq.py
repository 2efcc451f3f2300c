"""AWQ's factors against the search written out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowbit.blocks import Block, Site, Weights
from lowbit.transforms import _search
from lowbit.transforms._search import judging
from lowbit.transforms.awq import TRANSFORM, Options
from tests.reference.small_block import SITES, Small, as_block, small, statistics

ONE_SET = Options(ratios=20, duo=False, windows=3)


def exponents(model: Small, site: Site, group: int, options: Options) -> list[Tensor]:
    """Every candidate, channel by channel in float64."""
    x = model.inputs(range(len(model.x)), {}, {})[site.weights[0]].reshape(-1, site.channels).abs().mean(0)
    rows = torch.cat([model.weights[name].double() for name in site.weights])
    sizes = torch.zeros(site.channels, dtype=torch.float64)
    for row in rows:
        for at in range(0, site.channels, group):
            sizes[at : at + group] += row[at : at + group].abs() / row[at : at + group].abs().max() / len(rows)
    steps = options.ratios
    plain = [x ** (i / steps) for i in range(1, steps + 1)]
    duo = [x ** (i / steps) / sizes ** (1 - i / steps) for i in range(steps)] if options.duo else []
    return [s / (s.max() * s.min()).sqrt() for s in plain + duo]


def mean_error(block: Block, model: Small, site: Site, s: Tensor, indices: list[int]) -> float:
    s = s.float()
    weights = {name: block.nearest(name, model.weights[name] * s) / s for name in site.weights}
    wanted = model.inputs(indices, {}, {})["out"]
    return float((model.inputs(indices, weights, {})["out"] - wanted).square().mean())


@pytest.mark.parametrize("duo", [False, True])
@pytest.mark.parametrize("site", SITES, ids=str)
@pytest.mark.parametrize("scheme", ["int3-g16-asym", "int4-g16", "nf4-g16"])
def test_the_search_is_brute_force(scheme: str, site: Site, duo: bool) -> None:
    model, options = small(times=20), replace(ONE_SET, duo=duo)
    block = as_block(model, scheme)
    found = TRANSFORM.search(site, block, statistics(model, site), options)
    trials = exponents(model, site, 16, options)
    errors = [mean_error(block, model, site, s, [0, 2, 4]) for s in trials]
    best, ones = trials[errors.index(min(errors))], torch.ones(site.channels)
    helps = all(
        mean_error(block, model, site, best, part) < mean_error(block, model, site, ones, part)
        for part in ([0, 2, 4], [1, 3, 5])
    )
    assert (found is not None) == helps
    if found is not None:
        torch.testing.assert_close(found, best.float(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("site", SITES, ids=str)
def test_a_few_windows_tell_which_candidates_are_worth_all(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    model, options, tokens = small(times=20, windows=16), Options(windows=8), list[int]()
    monkeypatch.setattr(_search, "_SCREEN", 40)
    block = as_block(model, "int3-g16")

    def counted(indices: Sequence[int], weights: Weights, factors: Weights | None = None) -> Tensor:
        tokens.append(20 * len(indices))
        return block.run(indices, weights, factors) if factors else block.run(indices, weights)

    found = TRANSFORM.search(site, replace(block, run=counted), statistics(model, site), options)
    trials, even = exponents(model, site, 16, options), list(range(0, 16, 2))
    errors = sorted(mean_error(block, model, site, s, even) for s in trials)
    assert found is not None and len(trials) == 40
    assert mean_error(block, model, site, found, even) <= errors[1] * (1 + 1e-5), "one of the best two of all"
    assert sum(tokens) == _search.tokens_tried(8, 20, 40) == 20 * (2 * 40 + 8 * 8 + 8 * 3)


def test_factors_are_found_where_channels_differ() -> None:
    """So that the comparison above is not one of `None` with `None`."""
    model = small(times=20)
    found = TRANSFORM.search(SITES[0], as_block(model, "int3-g16"), statistics(model, SITES[0]), ONE_SET)
    assert found is not None
    assert found.dtype == torch.float32 and found.shape == (32,)
    assert (found > 0).all() and found.isfinite().all()
    torch.testing.assert_close(found.max() * found.min(), torch.tensor(1.0))
    others = torch.ones(32, dtype=torch.bool)
    others[[3, 17]] = False
    assert found[~others].min() > found[others].max()


def test_nothing_is_scaled_where_nothing_is_lost() -> None:
    """Weights that are exact on the grid: no factor can do better."""
    model = small(outliers=())
    exact = {name: (w * 8).round().clamp(-3, 3) / 8 for name, w in model.weights.items()}
    model = replace(model, weights=exact)
    block = replace(as_block(model, "int4-row-f32"), nearest=lambda name, w: ((w * 8).round() / 8).clamp(-1, 1))
    for site in SITES:
        x = statistics(model, site)
        assert TRANSFORM.search(site, block, x, ONE_SET) is None


def test_a_choice_that_other_windows_do_not_confirm_is_dropped() -> None:
    """On the confirming windows (odd ones) the target is what plain rounding computes."""
    model = small(times=20)
    block, site = as_block(model, "int3-g16"), SITES[0]
    plain: Weights = {name: block.nearest(name, model.weights[name]) for name in site.weights}

    def target(indices: Sequence[int]) -> Tensor:
        right, wrong = block.target(indices), block.run(indices, plain)
        odd = torch.tensor([i % 2 == 1 for i in indices])[:, None, None]
        return torch.where(odd, wrong, right)

    stats = statistics(model, site)
    assert TRANSFORM.search(site, block, stats, ONE_SET) is not None
    assert TRANSFORM.search(site, replace(block, target=target), stats, ONE_SET) is None


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_useless_statistics_scale_nothing(value: float) -> None:
    model, site = small(), SITES[0]
    stats = {"mean_abs": torch.full((32,), value)}
    assert TRANSFORM.search(site, as_block(model, "int4-g16"), stats, ONE_SET) is None


def test_a_set_of_weights_that_are_all_0_is_not_scaled() -> None:
    model, site = small(times=20), SITES[0]
    for name in site.weights:
        model.weights[name][:] = 0
    stats = statistics(model, site)
    assert TRANSFORM.search(site, as_block(model, "int3-g16"), stats, replace(ONE_SET, duo=True)) is None


def test_dead_channels_and_dead_weights_give_usable_factors() -> None:
    model, site = small(times=20), SITES[0]
    for name in site.weights:
        model.weights[name][:, 5] = 0
        model.weights[name][4] = 0
    stats = dict(statistics(model, site))
    stats["mean_abs"][5] = 0
    found = TRANSFORM.search(site, as_block(model, "int3-g16"), stats, replace(ONE_SET, duo=True))
    assert found is not None
    assert found.isfinite().all() and (found > 0).all() and found.max() / found.min() < 1e9


def test_one_window_is_enough() -> None:
    model = small(times=20, windows=1)
    assert TRANSFORM.search(SITES[0], as_block(model, "int3-g16"), statistics(model, SITES[0]), ONE_SET) is not None


@pytest.mark.parametrize("duo", [False, True])
def test_the_estimate_counts_the_windows_that_are_run(duo: bool) -> None:
    model, options, runs = small(times=20), Options(ratios=5, duo=duo, windows=3), list[int]()
    block = as_block(model, "int3-g16")

    def run(indices: Sequence[int], weights: Weights) -> Tensor:
        runs.append(len(indices))
        out: Tensor = block.run(indices, weights)
        return out

    assert TRANSFORM.search(SITES[0], replace(block, run=run), statistics(model, SITES[0]), options) is not None
    length = model.x.shape[1]
    assert sum(runs) * length == TRANSFORM.tokens(options, length)


def test_long_windows_count_for_several() -> None:
    assert [judging(16, length) for length in (20, 512, 1000, 2048, 100_000)] == [16, 16, 8, 4, 1]
    model, runs = small(times=20), list[int]()
    block = as_block(replace(model, x=torch.randn(6, 1024, 32)), "int3-g16")

    def run(indices: Sequence[int], weights: Weights) -> Tensor:
        runs.extend(indices)
        out: Tensor = block.run(indices, weights)
        return out

    TRANSFORM.search(SITES[0], replace(block, run=run), statistics(model, SITES[0]), replace(ONE_SET, windows=4))
    assert set(runs) <= {0, 1, 3, 4} and (runs.count(0), runs.count(3)) == (20 + 1 + 8, 1 + 8)


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="1 or more"):
        Options(ratios=0)
