"""The format `compressed_tensors` against the `compressed-tensors` package and `transformers`, both ways."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lowbit
from lowbit.errors import UnsupportedError
from lowbit.formats import Spec, Weight
from lowbit.formats.compressed_tensors import FORMAT
from lowbit.schemes import parse
from lowbit.tensors import QTensor
from tests.reference.models import save_words
from tests.reference.qtensors import random_qtensor

transformers = pytest.importorskip("transformers")
compressors = pytest.importorskip("compressed_tensors.compressors")
quantization = pytest.importorskip("compressed_tensors.quantization")

BITS = range(1, 9)
INTEGERS = [f"int{bits}-{block}{asym}" for bits in BITS for block in ("row", "g32") for asym in ("", "-asym")]
BLOCKS = [f"int{bits}-{block}{asym}" for bits in (3, 4, 8) for block in ("tensor", "20x24") for asym in ("", "-asym")]
FLOATS = [f"fp8-e4m3-{block}" for block in ("tensor", "row", "g32", "20x24", "128x128")]
SCHEMES = [*INTEGERS, *BLOCKS, *FLOATS, "mxfp4", "mxfp8", "nvfp4"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NAME = "model.layers.0.mlp.up_proj.weight"


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def power_of_two(q: QTensor) -> QTensor:
    """With a global scale that is a power of two, division by its reciprocal and multiplication agree to the bit."""
    if not isinstance(q.scales, QTensor):
        return q
    return replace(q, scales=replace(q.scales, scales=torch.full((1, 1), 2.0**-9)))


def stored(weight: Weight, q: QTensor) -> dict[str, Tensor]:
    into = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in FORMAT.layout(weight).items()}
    FORMAT.pack(weight, q, into)
    return into


def theirs(weight: Weight, tensors: dict[str, Tensor]) -> Tensor:
    """What the package's own decompression makes of a weight, under the configuration that we write."""
    declared = FORMAT.config([weight], {})["config.json"]["quantization_config"]
    scheme = quantization.QuantizationConfig.model_validate(declared).config_groups["group_0"]
    compressor = compressors.BaseCompressor.get_value_from_registry(scheme.format)
    local = {name.removeprefix(f"{weight.module}."): tensor for name, tensor in tensors.items()}
    found: Tensor = compressor.decompress(local, scheme)["weight"]
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_decompresses_to_the_same_bits(scheme: str, dtype: torch.dtype) -> None:
    for shape in [(1, 32), (37, 96), (64, 160)]:
        weight = Weight(NAME, shape, dtype)
        weight = replace(weight, scheme=FORMAT.fit(parse(scheme), weight))
        assert weight.scheme is not None
        q = power_of_two(random_qtensor(weight.scheme, shape))
        found = theirs(weight, stored(weight, q))
        assert found.dtype == (torch.bfloat16 if scheme in ("mxfp4", "mxfp8", "nvfp4") else dtype)
        assert torch.equal(bits_of(found), bits_of(q.dequantize(found.dtype)))


@pytest.mark.parametrize("bits", BITS)
def test_odd_widths_decompress_to_the_same_bits(bits: int) -> None:
    for cols in (1, 7, 31, 33, 129):
        for scheme in (f"int{bits}-row", f"int{bits}-row-asym"):
            weight = Weight(NAME, (5, cols), torch.float32, parse(f"{scheme}-f32"))
            assert weight.scheme is not None
            q = random_qtensor(weight.scheme, weight.shape)
            assert torch.equal(bits_of(theirs(weight, stored(weight, q))), bits_of(q.dequantize()))


def test_nvfp4_with_any_global_scale_is_one_bfloat16_step_off_at_most() -> None:
    """The package divides scales by the stored divisor; we multiply by its reciprocal, in float32 as well."""
    weight = Weight(NAME, (64, 512), torch.bfloat16, parse("nvfp4"))
    assert weight.scheme is not None
    steps = []
    for seed in range(8):
        q = random_qtensor(weight.scheme, weight.shape, seed)
        left, right = theirs(weight, stored(weight, q)), q.dequantize(torch.bfloat16)
        steps.append((left.view(torch.int16).int() - right.view(torch.int16).int()).abs())
    assert torch.stack(steps).max() <= 1
    assert torch.stack(steps).float().mean() < 1e-3


def test_refuses_what_the_package_refuses() -> None:
    """A shorter last group is no choice of ours: the package's decompression raises on it."""
    weight = Weight(NAME, (8, 40), torch.bfloat16)
    with pytest.raises(UnsupportedError, match=r"int4-g20-bf16 or int4-row-bf16"):
        FORMAT.fit(parse("int4-g32"), weight)
    weight = replace(weight, scheme=parse("int4-g32-bf16"))
    assert weight.scheme is not None
    with pytest.raises(ValueError, match="divisble"):
        theirs(weight, stored(weight, random_qtensor(weight.scheme, weight.shape)))


