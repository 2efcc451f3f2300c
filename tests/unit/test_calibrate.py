"""The calibrated part of the line on tiny random models of many classes."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowbit.blocks import Site as BlockSite
from lowbit.budget import MemoryWatch
from lowbit.errors import CheckpointError, ResourceError, UnsupportedError, UsageError, WeightError
from lowbit.methods import NoOptions
from lowbit.methods.mse import Options as MseOptions
from lowbit.plugins import load
from lowbit.schemes import parse
from lowbit.stages import _learn
from lowbit.stages._adapter import Terms
from lowbit.stages._fold import find_producer
from lowbit.stages._gather import Gatherer
from lowbit.stages._jobs import Job
from lowbit.stages._model import open_blueprint
from lowbit.stages._observe import Accumulator, Observer, Seen
from lowbit.stages._passes import Passes
from lowbit.stages._products import Product
from lowbit.stages._sites import Found, Step, find_steps, joined
from lowbit.stages._state import Calibration as Work
from lowbit.stages._state import State
from lowbit.stages._transform import fold, producer_of, transform
from lowbit.stages.calibrate import Prepared, _begin, _enter, calibrate, prepare
from lowbit.stages.checkpoint import Checkpoint, open_checkpoint
from lowbit.stages.plan import Calibration, Entry, Rules, as_planned, make_plan
from lowbit.stages.quantize import estimate_memory, quantize
from lowbit.stages.record import _starved
from lowbit.stages.write import Output, open_output
from lowbit.tensors import QTensor
from lowbit.transforms import awq
from tests.reference.models import SETTINGS, save_tiny

IDS = torch.randint(3, 96, (8, 24), generator=torch.Generator().manual_seed(1))
DENSE = [kind for kind in SETTINGS if kind not in ("mixtral", "qwen2_moe", "qwen3_moe", "mamba")]
MOE = ["mixtral", "qwen2_moe", "qwen3_moe"]


def prepared(
    source: Checkpoint,
    method: str = "gptq",
    scheme: str = "int4-g8",
    form: str = "compressed-tensors",
    skip: tuple[str, ...] = (),
    **settings: Any,
) -> Prepared:
    # Readers of the default format do not take the transposed layers of GPT-2, nor Falcon's unless asked.
    gpt2, falcon = (source.config["model_type"] == kind for kind in ("gpt2", "falcon"))
    sets = (("self_attention|mlp", scheme),) if falcon else ()
    stored = ("int4-g16", method, "gptq") if gpt2 else (scheme, method, form)
    plan = make_plan(source, Rules(*stored, sets=sets, skip=skip, calibration=Calibration(("text",), **settings)))
    return prepare(as_planned(source, plan), plan, IDS, None, 1)


@contextlib.contextmanager
def opened(kind: str, folder: Path, method: str = "gptq", **settings: Any) -> Iterator[tuple[Any, Prepared, Output]]:
    """A tiny model on disk, its run prepared, its output open."""
    model = save_tiny(kind, folder / "model")
    source = open_checkpoint(folder / "model")
    ready = prepared(source, method, **settings)
    with open_output(folder / "out", ready.source, ready.plan) as output:
        yield model, ready, output


def begun(ready: Prepared, output: Output) -> Work:
    with torch.no_grad():
        work = _begin(ready, output)
        _enter(work, work.entrance)
    return work


def store_rest(ready: Prepared, output: Output) -> None:
    """What lies outside of the blocks."""
    rest = estimate_memory(ready.plan, None, 1)
    quantize(ready.source, ready.plan, output, rest, MemoryWatch(None))


def block_of(work: Work) -> tuple[State, Passes]:
    """The first block."""
    state = State(work, next(iter(work.blueprint.blocks)))
    return state, Passes(work, state, 0)


def steps_of(state: State, passes: Passes) -> list[Step]:
    with torch.no_grad():
        return find_steps(state.live, lambda watch: passes.batch(slice(0, 1), watch=watch))


def last(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]


@pytest.mark.parametrize("kind", SETTINGS)
def test_every_weight_of_every_class_is_reached(kind: str, tmp_path: Path) -> None:
    with opened(kind, tmp_path) as (_, ready, output):
        calibrate(ready, output, MemoryWatch(None))
        planned = {entry.weight.name for entry in ready.plan.entries if entry.weight.scheme}
        assert planned and planned <= output.records.keys()
        missed = {n for n in planned if output.records[n].facts["fallback"] == "no calibration row reached it"}
    assert not missed


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("llama", [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]),
        ("phi3", [{"qkv_proj"}, {"o_proj"}, {"gate_up_proj"}, {"down_proj"}]),
        ("gpt_neox", [{"query_key_value"}, {"dense"}, {"dense_h_to_4h"}, {"dense_4h_to_h"}]),
        ("falcon", [{"query_key_value", "dense_h_to_4h"}, {"dense"}, {"dense_4h_to_h"}]),
        ("gpt2", [{"c_attn"}, {"c_proj"}, {"c_fc"}, {"c_proj"}]),
        ("mixtral", [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate"}, {"w1", "w3"}, {"w2"}]),
    ],
)
def test_sublayers_are_found_in_the_order_of_their_use(kind: str, wanted: list[set[str]], tmp_path: Path) -> None:
    with opened(kind, tmp_path) as (_, ready, output):
        steps = steps_of(*block_of(begun(ready, output)))
    assert [{last(name) for name in step.names} for step in steps] == wanted
    experts = [step for step in steps if step.experts]
    assert [len(step.sites) for step in experts] == ([4, 4] if kind == "mixtral" else [])


@pytest.mark.parametrize("kind", DENSE)
def test_statistics_are_of_what_each_layer_of_the_float_model_reads(kind: str, tmp_path: Path) -> None:
    """Oracle: plain hooks on the modules of the whole model."""
    with opened(kind, tmp_path, dtype="float32") as (model, ready, output), torch.no_grad():
        read: dict[str, list[Tensor]] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                module.register_forward_pre_hook(
                    lambda _, inputs, name=name: read.setdefault(name, []).append(inputs[0].flatten(0, -2))
                )
        model(input_ids=IDS, use_cache=False)
        work = begun(ready, output)
        state, passes = block_of(work)
        sites = {site: Accumulator(["second_moment"], 0, 24) for step in steps_of(state, passes) for site in step.sites}
        Gatherer(work, state, passes).look(work.windows.batches, sites, frozenset())
        fitted = work.windows.fit * IDS.shape[1]
        assert sites
        modules = {id(p): n.rpartition(".")[0] for n, p in model.named_parameters()}
        stored = dict(model.named_parameters())
        for site, accumulator in sites.items():
            seen = accumulator.finish()
            name = next((n for n in stored if n.endswith(site[0].removeprefix("model."))), site[0])
            rows = torch.cat(read[modules[id(stored[name])]])
            torch.testing.assert_close(
                seen.stats["second_moment"], rows[:fitted].T @ rows[:fitted] / fitted, rtol=1e-4, atol=1e-5
            )
            torch.testing.assert_close(seen.held, rows[fitted:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("scheme", "form", "method"),
    [
        ("int4-g8", "compressed-tensors", "gptq"),
        ("nf4-g32-dq", "bitsandbytes", "gptq"),  # with scales as they come out of their own quantization
        ("nf4-g32-dq", "bitsandbytes", "autoround"),
    ],
)
def test_each_block_sees_what_the_quantized_ones_before_produce(
    scheme: str, form: str, method: str, tmp_path: Path
) -> None:
    skip = ("down_proj",) if "g32" in scheme else ()  # of 48 columns
    whole = opened("llama", tmp_path, method, scheme=scheme, form=form, skip=skip, dtype="float32")
    with whole as (model, ready, output), torch.no_grad():
        calibrate(ready, output, MemoryWatch(None))
        store_rest(ready, output)
        output.finish(ready.source)
        written = open_checkpoint(tmp_path / "out")
        for name, parameter in model.named_parameters():
            if planned := written.weights[name].scheme:
                assert str(planned).startswith(scheme)
                parameter.copy_(written.dequantized(name))
        hidden: list[Tensor] = []
        model.model.layers[-1].register_forward_hook(lambda _, inputs, out: hidden.append(out))
        model(input_ids=IDS, use_cache=False)
        found = torch.from_file(
            str(tmp_path / "out/.lowbit/hidden/quantized-2.bin"), size=hidden[0].numel(), dtype=torch.float32
        )
    torch.testing.assert_close(found.view_as(hidden[0]), hidden[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["gptq", "gptaq", "awq+gptq", "autoround"])
def test_on_float_inputs_a_block_does_not_depend_on_those_before(method: str, tmp_path: Path) -> None:
    """Another scheme for the first block changes nothing of the second, which it does where quantized ones are read."""
    save_tiny("llama", tmp_path / "model")
    found: dict[tuple[str, str], list[list[Mapping[str, str]]]] = {}
    for inputs in ("float", "quantized"):
        for first in ("int4-g8", "int2-g8"):
            source = open_checkpoint(tmp_path / "model")
            rules = Rules("int4-g8", method, "compressed-tensors", sets=((r"layers\.0\..*_proj", first),),
                          options={"autoround.iterations": 60} if method == "autoround" else {},
                          calibration=Calibration(("text",), dtype="float32", inputs=inputs))  # fmt: skip
            plan = make_plan(source, rules)
            ready = prepare(as_planned(source, plan), plan, IDS, None, 1)
            with open_output(tmp_path / f"{inputs}-{first}", ready.source, ready.plan) as output, torch.no_grad():
                calibrate(ready, output, MemoryWatch(None))
                for layer in "01":
                    meant = [r.meant for name, r in sorted(output.records.items()) if f"layers.{layer}." in name]
                    found.setdefault((inputs, layer), []).append(meant)
    (one, other), (first_one, first_other) = found["float", "1"], found["float", "0"]
    assert one == other and len(one) >= 7 and first_one != first_other
    if method != "gptaq":  # of which nothing is kept here: on a random model `mse` has less error on held-out rows
        assert found["quantized", "1"][0] != found["quantized", "1"][1]


PRODUCERS = {
    "llama": {
        "q_proj": "input_layernorm", "o_proj": "v_proj", "gate_proj": "post_attention_layernorm",
        "down_proj": "up_proj",
    },
    "gemma2": {
        "q_proj": "input_layernorm", "o_proj": "v_proj", "gate_proj": "pre_feedforward_layernorm",
        "down_proj": "up_proj",
    },
    "opt": {"q_proj": "self_attn_layer_norm", "out_proj": "v_proj", "fc1": "final_layer_norm", "fc2": "fc1"},
    "bloom": {
        "query_key_value": "input_layernorm", "dense": "query_key_value", "dense_h_to_4h": "post_attention_layernorm",
    },
    "falcon": {"query_key_value": "input_layernorm", "dense": "query_key_value"},
    "gpt_neox": {
        "query_key_value": "input_layernorm", "dense": "query_key_value", "dense_h_to_4h": "post_attention_layernorm",
    },
    "gpt2": {"c_attn": "ln_1", "c_fc": "ln_2"},
    "phi3": {
        "qkv_proj": "input_layernorm", "o_proj": "qkv_proj", "gate_up_proj": "post_attention_layernorm",
        "down_proj": "gate_up_proj",
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", PRODUCERS)
def test_what_can_take_a_factor_is_found_and_folding_changes_no_output(kind: str, tmp_path: Path) -> None:
    dice = torch.Generator().manual_seed(0)
    with opened(kind, tmp_path, method="awq", dtype="float32") as (_, ready, output), torch.no_grad():
        state, passes = block_of(begun(ready, output))
        found = {}
        for step in steps_of(state, passes):
            for site in step.sites:
                before, producer = passes.batch(slice(0, 4)), producer_of(site, state, passes)
                if producer is None:
                    continue
                found[last(site[0])] = producer.parameters[0].rpartition(".")[0].rpartition(".")[2]
                where = BlockSite(site, state.width(site), producer.made_of)
                fold(site, producer, where.tied(0.2 + 5 * torch.rand(where.channels, generator=dice)), state)
                gap = (passes.batch(slice(0, 4)) - before).norm() / before.norm()
                assert gap < 1e-5, site
    # fc1 feeds fc2 through a ReLU, which takes positive factors; a GELU does not.
    assert found == PRODUCERS[kind]


@pytest.mark.parametrize("kind", MOE)
def test_a_norm_takes_the_factors_of_all_experts_and_their_router(kind: str, tmp_path: Path) -> None:
    dice = torch.Generator().manual_seed(0)
    with opened(kind, tmp_path, method="awq", dtype="float32") as (_, ready, output), torch.no_grad():
        state, passes = block_of(begun(ready, output))
        (site, names), *others = [
            pair for pair in joined(steps_of(state, passes), state.live).items() if ".experts." in "".join(pair[1])
        ]
        assert {last(name) for name in site} >= {"gate"} and not any(".experts." in name for name in site)
        readers = {name for name in state.live.places if re.search(r"experts\.\d\.(w1|w3|gate_proj|up_proj)", name)}
        assert readers == {name for name in names if ".experts." in name} and len(others) == len(readers) / 2
        before, producer = passes.batch(slice(0, 4)), producer_of(names, state, passes)
        assert producer and producer.parameters == ("post_attention_layernorm.weight",)
        fold(names, producer, 0.2 + 5 * torch.rand(state.width(names), generator=dice), state)
        assert (passes.batch(slice(0, 4)) - before).norm() < 1e-5 * before.norm()


def test_transforms_reach_experts_and_change_their_router_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, ...]] = []

    def twice(site: BlockSite, *_: object) -> Tensor:
        asked.append(tuple(last(name) for name in site.weights))
        return torch.full((site.channels,), 2.0)

    monkeypatch.setattr(awq, "TRANSFORM", replace(awq.TRANSFORM, search=twice))
    with opened("mixtral", tmp_path, method="awq", dtype="float32") as (_, ready, output), torch.no_grad():
        work = begun(ready, output)
        state, passes = block_of(work)
        transform("awq", steps_of(state, passes), work, state, passes, Gatherer(work, state, passes))
        for name in state.floats:
            power = {"post_attention_layernorm": 0.5, "w1": 2.0, "w3": 2.0, "gate": 2.0}.get(last(name))
            assert power is None or torch.equal(state.floats[name], work.source.tensor(name) * power)
    assert {"w1", "w3", "gate", "post_attention_layernorm"} <= {last(name) for name in state.floats}
    assert ("w1", "w3") * 4 in asked, "the router is not quantized, but changed"


def test_values_that_a_group_of_queries_shares_take_one_factor(tmp_path: Path) -> None:
    with opened("llama", tmp_path, method="awq", dtype="float32") as (_, ready, output), torch.no_grad():
        state, passes = block_of(begun(ready, output))
        site = next(s for step in steps_of(state, passes) for s in step.sites if last(s[0]) == "o_proj")
        producer = producer_of(site, state, passes)
    # Four heads of 8 channels read two heads of values: head 1 reads what head 0 does.
    wanted = [8 * (head // 2) + channel for head in range(4) for channel in range(8)]
    assert producer and producer.made_of is not None and producer.made_of.tolist() == wanted
    factors = torch.arange(1.0, 33)
    slow = [
        torch.tensor([f for f, origin in zip(factors, wanted, strict=True) if origin == own]).log().mean().exp()
        for own in wanted
    ]
    torch.testing.assert_close(BlockSite(site, 32, producer.made_of).tied(factors), torch.stack(slow))


def test_no_producer_where_something_else_reads_the_input(tmp_path: Path) -> None:
    """The router reads what the experts read; without it in the fold, the output would change."""
    with opened("mixtral", tmp_path, method="awq", dtype="float32") as (_, ready, output), torch.no_grad():
        state, passes = block_of(begun(ready, output))
        site = next(s for step in steps_of(state, passes) if step.experts for s in step.sites)
        hidden = passes.inputs[:1]
        found = find_producer(
            state.live, site, lambda weights, parameters: passes.batch(slice(0, 1), None, weights, parameters) - hidden
        )
    assert found is None


def test_attention_that_was_kept_is_forgotten_when_values_are_divided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where q, k and v are not quantized, attention is kept when `o_proj` is looked at, which then divides `v_proj`."""
    twice = replace(awq.TRANSFORM, search=lambda site, *_: torch.full((site.channels,), 2.0))
    monkeypatch.setattr(awq, "TRANSFORM", twice)
    with opened("opt", tmp_path, method="awq", dtype="float32") as (_, ready, output), torch.no_grad():
        work = begun(ready, output)
        state, passes = block_of(work)
        state.made = {name for name in state.entries if last(name) in ("q_proj", "k_proj", "v_proj")}
        transform("awq", steps_of(state, passes), work, state, passes, Gatherer(work, state, passes))
        assert any(last(name) == "v_proj" for name in state.floats)
        passes.forward("quantized")
        for batch in work.windows.batches:
            torch.testing.assert_close(work.streams.read("quantized", 1)[batch], passes.batch(batch))


