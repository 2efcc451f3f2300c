"""Quantize the weights of one step on what calibration saw: a job for each, pieces of all jobs on all workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lowbit import plugins
from lowbit.methods import Method, Stats
from lowbit.stages._jobs import Job, stand_in
from lowbit.stages._observe import Seen
from lowbit.stages._pages import give_back
from lowbit.stages._sites import Site
from lowbit.stages._state import Calibration, State
from lowbit.stages._terms import Corrections
from lowbit.stages.plan import Entry
from lowbit.stages.quantize import one_torch_thread, tensor_stats

_MUCH = 2**28  # bytes that a method prepares: taking less is faster where heaps keep what was freed


def quantize_step(seen: Mapping[Site, Seen], work: Calibration, state: State, corrections: Corrections) -> None:
    """Quantize the weights of some sites, put them into the block, store them, and correct what they left."""
    jobs: list[Job] = []
    for site, found in seen.items():
        prepared: dict[Any, Stats] = {}
        jobs += [_job(name, found, prepared, work, state, corrections) for name in state.targets(site)]
    _carry_out(jobs, work.pool, state)
    for job in jobs:
        corrections.correct(job.entry.weight.name, job.seen)


def _job(
    name: str, seen: Seen, prepared: dict[Any, Stats], work: Calibration, state: State, corrections: Corrections
) -> Job:
    """The work on one weight of a block."""
    entry = state.entries[name]
    assert entry.method is not None
    method: Method = plugins.load("methods", entry.method)
    learns = bool(method.needs or method.learn)
    lost = state.lost.get(name) or (seen.useless if learns or corrections.learn else None)
    state.scale_input(name, seen)
    whole = state.kept(name)
    return job_of(entry, whole, corrections.residual(name, whole, seen), seen, prepared, work, lost)


def job_of(
    entry: Entry,
    whole: Float[Tensor, "rows cols"],
    weight: Float[Tensor, "rows cols"],
    seen: Seen,
    prepared: dict[Any, Stats],
    work: Calibration,
    lost: str | None,
) -> Job:
    """The work on one weight: `weight`, of which the codes are made, and low-rank terms stand for `whole`.

    What a method prepares is shared by weights of one scheme at one site, whose `prepared` this is. `lost`: why
    calibration cannot do what the plan says.
    """
    scheme, piece = entry.weight.scheme, work.way.piece
    assert scheme is not None and entry.method is not None
    method: Method = plugins.load("methods", entry.method)
    chosen = stand_in(method, scheme, work.plan.rules) if lost and (method.needs or method.learn) else entry.method
    method = plugins.load("methods", chosen)
    options = work.options(method, chosen)
    if (chosen, scheme) not in prepared:
        if method.prepared(entry.weight.shape[-1]) >= _MUCH:
            give_back()  # what passes left in heaps
        prepared[chosen, scheme] = method.prepare(_where(method, seen.stats, work.device), scheme, options)
    stats = {**prepared[chosen, scheme], **tensor_stats(weight, scheme, piece)}
    return Job(entry, chosen, weight, stats, seen, options, piece, whole, lost)


def _where(method: Method, stats: Stats, device: torch.device) -> Stats:
    """Statistics where the method is fastest."""
    return {name: value.to(device) for name, value in stats.items()} if method.anywhere else stats


def _carry_out(jobs: Sequence[Job], pool: Executor, state: State) -> None:
    with one_torch_thread():
        work = [[pool.submit(job.piece, rows) for rows in job.places()] for job in jobs]
        for job, futures in zip(jobs, work, strict=True):
            pieces = [future.result() for future in futures]
            futures.clear()
            made = job.choose(pieces)
            for rows in job.places() if job.entry.weight.name in state.live.places else ():
                state.put(job.entry.weight.name, made.qtensor.rows(rows.start, rows.stop), rows)
            state.settle(job.entry, made.qtensor, made.facts)
