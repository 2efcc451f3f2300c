"""Learned factors: their slopes against a graph with the rounding written out, and what they are for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowbit.blocks import Block, Site
from lowbit.budget import MemoryWatch
from lowbit.methods.rtn import METHOD as RTN
from lowbit.schemes import parse
from lowbit.stages._activations import rounded
from lowbit.stages.calibrate import calibrate, prepare
from lowbit.stages.checkpoint import open_checkpoint
from lowbit.stages.plan import Calibration, Rules, as_planned, make_plan
from lowbit.stages.write import open_output
from lowbit.transforms import smoothquant
from lowbit.transforms.let import TRANSFORM, Options, _slopes, weight_slopes
from tests.reference.models import save_tiny
from tests.reference.small_block import SITES, Small, as_block, small, statistics

OUTLIERS = (2, 7, 11, 16, 23, 30)


def straight(x: Tensor) -> Tensor:
    """Rounded, with the derivative 1."""
    return x + (x.round() - x).detach()


def by_graph(weight: Tensor, factors: Tensor, grad: Tensor, group: int, asym: bool) -> Tensor:
    """Derivatives by the logarithms of the factors, from a graph through 4-bit rounding, one group after the other."""
    logs = factors.double().log().requires_grad_()
    u = weight.double() * logs.exp()
    made = torch.zeros_like(u)
    for row in range(len(u)):
        for at in range(0, u.shape[1], group):
            part = u[row, at : at + group]
            if asym:
                low, high = part.min().clamp(max=0), part.max().clamp(min=0)
                scale = (high - low) / 15
                zero = (-low / scale).round().detach()
                made[row, at : at + group] = (straight(part / scale).clamp(-zero, 15 - zero)) * scale
            else:
                scale = part.abs().max() / 7.5
                made[row, at : at + group] = straight(part / scale).clamp(-8, 7) * scale
    return torch.autograd.grad((made / logs.exp() * grad).sum(), logs)[0]


@pytest.mark.parametrize(("scheme", "group"), [("int4-g16-f32", 16), ("int4-row-f32", 40), ("int4-g16-asym-f32", 16)])
def test_slopes_are_those_of_a_graph_through_the_rounding(scheme: str, group: int) -> None:
    dice = torch.Generator().manual_seed(0)
    weight, grad = torch.randn(12, 40, generator=dice), torch.randn(12, 40, generator=dice)
    factors, kind = torch.rand(40, generator=dice) + 0.5, parse(scheme)
    made = RTN.quantize(weight * factors, {}, kind, RTN.options()).dequantize() / factors
    found = weight_slopes(weight, made, grad, factors, kind)
    wanted = by_graph(weight, factors, grad, group, "asym" in scheme)
    if "asym" in scheme:  # at the ends of the range a zero point that is rounded clips a little
        assert torch.corrcoef(torch.stack([found.double(), wanted]))[0, 1] > 0.98
    else:
        torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("scheme", "wide"), [("int8-row-f32", 32), ("int4-g16-f32", 16)])
def test_slopes_of_rounded_inputs_are_those_of_a_graph(scheme: str, wide: int) -> None:
    dice = torch.Generator().manual_seed(1)
    x, grad = torch.randn(9, 32, generator=dice), torch.randn(9, 32, generator=dice)
    factors = (torch.rand(32, generator=dice) + 0.5).requires_grad_()
    out = rounded(x, parse(scheme), None, factors)
    torch.testing.assert_close(out, rounded(x, parse(scheme), None, factors.detach()))
    (found,) = torch.autograd.grad((out * grad).sum(), factors)
    logs = factors.detach().double().log().requires_grad_()
    groups = (x.double() / logs.exp()).view(9, -1, wide)
    top = 2 ** (parse(scheme).grid.bits - 1)
    scale = groups.abs().amax(-1, keepdim=True) / (top - 0.5)
    made = (straight(groups / scale).clamp(-top, top - 1) * scale).view(9, 32) * logs.exp()
    (wanted,) = torch.autograd.grad((made * grad).sum(), logs)
    torch.testing.assert_close((found * factors.detach()).double(), wanted, rtol=1e-3, atol=1e-4)


def w4a4(model: Small) -> Block:
    """The small block; inputs are rounded as calibration rounds them, with derivatives by the factors."""
    plain = as_block(model, "int4-g16-f32", "int4-row-f32", lambda scheme: lambda x: rounded(x.float(), parse(scheme)))

    def run(indices: list[int], weights: dict[str, Tensor], factors: dict[str, Tensor] | None = None) -> Tensor:
        def around(name: str, x: Tensor) -> Tensor:
            flat = x.reshape(-1, x.shape[-1]).float()
            return rounded(flat, parse("int4-row-f32"), None, (factors or {}).get(name)).view(x.shape).double()

        names = model.weights
        watched = {name: lambda x, name=name: around(name, x) for name in names}
        return model.inputs(indices, weights, watched)["out"].float()

    return Block(
        weights=plain.weights, schemes=plain.schemes, windows=plain.windows, run=run, target=plain.target,
        nearest=plain.nearest, activations=plain.activations,
    )  # fmt: skip


def error(block: Block, site: Site, s: Tensor) -> float:
    weights = {name: block.nearest(name, block.weights[name] * s) / s for name in site.weights}
    every = list(range(block.windows))
    found = block.run(every, weights, dict.fromkeys(site.weights, s))
    return float((found - block.target(every)).square().mean())


def test_learning_goes_on_from_where_smoothing_ends() -> None:
    """Of two strengths, which leave something to learn: of five the best is met by chance, if it is."""
    site, model = SITES[0], small(OUTLIERS)
    block, stats = w4a4(model), statistics(model, site)
    start = smoothquant.TRANSFORM.search(site, block, stats, smoothquant.Options(strengths=2, windows=3))
    found = TRANSFORM.search(site, block, stats, Options(windows=3, steps=60, strengths=2))
    assert start is not None and found is not None
    before = error(block, site, start)
    assert error(block, site, found) < 0.96 * before < 0.96 * error(block, site, torch.ones(site.channels))
    unlearned = TRANSFORM.search(site, block, stats, Options(windows=3, steps=0, strengths=2))
    assert unlearned is not None and torch.allclose(start, unlearned)


def test_errors_count_as_the_information_says() -> None:
    """Where it is known: the slopes of a channel's errors double with it."""
    site, model = SITES[0], small(())
    block, factors = w4a4(model), torch.linspace(0.5, 2, SITES[0].channels)
    even = torch.eye(block.target([0]).shape[-1])
    plain, twice = (_slopes(site, replace(block, information=f), factors, [0, 1]) for f in (None, 2 * even))
    torch.testing.assert_close(twice, 2 * plain)
    assert plain.any()