@pytest.mark.parametrize("inputs", ["quantized", "float"])
@pytest.mark.parametrize("kind", MOE)
def test_experts_that_see_few_tokens_get_all(kind: str, inputs: str, tmp_path: Path) -> None:
    with opened(kind, tmp_path, inputs=inputs) as (_, ready, output):
        short = replace(ready, ids=IDS[:2, :8])
        calibrate(short, output, MemoryWatch(None))
        facts = {name: record.facts for name, record in output.records.items() if ".experts." in name}
        named = _starved(output)
    assert named and named == tuple(sorted(named, key=lambda each: (each.block, each.expert)))
    for each in named:
        of = [facts[name]["starved"] for name in facts if name.startswith(f"{each.block}.experts.{each.expert}.")]
        assert of and each.tokens == min(of) < 32
    starved = [each for each in facts.values() if each["starved"] is not None]
    assert starved, "8 tokens over 4 experts are fewer than 32 inputs"
    assert all(each["rows"] == 8 and each["starved"] <= 8 for each in starved)
    assert any(each["starved"] < 8 for each in starved)
    assert all(each["fallback"] != "no calibration row reached it" for each in facts.values())


class _Stop(Exception):
    pass


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("gptq", {}),
        ("awq", {}),
        ("autoround", {"iterations": 3}),
        ("rtn+svdquant+eora", {"svdquant.rank": 2, "eora.budget": 1.5}),
    ],
)
def test_a_run_that_was_stopped_goes_on_and_ends_with_the_same_bytes(
    method: str, options: dict[str, Any], tmp_path: Path
) -> None:
    save_tiny("llama", tmp_path / "model")
    source = open_checkpoint(tmp_path / "model")
    rules = Rules("int4-g8", method, calibration=Calibration(("text",)), options=options)
    ready = prepare(source, make_plan(source, rules), IDS, None, 1)

    def stop(stage: str, done: int, total: int) -> None:
        if done == 1:
            raise _Stop

    for folder, stops in (("whole", False), ("resumed", True)):
        if stops:
            with pytest.raises(_Stop), open_output(tmp_path / folder, source, ready.plan) as output:
                calibrate(ready, output, MemoryWatch(None), stop)
        with open_output(tmp_path / folder, source, ready.plan) as output:
            assert bool(output.resumed) == stops
            calibrate(ready, output, MemoryWatch(None))
            store_rest(ready, output)
            assert all(record.verified for record in output.records.values())
        assert (Terms(tmp_path / folder).finish("base") is not None) == ("eora" in method)
    names = [entry.weight.name for entry in ready.plan.entries if entry.weight.scheme]
    packed = [load_file(next((tmp_path / folder).rglob("model.safetensors*"))) for folder in ("whole", "resumed")]
    assert names
    for name, tensor in packed[0].items():
        assert torch.equal(tensor, packed[1][name]), name
    adapters = [list((tmp_path / folder).glob("adapter/*")) for folder in ("whole", "resumed")]
    for one, other in zip(*map(sorted, adapters), strict=True):
        assert one.read_bytes() == other.read_bytes()


