"""Experts that a checkpoint has in one tensor: taken apart, calibrated one by one, and joined again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lowbit
from lowbit import plugins
from lowbit.budget import MemoryWatch
from lowbit.inspect import inspect
from lowbit.stages._experts import apart, finds, stacks
from lowbit.stages._gather import Gatherer
from lowbit.stages._model import open_blueprint
from lowbit.stages._observe import Accumulator
from lowbit.stages._passes import Passes
from lowbit.stages._products import Product, Products, Region
from lowbit.stages._sites import Step, find_steps, joined
from lowbit.stages._state import Calibration as Work
from lowbit.stages._state import State
from lowbit.stages._transform import fold, producer_of
from lowbit.stages.calibrate import Prepared, _begin, _enter, calibrate, prepare
from lowbit.stages.checkpoint import Checkpoint, open_checkpoint
from lowbit.stages.plan import Calibration, Rules, as_planned, make_plan
from lowbit.stages.quantize import estimate_memory, quantize
from lowbit.stages.rotate import TOLERANCE, prove, rotate
from lowbit.stages.write import Output, open_output
from tests.reference.models import STACKED, save_seeing, save_stacked, save_tiny, save_words

IDS = torch.randint(3, 96, (8, 24), generator=torch.Generator().manual_seed(1))
FORM = "compressed-tensors"
# The rest of the name of what an expert has for gate, up and down.
NAMES = {"granitemoe": ("w1", "w3", "w2")}


def matrices(kind: str, wide: Tensor, down: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Oracle: gate, up and down of each expert, `[outputs, inputs]`, by what the class computes with its parameters."""
    half = down.shape[1] if kind in ("llama4_text", "gpt_oss") else down.shape[2]
    gate = {"gpt_oss": slice(0, None, 2)}.get(kind, slice(0, half))
    up = {"gpt_oss": slice(1, None, 2)}.get(kind, slice(half, None))
    if kind in ("llama4_text", "gpt_oss"):  # x @ wide[e]
        return [(one[:, gate].T, one[:, up].T, low.T) for one, low in zip(wide, down, strict=True)]
    return [(one[gate], one[up], low) for one, low in zip(wide, down, strict=True)]


def parameters(model: nn.Module, layer: int = 0) -> tuple[str, Tensor, Tensor]:
    """Path of a layer's experts in its class, and its two stacks."""
    found = {name: p for name, p in model.named_parameters() if f"layers.{layer}." in name and ".experts." in name}
    wide, down = (next(name for name in found if name.endswith(end)) for end in ("gate_up_proj", "down_proj"))
    return wide.removesuffix(".gate_up_proj"), found[wide].detach(), found[down].detach()


def view(folder: Path) -> Checkpoint:
    return apart(open_checkpoint(folder), FORM)


def of_expert(source: Checkpoint, kind: str, expert: int) -> list[str]:
    """Names of the gate, up and down of one expert of the first layer."""
    ends = [f".experts.{expert}.{part}.weight" for part in NAMES.get(kind, ("gate_proj", "up_proj", "down_proj"))]
    return [next(name for name in source.weights if "layers.0." in name and name.endswith(end)) for end in ends]


@pytest.mark.parametrize("kind", STACKED)
def test_each_expert_is_seen_alone_and_the_class_gets_all_of_them_back(kind: str, tmp_path: Path) -> None:
    """Oracles: the stacks cut by hand, and logits of the class's own loader."""
    model = save_stacked(kind, tmp_path)
    plain, source = open_checkpoint(tmp_path), view(tmp_path)
    for expert, wanted in enumerate(matrices(kind, *parameters(model)[1:])):
        for name, matrix in zip(of_expert(source, kind, expert), wanted, strict=True):
            assert source.weights[name].shape == tuple(matrix.shape) and torch.equal(source.tensor(name), matrix)
    assert source.nbytes == plain.nbytes and len(source.weights) >= len(plain.weights) + 3 * 4 - 2
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    blueprint = open_blueprint(source, torch.float32)
    with torch.inference_mode():
        wanted_logits = loaded.eval()(input_ids=IDS, use_cache=False).logits
        for built in (blueprint.resident(), blueprint.streamed()):
            assert torch.equal(built(input_ids=IDS, use_cache=False).logits, wanted_logits)


