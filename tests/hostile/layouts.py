"""Hostile checkpoints of further formats, in the words of `cases.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.hostile.cases import INF, NAN, SHARD, Case, _directory

Build = Callable[[Path], Path]
F16 = torch.float16


def checkpoint(declared: Mapping[str, Any], parts: Mapping[str, Tensor | None]) -> Build:
    """One module `m` with these tensors (None: left out), and a configuration that declares its format."""
    tensors = {f"m.{name}": tensor for name, tensor in parts.items() if tensor is not None}
    return _directory({SHARD: tensors}, config={"quantization_config": declared})


def _awq(declared: Mapping[str, Any] | None = None, **changes: Tensor | None) -> Build:
    """AWQ of [16, 64], groups of 32."""
    parts: dict[str, Tensor | None] = {
        "qweight": torch.zeros(64, 2, dtype=torch.int32),
        "qzeros": torch.full((2, 2), -0x77777778, dtype=torch.int32),
        "scales": torch.ones(2, 16, dtype=F16),
    }
    usual = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": False, "version": "gemm"}
    return checkpoint(usual | dict(declared or {}), {**parts, **changes})


def _lies(fields: Mapping[str, Any], *says: str) -> Case:
    return Case("awq says " + ", ".join(f"{k} {v}" for k, v in fields.items()), _awq(fields), says, "awq")


AWQ = [
    Case("awq scale nan", _awq(scales=torch.full((2, 16), NAN, dtype=F16)), (SHARD, "m.scales", "nan"), "awq"),
    Case("awq scale infinite", _awq(scales=torch.full((2, 16), INF, dtype=F16)), (SHARD, "m.scales", "inf"), "awq"),
    Case("awq without scales", _awq(scales=None), ("m.scales", "missing"), "awq"),
    Case("awq without zero points", _awq(qzeros=None), (SHARD, "m.qzeros is missing"), "awq"),
    Case("awq scales integers", _awq(scales=torch.ones(2, 16, dtype=torch.int32)), ("m.scales", "int32"), "awq"),
    Case("awq scales of one group", _awq(scales=torch.ones(1, 16, dtype=F16)), (SHARD, "m.scales", "[1, 16]"), "awq"),
    Case("awq zero points of other words", _awq(qzeros=torch.zeros(2, 1, dtype=torch.int32)), ("m.qzeros",), "awq"),
    Case("awq zero points no middle", _awq(qzeros=torch.zeros(2, 2, dtype=torch.int32)), ("row 0, group 0",), "awq"),
    Case("awq codes bytes", _awq(qweight=torch.zeros(64, 2, dtype=torch.uint8)), (SHARD, "m.qweight", "uint8"), "awq"),
    Case("awq codes of one axis", _awq(qweight=torch.zeros(128, dtype=torch.int32)), ("m.qweight", "1 axes"), "awq"),
    Case("awq codes empty", _awq(qweight=torch.zeros(0, 2, dtype=torch.int32)), (SHARD, "m.qzeros"), "awq"),
    _lies({"bits": 3}, "3 bits"),
    _lies({"bits": "4"}, "'4' bits"),
    _lies({"group_size": 0}, "group_size 0"),
    _lies({"group_size": 2**40}, "1099511627776", "64"),
    _lies({"group_size": None}, "group_size None"),
    _lies({"version": "gemv_fast"}, "gemv_fast"),
    _lies({"version": ["gemm"]}, "version"),
    _lies({"version": "gemv"}, "groups of 32 do not divide rows of 16"),
]

E4M3 = torch.float8_e4m3fn


def _fp8(declared: Mapping[str, Any] | None = None, method: str = "fp8", **changes: Tensor | None) -> Build:
    """FP8 of [64, 96] in blocks of 32 x 32."""
    parts: dict[str, Tensor | None] = {
        "weight": torch.zeros(64, 96, dtype=E4M3),
        "weight_scale_inv": torch.ones(2, 3),
    }
    usual = {"quant_method": method, "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
    return checkpoint(usual | dict(declared or {}), {**parts, **changes})


def _static(**changes: Tensor | None) -> Build:
    scale = torch.tensor(1.0)
    parts: dict[str, Tensor | None] = {"weight_scale_inv": None, "weight_scale": scale, "input_scale": scale}
    return _fp8({"activation_scheme": "static", "weight_block_size": None}, "fp8", **{**parts, **changes})


FP8 = [
    Case("fp8 scale nan", _fp8(weight_scale_inv=torch.full((2, 3), NAN)), (SHARD, "m.weight_scale_inv", "nan"), "fp8"),
    Case("fp8 scale infinite", _fp8(weight_scale_inv=torch.full((2, 3), INF)), ("m.weight_scale_inv", "inf"), "fp8"),
    Case("fp8 code nan", _fp8(weight=torch.full((64, 96), NAN).to(E4M3)), (SHARD, "m.weight", "NaN at [0, 0]"), "fp8"),
    Case("fp8 without scales", _fp8(weight_scale_inv=None), (SHARD, "m.weight", "without a scale"), "fp8"),
    Case("fp8 scales alone", _fp8(weight=None), ("m.weight is missing",), "fp8"),
    Case("fp8 codes bytes", _fp8(weight=torch.zeros(64, 96, dtype=torch.uint8)), ("m.weight", "uint8"), "fp8"),
    Case("fp8 codes of three axes", _fp8(weight=torch.zeros(2, 32, 96).to(E4M3)), ("m.weight", "[2, 32, 96]"), "fp8"),
    Case("fp8 scales integers", _fp8(weight_scale_inv=torch.ones(2, 3).int()), ("m.weight_scale_inv", "int32"), "fp8"),
    Case("fp8 scales too few", _fp8(weight_scale_inv=torch.ones(2, 2)), ("m.weight_scale_inv", "[2, 2]"), "fp8"),
    Case(
        "fp8 exponent nan",
        _fp8(weight_scale_inv=torch.full((2, 3), 255, dtype=torch.uint8)),
        ("m.weight_scale_inv", "nan"),
        "fp8",
    ),
    Case("fp8 blocks of one side", _fp8({"weight_block_size": [128]}), ("weight_block_size", "[128]"), "fp8"),
    Case("fp8 blocks of nothing", _fp8({"weight_block_size": [0, 128]}), ("weight_block_size", "[0, 128]"), "fp8"),
    Case("fp8 blocks a text", _fp8({"weight_block_size": "128"}), ("weight_block_size", "'128'"), "fp8"),
    Case("fp8 activations by magic", _fp8({"activation_scheme": "magic"}), ("activation_scheme", "'magic'"), "fp8"),
    Case("fp8 scales of nothing named", _static(weight_scale=torch.ones(7)), ("m.weight_scale", "[7]"), "fp8"),
    Case("fp8 without input scale", _static(input_scale=None), ("m.input_scale", "missing"), "fp8"),
    Case("fp8 input scale negative", _static(input_scale=torch.tensor(-1.0)), ("m.input_scale", "positive"), "fp8"),
    Case("fp8 input scales two", _static(input_scale=torch.ones(2)), ("m.input_scale", "not one"), "fp8"),
]


def _rows(**changes: Tensor | None) -> Build:
    """fbgemm_fp8 of [64, 96]."""
    parts: dict[str, Tensor | None] = {"weight_scale_inv": None, "weight_scale": torch.ones(64, 1)}
    return _fp8(None, "fbgemm_fp8", **{**parts, **changes})


ROWS = [
    Case(
        "fbgemm scale nan", _rows(weight_scale=torch.full((64, 1), NAN)), (SHARD, "m.weight_scale", "nan"), "fbgemm_fp8"
    ),
    Case(
        "fbgemm scale infinite", _rows(weight_scale=torch.full((64, 1), INF)), ("m.weight_scale", "inf"), "fbgemm_fp8"
    ),
    Case("fbgemm code nan", _rows(weight=torch.full((64, 96), NAN).to(E4M3)), ("m.weight", "NaN"), "fbgemm_fp8"),
    Case("fbgemm without scales", _rows(weight_scale=None), ("m.weight", "weight_scale beside"), "fbgemm_fp8"),
    Case("fbgemm scales alone", _rows(weight=None), ("m.weight",), "fbgemm_fp8"),
    Case(
        "fbgemm scales of a column", _rows(weight_scale=torch.ones(1, 96)), ("m.weight_scale", "[1, 96]"), "fbgemm_fp8"
    ),
    Case(
        "fbgemm scales halves",
        _rows(weight_scale=torch.ones(64, 1).half()),
        ("m.weight_scale", "float16"),
        "fbgemm_fp8",
    ),
    Case("fbgemm scales empty", _rows(weight_scale=torch.ones(0, 1)), ("m.weight_scale", "[0, 1]"), "fbgemm_fp8"),
    Case("fbgemm codes bytes", _rows(weight=torch.zeros(64, 96).byte()), ("m.weight",), "fbgemm_fp8"),
    Case(
        "fbgemm codes of three axes",
        _rows(weight=torch.zeros(2, 32, 96).to(E4M3)),
        ("m.weight", "3 axes"),
        "fbgemm_fp8",
    ),
    Case("fbgemm codes e5m2", _rows(weight=torch.zeros(64, 96).to(torch.float8_e5m2)), ("m.weight",), "fbgemm_fp8"),
]


def _bitnet(declared: Mapping[str, Any] | None = None, **changes: Tensor | None) -> Build:
    """BitNet of [64, 96]."""
    parts: dict[str, Tensor | None] = {
        "weight": torch.full((16, 96), 0b01010101, dtype=torch.uint8),
        "weight_scale": torch.ones(1, dtype=torch.bfloat16),
    }
    usual = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}
    return checkpoint(usual | dict(declared or {}), {**parts, **changes})


def _one(value: float, *shape: int) -> Tensor:
    return torch.full(shape or (1,), value, dtype=torch.bfloat16)


BITNET = [
    Case("bitnet scale nan", _bitnet(weight_scale=_one(NAN)), (SHARD, "m.weight_scale", "nan"), "bitnet"),
    Case("bitnet scale infinite", _bitnet(weight_scale=_one(INF)), (SHARD, "m.weight_scale", "inf"), "bitnet"),
    Case(
        "bitnet divides by zero",
        _bitnet({"linear_class": "bitlinear"}, weight_scale=_one(0.0)),
        ("m.weight_scale", "reciprocal", "inf"),
        "bitnet",
    ),
    Case("bitnet scales two", _bitnet(weight_scale=_one(1.0, 2)), (SHARD, "m.weight_scale", "[2]"), "bitnet"),
    Case("bitnet scale an integer", _bitnet(weight_scale=torch.ones(1).int()), ("m.weight_scale", "int32"), "bitnet"),
    Case(
        "bitnet divides by float32",
        _bitnet({"linear_class": "bitlinear"}, weight_scale=torch.ones(1)),
        ("m.weight_scale", "float32"),
        "bitnet",
    ),
    Case("bitnet without scale", _bitnet(weight_scale=None), ("m.weight_scale is missing",), "bitnet"),
    Case("bitnet scale alone", _bitnet(weight=None), ("m.weight is missing",), "bitnet"),
    Case(
        "bitnet fourth level",
        _bitnet(weight=torch.full((16, 96), 0b11010101, dtype=torch.uint8)),
        (SHARD, "m.weight", "code 3", "end at 2"),
        "bitnet",
    ),
    Case("bitnet codes signed", _bitnet(weight=torch.zeros(16, 96).char()), (SHARD, "m.weight", "int8"), "bitnet"),
    Case("bitnet codes of one axis", _bitnet(weight=torch.zeros(96).byte()), ("m.weight", "[96]"), "bitnet"),
    Case("bitnet of another kind", _bitnet({"linear_class": "superlinear"}), ("superlinear",), "bitnet"),
]


def _auto_round(**declared: Any) -> Build:
    usual = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True, "data_type": "int"}
    return _awq({"packing_format": "auto_round:auto_awq", **usual, **declared})


AUTO_ROUND = [
    Case("auto-round packed by nobody", _auto_round(packing_format="auto_round:abra"), ("'auto_round:abra'",)),
    Case("auto-round packed by a number", _auto_round(packing_format=4), ("packing_format 4",)),
    Case("auto-round rotated", _auto_round(rotation_config={"a": 1}), ("rotation_config", "rotated")),
    Case("auto-round of floats", _auto_round(data_type="fp"), ("'fp'",)),
    Case("auto-round with 8-bit inputs", _auto_round(act_bits=8), ("8-bit activations",)),
    Case("auto-round extra a list", _auto_round(extra_config=[1]), ("extra_config",)),
    Case("auto-round extra of numbers", _auto_round(extra_config={"m": 4}), ("extra_config",)),
    Case("auto-round extra no expression", _auto_round(extra_config={"(": {"bits": 4}}), ("'('",)),
    Case("auto-round with other bits", _auto_round(extra_config={"m": {"bits": 3}}), ("m: awq with 3 bits",)),
    Case("auto-round bits a text", _auto_round(bits="4"), ("'4' bits",)),
    Case(
        "auto-round floats of 6 bits",
        _auto_round(packing_format="auto_round:llm_compressor", data_type="mx_fp", bits=6),
        ("6-bit mx_fp",),
    ),
]


def _mlx(declared: Mapping[str, Any] | None = None, **changes: Tensor | None) -> Build:
    """MLX of [16, 128], 4 bits in groups of 64."""
    parts: dict[str, Tensor | None] = {
        "weight": torch.zeros(16, 16, dtype=torch.uint32),
        "scales": torch.ones(16, 2, dtype=F16),
        "biases": torch.ones(16, 2, dtype=F16),
    }
    tensors = {f"m.{name}": tensor for name, tensor in {**parts, **changes}.items() if tensor is not None}
    usual = {"group_size": 64, "bits": 4, "mode": "affine"} | dict(declared or {})
    return _directory({SHARD: tensors}, config={"quantization": usual, "quantization_config": usual})


MLX_SMALL = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
MLX_ONES = torch.full((16, 4), 127).byte()
MLX_NANS = torch.full((16, 128), 0x7F).byte().view(torch.uint32)
MLX = [
    Case("mlx scale nan", _mlx(scales=torch.full((16, 2), NAN, dtype=F16)), (SHARD, "m.scales", "nan"), "mlx"),
    Case("mlx bias infinite", _mlx(biases=torch.full((16, 2), INF, dtype=F16)), (SHARD, "m.biases", "inf"), "mlx"),
    Case("mlx without biases", _mlx(biases=None), (SHARD, "m.biases is missing"), "mlx"),
    Case("mlx without weight", _mlx(weight=None), ("m.weight is missing",), "mlx"),
    Case("mlx biases of another dtype", _mlx(biases=torch.ones(16, 2)), (SHARD, "m.biases", "float32"), "mlx"),
    Case("mlx scales too few", _mlx(scales=torch.ones(16, 1, dtype=F16)), (SHARD, "m.scales", "[16, 1]"), "mlx"),
    Case("mlx scales integers", _mlx(scales=torch.ones(16, 2).int()), ("m.weight", "int32"), "mlx"),
    Case("mlx words signed", _mlx(weight=torch.zeros(16, 16).int()), (SHARD, "m.weight", "int32"), "mlx"),
    Case("mlx words of one axis", _mlx(weight=torch.zeros(16, dtype=torch.uint32)), ("m.weight", "[16]"), "mlx"),
    Case("mlx words too few", _mlx(weight=torch.zeros(16, 15, dtype=torch.uint32)), ("m.weight", "15 words"), "mlx"),
    Case("mlx with 7 bits", _mlx({"bits": 7}), ("7 bits",), "mlx"),
    Case("mlx bits a text", _mlx({"bits": "4"}), ("'4' bits",), "mlx"),
    Case("mlx groups of 48", _mlx({"group_size": 48}), ("group_size 48",), "mlx"),
    Case("mlx of another mode", _mlx({"mode": "nvfp8"}), ("mode 'nvfp8'",), "mlx"),
    Case("mlx mode a list", _mlx({"mode": ["nvfp4"]}), ("mode ['nvfp4']",), "mlx"),
    Case("mlx nvfp4 in groups of integers", _mlx({"mode": "nvfp4"}), ("group_size 64 and mode 'nvfp4'",), "mlx"),
    Case("mlx mxfp4 with float scales", _mlx(MLX_SMALL), ("m.weight", "float16"), "mlx"),
    Case(
        "mlx mxfp4 with too few scales",
        _mlx(MLX_SMALL, scales=torch.ones(16, 2).byte()),
        ("m.scales", "[16, 2]"),
        "mlx",
    ),
    Case("mlx mxfp4 scale nan", _mlx(MLX_SMALL, scales=torch.full((16, 4), 255).byte()), ("m.scales", "255"), "mlx"),
    Case(
        "mlx mxfp8 nan",
        _mlx({**MLX_SMALL, "bits": 8, "mode": "mxfp8"}, weight=MLX_NANS, scales=MLX_ONES),
        ("m.weight", "NaN"),
        "mlx",
    ),
    Case("mlx module of 5 groups", _mlx({"m": {"group_size": 5}}), ("m: ", "group_size 5"), "mlx"),
]


def _modelopt(algorithm: Any = "NVFP4", **changes: Tensor | None) -> Build:
    """ModelOpt's NVFP4 of [16, 64]."""
    parts: dict[str, Tensor | None] = {
        "weight": torch.zeros(16, 32, dtype=torch.uint8),
        "weight_scale": torch.ones(16, 4).to(E4M3),
        "weight_scale_2": torch.tensor(1.0),
        "input_scale": torch.tensor(1.0),
    }
    return checkpoint({"quant_method": "modelopt", "quant_algo": algorithm}, {**parts, **changes})


