"""Factors of inputs that nothing in a model can take: which weights get them, what is stored, and what it computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lowbit.errors import UnsupportedError
from lowbit.pipeline import Request, find_plan
from lowbit.stages._gather import Gatherer
from lowbit.stages._model import open_blueprint
from lowbit.stages._room import with_factors
from lowbit.stages._transform import transform
from lowbit.stages.calibrate import _run_block, prepare
from lowbit.stages.checkpoint import Checkpoint, open_checkpoint
from lowbit.stages.plan import Calibration, Plan, Rules, make_plan
from lowbit.stages.write import open_output, write_atomic
from lowbit.transforms import awq
from tests.reference.models import save_tiny
from tests.unit.test_calibrate import IDS, begun, block_of, last, steps_of, store_rest

OUT = "dense_4h_to_h"  # reads what a GELU made, which no factor passes through


def rules(method: str = "awq+rtn", scheme: str | None = None, **settings: Any) -> Rules:
    options = {name: 2 for name in ("awq.windows", "smoothquant.windows") if name.split(".")[0] in method}
    options |= {"awq.ratios": 4, "awq.duo": False} if "awq" in method else {}
    options |= {"iterations": 2} if "autoround" in method else {}
    calibration = Calibration(("text",), dtype="float32")
    return Rules(scheme, method, "modelopt", options=options, calibration=calibration, blocks=(0, 1), **settings)


def uneven(folder: Path) -> Checkpoint:
    """A GPT-NeoX of which some inputs of the last layer of a block are far larger than others."""
    model = save_tiny("gpt_neox", folder)
    with torch.no_grad():
        for layer in model.gpt_neox.layers:
            layer.mlp.dense_h_to_4h.weight *= 0.2  # where the GELU is curved
            layer.mlp.dense_h_to_4h.bias[::7] += 1
    model.save_pretrained(folder)
    return open_checkpoint(folder)


@pytest.mark.parametrize(
    ("kind", "method", "wanted"),
    [
        ("gpt_neox", "awq+rtn", {OUT}),
        ("gpt_neox", "awq+rtn+eora", set()),
        ("mixtral", "awq+rtn", {"w2"}),
    ],
)
def test_room_is_made_where_nothing_can_take_a_factor(kind: str, method: str, wanted: set[str], tmp_path: Path) -> None:
    save_tiny(kind, tmp_path)
    plan = find_plan(Request(str(tmp_path), tmp_path / "plan.json", rules(method)))
    found = [entry.weight for entry in plan.entries if entry.weight.scheme and entry.weight.scheme.smooth]
    assert {last(weight.name) for weight in found} == wanted
    assert len(found) == (4 if kind == "mixtral" else 1) * len(wanted)


CHOSEN = torch.rand(128, generator=torch.Generator().manual_seed(0)) + 0.5


def choose(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the transform choose these factors where nothing can take them, and none elsewhere."""
    search = lambda site, *_: CHOSEN[: site.channels] if last(site.weights[0]) == OUT else None
    monkeypatch.setattr(awq, "TRANSFORM", replace(awq.TRANSFORM, search=search))


def carried_out(source: Checkpoint, plan: Plan, out: Path) -> Tensor:
    """Carry out a plan for the first block; returns what it made of the windows."""
    ready = prepare(source, plan, IDS, None, 1)
    with open_output(out, source, plan) as output, torch.no_grad():
        work = begun(ready, output)
        _run_block(work, next(iter(ready.blueprint.blocks)), 0)
        store_rest(ready, output)
        output.finish(source)
        return work.streams.read("quantized", 1)[:].clone()


@pytest.mark.parametrize(("method", "activations"), [("awq+gptq", None), ("awq+autoround", None), ("awq+rtn", "nvfp4")])
def test_what_is_stored_computes_what_the_run_computed(
    method: str, activations: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(monkeypatch)
    source = uneven(tmp_path / "model")
    plan = with_factors(make_plan(source, rules(method, activations=activations)), source)
    wanted = carried_out(source, plan, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    factors = {name: tensor for name, tensor in stored.items() if name.endswith(f"{OUT}.pre_quant_scale")}
    torch.testing.assert_close(factors, {f"gpt_neox.layers.0.mlp.{OUT}.pre_quant_scale": 1 / CHOSEN[:48]})
    found = first_block(open_checkpoint(tmp_path / "out"))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def first_block(source: Checkpoint) -> Tensor:
    """What the first block makes of the windows, as `transformers` runs the whole model."""
    model: Any = open_blueprint(source, torch.float32).resident()
    found: list[Tensor] = []
    model.gpt_neox.layers[0].register_forward_hook(lambda module, inputs, made: found.append(made))
    with torch.no_grad():
        model(IDS, use_cache=False)
    return found[0]


def test_methods_see_inputs_as_a_runtime_multiplies_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch)
    source = uneven(tmp_path / "model")
    ready = prepare(source, with_factors(make_plan(source, rules("awq+gptq")), source), IDS, None, 1)
    with open_output(tmp_path / "out", source, ready.plan) as output, torch.no_grad():
        work = begun(ready, output)
        state, passes = block_of(work)
        steps, gatherer = steps_of(state, passes), Gatherer(work, state, passes)
        site = next(site for step in steps for site in step.sites if last(site[0]) == OUT)
        needs, batches = {site: ["second_moment"]}, work.windows.batches[:1]
        before, out = gatherer.gather(needs, batches)[site], passes.batch(batches[0])
        for _ in range(2):  # a second transform goes on from the first
            transform("awq", steps, work, state, passes, gatherer)
        after = gatherer.gather(needs, batches)[site]
        assert torch.equal(passes.batch(batches[0]), out)
    factors = 1 / CHOSEN[:48].double() ** 2
    wanted = before.stats["second_moment"].double() * factors * factors[:, None]
    torch.testing.assert_close(after.stats["second_moment"].double(), wanted, rtol=1e-4, atol=1e-6)
    (name,) = site
    torch.testing.assert_close(state.floats[name].double(), source.tensor(name).double() / factors, rtol=1e-5, atol=0)


def test_a_saved_plan_keeps_its_factors_and_one_without_gets_none(tmp_path: Path) -> None:
    source = uneven(tmp_path / "model")
    plain = make_plan(source, rules())
    for plan in (plain, with_factors(plain, source)):
        write_atomic(tmp_path / "plan.json", plan.to_json().encode())
        found = find_plan(Request(str(tmp_path / "model"), tmp_path / "x", plan=tmp_path / "plan.json"))
        assert [entry.weight for entry in found.entries] == [entry.weight for entry in plan.entries]


@pytest.mark.parametrize("method", ["rtn", "awq+rtn+eora"])
def test_factors_that_nothing_would_make_are_refused(method: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    with pytest.raises(UnsupportedError, match="transform"):
        make_plan(open_checkpoint(tmp_path), rules(method, "nvfp4-smooth"))


def test_factors_that_were_folded_are_stored_as_ones(tmp_path: Path) -> None:
    """Of a llama all can be folded; who asks for them beside the weights gets room for them."""
    save_tiny("llama", tmp_path / "model")
    source = open_checkpoint(tmp_path / "model")
    carried_out(source, make_plan(source, rules(sets=((r"layers\.0.*down_proj", "nvfp4-smooth"),))), tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    factors = [tensor for name, tensor in stored.items() if name.endswith("pre_quant_scale")]
    assert len(factors) == 1 and bool((factors[0] == 1).all())
