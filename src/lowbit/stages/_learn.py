"""Learn: a method that sees the whole block makes all its weights together, judged on windows that it did not see."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor

from lowbit import plugins
from lowbit.blocks import Block
from lowbit.methods import Learned, Method
from lowbit.stages._gather import Gatherer
from lowbit.stages._jobs import RIVALS
from lowbit.stages._pages import kept_pages
from lowbit.stages._passes import Passes
from lowbit.stages._sites import Step
from lowbit.stages._state import ABSMAX, Calibration, State
from lowbit.stages.quantize import MEAN_SQUARE, measure, one_torch_thread
from lowbit.tensors import QTensor

Candidates = Mapping[str, Mapping[str, QTensor]]
_UNINFORMED = "the model's predictions on the calibration text are not finite: errors of all channels counted alike"


def learn(steps: Sequence[Step], work: Calibration, state: State, passes: Passes, gatherer: Gatherer) -> None:
    """Learn the weights of the block together; kept where nothing simpler has less error on held-out windows.

    Weights that cannot be learned, and those that the plan gives to another method, are left to whoever makes single
    weights.
    """
    start = time.perf_counter()
    batches = [batch for batch in work.windows.batches if batch.start < work.windows.fit]
    importance = _look(steps, batches, state, gatherer)
    passes.memory.forget()  # attention was of weights that will change
    block = replace(passes.view(steps, work.recipe.method), importance=importance)
    if not block.weights:
        return
    method: Method = plugins.load("methods", work.recipe.method)
    assert method.learn is not None
    with one_torch_thread(), kept_pages(), torch.enable_grad():
        learned = method.learn(block, work.options(method, work.recipe.method))
    made, shared = _choose(block, learned, work, state, passes)
    shared["seconds"] = (time.perf_counter() - start) / len(made)
    for name, qtensor in made.items():
        facts = shared | measure(block.weights[name], qtensor).facts
        state.put(name, qtensor.dequantize())
        state.settle(state.entries[name], qtensor, facts)


def _look(steps: Sequence[Step], batches: Sequence[slice], state: State, gatherer: Gatherer) -> dict[str, Tensor]:
    """What the weights read before the block learns: scales of inputs that all tokens share, and what is of no use.

    Returns the mean square of each weight's inputs.
    """
    importance: dict[str, Tensor] = {}
    needs = {site: [ABSMAX, MEAN_SQUARE] for step in steps for site in step.sites if state.targets(site)}
    for site, found in gatherer.gather(needs, batches).items():
        for name in state.targets(site):
            state.scale_input(name, found)
            if found.useless:
                state.lost[name] = found.useless
            elif MEAN_SQUARE in found.stats:
                importance[name] = found.stats[MEAN_SQUARE].cpu()
    return importance


def _choose(
    block: Block, learned: Learned, work: Calibration, state: State, passes: Passes
) -> tuple[Mapping[str, QTensor], dict[str, Any]]:
    """What has the least error of the block's output on held-out windows, the learned among equals; and its facts."""
    held = work.windows.held
    made = _candidates(block, learned, work, state)
    judges = held or range(block.windows)
    errors = {kind: _output_error(block, each, judges, passes) for kind, each in made.items()}
    best = min(errors, key=lambda kind: errors[kind] if isfinite(errors[kind]) else inf)
    if not isfinite(errors[best]):
        best = list(made)[-1]
    rtn = errors.get("rtn") if isfinite(errors[best]) else None  # which has no super-blocks
    return made[best], {
        "method": best if best in RIVALS else work.recipe.method,
        "fallback": _fallback(best, errors, learned.stopped, "held-out windows" if held else "calibration windows")
        or (_UNINFORMED if work.information and block.information is None else None),
        "against_rtn": errors[best] / rtn if rtn else None,
    }


def _candidates(block: Block, learned: Learned, work: Calibration, state: State) -> Candidates:
    """What was learned, what that began with, and its rivals, as far as they can have the schemes."""
    made = {"learned": learned.weights} | ({} if learned.start is learned.weights else {"start": learned.start})
    found: dict[str, Mapping[str, QTensor]] = {
        kind: {name: state.stored(name, q) for name, q in each.items()} for kind, each in made.items()
    }
    for name, options in RIVALS.items():
        method: Method = plugins.load("methods", name)
        if not any(map(method.objection, block.schemes.values())):
            make = partial(state.made_by, method, method.options(**options))
            with one_torch_thread():
                rivals = work.pool.map(make, block.weights, block.weights.values())
                found[name] = dict(zip(block.weights, rivals, strict=True))
    return found


def _fallback(best: str, errors: Mapping[str, float], stopped: str | None, where: str) -> str | None:
    """Why what was learned was not kept, or was not learned to the end."""
    if not isfinite(errors[best]):
        return f"the block's output on {where} is not finite"
    if best == "learned":
        return stopped
    if not isfinite(errors["learned"]):
        return f"what was learned makes the block's output on {where} not finite"
    what = "its start, before any step, has less" if best == "start" else "less"
    return f"{what} error of the block's output on {where}"


def _output_error(block: Block, made: Mapping[str, QTensor], windows: Sequence[int], passes: Passes) -> float:
    """What the difference between the block's output and the float model's costs."""
    weights = {name: qtensor.dequantize() for name, qtensor in made.items()}
    found: list[float] = []

    def error_of(window: slice) -> float:
        return block.loss(block.run([window.start], weights).float() - block.target([window.start]).float())

    passes.in_turn(error_of, [slice(index, index + 1) for index in windows], lambda _, error: found.append(error))
    return sum(found)
