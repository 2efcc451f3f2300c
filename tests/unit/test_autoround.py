"""AutoRound: against its definition, the same every time, stored as it was seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu

from lowbit.blocks import Block, Weights
from lowbit.methods import _learn, autoround, ggml_fit, rtn
from lowbit.methods._attention import TiledAttention
from lowbit.methods.autoround import METHOD, Options, learn
from lowbit.schemes import Scheme, parse
from lowbit.tensors import QTensor
from tests.reference import autoround as reference

WINDOWS, TOKENS, WIDTH, INNER = 12, 16, 24, 40
SCHEMES = [
    "int2-g8-asym",
    "int3-g16",
    "int4-g7",
    "int4-row-asym",
    "int4-g16-fzero",
    "int8-row",
    "int1-g8-asym",
    "int3-g16-min-bf16",
]
SUPER = ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs"]  # scales of these are the fitted encoder's, and stay
SCHEMES += SUPER
SCHEMES += ["nf4", "nf4-dq", "fp4-row", "fp8-e4m3-row", "mxfp4", "mxfp8", "nvfp4", "levels[-1,0,0.4]-g16"]


def matrices() -> dict[str, Tensor]:
    dice = torch.Generator().manual_seed(3)
    shapes = {"up": (INNER, WIDTH), "down": (WIDTH, INNER)}
    return {name: torch.randn(shape, generator=dice) * 0.2 for name, shape in shapes.items()}


def inputs() -> Tensor:
    dice = torch.Generator().manual_seed(4)
    mixed = torch.randn(WIDTH, WIDTH, generator=dice) / WIDTH**0.5
    hidden: Tensor = torch.randn(WINDOWS, TOKENS, WIDTH, generator=dice) @ mixed
    return hidden


def compute(x: Tensor, weights: Weights) -> Tensor:
    output: Tensor = x + silu(x @ weights["up"].T) @ weights["down"].T
    return output


def block_of(scheme: str, dtype: torch.dtype = torch.float32, weights: dict[str, Tensor] | None = None) -> Block:
    kind, hidden = parse(scheme), inputs().to(dtype)
    weights = matrices() if weights is None else weights
    wanted = compute(hidden, {name: weight.to(dtype) for name, weight in weights.items()})

    def run(indices: Sequence[int], given: Weights) -> Tensor:
        return compute(hidden[list(indices)], given)

    def target(indices: Sequence[int]) -> Tensor:
        return wanted[list(indices)]

    def nearest(name: str, weight: Tensor) -> Tensor:
        return nearest_of(weight, kind).dequantize()

    return Block(weights, dict.fromkeys(weights, kind), WINDOWS, run, target, nearest, seed=7)


def nearest_of(weight: Tensor, scheme: Scheme) -> QTensor:
    if str(scheme) in SUPER:
        return ggml_fit.METHOD.quantize(weight, {}, scheme, ggml_fit.METHOD.options())
    return rtn.METHOD.quantize(weight, {}, scheme, rtn.METHOD.options())


def loss_of(block: Block, weights: Weights) -> float:
    everything = range(WINDOWS)
    return (block.run(everything, weights) - block.target(everything)).double().square().mean().item()


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("scheme", ["int4-g8", "int3-g16", "int2-g8-asym", "int4-row-asym", "int3-g7-asym"])
def test_codes_are_those_of_the_definition(scheme: str, signed: bool) -> None:
    """8 steps in float64 with all windows in each: the definition differentiates through every rounding."""
    block, kind = block_of(scheme, torch.float64), parse(scheme)
    slow = {
        name: reference.Weight(weight, kind.grid.bits, kind.block.cols or weight.shape[1], kind.zero == "int", signed)
        for name, weight in block.weights.items()
    }
    everything = range(WINDOWS)
    reference.learn(slow, lambda w: block.run(everything, w), block.target(everything), 8, 1 / 20)
    options = Options(iterations=8, lr=1 / 20, minmax_lr=1 / 20, search=False, signed=signed)
    learners = {name: autoround._SignRound(weight, kind, options) for name, weight in block.weights.items()}
    _learn.descend(block, learners, options.total, WINDOWS)
    for name, learner in learners.items():
        stored = learner.result()
        codes, value = slow[name].codes_and_value()
        assert torch.equal(stored.codes.double(), codes)
        torch.testing.assert_close(stored.dequantize().double(), value.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("scheme", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k"])
def test_codes_in_super_blocks_are_those_of_the_definition(scheme: str) -> None:
    """Scales and minima are those of the fitted encoder before and after; one of the weights ends within a block."""
    kind, dice = parse(scheme), torch.Generator().manual_seed(5)
    shapes = {"up": (INNER, 288), "down": (WIDTH, INNER)}
    given = {name: torch.randn(shape, generator=dice) * 0.2 for name, shape in shapes.items()}
    mixed = torch.randn(WIDTH, 288, generator=dice) / WIDTH**0.5

    def run(weights: Weights) -> Tensor:
        return compute(inputs().double(), {**weights, "up": weights["up"] @ mixed.double().T})

    wanted = run({name: weight.double() for name, weight in given.items()})
    fitted = {name: nearest_of(weight, kind) for name, weight in given.items()}
    slow = {name: reference.Fixed(given[name], fitted[name]) for name in given}
    fast = {name: autoround._SignRound(weight, kind, Options(lr=0.05)) for name, weight in given.items()}
    for step in range(6):
        values = {name: each.codes_and_value()[1] for name, each in slow.items()}
        grads = torch.autograd.grad((run(values) - wanted).square().sum(), list(values.values()))
        for name, grad in zip(values, grads, strict=True):
            slow[name].step(grad, 0.05 * (1 - step / 6))
            fast[name].step(grad.float(), step / 6)
    for name, learner in fast.items():
        stored, (codes, value) = learner.result(), slow[name].codes_and_value()
        assert torch.equal(stored.codes.double(), codes) and not torch.equal(stored.codes, fitted[name].codes)
        torch.testing.assert_close(stored.dequantize().double(), value.detach(), rtol=1e-6, atol=1e-7)
        used = fitted[name].scale_values() != 0
        assert torch.equal(stored.scale_values()[used], fitted[name].scale_values()[used])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_loss_ends_below_its_start(scheme: str) -> None:
    block, options = block_of(scheme), Options(iterations=60, lr=0.005, minmax_lr=0.002)
    learned = {name: stored.dequantize() for name, stored in learn(block, options).weights.items()}
    start = {name: nearest_of(weight, parse(scheme)).dequantize() for name, weight in block.weights.items()}
    assert loss_of(block, learned) <= loss_of(block, start) * (0.95 if parse(scheme).grid.bits < 8 else 1)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_stored_is_what_the_loss_saw(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = parse(scheme)
    for dtype in (torch.float32, torch.bfloat16):
        for name, weight in matrices().items():
            learner = autoround._SignRound(weight, kind, Options(lr=0.3))
            dice = torch.Generator().manual_seed(len(name))
            for progress in (0.0, 0.2, 0.5):
                learner.step(torch.randn(weight.shape, generator=dice), progress)
            stored = learner.result()
            assert stored.shape == tuple(weight.shape)
            assert torch.equal(stored.dequantize(dtype), learner.weight(dtype))
            assert not torch.equal(stored.dequantize(), nearest_of(weight, kind).dequantize())


@pytest.mark.parametrize("scheme", ["int3-g16", "int4-g16-asym", "nf4", "mxfp4"])
def test_zero_stays_zero(scheme: str) -> None:
    weight = matrices()["up"]
    weight[::2, ::3] = 0
    learner = autoround._SignRound(weight, parse(scheme), Options(lr=1.0))
    for sign in (1, 1, -1, -1, -1):
        learner.step(torch.full_like(weight, float(sign)), 0.0)
        assert (learner.result().dequantize()[weight == 0] == 0).all()


@pytest.mark.parametrize("chunk", [64, 1 << 18])
def test_the_same_seed_gives_the_same_bits(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in pieces: groups do not know of each other."""
    first = learn(block_of("int3-g8-asym", torch.bfloat16), Options(iterations=25, batch=5)).weights
    monkeypatch.setattr(_learn, "CHUNK", chunk)
    again = learn(block_of("int3-g8-asym", torch.bfloat16), Options(iterations=25, batch=5)).weights
    other = learn(replace(block_of("int3-g8-asym", torch.bfloat16), seed=8), Options(iterations=25, batch=5)).weights
    for name, stored in first.items():
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(stored.parts(), again[name].parts(), strict=True))
    assert any(not torch.equal(stored.codes, other[name].codes) for name, stored in first.items())