def test_biases_of_experts_go_with_their_matrices(tmp_path: Path) -> None:
    model = save_stacked("gpt_oss", tmp_path)
    stored, source = model.state_dict(), view(tmp_path)
    wide, down = (stored[f"model.layers.1.mlp.experts.{name}_proj_bias"] for name in ("gate_up", "down"))
    for expert in range(4):
        name = f"model.layers.1.mlp.experts.{expert}."
        assert torch.equal(source.tensor(f"{name}gate_proj.bias"), wide[expert, ::2])
        assert torch.equal(source.tensor(f"{name}up_proj.bias"), wide[expert, 1::2])
        assert torch.equal(source.tensor(f"{name}down_proj.bias"), down[expert])


def begun(source: Checkpoint, method: str, **settings: Any) -> Prepared:
    plan = make_plan(source, Rules("int4-g8", method, calibration=Calibration(("text",), **settings)))
    return prepare(as_planned(source, plan), plan, IDS, None, 1)


def block_of(ready: Prepared, output: Output) -> tuple[Work, State, Passes, list[Step]]:
    """The first block, and its steps."""
    with torch.no_grad():
        work = _begin(ready, output)
        _enter(work, work.entrance)
        state = State(work, next(iter(work.blueprint.blocks)))
        passes = Passes(work, state, 0)
        return work, state, passes, find_steps(state.live, lambda watch: passes.batch(slice(0, 1), watch=watch))


def rows_of(kind: str, model: Any) -> list[Tensor]:
    """Oracle: what the first layer's experts read, by a hook on the class's own module."""
    seen: list[tuple[Any, ...]] = []
    path, wide, _ = parameters(model)
    model.get_submodule(path).register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((*args, *kwargs.values())), with_kwargs=True
    )
    with torch.no_grad():
        for ids in IDS[:7]:  # the last window judges
            model(input_ids=ids[None], use_cache=False)
    if kind == "llama4_text":  # it hands zeros to the experts that a token does not go to
        parts = [call[0].view(len(wide), -1, call[0].shape[-1]) for call in seen]
        return [torch.cat([part[e][part[e].abs().sum(-1) > 0] for part in parts]) for e in range(len(wide))]
    return [torch.cat([call[0][(call[1] == e).any(-1)] for call in seen]) for e in range(len(wide))]


@pytest.mark.parametrize("kind", STACKED)
def test_each_expert_is_calibrated_on_the_tokens_that_are_sent_to_it(kind: str, tmp_path: Path) -> None:
    """Oracle: a hook on the class's own experts."""
    read = rows_of(kind, save_stacked(kind, tmp_path / "model"))
    ready = begun(view(tmp_path / "model"), "gptq", dtype="float32")
    with open_output(tmp_path / "out", ready.source, ready.plan) as output, torch.no_grad():
        work, state, passes, steps = block_of(ready, output)
        sites = {site: Accumulator(["second_moment"], 0, 24) for step in steps for site in step.sites}
        Gatherer(work, state, passes).look(work.windows.batches, sites, frozenset())
        for expert, rows in enumerate(read):
            gate, up, _ = of_expert(ready.source, kind, expert)
            seen = next(each for site, each in sites.items() if {gate, up} <= set(site)).finish()
            assert seen.rows == len(rows)
            torch.testing.assert_close(seen.stats["second_moment"], rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)


def test_gptq_makes_of_each_expert_what_it_makes_of_that_matrix_alone(tmp_path: Path) -> None:
    kind, gptq = "llama4_text", plugins.load("methods", "gptq")
    read, source = rows_of(kind, save_stacked(kind, tmp_path / "model")), view(tmp_path / "model")
    ready, alike = begun(source, "gptq", dtype="float32", inputs="float"), []
    with open_output(tmp_path / "out", ready.source, ready.plan) as output:
        calibrate(ready, output, MemoryWatch(None))
        quantize(ready.source, ready.plan, output, estimate_memory(ready.plan, None, 1), MemoryWatch(None))
        output.finish(ready.source)
        facts = {name: record.facts for name, record in output.records.items()}
    written = open_checkpoint(tmp_path / "out")
    for expert, rows in enumerate(read):
        for name in of_expert(source, kind, expert)[:2]:
            scheme = written.weights[name].scheme
            stats = gptq.prepare({"second_moment": rows.T @ rows / len(rows)}, scheme, gptq.options())
            wanted = gptq.quantize(source.tensor(name).contiguous(), stats, scheme, gptq.options()).dequantize()
            if facts[name]["method"] == "gptq":
                alike.append(float((written.dequantized(name) == wanted).float().mean()))
    assert len(alike) >= 4 and min(alike) > 0.97, alike  # the two sums of moments differ in their last digits


