"""Tuning of scales and norms: what it computes, what it leaves alone, and that it can be stopped."""

from __future__ import annotations

import json
from dataclasses import replace
from math import isnan
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import kl_div

from lowbit import pipeline
from lowbit.budget import MemoryWatch
from lowbit.errors import ResourceError, UnsupportedError, UsageError
from lowbit.methods.rtn import METHOD
from lowbit.schemes import parse
from lowbit.stages import tune
from lowbit.stages._model import open_blueprint
from lowbit.stages._store import store
from lowbit.stages._verdict import judge
from lowbit.stages.calibrate import calibrate
from lowbit.stages.checkpoint import open_checkpoint
from lowbit.stages.plan import Calibration, Rules, as_planned, make_plan
from lowbit.stages.quantize import estimate_memory, quantize
from lowbit.stages.write import open_output
from lowbit.tensors import QTensor, view_shape
from tests.reference.models import save_tiny
from tests.unit.test_calibrate import opened, store_rest

MODEL = Path(__file__).parents[2] / "src/lowbit/data/wiki-8m"
TEXT = Path(__file__).parents[2] / "src/lowbit/data/evaluation.txt"


def request(out: Path, method: str, scheme: str = "int2-g64-asym", **options: Any) -> pipeline.Request:
    calibration = Calibration((str(TEXT),), samples=17, length=64)
    named = {f"tune.{key}": value for key, value in options.items()}
    rules = Rules(scheme, method, options=named, calibration=calibration, blocks=(0, 2))
    return pipeline.Request(str(MODEL), out, rules)


def quantized(scheme: str, rows: int, cols: int) -> QTensor:
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(3))
    kind = parse(scheme)
    made = METHOD.quantize(weight.view(view_shape((rows, cols), kind.block)), {}, kind, METHOD.options())
    return replace(made, shape=(rows, cols))


@pytest.mark.parametrize(
    "scheme", ["int4-g8", "int3-g8-asym", "int2-g5-fzero", "int8-row", "nf4-g8", "fp8-e4m3-8x8-bf16"]
)
@pytest.mark.parametrize("shape", [(6, 16), (9, 21)])
def test_a_moved_weight_is_the_one_that_is_stored(scheme: str, shape: tuple[int, int]) -> None:
    weight = quantized(scheme, *shape)
    part = tune._Scaled(weight)
    assert torch.equal(part.parameter().detach(), weight.dequantize())
    with torch.no_grad():
        part.move.copy_(torch.empty_like(part.move).uniform_(-0.3, 0.3, generator=torch.Generator().manual_seed(4)))
    moved = replace(weight, scales=part.stored()).dequantize()
    assert not torch.equal(moved, weight.dequantize())
    torch.testing.assert_close(part.parameter().detach(), moved, rtol=1e-6, atol=0)


def test_slopes_are_those_of_the_divergence(tmp_path: Path) -> None:
    """Against differences of a loss written out here, on a model whose every linear layer has scales in float32."""
    with opened("llama", tmp_path, "rtn+tune", scheme="int3-g8-f32") as (_, ready, output):
        calibrate(ready, output, MemoryWatch(None))
        store_rest(ready, output)
        output.finish(ready.source)
        with open_checkpoint(output.path) as written:
            student = tune._Student(written, torch.float32)
    teacher, ids = ready.blueprint.resident(), ready.ids[:3]

    def divergence() -> float:
        with torch.no_grad():
            rows = student.logits(ids, student.weights()).double().log_softmax(-1)
            wanted = teacher(ids).logits.double().log_softmax(-1)
        return float((wanted.exp() * (wanted - rows)).sum() / ids.numel())

    loss = tune._Loss(student, teacher, "model")
    assert loss.mean(ids) == pytest.approx(divergence(), rel=1e-4)
    loss.slopes(ids)
    kinds = {type(part) for part in student.parts.values()}
    assert kinds == {tune._Scaled, tune._Vector}
    for name, part in student.parts.items():
        assert part.move.grad is not None
        at = int(part.move.grad.abs().argmax())
        ends = []
        for step in (1e-2, -1e-2):
            with torch.no_grad():
                part.move.view(-1)[at] = step
                ends.append(divergence())
                part.move.view(-1)[at] = 0
        slope = (ends[0] - ends[1]) / 2e-2
        assert float(part.move.grad.view(-1)[at]) == pytest.approx(slope, rel=0.05, abs=2e-6), name


def test_transposed_layers_are_moved_as_the_model_holds_them(tmp_path: Path) -> None:
    """GPT-2's square weights look alike both ways."""
    save_tiny("gpt2", tmp_path / "model")
    with open_checkpoint(tmp_path / "model") as checkpoint:
        plan = make_plan(checkpoint, Rules("int4-g16", "rtn", format="gptq"))
        source = as_planned(checkpoint, plan)
        with open_output(tmp_path / "out", source, plan) as output:
            quantize(source, plan, output, estimate_memory(plan, None, 1), MemoryWatch(None))
            output.finish(source)
    with open_checkpoint(tmp_path / "out") as written, torch.no_grad():
        student, plain = tune._Student(written, torch.float32), open_blueprint(written, torch.float32).resident()
        swapped = {name for name, weight in written.weights.items() if weight.swapped}
        assert len(swapped) == 8 and swapped <= student.parts.keys()
        assert any(written.weights[name].shape[0] == written.weights[name].shape[1] for name in swapped)
        ids = torch.arange(3, 27).view(2, 12)
        torch.testing.assert_close(student.logits(ids, student.weights()), plain(ids).logits, rtol=1e-5, atol=1e-6)


