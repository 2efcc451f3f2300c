"""`gptq` and its relatives in llama.cpp's types with tables of runs of codes, against every legal run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from lowbit import native
from lowbit.methods import _runs, gptaq, gptq, imatrix, imatrix_fit, ldlq
from lowbit.schemes import GGML_TYPES, Scheme, parse
from lowbit.tensors import QTensor, level_table
from tests.reference import gptq as oracle
from tests.reference import runs as every
from tests.unit.test_gptq_method import inputs, loss, moment_of, run, weight_of

BARE = gptq.Options(passes=0, refit=False)
# All pairs of entries, of IQ3, are too many for the definition: halves of a run are looked through apart.
SEARCHED = [(name, kind) for name in every.TABLES for kind in ("apart", "halves", "all")[: 3 - ("iq3" in name)]]
CPU, LANES = torch.device("cpu"), 16


def form(dice: torch.Generator, kind: str) -> Tensor:
    """By how much errors of eight columns count together: each for itself, in halves, or all."""
    mixing = torch.randn(40, 8, generator=dice, dtype=torch.float64) + 0.5 * torch.randn(40, 1, generator=dice)
    whole = mixing.T @ mixing / 40
    if kind == "apart":
        return whole.diagonal().diag()
    if kind == "halves":
        whole[:4, 4:] = whole[4:, :4] = 0
    return whole


def search(name: str, aims: Tensor, metric: Tensor, codes: Tensor, first: bool) -> Tensor:
    """What the kernel takes for eight columns of 16 rows; weights are the aims, and scales 1."""
    out, level = codes.clone(), level_table(parse(name).grid)
    given = aims.T.contiguous().float()
    error, square = torch.zeros_like(given), torch.zeros(8, 8)
    forms = (torch.eye(8)[None], metric[None].float())
    native.sweep_runs(
        GGML_TYPES[name],
        *(given.clone(), given, error, square, torch.ones_like(given), *forms),
        level=level,
        first=first,
        out=out,
    )
    assert torch.equal(error, given - level[out.long()])
    return out


def errors(name: str, codes: Tensor, aims: Tensor, metric: Tensor) -> Tensor:
    away = level_table(parse(name).grid)[codes.long()].T.double() - aims
    return ((away @ metric) * away).sum(1)


def aims_of(name: str, dice: torch.Generator) -> Tensor:
    """Spread as the type's values are."""
    return torch.randn(LANES, 8, generator=dice, dtype=torch.float64) * float(every.entries(name).std() * 1.3)


def encoded(weight: Tensor, moment: Tensor, scheme: Scheme) -> QTensor:
    """By llama.cpp's encoder."""
    return imatrix.quantize(weight, {"mean_square": moment.diagonal()}, scheme, imatrix.METHOD.options())


@pytest.mark.parametrize(("name", "kind"), SEARCHED)
def test_the_search_finds_the_best_of_all_runs_or_one_that_is_little_worse(name: str, kind: str) -> None:
    """Exactly where columns count apart."""
    dice, found, least = torch.Generator().manual_seed(3), [], []
    for _ in range(4):
        aims, metric = aims_of(name, dice), form(dice, kind)
        start = torch.full((8, LANES), 1, dtype=torch.uint8)  # of IQ1_S the shift is down
        codes = search(name, aims, metric, start, first=True)
        found += errors(name, codes, aims, metric).tolist()
        shift = -0.125 if name == "iq1_s" else None
        least += [every.best(name, aim, metric.numpy(), shift)[0] for aim in aims.numpy()]
    ratio = np.array(found) / np.array(least)
    assert ratio.min() > 1 - 1e-5  # no run that the type has not
    assert ratio.max() < 1 + 1e-4 if kind == "apart" else ratio.mean() < 1.1


@pytest.mark.parametrize("name", every.TABLES)
def test_runs_that_are_there_stay_but_for_better_ones(name: str) -> None:
    """The best of all runs stay, also where the search would find others; random ones do not."""
    dice, level, changed = torch.Generator().manual_seed(4), level_table(parse(name).grid), 0
    shift = 0.125 if name == "iq1_s" else None
    for _ in range(6):
        aims, metric = aims_of(name, dice), form(dice, "halves" if name.startswith("iq3") else "all")
        best = np.stack([every.best(name, aim, metric.numpy(), shift)[1] for aim in aims.numpy()])
        codes = (torch.from_numpy(best).T[..., None] == level).to(torch.uint8).argmax(2).to(torch.uint8)
        assert torch.equal(search(name, aims, metric, codes, first=False), codes)
        changed += int((search(name, aims, metric, codes, first=True) != codes).any(0).sum())
        worse = search(name, aims_of(name, dice), metric, codes, first=False)
        better = search(name, aims, metric, worse, first=False)
        assert (errors(name, better, aims, metric) <= errors(name, worse, aims, metric)).all()
        assert not torch.equal(better, worse) and (name != "iq1_s" or torch.equal(better % 2, codes % 2))
    assert changed


