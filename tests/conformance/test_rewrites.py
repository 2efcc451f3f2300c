"""Every file of `transforms/` and `corrections/`, found by listing, against their contracts."""

from __future__ import annotations

from dataclasses import is_dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lowbit import plugins
from lowbit.blocks import Block, Site
from lowbit.corrections import Correction
from lowbit.methods import Stats
from lowbit.transforms import Transform
from tests.reference.small_block import SITES, as_block, small

DOCS = Path(__file__).resolve().parents[2] / "docs" / "methods"


def statistics(names: frozenset[str], rows: Tensor) -> Stats:
    found = {}
    for name in names:
        kind = plugins.load("stats", name)
        state = kind.start(rows.shape[1], 0)
        kind.update(state, rows, rows if kind.paired else None)
        found[name] = kind.finish(state)
    return found


@pytest.fixture(scope="module")
def block() -> Block:
    return as_block(small(), "int3-g16")


@pytest.mark.parametrize("site", SITES, ids=lambda site: site.weights[0])
@pytest.mark.parametrize("name", plugins.names("transforms"))
def test_a_transform_gives_positive_finite_factors_the_same_each_time_or_none(
    name: str, site: Site, block: Block
) -> None:
    transform: Transform = plugins.load("transforms", name)
    model = small()
    rows = model.inputs(range(6), {}, {})[site.weights[0]].reshape(-1, site.channels).float()
    own = {key: weight.clone() for key, weight in block.weights.items()}
    found = [transform.search(site, block, statistics(transform.needs, rows), transform.options()) for _ in range(2)]
    assert all(torch.equal(own[key], weight) for key, weight in block.weights.items()), "it changed the weights"
    if found[0] is None or found[1] is None:
        assert found == [None, None]
        return
    assert torch.equal(found[0], found[1]) and found[0].shape == (site.channels,)
    assert found[0].dtype == torch.float32 and found[0].isfinite().all() and (found[0] > 0).all()


@pytest.mark.parametrize("name", plugins.names("transforms"))
def test_a_transform_leaves_inputs_of_zero_alone_and_is_followed_by_a_method(name: str, block: Block) -> None:
    transform: Transform = plugins.load("transforms", name)
    stats = statistics(transform.needs, torch.zeros(64, SITES[0].channels))
    assert transform.search(SITES[0], block, stats, transform.options()) is None
    assert transform.method in plugins.names("methods")
    assert transform.about and is_dataclass(transform.options) and (DOCS / f"{name}.md").exists()
    assert transform.tokens(transform.options(), 64) > 0


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (3, 40), (48, 32)])
@pytest.mark.parametrize("name", plugins.names("corrections"))
def test_a_correction_is_low_rank_and_lessens_the_error(name: str, shape: tuple[int, int]) -> None:
    correction: Correction = plugins.load("corrections", name)
    dice = torch.Generator().manual_seed(0)
    error = torch.randn(shape, generator=dice)
    rows = torch.randn(256, shape[1], generator=dice) @ torch.randn(shape[1], shape[1], generator=dice)
    stats = statistics(correction.needs, rows)
    term = correction.fit(error, stats, correction.options(rank=4))
    down, up = term.down, term.up
    rank = min(4, *shape)
    assert down.shape == (rank, shape[1]) and up.shape == (shape[0], rank)
    assert torch.equal(down, down.bfloat16().float()) and torch.equal(up, up.bfloat16().float())
    before, after = (rows @ error.T).square().sum(), (rows @ (error - up @ down).T).square().sum()
    assert after < before
    assert term.gains.shape == (rank,) and torch.equal(term.gains, term.gains.sort(descending=True).values)
    assert correction.about and is_dataclass(correction.options)
