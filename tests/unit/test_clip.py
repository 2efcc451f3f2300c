"""Searched clipping against brute force over the inputs themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lowbit.errors import WeightError
from lowbit.methods import clip
from lowbit.methods.clip import METHOD, Options
from lowbit.methods.rtn import METHOD as RTN
from lowbit.schemes import parse
from tests.reference import clip as slow
from tests.reference import methods

FEW = Options(steps=20, max_shrink=0.5)
SCHEMES = ["int4-g16", "int3-g16-asym", "int2-g16-f32", "nf4-g16", "int4-4x16", "int3-row-f32"]
SCHEMES += ["fp4-g16", "mxfp4", "nvfp4"]


def inputs(cols: int, count: int = 64) -> Tensor:
    """Correlated rows, some channels much larger."""
    dice = torch.Generator().manual_seed(cols)
    mix = torch.randn((cols, cols), generator=dice) / cols**0.5
    sizes = torch.rand(cols, generator=dice) ** 4 * 10 + 0.1
    x: Tensor = torch.randn((count, cols), generator=dice) @ mix * sizes + 0.2
    return x


def weight_of(rows: int, cols: int) -> Tensor:
    dice = torch.Generator().manual_seed(rows)
    return torch.randn((rows, cols), generator=dice) * torch.randn((rows, cols), generator=dice)


def stats_of(x: Tensor) -> dict[str, Tensor]:
    return {"second_moment": (x.T.double() @ x.double() / len(x)).float()}


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme != "mxfp4"])
def test_each_block_has_the_least_error_of_all_ranges(scheme: str) -> None:
    kind, weight, x = parse(scheme), weight_of(8, 64), inputs(64)
    found = METHOD.quantize(weight, stats_of(x), kind, FEW).dequantize().numpy()
    divisor = methods.global_divisor(weight.numpy()) if kind.nested else 1.0
    better = 0
    for rows, cols in methods.cut((8, 64), kind):
        part, seen = weight.numpy()[rows, cols], x.double().numpy()[:, cols]
        least = slow.best_error(part, seen, kind, FEW.steps, FEW.max_shrink, divisor)
        assert slow.output_error(part, found[rows, cols], seen) == pytest.approx(least, rel=1e-3)
        plain = next(b for b in methods.rtn(weight.numpy(), kind) if (b.rows, b.cols) == (rows, cols))
        better += least < 0.99 * slow.output_error(part, plain.decoded, seen)
    assert better, "the data leave nothing to search"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("cols", [64, 96])
def test_never_worse_than_rtn(scheme: str, cols: int) -> None:
    kind, weight, x = parse(scheme), weight_of(9, cols), inputs(cols)
    results = [METHOD.quantize(weight, stats_of(x), kind, FEW), RTN.quantize(weight, {}, kind, RTN.options())]
    errors = [
        [
            slow.output_error(weight.numpy()[part], q.dequantize().numpy()[part], x.double().numpy()[:, part[1]])
            for part in methods.cut((9, cols), kind)
        ]
        for q in results
    ]
    assert all(own <= plain * (1 + 1e-4) for own, plain in zip(*errors, strict=True))
    assert sum(errors[0]) < sum(errors[1])


def test_shorter_last_blocks_are_judged_by_their_own_inputs() -> None:
    kind, weight, x = parse("int3-g24"), weight_of(6, 64), inputs(64)
    found = METHOD.quantize(weight, stats_of(x), kind, FEW).dequantize().numpy()
    for rows, cols in methods.cut((6, 64), kind):
        part, seen = weight.numpy()[rows, cols], x.double().numpy()[:, cols]
        least = slow.best_error(part, seen, kind, FEW.steps, FEW.max_shrink)
        assert slow.output_error(part, found[rows, cols], seen) == pytest.approx(least, rel=1e-3)


@pytest.mark.parametrize("wide", [256, 300, 515])
def test_wide_blocks_are_judged_in_tiles(wide: int) -> None:
    """The objective of a wide block is that of its tiles summed, each as the inputs say."""
    x, error = inputs(wide * 2, 40), weight_of(4, wide * 2)
    found = clip._output_error(error, clip._tiles(stats_of(x)["second_moment"], wide), (2, wide))
    size = -(-wide // -(-wide // 256))
    for row in range(2):
        for block in range(2):
            total = 0.0
            for start in range(block * wide, (block + 1) * wide, size):
                cols = slice(start, min(start + size, (block + 1) * wide))
                part = error[2 * row : 2 * row + 2, cols].numpy()
                total += slow.output_error(np.zeros_like(part), part, x[:, cols].double().numpy())
            assert found[row, block].item() == pytest.approx(total, rel=1e-4)


def test_columns_without_input_do_not_decide() -> None:
    """A huge weight on a channel that is never used is clipped, which one that is used keeps from happening."""
    weight, x = weight_of(4, 16), inputs(16)
    weight[:, 3], x[:, 3] = 9.0, 0.0
    unused = METHOD.quantize(weight, stats_of(x), parse("int4-g16"), FEW).scale_values()
    assert (unused.abs() < 0.8 * 9.0 / 7.5).all()
    x[:, 3] = 5.0
    used = METHOD.quantize(weight, stats_of(x), parse("int4-g16"), FEW).scale_values()
    assert (used.abs() > 0.9 * 9.0 / 8).all()


def test_zero_inputs_keep_round_to_nearest() -> None:
    weight, kind = weight_of(4, 32), parse("int4-g16")
    found = METHOD.quantize(weight, {"second_moment": torch.zeros(32, 32)}, kind, FEW)
    assert torch.equal(found.dequantize(), RTN.quantize(weight, {}, kind, RTN.options()).dequantize())


def test_runs_of_rows_give_the_whole() -> None:
    kind, weight, x = parse("int3-g16-asym"), weight_of(40, 64), inputs(64)
    whole = METHOD.quantize(weight, stats_of(x), kind, FEW).dequantize()
    runs = [weight[:7], weight[7:23], weight[23:]]
    parts = [METHOD.quantize(part, stats_of(x), kind, FEW).dequantize() for part in runs]
    assert torch.equal(torch.cat(parts), whole)


def test_what_no_grid_holds_is_refused() -> None:
    weight = weight_of(4, 16)
    weight[2, 5] = float("nan")
    with pytest.raises(WeightError, match="row 2, column 5"):
        METHOD.quantize(weight, stats_of(inputs(16)), parse("int4-g16"), FEW)


def test_what_it_cannot_do_is_a_reason() -> None:
    assert "all rows" in str(METHOD.supports(parse("int8-tensor")))
    assert "flat" in str(METHOD.supports(parse("nf4-flat64")))
    assert METHOD.supports(parse("int4-g128")) is None


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="max_shrink"):
        Options(max_shrink=1.0)
