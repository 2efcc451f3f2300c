"""What the format `compressed_tensors` refuses, how it declares a model, and how it reads declarations of others."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lowbit.errors import FormatError, UnsupportedError
from lowbit.formats import Spec, Weight
from lowbit.formats.compressed_tensors import FORMAT
from lowbit.schemes import parse
from tests.reference.qtensors import random_qtensor

BF16 = torch.bfloat16
MODULE = "model.layers.0.mlp.up_proj"


def weight(module: str = MODULE, shape: tuple[int, ...] = (64, 128), scheme: str | None = None) -> Weight:
    bare = Weight(f"{module}.weight", shape, BF16)
    return replace(bare, scheme=FORMAT.fit(parse(scheme), bare)) if scheme else bare


@pytest.mark.parametrize(
    ("scheme", "shape", "fitted"),
    [
        ("int4-g128", (64, 256), "int4-g128-bf16"),
        ("int4-g128-f32", (64, 256), "int4-g128-bf16"),
        ("int4-g128", (64, 128), "int4-row-bf16"),
        ("int4-g128", (64, 100), "int4-row-bf16"),
        ("int4-flat64", (3, 128), "int4-g64-bf16"),
        ("int4-flat64", (3, 64), "int4-row-bf16"),
        ("fp8-e4m3-128x128", (3, 200), "fp8-e4m3-128x128-bf16"),
        ("nvfp4", (3, 16), "nvfp4"),
    ],
)
def test_fit_says_how_it_is_stored(scheme: str, shape: tuple[int, int], fitted: str) -> None:
    assert str(FORMAT.fit(parse(scheme), weight(shape=shape))) == fitted


@pytest.mark.parametrize(
    ("scheme", "shape", "reason"),
    [
        ("int4-g128", (64, 172), "use int4-g86-bf16 or int4-row-bf16"),
        ("int4-g16", (64, 17), "use int4-row-bf16"),
        ("mxfp4", (64, 48), r"groups of 32 .* rows of 48"),
        ("nvfp4", (64, 40), r"groups of 16 .* rows of 40"),
        ("int4-flat64", (3, 100), "use g64"),
        ("nf4-g64", (64, 128), "no table of levels"),
        ("levels[-1,0,1]-row", (64, 128), "table of levels"),
        ("fp8-e5m2-row", (64, 128), "use fp8-e4m3"),
        ("int4-g64-fzero", (64, 128), "are integers"),
        ("int4-g64-dq", (64, 128), "leave out dq"),
        ("int4-g64", (2, 64, 128), "--skip"),
        ("int4-g64", (128,), "--skip"),
    ],
)
def test_fit_refuses_with_a_reason(scheme: str, shape: tuple[int, ...], reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        FORMAT.fit(parse(scheme), weight(shape=shape))


def test_fit_refuses_a_matrix_that_is_no_weight_of_a_module() -> None:
    with pytest.raises(UnsupportedError, match="A_log"):
        FORMAT.fit(parse("int4-g64"), Weight("model.layers.0.A_log", (64, 128), BF16))


@pytest.mark.parametrize(
    ("scheme", "layout"),
    [
        ("int8-row", "pack-quantized"),
        ("int8-g64-asym", "pack-quantized"),
        ("int8-tensor", "int-quantized"),
        ("int8-16x16-asym", "int-quantized"),
        ("int4-tensor", "pack-quantized"),
        ("fp8-e4m3-row", "float-quantized"),
        ("mxfp8", "mxfp8-quantized"),
    ],
)
def test_layout_of_each_scheme(scheme: str, layout: str) -> None:
    assert declared([weight(scheme=scheme)])["format"] == layout


def declared(weights: list[Weight]) -> dict[str, Any]:
    found: dict[str, Any] = FORMAT.config(weights, {})["config.json"]["quantization_config"]
    return found


@pytest.mark.parametrize(
    ("scheme", "arguments"),
    [
        ("int3-g32-asym", {"num_bits": 3, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}),
        ("int4-row", {"num_bits": 4, "type": "int", "strategy": "channel"}),
        ("fp8-e4m3-16x24", {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 24]}),
        ("fp8-e4m3-tensor", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
        (
            "nvfp4",
            {"strategy": "tensor_group", "group_size": 16, "type": "float", "scale_dtype": "torch.float8_e4m3fn"},
        ),
        ("mxfp4", {"strategy": "group", "group_size": 32, "type": "float", "scale_dtype": "torch.uint8"}),
    ],
)
def test_declaration(scheme: str, arguments: dict[str, Any]) -> None:
    """Fields and spelling are those of compressed-tensors' `QuantizationConfig`; weights alone are quantized."""
    plain = {"num_bits": 4, "symmetric": True, "group_size": None, "block_structure": None}
    group = declared([weight(scheme=scheme)])["config_groups"].pop("group_0")
    assert group["weights"] == plain | {"dynamic": False, "actorder": None} | arguments
    assert group["input_activations"] is group["output_activations"] is None