@pytest.mark.parametrize("kind", ["llama4_text", "gpt_oss", "granitemoe"])
def test_a_norm_takes_the_factors_of_all_experts_and_their_router(kind: str, tmp_path: Path) -> None:
    save_stacked(kind, tmp_path / "model")
    ready = begun(view(tmp_path / "model"), "awq", dtype="float32")
    with open_output(tmp_path / "out", ready.source, ready.plan) as output, torch.no_grad():
        _, state, passes, steps = block_of(ready, output)
        wide = of_expert(ready.source, kind, 2)[0]
        names = next(names for names in joined(steps, state.live).values() if wide in names)
        assert sum(".experts." in name for name in names) == 8
        before, producer = passes.batch(slice(0, 4)), producer_of(names, state, passes)
        assert producer and producer.parameters == ("post_attention_layernorm.weight",)
        fold(names, producer, 0.2 + 5 * torch.rand(state.width(names)), state)
        assert (passes.batch(slice(0, 4)) - before).norm() < 1e-5 * before.norm()


def test_experts_that_see_few_tokens_get_all(tmp_path: Path) -> None:
    save_stacked("llama4_text", tmp_path / "model")
    ready = replace(begun(view(tmp_path / "model"), "gptq"), ids=IDS[:2, :8])
    with open_output(tmp_path / "out", ready.source, ready.plan) as output:
        calibrate(ready, output, MemoryWatch(None))
        facts = {name: record.facts for name, record in output.records.items() if ".experts." in name}
    starved = [each for each in facts.values() if each["starved"] is not None]
    assert starved and all(each["rows"] == 8 and each["starved"] <= 8 for each in starved)
    assert any(each["starved"] < 8 for each in starved)


def test_experts_that_no_token_reaches_get_all_whatever_their_matrices_are_called(tmp_path: Path) -> None:
    """Mixtral's are w1, w2 and w3, of which the numbers say no expert."""
    model = save_tiny("mixtral", tmp_path / "model", num_local_experts=6)
    gates = [p for name, p in model.named_parameters() if name.endswith("gate.weight")]
    assert len(gates[0]) == 6 and model.config.num_experts_per_tok == 2
    with torch.no_grad():  # two of these are positive for every token, and more than the 0 of others
        for gate in gates:
            gate.zero_()[:4] = torch.stack([row for one in torch.randn(2, gate.shape[1]) for row in (one, -one)])
    model.save_pretrained(tmp_path / "model")
    ready = begun(open_checkpoint(tmp_path / "model"), "gptq")
    with open_output(tmp_path / "out", ready.source, ready.plan) as output:
        calibrate(ready, output, MemoryWatch(None))
        facts = {name: record.facts for name, record in output.records.items() if ".experts." in name}
    assert len(facts) == len(gates) * 6 * 3
    assert all(each["rows"] > 0 and each["output_error"] is not None for each in facts.values())
    never = [each for name, each in facts.items() if int(name.split(".experts.")[1].split(".")[0]) > 3]
    assert len(never) == 2 * 3 * len(gates) and all(each["starved"] == 0 for each in never)


def test_a_rotation_turns_experts_that_the_class_has_the_other_way(tmp_path: Path) -> None:
    save_stacked("gpt_oss", tmp_path)
    original = open_blueprint(view(tmp_path), torch.float32)
    turned = rotate(original)
    assert prove(original, turned) < TOLERANCE
    for name in [name for name in original.checkpoint.weights if ".experts.3." in name and "bias" not in name]:
        assert not torch.allclose(original.checkpoint.tensor(name), turned.checkpoint.tensor(name), atol=0.05)


def test_only_tokens_that_are_sent_to_an_expert_count() -> None:
    weight, rows = torch.randn(3, 4, 5), torch.randn(3, 6, 4)
    rows[0, 2:], rows[1] = 0, 0
    seen: dict[str, Tensor] = {}

    def double(product: Product) -> Tensor:
        assert product.swapped  # [inputs, outputs]
        seen[product.names[0]] = product.rows
        return 2 * product.rows

    def add(product: Product, result: Tensor) -> Tensor:
        assert len(result) == len(product.rows)
        return result + 1

    with Products([Region(str(e), weight[e]) for e in range(3)], double, add):
        found = torch.bmm(rows, weight)
    assert {name: len(each) for name, each in seen.items()} == {"0": 2, "2": 6}
    assert torch.equal(seen["0"], rows[0, :2])
    wanted = 2 * torch.einsum("enk,eko->eno", rows, weight) + rows.any(-1, keepdim=True)
    torch.testing.assert_close(found, wanted)