def job(weight: Tensor, method: str, held: Tensor) -> Job:
    entry = Entry(replace_weight(weight), method, "test")
    seen = Seen({}, held, len(held))
    return Job(entry, method, weight, {}, seen, plugin_options(method), 64, weight)


def replace_weight(weight: Tensor) -> Any:
    from lowbit.formats import Weight

    return Weight("w", tuple(weight.shape), torch.float32, parse("int3-g16-f32"))


def plugin_options(method: str) -> Any:
    from lowbit import plugins

    return plugins.load("methods", method).options()


def test_a_method_that_does_worse_on_held_out_rows_is_replaced_and_named() -> None:
    dice = torch.Generator().manual_seed(0)
    weight, held = torch.randn(12, 32, generator=dice) ** 3, torch.randn(64, 32, generator=dice)
    work = job(weight, "rtn", held)
    made = work.choose([work.piece(rows) for rows in work.places()])
    rounded = plugin_rtn(weight)
    wanted = ((held @ (made.qtensor.dequantize() - weight).T) ** 2).sum() / ((held @ (rounded - weight).T) ** 2).sum()
    assert made.facts["method"] == "mse" and made.facts["fallback"] == "less output error on held-out rows"
    assert made.facts["against_rtn"] == pytest.approx(float(wanted), rel=1e-4) and wanted < 1
    kept = job(weight, "mse", held)
    assert kept.choose([kept.piece(rows) for rows in kept.places()]).facts["fallback"] is None


