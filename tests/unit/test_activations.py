"""Quantized activations: how inputs are rounded, how that is declared and found again, and how a model does it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowbit import plugins
from lowbit.errors import FormatError, UnsupportedError
from lowbit.formats import Format, Spec, Weight
from lowbit.formats.compressed_tensors import FORMAT
from lowbit.schemes import parse
from lowbit.stages._activations import input_scale, round_inputs, rounded
from lowbit.stages._model import open_blueprint
from lowbit.stages.checkpoint import open_checkpoint
from tests.reference import activations as slow
from tests.reference.models import save_tiny
from tests.reference.qtensors import random_qtensor

BF16 = torch.bfloat16
MODULE = "model.layers.0.mlp.up_proj"


def inputs(*shape: int) -> Tensor:
    """Some large channels, and a token of zeros."""
    dice = torch.Generator().manual_seed(5)
    x = torch.randn(shape, generator=dice) * (torch.rand(shape[-1], generator=dice) ** 8 * 30 + 0.1)
    x.view(-1, shape[-1])[1] = 0
    return x


SLOW: dict[str, Callable[[Tensor], Tensor]] = {
    "int8-row-f32": slow.int8_token,
    "int8-tensor-f32": lambda x: slow.int8_tensor(x, 0.03125),
    "fp8-e4m3-row": lambda x: slow.fp8_groups(x, 64),
    "fp8-e4m3-g16": lambda x: slow.fp8_groups(x, 16),
    "fp8-e4m3-tensor": lambda x: (x / 0.03125).clamp(-448, 448).to(torch.float8_e4m3fn).double() * 0.03125,
    "nvfp4": lambda x: slow.nvfp4(x, 64.0),
}
GIVEN = {"int8-tensor-f32": 0.03125, "fp8-e4m3-tensor": 0.03125, "nvfp4": 64.0}


@pytest.mark.parametrize("scheme", SLOW)
def test_inputs_are_rounded_as_the_slow_definition_says(scheme: str) -> None:
    x = inputs(3, 7, 64)
    before = x.clone()
    found = rounded(x, parse(scheme), GIVEN.get(scheme))
    assert torch.equal(x, before)
    assert not torch.equal(found, x)
    torch.testing.assert_close(found, SLOW[scheme](x).float(), rtol=1e-6, atol=0)


def test_one_scale_is_found_from_the_inputs_where_none_is_given() -> None:
    x = inputs(4, 5, 64)
    scale = float(x.abs().max() / 127.5)
    torch.testing.assert_close(rounded(x, parse("int8-tensor-f32")), slow.int8_tensor(x, scale).float())
    multiplier = float(448 * 6 / x.abs().max())
    torch.testing.assert_close(rounded(x, parse("nvfp4")), slow.nvfp4(x, multiplier).float())


@pytest.mark.parametrize("scheme", ["int8-row", "int8-row-asym", "fp8-e4m3-g16", "mxfp4", "int8-tensor", "nvfp4"])
def test_many_tokens_are_rounded_as_they_are_alone(scheme: str) -> None:
    """More than fit one run of rows, with the scale of all where there is one."""
    kind, x = parse(scheme), inputs(9000, 64)
    scale = input_scale(4.0, kind)
    whole = rounded(x, kind, scale)
    for row in (0, 1, 4095, 4096, 8999):
        assert torch.equal(whole[row], rounded(x[row], kind, scale))


def test_factors_divide_before_and_multiply_after() -> None:
    x, s = inputs(6, 64), torch.rand(64) + 0.5
    wanted = slow.int8_token(x / s) * s
    torch.testing.assert_close(rounded(x, parse("int8-row-f32"), factors=s), wanted.float())


def test_16_bit_inputs_are_rounded_in_float32_and_once_more() -> None:
    x = inputs(6, 64).to(BF16)
    found = rounded(x, parse("int8-row-f32"))
    assert found.dtype == BF16
    torch.testing.assert_close(found, slow.int8_token(x.float()).to(BF16), rtol=2**-8, atol=0)


def test_gradients_pass_through() -> None:
    x = inputs(6, 64).requires_grad_()
    out = rounded(x, parse("int8-row-f32"))
    assert torch.allclose(out.detach(), rounded(x.detach(), parse("int8-row-f32")), rtol=1e-6, atol=1e-6)
    given = torch.arange(6 * 64.0).reshape(6, 64)
    assert torch.equal(torch.autograd.grad(out, x, given)[0], given)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("scheme", ["int8-row", "fp8-e4m3-tensor", "nvfp4"])
def test_what_is_not_finite_is_not_hidden(scheme: str, value: float) -> None:
    x = inputs(4, 64)
    x[2, 5] = value
    assert rounded(x, parse(scheme), 1.0)[2].isnan().all()


def test_no_tokens() -> None:
    assert rounded(torch.empty(0, 64), parse("int8-row")).shape == (0, 64)
    assert rounded(torch.empty(0, 64), parse("int8-tensor")).shape == (0, 64)


def test_the_stored_scale_covers_the_largest_input() -> None:
    assert input_scale(12.75, parse("int8-tensor-f32")) == pytest.approx(0.1)
    assert input_scale(44.8, parse("fp8-e4m3-tensor")) == pytest.approx(0.1)
    assert input_scale(0.1, parse("int8-tensor-bf16")) == float(torch.tensor(0.1 / 127.5).to(BF16))
    assert input_scale(2.0, parse("nvfp4")) == 448 * 6 / 2
    assert input_scale(0.0, parse("int8-tensor")) == 1
    assert input_scale(12.0, parse("int8-row")) is None


def weight(scheme: str, activations: str | None = None, scale: float | None = None) -> Weight:
    bare = Weight(f"{MODULE}.weight", (64, 128), BF16)
    made = replace(bare, scheme=FORMAT.fit(parse(scheme), bare))
    kind = FORMAT.fit_activations(parse(activations), made) if activations else None
    return replace(made, activations=kind, input_scale=scale)


CASES: dict[tuple[str, str], tuple[str, dict[str, Any], float | None]] = {
    ("int8-row", "int8-row"): ("int-quantized", {"num_bits": 8, "strategy": "token", "dynamic": True}, None),
    ("int8-row", "int8-row-asym"): ("int-quantized", {"strategy": "token", "symmetric": False}, None),
    ("int8-row", "int8-tensor"): ("int-quantized", {"strategy": "tensor", "dynamic": False}, 0.125),
    ("int4-g64", "int8-row"): ("int-quantized", {"num_bits": 8, "strategy": "token", "dynamic": True}, None),
    ("int4-row", "int4-g32"): ("int-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}, None),
    ("int4-g64", "fp8-e4m3-row"): ("pack-quantized", {"num_bits": 8, "type": "float", "strategy": "token"}, None),
    ("int8-g64-asym", "int8-row"): ("int-quantized", {"strategy": "token"}, None),
    ("fp8-e4m3-row", "fp8-e4m3-row"): ("float-quantized", {"type": "float", "strategy": "token"}, None),
    ("fp8-e4m3-tensor", "fp8-e4m3-tensor"): ("float-quantized", {"strategy": "tensor", "dynamic": False}, 0.75),
    ("fp8-e4m3-32x32", "fp8-e4m3-g32"): ("float-quantized", {"strategy": "group", "dynamic": True}, None),
    ("nvfp4", "nvfp4"): (
        "nvfp4-pack-quantized",
        {"strategy": "tensor_group", "dynamic": "local", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"},
        3.1415,
    ),
    ("mxfp4", "mxfp4"): ("mxfp4-pack-quantized", {"group_size": 32, "scale_dtype": "torch.uint8"}, None),
    ("mxfp4", "mxfp8"): ("mxfp4-pack-quantized", {"num_bits": 8, "scale_dtype": "torch.uint8"}, None),
}


def checkpoint(made: Weight) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A declaration and the stored tensors of one weight."""
    assert made.scheme is not None
    into = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in FORMAT.layout(made).items()}
    FORMAT.pack(made, random_qtensor(made.scheme, made.shape), into)
    return json.loads(json.dumps(FORMAT.config([made], {})["config.json"])), into