def test_columns_that_are_not_there_count_nothing() -> None:
    """The last run of twelve columns, and what its errors add to targets."""
    dice = torch.Generator().manual_seed(5)
    cols, name = 12, "iq2_s"
    scheme, target = parse(name), torch.randn(cols, LANES, generator=dice) * 20
    coupling, level = torch.zeros(cols, cols), level_table(scheme.grid)
    solve, metric = _runs.forms(coupling, torch.ones(cols), first=True)
    codes = torch.zeros(cols, LANES, dtype=torch.uint8)
    ones = torch.ones_like(target)
    given = (target.clone(), target, torch.zeros_like(target), coupling, ones, solve, metric)
    native.sweep_runs(GGML_TYPES[name], *given, level=level, first=True, out=codes)
    legal = np.unique(every.entries(name)[:, :4], axis=0)  # whatever follows
    values = level[codes[8:].long()].T.double().numpy()
    for value, aim in zip(values, target[8:].T.double().numpy(), strict=True):
        wanted = every.nearest(np.abs(aim), np.eye(4), legal)[1] * np.where(aim < 0, -1, 1)
        assert np.array_equal(value, wanted)


@pytest.mark.parametrize("name", ["iq1_m", "iq2_xxs", "iq2_xs", "iq2_s"])
def test_the_first_pass_is_the_definitions(name: str) -> None:
    """By one inverse for each run; where a search of all runs finds a better one, the whole is little better."""
    rows, cols, kind = 2, 256, parse(name)
    weight, moment = weight_of(rows, cols), moment_of(cols)
    q = run(weight, moment, kind, BARE)
    hessian = oracle.damped(moment.double().numpy(), 0.01)
    start = encoded(weight, torch.tensor(hessian).float(), kind)
    assert torch.equal(q.scale_values(), start.scale_values())
    scales = q.scale_values().repeat_interleave(kind.block.cols, 1).double().numpy()
    parts = np.diag(moment.numpy()).reshape(-1, 8).sum(1)
    order = [8 * part + k for part in np.argsort(-parts, kind="stable").tolist() for k in range(8)]
    wanted = every.quantize(name, weight.double().numpy(), scales, hessian, order)
    least = oracle.loss(wanted - weight.double().numpy(), hessian)
    assert 0.93 < loss(q, weight, torch.tensor(hessian)) / least < 1.07


@pytest.mark.parametrize("name", every.TABLES)
@pytest.mark.parametrize("method", ["gptq", "gptaq", "ldlq"])
def test_far_less_error_than_llama_cpps_encoder_leaves(name: str, method: str) -> None:
    weight, kind = weight_of(16, 256), parse(name)
    seen, held = torch.split(inputs(3000, 256), [2000, 1000])
    moment = seen.T @ seen / 2000
    theirs = encoded(weight, moment, kind)
    module = {"gptq": gptq, "gptaq": gptaq, "ldlq": ldlq}[method]
    stats = {"second_moment": moment, "cross_moment": torch.zeros_like(moment)}
    options = module.METHOD.options()
    mine = module.quantize(weight, module.prepare(stats, kind, options), kind, options)
    own, their = (((q.dequantize() - weight) @ held.T).square().sum() for q in (mine, theirs))
    assert own < (0.85 if method == "ldlq" else 0.7) * their


@pytest.mark.parametrize("name", every.TABLES)
def test_fitted_scales_leave_less_error_of_the_output(name: str) -> None:
    """Under the runs of llama.cpp's encoder, with data that say no more than it is told."""
    weight, seen, kind = weight_of(64, 256), inputs(3000, 256), parse(name)
    moment = seen.T @ seen / 3000
    fitted = imatrix_fit.quantize(weight, {"mean_square": moment.diagonal()}, kind, imatrix_fit.METHOD.options())
    theirs = encoded(weight, moment, kind)
    assert torch.equal(fitted.codes, theirs.codes)
    assert loss(fitted, weight, moment) < 0.98 * loss(theirs, weight, moment)