def plugin_rtn(weight: Tensor) -> Tensor:
    from lowbit.methods import NoOptions, rtn

    return rtn.quantize(weight, {}, parse("int3-g16-f32"), NoOptions()).dequantize()


_READS = ("q_proj", "k_proj", "v_proj")
_RECIPES = ["gptq", "awq+gptq", "smoothquant+gptaq+eora", "autoround", "omniquant", "clip", "rtn+eora"]


@pytest.mark.parametrize("method", _RECIPES)
@pytest.mark.parametrize(
    ("value", "reason"), [(0.0, "its inputs are all 0"), (float("nan"), "its inputs are not finite")]
)
def test_inputs_that_teach_nothing_are_named(method: str, value: float, reason: str, tmp_path: Path) -> None:
    """One norm of the second block: of NaN everything is NaN that comes after it."""
    model = save_tiny("llama", tmp_path / "model")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[:] = value
    model.save_pretrained(tmp_path / "model")
    source = open_checkpoint(tmp_path / "model")
    options = {"autoround.iterations": 2} if method == "autoround" else {}
    rules = Rules("int4-g8", method, calibration=Calibration(("text",)), options=options)
    ready = prepare(source, make_plan(source, rules), IDS, None, 1)
    with open_output(tmp_path / "out", source, ready.plan) as output:
        calibrate(ready, output, MemoryWatch(None))
        facts = {name: record.facts for name, record in output.records.items() if record.facts["method"]}
    assert {e.weight.name for e in ready.plan.entries if e.weight.scheme} <= facts.keys()
    named = {name for name, each in facts.items() if each["fallback"] == reason}
    wanted = {name for name in facts if ".layers.1." in name and (last(name) in _READS or value != 0)}
    assert named >= wanted and not any(".layers.0." in name for name in named)
    assert all(facts[name]["method"] == ("rtn" if method == "rtn+eora" else "mse") for name in wanted)
    assert all(each.get("output_error") is None or each["output_error"] >= 0 for each in facts.values())