def recognised(config: dict[str, Any], tensors: dict[str, Tensor]) -> Weight:
    specs = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    found = FORMAT.recognise(config, specs, tensors.__getitem__)
    assert found is not None
    return found[f"{MODULE}.weight"]


@pytest.mark.parametrize("pair", CASES, ids=str)
def test_declared_stored_and_found_again(pair: tuple[str, str]) -> None:
    layout, arguments, scale = CASES[pair]
    stored_scale = None if scale is None else float(torch.tensor(scale)) if pair[1] == "nvfp4" else scale
    made = weight(*pair, stored_scale)
    config, tensors = checkpoint(made)
    group = config["quantization_config"]["config_groups"]["group_0"]
    assert group["format"] == config["quantization_config"]["format"] == layout
    assert arguments.items() <= group["input_activations"].items()
    assert FORMAT.fit_activations(made.activations, made) == made.activations  # type: ignore[arg-type]
    found = recognised(config, tensors)
    assert replace(found, dtype=BF16) == made
    assert made.scheme is not None
    q = random_qtensor(made.scheme, made.shape)
    assert torch.equal(FORMAT.unpack(made, tensors, None).dequantize(), q.dequantize())
    assert set(tensors) <= set(FORMAT.owns(made))


def test_stored_scales_have_the_names_and_dtypes_of_the_layout() -> None:
    assert FORMAT.layout(weight("int8-row", "int8-tensor"))[f"{MODULE}.input_scale"] == Spec(BF16, (1,))
    assert FORMAT.layout(weight("nvfp4", "nvfp4"))[f"{MODULE}.input_global_scale"] == Spec(torch.float32, (1,))
    assert not [name for name in FORMAT.layout(weight("int8-row", "int8-row")) if "input" in name]


