"""`gptq`, `ldlq`, `gptaq` and the loop they share, against the definition by one inverse per column."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import inf, nan
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, unfold

from lowbit import native
from lowbit.methods import Stats, _elsewhere, gptaq, gptq, imatrix, imatrix_fit, ldlq, rtn
from lowbit.methods._scales import coder_of
from lowbit.schemes import Scheme, parse
from lowbit.tensors import QTensor, block_size
from tests.reference import gptq as oracle
from tests.reference.memory import peak_bytes

ORDERS = ("none", "static", "group", "aware")
BARE = gptq.Options(scales="range", fresh=False, passes=0, refit=False)
SCHEMES = [
    "int4-g8",
    "int3-g16-asym",
    "int4-g8-fzero",
    "int4-g8-min-bf16",
    "int2-row",
    "nf4",
    "fp4-row",
    "fp8-e4m3-row",
    "mxfp4",
    "nvfp4",
]
SCHEMES += ["levels[-1,0,0.4]-g16", "int4-4x24", "int4-tensor", "fp8-e5m2-g7"]
BLOCKS = ["q4_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs"]  # scales and minima are llama.cpp's


def inputs(rows: int, cols: int) -> Tensor:
    """Correlated, of unequal size."""
    dice = torch.Generator().manual_seed(cols)
    mixing = torch.randn(cols, cols, generator=dice) / max(cols, 1) ** 0.5 + torch.eye(cols)
    sizes = 0.2 + torch.rand(cols, generator=dice)
    mixed: Tensor = torch.randn(rows, cols, generator=dice) @ (mixing * sizes)
    return mixed


def moment_of(cols: int) -> Tensor:
    rows = inputs(4 * cols + 8, cols).double()
    return (rows.T @ rows / len(rows)).float()


def weight_of(rows: int, cols: int) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows)) * 0.1


def run(weight: Tensor, moment: Tensor, scheme: Scheme, options: gptq.Options) -> QTensor:
    return gptq.quantize(weight, gptq.prepare({"second_moment": moment}, scheme, options), scheme, options)


def loss(q: QTensor, weight: Tensor, moment: Tensor) -> float:
    return oracle.loss((q.dequantize() - weight).double().numpy(), moment.double().numpy())


def nearest(q: QTensor) -> oracle.Round:
    """To the nearest of all values that the codes of `q` can have there."""
    every = torch.stack([replace(q, codes=torch.full_like(q.codes, code)).dequantize() for code in legal(q)])
    table = every.double().numpy()

    def pick(k: int, work: oracle.Matrix) -> oracle.Matrix:
        best = np.abs(table[:, :, k] - work[:, k]).argmin(0)
        return np.asarray(table[best, np.arange(len(best)), k])

    return pick


def legal(q: QTensor) -> list[int]:
    return [code for code, level in enumerate(q.scheme.grid.levels) if abs(level) < inf]


def defined(q: QTensor, weight: Tensor, moment: Tensor, order: str) -> Tensor:
    """What the definition decodes to under the scales of `q`."""
    hessian = moment.double().numpy()
    wide = block_size(q.shape, q.scheme.block)[1]
    columns = oracle.order_of(np.diag(hessian).tolist(), order, wide)
    weights = weight.double().numpy()
    return torch.tensor(oracle.quantize(weights, oracle.damped(hessian, 0.01), columns, nearest(q))).float()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_are_those_of_the_definition(scheme: str, order: str) -> None:
    for rows, cols in [(5, 37), (8, 1), (3, 48)]:
        weight, moment, kind = weight_of(rows, cols), moment_of(cols), parse(scheme)
        for block in (7, 128):
            q = run(weight, moment, kind, replace(BARE, order=order, block=block))  # type: ignore[arg-type]
            assert torch.equal(q.dequantize(), defined(q, weight, moment, order))


@pytest.mark.parametrize("scheme", BLOCKS)
def test_codes_in_blocks_of_llama_cpp_are_those_of_the_definition(scheme: str) -> None:
    weight, moment, kind = weight_of(3, 48), moment_of(48), parse(scheme)
    q = run(weight, moment, kind, replace(BARE, order="static"))
    stats = {"mean_square": torch.tensor(oracle.damped(moment.double().numpy(), 0.01)).diagonal().float()}
    fitted = imatrix_fit.quantize(weight, stats, kind, imatrix_fit.METHOD.options())
    assert torch.equal(q.scale_values(), fitted.scale_values())
    assert torch.equal(q.dequantize(), defined(q, weight, moment, "static"))


@pytest.mark.parametrize("scheme", BLOCKS)
def test_in_blocks_of_llama_cpp_every_pass_lessens_the_error(scheme: str) -> None:
    """And the whole is far below what llama.cpp's encoder leaves, on rows that were not seen."""
    weight, kind = weight_of(16, 256), parse(scheme)
    seen, held = torch.split(inputs(3000, 256), [2000, 1000])
    moment = seen.T @ seen / 2000
    damped = torch.tensor(oracle.damped(moment.double().numpy(), 0.01))
    made = [run(weight, moment, kind, gptq.Options(passes=passes)) for passes in (0, 1, 3)]
    losses = [loss(q, weight, damped) for q in made]
    assert losses == sorted(losses, reverse=True) and losses[2] < 0.99 * losses[0]
    theirs = imatrix.quantize(weight, {"mean_square": moment.diagonal()}, kind, imatrix.METHOD.options())
    own, their = (((q.dequantize() - weight) @ held.T).square().sum() for q in (made[2], theirs))
    assert own < 0.7 * their
    moved = [not torch.equal(made[0].scale_values(), made[2].scale_values()), *shifted(made[0], made[2])]
    assert any(moved) or scheme in ("q5_k", "q6_k", "iq4_xs")  # where a step of a scale is small beside its error


