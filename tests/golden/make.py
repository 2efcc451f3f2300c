"""Makes the files `NAME.json` that `test_owners.py` reads, each with the package that owns the format.

`python -m tests.golden.make NAME`, with that package installed (the line in `MAKERS` says which). A file holds a small
checkpoint: its configuration, its tensors, and the weights that the owner says they mean.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import tempfile
import types
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MODULE = "model.layers.0.mlp.up_proj"
F16 = torch.float16


def case(config: Mapping[str, Any], tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """One checkpoint as JSON."""
    return {"config": config, "tensors": _dump(tensors), "weights": _dump(weights)}


def _dump(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: [str(t.dtype).removeprefix("torch."), list(t.shape), _hex(t)] for name, t in tensors.items()}


def _hex(tensor: Tensor) -> str:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes().hex()


def affine(rows: int, cols: int, size: int, bits: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Random scales and zero points `[rows, groups]`, and the weight `[rows, cols]` that lies on their grid."""
    dice = torch.Generator().manual_seed(rows + cols + size)
    codes = torch.randint(2**bits, (rows, cols), generator=dice)
    zeros = torch.randint(2**bits, (rows, cols // size), generator=dice)
    scales = (torch.rand(zeros.shape, generator=dice) / 50 + 0.01).half()
    weight = (codes - zeros.repeat_interleave(size, 1)) * scales.float().repeat_interleave(size, 1)
    return scales, zeros, weight.half().float()


def _without_init(package: str) -> None:
    """Let modules of a package be imported alone: its `__init__` asks for versions of others that are long gone."""
    spec = find_spec(package)
    assert spec and spec.submodule_search_locations
    sys.modules[package] = types.ModuleType(package)
    sys.modules[package].__path__ = list(spec.submodule_search_locations)
    sys.modules[package].__spec__ = spec


def awq() -> list[dict[str, Any]]:
    _without_init("awq")
    _without_init("awq.modules")
    _without_init("awq.modules.linear")
    cases = []
    for version, size, rows, cols in [("gemm", 32, 32, 64), ("gemv", 64, 8, 128)]:
        scales, zeros, weight = affine(rows, cols, size)
        linear = torch.nn.Linear(cols, rows, bias=False)
        linear.weight.data = weight
        kind = getattr(import_module(f"awq.modules.linear.{version}"), f"WQLinear_{version.upper()}")
        parts = (scales.T, zeros.T) if version == "gemm" else (scales, zeros)
        made = kind.from_linear(linear, 4, size, scales=parts[0].contiguous(), zeros=parts[1].contiguous())
        declared = {"quant_method": "awq", "bits": 4, "group_size": size, "zero_point": True, "version": version}
        tensors = {f"{MODULE}.{name}": tensor for name, tensor in made.named_buffers()}
        cases.append(case({"quantization_config": declared}, tensors, {f"{MODULE}.weight": weight.half()}))
    return cases


def fp8() -> list[dict[str, Any]]:
    """Blocks of 32 x 32, to keep the file small, with float32 scales and with powers of two."""
    made = import_module("transformers.integrations.finegrained_fp8")
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    cases = []
    for scale in ("float", "ue8m0"):
        options = {"weight_block_size": [32, 32], "scale_fmt": scale}
        quantizer = types.SimpleNamespace(
            quantization_config=import_module("transformers").FineGrainedFP8Config(**options)
        )
        tensors = made.Fp8Quantize(quantizer).convert({f"{MODULE}.weight": weight})
        parts = tensors[f"{MODULE}.weight"], tensors[f"{MODULE}.weight_scale_inv"]
        found = made.Fp8Dequantize(quantizer)._dequantize_one(*parts, torch.bfloat16)
        declared = {"quant_method": "fp8", "activation_scheme": "dynamic", **options}
        cases.append(case({"quantization_config": declared}, tensors, {f"{MODULE}.weight": found}))
    return cases


def bitnet() -> list[dict[str, Any]]:
    made = import_module("transformers.integrations.bitnet")
    ternary = torch.randint(-1, 2, (16, 24), generator=torch.Generator().manual_seed(0)).float()
    scale = torch.tensor([0.0371], dtype=torch.bfloat16)
    cases = []
    for kind in ("autobitlinear", "bitlinear"):
        tensors = {f"{MODULE}.weight": made.pack_weights(ternary.clone()), f"{MODULE}.weight_scale": scale}
        found = ternary * scale.float() if kind == "autobitlinear" else ternary / scale.float()
        declared = {"quant_method": "bitnet", "linear_class": kind, "quantization_mode": "offline"}
        cases.append(case({"quantization_config": declared}, tensors, {f"{MODULE}.weight": found}))
    return cases


def mlx() -> list[dict[str, Any]]:
    """Dequantized in float32, in which a product and a sum are rounded as they are here."""
    core: Any = import_module("mlx.core")
    weight = core.random.normal((4, 128), key=core.random.key(0))
    cases = []
    for bits, size, dtype in [
        (2, 64, "float32"),
        (3, 32, "float16"),
        (4, 64, "float16"),
        (6, 128, "float32"),
        (8, 32, "float16"),
    ]:
        parts = core.quantize(weight.astype(getattr(core, dtype)), group_size=size, bits=bits)
        packed, scales, biases = parts
        found = core.dequantize(
            packed, scales.astype(core.float32), biases.astype(core.float32), group_size=size, bits=bits
        )
        tensors = {
            f"{MODULE}.{name}": torch.from_numpy(import_module("numpy").array(part))
            for name, part in zip(("weight", "scales", "biases"), parts, strict=True)
        }
        meant = {f"{MODULE}.weight": torch.from_numpy(import_module("numpy").array(found))}
        cases.append(case({"quantization": {"group_size": size, "bits": bits, "mode": "affine"}}, tensors, meant))
    return cases + [_mlx_small(core, weight, mode) for mode in ("mxfp4", "mxfp8", "nvfp4")]


def _mlx_small(core: Any, weight: Any, mode: str) -> dict[str, Any]:
    numpy = import_module("numpy")
    parts = dict(zip(("weight", "scales"), core.quantize(weight, mode=mode), strict=True))
    found = core.dequantize(parts["weight"], parts["scales"], mode=mode, dtype=core.float32)
    tensors = {f"{MODULE}.{name}": torch.from_numpy(numpy.array(part)) for name, part in parts.items()}
    bits, size = (8 if mode == "mxfp8" else 4), (16 if mode == "nvfp4" else 32)
    declared = {"quantization": {"group_size": size, "bits": bits, "mode": mode}}
    return case(declared, tensors, {f"{MODULE}.weight": torch.from_numpy(numpy.array(found))})


def modelopt() -> list[dict[str, Any]]:
    """NVFP4 by `NVFP4QTensor`, with a scale for the inputs and without; integers and FP8 as the export writes them."""
    kind = import_module("modelopt.torch.quantization.qtensor").NVFP4QTensor
    convert = import_module("modelopt.torch.export.convert_hf_config").convert_hf_quant_config_format
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    cases = []
    for algorithm in ("NVFP4", "W4A16_NVFP4"):
        made, scale, double = kind.quantize(weight.clone(), 16)
        meant = made.dequantize(scale=scale, double_scale=double, block_sizes={-1: 16})
        parts = {"weight": made._quantized_data, "weight_scale": scale, "weight_scale_2": double}
        parts |= {"input_scale": torch.tensor(0.004)} if algorithm == "NVFP4" else {}
        declared = convert({"quantization": {"quant_algo": algorithm, "exclude_modules": ["lm_head"]}})
        tensors = {f"{MODULE}.{name}": tensor for name, tensor in parts.items()}
        cases.append(case({"quantization_config": declared}, tensors, {f"{MODULE}.weight": meant}))
    dice = torch.Generator().manual_seed(0)
    integers = torch.randint(-7, 8, (8, 32), generator=dice)
    integers[:, ::16] = 7
    floats = torch.randn(8, 256, generator=dice).clamp(-1.7, 1.7)
    floats[:, ::128] = 1.75  # 448 / 256: scales are powers of two, so that no order of operations matters
    factors = (torch.rand(32, generator=dice) + 0.5).bfloat16().float()
    return [
        *cases,
        _modelopt_export("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", integers / 64),
        _modelopt_export("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", integers / 32, factors),
        _modelopt_export("FP8_DEFAULT_CFG", floats[:, :32]),
        _modelopt_export("FP8_PER_CHANNEL_PER_TOKEN_CFG", floats[:, :32] / torch.arange(8).exp2()[:, None]),
        _modelopt_export("FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", floats),
    ]


def _modelopt_export(name: str, weight: Tensor, factors: Tensor | None = None) -> dict[str, Any]:
    """One matrix of a Llama through quantization and export; it means what its module multiplies by."""
    quantization, transformers = import_module("modelopt.torch.quantization"), import_module("transformers")
    module, (rows, cols) = "model.layers.0.mlp.down_proj", weight.shape
    sizes = {"hidden_size": rows, "intermediate_size": cols, "num_hidden_layers": 1, "vocab_size": 8}
    sizes |= {"num_attention_heads": 1, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(**sizes, dtype="float32", architectures=["LlamaForCausalLM"])
    model = transformers.LlamaForCausalLM(config)
    layer = model.get_submodule(module)
    layer.weight.data = weight.float().clone()
    rules = copy.deepcopy(getattr(quantization, name))
    kept = [rule for rule in rules["quant_cfg"] if rule["quantizer_name"] in ("*weight_quantizer", "*input_quantizer")]
    for rule in kept:
        rule["quantizer_name"] = rule["quantizer_name"].replace("*", f"*{module}.")
        if "INT4" in name and rule.get("cfg"):
            rule["cfg"]["block_sizes"][-1] = 16
    rules["quant_cfg"] = [{"quantizer_name": "*", "enable": False}, *kept]
    quantization.quantize(model, rules, lambda each: each(torch.arange(8)[None]))
    if factors is not None:
        layer.input_quantizer.pre_quant_scale = factors
    exact = layer(torch.eye(cols)).T if "INT4" in name else layer.weight_quantizer(layer.weight)
    meant = exact.detach().clone()
    with tempfile.TemporaryDirectory() as folder:
        import_module("modelopt.torch.export").export_hf_checkpoint(model, export_dir=folder)
        stored = import_module("safetensors.torch").load_file(f"{folder}/model.safetensors")
        declared = json.loads(Path(folder, "config.json").read_text())["quantization_config"]
    tensors = {key: tensor for key, tensor in stored.items() if key.startswith(module)}
    return case({"quantization_config": declared, "dtype": "float32"}, tensors, {f"{module}.weight": meant})


def mxfp4() -> list[dict[str, Any]]:
    """Any bytes are codes; the package holds a parameter as `[experts, inputs, outputs]`."""
    convert = import_module("transformers.integrations.mxfp4").convert_moe_packed_tensors
    dice = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (2, 6, 2, 16), generator=dice).to(torch.uint8)
    scales = torch.randint(110, 130, (2, 6, 2), generator=dice).to(torch.uint8)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    meant = convert(blocks, scales, dtype=torch.bfloat16).transpose(1, 2)
    tensors = {f"{name}_blocks": blocks, f"{name}_scales": scales}
    return [case({"quantization_config": {"quant_method": "mxfp4"}}, tensors, {name: meant})]


def torchao() -> list[dict[str, Any]]:
    """Dequantized by torchao in float32; int4 by the functions of mslk that torchao calls, which run without a GPU."""
    sys.modules["mslk"] = None  # type: ignore[assignment]  # torchao would import all of it
    made = import_module("torchao.quantization")
    flatten = import_module("torchao.prototype.safetensors.safetensors_support").flatten_tensor_state_dict
    cases = []
    for kind in ("Int8WeightOnlyConfig", "Float8WeightOnlyConfig"):
        torch.manual_seed(0)
        model = torch.nn.ModuleDict({"m": torch.nn.Linear(32, 8, bias=False)}).bfloat16()
        made.quantize_(model, getattr(made, kind)())
        tensors, _ = flatten(model.state_dict())
        quantized: Any = model["m"].weight
        meant = {"m.weight": quantized.dequantize(torch.float32)}
        cases.append(case({"quantization_config": {"quant_method": "torchao"}}, tensors, meant))
    del sys.modules["mslk"]
    for package in ("mslk", "mslk.quantize", "mslk.quantize.triton"):
        _without_init(package)
    sys.modules["mslk.quantize.triton.fp8_quantize"] = _Unused("fp8_quantize")
    shuffle = import_module("mslk.quantize.shuffle")
    return [*cases, *(_torchao_int4(shuffle, flatten, shifted) for shifted in (True, False))]


def _torchao_int4(shuffle: Any, flatten: Any, shifted: bool) -> dict[str, Any]:
    """`Int4Tensor` has no dequantizer: a weight on a grid is quantized without error, and means itself."""
    kind = import_module("torchao.quantization").Int4Tensor
    dice = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (4, 64), generator=dice)
    codes[:, ::32], codes[:, 1::32] = 0, 15  # the ends of the grid are in each group
    steps = torch.randint(-7, -3, (4, 2), generator=dice).float().exp2().repeat_interleave(32, 1)
    weight = (codes - torch.randint(4, 12, (4, 2), generator=dice).repeat_interleave(32, 1)) * steps
    if shifted:
        parts = shuffle.int4_row_quantize_zp(weight, 32)
    else:
        weight = ((codes - 8) * steps).where(codes > 0, -8 * steps)
        parts = *shuffle.int4_row_quantize(weight, 32), torch.zeros(2, 4)
    packed, scale, zero = shuffle.pack_int4(parts[0]), *(part.bfloat16() for part in parts[1:])
    made = kind(packed, scale, zero, [1, 32], weight.shape)
    tensors, _ = flatten({"m.weight": made})
    return case({"quantization_config": {"quant_method": "torchao"}}, tensors, {"m.weight": weight})


def aqlm() -> list[dict[str, Any]]:
    """Any integers are codes; packed, and dequantized in float32, by the package."""
    utils = import_module("aqlm.utils")
    cases = []
    for out, width, books, bits in [(1, 8, 2, 4), (1, 4, 1, 9), (2, 4, 3, 5)]:
        dice = torch.Generator().manual_seed(bits)
        codes = torch.randint(2**bits, (6 // out, 16 // width, books), generator=dice)
        tables = torch.randn(books, 2**bits, out, width, generator=dice).half()
        scales = (torch.rand(6 // out, 1, 1, 1, generator=dice) / 50 + 0.01).half()
        packed = utils.pack_int_data(codes.clone(), bits)
        meant = utils._dequantize_weight(utils.unpack_int_data(packed, bits), tables.float(), scales.float())
        fields = {"in_group_size": width, "out_group_size": out, "num_codebooks": books, "nbits_per_codebook": bits}
        declared = import_module("transformers").AqlmConfig(**fields).to_dict()
        tensors = {f"{MODULE}.{name}": part for name, part in
                   (("codes", packed), ("codebooks", tables), ("scales", scales))}  # fmt: skip
        cases.append(case({"quantization_config": declared}, tensors, {f"{MODULE}.weight": meant}))
    return cases


def vptq() -> list[dict[str, Any]]:
    """Indices packed, and weights dequantized in float32, by the package; rows are padded, columns in any order."""
    for package in ("vptq", "vptq.layers", "vptq.utils"):
        _without_init(package)
    sys.modules["sentence_transformers.SentenceTransformer"] = _Unused("sentence_transformers")
    linear = import_module("vptq.layers.vqlinear")
    pack = import_module("vptq.utils.pack").pack_index
    cases = []
    for groups, outliers, residual, norm in [(1, 4, 8, True), (2, 0, -1, False)]:
        dice, size = torch.Generator().manual_seed(groups), (22 - outliers) // groups
        options = {
            "in_features": 22, "out_features": 10, "vector_lens": [2 if outliers else -1, 4],
            "num_centroids": [8 if outliers else -1, 32], "num_res_centroids": [-1, residual], "group_num": groups,
            "group_size": size, "outlier_size": outliers, "indices_as_float": False, "enable_norm": norm,
            "enable_perm": norm, "is_indice_packed": True, "bias": False,
        }  # fmt: skip
        layer = linear.VQuantLinear(**options, dtype=F16, enable_proxy_error=False)
        for parameter in layer.parameters():
            if parameter.is_floating_point():
                parameter.data = torch.randn(parameter.shape, generator=dice).half()
        codes = [torch.randint(n, (groups, 3, size), generator=dice).short() for n in (32, residual) if n > 0]
        packing = (codes[1], 3) if residual > 0 else (None, 0)
        layer.indices.data = pack(codes[0], 5, *packing, index_dtype=torch.uint16)
        if outliers:
            layer.outlier_indices.data = torch.randint(8, (1, 5, outliers), generator=dice).short()
        if norm:
            layer.perm.data = torch.randperm(22, generator=dice).short()
        tensors = {f"{MODULE}.{name}": part.detach() for name, part in layer.state_dict().items()}
        declared = {"quant_method": "vptq", "config_for_layers": {MODULE: options}}
        cases.append(
            case({"quantization_config": declared}, tensors, {f"{MODULE}.weight": _vptq_weight(layer.float())})
        )
    return cases


def _vptq_weight(layer: Any) -> Tensor:
    """What the layer multiplies by: its output for each input alone."""
    found: Tensor = layer(torch.eye(layer.in_features)).detach().T.contiguous()
    return found


def quanto() -> list[dict[str, Any]]:
    """One matrix of a Llama, whose shape its class tells; rows of 160 are in groups of 32, of 96 in one."""
    made, transformers = import_module("optimum.quanto"), import_module("transformers")
    cases = []
    for kind, rows, cols in [("qint8", 6, 64), ("qfloat8", 6, 64), ("qint4", 5, 160), ("qint2", 5, 96)]:
        sizes = {"hidden_size": cols, "intermediate_size": rows, "num_hidden_layers": 1, "vocab_size": 4}
        config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
        torch.manual_seed(0)
        model = made.QuantizedModelForCausalLM.quantize(
            transformers.LlamaForCausalLM(config), weights=kind, include="*up_proj"
        )
        tensors = {name: tensor for name, tensor in model.state_dict().items() if "up_proj" in name}
        meant = {f"{MODULE}.weight": model.get_submodule(MODULE).weight.dequantize()}
        cases.append(case({"model_type": "llama", **config.to_diff_dict()}, tensors, meant))
    return cases


def fbgemm_fp8() -> list[dict[str, Any]]:
    """By transformers with the package's functions, as these work without a GPU; what it multiplies by, in bfloat16."""
    for package in ("", ".experimental", ".experimental.gemm", ".experimental.gemm.triton_gemm"):
        _without_init(f"fbgemm_gpu{package}")
    sys.modules["fbgemm_gpu.experimental.gen_ai"] = _Unused("gen_ai")
    rows: Any = import_module("fbgemm_gpu.experimental.gemm.triton_gemm.fp8_gemm")
    made: Any = import_module("transformers.integrations.fbgemm_fp8")
    made.quantize_fp8_per_row = rows.quantize_fp8_row
    torch.manual_seed(0)
    layers = torch.nn.ModuleDict({"m": torch.nn.Linear(48, 8, bias=False)}).bfloat16()
    tensors = made.FbgemmFp8Quantize(None).convert({"m.weight": [layers["m"].weight.data]}, layers)
    torch.version.cuda = "12.9"  # else it takes the types of another maker's GPUs
    one = torch.eye(48).to(torch.float8_e4m3fn), torch.ones(48)
    found = rows.matmul_fp8_row(one[0], tensors["m.weight"], one[1], tensors["m.weight_scale"].view(-1))
    declared = import_module("transformers").FbgemmFp8Config().to_dict()
    return [case({"quantization_config": declared, "dtype": "bfloat16"}, tensors, {"m.weight": found.T})]


_STUBS = """
#include <cstdint>
#include <cuda_runtime_api.h>
int spqr_matvec(int, int, int, int, int, const void *, const void *, int, void *, void *, int, void *, void *,
                cudaStream_t, void *, uint32_t) { return 1; }
int torch_matvec(int, int, void *, void *, void *, void *, cudaStream_t) { return 1; }
"""
_STREAMS = """
#pragma once
#include <cuda_runtime.h>
namespace at::cuda { inline cudaStream_t getCurrentCUDAStream(int = 0) { return nullptr; } }
"""


def _headers() -> list[str]:
    """Where NVIDIA's packages have the headers of CUDA."""
    specs = [find_spec(f"nvidia.{name}") for name in ("cuda_runtime", "cuda_nvcc", "cuda_cccl")]
    return [f"{folder}/include" for spec in specs if spec for folder in spec.submodule_search_locations or ()]


def _libraries() -> list[str]:
    """CUDA's functions that are linked and never called."""
    spec = find_spec("nvidia.cuda_runtime")
    assert spec and spec.submodule_search_locations
    folder = f"{spec.submodule_search_locations[0]}/lib"
    return [f"{folder}/libcudart.so.12", f"-Wl,-rpath,{folder}"]


def spqr() -> list[dict[str, Any]]:
    """Packed and dequantized by the package's own C++, compiled without its kernels; exact in float16 at every step."""
    cpp: Any = import_module("torch.utils.cpp_extension")
    load = cpp.load
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "stubs.cpp").write_text(_STUBS)
        Path(folder, "ATen/cuda").mkdir(parents=True)
        Path(folder, "ATen/cuda/CUDAContext.h").write_text(_STREAMS)

        def loaded(name: str, sources: list[str], **_: Any) -> Any:
            host = [source for source in sources if source.endswith(".cpp")]
            return load(name, [*host, f"{folder}/stubs.cpp"], extra_include_paths=[folder, *_headers()],
                        extra_ldflags=_libraries(), extra_cflags=["-O1"])  # fmt: skip

        cpp.load = loaded
        made = import_module("spqr_quant.inference")
        return [_spqr(made, rows, cols, ordered) for rows, cols, ordered in [(32, 48, True), (16, 32, False)]]


def _spqr(made: Any, rows: int, cols: int, ordered: bool) -> dict[str, Any]:
    dice = torch.Generator().manual_seed(cols)

    def whole(low: int, high: int, count: int) -> Tensor:
        return torch.randint(low, high, (count,), generator=dice)

    tiles, starts = rows * cols // 256, torch.cat([torch.zeros(1), whole(0, 3, rows).cumsum(0)]).int()
    outliers = int(starts[-1])
    steps = [2.0 ** whole(-6, -3, tiles), whole(-3, 0, tiles), 2.0 ** whole(-1, 1, tiles), whole(-2, 6, tiles)]
    order = torch.randperm(cols, generator=dice)
    legacy = made.SPQRLegacy(
        rows, cols, 3, whole(0, 8, rows * cols).char().view(rows, cols), 16, 16,
        *[whole(0, 8, tiles * 16).char() for _ in range(2)], *[step.half() for step in steps],
        starts, whole(0, cols, outliers).short(), (whole(-8, 9, outliers) / 4).half(),
        order if ordered else None,
    )  # fmt: skip
    kind = made.SparseStorageConfiguration.CSR
    layer = made.QuantizedLinear.from_legacy(legacy, made.ModelArgs(3, 16, 16, kind), "cpu")
    meant = torch.empty(rows, cols).half()
    meant[:, order if ordered else torch.arange(cols)] = layer.dequantize()
    tensors = {f"{MODULE}.{name}": part.detach() for name, part in layer.named_parameters()}
    shapes = {f"{name}.shape": part.numel() for name, part in tensors.items()}
    declared = import_module("transformers").SpQRConfig(shapes=shapes).to_dict()
    return case({"quantization_config": declared}, tensors, {f"{MODULE}.weight": meant})


_QUANTIZE = """
#include <torch/extension.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include "cutlass_preprocessors.h"
extern "C" cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
extern "C" cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr what, int) {
    return *value = what == cudaDevAttrComputeCapabilityMajor ? 8 : 0, cudaSuccess;
}
using namespace fastertransformer;
std::vector<torch::Tensor> quantize(torch::Tensor w) {
    const size_t rows = w.size(0), cols = w.size(1);
    auto plain = torch::empty({w.size(0), w.size(1)}, torch::kInt8), packed = torch::empty_like(plain);
    auto scales = torch::empty({w.size(1)}, torch::kHalf);
    symmetric_quantize<half, half>(packed.data_ptr<int8_t>(), plain.data_ptr<int8_t>(), (half *)scales.data_ptr(),
                                   (const half *)w.data_ptr(), {rows, cols}, QuantType::INT8_WEIGHT_ONLY);
    return {plain, packed, scales};
}
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.def("quantize", &quantize); }
"""


def eetq() -> list[dict[str, Any]]:
    """By EETQ's own C++ for processors of capability 8.0; `$EETQ` is its source, of which there is no package."""
    source, cutlass = os.environ["EETQ"], find_spec("cutlass_library")
    assert cutlass and cutlass.submodule_search_locations
    places = [f"{source}/csrc/{part}" for part in ("cutlass_kernels", "utils", "cutlass_extensions/include")]
    places += [f"{cutlass.submodule_search_locations[0]}/source/include", *_headers()]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "quantize.cpp").write_text(_QUANTIZE)
        sources = [f"{folder}/quantize.cpp", f"{places[0]}/cutlass_preprocessors.cc"]
        made: Any = import_module("torch.utils.cpp_extension").load(
            "eetq", sources, extra_include_paths=places, extra_cflags=["-O1"],
            extra_ldflags=_libraries(),
        )  # fmt: skip
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).half()
    plain, packed, scales = made.quantize(weight.T.contiguous())
    tensors = {f"{MODULE}.weight": packed, f"{MODULE}.weight_scales": scales}
    declared = import_module("transformers").EetqConfig().to_dict()
    meant = (plain.T * scales.float()[:, None]).half()
    return [case({"quantization_config": declared}, tensors, {f"{MODULE}.weight": meant})]


def onnx() -> list[dict[str, Any]]:
    """Products by a weight, quantized in each way that onnxruntime has; what it multiplies unit vectors to."""
    made: Any = import_module("onnxruntime.quantization")
    nbits: Any = import_module("onnxruntime.quantization.matmul_nbits_quantizer")
    cases = []
    for bits, symmetric, kind in [(4, True, "QOperator"), (4, False, "QOperator"), (8, False, "QOperator"),
                                  (4, True, "QDQ"), (4, False, "QDQ")]:  # fmt: skip
        quantizer = nbits.MatMulNBitsQuantizer(
            _product(), bits, 16, symmetric, quant_format=getattr(made.QuantFormat, kind)
        )
        quantizer.process()
        cases.append(_onnx_case(quantizer.model.model))
    with tempfile.TemporaryDirectory() as folder:
        source, out = f"{folder}/float.onnx", f"{folder}/model.onnx"
        import_module("onnx").save(_product(), source)
        made.quantize_dynamic(source, out, weight_type=made.QuantType.QInt8, per_channel=True)
        cases.append(_onnx_case(import_module("onnx").load(out)))
        made.quantize_static(source, out, _Once(), per_channel=True, weight_type=made.QuantType.QInt8)
        cases.append(_onnx_case(import_module("onnx").load(out), f"{MODULE}.weight_DequantizeLinear_Output"))
    return cases


class _Once:
    """Calibration by the unit vectors, from -1 to 1."""

    def __init__(self) -> None:
        eye = torch.eye(64).numpy()
        self.left = iter([{"x": eye}, {"x": -eye}])

    def get_next(self) -> Any:
        return next(self.left, None)


def _product() -> Any:
    helper: Any = import_module("onnx.helper")
    weight = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)) / 8
    stored = import_module("onnx.numpy_helper").from_array(weight.numpy(), f"{MODULE}.weight")
    ends = [helper.make_tensor_value_info(name, 1, ["tokens", size]) for name, size in (("x", 64), ("y", 8))]
    node = helper.make_node("MatMul", ["x", f"{MODULE}.weight"], ["y"], f"/{MODULE.replace('.', '/')}/MatMul")
    graph = helper.make_graph([node], "product", ends[:1], ends[1:], [stored])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def _onnx_case(model: Any, output: str = "y") -> dict[str, Any]:
    """`output`: the product, or the weight itself where inputs and products are rounded."""
    runtime: Any = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # inputs are not rounded
    data = model.SerializeToString()
    if output != "y":
        model.graph.output.append(import_module("onnx").ValueInfoProto(name=output))
    session = runtime.InferenceSession(model.SerializeToString(), options)
    (found,) = session.run([output], {"x": torch.eye(64).numpy()})
    return {"graph": data.hex()} | case({}, {}, {f"{MODULE}.weight": torch.from_numpy(found).T})