def test_weights_of_one_scheme_and_several_activations_are_groups_of_their_own() -> None:
    names = ["a", "b", "c"]
    kinds = ["int8-row", "int8-row", None]
    made = [replace(weight("int8-row", kind), name=f"m.{name}.weight") for name, kind in zip(names, kinds, strict=True)]
    found = FORMAT.config(made, {})["config.json"]["quantization_config"]
    assert [group["targets"] for group in found["config_groups"].values()] == [["m.a", "m.b"], ["m.c"]]
    assert [group["format"] for group in found["config_groups"].values()] == ["int-quantized", "pack-quantized"]


@pytest.mark.parametrize(
    ("scheme", "activations", "reason"),
    [
        ("int8-row", "nvfp4", "in int or fp8-e4m3, not nvfp4"),
        ("fp8-e4m3-row", "int8-row", "in fp8-e4m3, not int8"),
        ("nvfp4", "int8-row", "in nvfp4, not int8"),
        ("int8-row", "nf4", "not nf4"),
        ("int8-row", "int8-tensor-asym", "int8-tensor, symmetric"),
        ("int8-row", "int8-row-fzero", "scale per token"),
        ("int8-row", "int8-4x4", "scale per token"),
        ("int8-row", "int8-g48", "use int8-g32-f32"),
    ],
)
def test_refused_with_a_reason(scheme: str, activations: str, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        weight(scheme, activations)


def test_token_numbers_are_not_rounded() -> None:
    made = replace(weight("int8-row"), name="model.embed_tokens.weight")
    with pytest.raises(UnsupportedError, match="token numbers"):
        FORMAT.fit_activations(parse("int8-row"), made)


ROUNDED = {"fp8": "rounds inputs to fp8", "fbgemm_fp8": "rounds inputs to fp8"}


@pytest.mark.parametrize("name", [name for name in plugins.names("formats") if name != "compressed_tensors"])
def test_formats_that_do_not_declare_such_activations_say_so(name: str) -> None:
    form: Format = plugins.load("formats", name)
    with pytest.raises(UnsupportedError, match=ROUNDED.get(name, "weights alone")):
        form.fit_activations(parse("int8-row"), Weight(f"{MODULE}.weight", (64, 128), BF16, parse("int8-row")))


def test_a_scale_that_is_not_calibrated_or_would_change_is_no_file() -> None:
    for scale, text in [(None, "which calibration finds"), (0.1, "cannot be stored as bfloat16")]:
        with pytest.raises(FormatError, match=text):
            checkpoint(weight("int8-row", "int8-tensor", scale))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"num_bits": 9}, "not read"),
        ({"strategy": "tensor", "dynamic": True}, "not read"),
        ({"strategy": ["token"]}, "not read"),
        ({"type": "float", "num_bits": 4}, "not read"),
        ({"symmetric": False, "strategy": "tensor", "dynamic": False}, "not read"),
        ({"strategy": "group", "group_size": -3}, "not read"),
    ],
)
def test_other_activations_are_named(change: dict[str, Any], text: str) -> None:
    config, tensors = checkpoint(weight("int8-row", "int8-row"))
    group = config["quantization_config"]["config_groups"]["group_0"]
    group["input_activations"] |= change
    with pytest.raises(FormatError, match=text):
        recognised(config, tensors)


def test_quantized_outputs_are_not_read() -> None:
    config, tensors = checkpoint(weight("int8-row", "int8-row"))
    group = config["quantization_config"]["config_groups"]["group_0"]
    group["output_activations"] = group["input_activations"]
    with pytest.raises(FormatError, match="outputs"):
        recognised(config, tensors)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("input_scale", None, "input_scale is missing"),
        ("input_scale", torch.ones(2, dtype=BF16), "not one number"),
        ("input_scale", torch.zeros(1, dtype=BF16), "positive and finite"),
        ("input_scale", torch.tensor([float("nan")], dtype=BF16), "positive and finite"),
        ("input_zero_point", torch.ones(1, dtype=torch.int8), "asymmetric"),
    ],
)
def test_hostile_input_scales(name: str, value: Tensor | None, text: str) -> None:
    config, tensors = checkpoint(weight("int8-row", "int8-tensor", 0.5))
    tensors = {key: tensor for key, tensor in tensors.items() if key != f"{MODULE}.{name}"}
    if value is not None:
        tensors[f"{MODULE}.{name}"] = value
    with pytest.raises(FormatError, match=text):
        recognised(config, tensors)


