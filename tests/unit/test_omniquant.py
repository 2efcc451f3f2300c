"""OmniQuant: against its definition, the same every time, stored as it was seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lowbit.blocks import Block, Weights
from lowbit.methods import Method, _learn, autoround, omniquant, rtn
from lowbit.methods.omniquant import METHOD, Options, learn
from lowbit.schemes import Scheme, parse
from lowbit.tensors import QTensor
from tests.reference import autoround as reference

WINDOWS, TOKENS, WIDTH, INNER = 12, 16, 24, 40
SCHEMES = [
    "int2-g8-asym",
    "int3-g16",
    "int4-row",
    "int3-g20-asym",
    "int3-g13-fzero",
    "int3-g16-min-bf16",
    "nf4",
    "nvfp4",
]


def matrices() -> dict[str, Tensor]:
    dice = torch.Generator().manual_seed(5)
    shapes = {"up": (INNER, WIDTH), "down": (WIDTH, INNER)}
    return {name: torch.randn(shape, generator=dice) ** 3 for name, shape in shapes.items()}  # heavy tails to clip


def block_of(scheme: str, dtype: torch.dtype = torch.float32) -> Block:
    kind, weights = parse(scheme), matrices()
    hidden = torch.randn(WINDOWS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(6)).to(dtype)

    def run(indices: Sequence[int], given: Weights) -> Tensor:
        x = hidden[list(indices)]
        output: Tensor = x + (x @ given["up"].T).relu() @ given["down"].T
        return output

    wanted = run(range(WINDOWS), {name: weight.to(dtype) for name, weight in weights.items()})

    def nearest(name: str, weight: Tensor) -> Tensor:
        return nearest_of(weight, kind).dequantize()

    kinds = dict.fromkeys(weights, kind)
    return Block(weights, kinds, WINDOWS, run, lambda indices: wanted[list(indices)], nearest, seed=7)


def nearest_of(weight: Tensor, scheme: Scheme) -> QTensor:
    return rtn.METHOD.quantize(weight, {}, scheme, rtn.METHOD.options())


def loss_of(block: Block, weights: Weights) -> float:
    everything = range(WINDOWS)
    return (block.run(everything, weights) - block.target(everything)).double().square().mean().item()


@pytest.mark.parametrize("scheme", ["int3-g16", "int2-g8-asym", "int4-row-asym"])
def test_ranges_are_those_of_the_definition(scheme: str) -> None:
    """6 steps in float64 with all windows in each; AdamW's first steps keep their size, whatever the loss's."""
    block, kind = block_of(scheme, torch.float64), parse(scheme)
    slow = {
        name: reference.Weight(weight, kind.grid.bits, kind.block.cols or weight.shape[1], kind.zero == "int")
        for name, weight in block.weights.items()
    }
    logits = {
        name: [torch.full_like(each.lower, 4.0).requires_grad_() for _ in range(2)] for name, each in slow.items()
    }
    adam = torch.optim.AdamW([logit for pair in logits.values() for logit in pair], lr=0.3, weight_decay=0)
    learners = {name: omniquant._Clipping(weight, kind, Options(lr=0.3)) for name, weight in block.weights.items()}
    _learn.descend(block, learners, 6, WINDOWS)
    everything = range(WINDOWS)
    for step in range(7):
        for name, each in slow.items():
            each.lower, each.upper = (logit.sigmoid() for logit in logits[name])
        if step < 6:
            output = block.run(everything, {name: each.codes_and_value()[1] for name, each in slow.items()})
            adam.zero_grad()
            (output - block.target(everything)).square().sum().backward()  # type: ignore[no-untyped-call]
            adam.step()
    for name, learner in learners.items():
        codes, value = slow[name].codes_and_value()
        assert torch.equal(learner.result().codes.double(), codes)
        torch.testing.assert_close(learner.result().dequantize().double(), value.detach(), rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_loss_ends_below_its_start(scheme: str) -> None:
    block = block_of(scheme)
    learned = {name: stored.dequantize() for name, stored in learn(block, Options(epochs=40, batch=6)).weights.items()}
    start = {name: nearest_of(weight, parse(scheme)).dequantize() for name, weight in block.weights.items()}
    assert loss_of(block, learned) < 0.98 * loss_of(block, start) or scheme in ("nf4", "nvfp4")  # whole ranges are best


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_stored_is_what_the_loss_saw(scheme: str) -> None:
    for weight in matrices().values():
        learner = omniquant._Clipping(weight, parse(scheme), Options(lr=0.5))
        for step in range(3):
            learner.step(torch.randn(weight.shape, generator=torch.Generator().manual_seed(step)), 0.0)
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(learner.result().dequantize(dtype), learner.weight(dtype))
        assert not torch.equal(learner.result().dequantize(), nearest_of(weight, parse(scheme)).dequantize())


def test_the_same_seed_gives_the_same_bits() -> None:
    first, again = (learn(block_of("int3-g8", torch.bfloat16), Options(epochs=4, batch=5)).weights for _ in range(2))
    for name, stored in first.items():
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(stored.parts(), again[name].parts(), strict=True))


def test_options_and_schemes_that_make_no_sense_are_refused() -> None:
    wrong: list[dict[str, Any]] = [{"epochs": -1}, {"batch": 0}, {"lr": -1.0}]
    for options in wrong:
        with pytest.raises(ValueError, match="must be"):
            Options(**options)
    assert "power of two" in (METHOD.supports(parse("mxfp4")) or "")
    assert "row" in (METHOD.supports(parse("int8-tensor")) or "")


@pytest.mark.parametrize(
    ("method", "options"),
    [(METHOD, Options(epochs=3, batch=4)), (autoround.METHOD, autoround.Options(iterations=5, batch=32))],
    ids=["omniquant", "autoround"],
)
def test_time_is_estimated_from_the_windows_that_are_run(method: Method, options: Any) -> None:
    """Forward; backward is counted twice as long."""
    block, seen = block_of("int4-g8"), list[int]()

    def run(indices: Sequence[int], weights: Weights) -> Tensor:
        seen.extend(indices)
        return block.run(indices, weights)

    assert method.learn
    method.learn(replace(block, run=run), options)
    assert method.windows(options, WINDOWS) == 3 * len(seen)