@pytest.mark.parametrize(("kind", "method"), [("llama", "let+rtn"), ("gpt2", "let+omniquant"), ("phi3", "let+gptq")])
def test_factors_are_learned_in_the_blocks_of_a_model(kind: str, method: str, tmp_path: Path) -> None:
    """Through merged weights, transposed ones, and inputs that are rounded."""
    save_tiny(kind, tmp_path / "model")
    source, text = open_checkpoint(tmp_path / "model"), Calibration(("text",), dtype="float32")
    options: dict[str, Any] = {"let.steps": 8, "let.lr": 0.03}
    options |= {"epochs": 2} if method == "let+omniquant" else {}
    settings: dict[str, Any] = {"activations": "int8-row"} if kind == "llama" else {}
    stored = ("int3-g16", method, "gptq") if kind == "gpt2" else ("int4-g8", method, "compressed-tensors")
    plan = make_plan(source, Rules(*stored, calibration=text, options=options, **settings))
    ids = torch.randint(3, 96, (8, 24), generator=torch.Generator().manual_seed(1))
    source = as_planned(source, plan)
    with open_output(tmp_path / "out", source, plan) as output:
        calibrate(prepare(source, plan, ids, None, 1), output, MemoryWatch(None))
        facts = {name: record.facts for name, record in output.records.items()}
    assert any(each["folded"] for each in facts.values())
    assert all(facts[entry.weight.name]["relative_error"] < 0.1 for entry in plan.entries if entry.weight.scheme)