def test_the_start_is_what_no_step_changed() -> None:
    """Whoever judges what was learned has it beside that."""
    block = block_of("int3-g16")
    found, none = learn(block, Options(iterations=30)), learn(block, Options(iterations=0))
    assert none.weights is none.start and none.stopped is None and found.stopped is None
    for name, stored in found.start.items():
        assert torch.equal(stored.dequantize(), none.start[name].dequantize())
        assert not torch.equal(stored.dequantize(), found.weights[name].dequantize())


@pytest.mark.parametrize("after", [0, 3])
def test_a_loss_of_nan_ends_the_steps_and_not_the_run(after: int) -> None:
    block, calls = block_of("int4-g8"), [0]

    def breaks(indices: Sequence[int], weights: Weights) -> Tensor:
        output = block.run(indices, weights)
        calls[0] += output.requires_grad
        return output * float("nan") if output.requires_grad and calls[0] > after else output

    learned = learn(replace(block, run=breaks), Options(iterations=50, signed=False))
    assert calls[0] == after + 1 and learned.stopped == f"the loss was not finite after {after} of 50 steps"
    assert all(stored.dequantize().isfinite().all() for stored in learned.weights.values())
    same = all(torch.equal(stored.codes, learned.start[name].codes) for name, stored in learned.weights.items())
    assert same == (after == 0)


def test_a_block_of_zeros_and_a_weight_without_use_are_no_trouble() -> None:
    weights = {**matrices(), "idle": torch.randn(4, 8)}
    weights["up"] = torch.zeros_like(weights["up"])
    learned = learn(block_of("int4-g8", weights=weights), Options(iterations=3))
    assert (learned.weights["up"].dequantize() == 0).all()
    assert torch.equal(learned.weights["idle"].codes, learned.start["idle"].codes)


