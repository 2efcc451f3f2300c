"""Measures: kinds of sensitivity, each one function from a run to the loss of every weight in each of its schemes.

Only losses of one kind are added up and compared; what is in nats per token is a divergence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lowbit.errors import UnsupportedError
from lowbit.stages._jobs import Job
from lowbit.stages._observe import Seen
from lowbit.stages.budgets.allocate import NATS
from lowbit.stages.budgets.check import divergences
from lowbit.stages.budgets.sensitivity import (
    Judge,
    Losses,
    Measured,
    Run,
    ends_of,
    judged,
    live_block,
    made_by,
    made_outside,
    outside,
    pieces_of,
    sites_of,
    with_kept,
)
from lowbit.stages.budgets.sensitivity import (
    measure as fisher,
)
from lowbit.stages.plan import Entry

_PROBES = 4  # of each window that judges
_TOGETHER = 64  # variants of the model that run side by side


@final
@dataclass(frozen=True)
class Measure:
    """A kind of sensitivity.

    Attributes:
        unit: of a loss, and of a sum of losses.
        losses: of all that is on offer in a run.
        whole: the model is held in memory as a whole.
    """

    unit: str
    losses: Callable[[Run], Measured]
    whole: bool = False


def output_errors(run: Run) -> Measured:
    """Square error of what a weight makes of rows that judge, over the square of what it makes: |E x|^2 / |W x|^2.

    Of an embedding that of the rows looked up, of a head that of the logits; of one that is both, their sum.
    """

    def judge(job: Job, seen: Seen) -> float:
        rows = seen.held
        if not len(rows):  # an expert that no token got to
            return 0.0
        return _share(_square(rows @ (made_by(job) - job.whole).T), _square(rows @ job.whole.T))

    return _by_blocks(run, judge, lambda entry: _output_outside(run, entry))


@torch.no_grad()
def _output_outside(run: Run, entry: Entry) -> float:
    found, moved, made = ends_of(run, entry), 0.0, 0.0
    for place in pieces_of(run, found.ids):
        before, after = (way.logits(found.ids[place][None], found.last[place][None]) for way in found.ways)
        moved, made = moved + _square(after - before), made + _square(before)
    return _share(_square(found.moved), _square(found.first)) + _share(moved, made)


def _square(values: Tensor) -> float:
    return float(values.double().square().sum())


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def hessian_errors(run: Run) -> Measured:
    """Mean trace of the Hessian times the square error of the weight (HAWQ-V2, arXiv 1911.03852, eq. 4).

    Of the trace the magnitude: where the text is not what the model was trained on it may be negative.

    Raises:
        UnsupportedError: weights that the model holds as parts of one.
    """
    traces = mean_traces(run)

    def judge(job: Job, seen: Seen) -> float:
        error = made_by(job) - job.whole
        return abs(traces[job.entry.weight.name]) * _square(error)

    def whole(entry: Entry) -> float:
        weight = run.source.dequantized(entry.weight.name, torch.float32)
        error = made_outside(run, entry).view_as(weight) - weight
        return abs(traces[entry.weight.name]) * _square(error)

    return _by_blocks(run, judge, whole)


def mean_traces(run: Run) -> dict[str, float]:
    """For each weight on offer the trace of the Hessian over its size, by Hutchinson's estimator.

    Of the mean loss of the next token in the windows that judge. The mean of `v^T H v` over random signs `v` is the
    trace; signs of several weights are independent, so that one product serves them all.
    """
    model, ids = run.blueprint.resident().requires_grad_(False), run.windows.ids[run.held]
    places = _parameters(run, model)
    for parameter in places.values():
        parameter.requires_grad_()
    dice, sums = torch.Generator().manual_seed(0), dict.fromkeys(places, 0.0)
    for at, window in enumerate(ids):
        run.progress("hessian", at, len(ids))
        run.watch.check()
        for name, found in _quadratics(model, window[None], places, dice):
            sums[name] += found / (places[name].numel() * _PROBES * len(ids))
    run.progress("hessian", len(ids), len(ids))
    return sums


def _quadratics(
    model: nn.Module, ids: Int64[Tensor, "1 tokens"], places: Mapping[str, nn.Parameter], dice: torch.Generator
) -> list[tuple[str, float]]:
    """`v^T H v` of each parameter for each probe, of the loss of one window."""
    parameters, found = list(places.values()), list[tuple[str, float]]()
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        loss = nn.functional.cross_entropy(logits.float(), ids[0, 1:])
        gradients = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
        for _ in range(_PROBES):
            signs = [torch.randint(0, 2, g.shape, generator=dice).to(g) * 2 - 1 for g in gradients]
            along = torch.stack([(g * v).sum() for g, v in zip(gradients, signs, strict=True)]).sum()
            products = torch.autograd.grad(along, parameters, retain_graph=True, materialize_grads=True)
            found += [(name, float((v * hv).sum())) for name, v, hv in zip(places, signs, products, strict=True)]
    return found


def _parameters(run: Run, model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's parameter of each weight on offer."""
    known, found = dict(model.named_parameters()), dict[str, nn.Parameter]()
    for parameter, names in run.blueprint.sources("").items():
        if len(names) == 1 and parameter in known:
            found[next(iter(names))] = known[parameter]
    for name in run.offers:
        if name not in found:
            raise UnsupportedError(f"{name} is a part of a larger parameter, of which --measure hessian has no trace")
    return {name: found[name] for name in run.offers}


def true_divergences(run: Run) -> Measured:
    """The divergence of the model with one weight replaced, and nothing else (leave-one-in)."""
    pairs = [(name, label) for name, row in run.offers.items() for label, entry in row.items() if entry.weight.scheme]
    losses = Losses()
    for at in range(0, len(pairs), _TOGETHER):
        some = pairs[at : at + _TOGETHER]
        for (name, label), loss in zip(some, divergences(run, [{n: s} for n, s in some]), strict=True):
            losses.setdefault(name, {})[label] = loss
    return Measured(with_kept(run, losses))


def _by_blocks(run: Run, judge: Judge, whole: Callable[[Entry], float]) -> Measured:
    """What a judge says of the weights of all blocks, and another of those outside."""
    losses, paths = Losses(), list(run.blueprint.blocks)
    for index, path in enumerate(paths):
        run.progress("measure", index, len(paths))
        run.watch.check()
        live = live_block(run, path)
        losses |= judged(run, live, index, sites_of(run, live, index), judge)
    run.progress("measure", len(paths), len(paths))
    return Measured(with_kept(run, losses | outside(run, whole)))


MEASURES = {
    "fisher": Measure(NATS, fisher),
    "output": Measure("relative square error of outputs", output_errors),
    "hessian": Measure("mean trace of the Hessian times square error", hessian_errors, whole=True),
    "kl": Measure(NATS, true_divergences),
}


def measure(name: str, run: Run) -> Measured:
    """All that is on offer by the measure of this name; what is narrow in nats per token whatever that is."""
    if MEASURES[name].losses is fisher or not run.offers:
        return fisher(run)
    found = MEASURES[name].losses(replace(run, narrow={}))
    return replace(fisher(replace(run, offers={})), losses=found.losses) if run.narrow else found