def parts(out: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Parts of every weight of a result, copied."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    with open_checkpoint(out) as written:
        for name in written.weights:
            value = written.load(name)
            pairs = dict(value.parts()) if isinstance(value, QTensor) else {"weight": value}
            found[name] = {part: tensor.clone() for part, tensor in pairs.items()}
    return found


def divergence(out: Path) -> float:
    """Of a result from the original, on the end of the text, by `transformers` alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = AutoTokenizer.from_pretrained(MODEL)(TEXT.read_text()[-6000:], return_tensors="pt").input_ids
    ids = text[:, : text.shape[1] // 64 * 64].view(-1, 64)
    original, changed = (AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32) for _ in range(2))
    with torch.no_grad(), open_checkpoint(out) as written:
        for name, parameter in changed.named_parameters():
            parameter.copy_(written.dequantized(name))
        rows, wanted = (model(ids).logits.log_softmax(-1).flatten(0, 1) for model in (changed, original))
    return float(kl_div(rows, wanted, reduction="batchmean", log_target=True))


def test_scales_and_norms_move_towards_the_original_and_nothing_else(tmp_path: Path) -> None:
    pipeline.run(request(tmp_path / "plain", "gptq"))
    result = pipeline.run(request(tmp_path / "tuned", "gptq+tune", lr=5e-3))
    before, after = parts(tmp_path / "plain"), parts(tmp_path / "tuned")
    kinds = set()
    for name, values in after.items():
        for part, tensor in values.items():
            moved = not torch.equal(tensor, before[name][part])
            kinds.add((part if "scales" in values else f"{tensor.dim()}-d", moved))
    assert {kind for kind, moved in kinds if moved} == {"scales", "1-d"}
    assert {kind for kind, moved in kinds if not moved} >= {"codes", "zeros", "2-d"}
    assert result.calibration is not None
    tuned = result.calibration["tuned"]
    assert tuned["after"] < 0.95 * tuned["before"]
    assert divergence(tmp_path / "tuned") < 0.95 * divergence(tmp_path / "plain")
    assert "tune" in result.seconds


def test_what_is_no_gain_is_left_alone(tmp_path: Path) -> None:
    pipeline.run(request(tmp_path / "plain", "gptq", "int8-row"))
    result = pipeline.run(request(tmp_path / "tuned", "gptq+tune", "int8-row", lr=30.0, epochs=1))
    assert result.calibration is not None
    assert result.calibration["tuned"]["after"] == result.calibration["tuned"]["before"]
    before, after = parts(tmp_path / "plain"), parts(tmp_path / "tuned")
    assert all(torch.equal(tensor, before[name][part]) for name in after for part, tensor in after[name].items())


def test_a_loss_that_is_not_finite_is_said_and_nothing_is_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune._Loss, "mean", lambda *_: float("nan"))
    result = pipeline.run(request(tmp_path, "rtn+tune", lr=5e-3))
    assert any("not tuned: the loss on held-out windows is not finite" in said for said in judge(result).sentences)
    assert result.calibration is not None and isnan(result.calibration["tuned"]["after"])


def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline.run(request(tmp_path / "whole", "rtn+tune", lr=5e-3))
    left = [9]

    def stopped(*arguments: Any, **settings: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        store(*arguments, **settings)
        partial = tmp_path / "part/.lowbit/model.safetensors.partial"
        assert left[0] < 0 or partial.exists(), "a file is synced once, when all is stored"

    monkeypatch.setattr(tune, "store", stopped)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(request(tmp_path / "part", "rtn+tune", lr=5e-3))
    assert not (tmp_path / "part" / "report.json").exists()
    pipeline.run(request(tmp_path / "part", "rtn+tune", lr=5e-3))
    both = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "part")]
    assert both[0] == both[1]
    journal = (tmp_path / "part/.lowbit/journal.jsonl").read_text().splitlines()[1:]
    last = {line["tensor"]: line["facts"].get("tuned", False) for line in map(json.loads, journal)}
    assert sum(last.values()) > 20
    assert sum(last.values()) == sum(line.get("facts", {}).get("tuned", False) for line in map(json.loads, journal))


def test_what_cannot_be_tuned_is_refused_before_the_start(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"tune would move scales from under their low-rank terms"):
        pipeline.run(request(tmp_path / "a", "rtn+lqer+tune"))
    with pytest.raises(UsageError, match=r"tune.target is 'loss'; it must be one of model, text"):
        pipeline.run(request(tmp_path / "a", "rtn+tune", target="loss"))
    asked = request(tmp_path / "a", "rtn+tune", "int8-row")
    with pytest.raises(UnsupportedError, match="cannot follow the rounding of activations"):
        pipeline.run(replace(asked, rules=replace(asked.rules, activations="int8-row")))
    assert not (tmp_path / "a").exists()


def test_more_memory_than_allowed_is_refused_with_the_need(tmp_path: Path) -> None:
    with opened("llama", tmp_path, "rtn+tune") as (_, ready, _):
        (cost,) = tune.estimate(ready, None)
        assert cost.models > 2 * 4 * sum(p.numel() for p in ready.blueprint.resident().parameters())
        with pytest.raises(ResourceError, match="too little for tune, which holds the whole model and needs"):
            tune.estimate(ready, cost.total // 2)