def test_inputs_of_which_no_square_is_finite_are_named() -> None:
    accumulator = Accumulator(["second_moment", "mean_abs"], 0, 4)
    accumulator.take(torch.full((4, 3), 1e25), None, held=False)
    seen = accumulator.finish()
    assert seen.stats.keys() == {"mean_abs"}
    assert seen.useless == "its inputs are so large that their statistics are not finite"


@pytest.mark.parametrize(("method", "value"), [("gptq", "nan"), ("awq+gptq", "inf"), ("autoround", "-inf")])
def test_a_weight_that_is_not_finite_is_named_with_its_place(method: str, value: str, tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float(value)
    model.save_pretrained(tmp_path / "model")
    ready = prepared(open_checkpoint(tmp_path / "model"), method)
    where = rf"^model.layers.1.mlp.up_proj.weight: {value} at row 3, column 5; repair"
    with open_output(tmp_path / "out", ready.source, ready.plan) as output, pytest.raises(WeightError, match=where):
        calibrate(ready, output, MemoryWatch(None))


def test_a_pass_ends_when_all_its_sites_were_read() -> None:
    first, second = torch.zeros(2, 3), torch.ones(2, 3)
    observer = Observer([("q", "k"), ("o",)], frozenset({"down"}))
    for name, rows in (("q", first), ("other", second), ("k", second)):
        observer(Product((name,), rows, False))
    with pytest.raises(Found):
        observer(Product(("o",), second, False))
    assert observer.rows == {("q", "k"): first, ("o",): second}
    with pytest.raises(Found):
        Observer([("o",)], frozenset({"down"}))(Product(("down",), first, False))


def test_batches_are_taken_in_order_by_workers_that_end_in_another(tmp_path: Path) -> None:
    with opened("llama", tmp_path) as (_, ready, output):
        work = begun(replace(ready, cost=replace(ready.cost, threads=4)), output)
        (_, passes), taken = block_of(work), list[tuple[int, Tensor]]()

        def slowest_first(batch: slice) -> Tensor:
            time.sleep(0.02 * (3 - batch.start % 4))
            return IDS[batch]

        batches = [slice(i, i + 1) for i in range(8)]
        passes.in_turn(slowest_first, batches, lambda batch, found: taken.append((batch.start, found)))
        assert [at for at, _ in taken] == list(range(8)) and torch.equal(torch.cat([found for _, found in taken]), IDS)


def test_a_failure_ends_a_pass(tmp_path: Path) -> None:
    with opened("llama", tmp_path) as (_, ready, output):
        (_, passes), begun_by = block_of(begun(ready, output)), list[int]()

        def fail(batch: slice) -> None:
            begun_by.append(batch.start)
            time.sleep(0.02)
            raise _Stop

        with pytest.raises(_Stop):
            passes.in_turn(fail, [slice(i % 8, i % 8 + 1) for i in range(50)])
        assert len(begun_by) < 10


# In a process of its own: what glibc does with freed memory depends on what was freed before.
_PAGES = """
import torch
from lowbit.budget import anonymous_bytes
from lowbit.stages._pages import kept_pages

def more() -> int:
    held = [torch.ones(1 << 20, dtype=torch.uint8) for _ in range(100)]
    del held
    return (anonymous_bytes() - before) >> 20

before = anonymous_bytes()
with kept_pages():
    print(more())
print((anonymous_bytes() - before) >> 20)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_freed_pages_are_kept_for_a_while_and_then_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", _PAGES], capture_output=True, text=True, check=True)
    inside, after = map(int, done.stdout.split())
    assert inside >= 90 and after <= 10


def learned(folder: Path, scheme: str, **settings: Any) -> tuple[Any, Output]:
    """A tiny model, its run by two steps of signed gradients, done."""
    model = save_tiny("llama", folder / "model")
    source = open_checkpoint(folder / "model")
    rules = Rules(scheme, "autoround", calibration=Calibration(("text",)), options={"iterations": 2}, **settings)
    ready = prepare(source, make_plan(source, rules), IDS, None, 1)
    with open_output(folder / "out", source, ready.plan) as output:
        calibrate(ready, output, MemoryWatch(None))
        store_rest(ready, output)
    return model, output


def test_a_block_whose_error_is_not_a_number_is_named_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_learn, "_output_error", lambda *_: float("nan"))
    _, output = learned(tmp_path, "int4-g8")
    facts = [record.facts for name, record in output.records.items() if name.endswith("proj.weight")]
    assert {each["fallback"] for each in facts} == {"the block's output on held-out windows is not finite"}
    assert {(each["method"], each["against_rtn"]) for each in facts} == {("mse", None)}


@pytest.mark.parametrize(
    ("errors", "method", "reason"),
    [
        ([1.0, 2.0, 3.0, 4.0], "autoround", None),
        (
            [2.0, 1.0, 3.0, 4.0],
            "autoround",
            "its start, before any step, has less error of the block's output on held-out",
        ),
        ([3.0, 2.0, 1.0, 4.0], "rtn", "less error of the block's output on held-out windows"),
        ([2.0, 2.0, 3.0, 1.0], "mse", "less error of the block's output on held-out windows"),
        (
            [float("inf"), 2.0, 3.0, 1.0],
            "mse",
            "what was learned makes the block's output on held-out windows not finite",
        ),
    ],
)
def test_the_least_of_learned_start_and_rivals_is_kept_and_named(
    errors: list[float], method: str, reason: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = itertools.cycle(errors)
    monkeypatch.setattr(_learn, "_output_error", lambda *_: next(told))
    _, output = learned(tmp_path, "int4-g8")
    facts = [record.facts for name, record in output.records.items() if name.endswith("proj.weight")]
    assert facts and {each["method"] for each in facts} == {method}
    assert all((each["fallback"] or "").startswith(reason or "") for each in facts)
    assert all((each["fallback"] is None) == (reason is None) for each in facts)


@pytest.mark.parametrize(("method", "options"), [("autoround", {"lr": 1e30}), ("omniquant", {"lr": 50.0})])
def test_what_is_kept_of_a_block_is_no_worse_on_held_out_windows(
    method: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """Oracle: the block's output with each of the candidates, by hand; the steps are far too long."""
    settings = {f"{method}.{key}": value for key, value in options.items()}
    save_tiny("llama", tmp_path / "model")
    source = open_checkpoint(tmp_path / "model")
    rules = Rules("int3-g8", method, calibration=Calibration(("text",), dtype="float32"), options=settings)
    ready = prepare(source, make_plan(source, rules), IDS, None, 1)
    with open_output(tmp_path / "out", source, ready.plan) as output:
        work = begun(ready, output)
        state, passes = block_of(work)
        passes.forward("float")
        steps = steps_of(state, passes)
        block, learner = passes.view(steps), load("methods", method)
        with torch.enable_grad():
            found = learner.learn(block, work.options(learner, method))
        made, facts = _learn._choose(block, found, work, state, passes)

    def error_of(weights: Mapping[str, QTensor]) -> float:
        decoded = {name: weight.dequantize() for name, weight in weights.items()}
        gap = block.run(work.windows.held, decoded) - block.target(work.windows.held)
        return float(gap.double().square().sum())

    rivals = [
        {name: rival.quantize(weight, {}, block.schemes[name], options) for name, weight in block.weights.items()}
        for rival, options in ((load("methods", "rtn"), NoOptions()), (load("methods", "mse"), MseOptions(steps=20)))
    ]
    least = min(error_of(each) for each in (found.start, *rivals))
    assert error_of(found.weights) > least and facts["fallback"]
    assert error_of(made) <= least * (1 + 1e-9)


def test_one_scale_for_all_inputs_is_found_before_a_block_learns(tmp_path: Path) -> None:
    model, _ = learned(tmp_path, "int8-row", activations="int8-tensor-f32")
    largest: dict[str, float] = {}
    for name, module in model.model.layers[0].named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, name=name: largest.update({name: float(args[0].abs().max())})
            )
    with torch.no_grad():
        model(IDS[:-1])  # the last window judges
    stored = load_file(next((tmp_path / "out").rglob("model.safetensors*")))
    found = {name: stored[f"model.layers.0.{name}.input_scale"].item() for name in largest}
    assert len(found) == 7
    assert found == pytest.approx({name: most / 127.5 for name, most in largest.items()}, rel=1e-5)