@pytest.mark.parametrize("name", every.TABLES)
def test_every_pass_lessens_the_error_and_all_runs_are_in_the_table(name: str) -> None:
    """Codes and scales that move; a run in another order of columns would not be packed."""
    weight, moment, kind = weight_of(16, 512), moment_of(512), parse(name)
    damped = torch.tensor(oracle.damped(moment.double().numpy(), 0.01))
    made = [run(weight, moment, kind, gptq.Options(passes=passes)) for passes in (0, 1, 3)]
    losses = [loss(q, weight, damped) for q in made]
    assert losses == sorted(losses, reverse=True) and losses[2] < 0.97 * losses[0]
    assert not torch.equal(made[0].scale_values(), made[2].scale_values())
    for q in made:
        assert legal(name, q)
        if name == "iq1_s":  # the encoder's, which are up in some blocks and down in others
            shifts = encoded(weight, damped.float(), kind).codes % 2
            assert torch.equal(q.codes % 2, shifts) and 0 < shifts.float().mean() < 1


def legal(name: str, q: QTensor) -> bool:
    """Whether every run of eight (or half of one) is one of all."""
    values = level_table(q.scheme.grid)[q.codes.long()].double().numpy()
    runs = every.runs(name)
    width = runs[False].shape[1]
    known = {tuple(each) for half in runs.values() for each in half}
    signs = (values < 0).reshape(-1, 8).sum(1) % 2
    even = name not in every.EVEN or not signs.any()
    return even and all(tuple(each) in known for each in values.reshape(-1, width))


@pytest.mark.parametrize("order", ["none", "static", "aware"])
def test_runs_are_never_cut(order: str) -> None:
    """Nor by an odd number of columns between two products."""
    weight, moment, kind = weight_of(3, 256), moment_of(256), parse("iq2_xs")
    for block in (20, 128):
        q = run(weight, moment, kind, replace(BARE, order=order, block=block))  # type: ignore[arg-type]
        assert legal("iq2_xs", q)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", every.TABLES)
def test_the_loop_of_another_device_does_what_the_kernel_does(name: str, first: bool) -> None:
    """Its search looks at other entries: where both find the same, all is the same, and none is far better."""
    dice = torch.Generator().manual_seed(6)
    cols, lanes = 20, 64
    scheme = parse(name)
    codes = encoded(torch.randn(lanes, 256, generator=dice), torch.eye(256), scheme).codes[:, :cols].T.contiguous()
    scale = torch.full((cols, lanes), 0.1)
    weight = torch.randn(cols, lanes, generator=dice) * 0.13 * float(every.entries(name).std())
    error = weight - level_table(scheme.grid)[codes.long()] * scale if not first else torch.zeros_like(weight)
    coupling = torch.randn(cols, cols, generator=dice) * 0.02
    coupling, curve = (coupling + coupling.T) / 2, torch.rand(cols, generator=dice) + 0.5
    solve, metric = _runs.forms(coupling, curve, first)
    kernel = partial(native.sweep_runs, GGML_TYPES[name], level=level_table(scheme.grid))
    sweeps: list[Callable[..., None]] = [kernel, _runs.Sweep(scheme, CPU)]
    found = []
    for sweep in sweeps:
        left, out = error.clone(), codes.clone()
        sweep(weight.clone(), weight, left, coupling, scale, solve, metric, first=first, out=out)
        found.append((out, left))
    (codes, left), (theirs, other_left) = found
    same = (codes[:8] == theirs[:8]).all(0)
    assert same.float().mean() > 0.5
    assert torch.allclose(left[:8, same], other_left[:8, same], atol=1e-6)
    assert 0.9 < left.square().sum() / other_left.square().sum() < 1.1


def test_what_is_no_table_is_refused() -> None:
    block, square = torch.zeros(8, 16), torch.zeros(8, 8)
    given = (block, block, block, square, block, square[None], square[None])
    rest = {"level": torch.zeros(256), "first": True}
    codes = torch.zeros(8, 16, dtype=torch.uint8)
    with pytest.raises(ValueError, match="type 12 of ggml has no table of runs"):
        native.sweep_runs(12, *given, **rest, out=codes)  # type: ignore[arg-type]
    two = torch.zeros(2, 8, 8)
    with pytest.raises(ValueError, match="solve"):
        native.sweep_runs(17, *given[:5], two, two, **rest, out=codes)  # type: ignore[arg-type]
    wide, narrow = torch.zeros(8, 9), codes[:, :9].contiguous()
    with pytest.raises(ValueError, match="9 lanes"):
        native.sweep_runs(17, wide, wide, wide, square, wide, *given[5:], **rest, out=narrow)  # type: ignore[arg-type]