def by_hand(written: Checkpoint, kind: str, model: Any) -> Any:
    """Oracle: the class with what is stored, its stacks made by loops over every element."""
    state = model.state_dict()
    for name in written.weights:
        if ".experts." not in name:
            new = name.replace(".router.layer.", ".router.") if kind == "granitemoe" else name
            state[new].copy_(written.dequantized(name))
    for layer in range(model.config.num_hidden_layers):
        path, wide, down = parameters(model, layer)
        for expert, parts in enumerate(matrices(kind, wide, down)):
            for name, place in zip(of_expert(written, kind, expert), parts, strict=True):
                place.copy_(written.dequantized(name.replace("layers.0.", f"layers.{layer}.")))
            for end in (".gate_proj.bias", ".up_proj.bias", ".down_proj.bias") if kind == "gpt_oss" else ():
                stack = state[f"{path}.down_proj_bias" if "down" in end else f"{path}.gate_up_proj_bias"][expert]
                place = stack if "down" in end else stack["up" in end :: 2]
                place.copy_(written.dequantized(f"{path}.{expert}{end}"))
    return model


@pytest.mark.parametrize("kind", ["gpt_oss", "granitemoe"])
def test_a_result_is_computed_with_whatever_its_readers_are(kind: str, tmp_path: Path) -> None:
    model = save_stacked(kind, tmp_path / "model")
    text = save_words(tmp_path / "model")
    asked: dict[str, Any] = {"calibration": str(text), "samples": 4, "sequence_length": 32}
    asked |= {"evaluate": text, "context": 32}
    if kind == "gpt_oss":
        record = lowbit.quantize(tmp_path / "model", tmp_path / "out", scheme="int4-g8", method="mse")
    else:
        record = lowbit.quantize(tmp_path / "model", tmp_path / "out", scheme="int4-g8", method="gptq", **asked)
        assert record.evaluation is not None
    (note,) = [count for count in record.counts if count.kind == "apart"]
    assert "does not read" in note.reason and note.tensors == (8 if kind == "gpt_oss" else 2)
    written = open_checkpoint(tmp_path / "out")
    layers = model.config.num_hidden_layers
    assert sum(weight.scheme is not None for weight in written.weights.values()) == layers * (4 + 3 * 4)
    with torch.inference_mode():
        wanted = by_hand(written, kind, model)(input_ids=IDS, use_cache=False).logits
        for found in (lowbit.load(tmp_path / "out", reference=True), lowbit.load(tmp_path / "out", exact=True)):
            torch.testing.assert_close(found(input_ids=IDS, use_cache=False).logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama4", "qwen3_5_moe_text"])
def test_transformers_opens_what_it_reads_apart(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    save_seeing(kind, tmp_path / "model") if kind == "llama4" else save_stacked(kind, tmp_path / "model")
    record = lowbit.quantize(tmp_path / "model", tmp_path / "out", scheme="int4-g8", method="mse")
    assert not any(count.kind == "apart" for count in record.counts)
    experts = {
        name
        for name, weight in open_checkpoint(tmp_path / "out").weights.items()
        if ".experts." in name and weight.scheme
    }
    assert len(experts) == 3 * 4
    auto: Any = transformers.AutoModelForImageTextToText if kind == "llama4" else transformers.AutoModelForCausalLM
    model, told = auto.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    with torch.inference_mode():
        wanted = model.eval()(input_ids=IDS, use_cache=False).logits
        found = lowbit.load(tmp_path / "out", reference=True)(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_saved_plan_and_what_is_skipped_keep_stacks_whole(tmp_path: Path) -> None:
    save_stacked("gpt_oss", tmp_path / "model")
    plan = lowbit.make_plan(tmp_path / "model", scheme="int4-g8", method="rtn", skip=["layers.1.*experts"])
    (tmp_path / "plan.json").write_text(plan.to_json())
    lowbit.quantize(tmp_path / "model", tmp_path / "out", plan=tmp_path / "plan.json")
    lowbit.quantize(tmp_path / "model", tmp_path / "again", scheme="int4-g8", method="rtn", skip=["layers.1.*experts"])
    stored, before = load_file(tmp_path / "out/model.safetensors"), load_file(tmp_path / "model/model.safetensors")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()
    kept = {name for name in before if "layers.1.mlp.experts" in name}
    assert len(kept) == 4 and all(torch.equal(stored[name], before[name]) for name in kept)
    assert not any("layers.0.mlp.experts.gate_up" in name for name in stored)
    assert lowbit.load(tmp_path / "out")(input_ids=IDS, use_cache=False).logits.isfinite().all()
    told = inspect(tmp_path / "out", original=tmp_path / "model")
    assert len(told.compared) == 4 + 4 + 3 * 4 and not any("not in the original" in each.fact for each in told.findings)


@pytest.mark.parametrize(
    ("form", "kind", "reason"),
    [
        ("mlx", "granitemoeshared", "readers of this format do not know them apart"),
        ("hqq", "granitemoe", "readers of this format do not know them apart"),
        ("compressed-tensors", "another", "how they lie in it is not known"),
    ],
)
def test_what_is_not_taken_apart_is_kept_with_its_reason(form: str, kind: str, reason: str, tmp_path: Path) -> None:
    save_stacked("granitemoe" if "granitemoe" in kind else "gpt_oss", tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**document, "model_type": kind}))
    source = apart(open_checkpoint(tmp_path), form)
    scheme = {"mlx": "int4-g32-min", "hqq": "int4-g16-asym"}.get(form, "int4-g8")
    entries = make_plan(source, Rules(scheme, "rtn", form)).entries
    stacked = [entry for entry in entries if len(entry.weight.shape) == 3]
    assert len(stacked) in (2, 4) and all(reason in entry.reason and not entry.weight.scheme for entry in stacked)


WIDE, DOWN = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"


@pytest.mark.parametrize(
    "tensors",
    [
        {WIDE: torch.zeros(2, 4, 7)},
        {WIDE: torch.zeros(0, 4, 6)},
        {WIDE: torch.zeros(2, 0, 6)},
        {WIDE: torch.zeros(2, 4, 0)},
        {WIDE: torch.zeros(4, 6)},
        {WIDE: torch.zeros(6)},
        {WIDE: torch.zeros(())},
        {WIDE: torch.zeros(2, 2, 4, 6)},
        {WIDE: torch.zeros(2, 4, 6, dtype=torch.uint8)},
        {WIDE: torch.zeros(5000, 1, 2)},
        {WIDE: torch.zeros(2, 4, 6), WIDE.replace("gate_up_proj", "0.up_proj.weight"): torch.zeros(3, 4)},
        {f"{WIDE}_bias": torch.zeros(2, 4, 6)},
    ],
)
def test_what_is_no_stack_stays_as_it_is(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "gpt_oss"}')
    source = open_checkpoint(tmp_path)
    assert apart(source, FORM) is source


@pytest.mark.parametrize("hidden", [32, "32", 16])
def test_the_length_of_the_hidden_state_tells_how_matrices_lie(hidden: object, tmp_path: Path) -> None:
    """The hub has Qwen3-VL's experts as `[inputs, outputs]`, transformers saves them the other way."""
    wide, down = torch.randn(2, 12, 32), torch.randn(2, 32, 6)
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "qwen3_vl_moe", "text_config": {"hidden_size": hidden}})
    )
    for stored in ({WIDE: wide, DOWN: down}, {WIDE: wide.mT.contiguous(), DOWN: down.mT.contiguous()}):
        save_file(stored, tmp_path / "model.safetensors")
        source = view(tmp_path)
        if hidden != 32:
            assert set(source.weights) == {WIDE, DOWN}
            continue
        for expert, (gate, up, low) in enumerate(matrices("qwen3_vl_moe", wide, down)):
            for part, wanted in (("gate", gate), ("up", up), ("down", low)):
                assert torch.equal(source.tensor(f"model.layers.0.mlp.experts.{expert}.{part}_proj.weight"), wanted)


