"""Calibrate: stream windows of tokens through the model, block by block, and quantize each block on what it sees.

One block's weights are in memory at a time. Its sub-layers are done in the order in which the block uses them, each on
the inputs that the quantized ones before it produce. What a method made is compared, on windows that it did not see,
with round-to-nearest and with `mse`; the best is kept.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Int64
from torch import Tensor

from lowbit import native
from lowbit.budget import MemoryWatch
from lowbit.errors import ResourceError, UnsupportedError, UsageError
from lowbit.stages._adapter import Terms
from lowbit.stages._attention import Memory
from lowbit.stages._blocks import Entrance, LiveBlock
from lowbit.stages._cost import EMBEDDED, Cost, estimate, outside_of
from lowbit.stages._ends import Ends
from lowbit.stages._gather import Gatherer
from lowbit.stages._learn import learn
from lowbit.stages._model import Blueprint, open_blueprint
from lowbit.stages._observe import UNREACHED, Seen, split_windows
from lowbit.stages._passes import Passes
from lowbit.stages._recipe import parse_recipe
from lowbit.stages._shortcuts import ends_of
from lowbit.stages._sites import Step, find_steps
from lowbit.stages._state import Calibration, State
from lowbit.stages._step import quantize_step
from lowbit.stages._streams import Streams, stream_kinds
from lowbit.stages._terms import Corrections
from lowbit.stages._transform import transform
from lowbit.stages.checkpoint import Checkpoint
from lowbit.stages.plan import Plan
from lowbit.stages.quantize import Progress, refuse_not_finite, silent
from lowbit.stages.write import WORK, Output

_LENGTH = 2048
_HIDDEN = Path(WORK) / "hidden"


def default_length(source: Checkpoint) -> int:
    """Tokens per window where the user names none: 2,048, or as many as the model takes."""
    config: dict[str, Any] = {**source.config, **(source.config.get("text_config") or {})}
    longest = config.get("max_position_embeddings") or config.get("n_positions")
    return min(longest, _LENGTH) if isinstance(longest, int) and longest > 0 else _LENGTH


@final
@dataclass(frozen=True, eq=False)
class Prepared:
    """A calibrated run that was looked at and not begun: made by `prepare`."""

    source: Checkpoint
    plan: Plan
    blueprint: Blueprint
    ids: Int64[Tensor, "windows tokens"]
    cost: Cost


def prepare(
    source: Checkpoint, plan: Plan, ids: Int64[Tensor, "windows tokens"], ram: int | None, threads: int
) -> Prepared:
    """Open the model and estimate what calibrating it takes.

    Raises:
        CheckpointError: the checkpoint is no causal language model.
        ResourceError: the limit is too small, with the least that works.
        UsageError: the device is not there.
    """
    _check_device(plan)
    blueprint = open_blueprint(source, compute_dtype(plan))
    if not blueprint.blocks:
        raise UnsupportedError(f"{source.path} has no list of blocks to calibrate; use a method without calibration")
    cost = estimate(plan, parse_recipe(plan.recipe), blueprint, (ids.shape[0], ids.shape[1]), ram, threads)
    return Prepared(source, plan, blueprint, ids, cost)


def calibrate(prepared: Prepared, output: Output, watch: MemoryWatch, progress: Progress = silent) -> None:
    """Quantize every block of the model that `output` does not have yet.

    Raises:
        WeightError: NaN or Inf in a weight, naming tensor and index.
        CheckpointError: the model cannot be run.
        UnsupportedError: its blocks cannot be run on their own.
        ResourceError: the disk is full, or the memory limit was passed.
    """
    plan, blueprint = prepared.plan, prepared.blueprint
    outside = outside_of(plan, blueprint)
    stored = {entry.weight.name for entry in plan.entries if not entry.tied}
    wanted = {path: stored & inside for path, inside in blueprint.blocks.items()}
    paths = list(wanted) if outside.heads else _worked_on(plan, wanted)
    done = next((k for k, path in enumerate(paths) if not wanted[path] <= output.records.keys()), len(paths))
    if done == len(paths) and outside.names <= output.records.keys():
        return

    def tick(stage: str, at: int, total: int) -> None:
        progress(stage, at, total)
        watch.check()

    with torch.no_grad(), _device_memory():
        work = _begin(prepared, output)
        with work.pool:
            ends = Ends(work, outside, partial(tick, "slopes"))
            ends.make_tables(range(done, len(paths)))
            start = work.streams.latest(done)
            if start == 0:
                _enter(work, ends.entrance())
            for k in range(start, len(paths)):
                tick("calibrate", k, len(paths))
                _run_block(work, paths[k], k)
                work.streams.forget(k + 1)
            ends.make_heads(len(paths))
        progress("calibrate", len(paths), len(paths))


def forget(output: Output) -> None:
    """Delete the hidden states of a run that has all its weights: those of the last block are as large as of any."""
    shutil.rmtree(output.path / _HIDDEN, ignore_errors=True)


def _check_device(plan: Plan) -> None:
    name = plan.calibration.device if plan.calibration else "cpu"
    try:
        torch.empty(1, device=torch.device(name)).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"--device {name}: torch {torch.__version__} cannot use it ({reason})") from error


@contextmanager
def _device_memory() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).strip().splitlines()[0]
        raise ResourceError(f"a block and its windows do not fit the device ({reason}); take --device cpu") from error


def _worked_on(plan: Plan, wanted: Mapping[str, AbstractSet[str]]) -> list[str]:
    """The blocks up to the last one that has something to quantize."""
    quantized = {entry.weight.name for entry in plan.entries if entry.weight.scheme}
    paths = list(wanted)
    last = max((k for k, path in enumerate(paths) if wanted[path] & quantized), default=-1)
    return paths[: last + 1]


def compute_dtype(plan: Plan) -> torch.dtype:
    """The type in which calibration computes."""
    assert plan.calibration is not None
    if plan.calibration.dtype != "auto":
        found: torch.dtype = getattr(torch, plan.calibration.dtype)
        return found
    sources = {entry.weight.dtype for entry in plan.entries if entry.weight.scheme}
    fast = plan.calibration.device != "cpu" or native.computes_bfloat16()
    return torch.bfloat16 if sources == {torch.bfloat16} and fast else torch.float32


def _begin(prepared: Prepared, output: Output) -> Calibration:
    blueprint, ids, cost = prepared.blueprint, prepared.ids, prepared.cost
    calibration = prepared.plan.calibration
    assert calibration is not None
    recipe, shape = parse_recipe(prepared.plan.recipe), (ids.shape[0], ids.shape[1], blueprint.width)
    folder, square = output.path / _HIDDEN, (1, blueprint.width, blueprint.width)
    informed = recipe.informed(prepared.plan.options)
    return Calibration(
        prepared.source,
        prepared.plan,
        recipe,
        output,
        cost,
        blueprint,
        split_windows(ids, cost.tokens),
        Streams(folder, shape, blueprint.dtype, stream_kinds(recipe, calibration.inputs)),
        Streams(folder, square, torch.float32, ("information",)) if informed else None,
        Entrance(blueprint, torch.device(calibration.device)),
        Terms(output.path),
        Memory(folder / "known", len(ids)),
        ThreadPoolExecutor(cost.threads, "calibrate"),
    )


def _enter(work: Calibration, quantized: Entrance) -> None:
    """Write the first block's inputs: the float model's, and what the embeddings look up as they are stored."""
    for kind in work.streams.kinds:
        entrance = quantized if kind == "quantized" else work.entrance
        with work.streams.writing(kind, 0) as hidden:
            size = max(EMBEDDED // hidden.shape[1], 1)
            for ids, rows in zip(torch.split(work.windows.ids, size), torch.split(hidden, size), strict=True):
                rows.copy_(entrance.hidden(ids))


def _run_block(work: Calibration, path: str, index: int) -> None:
    """The work on one block: transform, learn or quantize step by step, store, and pass on what it computes.

    Weights are committed one by one, the block's outputs at the end.
    """
    state = State(work, path)
    _refuse_not_finite(work.source, state)
    passes = Passes(work, state, index)
    gatherer, corrections = Gatherer(work, state, passes), Corrections(work, state)
    if "float" in work.streams.kinds:
        passes.forward("float")
    with ends_of(state.live.module) as state.live.ends:
        steps = find_steps(state.live, lambda watch: passes.batch(slice(0, 1), watch=watch))
    for name in work.recipe.transforms:
        transform(name, steps, work, state, passes, gatherer)
    paired = Gatherer(work, state, passes, _twin(state.live, work.blueprint)) if work.recipe.paired else gatherer
    if work.recipe.learns:
        learn(steps, work, state, passes, gatherer)
        corrections.mend(steps, gatherer)
    at_once = work.inputs == "float"  # these inputs are all there from the start
    groups = [steps] if at_once else [[step] for step in steps]
    for at, group in enumerate(groups):
        later = _past(group[-1], [] if at_once else steps[at + 1 :])
        quantize_step(paired.observe(group, state.targets, later), work, state, corrections)
    # Of weights that no product of the block was seen to read.
    unseen = Seen({}, torch.empty(0, 0), 0, useless=UNREACHED)
    quantize_step({(name,): unseen for name in state.targets(list(state.entries))}, work, state, corrections)
    corrections.spend(passes.memory)
    state.settle_rest()
    if "quantized" in work.streams.kinds:
        passes.forward("quantized")
    passes.memory.forget()


def _refuse_not_finite(source: Checkpoint, state: State) -> None:
    """Before anything is made of a block: what it computes, and statistics of that, would name no tensor."""
    for name in state.targets(list(state.entries)):
        refuse_not_finite(name, state.live.weight(name) if name in state.live.places else source.tensor(name))


def _twin(live: LiveBlock, blueprint: Blueprint) -> LiveBlock:
    """The float block beside the one that is being quantized, for statistics that compare the two."""
    twin = LiveBlock(blueprint, live.path, list(live.places), live.device)
    twin.places, twin.ends = live.places, live.ends
    for name, _ in twin.module.named_parameters():
        twin.tensor(name).copy_(live.tensor(name))
    return twin


def _past(step: Step, later: Sequence[Step]) -> frozenset[str]:
    """The weights of later steps that are read after all of this one.

    Experts run one after the other: the next ones are not past when the second layer of the first is reached.
    """
    return frozenset(name for other in later if not (step.experts and other.experts) for name in other.names)
