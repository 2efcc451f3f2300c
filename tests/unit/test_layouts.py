"""What further formats refuse, and how they declare a model."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowbit import plugins
from lowbit.api import make_plan
from lowbit.errors import FormatError, UnsupportedError
from lowbit.formats import Format, Weight
from lowbit.methods import Method
from lowbit.pipeline import run_conversion
from lowbit.schemes import parse
from lowbit.stages._changes import Goal
from lowbit.stages.checkpoint import open_checkpoint
from tests.interop.models import recognised, unpacked
from tests.reference.qtensors import random_qtensor

MODULE = "model.layers.0.mlp.up_proj"


def form_of(name: str) -> Format:
    form: Format = plugins.load("formats", name)
    return form


def weight(
    name: str = "",
    scheme: str = "",
    module: str = MODULE,
    shape: tuple[int, ...] = (64, 128),
    dtype: Any = torch.bfloat16,
) -> Weight:
    bare = Weight(f"{module}.weight", shape, dtype)
    return replace(bare, scheme=form_of(name).fit(parse(scheme), bare)) if scheme else bare


def declaration(name: str, weights: list[Weight], key: str = "quantization_config") -> dict[str, Any]:
    declared: dict[str, Any] = form_of(name).config(weights, {})["config.json"][key]
    return declared


@pytest.mark.parametrize(
    ("name", "scheme", "shape", "fitted"),
    [
        ("awq", "int4-g128-asym", (64, 256), "int4-g128-asym"),
        ("awq", "int4-g128-asym", (64, 128), "int4-g128-asym"),
        ("awq", "int4-flat128-bf16", (64, 256), "int4-g128"),
        ("awq", "int4-g96", (64, 96), "int4-row"),
        ("fp8", "fp8-e4m3-128x128-bf16", (128, 256), "fp8-e4m3-128x128"),
        ("fbgemm_fp8", "fp8-e4m3-g128-f16", (60, 128), "fp8-e4m3-row"),
        ("bitnet", "levels[1,0,-1]-tensor", (64, 128), "levels[-1,0,1]-tensor-bf16"),
        ("eetq", "int8-g128-bf16", (64, 128), "int8-row"),
        ("mlx", "int4-g64", (64, 128), "int4-g64-min-bf16"),
        ("mlx", "int1-g64", (64, 128), "int1-g64-min-bf16"),
        ("mlx", "int6-row-asym", (3, 128), "int6-g128-min-bf16"),
        ("modelopt", "nvfp4", (3, 48), "nvfp4"),
        ("modelopt", "int4-g64-smooth", (4, 128), "int4-g64-f32-smooth"),
        ("modelopt", "fp8-e4m3-row-bf16", (3, 5), "fp8-e4m3-row"),
        ("aqlm", "vectors[1x8:16]", (3, 48), "vectors[1x8:16]-row-bf16"),
    ],
)
def test_fit_says_how_it_is_stored(name: str, scheme: str, shape: tuple[int, int], fitted: str) -> None:
    assert str(form_of(name).fit(parse(scheme), weight(shape=shape))) == fitted


@pytest.mark.parametrize(
    ("name", "scheme", "shape", "reason"),
    [
        ("awq", "int3-g64", (64, 128), "4 bits"),
        ("awq", "nf4-g64", (64, 128), "integers of 4 bits"),
        ("awq", "int4-g64-dq", (64, 128), "plain scales"),
        ("awq", "int4-g64-fzero", (64, 128), "use asym"),
        ("awq", "int4-g48", (64, 96), "use g128"),
        ("awq", "int4-16x16", (64, 128), "one scale per row"),
        ("awq", "int4-g64", (60, 128), "8 outputs in a word, and this has 60"),
        ("awq", "int4-g128", (64, 192), "use g64"),
        ("awq", "int4-g64", (64,), "--skip"),
        ("fp8", "fp8-e4m3-row", (128, 128), "it has fp8-e4m3-128x128"),
        ("fp8", "mxfp8", (128, 128), "fp8-e4m3-128x128"),
        ("fp8", "fp8-e4m3-128x128", (128, 192), "multiples of 128"),
        ("fbgemm_fp8", "fp8-e5m2-row", (128, 128), "fp8-e4m3-row"),
        ("fbgemm_fp8", "fp8-e4m3-128x128", (256, 256), "it has fp8-e4m3-row"),
        ("bitnet", "int2-tensor", (64, 128), "levels"),
        ("mlx", "int7-g64", (64, 128), "2, 3, 4, 5, 6, 8 bits"),
        ("mlx", "nf4-g64", (64, 128), "int4-g64-min"),
        ("mlx", "nvfp4", (64, 128), "use mxfp4"),
        ("mlx", "mxfp8", (64, 80), "leave"),
        ("mlx", "int4-g128", (64, 192), "use g64"),
        ("mlx", "int4-g64", (64, 80), "nothing does with 80"),
        ("mlx", "int4-g48", (64, 96), "use g32"),
        ("modelopt", "mxfp4", (64, 128), "it has nvfp4"),
        ("eetq", "int8-row-asym", (64, 128), "use that"),
        ("eetq", "int8-row", (64, 96), "--skip"),
        ("modelopt", "nvfp4", (64, 40), "16 divides"),
        ("modelopt", "int4-g32", (64, 128), "groups of 64 or 128"),
        ("modelopt", "int4-g64", (63, 128), "even number"),
        ("modelopt", "int4-flat64", (64, 128), "it has nvfp4"),
        ("modelopt", "fp8-e4m3-row-smooth", (64, 128), "no factors"),
        ("modelopt", "fp8-e4m3-128x128", (64, 128), "multiples of 128"),
        ("gptq", "int4-g64-smooth", (64, 128), "no place for factors"),
        ("bitnet", "levels[-1,0,1]-row", (64, 128), "levels"),
        ("aqlm", "int4-g64", (64, 128), "no method makes yet; convert keeps"),
        ("aqlm", "vectors[1x8:8+4]", (64, 128), "cannot hold"),
        ("aqlm", "vectors[8x1:8]-column-min", (64, 128), "cannot hold"),
        ("aqlm", "vectors[1x8:8]", (64, 100), "do not divide"),
        ("hqq", "vectors[1x8:8]", (64, 128), "cannot hold"),
        ("vptq", "vectors[8x1:8+8+8]-tensor", (64, 128), "no method makes yet; convert keeps"),
        ("spqr", "int3-g16-asym", (64, 128), "no method makes yet; convert keeps"),
        ("spqr", "spqr", (64, 120), "tiles of 16 x 16"),
        ("hqq", "spqr", (64, 128), "cannot hold"),
        ("compressed_tensors", "spqr", (64, 128), "leave out dq"),
        ("vptq", "vectors[8x1:8]-row", (64, 128), "cannot hold"),
        ("vptq", "vectors[1x8:8]-tensor", (64, 128), "cannot hold"),
        ("vptq", "vectors[200*4x1:8,8x1:8]-tensor", (64, 128), "do not divide 128 columns"),
        ("bitnet", "levels[-1,0,1]-tensor", (66, 128), "four quarters"),
    ],
)
def test_fit_refuses_with_what_works(name: str, scheme: str, shape: tuple[int, ...], reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        form_of(name).fit(parse(scheme), weight(shape=shape))


def test_awq_leaves_the_output_head_as_it_is() -> None:
    with pytest.raises(UnsupportedError, match="output head"):
        form_of("awq").fit(parse("int4-g64-asym"), weight(module="lm_head"))


def test_awq_declares_one_scheme() -> None:
    names = ["model.layers.0.a", "model.layers.1.a", "model.layers.0.b"]
    weights = [weight("awq", "int4-g64-asym", name) for name in names]
    assert declaration("awq", [*weights, weight(module="model.layers.1.b")]) == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 64,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head", "model.layers.1.b"],
    }
    symmetric = declaration("awq", [weight("awq", "int4-row")])
    assert (symmetric["group_size"], symmetric["zero_point"]) == (-1, False)
    with pytest.raises(UnsupportedError, match="int4-g64-asym, int4-row; use one"):
        form_of("awq").config([*weights, weight("awq", "int4-row", "x")], {})


@pytest.mark.parametrize("name", ["fp8", "fbgemm_fp8", "bitnet", "modelopt"])
def test_the_output_head_stays(name: str) -> None:
    form = form_of(name)
    with pytest.raises(UnsupportedError, match="output head"):
        form.fit(parse(form.default), weight(module="lm_head", shape=(128, 128)))


@pytest.mark.parametrize(
    ("name", "scheme", "declared"),
    [
        (
            "fp8",
            "fp8-e4m3-128x128",
            {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
        ),
        ("fbgemm_fp8", "fp8-e4m3-row", {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}),
        (
            "bitnet",
            "levels[-1,0,1]-tensor",
            {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"},
        ),
    ],
)
def test_declarations(name: str, scheme: str, declared: dict[str, Any]) -> None:
    weights = [weight(name, scheme, shape=(128, 128)), weight(module="model.layers.1.b")]
    skipped = {"modules_to_not_convert": ["lm_head", "model.layers.1.b"]}
    assert declaration(name, weights) == declared | skipped


def read_fp8(declared: dict[str, Any], **parts: Tensor) -> Weight:
    tensors = {f"{MODULE}.{name}": tensor for name, tensor in parts.items()}
    config = {"quantization_config": {"quant_method": "fp8", **declared}, "dtype": "float16"}
    found = recognised(form_of("fp8"), config, tensors)
    assert found is not None
    (each,) = found.values()
    q = unpacked(form_of("fp8"), each, tensors)
    assert torch.equal(q.dequantize(), parts["weight"].float() * 0.25)
    return each


def test_fp8_with_a_scale_per_tensor_or_row_as_vllm_has_it() -> None:
    codes, scale = torch.randn(8, 16).to(torch.float8_e4m3fn), torch.tensor(0.25)
    found = read_fp8({"activation_scheme": "static"}, weight=codes, weight_scale=scale, input_scale=scale / 2)
    assert (str(found.scheme), str(found.activations), found.input_scale, found.dtype) == (
        "fp8-e4m3-tensor",
        "fp8-e4m3-tensor",
        0.125,
        torch.float16,
    )
    found = read_fp8({"activation_scheme": "dynamic"}, weight=codes, weight_scale=scale.expand(8, 1).contiguous())
    assert (str(found.scheme), str(found.activations)) == ("fp8-e4m3-row", "fp8-e4m3-row")
    found = read_fp8({"weight_block_size": [8, 4]}, weight=codes, weight_scale_inv=scale.expand(1, 4).contiguous())
    assert (str(found.scheme), str(found.activations)) == ("fp8-e4m3-8x4", "fp8-e4m3-g4")


def test_what_is_read_only_is_refused_and_not_offered(wiki_8m: Path) -> None:
    assert "mxfp4" not in plugins.written()
    with pytest.raises(UnsupportedError, match="read and not written"):
        make_plan(wiki_8m, format="mxfp4")


def test_what_no_method_makes_is_not_offered_and_says_so(wiki_8m: Path) -> None:
    with pytest.raises(UnsupportedError, match="no method makes vectors of codebooks yet; convert keeps"):
        make_plan(wiki_8m, format="aqlm")
    for name in plugins.names("methods"):
        method: Method = plugins.load("methods", name)
        for scheme in ("vectors[1x8:16]", "vectors[8x1:16]-column-min", "spqr"):
            assert method.supports(parse(scheme)), (name, scheme)


def test_spqr_reads_words_as_its_dequantizer_does() -> None:
    """`dequantize_compressed` of spqr_quant 0.2.0 in float32; column c of what it makes reads input `in_perm[c]`."""
    made = weight("spqr", "spqr-perm-sparse7", shape=(32, 48), dtype=torch.float16)
    assert made.scheme
    into = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in form_of("spqr").layout(made).items()}
    form_of("spqr").pack(made, random_qtensor(made.scheme, made.shape), into)
    parts = {name.rpartition(".")[2]: tensor.numpy() for name, tensor in into.items()}
    words, out = iter(parts["dense_weights"].view(np.uint64).tolist()), np.zeros((32, 48), np.float32)
    for top, left in itertools.product(range(0, 32, 16), range(0, 48, 16)):
        tile = [next(words) for _ in range(16)]
        joined = functools.reduce(int.__or__, ((word >> 54) << 8 * (k // 2) for k, word in enumerate(tile)))
        ss, zs, sz, zz = np.array([joined], np.uint64).view(np.float16).astype(np.float32)
        for row, word in enumerate(tile):
            s, z, *codes = (np.float32(word >> 3 * i & 7) for i in range(18))
            out[top + row, left : left + 16] = ss * (s - sz) * (np.array(codes) - zs * (z - zz))
    outliers = parts["col_vals"].view(np.uint16).reshape(-1, 2)
    for row, (start, stop) in enumerate(itertools.pairwise(parts["row_offsets"])):
        for col, value in outliers[start:stop]:
            out[row, col] += np.float32(np.array([value]).view(np.float16)[0])
    meant = np.empty_like(out)
    meant[:, parts["in_perm"].view(np.uint16)] = out
    assert np.array_equal(unpacked(form_of("spqr"), made, into).dequantize().numpy(), meant)


def test_experts_come_as_the_model_holds_them(tmp_path: Path) -> None:
    """`[experts, inputs, outputs]`: the transpose of what is stored."""
    blocks = torch.full((2, 3, 1, 16), 0x32, dtype=torch.uint8)
    tensors = {"m.up_blocks": blocks, "m.up_scales": torch.full((2, 3, 1), 128, dtype=torch.uint8)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "mxfp4"}}')
    found = open_checkpoint(tmp_path).dequantized("m.up")
    assert torch.equal(found, torch.tensor([2.0, 3.0]).repeat(16)[None, :, None].expand(2, 32, 3).bfloat16())
    run_conversion(str(tmp_path), tmp_path / "out", Goal("float"))
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["m.up"], found)


def test_mlx_declares_what_differs_by_name() -> None:
    weights = [weight("mlx", "int4-g64", f"model.layers.{i}.a") for i in range(2)]
    weights += [weight("mlx", "int6-g32", "model.layers.1.b"), weight(module="model.layers.0.b")]
    declared = declaration("mlx", weights, "quantization")
    assert declared == {
        "group_size": 64,
        "bits": 4,
        "mode": "affine",
        "model.layers.1.b": {"group_size": 32, "bits": 6},
    }
    assert declaration("mlx", weights) == declared
    weights = [weight("mlx", "mxfp4", f"model.layers.{i}.a") for i in range(2)] + [weight("mlx", "int8-g64", "m")]
    usual = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    assert declaration("mlx", weights) == {**usual, "m": {"group_size": 64, "bits": 8}}


def test_modelopt_declares_activations_or_none() -> None:
    plain = weight("modelopt", "nvfp4")
    rounded = replace(plain, name="x.weight", activations=parse("nvfp4"), input_scale=2.0)
    kept = weight(module="model.layers.1.b")
    documents = form_of("modelopt").config([rounded, kept], {})
    numbers = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    declared = documents["config.json"]["quantization_config"]
    assert declared["config_groups"] == {
        "group_0": {"weights": numbers, "input_activations": numbers, "targets": ["Linear"]}
    }
    assert (declared["quant_method"], declared["quant_algo"]) == ("modelopt", "NVFP4")
    assert documents["hf_quant_config.json"]["quantization"] == {
        "quant_algo": "NVFP4",
        "kv_cache_quant_algo": None,
        "group_size": 16,
        "exclude_modules": ["lm_head", "model.layers.1.b"],
    }
    assert declaration("modelopt", [plain])["quant_algo"] == "W4A16_NVFP4"
    mixed = form_of("modelopt").config([plain, rounded, kept], {})
    told = mixed["hf_quant_config.json"]["quantization"]
    layers = {
        MODULE: {"quant_algo": "W4A16_NVFP4", "group_size": 16},
        "x": {"quant_algo": "NVFP4", "group_size": 16},
    }
    assert (told["quant_algo"], told["quantized_layers"]) == ("MIXED_PRECISION", layers)
    declared = mixed["config.json"]["quantization_config"]
    assert declared["config_groups"] == {
        "group_0": {"weights": numbers, "targets": [MODULE]},
        "group_1": {"weights": numbers, "input_activations": numbers, "targets": ["x"]},
    }
    assert declared["quantized_layers"] == layers


def test_modelopt_declares_fp8_under_one_scale_with_that_of_its_inputs_alone() -> None:
    plain = weight("modelopt", "fp8-e4m3-tensor")
    with pytest.raises(UnsupportedError, match="--activations fp8-e4m3-tensor"):
        form_of("modelopt").config([plain], {})
    assert declaration("modelopt", [replace(plain, activations=parse("fp8-e4m3-tensor"))])["quant_algo"] == "FP8"


def test_modelopt_says_that_some_weights_have_factors() -> None:
    weights = [weight("modelopt", "nvfp4"), weight("modelopt", "nvfp4-smooth", "x")]
    details = form_of("modelopt").config(weights, {})["hf_quant_config.json"]["quantization"]
    assert (details["quant_algo"], details["pre_quant_scale"]) == ("NVFP4_AWQ", True)


def test_modelopt_stores_the_reciprocal_of_what_multiplies_inputs() -> None:
    form = form_of("modelopt")
    planned = replace(weight("modelopt", "nvfp4"), activations=parse("nvfp4"), input_scale=2.0)
    assert planned.scheme
    into = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in form.layout(planned).items()}
    form.pack(planned, random_qtensor(planned.scheme, planned.shape), into)
    assert into[f"{MODULE}.input_scale"].item() == 0.5
    found = recognised(form, form.config([planned], {})["config.json"], into)
    assert found and found[planned.name].input_scale == 2.0
    with pytest.raises(FormatError, match=rf"{MODULE}\.input_scale needs"):
        form.pack(replace(planned, input_scale=None), random_qtensor(planned.scheme, planned.shape), into)


def test_modelopt_reads_fp8_with_a_scale_per_tensor_and_per_row() -> None:
    form, codes = form_of("modelopt"), torch.randn(8, 16).to(torch.float8_e4m3fn)
    config = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}
    tensors = {"m.weight": codes, "m.weight_scale": torch.tensor(0.25), "m.input_scale": torch.tensor(0.5)}
    found = recognised(form, config, tensors)
    assert found and (str(found["m.weight"].activations), found["m.weight"].input_scale) == ("fp8-e4m3-tensor", 0.5)
    assert torch.equal(unpacked(form, found["m.weight"], tensors).dequantize(), codes.float() * 0.25)
    rows = {"m.weight": codes, "m.weight_scale": torch.arange(1.0, 9.0)}
    found = recognised(form, config, rows)
    assert found and str(found["m.weight"].scheme) == str(found["m.weight"].activations) == "fp8-e4m3-row"
    assert torch.equal(
        unpacked(form, found["m.weight"], rows).dequantize(), codes.float() * torch.arange(1, 9)[:, None]
    )


def eetq_bytes(codes: Tensor) -> Tensor:
    """EETQ's `preprocess_weights` of signed codes `[K, N]`, step by step, one element at a time."""
    high, wide = codes.shape
    permuted = [codes[16 * (k // 16) + 8 * (k % 4 // 2) + k % 2 + 2 * (k % 16 // 4)].tolist() for k in range(high)]
    flat = [0] * (high * wide)
    for n in range(wide):
        for k in range(high):
            tile, inside = divmod(k, 64)
            flat[n // 2 * 2 * high + 2 * 64 * tile + 64 * (n % 2) + inside] = permuted[k][n] + 128
    for base in range(0, len(flat), 4):
        flat[base + 1], flat[base + 2] = flat[base + 2], flat[base + 1]
    return torch.tensor(flat, dtype=torch.uint8).reshape(high, wide)


def test_eetq_orders_its_bytes_as_its_source_does() -> None:
    w = replace(weight(shape=(128, 192)), scheme=parse("int8-row"))
    form: Format = plugins.load("formats", "eetq")
    signed = torch.randint(-128, 128, (192, 128), generator=torch.Generator().manual_seed(0))
    scales = torch.arange(1, 129).reshape(-1, 1) / 64
    tensors = {"m.weight": eetq_bytes(signed).view(torch.int8), "m.weight_scales": scales.half().reshape(-1)}
    tensors = {name.replace("m.", f"{w.module}."): tensor for name, tensor in tensors.items()}
    q = form.unpack(w, tensors, None)
    assert torch.equal(q.dequantize(), signed.T * scales)
    into = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    form.pack(w, q, into)
    assert all(torch.equal(into[name], tensor) for name, tensor in tensors.items())