INT4 = {
    "weight": torch.zeros(16, 32).byte(),
    "weight_scale": torch.ones(32, 2),
    "weight_scale_2": None,
    "input_scale": None,
}
EIGHT = {"weight": torch.zeros(16, 32).to(E4M3), "weight_scale": torch.tensor(1.0), "weight_scale_2": None}
MODELOPT = [
    Case(
        "modelopt scale nan",
        _modelopt(weight_scale=torch.full((16, 4), NAN).to(E4M3)),
        ("m.weight_scale", "NaN"),
        "modelopt",
    ),
    Case(
        "modelopt scale 2 nan",
        _modelopt(weight_scale_2=torch.tensor(NAN)),
        (SHARD, "m.weight_scale_2", "nan"),
        "modelopt",
    ),
    Case(
        "modelopt scale 2 infinite",
        _modelopt(weight_scale_2=torch.tensor(INF)),
        ("m.weight_scale_2", "inf"),
        "modelopt",
    ),
    Case("modelopt scales 2 two", _modelopt(weight_scale_2=torch.ones(2)), (SHARD, "m.weight_scale_2"), "modelopt"),
    Case("modelopt without scale 2", _modelopt(weight_scale_2=None), ("m.weight_scale_2 is missing",), "modelopt"),
    Case(
        "modelopt input scale zero", _modelopt(input_scale=torch.tensor(0.0)), ("m.input_scale", "positive"), "modelopt"
    ),
    Case("modelopt input scales two", _modelopt(input_scale=torch.ones(2)), ("m.input_scale", "positive"), "modelopt"),
    Case(
        "modelopt scales too few",
        _modelopt(weight_scale=torch.ones(16, 3).to(E4M3)),
        ("m.weight_scale", "[16, 3]"),
        "modelopt",
    ),
    Case(
        "modelopt scales halves",
        _modelopt(weight_scale=torch.ones(16, 4).half()),
        ("m.weight_scale_2", "W4A8_AWQ"),
        "modelopt",
    ),
    Case("modelopt without weight", _modelopt(weight=None), ("m.weight is missing",), "modelopt"),
    Case("modelopt codes of one axis", _modelopt(weight=torch.zeros(16).byte()), ("m.weight", "[16]"), "modelopt"),
    Case("modelopt row of 24", _modelopt(weight=torch.zeros(16, 12).byte()), ("m.weight", "24 values"), "modelopt"),
    Case("modelopt factors nan", _modelopt(pre_quant_scale=torch.full((64,), NAN)), ("m.pre_quant", "nan"), "modelopt"),
    Case("modelopt factors too few", _modelopt(pre_quant_scale=torch.ones(32)), ("m.pre_quant", "[32]"), "modelopt"),
    Case("modelopt factors integers", _modelopt(pre_quant_scale=torch.ones(64).int()), ("m.pre_quant",), "modelopt"),
    Case(
        "modelopt factors alone",
        _modelopt(weight_scale=None, pre_quant_scale=torch.ones(64)),
        ("m.pre_quant_scale", "not quantized"),
        "modelopt",
    ),
    *(
        Case(f"modelopt integers, {what}", _modelopt("W4A16_AWQ", **INT4 | changes), said, "modelopt")
        for what, changes, said in [
            ("scale nan", {"weight_scale": torch.full((32, 2), NAN)}, ("m.weight_scale", "nan")),
            ("scale infinite", {"weight_scale": torch.full((32, 2), INF)}, ("m.weight_scale", "inf")),
            ("scales of 16 rows", {"weight_scale": torch.ones(16, 2)}, ("m.weight_scale", "[16, 2]")),
            ("scales of 3 groups", {"weight_scale": torch.ones(32, 3)}, ("m.weight_scale", "[32, 3]")),
            ("scales of no group", {"weight_scale": torch.ones(32, 0)}, ("m.weight_scale", "[32, 0]")),
            ("scales of one axis", {"weight_scale": torch.ones(32)}, ("m.weight_scale", "[32]")),
            ("scales integers", {"weight_scale": torch.ones(32, 2).int()}, ("m.weight", "int32")),
            ("codes signed", {"weight": torch.zeros(16, 32).char()}, ("m.weight", "int8")),
            ("of FP8", {"weight_scale_2": torch.tensor(1.0)}, ("m.weight_scale_2", "W4A8_AWQ")),
        ]
    ),
    *(
        Case(f"modelopt FP8, {what}", _modelopt("FP8", **EIGHT | changes), said, "modelopt")
        for what, changes, said in [
            ("code nan", {"weight": torch.full((16, 32), NAN).to(E4M3)}, ("m.weight", "NaN")),
            ("scale nan", {"weight_scale": torch.tensor(NAN)}, ("m.weight_scale", "nan")),
            ("7 scales", {"weight_scale": torch.ones(7)}, ("m.weight_scale", "[7]")),
            ("scales of 128 columns", {"weight_scale": torch.ones(1, 1, 2, 1)}, ("m.weight_scale", "[1, 1, 2, 1]")),
            ("with factors", {"pre_quant_scale": torch.ones(32)}, ("m.pre_quant_scale", "FP8")),
            ("input scale negative", {"input_scale": torch.tensor(-1.0)}, ("m.input_scale", "positive")),
        ]
    ),
    Case("modelopt by W8A8", _modelopt("W8A8_SQ_PER_CHANNEL"), ("W8A8_SQ_PER_CHANNEL",), "modelopt"),
    Case("modelopt by a list", _modelopt(["NVFP4"]), ("['NVFP4']",), "modelopt"),
]