def test_other_spellings_of_the_same_activations() -> None:
    """Fields that are absent have the package's defaults; others (observers) say nothing of what is computed."""
    config, tensors = checkpoint(weight("int8-row", "int8-row"))
    group = config["quantization_config"]["config_groups"]["group_0"]
    plain = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "observer": "minmax"}
    group["input_activations"] = plain
    assert str(recognised(config, tensors).activations) == "int8-row-f32"


def test_a_zero_point_of_nothing_and_a_scale_without_axes_are_read() -> None:
    config, tensors = checkpoint(weight("int8-row", "int8-tensor", 0.5))
    tensors[f"{MODULE}.input_zero_point"] = torch.zeros(1, dtype=torch.int8)
    tensors[f"{MODULE}.input_scale"] = tensors[f"{MODULE}.input_scale"].reshape(())
    assert recognised(config, tensors).input_scale == 0.5


def two_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))


def test_a_model_rounds_the_inputs_of_the_weights_that_say_so() -> None:
    model, x = two_layers(), inputs(5, 16)
    first = Weight("a", (8, 16), BF16, parse("int8-row"), parse("int8-row-f32"))
    weights = {"a": first, "b": Weight("b", (4, 8), BF16)}
    sources = {"0.weight": frozenset("a"), "0.bias": frozenset[str](), "1.weight": frozenset("b")}
    plain = nn.Sequential(*model.children())(x)
    wanted = model[1](model[0](slow.int8_token(x).float()))  # type: ignore[index]
    round_inputs(model, weights, sources, {})
    found = model(x)
    torch.testing.assert_close(found, wanted)
    assert not torch.allclose(found, plain, rtol=1e-4)


def test_merged_weights_are_rounded_where_they_agree() -> None:
    first = Weight("a", (4, 16), BF16, parse("int8-row"), parse("int8-row-f32"))
    weights = {"a": first, "b": replace(first, name="b"), "c": replace(first, activations=None)}
    model, x = two_layers(), inputs(5, 16)
    wanted = model[0](slow.int8_token(x).float())  # type: ignore[index]
    round_inputs(model, weights, {"0.weight": frozenset("ab")}, {})
    torch.testing.assert_close(model[0](x), wanted)  # type: ignore[index]
    with pytest.raises(UnsupportedError, match=r"0\.weight is made of weights"):
        round_inputs(model, weights, {"0.weight": frozenset("ac")}, {})


def test_each_expert_of_a_stack_rounds_what_it_reads(tmp_path: Path) -> None:
    """Its module reads the tokens of all experts; the last one's inputs stay, tokens are done one by one."""
    experts: Any = save_tiny("mixtral", tmp_path).model.layers[0].mlp.experts
    blueprint, path = open_blueprint(open_checkpoint(tmp_path), torch.float32), "model.layers.0.mlp.experts"
    sources = {name: made_of for name, made_of in blueprint.sources("").items() if name.startswith(path)}
    scheme = parse("int8-row-f32")
    weights = {
        name: replace(weight, activations=None if "experts.3." in name else scheme)
        for name, weight in blueprint.checkpoint.weights.items()
    }
    x, shares = inputs(6, 32).float(), torch.rand(6, 2, generator=torch.Generator().manual_seed(3))
    chosen = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0], [0, 2], [1, 3]])

    def read(values: Tensor, expert: int) -> Tensor:
        return values if expert == 3 else slow.int8_token(values[None])[0].float()

    wanted = torch.zeros(6, 32)
    for token, (row, share) in enumerate(zip(chosen.tolist(), shares.tolist(), strict=True)):
        for expert, part in zip(row, share, strict=True):
            gate, up = (experts.gate_up_proj[expert] @ read(x[token], expert)).chunk(2)
            inner = nn.functional.silu(gate) * up
            wanted[token] += part * (experts.down_proj[expert] @ read(inner, expert))
    model = blueprint.resident()
    round_inputs(model, weights, sources, {})
    found = model.get_submodule(path)(x, chosen, shares)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, experts(x, chosen, shares), rtol=1e-2)


def test_stacked_experts_cannot_be_rounded_from_outside() -> None:
    model = nn.Module()
    model.register_parameter("experts", nn.Parameter(torch.zeros(2, 4, 4)))
    weights = {"a": Weight("a", (4, 4), BF16, parse("int8-row"), parse("int8-row"))}
    with pytest.raises(UnsupportedError, match="experts is made of"):
        round_inputs(model, weights, {"experts": frozenset("a")}, {})