def tiny_config() -> Any:
    return transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        dtype="bfloat16",
    )


def tiny_model() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(tiny_config()).to(torch.bfloat16)


def write(path: Path, schemes: dict[str, str]) -> dict[str, QTensor]:
    """A tiny Llama whose modules with a name that contains a key are quantized so; returns what was meant."""
    model, tensors, weights, meant = tiny_model(), {}, [], {}
    for seed, (name, value) in enumerate(model.state_dict().items()):
        weight = Weight(name, tuple(value.shape), torch.bfloat16)
        chosen = next((scheme for key, scheme in schemes.items() if key in name), None)
        if chosen is None:
            tensors[name] = value.clone()
        else:
            weight = replace(weight, scheme=FORMAT.fit(parse(chosen), weight))
            assert weight.scheme is not None
            meant[name] = power_of_two(random_qtensor(weight.scheme, weight.shape, seed))
            tensors |= stored(weight, meant[name])
        weights.append(weight)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    document = FORMAT.config(weights, model.config.to_dict())["config.json"]
    (path / "config.json").write_text(json.dumps(document))
    return meant


def loaded(path: Path, dequantize: bool = False) -> dict[str, Tensor]:
    """Weights as `transformers` opens them, after a forward pass, which decompresses what is packed still."""
    settings = transformers.CompressedTensorsConfig(dequantize=True) if dequantize else None
    options = {"quantization_config": settings} if dequantize else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(path, **options)
    with torch.no_grad():
        logits = model(torch.arange(16)[None]).logits
    assert logits.shape == (1, 16, 128)
    assert logits.isfinite().all()
    state: dict[str, Tensor] = model.state_dict()
    return state


# compressed-tensors 0.20 cannot make the empty module into which packed zero points are loaded, so that
# `transformers` opens asymmetric checkpoints with `dequantize=True` only (docs/formats/compressed-tensors.md).
LOADED = ["int4-g32", "int3-row", "int8-row", "int4-tensor", "int8-tensor-asym", "int8-20x24", "fp8-e4m3-tensor"]
LOADED += ["fp8-e4m3-row", "fp8-e4m3-20x24", "mxfp4", "mxfp8", "nvfp4"]
DEQUANTIZED = ["int4-g32-asym", "int5-row-asym"]


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize("scheme", LOADED + DEQUANTIZED)
def test_transformers_loads_the_same_weights(scheme: str, tmp_path: Path) -> None:
    meant = write(tmp_path, {"proj": scheme})
    found = loaded(tmp_path, dequantize=scheme in DEQUANTIZED)
    assert len(meant) == 14
    for name, q in meant.items():
        assert torch.equal(bits_of(found[name]), bits_of(q.dequantize(torch.bfloat16))), name


def test_transformers_loads_several_schemes_in_one_model(tmp_path: Path) -> None:
    """Groups of their own layout each; one layer, and one projection of another, kept out of a pattern's reach."""
    schemes = {
        "0.self_attn.q_proj": "int8-row",
        "1.mlp.down_proj": "int3-g32",
        "o_proj": "fp8-e4m3-row",
        "k_proj": "mxfp4",
        "mlp": "int4-g32",
        "lm_head": "int6-row",
    }
    meant = write(tmp_path, schemes)
    declared = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert declared["format"] == "mixed-precision"
    targets = [target for group in declared["config_groups"].values() for target in group["targets"]]
    assert r"re:model\.layers\.\d+\.mlp\.gate_proj$" in targets
    assert {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "lm_head"} <= set(targets)
    found = loaded(tmp_path)
    for name, value in tiny_model().state_dict().items():
        wanted = meant[name].dequantize(torch.bfloat16) if name in meant else value
        assert torch.equal(bits_of(found[name]), bits_of(wanted)), name


