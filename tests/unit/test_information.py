"""Information at the outputs of blocks: what it is, what is learned by it, and that a run goes on with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowbit.blocks import Block, Weights
from lowbit.budget import MemoryWatch
from lowbit.methods import _learn, autoround
from lowbit.schemes import parse
from lowbit.stages._cost import outside_of
from lowbit.stages._information import Backward
from lowbit.stages._learn import _output_error
from lowbit.stages._passes import Passes
from lowbit.stages.calibrate import Prepared, _begin, calibrate, prepare
from lowbit.stages.checkpoint import open_checkpoint
from lowbit.stages.plan import Calibration, Rules, as_planned, make_plan
from lowbit.stages.write import open_output
from lowbit.transforms import _search
from tests.reference import autoround as reference
from tests.reference.models import SETTINGS, save_tiny
from tests.unit.test_autoround import WINDOWS, block_of, nearest_of
from tests.unit.test_ends import IDS, _Stop, information, opened


def planned(folder: Path, ids: Tensor = IDS, **options: Any) -> Prepared:
    source, text = open_checkpoint(folder / "model"), Calibration(("text",))
    rules = Rules("int3-row", "autoround", options={"iterations": 3, "information": True, **options}, calibration=text)
    plan = make_plan(source, rules)
    return prepare(as_planned(source, plan), plan, ids, None, 1)


def at_outputs(model: Any, ids: Tensor, paths: Sequence[str]) -> list[Tensor]:
    """By the whole model at once: gradients at what each block gives, `[tokens, width]`, of tokens that are drawn."""
    dice, found = torch.Generator().manual_seed(0), [list[Tensor]() for _ in paths]
    for window in ids:
        seen: dict[str, Tensor] = {}

        def look(path: str, module: nn.Module, args: object, made: Any, seen: dict[str, Tensor] = seen) -> None:
            seen[path] = made if isinstance(made, Tensor) else made[0]
            seen[path].retain_grad()

        hooks = [model.get_submodule(path).register_forward_hook(partial(look, path)) for path in paths]
        with torch.enable_grad():
            chances = model(input_ids=window[None], use_cache=False).logits[0].log_softmax(-1)
            token = torch.multinomial(chances.detach().exp(), 1, generator=dice)
            chances.gather(1, token).sum().backward()
        for hook in hooks:
            hook.remove()
        for slopes, path in zip(found, paths, strict=True):
            gradient = seen[path].grad
            assert gradient is not None
            slopes.append(gradient.flatten(0, -2))
    return [torch.cat(slopes) for slopes in found]


def even(found: Tensor) -> Tensor:
    """One on average along its diagonal."""
    return found / found.diagonal().mean()


@pytest.mark.parametrize("kind", SETTINGS)
def test_information_is_that_of_the_whole_model(kind: str, tmp_path: Path) -> None:
    model = save_tiny(kind, tmp_path / "model")
    ready = planned(tmp_path)
    with open_output(tmp_path / "out", ready.source, ready.plan) as output, torch.no_grad():
        work = _begin(ready, output)
        with work.pool:
            Backward(work, {}, range(2), lambda done, total: None).run()
        assert work.information is not None and work.windows.fit == 7
        wanted = at_outputs(model, IDS[:7], list(work.blueprint.blocks))
        for index, slopes in enumerate(wanted):
            found = work.information.read("information", index)[0]
            torch.testing.assert_close(found, even(information(slopes)), rtol=5e-3, atol=1e-4)
            assert not torch.allclose(found, torch.eye(len(found)), atol=0.1)


def test_embeddings_that_are_learned_from_the_same_pass_change_nothing(tmp_path: Path) -> None:
    """Windows that judge embeddings are no part of it."""
    with opened("llama", tmp_path, "autoround", options={"information": True}) as (model, work, ends):
        ends.make_tables(range(1, 2))
        (slopes,) = at_outputs(model, work.windows.ids[:7], list(work.blueprint.blocks)[1:])
        assert work.information is not None and not work.information.there("information", 0)
        found = work.information.read("information", 1)[0]
    assert work.output.records.keys() == outside_of(work.plan, work.blueprint).tables.keys()
    torch.testing.assert_close(found, even(information(slopes)), rtol=5e-3, atol=1e-4)


def informed(block: Block) -> Block:
    mixed = torch.randn(24, 24, generator=torch.Generator().manual_seed(9))
    return replace(block, information=mixed @ mixed.T / 24 + 0.1 * torch.eye(24))


def slow_loss(block: Block, weights: Weights) -> float:
    """By its definition, token by token."""
    assert block.information is not None
    error = (block.run(range(WINDOWS), weights) - block.target(range(WINDOWS))).double().flatten(0, -2)
    return sum(float(each @ block.information.double() @ each) for each in error)


@pytest.mark.parametrize("scheme", ["int4-g8", "int2-g8-asym"])
def test_codes_are_those_of_the_definition(scheme: str) -> None:
    """Signs of derivatives of `e^T F e`, through every rounding; others than those of `e^T e`."""
    block, kind = informed(block_of(scheme, torch.float64)), parse(scheme)
    options = autoround.Options(iterations=8, lr=1 / 20, minmax_lr=1 / 20, search=False, signed=False)
    codes: dict[bool, Tensor] = {}
    for weighs in (True, False):
        each = block if weighs else replace(block, information=None)
        learners = {name: autoround._SignRound(weight, kind, options) for name, weight in each.weights.items()}
        _learn.descend(each, learners, options.total, WINDOWS)
        codes[weighs] = learners["up"].result().codes
    slow = {
        name: reference.Weight(weight, kind.grid.bits, 8, kind.zero == "int") for name, weight in block.weights.items()
    }
    assert block.information is not None
    root = torch.linalg.cholesky(block.information.double())
    reference.learn(slow, lambda w: block.run(range(WINDOWS), w) @ root, block.target(range(WINDOWS)) @ root, 8, 1 / 20)
    assert torch.equal(codes[True].double(), slow["up"].codes_and_value()[0])
    assert not torch.equal(codes[True], codes[False])


def test_candidates_are_judged_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    block = informed(block_of("int3-g8"))
    rounded = {name: block.nearest(name, weight) for name, weight in block.weights.items()}
    wanted = slow_loss(block, rounded)
    count = block.target(range(WINDOWS)).numel()
    assert _search.output_error(block, range(WINDOWS), rounded, {}) * count == pytest.approx(wanted, rel=1e-5)
    error = block.run(range(WINDOWS), rounded) - block.target(range(WINDOWS))
    assert block.loss(error) == pytest.approx(wanted, rel=1e-5)
    made = {name: nearest_of(weight, parse("int3-g8")) for name, weight in block.weights.items()}

    def in_turn(passes: Passes, work: Any, parts: Any, take: Any) -> None:
        for part in parts:
            take(part, work(part))

    monkeypatch.setattr(Passes, "in_turn", in_turn)
    assert _output_error(block, made, range(WINDOWS), Passes.__new__(Passes)) == pytest.approx(wanted, rel=1e-5)
    assert replace(block, information=None).loss(error) == pytest.approx(float(error.square().sum()), rel=1e-5)


@pytest.mark.parametrize("at", [("slopes", 1), ("slopes", 3), ("calibrate", 0), ("calibrate", 1), ("calibrate", 2)])
def test_a_run_that_was_stopped_ends_with_the_same_bytes(at: tuple[str, int], tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    ready, stages = planned(tmp_path), list[str]()

    def stop(stage: str, done: int, total: int) -> None:
        if (stage, done) == at:
            raise _Stop

    with open_output(tmp_path / "whole", ready.source, ready.plan) as output:
        calibrate(ready, output, MemoryWatch(None))
        whole = {name: record.stored for name, record in output.records.items()}
        assert not list((tmp_path / "whole").rglob("information-*"))
    with open_output(tmp_path / "other", ready.source, ready.plan) as output, pytest.raises(_Stop):
        calibrate(ready, output, MemoryWatch(None), stop)
    with open_output(tmp_path / "other", ready.source, ready.plan) as output:
        calibrate(ready, output, MemoryWatch(None), lambda stage, done, total: stages.append(stage))
        assert {name: record.stored for name, record in output.records.items()} == whole
    assert ("slopes" in stages) == (at[0] == "slopes"), "what is there is not made again"


@pytest.mark.parametrize("method", ["autoround", "rtn+lqer"])
def test_no_slopes_are_taken_where_none_are_asked_for(method: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    options = {"iterations": 3} if method == "autoround" else {}
    source, text = open_checkpoint(tmp_path / "model"), Calibration(("text",))
    plan = make_plan(source, Rules("int3-row", method, options=options, calibration=text))
    ready, stages = prepare(source, plan, IDS, None, 1), list[str]()
    with open_output(tmp_path / "out", ready.source, ready.plan) as output:
        calibrate(ready, output, MemoryWatch(None), lambda stage, done, total: stages.append(stage))
    assert set(stages) == {"calibrate"}


def test_predictions_that_are_no_numbers_leave_all_channels_alike_and_say_so(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model")
    with torch.no_grad():
        model.model.norm.weight[3] = float("inf")
    model.save_pretrained(tmp_path / "model")
    stored = {}
    for name in ("with", "without"):
        ready = planned(tmp_path, iterations=40, information=name == "with")
        with open_output(tmp_path / name, ready.source, ready.plan) as output:
            calibrate(ready, output, MemoryWatch(None))
            stored[name] = {weight: record.stored for weight, record in output.records.items()}
            facts = output.records["model.layers.0.mlp.up_proj.weight"].facts
            assert facts["method"] == "autoround"
            assert ("predictions on the calibration text are not finite" in str(facts["fallback"])) == (name == "with")
    assert stored["with"] == stored["without"]


def test_the_estimate_counts_it(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    ids = torch.randint(3, 96, (640, 24), generator=torch.Generator().manual_seed(1))
    with_it, without = (planned(tmp_path, ids=ids, information=asked).cost for asked in (True, False))
    slopes = -(-8192 // 24) * 24 * 32 * 4  # of a block's output
    assert with_it.disk - without.disk == pytest.approx(3 * slopes + 2 * 32 * 32 * 4, rel=0.3)
    assert with_it.seconds > without.seconds


def test_the_block_that_learns_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each its own: of the blocks in their order."""
    save_tiny("llama", tmp_path / "model")
    ready, seen, kept, view = planned(tmp_path), list[Block](), list[Tensor](), Passes.view
    keep = Backward._keep

    def noted(passes: Passes, *args: Any) -> Block:
        seen.append(view(passes, *args))
        return seen[-1]

    def keeping(way: Backward, index: int, slopes: Tensor) -> None:
        keep(way, index, slopes)
        assert way._work.information is not None
        kept.append(way._work.information.read("information", index)[0].clone())

    monkeypatch.setattr(Passes, "view", noted)
    monkeypatch.setattr(Backward, "_keep", keeping)
    with open_output(tmp_path / "out", ready.source, ready.plan) as output:
        calibrate(ready, output, MemoryWatch(None))
    assert len(seen) == len(kept) == 2 and not torch.equal(kept[0], kept[1])
    for block, wanted in zip(seen, reversed(kept), strict=True):
        assert block.information is not None
        torch.testing.assert_close(block.information, wanted, rtol=0, atol=0)