class _Unused(types.ModuleType):
    """A module of which nothing is needed but that names can be imported from it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return dict


MAKERS: dict[str, tuple[str, Callable[[], list[dict[str, Any]]]]] = {
    "awq": ("autoawq 0.2.9", awq),
    "fp8": ("transformers 5.23.0", fp8),
    "bitnet": ("transformers 5.23.0", bitnet),
    "mlx": ("mlx 0.32.4", mlx),
    "mxfp4": ("transformers 5.23.0", mxfp4),
    "torchao": ("torchao 0.18.0, mslk-cuda 1.1.0", torchao),
    "aqlm": ("aqlm 1.1.7, transformers 5.23.0", aqlm),
    "vptq": ("vptq 0.0.5.post1", vptq),
    "quanto": ("optimum-quanto 0.2.7", quanto),
    "modelopt": ("nvidia-modelopt 0.47.0", modelopt),
    "fbgemm_fp8": ("fbgemm-gpu-genai 1.9.0, transformers 5.23.0", fbgemm_fp8),
    "onnx": ("onnxruntime 1.32.0", onnx),
    "eetq": ("EETQ 465e972, nvidia-cutlass 4.2.0.0, nvidia-cuda-runtime-cu12, -nvcc-cu12, -cccl-cu12 (headers)", eetq),
    "spqr": ("spqr_quant 0.2.0, nvidia-cuda-runtime-cu12, -nvcc-cu12, -cccl-cu12 (headers)", spqr),
}

if __name__ == "__main__":
    (name,) = sys.argv[1:]
    package, make = MAKERS[name]
    lines = ",\n".join(json.dumps(each) for each in make())
    Path(__file__).with_name(f"{name}.json").write_text(f'{{"made_by": "{package}", "cases": [\n{lines}\n]}}\n')