def test_declared_status_tells_readers_to_make_room_for_codes() -> None:
    found = declared([weight(scheme="int4-g64")])
    assert (found["quant_method"], found["quantization_status"]) == ("compressed-tensors", "compressed")


def test_one_scheme_is_declared_by_class() -> None:
    kept = [weight(name) for name in ("lm_head", "model.embed_tokens", "model.layers.0.mlp.gate", "score.embed_out")]
    norm = Weight("model.norm.weight", (64,), BF16)
    found = declared([weight(scheme="int4-g64"), *kept, norm])
    assert found["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert found["ignore"] == ["lm_head", "model.layers.0.mlp.gate", "score.embed_out"]


def test_a_tied_head_is_ignored_though_it_has_no_tensor() -> None:
    """The class `Linear` covers it: a reader would look for its codes."""
    assert declared([weight("model.embed_tokens"), weight(scheme="int4-g64")])["ignore"] == ["lm_head"]


def test_quantized_embeddings_are_named() -> None:
    found = declared([weight("transformer.wte", scheme="int8-row"), weight("lm_head", scheme="int8-row")])
    assert found["config_groups"]["group_0"]["targets"] == ["Linear", "transformer.wte"]
    assert found["ignore"] == []


def test_groups_have_no_class_and_no_overlap() -> None:
    layers = [weight(f"model.layers.{i}.mlp+x.up_proj", scheme="int4-g64") for i in range(3)]
    others = [weight(f"model.layers.{i}.mlp.down_proj", scheme="int4-g32" if i else "int4-g64") for i in range(3)]
    gates = [weight(f"model.layers.{i}.mlp.gate") for i in range(3)]
    found = declared([*layers, *others, *gates])
    assert found["format"] == "pack-quantized"
    assert [group["targets"] for group in found["config_groups"].values()] == [
        [r"re:model\.layers\.\d+\.mlp\+x\.up_proj$", "model.layers.0.mlp.down_proj"],
        ["model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj"],
    ]
    assert found["ignore"] == [w.module for w in gates] + ["lm_head"]


def checkpoint(scheme: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A declaration and the stored tensors of one weight."""
    made = weight(scheme=scheme)
    assert made.scheme is not None
    into = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in FORMAT.layout(made).items()}
    q = random_qtensor(made.scheme, made.shape)
    FORMAT.pack(made, q, into)
    return FORMAT.config([made], {"torch_dtype": "float16"})["config.json"], into


def recognised(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Weight] | None:
    specs = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return FORMAT.recognise(json.loads(json.dumps(config)), specs, tensors.__getitem__)


def test_exact_names_win_over_patterns_and_these_over_classes() -> None:
    config, tensors = checkpoint("int4-g64")
    group = config["quantization_config"]["config_groups"]["group_0"]
    other = group | {"weights": group["weights"] | {"group_size": 32}}
    for mine, wrong in [(MODULE, "re:.*up_proj"), ("re:model.*up", "Linear"), ("Linear", "lm_head")]:
        groups = {"a": other | {"targets": [wrong]}, "b": group | {"targets": [mine]}}
        found = recognised({"quantization_config": config["quantization_config"] | {"config_groups": groups}}, tensors)
        assert found is not None and str(found[f"{MODULE}.weight"].scheme) == "int4-g64-bf16"


def test_dtype_is_that_of_the_scales_or_of_the_model() -> None:
    for scheme, dtype in [("int4-g64", BF16), ("mxfp4", torch.float16), ("nvfp4", torch.float16)]:
        found = recognised(*checkpoint(scheme))
        assert found is not None and found[f"{MODULE}.weight"].dtype == dtype


def test_other_shapes_of_the_same_scales_are_read() -> None:
    """transformers saves a single scale as [1, 1]; early checkpoints have it without axes."""
    for shape in [(1, 1), ()]:
        _, tensors = checkpoint("fp8-e4m3-tensor")
        found = weight(scheme="fp8-e4m3-tensor")
        wanted = FORMAT.unpack(found, tensors, None).dequantize()
        tensors[f"{MODULE}.weight_scale"] = tensors[f"{MODULE}.weight_scale"].reshape(shape)
        assert torch.equal(FORMAT.unpack(found, tensors, None).dequantize(), wanted)


DAMAGE: list[tuple[str, dict[str, Any], str]] = [
    ("int4-g64", {"config_groups": None}, "no config_groups"),
    ("int4-g64", {"config_groups": {"a": None}}, "no list of targets"),
    ("int4-g64", {"config_groups": {"a": {"targets": "Linear"}}}, "no list of targets"),
    ("int4-g64", {"config_groups": {"a": {"targets": ["Linear"], "weights": None}}}, "nothing of its weights"),
    ("int4-g64", {"config_groups": {"a": {"targets": ["lm_head"], "weights": {}}}}, "no group"),
    ("int4-g64", {"config_groups": {"a": {"targets": ["re:("], "weights": {}}}}, "no regular expression"),
    ("int4-g64", {"config_groups": {"a": {"targets": ["Linear"], "weights": {}, "format": "marlin-24"}}}, "marlin-24"),
    ("int4-g64", {"ignore": [MODULE]}, "ignore"),
    ("int4-g64", {"ignore": 3}, "ignore is no list"),
    ("int4-g64", {"transform_config": {"config_groups": {}}}, "rotated"),
    ("int4-g64", {"weights": {"num_bits": 9}}, "9-bit int"),
    ("int4-g64", {"weights": {"num_bits": [4]}}, "not read"),
    ("int4-g64", {"weights": {"type": {}}}, "not read"),
    ("int4-g64", {"weights": {"strategy": "token"}}, "strategy 'token'"),
    ("int4-g64", {"weights": {"group_size": 0}}, "group_size 0"),
    ("int4-g64", {"weights": {"strategy": "block", "block_structure": [0, 4]}}, "block_structure"),
    ("int4-g64", {"weights": {"num_bits": 3}}, "weight_shape says"),
    ("nvfp4", {"weights": {"symmetric": False}}, "not read"),
    ("fp8-e4m3-row", {"weights": {"symmetric": False}}, "not read"),
    ("nvfp4", {"weights": {"group_size": 32}}, "not read"),
]


@pytest.mark.parametrize(("scheme", "change", "text"), DAMAGE)
def test_hostile_declarations(scheme: str, change: dict[str, Any], text: str) -> None:
    config, tensors = checkpoint(scheme)
    found = config["quantization_config"]
    if "weights" in change:
        found["config_groups"]["group_0"]["weights"] |= change["weights"]
    else:
        found |= change
    with pytest.raises(FormatError, match=text):
        recognised(config, tensors)


@pytest.mark.parametrize(
    ("scheme", "name", "value", "text"),
    [
        ("int4-g64", "weight_scale", None, "weight_scale is missing"),
        ("int4-g64", "weight_packed", None, "weight_packed is missing, not a matrix"),
        ("int4-g64", "weight_packed", torch.zeros((2, 64, 16), dtype=torch.int32), r"\[2, 64, 16\], not a matrix"),
        ("int4-g64", "weight_packed", torch.zeros((64, 0), dtype=torch.int32), r"words \[64, 0\] cannot be"),
        ("int4-g64", "weight_shape", None, "weight_shape is missing"),
        ("int4-g64", "weight_shape", torch.tensor([64.0, 128.0]), "no pair of integers"),
        ("int4-g64", "weight_global_scale", torch.ones(1), "and a global scale, which is not read"),
        ("nvfp4", "weight_packed", torch.zeros((64, 4), dtype=torch.uint8), "rows of 8 values, nvfp4 needs a multiple"),
    ],
)
def test_hostile_stored_tensors(scheme: str, name: str, value: Tensor | None, text: str) -> None:
    """What contradicts the declaration is found before any weight is read."""
    config, tensors = checkpoint(scheme)
    tensors = {key: tensor for key, tensor in tensors.items() if key != f"{MODULE}.{name}"}
    if value is not None:
        tensors[f"{MODULE}.{name}"] = value
    with pytest.raises(FormatError, match=text):
        recognised(config, tensors)


def test_hostile_weight_shape_of_nothing() -> None:
    config, tensors = checkpoint("int4-g64")
    tensors[f"{MODULE}.weight_packed"] = torch.zeros((64, 0), dtype=torch.int32)
    tensors[f"{MODULE}.weight_shape"] = torch.tensor([64, -1])
    with pytest.raises(FormatError, match=r"says \[64, -1\]"):
        recognised(config, tensors)


@pytest.mark.parametrize("value", [[64, -1], [2**62, 128], [64, 129], [128, 64], [0, 0]])
def test_hostile_weight_shape(value: list[int]) -> None:
    config, tensors = checkpoint("int4-g64")
    tensors[f"{MODULE}.weight_shape"] = torch.tensor(value)
    with pytest.raises(FormatError, match=rf"{MODULE}.weight_shape says"):
        recognised(config, tensors)
    with pytest.raises(FormatError, match=rf"{MODULE}\.weight_shape says"):
        FORMAT.unpack(weight(scheme="int4-g64"), tensors, None)


@pytest.mark.parametrize(
    ("scheme", "name", "value", "text"),
    [
        ("int4-g64", "weight_scale", float("nan"), r"weight_scale holds nan at \[0, 0\]"),
        ("nvfp4", "weight_global_scale", 0.0, r"weight_global_scale \(its reciprocal\) holds inf at \[0\]"),
        ("nvfp4", "weight_global_scale", float("inf"), "weight_global_scale holds inf"),
        ("nvfp4", "weight_scale", float("nan"), r"weight_scale holds NaN at \[0, 0\]"),
        ("fp8-e4m3-row", "weight", float("nan"), r"weight holds NaN at \[0, 0\]"),
        ("mxfp8", "weight_scale", 255, "weight_scale holds code 255 at element 0"),
    ],
)
def test_hostile_values(scheme: str, name: str, value: float, text: str) -> None:
    _, tensors = checkpoint(scheme)
    tensors[f"{MODULE}.{name}"].view(-1)[:1].copy_(torch.tensor(value))
    with pytest.raises(FormatError, match=rf"{MODULE}\..*{text}"):
        FORMAT.unpack(weight(scheme=scheme), tensors, None)


def test_codes_out_of_range_in_plain_integers() -> None:
    found = Weight(f"{MODULE}.weight", (1, 4), BF16, parse("int4-row-bf16"))
    tensors = {f"{MODULE}.weight": torch.tensor([[7, -8, 8, 0]], dtype=torch.int8)}
    tensors[f"{MODULE}.weight_scale"] = torch.ones((1, 1), dtype=BF16)
    with pytest.raises(FormatError, match="weight holds code 16 at element 2, codes end at 15"):
        FORMAT.unpack(found, tensors, None)


def test_zero_points_out_of_range_in_plain_integers() -> None:
    found = Weight(f"{MODULE}.weight", (1, 4), BF16, parse("int4-row-asym-bf16"))
    tensors = {f"{MODULE}.weight": torch.zeros((1, 4), dtype=torch.int8)}
    tensors[f"{MODULE}.weight_scale"] = torch.ones((1, 1), dtype=BF16)
    tensors[f"{MODULE}.weight_zero_point"] = torch.tensor([[-9]], dtype=torch.int8)
    with pytest.raises(FormatError, match="weight_zero_point holds code 255 at element 0"):
        FORMAT.unpack(found, tensors, None)


@pytest.mark.parametrize("group", [-1, 2])
def test_hostile_group_index(group: int) -> None:
    _, tensors = checkpoint("int4-g64")
    index = torch.zeros(128, dtype=torch.int32)
    index[5] = group
    with pytest.raises(FormatError, match="weight_g_idx names a group"):
        FORMAT.unpack(weight(scheme="int4-g64"), {**tensors, f"{MODULE}.weight_g_idx": index}, None)


def test_pack_refuses_another_tensor_than_planned() -> None:
    made = weight(scheme="int4-row")
    for scheme, shape in [("int4-g64-bf16", made.shape), ("int4-row-bf16", (32, 128))]:
        with pytest.raises(FormatError, match="was planned"):
            FORMAT.pack(made, random_qtensor(parse(scheme), shape), {})


def test_pack_refuses_values_that_would_change() -> None:
    for scheme, scales, text in [
        ("int4-row", torch.full((64, 1), 0.1), "0.100000001 cannot be stored as bfloat16"),
        ("mxfp4", torch.full((64, 4), 0.75), "0.75 is no power of two"),
        ("mxfp4", torch.full((64, 4), 2.0**-128), "no power of two between"),
    ]:
        made = weight(scheme=scheme)
        assert made.scheme is not None
        q = replace(random_qtensor(made.scheme, made.shape), scales=scales)
        into = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in FORMAT.layout(made).items()}
        with pytest.raises(FormatError, match=rf"{MODULE}\..*{text}"):
            FORMAT.pack(made, q, into)


def test_pack_refuses_a_global_scale_that_has_no_reciprocal() -> None:
    """About a sixth of all float32 are the reciprocal of none."""
    made = weight(scheme="nvfp4")
    assert made.scheme is not None
    q = random_qtensor(made.scheme, made.shape)
    assert not isinstance(q.scales, Tensor)
    into = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in FORMAT.layout(made).items()}
    outer = torch.linspace(1.5, 1.5001, 100)
    orphan = outer[1 / (1 / outer) != outer][0]
    with pytest.raises(FormatError, match="reciprocal of no float32"):
        FORMAT.pack(made, replace(q, scales=replace(q.scales, scales=orphan.reshape(1, 1))), into)
    FORMAT.pack(made, replace(q, scales=replace(q.scales, scales=(1 / (1 / orphan)).reshape(1, 1))), into)