def test_a_stack_of_a_pytorch_file_that_is_stored_turned(tmp_path: Path) -> None:
    wide = torch.randn(2, 6, 4)
    turned = wide.transpose(1, 2)
    torch.save({WIDE: turned, "a": turned}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text('{"model_type": "gpt_oss"}')
    (tmp_path / "other").mkdir()
    torch.save({WIDE: wide.transpose(1, 2)}, tmp_path / "other/pytorch_model.bin")
    (tmp_path / "other/config.json").write_text('{"model_type": "gpt_oss"}')
    assert WIDE in apart(open_checkpoint(tmp_path), FORM).weights  # its bytes are another tensor's too
    source = view(tmp_path / "other")
    for expert in range(2):
        assert torch.equal(source.tensor(WIDE.replace("gate_up", f"{expert}.up") + ".weight"), wide[expert, 1::2])


def test_experts_that_are_not_all_there_are_not_joined() -> None:
    names = [f"m.experts.{e}.{part}_proj.weight" for e in (0, 1) for part in ("gate", "up")]
    assert set(stacks("gpt_oss", names)) == {"m.experts.gate_up_proj"}
    assert not stacks("gpt_oss", names[:-1]) and not stacks("gpt_oss", names[2:]) and not stacks("llama", names)


def test_a_pattern_that_is_none_skips_nothing() -> None:
    assert not finds(["("])("a(b") and finds(["(", "b$"])("ab")
