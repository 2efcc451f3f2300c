"""Learn: a method that sees the whole block makes all its weights together, judged on windows that it did not see."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch

from lowbit import plugins
from lowbit.blocks import Block
from lowbit.methods import Method
from lowbit.stages._gather import Gatherer
from lowbit.stages._pages import kept_pages
from lowbit.stages._passes import Passes
from lowbit.stages._sites import Step
from lowbit.stages._state import ABSMAX, Calibration, State
from lowbit.stages.quantize import measure, one_torch_thread
from lowbit.tensors import QTensor


def learn(steps: Sequence[Step], work: Calibration, state: State, passes: Passes, gatherer: Gatherer) -> None:
    """Learn all weights of the block together; kept where that beats round-to-nearest on held-out windows."""
    start = time.perf_counter()
    method: Method = plugins.load("methods", work.recipe.method)
    assert method.learn is not None
    _scale_inputs(steps, work.windows.batches, state, gatherer)
    passes.memory.forget()  # attention was of weights that will change
    block = passes.view(steps)
    options = work.options(method, work.recipe.method)
    with one_torch_thread(), kept_pages(), torch.enable_grad():
        learned = dict(method.learn(block, options))
    nearest = {name: state.nearest(name, weight) for name, weight in block.weights.items()}
    held = work.windows.held
    errors = {kind: _held_error(block, made, held, passes) for kind, made in (("learn", learned), ("rtn", nearest))}
    worse = not errors["learn"] <= errors["rtn"]  # NaN is no less than anything
    shared = {
        "method": "rtn" if worse else work.recipe.method,
        "fallback": "round-to-nearest has less error of the block's output on held-out windows" if worse else None,
        "against_rtn": 1.0 if worse else errors["learn"] / errors["rtn"] if errors["rtn"] else None,
        "seconds": (time.perf_counter() - start) / max(len(learned), 1),
    }
    for name, qtensor in (nearest if worse else learned).items():
        error = measure(block.weights[name], qtensor)
        facts = shared | error.facts
        state.put(name, qtensor.dequantize())
        state.settle(state.entries[name], qtensor, facts)


def _scale_inputs(steps: Sequence[Step], batches: Sequence[slice], state: State, gatherer: Gatherer) -> None:
    """Scales of inputs that all tokens share, from what the weights of a block that learns read before it does."""
    needs = {site: [ABSMAX] for step in steps for site in step.sites if state.rounds(site)}
    seen = gatherer.gather(needs, batches) if needs else {}
    for site, found in seen.items():
        for name in state.targets(site):
            state.scale_input(name, found)


def _held_error(block: Block, made: Mapping[str, QTensor], held: Sequence[int], passes: Passes) -> float:
    """Squared difference between the block's output and the float model's on windows that nothing learned from."""
    weights = {name: qtensor.dequantize() for name, qtensor in made.items()}
    found: list[float] = []

    def error_of(window: slice) -> float:
        gap = block.run([window.start], weights).float() - block.target([window.start]).float()
        return float(gap.square().sum(dtype=torch.float64))

    passes.in_turn(error_of, [slice(index, index + 1) for index in held], lambda _, error: found.append(error))
    return sum(found)