ARGUMENTS: dict[str, tuple[dict[str, Any], str | None]] = {
    "int4-g32-bf16": ({"num_bits": 4, "strategy": "group", "group_size": 32}, None),
    "int3-g32-asym-bf16": ({"num_bits": 3, "strategy": "group", "group_size": 32, "symmetric": False}, None),
    "int7-row-asym-bf16": ({"num_bits": 7, "strategy": "channel", "symmetric": False}, None),
    "int8-row-bf16": ({"num_bits": 8, "strategy": "channel"}, "int-quantized"),
    "int4-g32-asym-bf16": ({"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}, "int-quantized"),
    "int5-tensor-asym-bf16": ({"num_bits": 5, "strategy": "tensor", "symmetric": False}, None),
    "fp8-e4m3-tensor-bf16": ({"num_bits": 8, "type": "float", "strategy": "tensor"}, None),
    "fp8-e4m3-row-bf16": ({"num_bits": 8, "type": "float", "strategy": "channel"}, "float-quantized"),
    "fp8-e4m3-32x32-bf16": ({"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 32]}, None),
    "nvfp4": ({"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}, None),
    "mxfp4": ({"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}, None),
    "mxfp8": (
        {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
        None,
    ),
}


def compressed_by_the_package(path: Path, arguments: dict[str, Any], layout: str | None) -> dict[str, Tensor]:
    """A tiny Llama, quantized and saved by compressed-tensors itself; returns the weights that it decompresses to."""
    model = tiny_model()
    group = quantization.QuantizationScheme(
        targets=["Linear"], weights=quantization.QuantizationArgs(**arguments), format=layout
    )
    quantization.apply_quantization_config(
        model, quantization.QuantizationConfig(config_groups={"group_0": group}, ignore=["lm_head"])
    )
    dice = torch.Generator().manual_seed(1)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            scale, half = module.weight_scale.data, 2 ** (arguments["num_bits"] - 1)
            scale.copy_(2.0 ** torch.randint(-9, -3, scale.shape, generator=dice))
            if arguments.get("symmetric") is False:
                module.weight_zero_point.data.copy_(torch.randint(-half, half, scale.shape, generator=dice))
            if hasattr(module, "weight_global_scale"):
                module.weight_global_scale.data.fill_(8.0)
    compressor = compressors.ModelCompressor.from_pretrained_model(model, layout)
    compressor.compress_model(model)
    model.save_pretrained(path)
    compressor.update_config(str(path))
    compressor.decompress_model(model)
    return {name: value for name, value in model.state_dict().items() if name.endswith("proj.weight")}


@pytest.mark.parametrize("scheme", ARGUMENTS)
def test_reads_what_the_package_writes(scheme: str, tmp_path: Path) -> None:
    expected = compressed_by_the_package(tmp_path, *ARGUMENTS[scheme])
    tensors = load_file(tmp_path / "model.safetensors")
    specs = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    config = json.loads((tmp_path / "config.json").read_text())
    found = FORMAT.recognise(config, specs, tensors.__getitem__)
    assert found is not None and found.keys() == expected.keys()
    for name, weight in found.items():
        assert str(weight.scheme) == scheme
        assert weight.dtype == torch.bfloat16
        q = FORMAT.unpack(weight, {key: tensors[key] for key in FORMAT.owns(weight) if key in tensors}, None)
        assert torch.equal(bits_of(q.dequantize(torch.bfloat16)), bits_of(expected[name])), name
    owned = {key for weight in found.values() for key in FORMAT.owns(weight)}
    assert not [key for key in tensors if "proj" in key and key not in owned]


_TEXT: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 96, "pad_token_id": 0,
}  # fmt: skip
_SIGHT: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48}
_SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 4]}


def seeing(kind: str) -> Any:
    """The configuration of a tiny model that reads images too."""
    known: Any = transformers.CONFIG_MAPPING
    if kind == "llava":
        sight = known["clip_vision_model"](
            **_SIGHT, num_hidden_layers=1, num_attention_heads=4, image_size=28, patch_size=14
        )
        return known[kind](text_config=known["llama"](**_TEXT), vision_config=sight, image_token_index=90)
    sight = {**_SIGHT, "depth": 1, "num_heads": 4, "out_hidden_size": 64, "fullatt_block_indexes": [0]}
    tokens = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    return known[kind](text_config={**_TEXT, "rope_parameters": _SECTIONS}, vision_config=sight, **tokens)


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
def test_models_that_see_too_are_calibrated_on_text_and_opened_by_transformers(kind: str, tmp_path: Path) -> None:
    """Their parts have other names in the file than in the class, where the configuration must find them too."""
    torch.manual_seed(0)
    auto: Any = transformers.AutoModelForImageTextToText
    auto.from_config(seeing(kind)).save_pretrained(tmp_path / "model")
    words = save_words(tmp_path / "model")
    lowbit.quantize(
        tmp_path / "model", tmp_path / "out", scheme="int4-g16", method="gptq", calibration=str(words), samples=4,
        sequence_length=16, sets={"o_proj|vis.*(fc1|down_proj).weight": "int8-g16"}, skip=[r"layers\.1\.mlp\.up_proj"],
    )  # fmt: skip
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
    methods = {row["name"]: row["method"] for row in rows if row["scheme"]}
    assert len(methods) == 14  # that of the other tower's layer, which was asked for, is not calibrated
    assert {method for name, method in methods.items() if "vis" in name} == {"mse"}
    assert {method for name, method in methods.items() if "vis" not in name} == {"gptq"}
    ids = torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = lowbit.load(tmp_path / "out", reference=True)(ids).logits
        theirs = auto.from_pretrained(tmp_path / "out")(ids).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