def test_every_window_comes_once_before_any_comes_again() -> None:
    batches = _learn._batches(12, 4, torch.Generator().manual_seed(0))
    for _ in range(3):
        assert sorted(index for _ in range(3) for index in next(batches)) == list(range(12))
    few = _learn._batches(3, 8, torch.Generator().manual_seed(0))
    assert sorted(next(few)) == [0, 1, 2]


def test_presets() -> None:
    assert Options().total == 200
    assert Options().rates(4) == (2 / 200, 1 / 200) and Options().rates(3) == (3 / 200, 1 / 200)
    assert Options("light").total == 50 and Options("light").rates(2) == (0.005, 0.005)
    assert Options("best").rates(4) == (2 / 1000, 1 / 1000) and Options("best").rates(3) == (3 / 1000, 2 / 1000)
    assert Options("light", iterations=7).total == 7 and Options(lr=0.1, minmax_lr=0.2).rates(4) == (0.1, 0.2)
    for wrong in ({"iterations": -1}, {"batch": 0}, {"lr": -1.0}):
        with pytest.raises(ValueError, match="must be"):
            Options(**wrong)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_negative_scale_puts_the_largest_weight_at_the_end_of_the_grid(bits: int) -> None:
    weight = matrices()["up"]
    source = _learn.grouped(weight, parse(f"int{bits}-g8-f32"), signed=True)
    ones = torch.ones_like(source.low)
    stored = source.store(None, source.fit(ones, ones))
    groups, codes = weight.reshape(-1, 8), stored.codes.reshape(-1, 8)
    at = groups.abs().argmax(1, keepdim=True)
    assert (codes.gather(1, at) == 0).all() and (stored.scale_values() < 0).any() and (stored.scale_values() > 0).any()
    torch.testing.assert_close(stored.dequantize().reshape(-1, 8).gather(1, at), groups.gather(1, at))


def test_ranges_are_searched_where_that_helps() -> None:
    searched = {name: Options().searches(parse(name)) for name in ("int3-g8", "int4-g8", "int2-g8-asym", "nf4")}
    assert searched == {"int3-g8": True, "int4-g8": False, "int2-g8-asym": False, "nf4": True}
    assert Options(search=True).searches(parse("int4-g8")) and not Options(search=False).searches(parse("nf4"))
    weight = matrices()["up"] ** 3
    found = _learn.grouped(weight, parse("int3-row"))
    factors = found.search()
    whole, best = (found.decode(None, found.fit(f, f), torch.float32) for f in (torch.ones_like(factors), factors))
    assert ((best - weight).square().sum(1) <= (whole - weight).square().sum(1)).all() and (factors < 1).any()


def test_blocks_that_span_rows_are_refused() -> None:
    assert METHOD.supports is not None
    for scheme in ("int8-tensor", "nf4-flat64", "int4-4x24"):
        assert "row" in (METHOD.supports(parse(scheme)) or "")


@pytest.mark.parametrize(("dtype", "gap"), [(torch.bfloat16, 0.01), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("heads", "shared", "tokens"), [(4, 1, 300), (8, 4, 128), (2, 2, 7)])
def test_tiled_attention_is_attention(heads: int, shared: int, tokens: int, dtype: torch.dtype, gap: float) -> None:
    """Against float64 on the same numbers, forward and backward."""
    dice = torch.Generator().manual_seed(1)

    def numbers(count: int) -> Tensor:
        return torch.randn(2, tokens, count, 16, generator=dice).to(dtype).transpose(1, 2).requires_grad_()

    parts, grad = [numbers(heads), numbers(heads // shared), numbers(heads // shared)], numbers(heads).detach()
    attention: Any = scaled_dot_product_attention
    settings = {"is_causal": True, "enable_gqa": True, "scale": 0.3}
    with TiledAttention():
        found = attention(*parts, **settings)
    exact = [part.detach().double().requires_grad_() for part in parts]
    wanted = attention(*exact, **settings)
    assert "Attend" in str(found.grad_fn)
    pairs = zip(
        [found, *torch.autograd.grad(found, parts, grad)],
        [wanted, *torch.autograd.grad(wanted, exact, grad.double())],
        strict=True,
    )
    for ours, theirs in pairs:
        assert (ours.double() - theirs).norm() < gap * theirs.norm()


def test_other_attention_is_left_alone() -> None:
    parts = [torch.randn(1, 2, 5, 8).double().requires_grad_() for _ in range(3)]
    short = [part.detach().bfloat16().requires_grad_() for part in parts]
    mask, attention = torch.ones(5, 5, dtype=torch.bool), cast(Any, scaled_dot_product_attention)
    with TiledAttention():
        plain = attention(*parts, is_causal=True)
        masked = attention(*short, attn_mask=mask)
        open_ended = attention(*short)
    assert all("Attend" not in str(found.grad_fn) for found in (plain, masked, open_ended))
    assert torch.equal(plain, attention(*parts, is_causal=True))