def test_a_scale_of_inputs_that_cannot_be_found_is_asked_to_be_left_out(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model")
    with torch.no_grad():
        model.model.layers[0].post_attention_layernorm.weight[3] = float("nan")
    model.save_pretrained(tmp_path / "model")
    source = open_checkpoint(tmp_path / "model")
    rules = Rules("int8", "rtn", activations="int8-tensor", calibration=Calibration(("text",)))
    plan = make_plan(source, rules)
    reason = r"mlp\.gate_proj\.weight: its inputs are not finite, so that no scale .* --skip, or take --activations"
    with open_output(tmp_path / "out", source, plan) as output, pytest.raises(UnsupportedError, match=reason):
        calibrate(prepare(source, plan, IDS, None, 1), output, MemoryWatch(None))


def test_a_limit_that_is_too_small_is_refused_with_the_least_that_works(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    source = open_checkpoint(tmp_path / "model")
    plan = make_plan(source, Rules("int4-g8", "gptq", calibration=Calibration(("text",))))
    with pytest.raises(ResourceError, match="needs at least"):
        prepare(source, plan, IDS, 1 << 20, 1)


def test_a_model_that_fails_on_the_windows_is_one_sentence(tmp_path: Path) -> None:
    """These blocks take multiples of 64 tokens only."""
    config = transformers.BigBirdConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
                                        intermediate_size=48, is_decoder=True, max_position_embeddings=64)  # fmt: skip
    model: Any = transformers.AutoModelForCausalLM
    model.from_config(config).save_pretrained(tmp_path / "model")
    source = open_checkpoint(tmp_path / "model")
    plan = make_plan(source, Rules("int4-g8", "gptq", calibration=Calibration(("text",))))
    ready = prepare(source, plan, IDS, None, 1)
    with (
        open_output(tmp_path / "out", source, plan) as output,
        pytest.raises(CheckpointError, match="multiple of block"),
    ):
        calibrate(ready, output, MemoryWatch(None))


def test_a_method_that_learns_asks_for_text(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    with pytest.raises(UsageError, match="--calibration"):
        make_plan(open_checkpoint(tmp_path / "model"), Rules("int4-g8", "gptq"))


@pytest.mark.parametrize(("kind", "table"), [("opt", True), ("gpt2", True), ("llama", False), ("gpt_neox", False)])
def test_windows_longer_than_the_model_takes_are_refused_or_warned_of(kind: str, table: bool, tmp_path: Path) -> None:
    model = save_tiny(kind, tmp_path / "model")
    most = model.config.max_position_embeddings
    blueprint = open_blueprint(open_checkpoint(tmp_path / "model"), torch.float32)
    assert blueprint.too_long(most) is None
    if table:
        with pytest.raises(UsageError, match=f"max_position_embeddings.*--sequence-length {most} is the most"):
            blueprint.too_long(most + 1)
    else:
        assert f"max_position_embeddings {most}" in (blueprint.too_long(most + 1) or "")
    with torch.no_grad(), pytest.raises(IndexError) if table else contextlib.nullcontext():
        model(torch.zeros(1, most + 1, dtype=torch.int64))