def _experts(**changes: Tensor | None) -> Build:
    """gpt-oss: two experts of [6, 64]."""
    parts: dict[str, Tensor | None] = {
        "up_blocks": torch.zeros(2, 6, 2, 16, dtype=torch.uint8),
        "up_scales": torch.full((2, 6, 2), 127, dtype=torch.uint8),
    }
    return checkpoint({"quant_method": "mxfp4"}, {**parts, **changes})


def _bytes(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


MXFP4 = [
    Case("experts scale nan", _experts(up_scales=_bytes(2, 6, 2) + 255), (SHARD, "m.up_scales", "code 255"), "mxfp4"),
    Case("experts without scales", _experts(up_scales=None), (SHARD, "m.up_blocks", "m.up_scales"), "mxfp4"),
    Case("experts scales too few", _experts(up_scales=_bytes(2, 6, 1)), (SHARD, "m.up_scales", "[2, 6, 1]"), "mxfp4"),
    Case("experts scales too many", _experts(up_scales=_bytes(2, 6, 9)), (SHARD, "m.up_scales", "[2, 6, 9]"), "mxfp4"),
    Case("experts scales floats", _experts(up_scales=torch.ones(2, 6, 2)), ("m.up_scales", "float32"), "mxfp4"),
    Case("experts scales of two axes", _experts(up_scales=_bytes(12, 2)), ("m.up_scales", "[12, 2]"), "mxfp4"),
    Case("experts scales empty", _experts(up_scales=_bytes(0, 6, 2)), (SHARD, "m.up_scales"), "mxfp4"),
    Case("experts blocks of 8 bytes", _experts(up_blocks=_bytes(2, 6, 4, 8)), ("m.up_blocks", "4, 8]"), "mxfp4"),
    Case("experts blocks of three axes", _experts(up_blocks=_bytes(12, 2, 16)), ("m.up_blocks", "[12, 2,"), "mxfp4"),
    Case("experts blocks of no axis", _experts(up_blocks=_bytes()), (SHARD, "m.up_blocks", "[]"), "mxfp4"),
    Case("experts blocks floats", _experts(up_blocks=torch.zeros(2, 6, 2, 16)), ("m.up_blocks", "float32"), "mxfp4"),
]


def _torchao(**changes: Tensor | None) -> Build:
    """torchao's int8 of [16, 64]."""
    parts: dict[str, Tensor | None] = {
        "_weight_qdata": torch.zeros(16, 64, dtype=torch.int8),
        "_weight_scale": torch.ones(16, 1),
        "_weight_zero_point": torch.zeros(16, 1, dtype=torch.int8),
    }
    return checkpoint({"quant_method": "torchao"}, {**parts, **changes})


TAO4 = {
    "_weight_qdata": torch.zeros(16, 64).char(),
    "_weight_scale": torch.ones(2, 16),
    "_weight_zero_point": torch.ones(2, 16),
}
TORCHAO = [
    Case("torchao scale nan", _torchao(_weight_scale=torch.full((16, 1), NAN)), ("m._weight_scale", "nan"), "torchao"),
    Case("torchao scale infinite", _torchao(_weight_scale=torch.full((16, 1), INF)), ("m._weight_scale",), "torchao"),
    Case("torchao without scales", _torchao(_weight_scale=None), ("m: torchao", "zero_point"), "torchao"),
    Case("torchao without codes", _torchao(_weight_qdata=None), ("m: torchao", "no codes"), "torchao"),
    Case("torchao codes bytes", _torchao(_weight_qdata=_bytes(16, 64)), ("m: torchao", "uint8"), "torchao"),
    Case(
        "torchao codes of one axis", _torchao(_weight_qdata=_bytes(16).char()), ("m._weight_scale", "[16]"), "torchao"
    ),
    Case(
        "torchao code nan", _torchao(_weight_qdata=torch.full((16, 64), NAN).to(E4M3)), ("m._weight_qdata",), "torchao"
    ),
    Case("torchao scales integers", _torchao(_weight_scale=torch.ones(16, 1).int()), ("m._weight_scale",), "torchao"),
    Case(
        "torchao scales of 7 rows", _torchao(_weight_scale=torch.ones(7, 1)), ("m._weight_scale", "[7, 1]"), "torchao"
    ),
    Case("torchao scales of 5 groups", _torchao(_weight_scale=torch.ones(16, 5)), ("m._weight_scale", "5]"), "torchao"),
    Case("torchao scales of no group", _torchao(_weight_scale=torch.ones(16, 0)), ("m._weight_scale", "0]"), "torchao"),
    *(
        Case(f"torchao int4, {what}", _torchao(**TAO4 | changes), said, "torchao")
        for what, changes, said in [
            ("scale nan", {"_weight_scale": torch.full((2, 16), NAN)}, ("m._weight_scale", "nan")),
            ("shift infinite", {"_weight_zero_point": torch.full((2, 16), INF)}, ("m._weight_zero_point", "inf")),
            ("shifts too few", {"_weight_zero_point": torch.ones(1, 16)}, ("m._weight_zero_point", "[1, 16]")),
            ("scales of 7 rows", {"_weight_scale": torch.ones(2, 7)}, ("m._weight_scale", "[2, 7]")),
            ("scales of 5 groups", {"_weight_scale": torch.ones(5, 16)}, ("m._weight_scale", "[5, 16]")),
            ("scales of no group", {"_weight_scale": torch.ones(0, 16)}, ("m._weight_scale", "[0, 16]")),
            ("scales integers", {"_weight_scale": torch.ones(2, 16).int()}, ("m._weight_scale", "int32")),
            ("codes unsigned", {"_weight_qdata": torch.zeros(16, 64).byte()}, ("m: torchao", "int4")),
            ("codes of one axis", {"_weight_qdata": torch.zeros(16).char()}, ("m: torchao", "int4")),
            ("7 factors", {"_weight_act_pre_scale": torch.ones(7)}, ("m._weight_act_pre_scale", "[7]")),
            ("factor nan", {"_weight_act_pre_scale": torch.full((128,), NAN)}, ("act_pre_scale", "nan")),
        ]
    ),
    Case("torchao int4 without codes", _torchao(**TAO4 | {"_weight_qdata": None}), ("m: torchao", "int4"), "torchao"),
    Case("torchao of another kind", _torchao(_weight_scale_and_zero=torch.ones(1)), ("scale_and_zero",), "torchao"),
    Case(
        "torchao zero points too few",
        _torchao(_weight_zero_point=torch.ones(3, 1, dtype=torch.int8)),
        (SHARD, "m._weight_zero_point", "[3, 1]"),
        "torchao",
    ),
]


def _aqlm(declared: Mapping[str, Any] | None = None, **changes: Tensor | None) -> Build:
    """AQLM of [6, 16], vectors of 8 columns, two books of 6 bits."""
    parts: dict[str, Tensor | None] = {
        "codes": torch.zeros(6, 2, 2, dtype=torch.int8),
        "codebooks": torch.ones(2, 64, 1, 8, dtype=F16),
        "scales": torch.ones(6, 1, 1, 1, dtype=F16),
    }
    usual = {"in_group_size": 8, "out_group_size": 1, "num_codebooks": 2, "nbits_per_codebook": 6}
    return checkpoint({"quant_method": "aqlm", **usual, **(declared or {})}, {**parts, **changes})


AQLM = [
    Case("aqlm scale nan", _aqlm(scales=torch.full((6, 1, 1, 1), NAN, dtype=F16)), ("m.scales", "nan"), "aqlm"),
    Case("aqlm entry infinite", _aqlm(codebooks=torch.full((2, 64, 1, 8), INF, dtype=F16)), ("m.codebooks",), "aqlm"),
    Case("aqlm without scales", _aqlm(scales=None), ("m.scales is missing",), "aqlm"),
    Case("aqlm without codebooks", _aqlm(codebooks=None), ("m.codebooks is missing",), "aqlm"),
    Case("aqlm scales of other rows", _aqlm(scales=torch.ones(5, 1, 1, 1, dtype=F16)), ("m.scales", "[5, 1"), "aqlm"),
    Case("aqlm scales integers", _aqlm(scales=torch.ones(6, 1, 1, 1, dtype=torch.int32)), ("m.scales",), "aqlm"),
    Case(
        "aqlm codes of more bits",
        _aqlm(codes=torch.full((6, 2, 2), 32, dtype=torch.int8)),
        ("m.codes", "6 bits"),
        "aqlm",
    ),
    Case("aqlm codes of 16 bits", _aqlm(codes=torch.zeros(6, 2, 2, dtype=torch.int16)), ("m.codes", "int8"), "aqlm"),
    Case("aqlm codes of two axes", _aqlm(codes=torch.zeros(6, 4, dtype=torch.int8)), ("m.codes [6, 4]",), "aqlm"),
    Case(
        "aqlm codes of one book", _aqlm(codes=torch.zeros(6, 2, 1, dtype=torch.int8)), ("m.codes", "[6, 2, 1]"), "aqlm"
    ),
    Case("aqlm codebooks empty", _aqlm(codebooks=torch.ones(2, 64, 0, 8, dtype=F16)), ("[2, 64, 0, 8]",), "aqlm"),
    Case(
        "aqlm codebooks of 63 entries",
        _aqlm(
            {"nbits_per_codebook": 5},
            codebooks=torch.ones(2, 63, 1, 8, dtype=F16),
        ),
        ("2 x 63 entries", "power of two"),
        "aqlm",
    ),
    *(
        Case(f"aqlm says {field} {value}", _aqlm({field: value}), ("m.codebooks", field, repr(value)), "aqlm")
        for field, value in [("in_group_size", 2**40), ("num_codebooks", "2"), ("nbits_per_codebook", None)]
    ),
]


def _vptq(declared: Mapping[str, Any] | None = None, **changes: Tensor | None) -> Build:
    """VPTQ of [10, 22]: 4 outliers in vectors of 2, the others in vectors of 4, 5 and 3 bits; names as in the file."""
    parts: dict[str, Tensor | None] = {
        "indices": torch.zeros(1, 3, 5, dtype=torch.int32),
        "centroids_weight": torch.ones(1, 128, dtype=F16),
        "res_centroids_weight": torch.ones(1, 32, dtype=F16),
        "outlier_centroids_weight": torch.ones(1, 16, dtype=F16),
        "outlier_indices": torch.zeros(1, 5, 4, dtype=torch.int16),
        "weight_scale": torch.ones(22, dtype=F16),
        "weight_bias": torch.ones(22, dtype=F16),
        "perm": torch.arange(22, dtype=torch.int16),
    }
    usual = {
        "in_features": 22, "out_features": 10, "vector_lens": [2, 4], "num_centroids": [8, 32],
        "num_res_centroids": [-1, 8], "group_num": 1, "group_size": 18, "outlier_size": 4, "indices_as_float": False,
        "enable_norm": True, "enable_perm": True, "is_indice_packed": True,
    }  # fmt: skip
    found = {name.replace("_weight", ".weight"): tensor for name, tensor in {**parts, **changes}.items()}
    return checkpoint({"quant_method": "vptq", "config_for_layers": {"m": usual | dict(declared or {})}}, found)


def _vptq_says(said: str, **fields: Any) -> Case:
    words = ", ".join(f"{field} {value}" for field, value in fields.items())
    return Case(f"vptq says {words}", _vptq(fields), ("m", said), "vptq")


VPTQ = [
    Case(
        "vptq entry nan", _vptq(centroids_weight=torch.full((1, 128), NAN, dtype=F16)), ("m.centroids", "nan"), "vptq"
    ),
    Case("vptq scale infinite", _vptq(weight_scale=torch.full((22,), INF, dtype=F16)), ("m.weight_scale",), "vptq"),
    Case("vptq without indices", _vptq(indices=None), ("m.indices is missing",), "vptq"),
    Case("vptq without residual", _vptq(res_centroids_weight=None), ("m.res_centroids.weight is missing",), "vptq"),
    Case("vptq order twice", _vptq(perm=torch.zeros(22, dtype=torch.int16)), ("m.perm is no order of 22",), "vptq"),
    Case("vptq order beyond", _vptq(perm=torch.arange(-1, 21, dtype=torch.int16)), ("m.perm is no order",), "vptq"),
    Case(
        "vptq outlier beyond",
        _vptq(outlier_indices=torch.full((1, 5, 4), 8, dtype=torch.int16)),
        ("m.outlier_indices holds 8",),
        "vptq",
    ),
    Case(
        "vptq indices of fewer words",
        _vptq(indices=torch.zeros(1, 3, 4, dtype=torch.int32)),
        ("m.indices", "[1, 3, 4]"),
        "vptq",
    ),
    Case("vptq indices bytes", _vptq(indices=torch.zeros(1, 3, 5, dtype=torch.uint8)), ("m.indices", "uint8"), "vptq"),
    Case(
        "vptq centroids integers",
        _vptq(centroids_weight=torch.ones(1, 128, dtype=torch.int32)),
        ("m.centroids",),
        "vptq",
    ),
    _vptq_says("m.indices", out_features=2**40),
    _vptq_says("do not divide", in_features=3),
    _vptq_says("no power of two", num_centroids=[8, 33]),
    _vptq_says("1 to 16 bits", num_centroids=[8, 2**17]),
    _vptq_says("vector_lens is 4", vector_lens=4),
    _vptq_says("a weight of [10, 22]", vector_lens=[2, -4]),
    _vptq_says("1 groups of 17 for 18", group_size=17),
    _vptq_says("group_num is None", group_num=None),
    _vptq_says("pack_model", is_indice_packed=False),
    _vptq_says("outliers have no residual", num_res_centroids=[4, 8]),
    Case(
        "vptq says nothing of a layer",
        checkpoint({"quant_method": "vptq"}, {"centroids.weight": torch.ones(1, 4)}),
        ("m: config.json has no",),
        "vptq",
    ),
]


def _spqr(declared: Mapping[str, Any] | None = None, **changes: Tensor | None) -> Build:
    """SpQR of [16, 32] with two outliers in the first row."""
    parts: dict[str, Tensor | None] = {
        "dense_weights": torch.zeros(32, dtype=torch.int64),
        "row_offsets": torch.tensor([0] + [2] * 16, dtype=torch.int32),
        "col_vals": torch.tensor([1, 31], dtype=torch.int32),
        "in_perm": (torch.arange(0, 32, 2) | torch.arange(1, 32, 2) << 16).int(),
    }
    return checkpoint({"quant_method": "spqr", **(declared or {})}, {**parts, **changes})


def _offsets(*offsets: int) -> Tensor:
    return torch.tensor([*offsets] + [offsets[-1]] * (17 - len(offsets)), dtype=torch.int32)


SPQR = [
    Case("spqr without offsets", _spqr(row_offsets=None), ("m.row_offsets is missing",), "spqr"),
    Case("spqr without outliers", _spqr(col_vals=None), ("m.col_vals is missing",), "spqr"),
    Case("spqr offsets of tiles", _spqr(row_offsets=torch.tensor([0, 2], dtype=torch.int32)), ("ptcsr",), "spqr"),
    Case("spqr offsets falling", _spqr(row_offsets=_offsets(0, 5, 2)), ("m.row_offsets", "2 outliers"), "spqr"),
    Case("spqr offsets negative", _spqr(row_offsets=_offsets(0, -1, 2)), ("m.row_offsets",), "spqr"),
    Case("spqr offsets of more", _spqr(row_offsets=_offsets(0, 3)), ("m.row_offsets", "2 outliers"), "spqr"),
    Case("spqr offsets of 64 bits", _spqr(row_offsets=_offsets(0, 2).long()), ("m.row_offsets", "int64"), "spqr"),
    Case("spqr outlier beyond", _spqr(col_vals=torch.tensor([1, 32], dtype=torch.int32)), ("column 32 of 32",), "spqr"),
    Case(
        "spqr outlier nan",
        _spqr(col_vals=torch.full((2,), 0x7E000001, dtype=torch.int32)),
        ("m.col_vals", "nan"),
        "spqr",
    ),
    Case("spqr order twice", _spqr(in_perm=torch.zeros(16, dtype=torch.int32)), ("m.in_perm is no order",), "spqr"),
    Case("spqr order of fewer", _spqr(in_perm=torch.zeros(15, dtype=torch.int32)), ("15 pairs",), "spqr"),
    Case("spqr rows disagree", _spqr(dense_weights=torch.arange(32) << 54), ("m.dense_weights", "agree"), "spqr"),
    Case("spqr words of half a tile", _spqr(dense_weights=torch.zeros(24, dtype=torch.int64)), ("24 words",), "spqr"),
    Case(
        "spqr words of 32 bits", _spqr(dense_weights=torch.zeros(32, dtype=torch.int32)), ("m.dense_weights",), "spqr"
    ),
    Case("spqr says 4 bits", _spqr({"bits": 4}), ("'bits': 4",), "spqr"),
]


LLAMA = {
    "model_type": "llama", "hidden_size": 160, "intermediate_size": 4, "num_hidden_layers": 1, "vocab_size": 4,
    "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip
UP = "model.layers.0.mlp.up_proj"


def _quanto(config: Mapping[str, Any] | None = None, /, **changes: Tensor | None) -> Build:
    """quanto's 4 bits of [4, 160], groups of 32."""
    parts: dict[str, Tensor | None] = {
        "_data._data": torch.zeros(10, 32, dtype=torch.uint8),
        "_scale": torch.ones(20, 1),
        "_shift": torch.zeros(20, 1),
    }
    found = {name: tensor for name, tensor in {**parts, **changes}.items() if tensor is not None}
    scales = {f"{UP}.{name}": found.pop(name) for name in ("input_scale", "output_scale") if name in found}
    tensors = {f"{UP}.weight.{name}": tensor for name, tensor in found.items()}
    return _directory({SHARD: tensors | scales}, config=LLAMA if config is None else config)


def _quanto_bytes(data: Tensor, scale: Tensor) -> Build:
    return _quanto(**{"_data._data": None, "_data": data, "_scale": scale, "_shift": None})


_CODES = torch.zeros(4, 160, dtype=torch.int8)
QUANTO = [
    Case("quanto scale nan", _quanto(_scale=torch.full((20, 1), NAN)), (f"{UP}.weight._scale", "nan"), "quanto"),
    Case("quanto scale of one row", _quanto(_scale=torch.ones(1, 1)), (f"{UP}.weight._scale", "[1, 1]"), "quanto"),
    Case("quanto scale integer", _quanto(_scale=torch.ones(20, 1).int()), (f"{UP}.weight._scale", "int32"), "quanto"),
    Case("quanto without shift", _quanto(_shift=None), ("without _shift",), "quanto"),
    Case("quanto shift infinite", _quanto(_shift=torch.full((20, 1), INF)), (f"{UP}.weight._shift", "inf"), "quanto"),
    Case("quanto shift of 16", _quanto(_shift=_bytes(20, 1) + 16), (f"{UP}.weight._shift", "code 16"), "quanto"),
    Case("quanto shift of 7 groups", _quanto(_shift=torch.ones(7, 1)), (f"{UP}.weight._shift", "[7, 1]"), "quanto"),
    Case("quanto codes too few", _quanto(**{"_data._data": _bytes(9, 32)}), ("[9, 32]", "[10, 32]"), "quanto"),
    Case("quanto codes words", _quanto(**{"_data._data": _bytes(10, 32).int()}), ("int32",), "quanto"),
    Case("quanto without a model", _quanto({}), ("config.json describes no causal",), "quanto"),
    Case("quanto of another model", _quanto({**LLAMA, "model_type": "clip"}), ("config.json describes no",), "quanto"),
    Case("quanto of too many layers", _quanto({**LLAMA, "num_hidden_layers": 10**9}), ("1000000000",), "quanto"),
    Case("quanto of text for layers", _quanto({**LLAMA, "num_hidden_layers": "1"}), ("num_hidden_layers",), "quanto"),
    Case("quanto of a huge layer", _quanto({**LLAMA, "intermediate_size": 2**40}), (f"{UP}.weight",), "quanto"),
    Case("quanto with activations", _quanto(input_scale=torch.tensor(0.5)), (f"{UP}.input_scale",), "quanto"),
    Case("quanto with an odd scale", _quanto(output_scale=torch.ones(2)), (f"{UP}.output_scale",), "quanto"),
    Case("quanto bytes unsigned", _quanto_bytes(_bytes(4, 160), torch.ones(4, 1)), ("_data is", "uint8"), "quanto"),
    Case("quanto bytes of 4 axes", _quanto_bytes(_CODES[None, None], torch.ones(4, 1)), ("no", "[1, 1, 4"), "quanto"),
    Case("quanto bytes, 3 scales", _quanto_bytes(_CODES, torch.ones(3, 1)), (f"{UP}.weight._scale", "[3"), "quanto"),
]


def _eetq(declared: Mapping[str, Any] | None = None, **changes: Tensor | None) -> Build:
    """EETQ of [64, 128]."""
    parts: dict[str, Tensor | None] = {
        "weight": torch.zeros(128, 64, dtype=torch.int8),
        "weight_scales": torch.ones(64, dtype=F16),
    }
    return checkpoint({"quant_method": "eetq", "weights": "int8", **(declared or {})}, {**parts, **changes})


_TALL = torch.zeros(256, 32, dtype=torch.int8)
EETQ = [
    Case("eetq scale nan", _eetq(weight_scales=torch.full((64,), NAN, dtype=F16)), ("m.weight_scales", "nan"), "eetq"),
    Case("eetq scale infinite", _eetq(weight_scales=torch.full((64,), INF, dtype=F16)), ("m.weight_scales",), "eetq"),
    Case("eetq scales float32", _eetq(weight_scales=torch.ones(64)), ("m.weight_scales", "float32"), "eetq"),
    Case("eetq scales of inputs", _eetq(weight_scales=torch.ones(128, dtype=F16)), ("m.weight_scales", "128"), "eetq"),
    Case("eetq scales of two axes", _eetq(weight_scales=torch.ones(64, 1, dtype=F16)), ("m.weight_scales",), "eetq"),
    Case("eetq without scales", _eetq(weight_scales=None), ("m.weight_scales",), "eetq"),
    Case("eetq without codes", _eetq(weight=None), ("m.weight is not stored",), "eetq"),
    Case("eetq codes unsigned", _eetq(weight=_bytes(128, 64)), ("m.weight is not stored in int8",), "eetq"),
    Case("eetq codes of one axis", _eetq(weight=_bytes(64).char()), ("m.weight is [64]",), "eetq"),
    Case("eetq codes half a tile", _eetq(weight=_TALL), ("m.weight is [256, 32]", "64"), "eetq"),
    Case("eetq says int4", _eetq({"weights": "int4"}), ("'int4'",), "eetq"),
    Case("eetq says nothing", _eetq({"weights": None}), ("weights None",), "eetq"),
]

CASES = [
    *SPQR, *VPTQ, *AQLM, *EETQ, *QUANTO, *TORCHAO, *MXFP4, *MLX,
    *MODELOPT, *AWQ, *FP8, *ROWS, *BITNET, *AUTO_ROUND,
]  # fmt: skip