def shifted(one: QTensor, other: QTensor) -> list[bool]:
    first, second = one.zero_values(), other.zero_values()
    return [] if first is None or second is None else [not torch.equal(first, second)]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_scales_of_the_range_are_round_to_nearests(scheme: str) -> None:
    weight, moment, kind = weight_of(5, 37), moment_of(37), parse(scheme)
    columns = moment.diagonal().argsort(descending=True)
    for order, view in [("none", weight), ("static", weight), ("aware", weight), ("group", weight[:, columns])]:
        q = run(weight, moment, kind, replace(BARE, order=order))  # type: ignore[arg-type]
        plain = rtn.METHOD.quantize(view.contiguous(), {}, kind, rtn.METHOD.options())
        assert torch.equal(q.scale_values(), plain.scale_values())
        assert (q.zeros is None and plain.zeros is None) or torch.equal(q.zeros, plain.zeros)  # type: ignore[arg-type]


def test_act_order_says_which_block_each_column_is_in() -> None:
    weight, moment = weight_of(4, 37), moment_of(37)
    q = run(weight, moment, parse("int4-g8"), replace(BARE, order="group"))
    ranks = sorted(range(37), key=lambda k: -float(moment[k, k]))
    assert q.group_index is not None and q.group_index.tolist() == [ranks.index(k) // 8 for k in range(37)]
    for scheme, order in [("int4-row", "group"), ("int4-g8", "static"), ("int4-g8", "aware")]:
        assert run(weight, moment, parse(scheme), replace(BARE, order=order)).group_index is None  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", ["int4-g8", "int3-g16-asym", "int2-g16-fzero", "int3-g16-min-bf16", "nf4", "mxfp4"])
def test_a_fresh_scale_covers_the_compensated_weight(scheme: str) -> None:
    """Follow the definition with the codes that were chosen: scales fit what a block was when it was reached."""
    kind = parse(scheme)
    weight, moment, wide = weight_of(5, 70), moment_of(70), kind.block.cols
    q = run(weight, moment, kind, replace(BARE, order="none", fresh=True))
    best, decoded = nearest(q), q.dequantize().double().numpy()

    def follow(k: int, work: oracle.Matrix) -> oracle.Matrix:
        if k % wide == 0:
            part = torch.tensor(work[:, k : k + wide]).float().contiguous()
            fitted = rtn.METHOD.quantize(part, {}, kind, rtn.METHOD.options())
            torch.testing.assert_close(q.scale_values()[:, k // wide, None], fitted.scale_values(), rtol=2e-3, atol=0)
        least = np.abs(best(k, work) - work[:, k])
        assert (np.abs(decoded[:, k] - work[:, k]) <= least + 1e-5).all()
        return np.asarray(decoded[:, k])

    hessian = oracle.damped(moment.double().numpy(), 0.01)
    oracle.quantize(weight.double().numpy(), hessian, list(range(70)), follow)


def test_ldlq_is_the_definition_from_left_to_right() -> None:
    weight, moment, kind = weight_of(5, 37), moment_of(37), parse("int3-g8")
    stats = ldlq.prepare({"second_moment": moment}, kind, ldlq.Options())
    q = ldlq.quantize(weight, stats, kind, ldlq.Options())
    assert torch.equal(q.dequantize(), defined(q, weight, moment, "none"))


@pytest.mark.parametrize("order", ORDERS)
def test_columns_that_are_always_zero_are_rounded_to_nearest(order: str) -> None:
    weight, moment, dead = weight_of(5, 37), moment_of(37), [0, 8, 20, 36]
    moment[dead], moment[:, dead] = 0, 0
    q = run(weight, moment, parse("int4-row"), replace(BARE, order=order))  # type: ignore[arg-type]
    assert torch.equal(q.dequantize(), defined(q, weight, moment, order))
    plain = rtn.METHOD.quantize(weight, {}, parse("int4-row"), rtn.METHOD.options())
    assert torch.equal(q.codes[:, dead], plain.codes[:, dead])


def test_damping_grows_until_the_matrix_factors() -> None:
    weight, kind = weight_of(5, 24), parse("int4-g8")
    moment = moment_of(24)
    moment -= 2 * torch.linalg.eigvalsh(moment)[2] * torch.eye(24)  # three negative eigenvalues
    stats = gptq.prepare({"second_moment": moment}, kind, replace(BARE, damp=1e-6))
    share = stats["damp"].item()
    assert share in [pytest.approx(10.0**-k) for k in range(-1, 6)]
    hessian = moment.double().numpy()
    mean = np.mean(np.diag(hessian))
    assert np.linalg.eigvalsh(hessian + share * mean * np.eye(24))[0] > 0
    assert np.linalg.eigvalsh(hessian + share / 10 * mean * np.eye(24))[0] < 0
    assert gptq.prepare({"second_moment": moment_of(24)}, kind, BARE)["damp"].item() == pytest.approx(0.01)
    assert gptq.quantize(weight, stats, kind, BARE).dequantize().isfinite().all()


@pytest.mark.parametrize("value", [nan, inf, 0.0])
def test_moments_that_say_nothing_leave_round_to_nearest(value: float) -> None:
    weight, kind = weight_of(5, 24), parse("int4-g8")
    for options in (BARE, replace(BARE, passes=2)):
        stats = gptq.prepare({"second_moment": torch.full((24, 24), value)}, kind, options)
        assert (stats["damp"].item() == inf) == (value != 0)
        plain = rtn.METHOD.quantize(weight, {}, kind, rtn.METHOD.options())
        assert torch.equal(gptq.quantize(weight, stats, kind, options).codes, plain.codes)


@pytest.mark.parametrize("order", ORDERS)
def test_scales_of_either_sign_put_the_furthest_weight_at_the_end_of_the_grid(order: str) -> None:
    """One search among ranges as they are: where a sign wins, a scale is a stored fraction of the furthest weight."""
    weight, moment, kind = weight_of(40, 64), moment_of(64), parse("int3-g16-f32")
    options = gptq.Options(order=order, passes=0, fresh=False)  # type: ignore[arg-type]
    for signed in (True, False):
        q = run(weight, moment, kind, replace(options, signed=signed))
        columns = moment.diagonal().argsort(descending=True) if order == "group" else torch.arange(64)
        parts = weight[:, columns].view(40, 4, 16)
        furthest = parts.gather(2, parts.abs().argmax(2, keepdim=True))[..., 0]
        ratios = torch.tensor([1 - i / 20 for i in range(11)])
        ends = -furthest[..., None] * ratios / 4 if signed else furthest.abs()[..., None] * ratios / 3.5
        near = ((q.scale_values()[..., None] - ends).abs() < 1e-6).any(2)
        covering = (q.scale_values() - furthest.abs() / 3.5).abs() < 1e-6
        assert (near | covering).all() and (q.scale_values() < 0).any() == signed
        assert torch.equal(q.dequantize(), defined(q, weight, moment, order))


@pytest.mark.parametrize(
    "scheme", ["int4-g32", "int2-g32-asym", "int3-g32-fzero", "int3-g32-min-bf16", "nf4-row", "int4-4x24"]
)
def test_every_pass_lessens_the_error(scheme: str) -> None:
    weight, moment, kind = weight_of(20, 64), moment_of(64), parse(scheme)
    damped = torch.tensor(oracle.damped(moment.double().numpy(), 0.01))
    for order, refit in [("static", False), ("static", True), ("group", True)]:
        options = [gptq.Options(order=order, passes=n, refit=refit) for n in range(3)]  # type: ignore[arg-type]
        losses = [loss(run(weight, moment, kind, each), weight, damped) for each in options]
        assert losses == sorted(losses, reverse=True) and losses[2] < losses[0]


@pytest.mark.parametrize("scheme", ["int3-g32", "int2-g32-asym", "nf4-row", "mxfp4"])
def test_after_many_passes_no_code_alone_can_be_better(scheme: str) -> None:
    weight, moment, kind = weight_of(6, 64), moment_of(64), parse(scheme)
    q = run(weight, moment, kind, gptq.Options(passes=60, refit=False))
    hessian = oracle.damped(moment.double().numpy(), 0.01)
    error = (q.dequantize() - weight).double().numpy()
    every = [replace(q, codes=torch.full_like(q.codes, code)).dequantize().double().numpy() for code in legal(q)]
    slope = error @ hessian
    for table in every:
        step = table - q.dequantize().double().numpy()  # of one code at a time: its own change of the loss
        change = 2 * step * slope + step**2 * np.diag(hessian)
        assert change.min() > -1e-7


@pytest.mark.parametrize("scheme", ["int4-row-f32", "int3-row-fzero-f32", "nf4-row"])
def test_refit_ends_where_the_scale_solves_least_squares(scheme: str) -> None:
    """When codes have come to rest, neither the scale nor the zero point of a row can be better for them."""
    weight, moment, kind = weight_of(12, 64), moment_of(64), parse(scheme)
    q = run(weight, moment, kind, gptq.Options(passes=80))
    hessian = torch.tensor(oracle.damped(moment.double().numpy(), 0.01))
    scale = q.scale_values().double()
    error = (weight - q.dequantize()).double()
    for direction in [q.dequantize().double() / scale, *([] if q.zeros is None else [-scale.expand_as(weight)])]:
        slope = ((direction @ hessian) * error).sum(1)
        curve = ((direction @ hessian) * direction).sum(1)
        unit = scale[:, 0] if direction[0, 0] != -scale[0, 0] else torch.ones(12)
        assert (slope / curve / unit).abs().max() < 2e-4


@pytest.mark.parametrize(
    "scheme", ["int4-g32", "int3-g32-asym", "int2-g32-fzero", "int2-g32-min-bf16", "nf4", "fp8-e4m3-row", "nvfp4"]
)
def test_less_error_than_round_to_nearest(scheme: str) -> None:
    """On rows that were not seen."""
    weight, kind = weight_of(64, 128), parse(scheme)
    seen, held = torch.split(inputs(3000, 128), [2000, 1000])
    moment = seen.T @ seen / 2000
    plain = rtn.METHOD.quantize(weight, {}, kind, rtn.METHOD.options())
    for options in [BARE, *(gptq.Options(order=order) for order in ORDERS)]:  # type: ignore[arg-type]
        q = run(weight, moment, kind, options)
        ours, theirs = (((x.dequantize() - weight) @ held.T).square().sum() for x in (q, plain))
        assert ours < (0.75 if options == BARE else 0.7) * theirs


@pytest.mark.parametrize("scheme", ["int4-g24", "int3-row-asym", "nf4-g36"])
def test_a_kernel_of_a_convolution_is_the_matrix_that_its_patches_are_multiplied_by(scheme: str) -> None:
    kernel, kind = weight_of(16, 8 * 9).view(16, 8, 3, 3), parse(scheme)
    smooth = avg_pool2d(torch.randn(40, 8, 14, 14, generator=torch.Generator().manual_seed(1)), 3, 1)
    seen, held = smooth[:30], smooth[30:]
    patches = unfold(seen, 3, padding=1, stride=2).mT.reshape(-1, 8 * 9)
    moment = patches.T @ patches / len(patches)
    plain = rtn.METHOD.quantize(kernel.flatten(1), {}, kind, rtn.METHOD.options())
    made = run(kernel.flatten(1), moment, kind, gptq.Options())

    def error(q: QTensor) -> float:
        left = q.dequantize().view_as(kernel) - kernel
        return float(conv2d(held, left, stride=2, padding=1).square().sum())

    assert error(made) < 0.5 * error(plain)


@pytest.mark.parametrize("cols", [600, 2112, 4160])
@pytest.mark.parametrize("method", [gptq, gptaq, ldlq])
def test_memory_to_prepare_is_what_it_says(method: ModuleType, cols: int) -> None:
    """In float64 and in float32, and with results in float32 and in bfloat16 where the processor has it."""
    stats = {name: torch.eye(cols) for name in method.METHOD.needs}
    made: list[Stats] = []
    peak = peak_bytes(lambda: made.append(method.METHOD.prepare(stats, parse("int4-g128"), method.METHOD.options())))
    given, said = 4 * len(stats) * cols**2, method.METHOD.prepared(cols)
    assert "feedback" in made[0] and 0.75 * said < given + peak <= said + 2**20


@pytest.mark.parametrize("fast", [True, False])
def test_wide_weights_go_through_products_that_the_processor_is_fast_at(
    fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above 2048 columns: nearly the error of the same weight in float32, by the definition of the error."""
    monkeypatch.setattr(native, "computes_bfloat16", lambda: fast)
    found = gptq.prepare({"second_moment": torch.eye(2080)}, parse("int4-row"), gptq.Options())
    assert {found[name].dtype for name in ("feedback", "pull")} == {torch.bfloat16 if fast else torch.float32}
    weight, kind = weight_of(3, 2080), parse("int4-row")
    seen = inputs(500, 2080)
    moment = seen.T @ seen / 500
    plain = loss(rtn.METHOD.quantize(weight, {}, kind, rtn.METHOD.options()), weight, moment)
    first, last = (loss(run(weight, moment, kind, replace(BARE, passes=n)), weight, moment) for n in (0, 2))
    assert last < first < 0.3 * plain


@pytest.mark.parametrize("scheme", [*SCHEMES[:8], "q4_k"])
def test_the_loop_of_another_device_does_what_the_kernel_does(scheme: str) -> None:
    """Multiples of 1/8 between halves make ties; sums of small ones are exact, so that order does not count."""
    kind, dice = parse(scheme), torch.Generator().manual_seed(5)
    cols, lanes = 24, 32
    coder, zero = (
        coder_of(kind),
        torch.randint(0, 4, (cols, lanes), generator=dice).float() if "asym" in scheme else None,
    )
    target, weight, error = (torch.randint(-40, 40, (cols, lanes), generator=dice) / 8 for _ in range(3))
    weight[::5, ::3] = 0
    coupling = torch.randint(-2, 3, (cols, cols), generator=dice).float()
    scale = 2.0 ** torch.randint(-1, 2, (cols, lanes), generator=dice)
    found = []
    for sweep in (partial(native.sweep, coder=coder), _elsewhere.Sweep(_elsewhere.Rounder.of(coder, target.device))):
        given, gaps, out = target.clone(), error.clone(), torch.empty(cols, lanes, dtype=torch.uint8)
        sweep(given, weight, gaps, coupling, scale, zero, out=out)
        found.append((out, gaps))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_weights_that_are_zero_stay_zero() -> None:
    weight = weight_of(20, 64)
    weight[:, ::3] = 0
    for scheme in ["int4-g32", "int3-g32-asym", "nf4", "fp8-e4m3-row"]:
        q = run(weight, moment_of(64), parse(scheme), gptq.Options())
        assert (q.dequantize()[:, ::3] == 0).all()


def paired(cols: int) -> tuple[Tensor, Tensor, Stats]:
    """Rows of the float model, present rows, and their statistics."""
    present = inputs(2000, cols)
    wanted = present + 0.3 * present.roll(1, 1) + 0.1 * inputs(2000, cols + 1)[:, 1:]
    cross = (wanted - present).T @ present / 2000
    return wanted, present, {"second_moment": present.T @ present / 2000, "cross_moment": cross}


def test_gptaq_rounds_the_weight_that_serves_the_present_inputs_best() -> None:
    weight, kind = weight_of(20, 48), parse("int8-row-f32")
    wanted, present, stats = paired(48)
    options = gptaq.Options(damp=1e-6, scales="range", passes=0)
    q = gptaq.quantize(weight, gptaq.prepare(stats, kind, options), kind, options)
    outputs = (wanted @ weight.T).double()
    best = torch.linalg.lstsq(present.double(), outputs).solution
    least = (present @ best.float() - outputs).square().sum()
    assert (present @ q.dequantize().T - outputs).square().sum() < 1.02 * least
    assert (present @ weight.T - outputs).square().sum() > 2 * least


def test_gptaq_lessens_the_error_to_the_float_models_output() -> None:
    weight, kind = weight_of(40, 64), parse("int4-g32")
    wanted, present, stats = paired(64)
    errors = []
    for alpha in (0.0, 0.5, 1.0):
        options = gptaq.Options(alpha=alpha)
        q = gptaq.quantize(weight, gptaq.prepare(stats, kind, options), kind, options)
        errors.append((present @ q.dequantize().T - wanted @ weight.T).square().sum().item())
    plain = run(weight, stats["second_moment"], kind, gptq.Options())
    assert errors[2] < errors[1] < errors[0]
    assert errors[0] == pytest.approx((present @ plain.dequantize().T - wanted @ weight.T).square().sum().item())


def test_sweep_refuses_what_does_not_fit() -> None:
    block, square = torch.zeros(3, 16), torch.zeros(3, 3)
    codes = torch.zeros(3, 16, dtype=torch.uint8)
    wide, coder = torch.zeros(3, 20), native.Coder(levels=torch.zeros(2))
    with pytest.raises(ValueError, match="20 lanes"):
        native.sweep(wide, wide, wide, square, wide, None, native.Coder(), out=wide.to(torch.uint8))
    with pytest.raises(ValueError, match="coupling must be contiguous"):
        native.sweep(block, block, block, torch.zeros(3, 6)[:, ::2], block, None, native.Coder(), out=codes)
    with pytest.raises(ValueError, match="together"):
        native.sweep(block, block, block, square, block, None, coder, out=codes)


@pytest.mark.parametrize("options", [{"damp": 0.0}, {"block": 0}, {"passes": -1}])
def test_options_that_mean_nothing_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="damp must be above 0"):
        gptq.Options(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="alpha must be"):
        gptaq.Options(alpha=1.5)
    with pytest.raises(ValueError, match="damp must be"):
        ldlq.Options(damp=0.0)
